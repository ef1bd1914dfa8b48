//! Models that begin with fresh weights.

use burn::module::{Initializer, Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::model::LinearLayers;
use burn_nf4::nn::{AnyLinear, QLoraLinearConfig, QuantLinear};

use crate::error::ModelError;
use crate::model::attention::{Attention, FusedQkv, QkvProjections, SeparateQkv};
use crate::model::config::{
    DecoderConfig, LayerConfig, MixtureConfig, MixtureForm, NormPlacement, QkNorm,
};
use crate::model::decoder::Decoder;
use crate::model::expert_stacks::StackedExperts;
use crate::model::layer::{DecoderLayer, LayerNorms, Mlp, PostNorms, PreNorms, SandwichNorms};
use crate::model::load::by_rule;
use crate::model::mixture::{GateRouter, MixtureMlp, NamedRouter, Router, is_router};
use crate::model::mlp::{FusedGateUp, GateUpProjections, GatedMlp, SeparateGateUp};
use crate::model::norm::RmsNorm;

impl DecoderConfig {
    /// A model of these sizes with fresh f32 weights, each made when it is first asked for. One to
    /// load a checkpoint into, therefore, is made at no cost.
    pub fn init(&self, device: &Device) -> Decoder {
        let value = self.norm_form.neutral_weight();
        let weight = |size| Initializer::Constant { value }.init([size], device);
        Parts {
            config: self,
            device,
            norm_weight: &weight,
        }
        .decoder()
    }
}

/// Makes the parts of a model.
struct Parts<'a> {
    config: &'a DecoderConfig,
    device: &'a Device,
    /// The weight of a norm of this size.
    norm_weight: &'a dyn Fn(usize) -> Param<Tensor<1>>,
}

impl Parts<'_> {
    fn decoder(&self) -> Decoder {
        let config = self.config;
        let [vocabulary, hidden] = [config.vocab_size, config.hidden_size];
        let [mean, std] = [0.0, 0.02];
        let layers = config.layers.iter();
        Decoder {
            embed_tokens: Initializer::Normal { mean, std }.init([vocabulary, hidden], self.device),
            layers: layers.map(|layer| self.layer(layer)).collect(),
            norm: self.norm(hidden),
            lm_head: (!config.tie_word_embeddings).then(|| self.linear(hidden, vocabulary, false)),
            embedding_scale: config.embedding_scale,
            logits_scaling: config.logits_scaling,
            logits_softcap: config.logits_softcap,
        }
    }

    fn layer(&self, layer: &LayerConfig) -> DecoderLayer {
        DecoderLayer {
            norms: self.norms(),
            self_attn: self.attention(layer),
            mlp: match layer.mixture {
                None => Mlp::Dense(self.mlp(self.config.intermediate_size)),
                Some(mixture) => Mlp::Mixture(self.mixture(mixture)),
            },
            residual_multiplier: self.config.residual_multiplier,
        }
    }

    fn norms(&self) -> LayerNorms {
        let norm = || self.norm(self.config.hidden_size);
        match self.config.norm_placement {
            NormPlacement::Pre => LayerNorms::Pre(PreNorms {
                input_layernorm: norm(),
                post_attention_layernorm: norm(),
            }),
            NormPlacement::Sandwich => LayerNorms::Sandwich(SandwichNorms {
                input_layernorm: norm(),
                post_attention_layernorm: norm(),
                pre_feedforward_layernorm: norm(),
                post_feedforward_layernorm: norm(),
            }),
            NormPlacement::Post => LayerNorms::Post(PostNorms {
                post_attention_layernorm: norm(),
                post_feedforward_layernorm: norm(),
            }),
        }
    }

    fn attention(&self, layer: &LayerConfig) -> Attention {
        let config = self.config;
        let [num_heads, num_kv_heads] = [config.num_attention_heads, config.num_key_value_heads];
        let head_dim = config.head_dim;
        let [of_q, of_kv] = [num_heads, num_kv_heads].map(|heads| heads * head_dim);
        let projection = |size| self.linear(config.hidden_size, size, config.biases.qkv);
        let qk_norm = |of_all| {
            config.qk_norm.map(|qk_norm| match qk_norm {
                QkNorm::Head => self.norm(head_dim),
                QkNorm::Projection => self.norm(of_all),
            })
        };
        Attention {
            qkv: match config.fused_projections {
                false => QkvProjections::Separate(SeparateQkv {
                    q_proj: projection(of_q),
                    k_proj: projection(of_kv),
                    v_proj: projection(of_kv),
                }),
                true => QkvProjections::Fused(FusedQkv {
                    qkv_proj: projection(of_q + 2 * of_kv),
                }),
            },
            o_proj: self.linear(of_q, config.hidden_size, config.biases.output),
            q_norm: qk_norm(of_q),
            k_norm: qk_norm(of_kv),
            sinks: config
                .attention_sinks
                .then(|| Initializer::Zeros.init([num_heads], self.device)),
            num_heads,
            num_kv_heads,
            head_dim,
            window: layer.window,
            rope: layer.rope,
            options: config.attention_options(),
        }
    }

    fn mixture(&self, mixture: MixtureConfig) -> MixtureMlp {
        let experts = (0..mixture.experts).map(|_| self.mlp(mixture.intermediate_size));
        let config = self.config;
        let router = self.linear(config.hidden_size, mixture.experts, config.biases.router);
        MixtureMlp {
            routing: match mixture.form {
                MixtureForm::Qwen3Moe => Router::Gate(GateRouter { gate: router }),
                MixtureForm::GptOss => Router::Router(NamedRouter { router }),
            },
            experts: experts.collect(),
            experts_per_token: mixture.experts_per_token,
            normalises_weights: mixture.normalises_weights,
            stacks: StackedExperts::default(),
        }
    }

    fn mlp(&self, inner: usize) -> GatedMlp {
        let config = self.config;
        let hidden = config.hidden_size;
        let linear = |d_input, d_output| self.linear(d_input, d_output, config.biases.mlp);
        GatedMlp {
            gate_up: match config.fused_projections {
                false => GateUpProjections::Separate(SeparateGateUp {
                    gate_proj: linear(hidden, inner),
                    up_proj: linear(hidden, inner),
                }),
                true => GateUpProjections::Fused(FusedGateUp {
                    gate_up_proj: linear(hidden, 2 * inner),
                }),
            },
            down_proj: linear(inner, hidden),
            activation: config.activation,
        }
    }

    fn norm(&self, size: usize) -> RmsNorm {
        RmsNorm {
            weight: (self.norm_weight)(size),
            eps: self.config.rms_norm_eps,
            form: self.config.norm_form,
        }
    }

    fn linear(&self, d_input: usize, d_output: usize, bias: bool) -> AnyLinear {
        let config = LinearConfig::new(d_input, d_output).with_bias(bias);
        config.init(self.device).into()
    }
}

/// A frozen model of these sizes with random weights, to time it or to try something out: packed linear
/// layers without biases, but for routers, with branches of a rank if one is given, and the rest in `dtype` as in
/// published checkpoints.
///
/// # Errors
/// Those of [`QLoraLinearConfig::init`] for the rank, and of [`QuantLinear::quantize`] for sizes that `quant` does not
/// have.
pub fn random(
    config: &DecoderConfig,
    quant: QuantConfig,
    dtype: FloatType,
    rank: Option<usize>,
    device: &Device,
) -> Result<Decoder, ModelError> {
    random_by_layers(config, quant, dtype, rank, device, &mut Ok)
}

/// The model of [`random`], each of whose layers goes through a function as soon as it is made: one that takes its
/// weights away keeps the model from being on the device as a whole.
///
/// # Errors
/// Those of [`random`] and of the function.
pub fn random_by_layers(
    config: &DecoderConfig,
    quant: QuantConfig,
    dtype: FloatType,
    rank: Option<usize>,
    device: &Device,
    each: &mut dyn FnMut(DecoderLayer) -> Result<DecoderLayer, ModelError>,
) -> Result<Decoder, ModelError> {
    let options = (device, DType::from(dtype));
    let small = Distribution::Normal(0.0, 0.02);
    let matrix = |dims: [usize; 2]| Param::from_tensor(Tensor::<2>::random(dims, small, options));
    let value = config.norm_form.neutral_weight();
    let norm_weight = |size| Param::from_tensor(Tensor::full([size], value, options));
    let mut model = Parts {
        config,
        device,
        norm_weight: &norm_weight,
    }
    .decoder();
    // As in a checkpoint of that type.
    let stored = |matrix: Param<Tensor<2>>| {
        matrix.map(|values| {
            values
                .cast(DType::from(config.dtype))
                .cast(DType::from(dtype))
        })
    };
    model.embed_tokens = stored(matrix([config.vocab_size, config.hidden_size]));
    let mut of_layer = |name: &str, layer: AnyLinear| {
        let [d_output, d_input] = layer.dims();
        let dense = Linear {
            weight: matrix([d_input, d_output]),
            bias: None,
        };
        if is_router(name) {
            return Ok(dense.into());
        }
        let packed = AnyLinear::Nf4(QuantLinear::quantize(dense, quant)?);
        match rank {
            Some(rank) => packed.with_lora(&QLoraLinearConfig::new(rank), device),
            None => Ok(packed),
        }
    };
    for layer in std::mem::take(&mut model.layers) {
        let layer = layer.map_linears("", &mut of_layer)?.no_grad();
        model.layers.push(each(layer)?);
    }
    model.lm_head = model.lm_head.map(|head| {
        let [d_output, d_input] = head.dims();
        AnyLinear::from_weight(stored(matrix([d_output, d_input])).val(), None)
    });
    Ok(by_rule(model.no_grad())?)
}
