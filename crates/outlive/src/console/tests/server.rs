//! Sockets and the terminal, with the guest's side played by the test.

use std::fs;
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use outlive_machine::devices::gate::DeviceGate;
use outlive_machine::devices::line_log::LineLog;
use outlive_machine::devices::port::PortEnd;
use outlive_machine::devices::serial::{SerialHost, SerialPort};
use outlive_machine::devices::virtio::Interrupt;

use super::super::hub::{HISTORY, Hub};
use super::super::server::{Served, Server};
use super::super::stdio::Stdio;
use super::super::{Console, Port};
use super::*;
use crate::cli::ConsoleSpec;
use crate::socket::Listener;

struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn trigger(&self) {}
}

/// The serial port of a guest that the test plays.
struct Guest {
    port: SerialPort,
}

impl Guest {
    fn new(end: PortEnd) -> Self {
        let host = SerialHost { gate: Arc::new(DeviceGate::new()), interrupt: Arc::new(NoInterrupt) };
        let port = SerialPort::new(host, end).unwrap();
        port.go_live();
        Self { port }
    }

    fn print(&self, text: &[u8]) {
        text.iter().for_each(|&byte| self.port.registers().lock().unwrap().write(0, &[byte]));
    }

    fn typed(&self) -> Vec<u8> {
        let mut got = Vec::new();
        let registers = self.port.registers();
        let mut registers = registers.lock().unwrap();
        let mut read = |at| {
            let mut byte = [0];
            registers.read(at, &mut byte);
            byte[0]
        };
        while read(5) & 1 != 0 {
            got.push(read(0));
        }
        got
    }

    fn wait_typed(&self, text: &[u8]) {
        let mut got = Vec::new();
        wait_for("input", || {
            got.extend(self.typed());
            got.len() >= text.len()
        });
        assert_eq!(got, text);
    }
}

fn open(directory: &Path) -> (Console, Guest) {
    let console = Console::open(Some(&ConsoleSpec::Directory(directory.into())), |_| ()).unwrap();
    let guest = Guest::new(console.end(Port::Serial));
    (console, guest)
}

fn attach(directory: &Path) -> UnixStream {
    let socket = UnixStream::connect(directory.join("serial")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket
}

#[test]
fn several_people_look_at_one_guest() {
    let directory = tempfile::tempdir().unwrap();
    let (console, guest) = open(directory.path());
    guest.print(b"before\n");
    let (mut one, mut two) = (attach(directory.path()), attach(directory.path()));
    assert_eq!(read_to(&mut one, b"\n"), b"before\n");
    guest.print(b"login: ");
    assert_eq!(read_to(&mut one, b": "), b"login: ");
    assert_eq!(read_to(&mut two, b": "), b"before\nlogin: ");
    put(&mut one, b"root\r");
    guest.wait_typed(b"root\r");
    put(&mut two, b"secret\r");
    guest.wait_typed(b"secret\r");
    drop(one);
    guest.print(b"# ");
    assert_eq!(read_to(&mut two, b"# "), b"# ");
    // What is printed last is shown before the end.
    guest.print(b"bye\n");
    drop(guest);
    console.close();
    assert_eq!(read_to(&mut two, b"\n"), b"bye\n");
    assert_eq!(two.read(&mut [0]).unwrap(), 0);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "the sockets are gone");
}

/// At a standby. After the takeover the guest's own words follow.
#[test]
fn who_looks_at_a_guest_that_does_not_run_here_yet_is_told_so() {
    let directory = tempfile::tempdir().unwrap();
    let (console, guest) = open(directory.path());
    console.waits();
    let mut early = attach(directory.path());
    let told = read_to(&mut early, b"]\r\n");
    assert!(String::from_utf8_lossy(&told).contains("silent here until a takeover"), "{told:?}");
    guest.print(b"login: ");
    assert_eq!(read_to(&mut early, b": "), b"login: ");
    drop(console);
}

#[test]
fn sockets_are_for_their_owner_and_replace_stale_ones() {
    let directory = tempfile::tempdir().unwrap();
    let inside = directory.path().join("made/by/us");
    fs::create_dir_all(&inside).unwrap();
    // As a process leaves it that was killed.
    drop(UnixListener::bind(inside.join("serial")).unwrap());
    let (console, _guest) = open(&inside);
    for name in ["serial", "hvc0"] {
        let file = fs::metadata(inside.join(name)).unwrap();
        assert!(file.file_type().is_socket());
        assert_eq!(file.permissions().mode() & 0o777, 0o600, "{name}");
    }
    let spec = ConsoleSpec::Directory(inside.clone());
    let error = Console::open(Some(&spec), |_| ()).unwrap_err().to_string();
    assert!(error.contains("another VM has its console"), "{error}");
    attach(&inside);
    drop(console);
    fs::write(inside.join("hvc0"), "precious").unwrap();
    let error = Console::open(Some(&spec), |_| ()).unwrap_err().to_string();
    assert!(error.contains("not a socket"), "{error}");
    assert_eq!(fs::read(inside.join("hvc0")).unwrap(), b"precious");
    assert!(!inside.join("serial").exists(), "what was made before the error is gone");
    let long = Path::new("/tmp").join("x".repeat(120));
    let error = Listener::bind(&long.join("serial")).unwrap_err().to_string();
    assert!(error.contains("too long") && !long.exists(), "{error}");
}

#[test]
fn a_reader_that_does_not_read_stops_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let (_console, guest) = open(directory.path());
    let (mut lazy, mut eager) = (attach(directory.path()), attach(directory.path()));
    let line = [b'x'; 1023];
    let mut printed = 0;
    // More than a socket and the history hold.
    while printed < 16 * HISTORY {
        guest.print(&line);
        guest.print(b"\n");
        printed += 1024;
        read_to(&mut eager, b"\n");
    }
    guest.print(b"END");
    let got = String::from_utf8(read_to(&mut lazy, b"END")).unwrap();
    assert!(got.len() < printed, "the oldest bytes are lost");
    assert!(got.contains("[outlive: ") && got.contains(" bytes lost]"), "and the reader is told");
}

#[test]
fn input_waits_outside_until_the_guest_takes_it() {
    let directory = tempfile::tempdir().unwrap();
    let (console, guest) = open(directory.path());
    let mut script = attach(directory.path());
    let text: Vec<u8> = (0..64 * 1024u32).map(|n| (n % 251) as u8).collect();
    let writer = {
        let text = text.clone();
        std::thread::spawn(move || {
            put(&mut script, &text);
            // And hangs up with some of it still under way.
        })
    };
    wait_for("a full input", || console.end(Port::Serial).input.room() == 0);
    let mut got = Vec::new();
    wait_for("all of it", || {
        got.extend(guest.typed());
        got.len() >= text.len()
    });
    writer.join().unwrap();
    assert!(got == text);
    assert_eq!(console.end(Port::Serial).input.dropped(), 0);
}

#[test]
fn a_script_that_has_sent_everything_still_reads() {
    let directory = tempfile::tempdir().unwrap();
    let (_console, guest) = open(directory.path());
    let mut script = attach(directory.path());
    put(&mut script, b"date\n");
    script.shutdown(Shutdown::Write).unwrap();
    guest.wait_typed(b"date\n");
    guest.print(b"now\n");
    assert_eq!(read_to(&mut script, b"\n"), b"now\n");
}

#[test]
fn a_hundred_visitors_leave_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let (_console, guest) = open(directory.path());
    for _ in 0..100 {
        put(&mut attach(directory.path()), b"k");
    }
    guest.wait_typed(&[b'k'; 100]);
    let mut last = attach(directory.path());
    guest.print(b"!\n");
    read_to(&mut last, b"\n");
}

/// A server with a terminal, and how often it was asked to end the VM.
fn on_terminal(program: &File) -> (Server, Guest, PortEnd, Arc<AtomicUsize>) {
    let hub = Arc::new(Hub::new().unwrap());
    let end = PortEnd::new(hub.clone()).unwrap();
    let stops = Arc::new(AtomicUsize::new(0));
    let counted = stops.clone();
    let stop = Box::new(move |_| _ = counted.fetch_add(1, Ordering::Relaxed));
    let files = [program.try_clone().unwrap(), program.try_clone().unwrap()];
    let [keyboard, screen] = files;
    let stdio = Stdio::with(keyboard, screen, &hub, stop).unwrap();
    let (input, log) = (end.input.clone(), LineLog::new("serial"));
    let served = Served { hub, input, log, listener: None, stdio: Some(stdio), clients: vec![], logged: 0 };
    let server = Server::start(vec![served]).unwrap();
    let guest = Guest::new(end.clone());
    (server, guest, end, stops)
}

#[test]
fn a_terminal_is_the_guests_until_the_end() {
    let (mut person, program) = terminal();
    assert!(!is_raw(&program));
    let (server, guest, _end, stops) = on_terminal(&program);
    assert!(is_raw(&program));
    guest.print(b"login: ");
    read_to(&mut person, b"login: ");
    // Ctrl-C, Ctrl-Z and Ctrl-D are keys like others, Ctrl-] twice is one.
    put(&mut person, b"a\x03\x1a\x04\r\x1d\x1d");
    guest.wait_typed(b"a\x03\x1a\x04\r\x1d");
    put(&mut person, b"\x1dh");
    read_to(&mut person, b"for the guest]\r");
    assert_eq!(stops.load(Ordering::Relaxed), 0);
    put(&mut person, b"\x1dx");
    wait_for("the order to end", || stops.load(Ordering::Relaxed) == 1);
    guest.print(b"bye");
    drop(server);
    read_to(&mut person, b"bye");
    assert!(!is_raw(&program), "the terminal is as it was");
}

#[test]
fn a_guest_that_takes_nothing_does_not_keep_orders_from_being_heard() {
    let (mut person, program) = terminal();
    let (_server, _guest, end, stops) = on_terminal(&program);
    while end.input.room() > 0 {
        put(&mut person, &[b'z'; 64]);
    }
    put(&mut person, b"more\x1dx");
    wait_for("the order to end", || stops.load(Ordering::Relaxed) == 1);
    assert!(end.input.dropped() >= 4);
}

#[test]
fn pipes_will_do_for_a_terminal() {
    let hub = Arc::new(Hub::new().unwrap());
    let end = PortEnd::new(hub.clone()).unwrap();
    let (script_out, keyboard) = {
        let (read, write) = std::io::pipe().unwrap();
        (write, File::from(std::os::fd::OwnedFd::from(read)))
    };
    let (mut script_in, screen) = {
        let (read, write) = std::io::pipe().unwrap();
        (read, File::from(std::os::fd::OwnedFd::from(write)))
    };
    let stopped = Arc::new(Mutex::new(Vec::new()));
    let noted = stopped.clone();
    let stop = Box::new(move |why| noted.lock().unwrap().push(why));
    let stdio = Stdio::with(keyboard, screen, &hub, stop).unwrap();
    let (input, log) = (end.input.clone(), LineLog::new("serial"));
    let served = Served { hub, input, log, listener: None, stdio: Some(stdio), clients: vec![], logged: 0 };
    let server = Server::start(vec![served]).unwrap();
    let guest = Guest::new(end);
    let mut script_out = script_out;
    // No orders from scripts: everything is for the guest.
    put(&mut script_out, b"\x1dx\n");
    guest.wait_typed(b"\x1dx\n");
    drop(script_out);
    guest.print(b"still here\n");
    read_to(&mut script_in, b"here\n");
    guest.print(&[b'y'; 3 * HISTORY]);
    guest.print(b"END");
    drop(guest);
    let reader = std::thread::spawn(move || read_to(&mut script_in, b"END"));
    drop(server);
    assert!(reader.join().unwrap().len() >= HISTORY);
    assert!(stopped.lock().unwrap().is_empty());
}

#[test]
fn a_mistyped_directory_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let deep = directory.path().join("no").join("such");
    let error = Console::open(Some(&ConsoleSpec::Directory(deep)), |_| ()).unwrap_err().to_string();
    assert!(
        error.contains("cannot make the directory") && error.contains("give --console another"),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    // The last one is made, and is no obstacle when it exists.
    for name in ["serial", "hvc0"] {
        drop(Listener::bind(&directory.path().join("vm").join(name)).unwrap());
    }
}

#[test]
fn who_attaches_to_the_built_in_guest_is_told_where_it_prints() {
    let directory = tempfile::tempdir().unwrap();
    let (console, _guest) = open(directory.path());
    console.prints_nothing();
    let told = read_to(&mut attach(directory.path()), b"\n");
    assert_eq!(told, b"the built-in guest prints its messages in the log of `outlive run`\r\n");
}
