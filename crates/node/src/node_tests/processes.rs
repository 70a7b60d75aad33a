//! The processes of VMs: found again, started again, left alone, ended.

use super::*;

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

/// Its process may write to all of that directory, and to nothing else of the state.
#[test]
fn the_events_of_a_vm_are_in_a_directory_of_its_own() {
    let world = World::new();
    let node = world.node();
    let state = world.places().state;
    // As an earlier release has left them.
    std::fs::write(state.join("web.events"), "of yesterday\n").unwrap();
    node.define("web", "memory = '1G'").unwrap();
    done(&node, node.begin_start("web").unwrap());
    let pid = wait(&node, "web", |it| it.state == State::Running).pid.unwrap();
    let events = state.join("events/web/events");
    let argument = serde_json::Value::from(format!("--events={}", events.display()));
    let record = record(&world, "web");
    assert!(record["process"]["arguments"].as_array().unwrap().contains(&argument), "{record}");
    assert_eq!(std::fs::read_to_string(&events).unwrap(), "of yesterday\n");
    assert!(!state.join("web.events").exists());
    let told = std::fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    let state = format!("{}={}", crate::node::STATE_VARIABLE, state.display());
    assert!(told.split('\0').any(|it| it == state), "the process does not know where the state is");
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
