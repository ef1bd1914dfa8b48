//! Models that begin with fresh weights.

use burn::module::{Initializer, Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::model::LinearLayers;
use burn_nf4::nn::{AnyLinear, Nf4Linear, QLoraLinearConfig};

use crate::error::ModelError;
use crate::model::attention::Attention;
use crate::model::{DecoderLayer, HEAD, Llama, LlamaConfig, Mlp, RmsNorm};

impl LlamaConfig {
    /// A model of these sizes with fresh f32 weights, each made when it is first asked for. One to
    /// load a checkpoint into, therefore, is made at no cost.
    pub fn init(&self, device: &Device) -> Llama {
        let hidden = self.hidden_size;
        let norm = || RmsNorm {
            weight: Initializer::Ones.init([hidden], device),
            eps: self.rms_norm_eps,
        };
        let linear = |d_input, d_output, bias| -> AnyLinear {
            let config = LinearConfig::new(d_input, d_output).with_bias(bias);
            config.init(device).into()
        };
        let inner = self.intermediate_size;
        let layer = |_| DecoderLayer {
            input_layernorm: norm(),
            self_attn: {
                let q = self.num_attention_heads * self.head_dim;
                let kv = self.num_key_value_heads * self.head_dim;
                let bias = self.attention_bias;
                let [q_proj, o_proj] = [linear(hidden, q, bias), linear(q, hidden, bias)];
                let [k_proj, v_proj] = [0, 1].map(|_| linear(hidden, kv, bias));
                Attention::new([q_proj, k_proj, v_proj, o_proj], self)
            },
            post_attention_layernorm: norm(),
            mlp: Mlp {
                gate_proj: linear(hidden, inner, self.mlp_bias),
                up_proj: linear(hidden, inner, self.mlp_bias),
                down_proj: linear(inner, hidden, self.mlp_bias),
            },
        };
        let [mean, std] = [0.0, 0.02];
        Llama {
            embed_tokens: Initializer::Normal { mean, std }.init([self.vocab_size, hidden], device),
            layers: (0..self.num_hidden_layers).map(layer).collect(),
            norm: norm(),
            lm_head: (!self.tie_word_embeddings).then(|| linear(hidden, self.vocab_size, false)),
            sliding_window: self.sliding_window,
        }
    }
}

/// A frozen model of these sizes with random weights, to time it or to try something out: packed linear
/// layers without biases, with branches of a rank if one is given, and the rest in `dtype` as in
/// published checkpoints.
///
/// # Errors
/// Those of [`QLoraLinearConfig::init`] for the rank.
pub fn random(
    config: &LlamaConfig,
    dtype: FloatType,
    rank: Option<usize>,
    device: &Device,
) -> Result<Llama, ModelError> {
    let options = (device, DType::from(dtype));
    let small = Distribution::Normal(0.0, 0.02);
    let matrix = |dims: [usize; 2]| Param::from_tensor(Tensor::<2>::random(dims, small, options));
    let mut model = config.init(device);
    model.embed_tokens = matrix([config.vocab_size, config.hidden_size]);
    let ones = || Param::from_tensor(Tensor::ones([config.hidden_size], options));
    model.norm.weight = ones();
    for layer in &mut model.layers {
        layer.input_layernorm.weight = ones();
        layer.post_attention_layernorm.weight = ones();
    }
    let model = model.try_map_linears(|name, layer| {
        let [d_output, d_input] = layer.dims();
        let dense = Linear {
            weight: matrix([d_input, d_output]),
            bias: None,
        };
        if name == HEAD {
            return Ok(dense.into());
        }
        let packed = AnyLinear::Nf4(Nf4Linear::quantize(dense, QuantConfig::default())?);
        match rank {
            Some(rank) => packed.with_lora(&QLoraLinearConfig::new(rank), device),
            None => Ok(packed),
        }
    })?;
    Ok(model.no_grad())
}
