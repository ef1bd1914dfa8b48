//! The parameters of a quantized tensor.

use half::{bf16, f16};

use super::codebook::{FP4_CODEBOOK, NF4_CODEBOOK};
use crate::error::Nf4Error;

/// The 4-bit data type of the codes.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum QuantType {
    /// 4-bit NormalFloat: the quantiles of a normal distribution.
    #[default]
    Nf4,
    /// 4-bit float with two exponent bits and one mantissa bit.
    Fp4,
}

impl QuantType {
    /// The name used in `quant_state`: `nf4` or `fp4`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// The sixteen values by code, each to be multiplied by its block's scale.
    pub const fn codebook(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4_CODEBOOK,
            Self::Fp4 => &FP4_CODEBOOK,
        }
    }

    /// The code of an exact zero.
    pub const fn zero_code(self) -> u8 {
        match self {
            Self::Nf4 => 7,
            Self::Fp4 => 0,
        }
    }

    /// Reads the name used in `quant_state`.
    ///
    /// # Errors
    /// [`Nf4Error::QuantType`] for any other name; `tensor` is the key that it names.
    pub fn from_name(name: &str, tensor: &str) -> Result<Self, Nf4Error> {
        match name {
            "nf4" => Ok(Self::Nf4),
            "fp4" => Ok(Self::Fp4),
            _ => Err(Nf4Error::QuantType {
                tensor: tensor.into(),
                given: name.into(),
            }),
        }
    }
}

/// The number of consecutive weights that share a scale.
///
/// Blocks run over the flat row-major weight, so they cross rows where the row length is not a
/// multiple of the size; the last block may be partial.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "usize", into = "usize")]
pub struct BlockSize {
    log2: u8,
}

impl BlockSize {
    /// The sizes that bitsandbytes knows, ascending.
    pub const ALL: [Self; 8] = [
        Self { log2: 5 },
        Self { log2: 6 },
        Self { log2: 7 },
        Self { log2: 8 },
        Self { log2: 9 },
        Self { log2: 10 },
        Self { log2: 11 },
        Self { log2: 12 },
    ];
    /// 64, what QLoRA uses for weights.
    pub const B64: Self = Self { log2: 6 };
    /// 256, what bitsandbytes uses for the scales of the scales.
    pub const B256: Self = Self { log2: 8 };

    /// Checks a size.
    ///
    /// # Errors
    /// [`Nf4Error::BlockSize`] unless it is a power of two from 32 to 4096; `tensor` is the name
    /// put in the error.
    pub fn new(elems: u64, tensor: &str) -> Result<Self, Nf4Error> {
        Self::ALL
            .into_iter()
            .find(|size| size.elems() as u64 == elems)
            .ok_or_else(|| Nf4Error::BlockSize {
                tensor: tensor.into(),
                given: elems,
            })
    }

    /// Elements in a full block.
    pub const fn elems(self) -> usize {
        1 << self.log2
    }

    /// Base-2 logarithm of the size.
    pub const fn log2(self) -> u32 {
        self.log2 as u32
    }

    /// Blocks needed for `elems` elements, the last one possibly partial.
    pub const fn blocks(self, elems: usize) -> usize {
        elems.div_ceil(self.elems())
    }
}

impl Default for BlockSize {
    fn default() -> Self {
        Self::B64
    }
}

impl TryFrom<usize> for BlockSize {
    type Error = Nf4Error;

    fn try_from(elems: usize) -> Result<Self, Nf4Error> {
        Self::new(elems as u64, "weight")
    }
}

impl From<BlockSize> for usize {
    fn from(size: BlockSize) -> Self {
        size.elems()
    }
}

/// How to quantize.
///
/// The default is QLoRA's: NF4, blocks of 64, double quantization in blocks of 256.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct QuantConfig {
    /// The 4-bit data type.
    pub quant_type: QuantType,
    /// Weights per scale.
    pub block_size: BlockSize,
    /// Scales per nested scale where the scales are quantized to 8 bit too ("double quantization",
    /// `bnb_4bit_use_double_quant`), `None` where they stay f32.
    pub nested_block_size: Option<BlockSize>,
}

impl Default for QuantConfig {
    fn default() -> Self {
        Self {
            quant_type: QuantType::Nf4,
            block_size: BlockSize::B64,
            nested_block_size: Some(BlockSize::B256),
        }
    }
}

impl QuantConfig {
    /// The default with plain f32 scales.
    pub fn flat() -> Self {
        Self {
            nested_block_size: None,
            ..Self::default()
        }
    }
}

/// The floating-point types that weights are quantized from and decoded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum FloatType {
    /// IEEE half precision.
    #[serde(rename = "float16")]
    F16,
    /// bfloat16.
    #[serde(rename = "bfloat16")]
    BF16,
    /// IEEE single precision.
    #[serde(rename = "float32")]
    F32,
}

impl FloatType {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F16, Self::BF16, Self::F32];

    /// The name used in `quant_state`: `float16`, `bfloat16` or `float32`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::F32 => "float32",
        }
    }

    /// Size of an element.
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
        }
    }

    /// Reads the name used in `quant_state`, with or without a leading `torch.`.
    ///
    /// # Errors
    /// [`Nf4Error::Dtype`] for any other name; `tensor` is the key that it names.
    pub fn from_name(name: &str, tensor: &str) -> Result<Self, Nf4Error> {
        match name.strip_prefix("torch.").unwrap_or(name) {
            "float16" => Ok(Self::F16),
            "bfloat16" => Ok(Self::BF16),
            "float32" => Ok(Self::F32),
            _ => Err(Nf4Error::Dtype {
                tensor: tensor.into(),
                expected: "float16, bfloat16 or float32".into(),
                given: name.into(),
            }),
        }
    }
}

/// A Rust type for each [`FloatType`]: f16, bf16 and f32.
///
/// Sealed, because vector code reads and writes elements by their [`FLOAT_TYPE`](Self::FLOAT_TYPE).
pub trait FloatElement: sealed::Sealed + bytemuck::Pod + Send + Sync + 'static {
    /// The type's description.
    const FLOAT_TYPE: FloatType;
    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// Widens exactly.
    fn to_f32(self) -> f32;
}

/// Nobody else can claim to be a float:
///
/// ```compile_fail
/// use burn_nf4::format::{FloatElement, FloatType};
///
/// #[repr(transparent)]
/// #[derive(Clone, Copy)]
/// struct Byte(u8);
/// unsafe impl bytemuck::Zeroable for Byte {}
/// unsafe impl bytemuck::Pod for Byte {}
/// impl FloatElement for Byte {
///     const FLOAT_TYPE: FloatType = FloatType::F32;
///     fn from_f32(value: f32) -> Self {
///         Self(value as u8)
///     }
///     fn to_f32(self) -> f32 {
///         self.0.into()
///     }
/// }
/// ```
mod sealed {
    pub trait Sealed {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
    impl Sealed for f32 {}
}

impl FloatElement for f16 {
    const FLOAT_TYPE: FloatType = FloatType::F16;
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl FloatElement for bf16 {
    const FLOAT_TYPE: FloatType = FloatType::BF16;
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

impl FloatElement for f32 {
    const FLOAT_TYPE: FloatType = FloatType::F32;
    fn from_f32(value: f32) -> Self {
        value
    }
    fn to_f32(self) -> f32 {
        self
    }
}
