//! The picture of a node with fake processes, by the client and threads that a terminal has.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::api;
use crate::client::Client;
use crate::testing::{World, wait};
use crate::top::ask::{Asker, HandOver, Told, follow};
use crate::top::screen::hear;
use crate::top::state::{Key, Wish};
use crate::view;

const PATIENCE: Duration = Duration::from_secs(120);

struct Looker {
    state: State,
    told: Receiver<Told>,
    orders: Sender<HandOver>,
}

impl Looker {
    fn new(socket: &std::path::Path) -> Self {
        let client = || Client::here(socket).unwrap();
        let mut asker = Asker::new(client());
        let state = State::new(&asker.ask().unwrap(), Some("web"), crate::top::now());
        let (tell, told) = channel();
        let (orders, given) = channel();
        let (asks, follower) = (tell.clone(), client());
        thread::spawn(move || asker.run(&given, &asks));
        thread::spawn(move || follow(&follower, &tell));
        Self { state, told, orders }
    }

    /// Hears the node until the picture is as it should be.
    fn until(&mut self, what: &str, is: impl Fn(&State) -> bool) {
        let began = Instant::now();
        while !is(&self.state) {
            assert!(began.elapsed() < PATIENCE, "in vain: {what}: {:?}", self.state);
            let told = self.told.recv_timeout(PATIENCE).unwrap();
            self.state.at(crate::top::now());
            assert_ne!(hear(&mut self.state, told, &self.orders).unwrap(), Wish::End);
        }
    }

    fn press(&mut self, letter: char) {
        hear(&mut self.state, Told::Pressed(Key::Letter(letter)), &self.orders).unwrap();
    }

    fn shows(&self, words: &str) -> bool {
        lines(&self.state, 120, 40).iter().any(|it| it.contains(words))
    }
}

/// Some checkpoints of a VM's process.
fn counted(world: &World, count: u64) {
    let pause = json!({ "bounds": [100_000, 200_000], "counts": [0, count, 0], "sum": count * 150_000 });
    let told = json!({ "format": 1, "role": "primary", "started": 1.5, "protected": true, "active": true,
        "protection_losses": 0, "running": { "checkpoints": count, "pause": pause } });
    world.tell("web", "figures", &told.to_string());
}

#[test]
fn a_node_is_looked_at_and_a_vm_handed_over() {
    let world = World::new();
    let node = world.node();
    let socket = world.folder.path().join("node.api");
    let server = api::serve(&node, &socket, None).unwrap();
    world.tell("web", "says", &life::protected("hostb:7001").to_string());
    counted(&world, 0);
    let definition = "arbiter = 'file:/x'\nlisten = ':7001'\nstandby = ['hostb:7001']\ndisk = ['path=/no/1']";
    node.define("web", definition).unwrap();
    node.begin_start("web").unwrap();
    wait(&node, "web", |it| it.protected);

    let mut looker = Looker::new(&socket);
    assert!(looker.shows("If this host failed now, the VM that runs here would go on."));
    looker.until("an event", |state| state.events.iter().any(|it| it.text.contains("web: ")));
    // A point is what was counted since the last one.
    for count in 1..4 {
        counted(&world, 10 * count);
        thread::sleep(Duration::from_millis(1100));
    }
    looker.until("figures", |state| {
        lines(state, 120, 40).iter().any(|it| it.contains("Pause") && it.contains("150 µs"))
    });
    looker.press('h');
    assert!(looker.shows("Hand web over to hostb:7001?"));
    looker.press('y');
    looker.until("the order", |state| state.note.is_some());
    looker.until("the hand-over", |state| state.vms[0].state == view::State::Standby);
    looker.until("its end", |state| {
        state.note.as_ref().is_some_and(|it| it.contains("hand-over of web: done"))
    });

    drop(server);
    looker.until("the loss of the node", |state| state.is_old().is_some());
    assert!(looker.shows("CONNECTION LOST: no node answers at") && looker.shows("◐ standby"));
    let _server = api::serve(&node, &socket, None).unwrap();
    looker.until("the node again", |state| state.is_old().is_none());
}

/// An operator whose word nobody has heard in time does not want it any more.
#[test]
fn an_order_that_has_waited_is_not_given() {
    let world = World::new();
    let node = world.node();
    let socket = world.folder.path().join("node.api");
    let _server = api::serve(&node, &socket, None).unwrap();
    let asker = Asker::new(Client::here(&socket).unwrap());
    let (tell, told) = channel();
    let (orders, given) = channel();
    let said = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
    orders.send(HandOver { vm: "web".into(), said }).unwrap();
    orders.send(HandOver { vm: "web".into(), said: Instant::now() }).unwrap();
    drop(orders);
    asker.run(&given, &tell);
    let refusals: Vec<_> = told.try_iter().map(|it| format!("{it:?}")).collect();
    assert!(refusals[0].contains("did not answer in time"), "{refusals:?}");
    assert!(refusals[1].contains("there is no VM web on this host"), "{refusals:?}");
}
