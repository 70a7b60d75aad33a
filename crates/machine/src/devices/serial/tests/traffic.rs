//! Bytes in both directions.

use super::*;
use crate::devices::port::INPUT_BYTES;

#[test]
fn what_the_guest_writes_comes_out_at_once() {
    let rig = Rig::new();
    for byte in *b"hello\r\n" {
        assert_eq!(rig.read(LSR), 0x60, "the transmitter is empty");
        rig.write(DATA, byte);
    }
    assert_eq!(rig.output(), b"hello\r\n");
}

#[test]
fn a_driver_with_interrupts_gets_everything_that_is_typed() {
    let rig = Rig::live();
    rig.write(IER, RECEIVED);
    let typed: Vec<u8> = (0..3000u32).map(|n| (n % 251) as u8).collect();
    rig.type_in(&typed);
    wait_for("the interrupt", || rig.interrupts() > 0);
    // The driver stops after 256 bytes and looks whether it is done, as Linux does.
    let mut got = Vec::new();
    while rig.read(IIR) & 1 == 0 {
        for _ in 0..256 {
            if rig.ready() {
                got.push(rig.read(DATA));
            }
        }
    }
    assert_eq!(got, typed);
}

#[test]
fn a_driver_that_leaves_bytes_is_told_again() {
    let rig = Rig::live();
    rig.write(IER, RECEIVED);
    rig.type_in(b"abc");
    assert_eq!(rig.read(IIR), 0xc4);
    assert_eq!(rig.read(DATA), b'a');
    assert_eq!(rig.read(IIR), 0xc4);
    assert_eq!(rig.drain(), b"bc");
    assert_eq!(rig.read(IIR), 0xc1);
}

#[test]
fn a_driver_that_polls_needs_no_interrupt() {
    let rig = Rig::live();
    rig.type_in(&[7; 200]);
    assert_eq!(rig.drain(), [7; 200]);
    assert_eq!(rig.interrupts(), 0);
}

#[test]
fn the_transmitter_says_that_it_is_empty() {
    let rig = Rig::live();
    rig.write(IER, SENT);
    assert_eq!((rig.interrupts(), rig.read(IIR)), (1, 0xc2));
    assert_eq!(rig.read(IIR), 0xc1);
    rig.write(DATA, b'x');
    assert_eq!((rig.interrupts(), rig.read(IIR)), (2, 0xc2));
}

#[test]
fn input_that_finds_no_room_stays_outside() {
    let rig = Rig::live();
    let many = vec![1; 2 * INPUT_BYTES];
    let mut sent = rig.end.input.push(&many);
    wait_for("a full FIFO", || rig.end.input.room() == 64);
    sent += rig.end.input.push(&many);
    assert_eq!((sent, rig.end.input.room()), (INPUT_BYTES + 64, 0));
    assert_eq!(rig.drain().len(), INPUT_BYTES + 64);
    assert_eq!(rig.end.input.dropped(), 0);
}

#[test]
fn looped_back_bytes_stay_inside() {
    let rig = Rig::live();
    rig.write(MCR, 0x10);
    rig.write(DATA, b'l');
    rig.end.input.push(b"typed");
    settle();
    assert_eq!(rig.saved()[11], 1, "one byte waits");
    assert_eq!(rig.drain(), b"l");
    rig.write(MCR, 0x08);
    assert_eq!(rig.drain(), b"typed");
    assert_eq!(rig.output(), b"");
}

#[test]
fn an_autoconfiguring_driver_finds_a_16550a() {
    // What Linux 8250 looks at: scratch, IER without upper bits, IIR with FIFO bits, loop-back of modem
    // lines.
    let rig = Rig::new();
    rig.write(SCR, 0xa5);
    assert_eq!(rig.read(SCR), 0xa5);
    rig.write(IER, 0xff);
    assert_eq!(rig.read(IER), 0x0f);
    rig.write(IER, 0);
    rig.write(2, 1);
    assert_eq!(rig.read(IIR) >> 6, 3);
    rig.write(MCR, 0x1a);
    assert_eq!(rig.read(6) & 0xf0, 0x90);
    rig.write(LCR, 0x83);
    rig.write(0, 1);
    rig.write(1, 0);
    assert_eq!((rig.read(0), rig.read(1)), (1, 0));
    rig.write(LCR, 3);
    assert_eq!(rig.output(), b"", "the divisor is no output");
}
