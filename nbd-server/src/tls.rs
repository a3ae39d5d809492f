//! TLS: what the server shows, which clients it believes, and what their certificates call them.
//!
//! Who signs a client's certificate may name any client, so the authority in `--tls-client-ca` is to sign
//! for nothing else. Names are compared as they are: no wildcards. No revocation lists, no keys agreed on
//! beforehand (PSK), which rustls does not have.

use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Whether connections are encrypted.
#[derive(Clone, Default)]
pub enum Tls {
    #[default]
    Off,
    /// Those that ask for it.
    Offered(Arc<ServerConfig>),
    /// All: nothing else is talked about before.
    Required(Arc<ServerConfig>),
}

impl Tls {
    pub fn config(&self) -> Option<&Arc<ServerConfig>> {
        match self {
            Tls::Off => None,
            Tls::Offered(config) | Tls::Required(config) => Some(config),
        }
    }
}

/// PEM files.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    pub cert: PathBuf,
    pub key: PathBuf,
    /// With it clients must show a certificate that it signed.
    pub client_ca: Option<PathBuf>,
}

impl TlsFiles {
    pub fn load(&self) -> Result<Arc<ServerConfig>, String> {
        let chain = certificates(&self.cert)?;
        let key =
            PrivateKeyDer::from_pem_file(&self.key).map_err(|error| unreadable(&self.key, "private key", &error))?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(path)? {
                    roots.add(certificate).map_err(|error| format!("{}: {error}", path.display()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
                    .build()
                    .map_err(|error| format!("{}: {error}", path.display()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let config = builder.with_single_cert(chain, key);
        Ok(Arc::new(config.map_err(|error| format!("{}: {error}", self.cert.display()))?))
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(all) if all.is_empty() => Err(unreadable(path, "certificate", &pem::Error::NoItemsFound)),
        Ok(all) => Ok(all),
        Err(error) => Err(unreadable(path, "certificate", &error)),
    }
}

fn unreadable(path: &Path, what: &str, error: &pem::Error) -> String {
    match error {
        pem::Error::Io(error) => format!("{}: {error}", path.display()),
        pem::Error::NoItemsFound => format!("{}: no {what} in it", path.display()),
        _ => format!("{}: not a {what} in PEM", path.display()),
    }
}

/// What a client's certificate, already verified, calls it: common name and DNS names. None without one.
pub fn client_names(connection: &ServerConnection) -> Vec<String> {
    connection.peer_certificates().and_then(<[_]>::first).map_or(Vec::new(), |certificate| names_in(certificate))
}

/// What cannot be read names nobody.
pub fn names_in(certificate: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let common = certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok());
    let mut names: Vec<String> = common.map(str::to_owned).collect();
    if let Ok(Some(more)) = certificate.subject_alternative_name() {
        names.extend(more.value.general_names.iter().filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        }));
    }
    names
}
