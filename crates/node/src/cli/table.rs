//! Tables that fit a terminal.

use crate::terminal::shown_in_line;

/// As wide as a terminal is when nobody knows.
const USUAL: usize = 100;
/// The last column keeps this much.
const LEAST: usize = 16;

/// How wide the terminal of standard output is: what the shell says, or the terminal itself. `None`: nobody reads lines
/// there.
pub fn width() -> Option<usize> {
    use std::io::IsTerminal;
    let out = std::io::stdout();
    if !out.is_terminal() {
        return None;
    }
    let said = std::env::var("COLUMNS").ok().and_then(|it| it.parse().ok());
    let own = || rustix::termios::tcgetwinsize(out).ok().map(|size| size.ws_col.into());
    Some(said.or_else(own).filter(|it| *it >= 40).unwrap_or(USUAL))
}

/// A table with a head. What does not fit is cut from the last column, and `…` says so.
pub(super) fn table<const N: usize>(head: [&str; N], rows: &[[String; N]], width: Option<usize>) -> String {
    // A cell is part of one line.
    let rows: Vec<[String; N]> =
        rows.iter().map(|row| row.each_ref().map(|cell| shown_in_line(cell).into_owned())).collect();
    let wide = |at: usize| {
        let cells = rows.iter().map(|row| row[at].chars().count());
        cells.chain([head[at].len()]).max().unwrap_or_default()
    };
    let widths: [usize; N] = std::array::from_fn(wide);
    let line = |cells: [&str; N]| {
        let mut line = String::new();
        for (cell, wide) in cells[..N - 1].iter().zip(widths) {
            line += &format!("{cell:wide$}  ");
        }
        let rest = width.map_or(usize::MAX, |it| it.saturating_sub(line.chars().count()).max(LEAST));
        let last = cells[N - 1];
        if last.chars().count() > rest {
            line.extend(last.chars().take(rest - 1));
            line.push('…');
        } else {
            line += last;
        }
        line.trim_end().to_owned() + "\n"
    };
    let mut text = line(head);
    for row in &rows {
        text += &line(std::array::from_fn(|at| &*row[at]));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_part_of_its_line() {
        let text = table(["NAME", "WHY"], &[["web".into(), "x\ndb  running\x1b[A\u{202e}".into()]], None);
        assert_eq!(text, "NAME  WHY\nweb   x db  running?[A?\n");
    }

    #[test]
    fn the_last_column_gives_way() {
        let rows = [
            ["web".into(), "running".into(), "because ".repeat(9)],
            ["longer".into(), "ä".into(), String::new()],
        ];
        let text = table(["NAME", "STATE", "WHY"], &rows, Some(40));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "NAME    STATE    WHY");
        assert_eq!(lines[2], "longer  ä");
        assert!(lines[1].chars().count() == 40 && lines[1].ends_with('…'), "{text}");
        assert!(!table(["NAME", "STATE", "WHY"], &rows, None).contains('…'));
    }
}
