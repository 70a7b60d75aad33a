//! The basis of every proof: hosts, one of which runs a Linux guest while another one protects it.

use std::fs;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{ProofError, ensure};
use crate::nested::background::{Background, Events};
use crate::nested::cluster::{ARBITER, BRIDGE, Cluster, DATA, Options, SHARE};
use crate::nested::image::GuestKernel;
use crate::nested::kernel::Series;
use crate::nested::network::Net;
use crate::run::Workspace;

/// Port of every standby.
const PORT: u16 = 7000;
/// The guest's network card in a host.
const TAP: &str = "vm0";
/// A guest prints this on its console when everything has started.
pub(super) const UP: &str = "outlive guest is up";
/// The port of the guest's agent.
const AGENT: u16 = 7777;
/// For emulated hosts: there the first write to a page after a checkpoint costs most of a millisecond.
const INTERVAL: &str = "500ms";
const DEAD_AFTER: &str = "5s";
/// For a long proof: on a busy machine an emulated host is silent for many seconds now and then.
pub(super) const PATIENT: &str = "20s";
/// An emulated guest takes long to shut down.
const STOP_WITHIN: &str = "600s";
/// Time for a guest to start.
pub(super) const BOOT: Duration = Duration::from_secs(300);
/// Time for a full synchronisation.
pub(super) const SYNC: Duration = Duration::from_secs(400);
/// Time for a takeover.
pub(super) const TAKEOVER: Duration = Duration::from_secs(120);
/// Time for a short command in the guest.
pub(super) const SHORT: Duration = Duration::from_secs(120);
/// Time for systemd to start all services.
const STARTED: Duration = Duration::from_secs(300);
const STATE: &str = "systemctl is-system-running --wait; systemctl --failed --no-legend --plain";
/// Time between the guest's word that it is up and its agent, on a busy machine.
const AGENT_STARTS: Duration = Duration::from_secs(120);
/// Time for a connection to the guest.
const CONNECT: Duration = Duration::from_secs(10);

/// The parts of a guest.
#[derive(Clone)]
pub(super) struct Guest {
    pub(super) kernel: GuestKernel,
    /// It boots what its disk has, not `kernel`.
    pub(super) own_kernel: bool,
    /// Debian's own initrd, or the small one.
    pub(super) stock_initrd: bool,
    pub(super) vcpus: u32,
    pub(super) memory: &'static str,
    /// The end of its command line.
    pub(super) append: String,
    /// Images on each host's disk.
    pub(super) disks: Vec<String>,
    /// Further options of `outlive run`.
    pub(super) options: &'static str,
}

impl Guest {
    /// The Debian system of the image, with services started.
    pub(super) fn debian(kernel: GuestKernel, services: &str) -> Guest {
        let (address, prefix) = (Net::guest(1), Net::PREFIX);
        Guest {
            kernel,
            own_kernel: false,
            stock_initrd: false,
            vcpus: 1,
            memory: "384M",
            append: format!(
                "root=/dev/vda init=/outlive/init outlive.start={services} outlive.ip={address}/{prefix}"
            ),
            disks: vec!["root.img".into()],
            options: "",
        }
    }

    /// The same as Debian installs it: its own initrd and systemd, with an address, which a server has in its
    /// files.
    pub(super) fn server(kernel: GuestKernel) -> Guest {
        Guest {
            stock_initrd: true,
            memory: "512M",
            append: format!("root=/dev/vda outlive.ip={}/{}", Net::guest(1), Net::PREFIX),
            ..Guest::debian(kernel, "")
        }
    }

    /// Debian with a disk that boots by itself, with its own initrd and the small `init`. The entry of its boot loader
    /// says what its root file system is.
    pub(super) fn own_kernel() -> Guest {
        Guest {
            own_kernel: true,
            append: format!("init=/outlive/init outlive.ip={}/{}", Net::guest(1), Net::PREFIX),
            disks: vec!["own.img".into()],
            ..Guest::server(GuestKernel::BookwormCloud)
        }
    }

    /// Only the small initrd.
    pub(super) fn busybox(kernel: GuestKernel, append: &str) -> Guest {
        let (address, prefix) = (Net::guest(1), Net::PREFIX);
        Guest {
            kernel,
            own_kernel: false,
            stock_initrd: false,
            vcpus: 1,
            memory: "192M",
            append: format!("outlive.stay=yes outlive.ip={address}/{prefix} {append}"),
            disks: Vec::new(),
            options: "",
        }
    }

    fn command(&self) -> String {
        let initrd = if self.stock_initrd { "initrd" } else { "busybox" };
        let (kernel, vcpus, memory) = (self.kernel.name(), self.vcpus, self.memory);
        if self.own_kernel {
            let (append, options) = (&self.append, self.options);
            return format!(
                "run --boot disk --vcpus {vcpus} --memory {memory} --append '{append}' {options}"
            );
        }
        format!(
            "run --kernel {DATA}/vmlinuz-{kernel} --initrd {DATA}/{initrd}-{kernel} --vcpus {vcpus} --memory {memory} \
             --append 'console=ttyS0 {}' {}",
            self.append, self.options
        )
    }

    fn disks(&self) -> String {
        self.disks.iter().map(|image| format!(" --disk path={DATA}/{image}")).collect()
    }
}

/// A side of the pair: a program in a host, and its output.
pub(super) struct Side {
    pub(super) program: Background,
    events: Events,
}

impl Side {
    /// Waits for an event.
    pub(super) fn wait_for(&self, event: &str, limit: Duration) -> Result<Value, ProofError> {
        Ok(self.program.wait(event, limit, || self.events.named(event).pop())?)
    }

    pub(super) fn all(&self, event: &str) -> Vec<Value> {
        self.events.named(event)
    }
}

/// Hosts, and a clock. The output of their programs stays in `target/nested/logs` until the next stage.
pub(super) struct Stage {
    pub(super) cluster: Cluster,
    logs: PathBuf,
    started: Instant,
    sides: u32,
    dead_after: &'static str,
}

impl Stage {
    pub(super) fn new(workspace: &Workspace, fetch: bool, kernels: &[Series]) -> Result<Stage, ProofError> {
        Stage::unequal(workspace, fetch, kernels, None)
    }

    /// Hosts, the last of which has a processor that lacks a feature.
    pub(super) fn unequal(
        workspace: &Workspace,
        fetch: bool,
        kernels: &[Series],
        last_lacks: Option<&'static str>,
    ) -> Result<Stage, ProofError> {
        let options = Options {
            kernels: kernels.to_vec(),
            cpus: 1,
            last_lacks,
            memory_mib: 1536,
            programs: vec![("/bin/outlive", workspace.target.join("release/outlive"))],
            guests: true,
            shell: false,
            fetch,
        };
        let started = Instant::now();
        let logs = workspace.target.join("nested/logs");
        let stage = Stage {
            cluster: Cluster::start(workspace, options)?,
            logs,
            started,
            sides: 0,
            dead_after: DEAD_AFTER,
        };
        let names: Vec<&str> = kernels.iter().map(|it| it.name()).collect();
        stage.say(&format!("hosts with {} are up", names.join(" and ")));
        Ok(stage)
    }

    /// The same with another `--dead-after` for all programs that it starts.
    pub(super) fn dead_after(mut self, dead_after: &'static str) -> Stage {
        self.dead_after = dead_after;
        self
    }

    pub(super) fn say(&self, what: &str) {
        println!("  {:4} s  {what}", self.started.elapsed().as_secs());
    }

    fn start(&mut self, host: usize, tap: &str, command: &str) -> Result<Side, ProofError> {
        self.sides += 1;
        let events = format!("{host}/events-{}", self.sides);
        let dead_after = self.dead_after;
        let program = format!(
            "/bin/outlive {command} --arbiter file:{ARBITER} --net tap={tap},bridge={BRIDGE} \
             --policy interval --interval {INTERVAL} --dead-after {dead_after} --stop-within {STOP_WITHIN} --console stdio --events {SHARE}/{events}"
        );
        let program = self.cluster.spawn(host, "outlive", &program)?;
        Ok(Side { program, events: Events::new(self.cluster.share().join(events)) })
    }

    /// A standby, which protects the guest with `next` after a takeover.
    pub(super) fn standby(
        &mut self,
        host: usize,
        next: Option<usize>,
        guest: &Guest,
    ) -> Result<Side, ProofError> {
        let next = next.map(|next| format!(" --standby {}:{PORT}", Net::Link.host(next))).unwrap_or_default();
        // The first standby's image is a copy that was made beforehand, so it is unknown. Later ones are of
        // the guest's own line.
        let word = if host == 1 { "" } else { ",overwrite" };
        let disks: String =
            guest.disks.iter().map(|image| format!(" --disk path={DATA}/{image}{word}")).collect();
        let side = self.start(host, TAP, &format!("standby --listen 0.0.0.0:{PORT}{next}{disks}"))?;
        side.wait_for("listening", SHORT)?;
        Ok(side)
    }

    /// The guest, protected by a standby on `next`.
    pub(super) fn run(
        &mut self,
        host: usize,
        next: Option<usize>,
        guest: &Guest,
    ) -> Result<Side, ProofError> {
        let next = next.map(|next| format!(" --standby {}:{PORT}", Net::Link.host(next))).unwrap_or_default();
        self.start(host, TAP, &format!("{}{}{next}", guest.command(), guest.disks()))
    }

    /// The guest on host 1, with this image as its disk, protected by [`Stage::standby_local`] with the next
    /// number.
    pub(super) fn run_local(&mut self, guest: &Guest, image: &str, number: u16) -> Result<Side, ProofError> {
        let command = format!("{} --disk path={DATA}/{image}{}", guest.command(), next_local(number));
        self.start(1, &format!("vm{number}"), &command)
    }

    /// A standby on the host that runs the guest.
    pub(super) fn standby_local(&mut self, image: &str, number: u16) -> Result<Side, ProofError> {
        let listen = format!("standby --listen 127.0.0.1:{}", PORT + number);
        // Its first image is an unknown copy, too.
        let word = if number == 1 { ",overwrite" } else { "" };
        let command = format!("{listen} --disk path={DATA}/{image}{word}{}", next_local(number));
        self.start(1, &format!("vm{number}"), &command)
    }

    /// Waits until the guest has started everything.
    pub(super) fn wait_until_up(&self, side: &Side) -> Result<(), ProofError> {
        side.program.wait_for(UP, BOOT)?;
        self.say("the guest is up");
        Ok(())
    }

    /// Waits until losing the host would do no harm.
    pub(super) fn wait_until_protected(&self, side: &Side) -> Result<(), ProofError> {
        let event = side.wait_for("protected", SYNC)?;
        self.say(&format!("protected, {} s after it began", event["base_ms"].as_u64().unwrap_or(0) / 1000));
        Ok(())
    }

    /// Starts the guest on host 1 and, when it is up, protects it with host 2. Not before: while a guest
    /// boots it writes to all its memory, and emulated hosts are too slow for that. Other proofs cover it.
    pub(super) fn pair(&mut self, guest: &Guest, prepare: &str) -> Result<[Side; 2], ProofError> {
        let first = self.run(1, Some(2), guest)?;
        self.wait_until_up(&first)?;
        if !prepare.is_empty() {
            self.in_guest(prepare, SHORT)?;
        }
        let second = self.standby(2, Some(1), guest)?;
        self.wait_until_protected(&first)?;
        Ok([first, second])
    }

    /// Cuts a host's power, and waits until the other host runs the guest.
    pub(super) fn cut(&mut self, host: usize, next: &Side) -> Result<Value, ProofError> {
        self.say(&format!("cutting the power of host {host}"));
        self.cluster.cut_power(host)?;
        self.wait_for_takeover(next)
    }

    pub(super) fn wait_for_takeover(&self, next: &Side) -> Result<Value, ProofError> {
        let event = next.wait_for("takeover", TAKEOVER)?;
        let ms = |what: &str| event[what].as_u64().unwrap_or(0) / 1000;
        self.say(&format!(
            "host {} runs the guest: detection {} ms, settling {} ms, arbitration {} ms, restore {} ms",
            next.program.host,
            ms("detect_us"),
            ms("settle_us"),
            ms("arbitrate_us"),
            ms("restore_us")
        ));
        Ok(event)
    }

    /// Ends the guest in order, from the host that runs it.
    pub(super) fn press_power_button(&mut self, side: &Side) -> Result<(), ProofError> {
        self.cluster.signal(&side.program, "TERM")?;
        let status = side.program.wait_for_end(SHORT)?;
        let ended = side.wait_for("ended", SHORT)?;
        ensure(status == 0 && ended["reason"].as_str().is_some_and(|it| it.contains("guest")), || {
            format!("the power button was pressed, and it ended with {status}: {ended}")
        })?;
        self.say(&format!("the power button was pressed: {}", ended["reason"]));
        Ok(())
    }

    pub(super) fn agent() -> SocketAddr {
        SocketAddr::new(Net::guest(1).into(), AGENT)
    }

    /// Waits until systemd has started all services of a server, and checks that none has failed.
    pub(super) fn all_services_run(&self) -> Result<(), ProofError> {
        let state = self.in_guest(STATE, STARTED)?;
        ensure(state.trim() == "running", || format!("not all services run: {state}"))
    }

    /// Runs a line of shell in the guest, from outside. Returns its output.
    pub(super) fn in_guest(&self, line: &str, limit: Duration) -> Result<String, ProofError> {
        let (status, output) = ask(&self.cluster, line, limit)
            .map_err(|source| ProofError::Agent { line: line.into(), source })?;
        if status == "0" {
            return Ok(output);
        }
        Err(ProofError::InGuest { line: line.into(), status, output })
    }
}

fn next_local(number: u16) -> String {
    format!(" --standby 127.0.0.1:{}", PORT + number + 1)
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.logs);
        let mut command = Command::new("cp");
        let _ = command.arg("-r").arg(self.cluster.share()).arg(&self.logs).status();
    }
}

fn ask(cluster: &Cluster, line: &str, limit: Duration) -> io::Result<(String, String)> {
    let start = Instant::now();
    let mut stream = loop {
        match cluster.connect(Stage::agent(), CONNECT) {
            // The agent starts when the guest says that it is up.
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused && start.elapsed() < AGENT_STARTS =>
            {
                thread::sleep(Duration::from_millis(100));
            }
            connected => break connected?,
        }
    };
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut output = String::new();
    stream.read_to_string(&mut output)?;
    let (output, status) = output.trim_end().rsplit_once("exit ").ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((status.to_string(), output.trim_end().to_string()))
}
