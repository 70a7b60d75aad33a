//! The course of the demo: start, kill, wait for the takeover, attach a new standby, again and again, and
//! judge at the end.

use std::io;
use std::net::SocketAddr;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::client::ClientError;
use super::cluster::{Cluster, Host};
use super::events::Totals;
use super::fill::Filling;
use super::load::{Load, Report};
use super::status::{Status, grouped, time};
use super::summary::{Summary, TakeoverTimes};
use super::verify;
use crate::events::{Event, Record, now_us};
use crate::exit;
use crate::link::LinkKind;

/// How often the event files are read. No measurement depends on it: events carry their own time.
const TICK: Duration = Duration::from_millis(5);
/// How long each may take: a process to get ready, a base checkpoint to be committed, a standby to take over.
const READY_LIMIT: Duration = Duration::from_secs(30);
const PROTECTED_LIMIT: Duration = Duration::from_secs(180);
const TAKEOVER_LIMIT: Duration = Duration::from_secs(30);
/// How long the guest may take to write to all of its memory.
const FILL_LIMIT: Duration = Duration::from_secs(600);
/// How long an old primary may live after the other side has taken over: it must find out and stop.
const SUPERSEDED_LIMIT: Duration = Duration::from_secs(10);
/// How many processes may end without being killed before the demo gives up.
const ACCIDENTS: u32 = 5;
/// How long the clients' last requests and the read-back may take: normally, and in a hurry.
const FINISH_PATIENCE: Duration = Duration::from_secs(30);
const HURRIED_PATIENCE: Duration = Duration::from_secs(5);

/// The orders for the demo.
#[derive(Clone, Debug)]
pub(super) struct Play {
    pub(super) vm: SocketAddr,
    pub(super) time: Duration,
    pub(super) kills: u32,
    pub(super) clients: u32,
    pub(super) rate: u32,
    /// The guest writes to all of its memory before anything else.
    pub(super) fills: bool,
    pub(super) seed: u64,
}

/// Why the demo stops early.
#[derive(Debug, Error)]
pub(super) enum Stop {
    /// Ctrl-C or SIGTERM.
    #[error("interrupted")]
    Interrupted,
    /// Something that should survive did not, or a process did something forbidden.
    #[error("{0}")]
    Failed(String),
    /// A process refused to start in this environment and said why.
    #[error("{0}")]
    Environment(String),
    /// The demo itself failed.
    #[error("the demo failed: {0}")]
    Io(#[from] io::Error),
}

/// One kill.
#[derive(Clone, Copy, Debug)]
struct Kill {
    at_us: u64,
    /// When the VM was protected again.
    over_us: Option<u64>,
}

/// What protects connections, by those that were made.
#[derive(Clone, Copy, Debug, Default)]
struct Links {
    protected: u32,
    open: u32,
    unknown: u32,
}

impl Links {
    fn note(&mut self, link: Option<LinkKind>) {
        let count = match link {
            Some(LinkKind::Tls13) => &mut self.protected,
            Some(LinkKind::Plain) => &mut self.open,
            None => &mut self.unknown,
        };
        *count += 1;
    }

    /// What all of them have. `None` if there was none, or if one has not said what it has.
    fn all(self) -> Option<LinkKind> {
        match self {
            Self { unknown: 1.., .. } => None,
            Self { open: 1.., .. } => Some(LinkKind::Plain),
            Self { protected: 1.., .. } => Some(LinkKind::Tls13),
            _ => None,
        }
    }
}

/// An old primary that has to stop, and until when.
type Superseded = (Host, Instant);

/// Directs the cluster and the clients.
pub(super) struct Director {
    play: Play,
    cluster: Cluster,
    status: Status,
    interrupt: Arc<AtomicBool>,
    load: Option<Load>,
    /// Where the VM runs.
    active: Host,
    /// Whether the primary was started: from then on a missing standby is replaced.
    booted: bool,
    listening: bool,
    protected: bool,
    superseded: Option<Superseded>,
    /// Since when nobody runs the VM.
    orphaned: Option<Instant>,
    accidents: u32,
    kills: Vec<Kill>,
    /// Takeovers and first packets, with the process that reported them.
    takeovers: Vec<(u32, TakeoverTimes)>,
    first_packets: Vec<(u32, u64)>,
    trackers: Vec<String>,
    /// Whether all hosts so far have said that they are.
    confined: Option<bool>,
    /// What protects the hosts' connections, as their ends have said.
    links: Links,
    /// How far the guest is with filling its memory, while it does.
    filled_percent: Option<u64>,
    filled_bytes: u64,
    base: (u64, u64),
}

impl Director {
    pub(super) fn new(play: Play, cluster: Cluster, interrupt: Arc<AtomicBool>) -> Self {
        Self {
            play,
            cluster,
            status: Status::new(),
            interrupt,
            load: None,
            active: Host::A,
            booted: false,
            listening: false,
            protected: false,
            superseded: None,
            orphaned: None,
            accidents: 0,
            kills: Vec::new(),
            takeovers: Vec::new(),
            first_packets: Vec::new(),
            trackers: Vec::new(),
            confined: None,
            links: Links::default(),
            filled_percent: None,
            filled_bytes: 0,
            base: (0, 0),
        }
    }

    /// Runs the demo and judges it. [`Stop::Environment`] and [`Stop::Io`] are returned as errors, after
    /// everything was removed; every other end returns a summary with the cluster.
    pub(super) fn run(mut self) -> Result<(Summary, Cluster), Stop> {
        match self.perform() {
            Err(stop @ (Stop::Environment(_) | Stop::Io(_))) => Err(stop),
            other => Ok(self.judge(other.err())),
        }
    }

    fn perform(&mut self) -> Result<(), Stop> {
        if self.play.fills {
            // Before there is a standby, which would get every page again and again.
            self.cluster.start_primary(Host::A)?;
            self.fill()?;
        }
        self.cluster.start_standby(Host::B)?;
        self.wait_until("the first standby to listen", READY_LIMIT, |d| d.listening)?;
        if !self.play.fills {
            self.cluster.start_primary(Host::A)?;
        }
        self.booted = true;
        self.wait_until("the VM to be protected", PROTECTED_LIMIT, |d| d.protected)?;
        self.load = Some(Load::start(self.play.vm, self.play.clients, self.play.rate)?);
        let begin = Instant::now();
        for moment in moments(&self.play) {
            self.play_until(begin + moment)?;
            self.kill_the_primary()?;
        }
        self.play_until(begin + self.play.time)
    }

    /// Has the guest write to all of its memory.
    fn fill(&mut self) -> Result<(), Stop> {
        let failed = |why: ClientError| Stop::Failed(format!("the guest does not fill its memory: {why}"));
        let began = Instant::now();
        let mut filling = loop {
            match Filling::start(self.play.vm) {
                Ok(filling) => break filling,
                Err(why) if began.elapsed() > READY_LIMIT => return Err(failed(why)),
                Err(_) => self.tick()?,
            }
        };
        loop {
            let percent = filling.percent().map_err(failed)?;
            if percent == 100 {
                break;
            }
            if began.elapsed() > FILL_LIMIT {
                let limit = FILL_LIMIT.as_secs();
                return Err(Stop::Failed(format!(
                    "the guest has filled {percent} % of its memory in {limit} s"
                )));
            }
            self.filled_percent = Some(percent);
            self.tick()?;
        }
        self.filled_percent = None;
        self.filled_bytes = filling.finish().map_err(failed)?;
        self.status.say(&format!("the guest has written to {} MiB of its memory", self.filled_bytes >> 20));
        Ok(())
    }

    fn kill_the_primary(&mut self) -> Result<(), Stop> {
        self.wait_until("the VM to be protected", PROTECTED_LIMIT, |d| d.protected)?;
        let victim = self.active;
        let pid = self.cluster.node(victim).map_or(0, |n| n.pid());
        self.kills.push(Kill { at_us: now_us(), over_us: None });
        self.cluster.kill(victim);
        self.protected = false;
        self.status.say(&format!("killed host {victim} (process {pid}) with SIGKILL"));
        self.wait_until("a takeover", TAKEOVER_LIMIT, |d| d.active != victim)?;
        self.wait_until("the VM to be protected again", PROTECTED_LIMIT, |d| d.protected)
    }

    fn play_until(&mut self, end: Instant) -> Result<(), Stop> {
        while Instant::now() < end {
            self.tick()?;
        }
        Ok(())
    }

    fn wait_until(&mut self, what: &str, limit: Duration, done: impl Fn(&Self) -> bool) -> Result<(), Stop> {
        let deadline = Instant::now() + limit;
        while !done(self) {
            if Instant::now() > deadline {
                return Err(Stop::Failed(format!(
                    "waited {} s for {what}{}",
                    limit.as_secs(),
                    self.last_words_of_all()
                )));
            }
            self.tick()?;
        }
        Ok(())
    }

    /// Looks at everything once.
    fn tick(&mut self) -> Result<(), Stop> {
        thread::sleep(TICK);
        if self.interrupt.load(Ordering::Relaxed) {
            return Err(Stop::Interrupted);
        }
        // Deaths before events, so that everything a process said before its death is known here.
        let ended = self.cluster.reap()?;
        for (host, record) in self.cluster.poll()? {
            self.note(host, &record);
        }
        for (host, status) in ended {
            self.note_end(host, status)?;
        }
        self.heal()?;
        if self.load.as_ref().is_some_and(Load::all_gone) {
            return Err(Stop::Failed("every client's connection broke".into()));
        }
        if self.status.due() {
            let line = self.line();
            self.status.show(&line);
        }
        Ok(())
    }

    fn note(&mut self, host: Host, record: &Record) {
        match &record.event {
            Event::Started { tracker: Some(tracker), .. } if !self.trackers.contains(tracker) => {
                self.trackers.push(tracker.clone());
            }
            Event::Confined { sandbox } => self.confined = Some(self.confined.unwrap_or(true) && *sandbox),
            Event::StandbyAttached { link, .. } | Event::PrimaryAttached { link, .. } => {
                self.links.note(*link)
            }
            Event::Listening { .. } => self.listening = true,
            &Event::BaseProgress { sent_pages, total_pages, .. } => self.base = (sent_pages, total_pages),
            &Event::Protected { base_ms, .. } if host == self.active => {
                self.note_protected(record.t_us, base_ms)
            }
            Event::Unprotected { why } if host == self.active => {
                self.protected = false;
                self.status.say(&format!("host {host} runs the VM unprotected: {why}"));
            }
            Event::LinkLost { .. } if host == self.active => self.protected = false,
            Event::ArbiterUnreachable { why } => {
                self.status.say(&format!("host {host} waits for the arbiter: {why}"))
            }
            Event::Takeover { .. } if host != self.active => self.note_takeover(host, record),
            // The frame may leave before the takeover is reported: the vCPUs run while the report is written.
            &Event::FirstPacket { after_us } => self.first_packets.push((record.pid, after_us)),
            _ => {}
        }
    }

    fn note_protected(&mut self, t_us: u64, base_ms: u64) {
        self.protected = true;
        if let Some(kill) = self.kills.last_mut() {
            kill.over_us.get_or_insert(t_us);
        }
        let (runs, waits) = (self.active, self.active.other());
        self.status.say(&format!(
            "protected: the VM runs on host {runs}, host {waits} has all of it (base checkpoint {base_ms} ms)"
        ));
    }

    fn note_takeover(&mut self, host: Host, record: &Record) {
        let Event::Takeover {
            detect_us,
            settle_us,
            arbitrate_us,
            restore_us,
            first_packet_us,
            total_us,
            input_given,
            output_repeated,
            ..
        } = record.event
        else {
            return;
        };
        let old = self.active;
        self.active = host;
        self.protected = false;
        self.orphaned = None;
        if self.cluster.alive(old) {
            self.superseded = Some((old, Instant::now() + SUPERSEDED_LIMIT));
            self.status.say(&format!("host {host} took host {old} for dead"));
        }
        let times = TakeoverTimes {
            detect_us,
            settle_us,
            arbitrate_us,
            restore_us,
            first_packet_us,
            total_us,
            input_given,
            output_repeated,
        };
        self.takeovers.push((record.pid, times));
        self.status.say(&format!(
            "host {host} took over in {} (detection {}, settling {}, arbitration {}, restore {})",
            time(total_us),
            time(detect_us),
            time(settle_us),
            time(arbitrate_us),
            time(restore_us)
        ));
    }

    /// A process ended without being killed by us.
    fn note_end(&mut self, host: Host, status: ExitStatus) -> Result<(), Stop> {
        let words = self.cluster.node(host).map(|n| n.last_words(3)).unwrap_or_default();
        if status.code() == Some(exit::USAGE.into()) && self.load.is_none() {
            // Its one line, as a person would have read it.
            let line = words.lines().last().unwrap_or_default().trim();
            return Err(Stop::Environment(line.strip_prefix("outlive: ").unwrap_or(line).to_owned()));
        }
        if self.load.is_none() {
            return Err(Stop::Failed(format!("the process on host {host} ended at once ({status}){words}")));
        }
        if status.success() && host == self.active {
            return Err(Stop::Failed(format!("the VM on host {host} ended by itself{words}")));
        }
        let fenced =
            if status.code() == Some(exit::FENCED.into()) { ", it lost the arbitration" } else { "" };
        self.status.say(&format!("the process on host {host} ended ({status}{fenced}){words}"));
        self.accidents += 1;
        if self.accidents > ACCIDENTS {
            return Err(Stop::Failed("processes end again and again without being killed".into()));
        }
        Ok(())
    }

    /// Makes sure that there is a standby, and that a host runs the VM.
    fn heal(&mut self) -> Result<(), Stop> {
        if !self.booted {
            return Ok(());
        }
        let (runs, waits) = (self.active, self.active.other());
        match (self.cluster.alive(runs), self.cluster.alive(waits)) {
            (true, true) => self.check_superseded(),
            (true, false) => {
                self.superseded = None;
                self.base = (0, 0);
                Ok(self.cluster.start_standby(waits)?)
            }
            (false, true) => {
                let since = *self.orphaned.get_or_insert_with(Instant::now);
                if since.elapsed() < TAKEOVER_LIMIT {
                    return Ok(());
                }
                Err(Stop::Failed(format!("host {waits} did not take over{}", self.last_words_of_all())))
            }
            (false, false) => Err(Stop::Failed(format!("both hosts are dead{}", self.last_words_of_all()))),
        }
    }

    fn check_superseded(&self) -> Result<(), Stop> {
        match self.superseded {
            Some((host, until)) if Instant::now() > until => Err(Stop::Failed(format!(
                "host {} took over, but the old primary on host {host} did not stop{}",
                host.other(),
                self.last_words_of_all()
            ))),
            _ => Ok(()),
        }
    }

    fn last_words_of_all(&self) -> String {
        let words = |host| {
            let node = self.cluster.node(host)?;
            Some(format!("\n  host {host} (process {}) said last:{}", node.pid(), node.last_words(5)))
        };
        Host::BOTH.into_iter().filter_map(words).collect()
    }

    /// The live line.
    fn line(&self) -> String {
        let (runs, waits) = (self.active, self.active.other());
        if let Some(percent) = self.filled_percent {
            return format!("the guest writes to all of its memory: {percent} %");
        }
        let Some(load) = &self.load else {
            let (sent, total) = self.base;
            if total == 0 {
                return "starting both hosts".into();
            }
            return format!("copying the VM to host {waits}: {} of {} pages", grouped(sent), grouped(total));
        };
        let node = self.cluster.nodes().iter().rev().find(|n| n.host == runs);
        let rate = node.map_or(0.0, |n| n.tenure.latest().rate_hz);
        let state = match (self.cluster.alive(runs), self.protected) {
            (false, _) => format!("host {runs} is dead, host {waits} takes over"),
            (true, true) => format!("{runs} → {waits}, {rate:.0} checkpoints/s"),
            (true, false) => format!("{runs}, unprotected"),
        };
        let survived = self.survived();
        let (acked, broken) = (&load.counters().acked, &load.counters().broken);
        format!(
            "{state} · {} writes acknowledged · {survived} of {} kills survived · {} connections broken",
            grouped(acked.load(Ordering::Relaxed)),
            self.play.kills,
            broken.load(Ordering::Relaxed)
        )
    }

    fn survived(&self) -> u32 {
        // There are at most 10 000 kills.
        self.kills.iter().filter(|k| k.over_us.is_some()).count() as u32
    }

    /// Ends the clients, reads everything back and makes the summary.
    fn judge(mut self, stop: Option<Stop>) -> (Summary, Cluster) {
        let patience = if stop.is_some() { HURRIED_PATIENCE } else { FINISH_PATIENCE };
        let connections = self.load.as_ref().map_or(0, |l| l.counters().connections.load(Ordering::Relaxed));
        let mut reports = self.load.take().map(|load| load.stop(patience)).unwrap_or_default();
        let verdict = if reports.is_empty() {
            verify::Verdict::default()
        } else {
            self.status.say("reading everything back");
            verify::verify(self.play.vm, &mut reports, patience)
        };
        // The last statistics. If they are unreadable, the previous ones count.
        for (host, record) in self.cluster.poll().unwrap_or_default() {
            self.note(host, &record);
        }
        let summary = self.summary(stop, verdict, &reports, connections);
        (summary, self.cluster)
    }

    fn summary(
        &self,
        stop: Option<Stop>,
        verdict: verify::Verdict,
        reports: &[Report],
        connections: u64,
    ) -> Summary {
        let end = now_us();
        let gap = |kill: &Kill| {
            let until = kill.over_us.unwrap_or(end);
            reports.iter().map(|r| r.gaps.longest_within(kill.at_us, until)).max().unwrap_or(0)
        };
        let takeover = |(pid, times): &(u32, TakeoverTimes)| {
            let reported = self.first_packets.iter().find(|(of, _)| of == pid).map(|&(_, after_us)| after_us);
            TakeoverTimes { first_packet_us: times.first_packet_us.or(reported), ..times.clone() }
        };
        let interrupted = matches!(stop, Some(Stop::Interrupted));
        Summary {
            failure: stop.filter(|_| !interrupted).map(|s| s.to_string()),
            interrupted,
            kills_planned: self.play.kills,
            kills: self.kills.len() as u32,
            survived: self.survived(),
            verdict,
            broken: reports.iter().filter_map(|r| r.failure.clone()).collect(),
            takeovers: self.takeovers.iter().map(takeover).collect(),
            gaps_us: self.kills.iter().map(gap).collect(),
            longest_gap_us: reports.iter().map(|r| r.gaps.longest_us()).max().unwrap_or(0),
            longest_connect_us: reports.iter().map(|r| r.longest_connect_us).max().unwrap_or(0),
            clients: self.play.clients,
            link: self.links.all(),
            sandbox: self.confined.unwrap_or(false),
            filled_bytes: self.filled_bytes,
            connections,
            totals: Totals::of(self.cluster.nodes().iter().map(|n| &n.tenure)),
            arbiter: self.cluster.arbiter(),
            tracker: if self.trackers.is_empty() { "unknown".into() } else { self.trackers.join("+") },
        }
    }
}

/// The moments of the kills: evenly spread, each moved at random by up to a quarter of the distance.
fn moments(play: &Play) -> Vec<Duration> {
    let distance = play.time / (play.kills + 1);
    let mut random = fastrand::Rng::with_seed(play.seed);
    (1..=play.kills).map(|n| distance.mul_f64(f64::from(n) + (random.f64() - 0.5) / 2.0)).collect()
}
