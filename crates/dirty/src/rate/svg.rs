//! The picture of a heat map.

use std::fmt::Write;

use super::{COLUMNS, HeatMap};
use crate::layout::PAGE_SIZE;

const CELL: usize = 10;
const LEFT: usize = 90;
const TOP: usize = 44;

pub(super) fn draw(map: &HeatMap, title: &str) -> String {
    let rows = map.cells.len().div_ceil(COLUMNS);
    let (width, height) = (LEFT + COLUMNS * CELL + 16, TOP + rows * CELL + 30);
    let most = map.cells.iter().copied().fold(0.0, f64::max);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"#fcfcfb\"/>\n\
         <text x=\"{LEFT}\" y=\"18\" font-size=\"14\">{}</text>\n",
        escaped(title)
    );
    let cell = size(map.pages_per_cell * PAGE_SIZE);
    let row = size(map.pages_per_cell * PAGE_SIZE * COLUMNS as u64);
    // Writing to a String does not fail.
    _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"34\" fill=\"#52514e\">a square is {cell}, a row {row}; darkest: {most:.0} dirty pages \
         a second</text>"
    );
    let (grid_width, grid_height) = (COLUMNS * CELL - 1, rows * CELL - 1);
    _ = writeln!(
        svg,
        "<rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{grid_width}\" height=\"{grid_height}\" fill=\"#e9e8e2\"/>"
    );
    for (index, line) in map.cells.chunks(COLUMNS).enumerate() {
        let y = TOP + index * CELL;
        if index % 4 == 0 {
            let address = map.pages_per_cell * PAGE_SIZE * (index * COLUMNS) as u64;
            _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#52514e\">{address:#x}</text>",
                LEFT - 6,
                y + CELL - 1
            );
        }
        for (column, &pages) in line.iter().enumerate().filter(|(_, pages)| **pages > 0.0) {
            _ = writeln!(
                svg,
                "<rect x=\"{}\" y=\"{y}\" width=\"{1}\" height=\"{1}\" fill=\"{2}\"/>",
                LEFT + column * CELL,
                CELL - 1,
                colour(pages, most)
            );
        }
    }
    svg + "</svg>\n"
}

/// From light to dark blue, by the logarithm: a part that is written a hundredth as much is
/// seen.
fn colour(pages: f64, most: f64) -> String {
    let heat = (1.0 + (pages / most).ln() / 1000f64.ln()).clamp(0.0, 1.0);
    let between = |light: f64, dark: f64| (light + (dark - light) * heat).round() as u8;
    format!("#{:02x}{:02x}{:02x}", between(198.0, 13.0), between(219.0, 40.0), between(247.0, 90.0))
}

fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{} KiB", bytes >> 10),
        0x10_0000..0x4000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
