//! Claiming a device whose worker died: the driver's START_USER_RECOVERY, again and again until the
//! driver has seen the death.
//!
//! The driver refuses with EBUSY until the kernel has cleared the dead worker's rings away, for which
//! nobody can wait but by asking; libublk sleeps 100 ms between two questions. Here a standby has a
//! ring of its own and the driver's node open beforehand, has asked the driver something once already
//! (so that the kernel's thread that carries such commands out is there), and then asks every
//! [`ASK_EVERY`]. Asking allocates nothing here and opens nothing.
//!
//! Drivers up to Linux 6.14 notice a death in a work item that marks the device free, unlocks it and
//! only then cancels *all fetch commands of the device*. Whoever claims it in between and fetches at
//! once has those commands cancelled; the driver gives them back and uses them all the same when a
//! request comes, and the kernel crashes. A take-over is real-time and that work item is not, so in
//! between is just where it would be. So with such a driver it sleeps for [`LET_FINISH`] after the
//! claim, when there is nothing to cancel yet and no thread of its own keeps the CPU from others. To
//! wait for the kernel's work items themselves (`/proc/sys/vm/stat_refresh` does) is no remedy: one of
//! them may be waiting for memory, and so for this device.
//!
//! These drivers also refuse with EINVAL, for ever, to let a device be claimed a second time before any of its
//! queues was served after the first: when who claimed it died between that and its fetch commands. The
//! first claim holds then, and the device is free once its node is closed. If it died when some queues were
//! ready and others not, then the next claim crashes the kernel (the driver lets go of a task that the
//! others never had); nothing here can help that.
//!
//! Only this one command; all others are libublk's, which does not wait for anything in them.

#![allow(unsafe_code)] // pushing commands on the ring.

use crate::device::CONTROL_NODE;
use anyhow::{bail, Context, Result};
use io_uring::{cqueue, opcode, squeue, types, IoUring};
use libublk::sys::{self, ublksrv_ctrl_cmd as Command};
use std::fs::{File, OpenOptions};
use std::io::Error as OsError;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often the driver is asked whether the device is free.
const ASK_EVERY: Duration = Duration::from_millis(2);
/// How long the driver may take to see that a worker died: up to 6.14, when all of a queue's requests
/// were under way, it finds out by their time-out of 30 s.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long an older driver has to finish with the one who died: a few time slices.
const LET_FINISH: Duration = Duration::from_millis(25);
/// A driver that has this (Linux 6.16) notices a death when the device's node is closed for the last
/// time, and cancels nothing later.
const NEWER: u64 = sys::UBLK_F_QUIESCE as u64;

/// A ring to the driver, for one device.
pub struct Claim {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    node: File,
    id: u32,
}

/// Where the driver's first answer goes: for good, since the kernel writes there by its address.
static FEATURES: AtomicU64 = AtomicU64::new(0);

impl Claim {
    /// Gets ready to claim a device, while another worker still serves it.
    pub fn new(id: u32) -> Result<Claim> {
        let node =
            OpenOptions::new().read(true).write(true).open(CONTROL_NODE).context("cannot open the ublk driver")?;
        let ring = IoUring::builder().build(4).context("cannot set up a ring to the ublk driver")?;
        let mut claim = Claim { ring, node, id };
        // Also to have asked once.
        match claim.ask(sys::UBLK_U_CMD_GET_FEATURES, Some(&FEATURES))? {
            said if said < 0 => bail!("the ublk driver does not answer: {}", OsError::from_raw_os_error(-said)),
            _ => Ok(claim),
        }
    }

    /// Claims the device as soon as the driver has seen the death of who served it.
    pub fn wait(&mut self) -> Result<()> {
        let began = Instant::now();
        loop {
            let said = self.ask(sys::UBLK_U_CMD_START_USER_RECOVERY, None)?;
            if said >= 0 {
                break;
            }
            if said == -libc::EINVAL && self.claimed_before() {
                break;
            }
            if said != -libc::EBUSY && said != -libc::EINVAL || began.elapsed() > PATIENCE {
                bail!("cannot take over ublkb{}: {}", self.id, OsError::from_raw_os_error(-said));
            }
            std::thread::sleep(ASK_EVERY);
        }
        if FEATURES.load(Ordering::Relaxed) & NEWER == 0 {
            std::thread::sleep(LET_FINISH);
        }
        Ok(())
    }

    /// Whether an older driver's EINVAL means that the device was claimed by one who has died since: its node
    /// can be opened by one at a time.
    fn claimed_before(&self) -> bool {
        let node = format!("/dev/ublkc{}", self.id);
        FEATURES.load(Ordering::Relaxed) & NEWER == 0 && OpenOptions::new().read(true).write(true).open(node).is_ok()
    }

    /// Sends a command and waits for the driver's answer.
    fn ask(&mut self, what: u32, into: Option<&'static AtomicU64>) -> Result<i32> {
        let (addr, len) = into.map_or((0, 0), |word| (word.as_ptr() as u64, size_of::<u64>() as u16));
        let command =
            opcode::UringCmd80::new(types::Fd(self.node.as_raw_fd()), what).cmd(command(self.id, addr, len)).build();
        // SAFETY: the node is open as long as the ring, and what the driver may write to is there for
        // good.
        unsafe { self.ring.submission().push(&command) }.context("the ring to the ublk driver is full")?;
        while let Err(e) = self.ring.submit_and_wait(1) {
            if e.raw_os_error() != Some(libc::EINTR) {
                return Err(e).context("cannot reach the ublk driver");
            }
        }
        let answer = self.ring.completion().next().context("the ublk driver did not answer")?;
        Ok(answer.result())
    }
}

/// A control command as it stands in the ring, for the device as a whole.
fn command(id: u32, addr: u64, len: u16) -> [u8; 80] {
    let mut bytes = [0; 80];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(offset_of!(Command, dev_id), &id.to_ne_bytes());
    put(offset_of!(Command, queue_id), &u16::MAX.to_ne_bytes());
    put(offset_of!(Command, addr), &addr.to_ne_bytes());
    put(offset_of!(Command, len), &len.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_lies_where_the_driver_looks() {
        // include/uapi/linux/ublk_cmd.h: dev_id, queue_id, len, addr.
        let bytes = command(0x0403_0201, 0x1817_1615_1413_1211, 0x2221);
        assert_eq!(bytes[..16], [1, 2, 3, 4, 0xff, 0xff, 0x21, 0x22, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18]);
        assert_eq!(bytes[16..], [0; 64]);
        assert!(size_of::<Command>() <= 80);
    }
}
