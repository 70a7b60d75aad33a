//! Every exit code that `outlive::cli::exits` promises is what the program does. Those that take whole VMs are named
//! with the test that sees them.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use outlive::cli::exits;

const PROGRAM: &str = env!("CARGO_BIN_EXE_outlive");
/// Longer than anything takes on a host that is not overloaded.
const PATIENCE: Duration = Duration::from_secs(120);

/// Seen elsewhere: the command, the code, and file and name of a test that asserts it.
const ELSEWHERE: &[(&str, u8, &str, &str)] = &[
    ("run", 0, "tests/survive/ends.rs", "a_guest_that_powers_itself_off_unprotected_ends_too"),
    (
        "run",
        1,
        "tests/survive/broken_disks.rs",
        "a_host_whose_disk_is_full_leaves_the_vm_to_its_standby_before_the_guest_hears",
    ),
    ("run", 3, "tests/survive/freeze.rs", "a_stop_of_any_length_leaves_exactly_one_host_with_the_vm"),
    ("standby", 0, "tests/survive/ends.rs", "a_planned_stop_after_a_takeover_ends_both_sides"),
    (
        "standby",
        1,
        "tests/survive/self_check.rs",
        "a_byte_that_differs_on_the_standbys_disk_is_found_and_the_image_is_used_no_more",
    ),
    ("standby", 3, "tests/survive/arbiters.rs", "an_operators_word_is_refused_while_the_other_host_answers"),
    ("node", 1, "../node/src/cli/say.rs", "bad_input_has_its_own_exit_code_and_no_second_remedy"),
    ("node drain", 1, "../node/src/cli/say.rs", "bad_input_has_its_own_exit_code_and_no_second_remedy"),
    ("node events", 1, "../node/src/cli/say.rs", "bad_input_has_its_own_exit_code_and_no_second_remedy"),
    ("history", 0, "tests/survive/time_machine.rs", "a_vm_can_be_had_again_as_it_was_at_each_checkpoint"),
    ("rewind", 0, "tests/survive/rewind.rs", "a_vm_is_rewound_to_each_moment_exactly"),
    ("rewind", 1, "src/exit.rs", "codes_are_as_the_help_says"),
    ("demo", 0, "src/demo/summary.rs", "any_damage_makes_it_fail"),
    ("demo", 1, "src/demo/summary.rs", "any_damage_makes_it_fail"),
    ("demo", 130, "src/demo/summary.rs", "an_interrupted_run_is_judged_by_what_was_done"),
    ("check", 0, "tests/check.rs", "the_exit_code_and_both_outputs_agree"),
    ("doctor", 0, "src/doctor/mod.rs", "two_hosts_stand_side_by_side"),
    ("doctor", 1, "src/doctor/mod.rs", "an_error_on_either_host_or_between_them_decides"),
];

/// What was seen.
struct Seen {
    there: tempfile::TempDir,
    codes: BTreeSet<(&'static str, u8)>,
}

impl Seen {
    fn path(&self, name: &str) -> PathBuf {
        self.there.path().join(name)
    }

    /// Runs a command, in which `@` is this test's directory, for the row of the table that it belongs to.
    fn sees(&mut self, row: &'static str, code: u8, line: &str) {
        let words =
            line.split_whitespace().map(|word| word.replace('@', self.there.path().to_str().unwrap()));
        let mut command = Command::new(PROGRAM);
        let output = command.args(words).stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(code.into()), "outlive {line}: {output:?}");
        assert!(line.starts_with(row) || row.is_empty(), "{line} is not of {row}");
        self.codes.insert((row, code));
        // Help for a call without arguments is many lines.
        if code == 2 && !line.is_empty() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.lines().count() == 1 && said.starts_with("outlive: "), "outlive {line}: {said}");
        }
    }
}

/// Answers one client at this socket in a thread of its own.
fn answers(socket: &Path, answer: impl FnOnce(UnixStream) + Send + 'static) {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || answer(listener.accept().unwrap().0));
}

fn says(text: &'static str) -> impl FnOnce(UnixStream) + Send {
    move |mut client| {
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).unwrap();
        client.write_all(text.as_bytes()).unwrap();
    }
}

const PROTECTED: &str = r#"{"vm":"web","pid":1,"role":"primary","protected":true,"since":"2026-12-01T00:00:00Z",
"loss_of_this_host":{"survived":true,"what":"taken over"},"loss_of_other_host":{"survived":true,"what":"goes on"}}"#;

#[test]
fn every_documented_code_is_what_the_program_does() {
    let mut seen = Seen { there: tempfile::tempdir().unwrap(), codes: BTreeSet::new() };
    for directory in ["vms", "arbiter"] {
        fs::create_dir(seen.path(directory)).unwrap();
    }
    fs::write(seen.path("vms/web.toml"), "ip = '10.0.0.5/24'\n").unwrap();
    fs::write(seen.path("bad.toml"), "colour = 'red'\n").unwrap();
    fs::write(seen.path("image"), vec![0; 4096]).unwrap();
    fs::create_dir_all(seen.path("record/00000001")).unwrap();
    fs::write(seen.path("record/00000001/base"), "of another release").unwrap();
    for (row, code, line) in COMMANDS {
        seen.sees(row, *code, line);
    }
    with_sockets(&mut seen);
    with_a_node(&mut seen);
    for (row, codes) in exits::TABLE {
        for (code, meaning) in *codes {
            let test = ELSEWHERE.iter().find(|(command, other, ..)| command == row && other == code);
            let Some((.., file, name)) = test else {
                assert!(
                    seen.codes.contains(&(*row, *code)),
                    "no test sees that outlive {row} ends with {code}: {meaning}"
                );
                continue;
            };
            let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
            assert!(text.contains(&format!("fn {name}(")), "{file} has no test {name}");
        }
        for (_, code) in seen.codes.iter().filter(|(command, _)| command == row) {
            assert!(
                codes.iter().any(|(it, _)| it == code),
                "outlive {row} ends with {code}, and does not say so"
            );
        }
    }
}

/// Orders to stop come with the end of standard input, which is there at once.
const COMMANDS: &[(&str, u8, &str)] = &[
    ("", 0, "--version"),
    ("", 0, "--help"),
    ("", 2, ""),
    ("", 2, "no-such-command"),
    ("run", 2, "run --nonsense"),
    ("run", 2, "run --kernel @/missing"),
    ("standby", 2, "standby --listen 7000"),
    ("status", 2, "status --socket @/missing"),
    ("metrics", 2, "metrics --socket @/missing"),
    ("metrics", 0, "metrics --listen 127.0.0.1:0 --exit-with-stdin"),
    ("console", 2, "console @/missing"),
    ("hand-over", 2, "hand-over --socket @/missing"),
    ("take-over", 2, "take-over --generation 2 --socket @/missing"),
    ("go-on-alone", 2, "go-on-alone --generation 2 --socket @/missing"),
    ("give-up", 2, "give-up --generation 2 --socket @/missing"),
    ("node", 2, "node status --socket @/missing"),
    (
        "node run",
        2,
        "node run --vms @/image/vms --state @/state --run @/run --logs @/logs --socket @/other.api",
    ),
    ("node check", 0, "node check --vms @/vms"),
    ("node check", 2, "node check --vms @/missing"),
    ("node drain", 2, "node drain --socket @/missing"),
    ("node events", 2, "node events --socket @/missing"),
    ("vm", 2, "vm list --socket @/missing"),
    ("top", 2, "top --once --socket @/missing"),
    ("arbiter", 0, "arbiter init file:@/arbiter"),
    ("arbiter", 2, "arbiter list file:@/missing"),
    (
        "arbiter serve",
        0,
        "arbiter serve --directory @/arbiter --listen 127.0.0.1:0 --insecure --exit-with-stdin",
    ),
    ("arbiter serve", 2, "arbiter serve --directory @/missing --listen 127.0.0.1:0 --insecure"),
    ("keys", 0, "keys init @/keys"),
    ("keys", 2, "keys show --keys @/missing"),
    ("image", 0, "image show @/image"),
    ("history", 1, "history @/record"),
    ("history", 2, "history @/missing"),
    ("rewind", 2, "rewind @/missing --to newest --into @/vm"),
    ("image", 2, "image show @/missing"),
    ("demo", 2, "demo --seconds 0"),
    ("check", 2, "check --nonsense"),
    ("doctor", 2, "doctor --vms @/vms --peer 127.0.0.1:9 --keys @/missing"),
    ("completions", 0, "completions bash"),
    ("completions", 2, "completions tcsh"),
    ("man", 0, "man @/man1"),
    ("man", 2, "man @/image/man1"),
];

/// What processes with a VM would say.
fn with_sockets(seen: &mut Seen) {
    answers(&seen.path("good.sock"), says(PROTECTED));
    seen.sees("status", 0, "status --socket @/good.sock");
    answers(&seen.path("odd.sock"), says("nothing of use"));
    seen.sees("status", 1, "status --socket @/odd.sock");
    for (at, row) in ["hand-over", "take-over", "go-on-alone", "give-up"].into_iter().enumerate() {
        answers(&seen.path(&format!("{at}.word")), says(r#"{"done":"as you say"}"#));
        let generation = if row == "hand-over" { "" } else { "--generation 2" };
        seen.sees(row, 0, &format!("{row} {generation} --socket @/{at}.word"));
    }
    answers(&seen.path("closed"), drop);
    seen.sees("console", 0, "console @/closed");
    lost_console(seen);
}

/// What the guest prints cannot be shown.
fn lost_console(seen: &mut Seen) {
    let socket = seen.path("lost");
    answers(&socket, |mut client| {
        client.write_all(b"words").unwrap();
        let _ = client.read_to_end(&mut Vec::new());
    });
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(PROGRAM);
    command.arg("console").arg(&socket).stdin(Stdio::null()).stdout(full).stderr(Stdio::null());
    assert_eq!(command.status().unwrap().code(), Some(1));
    seen.codes.insert(("console", 1));
}

fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "{what}: not yet");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A process that ends with this test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn with_a_node(seen: &mut Seen) {
    let places = ["vms", "state", "run", "logs"].map(|it| (format!("--{it}"), seen.path(it)));
    let socket = seen.path("node.api");
    let mut command = Command::new(PROGRAM);
    command.args(["node", "run", "--exit-with-stdin"]).stdin(Stdio::piped()).stderr(Stdio::null());
    for (option, path) in &places {
        command.arg(option).arg(path);
    }
    let mut node = Running(command.arg("--socket").arg(&socket).spawn().unwrap());
    wait("the node answers", || UnixStream::connect(&socket).is_ok());
    seen.sees("node", 0, "node status --socket @/node.api");
    seen.sees("vm", 0, "vm list --socket @/node.api");
    seen.sees("vm", 1, "vm start no-such-vm --socket @/node.api");
    seen.sees("top", 0, "top --once --socket @/node.api");
    seen.sees("top", 1, "top no-such-vm --once --socket @/node.api");
    seen.sees("top", 2, "top --socket @/node.api");
    seen.sees("vm", 2, "vm define new @/bad.toml --socket @/node.api");
    seen.sees("node drain", 0, "node drain --socket @/node.api");
    drop(node.0.stdin.take());
    assert_eq!(node.0.wait().unwrap().code(), Some(0));
    seen.codes.insert(("node run", 0));
}
