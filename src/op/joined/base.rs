//! Joined products as Burn's dispatch sees them.
//!
//! Arguments are validated by the functions over [`Tensor`](burn::tensor::Tensor) in front.

#![allow(
    clippy::large_enum_variant,
    reason = "they live for a call, and so do those that the macro makes of them"
)]

use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, ExtensionType, backend_extension};
use burn::tensor::Shape;

use crate::activation::Activation;
use crate::format::{FloatType, PackedLayout};
use crate::launch::JoinedPlan;
use crate::op::base::{LoraSpec, QuantBackend};

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;

/// The products of one row with several weights.
#[derive(Debug, Clone)]
pub struct JoinedSpec {
    /// What belongs to each weight.
    pub parts: Vec<JoinedPart>,
    /// Elements of the row.
    pub k: usize,
    /// Type of the row, of biases and of results.
    pub dtype: FloatType,
    /// `activation(first) second` is the result, in place of one of each weight.
    pub gate: Option<Activation>,
    /// The launch that computes them.
    pub plan: Arc<JoinedPlan>,
}

/// A weight of a [`JoinedSpec`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct JoinedPart {
    /// Layout of the packed weight.
    pub layout: PackedLayout,
    /// Its rows.
    pub n: usize,
    /// Its low-rank branch, if there is one.
    pub branch: Option<JoinedBranch>,
}

/// The low-rank branch of a [`JoinedPart`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct JoinedBranch {
    /// Columns of `A`, rows of `B`.
    pub rank: usize,
    /// The factor `s`.
    pub scale: f64,
    /// Type of `A` and `B`.
    pub dtype: FloatType,
}

impl JoinedSpec {
    /// The shape of the results of weight `part`.
    pub fn result_shape(&self, part: usize) -> Shape {
        Shape::from([1, self.parts[part].n])
    }
}

/// A packed weight, `[layout.words()]`, u32, and what is added to its product.
#[derive(ExtensionType)]
#[cfg_attr(feature = "fusion", extension_type(fusion))]
pub enum JoinedWeight<B: Backend> {
    /// Nothing.
    Plain {
        /// The weight.
        packed: IntTensor<B>,
    },
    /// A bias, `[n]`.
    Bias {
        /// The weight.
        packed: IntTensor<B>,
        /// The bias.
        bias: FloatTensor<B>,
    },
    /// A low-rank branch, `[k, rank]` and `[rank, n]`.
    Lora {
        /// The weight.
        packed: IntTensor<B>,
        /// `A`.
        a: FloatTensor<B>,
        /// `B`.
        b: FloatTensor<B>,
    },
    /// Both.
    BiasLora {
        /// The weight.
        packed: IntTensor<B>,
        /// The bias.
        bias: FloatTensor<B>,
        /// `A`.
        a: FloatTensor<B>,
        /// `B`.
        b: FloatTensor<B>,
    },
}

/// The weights of a [`JoinedSpec`].
#[derive(ExtensionType)]
#[cfg_attr(feature = "fusion", extension_type(fusion))]
pub enum JoinedWeights<B: Backend> {
    /// Two.
    Two(
        #[extension_type] JoinedWeight<B>,
        #[extension_type] JoinedWeight<B>,
    ),
    /// Three.
    Three(
        #[extension_type] JoinedWeight<B>,
        #[extension_type] JoinedWeight<B>,
        #[extension_type] JoinedWeight<B>,
    ),
}

/// The results of a [`JoinedSpec`], `[1, n]` each.
#[derive(ExtensionType)]
#[cfg_attr(feature = "fusion", extension_type(fusion))]
pub enum JoinedResults<B: Backend> {
    /// That of two weights with a gate.
    Gated(FloatTensor<B>),
    /// Those of two weights.
    Two(FloatTensor<B>, FloatTensor<B>),
    /// Those of three weights.
    Three(FloatTensor<B>, FloatTensor<B>, FloatTensor<B>),
}

/// Products of one `x` with several weights, each with a low-rank branch, by cuBLASLt.
#[derive(Debug, Clone, PartialEq)]
pub struct JoinedLoraSpec {
    /// Those of each weight, for as many rows.
    pub parts: Vec<LoraSpec>,
}

/// Joined products of a backend. The functions in front of it call it only where a CubeCL device has the kernel.
#[backend_extension(
    Autodiff,
    Cube,
    Fusion: cfg(feature = "fusion"),
)]
pub trait JoinedBackend: QuantBackend {
    /// `x Wᵀ + b + s (x A) B` of each weight.
    ///
    /// # Shapes
    /// - `x`: `[1, spec.k]`, of `spec.dtype`
    #[fusion(meta = |x: &TensorSpec, weights: &JoinedWeightsMetadata, spec: &JoinedSpec| {
        let result = |part| TensorSpec::new(spec.result_shape(part), x.dtype);
        match (spec.gate, weights) {
            (Some(_), _) => JoinedResultsMetadata::Gated(result(0)),
            (None, JoinedWeightsMetadata::Two(..)) => {
                JoinedResultsMetadata::Two(result(0), result(1))
            }
            (None, JoinedWeightsMetadata::Three(..)) => {
                JoinedResultsMetadata::Three(result(0), result(1), result(2))
            }
        }
    })]
    fn quant_joined(
        x: FloatTensor<Self>,
        #[extension_type] weights: JoinedWeights<Self>,
        spec: JoinedSpec,
    ) -> JoinedResults<Self>;

    /// `x Wᵀ + b + s (x A) B` of each weight. Under autodiff the gradients of `x` are added to each other by
    /// the products that make them.
    ///
    /// # Shapes
    /// - `x`: `[m, k]`
    /// - `weights`: with a branch each
    /// - returns `[m, n]` of each
    #[fusion(default)]
    fn quant_joined_lora(
        x: FloatTensor<Self>,
        #[extension_type] weights: JoinedWeights<Self>,
        spec: JoinedLoraSpec,
    ) -> JoinedResults<Self> {
        let weights = weights.into_vec().into_iter().zip(spec.parts);
        let results = weights.map(|(weight, spec)| {
            let x = x.clone();
            match weight {
                JoinedWeight::Lora { packed, a, b } => {
                    Self::quant_matmul_lora(x, packed, a, b, spec)
                }
                JoinedWeight::BiasLora { packed, bias, a, b } => {
                    Self::quant_matmul_bias_lora(x, packed, bias, a, b, spec)
                }
                JoinedWeight::Plain { .. } | JoinedWeight::Bias { .. } => {
                    unreachable!("arguments were validated")
                }
            }
        });
        JoinedResults::of(results)
    }
}

impl<B: Backend> JoinedWeights<B> {
    /// One after the other.
    pub(in crate::op) fn into_vec(self) -> Vec<JoinedWeight<B>> {
        match self {
            Self::Two(first, second) => vec![first, second],
            Self::Three(first, second, third) => vec![first, second, third],
        }
    }
}

impl<B: Backend> JoinedResults<B> {
    /// Those of two or three weights.
    pub(in crate::op) fn of(results: impl Iterator<Item = FloatTensor<B>>) -> Self {
        let mut results = results;
        let mut next = || results.next();
        match (next(), next(), next()) {
            (Some(first), Some(second), None) => Self::Two(first, second),
            (Some(first), Some(second), Some(third)) => Self::Three(first, second, third),
            _ => unreachable!("two or three weights have a specification"),
        }
    }
}
