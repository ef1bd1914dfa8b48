//! The bar chart: how close to a device copy each implementation comes.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::problems;
use crate::report::{Place, Row};

const WIDTH: i32 = 900;
const HEIGHT: i32 = 400;
/// Room for the numbers on the left, the legend above, the shapes below.
const LEFT: i32 = 44;
const RIGHT: i32 = 12;
const TOP: i32 = 66;
const BOTTOM: i32 = 44;
/// Between groups of bars.
const GAP: i32 = 14;
/// Most groups that have room for their labels.
const GROUPS: usize = 10;

/// Ours in blues, the rest in warm colours and grey.
const COLOURS: [(&str, RGBColor); 7] = [
    ("tiled_2d", RGBColor(23, 78, 166)),
    ("warp_per_block", RGBColor(76, 141, 228)),
    ("pipelined", RGBColor(158, 197, 247)),
    ("unfused", RGBColor(154, 160, 166)),
    ("bitsandbytes", RGBColor(217, 95, 14)),
    ("two_launch", RGBColor(244, 165, 96)),
    ("triton", RGBColor(120, 160, 70)),
];
/// Of variants without one of their own.
const OTHER: RGBColor = RGBColor(94, 53, 177);

fn colour(variant: &str) -> RGBColor {
    let known = COLOURS.iter().find(|(name, _)| *name == variant);
    known.map_or(OTHER, |(_, colour)| *colour)
}

fn label(variant: &str) -> String {
    match variant {
        "two_launch" => "Unsloth's launches".into(),
        "triton" => "Triton".into(),
        name => name.into(),
    }
}

/// The bars of one shape and dtype.
struct Group<'a> {
    rows: Vec<&'a Row>,
}

/// Draws the cold dequantization rows of one device, if there are any.
///
/// # Errors
/// If the file cannot be written.
pub fn draw(place: &Place, rows: &[Row], path: &Path) -> Result<(), Box<dyn Error>> {
    // The default is one of the variants: it needs no bar of its own.
    let rows: Vec<&Row> = rows
        .iter()
        .filter(|row| row.place == *place && row.kind == "dequantize" && !row.hot)
        .filter(|row| row.quant_type == "nf4")
        .filter(|row| row.variant != "default" && problems::is_charted(row.shape, row.dtype))
        .collect();
    let mut groups: Vec<Group> = Vec::new();
    let mut variants: Vec<&str> = Vec::new();
    for row in rows {
        if !variants.contains(&row.variant.as_str()) {
            variants.push(&row.variant);
        }
        let group = groups.iter_mut().find(|group| {
            let first = group.rows[0];
            (first.shape, first.dtype) == (row.shape, row.dtype)
        });
        match group {
            Some(group) => group.rows.push(row),
            None => groups.push(Group { rows: vec![row] }),
        }
    }
    groups.truncate(GROUPS);
    if groups.is_empty() {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let area = SVGBackend::new(path, (WIDTH as u32, HEIGHT as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let most = groups
        .iter()
        .flat_map(|group| group.rows.iter().map(|row| row.percent_of_copy))
        .fold(100.0f64, f64::max);
    let scale = Scale {
        // Room for the number above the highest bar.
        top_percent: most + 7.0,
    };
    draw_frame(&area, place, &scale)?;
    draw_legend(&area, &variants)?;
    draw_groups(&area, &groups, &variants, &scale)?;
    area.present()?;
    println!("\nchart: {}", path.display());
    Ok(())
}

pub type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
pub type Drawn = Result<(), Box<dyn Error>>;

/// Percent to pixels.
struct Scale {
    top_percent: f64,
}

impl Scale {
    fn y(&self, percent: f64) -> i32 {
        let height = f64::from(HEIGHT - TOP - BOTTOM);
        HEIGHT - BOTTOM - (percent / self.top_percent * height).round() as i32
    }
}

pub fn text(
    area: &Area,
    content: &str,
    at: (i32, i32),
    size: i32,
    h: HPos,
    colour: RGBColor,
) -> Drawn {
    let style = ("sans-serif", size)
        .into_font()
        .color(&colour)
        .pos(Pos::new(h, VPos::Center));
    area.draw(&Text::new(content.to_string(), at, style))?;
    Ok(())
}

fn draw_frame(area: &Area, place: &Place, scale: &Scale) -> Drawn {
    let title = format!(
        "NF4 dequantization, bandwidth in % of a device copy ({}, {})",
        place.device, place.backend
    );
    text(area, &title, (LEFT, 16), 16, HPos::Left, BLACK)?;
    let mut percent = 0.0;
    while percent <= scale.top_percent {
        let y = scale.y(percent);
        let is_copy = percent == 100.0;
        let line = if is_copy {
            RGBColor(60, 60, 60)
        } else {
            RGBColor(222, 222, 222)
        };
        let ends = vec![(LEFT, y), (WIDTH - RIGHT, y)];
        area.draw(&PathElement::new(ends, line.stroke_width(1)))?;
        let number = format!("{percent:.0}");
        text(
            area,
            &number,
            (LEFT - 8, y),
            12,
            HPos::Right,
            RGBColor(60, 60, 60),
        )?;
        percent += 20.0;
    }
    Ok(())
}

fn draw_legend(area: &Area, variants: &[&str]) -> Drawn {
    let mut x = LEFT;
    for variant in variants {
        area.draw(&Rectangle::new(
            [(x, 36), (x + 12, 48)],
            colour(variant).filled(),
        ))?;
        let name = label(variant);
        text(area, &name, (x + 17, 42), 13, HPos::Left, BLACK)?;
        x += 17 + name.len() as i32 * 7 + 20;
    }
    Ok(())
}

fn draw_groups(area: &Area, groups: &[Group], variants: &[&str], scale: &Scale) -> Drawn {
    let pitch = (WIDTH - LEFT - RIGHT) / groups.len() as i32;
    let bar = ((pitch - GAP) / variants.len() as i32).clamp(2, 40);
    for (i, group) in groups.iter().enumerate() {
        let centre = LEFT + pitch * i as i32 + pitch / 2;
        let mut x = centre - bar * group.rows.len() as i32 / 2;
        let bars = variants
            .iter()
            .filter_map(|variant| group.rows.iter().find(|row| row.variant == *variant));
        let mut best: Option<(&Row, i32)> = None;
        for row in bars {
            let corners = [
                (x, scale.y(row.percent_of_copy)),
                (x + bar - 1, scale.y(0.0)),
            ];
            area.draw(&Rectangle::new(corners, colour(&row.variant).filled()))?;
            if best.is_none_or(|(best, _)| row.percent_of_copy > best.percent_of_copy) {
                best = Some((row, x + bar / 2));
            }
            x += bar;
        }
        if let Some((best, x)) = best {
            let y = scale.y(best.percent_of_copy) - 8;
            // The line of 100% may run behind it.
            let behind = [(x - 15, y - 6), (x + 15, y + 6)];
            area.draw(&Rectangle::new(behind, WHITE.filled()))?;
            let number = format!("{:.0}%", best.percent_of_copy);
            text(area, &number, (x, y), 12, HPos::Center, BLACK)?;
        }
        let [rows, columns] = group.rows[0].shape;
        let shape = format!("{rows}x{columns}");
        let size = if pitch < 80 { 11 } else { 12 };
        text(
            area,
            &shape,
            (centre, HEIGHT - BOTTOM + 13),
            size,
            HPos::Center,
            BLACK,
        )?;
        let dtype = group.rows[0].dtype;
        let grey = RGBColor(90, 90, 90);
        text(
            area,
            dtype,
            (centre, HEIGHT - BOTTOM + 29),
            size,
            HPos::Center,
            grey,
        )?;
    }
    Ok(())
}
