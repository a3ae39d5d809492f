//! Where a server is. The addresses of one that is known by a name are looked up when its tier is opened, and anew while
//! none of them leads to it; what was known stays until something else is.
//!
//! By a thread of its own, which nobody waits for but a tier that is opened, for a moment: while the name server is away
//! a worker can stand by nevertheless, and no carrier waits for anything but its own server.

use crate::config::NbdAddress;
use socket2::SockAddr;
use std::io::{Error, ErrorKind, Result};
use std::net::ToSocketAddrs;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long whoever opens a tier waits for the name server.
const PATIENCE: Duration = Duration::from_secs(2);
/// From one look to the next.
const LOOK_EVERY: Duration = Duration::from_secs(15);
/// The resolver's own and that of what it may load (nsswitch.conf(5)).
const STACK_BYTES: usize = 512 << 10;

type LookUp = fn(&str, u16) -> Result<Vec<SockAddr>>;

pub(super) struct Addresses(Arc<Shared>);

struct Shared {
    /// None: it is known without.
    name: Option<(String, u16)>,
    look_up: LookUp,
    state: Mutex<State>,
    looked: Condvar,
}

#[derive(Default)]
struct State {
    known: Vec<SockAddr>,
    /// What the last look came to, if to nothing.
    why: Option<String>,
    begun: Option<Instant>,
    looking: bool,
}

impl Addresses {
    /// Begins to look a name up, and waits a moment for that. Err: there can be no such address.
    pub fn of(address: &NbdAddress) -> Result<Addresses> {
        match address {
            NbdAddress::Unix(path) => Ok(Addresses::new(None, vec![SockAddr::unix(path)?], look_up)),
            NbdAddress::Tcp(host, port) => match host.parse::<std::net::IpAddr>() {
                Ok(ip) => Ok(Addresses::new(None, vec![SockAddr::from(std::net::SocketAddr::new(ip, *port))], look_up)),
                Err(_) => Ok(Addresses::named(host, *port, look_up)),
            },
        }
    }

    fn named(host: &str, port: u16, look_up: LookUp) -> Addresses {
        let addresses = Addresses::new(Some((host.to_owned(), port)), Vec::new(), look_up);
        addresses.look(Duration::ZERO);
        let shared = &addresses.0;
        // Found or not, or not yet: `nth` tells.
        drop(shared.looked.wait_timeout_while(shared.state(), PATIENCE, |state| state.looking));
        addresses
    }

    fn new(name: Option<(String, u16)>, known: Vec<SockAddr>, look_up: LookUp) -> Addresses {
        let state = Mutex::new(State { known, ..State::default() });
        Addresses(Arc::new(Shared { name, look_up, state, looked: Condvar::new() }))
    }

    /// One after the other; allocates nothing while there are some. Err: none is known.
    pub fn nth(&self, n: usize) -> Result<Option<SockAddr>> {
        let state = self.0.state();
        match (state.known.get(n), state.known.is_empty()) {
            (None, true) => Err(Error::new(
                ErrorKind::NotFound,
                state.why.clone().unwrap_or_else(|| "its name was not looked up yet".into()),
            )),
            (address, _) => Ok(address.cloned()),
        }
    }

    /// None of them led to the server: what its name stands for is looked up anew, if that was not done just now.
    pub fn doubt(&self) {
        self.look(LOOK_EVERY);
    }

    /// Unless the last look was begun less than `pause` ago.
    fn look(&self, pause: Duration) {
        let mut state = self.0.state();
        let is_early = state.begun.is_some_and(|begun| begun.elapsed() < pause);
        if self.0.name.is_none() || state.looking || is_early {
            return;
        }
        (state.begun, state.looking) = (Some(Instant::now()), true);
        drop(state);
        let shared = self.0.clone();
        let thread = std::thread::Builder::new().name("ghost-names".into()).stack_size(STACK_BYTES);
        if let Err(e) = thread.spawn(move || shared.look()) {
            self.0.done(Err(e));
        }
    }
}

impl Shared {
    fn look(&self) {
        let Some((host, port)) = &self.name else { return };
        self.done((self.look_up)(host, *port));
    }

    fn done(&self, found: Result<Vec<SockAddr>>) {
        let mut state = self.state();
        match found {
            Ok(found) if found.is_empty() => state.why = Some("its name has no address".into()),
            Ok(found) => (state.known, state.why) = (found, None),
            Err(e) => state.why = Some(e.to_string()),
        }
        state.looking = false;
        self.looked.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No step under the lock leaves half a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn look_up(host: &str, port: u16) -> Result<Vec<SockAddr>> {
    Ok((host, port).to_socket_addrs()?.map(SockAddr::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU16, Ordering};

    fn port_of(address: Option<SockAddr>) -> Option<u16> {
        address.and_then(|address| address.as_socket()).map(|address| address.port())
    }

    #[test]
    fn what_is_no_name_is_known_at_once_and_never_looked_up() {
        let numeric = Addresses::of(&NbdAddress::Tcp("::1".into(), 7)).unwrap();
        assert_eq!(port_of(numeric.nth(0).unwrap()), Some(7));
        assert!(numeric.nth(1).unwrap().is_none());
        numeric.doubt();
        assert!(numeric.0.state().begun.is_none());
        let socket = Addresses::of(&NbdAddress::Unix("/s".into())).unwrap();
        assert!(socket.nth(0).unwrap().unwrap().is_unix());
        assert!(Addresses::of(&NbdAddress::Unix("/".repeat(200).into())).is_err());
    }

    #[test]
    fn a_name_that_comes_to_stand_for_another_address_is_followed_and_a_name_server_that_is_away_takes_none() {
        // What it says next: nothing, or a port.
        static SAYS: AtomicU16 = AtomicU16::new(0);
        fn look_up(host: &str, port: u16) -> Result<Vec<SockAddr>> {
            assert_eq!((host, port), ("there", 1));
            match SAYS.load(Ordering::SeqCst) {
                0 => Err(Error::other("the name server is away")),
                port => Ok(vec![SockAddr::from(std::net::SocketAddr::from(([127, 0, 0, 1], port)))]),
            }
        }
        let addresses = Addresses::named("there", 1, look_up);
        assert!(addresses.nth(0).unwrap_err().to_string().contains("away"));
        let look = |says| {
            SAYS.store(says, Ordering::SeqCst);
            addresses.look(Duration::ZERO);
            let looking = |state: &mut State| state.looking;
            drop(addresses.0.looked.wait_while(addresses.0.state(), looking).unwrap());
            port_of(addresses.nth(0).unwrap())
        };
        assert_eq!(look(10), Some(10));
        assert_eq!(look(0), Some(10));
        assert_eq!(look(11), Some(11));
        // That was just now.
        SAYS.store(12, Ordering::SeqCst);
        addresses.doubt();
        assert!(!addresses.0.state().looking);
        assert_eq!(port_of(addresses.nth(0).unwrap()), Some(11));
    }
}
