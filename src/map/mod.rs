//! The map: an XArray-like radix tree of slot words for each volume, in metadata pages of the
//! arena, made on demand and given back when empty.
//!
//! ```text
//! root 8 links (2 TiB of address space each): 0 none · 30..0 number of the child · bit 31 frozen
//!   └ node 1024 links (2 GiB each)
//!       └ node 1024 links (2 MiB each)
//!           └ leaf 512 slots: a cluster
//! ```
//! Look-ups take no lock. A leaf leaves the tree only after every slot of it was *frozen*: an
//! exchange never replaces a frozen slot, so no commit can be lost in a leaf that is being taken
//! out; who meets one looks up again. Who froze slot 0 owns the freezing. Nodes are frozen in the
//! same way once all their links are 0, from below upwards; the root's links never are. Readers take a frozen slot for an empty one: a leaf is
//! frozen only where all of it is empty or is just being discarded.
//!
//! A node that was taken out is zeroed and reused after a grace period; until then it hangs in the
//! retired list through the payload of its first frozen word. Should the process end before, it is
//! unreachable and so found free by `map/rebuild.rs`.

mod rebuild;
mod slot;

pub(crate) use rebuild::{walk, Reached};
pub(crate) use slot::{Kind, Slot, Stored, LOST};

use crate::arena::{Arena, NODE_ENTRIES, ROOT_ENTRIES};
use crate::page::{MetaNo, PageNo, VolumeId};
use crate::sync::{fence, yield_now, AtomicU32, AtomicU64, Ordering};

/// Clusters in the largest volume.
pub(crate) const MAX_CLUSTERS: usize = ROOT_ENTRIES * ROOT_SPAN;
/// Clusters behind a link of the root.
const ROOT_SPAN: usize = NODE_ENTRIES * NODE_ENTRIES;
const FROZEN: u32 = 1 << 31;

/// Nodes taken out of the maps, waiting for their grace period, and how many are in use.
pub(crate) struct Map {
    retired: AtomicU32,
    /// Metadata pages that are nodes or leaves now.
    pub nodes: AtomicU64,
}

/// A look-up for writing found no free metadata page.
#[derive(Debug)]
pub(crate) struct OutOfMeta;

impl Map {
    pub fn new() -> Map {
        Map { retired: AtomicU32::new(0), nodes: AtomicU64::new(0) }
    }

    /// The leaf of a cluster, if there is one. Within an epoch.
    pub fn leaf<'a>(&self, arena: &'a Arena, v: VolumeId, cluster: usize) -> Option<&'a [AtomicU64]> {
        let upper = child(&arena.root(v)[cluster / ROOT_SPAN])?;
        let node = child(&arena.node(upper)[in_upper(cluster)])?;
        let leaf = child(&arena.node(node)[cluster % NODE_ENTRIES])?;
        Some(arena.leaf(leaf))
    }

    /// The leaf of a cluster, made if missing. Within an epoch.
    pub fn leaf_for_write<'a>(
        &self,
        arena: &'a Arena,
        v: VolumeId,
        cluster: usize,
    ) -> Result<&'a [AtomicU64], OutOfMeta> {
        loop {
            let Some(upper) = self.child_or_new(arena, &arena.root(v)[cluster / ROOT_SPAN])? else { continue };
            let Some(node) = self.child_or_new(arena, &arena.node(upper)[in_upper(cluster)])? else { continue };
            let Some(leaf) = self.child_or_new(arena, &arena.node(node)[cluster % NODE_ENTRIES])? else { continue };
            return Ok(arena.leaf(leaf));
        }
    }

    /// None: the node that holds the link is being taken out; look up again.
    fn child_or_new(&self, arena: &Arena, link: &AtomicU32) -> Result<Option<MetaNo>, OutOfMeta> {
        let now = link.load(Ordering::Acquire);
        if now & FROZEN != 0 {
            yield_now();
            return Ok(None);
        }
        if now != 0 {
            return Ok(Some(MetaNo(now)));
        }
        let new = arena.take_meta().ok_or(OutOfMeta)?;
        crash_point!("map: page taken, not linked");
        match link.compare_exchange(0, new.0, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                crash_point!("map: page linked");
                self.nodes.fetch_add(1, Ordering::Relaxed);
                Ok(Some(new))
            }
            Err(_) => {
                arena.put_meta(new);
                Ok(None)
            }
        }
    }

    /// The first cluster from `cluster` on and before `end` that has a leaf: how a discard of 16T
    /// passes over what was never written.
    pub fn next_present(&self, arena: &Arena, v: VolumeId, cluster: usize, end: usize) -> Option<usize> {
        let mut at = cluster;
        let end = end.min(MAX_CLUSTERS);
        while at < end {
            let Some(upper) = child(&arena.root(v)[at / ROOT_SPAN]) else {
                at = (at / ROOT_SPAN + 1) * ROOT_SPAN;
                continue;
            };
            if let Some(node) = child(&arena.node(upper)[in_upper(at)]) {
                let from = at % NODE_ENTRIES;
                let links = &arena.node(node)[from..NODE_ENTRIES.min(from + end - at)];
                if let Some(n) = links.iter().position(|l| child(l).is_some()) {
                    return Some(at + n);
                }
            }
            at = (at / NODE_ENTRIES + 1) * NODE_ENTRIES;
        }
        None
    }

    /// Empties a whole cluster and takes its leaf out; `died` hears of every word replaced.
    pub fn discard_cluster(&self, arena: &Arena, v: VolumeId, cluster: usize, mut died: impl FnMut(Slot)) {
        let leaf = loop {
            let Some(leaf) = self.leaf(arena, v, cluster) else { return };
            let word = Slot(leaf[0].load(Ordering::Acquire));
            if word.is_frozen() {
                // Another thread owns the freezing; it may yet set the leaf free again.
                yield_now();
            } else if swap_if(&leaf[0], word, Slot::frozen(0)) {
                crash_point!("discard cluster: slot 0 frozen");
                died(word);
                break leaf;
            }
        };
        for slot in &leaf[1..] {
            crash_point!("discard cluster: partly frozen");
            died(Slot(slot.swap(Slot::frozen(0).0, Ordering::AcqRel)));
        }
        self.unlink(arena, v, cluster);
    }

    /// Takes the leaf of a cluster out if all of it is empty.
    pub fn drop_if_empty(&self, arena: &Arena, v: VolumeId, cluster: usize, likely: usize) {
        let Some(leaf) = self.leaf(arena, v, cluster) else { return };
        let frozen = freeze_empty(
            leaf,
            likely,
            |slot| slot.load(Ordering::Relaxed) == Slot::EMPTY.0,
            |slot| {
                crash_point!("drop leaf: partly frozen");
                swap_if(slot, Slot::EMPTY, Slot::frozen(0))
            },
            |slot| slot.store(Slot::EMPTY.0, Ordering::Release),
        );
        if frozen {
            self.unlink(arena, v, cluster);
        }
    }

    /// The leaf is all frozen by us: unlink it, and then each node above it that is empty.
    fn unlink(&self, arena: &Arena, v: VolumeId, cluster: usize) {
        let stays = "what has a child stays linked";
        let root = &arena.root(v)[cluster / ROOT_SPAN];
        let upper = child(root).expect(stays);
        let link = &arena.node(upper)[in_upper(cluster)];
        let node = child(link).expect(stays);
        crash_point!("unlink: leaf frozen, linked");
        debug_assert!(self.leaf(arena, v, cluster).is_some_and(all_frozen), "nobody thaws a leaf of ours");
        let leaf = MetaNo(arena.node(node)[cluster % NODE_ENTRIES].swap(0, Ordering::AcqRel));
        crash_point!("unlink: leaf unlinked, not retired");
        self.retire(leaf, |next| arena.leaf(leaf)[0].store(Slot::frozen(next).0, Ordering::Release));
        // From here on others may take them out before us: then their links are frozen, and not empty.
        if self.drop_node_if_empty(arena, link, node) {
            self.drop_node_if_empty(arena, root, upper);
        }
    }

    /// True: it was, and nothing leads to it any more.
    fn drop_node_if_empty(&self, arena: &Arena, link: &AtomicU32, node: MetaNo) -> bool {
        let links = arena.node(node);
        let frozen = freeze_empty(
            links,
            0,
            |link| link.load(Ordering::Relaxed) == 0,
            |link| {
                crash_point!("unlink: node partly frozen");
                link.compare_exchange(0, FROZEN, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            },
            |link| link.store(0, Ordering::Release),
        );
        if frozen {
            crash_point!("unlink: node frozen, linked");
            link.store(0, Ordering::Release);
            crash_point!("unlink: node unlinked, not retired");
            self.retire(node, |next| links[0].store(FROZEN | next, Ordering::Release));
        }
        frozen
    }

    fn retire(&self, m: MetaNo, link: impl Fn(u32)) {
        self.nodes.fetch_sub(1, Ordering::Relaxed);
        let mut head = self.retired.load(Ordering::Relaxed);
        loop {
            link(head);
            match self.retired.compare_exchange_weak(head, m.0, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    pub fn any_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed) != 0
    }

    /// Takes the whole list of retired nodes; release it after a grace period.
    pub fn take_retired(&self) -> u32 {
        self.retired.swap(0, Ordering::AcqRel)
    }

    /// How many nodes wait. Only while nobody retires or releases any.
    pub fn waiting(&self, arena: &Arena) -> u32 {
        let mut count = 0;
        let mut head = self.retired.load(Ordering::Acquire);
        while head != 0 {
            count += 1;
            head = next_retired(arena, MetaNo(head));
        }
        count
    }

    /// Zeroes and frees a list of retired nodes, after their grace period.
    pub fn release(&self, arena: &Arena, mut head: u32) {
        while head != 0 {
            let m = MetaNo(head);
            head = next_retired(arena, m);
            crash_point!("release: retired node not zeroed");
            arena.zero_meta(m);
            crash_point!("release: retired node zeroed, not free");
            arena.put_meta(m);
        }
    }
}

/// Freezes all of a leaf's slots or a node's links if all are empty. Whoever emptied one calls this:
/// the last of them to look, or whoever was freezing meanwhile, sees that all are empty. `likely` is where one that is
/// not empty is looked for first: pages die in a row, and those before it are.
fn freeze_empty<T>(
    words: &[T],
    likely: usize,
    empty: impl Fn(&T) -> bool,
    freeze: impl Fn(&T) -> bool,
    thaw: impl Fn(&T),
) -> bool {
    let (before, from) = words.split_at(likely);
    loop {
        // Between what we emptied (or thawed) and what we see of the others: of two that do this at
        // the same time, one at least sees what the other did.
        fence(Ordering::SeqCst);
        if !from.iter().chain(before).all(&empty) {
            return false;
        }
        let Some(i) = words.iter().position(|word| !freeze(word)) else { return true };
        // The first is set free last, so that the freezing stays ours until we are done. What was
        // not empty may be so by now, left to us by who saw it half frozen: look again.
        words[..i].iter().rev().for_each(&thaw);
    }
}

fn all_frozen(leaf: &[AtomicU64]) -> bool {
    leaf.iter().all(|slot| Slot(slot.load(Ordering::Relaxed)).is_frozen())
}

fn next_retired(arena: &Arena, m: MetaNo) -> u32 {
    // A leaf and a node are told apart by their first word: bit 31 of a frozen slot is 0.
    let first = arena.node(m)[0].load(Ordering::Acquire);
    if first & FROZEN != 0 {
        first & !FROZEN
    } else {
        Slot(arena.leaf(m)[0].load(Ordering::Acquire)).frozen_next()
    }
}

/// Index of a cluster in the node below the root.
fn in_upper(cluster: usize) -> usize {
    cluster / NODE_ENTRIES % NODE_ENTRIES
}

fn child(link: &AtomicU32) -> Option<MetaNo> {
    match link.load(Ordering::Acquire) {
        0 => None,
        n if n & FROZEN != 0 => None,
        n => Some(MetaNo(n)),
    }
}

/// The commit: one exchange of the slot word.
pub(crate) fn swap_if(slot: &AtomicU64, old: Slot, new: Slot) -> bool {
    slot.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire).is_ok()
}

/// Loads the word of a page: empty if its cluster has no leaf.
pub(crate) fn load(map: &Map, arena: &Arena, v: VolumeId, p: PageNo) -> Slot {
    map.leaf(arena, v, p.cluster()).map_or(Slot::EMPTY, |leaf| Slot(leaf[p.slot()].load(Ordering::Acquire)))
}
