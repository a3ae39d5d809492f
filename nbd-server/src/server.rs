//! Connections: a thread for each (of `crew`), and limits on how many there are.
//!
//! A client costs a lane and buffers only once it has gone to an export; until then it costs a thread and at most the
//! handshake's time. So clients that never get there cannot keep others from their lanes.
//!
//! Lock order: `connections` is the only lock, held for moments and never while a socket waits.

use crate::crew::Crew;
use crate::handshake::{self, Offer};
use crate::helpers::Pool;
use crate::listen::Listener;
use crate::supervise::Desk;
use crate::wire::Wire;
use crate::work::{Watched, Work};
use crate::{control, transmission, transport};
use anyhow::{Context, Result};
use socket2::Socket;
use std::collections::HashMap;
use std::fmt::Display;
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// Time for requests that have been received to be answered when the server ends.
const GRACE: Duration = Duration::from_secs(3);
/// How often to look for exports that nobody wants any more.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// When accepting fails, for want of file descriptors say, trying at once would only spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What clients may take of a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections: usize,
    /// How long an export's client may neither send nor take anything; `None`: for ever.
    pub idle_time: Option<Duration>,
    /// Of a connection's requests that wait for room or for the disk, beside its buffers.
    pub in_flight_bytes: usize,
}

const STORMS_TOLD_EVERY: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub struct Server(Arc<Shared>);

struct Shared {
    offer: Offer,
    limits: Limits,
    connections: Mutex<Connections>,
    one_left: Condvar,
    crew: Crew,
    helpers: Pool,
}

struct Open {
    socket: Socket,
    watched: Watched,
}

#[derive(Default)]
struct Connections {
    open: HashMap<u64, Open>,
    next: u64,
    ending: bool,
    refused: Storm,
    /// Those that got to no export.
    lost: Storm,
}

/// Events of one kind, of which a storm is not to be one of log lines.
#[derive(Default)]
struct Storm {
    /// Since that was last told, and when that was.
    count: u64,
    told: Option<Instant>,
}

impl Storm {
    /// Counts one. How many there are to be told of, if it is time for that.
    fn count(&mut self) -> Option<u64> {
        self.count += 1;
        if self.told.is_some_and(|told| told.elapsed() < STORMS_TOLD_EVERY) {
            return None;
        }
        self.told = Some(Instant::now());
        Some(std::mem::take(&mut self.count))
    }
}

impl Connections {
    fn refuse(&mut self, why: &dyn Display) {
        if let Some(count) = self.refused.count() {
            warn!("refused {count} client(s): {why}");
        }
    }
}

impl Server {
    pub fn new(offer: Offer, limits: Limits, helpers: Pool) -> Server {
        let (connections, one_left, crew) = Default::default();
        Server(Arc::new(Shared { offer, limits, connections, one_left, crew, helpers }))
    }

    /// Serves whoever connects, for as long as the process lives, and says that it does.
    pub fn serve_at(&self, listeners: &[Listener], desk: &Desk) -> Result<()> {
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(body).context("cannot start a thread").map(drop)
        };
        for listener in listeners.iter().filter(|listener| listener.is_control()) {
            let socket = listener.socket.try_clone().context("cannot accept clients")?;
            let (listener, server) = (Listener::of(socket, listener.name.clone()), self.clone());
            let desk = desk.clone();
            spawn("nbd-control", Box::new(move || control::serve(&listener, &server.0.offer.exports, &desk)))?;
        }
        let server = self.clone();
        let sweep = move || loop {
            std::thread::sleep(SWEEP_EVERY);
            server.0.offer.exports.sweep();
        };
        spawn("nbd-sweep", Box::new(sweep))?;
        self.0.offer.exports.tell_all();
        listeners.iter().filter(|listener| !listener.is_control()).try_for_each(|listener| self.accept_on(listener))
    }

    fn accept_on(&self, listener: &Listener) -> Result<()> {
        let server = self.clone();
        let socket = listener.socket.try_clone().context("cannot accept clients")?;
        let accepting = move || loop {
            match socket.accept().and_then(|(socket, _)| transport::prepare(&socket).map(|()| socket)) {
                Ok(socket) => server.admit(socket),
                Err(error) => {
                    warn!("cannot accept: {error}");
                    std::thread::sleep(ACCEPT_PAUSE);
                }
            }
        };
        std::thread::Builder::new().name("nbd-accept".into()).spawn(accepting).context("cannot start a thread")?;
        info!("serving at {}", listener.name);
        Ok(())
    }

    fn admit(&self, socket: Socket) {
        let mut connections = self.connections();
        if connections.ending {
            return;
        }
        if connections.open.len() >= self.0.limits.connections {
            let why = format_args!("all {} connections are in use", self.0.limits.connections);
            return connections.refuse(&why);
        }
        let second = match socket.try_clone() {
            Ok(second) => second,
            Err(error) => return connections.refuse(&error),
        };
        let number = connections.next;
        connections.next += 1;
        let work = Arc::new(Work::default());
        connections.open.insert(number, Open { socket: second, watched: Watched::new(work.clone()) });
        drop(connections);
        let server = self.clone();
        let serving = move || {
            server.serve(number, socket, &work);
            server.forget(number);
        };
        if let Err(error) = self.0.crew.run(serving) {
            self.connections().refuse(&error);
            self.forget(number);
        }
    }

    fn forget(&self, number: u64) {
        self.connections().open.remove(&number);
        self.0.one_left.notify_all();
    }

    fn serve(&self, number: u64, socket: Socket, work: &Work) {
        let mut wire = Wire::new(Box::new(socket));
        let chosen = match handshake::negotiate(&mut wire, &self.0.offer) {
            Ok(Some(chosen)) => chosen,
            // What it does with its end does not matter any more.
            Ok(None) => return drop(wire.close()),
            Err(error) => return self.lost(number, &error),
        };
        info!(connection = number, export = chosen.visit.0.name, client = chosen.client.first(), "client connected");
        let Limits { idle_time, in_flight_bytes, .. } = self.0.limits;
        let served = wire.set_idle_time(idle_time);
        let served =
            served.and_then(|()| transmission::serve(&mut wire, *chosen, in_flight_bytes, work, &self.0.helpers));
        // Its lane is free by now, so that it may take its time.
        match served.and_then(|()| wire.close()) {
            Ok(()) => info!(connection = number, "client left"),
            Err(error) => warn!(connection = number, "client lost: {error}"),
        }
    }

    fn lost(&self, number: u64, error: &std::io::Error) {
        match self.connections().lost.count() {
            Some(1) => info!(connection = number, "handshake: {error}"),
            Some(count) => info!(connection = number, "{count} handshakes that led to no export, the last: {error}"),
            None => {}
        }
    }

    /// Takes no more requests, answers those received, and waits a bounded time for that.
    pub fn end(&self) {
        let deadline = Instant::now() + GRACE;
        let mut connections = self.connections();
        connections.ending = true;
        for open in connections.open.values() {
            // A client that is gone already needs no shutdown.
            let _ = open.socket.shutdown(Shutdown::Read);
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

    /// A connection whose thread has been at the same step for so long: which. Whoever asks stands himself if a lock
    /// that all need is never given up.
    pub fn find_standing(&self, limit: Duration) -> Option<String> {
        self.0.offer.exports.all();
        let mut connections = self.connections();
        // All of them are looked at, every time.
        let standing = connections.open.iter_mut().filter_map(|(number, open)| {
            let stands = open.watched.stands_for() >= limit;
            stands.then(|| format!("connection {number} has been at one step for {limit:?}"))
        });
        standing.last()
    }

    /// Writes that waited for room and were refused, of all exports.
    pub fn refused_writes(&self) -> u64 {
        self.0.offer.exports.all().iter().map(|export| export.refused_writes.load(Ordering::Relaxed)).sum()
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        // No step under the lock leaves the map half changed.
        self.0.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
