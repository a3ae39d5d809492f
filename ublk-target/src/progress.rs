//! How far something is that takes its time, on standard error: a bar on a terminal, a line now and then elsewhere.

use ghostswap::config::format_size;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How often to say how far it is, on a terminal and elsewhere.
const TELL_TERMINAL: Duration = Duration::from_millis(200);
const TELL_FILE: Duration = Duration::from_secs(5);
const BAR: u64 = 30;

/// Something that is on its way.
pub struct Progress<'a> {
    what: &'a str,
    terminal: bool,
    first: Option<u64>,
    told: Instant,
}

impl<'a> Progress<'a> {
    /// `what` is done, and to what.
    pub fn new(what: &'a str) -> Progress<'a> {
        Progress { what, terminal: std::io::stderr().is_terminal(), first: None, told: Instant::now() }
    }

    /// So many bytes are left, or it is over.
    pub fn tell(&mut self, left: u64, over: bool) {
        let first = *self.first.get_or_insert(left);
        if !over && self.told.elapsed() < if self.terminal { TELL_TERMINAL } else { TELL_FILE } {
            return;
        }
        self.told = Instant::now();
        let done = (BAR * (first - left.min(first))).checked_div(first).unwrap_or(BAR);
        let line = format!(
            "{} [{}{}] {} of {} left",
            self.what,
            "#".repeat(done as usize),
            ".".repeat((BAR - done) as usize),
            format_size(left),
            format_size(first)
        );
        let (begin, end) = if self.terminal { ("\r\x1b[K", if over { "\n" } else { "" }) } else { ("", "\n") };
        // Whoever closed the terminal does not want to know.
        let _ = write!(std::io::stderr(), "{begin}{line}{end}");
    }
}
