//! Quantizing to the formats that bitsandbytes does not have, shared out over the threads of the rayon
//! pool by rows.

use rayon::prelude::*;

use super::check::check_finite;
use super::description::{BlockShape, NibbleOrder, ScaleType, TensorScale};
use super::float8::{E2M1_MAX, E4M3_MAX, e2m1_code, e4m3_code};
use super::packed::PackedLayout;
use super::spec::{FloatElement, QuantType};
use super::tensor::{Absmax, BlockTensor, CodedScales};
use crate::error::Nf4Error;

/// 0.125 in E4M3: the scale of a block whose own would be zero.
const SMALL_SCALE: u8 = 0x20;

/// Fewer weights than this are quantized by one thread.
const TASK_ELEMS: usize = 1 << 16;

/// Weights whose codes are computed together, so that the compiler can vectorise.
const LANES: usize = 16;

impl BlockTensor {
    /// Quantizes weights of the layout's shape. `tensor_scale` is that of the whole tensor, where
    /// the format has one and it is not to be that of the largest weight.
    ///
    /// # Errors
    /// [`Nf4Error::NonFinite`] at the first NaN or infinite weight.
    pub(super) fn quantize_blocks<T: FloatElement>(
        weight: &[T],
        shape: &[usize],
        layout: &PackedLayout,
        tensor_scale: Option<TensorScale>,
    ) -> Result<Self, Nf4Error> {
        let config = layout.config();
        let bands = Bands::of(layout);
        let maxima = bands.maxima(weight, layout.blocks());
        if maxima.iter().any(|max| !max.is_finite()) {
            check_finite("weight", weight.iter().map(|w| w.to_f32()))?;
        }
        let (absmax, scales) = match config.quant_type {
            QuantType::Nvfp4 => coded(nvfp4_scales(&maxima, tensor_scale), config.scale_type()),
            QuantType::Mxfp4 => {
                let scales = CodedScales {
                    codes: maxima.iter().map(|&max| mxfp4_scale(max)).collect(),
                    tensor_scale: TensorScale::None,
                };
                coded(scales, config.scale_type())
            }
            _ => {
                let scales: Vec<f32> = maxima.iter().map(|&max| fp8_scale(max)).collect();
                (Absmax::Flat(scales.clone()), scales)
            }
        };
        drop(maxima);
        Self::from_parts(
            bands.codes(weight, &scales, config.quant_type),
            absmax,
            shape.to_vec(),
            config.block_size,
            T::FLOAT_TYPE,
            config.quant_type,
        )
    }
}

/// Scales of 8-bit floats, and what each is.
fn coded(scales: CodedScales, scale_type: ScaleType) -> (Absmax, Vec<f32>) {
    let table = scale_type.table(scales.tensor_scale);
    let table = table.expect("scales are 8-bit floats");
    let codes = scales.codes.iter();
    let values = codes.map(|&code| table[usize::from(code)]).collect();
    (Absmax::Coded(scales), values)
}

/// The rows of a weight in bands that share no scale.
struct Bands {
    /// Elements of a row.
    columns: usize,
    /// Elements of a band.
    elems: usize,
    /// Neighbours in a row that share a scale.
    width: usize,
    /// Scales of a band.
    scales: usize,
}

impl Bands {
    fn of(layout: &PackedLayout) -> Self {
        let columns = layout.columns();
        let (rows, width) = match layout.config().format().block {
            BlockShape::Flat(size) | BlockShape::Row(size) => (1, size),
            BlockShape::Tile(high, wide) => (high, wide),
            BlockShape::WholeRow => (1, columns),
        };
        Self {
            columns,
            elems: rows * columns,
            width,
            scales: columns.div_ceil(width),
        }
    }

    /// Bands that one thread takes at least.
    fn min_len(&self) -> usize {
        TASK_ELEMS.div_ceil(self.elems)
    }

    /// The largest magnitude of each block.
    fn maxima<T: FloatElement>(&self, weight: &[T], blocks: usize) -> Vec<f32> {
        let mut maxima = vec![0.0f32; blocks];
        weight
            .par_chunks(self.elems)
            .zip(maxima.par_chunks_mut(self.scales))
            .with_min_len(self.min_len())
            .for_each(|(band, maxima)| {
                for row in band.chunks(self.columns) {
                    for (block, max) in row.chunks(self.width).zip(&mut *maxima) {
                        *max = f32::from_bits(magnitude(block).max(max.to_bits()));
                    }
                }
            });
        maxima
    }

    /// The codes of weights by the scales of their blocks, as in files.
    fn codes<T: FloatElement>(
        &self,
        weight: &[T],
        scales: &[f32],
        quant_type: QuantType,
    ) -> Vec<u8> {
        let mut codes = vec![0; quant_type.code_bytes(weight.len())];
        weight
            .par_chunks(self.elems)
            .zip(codes.par_chunks_mut(quant_type.code_bytes(self.elems)))
            .zip(scales.par_chunks(self.scales))
            .with_min_len(self.min_len())
            .for_each(|((band, codes), scales)| {
                let rows = band.chunks(self.columns);
                let code_rows = codes.chunks_mut(quant_type.code_bytes(self.columns));
                for (row, codes) in rows.zip(code_rows) {
                    let blocks = row.chunks(self.width);
                    let code_blocks = codes.chunks_mut(quant_type.code_bytes(self.width));
                    for ((block, codes), &scale) in blocks.zip(code_blocks).zip(scales) {
                        match quant_type.nibbles() {
                            None => e4m3_codes(block, scale, codes),
                            Some(order) => e2m1_codes(block, scale, order, codes),
                        }
                    }
                }
            });
        codes
    }
}

/// The bits of the largest magnitude. They have the order of magnitudes, NaN after infinity.
fn magnitude<T: FloatElement>(weights: &[T]) -> u32 {
    let mut lanes = [0u32; LANES];
    let (whole, rest) = weights.as_chunks::<LANES>();
    for chunk in whole.iter().map(<[T; LANES]>::as_slice).chain([rest]) {
        for (lane, weight) in lanes.iter_mut().zip(chunk) {
            *lane = (weight.to_f32().to_bits() & 0x7fff_ffff).max(*lane);
        }
    }
    lanes.into_iter().fold(0, u32::max)
}

/// The codes of a block of whole bytes.
fn e2m1_codes<T: FloatElement>(weights: &[T], scale: f32, order: NibbleOrder, out: &mut [u8]) {
    let (whole, _) = weights.as_chunks::<LANES>();
    let (out, _) = out.as_chunks_mut::<{ LANES / 2 }>();
    for (weights, out) in whole.iter().zip(out) {
        let codes = weights.map(|weight| e2m1_code(weight.to_f32() / scale));
        for (byte, pair) in out.iter_mut().zip(codes.as_chunks::<2>().0) {
            *byte = match order {
                NibbleOrder::HighFirst => pair[0] << 4 | pair[1],
                NibbleOrder::LowFirst => pair[0] | pair[1] << 4,
            };
        }
    }
}

fn e4m3_codes<T: FloatElement>(weights: &[T], scale: f32, out: &mut [u8]) {
    for (weight, code) in weights.iter().zip(out) {
        *code = e4m3_code(weight.to_f32() / scale);
    }
}

/// Unless a scale of the tensor is given, it has the largest block's scale become the largest of E4M3.
fn nvfp4_scales(maxima: &[f32], tensor_scale: Option<TensorScale>) -> CodedScales {
    let tensor_scale = tensor_scale.unwrap_or_else(|| {
        let max = maxima.iter().copied().fold(0.0, f32::max);
        TensorScale::Divides(nvfp4_global_scale(max))
    });
    let code = |&max: &f32| match e4m3_code(tensor_scale.undo(max / E2M1_MAX)) {
        0 => SMALL_SCALE,
        code => code,
    };
    CodedScales {
        codes: maxima.iter().map(code).collect(),
        tensor_scale,
    }
}

/// The number by which all scales are divided of an NVFP4 weight, or of several that a fused layer shall
/// decode with one, as compressed-tensors computes it: it makes the scale of the block with the largest magnitude, `max`, the largest of E4M3.
///
/// Without a weight other than zero, or with weights so small that the number would be infinite, it is 1.
pub fn nvfp4_global_scale(max: f32) -> f32 {
    // Two roundings, as PyTorch divides a number by a tensor.
    match (1.0 / max) * (E4M3_MAX * E2M1_MAX) {
        global if global.is_finite() => global,
        _ => 1.0,
    }
}

#[cfg(feature = "peft")]
impl TensorScale {
    /// Whether a weight with this largest magnitude can be quantized with it: the scale of its block is, once
    /// rounded, one that E4M3 has.
    pub(crate) fn fits(self, max: f32) -> bool {
        /// Halfway to what would come next, 480: a tie goes to the even mantissa, that of 448.
        const ROUNDS_TO_MAX: f32 = 464.0;
        let has_reciprocal = self.value().is_some_and(|value| (1.0 / value).is_finite());
        has_reciprocal && (0.0..=ROUNDS_TO_MAX).contains(&self.undo(max / E2M1_MAX))
    }
}

/// The exponent of the largest magnitude less that of the largest level, 4; a mantissa of 1.75 and more
/// counts as the next power of two.
fn mxfp4_scale(max: f32) -> u8 {
    const HALF_OF_LAST_BIT: u32 = 1 << 21;
    const EXPONENT_OF_MAX: u32 = 2;
    let exponent = (max.to_bits() + HALF_OF_LAST_BIT) >> 23;
    exponent.saturating_sub(EXPONENT_OF_MAX) as u8
}

fn fp8_scale(max: f32) -> f32 {
    match max / E4M3_MAX {
        0.0 => 1.0,
        scale => scale,
    }
}
