//! The steward's own process.
//!
//! Its standard input is the socket on which it is asked. It believes its parent nothing that the charter does not say:
//! by the time it is asked, the parent may belong to a guest.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
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
/// Most sentinels at a time: one that runs, and one that replaces it. They have a priority before everybody's.
const MOST_SENTINELS: usize = 2;

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
    obey(&orders, charter)
}

/// Does what is asked for, until the parent has ended.
fn obey(orders: &impl AsFd, charter: Charter) -> io::Result<()> {
    let charter = Arc::new(charter);
    let (busy, sentinels) = (Arc::new(()), Arc::new(()));
    loop {
        let (ask, descriptors) = match hear::<Ask>(orders) {
            Ok(Some(heard)) => heard,
            Ok(None) => return Ok(()),
            // Its parent may be somebody else's by now. What it may ask for is all that it gets, and no word of it ends this
            // process, which others need.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => continue,
            Err(error) => return Err(error),
        };
        // Who asks for more at a time is no VM of ours. The answer's socket closes, which is an answer.
        if Arc::strong_count(&busy) > MOST_ASKS {
            continue;
        }
        let watches = matches!(ask, Ask::Sentinel).then(|| place(&sentinels));
        if matches!(watches, Some(None)) {
            continue;
        }
        let (charter, busy) = (charter.clone(), busy.clone());
        // The thread that starts a program lives until the program has ended, and so does the program's parent. Without a
        // thread there is no answer, and whoever has asked hears that.
        let started = outlive_machine::spawn("ask", move || {
            let _busy = (busy, watches);
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

/// A place for one more sentinel, until it is dropped.
fn place(sentinels: &Arc<()>) -> Option<Arc<()>> {
    (Arc::strong_count(sentinels) <= MOST_SENTINELS).then(|| sentinels.clone())
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
    if !charter.vlan.allows(wiring.vlan) {
        return Err(format!("the card's VLAN is not that of --net: {ask:?}"));
    }
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
    // Another socket may have something to say for ever, and the sentinel would hear it at real-time priority.
    if !is_pair(&descriptors[0]) {
        return Err("a sentinel hears its orders on a socket of its own kind".into());
    }
    let status = sentinel::spawn(descriptors, true).and_then(|mut child| child.wait());
    status.map(|status| Ended::By(status.into_raw())).map_err(|error| error.to_string())
}

/// Whether it is one end of a pair as [`pair`](super::pair) makes it.
fn is_pair(socket: &OwnedFd) -> bool {
    let kind = rustix::net::sockopt::socket_type(socket);
    let domain = rustix::net::sockopt::socket_domain(socket);
    (domain, kind) == (Ok(rustix::net::AddressFamily::UNIX), Ok(rustix::net::SocketType::SEQPACKET))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::thread;

    use rustix::net::SendFlags;

    use super::super::message::AllowedVlan;
    use super::super::pair;
    use super::*;

    /// An ask for a card without a charter for one, and the answer.
    fn answer(ours: &OwnedFd) -> Result<(), String> {
        let (mine, theirs) = pair().unwrap();
        let ask = Ask::Card(CardAsk { pairs: 1, mtu: None, vlan: None });
        say(ours, &ask, &[theirs.as_fd()]).unwrap();
        drop(theirs);
        hear::<Result<(), String>>(&mine).unwrap().expect("an answer").0
    }

    #[test]
    fn noise_does_not_end_it_and_the_end_of_its_parent_does() {
        let (ours, theirs) = pair().unwrap();
        let steward = thread::spawn(move || obey(&theirs, Charter::default()));
        for noise in ["", "{", "x", "", "", "{\"Card\":{\"pairs\":1", "\"Fence\""] {
            let sent = rustix::net::send(&ours, noise.as_bytes(), SendFlags::NOSIGNAL).unwrap();
            assert_eq!(sent, noise.len());
            assert_eq!(answer(&ours), Err("no --net was given".into()), "after {noise:?}");
        }
        assert!(!steward.is_finished());
        drop(ours);
        steward.join().unwrap().unwrap();
    }

    #[test]
    fn a_card_is_in_the_vlan_that_the_operator_has_said() {
        let refused = |vlan: AllowedVlan, asked| {
            let charter = Charter { card: Some(("nobody0".into(), None)), vlan, fence: None };
            // As the steward hears it.
            let charter = serde_json::from_str(&serde_json::to_string(&charter).unwrap()).unwrap();
            // No card can have no queues, so none is made here.
            let why = open_card(&charter, &CardAsk { pairs: 0, mtu: None, vlan: asked }).unwrap_err();
            why.contains("not that of --net")
        };
        let (ten, none) = (AllowedVlan::Only(Some(10)), AllowedVlan::Only(None));
        assert!(refused(ten, Some(1)) && refused(ten, None) && refused(none, Some(10)));
        assert!(!refused(ten, Some(10)) && !refused(none, None));
        assert!(!refused(AllowedVlan::Any, Some(10)) && !refused(AllowedVlan::Any, None));
    }

    #[test]
    fn a_sentinel_hears_its_orders_on_a_pair_only() {
        let (ours, _theirs) = pair().unwrap();
        assert!(is_pair(&ours));
        let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (pipe, writing) = nix::unistd::pipe().unwrap();
        for other in [OwnedFd::from(udp), OwnedFd::from(stream), pipe] {
            assert!(!is_pair(&other));
            let three = vec![other, writing.try_clone().unwrap(), writing.try_clone().unwrap()];
            assert!(run_sentinel(three).unwrap_err().contains("of its own kind"));
        }
    }

    #[test]
    fn one_sentinel_replaces_another_and_no_third_one_runs() {
        let sentinels = Arc::new(());
        let (first, second) = (place(&sentinels), place(&sentinels));
        assert!(first.is_some() && second.is_some() && place(&sentinels).is_none());
        drop(first);
        assert!(place(&sentinels).is_some());
    }

    /// Whoever has the other end can say that nothing follows and keep it. Nobody waits for him, and nobody is busy.
    #[test]
    fn an_end_that_is_only_said_is_one() {
        let (ours, theirs) = pair().unwrap();
        rustix::net::shutdown(&ours, rustix::net::Shutdown::Write).unwrap();
        obey(&theirs, Charter::default()).unwrap();
        drop(ours);
    }
}
