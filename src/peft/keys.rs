//! The names of an adapter's tensors: those that PEFT 0.21 writes, and the others that it reads.
//!
//! Followed here: `set_peft_model_state_dict` with `LoraModel._remap_adapter_state_dict_for_load`
//! and `ModulesToSaveWrapper.adapter_state_dict_load_map` of PEFT, and `PeftAdapterMixin.load_adapter`
//! of transformers 5.24, which reads names without the prefix too.

use super::config::LoraConfig;
use super::matcher::ModuleMatcher;
use super::setting::LoraBias;
use crate::checkpoint::last_part;
use crate::error::Nf4Error;

/// What PEFT's wrappers put before the name that a module has in the base model.
const PREFIX: &str = "base_model.model.";

/// What PyTorch's wrappers put into a path: `torch.compile`, FSDP, activation checkpointing. PEFT
/// takes them out when it saves; files that were saved without it have them.
const WRAPPERS: [&str; 3] = [
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
];

/// The wrapper around the whole model of DistributedDataParallel and DeepSpeed.
const OUTER_WRAPPER: &str = "module";

/// What PEFT calls an adapter that was given no name. PEFT leaves the name out when it saves.
const ADAPTER_NAME: &str = "default";

/// A part of what an adapter holds for one module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    A,
    B,
    EmbeddingA,
    EmbeddingB,
    Magnitude,
    Bias,
}

impl Part {
    /// The two factors of a branch.
    pub fn factors(is_embedding: bool) -> [Self; 2] {
        match is_embedding {
            false => [Self::A, Self::B],
            true => [Self::EmbeddingA, Self::EmbeddingB],
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::A => ".lora_A.weight",
            Self::B => ".lora_B.weight",
            Self::EmbeddingA => ".lora_embedding_A",
            Self::EmbeddingB => ".lora_embedding_B",
            Self::Magnitude => ".lora_magnitude_vector",
            Self::Bias => ".base_layer.bias",
        }
    }

    /// The key that PEFT writes.
    pub fn key(self, module: &str) -> String {
        format!("{PREFIX}{module}{}", self.suffix())
    }
}

/// What a key says, before the settings are asked.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// A part of the branch of a module.
    Part(String, Part),
    /// A parameter of the layer under a branch: its module, and its name in it.
    Base(String, String),
    /// A parameter of a module that is trained as a whole: its module, and its name in it.
    Saved(String, String),
    /// A parameter of the copy that PEFT keeps of such a module as it was before.
    Original(String),
    /// A parameter under the name that it has in the base model.
    Parameter(String),
    /// A part of an adapter with a name of its own.
    Named(String),
    /// A module of PEFT's in another one, where it puts none.
    Unknown,
}

impl Name {
    pub fn parse(key: &str) -> Self {
        let mut segments: Vec<&str> = key
            .split('.')
            .filter(|segment| !WRAPPERS.contains(segment))
            .collect();
        if segments.starts_with(&[OUTER_WRAPPER, "base_model"]) {
            segments.remove(0);
        }
        if segments.starts_with(&["base_model", "model"]) {
            segments.drain(..2);
        }
        let is_marker = |segment: &&str| segment.starts_with("lora_") || WITHIN.contains(segment);
        let marker = segments.iter().rposition(is_marker);
        let Some(marker) = marker.filter(|&marker| marker > 0) else {
            return Self::Parameter(segments.join("."));
        };
        if segments[..marker].iter().any(is_marker) {
            return Self::Unknown;
        }
        let module = segments[..marker].join(".");
        let rest = &segments[marker + 1..];
        match (segments[marker], rest) {
            ("base_layer", [_, ..]) => Self::Base(module, rest.join(".")),
            ("original_module", [_, ..]) => Self::Original(module),
            ("modules_to_save", [ADAPTER_NAME, name @ ..] | name) if !name.is_empty() => {
                Self::Saved(module, name.join("."))
            }
            (marker, rest) => Self::of_branch(module, marker, rest)
                .unwrap_or_else(|| Self::Parameter(segments.join("."))),
        }
    }

    fn of_branch(module: String, marker: &str, rest: &[&str]) -> Option<Self> {
        let part = match marker {
            "lora_A" => Part::A,
            "lora_B" => Part::B,
            "lora_embedding_A" => Part::EmbeddingA,
            "lora_embedding_B" => Part::EmbeddingB,
            "lora_magnitude_vector" => Part::Magnitude,
            _ => return None,
        };
        // A and B are modules with a weight, the factors of embeddings are parameters themselves,
        // and the magnitudes have been both.
        let name = match (part, rest) {
            (Part::A | Part::B | Part::Magnitude, ["weight"]) => None,
            (Part::A | Part::B | Part::Magnitude, [name, "weight"]) => Some(*name),
            (Part::EmbeddingA | Part::EmbeddingB | Part::Magnitude, []) => None,
            (Part::EmbeddingA | Part::EmbeddingB | Part::Magnitude, [name]) => Some(*name),
            _ => return None,
        };
        Some(match name {
            None | Some(ADAPTER_NAME) => Self::Part(module, part),
            Some(name) => Self::Named(name.into()),
        })
    }
}

/// What PEFT's wrappers put between a module and its parameters, but for the branches.
const WITHIN: [&str; 3] = ["base_layer", "modules_to_save", "original_module"];

/// Where a tensor belongs.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A part of the branch of a module.
    Part(String, Part),
    /// A parameter of the base model, by its name there.
    Full(String),
    /// Nowhere: it changes nothing.
    Unused,
    /// The settings ask for no such tensor.
    Unexpected,
}

impl Place {
    /// `has_branch` says of which modules the adapter holds a branch.
    ///
    /// # Errors
    /// Those of [`ModuleMatcher::is_target`].
    pub fn of(
        name: Name,
        config: &LoraConfig,
        matcher: &ModuleMatcher,
        has_branch: impl Fn(&str) -> bool,
    ) -> Result<Self, Nf4Error> {
        let place = match name {
            Name::Part(module, part) => {
                let is_asked_for = match part {
                    Part::Magnitude => config.use_dora,
                    Part::EmbeddingA | Part::EmbeddingB => !matcher.takes_all_linear(),
                    _ => true,
                };
                (is_asked_for && matcher.is_target(&module)?).then_some(Self::Part(module, part))
            }
            Name::Base(module, name) if matcher.is_target(&module)? => {
                if name == "bias" && config.bias != LoraBias::None {
                    return Ok(Self::Part(module, Part::Bias));
                }
                let parameter = format!("{module}.{name}");
                is_full(&parameter, config, true).then_some(Self::Full(parameter))
            }
            Name::Saved(module, name) => {
                let parameter = format!("{module}.{name}");
                is_saved(&parameter, config).then_some(Self::Full(parameter))
            }
            Name::Original(module) => {
                is_saved(&format!("{module}."), config).then_some(Self::Unused)
            }
            // What is under a branch is saved as such: PEFT finds nothing under the plain name.
            Name::Parameter(parameter) => {
                let under_branch = parameter
                    .rsplit_once('.')
                    .is_some_and(|(module, _)| has_branch(module));
                (!under_branch && is_full(&parameter, config, false))
                    .then_some(Self::Full(parameter))
            }
            Name::Base(..) | Name::Named(_) | Name::Unknown => None,
        };
        Ok(place.unwrap_or(Self::Unexpected))
    }
}

/// The key that PEFT writes for a parameter of the base model.
pub(super) fn full_key(parameter: &str, has_branch: impl Fn(&str) -> bool) -> String {
    match parameter.rsplit_once('.') {
        Some((module, name)) if has_branch(module) => {
            format!("{PREFIX}{module}.base_layer.{name}")
        }
        _ => format!("{PREFIX}{parameter}"),
    }
}

/// PEFT's `EMBEDDING_LAYER_NAMES`: it saves them, unasked, when they are adapted or were resized.
const EMBEDDINGS: [&str; 2] = ["embed_tokens", "lm_head"];

/// Whether a parameter of the base model can be in an adapter as a whole.
pub(super) fn is_full(parameter: &str, config: &LoraConfig, has_branch: bool) -> bool {
    let Some((module, name)) = parameter.rsplit_once('.') else {
        return false;
    };
    let unasked = is_saved_unasked(module);
    match name {
        "bias" if config.bias == LoraBias::All => true,
        "weight" if unasked || has_branch => true,
        "bias" if unasked && has_branch => true,
        _ => is_saved(parameter, config),
    }
}

/// Whether PEFT saves the weight of a module unasked.
pub(crate) fn is_saved_unasked(module: &str) -> bool {
    EMBEDDINGS.contains(&last_part(module))
}

/// Whether a parameter belongs to a module that `modules_to_save` names: any whose path ends with
/// the name, and all that is below it (PEFT's `_set_trainable`).
pub(super) fn is_saved(parameter: &str, config: &LoraConfig) -> bool {
    let ends = || parameter.match_indices('.').map(|(end, _)| end);
    let mut saved = config.modules_to_save.iter().flatten();
    saved.any(|saved| ends().any(|end| parameter[..end].ends_with(saved.as_str())))
}
