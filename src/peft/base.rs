//! What a base model consists of, and which of its weights are one.

use std::collections::BTreeSet;

use crate::checkpoint::convert::ModelConfig;
use crate::checkpoint::{Checkpoint, last_part};
use crate::error::Nf4Error;

/// The names of a base model's parameters.
#[derive(Debug)]
pub(super) struct BaseNames {
    parameters: BTreeSet<String>,
    /// Modules with a matrix as their weight: linear layers and embeddings.
    modules: BTreeSet<String>,
    /// The table of the embedding and the weight of the head, where the model has one of each.
    pub ends: Option<Ends>,
}

/// The two weights that can be one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ends {
    /// One that is stored.
    pub stored: String,
    /// The other.
    pub other: String,
    /// Whether the other is not stored, being the same.
    pub are_one: bool,
}

const EMBEDDING: &str = "embed_tokens";
const HEAD: &str = "lm_head";

impl BaseNames {
    pub fn of(base: &Checkpoint, config: Option<&ModelConfig>) -> Result<Self, Nf4Error> {
        let mut parameters: BTreeSet<String> =
            base.parameters().into_iter().map(String::from).collect();
        let mut modules = BTreeSet::new();
        for parameter in &parameters {
            let Some(module) = parameter.strip_suffix(".weight") else {
                continue;
            };
            if base.is_quantized(parameter) || base.tensor_info(parameter)?.shape.len() == 2 {
                modules.insert(module.to_string());
            }
        }
        let ends = Ends::of(&modules, config.and_then(ModelConfig::ties_embeddings));
        if let Some(Ends { other, .. }) = &ends {
            modules.extend(other.strip_suffix(".weight").map(String::from));
            parameters.insert(other.clone());
        }
        Ok(Self {
            parameters,
            modules,
            ends,
        })
    }

    pub fn has(&self, parameter: &str) -> bool {
        self.parameters.contains(parameter)
    }

    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.modules.iter().map(String::as_str)
    }

    pub fn parameters(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(String::as_str)
    }
}

impl Ends {
    /// Where the settings do not say whether the two are tied, a head that is not stored is taken
    /// as tied: transformers leaves out of `config.json` what is a model's default.
    fn of(modules: &BTreeSet<String>, are_tied: Option<bool>) -> Option<Self> {
        let one = |name: &str| {
            let mut found = modules.iter().filter(|module| last_part(module) == name);
            found.next().filter(|_| found.next().is_none())
        };
        let (stored, other) = match (one(EMBEDDING), one(HEAD)) {
            (Some(embedding), Some(head)) => (embedding, head.clone()),
            (Some(embedding), None) if are_tied != Some(false) => (embedding, head_of(embedding)?),
            (None, Some(head)) if are_tied == Some(true) => (head, embedding_of(head)),
            _ => return None,
        };
        Some(Self {
            are_one: !modules.contains(&other),
            stored: format!("{stored}.weight"),
            other: format!("{other}.weight"),
        })
    }
}

/// `lm_head` stands beside the `model` that the embedding is in.
fn head_of(embedding: &str) -> Option<String> {
    let (model, _) = embedding.rsplit_once('.')?;
    let parents: Vec<&str> = model.split('.').collect();
    let model = parents.iter().position(|&parent| parent == "model")?;
    let head = parents[..model].iter().chain([&HEAD]);
    Some(head.copied().collect::<Vec<_>>().join("."))
}

fn embedding_of(head: &str) -> String {
    let parent = head.strip_suffix(HEAD).unwrap_or_default();
    format!("{parent}model.{EMBEDDING}")
}
