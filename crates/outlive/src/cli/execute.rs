//! From a command to its exit code.

use std::io;
use std::path::Path;
use std::sync::Arc;

use outlive_epoch::EndReason;
use outlive_machine::{HostError, LockError};
use outlive_node::{BEING_STARTED, UNDECIDED};
use outlive_pair::{ExitReason, StandbyExit};
use outlive_record::ClaimError;

use super::part::{self, PartError};
use super::sense::SenseError;
use super::standby::ItsOwnStandby;
use super::{ActiveOptions, Command, RewindOptions, RunOptions, StandbyOptions};
use super::{completions, man, node};
use crate::arbiter::Site;
use crate::disk::{Held, Part};
use crate::events::{Event, Role};
use crate::link::SecurityError;
use crate::logs::LogError;
use crate::network::here;
use crate::primary::StartError;
use crate::rewind::{Folder, FolderError, RewindError};
use crate::sandbox::{Plan, PrivilegeError, SandboxError};
use crate::standby::{Door, DoorError, Outcome, Post, PostError};
use crate::status::{NO_PRIMARY, NoPlace, Server, ServerError, Standing};
use crate::vm::{self, End, Launch, Remedied, Stops};
use crate::{
    arbiter, check, console, demo, disk, doctor, exit, history, keys, logs, metrics, notify, primary,
    process, rewind, sandbox, sentinel, status, ui,
};

impl From<PrivilegeError> for BeginError {
    fn from(error: PrivilegeError) -> Self {
        SandboxError::from(error).into()
    }
}

impl Command {
    /// Carries the command out. Returns the exit code.
    pub fn execute(&self) -> u8 {
        match self {
            Self::Run(options) => run(options),
            Self::Standby(options) => standby(options),
            Self::Status(options) => status::command(options),
            Self::Metrics(options) => metrics::command(options),
            Self::Console(options) => console::command(options),
            Self::HandOver(options) => status::hand_over(options),
            Self::TakeOver(options) => status::take_over(options),
            Self::GoOnAlone(options) => status::go_on_alone(options),
            Self::GiveUp(options) => status::give_up(options),
            Self::Node(options) => node::node(options),
            Self::Vm(options) => node::vm(options),
            Self::Top(options) => node::top(options),
            Self::Arbiter(options) => arbiter::command(options),
            Self::Keys(options) => keys::command(options),
            Self::Image(options) => disk::command(options),
            Self::History(options) => history::command(options),
            Self::Rewind(options) => rewind(options),
            Self::Demo(options) => demo::command(options),
            Self::Check(options) => check::command(options),
            Self::Doctor(options) => doctor::command(options),
            Self::Completions(options) => completions::command(options),
            Self::Man(options) => man::command(options),
            Self::Sentinel { confined } => sentinel::command(*confined),
            Self::Steward => sandbox::command(),
        }
    }
}

/// Why neither a VM nor a standby begins.
#[derive(Debug, thiserror::Error)]
enum BeginError {
    /// Nothing can be logged.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Memory cannot be locked, as `--lock-memory` wants it.
    #[error(transparent)]
    LockMemory(#[from] Remedied<LockError>),
    /// It cannot be confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Options do not go together.
    #[error(transparent)]
    Sense(#[from] SenseError),
    /// The options name this host as its own standby.
    #[error(transparent)]
    Itself(#[from] ItsOwnStandby),
    /// Links cannot be made as the options say.
    #[error(transparent)]
    Security(#[from] SecurityError),
    /// Nothing can be recorded.
    #[error(transparent)]
    Record(#[from] ClaimError),
    /// Another process has an image.
    #[error(transparent)]
    Held(#[from] disk::PrepareError),
    /// An order to stop would not be heard.
    #[error("cannot watch signals: {0}")]
    Signals(#[source] io::Error),
    /// Nobody can say whether this host starts the VM or waits.
    #[error(transparent)]
    Part(#[from] PartError),
    /// An option is missing.
    #[error("--or-standby needs --listen and --arbiter")]
    CannotWait,
    /// `outlive status` would get no answer.
    #[error(transparent)]
    Status(#[from] ServerError),
    /// An operator must decide, and nobody would hear the word.
    #[error(
        "--arbiter manual needs a socket for an operator's word: {0}; or name another place with --status PATH"
    )]
    NoWord(#[source] NoPlace),
    /// The address of a standby is not free.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// The VM cannot be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// This host cannot be a standby.
    #[error(transparent)]
    Post(#[from] PostError),
    /// There is no place for the disks of a VM that is rewound.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The VM cannot be rewound.
    #[error(transparent)]
    Rewind(#[from] RewindError),
    /// This host cannot be a standby later, because it cannot run a VM.
    #[error(transparent)]
    Host(#[from] HostError),
}

fn run(options: &RunOptions) -> u8 {
    let options = options.with_keys();
    match confine_run(&options).and_then(|()| begin_run(&options)) {
        Ok((_server, launch, post)) => Life::begin(launch, post, options.or_standby.then_some(&options)),
        Err(why @ (BeginError::Start(StartError::Stopped) | BeginError::Part(PartError::Stopped))) => {
            tracing::warn!("{why}");
            exit::OK
        }
        Err(line) => exit::usage(line),
    }
}

/// Comes before the second thread: threads have what their parents have.
fn confine_run(options: &RunOptions) -> Result<(), BeginError> {
    sandbox::close_inherited();
    process::machine();
    options.make_sense()?;
    sandbox::enter(&Plan::of_run(options)?)?;
    sentinel::start();
    Ok(())
}

fn begin_run(options: &RunOptions) -> Result<Ready, BeginError> {
    logs::never_wait()?;
    hears_words(&options.active, options.arbiter.as_deref())?;
    vm::lock_memory(options.active.lock_memory)?;
    if let Some(standby) = options.as_standby(None) {
        standby.refuse_itself()?;
    }
    for standby in options.active.standbys.iter().filter(|it| here::is_here(it)) {
        tracing::warn!(
            "--standby {standby} is an address of this host itself, and a standby here would die with the VM: give the \
             other host's address"
        );
    }
    check_security(&options.active, options.listen.as_deref())?;
    check_record(&options.active)?;
    if options.listen.is_some()
        && let Err(why) = options.active.security().may_hold(None)
    {
        tracing::warn!("this host cannot be the VM's standby later: {why}");
    }
    if !options.or_standby {
        let standing = Standing::new(Role::Primary, options.name.as_deref(), BEING_STARTED);
        let place = Place::claim(options, standing)?;
        let launch = launch(options, &hold(options)?, &place)?;
        return started(options, place, launch);
    }
    // The question may take most of a minute. Meanwhile the process can be asked, and a second one with the same
    // command finds the place taken.
    let standing = Standing::new(Role::Standby, options.name.as_deref(), UNDECIDED);
    let place = Place::claim(options, standing)?;
    start_or_wait(options, place)
}

/// Starts the VM if it is this host's part, and waits as its standby if not. If another host wins the VM between the
/// decision and the claim, this one asks once more.
fn start_or_wait(options: &RunOptions, place: Place) -> Result<Ready, BeginError> {
    let mut lost = None;
    let held = hold(options)?;
    loop {
        let part = part::of(options, &place.stops, |now| place.standing.now(now))?;
        match (part, lost.take()) {
            (Part::Waits { why, name, needs_operator }, _) => {
                // A standby locks them when a primary comes, and then looks at them once more.
                drop(held);
                return wait(options, place, &why, name.as_deref(), needs_operator);
            }
            // The arbiter said that another host has the VM, and now it says that none has.
            (Part::Starts { .. }, Some(why)) => return Err(StartError::Plan(why).into()),
            (Part::Starts { .. }, None) => {
                place.standing.starts_here(BEING_STARTED);
                match launch(options, &held, &place) {
                    Ok(launch) => return started(options, place, launch),
                    Err(StartError::Plan(why)) if why.tells_of_another_host() => {
                        tracing::warn!("{why}; looking again which host starts the VM");
                        lost = Some(why);
                    }
                    Err(why) => return Err(why.into()),
                }
            }
        }
    }
}

/// Where a process is reached: by `outlive status`, by primaries, and by orders to stop. It is claimed before anything
/// is done, so that a bad place is refused at once.
struct Place {
    standing: Arc<Standing>,
    server: Option<Server>,
    door: Option<Door>,
    stops: Stops,
}

impl Place {
    fn claim(options: &RunOptions, standing: Arc<Standing>) -> Result<Self, BeginError> {
        standing.others(&options.active.standbys, &options.active.security());
        standing.arbiter_at(site(options.arbiter.as_deref(), &options.active));
        let server = Server::open(options.active.status.as_deref(), &standing)?;
        // Without a name the images' own is known only later.
        let named = options.name.as_deref().filter(|_| server.is_none() && options.or_standby);
        let server = server.or_else(|| Server::open_usual(named?, standing.clone()));
        let door = options.listen.as_deref().map(Door::reserve).transpose()?;
        let stops = hear_stops(&options.active)?;
        Ok(Self { standing, server, door, stops })
    }
}

/// On which host the arbiter is. Warns if it is one that may be lost with the VM.
fn site(arbiter: Option<&str>, options: &ActiveOptions) -> Site {
    let site = arbiter.map(Site::of).unwrap_or_default();
    let other = options.standbys.iter().find(|standby| site.is_at(standby));
    if let Some(host) = site.is_here().then_some("this host").or(other.map(String::as_str)) {
        tracing::warn!(
            "the arbiter is on {host}: if that host is lost, the arbiter is lost with it, and the VM waits until it is \
             back; have a third machine serve it (docs/arbitration.md)"
        );
    }
    site
}

/// From now on an order to stop no longer kills the process: whoever has a turn asks for it, or gets it.
fn hear_stops(options: &ActiveOptions) -> Result<Stops, BeginError> {
    let stops = Stops::new();
    process::on_stop(options.exit_with_stdin, stops.sender()).map_err(BeginError::Signals)?;
    Ok(stops)
}

/// A VM that runs, or a post at which one is waited for, or both; and whoever answers `outlive status`.
type Ready = (Option<Server>, Option<Launch>, Option<Post>);

/// Where a person decides who goes on, a process that the word cannot reach could never go on. It is asked with the
/// rights that the process keeps.
fn hears_words(active: &ActiveOptions, arbiter: Option<&str>) -> Result<(), BeginError> {
    if active.status.is_some() || !arbiter.is_some_and(arbiter::is_manual) {
        return Ok(());
    }
    status::usual().map_err(BeginError::NoWord)
}

/// Finds out at the start what the first link would. A process without links needs no keys.
fn check_security(options: &ActiveOptions, listen: Option<&str>) -> Result<(), SecurityError> {
    let addresses = || options.standbys.iter().map(String::as_str).chain(listen);
    if addresses().next().is_none() {
        return Ok(());
    }
    options.security().check(addresses())
}

/// Refuses a place where nothing can ever be recorded. One that is full, or does not answer, costs the VM nothing.
fn check_record(options: &ActiveOptions) -> Result<(), ClaimError> {
    options.record.as_ref().map_or(Ok(()), |record| outlive_record::check(&record.directory))
}

/// Locks the images that the VM writes to and does not share: its machine has them without a gap.
fn hold(options: &RunOptions) -> Result<Held, disk::PrepareError> {
    Held::of(options.written().into_iter().map(|(_, path)| path))
}

fn launch(options: &RunOptions, held: &Held, place: &Place) -> Result<Launch, StartError> {
    if options.listen.is_some() || !options.active.standbys.is_empty() {
        place.standing.link(options.active.security().kind());
    }
    primary::start(options, held, place.standing.clone(), place.stops.clone())
}

fn started(options: &RunOptions, place: Place, launch: Launch) -> Result<Ready, BeginError> {
    let Place { standing, server, door, .. } = place;
    if options.or_standby {
        let why = "this host has the newest image of the VM".to_owned();
        launch.events.emit(Event::Decided { starts: true, why });
    }
    let name = &launch.identity.provenance.name;
    let post = match door.zip(options.as_standby(Some(name))) {
        Some((door, options)) => Post::of(options, door, &launch)?,
        None => None,
    };
    Ok((server.or_else(|| Server::open_usual(name, standing)), Some(launch), post))
}

/// Waits although a VM could be started, because this host is not the one to start it.
fn wait(
    options: &RunOptions,
    place: Place,
    why: &str,
    name: Option<&str>,
    needs_operator: bool,
) -> Result<Ready, BeginError> {
    let standby = options.as_standby(name).ok_or(BeginError::CannotWait)?;
    let Place { standing, server, door, stops } = place;
    standing.waits_here(why);
    let door = door.ok_or(BeginError::CannotWait)?;
    let post = Post::prepare(&standby, door, standing.clone(), stops)?;
    let server = server.or_else(|| Server::open_usual(&standby.status_name(), standing));
    let said = format!("this host does not start the VM and waits as its standby: {why}");
    if needs_operator {
        tracing::warn!("{said}");
    } else {
        tracing::info!("{said}");
    }
    post.events().emit(Event::Decided { starts: false, why: why.to_owned() });
    Ok((server, None, Some(post)))
}

fn stand_by(options: &StandbyOptions, why: &str) -> Result<(Option<Server>, Post), BeginError> {
    let standing = Standing::new(Role::Standby, options.vm.as_deref(), why);
    standing.link(options.active.security().kind());
    standing.others(&options.active.standbys, &options.active.security());
    standing.arbiter_at(site(Some(&options.arbiter), &options.active));
    options.refuse_itself()?;
    let server = Server::open(options.active.status.as_deref(), &standing)?;
    let door = Door::reserve(&options.listen)?;
    let stops = hear_stops(&options.active)?;
    let post = Post::prepare(options, door, standing.clone(), stops)?;
    Ok((server.or_else(|| Server::open_usual(&options.status_name(), standing)), post))
}

fn rewind(options: &RewindOptions) -> u8 {
    let Some(into) = options.into.as_deref().filter(|_| !options.dry_run) else {
        return rewind::dry_run(options).map_or_else(exit::usage, |()| exit::OK);
    };
    let active = options.active();
    let begun =
        confine_rewind(options, &active, into).and_then(|folder| begin_rewind(options, active, folder));
    match begun {
        Ok((_server, launch)) => Life::begin(Some(launch), None, None),
        Err(why @ BeginError::Rewind(RewindError::Stopped)) => {
            tracing::warn!("{why}");
            exit::OK
        }
        Err(line) => exit::usage(line),
    }
}

/// The folder is made before this process gives up its rights, and is given to the user that it becomes.
fn confine_rewind(
    options: &RewindOptions,
    active: &ActiveOptions,
    into: &Path,
) -> Result<Folder, BeginError> {
    sandbox::close_inherited();
    process::machine();
    active.make_sense()?;
    let folder = Folder::claim(into)?;
    sandbox::enter(&Plan::of_rewind(options, active, &folder)?)?;
    Ok(folder)
}

fn begin_rewind(
    options: &RewindOptions,
    active: ActiveOptions,
    folder: Folder,
) -> Result<(Option<Server>, Launch), BeginError> {
    logs::never_wait()?;
    vm::lock_memory(active.lock_memory)?;
    let standing = Standing::new(Role::Primary, options.name.as_deref(), BEING_STARTED);
    let server = Server::open(active.status.as_deref(), &standing)?;
    let stops = hear_stops(&active)?;
    let launch = rewind::start(options, active, folder, standing.clone(), stops)?;
    let name = &launch.identity.provenance.name;
    Ok((server.or_else(|| Server::open_usual(name, standing)), launch))
}

fn standby(options: &StandbyOptions) -> u8 {
    let options = options.with_keys();
    match confine_standby(&options).and_then(|()| begin_standby(&options)) {
        Ok((_server, post)) => Life::begin(None, Some(post), None),
        Err(line) => exit::usage(line),
    }
}

fn confine_standby(options: &StandbyOptions) -> Result<(), BeginError> {
    sandbox::close_inherited();
    process::machine();
    options.make_sense()?;
    sandbox::enter(&Plan::of_standby(options)?)?;
    sentinel::start();
    Ok(())
}

fn begin_standby(options: &StandbyOptions) -> Result<(Option<Server>, Post), BeginError> {
    logs::never_wait()?;
    hears_words(&options.active, Some(&options.arbiter))?;
    vm::lock_memory(options.active.lock_memory)?;
    check_security(&options.active, Some(&options.listen))?;
    check_record(&options.active)?;
    options.active.security().may_hold(options.vm.as_deref())?;
    let begun = stand_by(options, NO_PRIMARY)?;
    if options.active.standbys.is_empty() {
        tracing::warn!(
            "no --standby: once this host has taken the VM over, nobody protects it again; give the other host's address"
        );
    }
    Ok(begun)
}

/// The life of a process that has a VM or waits for one. After a takeover a standby is the VM's primary, and
/// a host that has lost it to the other one is its standby: so the roles follow each other until one of them ends.
struct Life<'a> {
    post: Option<Post>,
    /// Both hosts were started with this command, and one of them starts a crashed guest again.
    both: Option<&'a RunOptions>,
    shown: bool,
}

impl<'a> Life<'a> {
    /// Begins with a VM, or as a standby at its post. Returns the exit code.
    fn begin(mut launch: Option<Launch>, post: Option<Post>, both: Option<&'a RunOptions>) -> u8 {
        notify::ready();
        sandbox::say_what_remains();
        let of_launch = launch.as_ref().map(|it| (it.events.clone(), it.console.clone()));
        let mut life = Self { post, both, shown: false };
        let end = loop {
            let mut end = match (launch.take(), &mut life.post) {
                (Some(launch), _) => life.run_vm(launch),
                (None, Some(post)) => match post.wait() {
                    Outcome::TakenOver(taken) => {
                        post.has_run(taken.identity.provenance.vm);
                        launch = Some(*taken);
                        continue;
                    }
                    Outcome::Ended(reason) => End::Standby(reason),
                    Outcome::Failed(why) => End::Failed(why),
                },
                (None, None) => End::Failed("there is neither a VM nor a place to wait for one".into()),
            };
            if !life.goes_on(&mut end) {
                break end;
            }
        };
        // Threads that still wait for connections also hold the console, so it is not dropped.
        let (events, console) = match (&of_launch, &life.post) {
            (Some((events, console)), _) => (events, &**console),
            (None, Some(post)) => (post.events(), post.console()),
            (None, None) => return exit::FAILED,
        };
        notify::stopping();
        if let Some(post) = &life.post {
            post.close_record();
        }
        console.close();
        exit::conclude(&end, events)
    }

    fn run_vm(&mut self, launch: Launch) -> End {
        if !std::mem::replace(&mut self.shown, true) {
            ui::show_progress(&launch.events);
        }
        primary::run(launch)
    }

    /// Goes back to the standby's role if that is what follows. An operator who has asked for a stop gets it.
    fn goes_on(&mut self, end: &mut End) -> bool {
        let crashed = match end {
            End::Primary(ExitReason::Fenced { .. })
            | End::Standby(StandbyExit::Lost { .. } | StandbyExit::Failed(_)) => None,
            End::Standby(StandbyExit::Followed(EndReason::Crash)) if self.both.is_some() => self.both,
            _ => return false,
        };
        let Some(post) = self.post.as_mut().filter(|post| post.stays()) else { return false };
        if let Some(options) = crashed.filter(|_| !post.stops().was_used()) {
            tracing::warn!("{}; its host comes first to start it again", exit::text(end));
            // Whoever supervises that host starts the VM there, if the host is still there. If it is not, nobody
            // but this host can, and a new process does.
            match part::of(options, post.stops(), |_| {}) {
                Ok(Part::Waits { .. }) => {}
                Err(PartError::Stopped) => return false,
                Ok(Part::Starts { .. }) => {
                    let why =
                        "the guest crashed and its host has not started it again: start this command again";
                    *end = End::Failed(why.into());
                    return false;
                }
                Err(why) => {
                    *end = End::Failed(why.to_string());
                    return false;
                }
            }
        }
        if post.stops().was_used() {
            return false;
        }
        if matches!(end, End::Standby(StandbyExit::Failed(_))) {
            let back = post.back_after_failure(&exit::text(end));
            if !back {
                *end = End::Standby(StandbyExit::Stopped);
            }
            return back;
        }
        let back = post.back(&exit::text(end));
        back.inspect_err(|why| tracing::error!("this host cannot be the VM's standby: {why}")).is_ok()
    }
}
