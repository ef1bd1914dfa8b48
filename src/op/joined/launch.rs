//! When products are joined, and how that is asked of a backend.

use std::sync::Arc;

use burn::backend::{Dispatch, DispatchDevice};
use burn::tensor::Tensor;

use super::LinearPart;
use super::base::{
    JoinedBackend, JoinedBranch, JoinedLoraSpec, JoinedPart, JoinedResults, JoinedSpec,
    JoinedWeight, JoinedWeights,
};
use crate::activation::Activation;
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::op::backends::joined::plan;
use crate::op::base::MatmulStrategy;
use crate::op::tensor::{LowRank, checked_operands};

/// The results of each weight, or with a gate that of both.
pub(super) fn launched<const D: usize>(
    x: Tensor<D>,
    parts: Vec<LinearPart>,
    spec: JoinedSpec,
) -> Result<Vec<Tensor<D>>, Nf4Error> {
    let shape = x.dims();
    let weights = parts
        .into_iter()
        .map(|part| part.into_dispatch(&x))
        .collect::<Result<Vec<_>, _>>()?;
    let weights = joined_weights(weights);
    let x = x.reshape([1, spec.k]).into_dispatch();
    let results = <Dispatch as JoinedBackend>::quant_joined(x, weights, spec);
    Ok(results_of(results, shape))
}

/// The results of each weight, with gradients.
pub(super) fn trained<const D: usize>(
    x: Tensor<D>,
    parts: Vec<LinearPart>,
    spec: JoinedLoraSpec,
) -> Result<Vec<Tensor<D>>, Nf4Error> {
    let shape = x.dims();
    let weights = parts
        .into_iter()
        .map(|part| part.into_dispatch(&x))
        .collect::<Result<Vec<_>, _>>()?;
    let k = shape[D - 1];
    let rows = x.shape().num_elements() / k;
    let x = x.reshape([rows, k]).into_dispatch();
    let results = <Dispatch as JoinedBackend>::quant_joined_lora(x, joined_weights(weights), spec);
    Ok(results_of(results, shape))
}

fn joined_weights(weights: Vec<JoinedWeight<Dispatch>>) -> JoinedWeights<Dispatch> {
    let mut weights = weights.into_iter();
    match (weights.next(), weights.next(), weights.next()) {
        (Some(first), Some(second), None) => JoinedWeights::Two(first, second),
        (Some(first), Some(second), Some(third)) => JoinedWeights::Three(first, second, third),
        _ => unreachable!("two or three weights have a specification"),
    }
}

/// Results in the shape of the input but for the last dimension.
fn results_of<const D: usize>(
    results: JoinedResults<Dispatch>,
    shape: [usize; D],
) -> Vec<Tensor<D>> {
    let results = match results {
        JoinedResults::Gated(y) => vec![y],
        JoinedResults::Two(first, second) => vec![first, second],
        JoinedResults::Three(first, second, third) => vec![first, second, third],
    };
    let back = |y| {
        let y = Tensor::<2>::from_dispatch(y);
        let mut shape = shape;
        shape[D - 1] = y.dims()[1];
        y.reshape(shape)
    };
    results.into_iter().map(back).collect()
}

/// The products with gradients by cuBLASLt, if all are. Only a CubeCL device has them joined.
///
/// # Errors
/// Those of [`lora_linear`](crate::op::lora_linear).
pub(super) fn trained_spec<const D: usize>(
    x: &Tensor<D>,
    parts: &[LinearPart],
) -> Result<Option<JoinedLoraSpec>, Nf4Error> {
    let device = x.device();
    let is_cube = matches!(
        device.clone().without_autodiff().as_dispatch(),
        DispatchDevice::Cube(_)
    );
    if !device.is_autodiff() || !is_cube || !(2..=3).contains(&parts.len()) {
        return Ok(None);
    }
    let specs = parts.iter().map(|part| match &part.branch {
        None => Ok(None),
        Some(branch) => branch.trained_spec(x, part.weight, part.bias.as_ref(), part.strategy),
    });
    let parts: Result<Option<Vec<_>>, _> = specs.collect();
    Ok(parts?.map(|parts| JoinedLoraSpec { parts }))
}

impl LinearPart<'_> {
    /// The operands, checked against `x`.
    fn into_dispatch<const D: usize>(
        self,
        x: &Tensor<D>,
    ) -> Result<JoinedWeight<Dispatch>, Nf4Error> {
        let Self {
            weight,
            bias,
            branch,
            ..
        } = self;
        let dims = weight.matrix_dims()?;
        let (_, packed) = checked_operands(x, weight, dims, bias.as_ref(), branch.as_ref())?;
        let packed = packed.into_dispatch();
        let branch = branch.map(|LowRank { a, b, .. }| (a.into_dispatch(), b.into_dispatch()));
        Ok(match (bias.map(Tensor::into_dispatch), branch) {
            (None, None) => JoinedWeight::Plain { packed },
            (Some(bias), None) => JoinedWeight::Bias { packed, bias },
            (None, Some((a, b))) => JoinedWeight::Lora { packed, a, b },
            (Some(bias), Some((a, b))) => JoinedWeight::BiasLora { packed, bias, a, b },
        })
    }
}

/// The products as one launch, if there is a kernel for them.
///
/// # Errors
/// [`Nf4Error::NotAMatrix`] for a weight of another rank, [`Nf4Error::Shape`] and [`Nf4Error::Dtype`] for a
/// branch that does not fit it.
pub(super) fn spec_of<const D: usize>(
    x: &Tensor<D>,
    parts: &[LinearPart],
    gate: Option<Activation>,
) -> Result<Option<JoinedSpec>, Nf4Error> {
    let device = x.device();
    let is_row = x.dims()[..D - 1].iter().all(|&dim| dim == 1);
    let Ok(dtype) = FloatType::from_dtype(x.dtype(), "x") else {
        return Ok(None);
    };
    if !is_row || device.is_autodiff() || !(2..=3).contains(&parts.len()) {
        return Ok(None);
    }
    let DispatchDevice::Cube(cube) = device.as_dispatch() else {
        return Ok(None);
    };
    let k = x.dims()[D - 1];
    let mut specs = Vec::new();
    for part in parts {
        let [n, in_features] = part.weight.matrix_dims()?;
        let of_levels = matches!(
            part.strategy,
            MatmulStrategy::Auto | MatmulStrategy::Rule | MatmulStrategy::Levels
        );
        let bias_fits = part
            .bias
            .as_ref()
            .is_none_or(|bias| bias.dtype() == x.dtype());
        if in_features != k || !of_levels || !bias_fits || part.weight.is_transposed() {
            return Ok(None);
        }
        let branch = match &part.branch {
            None => None,
            Some(branch) => {
                let [_, rank] = branch.a.dims();
                branch.check([n, k], rank.max(1))?;
                let of_branch = FloatType::from_dtype(branch.a.dtype(), "lora_a")?;
                if of_branch != dtype && of_branch != FloatType::F32 {
                    return Ok(None);
                }
                Some(JoinedBranch {
                    rank,
                    scale: branch.scale,
                    dtype: of_branch,
                })
            }
        };
        specs.push(JoinedPart {
            layout: *part.weight.layout(),
            n,
            branch,
        });
    }
    let kinds = parts.iter().zip(&specs).map(|(part, spec)| {
        let branch = spec.branch.map(|branch| (branch.rank, branch.dtype));
        (part.bias.is_some(), branch)
    });
    let kinds: Vec<_> = kinds.collect();
    if kinds.iter().any(|kind| *kind != kinds[0]) {
        return Ok(None);
    }
    let plan = plan(&cube.client(), &specs, k, dtype, gate);
    Ok(plan.map(|plan| JoinedSpec {
        parts: specs,
        k,
        dtype,
        gate,
        plan: Arc::new(plan),
    }))
}
