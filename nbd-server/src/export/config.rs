//! An export as the user gives it.

use crate::proto::MAX_NAME_BYTES;
use ghostswap::config::{parse_size, parse_time};
use ghostswap::{Placement, MAX_VOLUME_BYTES, PAGE_BYTES};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// One `--export NAME[,size=SIZE][,quota=SIZE][,tiers=all|ram|below][,client=NAME[:NAME…]][,linger=TIME][,ro]`. With a star in its name it is a template: an
/// export is made for each client that asks for such a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportConfig {
    pub name: String,
    pub size: u64,
    /// Bytes it may hold, compressed.
    pub quota: Option<u64>,
    /// On which tiers its pages may lie.
    pub placement: Placement,
    pub read_only: bool,
    /// Names in certificates; empty: everybody who is let in.
    pub clients: Vec<String>,
    /// How long one without a client stays; None: until it is removed, or, of a template, a minute.
    pub linger: Option<Duration>,
}

impl ExportConfig {
    pub fn is_template(&self) -> bool {
        self.name.contains('*')
    }

    /// Whether a template is for such a name: one star stands for one character or more.
    pub(super) fn covers(&self, name: &str) -> bool {
        let Some((begin, end)) = self.name.split_once('*') else { return false };
        name.len() > begin.len() + end.len() && name.starts_with(begin) && name.ends_with(end) && !name.contains('*')
    }
}

fn volume_bytes(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        bytes if bytes > 0 && bytes % PAGE_BYTES as u64 == 0 && bytes <= MAX_VOLUME_BYTES => Ok(bytes),
        _ => Err(format!("size={text}: a multiple of 4096, above 0 and up to 16T")),
    }
}

fn quota_bytes(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        0 => Err("quota=0: nothing could be written; ro makes an export read-only".into()),
        bytes => Ok(bytes),
    }
}

/// As `tiers=` says it.
pub fn tiers_name(placement: Placement) -> &'static str {
    match placement {
        Placement::Memory => "ram",
        Placement::Below => "below",
        Placement::Anywhere => "all",
    }
}

/// What that says. None: nothing that is known.
pub fn placement(tiers: &str) -> Option<Placement> {
    [Placement::Anywhere, Placement::Memory, Placement::Below].into_iter().find(|known| tiers_name(*known) == tiers)
}

impl fmt::Display for ExportConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},size={}", self.name, self.size)?;
        self.quota.map_or(Ok(()), |quota| write!(f, ",quota={quota}"))?;
        if self.placement != Placement::default() {
            write!(f, ",tiers={}", tiers_name(self.placement))?;
        }
        if !self.clients.is_empty() {
            write!(f, ",client={}", self.clients.join(":"))?;
        }
        self.linger.map_or(Ok(()), |linger| write!(f, ",linger={}s", linger.as_secs()))?;
        if self.read_only {
            write!(f, ",ro")?;
        }
        Ok(())
    }
}

impl FromStr for ExportConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, options) = text.split_once(',').unwrap_or((text, ""));
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(format!("an export's name has 1 to {MAX_NAME_BYTES} bytes"));
        }
        if name.matches('*').count() > 1 {
            return Err(format!("export '{name}': a template's name has one star"));
        }
        let mut config = ExportConfig {
            name: name.to_string(),
            size: MAX_VOLUME_BYTES,
            quota: None,
            placement: Placement::default(),
            read_only: false,
            clients: Vec::new(),
            linger: None,
        };
        for part in options.split(',').filter(|part| !part.is_empty()) {
            match part.split_once('=') {
                Some(("size", value)) => config.size = volume_bytes(value)?,
                Some(("quota", value)) => config.quota = Some(quota_bytes(value)?),
                Some(("tiers", value)) => {
                    let known = placement(value);
                    config.placement = known.ok_or_else(|| format!("tiers={value}: one of all, ram, below"))?;
                }
                Some(("linger", value)) => config.linger = Some(Duration::from_secs(parse_time(value)?.into())),
                Some(("client", value)) => {
                    if value.split(':').any(str::is_empty) {
                        return Err(format!("export option '{part}': a client's name is empty"));
                    }
                    config.clients.extend(value.split(':').map(str::to_owned));
                }
                None if part == "ro" => config.read_only = true,
                _ => {
                    return Err(format!(
                        "unknown export option '{part}': known are size=SIZE, quota=SIZE, tiers=all|ram|below, \
                         client=NAME, linger=TIME and ro"
                    ))
                }
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood_and_said_again() {
        for text in ["a", "a,size=8M,ro", "swap-*,size=64G,client=n1:n2,linger=5m", "*,linger=0"] {
            let config: ExportConfig = text.parse().unwrap();
            assert_eq!(config.to_string().parse(), Ok(config));
        }
    }

    #[test]
    fn templates_cover_names() {
        let template: ExportConfig = "swap-*-x".parse().unwrap();
        for (name, covered) in
            [("swap-1-x", true), ("swap-12-x", true), ("swap--x", false), ("swap-x", false), ("swap-*-x", false)]
        {
            assert_eq!(template.covers(name), covered, "{name}");
        }
    }

    #[test]
    fn exports_parse() {
        let parsed = |text: &str| text.parse::<ExportConfig>();
        let config = |name: &str, size, read_only, clients: &[&str]| {
            let clients = clients.iter().map(|name| name.to_string()).collect();
            Ok(ExportConfig {
                name: name.into(),
                size,
                quota: None,
                placement: Placement::Anywhere,
                read_only,
                clients,
                linger: None,
            })
        };
        assert_eq!(parsed("a"), config("a", MAX_VOLUME_BYTES, false, &[]));
        assert_eq!(parsed("swap,size=8M"), config("swap", 8 << 20, false, &[]));
        assert_eq!(parsed("old,ro,size=8M"), config("old", 8 << 20, true, &[]));
        assert_eq!(parsed("a,size=8M,client=n1:n2,client=n 3"), config("a", 8 << 20, false, &["n1", "n2", "n 3"]));
        assert_eq!(parsed("a,quota=8G").map(|config| config.quota), Ok(Some(8 << 30)));
        assert_eq!(parsed("a,tiers=ram").map(|config| config.placement), Ok(Placement::Memory));
        for bad in [
            "a,tiers=disk",
            "a,quota=0",
            "a,quota=all",
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
            "a,linger=long",
            "a,size=0",
            "a,size=5000",
            "a,size=17T",
            "a-*-*",
        ] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
