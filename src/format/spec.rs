//! The parameters of a quantized tensor.

use half::{bf16, f16};

use super::codebook::{E2M1_CODEBOOK, E4M3_CODEBOOK, FP4_CODEBOOK, NF4_CODEBOOK};
use crate::error::Nf4Error;

/// The data type of the codes, with the kind of scales that belongs to it; see
/// [`BlockFormat`](super::BlockFormat) for what each means.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum QuantType {
    /// 4-bit NormalFloat: the quantiles of a normal distribution.
    #[default]
    Nf4,
    /// bitsandbytes' 4-bit float.
    Fp4,
    /// NVIDIA's: E2M1 in blocks of 16, scales in E4M3, and an f32 scale of the whole tensor.
    Nvfp4,
    /// OCP's microscaling format: E2M1 in blocks of 32, scales that are powers of two.
    Mxfp4,
    /// 8-bit E4M3 with an f32 scale for each tile of 128 by 128, as DeepSeek's models have it.
    Fp8Block,
    /// 8-bit E4M3 with an f32 scale for each row ("channel").
    Fp8Channel,
}

impl QuantType {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Nf4,
        Self::Fp4,
        Self::Nvfp4,
        Self::Mxfp4,
        Self::Fp8Block,
        Self::Fp8Channel,
    ];

    /// `nf4` or `fp4`, as in `quant_state`; `nvfp4`, `mxfp4`, `fp8block` or `fp8channel`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
            Self::Nvfp4 => "nvfp4",
            Self::Mxfp4 => "mxfp4",
            Self::Fp8Block => "fp8block",
            Self::Fp8Channel => "fp8channel",
        }
    }

    /// Whether bitsandbytes has it, so that the block size can be chosen and scales can be quantized
    /// to 8 bit.
    pub const fn is_bitsandbytes(self) -> bool {
        matches!(self, Self::Nf4 | Self::Fp4)
    }

    /// Bits of a code, 4 or 8.
    pub const fn bits(self) -> usize {
        match self {
            Self::Nf4 | Self::Fp4 | Self::Nvfp4 | Self::Mxfp4 => 4,
            Self::Fp8Block | Self::Fp8Channel => 8,
        }
    }

    /// Codes in a word of 32 bits.
    pub const fn codes_a_word(self) -> usize {
        32 / self.bits()
    }

    /// Bytes of so many codes.
    pub const fn code_bytes(self, elems: usize) -> usize {
        elems.div_ceil(8 / self.bits())
    }

    /// The values by code, 16 or 256, each to be multiplied by its block's scale.
    pub const fn codebook(self) -> &'static [f32] {
        match self {
            Self::Nf4 => &NF4_CODEBOOK,
            Self::Fp4 => &FP4_CODEBOOK,
            Self::Nvfp4 | Self::Mxfp4 => &E2M1_CODEBOOK,
            Self::Fp8Block | Self::Fp8Channel => &E4M3_CODEBOOK,
        }
    }

    /// The code of an exact zero.
    pub const fn zero_code(self) -> u8 {
        match self {
            Self::Nf4 => 7,
            _ => 0,
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
    /// 16, what NVFP4 has; not among [`ALL`](Self::ALL).
    pub const B16: Self = Self { log2: 4 };
    /// 32, what MXFP4 has.
    pub const B32: Self = Self { log2: 5 };
    /// 128, the sides of a tile of FP8 weights.
    pub const B128: Self = Self { log2: 7 };
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

    /// One of [`ALL`](Self::ALL) or [`B16`](Self::B16).
    fn try_from(elems: usize) -> Result<Self, Nf4Error> {
        if elems == Self::B16.elems() {
            return Ok(Self::B16);
        }
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
/// The default is QLoRA's: NF4, blocks of 64, double quantization in blocks of 256. The formats that
/// are not bitsandbytes' have one configuration each, that of [`of`](Self::of).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct QuantConfig {
    /// The data type of the codes.
    pub quant_type: QuantType,
    /// Weights per scale along a row; of FP8 the side of a tile, and without meaning where a row has
    /// one scale.
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

    /// The configuration of a data type: for NF4 and FP4 blocks of 64 with double quantization.
    pub const fn of(quant_type: QuantType) -> Self {
        let (block_size, nested_block_size) = match quant_type {
            QuantType::Nf4 | QuantType::Fp4 => (BlockSize::B64, Some(BlockSize::B256)),
            QuantType::Nvfp4 => (BlockSize::B16, None),
            QuantType::Mxfp4 => (BlockSize::B32, None),
            QuantType::Fp8Block | QuantType::Fp8Channel => (BlockSize::B128, None),
        };
        Self {
            quant_type,
            block_size,
            nested_block_size,
        }
    }

    /// Checks that the settings go together.
    ///
    /// # Errors
    /// [`Nf4Error::BlockSize`] for a size that the data type does not have, [`Nf4Error::Scales`] for quantized
    /// scales of one whose scales are not; `tensor` is the name put in the error.
    pub fn check(&self, tensor: &str) -> Result<(), Nf4Error> {
        let is_bitsandbytes = self.quant_type.is_bitsandbytes();
        if !is_bitsandbytes && self.nested_block_size.is_some() {
            return Err(Nf4Error::Scales {
                tensor: tensor.into(),
                format: self.quant_type.name(),
                expected: self.scale_type(),
            });
        }
        let is_refused = |size: &BlockSize| match is_bitsandbytes {
            true => *size == BlockSize::B16,
            false => *size != Self::of(self.quant_type).block_size,
        };
        let sizes = [Some(self.block_size), self.nested_block_size];
        if let Some(size) = sizes.into_iter().flatten().find(is_refused) {
            return Err(Nf4Error::BlockSize {
                tensor: tensor.into(),
                given: size.elems() as u64,
            });
        }
        Ok(())
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

/// Evaluates an expression with `$T` as the Rust type of a [`FloatType`].
macro_rules! with_float_type {
    ($float_type:expr, $T:ident => $body:expr) => {
        match $float_type {
            $crate::format::FloatType::F16 => {
                type $T = half::f16;
                $body
            }
            $crate::format::FloatType::BF16 => {
                type $T = half::bf16;
                $body
            }
            $crate::format::FloatType::F32 => {
                type $T = f32;
                $body
            }
        }
    };
}
pub(crate) use with_float_type;

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
