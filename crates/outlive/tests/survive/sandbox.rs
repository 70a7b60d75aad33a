//! What a thread can still do once a guest or a peer has taken it over: nothing, and whatever it tries ends its process.

use std::collections::BTreeMap;
use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use nix::libc::{
    AF_PACKET, AF_UNIX, AF_VSOCK, AT_FDCWD, CLONE_NEWUSER, O_RDONLY, O_WRONLY, PRIO_PROCESS, SOCK_RAW,
    SOCK_STREAM, SYS_bpf, SYS_execve, SYS_fchmod, SYS_fchmodat, SYS_fork, SYS_ioctl, SYS_kill, SYS_mount,
    SYS_ptrace, SYS_sched_setaffinity, SYS_setpriority, SYS_setuid, SYS_setxattr, SYS_socket, SYS_unshare,
    SYS_utimensat,
};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use outlive::events::Event;
use outlive::keys::{self, Grant, Order};
use outlive::status::Status;

use crate::sentinel::{is_gone, sentinel_of, sentinels};
use crate::support::{Held, Process, Side, Witnesses, World, wait_until};

/// A system call that no thread may make, and its arguments.
type Forbidden = (i64, [u64; 3]);

const PACKETS: Forbidden = (SYS_socket, [AF_PACKET as u64, SOCK_RAW as u64, 0]);
const OTHER_VMS: Forbidden = (SYS_socket, [AF_VSOCK as u64, SOCK_RAW as u64, 0]);
const PROGRAM: Forbidden = (SYS_execve, [0, 0, 0]);
const PROCESS: Forbidden = (SYS_fork, [0, 0, 0]);
const TRACE: Forbidden = (SYS_ptrace, [0, 0, 0]);
const NAMESPACE: Forbidden = (SYS_unshare, [CLONE_NEWUSER as u64, 0, 0]);
const MOUNT: Forbidden = (SYS_mount, [0, 0, 0]);
const KERNEL: Forbidden = (SYS_bpf, [0, 0, 0]);
const USER: Forbidden = (SYS_setuid, [0, 0, 0]);
/// Of each file of its user, for which Landlock has no right: programs of the host, if it stayed root.
const MODE: Forbidden = (SYS_fchmodat, [AT_FDCWD as u64, 0, 0o4755]);
const MODE_OF_OPEN: Forbidden = (SYS_fchmod, [0, 0o600, 0]);
const TIMES: Forbidden = (SYS_utimensat, [AT_FDCWD as u64, 0, 0]);
const ATTRIBUTE: Forbidden = (SYS_setxattr, [0, 0, 0]);
/// FS_IOC_SETFLAGS
const FLAGS: Forbidden = (SYS_ioctl, [0, 0x4008_6602, 0]);
const SIGNAL: Forbidden = (SYS_kill, [1, 0, 0]);
const CORES: Forbidden = (SYS_sched_setaffinity, [1, 8, 0]);
/// Allowed to the main thread.
const NETWORK: Forbidden = (SYS_socket, [nix::libc::AF_INET as u64, 1, 0]);

/// `OUTLIVE_TEST_SANDBOX=0` takes the hosts of all tests out of the sandbox, to compare.
pub(crate) fn confined_world() -> Option<World> {
    if !World::is_confined() {
        println!("skipped: hosts in the sandbox (OUTLIVE_TEST_SANDBOX=0)");
        return None;
    }
    World::new()
}

/// Makes the thread of this name do it, until the process is gone.
fn escapes(process: &mut Process, thread: &str, (number, arguments): Forbidden) {
    wait_until("the thread does what it may not", || {
        if process.ended() {
            return true;
        }
        if let Some(held) = Held::find(process, thread) {
            match held.call(number, arguments) {
                // Not in a system call at the moment, or its process has ended.
                None | Some(0) => {}
                Some(answer) => panic!("{thread} may make the call {number}: {answer}"),
            }
        }
        process.ended()
    });
    let status = process.status().expect("it has ended");
    assert_eq!(status.signal(), Some(Signal::SIGSYS as i32), "{thread}: {status}\n{}", process.log());
}

/// Every kind of thread of a primary, one host after the other.
#[test]
fn an_escape_from_any_thread_of_a_primary_ends_it_and_the_vm_is_taken_over() {
    let Some(world) = confined_world() else { return };
    let (mut active, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    let escapees = [
        ("vcpu0", PROGRAM),
        ("outlive-net", PACKETS),
        ("sender", NETWORK),
        ("receiver", PROCESS),
        ("outlive", TRACE),
        ("links", OTHER_VMS),
        ("log", NETWORK),
        ("keeper-1", NAMESPACE),
        ("watchdog", SIGNAL),
        ("metrics", NETWORK),
        ("audit", NETWORK),
        ("links", MODE),
        ("log", MODE_OF_OPEN),
        ("outlive", FLAGS),
        ("links", CORES),
        // Of the test, which has started the process: it runs last from then on.
        ("outlive", (SYS_setpriority, [PRIO_PROCESS as u64, std::process::id().into(), 19])),
    ];
    for ((thread, forbidden), side) in escapees.into_iter().zip([Side::A, Side::B].into_iter().cycle()) {
        witnesses.hear_all();
        escapes(&mut active, thread, forbidden);
        standby.wait_takeover();
        active = standby;
        standby = world.standby(side);
        active.wait_protected();
    }
    witnesses.hear_all();
    witnesses.finish(&world);
}

/// Every kind of thread of a standby that has the copy of a VM with a disk. The VM goes on where it is.
#[test]
fn an_escape_from_any_thread_of_a_standby_ends_it_and_the_vm_goes_on() {
    let Some(world) = confined_world() else { return };
    for side in Side::BOTH {
        fs::File::create(world.image(side)).unwrap().set_len(1 << 20).unwrap();
    }
    let disk = |side| format!("path={}", world.image(side).display());
    let there = Side::B.addr().to_string();
    let mut active = world.run_with(Side::A, &["--standby", &there, "--disk", &disk(Side::A)]);
    let witnesses = Witnesses::start(&world, 2);
    let escapees = [
        ("session", PROGRAM),
        ("applier", NETWORK),
        ("disks", NETWORK),
        ("outlive", MOUNT),
        ("listen", KERNEL),
        ("vcpu0", NETWORK),
        ("outlive-blk", USER),
        ("session", ATTRIBUTE),
        ("disks", TIMES),
    ];
    for (thread, forbidden) in escapees {
        let mut standby = world.standby_with(Side::B, &["--disk", &disk(Side::B)]);
        active.wait_protected();
        escapes(&mut standby, thread, forbidden);
        active.wait_for("alone", |e| matches!(e, Event::Unprotected { .. }));
        witnesses.hear_all();
    }
    witnesses.finish(&world);
}

/// The sentinel is a process of its own. Its host loses nothing but that, and gets another one.
#[test]
fn an_escape_from_a_sentinel_ends_it_and_nothing_else() {
    let Some(world) = confined_world() else { return };
    let (mut active, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    for (process, (number, arguments)) in [(&active, NETWORK), (&standby, PROGRAM)] {
        let first = sentinel_of(process);
        wait_until("the sentinel does what it may not", || {
            match Held::of(Pid::from_raw(first as i32)).map(|held| held.call(number, arguments)) {
                None | Some(None | Some(0)) => is_gone(first),
                Some(Some(answer)) => panic!("a sentinel may make the call {number}: {answer}"),
            }
        });
        assert_ne!(sentinel_of(process), first);
    }
    witnesses.hear_all();
    for process in [&mut active, &mut standby] {
        assert!(!process.ended() && !process.has(|e| matches!(e, Event::LinkLost { .. })));
    }
    witnesses.finish(&world);
}

/// What the kernel says of a thread.
fn words(process: &Process, thread: &str) -> BTreeMap<String, String> {
    let text =
        fs::read_to_string(format!("/proc/{}/task/{thread}/status", process.pid())).unwrap_or_default();
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

/// The threads that have no filter but the process' own, because they make connections and start others. The first one
/// has the name of the program.
const CONTROL: [&str; 15] = [
    "bind",
    "outlive",
    "links",
    "listen",
    "arbiter",
    "arbiter-probe",
    "arbiter-watch",
    "status",
    "console",
    "word",
    "ask",
    "rivals",
    "uplink",
    "sentinel",
    "farewell",
];

#[test]
fn no_thread_of_either_host_has_a_right() {
    let Some(world) = confined_world() else { return };
    let (active, standby) = world.protected(Side::A);
    for process in [&active, &standby] {
        let mut threads = 0;
        for task in fs::read_dir(format!("/proc/{}/task", process.pid())).unwrap() {
            let thread = words(process, task.unwrap().file_name().to_str().unwrap());
            let Some(name) = thread.get("Name") else { continue };
            threads += 1;
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert_eq!(u64::from_str_radix(&thread[set], 16), Ok(0), "{set} of {name}");
            }
            assert_eq!((&*thread["NoNewPrivs"], &*thread["Seccomp"]), ("1", "2"), "{name}");
            // The main thread's two, and for all but its helpers one of the role.
            let filters: u32 = thread["Seccomp_filters"].parse().unwrap();
            let of_process = CONTROL.contains(&&**name);
            assert!(filters >= if of_process { 2 } else { 3 }, "{name} is in no role: {filters} filters");
        }
        assert!(threads > 8, "{threads}");
        let keys = std::ptr::eq(process, &active).then(|| world.keys(Side::A));
        reaches_only_its_files(process, keys.as_deref());
    }
}

/// A descriptor is a right, and so is a guest's memory in a file.
#[test]
fn a_process_has_no_descriptor_of_others_and_leaves_no_core() {
    let Some(world) = confined_world() else { return };
    let secret = world.dir().join("secret");
    fs::write(&secret, "of whoever starts it").unwrap();
    // Every program that is started from here on has it.
    let left_open =
        nix::fcntl::open(&secret, nix::fcntl::OFlag::O_RDONLY, nix::sys::stat::Mode::empty()).unwrap();
    let has = |pid: u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        files.filter_map(|file| fs::read_link(file.ok()?.path()).ok()).any(|to| to == secret)
    };
    let mut other = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    wait_until("the other program runs", || has(other.id()));
    let (active, standby) = world.protected(Side::A);
    other.kill().unwrap();
    other.wait().unwrap();
    drop(left_open);
    for process in [&active, &standby] {
        let helpers = process.children("vm-steward").into_iter().map(|pid| pid.as_raw() as u32);
        let all: Vec<u32> = helpers.chain(sentinels(process.pid())).chain([process.pid()]).collect();
        assert_eq!(all.len(), 3, "with a steward and a sentinel");
        for pid in all {
            assert!(!has(pid), "{}", fs::read_to_string(format!("/proc/{pid}/comm")).unwrap());
            let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
            let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
            assert_eq!(core.split_whitespace().next(), Some("1"), "{core}");
            if pid == process.pid() {
                let first =
                    limits.lines().find_map(|line| line.strip_prefix("Max realtime priority")).unwrap();
                let both: Vec<&str> = first.split_whitespace().take(2).collect();
                assert_eq!(both, ["0", "0"], "its keepers have theirs already: {first}");
            }
        }
    }
}

/// The files of others, root's among them, are out of reach; the CA that belongs to `keys`, too.
fn reaches_only_its_files(process: &Process, keys: Option<&Path>) {
    if process.log().contains("no Landlock") {
        return println!("skipped: this kernel has no Landlock");
    }
    let open = |path: &str, flags| {
        let mut answer = None;
        wait_until("the thread is in a system call", || {
            answer = Held::find(process, "outlive").and_then(|held| held.open(path, flags));
            answer.is_some()
        });
        answer.unwrap()
    };
    let refused = -i64::from(nix::libc::EACCES);
    assert_eq!(open("/etc/shadow", O_RDONLY), refused);
    assert_eq!(open("/etc/passwd", O_WRONLY), refused);
    assert_eq!(open("/proc/sys/kernel/core_pattern", O_WRONLY), refused);
    assert_eq!(open("/root", O_RDONLY), refused);
    if let Some(keys) = keys {
        let ca = format!("{}-ca/ca.pem", keys.display());
        assert!(fs::exists(&ca).unwrap());
        assert_eq!(open(&ca, O_RDONLY), refused, "whoever has it can be any host");
        assert!(open(&format!("{}/host.pem", keys.display()), O_RDONLY) >= 0);
    }
    // So the refusals are no mistake of this test.
    assert!(open("/proc/self/status", O_RDONLY) >= 0);
}

#[test]
fn a_process_says_whether_it_is_confined() {
    let Some(world) = World::new() else { return };
    for (mode, confined) in [("on", true), ("log", false), ("off", false)] {
        let socket = world.dir().join(format!("{mode}.sock"));
        let options = ["--sandbox", mode, "--status", socket.to_str().unwrap()];
        let mut vm = world.run_without_arbiter(Side::A, &options);
        vm.wait_for("running", |e| matches!(e, Event::Started { .. }));
        assert!(vm.has(|e| matches!(e, Event::Confined { sandbox } if *sandbox == confined)));
        let asked = std::process::Command::new(crate::support::PROGRAM)
            .args(["status", "--json", "--socket"])
            .arg(&socket)
            .output()
            .unwrap();
        let [status] = serde_json::from_slice::<[Status; 1]>(&asked.stdout).unwrap();
        assert_eq!(status.sandbox, confined);
        assert_eq!(vm.log().contains("SANDBOX INCOMPLETE (--sandbox log)"), mode == "log");
        if mode == "log" {
            let main = words(&vm, &vm.pid().to_string());
            assert_eq!((&*main["CapEff"], &*main["Seccomp"]), ("0000000000000000", "2"));
            let (number, arguments) = PROGRAM;
            wait_until("a call that is only logged", || match Held::find(&vm, "outlive") {
                Some(held) => held.call(number, arguments) == Some(-i64::from(nix::libc::EFAULT)),
                None => false,
            });
            assert!(!vm.ended());
        }
        vm.kill();
    }
}

/// Both hosts belong to a user who owns the VM's things and has no other right; one is killed.
#[test]
fn a_vm_of_a_user_without_rights_is_taken_over() {
    let Some(world) = confined_world() else { return };
    let nobody = nix::unistd::User::from_name("nobody").unwrap().expect("nobody is a user");
    let kvm = std::os::unix::fs::MetadataExt::mode(&fs::metadata("/dev/kvm").unwrap());
    if kvm & 0o006 != 0o006 {
        return println!("skipped: nobody may not use /dev/kvm");
    }
    for side in Side::BOTH {
        fs::File::create(world.image(side)).unwrap().set_len(1 << 20).unwrap();
    }
    give(world.dir(), &nobody);
    give(world.keys(Side::A).parent().unwrap(), &nobody);
    let (here, there) = (Side::B.addr().to_string(), Side::A.addr().to_string());
    let disk = |side| format!("path={}", world.image(side).display());
    let (a, b) = (disk(Side::A), disk(Side::B));
    let mut standby = world.standby_with(Side::B, &["--standby", &there, "--user", "nobody", "--disk", &b]);
    let mut active = world.run_with(Side::A, &["--standby", &here, "--user", "nobody", "--disk", &a]);
    active.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    for process in [&active, &standby] {
        let main = words(process, &process.pid().to_string());
        assert!(main["Uid"].split_whitespace().all(|it| it == nobody.uid.to_string()), "{}", main["Uid"]);
        assert!(process.log().contains("allow every VM, and an escape from this guest"), "{}", process.log());
    }
    witnesses.hear_all();
    active.kill();
    standby.wait_takeover();
    witnesses.hear_all();
    let _new = world.standby_with(Side::A, &["--user", "nobody", "--disk", &a]);
    standby.wait_protected();
    witnesses.finish(&world);
}

/// Root without capabilities may not use what others keep to themselves. That is said at the start. Needs no KVM.
#[test]
fn an_image_of_another_user_is_refused_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("root.img");
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    fs::set_permissions(&image, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let nobody = nix::unistd::User::from_name("nobody").unwrap().expect("nobody is a user");
    if nix::unistd::chown(&image, Some(nobody.uid), Some(nobody.gid)).is_err() {
        return println!("skipped: not root");
    }
    let run = |options: &[&str]| {
        let mut command = std::process::Command::new(crate::support::PROGRAM);
        let disk = format!("path={}", image.display());
        let output =
            command.args(["run", "--memory", "64M", "--disk", &disk]).args(options).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = run(&["--sandbox", "on"]);
    assert!(
        code == Some(2) && said.contains("belongs to the user nobody") && said.contains("--user nobody"),
        "{said}"
    );
    let (code, said) = run(&["--sandbox", "on", "--user", "somebody-else"]);
    assert!(code == Some(2) && said.contains("there is no such user"), "{said}");
    let (code, said) = run(&["--user", "nobody", "--sandbox", "off"]);
    assert!(code == Some(2) && said.contains("--user makes no sense with --sandbox off"), "{said}");
}

/// Whoever broke out of the guest could read what is beside its image. Needs no KVM.
#[test]
fn an_image_beside_the_key_of_the_ca_is_refused_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let (image, keys) = (folder.path().join("web.img"), folder.path().join("keys"));
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let life = std::time::Duration::from_secs(3600);
    keys::init(&keys, &Order { host: "hosta".into(), grant: Grant::ALL, life }).unwrap();
    let output = std::process::Command::new(crate::support::PROGRAM)
        .args(["run", "--memory", "64M", "--exit-with-stdin", "--disk", &format!("path={}", image.display())])
        .arg("--keys")
        .arg(&keys)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("keys-ca/ca.pem is below it")).collect();
    assert!(lines.len() == 1 && lines[0].contains("in a directory of their own"), "{said}");
}

/// `/run` of its own, with a folder of sockets of the first argument's, around the rest of the arguments; and a `/dev/kvm`
/// that every user may use.
const OWN_RUN: &str = r#"
mount -t tmpfs none /run && mkdir -m 700 /run/outlive && chown "$0" /run/outlive || exit
if [ -e /dev/kvm ]; then mknod -m 666 /run/kvm c 10 232 && mount --bind /run/kvm /dev/kvm || exit; fi
exec "$@"
"#;

/// Where nobody could see the process, or give it a word, it says so when it starts. Needs no KVM but for the last.
#[test]
fn a_folder_of_sockets_of_another_user_is_refused_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    fs::create_dir(&run).unwrap();
    fs::set_permissions(&run, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let nobody = nix::unistd::User::from_name("nobody").unwrap().expect("nobody is a user");
    if nix::unistd::chown(&run, Some(nobody.uid), Some(nobody.gid)).is_err() {
        return println!("skipped: not root");
    }
    let path = |name: &str| folder.path().join(name).display().to_string();
    let command = |owner: &str, options: &[&str]| {
        let mut command = std::process::Command::new("unshare");
        command.args(["-m", "sh", "-c", OWN_RUN, owner, crate::support::PROGRAM, "run", "--memory", "64M"]);
        command.args(["--sandbox", "on"]).args(options).env_remove("XDG_RUNTIME_DIR");
        command
    };
    let refused = |owner: &str, options: &[&str], words: &[&str]| {
        let output = command(owner, options).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let whole = words.iter().all(|it| said.contains(it));
        assert!(output.status.code() == Some(2) && whole, "{words:?}: {said}");
    };
    let (of_nobody, own) = ("belongs to the user nobody", path("own.sock"));
    refused(
        "root",
        &["--status", &path("run/a.sock")],
        &[of_nobody, "chown root: ", "--status another path"],
    );
    refused(
        "root",
        &["--console", &path("run"), "--status", &own],
        &[of_nobody, "chown root: ", "--console another directory"],
    );
    let usual = ["--arbiter manual", "/run/outlive", "--status PATH"];
    refused("nobody", &["--arbiter", "manual"], &[&usual[..], &[of_nobody, "runs as root"]].concat());
    let of_root = ["belongs to the user root", "runs as nobody", "chown nobody: /run/outlive"];
    refused("root", &["--arbiter", "manual", "--user", "nobody"], &[&usual[..], &of_root].concat());
    if !crate::support::has_kvm() {
        return;
    }
    // With any other arbiter it can do its work.
    let log = folder.path().join("log");
    let to = fs::File::create(&log).unwrap();
    let mut goes_on = command("nobody", &["--exit-with-stdin"]);
    let mut goes_on = goes_on.stdin(std::process::Stdio::piped()).stderr(to).spawn().unwrap();
    let said = || fs::read_to_string(&log).unwrap();
    wait_until("a warning", || said().contains("`outlive status` cannot see this process"));
    assert!(said().contains(of_nobody) && said().contains("chown root: /run/outlive"), "{}", said());
    assert!(goes_on.try_wait().unwrap().is_none());
    drop(goes_on.stdin.take());
    goes_on.wait().unwrap();
}

/// Whether this kernel's Landlock knows sockets with abstract names (Linux 6.12).
fn knows_abstract_names() -> bool {
    let about = nix::sys::utsname::uname().unwrap();
    let release = about.release().to_str().unwrap().to_owned();
    let mut numbers = release.split(['.', '-']).map_while(|it| it.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(12))
}

/// The service manager is one of those who may listen there.
#[test]
fn sockets_with_abstract_names_are_out_of_reach_but_for_the_service_managers() {
    let Some(_world) = confined_world() else { return };
    if !knows_abstract_names() {
        return println!("skipped: this kernel's Landlock does not know abstract names");
    }
    let listen = |what: &str| {
        let name = format!("outlive-test-{what}-{}", std::process::id());
        (SocketAddr::from_abstract_name(&name).unwrap(), [&[1, 0, 0], name.as_bytes()].concat())
    };
    let ((other, address), (manager, _)) = (listen("other"), listen("manager"));
    let _listens = UnixListener::bind_addr(&other).unwrap();
    let by = UnixDatagram::bind_addr(&manager).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let log = fs::File::create(folder.path().join("log")).unwrap();
    let mut child = std::process::Command::new(crate::support::PROGRAM)
        .args(["run", "--memory", "64M", "--sandbox", "on", "--exit-with-stdin", "--status"])
        .arg(folder.path().join("run/vm.sock"))
        .env("NOTIFY_SOCKET", format!("@outlive-test-manager-{}", std::process::id()))
        .stdin(std::process::Stdio::piped())
        .stderr(log)
        .spawn()
        .unwrap();
    by.set_read_timeout(Some(crate::support::PATIENCE)).unwrap();
    let mut said = [0; 4096];
    wait_until("it tells the manager", || {
        let length = by.recv(&mut said).unwrap_or_else(|why| {
            panic!("{why}: {}", fs::read_to_string(folder.path().join("log")).unwrap())
        });
        &said[..length] == b"READY=1"
    });
    let main = Pid::from_raw(child.id() as i32);
    let call = |work: &dyn Fn(&Held) -> Option<i64>| {
        let mut answer = None;
        wait_until("the thread is in a system call", || {
            answer = Held::child(main).and_then(|held| work(&held));
            answer.is_some()
        });
        answer.unwrap()
    };
    let socket = call(&|held| held.call(SYS_socket, [AF_UNIX as u64, SOCK_STREAM as u64, 0]));
    assert!(socket > 2, "{socket}");
    let refused = -i64::from(nix::libc::EPERM);
    assert_eq!(call(&|held| held.connect(socket, &address)), refused);
    drop(child.stdin.take());
    child.wait().unwrap();
}

/// `/run` of its own, with sockets of others, on a host whose mounts are shared, around the arguments; and a program that
/// goes on there.
const SHARED_RUN: &str = r#"
mount -t tmpfs none /run && mkdir -p /run/dbus /run/systemd/resolve /run/systemd/private && exec "$@"
"#;

/// What this process sees of `/run`, and what others see of it.
#[test]
fn sockets_of_other_programs_below_run_are_not_there_for_a_confined_process() {
    let Some(_world) = confined_world() else { return };
    let folder = tempfile::tempdir().unwrap();
    let later = folder.path().join("later");
    fs::create_dir(&later).unwrap();
    let log = folder.path().join("log");
    let mut command = std::process::Command::new("unshare");
    command.args(["-m", "--propagation", "shared", "sh", "-c", SHARED_RUN, "sh"]);
    command.args([crate::support::PROGRAM, "run", "--memory", "64M", "--sandbox", "on", "--exit-with-stdin"]);
    command.args(["--status", "/run/outlive/vm.sock"]);
    command.stdin(std::process::Stdio::piped()).stderr(fs::File::create(&log).unwrap());
    let mut child = command.spawn().unwrap();
    let said = || fs::read_to_string(&log).unwrap();
    let seen_by = |pid: u32| {
        let entries = fs::read_dir(format!("/proc/{pid}/root/run")).into_iter().flatten();
        let mut names: Vec<_> = entries.map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    };
    let socket = |pid: u32| format!("/proc/{pid}/root/run/outlive/vm.sock");
    wait_until("the VM runs", || {
        assert!(child.try_wait().unwrap().is_none(), "{}", said());
        fs::exists(socket(child.id())).unwrap_or(false)
    });
    assert_eq!(seen_by(child.id()), ["outlive", "systemd"], "{}", said());
    let systemd = fs::read_dir(format!("/proc/{}/root/run/systemd", child.id())).unwrap();
    assert_eq!(systemd.count(), 1, "its resolver");
    // The steward is where the process was started.
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    let steward: u32 = children.split_whitespace().next().unwrap().parse().unwrap();
    assert_eq!(seen_by(steward), ["dbus", "outlive", "systemd"]);
    let asked = std::process::Command::new(crate::support::PROGRAM)
        .args(["status", "--json", "--socket", &socket(steward)])
        .output()
        .unwrap();
    let [status] = serde_json::from_slice::<[Status; 1]>(&asked.stdout).unwrap();
    assert!(status.sandbox);
    // What the host mounts later is there.
    let inside = later.join("there");
    let mounts = format!("mount -t tmpfs none {0} && touch {1}", later.display(), inside.display());
    let mounted = std::process::Command::new("nsenter")
        .args(["-m", "-t", &steward.to_string(), "sh", "-c", &mounts])
        .status()
        .unwrap();
    assert!(mounted.success());
    assert!(fs::exists(format!("/proc/{}/root{}", child.id(), inside.display())).unwrap());
    drop(child.stdin.take());
    child.wait().unwrap();
}

/// Gives a user a folder with everything in it.
fn give(path: &std::path::Path, user: &nix::unistd::User) {
    nix::unistd::chown(path, Some(user.uid), Some(user.gid)).unwrap();
    for entry in fs::read_dir(path).into_iter().flatten() {
        let path = entry.unwrap().path();
        nix::unistd::chown(&path, Some(user.uid), Some(user.gid)).unwrap();
        if path.is_dir() {
            give(&path, user);
        }
    }
}
