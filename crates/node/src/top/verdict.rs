//! The one look: what a failure of this host now would mean, and which hosts have a part in its VMs.

use std::collections::BTreeMap;

use super::draw::Tone;
use super::state::Host;
use super::text::many;
use super::vm::Vm;
use crate::figures::Role;
use crate::view::State;

/// The sentence, and then more of it, a line each.
pub(super) fn verdict(host: &Host, vms: &[Vm]) -> Vec<(Tone, String)> {
    let runs = |vm: &&Vm| matches!(vm.state, State::Running | State::Starting) && vm.says.is_some();
    let here: Vec<_> = vms.iter().filter(runs).collect();
    let lost: Vec<_> = here.iter().filter(|vm| vm.survives() != Some(true)).collect();
    let broken = vms
        .iter()
        .filter(|vm| matches!(vm.state, State::Failed | State::Misdefined | State::Waiting | State::Foreign));
    let mut rest: Vec<_> = broken.map(|vm| (Tone::Warn, vm.is_broken())).collect();
    rest.extend(host.warnings.iter().map(|it| (Tone::Warn, it.clone())));
    let tone = if rest.is_empty() { Tone::Good } else { Tone::Warn };
    let guarded = vms.iter().filter(|vm| vm.state == State::Standby && vm.protected).count();
    if guarded > 0 {
        rest.push((Tone::Plain, format!("This host protects {} of other hosts.", many(guarded, "VM"))));
    }
    let title = match (here.len(), lost.len()) {
        (0, _) => (tone, "If this host failed now, nothing would be lost: no VM runs here.".into()),
        (1, 0) => (tone, "If this host failed now, the VM that runs here would go on.".into()),
        (all, 0) => (tone, format!("If this host failed now, all {all} VMs that run here would go on.")),
        (all, lost) => {
            let all = many(all, "VM");
            (Tone::Bad, format!("If this host failed now, {lost} of {all} would NOT go on:"))
        }
    };
    let why = |vm: &&&Vm| {
        let loss = vm.says.as_ref().and_then(|it| it.loss_here.as_ref());
        let what = loss.map(|it| it.what.as_str()).filter(|it| !it.is_empty()).unwrap_or("not known");
        (Tone::Bad, format!("  {}: {what}", vm.shown))
    };
    [title].into_iter().chain(lost.iter().map(why)).chain(rest).collect()
}

impl Vm {
    fn is_broken(&self) -> String {
        let why = self.why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
        format!("{} is {}{why}", self.shown, self.state.name())
    }
}

/// What a host has to do with the VMs of this one.
#[derive(Default)]
struct Part {
    runs: usize,
    protects: usize,
}

impl Part {
    fn text(&self, name: &str) -> String {
        let parts = [("runs", self.runs), ("protects", self.protects)];
        let said: Vec<_> = parts
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(what, count)| format!("{what} {count}"))
            .collect();
        if said.is_empty() { format!("{name}: no VM") } else { format!("{name} {}", said.join(", ")) }
    }
}

/// The hosts, this one first: how many VMs each runs and protects, as far as this node knows.
pub(super) fn hosts(host: &Host, vms: &[Vm]) -> String {
    let mut own = Part::default();
    let mut others: BTreeMap<&str, Part> = BTreeMap::new();
    for vm in vms {
        let Some(says) = &vm.says else { continue };
        let other = says.peer.as_deref().map(without_port);
        match says.role {
            Some(Role::Primary) => {
                own.runs += 1;
                other
                    .filter(|_| vm.protected)
                    .into_iter()
                    .for_each(|it| others.entry(it).or_default().protects += 1);
            }
            Some(Role::Standby) if vm.protected => {
                own.protects += 1;
                other.into_iter().for_each(|it| others.entry(it).or_default().runs += 1);
            }
            _ => {}
        }
    }
    let all = others.iter().map(|(name, part)| part.text(name));
    [own.text(&format!("{} (here)", host.name))].into_iter().chain(all).collect::<Vec<_>>().join(" │ ")
}

fn without_port(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}
