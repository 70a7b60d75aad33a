//! `outlive arbiter`: what an operator does with an arbiter.

use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::record::vm_name;
use super::{Arbiter, ArbiterError, ArbiterSpecError, Claim, Ending, Initialized, Mode, VmId, Win};
use crate::cli::{ArbiterCommand, ArbiterOptions};
use crate::exit;
use crate::link::Security;

/// `outlive arbiter`: returns the exit code.
pub fn command(options: &ArbiterOptions) -> u8 {
    let mut out = outlive_node::printed();
    let done = match &options.command {
        ArbiterCommand::Init { place } => init(place, &mut out),
        ArbiterCommand::List { place, json } => list(place, *json, &mut out),
        ArbiterCommand::Show { place, vm, json } => show(place, vm, *json, &mut out),
        ArbiterCommand::Release { place, vm, yes } => release(place, vm, *yes, &mut out),
        // It holds no lock on standard output while it runs.
        ArbiterCommand::Serve { listen, directory, keys, insecure, exit_with_stdin } => {
            drop(out);
            let security = Security::of(keys.as_deref(), *insecure);
            return match super::served::serve(directory, listen, security, *exit_with_stdin) {
                Ok(()) => exit::OK,
                Err(line) => exit::usage(line),
            };
        }
        ArbiterCommand::Prune { place, forget_ended, dry_run, json } => {
            let mode = if *dry_run { Mode::Name } else { Mode::Remove };
            prune(place, *forget_ended, mode, *json, &mut out)
        }
    };
    match done {
        Ok(()) => exit::OK,
        Err(line) => exit::usage(line),
    }
}

/// Why a command of `outlive arbiter` failed.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    /// The place is no arbiter, or cannot become one.
    #[error(transparent)]
    Place(#[from] ArbiterSpecError),
    /// The arbiter does not answer.
    #[error(transparent)]
    Arbiter(#[from] ArbiterError),
    /// No VM has such an id.
    #[error("the arbiter knows no VM '{0}': `outlive arbiter list` shows those that it knows")]
    UnknownVm(String),
    /// Too little of an id, so that a slip of the hand does not name a VM.
    #[error(
        "'{0}' is too little of a VM's id: give its first {LEAST_OF_AN_ID} characters or more, from `outlive arbiter list`"
    )]
    TooShort(String),
    /// Several VMs have such an id.
    #[error("the ids of {count} begin with '{beginning}': give more of the id")]
    SeveralVms { count: String, beginning: String },
    /// The operator has not said yes.
    #[error(
        "nothing was changed: make sure that no host runs this VM, then add --yes; no host goes on with it after that"
    )]
    NotConfirmed,
    /// Another host has just won.
    #[error("{owner} has just won generation {generation} of this VM: look at that host first")]
    JustWon { owner: String, generation: u64 },
    /// The arbiter does not answer to a claim.
    #[error("the arbiter cannot be used: {0}; say it again when it can")]
    Claim(String),
    /// The result cannot be shown.
    #[error("cannot print: {0}")]
    Print(#[from] io::Error),
}

fn init(place: &str, out: &mut impl Write) -> Result<(), CommandError> {
    let (arbiter, done) = super::init(place)?;
    let what = match done {
        Initialized::Made => "is now an arbiter",
        Initialized::Already => "is already an arbiter; nothing was changed",
        Initialized::Upgraded => "was brought up to date and keeps all its claims",
    };
    print(out, &format!("{place} {what}: id {}", arbiter.identity()))
}

/// A generation, for people and as JSON.
#[derive(Debug, Serialize)]
struct Generation {
    generation: u64,
    /// Missing if the claim is damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    age_s: Option<u64>,
}

impl From<Win> for Generation {
    fn from(win: Win) -> Self {
        Self { generation: win.generation, owner: win.winner.map(|winner| winner.owner), age_s: age(win.at) }
    }
}

impl Generation {
    fn line(&self) -> String {
        let owner = self.owner.as_deref().unwrap_or("an unknown host: the claim is damaged");
        format!("generation {}, won {} by {owner}", self.generation, ago(self.age_s))
    }
}

/// The end of a VM, for people and as JSON.
#[derive(Debug, Serialize)]
struct End {
    generation: u64,
    why: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    age_s: Option<u64>,
}

impl From<Ending> for End {
    fn from(ending: Ending) -> Self {
        Self { generation: ending.generation, why: ending.why, age_s: age(ending.at) }
    }
}

/// A VM, for people and as JSON.
#[derive(Debug, Serialize)]
struct Vm {
    vm: String,
    /// The generations that are still known, newest last.
    generations: Vec<Generation>,
    /// Set if it ended in order and has not been started again since.
    #[serde(skip_serializing_if = "Option::is_none")]
    ended: Option<End>,
}

impl Vm {
    fn read(arbiter: &mut dyn Arbiter, vm: &VmId) -> Result<Self, CommandError> {
        let generations = arbiter.history(vm)?.into_iter().map(Generation::from).collect();
        Ok(Self { vm: vm_name(vm), generations, ended: arbiter.ending(vm)?.map(End::from) })
    }

    fn state(&self) -> String {
        match (&self.ended, self.generations.last()) {
            (Some(end), _) => {
                format!("ended {} in generation {}: {}", ago(end.age_s), end.generation, end.why)
            }
            (None, Some(newest)) => newest.line(),
            (None, None) => "no claim".into(),
        }
    }
}

#[derive(Debug, Serialize)]
struct Inventory<'a> {
    arbiter: &'a str,
    vms: Vec<Vm>,
}

fn list(place: &str, json: bool, out: &mut impl Write) -> Result<(), CommandError> {
    let mut arbiter = super::parse(place)?;
    let vms: Vec<Vm> =
        arbiter.vms()?.iter().map(|vm| Vm::read(arbiter.as_mut(), vm)).collect::<Result<_, _>>()?;
    if json {
        return print_json(out, &Inventory { arbiter: arbiter.identity(), vms });
    }
    print(out, &format!("arbiter {}, {}", arbiter.identity(), counted(vms.len(), "VM")))?;
    vms.iter().try_for_each(|vm| print(out, &format!("{}  {}", vm.vm, vm.state())))?;
    let open = vms.iter().filter(|vm| vm.ended.is_none()).count();
    if open > 0 {
        print(out, &format!("{} {NO_END}", counted(open, "VM")))?;
    }
    Ok(())
}

/// An arbiter learns of generations and of orderly ends, and of nothing else.
const NO_END: &str = "without an end: running, or lost with the host that won it last. `outlive status` on that host says \
                      which; `outlive arbiter release ARBITER VM --yes` lets a VM go whose hosts are gone";

fn show(place: &str, vm: &str, json: bool, out: &mut impl Write) -> Result<(), CommandError> {
    let mut arbiter = super::parse(place)?;
    let id = find(arbiter.as_mut(), vm)?;
    let vm = Vm::read(arbiter.as_mut(), &id)?;
    if json {
        return print_json(out, &Inventory { arbiter: arbiter.identity(), vms: vec![vm] });
    }
    print(out, &format!("arbiter {}\nVM {}", arbiter.identity(), vm.vm))?;
    vm.generations.iter().try_for_each(|it| print(out, &it.line()))?;
    match &vm.ended {
        Some(_) => print(out, &vm.state()),
        None => Ok(()),
    }
}

/// What a released VM has as its end.
const RELEASED: &str = "an operator released it";

/// Wins the next generation of a VM, so that nobody else can, and notes its end in it.
fn release(place: &str, vm: &str, yes: bool, out: &mut impl Write) -> Result<(), CommandError> {
    let mut arbiter = super::parse(place)?;
    let id = find(arbiter.as_mut(), vm)?;
    let vm = Vm::read(arbiter.as_mut(), &id)?;
    print(out, &format!("VM {}  {}", vm.vm, vm.state()))?;
    if !yes {
        return Err(CommandError::NotConfirmed);
    }
    let generation = arbiter.highest(&id)?.map_or(1, |highest| highest + 1);
    match arbiter.claim(&id, generation, &super::owner("operator, released")) {
        Claim::Won => {}
        Claim::Lost { owner } => return Err(CommandError::JustWon { owner, generation }),
        Claim::Unreachable { why } => return Err(CommandError::Claim(why)),
    }
    arbiter.note_end(&id, generation, RELEASED)?;
    print(out, &format!("VM {}  released in generation {generation}: no host goes on with it", vm.vm))
}

/// Nothing at all, as an empty variable of a script, is the beginning of every id.
const LEAST_OF_AN_ID: usize = 4;

/// The only VM whose id begins with this text.
fn find(arbiter: &mut dyn Arbiter, beginning: &str) -> Result<VmId, CommandError> {
    if beginning.chars().count() < LEAST_OF_AN_ID {
        return Err(CommandError::TooShort(beginning.to_owned()));
    }
    let mut vms = arbiter.vms()?;
    vms.retain(|vm| vm_name(vm).starts_with(beginning));
    match vms[..] {
        [vm] => Ok(vm),
        [] => Err(CommandError::UnknownVm(beginning.to_owned())),
        _ => {
            let (count, beginning) = (counted(vms.len(), "VM"), beginning.to_owned());
            Err(CommandError::SeveralVms { count, beginning })
        }
    }
}

#[derive(Debug, Serialize)]
struct Pruned<'a> {
    arbiter: &'a str,
    dry_run: bool,
    vms: Vec<PrunedVm>,
}

#[derive(Debug, Serialize)]
struct PrunedVm {
    vm: String,
    /// The generations whose claims were removed.
    generations: Vec<u64>,
    /// The whole VM was removed.
    forgotten: bool,
}

fn prune(
    place: &str,
    forget: Option<Duration>,
    mode: Mode,
    json: bool,
    out: &mut impl Write,
) -> Result<(), CommandError> {
    let mut arbiter = super::parse(place)?;
    let mut vms = Vec::new();
    for vm in arbiter.vms()? {
        let generations = arbiter.prune(&vm, mode)?;
        let forgotten = match forget {
            Some(age) => arbiter.forget(&vm, age, mode)?,
            None => false,
        };
        if forgotten || !generations.is_empty() {
            vms.push(PrunedVm { vm: vm_name(&vm), generations, forgotten });
        }
    }
    let dry_run = mode == Mode::Name;
    if json {
        return print_json(out, &Pruned { arbiter: arbiter.identity(), dry_run, vms });
    }
    let verb = if dry_run { "would be " } else { "" };
    if vms.is_empty() {
        return print(out, "nothing to remove");
    }
    vms.iter().try_for_each(|PrunedVm { vm, generations, forgotten }| {
        match (generations[..].as_ref(), forgotten) {
            (_, true) => print(out, &format!("{vm}  {verb}forgotten")),
            ([first, .., last], _) => {
                let count = counted(generations.len(), "claim");
                print(out, &format!("{vm}  {verb}removed: {count}, generations {first} to {last}"))
            }
            _ => print(out, &format!("{vm}  {verb}removed: generations {generations:?}")),
        }
    })
}

fn age(at: Option<SystemTime>) -> Option<u64> {
    at.map(|at| SystemTime::now().duration_since(at).unwrap_or_default().as_secs())
}

fn ago(age_s: Option<u64>) -> String {
    match age_s {
        // An age in days needs no seconds.
        Some(age) if age > 86_400 => {
            format!("{} ago", humantime::format_duration(Duration::from_secs(age / 3600 * 3600)))
        }
        Some(age) => format!("{} ago", humantime::format_duration(Duration::from_secs(age))),
        None => "at an unknown time".into(),
    }
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn print_json(out: &mut impl Write, value: &impl Serialize) -> Result<(), CommandError> {
    print(out, &serde_json::to_string_pretty(value).map_err(io::Error::from)?)
}

fn print(out: &mut impl Write, text: &str) -> Result<(), CommandError> {
    Ok(writeln!(out, "{text}")?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbiter::FileArbiter;

    const VM: VmId = VmId([0xab; 16]);
    const OTHER: VmId = VmId([0xac; 16]);

    /// An arbiter that knows a VM with many generations and one that has ended.
    fn place() -> (tempfile::TempDir, String, FileArbiter) {
        let directory = tempfile::tempdir().unwrap();
        let place = format!("file:{}", directory.path().display());
        let (mut arbiter, done) = FileArbiter::init(directory.path()).unwrap();
        assert_eq!(done, Initialized::Made);
        for generation in 1..=12 {
            assert_eq!(arbiter.claim(&VM, generation, "primary on host a"), Claim::Won);
        }
        assert_eq!(arbiter.claim(&OTHER, 1, "primary on host b"), Claim::Won);
        arbiter.note_end(&OTHER, 1, "the guest powered off").unwrap();
        (directory, place, arbiter)
    }

    fn printed(work: impl FnOnce(&mut Vec<u8>) -> Result<(), CommandError>) -> String {
        let mut out = Vec::new();
        work(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn what_an_arbiter_knows_is_shown() {
        let (_directory, place, arbiter) = place();
        let text = printed(|out| list(&place, false, out));
        assert!(text.starts_with(&format!("arbiter {}, 2 VMs\n", arbiter.identity())), "{text}");
        assert!(text.contains(&format!("{VM}  generation 12, won ")), "{text}");
        assert!(text.contains(" ago by primary on host a\n"), "{text}");
        assert!(
            text.contains("ended ") && text.contains(" in generation 1: the guest powered off"),
            "{text}"
        );
        assert!(text.contains("\n1 VM without an end: ") && text.contains("arbiter release"), "{text}");
        let text = printed(|out| show(&place, "abab", false, out));
        assert_eq!(text.matches("generation ").count(), 12, "{text}");
        assert!(!text.contains(&OTHER.to_string()), "{text}");
        let json: serde_json::Value = serde_json::from_str(&printed(|out| list(&place, true, out))).unwrap();
        assert_eq!(json["vms"][0]["generations"][11]["owner"], "primary on host a");
        assert_eq!(json["vms"][1]["ended"]["generation"], 1);
        for (vm, remedy) in [
            ("7777", "the arbiter knows no VM '7777': `outlive arbiter list`"),
            ("aba", "too little of a VM's id"),
            ("", "'' is too little of a VM's id"),
        ] {
            let error = show(&place, vm, false, &mut Vec::new()).unwrap_err().to_string();
            assert!(error.contains(remedy), "{error}");
        }
    }

    #[test]
    fn a_beginning_that_two_ids_have_names_neither() {
        let (_directory, place, mut arbiter) = place();
        let mut twin = VM;
        twin.0[15] = 1;
        assert_eq!(arbiter.claim(&twin, 1, "primary on host b"), Claim::Won);
        let error = show(&place, "abab", false, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("the ids of 2 VMs begin with 'abab': give more of the id"), "{error}");
    }

    #[test]
    fn an_empty_id_releases_no_vm() {
        let directory = tempfile::tempdir().unwrap();
        let place = format!("file:{}", directory.path().display());
        let (mut arbiter, _) = FileArbiter::init(directory.path()).unwrap();
        assert_eq!(arbiter.claim(&VM, 1, "primary on host a"), Claim::Won);
        for little in ["", "a", "aba"] {
            let error = release(&place, little, true, &mut Vec::new()).unwrap_err();
            assert!(matches!(error, CommandError::TooShort(_)), "{error}");
        }
        assert_eq!(arbiter.highest(&VM).unwrap(), Some(1));
    }

    #[test]
    fn what_is_of_no_use_is_removed_and_the_newest_stays() {
        let (directory, place, mut arbiter) = place();
        let before = printed(|out| show(&place, "abab", true, out));
        let dry = printed(|out| prune(&place, Some(Duration::ZERO), Mode::Name, false, out));
        assert!(dry.contains("would be removed: 4 claims, generations 1 to 4"), "{dry}");
        assert!(dry.contains(&format!("{OTHER}  would be forgotten")), "{dry}");
        assert_eq!(
            printed(|out| show(&place, "abab", true, out)).matches("owner").count(),
            before.matches("owner").count()
        );

        // A VM that ended today is too young.
        let young = Duration::from_secs(3600);
        let text = printed(|out| prune(&place, Some(young), Mode::Remove, false, out));
        assert!(text.contains("removed: 4 claims") && !text.contains("forgotten"), "{text}");
        let left: Vec<u64> = arbiter.history(&VM).unwrap().iter().map(|win| win.generation).collect();
        assert_eq!(left, [5, 6, 7, 8, 9, 10, 11, 12]);
        let text = printed(|out| prune(&place, Some(Duration::ZERO), Mode::Remove, false, out));
        assert!(text.contains("forgotten") && !text.contains(&VM.to_string()), "{text}");
        assert_eq!(arbiter.vms().unwrap(), [VM]);
        assert!(!directory.path().join(OTHER.to_string()).exists());
        let text = printed(|out| prune(&place, Some(Duration::ZERO), Mode::Remove, false, out));
        assert_eq!(text, "nothing to remove\n");
    }

    #[test]
    fn a_released_vm_is_nobodys_and_can_be_forgotten() {
        let (_directory, place, mut arbiter) = place();
        let error = release(&place, "abab", false, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("--yes"), "{error}");
        assert_eq!(arbiter.highest(&VM).unwrap(), Some(12));
        let text = printed(|out| release(&place, "abab", true, out));
        assert!(text.contains("released in generation 13"), "{text}");
        assert!(matches!(arbiter.claim(&VM, 13, "standby"), Claim::Lost { .. }));
        assert_eq!(arbiter.ending(&VM).unwrap().unwrap().why, RELEASED);
        let text = printed(|out| prune(&place, Some(Duration::ZERO), Mode::Remove, false, out));
        assert!(text.contains(&format!("{VM}  forgotten")), "{text}");
    }

    /// A VM that was started again after its end has not ended.
    #[test]
    fn a_vm_that_runs_again_is_not_forgotten() {
        let (_directory, place, mut arbiter) = place();
        assert_eq!(arbiter.claim(&OTHER, 2, "primary on host b"), Claim::Won);
        let text = printed(|out| prune(&place, Some(Duration::ZERO), Mode::Remove, false, out));
        assert!(!text.contains("forgotten"), "{text}");
        assert_eq!(arbiter.highest(&OTHER).unwrap(), Some(2));
        assert_eq!(arbiter.ending(&OTHER).unwrap(), None);
    }
}
