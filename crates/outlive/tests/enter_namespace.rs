//! Entering a namespace of one's own, as root and without any rights.
//!
//! A process can do this only while it has one thread, and the usual test harness has more. So this is a
//! harness of its own: it starts itself again for every test, and the child does the work on its only thread.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::channel;
use std::thread;

use outlive::network::{EnterError, Namespace, Netlink, enter_own_namespace};

/// Any user without rights; 65534 is `nobody` everywhere.
const NOBODY: u32 = 65534;
const CHILD: &str = "OUTLIVE_TEST_CHILD";

/// Name, the user to run as, and the work.
type Test = (&'static str, Option<u32>, fn());

const TESTS: [Test; 4] = [
    ("with_rights_only_the_network_changes", None, with_rights),
    ("without_rights_a_user_namespace_helps", Some(NOBODY), without_rights),
    ("threads_that_would_stay_outside_are_an_error", None, threads),
    ("namespaces_beside_the_own_one_work_without_rights_too", Some(NOBODY), namespace_in_namespace),
];

fn main() -> ExitCode {
    if let Ok(wanted) = std::env::var(CHILD) {
        let (_, _, work) = TESTS.into_iter().find(|(name, ..)| *name == wanted).expect("a known test");
        work();
        return ExitCode::SUCCESS;
    }
    let filters: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let chosen = TESTS.into_iter().filter(|(name, ..)| {
        filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
    });
    let (mut passed, mut failed) = (0, Vec::new());
    for (name, user, _) in chosen {
        let ok = run(name, user);
        println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
        if ok { passed += 1 } else { failed.push(name) }
    }
    if !failed.is_empty() {
        println!("\nfailures:\n    {}", failed.join("\n    "));
    }
    let (verdict, failed) = (if failed.is_empty() { "ok" } else { "FAILED" }, failed.len());
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out"
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Starts this program again for one test. A test that needs root and does not have it counts as passed, and
/// says so.
fn run(name: &str, user: Option<u32>) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if user.is_none() && !root {
        println!("skipped: {name} needs root");
        return true;
    }
    // Another user may not be able to enter the build directory.
    let copy = Copy::of_this_program();
    let mut command = Command::new(&copy.0);
    command.env(CHILD, name).current_dir("/").stdin(Stdio::null());
    if let Some(user) = user.filter(|_| root) {
        command.uid(user).gid(user);
    }
    command.status().is_ok_and(|status| status.success())
}

/// An executable copy of this program that everybody can start; removed at the end.
struct Copy(PathBuf);

impl Copy {
    fn of_this_program() -> Copy {
        let path = std::env::temp_dir().join(format!("outlive-enter-namespace-{}", std::process::id()));
        fs::copy("/proc/self/exe", &path).expect("a copy of this program");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("an executable copy");
        Copy(path)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn link_names() -> Vec<String> {
    Netlink::open().unwrap().links().unwrap().into_iter().map(|link| link.name).collect()
}

fn network_namespace() -> PathBuf {
    fs::read_link("/proc/self/ns/net").unwrap()
}

/// The new network is empty, works, and a started process is in it too.
fn assert_usable(before: &Path) {
    assert_ne!(network_namespace(), before);
    assert_eq!(link_names(), ["lo"]);
    let mut netlink = Netlink::open().unwrap();
    assert!(netlink.link("lo").unwrap().up);
    netlink.create_bridge("br0").unwrap();
    netlink.set_up("br0").unwrap();
    std::net::TcpListener::bind("127.0.0.1:1").expect("port 1 of an own loopback");
    let output = Command::new("cat").arg("/proc/self/net/dev").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("br0"));
    let quiet = "/proc/sys/net/ipv6/conf/br0/disable_ipv6";
    assert!(!Path::new(quiet).exists() || fs::read_to_string(quiet).unwrap().trim() == "1");
}

fn with_rights() {
    let (before, user) = (network_namespace(), fs::read_link("/proc/self/ns/user").unwrap());
    enter_own_namespace().unwrap();
    assert_usable(&before);
    assert_eq!(fs::read_link("/proc/self/ns/user").unwrap(), user);
}

fn without_rights() {
    let before = network_namespace();
    assert!(!nix::unistd::geteuid().is_root());
    if !entered() {
        return;
    }
    assert!(nix::unistd::geteuid().is_root(), "root of the new user namespace");
    assert_usable(&before);
    // Its files are still those of the user.
    let file = std::env::temp_dir().join(format!("outlive-owner-{}", std::process::id()));
    fs::write(&file, "").unwrap();
    let owner = Command::new("stat").args(["-c", "%u"]).arg(&file).output().unwrap().stdout;
    fs::remove_file(&file).unwrap();
    assert_eq!(String::from_utf8_lossy(&owner).trim(), "0");
}

fn threads() {
    let (end, ended) = channel::<()>();
    let thread = thread::spawn(move || ended.recv());
    assert!(matches!(enter_own_namespace(), Err(EnterError::Threads { threads: 2 })));
    drop(end);
    let _ = thread.join();
}

fn namespace_in_namespace() {
    assert!(matches!(Namespace::new(), Err(EnterError::Permission)));
    if !entered() {
        return;
    }
    let namespace = Namespace::new().unwrap();
    assert_eq!(namespace.run(link_names).unwrap(), ["lo"]);
}

/// Enters, or says that this system does not let users do it.
fn entered() -> bool {
    match enter_own_namespace() {
        Ok(()) => true,
        Err(EnterError::UserNamespacesOff { source, knob }) => {
            println!("\nskipped: user namespaces are off ({source}; {knob})");
            false
        }
        Err(other) => panic!("{other}"),
    }
}
