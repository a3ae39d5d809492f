//! A device of the kernel's nbd driver: what sysfs says of it, and what the driver is told by netlink.

use super::netlink::{find, Attributes, Family};
use anyhow::{bail, Context, Result};
use ghostswap::Error;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Of `linux/nbd-netlink.h`: commands, and attributes of theirs.
mod command {
    pub const CONNECT: u8 = 1;
    pub const DISCONNECT: u8 = 2;
    pub const RECONFIGURE: u8 = 3;
    pub const STATUS: u8 = 5;
}
mod attribute {
    pub const INDEX: u16 = 1;
    pub const SIZE_BYTES: u16 = 2;
    pub const BLOCK_SIZE_BYTES: u16 = 3;
    pub const TIMEOUT: u16 = 4;
    pub const SERVER_FLAGS: u16 = 5;
    pub const SOCKETS: u16 = 7;
    pub const DEAD_CONN_TIMEOUT: u16 = 8;
    pub const DEVICE_LIST: u16 = 9;
    pub const BACKEND_IDENTIFIER: u16 = 10;
    /// In SOCKETS, and in that.
    pub const SOCKET: u16 = 1;
    pub const SOCKET_FD: u16 = 1;
    /// In DEVICE_LIST, and in that.
    pub const DEVICE: u16 = 1;
    pub const DEVICE_CONNECTED: u16 = 2;
}

/// Of the device: a page is what swap is read and written by.
pub const BLOCK_BYTES: u64 = 4096;

/// How the driver is to treat its connections.
#[derive(Clone, Copy)]
pub struct Patience {
    /// It gives up one on which a request has waited so long; zero: none.
    pub request: Duration,
    /// It holds requests while there is no connection, and fails them after that.
    pub dead: Duration,
}

pub struct Device {
    pub path: PathBuf,
    index: u32,
    family: Family,
}

impl Device {
    pub fn open(path: &Path) -> Result<Device> {
        let index = index_of(path).ok_or_else(|| {
            Error::InvalidConfig(format!(
                "{} is not a device of the kernel's nbd driver, as /dev/nbd0 is",
                path.display()
            ))
        })?;
        let family = match Family::open("nbd") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                bail!("the kernel's nbd driver is not there: modprobe nbd")
            }
            family => family.context("cannot speak to the kernel's nbd driver")?,
        };
        Ok(Device { path: path.to_path_buf(), index, family })
    }

    pub fn name(&self) -> String {
        format!("nbd{}", self.index)
    }

    fn sysfs(&self, what: &str) -> PathBuf {
        Path::new("/sys/block").join(self.name()).join(what)
    }

    fn sysfs_text(&self, what: &str) -> Option<String> {
        std::fs::read_to_string(self.sysfs(what)).ok().map(|text| text.trim_end().to_owned())
    }

    pub fn is_connected(&self) -> bool {
        self.sysfs("pid").exists()
    }

    /// What it was connected to, in the words of who did it.
    pub fn backend(&self) -> Option<String> {
        self.sysfs_text("backend")
    }

    pub fn bytes(&self) -> Option<u64> {
        self.sysfs_text("size")?.parse::<u64>().ok()?.checked_mul(512)
    }

    /// It has a queue for each.
    pub fn connections(&self) -> Option<usize> {
        std::fs::read_dir(self.sysfs("mq")).ok().map(Iterator::count)
    }

    /// Has requests looked at again after so long: those that a dead connection has taken with it are then sent anew.
    pub fn look_at_requests_after(&self, time: Duration) -> Result<()> {
        let file = self.sysfs("queue/io_timeout");
        std::fs::write(&file, time.as_millis().to_string()).with_context(|| format!("cannot set {}", file.display()))
    }

    /// Whether it is mounted, swapped to or otherwise held.
    pub fn is_in_use(&self) -> bool {
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        self.is_swap() || matches!(rustix::fs::open(&self.path, flags, Mode::empty()), Err(Errno::BUSY))
    }

    pub fn is_swap(&self) -> bool {
        let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        let name = format!("/dev/{}", self.name());
        swaps.lines().any(|line| line.split_ascii_whitespace().next() == Some(&name))
    }

    fn about(&self) -> Attributes {
        let mut attributes = Attributes::new();
        attributes.put(attribute::INDEX, &self.index.to_ne_bytes());
        attributes
    }

    /// Connects it: from now on it is there, and the sockets are the driver's.
    pub fn connect(
        &mut self,
        sockets: &[BorrowedFd<'_>],
        bytes: u64,
        flags: u16,
        backend: &str,
        patience: Patience,
    ) -> io::Result<()> {
        let mut request = self.about();
        request.put(attribute::SIZE_BYTES, &bytes.to_ne_bytes());
        request.put(attribute::BLOCK_SIZE_BYTES, &BLOCK_BYTES.to_ne_bytes());
        request.put(attribute::SERVER_FLAGS, &u64::from(flags).to_ne_bytes());
        put_patience(&mut request, patience);
        put_backend(&mut request, backend);
        put_sockets(&mut request, sockets);
        self.family.ask(command::CONNECT, &mut request).map(drop)
    }

    /// Has the driver wait as told.
    pub fn set_patience(&mut self, backend: &str, patience: Patience) -> io::Result<()> {
        let mut request = self.about();
        put_patience(&mut request, patience);
        put_backend(&mut request, backend);
        self.family.ask(command::RECONFIGURE, &mut request).map(drop)
    }

    /// Offers a socket in the place of one that is dead. The driver does not say whether it took it; without a dead
    /// one it does not.
    pub fn offer(&mut self, socket: BorrowedFd<'_>, backend: &str) -> io::Result<()> {
        let mut request = self.about();
        put_backend(&mut request, backend);
        put_sockets(&mut request, &[socket]);
        self.family.ask(command::RECONFIGURE, &mut request).map(drop)
    }

    /// Whether it is connected, as the driver says: after all that it was told before.
    pub fn status(&mut self) -> io::Result<bool> {
        let mut request = self.about();
        let answer = self.family.ask(command::STATUS, &mut request)?;
        let device = find(answer, attribute::DEVICE_LIST).and_then(|list| find(list, attribute::DEVICE));
        let connected = device.and_then(|device| find(device, attribute::DEVICE_CONNECTED));
        Ok(connected.and_then(<[u8]>::first).is_some_and(|connected| *connected != 0))
    }

    /// What waits for it fails.
    pub fn disconnect(&mut self) -> io::Result<()> {
        let mut request = self.about();
        self.family.ask(command::DISCONNECT, &mut request).map(drop)
    }
}

fn put_patience(request: &mut Attributes, patience: Patience) {
    request.put(attribute::TIMEOUT, &patience.request.as_secs().to_ne_bytes());
    request.put(attribute::DEAD_CONN_TIMEOUT, &patience.dead.as_secs().to_ne_bytes());
}

fn put_backend(request: &mut Attributes, backend: &str) {
    let (text, end) = (backend.as_bytes(), [0]);
    let mut bytes = [0; super::MAX_BACKEND_BYTES + 1];
    bytes[..text.len()].copy_from_slice(text);
    bytes[text.len()..][..1].copy_from_slice(&end);
    request.put(attribute::BACKEND_IDENTIFIER, &bytes[..=text.len()]);
}

fn put_sockets(request: &mut Attributes, sockets: &[BorrowedFd<'_>]) {
    request.nest(attribute::SOCKETS, |list| {
        for socket in sockets {
            let fd = (socket.as_raw_fd() as u32).to_ne_bytes();
            list.nest(attribute::SOCKET, |item| item.put(attribute::SOCKET_FD, &fd));
        }
    });
}

/// N of a path /dev/nbdN, or of what a link at it leads to.
fn index_of(path: &Path) -> Option<u32> {
    let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let digits = real.strip_prefix("/dev").ok()?.to_str()?.strip_prefix("nbd")?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_numbers() {
        assert_eq!(index_of(Path::new("/dev/nbd0")), Some(0));
        assert_eq!(index_of(Path::new("/dev/nbd15")), Some(15));
        for bad in ["/dev/nbd0p1", "/dev/nbd", "/dev/sda", "nbd0", "/dev/nbd-1", "/dev/nbd99999999999", "/dev", "/"] {
            assert_eq!(index_of(Path::new(bad)), None, "{bad}");
        }
    }
}
