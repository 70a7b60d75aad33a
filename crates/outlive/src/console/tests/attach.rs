//! `outlive console`, with the VM's side played by the test.

use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use super::super::attach::{End, Session};
use super::super::terminal::{Key, Keys, RawTerminal};
use super::*;

struct Attached {
    vm: UnixStream,
    signal: UnixStream,
    session: JoinHandle<std::io::Result<End>>,
    raw: Option<RawTerminal>,
}

fn attach(keyboard: File, screen: File, is_terminal: bool, wait: Option<Duration>) -> Attached {
    let (vm, socket) = UnixStream::pair().unwrap();
    vm.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let (signal, signals) = UnixStream::pair().unwrap();
    let mut session = Session {
        socket,
        keyboard: Some(keyboard),
        screen,
        signals: Box::new(signals),
        is_terminal,
        wait,
        deadline: None,
        typed: Vec::new(),
        shown: Vec::new(),
        ended: false,
    };
    Attached { vm, signal, session: thread::spawn(move || session.run()), raw: None }
}

fn at_terminal() -> (File, Attached) {
    let (person, program) = terminal();
    let raw = RawTerminal::take(&program).unwrap();
    let attached = attach(program.try_clone().unwrap(), program, true, None);
    (person, Attached { raw, ..attached })
}

fn pipe() -> (File, File) {
    let (read, write) = std::io::pipe().unwrap();
    (std::os::fd::OwnedFd::from(read).into(), std::os::fd::OwnedFd::from(write).into())
}

#[test]
fn keys_and_output_pass_and_the_escape_detaches() {
    let (mut person, mut attached) = at_terminal();
    put(&mut attached.vm, b"login: ");
    read_to(&mut person, b"login: ");
    put(&mut person, b"root\r\x03");
    assert_eq!(read_to(&mut attached.vm, b"\x03"), b"root\r\x03");
    put(&mut person, b"\x1dlost");
    assert_eq!(attached.session.join().unwrap().unwrap(), End::Detached);
    assert_eq!(attached.vm.read(&mut [0]).unwrap(), 0);
}

#[test]
fn detaching_works_while_the_vm_takes_nothing() {
    let (mut person, attached) = at_terminal();
    // More than the sockets and the buffers between hold; the rest is dropped with a bell.
    let mut typist = person.try_clone().unwrap();
    let typing = thread::spawn(move || {
        for _ in 0..8192 {
            put(&mut typist, &[b'q'; 64]);
        }
        put(&mut typist, b"\x1d");
    });
    let bells = thread::spawn(move || {
        let mut any = [0; 4096];
        while person.read(&mut any).is_ok_and(|count| count > 0) {}
    });
    typing.join().unwrap();
    assert_eq!(attached.session.join().unwrap().unwrap(), End::Detached);
    drop((attached.vm, attached.signal, attached.raw));
    bells.join().unwrap();
}

#[test]
fn a_signal_detaches() {
    let (_person, mut attached) = at_terminal();
    put(&mut attached.signal, b"!");
    assert_eq!(attached.session.join().unwrap().unwrap(), End::Detached);
}

#[test]
fn the_end_of_the_vm_ends_it_after_the_last_output() {
    let (mut shown, screen) = pipe();
    let (keyboard, _typist) = pipe();
    let mut attached = attach(keyboard, screen, false, None);
    let text = vec![b'z'; 100_000];
    put(&mut attached.vm, &text[..1000]);
    let reader = thread::spawn(move || {
        let mut got = Vec::new();
        shown.read_to_end(&mut got).unwrap();
        got.len()
    });
    put(&mut attached.vm, &text[1000..]);
    drop(attached.vm);
    assert_eq!(attached.session.join().unwrap().unwrap(), End::Closed);
    assert_eq!(reader.join().unwrap(), 100_000);
}

#[test]
fn a_script_stays_until_nothing_more_comes() {
    let (mut shown, screen) = pipe();
    let (keyboard, mut typist) = pipe();
    put(&mut typist, b"date\n");
    drop(typist);
    let mut attached = attach(keyboard, screen, false, Some(Duration::from_millis(300)));
    assert_eq!(read_to(&mut attached.vm, b"\n"), b"date\n");
    assert_eq!(attached.vm.read(&mut [0]).unwrap(), 0, "the end of the input is told");
    for line in [b"a\n", b"b\n", b"c\n"] {
        thread::sleep(Duration::from_millis(100));
        put(&mut attached.vm, line);
    }
    assert_eq!(read_to(&mut shown, b"c\n"), b"a\nb\nc\n");
    assert_eq!(attached.session.join().unwrap().unwrap(), End::Detached);
}

#[test]
fn a_script_without_a_limit_stays_with_the_vm() {
    let (mut shown, screen) = pipe();
    let (keyboard, typist) = pipe();
    drop(typist);
    let mut attached = attach(keyboard, screen, false, None);
    thread::sleep(Duration::from_millis(50));
    put(&mut attached.vm, b"later\n");
    read_to(&mut shown, b"later\n");
    assert!(!attached.session.is_finished());
    drop(attached.vm);
    assert_eq!(attached.session.join().unwrap().unwrap(), End::Closed);
}

#[test]
fn orders_are_told_from_keys() {
    let mut keys = Keys::default();
    let mut press = |key| keys.press(key);
    assert_eq!(press(b'x'), Key::Send(b'x'));
    assert_eq!((press(0x1d), press(b'x')), (Key::Nothing, Key::End));
    assert_eq!((press(0x1d), press(0x1d)), (Key::Nothing, Key::Send(0x1d)));
    assert_eq!((press(0x1d), press(b'?'), press(b'x')), (Key::Nothing, Key::Help, Key::Send(b'x')));
}
