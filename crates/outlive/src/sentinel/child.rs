//! The child process: waits for the end of its parent, and ends the parent's links.
//!
//! Its standard input is the socket on which it hears of links; standard output and standard error are the
//! reading ends of the keepers' pipes. So it has these three and the duplicates of the links, and nothing that
//! another reader could wait for.

use std::collections::BTreeMap;
use std::io::{self, IoSliceMut, stderr, stdin, stdout};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, Shutdown, recvmsg, shutdown};
use nix::unistd::close;

use crate::{exit, sandbox};

/// The most links that it keeps; a host has a handful.
const MOST: usize = 1024;
const MESSAGE: usize = 9;

/// What the parent says about a link: an order and the link's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// End this link, which comes with the message, when I die.
    Guard = 1,
    /// I am done with this link.
    Release = 2,
}

impl Order {
    pub(super) fn message(self, number: u64) -> [u8; MESSAGE] {
        let mut message = [self as u8; MESSAGE];
        message[1..].copy_from_slice(&number.to_le_bytes());
        message
    }

    fn parse(message: &[u8]) -> Option<(Self, u64)> {
        let (&order, number) = message.split_first()?;
        let number = u64::from_le_bytes(number.try_into().ok()?);
        let order = [Self::Guard, Self::Release].into_iter().find(|it| *it as u8 == order)?;
        Some((order, number))
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

/// The duplicates of the parent's links, by their numbers.
#[derive(Default)]
pub(super) struct Links(BTreeMap<u64, RawFd>);

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
            // Also when the parent is dead: links that it had told of are still on their way.
            let heard = self.listen(orders.as_raw_fd());
            // Whatever it has heard: the links that it has are its last duty.
            if dead {
                self.end();
            }
            if heard? || dead {
                return Ok(());
            }
        }
    }

    /// Hears everything that the parent has said. Returns whether it says nothing any more.
    fn listen(&mut self, orders: RawFd) -> io::Result<bool> {
        let mut text = [0; MESSAGE];
        let mut room = nix::cmsg_space!([RawFd; 1]);
        loop {
            let mut text = [IoSliceMut::new(&mut text)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
            let heard = match recvmsg::<()>(orders, &mut text, Some(&mut room), flags) {
                Ok(heard) => heard,
                Err(Errno::EAGAIN) => return Ok(false),
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            if heard.bytes == 0 {
                return Ok(true);
            }
            let rights = heard.cmsgs()?.filter_map(|it| match it {
                ControlMessageOwned::ScmRights(links) => Some(links),
                _ => None,
            });
            let links: Vec<RawFd> = rights.flatten().collect();
            let order = heard.iovs().next().and_then(Order::parse);
            self.carry_out(order, &links);
        }
    }

    pub(super) fn carry_out(&mut self, order: Option<(Order, u64)>, links: &[RawFd]) {
        let unused = match (order, links) {
            (Some((Order::Guard, number)), &[link]) if self.0.len() < MOST => self.0.insert(number, link),
            (Some((Order::Release, number)), _) => self.0.remove(&number),
            (_, links) => links.first().copied(),
        };
        if let Some(unused) = unused {
            close(unused).ok();
        }
    }

    /// The peers read to the end what is on its way to them, and then the end. Not for reading too: then Linux
    /// answers everything that still comes with a reset, which may overtake the rest.
    fn end(&self) {
        for link in self.0.values() {
            // An error means that the connection is gone already.
            shutdown(*link, Shutdown::Write).ok();
        }
    }
}
