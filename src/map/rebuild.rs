//! The map when an arena is opened again: a walk over all that is linked, which sets straight what
//! a killed process left half done.
//!
//! - A frozen slot becomes an empty one. Either it was empty, or it was being discarded, and that
//!   discard was not acknowledged yet: then its page is empty now, and pages not yet frozen are as
//!   they were.
//! - A frozen link becomes 0: only links that were 0 are frozen.
//! - A leaf without a page in it is unlinked, and then a node without a leaf.
//!
//! Each is one store of one word, and doing them again changes nothing. What the walk does not
//! reach was taken and not linked, or unlinked, or free: all the same, it is free now.

use super::{Slot, FROZEN};
use crate::arena::{Arena, Resident};
use crate::error::{Error, Result};
use crate::page::{MetaNo, VolumeId};
use crate::sync::{AtomicU32, Ordering};

/// The metadata pages that the walk came to, numbered from 0.
pub(crate) struct Reached {
    pub pages: Resident,
    /// Empty leaves and nodes are unlinked.
    prune: bool,
}

impl Reached {
    pub fn new(arena: &Arena, prune: bool) -> Reached {
        Reached { pages: Resident::new(arena.max_meta()), prune }
    }

    /// Notes the page behind a link, which must be resident and linked once.
    fn visit(&mut self, resident: &Resident, v: VolumeId, link: u32) -> Result<MetaNo> {
        let there = link.checked_sub(1).is_some_and(|n| resident.has(n) && !self.pages.has(n));
        if !there {
            let why = format!("volume {} links metadata page {link}, which is not there or linked twice", v.0);
            return Err(Error::BadArena(why));
        }
        self.pages.set(link - 1);
        Ok(MetaNo(link))
    }
}

/// Walks a volume. `seen` hears of every page that is not empty; where it returns another word,
/// that one replaces it.
pub(crate) fn walk(
    arena: &Arena,
    v: VolumeId,
    resident: &Resident,
    reached: &mut Reached,
    mut seen: impl FnMut(Slot) -> Slot,
) -> Result<()> {
    walk_links(arena, v, resident, reached, arena.root(v), Below::Upper, &mut seen).map(drop)
}

/// What a link leads to.
#[derive(Clone, Copy)]
enum Below {
    Upper,
    Node,
    Leaf,
}

/// How many of the links lead to a page still.
fn walk_links(
    arena: &Arena,
    v: VolumeId,
    resident: &Resident,
    reached: &mut Reached,
    links: &[AtomicU32],
    below: Below,
    seen: &mut impl FnMut(Slot) -> Slot,
) -> Result<usize> {
    let mut full = 0;
    for link in links {
        let Some(number) = thawed(link) else { continue };
        let child = reached.visit(resident, v, number)?;
        let any = match below {
            Below::Upper => walk_links(arena, v, resident, reached, arena.node(child), Below::Node, seen)? > 0,
            Below::Node => walk_links(arena, v, resident, reached, arena.node(child), Below::Leaf, seen)? > 0,
            Below::Leaf => walk_leaf(arena, child, seen),
        };
        if any {
            full += 1;
        } else if reached.prune {
            crash_point!("recovery: empty leaf or node linked");
            link.store(0, Ordering::Release);
            reached.pages.clear(number - 1);
        }
    }
    Ok(full)
}

/// The page a link names; a frozen link is set to 0.
fn thawed(link: &AtomicU32) -> Option<u32> {
    match link.load(Ordering::Acquire) {
        0 => None,
        n if n & FROZEN != 0 => {
            crash_point!("recovery: link frozen");
            link.store(0, Ordering::Release);
            None
        }
        n => Some(n),
    }
}

/// True if there is a page in the leaf.
fn walk_leaf(arena: &Arena, leaf: MetaNo, seen: &mut impl FnMut(Slot) -> Slot) -> bool {
    let mut any = false;
    for slot in arena.leaf(leaf) {
        let word = Slot(slot.load(Ordering::Acquire));
        if word == Slot::EMPTY {
            continue;
        }
        if word.is_frozen() {
            crash_point!("recovery: slot frozen");
            slot.store(Slot::EMPTY.0, Ordering::Release);
            continue;
        }
        any = true;
        let better = seen(word);
        if better != word {
            slot.store(better.0, Ordering::Release);
        }
    }
    any
}
