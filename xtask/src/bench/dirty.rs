//! The plots of `cargo xtask bench dirty`.

use super::plot::{self, BLUE, BLUES, Bars, GREEN, GREY, Ink, Line, ORANGE, Titles};
use super::rows::Row;

/// The number of pages that the goals are about.
const PAGES: u64 = 300;
const HOT: [u64; 4] = [0, 50, 90, 100];

pub(crate) fn plots(rows: &[Row]) -> Vec<(&'static str, String)> {
    let mut plots = Vec::new();
    plots.extend(harvest(rows).map(|text| ("dirty-harvest.svg", text)));
    plots.extend(epoch(rows).map(|text| ("dirty-epoch.svg", text)));
    plots
}

fn scattered<'r>(rows: &'r [Row], bench: &'r str) -> impl Iterator<Item = &'r Row> {
    rows.iter().filter(move |row| row.bench == bench && row.word("pattern") == Some("scattered"))
}

/// Points by the size of the VM, each size once, in order.
fn by_size<'r>(rows: impl Iterator<Item = &'r Row>, value: impl Fn(&Row) -> f64) -> Vec<(f64, f64)> {
    let mut points: Vec<(f64, f64)> =
        rows.filter_map(|row| Some((row.number("vm_gib")? as f64, value(row)))).collect();
    points.sort_by(|one, other| one.0.total_cmp(&other.0));
    points.dedup_by_key(|point| point.0);
    points
}

/// Microseconds by the size of the VM, a line for each back end.
fn harvest(rows: &[Row]) -> Option<String> {
    let rows = || scattered(rows, "dirty.harvest").filter(|row| row.number("dirty") == Some(PAGES));
    let of = |backend: &'static str, hot: u64| {
        by_size(
            rows().filter(|row| row.word("backend") == Some(backend) && row.number("hot") == Some(hot)),
            |row| row.value,
        )
    };
    let others = by_size(rows().filter(|row| row.peer == "bitmap" && row.number("hot") == Some(0)), |row| {
        row.peer_value
    });
    let mut lines = vec![line("bitmap of other VMMs", GREY, true, others)];
    for (backend, ink) in [("bitmap", ORANGE), ("clear-log", GREEN), ("ring", BLUE)] {
        for hot in HOT {
            let name = if hot == 0 { backend.to_string() } else { format!("{backend}, {hot} % hot") };
            lines.push(line(&name, ink, false, of(backend, hot)));
        }
    }
    lines.retain(|line| !line.points.is_empty());
    let titles = Titles {
        chart: "Harvest + rearm",
        under: "300 dirty pages, scattered over all of memory; medians, lower is better",
        x: "memory of the VM (logarithmic)",
        y: "time per epoch, µs (logarithmic)",
    };
    let size = |gib: f64| if gib >= 1024.0 { format!("{} TiB", gib / 1024.0) } else { format!("{gib} GiB") };
    (!lines.is_empty()).then(|| plot::lines(&titles, &lines, size))
}

fn line(name: &str, ink: Ink, dashed: bool, points: Vec<(f64, f64)>) -> Line {
    Line { name: name.to_string(), ink, dashed, points }
}

/// How many times faster than on the bitmap, by the share of hot pages.
fn epoch(rows: &[Row]) -> Option<String> {
    let rows = || scattered(rows, "dirty.epoch").filter(|row| row.word("backend") == Some("ring"));
    let mut numbers: Vec<u64> = rows().filter_map(|row| row.number("dirty")).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let gib = rows().find_map(|row| row.number("vm_gib"))?;
    let speed_up = |dirty: u64, hot: u64| {
        rows()
            .find(|row| row.number("dirty") == Some(dirty) && row.number("hot") == Some(hot))
            .map(Row::ratio)
    };
    let series = numbers.iter().zip(BLUES).map(|(&dirty, ink)| {
        (format!("{dirty} pages"), ink, HOT.iter().map(|&hot| speed_up(dirty, hot)).collect())
    });
    let bars = Bars { groups: HOT.iter().map(|hot| format!("{hot} %")).collect(), series: series.collect() };
    let under = format!(
        "Ring, {gib} GiB: guest run, vCPU state, harvest, rearm, copy of all pages; higher is better"
    );
    let titles = Titles {
        chart: "Whole epochs against the bitmap of other VMMs",
        under: &under,
        x: "share of the dirty pages that are written in every epoch (hot)",
        y: "times faster than the bitmap",
    };
    Some(plot::bars(&titles, &bars))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::rows;

    fn row(bench: &str, backend: &str, gib: u64, dirty: u64, hot: u64, value: f64) -> String {
        format!(
            r#"{{"bench":"{bench}","case":{{"backend":"{backend}","vm_gib":{gib},"dirty":{dirty},"pattern":"scattered","hot":{hot}}},"value":{value},"unit":"us","peer":"bitmap","peer_value":165.5}}"#
        )
    }

    fn rows() -> Vec<Row> {
        let mut text = Vec::new();
        for gib in [16, 1, 8] {
            text.push(row("dirty.harvest", "bitmap", gib, 300, 0, 150.0));
            text.push(row("dirty.harvest", "ring", gib, 300, 0, 43.0));
            text.push(row("dirty.harvest", "ring", gib, 300, 90, 7.0));
            text.push(row("dirty.harvest", "clear-log", gib, 300, 90, 0.7));
        }
        text.push(row("dirty.harvest", "ring", 1024, 300, 0, 60.0));
        for dirty in [100, 300] {
            text.push(row("dirty.epoch", "ring", 8, dirty, 0, 160.0));
            text.push(row("dirty.epoch", "ring", 8, dirty, 90, 30.0));
        }
        rows::parse(&text.join("\n")).unwrap()
    }

    /// Checks that tags are closed in order and that text has no bare `<` or `&`, which browsers reject.
    fn assert_is_xml(text: &str) {
        let mut open: Vec<&str> = Vec::new();
        let mut rest = text;
        while let Some(start) = rest.find('<') {
            assert!(!rest[..start].contains('>'), "a stray > in {:?}", &rest[..start]);
            for entity in rest[..start].split('&').skip(1) {
                assert!(entity.find(';').is_some_and(|end| end < 6), "a bare & before {entity:?}");
            }
            let end = start + rest[start..].find('>').expect("a tag that ends");
            let tag = &rest[start + 1..end];
            assert_eq!(tag.matches('"').count() % 2, 0, "quotes of {tag:?}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name.trim()));
            } else if !tag.ends_with('/') && !tag.starts_with(['?', '!']) {
                open.push(tag.split_whitespace().next().unwrap());
            }
            rest = &rest[end + 1..];
        }
        assert!(open.is_empty(), "{open:?} are not closed");
    }

    #[test]
    fn the_plots_are_xml_and_have_every_series() {
        let plots = plots(&rows());
        let names: Vec<_> = plots.iter().map(|plot| plot.0).collect();
        assert_eq!(names, ["dirty-harvest.svg", "dirty-epoch.svg"]);
        let wanted: [&[&str]; 2] = [
            &[
                "bitmap of other VMMs",
                "bitmap",
                "ring",
                "ring, 90 % hot",
                "clear-log, 90 % hot",
                "1 TiB",
                "8 GiB",
                "time per epoch, µs (logarithmic)",
            ],
            &["100 pages", "300 pages", "0 %", "90 %", "times faster than the bitmap", "5.5"],
        ];
        for ((name, text), wanted) in plots.iter().zip(wanted) {
            assert_is_xml(text);
            assert!(text.contains("prefers-color-scheme: dark"), "{name}");
            for word in wanted {
                let found = text.lines().any(|line| line.trim() == *word);
                assert!(found || text.contains(&format!(">{word}<")), "{word:?} is not in {name}:\n{text}");
            }
        }
    }

    #[test]
    fn without_rows_there_are_no_plots() {
        assert!(plots(&[]).is_empty());
    }

    #[test]
    fn the_check_of_xml_bites() {
        for broken in ["<a><b></a></b>", "<a>", "<a x=\"1></a>", "<a>this & that</a>"] {
            assert!(std::panic::catch_unwind(|| assert_is_xml(broken)).is_err(), "{broken}");
        }
    }
}
