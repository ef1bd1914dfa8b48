//! The low-rank branch of one module, added to its weight.

use rayon::prelude::*;

use super::loss::Sums;
use super::weight::BaseWeight;
use crate::error::Nf4Error;
use crate::format::check_shape;
use crate::peft::adapter::LoraModule;
use crate::peft::tensor::DenseTensor;

/// The branch of one module, to be added to its weight.
pub(super) struct Branch<'a> {
    pub module: &'a LoraModule,
    pub scale: f32,
    /// Whether the weight is `[in_features, out_features]`.
    pub transposed: bool,
}

impl Branch<'_> {
    /// Adds the branch, and returns how much it changed.
    pub fn add_to(&self, weight: &mut BaseWeight, key: &str) -> Result<Sums, Nf4Error> {
        let [d_output, d_input] = self.module.dims();
        let expected = match self.transposed {
            false => [d_output, d_input],
            true => [d_input, d_output],
        };
        check_shape(key, &expected, &weight.dims(key)?)?;
        if self.transposed {
            weight.transpose(key)?;
        }
        let rank = self.module.rank();
        let (a, b) = (self.module.lora_a.to_f32(), self.module.lora_b.to_f32());
        let magnitude = self.module.magnitude.as_ref().map(DenseTensor::to_f32);
        // Collected, not reduced: the sum must not depend on how threads share the rows.
        let updates: Vec<f64> = weight
            .values
            .par_chunks_mut(d_input)
            .zip(b.par_chunks(rank))
            .enumerate()
            .map(|(index, (row, b))| {
                let magnitude = magnitude.as_ref().map(|magnitude| magnitude[index]);
                self.add_to_row(row, &a, b, magnitude)
            })
            .collect();
        if self.transposed {
            weight.transpose(key)?;
        }
        Ok(Sums::of_update(updates.into_iter().sum()))
    }

    /// One row of the weight; returns the sum of squares of its change.
    fn add_to_row(&self, row: &mut [f32], a: &[f32], b: &[f32], magnitude: Option<f32>) -> f64 {
        let mut change = vec![0.0; row.len()];
        for (a, b) in a.chunks(row.len()).zip(b) {
            for (change, a) in change.iter_mut().zip(a) {
                *change += a * b;
            }
        }
        let factor = magnitude.map(|magnitude| {
            let sums = row
                .iter()
                .zip(&change)
                .map(|(w, change)| w + self.scale * change);
            let norm = sums
                .map(|w| f64::from(w) * f64::from(w))
                .sum::<f64>()
                .sqrt();
            // A row of zeros stays one, whatever its magnitude.
            magnitude / (norm as f32).max(f32::MIN_POSITIVE)
        });
        let mut update = 0.0;
        for (w, change) in row.iter_mut().zip(change) {
            let merged = (*w + self.scale * change) * factor.unwrap_or(1.0);
            update += f64::from(merged - *w).powi(2);
            *w = merged;
        }
        update
    }
}
