use std::os::unix::net::UnixDatagram;
use std::sync::{Mutex, Weak};
use std::time::{Duration, Instant};

use super::*;

const GUEST: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const BOUND: Duration = Duration::from_secs(30);

/// Somebody who has the guest.
#[derive(Default)]
struct Got(Mutex<Vec<(u16, Vec<u8>)>>);

impl Sink for Got {
    fn stray(&self, pair: u16, packet: &[u8]) {
        self.0.lock().unwrap().push((pair, packet.to_vec()));
    }
}

impl Got {
    fn wait_for(&self, count: usize) -> Vec<(u16, Vec<u8>)> {
        let until = Instant::now() + BOUND;
        while self.0.lock().unwrap().len() < count {
            assert!(Instant::now() < until, "{:?}", self.0.lock().unwrap());
            std::thread::sleep(Duration::from_millis(1));
        }
        self.0.lock().unwrap().clone()
    }
}

/// A packet of virtio-net whose frame comes from this address.
fn packet(from: [u8; 6], text: &[u8]) -> Vec<u8> {
    [&[0; 12][..], &GUEST.0, &from, text].concat()
}

fn of_client(text: &[u8]) -> Vec<u8> {
    packet([2, 0, 0, 0, 0, 9], text)
}

/// A standby that takes strays, and the way to it from a tap with two queues, of which the network has the other ends.
struct Rig {
    intake: Intake,
    got: Arc<Got>,
    key: StrayKey,
    to: SocketAddr,
    network: Vec<UnixDatagram>,
    queues: Vec<UnixDatagram>,
}

impl Rig {
    fn new() -> Self {
        let intake = Intake::claim("127.0.0.1:0".parse().unwrap()).unwrap();
        let (to, got, key) =
            (intake.socket().local_addr().unwrap(), Arc::new(Got::default()), draw_key().unwrap());
        intake.open().unwrap();
        let sink: Weak<Got> = Arc::downgrade(&got);
        intake.expect(&key, sink);
        let (network, queues): (Vec<_>, Vec<UnixDatagram>) =
            (0..2).map(|_| UnixDatagram::pair().unwrap()).unzip();
        queues.iter().for_each(|queue| queue.set_nonblocking(true).unwrap());
        Self { intake, got, key, to, network, queues }
    }

    fn strays(&self) -> Arc<Strays> {
        let queues = self.queues.iter().map(|queue| queue.try_clone().unwrap().into()).collect();
        Strays::new(Tap::of_queues("tap", queues), GUEST, self.to, self.key.clone())
    }
}

#[test]
fn what_waits_in_the_queues_follows_the_guest_until_it_is_heard_from_elsewhere() {
    let rig = Rig::new();
    let strays = rig.strays();
    rig.network[0].send(&of_client(b"before")).unwrap();
    rig.network[1].send(&of_client(b"other queue")).unwrap();
    rig.network[0].send(&packet(GUEST.0, b"the guest itself")).unwrap();
    rig.network[0].send(&of_client(b"behind its words")).unwrap();
    assert!(strays.follow().unwrap().is_some());
    let mut got = rig.got.wait_for(3);
    let of = |text| of_client(text);
    got.sort_by_key(|it| it.0);
    let expected = [(0, of(b"before")), (0, of(b"behind its words")), (1, of(b"other queue"))];
    assert_eq!(got, expected);
    let until = Instant::now() + BOUND;
    while Arc::strong_count(&strays) > 1 {
        assert!(Instant::now() < until, "it goes on although the guest was heard");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(strays.follow().unwrap().is_none(), "a key seals nothing twice");
}

#[test]
fn a_guest_that_runs_here_again_keeps_its_frames() {
    let rig = Rig::new();
    let strays = rig.strays();
    strays.follow().unwrap().expect("it is the first time").stop();
    let until = Instant::now() + BOUND;
    while Arc::strong_count(&strays) > 1 {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.network[0].send(&of_client(b"for the card")).unwrap();
    assert!(rig.queues[0].recv(&mut [0; 64]).is_ok());
}

#[test]
fn only_what_the_old_host_has_sealed_is_given_and_only_once() {
    let rig = Rig::new();
    let sealed = |key: &StrayKey, by, count: u8| {
        let mut sealer = seal::Sealer::new(key, by);
        (0..count)
            .map(|number| {
                let mut out = Vec::new();
                assert!(sealer.seal(1, &of_client(&[number]), &mut out));
                out
            })
            .collect::<Vec<_>>()
    };
    let (process, sentinel) = (sealed(&rig.key, By::Process, 2), sealed(&rig.key, By::Sentinel, 1));
    let take = |datagram: &[u8]| {
        let before = rig.got.0.lock().unwrap().len();
        rig.intake.take(&mut datagram.to_vec());
        rig.got.0.lock().unwrap().len() - before
    };
    assert_eq!(take(&sealed(&StrayKey([7; 32]), By::Process, 1)[0]), 0, "sealed with another key");
    for changed in 0..process[0].len() {
        let mut datagram = process[0].clone();
        datagram[changed] ^= 1;
        assert_eq!(take(&datagram), 0, "changed at {changed}");
        assert_eq!(take(&process[0][..changed]), 0, "cut at {changed}");
    }
    assert_eq!((take(&process[1]), take(&process[1])), (1, 0), "the same again");
    assert_eq!(take(&process[0]), 0, "an older one");
    assert_eq!(take(&sentinel[0]), 1, "whose numbers are its own");
    let nobody: Weak<Got> = Weak::new();
    rig.intake.expect(&draw_key().unwrap(), nobody);
    assert_eq!(take(&sealed(&rig.key, By::Process, 9)[8]), 0, "the link is another one now");
}

#[test]
fn a_host_that_has_taken_over_still_takes_them_although_the_session_is_over() {
    let rig = Rig::new();
    let got = rig.got.clone();
    rig.intake.runs_here(got.clone());
    drop(got);
    let strays = rig.strays();
    rig.network[0].send(&of_client(b"late")).unwrap();
    strays.follow().unwrap();
    assert_eq!(rig.got.wait_for(1), [(0, of_client(b"late"))]);
}

#[test]
fn whoever_floods_the_port_gets_nothing() {
    let rig = Rig::new();
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger.connect(rig.to).unwrap();
    for length in 0..2000 {
        stranger.send(&vec![length as u8; length % 1400]).ok();
    }
    rig.strays().follow().unwrap();
    // The kernel drops what comes while the flood fills its buffer, as a client would send it again.
    let until = Instant::now() + BOUND;
    while rig.got.0.lock().unwrap().is_empty() {
        assert!(Instant::now() < until, "nothing follows the guest any more");
        rig.network[0].send(&of_client(b"late")).unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(rig.got.0.lock().unwrap().iter().all(|got| *got == (0, of_client(b"late"))));
}

/// As if its interface was deleted, or had less of them in use.
#[test]
fn a_queue_that_is_broken_keeps_no_other_from_being_read() {
    let mut rig = Rig::new();
    let (broken, writing) = nix::unistd::pipe().unwrap();
    drop(writing);
    rig.queues.insert(0, UnixDatagram::from(broken));
    rig.strays().follow().unwrap();
    // The queues were looked at before.
    std::thread::sleep(Duration::from_millis(50));
    rig.network[1].send(&of_client(b"late")).unwrap();
    assert_eq!(rig.got.wait_for(1), [(2, of_client(b"late"))]);
}

/// Each thread of the process has it, also one that a guest may have got hold of.
#[test]
fn nothing_can_be_sent_from_the_intake() {
    let (intake, other) =
        (Intake::claim("127.0.0.1:0".parse().unwrap()).unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let (socket, to) = (intake.socket(), other.local_addr().unwrap());
    assert_eq!(socket.send_to(b"out", to).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    socket.connect(to).unwrap();
    assert_eq!(socket.send(b"out").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}
