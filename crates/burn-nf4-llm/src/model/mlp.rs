//! The feed-forward block of a layer.

use burn::module::Module;
use burn::tensor::Tensor;
use burn_nf4::linear_layers;
use burn_nf4::nn::{AnyLinear, gated_forward};
use burn_nf4::op::{Activation, Seed, gated};

use crate::model::variants::linear_variants;

/// `down(activation(gate(x)) up(x))` (arXiv 2002.05202).
#[derive(Module, Debug)]
pub struct GatedMlp {
    /// To the gate and to what it is multiplied by.
    pub gate_up: GateUpProjections,
    /// Back to the hidden size.
    pub down_proj: AnyLinear,
    /// The activation of the gate.
    #[module(skip)]
    pub activation: Activation,
}

/// The projections to gate and up, as the checkpoints of a family have them.
#[allow(
    clippy::large_enum_variant,
    reason = "a model has few, and nearly all are of the larger kind"
)]
#[derive(Module, Debug)]
pub enum GateUpProjections {
    /// A matrix each.
    Separate(SeparateGateUp),
    /// One for both.
    Fused(FusedGateUp),
}

/// A projection each.
#[derive(Module, Debug)]
pub struct SeparateGateUp {
    /// To the gate.
    pub gate_proj: AnyLinear,
    /// To what the gate is multiplied by.
    pub up_proj: AnyLinear,
}

/// One projection, with the rows of gate and up in this order.
#[derive(Module, Debug)]
pub struct FusedGateUp {
    /// To both.
    pub gate_up_proj: AnyLinear,
}

linear_layers!(SeparateGateUp { gate_proj, up_proj });
linear_layers!(FusedGateUp { gate_up_proj });
linear_variants!(GateUpProjections { Separate, Fused });
linear_layers!(GatedMlp { gate_up, down_proj });

impl GatedMlp {
    /// The output for `x`.
    ///
    /// # Shapes
    /// - `x`: `[batch, length, hidden_size]`, and so the result
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.down_proj
            .forward(self.gate_up.forward(x, self.activation))
    }

    /// Where a backward pass begins that knows the gradient of the output, see [`AnyLinear::seed`].
    ///
    /// # Shapes
    /// - `x`, `grad`: `[batch, length, hidden_size]`
    pub fn seed(&self, x: Tensor<3>, grad: Tensor<3>) -> Seed {
        let x = self.gate_up.forward(x, self.activation);
        self.down_proj.seed(x, grad)
    }
}

impl GateUpProjections {
    /// `activation(gate(x)) up(x)`.
    fn forward(&self, x: Tensor<3>, activation: Activation) -> Tensor<3> {
        match self {
            Self::Separate(SeparateGateUp { gate_proj, up_proj }) => {
                gated_forward(gate_proj, up_proj, activation, x)
            }
            Self::Fused(FusedGateUp { gate_up_proj }) => {
                let both = gate_up_proj.forward(x);
                let inner = both.dims()[2] / 2;
                let gate = both.clone().narrow(2, 0, inner);
                let up = both.narrow(2, inner, inner);
                gated(gate, up, activation).expect("both are halves")
            }
        }
    }
}
