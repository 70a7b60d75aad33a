//! The picture at several sizes, what keys do, and all of it at a node with fake processes.

mod live;
mod pictures;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use serde_json::{Value, json};

use super::ask::Heard;
use super::draw::{Colours, paint};
use super::state::State;
use super::text::moment;
use crate::drain::Mode;
use crate::figures::{Figures, KEPT, Point};
use crate::node::NodeView;
use crate::testing::life::{self, Kind};
use crate::view::View;

/// The moment of every picture.
const NOW: &str = "2026-12-01T12:00:00Z";

fn now() -> i64 {
    moment(NOW).unwrap()
}

fn node() -> NodeView {
    NodeView {
        host: "hosta".into(),
        version: "1.2.3".into(),
        pid: 7,
        since: NOW.into(),
        now: NOW.into(),
        mode: Mode::Active,
        warnings: Vec::new(),
        vms: Default::default(),
        unprotected: Vec::new(),
    }
}

/// A VM with the status of a process; `more` is about the VM.
fn vm(name: &str, state: &str, protected: bool, status: Value, more: Value) -> View {
    let mut vm = json!({
        "name": name, "state": state, "desired": "running", "protected": protected, "has_standby": true, "why": null,
        "since": "2026-12-01T11:58:20Z", "pid": 7, "adopted": false, "failures": 0, "last_end": null,
        "definition_changed": false, "definition_error": null, "status": status
    });
    vm.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(vm).unwrap()
}

fn status(role: &str, of: Value) -> Value {
    let mut status = of;
    status["role"] = role.into();
    status["since"] = "2026-12-01T11:58:25Z".into();
    status
}

/// Five minutes of a VM, up to now.
fn minutes(kind: Kind) -> Vec<Point> {
    let now = std::time::UNIX_EPOCH + std::time::Duration::from_millis(now() as u64);
    let at = |second: usize| now - std::time::Duration::from_secs((KEPT - 1 - second) as u64);
    (0..KEPT).map(|second| kind.point(second, at(second))).collect()
}

/// A host with VMs of every kind.
fn heard() -> Heard {
    let vms = vec![
        vm(
            "db",
            "running",
            false,
            status("primary", life::unprotected()),
            json!({ "why": "no standby has come yet" }),
        ),
        vm("mail", "standby", true, status("standby", life::standby("hostb:7003")), json!({})),
        vm("old", "failed", false, Value::Null, json!({ "why": "cannot read /no/kernel", "failures": 2 })),
        vm("spare", "stopped", false, Value::Null, json!({ "has_standby": false })),
        vm("web", "running", true, status("primary", life::protected("hostb:7001")), json!({})),
    ];
    let lives = [("web", Kind::Guarded), ("db", Kind::Bare), ("mail", Kind::Standby)];
    let points = lives.map(|(vm, kind)| (vm.to_owned(), minutes(kind)));
    let heat = serde_json::from_value(json!({ "web": life::heat() })).unwrap();
    let figures = Figures { next: "a-1".into(), reset: true, vms: points.into_iter().collect(), heat };
    Heard { node: node(), vms, figures: Some(figures), jobs: Vec::new() }
}

fn state(vm: &str) -> State {
    State::new(&heard(), Some(vm), now())
}

/// What a terminal of this size shows.
fn painted(state: &State, columns: u16, lines: u16, colours: Colours) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(columns, lines)).unwrap();
    let draw = |frame: &mut ratatui::Frame<'_>| {
        let area = frame.area();
        paint(state, colours, area, frame.buffer_mut());
    };
    terminal.draw(draw).unwrap();
    terminal.backend().buffer().clone()
}

/// The same as lines.
fn lines(state: &State, columns: u16, lines: u16) -> Vec<String> {
    let buffer = painted(state, columns, lines, Colours::NONE);
    let line = |y: u16| {
        let line: String = (0..columns).map(|x| buffer[(x, y)].symbol()).collect();
        line.trim_end().to_owned()
    };
    (0..lines).map(line).collect()
}

/// The line that begins so.
fn line<'a>(lines: &'a [String], begins: &str) -> &'a str {
    let found = lines.iter().find(|it| it.trim_start_matches(['▸', ' ']).starts_with(begins));
    found.unwrap_or_else(|| panic!("no line begins with {begins}:\n{}", lines.join("\n")))
}
