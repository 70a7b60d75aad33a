//! Faults of the hosts.

use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::play::Play;
use crate::support::{Held, MEMORY, Side, World, take_program_memory};

/// A kind of fault. `Owner` is the host that runs the VM, `Other` is its standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    KillOwner,
    KillOther,
    KillOwnerUnprotected,
    KillOtherUnprotected,
    StopOwner,
    StopOther,
    HoldThreadOfOwner,
    HoldThreadOfOther,
    TakeMemory,
    CutLink,
    CutToOther,
    CutToOwner,
    CutToOtherAndKill,
    SlowLink,
    SlowLinkAndKill,
    ArbiterGoneAndKillOwner,
    ArbiterGoneAndKillOther,
    ArbiterGoneAndCut,
    FullDiskAndKill,
    DeafEventsAndKill,
    LeaveOther,
    EndOwner,
}

use Kind::*;

/// All kinds; the most important ones occur more than once.
const DRAWN: [Kind; 30] = [
    KillOwner,
    KillOwner,
    KillOwner,
    KillOther,
    KillOwnerUnprotected,
    KillOtherUnprotected,
    StopOwner,
    StopOwner,
    StopOwner,
    StopOther,
    HoldThreadOfOwner,
    HoldThreadOfOwner,
    HoldThreadOfOther,
    TakeMemory,
    CutLink,
    CutLink,
    CutToOther,
    CutToOther,
    CutToOwner,
    CutToOwner,
    CutToOtherAndKill,
    CutToOtherAndKill,
    SlowLink,
    SlowLinkAndKill,
    ArbiterGoneAndKillOwner,
    ArbiterGoneAndKillOther,
    ArbiterGoneAndCut,
    FullDiskAndKill,
    DeafEventsAndKill,
    LeaveOther,
];

/// By then a standby has given up its primary.
const DEAD: Duration = Duration::from_millis(1200);

/// One of this many rounds ends the VM in order, and another VM begins.
const END_ONE_IN: u64 = 40;

impl Kind {
    /// The next fault.
    pub(super) fn draw(play: &mut Play) -> Kind {
        if play.dice.below(END_ONE_IN) == 0 {
            return EndOwner;
        }
        let kind = DRAWN[play.dice.below(DRAWN.len() as u64) as usize];
        // Soon after a takeover a host fault counts as the guest's own doing.
        if kind == TakeMemory && !play.may_take_memory() { HoldThreadOfOwner } else { kind }
    }

    /// Its name in the table.
    pub(super) fn name(self) -> &'static str {
        match self {
            KillOwner => "SIGKILL of the primary",
            KillOther => "SIGKILL of the standby",
            KillOwnerUnprotected => "SIGKILL of the primary, early",
            KillOtherUnprotected => "SIGKILL of the standby, early",
            StopOwner => "SIGSTOP of the primary",
            StopOther => "SIGSTOP of the standby",
            HoldThreadOfOwner => "a thread of the primary is held",
            HoldThreadOfOther => "a thread of the standby is held",
            TakeMemory => "the primary loses memory",
            CutLink => "link cut",
            CutToOther => "link cut towards the standby",
            CutToOwner => "link cut towards the primary",
            CutToOtherAndKill => "link cut, SIGKILL of the primary",
            SlowLink => "slow link",
            SlowLinkAndKill => "slow link, SIGKILL of the primary",
            ArbiterGoneAndKillOwner => "no arbiter, SIGKILL of the primary",
            ArbiterGoneAndKillOther => "no arbiter, SIGKILL of the standby",
            ArbiterGoneAndCut => "no arbiter, link cut",
            FullDiskAndKill => "full disks, SIGKILL of the primary",
            DeafEventsAndKill => "events unread, SIGKILL",
            LeaveOther => "orderly stop of the standby",
            EndOwner => "orderly stop of the VM",
        }
    }

    /// Whether it strikes before the VM is protected again.
    pub(super) fn is_early(self) -> bool {
        matches!(self, KillOwnerUnprotected | KillOtherUnprotected)
    }

    /// A stopped host may already have decided to send a frame, and sends it when it continues.
    pub(super) fn may_send_late(self) -> bool {
        matches!(self, StopOwner | HoldThreadOfOwner)
    }

    /// A requirement that this machine lacks.
    pub(super) fn missing(self, world: &World) -> Option<&'static str> {
        let has = |words: &[&str]| world.command(Side::A, words);
        match self {
            CutToOther | CutToOwner | CutToOtherAndKill if !has(&["ip", "-V"]) => Some("ip"),
            SlowLink | SlowLinkAndKill if !slow(world, Side::A, "100mbit") || !fast(world, Side::A) => {
                Some("tc, or the kernel's tbf")
            }
            _ => None,
        }
    }
}

fn slow(world: &World, side: Side, rate: &str) -> bool {
    let words = [
        "tc",
        "qdisc",
        "add",
        "dev",
        World::link(side),
        "root",
        "tbf",
        "rate",
        rate,
        "burst",
        "64k",
        "latency",
    ];
    world.command(side, &[&words[..], &["100ms"]].concat())
}

fn fast(world: &World, side: Side) -> bool {
    world.command(side, &["tc", "qdisc", "del", "dev", World::link(side), "root"])
}

/// Until this is undone, packets from one host to the other go to an address that nobody has.
fn cut_from(world: &World, side: Side) {
    let (there, link) = (side.other().link_ip().to_string(), World::link(side));
    let words =
        ["ip", "neigh", "replace", &there, "lladdr", "02:de:ad:00:00:01", "dev", link, "nud", "permanent"];
    assert!(world.command(side, &words), "{words:?}");
}

fn mend_from(world: &World, side: Side) {
    let there = side.other().link_ip().to_string();
    assert!(world.command(side, &["ip", "neigh", "del", &there, "dev", World::link(side)]));
}

/// Carries out the fault. When this returns the hosts are whole again, if they live.
pub(super) fn strike(play: &mut Play, kind: Kind) {
    let (owner, other) = (play.owner, play.owner.other());
    let length = Duration::from_micros(20_000 + play.dice.below(1_400_000));
    match kind {
        KillOwner | KillOwnerUnprotected => play.kill(owner),
        KillOther | KillOtherUnprotected => play.kill(other),
        StopOwner => stop(play, owner, length),
        StopOther => stop(play, other, length),
        HoldThreadOfOwner => hold(play, owner, length),
        HoldThreadOfOther => hold(play, other, length),
        TakeMemory => take_program_memory(play.process(owner), MEMORY),
        CutLink => cut(play, length),
        CutToOther => one_way(play, owner, length),
        CutToOwner => one_way(play, other, length),
        CutToOtherAndKill => {
            // Neither side has given up the other yet: frames that leave now, if any, are not committed.
            cut_from(&play.world, owner);
            play.wait(length / 6);
            play.kill(owner);
            // The kernel would continue to send for the dead process.
            play.wait(DEAD);
            mend_from(&play.world, owner);
        }
        SlowLink => slowly(play, |play| play.wait(length)),
        SlowLinkAndKill => slowly(play, |play| {
            play.wait(length / 2);
            play.kill(owner);
            play.wait(length / 2);
        }),
        ArbiterGoneAndKillOwner => no_arbiter(play, length, |play| play.kill(owner)),
        ArbiterGoneAndKillOther => no_arbiter(play, length, |play| play.kill(other)),
        ArbiterGoneAndCut => no_arbiter(play, length, |play| cut(play, length)),
        FullDiskAndKill => full(play, length),
        DeafEventsAndKill => {
            play.deafen(true);
            play.wait(length / 4);
            play.kill(owner);
            play.wait(length);
            play.deafen(false);
        }
        LeaveOther => play.signal(other, Signal::SIGTERM),
        EndOwner => play.signal(owner, Signal::SIGTERM),
    }
}

fn stop(play: &mut Play, side: Side, length: Duration) {
    play.signal(side, Signal::SIGSTOP);
    play.wait(length);
    play.signal(side, Signal::SIGCONT);
}

fn hold(play: &mut Play, side: Side, length: Duration) {
    let number = play.dice.below(1 << 20);
    if let Some((held, name)) = Held::any(play.process(side), number) {
        play.tell(format!("hold {name} for {length:?}"));
        play.wait(length);
        drop(held);
    }
}

fn cut(play: &mut Play, length: Duration) {
    play.world.cut_link();
    play.wait(length);
    play.world.mend_link();
}

fn one_way(play: &mut Play, from: Side, length: Duration) {
    cut_from(&play.world, from);
    play.wait(length);
    mend_from(&play.world, from);
}

fn slowly(play: &mut Play, meanwhile: impl FnOnce(&mut Play)) {
    let rate = format!("{}mbit", 5 + play.dice.below(95));
    play.tell(format!("{rate}/s"));
    assert!(Side::BOTH.iter().all(|&side| slow(&play.world, side, &rate)), "tc");
    meanwhile(play);
    assert!(Side::BOTH.iter().all(|&side| fast(&play.world, side)), "tc");
}

fn no_arbiter(play: &mut Play, length: Duration, meanwhile: impl FnOnce(&mut Play)) {
    let (here, away) = (play.world.arbiter(), play.world.dir().join("away"));
    fs::rename(&here, &away).unwrap();
    meanwhile(play);
    play.wait(length);
    fs::rename(&away, &here).unwrap();
}

fn full(play: &mut Play, length: Duration) {
    play.disks.iter().for_each(|disk| disk.fill());
    play.wait(length / 4);
    play.kill(play.owner);
    play.wait(length);
    play.disks.iter().for_each(|disk| disk.make_room());
}
