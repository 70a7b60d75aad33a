//! A small process that keeps the rights of the start, and does for this one what needs them later.
//!
//! ```text
//! outlive run ──charter: what the command line named──► outlive steward
//!             ──ask, with a socket for the answer─────►   opens the tap and wires it
//!             ◄─answer, with descriptors───────────────   runs the fence command
//!                                                         starts a sentinel
//! ```
//!
//! - The first message is the *charter*. It is said before the guest, a peer or an image was looked at, and nothing
//!   can be added to it. Later only numbers are chosen: queues, MTU, VLAN, and what the fence command is told.
//! - Every ask has a socket of its own for its answer, so one that takes long holds up no other.
//! - It ends with its parent, and takes no signal before.

mod child;
mod message;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use outlive_epoch::Wiring;
use outlive_machine::Tap;

pub(crate) use child::command;
pub(super) use message::{AllowedVlan, Charter};
use message::{Ask, CardAsk, Ended, FenceAsk, hear, say};

use crate::standby::About;

/// Why something that needs rights was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StewardError {
    /// It cannot be started.
    #[error("cannot start the process that keeps this one's rights: {0}")]
    Start(#[source] io::Error),
    /// It cannot be asked.
    #[error("the process that keeps this one's rights (vm-steward) is gone or cannot be asked: {0}")]
    Gone(#[source] io::Error),
    /// It does not answer.
    #[error("the process that keeps this one's rights (vm-steward) does not answer")]
    Silent,
    /// It could not do it either.
    #[error("{0}")]
    Said(String),
}

/// The steward of this process.
pub(crate) struct Steward {
    channel: OwnedFd,
}

impl Steward {
    /// Starts it, with the rights that this process has now.
    pub(super) fn start(charter: &Charter) -> Result<Self, StewardError> {
        let start = || -> io::Result<OwnedFd> {
            let (ours, theirs) = pair()?;
            Command::new("/proc/self/exe")
                .arg0("outlive")
                .arg("steward")
                .stdin(theirs)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                // What a terminal sends to this process is not for it.
                .process_group(0)
                .spawn()?;
            say(&ours, charter, &[])?;
            Ok(ours)
        };
        Ok(Self { channel: start().map_err(StewardError::Start)? })
    }

    /// The tap that the command line named, wired as it says.
    ///
    /// # Errors
    /// See [`StewardError`].
    pub(crate) fn card(&self, tap: &str, pairs: u16, wiring: Wiring) -> Result<Tap, StewardError> {
        let ask = Ask::Card(CardAsk { pairs, mtu: wiring.mtu, vlan: wiring.vlan });
        let (answer, queues) = self.ask(&ask, &[])?.wait::<Result<(), String>>()?;
        answer.map_err(StewardError::Said)?;
        Ok(Tap::of_queues(tap, queues))
    }

    /// Begins to run the fence command. What it says goes into `output`.
    ///
    /// # Errors
    /// See [`StewardError`].
    pub(crate) fn fence(
        &self,
        about: &About,
        attempt: u32,
        output: BorrowedFd<'_>,
    ) -> Result<Pending, StewardError> {
        self.ask(&Ask::Fence(FenceAsk { about: about.clone(), attempt }), &[output])
    }

    /// Starts a sentinel with these descriptors. The answer comes when it has ended.
    ///
    /// # Errors
    /// See [`StewardError`].
    pub(crate) fn sentinel(&self, its: [BorrowedFd<'_>; 3]) -> Result<Pending, StewardError> {
        self.ask(&Ask::Sentinel, &its)
    }

    /// Whether it has ended.
    pub(crate) fn is_gone(&self) -> bool {
        let mut on = [PollFd::new(self.channel.as_fd(), PollFlags::empty())];
        poll(&mut on, PollTimeout::ZERO).is_ok_and(|count| count > 0)
    }

    fn ask(&self, ask: &Ask, with: &[BorrowedFd<'_>]) -> Result<Pending, StewardError> {
        let (ours, theirs) = pair().map_err(StewardError::Gone)?;
        let with: Vec<_> = std::iter::once(theirs.as_fd()).chain(with.iter().copied()).collect();
        say(&self.channel, ask, &with).map_err(StewardError::Gone)?;
        Ok(Pending(ours))
    }
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// An ask without an answer so far.
pub(crate) struct Pending(OwnedFd);

impl Pending {
    fn wait<T: serde::de::DeserializeOwned>(self) -> Result<(T, Vec<OwnedFd>), StewardError> {
        let gone = || StewardError::Gone(io::ErrorKind::UnexpectedEof.into());
        hear(&self.0).map_err(StewardError::Gone)?.ok_or_else(gone)
    }

    /// How the program ended that was asked for, if it does within this time. `Ok(None)`: not yet.
    ///
    /// # Errors
    /// See [`StewardError`].
    pub(crate) fn ended_within(&self, time: Duration) -> Result<Option<Ending>, StewardError> {
        let mut on = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        match poll(&mut on, PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX)) {
            Ok(0) | Err(Errno::EINTR) => Ok(None),
            Err(error) => Err(StewardError::Gone(error.into())),
            Ok(_) => self.ending().map(Some),
        }
    }

    /// How the program ended; waits for it.
    ///
    /// # Errors
    /// See [`StewardError`].
    pub(crate) fn ending(&self) -> Result<Ending, StewardError> {
        match hear::<Result<Ended, String>>(&self.0).map_err(StewardError::Gone)? {
            Some((Ok(Ended::By(status)), _)) => Ok(Ending::Exited(ExitStatus::from_raw(status))),
            Some((Ok(Ended::Killed), _)) => Ok(Ending::Killed),
            Some((Err(why), _)) => Err(StewardError::Said(why)),
            None => Err(StewardError::Gone(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

/// How a program ended.
pub(crate) enum Ending {
    /// By itself.
    Exited(ExitStatus),
    /// It took too long.
    Killed,
}
