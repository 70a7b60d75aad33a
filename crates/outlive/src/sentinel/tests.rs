use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use outlive_epoch::StrayKey;
use outlive_machine::{MacAddr, Tap};

use super::child::{Links, Order};
use super::*;

/// A link: the end of this host, which stays open, and the peer's.
fn link() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours, theirs)
}

/// A sentinel in this process, and its parent's ends.
struct Rig {
    orders: OwnedFd,
    theirs: OwnedFd,
    reading: Vec<OwnedFd>,
    writing: Vec<OwnedFd>,
}

impl Rig {
    fn new() -> Self {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (orders, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let pipes = [pipe2(OFlag::O_CLOEXEC).unwrap(), pipe2(OFlag::O_CLOEXEC).unwrap()];
        let (reading, writing) = pipes.into_iter().unzip();
        Self { orders, theirs, reading, writing }
    }

    fn serve(&self) {
        let pipes: [BorrowedFd<'_>; 2] = [self.reading[0].as_fd(), self.reading[1].as_fd()];
        Links::default().serve(self.theirs.as_fd(), pipes).unwrap();
    }
}

fn hears_the_end(peer: &mut TcpStream) -> bool {
    match peer.read(&mut [0; 8]) {
        Ok(count) => count == 0,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            false
        }
    }
}

#[test]
fn the_end_of_either_pipe_ends_the_links_although_their_sockets_are_open() {
    for dead in [0, 1] {
        let mut rig = Rig::new();
        let (mut kept, mut released) = (link(), link());
        send(&rig.orders, &Order::Guard, 1, &[kept.0.as_raw_fd()]);
        send(&rig.orders, &Order::Guard, 2, &[released.0.as_raw_fd()]);
        send(&rig.orders, &Order::Release, 2, &[]);
        kept.0.write_all(b"last").unwrap();
        rig.writing.remove(dead);
        rig.serve();
        kept.1.set_nonblocking(false).unwrap();
        let mut heard = Vec::new();
        kept.1.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, b"last", "what was on its way arrives first");
        assert!(!hears_the_end(&mut released.1), "a link that its owner was done with");
    }
}

/// What it hears of last may be no order at all: here its parent is dead and there is nothing to hear it by.
#[test]
fn a_sentinel_that_cannot_hear_its_dead_parent_ends_the_links_that_it_has() {
    let mut rig = Rig::new();
    let (ours, mut theirs) = link();
    let mut links = Links::default();
    links.carry_out(Some((Order::Guard, 1)), vec![ours.try_clone().unwrap().into()]);
    rig.writing.remove(1);
    let deaf = fs::File::open("/dev/null").unwrap();
    let pipes = [rig.reading[0].as_fd(), rig.reading[1].as_fd()];
    let error = links.serve(deaf.as_fd(), pipes).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::ENOTSOCK));
    theirs.set_nonblocking(false).unwrap();
    assert!(hears_the_end(&mut theirs));
}

/// Behind the links: those are what a standby waits for.
#[test]
fn frames_that_wait_in_a_tap_follow_the_guest_when_its_host_is_dead() {
    let mut rig = Rig::new();
    let standby = UdpSocket::bind("127.0.0.1:0").unwrap();
    standby.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let (network, queue) = UnixDatagram::pair().unwrap();
    queue.set_nonblocking(true).unwrap();
    let (mut kept, guest, key) = (link(), MacAddr([2; 6]), StrayKey([5; 32]));
    let tap = Tap::of_queues("tap", vec![queue.into()]);
    let strays = Strays::new(tap, guest, standby.local_addr().unwrap(), key);
    let (wards, channel) = ([Ward::Strays(Arc::downgrade(&strays)), Ward::Link(Weak::new())], &rig.orders);
    wards.iter().zip(1..).for_each(|(ward, number)| ward.entrust(channel, number));
    send(channel, &Order::Guard, 3, &[kept.0.as_raw_fd()]);
    let frame = |from: [u8; 6]| [&[0; 12][..], &guest.0, &from, b"text"].concat();
    network.send(&frame([9; 6])).unwrap();
    network.send(&frame(guest.0)).unwrap();
    rig.writing.remove(0);
    rig.serve();
    assert!(hears_the_end(&mut kept.1));
    let mut datagram = [0; 256];
    let len = standby.recv(&mut datagram).unwrap();
    assert_eq!(len, 12 + 2 + frame([9; 6]).len() + 16, "nonce, queue pair, frame, tag");
    standby.set_nonblocking(true).unwrap();
    assert!(standby.recv(&mut datagram).is_err(), "the guest's own words went with it");
}

#[test]
fn orders_that_are_none_are_passed_over() {
    let orders =
        [Order::Guard, Order::Release, Order::Follow { guest: MacAddr([3; 6]), key: StrayKey([4; 32]) }];
    let mut links = Links::default();
    for order in orders {
        let message = order.message(7);
        assert_eq!(Order::parse(&message), Some((order, 7)));
        assert_eq!(Order::parse(&message[..message.len() - 1]), None);
        assert_eq!(Order::parse(&[&message[..], &[0]].concat()), None);
        links.carry_out(Order::parse(&message), Vec::new());
    }
}

#[test]
fn a_sentinel_that_is_replaced_ends_no_link() {
    let mut rig = Rig::new();
    let (mut ours, mut theirs) = link();
    send(&rig.orders, &Order::Guard, 1, &[ours.as_raw_fd()]);
    send(&rig.orders, &Order::Guard, u64::MAX, &[]);
    rig.orders = rig.theirs.try_clone().unwrap();
    rig.serve();
    assert!(!hears_the_end(&mut theirs));
    ours.write_all(b"goes on").unwrap();
}

#[test]
fn a_keeper_alone_has_its_pipe_and_nothing_else() {
    let before = fs::File::open("/proc/self/exe").unwrap();
    let reading = keeper("keeper-test").unwrap();
    let mut on = [PollFd::new(reading.as_fd(), PollFlags::empty())];
    assert_eq!(poll(&mut on, PollTimeout::ZERO), Ok(0), "the pipe has a writing end");
    let named = |task: &fs::DirEntry| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == "keeper-test")
    };
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(Result::unwrap);
    let keeper = tasks.into_iter().find(named).expect("the thread is there");
    let pipe = fs::read_link(format!("/proc/self/fd/{}", reading.as_raw_fd())).unwrap();
    let open = |table: &std::path::Path| -> Vec<_> {
        let fds = fs::read_dir(table).unwrap().map(Result::unwrap);
        fds.filter_map(|fd| fs::read_link(fd.path()).ok()).collect()
    };
    assert_eq!(open(&keeper.path().join("fd")), std::slice::from_ref(&pipe), "the writing end");
    let ours = open("/proc/self/fd".as_ref());
    assert_eq!(ours.iter().filter(|it| **it == pipe).count(), 1, "the reading end");
    drop(before);
}

/// A lock that somebody has when a keeper starts ends with its file, and not with the process.
#[test]
fn a_keeper_holds_nobodys_lock() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let file = fs::File::create_new(&path).unwrap();
    file.lock().unwrap();
    let _reading = keeper("keeper-lock").unwrap();
    drop(file);
    let other = fs::File::open(&path).unwrap();
    // A child that another test starts has it for a moment.
    let taken = (0..500).any(|_| {
        other.try_lock().is_ok() || {
            std::thread::sleep(Duration::from_millis(10));
            false
        }
    });
    assert!(taken, "the lock is still held");
}
