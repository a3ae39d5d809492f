//! The units of the store and the distinct types that name them, so that mixing a page number
//! with a segment or an offset does not compile.

/// Bytes of a page: what the kernel swaps and what a slot describes.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of a sector, the granularity of requests.
pub const SECTOR_BYTES: u64 = 512;
/// Pages of a cluster: 2 MiB of address space behind one leaf of the map. (Three pages in models.)
pub const CLUSTER_PAGES: usize = if cfg!(loom) { 3 } else { 512 };
/// Largest volume: page numbers are 32 bits wide, in the map and in the records.
pub const MAX_VOLUME_BYTES: u64 = 1 << 44;
/// Volumes to a store: what a record has bits for.
pub const MAX_VOLUMES: usize = 1024;

/// Number of a page within its volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PageNo(pub u32);

impl PageNo {
    /// Number of the cluster that holds the page.
    pub fn cluster(self) -> usize {
        self.0 as usize / CLUSTER_PAGES
    }
    /// Index of the page's slot within its cluster.
    pub fn slot(self) -> usize {
        self.0 as usize % CLUSTER_PAGES
    }
}

/// A volume within its store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumeId(pub u16);

/// On which tiers a volume's pages may lie. It holds for what is written from then on.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum Placement {
    /// In memory, and below it as they get old and memory gets short.
    #[default]
    Anywhere,
    /// In memory only: reading never waits for a disk.
    Memory,
    /// Below, as soon as they are packed; in memory until then, and while there is no room below.
    Below,
}

impl Placement {
    /// As a small number.
    pub(crate) fn code(self) -> u8 {
        match self {
            Placement::Anywhere => 0,
            Placement::Memory => 1,
            Placement::Below => 2,
        }
    }

    /// What has that number.
    pub(crate) fn of(code: u8) -> Placement {
        [Placement::Anywhere, Placement::Memory, Placement::Below][usize::from(code.min(2))]
    }
}

/// A logical segment: what slots name. The segment table says where it lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentId(pub u32);

/// A frame of the arena: where the bytes of a segment in memory are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameNo(pub u32);

/// Most tiers below memory: what a segment's entry in the table has bits for.
pub const MAX_TIERS_BELOW: usize = 4;

/// A tier below memory, by its place in the arena, which it keeps while anything lies there, whatever comes above or
/// below it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TierNo(pub u8);

impl TierNo {
    /// All that there may be.
    pub(crate) fn all() -> impl Iterator<Item = TierNo> {
        (0..MAX_TIERS_BELOW as u8).map(TierNo)
    }

    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Where a segment below memory lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spot {
    /// On which tier.
    pub tier: TierNo,
    /// And where there.
    pub extent: ExtentNo,
}

/// An extent of a tier below: where the bytes of a segment on disk are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExtentNo(pub u32);

/// A 4 KiB page of metadata in the arena: a node of the map. Never 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MetaNo(pub u32);
