//! The tiers below: which ones an arena's pages may lie on, and how that changes from one store to the next.
//!
//! The arena has four places for tiers. One that it is bound to keeps its place while anything lies there, wherever it
//! stands in the configuration's order: table entries name it by that. It is known again by the id that both bear; behind
//! a server, which is not waited for, by what its place is called. (Its carriers look at the id on each connection.)
//!
//! Once nothing lies on a tier, the arena may be opened without it, which lets it go, or with another in its place. Either
//! way nobody writes to the old one any more. Of each place in the arena each step may be the last:
//!
//! 1. nothing lies on the tier that it is bound to, or it is bound to none;
//! 2. it is bound to none (the id's first half is zero);
//! 3. the new tier bears a new id;
//! 4. the arena bears it as well, its second half last. Only from here on does anything go there.
//!
//! Killed after 1 or 2 the arena opens as before, with any tier or none; after 3 too, for whatever bears an id that no
//! arena has is free to be made a tier anew.
//!
//! Notes of writes that may come late (`tier/late.rs`) stay through all of that, and what the place was called: should the
//! same export come back, it gets that place, and its extents are left alone for as long as they have to be.

use crate::arena::{AllBound, Arena, Bound};
use crate::config::{format_size, Checked, DiskTier, MIN_DISK_BYTES, OF_SERVER};
use crate::error::{Error, Result};
use crate::io::{Medium, TierKey, BLOCK_BYTES};
use crate::page::{TierNo, MAX_TIERS_BELOW};
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

/// A tier of the configuration, opened. `new`: it was made one beforehand.
pub(super) struct Wanted {
    pub medium: Medium,
    pub new: Option<New>,
}

/// Which of the tiers that an arena is bound to each one of the configuration is. None: none of them, it is new.
/// `there`: segments on each, as far as that is known.
pub(super) fn matched<'m>(
    tiers: &[DiskTier],
    media: impl Iterator<Item = &'m Medium>,
    bound: &AllBound,
    there: [u32; MAX_TIERS_BELOW],
) -> Vec<Option<TierNo>> {
    let mut found = vec![None; tiers.len()];
    let media: Vec<&Medium> = media.collect();
    let free = |found: &[Option<TierNo>]| {
        let of: Vec<(TierNo, Bound)> = TierNo::all().filter_map(|no| Some((no, bound[no.index()]?))).collect();
        of.into_iter().filter(|(no, _)| !found.contains(&Some(*no))).collect::<Vec<_>>()
    };
    for (n, (tier, medium)) in tiers.iter().zip(&media).enumerate() {
        let is_it = |one: &Bound| match medium.remote() {
            Some(_) => one.place == tier.place_number(),
            None => medium.bears(&one.id),
        };
        found[n] = free(&found).iter().find(|(_, one)| is_it(one)).map(|(no, _)| *no);
    }
    // A server that has another address by now, or was added by a program that did not note it.
    let left: Vec<usize> = (0..tiers.len()).filter(|n| found[*n].is_none() && media[*n].remote().is_some()).collect();
    let may_be = |(no, one): &(TierNo, Bound)| one.place == 0 || one.place & OF_SERVER != 0 && there[no.index()] > 0;
    let candidates: Vec<_> = free(&found).into_iter().filter(may_be).collect();
    if let ([n], [(no, _)]) = (left.as_slice(), candidates.as_slice()) {
        found[*n] = Some(*no);
    }
    found
}

/// Binds the arena to the tiers, or finds that it is bound to them already, and lets go of others. `there`: segments of
/// the arena that lie on each that it is bound to.
pub(super) fn attach(
    config: &Checked,
    arena: &Arena,
    wanted: Vec<Wanted>,
    there: [u32; MAX_TIERS_BELOW],
) -> Result<Vec<Lower>> {
    let bound = arena.tiers();
    let mut places = matched(&config.below, wanted.iter().map(|one| &one.medium), &bound, there);
    if let Some(no) = TierNo::all().find(|no| there[no.index()] > 0 && !places.contains(&Some(*no))) {
        let Some(Bound { id, .. }) = bound[no.index()] else {
            return Err(Error::BadArena("pages of it are on a disk tier that it does not name".into()));
        };
        // One that is in its place says what is wrong with it.
        let mut others =
            wanted.iter().zip(&places).filter(|(one, place)| place.is_none() && one.medium.remote().is_none());
        others.try_for_each(|(one, _)| one.medium.check(&id))?;
        return Err(Error::BadArena("pages of it are on a disk tier: open it with that tier".into()));
    }
    for no in TierNo::all().filter(|no| bound[no.index()].is_some() && !places.contains(&Some(*no))) {
        arena.forget_tier(no);
    }
    let known = places.clone();
    for ((one, tier), place) in wanted.iter().zip(&config.below).zip(&mut places) {
        if place.is_none() {
            let number = tier.place_number();
            let no = free_place(arena, number).expect("there are no more tiers than places for them");
            bind(arena, no, one, number)?;
            *place = Some(no);
        }
    }
    let all = wanted.into_iter().zip(&config.below).zip(places.into_iter().zip(known));
    all.map(|((one, tier), (place, known))| {
        let no = place.expect("each has a place by now");
        serve(arena, no, one.medium, tier, known.is_none())
    })
    .collect()
}

/// One that is bound.
fn serve(arena: &Arena, no: TierNo, medium: Medium, tier: &DiskTier, is_new: bool) -> Result<Lower> {
    let Bound { id, extents, place } = arena.tiers()[no.index()].expect("it is bound");
    if place != tier.place_number() {
        arena.rename_tier(no, tier.place_number());
    }
    // As many as when it was bound, or fewer if its size is less by now.
    let fit = medium.bytes(false)?.map_or(u32::MAX, |bytes| extents_in(bytes, arena.segment_bytes()));
    let extents = extents.min(fit).min(arena.max_extents());
    let key = tier.encrypt.then(|| arena.key());
    let lower = Lower::new(no, medium, id, key.as_ref(), (extents, arena.segment_bytes()));
    if let Some(remote) = lower.medium.remote() {
        // A server that is away, or another, keeps no store from going on with what is in memory. Its carriers look
        // whose it is on each connection.
        remote.bind(&id, BLOCK_BYTES as u64 + u64::from(extents) * lower.extent_bytes(), lower.extent_bytes());
        remote.serve();
        lower.find_late(arena);
    }
    // Of one that is known pages are read at once; the mover claims it before it writes.
    lower.claimed.store(is_new, Ordering::Relaxed);
    Ok(lower)
}

/// A place that is bound to none: that of a tier which was called so, or one where nothing may come late, or any.
fn free_place(arena: &Arena, number: u64) -> Option<TierNo> {
    let bound = arena.tiers();
    let is_quiet = |no: TierNo| arena.late(no).iter().all(|word| word.load(Ordering::Relaxed) == 0);
    TierNo::all().filter(|no| bound[no.index()].is_none()).min_by_key(|no| match arena.place_before(*no) == number {
        true => 0,
        false if is_quiet(*no) => 1,
        false => 2,
    })
}

/// Steps 3 and 4.
fn bind(arena: &Arena, no: TierNo, one: &Wanted, place: u64) -> Result<()> {
    let new = match one.new {
        Some(new) => new,
        None => New::make(&one.medium, arena.segment_bytes())?,
    };
    let others: u32 = arena.tiers().iter().flatten().map(|bound| bound.extents).sum();
    let left = arena.max_extents().saturating_sub(others);
    if left == 0 {
        let why = "the tiers that there are have all numbers of segments: give them less size=".into();
        return Err(Error::BadTier { tier: one.medium.to_string(), why });
    }
    crash_point!("tier: made, not bound to");
    arena.set_tier(no, &Bound { id: new.id, extents: new.extents.min(left), place });
    Ok(())
}
