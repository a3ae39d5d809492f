//! Exports: names that clients ask for, each with its volume.

use crate::proto::MAX_NAME_BYTES;
use ghostswap::config::parse_size;
use ghostswap::{Store, Volume, MAX_VOLUME_BYTES};
use std::str::FromStr;

/// One `--export NAME[,size=SIZE]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportConfig {
    pub name: String,
    pub size: u64,
}

impl FromStr for ExportConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, options) = text.split_once(',').unwrap_or((text, ""));
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(format!("an export's name has 1 to {MAX_NAME_BYTES} bytes"));
        }
        let mut size = MAX_VOLUME_BYTES;
        for part in options.split(',').filter(|part| !part.is_empty()) {
            match part.split_once('=') {
                Some(("size", value)) => size = parse_size(value)?,
                _ => return Err(format!("unknown export option '{part}': known is size=SIZE")),
            }
        }
        Ok(ExportConfig { name: name.to_string(), size })
    }
}

pub struct Export {
    pub name: String,
    pub volume: Volume,
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
            all.push(Export { name: config.name.clone(), volume: store.create_volume(config.size)? });
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
        assert_eq!(parsed("a"), Ok(ExportConfig { name: "a".into(), size: MAX_VOLUME_BYTES }));
        assert_eq!(parsed("swap,size=8M"), Ok(ExportConfig { name: "swap".into(), size: 8 << 20 }));
        for bad in ["", ",size=1G", "a,size=", "a,size=x", "a,colour=red", "a,8M"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
