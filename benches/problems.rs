//! The shapes and dtypes that are timed.

use burn_nf4::format::{FloatType, Nf4Tensor, PackedLayout, QuantConfig};

/// A weight to decode.
pub struct Problem {
    pub shape: [usize; 2],
    pub dtype: FloatType,
}

const fn problem(rows: usize, columns: usize, dtype: FloatType) -> Problem {
    Problem {
        shape: [rows, columns],
        dtype,
    }
}

/// Shapes of the puzzle's three models first, then a square, a large and a ragged one.
#[cfg(feature = "cube")]
pub const GPU: &[Problem] = &[
    problem(8192, 2048, FloatType::F16),
    problem(4096, 1024, FloatType::BF16),
    problem(14336, 4096, FloatType::BF16),
    problem(14336, 4096, FloatType::F16),
    problem(14336, 4096, FloatType::F32),
    problem(4096, 4096, FloatType::BF16),
    problem(8192, 8192, FloatType::BF16),
    problem(28672, 8192, FloatType::BF16),
    problem(4093, 4099, FloatType::BF16),
];

pub const HOST: &[Problem] = &[
    problem(4096, 1024, FloatType::BF16),
    problem(4096, 4096, FloatType::BF16),
    problem(4096, 4096, FloatType::F16),
    problem(4096, 4096, FloatType::F32),
];

impl Problem {
    /// Bytes that must move: each packed byte read once, each decoded byte written once.
    pub fn bytes(&self, config: QuantConfig) -> usize {
        let elems = self.shape[0] * self.shape[1];
        let layout = PackedLayout::new(elems, config);
        layout.words * 4 + elems * self.dtype.size_bytes()
    }
}

/// A reproducible weight, spread like a trained one.
pub fn weight(shape: [usize; 2], seed: u64) -> Nf4Tensor {
    let elems = shape[0] * shape[1];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<f32> = (0..elems)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let uniform = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            uniform * 0.04
        })
        .collect();
    let config = QuantConfig::default();
    let words = burn_nf4::host::quantize(&values, &shape, config).expect("finite weights");
    Nf4Tensor::from_packed(&words, &shape, config, FloatType::F32).expect("a weight just packed")
}
