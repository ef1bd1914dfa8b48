//! Grouped products as Burn's dispatch sees them.
//!
//! Arguments are validated by the functions over [`Tensor`](burn::tensor::Tensor) in front.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, ExtensionType, backend_extension};
#[cfg(feature = "fusion")]
use burn::tensor::{DType, Shape};

use crate::activation::Activation;
use crate::format::FloatType;
use crate::op::base::QuantBackend;
use crate::stack_layout::StackLayout;

/// Products of rows with the weights of the experts that they are sent to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupedSpec {
    /// Where the weights of each stack lie: of one, or with a gate of two or of one that holds both.
    pub stacks: Vec<StackLayout>,
    /// Ids, the rows of the result.
    pub entries: usize,
    /// Entries that have a row of `x` in common.
    pub per_row: usize,
    /// Tokens that the entries are of.
    pub tokens: usize,
    /// Type of `x`, biases and the result.
    pub dtype: FloatType,
    /// What joins the products with a gate and with what it opens.
    pub gate: Option<Activation>,
}

impl GroupedSpec {
    /// Columns of the result.
    pub fn columns(&self) -> usize {
        let [rows, _] = self.stacks[0].matrix_dims();
        match self.is_interleaved() {
            true => rows / 2,
            false => rows,
        }
    }

    /// Whether the even rows of one stack are those of the gate, and the odd ones of what it opens.
    pub fn is_interleaved(&self) -> bool {
        self.gate.is_some() && self.stacks.len() == 1
    }
}

/// The words of the stacks of a [`GroupedSpec`], and their biases, `[experts, rows]`.
#[derive(ExtensionType)]
#[cfg_attr(feature = "fusion", extension_type(fusion))]
pub enum GroupedWeights<B: Backend> {
    /// One stack.
    One {
        /// Its words.
        packed: IntTensor<B>,
    },
    /// One stack with a bias.
    OneBias {
        /// Its words.
        packed: IntTensor<B>,
        /// Its bias.
        bias: FloatTensor<B>,
    },
    /// Two stacks.
    Two {
        /// The words of the gate.
        gate: IntTensor<B>,
        /// The words of what it opens.
        up: IntTensor<B>,
    },
    /// Two stacks with biases.
    TwoBias {
        /// The words of the gate.
        gate: IntTensor<B>,
        /// The words of what it opens.
        up: IntTensor<B>,
        /// The bias of the gate.
        gate_bias: FloatTensor<B>,
        /// The bias of what it opens.
        up_bias: FloatTensor<B>,
    },
}

impl<B: Backend> GroupedWeights<B> {
    /// The words of each stack, and its bias.
    #[cfg_attr(not(any(feature = "flex", feature = "cube")), allow(dead_code))]
    pub(in crate::op) fn into_vec(self) -> Vec<(IntTensor<B>, Option<FloatTensor<B>>)> {
        match self {
            Self::One { packed } => vec![(packed, None)],
            Self::OneBias { packed, bias } => vec![(packed, Some(bias))],
            Self::Two { gate, up } => vec![(gate, None), (up, None)],
            Self::TwoBias {
                gate,
                up,
                gate_bias,
                up_bias,
            } => vec![(gate, Some(gate_bias)), (up, Some(up_bias))],
        }
    }
}

/// Grouped products of a backend, without gradients: by one launch on CubeCL, expert by expert on Flex.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait GroupedBackend: QuantBackend {
    /// `x Wₑᵀ + bₑ` of each entry, or with a gate what its activation makes of the two products.
    ///
    /// An id that no expert has makes Flex panic, and is a row of NaN elsewhere.
    ///
    /// # Shapes
    /// - `x`: `[spec.entries / spec.per_row, k]`, of `spec.dtype`
    /// - `ids`: `[spec.entries]`, at least one, of any integer type
    /// - returns `[spec.entries, spec.columns()]`
    #[fusion(
        dtype = DType::from(spec.dtype),
        shape = Shape::from([spec.entries, spec.columns()])
    )]
    fn grouped_product(
        x: FloatTensor<Self>,
        ids: IntTensor<Self>,
        #[extension_type] weights: GroupedWeights<Self>,
        spec: GroupedSpec,
    ) -> FloatTensor<Self>;
}
