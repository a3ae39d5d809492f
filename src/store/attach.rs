//! The tier below: which one an arena's pages may lie on, and how that changes from one store to the next.
//!
//! The arena is bound to a tier by an id that both bear, and stays so while anything lies there. Once nothing does, it
//! may be opened without the tier, which lets it go, or with another, which it is bound to. Either way nobody writes to
//! the old one any more. Each step may be the last:
//!
//! 1. nothing lies below, and the arena is bound to the old tier or to none;
//! 2. it is bound to none (the id's first half is zero);
//! 3. the new tier bears a new id;
//! 4. the arena bears it as well, its second half last. Only from here on does anything go there.
//!
//! Killed after 1 or 2 the arena opens as before, with any tier or none; after 3 too, for whatever bears an id that no
//! arena has is free to be made a tier anew.
//!
//! Notes of writes that may come late (`tier/late.rs`) stay through all of that: should the same export come back, its
//! extents are left alone for as long as they have to be.

use crate::arena::Arena;
use crate::config::{format_size, Checked, MIN_DISK_BYTES};
use crate::error::{Error, Result};
use crate::io::{Medium, TierKey, BLOCK_BYTES};
use crate::tier::{extents_in, Lower};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Who was killed a moment ago has it until the kernel has ended the last of his requests.
const CLAIM_PATIENCE: Duration = Duration::from_secs(1);

/// A tier that the arena does not know yet: taken, made one, not yet bound to it.
#[derive(Clone, Copy)]
pub(super) struct New {
    id: TierKey,
    pub extents: u32,
}

impl New {
    /// Takes it, unless it is in use, holds what is not ours or is too small. May wait for a server, or for a file's
    /// space to be taken.
    pub fn make(medium: &Medium, segment_bytes: usize) -> Result<New> {
        let bytes = medium.bytes(true)?.unwrap_or(0);
        let extents = extents_in(bytes, segment_bytes);
        if bytes < MIN_DISK_BYTES || extents == 0 {
            let why = format!("it has {}, less than 16 MiB", format_size(bytes));
            return Err(Error::BadTier { tier: medium.to_string(), why });
        }
        let begun = Instant::now();
        while let Err(why) = medium.claim() {
            if begun.elapsed() >= CLAIM_PATIENCE {
                return Err(why);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let id = crate::arena::random()?;
        medium.initialise(&id, bytes)?;
        Ok(New { id, extents })
    }
}

/// Binds the arena to the tier, or finds that it is bound to it already, or lets go of one. `new`: it was made
/// beforehand. `below`: segments of the arena that lie on one.
pub(super) fn attach(
    config: &Checked,
    arena: &Arena,
    medium: Option<Medium>,
    new: Option<New>,
    below: u32,
) -> Result<Option<Lower>> {
    let bound = arena.tier();
    let Some(medium) = medium else {
        if below > 0 {
            return Err(Error::BadArena("pages of it are on a disk tier: open it with that tier".into()));
        }
        if bound.is_some() {
            arena.forget_tier();
        }
        return Ok(None);
    };
    // What lies behind a server is not looked at before it is needed, so that one is taken for the old one.
    let is_another = |id: &TierKey| below == 0 && medium.remote().is_none() && medium.check(id).is_err();
    let known = bound.filter(|(id, _)| !is_another(id));
    if known.is_none() && below > 0 {
        return Err(Error::BadArena("pages of it are on a disk tier that it does not name".into()));
    }
    let (id, extents) = match known {
        Some(known) => known,
        None => bind(arena, &medium, new)?,
    };
    if known.is_some() && medium.remote().is_none() {
        // Pages are read from it at once; the mover claims it before it writes.
        medium.check(&id)?;
    }
    // As many as when it was bound, or fewer if its size is less by now.
    let fit = medium.bytes(false)?.map_or(u32::MAX, |bytes| extents_in(bytes, arena.segment_bytes()));
    let extents = extents.min(fit).min(arena.max_segments() - arena.max_frames());
    let encrypt = config.below.as_ref().is_none_or(|tier| tier.encrypt);
    let lower = Lower::new(medium, id, encrypt.then_some(&arena.key()), extents, arena.segment_bytes());
    if let Some(remote) = lower.medium.remote() {
        // A server that is away, or another, keeps no store from going on with what is in memory. Its carriers look
        // whose it is on each connection.
        remote.bind(&id, BLOCK_BYTES as u64 + u64::from(extents) * lower.extent_bytes(), lower.extent_bytes());
        remote.serve();
        lower.find_late(arena);
    }
    lower.claimed.store(known.is_none(), Ordering::Relaxed);
    Ok(Some(lower))
}

/// Steps 2 to 4.
fn bind(arena: &Arena, medium: &Medium, new: Option<New>) -> Result<(TierKey, u32)> {
    if arena.tier().is_some() {
        arena.forget_tier();
    }
    let new = match new {
        Some(new) => new,
        None => New::make(medium, arena.segment_bytes())?,
    };
    crash_point!("tier: made, not bound to");
    arena.set_tier(&new.id, new.extents);
    Ok((new.id, new.extents))
}
