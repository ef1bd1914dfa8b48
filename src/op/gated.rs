//! The activation of a gate times what it opens.

use burn::tensor::activation::{gelu_approximate, sigmoid, silu};
use burn::tensor::{DType, Tensor};

use super::tensor::{check_device, check_dtype};
use crate::activation::Activation;
use crate::error::Nf4Error;
use crate::format::{FloatType, check_shape};

pub use base::{GatedBackend, GatedSpec};

/// `activation(gate) up` (arXiv 2002.05202), with what opens of `up` if the [`Activation`] changes that: one operation, forward and backward. The
/// activation is rounded to the dtype of the gate before it is multiplied.
///
/// # Shapes
/// - `gate`, `up`: the same, and so the result
///
/// # Errors
/// [`Nf4Error::Shape`] unless both are of one shape, [`Nf4Error::Dtype`] unless both are of one type, f16,
/// bf16 or f32, [`Nf4Error::Device`] unless both are on one device.
pub fn gated<const D: usize>(
    gate: Tensor<D>,
    up: Tensor<D>,
    activation: Activation,
) -> Result<Tensor<D>, Nf4Error> {
    check_shape("up", &gate.dims(), &up.dims())?;
    let dtype = FloatType::from_dtype(gate.dtype(), "gate")?;
    check_dtype("up", &up, "as the gate", &[gate.dtype()])?;
    check_device("up", &up.device(), &gate.device())?;
    if let Some(y) = base::launched(&gate, &up, activation, dtype) {
        return Ok(y);
    }
    Ok(activation.forward(gate) * activation.opened(up))
}

impl Activation {
    /// The activation of each element, in the dtype of `x`.
    pub fn forward<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Silu => silu(x),
            Self::GeluTanh => {
                // PyTorch computes it in f32 and rounds once.
                let dtype = x.dtype();
                gelu_approximate(x.cast(DType::F32)).cast(dtype)
            }
            Self::ClampedSwiglu => {
                let dtype = x.dtype();
                let x = x.cast(DType::F32).clamp_max(Self::SWIGLU_LIMIT);
                (x.clone() * sigmoid(x * Self::SWIGLU_ALPHA)).cast(dtype)
            }
        }
    }

    /// What the activation is multiplied with, from what it opens, in the dtype of that.
    pub fn opened<const D: usize>(self, up: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Silu | Self::GeluTanh => up,
            Self::ClampedSwiglu => {
                let dtype = up.dtype();
                let up = up.cast(DType::F32);
                (up.clamp(-Self::SWIGLU_LIMIT, Self::SWIGLU_LIMIT) + 1.0).cast(dtype)
            }
        }
    }
}

mod base {
    use burn::backend::tensor::FloatTensor;
    use burn::backend::{Backend, Dispatch, DispatchDevice, backend_extension};
    use burn::tensor::Tensor;
    #[cfg(feature = "fusion")]
    use burn::tensor::{DType, Shape};

    use crate::activation::Activation;
    use crate::format::FloatType;

    /// A gate and what it opens.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct GatedSpec {
        /// Elements of each.
        pub elems: usize,
        /// The activation of the gate.
        pub activation: Activation,
        /// Type of all tensors.
        pub dtype: FloatType,
    }

    /// Gates of a backend: by one kernel on CubeCL, by `host` on Flex.
    #[backend_extension(
        Autodiff,
        Cube: cfg(feature = "cube"),
        Flex: cfg(feature = "flex"),
        Fusion: cfg(feature = "fusion"),
    )]
    pub trait GatedBackend: Backend {
        /// `activation(gate) up`.
        ///
        /// # Shapes
        /// - `gate`, `up`: `[spec.elems]`, and so the result
        #[fusion(dtype = DType::from(spec.dtype), shape = Shape::from([spec.elems]))]
        fn gated(
            gate: FloatTensor<Self>,
            up: FloatTensor<Self>,
            spec: GatedSpec,
        ) -> FloatTensor<Self>;

        /// The gradients of `gate` and `up`.
        ///
        /// # Shapes
        /// - `gate`, `up`, `grad`: `[spec.elems]`, and so the results
        #[fusion(meta = |
            gate: &burn::backend::fusion::custom::TensorSpec,
            up: &burn::backend::fusion::custom::TensorSpec,
            _grad: &burn::backend::fusion::custom::TensorSpec,
            _spec: &GatedSpec,
        | { (gate.clone(), up.clone()) })]
        fn gated_backward(
            gate: FloatTensor<Self>,
            up: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            spec: GatedSpec,
        ) -> (FloatTensor<Self>, FloatTensor<Self>);
    }

    /// The result, on a device that has the kernel.
    pub(super) fn launched<const D: usize>(
        gate: &Tensor<D>,
        up: &Tensor<D>,
        activation: Activation,
        dtype: FloatType,
    ) -> Option<Tensor<D>> {
        let device = gate.device().without_autodiff();
        let shape = gate.shape();
        let elems = shape.num_elements();
        let has_kernel = match device.as_dispatch() {
            #[cfg(feature = "cube")]
            DispatchDevice::Cube(_) => true,
            #[cfg(feature = "flex")]
            DispatchDevice::Flex(_) => true,
            _ => false,
        };
        if !has_kernel || elems == 0 {
            return None;
        }
        let spec = GatedSpec {
            elems,
            activation,
            dtype,
        };
        let flat = |x: &Tensor<D>| x.clone().reshape([elems]).into_dispatch();
        let y = <Dispatch as GatedBackend>::gated(flat(gate), flat(up), spec);
        Some(Tensor::<1>::from_dispatch(y).reshape(shape))
    }
}
