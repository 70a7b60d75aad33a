//! `outlive top` on a terminal, as a person and as a script use it, at a node of this program.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

const PROGRAM: &str = env!("CARGO_BIN_EXE_outlive");
/// Longer than anything takes on a host that is not overloaded.
const PATIENCE: Duration = Duration::from_secs(120);
/// The terminal is taken, and given back.
const TAKEN: &str = "\x1b[?1049h";
const GIVEN_BACK: &str = "\x1b[?1049l";

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "in vain: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A node with two VMs that are stopped.
struct Host {
    there: tempfile::TempDir,
    node: Option<Child>,
}

impl Host {
    fn new() -> Self {
        let mut host = Self { there: tempfile::tempdir().unwrap(), node: None };
        fs::create_dir(host.at("vms")).unwrap();
        for (name, address) in [("web", "10.0.0.5/24"), ("db", "10.0.0.6/24")] {
            fs::write(host.at("vms").join(format!("{name}.toml")), format!("ip = '{address}'\n")).unwrap();
        }
        host.start();
        host
    }

    fn at(&self, name: &str) -> PathBuf {
        self.there.path().join(name)
    }

    fn start(&mut self) {
        let mut command = Command::new(PROGRAM);
        command.args(["node", "run", "--host", "hosta"]).stdin(Stdio::null()).stderr(Stdio::null());
        for option in ["vms", "state", "run", "logs"] {
            command.arg(format!("--{option}")).arg(self.at(option));
        }
        self.node = Some(command.arg("--socket").arg(self.at("api")).spawn().unwrap());
        until("the node answers", || UnixStream::connect(self.at("api")).is_ok());
    }

    fn stop(&mut self) {
        if let Some(mut node) = self.node.take() {
            // Both fail only for a child that was reaped.
            let _ = node.kill();
            let _ = node.wait();
        }
    }

    fn top(&self, words: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("top").args(words).arg("--socket").arg(self.at("api"));
        command.env("TERM", "xterm").env_remove("NO_COLOR").env_remove("COLUMNS");
        command
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A person's terminal with `outlive top` on it.
struct Person {
    keyboard: File,
    terminal: File,
    program: Child,
    shown: Arc<Mutex<String>>,
}

impl Person {
    fn looks(command: &mut Command) -> Self {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None).unwrap();
        let terminal = File::from(pair.slave);
        let stdio = || Stdio::from(terminal.try_clone().unwrap());
        let program = command.stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().unwrap();
        let keyboard = File::from(pair.master);
        let (shown, mut screen) = (Arc::new(Mutex::new(String::new())), keyboard.try_clone().unwrap());
        let heard = shown.clone();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                heard.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Self { keyboard, terminal, program, shown }
    }

    /// Words may be painted in parts, so they have no spaces.
    fn sees(&self, word: &str) {
        until(&format!("'{word}' is shown"), || self.shown.lock().unwrap().contains(word));
    }

    fn types(&mut self, keys: &[u8]) {
        self.shown.lock().unwrap().clear();
        self.keyboard.write_all(keys).unwrap();
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal).unwrap().local_flags.contains(LocalFlags::ICANON | LocalFlags::ECHO)
    }

    /// Waits for the end, after which the terminal is as it was.
    fn ends(mut self) -> (ExitStatus, String) {
        let mut status = None;
        until("the end", || {
            status = self.program.try_wait().unwrap();
            status.is_some()
        });
        self.sees(GIVEN_BACK);
        assert!(!self.is_raw(), "the terminal is as it was");
        let shown = self.shown.lock().unwrap().clone();
        assert!(shown.rsplit_once(GIVEN_BACK).unwrap().1.contains("\x1b[?25h"), "{shown:?}");
        (status.unwrap(), shown)
    }
}

impl Drop for Person {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

#[test]
fn a_person_looks_asks_and_ends() {
    let host = Host::new();
    let mut person = Person::looks(&mut host.top(&["web"]));
    for word in [TAKEN, "hosta", "PROTECTED", "stopped", "web", "\x1b[38;5;"] {
        person.sees(word);
    }
    assert!(person.is_raw());
    person.types(b"h");
    person.sees("does");
    person.types(b" ");
    person.types(b"?");
    person.sees("Ctrl-L");
    person.types(b" q");
    assert_eq!(person.ends().0.code(), Some(0));
    // Ctrl-C is a key here.
    let mut person = Person::looks(&mut host.top(&[]));
    person.sees("stopped");
    person.types(b"\x03");
    assert_eq!(person.ends().0.code(), Some(0));
}

#[test]
fn every_signal_gives_the_terminal_back() {
    let host = Host::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        let person = Person::looks(&mut host.top(&[]));
        person.sees("stopped");
        kill(Pid::from_raw(person.program.id() as i32), signal).unwrap();
        assert_eq!(person.ends().0.code(), Some(0), "{signal}");
    }
}

#[test]
fn a_node_that_goes_is_waited_for() {
    let mut host = Host::new();
    let mut person = Person::looks(&mut host.top(&[]));
    person.sees("stopped");
    host.stop();
    person.sees("CONNECTION");
    host.start();
    person.types(b"\x0c");
    until("the node is heard again", || {
        thread::sleep(Duration::from_millis(1500));
        person.types(b"\x0c");
        thread::sleep(Duration::from_millis(500));
        let shown = person.shown.lock().unwrap().clone();
        shown.contains("stopped") && !shown.contains("CONNECTION")
    });
    person.types(b"q");
    person.ends();
}

#[test]
fn no_colour_is_no_colour() {
    let host = Host::new();
    let mut person = Person::looks(host.top(&[]).env("NO_COLOR", "1"));
    person.sees("stopped");
    person.types(b"q");
    let (_, shown) = person.ends();
    assert!(!shown.contains("[38;") && !shown.contains("[3;") && !shown.contains("[48;"), "{shown:?}");
}

#[test]
fn a_script_gets_one_picture_or_one_line() {
    let host = Host::new();
    let said = |command: &mut Command| {
        let output = command.stdin(Stdio::null()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, picture, words) = said(&mut host.top(&["--once"]));
    assert_eq!((code, words.as_str()), (Some(0), ""), "{picture}");
    let lines: Vec<_> = picture.lines().collect();
    assert!(lines[0].starts_with("hosta  active") && lines[0].ends_with("UTC"), "{picture}");
    assert!(lines.iter().any(|it| it.starts_with("▸ db")) && lines.iter().any(|it| it.starts_with("  web")));
    assert!(!picture.contains('\x1b'), "{picture:?}");
    let (_, picture, _) = said(&mut host.top(&["web", "--once"]));
    assert!(picture.lines().any(|it| it.starts_with("▸ web")), "{picture}");

    let (code, picture, words) = said(&mut host.top(&[]));
    assert_eq!((code, picture.as_str(), words.lines().count()), (Some(2), "", 1), "{words}");
    assert!(words.contains("no terminal") && words.contains("`outlive vm list`"), "{words}");
    let (code, _, words) = said(&mut host.top(&["no-such-vm", "--once"]));
    assert!(code == Some(1) && words.contains("there is no VM no-such-vm"), "{words}");
    let (code, _, words) = said(&mut host.top(&["we b", "--once"]));
    assert!(code == Some(2) && words.contains("cannot be a VM's name"), "{words}");
}
