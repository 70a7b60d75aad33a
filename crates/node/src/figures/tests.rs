//! Points are what was counted between two answers, and nobody is told one twice or misses one.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::meter::{self, Meter};
use super::*;

fn buckets(counts: [u64; 3], sum: u64) -> Value {
    json!({ "bounds": [100_000, 200_000], "counts": counts, "sum": sum })
}

fn told(started: f64, checkpoints: u64, pause: &Value, counted: &Value, losses: u64) -> Value {
    json!({ "format": 1, "release": "x", "role": "primary", "started": started, "protected": true, "active": true,
        "protection_losses": losses, "counted": counted, "new": 7,
        "running": { "checkpoints": checkpoints, "bytes": checkpoints * 1000, "guest_held_ns": checkpoints * 500_000,
            "pause": pause, "dirty_pages": pause } })
}

fn report(value: &Value) -> meter::Report {
    meter::read(&serde_json::to_vec(value).unwrap()).unwrap()
}

#[test]
fn a_point_is_what_was_counted_since_the_last_one() {
    let mut meter = Meter::default();
    let began = Instant::now();
    let mut step = |secs: u64, value: &Value| meter.step(report(value), began + Duration::from_secs(secs));
    let none = json!({});
    assert_eq!(step(0, &told(1.5, 10, &buckets([10, 0, 5], 9_000_000), &none, 0)), None, "the first time");
    let point = step(2, &told(1.5, 14, &buckets([13, 1, 5], 9_460_000), &none, 0)).unwrap();
    assert_eq!((point.span_ms, point.checkpoints, point.sent_bytes, point.guest_held_ms), (2000, 4, 4000, 2));
    assert_eq!(point.pause_us, Some(Spread { mean: 115, most: Some(200) }));
    assert_eq!(point.dirty_pages, Some(Spread { mean: 115_000, most: Some(200_000) }), "no time");
    assert_eq!((point.role, point.commit_us, point.marks), (Role::Primary, None, vec![]));
    // What is larger than every bound has none, and what has happened is a mark, however often.
    let counted = json!({ "takeovers": 1, "disk_faults": 2, "new": 1 });
    let point = step(3, &told(1.5, 15, &buckets([13, 1, 6], 19_460_000), &counted, 1)).unwrap();
    assert_eq!(point.pause_us, Some(Spread { mean: 10_000, most: None }));
    assert_eq!(point.marks, [Mark::Takeover, Mark::ProtectionLost, Mark::HostFault]);
    // It went away and came back in the same process: it is counted anew.
    let point = step(4, &told(1.5, 3, &buckets([3, 0, 0], 150_000), &counted, 1)).unwrap();
    assert_eq!((point.checkpoints, point.pause_us), (3, Some(Spread { mean: 50, most: Some(100) })));
    assert_eq!(point.marks, []);
    assert_eq!(step(5, &told(2.5, 9, &buckets([9, 0, 0], 1), &none, 0)), None, "another process");
    // Another process may not even be one of ours.
    let point = step(6, &told(2.5, 9, &buckets([9, 0, 0], 1), &none, 0)).unwrap();
    assert_eq!((point.checkpoints, point.pause_us), (0, None));
}

#[test]
fn what_cannot_be_is_not_believed() {
    let none = json!({});
    let good = told(1.0, 1, &buckets([u64::MAX, u64::MAX, 1], u64::MAX), &none, 0);
    let mut meter = Meter::default();
    meter.step(report(&told(1.0, 0, &buckets([0, 0, 0], 0), &none, 0)), Instant::now());
    // It is absurd, and breaks nothing.
    meter.step(report(&good), Instant::now()).unwrap();
    for (pointer, wrong) in [
        ("/format", json!(2)),
        ("/role", json!("king")),
        ("/running/pause/counts", json!([1, 2])),
        ("/running/pause/bounds", json!([])),
        ("/started", json!("x")),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).unwrap() = wrong;
        assert!(meter::read(&serde_json::to_vec(&bad).unwrap()).is_none(), "{pointer}");
    }
    let mut many = good;
    many["running"]["pause"] = json!({ "bounds": vec![1; 64], "counts": vec![1; 65], "sum": 1 });
    assert!(meter::read(&serde_json::to_vec(&many).unwrap()).is_none());
}

fn some_point() -> Point {
    let none = json!({});
    let mut meter = Meter::default();
    let value = told(1.0, 1, &buckets([0, 0, 0], 0), &none, 0);
    meter.step(report(&value), Instant::now());
    meter.step(report(&value), Instant::now()).unwrap()
}

#[test]
fn points_are_told_once_and_only_the_last_are_kept() {
    let store = Store::new("abc");
    let counts = |figures: &Figures| figures.vms.values().map(Vec::len).collect::<Vec<_>>();
    let empty = store.after(None);
    assert_eq!((empty.next.as_str(), empty.reset, empty.vms.len()), ("abc-0", true, 0));
    store.keep("web", some_point());
    store.keep("db", some_point());
    store.keep("web", some_point());
    let all = store.after(Some("abd-1"));
    assert_eq!((all.next.as_str(), all.reset, counts(&all)), ("abc-3", true, vec![1, 2]));
    let two = store.after(Some("abc-1"));
    assert_eq!((two.reset, counts(&two)), (false, vec![1, 1]));
    let last = store.after(Some("abc-2"));
    assert_eq!(last.vms.keys().collect::<Vec<_>>(), ["web"]);
    assert_eq!((store.after(Some(&last.next)).vms.len(), store.after(Some("abc-9")).reset), (0, true));
    (0..KEPT + 5).for_each(|_| store.keep("web", some_point()));
    assert_eq!(store.after(None).vms["web"].len(), KEPT);
    store.forget("web");
    assert_eq!(counts(&store.after(None)), [1]);
}

#[test]
fn the_map_of_a_vm_is_the_last_one() {
    let store = Store::new("abc");
    let heat = Arc::new(map());
    store.keep_heat("web", Some(&heat));
    store.keep_heat("db", Some(&heat));
    assert_eq!(store.after(None).heat["web"], map());
    store.keep_heat("web", Some(&Arc::new(Heat { pages_per_s: vec![3; 256], ..map() })));
    let later = store.after(Some("abc-0"));
    assert_eq!((later.heat["web"].total(), later.heat["db"].total()), (3 * 256, 256 * 99_999));
    store.keep_heat("web", None);
    store.forget("db");
    assert_eq!(store.after(None).heat.len(), 0);
}

fn map() -> Heat {
    let ranges = vec![heat::Range { first: 0, bytes: 256 << 20 }];
    Heat { cell_bytes: 1 << 20, ranges, pages_per_s: vec![99_999; 256] }
}

#[test]
fn many_vms_share_the_room() {
    let store = Store::new("abc");
    (0..500).for_each(|vm| store.keep_heat(&vm.to_string(), Some(&Arc::new(map()))));
    let vms = 500;
    for _ in 0..ALL / vms + 20 {
        (0..vms).for_each(|vm| store.keep(&vm.to_string(), some_point()));
    }
    let all: usize = store.after(None).vms.values().map(Vec::len).sum();
    assert!((ALL * 9 / 10..=ALL).contains(&all), "{all}");
    let text = serde_json::to_vec(&store.after(None)).unwrap();
    assert!(text.len() < 16 << 20, "a client takes no longer answer: {}", text.len());
}
