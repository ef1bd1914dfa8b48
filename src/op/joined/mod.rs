//! Linear maps of the same input, in one launch where the device has a kernel for it.

#[cfg(feature = "cube")]
mod base;
#[cfg(feature = "cube")]
mod launch;

use burn::tensor::Tensor;

#[cfg(feature = "cube")]
pub use base::{JoinedBackend, JoinedLoraSpec, JoinedSpec};
#[cfg(feature = "cube")]
pub(super) use base::{JoinedPart, JoinedResults, JoinedWeight, JoinedWeights};

use super::base::MatmulStrategy;
use super::gated::gated;
use super::tensor::{BlockWeight, LowRank, linear_at};
use crate::activation::Activation;
use crate::error::Nf4Error;
use crate::format::check_shape;

/// A linear map among others of the same input.
#[derive(Debug, Clone)]
pub struct LinearPart<'a> {
    /// The packed weight, `[out_features, in_features]`.
    pub weight: &'a BlockWeight,
    /// `[out_features]`, of the dtype of the input.
    pub bias: Option<Tensor<1>>,
    /// A low-rank branch to add.
    pub branch: Option<LowRank>,
    /// How it is computed where it is computed by itself; another strategy than
    /// [`Auto`](MatmulStrategy::Auto), [`Rule`](MatmulStrategy::Rule) and [`Levels`](MatmulStrategy::Levels)
    /// keeps it by itself.
    pub strategy: MatmulStrategy,
}

impl LinearPart<'_> {
    /// By itself.
    fn forward<const D: usize>(self, x: Tensor<D>) -> Result<Tensor<D>, Nf4Error> {
        let dims = self.weight.matrix_dims()?;
        linear_at(
            x,
            self.weight,
            dims,
            0,
            self.bias,
            self.branch,
            self.strategy,
        )
    }
}

/// Two or three linear maps of the same `x`, such as those to queries, keys and values: each as
/// [`lora_linear`](super::lora_linear) computes it. A single row of `x` is multiplied with all weights in one
/// launch where the device has tensor cores and the weights are quantized in one way; then the sums of a
/// product may be added up in another order than by itself.
///
/// # Shapes
/// - `x`: `[..., in_features]`
/// - returns `[..., out_features]` of each
///
/// # Errors
/// Those of [`lora_linear`](super::lora_linear).
pub fn joined_linear<const D: usize, const N: usize>(
    x: Tensor<D>,
    parts: [LinearPart; N],
) -> Result<[Tensor<D>; N], Nf4Error> {
    let given = match joined(x, parts.into(), None)? {
        Joined::Results(results) => results,
        Joined::Apart(x, parts) => {
            let parts = parts.into_iter();
            parts
                .map(|part| part.forward(x.clone()))
                .collect::<Result<_, _>>()?
        }
    };
    Ok(given.try_into().expect("a result of each"))
}

/// `activation(x W0ᵀ) (x W1ᵀ)`: the first half of a gated MLP (arXiv 2002.05202). In one launch where
/// [`joined_linear`] is, with sums and activation in f32; elsewhere composed of operations that round to the
/// dtype of `x`, GELU of an activation in f32, as PyTorch computes it.
///
/// # Shapes
/// - `x`: `[..., in_features]`
/// - returns `[..., out_features]`
///
/// # Errors
/// Those of [`joined_linear`], and [`Nf4Error::Shape`] unless both weights are of one shape.
pub fn gated_linear<const D: usize>(
    x: Tensor<D>,
    gate: LinearPart,
    up: LinearPart,
    activation: Activation,
) -> Result<Tensor<D>, Nf4Error> {
    check_shape("weight of the gate", up.weight.shape(), gate.weight.shape())?;
    match joined(x, vec![gate, up], Some(activation))? {
        Joined::Results(mut results) => Ok(results.remove(0)),
        Joined::Apart(x, parts) => {
            let parts: [LinearPart; 2] = parts.try_into().expect("there are two");
            let [gate, up] = joined_linear(x, parts)?;
            gated(gate, up, activation)
        }
    }
}

/// What became of products that may be joined.
#[allow(
    clippy::large_enum_variant,
    reason = "it is taken apart where it is made"
)]
enum Joined<'a, const D: usize> {
    /// A result of each weight, or with a gate that of both.
    #[cfg_attr(not(feature = "cube"), allow(dead_code))]
    Results(Vec<Tensor<D>>),
    /// Nothing: they are to be computed one by one.
    Apart(Tensor<D>, Vec<LinearPart<'a>>),
}

/// Makes the launch, if there is a kernel for it.
fn joined<const D: usize>(
    x: Tensor<D>,
    parts: Vec<LinearPart<'_>>,
    gate: Option<Activation>,
) -> Result<Joined<'_, D>, Nf4Error> {
    #[cfg(feature = "cube")]
    if let Some(spec) = launch::spec_of(&x, &parts, gate)? {
        return launch::launched(x, parts, spec).map(Joined::Results);
    }
    #[cfg(feature = "cube")]
    if gate.is_none()
        && let Some(spec) = launch::trained_spec(&x, &parts)?
    {
        return launch::trained(x, parts, spec).map(Joined::Results);
    }
    let _ = gate;
    Ok(Joined::Apart(x, parts))
}
