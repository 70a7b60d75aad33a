//! Faults of the hosts.

use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use outlive::network::Netlink;

use super::play::Play;
use crate::support::{Held, MEMORY, PROGRAM, Pace, Side, World, take_all_memory, take_program_memory};

/// A kind of fault. `Owner` is the host that runs the VM, `Other` is its standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    KillOwner,
    KillOther,
    KillOwnerUnprotected,
    KillOtherUnprotected,
    KillBoth,
    KillBothAndOneCommand,
    StopOwner,
    StopOther,
    HoldThreadOfOwner,
    HoldThreadOfOther,
    TakeMemory,
    TakeMemoryOfOther,
    CutLink,
    CutToOther,
    CutToOwner,
    CutToOtherAndKill,
    CutUplink,
    SlowLink,
    SlowLinkAndKill,
    ArbiterGoneAndKillOwner,
    ArbiterGoneAndKillOther,
    ArbiterGoneAndCut,
    ArbiterKilledAndKillOwner,
    ArbiterKilledAndCut,
    ArbiterFrozenAndKillOwner,
    ArbiterFrozenAndCut,
    ArbiterHiddenFromOwnerAndCut,
    ArbiterHiddenFromOtherAndCut,
    ArbiterHiddenFromOtherAndKill,
    MemberCutOffAndKillOwner,
    MemberCutOffAndCut,
    LeaderCutOffAndKillOwner,
    LeaderCutOffAndCut,
    SlowArbiterAndKill,
    SlowArbiterAndCut,
    SlowArbiterAndLeave,
    SlowDiskOfOwner,
    SlowDiskOfOther,
    SlowDisksAndKill,
    StillDiskOfOwner,
    StillDiskOfOther,
    StillDiskAndKill,
    BrokenDiskOfOwner,
    BrokenDiskOfOther,
    FullDiskAndKill,
    DeafEventsAndKill,
    LeaveOther,
    HandOver,
    HandOverAndKillOwner,
    HandOverAndStopOther,
    EndOwner,
}

use Kind::*;

/// All kinds, each with its weight and its name in the table.
const KINDS: [(Kind, u64, &str); 51] = [
    (KillOwner, 12, "SIGKILL of the primary"),
    (KillOther, 2, "SIGKILL of the standby"),
    (KillOwnerUnprotected, 1, "SIGKILL of the primary, early"),
    (KillOtherUnprotected, 1, "SIGKILL of the standby, early"),
    (KillBoth, 2, "SIGKILL of both"),
    (KillBothAndOneCommand, 2, "SIGKILL of both, then --or-standby on both"),
    (StopOwner, 3, "SIGSTOP of the primary"),
    (StopOther, 1, "SIGSTOP of the standby"),
    (HoldThreadOfOwner, 2, "a thread of the primary is held"),
    (HoldThreadOfOther, 1, "a thread of the standby is held"),
    (TakeMemory, 1, "the primary loses memory"),
    (TakeMemoryOfOther, 1, "the standby loses memory"),
    (CutLink, 2, "link cut"),
    (CutToOther, 2, "link cut towards the standby"),
    (CutToOwner, 2, "link cut towards the primary"),
    (CutToOtherAndKill, 2, "link cut, SIGKILL of the primary"),
    (CutUplink, 1, "uplink of the primary down"),
    (SlowLink, 1, "slow link"),
    (SlowLinkAndKill, 2, "slow link, SIGKILL of the primary"),
    (ArbiterGoneAndKillOwner, 1, "no arbiter, SIGKILL of the primary"),
    (ArbiterGoneAndKillOther, 1, "no arbiter, SIGKILL of the standby"),
    (ArbiterGoneAndCut, 1, "no arbiter, link cut"),
    (ArbiterKilledAndKillOwner, 3, "SIGKILL of the arbiter and of the primary"),
    (ArbiterKilledAndCut, 2, "SIGKILL of the arbiter, link cut"),
    (ArbiterFrozenAndKillOwner, 3, "SIGSTOP of the arbiter, SIGKILL of the primary"),
    (ArbiterFrozenAndCut, 2, "SIGSTOP of the arbiter, link cut"),
    (ArbiterHiddenFromOwnerAndCut, 2, "the primary cannot reach the arbiter, link cut"),
    (ArbiterHiddenFromOtherAndCut, 2, "the standby cannot reach the arbiter, link cut"),
    (ArbiterHiddenFromOtherAndKill, 2, "the standby cannot reach the arbiter, SIGKILL of the primary"),
    (MemberCutOffAndKillOwner, 2, "a member of the arbiter is cut off, SIGKILL of the primary"),
    (MemberCutOffAndCut, 1, "a member of the arbiter is cut off, link cut"),
    (LeaderCutOffAndKillOwner, 3, "the arbiter's leader is cut off, SIGKILL of the primary"),
    (LeaderCutOffAndCut, 2, "the arbiter's leader is cut off, link cut"),
    (SlowArbiterAndKill, 2, "slow arbiter, SIGKILL of the primary"),
    (SlowArbiterAndCut, 1, "slow arbiter, link cut"),
    (SlowArbiterAndLeave, 1, "slow arbiter, orderly stop of the standby"),
    (SlowDiskOfOwner, 1, "slow disk of the primary"),
    (SlowDiskOfOther, 1, "slow disk of the standby"),
    (SlowDisksAndKill, 2, "slow disks, SIGKILL of the primary"),
    (StillDiskOfOwner, 1, "the primary's disk stands still"),
    (StillDiskOfOther, 1, "the standby's disk stands still"),
    (StillDiskAndKill, 1, "the primary's disk stands still, SIGKILL"),
    (BrokenDiskOfOwner, 2, "errors of the primary's disk"),
    (BrokenDiskOfOther, 1, "errors of the standby's disk"),
    (FullDiskAndKill, 2, "full disks, SIGKILL of the primary"),
    (DeafEventsAndKill, 2, "events unread, SIGKILL of the primary"),
    (LeaveOther, 2, "orderly stop of the standby"),
    (HandOver, 4, "hand-over"),
    (HandOverAndKillOwner, 2, "hand-over, SIGKILL of the primary"),
    (HandOverAndStopOther, 2, "hand-over, SIGSTOP of the standby"),
    (EndOwner, 1, "orderly stop of the VM"),
];

/// By then a standby has given up its primary.
const DEAD: Duration = Duration::from_millis(1200);
/// A quiet time after a fault that one side may not have noticed yet.
const AFTER: Duration = Duration::from_millis(900);
/// Longer than any fault lasts.
const FOR_EVER: Duration = Duration::from_secs(600);

impl Kind {
    /// The next fault.
    pub(super) fn draw(play: &mut Play) -> Kind {
        let wanted = std::env::var("OUTLIVE_TORTURE_KIND").unwrap_or_default();
        let (served, cluster) = (play.third.is_served(), play.third.is_cluster());
        let can = |kind: Kind| (served || !kind.strikes_a_server()) && (cluster || !kind.strikes_a_member());
        let wanted = || KINDS.iter().filter(|(kind, _, name)| name.contains(&wanted) && can(*kind));
        let none = "no fault's name contains OUTLIVE_TORTURE_KIND, or its arbiter cannot have that fault";
        assert!(wanted().next().is_some(), "{none}");
        let mut left = play.dice.below(wanted().map(|(_, weight, _)| weight).sum());
        let drawn = wanted().find(|(_, weight, _)| {
            let found = left < *weight;
            left = left.saturating_sub(*weight);
            found
        });
        let kind = drawn.expect("below the sum").0;
        if matches!(kind, TakeMemory | BrokenDiskOfOwner) {
            play.wait_until_a_host_fault_is_the_hosts();
        }
        kind
    }

    /// Its name in the table.
    pub(super) fn name(self) -> &'static str {
        KINDS.iter().find(|it| it.0 == self).expect("every kind is there").2
    }

    /// Whether it needs an arbiter with a server.
    fn strikes_a_server(self) -> bool {
        matches!(
            self,
            ArbiterKilledAndKillOwner
                | ArbiterKilledAndCut
                | ArbiterFrozenAndKillOwner
                | ArbiterFrozenAndCut
                | ArbiterHiddenFromOwnerAndCut
                | ArbiterHiddenFromOtherAndCut
                | ArbiterHiddenFromOtherAndKill
        )
    }

    /// Whether it needs an arbiter that consists of members.
    fn strikes_a_member(self) -> bool {
        matches!(
            self,
            MemberCutOffAndKillOwner | MemberCutOffAndCut | LeaderCutOffAndKillOwner | LeaderCutOffAndCut
        )
    }

    /// Whether it strikes before the VM is protected again.
    pub(super) fn is_early(self) -> bool {
        matches!(self, KillOwnerUnprotected | KillOtherUnprotected)
    }

    /// Whether no host is left that has the VM in its memory.
    pub(super) fn ends_both(self) -> bool {
        matches!(self, KillBoth | KillBothAndOneCommand)
    }

    /// Whether the same command starts both hosts afterwards.
    pub(super) fn has_one_command(self) -> bool {
        self == KillBothAndOneCommand
    }

    /// How long to wait before the hosts are judged. Everybody notices the end of a process at once; other
    /// faults may come to light only when they are over.
    pub(super) fn rest(self) -> Duration {
        let ends = matches!(
            self,
            KillOwner
                | KillOther
                | KillOwnerUnprotected
                | KillOtherUnprotected
                | KillBoth
                | KillBothAndOneCommand
                | LeaveOther
                | SlowArbiterAndLeave
                | EndOwner
        );
        if ends { Duration::ZERO } else { AFTER }
    }

    /// A stopped host may already have decided to send a frame, and sends it when it continues.
    pub(super) fn may_send_late(self) -> bool {
        matches!(self, StopOwner | HoldThreadOfOwner)
    }

    /// A requirement that this machine lacks.
    pub(super) fn missing(self, play: &Play) -> Option<&'static str> {
        let world = &play.world;
        let has = |words: &[&str]| world.command(Side::A, words);
        match self {
            CutToOther | CutToOwner | CutToOtherAndKill if !has(&["ip", "-V"]) => Some("ip"),
            SlowLink | SlowLinkAndKill if !slow(world, Side::A, "100mbit") || !fast(world, Side::A) => {
                Some("tc, or the kernel's tbf")
            }
            SlowArbiterAndKill | SlowArbiterAndCut | SlowArbiterAndLeave if !play.third.can_be_slow() => {
                Some("slow arbiter of this kind")
            }
            SlowDiskOfOwner | SlowDiskOfOther | SlowDisksAndKill | StillDiskOfOwner | StillDiskOfOther
            | StillDiskAndKill | BrokenDiskOfOwner | BrokenDiskOfOther
                if !play.disks[0].can_be_slow() =>
            {
                Some("FUSE")
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
        KillOther | KillOtherUnprotected => {
            play.kill(other);
            play.unprotected();
        }
        KillBoth | KillBothAndOneCommand => {
            let first = if play.dice.below(2) == 0 { owner } else { other };
            play.kill_both(first);
        }
        StopOwner => stop(play, owner, length),
        StopOther => stop(play, other, length),
        HoldThreadOfOwner => hold(play, owner, length),
        HoldThreadOfOther => hold(play, other, length),
        TakeMemory => {
            // KVM tells of it, or a thread of the host touches it first, for example to compare it.
            play.doomed = Some(owner);
            take_program_memory(play.process(owner), MEMORY);
        }
        TakeMemoryOfOther => {
            play.doomed = Some(other);
            take_all_memory(play.process(other), MEMORY);
        }
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
        CutUplink => uplink(play, length),
        SlowLink => slowly(play, |play| play.wait(length)),
        SlowLinkAndKill => slowly(play, |play| {
            play.wait(length / 2);
            play.kill(owner);
            play.wait(length / 2);
        }),
        ArbiterGoneAndKillOwner => no_arbiter(play, length, |play| play.kill(owner)),
        ArbiterGoneAndKillOther => no_arbiter(play, length, |play| play.kill(other)),
        ArbiterGoneAndCut => no_arbiter(play, length, |play| cut(play, length)),
        ArbiterKilledAndKillOwner => killed_arbiter(play, length, |play| play.kill(owner)),
        ArbiterKilledAndCut => killed_arbiter(play, length, |play| play.world.cut_link()),
        ArbiterFrozenAndKillOwner => frozen_arbiter(play, length, |play| play.kill(owner)),
        ArbiterFrozenAndCut => frozen_arbiter(play, length, |play| cut(play, length)),
        ArbiterHiddenFromOwnerAndCut => hidden_arbiter(play, owner, length, |play| cut(play, length)),
        ArbiterHiddenFromOtherAndCut => hidden_arbiter(play, other, length, |play| cut(play, length)),
        ArbiterHiddenFromOtherAndKill => hidden_arbiter(play, other, length, |play| play.kill(owner)),
        MemberCutOffAndKillOwner => cut_off_member(play, false, length, |play| play.kill(owner)),
        MemberCutOffAndCut => cut_off_member(play, false, length, |play| cut(play, length)),
        LeaderCutOffAndKillOwner => cut_off_member(play, true, length, |play| play.kill(owner)),
        LeaderCutOffAndCut => cut_off_member(play, true, length, |play| cut(play, length)),
        SlowArbiterAndKill => slow_arbiter(play, length, |play| play.kill(owner)),
        SlowArbiterAndCut => slow_arbiter(play, length, |play| cut(play, length)),
        SlowArbiterAndLeave => slow_arbiter(play, length, |play| play.leave(other)),
        SlowDiskOfOwner => slow_disks(play, &[owner], |play| play.wait(length)),
        SlowDiskOfOther => slow_disks(play, &[other], |play| play.wait(length)),
        SlowDisksAndKill => slow_disks(play, &Side::BOTH, |play| {
            play.wait(length / 2);
            play.kill(owner);
            play.wait(length);
        }),
        StillDiskOfOwner => still_disk(play, owner, |play| play.wait(length)),
        StillDiskOfOther => still_disk(play, other, |play| play.wait(length)),
        StillDiskAndKill => {
            still_disk(play, owner, |play| {
                play.wait(length / 4);
                // Its last request keeps the process, with its sockets, until the disk answers.
                play.signal(owner, Signal::SIGKILL);
                play.wait(length);
            });
            play.kill(owner);
        }
        // Without a standby the guest would hear of it, as it should.
        BrokenDiskOfOwner if !play.is_protected(owner) => {
            play.tell("it is not protected any more, so its disk is left alone");
        }
        BrokenDiskOfOwner => broken_disk(play, owner, length),
        BrokenDiskOfOther => broken_disk(play, other, length),
        FullDiskAndKill => full(play, length),
        DeafEventsAndKill => {
            play.deafen(true);
            play.wait(length / 4);
            play.kill(owner);
            play.wait(length);
            play.deafen(false);
        }
        LeaveOther => play.leave(other),
        HandOver => hand_over(play, |_| ()),
        HandOverAndKillOwner => hand_over(play, |play| play.kill(owner)),
        HandOverAndStopOther => hand_over(play, |play| stop(play, other, length)),
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
    let first = play.dice.below(3) as usize;
    play.third.lose(&play.world, first);
    meanwhile(play);
    play.wait(length);
    play.third.back(&play.world);
}

/// An operator's order, and what happens in the milliseconds that it takes.
fn hand_over(play: &mut Play, meanwhile: impl FnOnce(&mut Play)) {
    let mut order = Command::new(PROGRAM);
    order.arg("hand-over").arg("--socket").arg(play.process(play.owner).socket());
    let mut order = order.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let moment = Duration::from_micros(play.dice.below(40_000));
    play.wait(moment);
    meanwhile(play);
    let status = order.wait().unwrap();
    play.tell(format!("the hand-over ended with {status}"));
}

/// Its server is killed and started again, one moment after the other, while the hosts ask it. Of a cluster each member
/// in turn.
fn killed_arbiter(play: &mut Play, length: Duration, meanwhile: impl FnOnce(&mut Play)) {
    meanwhile(play);
    for number in 0..6 {
        play.third.kill_one(&play.world, number);
        let rest = Duration::from_micros(play.dice.below(400_000));
        play.wait(rest);
    }
    play.wait(length);
    play.world.mend_link();
}

fn frozen_arbiter(play: &mut Play, length: Duration, meanwhile: impl FnOnce(&mut Play)) {
    let first = play.dice.below(3) as usize;
    play.third.signal(Signal::SIGSTOP, first);
    meanwhile(play);
    // A question to it takes two seconds to come to nothing.
    play.wait(3 * length);
    play.third.signal(Signal::SIGCONT, first);
}

/// A member of the cluster reaches no other one while the hosts ask, and they reach it; the one that leads, or any one.
fn cut_off_member(play: &mut Play, leads: bool, length: Duration, meanwhile: impl FnOnce(&mut Play)) {
    let any = play.dice.below(play.third.members() as u64) as usize;
    let leader = play.third.leader(&play.world).filter(|_| leads);
    let member = leader.unwrap_or(any);
    play.tell(format!("member {member} of the arbiter is cut off (the leader: {leader:?})"));
    // Sooner or later than the other fault; its election takes one to two seconds.
    let moment = Duration::from_micros(play.dice.below(400_000));
    play.third.reaches_others(member, false);
    play.wait(moment);
    meanwhile(play);
    play.wait(2 * length);
    play.third.reaches_others(member, true);
}

fn hidden_arbiter(play: &mut Play, from: Side, length: Duration, meanwhile: impl FnOnce(&mut Play)) {
    play.world.see_third(from, false);
    meanwhile(play);
    play.wait(length);
    play.world.see_third(from, true);
}

fn full(play: &mut Play, length: Duration) {
    play.disks.iter().for_each(|disk| disk.fill());
    play.wait(length / 4);
    play.kill(play.owner);
    play.wait(length);
    play.disks.iter().for_each(|disk| disk.make_room());
}

fn uplink(play: &mut Play, length: Duration) {
    let owner = play.owner;
    play.world.on(owner, || Netlink::open().unwrap().set_down("up").unwrap());
    play.wait(2 * length);
    play.world.on(owner, || Netlink::open().unwrap().set_up("up").unwrap());
}

fn milliseconds(play: &mut Play, from: u64, to: u64) -> Duration {
    Duration::from_millis(from + play.dice.below(to - from))
}

fn slow_arbiter(play: &mut Play, length: Duration, meanwhile: impl FnOnce(&mut Play)) {
    let (sync, write) = (milliseconds(play, 50, 1500), milliseconds(play, 0, 100));
    play.tell(format!("{sync:?} for each change in the arbiter"));
    play.third.set(Pace { write, sync, ..Pace::default() });
    meanwhile(play);
    play.wait(2 * length);
    play.third.set(Pace::default());
}

fn slow_disks(play: &mut Play, sides: &[Side], meanwhile: impl FnOnce(&mut Play)) {
    let (write, sync) = (milliseconds(play, 1, 30), milliseconds(play, 20, 400));
    play.tell(format!("{write:?} for each write, {sync:?} to make them durable"));
    sides.iter().for_each(|&side| play.disks[side as usize].set(Pace { write, sync, ..Pace::default() }));
    meanwhile(play);
    sides.iter().for_each(|&side| play.disks[side as usize].set(Pace::default()));
}

fn broken_disk(play: &mut Play, side: Side, length: Duration) {
    let disk = side as usize;
    play.disks[disk].set(Pace { error: Some(Errno::EIO), ..Pace::default() });
    play.wait(length);
    play.disks[disk].set(Pace::default());
}

fn still_disk(play: &mut Play, side: Side, meanwhile: impl FnOnce(&mut Play)) {
    let disk = side as usize;
    play.disks[disk].set(Pace { write: FOR_EVER, read: FOR_EVER, sync: FOR_EVER, ..Pace::default() });
    meanwhile(play);
    play.disks[disk].set(Pace::default());
}
