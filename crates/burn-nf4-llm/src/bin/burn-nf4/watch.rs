//! What people see of a training run: burn-train's TUI in a terminal, else lines.

use std::fs::{self, File};
use std::io::{IsTerminal, Write, stdout};
use std::path::Path;
use std::sync::Arc;

use burn_train::Interrupter;
use burn_train::metric::{
    MetricDefinition, MetricEntry, MetricId, NumericAttributes, NumericEntry, SerializedEntry,
};
use burn_train::renderer::tui::TuiMetricsRendererWrapper;
use burn_train::renderer::{MetricState, MetricsRenderer};
use serde::Serialize;

use burn_nf4_llm::error::ModelError;

/// What is known after a step.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct StepReport {
    /// Steps done.
    pub step: usize,
    pub loss: f32,
    pub learning_rate: f64,
    pub tokens_per_second: f64,
}

/// The view of a run, and the log that keeps every step.
pub struct Watch {
    view: View,
    interrupter: Interrupter,
    log: File,
    total: usize,
}

enum View {
    Lines,
    Tui(Box<dyn MetricsRenderer>),
}

const METRICS: [(&str, bool); 3] = [
    ("Loss", false),
    ("Learning rate", true),
    ("Tokens per second", true),
];

/// The log of a run, a line of JSON a step.
const LOG_FILE: &str = "log.jsonl";

impl Watch {
    /// Opens the view, and the log in `output`; a run that starts at step 0 starts it anew.
    pub fn open(output: &Path, tui: bool, start: usize, total: usize) -> Result<Self, ModelError> {
        fs::create_dir_all(output).map_err(ModelError::io(output))?;
        let path = output.join(LOG_FILE);
        let log = File::options()
            .create(true)
            .append(start > 0)
            .write(true)
            .truncate(start == 0)
            .open(&path)
            .map_err(ModelError::io(&path))?;
        let interrupter = Interrupter::new();
        let view = match tui && stdout().is_terminal() {
            false => View::Lines,
            true => View::Tui(open_tui(interrupter.clone(), start, total)),
        };
        Ok(Self {
            view,
            interrupter,
            log,
            total,
        })
    }

    /// Whether somebody asked the run to stop.
    pub fn should_stop(&self) -> bool {
        self.interrupter.should_stop()
    }

    /// Shows and logs a step.
    pub fn step(&mut self, report: &StepReport) -> Result<(), ModelError> {
        let line = serde_json::to_string(report).map_err(ModelError::json(LOG_FILE))?;
        writeln!(self.log, "{line}").map_err(ModelError::io(LOG_FILE))?;
        match &mut self.view {
            View::Lines => println!(
                "step {}/{}  loss {:.4}  lr {:.3e}  {:.0} tokens/s",
                report.step,
                self.total,
                report.loss,
                report.learning_rate,
                report.tokens_per_second
            ),
            View::Tui(tui) => {
                let values = [
                    f64::from(report.loss),
                    report.learning_rate,
                    report.tokens_per_second,
                ];
                for ((name, _), value) in METRICS.into_iter().zip(values) {
                    let text = match value.abs() < 0.01 {
                        true => format!("{value:.3e}"),
                        false => format!("{value:.4}"),
                    };
                    let entry = SerializedEntry::new(text, value.to_string());
                    tui.update_train(MetricState::Numeric(
                        MetricEntry::new(id(name), entry),
                        Some(NumericEntry::Value(value)),
                    ));
                }
                tui.update_split(report.step);
            }
        }
        Ok(())
    }

    /// Says that something was saved.
    pub fn saved(&mut self, folder: &Path) {
        match &mut self.view {
            View::Lines => println!("saved {}", folder.display()),
            View::Tui(tui) => tui.log_event_training("saved".into()),
        }
    }
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
