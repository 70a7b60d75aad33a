//! What is painted, and what keys change of it.

use ratatui::backend::CrosstermBackend;
use ratatui::style::Color;
use ratatui::{Terminal, TerminalOptions, Viewport};

use super::*;
use crate::feed::Entry;
use crate::jobs::Job;
use crate::top::as_text;
use crate::top::state::{Key, Over, Wish};

#[test]
fn a_usual_terminal_shows_what_matters() {
    let shown = lines(&state("web"), 80, 24);
    println!("{}", shown.join("\n"));
    assert!(shown[0].starts_with("hosta  active  Outlive 1.2.3") && shown[0].ends_with("12:00:00 UTC"));
    assert_eq!(shown[1], "If this host failed now, 1 of 2 VMs would NOT go on:");
    assert_eq!(shown[2], "  db: all that is in the VM's memory would be lost");
    assert_eq!(line(&shown, "Hosts:"), "Hosts: hosta (here) runs 2, protects 1 │ hostb runs 1, protects 1");
    for (name, says) in [
        ("db", ["● running", "NO", "NO", "no standby has come yet"]),
        ("mail", ["◐ standby", "yes", "yes", "commit 4 ms ago"]),
        ("old", ["✕ failed", "–", "–", "cannot read /no/kernel"]),
        ("spare", ["○ stopped", "–", "–", ""]),
        ("web", ["● running", "yes", "yes", "commit 4 ms ago, 2 in flig"]),
    ] {
        let line = line(&shown, &format!("{name}  "));
        assert!(says.iter().all(|it| line.contains(it)), "{line}");
    }
    assert!(shown.iter().any(|it| it.starts_with("▸ web")), "it is looked at");
    assert_eq!(line(&shown, "web: "), "web: hosta (here) runs it ▸ hostb:7001 protects it");
    for lane in ["Pause", "Dirty pages", "Commit"] {
        let line = line(&shown, lane);
        assert!(line.contains(['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█', '░']), "{line}");
    }
    let guard = line(&shown, "Protection");
    assert!(
        guard.contains('·') && guard.contains('▲') && guard.contains('▒') && guard.ends_with('─'),
        "{guard}"
    );
    let memory = line(&shown, "Memory");
    assert!(memory.contains("58 k/s ") && memory.contains("▆▆") && memory.contains('·'), "{memory}");
    assert_eq!(shown[23], "↑↓ choose   h hand over   ? help   q end");
}

#[test]
fn a_large_terminal_shows_more() {
    let mut state = state("web");
    let event = |number: u32, vm: Option<&str>, text: &str| Entry {
        id: format!("a-{number}"),
        time: "2026-12-01T11:59:58Z".into(),
        kind: "vm_state".into(),
        vm: vm.map(str::to_owned),
        text: text.into(),
        data: Value::Null,
    };
    state.happened(&event(1, Some("db"), "running, unprotected"));
    state.happened(&event(2, None, "this host is active"));
    let shown = lines(&state, 120, 40);
    println!("{}", shown.join("\n"));
    let web = line(&shown, "web  ");
    for says in ["100 s", "hostb:7001", "commit 4 ms ago, 2 in flight (34 KiB)"] {
        assert!(web.contains(says), "{web}");
    }
    let loss =
        "If this host failed now: survived, the standby takes over from the last checkpoint; about 4 ms";
    assert!(line(&shown, loss).ends_with('…'));
    line(&shown, "If the other host failed now: survived, the VM goes on here");
    line(&shown, "Protected since 11:58:25 UTC");
    line(&shown, "Held output");
    line(&shown, "scale to");
    assert!(
        line(&shown, "pages written").ends_with("three quarters of it in 128 MiB at 0x8c000000"),
        "the sentence is below the strip"
    );
    let told = shown.iter().position(|it| it == "What happened:").unwrap();
    assert_eq!(shown[told + 1], "11:59:58 this host is active", "the newest first");
    assert_eq!(shown[told + 2], "11:59:58 db: running, unprotected");
}

#[test]
fn a_small_terminal_shows_the_least() {
    let shown = lines(&state("web"), 40, 10);
    println!("{}", shown.join("\n"));
    assert!(shown[0].starts_with("hosta  active") && shown[0].ends_with("UTC"));
    assert!(shown[1].starts_with("If this host failed now, 1 of 2 VMs wou") && shown[1].ends_with('…'));
    let web = line(&shown, "web  ");
    assert!(web.contains("● running") && web.matches("yes").count() == 2, "{web}");
    for lane in ["Pause", "Dirty pages", "Commit"] {
        line(&shown, lane);
    }
    assert!(lines(&state("web"), 30, 10).join(" ").contains("too small"));
    assert!(lines(&state("web"), 80, 5).join(" ").contains("36 columns and 8 lines"));
}

#[test]
fn a_standby_and_a_vm_without_figures_have_what_there_is() {
    let shown = lines(&state("mail"), 80, 24);
    assert_eq!(line(&shown, "mail: "), "mail: hostb:7003 runs it ▸ hosta (here) protects it");
    line(&shown, "Apply");
    assert!(shown.iter().any(|it| it.contains('█')), "{shown:?}");
    assert!(!shown.iter().any(|it| it.starts_with("Pause") || it.starts_with("Memory")));
    let shown = lines(&state("old"), 80, 24);
    assert_eq!(line(&shown, "old: "), "old: has a second host");
    line(&shown, "It is failed since 11:58:20 UTC: cannot read /no/kernel");
    line(&shown, "Its process has failed 2 times in a row.");
    let none = Heard { vms: Vec::new(), ..heard() };
    let shown = lines(&State::new(&none, None, now()), 80, 24);
    assert_eq!(shown[1], "If this host failed now, nothing would be lost: no VM runs here.");
    line(&shown, "No VM is defined on this host");
}

#[test]
fn nothing_depends_on_colours_and_nothing_has_any_without() {
    let colours = |colours| {
        let buffer = painted(&state("web"), 120, 40, colours);
        let all = buffer.content().iter().map(|cell| (cell.fg, cell.bg));
        all.filter(|it| *it != (Color::Reset, Color::Reset)).count()
    };
    assert_eq!(colours(Colours::NONE), 0);
    assert!(colours(Colours::ALL) > 100);
}

/// Every size, and whatever lies over the picture.
#[test]
fn no_size_is_too_odd() {
    let mut state = state("web");
    let refusal = "because ".repeat(40);
    let question = Over::Question { vm: "web".into(), text: refusal.clone() };
    for over in [Over::Nothing, Over::Help, question, Over::Refusal(refusal)] {
        state.over = over;
        for (columns, high) in
            (0..70).step_by(3).flat_map(|it| (0..40).step_by(3).map(move |high| (it, high)))
        {
            painted(&state, columns, high, Colours::ALL);
        }
        painted(&state, 500, 100, Colours::ALL);
    }
}

const EVIL: &str = "x\x1b[2J\x1b]0;evil\x07\u{9b}31m\r\n\u{202e}\u{200b}y";

/// A node, or whoever names something there, may be hostile.
fn hostile() -> State {
    let mut heard = heard();
    heard.node.host = EVIL.into();
    heard.node.version = EVIL.into();
    heard.node.warnings = vec![EVIL.into()];
    let mut status = status("primary", life::unprotected());
    for key in ["peer", "standby_lost_arbiter_since"] {
        status[key] = EVIL.into();
    }
    for loss in ["loss_of_this_host", "loss_of_other_host"] {
        status[loss]["what"] = EVIL.into();
    }
    status["arbiter"]["lost"] = EVIL.into();
    let more = json!({ "why": EVIL, "definition_error": EVIL, "warnings": [EVIL], "failures": 3 });
    heard.vms.insert(0, vm(EVIL, "running", false, status, more));
    let figures = heard.figures.as_mut().unwrap();
    let map = json!({ "cell_bytes": 3, "ranges": [], "pages_per_s": vec![u64::MAX; 999] });
    figures.heat.insert(EVIL.into(), serde_json::from_value(map).unwrap());
    let job: Job = serde_json::from_value(json!({
        "id": EVIL, "kind": "start", "vm": EVIL, "state": "running", "progress": { "done": 0, "total": 1, "now": EVIL },
        "can_cancel": false, "began": EVIL, "ended": null, "result": null, "error": null
    }))
    .unwrap();
    heard.jobs.push(job.clone());
    let mut state = State::new(&heard, Some(EVIL), now());
    let entry = json!({ "id": EVIL, "time": EVIL, "kind": EVIL, "vm": EVIL, "text": EVIL, "data": null });
    state.happened(&serde_json::from_value(entry).unwrap());
    state.begun(&job);
    state
}

fn is_harmless(text: &str) -> bool {
    !text.chars().any(|it| (it.is_control() && it != '\n') || "\u{202e}\u{200b}".contains(it))
}

#[test]
fn hostile_words_do_not_reach_the_terminal() {
    let mut state = hostile();
    let mut whole = as_text(&state, 200);
    assert!(whole.contains("x�[2J�]0;evil��31m����y"), "{whole}");
    for (at, over) in [Over::Nothing, Over::Help, Over::Nothing, Over::Nothing].into_iter().enumerate() {
        state.over = over;
        match at {
            2 => state.refused(EVIL),
            3 => state.lose(EVIL),
            _ => {}
        }
        for (columns, high) in [(40, 10), (80, 24), (120, 40), (200, 100)] {
            whole += &lines(&state, columns, high).join("\n");
            assert!(is_harmless(&whole), "{whole:?}");
            // What the terminal gets has the sequences of the picture, and no others.
            let sent = as_sent(&state, columns, high);
            assert!(
                !sent.contains("\x1b]")
                    && !sent.contains("\x1b[2J\x1b")
                    && is_harmless(&without_styles(&sent)),
                "{sent:?}"
            );
        }
    }
}

/// The bytes that a terminal gets for one picture.
fn as_sent(state: &State, columns: u16, high: u16) -> String {
    let mut bytes = Vec::new();
    let area = ratatui::layout::Rect::new(0, 0, columns, high);
    let options = TerminalOptions { viewport: Viewport::Fixed(area) };
    let mut terminal = Terminal::with_options(CrosstermBackend::new(&mut bytes), options).unwrap();
    terminal.draw(|frame| paint(state, Colours::ALL, area, frame.buffer_mut())).unwrap();
    drop(terminal);
    String::from_utf8(bytes).unwrap()
}

/// Without the sequences that move the cursor, hide it, or choose a style.
fn without_styles(sent: &str) -> String {
    let mut parts = sent.split("\x1b[");
    let mut rest = parts.next().unwrap().to_owned();
    for part in parts {
        let end = part.find(|it: char| !it.is_ascii_digit() && !"?;".contains(it)).unwrap();
        assert!(part[end..].starts_with(['m', 'H', 'l', 'h']), "{part:?}");
        rest += &part[end + 1..];
    }
    rest
}

#[test]
fn arrows_choose_and_stay_with_the_vm() {
    let mut state = state("db");
    let name = |state: &State| state.chosen().unwrap().shown.clone();
    for (key, there) in [
        (Key::Up, "db"),
        (Key::Down, "mail"),
        (Key::Letter('j'), "old"),
        (Key::Letter('k'), "mail"),
        (Key::Last, "web"),
        (Key::Down, "web"),
        (Key::PageUp, "db"),
        (Key::PageDown, "web"),
        (Key::First, "db"),
        (Key::Last, "web"),
    ] {
        assert_eq!(state.press(key), Wish::Nothing);
        assert_eq!(name(&state), there, "{key:?}");
    }
    let mut fewer = heard();
    fewer.vms.remove(0);
    state.take(&fewer, now());
    assert_eq!(name(&state), "web");
    fewer.vms.pop();
    state.take(&fewer, now());
    assert_eq!(name(&state), "spare", "it is gone, and its neighbour is looked at");
    fewer.vms.clear();
    state.take(&fewer, now());
    assert_eq!(state.press(Key::Letter('h')), Wish::Nothing);
    assert_eq!(state.chosen(), None);
    // Of many, those around the chosen one are shown.
    let many: Vec<_> =
        (0..50).map(|it| vm(&format!("v{it}"), "stopped", false, Value::Null, json!({}))).collect();
    let state = State::new(&Heard { vms: many, ..heard() }, Some("v30"), now());
    let shown = lines(&state, 80, 24);
    line(&shown, "v30");
    line(&shown, "NAME 31/50");
}

#[test]
fn a_hand_over_is_asked_for_twice_and_refused_where_nobody_could_take_it() {
    let mut state = state("web");
    assert_eq!(state.press(Key::Letter('h')), Wish::Nothing);
    let asked = lines(&state, 80, 24).join("\n");
    assert!(asked.contains("Hand web over to hostb:7001?") && asked.contains("y: yes"), "{asked}");
    for no in [Key::Letter('n'), Key::Back, Key::Letter('h'), Key::Letter('q'), Key::Down] {
        assert_eq!(state.press(no), Wish::Nothing, "{no:?}");
        assert_eq!((&state.over, state.note.as_deref()), (&Over::Nothing, Some("nothing was done")));
        assert_eq!(state.press(Key::Letter('y')), Wish::Nothing, "it was not asked");
        state.press(Key::Letter('h'));
    }
    assert_eq!(state.press(Key::Letter('y')), Wish::HandOver("web".into()));
    for (vm, why) in [
        ("db", "db is not protected"),
        ("mail", "mail runs at the other host"),
        ("old", "old does not run here"),
        ("spare", "spare does not run here"),
    ] {
        let mut state = super::state(vm);
        assert_eq!(
            (state.press(Key::Letter('h')), state.press(Key::Letter('y'))),
            (Wish::Nothing, Wish::Nothing)
        );
        state.press(Key::Letter('h'));
        let shown = lines(&state, 80, 24).join("\n");
        assert!(shown.contains(why), "{shown}");
        assert_eq!((state.press(Key::Back), state.over), (Wish::Nothing, Over::Nothing));
    }
}

#[test]
fn keys_end_explain_and_repaint() {
    let mut state = state("web");
    state.press(Key::Letter('?'));
    let help = lines(&state, 80, 24).join("\n");
    for word in
        ["h hands it over", "Pause: ", "▲ the VM was taken over here", "▒ not protected", "any key: back"]
    {
        assert!(help.contains(word), "{word}:\n{help}");
    }
    let small = lines(&state, 40, 10).join("\n");
    assert!(small.contains("a larger terminal has more") && small.contains("any key: back"), "{small}");
    assert_eq!(state.press(Key::Letter('q')), Wish::Nothing, "it closes the help");
    assert_eq!((state.press(Key::Redraw), state.press(Key::Letter('q'))), (Wish::Redraw, Wish::End));
    state.press(Key::Letter('h'));
    assert_eq!(state.press(Key::End), Wish::End, "Ctrl-C, whatever is asked");
}

fn job(state: &str, result: Value, error: Value) -> Job {
    serde_json::from_value(json!({
        "id": "5", "kind": "hand_over", "vm": "web", "state": state, "progress": { "done": 0, "total": 1, "now": "it moves" },
        "can_cancel": false, "began": NOW, "ended": null, "result": result, "error": error
    }))
    .unwrap()
}

#[test]
fn what_became_of_an_order_is_said() {
    let running = job("running", Value::Null, Value::Null);
    let with = |job: &Job| Heard { jobs: vec![job.clone()], ..heard() };
    let mut state = state("web");
    state.begun(&running);
    assert_eq!(state.note.as_deref(), Some("web: the order was given (hand-over)"));
    state.take(&with(&running), now());
    let web = line(&lines(&state, 80, 24), "web  ").to_owned();
    assert!(web.contains("hand-over is under way"), "{web}");
    state.press(Key::Letter('h'));
    assert!(
        matches!(&state.over, Over::Refusal(why) if why.contains("wait for its end")),
        "{:?}",
        state.over
    );
    state.press(Key::Back);
    state.take(&with(&job("succeeded", json!({ "took_ms": 12 }), Value::Null)), now());
    assert_eq!(state.note.as_deref(), Some("hand-over of web: done (12 ms)"));
    state.begun(&running);
    let error = json!({ "code": "failed", "message": "the standby is gone", "remedy": "start it" });
    let failed = with(&job("failed", Value::Null, error));
    state.take(&failed, now());
    assert_eq!(state.over, Over::Refusal("hand-over of web: the standby is gone; start it".into()));
    state.press(Key::Back);
    state.take(&failed, now());
    assert_eq!(state.over, Over::Nothing, "it is said once");
}

#[test]
fn a_node_that_goes_is_missed_and_found_again() {
    let mut state = state("web");
    state.lose("no node answers at /run/x");
    let shown = lines(&state, 80, 24);
    assert_eq!(shown[1], "CONNECTION LOST: no node answers at /run/x");
    assert_eq!(shown[2], "What you see is of 12:00:00 UTC. It is tried again.");
    line(&shown, "web  ");
    state.take(&heard(), now() + 60_000);
    assert!(state.is_old().is_none());
    // One that does not even say no.
    state.at(now() + 70_000);
    let shown = lines(&state, 80, 24);
    assert_eq!(shown[1], "CONNECTION LOST: the node does not answer");
}

#[test]
fn the_clock_is_the_nodes() {
    let hour = 3_600_000;
    let mut state = State::new(&heard(), None, now() + hour);
    assert_eq!(state.there(), now() + hour, "all figures may be old");
    let mut later = heard();
    let figures = later.figures.as_mut().unwrap();
    figures.reset = false;
    state.take(&later, now() + hour);
    assert_eq!(state.there(), now());
    let behind = State::new(&heard(), None, now() - hour);
    assert_eq!(behind.there(), now());
    assert_eq!(State::new(&heard(), None, now() + 900).there(), now() + 900);
}

#[test]
fn one_picture_as_text_has_everything() {
    let text = as_text(&state("web"), 100);
    println!("{text}");
    for word in
        ["hosta  active", "NOT go on", "▸ web", "spare", "Held output", "Protection", "If the other host"]
    {
        assert!(text.contains(word), "{word}:\n{text}");
    }
    assert!(!text.contains("q end") && text.ends_with('\n') && !text.ends_with("\n\n"));
    assert!(text.lines().all(|it| !it.ends_with(' ') && it.chars().count() <= 100));
}
