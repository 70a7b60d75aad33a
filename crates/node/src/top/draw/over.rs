//! What lies over the picture: a question, a refusal, or what keys and signs mean.

use ratatui::layout::Rect;
use ratatui::widgets::{Block, Clear, Widget};

use super::time_line::sign;
use super::{Pen, Tone};
use crate::top::heat::LEGEND;
use crate::top::lanes::{ALL, BEGUN, Guard, SIGNS};
use crate::top::state::{Over, State};
use crate::top::text::wrap;

/// As wide as it gets.
const WIDEST: u16 = 90;

pub(super) fn paint(state: &State, area: Rect, pen: &mut Pen<'_>) {
    let (title, tone, text, answer) = match &state.over {
        Over::Nothing => return,
        Over::Help => (" Help ", Tone::Plain, help(), "any key: back"),
        Over::Question { text, .. } => {
            (" Hand over ", Tone::Warn, vec![text.clone()], "y: yes    any other key: no")
        }
        Over::Refusal(why) => (" Not done ", Tone::Bad, vec![why.clone()], "any key: back"),
    };
    let wide = area.width.min(WIDEST);
    let inner = usize::from(wide.saturating_sub(4));
    let mut lines: Vec<_> = text.iter().flat_map(|it| wrap(it, inner)).collect();
    // The answer has a line of its own, whatever else there is no room for.
    let room = usize::from(area.height.saturating_sub(3));
    if lines.len() > room {
        lines.truncate(room.saturating_sub(1));
        lines.push("… (a larger terminal has more)".to_owned());
    }
    let high = lines.len() as u16 + 3;
    let place = Rect {
        x: area.x + (area.width - wide) / 2,
        y: area.y + area.height.saturating_sub(high) / 2,
        width: wide,
        height: high.min(area.height),
    };
    Clear.render(place, pen.buffer);
    Block::bordered().title(title).border_style(pen.colours.style(tone)).render(place, pen.buffer);
    pen.rest = Rect { x: place.x + 2, y: place.y + 1, width: inner as u16, height: place.height - 2 };
    lines.into_iter().for_each(|line| pen.line(&[(Tone::Plain, line)]));
    pen.line(&[(Tone::Strong, answer.to_owned())]);
}

/// What keys, figures and signs mean, a paragraph each.
fn help() -> Vec<String> {
    let mut all = vec![
        "↑ ↓ PageUp PageDown Home End choose a VM. h hands it over, if y follows. Ctrl-L paints anew. q ends.".to_owned(),
        "SURVIVES: whether the VM would go on without anybody's help if this host failed now.".to_owned(),
        "The time line has five minutes. A bar is the mean; up to its light part no value was larger.".to_owned(),
    ];
    all.extend(ALL.iter().map(|lane| format!("{}: {}.", lane.title, lane.legend)));
    all.push(format!("{LEGEND}."));
    let guard = [
        (Guard::Protected, "protected"),
        (Guard::Bare, "not protected"),
        (Guard::Away, "it ran at the other host"),
    ];
    let guard: Vec<_> = guard.iter().map(|(it, what)| format!("{} {what}", sign(*it).0)).collect();
    all.push(format!("Protection: {}.", guard.join(", ")));
    let signs = SIGNS.iter().map(|(_, it)| it).chain([&BEGUN]);
    let signs: Vec<_> = signs.map(|it| format!("{} {}", it.sign, it.what)).collect();
    all.push(format!("{}.", signs.join("; ")));
    all
}
