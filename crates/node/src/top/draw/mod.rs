//! The picture itself. Painting is a function of the state and of the room that there is, and of nothing else.

mod colours;
mod over;
mod plan;
mod table;
mod time_line;

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Modifier;

pub(crate) use colours::{Colours, Tone};
use plan::{Plan, wanted_height};

use super::state::{Over, State};
use super::text::{clock, cut, width, wrap};
use crate::drain::Mode;

/// The smallest terminal that shows anything: columns and lines.
const LEAST: (u16, u16) = (36, 8);
/// What the keys do, as far as there is room.
const KEYS: &str = "↑↓ choose   h hand over   ? help   q end";

/// Paints all of it.
pub(crate) fn paint(state: &State, colours: Colours, area: Rect, buffer: &mut Buffer) {
    let mut pen = Pen { buffer, colours, rest: area };
    if area.width < LEAST.0 || area.height < LEAST.1 {
        let (columns, lines) = LEAST;
        let text =
            format!("This terminal is too small: {columns} columns and {lines} lines are needed. q ends.");
        wrap(&text, area.width.into()).into_iter().for_each(|line| pen.line(&[(Tone::Plain, line)]));
        return;
    }
    let plan = Plan::new(state, area);
    head(state, &mut pen);
    plan.look.iter().for_each(|line| pen.line(std::slice::from_ref(line)));
    let below = pen.rest;
    if plan.hosts {
        pen.line(&[(Tone::Quiet, "Hosts: ".into()), (Tone::Plain, state.hosts())]);
    }
    table::paint(state, plan.rows, &mut pen);
    time_line::paint(state, &plan, &mut pen);
    events(state, &plan, &mut pen);
    if state.is_old().is_some() {
        pen.buffer.set_style(below, Modifier::DIM);
    }
    pen.rest = Rect { y: area.bottom() - 1, height: 1, ..area };
    match &state.note {
        Some(note) => pen.line(&[(Tone::Note, note.clone())]),
        None => pen.line(&[(Tone::Quiet, KEYS.into())]),
    }
    over::paint(state, area, &mut pen);
}

/// One picture as text, with everything that there is, in lines of so many columns.
pub(crate) fn as_text(state: &State, columns: u16) -> String {
    let height = wanted_height(state);
    let area = Rect::new(0, 0, columns.max(LEAST.0), height.max(LEAST.1));
    let mut buffer = Buffer::empty(area);
    let mut without_keys = state.clone();
    (without_keys.over, without_keys.note) = (Over::Nothing, Some(String::new()));
    paint(&without_keys, Colours::NONE, area, &mut buffer);
    let mut text = String::new();
    for y in area.top()..area.bottom() {
        let mut x = area.left();
        let mut line = String::new();
        while let Some(cell) = buffer.cell((x, y)).filter(|_| x < area.right()) {
            line += cell.symbol();
            // What is wide covers the next cell, too.
            x += u16::try_from(width(cell.symbol())).unwrap_or(1).max(1);
        }
        text += line.trim_end();
        text.push('\n');
    }
    text.trim_end().to_owned() + "\n"
}

/// Paints lines from above.
pub(super) struct Pen<'a> {
    buffer: &'a mut Buffer,
    colours: Colours,
    /// What is not painted yet.
    rest: Rect,
}

impl Pen<'_> {
    /// Paints a line, if there is room; `…` says that some of it is missing.
    fn line(&mut self, parts: &[(Tone, String)]) {
        let area = self.take(1);
        self.write(area, parts);
    }

    /// Writes into the first line of an area.
    fn write(&mut self, area: Rect, parts: &[(Tone, String)]) {
        let mut x = area.x;
        let parts = if area.height > 0 { parts } else { &[] };
        for (tone, text) in parts {
            let room = usize::from(area.right().saturating_sub(x));
            let style = self.colours.style(*tone);
            (x, _) = self.buffer.set_stringn(x, area.y, cut(text, room), room, style);
        }
    }

    /// The next lines, if there are so many.
    fn take(&mut self, lines: u16) -> Rect {
        let taken = Rect { height: lines.min(self.rest.height), ..self.rest };
        self.rest.y += taken.height;
        self.rest.height -= taken.height;
        taken
    }
}

fn head(state: &State, pen: &mut Pen<'_>) {
    let area = pen.take(1);
    let clock = format!(" {} UTC", clock(state.there(), state.there()));
    let room = area.width.saturating_sub(width(&clock) as u16);
    let host = &state.host;
    let tone = if host.mode == Mode::Active { Tone::Good } else { Tone::Warn };
    let left = [
        (Tone::Strong, host.name.clone()),
        (tone, format!("  {}", host.mode.name())),
        (Tone::Quiet, format!("  Outlive {}", host.release)),
    ];
    pen.write(Rect { width: room, ..area }, &left);
    pen.write(Rect { x: area.x + room, width: area.width - room, ..area }, &[(Tone::Quiet, clock)]);
}

fn events(state: &State, plan: &Plan, pen: &mut Pen<'_>) {
    if plan.events == 0 {
        return;
    }
    pen.line(&[(Tone::Quiet, "What happened:".into())]);
    for event in state.events.iter().rev().take(usize::from(plan.events) - 1) {
        let at = event.at.map_or_else(|| "        ".to_owned(), |at| clock(at, state.there()));
        let tone = if event.bad { Tone::Bad } else { Tone::Plain };
        pen.line(&[(Tone::Quiet, format!("{at} ")), (tone, event.text.clone())]);
    }
}
