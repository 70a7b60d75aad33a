//! The node: all VMs of a host.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::definition::{self, Folder, conflict, is_name};
use crate::drain::{self, Mode, Modes};
use crate::error::NodeError;
use crate::feed::Feed;
use crate::jobs::{Job, Jobs, Kind, Work};
use crate::keeper::{Kept, Order, make_folder};
use crate::log;
use crate::program::Program;
use crate::records::{Desired, Records};
use crate::view::{State, View};

/// How often the definitions are looked at.
const LOOKS: Duration = Duration::from_secs(1);
/// How often a job looks.
const STEP: Duration = Duration::from_millis(50);
/// How long a process may take until it says something. It may wait for its arbiter before that, and say so.
const STARTS: Duration = Duration::from_secs(60);
/// How long the end of a VM may take: as long as a guest may be given (`--stop-within`), and some more.
const STOPS: Duration = Duration::from_secs(3700);
/// How long `outlive hand-over` may take. It gives up long before.
const HANDS_OVER: Duration = Duration::from_secs(60);
/// The most VMs that a host may have.
const MOST: usize = 1000;

/// Where a node has its files.
#[derive(Clone, Debug)]
pub struct Places {
    /// Definitions.
    pub definitions: PathBuf,
    /// What is desired, and which processes there are. It must survive a restart of the host.
    pub state: PathBuf,
    /// Sockets and locks of the VMs. It need not.
    pub run: PathBuf,
    /// Logs of the VMs.
    pub logs: PathBuf,
}

impl Places {
    /// Where a VM's process is asked.
    pub(crate) fn socket_of(&self, vm: &str) -> PathBuf {
        self.run.join(format!("{vm}.sock"))
    }

    /// Where its output goes.
    pub(crate) fn log_of(&self, vm: &str) -> PathBuf {
        self.logs.join(format!("{vm}.log"))
    }
}

/// What the threads of a node have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) places: Places,
    pub(crate) program: Program,
    pub(crate) records: Records,
    pub(crate) feed: Arc<Feed>,
    /// The longest log, in bytes.
    pub(crate) log_max: u64,
}

/// Why there is no node.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A directory cannot be used.
    #[error("cannot use {}: {source}; make it a directory of this user, or give another one with {option}", .path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// The option that names it.
        option: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Another node has it.
    #[error("another node runs with {}: one host has one node; `outlive node status` asks it", .0.display())]
    Taken(PathBuf),
    /// A thread cannot be made.
    #[error("cannot start a thread: {0}; let this user have more of them")]
    Thread(#[source] io::Error),
}

/// A host and its VMs, as the API tells it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct NodeView {
    pub(crate) host: String,
    pub(crate) version: String,
    pub(crate) pid: u32,
    pub(crate) since: String,
    pub(crate) mode: Mode,
    /// VMs by state.
    pub(crate) vms: BTreeMap<String, u32>,
    /// VMs that run here and that no standby has.
    pub(crate) unprotected: Vec<String>,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    host: String,
    since: String,
    folder: Folder,
    shared: Arc<Shared>,
    vms: Mutex<BTreeMap<String, Kept>>,
    pub(crate) jobs: Jobs,
    pub(crate) modes: Modes,
    _only: File,
}

impl Node {
    /// Starts the node of the host of this name: adopts the VMs that run, and starts those that should.
    ///
    /// # Errors
    /// See [`StartError`]. A bad definition is none: its VM says what is wrong.
    pub fn start(host: &str, places: Places, program: Program) -> Result<Arc<Self>, StartError> {
        let vms = places.state.join("vms");
        for (path, option) in [
            (&places.definitions, "--vms"),
            (&vms, "--state"),
            (&places.run, "--run"),
            (&places.logs, "--logs"),
        ] {
            let wrong = |source| StartError::Folder { path: path.clone(), option, source };
            make_folder(path).map_err(wrong)?;
            std::fs::read_dir(path).map_err(wrong)?;
        }
        let state = |source| StartError::Folder { path: places.state.clone(), option: "--state", source };
        let only = only(&places.state.join("node.lock")).map_err(state)?;
        let only = only.ok_or_else(|| StartError::Taken(places.state.clone()))?;
        let records = Records::open(vms).map_err(state)?;
        let modes = Modes::open(places.state.join("mode.json"));
        let feed = Arc::new(Feed::new());
        let folder = Folder::new(places.definitions.clone(), host.to_owned());
        let shared = Shared { places, program, records, feed: feed.clone(), log_max: log::MOST };
        let node = Arc::new(Self {
            host: host.to_owned(),
            since: crate::view::now(),
            folder,
            shared: Arc::new(shared),
            vms: Mutex::default(),
            jobs: Jobs::new(feed),
            modes,
            _only: only,
        });
        let seen = node.folder.seen().ok();
        node.read_definitions();
        node.adopt_undefined();
        let weak = Arc::downgrade(&node);
        thread::Builder::new()
            .name("definitions".into())
            .spawn(move || watch(&weak, seen))
            .map_err(StartError::Thread)?;
        Ok(node)
    }

    /// Events of this node.
    pub(crate) fn feed(&self) -> &Arc<Feed> {
        &self.shared.feed
    }

    /// The host.
    pub(crate) fn view(&self) -> NodeView {
        let all = self.list();
        let mut vms = BTreeMap::new();
        for vm in &all {
            *vms.entry(vm.state.name().to_owned()).or_default() += 1;
        }
        let bare = all.iter().filter(|it| it.state == State::Running && !it.protected);
        NodeView {
            host: self.host.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            since: self.since.clone(),
            mode: self.modes.get(),
            vms,
            unprotected: bare.map(|it| it.name.clone()).collect(),
        }
    }

    /// All VMs, by name.
    pub(crate) fn list(&self) -> Vec<View> {
        self.vms().values().map(Kept::view).collect()
    }

    /// One VM.
    ///
    /// # Errors
    /// There is none of this name.
    pub(crate) fn get(&self, name: &str) -> Result<View, NodeError> {
        self.vms().get(name).map(Kept::view).ok_or_else(|| NodeError::NoSuchVm(name.to_owned()))
    }

    /// The end of a VM's log.
    ///
    /// # Errors
    /// There is none of this name, or the log cannot be read.
    pub(crate) fn log(&self, name: &str, bytes: u64) -> Result<String, NodeError> {
        self.get(name)?;
        let path = self.shared.places.log_of(name);
        log::tail(&path, bytes).map_err(|error| NodeError::System("cannot read the VM's log".into(), error))
    }

    /// Takes a definition, new or changed. A process that runs keeps what it was started with.
    ///
    /// # Errors
    /// See [`NodeError`]; then nothing has changed.
    pub(crate) fn define(&self, name: &str, text: &str) -> Result<View, NodeError> {
        if !is_name(name) {
            return Err(NodeError::BadName(name.to_owned()));
        }
        if text.len() > definition::LONGEST {
            return Err(NodeError::BadRequest(format!(
                "a definition has at most {} bytes",
                definition::LONGEST
            )));
        }
        let definition = self.folder.parse(name, text, &self.shared.program)?;
        // Two that are defined at a time see each other.
        let mut vms = self.vms();
        let others = self.folder.read(&self.shared.program).map_err(|error| self.no_folder(error))?;
        if let Some(conflict) = conflict(&definition, others.values().flatten()) {
            return Err(conflict.into());
        }
        if !vms.contains_key(name) && vms.len() >= MOST {
            return Err(NodeError::BadRequest(format!("a host has at most {MOST} VMs")));
        }
        self.folder.write(name, text).map_err(|error| self.no_folder(error))?;
        self.keep(&mut vms, name, Some(Ok(definition)));
        self.feed().tell("vm_defined", Some(name), "the VM is defined".into(), json!({}));
        drop(vms);
        self.get(name)
    }

    /// Removes a definition.
    ///
    /// # Errors
    /// See [`NodeError`]; then nothing has changed.
    pub(crate) fn undefine(&self, name: &str) -> Result<(), NodeError> {
        let vms = self.vms();
        let vm = vms.get(name).ok_or_else(|| NodeError::NoSuchVm(name.to_owned()))?;
        let view = vm.view();
        if view.pid.is_some() || view.desired == Desired::Running && view.state != State::Misdefined {
            return Err(NodeError::HasProcess(name.to_owned()));
        }
        self.folder.remove(name).map_err(|error| self.no_folder(error))?;
        vm.tell(Order::Undefine { forget: true });
        self.feed().tell("vm_undefined", Some(name), "the VM's definition is removed".into(), json!({}));
        Ok(())
    }

    fn no_folder(&self, error: io::Error) -> NodeError {
        NodeError::System(format!("cannot use {}", self.shared.places.definitions.display()), error)
    }

    /// Starts a VM. The job ends when its process says what it does.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub(crate) fn begin_start(self: &Arc<Self>, name: &str) -> Result<Job, NodeError> {
        if self.modes.get() != Mode::Active {
            return Err(NodeError::Drained);
        }
        let view = self.get(name)?;
        if let Some(why) = view.definition_error.filter(|_| view.pid.is_none()) {
            return Err(NodeError::NoDefinition(name.to_owned(), why));
        }
        if view.state == State::Foreign {
            return Err(NodeError::Foreign { vm: name.to_owned(), pid: view.pid.unwrap_or_default() });
        }
        let (node, name) = (self.clone(), name.to_owned());
        self.jobs.begin((Kind::Start, Some(&name.clone())), false, move |work| node.start_vm(&name, work))
    }

    fn start_vm(&self, name: &str, work: &Work) -> Result<Value, NodeError> {
        let began = Instant::now();
        let before = self.get(name)?.last_end;
        self.order(name, Order::Start)?;
        work.at(0, 1, "the process starts");
        self.wait(name, STARTS, "the process's first word", |view| match view.state {
            State::Running | State::Standby => Ok(Some(json!({
                "took_ms": began.elapsed().as_millis() as u64,
                "state": view.state,
                "pid": view.pid,
            }))),
            State::Foreign => {
                Err(NodeError::Foreign { vm: view.name.clone(), pid: view.pid.unwrap_or_default() })
            }
            _ if view.last_end.is_some() && view.last_end != before => {
                let end = view.last_end.as_ref().map(|it| it.what.clone()).unwrap_or_default();
                Err(NodeError::Failed(format!("{end}{}", self.last_line(name))))
            }
            _ => Ok(None),
        })
    }

    /// The last line of a VM's log, which says what is wrong.
    fn last_line(&self, name: &str) -> String {
        let tail = self.log(name, 4096).unwrap_or_default();
        tail.lines().next_back().map(|line| format!(" ({})", line.trim())).unwrap_or_default()
    }

    /// Stops a VM: presses its power button. `only_standby`: ends its protection by this host instead. `now`: the
    /// guest is not waited for.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub(crate) fn begin_stop(
        self: &Arc<Self>,
        name: &str,
        only_standby: bool,
        now: bool,
    ) -> Result<Job, NodeError> {
        let view = self.get(name)?;
        if view.state == State::Standby && !only_standby {
            return Err(NodeError::IsStandby(name.to_owned()));
        }
        let (node, name) = (self.clone(), name.to_owned());
        self.jobs.begin((Kind::Stop, Some(&name.clone())), false, move |work| {
            node.stop_vm(&name, only_standby, now, work)
        })
    }

    fn stop_vm(&self, name: &str, only_standby: bool, now: bool, work: &Work) -> Result<Value, NodeError> {
        let began = Instant::now();
        let stop = |answer| Order::Stop { only_standby, answer };
        self.order(name, stop)?;
        if now {
            // A second word means that the guest is not waited for.
            self.order(name, stop)?;
        }
        work.at(0, 1, if now { "the VM is stopped" } else { "the guest shuts down" });
        self.wait(name, STOPS, "the end of the process", |view| {
            let end = view.last_end.as_ref().map(|it| it.what.clone());
            let took = began.elapsed().as_millis() as u64;
            Ok(view.pid.is_none().then(|| json!({ "took_ms": took, "end": end })))
        })
    }

    /// Moves a VM to its standby.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub(crate) fn begin_hand_over(self: &Arc<Self>, name: &str) -> Result<Job, NodeError> {
        let view = self.get(name)?;
        match view.state {
            State::Running | State::Foreign => {}
            State::Standby => return Err(NodeError::IsStandby(name.to_owned())),
            _ => return Err(NodeError::NotRunning(name.to_owned())),
        }
        let (node, name) = (self.clone(), name.to_owned());
        self.jobs.begin((Kind::HandOver, Some(&name.clone())), false, move |work| {
            work.at(0, 1, "the VM moves to its standby");
            node.hand_over(&name)
        })
    }

    /// Moves a VM to its standby, as `outlive hand-over` does.
    ///
    /// # Errors
    /// The command's words.
    pub(crate) fn hand_over(&self, name: &str) -> Result<Value, NodeError> {
        let began = Instant::now();
        let socket = self.shared.places.socket_of(name);
        let mut command = Command::new(&self.shared.program.path);
        command.arg("hand-over").arg("--socket").arg(socket);
        let (ended, said) = run(command, HANDS_OVER)
            .map_err(|error| NodeError::System("cannot run outlive hand-over".into(), error))?;
        let took = began.elapsed().as_millis() as u64;
        match ended {
            Some(true) => Ok(json!({ "took_ms": took, "said": said })),
            Some(false) => Err(NodeError::Failed(said)),
            None => Err(NodeError::TooLong("the answer to the hand-over".into(), HANDS_OVER.as_secs())),
        }
    }

    /// Moves all VMs that run here to their standbys, one after another, and starts none from then on. `stop`: the
    /// host is about to stop, so what cannot be moved is stopped, and so is every standby.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub(crate) fn begin_drain(self: &Arc<Self>, stop: bool, wait: Duration) -> Result<Job, NodeError> {
        let node = self.clone();
        self.jobs.begin((Kind::Drain, None), true, move |work| drain::drain(&node, stop, wait, work))
    }

    /// Ends the maintenance. VMs stay where they are.
    ///
    /// # Errors
    /// A job is under way, or the disk does not take it.
    pub(crate) fn undrain(&self) -> Result<NodeView, NodeError> {
        let running = self.jobs.list().into_iter().find(|it| it.kind == Kind::Drain && it.ended.is_none());
        if let Some(Job { id: job, .. }) = running {
            return Err(NodeError::Busy { what: "this host".into(), job });
        }
        self.modes.set(Mode::Active, self.feed())?;
        self.vms().values().for_each(|vm| vm.tell(Order::Unpark));
        Ok(self.view())
    }

    /// Gives an order to a VM's keeper.
    ///
    /// # Errors
    /// There is none of this name, or what the keeper says.
    pub(crate) fn order(
        &self,
        name: &str,
        order: impl FnOnce(crate::keeper::Answer) -> Order,
    ) -> Result<(), NodeError> {
        let (answer, heard) = std::sync::mpsc::channel();
        match self.vms().get(name) {
            Some(vm) => vm.tell(order(answer)),
            None => return Err(NodeError::NoSuchVm(name.to_owned())),
        }
        // It may be asking its process, which takes two seconds at most.
        let heard = heard.recv_timeout(Duration::from_secs(10));
        heard.map_err(|_| NodeError::NoSuchVm(name.to_owned()))?
    }

    /// Waits until `seen` says something of a VM.
    ///
    /// # Errors
    /// What it says, or that it took too long.
    pub(crate) fn wait<T>(
        &self,
        name: &str,
        most: Duration,
        what: &str,
        seen: impl Fn(&View) -> Result<Option<T>, NodeError>,
    ) -> Result<T, NodeError> {
        let began = Instant::now();
        loop {
            if let Some(it) = seen(&self.get(name)?)? {
                return Ok(it);
            }
            if began.elapsed() > most {
                return Err(NodeError::TooLong(what.to_owned(), most.as_secs()));
            }
            thread::sleep(STEP);
        }
    }

    /// Processes whose definition has gone are kept, too, until they end.
    fn adopt_undefined(&self) {
        let mut vms = self.vms();
        for name in self.shared.records.names().unwrap_or_default() {
            if !vms.contains_key(&name) {
                self.keep(&mut vms, &name, None);
            }
        }
    }

    fn keep(&self, vms: &mut BTreeMap<String, Kept>, name: &str, source: crate::keeper::Source) {
        if let (Some(vm), Some(read)) = (vms.get(name).filter(|it| !it.is_over()), &source) {
            vm.tell(Order::Define(Box::new(read.clone())));
            return;
        }
        match Kept::start(name, source, self.shared.clone()) {
            Ok(kept) => drop(vms.insert(name.to_owned(), kept)),
            Err(error) => tracing::error!(vm = name, %error, "the VM is not kept: there is no thread for it"),
        }
    }

    fn read_definitions(&self) {
        let mut vms = self.vms();
        let read = match self.folder.read(&self.shared.program) {
            Ok(read) => read,
            Err(error) => {
                tracing::error!(%error, "the definitions cannot be read; those that are known count");
                return;
            }
        };
        vms.retain(|_, vm| !vm.is_over());
        for name in vms.keys().filter(|name| !read.contains_key(*name)) {
            vms[name].tell(Order::Undefine { forget: false });
        }
        for (name, read) in read {
            if let Err(why) = &read
                && !is_name(&name)
            {
                tracing::error!("{why}");
            } else if vms.contains_key(&name) || vms.len() < MOST {
                self.keep(&mut vms, &name, Some(read));
            } else {
                tracing::error!(vm = name, "a host has at most {MOST} VMs: this one is left out");
            }
        }
    }

    fn vms(&self) -> MutexGuard<'_, BTreeMap<String, Kept>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the definitions again when one of them has changed.
fn watch(node: &Weak<Node>, mut seen: Option<definition::Seen>) {
    loop {
        thread::sleep(LOOKS);
        let Some(node) = node.upgrade() else { return };
        let now = node.folder.seen().ok();
        if now != seen && now.is_some() {
            node.read_definitions();
            seen = now;
        }
        node.vms().retain(|_, vm| !vm.is_over());
    }
}

/// Takes the lock that only one node has. `None`: another one has it.
fn only(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Runs a short command: whether it succeeded, and its words. `None`: it did not end in time and was killed.
fn run(mut command: Command, most: Duration) -> io::Result<(Option<bool>, String)> {
    use std::io::Read as _;
    let (mut words, theirs) = io::pipe()?;
    let mut child =
        command.stdin(std::process::Stdio::null()).stdout(theirs.try_clone()?).stderr(theirs).spawn()?;
    // Its ends of the pipe.
    drop(command);
    let began = Instant::now();
    let ended = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status.success());
        }
        if began.elapsed() > most {
            child.kill()?;
            child.wait()?;
            break None;
        }
        thread::sleep(Duration::from_millis(5));
    };
    let mut said = String::new();
    words.by_ref().take(4096).read_to_string(&mut said)?;
    Ok((ended, said.trim().strip_prefix("outlive: ").unwrap_or(said.trim()).to_owned()))
}
