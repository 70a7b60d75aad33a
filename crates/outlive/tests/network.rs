//! The network plumbing against the real kernel. Every test makes network namespaces of its own, on threads,
//! so the tests run side by side and leave nothing behind.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::panic::catch_unwind;
use std::process::{Command, Stdio};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use namespace::namespace;
use outlive::network::{Namespace, Netlink, NetlinkError};
use proptest::prelude::*;

#[path = "common/namespace.rs"]
mod namespace;

/// Two endpoints on one bridge: `left` is 10.77.0.1 and `right` is 10.77.0.2. The ports of the bridge are
/// `port-left` and `port-right`.
struct Cabled {
    bridge: Namespace,
    left: Namespace,
    right: Namespace,
}

impl Cabled {
    fn new() -> Option<Cabled> {
        let cabled = Cabled { bridge: namespace()?, left: namespace()?, right: namespace()? };
        let connect = || {
            let mut netlink = Netlink::open().unwrap();
            netlink.create_bridge("br0").unwrap();
            for (port, far, endpoint) in
                [("port-left", "left0", &cabled.left), ("port-right", "right0", &cabled.right)]
            {
                netlink.create_veth(port, far).unwrap();
                netlink.move_to_namespace(far, endpoint.as_fd()).unwrap();
                netlink.attach(port, "br0").unwrap();
                netlink.set_up(port).unwrap();
                assert!(!netlink.exists(far).unwrap(), "{far} left this namespace");
            }
            netlink.set_up("br0").unwrap();
        };
        cabled.bridge.run(connect).unwrap();
        for (endpoint, interface, last) in [(&cabled.left, "left0", 1), (&cabled.right, "right0", 2)] {
            let configure = || {
                let mut netlink = Netlink::open().unwrap();
                netlink.add_address(interface, Ipv4Addr::new(10, 77, 0, last), 24).unwrap();
                netlink.set_up(interface).unwrap();
            };
            endpoint.run(configure).unwrap();
        }
        Some(cabled)
    }

    /// Sends a line from right to left and back over a new connection.
    fn talk(&self, patience: Duration) -> std::io::Result<()> {
        let listener = self.left.run(|| TcpListener::bind("10.77.0.1:0").unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let mut client = self.right.run(|| TcpStream::connect_timeout(&address, patience)).unwrap()?;
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(b"hello").unwrap();
        let mut received = [0; 5];
        client.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"hello");
        Ok(())
    }
}

#[test]
fn a_bridge_forwards_at_once_and_a_cut_link_stops_it() {
    let Some(cabled) = Cabled::new() else { return };
    // A bridge with its usual forward delay would take 15 seconds.
    let start = Instant::now();
    cabled.talk(Duration::from_secs(10)).unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "the bridge held traffic back");

    let port = |up: bool| {
        let change = move || {
            let mut netlink = Netlink::open().unwrap();
            if up { netlink.set_up("port-left") } else { netlink.set_down("port-left") }.unwrap();
            assert_eq!(netlink.link("port-left").unwrap().up, up);
        };
        cabled.bridge.run(change).unwrap();
    };
    port(false);
    assert!(cabled.talk(Duration::from_millis(300)).is_err(), "traffic went through a cut link");
    port(true);
    cabled.talk(Duration::from_secs(10)).unwrap();

    let detach = || Netlink::open().unwrap().detach("port-left").unwrap();
    cabled.bridge.run(detach).unwrap();
    assert!(cabled.talk(Duration::from_millis(300)).is_err(), "traffic went round the bridge");
}

#[test]
fn a_bridge_keeps_its_address_when_ports_come_and_go() {
    let Some(namespace) = namespace() else { return };
    let work = || {
        let mut netlink = Netlink::open().unwrap();
        netlink.create_bridge("br0").unwrap();
        let own = netlink.link("br0").unwrap().mac.unwrap();
        assert_eq!(own[0] & 3, 2, "locally administered and not multicast");
        netlink.create_veth("low", "far").unwrap();
        netlink.set_mac("low", [2, 0, 0, 0, 0, 1]).unwrap();
        assert_eq!(netlink.link("low").unwrap().mac, Some([2, 0, 0, 0, 0, 1]));
        netlink.attach("low", "br0").unwrap();
        assert_eq!(netlink.link("low").unwrap().bridge, Some(netlink.index("br0").unwrap()));
        assert_eq!(netlink.link("br0").unwrap().mac, Some(own));
        netlink.delete("low").unwrap();
        assert_eq!(netlink.link("br0").unwrap().mac, Some(own));
        assert!(!netlink.exists("far").unwrap(), "the other end goes with it");
    };
    namespace.run(work).unwrap();
}

#[test]
fn a_default_route_leads_out() {
    let Some(cabled) = Cabled::new() else { return };
    let work = || {
        let reach = || UdpSocket::bind("0.0.0.0:0").unwrap().connect("192.0.2.1:9");
        assert_eq!(reach().unwrap_err().kind(), ErrorKind::NetworkUnreachable);
        let mut netlink = Netlink::open().unwrap();
        netlink.add_default_route(Ipv4Addr::new(10, 77, 0, 1)).unwrap();
        reach().unwrap();
        let wrong = netlink.add_default_route(Ipv4Addr::new(198, 51, 100, 1)).unwrap_err();
        assert!(wrong.to_string().contains("add a default route through 198.51.100.1"), "{wrong}");
    };
    cabled.right.run(work).unwrap();
}

#[test]
fn errors_say_what_is_wrong_and_what_there_is() {
    let Some(namespace) = namespace() else { return };
    let work = || {
        let mut netlink = Netlink::open().unwrap();
        netlink.create_bridge("br0").unwrap();
        let missing = netlink.set_up("tap7").unwrap_err().to_string();
        assert_eq!(
            missing,
            "no interface named tap7: cannot set tap7 up (interfaces here: lo, br0); make it first, or name another one"
        );
        let missing = netlink.attach("br0", "br7").unwrap_err().to_string();
        assert!(missing.starts_with("no interface named br7: cannot attach br0 to bridge br7"), "{missing}");
        assert!(missing.contains("(interfaces here: lo);"), "br0 cannot join itself: {missing}");
        assert!(matches!(netlink.create_bridge("br0"), Err(NetlinkError::Exists { .. })));
        assert!(matches!(netlink.create_veth("br0", "b"), Err(NetlinkError::Exists { .. })));
        assert!(matches!(netlink.create_veth("a", "br0"), Err(NetlinkError::Exists { .. })));
        assert!(matches!(netlink.create_bridge("much-too-long-name"), Err(NetlinkError::BadName { .. })));
        assert!(matches!(netlink.delete("../etc"), Err(NetlinkError::BadName { .. })));
        let no_bridge = netlink.attach("br0", "lo").unwrap_err().to_string();
        assert_eq!(
            no_bridge,
            "cannot attach br0 to bridge lo: lo is no bridge; make one (ip link add br0 type bridge) or name another one"
        );
        // The error includes the kernel's own words: here about a bridge in a bridge.
        netlink.create_bridge("br1").unwrap();
        let refused = netlink.attach("br1", "br0").unwrap_err().to_string();
        assert!(refused.contains("Can not enslave a bridge to a bridge"), "{refused}");
        // A failed request does not spoil the next one.
        assert_eq!(netlink.links().unwrap().len(), 3);
    };
    namespace.run(work).unwrap();
}

#[test]
fn a_namespace_goes_with_its_handle() {
    let (Some(stays), Some(goes)) = (namespace(), namespace()) else { return };
    let connect = || {
        let mut netlink = Netlink::open().unwrap();
        netlink.create_veth("here", "there").unwrap();
        netlink.move_to_namespace("there", goes.as_fd()).unwrap();
    };
    stays.run(connect).unwrap();
    drop(goes);
    // The kernel removes it in the background, and that cuts the cable.
    let deadline = Instant::now() + Duration::from_secs(20);
    while stays.run(|| Netlink::open().unwrap().exists("here").unwrap()).unwrap() {
        assert!(Instant::now() < deadline, "the namespace is still there");
        sleep(Duration::from_millis(20));
    }
}

#[test]
fn processes_run_inside_and_panics_come_out() {
    let Some(namespace) = namespace() else { return };
    namespace.run(|| Netlink::open().unwrap().create_bridge("only-in-here").unwrap()).unwrap();
    let mut command = Command::new("cat");
    command.arg("/proc/self/net/dev").stdout(Stdio::piped());
    let output = namespace.spawn(&mut command).unwrap().wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("only-in-here"));
    assert!(!Netlink::open().unwrap().exists("only-in-here").unwrap());
    let panic = catch_unwind(|| namespace.run(|| panic!("inside"))).unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"inside"));
}

#[test]
fn many_namespaces_at_once_do_not_disturb_each_other() {
    if namespace().is_none() {
        return;
    }
    let here: Vec<String> =
        Netlink::open().unwrap().links().unwrap().into_iter().map(|link| link.name).collect();
    scope(|threads| {
        for number in 0..8_u8 {
            threads.spawn(move || {
                let namespace = Namespace::new().unwrap();
                let work = || {
                    let mut netlink = Netlink::open().unwrap();
                    netlink.create_bridge("br0").unwrap();
                    netlink.add_address("br0", Ipv4Addr::new(10, 77, number, 1), 24).unwrap();
                    netlink.set_up("br0").unwrap();
                    let listener = TcpListener::bind(("127.0.0.1", 6379)).unwrap();
                    assert_eq!(listener.local_addr().unwrap(), SocketAddr::from(([127, 0, 0, 1], 6379)));
                    sleep(Duration::from_millis(50));
                    assert_eq!(netlink.links().unwrap().len(), 2, "lo and br0");
                };
                namespace.run(work).unwrap();
            });
        }
    });
    let after: Vec<String> =
        Netlink::open().unwrap().links().unwrap().into_iter().map(|link| link.name).collect();
    assert_eq!(here, after);
}

/// A change of the network, by numbers from which the test makes the names.
#[derive(Debug, Clone, Copy)]
enum Change {
    Bridge(u8),
    Veth(u8, u8),
    Attach(u8, u8),
    Detach(u8),
    Up(u8, bool),
    Delete(u8),
}

fn change() -> impl Strategy<Value = Change> {
    let name = || 0..5_u8;
    prop_oneof![
        name().prop_map(Change::Bridge),
        (name(), name()).prop_map(|(a, b)| Change::Veth(a, b)),
        (name(), name()).prop_map(|(a, b)| Change::Attach(a, b)),
        name().prop_map(Change::Detach),
        (name(), any::<bool>()).prop_map(|(a, up)| Change::Up(a, up)),
        name().prop_map(Change::Delete),
    ]
}

/// The expected state: for each name, whether it is a bridge, its other end, its bridge, and whether it is
/// up.
#[derive(Debug, Clone, Default, PartialEq)]
struct Expected(BTreeMap<u8, Interface>);

#[derive(Debug, Clone, Default, PartialEq)]
struct Interface {
    is_bridge: bool,
    other_end: Option<u8>,
    port_of: Option<u8>,
    up: bool,
}

impl Expected {
    /// Makes the change if the kernel should make it; false if it should refuse.
    fn apply(&mut self, change: Change) -> bool {
        let is = |name: &u8, bridge: bool| self.0.get(name).is_some_and(|it| it.is_bridge == bridge);
        match change {
            Change::Bridge(a) if !self.0.contains_key(&a) => {
                self.0.insert(a, Interface { is_bridge: true, ..Interface::default() });
            }
            Change::Veth(a, b) if a != b && !self.0.contains_key(&a) && !self.0.contains_key(&b) => {
                self.0.insert(a, Interface { other_end: Some(b), ..Interface::default() });
                self.0.insert(b, Interface { other_end: Some(a), ..Interface::default() });
            }
            Change::Attach(a, b) if is(&a, false) && is(&b, true) => {
                self.0.get_mut(&a).unwrap().port_of = Some(b);
            }
            Change::Detach(a) if self.0.contains_key(&a) => self.0.get_mut(&a).unwrap().port_of = None,
            Change::Up(a, up) if self.0.contains_key(&a) => self.0.get_mut(&a).unwrap().up = up,
            Change::Delete(a) if self.0.contains_key(&a) => {
                if let Some(other) = self.0.remove(&a).unwrap().other_end {
                    self.0.remove(&other);
                }
                self.0.values_mut().filter(|it| it.port_of == Some(a)).for_each(|it| it.port_of = None);
            }
            _ => return false,
        }
        true
    }
}

fn execute(netlink: &mut Netlink, change: Change) -> Result<(), NetlinkError> {
    let name = |number: u8| format!("if{number}");
    match change {
        Change::Bridge(a) => netlink.create_bridge(&name(a)),
        Change::Veth(a, b) => netlink.create_veth(&name(a), &name(b)),
        Change::Attach(a, b) => netlink.attach(&name(a), &name(b)),
        Change::Detach(a) => netlink.detach(&name(a)),
        Change::Up(a, true) => netlink.set_up(&name(a)),
        Change::Up(a, false) => netlink.set_down(&name(a)),
        Change::Delete(a) => netlink.delete(&name(a)),
    }
}

/// The actual state, in the form of [`Expected`] as far as the kernel reports it: name, bridge, up.
fn present(netlink: &mut Netlink) -> BTreeSet<(String, Option<String>, bool)> {
    let links = netlink.links().unwrap();
    let names: BTreeMap<u32, String> = links.iter().map(|link| (link.index, link.name.clone())).collect();
    let others = links.into_iter().filter(|link| link.name != "lo");
    others.map(|link| (link.name, link.bridge.map(|index| names[&index].clone()), link.up)).collect()
}

#[test]
fn random_changes_have_exactly_the_expected_effect() {
    if namespace().is_none() {
        return;
    }
    let config = ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(changes in proptest::collection::vec(change(), 1..25))| {
        let namespace = Namespace::new().unwrap();
        namespace.run(|| {
            let mut netlink = Netlink::open().unwrap();
            let mut expected = Expected::default();
            for change in changes {
                let made = expected.apply(change);
                let result = execute(&mut netlink, change);
                assert_eq!(result.is_ok(), made, "{change:?}: {result:?}");
                let wanted = expected.0.iter().map(|(name, it)| {
                    (format!("if{name}"), it.port_of.map(|bridge| format!("if{bridge}")), it.up)
                });
                assert_eq!(present(&mut netlink), wanted.collect(), "after {change:?}");
            }
        }).unwrap();
    });
}
