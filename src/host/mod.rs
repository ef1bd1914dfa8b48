//! The fast CPU implementation: the device image of a weight, in and out, bit for bit as the
//! reference in [`format`](crate::format).
//!
//! Plain functions over slices, no Burn in here. Large weights are shared out over the threads of
//! the current rayon pool, small ones stay on the calling thread. Each thread runs AVX-512, AVX2
//! or portable code, whichever is the best that the processor has.
//!
//! ```
//! use burn_nf4::format::{BlockTensor, PackedLayout, QuantConfig};
//! use burn_nf4::host;
//!
//! let weight: Vec<f32> = (0..128 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
//! let config = QuantConfig::default();
//! let words = host::quantize(&weight, &[128, 64], config)?;
//!
//! let mut row = [0.0f32; 64];
//! host::dequantize(&words, &PackedLayout::new(128 * 64, config), 3 * 64, &mut row);
//! let reference = BlockTensor::quantize(&weight, &[128, 64], config)?;
//! assert_eq!(row.as_slice(), reference.dequantize_range::<f32>(3 * 64, 64));
//! # Ok::<(), burn_nf4::Nf4Error>(())
//! ```

#[cfg(feature = "flex")]
mod adamw;
mod attention;
mod awake;
#[cfg(feature = "flex")]
mod cross_entropy;
mod dequantize;
mod embedding;
mod float_matmul;
#[cfg(feature = "flex")]
mod gated;
#[cfg(feature = "flex")]
mod gemm;
mod matmul;
#[cfg(feature = "flex")]
mod norm;
mod quantize;
#[cfg(feature = "flex")]
mod route;
mod sample;
mod simd;

#[cfg(feature = "flex")]
pub(crate) use adamw::{AdamWStep, MomentSlices, accumulate, adamw, norm};
pub use attention::{
    AttentionSettings, Heads, attention, attention_backward, attention_backward_with,
    attention_with,
};
pub use awake::{Awake, keep_awake};
#[cfg(feature = "flex")]
pub(crate) use cross_entropy::{cross_entropy, cross_entropy_gradient};
pub use dequantize::{dequantize, dequantize_with};
pub use embedding::embedding;
pub use float_matmul::{float_matmul, float_matmul_with};
#[cfg(feature = "flex")]
pub(crate) use gated::{gated, gated_backward};
#[cfg(feature = "flex")]
pub(crate) use gemm::{Gemm, PackedMatrix, Right, Strided, gemm, gemm_add};
pub use matmul::{matmul, matmul_with};
#[cfg(feature = "flex")]
pub(crate) use norm::{RmsNorm, Rotation, rms_norm, rms_norm_backward, rotate};
pub use quantize::{quantize, quantize_with};
#[cfg(feature = "flex")]
pub(crate) use route::route;
pub use sample::{Choice, sample, sample_candidates};
pub use simd::Simd;

/// Elements to which every division of work is aligned: the largest block size, so that no block
/// is shared between threads, and a multiple of the eight elements of a word.
const TASK_ALIGN_ELEMS: usize = 4096;
