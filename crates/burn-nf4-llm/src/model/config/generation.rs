//! `generation_config.json` of a model.

use std::path::Path;

use burn_nf4::Nf4Error;
use burn_nf4::op::SampleSettings;
use serde_json::Value;

use crate::error::ModelError;
use crate::json::fields::{FieldType, Fields, spelled};
use crate::model::config::TokenIds;

/// What `generation_config.json` says of how texts of a model are continued. All of it is empty where there is
/// no such file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a text, if it names any.
    pub eos_token_ids: Option<Vec<u32>>,
    /// Texts that end a text: for [`StopStrings`](crate::text::StopStrings).
    pub stop_strings: Vec<String>,
    /// For [`Sampling::min_p`](crate::generate::Sampling::min_p) where tokens are drawn, if it says one.
    pub min_p: Option<f32>,
    /// For [`Sampling::repetition_penalty`](crate::generate::Sampling::repetition_penalty), if it says one.
    pub repetition_penalty: Option<f32>,
    /// The fields that change which tokens `generate` of transformers 5.24.0 takes, even where it draws none,
    /// and that nothing here applies, each with its value: `num_beams: 3`. Those that say how
    /// tokens are drawn, and how many at most, are not among them: a [`Request`](crate::generate::Request)
    /// says that.
    pub not_applied: Vec<String>,
}

/// Fields of which each but `null` changes the tokens, unless it is a list of nothing.
const IF_SET: [&str; 9] = [
    "bad_words_ids",
    "begin_suppress_tokens",
    "constraints",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "suppress_tokens",
    "watermarking_config",
];

/// Fields that change the tokens unless they have this number, or less.
const IF_ABOVE: [(&str, f64); 6] = [
    ("encoder_no_repeat_ngram_size", 0.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("num_beams", 1.0),
    ("penalty_alpha", 0.0),
];

/// Fields that change the tokens unless they are 1.
const UNLESS_ONE: [&str; 2] = ["encoder_repetition_penalty", "guidance_scale"];

/// Fields that change the tokens where they are true.
const IF_TRUE: [&str; 1] = ["token_healing"];

/// A text or a list of them.
struct Texts(Vec<String>);

impl FieldType for Texts {
    const NAME: &'static str = "a text of at least one character, or a list of them";

    fn read(value: &Value) -> Option<Self> {
        let texts = match value {
            Value::String(text) => vec![text.clone()],
            list => Vec::read(list)?,
        };
        let are_texts = texts.iter().all(|text| !text.is_empty());
        are_texts.then_some(Self(texts))
    }
}

impl GenerationConfig {
    /// Reads `generation_config.json`, if there is one.
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Json`], and [`ModelError::Unsupported`] with the name of the field,
    /// also for a number that [`SampleSettings::check`] refuses.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        let fields = Fields::read_or_empty(&folder.join("generation_config.json"))?;
        let eos: Option<TokenIds> = fields.nullable("eos_token_id")?;
        let stop: Option<Texts> = fields.nullable("stop_strings")?;
        let number = |name| -> Result<Option<f32>, ModelError> {
            let number: Option<f64> = fields.nullable(name)?;
            Ok(number.map(|number| number as f32))
        };
        let min_p = number("min_p")?;
        let repetition_penalty = number("repetition_penalty")?;
        let settings = SampleSettings {
            min_p: min_p.unwrap_or(0.0),
            repetition_penalty: repetition_penalty.unwrap_or(1.0),
            ..SampleSettings::greedy()
        };
        match settings.check() {
            Err(Nf4Error::Config {
                field,
                expected,
                given,
            }) => return Err(fields.unsupported(field, given, expected)),
            checked => checked?,
        }
        let not_applied = fields.names().filter_map(|name| {
            let value = fields.value(name)?;
            changes_tokens(name, value).then(|| format!("{name}: {}", spelled(value)))
        });
        Ok(Self {
            min_p,
            repetition_penalty,
            eos_token_ids: eos.map(|TokenIds(ids)| ids),
            stop_strings: stop.map(|Texts(texts)| texts).unwrap_or_default(),
            not_applied: not_applied.collect(),
        })
    }

    /// A warning, if fields are [not applied](Self::not_applied).
    pub fn warn_of_fields(&self) -> Option<String> {
        (!self.not_applied.is_empty()).then(|| {
            format!(
                "warning: generation_config.json has fields that are not applied: {}",
                self.not_applied.join(", ")
            )
        })
    }
}

/// Whether a value of a field changes which tokens are taken. One of another type counts: it may.
fn changes_tokens(name: &str, value: &Value) -> bool {
    let is_empty = match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        _ => false,
    };
    if is_empty {
        return false;
    }
    let number = value.as_f64();
    let above = IF_ABOVE.iter().find(|(field, _)| *field == name);
    IF_SET.contains(&name)
        || above.is_some_and(|(_, most)| number.is_none_or(|number| number > *most))
        || UNLESS_ONE.contains(&name) && number != Some(1.0)
        || IF_TRUE.contains(&name) && *value != Value::Bool(false)
}
