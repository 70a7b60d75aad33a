//! A real tap interface, in a network namespace of the test's own.

// UNSAFETY: namespaces, packet sockets and interface flags have no safe wrapper here.
#![allow(unsafe_code)]

use std::fs::File;
use std::mem;
use std::os::fd::FromRawFd;
use std::thread;

use super::*;
use crate::devices::virtio::net::tap::{Tap, TapError, attach_error, open_error};

/// The EtherType for experiments; also in the frames of the tests.
const ETHERTYPE: u16 = 0x88b5;

/// Runs `test` on a thread in a network namespace of its own, if the machine lets us.
pub(crate) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let ran = thread::spawn(move || {
        // SAFETY: changes the namespace of this thread only; no pointers are involved.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 || !std::path::Path::new("/dev/net/tun").exists()
        {
            eprintln!("skipped: needs root and /dev/net/tun");
            return;
        }
        test();
    });
    ran.join().unwrap();
}

pub(super) fn set_up(name: &str, up: bool) {
    // SAFETY: plain system calls; the request outlives them and has room for what they write.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        assert!(socket >= 0);
        let mut request: libc::ifreq = mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        assert_eq!(libc::ioctl(socket, libc::SIOCGIFFLAGS, &mut request), 0);
        let flag = libc::IFF_UP as libc::c_short;
        if up {
            request.ifr_ifru.ifru_flags |= flag;
        } else {
            request.ifr_ifru.ifru_flags &= !flag;
        }
        assert_eq!(libc::ioctl(socket, libc::SIOCSIFFLAGS, &request), 0);
        libc::close(socket);
    }
}

pub(super) fn index_of(name: &str) -> u32 {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: the name is a C string that lives during the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

/// A socket that sees and sends whole frames on the interface, from the kernel's side.
pub(super) fn packet_socket(name: &str, protocol: u16) -> File {
    let protocol = protocol.to_be();
    // SAFETY: plain system calls with an address that outlives them; the descriptor is new and owned by no
    // one else.
    unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let socket = libc::socket(libc::AF_PACKET, kind, i32::from(protocol));
        assert!(socket >= 0);
        let mut address: libc::sockaddr_ll = mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index_of(name) as i32;
        let len = mem::size_of::<libc::sockaddr_ll>() as u32;
        assert_eq!(libc::bind(socket, (&raw const address).cast(), len), 0);
        File::from_raw_fd(socket)
    }
}

#[test]
fn frames_pass_between_guest_and_kernel() {
    in_namespace(|| {
        use std::io::{Read, Write};
        let memory = memory();
        let tap = Arc::new(Tap::open("outlive0").unwrap());
        assert_eq!(tap.name(), "outlive0");
        set_up("outlive0", true);
        let mut host = packet_socket("outlive0", ETHERTYPE);
        let output = Held::new(tap.clone(), OutputLimits::default(), OutputMode::PassThrough);
        let mut rig = Rig::usual(&memory);
        rig.put_behind(tap, &output);
        let driver = rig.boot(FEATURES);
        rig.device.go_live(false);

        let mut buffer = [0; 2048];
        for n in 0..20u16 {
            driver.send(n, &frame(n.into(), 60 + usize::from(n) * 70));
            rig.kick_tx();
            let mut got = 0;
            wait_for("a frame at the host", || {
                host.read(&mut buffer).is_ok_and(|len| {
                    got = len;
                    true
                })
            });
            assert_eq!(buffer[..got], frame(n.into(), 60 + usize::from(n) * 70));
        }
        for slot in 0..QUEUE {
            driver.give_buffer(slot, 1526);
        }
        rig.kick_rx();
        for n in 0..20 {
            host.write_all(&frame(n, 60 + n as usize * 70)).unwrap();
        }
        // The kernel may send frames of its own (neighbour discovery) in between.
        let mine = || {
            let all = (0..driver.rx_used()).map(|index| driver.received(index));
            all.filter(|frame| frame[12..14] == ETHERTYPE.to_be_bytes()).collect::<Vec<_>>()
        };
        wait_for("frames at the guest", || mine().len() == 20);
        assert_eq!(mine(), (0..20).map(|n| frame(n, 60 + n as usize * 70)).collect::<Vec<_>>());
        // An interface that is down takes nothing, and the guest does not notice.
        set_up("outlive0", false);
        driver.send(20, &frame(20, 60));
        rig.kick_tx();
        wait_for("the frame to go", || driver.tx_used() == 21);
        wait_for("the tap's refusal", || output.stats().refused_frames == 1);
        set_up("outlive0", true);
        driver.send(21, &frame(21, 60));
        rig.kick_tx();
        wait_for("the next one", || host.read(&mut buffer).is_ok());
        assert_eq!(buffer[..60], frame(21, 60));
    });
}

#[test]
fn the_interface_lives_as_long_as_the_tap_and_belongs_to_one() {
    in_namespace(|| {
        let tap = Tap::open("outlive1").unwrap();
        assert_ne!(index_of("outlive1"), 0);
        assert!(matches!(Tap::open("outlive1"), Err(TapError::Busy { name }) if name == "outlive1"));
        drop(tap);
        assert_eq!(index_of("outlive1"), 0, "nothing is left behind");
        assert!(matches!(Tap::open("lo"), Err(TapError::NotATap { .. })));
        Tap::open("fifteen-letters").unwrap();
    });
}

/// What `ip` does in the test's namespace.
pub(super) fn ip(command: &str) {
    let done = std::process::Command::new("ip").args(command.split(' ')).status().unwrap();
    assert!(done.success(), "ip {command}");
}

#[test]
fn interfaces_made_by_others_are_used_as_they_were_made() {
    in_namespace(|| {
        ip("tuntap add dev one mode tap");
        assert!(matches!(Tap::with_queues("one", 2), Err(TapError::OneQueue { name }) if name == "one"));
        drop(Tap::open("one").unwrap());
        ip("tuntap add dev many mode tap multi_queue");
        drop(Tap::open("many").unwrap());
        assert_eq!(Tap::with_queues("many", 8).unwrap().pairs(), 8);
        assert!(matches!(Tap::with_queues("lo", 2), Err(TapError::NotATap { .. })));
    });
}

#[test]
fn names_the_kernel_would_misread_are_refused() {
    for name in ["", ".", "..", "sixteen-letters-", "a/b", "tap%d", "a b", "a:1", "täp"] {
        assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name}");
    }
}

#[test]
fn each_failure_names_its_remedy() {
    let error = io::Error::from_raw_os_error;
    for (failure, remedy) in [
        (open_error("t", error(libc::ENOENT)), "modprobe tun"),
        (open_error("t", error(libc::ENODEV)), "modprobe tun"),
        (open_error("t", error(libc::EACCES)), "run as root"),
        (attach_error("t", error(libc::EPERM)), "ip tuntap add dev t mode tap user"),
        (attach_error("t", error(libc::EBUSY)), "another name"),
        (attach_error("t", error(libc::EINVAL)), "not a tap"),
        (attach_error("t", error(libc::ENOMEM)), "cannot open the tap interface t"),
    ] {
        assert!(failure.to_string().contains(remedy), "{failure}");
    }
}
