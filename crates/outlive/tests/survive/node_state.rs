//! What a node notes down, and a process of a VM that has its things beside it; also one of a user without rights, as
//! docs/sandbox.md recommends it.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::libc::{O_CREAT, O_WRONLY};
use nix::unistd::{Pid, User, chown};
use serde_json::Value;

use crate::sandbox::confined_world;
use crate::support::{Held, PROGRAM, has_kvm, wait_until};

/// An image in the directory where a node notes things down, and what that node says to the process.
fn beside_a_node(folder: &Path) -> (PathBuf, PathBuf) {
    let (image, state) = (folder.join("web.img"), folder.join("node"));
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    for place in ["vms", "locks", "events/web"] {
        fs::create_dir_all(state.join(place)).unwrap();
    }
    fs::write(state.join("vms/db.json"), "of another VM").unwrap();
    (image, state)
}

/// Where nothing can be hidden. Needs no KVM.
#[test]
fn an_image_beside_what_a_node_notes_down_is_refused_where_that_cannot_be_hidden() {
    let folder = tempfile::tempdir().unwrap();
    let (image, state) = beside_a_node(folder.path());
    let run = |disk: &Path| {
        let output = Command::new("unshare")
            .args(["-m", "--propagation", "private", PROGRAM, "run", "--memory", "64M"])
            .args(["--sandbox", "on", "--exit-with-stdin", "--disk", &format!("path={}", disk.display())])
            .arg("--status")
            .arg(folder.path().join("run/vm.sock"))
            .env("OUTLIVE_NODE_STATE", &state)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = run(&image);
    if said.contains("unshare:") {
        return println!("skipped: no mount namespaces");
    }
    let is_said = |line: &&str| line.contains("in a directory of their own") && line.contains("make-rshared");
    assert!(code == Some(2) && said.lines().filter(is_said).count() == 1, "{said}");
    let own = folder.path().join("web");
    fs::create_dir(&own).unwrap();
    fs::rename(&image, own.join("web.img")).unwrap();
    let (_, said) = run(&own.join("web.img"));
    assert!(!said.contains("notes down"), "{said}");
}

/// On a host whose mounts are shared, as with systemd: an image stays where it was before there was a node.
#[test]
fn what_a_node_notes_down_is_not_there_for_a_confined_process() {
    let Some(_world) = confined_world() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (image, state) = beside_a_node(folder.path());
    let log = folder.path().join("log");
    let mut command = Command::new("unshare");
    command.args(["-m", "--propagation", "shared", PROGRAM, "run", "--memory", "64M"]);
    command.args(["--sandbox", "on", "--exit-with-stdin", "--disk", &format!("path={}", image.display())]);
    command.arg("--status").arg(folder.path().join("run/vm.sock"));
    command.arg("--events").arg(state.join("events/web/events")).args(["--events-max", "1M"]);
    command.env("OUTLIVE_NODE_STATE", &state);
    command.stdin(Stdio::piped()).stderr(File::create(&log).unwrap());
    let mut child = command.spawn().unwrap();
    let said = || fs::read_to_string(&log).unwrap();
    wait_until("the VM runs", || {
        assert!(child.try_wait().unwrap().is_none(), "{}", said());
        fs::read_to_string(state.join("events/web/events")).is_ok_and(|it| it.contains("started"))
    });
    let main = Pid::from_raw(child.id() as i32);
    let open = |path: &Path, flags| {
        let mut answer = None;
        wait_until("the thread is in a system call", || {
            answer = Held::child(main).and_then(|held| held.open(path.to_str().unwrap(), flags));
            answer.is_some()
        });
        answer.unwrap()
    };
    let errno = |it: Errno| -(it as i64);
    assert_eq!(open(&state.join("vms/db.json"), O_WRONLY), errno(Errno::ENOENT));
    assert_eq!(open(&state.join("vms.json"), O_WRONLY | O_CREAT), errno(Errno::EROFS));
    assert!(open(&state.join("events/web/events"), O_WRONLY) >= 0);
    assert!(open(&folder.path().join("web.img"), O_WRONLY) >= 0);
    drop(child.stdin.take());
    child.wait().unwrap();
    assert_eq!(fs::read_to_string(state.join("vms/db.json")).unwrap(), "of another VM");
}

/// A `/dev/kvm` that every user may use, around the arguments.
const OWN_KVM: &str = r#"
if [ -e /dev/kvm ]; then
    mount -t tmpfs none /run && mknod -m 666 /run/kvm c 10 232 && mount --bind /run/kvm /dev/kvm || exit
fi
exec "$@"
"#;

/// The VM runs, and its events, which only the node and this user see, are where they should be. Without KVM its process
/// comes as far as that.
#[test]
fn a_vm_of_a_user_without_rights_starts_under_a_node() {
    let folder = tempfile::tempdir().unwrap();
    let nobody = User::from_name("nobody").unwrap().expect("nobody is a user");
    let at = |name: &str| folder.path().join(name);
    let run = at("run");
    fs::create_dir(&run).unwrap();
    if chown(&run, Some(nobody.uid), Some(nobody.gid)).is_err() {
        return println!("skipped: not root");
    }
    fs::set_permissions(folder.path(), Permissions::from_mode(0o711)).unwrap();
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", OWN_KVM, "sh", PROGRAM, "node", "run", "--exit-with-stdin"]);
    for (option, what) in
        [("--vms", "vms"), ("--state", "state"), ("--run", "run"), ("--logs", "logs"), ("--socket", "api")]
    {
        command.arg(option).arg(at(what));
    }
    let log = File::create(at("log")).unwrap();
    let mut node = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
    let ask = |words: &[&str]| {
        let output = Command::new(PROGRAM).args(words).arg("--socket").arg(at("api")).output().unwrap();
        (output.status.code(), output.stdout, String::from_utf8(output.stderr).unwrap())
    };
    wait_until("the node answers", || ask(&["node", "status"]).0 == Some(0));
    let definition = at("web.toml");
    fs::write(&definition, "memory = '64M'\nip = '10.77.0.9/24'\nuser = 'nobody'\n").unwrap();
    assert_eq!(ask(&["vm", "define", "web", definition.to_str().unwrap()]).0, Some(0));
    let (code, _, said) = ask(&["vm", "start", "web"]);
    let vm_log = || fs::read_to_string(at("logs/web.log")).unwrap_or_default();
    assert!(
        !said.contains("belongs to the user") && !vm_log().contains("belongs to the user"),
        "{said}\n{}",
        vm_log()
    );
    let owner = |path: &Path| std::os::unix::fs::MetadataExt::uid(&fs::metadata(path).unwrap());
    assert_eq!(owner(&at("state/events/web")), nobody.uid.as_raw());
    if has_kvm() {
        assert_eq!(code, Some(0), "{said}\n{}", vm_log());
        let (_, shown, _) = ask(&["vm", "show", "web", "--json"]);
        assert_eq!(serde_json::from_slice::<Value>(&shown).unwrap()["state"], "running");
        assert_eq!(owner(&at("state/events/web/events")), nobody.uid.as_raw());
    }
    ask(&["vm", "stop", "web", "--now"]);
    drop(node.stdin.take());
    node.wait().unwrap();
}
