//! The other example programs, used as a user would. Cargo builds examples before it runs tests, if it runs
//! all tests.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

/// The example, if it has been built.
fn example(name: &str) -> Option<Command> {
    let program = std::env::current_exe().ok()?.parent()?.parent()?.join("examples").join(name);
    let built = program.exists().then(|| Command::new(program));
    if built.is_none() {
        println!("skipped: the example {name} is not built");
    }
    built
}

fn output(name: &str, options: &[&str]) -> Option<Output> {
    Some(example(name)?.args(options).output().unwrap())
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn has_kvm() -> bool {
    let there = PathBuf::from("/dev/kvm").exists();
    if !there {
        println!("skipped: no /dev/kvm");
    }
    there
}

fn assert_wrong_option(name: &str, options: &[&str]) {
    let Some(output) = output(name, options) else { return };
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{name} {options:?}: {message}");
    assert!(message.starts_with(name) && message.lines().count() == 1, "{message}");
}

/// The output for one finding, without the kernel's line.
fn finding(name: &str) -> Option<String> {
    let output = output("kernel_findings", &[name])?;
    let text = text(&output);
    println!("{text}");
    assert!(output.status.success() && text.starts_with("kernel "), "{output:?}");
    text.split_once('\n').map(|(_, finding)| finding.to_string())
}

#[test]
fn each_finding_comes_to_a_verdict() {
    let Some(list) = output("kernel_findings", &[]) else { return };
    let names: Vec<String> = text(&list)
        .lines()
        .skip_while(|line| *line != "Names:")
        .skip(1)
        .map_while(|line| line.split_whitespace().next().map(str::to_string))
        .collect();
    assert!(names.len() >= 5, "{names:?}");
    // The first takes ten seconds; it has a test of its own in the crate.
    for name in names.iter().filter(|name| *name != "reset-signal") {
        let Some(said) = finding(name) else { return };
        let verdicts = ["shown: ", "not shown on this kernel: ", "skipped: "];
        assert!(verdicts.iter().any(|verdict| said.starts_with(&format!("{name}: {verdict}"))), "{said}");
    }
    assert_wrong_option("kernel_findings", &["bogus"]);
}

/// A documented limit. If a kernel reports these writes some day, the documentation has to change.
#[test]
fn a_write_through_a_pin_that_spans_a_take_is_not_seen() {
    let Some(said) = finding("pinned-write") else { return };
    assert!(!said.starts_with("pinned-write: not shown"), "{said}");
}

#[test]
fn both_migrations_arrive_byte_for_byte() {
    if !has_kvm() {
        return;
    }
    for options in [&[][..], &["--exact"], &["--vcpus", "2", "--streams", "3"]] {
        let case = ["--gib", "1", "--percent", "5", "--touched", "4000", "--rounds", "3", "--round-ms", "30"];
        let Some(output) = output("migrate", &[&case, options].concat()) else { return };
        let text = text(&output);
        println!("{text}");
        assert!(output.status.success(), "{output:?}");
        let rows: Vec<&str> = text.lines().filter(|line| line.contains(" % ")).collect();
        assert_eq!(rows.len(), 2, "{text}");
        assert!(rows.iter().all(|row| row.ends_with(" 0")), "pages differ: {text}");
    }
    for options in [
        &["--bogus"][..],
        &["--gib"],
        &["--gib", "0"],
        &["--percent", "x"],
        &["--gib", "1", "--touched", "1e6"],
    ] {
        assert_wrong_option("migrate", options);
    }
}

#[test]
fn rates_come_from_another_process() {
    if !has_kvm() {
        return;
    }
    let directory = std::env::temp_dir().join(format!("outlive-dirty-rates-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let (socket, map) = (directory.join("socket"), directory.join("map.svg"));
    let Some(mut vmm) = example("dirty_top") else { return };
    vmm.args([
        "--interval",
        "1",
        "--hot",
        "80",
        "--pages",
        "100",
        "--rearm-all",
        "--seconds",
        "20",
        "--rates",
    ]);
    let mut vmm = vmm.arg(&socket).stdout(Stdio::null()).spawn().unwrap();
    while !socket.exists() && vmm.try_wait().unwrap().is_none() {
        thread::sleep(Duration::from_millis(10));
    }
    let (socket, map_name) = (socket.to_str().unwrap(), map.to_str().unwrap());
    let looked = output("dirty_rate", &[socket, "--seconds", "1.5", "--svg", map_name, "--interval", "1"]);
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    let svg = fs::read_to_string(&map).unwrap_or_default();
    fs::remove_dir_all(&directory).unwrap();
    let Some(looked) = looked else { return };
    let text = text(&looked);
    println!("{text}");
    assert!(looked.status.success(), "{looked:?}");
    for part in ["vCPU 1", "different pages in", "migration over 10 Gbit/s", "protection by a checkpoint"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(svg.starts_with("<svg ") && svg.matches("<rect ").count() > 20);
}

#[test]
fn what_is_no_rate_is_said() {
    let directory = std::env::temp_dir().join(format!("outlive-dirty-no-rates-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let file = directory.join("lines");
    let look = |text: &str| {
        fs::write(&file, text).unwrap();
        output("dirty_rate", &[file.to_str().unwrap()])
    };
    let vm = "vm gfn-space 100000 fault-ns 0 copy-ns 0\n";
    for (text, code, said) in [
        ("", 1, "nothing came"),
        ("hello\n", 1, "the first line is none of a VM"),
        (vm, 1, "no window came"),
        (&*format!("{vm}window 10 vcpus x devices 0 hot 0 pages -\n"), 1, "a line that is no window"),
        (&*format!("{vm}other\nwindow 1000 vcpus - devices 0 hot 0 pages 1+5\n"), 0, ""),
    ] {
        let Some(output) = look(text) else { break };
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{message}");
        assert!(message.contains(said) && message.lines().count() <= 1, "{message}");
    }
    fs::remove_dir_all(&directory).unwrap();
    for options in [&[][..], &["/nowhere/socket"], &["-", "--link", "0"], &["-", "--bogus"], &["a", "b"]] {
        assert_wrong_option("dirty_rate", options);
    }
}
