//! Exit codes, and the last words that go with them: the one place that knows both.

use std::fmt::Display;

use outlive_epoch::EndReason;
use outlive_pair::{ExitReason, StandbyExit};

use crate::events::{Event, EventWriter};
use crate::logs;
use crate::vm::End;

/// Ended in order.
pub const OK: u8 = 0;
/// Failed while running.
pub const FAILED: u8 = 1;
/// Wrong options, or something missing on this machine.
pub const USAGE: u8 = 2;
/// The other side won the VM; this one has stopped.
pub const FENCED: u8 = 3;

/// Prints the one line for exit code 2 and returns the code. `error` says what is wrong and what to do.
pub fn usage(error: impl Display) -> u8 {
    logs::say(&format!("outlive: {error}"));
    USAGE
}

/// Reports how a side's work ended, in the log or on standard error and as the last event, and returns the
/// exit code.
pub(crate) fn conclude(end: &End, events: &EventWriter) -> u8 {
    let (code, reason) = (code(end), text(end));
    match end {
        End::Primary(ExitReason::Ended(EndReason::Crash)) | End::Failed(_) => tracing::error!("{reason}"),
        End::Primary(ExitReason::Ended(_))
        | End::Standby(StandbyExit::Followed(_) | StandbyExit::Stopped) => tracing::info!("{reason}"),
        End::Primary(ExitReason::Fenced { .. })
        | End::Standby(StandbyExit::Lost { .. } | StandbyExit::Failed(_)) => {
            logs::say(&format!("outlive: {reason}"));
        }
    }
    events.emit(Event::Ended { reason, code: code.into() });
    events.finish();
    code
}

/// 0 after an orderly end. For a standby a crash of the guest is one: it did its job.
fn code(end: &End) -> u8 {
    match end {
        End::Primary(ExitReason::Ended(EndReason::Crash)) => FAILED,
        End::Primary(ExitReason::Ended(_)) => OK,
        End::Standby(StandbyExit::Followed(_) | StandbyExit::Stopped) => OK,
        End::Standby(StandbyExit::Failed(_)) | End::Failed(_) => FAILED,
        End::Primary(ExitReason::Fenced { .. }) | End::Standby(StandbyExit::Lost { .. }) => FENCED,
    }
}

/// What the end is, for a person.
pub(crate) fn text(end: &End) -> String {
    match end {
        End::Primary(reason) => reason.to_string(),
        End::Standby(reason) => reason.to_string(),
        End::Failed(why) => why.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_as_the_help_says() {
        let elsewhere = (7, "b".to_owned());
        for (end, expected) in [
            (End::Primary(ExitReason::Ended(EndReason::PowerOff)), 0),
            (End::Primary(ExitReason::Ended(EndReason::Stopped)), 0),
            (End::Primary(ExitReason::Ended(EndReason::Crash)), 1),
            (End::Primary(ExitReason::Fenced { generation: 7, owner: elsewhere.1.clone() }), 3),
            (End::Standby(StandbyExit::Followed(EndReason::Crash)), 0),
            (End::Standby(StandbyExit::Stopped), 0),
            (End::Standby(StandbyExit::Failed("disk".into())), 1),
            (End::Standby(StandbyExit::Lost { generation: 7, owner: elsewhere.1 }), 3),
            (End::Failed("overrun".into()), 1),
        ] {
            assert_eq!(code(&end), expected, "{end:?}");
        }
    }
}
