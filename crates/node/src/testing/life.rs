//! What processes of VMs say and have counted: some minutes of it, made up and always the same.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::figures::{KEPT, Mark, Point, Role, Spread};
use crate::node::Node;

fn ago(secs: u64) -> SystemTime {
    SystemTime::now() - Duration::from_secs(secs)
}

fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}

fn common(peer: Option<&str>) -> Value {
    json!({ "pid": 7, "since": time(ago(95)), "generation": 3, "peer": peer, "link": "tls1.3", "sandbox": true,
        "checkpoint": 48213, "committed_ms_ago": 4,
        "arbiter": { "seen": time(ago(6)), "seen_ms_ago": 6000, "lost": null, "link": null, "is_operator": false },
        "audit": { "pages": 81_000, "rounds": 2, "differences": 0 },
        "loss_of_other_host": { "survived": true, "what": "the VM goes on here, unprotected", "lost_ms": 0 } })
}

fn with(mut status: Value, more: Value) -> Value {
    status.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    status
}

/// The status of a primary with a standby.
pub(crate) fn protected(peer: &str) -> Value {
    let loss =
        json!({ "survived": true, "what": "the standby takes over from the last checkpoint", "lost_ms": 4 });
    with(
        common(Some(peer)),
        json!({ "in_flight": 2, "bytes_in_flight": 35_000, "heat": heat(), "loss_of_this_host": loss }),
    )
}

/// Of one without.
pub(crate) fn unprotected() -> Value {
    let loss =
        json!({ "survived": false, "what": "all that is in the VM's memory would be lost", "lost_ms": null });
    let arbiter = json!({ "seen": null, "seen_ms_ago": 95_000, "lost": "it does not answer (timed out)", "link": null,
        "is_operator": false });
    with(common(None), json!({ "loss_of_this_host": loss, "checkpoint": null, "arbiter": arbiter }))
}

/// Of a standby.
pub(crate) fn standby(peer: &str) -> Value {
    let loss =
        json!({ "survived": true, "what": "the VM goes on at its primary, unprotected", "lost_ms": 0 });
    with(common(Some(peer)), json!({ "loss_of_this_host": loss }))
}

/// Where a VM of four GiB and its kernel is written: much in one place, and a little of everything.
pub(crate) fn heat() -> Value {
    let cell = 32 << 20;
    let rate = |cell: usize| match cell {
        70..=73 => 9_000 + 90 * chance(cell, 1),
        20..=30 | 100..=110 => 4 * chance(cell, 2),
        0..=60 | 96..=130 => chance(cell, 3) / 4,
        _ => 0,
    };
    json!({ "cell_bytes": cell,
        "ranges": [{ "first": 0, "bytes": 96_u64 * cell }, { "first": 1_u64 << 32, "bytes": 32_u64 * cell },
            { "first": (1_u64 << 32) + 32 * cell, "bytes": 2 * cell }],
        "pages_per_s": (0..130).map(rate).collect::<Vec<_>>() })
}

/// A number that looks like chance, from 0 to 99.
fn chance(at: usize, salt: usize) -> u64 {
    let mixed = (at + 1).wrapping_mul(2_654_435_761).wrapping_add(salt.wrapping_mul(40_503));
    ((mixed >> 7) % 100) as u64
}

fn spread(mean: u64, most: u64) -> Option<Spread> {
    Some(Spread { mean, most: Some(most) })
}

/// What becomes of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It came by a takeover, and was protected some seconds later.
    Guarded,
    /// It came by a takeover, and nobody protects it.
    Bare,
    /// It runs at the other host.
    Standby,
}

/// When it came, in seconds since the story began.
const CAME: usize = 180;

impl Kind {
    /// One second of it.
    pub(crate) fn point(self, second: usize, at: SystemTime) -> Point {
        let mut it = Point {
            time: time(at),
            span_ms: 1000,
            role: Role::Standby,
            protected: true,
            active: false,
            checkpoints: 0,
            pause_us: None,
            commit_us: None,
            dirty_pages: None,
            held_bytes: None,
            apply_us: None,
            sent_bytes: 0,
            guest_held_ms: 0,
            marks: Vec::new(),
        };
        if self == Self::Standby || second < CAME {
            it.apply_us = spread(300 + 5 * chance(second, 1), 1000);
            return it;
        }
        (it.role, it.active) = (Role::Primary, true);
        it.protected = self == Self::Guarded && second > CAME + 20;
        if second == CAME {
            it.marks = vec![Mark::Takeover, Mark::LinkLost];
        }
        if it.protected {
            let busy = if (220..250).contains(&second) { 8 } else { 1 };
            it.checkpoints = 900;
            it.pause_us = spread(
                120 + chance(second, 2) * busy,
                if chance(second, 3) > 90 { 3000 } else { 300 * busy },
            );
            it.dirty_pages = spread(20 + chance(second, 4) * busy, 256 * busy);
            it.commit_us = spread(900 + 8 * chance(second, 5) * busy, 5000 * busy);
            it.held_bytes = spread(1500 + 100 * chance(second, 7), 65_536).filter(|_| chance(second, 6) > 15);
        }
        it
    }
}

/// Lets five minutes pass at once, and then each second.
pub(crate) struct Life {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Life {
    pub(crate) fn new(node: &Arc<Node>, vms: &[(String, Kind)]) -> Self {
        let tell = |node: &Node, vms: &[(String, Kind)], second: usize, at: SystemTime| {
            vms.iter().for_each(|(vm, kind)| node.figures().keep(vm, kind.point(second, at)));
        };
        (0..KEPT).for_each(|second| tell(node, vms, second, ago((KEPT - second) as u64)));
        let (end, ends) = channel::<()>();
        let (node, vms) = (node.clone(), vms.to_owned());
        let live = move || {
            let mut second = KEPT;
            while ends.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
                tell(&node, &vms, second, SystemTime::now());
                second += 1;
            }
        };
        Self { end: Some(end), thread: Some(thread::spawn(live)) }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        drop(self.end.take());
        self.thread.take().unwrap().join().unwrap();
    }
}
