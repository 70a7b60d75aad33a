//! The child process: waits for the end of its parent, and ends the parent's links.
//!
//! Its standard input is the socket on which it hears of links; standard output and standard error are the
//! reading ends of the keepers' pipes. So it has these three and the duplicates of the links, and nothing that
//! another reader could wait for.

use std::collections::BTreeMap;
use std::io::{self, IoSliceMut, stderr, stdin, stdout};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{Shutdown, shutdown};
use outlive_epoch::StrayKey;
use outlive_machine::MacAddr;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::strays::{By, Forwarder};
use crate::{exit, sandbox};

/// The most wards that it keeps; a host has a handful.
const MOST: usize = 1024;
/// Most messages that are heard before the pipes are looked at again: more than a socket holds for an honest parent.
const TURNS: usize = 4 * MOST;
/// A message about strays: order, number, the guest's address, the key.
const MESSAGE: usize = 9 + 6 + 32;
/// Most descriptors that come with a message: a socket, and a queue for each pair of a card.
const DESCRIPTORS: usize = 1 + 8;

/// What the parent says. Each message has the ward's number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// End this link, which comes with the message, when I die.
    Guard,
    /// I am done with this link, or with these strays.
    Release,
    /// Send what comes to these queues of a tap to the standby when I die. The socket comes with the message, and the
    /// queues behind it.
    Follow { guest: MacAddr, key: StrayKey },
}

impl Order {
    pub(super) fn message(&self, number: u64) -> Vec<u8> {
        let mut message = vec![match self {
            Self::Guard => 1,
            Self::Release => 2,
            Self::Follow { .. } => 3,
        }];
        message.extend_from_slice(&number.to_le_bytes());
        if let Self::Follow { guest, key } = self {
            message.extend_from_slice(&guest.0);
            message.extend_from_slice(&key.0);
        }
        message
    }

    pub(super) fn parse(message: &[u8]) -> Option<(Self, u64)> {
        let (&order, rest) = message.split_first()?;
        let (number, rest) = rest.split_first_chunk()?;
        let order = match (order, rest.len()) {
            (1, 0) => Self::Guard,
            (2, 0) => Self::Release,
            (3, _) => {
                let (guest, key) = rest.split_first_chunk()?;
                Self::Follow { guest: MacAddr(*guest), key: StrayKey(key.try_into().ok()?) }
            }
            _ => return None,
        };
        Some((order, u64::from_le_bytes(*number)))
    }
}

/// Carries out `outlive sentinel`. Returns the exit code.
pub(crate) fn command(confined: bool) -> u8 {
    // It ends with its parent and never before: nobody else tells it to. SIGKILL and SIGSTOP remain.
    let hardened = SigSet::all().thread_block().and_then(|()| {
        prctl::set_name(c"vm-sentinel")?;
        // If somebody has stopped it, the end of the parent wakes it. A stopped sentinel would keep the links
        // of its dead parent alive.
        prctl::set_pdeathsig(Signal::SIGCONT)
    });
    sandbox::bound_real_time();
    outlive_machine::urgent();
    if confined {
        sandbox::enter_sentinel();
    }
    let (orders, first, second) = (stdin(), stdout(), stderr());
    let serve = || Links::default().serve(orders.as_fd(), [first.as_fd(), second.as_fd()]);
    match hardened.map_err(io::Error::from).and_then(|()| serve()) {
        Ok(()) => exit::OK,
        Err(error) => exit::usage(format!(
            "a sentinel is started by `outlive run` and `outlive standby`, not by hand: {error}"
        )),
    }
}

/// What the parent has given into its care.
enum Ward {
    /// A duplicate of a link.
    Link(OwnedFd),
    /// Frames that come to a tap's queues too late.
    Strays { to: OwnedFd, queues: Vec<OwnedFd>, guest: MacAddr, key: StrayKey },
}

/// The parent's wards, by their numbers.
#[derive(Default)]
pub(super) struct Links(BTreeMap<u64, Ward>);

impl Links {
    /// Returns when one of the pipes ends, after ending the links, or when there are no more orders.
    pub(super) fn serve(&mut self, orders: BorrowedFd<'_>, pipes: [BorrowedFd<'_>; 2]) -> io::Result<()> {
        let [first, second] = pipes;
        loop {
            let mut on = [
                PollFd::new(orders, PollFlags::POLLIN),
                PollFd::new(first, PollFlags::empty()),
                PollFd::new(second, PollFlags::empty()),
            ];
            match poll(&mut on, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                answer => answer?,
            };
            let over = |pipe: &PollFd<'_>| pipe.any() == Some(true);
            let dead = over(&on[1]) || over(&on[2]);
            // An error of the socket that no message explains would be there at every turn.
            let odd = on[0]
                .revents()
                .is_some_and(|it| !it.difference(PollFlags::POLLIN | PollFlags::POLLHUP).is_empty());
            // Also when the parent is dead: links that it had told of are still on their way.
            let heard = self.listen(orders);
            // Whatever it has heard: what it has in its care is its last duty, the links first.
            if dead {
                self.end();
                self.follow();
            }
            if heard? || dead || odd {
                return Ok(());
            }
        }
    }

    /// Hears what the parent has said, but not for longer than [`TURNS`]: the pipes count more. Returns whether it says
    /// nothing any more.
    fn listen(&mut self, orders: BorrowedFd<'_>) -> io::Result<bool> {
        let mut text = [0; MESSAGE];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        for _ in 0..TURNS {
            let mut rights = RecvAncillaryBuffer::new(&mut room);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let heard = match recvmsg(orders, &mut [IoSliceMut::new(&mut text)], &mut rights, flags) {
                Ok(heard) => heard.bytes,
                Err(rustix::io::Errno::AGAIN) => return Ok(false),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            if heard == 0 {
                return Ok(true);
            }
            let came = rights.drain().filter_map(|it| match it {
                RecvAncillaryMessage::ScmRights(these) => Some(these),
                _ => None,
            });
            let came = came.flatten().collect();
            self.carry_out(Order::parse(&text[..heard]), came);
        }
        Ok(false)
    }

    pub(super) fn carry_out(&mut self, order: Option<(Order, u64)>, came: Vec<OwnedFd>) {
        let Some((order, number)) = order else { return };
        let mut came = came.into_iter();
        let ward = match (order, came.next()) {
            (Order::Release, _) => {
                self.0.remove(&number);
                None
            }
            (Order::Guard, Some(link)) => Some(Ward::Link(link)),
            (Order::Follow { guest, key }, Some(to)) => {
                Some(Ward::Strays { to, queues: came.collect(), guest, key })
            }
            (_, None) => None,
        };
        if let Some(ward) = ward.filter(|_| self.0.len() < MOST) {
            self.0.insert(number, ward);
        }
    }

    /// The peers read to the end what is on its way to them, and then the end. Not for reading too: then Linux
    /// answers everything that still comes with a reset, which may overtake the rest.
    fn end(&self) {
        for ward in self.0.values() {
            if let Ward::Link(link) = ward {
                // An error means that the connection is gone already.
                shutdown(link.as_raw_fd(), Shutdown::Write).ok();
            }
        }
    }

    /// The last duty, which takes a while: see [`strays`](crate::strays). A process has one VM, and so one card.
    fn follow(&mut self) {
        for ward in std::mem::take(&mut self.0).into_values() {
            if let Ward::Strays { to, queues, guest, key } = ward {
                let queues = queues.iter().map(AsFd::as_fd);
                Forwarder::new(queues, to.as_fd(), &key, By::Sentinel, guest).forward(|| true);
            }
        }
    }
}
