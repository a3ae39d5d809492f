//! Newstyle negotiation: from the first byte to the export that the client goes to.
//!
//! What a client may send here is bounded in size, number and time. TLS is answered as
//! unsupported.

use crate::export::{Export, Exports};
use crate::proto::{self, info, option, reply, transmission_flags, Context, Form};
use crate::wire::Wire;
use ghostswap::Lane;
use std::io::{Error, ErrorKind, Result};
use std::time::{Duration, Instant};

/// A client on a slow network takes a second; one that takes longer than this holds a lane for
/// nothing.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
const MAX_OPTIONS: usize = 256;
const MAX_OPTION_BYTES: usize = 64 << 10;

/// What a client chose.
pub struct Chosen<'a> {
    pub export: &'a Export,
    pub lane: Lane,
    pub form: Form,
    /// What BLOCK_STATUS tells: of [`Context::ALL`].
    pub contexts: [bool; 2],
}

/// What was agreed on before the export is chosen.
#[derive(Default)]
struct Agreed<'a> {
    form: Form,
    /// Contexts hold for the export that they were set for.
    contexts: Option<(&'a Export, [bool; 2])>,
}

impl<'a> Agreed<'a> {
    fn choose(&self, export: &'a Export, lane: Lane) -> Box<Chosen<'a>> {
        let own = self.contexts.filter(|(of, _)| std::ptr::eq(*of, export));
        Box::new(Chosen { export, lane, form: self.form, contexts: own.map_or([false; 2], |(_, c)| c) })
    }

    fn flags(&self, export: &Export) -> u16 {
        transmission_flags(export.read_only, self.form)
    }
}

/// `None`: the client ended the negotiation in an orderly way.
pub fn negotiate<'a>(wire: &mut Wire, exports: &'a Exports) -> Result<Option<Box<Chosen<'a>>>> {
    wire.set_deadline(Some(Instant::now() + HANDSHAKE_TIME))?;
    wire.put(proto::MAGIC)?;
    wire.put(proto::OPTION_MAGIC)?;
    wire.put(&(proto::FIXED_NEWSTYLE | proto::NO_ZEROES).to_be_bytes())?;
    let flags = u32::from_be_bytes(wire.take_array()?);
    if flags & !u32::from(proto::FIXED_NEWSTYLE | proto::NO_ZEROES) != 0 {
        return Err(rude("unknown handshake flags"));
    }
    let pad = flags & u32::from(proto::NO_ZEROES) == 0;
    let mut agreed = Agreed::default();
    for _ in 0..MAX_OPTIONS {
        match answer_option(wire, exports, &mut agreed, pad)? {
            Answer::Next => {}
            Answer::Abort => return wire.send().map(|()| None),
            Answer::Go(chosen) => {
                wire.send()?;
                wire.set_deadline(None)?;
                return Ok(Some(chosen));
            }
        }
        if wire.at_end()? {
            return Ok(None);
        }
    }
    Err(rude("too many options"))
}

enum Answer<'a> {
    Next,
    Abort,
    Go(Box<Chosen<'a>>),
}

fn answer_option<'a>(wire: &mut Wire, exports: &'a Exports, agreed: &mut Agreed<'a>, pad: bool) -> Result<Answer<'a>> {
    if &wire.take_array::<8>()? != proto::OPTION_MAGIC {
        return Err(rude("an option without its magic"));
    }
    let option = u32::from_be_bytes(wire.take_array()?);
    let len = u32::from_be_bytes(wire.take_array()?) as usize;
    if len > MAX_OPTION_BYTES {
        return Err(rude("an option too large"));
    }
    match option {
        // It could not tell that extended headers hold ("Extended headers" in the protocol).
        option::EXPORT_NAME if agreed.form == Form::Extended => Err(rude("EXPORT_NAME after EXTENDED_HEADERS")),
        option::EXPORT_NAME => go_by_name(wire, exports, agreed, len, pad),
        option::ABORT => {
            wire.skip(len)?;
            answer(wire, option, reply::ACK, &[])?;
            Ok(Answer::Abort)
        }
        option::LIST => {
            wire.skip(len)?;
            if len != 0 {
                return refuse(wire, option, reply::ERR_INVALID, "LIST takes no data");
            }
            for export in exports.all() {
                let name = export.name.as_bytes();
                let mut data = (name.len() as u32).to_be_bytes().to_vec();
                data.extend_from_slice(name);
                answer(wire, option, reply::SERVER, &data)?;
            }
            answer(wire, option, reply::ACK, &[])?;
            Ok(Answer::Next)
        }
        option::INFO | option::GO => info_or_go(wire, exports, agreed, option, len),
        option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => {
            wire.skip(len)?;
            if len != 0 {
                return refuse(wire, option, reply::ERR_INVALID, "it takes no data");
            }
            agreed.form = match (option, agreed.form) {
                (option::EXTENDED_HEADERS, _) => Form::Extended,
                (_, Form::Extended) => return refuse(wire, option, reply::ERR_EXT_HEADER_REQD, "extended already"),
                _ => Form::Structured,
            };
            answer(wire, option, reply::ACK, &[])?;
            Ok(Answer::Next)
        }
        option::LIST_META_CONTEXT | option::SET_META_CONTEXT => contexts(wire, exports, agreed, option, len),
        _ => {
            wire.skip(len)?;
            refuse(wire, option, reply::ERR_UNSUP, "not supported")
        }
    }
}

/// The oldest way: no error reply exists, a refused client is hung up on.
fn go_by_name<'a>(
    wire: &mut Wire,
    exports: &'a Exports,
    agreed: &Agreed<'a>,
    len: usize,
    pad: bool,
) -> Result<Answer<'a>> {
    let export = exports.find(wire.take(len)?).ok_or_else(|| rude("no such export"))?;
    let lane = export.volume.lane().map_err(|error| Error::other(error.to_string()))?;
    wire.put(&export.volume.bytes().to_be_bytes())?;
    wire.put(&agreed.flags(export).to_be_bytes())?;
    if pad {
        wire.put(&[0; 124])?;
    }
    Ok(Answer::Go(agreed.choose(export, lane)))
}

fn info_or_go<'a>(
    wire: &mut Wire,
    exports: &'a Exports,
    agreed: &Agreed<'a>,
    option: u32,
    len: usize,
) -> Result<Answer<'a>> {
    if len > proto::MAX_NAME_BYTES * 2 {
        wire.skip(len)?;
        return refuse(wire, option, reply::ERR_TOO_BIG, "too long");
    }
    let Some(name) = proto::parse_go(wire.take(len)?) else {
        return refuse(wire, option, reply::ERR_INVALID, "malformed");
    };
    let Some(export) = exports.find(name) else {
        return refuse(wire, option, reply::ERR_UNKNOWN, "no such export");
    };
    // Before the first good reply, as none can be taken back.
    let lane = match (option == option::GO).then(|| export.volume.lane()).transpose() {
        Ok(lane) => lane,
        Err(error) => return refuse(wire, option, reply::ERR_POLICY, &error.to_string()),
    };
    let mut data = info::EXPORT.to_be_bytes().to_vec();
    data.extend_from_slice(&export.volume.bytes().to_be_bytes());
    data.extend_from_slice(&agreed.flags(export).to_be_bytes());
    answer(wire, option, reply::INFO, &data)?;
    let mut data = info::BLOCK_SIZE.to_be_bytes().to_vec();
    for size in [proto::MIN_BLOCK_BYTES, proto::PREFERRED_BLOCK_BYTES, proto::MAX_PAYLOAD_BYTES] {
        data.extend_from_slice(&size.to_be_bytes());
    }
    answer(wire, option, reply::INFO, &data)?;
    for (what, text) in [(info::NAME, export.name.as_str()), (info::DESCRIPTION, "ghostswap volume")] {
        answer(wire, option, reply::INFO, &[&what.to_be_bytes(), text.as_bytes()].concat())?;
    }
    answer(wire, option, reply::ACK, &[])?;
    Ok(match lane {
        Some(lane) => Answer::Go(agreed.choose(export, lane)),
        None => Answer::Next,
    })
}

fn contexts<'a>(
    wire: &mut Wire,
    exports: &'a Exports,
    agreed: &mut Agreed<'a>,
    option: u32,
    len: usize,
) -> Result<Answer<'a>> {
    let setting = option == option::SET_META_CONTEXT;
    // A SET that fails leaves none set.
    if setting {
        agreed.contexts = None;
    }
    let parsed = proto::parse_contexts(wire.take(len)?, !setting);
    let Some((name, meant)) = parsed.filter(|_| agreed.form != Form::Simple) else {
        return refuse(wire, option, reply::ERR_INVALID, "malformed, or before STRUCTURED_REPLY");
    };
    let Some(export) = exports.find(name) else {
        return refuse(wire, option, reply::ERR_UNKNOWN, "no such export");
    };
    for context in Context::ALL.into_iter().zip(meant).filter_map(|(context, meant)| meant.then_some(context)) {
        // A LIST names no number.
        let number = if setting { context as u32 } else { 0 };
        answer(wire, option, reply::META_CONTEXT, &[&number.to_be_bytes(), context.name().as_bytes()].concat())?;
    }
    answer(wire, option, reply::ACK, &[])?;
    if setting {
        agreed.contexts = Some((export, meant));
    }
    Ok(Answer::Next)
}

fn answer(wire: &mut Wire, option: u32, reply: u32, data: &[u8]) -> Result<()> {
    wire.put(&proto::option_reply(option, reply, data.len()))?;
    wire.put(data)
}

fn refuse<'a>(wire: &mut Wire, option: u32, reply: u32, why: &str) -> Result<Answer<'a>> {
    answer(wire, option, reply, why.as_bytes())?;
    Ok(Answer::Next)
}

fn rude(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, what)
}
