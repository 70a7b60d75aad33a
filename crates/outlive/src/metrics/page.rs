//! The node reads what processes tell (`crates/node/src/figures`), and draws it. Neither side knows the other's names, and
//! what is missing counts as nothing: a name that changes on one side only would be an empty time line, and no error. So
//! what a process writes is given to the node's own reader here.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::histogram::{Histogram, SIZES};
use super::report::Running;
use super::tell;
use super::units::checkpoint;
use crate::events::{Event, EventWriter, Part, Role};
use crate::link::Shipped;
use crate::primary::Totals;
use crate::status::Standing;

const MS: Duration = Duration::from_millis(1);

/// A process in which a VM runs.
struct Process {
    standing: Arc<Standing>,
    totals: Arc<Totals>,
    /// A network card would count these.
    held: Arc<Histogram>,
    events: EventWriter,
}

impl Process {
    fn new() -> Self {
        let standing = Standing::new(Role::Primary, Some("web"), "why");
        let (totals, held) = (Totals::new(0), Arc::new(Histogram::new(SIZES)));
        let events = EventWriter::disabled();
        standing.tells(&events);
        let counter = totals.clone();
        standing.runs_here("web", "00ff", 3, "why", move || counter.progress());
        standing.protected(3);
        let (meter, frames) = (totals.clone(), held.clone());
        standing.measured_by(move || Running { held_bytes: frames.read(), ..meter.running() });
        Self { standing, totals, held, events }
    }

    /// A checkpoint, of which every figure is another number.
    fn counts_a_checkpoint(&self) {
        self.totals.captured(&checkpoint());
        self.totals.sent(70_000);
        self.totals.committed(1);
        self.totals.shipped(&Shipped { number: 1, queue: 12 * MS, encode: 13 * MS, send: 14 * MS });
        self.totals.held(1500 * MS);
        self.held.record(1600);
        self.standing.applied(21 * MS);
    }

    /// What the node makes of everything that happens here.
    fn point(&self, happens: impl FnOnce(&Self)) -> Value {
        let before = tell::line(&self.standing, None);
        happens(self);
        let now = tell::line(&self.standing, None);
        outlive_node::point_between(&before, &now).expect("the node does not take the line of a process")
    }
}

/// Whatever the API has of a second, the reader has found: nothing of it is left out because of its name.
#[test]
fn every_figure_of_the_page_is_found_in_what_a_process_tells() {
    let point = Process::new().point(|process| {
        process.counts_a_checkpoint();
        process.events.emit(Event::GuestPanicked);
    });
    let is_nothing =
        |value: &Value| [json!(null), json!(0), json!(false), json!(""), json!([])].contains(value);
    let figures = point.as_object().unwrap();
    let missing: Vec<_> =
        figures.iter().filter(|(_, value)| is_nothing(value)).map(|(name, _)| name).collect();
    assert!(missing.is_empty(), "the node finds nothing of {missing:?}: {point}");
    let spread = |mean: u64, most: u64| json!({ "mean": mean, "most": most });
    for (name, value) in [
        ("role", json!("primary")),
        ("checkpoints", json!(1)),
        ("sent_bytes", json!(70_000)),
        ("guest_held_ms", json!(1500)),
        ("pause_us", spread(3_000, 3_000)),
        ("commit_us", spread(39_000, 50_000)),
        ("dirty_pages", spread(12, 16)),
        ("held_bytes", spread(1600, 4096)),
        ("apply_us", spread(21_000, 50_000)),
    ] {
        assert_eq!(point[name], value, "{name}");
    }
}

/// Each by itself: a mark may come of several counters.
#[test]
fn every_mark_of_the_page_comes_of_what_happened() {
    let fault = |part| Event::HostFault { part, why: "x".into(), kept: None };
    let takeover = Event::Takeover {
        generation: 3,
        checkpoint: 1,
        detect_us: 1,
        settle_us: 1,
        arbitrate_us: 1,
        restore_us: 1,
        first_packet_us: None,
        total_us: 4,
        input_given: 0,
        output_repeated: 0,
    };
    let events = [
        ("takeover", takeover),
        ("hand_over", Event::HandOver { kept: None }),
        ("link_lost", Event::LinkLost { reason: "x".into() }),
        ("arbiter_lost", Event::ArbiterLost { why: "x".into() }),
        ("guest_restart", Event::GuestRestarted { how: "x".into() }),
        ("guest_panic", Event::GuestPanicked),
        ("host_fault", fault(Part::Vcpu)),
        ("host_fault", fault(Part::Disk)),
        ("host_fault", fault(Part::Network)),
    ];
    for (mark, event) in events {
        let point = Process::new().point(|process| process.events.emit(event.clone()));
        assert_eq!(point["marks"], json!([mark]), "{event:?}");
    }
    let point = Process::new().point(|process| process.standing.unprotected("x"));
    assert_eq!((&point["marks"], &point["protected"]), (&json!(["protection_lost"]), &json!(false)));
}
