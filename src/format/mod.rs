//! The [formats](BlockFormat) of quantized weights on the host: tables, block sizes, scales, the device image of
//! a weight, and a plain reference implementation. No GPU and no Burn in here.
//!
//! # Exact to the bit
//!
//! In every format a value is its level times the scale of its block, and what differs is where the scale is from:
//!
//! ```text
//! value = T(rn(levels[code] * scale))               one f32 product, one cast to f16, bf16 or f32
//!
//! scale = rn(rn(map[code] * absmax) + offset)       NF4, FP4 with nested scales: two roundings in f32, never an FMA
//! scale = rn(E4M3 / tensor), rn(E4M3 * tensor)      NVFP4, of which the tensor has a scale that divides or multiplies:
//!                                                   one rounding in f32
//! scale = 2^(code - 127)                            MXFP4
//! scale                                             FP8, and NF4 and FP4 with flat scales: f32, as stored
//! ```
//!
//! - A compiler that contracts the scale of NF4 and FP4 into an FMA changes some decoded weights. The kernels pass
//!   the product through an integer operation that no compiler can see through. The scales of NVFP4 and MXFP4
//!   are looked up in a table of 256, computed on the host.
//! - Quantizing to NVFP4, MXFP4 and FP8 takes the nearest code, ties to the even one. Scales are those of
//!   compressed-tensors, and of FP8 the largest magnitude of the block over 448.
//! - Quantizing to NF4 and FP4 compares with bitsandbytes' 15 thresholds, ties to the lower code, and gives its
//!   codes and scales. The offset of double quantization is a mean whose last bits depend on the order of
//!   summation: [`SumF32x2`].
//! - bitsandbytes divides by a block's scale through the GPU's approximate reciprocal. For scales of f16
//!   and bf16 weights a table read out on a GPU reproduces it ([`reciprocal`]); for f32 weights ours is
//!   the exact one, and a weight within an ulp of a threshold could get the neighbouring code (none does
//!   in the golden files).
//! - One deliberate difference: a block of zeros in NF4 decodes to exact zeros here. bitsandbytes' CUDA kernel
//!   stores code 0 (level -1) for it. A loaded file is decoded as it was stored.
//! - WGSL promises less than the kernels need: division need not be correctly rounded and subnormals may
//!   be flushed, so on drivers other than llvmpipe a weight within an ulp of a threshold can get the
//!   neighbouring code when it is quantized there. Decoding uses products, sums and a cast alone.

mod blocks;
mod check;
mod codebook;
mod description;
mod float8;
mod form;
#[cfg_attr(
    not(feature = "checkpoint"),
    allow(dead_code, reason = "files and their parts come with checkpoints")
)]
mod image;
mod packed;
#[cfg_attr(
    not(feature = "checkpoint"),
    allow(dead_code, reason = "files and their parts come with checkpoints")
)]
mod parts;
mod reciprocal;
mod reference;
mod spec;
mod tensor;

pub use blocks::nvfp4_global_scale;
pub(crate) use check::{check_finite, check_len, check_shape, checked_elems, matrix_dims};
pub use codebook::{
    DYNAMIC_MAP, E2M1_CODEBOOK, E4M3_CODEBOOK, FP4_CODE_BY_LEVEL, FP4_CODEBOOK, FP4_THRESHOLDS,
    NF4_CODEBOOK, NF4_THRESHOLDS,
};
pub use description::{BlockFormat, BlockShape, NibbleOrder, ScaleType, TensorScale};
pub use float8::{e2m1_code, e4m3_code, e8m0_value};
pub use form::WeightForm;
#[cfg(feature = "checkpoint")]
pub(crate) use image::PackedImage;
pub(crate) use packed::check_header_words;
pub use packed::{HEADER_WORDS, PackedLayout};
#[cfg(feature = "checkpoint")]
pub(crate) use parts::{Floats, ScaleParts, WeightParts, stored_floats};
pub use reciprocal::{RECIPROCAL_STEPS, reciprocal};
pub use reference::{SumF32x2, fp4_code, nested_code, nf4_cells, nf4_code, normalizer};
pub(crate) use spec::with_float_type;
pub use spec::{BlockSize, FloatElement, FloatType, QuantConfig, QuantType};
pub use tensor::{Absmax, BlockTensor, CodedScales, NestedAbsmax};
