use outlive_epoch::{CheckpointFlags, EndReason, LeaveReason, RefuseCode};
use outlive_pair::PrimaryAction::{self, *};
use outlive_pair::PrimaryEvent::{self, *};
use outlive_pair::{
    ClaimResult, ExitReason, Link, LossReason, OutputMode, Primary, PrimaryConfig, PrimaryNote,
    PrimaryStatus, Ticket, Wanted,
};

use super::{ms, timing};

/// A primary and the time.
pub(crate) struct Host {
    pub(crate) machine: Primary,
    pub(crate) now: u64,
}

impl Host {
    fn new(standbys: usize) -> Self {
        let config = PrimaryConfig { generation: 4, checkpoint: 10, standbys, slots: 2, timing: timing() };
        Self { machine: Primary::new(config, ms(0)), now: 0 }
    }

    /// Hands in an event; returns all actions, including those of the waiting thread if it has to ask the
    /// arbiter.
    fn on(&mut self, event: PrimaryEvent) -> Vec<PrimaryAction> {
        let mut out = Vec::new();
        self.machine.handle(ms(self.now), event, &mut out);
        let due = self.machine.next_deadline().is_some_and(|due| due <= ms(self.now));
        if self.machine.status() == PrimaryStatus::Arbitrating && due {
            self.machine.handle(ms(self.now), Tick, &mut out);
        }
        out
    }

    /// Hands in an event; returns the actions without notes and heartbeats.
    pub(crate) fn acts(&mut self, event: PrimaryEvent) -> Vec<PrimaryAction> {
        let mut actions = self.on(event);
        actions.retain(|action| !matches!(action, Note(_) | SendHeartbeat { .. }));
        actions
    }

    /// Up to the base synchronisation on link 0.
    pub(crate) fn attached() -> Self {
        Self::attached_at(0)
    }

    fn attached_at(now: u64) -> Self {
        let mut host = Self::new(1);
        host.now = now;
        assert_eq!(host.acts(Tick), [Dial { link: LINK, address: 0 }]);
        assert_eq!(host.acts(Connected { link: LINK }), [SendHello { link: LINK, generation: 4 }]);
        assert_eq!(host.acts(Accepted { link: LINK, dead_after: ms(500) }), [StartBase { link: LINK }]);
        host
    }

    /// Up to "protected"; checkpoint 11 is the base.
    pub(crate) fn protected() -> Self {
        Self::protected_at(0)
    }

    pub(crate) fn protected_at(now: u64) -> Self {
        let mut host = Self::attached_at(now);
        let base = CheckpointFlags { base_final: true, end: None };
        assert_eq!(host.acts(BASE), [HoldOutput { link: LINK, epoch: 12 }, Ship(ticket(11, base))]);
        host.now += 1;
        assert_eq!(host.acts(ack(11, host.now)), [Release { through: 11 }]);
        assert_eq!(host.machine.status(), PrimaryStatus::Protected);
        host
    }

    /// The arbiter answers.
    pub(crate) fn win(&mut self) -> Vec<PrimaryAction> {
        self.claimed(ClaimResult::Won)
    }

    fn claimed(&mut self, result: ClaimResult) -> Vec<PrimaryAction> {
        self.acts(Claimed { generation: 5, result })
    }
}

pub(crate) const LINK: Link = Link(0);
const BASE: PrimaryEvent = Captured { link: LINK, base: true };
const EPOCH: PrimaryEvent = Captured { link: LINK, base: false };
const PLAIN: CheckpointFlags = CheckpointFlags { base_final: false, end: None };

fn ack(checkpoint: u64, stamp: u64) -> PrimaryEvent {
    Ack { link: LINK, generation: 4, checkpoint, stamp: ms(stamp) }
}

fn ticket(number: u64, flags: CheckpointFlags) -> Ticket {
    Ticket { link: LINK, generation: 4, number, flags }
}

/// The actions that a capture brings.
fn ships(number: u64) -> [PrimaryAction; 2] {
    [BeginEpoch { link: LINK, epoch: number + 1 }, Ship(ticket(number, PLAIN))]
}

fn lost() -> PrimaryEvent {
    LinkLost { link: LINK, why: LossReason::Closed }
}

#[test]
fn output_passes_until_the_base_is_captured_and_waits_from_then_on() {
    let mut host = Host::attached();
    assert_eq!(host.machine.output(), OutputMode::PassThrough);
    assert_eq!(host.machine.wanted_capture(), Wanted::Base { link: LINK });
    host.acts(BASE);
    assert_eq!(host.machine.output(), OutputMode::Hold);
    assert_eq!(host.machine.status(), PrimaryStatus::BaseCommit);
    assert_eq!(host.machine.epoch(), 12, "frames after the pause belong to the next checkpoint");
    let actions = host.on(ack(11, 0));
    assert_eq!(actions[0], Release { through: 11 });
    assert_eq!(actions[1], Note(PrimaryNote::Protected { generation: 4, checkpoint: 11 }));
}

#[test]
fn each_ack_releases_up_to_itself() {
    let mut host = Host::protected();
    assert_eq!(host.acts(EPOCH), ships(12));
    assert_eq!(host.acts(EPOCH), ships(13));
    assert_eq!(host.acts(ack(12, 1)), [Release { through: 12 }]);
    assert_eq!(host.acts(ack(13, 1)), [Release { through: 13 }]);
}

#[test]
fn captures_stop_when_all_slots_are_taken() {
    let mut host = Host::protected();
    host.acts(EPOCH);
    assert_eq!(host.machine.wanted_capture(), Wanted::Epoch);
    host.acts(EPOCH);
    assert_eq!(host.machine.wanted_capture(), Wanted::Nothing);
    host.acts(ack(12, 1));
    assert_eq!(host.machine.wanted_capture(), Wanted::Epoch);
    host.acts(EPOCH);
    // A driver that does not ask loses its protection, and nothing worse.
    assert_eq!(host.acts(EPOCH), [Hangup { link: LINK }, DropCapture, Claim { generation: 5 }]);
}

/// SIGSTOP, takeover, SIGCONT: the first thing this process sees is an Ack that waited in its socket.
#[test]
fn an_ack_found_after_a_long_stop_releases_nothing() {
    let mut host = Host::protected();
    host.acts(EPOCH);
    host.now += 700;
    assert!(!host.machine.may_release(ms(host.now)), "not even what was decided before the stop");
    assert_eq!(host.acts(ack(12, 1)), [Hangup { link: LINK }, Claim { generation: 5 }]);
    assert!(!host.machine.may_release(ms(host.now)));
    let owner = || "host-b".to_owned();
    let reason = ExitReason::Fenced { generation: 5, owner: owner() };
    assert_eq!(
        reason.to_string(),
        "generation 5 of this VM belongs to host-b: the VM runs there, this copy is stopped"
    );
    assert_eq!(
        host.claimed(ClaimResult::Lost { owner: owner() }),
        [Fence { generation: 5, owner: owner() }, StopGuest, Exit { reason }]
    );
    assert_eq!(host.machine.output(), OutputMode::Discard);
    assert!(!host.machine.may_release(ms(host.now)));
}

/// The lease is measured by returned stamps, not by received bytes.
#[test]
fn old_stamps_do_not_extend_the_lease() {
    let mut host = Host::protected();
    let stamp = ms(host.now);
    for _ in 0..6 {
        host.now += 100;
        assert_eq!(host.acts(Heartbeat { link: LINK, stamp }), []);
        assert!(host.machine.may_release(ms(host.now)));
    }
    assert_eq!(host.machine.next_deadline(), Some(ms(701)), "the end of the lease");
    host.now += 100;
    assert_eq!(host.acts(Heartbeat { link: LINK, stamp }), [Hangup { link: LINK }, Claim { generation: 5 }]);
}

#[test]
fn a_stamp_from_the_future_is_a_broken_protocol() {
    let mut host = Host::protected();
    let stamp = ms(host.now + 1);
    assert_eq!(host.acts(Heartbeat { link: LINK, stamp }), [Hangup { link: LINK }, Claim { generation: 5 }]);
}

#[test]
fn a_standby_lost_before_the_base_is_captured_costs_nothing() {
    for event in [lost(), Leave { link: LINK, reason: LeaveReason::Stopped }] {
        let mut host = Host::attached();
        assert_eq!(host.acts(event), [Hangup { link: LINK }]);
        assert_eq!((host.machine.status(), host.machine.generation()), (PrimaryStatus::Alone, 4));
        assert_eq!(host.acts(BASE), [DropCapture], "one that was under way");
        host.now += 200;
        assert_eq!(host.acts(Tick), [Dial { link: Link(1), address: 0 }]);
    }
}

#[test]
fn a_standby_lost_after_it_must_be_won_against() {
    for event in [
        lost(),
        Leave { link: LINK, reason: LeaveReason::BadStream },
        LinkLost { link: LINK, why: LossReason::Local("ring full".into()) },
    ] {
        let mut host = Host::protected();
        assert_eq!(host.acts(event), [Hangup { link: LINK }, Claim { generation: 5 }]);
        assert_eq!(host.machine.output(), OutputMode::Hold);
        let next = Dial { link: Link(1), address: 0 };
        assert_eq!(
            host.claimed(ClaimResult::Won),
            [ReleaseAll { generation: 5 }, next],
            "and a new standby is looked for at once"
        );
        assert_eq!((host.machine.output(), host.machine.generation()), (OutputMode::PassThrough, 5));
    }
}

/// It had nothing whole, and says so itself. One that only is lost may have acknowledged the base.
#[test]
fn a_standby_that_leaves_before_it_has_the_base_costs_no_generation() {
    for reason in [LeaveReason::BadStream, LeaveReason::Failed, LeaveReason::Stopped] {
        let mut host = Host::attached();
        host.acts(BASE);
        assert_eq!(host.machine.output(), OutputMode::Hold);
        let leave = Leave { link: LINK, reason };
        assert_eq!(host.acts(leave), [Hangup { link: LINK }, ReleaseAll { generation: 4 }], "{reason:?}");
        assert_eq!((host.machine.status(), host.machine.generation()), (PrimaryStatus::Alone, 4));
        assert_eq!(host.machine.output(), OutputMode::PassThrough);
        // It fails again and again, and is asked more and more seldom.
        let mut pauses = Vec::new();
        for round in 1..9 {
            let (link, before) = (Link(round), host.now);
            while !host.acts(Tick).contains(&Dial { link, address: 0 }) {
                host.now += 50;
                assert!(host.now < before + 60_000);
            }
            pauses.push(host.now - before);
            host.acts(Connected { link });
            host.acts(Accepted { link, dead_after: ms(500) });
            host.acts(Captured { link, base: true });
            let leave = Leave { link, reason };
            assert_eq!(host.acts(leave), [Hangup { link }, ReleaseAll { generation: 4 }]);
        }
        assert!(pauses.is_sorted() && pauses[7] >= 10 * pauses[0], "{pauses:?}");
    }
    let mut host = Host::attached();
    host.acts(BASE);
    assert_eq!(host.acts(lost()), [Hangup { link: LINK }, Claim { generation: 5 }]);
}

#[test]
fn an_arbiter_out_of_reach_is_asked_again_and_reported_once() {
    let mut host = Host::protected();
    host.acts(lost());
    let why = || "no route".to_owned();
    for round in 0..20 {
        let actions = host.on(Claimed { generation: 5, result: ClaimResult::Unreachable { why: why() } });
        let note = Note(PrimaryNote::ArbiterUnreachable { why: why(), held: true });
        assert_eq!(actions.contains(&note), round == 0);
        assert_eq!(host.acts(Tick), []);
        assert_eq!(host.machine.next_deadline(), Some(ms(host.now + 200)));
        host.now += 200;
        assert_eq!(host.acts(Tick), [Claim { generation: 5 }]);
        assert_eq!(host.machine.output(), OutputMode::Hold);
    }
    assert_eq!(host.claimed(ClaimResult::Won)[0], ReleaseAll { generation: 5 });
}

#[test]
fn an_arbiter_that_does_not_answer_is_reported() {
    let mut host = Host::protected();
    host.acts(lost());
    assert_eq!(host.machine.next_deadline(), Some(ms(host.now + 1000)));
    host.now += 1000;
    let note = Note(PrimaryNote::ArbiterUnreachable { why: "no answer for 1 s".into(), held: true });
    assert_eq!(host.on(Tick), [note], "and not asked a second time");
    assert_eq!(host.machine.next_deadline(), None);
    assert_eq!(host.claimed(ClaimResult::Won)[0], ReleaseAll { generation: 5 });
}

#[test]
fn answers_to_other_questions_are_ignored() {
    let mut host = Host::protected();
    assert_eq!(host.claimed(ClaimResult::Won), []);
    host.acts(lost());
    assert_eq!(host.acts(Claimed { generation: 4, result: ClaimResult::Won }), []);
    assert_eq!(host.machine.status(), PrimaryStatus::Arbitrating);
}

#[test]
fn events_of_an_old_link_are_ignored() {
    let mut host = Host::attached();
    host.acts(lost());
    host.now += 200;
    host.acts(Tick);
    host.acts(Connected { link: Link(1) });
    host.acts(Accepted { link: Link(1), dead_after: ms(0) });
    for event in [lost(), ack(11, 0), Leave { link: LINK, reason: LeaveReason::Failed }] {
        assert_eq!(host.acts(event), []);
    }
    assert_eq!(host.machine.status(), PrimaryStatus::BaseSync);
    assert_eq!(host.acts(Connected { link: LINK }), [Hangup { link: LINK }], "a dial that came too late");
}

#[test]
fn acks_that_are_not_due_break_the_link() {
    for (checkpoint, generation) in [(12, 4), (10, 4), (11, 3)] {
        let mut host = Host::attached();
        host.acts(BASE);
        let event = Ack { link: LINK, generation, checkpoint, stamp: ms(0) };
        assert_eq!(host.acts(event), [Hangup { link: LINK }, Claim { generation: 5 }]);
    }
    let mut host = Host::attached();
    assert_eq!(host.acts(ack(11, 0)), [Hangup { link: LINK }], "before anything was captured");
}

#[test]
fn standbys_are_tried_in_turn_and_their_reasons_said_once() {
    let mut host = Host::new(2);
    let refused = |link| Refused { link, code: Ok(RefuseCode::Busy), text: "taken".into() };
    let mut said = 0;
    for round in 0..6 {
        let link = Link(round);
        assert!(host.on(Tick).contains(&Dial { link, address: round as usize % 2 }));
        host.on(Connected { link });
        let actions = host.on(refused(link));
        assert!(actions.contains(&Hangup { link }));
        said += actions.iter().filter(|action| matches!(action, Note(_))).count();
        assert_eq!(host.acts(Tick), []);
        host.now += 200;
    }
    assert_eq!(said, 1);
    assert_eq!(Host::new(0).acts(Tick), [], "no address, nobody to dial");
}

#[test]
fn a_standby_that_never_answers_hello_is_given_up() {
    let mut host = Host::new(1);
    host.acts(Tick);
    host.acts(Connected { link: LINK });
    host.now = 4999;
    assert_eq!(host.acts(Tick), []);
    host.now = 5000;
    assert_eq!(host.acts(Tick), [Hangup { link: LINK }]);
}

#[test]
fn the_end_of_the_vm_is_committed_before_it_is_carried_out() {
    for reason in [EndReason::PowerOff, EndReason::Reset, EndReason::Stopped, EndReason::Crash] {
        let mut host = Host::protected();
        host.acts(EPOCH);
        assert_eq!(host.acts(End { reason }), []);
        assert_eq!(host.machine.wanted_capture(), Wanted::Last(reason));
        let flags = CheckpointFlags { base_final: false, end: Some(reason) };
        let last = Ship(ticket(13, flags));
        assert_eq!(host.acts(EPOCH), [BeginEpoch { link: LINK, epoch: 14 }, last]);
        assert_eq!(host.machine.wanted_capture(), Wanted::Nothing);
        assert_eq!(host.acts(ack(12, 1)), [Release { through: 12 }]);
        let exit = Exit { reason: ExitReason::Ended(reason) };
        assert_eq!(
            host.acts(ack(13, 1)),
            [Release { through: 13 }, SendEnd { link: LINK, reason }, Hangup { link: LINK }, exit]
        );
        assert_eq!(host.acts(Tick), []);
    }
}

#[test]
fn without_protection_the_vm_ends_at_once() {
    let reason = EndReason::PowerOff;
    let exit = || Exit { reason: ExitReason::Ended(reason) };
    assert_eq!(Host::new(0).acts(End { reason }), [exit()]);
    let mut dialling = Host::new(1);
    dialling.acts(Tick);
    assert_eq!(dialling.acts(End { reason }), [Hangup { link: LINK }, exit()]);
    assert_eq!(
        Host::attached().acts(End { reason }),
        [SendEnd { link: LINK, reason }, Hangup { link: LINK }, exit()]
    );
}

#[test]
fn an_operator_asks_the_guest_first() {
    let mut host = Host::protected();
    assert_eq!(host.acts(Stop { ask_guest: true }), [AskGuest]);
    assert_eq!(host.machine.wanted_capture(), Wanted::Epoch);
    assert!(host.machine.guest_may_run());
    assert_eq!(host.acts(Stop { ask_guest: true }), [StopGuest], "asked once");
    assert_eq!(host.machine.wanted_capture(), Wanted::Last(EndReason::Stopped));
    assert!(!host.machine.guest_may_run());
    assert_eq!(host.acts(Stop { ask_guest: true }), []);
    assert_eq!(host.acts(End { reason: EndReason::PowerOff }), [], "the first reason counts");
    assert_eq!(host.machine.wanted_capture(), Wanted::Last(EndReason::Stopped));

    let exit = Exit { reason: ExitReason::Ended(EndReason::Stopped) };
    assert_eq!(Host::new(0).acts(Stop { ask_guest: false }), [StopGuest, exit]);
}

/// The guest's frames pass through, so no standby may be able to take over from this base.
#[test]
fn a_base_whose_output_cannot_be_held_is_none() {
    let failed = || HoldFailed { link: LINK, why: "no room".into() };
    let mut host = Host::attached();
    host.acts(BASE);
    assert_eq!(host.acts(failed()), [Hangup { link: LINK }, ReleaseAll { generation: 4 }]);
    assert_eq!((host.machine.status(), host.machine.generation()), (PrimaryStatus::Alone, 4));
    assert_eq!(host.machine.output(), OutputMode::PassThrough);
    // Too late to say so.
    assert_eq!(Host::protected().acts(failed()), []);
}

/// A heartbeat can wait until the guest runs again.
#[test]
fn a_pause_sends_nothing() {
    let mut host = Host::protected();
    host.now += 125;
    assert_eq!(host.on(EPOCH), ships(12));
    assert_eq!(host.on(Tick), [SendHeartbeat { link: LINK }]);
}

#[test]
fn an_end_whose_link_is_lost_waits_for_the_arbiter() {
    let reason = EndReason::PowerOff;
    let ending = || {
        let mut host = Host::protected();
        host.acts(End { reason });
        host.acts(EPOCH);
        assert_eq!(host.acts(lost()), [Hangup { link: LINK }, Claim { generation: 5 }]);
        host
    };
    let exit = Exit { reason: ExitReason::Ended(reason) };
    assert_eq!(ending().claimed(ClaimResult::Won), [ReleaseAll { generation: 5 }, exit]);
    let fenced = ending().claimed(ClaimResult::Lost { owner: "b".into() });
    assert!(matches!(fenced[..], [Fence { .. }, StopGuest, Exit { .. }]));
}

#[test]
fn heartbeats_go_eight_times_in_the_agreed_silence() {
    let mut host = Host::new(1);
    host.acts(Tick);
    host.acts(Connected { link: LINK });
    // The standby asks for more patience than is configured here.
    let mut beats = 0;
    let mut count = |actions: Vec<PrimaryAction>| {
        beats += actions.iter().filter(|action| matches!(action, SendHeartbeat { .. })).count();
    };
    count(host.on(Accepted { link: LINK, dead_after: ms(2000) }));
    while host.now < 2000 {
        host.now += 10;
        count(host.on(Heard { link: LINK }));
    }
    assert_eq!(beats, 1 + 2000 / 250);
    host.now += 1399;
    assert_eq!(host.acts(Tick), []);
    host.now += 1;
    assert_eq!(host.acts(Tick), [Hangup { link: LINK }]);
}

/// Dials, is connected and refused with these words. Returns the standby, and the pause before the next
/// dialling, in milliseconds.
fn refused_once(host: &mut Host, text: &str) -> (usize, u64) {
    let dialled = host.acts(Tick);
    let [Dial { link, address }] = dialled[..] else { panic!("{dialled:?}") };
    host.acts(Connected { link });
    host.acts(Refused { link, code: Ok(RefuseCode::Devices), text: text.into() });
    let next = host.machine.next_deadline().unwrap().as_millis() as u64;
    let pause = next - host.now;
    host.now = next - 1;
    assert_eq!(host.acts(Tick), []);
    host.now = next;
    (address, pause)
}

#[test]
fn a_standby_that_refuses_again_and_again_is_asked_less_often() {
    let mut host = Host::new(1);
    let retry = timing().retry.as_millis() as u64;
    let size = |bytes: u64| format!("disk 0 has {bytes} bytes");
    for (times, factor) in [1, 2, 4, 8, 16, 25, 25].into_iter().enumerate() {
        assert_eq!(refused_once(&mut host, &size(512 + times as u64)), (0, factor * retry), "{times}");
    }
    // It says something else, so somebody is working on it.
    assert_eq!(refused_once(&mut host, "no tap"), (0, retry));
    assert_eq!(refused_once(&mut host, "no tap"), (0, 2 * retry));
    // It was away and is back.
    let dialled = host.acts(Tick);
    let [Dial { link, .. }] = dialled[..] else { panic!("{dialled:?}") };
    host.acts(DialFailed { link, why: "connection refused".into() });
    assert_eq!(host.machine.next_deadline(), Some(ms(host.now + retry)));
    host.now += retry;
    assert_eq!(refused_once(&mut host, "no tap"), (0, retry));
}

/// One of two refuses forever; the other one is not asked less often because of it.
#[test]
fn a_standby_that_refuses_does_not_keep_the_other_one_waiting() {
    let mut host = Host::new(2);
    let retry = timing().retry.as_millis() as u64;
    let mut dialled = [0, 0];
    while host.now < 60 * retry {
        let actions = host.acts(Tick);
        let [Dial { link, address }] = actions[..] else { panic!("{actions:?}") };
        dialled[address] += 1;
        if address == 0 {
            host.acts(Connected { link });
            host.acts(Refused { link, code: Ok(RefuseCode::Busy), text: "taken".into() });
        } else {
            host.acts(DialFailed { link, why: "no route".into() });
        }
        host.now = host.machine.next_deadline().unwrap().as_millis() as u64;
    }
    assert!(dialled[0] <= 8 && dialled[1] >= 50, "{dialled:?}");
}

#[test]
fn heartbeats_are_earned_by_the_thread_that_waits() {
    let beats = |actions: &[PrimaryAction]| actions.contains(&SendHeartbeat { link: LINK });
    let mut host = Host::protected();
    assert_eq!(host.machine.may_beat_until(), Some(ms(1000)));
    // Other threads hear the standby all the time.
    for time in (126..=1126).step_by(125) {
        host.now = time;
        let actions = host.on(Heartbeat { link: LINK, stamp: ms(time) });
        assert_eq!(beats(&actions), time < 1000, "{time} ms");
    }
    assert!(beats(&host.on(Tick)), "it goes on");
    assert_eq!(host.machine.may_beat_until(), Some(ms(2126)));
    // A pause is its work too, and long work is announced.
    host.now = 1200;
    host.on(EPOCH);
    assert_eq!(host.machine.may_beat_until(), Some(ms(2200)));
    host.on(LongWork { within: ms(10_000) });
    assert_eq!(host.machine.may_beat_until(), Some(ms(12_200)));
    host.on(Tick);
    assert_eq!(host.machine.may_beat_until(), Some(ms(2200)));
    assert_eq!(Host::attached().machine.may_beat_until(), None, "nobody can take over yet");
}

#[test]
fn only_the_thread_that_waits_asks_the_arbiter() {
    let mut host = Host::protected();
    let (mut lost, mut tick) = (Vec::new(), Vec::new());
    let event = LinkLost { link: LINK, why: LossReason::Closed };
    host.machine.handle(ms(host.now), event, &mut lost);
    assert!(!lost.iter().any(|action| matches!(action, Claim { .. })), "{lost:?}");
    assert_eq!(host.machine.next_deadline(), Some(ms(host.now)), "it is woken");
    host.machine.handle(ms(host.now), Tick, &mut tick);
    assert_eq!(tick, [Claim { generation: 5 }]);
}

#[test]
fn a_standby_that_hands_its_right_over_leaves_nothing_to_ask() {
    let mut host = Host::protected();
    let leave = |reason| Leave { link: LINK, reason };
    let actions = host.acts(leave(LeaveReason::Released));
    assert_eq!(actions[..2], [Hangup { link: LINK }, ReleaseAll { generation: 4 }]);
    assert_eq!(host.machine.output(), OutputMode::PassThrough);
    let mut host = Host::protected();
    assert_eq!(host.acts(leave(LeaveReason::Stopped)), [Hangup { link: LINK }, Claim { generation: 5 }]);
}

fn released() -> PrimaryEvent {
    Leave { link: LINK, reason: LeaveReason::Released }
}

/// SIGSTOP before the leave, SIGCONT when the silence is over: the clock comes first, and the leave behind it.
#[test]
fn a_right_that_is_handed_over_counts_after_a_long_stop() {
    let mut host = Host::protected();
    host.now += 700;
    let mut out = Vec::new();
    host.machine.handle(ms(host.now), released(), &mut out);
    out.retain(|action| !matches!(action, Note(_)));
    assert_eq!(out[..2], [Hangup { link: LINK }, ReleaseAll { generation: 4 }]);
    assert!(!out.iter().any(|action| matches!(action, Claim { .. })), "{out:?}");
    assert_eq!(host.machine.output(), OutputMode::PassThrough);
}

/// The next generation may be won unheard: the guest goes on, and the next standby waits for the answer.
#[test]
fn a_right_that_is_handed_over_ends_the_wait_for_the_arbiter() {
    let unreachable = || ClaimResult::Unreachable { why: "no route".into() };
    for asked_again in [false, true] {
        let mut host = Host::protected();
        assert_eq!(host.acts(lost()), [Hangup { link: LINK }, Claim { generation: 5 }]);
        if asked_again {
            assert_eq!(host.claimed(unreachable()), []);
        }
        let other = Leave { link: Link(7), reason: LeaveReason::Released };
        assert_eq!(host.acts(other), [], "of another link");
        assert_eq!(host.acts(released()), [ReleaseAll { generation: 4 }]);
        assert_eq!((host.machine.output(), host.machine.generation()), (OutputMode::PassThrough, 4));
        assert!(host.machine.may_release(ms(host.now)));
        if !asked_again {
            assert_eq!(host.claimed(unreachable()), []);
        }
        host.now += 1000;
        assert_eq!(host.acts(Tick), [Claim { generation: 5 }], "and nobody is dialled");
        let won = host.claimed(ClaimResult::Won);
        assert_eq!(won, [ReleaseAll { generation: 5 }, Dial { link: Link(1), address: 0 }]);
    }
    let mut host = Host::protected();
    host.acts(lost());
    host.acts(released());
    let ended = ExitReason::Ended(EndReason::PowerOff);
    assert_eq!(host.acts(End { reason: EndReason::PowerOff }), [Exit { reason: ended }]);
}

/// The pause for one standby is long; meanwhile it leaves, and another one accepts.
#[test]
fn what_was_captured_for_one_standby_is_no_base_for_another() {
    let mut host = Host::protected();
    host.acts(released());
    let next = Link(1);
    host.acts(Connected { link: next });
    assert_eq!(host.acts(Accepted { link: next, dead_after: ms(500) }), [StartBase { link: next }]);
    assert_eq!(host.acts(EPOCH), [DropCapture]);
    assert_eq!(host.acts(Captured { link: next, base: false }), [DropCapture]);
    assert_eq!(host.acts(BASE), [DropCapture]);
    assert_eq!(host.machine.status(), PrimaryStatus::BaseSync);
    let flags = CheckpointFlags { base_final: true, end: None };
    let ticket = Ticket { link: next, ..ticket(12, flags) };
    let base = host.acts(Captured { link: next, base: true });
    assert_eq!(base, [HoldOutput { link: next, epoch: 13 }, Ship(ticket)]);
    // Pages that were harvested for another link are lost to this one.
    assert_eq!(host.acts(EPOCH)[..2], [Hangup { link: next }, DropCapture]);
}
