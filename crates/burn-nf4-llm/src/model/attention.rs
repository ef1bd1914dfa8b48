//! Grouped-query attention.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_nf4::linear_layers;
use burn_nf4::nn::AnyLinear;

use crate::model::Rotation;
use crate::model::cache::LayerCache;
use crate::model::config::LlamaConfig;

/// Added to the score of a position that must not be seen. Finite, so that a row of padding, which
/// sees nothing, gives no NaN.
const HIDDEN: f32 = -1e30;

/// Scores are computed for at most this many positions at a time, so that a long prompt does not
/// hold the whole square of them.
const QUERY_CHUNK: usize = 1024;

/// What the layers of one forward pass share.
#[derive(Debug, Clone)]
pub struct Pass {
    /// Cosines and sines of the positions.
    pub rotation: Rotation,
    /// One mask for each chunk of queries, none if everything is seen.
    masks: Vec<Tensor<5>>,
}

impl Pass {
    /// The masks for `length` queries after `start` earlier positions: causal, within the window,
    /// and without the padding at the start of each row.
    pub fn new(
        rotation: Rotation,
        start: usize,
        length: usize,
        padding: &[usize],
        window: Option<usize>,
        device: &Device,
    ) -> Self {
        let end = start + length;
        let padded = padding.iter().any(|&pad| pad > 0);
        let windowed = window.is_some_and(|window| end > window);
        if length == 1 && !padded && !windowed {
            return Self {
                rotation,
                masks: Vec::new(),
            };
        }
        let padding = if padded { padding } else { &[0] };
        let masks = chunks(length)
            .map(|chunk| {
                let queries = start + chunk.start..start + chunk.end;
                mask(queries, end, padding, window, device)
            })
            .collect();
        Self { rotation, masks }
    }
}

/// The chunks of `0..length`.
fn chunks(length: usize) -> impl Iterator<Item = Range<usize>> {
    (0..length)
        .step_by(QUERY_CHUNK)
        .map(move |start| start..length.min(start + QUERY_CHUNK))
}

/// What to add to the scores, `[batch or 1, 1, 1, queries, keys]`.
fn mask(
    queries: Range<usize>,
    keys: usize,
    padding: &[usize],
    window: Option<usize>,
    device: &Device,
) -> Tensor<5> {
    let rows = queries.len();
    let shape = [padding.len(), rows, keys];
    let query = Tensor::<1, Int>::arange(queries.start as i64..queries.end as i64, device)
        .reshape([1, rows, 1])
        .expand(shape);
    let key = Tensor::<1, Int>::arange(0..keys as i64, device)
        .reshape([1, 1, keys])
        .expand(shape);
    let mut hidden = key.clone().greater(query.clone());
    if let Some(window) = window {
        let reach = key.clone() + window as i64;
        hidden = hidden.bool_or(reach.lower_equal(query));
    }
    if padding != [0] {
        let pads: Vec<i64> = padding.iter().map(|&pad| pad as i64).collect();
        let pads = Tensor::<1, Int>::from_data(TensorData::new(pads, [padding.len()]), device)
            .reshape([padding.len(), 1, 1])
            .expand(shape);
        hidden = hidden.bool_or(key.lower(pads));
    }
    let bias = hidden.float().cast(DType::F32) * HIDDEN;
    bias.reshape([padding.len(), 1, 1, rows, keys])
}

/// The attention block of a layer.
#[derive(Module, Debug)]
pub struct Attention {
    /// To the queries.
    pub q_proj: AnyLinear,
    /// To the keys.
    pub k_proj: AnyLinear,
    /// To the values.
    pub v_proj: AnyLinear,
    /// Back to the hidden size.
    pub o_proj: AnyLinear,
    /// Heads of queries.
    pub num_heads: usize,
    /// Heads of keys and values.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

linear_layers!(Attention {
    q_proj,
    k_proj,
    v_proj,
    o_proj
});

impl Attention {
    /// A block of projections with the heads of a model.
    pub fn new([q, k, v, o]: [AnyLinear; 4], config: &LlamaConfig) -> Self {
        Self {
            q_proj: q,
            k_proj: k,
            v_proj: v,
            o_proj: o,
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        }
    }

    /// # Shapes
    /// - `x`: `[batch, length, hidden_size]`, and so the result
    pub fn forward(&self, x: Tensor<3>, pass: &Pass, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let [batch, length, _] = x.dims();
        let heads = |x: Tensor<3>, count: usize| {
            x.reshape([batch, length, count, self.head_dim])
                .swap_dims(1, 2)
        };
        let q = heads(self.q_proj.forward(x.clone()), self.num_heads);
        let k = heads(self.k_proj.forward(x.clone()), self.num_kv_heads);
        let v = heads(self.v_proj.forward(x), self.num_kv_heads);
        let (q, k) = (pass.rotation.apply(q), pass.rotation.apply(k));
        let (k, v) = match cache {
            Some(cache) => cache.append(k, v),
            None => (k, v),
        };

        let mut outputs: Vec<Tensor<4>> = chunks(length)
            .enumerate()
            .map(|(index, chunk)| {
                let q = q.clone().narrow(2, chunk.start, chunk.len());
                self.attend(q, k.clone(), v.clone(), pass.masks.get(index))
            })
            .collect();
        let y = match outputs.len() {
            1 => outputs.remove(0),
            _ => Tensor::cat(outputs, 2),
        };
        let y = y
            .swap_dims(1, 2)
            .reshape([batch, length, self.num_heads * self.head_dim]);
        self.o_proj.forward(y)
    }

    /// The queries that share a head of keys are the rows of one product, so that keys and values
    /// are not repeated. Scores and softmax are in f32, as in transformers.
    fn attend(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        mask: Option<&Tensor<5>>,
    ) -> Tensor<4> {
        let [batch, _, rows, head_dim] = q.dims();
        let keys = k.dims()[2];
        let dtype = q.dtype();
        let groups = self.num_heads / self.num_kv_heads;
        let grouped = [batch, self.num_kv_heads, groups * rows, head_dim];

        let scores = q.reshape(grouped).matmul(k.swap_dims(2, 3));
        let mut scores = scores.cast(DType::F32) * (head_dim as f64).powf(-0.5);
        if let Some(mask) = mask {
            scores = (scores.reshape([batch, self.num_kv_heads, groups, rows, keys])
                + mask.clone())
            .reshape([batch, self.num_kv_heads, groups * rows, keys]);
        }
        softmax(scores, 3)
            .cast(dtype)
            .matmul(v)
            .reshape([batch, self.num_heads, rows, head_dim])
    }
}
