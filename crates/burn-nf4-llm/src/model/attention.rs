//! Grouped-query attention (arXiv 2305.13245).

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn_nf4::linear_layers;
use burn_nf4::nn::{AnyLinear, joined_forward};
use burn_nf4::op::{AttentionOptions, attention};

use crate::model::cache::LayerCache;
use crate::model::norm::RmsNorm;
use crate::model::pass::Pass;
use crate::model::variants::linear_variants;

/// The attention block of a layer.
#[derive(Module, Debug)]
pub struct Attention {
    /// The projections to queries, keys and values.
    pub qkv: QkvProjections,
    /// Back to the hidden size.
    pub o_proj: AnyLinear,
    /// The norm of the queries before they are rotated, if there is one: over each head, or over all heads
    /// together, as its size says.
    pub q_norm: Option<RmsNorm>,
    /// The norm of the keys, in the same way.
    pub k_norm: Option<RmsNorm>,
    /// `[num_heads]`: a score of each head that takes part in every softmax and has no value, if there are
    /// any (arXiv 2309.17453, 2508.10925).
    pub sinks: Option<Param<Tensor<1>>>,
    /// Heads of queries.
    pub num_heads: usize,
    /// Heads of keys and values.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// How many positions a token sees, itself included; all before it if none.
    pub window: Option<usize>,
    /// Which of the model's rotary embeddings it has, if any.
    pub rope: Option<usize>,
    /// The scale of the scores, and their cap.
    #[module(skip)]
    pub options: AttentionOptions,
}

/// The projections to queries, keys and values, as the checkpoints of a family have them.
#[allow(
    clippy::large_enum_variant,
    reason = "a model has few, and nearly all are of the larger kind"
)]
#[derive(Module, Debug)]
pub enum QkvProjections {
    /// A matrix each.
    Separate(SeparateQkv),
    /// One for all.
    Fused(FusedQkv),
}

/// A projection each.
#[derive(Module, Debug)]
pub struct SeparateQkv {
    /// To the queries.
    pub q_proj: AnyLinear,
    /// To the keys.
    pub k_proj: AnyLinear,
    /// To the values.
    pub v_proj: AnyLinear,
}

/// One projection, with the rows of queries, keys and values in this order.
#[derive(Module, Debug)]
pub struct FusedQkv {
    /// To all of them.
    pub qkv_proj: AnyLinear,
}

linear_layers!(SeparateQkv {
    q_proj,
    k_proj,
    v_proj
});
linear_layers!(FusedQkv { qkv_proj });
linear_variants!(QkvProjections { Separate, Fused });
linear_layers!(Attention { qkv, o_proj });

impl Attention {
    /// Attention to what `x` and the cache hold.
    ///
    /// # Shapes
    /// - `x`: `[batch, length, hidden_size]`, and so the result
    pub fn forward(&self, x: Tensor<3>, pass: &Pass, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let [batch, length, _] = x.dims();
        let [q, k, v] = self.project(x);
        let heads = |x: Tensor<3>, count: usize| {
            x.reshape([batch, length, count, self.head_dim])
                .swap_dims(1, 2)
        };
        let q = heads(normalised(&self.q_norm, q), self.num_heads);
        let k = heads(normalised(&self.k_norm, k), self.num_kv_heads);
        let v = heads(v, self.num_kv_heads);
        let rotation = self.rope.map(|rope| pass.rotation(rope));
        let (q, k, v) = match (cache, pass.position()) {
            (Some(cache), Some(position)) => cache.put(q, k, v, rotation, position),
            (cache, _) => {
                let rotate = |x| match rotation {
                    Some(rotation) => rotation.apply(x),
                    None => x,
                };
                let (q, k) = (rotate(q), rotate(k));
                let (k, v) = match cache {
                    Some(cache) => cache.append(k, v),
                    None => (k, v),
                };
                (q, k, v)
            }
        };

        let ranges = pass.ranges(self.window);
        let sinks = self.sinks.as_ref().map(Param::val);
        let y = attention(q, k, v, ranges, sinks, self.options).expect("the shapes fit");
        let y = y
            .swap_dims(1, 2)
            .reshape([batch, length, self.num_heads * self.head_dim]);
        self.o_proj.forward(y)
    }

    /// Queries, keys and values, `[batch, length, heads * head_dim]` each.
    fn project(&self, x: Tensor<3>) -> [Tensor<3>; 3] {
        match &self.qkv {
            QkvProjections::Separate(SeparateQkv {
                q_proj,
                k_proj,
                v_proj,
            }) => joined_forward([q_proj, k_proj, v_proj], x),
            QkvProjections::Fused(FusedQkv { qkv_proj }) => {
                let all = qkv_proj.forward(x);
                let [of_q, of_kv] = [self.num_heads, self.num_kv_heads].map(|n| n * self.head_dim);
                [
                    all.clone().narrow(2, 0, of_q),
                    all.clone().narrow(2, of_q, of_kv),
                    all.narrow(2, of_q + of_kv, of_kv),
                ]
            }
        }
    }
}

/// Normalises each group of as many elements as the norm has weights: a head, or all heads.
fn normalised(norm: &Option<RmsNorm>, x: Tensor<3>) -> Tensor<3> {
    let Some(norm) = norm else {
        return x;
    };
    let [batch, length, width] = x.dims();
    let size = norm.weight.dims()[0];
    let groups = x.reshape([batch, length, width / size, size]);
    norm.forward(groups).reshape([batch, length, width])
}
