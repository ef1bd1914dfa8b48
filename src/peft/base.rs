//! What a base model consists of, and which of its weights are one.

use std::collections::BTreeSet;

use super::adapter::Adapter;
use crate::checkpoint::convert::{ModelConfig, is_embedding, is_head};
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
    /// Whether the two are one in the model.
    pub are_one: bool,
    /// Whether the other is stored too.
    pub are_both_stored: bool,
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
        if let Some(Ends {
            other,
            are_both_stored: false,
            ..
        }) = &ends
        {
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

/// For a merge, which has to know what else a change of the embedding or of the head changes.
impl BaseNames {
    /// Finds out whether the weight that an adapter changes as an embedding or a head is another one too:
    /// a copy that is stored under another name, as `save_folder` writes it, or one that is not stored.
    ///
    /// # Errors
    /// [`Nf4Error::Config`] for a weight of which that cannot be told.
    pub fn find_tie(
        &mut self,
        base: &Checkpoint,
        adapter: &Adapter,
        config: Option<&ModelConfig>,
    ) -> Result<(), Nf4Error> {
        if config.and_then(ModelConfig::ties_embeddings) == Some(false)
            || self.ends.as_ref().is_some_and(|ends| ends.are_one)
        {
            return Ok(());
        }
        for module in changed_ends(adapter) {
            let key = format!("{module}.weight");
            if !self.parameters.contains(&key) {
                continue;
            }
            let others: Vec<&String> = self
                .modules
                .iter()
                .filter(|other| *other != module && can_be_tied(module, other))
                .collect();
            let mut is_known = false;
            for other in others {
                let other_key = format!("{other}.weight");
                let is_alike = shape_of(base, &other_key)? == shape_of(base, &key)?;
                if is_alike && are_equal(base, &key, &other_key)? {
                    self.ends = Some(Ends {
                        stored: key,
                        other: other_key,
                        are_one: true,
                        are_both_stored: true,
                    });
                    return Ok(());
                }
                is_known |= is_alike || is_head(other);
            }
            if !is_known {
                return Err(Nf4Error::Config {
                    field: "tie_word_embeddings",
                    expected: "false in config.json, or an embedding and a head that are both stored or \
                               have the names `….model.embed_tokens` and `….lm_head`",
                    given: format!(
                        "not known of `{module}`, which the adapter changes: no other weight of the \
                         folder can be the {} that it may be tied to",
                        if is_head(module) { "embedding" } else { "head" },
                    ),
                });
            }
        }
        Ok(())
    }
}

/// The modules that an adapter changes, as far as they are embeddings or heads.
fn changed_ends(adapter: &Adapter) -> BTreeSet<&str> {
    let full = adapter
        .full_tensors()
        .filter_map(|(name, _)| name.strip_suffix(".weight"));
    let modules = adapter.modules().map(|(path, _)| path).chain(full);
    let ends = modules.filter(|module| is_tied_head(module) || is_embedding(module));
    let ends = ends.chain(adapter.embeddings().map(|(path, _)| path));
    ends.filter(|module| !is_of_positions(module)).collect()
}

/// Whether a module is an embedding that no head takes its weight from, by its name.
fn is_of_positions(module: &str) -> bool {
    let name = last_part(module);
    name.contains("position")
        || ["relative_attention_bias", "token_type_embeddings", "wpe"].contains(&name)
}

/// Whether a module is a head that takes its weight from an embedding in some models.
fn is_tied_head(module: &str) -> bool {
    ["lm_head", "embed_out"].contains(&last_part(module))
}

/// Whether one of two modules can be the head of the other, or the embedding.
fn can_be_tied(module: &str, other: &str) -> bool {
    match is_tied_head(module) {
        true => !is_head(other),
        false => !is_embedding(other) || is_head(other),
    }
}

fn shape_of(base: &Checkpoint, key: &str) -> Result<Vec<usize>, Nf4Error> {
    match base.is_quantized(key) {
        true => Ok(base.weight_form(key)?.shape),
        false => Ok(base.tensor_info(key)?.shape.to_vec()),
    }
}

/// Whether two parameters are stored with the same bits.
fn are_equal(base: &Checkpoint, a: &str, b: &str) -> Result<bool, Nf4Error> {
    if base.is_quantized(a) || base.is_quantized(b) {
        return Ok(false);
    }
    let is_alike = base.tensor_info(a)?.dtype == base.tensor_info(b)?.dtype;
    Ok(is_alike && base.tensor_bytes(a)? == base.tensor_bytes(b)?)
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
        let are_both_stored = modules.contains(&other);
        Some(Self {
            are_one: !are_both_stored,
            are_both_stored,
            stored: format!("{stored}.weight"),
            other: format!("{other}.weight"),
        })
    }
}

/// Whether transformers sees by the names that a head which is not stored is the table of an embedding.
pub(crate) fn is_tied_by_name(embedding: &str, head: &str) -> bool {
    last_part(embedding) == EMBEDDING && head_of(embedding).as_deref() == Some(head)
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
