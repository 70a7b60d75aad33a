//! Today's rows beside those that the tree has as the last ones: a regression is seen, and fails nothing, because a
//! busy machine is none.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{fs, io};

use super::rows::{self, Row};

/// A change of the ratio to the peer that is worth a mark. Shared cores make less than this by themselves.
const MARKED: f64 = 1.2;

/// Where the last rows of a bench are. Those of a quick run have other cases and rounds.
pub(super) fn place(root: &Path, bench: &str, quick: bool) -> PathBuf {
    root.join("docs/bench").join(format!("{bench}{}.jsonl", if quick { "-quick" } else { "" }))
}

/// The table; a line for each case that both runs have.
pub(super) fn beside(file: &Path, today: &[Row]) -> String {
    let last = match fs::read_to_string(file) {
        Ok(text) => rows::parse(&text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return format!("no last figures in {}: --keep makes these the last ones\n", file.display());
        }
        Err(error) => return format!("cannot read {}: {error}\n", file.display()),
    };
    match last {
        Ok(last) => table(today, &last),
        Err(error) => format!("{}: {error}\n", file.display()),
    }
}

fn table(today: &[Row], last: &[Row]) -> String {
    let known: BTreeMap<String, &Row> = last.iter().map(|row| (title(row), row)).collect();
    let mut text = format!("{:<64} {:>12} {:>12}  to the peer, today and last\n", "", "today", "last");
    for row in today {
        let title = title(row);
        let Some(last) = known.get(&title) else { continue };
        // A value is better the smaller it is beside its peer.
        let worse = last.ratio() / row.ratio();
        let mark = match worse {
            _ if worse > MARKED => "  WORSE",
            _ if worse < 1.0 / MARKED => "  better",
            _ => "",
        };
        let value = |row: &Row| format!("{:.4} {}", row.value, row.unit);
        let (now, then) = (value(row), value(last));
        // PANIC: writing to a String cannot fail.
        writeln!(text, "{title:<64} {now:>12} {then:>12}  {:.2}x {:.2}x{mark}", row.ratio(), last.ratio())
            .unwrap();
    }
    text
}

fn title(row: &Row) -> String {
    let case = row.case.iter().map(|(key, value)| format!("{key}={}", value.to_string().trim_matches('"')));
    format!("{} {}", row.bench, case.collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(dirty: u64, value: f64) -> Row {
        let text = format!(
            r#"{{"bench":"dirty.harvest","case":{{"backend":"ring","dirty":{dirty}}},"value":{value},"unit":"us","peer":"bitmap","peer_value":100}}"#
        );
        rows::parse(&text).unwrap().remove(0)
    }

    #[test]
    fn what_has_become_worse_beside_its_peer_is_marked() {
        let text =
            table(&[row(300, 50.0), row(1000, 10.0), row(3000, 10.0)], &[row(300, 25.0), row(1000, 20.0)]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[1].starts_with("dirty.harvest backend=ring dirty=300 "), "{text}");
        assert!(
            lines[1].ends_with("2.00x 4.00x  WORSE") && lines[2].ends_with("10.00x 5.00x  better"),
            "{text}"
        );
        assert_eq!(
            table(&[row(1, 10.0)], &[row(1, 11.0)]).lines().last().unwrap().split("  ").last(),
            Some("10.00x 9.09x")
        );
    }

    #[test]
    fn a_tree_without_last_figures_says_how_to_make_them() {
        let text = beside(&place(Path::new("/nowhere"), "dirty", true), &[row(1, 1.0)]);
        assert!(text.contains("/nowhere/docs/bench/dirty-quick.jsonl") && text.contains("--keep"), "{text}");
    }
}
