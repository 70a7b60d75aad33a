//! The network of the guest's clients is lost at a host whose link to the other host works. A VM goes to a
//! standby that reaches the clients, and stays where no standby does.

use outlive::events::{Event, Part};
use outlive::network::Netlink;

use crate::support::{Process, Side, Witnesses, World, wait_until};

/// Sets the clients' end of a host's uplink.
fn plug(world: &World, side: Side, plugged: bool) {
    let port = format!("to-{}", side.letter());
    world.lan(|| {
        let mut netlink = Netlink::open().unwrap();
        if plugged { netlink.set_up(&port) } else { netlink.set_down(&port) }.unwrap();
    });
}

fn cut_off(process: &mut Process, words: &str, stays: bool) -> bool {
    let fits = |why: &str, kept: &Option<String>| why.contains(words) && kept.is_some() == stays;
    process.has(|e| matches!(e, Event::HostFault { part: Part::Network, why, kept } if fits(why, kept)))
}

fn moves(break_host: impl Fn(&World), words: &str) {
    let Some(world) = World::new() else { return };
    let standby = ["--standby", &Side::A.addr().to_string(), "--uplink-timeout", "300ms"];
    let mut standby = world.standby_with(Side::B, &standby);
    let there = Side::B.addr().to_string();
    let mut active = world.run_with(Side::A, &["--standby", &there, "--uplink-timeout", "300ms"]);
    active.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    witnesses.hear_all();
    break_host(&world);
    assert_eq!(standby.wait_takeover(), 2);
    assert_eq!(active.wait_exit(), 1);
    assert!(cut_off(&mut active, words, false), "{}", active.log());
    assert!(active.log().contains("leaving it to its standby"), "{}", active.log());
    witnesses.hear_all();
    witnesses.finish(&world);
}

#[test]
fn a_vm_whose_hosts_uplink_has_no_carrier_goes_to_its_standby() {
    moves(|world| plug(world, Side::A, false), "the uplink up has no carrier");
}

#[test]
fn a_vm_whose_bridge_is_deleted_goes_to_its_standby() {
    let delete = |world: &World| world.on(Side::A, || Netlink::open().unwrap().delete("br0").unwrap());
    moves(delete, "the bridge br0 is gone");
}

#[test]
fn a_vm_whose_tap_is_taken_out_of_its_bridge_goes_to_its_standby() {
    let detach = |world: &World| world.on(Side::A, || Netlink::open().unwrap().detach("vm0").unwrap());
    moves(detach, "the tap vm0 is in no bridge any more");
}

#[test]
fn a_vm_whose_tap_is_switched_off_goes_to_its_standby() {
    let switch_off = |world: &World| world.on(Side::A, || Netlink::open().unwrap().set_down("vm0").unwrap());
    moves(switch_off, "the tap vm0 is down");
}

#[test]
fn a_vm_stays_while_its_standby_is_cut_off_too_and_goes_when_that_is_over() {
    let Some(world) = World::new() else { return };
    let options = ["--uplink-timeout", "300ms"];
    let mut standby = world.standby_with(Side::B, &options);
    plug(&world, Side::B, false);
    wait_until("the standby notices", || standby.log().contains("cut off from the clients' network"));
    let there = Side::B.addr().to_string();
    let mut active = world.run_with(Side::A, &[&["--standby", &there][..], &options].concat());
    active.wait_protected();
    plug(&world, Side::A, false);
    wait_until("the VM stays", || cut_off(&mut active, "has no carrier", true));
    active.wait_says("the standby's host is cut off from that network, too", 1);
    assert!(!active.ended() && !standby.took_over());
    plug(&world, Side::B, true);
    assert_eq!(standby.wait_takeover(), 2);
    assert_eq!(active.wait_exit(), 1);
}

#[test]
fn without_a_standby_or_without_a_watch_the_vm_stays() {
    let Some(world) = World::new() else { return };
    let mut alone = world.run_with(Side::A, &["--uplink-timeout", "300ms"]);
    alone.wait_for("running", |e| matches!(e, Event::Started { .. }));
    // It has seen its uplink.
    std::thread::sleep(std::time::Duration::from_millis(500));
    plug(&world, Side::A, false);
    wait_until("it says why it stays", || cut_off(&mut alone, "has no carrier", true));
    plug(&world, Side::A, true);
    alone.wait_for("well again", |e| matches!(e, Event::HostMended { part: Part::Network }));
    let mut wrong = world.run_with(Side::B, &["--uplink", "eth77"]);
    assert_eq!(wrong.wait_exit(), 2);
    assert!(wrong.log().contains("--uplink: ") && wrong.log().contains("eth77"), "{}", wrong.log());
}
