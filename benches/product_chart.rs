//! The chart of the matrix products: time against rows of `x`, a panel a shape.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use crate::chart::{Area, Drawn, text};
use crate::matmul::{AUTO, BURN_DENSE, DTYPE, Timed};
use crate::report::Place;

const WIDTH: i32 = 960;
const HEIGHT: i32 = 400;
/// Room for the title and the legend above, the rows of `x` below.
const TOP: i32 = 84;
const BOTTOM: i32 = 44;
/// Room for the numbers on the left of a panel, and on its right.
const LEFT: i32 = 40;
const RIGHT: i32 = 12;
/// From the middle of a number of rows to that of the next that is written.
const LABEL: i32 = 28;

/// Variant, label and colour of each line.
const LINES: [(&str, &str, RGBColor); 4] = [
    (AUTO, "burn-nf4", RGBColor(23, 78, 166)),
    ("bitsandbytes", "bitsandbytes", RGBColor(217, 95, 14)),
    ("cublas", "cuBLAS, dense bf16", RGBColor(120, 160, 70)),
    (BURN_DENSE, "Burn, dense bf16", RGBColor(154, 160, 166)),
];

const GREY: RGBColor = RGBColor(90, 90, 90);
const PALE: RGBColor = RGBColor(222, 222, 222);

/// A panel: pixels of its axes, both logarithmic.
struct Panel {
    left: i32,
    width: i32,
    rows: (f64, f64),
    micros: (f64, f64),
}

impl Panel {
    fn x(&self, m: usize) -> i32 {
        let part = position(m as f64, self.rows);
        self.left + (f64::from(self.width) * part).round() as i32
    }

    fn y(&self, micros: f64) -> i32 {
        let height = f64::from(HEIGHT - TOP - BOTTOM);
        HEIGHT - BOTTOM - (height * position(micros, self.micros)).round() as i32
    }
}

/// Where a value lies between two others on a logarithmic axis, from 0 to 1.
fn position(value: f64, (least, most): (f64, f64)) -> f64 {
    (value / least).ln() / (most / least).ln()
}

/// Draws what was timed, if it was for more than one number of rows.
///
/// # Errors
/// If the file cannot be written.
pub fn draw(place: &Place, all: &[Timed], path: &Path) -> Result<(), Box<dyn Error>> {
    let drawn: Vec<&Timed> = all
        .iter()
        .filter(|timed| timed.dtype == DTYPE && LINES.iter().any(|line| line.0 == timed.variant))
        .collect();
    let mut shapes: Vec<[usize; 2]> = drawn.iter().map(|timed| timed.shape).collect();
    shapes.sort_unstable_by(|a, b| b.cmp(a));
    shapes.dedup();
    let range = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::MAX, 0f64), |(a, b), v| (a.min(v), b.max(v)))
    };
    let rows = range(&mut drawn.iter().map(|timed| timed.m as f64));
    if rows.1 <= rows.0 {
        return Ok(());
    }
    let micros = range(&mut drawn.iter().map(|timed| timed.timing.median_us));
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let area = SVGBackend::new(path, (WIDTH as u32, HEIGHT as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let title = format!(
        "Matrix product with an NF4 weight, bf16, microseconds against rows of x ({}, {})",
        place.device, place.backend
    );
    text(&area, &title, (LEFT, 16), 16, HPos::Left, BLACK)?;
    draw_legend(&area, &drawn)?;
    let pitch = WIDTH / shapes.len() as i32;
    for (i, &shape) in shapes.iter().enumerate() {
        let panel = Panel {
            left: pitch * i as i32 + LEFT,
            width: pitch - LEFT - RIGHT,
            rows,
            // Room below the lowest point and above the highest.
            micros: (micros.0 / 1.3, micros.1 * 1.3),
        };
        let here: Vec<&Timed> = drawn.iter().filter(|t| t.shape == shape).copied().collect();
        draw_panel(&area, &panel, shape, &here)?;
    }
    area.present()?;
    println!("\nchart: {}", path.display());
    Ok(())
}

fn draw_legend(area: &Area, drawn: &[&Timed]) -> Drawn {
    let mut x = LEFT;
    for (variant, label, colour) in LINES {
        if drawn.iter().any(|timed| timed.variant == variant) {
            let ends = vec![(x, 42), (x + 18, 42)];
            area.draw(&PathElement::new(ends, colour.stroke_width(3)))?;
            text(area, label, (x + 24, 42), 13, HPos::Left, BLACK)?;
            x += 24 + label.len() as i32 * 7 + 20;
        }
    }
    Ok(())
}

fn draw_panel(area: &Area, panel: &Panel, [n, k]: [usize; 2], here: &[&Timed]) -> Drawn {
    let middle = panel.left + panel.width / 2;
    text(
        area,
        &format!("{n}x{k}"),
        (middle, TOP - 14),
        14,
        HPos::Center,
        BLACK,
    )?;
    for decade in [1.0, 10.0, 100.0, 1000.0, 10000.0, 1e5] {
        for step in [1.0, 2.0, 5.0] {
            let micros: f64 = decade * step;
            if micros < panel.micros.0 || micros > panel.micros.1 {
                continue;
            }
            let y = panel.y(micros);
            let ends = vec![(panel.left, y), (panel.left + panel.width, y)];
            area.draw(&PathElement::new(ends, PALE.stroke_width(1)))?;
            let number = format!("{micros:.0}");
            text(area, &number, (panel.left - 6, y), 12, HPos::Right, GREY)?;
        }
    }
    let mut rows: Vec<usize> = here.iter().map(|timed| timed.m).collect();
    rows.sort_unstable();
    let mut free = 0;
    for m in rows {
        let at = panel.x(m);
        if m.is_power_of_two() && at >= free {
            let place = (at, HEIGHT - BOTTOM + 14);
            text(area, &m.to_string(), place, 12, HPos::Center, GREY)?;
            free = at + LABEL;
        }
    }
    for (variant, _, colour) in LINES.iter().rev() {
        let mut line: Vec<&Timed> = here.to_vec();
        line.retain(|timed| timed.variant == *variant);
        line.sort_unstable_by_key(|timed| timed.m);
        let points: Vec<(i32, i32)> = line
            .iter()
            .map(|timed| (panel.x(timed.m), panel.y(timed.timing.median_us)))
            .collect();
        for &point in &points {
            area.draw(&Circle::new(point, 3, colour.filled()))?;
        }
        area.draw(&PathElement::new(points, colour.stroke_width(2)))?;
    }
    Ok(())
}
