//! The bitsandbytes 4-bit format on the host: tables, block sizes, scales, the device image of a
//! weight, and a plain reference implementation. No GPU and no Burn in here.

mod check;
mod codebook;
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

#[cfg(feature = "checkpoint")]
pub(crate) use check::checked_elems;
pub(crate) use check::{check_finite, check_len, matrix_dims};
pub use codebook::{
    DYNAMIC_MAP, FP4_CODE_BY_LEVEL, FP4_CODEBOOK, FP4_THRESHOLDS, NF4_CODEBOOK, NF4_THRESHOLDS,
};
pub use form::WeightForm;
#[cfg(feature = "checkpoint")]
pub(crate) use image::PackedImage;
pub(crate) use packed::check_header_words;
pub use packed::{HEADER_WORDS, PackedLayout};
#[cfg(feature = "checkpoint")]
pub(crate) use parts::{Floats, ScaleParts, WeightParts, stored_floats};
pub use reciprocal::{RECIPROCAL_STEPS, reciprocal};
pub use reference::{SumF32x2, fp4_code, nested_code, nf4_cells, nf4_code, normalizer};
pub use spec::{BlockSize, FloatElement, FloatType, QuantConfig, QuantType};
pub use tensor::{Absmax, NestedAbsmax, Nf4Tensor};
