//! What a comparison says.

use burn_nf4::checkpoint::{Difference, VerifyReport};
use serde::Serialize;

#[derive(Serialize)]
pub struct Verdict {
    /// Whether the differences are within the limits.
    pub within: bool,
    #[serde(flatten)]
    pub report: VerifyReport,
}

/// How far apart two checkpoints may be.
pub struct Limits {
    max_abs_error: f64,
    relative_rms_error: f64,
}

impl Limits {
    /// Nothing may differ unless a limit is given; the one that is not given then allows anything.
    pub fn new(max_abs_error: Option<f64>, relative_rms_error: Option<f64>) -> Self {
        let given = max_abs_error.is_some() || relative_rms_error.is_some();
        let otherwise = if given { f64::INFINITY } else { 0.0 };
        Self {
            max_abs_error: max_abs_error.unwrap_or(otherwise),
            relative_rms_error: relative_rms_error.unwrap_or(otherwise),
        }
    }

    pub fn hold(&self, report: &VerifyReport) -> bool {
        report.is_within(self.max_abs_error, self.relative_rms_error)
    }

    /// One line for each parameter that is not the same, and a summary.
    pub fn text(&self, report: &VerifyReport) -> String {
        let mut text = String::new();
        let (mut same_bytes, mut same_values) = (0, 0);
        for parameter in &report.parameters {
            let difference = match &parameter.difference {
                Difference::IdenticalBytes => {
                    same_bytes += 1;
                    continue;
                }
                Difference::IdenticalValues => {
                    same_values += 1;
                    continue;
                }
                Difference::Values {
                    max_abs_error,
                    relative_rms_error,
                } => format!(
                    "max abs error {max_abs_error:.3e}, relative RMS error {relative_rms_error:.3e}"
                ),
                Difference::NotComparable { reason } => reason.clone(),
            };
            let tied = parameter.tied_to.as_ref();
            let tied = tied.map_or_else(String::new, |table| format!(" (tied to {table})"));
            text += &format!("{}{tied}: {difference}\n", parameter.name);
        }
        for (names, which) in [(&report.missing, "A"), (&report.extra, "B")] {
            for name in names {
                text += &format!("{name}: only in {which}\n");
            }
        }
        let compared = report.parameters.len();
        let exceeding = report
            .exceeding(self.max_abs_error, self.relative_rms_error)
            .count();
        text + &format!(
            "{compared} parameters: {same_bytes} with identical bytes, {same_values} with \
             identical values, {} other, of which {exceeding} exceed the tolerance; {} missing, {} \
             extra\n",
            compared - same_bytes - same_values,
            report.missing.len(),
            report.extra.len(),
        )
    }
}
