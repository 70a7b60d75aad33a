//! The whole demo with actors: a shell script instead of `outlive run` and `outlive standby`, a server in
//! this process instead of the VM. The director, the processes and their ends, the clients and the judge are
//! real.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::arbiter::Arbiter;
use super::cluster::{Cluster, Shape, WorkDir};
use super::director::{Director, Play, Stop};
use super::fake::{FakeServer, Fault};
use super::summary::Summary;
use crate::cli::DemoArbiter;
use crate::phases::Phase;

/// An actor. The file `active` beside the arbiter's directory holds the process that runs the VM.
const ACTOR: &str = r#"#!/bin/sh
mode=$1
while [ $# -gt 0 ]; do
    case $1 in
        --events) events=$2 ;;
        --arbiter) dir=${2#file:} ;;
    esac
    shift
done
t=5000000
say() { t=$((t + 1000)); echo "{$1,\"t_us\":$t,\"pid\":$$}" >>"$events"; }
active() { cat "$dir/active" 2>/dev/null; }
on_stage() { echo $1 >"$dir/active.$$"; mv "$dir/active.$$" "$dir/active"; }
live() {
    on_stage $$
    say '"event":"protected","generation":1,"checkpoint":1,"base_ms":5'
    n=0
    while :; do
        sleep 0.05
        n=$((n + 40))
        say "\"event\":\"stats\",\"generation\":1,\"checkpoints\":$n,\"rate_hz\":800.0,\"bytes\":1,\"held_frames\":0"
        say "\"event\":\"measured\",\"span_us\":50000,\"phases\":{\"pause\":[[200000,40]],\"later\":[[1,1]]},\"dirty_pages\":[[30,40]]"
        @EXTRA@
    done
}
exec 3<&0
{ cat <&3 >/dev/null; kill -9 $$; } 2>/dev/null &
echo "actor $mode is here" >&2
@FIRST@
say "\"event\":\"started\",\"role\":\"$([ $mode = run ] && echo primary || echo standby)\",\"tracker\":\"fake\""
[ $mode = run ] && live
say '"event":"listening","addr":"x"'
while ! active >/dev/null; do sleep 0.01; done
while kill -0 "$(active)" 2>/dev/null; do sleep 0.01; done
@TAKEOVER@
on_stage $$
say '"event":"first_packet","after_us":4000'
say '"event":"takeover","generation":2,"checkpoint":9,"detect_us":100,"settle_us":50,"arbitrate_us":200,"restore_us":3000,"total_us":3350,"input_given":3,"output_repeated":1'
live
"#;

fn cluster(shape: Shape) -> Cluster {
    let dir = WorkDir::create().unwrap();
    let arbiter = Arbiter::start(DemoArbiter::File, &shape.program, &dir, shape.link).unwrap();
    Cluster::new(shape, arbiter, dir)
}

/// Holds the script, and the processes' list for the check at the end.
struct Stage {
    folder: PathBuf,
}

impl Stage {
    fn new(name: &str, parts: &[(&str, &str)]) -> Self {
        let folder = std::env::temp_dir().join(format!("outlive-stage-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let mut script = ACTOR.to_owned();
        for (part, text) in parts {
            script = script.replace(part, text);
        }
        for part in ["@EXTRA@", "@FIRST@", "@TAKEOVER@"] {
            script = script.replace(part, "");
        }
        let stage = Self { folder };
        fs::write(stage.program(), script).unwrap();
        fs::set_permissions(stage.program(), fs::Permissions::from_mode(0o755)).unwrap();
        stage
    }

    fn program(&self) -> PathBuf {
        self.folder.join("actor")
    }

    fn play(
        &self,
        server: &FakeServer,
        kills: u32,
        interrupt: &Arc<AtomicBool>,
    ) -> Result<(Summary, Cluster), Stop> {
        let shape = Shape {
            program: self.program(),
            bridge: "none".into(),
            vm_ip: "10.77.0.2/24".into(),
            vcpus: 1,
            memory: "256M".into(),
            link: crate::link::LinkKind::Tls13,
            options: Vec::new(),
            seed: 7,
        };
        let time = Duration::from_secs(2);
        let play = Play { vm: server.addr(), time, kills, clients: 2, rate: 2_000, fills: false, seed: 7 };
        Director::new(play, cluster(shape), interrupt.clone()).run()
    }

    /// Processes of this stage that still exist.
    fn left(&self) -> Vec<String> {
        let name = self.program().display().to_string();
        let line = |p: PathBuf| fs::read_to_string(p.join("cmdline")).ok();
        let processes = fs::read_dir("/proc").unwrap().filter_map(|e| line(e.ok()?.path()));
        processes.filter(|line| line.contains(&name)).collect()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn calm() -> Arc<AtomicBool> {
    Arc::new(AtomicBool::new(false))
}

/// Children of the killed actors (their `cat` and `sleep`) need a moment to end.
fn nothing_left(stage: &Stage) {
    for _ in 0..200 {
        if stage.left().is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(stage.left(), [""; 0]);
}

#[test]
fn kills_are_survived_and_nothing_is_left() {
    let stage = Stage::new("good", &[]);
    let (summary, cluster) = stage.play(&FakeServer::start(Fault::None), 2, &calm()).unwrap();
    assert!(summary.ok(), "{summary}");
    assert_eq!((summary.kills, summary.survived, summary.takeovers.len()), (2, 2, 2));
    assert_eq!(summary.takeovers[0].first_packet_us, Some(4_000));
    assert_eq!(
        (summary.tracker.as_str(), summary.totals.measured.phase(Phase::Pause).max()),
        ("fake", 200_703)
    );
    assert!(summary.totals.checkpoints > 400, "{summary}");
    assert!(summary.verdict.acked > 500, "{summary}");
    let folder = cluster.folder().to_owned();
    assert!(folder.is_dir());
    drop(cluster);
    assert!(!folder.exists(), "{folder:?}");
    nothing_left(&stage);
}

#[test]
fn a_server_that_forgets_an_increment_fails_the_demo() {
    let stage = Stage::new("forget", &[]);
    let (summary, cluster) = stage.play(&FakeServer::start(Fault::LoseIncrement(40)), 1, &calm()).unwrap();
    assert_eq!((summary.ok(), summary.exit_code(), summary.verdict.damage.lost), (false, 1, 1), "{summary}");
    assert_eq!((summary.survived, summary.broken.len()), (1, 0));
    let folder = cluster.end_and_keep();
    nothing_left(&stage);
    assert!(folder.join("0-b.log").is_file() && folder.join("1-a.events").is_file());
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_broken_connection_fails_the_demo() {
    let stage = Stage::new("break", &[]);
    let (summary, _cluster) = stage.play(&FakeServer::start(Fault::HangUpAfter(300)), 1, &calm()).unwrap();
    assert!(!summary.ok() && !summary.broken.is_empty(), "{summary}");
}

#[test]
fn a_standby_that_dies_instead_of_taking_over_fails_the_demo_and_is_quoted() {
    let stage = Stage::new("coward", &[("@TAKEOVER@", "echo 'no courage' >&2; exit 1")]);
    let (summary, cluster) = stage.play(&FakeServer::start(Fault::None), 1, &calm()).unwrap();
    let failure = summary.failure.as_deref().unwrap_or_default();
    assert!(failure.contains("both hosts are dead") && failure.contains("no courage"), "{failure}");
    assert_eq!((summary.kills, summary.survived, summary.exit_code()), (1, 0, 1));
    let folder = cluster.end_and_keep();
    assert!(fs::read_dir(&folder).unwrap().count() >= 5, "logs and events of both processes");
    fs::remove_dir_all(&folder).unwrap();
    assert!(!folder.exists(), "{folder:?}");
    nothing_left(&stage);
}

#[test]
fn a_refusal_to_start_is_passed_on() {
    let refusal = "[ $mode = run ] && { echo 'outlive: not that much memory; use --memory 1G' >&2; exit 2; }";
    let stage = Stage::new("refuse", &[("@FIRST@", refusal)]);
    match stage.play(&FakeServer::start(Fault::None), 1, &calm()) {
        Err(Stop::Environment(words)) => {
            assert_eq!(words, "not that much memory; use --memory 1G")
        }
        other => panic!("{:?}", other.map(|(summary, _)| summary)),
    }
    nothing_left(&stage);
}

#[test]
fn a_live_primary_taken_for_dead_stops_and_is_replaced() {
    // After a second the first primary gives the stage away and ends as a fenced one does.
    let fenced = r#"[ $mode = run ] && [ $n -ge 400 ] && { on_stage 999999999; sleep 0.3; exit 3; }"#;
    let stage = Stage::new("fenced", &[("@EXTRA@", fenced)]);
    let (summary, _cluster) = stage.play(&FakeServer::start(Fault::None), 0, &calm()).unwrap();
    assert!(summary.ok(), "{summary}");
    assert_eq!((summary.kills, summary.takeovers.len()), (0, 1), "{summary}");
}

#[test]
fn an_interrupt_ends_it_early_and_in_order() {
    let stage = Stage::new("interrupt", &[]);
    let interrupt = calm();
    let press = interrupt.clone();
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(700));
        press.store(true, Ordering::Relaxed);
    });
    let (summary, cluster) = stage.play(&FakeServer::start(Fault::None), 0, &interrupt).unwrap();
    assert!(summary.interrupted && summary.ok() && summary.verdict.acked > 0, "{summary}");
    assert_eq!(summary.exit_code(), 130);
    let folder = cluster.folder().to_owned();
    drop(cluster);
    assert!(!folder.exists(), "{folder:?}");
    nothing_left(&stage);
}

#[test]
fn kills_that_come_faster_than_protection_are_refused() {
    use clap::Parser;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        options: crate::cli::DemoOptions,
    }
    let check = |kills, seconds| {
        let args = ["demo", "--kills", kills, "--seconds", seconds];
        super::check_kills(&Program::try_parse_from(args).unwrap().options)
    };
    let refused = check("100", "1").unwrap_err();
    assert_eq!(refused.exit_code(), 2);
    assert!(refused.to_string().contains("at most 2 a second"), "{refused}");
    check("3", "1").unwrap_err();
    for (kills, seconds) in [("0", "1"), ("2", "1"), ("3", "20"), ("50", "300")] {
        check(kills, seconds).unwrap();
    }
}
