//! The keys to a server: from the environment, or from a file as Amazon's programs have it, which nobody else may read.
//! They are told to nobody.
//!
//! ```text
//! [default]
//! aws_access_key_id = …
//! aws_secret_access_key = …
//! aws_session_token = …          (if there is one)
//! ```
//! The file is read again before each attempt to reach a server that refused them: keys that end are followed by others.

use crate::config::S3Place;
use async_trait::async_trait;
use object_store::aws::AwsCredential;
use object_store::CredentialProvider;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

/// Those in use.
pub(super) struct Keys {
    file: Option<(PathBuf, String)>,
    now: RwLock<Arc<AwsCredential>>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys")
    }
}

impl Keys {
    /// Err: one line that says what is wrong.
    pub fn new(place: &S3Place) -> Result<Keys, String> {
        let profile = place.profile.clone().unwrap_or_else(|| "default".into());
        let file = place.credentials.clone().map(|path| (path, profile));
        let now = match &file {
            Some((path, profile)) => read(path, profile)?,
            None => from_environment(|name| std::env::var(name).ok())?,
        };
        Ok(Keys { file, now: RwLock::new(Arc::new(now)) })
    }

    /// Reads the file again. One that is no good now leaves all as it was.
    pub fn renew(&self) {
        let Some((path, profile)) = &self.file else { return };
        if let Ok(keys) = read(path, profile) {
            *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(keys);
        }
    }
}

#[async_trait]
impl CredentialProvider for Keys {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        Ok(self.now.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

fn from_environment(get: impl Fn(&str) -> Option<String>) -> Result<AwsCredential, String> {
    let get = |name| get(name).filter(|value| !value.is_empty());
    match (get("AWS_ACCESS_KEY_ID"), get("AWS_SECRET_ACCESS_KEY")) {
        (Some(key_id), Some(secret_key)) => {
            checked(AwsCredential { key_id, secret_key, token: get("AWS_SESSION_TOKEN") }, "the environment")
        }
        _ => Err("no keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give credentials=FILE".into()),
    }
}

fn read(path: &Path, profile: &str) -> Result<AwsCredential, String> {
    let shown = path.display();
    let bad = |e: std::io::Error| format!("{shown}: {e}");
    let file = std::fs::File::open(path).map_err(bad)?;
    let mode = file.metadata().map_err(bad)?.mode();
    if mode & 0o077 != 0 {
        return Err(format!("{shown}: others may read it (mode {:03o}): chmod 600", mode & 0o777));
    }
    parse(&std::io::read_to_string(file).map_err(bad)?, profile, &shown.to_string())
}

fn parse(text: &str, profile: &str, shown: &str) -> Result<AwsCredential, String> {
    let (mut here, mut found) = (false, [None, None, None]);
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        if let Some(section) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            here = section.trim() == profile;
        } else if let (true, Some((key, value))) = (here, line.split_once('=')) {
            let place = match key.trim() {
                "aws_access_key_id" => 0,
                "aws_secret_access_key" => 1,
                "aws_session_token" => 2,
                _ => continue,
            };
            found[place] = Some(value.trim().to_owned()).filter(|value| !value.is_empty());
        }
    }
    let [Some(key_id), Some(secret_key), token] = found else {
        return Err(format!("{shown}: no aws_access_key_id and aws_secret_access_key under [{profile}]"));
    };
    checked(AwsCredential { key_id, secret_key, token }, shown)
}

/// They go into a header.
fn checked(keys: AwsCredential, shown: &str) -> Result<AwsCredential, String> {
    let good = |text: &String| text.chars().all(|c| c.is_ascii_graphic());
    if good(&keys.key_id) && good(&keys.secret_key) && keys.token.as_ref().is_none_or(good) {
        Ok(keys)
    } else {
        Err(format!("{shown}: keys with characters that none have"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_where_others_have_them_and_not_told() {
        let text = "# mine\n[other]\naws_access_key_id=no\n[default]\naws_access_key_id = AKIA\n\
                    ; old\naws_secret_access_key=s3cr/et=\nregion=x\n\n[third]\naws_access_key_id=no\n";
        let keys = parse(text, "default", "f").unwrap();
        assert_eq!((keys.key_id.as_str(), keys.secret_key.as_str(), keys.token), ("AKIA", "s3cr/et=", None));
        for (text, profile) in [(text, "other"), (text, "none"), ("", "default"), ("aws_access_key_id=a", "default")] {
            let why = parse(text, profile, "f").unwrap_err();
            assert!(!why.contains('\n') && !why.contains("s3cr") && !why.contains("AKIA"), "{why}");
        }
        let sly = "[default]\naws_access_key_id=a\u{1}b\naws_secret_access_key=c\n";
        assert!(parse(sly, "default", "f").is_err());
        assert!(from_environment(|_| None).unwrap_err().contains("AWS_ACCESS_KEY_ID"));
        assert!(from_environment(|_| Some(String::new())).is_err());
        let all = from_environment(|name| Some(name.to_lowercase())).unwrap();
        assert_eq!(all.token.as_deref(), Some("aws_session_token"));
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("ghostswap-keys-{}", std::process::id()));
        std::fs::write(&path, "[default]\naws_access_key_id=a\naws_secret_access_key=b\n").unwrap();
        for (mode, good) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(read(&path, "default").is_ok(), good, "{mode:o}");
        }
        std::fs::remove_file(path).unwrap();
    }
}
