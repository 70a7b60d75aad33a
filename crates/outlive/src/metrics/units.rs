//! Times and sizes that are known come through everything that counts and tells, and are in the text what they were: a
//! number that is told in another unit than its name says is a thousand times wrong, or more.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

use outlive_epoch::{CodecCounts, DISK_CHUNK};
use outlive_machine::{CaptureReport, Returned};

use super::ask::{Process, Scrape};
use super::families::FAMILIES;
use super::report::{ArbiterReport, Frames, Report, Running};
use super::tests::Read;
use super::text::{Format, text};
use crate::audit::Audit;
use crate::events::{Event, EventWriter, Role};
use crate::link::Shipped;
use crate::primary::Totals;
use crate::status::{OtherSight, Standing};

const MS: Duration = Duration::from_millis(1);
/// A test may be held up; a wrong unit is farther away.
const SLACK: f64 = 300.0;

/// A checkpoint, of which every figure is another number.
pub(super) fn checkpoint() -> CaptureReport {
    CaptureReport {
        pause: 3 * MS,
        stop: 4 * MS,
        state: 5 * MS,
        harvest: 6 * MS,
        handover: 7 * MS,
        rearm: 8 * MS,
        decide: 9 * MS,
        copy: 10 * MS,
        pages: 12,
        ended: Instant::now(),
        returned: Some(Returned { resume: 11 * MS, vcpu_pause: 2 * MS }),
    }
}

/// What a primary counts of a checkpoint, a takeover and an audit.
fn primary() -> Report {
    let totals = Totals::new(0);
    totals.captured(&checkpoint());
    totals.sent(70_000);
    totals.written(&CodecCounts { raw: 5, granules: 1, granule_bytes: 640, ..CodecCounts::default() });
    // The acknowledgement is faster than the system call.
    totals.committed(1);
    totals.shipped(&Shipped { number: 1, queue: 12 * MS, encode: 13 * MS, send: 14 * MS });
    totals.released(15 * MS);
    totals.held(1500 * MS);
    totals.sent(30_000);
    totals.shipped(&Shipped { number: 2, queue: MS, encode: MS, send: MS });
    audit(totals.audit());

    let standing = Standing::new(Role::Primary, Some("web"), "why");
    let events = EventWriter::disabled();
    standing.tells(&events);
    let counter = totals.clone();
    standing.runs_here("web", "00ff", 3, "why", move || counter.progress());
    standing.protected(3);
    standing.measured_by(move || totals.running());
    standing.other_sees(OtherSight::Lost(SystemTime::now() - Duration::from_secs(4000)));
    events.emit(Event::Takeover {
        generation: 3,
        checkpoint: 1,
        detect_us: 16_000,
        settle_us: 17_000,
        arbitrate_us: 18_000,
        restore_us: 19_000,
        first_packet_us: None,
        total_us: 70_000,
        input_given: 0,
        output_repeated: 0,
    });
    events.emit(Event::FirstPacket { after_us: 20_000 });
    let mut report = standing.report(Some(SystemTime::now() + Duration::from_secs(90_000)));
    // These come from a watch and from a network card.
    report.arbiter = Some(ArbiterReport { answered: Some(6000.0), lost: Some(7000.0) });
    let running = report.running.take().unwrap();
    let frames = Frames { held: 1, held_bytes: 1500, ..Frames::default() };
    report.running = Some(Running { frames: Some(frames), ..running });
    report
}

fn audit(audit: &std::sync::Arc<Audit>) {
    audit.pretend_disk(0, 100 * DISK_CHUNK as u64, 3, 2, Duration::from_secs(8000));
}

fn standby() -> Report {
    let standing = Standing::new(Role::Standby, Some("db"), "why");
    standing.applied(21 * MS);
    standing.fencing(SystemTime::now() - Duration::from_secs(5000), None);
    standing.report(None)
}

fn scrape() -> Scrape {
    // As one process tells another.
    let told = |report: Report| super::ask::parse(&serde_json::to_vec(&report).unwrap()).unwrap();
    let process = |report: Report| Process {
        socket: "/run/outlive/x.sock".into(),
        vm: report.vm.clone().unwrap(),
        took: 22 * MS,
        report: Ok(told(report)),
    };
    let processes = vec![process(primary()), process(standby())];
    Scrape { processes, folders: Vec::new(), ignored: 0, at: SystemTime::now() }
}

#[test]
fn what_went_in_comes_out_in_the_unit_of_its_name() {
    let read = Read::new(&text(scrape(), Format::Prometheus));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    let chunk = DISK_CHUNK as f64;
    // The name, a further label, what it is, and by how much time may have made it more.
    let phase = |name: &'static str, seconds: f64| {
        ("outlive_checkpoint_phase_seconds_sum", ("phase", name), seconds, 0.0)
    };
    let step = |name: &'static str, seconds: f64| {
        ("outlive_takeover_step_seconds_sum", ("step", name), seconds, 0.0)
    };
    let web = ("vm", "web");
    let expected = [
        ("outlive_answer_duration_seconds", web, 0.022, 0.0),
        ("outlive_start_time_seconds", web, now - SLACK, SLACK),
        ("outlive_protection_change_time_seconds", web, now - SLACK, SLACK),
        ("outlive_loss_lost_seconds", ("host", "this"), 0.0, SLACK),
        ("outlive_certificate_expiry_seconds", web, 90_000.0 - SLACK, SLACK),
        ("outlive_commit_age_seconds", web, 0.0, SLACK),
        ("outlive_in_flight_bytes", web, 30_000.0, 0.0),
        ("outlive_pause_seconds_sum", web, 0.003, 0.0),
        ("outlive_vcpu_pause_seconds_sum", web, 0.002, 0.0),
        ("outlive_commit_seconds_sum", web, 0.039, 0.0),
        ("outlive_apply_seconds_sum", ("vm", "db"), 0.021, 0.0),
        phase("stop", 0.004),
        phase("state", 0.005),
        phase("harvest", 0.006),
        phase("handover", 0.007),
        phase("rearm", 0.008),
        phase("decide", 0.009),
        phase("copy", 0.010),
        phase("resume", 0.011),
        phase("queue", 0.013),
        phase("encode", 0.014),
        phase("send", 0.015),
        phase("release", 0.015),
        ("outlive_checkpoint_size_bytes_sum", web, 100_000.0, 0.0),
        ("outlive_backlog_bytes_sum", web, 30_000.0, 0.0),
        ("outlive_link_sent_bytes_total", web, 100_000.0, 0.0),
        ("outlive_page_bytes_total", ("codec", "raw"), 5.0 * 4096.0, 0.0),
        ("outlive_page_bytes_total", ("codec", "granules"), 640.0, 0.0),
        ("outlive_guest_held_seconds_total", web, 1.5, 0.0),
        ("outlive_output_held_bytes", web, 1500.0, 0.0),
        ("outlive_arbiter_lost_duration_seconds", web, 7000.0, 0.0),
        ("outlive_arbiter_answer_age_seconds", web, 6000.0, 0.0),
        ("outlive_standby_arbiter_lost_duration_seconds", web, 4000.0, SLACK),
        ("outlive_takeover_seconds_sum", web, 0.070, 0.0),
        step("detect", 0.016),
        step("settle", 0.017),
        step("arbitrate", 0.018),
        step("restore", 0.019),
        step("first_frame", 0.020),
        ("outlive_fencing_duration_seconds", ("vm", "db"), 5000.0, SLACK),
        ("outlive_audit_disk_bytes_total", ("disk", "0"), 3.0 * chunk, 0.0),
        ("outlive_audit_disk_left_out_bytes_total", ("disk", "0"), 2.0 * chunk, 0.0),
        ("outlive_audit_disk_size_bytes", ("disk", "0"), 100.0 * chunk, 0.0),
        ("outlive_audit_disk_compared_age_seconds", ("disk", "0"), 8000.0, SLACK),
    ];
    for (name, label, value, later) in expected {
        let labels = [label, ("vm", if label.1 == "db" { "db" } else { "web" })];
        let is = read.value(name, &labels);
        assert!(
            (value - 1e-9..=value + later + 1e-9).contains(&is),
            "{name} {label:?}: {is}, and it is {value} to {}",
            value + later
        );
    }
    // Held frames are counted by a network card, and a record is a standby's; whole-VM tests see that they are told.
    let without = ["outlive_commit_held_bytes", "outlive_record_reach_seconds", "outlive_record_size_bytes"];
    let tested: BTreeSet<_> = expected.iter().map(|(name, ..)| name.trim_end_matches("_sum")).collect();
    for family in FAMILIES.iter().filter(|family| family.unit.is_some()) {
        let name = family.full_name();
        assert!(
            tested.contains(&*name) || without.contains(&&*name),
            "{name} is in a unit that nothing tests"
        );
    }
}
