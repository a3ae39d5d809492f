//! A real S3 server (s3s-fs) on a directory, in a process of its own, which can be stopped, killed and started anew; what
//! it was given outlives it. The process is this test's program once more, told so by its environment.
//!
//! Where a file with such a name lies beside the directory, it answers otherwise: `fail-PUT` (or another method) has a
//! status in it, `delay-PUT` milliseconds. With `as-ceph` it does what Ceph's gateway (16.2) does: to If-Match it compares
//! an object's tag as it keeps it, without quotes; and it sends heads by themselves, with Nagle's algorithm on.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{ETAG, IF_MATCH};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::service::{S3Service, S3ServiceBuilder};
use std::future::Future;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::task::{ready, Context, Poll};
use std::time::{Duration, Instant};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{crypto, ServerConfig};
use tokio_rustls::TlsAcceptor;

const KEY: &str = "ghost";
const SECRET: &str = "swap/secret+1";
const BUCKET: &str = "pages";
/// The directory in which it is to work, and its port.
const CALL: &str = "GHOSTSWAP_TEST_S3_SERVER";

pub struct Server {
    dir: PathBuf,
    port: u16,
    child: Option<Child>,
}

impl Server {
    /// With a bucket. If there are `server-cert.pem` and `server-key.pem` in the directory it speaks TLS.
    pub fn start(dir: &Path) -> Server {
        std::fs::create_dir_all(dir.join("data").join(BUCKET)).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut server = Server { dir: dir.into(), port, child: None };
        server.keys("credentials", KEY, SECRET);
        server.start_again();
        server
    }

    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "the_server", "--nocapture"])
            .env(CALL, format!("{} {}", self.dir.display(), self.port));
        // It ends when this end of its standard input does.
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.child = Some(child.unwrap());
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(20), "the server does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn signal(&self, signal: &str) {
        let pid = self.child.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        let begun = Instant::now();
        while signal == "STOP" && self.states().chars().any(|state| state != 'T') {
            assert!(begun.elapsed() < Duration::from_secs(20), "it does not stop: {}", self.states());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A letter for each of its threads, as in /proc/PID/stat.
    fn states(&self) -> String {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.as_ref().unwrap().id())).unwrap();
        let stats = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).ok());
        stats.filter_map(|stat| stat.rsplit(") ").next().and_then(|rest| rest.chars().next())).collect()
    }

    /// A file with keys.
    pub fn keys(&self, name: &str, key: &str, secret: &str) -> PathBuf {
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.dir.join(name);
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        let text = format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n");
        std::io::Write::write_all(file.as_mut().unwrap(), text.as_bytes()).unwrap();
        path
    }

    /// The right ones.
    pub fn own_keys() -> (&'static str, &'static str) {
        (KEY, SECRET)
    }

    /// The tier, keys aside.
    pub fn tier(&self, prefix: &str, options: &str) -> String {
        format!("s3:{BUCKET}{prefix},endpoint=http://127.0.0.1:{},size=64M,timeout=10s{options}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn bucket(&self) -> PathBuf {
        self.dir.join("data").join(BUCKET)
    }

    /// Files of objects below that, and how many bytes they have.
    pub fn objects(&self, prefix: &str) -> Vec<(PathBuf, u64)> {
        let mut found = Vec::new();
        let mut left = vec![self.bucket().join(prefix)];
        while let Some(dir) = left.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                match entry.metadata() {
                    Ok(meta) if meta.is_dir() => left.push(entry.path()),
                    Ok(meta) => found.push((entry.path(), meta.len())),
                    // It was deleted just now.
                    Err(_) => {}
                }
            }
        }
        let is_extent =
            |path: &Path| path.file_name().is_some_and(|name| name.len() == 8 && !name.to_string_lossy().contains('.'));
        found.retain(|(path, _)| is_extent(path));
        found.sort();
        found
    }

    /// Has it answer so, or anew as it does.
    pub fn fail(&self, method: &str, status: Option<u16>) {
        let path = self.dir.join(format!("fail-{method}"));
        match status {
            Some(status) => std::fs::write(path, status.to_string()).unwrap(),
            None => std::fs::remove_file(path).unwrap(),
        }
    }

    /// Before connections are made: those that there are stay as they were.
    pub fn be_as_ceph(&self) {
        std::fs::write(self.dir.join("as-ceph"), "").unwrap();
    }

    pub fn delay(&self, method: &str, ms: u64) {
        std::fs::write(self.dir.join(format!("delay-{method}")), ms.to_string()).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}

/// What the process does that was called so. Others go on.
pub fn serve_if_called() {
    let Ok(call) = std::env::var(CALL) else { return };
    let (dir, port) = call.rsplit_once(' ').unwrap();
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(serve(PathBuf::from(dir), port.parse().unwrap()));
}

async fn serve(dir: PathBuf, port: u16) {
    let files = s3s_fs::FileSystem::new(dir.join("data")).unwrap();
    let mut builder = S3ServiceBuilder::new(files);
    builder.set_auth(s3s::auth::SimpleAuth::from_single(KEY, SECRET));
    let service = builder.build();
    let tls = dir.join("server-cert.pem").exists().then(|| acceptor(&dir));
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        socket.set_nodelay(!dir.join("as-ceph").exists()).unwrap();
        let (service, dir, tls) = (service.clone(), dir.clone(), tls.clone());
        tokio::spawn(async move {
            let answer = hyper::service::service_fn(move |request| one(service.clone(), dir.clone(), request));
            let http = Builder::new(TokioExecutor::new());
            match tls {
                None => drop(http.serve_connection(TokioIo::new(socket), answer).await),
                Some(tls) => {
                    if let Ok(socket) = tls.accept(socket).await {
                        drop(http.serve_connection(TokioIo::new(socket), answer).await);
                    }
                }
            }
        });
    }
}

async fn one(
    service: S3Service,
    dir: PathBuf,
    request: Request<Incoming>,
) -> Result<Response<s3s::Body>, s3s::HttpError> {
    let told = |what: &str| std::fs::read_to_string(dir.join(format!("{what}-{}", request.method()))).ok();
    if let Some(ms) = told("delay").and_then(|text| text.parse().ok()) {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
    if let Some(status) = told("fail").and_then(|text| text.parse().ok()) {
        // All of it is read before it is answered. A connection that is closed on what was not read is reset, and the
        // reset may overtake the answer: then the client cannot know what became of its request.
        drop(request.into_body().collect().await);
        let body = bytes::Bytes::from_static(b"<Error><Code>Told</Code></Error>");
        let mut answer = Response::new(s3s::Body::from(body));
        *answer.status_mut() = StatusCode::from_u16(status).unwrap();
        return Ok(answer);
    }
    if dir.join("as-ceph").exists() {
        return one_as_ceph(service, &dir.join("data"), request).await;
    }
    hyper::service::Service::call(&service, request).await
}

/// What was got last, and its tag without quotes.
static TAG: Mutex<(String, String)> = Mutex::new((String::new(), String::new()));

async fn one_as_ceph(
    service: S3Service,
    data: &Path,
    request: Request<Incoming>,
) -> Result<Response<s3s::Body>, s3s::HttpError> {
    let (path, method) = (request.uri().path().to_owned(), request.method().clone());
    if let Some(tag) = request.headers().get(IF_MATCH).filter(|_| method == Method::PUT) {
        let same = *TAG.lock().unwrap() == (path.clone(), tag.to_str().unwrap().to_owned());
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let mut answer = Response::new(s3s::Body::empty());
        if same {
            std::fs::write(data.join(&path[1..]), body).unwrap();
            answer.headers_mut().insert(ETAG, "\"new\"".parse().unwrap());
        } else {
            *answer.status_mut() = StatusCode::PRECONDITION_FAILED;
        }
        return Ok(answer);
    }
    let answer = hyper::service::Service::call(&service, request).await?;
    if let Some(tag) = answer.headers().get(ETAG).filter(|_| method == Method::GET) {
        *TAG.lock().unwrap() = (path, tag.to_str().unwrap().trim_matches('"').to_owned());
    }
    let pause = Box::pin(tokio::time::sleep(Duration::from_millis(1)));
    Ok(answer.map(|body| s3s::Body::http_body_unsync(Later { pause, body })))
}

/// A body that comes when its head has been sent.
struct Later {
    pause: Pin<Box<tokio::time::Sleep>>,
    body: s3s::Body,
}

impl Body for Later {
    type Data = Bytes;
    type Error = s3s::StdError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, s3s::StdError>>> {
        ready!(self.pause.as_mut().poll(cx));
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn acceptor(dir: &Path) -> TlsAcceptor {
    let chain = CertificateDer::pem_file_iter(dir.join("server-cert.pem")).unwrap().collect::<Result<_, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_file(dir.join("server-key.pem")).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}
