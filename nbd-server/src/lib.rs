//! The NBD server without its command line: what `ghostswap-nbd`, its tests and its fuzz targets share.
//!
//! `supervise` keeps the arena and the listening sockets, a worker that serves and one that stands by. `control` is the
//! socket by which exports and `tiers` are listed, added and removed. A connection's way: `listen` accepts it, `server`
//! counts it and gives it a thread (`crew`), `handshake` agrees on an export and a form of messages, `transmission` answers
//! requests through one `Lane`, of large ones through several (`helpers`). Below them `wire` buffers bytes, in TLS or plain, over any `transport`; `proto` alone knows the layout of
//! messages; it is the library's, whose tiers speak NBD too.
//!
//! `connect` is no part of the server: a client that keeps a device of the kernel's nbd driver connected to one.
#![forbid(unsafe_code)]
// Its callers are in this package; what a reader needs is told by the files themselves.
#![allow(missing_docs)]

pub mod connect;
pub mod control;
pub mod conversation;
pub mod crew;
pub mod export;
pub mod fetching;
pub mod handshake;
pub mod helpers;
pub mod listen;
pub mod notify;
pub mod parked;
pub mod protect;
pub mod pulse;
pub mod server;
pub mod supervise;
pub mod tiers;
pub mod tls;
pub mod transmission;
pub mod transport;
pub mod wire;
pub mod work;

pub use ghostswap::nbd::proto;

/// The version; whoever builds a variant names it by `GHOSTSWAP_VERSION`.
pub const VERSION: &str = match option_env!("GHOSTSWAP_VERSION") {
    Some(version) => version,
    None => env!("CARGO_PKG_VERSION"),
};
