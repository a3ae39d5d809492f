//! Tiers below memory in a list of tiers: their order, what they are called, how one comes and goes.

use super::{default_tiers, DiskTier, Place, RamTier, TierConfig, MAX_TIERS_BELOW};
use crate::error::{Error, Result};

impl DiskTier {
    /// A number for what its place is called, which another place hardly has. Never 0.
    pub(crate) fn place_number(&self) -> u64 {
        let called = match &self.place {
            Place::File(path) => format!("file:{}", path.display()),
            Place::Block(path) => format!("block:{}", path.display()),
            Place::Nbd(nbd) => format!("nbd:{}", nbd.uri),
            Place::S3(s3) => format!("{} {:?}", s3.name, s3.endpoint),
        };
        let number = xxhash_rust::xxh3::xxh3_64(called.as_bytes()) & !OF_SERVER | 2;
        if matches!(self.place, Place::Nbd(_) | Place::S3(_)) {
            number | OF_SERVER
        } else {
            number
        }
    }
}

impl Place {
    /// As a word of `--tier`.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Place::File(_) => "file",
            Place::Block(_) => "block",
            Place::Nbd(_) => "nbd",
            Place::S3(_) => "s3",
        }
    }
}

/// The bit of a place's number that tells those behind servers.
pub(crate) const OF_SERVER: u64 = 1;

/// What a tier below memory may be called.
pub(super) fn parse_name(name: &str) -> std::result::Result<String, String> {
    let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    match name {
        "ram" | "cold" => Err(format!("name={name}: a memory tier is called so")),
        _ if name.len() <= 16 && name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(letters) => {
            Ok(name.into())
        }
        _ => Err(format!("name={}: up to 16 of a-z, 0-9 and -, a letter first", name.escape_debug())),
    }
}

/// The tiers by kind, in the order in which pages go down.
pub(super) fn in_order(tiers: &[TierConfig]) -> Result<(Vec<&RamTier>, Vec<&DiskTier>)> {
    let bad = |why: String| Err(Error::InvalidConfig(why));
    let (mut ram, mut disks): (Vec<_>, Vec<&DiskTier>) = (Vec::new(), Vec::new());
    for tier in tiers {
        match tier {
            TierConfig::Ram(_) if !disks.is_empty() => {
                return bad("memory does not go below a file, block, nbd or s3 tier: give ram tiers first".into());
            }
            TierConfig::Ram(tier) => ram.push(tier),
            TierConfig::Disk(tier) => disks.push(tier),
        }
    }
    if disks.len() > MAX_TIERS_BELOW {
        return bad(format!("{} tiers below memory: there may be {MAX_TIERS_BELOW}", disks.len()));
    }
    let names = names(&disks);
    for (n, tier) in disks.iter().enumerate() {
        let path = tier.place.path().display();
        if disks[..n].iter().any(|other| is_same(&other.place, &tier.place)) {
            return bad(format!("two tiers are to be at {path}"));
        }
        if names[..n].contains(&names[n]) {
            return bad(format!("two tiers are called {}: give another name=", names[n]));
        }
    }
    Ok((ram, disks))
}

fn is_same(one: &Place, other: &Place) -> bool {
    match (one, other) {
        (Place::S3(one), Place::S3(other)) => (&one.name, &one.endpoint) == (&other.name, &other.endpoint),
        _ => one.path() == other.path(),
    }
}

/// What tiers below memory are called: as they are told to be; or `disk`, where there is one; or by their kinds, and
/// those that are not the first of theirs with a number.
pub(super) fn names(disks: &[&DiskTier]) -> Vec<String> {
    let told = |name: &str| disks.iter().any(|disk| disk.name.as_deref() == Some(name));
    let mut names: Vec<String> = Vec::new();
    for disk in disks {
        let kind = disk.place.kind();
        let mut by_kind = std::iter::once(kind.to_owned()).chain((2..).map(|n| format!("{kind}{n}")));
        names.push(match &disk.name {
            Some(name) => name.clone(),
            None if disks.len() == 1 => "disk".into(),
            None => by_kind.find(|name| !told(name) && !names.contains(name)).expect("numbers do not end"),
        });
    }
    names
}

/// Which of them has that name. None: the only one, which may be called `disk` too.
pub(crate) fn which(names: &[String], name: Option<&str>) -> Result<usize> {
    let bad = |why: String| Err(Error::InvalidConfig(why));
    match (names, name) {
        ([], _) => bad("there is no tier below memory".into()),
        ([_], None | Some("disk")) => Ok(0),
        (_, None) => bad(format!("there are several tiers below memory, say which: {}", names.join(", "))),
        (_, Some(name)) => match names.iter().position(|known| known == name) {
            Some(n) => Ok(n),
            None => bad(format!("there is no tier called {name} below memory: there is {}", names.join(", "))),
        },
    }
}

/// The names of those among these tiers, and where the first of them stands.
pub(super) fn named(tiers: &[TierConfig]) -> (Vec<String>, usize) {
    let disks = tiers.iter().filter_map(|tier| match tier {
        TierConfig::Disk(tier) => Some(tier),
        TierConfig::Ram(_) => None,
    });
    let disks: Vec<&DiskTier> = disks.collect();
    (names(&disks), tiers.len() - disks.len())
}

/// These tiers with one more below memory: below all, or before the one that is called so.
pub fn with_tier(tiers: &[TierConfig], below: TierConfig, before: Option<&str>) -> Result<Vec<TierConfig>> {
    let bad = |why: String| Err(Error::InvalidConfig(why));
    if !matches!(below, TierConfig::Disk(_)) {
        return bad("only a tier below memory can be added: file:, block:, nbd: or s3:".into());
    }
    let mut all = if tiers.is_empty() { default_tiers() } else { tiers.to_vec() };
    let (names, first) = named(&all);
    let at = before.map_or(Ok(names.len()), |before| which(&names, Some(before)))?;
    all.insert(first + at, below);
    in_order(&all)?;
    Ok(all)
}

/// These tiers without one below memory, the one that is called so, or the only one.
pub fn without_tier(tiers: &[TierConfig], name: Option<&str>) -> Result<Vec<TierConfig>> {
    let (names, first) = named(tiers);
    let at = which(&names, name)?;
    let mut rest = tiers.to_vec();
    rest.remove(first + at);
    // What a store is not told of is as it was with the tier.
    if rest.is_empty() {
        rest.push(TierConfig::Ram(RamTier::default()));
    }
    Ok(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiers(list: &[&str]) -> Vec<TierConfig> {
        list.iter().map(|t| t.parse().unwrap()).collect()
    }

    fn one(text: &str) -> TierConfig {
        text.parse().unwrap()
    }

    #[test]
    fn a_tier_comes_below_and_goes() {
        let all = with_tier(&[], one("file:/x,size=1G"), None).unwrap();
        assert_eq!(all, tiers(&["ram", "ram,codec=zstd:3,group=64K,idle=10m", "file:/x,size=1G"]));
        assert_eq!(all.iter().map(|t| t.to_string().parse().unwrap()).collect::<Vec<TierConfig>>(), all);
        assert_eq!(without_tier(&all, None).unwrap(), default_tiers());
        assert_eq!(without_tier(&tiers(&["file:/x,size=1G"]), Some("disk")).unwrap(), tiers(&["ram"]));
        assert!(with_tier(&all, one("file:/x,size=1G"), None).unwrap_err().to_string().contains("at /x"));
        assert!(with_tier(&[], tiers(&["ram"]).remove(0), None).is_err());
        assert!(without_tier(&[], None).is_err() && without_tier(&tiers(&["ram"]), None).is_err());
    }

    #[test]
    fn several_stand_in_their_order_and_have_names() {
        let two = tiers(&["ram", "file:/x,size=1G", "nbd:nbd://host/x"]);
        let before = with_tier(&two, one("block:/dev/y"), Some("nbd")).unwrap();
        assert_eq!(before, tiers(&["ram", "file:/x,size=1G", "block:/dev/y", "nbd:nbd://host/x"]));
        assert_eq!(named(&before), (["file", "block", "nbd"].map(String::from).to_vec(), 1));
        let four = with_tier(&before, one("file:/z,size=1G,name=last"), None).unwrap();
        assert_eq!(named(&four).0[3], "last");
        assert_eq!(without_tier(&four, Some("file")).unwrap().len(), 4);
        assert!(with_tier(&four, one("block:/dev/z"), None).unwrap_err().to_string().contains("there may be 4"));
        let kinds = tiers(&["file:/a,size=1G", "file:/b,size=1G,name=file", "file:/c,size=1G"]);
        assert_eq!(named(&kinds).0, ["file2", "file", "file3"], "what is told comes first");
        for (name, of) in [(None, &two), (Some("disk"), &two), (Some("s3"), &two)] {
            let why = without_tier(of, name).unwrap_err().to_string();
            assert!(why.contains("file, nbd") && !why.contains('\n'), "{why}");
        }
        for bad in [
            &["file:/x,size=1G", "ram"][..],
            &["file:/x,size=1G", "block:/x"],
            &["nbd:nbd://host/x", "nbd:nbd://host/x,timeout=5s"],
            &["s3:pages/b,endpoint=http://h", "s3:pages/b,endpoint=http://h,size=1G"],
            &["file:/x,size=1G,name=a", "block:/y,name=a"],
        ] {
            let why = in_order(&tiers(bad)).unwrap_err().to_string();
            assert!(!why.contains('\n'), "{why}");
        }
        assert!(in_order(&tiers(&["s3:pages/b,endpoint=http://h", "s3:pages/b,endpoint=http://i"])).is_ok());
        for bad in ["name=ram", "name=", "name=A", "name=a b", "name=0123456789abcdefg"] {
            assert!(format!("block:/x,{bad}").parse::<TierConfig>().is_err(), "{bad}");
        }
    }
}
