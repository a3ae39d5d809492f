//! What lies under a tier's prefix, and how it is asked for.
//!
//! ```text
//! PREFIX/ghostswap           the header: 4096 bytes
//! PREFIX/ID/EXTENT           an extent's blocks, as many as its segment fills: ID is the tier's, 32 hex digits,
//!                            EXTENT its number, 8 of them
//!
//! header   8 bytes magic · 8 version · 16 ID, as a disk's first block (`io/backing.rs`)
//!          16 a hash of the machine's id and name · 1 length of the name · the name
//! ```
//! A store's objects bear its tier's id, so nothing that an earlier store of the same prefix sent, and that comes late,
//! meets them. Within a store a name is used again, when its extent is: `tier/late.rs` keeps those apart.
//!
//! The header is put where none was, or in place of the one that was read, by the server's own comparison
//! (If-None-Match, If-Match), where it has it: of two stores that begin at once one is refused. One that another machine
//! left is not replaced: that one may live.

use super::credentials::Keys;
use super::http::{in_a_line, Http, Seen, SEEN};
use crate::config::S3Place;
use crate::io::backing::{head_of, is_head_of, MAGIC};
use crate::io::TierKey;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, PutMode, PutOptions, RetryConfig, UpdateVersion};
use std::cell::RefCell;
use std::future::Future;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;
use xxhash_rust::xxh3::xxh3_128;

const HEADER: &str = "ghostswap";
const MACHINE_AT: usize = 32;
const NAME_AT: usize = 48;
const MOST_NAME: usize = 64;

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// There is no such object.
    NotThere,
    /// It is there, or is another by now.
    Taken,
    /// Keys, bucket or region are not right: all else would be refused too.
    Refused(String),
    /// The server cannot do it at this moment. `late`: or does it, later.
    Busy { late: bool, words: String },
    /// It was not sent. `InvalidData`: the server is not who it should be.
    Unreached(ErrorKind, String),
    /// It was sent, and not answered.
    Broken(String),
    /// An answer that makes no sense here.
    Odd(String),
}

impl Trouble {
    /// It may have been sent, and be done yet.
    pub fn is_late(&self) -> bool {
        matches!(self, Trouble::Broken(_) | Trouble::Busy { late: true, .. })
    }

    fn of(e: &object_store::Error, seen: Seen) -> Trouble {
        let (status, code) = match seen {
            Seen::Nothing => return Trouble::Odd(in_a_line(e)),
            Seen::Unreached(kind, words) => return Trouble::Unreached(kind, words),
            Seen::Broken(words) => return Trouble::Broken(words),
            Seen::Answered(status, code) => (status, code),
        };
        let words = match code.as_str() {
            "" => format!("the server says HTTP {status}"),
            code => format!("the server says HTTP {status} {code}"),
        };
        match status {
            404 if code == "NoSuchBucket" => Trouble::Refused("there is no such bucket".into()),
            404 => Trouble::NotThere,
            304 | 409 | 412 => Trouble::Taken,
            301 | 307 | 308 => Trouble::Refused(format!("{words}: region= or endpoint= is another")),
            401 | 403 => Trouble::Refused(words),
            408 | 429 | 503 => Trouble::Busy { late: false, words },
            // A server in front of the server may have given up on it.
            500..=599 => Trouble::Busy { late: true, words },
            _ => Trouble::Odd(words),
        }
    }
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Trouble::NotThere => write!(f, "there is no such object"),
            Trouble::Taken => write!(f, "it is another by now"),
            Trouble::Refused(words)
            | Trouble::Busy { words, .. }
            | Trouble::Unreached(_, words)
            | Trouble::Broken(words)
            | Trouble::Odd(words) => write!(f, "{words}"),
        }
    }
}

async fn told<T>(op: impl Future<Output = object_store::Result<T>>) -> Result<T, Trouble> {
    let asked = async {
        let result = op.await;
        result.map_err(|e| Trouble::of(&e, SEEN.with(RefCell::take)))
    };
    SEEN.scope(RefCell::default(), asked).await
}

/// One runtime's way to it: connections belong to the runtime in which they were made.
pub(super) struct Bucket {
    store: AmazonS3,
    /// The same, where a thousand are deleted with one request. Not all servers know that.
    in_bulk: AmazonS3,
    keys: Arc<Keys>,
    prefix: String,
    timeout: Duration,
}

impl Bucket {
    /// Waits for nothing. Err: one line.
    pub fn new(place: &S3Place, keys: Arc<Keys>) -> Result<Bucket, String> {
        let region = place.region.as_deref().unwrap_or("us-east-1");
        let endpoint = place.endpoint.clone().unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
        let http = Http::new(place, &endpoint)?;
        let once = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let build = |bulk: bool| {
            AmazonS3Builder::new()
                .with_bucket_name(&place.bucket)
                .with_region(region)
                .with_endpoint(&endpoint)
                .with_allow_http(true)
                .with_credentials(keys.clone())
                // Tries again are the carrier's, which knows what else is under way.
                .with_retry(once.clone())
                .with_conditional_put(S3ConditionalPut::ETagMatch)
                .with_disable_bulk_delete(!bulk)
                .with_http_connector(http.clone())
                .build()
                .map_err(|e| in_a_line(&e))
        };
        let timeout = Duration::from_secs(place.timeout_s.into());
        Ok(Bucket { store: build(false)?, in_bulk: build(true)?, prefix: place.prefix.clone(), timeout, keys })
    }

    /// The header's name.
    pub fn header(&self) -> Path {
        self.path(HEADER)
    }

    /// An extent's.
    pub fn object(&self, id: &TierKey, extent: u32) -> Path {
        self.path(&format!("{:032x}/{extent:08x}", u128::from_be_bytes(*id)))
    }

    fn path(&self, below: &str) -> Path {
        match self.prefix.as_str() {
            "" => Path::from(below),
            prefix => Path::from(format!("{prefix}/{below}")),
        }
    }

    /// So many bytes from there on, all of them.
    pub async fn get(&self, path: &Path, at: u64, bytes: u64) -> Result<Bytes, Trouble> {
        let options = GetOptions { range: Some(GetRange::Bounded(at..at + bytes)), ..GetOptions::default() };
        let got = told(async { self.store.get_opts(path, options).await?.bytes().await }).await?;
        match got.len() as u64 {
            n if n == bytes => Ok(got),
            n => Err(Trouble::Odd(format!("{n} bytes of {bytes}"))),
        }
    }

    pub async fn put(&self, path: &Path, bytes: Bytes) -> Result<(), Trouble> {
        told(self.store.put_opts(path, bytes.into(), PutOptions::default())).await.map(drop)
    }

    /// One that is not there any more is deleted.
    pub async fn delete(&self, path: &Path) -> Result<(), Trouble> {
        let one = futures_util::stream::iter([Ok(path.clone())]).boxed();
        match told(self.store.delete_stream(one).try_for_each(|_| async { Ok(()) })).await {
            Err(Trouble::NotThere) => Ok(()),
            other => other,
        }
    }

    /// Whether the server answers, with keys that may have changed since.
    pub async fn look(&self) -> Result<Option<Bytes>, Trouble> {
        self.keys.renew();
        match self.head().await {
            Ok((head, _)) => Ok(Some(head)),
            Err(Trouble::NotThere) => Ok(None),
            Err(trouble) => Err(trouble),
        }
    }

    async fn head(&self) -> Result<(Bytes, Option<String>), Trouble> {
        let options = GetOptions::default();
        told(async {
            let got = self.store.get_opts(&self.header(), options).await?;
            let e_tag = got.meta.e_tag.clone();
            Ok((got.bytes().await?, e_tag))
        })
        .await
    }

    /// Makes it the tier with this identity. Err: one line.
    pub async fn initialise(&self, id: &TierKey) -> Result<(), String> {
        let before = match self.soon(self.head()).await? {
            Ok((head, e_tag)) => {
                self.check_head(&head)?;
                Some((head, e_tag))
            }
            Err(Trouble::NotThere) => {
                self.check_free().await?;
                None
            }
            Err(trouble) => return Err(trouble.to_string()),
        };
        let head = header(id);
        let put = |mode: PutMode| {
            let (head, path) = (head.clone(), self.header());
            async move { told(self.store.put_opts(&path, head.into(), mode.into())).await.map(drop) }
        };
        let over = |e_tag: Option<String>| PutMode::Update(UpdateVersion { e_tag, version: None });
        let taken = || Err("another store has just taken it".to_owned());
        let mut done = match &before {
            None => self.soon(put(PutMode::Create)).await?,
            Some((_, e_tag)) => self.soon(put(over(e_tag.clone()))).await?,
        };
        if let (Err(Trouble::Taken), Some((_, Some(e_tag)))) = (&done, &before) {
            // Ceph's gateway (16.2) compares with the tag as it keeps it: without the quotes with which it tells it.
            if self.soon(self.head()).await?.is_ok_and(|now| Some(&now) == before.as_ref()) {
                done = self.soon(put(over(Some(e_tag.trim_matches('"').to_owned())))).await?;
            }
        }
        match done {
            Ok(()) => {}
            Err(Trouble::Taken) => return taken(),
            // A server that cannot compare says so in one way or another (501, 400).
            Err(Trouble::Odd(_) | Trouble::Busy { .. }) => {
                self.soon(put(PutMode::Overwrite)).await?.map_err(|trouble| trouble.to_string())?;
            }
            Err(trouble) => return Err(trouble.to_string()),
        }
        // One that took no notice of the condition has the last that came.
        match self.soon(self.head()).await?.map_err(|trouble| trouble.to_string())? {
            (head, _) if is_head_of(&head, id) => Ok(()),
            _ => taken(),
        }
    }

    async fn soon<T>(&self, op: impl Future<Output = T>) -> Result<T, String> {
        tokio::time::timeout(self.timeout, op).await.map_err(|_| "no answer from the server".to_owned())
    }

    /// Whether a header that is there may be replaced.
    fn check_head(&self, head: &[u8]) -> Result<(), String> {
        let path = self.header();
        if !head.starts_with(MAGIC) {
            return Err(format!("it holds something else: {path} is not ours"));
        }
        let (hash, _) = machine();
        if head.get(MACHINE_AT..NAME_AT) == Some(&hash[..]) {
            return Ok(());
        }
        let name = head.get(NAME_AT).map_or(0, |n| usize::from(*n));
        let name = String::from_utf8_lossy(head.get(NAME_AT + 1..NAME_AT + 1 + name).unwrap_or_default());
        Err(format!(
            "it is, or was, a store's on another machine, {}: give each a prefix of its own; if that store is gone, \
             delete the object {path}",
            name.escape_debug()
        ))
    }

    /// Whether there is nothing but what stores leave.
    async fn check_free(&self) -> Result<(), String> {
        let prefix = (!self.prefix.is_empty()).then(|| Path::from(self.prefix.as_str()));
        let listed = self.soon(told(self.store.list_with_delimiter(prefix.as_ref()))).await?;
        let listed = listed.map_err(|trouble| trouble.to_string())?;
        let strange = listed.common_prefixes.iter().find(|path| tier_of(path).is_none());
        match listed.objects.first().map(|object| &object.location).or(strange) {
            Some(path) => Err(format!("it holds something else ({path}): give a prefix of its own")),
            None => Ok(()),
        }
    }

    /// Deletes what stores before this one left.
    pub async fn sweep(&self, own: &TierKey) -> Result<(), Trouble> {
        let prefix = (!self.prefix.is_empty()).then(|| Path::from(self.prefix.as_str()));
        let listed = told(self.store.list_with_delimiter(prefix.as_ref())).await?;
        for left in listed.common_prefixes {
            if tier_of(&left).is_none_or(|id| id == u128::from_be_bytes(*own)) {
                continue;
            }
            if let Err(Trouble::Odd(_) | Trouble::Busy { .. }) = self.delete_all(&self.in_bulk, &left).await {
                self.delete_all(&self.store, &left).await?;
            }
        }
        Ok(())
    }

    async fn delete_all(&self, by: &AmazonS3, below: &Path) -> Result<(), Trouble> {
        let all = self.store.list(Some(below)).map_ok(|object| object.location);
        let ours = all.try_filter(|path| std::future::ready(is_extent(path))).boxed();
        told(by.delete_stream(ours).try_for_each(|_| async { Ok(()) })).await
    }
}

/// The tier whose objects lie below this, if any's do.
fn tier_of(path: &Path) -> Option<u128> {
    let name = path.filename()?;
    let hex = name.len() == 32 && name.bytes().all(|b| b.is_ascii_hexdigit());
    hex.then(|| u128::from_str_radix(name, 16).ok())?
}

fn is_extent(path: &Path) -> bool {
    path.filename().is_some_and(|name| name.len() == 8 && name.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The header of the tier with this identity, made on this machine.
fn header(id: &TierKey) -> Bytes {
    let (hash, name) = machine();
    let mut head = head_of(id);
    head[MACHINE_AT..NAME_AT].copy_from_slice(&hash);
    let name = &name.as_bytes()[..name.len().min(MOST_NAME)];
    head[NAME_AT] = name.len() as u8;
    head[NAME_AT + 1..NAME_AT + 1 + name.len()].copy_from_slice(name);
    Bytes::copy_from_slice(&head)
}

/// A hash of what this machine is known by, and its name. Its id is not to be told (machine-id(5)).
fn machine() -> ([u8; 16], String) {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let name = read("/proc/sys/kernel/hostname");
    // Containers of one image may have one id, and then their names keep them apart.
    let id = read("/etc/machine-id");
    (xxh3_128(format!("ghostswap {id} {name}").as_bytes()).to_be_bytes(), name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ours_is_known_by_its_name() {
        assert_eq!(tier_of(&Path::from("a/00000000000000000000000000000010")), Some(16));
        for strange in ["a", "a/0000000000000000000000000000001", "a/0000000000000000000000000000001g"] {
            assert_eq!(tier_of(&Path::from(strange)), None, "{strange}");
        }
        assert!(is_extent(&Path::from("a/b/0000ffff")) && !is_extent(&Path::from("a/b/ghostswap")));
        let head = header(&[7; 16]);
        assert!(is_head_of(&head, &[7; 16]) && !is_head_of(&head, &[8; 16]) && head.len() == 4096);
        assert_eq!(head[MACHINE_AT..NAME_AT], machine().0);
    }

    #[test]
    fn what_a_server_says_is_told_apart() {
        let e = object_store::Error::Generic { store: "S3", source: "x".into() };
        let of = |status, code: &str| Trouble::of(&e, Seen::Answered(status, code.into()));
        assert_eq!(of(404, "NoSuchKey"), Trouble::NotThere);
        assert!(matches!(of(404, "NoSuchBucket"), Trouble::Refused(words) if words.contains("bucket")));
        assert!(matches!(of(403, "AccessDenied"), Trouble::Refused(words) if words.contains("403 AccessDenied")));
        assert!(matches!(of(412, ""), Trouble::Taken));
        for (status, late) in [(500, true), (502, true), (503, false), (504, true), (429, false)] {
            assert_eq!(of(status, "SlowDown").is_late(), late, "{status}");
        }
        assert!(Trouble::of(&e, Seen::Broken("x".into())).is_late());
        assert!(!Trouble::of(&e, Seen::Unreached(ErrorKind::ConnectionRefused, "x".into())).is_late());
    }
}
