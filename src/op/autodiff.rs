//! Gradients: to `x` alone, with only the packed weight kept for the backward pass.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend};

use super::backend::{
    DequantizeSpec, LinearSpec, MatmulSpec, MatmulStrategy, Nf4Backend, QuantizeSpec, add_bias,
};

impl<B: Nf4Backend, C: CheckpointStrategy> Nf4Backend for Autodiff<B, C> {
    fn nf4_quantize(weight: FloatTensor<Self>, spec: QuantizeSpec) -> IntTensor<Self> {
        B::nf4_quantize(weight.into_primitive(), spec)
    }

    fn nf4_dequantize(packed: IntTensor<Self>, spec: DequantizeSpec) -> FloatTensor<Self> {
        // The weight is frozen: the result is a constant to autodiff.
        Self::from_inner(B::nf4_dequantize(packed, spec))
    }

    fn nf4_linear(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: LinearSpec,
    ) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        // Compute bound: a checkpointing strategy keeps the output rather than decode again.
        match LinearBackward
            .prepare::<C>([node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let y = B::nf4_linear(x, packed.clone(), spec);
                prep.finish((packed, spec.weight), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::nf4_linear(x, packed, spec)),
        }
    }

    fn nf4_matmul(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self> {
        Self::nf4_linear(x, packed, spec.linear())
    }

    fn nf4_matmul_bias(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        bias: FloatTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self> {
        let y = Self::nf4_linear(x, packed, spec.linear());
        add_bias::<Self>(y, bias, spec)
    }

    fn nf4_linear_backward(
        grad: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: DequantizeSpec,
    ) -> FloatTensor<Self> {
        let (grad, node) = grad.into_parts();
        match InputGradBackward
            .prepare::<C>([node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let dx = B::nf4_linear_backward(grad, packed.clone(), spec);
                prep.finish((packed, spec), dx)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::nf4_linear_backward(grad, packed, spec)),
        }
    }
}

/// Backward of `y = x Wᵀ`: `dx = dy W`.
#[derive(Debug)]
struct LinearBackward;

impl<B: Nf4Backend> Backward<B, 1> for LinearBackward {
    type State = (IntTensor<B>, DequantizeSpec);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (packed, spec) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |grad| {
            B::nf4_linear_backward(grad, packed, spec)
        });
    }
}

/// Backward of `dx = dy W`, for gradients of gradients: `ddy = ddx Wᵀ`.
#[derive(Debug)]
struct InputGradBackward;

impl<B: Nf4Backend> Backward<B, 1> for InputGradBackward {
    type State = (IntTensor<B>, DequantizeSpec);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (packed, spec) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |grad| {
            let strategy = MatmulStrategy::Auto;
            B::nf4_linear(
                grad,
                packed,
                LinearSpec {
                    weight: spec,
                    strategy,
                },
            )
        });
    }
}
