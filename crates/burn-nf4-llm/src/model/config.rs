//! `config.json` and `generation_config.json` of a Llama-family model.
//!
//! Fields and their defaults: `LlamaConfig` and `MistralConfig` of transformers 5.24.0. What those
//! classes do not read has no meaning here either.

use std::path::Path;

use burn_nf4::format::FloatType;
use burn_nf4::op::MAX_HEAD_DIM;
use serde_json::Value;

use crate::error::ModelError;
use crate::json::fields::{FieldType, Fields};
use crate::json::files::read;
use crate::model::rope::RopeConfig;

/// The model that a `config.json` describes, with every default filled in and everything that is
/// not implemented refused.
#[derive(Debug, Clone)]
pub struct LlamaConfig {
    /// Rows of the embedding and the head.
    pub vocab_size: usize,
    /// Elements of a hidden state.
    pub hidden_size: usize,
    /// Elements inside of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Heads of queries.
    pub num_attention_heads: usize,
    /// Heads of keys and values.
    pub num_key_value_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// `eps` of the normalisations.
    pub rms_norm_eps: f64,
    /// Whether the projections of attention have biases.
    pub attention_bias: bool,
    /// Whether those of the MLP have.
    pub mlp_bias: bool,
    /// Whether the head is the table of the embeddings, where the checkpoint does not hold two
    /// different ones.
    pub tie_word_embeddings: bool,
    /// How many positions a token sees, itself included; all before it if none.
    pub sliding_window: Option<usize>,
    /// The rotary embedding.
    pub rope: RopeConfig,
    /// The type to compute in.
    pub dtype: FloatType,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Dropout on the attention weights in training.
    pub attention_dropout: f64,
}

/// The families that share this code.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Family {
    Llama,
    Mistral,
}

/// One id or a list of them.
struct TokenIds(Vec<u32>);

impl FieldType for TokenIds {
    const NAME: &'static str = "a token id, or a list of them";

    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::Array(ids) => ids.iter().map(u32::read).collect::<Option<_>>().map(Self),
            id => u32::read(id).map(|id| Self(vec![id])),
        }
    }
}

impl LlamaConfig {
    /// Reads `config.json`, and the ids that end a text from `generation_config.json` where there
    /// is one.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let mut config = Self::from_json(&read(&path)?, &path)?;
        let generation = Fields::read_or_empty(&folder.join("generation_config.json"))?;
        if let Some(TokenIds(ids)) = generation.nullable("eos_token_id")? {
            config.eos_token_ids = ids;
        }
        Ok(config)
    }

    /// Reads the text of a `config.json`; the path is for errors.
    pub fn from_json(text: &[u8], path: &Path) -> Result<Self, ModelError> {
        let fields = Fields::parse(text, path)?;
        let family = match fields.required::<String>("model_type")?.as_str() {
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            other => return Err(fields.unsupported("model_type", other, "llama, mistral")),
        };
        check_quantization(&fields)?;
        if !matches!(fields.value("per_layer_config"), None | Some(Value::Null)) {
            return Err(fields.unsupported("per_layer_config", "set", "one config for all layers"));
        }
        let activation = fields.get("hidden_act")?.unwrap_or("silu".to_string());
        // Two names of one function in transformers' table.
        if !["silu", "swish"].contains(&activation.as_str()) {
            return Err(fields.unsupported("hidden_act", activation, "silu"));
        }

        let hidden_size = size(&fields, "hidden_size", 4096)?;
        let num_hidden_layers = size(&fields, "num_hidden_layers", 32)?;
        let (num_attention_heads, num_key_value_heads) = heads(&fields, family)?;
        let head_dim = fields
            .nullable("head_dim")?
            .unwrap_or(hidden_size / num_attention_heads);
        if !head_dim.is_multiple_of(2) || !(1..=MAX_HEAD_DIM).contains(&head_dim) {
            let supported = format!("an even number from 2 to {MAX_HEAD_DIM}");
            return Err(fields.unsupported("head_dim", head_dim, supported));
        }
        let sliding_window = sliding_window(&fields, family)?;
        check_layer_types(&fields, num_hidden_layers, sliding_window)?;
        let max_positions = match family {
            Family::Llama => 2048,
            Family::Mistral => 4096 * 32,
        };
        let max_positions = size(&fields, "max_position_embeddings", max_positions)?;
        let eos_token_ids = match fields.value("eos_token_id") {
            None => vec![2],
            Some(_) => fields
                .nullable("eos_token_id")?
                .map_or_else(Vec::new, |TokenIds(ids)| ids),
        };
        let flag = |name| Ok::<bool, ModelError>(fields.get(name)?.unwrap_or(false));
        // Mistral's layers have no biases, whatever the config says.
        let bias = |name| Ok::<bool, ModelError>(flag(name)? && family == Family::Llama);
        Ok(Self {
            vocab_size: size(&fields, "vocab_size", 32_000)?,
            hidden_size,
            intermediate_size: size(
                &fields,
                "intermediate_size",
                match family {
                    Family::Llama => 11_008,
                    Family::Mistral => 14_336,
                },
            )?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: fields.get("rms_norm_eps")?.unwrap_or(1e-6),
            attention_bias: bias("attention_bias")?,
            mlp_bias: bias("mlp_bias")?,
            tie_word_embeddings: flag("tie_word_embeddings")?,
            sliding_window,
            rope: RopeConfig::read(&fields, max_positions, head_dim)?,
            dtype: dtype(&fields)?,
            eos_token_ids,
            attention_dropout: fields.nullable("attention_dropout")?.unwrap_or(0.0),
        })
    }

    /// A warning, if a text has more tokens than the model has positions.
    pub fn warn_of_length(&self, what: &str, tokens: usize) -> Option<String> {
        let positions = self.rope.max_positions;
        (tokens > positions).then(|| {
            format!(
                "warning: {what} has {tokens} tokens, the model was made for {positions} positions \
                 (max_position_embeddings)"
            )
        })
    }
}

/// A size of the model.
fn size(fields: &Fields, name: &str, default: usize) -> Result<usize, ModelError> {
    match fields.get(name)?.unwrap_or(default) {
        0 => Err(fields.unsupported(name, 0, "a positive number")),
        size => Ok(size),
    }
}

/// The heads of the queries, and of the keys and values.
fn heads(fields: &Fields, family: Family) -> Result<(usize, usize), ModelError> {
    let heads = size(fields, "num_attention_heads", 32)?;
    let kv_heads = match (fields.value("num_key_value_heads"), family) {
        (None, Family::Mistral) => 8,
        (None | Some(Value::Null), _) => heads,
        (Some(_), _) => size(fields, "num_key_value_heads", heads)?,
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(fields.unsupported(
            "num_key_value_heads",
            format!("{kv_heads} for {heads} heads"),
            "a divisor of num_attention_heads",
        ));
    }
    Ok((heads, kv_heads))
}

/// The window of Mistral; Llama has none, though its config may carry the key.
fn sliding_window(fields: &Fields, family: Family) -> Result<Option<usize>, ModelError> {
    match (family, fields.value("sliding_window")) {
        (Family::Llama, _) | (_, Some(Value::Null)) => Ok(None),
        (Family::Mistral, _) => size(fields, "sliding_window", 4096).map(Some),
    }
}

/// transformers treats all layers of these families alike, whatever the types say.
fn check_layer_types(
    fields: &Fields,
    layers: usize,
    window: Option<usize>,
) -> Result<(), ModelError> {
    let Some(types) = fields.nullable::<Vec<String>>("layer_types")? else {
        return Ok(());
    };
    let expected = match window {
        Some(_) => "sliding_attention",
        None => "full_attention",
    };
    if types.len() == layers && types.iter().all(|name| name == expected) {
        return Ok(());
    }
    Err(fields.unsupported(
        "layer_types",
        format!("[{}]", types.join(", ")),
        format!("{expected} for each of the {layers} layers"),
    ))
}

/// The type to compute in: `dtype`, or `torch_dtype` of older files.
fn dtype(fields: &Fields) -> Result<FloatType, ModelError> {
    for name in ["dtype", "torch_dtype"] {
        if let Some(dtype) = fields.nullable::<String>(name)? {
            return Ok(FloatType::from_name(
                &dtype,
                &format!("config.json: {name}"),
            )?);
        }
    }
    Ok(FloatType::F32)
}

/// Weights that another method quantized have other tensors and other arithmetic.
fn check_quantization(fields: &Fields) -> Result<(), ModelError> {
    if !matches!(fields.value("compression_config"), None | Some(Value::Null)) {
        let supported = "bitsandbytes' quantization_config";
        return Err(fields.unsupported("compression_config", "set", supported));
    }
    let Some(quantization) = fields.object("quantization_config")? else {
        return Ok(());
    };
    let method = quantization.nullable::<String>("quant_method")?;
    // The second is what transformers calls it where it tells the two widths apart.
    let is_bitsandbytes = |method: &str| ["bitsandbytes", "bitsandbytes_4bit"].contains(&method);
    if let Some(method) = method.filter(|method| !is_bitsandbytes(method)) {
        return Err(quantization.unsupported("quant_method", method, "bitsandbytes"));
    }
    for name in ["load_in_8bit", "_load_in_8bit"] {
        if quantization.nullable(name)? == Some(true) {
            return Err(quantization.unsupported(name, true, "4 bit"));
        }
    }
    Ok(())
}
