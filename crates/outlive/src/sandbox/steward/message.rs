//! What a process and its steward say to each other: one packet for each message, with descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
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
    /// Its VLAN.
    pub(crate) vlan: AllowedVlan,
    /// The fence command, and how long it may take.
    pub(crate) fence: Option<(String, Duration)>,
}

/// In which VLAN the card may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum AllowedVlan {
    /// Any: at a standby the primary says it.
    #[default]
    Any,
    /// The operator of this host has said which one, or that there is none.
    Only(Option<u16>),
}

impl AllowedVlan {
    pub(super) fn allows(self, vlan: Option<u16>) -> bool {
        self == Self::Any || self == Self::Only(vlan)
    }
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
///
/// # Errors
/// The socket's; [`io::ErrorKind::InvalidData`] for whatever is no such message, also for one that is empty or cut off: the
/// next one may be better.
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
        let empty = || io::Error::new(io::ErrorKind::InvalidData, "a message is empty");
        return if is_over(&from) { Ok(None) } else { Err(empty()) };
    }
    let descriptors = rights.drain().filter_map(|it| match it {
        RecvAncillaryMessage::ScmRights(these) => Some(these),
        _ => None,
    });
    let descriptors = descriptors.flatten().collect();
    // Otherwise what is cut off would be the end of a file.
    let noise = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    Ok(Some((serde_json::from_slice(&text[..heard.bytes]).map_err(noise)?, descriptors)))
}

/// Whether the other end says nothing any more. Nothing is heard at the end, and an empty packet is heard in the same way.
fn is_over(from: &impl AsFd) -> bool {
    let mut on = [PollFd::new(from.as_fd(), PollFlags::from_bits_retain(libc::POLLRDHUP))];
    poll(&mut on, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}
