//! The program that runs in the kernel whenever slots are freed, put together instruction by
//! instruction: a dozen loads, one comparison and one call need no compiler.
//!
//! What it does, in words (`r6` its context, `r7` the [`Settings`], `r8` the swap area):
//!
//! ```text
//! no device yet, the area is no block device, or its partition begins inside a page: done
//! the area's disk is not ours (major, first minor): done
//! page = (first sector of area's device) / 8 + slot
//! put page | number of slots << 40 into the ring; no room: count it
//! ```
//!
//! On `fentry` members are loaded directly, and the kernel's verifier checks each load against its
//! BTF. On a kprobe each is fetched by `bpf_probe_read_kernel`. Either way a pointer that leads
//! nowhere reads as zero, which is no device of ours.

use super::btf::{Btf, Shape};
use anyhow::{bail, ensure, Context, Result};

/// What the program shares with us: one element of an array map.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Settings {
    /// The disk's major number above its first minor number; 0: none yet.
    pub disk: u64,
    /// Ranges that found no room in the ring.
    pub lost: u64,
}

/// What it puts into the ring: one word. With the ring's own word a record has 16 bytes.
pub const RECORD_BYTES: usize = 8;

/// Bits of a record that are the page: 4 PiB of device. The rest is the count, of at most a cluster's slots.
pub const PAGE_BITS: u32 = 40;

/// What a parameter tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Role {
    /// `struct swap_info_struct *`: the area.
    Area,
    /// `struct swap_cluster_info *`: the cluster.
    Cluster,
    /// `swp_entry_t`: area and slot in one word.
    Entry,
    /// The first slot within the cluster.
    Start,
    /// How many slots.
    Count,
}

/// The kernels' functions that free slots, each with what it is called with. All are called before
/// the slots can be used anew. The first and the last were tried, on 7.3 and 6.12; the others are
/// from reading (6.16 to 6.19, 6.14 and 6.15).
pub const FUNCTIONS: [(&str, &[Role]); 4] = [
    ("__swap_cluster_free_entries", &[Role::Area, Role::Cluster, Role::Start, Role::Count]),
    ("swap_entries_free", &[Role::Area, Role::Cluster, Role::Entry, Role::Count]),
    ("swap_entry_range_free", &[Role::Area, Role::Cluster, Role::Entry, Role::Count]),
    ("swap_entry_range_free", &[Role::Area, Role::Entry, Role::Count]),
];

/// A function of this kernel, and where the members lie.
#[derive(Debug, PartialEq)]
pub struct Target {
    /// The function.
    pub name: &'static str,
    /// Its number in the kernel's BTF.
    pub id: u32,
    roles: &'static [Role],
    /// Of `swap_info_struct`.
    flags: u32,
    bdev: u32,
    cluster_info: u32,
    /// Bytes and slots of a cluster; zero where the function does not name one.
    cluster_bytes: u32,
    cluster_slots: u32,
    /// The flag of an area that is a block device.
    is_blkdev: u32,
    /// Of `block_device`.
    start_sector: u32,
    disk: u32,
    /// Of `gendisk`.
    major: u32,
    first_minor: u32,
}

/// Bits of a `swp_entry_t` that are the slot: 63 less `MAX_SWAPFILES_SHIFT`, on 64 bits.
const SLOT_BITS: u32 = 58;

impl Target {
    /// Finds the function in this kernel, and everything the program needs to know about it.
    pub fn find(btf: &Btf<'_>) -> Result<Target> {
        let mut met = Vec::new();
        for (name, roles) in FUNCTIONS {
            let Some((id, parameters)) = btf.function(name) else { continue };
            let is = |(p, role): (&super::btf::Named<'_>, &Role)| fits(&p.of, p.name, *role);
            if parameters.len() == roles.len() && parameters.iter().zip(roles).all(is) {
                return Target::of(btf, name, id, roles);
            }
            met.push(name);
        }
        match met.first() {
            Some(name) => bail!("this kernel's {name} has other parameters than the known ones"),
            None => bail!("this kernel has none of the known functions that free slots"),
        }
    }

    fn of(btf: &Btf<'_>, name: &'static str, id: u32, roles: &'static [Role]) -> Result<Target> {
        let member = |structure: &str, name: &str, shapes: &[Shape<'_>]| {
            let found = btf.member(structure, name).filter(|m| shapes.contains(&m.of));
            let found = found.with_context(|| format!("this kernel's {structure}.{name} is not the known one"))?;
            ensure!(found.offset < 1 << 15, "this kernel's {structure}.{name} lies too far");
            Ok(found.offset)
        };
        let area = "swap_info_struct";
        let by_cluster = roles.contains(&Role::Start);
        let cluster = "swap_cluster_info";
        let mut target = Target {
            name,
            id,
            roles,
            flags: member(area, "flags", &[Shape::Int(8)])?,
            bdev: member(area, "bdev", &[Shape::Pointer("block_device")])?,
            cluster_info: 0,
            cluster_bytes: 0,
            cluster_slots: 0,
            is_blkdev: btf.enumerator("SWP_BLKDEV").context("this kernel's SWP_BLKDEV is not known")?,
            start_sector: member("block_device", "bd_start_sect", &[Shape::Int(8)])?,
            disk: member("block_device", "bd_disk", &[Shape::Pointer("gendisk")])?,
            major: member("gendisk", "major", &[Shape::Int(4)])?,
            first_minor: member("gendisk", "first_minor", &[Shape::Int(4)])?,
        };
        if by_cluster {
            target.cluster_info = member(area, "cluster_info", &[Shape::Pointer(cluster)])?;
            target.cluster_bytes = btf.size(cluster).filter(|n| *n > 0).context("a cluster of no size")?;
            target.cluster_slots = btf.first_array("swap_table").context("clusters of an unknown number of slots")?;
        }
        Ok(target)
    }
}

/// Whether a parameter is what a role needs.
fn fits(of: &Shape<'_>, name: &str, role: Role) -> bool {
    match role {
        Role::Area => *of == Shape::Pointer("swap_info_struct"),
        Role::Cluster => *of == Shape::Pointer("swap_cluster_info"),
        Role::Entry => *of == Shape::Alias("swp_entry_t", 8),
        Role::Start => *of == Shape::Int(4) && (name.contains("start") || name.contains("off")),
        Role::Count => *of == Shape::Int(4) && name.starts_with("nr"),
    }
}

/// How the program is called.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Hook {
    /// By a trampoline, with the function's arguments.
    Fentry,
    /// By a kprobe, with the processor's registers.
    Kprobe,
}

/// Where `struct pt_regs` keeps the first four arguments; None: not known for this processor.
pub const ARGUMENTS: Option<[i16; 4]> = match cfg!(target_arch = "x86_64") {
    true => Some([112, 104, 96, 88]),
    false => None,
};

type Reg = u8;
const R0: Reg = 0;
const R1: Reg = 1;
const R2: Reg = 2;
const R3: Reg = 3;
const R4: Reg = 4;
const CONTEXT: Reg = 6;
const SETTINGS: Reg = 7;
const AREA: Reg = 8;
const WALK: Reg = 9;
const FRAME: Reg = 10;

/// What the stack frame holds, below its end.
const FETCHED: i16 = -8;
const PAGE: i16 = -16;
const MAJOR: i16 = -24;

const PROBE_READ_KERNEL: i32 = 113;
const RINGBUF_OUTPUT: i32 = 130;
const PSEUDO_MAP: Reg = 1;
const PSEUDO_MAP_VALUE: Reg = 2;

const LOAD_4: u8 = 0x61;
const LOAD_8: u8 = 0x79;
const STORE_8: u8 = 0x7b;
const LOAD_IMMEDIATE: u8 = 0x18;
const MOVE: u8 = 0xbf;
const MOVE_VALUE: u8 = 0xb7;
const ADD: u8 = 0x0f;
const ADD_VALUE: u8 = 0x07;
const SUBTRACT: u8 = 0x1f;
const MULTIPLY_VALUE: u8 = 0x27;
const DIVIDE_VALUE: u8 = 0x37;
const OR: u8 = 0x4f;
const AND: u8 = 0x5f;
const SHIFT_LEFT: u8 = 0x67;
const SHIFT_RIGHT: u8 = 0x77;
const MOVE_LOW_HALF: u8 = 0xbc;
const JUMP_IF_VALUE: u8 = 0x15;
const JUMP_IF_NOT_VALUE: u8 = 0x55;
const JUMP_IF_NOT: u8 = 0x5d;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const ATOMIC_8: u8 = 0xdb;

/// A program in the making.
struct Code {
    words: Vec<u64>,
    /// Jumps to the end, whose distance is not known yet.
    leaves: Vec<usize>,
    hook: Hook,
}

/// The instructions for a function, with the descriptors of the ring and of the settings.
pub fn assemble(target: &Target, hook: Hook, ring: i32, settings: i32) -> Result<Vec<u64>> {
    ensure!(hook == Hook::Fentry || ARGUMENTS.is_some(), "kprobes are not known for this processor");
    let at = |role| target.roles.iter().position(|r| *r == role);
    let mut code = Code { words: Vec::with_capacity(96), leaves: Vec::with_capacity(8), hook };
    code.put(MOVE, CONTEXT, R1, 0, 0);
    code.immediate(SETTINGS, PSEUDO_MAP_VALUE, settings as u64);
    code.put(LOAD_8, R0, SETTINGS, 0, 0);
    code.leave(JUMP_IF_VALUE, R0, 0, 0);
    code.argument(AREA, at(Role::Area).context("no area")?);
    code.belongs_to_us(target);
    code.slot(target, at)?;
    code.put(LOAD_8, R1, FRAME, PAGE, 0);
    code.put(ADD, R1, R0, 0, 0);
    code.argument(R0, at(Role::Count).context("no count")?);
    code.put(SHIFT_LEFT, R0, 0, 0, PAGE_BITS as i32);
    code.put(OR, R0, R1, 0, 0);
    code.put(STORE_8, FRAME, R0, PAGE, 0);
    code.immediate(R1, PSEUDO_MAP, ring as u64);
    code.put(MOVE, R2, FRAME, 0, 0);
    code.put(ADD_VALUE, R2, 0, 0, PAGE.into());
    code.put(MOVE_VALUE, R3, 0, 0, RECORD_BYTES as i32);
    code.put(MOVE_VALUE, R4, 0, 0, 0);
    code.put(CALL, 0, 0, 0, RINGBUF_OUTPUT);
    code.leave(JUMP_IF_VALUE, R0, 0, 0);
    code.put(MOVE_VALUE, R1, 0, 0, 1);
    code.put(ATOMIC_8, SETTINGS, R1, 8, 0);
    Ok(code.end())
}

impl Code {
    fn put(&mut self, op: u8, to: Reg, from: Reg, offset: i16, value: i32) {
        let word = u64::from(op)
            | u64::from(to) << 8
            | u64::from(from) << 12
            | u64::from(offset as u16) << 16
            | u64::from(value as u32) << 32;
        self.words.push(word);
    }

    /// A jump to the end.
    fn leave(&mut self, op: u8, a: Reg, b: Reg, value: i32) {
        self.leaves.push(self.words.len());
        self.put(op, a, b, 0, value);
    }

    /// A constant, or a map by its descriptor.
    fn immediate(&mut self, to: Reg, what: Reg, value: u64) {
        self.put(LOAD_IMMEDIATE, to, what, 0, value as u32 as i32);
        // A map's second half is the offset into it.
        let upper = if what == 0 { (value >> 32) as i32 } else { 0 };
        self.put(0, 0, 0, 0, upper);
    }

    /// The function's nth argument.
    fn argument(&mut self, to: Reg, nth: usize) {
        let offset = match (self.hook, ARGUMENTS) {
            (Hook::Kprobe, Some(offsets)) => offsets[nth],
            _ => 8 * nth as i16,
        };
        self.put(LOAD_8, to, CONTEXT, offset, 0);
    }

    /// A member of 4 or 8 bytes. A probe's fetch leaves only r6 to r9 as they were.
    fn member(&mut self, to: Reg, base: Reg, offset: u32, load: u8) {
        if self.hook == Hook::Fentry {
            return self.put(load, to, base, offset as i16, 0);
        }
        self.put(MOVE, R3, base, 0, 0);
        self.put(ADD_VALUE, R3, 0, 0, offset as i32);
        self.put(MOVE, R1, FRAME, 0, 0);
        self.put(ADD_VALUE, R1, 0, 0, FETCHED.into());
        self.put(MOVE_VALUE, R2, 0, 0, if load == LOAD_4 { 4 } else { 8 });
        self.put(CALL, 0, 0, 0, PROBE_READ_KERNEL);
        self.put(load, to, FRAME, FETCHED, 0);
    }

    /// Leaves unless the area lies on our disk; its first page there is then in the frame.
    fn belongs_to_us(&mut self, target: &Target) {
        self.member(R0, AREA, target.flags, LOAD_8);
        self.put(MOVE_VALUE, R1, 0, 0, target.is_blkdev as i32);
        self.put(AND, R0, R1, 0, 0);
        self.leave(JUMP_IF_VALUE, R0, 0, 0);
        self.member(WALK, AREA, target.bdev, LOAD_8);
        self.member(R0, WALK, target.start_sector, LOAD_8);
        self.put(MOVE, R1, R0, 0, 0);
        self.put(MOVE_VALUE, R2, 0, 0, 7);
        self.put(AND, R1, R2, 0, 0);
        self.leave(JUMP_IF_NOT_VALUE, R1, 0, 0);
        self.put(SHIFT_RIGHT, R0, 0, 0, 3);
        self.put(STORE_8, FRAME, R0, PAGE, 0);
        self.member(WALK, WALK, target.disk, LOAD_8);
        self.member(R0, WALK, target.major, LOAD_4);
        self.put(SHIFT_LEFT, R0, 0, 0, 32);
        self.put(STORE_8, FRAME, R0, MAJOR, 0);
        self.member(R0, WALK, target.first_minor, LOAD_4);
        self.put(LOAD_8, R1, FRAME, MAJOR, 0);
        self.put(OR, R0, R1, 0, 0);
        self.put(LOAD_8, R1, SETTINGS, 0, 0);
        self.leave(JUMP_IF_NOT, R0, R1, 0);
    }

    /// The first slot, in r0.
    fn slot(&mut self, target: &Target, at: impl Fn(Role) -> Option<usize>) -> Result<()> {
        if let Some(entry) = at(Role::Entry) {
            self.argument(R0, entry);
            self.immediate(R1, 0, (1 << SLOT_BITS) - 1);
            self.put(AND, R0, R1, 0, 0);
            return Ok(());
        }
        self.member(WALK, AREA, target.cluster_info, LOAD_8);
        self.argument(R0, at(Role::Cluster).context("no cluster")?);
        self.put(SUBTRACT, R0, WALK, 0, 0);
        self.put(DIVIDE_VALUE, R0, 0, 0, target.cluster_bytes as i32);
        self.put(MULTIPLY_VALUE, R0, 0, 0, target.cluster_slots as i32);
        self.argument(R1, at(Role::Start).context("no start")?);
        self.put(MOVE_LOW_HALF, R1, R1, 0, 0);
        self.put(ADD, R0, R1, 0, 0);
        Ok(())
    }

    fn end(mut self) -> Vec<u64> {
        let end = self.words.len();
        for at in &self.leaves {
            self.words[*at] |= ((end - at - 1) as u64) << 16;
        }
        self.put(MOVE_VALUE, R0, 0, 0, 0);
        self.put(EXIT, 0, 0, 0, 0);
        self.words
    }
}
