//! Exports: names that clients ask for, each with its volume.

use crate::proto::MAX_NAME_BYTES;
use ghostswap::config::parse_size;
use ghostswap::{Store, Volume, MAX_VOLUME_BYTES};
use std::str::FromStr;

/// One `--export NAME[,size=SIZE][,ro]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportConfig {
    pub name: String,
    pub size: u64,
    pub read_only: bool,
}

impl FromStr for ExportConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, options) = text.split_once(',').unwrap_or((text, ""));
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(format!("an export's name has 1 to {MAX_NAME_BYTES} bytes"));
        }
        let (mut size, mut read_only) = (MAX_VOLUME_BYTES, false);
        for part in options.split(',').filter(|part| !part.is_empty()) {
            match part.split_once('=') {
                Some(("size", value)) => size = parse_size(value)?,
                None if part == "ro" => read_only = true,
                _ => return Err(format!("unknown export option '{part}': known are size=SIZE and ro")),
            }
        }
        Ok(ExportConfig { name: name.to_string(), size, read_only })
    }
}

pub struct Export {
    pub name: String,
    pub volume: Volume,
    pub read_only: bool,
}

pub struct Exports(Vec<Export>);

impl Exports {
    pub fn create(store: &Store, wanted: &[ExportConfig]) -> ghostswap::Result<Exports> {
        let mut all: Vec<Export> = Vec::with_capacity(wanted.len());
        for config in wanted {
            if all.iter().any(|export| export.name == config.name) {
                let why = format!("two exports are named '{}'", config.name);
                return Err(ghostswap::Error::InvalidConfig(why));
            }
            let (name, volume) = (config.name.clone(), store.create_volume(config.size)?);
            all.push(Export { name, volume, read_only: config.read_only });
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
        let config = |name: &str, size, read_only| Ok(ExportConfig { name: name.into(), size, read_only });
        assert_eq!(parsed("a"), config("a", MAX_VOLUME_BYTES, false));
        assert_eq!(parsed("swap,size=8M"), config("swap", 8 << 20, false));
        assert_eq!(parsed("old,ro,size=8M"), config("old", 8 << 20, true));
        for bad in ["", ",size=1G", "a,size=", "a,size=x", "a,colour=red", "a,8M", "a,ro=1"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
