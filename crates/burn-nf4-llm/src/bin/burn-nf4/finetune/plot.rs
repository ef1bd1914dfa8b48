//! The losses of a run as a chart.

use std::path::Path;

use burn_nf4_llm::ModelError;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use crate::svg::{self, Area, Drawn, GREY, OTHER, OURS, PALE, Scale, text};

const WIDTH: i32 = 960;
const HEIGHT: i32 = 420;
/// Room for numbers, title and legend.
const LEFT: i32 = 56;
const RIGHT: i32 = 16;
const TOP: i32 = 64;
const BOTTOM: i32 = 44;
/// Steps of the run for each one that a smoothed loss has to either side.
const SIDE: usize = 20;

/// A step and its loss.
pub type Point = (usize, f64);

/// The losses of the steps and of the evaluations.
#[derive(Debug, Default, PartialEq)]
pub struct Losses {
    pub train: Vec<Point>,
    pub eval: Vec<Point>,
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
        svg::draw(path, [WIDTH, HEIGHT], |area| draw(&train, &eval, area))?;
        Ok(true)
    }
}

fn draw(train: &[Point], eval: &[Point], area: &Area) -> Drawn {
    let points = train.iter().chain(eval);
    let x = scale_of(points.clone().map(|&(step, _)| step as f64));
    let y = scale_of(points.map(|&(_, loss)| loss));
    let to_x = |step: f64| x.pixel(step, [LEFT, WIDTH - RIGHT]);
    let to_y = |loss: f64| y.pixel(loss, [HEIGHT - BOTTOM, TOP]);
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
    svg::legend(area, (LEFT, 42), 13, &names)?;
    for (loss, number) in y.lines() {
        let at = to_y(loss);
        let line = vec![(LEFT, at), (WIDTH - RIGHT, at)];
        area.draw(&PathElement::new(line, PALE.stroke_width(1)))?;
        text(area, &number, (LEFT - 8, at), 12, HPos::Right, GREY)?;
    }
    for (step, number) in x.lines().filter(|(step, _)| step.fract() == 0.0) {
        let at = (to_x(step), HEIGHT - BOTTOM + 16);
        text(area, &number, at, 12, HPos::Center, GREY)?;
    }
    let line = |points: &[Point]| -> Vec<(i32, i32)> {
        let place = |&(step, loss): &Point| (to_x(step as f64), to_y(loss));
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

fn scale_of(numbers: impl Iterator<Item = f64> + Clone) -> Scale {
    let least = numbers.clone().fold(f64::INFINITY, f64::min);
    Scale::over(least, numbers.fold(f64::NEG_INFINITY, f64::max))
}

/// The mean of each loss and of as many to either side, fewer near the ends: it does not lag behind, as an average
/// over what came before would.
fn smoothed(points: &[Point]) -> Vec<Point> {
    let sums: Vec<f64> = std::iter::once(0.0)
        .chain(points.iter().scan(0.0, |sum, &(_, loss)| {
            *sum += loss;
            Some(*sum)
        }))
        .collect();
    let average = |(index, &(step, _)): (usize, &Point)| {
        let side = (points.len() / SIDE)
            .min(index)
            .min(points.len() - 1 - index);
        let (first, end) = (index - side, index + side + 1);
        (step, (sums[end] - sums[first]) / (end - first) as f64)
    };
    points.iter().enumerate().map(average).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of ups and downs around a line the line, from the first step to the last.
    #[test]
    fn smoothed_losses_do_not_lag() {
        let line = |step: usize| 5.0 - 0.01 * step as f64;
        let up_and_down = |step: usize| if step.is_multiple_of(2) { 0.1 } else { -0.1 };
        let points = (0..401).map(|step| (step, line(step) + up_and_down(step)));
        let smoothed = smoothed(&points.collect::<Vec<_>>());
        assert_eq!(smoothed.len(), 401);
        for &(step, loss) in &smoothed[20..381] {
            assert!((loss - line(step)).abs() < 0.003, "{step} {loss}");
        }
        for ((step, loss), expected) in [(smoothed[0], (0, 5.1)), (smoothed[400], (400, 1.1))] {
            assert!(
                step == expected.0 && (loss - expected.1).abs() < 1e-9,
                "{step} {loss}"
            );
        }
    }
}
