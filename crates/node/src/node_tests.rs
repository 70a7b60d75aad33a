//! A whole node, with processes that run nothing.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use crate::asking::{BEING_STARTED, UNDECIDED};
use crate::definition::{AUTOSTART, Definition};
use crate::drain::Mode;
use crate::error::NodeError;
use crate::feed::Feed;
use crate::jobs::{Job, JobState};
use crate::keeper::{Kept, Order};
use crate::node::{Node, Shared};
use crate::records::{Desired, Records};
use crate::testing::{World, wait};
use crate::view::State;

const TWO_HOSTS: &str =
    "arbiter = 'file:/x'\nlisten = '10.0.0.1:70NN'\nstandby = ['hostb:70NN']\ndisk = ['path=/no/NN']";

fn two_hosts(number: u8) -> String {
    TWO_HOSTS.replace("NN", &format!("{number:02}"))
}

fn done(node: &Node, job: Job) -> Job {
    loop {
        let job = node.jobs.get(&job.id).unwrap();
        if job.state != JobState::Running {
            return job;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// A later node finds the process, starts no second one, and ends it when it is told to.
#[test]
fn a_vm_outlives_its_node() {
    let world = World::new();
    let node = world.node();
    node.define("web", "memory = '1G'").unwrap();
    assert_eq!(node.get("web").unwrap().state, State::Stopped);
    let job = done(&node, node.begin_start("web").unwrap());
    assert_eq!(job.state, JobState::Succeeded, "{job:?}");
    let before = node.get("web").unwrap();
    assert!(before.state == State::Running && before.protected && !before.adopted);
    drop(node);
    for _ in 0..3 {
        let node = world.node();
        assert!(wait(&node, "web", |it| it.state == State::Running).adopted);
    }
    let node = world.node();
    let view = wait(&node, "web", |it| it.state == State::Running);
    assert!(view.adopted && view.pid == before.pid && !view.definition_changed);
    // Long enough for a start that must not be.
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(world.starts("web"), 1, "two processes");
    node.define("web", "memory = '2G'").unwrap();
    wait(&node, "web", |it| it.definition_changed);
    assert!(matches!(node.undefine("web"), Err(NodeError::HasProcess(_))));
    let job = done(&node, node.begin_stop("web", false, false).unwrap());
    assert_eq!(job.state, JobState::Succeeded, "{job:?}");
    let view = wait(&node, "web", |it| it.state == State::Stopped);
    assert_eq!((view.pid, view.desired), (None, Desired::Stopped));
    drop(node);
    let node = world.node();
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(
        (node.get("web").unwrap().state, world.starts("web")),
        (State::Stopped, 1),
        "it stays stopped"
    );
    let lock = world.places().lock_of("web");
    assert!(lock.exists());
    node.undefine("web").unwrap();
    assert!(node.list().is_empty() && !lock.exists(), "nothing of it is left");
}

#[test]
fn a_fault_is_started_again_and_an_orderly_end_is_not() {
    let world = World::new();
    let node = world.node();
    node.define("web", &format!("{AUTOSTART} = true\nrestart-limit = 3\nmemory = '1G'")).unwrap();
    let first = wait(&node, "web", |it| it.state == State::Running);
    kill(first.pid.unwrap());
    let second = wait(&node, "web", |it| it.state == State::Running && it.pid != first.pid);
    assert_eq!(second.last_end.as_ref().unwrap().signal, Some(9));
    assert_eq!(second.failures, 1);
    // The guest ends while there is no node, and nobody is the process's parent.
    drop(node);
    world.tell("web", "exit", "0");
    while world.folder.path().join("web.exit").exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let node = world.node();
    let view = wait(&node, "web", |it| it.state == State::Ended);
    assert_eq!((view.desired, view.why.as_deref()), (Desired::Stopped, Some("told to")));
    drop(node);
    // The next one fails while there is no node, and then too often.
    let node = world.node();
    done(&node, node.begin_start("web").unwrap());
    let third = node.get("web").unwrap();
    drop(node);
    kill(third.pid.unwrap());
    let node = world.node();
    wait(&node, "web", |it| it.state == State::Running && it.pid != third.pid);
    for _ in 0..2 {
        world.tell("web", "exit", "1");
        while world.folder.path().join("web.exit").exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let view = wait(&node, "web", |it| it.state == State::Failed);
    assert_eq!((view.failures, view.desired), (3, Desired::Running));
    let starts = world.starts("web");
    let job = done(&node, node.begin_start("web").unwrap());
    assert_eq!((job.state, world.starts("web")), (JobState::Succeeded, starts + 1), "{job:?}");
}

/// A process by hand, until its socket is removed.
fn by_hand(world: &World, vm: &str) {
    std::fs::create_dir_all(world.places().run).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(world.places().socket_of(vm)).unwrap();
    std::thread::spawn(move || {
        while let Ok((mut client, _)) = listener.accept() {
            let _ = client.write_all(br#"{"role":"primary","protected":true,"why":null}"#);
        }
    });
}

/// A start that was refused is not carried out later.
#[test]
fn a_process_that_no_node_has_started_is_left_alone() {
    let world = World::new();
    by_hand(&world, "auto");
    let node = world.node();
    node.define("web", "memory = '1G'").unwrap();
    node.define("auto", &format!("{AUTOSTART} = true\nmemory = '1G'")).unwrap();
    wait(&node, "auto", |it| it.state == State::Foreign);
    by_hand(&world, "web");
    let view = wait(&node, "web", |it| it.state == State::Foreign);
    assert_eq!((view.pid, view.desired), (Some(std::process::id()), Desired::Stopped));
    let job = done(&node, node.begin_start("web").unwrap());
    assert_eq!(job.error.unwrap().code, "foreign_process");
    assert!(matches!(node.begin_stop("web", false, false), Err(NodeError::Foreign { .. })));
    // Those by hand end. One VM shall run, and the other shall not.
    for vm in ["web", "auto"] {
        std::fs::remove_file(world.places().socket_of(vm)).unwrap();
    }
    wait(&node, "auto", |it| it.state == State::Running);
    let view = wait(&node, "web", |it| it.state == State::Stopped);
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!((view.desired, view.protected, world.starts("web")), (Desired::Stopped, false, 0));
    let job = done(&node, node.begin_start("web").unwrap());
    assert_eq!(job.state, JobState::Succeeded, "{job:?}");
}

/// While two hosts ask the arbiter, none of them is the standby.
#[test]
fn a_start_ends_with_the_decision() {
    let world = World::new();
    let node = world.node();
    node.define("web", &two_hosts(1)).unwrap();
    world.tell("web", "role", "standby");
    world.tell("web", "why", &format!("{UNDECIDED}; this host starts the VM in 3.4 s"));
    let job = node.begin_start("web").unwrap();
    wait(&node, "web", |it| it.state == State::Deciding);
    while !node.jobs.get(&job.id).unwrap().progress.now.contains("3.4 s") {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(matches!(node.begin_stop("web", false, false), Err(NodeError::Undecided(_))));
    world.tell("web", "role", "primary");
    world.tell("web", "why", BEING_STARTED);
    wait(&node, "web", |it| it.state == State::Starting);
    assert_eq!(node.jobs.get(&job.id).unwrap().state, JobState::Running);
    world.untell("web", "why");
    let job = done(&node, job);
    assert_eq!((job.state, &job.result.unwrap()["state"]), (JobState::Succeeded, &"running".into()));
}

/// What the process has said is what its start comes to, and what the list says. A stop makes it the past.
#[test]
fn a_failure_says_its_reason_until_it_is_over() {
    let world = World::new();
    let node = world.node();
    node.define("web", "restart-limit = 1\nmemory = '1G'").unwrap();
    let why = "cannot read /no/kernel: no such file; give another one";
    world.tell("web", "refuses", &format!("outlive: {why}"));
    let job = done(&node, node.begin_start("web").unwrap());
    let error = job.error.unwrap();
    assert_eq!((error.code.as_str(), error.message.as_str()), ("failed", why));
    assert!(error.remedy.contains("`outlive vm logs web`"), "{error:?}");
    let view = wait(&node, "web", |it| it.state == State::Failed);
    assert_eq!((view.why.as_deref(), view.failures), (Some(why), 1));
    let job = done(&node, node.begin_stop("web", false, false).unwrap());
    let result = job.result.unwrap();
    assert_eq!((&result["said"], &result["end"]), (&"VM web is stopped".into(), &serde_json::Value::Null));
    let view = wait(&node, "web", |it| it.state == State::Stopped);
    assert_eq!((view.why, view.failures, view.last_end.unwrap().what.as_str()), (None, 0, why));
}

/// Said where the VM runs, it must not press the power button, however new that is.
#[test]
fn only_a_standby_is_ended_as_one() {
    let world = World::new();
    let node = world.node();
    node.define("web", &two_hosts(1)).unwrap();
    done(&node, node.begin_start("web").unwrap());
    let pid = node.get("web").unwrap().pid;
    for now in [false, true] {
        assert!(matches!(node.begin_stop("web", true, now), Err(NodeError::RunsHere(_))));
    }
    // The node has last heard that it is the standby, and by now it has taken the VM over.
    world.tell("web", "role", "standby");
    wait(&node, "web", |it| it.state == State::Standby);
    world.tell("web", "role", "primary");
    assert!(matches!(node.begin_stop("web", true, false), Err(NodeError::RunsHere(_))));
    // It does so while the job begins.
    world.tell("web", "role", "standby");
    wait(&node, "web", |it| it.state == State::Standby);
    world.tell("web", "turns", "primary");
    match node.begin_stop("web", true, false) {
        Ok(job) => assert_eq!(done(&node, job).error.unwrap().code, "runs_here"),
        // The keeper had just asked by itself.
        Err(why) => assert!(matches!(why, NodeError::RunsHere(_)), "{why}"),
    }
    let view = wait(&node, "web", |it| it.state == State::Running);
    assert_eq!((view.pid, view.desired), (pid, Desired::Running), "nothing was stopped");
    // One that says nothing may be anything.
    world.tell("web", "mute", "");
    assert!(matches!(node.begin_stop("web", true, false), Err(NodeError::SaysNothing(_))));
    world.untell("web", "mute");
    world.tell("web", "role", "standby");
    // Its primary is lost, and it asks the arbiter.
    world.tell("web", "last", "");
    world.tell("web", "bare", "");
    assert!(matches!(node.begin_stop("web", true, false), Err(NodeError::TakesOver(_))));
    world.untell("web", "bare");
    let job = done(&node, node.begin_stop("web", true, false).unwrap());
    assert_eq!(job.state, JobState::Succeeded, "{job:?}");
    assert_eq!(node.get("web").unwrap().desired, Desired::Stopped);
}

/// One after another; what cannot be moved stops the drain before, or at, its turn.
#[test]
fn a_drain_moves_all_or_says_which_stays() {
    let world = World::new();
    let node = world.node();
    for (number, vm) in [(1, "a"), (2, "b"), (3, "c")] {
        node.define(vm, &two_hosts(number)).unwrap();
        done(&node, node.begin_start(vm).unwrap());
    }
    world.tell("c", "role", "standby");
    wait(&node, "c", |it| it.state == State::Standby);
    assert!(matches!(node.begin_stop("c", false, false), Err(NodeError::IsStandby(_))));
    assert!(matches!(node.begin_hand_over("c"), Err(NodeError::IsStandby(_))));
    let drain = |wait| done(&node, node.begin_drain(false, Duration::from_secs(wait)).unwrap());
    // A VM of one host.
    node.define("alone", "memory = '1G'").unwrap();
    world.tell("alone", "bare", "");
    done(&node, node.begin_start("alone").unwrap());
    wait(&node, "alone", |it| it.state == State::Running && !it.protected);
    let job = drain(1);
    assert_eq!((job.state, node.modes.get()), (JobState::Failed, Mode::Active));
    assert!(job.error.unwrap().message.contains("alone has no standby"));
    assert_eq!(node.get("a").unwrap().state, State::Running, "nothing was moved");
    done(&node, node.begin_stop("alone", false, true).unwrap());
    // The second one is not protected in time, and then refused.
    world.tell("b", "bare", "");
    wait(&node, "b", |it| !it.protected);
    let job = drain(1);
    assert!(job.error.unwrap().message.contains("VM b stays here, 1 of 2 VMs were moved"));
    assert_eq!((node.get("a").unwrap().state, node.modes.get()), (State::Standby, Mode::Active));
    world.untell("b", "bare");
    world.tell("b", "stays", "");
    let job = drain(60);
    assert!(job.error.unwrap().message.contains("the standby is gone"));
    world.untell("b", "stays");
    let job = drain(60);
    assert_eq!(job.state, JobState::Succeeded, "{job:?}");
    assert_eq!(job.result.unwrap()["moved"][0]["vm"], "b");
    assert_eq!((node.get("b").unwrap().state, node.modes.get()), (State::Standby, Mode::Drained));
    assert!(matches!(node.begin_start("alone"), Err(NodeError::Drained)));
    // It outlives the node.
    drop(node);
    let node = world.node();
    assert!(matches!(node.begin_start("alone"), Err(NodeError::Drained)));
    node.undrain().unwrap();
    assert_eq!(done(&node, node.begin_start("alone").unwrap()).state, JobState::Succeeded);
    let job = done(&node, node.begin_drain(true, Duration::from_secs(1)).unwrap());
    assert_eq!(job.state, JobState::Succeeded, "{job:?}");
    assert_eq!(node.modes.get(), Mode::Stopping);
    assert!(matches!(node.begin_start("alone"), Err(NodeError::Stopping)));
    node.define("late", &format!("{AUTOSTART} = true\nmemory = '1G'")).unwrap();
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(world.starts("late"), 0, "the host is about to stop");
    for vm in ["a", "b", "c", "alone"] {
        let view = node.get(vm).unwrap();
        assert_eq!(
            (view.pid, view.desired),
            (None, Desired::Running),
            "{vm} is to run when the host is back"
        );
    }
}

#[test]
fn two_nodes_do_not_share_a_host_and_definitions_are_read_when_they_change() {
    let world = World::new();
    let node = world.node();
    let again = Node::start("hosta", world.places(), crate::testing::program());
    assert!(again.unwrap_err().to_string().contains("another node"));
    let file = |vm: &str| world.places().definitions.join(format!("{vm}.toml"));
    std::fs::write(file("b"), "net = 'tap=t0'").unwrap();
    while node.get("b").is_err() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let why = node.define("a", "net = 'tap=t0'").unwrap_err().to_string();
    assert!(why.contains("is b's, too") && !file("a").exists(), "{why}");
    std::fs::write(file("b"), "net = 1.5.5").unwrap();
    let view = wait(&node, "b", |it| it.state == State::Misdefined);
    assert!(view.definition_error.unwrap().contains("b.toml: line 1"));
    assert!(matches!(node.begin_start("b"), Err(NodeError::NoDefinition(..))));
    std::fs::remove_file(file("b")).unwrap();
    while node.get("b").is_ok() {
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn fifo(path: &std::path::Path) {
    let _ = std::fs::remove_file(path);
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
}

/// A pipe whose other end nobody opens holds up whoever opens it, as a mount does whose server is dead.
#[test]
fn files_that_never_answer_hold_up_nobody() {
    let world = World::new();
    let pipe = world.folder.path().join("pipe");
    let node = world.node();
    node.define("web", &format!("{AUTOSTART} = true\nmemory = '1G'\nevents = '{}'", pipe.display())).unwrap();
    let first = wait(&node, "web", |it| it.state == State::Running);
    fifo(&pipe);
    kill(first.pid.unwrap());
    let second = wait(&node, "web", |it| it.state == State::Running && it.pid != first.pid);
    // The same for a node that finds nobody any more.
    drop(node);
    kill(second.pid.unwrap());
    fifo(&world.places().definitions.join("pipe.toml"));
    let node = world.node();
    wait(&node, "web", |it| it.state == State::Running && it.pid != second.pid);
    wait(&node, "pipe", |it| it.state == State::Misdefined);
    fifo(&world.places().log_of("pipe"));
    assert!(matches!(node.log("pipe", None, 10), Err(NodeError::System(..))));
    assert!(matches!(node.log("pipe", Some(0), 10), Err(NodeError::System(..))));
    // The program opens what a definition names.
    let kernel = world.folder.path().join("hangs");
    fifo(&kernel);
    node.define("late", &format!("kernel = '{}'", kernel.display())).unwrap();
    wait(&node, "late", |it| it.warnings.iter().any(|it| it.contains("does not answer")));
}

/// One whose thread hangs is not called missing.
#[test]
fn a_process_that_stands_still_holds_up_no_node() {
    let world = World::new();
    let node = world.node();
    node.define("web", "memory = '1G'").unwrap();
    let job = done(&node, node.begin_start("web").unwrap());
    assert_eq!(job.state, JobState::Succeeded, "{job:?}");
    let pid = node.get("web").unwrap().pid.unwrap();
    let signal = |it| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), it).unwrap();
    drop(node);
    signal(nix::sys::signal::Signal::SIGSTOP);
    let began = std::time::Instant::now();
    let node = world.node();
    assert!(began.elapsed() < Duration::from_secs(2), "the node waits for a process: {:?}", began.elapsed());
    let view = wait(&node, "web", |it| it.has_process);
    assert_eq!(view.state, State::Starting, "{view:?}");
    signal(nix::sys::signal::Signal::SIGCONT);
    wait(&node, "web", |it| it.state == State::Running);
}

/// The record of a VM, as it is on the disk.
fn record(world: &World, vm: &str) -> serde_json::Value {
    let file = world.places().state.join("vms").join(format!("{vm}.json"));
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// The disk was full when the VM's second process began, and the first one's number is a stranger's by now.
#[test]
fn only_a_process_that_has_the_lock_is_told_to_end() {
    let world = World::new();
    let node = world.node();
    for vm in ["web", "mute"] {
        node.define(vm, "memory = '1G'").unwrap();
        let job = done(&node, node.begin_start(vm).unwrap());
        assert_eq!(job.state, JobState::Succeeded, "{job:?}");
    }
    let own = node.get("web").unwrap().pid;
    drop(node);
    let mut stranger = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    for vm in ["web", "mute"] {
        let mut old = record(&world, vm);
        old["process"]["pid"] = stranger.id().into();
        std::fs::write(world.places().state.join("vms").join(format!("{vm}.json")), old.to_string()).unwrap();
    }
    world.tell("mute", "mute", "");
    let node = world.node();
    assert_eq!(wait(&node, "web", |it| it.state == State::Running).pid, own);
    for (vm, now) in [("web", false), ("mute", true)] {
        let job = done(&node, node.begin_stop(vm, false, now).unwrap());
        assert_eq!(job.state, JobState::Succeeded, "{job:?}");
        assert!(!node.get(vm).unwrap().has_process);
    }
    assert!(stranger.try_wait().unwrap().is_none(), "a stranger was told to end");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[test]
fn a_record_that_was_not_written_is_written_later() {
    let world = World::new();
    let node = world.node();
    node.define("web", &format!("{AUTOSTART} = true\nmemory = '1G'")).unwrap();
    let first = wait(&node, "web", |it| it.state == State::Running);
    let (records, away) = (world.places().state.join("vms"), world.places().state.join("away"));
    std::fs::rename(&records, &away).unwrap();
    kill(first.pid.unwrap());
    let second = wait(&node, "web", |it| it.state == State::Running && it.pid != first.pid);
    std::fs::rename(&away, &records).unwrap();
    let began = std::time::Instant::now();
    while record(&world, "web")["process"]["pid"] != second.pid.unwrap() {
        assert!(began.elapsed() < Duration::from_secs(60), "it was not tried again");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Its keeper is over, and the host's list still has it.
#[test]
fn a_vm_that_goes_does_not_break_off_the_end_of_the_host() {
    let world = World::new();
    let node = world.node();
    for vm in ["b", "c"] {
        node.define(vm, "memory = '1G'").unwrap();
        done(&node, node.begin_start(vm).unwrap());
    }
    node.define("a", "memory = '1G'").unwrap();
    std::fs::remove_file(world.places().definitions.join("a.toml")).unwrap();
    while node.order("a", Order::Settle).is_ok() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let job = done(&node, node.begin_drain(true, Duration::from_secs(1)).unwrap());
    assert_eq!(job.state, JobState::Succeeded, "{job:?}");
    assert_eq!(job.result.unwrap()["stopped"], serde_json::json!(["b", "c"]));
    assert!(["b", "c"].iter().all(|vm| !node.get(vm).unwrap().has_process));
    node.undrain().unwrap();
    wait(&node, "b", |it| it.has_process);
    wait(&node, "c", |it| it.has_process);
}

/// What may still run here is waited for, and what does not run is not begun.
#[test]
fn a_drained_host_starts_nothing() {
    let world = World::new();
    let node = world.node();
    let drain = |wait| done(&node, node.begin_drain(false, Duration::from_secs(wait)).unwrap());
    node.define("alone", "memory = '1G'").unwrap();
    node.define("web", &two_hosts(1)).unwrap();
    for (vm, why) in [("alone", "VM alone is about to be started again"), ("web", "has not come within 1 s")]
    {
        done(&node, node.begin_start(vm).unwrap());
        world.tell(vm, "refuses", "outlive: no");
        kill(node.get(vm).unwrap().pid.unwrap());
        wait(&node, vm, |it| it.state == State::Waiting && it.failures > 1);
        let job = drain(1);
        assert_eq!((job.state, node.modes.get()), (JobState::Failed, Mode::Active), "{job:?}");
        assert!(job.error.as_ref().unwrap().message.contains(why), "{job:?}");
        if vm == "alone" {
            done(&node, node.begin_stop(vm, false, false).unwrap());
        }
    }
    world.tell("web", "role", "standby");
    world.untell("web", "refuses");
    let job = drain(60);
    assert_eq!((job.state, node.modes.get()), (JobState::Succeeded, Mode::Drained), "{job:?}");
    assert_eq!(node.get("web").unwrap().state, State::Standby);
    node.define("auto", &format!("{AUTOSTART} = true\nmemory = '1G'")).unwrap();
    let rests = |node: &Node| {
        std::thread::sleep(Duration::from_millis(600));
        let view = node.get("auto").unwrap();
        assert_eq!((view.state, view.why.as_deref()), (State::Stopped, Some("this host is drained")));
        assert_eq!(world.starts("auto"), 0);
    };
    rests(&node);
    drop(node);
    let node = world.node();
    rests(&node);
    // It stays the standby of what has left it.
    kill(wait(&node, "web", |it| it.state == State::Standby).pid.unwrap());
    let starts = world.starts("web");
    wait(&node, "web", |it| it.state == State::Standby && world.starts("web") > starts && it.failures > 0);
    node.undrain().unwrap();
    wait(&node, "auto", |it| it.state == State::Running);
}

#[test]
fn a_host_whose_mode_is_not_kept_says_so() {
    let world = World::new();
    let mode = world.places().state.join("mode.json");
    drop(world.node());
    std::fs::write(&mode, "\"drain").unwrap();
    let node = world.node();
    assert_eq!((node.modes.get(), node.view().warnings.len()), (Mode::Drained, 1));
    assert!(node.undrain().unwrap().warnings.is_empty());
    // As a disk that is full.
    std::fs::remove_file(&mode).unwrap();
    std::fs::create_dir_all(mode.join("x")).unwrap();
    let job = done(&node, node.begin_drain(false, Duration::from_secs(1)).unwrap());
    assert_eq!((job.state, node.modes.get()), (JobState::Failed, Mode::Active), "{job:?}");
}

/// What a keeper is told is done, or it says that it is over.
#[test]
fn a_definition_that_comes_back_is_not_lost() {
    let world = World::new();
    drop(world.node());
    let program = crate::testing::program();
    let definition =
        Definition::parse(std::path::Path::new("/vms/web.toml"), "memory = '1G'", "hosta", &program).unwrap();
    let shared = Arc::new(Shared {
        places: world.places(),
        program,
        records: Records::open(world.places().state.join("vms")).unwrap(),
        feed: Arc::new(Feed::new()),
        log_max: 1,
    });
    for pause in 0..300 {
        let kept = Kept::start("web", Some(Ok(definition.clone())), Mode::Active, shared.clone()).unwrap();
        let told = kept.tell(Order::Undefine { forget: false });
        assert!(told);
        std::thread::sleep(Duration::from_micros(pause % 30 * 10));
        if !kept.tell(Order::Define(Box::new(Ok(definition.clone())))) {
            continue;
        }
        let (answer, heard) = std::sync::mpsc::channel();
        assert!(kept.tell(Order::Settle(answer)), "it took the definition and is over");
        heard.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
        assert_eq!(kept.view().definition_error, None);
    }
}

/// A node may die between the disk and the signal. A second signal would not wait for the guest.
#[test]
fn a_stop_is_carried_out_once_whichever_node_does() {
    let world = World::new();
    let node = world.node();
    for vm in ["told", "untold", "standby"] {
        node.define(vm, "memory = '1G'").unwrap();
        let job = done(&node, node.begin_start(vm).unwrap());
        assert_eq!(job.state, JobState::Succeeded, "{job:?}");
    }
    drop(node);
    let null = serde_json::Value::Null;
    for (vm, untold) in [("told", null), ("untold", "vm".into()), ("standby", "standby".into())] {
        let mut new = record(&world, vm);
        (new["desired"], new["by"], new["untold"]) = ("stopped".into(), "operator".into(), untold);
        std::fs::write(world.places().state.join("vms").join(format!("{vm}.json")), new.to_string()).unwrap();
    }
    let node = world.node();
    wait(&node, "untold", |it| it.state == State::Stopped && !it.has_process);
    let view = wait(&node, "standby", |it| it.desired == Desired::Running);
    assert!(view.has_process, "it was to end a standby, and the VM runs here");
    // Long enough for what must not be.
    std::thread::sleep(Duration::from_millis(1500));
    let view = node.get("told").unwrap();
    assert!(view.state == State::Stopping && view.has_process, "{view:?}");
    assert_eq!(node.get("standby").unwrap().state, State::Running);
}
