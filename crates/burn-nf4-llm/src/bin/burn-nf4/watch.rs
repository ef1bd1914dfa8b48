//! What people see of a training run: burn-train's TUI in a terminal, else lines.

use std::fs::{self, File};
use std::io::{IsTerminal, Write, stdout};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn_train::Interrupter;
use burn_train::metric::{
    MetricDefinition, MetricEntry, MetricId, NumericAttributes, NumericEntry, SerializedEntry,
};
use burn_train::renderer::tui::TuiMetricsRendererWrapper;
use burn_train::renderer::{MetricState, MetricsRenderer};
use serde::{Deserialize, Serialize};

use burn_nf4_llm::error::ModelError;

use crate::finetune::plot::Losses;

/// What is known after a step.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct StepReport {
    /// Steps done.
    pub step: usize,
    pub loss: f32,
    /// Of all gradients together, before they were scaled down.
    pub grad_norm: f32,
    pub learning_rate: f64,
    pub tokens_per_second: f64,
}

/// What an evaluation has found.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct EvalReport {
    /// Steps done.
    pub step: usize,
    pub eval_loss: f64,
    pub eval_perplexity: f64,
    /// Tokens that were predicted.
    pub eval_targets: usize,
}

/// What a view is opened for.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// The log.
    pub log: &'a Path,
    /// Whether people want to see the TUI.
    pub tui: bool,
    /// Steps done before.
    pub start: usize,
    /// Steps of the whole run.
    pub total: usize,
}

/// The view of a run, and the log that keeps every step.
pub struct Watch {
    view: View,
    interrupter: Interrupter,
    log: File,
    path: PathBuf,
    total: usize,
    /// The last step and the last evaluation, as lines.
    last: [Option<String>; 2],
}

enum View {
    Lines,
    Tui(Box<dyn MetricsRenderer>),
}

const LOSS: &str = "Loss";
const PERPLEXITY: &str = "Perplexity";
const METRICS: [(&str, bool); 4] = [
    (LOSS, false),
    ("Learning rate", true),
    ("Tokens per second", true),
    (PERPLEXITY, false),
];

impl Watch {
    /// Opens the view and the log. A run that starts at step 0 starts the log anew; one that goes on keeps
    /// the lines of the steps before.
    pub fn open(run: Run<'_>) -> Result<Self, ModelError> {
        let path = run.log;
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(ModelError::io(folder))?;
        }
        let kept = match run.start > 0 && path.exists() {
            true => lines_up_to(path, run.start)?,
            false => String::new(),
        };
        let mut log = File::create(path).map_err(ModelError::io(path))?;
        log.write_all(kept.as_bytes())
            .map_err(ModelError::io(path))?;
        let interrupter = Interrupter::new();
        let view = match run.tui && stdout().is_terminal() {
            false => View::Lines,
            true => View::Tui(open_tui(interrupter.clone(), run.start, run.total)),
        };
        Ok(Self {
            view,
            interrupter,
            log,
            path: path.into(),
            total: run.total,
            last: [None, None],
        })
    }

    /// Whether somebody asked the run to stop.
    pub fn should_stop(&self) -> bool {
        self.interrupter.should_stop()
    }

    /// Shows and logs a step.
    pub fn step(&mut self, report: &StepReport) -> Result<(), ModelError> {
        self.write(report)?;
        let line = format!(
            "step {}/{}  loss {:.4}  lr {:.3e}  {:.0} tokens/s",
            report.step, self.total, report.loss, report.learning_rate, report.tokens_per_second
        );
        match &mut self.view {
            View::Lines => println!("{line}"),
            View::Tui(tui) => {
                let values = [
                    f64::from(report.loss),
                    report.learning_rate,
                    report.tokens_per_second,
                ];
                for ((name, _), value) in METRICS.into_iter().zip(values) {
                    tui.update_train(metric(name, value));
                }
                tui.update_split(report.step);
            }
        }
        self.last[0] = Some(line);
        Ok(())
    }

    /// Shows and logs an evaluation.
    pub fn evaluation(&mut self, report: &EvalReport) -> Result<(), ModelError> {
        self.write(report)?;
        let line = format!(
            "step {}/{}  evaluation: loss {:.4}  perplexity {:.3}  of {} tokens",
            report.step, self.total, report.eval_loss, report.eval_perplexity, report.eval_targets
        );
        match &mut self.view {
            View::Lines => println!("{line}"),
            View::Tui(tui) => {
                tui.update_valid(metric(LOSS, report.eval_loss));
                tui.update_valid(metric(PERPLEXITY, report.eval_perplexity));
            }
        }
        self.last[1] = Some(line);
        Ok(())
    }

    /// Closes the view. What the TUI showed last is printed, as it is gone with it.
    pub fn close(self) {
        let Self { view, last, .. } = self;
        let is_tui = matches!(view, View::Tui(_));
        drop(view);
        for line in last.into_iter().flatten().filter(|_| is_tui) {
            println!("{line}");
        }
    }

    fn write(&mut self, report: &impl Serialize) -> Result<(), ModelError> {
        let line = serde_json::to_string(report).map_err(ModelError::json(&self.path))?;
        writeln!(self.log, "{line}").map_err(ModelError::io(&self.path))
    }

    /// Tells of something that is not as it should be.
    pub fn warn(&mut self, warning: String) {
        match &mut self.view {
            View::Lines => eprintln!("warning: {warning}"),
            View::Tui(tui) => tui.log_event_training(warning),
        }
    }

    /// Says that something was saved.
    pub fn saved(&mut self, folder: &Path) {
        match &mut self.view {
            View::Lines => println!("saved {}", folder.display()),
            View::Tui(tui) => tui.log_event_training("saved".into()),
        }
    }
}

/// The lines of a log up to a step. What comes after is of steps that are done again; a last line without an
/// end was cut off.
fn lines_up_to(path: &Path, step: usize) -> Result<String, ModelError> {
    let text = fs::read_to_string(path).map_err(ModelError::io(path))?;
    let (mut kept, mut removed) = (String::new(), 0);
    for line in text.split_inclusive('\n') {
        let is_kept = line.ends_with('\n') && parse(line, path)?.step <= step;
        match is_kept {
            true => kept += line,
            false => removed += 1,
        }
    }
    if removed > 0 {
        eprintln!(
            "the run goes on behind step {step}: {removed} later lines of {} are removed",
            path.display()
        );
    }
    Ok(kept)
}

fn parse(line: &str, path: &Path) -> Result<Line, ModelError> {
    serde_json::from_str(line).map_err(ModelError::json(path))
}

/// What a line of a log has of all that is drawn.
#[derive(Deserialize)]
struct Line {
    step: usize,
    loss: Option<f64>,
    eval_loss: Option<f64>,
}

/// The losses of a log.
pub fn losses(path: &Path) -> Result<Losses, ModelError> {
    let text = fs::read_to_string(path).map_err(ModelError::io(path))?;
    let mut losses = Losses::default();
    for line in text.lines() {
        let line = parse(line, path)?;
        losses.train.extend(line.loss.map(|loss| (line.step, loss)));
        losses
            .eval
            .extend(line.eval_loss.map(|loss| (line.step, loss)));
    }
    Ok(losses)
}

fn metric(name: &str, value: f64) -> MetricState {
    let text = match value.abs() < 0.01 {
        true => format!("{value:.3e}"),
        false => format!("{value:.4}"),
    };
    let entry = SerializedEntry::new(text, value.to_string());
    MetricState::Numeric(
        MetricEntry::new(id(name), entry),
        Some(NumericEntry::Value(value)),
    )
}

fn open_tui(interrupter: Interrupter, start: usize, total: usize) -> Box<dyn MetricsRenderer> {
    let mut tui: Box<dyn MetricsRenderer> =
        Box::new(TuiMetricsRendererWrapper::new(interrupter, None));
    for (name, higher_is_better) in METRICS {
        tui.register_metric(MetricDefinition {
            metric_id: id(name),
            name: Arc::new(name.into()),
            description: None,
            attributes: NumericAttributes {
                unit: None,
                higher_is_better,
            }
            .into(),
        });
    }
    // The whole run is one epoch to the view, counted from 1: its items are the steps.
    tui.start(1, 1, Some(total), Some("QLoRA fine-tuning"));
    tui.start_split("train", total);
    tui.update_split(start);
    tui
}

fn id(name: &str) -> MetricId {
    MetricId::new(Arc::new(name.into()))
}
