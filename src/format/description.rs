//! What the formats have in common, and where they differ.

use super::check::{check_finite, check_len};
use super::codebook::E4M3_CODEBOOK;
use super::float8::e8m0_value;
use super::spec::{BlockSize, QuantConfig, QuantType};
use crate::error::Nf4Error;

/// A format of packed weights: a value is the level of its code times the scale of its block.
///
/// | format | levels | nibbles | block | scale | of the whole tensor |
/// |---|---|---|---|---|---|
/// | NF4, FP4 | 16 levels | high first | 32 to 4096 in the flat weight | f32, or 8-bit codes of nested scales | |
/// | NVFP4 | E2M1 | low first | 16 of a row | E4M3 | f32, which divides or multiplies |
/// | MXFP4 | E2M1 | low first | 32 of a row | E8M0 | |
/// | FP8 in tiles | E4M3 | | 128 rows by 128 | f32 | |
/// | FP8 by rows | E4M3 | | a row | f32 | |
///
/// ```
/// use burn_nf4::format::{BlockShape, NibbleOrder, QuantConfig, QuantType, ScaleType};
///
/// let nvfp4 = QuantConfig::of(QuantType::Nvfp4).format();
/// assert_eq!(nvfp4.levels[7], 6.0);
/// assert_eq!(nvfp4.nibbles, Some(NibbleOrder::LowFirst));
/// assert_eq!(nvfp4.block, BlockShape::Row(16));
/// assert_eq!(nvfp4.scale, ScaleType::E4m3);
/// assert!(nvfp4.has_tensor_scale);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockFormat {
    /// The values by code, 16 or 256.
    pub levels: &'static [f32],
    /// Which code of a byte comes first; `None` where a code is a byte.
    pub nibbles: Option<NibbleOrder>,
    /// The weights that share a scale.
    pub block: BlockShape,
    /// What the scales are.
    pub scale: ScaleType,
    /// Whether all scales are multiplied with one f32 number, or divided by it.
    pub has_tensor_scale: bool,
}

/// Which of the two codes in a byte is that of the even element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NibbleOrder {
    /// The one in the upper four bits.
    HighFirst,
    /// The one in the lower four bits.
    LowFirst,
}

/// The weights that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockShape {
    /// So many neighbours in the flat row-major weight, across the ends of rows.
    Flat(usize),
    /// So many neighbours of a row, whose length is a multiple of it.
    Row(usize),
    /// A tile of so many rows and columns; the last ones may be partial.
    Tile(usize, usize),
    /// A whole row.
    WholeRow,
}

/// What the scales of a format are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleType {
    /// f32.
    F32,
    /// 8-bit codes of a table of values, with an f32 scale for each block of this many, and an f32
    /// offset ("double quantization").
    Nested(BlockSize),
    /// 8-bit floats with four exponent bits and three mantissa bits.
    E4m3,
    /// Exponents of two, biased by 127.
    E8m0,
}

impl ScaleType {
    /// The scales by code, for scales that are 8-bit floats: times or divided by the scale of the
    /// tensor, rounded to f32.
    pub fn table(self, tensor_scale: TensorScale) -> Option<Box<[f32; 256]>> {
        let value = match self {
            Self::F32 | Self::Nested(_) => return None,
            Self::E4m3 => |code: usize| E4M3_CODEBOOK[code],
            Self::E8m0 => |code: usize| e8m0_value(code as u8),
        };
        let mut table = Box::new([0.0; 256]);
        for (code, entry) in table.iter_mut().enumerate() {
            *entry = tensor_scale.apply(value(code));
        }
        Some(table)
    }
}

/// An f32 scale of a whole tensor.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum TensorScale {
    /// There is none.
    #[default]
    None,
    /// Scales are divided by it: compressed-tensors' `weight_global_scale`.
    Divides(f32),
    /// Scales are multiplied with it: ModelOpt's `weight_scale_2`.
    Multiplies(f32),
}

impl TensorScale {
    /// A scale of a block, with that of the tensor: one rounding to f32.
    pub fn apply(self, scale: f32) -> f32 {
        match self {
            Self::None => scale,
            Self::Divides(by) => scale / by,
            Self::Multiplies(by) => scale * by,
        }
    }

    /// The reverse of [`apply`](Self::apply).
    pub(super) fn undo(self, scale: f32) -> f32 {
        match self {
            Self::None => scale,
            Self::Divides(by) => by * scale,
            Self::Multiplies(by) => scale / by,
        }
    }

    /// The number, if there is one.
    pub const fn value(self) -> Option<f32> {
        match self {
            Self::None => None,
            Self::Divides(value) | Self::Multiplies(value) => Some(value),
        }
    }

    /// Checks that it is there if the format has one, and that scales can be computed with it.
    pub(super) fn check(self, config: QuantConfig) -> Result<(), Nf4Error> {
        let name = "scale of the tensor";
        let count = usize::from(self.value().is_some());
        check_len(name, usize::from(config.format().has_tensor_scale), count)?;
        check_finite(name, self.value())?;
        // Divided by zero, every scale is infinite.
        match self {
            Self::Divides(by) => check_finite("1 / scale of the tensor", [1.0 / by]),
            _ => Ok(()),
        }
    }

    /// Two words for a device image: the number and what it does.
    pub(super) const fn words(self) -> [u32; 2] {
        match self {
            Self::None => [0, 0],
            Self::Divides(by) => [by.to_bits(), 1],
            Self::Multiplies(by) => [by.to_bits(), 2],
        }
    }

    /// The reverse of [`words`](Self::words).
    pub(super) const fn of_words([value, kind]: [u32; 2]) -> Self {
        match kind {
            1 => Self::Divides(f32::from_bits(value)),
            2 => Self::Multiplies(f32::from_bits(value)),
            _ => Self::None,
        }
    }
}

impl QuantType {
    /// Which code of a byte comes first; `None` where a code is a byte.
    pub const fn nibbles(self) -> Option<NibbleOrder> {
        match self {
            Self::Nf4 | Self::Fp4 => Some(NibbleOrder::HighFirst),
            Self::Nvfp4 | Self::Mxfp4 => Some(NibbleOrder::LowFirst),
            Self::Fp8Block | Self::Fp8Channel => None,
        }
    }
}

impl QuantConfig {
    /// What the format is made of.
    pub const fn format(&self) -> BlockFormat {
        let size = self.block_size.elems();
        BlockFormat {
            levels: self.quant_type.codebook(),
            nibbles: self.quant_type.nibbles(),
            block: match self.quant_type {
                QuantType::Nf4 | QuantType::Fp4 => BlockShape::Flat(size),
                QuantType::Nvfp4 | QuantType::Mxfp4 => BlockShape::Row(size),
                QuantType::Fp8Block => BlockShape::Tile(size, size),
                QuantType::Fp8Channel => BlockShape::WholeRow,
            },
            scale: self.scale_type(),
            has_tensor_scale: matches!(self.quant_type, QuantType::Nvfp4),
        }
    }

    /// What the scales are.
    pub const fn scale_type(&self) -> ScaleType {
        match (self.quant_type, self.nested_block_size) {
            (QuantType::Nvfp4, _) => ScaleType::E4m3,
            (QuantType::Mxfp4, _) => ScaleType::E8m0,
            (QuantType::Fp8Block | QuantType::Fp8Channel, _) | (_, None) => ScaleType::F32,
            (QuantType::Nf4 | QuantType::Fp4, Some(size)) => ScaleType::Nested(size),
        }
    }
}
