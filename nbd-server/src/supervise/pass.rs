//! Descriptors that go from one process to another over a socket (SCM_RIGHTS), with words that say what they are.

use anyhow::{bail, ensure, Context, Result};
use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Sockets that can be listened at.
pub const MOST_SOCKETS: usize = 64;
/// Beside the sockets: the arena, two tables, two programs, two links.
const MOST: usize = MOST_SOCKETS + 7;
const MOST_BYTES: usize = 32 << 10;

/// Waits for nobody: it lies in the socket until somebody receives it.
pub fn send(link: &UnixStream, words: &str, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    ensure!(words.len() <= MOST_BYTES, "the names of the sockets are too long");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ensure!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)), "too many sockets");
    let sent = sendmsg(link, &[IoSlice::new(words.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL);
    match sent.context("cannot hand over the sockets")? {
        bytes if bytes == words.len() => Ok(()),
        bytes => bail!("cannot hand over the sockets: {bytes} bytes went"),
    }
}

/// What was sent at once; what is sent after it stays.
pub fn receive(link: &UnixStream) -> Result<(String, Vec<OwnedFd>)> {
    let mut words = vec![0; MOST_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(link, &mut [IoSliceMut::new(&mut words)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let words = String::from_utf8_lossy(&words[..got.bytes]).into_owned();
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok((words, descriptors))
}
