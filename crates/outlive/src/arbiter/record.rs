//! Names and texts of what arbiters write down: of the files in a directory, and of the values in etcd.

use outlive_epoch::VmId;

/// Name of the file that says which arbiter a directory is.
pub(super) const MARKER: &str = "outlive-arbiter";
const MARKER_TITLE: &str = "outlive arbiter directory, version 2";
/// Version 1 had the claims of all VMs side by side.
const OLD_MARKER_TITLE: &str = "outlive arbiter directory, version 1";
const CLAIM_TITLE: &str = "outlive claim, version 1";
const END_TITLE: &str = "outlive end of a VM, version 1";
/// Last line of every file: a file without it is damaged.
const LAST_LINE: &str = "end";
const ENDED_PREFIX: &str = "ended.";
const PRUNED_PREFIX: &str = "pruned.";
/// Longest text for people, in characters.
const LONGEST_TEXT: usize = 200;

/// What a marker says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Marker {
    /// The arbiter with this identity.
    Current(String),
    /// The arbiter with this identity, as an earlier release kept it.
    Old(String),
}

impl Marker {
    pub(super) fn text(identity: &str) -> String {
        format!("{MARKER_TITLE}\nid {identity}\n{LAST_LINE}\n")
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let current = field(text, MARKER_TITLE, "id").map(|id| Self::Current(id.to_owned()));
        current.or_else(|| field(text, OLD_MARKER_TITLE, "id").map(|id| Self::Old(id.to_owned())))
    }
}

/// Where the claims of a VM are.
pub(super) fn vm_name(vm: &VmId) -> String {
    vm.to_string()
}

/// The VM whose claims are in a directory of this name.
pub(super) fn parse_vm_name(name: &str) -> Option<VmId> {
    let vm = name.parse().ok()?;
    (vm_name(&vm) == name).then_some(vm)
}

pub(super) fn claim_name(vm: &VmId, generation: u64) -> String {
    format!("{vm}/{generation}")
}

/// The generation of a claim's name in its VM's directory, if it is exactly the name that the claim would
/// have.
pub(super) fn parse_claim_name(name: &str) -> Option<u64> {
    let generation: u64 = name.parse().ok()?;
    (generation.to_string() == name).then_some(generation)
}

/// Name that a claim had in version 1: VM and generation.
pub(super) fn parse_old_claim_name(name: &str) -> Option<(VmId, u64)> {
    let (vm, generation) = name.split_once('.')?;
    Some((parse_vm_name(vm)?, parse_claim_name(generation)?))
}

pub(super) fn ended_name(vm: &VmId, generation: u64) -> String {
    format!("{vm}/{ENDED_PREFIX}{generation}")
}

/// The generation in which a VM ended, by the name of the file that says so.
pub(super) fn parse_ended_name(name: &str) -> Option<u64> {
    parse_claim_name(name.strip_prefix(ENDED_PREFIX)?)
}

pub(super) fn pruned_name(vm: &VmId, floor: u64) -> String {
    format!("{vm}/{PRUNED_PREFIX}{floor}")
}

/// The generation below which no claim counts, by the name of the file that says so.
pub(super) fn parse_pruned_name(name: &str) -> Option<u64> {
    parse_claim_name(name.strip_prefix(PRUNED_PREFIX)?)
}

pub(super) fn claim_text(vm: &VmId, generation: u64, owner: &str, process: &str) -> String {
    let owner = printable(owner);
    format!("{CLAIM_TITLE}\nvm {vm}\ngeneration {generation}\nowner {owner}\ntoken {process}\n{LAST_LINE}\n")
}

/// The same with a time, in seconds since 1970, for arbiters that keep no times themselves.
pub(super) fn claim_text_at(vm: &VmId, generation: u64, owner: &str, process: &str, at: u64) -> String {
    let owner = printable(owner);
    format!(
        "{CLAIM_TITLE}\nvm {vm}\ngeneration {generation}\nowner {owner}\ntoken {process}\nat {at}\n{LAST_LINE}\n"
    )
}

/// The time in a text that has one.
pub(super) fn parse_at(text: &str) -> Option<u64> {
    let at = field(text, CLAIM_TITLE, "at").or_else(|| field(text, END_TITLE, "at"));
    at?.parse().ok()
}

/// Owner and process of a claim; `None` if the claim is not whole.
pub(super) fn parse_claim(text: &str) -> Option<(&str, &str)> {
    Some((field(text, CLAIM_TITLE, "owner")?, field(text, CLAIM_TITLE, "token")?))
}

pub(super) fn ended_text(vm: &VmId, generation: u64, why: &str) -> String {
    let why = printable(why);
    format!("{END_TITLE}\nvm {vm}\ngeneration {generation}\nwhy {why}\n{LAST_LINE}\n")
}

/// The same with a time, as [`claim_text_at`].
pub(super) fn ended_text_at(vm: &VmId, generation: u64, why: &str, at: u64) -> String {
    let why = printable(why);
    format!("{END_TITLE}\nvm {vm}\ngeneration {generation}\nwhy {why}\nat {at}\n{LAST_LINE}\n")
}

/// Why a VM ended.
pub(super) fn parse_ended(text: &str) -> Option<&str> {
    field(text, END_TITLE, "why")
}

/// A field of a whole file with this title; `None` if the file is not whole or is something else.
fn field<'a>(text: &'a str, title: &str, name: &str) -> Option<&'a str> {
    let body = text.strip_prefix(title)?.strip_prefix('\n')?.strip_suffix('\n')?;
    let fields = body.strip_suffix(LAST_LINE)?.strip_suffix('\n')?;
    fields.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
}

/// Makes a text for people one line of reasonable length.
pub(super) fn printable(text: &str) -> String {
    text.chars().take(LONGEST_TEXT).map(|c| if c.is_control() { '?' } else { c }).collect()
}
