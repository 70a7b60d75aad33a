//! A dead host's links end at once, however much memory it had.
//!
//! The kernel closes the sockets of a killed process only after it has freed the memory of the process, and a
//! VM's memory takes it 15 ms a gigabyte and more. So the standby would learn of the death late. In Linux each
//! thread of a dying process gives up its memory first (`exit_mm`) and then its descriptors (`exit_files`), but
//! only the last of them has to free the memory. A thread with a table of descriptors of its own, which is not
//! the last, closes them within microseconds.
//!
//! ```text
//! this process   keeper-1: writing end of a pipe ──────────┐ the first pipe that ends
//!                keeper-2: writing end of another pipe ────┤
//!                everybody else: the links ──duplicates──► the sentinel, a child process: ends the links
//! ```
//!
//! - There are two keepers, because one of them may be the last thread.
//! - The *sentinel* is this program again (`child.rs`), started by the steward where there is one. It has duplicates of
//!   the links, and `shutdown(2)` ends a connection although the dying process still has it. It does nothing else with
//!   a link, and nothing at all before a pipe ends. No thread ends a keeper, so a pipe ends only with the process.
//! - Nobody depends on the sentinel. If it dies, another is started; without one, links end as late as the
//!   kernel ends them. Messages to it never wait. A stopped sentinel is woken when this process dies
//!   (`PR_SET_PDEATHSIG` with SIGCONT), because its duplicates would keep the links alive.
//! - Whoever is done with a link must end it by `shutdown`, not by closing it, for the same reason.

mod child;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use nix::unistd::pipe2;

pub(crate) use child::command;

use crate::sandbox::{self, Ending, Pending};
use crate::strays::Strays;

/// The pause before a sentinel that has ended is replaced. It grows while they end soon.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(60));

static SENTINEL: OnceLock<Arc<Shared>> = OnceLock::new();

/// Starts keepers and sentinel. Without it, or when it fails, links end when the kernel ends them.
pub(crate) fn start() {
    if let Err(error) = try_start() {
        tracing::warn!(%error, "no sentinel: a standby will learn late when this process is killed");
    }
    // Whatever became of it: the keepers have their priority, and nobody needs one later.
    sandbox::end_real_time();
}

fn try_start() -> io::Result<()> {
    let pipes = [keeper("keeper-1")?, keeper("keeper-2")?];
    let shared = Arc::new(Shared::default());
    let first = shared.start_child(&pipes)?;
    let serving = shared.clone();
    // Their parent, for the kernel, is the thread that starts them.
    outlive_machine::spawn("sentinel", move || serving.replace(first, &pipes))?;
    SENTINEL.set(shared).map_err(|_| io::Error::other("it was started twice"))
}

/// Starts a thread that keeps the writing end of a pipe until the process ends. Returns the reading end.
fn keeper(name: &str) -> io::Result<OwnedFd> {
    let (reading, writing) = pipe2(OFlag::O_CLOEXEC)?;
    let (tell, told) = channel();
    let kept = writing.as_raw_fd();
    outlive_machine::spawn(name, move || {
        let alone = outlive_machine::keep_alone(kept);
        // On a host with more work than cores it would otherwise wait for its turn to die.
        outlive_machine::urgent();
        let is_alone = alone.is_ok();
        if tell.send(alone).is_ok() && is_alone {
            loop {
                std::thread::park();
            }
        }
    })?;
    told.recv().map_err(io::Error::other)??;
    // From here on the keeper's table has the only one.
    drop(writing);
    Ok(reading)
}

#[derive(Default)]
struct Shared(Mutex<State>);

/// What the sentinel cares for when this process dies.
#[derive(Clone)]
enum Ward {
    /// It is ended.
    Link(Weak<TcpStream>),
    /// They follow the guest.
    Strays(Weak<Strays>),
}

impl Ward {
    fn entrust(&self, channel: &OwnedFd, number: u64) {
        match self {
            Self::Link(link) => {
                if let Some(link) = link.upgrade() {
                    send(channel, &child::Order::Guard, number, &[link.as_raw_fd()]);
                }
            }
            Self::Strays(strays) => {
                let Some(strays) = strays.upgrade() else { return };
                let to = match strays.socket() {
                    Ok(to) => to,
                    Err(error) => return tracing::warn!(%error, "strays will not follow the guest"),
                };
                let (key, guest) = strays.secret();
                let order = child::Order::Follow { guest, key: key.clone() };
                // From here on only the sentinel has the socket.
                let with: Vec<RawFd> =
                    [to.as_fd()].into_iter().chain(strays.queues()).map(|it| it.as_raw_fd()).collect();
                send(channel, &order, number, &with);
            }
        }
    }
}

#[derive(Default)]
struct State {
    /// To the sentinel, while there is one.
    channel: Option<OwnedFd>,
    wards: BTreeMap<u64, Ward>,
    next: u64,
}

impl Shared {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn start_child(&self, pipes: &[OwnedFd; 2]) -> io::Result<Sentinel> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let child = match sandbox::steward() {
            Some(steward) => {
                let its = [theirs.as_fd(), pipes[0].as_fd(), pipes[1].as_fd()];
                Sentinel::Stewards(steward.sentinel(its).map_err(io::Error::other)?)
            }
            None => {
                let its = [theirs, pipes[0].try_clone()?, pipes[1].try_clone()?];
                Sentinel::Ours(spawn(its, false)?)
            }
        };
        self.with(|state| {
            for (number, ward) in &state.wards {
                ward.entrust(&ours, *number);
            }
            state.channel = Some(ours);
        });
        Ok(child)
    }

    /// Starts another sentinel whenever one has ended.
    fn replace(&self, first: Sentinel, pipes: &[OwnedFd; 2]) {
        let (shortest, longest) = PAUSE;
        let (mut child, mut pause) = (Some(first), shortest);
        loop {
            let began = Instant::now();
            let how = child.take().map(Sentinel::ending);
            self.with(|state| state.channel = None);
            if let Some(how) = how {
                tracing::warn!(how, "the sentinel has ended, another is started");
            }
            pause = if began.elapsed() > longest { shortest } else { pause };
            std::thread::sleep(pause);
            pause = (pause * 4).min(longest);
            match self.start_child(pipes) {
                Ok(started) => child = Some(started),
                Err(error) => tracing::warn!(%error, "cannot start a sentinel"),
            }
        }
    }
}

/// A sentinel that runs.
enum Sentinel {
    /// A child of this process.
    Ours(Child),
    /// This process may start none, so somebody else has.
    Stewards(Pending),
}

impl Sentinel {
    /// Waits for its end, and says how it ended.
    fn ending(self) -> String {
        match self {
            Self::Ours(mut child) => child.wait().map_or_else(|error| error.to_string(), |it| it.to_string()),
            Self::Stewards(pending) => match pending.ending() {
                Ok(Ending::Exited(status)) => status.to_string(),
                Ok(Ending::Killed) => "it was killed".into(),
                Err(error) => error.to_string(),
            },
        }
    }
}

/// Starts this program again as a sentinel, with its orders and the two pipes.
///
/// # Errors
/// The operating system's.
pub(crate) fn spawn([orders, first, second]: [OwnedFd; 3], confined: bool) -> io::Result<Child> {
    Command::new("/proc/self/exe")
        .arg0("outlive")
        .arg("sentinel")
        .args(confined.then_some("--confined"))
        .stdin(orders)
        .stdout(first)
        .stderr(second)
        // What a terminal sends to this process is not for it.
        .process_group(0)
        .spawn()
}

/// Never waits. A message that cannot be sent costs the sentinel's help for a link, or a descriptor.
fn send(channel: &OwnedFd, order: &child::Order, number: u64, descriptors: &[RawFd]) {
    let text = order.message(number);
    let with = [ControlMessage::ScmRights(descriptors)];
    let with = if descriptors.is_empty() { &[] } else { &with[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    if let Err(error) = sendmsg::<()>(channel.as_raw_fd(), &[IoSlice::new(&text)], with, flags, None) {
        tracing::debug!(%error, number, "the sentinel does not hear of a link");
    }
}

/// What the sentinel cares for when this process dies. Dropping it ends the sentinel's interest, and nothing else.
#[derive(Debug)]
pub(crate) struct Guarded(u64);

impl Drop for Guarded {
    fn drop(&mut self) {
        let Some(shared) = SENTINEL.get() else { return };
        shared.with(|state| {
            state.wards.remove(&self.0);
            if let Some(channel) = &state.channel {
                send(channel, &child::Order::Release, self.0, &[]);
            }
        });
    }
}

/// Ends this link as soon as this process dies. `None` without a sentinel.
pub(crate) fn guard(link: &Arc<TcpStream>) -> Option<Guarded> {
    Some(care_for(SENTINEL.get()?, Ward::Link(Arc::downgrade(link))))
}

/// Sends these strays after the guest as soon as this process dies. `None` without a sentinel.
pub(crate) fn guard_strays(strays: &Arc<Strays>) -> Option<Guarded> {
    Some(care_for(SENTINEL.get()?, Ward::Strays(Arc::downgrade(strays))))
}

fn care_for(shared: &Shared, ward: Ward) -> Guarded {
    shared.with(|state| {
        let number = state.next;
        state.next += 1;
        if let Some(channel) = &state.channel {
            ward.entrust(channel, number);
        }
        state.wards.insert(number, ward);
        Guarded(number)
    })
}
