//! The custom Burn ops: quantize, dequantize and a linear map with a packed weight, on every
//! backend that Burn dispatches to, with autodiff.
//!
//! # Which way a product goes
//!
//! For few rows of `x`, as when a model generates, the weight is read as 4 bits and never written out.
//! Which way is fastest depends on the sizes and the device, so CubeCL's autotuner measures the candidates
//! when a product of its kind is first computed, and keeps the result ([`MatmulStrategy::Auto`]):
//!
//! | rows of `x` | NVIDIA GPU, f16 or bf16 | other GPUs, f32 | CPU (Flex) |
//! |---|---|---|---|
//! | 1 | `levels` or `tensor_core` | `gemv`, not measured | the packed weight, AVX-512 or AVX2 |
//! | up to 4 | `tensor_core`, cut up in one of several ways | `gemv`, not measured | as above |
//! | up to 8 | as above | `gemv` or decoding | as above |
//! | up to 32 | as above | `gemv` or decoding | decoding |
//! | up to 64 | as above | decoding | decoding |
//! | up to 256 | `tensor_core`, 64 rows at a time, or decoding | decoding | decoding |
//! | more | decoding | decoding | decoding |
//!
//! "Decoding" writes the weight out in the dtype of `x` and multiplies with that: with cuBLASLt where it is
//! used ([`DenseProvider`]), else with Burn's product. `tensor_core` and `gemv` multiply with the values
//! that dequantization gives; `levels` multiplies with the levels of the codebook in f16 and scales the
//! sums in f32, which differs by the rounding of either. A measurement can end otherwise in another run,
//! and another kernel rounds otherwise: [`set_reproducible`] has all products of the process follow a
//! rule instead. Gradients always go over the decoded weight.
//!
//! Tokens of a mixture of experts are sent to them by [`route`], and a few tokens are multiplied with the
//! weights of all their experts by [`grouped_linear`]: one launch each, and nothing is read back.

mod adamw;
mod attention;
mod awake;
mod backends;
mod base;
mod compiled;
mod cross_entropy;
mod gated;
mod graphs;
mod grouped;
mod joined;
mod memory;
mod offload;
mod reproducible;
mod rms_norm;
mod rotary;
mod rotary_append;
mod route;
mod sample;
mod seed;
#[cfg(feature = "flex")]
mod table;
mod tensor;

pub use crate::activation::Activation;
pub use crate::cross_entropy::CrossEntropyOptions;
pub use crate::flat::{FlatLayout, TILE_ELEMS};
pub use crate::norm_form::NormForm;
pub use crate::routing::{MAX_EXPERTS, RouteForm};
pub use crate::sampling::SampleSettings;
pub use crate::stack_layout::StackLayout;
#[doc(hidden)]
pub use adamw::{AccumulateSpec, AdamWBackend, AdamWSpec, FlatParts, Moments};
pub use adamw::{
    AdamWMoments, AdamWSettings, FlatAdamW, MIN_8BIT_ELEMS, MomentState, StepReport, TensorState,
};
#[doc(hidden)]
pub use attention::{AttentionBackend, AttentionSpec};
pub use attention::{
    AttentionMask, AttentionOptions, KeyRanges, MAX_HEAD_DIM, attention, attention_with_lse,
};
pub use awake::{Awake, keep_threads_awake};
pub use base::MatmulStrategy;
pub use compiled::keep_compiled_kernels;
pub(crate) use cross_entropy::{ChunkedLoss, Leaves};
#[doc(hidden)]
pub use cross_entropy::{CrossEntropyBackend, CrossEntropySpec};
pub use cross_entropy::{
    LinearCrossEntropyOptions, LossReduction, cross_entropy, linear_cross_entropy,
};
pub use gated::gated;
#[cfg(feature = "cube")]
#[doc(hidden)]
pub use gated::{GatedBackend, GatedSpec};
pub use graphs::has_graphs;
pub use grouped::{ExpertPart, GatedExperts, grouped_gated_linear, grouped_linear, grouped_pays};
#[doc(hidden)]
pub use grouped::{GroupedBackend, GroupedSpec};
#[cfg(feature = "cube")]
#[doc(hidden)]
pub use joined::{JoinedBackend, JoinedLoraSpec, JoinedSpec};
pub use joined::{LinearPart, gated_linear, joined_linear};
pub use memory::{DeviceMemory, MemoryWatch, device_memory};
pub use offload::OffloadStack;
#[doc(hidden)]
pub use rms_norm::{RmsNormBackend, RmsNormSpec};
pub use rms_norm::{add_rms_norm, rms_norm, rms_norm_beside};
pub use rotary::rotary;
#[doc(hidden)]
pub use rotary::{RotaryBackend, RotarySpec};
pub use rotary_append::{CachedKeys, TokenHeads, rotary_append};
#[cfg(feature = "cube")]
#[doc(hidden)]
pub use rotary_append::{RotaryAppendBackend, RotaryAppendSpec};
pub use route::route;
#[doc(hidden)]
pub use route::{RouteBackend, RouteSpec};
#[doc(hidden)]
pub use sample::{SampleBackend, SampleSpec};
pub use sample::{SampleState, Sampled, sample};
pub use seed::Seed;
#[cfg(feature = "flex")]
#[doc(hidden)]
pub use table::TableBackend;
// Their arguments were validated by the functions over tensors: impossible ones panic. Benches call
// them.
#[cfg(feature = "cube")]
pub(crate) use backends::cube::{Kind as CubeKind, cube_tensor, from_cube, owned};
#[doc(hidden)]
pub use base::{
    DenseSpec, DequantizeSpec, EmbeddingSpec, LinearSpec, LoraSpec, MatmulSpec, QuantBackend,
    QuantizeSpec, WeightLoraSpec,
};
pub use reproducible::{REPRODUCIBLE_VARIABLE, is_reproducible, set_reproducible};
pub use tensor::{
    BlockWeight, DenseProvider, ExpertStack, LowRank, MatmulOptions, dense_provider, embedding,
    expert_linear, linear, linear_with, lora_linear, matmul, reads_tables, set_dense_provider,
    uses_cublaslt,
};
pub(crate) use tensor::{PACKED_CONTAINER, connect_empty, effective_weight};

#[cfg(feature = "cpu")]
use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device};

use crate::error::Nf4Error;
use crate::format::FloatType;

impl From<FloatType> for DType {
    fn from(dtype: FloatType) -> Self {
        match dtype {
            FloatType::F16 => Self::F16,
            FloatType::BF16 => Self::BF16,
            FloatType::F32 => Self::F32,
        }
    }
}

impl FloatType {
    /// The float type that a tensor's dtype is; `tensor` is the name put in the error.
    ///
    /// # Errors
    /// [`Nf4Error::Dtype`] unless it is f16, bf16 or f32.
    pub fn from_dtype(dtype: DType, tensor: &str) -> Result<Self, Nf4Error> {
        match dtype {
            DType::F16 => Ok(Self::F16),
            DType::BF16 => Ok(Self::BF16),
            DType::F32 | DType::Flex32 => Ok(Self::F32),
            _ => Err(Nf4Error::Dtype {
                tensor: tensor.into(),
                expected: "f16, bf16 or f32".into(),
                given: format!("{dtype:?}"),
            }),
        }
    }

    /// Checks that a device can hold this type.
    ///
    /// # Errors
    /// [`Nf4Error::DeviceDtype`].
    pub(crate) fn check_device(self, device: &Device) -> Result<(), Nf4Error> {
        if supports_dtype(device, self.into()) {
            return Ok(());
        }
        Err(Nf4Error::DeviceDtype {
            device: format!("{device:?}"),
            dtype: self.name().into(),
        })
    }
}

/// Whether a device can hold a dtype, and its kernels can round to it.
///
/// That is Burn's answer but for bf16 on CubeCL's CPU runtime: its kernels need a processor with the
/// AVX-512 instructions for bf16 or libgcc of GCC 13, and fail to compile elsewhere.
pub fn supports_dtype(device: &Device, dtype: DType) -> bool {
    #[cfg(feature = "cpu")]
    if dtype == DType::BF16
        && let DispatchDevice::Cube(device) = device.clone().without_autodiff().as_dispatch()
        && crate::launch::check_dtype(&device.client(), FloatType::BF16).is_err()
    {
        return false;
    }
    device.supports_dtype(dtype)
}
