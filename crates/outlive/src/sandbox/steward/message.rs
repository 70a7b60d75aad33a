//! What a process and its steward say to each other: one packet for each message, with descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::standby::About;

/// The longest message in bytes: a fence command may be a script.
const LONGEST: usize = 128 << 10;
/// The most descriptors in a message: as many as a card has queues, and some.
const DESCRIPTORS: usize = 16;

/// What the command line named. Nothing else is ever done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Charter {
    /// The tap, and the bridge that it joins.
    pub(crate) card: Option<(String, Option<String>)>,
    /// The fence command, and how long it may take.
    pub(crate) fence: Option<(String, Duration)>,
}

/// What is asked for. The first descriptor is the socket for the answer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    Card(CardAsk),
    /// With the pipe for its output.
    Fence(FenceAsk),
    /// With its standard input, output and error.
    Sentinel,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct CardAsk {
    pub(super) pairs: u16,
    pub(super) mtu: Option<u16>,
    pub(super) vlan: Option<u16>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FenceAsk {
    pub(super) about: About,
    pub(super) attempt: u32,
}

/// How a program ended.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ended {
    /// With this status, as `wait` gives it.
    By(i32),
    /// It was killed because it took too long.
    Killed,
}

pub(super) fn say(to: impl AsFd, message: &impl Serialize, with: &[BorrowedFd<'_>]) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    if text.len() > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a message to the steward is too long"));
    }
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut rights = SendAncillaryBuffer::new(&mut room);
    if !with.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(with)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for the steward"));
    }
    rustix::net::sendmsg(to, &[IoSlice::new(&text)], &mut rights, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next message and its descriptors; `None` at the end.
pub(super) fn hear<T: DeserializeOwned>(from: impl AsFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut text = vec![0; LONGEST];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut rights = RecvAncillaryBuffer::new(&mut room);
    let heard = loop {
        match rustix::net::recvmsg(
            &from,
            &mut [IoSliceMut::new(&mut text)],
            &mut rights,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            heard => break heard?,
        }
    };
    if heard.bytes == 0 {
        return Ok(None);
    }
    let descriptors = rights.drain().filter_map(|it| match it {
        RecvAncillaryMessage::ScmRights(these) => Some(these),
        _ => None,
    });
    let descriptors = descriptors.flatten().collect();
    Ok(Some((serde_json::from_slice(&text[..heard.bytes])?, descriptors)))
}
