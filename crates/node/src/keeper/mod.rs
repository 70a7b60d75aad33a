//! The thread that keeps one VM as it is desired: starts its process, or adopts it, hears what it says, and starts it
//! again when it fails.

mod plan;

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, thread};

use serde_json::json;

use self::plan::{Next, Plan};
use crate::asking::{Told, ask};
use crate::definition::{Definition, DefinitionError};
use crate::ended::End;
use crate::error::NodeError;
use crate::log;
use crate::node::Shared;
use crate::process::{Life, Process};
use crate::records::{By, Desired, Record, Started, boot};
use crate::view::{State, View, now};

/// How often the thread looks.
const EVERY: Duration = Duration::from_millis(200);
/// How many looks pass between two questions to a process that has answered: one a second.
const ASK_EVERY: u32 = 5;
/// How many looks pass between two looks at the log's length.
const LOG_EVERY: u32 = 25;
/// How large the events that nobody has asked for may become: two files of this size.
const EVENTS_MAX: &str = "1M";

/// What a keeper is told.
#[derive(Debug)]
pub(crate) enum Order {
    /// The VM shall run.
    Start(Answer),
    /// It shall not. The process is told once more if it was told before: then the guest is not waited for.
    Stop { only_standby: bool, answer: Answer },
    /// The process shall end, because the host does. What is desired stays.
    Park(Answer),
    /// It may be started again after all.
    Unpark,
    /// A definition was read.
    Define(Box<Result<Definition, DefinitionError>>),
    /// The definition is gone.
    Undefine {
        /// An operator wants it forgotten, and what was desired with it.
        forget: bool,
    },
}

/// Where an order's answer goes: it says that the order is carried out from now on.
pub(crate) type Answer = Sender<Result<(), NodeError>>;

/// A keeper, seen from the node.
#[derive(Debug)]
pub(crate) struct Kept {
    orders: Sender<Order>,
    view: Arc<Mutex<View>>,
    thread: JoinHandle<()>,
}

impl Kept {
    /// Starts the thread of a VM.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn start(name: &str, definition: Source, shared: Arc<Shared>) -> io::Result<Self> {
        let (orders, heard) = channel();
        let keeper = Keeper::new(name, definition, shared);
        let view = keeper.shown.clone();
        let thread = thread::Builder::new().name("vm".into()).spawn(move || keeper.run(&heard))?;
        Ok(Self { orders, view, thread })
    }

    /// What is known of the VM.
    pub(crate) fn view(&self) -> View {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells the thread something. It ends only after its definition has gone.
    pub(crate) fn tell(&self, order: Order) {
        let _ = self.orders.send(order);
    }

    /// The thread has ended: there is neither a definition nor a process.
    pub(crate) fn is_over(&self) -> bool {
        self.thread.is_finished()
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
    /// An operator has asked for the end of this process.
    asked: bool,
    /// The host is about to end.
    parked: bool,
    plan: Plan,
    last_end: Option<End>,
    told: Option<Told>,
    foreign: Option<u32>,
    looks: u32,
    shown: Arc<Mutex<View>>,
}

impl Keeper {
    fn new(name: &str, source: Source, shared: Arc<Shared>) -> Self {
        let autostart = matches!(&source, Some(Ok(it)) if it.autostart);
        let record = shared.records.read(name).unwrap_or_else(|| Record::fresh(autostart));
        let view = View {
            name: name.to_owned(),
            state: State::Stopped,
            desired: record.desired,
            protected: false,
            has_standby: false,
            why: None,
            since: now(),
            pid: None,
            adopted: false,
            failures: 0,
            last_end: None,
            definition_changed: false,
            definition_error: None,
            status: None,
        };
        let mut keeper = Self {
            name: name.to_owned(),
            shared,
            source,
            record,
            process: None,
            since: Instant::now(),
            asked: false,
            parked: false,
            plan: Plan::default(),
            last_end: None,
            told: None,
            foreign: None,
            looks: 0,
            shown: Arc::new(Mutex::new(view)),
        };
        keeper.adopt();
        keeper.show();
        keeper
    }

    fn run(mut self, orders: &Receiver<Order>) {
        loop {
            match orders.recv_timeout(EVERY) {
                Ok(order) => self.obey(order),
                Err(RecvTimeoutError::Timeout) => {}
                // The node ends, and the process goes on.
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.look();
            self.show();
            // What is desired stays on the disk: the file may come back.
            if self.source.is_none() && self.process.is_none() {
                return;
            }
        }
    }

    /// Finds the process that an earlier node has started, or learns how it has ended.
    fn adopt(&mut self) {
        let started = self.record.process.clone().filter(|it| it.boot == boot());
        match Process::find(&self.lock(), started.as_ref().map(|it| it.pid)) {
            Ok(Some(process)) => {
                let text = match process.pid() {
                    Some(pid) => format!("the VM's process {pid} is kept from now on"),
                    None => "the VM's process is kept from now on".to_owned(),
                };
                self.tell("process_adopted", text, json!({ "pid": process.pid() }));
                self.process = Some(process);
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

    fn obey(&mut self, order: Order) {
        // Nobody may listen for an answer any more.
        match order {
            Order::Start(answer) => {
                let _ = answer.send(self.shall_run());
            }
            Order::Stop { only_standby, answer } => {
                let _ = answer.send(self.shall_stop(only_standby));
            }
            Order::Park(answer) => {
                self.parked = true;
                let _ = answer.send(if self.process.is_some() { self.end_process() } else { Ok(()) });
            }
            Order::Unpark => self.parked = false,
            Order::Define(read) => self.is_defined(*read),
            Order::Undefine { forget } => {
                self.source = None;
                if forget {
                    self.shared.records.remove(&self.name);
                }
            }
        }
    }

    fn is_defined(&mut self, read: Result<Definition, DefinitionError>) {
        if let Err(why) = &read
            && !matches!(&self.source, Some(Err(known)) if known == why)
        {
            self.tell("definition_bad", why.to_string(), json!({}));
        }
        self.source = Some(read);
    }

    fn shall_run(&mut self) -> Result<(), NodeError> {
        match &self.source {
            Some(Err(why)) if self.process.is_none() => return Err(why.clone().into()),
            None => return Err(NodeError::NoDefinition(self.name.clone(), "its file is gone".into())),
            _ => {}
        }
        self.plan.forgive();
        self.parked = false;
        self.desire(Desired::Running, By::Operator)
    }

    fn shall_stop(&mut self, only_standby: bool) -> Result<(), NodeError> {
        if let (Some(pid), None) = (self.foreign, &self.process) {
            return Err(NodeError::Foreign { vm: self.name.clone(), pid });
        }
        let waits = self.process.is_some() && self.told.as_ref().is_some_and(|it| !it.runs);
        if waits && !only_standby {
            return Err(NodeError::IsStandby(self.name.clone()));
        }
        self.desire(Desired::Stopped, By::Operator)?;
        if self.process.is_some() { self.end_process() } else { Ok(()) }
    }

    fn end_process(&mut self) -> Result<(), NodeError> {
        self.asked = true;
        let Some(process) = &mut self.process else { return Ok(()) };
        match process.terminate() {
            // It has ended meanwhile, or its number is not known yet: then it is told as soon as it is.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ESRCH as i32) => Ok(()),
            told => told.map_err(|error| NodeError::System("cannot end the VM's process".into(), error)),
        }
    }

    fn desire(&mut self, desired: Desired, by: By) -> Result<(), NodeError> {
        let record = Record { desired, by, ..self.record.clone() };
        self.shared
            .records
            .write(&self.name, &record)
            .map_err(|error| NodeError::System("cannot keep what is desired".into(), error))?;
        self.record = record;
        Ok(())
    }

    fn keep_record(&self) {
        if let Err(error) = self.shared.records.write(&self.name, &self.record) {
            tracing::error!(vm = self.name, %error, "what is known of the VM cannot be kept on the disk");
        }
    }

    fn look(&mut self) {
        match self.process.as_mut().map(Process::life) {
            None => {}
            Some(Ok(Life::Lives)) => return self.hear(),
            Some(Ok(Life::Ended(status))) => {
                let pid = self.process.as_ref().and_then(Process::pid).unwrap_or_default();
                self.has_ended(End::of_child(status, pid, &self.events()));
            }
            Some(Ok(Life::Gone)) => {
                let pid = self.process.as_ref().and_then(Process::pid).unwrap_or_default();
                self.has_ended(End::of_adopted(pid, &self.events()));
            }
            Some(Err(error)) => tracing::error!(vm = self.name, %error, "cannot look after the process"),
        }
        let wanted = self.record.desired == Desired::Running && !self.parked && !self.plan.is_given_up();
        self.foreign = None;
        if !wanted || !self.plan.wait(Instant::now()).is_zero() {
            return;
        }
        // Whoever answers there was not started by a node. Two would be one too many.
        if let Ok(told) = ask(&self.socket()) {
            self.foreign = Some(told.pid);
            self.told = Some(told);
            return;
        }
        if let Some(Ok(definition)) = &self.source {
            let arguments = self.arguments(definition);
            self.start(arguments);
        }
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
        if let (Some(told), Some(process)) = (&told, &mut self.process)
            && process.pid().is_none()
        {
            process.is_known_as(told.pid);
            if self.asked {
                let _ = self.end_process();
            }
        }
        // A process that does not answer once keeps its last answer for a while.
        let patience = self.told.is_some() && !self.looks.is_multiple_of(LOG_EVERY);
        if told.is_some() || !patience {
            self.told = told;
        }
    }

    fn start(&mut self, arguments: Vec<String>) {
        let started = log::open(&self.log())
            .and_then(|log| Process::start(&self.shared.program.path, &arguments, &self.lock(), log));
        match started {
            // The last one has not quite gone.
            Ok(None) => {}
            Ok(Some(process)) => {
                let pid = process.pid().unwrap_or_default();
                self.process = Some(process);
                self.since = Instant::now();
                (self.asked, self.told) = (false, None);
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

    fn has_ended(&mut self, end: End) {
        let limit = match &self.source {
            Some(Ok(definition)) => definition.restart_limit,
            _ => 0,
        };
        let lived = self.since.elapsed();
        let next = self.plan.ended(&end, self.asked, lived, limit, Instant::now());
        (self.process, self.told, self.asked) = (None, None, false);
        self.record.process = None;
        // A parked VM is started again with its host.
        if next == Next::Ended && !self.parked {
            self.record = Record { desired: Desired::Stopped, by: By::Guest, process: None };
        }
        self.keep_record();
        let then = match next {
            Next::Again => "; it is started again",
            Next::GivenUp => "; it has failed too often and is left alone until `outlive vm start`",
            Next::Ended | Next::Stopped => "",
        };
        let text = format!("the VM's process has ended: {}{then}", end.what);
        self.tell("process_ended", text, json!({ "code": end.code, "signal": end.signal }));
        self.last_end = Some(end);
    }

    /// What the process is given: the definition, and what a node has for it where the definition is silent.
    fn arguments(&self, definition: &Definition) -> Vec<String> {
        let mut arguments = definition.arguments();
        arguments.push(format!("--status={}", self.socket().display()));
        if definition.values("events").next().is_none() && self.shared.program.kind("events").is_some() {
            arguments.push(format!("--events={}", self.own_events().display()));
            arguments.push(format!("--events-max={EVENTS_MAX}"));
            arguments.push("--events-keep=1".into());
        }
        arguments
    }

    fn show(&self) {
        let (state, why) = self.state();
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let before = (shown.state, shown.protected);
        let told = self.told.as_ref();
        shown.protected = told.is_some_and(|it| it.protected);
        shown.has_standby = matches!(&self.source, Some(Ok(it)) if it.is_of_two_hosts());
        shown.why = why;
        shown.desired = self.record.desired;
        shown.pid = self.process.as_ref().and_then(Process::pid).or(self.foreign);
        shown.adopted = self.process.as_ref().is_some_and(Process::is_adopted);
        shown.failures = self.plan.failures();
        shown.last_end.clone_from(&self.last_end);
        shown.status = told.map(|it| it.all.clone());
        (shown.definition_changed, shown.definition_error) = match &self.source {
            Some(Ok(it)) => (self.has_other_arguments(it), None),
            Some(Err(why)) => (false, Some(why.to_string())),
            None => (false, Some("the definition was removed".into())),
        };
        if before == (state, shown.protected) {
            return;
        }
        (shown.state, shown.since) = (state, now());
        let protected = shown.protected;
        drop(shown);
        let mut text = state.name().to_owned();
        if matches!(state, State::Running | State::Standby) {
            text += if protected { ", protected" } else { ", unprotected" };
        }
        self.tell("vm_state", text, json!({ "state": state, "protected": protected }));
    }

    fn has_other_arguments(&self, definition: &Definition) -> bool {
        let of_process = self.record.process.as_ref().filter(|_| self.process.is_some());
        of_process.is_some_and(|it| it.arguments != self.arguments(definition))
    }

    fn state(&self) -> (State, Option<String>) {
        if self.process.is_some() {
            let told = self.told.as_ref();
            let state = match told {
                _ if self.asked => State::Stopping,
                Some(told) if told.runs => State::Running,
                Some(_) => State::Standby,
                None => State::Starting,
            };
            return (state, told.and_then(|it| it.why.clone()));
        }
        let end = self.last_end.as_ref().map(|it| it.what.clone());
        if let Some(pid) = self.foreign {
            return (State::Foreign, Some(format!("process {pid} has the VM, and no node has started it")));
        }
        match (&self.source, self.record.desired) {
            (None | Some(Err(_)), _) => (State::Misdefined, None),
            (_, Desired::Stopped) if self.record.by == By::Guest => (State::Ended, end),
            (_, Desired::Stopped) if self.record.by == By::Damage => {
                (State::Stopped, Some("its record cannot be read: `outlive vm start` starts it anew".into()))
            }
            (_, Desired::Stopped) => (State::Stopped, end),
            _ if self.plan.is_given_up() => (State::Failed, end),
            _ if self.parked => (State::Stopped, Some("this host is about to stop".into())),
            _ if self.plan.failures() > 0 => (State::Waiting, end),
            _ => (State::Starting, end),
        }
    }

    fn tell(&self, kind: &str, text: String, data: serde_json::Value) {
        self.shared.feed.tell(kind, Some(&self.name), text, data);
    }

    fn lock(&self) -> PathBuf {
        self.shared.places.run.join(format!("{}.lock", self.name))
    }

    fn socket(&self) -> PathBuf {
        self.shared.places.socket_of(&self.name)
    }

    fn log(&self) -> PathBuf {
        self.shared.places.log_of(&self.name)
    }

    fn own_events(&self) -> PathBuf {
        self.shared.places.state.join(format!("{}.events", self.name))
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
