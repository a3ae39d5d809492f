//! The kernel's side of a device: making it, watching one that another worker serves, what it is
//! like, and libublk's errors in words. Claiming one is `claim.rs`.

use crate::claim::Claim;
use crate::cli::Add;
use crate::queue::SLICE_BYTES;
use anyhow::{anyhow, bail, Result};
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{sys, UblkError, UblkFlags};
use std::path::Path;

/// Largest request: what the kernel splits 2 MiB folios into.
const MAX_IO_BYTES: u32 = 512 << 10;
/// Largest discard, just under 4 GiB.
const MAX_DISCARD_SECTORS: u32 = (u32::MAX >> 9) & !7;
/// The driver's own node, there once it is loaded.
pub const CONTROL_NODE: &str = "/dev/ublk-control";

/// Says in one line why there can be no device, before anything is set up for it.
pub fn check_driver(id: Option<u32>) -> Result<()> {
    if !Path::new(CONTROL_NODE).exists() {
        bail!("no ublk driver ({CONTROL_NODE} is missing): run `modprobe ublk_drv` as root first");
    }
    if let Err(e) = std::fs::OpenOptions::new().read(true).write(true).open(CONTROL_NODE) {
        bail!("cannot open {CONTROL_NODE}: {e}; adding a device needs root");
    }
    match id {
        Some(id) if kernel_has(id) => bail!("id {id} is taken: /dev/ublkb{id} exists"),
        _ => Ok(()),
    }
}

/// The number of a device, by its path.
pub fn id_of(path: &Path) -> Option<u32> {
    path.to_str()?.strip_prefix("/dev/ublkb")?.parse().ok()
}

/// Whether the kernel has a device of this number, whoever serves it.
pub fn kernel_has(id: u32) -> bool {
    Path::new(&format!("/sys/class/ublk-char/ublkc{id}")).exists() || Path::new(&format!("/dev/ublkc{id}")).exists()
}

/// What outliving a worker needs of the driver: its device waits, and what was in flight is sent
/// again. Writing a page twice is harmless.
const RECOVERY: u64 = (sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;

/// Whether the kernel's driver can hand a device from one worker to another.
pub fn can_recover(ctrl: &UblkCtrl) -> bool {
    ctrl.get_driver_features().unwrap_or(0) & RECOVERY == RECOVERY
}

/// Whether the kernel's driver can make a live device larger.
pub fn can_resize(ctrl: &UblkCtrl) -> bool {
    ctrl.get_driver_features().unwrap_or(0) & u64::from(sys::UBLK_F_UPDATE_SIZE) != 0
}

/// Makes the kernel's device.
pub fn make(add: &Add) -> Result<UblkCtrl> {
    let features = UblkCtrl::get_features().unwrap_or(0);
    let recovery = if features & RECOVERY == RECOVERY { RECOVERY } else { 0 };
    if features & u64::from(sys::UBLK_F_USER_COPY) == 0 {
        bail!("this kernel's ublk driver has no user copy: Linux 6.5 or later is needed");
    }
    let built = UblkCtrlBuilder::default()
        .name("ghostswap")
        .id(add.id.map_or(-1, |id| id as i32))
        .nr_queues(add.queues)
        .depth(add.depth)
        .io_buf_bytes(MAX_IO_BYTES)
        .ctrl_flags(u64::from(sys::UBLK_F_USER_COPY) | recovery)
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build();
    built.map_err(|e| match (errno(&e), add.id) {
        (libc::EEXIST, Some(id)) => anyhow!("id {id} is taken: /dev/ublkb{id} exists"),
        (libc::EPERM | libc::EACCES, _) => anyhow!("the ublk driver refuses: adding a device needs root"),
        _ => anyhow!("the ublk driver cannot add the device: {}", describe(&e)),
    })
}

/// Gets ready to claim a device, while another worker still serves it.
pub fn watch(add: &Add, id: u32) -> Result<(UblkCtrl, Claim)> {
    let built = UblkCtrlBuilder::default()
        .name("ghostswap")
        .id(id as i32)
        .nr_queues(add.queues)
        .depth(add.depth)
        .io_buf_bytes(MAX_IO_BYTES)
        .dev_flags(UblkFlags::UBLK_DEV_F_RECOVER_DEV)
        .build();
    Ok((built.map_err(|e| anyhow!("cannot reach ublkb{id}: {}", describe(&e)))?, Claim::new(id)?))
}

/// Removes a device that nobody serves, whatever was done of that already.
pub fn remove(id: u32) -> Result<()> {
    let ctrl = UblkCtrl::new_simple(id as i32).map_err(|e| anyhow!("cannot reach ublkb{id}: {}", describe(&e)))?;
    let _ = ctrl.kill_dev();
    ctrl.del_dev().map_err(|e| anyhow!("cannot remove ublkb{id}: {}", describe(&e))).map(drop)
}

/// libublk's errors carry negative errnos in several shapes.
fn errno(e: &UblkError) -> i32 {
    match e {
        UblkError::OtherError(n) | UblkError::UringIOError(n) => n.abs(),
        UblkError::IOError(e) => e.raw_os_error().unwrap_or(libc::EIO),
        UblkError::InvalidVal => libc::EINVAL,
        _ => libc::EIO,
    }
}

/// The same for people, in one line.
pub fn describe(e: &UblkError) -> String {
    std::io::Error::from_raw_os_error(errno(e)).to_string()
}

/// What the device is like.
pub fn set_params(dev: &mut UblkDev, size_bytes: u64) {
    dev.set_default_params(size_bytes);
    let params = &mut dev.tgt.params;
    params.types = sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_DISCARD;
    // Neither rotational nor with a volatile cache: an answered write is kept.
    params.basic.attrs = 0;
    params.basic.logical_bs_shift = 12;
    params.basic.physical_bs_shift = 12;
    params.basic.io_min_shift = 12;
    params.basic.io_opt_shift = SLICE_BYTES.trailing_zeros() as u8;
    params.basic.max_sectors = MAX_IO_BYTES >> 9;
    params.discard.discard_granularity = 4096;
    params.discard.max_discard_sectors = MAX_DISCARD_SECTORS;
    params.discard.max_write_zeroes_sectors = MAX_DISCARD_SECTORS;
    params.discard.max_discard_segments = 1;
}
