//! The names of an adapter's tensors.

use super::config::LoraConfig;
use super::setting::LoraBias;

/// What PEFT's wrappers put before the name that a module has in the base model.
const PREFIX: &str = "base_model.model.";

/// A part of the branch of one module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    A,
    B,
    Magnitude,
    Bias,
}

impl Part {
    const ALL: [Self; 4] = [Self::A, Self::B, Self::Magnitude, Self::Bias];

    fn suffix(self) -> &'static str {
        match self {
            Self::A => ".lora_A.weight",
            Self::B => ".lora_B.weight",
            Self::Magnitude => ".lora_magnitude_vector",
            Self::Bias => ".base_layer.bias",
        }
    }

    pub fn key(self, module: &str) -> String {
        format!("{PREFIX}{module}{}", self.suffix())
    }
}

/// What a key stands for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Key<'a> {
    /// A part of a module's branch.
    Part(&'a str, Part),
    /// A parameter of the base model as a whole.
    Full(&'a str),
}

impl Key<'_> {
    /// Understands a key, or says that the settings ask for no such tensor.
    pub fn parse<'a>(key: &'a str, config: &LoraConfig) -> Option<Key<'a>> {
        let name = key.strip_prefix(PREFIX)?;
        for part in Part::ALL {
            let Some(module) = name.strip_suffix(part.suffix()) else {
                continue;
            };
            let is_asked_for = match part {
                Part::A | Part::B => true,
                Part::Magnitude => config.use_dora,
                Part::Bias => config.bias != LoraBias::None,
            };
            return is_asked_for.then_some(Key::Part(module, part));
        }
        is_full(name, config).then_some(Key::Full(name))
    }
}

pub(super) fn full_key(parameter: &str) -> String {
    format!("{PREFIX}{parameter}")
}

/// PEFT's `EMBEDDING_LAYER_NAMES`: it saves them, unasked, when they were resized.
const EMBEDDINGS: [&str; 2] = ["embed_tokens", "lm_head"];

/// Whether a parameter of the base model can be in an adapter as a whole.
pub(super) fn is_full(parameter: &str, config: &LoraConfig) -> bool {
    let Some((module, name)) = parameter.rsplit_once('.') else {
        return false;
    };
    if config.bias == LoraBias::All && name == "bias" {
        return true;
    }
    let last = module.rsplit_once('.').map_or(module, |(_, last)| last);
    if name == "weight" && EMBEDDINGS.contains(&last) {
        return true;
    }
    // A saved module is any whose path ends with the name, and holds all parameters below it.
    let ends = || parameter.match_indices('.').map(|(end, _)| end);
    let mut saved = config.modules_to_save.iter().flatten();
    saved.any(|saved| ends().any(|end| parameter[..end].ends_with(saved.as_str())))
}
