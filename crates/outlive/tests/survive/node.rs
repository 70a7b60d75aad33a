//! Two hosts with a node each: they keep two VMs, and are themselves killed, drained and started anew.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::{PROGRAM, Side, Witnesses, World, wait_until};

const VMS: [&str; 2] = ["web", "db"];
const SIZE: u64 = 1 << 20;

/// The nodes of both hosts. Dropping it ends them, and the processes of the VMs.
struct Nodes<'a> {
    world: &'a World,
    nodes: [Option<Child>; 2],
}

impl<'a> Nodes<'a> {
    /// Two nodes; host a has the image of each VM, and host b an empty one.
    fn start(world: &'a World) -> Self {
        let mut nodes = Self { world, nodes: [None, None] };
        for vm in VMS {
            for side in Side::BOTH {
                File::create(nodes.image(side, vm)).unwrap().set_len(SIZE).unwrap();
            }
            let image = nodes.image(Side::A, vm);
            File::options().write(true).open(&image).unwrap().write_all_at(b"a server", 0).unwrap();
            let accepted =
                Command::new(PROGRAM).args(["image", "accept", "--yes"]).arg(image).output().unwrap();
            assert!(accepted.status.success());
        }
        Side::BOTH.into_iter().for_each(|side| nodes.start_one(side));
        nodes
    }

    fn image(&self, side: Side, vm: &str) -> PathBuf {
        // The state of the nodes is in no directory of a VM.
        let folder = self.world.dir().join(format!("{vm}-{}", side.letter()));
        fs::create_dir_all(&folder).unwrap();
        folder.join("disk.img")
    }

    fn place(&self, side: Side, what: &str) -> PathBuf {
        self.world.dir().join(format!("node-{}", side.letter())).join(what)
    }

    fn start_one(&mut self, side: Side) {
        let mut command = Command::new(PROGRAM);
        command.args(["node", "run", "--exit-with-stdin", "--host", &format!("host{}", side.letter())]);
        for (option, what) in [
            ("--vms", "vms"),
            ("--state", "state"),
            ("--run", "run"),
            ("--logs", "logs"),
            ("--socket", "api"),
        ] {
            command.arg(option).arg(self.place(side, what));
        }
        let folder = self.place(side, "");
        fs::create_dir_all(&folder).unwrap();
        let log = File::options().create(true).append(true).open(folder.join("log")).unwrap();
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        self.nodes[side as usize] = Some(self.world.spawn_on(side, &mut command));
        wait_until("the node answers", || self.ask(side, &["node", "status"]).0 == Some(0));
    }

    /// SIGKILL.
    fn kill(&mut self, side: Side) {
        let mut node = self.nodes[side as usize].take().unwrap();
        node.kill().unwrap();
        node.wait().unwrap();
    }

    /// A command at a node: its exit code, its output and its words.
    fn ask(&self, side: Side, words: &[&str]) -> (Option<i32>, String, String) {
        let mut command = Command::new(PROGRAM);
        let output = command.args(words).arg("--socket").arg(self.place(side, "api")).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    /// The same for one that must succeed. Returns its output.
    fn good(&self, side: Side, words: &[&str]) -> String {
        let (code, output, said) = self.ask(side, words);
        assert_eq!(code, Some(0), "{words:?}: {output}{said}");
        output
    }

    fn show(&self, side: Side, vm: &str) -> Value {
        serde_json::from_str(&self.good(side, &["vm", "show", vm, "--json"])).unwrap()
    }

    fn wait(&self, side: Side, vm: &str, state: &str, protected: bool) -> Value {
        let is = |it: &Value| it["state"] == state && it["protected"] == protected;
        wait_until(&format!("{vm} is {state} on host {side:?}"), || is(&self.show(side, vm)));
        self.show(side, vm)
    }

    /// One definition for both hosts.
    fn definition(&self, number: usize, vm: &str) -> String {
        let port = 7000 + number;
        let mut text = format!(
            "memory = '64M'\nip = '10.77.0.{}/24'\nnet = 'tap=vm{number},bridge=br0'\narbiter = '{}'\n",
            number + 2,
            self.world.asked()
        );
        for side in Side::BOTH {
            let (here, there) = (side.link_ip(), side.other().link_ip());
            text += &format!(
                "[host.host{}]\nlisten = '{here}:{port}'\nstandby = ['{there}:{port}']\nkeys = '{}'\ndisk = \
                 ['path={}']\n",
                side.letter(),
                self.world.keys(side).display(),
                self.image(side, vm).display()
            );
        }
        text
    }
}

impl Drop for Nodes<'_> {
    fn drop(&mut self) {
        for side in Side::BOTH {
            if let Some(mut node) = self.nodes[side as usize].take() {
                // Both fail only for a child that was already reaped.
                let _ = node.kill();
                let _ = node.wait();
            }
            for vm in VMS {
                let record = fs::read(self.place(side, &format!("state/vms/{vm}.json"))).unwrap_or_default();
                let record: Value = serde_json::from_slice(&record).unwrap_or_default();
                let Some(pid) = record["process"]["pid"].as_i64() else { continue };
                let words = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                if words.contains(self.world.dir().to_str().unwrap()) {
                    let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
                }
            }
            if std::thread::panicking() {
                for log in ["log", "logs/web.log", "logs/db.log"] {
                    let said = fs::read_to_string(self.place(side, log)).unwrap_or_default();
                    eprintln!("{log} of host {side:?}:\n{said}");
                }
            }
        }
    }
}

fn pid(vm: &Value) -> Pid {
    Pid::from_raw(vm["pid"].as_i64().expect("it has a process") as i32)
}

#[test]
fn two_nodes_keep_their_vms_and_no_guest_notices_what_becomes_of_a_node() {
    let Some(world) = World::new() else { return };
    let mut nodes = Nodes::start(&world);
    for (number, vm) in VMS.into_iter().enumerate() {
        let file = world.dir().join(format!("{vm}.toml"));
        fs::write(&file, nodes.definition(number, vm)).unwrap();
        for side in Side::BOTH {
            nodes.good(side, &["vm", "define", vm, file.to_str().unwrap()]);
        }
    }
    // Host b has an empty image, so it waits, whichever is started first.
    for side in [Side::B, Side::A] {
        VMS.iter().for_each(|vm| drop(nodes.good(side, &["vm", "start", vm])));
    }
    let before = VMS.map(|vm| pid(&nodes.wait(Side::A, vm, "running", true)));
    VMS.iter().for_each(|vm| drop(nodes.wait(Side::B, vm, "standby", true)));
    let (code, _, said) = nodes.ask(Side::B, &["vm", "stop", "web"]);
    assert!(code == Some(1) && said.contains("is its standby"), "{said}");

    // The node of host a is killed and started anew.
    let witnesses = Witnesses::start(&world, 2);
    nodes.kill(Side::A);
    witnesses.hear_all();
    nodes.start_one(Side::A);
    let after = VMS.map(|vm| nodes.wait(Side::A, vm, "running", true));
    assert_eq!(after.each_ref().map(pid), before);
    assert!(after.iter().all(|vm| vm["adopted"] == true && vm["status"]["generation"] == 1), "{after:?}");
    witnesses.hear_all();

    // Host a is emptied.
    let drained: Value = serde_json::from_str(&nodes.good(Side::A, &["node", "drain", "--json"])).unwrap();
    assert_eq!(drained["result"]["moved"].as_array().unwrap().len(), 2, "{drained}");
    let moved = VMS.map(|vm| nodes.wait(Side::B, vm, "running", true));
    VMS.iter().for_each(|vm| drop(nodes.wait(Side::A, vm, "standby", true)));
    witnesses.hear_all();
    let (code, _, said) = nodes.ask(Side::A, &["vm", "start", "web"]);
    assert!(code == Some(1) && said.contains("drained"), "{said}");
    assert!(nodes.good(Side::A, &["node", "undrain"]).contains("active"));

    // The process of one VM is killed: host a has the VM, and node b makes a new standby.
    kill(pid(&moved[0]), Signal::SIGKILL).unwrap();
    nodes.wait(Side::A, "web", "running", true);
    let back = nodes.wait(Side::B, "web", "standby", true);
    assert!(pid(&back) != pid(&moved[0]) && back["last_end"]["signal"] == 9, "{back}");
    assert_eq!(pid(&nodes.show(Side::B, "db")), pid(&moved[1]), "the other VM has nothing to do with it");
    witnesses.hear_all();
    witnesses.finish(&world);

    // The end of a VM is its end on both hosts, and stays so.
    nodes.good(Side::A, &["vm", "stop", "web"]);
    assert_eq!(nodes.show(Side::A, "web")["state"], "stopped");
    let ended = nodes.wait(Side::B, "web", "ended", false);
    assert_eq!((&ended["desired"], &ended["pid"]), (&"stopped".into(), &Value::Null));
    nodes.wait(Side::B, "db", "running", true);
}
