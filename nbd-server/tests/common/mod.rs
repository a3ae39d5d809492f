//! What the tests share: a server to talk to, real clients, and one that speaks byte by byte.
//!
//! Needs the Debian packages libnbd-bin and qemu-utils.
#![allow(dead_code)] // Each test file is a program of its own, and none uses all of it.
#![allow(clippy::unwrap_used)] // Clippy's leave for tests does not reach their helpers.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

pub struct Server {
    pub child: Child,
    pub directory: PathBuf,
}

impl Server {
    pub fn start(name: &str, arguments: &[&str]) -> Server {
        Server::start_program(Path::new(env!("CARGO_BIN_EXE_ghostswap-nbd")), name, arguments)
    }

    pub fn directory(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("ghostswap-nbd-{name}-{}", std::process::id()))
    }

    pub fn start_program(program: &Path, name: &str, arguments: &[&str]) -> Server {
        let directory = Server::directory(name);
        std::fs::create_dir_all(&directory).unwrap();
        let child = Command::new(program)
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

    /// The process that serves, not the one that supervises it, nor one that stands by.
    pub fn worker(&self) -> u32 {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let output = pgrep(&["-x", "nbd-worker", "-P", &self.child.id().to_string()]);
            if let Ok(worker) = String::from_utf8_lossy(&output.stdout).trim().parse() {
                return worker;
            }
            assert!(Instant::now() < end, "there is no worker");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The worker after `dead`.
    pub fn next_worker(&self, dead: u32) -> u32 {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            match self.worker() {
                next if next != dead => return next,
                _ => assert!(Instant::now() < end, "nobody takes over"),
            }
        }
    }

    /// The process that stands by, if one does.
    pub fn standby(&self) -> Option<u32> {
        let output = pgrep(&["-x", "nbd-standby", "-P", &self.child.id().to_string()]);
        String::from_utf8_lossy(&output.stdout).lines().next().map(|pid| pid.parse().unwrap())
    }

    /// Waits until one does.
    pub fn await_standby(&self) -> u32 {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            match self.standby() {
                Some(standby) => return standby,
                None => assert!(Instant::now() < end, "nobody stands by"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Those of that name that work here, whoever supervises them.
    pub fn processes_named(&self, name: &str) -> Vec<u32> {
        let output = pgrep(&["-x", name]);
        let all = String::from_utf8(output.stdout).unwrap();
        let here = self.directory.display().to_string();
        let ours = |pid: &u32| {
            std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|c| String::from_utf8_lossy(&c).contains(&here))
        };
        all.lines().map(|pid| pid.parse().unwrap()).filter(ours).collect()
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join("s")
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub fn connect(&self) -> Raw {
        let socket = UnixStream::connect(self.socket()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Raw(socket)
    }

    /// In transmission, if somebody serves.
    pub fn try_enter(&self, export: &[u8]) -> Option<Raw> {
        let socket = UnixStream::connect(self.socket()).ok()?;
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut client = Raw(socket);
        client.0.read_exact(&mut [0; 18]).ok()?;
        let name = [&(export.len() as u32).to_be_bytes(), export].concat();
        client.send(&[&3u32.to_be_bytes(), b"IHAVEOPT", &1u32.to_be_bytes(), &name]);
        client.0.read_exact(&mut [0; 10]).ok()?;
        Some(client)
    }

    /// In transmission on export a, as soon as the server can have one more client.
    pub fn enter_when_a_lane_is_free(&self) -> Raw {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let mut client = self.connect();
            client.greet();
            if client.option(7, b"\0\0\0\x01a\0\0") == 1 {
                return client;
            }
            assert!(Instant::now() < end, "no lane becomes free");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn signal(&self, signal: &str) {
        run(Command::new("kill").args(["-s", signal, &self.child.id().to_string()]));
    }

    /// Ends it as an administrator would; it must do so in order.
    pub fn end(mut self) {
        assert!(self.child.try_wait().unwrap().is_none(), "the server died");
        self.signal("TERM");
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
        assert!(!self.socket().exists(), "the socket is left");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The supervisor first: a worker that is killed would be followed by another.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for name in ["nbd-worker", "nbd-standby"] {
            self.processes_named(name).iter().for_each(|process| kill("KILL", *process));
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

pub fn kill(signal: &str, process: u32) {
    // It may be gone already.
    let _ = Command::new("kill").args(["-s", signal, &process.to_string()]).output();
}

/// Whether anything is left of it but a zombie. One of several threads whose first has ended is a zombie by its status
/// alone: its other threads may still hold its files, and its sockets listen.
pub fn is_running(process: u32) -> bool {
    let is_zombie = std::fs::read_to_string(format!("/proc/{process}/stat")).map(|stat| stat.contains(") Z "));
    let threads = || std::fs::read_dir(format!("/proc/{process}/task")).map_or(0, Iterator::count);
    is_zombie.is_ok_and(|is_zombie| !is_zombie || threads() > 1)
}

pub fn write_file(path: &Path, bytes: &[u8], mode: u32) {
    let _ = std::fs::remove_file(path);
    std::fs::write(path, bytes).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

pub fn pgrep(arguments: &[&str]) -> Output {
    Command::new("pgrep").args(arguments).output().unwrap()
}

pub fn run(command: &mut Command) -> String {
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

pub fn qemu_io(uri: &str, commands: &[&str]) -> String {
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
pub fn write_image(path: &Path, bytes: usize) -> Vec<u8> {
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

/// A client that speaks byte by byte.
pub struct Raw(pub UnixStream);

impl Raw {
    pub fn send(&mut self, parts: &[&[u8]]) {
        // The server may hang up on rudeness before it has read all of it.
        let _ = self.0.write_all(&parts.concat());
    }

    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub fn is_hung_up_on(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    /// Past the first words.
    pub fn greet(&mut self) {
        assert_eq!(&self.take(18)[..16], b"NBDMAGICIHAVEOPT");
        self.send(&[&3u32.to_be_bytes()]);
    }

    /// Into transmission by the oldest way.
    pub fn enter(&mut self, export: &[u8]) {
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
    pub fn enter_structured(&mut self, form: u32, export: &[u8]) {
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
    pub fn option(&mut self, option: u32, data: &[u8]) -> u32 {
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
    pub fn extended(&mut self, flags: u16, command: u16, offset: u64, len: u64, data: &[u8]) -> Vec<(u16, Vec<u8>)> {
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
    pub fn chunks(&mut self) -> Vec<(u16, Vec<u8>)> {
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

    pub fn request(&mut self, flags: u16, command: u16, offset: u64, len: u32, data: &[u8]) {
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

    /// The error of its reply, if there is one.
    pub fn try_request(&mut self, command: u16, offset: u64, len: u32, data: &[u8]) -> std::io::Result<u32> {
        self.request(0, command, offset, len, data);
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply)?;
        Ok(u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]]))
    }

    pub fn write_page(&mut self, page: u64, content: &[u8]) {
        self.request(0, 1, page * 4096, 4096, content);
        assert_eq!(self.errno(), 0);
    }

    pub fn read_page(&mut self, page: u64) -> Vec<u8> {
        self.request(0, 0, page * 4096, 4096, b"");
        assert_eq!(self.errno(), 0);
        self.take(4096)
    }

    /// The error of the next reply.
    pub fn errno(&mut self) -> u32 {
        let reply = self.take(16);
        assert_eq!(reply[..4], 0x6744_6698u32.to_be_bytes());
        assert_eq!(reply[8..], 0x1122_3344_5566_7788u64.to_be_bytes());
        u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]])
    }
}
