//! The thread that keeps one VM as it is desired: starts its process, or adopts it, hears what it says, and starts it
//! again when it fails.

mod orders;
mod plan;
mod show;

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, thread};

use serde_json::json;

pub(crate) use self::orders::{Answer, Order};
use self::plan::{Next, Plan};
use crate::asking::{Told, ask, listener};
use crate::definition::{Definition, DefinitionError};
use crate::drain::Mode;
use crate::ended::End;
use crate::events;
use crate::figures::Meter;
use crate::log;
use crate::node::Shared;
use crate::process::{Life, Process};
use crate::records::{By, Desired, Record, Started, boot};
use crate::view::{State, View, now};
use crate::words::of_node;

/// How often the thread looks.
const EVERY: Duration = Duration::from_millis(200);
/// How many looks pass between two questions to a process that has answered: one a second.
const ASK_EVERY: u32 = 5;
/// How many looks pass between two looks at the log's length.
const LOG_EVERY: u32 = 25;
/// How many looks pass between two looks at what this host lacks for a definition: half a minute.
const JUDGE_EVERY: u32 = 150;
/// How large the events that nobody has asked for may become: two files of this size.
const EVENTS_MAX: &str = "1M";

/// A keeper, seen from the node.
#[derive(Debug)]
pub(crate) struct Kept {
    orders: Sender<Order>,
    /// Whether the thread still hears orders.
    hears: Arc<Mutex<bool>>,
    view: Arc<Mutex<View>>,
    thread: JoinHandle<()>,
}

impl Kept {
    /// Starts the thread of a VM on a host in this mode.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn start(name: &str, definition: Source, mode: Mode, shared: Arc<Shared>) -> io::Result<Self> {
        let (orders, heard) = channel();
        let keeper = Keeper::new(name, definition, mode, shared);
        let (view, hears) = (keeper.shown.clone(), keeper.hears.clone());
        // All that may wait for a file or a process is done by the thread.
        let thread = thread::Builder::new().name("vm".into()).spawn(move || keeper.run(&heard))?;
        Ok(Self { orders, hears, view, thread })
    }

    /// What is known of the VM.
    pub(crate) fn view(&self) -> View {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells the thread something. Returns whether it will be done: the thread ends after its definition has gone.
    pub(crate) fn tell(&self, order: Order) -> bool {
        let hears = self.hears.lock().unwrap_or_else(PoisonError::into_inner);
        *hears && self.orders.send(order).is_ok()
    }

    /// The thread has ended, or is about to: there is neither a definition nor a process.
    pub(crate) fn is_over(&self) -> bool {
        !*self.hears.lock().unwrap_or_else(PoisonError::into_inner) || self.thread.is_finished()
    }
}

/// What there is to start; `None`: a VM without a definition, of which only a process is left.
pub(crate) type Source = Option<Result<Definition, DefinitionError>>;

struct Keeper {
    name: String,
    shared: Arc<Shared>,
    source: Source,
    record: Record,
    process: Option<Process>,
    since: Instant,
    /// How long the log was when the process began.
    log_from: u64,
    /// An operator has asked for the end of this process.
    asked: bool,
    /// Its number is not known yet, and it is told to end as soon as it is.
    is_owed: bool,
    /// The disk does not have the record yet.
    is_unkept: bool,
    /// The host is about to end.
    parked: bool,
    /// The host is drained, and the VM did not run here: it is not started.
    held: bool,
    /// Nothing was known of the VM before.
    is_new: bool,
    hears: Arc<Mutex<bool>>,
    plan: Plan,
    last_end: Option<End>,
    told: Option<Told>,
    meter: Meter,
    foreign: Option<u32>,
    looks: u32,
    /// Whether the VM has a process is known.
    has_looked: bool,
    warnings: Vec<String>,
    shown: Arc<Mutex<View>>,
}

impl Keeper {
    fn new(name: &str, source: Source, mode: Mode, shared: Arc<Shared>) -> Self {
        let autostart = matches!(&source, Some(Ok(it)) if it.autostart);
        let known = shared.records.read(name);
        let is_new = known.is_none();
        let record = known.unwrap_or_else(|| Record::fresh(autostart));
        let view = View {
            name: name.to_owned(),
            state: State::Starting,
            desired: record.desired,
            protected: false,
            has_standby: false,
            why: Some(show::LOOKS.to_owned()),
            since: now(),
            has_process: false,
            pid: None,
            adopted: false,
            failures: 0,
            last_end: None,
            definition_changed: false,
            definition_error: show::definition_error(&source),
            warnings: Vec::new(),
            status: None,
        };
        Self {
            name: name.to_owned(),
            shared,
            source,
            record,
            process: None,
            since: Instant::now(),
            log_from: 0,
            asked: false,
            is_owed: false,
            is_unkept: false,
            parked: mode == Mode::Stopping,
            held: matches!(mode, Mode::Draining | Mode::Drained),
            is_new,
            hears: Arc::new(Mutex::new(true)),
            plan: Plan::default(),
            last_end: None,
            told: None,
            meter: Meter::default(),
            foreign: None,
            looks: 0,
            has_looked: false,
            warnings: Vec::new(),
            shown: Arc::new(Mutex::new(view)),
        }
    }

    fn run(mut self, orders: &Receiver<Order>) {
        self.adopt();
        // A drained host is still the standby of VMs that have left it.
        let has_left = !self.is_new && matches!(&self.source, Some(Ok(it)) if it.is_of_two_hosts());
        self.held &= self.process.is_none() && !has_left;
        self.has_looked = true;
        self.show();
        self.judge();
        loop {
            match orders.recv_timeout(EVERY) {
                Ok(order) => self.obey(order),
                Err(RecvTimeoutError::Timeout) => {}
                // The node ends, and the process goes on.
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.look();
            // What is desired stays on the disk: the file may come back.
            while self.source.is_none() && self.process.is_none() {
                match self.last_order(orders) {
                    Some(order) => self.obey(order),
                    None => return self.shared.figures.forget(&self.name),
                }
            }
            self.show();
        }
    }

    /// What was told before the thread ends. `None`: nothing, and nobody is heard any more.
    fn last_order(&self, orders: &Receiver<Order>) -> Option<Order> {
        let mut hears = self.hears.lock().unwrap_or_else(PoisonError::into_inner);
        let order = orders.try_recv().ok();
        *hears = order.is_some();
        order
    }

    /// Finds the process that an earlier node has started, or learns how it has ended.
    fn adopt(&mut self) {
        let started = self.record.process.clone().filter(|it| it.boot == boot());
        // If an operator has asked for its end, and an earlier node has told it: a second word would end it at once.
        self.asked = self.record.is_told();
        match Process::find(&self.lock()) {
            Ok(Some(process)) => {
                self.process = Some(process);
                self.identify();
                let Some(process) = &self.process else { return };
                let text = match process.pid() {
                    Some(pid) => format!("the VM's process {pid} is kept from now on"),
                    None => "the VM's process is kept from now on".to_owned(),
                };
                self.tell("process_adopted", text, json!({ "pid": process.pid() }));
            }
            Ok(None) => {
                if let Some(Started { pid, .. }) = started {
                    self.has_ended(End::of_adopted(pid, &self.events()));
                } else if self.record.process.take().is_some() {
                    // The host was started anew. Whatever has ended the process, what is desired has not changed.
                    self.keep_record();
                }
            }
            Err(error) => tracing::error!(vm = self.name, %error, "cannot look for its process"),
        }
    }

    /// Asks the kernel which process listens for the VM, unless it is known.
    fn identify(&mut self) {
        let socket = self.socket();
        if let Some(process) = self.process.as_mut().filter(|it| it.pid().is_none())
            && let Ok(pid) = listener(&socket)
        {
            process.is(pid);
        }
    }

    /// The number of the process, or of the one that was kept last.
    fn pid(&self) -> u32 {
        let kept = || self.record.process.as_ref().map(|it| it.pid);
        self.process.as_ref().and_then(Process::pid).or_else(kept).unwrap_or_default()
    }

    fn keep_record(&mut self) {
        let kept = self.shared.records.write(&self.name, &self.record);
        if let Err(error) = &kept
            && !self.is_unkept
        {
            tracing::error!(
                vm = self.name, %error, "what is known of the VM cannot be kept on the disk: make room; it is tried again"
            );
        }
        self.is_unkept = kept.is_err();
    }

    fn look(&mut self) {
        if self.is_unkept && self.looks.is_multiple_of(ASK_EVERY) {
            self.keep_record();
        }
        match self.process.as_mut().map(Process::life) {
            None => {}
            Some(Ok(Life::Lives)) => return self.hear(),
            Some(Ok(Life::Ended(status))) => {
                let (pid, log) = (self.pid(), self.log());
                self.has_ended(End::of_child(status, pid, &self.events(), (&log, self.log_from)));
            }
            Some(Ok(Life::Gone)) => {
                self.has_ended(End::of_adopted(self.pid(), &self.events()));
            }
            Some(Err(error)) => tracing::error!(vm = self.name, %error, "cannot look after the process"),
        }
        let may = !self.parked && !self.held && !self.plan.is_given_up();
        let wanted = self.record.desired == Desired::Running && may;
        let starts = wanted && self.plan.wait(Instant::now()).is_zero();
        self.looks = self.looks.wrapping_add(1);
        if self.looks.is_multiple_of(JUDGE_EVERY) {
            self.judge();
        }
        if !starts && !self.looks.is_multiple_of(ASK_EVERY) {
            return;
        }
        if self.finds_another() || !starts {
            return;
        }
        if let Some(Ok(definition)) = &self.source {
            let arguments = self.arguments(definition);
            self.start(arguments);
        }
    }

    /// Looks at what this host lacks for the definition.
    fn judge(&mut self) {
        self.warnings = match &self.source {
            Some(Ok(it)) => it.warnings(&self.shared.program).iter().map(ToString::to_string).collect(),
            _ => Vec::new(),
        };
    }

    /// Looks for a process that was not started by a node: with one of the node's there would be two.
    fn finds_another(&mut self) -> bool {
        self.told = ask(&self.socket()).ok();
        self.foreign = self.told.as_ref().map(|it| it.pid);
        self.foreign.is_some()
    }

    fn hear(&mut self) {
        self.looks = self.looks.wrapping_add(1);
        if self.looks.is_multiple_of(LOG_EVERY)
            && let Err(error) = log::bound(&self.log(), self.shared.log_max)
        {
            tracing::warn!(vm = self.name, %error, "its log cannot be kept short");
        }
        if self.told.is_some() && !self.looks.is_multiple_of(ASK_EVERY) {
            return;
        }
        let told = ask(&self.socket()).ok();
        // Others may listen there.
        let told = told.filter(|told| self.process.as_mut().is_some_and(|it| it.is(told.pid)));
        if self.is_owed {
            let _ = self.end_process();
        }
        if told.is_some() && !self.asked {
            self.carry_out();
        }
        if let Some(told) = &told
            && let Some(point) = self.meter.look(&self.socket(), told.pid)
        {
            self.shared.figures.keep(&self.name, point);
        }
        // A process that does not answer once keeps its last answer for a while.
        let patience = self.told.is_some() && !self.looks.is_multiple_of(LOG_EVERY);
        if told.is_some() || !patience {
            self.told = told;
        }
    }

    fn start(&mut self, arguments: Vec<String>) {
        self.log_from = std::fs::metadata(self.log()).map_or(0, |it| it.len());
        let (program, state) = (&self.shared.program.path, &self.shared.places.state);
        let started = self
            .make_events()
            .and_then(|()| log::open(&self.log()))
            .and_then(|log| Process::start(program, &arguments, state, &self.lock(), log));
        match started {
            // The last one has not quite gone.
            Ok(None) => {}
            Ok(Some(process)) => {
                let pid = process.pid().unwrap_or_default();
                self.process = Some(process);
                self.since = Instant::now();
                (self.asked, self.told, self.foreign) = (false, None, None);
                self.meter = Meter::default();
                self.record.untold = None;
                self.record.process = Some(Started { pid, boot: boot(), arguments });
                self.keep_record();
                self.tell("process_started", format!("the VM's process is {pid}"), json!({ "pid": pid }));
            }
            Err(error) => {
                self.since = Instant::now();
                self.has_ended(End::not_started(format!("the process cannot be started: {error}")));
            }
        }
    }

    fn has_ended(&mut self, mut end: End) {
        end.what = of_node(&end.what, &self.name);
        let limit = match &self.source {
            Some(Ok(definition)) => definition.restart_limit,
            _ => 0,
        };
        let lived = self.since.elapsed();
        let next = self.plan.ended(&end, self.asked, lived, limit, Instant::now());
        (self.process, self.told) = (None, None);
        (self.asked, self.is_owed) = (false, false);
        (self.record.process, self.record.untold) = (None, None);
        // A parked VM is started again with its host.
        if next == Next::Ended && !self.parked {
            self.record = Record { desired: Desired::Stopped, by: By::Guest, ..self.record.clone() };
        }
        self.keep_record();
        let then = match next {
            Next::Again => "; it is started again".to_owned(),
            Next::GivenUp => {
                format!("; it has failed too often and is left alone until `outlive vm start {}`", self.name)
            }
            Next::Ended | Next::Stopped => String::new(),
        };
        let text = format!("the VM's process has ended: {}{then}", end.what);
        self.tell("process_ended", text, json!({ "code": end.code, "signal": end.signal }));
        self.last_end = Some(end);
    }

    /// What the process is given: the definition, and what a node has for it where the definition is silent.
    fn arguments(&self, definition: &Definition) -> Vec<String> {
        let mut arguments = definition.arguments();
        arguments.push(format!("--status={}", self.socket().display()));
        if self.has_own_events(definition) {
            arguments.push(format!("--events={}", self.own_events().display()));
            arguments.push(format!("--events-max={EVENTS_MAX}"));
            arguments.push("--events-keep=1".into());
        }
        arguments
    }

    /// The node has a place for the events where the definition has none.
    fn has_own_events(&self, definition: &Definition) -> bool {
        definition.values("events").next().is_none() && self.shared.program.kind("events").is_some()
    }

    /// Makes the place of the events for whoever the process will be. Call it while there is no process.
    fn make_events(&self) -> io::Result<()> {
        let Some(Ok(definition)) = &self.source else { return Ok(()) };
        if !self.has_own_events(definition) {
            return Ok(());
        }
        let places = &self.shared.places;
        // Where an earlier release has had them.
        let old = places.state.join(format!("{}.events", self.name));
        let user = definition.values("user").next();
        events::prepare(&places.events_of(&self.name), &old, user.as_deref()).map_err(|error| {
            let folder = places.events_of(&self.name);
            io::Error::other(format!("no place for its events ({}): {error}", folder.display()))
        })
    }

    fn tell(&self, kind: &str, text: String, data: serde_json::Value) {
        self.shared.feed.tell(kind, Some(&self.name), text, data);
    }

    fn lock(&self) -> PathBuf {
        self.shared.places.lock_of(&self.name)
    }

    fn socket(&self) -> PathBuf {
        self.shared.places.socket_of(&self.name)
    }

    fn log(&self) -> PathBuf {
        self.shared.places.log_of(&self.name)
    }

    fn own_events(&self) -> PathBuf {
        self.shared.places.events_of(&self.name)
    }

    /// Where the process's events are: those of its own arguments, which may be older than the definition.
    fn events(&self) -> PathBuf {
        let given =
            self.record.process.as_ref().and_then(|it| {
                it.arguments.iter().rev().find_map(|argument| argument.strip_prefix("--events="))
            });
        given.map_or_else(|| self.own_events(), PathBuf::from)
    }
}
