//! A carrier: a thread that keeps one connection to the server, and carries requests over it.
//!
//! It connects, agrees on the export, looks whose it is, serves until something breaks, gives back what was not
//! answered, rests, and begins again. With TLS it allocates (rustls does); else nothing after its first connection, but
//! for a look at what a name stands for (`names.rs`) while its server is not to be found.
//! It waits only in `poll`, with a bound, and logs nothing: the mover does (`store/demote.rs`).

use super::conversation::{Conversation, LEAST_PAYLOAD};
use super::names::Addresses;
use super::office::{Office, Sleep};
use super::post::Post;
use super::tls::Securer;
use super::transport::{wait, For, Patient, Transport};
use crate::io::backing;
use crate::nbd::handshake::{self, Export, Failure};
use crate::nbd::proto::{Command, Request};
use socket2::SockAddr;
use std::io::ErrorKind;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// From the first packet to the export, TLS included.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Between attempts to connect, at first and at most.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often to look around, with something under way and without.
const LOOK: Duration = Duration::from_millis(250);
const IDLE_LOOK: Duration = Duration::from_secs(5);

/// The way to a server.
pub(super) struct Way {
    pub addresses: Addresses,
    pub export: String,
    pub tls: Option<Arc<dyn Securer>>,
}

pub(super) struct Carrier {
    number: usize,
    office: Arc<Office>,
    way: Arc<Way>,
    post: Post,
    talk: Conversation,
    pause: Duration,
    /// Of the connection that there is, or was.
    over_tcp: bool,
    /// It has a connection that serves.
    up: bool,
    /// A server whose connections do not agree with each other has one of them only.
    alone: bool,
}

impl Carrier {
    /// All that it needs is there afterwards.
    pub fn new(number: usize, office: Arc<Office>, way: Arc<Way>) -> crate::Result<Carrier> {
        let (post, talk) = (Post::new()?, Conversation::new());
        Ok(Carrier { over_tcp: false, number, office, way, post, talk, pause: PAUSE, up: false, alone: false })
    }

    pub fn run(mut self) {
        while !self.stopped() {
            if self.is_wanted() {
                let why = match self.connect() {
                    Ok((transport, export, structured)) => self.visit(transport, &export, structured),
                    Err(failure) => failure,
                };
                self.note(why);
                if std::mem::take(&mut self.up) {
                    self.office.leave();
                }
            }
            self.rest();
        }
        self.office.expire(&mut self.post);
        self.post.flush();
    }

    fn stopped(&self) -> bool {
        self.office.stop.load(Ordering::Relaxed)
    }

    /// Standing by, one connection is enough, and none if the server has one at a time only: it may be another's.
    fn is_wanted(&self) -> bool {
        let multi = self.office.export.get().map(Export::can_multi_conn);
        match (self.number, self.office.serving.load(Ordering::Relaxed)) {
            (0, true) => true,
            (0, false) => multi != Some(false),
            (_, serving) => serving && multi == Some(true) && !self.alone,
        }
    }

    fn connect(&mut self) -> Result<(Transport, Export, bool), Failure> {
        let mut last = Failure::Io(ErrorKind::AddrNotAvailable.into());
        for n in 0.. {
            match self.way.addresses.nth(n) {
                Ok(None) => break,
                Ok(Some(address)) => match self.connect_to(&address) {
                    Ok(connected) => {
                        self.over_tcp = !address.is_unix();
                        return Ok(connected);
                    }
                    Err(failure) => last = failure,
                },
                Err(unknown) => {
                    last = unknown.into();
                    break;
                }
            }
        }
        self.way.addresses.doubt();
        Err(last)
    }

    fn connect_to(&self, address: &SockAddr) -> Result<(Transport, Export, bool), Failure> {
        let (office, bell) = (&self.office, &self.office.bells[self.number]);
        let until = Instant::now() + HANDSHAKE_TIME.min(office.timeout);
        let stop = || office.stop.load(Ordering::Relaxed);
        let mut patient = Patient::connect(address, office.timeout, until, bell, stop)?;
        handshake::greet(&mut patient)?;
        if let Some(tls) = &self.way.tls {
            handshake::start_tls(&mut patient)?;
            patient = patient.secure(&**tls)?;
        }
        let structured = handshake::ask_structured(&mut patient)?;
        let export = handshake::go(&mut patient, self.way.export.as_bytes())?;
        check(&export)?;
        Ok((patient.transport, export, structured))
    }

    /// From the export to the end of the connection, and why that came.
    fn visit(&mut self, mut transport: Transport, export: &Export, structured: bool) -> Failure {
        let first_known = self.office.export.set(*export).is_ok();
        self.alone = self.number > 0 && !export.can_multi_conn();
        if self.alone || !self.is_wanted() {
            // Not to be waited for anew: what there is to know is known.
            transport.close(&farewell());
            return Failure::Io(ErrorKind::ConnectionAborted.into());
        }
        self.talk.begin(export, structured);
        if first_known {
            self.office.wake_all();
        }
        let why = self.serve(&mut transport, export).err();
        while let Some(held) = self.talk.take_back() {
            self.office.give_back(held);
        }
        self.settle();
        self.office.wake();
        if why.is_none() {
            transport.close(&farewell());
        }
        why.unwrap_or_else(|| Failure::Io(ErrorKind::ConnectionAborted.into()))
    }

    /// Ends well when told to.
    fn serve(&mut self, transport: &mut Transport, export: &Export) -> Result<(), Failure> {
        let mut asked = false;
        let mut known = false;
        while !self.stopped() {
            // Whose it is, is asked on each connection, as soon as it is known whose it must be.
            if let (false, Some(identity)) = (known, self.office.identity.get()) {
                if !asked && self.talk.has_room() {
                    asked = true;
                    self.talk.ask_for_head();
                }
                if let Some(head) = self.talk.head() {
                    let ours = head.ok_or(Failure::Io(ErrorKind::InvalidData.into()))?;
                    if export.bytes < identity.bytes || !backing::is_head_of(ours, &identity.id) {
                        return Err(Failure::Replaced);
                    }
                    known = true;
                }
            }
            if known == asked && !self.up {
                self.up = true;
                self.pause = PAUSE;
                self.office.come();
            }
            let takes = known == asked;
            let left = takes && self.take_some();
            self.talk.send(transport)?;
            self.talk.receive(transport)?;
            let told = self.settle();
            if left && self.talk.has_room() {
                continue;
            }
            if left || !self.up {
                self.office.expire(&mut self.post);
            }
            self.look_at_clock()?;
            self.sleep(transport, told, takes);
        }
        Ok(())
    }

    /// Takes what waits, as much as there is room for. Whether some is left for others.
    fn take_some(&mut self) -> bool {
        let talk = &mut self.talk;
        let left = self.office.hand_out(|held| match held {
            Some(held) => {
                talk.take(held);
                true
            }
            None => talk.has_room(),
        });
        if left {
            self.office.wake();
        }
        left
    }

    /// Tells of what has ended. True: all of that.
    fn settle(&mut self) -> bool {
        while let Some((held, result)) = self.talk.ended() {
            self.office.tell(&mut self.post, &held, result);
        }
        self.post.flush()
    }

    /// A server that does not answer is as good as gone.
    fn look_at_clock(&mut self) -> Result<(), Failure> {
        let timeout = self.office.timeout;
        match self.talk.waited() {
            Some((oldest, still)) if oldest >= timeout && still >= timeout || oldest >= timeout * 2 => {
                Err(Failure::Io(ErrorKind::TimedOut.into()))
            }
            _ => Ok(()),
        }
    }

    fn sleep(&mut self, transport: &Transport, told: bool, takes: bool) {
        let how = match (takes, self.talk.has_room()) {
            (false, _) => Sleep::Away,
            (true, true) => Sleep::Ready,
            (true, false) => Sleep::Full,
        };
        if !self.office.go_to_sleep(self.number, how) {
            return;
        }
        let most = match (told, !self.talk.is_empty()) {
            (false, _) => Duration::from_millis(1),
            (true, true) => LOOK.min(self.office.timeout / 4),
            (true, false) => IDLE_LOOK,
        };
        let sends = self.talk.wants_to_send() || transport.wants_write();
        let what = if sends { For::Both } else { For::Reading };
        if self.over_tcp && !self.talk.is_empty() {
            transport.acknowledge_soon();
        }
        wait(&self.office.bells[self.number], Some((transport.fd(), what)), most);
        self.office.wake_up(self.number);
    }

    /// Why there is no connection, for whoever asks.
    fn note(&mut self, why: Failure) {
        if self.alone || self.stopped() {
            return;
        }
        if matches!(why, Failure::Replaced) && !self.office.is_up() {
            self.office.stranger.store(true, Ordering::Relaxed);
            self.pause = LONGEST_PAUSE;
        } else if !matches!(why, Failure::Replaced) {
            self.office.stranger.store(false, Ordering::Relaxed);
        }
        *self.office.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
    }

    /// Between two connections; and while it needs none.
    fn rest(&mut self) {
        let until = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        loop {
            self.office.expire(&mut self.post);
            let told = self.post.flush();
            let now = Instant::now();
            let wanted = self.is_wanted();
            if self.stopped() || wanted && now >= until {
                return;
            }
            if self.office.go_to_sleep(self.number, Sleep::Away) {
                let left = if wanted { (until - now).min(LOOK) } else { IDLE_LOOK };
                wait(&self.office.bells[self.number], None, if told { left } else { Duration::from_millis(1) });
                self.office.wake_up(self.number);
            }
        }
    }
}

fn farewell() -> [u8; crate::nbd::proto::REQUEST_BYTES] {
    Request { flags: 0, command: Command::Disconnect, cookie: [0; 8], offset: 0, len: 0 }.bytes()
}

/// Whether a tier can live there.
fn check(export: &Export) -> Result<(), Failure> {
    if export.is_read_only() {
        return Err(Failure::Rude("the export is read-only"));
    }
    if export.min_block_bytes > crate::io::BLOCK_BYTES as u32 {
        return Err(Failure::Rude("the export takes no blocks of 4096 bytes"));
    }
    if export.max_payload_bytes != 0 && export.max_payload_bytes < LEAST_PAYLOAD {
        return Err(Failure::Rude("the export takes less than 64 KiB at once"));
    }
    Ok(())
}
