//! Grouped-query attention.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_nf4::linear_layers;
use burn_nf4::nn::AnyLinear;
use burn_nf4::op::{AttentionMask, AttentionOptions, KeyRanges, attention};

use crate::model::Rotation;
use crate::model::cache::LayerCache;
use crate::model::config::LlamaConfig;

/// What the layers of one forward pass share.
#[derive(Debug, Clone)]
pub struct Pass {
    /// Cosines and sines of the positions.
    pub rotation: Rotation,
    /// The keys that each query sees.
    ranges: KeyRanges,
}

impl Pass {
    /// Of `length` queries after `start` earlier positions: causal, within the window, and without the
    /// padding at the start of each row.
    pub fn new(
        rotation: Rotation,
        start: usize,
        length: usize,
        padding: &[usize],
        window: Option<usize>,
        device: &Device,
    ) -> Self {
        let starts = padding.iter().any(|&pad| pad > 0).then(|| {
            let starts: Vec<i32> = padding.iter().map(|&pad| pad as i32).collect();
            Tensor::<1, Int>::from_data(TensorData::new(starts, [padding.len()]), device)
        });
        let mask = AttentionMask {
            starts,
            ..AttentionMask::causal().with_window(window)
        };
        let ranges = KeyRanges::new(&mask, length, start + length, device);
        Self {
            rotation,
            ranges: ranges.expect("a window of the config is not zero"),
        }
    }
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

        let options = AttentionOptions::default();
        let y = attention(q, k, v, &pass.ranges, None, options).expect("the shapes fit");
        let y = y
            .swap_dims(1, 2)
            .reshape([batch, length, self.num_heads * self.head_dim]);
        self.o_proj.forward(y)
    }
}
