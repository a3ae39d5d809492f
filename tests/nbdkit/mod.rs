//! A real NBD server (Debian package nbdkit) at a Unix socket, which can be stopped, killed and started anew.
#![allow(dead_code, reason = "each test file is a program of its own, and none uses all of it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub struct Nbdkit {
    socket: PathBuf,
    arguments: Vec<String>,
    child: Option<Child>,
}

impl Nbdkit {
    pub fn start(dir: &Path, arguments: &[&str]) -> Nbdkit {
        let arguments = arguments.iter().map(ToString::to_string).collect();
        let mut server = Nbdkit { socket: dir.join("s"), arguments, child: None };
        server.start_again();
        server
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let _ = std::fs::remove_file(&self.socket);
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&self.socket).args(&self.arguments);
        self.child = Some(command.stderr(Stdio::null()).spawn().expect("nbdkit can be run (package nbdkit)"));
        let begun = Instant::now();
        while UnixStream::connect(&self.socket).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(20), "nbdkit does not listen: {:?}", self.arguments);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Others from now on, when it is started again.
    pub fn change(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(ToString::to_string).collect();
    }

    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn signal(&self, signal: &str) {
        let pid = self.child.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        // All of its threads stand before this returns.
        let begun = Instant::now();
        while signal == "STOP" && self.states().chars().any(|state| state != 'T') {
            assert!(begun.elapsed() < Duration::from_secs(20), "it does not stop: {}", self.states());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A letter for each of its threads, as in /proc/PID/stat.
    pub fn states(&self) -> String {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.as_ref().unwrap().id())).unwrap();
        let stats = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).ok());
        stats.filter_map(|stat| stat.rsplit(") ").next().and_then(|rest| rest.chars().next())).collect()
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}
