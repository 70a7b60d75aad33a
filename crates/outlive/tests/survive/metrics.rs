//! What Prometheus sees of two hosts: numbers that are true, nothing that fires while all is well, and the alert of each
//! fault that can be made here. `monitoring/outlive.rules.test.yml` has the others.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use outlive::arbiter::FileArbiter;
use outlive::events::Event;
use outlive::keys::{self, Grant, Order};

use crate::status::status;
use crate::support::{
    Held, MEMORY, MemoryLoad, PROGRAM, Process, Prometheus, Side, Witnesses, World, crashing_kernel,
    flip_program_bit, instance, monitoring, wait_until, watch_pair,
};

/// An arbiter on the third machine, which each host can lose by itself. Killed and reaped when dropped.
struct Third(Child);

impl Third {
    const PLACE: &'static str = "outlive:10.66.0.1:7010";

    fn serve(world: &World) -> Self {
        world.join_third(1);
        let (served, log) = (world.dir().join("served"), world.dir().join("served.log"));
        fs::create_dir(&served).unwrap();
        FileArbiter::init(&served).unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(["arbiter", "serve", "--listen", "10.66.0.1:7010", "--keys"]).arg(world.arbiter_keys());
        command.arg("--directory").arg(&served);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&log).unwrap());
        let server = Self(world.spawn_third(&mut command));
        wait_until("a server that listens", || fs::read_to_string(&log).unwrap().contains(" listens on "));
        server
    }
}

impl Drop for Third {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const A: (&str, &str) = ("instance", "host-a");
const B: (&str, &str) = ("instance", "host-b");

/// A pair that is well, then without the arbiter at either host, then without its standby.
#[test]
fn an_arbiter_that_is_lost_raises_its_alerts_and_a_pair_that_is_well_none() {
    let Some(mut world) = World::new() else { return };
    let _third = Third::serve(&world);
    world.ask_arbiter(Third::PLACE.into());
    let (mut primary, standby) = world.protected(Side::A);
    let Some(prometheus) = watch_pair(&world, &primary, &standby) else { return };
    let witnesses = Witnesses::start(&world, 2);
    witnesses.hear_all();
    prometheus.sees_more();
    assert_eq!(prometheus.firing(), [] as [serde_json::Value; 0], "all is well");
    the_numbers_are_true(&prometheus, &mut primary);

    world.see_third(Side::A, false);
    prometheus.wait_fires("OutliveArbiterLost", &[A, ("role", "primary")]);
    assert!(
        !prometheus.fires("OutliveArbiterLost", &[B]) && !prometheus.fires("OutliveStandbyArbiterLost", &[])
    );
    // The standby sees the arbiter, and would take over. But the VM would not go on here without the standby.
    assert!(!prometheus.fires("OutliveLossNotSurvived", &[]));
    let left = r#"outlive_loss_survived{instance="host-a",role="primary",host="other"}"#;
    wait_until("a loss that is not survived", || prometheus.number(left) == Some(0.0));
    world.see_third(Side::A, true);
    prometheus.wait_quiet("OutliveArbiterLost");

    world.see_third(Side::B, false);
    prometheus.wait_fires("OutliveArbiterLost", &[B, ("role", "standby")]);
    prometheus.wait_fires("OutliveStandbyArbiterLost", &[A]);
    prometheus.wait_fires("OutliveLossNotSurvived", &[A]);
    world.see_third(Side::B, true);
    prometheus.wait_quiet("OutliveStandbyArbiterLost");
    prometheus.wait_quiet("OutliveLossNotSurvived");
    assert!(!prometheus.fires("OutliveUnprotected", &[]), "it was protected all the time");
    witnesses.hear_all();
    witnesses.finish(&world);

    // The standby dies, and nobody can say who goes on.
    world.see_third(Side::A, false);
    standby.kill();
    prometheus.wait_fires("OutliveWaiting", &[A]);
    prometheus.wait_fires("OutliveProcessGone", &[B]);
    world.see_third(Side::A, true);
    prometheus.wait_fires("OutliveUnprotected", &[A, ("vm", "vm")]);
    prometheus.wait_quiet("OutliveWaiting");
    assert!(!prometheus.fires("OutliveRunsNowhere", &[]) && !prometheus.fires("OutliveRunsTwice", &[]));
}

/// What Prometheus has is what the event stream and `outlive status` say.
fn the_numbers_are_true(prometheus: &Prometheus, primary: &mut Process) {
    let at_a = |query: &str| {
        let query = query.replace('@', r#"{instance="host-a",role="primary"}"#);
        prometheus.number(&query).unwrap_or_else(|| panic!("{query}"))
    };
    let stats = |primary: &mut Process| {
        let stats = primary.events().filter_map(|event| match event {
            Event::Stats(stats) => Some(stats.clone()),
            _ => None,
        });
        stats.last().unwrap()
    };
    let before = stats(primary);
    prometheus.sees_more();
    let (checkpoints, bytes) = (at_a("outlive_checkpoints_total@"), at_a("outlive_link_sent_bytes_total@"));
    let pages = at_a("sum(outlive_pages_total@)");
    wait_until("later counters", || stats(primary).checkpoints as f64 >= checkpoints);
    let after = stats(primary);
    let between = |what: &str, is: f64, from: u64, to: u64| {
        assert!((from as f64..=to as f64).contains(&is), "{what}: {is}, and the events say {from} and {to}");
    };
    between("checkpoints", checkpoints, before.checkpoints, after.checkpoints);
    between("bytes", bytes, before.bytes, after.bytes.max(bytes as u64));
    assert!(bytes <= after.bytes as f64 * 1.5, "bytes: {bytes}, {}", after.bytes);
    let all = |it: &outlive::events::PageCounts| it.raw + it.zero + it.granules + it.unchanged;
    assert!(pages >= all(&before.pages) as f64);
    // The pause as the events measure it, in nanoseconds, and as the histogram has it, in seconds.
    let (mut count, mut sum) = (0, 0.0);
    for event in primary.events() {
        if let Event::Measured(measured) = event {
            for (ns, times) in measured.phases.get("pause").into_iter().flatten() {
                (count, sum) = (count + times, sum + *ns as f64 * 1e-9 * *times as f64);
            }
        }
    }
    let mean = at_a("outlive_pause_seconds_sum@") / at_a("outlive_pause_seconds_count@");
    let told = sum / count as f64;
    assert!(
        count > 0 && mean / told < 5.0 && told / mean < 5.0,
        "{mean} s in the metrics, {told} s in the events"
    );
    let median = at_a("histogram_quantile(0.5, outlive_pause_seconds_bucket@)");
    assert!(median < told * 10.0, "{median} s is the median, and {told} s the mean");
    // The rest of what an operator asks.
    let status = status(primary.socket());
    assert_eq!(at_a("outlive_generation@"), status.generation.unwrap() as f64);
    assert_eq!(at_a("outlive_protected@"), 1.0);
    assert_eq!(at_a("outlive_active@"), 1.0);
    assert_eq!(at_a(r#"outlive_loss_survived{instance="host-a",host="this"}"#), 1.0);
    assert_eq!(at_a(r#"outlive_loss_survived{instance="host-a",host="other"}"#), 1.0);
    assert_eq!(at_a("outlive_link_encrypted@"), 1.0);
    assert!(at_a("outlive_commit_age_seconds@") < 60.0 && at_a("outlive_arbiter_answer_age_seconds@") < 60.0);
    let days = at_a("outlive_certificate_expiry_seconds@") / (24.0 * 3600.0);
    assert!((88.0..=90.0).contains(&days), "{days} days");
    assert_eq!(prometheus.number("sum(outlive_active)"), Some(1.0));
    assert_eq!(prometheus.number(r#"outlive_protected{role="standby"}"#), Some(1.0));
}

/// The takeover waits for a command that fails: the VM runs nowhere.
#[test]
fn a_fence_command_that_fails_raises_its_alerts() {
    let Some(world) = World::new() else { return };
    let (there, opened) = (Side::A.addr().to_string(), world.dir().join("let"));
    let command = format!("test -e {}", opened.display());
    let mut standby = world.standby_with(Side::B, &["--standby", &there, "--fence", &command]);
    let mut primary = world.run(Side::A);
    primary.wait_protected();
    let Some(prometheus) = watch_pair(&world, &primary, &standby) else { return };
    prometheus.sees_more();
    primary.kill();
    prometheus.wait_fires("OutliveFencing", &[B, ("vm", "vm")]);
    prometheus.wait_fires("OutliveWaiting", &[B]);
    prometheus.wait_fires("OutliveRunsNowhere", &[("vm", "vm")]);
    prometheus.wait_fires("OutliveProcessGone", &[A, ("vm", "vm")]);
    assert!(!prometheus.fires("OutliveHostGone", &[]));
    fs::write(opened, "").unwrap();
    standby.wait_takeover();
    for alert in ["OutliveFencing", "OutliveWaiting", "OutliveRunsNowhere"] {
        prometheus.wait_quiet(alert);
    }
    prometheus.wait_fires("OutliveUnprotected", &[B]);
    wait_until("the takeover is counted", || prometheus.number("sum(outlive_takeovers_total)") == Some(1.0));
    let told = standby.events().find_map(|event| match event {
        Event::Takeover { total_us, .. } => Some(*total_us as f64 * 1e-6),
        _ => None,
    });
    let sum = prometheus.number("sum(outlive_takeover_seconds_sum)").unwrap();
    assert!((sum - told.unwrap()).abs() < 1e-9, "{sum} s, and the event says {told:?}");
    assert!(prometheus.number("sum(outlive_fence_failures_total)") >= Some(1.0));
}

#[test]
fn a_copy_that_differs_and_a_standby_that_is_slow_raise_their_alerts() {
    let Some(world) = World::new() else { return };
    let (there, audit) = (Side::B.addr().to_string(), ["--audit", "100"]);
    let mut standby = world.standby_with(Side::B, &audit);
    let mut primary = world.run_with(Side::A, &[&["--standby", &there][..], &audit].concat());
    primary.wait_protected();
    let Some(prometheus) = watch_pair(&world, &primary, &standby) else { return };
    let witnesses = Witnesses::start(&world, 2);
    let load = MemoryLoad::start(&world, 2000, 20_000);
    witnesses.hear_all();
    prometheus.sees_more();
    assert!(!prometheus.fires("OutliveStandbySlow", &[]) && !prometheus.fires("OutliveCopyDiffers", &[]));
    let stopped = Held::thread(&standby, "applier");
    prometheus.wait_fires("OutliveStandbySlow", &[A]);
    drop(stopped);
    witnesses.hear_all();
    prometheus.wait_quiet("OutliveStandbySlow");
    load.finish(&world);
    witnesses.finish(&world);
    if !primary.has(|e| matches!(e, Event::LinkLost { .. })) {
        flip_program_bit(&standby, MEMORY);
        primary.wait_for("told of the difference", |e| matches!(e, Event::AuditDiffers { .. }));
    }
    prometheus.wait_fires("OutliveCopyDiffers", &[A]);
    prometheus.wait_fires("OutliveCopyDiffers", &[B]);
    assert!(!standby.ended());
}

/// The keys of one host end soon, its process is not confined, and then its `outlive metrics` is gone.
#[test]
fn what_is_configured_badly_raises_its_alerts() {
    let Some(world) = World::new() else { return };
    let keys = world.dir().join("keys-short");
    let five_days = Duration::from_secs(5 * 24 * 3600);
    let order = Order { host: "hosta".into(), grant: Grant::ALL, life: five_days };
    keys::issue(&world.keys(Side::A), &order, &keys).unwrap();
    let standby = world.standby(Side::B);
    let there = Side::B.addr().to_string();
    let options = ["--standby", &there, "--keys", keys.to_str().unwrap(), "--sandbox", "off"];
    let mut primary = world.run_with(Side::A, &options);
    primary.wait_protected();
    let Some(mut prometheus) = watch_pair(&world, &primary, &standby) else { return };
    prometheus.wait_fires("OutliveCertificateExpires", &[A]);
    prometheus.wait_fires("OutliveNotConfined", &[A]);
    prometheus.sees_more();
    assert!(!prometheus.fires("OutliveCertificateExpires", &[B]), "that of host b is good for months");
    assert!(!prometheus.fires("OutliveNotConfined", &[B]) && !prometheus.fires("OutliveHostGone", &[]));
    prometheus.export(Side::A, &[]);
    prometheus.wait_fires("OutliveHostGone", &[A]);
    prometheus.export(Side::A, &[primary.socket()]);
    prometheus.wait_quiet("OutliveHostGone");
}

#[test]
fn an_open_link_and_a_guest_that_restarts_again_and_again_raise_their_alerts() {
    let Some(world) = World::plain() else { return };
    let kernel = world.dir().join("crashing");
    fs::write(&kernel, crashing_kernel()).unwrap();
    let (primary, standby) = world.protected_with(Side::A, &["--kernel", kernel.to_str().unwrap()]);
    let Some(prometheus) = watch_pair(&world, &primary, &standby) else { return };
    prometheus.wait_fires("OutliveLinkOpen", &[A]);
    prometheus.wait_fires("OutliveGuestRestarts", &[A, ("vm", "vm")]);
    assert!(!prometheus.fires("OutliveProcessRestarts", &[]));
}

/// Two VMs of one name, which a cut link has hidden from each other; then one of them is started again and again.
#[test]
fn two_vms_of_one_name_and_a_process_that_starts_again_and_again_raise_their_alerts() {
    let Some(world) = World::new() else { return };
    let (here, of_b) = (world.dir().join("here"), Side::B.addr().to_string());
    let start = || world.run_with(Side::A, &["--standby", &of_b, "--status", here.to_str().unwrap()]);
    let b = world.run(Side::B);
    world.cut_link();
    let mut a = start();
    a.wait_for("a start", |e| matches!(e, Event::Started { vm: Some(_), .. }));
    let Some(prometheus) = Prometheus::watch(&world, &[(Side::A, &here), (Side::B, b.socket())]) else {
        return;
    };
    prometheus.sees_more();
    assert!(!prometheus.fires("OutliveRunsTwice", &[]), "other people may have a VM of this name");
    let again = |a: Process| {
        a.kill();
        let mut a = start();
        a.wait_for("a start", |e| matches!(e, Event::Started { vm: Some(_), .. }));
        prometheus.sees_more();
        a
    };
    for _ in 0..3 {
        a = again(a);
    }
    assert!(!prometheus.fires("OutliveProcessRestarts", &[]));
    a = again(a);
    prometheus.wait_fires("OutliveProcessRestarts", &[A, ("vm", "vm")]);
    drop(a);
    drop(b);
    world.mend_link();
    // As after a takeover that the old host knows nothing of: it has no image that would tell.
    let mut standby = world.standby(Side::B);
    let mut a = start();
    a.wait_protected();
    a.kill();
    standby.wait_takeover();
    world.cut_link();
    let mut a = start();
    a.wait_for("a start", |e| matches!(e, Event::Started { vm: Some(_), .. }));
    prometheus.sees_more();
    world.mend_link();
    prometheus.wait_fires("OutliveRunsTwice", &[("vm", "vm")]);
}

/// Each alert is raised by a test: here, or by promtool.
#[test]
fn every_alert_has_a_test() {
    let rules = fs::read_to_string(monitoring().join("outlive.rules.yml")).unwrap();
    let tests = fs::read_to_string(monitoring().join("outlive.rules.test.yml")).unwrap();
    let here = include_str!("metrics.rs");
    let alerts: BTreeSet<&str> =
        rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 10);
    for alert in alerts {
        let raised_here = here.contains(&format!("wait_fires(\"{alert}\""));
        let raised_there = tests.split("alertname: ").skip(1).any(|test| {
            test.starts_with(&format!("{alert}\n"))
                && test.lines().nth(1).is_some_and(|it| it.trim() == "exp_alerts:")
        });
        assert!(raised_here || raised_there, "no test raises {alert}");
    }
}

/// The names of hosts, as the constants of this file have them.
#[test]
fn hosts_are_called_as_the_tests_say() {
    assert_eq!([A.1, B.1], Side::BOTH.map(instance));
    assert!(Path::new(PROGRAM).exists());
}
