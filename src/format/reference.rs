//! The slow, plain implementation that everything else is checked against.
//!
//! The arithmetic is bitsandbytes' to the last bit:
//!
//! ```text
//! absmax = rn(rn(map[code] * nested_absmax) + offset)    two f32 roundings, never an FMA
//! value  = T(rn(codebook[code] * absmax))                one f32 product, then one cast
//! ```
//!
//! Rust never contracts `a * b + c`, so plain expressions do here.

use super::check::{check_finite, check_len, checked_elems};
use super::codebook::{
    DYNAMIC_MAP, E4M3_CODEBOOK, FP4_CODE_BY_LEVEL, FP4_THRESHOLDS, NF4_THRESHOLDS,
};
use super::description::{ScaleType, TensorScale};
use super::float8::{e2m1_code, e4m3_code, e8m0_value};
use super::packed::PackedLayout;
use super::reciprocal::reciprocal;
use super::spec::{BlockSize, FloatElement, QuantConfig, QuantType};
use super::tensor::{Absmax, BlockTensor, NestedAbsmax};
use crate::error::Nf4Error;

impl NestedAbsmax {
    /// The scale of block `block`.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn scale(&self, block: usize) -> f32 {
        let product =
            self.map[self.codes[block] as usize] * self.absmax[block >> self.block_size.log2()];
        product + self.offset
    }

    /// Quantizes scales to 8 bit.
    ///
    /// The offset is the mean of the scales. bitsandbytes takes it with a parallel f32 sum whose
    /// order is not specified; ours is summed as in [`SumF32x2`] and lies within 2^-22 of the
    /// exact mean, relatively, as bitsandbytes' does. Codes and nested scales follow exactly from
    /// the offset.
    pub fn quantize(scales: &[f32], block_size: BlockSize) -> Self {
        Self::quantize_with_offset(scales, block_size, SumF32x2::mean(scales))
    }

    /// Quantizes scales to 8 bit around a given offset.
    pub fn quantize_with_offset(scales: &[f32], block_size: BlockSize, offset: f32) -> Self {
        let mut codes = Vec::with_capacity(scales.len());
        let mut absmax = Vec::with_capacity(block_size.blocks(scales.len()));
        for block in scales.chunks(block_size.elems()) {
            let (scale, inverse) = normalizer(block.iter().map(|scale| scale - offset));
            absmax.push(scale);
            codes.extend(block.iter().map(|scale| {
                if inverse.is_infinite() {
                    0 // all scales equal the offset; any code decodes to it
                } else {
                    nested_code((scale - offset) * inverse)
                }
            }));
        }
        Self {
            codes,
            absmax,
            map: Box::new(DYNAMIC_MAP),
            offset,
            block_size,
        }
    }
}

impl BlockTensor {
    /// Quantizes a row-major weight.
    ///
    /// For NF4 and FP4 the result is bitsandbytes' (CUDA) to the bit, with these exceptions. An all-zero block gets
    /// the code of zero and so decodes to exact zeros, where bitsandbytes' kernel divides by zero;
    /// as there, a block whose absmax is subnormal counts as all-zero, and one whose absmax is above
    /// 2^126 (8.5e37) decodes to zeros, as its reciprocal is flushed to zero. The offset of the nested
    /// scales can differ in its last bits, see [`NestedAbsmax::quantize`]. And f32 weights that
    /// fall on a threshold to within an ulp can get the neighbouring code, see
    /// [`reciprocal`](super::reciprocal()).
    ///
    /// NVFP4 and MXFP4 are quantized as by compressed-tensors, the scale of the tensor being one that
    /// divides; FP8 so that the largest magnitude of a tile or row becomes 448, and with a scale of 1
    /// where all are zero.
    ///
    /// # Shapes
    /// - `weight`: as many elements as the product of `shape`
    ///
    /// # Errors
    /// What [`PackedLayout::for_shape`] returns, [`Nf4Error::Length`] if `weight` does
    /// not fill the shape, [`Nf4Error::NonFinite`] at the first NaN or infinite weight.
    pub fn quantize<T: FloatElement>(
        weight: &[T],
        shape: &[usize],
        config: QuantConfig,
    ) -> Result<Self, Nf4Error> {
        let elems = checked_elems("weight", shape)?;
        check_len("weight", elems, weight.len())?;
        let layout = PackedLayout::for_shape(shape, config)?;
        if !config.quant_type.is_bitsandbytes() {
            return Self::quantize_blocks(weight, shape, &layout, None);
        }
        check_finite("weight", weight.iter().map(|w| w.to_f32()))?;

        let quant_type = config.quant_type;
        let mut codes = vec![0u8; elems.div_ceil(2)];
        let mut scales = Vec::with_capacity(config.block_size.blocks(elems));
        let block_bytes = config.block_size.elems() / 2;
        for (block, packed) in weight
            .chunks(config.block_size.elems())
            .zip(codes.chunks_mut(block_bytes))
        {
            let (absmax, inverse) = normalizer(block.iter().map(|w| w.to_f32()));
            scales.push(absmax);
            for (pair, byte) in block.chunks(2).zip(packed) {
                let code = |i: usize| match pair.get(i) {
                    Some(w) if absmax > 0.0 => quant_type.code(w.to_f32() * inverse),
                    _ => quant_type.zero_code(),
                };
                *byte = code(0) << 4 | code(1);
            }
        }

        let absmax = match config.nested_block_size {
            None => Absmax::Flat(scales),
            Some(block_size) => Absmax::Nested(NestedAbsmax::quantize(&scales, block_size)),
        };
        Self::from_parts(
            codes,
            absmax,
            shape.to_vec(),
            config.block_size,
            T::FLOAT_TYPE,
            quant_type,
        )
    }

    /// Quantizes a row-major weight to NVFP4 with a given scale of the tensor, as for layers that others
    /// fuse into one and decode with one scale: see [`nvfp4_global_scale`](super::nvfp4_global_scale).
    /// Scales of blocks that would be too large for E4M3 become 448.
    ///
    /// # Shapes
    /// - `weight`: as many elements as the product of `shape`
    ///
    /// # Errors
    /// Those of [`quantize`](Self::quantize), and [`Nf4Error::NonFinite`] for a scale of the tensor that is
    /// not finite or whose reciprocal is not, [`Nf4Error::Length`] without one.
    pub fn quantize_nvfp4<T: FloatElement>(
        weight: &[T],
        shape: &[usize],
        tensor_scale: TensorScale,
    ) -> Result<Self, Nf4Error> {
        let config = QuantConfig::of(QuantType::Nvfp4);
        let layout = PackedLayout::for_shape(shape, config)?;
        check_len("weight", layout.elems(), weight.len())?;
        tensor_scale.check(config)?;
        // Weights are divided by a scale that multiplies.
        let reciprocal = tensor_scale.value().map(|value| 1.0 / value);
        check_finite("1 / scale of the tensor", reciprocal)?;
        Self::quantize_blocks(weight, shape, &layout, Some(tensor_scale))
    }

    /// The scale of block `block`, decoded to f32.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn scale(&self, block: usize) -> f32 {
        match self.absmax() {
            Absmax::Flat(scales) => scales[block],
            Absmax::Nested(nested) => nested.scale(block),
            Absmax::Coded(scales) => {
                let code = scales.codes[block];
                scales.tensor_scale.apply(match self.config().scale_type() {
                    ScaleType::E8m0 => e8m0_value(code),
                    _ => E4M3_CODEBOOK[code as usize],
                })
            }
        }
    }

    /// Decodes the whole weight, row-major.
    pub fn dequantize<T: FloatElement>(&self) -> Vec<T> {
        self.dequantize_range(0, self.elems())
    }

    /// Decodes `len` weights from flat index `start` on.
    ///
    /// # Panics
    /// If the range leaves the weight.
    pub fn dequantize_range<T: FloatElement>(&self, start: usize, len: usize) -> Vec<T> {
        let codebook = self.quant_type().codebook();
        let layout = self.packed_layout();
        (start..start + len)
            .map(|index| {
                let scale = self.scale(layout.scale_of_run(index >> layout.run_log2()));
                T::from_f32(codebook[self.code(index) as usize] * scale)
            })
            .collect()
    }
}

impl QuantType {
    /// The code of a value that was divided by its block's scale: of NF4 and FP4 from -1 to 1, of
    /// E2M1 from -6 to 6, of E4M3 from -448 to 448.
    pub fn code(self, normalized: f32) -> u8 {
        match self {
            Self::Nf4 => nf4_code(normalized),
            Self::Fp4 => fp4_code(normalized),
            Self::Nvfp4 | Self::Mxfp4 => e2m1_code(normalized),
            Self::Fp8Block | Self::Fp8Channel => e4m3_code(normalized),
        }
    }
}

/// The largest magnitude of a block and the factor that normalises the block.
///
/// Subnormal results of either are flushed to zero, as in bitsandbytes, which is built with
/// `-use_fast_math`; the factor is [`reciprocal`]. With a magnitude of zero it is infinite and must
/// not be used.
pub fn normalizer(block: impl Iterator<Item = f32>) -> (f32, f32) {
    let absmax = flush(block.fold(0.0f32, |max, value| max.max(value.abs())));
    (absmax, reciprocal(absmax))
}

fn flush(value: f32) -> f32 {
    if value < f32::MIN_POSITIVE {
        0.0
    } else {
        value
    }
}

/// The NF4 code of a normalised value: thresholds strictly below it, so ties go down.
pub fn nf4_code(normalized: f32) -> u8 {
    NF4_THRESHOLDS.iter().filter(|&&t| normalized > t).count() as u8
}

/// Tables to find an NF4 code in one step: cell `c` reaches half its width to either side of
/// `c / 16 - 1`. A value in it has the cell's code, plus one if it lies above the cell's threshold.
///
/// No two thresholds share a cell and none is near a border. Only cells 0 to 32 can be reached by
/// normalised values; 64 make indices safe by a mask.
pub fn nf4_cells() -> ([f32; 64], [u32; 64]) {
    let mut thresholds = [f32::INFINITY; 64];
    let mut codes = [0; 64];
    for threshold in NF4_THRESHOLDS {
        let cell = (threshold * 16.0 + 16.0).round() as usize;
        thresholds[cell] = threshold;
        codes[cell + 1..].iter_mut().for_each(|code| *code += 1);
    }
    (thresholds, codes)
}

/// The FP4 code of a normalised value; ties go to the smaller magnitude.
pub fn fp4_code(normalized: f32) -> u8 {
    let magnitude = normalized.abs();
    let level = FP4_THRESHOLDS.iter().filter(|&&t| magnitude > t).count();
    let sign = if normalized < 0.0 { 8 } else { 0 };
    FP4_CODE_BY_LEVEL[level] + sign
}

/// The 8-bit code of a normalised nested scale: the nearest entry of [`DYNAMIC_MAP`], midpoints
/// going down.
pub fn nested_code(normalized: f32) -> u8 {
    DYNAMIC_MAP
        .windows(2)
        .take_while(|pair| normalized > (pair[0] + pair[1]) * 0.5)
        .count() as u8
}

/// A sum of f32 values carried as an unevaluated pair, in an order that every implementation
/// follows, so that host and devices agree to the bit.
///
/// The order: values are summed in chunks of [`CHUNK`](Self::CHUNK), and then the chunks' sums in
/// the same way. To sum a list, item `i` goes to lane `i % 256`, each lane adds its items in
/// ascending order, and lane `l` takes in lane `l + h` for `h` = 128, 64, … 1. Additions are
/// Knuth's error-free `TwoSum`, so the pair is good to about 2^-45 relatively for non-negative
/// values.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SumF32x2 {
    /// The rounded sum.
    pub high: f32,
    /// What rounding took off it.
    pub low: f32,
}

impl SumF32x2 {
    /// Lanes of the sum.
    pub const LANES: usize = 256;
    /// Values summed to one partial sum.
    pub const CHUNK: usize = 4096;
    /// 2^-32: what values are multiplied with where their sum overflows.
    pub const SMALLER: f32 = 1.0 / (1u64 << 32) as f32;

    /// Adds another sum.
    pub fn plus(self, other: Self) -> Self {
        let sum = self.high + other.high;
        let other_part = sum - self.high;
        let error = (self.high - (sum - other_part)) + (other.high - other_part);
        let low = self.low + other.low + error;
        // Renormalise, so that `high` is the rounded value of the pair.
        let high = sum + low;
        Self {
            high,
            low: low - (high - sum),
        }
    }

    /// Sums a list in the specified order, without chunks.
    pub fn of(items: impl Iterator<Item = Self>) -> Self {
        let mut lanes = [Self::default(); Self::LANES];
        for (i, item) in items.enumerate() {
            let lane = &mut lanes[i % Self::LANES];
            *lane = lane.plus(item);
        }
        let mut half = Self::LANES / 2;
        while half > 0 {
            for lane in 0..half {
                lanes[lane] = lanes[lane].plus(lanes[lane + half]);
            }
            half /= 2;
        }
        lanes[0]
    }

    /// The mean of `values`: the sum rounded to f32, times [`inverse_count`](Self::inverse_count).
    ///
    /// Four roundings at most, so within 2^-22 of the exact mean, relatively. A product rather
    /// than a quotient, because WGSL does not ask for correctly rounded division. Finite values have
    /// a finite mean: where their sum overflows, it is [`large_mean`](Self::large_mean).
    pub fn mean(values: &[f32]) -> f32 {
        let partial = |chunk: &[f32]| Self::of(chunk.iter().map(|&high| Self { high, low: 0.0 }));
        Self::of(values.chunks(Self::CHUNK).map(partial)).mean_of(values)
    }

    /// The mean of values that were summed to this.
    pub(crate) fn mean_of(self, values: &[f32]) -> f32 {
        if self.high.is_finite() {
            self.high * Self::inverse_count(values.len())
        } else {
            Self::large_mean(values)
        }
    }

    /// The mean of values whose sum overflows: each times [`SMALLER`](Self::SMALLER), added up one
    /// after the other, and the mean brought back to size, at most [`f32::MAX`].
    pub fn large_mean(values: &[f32]) -> f32 {
        let sum = values.iter().fold(Self::default(), |sum, value| {
            let high = value * Self::SMALLER;
            sum.plus(Self { high, low: 0.0 })
        });
        let mean = sum.high * Self::inverse_count(values.len());
        (mean * (1.0 / Self::SMALLER)).min(f32::MAX)
    }

    /// The reciprocal of a count, rounded to f32.
    pub fn inverse_count(count: usize) -> f32 {
        1.0 / count as f32
    }
}
