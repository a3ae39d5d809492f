//! Exports: names that clients ask for, each with its volume and who may go to it.

use crate::proto::MAX_NAME_BYTES;
use ghostswap::config::parse_size;
use ghostswap::{Store, Volume, MAX_VOLUME_BYTES};
use std::str::FromStr;
use std::sync::atomic::AtomicU64;

/// One `--export NAME[,size=SIZE][,client=NAME[:NAME…]][,ro]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportConfig {
    pub name: String,
    pub size: u64,
    pub read_only: bool,
    /// Names in certificates; empty: everybody who is let in.
    pub clients: Vec<String>,
}

impl FromStr for ExportConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, options) = text.split_once(',').unwrap_or((text, ""));
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(format!("an export's name has 1 to {MAX_NAME_BYTES} bytes"));
        }
        let mut config =
            ExportConfig { name: name.to_string(), size: MAX_VOLUME_BYTES, read_only: false, clients: Vec::new() };
        for part in options.split(',').filter(|part| !part.is_empty()) {
            match part.split_once('=') {
                Some(("size", value)) => config.size = parse_size(value)?,
                Some(("client", value)) => {
                    if value.split(':').any(str::is_empty) {
                        return Err(format!("export option '{part}': a client's name is empty"));
                    }
                    config.clients.extend(value.split(':').map(str::to_owned));
                }
                None if part == "ro" => config.read_only = true,
                _ => return Err(format!("unknown export option '{part}': known are size=SIZE, client=NAME and ro")),
            }
        }
        Ok(config)
    }
}

pub struct Export {
    pub name: String,
    pub volume: Volume,
    pub read_only: bool,
    clients: Vec<String>,
    /// Writes refused for want of room, after they had waited for it.
    pub refused_writes: AtomicU64,
}

/// Whether a client may go to an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Granted,
    /// Not before TLS has shown who it is.
    NeedsTls,
    Refused,
}

impl Export {
    /// `names`: what the client's certificate calls it; `None`: the connection is not in TLS.
    pub fn access(&self, names: Option<&[String]>) -> Access {
        match names {
            _ if self.clients.is_empty() => Access::Granted,
            None => Access::NeedsTls,
            Some(names) if names.iter().any(|name| self.clients.contains(name)) => Access::Granted,
            Some(_) => Access::Refused,
        }
    }
}

pub struct Exports(Vec<Export>);

impl Exports {
    /// Each has the volume of its number: one that an earlier worker made, or a new one.
    pub fn open(store: &Store, wanted: &[ExportConfig]) -> ghostswap::Result<Exports> {
        let mut there = store.volumes().into_iter();
        let mut all: Vec<Export> = Vec::with_capacity(wanted.len());
        for config in wanted {
            if all.iter().any(|export| export.name == config.name) {
                let why = format!("two exports are named '{}'", config.name);
                return Err(ghostswap::Error::InvalidConfig(why));
            }
            let name = config.name.clone();
            let volume = there.next().map_or_else(|| store.create_volume(config.size), Ok)?;
            let (read_only, clients) = (config.read_only, config.clients.clone());
            all.push(Export { name, volume, read_only, clients, refused_writes: AtomicU64::new(0) });
        }
        Ok(Exports(all))
    }

    pub fn all(&self) -> &[Export] {
        &self.0
    }

    /// The empty name is the protocol's default export: the first.
    pub fn find(&self, name: &[u8]) -> Option<&Export> {
        if name.is_empty() {
            return self.0.first();
        }
        self.0.iter().find(|export| export.name.as_bytes() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_parse() {
        let parsed = |text: &str| text.parse::<ExportConfig>();
        let config = |name: &str, size, read_only, clients: &[&str]| {
            let clients = clients.iter().map(|name| name.to_string()).collect();
            Ok(ExportConfig { name: name.into(), size, read_only, clients })
        };
        assert_eq!(parsed("a"), config("a", MAX_VOLUME_BYTES, false, &[]));
        assert_eq!(parsed("swap,size=8M"), config("swap", 8 << 20, false, &[]));
        assert_eq!(parsed("old,ro,size=8M"), config("old", 8 << 20, true, &[]));
        assert_eq!(parsed("a,size=8M,client=n1:n2,client=n 3"), config("a", 8 << 20, false, &["n1", "n2", "n 3"]));
        for bad in [
            "",
            ",size=1G",
            "a,size=",
            "a,size=x",
            "a,colour=red",
            "a,8M",
            "a,ro=1",
            "a,client=",
            "a,client=x:",
            "a,client",
        ] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
