//! Words to the service manager, as in sd_notify(3): datagrams to the socket that `$NOTIFY_SOCKET`
//! names, a path or, after an `@`, an abstract name.
//!
//! The socket is made once, at the start. Sending waits for nothing: what the manager has no room
//! for now (it may itself be swapped out) is kept and sent with the next words.
//!
//! systemd finds out whose words they are when it reads them. So only a process that lives on, or a
//! child of systemd's own, can be sure to be heard.

use anyhow::{Context, Result};
use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::ffi::OsStr;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

/// More than this is not kept to be said later.
const MOST_UNSAID: usize = 4096;

/// The service manager, if there is one that listens.
pub struct Manager {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// How often it wants to hear of us; zero: it does not.
    patience: Duration,
    last_sign: Option<Instant>,
    unsaid: String,
}

impl Manager {
    /// By this process's environment.
    pub fn from_env() -> Manager {
        let socket = std::env::var_os("NOTIFY_SOCKET").and_then(|name| connect(&name));
        let ours = std::env::var("WATCHDOG_PID").map_or(true, |pid| pid == std::process::id().to_string());
        let usec = std::env::var("WATCHDOG_USEC").ok().filter(|_| ours).and_then(|n| n.parse().ok());
        Manager { socket, patience: Duration::from_micros(usec.unwrap_or(0)), last_sign: None, unsaid: String::new() }
    }

    /// Whether anybody listens.
    pub fn listens(&self) -> bool {
        self.socket.is_some()
    }

    /// Assignments, a line each. False: not sent yet.
    pub fn say(&mut self, lines: &str) -> bool {
        if self.unsaid.len() < MOST_UNSAID {
            self.unsaid.push_str(lines);
            self.unsaid.push('\n');
        }
        self.say_the_rest()
    }

    /// Has it keep a descriptor by that name. One that keeps none ignores it.
    pub fn keep(&self, name: &str, descriptor: &BorrowedFd<'_>) -> Result<()> {
        // A file is never at an end that would have the manager drop it; some ask it all the same.
        self.of_store(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), std::slice::from_ref(descriptor))
    }

    /// Has it close what it keeps by that name.
    pub fn forget(&self, name: &str) {
        // What is kept for nothing goes with the unit's stop.
        let _ = self.of_store(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]);
    }

    fn of_store(&self, words: &str, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let Some((_, to)) = &self.socket else { return Ok(()) };
        let socket = UnixDatagram::unbound().context("cannot make a socket")?;
        socket.connect_addr(to).context("the service manager does not listen")?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let sent = sendmsg(&socket, &[IoSlice::new(words.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL);
        sent.context("the service manager does not listen").map(drop)
    }

    /// What was not sent yet. False: still not.
    pub fn say_the_rest(&mut self) -> bool {
        if let (Some((socket, to)), false) = (&self.socket, self.unsaid.is_empty()) {
            match socket.send_to_addr(self.unsaid.as_bytes(), to) {
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return false,
                // Nobody listens any more, and nobody would hear of that.
                Ok(_) | Err(_) => {}
            }
        }
        self.unsaid.clear();
        true
    }

    /// The watchdog's patience, told by who is watched: another process of the unit may have been
    /// started with another.
    pub fn watchdog_line(&self) -> String {
        match self.patience.is_zero() {
            true => String::new(),
            false => format!("WATCHDOG_USEC={}\n", self.patience.as_micros()),
        }
    }

    /// A sign of life, if one is due: twice in the time that the manager waits for one.
    pub fn sign_of_life(&mut self) {
        let due = self.last_sign.is_none_or(|at| at.elapsed() >= self.patience / 2);
        if self.say_the_rest() && !self.patience.is_zero() && due && self.say("WATCHDOG=1") {
            self.last_sign = Some(Instant::now());
        }
    }
}

fn connect(name: &OsStr) -> Option<(UnixDatagram, SocketAddr)> {
    let to = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest),
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => return None,
    };
    let socket = UnixDatagram::unbound().ok()?;
    socket.set_nonblocking(true).ok()?;
    Some((socket, to.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(name: &str, patience: Duration) -> Manager {
        Manager { socket: connect(OsStr::new(name)), patience, last_sign: None, unsaid: String::new() }
    }

    fn heard(socket: &UnixDatagram) -> Option<String> {
        let mut buffer = [0; 256];
        socket.set_nonblocking(true).unwrap();
        socket.recv(&mut buffer).ok().map(|n| String::from_utf8_lossy(&buffer[..n]).into_owned())
    }

    #[test]
    fn speaks_to_paths_and_abstract_names() {
        let name = format!("ghostswap-notify-{}", std::process::id());
        let path = std::env::temp_dir().join(&name);
        let by_path = UnixDatagram::bind(&path).unwrap();
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        for (socket, spelled) in [(by_path, path.display().to_string()), (by_name, format!("@{name}"))] {
            assert!(manager(&spelled, Duration::ZERO).say("READY=1"));
            assert_eq!(heard(&socket).as_deref(), Some("READY=1\n"), "{spelled}");
        }
        std::fs::remove_file(path).unwrap();
        assert!(!manager("nowhere", Duration::ZERO).listens());
    }

    #[test]
    fn never_waits_and_gives_signs_of_life_in_time() {
        let name = format!("ghostswap-watchdog-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let mut watched = manager(&format!("@{name}"), Duration::from_secs(3600));
        watched.sign_of_life();
        watched.sign_of_life();
        assert_eq!((heard(&socket).as_deref(), heard(&socket)), (Some("WATCHDOG=1\n"), None), "one is enough for now");
        let full = (0..100_000).any(|_| !watched.say("STATUS=on and on"));
        assert!(full, "a manager that does not read is told nothing more, at once");
        watched.say("READY=1");
        while heard(&socket).is_some() {}
        assert!(watched.say_the_rest());
        assert_eq!(heard(&socket).as_deref(), Some("STATUS=on and on\nREADY=1\n"), "but later");
        let mut unwatched = manager(&format!("@{name}"), Duration::ZERO);
        unwatched.sign_of_life();
        assert_eq!((unwatched.watchdog_line(), unwatched.last_sign), (String::new(), None));
    }
}
