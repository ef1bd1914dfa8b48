//! Quantizing to the formats that bitsandbytes does not have, in plain code.

use super::description::{NibbleOrder, TensorScale};
use super::float8::{E2M1_MAX, E4M3_MAX, e4m3_code};
use super::packed::PackedLayout;
use super::spec::{FloatElement, QuantType};
use super::tensor::{Absmax, BlockTensor, CodedScales};
use crate::error::Nf4Error;

/// 0.125 in E4M3: the scale of a block whose own would be zero.
const SMALL_SCALE: u8 = 0x20;

impl BlockTensor {
    /// Quantizes finite weights of the layout's shape.
    pub(super) fn quantize_blocks<T: FloatElement>(
        weight: &[T],
        shape: &[usize],
        layout: &PackedLayout,
    ) -> Result<Self, Nf4Error> {
        let config = layout.config();
        let maxima = block_maxima(weight, layout);
        let absmax = match config.quant_type {
            QuantType::Nvfp4 => Absmax::Coded(nvfp4_scales(&maxima)),
            QuantType::Mxfp4 => Absmax::Coded(CodedScales {
                codes: maxima.iter().map(|&max| mxfp4_scale(max)).collect(),
                tensor_scale: TensorScale::None,
            }),
            _ => Absmax::Flat(maxima.iter().map(|&max| fp8_scale(max)).collect()),
        };
        let codes = vec![0; config.quant_type.code_bytes(weight.len())];
        let mut tensor = Self::from_parts(
            codes,
            absmax,
            shape.to_vec(),
            config.block_size,
            T::FLOAT_TYPE,
            config.quant_type,
        )?;
        let codes = tensor.codes_of(weight, layout);
        tensor.set_codes(codes);
        Ok(tensor)
    }

    /// The codes of weights by the scales that are there.
    fn codes_of<T: FloatElement>(&self, weight: &[T], layout: &PackedLayout) -> Vec<u8> {
        let quant_type = self.quant_type();
        let run_log2 = layout.run_log2();
        let code = |(index, weight): (usize, &T)| {
            let scale = self.scale(layout.scale_of_run(index >> run_log2));
            quant_type.code(weight.to_f32() / scale)
        };
        let codes: Vec<u8> = weight.iter().enumerate().map(code).collect();
        match quant_type.nibbles() {
            None => codes,
            Some(order) => codes
                .chunks(2)
                .map(|pair| {
                    let second = pair.get(1).copied().unwrap_or(0);
                    match order {
                        NibbleOrder::HighFirst => pair[0] << 4 | second,
                        NibbleOrder::LowFirst => pair[0] | second << 4,
                    }
                })
                .collect(),
        }
    }
}

/// The largest magnitude of each block.
fn block_maxima<T: FloatElement>(weight: &[T], layout: &PackedLayout) -> Vec<f32> {
    let mut maxima = vec![0.0f32; layout.blocks()];
    let runs = weight.chunks(1 << layout.run_log2());
    for (run, weights) in runs.enumerate() {
        let max = &mut maxima[layout.scale_of_run(run)];
        *max = weights
            .iter()
            .fold(*max, |max, w| max.max(w.to_f32().abs()));
    }
    maxima
}

/// The scale of the tensor has the largest block's scale become the largest of E4M3.
fn nvfp4_scales(maxima: &[f32]) -> CodedScales {
    let max = maxima.iter().copied().fold(0.0, f32::max);
    let global = match E4M3_MAX * E2M1_MAX / max {
        global if global.is_finite() => global,
        _ => 1.0,
    };
    let code = |&max: &f32| match e4m3_code(global * (max / E2M1_MAX)) {
        0 => SMALL_SCALE,
        code => code,
    };
    CodedScales {
        codes: maxima.iter().map(code).collect(),
        tensor_scale: TensorScale::Divides(global),
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
