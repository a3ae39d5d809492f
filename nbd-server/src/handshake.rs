//! Newstyle negotiation: from the first byte to the export that the client goes to.
//!
//! What a client may send here is bounded in size, number and time. What was agreed on before TLS is
//! forgotten when TLS starts, since anybody could have put it there.

use crate::export::{Access, Export, Exports, Refusal, Visit};
use crate::proto::{self, info, option, reply, transmission_flags, Context, Form};
use crate::tls::{client_names, Tls};
use crate::wire::Wire;
use ghostswap::Lane;
use std::borrow::Cow;
use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::time::{Duration, Instant};

const MAX_OPTIONS: usize = 256;
/// Larger options are read over and refused.
const MAX_OPTION_BYTES: usize = 64 << 10;

/// What a server has for clients, and on which terms.
pub struct Offer {
    pub exports: Arc<Exports>,
    pub tls: Tls,
    /// For all of the negotiation. A client on a slow network takes a second.
    pub handshake_time: Duration,
}

/// What a client chose.
pub struct Chosen {
    /// Closed before the export is left.
    pub lane: Lane,
    pub visit: Visit,
    pub form: Form,
    /// What BLOCK_STATUS tells: of [`Context::ALL`].
    pub contexts: [bool; 2],
    /// What the client's certificate calls it.
    pub client: Vec<String>,
}

/// `None`: the client ended the negotiation in an orderly way.
pub fn negotiate(wire: &mut Wire, offer: &Offer) -> Result<Option<Box<Chosen>>> {
    wire.set_deadline(Instant::now() + offer.handshake_time)?;
    wire.put(proto::MAGIC)?;
    wire.put(proto::OPTION_MAGIC)?;
    wire.put(&(proto::FIXED_NEWSTYLE | proto::NO_ZEROES).to_be_bytes())?;
    let flags = u32::from_be_bytes(wire.take_array()?);
    if flags & !u32::from(proto::FIXED_NEWSTYLE | proto::NO_ZEROES) != 0 {
        return Err(rude("unknown handshake flags"));
    }
    let pad = flags & u32::from(proto::NO_ZEROES) == 0;
    let mut talk = Talk { wire, offer, pad, form: Form::Simple, contexts: None, names: None };
    for _ in 0..MAX_OPTIONS {
        match talk.answer_option()? {
            Answer::Next => {}
            Answer::Abort => return Ok(None),
            Answer::Go(chosen) => {
                wire.send()?;
                return Ok(Some(chosen));
            }
        }
        if talk.wire.at_end()? {
            return Ok(None);
        }
    }
    Err(rude("too many options"))
}

enum Answer {
    Next,
    Abort,
    Go(Box<Chosen>),
}

/// What was agreed on so far.
struct Talk<'w, 'a> {
    wire: &'w mut Wire,
    offer: &'a Offer,
    /// Whether EXPORT_NAME is answered with 124 zeros.
    pad: bool,
    form: Form,
    /// Contexts hold for the export that they were set for.
    contexts: Option<(Arc<Export>, [bool; 2])>,
    /// What the client's certificate calls it. `None`: no TLS yet.
    names: Option<Vec<String>>,
}

impl Talk<'_, '_> {
    fn answer_option(&mut self) -> Result<Answer> {
        if &self.wire.take_array::<8>()? != proto::OPTION_MAGIC {
            return Err(rude("an option without its magic"));
        }
        let option = u32::from_be_bytes(self.wire.take_array()?);
        let len = u32::from_be_bytes(self.wire.take_array()?) as usize;
        let needs_tls = matches!(self.offer.tls, Tls::Required(_)) && self.names.is_none();
        match option {
            option::EXPORT_NAME => self.go_by_name(len, needs_tls),
            option::ABORT => {
                self.wire.skip(len)?;
                self.answer(option, reply::ACK, &[])?;
                Ok(Answer::Abort)
            }
            _ if len > MAX_OPTION_BYTES => {
                self.wire.skip(len)?;
                self.refuse(option, reply::ERR_TOO_BIG, "too long")
            }
            option::STARTTLS => self.start_tls(len),
            _ if needs_tls => {
                self.wire.skip(len)?;
                self.refuse(option, reply::ERR_TLS_REQD, "TLS is required")
            }
            option::LIST => self.list(len),
            option::INFO | option::GO => self.info_or_go(option, len),
            option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => self.set_form(option, len),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.set_contexts(option, len),
            _ => {
                self.wire.skip(len)?;
                self.refuse(option, reply::ERR_UNSUP, "not supported")
            }
        }
    }

    fn start_tls(&mut self, len: usize) -> Result<Answer> {
        let option = option::STARTTLS;
        self.wire.skip(len)?;
        if len != 0 || self.names.is_some() {
            return self.refuse(option, reply::ERR_INVALID, "it takes no data, and comes once");
        }
        let Some(config) = self.offer.tls.config() else {
            return self.refuse(option, reply::ERR_UNSUP, "this server has no TLS");
        };
        self.answer(option, reply::ACK, &[])?;
        let names = client_names(self.wire.start_tls(config.clone())?);
        (self.form, self.contexts, self.names) = (Form::Simple, None, Some(names));
        Ok(Answer::Next)
    }

    fn set_form(&mut self, option: u32, len: usize) -> Result<Answer> {
        self.wire.skip(len)?;
        if len != 0 {
            return self.refuse(option, reply::ERR_INVALID, "it takes no data");
        }
        self.form = match (option, self.form) {
            (option::EXTENDED_HEADERS, _) => Form::Extended,
            (_, Form::Extended) => return self.refuse(option, reply::ERR_EXT_HEADER_REQD, "extended already"),
            _ => Form::Structured,
        };
        self.answer(option, reply::ACK, &[])?;
        Ok(Answer::Next)
    }

    /// Names those that this client may go to; those that it may after TLS would be others'.
    fn list(&mut self, len: usize) -> Result<Answer> {
        self.wire.skip(len)?;
        if len != 0 {
            return self.refuse(option::LIST, reply::ERR_INVALID, "LIST takes no data");
        }
        let offer = self.offer;
        for export in offer.exports.all() {
            if export.access(self.names.as_deref()) == Access::Granted {
                let name = export.name.as_bytes();
                self.answer(option::LIST, reply::SERVER, &[&(name.len() as u32).to_be_bytes(), name].concat())?;
            }
        }
        self.answer(option::LIST, reply::ACK, &[])?;
        Ok(Answer::Next)
    }

    /// The oldest way: no error reply exists, a refused client is hung up on.
    fn go_by_name(&mut self, len: usize, needs_tls: bool) -> Result<Answer> {
        // It could not tell that extended headers hold ("Extended headers" in the protocol).
        if self.form == Form::Extended {
            return Err(rude("EXPORT_NAME after EXTENDED_HEADERS"));
        }
        if needs_tls {
            return Err(rude("EXPORT_NAME before STARTTLS"));
        }
        if len > proto::MAX_NAME_BYTES {
            return Err(rude("a name too long"));
        }
        let export = match self.offer.exports.find(self.wire.take(len)?, self.names.as_deref()) {
            Ok(export) => export,
            Err(Refusal::Unknown) => return Err(rude("no such export")),
            Err(Refusal::Access(_)) => {
                return Err(Error::new(ErrorKind::PermissionDenied, "an export that is not for this client"))
            }
            Err(Refusal::Store(error)) => return Err(Error::other(error.to_string())),
        };
        let visit = export.enter().ok_or_else(|| rude("no such export"))?;
        let lane = export.volume.lane().map_err(|error| Error::other(error.to_string()))?;
        self.wire.put(&export.volume.bytes().to_be_bytes())?;
        self.wire.put(&self.flags(&export).to_be_bytes())?;
        if self.pad {
            self.wire.put(&[0; 124])?;
        }
        Ok(self.go(visit, lane))
    }

    fn info_or_go(&mut self, option: u32, len: usize) -> Result<Answer> {
        let data = self.wire.take(len)?.to_vec();
        let Some((name, asked)) = proto::parse_go(&data) else {
            return self.refuse(option, reply::ERR_INVALID, "malformed");
        };
        let export = match self.find(name) {
            Ok(export) => export,
            Err((reply, why)) => return self.refuse(option, reply, &why),
        };
        // Before the first good reply, as none can be taken back.
        let mut going = None;
        if option == option::GO {
            let Some(visit) = export.enter() else {
                return self.refuse(option, reply::ERR_UNKNOWN, "no such export");
            };
            match export.volume.lane() {
                Ok(lane) => going = Some((visit, lane)),
                Err(error) => return self.refuse(option, reply::ERR_POLICY, &error.to_string()),
            }
        }
        let mut whole = info::EXPORT.to_be_bytes().to_vec();
        whole.extend_from_slice(&export.volume.bytes().to_be_bytes());
        whole.extend_from_slice(&self.flags(&export).to_be_bytes());
        self.answer(option, reply::INFO, &whole)?;
        // Asked for or not: they bind, and a client that has not heard of them takes 1 for the smallest.
        let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [proto::MIN_BLOCK_BYTES, proto::PREFERRED_BLOCK_BYTES, proto::MAX_PAYLOAD_BYTES] {
            sizes.extend_from_slice(&size.to_be_bytes());
        }
        self.answer(option, reply::INFO, &sizes)?;
        let description = format!("{}{}", proto::DESCRIPTION, export.identity);
        for (what, text) in [(info::NAME, &export.name), (info::DESCRIPTION, &description)] {
            if asked.has(what) {
                self.answer(option, reply::INFO, &[&what.to_be_bytes(), text.as_bytes()].concat())?;
            }
        }
        self.answer(option, reply::ACK, &[])?;
        Ok(match going {
            Some((visit, lane)) => self.go(visit, lane),
            None => Answer::Next,
        })
    }

    fn set_contexts(&mut self, option: u32, len: usize) -> Result<Answer> {
        let setting = option == option::SET_META_CONTEXT;
        // A SET that fails leaves none set.
        if setting {
            self.contexts = None;
        }
        let data = self.wire.take(len)?.to_vec();
        let parsed = proto::parse_contexts(&data, !setting);
        let Some((name, meant)) = parsed.filter(|_| self.form != Form::Simple) else {
            return self.refuse(option, reply::ERR_INVALID, "malformed, or before STRUCTURED_REPLY");
        };
        let export = match self.find(name) {
            Ok(export) => export,
            Err((reply, why)) => return self.refuse(option, reply, &why),
        };
        for context in Context::ALL.into_iter().zip(meant).filter_map(|(context, meant)| meant.then_some(context)) {
            // A LIST names no number.
            let number = if setting { context as u32 } else { 0 };
            self.answer(option, reply::META_CONTEXT, &[&number.to_be_bytes(), context.name().as_bytes()].concat())?;
        }
        self.answer(option, reply::ACK, &[])?;
        if setting {
            self.contexts = Some((export, meant));
        }
        Ok(Answer::Next)
    }

    /// The export that a client names and may go to; or the reply that says why not.
    fn find(&self, name: &[u8]) -> std::result::Result<Arc<Export>, (u32, Cow<'static, str>)> {
        self.offer.exports.find(name, self.names.as_deref()).map_err(|refusal| match refusal {
            Refusal::Unknown => (reply::ERR_UNKNOWN, "no such export".into()),
            Refusal::Access(Access::NeedsTls) => (reply::ERR_TLS_REQD, "this export requires TLS".into()),
            Refusal::Access(_) => (reply::ERR_POLICY, "this export is not for this client".into()),
            Refusal::Store(error) => (reply::ERR_POLICY, error.to_string().into()),
        })
    }

    fn flags(&self, export: &Export) -> u16 {
        transmission_flags(export.read_only, self.form)
    }

    fn go(&mut self, visit: Visit, lane: Lane) -> Answer {
        let own = self.contexts.take().filter(|(of, _)| Arc::ptr_eq(of, &visit.0));
        let contexts = own.map_or([false; 2], |(_, contexts)| contexts);
        let client = self.names.take().unwrap_or_default();
        Answer::Go(Box::new(Chosen { lane, visit, form: self.form, contexts, client }))
    }

    fn answer(&mut self, option: u32, reply: u32, data: &[u8]) -> Result<()> {
        self.wire.put(&proto::option_reply(option, reply, data.len()))?;
        self.wire.put(data)
    }

    fn refuse(&mut self, option: u32, reply: u32, why: &str) -> Result<Answer> {
        self.answer(option, reply, why.as_bytes())?;
        Ok(Answer::Next)
    }
}

fn rude(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, what)
}
