//! Checkpoints, takeovers and reboots.

use super::super::SerialState;
use super::*;

#[test]
fn a_restored_guest_goes_on_where_it_was() {
    let old = Rig::live();
    old.write(LCR, 0x80);
    old.write(DATA, 0x01);
    old.write(LCR, 0x03);
    old.write(SCR, 0x77);
    old.write(IER, RECEIVED);
    old.type_in(b"half");
    assert_eq!(old.read(DATA), b'h');
    let state = old.saved();
    assert_eq!(state.len(), old.port.state_bytes());

    let new = Rig::new();
    new.port.restore(&state).unwrap();
    assert_eq!(new.saved(), state, "a state survives the way unchanged");
    let before = new.interrupts();
    new.port.go_live();
    assert!(new.interrupts() > before, "the interrupt is raised again");
    assert_eq!(new.read(IIR), 0xc4);
    assert_eq!(new.drain(), b"alf");
    assert_eq!((new.read(SCR), new.read(IER), new.read(LCR)), (0x77, RECEIVED, 3));
    new.type_in(b"more");
    assert_eq!(new.drain(), b"more");
}

#[test]
fn a_guest_without_interrupts_gets_none_after_a_restore() {
    let new = Rig::new();
    new.port.restore(&Rig::live().saved()).unwrap();
    new.port.go_live();
    assert_eq!(new.interrupts(), 0);
}

#[test]
fn the_transmitter_interrupt_is_raised_again() {
    let old = Rig::live();
    old.write(IER, SENT);
    let new = Rig::new();
    new.port.restore(&old.saved()).unwrap();
    new.port.go_live();
    assert!(new.interrupts() > 0);
    assert_eq!(new.read(IIR), 0xc2);
}

#[test]
fn nothing_moves_while_the_gate_is_closed() {
    let rig = Rig::live();
    rig.write(IER, RECEIVED);
    rig.gate.close();
    let (state, interrupts) = (rig.saved(), rig.interrupts());
    rig.end.input.push(b"typed in the pause");
    settle();
    assert_eq!((rig.saved(), rig.interrupts()), (state, interrupts));
    rig.gate.open();
    wait_for("input", || rig.ready());
    assert_eq!(rig.drain(), b"typed in the pause");
}

#[test]
fn saving_does_not_allocate() {
    let rig = Rig::live();
    rig.type_in(&[1; 64]);
    let mut bytes = Vec::with_capacity(SerialState::BYTES);
    let at = bytes.as_ptr();
    rig.port.save(&mut bytes);
    assert_eq!((bytes.len(), bytes.as_ptr()), (SerialState::BYTES, at));
}

#[test]
fn a_passive_port_takes_nothing() {
    let rig = Rig::new();
    rig.end.input.push(b"to nobody");
    rig.port.go_live();
    settle();
    assert!(!rig.ready());
    assert_eq!(rig.end.input.dropped(), 9);
}

#[test]
fn a_reboot_finds_a_fresh_port_that_works() {
    let rig = Rig::live();
    let fresh = rig.saved();
    rig.write(IER, RECEIVED);
    rig.write(SCR, 1);
    rig.type_in(b"old");
    rig.gate.close();
    rig.port.reset();
    assert_eq!(rig.saved(), fresh);
    rig.gate.open();
    rig.type_in(b"new");
    assert_eq!(rig.drain(), b"new");
    rig.write(DATA, b'!');
    assert_eq!(rig.output(), b"!");
}

#[test]
fn one_machine_after_the_other_has_the_same_end() {
    let rig = Rig::live();
    let Rig { port, registers, end, sink, gate, interrupts } = rig;
    drop((port, registers));
    assert_eq!((end.input.push(b"gone"), end.input.dropped()), (4, 4));
    let host = SerialHost { gate: gate.clone(), interrupt: interrupts.clone() };
    let port = SerialPort::new(host, end.clone()).unwrap();
    port.go_live();
    let rig = Rig { registers: port.registers(), port, end, sink, gate, interrupts };
    rig.type_in(b"here");
    assert_eq!(rig.drain(), b"here");
}

#[test]
fn a_port_behind_a_closed_gate_can_be_dropped() {
    let rig = Rig::live();
    rig.gate.close();
    rig.end.input.push(b"x");
    drop(rig);
}
