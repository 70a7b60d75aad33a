//! How the lines of a terminal are shared out: what matters most comes first, and what is left goes to the next.

use ratatui::layout::Rect;

use super::Tone;
use super::time_line::facts;
use crate::top::lanes::Lane;
use crate::top::state::State;
use crate::top::text::clock;

/// The most lanes, events and steps of anything.
const MOST_LANES: usize = 5;
const HIGHEST: u16 = 8;
/// How high the strip of memory is, with its sentence.
const HEAT: u16 = 2;
/// How high a lane is in a picture as text.
const HIGH_AS_TEXT: u16 = 3;

/// What is painted, and how large.
#[derive(Debug)]
pub(super) struct Plan {
    /// The one look, and before it what is wrong with the connection.
    pub(super) look: Vec<(Tone, String)>,
    pub(super) hosts: bool,
    /// VMs in the table.
    pub(super) rows: u16,
    /// What is said of the VM that is looked at.
    pub(super) facts: Vec<(Tone, String)>,
    pub(super) lanes: Vec<Lane>,
    /// Lines of each lane.
    pub(super) high: u16,
    /// Whether there is a line for what became of it.
    pub(super) guard: bool,
    /// Lines for where its memory is written.
    pub(super) heat: u16,
    /// Lines for events, with their heading.
    pub(super) events: u16,
}

/// Lines that are not given away yet.
struct Room(u16);

impl Room {
    /// Takes up to so many.
    fn take(&mut self, lines: usize) -> usize {
        let taken = lines.min(self.0.into());
        self.0 -= taken as u16;
        taken
    }

    /// Takes so many, or none.
    fn all(&mut self, lines: usize) -> bool {
        usize::from(self.0) >= lines && self.take(lines) == lines
    }
}

impl Plan {
    /// For an area of the least height, or a larger one.
    pub(super) fn new(state: &State, area: Rect) -> Self {
        let (look, facts) = (look(state), facts(state));
        let lanes = state.lanes().map(|it| it.lanes()).unwrap_or_default();
        let vms = state.vms.len();
        let (mut looks, mut rows, mut said, mut shown, mut high) = (1, vms.min(1), 0, 0, 1_u16);
        // Head, keys, one line of the look, the table's head with a row, and the name of the VM.
        let mut room = Room(area.height.saturating_sub(5 + rows as u16));
        let grow =
            |room: &mut Room, size: &mut usize, most: usize| *size += room.take(most.saturating_sub(*size));
        grow(&mut room, &mut shown, lanes.len().min(3));
        grow(&mut room, &mut rows, vms.min(3));
        grow(&mut room, &mut looks, look.len().min(3));
        let guard = shown > 0 && room.all(1);
        let hosts = room.all(1);
        let heats = usize::from(HEAT) * usize::from(state.heat().is_some());
        let mut heat = room.take(heats.min(1));
        grow(&mut room, &mut said, facts.len().min(2));
        grow(&mut room, &mut rows, vms.min(6));
        let higher = |room: &mut Room, high: &mut u16, lanes: usize, most: u16| {
            while *high < most && lanes > 0 && room.all(lanes) {
                *high += 1;
            }
        };
        higher(&mut room, &mut high, shown, 2);
        grow(&mut room, &mut looks, look.len().min(6));
        higher(&mut room, &mut high, shown, HIGH_AS_TEXT);
        grow(&mut room, &mut heat, heats);
        grow(&mut room, &mut said, facts.len());
        grow(&mut room, &mut rows, vms.min(12));
        let high_lines = usize::from(high);
        while shown < lanes.len().min(MOST_LANES) && room.all(high_lines) {
            shown += 1;
        }
        grow(&mut room, &mut looks, look.len());
        grow(&mut room, &mut rows, vms);
        let has_events = !state.events.is_empty();
        let mut events =
            if has_events && room.0 >= 2 { room.take((state.events.len() + 1).min(6)) } else { 0 };
        higher(&mut room, &mut high, shown, HIGHEST);
        if has_events && events > 0 {
            grow(&mut room, &mut events, state.events.len() + 1);
        }
        let first = |lines: Vec<_>, count: usize| lines.into_iter().take(count).collect();
        Self {
            look: first(look, looks),
            hosts,
            rows: rows as u16,
            facts: first(facts, said),
            lanes: lanes.into_iter().take(shown).collect(),
            high,
            guard,
            heat: heat as u16,
            events: events as u16,
        }
    }
}

/// How many lines show everything.
pub(super) fn wanted_height(state: &State) -> u16 {
    let lanes = state.lanes().map_or(0, |it| it.lanes().len().min(MOST_LANES));
    let time_line = if lanes > 0 { 1 + lanes * usize::from(HIGH_AS_TEXT) } else { 0 };
    let heat = if state.heat().is_some() { usize::from(HEAT) } else { 0 };
    let events = state.events.len() + usize::from(!state.events.is_empty());
    // Head, hosts, the table's head, the name of the VM, and the keys.
    let all = 5 + look(state).len() + state.vms.len() + facts(state).len() + time_line + heat + events;
    u16::try_from(all).unwrap_or(u16::MAX)
}

fn look(state: &State) -> Vec<(Tone, String)> {
    let mut lines = Vec::new();
    if let Some((why, at)) = state.is_old() {
        lines.push((Tone::Bad, format!("CONNECTION LOST: {why}")));
        let at = clock(at, state.now);
        lines.push((Tone::Warn, format!("What you see is of {at} UTC. It is tried again.")));
    }
    lines.extend(state.verdict());
    lines
}
