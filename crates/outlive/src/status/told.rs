//! The facts as [`crate::metrics`] have them: the same truth as [`Status`], without words.

use std::sync::Weak;
use std::time::{Duration, SystemTime};

use super::answer::Status;
use super::standing::{Facts, Progress};
use crate::arbiter::Sight;
use crate::events::Role;
use crate::link::LinkKind;
use crate::metrics::{
    ArbiterReport, AuditReport, Buckets, FORMAT, Loss, RecordReport, Report, Running, unix,
};

/// What the facts do not have.
pub(super) struct About {
    /// When the process began.
    pub(super) began: SystemTime,
    /// How often a protection has ended.
    pub(super) losses: u64,
    /// What is measured of the VM, if it runs here.
    pub(super) running: Option<Running>,
    /// How long this standby took to apply a checkpoint, in nanoseconds.
    pub(super) apply: Buckets,
    /// Until when this host's certificate counts.
    pub(super) certificate_until: Option<SystemTime>,
}

fn seconds(ms: u64) -> f64 {
    Duration::from_millis(ms).as_secs_f64()
}

/// Puts it together.
pub(super) fn report(
    facts: &Facts,
    sight: Option<&Sight>,
    progress: Progress,
    about: About,
    now: SystemTime,
) -> Report {
    let status = Status::new(facts, sight, progress, now);
    let since = |at: SystemTime| now.duration_since(at).unwrap_or_default().as_secs_f64();
    let loss = |of: &super::Survival| Loss { survived: of.survived, lost: of.lost_ms.map(seconds) };
    let (counted, takeovers) = facts.events.as_ref().map(|events| events.tally().read()).unwrap_or_default();
    Report {
        format: FORMAT,
        release: env!("CARGO_PKG_VERSION").to_owned(),
        id: facts.id.clone(),
        role: status.role,
        started: unix(about.began),
        protected: status.protected,
        since: unix(facts.since),
        active: status.role == Role::Primary && about.running.is_some() && !facts.asking,
        waits: facts.asking,
        fencing: facts.fencing.map(since),
        generation: status.generation,
        checkpoint: status.checkpoint,
        since_commit: progress.since_commit.map(|it| it.as_secs_f64()),
        in_flight: status.in_flight,
        bytes_in_flight: status.bytes_in_flight,
        loss_of_this_host: loss(&status.loss_of_this_host),
        loss_of_other_host: loss(&status.loss_of_other_host),
        // Nobody looks whether a person is awake.
        arbiter: sight.filter(|sight| !sight.is_a_person).map(|sight| ArbiterReport {
            answered: sight.seen.map(since),
            lost: sight.lost.as_ref().map(|_| sight.lost_since.map_or(0.0, since)),
        }),
        standby_without_arbiter: facts.other.arbiter.lost().map(since),
        sandbox: status.sandbox,
        tls: facts.link.map(|link| link == LinkKind::Tls13),
        certificate_until: about.certificate_until.map(unix),
        protection_losses: about.losses,
        audit: AuditReport {
            pages: progress.audit.pages,
            rounds: progress.audit.rounds,
            differences: progress.audit.differences,
            disk_rounds: progress.audit.disk_rounds,
        },
        record: facts.record.as_ref().and_then(Weak::upgrade).map(|recorder| {
            let report = recorder.report();
            RecordReport {
                active: report.run.is_some(),
                reach: report.from.map(|(_, at)| since(at)),
                bytes: report.bytes,
                gaps: report.gaps,
            }
        }),
        apply: about.apply,
        counted,
        takeovers,
        running: about.running,
        vm: status.vm,
    }
}
