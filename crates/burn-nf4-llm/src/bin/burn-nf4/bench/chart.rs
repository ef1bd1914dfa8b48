//! The bar chart: how near to the speed of memory steps of decoding come.

use std::path::Path;

use burn_nf4_llm::ModelError;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::report::BenchReport;
use crate::svg::{self, Area, Drawn, GREY, OTHER, OURS, PALE, text};

const WIDTH: i32 = 960;
const HEIGHT: i32 = 400;
/// Room for the numbers on the left, title and legend above, and what was measured below.
const LEFT: i32 = 48;
const RIGHT: i32 = 12;
const TOP: i32 = 70;
const BOTTOM: i32 = 48;
/// Between groups of bars.
const GAP: i32 = 12;

/// A bar: percent of the memory's speed, and tokens a second.
struct Bar {
    percent: f64,
    tokens_s: f64,
    colour: RGBColor,
}

/// The bars of a batch and a context.
struct Group {
    batch: usize,
    context: usize,
    bars: Vec<Bar>,
}

/// Draws the rows of decoding.
///
/// # Errors
/// [`ModelError::Setting`] without such rows, [`ModelError::Io`] if the file cannot be written.
pub fn draw(report: &BenchReport, path: &Path) -> Result<(), ModelError> {
    let groups = groups(report);
    if groups.is_empty() {
        let expected = "left out, or decoding that is measured";
        return Err(ModelError::setting("--chart", path.display(), expected));
    }
    svg::write(path, (WIDTH, HEIGHT), |area| {
        draw_groups(report, &groups, area)
    })
}

fn groups(report: &BenchReport) -> Vec<Group> {
    let peers = report.peer.iter().flat_map(|peer| &peer.decode);
    let peers: Vec<_> = peers.collect();
    let rows = report.decode.iter();
    rows.map(|row| {
        let mut bars = vec![Bar {
            percent: 100.0 * row.share_of_floor,
            tokens_s: row.tokens_s,
            colour: OURS,
        }];
        let same = |peer: &&&_| {
            let peer: &super::report::PeerDecode = peer;
            (peer.batch, peer.context) == (row.batch, row.context)
        };
        bars.extend(peers.iter().find(same).map(|peer| Bar {
            percent: 100.0 * row.floor_ms / peer.step_ms,
            tokens_s: peer.tokens_s,
            colour: OTHER,
        }));
        Group {
            batch: row.batch,
            context: row.context,
            bars,
        }
    })
    .collect()
}

fn draw_groups(report: &BenchReport, groups: &[Group], area: &Area) -> Drawn {
    let bars = groups.iter().flat_map(|group| &group.bars);
    let most = bars.map(|bar| bar.percent).fold(50.0, f64::max) * 1.12;
    let y = |percent: f64| {
        let height = f64::from(HEIGHT - TOP - BOTTOM);
        HEIGHT - BOTTOM - (percent / most * height).round() as i32
    };
    let title = format!(
        "{}, {} on {}: steps of decoding, in % of the speed of a copy of memory; above, tokens/s",
        report.size, report.dtype, report.device_name
    );
    text(area, &title, (LEFT, 18), 15, HPos::Left, BLACK)?;
    let mut legend = vec![("burn-nf4", OURS)];
    if report.peer.is_some() {
        legend.push(("transformers + bitsandbytes", OTHER));
    }
    svg::legend(area, LEFT, 40, &legend)?;
    let mut percent = 0.0;
    while percent <= most {
        let line = vec![(LEFT, y(percent)), (WIDTH - RIGHT, y(percent))];
        area.draw(&PathElement::new(line, PALE.stroke_width(1)))?;
        let number = format!("{percent:.0}");
        text(area, &number, (LEFT - 8, y(percent)), 12, HPos::Right, GREY)?;
        percent += 10.0 * (most / 100.0).ceil();
    }
    let pitch = (WIDTH - LEFT - RIGHT) / groups.len() as i32;
    for (i, group) in groups.iter().enumerate() {
        let centre = LEFT + pitch * i as i32 + pitch / 2;
        let count = group.bars.len() as i32;
        let width = ((pitch - GAP) / count).clamp(2, 48);
        let mut x = centre - width * count / 2;
        for bar in &group.bars {
            let corners = [(x, y(bar.percent)), (x + width - 1, y(0.0))];
            area.draw(&Rectangle::new(corners, bar.colour.filled()))?;
            let rate = format!("{:.0}", bar.tokens_s);
            let at = (x + width / 2, y(bar.percent) - 8);
            text(area, &rate, at, 11, HPos::Center, BLACK)?;
            x += width;
        }
        let below = HEIGHT - BOTTOM;
        let rows = format!("batch {}", group.batch);
        text(area, &rows, (centre, below + 14), 12, HPos::Center, BLACK)?;
        let context = format!("at {}", group.context);
        text(area, &context, (centre, below + 30), 12, HPos::Center, GREY)?;
    }
    Ok(())
}
