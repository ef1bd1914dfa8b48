//! Gradients. For the backward pass of a packed weight only that is kept: no dense copy of it.

use std::any::TypeId;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::retro_forward::RetroForward;
use burn::backend::autodiff::checkpoint::state::BackwardStates;
use burn::backend::autodiff::checkpoint::strategy::{
    BalancedCheckpointing, CheckpointStrategy, NoCheckpointing,
};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, TensorMetadata};
use burn::tensor::Shape;

use super::lora::{LoraBackward, lora, lora_seed};
use crate::op::base::{
    DenseSpec, DequantizeSpec, EmbeddingSpec, LinearSpec, LoraSpec, MatmulSpec, MatmulStrategy,
    QuantBackend, QuantizeSpec, WeightLoraSpec, add_lora,
};

impl<B: QuantBackend, C: CheckpointStrategy> QuantBackend for Autodiff<B, C> {
    fn quant_quantize(weight: FloatTensor<Self>, spec: QuantizeSpec) -> IntTensor<Self> {
        B::quant_quantize(weight.into_primitive(), spec)
    }

    fn quant_dequantize(packed: IntTensor<Self>, spec: DequantizeSpec) -> FloatTensor<Self> {
        // The weight is frozen: the result is a constant to autodiff.
        Self::from_inner(B::quant_dequantize(packed, spec))
    }

    fn quant_embedding(
        ids: IntTensor<Self>,
        packed: IntTensor<Self>,
        spec: EmbeddingSpec,
    ) -> FloatTensor<Self> {
        // Ids have no gradient and the weight is frozen.
        Self::from_inner(B::quant_embedding(ids, packed, spec))
    }

    fn quant_linear(
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
                let y = B::quant_linear(x, packed.clone(), spec);
                prep.finish((packed, spec), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::quant_linear(x, packed, spec)),
        }
    }

    fn quant_matmul(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self> {
        Self::quant_linear(x, packed, spec.linear())
    }

    fn quant_matmul_bias(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        bias: FloatTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self> {
        let ((x, x_node), (bias, bias_node)) = (x.into_parts(), bias.into_parts());
        match LinearBackward
            .prepare::<C>([x_node, bias_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let y = B::quant_matmul_bias(x, packed.clone(), bias, spec);
                prep.finish((packed, spec.linear()), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::quant_matmul_bias(x, packed, bias, spec)),
        }
    }

    fn quant_matmul_lora(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: LoraSpec,
    ) -> FloatTensor<Self> {
        if !spec.matmul.cublaslt {
            let y = Self::quant_matmul(x.clone(), packed, spec.matmul);
            return add_lora::<Self>(y, x, a, b, spec);
        }
        let kind = LoraBackward
            .prepare::<C>([x.node(), a.node(), b.node()])
            .compute_bound()
            .stateful();
        lora(kind, x, packed, [a, b], None, spec, None)
    }

    fn quant_matmul_bias_lora(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        bias: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: LoraSpec,
    ) -> FloatTensor<Self> {
        if !spec.matmul.cublaslt {
            let y = Self::quant_matmul_bias(x.clone(), packed, bias, spec.matmul);
            return add_lora::<Self>(y, x, a, b, spec);
        }
        let kind = LoraBackward
            .prepare::<C>([x.node(), a.node(), b.node(), bias.node()])
            .compute_bound()
            .stateful();
        let bias = Some(bias.into_primitive());
        lora(kind, x, packed, [a, b], bias, spec, None)
    }

    fn gradient_seed(y: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let kind = SeedBackward.prepare::<C>([y.node()]);
        let (y, grad) = (y.into_primitive(), grad.into_primitive());
        let zero = B::gradient_seed(y, grad.clone());
        match kind.compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(grad, zero),
            OpsKind::UnTracked(prep) => prep.finish(zero),
        }
    }

    fn quant_lora_seed(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        spec: LoraSpec,
    ) -> FloatTensor<Self> {
        lora_seed::<B, C>(x, packed, [a, b], grad.into_primitive(), spec)
    }

    fn dense_matmul(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        spec: DenseSpec,
    ) -> FloatTensor<Self> {
        let kind = DenseBackward
            .prepare::<C>([lhs.node(), rhs.node()])
            .compute_bound()
            .stateful();
        dense(kind, lhs, rhs, None, spec)
    }

    fn dense_matmul_bias(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        spec: DenseSpec,
    ) -> FloatTensor<Self> {
        let kind = DenseBackward
            .prepare::<C>([lhs.node(), rhs.node(), bias.node()])
            .compute_bound()
            .stateful();
        dense(kind, lhs, rhs, Some(bias.into_primitive()), spec)
    }

    fn quant_weight(
        anchor: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: DequantizeSpec,
    ) -> FloatTensor<Self> {
        // Recomputing costs a gradient for the weight that nobody needs, see `effective_weight`: only
        // where the device asks to save memory.
        if keeps_all::<C>() {
            let weight = B::quant_weight(anchor.into_primitive(), packed, spec);
            return Self::from_inner(weight);
        }
        let recompute = RecomputeWeight::<B> {
            anchor: anchor.primitive().clone(),
            packed: packed.clone(),
            spec,
        };
        let prep = WeightBackward
            .prepare::<C>([anchor.node()])
            .memory_bound()
            .retro_forward(recompute)
            .parents([&anchor]);
        prep.stateless(B::quant_weight(anchor.into_primitive(), packed, spec))
    }

    // With a factor to train recomputed whatever the device's strategy: that one needs the gradient for
    // the weight anyway.
    fn quant_weight_lora(
        anchor: FloatTensor<Self>,
        packed: IntTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: WeightLoraSpec,
    ) -> FloatTensor<Self> {
        let nodes = [anchor.node(), a.node(), b.node()];
        // An operation with an operand outside of the graph is not recomputed; their values are taken
        // from here instead.
        let tracked: Vec<_> = [&anchor, &a, &b]
            .into_iter()
            .filter(|operand| operand.is_tracked())
            .cloned()
            .collect();
        let is_frozen = !a.is_tracked() && !b.is_tracked();
        let factors = [a.into_primitive(), b.into_primitive()];
        if is_frozen && keeps_all::<C>() {
            let [a, b] = factors;
            let weight = B::quant_weight_lora(anchor.into_primitive(), packed, a, b, spec);
            return Self::from_inner(weight);
        }
        let recompute = RecomputeWeightLora::<B> {
            anchor: anchor.primitive().clone(),
            packed: packed.clone(),
            factors: factors.clone(),
            spec,
        };
        let prep = WeightBackward
            .prepare::<BalancedCheckpointing>(nodes)
            .memory_bound()
            .retro_forward(recompute)
            .parents(&tracked);
        let [a, b] = factors.clone();
        match prep.stateful() {
            OpsKind::Tracked(prep) => {
                let weight = B::quant_weight_lora(anchor.into_primitive(), packed, a, b, spec);
                prep.finish((factors, spec.scale), weight)
            }
            OpsKind::UnTracked(prep) => {
                let weight = B::quant_weight_lora(anchor.into_primitive(), packed, a, b, spec);
                prep.finish(weight)
            }
        }
    }

    fn quant_linear_backward(
        grad: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: LinearSpec,
    ) -> FloatTensor<Self> {
        let (grad, node) = grad.into_parts();
        match InputGradBackward
            .prepare::<C>([node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let dx = B::quant_linear_backward(grad, packed.clone(), spec);
                prep.finish((packed, spec), dx)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::quant_linear_backward(grad, packed, spec)),
        }
    }
}

/// Backward of a seed: the gradient that it was made with.
#[derive(Debug)]
struct SeedBackward;

impl<B: QuantBackend> Backward<B, 1> for SeedBackward {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        grads.consume::<B>(&ops.node);
        for parent in ops.parents.into_iter().flatten() {
            grads.register::<B>(parent.id, ops.state.clone());
        }
    }
}

/// Whether a device keeps whatever the backward pass needs.
fn keeps_all<C: CheckpointStrategy>() -> bool {
    TypeId::of::<C>() == TypeId::of::<NoCheckpointing>()
}

/// A product of dense matrices, with a bias where that is the last of the parents.
fn dense<B: QuantBackend, C: CheckpointStrategy, const N: usize>(
    kind: OpsKind<DenseBackward, B, DenseState, C, N>,
    lhs: FloatTensor<Autodiff<B, C>>,
    rhs: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<B>>,
    spec: DenseSpec,
) -> FloatTensor<Autodiff<B, C>> {
    let tracked = [lhs.is_tracked(), rhs.is_tracked()];
    let product = |lhs, rhs| match bias {
        None => B::dense_matmul(lhs, rhs, spec),
        Some(bias) => B::dense_matmul_bias(lhs, rhs, bias, spec),
    };
    match kind {
        OpsKind::Tracked(mut prep) => {
            let lhs_id = tracked[1].then(|| prep.checkpoint(&lhs));
            let rhs_id = tracked[0].then(|| prep.checkpoint(&rhs));
            let y = product(lhs.into_primitive(), rhs.into_primitive());
            prep.finish((lhs_id, rhs_id, spec), y)
        }
        OpsKind::UnTracked(prep) => {
            prep.finish(product(lhs.into_primitive(), rhs.into_primitive()))
        }
    }
}

/// Registers the gradient of a bias, the sum of the rows of `grad`, if there is a parent behind the first
/// `M`; returns these.
pub(super) fn register_bias<B: QuantBackend, const M: usize, const N: usize>(
    parents: [Option<NodeId>; N],
    grad: &FloatTensor<B>,
    grads: &mut Gradients,
) -> [Option<NodeId>; M] {
    if let Some(&Some(node)) = parents.get(M) {
        grads.register::<B>(node, sum_of_rows::<B>(grad.clone()));
    }
    std::array::from_fn(|index| parents[index])
}

/// Backward of `y = x Wᵀ + b`: `dx = dy W`, and `db` the sum of the rows of `dy`. The bias is the last
/// parent, if there is one.
#[derive(Debug)]
struct LinearBackward;

impl<B: QuantBackend, const N: usize> Backward<B, N> for LinearBackward {
    type State = (IntTensor<B>, LinearSpec);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = ops.parents.map(|parent| parent.map(|parent| parent.id));
        let [of_x] = register_bias::<B, 1, N>(parents, &grad, grads);
        if let Some(node) = of_x {
            let (packed, spec) = ops.state;
            grads.register::<B>(node, B::quant_linear_backward(grad, packed, spec));
        }
    }
}

/// The sum of all rows, `[n]` of `[..., n]`.
fn sum_of_rows<B: QuantBackend>(grad: FloatTensor<B>) -> FloatTensor<B> {
    let shape = grad.shape();
    let n = shape[shape.rank() - 1];
    let rows = shape.num_elements() / n;
    let sums = B::float_sum_dim(B::float_reshape(grad, Shape::from([rows, n])), 0);
    B::float_reshape(sums, Shape::from([n]))
}

/// Backward of `dx = dy W`, for gradients of gradients: `ddy = ddx Wᵀ`.
#[derive(Debug)]
struct InputGradBackward;

impl<B: QuantBackend> Backward<B, 1> for InputGradBackward {
    type State = (IntTensor<B>, LinearSpec);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (packed, spec) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |grad| {
            let strategy = MatmulStrategy::Auto;
            B::quant_linear(grad, packed, LinearSpec { strategy, ..spec })
        });
    }
}

/// Backward of a decoded weight: it is frozen, the gradient for it ends here. With a low-rank branch
/// `Wᵀ + s A B`: `dA = s dW Bᵀ`, `dB = s Aᵀ dW`.
#[derive(Debug)]
struct WeightBackward;

impl<B: QuantBackend> Backward<B, 1> for WeightBackward {
    type State = ();

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        grads.consume::<B>(&ops.node);
    }
}

impl<B: QuantBackend> Backward<B, 3> for WeightBackward {
    type State = ([FloatTensor<B>; 2], f64);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [_, of_a, of_b] = ops.parents;
        let ([a, b], scale) = ops.state;
        let scaled = |product| B::float_mul_scalar(product, scale.into());
        if let Some(node) = of_b {
            let a = B::float_swap_dims(a, 0, 1);
            grads.register::<B>(node.id, scaled(B::float_matmul(a, grad.clone())));
        }
        if let Some(node) = of_a {
            let b = B::float_swap_dims(b, 0, 1);
            grads.register::<B>(node.id, scaled(B::float_matmul(grad, b)));
        }
    }
}

/// Decodes a weight again in the backward pass.
#[derive(Debug)]
struct RecomputeWeight<B: QuantBackend> {
    anchor: FloatTensor<B>,
    packed: IntTensor<B>,
    spec: DequantizeSpec,
}

impl<B: QuantBackend> RetroForward for RecomputeWeight<B> {
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let weight = B::quant_weight(self.anchor.clone(), self.packed.clone(), self.spec);
        states.save(out, weight);
    }
}

/// Decodes a weight with a low-rank branch again in the backward pass.
#[derive(Debug)]
struct RecomputeWeightLora<B: QuantBackend> {
    anchor: FloatTensor<B>,
    packed: IntTensor<B>,
    factors: [FloatTensor<B>; 2],
    spec: WeightLoraSpec,
}

impl<B: QuantBackend> RetroForward for RecomputeWeightLora<B> {
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let (anchor, packed) = (self.anchor.clone(), self.packed.clone());
        let [a, b] = self.factors.clone();
        states.save(out, B::quant_weight_lora(anchor, packed, a, b, self.spec));
    }
}

/// Backward of `D = s A B + b`: `dA = s dD Bᵀ`, `dB = s Aᵀ dD`, and `db` the sum of the rows of `dD`.
#[derive(Debug)]
struct DenseBackward;

/// What was kept of `A` and `B`, each if the other wants a gradient.
type DenseState = (Option<NodeId>, Option<NodeId>, DenseSpec);

impl DenseBackward {
    fn register<B: QuantBackend>(
        (lhs, rhs, spec): DenseState,
        grad: FloatTensor<B>,
        [of_lhs, of_rhs]: [Option<NodeId>; 2],
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let DenseSpec {
            m,
            n,
            k,
            transpose_lhs,
            transpose_rhs,
            ..
        } = spec;
        let of = |[m, n, k]: [usize; 3], transpose_lhs, transpose_rhs| DenseSpec {
            m,
            n,
            k,
            transpose_lhs,
            transpose_rhs,
            ..spec
        };
        if let (Some(node), Some(rhs)) = (of_lhs, rhs) {
            let (rhs, grad) = (checkpointer.retrieve_node_output(rhs), grad.clone());
            // dA = dD Bᵀ, or where A is stored transposed dAᵀ = B dDᵀ.
            let d_lhs = match transpose_lhs {
                false => B::dense_matmul(grad, rhs, of([m, k, n], false, !transpose_rhs)),
                true => B::dense_matmul(rhs, grad, of([k, m, n], transpose_rhs, true)),
            };
            grads.register::<B>(node, d_lhs);
        }
        if let (Some(node), Some(lhs)) = (of_rhs, lhs) {
            let lhs = checkpointer.retrieve_node_output(lhs);
            // dB = Aᵀ dD, or where B is stored transposed dBᵀ = dDᵀ A.
            let d_rhs = match transpose_rhs {
                false => B::dense_matmul(lhs, grad, of([k, n, m], !transpose_lhs, false)),
                true => B::dense_matmul(grad, lhs, of([n, k, m], true, transpose_lhs)),
            };
            grads.register::<B>(node, d_rhs);
        }
    }
}

impl<B: QuantBackend, const N: usize> Backward<B, N> for DenseBackward {
    type State = DenseState;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = ops.parents.map(|parent| parent.map(|parent| parent.id));
        let parents = register_bias::<B, 2, N>(parents, &grad, grads);
        Self::register::<B>(ops.state, grad, parents, grads, checkpointer);
    }
}
