//! Which parameters of a model are quantized.

use std::collections::BTreeSet;

use fancy_regex::Regex;

use super::options::QuantizeOptions;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::elements::expect_float;
use crate::checkpoint::names::last_part;
use crate::error::Nf4Error;

/// Output layers by the last part of their path: transformers leaves the first two in float by
/// itself, the others are heads of classifiers.
const HEADS: [&str; 5] = ["lm_head", "embed_out", "score", "classifier", "qa_outputs"];

/// Heads that need not be listed in `llm_int8_skip_modules`.
const HEADS_KNOWN_TO_TRANSFORMERS: [&str; 2] = ["lm_head", "embed_out"];

/// Names that only embeddings have, so that transformers need not be told of them.
const EMBEDDINGS: [&str; 12] = [
    "embed_in",
    "embed_positions",
    "embed_tokens",
    "position_embedding",
    "position_embeddings",
    "relative_attention_bias",
    "shared",
    "token_embedding",
    "token_type_embeddings",
    "word_embeddings",
    "wpe",
    "wte",
];

/// Layers that choose between experts.
const ROUTERS: [&str; 2] = ["gate", "router"];

/// The parameters to quantize, and how transformers is to be told of the others.
#[derive(Debug)]
pub(super) struct Selection {
    quantized: BTreeSet<String>,
    skip_entry: Option<Vec<String>>,
}

/// Why a matrix keeps its dtype.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// Because of what it is: an embedding, a head, a router or an expert.
    Default,
    /// Because the caller said so.
    Named,
}

impl Selection {
    /// Decides on each parameter.
    pub fn new(
        source: &Checkpoint,
        parameters: &[&str],
        options: &QuantizeOptions,
    ) -> Result<Self, Nf4Error> {
        let patterns = options
            .skip_modules
            .iter()
            .map(|pattern| SkipPattern::new(pattern))
            .collect::<Result<Vec<_>, _>>()?;
        let mut quantized = BTreeSet::new();
        let mut kept = Vec::new();
        for &key in parameters {
            let info = source.tensor_info(key)?;
            let module = key.strip_suffix(".weight");
            let expert = is_expert(key);
            let is_weight = match info.shape {
                [] | [_] => false,
                [_, _] => module.is_some() || (expert && options.experts),
                _ => expert && options.experts,
            };
            if !is_weight || info.shape.contains(&0) {
                continue;
            }
            let module = module.unwrap_or(key);
            match reason_to_keep(module, expert && !options.experts, &patterns)? {
                Some(reason) => kept.push((module.to_string(), reason)),
                None => {
                    expect_float(info.dtype, key)?;
                    quantized.insert(key.to_string());
                }
            }
        }
        let skip_entry = skip_entry(&quantized, &kept, &options.skip_modules);
        Ok(Self {
            quantized,
            skip_entry,
        })
    }

    pub fn is_quantized(&self, key: &str) -> bool {
        self.quantized.contains(key)
    }

    /// The value of `llm_int8_skip_modules`. `None` leaves the choice to transformers, which then
    /// keeps the head.
    pub fn skip_entry(&self) -> Option<&[String]> {
        self.skip_entry.as_deref()
    }
}

/// An entry of `llm_int8_skip_modules`, as transformers 5.24's `should_convert_module` reads it.
pub(crate) struct SkipPattern<'a> {
    text: &'a str,
    /// Matches from the beginning of a path to the end of one of its parts.
    regex: Regex,
}

impl<'a> SkipPattern<'a> {
    pub fn new(text: &'a str) -> Result<Self, Nf4Error> {
        match Regex::new(&format!(r"^(?:{text})(?:(?<=\.)|(?=\.|$))")) {
            Ok(regex) => Ok(Self { text, regex }),
            Err(error) => Err(fault(text, &error)),
        }
    }

    pub fn matches(&self, module: &str) -> Result<bool, Nf4Error> {
        let from_start = self.regex.is_match(module);
        Ok(module.ends_with(self.text) || from_start.map_err(|error| fault(self.text, &error))?)
    }
}

fn fault(pattern: &str, error: &fancy_regex::Error) -> Nf4Error {
    Nf4Error::Pattern {
        field: "skip_modules",
        pattern: pattern.into(),
        message: error.to_string(),
    }
}

fn reason_to_keep(
    module: &str,
    kept_expert: bool,
    patterns: &[SkipPattern<'_>],
) -> Result<Option<Kept>, Nf4Error> {
    for pattern in patterns {
        if pattern.matches(module)? {
            return Ok(Some(Kept::Named));
        }
    }
    let by_default = kept_expert || is_kept_by_default(module);
    Ok(by_default.then_some(Kept::Default))
}

/// Whether a module is an output layer, a router or an embedding, by its name.
pub(crate) fn is_kept_by_default(module: &str) -> bool {
    is_head(module) || ROUTERS.contains(&last_part(module)) || is_embedding(module)
}

/// The entry of `llm_int8_skip_modules` for a model with these quantized and float linear layers.
pub(crate) fn skip_entry_of(
    quantized: &BTreeSet<String>,
    kept: impl Iterator<Item = String>,
) -> Option<Vec<String>> {
    let kept: Vec<(String, Kept)> = kept.map(|module| (module, Kept::Default)).collect();
    let is_known = |module: &str| HEADS_KNOWN_TO_TRANSFORMERS.contains(&last_part(module));
    let any_known_quantized = quantized
        .iter()
        .any(|key| is_known(key.strip_suffix(".weight").unwrap_or(key)));
    if !any_known_quantized {
        return skip_entry(quantized, &kept, &[]);
    }
    // Without an entry transformers would keep the head, so that even an empty list is one.
    let mut entries: Vec<String> = Vec::new();
    for (module, _) in &kept {
        let entry = distinct_entry(module, quantized);
        if !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    Some(entries)
}

/// Whether a module is an output layer, by its name.
pub(crate) fn is_head(module: &str) -> bool {
    HEADS.contains(&last_part(module))
}

/// Whether a module is an embedding and no linear layer, by its name: a checkpoint does not tell the
/// two apart.
pub(crate) fn is_embedding(module: &str) -> bool {
    let name = last_part(module);
    EMBEDDINGS.contains(&name) || (name.contains("embed") && !name.ends_with("proj"))
}

/// Whether a parameter belongs to the experts of a mixture, fused or apart.
fn is_expert(key: &str) -> bool {
    key.split('.').any(|part| part == "experts")
}

/// The entries that make transformers keep `kept` and nothing that is quantized.
///
/// Given any entry, transformers no longer keeps the head by itself, so that it is listed too;
/// also where the checkpoint has none because it is tied to the embeddings.
fn skip_entry(
    quantized: &BTreeSet<String>,
    kept: &[(String, Kept)],
    named: &[String],
) -> Option<Vec<String>> {
    let is_known_embedding = |module: &str| EMBEDDINGS.contains(&last_part(module));
    let known = |(module, _): &(String, Kept)| {
        is_known_embedding(module) || HEADS_KNOWN_TO_TRANSFORMERS.contains(&last_part(module))
    };
    if named.is_empty() && kept.iter().all(known) {
        return None;
    }
    let mut entries = vec!["lm_head".to_string()];
    entries.extend(named.iter().filter(|&name| name != "lm_head").cloned());
    for (module, reason) in kept {
        let listed = *reason == Kept::Named || last_part(module) == "lm_head";
        if listed || is_known_embedding(module) {
            continue;
        }
        let entry = distinct_entry(module, quantized);
        if !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    Some(entries)
}

/// The shortest end of the path that no quantized module ends with; nor begins with, as that was
/// enough for transformers 5.17. If there is none it is the whole path, as a regular expression that
/// matches no longer one.
fn distinct_entry(module: &str, quantized: &BTreeSet<String>) -> String {
    let modules = || {
        quantized
            .iter()
            .map(|key| key.strip_suffix(".weight").unwrap_or(key))
    };
    let starts = module
        .rmatch_indices('.')
        .map(|(dot, _)| dot + 1)
        .chain([0]);
    starts
        .map(|start| &module[start..])
        .find(|end| !modules().any(|other| other.ends_with(end) || other.starts_with(end)))
        .map_or_else(
            || format!("{}$", module.replace('.', "\\.")),
            str::to_string,
        )
}
