//! Where an NBD server's export is: a URI as the NBD project's doc/uri.md has it, and what goes beside it.
//!
//! ```text
//! nbd://HOST[:PORT]/EXPORT             nbds://…        TCP; with TLS
//! nbd+unix:///EXPORT?socket=PATH       nbds+unix://…   a Unix socket; with TLS
//! ```
//! Of the queries `socket`, `tls-certificates` (a directory with the names that libnbd wants), `tls-hostname` and
//! `tls-verify-peer=true`, which is how it is anyway. Keys agreed on beforehand (PSK) are not there.

use std::fmt;
use std::path::PathBuf;

const PORT: u16 = 10809;
const DEFAULT_TIMEOUT_S: u32 = 30;
/// Most connections to one server.
pub(super) const MAX_CONNECTIONS: u8 = 8;
/// What the protocol's clients here take.
const MAX_EXPORT_BYTES: usize = 255;

/// An export of an NBD server.
#[derive(Clone, Debug, PartialEq)]
pub struct NbdPlace {
    /// As it was given.
    pub uri: String,
    /// Where the server listens.
    pub address: NbdAddress,
    /// The export's name, up to 255 bytes.
    pub export: String,
    /// None: in the clear.
    pub tls: Option<NbdTls>,
    /// Connections at once, 1 to 8. Default: 2 if the server says that several agree on the export, else 1.
    pub connections: Option<u8>,
    /// Seconds that a server which does not answer, or is not there, is waited for before reads and writes fail.
    /// Default: 30.
    pub timeout_s: u32,
}

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq)]
pub enum NbdAddress {
    /// A name or number, and a port.
    Tcp(String, u16),
    /// A Unix socket.
    Unix(PathBuf),
}

/// How an NBD server is known, and what is shown to it. PEM files.
#[derive(Clone, Debug, PartialEq)]
pub struct NbdTls {
    /// The name that its certificate must have.
    pub server_name: String,
    /// Who signs servers' certificates.
    pub ca: Option<PathBuf>,
    /// Our own certificate, if the server wants one.
    pub cert: Option<PathBuf>,
    /// The key to it.
    pub key: Option<PathBuf>,
}

impl NbdPlace {
    /// Takes a URI apart.
    pub(super) fn parse(uri: &str) -> Result<NbdPlace, String> {
        let bad = |why: &str| format!("'{uri}': {why}");
        let (scheme, rest) = uri.split_once("://").ok_or_else(|| bad("not a URI, as in nbd://host/export"))?;
        let (tls, unix) = match scheme {
            "nbd" => (false, false),
            "nbds" => (true, false),
            "nbd+unix" => (false, true),
            "nbds+unix" => (true, true),
            _ => return Err(bad("known schemes are nbd, nbds, nbd+unix, nbds+unix")),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        if authority.contains('@') {
            return Err(bad("users and keys agreed on beforehand are not supported"));
        }
        let export = decode(export).ok_or_else(|| bad("the export's name is not one"))?;
        if export.len() > MAX_EXPORT_BYTES || export.contains('\0') {
            return Err(bad("an export's name has up to 255 bytes, and no NUL"));
        }
        let (mut socket, mut name, mut directory) = (None, None, None);
        for part in query.split('&').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let value = decode(value).ok_or_else(|| bad("a query that is not one"))?;
            match key {
                "socket" if unix => socket = Some(value),
                "tls-hostname" if tls => name = Some(value),
                "tls-certificates" if tls => directory = Some(value),
                "tls-verify-peer" if tls && matches!(value.as_str(), "" | "1" | "true") => {}
                _ => return Err(bad(&format!("'{key}' is not supported, or not here"))),
            }
        }
        let (host, port) = host_and_port(authority).ok_or_else(|| bad("the port is not a number"))?;
        let address = match socket {
            Some(socket) if socket.starts_with('/') => NbdAddress::Unix(socket.into()),
            _ if unix => {
                return Err(bad("give the socket's whole path, as in nbd+unix:///export?socket=/run/nbd.sock"))
            }
            _ if host.is_empty() => return Err(bad("a host is missing")),
            _ => NbdAddress::Tcp(host.to_owned(), port.unwrap_or(PORT)),
        };
        let tls = tls.then(|| {
            let server_name = name.unwrap_or_else(|| host.to_owned());
            let mut tls = NbdTls { server_name, ca: None, cert: None, key: None };
            if let Some(directory) = directory.map(PathBuf::from) {
                tls.ca = Some(directory.join("ca-cert.pem"));
                // As others have it: without one of his own the directory is a client's nevertheless.
                let own = ["client-cert.pem", "client-key.pem"].map(|name| directory.join(name));
                if own[0].exists() {
                    [tls.cert, tls.key] = own.map(Some);
                }
            }
            tls
        });
        Ok(NbdPlace { uri: uri.into(), address, export, tls, connections: None, timeout_s: DEFAULT_TIMEOUT_S })
    }

    /// One more key of the tier. None: it has none of that name.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Option<Result<(), String>> {
        match (key, &mut self.tls) {
            ("connections", _) => match value.parse::<u8>() {
                Ok(n) if (1..=MAX_CONNECTIONS).contains(&n) => self.connections = Some(n),
                _ => return Some(Err(format!("connections={value}: 1 to {MAX_CONNECTIONS}"))),
            },
            ("timeout", _) => match super::parse_time(value) {
                Ok(s) if (1..=3600).contains(&s) => self.timeout_s = s,
                _ => return Some(Err(format!("timeout={value}: a time from 1s to 1h"))),
            },
            ("ca" | "cert" | "key", None) => return Some(Err(format!("{key}= is for nbds:// and nbds+unix:// only"))),
            ("ca" | "cert" | "key", Some(_)) if !value.starts_with('/') => {
                return Some(Err(format!("{key}={value}: give the whole path, from / on")))
            }
            ("ca", Some(tls)) => tls.ca = Some(value.into()),
            ("cert", Some(tls)) => tls.cert = Some(value.into()),
            ("key", Some(tls)) => tls.key = Some(value.into()),
            _ => return None,
        }
        Some(Ok(()))
    }

    /// What may only be known to be missing at the end.
    pub(super) fn check(&self) -> Result<(), String> {
        let Some(tls) = &self.tls else { return Ok(()) };
        if tls.server_name.is_empty() {
            return Err(format!("'{}': tls-hostname= must say whose certificate to expect", self.uri));
        }
        if tls.ca.is_none() {
            return Err(format!("'{}' wants ca=FILE, who signed the server's certificate", self.uri));
        }
        match tls.cert.is_some() == tls.key.is_some() {
            true => Ok(()),
            false => Err(format!("'{}': cert= and key= go together", self.uri)),
        }
    }
}

pub(super) fn host_and_port(authority: &str) -> Option<(&str, Option<u16>)> {
    let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, port)) => (host, Some(port.strip_prefix(':')?)),
        None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
    };
    let port = port.filter(|port| !port.is_empty()).map(str::parse).transpose().ok()?;
    Some((host, port))
}

/// Percent signs and what they stand for.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || rest.next().and_then(|d| char::from(d).to_digit(16));
                (digit()? << 4 | digit()?) as u8
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

/// What follows the URI and size.
impl fmt::Display for NbdPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.connections.map_or(Ok(()), |n| write!(f, ",connections={n}"))?;
        write!(f, ",timeout={}s", self.timeout_s)?;
        let Some(tls) = &self.tls else { return Ok(()) };
        for (key, path) in [("ca", &tls.ca), ("cert", &tls.cert), ("key", &tls.key)] {
            path.as_ref().map_or(Ok(()), |path| write!(f, ",{key}={}", path.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_taken_apart() {
        let tcp = |uri: &str| match NbdPlace::parse(uri).unwrap() {
            NbdPlace { address: NbdAddress::Tcp(host, port), export, .. } => (host, port, export),
            other => panic!("{other:?}"),
        };
        let is = |host: &str, port, export: &str| (host.to_owned(), port, export.to_owned());
        assert_eq!(tcp("nbd://pool.example/cold"), is("pool.example", 10809, "cold"));
        assert_eq!(tcp("nbd://10.0.2.9:7/"), is("10.0.2.9", 7, ""));
        assert_eq!(tcp("nbd://[::1]:99/a%2fb%20c"), is("::1", 99, "a/b c"));
        assert_eq!(tcp("nbd://[fe80::1]"), is("fe80::1", 10809, ""));
        assert_eq!(tcp("nbd://host/a/b"), is("host", 10809, "a/b"));
        let unix = NbdPlace::parse("nbd+unix:///x?socket=/run/a%2Cb").unwrap();
        assert_eq!((unix.address, unix.export), (NbdAddress::Unix("/run/a,b".into()), "x".into()));
        let tls = NbdPlace::parse("nbds://pool.example").unwrap().tls.unwrap();
        assert_eq!((tls.server_name.as_str(), tls.ca), ("pool.example", None));
        let given = "nbds+unix:///x?socket=/s&tls-hostname=other&tls-certificates=/nowhere";
        let tls = NbdPlace::parse(given).unwrap().tls.unwrap();
        assert_eq!((tls.server_name.as_str(), tls.ca, tls.cert), ("other", Some("/nowhere/ca-cert.pem".into()), None));
    }

    #[test]
    fn what_is_no_uri_or_not_supported_is_told_in_a_line() {
        let long = format!("nbd://host/{}", "a".repeat(256));
        for bad in [
            "",
            "host/export",
            "http://host/",
            "nbd:///export",
            "nbd://host:port/",
            "nbd://host:99999/",
            "nbd://[::1]9/",
            "nbd://user@host/",
            "nbd://host/%zz",
            "nbd://host/%0",
            "nbd://host/%ff",
            "nbd://host/%00",
            "nbd://host/?socket=/x",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=relative",
            "nbd://host/?tls-hostname=x",
            "nbds://host/?tls-psk-file=/x",
            "nbds://host/?tls-verify-peer=false",
            &long,
        ] {
            let why = NbdPlace::parse(bad).unwrap_err();
            assert!(!why.contains('\n'), "{why}");
        }
    }
}
