//! What the model consists of: hosts with their processes and images, connections, claims under way, the
//! arbiter, and what the world has seen of the VM.

use std::collections::VecDeque;
use std::time::Duration;

use outlive_epoch::{CheckpointFlags, EndReason, LeaveReason, VmId};

use crate::planted::{Bug, Planted};
use crate::{Introduction, Link, Primary, PrimaryConfig, Standby, StandbyConfig, Timing};

pub(super) const VM: VmId = VmId([7; 16]);

/// What every clock shows. Time passes by making everything older.
pub(super) const NOW: Duration = Duration::from_millis(100);

/// One step of time. The primary's patience ends with the second step and the standby's with the third.
pub(super) const STEP: Duration = Duration::from_millis(4);

/// Whatever is older than this has the same effect.
const OLDEST: Duration = Duration::from_millis(100 - 3 * 4);

pub(super) const TIMING: Timing = Timing {
    dead_after: Duration::from_millis(10),
    retry: Duration::from_micros(100),
    greeting: Duration::from_millis(10),
    handback: Duration::from_millis(10),
};

/// Moves a time one step into the past.
pub(super) fn older(time: &mut Duration) {
    *time = time.saturating_sub(STEP).max(OLDEST);
}

/// What the VM has done so far: each output that it produced, by the host where it ran and a number that is
/// never used twice. Two VMs that went on from the same checkpoint have different histories.
pub(super) type History = Vec<u8>;

/// One life of a process: its host, and how many there were on that host.
pub(super) type Life = (usize, u8);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) hosts: Vec<Host>,
    pub(super) conns: Vec<Conn>,
    pub(super) claims: Vec<UnderWay>,
    /// Who won which generation; the first entry is generation 1.
    pub(super) won: Vec<Life>,
    /// From which state the owner of the newest generation continues.
    pub(super) base: History,
    /// What the world has seen of the VM.
    pub(super) tip: History,
    /// Whether the VM has ended in order.
    pub(super) ended: bool,
    /// Directions in which nothing is delivered.
    pub(super) cut: Vec<(usize, usize)>,
    /// Whether anything has gone wrong so far.
    pub(super) disturbed: bool,
    /// Whether a loser may not know that it has lost: a third party reset its connection, or its clock stood
    /// still. It may let committed output out, and nothing else.
    pub(super) excused: bool,
    /// Whether a clock has stood still.
    pub(super) stood_still: bool,
    /// Which invariant is broken.
    pub(super) broken: Option<String>,
    pub(super) left: Budget,
}

/// How much may still happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Budget {
    /// Faults.
    pub(super) faults: u8,
    /// Orders of an operator.
    pub(super) orders: u8,
    /// Outputs of the guest.
    pub(super) outputs: u8,
    /// Checkpoints after the base.
    pub(super) epochs: u8,
    /// Processes that are started again.
    pub(super) starts: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Host {
    /// Counts the lives of its processes.
    pub(super) life: u8,
    pub(super) process: Process,
    pub(super) image: Option<Image>,
    /// For so many steps of time this host may have something to do and not do it: it is slow, or stopped.
    pub(super) slow: u8,
    /// Whoever runs this host has stopped it, and its clock.
    pub(super) paused: bool,
    /// It never comes back.
    pub(super) gone: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Process {
    Down,
    /// `outlive run` on an image: it has asked for this generation.
    Starting {
        generation: u64,
    },
    Primary(Box<PrimaryHost>),
    Standby(Box<StandbyHost>),
}

/// The disk image of a host with its sidecar.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Image {
    pub(super) generation: u64,
    /// A standby's copy, or the VM's own disk.
    pub(super) replica: bool,
    /// The process that wrote the sidecar: what it has won belongs to this image.
    pub(super) process: u8,
    pub(super) history: History,
    pub(super) whole: bool,
    /// Given up in order: the VM went on without it.
    pub(super) released: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct PrimaryHost {
    pub(super) machine: Primary,
    pub(super) history: History,
    pub(super) valve: Valve,
    /// Set when the base may be captured.
    pub(super) base_ready: Option<Link>,
    /// The vCPUs are stopped for good.
    pub(super) stopped: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Mode {
    Open,
    Hold,
    Discard,
}

/// Held output.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Valve {
    pub(super) mode: Mode,
    pub(super) committed: u64,
    pub(super) held: VecDeque<(u64, History)>,
}

impl Valve {
    pub(super) fn lets_out(&self) -> bool {
        let front = self.held.front();
        front.is_some_and(|(epoch, _)| self.mode == Mode::Open || *epoch <= self.committed)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct StandbyHost {
    pub(super) machine: Standby,
    pub(super) copy: Option<Copy>,
    /// What the applier has to do, the oldest first.
    pub(super) work: VecDeque<Work>,
    /// An operator has told it to stop.
    pub(super) stopping: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Checkpoint {
    pub(super) number: u64,
    pub(super) history: History,
    pub(super) flags: CheckpointFlags,
}

/// The copy of a VM in a standby's memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Copy {
    pub(super) link: Link,
    pub(super) generation: u64,
    pub(super) staged: VecDeque<Checkpoint>,
    pub(super) acked: Option<Checkpoint>,
    /// The checkpoint in memory, if memory is one checkpoint.
    pub(super) memory: Option<u64>,
    pub(super) settled: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Work {
    Try(Link, u64),
    Apply(Link, u64),
    Settle(Link, u64),
    Release(Link),
    Discard(Link),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Conn {
    /// Unique among those that are still known to anybody; the standby's name for it.
    pub(super) id: u64,
    /// 0 is the standby's end, 1 the primary's.
    pub(super) ends: [Life; 2],
    pub(super) primary_link: Link,
    pub(super) open: [bool; 2],
    /// Messages under way to end 0 and to end 1.
    pub(super) queues: [VecDeque<Msg>; 2],
    /// A third party has reset it.
    pub(super) reset: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Msg {
    Hello(Introduction),
    Checkpoint(Checkpoint, Duration),
    Beat(Duration),
    End(EndReason),
    Accept,
    Refuse,
    Ack { generation: u64, checkpoint: u64, stamp: Duration },
    Leave(LeaveReason),
    Dismiss,
    Closed,
}

impl Msg {
    /// The time of the primary's clock in it.
    pub(super) fn stamp(&mut self) -> Option<&mut Duration> {
        match self {
            Self::Checkpoint(_, stamp) | Self::Beat(stamp) | Self::Ack { stamp, .. } => Some(stamp),
            _ => None,
        }
    }
}

/// A claim between a process and the arbiter.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct UnderWay {
    pub(super) life: Life,
    pub(super) generation: u64,
    /// The state with which the claimer would go on, should it die meanwhile.
    pub(super) base: History,
    pub(super) excused: bool,
    /// The arbiter's answer: whether it is won.
    pub(super) answer: Option<bool>,
}

impl World {
    /// The VM runs on host 0, and every other host is a standby.
    pub(super) fn new(hosts: usize, left: Budget, bug: Option<Bug>) -> Self {
        let host =
            |life| Host { life, process: Process::Down, image: None, slow: 0, paused: false, gone: false };
        let mut world = Self {
            hosts: (0..hosts).map(|_| host(0)).collect(),
            conns: Vec::new(),
            claims: Vec::new(),
            won: vec![(0, 1)],
            base: History::new(),
            tip: History::new(),
            ended: false,
            cut: Vec::new(),
            disturbed: false,
            excused: false,
            stood_still: false,
            broken: None,
            left,
        };
        world.hosts[0].life = 1;
        world.start_primary(0, (1, 0), History::new(), bug);
        (1..hosts).for_each(|host| world.start_standby(host, bug));
        world
    }

    pub(super) fn fail(&mut self, what: String) {
        self.broken.get_or_insert(what);
    }

    pub(super) fn newest(&self) -> (u64, Life) {
        (self.won.len() as u64, self.won[self.won.len() - 1])
    }

    pub(super) fn life(&self, host: usize) -> Life {
        (host, self.hosts[host].life)
    }

    pub(super) fn alive(&self, life: Life) -> bool {
        self.hosts[life.0].life == life.1 && !matches!(self.hosts[life.0].process, Process::Down)
    }

    pub(super) fn primary(&mut self, host: usize) -> Option<&mut PrimaryHost> {
        match &mut self.hosts[host].process {
            Process::Primary(primary) => Some(primary),
            _ => None,
        }
    }

    pub(super) fn standby(&mut self, host: usize) -> Option<&mut StandbyHost> {
        match &mut self.hosts[host].process {
            Process::Standby(standby) => Some(standby),
            _ => None,
        }
    }

    /// A primary at its start or after a takeover in this process.
    pub(super) fn start_primary(
        &mut self,
        host: usize,
        (generation, checkpoint): (u64, u64),
        history: History,
        bug: Option<Bug>,
    ) {
        let standbys = self.hosts.len() - 1;
        let config =
            PrimaryConfig { generation, checkpoint, handed: false, standbys, slots: 1, timing: TIMING };
        let mut machine = Primary::new(config, NOW);
        machine.bug = Planted(bug);
        let process = self.hosts[host].life;
        let (replica, whole, released) = (false, true, false);
        self.hosts[host].image =
            Some(Image { generation, replica, process, history: history.clone(), whole, released });
        let valve = Valve { mode: Mode::Open, committed: 0, held: VecDeque::new() };
        self.hosts[host].process = Process::Primary(Box::new(PrimaryHost {
            machine,
            history,
            valve,
            base_ready: None,
            stopped: false,
        }));
    }

    pub(super) fn start_standby(&mut self, host: usize, bug: Option<Bug>) {
        let mut machine = Standby::new(StandbyConfig { vm: None, timing: TIMING }, NOW);
        machine.bug = Planted(bug);
        self.hosts[host].life += 1;
        let (copy, work) = (None, VecDeque::new());
        self.hosts[host].process =
            Process::Standby(Box::new(StandbyHost { machine, copy, work, stopping: false }));
    }

    pub(super) fn is_cut(&self, from: usize, to: usize) -> bool {
        self.cut.contains(&(from, to))
    }

    pub(super) fn conn(&self, id: u64) -> Option<usize> {
        self.conns.iter().position(|conn| conn.id == id)
    }

    /// The connection that a primary knows by this number.
    pub(super) fn conn_of(&self, life: Life, link: Link) -> Option<usize> {
        self.conns.iter().position(|conn| conn.ends[1] == life && conn.primary_link == link)
    }

    pub(super) fn send(&mut self, at: usize, side: usize, msg: Msg) {
        let conn = &mut self.conns[at];
        // What a standby said last is read even from a connection that the primary has given up.
        if conn.open[side] || side == 1 && matches!(msg, Msg::Leave(_)) {
            // Of heartbeats that wait only the newest counts.
            if let (Msg::Beat(_), Some(Msg::Beat(_))) = (&msg, conn.queues[side].back()) {
                conn.queues[side].pop_back();
            }
            conn.queues[side].push_back(msg);
        }
    }

    pub(super) fn close(&mut self, at: usize, side: usize) {
        if std::mem::replace(&mut self.conns[at].open[side], false) {
            let keeps = |msg: &Msg| side == 1 && matches!(msg, Msg::Leave(_));
            self.conns[at].queues[side].retain(keeps);
            self.send(at, 1 - side, Msg::Closed);
        }
    }

    /// A process ends. `told` says whether its kernel lives to close its connections.
    pub(super) fn stop_process(&mut self, host: usize, told: bool) {
        let life = self.life(host);
        self.hosts[host].process = Process::Down;
        (self.hosts[host].slow, self.hosts[host].paused) = (0, false);
        for at in 0..self.conns.len() {
            for side in 0..2 {
                if self.conns[at].ends[side] == life {
                    if told {
                        self.close(at, side);
                    }
                    self.conns[at].open[side] = false;
                    self.conns[at].queues[side].clear();
                }
            }
        }
        self.tidy();
    }

    /// Forgets what has no effect any more, so that equal situations are equal states.
    pub(super) fn tidy(&mut self) {
        self.conns
            .retain(|conn| conn.open != [false; 2] || conn.queues.iter().any(|queue| !queue.is_empty()));
        for host in 0..self.hosts.len() {
            let life = self.life(host);
            let known = self.conns.iter().filter(|conn| conn.ends[1] == life);
            let next = known.map(|conn| conn.primary_link.0 + 1).max().unwrap_or(0);
            if let Some(primary) = self.primary(host) {
                let used = primary.machine.link().map_or(0, |link| link.0 + 1);
                let lost = primary.machine.lost_link().map_or(0, |link| link.0 + 1);
                primary.machine.number_links_from(next.max(used).max(lost));
            }
        }
        self.claims.sort();
        self.claims.dedup();
    }

    /// A number for a connection that nobody knows any more.
    pub(super) fn free_id(&self) -> u64 {
        let copies = self.hosts.iter().filter_map(|host| match &host.process {
            Process::Standby(standby) => standby.copy.as_ref().map(|copy| copy.link.0),
            _ => None,
        });
        let used: Vec<u64> = self.conns.iter().map(|conn| conn.id).chain(copies).collect();
        (0..).find(|id| !used.contains(id)).unwrap_or(0)
    }
}
