//! What a keeper says of its VM.

use std::sync::PoisonError;

use serde_json::json;

use super::{Keeper, Source};
use crate::definition::Definition;
use crate::process::Process;
use crate::records::{By, Desired};
use crate::view::{State, now};
use crate::words::of_node;

/// Why a VM is starting whose keeper has just begun.
pub(super) const LOOKS: &str = "the node looks for its process";

/// What is wrong with a definition.
pub(super) fn definition_error(source: &Source) -> Option<String> {
    match source {
        Some(Ok(_)) => None,
        Some(Err(why)) => Some(why.to_string()),
        None => Some("the definition was removed".into()),
    }
}

impl Keeper {
    pub(super) fn show(&self) {
        let (state, why) = self.state();
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let before = (shown.state, shown.protected);
        let told = self.told.as_ref();
        shown.protected = told.is_some_and(|it| it.protected);
        shown.has_standby = matches!(&self.source, Some(Ok(it)) if it.is_of_two_hosts());
        shown.why = why;
        shown.desired = self.record.desired;
        shown.has_process = self.process.is_some();
        shown.pid = self.process.as_ref().and_then(Process::pid).or(self.foreign);
        shown.adopted = self.process.as_ref().is_some_and(Process::is_adopted);
        shown.failures = self.plan.failures();
        shown.last_end.clone_from(&self.last_end);
        // What has a process lacks nothing.
        shown.warnings = if self.process.is_none() { self.warnings.clone() } else { Vec::new() };
        shown.status = told.map(|it| it.all.clone());
        let heat = told.filter(|_| shown.has_process).and_then(|it| it.heat.as_ref());
        self.shared.figures.keep_heat(&self.name, heat);
        shown.definition_changed = matches!(&self.source, Some(Ok(it)) if self.has_other_arguments(it));
        shown.definition_error = definition_error(&self.source);
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

    pub(super) fn state(&self) -> (State, Option<String>) {
        if !self.has_looked {
            return (State::Starting, Some(LOOKS.into()));
        }
        if self.process.is_some() {
            let told = self.told.as_ref();
            let state = match told {
                _ if self.asked => State::Stopping,
                Some(told) if told.starts => State::Starting,
                Some(told) if told.runs => State::Running,
                Some(told) if told.decides => State::Deciding,
                Some(_) => State::Standby,
                None => State::Starting,
            };
            return (state, told.and_then(|it| it.why.as_deref()).map(|why| of_node(why, &self.name)));
        }
        let end = self.last_end.as_ref().map(|it| it.what.clone());
        if let Some(pid) = self.foreign {
            return (State::Foreign, Some(format!("process {pid} has the VM, and no node has started it")));
        }
        match (&self.source, self.record.desired) {
            (None | Some(Err(_)), _) => (State::Misdefined, None),
            (_, Desired::Stopped) if self.record.by == By::Guest => (State::Ended, end),
            (_, Desired::Stopped) if self.record.by == By::Damage => {
                let name = &self.name;
                let why = format!("its record cannot be read: `outlive vm start {name}` starts it anew");
                (State::Stopped, Some(why))
            }
            // It is as somebody wants it, however the last process ended.
            (_, Desired::Stopped) => (State::Stopped, None),
            _ if self.plan.is_given_up() => (State::Failed, end),
            _ if self.parked => (State::Stopped, Some("this host is about to stop".into())),
            _ if self.held => (State::Stopped, Some("this host is drained".into())),
            _ if self.plan.failures() > 0 => (State::Waiting, end),
            _ => (State::Starting, end),
        }
    }
}
