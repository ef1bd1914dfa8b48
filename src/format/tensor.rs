//! The value type of a quantized tensor in host memory.

use super::check::checked_elems;
use super::description::{NibbleOrder, ScaleType, TensorScale};
use super::packed::PackedLayout;
use super::parts::{Floats, ScaleParts, WeightParts};
use super::spec::{BlockSize, FloatType, QuantConfig, QuantType};
use crate::error::Nf4Error;

/// A tensor in a format of codes and block scales, owned by the host.
///
/// It holds exactly what a checkpoint holds: packed codes, scales, shape, block size, the dtype
/// that was quantized and the data type of the codes. With double quantization and blocks of 64 that is about
/// 0.516 byte per weight. A value of this type is always consistent: every constructor checks.
///
/// ```
/// use burn_nf4::format::{BlockTensor, QuantConfig};
///
/// let weight: Vec<f32> = (0..128 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
/// let quantized = BlockTensor::quantize(&weight, &[128, 64], QuantConfig::default())?;
/// let back: Vec<f32> = quantized.dequantize();
/// assert!(weight.iter().zip(&back).all(|(a, b)| (a - b).abs() < 0.16));
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct BlockTensor {
    codes: Vec<u8>,
    absmax: Absmax,
    shape: Vec<usize>,
    block_size: BlockSize,
    dtype: FloatType,
    quant_type: QuantType,
}

/// The scale of each block: in bitsandbytes' formats the largest magnitude in it.
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// One f32 a block.
    Flat(Vec<f32>),
    /// One 8-bit code a block: double quantization.
    Nested(NestedAbsmax),
    /// One 8-bit float a block, as NVFP4 and MXFP4 have it.
    Coded(CodedScales),
}

/// Scales that are 8-bit floats, E4M3 of NVFP4 and E8M0 of MXFP4.
#[derive(Debug, Clone, PartialEq)]
pub struct CodedScales {
    /// One code a block of weights.
    pub codes: Vec<u8>,
    /// The scale of the tensor.
    pub tensor_scale: TensorScale,
}

/// Scales that are quantized themselves.
///
/// The scale of block `b` is `map[codes[b]] * absmax[b / block_size] + offset`, the product and
/// the sum each rounded to f32.
#[derive(Debug, Clone, PartialEq)]
pub struct NestedAbsmax {
    /// One code a block of weights.
    pub codes: Vec<u8>,
    /// One scale a nested block of codes.
    pub absmax: Vec<f32>,
    /// The value of each code; [`DYNAMIC_MAP`](super::DYNAMIC_MAP) unless a checkpoint says
    /// otherwise.
    pub map: Box<[f32; 256]>,
    /// The mean of the scales, taken off before they were quantized.
    pub offset: f32,
    /// Codes a nested block.
    pub block_size: BlockSize,
}

impl BlockTensor {
    /// Puts a tensor together from its parts, as a checkpoint holds them.
    ///
    /// # Shapes
    /// - `codes`: `ceil(n / 2)` bytes, element `2i` in the nibble of byte `i` that the format has first;
    ///   of 8-bit types `n` bytes
    /// - `absmax`: a scale for each [block](super::BlockShape)
    ///
    /// with `n` the product of `shape`.
    ///
    /// # Errors
    /// [`Nf4Error::ElementCount`] for a shape without elements or with too many,
    /// [`Nf4Error::Length`] where a part has another length than the shape asks for,
    /// [`Nf4Error::NonFinite`] for a NaN or infinite offset, map entry or scale of the tensor,
    /// [`Nf4Error::Scales`] for scales of another kind than the data type's, and what
    /// [`PackedLayout::for_shape`] returns.
    pub fn from_parts(
        codes: Vec<u8>,
        absmax: Absmax,
        shape: Vec<usize>,
        block_size: BlockSize,
        dtype: FloatType,
        quant_type: QuantType,
    ) -> Result<Self, Nf4Error> {
        let tensor = Self {
            codes,
            absmax,
            shape,
            block_size,
            dtype,
            quant_type,
        };
        let expected = tensor.config().scale_type();
        let agrees = match &tensor.absmax {
            Absmax::Flat(_) => expected == ScaleType::F32,
            Absmax::Nested(_) => matches!(expected, ScaleType::Nested(_)),
            Absmax::Coded(_) => matches!(expected, ScaleType::E4m3 | ScaleType::E8m0),
        };
        if !agrees {
            return Err(Nf4Error::Scales {
                tensor: "weight".into(),
                format: quant_type.name(),
                expected,
            });
        }
        tensor.parts().check()?;
        Ok(tensor)
    }

    /// The parts, where they lie.
    pub(crate) fn parts(&self) -> WeightParts<'_> {
        WeightParts {
            codes: &self.codes,
            scales: match &self.absmax {
                Absmax::Flat(scales) => ScaleParts::Flat(Floats::Values(scales)),
                Absmax::Nested(nested) => ScaleParts::Nested {
                    codes: &nested.codes,
                    absmax: Floats::Values(&nested.absmax),
                    map: &nested.map,
                    offset: nested.offset,
                    block_size: nested.block_size,
                },
                Absmax::Coded(scales) => ScaleParts::Coded {
                    codes: &scales.codes,
                    tensor_scale: scales.tensor_scale,
                },
            },
            shape: &self.shape,
            dtype: self.dtype,
            config: self.config(),
        }
    }

    /// Copies parts to the heap.
    #[cfg(feature = "checkpoint")]
    pub(crate) fn copy_of(parts: &WeightParts<'_>) -> Result<Self, Nf4Error> {
        let absmax = match &parts.scales {
            ScaleParts::Flat(scales) => Absmax::Flat(scales.to_vec()),
            ScaleParts::Nested {
                codes,
                absmax,
                map,
                offset,
                block_size,
            } => Absmax::Nested(NestedAbsmax {
                codes: codes.to_vec(),
                absmax: absmax.to_vec(),
                map: Box::new(**map),
                offset: *offset,
                block_size: *block_size,
            }),
            ScaleParts::Coded {
                codes,
                tensor_scale,
            } => Absmax::Coded(CodedScales {
                codes: codes.to_vec(),
                tensor_scale: *tensor_scale,
            }),
        };
        Self::from_parts(
            parts.codes.to_vec(),
            absmax,
            parts.shape.to_vec(),
            parts.config.block_size,
            parts.dtype,
            parts.config.quant_type,
        )
    }

    /// A tensor that decodes to zeros.
    ///
    /// # Errors
    /// What [`PackedLayout::for_shape`] returns.
    pub fn zeros(shape: &[usize], config: QuantConfig, dtype: FloatType) -> Result<Self, Nf4Error> {
        let elems = checked_elems("weight", shape)?;
        let blocks = PackedLayout::for_shape(shape, config)?.blocks();
        let quant_type = config.quant_type;
        let code = match quant_type.bits() {
            4 => quant_type.zero_code() << 4 | quant_type.zero_code(),
            _ => quant_type.zero_code(),
        };
        Ok(Self {
            codes: vec![code; quant_type.code_bytes(elems)],
            absmax: match config.scale_type() {
                ScaleType::F32 => Absmax::Flat(vec![0.0; blocks]),
                ScaleType::Nested(block_size) => {
                    Absmax::Nested(NestedAbsmax::quantize(&vec![0.0; blocks], block_size))
                }
                ScaleType::E4m3 | ScaleType::E8m0 => Absmax::Coded(CodedScales {
                    codes: vec![0; blocks],
                    tensor_scale: match config.format().has_tensor_scale {
                        false => TensorScale::None,
                        true => TensorScale::Multiplies(1.0),
                    },
                }),
            },
            shape: shape.to_vec(),
            block_size: config.block_size,
            dtype,
            quant_type,
        })
    }

    /// The packed codes, as in files: one a byte, or two in the [order](super::NibbleOrder) of the format.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The scales.
    pub fn absmax(&self) -> &Absmax {
        &self.absmax
    }

    /// The shape of the weight; `[out_features, in_features]` for a linear layer.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Weights per scale.
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// The dtype that the weight had before it was quantized.
    pub fn dtype(&self) -> FloatType {
        self.dtype
    }

    /// The data type of the codes.
    pub fn quant_type(&self) -> QuantType {
        self.quant_type
    }

    /// Number of weights.
    pub fn elems(&self) -> usize {
        self.shape.iter().product()
    }

    /// Number of blocks of weights.
    pub fn blocks(&self) -> usize {
        match &self.absmax {
            Absmax::Flat(scales) => scales.len(),
            Absmax::Nested(nested) => nested.codes.len(),
            Absmax::Coded(scales) => scales.codes.len(),
        }
    }

    /// The settings that quantize a weight to this form.
    pub fn config(&self) -> QuantConfig {
        QuantConfig {
            quant_type: self.quant_type,
            block_size: self.block_size,
            nested_block_size: match &self.absmax {
                Absmax::Flat(_) | Absmax::Coded(_) => None,
                Absmax::Nested(nested) => Some(nested.block_size),
            },
        }
    }

    /// The code of weight `index` in the flat order.
    ///
    /// # Panics
    /// If `index` is not below [`elems`](Self::elems).
    pub fn code(&self, index: usize) -> u8 {
        assert!(index < self.elems(), "weight {index} of {}", self.elems());
        let first = index.is_multiple_of(2);
        match self.quant_type.nibbles() {
            None => self.codes[index],
            Some(NibbleOrder::HighFirst) if first => self.codes[index / 2] >> 4,
            Some(NibbleOrder::LowFirst) if !first => self.codes[index / 2] >> 4,
            Some(_) => self.codes[index / 2] & 15,
        }
    }

    /// Bytes held: codes, scales, and with double quantization the 256-entry map.
    pub fn size_bytes(&self) -> usize {
        let scales = match &self.absmax {
            Absmax::Flat(scales) => 4 * scales.len(),
            Absmax::Nested(nested) => nested.codes.len() + 4 * (nested.absmax.len() + 256 + 1),
            Absmax::Coded(scales) => scales.codes.len() + 4,
        };
        self.codes.len() + scales
    }
}
