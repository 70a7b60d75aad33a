//! Starts processes on the hosts of a world.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

use outlive::events::Event;

use super::{MEMORY, PROGRAM, Process, Side, VM, World};

/// Readers of a process's output; files by default.
#[derive(Default)]
pub(crate) struct Readers {
    pub(crate) log: Log,
    pub(crate) events: Option<PathBuf>,
}

/// Where standard error goes.
#[derive(Default)]
pub(crate) enum Log {
    #[default]
    File,
    Pipe(OwnedFd),
    /// The process has none.
    Closed,
}

impl World {
    /// `outlive run` on a host, with the other host as its standby.
    pub(crate) fn run(&self, side: Side) -> Process {
        self.run_with(side, &["--standby", &side.other().addr().to_string()])
    }

    /// `outlive run` on a host with these options.
    pub(crate) fn run_with(&self, side: Side, options: &[&str]) -> Process {
        let ip = format!("{VM}/24");
        // The last argument is the built-in guest's.
        let memory = MEMORY.to_string();
        let usual = [("--memory", memory.as_str()), ("--ip", &ip)];
        let is_linux = options.iter().any(|it| ["--kernel", "--boot"].contains(it));
        let usual = if is_linux { &usual[..1] } else { &usual };
        self.start(side, &["run"], options, usual)
    }

    /// `outlive run` on a host without an arbiter, with these options.
    pub(crate) fn run_without_arbiter(&self, side: Side, options: &[&str]) -> Process {
        let ip = format!("{VM}/24");
        let usual = [("--memory", "64M"), ("--ip", &ip), ("--net", "tap=vm0,bridge=br0")];
        self.spawn(side, &["run"], options, &usual)
    }

    /// `outlive standby` on a host; after a takeover it looks for its own standby on the other host.
    pub(crate) fn standby(&self, side: Side) -> Process {
        self.standby_with(side, &["--standby", &side.other().addr().to_string()])
    }

    /// `outlive standby` on a host with these options. It listens when this returns, and ends if it loses the VM.
    pub(crate) fn standby_with(&self, side: Side, options: &[&str]) -> Process {
        self.staying_standby_with(side, &[options, &["--once"]].concat())
    }

    /// `outlive standby` on a host with these options. It listens when this returns, and stays if it loses the VM.
    pub(crate) fn staying_standby_with(&self, side: Side, options: &[&str]) -> Process {
        let mut process = self.start(side, &["standby", "--listen", &side.addr().to_string()], options, &[]);
        process.wait_for("listening", |e| matches!(e, Event::Listening { .. }));
        process
    }

    /// `outlive standby` on a host with options that the program must refuse.
    pub(crate) fn standby_with_failure(&self, side: Side, options: &[&str]) -> Process {
        self.start(side, &["standby", "--listen", &side.addr().to_string()], options, &[])
    }

    /// `outlive run` on a host, with the other host as its standby and with these readers.
    pub(crate) fn run_for(&self, side: Side, readers: Readers) -> Process {
        let (standby, ip) = (side.other().addr().to_string(), format!("{VM}/24"));
        let usual = [("--memory", "64M"), ("--ip", &ip)];
        self.start_for(side, &["run"], &["--standby", &standby], &usual, readers)
    }

    /// `outlive standby` on a host with these readers. It may not listen yet when this returns.
    pub(crate) fn standby_for(&self, side: Side, readers: Readers) -> Process {
        let (listen, standby) = (side.addr().to_string(), side.other().addr().to_string());
        let command = ["standby", "--once", "--listen", &listen];
        self.start_for(side, &command, &["--standby", &standby], &[], readers)
    }

    /// `outlive rewind` on a host with these options.
    pub(crate) fn start_rewind(&self, side: Side, options: &[&str]) -> Process {
        self.spawn(side, &["rewind"], options, &[])
    }

    /// Starts a process on a host; options that are not given get their usual value.
    fn start(&self, side: Side, command: &[&str], options: &[&str], usual: &[(&str, &str)]) -> Process {
        self.start_for(side, command, options, usual, Readers::default())
    }

    /// The same for any command and any readers.
    pub(crate) fn start_for(
        &self,
        side: Side,
        command: &[&str],
        options: &[&str],
        usual: &[(&str, &str)],
        readers: Readers,
    ) -> Process {
        let arbiter = self.asked();
        let always = [("--net", "tap=vm0,bridge=br0"), ("--arbiter", &arbiter)];
        self.spawn_for(side, command, options, &[usual, &always].concat(), readers)
    }

    fn spawn(&self, side: Side, command: &[&str], options: &[&str], usual: &[(&str, &str)]) -> Process {
        self.spawn_for(side, command, options, usual, Readers::default())
    }

    fn spawn_for(
        &self,
        side: Side,
        command: &[&str],
        options: &[&str],
        usual: &[(&str, &str)],
        readers: Readers,
    ) -> Process {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let file = |kind| self.dir().join(format!("{number}-{}.{kind}", side.letter()));
        let (events, log) = (readers.events.unwrap_or_else(|| file("events")), file("log"));
        let socket = file("sock");
        let program = self.program(side);
        let (mut process, stderr) = match readers.log {
            Log::File => (Command::new(program), fs::File::create(&log).unwrap().into()),
            Log::Pipe(pipe) => (Command::new(program), Stdio::from(pipe)),
            Log::Closed => {
                let mut shell = Command::new("sh");
                shell.args(["-c", r#"exec "$0" "$@" 2>&-"#]).arg(program);
                (shell, Stdio::null())
            }
        };
        process.args(command).args(options).arg("--exit-with-stdin").arg("--events").arg(&events);
        if !options.contains(&"--status") {
            // The usual place is the host's, and a killed process leaves its socket there.
            process.arg("--status").arg(&socket);
        }
        // It has no link to another host.
        let has_links = command[0] != "rewind";
        if !has_links {
        } else if options.contains(&"--insecure") {
            process.env("OUTLIVE_INSECURE_NETWORK", "1");
        } else if self.is_plain {
            process.arg("--insecure").env("OUTLIVE_INSECURE_NETWORK", "1");
        } else if !options.contains(&"--keys") {
            process.arg("--keys").arg(self.keys(side));
        }
        if options.iter().any(|option| option.ends_with("?insecure")) {
            process.env("OUTLIVE_INSECURE_NETWORK", "1");
        }
        if !World::is_confined() && !options.contains(&"--sandbox") {
            process.args(["--sandbox", "off"]);
        }
        // For machines that are emulated, or have much else to do.
        if let Some(time) =
            std::env::var_os("OUTLIVE_DEAD_AFTER").filter(|_| has_links && !options.contains(&"--dead-after"))
        {
            process.arg("--dead-after").arg(time);
        }
        for (option, value) in usual.iter().filter(|(option, _)| !options.contains(option)) {
            process.args([option, value]);
        }
        if self.manager().exists() {
            process.env("NOTIFY_SOCKET", self.manager()).env("WATCHDOG_USEC", "300000");
        }
        process.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(stderr);
        let child = self.host(side).spawn(&mut process).unwrap();
        Process::new(child, [events, log, socket], program == Path::new(PROGRAM))
    }

    /// The socket of a service manager that wants a sign of life every 300 ms, where a test has made one.
    pub(crate) fn manager(&self) -> PathBuf {
        self.dir().join("manager")
    }

    /// A VM on host `side`, protected by the other host: the primary and its standby.
    pub(crate) fn protected(&self, side: Side) -> (Process, Process) {
        self.protected_with(side, &[])
    }

    /// The same with further options for `run`.
    pub(crate) fn protected_with(&self, side: Side, options: &[&str]) -> (Process, Process) {
        let there = side.other().addr().to_string();
        let standby = self.standby(side.other());
        let mut primary = self.run_with(side, &[&["--standby", &there], options].concat());
        primary.wait_protected();
        (primary, standby)
    }
}
