//! `config.json` and `generation_config.json` of a Llama-family model.

use std::fs;
use std::path::Path;

use burn_nf4::format::FloatType;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::ModelError;
use crate::rope::{RopeConfig, RopeParameters};

/// The model that a `config.json` describes, with every default filled in and everything that is
/// not implemented refused.
#[derive(Debug, Clone)]
pub struct LlamaConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub tie_word_embeddings: bool,
    /// How many positions a token sees, itself included; all before it if none.
    pub sliding_window: Option<usize>,
    pub rope: RopeConfig,
    /// The type to compute in.
    pub dtype: FloatType,
    pub eos_token_ids: Vec<u32>,
}

/// `config.json` as it is written, both the present and the older names.
#[derive(Deserialize)]
struct RawConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_act")]
    hidden_act: String,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    sliding_window: Option<usize>,
    layer_types: Option<Vec<String>>,
    max_position_embeddings: Option<usize>,
    original_max_position_embeddings: Option<usize>,
    rope_parameters: Option<RopeParameters>,
    rope_scaling: Option<RopeParameters>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    dtype: Option<String>,
    torch_dtype: Option<String>,
    eos_token_id: Option<TokenIds>,
}

fn default_act() -> String {
    "silu".into()
}

fn default_eps() -> f64 {
    1e-6
}

/// One id or a list of them.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

#[derive(Deserialize)]
struct RawGenerationConfig {
    eos_token_id: Option<TokenIds>,
}

impl LlamaConfig {
    /// Reads `config.json`, and the ids that end a text from `generation_config.json` where there
    /// is one.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let mut config = Self::from_json(&read(&path)?, &path)?;
        let path = folder.join("generation_config.json");
        if path.exists() {
            let generation: RawGenerationConfig = parse(&read(&path)?, &path)?;
            if let Some(ids) = generation.eos_token_id {
                config.eos_token_ids = ids.into_vec();
            }
        }
        Ok(config)
    }

    /// Reads the text of a `config.json`; the path is for errors.
    pub fn from_json(text: &[u8], path: &Path) -> Result<Self, ModelError> {
        let raw: RawConfig = parse(text, path)?;
        let mistral = match raw.model_type.as_str() {
            "llama" => false,
            "mistral" => true,
            _ => {
                return Err(unsupported("model_type", &raw.model_type, "llama, mistral"));
            }
        };
        if raw.hidden_act != "silu" {
            return Err(unsupported("hidden_act", &raw.hidden_act, "silu"));
        }
        if let Some(factor) = raw.partial_rotary_factor.filter(|&factor| factor != 1.0) {
            return Err(unsupported("partial_rotary_factor", factor, "1"));
        }
        if mistral && raw.layer_types.is_some() {
            return Err(unsupported("layer_types", "set", "one type for all layers"));
        }

        let heads = raw.num_attention_heads;
        let kv_heads = raw
            .num_key_value_heads
            .unwrap_or(if mistral { 8 } else { heads });
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(unsupported(
                "num_key_value_heads",
                format!("{kv_heads} for {heads} heads"),
                "a divisor of num_attention_heads",
            ));
        }
        let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(unsupported("head_dim", head_dim, "a positive even number"));
        }
        let dtype = raw.dtype.or(raw.torch_dtype);
        Ok(Self {
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps: raw.rms_norm_eps,
            attention_bias: raw.attention_bias,
            mlp_bias: raw.mlp_bias,
            tie_word_embeddings: raw.tie_word_embeddings,
            // Llama has no window; its config may still carry the key.
            sliding_window: raw.sliding_window.filter(|_| mistral),
            rope: RopeConfig::new(
                raw.rope_parameters.or(raw.rope_scaling).unwrap_or_default(),
                raw.rope_theta,
                raw.max_position_embeddings
                    .unwrap_or(if mistral { 4096 * 32 } else { 2048 }),
                raw.original_max_position_embeddings,
                head_dim,
            )?,
            dtype: match dtype {
                Some(name) => FloatType::from_name(&name, "config.json: dtype")?,
                None => FloatType::F32,
            },
            eos_token_ids: raw.eos_token_id.map_or_else(Vec::new, TokenIds::into_vec),
        })
    }
}

/// The error for a value that is not implemented.
pub fn unsupported(
    field: &'static str,
    given: impl ToString,
    supported: &'static str,
) -> ModelError {
    ModelError::Unsupported {
        field,
        given: given.to_string(),
        supported,
    }
}

/// Reads a file.
pub fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    fs::read(path).map_err(ModelError::io(path))
}

/// Reads JSON; the path is for errors.
pub fn parse<T: DeserializeOwned>(text: &[u8], path: &Path) -> Result<T, ModelError> {
    serde_json::from_slice(text).map_err(ModelError::json(path))
}
