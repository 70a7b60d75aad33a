//! The node: all VMs of a host.

mod definitions;
mod orders;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::checkup::Checkup;
use crate::definition::Folder;
use crate::drain::{Mode, Modes};
use crate::error::NodeError;
use crate::feed::Feed;
use crate::figures::Store;
use crate::files::{lock, make_folder, protect_each};
use crate::jobs::Jobs;
use crate::keeper::{Kept, Order};
use crate::log;
use crate::program::Program;
use crate::records::Records;
use crate::view::{State, View};

/// How long a keeper may take to answer. It may be asking its process, a few times and two seconds each at most.
const ANSWERS: Duration = Duration::from_secs(10);
/// How often a job looks.
const STEP: Duration = Duration::from_millis(50);

/// Where a node notes things down if nothing else is said.
pub const STATE: &str = "/var/lib/outlive/node";
/// The variable that tells the node's processes where it does: none of them may write there.
pub const STATE_VARIABLE: &str = "OUTLIVE_NODE_STATE";

/// Where a node has its files.
#[derive(Clone, Debug)]
pub struct Places {
    /// Definitions.
    pub definitions: PathBuf,
    /// What is desired, which processes there are, and their locks. Only the node writes there, but for the events of each VM,
    /// which have a directory of their own. It must survive a restart of the host.
    pub state: PathBuf,
    /// Sockets of the VMs. It need not.
    pub run: PathBuf,
    /// Logs of the VMs.
    pub logs: PathBuf,
}

impl Places {
    /// Where a VM's process is asked.
    pub(crate) fn socket_of(&self, vm: &str) -> PathBuf {
        self.run.join(format!("{vm}.sock"))
    }

    /// What its process has locked. Users that VMs run as may write to the directory of the sockets, and not here.
    pub(crate) fn lock_of(&self, vm: &str) -> PathBuf {
        self.locks().join(format!("{vm}.lock"))
    }

    fn locks(&self) -> PathBuf {
        self.state.join("locks")
    }

    /// Where its process tells what happens, if the definition does not say it. The directory is that VM's alone.
    pub(crate) fn events_of(&self, vm: &str) -> PathBuf {
        self.events().join(vm).join("events")
    }

    fn events(&self) -> PathBuf {
        self.state.join("events")
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
    pub(crate) figures: Store,
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
    /// This host's clock, when it answered; releases before it do not say.
    #[serde(default)]
    pub(crate) now: String,
    pub(crate) mode: Mode,
    /// What is wrong with the node itself.
    #[serde(default)]
    pub(crate) warnings: Vec<String>,
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
    /// Locked for a few instructions only: whoever asks about VMs does not wait for a disk.
    vms: Mutex<BTreeMap<String, Kept>>,
    /// Locked before `vms` by who changes which VMs there are.
    defining: Mutex<()>,
    pub(crate) jobs: Jobs,
    pub(crate) modes: Modes,
    pub(crate) checkup: Checkup,
    /// What is wrong with the node itself, by what it is about.
    troubles: Mutex<BTreeMap<&'static str, String>>,
    _only: File,
}

impl Node {
    /// Starts the node of the host of this name: adopts the VMs that run, and starts those that should.
    ///
    /// # Errors
    /// See [`StartError`]. A bad definition is none: its VM says what is wrong.
    pub fn start(host: &str, places: Places, program: Program) -> Result<Arc<Self>, StartError> {
        let (vms, locks, events) = (places.state.join("vms"), places.locks(), places.events());
        for (path, option) in [
            (&places.definitions, "--vms"),
            (&vms, "--state"),
            (&locks, "--state"),
            (&events, "--state"),
            (&places.run, "--run"),
            (&places.logs, "--logs"),
        ] {
            let wrong = |source| StartError::Folder { path: path.clone(), option, source };
            make_folder(path).map_err(wrong)?;
            std::fs::read_dir(path).map_err(wrong)?;
        }
        let run = |source| StartError::Folder { path: places.run.clone(), option: "--run", source };
        protect_each(&places.run).map_err(run)?;
        let state = |source| StartError::Folder { path: places.state.clone(), option: "--state", source };
        let only = lock(&places.state.join("node.lock")).map_err(state)?;
        let only = only.ok_or_else(|| StartError::Taken(places.state.clone()))?;
        let records = Records::open(vms).map_err(state)?;
        let modes = Modes::open(places.state.join("mode.json"));
        let feed = Arc::new(Feed::new());
        let folder = Folder::new(places.definitions.clone(), host.to_owned());
        let figures = Store::new(feed.life());
        let shared = Shared { places, program, records, feed: feed.clone(), figures, log_max: log::MOST };
        let node = Arc::new(Self {
            host: host.to_owned(),
            since: crate::view::now(),
            folder,
            shared: Arc::new(shared),
            vms: Mutex::default(),
            defining: Mutex::default(),
            jobs: Jobs::new(feed),
            modes,
            checkup: Checkup::default(),
            troubles: Mutex::default(),
            _only: only,
        });
        let seen = node.folder.seen().ok();
        node.read_definitions();
        node.adopt_undefined();
        let weak = Arc::downgrade(&node);
        thread::Builder::new()
            .name("definitions".into())
            .spawn(move || definitions::watch(&weak, seen))
            .map_err(StartError::Thread)?;
        Ok(node)
    }

    /// Its name, by which definitions have tables for it.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// Where its files are.
    pub(crate) fn places(&self) -> &Places {
        &self.shared.places
    }

    /// The program whose processes it starts.
    pub(crate) fn program(&self) -> &Program {
        &self.shared.program
    }

    /// Events of this node.
    pub(crate) fn feed(&self) -> &Arc<Feed> {
        &self.shared.feed
    }

    /// The last minutes of its VMs.
    pub(crate) fn figures(&self) -> &Store {
        &self.shared.figures
    }

    /// Says what is wrong with something, or that it is right again. What is new goes to the log.
    pub(crate) fn warn(&self, about: &'static str, trouble: Option<String>) {
        let mut all = self.troubles();
        let trouble = trouble.map(|why| format!("{about}: {why}"));
        if all.get(about) == trouble.as_ref() {
            return;
        }
        match trouble {
            Some(why) => {
                tracing::warn!("{why}");
                all.insert(about, why);
            }
            None => {
                tracing::info!("{about}: right again");
                all.remove(about);
            }
        }
    }

    fn troubles(&self) -> MutexGuard<'_, BTreeMap<&'static str, String>> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner)
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
            now: humantime::format_rfc3339_micros(std::time::SystemTime::now()).to_string(),
            mode: self.modes.get(),
            warnings: self.modes.damage().into_iter().chain(self.troubles().values().cloned()).collect(),
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

    /// A VM's log from byte `after` on, or its end; and where that ends.
    ///
    /// # Errors
    /// There is none of this name, or the log cannot be read.
    pub(crate) fn log(&self, name: &str, after: Option<u64>, bytes: u64) -> Result<(String, u64), NodeError> {
        self.get(name)?;
        let path = self.shared.places.log_of(name);
        let read = match after {
            Some(after) => log::after(&path, after, bytes),
            None => log::tail(&path, bytes),
        };
        read.map_err(|error| NodeError::System("cannot read the VM's log".into(), error))
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
        if !self.vms().get(name).is_some_and(|vm| vm.tell(order(answer))) {
            return Err(NodeError::NoSuchVm(name.to_owned()));
        }
        answered(name, heard.recv_timeout(ANSWERS))
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
                return Err(NodeError::TooLong {
                    vm: name.to_owned(),
                    what: what.to_owned(),
                    secs: most.as_secs(),
                });
            }
            thread::sleep(STEP);
        }
    }

    fn vms(&self) -> MutexGuard<'_, BTreeMap<String, Kept>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a keeper has said, if it has.
fn answered(name: &str, heard: Result<Result<(), NodeError>, RecvTimeoutError>) -> Result<(), NodeError> {
    let vm = name.to_owned();
    match heard {
        Ok(said) => said,
        Err(RecvTimeoutError::Disconnected) => Err(NodeError::NoSuchVm(vm)),
        Err(RecvTimeoutError::Timeout) => Err(NodeError::NoAnswer { vm, secs: ANSWERS.as_secs() }),
    }
}
