//! Log records go into a ring on the board, whence the agent writes them out. A record that finds
//! the ring full or busy is dropped and counted: whoever logs never waits for a disk, a journal or
//! a terminal, any of which may be waiting for this very swap device, and asks for no memory.
//!
//! The ring has one writer at a time, the worker that serves or is about to: whoever stands by is
//! silent, that is, its records are dropped and counted, until it is ordered.
//!
//! I/O threads do not log at all (formatting allocates); they count, and the main thread reports.

use crate::board::Shared;
use anyhow::{Context, Result};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tracing_subscriber::fmt::MakeWriter;

/// A log file is started afresh beyond this size.
const FILE_BYTES: u64 = 1 << 20;

/// Where records end up.
pub enum Sink {
    /// The terminal of a daemon in the foreground.
    Stderr,
    /// A file, usually in /run.
    File(File),
}

/// Hands out writers into the ring.
#[derive(Clone)]
pub struct RingWriter(Arc<Voice>);

/// A process's turn at the ring.
pub struct Voice {
    shared: Arc<Shared>,
    turn: Mutex<()>,
    heard: AtomicBool,
}

impl Voice {
    fn new(shared: &Arc<Shared>) -> Arc<Voice> {
        Arc::new(Voice { shared: shared.clone(), turn: Mutex::new(()), heard: AtomicBool::new(false) })
    }

    /// From here on the process is the ring's one writer.
    pub fn rise(&self) {
        self.heard.store(true, Ordering::Relaxed);
    }
}

impl Write for RingWriter {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let Voice { shared, turn, heard } = &*self.0;
        match turn.try_lock() {
            Ok(_turn) if heard.load(Ordering::Relaxed) => shared.log(record),
            _ => {
                shared.board.log_dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for RingWriter {
    type Writer = RingWriter;
    fn make_writer(&'a self) -> RingWriter {
        self.clone()
    }
}

/// What the agent itself has to log, until its log thread takes it.
#[derive(Clone)]
pub struct Own(Arc<(Arc<Shared>, Mutex<Vec<u8>>)>);

impl Write for Own {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let (shared, records) = &*self.0;
        records.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(record);
        shared.ring_log();
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Own {
    type Writer = Own;
    fn make_writer(&'a self) -> Own {
        self.clone()
    }
}

/// Installs the agent's subscriber.
pub fn start_own(shared: &Arc<Shared>) -> Own {
    let own = Own(Arc::new((shared.clone(), Mutex::new(Vec::new()))));
    tracing_subscriber::fmt().with_writer(own.clone()).with_ansi(false).with_target(false).init();
    own
}

/// Installs a worker's subscriber, silent yet.
pub fn start(shared: &Arc<Shared>) -> Arc<Voice> {
    let voice = Voice::new(shared);
    let writer = RingWriter(voice.clone());
    let ansi = false;
    tracing_subscriber::fmt().with_writer(writer).with_ansi(ansi).with_target(false).init();
    voice
}

impl Sink {
    /// Opens the log file of a device.
    pub fn file(path: &Path) -> Result<Sink> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(Sink::File(file.with_context(|| format!("cannot open {}", path.display()))?))
    }

    fn put(&mut self, bytes: &[u8]) {
        // A log that cannot be written has nowhere to say so.
        let _ = match self {
            Sink::Stderr => io::stderr().write_all(bytes),
            Sink::File(file) => {
                if file.metadata().is_ok_and(|m| m.len() > FILE_BYTES) {
                    let _ = file.set_len(0);
                }
                file.write_all(bytes)
            }
        };
    }
}

/// Writes out what workers and the agent log. The agent's log thread; does not return.
pub fn drain(shared: &Shared, own: &Own, mut sink: Sink) {
    let mut batch = Vec::new();
    loop {
        shared.take_log(&mut batch);
        batch.append(&mut own.0 .1.lock().unwrap_or_else(PoisonError::into_inner));
        sink.put(&batch);
        batch.clear();
        let dropped = shared.board.log_dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            sink.put(format!("{dropped} log records dropped\n").as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_stands_by_is_not_heard() {
        let shared = Arc::new(Shared::new().unwrap());
        let voice = Voice::new(&shared);
        let mut writer = RingWriter(voice.clone());
        writer.write_all(b"early").unwrap();
        voice.rise();
        writer.write_all(b"in time").unwrap();
        let mut out = Vec::new();
        shared.take_log(&mut out);
        assert_eq!((out.as_slice(), shared.board.log_dropped.load(Ordering::Relaxed)), (b"in time".as_slice(), 1));
    }
}
