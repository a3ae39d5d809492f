//! Real clients (nbdinfo, nbdcopy, qemu-io, qemu-img) against the real server, and a rude one.
//!
//! Needs the Debian packages libnbd-bin and qemu-utils.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Server {
    child: Child,
    directory: PathBuf,
}

impl Server {
    fn start(name: &str, arguments: &[&str]) -> Server {
        let directory = std::env::temp_dir().join(format!("ghostswap-nbd-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_ghostswap-nbd"))
            .arg("--unix")
            .arg(directory.join("s"))
            .args(arguments)
            .env("RUST_LOG", "warn")
            .spawn()
            .unwrap();
        let server = Server { child, directory };
        let end = Instant::now() + Duration::from_secs(10);
        while UnixStream::connect(server.socket()).is_err() {
            assert!(Instant::now() < end, "the server does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("s")
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    fn connect(&self) -> Raw {
        let socket = UnixStream::connect(self.socket()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Raw(socket)
    }

    fn signal(&self, signal: &str) {
        run(Command::new("kill").args(["-s", signal, &self.child.id().to_string()]));
    }

    /// Ends it as an administrator would; it must do so in order.
    fn end(mut self) {
        assert!(self.child.try_wait().unwrap().is_none(), "the server died");
        self.signal("TERM");
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
        assert!(!self.socket().exists(), "the socket is left");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn run(command: &mut Command) -> String {
    let output =
        command.output().unwrap_or_else(|error| panic!("{command:?}: {error} (packages libnbd-bin, qemu-utils)"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

fn qemu_io(uri: &str, commands: &[&str]) -> String {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw", uri]);
    commands.iter().for_each(|line| {
        command.args(["-c", line]);
    });
    // qemu-io tells a failed verification only in words.
    let text = run(&mut command);
    assert!(!text.contains("Pattern verification failed") && !text.contains("failed:"), "{text}");
    text
}

/// Text-like, zero and random stretches.
fn write_image(path: &Path, bytes: usize) -> Vec<u8> {
    let mut state = 9u64;
    let mut image = vec![0; bytes];
    for (number, page) in image.chunks_mut(4096).enumerate() {
        for word in page.chunks_mut(8).filter(|_| number % 5 != 0) {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let value = if number % 7 == 0 { state } else { state >> 50 };
            word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
        }
    }
    std::fs::write(path, &image).unwrap();
    image
}

#[test]
fn nbdinfo_sees_the_exports() {
    let server = Server::start("info", &["--export", "big", "--export", "small,size=64M"]);
    assert_eq!(run(Command::new("nbdinfo").args(["--size", &server.uri("big")])).trim(), (16u64 << 40).to_string());
    let text = run(Command::new("nbdinfo").arg(server.uri("small")));
    for expected in [
        "export-size: 67108864",
        "is_rotational: false",
        "can_flush: true",
        "can_fua: true",
        "can_trim: true",
        "can_zero: true",
        "can_multi_conn: true",
        "block_size_minimum: 512",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(text.contains(expected), "no '{expected}' in\n{text}");
    }
    let list = run(Command::new("nbdinfo").args(["--list", &server.uri("")]));
    assert!(list.contains("export=\"big\"") && list.contains("export=\"small\""), "{list}");
    assert!(!Command::new("nbdinfo").arg(server.uri("none")).output().unwrap().status.success());
    server.end();
}

#[test]
fn nbdcopy_brings_back_what_it_took() {
    let server = Server::start("copy", &["--export", "a,size=48M", "--tier", "ram,limit=256M"]);
    let (there, back) = (server.directory.join("there"), server.directory.join("back"));
    let image = write_image(&there, 48 << 20);
    run(Command::new("nbdcopy").arg(&there).arg(server.uri("a")));
    run(Command::new("nbdcopy").arg(server.uri("a")).arg(&back));
    assert!(std::fs::read(&back).unwrap() == image, "nbdcopy read back something else");
    // One big request after the other, over one connection.
    let options = ["--connections=1", "--requests=2", "--request-size=33554432"];
    run(Command::new("nbdcopy").args(options).arg(server.uri("a")).arg(&back));
    assert!(std::fs::read(&back).unwrap() == image, "big requests read back something else");
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&there).arg(server.uri("a")));
    server.end();
}

#[test]
fn qemu_io_writes_trims_and_zeroes() {
    let server = Server::start("qemu", &["--export", "a,size=64M"]);
    let uri = server.uri("a");
    qemu_io(&uri, &["read -P 0 0 1M", "write -P 0x5a 0 8M", "write -f -P 0xa5 1536 2560", "flush"]);
    qemu_io(&uri, &["read -P 0x5a 0 1536", "read -P 0xa5 1536 2560", "read -P 0x5a 4096 8384512"]);
    qemu_io(&uri, &["discard 1M 1M", "write -z 4M 1M", "write -z -u 5M 512", "flush"]);
    qemu_io(&uri, &["read -P 0 1M 1M", "read -P 0x5a 2M 2M", "read -P 0 4M 1M", "read -P 0 5M 512"]);
    qemu_io(&uri, &["read -P 0x5a 5243392 1M", "write -P 7 33M 31M", "read -P 7 33M 31M"]);
    server.end();
}

#[test]
fn sixteen_tebibytes_cost_nothing_until_written() {
    let server = Server::start("sparse", &["--export", "a", "--tier", "ram,limit=64M"]);
    let last = (16u64 << 40) - (1 << 20);
    let (write, read) = (format!("write -P 3 {last} 1M"), format!("read -P 3 {last} 1M"));
    qemu_io(&server.uri("a"), &[&write, "write -P 4 8T 64k", "write -P 5 0 4k"]);
    qemu_io(&server.uri("a"), &[&read, "read -P 4 8T 64k", "read -P 5 0 4k", "read -P 0 12T 16M"]);
    qemu_io(&server.uri("a"), &["discard 0 1G", "read -P 0 0 4k"]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let resident_kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(resident_kib < 128 << 10, "{line}");
    server.end();
}

#[test]
fn qemu_img_converts_to_and_from() {
    let server = Server::start("convert", &["--export", "a,size=16M"]);
    let (raw, qcow) = (server.directory.join("raw"), server.directory.join("qcow2"));
    write_image(&raw, 16 << 20);
    run(Command::new("qemu-img").args(["convert", "-n", "-f", "raw", "-O", "raw"]).arg(&raw).arg(server.uri("a")));
    run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(server.uri("a")).arg(&qcow));
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "qcow2"]).arg(&raw).arg(&qcow));
    server.end();
}

/// A client that speaks byte by byte.
struct Raw(UnixStream);

impl Raw {
    fn send(&mut self, parts: &[&[u8]]) {
        // The server may hang up on rudeness before it has read all of it.
        let _ = self.0.write_all(&parts.concat());
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn is_hung_up_on(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    /// Into transmission by the oldest way.
    fn enter(&mut self, export: &[u8]) {
        assert_eq!(&self.take(18)[..16], b"NBDMAGICIHAVEOPT");
        self.send(&[
            &3u32.to_be_bytes(),
            b"IHAVEOPT",
            &1u32.to_be_bytes(),
            &(export.len() as u32).to_be_bytes(),
            export,
        ]);
        self.take(10);
    }

    /// Into transmission with structured replies (option 8) or extended headers (11), and both contexts.
    fn enter_structured(&mut self, form: u32, export: &[u8]) {
        self.take(18);
        let name = [&(export.len() as u32).to_be_bytes(), export].concat();
        let contexts = b"\0\0\0\x02\0\0\0\x0fbase:allocation\0\0\0\x0eghostswap:kind";
        self.send(&[&3u32.to_be_bytes()]);
        for (option, data) in
            [(form, vec![]), (10, [&name, &contexts[..]].concat()), (7, [&name, &[0; 2][..]].concat())]
        {
            assert_eq!(self.option(option, &data), 1, "option {option}");
        }
    }

    /// Sends an option; the last reply to it.
    fn option(&mut self, option: u32, data: &[u8]) -> u32 {
        self.send(&[b"IHAVEOPT", &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data]);
        loop {
            let reply = self.take(20);
            self.take(u32::from_be_bytes([reply[16], reply[17], reply[18], reply[19]]) as usize);
            let what = u32::from_be_bytes([reply[12], reply[13], reply[14], reply[15]]);
            if what == 1 || what >> 31 == 1 {
                return what;
            }
        }
    }

    /// A request with an extended header, and the chunks of its reply.
    fn extended(&mut self, flags: u16, command: u16, offset: u64, len: u64, data: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let cookie = 0x1122_3344_5566_7788u64.to_be_bytes();
        let (offset, len) = (offset.to_be_bytes(), len.to_be_bytes());
        let kind = [flags.to_be_bytes(), command.to_be_bytes()].concat();
        self.send(&[&0x21e4_1c71u32.to_be_bytes(), &kind, &cookie, &offset, &len, data]);
        let mut chunks = Vec::new();
        loop {
            let head = self.take(32);
            assert_eq!(head[..4], 0x6e8a_278cu32.to_be_bytes());
            assert_eq!((&head[8..16], &head[16..24]), (&cookie[..], &offset[..]));
            let len = u64::from_be_bytes(head[24..].try_into().unwrap());
            chunks.push((u16::from_be_bytes([head[6], head[7]]), self.take(len as usize)));
            if head[5] == 1 {
                return chunks;
            }
        }
    }

    /// The chunks of the next structured reply: kind and content.
    fn chunks(&mut self) -> Vec<(u16, Vec<u8>)> {
        let mut chunks = Vec::new();
        loop {
            let head = self.take(20);
            assert_eq!(head[..4], 0x668e_33efu32.to_be_bytes());
            assert_eq!(head[8..16], 0x1122_3344_5566_7788u64.to_be_bytes());
            let data = self.take(u32::from_be_bytes([head[16], head[17], head[18], head[19]]) as usize);
            chunks.push((u16::from_be_bytes([head[6], head[7]]), data));
            if head[5] == 1 {
                return chunks;
            }
        }
    }

    fn request(&mut self, flags: u16, command: u16, offset: u64, len: u32, data: &[u8]) {
        let cookie = 0x1122_3344_5566_7788u64.to_be_bytes();
        self.send(&[
            &0x2560_9513u32.to_be_bytes(),
            &flags.to_be_bytes(),
            &command.to_be_bytes(),
            &cookie,
            &offset.to_be_bytes(),
            &len.to_be_bytes(),
            data,
        ]);
    }

    /// The error of the next reply.
    fn errno(&mut self) -> u32 {
        let reply = self.take(16);
        assert_eq!(reply[..4], 0x6744_6698u32.to_be_bytes());
        assert_eq!(reply[8..], 0x1122_3344_5566_7788u64.to_be_bytes());
        u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]])
    }
}

#[test]
fn clients_see_what_lies_where() {
    let server = Server::start("map", &["--export", "a", "--export", "old,size=1M,ro"]);
    let uri = server.uri("a");
    let write = ["write -P 7 1M 64k", "write -z 2M 64k", "discard 2M 32k", "write -P 9 15T 4k"];
    qemu_io(&uri, &write);
    let map = |context: &str| run(Command::new("nbdinfo").args([&format!("--map={context}"), &uri]));
    let rows = |text: &str| -> Vec<Vec<String>> {
        text.lines().map(|line| line.split_whitespace().take(3).map(str::to_owned).collect()).collect()
    };
    let (m, t) = (1u64 << 20, 1u64 << 40);
    let expected = |wanted: &[(u64, u64, u32)]| -> Vec<Vec<String>> {
        wanted.iter().map(|(at, len, what)| vec![at.to_string(), len.to_string(), what.to_string()]).collect()
    };
    let tail = (15 * t + 4096, t - 4096);
    let from = m + (64 << 10);
    // A page of one byte is filled; zeros that were written are dropped pages.
    let wanted = [(0, m, 3), (m, 64 << 10, 0), (from, 15 * t - from, 3), (15 * t, 4096, 0), (tail.0, tail.1, 3)];
    assert_eq!(rows(&map("base:allocation")), expected(&wanted));
    let wanted = wanted.map(|(at, len, what)| (at, len, if what == 3 { 0 } else { 2 }));
    assert_eq!(rows(&map("ghostswap:kind")), expected(&wanted));
    let text = run(Command::new("nbdinfo").arg(&uri));
    for expected in ["base:allocation", "ghostswap:kind", "can_df: true", "can_cache: true", "can_fast_zero: true"] {
        assert!(text.contains(expected), "no '{expected}' in\n{text}");
    }
    let text = run(Command::new("qemu-img").args(["map", "--output=json", "-f", "raw", &uri]));
    assert_eq!(text.matches("\"zero\": true").count(), 3, "{text}");
    assert_eq!(text.matches("\"data\": true").count(), 2, "{text}");
    let text = run(Command::new("nbdinfo").arg(server.uri("old")));
    assert!(text.contains("is_read_only: true") && text.contains("can_trim: false"), "{text}");
    let mut client = server.connect();
    client.enter(b"old");
    for (command, data) in [(1, &[1; 4096][..]), (4, b""), (6, b"")] {
        client.request(0, command, 0, 4096, data);
        assert_eq!(client.errno(), 1, "command {command}");
    }
    server.end();
}

#[test]
fn structured_replies_are_whole_and_bounded() {
    let server = Server::start("chunks", &["--export", "a,size=64M"]);
    let uri = server.uri("a");
    qemu_io(&uri, &["write -P 7 0 256k", "write -P 8 512k 4k"]);
    let mut client = server.connect();
    client.enter_structured(8, b"a");
    // Data, zeros that nothing is stored of, data: each in its chunk, with its place.
    client.request(0, 0, 0, 768 << 10, b"");
    let chunks = client.chunks();
    assert_eq!(
        chunks.iter().map(|(kind, data)| (*kind, data.len())).collect::<Vec<_>>(),
        [(1, 8 + (256 << 10)), (2, 12), (1, 8 + (256 << 10))]
    );
    assert!(chunks[0].1[8..].iter().all(|byte| *byte == 7));
    assert_eq!(chunks[1].1, [(256u64 << 10).to_be_bytes().as_slice(), &(256u32 << 10).to_be_bytes()].concat());
    assert_eq!(chunks[2].1[..8], (512u64 << 10).to_be_bytes());
    assert!(chunks[2].1[8..8 + 4096].iter().all(|byte| *byte == 8));
    // DF: one chunk, or none at all.
    client.request(4, 0, 0, 256 << 10, b"");
    assert_eq!(client.chunks().len(), 1);
    client.request(4, 0, 0, 512 << 10, b"");
    assert_eq!(client.chunks(), [(0x8001, [75u32.to_be_bytes().as_slice(), &[0; 2]].concat())]);
    // Errors of READ and BLOCK_STATUS come in chunks, those of others do not.
    for (flags, command, offset, len) in
        [(0, 0, 1, 512), (0, 0, 64 << 20, 512), (0, 7, 0, 0), (0, 7, 1, 512), (2, 7, 0, 512)]
    {
        client.request(flags, command, offset, len, b"");
        let chunks = client.chunks();
        assert_eq!((chunks.len(), chunks[0].0 >> 15, &chunks[0].1[..4]), (1, 1, &22u32.to_be_bytes()[..]));
    }
    client.request(0, 4, 64 << 20, 512, b"");
    assert_eq!(client.errno(), 22);
    // One extent where one is asked for, of each context; a bounded number where all could differ.
    client.request(8, 7, 0, 1 << 20, b"");
    let extent = |context: u32, len: u32, status: u32| {
        (5, [context, len, status].into_iter().flat_map(u32::to_be_bytes).collect::<Vec<_>>())
    };
    assert_eq!(client.chunks(), [extent(1, 256 << 10, 0), extent(2, 256 << 10, 2)]);
    for page in (0..8192u64).step_by(2) {
        client.request(0, 1, page * 4096, 4096, &[page as u8 | 1; 4096]);
        assert_eq!(client.errno(), 0);
        client.request(0, 4, (page + 1) * 4096, 4096, b"");
        assert_eq!(client.errno(), 0);
    }
    client.request(0, 7, 0, 64 << 20, b"");
    let chunks = client.chunks();
    assert_eq!(chunks.iter().map(|(kind, data)| (*kind, data.len())).collect::<Vec<_>>(), [(5, 4 + 2048 * 8); 2]);
    assert!(chunks[0].1[4..].chunks(8).all(|extent| extent[..4] == 4096u32.to_be_bytes()));
    server.end();
}

#[test]
fn extended_headers_take_lengths_of_16_tebibytes() {
    let server = Server::start("extended", &["--export", "a"]);
    let all = 16u64 << 40;
    let mut client = server.connect();
    client.enter_structured(11, b"a");
    let done = vec![(0u16, vec![])];
    let failed = |errno: u32| vec![(0x8001u16, [errno.to_be_bytes().as_slice(), &[0; 2]].concat())];
    // Data follows a write, and where the flag says so; only a write takes it.
    assert_eq!(client.extended(32, 1, 1 << 20, 4096, &[7; 4096]), done);
    assert_eq!(client.extended(0, 1, 1 << 20, 4096, &[7; 4096]), done);
    assert_eq!(client.extended(32, 0, 0, 4096, &[7; 4096]), failed(22));
    assert_eq!(client.extended(32, 7, 0, 4096, &[7; 4096]), failed(22));
    assert_eq!(client.extended(0, 0, 0, all, b""), failed(22));
    assert_eq!(client.extended(0, 4, 1, u64::MAX, b""), failed(22));
    let chunks = client.extended(0, 0, 1 << 20, 4096, b"");
    assert_eq!((chunks.len(), chunks[0].0, &chunks[0].1[8..]), (1, 1, &[7; 4096][..]));
    let status = |context: u32, extents: &[(u64, u64)]| {
        let head = [context, extents.len() as u32].into_iter().flat_map(u32::to_be_bytes);
        (6u16, head.chain(extents.iter().flat_map(|(len, what)| [*len, *what]).flat_map(u64::to_be_bytes)).collect())
    };
    let rest = all - (1 << 20) - 4096;
    let told = client.extended(0, 7, 0, all, b"");
    let runs = |hole, data| [(1 << 20, hole), (4096, data), (rest, hole)];
    assert_eq!(told, [status(1, &runs(3, 0)), status(2, &runs(0, 2))]);
    assert_eq!(client.extended(0, 5, 0, all, b""), done);
    assert_eq!(client.extended(0, 6, 0, all - 512, b""), done);
    assert_eq!(client.extended(0, 4, 0, all, b""), done);
    assert_eq!(client.extended(0, 3, 0, 0, b""), done);
    assert_eq!(client.extended(0, 7, 0, all, b""), [status(1, &[(all, 3)]), status(2, &[(all, 0)])]);
    // More data than there can be is not waited for.
    client.send(&[&0x21e4_1c71u32.to_be_bytes(), &[0, 32, 0, 0], &[0; 16], &u64::MAX.to_be_bytes()]);
    assert!(client.is_hung_up_on());
    // The weaker form is refused after the stronger.
    let mut client = server.connect();
    client.take(18);
    client.send(&[&3u32.to_be_bytes()]);
    assert_eq!([client.option(11, b""), client.option(8, b""), client.option(11, b"")], [1, 1 << 31 | 10, 1]);
    client.send(&[b"IHAVEOPT", &1u32.to_be_bytes(), &1u32.to_be_bytes(), b"a"]);
    assert!(client.is_hung_up_on());
    server.end();
}

#[test]
fn a_rude_client_hurts_only_itself() {
    let server = Server::start("rude", &["--export", "a,size=1M", "--max-lanes", "8"]);
    let huge = [&3u32.to_be_bytes()[..], b"IHAVEOPT", &7u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat();
    let wrong_option = [&3u32.to_be_bytes()[..], b"IHAVEOPZ", &7u32.to_be_bytes(), &0u32.to_be_bytes()].concat();
    for greeting in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], &huge, &wrong_option] {
        let mut client = server.connect();
        client.send(&[greeting]);
        assert!(client.is_hung_up_on(), "{greeting:?}");
    }
    // Options that are malformed get an answer, and the next one is understood.
    let mut client = server.connect();
    client.take(18);
    client.send(&[&3u32.to_be_bytes()]);
    for (option, data, expected) in [
        (7u32, &b"\xff\xff\xff\xff"[..], 3u32),
        (6, b"", 3),
        (6, b"\0\0\0\x04none\0\0", 6),
        (3, b"x", 3),
        (8, b"x", 3),
        (9, b"", 3),
        (10, b"\0\0\0\x01a\0\0\0\0", 3),
        (5, b"", 1),
        (11, b"x", 3),
        (99, &[7; 60000], 1),
        (7, &[0; 60000], 9),
    ] {
        client.send(&[b"IHAVEOPT", &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data]);
        let reply = client.take(20);
        assert_eq!(reply[12..16], (1 << 31 | expected).to_be_bytes(), "option {option}");
        client.take(u32::from_be_bytes([reply[16], reply[17], reply[18], reply[19]]) as usize);
    }
    // Bad requests get an error, and the next one is served.
    let mut client = server.connect();
    client.enter(b"a");
    let big = vec![1; (32 << 20) + 4096];
    for (flags, command, offset, len, data, expected) in [
        (0, 0, 1 << 20, 512, &b""[..], 22),
        (0, 0, u64::MAX, 4096, b"", 22),
        (0, 0, 1, 512, b"", 22),
        (0, 0, 0, u32::MAX, b"", 22),
        (0, 1, 1 << 20, 512, &[1; 512], 28),
        (0, 1, 0, 100, &[1; 100], 22),
        (0, 1, 0, big.len() as u32, &big, 22),
        (0, 4, 4096, u32::MAX, b"", 22),
        (0, 6, u64::MAX, u32::MAX, b"", 28),
        (0x8000, 3, 0, 0, b"", 22),
        (0, 77, 0, 0, b"", 22),
        (4, 0, 0, 512, b"", 22),
        (0, 7, 0, 4096, b"", 22),
        (0, 5, 1 << 20, 512, b"", 22),
        (0, 5, 0, 1 << 20, b"", 0),
        (16, 6, 0, 512, b"", 0),
        (16, 4, 0, 512, b"", 22),
        (0, 3, 0, 0, b"", 0),
        (1, 1, 4096, 4096, &[9; 4096], 0),
        (0, 1, 0, 0, b"", 0),
        (0, 4, 0, 0, b"", 0),
    ] {
        client.request(flags, command, offset, len, data);
        assert_eq!(client.errno(), expected, "command {command} at {offset}+{len}");
    }
    client.request(0, 0, 4096, 4096, b"");
    assert_eq!(client.errno(), 0);
    assert_eq!(client.take(4096), [9; 4096]);
    // Half a request, then gone; and bytes that are no request.
    client.request(0, 1, 0, 1 << 20, b"too little");
    drop(client);
    let mut client = server.connect();
    client.enter(b"a");
    client.send(&[&[0xee; 28]]);
    assert!(client.is_hung_up_on());
    qemu_io(&server.uri("a"), &["read -P 9 4096 4096"]);
    server.end();
}

#[test]
fn a_silent_client_is_hung_up_on() {
    let server = Server::start("silent", &["--export", "a,size=1M"]);
    let began = Instant::now();
    let mut client = server.connect();
    // A byte now and then must not prolong it.
    client.send(&[&[0]]);
    std::thread::sleep(Duration::from_secs(4));
    client.send(&[&[0]]);
    assert!(client.is_hung_up_on());
    assert!(began.elapsed() < Duration::from_secs(13), "{:?}", began.elapsed());
    server.end();
}

#[test]
fn clients_beyond_the_limit_are_refused_and_pipelined_requests_all_answered() {
    let server = Server::start("limit", &["--export", "a,size=1M", "--max-lanes", "2"]);
    // The connection that `start` tried may linger for a moment.
    std::thread::sleep(Duration::from_millis(300));
    let (mut first, mut second) = (server.connect(), server.connect());
    first.enter(b"a");
    second.enter(b"");
    assert!(server.connect().is_hung_up_on());
    for number in 0..200u32 {
        first.request(0, 1, u64::from(number) * 4096, 4096, &[number as u8 + 1; 4096]);
    }
    (0..200).for_each(|_| assert_eq!(first.errno(), 0));
    (0..200u64).for_each(|number| second.request(0, 0, number * 4096, 4096, b""));
    for number in 0..200u32 {
        assert_eq!(second.errno(), 0);
        assert_eq!(second.take(4096), [number as u8 + 1; 4096]);
    }
    server.signal("USR1");
    first.request(0, 3, 0, 0, b"");
    assert_eq!(first.errno(), 0);
    server.end();
}

#[test]
fn usage_stale_sockets_and_other_servers() {
    let status = |arguments: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_ghostswap-nbd")).args(arguments).stdin(Stdio::null()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let mut server = Server::start("usage", &["--export", "a,size=1M"]);
    let socket = server.socket().display().to_string();
    for bad in [
        &["--export", "a"][..],
        &["--unix", "/tmp/x"],
        &["--unix", "/tmp/x", "--export", "a,colour=red"],
        &["--unix", "/tmp/x", "--export", "a", "--tier", "paper"],
        &["--unix", "/tmp/x", "--export", "a", "--export", "a"],
        &["--unix", "/tmp/x", "--export", "a,size=100"],
    ] {
        assert_eq!(status(bad).0, Some(2), "{bad:?}");
    }
    let (code, text) = status(&["--unix", &socket, "--export", "a,size=1M"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("another server listens"), "{text}");
    let file = server.directory.join("file");
    std::fs::write(&file, "precious").unwrap();
    assert_eq!(status(&["--unix", &file.display().to_string(), "--export", "a,size=1M"]).0, Some(1));
    assert!(file.exists());
    // Killed, it leaves its socket; the next server takes its place.
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    assert!(server.socket().exists());
    let next = Command::new(env!("CARGO_BIN_EXE_ghostswap-nbd"))
        .args(["--unix", &socket, "--export", "a,size=1M"])
        .env("RUST_LOG", "off")
        .spawn()
        .unwrap();
    server.child = next;
    let end = Instant::now() + Duration::from_secs(10);
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(10));
    }
    server.end();
}
