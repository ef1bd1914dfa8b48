//! The fields that all families have.

use burn_nf4::Nf4Error;
use burn_nf4::format::FloatType;
use burn_nf4::op::{AttentionOptions, MAX_HEAD_DIM};
use serde_json::Value;

use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::config::rope_fields::RopeDefaults;
use crate::model::config::{Biases, DecoderConfig, LayerConfig, NormPlacement, TokenIds};
use crate::model::rope::RopeConfig;
use crate::model::{Activation, NormForm};

/// The values of a family's class for fields that `config.json` leaves out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Defaults {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// As many as heads if none.
    pub num_key_value_heads: Option<usize>,
    /// The hidden size over the heads if none.
    pub head_dim: Option<usize>,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub eos_token_id: Option<u32>,
    pub tie_word_embeddings: bool,
    /// The field that names the activation, and what it is.
    pub activation: (&'static str, Activation),
}

/// The largest size of a model: more than any has.
const MAX_SIZE: usize = i32::MAX as usize;

/// The most layers of a model: more than any has.
const MAX_LAYERS: usize = 65_536;

impl Defaults {
    /// A Llama with these fields: one rotary embedding, pre-norm, and nothing that only some families have.
    /// The caller adds what its family has.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`].
    pub fn read(&self, fields: &Fields) -> Result<DecoderConfig, ModelError> {
        self.read_with_ropes(fields, |fields, defaults| {
            Ok(vec![RopeConfig::read(fields, defaults)?])
        })
    }

    /// As [`read`](Self::read), with other rotary embeddings. All layers have the first of them.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`].
    pub fn read_with_ropes(
        &self,
        fields: &Fields,
        ropes: impl FnOnce(&Fields, RopeDefaults) -> Result<Vec<RopeConfig>, ModelError>,
    ) -> Result<DecoderConfig, ModelError> {
        let activation = activation(fields, self.activation)?;
        let hidden_size = size(fields, "hidden_size", self.hidden_size)?;
        let num_hidden_layers = size(fields, "num_hidden_layers", self.num_hidden_layers)?;
        if num_hidden_layers > MAX_LAYERS {
            let supported = format!("at most {MAX_LAYERS}");
            return Err(fields.unsupported("num_hidden_layers", num_hidden_layers, supported));
        }
        let (num_attention_heads, num_key_value_heads) = self.heads(fields)?;
        let head_dim = match self.head_dim {
            Some(head_dim) => size(fields, "head_dim", head_dim)?,
            None => fields
                .nullable("head_dim")?
                .unwrap_or(hidden_size / num_attention_heads),
        };
        if !head_dim.is_multiple_of(2) || !(1..=MAX_HEAD_DIM).contains(&head_dim) {
            let supported = format!("an even number from 2 to {MAX_HEAD_DIM}");
            return Err(fields.unsupported("head_dim", head_dim, supported));
        }
        let max_positions = self.max_position_embeddings;
        let max_positions = size(fields, "max_position_embeddings", max_positions)?;
        let eos_token_ids = match fields.value("eos_token_id") {
            None => self.eos_token_id.into_iter().collect(),
            Some(_) => fields
                .nullable("eos_token_id")?
                .map_or_else(Vec::new, |TokenIds(ids)| ids),
        };
        let layer = LayerConfig {
            window: None,
            rope: Some(0),
            mixture: None,
        };
        Ok(DecoderConfig {
            vocab_size: size(fields, "vocab_size", self.vocab_size)?,
            hidden_size,
            intermediate_size: size(fields, "intermediate_size", self.intermediate_size)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            layers: vec![layer; num_hidden_layers],
            ropes: ropes(
                fields,
                RopeDefaults {
                    theta: self.rope_theta,
                    rotary_dim: head_dim,
                    max_positions,
                    original_positions: None,
                },
            )?,
            rotates_in_f32: false,
            max_positions,
            norm_placement: NormPlacement::Pre,
            norm_form: NormForm::CastThenWeight,
            rms_norm_eps: epsilon(fields, "rms_norm_eps", self.rms_norm_eps)?,
            qk_norm: None,
            activation,
            biases: Biases::default(),
            fused_projections: false,
            attention_scale: None,
            attention_softcap: None,
            attention_sinks: false,
            embedding_scale: None,
            residual_multiplier: 1.0,
            logits_scaling: 1.0,
            logits_softcap: None,
            tie_word_embeddings: fields
                .get("tie_word_embeddings")?
                .unwrap_or(self.tie_word_embeddings),
            dtype: dtype(fields)?,
            eos_token_ids,
            attention_dropout: fields.nullable("attention_dropout")?.unwrap_or(0.0),
            residual_dropout: 0.0,
            text_part_of: None,
        })
    }

    /// The heads of the queries, and of the keys and values.
    fn heads(&self, fields: &Fields) -> Result<(usize, usize), ModelError> {
        let heads = size(fields, "num_attention_heads", self.num_attention_heads)?;
        let kv_heads = match (
            fields.value("num_key_value_heads"),
            self.num_key_value_heads,
        ) {
            (None, Some(kv_heads)) => kv_heads,
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
}

/// A size of the model. Products of a few of them are counted without overflow.
pub(crate) fn size(fields: &Fields, name: &str, default: usize) -> Result<usize, ModelError> {
    match fields.get(name)?.unwrap_or(default) {
        size if (1..=MAX_SIZE).contains(&size) => Ok(size),
        size => {
            let supported = format!("a number from 1 to {MAX_SIZE}");
            Err(fields.unsupported(name, size, supported))
        }
    }
}

/// A size that may be `null`, which is none.
pub(crate) fn nullable_size(
    fields: &Fields,
    name: &str,
    default: Option<usize>,
) -> Result<Option<usize>, ModelError> {
    match fields.value(name) {
        None => Ok(default),
        Some(Value::Null) => Ok(None),
        Some(_) => size(fields, name, 0).map(Some),
    }
}

/// `sliding_window`, if `use_sliding_window` says so.
pub(crate) fn used_window(
    fields: &Fields,
    default: Option<usize>,
) -> Result<Option<usize>, ModelError> {
    let window = nullable_size(fields, "sliding_window", default)?;
    let is_used = flag(fields, "use_sliding_window")?;
    Ok(window.filter(|_| is_used))
}

/// A flag, false if left out.
pub(crate) fn flag(fields: &Fields, name: &str) -> Result<bool, ModelError> {
    Ok(fields.get(name)?.unwrap_or(false))
}

/// A number above zero, also in f32.
pub(crate) fn positive(fields: &Fields, name: &str, default: f64) -> Result<f64, ModelError> {
    match fields.get(name)?.unwrap_or(default) {
        number if number as f32 > 0.0 && (number as f32).is_finite() => Ok(number),
        number => Err(fields.unsupported(name, number, "a positive number of f32")),
    }
}

/// What is added to a mean of squares.
fn epsilon(fields: &Fields, name: &str, default: f64) -> Result<f64, ModelError> {
    match fields.get(name)?.unwrap_or(default) {
        number if number >= 0.0 && (number as f32).is_finite() => Ok(number),
        number => Err(fields.unsupported(name, number, "a number of f32 of at least 0")),
    }
}

/// The factor of the attention scores that a field stands for.
///
/// # Errors
/// [`ModelError::Unsupported`] for one that attention does not compute with.
pub(crate) fn attention_scale(
    fields: &Fields,
    name: &str,
    default: f64,
    scale_of: impl Fn(f64) -> f64,
) -> Result<f64, ModelError> {
    let number = positive(fields, name, default)?;
    let scale = scale_of(number);
    let options = AttentionOptions {
        scale: Some(scale as f32),
        ..AttentionOptions::default()
    };
    let given = match scale == number {
        true => number.to_string(),
        false => format!("{number}, which makes a factor of scores of {scale}"),
    };
    check_attention(fields, name, given, options)?;
    Ok(scale)
}

/// The soft cap of the attention scores, if there is one.
///
/// # Errors
/// [`ModelError::Unsupported`] for one that attention does not compute with.
pub(crate) fn attention_softcap(
    fields: &Fields,
    name: &str,
    default: f64,
) -> Result<Option<f64>, ModelError> {
    let cap = nullable_positive(fields, name, Some(default))?;
    let options = AttentionOptions {
        softcap: cap.map(|cap| cap as f32),
        ..AttentionOptions::default()
    };
    check_attention(fields, name, cap.unwrap_or_default(), options)?;
    Ok(cap)
}

fn check_attention(
    fields: &Fields,
    name: &str,
    given: impl ToString,
    options: AttentionOptions,
) -> Result<(), ModelError> {
    match options.check() {
        Err(Nf4Error::Config { expected, .. }) => Err(fields.unsupported(name, given, expected)),
        checked => Ok(checked?),
    }
}

/// A number above zero that may be `null`, which is none.
pub(crate) fn nullable_positive(
    fields: &Fields,
    name: &str,
    default: Option<f64>,
) -> Result<Option<f64>, ModelError> {
    match fields.value(name) {
        None => Ok(default),
        Some(Value::Null) => Ok(None),
        Some(_) => positive(fields, name, 0.0).map(Some),
    }
}

/// The activation, by its names in transformers' table.
fn activation(
    fields: &Fields,
    (name, default): (&str, Activation),
) -> Result<Activation, ModelError> {
    match fields.get::<String>(name)?.as_deref() {
        None => Ok(default),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some(other) => Err(fields.unsupported(name, other, "silu, gelu_pytorch_tanh")),
    }
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
