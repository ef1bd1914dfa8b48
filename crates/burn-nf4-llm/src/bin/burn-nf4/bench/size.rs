//! Whose sizes the model has.

use std::path::PathBuf;

use burn_nf4_llm::ModelError;
use burn_nf4_llm::model::DecoderConfig;
use clap::{Args, ValueEnum};
use serde_json::Value;

/// The sizes of the model.
#[derive(Args, Debug)]
pub struct SizeArgs {
    /// Whose sizes the model has.
    #[arg(long, value_enum, default_value_t = SizeName::Smollm2)]
    pub size: SizeName,
    /// A config.json whose sizes the model has, in place of --size.
    #[arg(long, value_name = "FILE", conflicts_with = "size")]
    pub config: Option<PathBuf>,
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

/// What a model is like.
pub struct Size {
    /// For people.
    pub name: String,
    pub config: DecoderConfig,
    /// The `config.json`, for the peer.
    pub json: Value,
}

impl SizeArgs {
    /// Reads the sizes.
    pub fn read(&self) -> Result<Size, ModelError> {
        let (name, path, text) = match &self.config {
            None => {
                let name = format!("{:?}", self.size).to_lowercase();
                (name, "config.json".into(), self.size.config().into())
            }
            Some(path) => {
                let text = std::fs::read(path).map_err(ModelError::io(path))?;
                (path.display().to_string(), path.clone(), text)
            }
        };
        Ok(Size {
            name,
            config: DecoderConfig::from_json(&text, &path)?,
            json: serde_json::from_slice(&text).map_err(ModelError::json(path))?,
        })
    }
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
                "num_key_value_heads": 8, "rope_theta": 500000, "max_position_embeddings": 131072,
                "tie_word_embeddings": true, "torch_dtype": "bfloat16"}"#
            }
            Self::Llama8b => {
                r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
                "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "rope_theta": 500000, "max_position_embeddings": 131072,
                "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#
            }
        }
    }
}
