//! The shapes and dtypes that are timed, and the weights.

use burn_nf4::format::{BlockTensor, FloatElement, FloatType, PackedLayout, QuantConfig};
use burn_nf4::host;
use half::{bf16, f16};

#[cfg(feature = "cube")]
use crate::args::Sizes;

/// A weight to decode or to encode.
#[derive(Clone, Copy, PartialEq, Eq)]
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

/// Shapes of the puzzle's three models first, then squares, a large and a ragged one.
#[cfg(feature = "cube")]
const SHAPES: [[usize; 2]; 7] = [
    [8192, 2048],
    [4096, 1024],
    [14336, 4096],
    [4096, 4096],
    [8192, 8192],
    [28672, 8192],
    [4093, 4099],
];

/// Every shape in every dtype.
#[cfg(feature = "cube")]
const DEVICE: [Problem; 21] = {
    let mut problems = [problem(0, 0, FloatType::F16); 21];
    let mut i = 0;
    while i < problems.len() {
        let [rows, columns] = SHAPES[i / 3];
        problems[i] = problem(rows, columns, FloatType::ALL[i % 3]);
        i += 1;
    }
    problems
};

/// What peers are timed on and the chart shows: each shape in one dtype, one shape in all.
#[cfg(feature = "cube")]
const DEVICE_PEERS: [Problem; 9] = [
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

/// One shape in all dtypes, and a ragged one.
#[cfg(feature = "cube")]
const DEVICE_SMALL: [Problem; 5] = [
    problem(2048, 512, FloatType::F16),
    problem(3584, 1024, FloatType::BF16),
    problem(3584, 1024, FloatType::F16),
    problem(3584, 1024, FloatType::F32),
    problem(1021, 1027, FloatType::F32),
];

/// Decoded on the device.
#[cfg(feature = "cube")]
pub const fn device(sizes: Sizes) -> &'static [Problem] {
    match sizes {
        Sizes::Full => &DEVICE,
        Sizes::Small => &DEVICE_SMALL,
    }
}

/// Decoded on the device by peers too, and charted.
#[cfg(feature = "cube")]
pub const fn peers(sizes: Sizes) -> &'static [Problem] {
    match sizes {
        Sizes::Full => &DEVICE_PEERS,
        Sizes::Small => &DEVICE_SMALL,
    }
}

/// Whether the chart has room for a problem.
#[cfg(feature = "cube")]
pub fn is_charted(shape: [usize; 2], dtype: &str) -> bool {
    let charted = |problem: &Problem| problem.shape == shape && dtype_name(problem.dtype) == dtype;
    !SHAPES.contains(&shape) || DEVICE_PEERS.iter().any(charted)
}

/// Also decoded from a warm cache.
#[cfg(feature = "cube")]
pub const fn hot(sizes: Sizes) -> Problem {
    match sizes {
        Sizes::Full => problem(14336, 4096, FloatType::BF16),
        Sizes::Small => problem(3584, 1024, FloatType::F32),
    }
}

/// Quantized on the device.
#[cfg(feature = "cube")]
pub const fn quantize(sizes: Sizes) -> [Problem; 2] {
    match sizes {
        Sizes::Full => [
            problem(14336, 4096, FloatType::BF16),
            problem(4096, 4096, FloatType::BF16),
        ],
        Sizes::Small => [
            problem(3584, 1024, FloatType::F32),
            problem(1024, 1024, FloatType::F32),
        ],
    }
}

/// Decoded by the CPU path.
pub const HOST: [Problem; 4] = [
    problem(4096, 1024, FloatType::BF16),
    problem(4096, 4096, FloatType::BF16),
    problem(4096, 4096, FloatType::F16),
    problem(4096, 4096, FloatType::F32),
];

/// Quantized by the CPU path.
pub const HOST_QUANTIZE: [Problem; 1] = [problem(4096, 4096, FloatType::BF16)];

/// Decoded by the CPU path and by bitsandbytes' CPU library, from plain scales.
pub const CPU_PEER: [Problem; 3] = [
    problem(4096, 4096, FloatType::BF16),
    problem(4096, 4096, FloatType::F32),
    problem(4096, 4096, FloatType::F16),
];

impl Problem {
    /// Bytes that must move: each packed byte read once, each decoded byte written once (or the
    /// other way round).
    pub fn bytes(&self, config: QuantConfig) -> usize {
        layout(self.shape, config).words() * 4 + self.elems() * self.dtype.size_bytes()
    }

    pub fn elems(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// `bf16/14336x4096`, the tail of a bench's name.
    pub fn id(&self) -> String {
        let [rows, columns] = self.shape;
        format!("{}/{rows}x{columns}", dtype_name(self.dtype))
    }
}

/// Reproducible weights, spread evenly over +-0.02.
pub fn dense(shape: [usize; 2], seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..shape[0] * shape[1])
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let uniform = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            uniform * 0.04
        })
        .collect()
}

/// The bytes of `values`, rounded to `dtype`.
#[cfg(feature = "cube")]
pub fn round_bytes(values: &[f32], dtype: FloatType) -> Vec<u8> {
    fn round<T: FloatElement>(values: &[f32]) -> Vec<u8> {
        let rounded: Vec<T> = values.iter().map(|&value| T::from_f32(value)).collect();
        bytemuck::cast_slice(&rounded).to_vec()
    }
    match dtype {
        FloatType::F16 => round::<f16>(values),
        FloatType::BF16 => round::<bf16>(values),
        FloatType::F32 => round::<f32>(values),
    }
}

/// How a matrix is packed.
///
/// # Panics
/// If its rows are not made of whole blocks and the format wants it.
pub fn layout(shape: [usize; 2], config: QuantConfig) -> PackedLayout {
    PackedLayout::for_shape(&shape, config).expect("a shape that the format has")
}

/// A packed weight.
pub struct Weight {
    pub shape: [usize; 2],
    pub words: Vec<u32>,
    pub layout: PackedLayout,
}

impl Weight {
    /// [`dense`] weights, quantized.
    pub fn new(shape: [usize; 2], config: QuantConfig, seed: u64) -> Self {
        let words = host::quantize(&dense(shape, seed), &shape, config).expect("finite weights");
        Self {
            shape,
            words,
            layout: layout(shape, config),
        }
    }

    /// The weight in its parts.
    pub fn tensor(&self) -> BlockTensor {
        let config = self.layout.config();
        BlockTensor::from_packed(&self.words, &self.shape, config, FloatType::F32)
            .expect("a weight just packed")
    }

    /// What decoding has to give, bit for bit: the host path's result, whose first elements are
    /// held against the plain reference.
    pub fn decoded(&self, dtype: FloatType) -> Vec<u8> {
        match dtype {
            FloatType::F16 => self.decode::<f16>(),
            FloatType::BF16 => self.decode::<bf16>(),
            FloatType::F32 => self.decode::<f32>(),
        }
    }

    fn decode<T: FloatElement>(&self) -> Vec<u8> {
        let mut out = vec![T::zeroed(); self.layout.elems()];
        host::dequantize(&self.words, &self.layout, 0, &mut out);
        let checked = self.layout.elems().min(1 << 16);
        let expected = self.tensor().dequantize_range::<T>(0, checked);
        assert_eq!(
            bytemuck::cast_slice::<T, u8>(&out[..checked]),
            bytemuck::cast_slice::<T, u8>(&expected),
            "the host path differs from the reference"
        );
        bytemuck::cast_slice(&out).to_vec()
    }
}

/// `f16`, `bf16` or `f32`.
pub const fn dtype_name(dtype: FloatType) -> &'static str {
    match dtype {
        FloatType::F16 => "f16",
        FloatType::BF16 => "bf16",
        FloatType::F32 => "f32",
    }
}
