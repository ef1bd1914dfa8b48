//! Models of text and images, of which the text part is a model of a family.

use burn_nf4::checkpoint::Checkpoint;
use fancy_regex::Regex;
use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::json::fields::Fields;

/// A kind of them.
struct VisionModel {
    model_type: &'static str,
    /// The family of the text, where its config does not say.
    text: &'static str,
    /// Whether the head is tied where nothing is said.
    ties: bool,
}

const MODELS: [VisionModel; 3] = [
    VisionModel {
        model_type: "gemma3",
        text: "gemma3_text",
        ties: true,
    },
    VisionModel {
        model_type: "llava",
        text: "llama",
        ties: false,
    },
    VisionModel {
        model_type: "mistral3",
        text: "mistral",
        ties: true,
    },
];

/// Keys of the text part, as transformers 5 and 4 have them, and what they are without the other parts.
pub(crate) const TEXT_KEYS: [(&str, &str); 3] = [
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
];

/// Keys of the other parts.
pub(crate) const OTHER_KEYS: &str = r"^(model\.)?(vision_tower|multi_modal_projector)\.";

/// The values of `model_type` of such models.
pub(super) fn model_types() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|model| model.model_type)
}

/// The fields of the text part, if the model is one of text and images.
///
/// # Errors
/// [`ModelError::Unsupported`].
pub(crate) fn text_fields(fields: &Fields) -> Result<Option<Fields>, ModelError> {
    let given: String = fields.required("model_type")?;
    let Some(model) = MODELS.iter().find(|model| model.model_type == given) else {
        return Ok(None);
    };
    let mut text: Map<String, Value> = fields.required("text_config")?;
    text.entry("model_type")
        .or_insert_with(|| model.text.into());
    let part = fields.of("text_config", text.clone());
    // llava's is tied if either says so; the others go by the whole model's word alone.
    let ties = match (fields.nullable("tie_word_embeddings")?, model.ties) {
        (Some(true), _) => true,
        (_, false) => part.nullable("tie_word_embeddings")? == Some(true),
        (ties, true) => ties.unwrap_or(true),
    };
    text.insert("tie_word_embeddings".into(), ties.into());
    // The class of the whole applies the head alone, and not what the class of the text does behind it.
    match text.get("model_type").and_then(Value::as_str) {
        Some("gemma2" | "gemma3_text") => {
            text.insert("final_logit_softcapping".into(), Value::Null);
        }
        Some("granite") => {
            text.insert("logits_scaling".into(), 1.0.into());
        }
        _ => {}
    }
    for name in ["dtype", "torch_dtype", "eos_token_id"] {
        if let Some(value) = fields.value(name).filter(|value| !value.is_null()) {
            text.insert(name.into(), value.clone());
        }
    }
    Ok(Some(fields.of("text_config", text)))
}

/// The entries of a `config.json` for the text part alone.
pub(crate) fn text_entries(text: Fields) -> Map<String, Value> {
    let mut entries = text.into_entries();
    let model_type = entries.get("model_type").and_then(Value::as_str);
    if let Some(class) = model_type.and_then(super::class) {
        entries.insert("architectures".into(), vec![Value::from(class)].into());
    }
    entries
}

/// The parameters of a checkpoint that belong to the other parts.
pub(crate) fn other_parameters(checkpoint: &Checkpoint) -> Vec<&str> {
    let other = Regex::new(OTHER_KEYS).expect("the pattern is one");
    checkpoint
        .parameters()
        .into_iter()
        .filter(|key| other.is_match(key).unwrap_or(false))
        .collect()
}
