//! What is known of a VM, as the API tells it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ended::End;
use crate::records::Desired;

/// What a VM's process does, or why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// The VM runs here.
    Running,
    /// This host is the VM's standby, or waits to become it.
    Standby,
    /// It is not decided yet which host starts the VM.
    Deciding,
    /// The process has not said anything yet, or the VM is its own and does not run yet.
    Starting,
    /// It was told to end.
    Stopping,
    /// An operator has stopped it, or nobody has started it.
    Stopped,
    /// The guest has ended by itself.
    Ended,
    /// It failed, and is started again soon.
    Waiting,
    /// It failed too often.
    Failed,
    /// Its definition cannot be used.
    Misdefined,
    /// Somebody else has started it.
    Foreign,
}

impl State {
    /// Whether there is, or is about to be, a process that this node keeps.
    pub(crate) fn is_kept(self) -> bool {
        matches!(self, Self::Running | Self::Standby | Self::Deciding | Self::Starting | Self::Stopping)
    }

    /// For people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Standby => "standby",
            Self::Deciding => "deciding",
            Self::Starting => "starting",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Ended => "ended",
            Self::Waiting => "waiting",
            Self::Failed => "failed",
            Self::Misdefined => "misdefined",
            Self::Foreign => "foreign",
        }
    }
}

/// A VM on this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct View {
    /// Its name.
    pub(crate) name: String,
    /// What it does.
    pub(crate) state: State,
    /// What the operator wants.
    pub(crate) desired: Desired,
    /// Whether a standby has all of it; here, or this host itself.
    pub(crate) protected: bool,
    /// Whether its definition gives it a second host.
    pub(crate) has_standby: bool,
    /// Why not, or why it is in this state.
    pub(crate) why: Option<String>,
    /// Since when it is in this state: RFC 3339, UTC.
    pub(crate) since: String,
    /// There is a process that this node keeps; its number may not be known yet.
    #[serde(default)]
    pub(crate) has_process: bool,
    /// Its process.
    pub(crate) pid: Option<u32>,
    /// This node has found the process and not started it.
    pub(crate) adopted: bool,
    /// How often in a row the process has failed.
    pub(crate) failures: u32,
    /// How the last process ended.
    pub(crate) last_end: Option<End>,
    /// The process was started with another definition; the new one counts from its next start.
    pub(crate) definition_changed: bool,
    /// What is wrong with the definition.
    pub(crate) definition_error: Option<String>,
    /// What this host lacks for the definition, while the VM has no process.
    #[serde(default)]
    pub(crate) warnings: Vec<String>,
    /// What the process says: the object of `outlive status --json`, without the map of its memory, which is one of the figures.
    pub(crate) status: Option<Value>,
}

/// What the page, `outlive top` and `outlive vm show` read of a process's status, as JSON pointers. What is missing there counts
/// as unknown, so the program's tests look for all of it in what its processes really say.
pub const READ_OF_STATUS: &[&str] = &[
    "/role",
    "/protected",
    "/since",
    "/generation",
    "/checkpoint",
    "/peer",
    "/link",
    "/sandbox",
    "/committed_ms_ago",
    "/in_flight",
    "/bytes_in_flight",
    "/arbiter/lost",
    "/arbiter/seen_ms_ago",
    "/arbiter/is_operator",
    "/standby_lost_arbiter_since",
    "/audit/pages",
    "/audit/differences",
    "/loss_of_this_host/survived",
    "/loss_of_this_host/what",
    "/loss_of_this_host/lost_ms",
    "/loss_of_other_host/survived",
    "/loss_of_other_host/what",
    "/loss_of_other_host/lost_ms",
];

/// The time of day, as the API has it.
pub(crate) fn now() -> String {
    humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words behind each of these.
    fn words<'a>(text: &'a str, before: &'a str) -> impl Iterator<Item = &'a str> {
        let is_part = |it: char| it.is_ascii_alphanumeric() || it == '_';
        text.split(before).skip(1).map(move |it| it.split(|it| !is_part(it)).next().unwrap_or_default())
    }

    #[test]
    fn whatever_is_read_of_a_status_is_listed() {
        let read = [
            (include_str!("picture/files/vms.js"), ["status.", "status?."]),
            (include_str!("picture/files/picture.js"), ["status.", "status?."]),
            (include_str!("top/vm.rs"), ["status[\"", "number(\""]),
            (include_str!("top/vm.rs"), ["text(\"", "status[\""]),
            (include_str!("cli/vm.rs"), ["told(\"", "status[\""]),
        ];
        let mut count = 0;
        for (text, before) in read {
            for word in before.iter().flat_map(|before| words(text, before)) {
                let is = |pointer: &str| pointer.split('/').nth(1) == Some(word);
                assert!(READ_OF_STATUS.iter().any(|it| is(it)), "{word} is not in the list");
                count += 1;
            }
        }
        assert!(count > 40, "only {count} were found");
    }
}
