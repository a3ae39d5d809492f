//! The NBD protocol as both sides of it need it here: `ghostswap-nbd` serves it, and a tier below may lie behind it
//! (`io/remote`). No I/O of its own, and nothing is allocated.
// What a reader needs is told by the files themselves.
#![allow(missing_docs)]

pub mod handshake;
pub mod proto;
pub mod replies;
