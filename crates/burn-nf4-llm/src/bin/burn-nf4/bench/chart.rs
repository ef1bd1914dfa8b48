//! The bar chart: how near to the speed of memory steps of decoding come.

use std::path::Path;

use burn_nf4_llm::ModelError;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::report::BenchReport;
use crate::svg::{self, Area, Drawn, GREY, OTHER, OURS, PALE, Scale, text, text_width};

const HEIGHT: i32 = 420;
/// It is as wide as its bars and its title need, but no narrower.
const LEAST_WIDTH: i32 = 640;
/// Room for the numbers on the left, title and legend above, and what was measured below.
const LEFT: i32 = 48;
const RIGHT: i32 = 16;
const TOP: i32 = 90;
const BOTTOM: i32 = 48;
/// Between groups of bars.
const GAP: i32 = 16;
/// Of a bar that has few others beside it.
const MOST_BAR: i32 = 48;
const TITLE: &str =
    "Steps of decoding in % of the speed of a copy of memory; above the bars, tokens a second";
/// Sizes of text.
const TITLE_SIZE: i32 = 15;
const LABEL_SIZE: i32 = 12;
const RATE_SIZE: i32 = 11;

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
    let subtitle = format!(
        "{}, {} on {}",
        report.size, report.dtype, report.device_name
    );
    draw_groups(subtitle, report.peer.is_some(), &groups, path)
}

fn draw_groups(
    subtitle: String,
    with_peer: bool,
    groups: &[Group],
    path: &Path,
) -> Result<(), ModelError> {
    let layout = Layout::new(subtitle, with_peer, groups);
    svg::draw(path, [layout.width, HEIGHT], |area| {
        layout.head(area)?;
        layout.scale(area)?;
        for (i, group) in groups.iter().enumerate() {
            layout.group(area, group, i as i32)?;
        }
        Ok(())
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

impl Bar {
    fn rate(&self) -> String {
        match self.tokens_s {
            rate if rate < 10.0 => format!("{rate:.1}"),
            rate => format!("{rate:.0}"),
        }
    }
}

impl Group {
    /// What stands below it.
    fn labels(&self) -> [String; 2] {
        [
            format!("batch {}", self.batch),
            format!("context {}", self.context),
        ]
    }
}

/// What is measured, and where all of it goes.
struct Layout {
    subtitle: String,
    legend: Vec<(&'static str, RGBColor)>,
    scale: Scale,
    width: i32,
    /// From the middle of a group to that of the next.
    pitch: i32,
    /// The width of a bar.
    bar: i32,
}

impl Layout {
    /// Gives each label the room that it needs.
    fn new(subtitle: String, with_peer: bool, groups: &[Group]) -> Self {
        let bars = || groups.iter().flat_map(|group| &group.bars);
        let rates = bars().map(|bar| text_width(&bar.rate(), RATE_SIZE) + 4);
        let least_bar = rates.max().unwrap_or(0);
        let most_bars = groups.iter().map(|group| group.bars.len()).max();
        let most_bars = most_bars.unwrap_or(1) as i32;
        let labels = groups.iter().flat_map(Group::labels);
        let labels = labels.map(|label| text_width(&label, LABEL_SIZE)).max();
        let least_pitch = labels.unwrap_or(0).max(least_bar * most_bars) + GAP;
        let count = groups.len() as i32;
        let title = text_width(TITLE, TITLE_SIZE).max(text_width(&subtitle, LABEL_SIZE));
        let width = LEFT + RIGHT + title.max(least_pitch * count);
        let width = width.max(LEAST_WIDTH);
        let pitch = (width - LEFT - RIGHT) / count;
        let mut legend = vec![("burn-nf4", OURS)];
        if with_peer {
            legend.push(("transformers + bitsandbytes", OTHER));
        }
        Self {
            subtitle,
            legend,
            scale: Scale::over(0.0, bars().map(|bar| bar.percent).fold(0.0, f64::max)),
            width,
            pitch,
            bar: ((pitch - GAP) / most_bars).clamp(least_bar, MOST_BAR.max(least_bar)),
        }
    }

    fn y(&self, percent: f64) -> i32 {
        self.scale.pixel(percent, [HEIGHT - BOTTOM, TOP])
    }

    /// Title and legend.
    fn head(&self, area: &Area) -> Drawn {
        text(area, TITLE, (LEFT, 18), TITLE_SIZE, HPos::Left, BLACK)?;
        let subtitle = &self.subtitle;
        text(area, subtitle, (LEFT, 37), LABEL_SIZE, HPos::Left, GREY)?;
        svg::legend(area, (LEFT, 56), LABEL_SIZE, &self.legend)
    }

    /// The lines behind the bars.
    fn scale(&self, area: &Area) -> Drawn {
        for (percent, number) in self.scale.lines() {
            let y = self.y(percent);
            let line = vec![(LEFT, y), (self.width - RIGHT, y)];
            area.draw(&PathElement::new(line, PALE.stroke_width(1)))?;
            let at = (LEFT - 8, y);
            text(area, &number, at, LABEL_SIZE, HPos::Right, GREY)?;
        }
        Ok(())
    }

    fn group(&self, area: &Area, group: &Group, index: i32) -> Drawn {
        let centre = LEFT + self.pitch * index + self.pitch / 2;
        let mut x = centre - self.bar * group.bars.len() as i32 / 2;
        for bar in &group.bars {
            let top = self.y(bar.percent);
            let corners = [(x, top), (x + self.bar - 1, self.y(0.0))];
            area.draw(&Rectangle::new(corners, bar.colour.filled()))?;
            let (rate, at) = (bar.rate(), (x + self.bar / 2, top - 8));
            // A line may run behind it.
            let half = text_width(&rate, RATE_SIZE) / 2;
            let behind = [(at.0 - half, at.1 - 6), (at.0 + half, at.1 + 6)];
            area.draw(&Rectangle::new(behind, WHITE.filled()))?;
            text(area, &rate, at, RATE_SIZE, HPos::Center, BLACK)?;
            x += self.bar;
        }
        let below = HEIGHT - BOTTOM;
        let lines = [(below + 14, BLACK), (below + 30, GREY)];
        for (label, (y, colour)) in group.labels().iter().zip(lines) {
            text(area, label, (centre, y), LABEL_SIZE, HPos::Center, colour)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value of an attribute.
    fn attribute<'a>(tag: &'a str, name: &str) -> &'a str {
        let (_, rest) = tag.split_once(&format!("{name}=\"")).unwrap();
        rest.split_once('"').unwrap().0
    }

    /// Left, right and middle line of all text of an SVG, in pixels.
    fn texts(svg: &str) -> Vec<(String, [i32; 3])> {
        let tags = svg.split("<text ").skip(1);
        let texts = tags.map(|tag| {
            let content = tag.split_once('>').unwrap().1;
            let content = content.split_once("</text>").unwrap().0.trim();
            let number = |name| attribute(tag, name).parse::<f64>().unwrap() as i32;
            // That of plotters is in units of its own.
            let size = (f64::from(number("font-size")) * 1.24).round() as i32;
            let (x, width) = (number("x"), text_width(content, size));
            let left = match attribute(tag, "text-anchor") {
                "start" => x,
                "middle" => x - width / 2,
                _ => x - width,
            };
            (content.to_string(), [left, left + width, number("y")])
        });
        texts.collect()
    }

    /// Twelve groups of two, whose numbers are long and stand at the same height.
    #[test]
    fn labels_of_many_bars_do_not_overlap() {
        let groups = (0..12).map(|group| Group {
            batch: 64,
            context: 131_072,
            bars: [OURS, OTHER]
                .map(|colour| Bar {
                    percent: 1.7,
                    tokens_s: 123_456.0 + f64::from(group),
                    colour,
                })
                .into(),
        });
        let groups: Vec<Group> = groups.collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chart.svg");
        draw_groups("a model".into(), true, &groups, &path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        let texts = texts(&svg);
        let rates = texts
            .iter()
            .filter(|(content, _)| content.starts_with("1234"));
        assert_eq!(rates.count(), 24);
        for (i, (content, [left, right, y])) in texts.iter().enumerate() {
            for (other, [from, to, line]) in &texts[..i] {
                let apart = right <= from || to <= left || (y - line).abs() >= 11;
                assert!(apart, "{content} and {other} overlap");
            }
        }
        // The scale ends where the bars do.
        assert!(texts.iter().any(|(content, _)| content == "1.8"));
        assert!(texts.iter().all(|(content, _)| content != "10"));
    }
}
