//! Charts as SVG that is readable on light and dark pages: it carries its own background, and its colours
//! change with the reader's.

use std::fmt::{Display, Write};

use plotters::coord::Shift;
use plotters::coord::combinators::{BindKeyPoints, IntoLogRange};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// A colour on a light page, and the one that takes its place on a dark page.
pub(crate) type Ink = (RGBColor, RGBColor);

const SURFACE: Ink = (RGBColor(0xfc, 0xfc, 0xfb), RGBColor(0x1a, 0x1a, 0x19));
const TEXT: Ink = (RGBColor(0x0b, 0x0b, 0x0b), RGBColor(0xff, 0xff, 0xff));
const SOFT: Ink = (RGBColor(0x52, 0x51, 0x4e), RGBColor(0xc3, 0xc2, 0xb7));
const GRID: Ink = (RGBColor(0xe1, 0xe0, 0xd9), RGBColor(0x2c, 0x2c, 0x2a));

pub(crate) const GREY: Ink = (RGBColor(0x74, 0x72, 0x6d), RGBColor(0x9c, 0x9a, 0x93));
pub(crate) const BLUE: Ink = (RGBColor(0x2a, 0x78, 0xd6), RGBColor(0x39, 0x87, 0xe5));
pub(crate) const GREEN: Ink = (RGBColor(0x16, 0x8f, 0x64), RGBColor(0x19, 0x9e, 0x70));
pub(crate) const ORANGE: Ink = (RGBColor(0xd9, 0x54, 0x20), RGBColor(0xd9, 0x59, 0x26));
/// From few to many.
pub(crate) const BLUES: [Ink; 4] = [
    (RGBColor(0x86, 0xb6, 0xef), RGBColor(0xb7, 0xd3, 0xf6)),
    (RGBColor(0x3a, 0x88, 0xe6), RGBColor(0x6d, 0xa7, 0xec)),
    (RGBColor(0x1c, 0x5c, 0xab), RGBColor(0x3b, 0x89, 0xe7)),
    (RGBColor(0x0d, 0x36, 0x6b), RGBColor(0x1d, 0x5e, 0xad)),
];

const FONT: &str = "sans-serif";
const WIDTH: u32 = 800;
const HEIGHT: u32 = 460;
/// Pixels between the lines of two labels.
const LINE_HEIGHT: i32 = 15;

/// A line through points, named where it ends.
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) ink: Ink,
    pub(crate) dashed: bool,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Titles of a chart and of its axes, with units.
pub(crate) struct Titles<'a> {
    pub(crate) chart: &'a str,
    pub(crate) under: &'a str,
    pub(crate) x: &'a str,
    pub(crate) y: &'a str,
}

/// Bars in groups: a group for each name, in it a bar for each series.
pub(crate) struct Bars {
    pub(crate) groups: Vec<String>,
    /// Name, colour, a value for each group that has one.
    pub(crate) series: Vec<(String, Ink, Vec<Option<f64>>)>,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Lines over two logarithmic axes.
pub(crate) fn lines(titles: &Titles<'_>, lines: &[Line], x_name: impl Fn(f64) -> String) -> String {
    svg(titles, |area| {
        let points = || lines.iter().flat_map(|line| &line.points);
        let mut xs: Vec<f64> = points().map(|point| point.0).collect();
        xs.sort_by(f64::total_cmp);
        xs.dedup();
        let (first, last) = (xs[0], xs[xs.len() - 1]);
        let (low, high) =
            points().fold((f64::MAX, f64::MIN), |(low, high), point| (low.min(point.1), high.max(point.1)));
        let (low, high) = (10f64.powf(low.log10().floor()), 10f64.powf(high.log10().ceil()));
        // Room for the names of the lines that end at the right edge.
        let x = (first / 1.25..last * 5.0).log_scale().with_key_points(xs);
        let y = (low..high).log_scale();
        let mut chart = ChartBuilder::on(area)
            .margin_top(64)
            .margin_right(16)
            .margin_left(8)
            .margin_bottom(8)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .x_desc(titles.x)
            .y_desc(titles.y)
            .x_label_formatter(&|x| x_name(*x))
            .y_label_formatter(&|y| number(*y))
            .disable_x_mesh()
            .axis_desc_style((FONT, 13, &TEXT.0))
            .label_style((FONT, 12, &SOFT.0))
            .axis_style(SOFT.0)
            .bold_line_style(GRID.0)
            .light_line_style(SURFACE.0)
            .draw()?;
        let mut labels = Vec::new();
        for line in lines {
            let style = line.ink.0.stroke_width(2);
            let points = || line.points.iter().copied();
            if line.dashed {
                chart.draw_series(DashedLineSeries::new(points(), 6, 4, style))?;
            } else {
                chart.draw_series(LineSeries::new(points(), style))?;
            }
            chart.draw_series(points().map(|point| Circle::new(point, 3, line.ink.0.filled())))?;
            let end = line.points[line.points.len() - 1];
            labels.push((chart.backend_coord(&end), line));
        }
        draw_labels(area, labels)
    })
}

/// Names beside the ends of lines, moved apart where they would overlap.
fn draw_labels(area: &Area<'_>, mut labels: Vec<((i32, i32), &Line)>) -> Drawn {
    labels.sort_by_key(|&((x, y), _)| (x, y));
    let mut above: Option<(i32, i32)> = None;
    for ((x, y), line) in labels {
        let y = match above {
            Some((beside, above)) if beside == x => y.max(above + LINE_HEIGHT),
            _ => y,
        };
        above = Some((x, y));
        write_at(area, &line.name, (x + 9, y), 13, &line.ink, Pos::new(HPos::Left, VPos::Center))?;
    }
    Ok(())
}

/// Bars from 0 up.
pub(crate) fn bars(titles: &Titles<'_>, bars: &Bars) -> String {
    svg(titles, |area| {
        let values = bars.series.iter().flat_map(|series| series.2.iter().flatten());
        let high = values.fold(1.0, |high: f64, value| high.max(*value)) * 1.12;
        let (groups, count) = (bars.groups.len() as f64, bars.series.len() as f64);
        let mut chart = ChartBuilder::on(area)
            .margin_top(84)
            .margin_right(16)
            .margin_left(8)
            .margin_bottom(8)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..groups, 0.0..high)?;
        chart
            .configure_mesh()
            .x_desc(titles.x)
            .y_desc(titles.y)
            .x_labels(0)
            .y_label_formatter(&|y| format!("{}x", number(*y)))
            .disable_x_mesh()
            .axis_desc_style((FONT, 13, &TEXT.0))
            .label_style((FONT, 12, &SOFT.0))
            .axis_style(SOFT.0)
            .bold_line_style(GRID.0)
            .light_line_style(SURFACE.0)
            .draw()?;
        for (group, name) in bars.groups.iter().enumerate() {
            let (x, y) = chart.backend_coord(&(group as f64 + 0.5, 0.0));
            write_at(area, name, (x, y + 8), 12, &SOFT, Pos::new(HPos::Center, VPos::Top))?;
        }
        let width = 0.84 / count;
        for (index, (name, ink, values)) in bars.series.iter().enumerate() {
            for (group, value) in values.iter().enumerate() {
                let Some(value) = *value else { continue };
                let left = group as f64 + 0.08 + index as f64 * width;
                // A gap of the background keeps bars apart.
                let bar = Rectangle::new([(left, 0.0), (left + width * 0.94, value)], ink.0.filled());
                chart.draw_series(std::iter::once(bar))?;
                let (x, y) = chart.backend_coord(&(left + width * 0.47, value));
                let above = Pos::new(HPos::Center, VPos::Bottom);
                write_at(area, &format!("{value:.1}"), (x, y - 3), 11, &SOFT, above)?;
            }
            let x = 72 + index as i32 * 130;
            area.draw(&Rectangle::new([(x, 63), (x + 11, 74)], ink.0.filled()))?;
            write_at(area, name, (x + 17, 69), 13, &TEXT, Pos::new(HPos::Left, VPos::Center))?;
        }
        Ok(())
    })
}

fn write_at(area: &Area<'_>, text: &str, at: (i32, i32), size: u32, ink: &Ink, pos: Pos) -> Drawn {
    let style = (FONT, size, &ink.0).into_text_style(area).pos(pos);
    area.draw(&Text::new(text.to_string(), at, style))?;
    Ok(())
}

fn svg(titles: &Titles<'_>, draw: impl FnOnce(&Area<'_>) -> Drawn) -> String {
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, (WIDTH, HEIGHT)).into_drawing_area();
    page(&area, titles, draw).expect("a drawing in memory, which nothing can refuse");
    drop(area);
    with_dark_colours(&text)
}

fn page(area: &Area<'_>, titles: &Titles<'_>, draw: impl FnOnce(&Area<'_>) -> Drawn) -> Drawn {
    area.fill(&SURFACE.0)?;
    write_at(area, titles.chart, (16, 14), 17, &TEXT, Pos::default())?;
    write_at(area, titles.under, (16, 38), 13, &SOFT, Pos::default())?;
    draw(area)?;
    Ok(area.present()?)
}

/// Rules of style go before attributes, so they can give each colour its other one.
fn with_dark_colours(svg: &str) -> String {
    let inks = [SURFACE, TEXT, SOFT, GRID, GREY, BLUE, GREEN, ORANGE];
    let mut style = String::from("<style>@media (prefers-color-scheme: dark) {\n");
    for (light, dark) in inks.into_iter().chain(BLUES) {
        let (light, dark) = (Hex(light), Hex(dark));
        writeln!(style, "[fill=\"{light}\"] {{ fill: {dark} }} [stroke=\"{light}\"] {{ stroke: {dark} }}")
            .expect("a string");
    }
    style.push_str("}</style>\n");
    let head = svg.find('>').map_or(0, |end| end + 1);
    format!("{}\n{style}{}", &svg[..head], svg[head..].trim_start())
}

/// As the plot writes it.
struct Hex(RGBColor);

impl Display for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let RGBColor(red, green, blue) = self.0;
        write!(f, "#{red:02X}{green:02X}{blue:02X}")
    }
}

/// As few digits as needed.
fn number(value: f64) -> String {
    match value {
        value if value >= 10.0 || value.fract().abs() < 1e-9 => format!("{value:.0}"),
        value if value >= 1.0 => format!("{value:.1}"),
        value => format!("{}", (value * 100.0).round() / 100.0),
    }
}
