//! The host's network is after a VM what it was before, whatever becomes of the VM.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt::TcpMaxSeg};
use outlive::events::Event;
use outlive::network::{Link, Netlink};

use crate::support::{Client, PATIENCE, Process, Side, Value, World, wait_until};

const NET: [&str; 2] = ["--net", "tap=vm0,bridge=br0"];

fn link(world: &World, side: Side, name: &str) -> Option<Link> {
    world.on(side, || Netlink::open().unwrap().links().unwrap().into_iter().find(|link| link.name == name))
}

/// Everything about the interfaces of a host. The taps of Outlive are left out.
fn picture(world: &World, side: Side) -> Vec<Link> {
    let mut links = world.on(side, || Netlink::open().unwrap().links().unwrap());
    links.retain(|link| link.name != "vm0");
    // A bridge has carrier as long as a port has.
    links.iter_mut().for_each(|link| link.carrier = false);
    links
}

/// Runs `ip` on a host.
fn ip(world: &World, side: Side, words: &str) {
    let words: Vec<&str> = ["ip"].into_iter().chain(words.split(' ')).collect();
    assert!(world.command(side, &words), "{words:?}");
}

/// Host b's network as an administrator may have it: a bridge over a cable with large packets. Nobody has
/// chosen the bridge's address and MTU, unless `chosen`.
fn administer(world: &World, side: Side, chosen: bool) {
    ip(world, side, "link delete br0");
    ip(world, side, "link set dev up mtu 9000");
    ip(world, side, "link add br0 type bridge");
    if chosen {
        ip(world, side, "link set br0 address 02:12:34:56:78:9a");
    }
    ip(world, side, "link set dev up master br0");
    if chosen {
        ip(world, side, "link set br0 mtu 8000");
    }
    ip(world, side, "link set br0 up");
}

/// Waits until the tap of a process that has ended is gone.
fn wait_gone(world: &World, side: Side) {
    wait_until("the tap is gone", || link(world, side, "vm0").is_none());
}

fn stopped(mut process: Process) {
    // The built-in guest has no power button.
    process.signal(Signal::SIGTERM);
    assert_eq!(process.wait_exit(), 0);
}

#[test]
fn a_bridge_keeps_its_mtu_and_its_address_whatever_a_vm_does() {
    for chosen in [false, true] {
        let Some(world) = World::new() else { return };
        Side::BOTH.iter().for_each(|side| administer(&world, *side, chosen));
        let before = Side::BOTH.map(|side| picture(&world, side));
        let same = |what: &str| {
            for (side, before) in Side::BOTH.into_iter().zip(&before) {
                assert_eq!(&picture(&world, side), before, "{what}, on {side:?}, chosen {chosen}");
            }
        };
        let mut primary = world.run(Side::A);
        primary.wait_for("started", |e| matches!(e, Event::Started { .. }));
        let tap = link(&world, Side::A, "vm0").unwrap();
        let bridge = link(&world, Side::A, "br0").unwrap();
        assert_eq!((tap.mtu, tap.bridge, tap.up), (bridge.mtu, Some(bridge.index), true));
        assert_eq!(tap.mac.unwrap()[0], 0xfe);
        same("started");
        let mut standby = world.standby(Side::B);
        same("a standby waits");
        primary.wait_protected();
        same("protected");
        primary.kill();
        wait_gone(&world, Side::A);
        same("killed");
        standby.wait_takeover();
        same("taken over");
        let again = world.standby(Side::A);
        standby.wait_protected();
        same("protected again");
        again.kill();
        wait_gone(&world, Side::A);
        same("the standby was killed");
        standby.wait_for("alone", |e| matches!(e, Event::Won { .. }));
        stopped(standby);
        wait_gone(&world, Side::B);
        same("stopped");
    }
}

/// The only port of a bridge, whose address the bridge would take.
#[test]
fn a_bridge_without_other_ports_keeps_its_address() {
    let Some(world) = World::new() else { return };
    ip(&world, Side::A, "link delete br0");
    ip(&world, Side::A, "link add br0 type bridge");
    ip(&world, Side::A, "link set br0 up");
    let before = picture(&world, Side::A);
    let mut primary = world.run_with(Side::A, &[]);
    primary.wait_for("started", |e| matches!(e, Event::Started { .. }));
    // A bridge without a port is up and not running; nothing of that is compared.
    assert_eq!(picture(&world, Side::A), before);
    primary.kill();
    wait_gone(&world, Side::A);
    assert_eq!(picture(&world, Side::A), before);
}

#[test]
fn a_tap_that_was_there_before_stays_as_it_is() {
    let Some(world) = World::new() else { return };
    ip(&world, Side::A, "tuntap add dev own mode tap");
    ip(&world, Side::A, "link set own address 02:00:00:00:00:77 mtu 2000 master br0 up");
    let before = picture(&world, Side::A);
    for end in [Process::kill, stopped] {
        let mut primary = world.run_with(Side::A, &["--net", "tap=own,bridge=br0"]);
        primary.wait_for("started", |e| matches!(e, Event::Started { .. }));
        assert_eq!(picture(&world, Side::A), before);
        end(primary);
        assert_eq!(picture(&world, Side::A), before);
    }
    // It is not attached, and would pull the bridge down.
    ip(&world, Side::A, "link set own nomaster mtu 1000");
    let before = picture(&world, Side::A);
    let mut refused = world.run_with(Side::A, &["--net", "tap=own,bridge=br0"]);
    assert_eq!(refused.wait_exit(), 2);
    refused.wait_says(
        "the tap own has an MTU of 1000 and would reduce that of the bridge br0, which is 1500",
        1,
    );
    assert_eq!(picture(&world, Side::A), before);
}

#[test]
fn a_host_whose_network_does_not_carry_the_vms_packets_is_refused() {
    let Some(world) = World::new() else { return };
    let large = ["--net", "tap=vm0,bridge=br0,mtu=9000"];
    let mut refused = world.run_with(Side::A, &large);
    assert_eq!(refused.wait_exit(), 2);
    refused.wait_says("the VM's card has mtu=9000, but br0 carries 1500 bytes at most", 1);
    // One host is right, and the other is asked before anything is sent.
    administer(&world, Side::A, false);
    let before = picture(&world, Side::B);
    let _standby = world.standby(Side::B);
    let mut primary =
        world.run_with(Side::A, &[&large[..], &["--standby", &Side::B.addr().to_string()]].concat());
    primary.wait_says("standby refused: the VM's card has mtu=9000, but br0 carries 1500 bytes at most", 1);
    assert_eq!(picture(&world, Side::B), before);
    assert!(!primary.has(|e| matches!(e, Event::StandbyAttached { .. } | Event::BaseProgress { .. })));
    administer(&world, Side::B, false);
    primary.wait_protected();
}

#[test]
fn a_vlan_wants_a_bridge_that_looks_at_vlans() {
    let Some(world) = World::new() else { return };
    let before = picture(&world, Side::A);
    let mut refused = world.run_with(Side::A, &["--net", "tap=vm0,bridge=br0,vlan=10"]);
    assert_eq!(refused.wait_exit(), 2);
    refused.wait_says(
        "the bridge br0 does not look at VLANs: switch that on with `ip link set br0 type bridge",
        1,
    );
    assert_eq!(picture(&world, Side::A), before);
    let filters = ["ip", "link", "set", "br0", "type", "bridge", "vlan_filtering", "1"];
    if !Side::BOTH.iter().all(|side| world.command(*side, &filters)) {
        println!("skipped: bridge VLAN filtering");
        return;
    }
    // The cable to the clients carries the VLAN without a tag, too.
    let vlan = ["bridge", "vlan", "add", "dev", "up", "vid", "10", "pvid", "untagged"];
    Side::BOTH.iter().for_each(|side| assert!(world.command(*side, &vlan)));
    let before = Side::BOTH.map(|side| picture(&world, side));
    let mut standby = world.standby(Side::B);
    let there = Side::B.addr().to_string();
    let mut primary = world.run_with(Side::A, &["--net", "tap=vm0,bridge=br0,vlan=10", "--standby", &there]);
    primary.wait_protected();
    assert_eq!(Client::connect(&world).ask("SET where vlan"), Ok(Value::Status("OK".into())));
    primary.kill();
    standby.wait_takeover();
    assert_eq!(Client::connect(&world).ask("GET where"), Ok(Value::Bulk(Some("vlan".into()))));
    wait_gone(&world, Side::A);
    assert_eq!(Side::BOTH.map(|side| picture(&world, side)), before);
}

/// Sends a value and reads it back. Returns the largest segment that the guest's TCP takes.
fn echo(world: &World, value: &str) -> u32 {
    let mut stream = world.lan(|| TcpStream::connect_timeout(&world.server(), PATIENCE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = value.len();
    write!(stream, "*3\r\n$3\r\nSET\r\n$1\r\nv\r\n${length}\r\n{value}\r\n*2\r\n$3\r\nGET\r\n$1\r\nv\r\n")
        .unwrap();
    let due = format!("+OK\r\n${length}\r\n{value}\r\n");
    let mut came = vec![0; due.len()];
    stream.read_exact(&mut came).unwrap();
    assert!(came == due.as_bytes(), "the value came back changed");
    getsockopt(&stream, TcpMaxSeg).unwrap()
}

#[test]
fn large_packets_pass_to_the_guest_and_back_also_after_a_takeover() {
    let Some(world) = World::new() else { return };
    Side::BOTH.iter().for_each(|side| administer(&world, *side, false));
    world.lan(|| {
        let mut netlink = Netlink::open().unwrap();
        ["to-a", "to-b", "br0"].into_iter().for_each(|name| netlink.set_mtu(name, 9000).unwrap());
    });
    let value: String = (0..120_000).map(|at| char::from(b'a' + (at * 7 % 26) as u8)).collect();
    let mut standby = world.standby(Side::B);
    let there = Side::B.addr().to_string();
    let mut primary = world.run_with(Side::A, &["--net", "tap=vm0,bridge=br0,mtu=9000", "--standby", &there]);
    primary.wait_protected();
    let began = Instant::now();
    // Without timestamps: 9000 bytes without the headers of IPv4 and TCP.
    assert!(echo(&world, &value) > 8900, "the guest does not know of large packets");
    primary.kill();
    standby.wait_takeover();
    assert!(echo(&world, &value) > 8900, "the guest has forgotten it");
    println!("{} ms", began.elapsed().as_millis());
    // A guest that was not told of them sends small ones, whatever the bridge carries.
    stopped(standby);
    wait_gone(&world, Side::B);
    std::thread::sleep(Duration::from_millis(10));
    let mut small = world.run_with(Side::B, &NET);
    small.wait_for("started", |e| matches!(e, Event::Started { .. }));
    assert!(echo(&world, &value) <= 1460);
}
