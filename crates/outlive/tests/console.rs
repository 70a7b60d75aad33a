//! `outlive console` as a person and as a script use it; the test plays the VM's side.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

struct Vm {
    directory: tempfile::TempDir,
    listener: UnixListener,
}

fn vm() -> Vm {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("serial")).unwrap();
    Vm { directory, listener }
}

impl Vm {
    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_outlive"));
        command.arg("console").arg(self.directory.path());
        command
    }

    fn accept(&self) -> UnixStream {
        let (socket, _) = self.listener.accept().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket
    }
}

/// A person's terminal with `outlive console` on it.
struct Person {
    keyboard: Keyboard,
    terminal: File,
    program: Child,
    vm: UnixStream,
}

/// A person's side of the terminal, who does not wait for ever.
struct Keyboard(File);

impl Read for Keyboard {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let mut readable = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        if poll(&mut readable, 20_000_u16)? == 0 {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        self.0.read(bytes)
    }
}

fn attach(vm: &Vm) -> Person {
    let pair = openpty(None, None).unwrap();
    let terminal = File::from(pair.slave);
    let stdio = || Stdio::from(terminal.try_clone().unwrap());
    let program = vm.command().stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().unwrap();
    let keyboard = Keyboard(pair.master.into());
    let mut person = Person { keyboard, terminal, program, vm: vm.accept() };
    read_to(&mut person.keyboard, b"detaches]\r\n");
    assert!(person.is_raw());
    person
}

impl Person {
    fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal).unwrap().local_flags.contains(LocalFlags::ICANON)
    }

    /// Waits for the end of the program, and checks that the terminal is as it was.
    fn ended(mut self) {
        assert!(wait(&mut self.program).success());
        assert!(!self.is_raw(), "the terminal is as it was");
    }
}

fn wait(program: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(status) = program.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            program.kill().unwrap();
            panic!("the program does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn read_to(from: &mut impl Read, end: &[u8]) -> Vec<u8> {
    let mut got = Vec::new();
    while !got.ends_with(end) {
        let mut byte = [0];
        from.read_exact(&mut byte)
            .unwrap_or_else(|e| panic!("{e} after {:?}", String::from_utf8_lossy(&got)));
        got.push(byte[0]);
    }
    got
}

#[test]
fn a_person_attaches_types_and_detaches() {
    let vm = vm();
    let mut person = attach(&vm);
    person.vm.write_all(b"login: ").unwrap();
    read_to(&mut person.keyboard, b"login: ");
    person.keyboard.0.write_all(b"root\r\x03").unwrap();
    assert_eq!(read_to(&mut person.vm, b"\x03"), b"root\r\x03");
    person.keyboard.0.write_all(b"\x1d").unwrap();
    person.ended();
}

#[test]
fn every_signal_gives_the_terminal_back() {
    let vm = vm();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        let person = attach(&vm);
        kill(Pid::from_raw(person.program.id() as i32), signal).unwrap();
        person.ended();
    }
}

#[test]
fn the_end_of_the_vm_gives_the_terminal_back() {
    let vm = vm();
    let mut person = attach(&vm);
    person.vm.write_all(b"reboot: Power down\r\n").unwrap();
    person.vm.shutdown(std::net::Shutdown::Both).unwrap();
    read_to(&mut person.keyboard, b"Power down\r");
    person.ended();
}

#[test]
fn a_script_talks_through_pipes() {
    let vm = vm();
    let mut program = vm
        .command()
        .args(["--wait", "200ms"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut socket = vm.accept();
    let mut keys = program.stdin.take().unwrap();
    keys.write_all(b"uname\n\x1d").unwrap();
    drop(keys);
    assert_eq!(read_to(&mut socket, b"\x1d"), b"uname\n\x1d", "no key of a script is an order");
    socket.write_all(b"Linux\n").unwrap();
    let output = program.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"Linux\n"[..], &b""[..]));
}

#[test]
fn where_there_is_no_console_one_line_says_what_to_do() {
    let vm = vm();
    let refused = |path: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_outlive")).args(["console", path]).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(line.lines().count(), 1, "{line}");
        line
    };
    let directory = vm.directory.path().to_str().unwrap().to_owned();
    assert!(refused(&format!("{directory}/hvc0")).contains("there is no console at"));
    drop(vm.listener);
    assert!(refused(&directory).contains("no VM has its console at"));
}
