//! Where clients come in: Unix sockets, TCP, vsock, and sockets that systemd made.

use crate::supervise::KEPT;
use anyhow::{bail, Context, Result};
use rustix::io::{fcntl_setfd, FdFlags};
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::ErrorKind;
use std::net::ToSocketAddrs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// What the control socket is called.
const CONTROL: &str = "control";
/// Clients that the kernel lets wait until they are accepted.
const BACKLOG: i32 = 128;

/// A socket that clients connect to, and what to call it.
pub struct Listener {
    pub socket: Socket,
    pub name: String,
    /// Removed when the server ends.
    file: Option<PathBuf>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.file {
            // Somebody may have removed it before us; either way it is gone.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Listener {
    /// One that somebody else made, and removes.
    pub fn of(socket: Socket, name: String) -> Listener {
        Listener { socket, name, file: None }
    }

    /// One that another process of ours made, which left it to us with the file.
    pub fn left(socket: Socket, name: String, file: Option<PathBuf>) -> Listener {
        Listener { socket, name, file }
    }

    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    pub fn is_control(&self) -> bool {
        self.name == CONTROL
    }
}

pub fn unix(path: &Path) -> Result<Listener> {
    let listener = bind(path, format!("unix {}", path.display()))?;
    listen(&listener, path)?;
    Ok(listener)
}

/// The control socket: only for who runs the server.
pub fn control(path: &Path) -> Result<Listener> {
    let listener = bind(path, CONTROL.into())?;
    // Before anybody can connect.
    let only_owner = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, only_owner).with_context(|| format!("cannot protect {}", path.display()))?;
    listen(&listener, path)?;
    Ok(listener)
}

/// Makes the socket's file; clients are refused still.
fn bind(path: &Path, name: String) -> Result<Listener> {
    remove_stale(path)?;
    let place = || format!("cannot listen at {}", path.display());
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).with_context(place)?;
    socket.bind(&SockAddr::unix(path).with_context(place)?).with_context(place)?;
    Ok(Listener { socket, name, file: Some(path.to_path_buf()) })
}

fn listen(listener: &Listener, path: &Path) -> Result<()> {
    listener.socket.listen(BACKLOG).with_context(|| format!("cannot listen at {}", path.display()))
}

pub fn tcp(address: &str) -> Result<Listener> {
    let place = || format!("cannot listen at {address}");
    let mut failed = None;
    for address in address.to_socket_addrs().with_context(place)? {
        let bound = Socket::new(Domain::for_address(address), Type::STREAM, None).and_then(|socket| {
            // What is left of old connections must not keep the next server out.
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            socket.listen(BACKLOG)?;
            Ok(socket)
        });
        match bound {
            Ok(socket) => {
                let told = socket.local_addr().ok().and_then(|address| address.as_socket());
                return Ok(Listener::of(socket, format!("tcp {}", told.unwrap_or(address))));
            }
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) => Err(error).with_context(place),
        None => bail!("{}: it has no address", place()),
    }
}

/// At any address that this machine has as a guest or a host of guests.
pub fn vsock(port: u32) -> Result<Listener> {
    // VMADDR_CID_ANY.
    const ANY: u32 = u32::MAX;
    let place = || format!("cannot listen at vsock port {port}");
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None).with_context(place)?;
    socket.bind(&SockAddr::vsock(ANY, port)).with_context(place)?;
    socket.listen(BACKLOG).with_context(place)?;
    Ok(Listener::of(socket, format!("vsock port {port}")))
}

/// What systemd gives us.
pub struct Passed {
    /// What it listens at for us (LISTEN_FDS). It removes what it made.
    pub listeners: Vec<Listener>,
    /// What a server before us had it keep: arena and tables, if all of them are there.
    pub kept: Option<[OwnedFd; 3]>,
}

pub fn from_systemd() -> Result<Passed> {
    let given = sd_listen_fds::get().context("cannot take systemd's sockets")?;
    let (mut listeners, mut kept) = (Vec::new(), [const { None }; KEPT.len()]);
    for (name, descriptor) in given {
        let descriptor = descriptor.into_std();
        // A worker gets its own; and the arena's lock goes with any of them that is closed.
        fcntl_setfd(&descriptor, FdFlags::CLOEXEC).context("cannot take systemd's sockets")?;
        let name = name.unwrap_or_default();
        if let Some(which) = KEPT.iter().position(|kept| *kept == name) {
            kept[which] = Some(descriptor);
            continue;
        }
        let name = format!("systemd's socket {name}");
        let socket = Socket::from(descriptor);
        match socket.is_listener() {
            Ok(true) if socket.r#type()? == Type::STREAM => {}
            _ => bail!("{} is not a stream socket that listens (Accept=no is needed)", name.trim_end()),
        }
        // Whoever made it may have it not block; we have a thread for it that may.
        socket.set_nonblocking(false)?;
        listeners.push(Listener::of(socket, name));
    }
    let kept = match kept {
        [Some(arena), Some(first), Some(second)] => Some([arena, first, second]),
        [None, None, None] => None,
        _ => bail!(
            "systemd kept only a part of {}: raise FileDescriptorStoreMax, and stop before the next start",
            KEPT.join(", ")
        ),
    };
    Ok(Passed { listeners, kept })
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
