//! Models with random weights.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::nn::AnyLinear;
use burn_nf4::nn::{Nf4Linear, QLoraLinearConfig};

use crate::error::ModelError;
use crate::model::attention::Attention;
use crate::model::load::linears;
use crate::model::{DecoderLayer, Llama, LlamaConfig, Mlp, RmsNorm};

/// A frozen model of these sizes with random weights, to time it or to try something out: packed linear
/// layers, with branches of a rank if one is given, and the rest in `dtype` as in published checkpoints.
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
    let hidden = config.hidden_size;
    let small = Distribution::Normal(0.0, 0.02);
    let norm = || RmsNorm {
        weight: Param::from_tensor(Tensor::ones([hidden], options)),
        eps: config.rms_norm_eps,
    };
    let projection = |[d_output, d_input]: [usize; 2]| {
        let dense = Linear {
            weight: Param::from_tensor(Tensor::random([d_input, d_output], small, options)),
            bias: None,
        };
        let packed = Nf4Linear::quantize(dense, QuantConfig::default())?;
        let projection = AnyLinear::Nf4(packed);
        Ok::<_, ModelError>(match rank {
            Some(rank) => projection.with_lora(&QLoraLinearConfig::new(rank), device)?,
            None => projection,
        })
    };
    let layers = (0..config.num_hidden_layers)
        .map(|_| {
            let [q, k, v, o, gate, up, down] = linears(config).map(|(_, dims, _)| projection(dims));
            Ok(DecoderLayer {
                input_layernorm: norm(),
                self_attn: Attention::new([q?, k?, v?, o?], config),
                post_attention_layernorm: norm(),
                mlp: Mlp {
                    gate_proj: gate?,
                    up_proj: up?,
                    down_proj: down?,
                },
            })
        })
        .collect::<Result<_, ModelError>>()?;
    let lm_head = (!config.tie_word_embeddings).then(|| {
        AnyLinear::Dense(Linear {
            weight: Param::from_tensor(Tensor::random([hidden, config.vocab_size], small, options)),
            bias: None,
        })
    });
    let embed_tokens = Tensor::random([config.vocab_size, hidden], small, options);
    let model = Llama {
        embed_tokens: Param::from_tensor(embed_tokens),
        layers,
        norm: norm(),
        lm_head,
        sliding_window: config.sliding_window,
    };
    Ok(model.no_grad())
}
