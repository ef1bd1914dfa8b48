//! The choice of experts, where the scores are.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Int, Tensor};

use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::routing::{MAX_EXPERTS, RouteForm, check};

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;
#[cfg(feature = "fusion")]
use burn::tensor::Shape;

/// What to choose from, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteSpec {
    /// Rows.
    pub tokens: usize,
    /// Scores of a row.
    pub experts: usize,
    /// Experts of each.
    pub per_token: usize,
    /// What the weights are.
    pub form: RouteForm,
    /// Type of the scores.
    pub dtype: FloatType,
    /// Type of the numbers of experts.
    pub int: DType,
}

/// The choice of experts by a backend: by one kernel on CubeCL, on the host by Flex.
#[backend_extension(
    Autodiff,
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait RouteBackend: Backend {
    /// The experts of each row, and their weights. No gradient flows through.
    ///
    /// # Shapes
    /// - `logits`: `[spec.tokens, spec.experts]`, of `spec.dtype`
    /// - returns `[spec.tokens, spec.per_token]` each, of `spec.int` and f32
    #[fusion(meta = |_logits: &TensorSpec, spec: &RouteSpec| {
        let shape = Shape::from([spec.tokens, spec.per_token]);
        (TensorSpec::new(shape.clone(), spec.int), TensorSpec::new(shape, DType::F32))
    })]
    fn route(logits: FloatTensor<Self>, spec: RouteSpec) -> (IntTensor<Self>, FloatTensor<Self>);
}

/// Sends each token to the experts with the highest scores, the highest first, and of equal ones to the lower
/// number; on the device, without waiting for it.
///
/// All devices choose the same experts for the same scores: they are compared as they are, before the softmax,
/// whose rounding could make them equal. NaN is above all numbers; where the highest score is not finite, the
/// weights are NaN. The gradient flows to the scores through the weights.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use burn_nf4::op::{RouteForm, route};
///
/// let device = Device::default();
/// let logits = Tensor::<2>::from_floats([[0.0, 2.0, 1.0, 2.0]], &device);
/// let (ids, weights) = route(logits, 2, RouteForm::TopKThenSoftmax)?;
/// assert_eq!(ids.into_data().iter::<i64>().collect::<Vec<_>>(), [1, 3]);
/// assert_eq!(weights.into_data().iter::<f32>().collect::<Vec<_>>(), [0.5, 0.5]);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Shapes
/// - `logits`: `[tokens, experts]`, f16, bf16 or f32
/// - returns the experts and their weights in f32, `[tokens, per_token]` each
///
/// # Errors
/// [`Nf4Error::ElementCount`] for no experts or more than [`MAX_EXPERTS`](super::MAX_EXPERTS),
/// [`Nf4Error::Config`] unless a token has one expert or more, up to all, [`Nf4Error::Dtype`] for scores of
/// another type, and where the device's integers do not count the experts.
pub fn route(
    logits: Tensor<2>,
    per_token: usize,
    form: RouteForm,
) -> Result<(Tensor<2, Int>, Tensor<2>), Nf4Error> {
    let [tokens, experts] = logits.dims();
    let dtype = FloatType::from_dtype(logits.dtype(), "logits")?;
    check(tokens.max(1), experts, per_token)?;
    let device = logits.device();
    let int = device.settings().int_dtype.into();
    // There are at most 1024.
    let largest = match int {
        DType::I8 => i8::MAX as usize,
        DType::U8 => u8::MAX as usize,
        _ => MAX_EXPERTS,
    };
    if largest < experts - 1 {
        return Err(Nf4Error::Dtype {
            tensor: "ids".into(),
            expected: format!("an integer of the device's settings that counts {experts} experts"),
            given: format!("{int:?}"),
        });
    }
    if tokens == 0 {
        let weights = Tensor::zeros([0, per_token], (&device, DType::F32));
        return Ok((Tensor::zeros([0, per_token], (&device, int)), weights));
    }
    let spec = RouteSpec {
        tokens,
        experts,
        per_token,
        form,
        dtype,
        int,
    };
    let scores = logits.clone().into_dispatch();
    let (ids, weights) = <Dispatch as RouteBackend>::route(scores, spec);
    let ids = Tensor::from_dispatch(ids);
    let weights = match device.is_autodiff() {
        false => Tensor::from_dispatch(weights),
        true => tracked_weights(logits, ids.clone(), form),
    };
    Ok((ids, weights))
}

/// The weights by operations that have gradients.
fn tracked_weights(logits: Tensor<2>, ids: Tensor<2, Int>, form: RouteForm) -> Tensor<2> {
    let logits = logits.cast(DType::F32);
    match form.is_normalised() {
        true => softmax(logits.gather(1, ids), 1),
        false => softmax(logits, 1).gather(1, ids),
    }
}
