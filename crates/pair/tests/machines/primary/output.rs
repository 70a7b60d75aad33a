//! What lets output out, and what holds it: checkpoints, acknowledgements, the lease, heartbeats.

use super::*;

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
    assert_eq!(host.acts(EPOCH), [Dismiss { link: LINK }, DropCapture]);
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

/// The pause for one standby is long; meanwhile it leaves, and another one accepts.
#[test]
fn what_was_captured_for_one_standby_is_no_base_for_another() {
    let mut host = Host::protected();
    host.acts(released());
    let next = Link(1);
    host.acts(Connected { link: next });
    assert_eq!(host.acts(Accepted { link: next, dead_after: ms(500) }), [StartBase { link: next }]);
    assert_eq!(host.acts(EPOCH), [DropCapture]);
    assert_eq!(host.acts(Captured { link: next, base: false, stays: false }), [DropCapture]);
    assert_eq!(host.acts(BASE), [DropCapture]);
    assert_eq!(host.machine.status(), PrimaryStatus::BaseSync);
    let flags = CheckpointFlags { base_final: true, end: None, hand_over: false };
    let ticket = Ticket { link: next, ..ticket(12, flags) };
    let base = host.acts(Captured { link: next, base: true, stays: false });
    assert_eq!(base, [HoldOutput { link: next, epoch: 13 }, Ship(ticket)]);
    // Pages that were harvested for another link are lost to this one.
    assert_eq!(host.acts(EPOCH), [Dismiss { link: next }, DropCapture]);
}
