//! The command `decode`: tokens a second of a model of a known size with random weights.

use std::time::Instant;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::nn::{Nf4Linear, QLoraLinearConfig};
use clap::{Args, ValueEnum};

use crate::attention::Attention;
use crate::commands::at_least;
use crate::config::LlamaConfig;
use crate::device::{DTypeName, DeviceName};
use crate::error::ModelError;
use crate::generate::{Request, generate};
use crate::load::linears;
use crate::model::{DecoderLayer, Llama, Mlp, RmsNorm};
use crate::projection::Projection;
use crate::sample::Sampling;

/// Tokens of the prompt.
const PROMPT: usize = 16;

/// Time decoding with random weights: needs no checkpoint.
#[derive(Args, Debug)]
pub struct DecodeArgs {
    /// Whose sizes the model has.
    #[arg(long, value_enum, default_value_t = SizeName::Smollm2)]
    pub size: SizeName,
    /// Rows; several give several measurements.
    #[arg(long, default_values_t = [1, 16])]
    pub batch: Vec<usize>,
    /// Tokens generated for each row after the first.
    #[arg(long, default_value_t = 64)]
    pub tokens: usize,
    /// Rank of a low-rank branch on every linear layer but the head; none without it.
    #[arg(long)]
    pub rank: Option<usize>,
    /// Where to run.
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// The type to compute in: f32 on the CPU, elsewhere bf16.
    #[arg(long, value_enum)]
    pub dtype: Option<DTypeName>,
}

/// A model whose sizes are known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum SizeName {
    /// SmolLM2-135M.
    Smollm2,
    /// Llama-3.2-1B.
    Llama1b,
    /// Llama-3.1-8B.
    Llama8b,
}

impl SizeName {
    /// Its `config.json`, as far as it matters here.
    const fn config(self) -> &'static str {
        match self {
            Self::Smollm2 => {
                r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
                "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "rope_theta": 100000, "max_position_embeddings": 8192,
                "tie_word_embeddings": true, "torch_dtype": "bfloat16"}"#
            }
            Self::Llama1b => {
                r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
                "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                "num_key_value_heads": 8, "rope_theta": 500000, "max_position_embeddings": 8192,
                "tie_word_embeddings": true, "torch_dtype": "bfloat16"}"#
            }
            Self::Llama8b => {
                r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
                "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "rope_theta": 500000, "max_position_embeddings": 8192,
                "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#
            }
        }
    }
}

impl DecodeArgs {
    pub fn run(&self) -> Result<(), ModelError> {
        at_least(1, "--tokens", self.tokens)?;
        for rows in &self.batch {
            at_least(1, "--batch", *rows)?;
        }
        at_least(1, "--rank", self.rank.unwrap_or(1))?;
        let config = LlamaConfig::from_json(self.size.config().as_bytes(), "config.json".as_ref())?;
        let device = self.device.open()?;
        let dtype = self.device.dtype(self.dtype, config.dtype, &device)?;
        let model = random_model(&config, dtype, self.rank, &device)?;
        let branches = self.rank.map_or(String::new(), |rank| {
            format!(", low-rank branches of rank {rank}")
        });
        println!(
            "{:?}, random weights{branches}, {:?}, {}: tokens/s of all rows together",
            self.size,
            self.device,
            dtype.name()
        );
        // The first token is that of the prompt.
        if let Some(warning) = config.warn_of_length("each text", PROMPT + self.tokens + 1) {
            eprintln!("{warning}");
        }
        for &rows in &self.batch {
            let request = Request {
                prompts: vec![vec![1; PROMPT]; rows],
                max_tokens: self.tokens + 1,
                sampling: Sampling {
                    temperature: 0.0,
                    top_k: 0,
                    top_p: 1.0,
                    seed: 42,
                },
                eos: Vec::new(),
            };
            // The first time a graphics card compiles kernels and measures which are fastest.
            let start = Instant::now();
            generate(&model, &config, &request, |_, _| Ok(()))?;
            let first = start.elapsed().as_secs_f64();
            let report = generate(&model, &config, &request, |_, _| Ok(()))?;
            println!(
                "batch {rows:3}: {:8.1} tokens/s, median {:.2} ms a step ({first:.1} s the first time)",
                report.decode_rate(),
                report.step_time.as_secs_f64() * 1e3
            );
        }
        Ok(())
    }
}

/// A model of these sizes: packed linear layers, and a head in 16 bit as in published checkpoints.
fn random_model(
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
        let projection = Projection::Nf4(packed);
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
        Projection::Dense(Linear {
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
