//! The table of VMs.

use ratatui::layout::Rect;

use super::{Pen, Tone};
use crate::figures::Role;
use crate::top::state::State;
use crate::top::text::{cut, span, width};
use crate::top::vm::Vm;
use crate::view;

/// From here on there is room for long headings, for since when, and for the other host.
const USUAL: u16 = 60;
const WIDE: u16 = 100;
const WIDEST: u16 = 120;
/// The widest name that does not give way.
const NAME: usize = 20;
const NOTHING: &str = "–";

/// A column: its heading and how wide it is.
struct Column {
    heading: &'static str,
    wide: usize,
    cell: fn(&Vm, &State) -> (Tone, String),
}

/// Paints the head and so many VMs, that which is looked at among them.
pub(super) fn paint(state: &State, rows: u16, pen: &mut Pen<'_>) {
    let columns = columns(state, pen.rest.width);
    let rows = usize::from(rows).max(1);
    let last = state.vms.len().saturating_sub(rows);
    let first = state.chosen.saturating_sub(rows / 2).min(last);
    let mut head: Vec<_> = columns.iter().map(|it| (Tone::Quiet, it.heading.to_owned())).collect();
    if state.vms.len() > rows {
        head[0].1 = format!("NAME {}/{}", state.chosen + 1, state.vms.len());
    }
    line(&columns, false, head, pen);
    if state.vms.is_empty() {
        pen.line(&[(Tone::Quiet, "  No VM is defined on this host: `outlive vm define` does that.".into())]);
    }
    for (at, vm) in state.vms.iter().enumerate().skip(first).take(rows) {
        let is_chosen = at == state.chosen;
        let mut cells: Vec<_> = columns.iter().map(|it| (it.cell)(vm, state)).collect();
        if is_chosen {
            cells[0].0 = Tone::Chosen;
        }
        line(&columns, is_chosen, cells, pen);
    }
}

fn line(columns: &[Column], is_chosen: bool, cells: Vec<(Tone, String)>, pen: &mut Pen<'_>) {
    let area = pen.take(1);
    pen.write(area, &[(Tone::Strong, if is_chosen { "▸ ".into() } else { "  ".into() })]);
    let mut x = area.x + 2;
    for (column, (tone, text)) in columns.iter().zip(cells) {
        let room = column.wide.min(area.right().saturating_sub(x).into()) as u16;
        pen.write(Rect { x, width: room, ..area }, &[(tone, cut(&text, room.into()))]);
        x = x.saturating_add(room + 1).min(area.right());
    }
}

fn columns(state: &State, room: u16) -> Vec<Column> {
    let short = room < USUAL;
    let protected = if short { ("PROT.", 5) } else { ("PROTECTED", 9) };
    let mut all = vec![
        Column { heading: "NAME", wide: 0, cell: |vm, _| (Tone::Strong, vm.shown.clone()) },
        Column { heading: "STATE", wide: 12, cell: state_cell },
        Column { heading: protected.0, wide: protected.1, cell: protected_cell },
        Column { heading: "SURVIVES", wide: 8, cell: survives_cell },
    ];
    if room >= WIDE {
        all.push(Column { heading: "SINCE", wide: 9, cell: since_cell });
    }
    if room >= WIDEST {
        all.push(Column { heading: "OTHER HOST", wide: 18, cell: peer_cell });
    }
    // The mark of what is looked at, and a space behind each column.
    let taken = 2 + all.iter().map(|it| it.wide + 1).sum::<usize>();
    let rest = usize::from(room).saturating_sub(taken);
    let longest = state.vms.iter().map(|vm| width(&vm.shown)).max().unwrap_or(0).max(12);
    all[0].wide = if short { rest } else { longest.min(NAME) };
    if !short {
        let wide = rest.saturating_sub(all[0].wide + 1);
        all.push(Column { heading: "BEHIND, OR WHY NOT", wide, cell: why_cell });
    }
    all
}

fn state_cell(vm: &Vm, _: &State) -> (Tone, String) {
    use view::State::*;
    let (sign, tone) = match vm.state {
        Running => ('●', Tone::Good),
        Standby => ('◐', Tone::Good),
        Deciding | Starting | Stopping => ('◌', Tone::Wait),
        Stopped | Ended => ('○', Tone::Quiet),
        Waiting => ('↻', Tone::Warn),
        Failed | Misdefined => ('✕', Tone::Bad),
        Foreign => ('?', Tone::Warn),
    };
    (tone, format!("{sign} {}", vm.state.name()))
}

fn protected_cell(vm: &Vm, _: &State) -> (Tone, String) {
    let Some(says) = &vm.says else { return (Tone::Quiet, NOTHING.into()) };
    match (vm.protected, says.role) {
        (true, _) => (Tone::Good, "yes".into()),
        (false, Some(Role::Primary)) => (Tone::Bad, "NO".into()),
        (false, _) => (Tone::Warn, "no".into()),
    }
}

fn survives_cell(vm: &Vm, _: &State) -> (Tone, String) {
    match vm.survives() {
        None => (Tone::Quiet, NOTHING.into()),
        Some(true) => (Tone::Good, "yes".into()),
        Some(false) => (Tone::Bad, "NO".into()),
    }
}

fn since_cell(vm: &Vm, state: &State) -> (Tone, String) {
    let ago = vm.since.map(|since| state.there().saturating_sub(since).max(0).unsigned_abs());
    (Tone::Quiet, ago.map_or_else(|| NOTHING.to_owned(), span))
}

fn peer_cell(vm: &Vm, _: &State) -> (Tone, String) {
    let peer = vm.says.as_ref().and_then(|it| it.peer.clone());
    (Tone::Plain, peer.unwrap_or_else(|| NOTHING.to_owned()))
}

fn why_cell(vm: &Vm, _: &State) -> (Tone, String) {
    if let Some(job) = &vm.job {
        return (Tone::Wait, job.clone());
    }
    let why = vm.why.clone().map(|why| (Tone::Plain, why));
    let behind = vm.behind().map(|behind| (Tone::Plain, behind));
    behind.or(why).unwrap_or_else(|| (Tone::Quiet, String::new()))
}
