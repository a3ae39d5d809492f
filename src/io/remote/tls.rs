//! Whom to believe, and what to show: read from files once, when the store is opened.

use crate::config::NbdTls;
use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::path::Path;
use std::sync::Arc;

/// Err: one line that says what is wrong.
pub(super) fn load(tls: &NbdTls) -> Result<(Arc<ClientConfig>, ServerName<'static>), String> {
    let name = ServerName::try_from(tls.server_name.clone())
        .map_err(|_| format!("'{}' is no name that a certificate could have", tls.server_name))?;
    let mut roots = RootCertStore::empty();
    if let Some(path) = &tls.ca {
        for certificate in certificates(path)? {
            roots.add(certificate).map_err(|e| format!("{}: {e}", path.display()))?;
        }
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots);
    let config = match (&tls.cert, &tls.key) {
        (Some(cert), Some(key)) => {
            let chain = certificates(cert)?;
            let key_in = PrivateKeyDer::from_pem_file(key).map_err(|e| unreadable(key, "private key", &e))?;
            builder.with_client_auth_cert(chain, key_in).map_err(|e| format!("{}: {e}", cert.display()))?
        }
        _ => builder.with_no_client_auth(),
    };
    Ok((Arc::new(config), name))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(all) if all.is_empty() => Err(unreadable(path, "certificate", &pem::Error::NoItemsFound)),
        Ok(all) => Ok(all),
        Err(e) => Err(unreadable(path, "certificate", &e)),
    }
}

fn unreadable(path: &Path, what: &str, error: &pem::Error) -> String {
    match error {
        pem::Error::Io(e) => format!("{}: {e}", path.display()),
        pem::Error::NoItemsFound => format!("{}: no {what} in it", path.display()),
        _ => format!("{}: not a {what} in PEM", path.display()),
    }
}
