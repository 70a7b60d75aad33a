//! A person starts the program wrongly and gets one line that says what to do, exit code 2, and nothing left
//! behind.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, mknod};
use outlive::arbiter::FileArbiter;
use outlive::keys::{self, Grant, Order};
use outlive::network::{EnterError, Namespace, Netlink};

use crate::support::{PROGRAM, has_kvm};

/// A place to fail in: a network and a folder of its own.
struct Stage {
    network: Namespace,
    dir: tempfile::TempDir,
    /// The keys and their CA: what is beside an image is the VM's.
    safe: tempfile::TempDir,
}

impl Stage {
    fn new() -> Option<Stage> {
        let network = match Namespace::new() {
            Ok(network) => network,
            Err(EnterError::Permission) => {
                println!("skipped: network namespaces need root");
                return None;
            }
            Err(other) => panic!("{other}"),
        };
        let dir = tempfile::Builder::new().prefix("outlive-errors-").tempdir().unwrap();
        let arbiter = dir.path().join("arbiter");
        fs::create_dir(&arbiter).unwrap();
        FileArbiter::init(&arbiter).unwrap();
        let safe = tempfile::Builder::new().prefix("outlive-keys-").tempdir().unwrap();
        let stage = Stage { network, dir, safe };
        // Long enough to need no warning.
        let life = Duration::from_secs(90 * 24 * 3600);
        keys::init(stage.keys().as_ref(), &Order { host: "a".into(), grant: Grant::ALL, life }).unwrap();
        Some(stage)
    }

    fn keys(&self) -> String {
        self.safe.path().join("keys").display().to_string()
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// `outlive` with these arguments; `ARBITER` is replaced by a directory that exists.
    fn command(&self, line: &str) -> Command {
        let arbiter = format!("file:{}", self.path("arbiter"));
        let mut command = Command::new(PROGRAM);
        command.args(line.split_whitespace().map(|word| word.replace("ARBITER", &arbiter)));
        if ["--standby", "--listen"].iter().any(|it| line.contains(it))
            && !line.contains("--insecure")
            && !line.contains("--keys")
        {
            command.args(["--keys", &self.keys()]);
        }
        command
    }

    /// Runs a command that must fail at once, and checks every promise about that. The line on standard error
    /// must contain all of `words`.
    fn refuses(&self, line: &str, words: &[&str]) {
        self.refuses_in(line, words, |command| command.output());
    }

    fn refuses_in(
        &self,
        line: &str,
        words: &[&str],
        run: impl FnOnce(&mut Command) -> std::io::Result<std::process::Output> + Send,
    ) {
        let before = (self.interfaces(), self.files());
        let mut command = self.command(line);
        command.stdin(Stdio::null());
        let output = self.network.run(|| run(&mut command)).unwrap().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "outlive {line}: {error}");
        assert!(output.stdout.is_empty(), "outlive {line} writes to standard output");
        assert_eq!(error.lines().count(), 1, "outlive {line} says more or less than one line:\n{error}");
        let missing: Vec<_> = words.iter().filter(|word| !error.contains(**word)).collect();
        assert!(missing.is_empty(), "outlive {line}: {missing:?} is not in: {error}");
        assert_eq!((self.interfaces(), self.files()), before, "outlive {line} leaves something behind");
    }

    fn interfaces(&self) -> Vec<String> {
        let links = self.network.run(|| Netlink::open().unwrap().links().unwrap()).unwrap();
        links.into_iter().map(|link| link.name).collect()
    }

    /// Every file of the folder, with its length.
    fn files(&self) -> Vec<(String, u64)> {
        fn walk(folder: &Path, found: &mut Vec<(String, u64)>) {
            for entry in fs::read_dir(folder).unwrap().flatten() {
                if entry.path().is_dir() {
                    walk(&entry.path(), found);
                } else {
                    found.push((entry.path().display().to_string(), entry.metadata().unwrap().len()));
                }
            }
        }
        let mut found = Vec::new();
        walk(self.dir.path(), &mut found);
        found.sort();
        found
    }
}

#[test]
fn links_without_keys_are_refused() {
    let Some(stage) = Stage::new() else { return };
    let standby = "standby --arbiter ARBITER --listen";
    stage.refuses(&format!("{standby} 0.0.0.0:7000 --insecure"), &["0.0.0.0:7000", "outlive keys init"]);
    let none = stage.path("none");
    stage.refuses(&format!("{standby} 127.0.0.1:7000 --keys {none}"), &["has no keys", "outlive keys init"]);
    let keys = stage.keys();
    fs::set_permissions(format!("{keys}/host.pem"), fs::Permissions::from_mode(0o644)).unwrap();
    stage.refuses(&format!("{standby} 127.0.0.1:7000 --keys {keys}"), &["mode 0644", "chmod 600"]);
    stage.refuses(&format!("keys init {keys}"), &["is there already", "outlive keys rotate"]);
    stage.refuses(&format!("keys issue --host b --keys {keys}-b"), &["ca.pem is not here"]);
    fs::set_permissions(format!("{keys}/host.pem"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(format!("{keys}/revoked")).unwrap();
    stage.refuses(&format!("{standby} 127.0.0.1:7000 --keys {keys}"), &["revoked is missing", "touch "]);
}

#[test]
fn wrong_options() {
    let Some(stage) = Stage::new() else { return };
    for (line, words) in [
        ("run --colour red", &["--colour", "--help"][..]),
        ("fly", &["fly", "--help"]),
        ("run --memory lots", &["lots", "256M"]),
        ("run --memory -1", &["-1"]),
        ("run --vcpus 0", &["--vcpus", "from 1 to 32"]),
        ("run --vcpus 33", &["--vcpus", "from 1 to 32"]),
        ("run --interval 1us", &["--interval", "give 100us"]),
        ("run --interval soon", &["soon", "1ms"]),
        ("run --dead-after 1ms", &["20ms to 60s"]),
        ("run --max-dirty 1", &["--max-dirty", "16..=262144"]),
        ("run --tracker magic", &["magic", "ring", "bitmap"]),
        ("run --ip 10.0.0.1", &["10.77.0.2/24"]),
        ("run --ip 10.0.0.1/33", &["10.77.0.2/24"]),
        ("run --net colour=red", &["tap=NAME"]),
        ("run --net bridge=br0", &["tap=NAME"]),
        ("run --net tap=sixteen-letters-", &["1 to 15 characters"]),
        ("run --net tap=t0,mac=01:00:00:00:00:01", &["multicast"]),
        ("run --net tap=t0,mtu=1000", &["MTU from 1280 to 65521"]),
        ("run --net tap=t0,mtu=9k", &["MTU from 1280 to 65521"]),
        ("run --net tap=t0,bridge=br0,vlan=4095", &["VLAN from 1 to 4094"]),
        ("run --net tap=t0,vlan=7", &["give bridge=NAME"]),
        ("run --max-pause 1ms", &["give 5ms to 10s"]),
        ("standby --net tap=t0,mtu=9000", &["belong to outlive run"]),
        ("run --standby host:7000", &["--arbiter"]),
        ("run --arbiter /srv/arbiter", &["file:DIR"]),
        ("run --arbiter file:/nowhere/at/all", &["/nowhere/at/all", "create it"]),
        ("standby --listen 127.0.0.1:0", &["--arbiter"]),
        ("standby --arbiter ARBITER", &["--listen"]),
        ("demo --kills many", &["many"]),
    ] {
        stage.refuses(line, words);
    }
}

#[test]
fn a_machine_that_lacks_something() {
    if !has_kvm() {
        return;
    }
    let Some(stage) = Stage::new() else { return };
    // A directory that is no arbiter, like the mount point of a file server that is down.
    let bare = stage.path("bare");
    fs::create_dir(&bare).unwrap();
    let init = format!("outlive arbiter init file:{bare}");
    stage.refuses(&format!("run --arbiter file:{bare}"), &["is not an arbiter", "mount", &init]);
    stage.refuses(
        &format!("standby --listen 127.0.0.1:0 --arbiter file:{bare}"),
        &["is not an arbiter", &init],
    );
    assert!(fs::read_dir(&bare).unwrap().next().is_none(), "nothing may be written there");
    // A file instead of the arbiter's directory, and a directory that belongs to somebody else.
    fs::write(stage.path("file"), "").unwrap();
    stage.refuses(&format!("run --arbiter file:{}", stage.path("file")), &["not a directory"]);
    stage.refuses(
        "standby --listen 127.0.0.1:0 --arbiter file:/nowhere/at/all",
        &["/nowhere/at/all", "create it"],
    );
    stage.refuses("run --memory 4096G", &["available", "--memory"]);
    stage.refuses("demo --memory 4096G", &["4096G", "--memory"]);
    stage.refuses(&format!("run --events {}/no/where", stage.path("arbiter")), &["--events"]);
    stage.refuses("run --net tap=t0,bridge=br9", &["br9"]);
    stage.refuses("standby --listen 127.0.0.1:0 --arbiter ARBITER --net tap=t0,bridge=br9", &["br9"]);
    stage.refuses("run --net tap=lo", &["lo"]);
    stage.refuses("standby --listen 127.0.0.1:0 --arbiter ARBITER --net tap=lo", &["lo"]);
    stage.refuses("standby --listen 192.0.2.1:7000 --arbiter ARBITER", &["192.0.2.1", "--listen"]);
    stage.refuses("standby --listen nonsense --arbiter ARBITER", &["nonsense", "--listen"]);
    let taken = stage.network.run(|| TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
    let addr = taken.local_addr().unwrap();
    let line = format!("standby --listen {addr} --arbiter ARBITER --net tap=t0");
    stage.refuses(&line, &[&addr.to_string(), "in use", "--listen"]);
}

/// A tap that another VM uses.
#[test]
fn a_tap_that_is_busy() {
    if !has_kvm() {
        return;
    }
    let Some(stage) = Stage::new() else { return };
    let mut owner = stage.command("run --memory 64M --net tap=t0 --exit-with-stdin");
    owner.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut owner = stage.network.spawn(&mut owner).unwrap();
    crate::support::wait_until("the first VM has its tap", || stage.interfaces().contains(&"t0".into()));
    stage.refuses("run --memory 64M --net tap=t0", &["t0", "another"]);
    stage.refuses("standby --listen 127.0.0.1:0 --arbiter ARBITER --net tap=t0", &["t0", "another"]);
    drop(owner.stdin.take());
    assert_eq!(owner.wait().unwrap().code(), Some(0), "it ends with its standard input");
    assert_eq!(stage.interfaces(), ["lo"], "its tap goes with it");
}

/// Mounts for this thread and the processes that it starts; the rest of the system does not see them.
fn private_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
}

/// Mounts `source` over `target`.
fn cover(source: &Path, target: &Path) {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), target, None::<&str>, flags, None::<&str>).unwrap();
}

/// A `/dev` for this thread, put together in `folder`, in which one device is missing.
fn lose_device(missing: &str, folder: &Path) {
    private_mounts();
    fs::create_dir(folder.join("net")).unwrap();
    for device in ["null", "urandom", "kvm", "net/tun"].into_iter().filter(|device| *device != missing) {
        fs::write(folder.join(device), "").unwrap();
        cover(&Path::new("/dev").join(device), &folder.join(device));
    }
    cover(folder, Path::new("/dev"));
}

#[test]
fn no_kvm_and_no_tun() {
    if !has_kvm() {
        return;
    }
    let Some(stage) = Stage::new() else { return };
    let run = "run --memory 64M --net tap=t0";
    let standby = "standby --listen 127.0.0.1:0 --arbiter ARBITER --net tap=t0";
    for (device, remedy, name) in [("kvm", "kvm_intel", "KVM"), ("net/tun", "modprobe tun", "tap")] {
        for line in [run, standby, "demo"] {
            let folder = tempfile::tempdir().unwrap();
            let path = format!("/dev/{device}");
            stage.refuses_in(line, &[&path, remedy], |command| {
                lose_device(device, folder.path());
                command.output()
            });
        }
        // A file that is not the expected device.
        for line in [run, standby] {
            stage.refuses_in(line, &[name], |command| {
                private_mounts();
                cover(Path::new("/dev/null"), &Path::new("/dev").join(device));
                command.output()
            });
        }
    }
}

/// User 65534, who may do nothing at all.
#[test]
fn no_permission() {
    if !has_kvm() {
        return;
    }
    let Some(stage) = Stage::new() else { return };
    // The program may be in a directory that others cannot enter, so it is copied to a place that everybody
    // can.
    let public = tempfile::Builder::new().prefix("outlive-public-").tempdir().unwrap();
    let everybody = |path: &Path, mode| {
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    };
    everybody(public.path(), 0o755);
    let program = public.path().join("outlive");
    fs::copy(PROGRAM, &program).unwrap();
    let nobody = |command: &mut Command| {
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        Command::new(&program).args(arguments).stdin(Stdio::null()).uid(65534).gid(65534).output()
    };
    for line in ["run --memory 64M", "run --memory 64M --net tap=t0", "demo"] {
        stage.refuses_in(line, &["/dev/kvm", "permission", "group"], nobody);
    }
    // Some machines let every user use KVM. Then this user lacks access to the tap or the arbiter.
    everybody(stage.dir.path(), 0o755);
    let open = public.path().join("kvm");
    let device = MetadataExt::rdev(&fs::metadata("/dev/kvm").unwrap());
    mknod(&open, SFlag::S_IFCHR, Mode::empty(), device).unwrap();
    everybody(&open, 0o666);
    for (line, words) in [
        ("run --memory 64M --net tap=t0", ["permission", "/dev/net/tun"]),
        ("run --memory 64M --arbiter ARBITER", ["arbiter", "let this user"]),
    ] {
        stage.refuses_in(line, &words, |command| {
            private_mounts();
            cover(&open, Path::new("/dev/kvm"));
            nobody(command)
        });
    }
}
