//! Which of a numbered run of things (frames, metadata pages) is so: a bit each.

/// A set of small numbers.
pub(crate) struct Resident {
    words: Vec<u64>,
    len: u32,
    hint: usize,
}

impl Resident {
    pub fn new(len: u32) -> Resident {
        Resident { words: vec![0; (len as usize).div_ceil(64)], len, hint: 0 }
    }

    /// The lowest one that is not resident.
    pub fn lowest_absent(&mut self) -> Option<u32> {
        while self.hint < self.words.len() {
            let absent = !self.words[self.hint];
            if absent != 0 {
                let n = self.hint as u32 * 64 + absent.trailing_zeros();
                return (n < self.len).then_some(n);
            }
            self.hint += 1;
        }
        None
    }

    pub fn has(&self, n: u32) -> bool {
        n < self.len && self.words[n as usize / 64] >> (n % 64) & 1 == 1
    }

    pub fn set(&mut self, n: u32) {
        self.words[n as usize / 64] |= 1 << (n % 64);
    }

    pub fn clear(&mut self, n: u32) {
        self.words[n as usize / 64] &= !(1 << (n % 64));
        self.hint = self.hint.min(n as usize / 64);
    }

    pub fn count(&self) -> u32 {
        self.words.iter().map(|w| w.count_ones()).sum()
    }

    /// All of them, the highest first: pushed on a stack in this order, the lowest is used first.
    pub fn descending(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().rev().flat_map(|(i, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                let bit = 63u32.checked_sub(rest.leading_zeros())?;
                rest &= !(1 << bit);
                Some(i as u32 * 64 + bit)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_out_as_they_went_in() {
        let mut r = Resident::new(130);
        for n in [0, 1, 63, 64, 129] {
            r.set(n);
        }
        assert_eq!(r.descending().collect::<Vec<_>>(), [129, 64, 63, 1, 0]);
        assert_eq!((r.count(), r.lowest_absent()), (5, Some(2)));
        r.clear(1);
        assert_eq!((r.has(1), r.has(63), r.has(130), r.lowest_absent()), (false, true, false, Some(1)));
    }
}
