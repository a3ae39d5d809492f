//! Where a bucket of an S3 server is, and what goes beside it: `s3:BUCKET[/PREFIX]` and keys.
//!
//! Keys to the server are never among them: see `credentials`.

use std::fmt;
use std::path::PathBuf;

const DEFAULT_TIMEOUT_S: u32 = 30;
const DEFAULT_CONNECTIONS: u8 = 8;
/// Most connections to one server.
const MAX_CONNECTIONS: u8 = 64;
/// Of a bucket's objects, if the user does not say.
pub(super) const DEFAULT_BYTES: u64 = 1 << 40;
/// A key has up to 1024 bytes, and what we add to a prefix takes some.
const MAX_PREFIX_BYTES: usize = 512;

/// A bucket of an S3 server, or what lies under a prefix of one.
#[derive(Clone, Debug, PartialEq)]
pub struct S3Place {
    /// Bucket and prefix as they were given, with `s3:` before them.
    pub name: String,
    /// The bucket.
    pub bucket: String,
    /// What all names of objects begin with, a slash aside. May be empty: then the bucket is for this alone.
    pub prefix: String,
    /// The server: `http://` or `https://`, host, port, and a path if it has one. Default: Amazon's of the region.
    pub endpoint: Option<String>,
    /// As the server calls where it is. Default: us-east-1.
    pub region: Option<String>,
    /// Who signed the server's certificate (PEM). Default: whom the system believes.
    pub ca: Option<PathBuf>,
    /// A file as Amazon's programs have it, with the keys. Default: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
    pub credentials: Option<PathBuf>,
    /// The part of that file. Default: `default`.
    pub profile: Option<String>,
    /// Requests at once, each on a connection of its own, 1 to 64. Default: 8.
    pub connections: u8,
    /// Seconds that a server which does not answer, or is not there, is waited for before reads and writes fail.
    /// Default: 30.
    pub timeout_s: u32,
}

impl S3Place {
    /// Takes `BUCKET[/PREFIX]` apart.
    pub(super) fn parse(text: &str) -> Result<S3Place, String> {
        let bad = |why: &str| format!("s3:{text}: {why}");
        let (bucket, prefix) = text.split_once('/').unwrap_or((text, ""));
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        let in_bucket = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if !(3..=63).contains(&bucket.len()) || !bucket.chars().all(in_bucket) {
            return Err(bad("a bucket has 3 to 63 letters, digits, dots and hyphens, as in s3:pages/node1"));
        }
        let parts = || prefix.split('/').filter(|_| !prefix.is_empty());
        let in_prefix = |c: char| c.is_ascii_alphanumeric() || "-._=+@".contains(c);
        if prefix.len() > MAX_PREFIX_BYTES
            || parts().any(|part| part.is_empty() || part.starts_with('.') || !part.chars().all(in_prefix))
        {
            return Err(bad("a prefix has letters, digits and -._=+@, in parts between single slashes"));
        }
        Ok(S3Place {
            name: format!("s3:{}", text.strip_suffix('/').unwrap_or(text)),
            bucket: bucket.into(),
            prefix: prefix.into(),
            endpoint: None,
            region: None,
            ca: None,
            credentials: None,
            profile: None,
            connections: DEFAULT_CONNECTIONS,
            timeout_s: DEFAULT_TIMEOUT_S,
        })
    }

    /// One more key of the tier. None: it has none of that name.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Option<Result<(), String>> {
        let word = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        match key {
            "endpoint" => match check_endpoint(value) {
                Ok(()) => self.endpoint = Some(value.trim_end_matches('/').into()),
                Err(why) => return Some(Err(why)),
            },
            "region" | "profile" if value.is_empty() || !value.chars().all(word) => {
                return Some(Err(format!("{key}={value}: letters, digits and hyphens")))
            }
            "region" => self.region = Some(value.into()),
            "profile" => self.profile = Some(value.into()),
            "connections" => match value.parse::<u8>() {
                Ok(n) if (1..=MAX_CONNECTIONS).contains(&n) => self.connections = n,
                _ => return Some(Err(format!("connections={value}: 1 to {MAX_CONNECTIONS}"))),
            },
            "timeout" => match super::parse_time(value) {
                Ok(s) if (1..=3600).contains(&s) => self.timeout_s = s,
                _ => return Some(Err(format!("timeout={value}: a time from 1s to 1h"))),
            },
            "ca" | "credentials" if !value.starts_with('/') => {
                return Some(Err(format!("{key}={value}: give the whole path, from / on")))
            }
            "ca" => self.ca = Some(value.into()),
            "credentials" => self.credentials = Some(value.into()),
            _ => return None,
        }
        Some(Ok(()))
    }

    /// Whether it is all there.
    pub(super) fn check(&self) -> Result<(), String> {
        let bad = |why: &str| Err(format!("{}: {why}", self.name));
        match &self.endpoint {
            None if self.region.is_none() => {
                bad("an s3 tier wants endpoint=URL, as in endpoint=https://s3.example.net, or Amazon's region=NAME")
            }
            Some(url) if self.ca.is_some() && !url.starts_with("https://") => bad("ca= is for https:// only"),
            _ if self.profile.is_some() && self.credentials.is_none() => bad("profile= is of a file: credentials=FILE"),
            _ => Ok(()),
        }
    }
}

fn check_endpoint(url: &str) -> Result<(), String> {
    let bad = |why: &str| Err(format!("endpoint={}: {why}", without_user(url)));
    let Some(rest) = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")) else {
        return bad("http:// or https://, and a host");
    };
    let authority = rest.split('/').next().unwrap_or_default();
    if authority.contains('@') {
        return bad("keys do not go there: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or credentials=FILE");
    }
    let plain = |c: char| c.is_ascii_graphic() && !"?#\\\"<>{}|^`%".contains(c);
    match super::nbd::host_and_port(authority) {
        Some((host, _)) if !host.is_empty() && rest.chars().all(plain) => Ok(()),
        Some(_) => bad("not a URL, as in https://s3.example.net:9000"),
        None => bad("the port is not a number"),
    }
}

/// What may stand before an @ is nobody's business.
fn without_user(url: &str) -> &str {
    if url.contains('@') {
        "…"
    } else {
        url
    }
}

/// What follows the name and size.
impl fmt::Display for S3Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (key, value) in [("endpoint", &self.endpoint), ("region", &self.region), ("profile", &self.profile)] {
            value.as_ref().map_or(Ok(()), |value| write!(f, ",{key}={value}"))?;
        }
        for (key, path) in [("ca", &self.ca), ("credentials", &self.credentials)] {
            path.as_ref().map_or(Ok(()), |path| write!(f, ",{key}={}", path.display()))?;
        }
        write!(f, ",connections={},timeout={}s", self.connections, self.timeout_s)
    }
}
