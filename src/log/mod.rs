//! The log: records in segments, who may reuse them when, and which to clean. It knows nothing of
//! compression and nothing of slots' owners.

pub(crate) mod epoch;
pub(crate) mod policy;
pub(crate) mod rebuild;
pub(crate) mod record;
pub(crate) mod segment;
