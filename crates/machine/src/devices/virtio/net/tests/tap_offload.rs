//! What the kernel makes of the headers: TCP segments cut and summed by it, or left to the guest; flows that
//! come back in the queue they were sent from.

// UNSAFETY: options of packet sockets and of interfaces have no safe wrapper here.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::mem;

use super::tap::{in_namespace, index_of, ip, packet_socket, set_up};
use super::*;
use crate::devices::virtio::net::Tap;
use crate::devices::virtio::net::offload::{
    CSUM, CTRL_VQ, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, Header, MQ, MRG_RXBUF,
};

const IPV4: u16 = 0x0800;
/// Ethernet, IPv4 and TCP headers without options.
const HEADERS: usize = 54;
const SEGMENT: usize = 1446;

/// A TCP segment of a flow with this number, its checksum unfinished: only that of the pseudo header.
fn tcp(flow: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; HEADERS];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&MAC.0);
    frame[12..14].copy_from_slice(&IPV4.to_be_bytes());
    let len = (40 + payload.len()) as u16;
    frame[14..26].copy_from_slice(&[
        0x45,
        0,
        len.to_be_bytes()[0],
        len.to_be_bytes()[1],
        0,
        1,
        0,
        0,
        64,
        6,
        0,
        0,
    ]);
    frame[26..34].copy_from_slice(&[10, 9, 0, 2, 10, 9, 0, 1]);
    let sum = !fold(sum(&frame[14..34]));
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame[34..38].copy_from_slice(&[flow.to_be_bytes(), 80u16.to_be_bytes()].concat());
    frame[38..42].copy_from_slice(&1000u32.to_be_bytes());
    frame[46..50].copy_from_slice(&[0x50, 0x10, 0xff, 0xff]);
    let pseudo = fold(pseudo(&frame, len - 20));
    frame[50..52].copy_from_slice(&pseudo.to_be_bytes());
    frame.extend(payload);
    frame
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn pseudo(frame: &[u8], len: u16) -> u32 {
    sum(&frame[26..34]) + 6 + u32::from(len)
}

/// Whether this is a segment of ours: the kernel has IPv4 frames of its own (IGMP).
fn is_tcp(frame: &[u8]) -> bool {
    frame[12..14] == IPV4.to_be_bytes() && frame[23] == 6
}

/// No IPv6 in this namespace: its frames would take receive buffers.
fn quiet() {
    // Where there is no IPv6 there is nothing to do.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
}

/// The payload of a finished segment, with its place in the flow; both checksums are checked.
fn finished(frame: &[u8]) -> (u32, Vec<u8>) {
    let len = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    let frame = &frame[..14 + len];
    assert_eq!(fold(sum(&frame[14..34])), 0xffff, "the sum of the IP header");
    assert_eq!(fold(pseudo(frame, len as u16 - 20) + sum(&frame[34..])), 0xffff, "the sum of the segment");
    let place = u32::from_be_bytes(frame[38..42].try_into().unwrap());
    (place - 1000, frame[HEADERS..].to_vec())
}

fn large() -> Header {
    Header {
        flags: 1,
        gso_type: 1,
        hdr_len: HEADERS as u16,
        gso_size: SEGMENT as u16,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    }
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

/// Takes work from the interface, so that the kernel has to do it: 0x17 is ETHTOOL_STXCSUM, 0x1f
/// ETHTOOL_STSO.
fn without_help(name: &str) {
    for command in [0x1fu32, 0x17] {
        let mut value = [command, 0];
        // SAFETY: plain system calls; request and value outlive them.
        unsafe {
            let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
            let mut request: libc::ifreq = mem::zeroed();
            for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
                *to = from as libc::c_char;
            }
            request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
            assert_eq!(libc::ioctl(socket, libc::SIOCETHTOOL, &mut request), 0);
            libc::close(socket);
        }
    }
}

/// A packet socket whose frames have a header in front.
fn large_socket(name: &str) -> File {
    use std::os::fd::AsRawFd;
    let socket = packet_socket(name, IPV4);
    let on: libc::c_int = 1;
    // SAFETY: the option is an int that outlives the call.
    let result = unsafe {
        let len = mem::size_of::<libc::c_int>() as u32;
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_VNET_HDR,
            (&raw const on).cast(),
            len,
        )
    };
    assert_eq!(result, 0);
    socket
}

fn device_behind<'m>(memory: &'m Arc<Memory>, tap: Tap, mode: OutputMode) -> Rig<'m> {
    let tap = Arc::new(tap);
    let mut rig = Rig::usual(memory);
    let output = Held::new(tap.clone(), OutputLimits::default(), mode);
    rig.put_behind(tap, &output);
    rig.output = output;
    rig
}

/// A guest's segment of 60,000 bytes, held until its commit, leaves another interface as segments of the
/// usual size, each with its checksum.
#[test]
fn the_kernel_cuts_what_the_guest_sends() {
    in_namespace(|| {
        quiet();
        let memory = memory();
        let tap = Tap::open("large0").unwrap();
        ip("link add out0 type veth peer name out1");
        ip("link add bridge0 type bridge");
        without_help("out0");
        for name in ["large0", "out0"] {
            ip(&format!("link set {name} master bridge0"));
        }
        for name in ["large0", "out0", "out1", "bridge0"] {
            set_up(name, true);
        }
        let mut outside = packet_socket("out1", IPV4);
        let rig = device_behind(&memory, tap, OutputMode::Discard);
        rig.output.hold(1).unwrap();
        let driver = rig.boot(FEATURES | CSUM | HOST_TSO4);
        rig.device.go_live(false);

        let data = payload(60_000);
        memory.write_slice(&large().bytes(), GuestAddress(LARGE)).unwrap();
        memory.write_slice(&tcp(1, &data), GuestAddress(LARGE + 12)).unwrap();
        driver.tx.put(0, Descriptor::new(LARGE, (12 + HEADERS + data.len()) as u32, 0, 0));
        let mut buffer = vec![0; 1 << 16];
        let mut got = vec![0; data.len()];
        // A bridge takes a moment until it forwards; nothing comes by itself before.
        let mut epoch = 1;
        let mut segments = 0;
        wait_for("the bridge to forward", || {
            let used = driver.tx_used();
            driver.tx.offer(0);
            rig.kick_tx();
            wait_for("the frame to be taken", || driver.tx_used() != used);
            assert!(
                !outside.read(&mut buffer).is_ok_and(|len| is_tcp(&buffer[..len])),
                "nothing leaves before its epoch's commit"
            );
            epoch += 1;
            rig.gate.close();
            rig.output.begin(epoch).unwrap();
            rig.gate.open();
            assert!(rig.output.release(epoch - 1).complete);
            settle();
            while let Ok(len) = outside.read(&mut buffer) {
                if !is_tcp(&buffer[..len]) {
                    continue;
                }
                assert!(len <= HEADERS + SEGMENT, "{len} bytes");
                let (place, part) = finished(&buffer[..len]);
                got[place as usize..][..part.len()].copy_from_slice(&part);
                segments += 1;
            }
            segments > 0
        });
        assert_eq!(segments, data.len().div_ceil(SEGMENT));
        assert!(got == data);
        assert_eq!(rig.output.stats().refused_frames, 0);
    });
}

#[test]
fn a_guest_that_can_gets_large_segments_and_another_gets_them_cut() {
    in_namespace(|| {
        quiet();
        let memory = memory();
        let rig = device_behind(&memory, Tap::open("large1").unwrap(), OutputMode::PassThrough);
        set_up("large1", true);
        let mut host = large_socket("large1");
        rig.device.go_live(false);
        let data = payload(30_000);
        let packet = [&large().bytes()[..10], &tcp(1, &data)].concat();
        let mine = |driver: &Driver<'_>, index: u16| {
            let (head, len) = driver.rx.used_entry(index);
            let mut packet = vec![0; len as usize];
            memory.read_slice(&mut packet, GuestAddress(RX_BUFFERS + u64::from(head) * 4096)).unwrap();
            packet
        };

        // Frames of the kernel's own (neighbour discovery) may come in between.
        let driver = rig.boot(FEATURES | MRG_RXBUF | GUEST_CSUM | GUEST_TSO4);
        wait_for("the tap to be told", || rig.device.port_settings() == Some((GUEST_CSUM | GUEST_TSO4, 1)));
        for slot in 0..QUEUE {
            driver.give_buffer(slot, 4096);
        }
        rig.kick_rx();
        host.write_all(&packet).unwrap();
        let at = |index: u16| mine(&driver, index).first_chunk::<12>().map(Header::read).unwrap();
        let find = || (0..driver.rx_used()).find(|&index| at(index).gso_type == 1);
        wait_for("a large segment", || find().is_some());
        let first = find().unwrap();
        let header = at(first);
        assert_eq!(Header { num_buffers: 0, hdr_len: HEADERS as u16, ..header }, large());
        let whole: Vec<u8> =
            (first..first + header.num_buffers).flat_map(|index| mine(&driver, index)).collect();
        assert!(whole[12..] == tcp(1, &data), "with its checksum unfinished");

        let driver = rig.boot(FEATURES);
        wait_for("the tap to be told", || rig.device.port_settings() == Some((0, 1)));
        for slot in 0..QUEUE {
            driver.give_buffer(slot, 1526);
        }
        rig.kick_rx();
        host.write_all(&packet).unwrap();
        let cut = || {
            let all = (0..driver.rx_used()).map(|index| driver.received(index));
            all.filter(|frame| is_tcp(frame)).collect::<Vec<_>>()
        };
        wait_for("all segments", || cut().len() == data.len().div_ceil(SEGMENT));
        let mut got = vec![0; data.len()];
        for frame in cut() {
            let (place, part) = finished(&frame);
            got[place as usize..][..part.len()].copy_from_slice(&part);
        }
        assert!(got == data);
    });
}

#[test]
fn headers_the_kernel_refuses_are_counted() {
    in_namespace(|| {
        quiet();
        let tap = Arc::new(Tap::open("large2").unwrap());
        set_up("large2", true);
        let output = Held::new(tap, OutputLimits::default(), OutputMode::PassThrough);
        let push = |header: Header, frame: &[u8]| {
            let pushed = output.push(0, &[&header.bytes(), frame].concat());
            assert_eq!(pushed, crate::devices::virtio::net::Pushed::Taken);
            output.drain_if_open();
            output.stats().refused_frames
        };
        // Such headers do not come through the device; the kernel is the second wall.
        assert_eq!(push(Header { csum_start: 5000, ..large() }, &tcp(1, &payload(3000))), 1);
        assert_eq!(push(Header { gso_size: 0, ..large() }, &tcp(1, &payload(3000))), 2);
        assert_eq!(push(Header { gso_type: 99, ..large() }, &tcp(1, &payload(3000))), 3);
        assert_eq!(push(large(), &tcp(1, &payload(3000))), 3);
        assert_eq!(push(Header::default(), &frame(1, 60)), 3);
        assert!(output.announce(&crate::devices::virtio::net::announce::packet(MAC)));
        assert_eq!(output.stats().passed_frames, 5);
    });
}

#[test]
fn a_flow_comes_back_in_the_pair_it_was_sent_from() {
    in_namespace(|| {
        quiet();
        let memory = memory();
        let rig = device_behind(&memory, Tap::with_queues("many0", 3).unwrap(), OutputMode::PassThrough);
        set_up("many0", true);
        assert_ne!(index_of("many0"), 0);
        let mut host = packet_socket("many0", IPV4);
        rig.device.go_live(false);
        wait_for("one pair in use", || rig.device.port_settings() == Some((0, 1)));
        let (_, control) = rig.boot_with_control(FEATURES | CTRL_VQ | MQ | CSUM, 6);
        let pairs = [0, 1, 2].map(|pair| Driver {
            memory: &memory,
            rx: ring_at(&memory, rings_at(2 * pair)),
            tx: ring_at(&memory, rings_at(2 * pair + 1)),
        });
        for (pair, driver) in pairs.iter().enumerate() {
            for slot in 0..10 {
                driver.give_buffer(10 * pair as u16 + slot, 1526);
            }
            rig.write(0x50, 2 * pair as u32);
        }
        let received = |pair: usize| {
            let driver = &pairs[pair];
            let all = (0..driver.rx_used()).map(|index| driver.received(index));
            all.filter(|frame| is_tcp(frame)).count()
        };
        let answer = |flow: u16| {
            let mut frame = tcp(flow, &[]);
            let (source, target) = (frame[26..30].to_vec(), frame[30..34].to_vec());
            frame[26..34].copy_from_slice(&[target, source].concat());
            let (source, target) = (frame[34..36].to_vec(), frame[36..38].to_vec());
            frame[34..38].copy_from_slice(&[target, source].concat());
            frame
        };
        // With one pair in use everything comes there, also when the others have been in use.
        for round in 1..=2 {
            for flow in 0..3 {
                host.write_all(&answer(flow)).unwrap();
            }
            wait_for("the frames in the first pair", || received(0) == 3 * round);
            assert_eq!((received(1), received(2)), (2 * (round - 1), 2 * (round - 1)));
            if round == 2 {
                break;
            }
            assert_eq!(control.ask(4, 0, &3u16.to_le_bytes()), 0);
            wait_for("the tap to follow", || rig.device.port_settings() == Some((0, 3)));
            for (slot, pair) in [1, 2].into_iter().enumerate() {
                for time in 0..2 {
                    let flow = 7000 + pair as u16;
                    let used = pairs[pair].tx_used();
                    pairs[pair].send((4 * time + slot) as u16, &tcp(flow, &[]));
                    rig.write(0x50, 2 * pair as u32 + 1);
                    wait_for("the frame to leave", || pairs[pair].tx_used() != used);
                    let before = received(pair);
                    host.write_all(&answer(flow)).unwrap();
                    wait_for("the answer in its pair", || received(pair) == before + 1);
                }
            }
            assert_eq!(control.ask(4, 0, &1u16.to_le_bytes()), 0);
            wait_for("the tap to follow", || rig.device.port_settings() == Some((0, 1)));
        }
        assert_eq!(rig.output.stats().refused_frames, 0);
    });
}
