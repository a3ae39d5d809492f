//! A small reader of BTF, the kernel's description of its own types: which function frees slots,
//! what its parameters are, and where the members lie that the program has to look at.
//!
//! It keeps the text of `/sys/kernel/btf/vmlinux` (5 MB) and one offset for each type, and answers a
//! few questions by walking it. A library that builds every type held 20 MB at its peak, in small
//! pieces of the heap that stays with every process forked from it; this one's two pieces are given
//! back whole. The text comes from the kernel and is checked all the same: whatever does not fit is
//! an answer of `None`.
//!
//! A type is three words (name, kind and count, size or type) and, by its kind, what follows them:
//! Linux `Documentation/bpf/btf.rst`.

use anyhow::{bail, Result};

const MAGIC: u16 = 0xeb9f;
const HEADER_BYTES: usize = 24;
const TYPE_BYTES: usize = 12;

const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// The number of a type.
pub type TypeId = u32;

/// The types of a kernel.
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where each type begins; the first is type 1.
    starts: Vec<u32>,
}

/// One type's three words, and where what follows them begins.
#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: u32,
    count: usize,
    kind_flag: bool,
    /// A size, or another type.
    word: u32,
    rest: usize,
}

/// A parameter or a member, with what its type comes to.
#[derive(Debug, PartialEq)]
pub struct Named<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its type.
    pub of: Shape<'a>,
}

/// What a type is, as far as it matters here.
#[derive(Debug, PartialEq)]
pub enum Shape<'a> {
    /// An integer of so many bytes.
    Int(u32),
    /// A pointer to a structure of this name, or to something nameless.
    Pointer(&'a str),
    /// A structure of this name and size.
    Struct(&'a str, u32),
    /// `typedef` of this name, of a structure of this size.
    Alias(&'a str, u32),
    /// Anything else.
    Other,
}

/// A member of a structure.
#[derive(Debug, PartialEq)]
pub struct Member<'a> {
    /// Bytes from the structure's beginning.
    pub offset: u32,
    /// What it is.
    pub of: Shape<'a>,
}

impl<'a> Btf<'a> {
    /// Takes the text of one BTF file apart into its types.
    pub fn parse(text: &'a [u8]) -> Result<Btf<'a>> {
        let word = |at: usize| number(text, at).map(|n| n as usize);
        let magic = text.get(..2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        let (Some(MAGIC), Some(header)) = (magic, word(4)) else { bail!("not BTF of this machine's byte order") };
        let section = |at: usize| {
            let start = header.checked_add(word(at)?)?;
            text.get(start..start.checked_add(word(at + 4)?)?)
        };
        let (Some(types), Some(strings), true) = (section(8), section(16), header >= HEADER_BYTES) else {
            bail!("BTF that ends early")
        };
        let mut btf = Btf { types, strings, starts: Vec::with_capacity(types.len() / 40) };
        let mut at = 0;
        while at < types.len() {
            btf.starts.push(at as u32);
            let Some(len) = btf.at(at).and_then(following_bytes) else { bail!("BTF with a type of an unknown kind") };
            at += TYPE_BYTES + len;
        }
        Ok(btf)
    }

    /// The number and the parameters of a function.
    pub fn function(&self, name: &str) -> Option<(TypeId, Vec<Named<'a>>)> {
        let (id, function) = self.find(FUNC, name)?;
        let proto = self.get(function.word).filter(|t| t.kind == FUNC_PROTO)?;
        let parameter = |n| {
            let at = proto.rest + n * 8;
            Some(Named { name: self.text(number(self.types, at)?)?, of: self.shape(number(self.types, at + 4)?) })
        };
        Some((id, (0..proto.count).map(parameter).collect::<Option<_>>()?))
    }

    /// A member of a structure, not of one within it. None for a bit field.
    pub fn member(&self, structure: &str, name: &str) -> Option<Member<'a>> {
        let (_, whole) = self.find(STRUCT, structure)?;
        for n in 0..whole.count {
            let at = whole.rest + n * 12;
            if self.text(number(self.types, at)?) != Some(name) {
                continue;
            }
            let bits = number(self.types, at + 8)?;
            let (bits, width) = if whole.kind_flag { (bits & 0xff_ffff, bits >> 24) } else { (bits, 0) };
            let of = self.shape(number(self.types, at + 4)?);
            return (width == 0 && bits % 8 == 0).then_some(Member { offset: bits / 8, of });
        }
        None
    }

    /// The bytes of a structure.
    pub fn size(&self, structure: &str) -> Option<u32> {
        self.find(STRUCT, structure).map(|(_, t)| t.word)
    }

    /// How many elements an array that is a structure's first member has.
    pub fn first_array(&self, structure: &str) -> Option<u32> {
        let (_, whole) = self.find(STRUCT, structure)?;
        let member = self.get(number(self.types, whole.rest + 4)?)?;
        (whole.count > 0 && member.kind == ARRAY).then(|| number(self.types, member.rest + 8)).flatten()
    }

    /// The value of an enumerator, whatever enumeration it belongs to.
    pub fn enumerator(&self, name: &str) -> Option<u32> {
        let all = self.starts.iter().filter_map(|at| self.at(*at as usize)).filter(|t| t.kind == ENUM);
        let values = all.flat_map(|t| (0..t.count).map(move |n| t.rest + n * 8));
        let found = |at: &usize| number(self.types, *at).and_then(|n| self.text(n)) == Some(name);
        values.into_iter().find(found).and_then(|at| number(self.types, at + 4))
    }

    fn find(&self, kind: u32, name: &str) -> Option<(TypeId, Type)> {
        let mut numbered = self.starts.iter().zip(1..);
        numbered.find_map(|(at, id)| {
            let t = self.at(*at as usize)?;
            (t.kind == kind && self.text(t.name) == Some(name)).then_some((id, t))
        })
    }

    fn get(&self, id: TypeId) -> Option<Type> {
        self.at(*self.starts.get((id as usize).checked_sub(1)?)? as usize)
    }

    fn at(&self, at: usize) -> Option<Type> {
        let (name, info) = (number(self.types, at)?, number(self.types, at + 4)?);
        let word = number(self.types, at + 8)?;
        let (kind, count) = (info >> 24 & 31, (info & 0xffff) as usize);
        Some(Type { name, kind, count, kind_flag: info >> 31 == 1, word, rest: at + TYPE_BYTES })
    }

    fn text(&self, at: u32) -> Option<&'a str> {
        let rest = self.strings.get(at as usize..)?;
        std::str::from_utf8(&rest[..rest.iter().position(|b| *b == 0)?]).ok()
    }

    /// The type without its qualifiers. The kernel's chains of them are short; a circle is no type.
    fn bare(&self, mut id: TypeId) -> Option<Type> {
        for _ in 0..16 {
            let t = self.get(id)?;
            if !matches!(t.kind, VOLATILE | CONST | RESTRICT | TYPE_TAG) {
                return Some(t);
            }
            id = t.word;
        }
        None
    }

    /// The same without other names for it either.
    fn base(&self, id: TypeId) -> Option<Type> {
        let mut t = self.bare(id)?;
        for _ in 0..16 {
            if t.kind != TYPEDEF {
                return Some(t);
            }
            t = self.bare(t.word)?;
        }
        None
    }

    fn shape(&self, id: TypeId) -> Shape<'a> {
        let (Some(t), Some(base)) = (self.bare(id), self.base(id)) else { return Shape::Other };
        let name = |t: Type| self.text(t.name).unwrap_or("");
        match (t.kind, base.kind) {
            (TYPEDEF, STRUCT) => Shape::Alias(name(t), base.word),
            (_, INT) => Shape::Int(base.word),
            (_, STRUCT) => Shape::Struct(name(base), base.word),
            (_, PTR) => match self.bare(base.word) {
                Some(to) if to.kind == STRUCT => Shape::Pointer(name(to)),
                _ => Shape::Pointer(""),
            },
            _ => Shape::Other,
        }
    }
}

/// How many bytes follow a type's three words.
fn following_bytes(t: Type) -> Option<usize> {
    Some(match t.kind {
        INT | VAR | DECL_TAG => 4,
        ARRAY => 12,
        STRUCT | UNION | DATASEC | ENUM64 => 12 * t.count,
        ENUM | FUNC_PROTO => 8 * t.count,
        // Pointers, forwards (7), typedefs, qualifiers, functions, floats (16).
        2 | 7..=12 | 16 | 18 => 0,
        _ => return None,
    })
}

fn number(text: &[u8], at: usize) -> Option<u32> {
    let bytes = text.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

#[cfg(test)]
#[path = "btf_tests.rs"]
mod tests;
