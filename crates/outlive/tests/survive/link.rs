//! The link between the hosts fails while both of them live.

use outlive::events::Event;

use crate::support::{Dice, Process, Proxy, Side, Way, Witnesses, World, wait_until};

/// Waits until the hosts have settled which one has the VM; the loser has ended with code 3. Returns the
/// winner and whether it is the old primary.
fn settle(mut primary: Process, mut standby: Process) -> (Process, bool) {
    wait_until("one side has given up", || primary.ended() || standby.ended());
    let stays = standby.ended();
    let (mut winner, mut loser) = if stays { (primary, standby) } else { (standby, primary) };
    assert_eq!(loser.wait_exit(), 3, "the loser's exit code");
    assert!(loser.has(|e| matches!(e, Event::Lost { .. })), "the loser does not say that it lost");
    // The loser may hear of it first.
    wait_until("somebody has won", || winner.has(|e| matches!(e, Event::Won { .. })));
    assert!(!winner.ended(), "nobody goes on");
    wait_until("it has taken over, if it was the standby", || stays || winner.took_over());
    println!("{} goes on", if stays { "the primary" } else { "the standby" });
    (winner, stays)
}

#[test]
fn when_the_link_is_cut_exactly_one_side_goes_on() {
    let Some(world) = World::new() else { return };
    let mut dice = Dice::new();
    let mut side = Side::A;
    let (mut primary, mut standby) = world.protected(side);
    let witnesses = Witnesses::start(&world, 2);
    for _ in 0..4 {
        dice.sleep_below(std::time::Duration::from_millis(200));
        world.cut_link();
        let (winner, stays) = settle(primary, standby);
        witnesses.hear_all();
        world.mend_link();
        if !stays {
            side = side.other();
        }
        primary = winner;
        standby = world.standby(side.other());
        primary.wait_protected();
    }
    witnesses.finish(&world);
}

/// The link carries data only one way. Data in the other direction is delayed forever, as on a link that
/// loses everything.
fn one_way_is_lost(way: Way) {
    let Some(world) = World::new() else { return };
    let proxy = Proxy::start(&world, Side::A);
    let standby = world.standby(Side::B);
    let mut primary = world.run_with(Side::A, &["--standby", &proxy.addr()]);
    primary.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    proxy.stall(way);
    let (mut winner, stays) = settle(primary, standby);
    witnesses.hear_all();
    proxy.flow();
    if stays {
        let _standby = world.standby(Side::B);
        winner.wait_protected();
        witnesses.hear_all();
    }
    witnesses.finish(&world);
}

#[test]
fn when_the_checkpoints_get_lost_exactly_one_side_goes_on() {
    one_way_is_lost(Way::ToStandby);
}

#[test]
fn when_the_acknowledgements_get_lost_exactly_one_side_goes_on() {
    one_way_is_lost(Way::ToPrimary);
}
