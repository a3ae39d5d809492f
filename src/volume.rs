//! A volume: a byte-addressed ghost device. Its size is a label; what was never written costs
//! nothing and reads as zeros.

use crate::error::Result;
use crate::page::{Placement, VolumeId};
use crate::store::{Held, Lane, Store};

/// A ghost device of a [`Store`]. Cheap to clone.
#[derive(Clone)]
pub struct Volume {
    store: Store,
    id: VolumeId,
}

impl Volume {
    pub(crate) fn new(store: Store, id: VolumeId) -> Volume {
        Volume { store, id }
    }

    /// Its number within the store: how [`Store::open_volume`] finds it again.
    pub fn id(&self) -> u16 {
        self.id.0
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.store.volume_bytes(self.id)
    }

    /// Makes it larger, also while lanes are open: they serve the new range from here on. What was
    /// there stays, what is added reads as zeros. A volume does not shrink.
    pub fn grow(&self, bytes: u64) -> Result<()> {
        self.store.grow_volume(self.id, bytes)
    }

    /// Drops all that it holds and gives it another size, which may be less. No lane of it may be open.
    pub fn reset(&self, bytes: u64) -> Result<()> {
        self.lane()?.discard(0, self.bytes())?;
        self.store.reset_volume(self.id, bytes)
    }

    /// Bytes of records, headers included, that it holds on all tiers together, as far as they are charged yet.
    pub fn held_bytes(&self) -> u64 {
        self.store.volume_held_bytes(self.id)
    }

    /// The same by tier and its pages by kind, from a look at every page.
    pub fn held(&self) -> Result<Held> {
        if self.store.is_untouched(self.id) {
            return Ok(Held::default());
        }
        self.lane().map(|mut lane| lane.held())
    }

    /// Has writes refused while it holds so many bytes or more ([`Volume::held_bytes`]); None: no such bound. It is
    /// not kept in the arena: whoever opens the store again sets it again.
    pub fn set_quota(&self, bytes: Option<u64>) {
        self.store.set_quota(self.id, bytes);
    }

    /// Says where what is written to it from now on may lie; what was written stays where it may be. Refused:
    /// [`Placement::Below`] in a store that has nothing below memory. It is not kept in the arena: whoever opens the
    /// store again says it again.
    pub fn set_placement(&self, placement: Placement) -> Result<()> {
        self.store.set_placement(self.id, placement)
    }

    /// Opens a lane: what one I/O thread reads and writes through.
    pub fn lane(&self) -> Result<Lane> {
        Lane::open(self.store.clone(), self.id, false)
    }

    /// Opens one of the lanes that are kept for threads which help others; see [`crate::StoreConfig::helper_lanes`].
    pub fn helper_lane(&self) -> Result<Lane> {
        Lane::open(self.store.clone(), self.id, true)
    }
}
