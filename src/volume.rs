//! A volume: a byte-addressed ghost device. Its size is a label; what was never written costs
//! nothing and reads as zeros.

use crate::error::Result;
use crate::page::VolumeId;
use crate::store::{Lane, Store};

/// A ghost device of a [`Store`]. Cheap to clone.
#[derive(Clone)]
pub struct Volume {
    store: Store,
    id: VolumeId,
    bytes: u64,
}

impl Volume {
    pub(crate) fn new(store: Store, id: VolumeId, bytes: u64) -> Volume {
        Volume { store, id, bytes }
    }

    /// Its number within the store: how [`Store::open_volume`] finds it again.
    pub fn id(&self) -> u8 {
        self.id.0
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Opens a lane: what one I/O thread reads and writes through.
    pub fn lane(&self) -> Result<Lane> {
        Lane::open(self.store.clone(), self.id, self.bytes)
    }
}
