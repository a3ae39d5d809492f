//! Words to the service manager, if there is one that listens: sd_notify(3). And descriptors that it keeps for whom it
//! starts next (FDSTORE).

use anyhow::{Context, Result};
use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::ffi::OsStr;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Says it.
pub fn say(words: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    // It hears it or it does not: nothing here depends on it.
    let _ = address(&name).and_then(|to| UnixDatagram::unbound()?.send_to_addr(words.as_bytes(), &to));
}

/// Has it keep descriptors, each by its name. One that does not keep any ignores it.
pub fn keep(descriptors: &[(&str, BorrowedFd<'_>)]) -> Result<()> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let socket = UnixDatagram::unbound().context("cannot make a socket")?;
    socket.connect_addr(&address(&name).context("NOTIFY_SOCKET")?).context("the service manager does not listen")?;
    for (name, descriptor) in descriptors {
        // A file is never at an end that would have the manager drop it; some ask it all the same.
        let words = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
        let kept = [*descriptor];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&kept));
        sendmsg(&socket, &[IoSlice::new(words.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL)
            .context("the service manager does not listen")?;
    }
    Ok(())
}

fn address(name: &OsStr) -> std::io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest),
        _ => SocketAddr::from_pathname(name),
    }
}
