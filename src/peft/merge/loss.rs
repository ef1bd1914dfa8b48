//! What it costs to store merged weights.

/// How far stored weights lie from the merged weights before they were rounded or quantized.
///
/// A merge into 4 bit pays where [`relative_rms`](Self::relative_rms) is well below
/// [`relative_update`](Self::relative_update): else more is lost than the adapter brought.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MergeLoss {
    /// Root mean square of the error over that of the merged weights.
    pub relative_rms: f64,
    /// Largest error.
    pub max_abs: f32,
    /// Root mean square of what the adapter changed over that of the merged weights.
    pub relative_update: f64,
}

/// Sums of squares over weights.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sums {
    merged: f64,
    update: f64,
    error: f64,
    max_abs: f32,
}

impl Sums {
    pub fn of_update(update: f64) -> Self {
        Self {
            update,
            ..Self::default()
        }
    }

    pub fn compare(&mut self, merged: &[f32], stored: &[f32]) {
        for (merged, stored) in merged.iter().zip(stored) {
            let error = merged - stored;
            self.merged += f64::from(*merged).powi(2);
            self.error += f64::from(error).powi(2);
            self.max_abs = self.max_abs.max(error.abs());
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.merged += other.merged;
        self.update += other.update;
        self.error += other.error;
        self.max_abs = self.max_abs.max(other.max_abs);
    }

    pub fn loss(&self) -> MergeLoss {
        // Weights of zeros, stored as zeros, have lost nothing.
        let part = |squares: f64| {
            if squares == 0.0 {
                0.0
            } else {
                (squares / self.merged).sqrt()
            }
        };
        MergeLoss {
            relative_rms: part(self.error),
            max_abs: self.max_abs,
            relative_update: part(self.update),
        }
    }
}
