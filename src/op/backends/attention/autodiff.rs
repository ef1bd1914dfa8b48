//! Gradients of attention. The backward pass keeps queries, keys, values, the output and the log-sum-exp;
//! scores are computed again.

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend};
use burn::tensor::{DType, Shape};

use crate::op::attention::{AttentionBackend, AttentionSpec, finite, of_heads};

impl<B: AttentionBackend, C: CheckpointStrategy> AttentionBackend for Autodiff<B, C> {
    fn attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let operands = [q, k, v];
        let prep = AttentionBackward.prepare::<C>(operands.each_ref().map(|x| x.node()));
        match prep.compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let ids = operands.each_ref().map(|operand| prep.checkpoint(operand));
                let [q, k, v] = operands.map(|operand| operand.into_primitive());
                let (output, lse) = B::attention_forward(q, k, v, ranges.clone(), spec);
                let state = State {
                    operands: ids,
                    ranges,
                    output: output.clone(),
                    lse: lse.clone(),
                    spec,
                };
                (prep.finish(state, output), Self::from_inner(lse))
            }
            OpsKind::UnTracked(prep) => {
                let [q, k, v] = operands.map(|operand| operand.into_primitive());
                let (output, lse) = B::attention_forward(q, k, v, ranges, spec);
                (prep.finish(output), Self::from_inner(lse))
            }
        }
    }

    fn attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        output: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        // There are no gradients of these gradients.
        let [q, k, v, output, lse, grad] =
            [q, k, v, output, lse, grad].map(|tensor| tensor.into_primitive());
        let (dq, dk, dv) = B::attention_backward(q, k, v, ranges, output, lse, grad, spec);
        (
            Self::from_inner(dq),
            Self::from_inner(dk),
            Self::from_inner(dv),
        )
    }

    fn attention_sinks(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        sinks: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let nodes = [q.node(), k.node(), v.node(), sinks.node()];
        match AttentionBackward
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let operands = [&q, &k, &v].map(|operand| prep.checkpoint(operand));
                let [q, k, v, sinks] = [q, k, v, sinks].map(|operand| operand.into_primitive());
                let (output, lse) =
                    B::attention_sinks(q, k, v, ranges.clone(), sinks.clone(), spec);
                let state = State {
                    operands,
                    ranges,
                    output: output.clone(),
                    lse: lse.clone(),
                    spec,
                };
                let output = prep.finish((state, sinks), output);
                (output, Self::from_inner(lse))
            }
            OpsKind::UnTracked(prep) => {
                let [q, k, v, sinks] = [q, k, v, sinks].map(|operand| operand.into_primitive());
                let (output, lse) = B::attention_sinks(q, k, v, ranges, sinks, spec);
                (prep.finish(output), Self::from_inner(lse))
            }
        }
    }
}

/// Backward of attention. With `P = exp(S - lse)`: `dV = Pᵀ dO`, `dS = P (dO Vᵀ - rowsum(dO O))`, and
/// `dQ`, `dK` the products of `dS` with `K` and `Q`. A sink is a key without a value:
/// `d sink = -Σ exp(sink - lse) rowsum(dO O)`.
#[derive(Debug)]
struct AttentionBackward;

/// What the backward pass needs.
#[derive(Debug, Clone)]
struct State<F, I> {
    /// Queries, keys, values.
    operands: [NodeId; 3],
    ranges: I,
    output: F,
    lse: F,
    spec: AttentionSpec,
}

type StateOf<B> = State<FloatTensor<B>, IntTensor<B>>;

fn register<B: AttentionBackend>(
    state: StateOf<B>,
    grad: FloatTensor<B>,
    parents: [Option<NodeId>; 3],
    grads: &mut Gradients,
    checkpointer: &mut Checkpointer,
) {
    let [q, k, v] = state
        .operands
        .map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
    if parents.iter().all(Option::is_none) {
        return;
    }
    let State {
        ranges,
        output,
        lse,
        spec,
        ..
    } = state;
    let (dq, dk, dv) = B::attention_backward(q, k, v, ranges, output, lse, grad, spec);
    for (parent, gradient) in parents.into_iter().zip([dq, dk, dv]) {
        if let Some(parent) = parent {
            grads.register::<B>(parent, gradient);
        }
    }
}

impl<B: AttentionBackend> Backward<B, 3> for AttentionBackward {
    type State = StateOf<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = ops.parents.map(|parent| parent.map(|parent| parent.id));
        register::<B>(ops.state, grad, parents, grads, checkpointer);
    }
}

impl<B: AttentionBackend> Backward<B, 4> for AttentionBackward {
    type State = (StateOf<B>, FloatTensor<B>);

    fn backward(
        self,
        ops: Ops<Self::State, 4>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let [q, k, v, of_sinks] = ops.parents.map(|parent| parent.map(|parent| parent.id));
        let (state, sinks) = ops.state;
        if let Some(node) = of_sinks {
            let (output, lse) = (state.output.clone(), state.lse.clone());
            let d_sinks = sinks_grad::<B>(output, lse, grad.clone(), sinks, state.spec);
            grads.register::<B>(node, d_sinks);
        }
        register::<B>(state, grad, [q, k, v], grads, checkpointer);
    }
}

fn sinks_grad<B: AttentionBackend>(
    output: FloatTensor<B>,
    lse: FloatTensor<B>,
    grad: FloatTensor<B>,
    sinks: FloatTensor<B>,
    spec: AttentionSpec,
) -> FloatTensor<B> {
    let [output, grad] = [output, grad].map(|x| B::float_cast(x, DType::F32.into()));
    // [batch, queries, heads, 1], then as the log-sum-exp is.
    let delta = B::float_sum_dim(B::float_mul(output, grad), 3);
    let AttentionSpec {
        batch,
        queries,
        heads,
        ..
    } = spec;
    let delta = B::float_reshape(delta, Shape::from([batch, queries, heads]));
    let delta = B::float_swap_dims(delta, 1, 2);
    // Of no sink and no key the log-sum-exp is `-inf` too, and so is the difference no number.
    let sinks = of_heads::<B>(finite::<B>(sinks), spec);
    let part = B::float_exp(B::float_sub(sinks, finite::<B>(lse)));
    let each = B::float_neg(B::float_mul(part, delta));
    let sums = B::float_sum_dim(B::float_sum_dim(each, 2), 0);
    B::float_reshape(sums, Shape::from([heads]))
}
