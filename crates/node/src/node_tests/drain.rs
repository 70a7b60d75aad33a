//! A host that is emptied before its maintenance.

use super::*;

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
