//! What the charts of the program share: a white page, text, and a scale with lines at round numbers.

use std::error::Error;
use std::path::Path;

use burn_nf4_llm::ModelError;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub const OURS: RGBColor = RGBColor(23, 78, 166);
pub const OTHER: RGBColor = RGBColor(217, 95, 14);
pub const GREY: RGBColor = RGBColor(90, 90, 90);
/// Of the lines behind what is drawn.
pub const PALE: RGBColor = RGBColor(222, 222, 222);

pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub type Drawn = Result<(), Box<dyn Error>>;

/// Draws on a white page of `[width, height]` pixels and writes it.
///
/// # Errors
/// [`ModelError::Io`] with whatever went wrong.
pub fn draw(
    path: &Path,
    [width, height]: [i32; 2],
    content: impl FnOnce(&Area) -> Drawn,
) -> Result<(), ModelError> {
    let size = (width.unsigned_abs(), height.unsigned_abs());
    let area = SVGBackend::new(path, size).into_drawing_area();
    let drawn = area.fill(&WHITE).map_err(Into::into);
    let drawn = drawn.and_then(|()| content(&area));
    let written = drawn.and_then(|()| Ok(area.present()?));
    written.map_err(|error: Box<dyn Error>| ModelError::Io {
        path: path.into(),
        source: std::io::Error::other(error.to_string()),
    })
}

/// A line of text whose left end, middle or right end is at a pixel.
pub fn text(
    area: &Area,
    content: &str,
    at: (i32, i32),
    size: i32,
    anchor: HPos,
    colour: RGBColor,
) -> Drawn {
    let style = ("sans-serif", size)
        .into_font()
        .color(&colour)
        .pos(Pos::new(anchor, VPos::Center));
    area.draw(&Text::new(content.to_string(), at, style))?;
    Ok(())
}

/// A row of names beside squares of their colours, from a pixel to the right.
pub fn legend(area: &Area, (mut x, y): (i32, i32), size: i32, names: &[(&str, RGBColor)]) -> Drawn {
    for (name, colour) in names {
        area.draw(&Rectangle::new(
            [(x, y - 6), (x + 12, y + 6)],
            colour.filled(),
        ))?;
        text(area, name, (x + 17, y), size, HPos::Left, BLACK)?;
        x += 37 + text_width(name, size);
    }
    Ok(())
}

/// About how many pixels a line of text takes: no font is at hand, so rather too many.
pub fn text_width(content: &str, size: i32) -> i32 {
    // Digits and most letters of sans-serif fonts are 0.5 to 0.6 of the size wide.
    (content.chars().count() as f64 * f64::from(size) * 0.6).ceil() as i32
}

/// A range of values with lines at round numbers, the first and the last at its ends.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    from: f64,
    step: f64,
    /// Of lines, less one.
    steps: usize,
}

impl Scale {
    /// The smallest with lines 1, 2 or 5 times a power of ten apart, at most 11 of them or so, that holds
    /// both values. The values are finite.
    pub fn over(least: f64, most: f64) -> Self {
        let span = match most - least {
            span if span > 0.0 => span,
            // One value: any scale around it does.
            _ => most.abs().max(1.0),
        };
        let power = 10f64.powf((span / 10.0).log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0].map(|times| times * power);
        let step = steps.into_iter().find(|step| span / step <= 10.0);
        let step = step.unwrap_or(10.0 * power);
        // A value that is a line up to rounding is that line.
        let first = (least / step + 1e-9).floor();
        let last = (most / step - 1e-9).ceil().max(first + 1.0);
        Self {
            from: first * step,
            step,
            steps: (last - first) as usize,
        }
    }

    /// The lines, each with its number.
    pub fn lines(self) -> impl Iterator<Item = (f64, String)> {
        let digits = (-self.step.log10().floor()).max(0.0) as usize;
        (0..=self.steps).map(move |line| {
            let value = self.from + line as f64 * self.step;
            (value, format!("{value:.digits$}"))
        })
    }

    /// Where a value is on a side that goes from one pixel to another.
    pub fn pixel(self, value: f64, [from, to]: [i32; 2]) -> i32 {
        let share = (value - self.from) / (self.step * self.steps as f64);
        from + (share * f64::from(to - from)).round() as i32
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::percent(0.0, 62.0, &["0", "10", "20", "30", "40", "50", "60", "70"])]
    #[case::a_line_at_the_end(0.0, 60.0, &["0", "10", "20", "30", "40", "50", "60"])]
    #[case::small(0.0, 1.9, &["0.0", "0.2", "0.4", "0.6", "0.8", "1.0", "1.2", "1.4", "1.6", "1.8", "2.0"])]
    #[case::losses(1.13, 2.6, &["1.0", "1.2", "1.4", "1.6", "1.8", "2.0", "2.2", "2.4", "2.6"])]
    #[case::large(0.0, 412.0, &["0", "50", "100", "150", "200", "250", "300", "350", "400", "450"])]
    #[case::below_zero(-3.0, 1.0, &["-3.0", "-2.5", "-2.0", "-1.5", "-1.0", "-0.5", "0.0", "0.5", "1.0"])]
    #[case::nothing(0.0, 0.0, &["0.0", "0.1"])]
    fn a_scale_has_lines_at_round_numbers_around_its_values(
        #[case] least: f64,
        #[case] most: f64,
        #[case] expected: &[&str],
    ) {
        let scale = Scale::over(least, most);
        let (values, numbers): (Vec<f64>, Vec<String>) = scale.lines().unzip();
        assert_eq!(numbers, expected);
        let (first, last) = (values[0], values[values.len() - 1]);
        assert!(first <= least && most <= last + 1e-9);
        let side = [400, 20];
        assert_eq!([first, last].map(|end| scale.pixel(end, side)), side);
    }
}
