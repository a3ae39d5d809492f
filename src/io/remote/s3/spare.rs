//! Memory for what is being put: there beforehand, lent, and given back when the last who sends from it lets go.

use bytes::Bytes;
use std::sync::{Arc, Mutex, PoisonError};

/// Kept at most: as many segments as go down at once.
const KEPT: usize = 4;

/// Pieces of memory, all of one size.
#[derive(Clone, Default)]
pub(super) struct Spare(Arc<Mutex<Vec<Vec<u8>>>>);

struct Lent {
    memory: Vec<u8>,
    bytes: usize,
    back: Spare,
}

impl Spare {
    /// Makes what is kept, and touches it.
    pub fn fill(&self, bytes: usize) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.resize_with(KEPT, || vec![0xa5; bytes]);
    }

    /// A copy of these bytes.
    pub fn copy(&self, bytes: &[u8]) -> Bytes {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        // One that is given up may keep its memory for a while: another, then.
        let mut memory = kept.filter(|memory| memory.len() >= bytes.len()).unwrap_or_else(|| vec![0; bytes.len()]);
        memory[..bytes.len()].copy_from_slice(bytes);
        Bytes::from_owner(Lent { memory, bytes: bytes.len(), back: self.clone() })
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.memory[..self.bytes]
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut kept = self.back.0.lock().unwrap_or_else(PoisonError::into_inner);
        let as_large = kept.first().is_none_or(|other| other.len() <= self.memory.len());
        if kept.len() < KEPT && as_large {
            kept.push(std::mem::take(&mut self.memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_and_no_more_than_was_there_is_kept() {
        let spare = Spare::default();
        spare.fill(100);
        let kept = || spare.0.lock().unwrap().len();
        let lent: Vec<_> = (0..6u8).map(|n| spare.copy(&[n; 90])).collect();
        assert_eq!(kept(), 0);
        assert!(lent.iter().enumerate().all(|(n, bytes)| bytes[..] == [n as u8; 90]));
        let second = lent[1].slice(3..9);
        drop(lent);
        // Of the six two were smaller, made when none was left; and one is lent yet.
        assert_eq!(kept(), KEPT - 1);
        assert_eq!(second[..], [1; 6]);
        drop(second);
        assert_eq!(kept(), KEPT);
        drop(spare.copy(&[9; 1000]));
        assert!(kept() <= KEPT);
    }
}
