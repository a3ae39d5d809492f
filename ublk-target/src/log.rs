//! Log records go into a bounded ring in memory; one thread of its own writes them out. A record
//! that finds the ring full or busy is dropped and counted: whoever logs never waits for a disk,
//! a journal or a terminal, any of which may be waiting for this very swap device.
//!
//! I/O threads do not log at all (formatting allocates); they count, and the main thread reports.

use anyhow::{Context, Result};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use tracing_subscriber::fmt::MakeWriter;

const RING_BYTES: usize = 64 << 10;
/// A log file is started afresh beyond this size.
const FILE_BYTES: u64 = 1 << 20;

/// Where records end up.
pub enum Sink {
    /// The terminal of a daemon in the foreground.
    Stderr,
    /// A file, usually in /run.
    File(File),
}

struct Ring {
    bytes: Mutex<VecDeque<u8>>,
    filled: Condvar,
    dropped: AtomicU64,
}

/// Hands out writers into the ring.
#[derive(Clone)]
pub struct RingWriter(Arc<Ring>);

impl Write for RingWriter {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        match self.0.bytes.try_lock() {
            Ok(mut bytes) if bytes.len() + record.len() <= RING_BYTES => {
                bytes.extend(record);
                self.0.filled.notify_one();
            }
            _ => {
                self.0.dropped.fetch_add(1, Ordering::Relaxed);
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

/// Installs the process's subscriber and starts the writing thread.
pub fn start(mut sink: Sink, stack_bytes: usize, thread_start: fn(&str)) -> Result<()> {
    let ring = Arc::new(Ring {
        bytes: Mutex::new(VecDeque::with_capacity(RING_BYTES)),
        filled: Condvar::new(),
        dropped: AtomicU64::new(0),
    });
    let writer = RingWriter(ring.clone());
    let ansi = false;
    tracing_subscriber::fmt().with_writer(writer).with_ansi(ansi).with_target(false).init();
    let drain = move || {
        thread_start("gs-log");
        let mut batch = Vec::with_capacity(RING_BYTES);
        loop {
            wait_for_records(&ring, &mut batch);
            sink.put(&batch);
            let dropped = ring.dropped.swap(0, Ordering::Relaxed);
            if dropped > 0 {
                sink.put(format!("{dropped} log records dropped\n").as_bytes());
            }
        }
    };
    let thread = std::thread::Builder::new().name("gs-log".into()).stack_size(stack_bytes);
    thread.spawn(drain).context("cannot start the log thread")?;
    Ok(())
}

fn wait_for_records(ring: &Ring, batch: &mut Vec<u8>) {
    batch.clear();
    let mut bytes = ring.bytes.lock().unwrap_or_else(|e| e.into_inner());
    while bytes.is_empty() {
        bytes = ring.filled.wait(bytes).unwrap_or_else(|e| e.into_inner());
    }
    let (a, b) = bytes.as_slices();
    batch.extend_from_slice(a);
    batch.extend_from_slice(b);
    bytes.clear();
}
