//! What an operator orders, and what comes of it.

use super::*;

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
        figures: crate::figures::Store::new("x"),
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
