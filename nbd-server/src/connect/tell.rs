//! What there is to say, said by a thread of its own: it may have to wait for memory, or for whoever reads the log, and
//! both may wait for the connection that the other thread is to make.

use super::handshake::Failure;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::ExitStatus;
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;
use tracing::{error, info, warn};

/// What waits to be said; more is left unsaid.
const MOST_UNSAID: usize = 16;
const STACK_BYTES: usize = 128 << 10;

pub enum Event {
    Connected { connections: usize },
    StandsBy,
    NoStandby(std::io::Error),
    StandbyEnded(ExitStatus),
    Replaced { within: Duration, failed: u32, last: Option<Failure> },
    Lost,
    InUse,
    Disconnected,
    Ended,
}

pub struct Teller {
    events: SyncSender<Event>,
    thread: JoinHandle<()>,
}

impl Teller {
    /// Before the process is protected, as its waiting is not to be hurried.
    pub fn start(device: &Path) -> Result<Teller> {
        let (events, heard) = sync_channel(MOST_UNSAID);
        let path = device.display().to_string();
        let thread = std::thread::Builder::new().name("nbd-tell".into()).stack_size(STACK_BYTES);
        let thread = thread.spawn(move || say_all(&path, &heard)).context("cannot start a thread")?;
        Ok(Teller { events, thread })
    }

    /// Never waits, and allocates nothing.
    pub fn tell(&self, event: Event) {
        // Too much to say is said by what has been said before.
        let _ = self.events.try_send(event);
    }

    /// When nothing depends on this process any more.
    pub fn finish(self) {
        drop(self.events);
        // A thread that fails to say something has said that.
        let _ = self.thread.join();
    }
}

fn say_all(path: &str, events: &Receiver<Event>) {
    for event in events {
        match event {
            Event::Connected { connections } => info!("{path} is connected, by {connections} connection(s)"),
            Event::StandsBy => info!("stands by for the process that watches {path}"),
            Event::NoStandby(error) => {
                warn!("no process stands by: {error}; should this one die, connections to {path} are not replaced");
            }
            Event::StandbyEnded(status) => warn!(
                "the process that stood by ended ({status}): should this one die too, connections to {path} are not replaced"
            ),
            Event::Replaced { within, last: None, .. } => {
                warn!("{path}: connections were replaced within {:.2} s", within.as_secs_f32());
            }
            Event::Replaced { within, failed, last: Some(last) } => {
                let seconds = within.as_secs_f32();
                warn!("{path}: connections were replaced within {seconds:.2} s, after {failed} vain attempt(s), the last: {last}");
            }
            Event::Lost => error!("{path}: {}; what waits for them will fail", Failure::Replaced),
            Event::InUse => error!("{path} is in use, so this process stays: swapoff or umount it first"),
            Event::Disconnected => info!("{path} was disconnected"),
            Event::Ended => info!("told to end: {path} is disconnected"),
        }
    }
}
