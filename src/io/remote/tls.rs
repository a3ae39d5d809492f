//! TLS to a server. Whom to believe, and what to show, is read from files once, when the store is opened.
//!
//! Nothing else here names rustls, and nothing but [`Tls::new`] leads there: a program that does not call it is a
//! megabyte smaller, all of which a daemon keeps in memory.

use crate::config::NbdTls;
use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use socket2::Socket;
use std::io::{Error as OsError, ErrorKind, IoSlice, Read, Write};
use std::path::Path;
use std::sync::Arc;

/// What TLS may hold of what is to be sent, and of what has come.
const BUFFER_BYTES: usize = 64 << 10;

/// That a store may speak TLS, to a tier behind an NBD server.
#[derive(Clone, Copy)]
pub struct Tls(fn(&NbdTls) -> Result<Arc<dyn Securer>, String>);

impl Tls {
    /// It may.
    #[allow(clippy::new_without_default, reason = "a choice, not a value")]
    pub fn new() -> Tls {
        Tls(load)
    }

    /// Err: one line that says what is wrong.
    pub(super) fn load(self, tls: &NbdTls) -> Result<Arc<dyn Securer>, String> {
        self.0(tls)
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

/// What makes connections secure.
pub(super) trait Securer: Send + Sync {
    /// From here on what is read and written is the content; its handshake comes first.
    fn secure(&self, socket: Socket) -> std::io::Result<Box<dyn Secured>>;
}

/// A socket that does not block, within TLS. Flushed, it has sent what it had to send as far as the socket takes it.
pub(super) trait Secured: Read + Write + Send {
    fn socket(&self) -> &Socket;
    fn wants_write(&self) -> bool;
    fn is_handshaking(&self) -> bool;
    /// Takes in what has come. `WouldBlock`: nothing.
    fn pull(&mut self) -> std::io::Result<()>;
}

struct Client {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Securer for Client {
    fn secure(&self, socket: Socket) -> std::io::Result<Box<dyn Secured>> {
        let session = ClientConnection::new(self.config.clone(), self.name.clone());
        let mut session = session.map_err(OsError::other)?;
        session.set_buffer_limit(Some(BUFFER_BYTES));
        Ok(Box::new(Session { socket, session }))
    }
}

struct Session {
    socket: Socket,
    session: ClientConnection,
}

impl Secured for Session {
    fn socket(&self) -> &Socket {
        &self.socket
    }

    fn wants_write(&self) -> bool {
        self.session.wants_write()
    }

    fn is_handshaking(&self) -> bool {
        self.session.is_handshaking()
    }

    fn pull(&mut self) -> std::io::Result<()> {
        if self.session.read_tls(&mut self.socket)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.session.process_new_packets().map_err(|e| OsError::new(ErrorKind::InvalidData, e))?;
        self.flush()
    }
}

impl Read for Session {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match self.session.reader().read(into) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.pull()?,
                other => return other,
            }
        }
    }
}

impl Write for Session {
    fn write(&mut self, from: &[u8]) -> std::io::Result<usize> {
        self.write_vectored(&[IoSlice::new(from)])
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> std::io::Result<usize> {
        self.flush()?;
        let n = self.session.writer().write_vectored(from)?;
        self.flush()?;
        match n {
            0 => Err(ErrorKind::WouldBlock.into()),
            n => Ok(n),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut self.socket) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn load(tls: &NbdTls) -> Result<Arc<dyn Securer>, String> {
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
    Ok(Arc::new(Client { config: Arc::new(config), name }))
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
