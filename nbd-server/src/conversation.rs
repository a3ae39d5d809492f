//! A conversation without a socket: a client's bytes in, the server's bytes out. For tests and fuzzing.

use crate::export::Exports;
use crate::handshake::{negotiate, Chosen, Offer};
use crate::helpers::Pool;
use crate::proto::Form;
use crate::tls::Tls;
use crate::transmission;
use crate::transport::Transport;
use crate::wire::Wire;
use crate::work::Work;
use ghostswap::Store;
use std::io::{Read, Result, Write};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The server's side of a conversation: all that it said, and how it ended.
pub struct Said {
    pub bytes: Vec<u8>,
    pub end: Result<()>,
}

/// From the first byte on.
pub fn from_handshake(offer: &Offer, input: &[u8]) -> Said {
    held(input, |wire| match negotiate(wire, offer)? {
        Some(chosen) => serve(wire, *chosen),
        None => Ok(()),
    })
}

/// On the first export, with all contexts agreed on.
pub fn from_requests(offer: &Offer, form: Form, input: &[u8]) -> Said {
    held(input, |wire| {
        let visit = offer.exports.all()[0].enter().ok_or(std::io::ErrorKind::NotFound)?;
        let lane = visit.0.volume.lane().map_err(std::io::Error::other)?;
        let contexts = [form != Form::Simple; 2];
        let chosen = Chosen { lane, visit, form, contexts, client: Vec::new() };
        serve(wire, chosen)
    })
}

fn serve(wire: &mut Wire, chosen: Chosen) -> Result<()> {
    transmission::serve(wire, chosen, transmission::IN_FLIGHT_BYTES, &Work::default(), &Pool::default())
}

/// An offer of exports as on the command line, without TLS.
pub fn offer(store: &Store, exports: &[&str]) -> ghostswap::Result<Offer> {
    let parsed = exports.iter().map(|text| text.parse()).collect::<std::result::Result<Vec<_>, _>>();
    let exports = Exports::open(store, &parsed.map_err(ghostswap::Error::InvalidConfig)?, None, drop, true)?;
    Ok(Offer { exports: Arc::new(exports), tls: Tls::Off, handshake_time: Duration::from_secs(600) })
}

fn held(input: &[u8], talk: impl FnOnce(&mut Wire) -> Result<()>) -> Said {
    let output = Arc::default();
    let memory = Memory { input: input.to_vec(), at: 0, output: Arc::clone(&output) };
    let mut wire = Wire::new(Box::new(memory));
    let end = talk(&mut wire).and_then(|()| wire.send());
    drop(wire);
    let bytes = std::mem::take(&mut *output.lock().unwrap_or_else(PoisonError::into_inner));
    Said { bytes, end }
}

/// Gives the input in pieces of changing size, as networks do.
struct Memory {
    input: Vec<u8>,
    at: usize,
    output: Arc<Mutex<Vec<u8>>>,
}

impl Read for Memory {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        let piece = match self.at % 7 {
            0 => 1,
            3 => 27,
            _ => 5000,
        };
        let len = piece.min(into.len()).min(self.input.len() - self.at);
        into[..len].copy_from_slice(&self.input[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Transport for Memory {
    fn set_timeout(&self, _: Option<Duration>) -> Result<()> {
        Ok(())
    }

    fn wait(&self, _: Option<BorrowedFd<'_>>, _: Duration) -> Result<bool> {
        Ok(true)
    }

    fn is_cut(&self) -> Result<bool> {
        Ok(false)
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }
}
