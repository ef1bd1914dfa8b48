//! Layers that have the same input.

use burn::tensor::Tensor;

use super::AnyLinear;
use crate::error::Nf4Error;
use crate::op::{Activation, LinearPart, gated, gated_linear, joined_linear};

/// Applies layers to the same `x`, such as those to queries, keys and values. Of a single row the products
/// with weights in 4 bit are one launch where the device has a kernel for it, see
/// [`joined_linear`](crate::op::joined_linear); otherwise it is what [`AnyLinear::forward`] does, layer by
/// layer.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::format::QuantConfig;
/// use burn_nf4::nn::{AnyLinear, joined_forward};
///
/// let device = Device::default();
/// let layer = |d_output| {
///     let layer: AnyLinear = LinearConfig::new(64, d_output).init(&device).into();
///     layer.quantize(QuantConfig::default())
/// };
/// let (q, k) = (layer(128)?, layer(32)?);
/// let x = Tensor::<3>::random([1, 1, 64], Distribution::Default, &device);
/// let [q, k] = joined_forward([&q, &k], x);
/// assert_eq!((q.dims(), k.dims()), ([1, 1, 128], [1, 1, 32]));
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Shapes
/// - `x`: `[..., d_input]`
/// - returns `[..., d_output]` of each, of the dtype of `x`
///
/// # Panics
/// Where [`AnyLinear::forward`] does.
pub fn joined_forward<const D: usize, const N: usize>(
    layers: [&AnyLinear; N],
    x: Tensor<D>,
) -> [Tensor<D>; N] {
    let parts: Option<Vec<LinearPart>> = layers.iter().map(|layer| layer.as_part(&x)).collect();
    match parts.map(<[LinearPart; N]>::try_from) {
        Some(Ok(parts)) => expect(joined_linear(x, parts)),
        _ => layers.map(|layer| layer.forward(x.clone())),
    }
}

/// `activation(gate(x)) up(x)`, the first half of a gated MLP, in one launch where
/// [`gated_linear`](crate::op::gated_linear) is.
///
/// # Shapes
/// - `x`: `[..., d_input]`
/// - returns `[..., d_output]`, of the dtype of `x`
///
/// # Panics
/// Where [`AnyLinear::forward`] does, and if the layers are of different sizes.
pub fn gated_forward<const D: usize>(
    gate: &AnyLinear,
    up: &AnyLinear,
    activation: Activation,
    x: Tensor<D>,
) -> Tensor<D> {
    match (gate.as_part(&x), up.as_part(&x)) {
        (Some(gate), Some(up)) => expect(gated_linear(x, gate, up, activation)),
        _ => expect(gated(gate.forward(x.clone()), up.forward(x), activation)),
    }
}

impl AnyLinear {
    /// What the layer computes of `x`, if that is one product with a weight in 4 bit.
    fn as_part<const D: usize>(&self, x: &Tensor<D>) -> Option<LinearPart<'_>> {
        let (base, branch) = match self {
            Self::Nf4(layer) => (layer, None),
            Self::QLora(layer) if !layer.enabled => (&layer.base, None),
            Self::QLora(layer) => (&layer.base, Some(layer.plain_branch(x)?)),
            Self::Dense(_) | Self::Lora(_) => return None,
        };
        Some(LinearPart {
            weight: &base.weight,
            bias: base.bias_of(x),
            branch,
            strategy: base.strategy,
        })
    }
}

fn expect<T>(result: Result<T, Nf4Error>) -> T {
    match result {
        Ok(result) => result,
        Err(error) => panic!("AnyLinear: {error}"),
    }
}
