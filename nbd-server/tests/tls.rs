//! TLS with real certificates and real clients: what gets through, and what does not.
//!
//! Needs the Debian packages libnbd-bin, python3-libnbd, qemu-utils and openssl.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

mod common;

use common::{run, write_image, Raw, Server};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const ERR_UNSUP: u32 = 1 << 31 | 1;
const ERR_POLICY: u32 = 1 << 31 | 2;
const ERR_INVALID: u32 = 1 << 31 | 3;
const ERR_TLS_REQD: u32 = 1 << 31 | 5;
const STARTTLS: u32 = 5;
const GO_A: &[u8] = b"\0\0\0\x01a\0\0";

/// An authority, a server and clients, each in a directory as libnbd, QEMU and nbdkit want it.
struct Certificates(PathBuf);

impl Certificates {
    fn make(name: &str, clients: &[&str]) -> Certificates {
        let directory = std::env::temp_dir().join(format!("ghostswap-certificates-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let made = Certificates(directory);
        made.authority("ca");
        made.sign("ca", "server", "localhost", "subjectAltName=DNS:localhost,IP:127.0.0.1");
        for client in clients {
            made.sign("ca", client, client, &format!("subjectAltName=DNS:{client}.example"));
        }
        made
    }

    fn openssl(&self, arguments: &str) {
        run(Command::new("openssl").args(arguments.split(' ')).current_dir(&self.0));
    }

    fn authority(&self, name: &str) {
        self.openssl(&format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name} \
             -addext basicConstraints=critical,CA:TRUE -keyout {name}-key.pem -out {name}.pem"
        ));
    }

    /// `who`-key.pem and `who`.pem, and a directory `who`/ for clients.
    fn sign(&self, authority: &str, who: &str, common_name: &str, names: &str) {
        self.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN={common_name} \
             -keyout {who}-key.pem -out {who}.csr"
        ));
        std::fs::write(self.0.join("extensions"), names).unwrap();
        self.openssl(&format!(
            "x509 -req -in {who}.csr -CA {authority}.pem -CAkey {authority}-key.pem -CAcreateserial -days 2 \
             -extfile extensions -out {who}.pem"
        ));
        let own = self.0.join(who);
        std::fs::create_dir_all(&own).unwrap();
        std::fs::copy(self.0.join("ca.pem"), own.join("ca-cert.pem")).unwrap();
        let role = if who == "server" { "server" } else { "client" };
        std::fs::copy(self.0.join(format!("{who}.pem")), own.join(format!("{role}-cert.pem"))).unwrap();
        std::fs::copy(self.0.join(format!("{who}-key.pem")), own.join(format!("{role}-key.pem"))).unwrap();
    }

    /// A directory with the authority only, for a client without a certificate.
    fn nobody(&self) -> PathBuf {
        let own = self.0.join("nobody");
        std::fs::create_dir_all(&own).unwrap();
        std::fs::copy(self.0.join("ca.pem"), own.join("ca-cert.pem")).unwrap();
        own
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// The arguments that give the server its certificate.
    fn server(&self, more: &[&str]) -> Vec<String> {
        let own = ["--tls-cert", &self.path("server.pem"), "--tls-key", &self.path("server-key.pem")];
        own.iter().chain(more).map(|text| text.to_string()).collect()
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn start(name: &str, arguments: &[String]) -> Server {
    Server::start(name, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

fn secure_uri(server: &Server, export: &str, directory: &Path) -> String {
    let (socket, directory) = (server.socket(), directory.display());
    format!(
        "nbds+unix://localhost/{export}?socket={}&tls-certificates={directory}&tls-hostname=localhost",
        socket.display()
    )
}

fn size_of(uri: &str) -> Output {
    Command::new("nbdinfo").args(["--size", uri]).output().unwrap()
}

#[test]
fn nbdcopy_and_nbdinfo_go_through_tls() {
    let certificates = Certificates::make("copy", &[]);
    let server = start("tls-copy", &certificates.server(&["--export", "a,size=24M"]));
    let uri = secure_uri(&server, "a", &certificates.nobody());
    let (there, back) = (server.directory.join("there"), server.directory.join("back"));
    let image = write_image(&there, 24 << 20);
    run(Command::new("nbdcopy").arg(&there).arg(&uri));
    run(Command::new("nbdcopy").arg(&uri).arg(&back));
    assert!(std::fs::read(&back).unwrap() == image, "nbdcopy read back something else");
    run(Command::new("nbdcopy").args(["--connections=1", "--request-size=33554432"]).arg(&uri).arg(&back));
    assert!(std::fs::read(&back).unwrap() == image, "big requests read back something else");
    let text = run(Command::new("nbdinfo").arg(&uri));
    assert!(text.contains("protocol: newstyle-fixed with TLS, using structured packets"), "{text}");
    assert!(text.contains("export-size: 25165824"), "{text}");
    // Plain, it is refused.
    let refused = size_of(&server.uri("a"));
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && why.to_lowercase().contains("tls"), "{why}");
    server.end();
}

#[test]
fn qemu_goes_through_tls_with_a_certificate_of_its_own() {
    let certificates = Certificates::make("qemu", &["client"]);
    let ca = certificates.path("ca.pem");
    let server = start("tls-qemu", &certificates.server(&["--export", "a,size=16M", "--tls-client-ca", &ca]));
    let raw = server.directory.join("raw");
    write_image(&raw, 16 << 20);
    let socket = server.socket().display().to_string();
    let image = format!("driver=nbd,server.type=unix,server.path={socket},export=a,tls-creds=t,tls-hostname=localhost");
    let credentials = |who: &str| format!("tls-creds-x509,id=t,endpoint=client,dir={}", certificates.path(who));
    run(Command::new("qemu-img")
        .args(["convert", "-n", "--object", &credentials("client"), "-f", "raw", "--target-image-opts"])
        .arg(&raw)
        .arg(&image));
    run(Command::new("qemu-img")
        .args(["compare", "--object", &credentials("client"), "--image-opts"])
        .arg(format!("driver=raw,file.driver=file,file.filename={}", raw.display()))
        .arg(&image));
    certificates.nobody();
    let refused = Command::new("qemu-img")
        .args(["info", "--object", &credentials("nobody"), "--image-opts", &image])
        .output()
        .unwrap();
    assert!(!refused.status.success());
    server.end();
}

#[test]
fn certificates_say_who_may_go_where() {
    let certificates = Certificates::make("who", &["alice", "bob"]);
    certificates.authority("other");
    certificates.sign("other", "mallory", "alice", "subjectAltName=DNS:alice.example");
    let ca = certificates.path("ca.pem");
    let exports = ["--export", "a,size=1M,client=alice", "--export", "b,size=2M,client=alice.example:bob"];
    let more = [&exports[..], &["--export", "all,size=3M", "--tls-client-ca", &ca]].concat();
    let server = start("tls-who", &certificates.server(&more));
    let uri = |who: &str, export: &str| secure_uri(&server, export, &certificates.0.join(who));
    for (who, export, size) in [
        ("alice", "a", Some(1 << 20)),
        ("alice", "b", Some(2 << 20)),
        ("alice", "all", Some(3 << 20)),
        ("bob", "a", None),
        ("bob", "b", Some(2 << 20)),
        ("bob", "all", Some(3 << 20)),
        ("mallory", "a", None),
        ("mallory", "all", None),
    ] {
        let output = size_of(&uri(who, export));
        let told = String::from_utf8_lossy(&output.stdout).trim().parse::<u64>().ok();
        assert_eq!(told, size, "{who} to {export}: {}", String::from_utf8_lossy(&output.stderr));
    }
    certificates.nobody();
    assert!(!size_of(&uri("nobody", "all")).status.success());
    // A list names only what this client may go to.
    let list = run(Command::new("nbdinfo").args(["--list", &uri("bob", "all")]));
    assert!(
        !list.contains("export=\"a\"") && list.contains("export=\"b\"") && list.contains("export=\"all\""),
        "{list}"
    );
    server.end();
}

/// What is answered without TLS, where it must and where it may be used.
#[test]
fn plain_connections_hear_that_tls_is_required() {
    let certificates = Certificates::make("plain", &["alice"]);
    let own = certificates.server(&["--export", "a,size=1M", "--handshake-time", "3"]);
    let server = start("tls-plain", &own);
    let mut client = server.connect();
    client.greet();
    for (option, data) in [(3, &b""[..]), (6, GO_A), (7, GO_A), (8, b""), (9, GO_A), (10, GO_A), (11, b""), (99, b"x")]
    {
        assert_eq!(client.option(option, data), ERR_TLS_REQD, "option {option}");
    }
    assert_eq!(client.option(STARTTLS, b"x"), ERR_INVALID);
    assert_eq!(client.option(2, b""), 1, "ABORT");
    assert!(client.is_hung_up_on());
    let mut client = server.connect();
    client.greet();
    client.send(&[b"IHAVEOPT", &1u32.to_be_bytes(), &1u32.to_be_bytes(), b"a"]);
    assert!(client.is_hung_up_on());
    // Bytes that were sent before TLS began are not taken for what comes in it; garbage is no handshake;
    // and who stays silent in it is not waited for.
    let mut smuggler = server.connect();
    smuggler.greet();
    smuggler.send(&[b"IHAVEOPT", &STARTTLS.to_be_bytes(), &[0; 4], b"IHAVEOPT", &3u32.to_be_bytes(), &[0; 4]]);
    assert_is_refused_in_tls(smuggler);
    for (garbage, then_silent) in [(&b"GET / HTTP/1.1\r\n\r\n"[..], false), (&[0x16, 3, 1, 0x40, 0], true), (b"", true)]
    {
        let mut client = server.connect();
        client.greet();
        assert_eq!(client.option(STARTTLS, b""), 1);
        let began = std::time::Instant::now();
        client.send(&[garbage]);
        assert!(client.is_hung_up_on());
        assert!(then_silent || began.elapsed().as_secs() < 3, "{garbage:?}");
    }
    server.end();

    let ca = certificates.path("ca.pem");
    let exports = ["--export", "all,size=1M", "--export", "a,size=1M,client=alice"];
    let more = [&exports[..], &["--tls", "on", "--tls-client-ca", &ca]].concat();
    let server = start("tls-offered", &certificates.server(&more));
    let mut client = server.connect();
    client.greet();
    assert_eq!(client.option(7, GO_A), ERR_TLS_REQD);
    assert_eq!(client.option(6, b"\0\0\0\x03all\0\0"), 1);
    assert_eq!(String::from_utf8_lossy(&size_of(&server.uri("all")).stdout).trim(), "1048576");
    assert!(size_of(&secure_uri(&server, "a", &certificates.0.join("alice"))).status.success());
    server.end();

    let server = start("tls-off", &["--export".into(), "a,size=1M".into()]);
    let mut client = server.connect();
    client.greet();
    assert_eq!(client.option(STARTTLS, b""), ERR_UNSUP);
    assert_eq!(client.option(7, b"\0\0\0\x01b\0\0"), 1 << 31 | 6);
    assert_ne!(client.option(7, GO_A), ERR_POLICY);
    server.end();
}

/// No reply to an option of before may come out of it, in TLS or plain.
fn assert_is_refused_in_tls(mut client: Raw) {
    assert_eq!(client.take(20)[12..16], 1u32.to_be_bytes());
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut client.0, &mut rest);
    assert!(!rest.starts_with(&0x0003_e889_0455_65a9u64.to_be_bytes()), "{rest:?}");
    assert!(rest.len() < 64, "{rest:?}");
}

#[test]
fn bad_certificates_and_usage_end_with_one_line() {
    let certificates = Certificates::make("usage", &[]);
    std::fs::write(certificates.0.join("empty.pem"), "").unwrap();
    let (cert, key) = (certificates.path("server.pem"), certificates.path("server-key.pem"));
    let (ca, empty, none) =
        (certificates.path("ca.pem"), certificates.path("empty.pem"), certificates.path("none.pem"));
    let directory = certificates.path("server");
    for (arguments, code) in [
        (&["--tls-cert", &cert][..], 2),
        (&["--tls-key", &key], 2),
        (&["--tls-client-ca", &ca], 2),
        (&["--tls", "require"], 2),
        (&["--tls", "perhaps"], 2),
        (&["--tls-verify-peer"], 2),
        (&["--export", "b,client=alice"], 2),
        (&["--tls-cert", &cert, "--tls-key", &key, "--export", "b,client=alice"], 2),
        (&["--tls-certificates", &directory, "--tls-cert", &cert, "--tls-key", &key], 2),
        (&["--tls-cert", &none, "--tls-key", &key], 1),
        (&["--tls-cert", &empty, "--tls-key", &key], 1),
        (&["--tls-cert", &cert, "--tls-key", &cert], 1),
        (&["--tls-cert", &ca, "--tls-key", &key], 1),
        (&["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &key], 1),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_ghostswap-nbd"))
            .args(["--unix", &certificates.path("s"), "--export", "a,size=1M"])
            .args(arguments)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert_eq!(text.trim().lines().count(), 1, "{arguments:?}: {text}");
    }
    // The directory of nbdkit and QEMU, clients checked.
    let more = ["--export", "a,size=1M", "--tls-certificates", &directory, "--tls-verify-peer"].map(str::to_owned);
    let server = start("tls-directory", &more);
    certificates.sign("ca", "carol", "carol", "subjectAltName=DNS:carol.example");
    assert!(size_of(&secure_uri(&server, "a", &certificates.0.join("carol"))).status.success());
    assert!(!size_of(&secure_uri(&server, "a", &certificates.nobody())).status.success());
    server.end();
}

#[test]
fn reads_overtake_writes_that_wait_for_room_in_tls_too() {
    run_in_tls("room", "ram,limit=24M,codec=lz4");
}

#[test]
fn large_requests_are_shared_in_tls_too() {
    run_in_tls("large", "ram,limit=128M,codec=zstd:1");
}

/// Has nbdsh run that script on an export of 64 MiB of a store with that tier.
fn run_in_tls(name: &str, tier: &str) {
    let certificates = Certificates::make(name, &[]);
    let server = start(&format!("tls-{name}"), &certificates.server(&["--export", "a,size=64M", "--tier", tier]));
    let script = format!("{}/tests/nbdsh/{name}.py", env!("CARGO_MANIFEST_DIR"));
    run(Command::new("nbdsh")
        .args(["-n", "-c", &std::fs::read_to_string(script).unwrap()])
        .env("URI", secure_uri(&server, "a", &certificates.nobody()))
        .env("PATH", "/usr/bin:/bin"));
    server.end();
}
