//! The losses of a run as a chart.

use std::path::Path;

use burn_nf4_llm::ModelError;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use crate::svg::{self, Area, Drawn, GREY, OTHER, OURS, PALE, text};

const WIDTH: i32 = 960;
const HEIGHT: i32 = 420;
/// Room for numbers, title and legend.
const LEFT: i32 = 56;
const RIGHT: i32 = 16;
const TOP: i32 = 64;
const BOTTOM: i32 = 44;
/// Of the new loss in the smoothed one.
const SHARE: f64 = 0.1;

/// A step and its loss.
pub type Point = (usize, f64);

/// The losses of the steps and of the evaluations.
#[derive(Debug, Default, PartialEq)]
pub struct Losses {
    pub train: Vec<Point>,
    pub eval: Vec<Point>,
}

/// Where a number lies on the drawing.
struct Axis {
    least: f64,
    most: f64,
    from: i32,
    to: i32,
}

impl Axis {
    fn new(numbers: impl Iterator<Item = f64> + Clone, from: i32, to: i32) -> Self {
        let least = numbers.clone().fold(f64::INFINITY, f64::min);
        let most = numbers.fold(f64::NEG_INFINITY, f64::max);
        // A line of one height lies in the middle.
        let margin = if most > least { 0.0 } else { 0.5 };
        Self {
            least: least - margin,
            most: most + margin,
            from,
            to,
        }
    }

    fn at(&self, number: f64) -> i32 {
        let share = (number - self.least) / (self.most - self.least);
        self.from + (share * f64::from(self.to - self.from)).round() as i32
    }

    /// Round numbers, about five of them, and the decimals that they have.
    fn marks(&self) -> (Vec<f64>, usize) {
        let span = (self.most - self.least) / 5.0;
        let power = 10f64.powf(span.log10().floor());
        let step = power
            * [1.0, 2.0, 5.0, 10.0]
                .into_iter()
                .find(|unit| unit * power >= span)
                .unwrap_or(10.0);
        let decimals = (-step.log10().floor()).max(0.0) as usize;
        let first = (self.least / step).ceil() as i64;
        let last = (self.most / step).floor() as i64;
        (
            (first..=last).map(|mark| mark as f64 * step).collect(),
            decimals,
        )
    }
}

impl Losses {
    /// Draws the losses that are finite. Returns whether there are enough for a line.
    ///
    /// # Errors
    /// [`ModelError::Io`] if the file cannot be written.
    pub fn draw(&self, path: &Path) -> Result<bool, ModelError> {
        let finite = |points: &[Point]| -> Vec<Point> {
            points
                .iter()
                .copied()
                .filter(|(_, loss)| loss.is_finite())
                .collect()
        };
        let [train, eval] = [&self.train, &self.eval].map(|points| finite(points));
        if train.len() < 2 {
            return Ok(false);
        }
        svg::write(path, (WIDTH, HEIGHT), |area| draw(&train, &eval, area))?;
        Ok(true)
    }
}

fn draw(train: &[Point], eval: &[Point], area: &Area) -> Drawn {
    let points = train.iter().chain(eval);
    let x = Axis::new(
        points.clone().map(|&(step, _)| step as f64),
        LEFT,
        WIDTH - RIGHT,
    );
    let y = Axis::new(points.map(|&(_, loss)| loss), HEIGHT - BOTTOM, TOP);
    text(
        area,
        "Loss (nats a token) by step",
        (LEFT, 18),
        15,
        HPos::Left,
        BLACK,
    )?;
    let mut names = vec![("training, smoothed", OURS)];
    if !eval.is_empty() {
        names.push(("evaluation", OTHER));
    }
    svg::legend(area, LEFT, 42, &names)?;
    let (marks, decimals) = y.marks();
    for mark in marks {
        let line = vec![(LEFT, y.at(mark)), (WIDTH - RIGHT, y.at(mark))];
        area.draw(&PathElement::new(line, PALE.stroke_width(1)))?;
        let number = format!("{mark:.decimals$}");
        text(area, &number, (LEFT - 8, y.at(mark)), 12, HPos::Right, GREY)?;
    }
    for mark in x.marks().0.into_iter().filter(|mark| mark.fract() == 0.0) {
        let at = (x.at(mark), HEIGHT - BOTTOM + 16);
        text(area, &format!("{mark:.0}"), at, 12, HPos::Center, GREY)?;
    }
    let line = |points: &[Point]| -> Vec<(i32, i32)> {
        let place = |&(step, loss): &Point| (x.at(step as f64), y.at(loss));
        points.iter().map(place).collect()
    };
    let faint = OURS.mix(0.25);
    area.draw(&PathElement::new(line(train), faint.stroke_width(1)))?;
    area.draw(&PathElement::new(
        line(&smoothed(train)),
        OURS.stroke_width(2),
    ))?;
    area.draw(&PathElement::new(line(eval), OTHER.stroke_width(2)))?;
    for at in line(eval) {
        area.draw(&Circle::new(at, 3, OTHER.filled()))?;
    }
    Ok(())
}

/// The exponential moving average, without the pull of its beginning.
fn smoothed(points: &[Point]) -> Vec<Point> {
    let (mut sum, mut weight) = (0.0, 0.0);
    let average = |&(step, loss): &Point| {
        sum = (1.0 - SHARE) * sum + SHARE * loss;
        weight = (1.0 - SHARE) * weight + SHARE;
        (step, sum / weight)
    };
    points.iter().map(average).collect()
}
