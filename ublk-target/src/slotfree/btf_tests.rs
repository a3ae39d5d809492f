//! The reader and the program's choices against BTF made here: the kernels' own is 5 MB.

use super::*;
use crate::slotfree::program::{assemble, Hook, Target, ARGUMENTS};

/// BTF in the making; types are numbered from 1.
#[derive(Default)]
struct Maker {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

impl Maker {
    fn new() -> Maker {
        Maker { strings: vec![0], ..Maker::default() }
    }

    fn name(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return 0;
        }
        let at = self.strings.len() as u32;
        self.strings.extend(text.bytes().chain([0]));
        at
    }

    fn add(&mut self, name: &str, kind: u32, count: usize, word: u32, rest: &[u32]) -> TypeId {
        let name = self.name(name);
        let words = [name, kind << 24 | count as u32, word];
        self.types.extend(words.iter().chain(rest).flat_map(|w| w.to_le_bytes()));
        self.count += 1;
        self.count
    }

    fn int(&mut self, name: &str, bytes: u32) -> TypeId {
        self.add(name, INT, 0, bytes, &[bytes * 8])
    }

    fn structure(&mut self, name: &str, bytes: u32, members: &[(&str, TypeId, u32)]) -> TypeId {
        let rest: Vec<u32> = members.iter().flat_map(|(name, of, at)| [self.name(name), *of, at * 8]).collect();
        self.add(name, STRUCT, members.len(), bytes, &rest)
    }

    fn pointer(&mut self, to: TypeId) -> TypeId {
        self.add("", PTR, 0, to, &[])
    }

    fn function(&mut self, name: &str, parameters: &[(&str, TypeId)]) -> TypeId {
        let rest: Vec<u32> = parameters.iter().flat_map(|(name, of)| [self.name(name), *of]).collect();
        let proto = self.add("", FUNC_PROTO, parameters.len(), 0, &rest);
        self.add(name, FUNC, 0, proto, &[])
    }

    fn done(self) -> Vec<u8> {
        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        let head = [u32::from(MAGIC) | 1 << 16, HEADER_BYTES as u32, 0, types, types, strings];
        let head = head.iter().flat_map(|w| w.to_le_bytes());
        head.chain(self.types).chain(self.strings).collect()
    }
}

/// The types of a kernel's swap code, laid out as none has them, and what its functions take.
struct Sample {
    maker: Maker,
    area: TypeId,
    cluster: TypeId,
    entry: TypeId,
    number: TypeId,
}

fn sample() -> Sample {
    let mut m = Maker::new();
    let (int, number, long) = (m.int("int", 4), m.int("unsigned int", 4), m.int("unsigned long", 8));
    let sector = m.add("sector_t", TYPEDEF, 0, long, &[]);
    let disk = m.structure("gendisk", 80, &[("major", int, 8), ("first_minor", int, 12)]);
    let disk = m.pointer(disk);
    let device = m.structure("block_device", 90, &[("bd_start_sect", sector, 16), ("bd_disk", disk, 24)]);
    let device = m.pointer(device);
    let cluster = m.structure("swap_cluster_info", 48, &[("count", number, 0)]);
    let cluster = m.pointer(cluster);
    let members = [("flags", long, 32), ("bdev", device, 40), ("cluster_info", cluster, 48)];
    let area = m.structure("swap_info_struct", 99, &members);
    let constant = m.add("", CONST, 0, area, &[]);
    let area = m.pointer(constant);
    let array = m.add("", ARRAY, 0, 0, &[long, int, 512]);
    m.structure("swap_table", 4096, &[("entries", array, 0)]);
    let (other, flag) = (m.name("SWP_USED"), m.name("SWP_BLKDEV"));
    m.add("", ENUM, 2, 4, &[other, 1, flag, 64]);
    let entry = m.structure("", 8, &[("val", long, 0)]);
    let entry = m.add("swp_entry_t", TYPEDEF, 0, entry, &[]);
    Sample { maker: m, area, cluster, entry, number }
}

fn found(sample: Sample) -> Result<Target> {
    let text = sample.maker.done();
    Target::find(&Btf::parse(&text)?)
}

#[test]
fn members_sizes_and_values_are_found() {
    let text = sample().maker.done();
    let btf = Btf::parse(&text).unwrap();
    let flags = btf.member("swap_info_struct", "flags");
    assert_eq!(flags, Some(Member { offset: 32, of: Shape::Int(8) }));
    assert_eq!(btf.member("swap_info_struct", "bdev").map(|m| m.of), Some(Shape::Pointer("block_device")));
    assert_eq!(btf.member("block_device", "bd_start_sect").map(|m| m.of), Some(Shape::Int(8)), "by its typedef");
    assert_eq!((btf.member("swap_info_struct", "none"), btf.member("none", "flags")), (None, None));
    assert_eq!((btf.size("swap_cluster_info"), btf.size("none")), (Some(48), None));
    assert_eq!((btf.first_array("swap_table"), btf.first_array("gendisk")), (Some(512), None));
    assert_eq!((btf.enumerator("SWP_BLKDEV"), btf.enumerator("SWP_NONE")), (Some(64), None));
}

#[test]
fn bit_fields_are_no_members_to_be_loaded() {
    let mut m = Maker::new();
    let int = m.int("int", 4);
    let rest = [m.name("whole"), int, 64, m.name("bits"), int, 3 << 24 | 96, m.name("odd"), int, 101];
    m.add("mixed", STRUCT, 3 | 1 << 31, 16, &rest);
    let text = m.done();
    let btf = Btf::parse(&text).unwrap();
    assert_eq!(btf.member("mixed", "whole").map(|m| m.offset), Some(8));
    assert_eq!((btf.member("mixed", "bits"), btf.member("mixed", "odd")), (None, None));
}

#[test]
fn the_function_is_taken_by_name_and_parameters() {
    let mut s = sample();
    let (area, cluster, number) = (s.area, s.cluster, s.number);
    let by_cluster = [("si", area), ("ci", cluster), ("ci_start", number), ("nr_pages", number)];
    let id = s.maker.function("__swap_cluster_free_entries", &by_cluster);
    let target = found(s).unwrap();
    assert_eq!((target.name, target.id), ("__swap_cluster_free_entries", id));

    let mut s = sample();
    let by_entry = [("si", s.area), ("entry", s.entry), ("nr_pages", s.number)];
    s.maker.function("swap_entry_range_free", &by_entry);
    assert_eq!(found(s).unwrap().name, "swap_entry_range_free");
}

#[test]
fn another_kernels_function_of_the_same_name_is_refused() {
    let refused = |parameters: &dyn Fn(&Sample) -> Vec<(&'static str, TypeId)>| {
        let mut s = sample();
        let parameters = parameters(&s);
        s.maker.function("swap_entry_range_free", &parameters);
        found(s).unwrap_err().to_string()
    };
    let other = "this kernel's swap_entry_range_free has other parameters than the known ones";
    assert_eq!(refused(&|s| vec![("entry", s.entry), ("si", s.area), ("nr_pages", s.number)]), other);
    assert_eq!(refused(&|s| vec![("si", s.area), ("entry", s.entry), ("usage", s.number)]), other);
    assert_eq!(refused(&|s| vec![("si", s.area), ("entry", s.number), ("nr_pages", s.number)]), other);
    assert_eq!(refused(&|s| vec![("si", s.cluster), ("entry", s.entry), ("nr_pages", s.number)]), other);
    assert_eq!(refused(&|s| vec![("si", s.area), ("entry", s.entry)]), other);
    assert_eq!(found(sample()).unwrap_err().to_string(), "this kernel has none of the known functions that free slots");
}

#[test]
fn text_that_is_cut_or_changed_is_refused_and_never_panics() {
    let mut s = sample();
    let by_entry = [("si", s.area), ("entry", s.entry), ("nr_pages", s.number)];
    s.maker.function("swap_entry_range_free", &by_entry);
    let whole = s.maker.done();
    for len in 0..whole.len() {
        assert!(Btf::parse(&whole[..len]).is_err(), "cut at {len}");
    }
    let mut state = 1u64;
    for _ in 0..100_000 {
        let mut text = whole.clone();
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        text[(state >> 33) as usize % whole.len()] ^= 1 << (state >> 30 & 7);
        let _ = Btf::parse(&text).and_then(|btf| Target::find(&btf));
    }
}

/// The kernel's verifier is the judge of a program (`scripts/vm/guest/slotfree.sh`); this is what it
/// would refuse first.
#[test]
fn programs_are_whole_and_jump_to_their_end() {
    let mut s = sample();
    let by_cluster = [("si", s.area), ("ci", s.cluster), ("ci_start", s.number), ("nr_pages", s.number)];
    s.maker.function("__swap_cluster_free_entries", &by_cluster);
    let target = found(s).unwrap();
    for hook in [Hook::Fentry, Hook::Kprobe] {
        if hook == Hook::Kprobe && ARGUMENTS.is_none() {
            continue;
        }
        let code = assemble(&target, hook, 70_000, 9).unwrap();
        let end = code.len() - 2;
        assert_eq!((code[end] & 0xff, code[end + 1] & 0xff), (0xb7, 0x95), "{hook:?}");
        let mut leaves = 0;
        let mut at = 0;
        while at < code.len() {
            let op = code[at] & 0xff;
            if op & 7 == 5 && op != 0x85 && op != 0x95 {
                assert_eq!(at + 1 + (code[at] >> 16 & 0xffff) as usize, end, "{hook:?} at {at}");
                leaves += 1;
            }
            at += if op == 0x18 { 2 } else { 1 };
        }
        assert_eq!(leaves, 5, "{hook:?}");
        let ring = code.iter().any(|word| word & 0xffff == 0x1118 && word >> 32 == 70_000);
        assert!(ring, "the ring's descriptor is in it");
    }
}
