//! Gradients of products with a packed weight and a low-rank branch, by cuBLASLt.

use burn::backend::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};

use super::autodiff::register_bias;
use super::shared_gradient::SharedGradient;
use crate::op::base::{DenseSpec, LoraSpec, MatmulSpec, QuantBackend, cast, lora_product};

/// Backward of a product with a low-rank branch. With `g = dy` and `h = s g Bᵀ`:
/// `dx = h Aᵀ + g W`, `dA = xᵀ h`, `dB = (s x A)ᵀ g`, and `db` the sum of the rows of `g`.
#[derive(Debug)]
pub(super) struct LoraBackward;

/// What the backward pass needs beside `x`.
#[derive(Debug, Clone)]
pub(super) struct LoraState<B: QuantBackend> {
    x: NodeId,
    packed: IntTensor<B>,
    /// `A`, in the dtype of `x`.
    a: FloatTensor<B>,
    /// `B`, in the dtype of `x`.
    b: FloatTensor<B>,
    /// `s x A`.
    down: FloatTensor<B>,
    spec: LoraSpec,
    /// Of `x`, if others have it too.
    shared: Option<SharedGradient<FloatTensor<B>>>,
}

/// A product with a low-rank branch, and with a bias where that is the last of the parents.
pub(super) fn lora<B: QuantBackend, C: CheckpointStrategy, const N: usize>(
    kind: OpsKind<LoraBackward, B, LoraState<B>, C, N>,
    x: FloatTensor<Autodiff<B, C>>,
    packed: IntTensor<B>,
    factors: [FloatTensor<Autodiff<B, C>>; 2],
    bias: Option<FloatTensor<B>>,
    spec: LoraSpec,
    shared: Option<SharedGradient<FloatTensor<B>>>,
) -> FloatTensor<Autodiff<B, C>> {
    let factors = factors.map(|factor| factor.into_primitive());
    match kind {
        OpsKind::Tracked(mut prep) => {
            let x_id = prep.checkpoint(&x);
            let dtype = spec.matmul.weight.dtype;
            let [a, b] = factors.map(|factor| cast::<B>(factor, dtype));
            let operands = [a.clone(), b.clone()];
            let (y, down) =
                lora_product::<B>(x.into_primitive(), packed.clone(), operands, bias, spec);
            let state = LoraState {
                x: x_id,
                packed,
                a,
                b,
                down,
                spec,
                shared,
            };
            prep.finish(state, y)
        }
        OpsKind::UnTracked(prep) => {
            let x = x.into_primitive();
            let [a, b] = factors;
            prep.finish(match bias {
                None => B::quant_matmul_lora(x, packed, a, b, spec),
                Some(bias) => B::quant_matmul_bias_lora(x, packed, bias, a, b, spec),
            })
        }
    }
}

impl<B: QuantBackend> LoraState<B> {
    fn register(
        self,
        grad: FloatTensor<B>,
        [of_x, of_a, of_b]: [Option<NodeId>; 3],
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let Self { a, b, spec, .. } = self;
        let MatmulSpec { m, weight, .. } = spec.matmul;
        let (n, k, rank, dtype) = (weight.rows, weight.columns, spec.rank, weight.dtype);
        let transposed_lhs = |sizes| DenseSpec {
            transpose_lhs: true,
            ..DenseSpec::of_matrices(sizes, false, dtype)
        };
        if let Some(node) = of_b {
            let db = B::dense_matmul(self.down, grad.clone(), transposed_lhs([rank, n, m]));
            grads.register::<B>(node, cast::<B>(db, spec.dtype));
        }
        if of_x.is_none() && of_a.is_none() {
            return;
        }
        let of_h = DenseSpec {
            scale: spec.scale as f32,
            ..DenseSpec::of_matrices([m, rank, n], true, dtype)
        };
        let h = B::dense_matmul(grad.clone(), b, of_h);
        if let Some(node) = of_a {
            let x = checkpointer.retrieve_node_output(self.x);
            let da = B::dense_matmul(x, h.clone(), transposed_lhs([k, rank, m]));
            grads.register::<B>(node, cast::<B>(da, spec.dtype));
        }
        let Some(node) = of_x else {
            return;
        };
        let others = self.shared.as_ref().and_then(SharedGradient::take);
        let of_branch = DenseSpec::of_matrices([m, k, rank], true, dtype);
        let dx = match others {
            None => B::dense_matmul(h, a, of_branch),
            Some(others) => B::dense_matmul_add(others, h, a, of_branch),
        };
        let dx = B::quant_matmul_add(dx, grad, self.packed, spec.matmul, false);
        match self.shared {
            None => grads.register::<B>(node, dx),
            Some(shared) => shared.put(dx),
        }
    }
}

impl<B: QuantBackend, const N: usize> Backward<B, N> for LoraBackward {
    type State = LoraState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = ops.parents.map(|parent| parent.map(|parent| parent.id));
        let parents = register_bias::<B, 3, N>(parents, &grad, grads);
        ops.state.register(grad, parents, grads, checkpointer);
    }
}

/// A zero with the gradients of a product that is not computed.
pub(super) fn lora_seed<B: QuantBackend, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    packed: IntTensor<B>,
    factors: [FloatTensor<Autodiff<B, C>>; 2],
    grad: FloatTensor<B>,
    spec: LoraSpec,
) -> FloatTensor<Autodiff<B, C>> {
    let [a, b] = &factors;
    let kind = LoraSeedBackward.prepare::<C>([x.node(), a.node(), b.node()]);
    let zero = B::gradient_seed(x.primitive().clone(), grad.clone());
    match kind.compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let x_id = prep.checkpoint(&x);
            let dtype = spec.matmul.weight.dtype;
            let [a, b] = factors.map(|factor| cast::<B>(factor.into_primitive(), dtype));
            let down = B::dense_matmul(x.into_primitive(), a.clone(), spec.down(dtype));
            let state = LoraState {
                x: x_id,
                packed,
                a,
                b,
                down,
                spec,
                shared: None,
            };
            prep.finish((state, grad), zero)
        }
        OpsKind::UnTracked(prep) => prep.finish(zero),
    }
}

/// As [`LoraBackward`], of a gradient that was given.
#[derive(Debug)]
struct LoraSeedBackward;

impl<B: QuantBackend> Backward<B, 3> for LoraSeedBackward {
    type State = (LoraState<B>, FloatTensor<B>);

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        grads.consume::<B>(&ops.node);
        let (state, grad) = ops.state;
        let parents = ops.parents.map(|parent| parent.map(|parent| parent.id));
        state.register(grad, parents, grads, checkpointer);
    }
}

/// What several products have in common: its gradient is the one that they have put down.
#[cfg(feature = "cube")]
#[derive(Debug)]
pub(super) struct Fork;

#[cfg(feature = "cube")]
impl<B: QuantBackend> Backward<B, 1> for Fork {
    type State = SharedGradient<FloatTensor<B>>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = ops.state.take();
        for parent in ops.parents.into_iter().flatten() {
            if let Some(gradient) = &gradient {
                grads.register::<B>(parent.id, gradient.clone());
            }
        }
    }
}

/// `x` as a node of its own, and where its consumers put the gradient.
#[cfg(feature = "cube")]
pub(super) fn fork<B: QuantBackend, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
) -> (FloatTensor<Autodiff<B, C>>, SharedGradient<FloatTensor<B>>) {
    let shared = SharedGradient::default();
    let kind = Fork.prepare::<C>([x.node()]);
    let x = match kind.compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(shared.clone(), x.into_primitive()),
        OpsKind::UnTracked(prep) => prep.finish(x.into_primitive()),
    };
    (x, shared)
}
