//! The VM that is looked at: what is said of it, and its time line.

use ratatui::layout::Rect;

use super::plan::Plan;
use super::{Pen, Tone};
use crate::figures::{Heat, Spread};
use crate::top::heat::{sentence, strip, total};
use crate::top::lanes::{Bar, Drawn, Guard, Lane, Lanes, STEPS};
use crate::top::state::State;
use crate::top::text::{clock, cut, width};

/// Parts of a character, from below.
const BLOCKS: [&str; STEPS as usize + 1] = [" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];
/// What stands for the light part of a bar where there are no colours.
const SHADE: &str = "░";
/// Memory that nobody writes.
const UNWRITTEN: &str = "·";
/// More columns than this have no point each.
const MOST_COLUMNS: u16 = 150;
/// How wide a lane's name and value are.
const LABEL: u16 = 22;
const SHORT_LABEL: u16 = 18;
/// From here on there is room for the longer ones.
const USUAL: u16 = 60;

/// Signs of what became of a VM.
pub(super) const fn sign(guard: Guard) -> (&'static str, Tone) {
    match guard {
        Guard::Unknown => (" ", Tone::Plain),
        Guard::Protected => ("─", Tone::Good),
        Guard::Bare => ("▒", Tone::Bad),
        Guard::Away => ("·", Tone::Quiet),
    }
}

/// Paints all of it.
pub(super) fn paint(state: &State, plan: &Plan, pen: &mut Pen<'_>) {
    let Some(vm) = state.chosen() else { return };
    let title = format!("{}: {}", vm.shown, vm.hosts(&state.host.name));
    pen.line(&[(Tone::Strong, title)]);
    plan.facts.iter().for_each(|line| pen.line(std::slice::from_ref(line)));
    let Some(lanes) = state.lanes() else { return };
    for lane in &plan.lanes {
        let area = pen.take(plan.high);
        paint_lane(lanes, lane, state.there(), area, pen);
    }
    if plan.guard {
        paint_guard(lanes, state.there(), pen);
    }
    if let Some(heat) = state.heat() {
        paint_heat(heat, plan.heat, pen);
    }
}

/// What is said of the VM that is looked at, the most important first.
pub(super) fn facts(state: &State) -> Vec<(Tone, String)> {
    let Some(vm) = state.chosen() else { return Vec::new() };
    let mut facts: Vec<_> = vm.job.iter().map(|it| (Tone::Wait, it.clone())).collect();
    let since = |at: Option<i64>| match at {
        Some(at) => format!(" since {} UTC", clock(at, state.there())),
        None => String::new(),
    };
    let why = vm.why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
    match &vm.says {
        Some(says) if vm.protected => facts.push((Tone::Plain, format!("Protected{}", since(says.since)))),
        Some(says) => facts.push((Tone::Warn, format!("Not protected{}{why}", since(says.since)))),
        None => facts.push((Tone::Plain, format!("It is {}{}{why}", vm.state.name(), since(vm.since)))),
    }
    facts.extend(vm.notes.iter().map(|it| (Tone::Warn, it.clone())));
    let Some(says) = &vm.says else { return facts };
    let losses = [("this host", &says.loss_here), ("the other host", &says.loss_there)];
    for (host, loss) in losses {
        if let Some(loss) = loss {
            let tone = if loss.survived { Tone::Plain } else { Tone::Bad };
            facts.push((tone, format!("If {host} failed now: {}", loss.text())));
        }
    }
    facts
}

/// The area of the names, and that of the columns beside it.
fn halves(area: Rect) -> (Rect, Rect) {
    let label = if area.width < USUAL { SHORT_LABEL } else { LABEL };
    let wide = area.width.saturating_sub(label + 1);
    let bars = Rect { x: area.x + label + 1, width: wide.min(MOST_COLUMNS), ..area };
    (Rect { width: label, ..area }, bars)
}

fn paint_lane(lanes: &Lanes, lane: &Lane, now: i64, area: Rect, pen: &mut Pen<'_>) {
    let (label, bars) = halves(area);
    let drawn = lanes.draw(lane, bars.width, area.height * STEPS, now);
    for (line, text) in
        labels(lane, &drawn, label.width.into()).into_iter().enumerate().take(area.height.into())
    {
        let tone = if line == 0 { Tone::Plain } else { Tone::Quiet };
        pen.write(Rect { y: label.y + line as u16, ..label }, &[(tone, text)]);
    }
    for (x, bar) in (bars.left()..bars.right()).zip(&drawn.bars) {
        let Some(bar) = bar else { continue };
        for (height, y) in (bars.top()..bars.bottom()).rev().enumerate() {
            let (tone, symbol) = block(*bar, height as u16 * STEPS, pen.colours.are_on());
            let style = pen.colours.style(tone);
            pen.buffer.set_string(x, y, symbol, style);
        }
    }
}

/// What a bar is in the line that begins at this step.
fn block(bar: Bar, from: u16, in_colours: bool) -> (Tone, &'static str) {
    let part = |steps: u16| usize::from(steps.saturating_sub(from).min(STEPS));
    match (part(bar.mean), part(bar.most)) {
        (0, 0) => (Tone::Plain, " "),
        (0, most) if in_colours => (Tone::Light, BLOCKS[most]),
        (0, _) => (Tone::Light, SHADE),
        (mean, _) => (Tone::Bar, BLOCKS[mean]),
    }
}

/// The name of a lane with its value now, what no value was above, and its scale.
fn labels(lane: &Lane, drawn: &Drawn, wide: usize) -> [String; 3] {
    let write = lane.write;
    let most = |it: Spread| {
        it.most.map_or_else(|| "some beyond measure".to_owned(), |most| format!("≤ {}", write(most)))
    };
    let mean = drawn.last.map_or_else(|| "–".to_owned(), |it| write(it.mean));
    let first = format!(
        "{}{}{mean}",
        lane.title,
        " ".repeat(wide.saturating_sub(width(lane.title) + width(&mean)).max(1))
    );
    let second = drawn.last.map_or_else(String::new, most);
    let second = format!("{}{second}", " ".repeat(wide.saturating_sub(width(&second))));
    let third = format!("  scale to {}", write(drawn.top));
    [first, second, third].map(|it| cut(&it, wide))
}

fn paint_guard(lanes: &Lanes, now: i64, pen: &mut Pen<'_>) {
    let area = pen.take(1);
    if area.height == 0 {
        return;
    }
    let (label, columns) = halves(area);
    pen.write(label, &[(Tone::Plain, "Protection".into())]);
    for (x, (guard, happened)) in (columns.left()..columns.right()).zip(lanes.guard(columns.width, now)) {
        let (symbol, tone) = match happened {
            Some(it) => (it.sign.to_string(), if it.bad { Tone::Bad } else { Tone::Note }),
            None => (sign(guard).0.to_owned(), sign(guard).1),
        };
        let style = pen.colours.style(tone);
        pen.buffer.set_string(x, area.y, symbol, style);
    }
}

/// Where memory is written: a strip, and a line below it for a sentence.
fn paint_heat(heat: &Heat, lines: u16, pen: &mut Pen<'_>) {
    let area = pen.take(lines);
    if area.height == 0 {
        return;
    }
    let (label, columns) = halves(area);
    let (title, total) = ("Memory", total(heat));
    let between = usize::from(label.width).saturating_sub(width(title) + width(&total)).max(1);
    pen.write(label, &[(Tone::Plain, format!("{title}{}{total}", " ".repeat(between)))]);
    for (x, height) in (columns.left()..columns.right()).zip(strip(heat, columns.width)) {
        let (symbol, tone) = match height {
            0 => (UNWRITTEN, Tone::Quiet),
            height => (BLOCKS[usize::from(height)], Tone::Bar),
        };
        let style = pen.colours.style(tone);
        pen.buffer.set_string(x, area.y, symbol, style);
    }
    if area.height > 1 {
        let below = |it: Rect| Rect { y: it.y + 1, height: 1, ..it };
        let scale = format!("{:>wide$}", "pages written", wide = usize::from(label.width));
        pen.write(below(label), &[(Tone::Quiet, scale)]);
        pen.write(below(columns), &[(Tone::Quiet, sentence(heat))]);
    }
}
