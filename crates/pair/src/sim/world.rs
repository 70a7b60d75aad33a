//! Hosts, clocks, links and the arbiter of the simulation, and the queue of what happens next.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use outlive_epoch::{CheckpointFlags, EndReason, LeaveReason, Moment, RefuseCode};

use super::hosts::Process;
use super::images::Image;
use super::run::Strikes;
use super::stats::Stats;
use super::truth::{Life, Node, Truth};
use crate::planted::Bug;
use crate::policy::{Interval, Latency, Longest, Output, Policy};
use crate::{ClaimResult, Introduction, KeptMemory, Link, Ticket, Timing};

/// Random numbers that the seed of the schedule repeats.
pub(super) struct Rng(fastrand::Rng);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    /// A number in `from..to`.
    pub(super) fn range(&mut self, from: u64, to: u64) -> u64 {
        self.0.u64(from..to)
    }

    pub(super) fn one_in(&mut self, n: u64) -> bool {
        self.0.u64(0..n) == 0
    }
}

/// What crosses a link.
#[derive(Debug, Clone)]
pub(super) enum Msg {
    /// With the moment since when each write is known.
    Hello(Introduction, Option<Moment>),
    Base,
    Begin {
        number: u64,
        node: Node,
        flags: CheckpointFlags,
        /// Of a base: what the receiver's memory must have been before; `None`: anything.
        over: Option<Node>,
    },
    Part,
    End {
        stamp: Duration,
    },
    Beat {
        stamp: Duration,
    },
    /// A copy of what the guest was given in an epoch, and then did.
    Input {
        epoch: u64,
        node: Node,
    },
    /// A copy of what the guest has sent in an epoch.
    Output {
        epoch: u64,
        node: Node,
    },
    /// Through which epoch output has left.
    Released {
        through: u64,
    },
    VmEnd(EndReason),
    Dismiss,
    /// Damage on the way, or a primary with an error.
    Bad,
    /// Damage on the way of an encrypted link, which ends with it in both directions.
    Garbled,
    Accept {
        dead_after: Duration,
        holds: bool,
    },
    Refuse(RefuseCode, String),
    Ack {
        generation: u64,
        number: u64,
        stamp: Duration,
    },
    Leave(LeaveReason),
    /// Whether the standby's host reaches the guest's clients.
    Reaches(bool),
    /// The sender has closed the connection, or the kernel has closed it for a dead process.
    Closed,
}

/// The state from which a claimer would continue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Base {
    pub(super) node: Node,
    /// A loser may not know: a third party has reset the connection.
    pub(super) excused: bool,
    /// An operator answers for what is lost.
    pub(super) word: bool,
}

/// What happens at one moment.
#[derive(Debug, Clone)]
pub(super) enum Happening {
    /// The oldest message of a direction arrives (0: to the standby, 1: to the primary).
    Deliver {
        conn: usize,
        side: usize,
    },
    /// A third party has reset the connection, and this side learns of it.
    Reset {
        conn: usize,
        side: usize,
    },
    /// The waiting thread of a process wakes up.
    Look(Life, u64),
    /// A thread does the work that its call of the driver has left to it.
    Drain(Life),
    Dialled {
        life: Life,
        link: Link,
        target: usize,
    },
    VmStep(Life),
    /// The host's disk fails a request of the guest.
    DiskFails(Life),
    /// A process that has left the VM to its standby looks at the arbiter, and then knows this.
    SeesWinner(Life),
    /// The output of a VM that is handed over has left.
    LetGo(Life),
    /// A host's way to the guest's clients is there again.
    Reconnected {
        host: usize,
    },
    /// The pages of a pause are harvested.
    Counted {
        life: Life,
        link: Link,
        base: bool,
    },
    BaseRound {
        life: Life,
        link: Link,
        left: u32,
    },
    /// The next part of a checkpoint that is larger than staging.
    ShipPart {
        life: Life,
        captured_for: Link,
        ticket: Ticket,
        node: Node,
        left: u32,
    },
    ClaimArrives {
        life: Life,
        generation: u64,
        from: Base,
    },
    ClaimAnswered {
        life: Life,
        generation: u64,
        result: ClaimResult,
    },
    Tried {
        life: Life,
        link: Link,
        number: u64,
    },
    Applied {
        life: Life,
        link: Link,
        number: u64,
    },
    Settled {
        life: Life,
        link: Link,
        number: u64,
    },
    Released {
        life: Life,
        link: Link,
    },
    Discarded {
        life: Life,
        link: Link,
    },
    Restart {
        host: usize,
    },
    /// The operator looks whether the VM runs.
    Operator,
    /// An image and its sidecar are copied, to be used later.
    Backup,
    /// An operator starts a copy of an image.
    StartCopy,
    /// A process that runs the VM looks whether another one has won it.
    LookForRivals(Life),
    /// The arbiter has told it of one.
    Superseded {
        life: Life,
        generation: u64,
        owner: String,
    },
    Fault,
    Wedge {
        host: usize,
    },
    Stop {
        host: usize,
    },
    /// The copy of this host is found to be worthless.
    Worthless {
        host: usize,
    },
    /// The arbiter is in reach again.
    ArbiterIsBack,
    /// Crash the host that has the VM.
    CrashIfProtected,
    Cut {
        from: usize,
        to: usize,
    },
    /// A third party resets the newest connection at the standby's end.
    ResetAtStandby,
    /// The newest link carries a record that nobody can read.
    Garble,
    /// A host introduces itself to this standby with a generation that it does not have.
    FalseHello(Life),
    PowerCut,
    Heal,
}

pub(super) struct Conn {
    /// The two ends: 0 is the standby, 1 the primary.
    pub(super) ends: [Life; 2],
    pub(super) primary_link: Link,
    /// Messages under way to end 0 and to end 1.
    pub(super) queues: [VecDeque<Msg>; 2],
    /// When the last message under way arrives: nothing overtakes it.
    arrival: [u64; 2],
    /// Whether an end still wants to hear.
    pub(super) open: [bool; 2],
    /// Whether a third party has reset it.
    pub(super) broken: bool,
    /// Whether the standby's reader has refused what came, so that only the end of the connection is heard there.
    pub(super) refused: bool,
}

pub(super) struct Host {
    pub(super) process: Process,
    /// Counts the lives of processes on this host.
    pub(super) life: u32,
    pub(super) frozen_until: u64,
    /// The next event is handled with this time, which was read just before the process was stopped.
    pub(super) stale: Option<u64>,
    pub(super) arbiter_cut_until: u64,
    /// Until when its disk fails every request.
    pub(super) disk_fails_until: u64,
    /// Until when it is cut off from the guest's clients.
    pub(super) cut_off_until: u64,
    /// Until when another directory is mounted where it looks for the arbiter.
    pub(super) swapped_until: u64,
    /// Its clock stands still until then.
    pub(super) clock_stands_until: u64,
    /// Until when its disk is slow.
    pub(super) slow_disk_until: u64,
    pub(super) image: Option<Image>,
    /// The memory that it has kept of a VM which it has handed over, and what that really is.
    pub(super) kept: Option<(KeptMemory, Node)>,
    /// Whether its waiting thread hangs for good, while all others continue.
    pub(super) wedged: bool,
    /// Until when its waiting thread is busy, which it has announced.
    pub(super) busy_until: u64,
    /// Its clock: offset in µs and rate in parts per thousand.
    pub(super) offset: u64,
    pub(super) rate: u64,
    /// When the waiting thread must wake up, and the number of that waking.
    pub(super) look: Option<(u64, u64)>,
}

pub(super) struct World {
    pub(super) now: u64,
    pub(super) rng: Rng,
    pub(super) hosts: Vec<Host>,
    pub(super) conns: Vec<Conn>,
    pub(super) truth: Truth,
    pub(super) bug: Option<Bug>,
    /// `cut[a][b]`: nothing gets from a to b before this time.
    pub(super) cut: Vec<Vec<u64>>,
    /// Between these times messages are slow, slower and slower: queues on the way swell.
    pub(super) slow_from: u64,
    pub(super) slow_until: u64,
    pub(super) slow_by: u64,
    pub(super) arbiter_slow_until: u64,
    /// Until when the arbiter does not know its claims: it was emptied, or is an old copy.
    pub(super) arbiter_forgot_until: u64,
    pub(super) healed: bool,
    /// Whether anything has gone wrong so far.
    pub(super) disturbed: bool,
    /// Whether a clock has stood still or jumped: leases rely on clocks that do not. Whoever has lost may then
    /// let out what was committed, and nothing else.
    pub(super) clock_failed: bool,
    pub(super) timing: Timing,
    pub(super) slow_total: u64,
    pub(super) slow_end: u64,
    /// Whether the disk of a host was lost.
    pub(super) disk_lost: bool,
    /// The most checkpoints without an acknowledgement.
    pub(super) slots: u64,
    /// Whether output goes to storage that both hosts use: nothing may be let out after another host has won,
    /// whoever has struck the connection.
    pub(super) shared_storage: bool,
    /// When an epoch ends.
    pub(super) ending: Ending,
    /// Its length in µs, or the greatest length if other things end it too.
    pub(super) interval: u64,
    /// Whether a fault may bring further ones.
    pub(super) company: bool,
    /// Images are copied, and copies are started.
    pub(super) copies: bool,
    pub(super) backups: Vec<Image>,
    /// Whether file systems tell a copy from its original.
    pub(super) tells_files_apart: bool,
    /// When an operator's word last won a generation.
    pub(super) copy_won: u64,
    /// VMs that began with an older image, which an operator has accepted.
    pub(super) forks: u64,
    /// Supervisors start processes again soon, those of a host that had the VM too.
    pub(super) quick_restarts: bool,
    /// The owner is stopped just before a standby hands its right over.
    pub(super) stands_still_at_leave: bool,
    /// A primary has died of what made it dismiss its standby.
    pub(super) trouble_was_death: bool,
    /// The guest powers itself off when it has come this far.
    pub(super) guest_end: u32,
    pub(super) stats: Stats,
    pub(super) looks: u64,
    /// Whether to print what happens.
    pub(super) trace: bool,
    pub(super) strikes: Strikes,
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    happenings: Vec<Option<Happening>>,
    free: Vec<usize>,
    sequence: u64,
}

/// The policies that the program has.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ending {
    Interval,
    Output,
    Latency,
    Adaptive,
}

impl Ending {
    const ALL: [Self; 4] = [Self::Interval, Self::Output, Self::Latency, Self::Adaptive];

    pub(super) fn policy(self, interval: Duration) -> Policy {
        let output = || Box::new(Output::new(Output::COALESCE));
        Policy::new(match self {
            Self::Interval => vec![Box::new(Interval::new(interval))],
            Self::Output => vec![output(), Box::new(Longest::new(interval))],
            Self::Latency => vec![Box::new(Latency::new(interval / 2)), Box::new(Longest::new(interval))],
            Self::Adaptive => vec![output(), Box::new(Longest::unless_unchanged(interval, interval * 4))],
        })
    }
}

impl World {
    pub(super) fn new(seed: u64, hosts: usize, bug: Option<Bug>) -> Self {
        let mut rng = Rng::new(seed);
        // As far as the lease allows: the faster clock of two runs 1.4 times as fast.
        let far_apart = rng.one_in(6);
        let hosts: Vec<Host> = (0..hosts)
            .map(|_| Host {
                process: Process::Down,
                life: 0,
                frozen_until: 0,
                stale: None,
                arbiter_cut_until: 0,
                disk_fails_until: 0,
                cut_off_until: 0,
                swapped_until: 0,
                clock_stands_until: 0,
                slow_disk_until: 0,
                image: None,
                kept: None,
                wedged: false,
                busy_until: 0,
                offset: rng.range(0, 1_000_000_000),
                rate: if far_apart { rng.range(850, 1190) } else { rng.range(960, 1041) },
                look: None,
            })
            .collect();
        let count = hosts.len();
        let (slots, interval) = (rng.range(1, 5), rng.range(6_000, 24_000));
        let shared_storage = rng.one_in(4);
        let ending = Ending::ALL[rng.range(0, Ending::ALL.len() as u64) as usize];
        let timing = super::timing(rng.range(60, 181), rng.range(8, 25));
        Self {
            now: 0,
            slots,
            shared_storage,
            ending,
            interval,
            rng,
            hosts,
            conns: Vec::new(),
            truth: Truth::new((0, 1)),
            bug,
            cut: vec![vec![0; count]; count],
            slow_from: 0,
            slow_until: 0,
            slow_by: 0,
            arbiter_slow_until: 0,
            arbiter_forgot_until: 0,
            healed: false,
            disturbed: false,
            clock_failed: false,
            timing,
            slow_total: 0,
            slow_end: 0,
            disk_lost: false,
            company: true,
            copies: false,
            backups: Vec::new(),
            tells_files_apart: true,
            copy_won: 0,
            forks: 0,
            quick_restarts: false,
            stands_still_at_leave: false,
            trouble_was_death: false,
            guest_end: u32::MAX,
            stats: Stats::default(),
            looks: 0,
            trace: super::from_environment("OUTLIVE_SIM_SEED") == Some(seed),
            strikes: Strikes::default(),
            queue: BinaryHeap::new(),
            happenings: Vec::new(),
            free: Vec::new(),
            sequence: 0,
        }
    }

    pub(super) fn at(&mut self, time: u64, happening: Happening) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.happenings.push(None);
            self.happenings.len() - 1
        });
        self.happenings[slot] = Some(happening);
        self.sequence += 1;
        self.queue.push(Reverse((time.max(self.now), self.sequence, slot)));
    }

    pub(super) fn tell(&self, life: Life, what: &dyn std::fmt::Debug) {
        if self.trace {
            println!("{:>7} {life:?} {what:?}", self.now);
        }
    }

    pub(super) fn after(&mut self, delay: u64, happening: Happening) {
        self.at(self.now + delay, happening);
    }

    /// The next thing to happen, but not later than `until`.
    pub(super) fn pop(&mut self, until: u64) -> Option<Happening> {
        let Reverse((time, _, slot)) = *self.queue.peek()?;
        if time > until {
            return None;
        }
        self.queue.pop();
        self.now = time;
        self.free.push(slot);
        self.happenings[slot].take()
    }

    pub(super) fn alive(&self, life: Life) -> bool {
        let host = &self.hosts[life.0];
        host.life == life.1 && !matches!(host.process, Process::Down)
    }

    /// The time on a host's own clock.
    pub(super) fn clock(&self, host: usize) -> Duration {
        self.clock_at(host, self.now)
    }

    pub(super) fn clock_at(&self, host: usize, time: u64) -> Duration {
        let Host { offset, rate, .. } = self.hosts[host];
        Duration::from_micros(offset + time * rate / 1000)
    }

    /// The first moment at which a host's clock shows at least this time.
    pub(super) fn when(&self, host: usize, clock: Duration) -> u64 {
        let Host { offset, rate, .. } = self.hosts[host];
        let time = (clock.as_nanos().div_ceil(1000) as u64).saturating_sub(offset);
        (time * 1000).div_ceil(rate)
    }

    pub(super) fn connect(&mut self, primary: Life, primary_link: Link, standby: Life) -> usize {
        self.conns.push(Conn {
            ends: [standby, primary],
            primary_link,
            queues: Default::default(),
            arrival: [0; 2],
            open: [true; 2],
            broken: false,
            refused: false,
        });
        self.conns.len() - 1
    }

    /// Puts a message on its way to one end of a connection.
    pub(super) fn send(&mut self, conn: usize, side: usize, msg: Msg) {
        let slow =
            if self.now < self.slow_until { self.slow_by.min((self.now - self.slow_from) / 2) } else { 0 };
        let delay = self.rng.range(20, 300) + slow;
        let now = self.now;
        let c = &mut self.conns[conn];
        c.arrival[side] = c.arrival[side].max(now + delay);
        c.queues[side].push_back(msg);
        let arrival = c.arrival[side];
        self.at(arrival, Happening::Deliver { conn, side });
    }

    /// Until when nothing reaches this end, because the network is cut or its host is stopped.
    pub(super) fn held_up(&self, conn: usize, side: usize) -> Option<u64> {
        let ends = self.conns[conn].ends;
        let cut = self.cut[ends[1 - side].0][ends[side].0];
        let until = cut.max(self.frozen(ends[side]));
        (until > self.now).then_some(until)
    }

    /// Until when the process is stopped, if it is.
    pub(super) fn frozen(&self, life: Life) -> u64 {
        if self.alive(life) { self.hosts[life.0].frozen_until } else { 0 }
    }
}
