//! What unit tests of several files need: a program with a few options, and one that only says that it has a VM.

pub(crate) mod life;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use clap::{Arg, ArgAction, ArgMatches, Command};

use crate::node::{Node, Places};
use crate::program::{Program, Remark, Sense};
use crate::view::View;

/// How long anything may take; far longer than on a host that is not overloaded.
const PATIENCE: Duration = Duration::from_secs(120);
/// What the fake check says.
const CHECK: &str = r#"{"result":"warning","findings":[{"name":"memory","state":"warning","found":"little","remedy":"free some"}],"facts":{"host":"hosta"}}"#;
/// Where the fake process finds its arguments.
const ARGUMENTS: &str = "OUTLIVE_FAKE_ARGUMENTS";

/// A program with options of every kind, like `outlive run`.
pub(crate) fn program() -> Program {
    program_at("/bin/false")
}

fn program_at(path: impl Into<PathBuf>) -> Program {
    let value = |name: &'static str| Arg::new(name).long(name);
    let list = |name: &'static str| value(name).action(ArgAction::Append);
    let flag = |name: &'static str| value(name).action(ArgAction::SetTrue);
    let values = [
        "name",
        "memory",
        "kernel",
        "net",
        "arbiter",
        "listen",
        "console",
        "events",
        "events-max",
        "events-keep",
        "status",
        "record",
    ];
    let run = Command::new("run")
        .args(values.map(value))
        .arg(value("vcpus").value_parser(clap::value_parser!(u8).range(1..=32)))
        .args(["disk", "standby"].map(list))
        .args(["insecure", "lock-memory", "accept-replica"].map(flag))
        .arg(flag("or-standby").requires("listen").requires("arbiter").requires("disk"))
        .arg(flag("exit-with-stdin").hide(true));
    Program::new(path.into(), run).judged_by(judge)
}

/// A kernel may come later.
fn judge(options: &ArgMatches) -> Sense {
    let kernel = options.get_one::<String>("kernel").filter(|it| !Path::new(it).exists());
    // As the program does, which reads what is named.
    if let Some(kernel) = options.get_one::<String>("kernel").filter(|it| it.ends_with("hangs")) {
        let _ = fs::File::open(kernel);
    }
    let warnings =
        kernel.map(|it| Remark::new("kernel", format!("there is no file {it}"))).into_iter().collect();
    let wrong = options.get_one::<String>("memory").filter(|it| *it == "256");
    Sense { wrong: wrong.map(|_| Remark::new("memory", "256 bytes are too little: give more")), warnings }
}

/// A host for a node, with a program that tells a status and runs nothing. What it tells is in files, which the test
/// changes. Its processes are killed when this is dropped.
pub(crate) struct World {
    pub(crate) folder: tempfile::TempDir,
}

impl World {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("outlive");
        let this = env::current_exe().unwrap();
        let script = format!(
            "#!/bin/sh\ncd {}\nif [ \"$1\" = hand-over ]; then\n  vm=$(basename \"$3\" .sock)\n  if [ -e $vm.stays ]; \
             then echo 'outlive: refused: the standby is gone' >&2; exit 2; fi\n  echo standby > $vm.role\n  echo 'the \
             standby has the VM'\n  exit 0\nfi\nif [ \"$1\" = check ]; then echo '{CHECK}'; exit 2; fi\nexport {ARGUMENTS}=\"$*\"\nexec {} --exact testing::fake_process \
             --nocapture\n",
            folder.path().display(),
            this.display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self { folder }
    }

    pub(crate) fn places(&self) -> Places {
        let at = |name: &str| self.folder.path().join(name);
        Places { definitions: at("vms"), state: at("state"), run: at("run"), logs: at("logs") }
    }

    /// A node. It ends when it is dropped, and its processes do not.
    pub(crate) fn node(&self) -> Arc<Node> {
        let began = Instant::now();
        loop {
            // The last node's threads let go of it a little later.
            match Node::start("hosta", self.places(), program_at(self.folder.path().join("outlive"))) {
                Ok(node) => return node,
                Err(why) => assert!(began.elapsed() < PATIENCE, "{why}"),
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What the fake process of a VM is told: `role` (primary, standby), `turns` (the role after the next answer), `bare`
    /// (unprotected), `says` (an object with more of its status), `figures` (what it has counted), `why`, `last` (its loss would be the VM's), `mute` (no answer), `exit` (a code), `refuses` (its last words), or what the fake hand-over is
    /// told: `stays`.
    pub(crate) fn tell(&self, vm: &str, what: &str, text: &str) {
        let file = self.folder.path().join(format!("{vm}.{what}"));
        let new = self.folder.path().join(format!("{vm}.{what}.new"));
        fs::write(&new, text).unwrap();
        fs::rename(new, file).unwrap();
    }

    pub(crate) fn untell(&self, vm: &str, what: &str) {
        fs::remove_file(self.folder.path().join(format!("{vm}.{what}"))).unwrap();
    }

    /// How many processes of a VM have been started.
    pub(crate) fn starts(&self, vm: &str) -> usize {
        let log = fs::read_to_string(self.places().log_of(vm)).unwrap_or_default();
        log.matches("the fake process begins").count()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Each looks for this folder.
        let _ = fs::remove_dir_all(self.folder.path());
    }
}

/// Waits until a VM is as it should be.
pub(crate) fn wait(node: &Node, vm: &str, what: impl Fn(&View) -> bool) -> View {
    let began = Instant::now();
    loop {
        let view = node.get(vm).unwrap();
        if what(&view) {
            return view;
        }
        assert!(began.elapsed() < PATIENCE, "{view:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// No test: the fake process itself, if a script of [`World`] runs this.
#[test]
fn fake_process() {
    let Ok(arguments) = env::var(ARGUMENTS) else { return };
    let value =
        |name: &str| arguments.split(' ').find_map(|it| it.strip_prefix(name)?.strip_prefix('=')).unwrap();
    eprintln!("the fake process begins");
    let vm = value("--name");
    let told = |what: &str| fs::read_to_string(format!("{vm}.{what}")).ok().map(|it| it.trim().to_owned());
    if let Some(words) = told("refuses") {
        // As one that does not even have events.
        eprintln!("{words}\nINFO it ends");
        std::process::exit(2);
    }
    let (socket, events) = (PathBuf::from(value("--status")), PathBuf::from(value("--events")));
    let listen = |path: &Path| {
        let _ = fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    };
    let metrics = listen(&socket.with_extension("sock.metrics"));
    let listener = listen(&socket);
    // The node has started it in `/`.
    env::set_current_dir(Path::new(&socket).parent().unwrap().parent().unwrap()).unwrap();
    while socket.exists() {
        if let Some(code) = told("exit") {
            let _ = fs::remove_file(format!("{vm}.exit"));
            let pid = std::process::id();
            let word =
                format!("{{\"event\":\"ended\",\"reason\":\"told to\",\"code\":{code},\"pid\":{pid}}}\n");
            fs::write(events, word).unwrap();
            std::process::exit(code.parse().unwrap());
        }
        if let Ok((mut client, _)) = metrics.accept() {
            let _ = client.write_all(told("figures").unwrap_or_default().as_bytes());
        }
        if let Ok((mut client, _)) = listener.accept() {
            if told("mute").is_some() {
                continue;
            }
            let role = told("role").unwrap_or_else(|| "primary".into());
            if told("turns").is_some() {
                fs::rename(format!("{vm}.turns"), format!("{vm}.role")).unwrap();
            }
            let protected = told("bare").is_none();
            let mut status = serde_json::json!({ "vm": vm, "role": role, "protected": protected, "why": told("why"),
                "loss_of_this_host": { "survived": told("last").is_none() } });
            let more: serde_json::Map<_, _> =
                serde_json::from_str(&told("says").unwrap_or_else(|| "{}".into())).unwrap();
            status.as_object_mut().unwrap().extend(more);
            let _ = client.write_all(status.to_string().as_bytes());
        }
        thread::sleep(Duration::from_millis(2));
    }
    std::process::exit(9);
}
