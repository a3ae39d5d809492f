//! HTTP/1.1 to one server, for `object_store` to speak S3 over: a connection for each request that is under way, kept
//! for the next one.
//!
//! Its own client brings the whole of reqwest, HTTP/2, a second crypto library and another list of authorities; this is
//! what of all that a tier needs. A request that is given up takes its connection with it, and what of it was not sent is
//! not sent any more. What became of a request is noted beside it ([`SEEN`]), since `object_store` tells of that in
//! words only.

use crate::config::S3Place;
use async_trait::async_trait;
use http_body_util::{BodyExt, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{HeaderValue, HOST};
use hyper_util::rt::TokioIo;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse, HttpService,
};
use object_store::ClientOptions;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use socket2::{SockRef, TcpKeepalive};
use std::cell::RefCell;
use std::fmt;
use std::io::{Error as OsError, ErrorKind, IoSlice, Result as OsResult};
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

/// To connect, TLS included.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// Names of services stand for others every few minutes.
const ADDRESSES_FOR: Duration = Duration::from_secs(60);
/// No answer is longer: the largest is a list of a thousand keys.
const MOST_BODY: usize = 8 << 20;
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TRIES: u32 = 3;

/// What became of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nothing of it left this machine.
    #[default]
    Nothing,
    /// The server could not be reached, or is not who it should be (`InvalidData`).
    Unreached(ErrorKind, String),
    /// It was sent, in part at least, and not answered.
    Broken(String),
    /// The server's own word for what it says: HTTP's number, S3's code.
    Answered(u16, String),
}

tokio::task_local! {
    /// Of the request that this task makes.
    pub(super) static SEEN: RefCell<Seen>;
}

fn note(seen: Seen) {
    // Somebody else's requests have no such place.
    let _ = SEEN.try_with(|place| place.replace(seen));
}

/// The way to the server, and connections that nobody uses at this moment.
#[derive(Clone)]
pub(super) struct Http(Arc<Inner>);

struct Inner {
    host: String,
    port: u16,
    /// As the request is to name the server.
    authority: HeaderValue,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    timeout: Duration,
    most_idle: usize,
    idle: Mutex<Vec<Connection>>,
    addresses: Mutex<(Vec<SocketAddr>, Option<Instant>)>,
}

struct Connection {
    sender: SendRequest<HttpRequestBody>,
    driver: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Http({})", self.0.host)
    }
}

impl Http {
    /// Reads certificates, and looks nothing up. Err: one line that says what is wrong.
    pub fn new(place: &S3Place, endpoint: &str) -> Result<Http, String> {
        let not_one = || format!("{endpoint} is no URL");
        let url: hyper::Uri = endpoint.parse().map_err(|_| not_one())?;
        let authority = url.authority().ok_or_else(not_one)?;
        let secure = url.scheme_str() == Some("https");
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = authority.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let tls = secure.then(|| tls_to(&host, place.ca.as_deref())).transpose()?;
        // The port is not named where it is the one that is meant anyway: so it is signed.
        let named = match authority.port_u16() {
            Some(port) if port != if secure { 443 } else { 80 } => format!("{}:{port}", authority.host()),
            _ => authority.host().to_owned(),
        };
        Ok(Http(Arc::new(Inner {
            authority: HeaderValue::from_str(&named.to_ascii_lowercase()).map_err(|_| not_one())?,
            host,
            port,
            tls,
            timeout: Duration::from_secs(place.timeout_s.into()),
            most_idle: usize::from(place.connections),
            idle: Mutex::new(Vec::new()),
            addresses: Mutex::new((Vec::new(), None)),
        })))
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that was used before and still stands, as far as can be told.
    async fn kept(&self) -> Option<Connection> {
        loop {
            let mut connection = self.idle().pop()?;
            if !connection.sender.is_closed() && connection.sender.ready().await.is_ok() {
                return Some(connection);
            }
        }
    }

    async fn connect(&self) -> Result<Connection, OsError> {
        let mut last = OsError::from(ErrorKind::AddrNotAvailable);
        for address in self.addresses().await? {
            let stream = match TcpStream::connect(address).await {
                Ok(stream) => stream,
                Err(e) => {
                    last = e;
                    continue;
                }
            };
            tune(&stream, self.0.timeout)?;
            let stream = Prompt(stream);
            let Some((tls, name)) = &self.0.tls else { return begin(TokioIo::new(stream)).await };
            match tls.connect(name.clone(), stream).await {
                Ok(stream) => return begin(TokioIo::new(stream)).await,
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    /// What the host's name stands for: what it stood for a while ago, if that is not to be had.
    async fn addresses(&self) -> Result<Vec<SocketAddr>, OsError> {
        let known = || self.0.addresses.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (before, when) = known();
        if when.is_some_and(|when| when.elapsed() < ADDRESSES_FOR) {
            return Ok(before);
        }
        let found = match self.0.host.parse::<std::net::IpAddr>() {
            Ok(ip) => Ok(vec![SocketAddr::new(ip, self.0.port)]),
            Err(_) => tokio::net::lookup_host((self.0.host.as_str(), self.0.port)).await.map(Iterator::collect),
        };
        match found {
            Ok(found) if !found.is_empty() => {
                let mut place = self.0.addresses.lock().unwrap_or_else(PoisonError::into_inner);
                *place = (found.clone(), Some(Instant::now()));
                Ok(found)
            }
            Err(e) if before.is_empty() => Err(e),
            _ => Ok(before),
        }
    }
}

/// What is not on its way when a connection is given up is not to be sent any more; and a peer that is gone is noticed.
fn tune(stream: &TcpStream, timeout: Duration) -> Result<(), OsError> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_TRIES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(timeout))?;
    socket.set_linger(Some(Duration::ZERO))
}

/// A socket that acknowledges what came when it is read, not 40 ms later. A server that sends an answer's head by itself,
/// and leaves Nagle's algorithm on (Ceph's gateway, unless told `tcp_nodelay=1`), holds the body back until then.
struct Prompt(TcpStream);

impl AsyncRead for Prompt {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<OsResult<()>> {
        let read = Pin::new(&mut self.0).poll_read(cx, buf);
        if let Poll::Ready(Ok(())) = read {
            // The kernel forgets it with what is sent next. A socket that cannot is slower, and no worse.
            let _ = self.0.set_quickack(true);
        }
        read
    }
}

impl AsyncWrite for Prompt {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<OsResult<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<OsResult<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<OsResult<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<OsResult<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}

async fn begin<T>(io: TokioIo<T>) -> Result<Connection, OsError>
where
    TokioIo<T>: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
{
    let (sender, connection) = http1::handshake(io).await.map_err(OsError::other)?;
    // What goes wrong with it, its request is told.
    let driver = tokio::spawn(async move { drop(connection.await) });
    Ok(Connection { sender, driver })
}

#[async_trait]
impl HttpService for Http {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let mut connection = match self.kept().await {
            Some(kept) => kept,
            None => {
                let connected = tokio::time::timeout(CONNECT_TIME.min(self.0.timeout), self.connect()).await;
                match connected.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into())) {
                    Ok(connection) => connection,
                    Err(e) => {
                        note(Seen::Unreached(e.kind(), e.to_string()));
                        return Err(HttpError::new(HttpErrorKind::Connect, e));
                    }
                }
            }
        };
        let (mut parts, body) = request.into_parts();
        parts.headers.insert(HOST, self.0.authority.clone());
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        parts.uri = path.parse().map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))?;
        // Whatever happens to this task from here on: it may have been sent.
        note(Seen::Broken("no answer from the server".into()));
        let sent = connection.sender.try_send_request(hyper::Request::from_parts(parts, body)).await;
        let answer = sent.map_err(|mut e| {
            let unsent = e.take_message().is_some();
            // Others were opened when this one was, and the server has closed them too, likely.
            self.idle().clear();
            let e = e.into_error();
            let why = if e.is_closed() || e.is_incomplete_message() || e.is_canceled() {
                "the server hung up".to_owned()
            } else if e.is_parse() {
                "its answer is not HTTP: is it http:// or https://?".to_owned()
            } else {
                in_a_line(&e)
            };
            note(if unsent { Seen::Unreached(ErrorKind::ConnectionReset, why) } else { Seen::Broken(why) });
            HttpError::new(HttpErrorKind::Interrupted, e)
        })?;
        let (parts, body) = answer.into_parts();
        let body = Limited::new(body, MOST_BODY).collect().await.map_err(|e| {
            note(Seen::Broken(format!("its answer broke off: {e}")));
            HttpError::new(HttpErrorKind::Interrupted, OsError::other(e.to_string()))
        })?;
        let body: Bytes = body.to_bytes();
        note(Seen::Answered(
            parts.status.as_u16(),
            if parts.status.is_success() { String::new() } else { code(&body) },
        ));
        {
            let mut idle = self.idle();
            if idle.len() < self.0.most_idle && !connection.sender.is_closed() {
                idle.push(connection);
            }
        }
        Ok(HttpResponse::from_parts(parts, body.into()))
    }
}

impl HttpConnector for Http {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

/// S3's code in an answer that is an error. Nothing else of it is told anywhere: it may name keys.
fn code(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(4096)]);
    let code = text.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>")).map_or("", |(code, _)| code);
    code.chars().filter(char::is_ascii_alphanumeric).take(64).collect()
}

/// An error and what it is made of, in a line.
pub(super) fn in_a_line(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut below = e.source();
    while let Some(e) = below {
        let more = e.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        below = e.source();
    }
    text.replace(['\n', '\r'], " ")
}

fn tls_to(host: &str, ca: Option<&Path>) -> Result<(TlsConnector, ServerName<'static>), String> {
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| format!("'{host}' is no name that a certificate could have"))?;
    let mut roots = RootCertStore::empty();
    match ca {
        Some(path) => {
            let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
            for certificate in read.map_err(|e| format!("{}: {e}", path.display()))? {
                roots.add(certificate).map_err(|e| format!("{}: {e}", path.display()))?;
            }
        }
        None => {
            // Those that rustls cannot take are not believed.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        let where_from = ca.map_or_else(|| "the system's".to_owned(), |path| format!("{}:", path.display()));
        return Err(format!("{where_from} no certificate in it: give ca=FILE, or install ca-certificates"));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok((TlsConnector::from(Arc::new(config)), name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_an_error_only_the_code_is_told() {
        let body = b"<?xml?><Error><Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>AKIA</AWSAccessKeyId></Error>";
        assert_eq!(code(body), "SignatureDoesNotMatch");
        assert_eq!(code(b"<Code>a\nb<script></Code>"), "abscript");
        assert_eq!(code(b"\xff<Code>"), "");
    }
}
