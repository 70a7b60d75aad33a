//! The soak: two nodes keep some VMs, and every few seconds something is ordered through the API or goes wrong, drawn from a
//! seed. `cargo xtask soak` runs it for minutes and hours. In the end everything is undrained, and then every VM runs once,
//! is protected, has every write that it has acknowledged, and no job is left open.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::io::{Read, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::{Dice, Nodes, Side, Witnesses, World, wait_until};

/// The defaults.
const SECONDS: u64 = 60;
const VMS: u64 = 2;
/// The most VMs: each has an address of the clients' network.
const MOST_VMS: u64 = 100;
/// The shortest time between two turns, and by how much it may be longer.
const REST: Duration = Duration::from_millis(1000);
const MORE_REST: Duration = Duration::from_millis(3000);
/// For how long a process is stopped, or a node gone, at most.
const AWAY: Duration = Duration::from_millis(2500);

fn wish(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |it| it.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
#[ignore = "cargo xtask soak runs it"]
fn vms_outlast_all_that_operators_and_hosts_do() {
    let Some(world) = World::new() else { return };
    let time = Duration::from_secs(wish("OUTLIVE_SOAK_SECONDS", SECONDS));
    let names: Vec<_> =
        (0..wish("OUTLIVE_SOAK_VMS", VMS).clamp(1, MOST_VMS)).map(|it| format!("vm{it}")).collect();
    let mut soak = Soak::start(&world, &names);
    let end = Instant::now() + time;
    while Instant::now() < end {
        soak.turn();
        soak.dice.sleep_below(MORE_REST);
        thread::sleep(REST);
    }
    soak.finish();
}

/// What may be done in a turn.
#[derive(Clone, Copy, Debug)]
enum Turn {
    HandOver,
    StopAndStart,
    DrainOrUndrain,
    KillProcess,
    FreezeProcess,
    KillNode,
    FreezeNode,
    LeaveMidWay,
}

const TURNS: [(Turn, &str); 8] = [
    (Turn::HandOver, "hand-over"),
    (Turn::StopAndStart, "stop and start"),
    (Turn::DrainOrUndrain, "drain or undrain"),
    (Turn::KillProcess, "process killed"),
    (Turn::FreezeProcess, "process stopped for a while"),
    (Turn::KillNode, "node killed"),
    (Turn::FreezeNode, "node stopped for a while"),
    (Turn::LeaveMidWay, "client that leaves midway"),
];

/// What came of it.
enum Outcome {
    Done,
    /// The node has said why not.
    Refused(String),
    /// It would have been the loss of the VM, or an order that makes no sense now.
    NotNow,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Refused(why) => write!(f, "refused: {why}"),
            Self::NotNow => f.write_str("left out"),
        }
    }
}

/// How often each thing was done, refused, and left out.
type Tally = BTreeMap<&'static str, [u64; 3]>;

struct Vm {
    name: String,
    number: usize,
    witnesses: Option<Witnesses>,
}

struct Soak<'a> {
    world: &'a World,
    nodes: Nodes<'a>,
    vms: Vec<Vm>,
    dice: Dice,
    began: Instant,
    turns: u64,
    /// The host that is in maintenance.
    drained: Option<Side>,
    tally: Tally,
    writes: u64,
    longest: Duration,
}

impl<'a> Soak<'a> {
    fn start(world: &'a World, names: &[String]) -> Self {
        let dice = Dice::new();
        let nodes = Nodes::start(world, &names.iter().map(String::as_str).collect::<Vec<_>>());
        nodes.start_vms();
        let vm = |(number, name): (usize, &String)| Vm { name: name.clone(), number, witnesses: None };
        let mut soak = Self {
            world,
            nodes,
            vms: names.iter().enumerate().map(vm).collect(),
            dice,
            began: Instant::now(),
            turns: 0,
            drained: None,
            tally: Tally::new(),
            writes: 0,
            longest: Duration::ZERO,
        };
        for vm in 0..soak.vms.len() {
            soak.wait_settled(vm);
            soak.watch(vm);
        }
        soak.say("all VMs are protected");
        soak
    }

    fn say(&self, what: &str) {
        println!("[{:7.1} s] {what}", self.began.elapsed().as_secs_f64());
    }

    /// Clients of a VM, which know what it has acknowledged from now on.
    fn watch(&mut self, vm: usize) {
        let Vm { number, .. } = self.vms[vm];
        let prefix = format!("t{}w", self.turns);
        let server = self.world.server_of(number);
        self.vms[vm].witnesses = Some(Witnesses::of(self.world, server, &prefix, 1));
    }

    /// Ends the clients of a VM, which read everything back.
    fn read_back(&mut self, vm: usize) {
        let witnesses = self.vms[vm].witnesses.take().expect("it has clients");
        let (writes, longest) = witnesses.end(self.world);
        self.writes += writes;
        self.longest = self.longest.max(longest);
    }

    /// What a VM's process says of itself now. The node's answer may be a second old.
    fn status(&self, side: Side, vm: usize) -> Option<Value> {
        let path = self.nodes.place(side, &format!("run/{}.sock", self.vms[vm].name));
        let mut stream = UnixStream::connect(path).ok()?;
        stream.shutdown(Shutdown::Write).ok()?;
        // A process that is stopped does not answer.
        stream.set_read_timeout(Some(Duration::from_millis(500))).ok()?;
        let mut said = Vec::new();
        stream.read_to_end(&mut said).ok()?;
        serde_json::from_slice(&said).ok()
    }

    /// Where a VM runs, if both its processes say that it is protected.
    fn settled(&self, vm: usize) -> Option<Side> {
        let said = Side::BOTH.map(|side| self.status(side, vm));
        let is = |side: Side, role: &str| {
            said[side as usize].as_ref().is_some_and(|it| it["role"] == role && it["protected"] == true)
        };
        Side::BOTH.into_iter().find(|side| is(*side, "primary") && is(side.other(), "standby"))
    }

    fn wait_settled(&self, vm: usize) -> Side {
        let name = &self.vms[vm].name;
        wait_until(&format!("{name} runs once and is protected"), || self.settled(vm).is_some());
        self.settled(vm).unwrap_or_else(|| self.wait_settled(vm))
    }

    fn turn(&mut self) {
        self.turns += 1;
        let (turn, name) = TURNS[self.dice.below(TURNS.len() as u64) as usize];
        let vm = self.dice.below(self.vms.len() as u64) as usize;
        let side = Side::BOTH[self.dice.below(2) as usize];
        let drains = self.drained.unwrap_or(side);
        let outcome = match turn {
            Turn::HandOver => self.hand_over(vm),
            Turn::StopAndStart => self.stop_and_start(vm),
            Turn::DrainOrUndrain => self.drain_or_undrain(drains),
            Turn::KillProcess => self.kill_process(vm, side),
            Turn::FreezeProcess => self.freeze_process(vm, side),
            Turn::KillNode => self.kill_node(side),
            Turn::FreezeNode => self.freeze(self.nodes.pid(side)),
            Turn::LeaveMidWay => self.leave_mid_way(vm, side),
        };
        let place = match outcome {
            Outcome::Done => 0,
            Outcome::Refused(_) => 1,
            Outcome::NotNow => 2,
        };
        self.tally.entry(name).or_default()[place] += 1;
        let (vm, host) = (&self.vms[vm].name, format!("host {}", side.letter()));
        let whom = match turn {
            Turn::HandOver | Turn::StopAndStart => vm.clone(),
            Turn::KillProcess | Turn::FreezeProcess | Turn::LeaveMidWay => format!("{vm} on {host}"),
            Turn::DrainOrUndrain => format!("host {}", drains.letter()),
            Turn::KillNode | Turn::FreezeNode => host,
        };
        self.say(&format!("{name}, {whom}: {outcome}"));
    }

    /// An order that the node may refuse, but never in another way.
    fn order(&self, side: Side, words: &[&str]) -> Outcome {
        let (code, output, said) = self.nodes.ask(side, words);
        match code {
            Some(0) => Outcome::Done,
            Some(1) => Outcome::Refused(said.lines().next().unwrap_or_default().to_owned()),
            _ => panic!("{words:?} at host {side:?}: {code:?} {output}{said}"),
        }
    }

    /// The same for one that the node may only put off.
    fn insist(&self, side: Side, words: &[&str]) {
        wait_until(&format!("{words:?} at host {side:?}"), || {
            matches!(self.order(side, words), Outcome::Done)
        });
    }

    fn hand_over(&self, vm: usize) -> Outcome {
        let Some(side) = self.settled(vm) else { return Outcome::NotNow };
        self.order(side, &["vm", "hand-over", &self.vms[vm].name])
    }

    /// The payload's data are in its memory: they are read back before its end.
    fn stop_and_start(&mut self, vm: usize) -> Outcome {
        let name = self.vms[vm].name.clone();
        if self.settled(vm).is_none() {
            return Outcome::NotNow;
        }
        if let Some(side) = self.drained {
            // It could not be started there.
            let undrained = self.order(side, &["node", "undrain"]);
            if !matches!(undrained, Outcome::Done) {
                return undrained;
            }
            self.drained = None;
        }
        self.read_back(vm);
        // Somebody who has left midway may have begun to hand it over.
        let side = self.wait_settled(vm);
        let stopped = self.order(side, &["vm", "stop", &name]);
        if matches!(stopped, Outcome::Done) {
            wait_until(&format!("{name} has ended on both hosts"), || {
                Side::BOTH.into_iter().all(|side| self.nodes.show(side, &name)["pid"].is_null())
            });
            Side::BOTH.into_iter().for_each(|side| self.insist(side, &["vm", "start", &name]));
            self.wait_settled(vm);
        }
        self.watch(vm);
        stopped
    }

    fn drain_or_undrain(&mut self, side: Side) -> Outcome {
        let (word, then) = if self.drained.is_some() { ("undrain", None) } else { ("drain", Some(side)) };
        let outcome = self.order(side, &["node", word]);
        if matches!(outcome, Outcome::Done) {
            self.drained = then;
        }
        outcome
    }

    /// Either of a VM's processes. Only a protected VM survives the loss of the one that runs it.
    fn kill_process(&self, vm: usize, side: Side) -> Outcome {
        let Some(pid) = self.settled(vm).and_then(|_| self.process(vm, side)) else { return Outcome::NotNow };
        kill(pid, Signal::SIGKILL).map_or(Outcome::NotNow, |()| Outcome::Done)
    }

    fn freeze_process(&mut self, vm: usize, side: Side) -> Outcome {
        match self.process(vm, side) {
            Some(pid) => self.freeze(pid),
            None => Outcome::NotNow,
        }
    }

    fn process(&self, vm: usize, side: Side) -> Option<Pid> {
        let pid = self.status(side, vm)?["pid"].as_i64()?;
        Some(Pid::from_raw(i32::try_from(pid).ok()?))
    }

    fn freeze(&mut self, pid: Pid) -> Outcome {
        if kill(pid, Signal::SIGSTOP).is_err() {
            return Outcome::NotNow;
        }
        self.dice.sleep_below(AWAY);
        // It may have been ended meanwhile, by whoever keeps it.
        let _ = kill(pid, Signal::SIGCONT);
        Outcome::Done
    }

    fn kill_node(&mut self, side: Side) -> Outcome {
        self.nodes.kill(side);
        self.dice.sleep_below(AWAY);
        self.nodes.start_one(side);
        Outcome::Done
    }

    fn api(&self, side: Side) -> UnixStream {
        UnixStream::connect(self.nodes.place(side, "api")).unwrap()
    }

    /// A client that goes before it has said all, before it has heard the answer, or in the middle of the events.
    fn leave_mid_way(&mut self, vm: usize, side: Side) -> Outcome {
        let mut stream = self.api(side);
        let order = format!("POST /v1/vms/{}/hand-over HTTP/1.1\r\nhost: node\r\n", self.vms[vm].name);
        match self.dice.below(3) {
            0 => stream.write_all(&order.as_bytes()[..order.len() / 2]).unwrap(),
            1 => stream.write_all(format!("{order}content-length: 0\r\n\r\n").as_bytes()).unwrap(),
            _ => {
                stream.write_all(b"GET /v1/events HTTP/1.1\r\nhost: node\r\n\r\n").unwrap();
                stream.read_exact(&mut [0; 16]).unwrap();
            }
        }
        Outcome::Done
    }

    /// All jobs that a node remembers.
    fn jobs(&self, side: Side) -> Vec<Value> {
        let mut stream = self.api(side);
        stream.write_all(b"GET /v1/jobs HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").expect("an answer");
        let body: Value = serde_json::from_str(body).unwrap();
        body["jobs"].as_array().unwrap().clone()
    }

    fn finish(mut self) {
        if let Some(side) = self.drained.take() {
            self.insist(side, &["node", "undrain"]);
        }
        self.say("the end: everything is undrained");
        let is_open = |job: &Value| job["state"] == "running";
        for side in Side::BOTH {
            wait_until("every job has ended", || !self.jobs(side).iter().any(is_open));
        }
        for vm in 0..self.vms.len() {
            let side = self.wait_settled(vm);
            self.vms[vm].witnesses.as_ref().expect("it has clients").hear_all();
            self.read_back(vm);
            self.say(&format!("{} runs on host {} and is protected", self.vms[vm].name, side.letter()));
        }
        let jobs: Vec<_> = Side::BOTH.into_iter().flat_map(|side| self.jobs(side)).collect();
        let final_states = ["succeeded", "failed", "cancelled"];
        let wrong: Vec<_> =
            jobs.iter().filter(|it| !final_states.iter().any(|state| it["state"] == *state)).collect();
        assert!(wrong.is_empty(), "{wrong:?}");
        println!("{}", self.table(&jobs));
    }

    fn table(&self, jobs: &[Value]) -> String {
        let mut table = format!("{:<28} {:>6} {:>8} {:>8}\n", "", "done", "refused", "left out");
        for (name, [done, refused, left]) in &self.tally {
            let _ = writeln!(table, "{name:<28} {done:>6} {refused:>8} {left:>8}");
        }
        let count = |state: &str| jobs.iter().filter(|it| it["state"] == state).count();
        let (good, bad, cancelled) = (count("succeeded"), count("failed"), count("cancelled"));
        let _ = writeln!(
            table,
            "jobs that the nodes remember: {good} succeeded, {bad} failed, {cancelled} cancelled"
        );
        let (vms, writes, longest) = (self.vms.len(), self.writes, self.longest.as_millis());
        let _ = write!(
            table,
            "{vms} VMs, {} turns: {writes} writes, none lost, none doubled; longest wait {longest} ms",
            self.turns
        );
        table
    }
}
