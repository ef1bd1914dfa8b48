//! The families of models, and how the `config.json` of each is read.
//!
//! A family is one file and a line of the table here. The fields and defaults are those of its
//! configuration class in transformers 5.24.0; a field that the class does not read is not read here.

mod gemma2;
mod gemma3;
mod gpt_oss;
mod granite;
mod llama;
mod mistral;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod smollm3;
pub(crate) mod vision;

use crate::error::ModelError;
use crate::json::fields::Fields;
use crate::model::config::DecoderConfig;

/// Reads the `config.json` of a family.
type Reader = fn(&Fields) -> Result<DecoderConfig, ModelError>;

/// The families: the `model_type` of their configs, transformers' class, and how they are read.
const FAMILIES: [(&str, &str, Reader); 12] = [
    ("gemma2", "Gemma2ForCausalLM", gemma2::read),
    ("gemma3_text", "Gemma3ForCausalLM", gemma3::read),
    ("gpt_oss", "GptOssForCausalLM", gpt_oss::read),
    ("granite", "GraniteForCausalLM", granite::read),
    ("llama", "LlamaForCausalLM", llama::read),
    ("mistral", "MistralForCausalLM", mistral::read),
    ("olmo2", "Olmo2ForCausalLM", olmo2::read),
    ("phi3", "Phi3ForCausalLM", phi3::read),
    ("qwen2", "Qwen2ForCausalLM", qwen2::read),
    ("qwen3", "Qwen3ForCausalLM", qwen3::read),
    ("qwen3_moe", "Qwen3MoeForCausalLM", qwen3_moe::read),
    ("smollm3", "SmolLM3ForCausalLM", smollm3::read),
];

/// The values of `model_type` that are known.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(model_type, ..)| *model_type)
}

/// The values of `model_type` of models of text and images whose text part is a model of a family.
pub fn vision_model_types() -> impl Iterator<Item = &'static str> {
    vision::model_types()
}

/// The reader of the family that `model_type` names.
pub(super) fn reader(fields: &Fields) -> Result<Reader, ModelError> {
    let given: String = fields.required("model_type")?;
    let mut families = FAMILIES.iter();
    match families.find(|(model_type, ..)| *model_type == given) {
        Some((.., read)) => Ok(*read),
        None => {
            let known: Vec<&str> = model_types().chain(vision_model_types()).collect();
            Err(fields.unsupported("model_type", given, known.join(", ")))
        }
    }
}

/// What transformers calls a model of a family.
fn class(model_type: &str) -> Option<&'static str> {
    let mut families = FAMILIES.iter();
    let (_, class, _) = families.find(|(known, ..)| *known == model_type)?;
    Some(class)
}
