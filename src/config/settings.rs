//! What can be set of a tier in use: `NAME,key=value[,key=value…]`, in the words of `--tier`.
//!
//! Some are numbers that a store goes by: they are changed in it (`Store::set_tier`). With the others it was made: it
//! is opened anew with them, which is a take-over. What pages that lie on a tier could not be found or read without
//! (where it is, how large, how it is sealed) cannot be set at all.

use super::below::{named, parse_name, which};
use super::nbd::NbdPlace;
use super::s3::S3Place;
use super::tier::key_and_value;
use super::{default_tiers, RamTier, StoreConfig, TierConfig};
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// A tier, as `tier list` calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TierName {
    /// Memory that is written to.
    Ram,
    /// Memory compressed again.
    Cold,
    /// One that lies below memory; `disk`, where there is one only.
    Below(String),
}

impl TierName {
    fn word(&self) -> &str {
        match self {
            TierName::Ram => "ram",
            TierName::Cold => "cold",
            TierName::Below(name) => name,
        }
    }

    /// Those that a store takes as they come, and those that it is opened anew for.
    fn keys(&self) -> [&'static [&'static str]; 2] {
        match self {
            TierName::Ram => [&["limit", "high", "low"], &["codec", "group", "dict"]],
            TierName::Cold => [&["limit", "idle", "cpu"], &["codec", "group", "dict"]],
            TierName::Below(_) => [&[], &["timeout", "connections", "ca", "cert", "key", "credentials", "profile"]],
        }
    }
}

/// Settings of one tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierSettings {
    name: TierName,
    pairs: Vec<(String, String)>,
}

impl TierSettings {
    /// Whose.
    pub fn name(&self) -> &TierName {
        &self.name
    }

    /// Those that a store takes as they come, and those that it is opened anew for.
    pub fn split(&self) -> (Option<TierSettings>, Option<TierSettings>) {
        let [now, later] = self.name.keys().map(|keys| {
            let pairs: Vec<_> = self.pairs.iter().filter(|(key, _)| keys.contains(&key.as_str())).cloned().collect();
            (!pairs.is_empty()).then(|| TierSettings { name: self.name.clone(), pairs })
        });
        (now, later)
    }

    /// The tiers with these settings, as far as that can be told without opening them.
    pub fn apply(&self, tiers: &[TierConfig]) -> Result<Vec<TierConfig>> {
        let bad = Error::InvalidConfig;
        let mut all = if tiers.is_empty() { default_tiers() } else { tiers.to_vec() };
        if !matches!(all.first(), Some(TierConfig::Ram(_))) {
            all.insert(0, TierConfig::Ram(RamTier::default()));
        }
        let place = match &self.name {
            TierName::Ram => 0,
            TierName::Cold => 1,
            TierName::Below(name) => {
                let (names, first) = named(&all);
                first + which(&names, Some(name))?
            }
        };
        match (&self.name, all.get_mut(place)) {
            (TierName::Ram | TierName::Cold, Some(TierConfig::Ram(tier))) => {
                *tier = self.of_ram(tier.clone()).map_err(bad)?;
            }
            (TierName::Below(_), Some(TierConfig::Disk(tier))) => {
                self.pairs.iter().try_for_each(|(key, value)| tier.set(key, value)).map_err(bad)?;
                tier.check().map_err(bad)?;
            }
            _ => return Err(bad("there is no second memory tier".into())),
        }
        // Of two memory tiers the second is to differ. How much memory there is they were measured by already.
        StoreConfig { tiers: all.clone(), ..StoreConfig::default() }.validate(u64::MAX)?;
        Ok(all)
    }

    /// A memory tier with these settings.
    pub(crate) fn of_ram(&self, mut tier: RamTier) -> std::result::Result<RamTier, String> {
        self.pairs.iter().try_for_each(|(key, value)| tier.set(key, value))?;
        tier.check()?;
        Ok(tier)
    }

    /// What is wrong with a value, whatever the tier is like.
    fn check(&self) -> std::result::Result<(), String> {
        if !matches!(self.name, TierName::Below(_)) {
            return self.of_ram(RamTier::default()).map(drop);
        }
        let mut nbd = NbdPlace::parse("nbds://any")?;
        let mut s3 = S3Place::parse("any")?;
        for (key, value) in &self.pairs {
            match key.as_str() {
                "cert" | "key" => nbd.set(key, value),
                _ => s3.set(key, value),
            }
            .unwrap_or(Ok(()))?;
        }
        Ok(())
    }
}

impl FromStr for TierSettings {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let (name, rest) = s.split_once(',').unwrap_or((s, ""));
        let name = match name {
            "ram" => TierName::Ram,
            "cold" => TierName::Cold,
            below => TierName::Below(parse_name(below).map_err(|_| {
                format!(
                    "'{s}': a tier and settings, as in ram,limit=4G; tiers are ram, cold, and as tier list has them"
                )
            })?),
        };
        let [now, later] = name.keys();
        let known = || [now, later].concat().join(", ");
        let mut pairs = Vec::new();
        for part in rest.split(',').filter(|part| !part.is_empty()) {
            let (key, value) = key_and_value(part)?;
            match key {
                _ if now.contains(&key) || later.contains(&key) => pairs.push((key.into(), value.into())),
                "size" | "encrypt" | "prealloc" | "endpoint" | "region" if matches!(name, TierName::Below(_)) => {
                    return Err(format!(
                        "{key}= stays as it is while pages may lie there: remove the tier and add it anew"
                    ))
                }
                _ => return Err(format!("'{key}' cannot be set of {}: known are {}", name.word(), known())),
            }
        }
        if pairs.is_empty() {
            return Err(format!("'{s}': what to set? Known are {}", known()));
        }
        let settings = TierSettings { name, pairs };
        settings.check()?;
        Ok(settings)
    }
}

impl fmt::Display for TierSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name.word())?;
        self.pairs.iter().try_for_each(|(key, value)| write!(f, ",{key}={value}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> TierSettings {
        text.parse().unwrap_or_else(|why| panic!("{why}"))
    }

    #[test]
    fn what_is_said_is_understood_and_said_again() {
        for (text, now, later) in [
            ("ram,limit=4G", "ram,limit=4G", ""),
            (
                "ram,limit=40%,codec=zstd:1,high=90%,low=auto,group=64K",
                "ram,limit=40%,high=90%,low=auto",
                "ram,codec=zstd:1,group=64K",
            ),
            ("cold,idle=5m,cpu=50%", "cold,idle=5m,cpu=50%", ""),
            ("ram,dict=off", "", "ram,dict=off"),
            ("cold,group=32K,limit=1G", "cold,limit=1G", "cold,group=32K"),
            ("disk,timeout=5s,connections=3,ca=/a", "", "disk,timeout=5s,connections=3,ca=/a"),
            ("disk,cert=/a,key=/b,credentials=/c,profile=d", "", "disk,cert=/a,key=/b,credentials=/c,profile=d"),
        ] {
            let all = settings(text);
            assert_eq!(all.to_string(), text);
            let said = |part: Option<TierSettings>| part.map_or_else(String::new, |part| part.to_string());
            let (first, second) = all.split();
            assert_eq!((said(first).as_str(), said(second).as_str()), (now, later));
        }
        for bad in [
            "",
            "ram",
            "ram,",
            "limit=4G",
            "hot,limit=4G",
            "ram,limit",
            "ram,limit=1K",
            "ram,limit=0%",
            "ram,codec=gzip",
            "ram,group=3K",
            "ram,idle=5m",
            "ram,dict=5K",
            "ram,high=99%",
            "ram,high=50%,low=60%",
            "ram,timeout=5s",
            "cold,high=90%",
            "cold,idle=ever",
            "cold,cpu=0%",
            "disk,limit=4G",
            "disk,size=1T",
            "disk,encrypt=off",
            "disk,endpoint=http://x",
            "disk,timeout=0s",
            "disk,connections=65",
            "disk,ca=a",
            "disk,key=b",
            "disk,codec=lz4",
            "disk,dict=on",
            "disk,prealloc=off",
        ] {
            let why = bad.parse::<TierSettings>().unwrap_err();
            assert!(!why.contains('\n'), "{why}");
        }
        assert!("disk,size=1T".parse::<TierSettings>().unwrap_err().contains("remove the tier"));
    }

    #[test]
    fn settings_come_into_the_tiers_they_are_for() {
        let tiers = |list: &[&str]| list.iter().map(|t| t.parse().unwrap()).collect::<Vec<TierConfig>>();
        let two = tiers(&["ram,limit=1G", "ram,codec=zstd:3,group=64K", "block:/dev/x"]);
        let with = |text: &str, of: &[TierConfig]| settings(text).apply(of);
        assert_eq!(with("ram,codec=zstd:1", &two).unwrap()[0], tiers(&["ram,limit=1G,codec=zstd:1"])[0]);
        assert_eq!(with("cold,group=32K", &two).unwrap()[1], tiers(&["ram,codec=zstd:3,group=32K"])[0]);
        assert_eq!(with("cold,group=32K", &two).unwrap()[2], two[2]);
        assert_eq!(with("cold,codec=zstd:9", &[]).unwrap()[0], default_tiers()[0], "those that there are without any");
        let implied = tiers(&["block:/dev/x"]);
        assert_eq!(with("ram,group=8K", &implied).unwrap(), tiers(&["ram,group=8K", "block:/dev/x"]));
        let nbd = tiers(&["ram", "nbd:nbds://host/x,ca=/a"]);
        let new = with("disk,ca=/b,timeout=5s,cert=/c,key=/d", &nbd).unwrap();
        assert_eq!(new[1], tiers(&["nbd:nbds://host/x,ca=/b,timeout=5s,cert=/c,key=/d"])[0]);
        let s3 = tiers(&["ram", "s3:pages,endpoint=https://host"]);
        assert_eq!(
            with("disk,credentials=/a", &s3).unwrap()[1],
            tiers(&["s3:pages,endpoint=https://host,credentials=/a"])[0]
        );
        for (text, of) in [
            ("cold,group=4K,codec=lz4", &two),
            ("ram,codec=zstd:3,group=64K", &two),
            ("disk,timeout=5s", &two),
            ("disk,cert=/c", &nbd),
            ("disk,connections=9", &nbd),
            ("disk,credentials=/c", &nbd),
            ("disk,profile=x", &s3),
            ("cold,group=8K", &nbd),
            ("cold,group=8K", &implied),
        ] {
            let why = with(text, of).unwrap_err().to_string();
            assert!(!why.contains('\n'), "{text}: {why}");
        }
        assert!(with("disk,timeout=5s", &tiers(&["ram"])).unwrap_err().to_string().contains("no tier below"));
        let three = tiers(&["ram", "file:/x,size=1G", "nbd:nbd://a/x", "nbd:nbd://b/x"]);
        assert_eq!(with("nbd2,timeout=5s", &three).unwrap()[3], tiers(&["nbd:nbd://b/x,timeout=5s"])[0]);
        assert!(with("disk,timeout=5s", &three).is_err() && with("file,timeout=5s", &three).is_err());
    }
}
