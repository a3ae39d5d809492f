//! Listeners and connections: a thread for each client, as many as the store has lanes.
//!
//! Lock order: `connections` is the only lock, held for moments and never while a socket waits.

use crate::export::Exports;
use crate::stream::Stream;
use crate::wire::Wire;
use crate::{handshake, transmission};
use anyhow::{bail, Context, Result};
use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{Shutdown, TcpListener};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// Time for requests that have been received to be answered when the server ends.
const GRACE: Duration = Duration::from_secs(3);
/// When accepting fails, for want of file descriptors say, trying at once would only spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[derive(Clone)]
pub struct Server(Arc<Shared>);

struct Shared {
    exports: Exports,
    max_connections: usize,
    connections: Mutex<Connections>,
    one_left: Condvar,
}

#[derive(Default)]
struct Connections {
    open: HashMap<u64, Stream>,
    next: u64,
    ending: bool,
}

impl Server {
    pub fn new(exports: Exports, max_connections: usize) -> Server {
        let connections = Mutex::default();
        Server(Arc::new(Shared { exports, max_connections, connections, one_left: Condvar::new() }))
    }

    pub fn listen_unix(&self, path: &Path) -> Result<SocketFile> {
        remove_stale(path)?;
        let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
        let file = SocketFile(path.to_path_buf());
        self.accept_on("accept-unix", move || Ok(Stream::Unix(listener.accept()?.0)))?;
        Ok(file)
    }

    pub fn listen_tcp(&self, address: &str) -> Result<()> {
        let listener = TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
        self.accept_on("accept-tcp", move || {
            let socket = listener.accept()?.0;
            // A reply must not wait for the acknowledgement of the one before.
            socket.set_nodelay(true)?;
            Ok(Stream::Tcp(socket))
        })
    }

    fn accept_on(&self, name: &str, accept: impl Fn() -> std::io::Result<Stream> + Send + 'static) -> Result<()> {
        let server = self.clone();
        let accepting = move || loop {
            match accept() {
                Ok(stream) => server.admit(stream),
                Err(error) => {
                    warn!("cannot accept: {error}");
                    std::thread::sleep(ACCEPT_PAUSE);
                }
            }
        };
        std::thread::Builder::new().name(name.into()).spawn(accepting).context("cannot start a thread")?;
        Ok(())
    }

    fn admit(&self, stream: Stream) {
        let mut connections = self.connections();
        if connections.ending {
            return;
        }
        if connections.open.len() >= self.0.max_connections {
            warn!("refused a client: all {} connections are in use", self.0.max_connections);
            return;
        }
        let second = match stream.try_clone() {
            Ok(second) => second,
            Err(error) => return warn!("refused a client: {error}"),
        };
        let number = connections.next;
        connections.next += 1;
        connections.open.insert(number, second);
        drop(connections);
        let server = self.clone();
        let serving = move || {
            server.serve(number, stream);
            server.forget(number);
        };
        if let Err(error) = std::thread::Builder::new().name(format!("nbd-{number}")).spawn(serving) {
            warn!("refused a client: {error}");
            self.forget(number);
        }
    }

    fn forget(&self, number: u64) {
        self.connections().open.remove(&number);
        self.0.one_left.notify_all();
    }

    fn serve(&self, number: u64, stream: Stream) {
        let mut wire = Wire::new(stream);
        let chosen = match handshake::negotiate(&mut wire, &self.0.exports) {
            Ok(Some(chosen)) => chosen,
            Ok(None) => return,
            Err(error) => return info!(connection = number, "handshake: {error}"),
        };
        info!(connection = number, export = chosen.export.name, "client connected");
        match transmission::serve(&mut wire, *chosen) {
            Ok(()) => info!(connection = number, "client left"),
            Err(error) => warn!(connection = number, "client lost: {error}"),
        }
    }

    /// Takes no more requests, answers those received, and waits a bounded time for that.
    pub fn end(&self) {
        let deadline = Instant::now() + GRACE;
        let mut connections = self.connections();
        connections.ending = true;
        for stream in connections.open.values() {
            // A client that is gone already needs no shutdown.
            let _ = stream.shutdown(Shutdown::Read);
        }
        while !connections.open.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return warn!("{} clients did not take their replies in time", connections.open.len());
            }
            let waited = self.0.one_left.wait_timeout(connections, left);
            connections = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        // No step under the lock leaves the map half changed.
        self.0.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes the socket's name when dropped.
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody may have removed it before us; either way it is gone.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Removes a socket that nobody listens at; anything else at the path is not ours to remove.
fn remove_stale(path: &Path) -> Result<()> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        bail!("{} exists and is not a socket", path.display());
    }
    match UnixStream::connect(path) {
        Ok(_) => bail!("another server listens at {}", path.display()),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).with_context(|| format!("cannot remove the stale socket {}", path.display()))
        }
        Err(error) => Err(error).with_context(|| format!("cannot tell whether {} is in use", path.display())),
    }
}
