//! A node on each host, with VMs that both define.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{PROGRAM, Side, World, wait_until};

/// The size of a VM's image.
const SIZE: u64 = 1 << 20;

/// The nodes of both hosts. Dropping it ends them, and the processes of the VMs.
pub(crate) struct Nodes<'a> {
    world: &'a World,
    vms: Vec<String>,
    nodes: [Option<Child>; 2],
}

impl<'a> Nodes<'a> {
    /// Two nodes; host a has the image of each VM, and host b an empty one.
    pub(crate) fn start(world: &'a World, vms: &[&str]) -> Self {
        let vms: Vec<_> = vms.iter().map(ToString::to_string).collect();
        let mut nodes = Self { world, vms, nodes: [None, None] };
        for vm in &nodes.vms {
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

    /// A file of a node.
    pub(crate) fn place(&self, side: Side, what: &str) -> PathBuf {
        self.world.dir().join(format!("node-{}", side.letter())).join(what)
    }

    /// Starts a node, and waits until it answers.
    pub(crate) fn start_one(&mut self, side: Side) {
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
    pub(crate) fn kill(&mut self, side: Side) {
        let mut node = self.nodes[side as usize].take().unwrap();
        node.kill().unwrap();
        node.wait().unwrap();
    }

    /// A command at a node: its exit code, its output and its words.
    pub(crate) fn ask(&self, side: Side, words: &[&str]) -> (Option<i32>, String, String) {
        let mut command = Command::new(PROGRAM);
        let output = command.args(words).arg("--socket").arg(self.place(side, "api")).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    /// The same for one that must succeed. Returns its output.
    pub(crate) fn good(&self, side: Side, words: &[&str]) -> String {
        let (code, output, said) = self.ask(side, words);
        assert_eq!(code, Some(0), "{words:?}: {output}{said}");
        output
    }

    /// A VM, as a node tells it.
    pub(crate) fn show(&self, side: Side, vm: &str) -> Value {
        serde_json::from_str(&self.good(side, &["vm", "show", vm, "--json"])).unwrap()
    }

    /// Waits until a VM is so.
    pub(crate) fn wait(&self, side: Side, vm: &str, state: &str, protected: bool) -> Value {
        let is = |it: &Value| it["state"] == state && it["protected"] == protected;
        wait_until(&format!("{vm} is {state} on host {side:?}"), || is(&self.show(side, vm)));
        self.show(side, vm)
    }

    /// Defines all VMs on both hosts and starts them; they run on host a then.
    pub(crate) fn start_vms(&self) {
        for (number, vm) in self.vms.iter().enumerate() {
            let file = self.world.dir().join(format!("{vm}.toml"));
            fs::write(&file, self.definition(number, vm)).unwrap();
            for side in Side::BOTH {
                self.good(side, &["vm", "define", vm, file.to_str().unwrap()]);
            }
        }
        // Host b has an empty image, so it waits, whichever is started first.
        for side in [Side::B, Side::A] {
            self.vms.iter().for_each(|vm| drop(self.good(side, &["vm", "start", vm])));
        }
    }

    /// The process of a node.
    pub(crate) fn pid(&self, side: Side) -> Pid {
        Pid::from_raw(self.nodes[side as usize].as_ref().expect("it runs").id() as i32)
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
            for vm in &self.vms {
                let record = fs::read(self.place(side, &format!("state/vms/{vm}.json"))).unwrap_or_default();
                let record: Value = serde_json::from_slice(&record).unwrap_or_default();
                let Some(pid) = record["process"]["pid"].as_i64() else { continue };
                let words = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                if words.contains(self.world.dir().to_str().unwrap()) {
                    let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
                }
            }
            if std::thread::panicking() {
                let of_vms = self.vms.iter().map(|vm| format!("logs/{vm}.log"));
                for log in of_vms.chain(["log".to_owned()]) {
                    let said = fs::read_to_string(self.place(side, &log)).unwrap_or_default();
                    eprintln!("{log} of host {side:?}:\n{said}");
                }
            }
        }
    }
}

/// The process of a VM that a node tells of.
pub(crate) fn pid(vm: &Value) -> Pid {
    Pid::from_raw(vm["pid"].as_i64().expect("it has a process") as i32)
}
