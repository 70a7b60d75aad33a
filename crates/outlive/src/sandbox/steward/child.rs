//! The steward's own process.
//!
//! Its standard input is the socket on which it is asked. It believes its parent nothing that the charter does not say:
//! by the time it is asked, the parent may belong to a guest.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use outlive_epoch::Wiring;
use outlive_machine::Tap;
use outlive_machine::devices::virtio::net::MAX_PAIRS;

use super::Ending;
use super::message::{Ask, CardAsk, Charter, Ended, FenceAsk, hear, say};
use crate::cli::NetSpec;
use crate::sandbox::privileges;
use crate::standby::{Fence, run_fence_command};
use crate::{exit, sentinel, vm};

/// Most asks at a time: a sentinel that runs, one that replaces it, a card, a fence command.
const MOST_ASKS: usize = 8;

/// Carries out `outlive steward`. Returns the exit code.
pub(crate) fn command() -> u8 {
    // It ends with its parent and never before: nobody else tells it to. SIGKILL and SIGSTOP remain.
    let hardened = SigSet::all().thread_block().and_then(|()| {
        prctl::set_name(c"vm-steward")?;
        // If somebody has stopped it, the end of the parent wakes it, and it hears of the end.
        prctl::set_pdeathsig(Signal::SIGCONT)
    });
    // With it, the right to fence and to make a card would go. Needs a right that root of a container may lack.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    match hardened.map_err(io::Error::from).and_then(|()| serve()) {
        Ok(()) => exit::OK,
        Err(error) => exit::usage(format!(
            "a steward is started by `outlive run` and `outlive standby`, not by hand: {error}"
        )),
    }
}

fn serve() -> io::Result<()> {
    let orders = io::stdin();
    let Some((charter, _)) = hear::<Charter>(&orders)? else { return Ok(()) };
    privileges::keep_for_steward(&charter)?;
    let charter = Arc::new(charter);
    let busy = Arc::new(());
    loop {
        let (ask, descriptors) = match hear::<Ask>(&orders) {
            Ok(Some(heard)) => heard,
            Ok(None) => return Ok(()),
            // Its parent may be somebody else's by now. What it may ask for is all that it gets.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => continue,
            Err(error) => return Err(error),
        };
        // Who asks for more at a time is no VM of ours. The answer's socket closes, which is an answer.
        if Arc::strong_count(&busy) > MOST_ASKS {
            continue;
        }
        let (charter, busy) = (charter.clone(), busy.clone());
        // The thread that starts a program lives until the program has ended, and so does the program's parent. Without a
        // thread there is no answer, and whoever has asked hears that.
        let started = outlive_machine::spawn("ask", move || {
            let _busy = busy;
            let mut descriptors = descriptors.into_iter();
            let Some(answer) = descriptors.next() else { return };
            // Whoever has asked may be gone.
            let _ = match ask {
                Ask::Card(ask) => carry_card(&answer, open_card(&charter, &ask)),
                Ask::Fence(ask) => say(&answer, &fence(&charter, ask, descriptors.next()), &[]),
                Ask::Sentinel => say(&answer, &run_sentinel(descriptors.collect()), &[]),
            };
        });
        started.ok();
    }
}

fn carry_card(answer: &OwnedFd, card: Result<Tap, String>) -> io::Result<()> {
    match card {
        Ok(tap) => say(answer, &Ok::<(), String>(()), &tap.queues().collect::<Vec<_>>()),
        Err(why) => say(answer, &Err::<(), String>(why), &[]),
    }
}

fn open_card(charter: &Charter, ask: &CardAsk) -> Result<Tap, String> {
    let (tap, bridge) = charter.card.clone().ok_or("no --net was given")?;
    let wiring = Wiring { mtu: ask.mtu, vlan: ask.vlan };
    let good = (1..=MAX_PAIRS).contains(&ask.pairs)
        && wiring.mtu.is_none_or(|mtu| mtu >= Wiring::MIN_MTU)
        && wiring.vlan.is_none_or(|vlan| (1..=Wiring::MAX_VLAN).contains(&vlan));
    if !good {
        return Err(format!("no card can be so: {ask:?}"));
    }
    let net = NetSpec { tap, bridge, mac: None, queues: 1, mtu: wiring.mtu, vlan: wiring.vlan };
    vm::place_card(&net, ask.pairs, wiring).map_err(|error| error.to_string())
}

fn fence(charter: &Charter, ask: FenceAsk, output: Option<OwnedFd>) -> Result<Ended, String> {
    let (command, limit) = charter.fence.clone().ok_or("no --fence was given")?;
    let output = output.ok_or("the fence command's output has no place")?;
    let ended = run_fence_command(&Fence { command, limit }, &ask.about, ask.attempt, output, || {});
    match ended.map_err(|error| error.to_string())? {
        Ending::Exited(status) => Ok(Ended::By(status.into_raw())),
        Ending::Killed => Ok(Ended::Killed),
    }
}

fn run_sentinel(descriptors: Vec<OwnedFd>) -> Result<Ended, String> {
    let descriptors =
        <[OwnedFd; 3]>::try_from(descriptors).map_err(|_| "a sentinel has three descriptors")?;
    let status = sentinel::spawn(descriptors, true).and_then(|mut child| child.wait());
    status.map(|status| Ended::By(status.into_raw())).map_err(|error| error.to_string())
}
