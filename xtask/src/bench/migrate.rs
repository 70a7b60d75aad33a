//! The plots of `cargo xtask bench migrate`.

use super::plot::{self, BLUES, GREEN, GREY, Ink, Line, ORANGE, Titles};
use super::rows::Row;

/// For the bitmaps, from few pages to many: a colour each.
const OTHERS: [Ink; 3] = [GREY, ORANGE, GREEN];

pub(crate) fn plots(rows: &[Row]) -> Vec<(&'static str, String)> {
    let round =
        plot(rows, "migrate.round", "A round of pre-copy: find the dirty pages, catch their next write");
    let turn_on = plot(rows, "migrate.turn-on", "Dirty tracking turned on while the guest runs");
    let named = [("migrate-rounds.svg", round), ("migrate-turn-on.svg", turn_on)];
    named.into_iter().filter_map(|(name, svg)| Some((name, svg?))).collect()
}

/// Microseconds by the size of the VM: a line for each share of dirty pages and each way.
fn plot(rows: &[Row], bench: &str, title: &str) -> Option<String> {
    let rows = || rows.iter().filter(|row| row.bench == bench);
    let mut shares: Vec<u64> = rows().filter_map(|row| row.number("permille")).collect();
    shares.sort_unstable();
    shares.dedup();
    let first = rows().next()?;
    let (backend, touched) = (first.word("backend")?, first.number("touched")?);
    let mut lines = Vec::new();
    for (index, &share) in shares.iter().enumerate() {
        let of = |value: fn(&Row) -> f64| {
            let rows = rows().filter(|row| row.number("permille") == Some(share));
            let points = rows.filter_map(|row| Some((row.number("vm_gib")? as f64, value(row))));
            let mut points: Vec<(f64, f64)> = points.collect();
            points.sort_by(|one, other| one.0.total_cmp(&other.0));
            points
        };
        let percent = share as f64 / 10.0;
        let line = |way: &str, ink, dashed, points| Line {
            name: format!("{way}, {percent} %"),
            ink,
            dashed,
            points,
        };
        lines.push(line(backend, BLUES[index % BLUES.len()], false, of(|row| row.value)));
        lines.push(line("bitmaps", OTHERS[index % OTHERS.len()], true, of(|row| row.peer_value)));
    }
    let under = format!("{touched} touched pages, a share of them dirty in each round; lower is better");
    let titles = Titles {
        chart: title,
        under: &under,
        x: "address space of the VM, memory is sparse (logarithmic)",
        y: "time, µs (logarithmic)",
    };
    Some(plot::lines(&titles, &lines, |gib| format!("{gib} GiB")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::rows;

    #[test]
    fn a_line_for_each_share_and_way() {
        let row = |figure: &str, gib: u64, permille: u64, value: u64| {
            format!(
                r#"{{"bench":"migrate.{figure}","case":{{"backend":"ring","vm_gib":{gib},"permille":{permille},"touched":50000}},"value":{value},"unit":"us","peer":"get_dirty_log","peer_value":{}}}"#,
                value * 10
            )
        };
        let text: Vec<String> = [(64, 1), (1, 1), (1, 100), (64, 100)]
            .into_iter()
            .flat_map(|(gib, permille)| {
                ["round", "turn-on", "total"].map(|figure| row(figure, gib, permille, 40 + gib))
            })
            .collect();
        let plots = plots(&rows::parse(&text.join("\n")).unwrap());
        assert_eq!(
            plots.iter().map(|plot| plot.0).collect::<Vec<_>>(),
            ["migrate-rounds.svg", "migrate-turn-on.svg"]
        );
        for name in ["ring, 0.1 %", "ring, 10 %", "bitmaps, 0.1 %", "bitmaps, 10 %", "64 GiB"] {
            assert!(plots[0].1.contains(name), "{name}: {}", plots[0].1);
        }
        assert!(super::plots(&[]).is_empty());
    }
}
