//! A tier of objects on any S3 server: Amazon's, Ceph's gateway, MinIO and others.
//!
//! An extent is an object ([`bucket`]), put as a whole when a segment goes down and read in the blocks that a page
//! needs. One thread, the carrier ([`carrier`]), takes requests out of the same table as NBD's do and has many under way
//! in a runtime of its own, each on a connection of its own ([`http`]).
//!
//! Why objects of one segment, and not of several: each is deleted when its segment dies, so space comes back without
//! rewriting anything, and the mover moves and compacts as it does elsewhere. What it costs is a request for each MiB
//! that goes down. In parts (multipart) an object of a MiB would be three requests instead of one.
//!
//! Why a thread and a runtime here, where NBD has neither lists nor promises: a page's round trip to an object store is
//! tens of milliseconds, so a machine that swaps wants dozens under way, and HTTP/1.1 has one to a connection. As many
//! threads would keep as many stacks in locked memory.
//!
//! **Allocates** as it likes, off the I/O path: what it sends is copied first, since a connection that is given up may
//! hold its bytes for longer than the requester does; into memory that is there beforehand ([`spare`]).

mod bucket;
mod carrier;
mod credentials;
mod http;
mod spare;

use super::objects::Objects;
use super::office::Office;
use super::post::Post;
use crate::config::S3Place;
use crate::error::{Error, Result};
use crate::io::TierKey;
use bucket::Bucket;
use carrier::Carrier;
use credentials::Keys;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

/// Of the thread that looks names up, there when one is.
const LOOK_UP_STACK_BYTES: usize = 256 << 10;

/// It is no work to begin it anew, but takes memory then.
const LOOK_UP_FOR: Duration = Duration::from_secs(3600);

struct Server {
    place: S3Place,
    keys: Arc<Keys>,
}

/// Reads keys and certificates. Err: one line that says what is wrong.
pub(super) fn load(place: &S3Place) -> std::result::Result<Box<dyn Objects>, String> {
    let server = Server { place: place.clone(), keys: Arc::new(Keys::new(place)?) };
    server.bucket()?;
    Ok(Box::new(server))
}

impl Server {
    fn bucket(&self) -> std::result::Result<Bucket, String> {
        Bucket::new(&self.place, self.keys.clone())
    }
}

impl Objects for Server {
    fn carrier(&self, office: Arc<Office>, thread_start: Option<fn(&str)>) -> Result<Box<dyn FnOnce() + Send>> {
        let bad = |why: String| Error::BadTier { tier: self.place.name.clone(), why };
        let bucket = Arc::new(self.bucket().map_err(bad)?);
        let runtime = runtime(thread_start).map_err(|source| Error::System { what: "a carrier's runtime", source })?;
        let carrier = Carrier::new(office, bucket, Post::new()?, usize::from(self.place.connections));
        Ok(Box::new(move || {
            runtime.block_on(carrier.run());
            // A name that is being looked up is not waited for.
            runtime.shutdown_background();
        }))
    }

    fn initialise(&self, id: &TierKey) -> std::result::Result<(), String> {
        // Connections of its own: the carrier's are its runtime's.
        let bucket = self.bucket()?;
        runtime(None).map_err(|e| e.to_string())?.block_on(bucket.initialise(id))
    }
}

fn runtime(thread_start: Option<fn(&str)>) -> std::io::Result<Runtime> {
    let mut builder = Builder::new_current_thread();
    builder.enable_io().enable_time().max_blocking_threads(1).thread_stack_size(LOOK_UP_STACK_BYTES);
    builder.thread_keep_alive(LOOK_UP_FOR).thread_name("ghost-names").on_thread_start(move || {
        if let Some(hook) = thread_start {
            hook("carrier");
        }
    });
    builder.build()
}
