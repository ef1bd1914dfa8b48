//! `config.json` and `generation_config.json` of a model.

pub(crate) mod defaults;
mod generation;
pub(crate) mod layers;
pub(crate) mod rope_fields;

pub use generation::GenerationConfig;
pub use layers::{LayerConfig, MixtureConfig, MixtureForm};

use std::path::Path;

use burn_nf4::checkpoint::QuantMethod;
use burn_nf4::format::FloatType;
use burn_nf4::op::AttentionOptions;
use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::json::fields::{FieldType, Fields};
use crate::json::files::read;
use crate::model::family::{self, vision};
use crate::model::rope::RopeConfig;
use crate::model::scale::EmbeddingScale;
use crate::model::{Activation, NormForm};

/// The model that a `config.json` describes, with every default filled in and everything that is
/// not implemented refused.
///
/// All families have the sizes; they differ in the rest, of which any can be combined.
#[derive(Debug, Clone)]
pub struct DecoderConfig {
    /// Rows of the embedding and the head.
    pub vocab_size: usize,
    /// Elements of a hidden state.
    pub hidden_size: usize,
    /// Elements inside of the MLP.
    pub intermediate_size: usize,
    /// Heads of queries.
    pub num_attention_heads: usize,
    /// Heads of keys and values.
    pub num_key_value_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// What each layer has of its own, from the first layer on.
    pub layers: Vec<LayerConfig>,
    /// The rotary embeddings of the model: [`LayerConfig::rope`] says which one a layer has.
    pub ropes: Vec<RopeConfig>,
    /// Whether queries and keys are rotated in f32, whatever the type of the model.
    pub rotates_in_f32: bool,
    /// Positions that the model was made for.
    pub max_positions: usize,
    /// Where a layer has its norms.
    pub norm_placement: NormPlacement,
    /// How all norms apply their weights.
    pub norm_form: NormForm,
    /// `eps` of the normalisations.
    pub rms_norm_eps: f64,
    /// The norms of queries and keys, if they have any.
    pub qk_norm: Option<QkNorm>,
    /// The activation of the MLP's gate.
    pub activation: Activation,
    /// Which projections have biases.
    pub biases: Biases,
    /// Whether one matrix holds queries, keys and values, and one gate and up.
    pub fused_projections: bool,
    /// The factor of the attention scores; `1 / sqrt(head_dim)` if none.
    pub attention_scale: Option<f64>,
    /// `c` of `c tanh(score / c)`, in place of the score.
    pub attention_softcap: Option<f64>,
    /// Whether each head has a score of its own that takes part in every softmax and has no value.
    pub attention_sinks: bool,
    /// The factor of the embeddings, if there is one.
    pub embedding_scale: Option<EmbeddingScale>,
    /// The factor of what attention and the MLP add to a hidden state.
    pub residual_multiplier: f64,
    /// Logits are divided by it.
    pub logits_scaling: f64,
    /// `c` of `c tanh(logit / c)`, in place of the logit.
    pub logits_softcap: Option<f64>,
    /// Whether the head is the table of the embeddings, where the checkpoint does not hold two
    /// different ones.
    pub tie_word_embeddings: bool,
    /// The type to compute in.
    pub dtype: FloatType,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Dropout on the attention weights in training.
    pub attention_dropout: f64,
    /// Dropout on the outputs of attention and the MLP in training.
    pub residual_dropout: f64,
    /// The `model_type` of the model of text and images that this is the text part of, if it is one.
    pub text_part_of: Option<String>,
}

/// Where a layer has its norms.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormPlacement {
    /// The input of attention and of the MLP (pre-norm).
    Pre,
    /// Input and output of each (sandwich norm).
    Sandwich,
    /// The output of each (post-norm).
    Post,
}

/// Over what queries and keys are normalised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum QkNorm {
    /// Over each head.
    Head,
    /// Over all heads of a token together.
    Projection,
}

/// Which projections have biases.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Biases {
    /// Those of queries, keys and values.
    pub qkv: bool,
    /// The output projection of attention.
    pub output: bool,
    /// Those of the MLP.
    pub mlp: bool,
    /// The router of a mixture.
    pub router: bool,
}

impl Biases {
    /// All of attention, or none of it; all of the MLP, or none; none of a router.
    pub fn of(attention: bool, mlp: bool) -> Self {
        Self {
            qkv: attention,
            output: attention,
            mlp,
            router: false,
        }
    }
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

impl DecoderConfig {
    /// Reads `config.json`, and the ids that end a text from `generation_config.json` where that names any.
    ///
    /// Those of `config.json` hold where it names none; transformers 5.24 then goes on to the last token.
    ///
    /// # Errors
    /// Those of [`from_json`](Self::from_json), and [`ModelError::Io`].
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let mut config = Self::from_json(&read(&path)?, &path)?;
        if let Some(ids) = GenerationConfig::from_folder(folder)?.eos_token_ids {
            config.eos_token_ids = ids;
        }
        Ok(config)
    }

    /// Reads the text of a `config.json`; the path is for errors.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] with the name of the field for a family, or something of one, that is
    /// not implemented; [`ModelError::Json`].
    pub fn from_json(text: &[u8], path: &Path) -> Result<Self, ModelError> {
        let whole = Fields::parse(text, path)?;
        check_quantization(&whole)?;
        let text_part = vision::text_fields(&whole)?;
        let text_part_of = text_part.as_ref().map(|_| whole.required("model_type"));
        let fields = text_part.unwrap_or(whole.clone());
        let read = family::reader(&fields)?;
        if !matches!(fields.value("per_layer_config"), None | Some(Value::Null)) {
            return Err(fields.unsupported("per_layer_config", "set", "one config for all layers"));
        }
        // transformers then masks no position, in any family.
        for fields in [&whole, &fields] {
            if fields.get::<bool>("is_causal")? == Some(false) {
                return Err(fields.unsupported("is_causal", false, "true"));
            }
        }
        let config = Self {
            text_part_of: text_part_of.transpose()?,
            ..read(&fields)?
        };
        config.attention_options().check()?;
        Ok(config)
    }

    /// How attention makes scores.
    pub(crate) fn attention_options(&self) -> AttentionOptions {
        AttentionOptions {
            scale: self.attention_scale.map(|scale| scale as f32),
            softcap: self.attention_softcap.map(|cap| cap as f32),
        }
    }

    /// The entries for the `config.json` of what [`from_folder`](Self::from_folder) describes, to be given
    /// to [`SaveFolder::model_config`](burn_nf4::model::SaveFolder::model_config): those of the file, or, of
    /// a model of text and images, those of its text part.
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Json`], and [`ModelError::Unsupported`] for a file without a
    /// `model_type` or, where there has to be one, a text part.
    pub fn model_entries(folder: &Path) -> Result<Map<String, Value>, ModelError> {
        let fields = Fields::read(&folder.join("config.json"))?;
        Ok(match vision::text_fields(&fields)? {
            Some(text) => vision::text_entries(text),
            None => fields.into_entries(),
        })
    }

    /// A warning, if a text has more tokens than the model has positions.
    pub fn warn_of_length(&self, what: &str, tokens: usize) -> Option<String> {
        let positions = self.max_positions;
        (tokens > positions).then(|| {
            format!(
                "warning: {what} has {tokens} tokens, the model was made for {positions} positions \
                 (max_position_embeddings)"
            )
        })
    }
}

/// The methods whose weights are read: bitsandbytes, also under the name that transformers has where it tells the
/// two widths apart, and those of [`QuantMethod`], of which
/// [`Checkpoint::faults`](burn_nf4::checkpoint::Checkpoint::faults) looks at the formats.
const METHODS: [&str; 6] = [
    "bitsandbytes",
    "bitsandbytes_4bit",
    QuantMethod::CompressedTensors.name(),
    QuantMethod::ModelOpt.name(),
    QuantMethod::Fp8.name(),
    QuantMethod::Mxfp4.name(),
];

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
    if let Some(method) = method.filter(|method| !METHODS.contains(&method.as_str())) {
        let supported = METHODS.join(", ");
        return Err(quantization.unsupported("quant_method", method, supported));
    }
    for name in ["load_in_8bit", "_load_in_8bit"] {
        if quantization.nullable(name)? == Some(true) {
            return Err(quantization.unsupported(name, true, "4 bit"));
        }
    }
    Ok(())
}
