//! Which parameters of a model are quantized.

use std::collections::BTreeSet;

use fancy_regex::Regex;

use super::options::QuantizeOptions;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::elements::expect_float;
use crate::checkpoint::names::{last_part, module_of_weight};
use crate::error::Nf4Error;
use crate::format::PackedLayout;

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

/// Embeddings of tokens, the ones that may be large: those of positions and the like never are.
const TOKEN_EMBEDDINGS: [&str; 9] = [
    "embed_in",
    "embed_tokens",
    "embed_tokens_per_layer",
    "shared",
    "tok_embeddings",
    "token_embedding",
    "token_embeddings",
    "word_embeddings",
    "wte",
];

/// The table of a language model, and the head of its own that it gets where it is the head and that is to be
/// quantized: transformers knows both by these names.
pub(crate) const TIED_TABLE: &str = "model.embed_tokens.weight";
pub(crate) const TIED_HEAD: &str = "lm_head.weight";

/// Layers that choose between experts.
const ROUTERS: [&str; 2] = ["gate", "router"];

/// The parameters to quantize, and how transformers is to be told of the others.
#[derive(Debug)]
pub(super) struct Selection {
    quantized: BTreeSet<String>,
    skip_entry: Option<Vec<String>>,
    ignore: Vec<String>,
    ragged: Vec<String>,
    quantizes_head: bool,
    head_of_table: bool,
    expert_stacks: bool,
}

/// Why a matrix keeps its dtype.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// Because of what it is: an embedding, a head, a router or an expert.
    Default,
    /// Because the caller said so.
    Named,
    /// Because its rows are not made of whole blocks.
    Ragged,
}

impl Selection {
    /// Decides on each parameter. `tied` tells whether the output head is the embedding, as far as that
    /// is known.
    ///
    /// # Errors
    /// [`Nf4Error::Config`] if a head or embeddings are to be quantized and there are none, or if an entry
    /// of `skip_modules` fits no module, or if fused experts are to be quantized to a type that has none,
    /// [`Nf4Error::Pattern`], [`Nf4Error::Dtype`].
    pub fn new(
        source: &Checkpoint,
        parameters: &[&str],
        options: &QuantizeOptions,
        tied: Option<bool>,
    ) -> Result<Self, Nf4Error> {
        let patterns = SkipPattern::all(&options.skip_modules)?;
        let modules = modules_of(parameters);
        // A head that is the embedding has no parameter of its own.
        let heads = HEADS_KNOWN_TO_TRANSFORMERS.into_iter();
        let heads = heads.filter(|_| tied != Some(false));
        check_used(&patterns, &modules.chain(heads).collect::<Vec<_>>())?;
        let mut quantized = BTreeSet::new();
        let (mut kept, mut ragged) = (Vec::new(), Vec::new());
        let (mut any_head, mut any_embedding) = (false, false);
        for &key in parameters {
            let shape = shape_of(source, key)?;
            let module = key.strip_suffix(".weight");
            let expert = is_expert(key);
            let is_weight = match shape.as_slice() {
                [] | [_] => false,
                [_, _] => module.is_some() || (expert && options.experts),
                _ => expert && options.experts,
            };
            if !is_weight || shape.contains(&0) {
                continue;
            }
            let module = module.unwrap_or(key);
            any_head |= is_head(module);
            any_embedding |= is_token_embedding(module);
            let mut reason =
                reason_to_keep(module, expert && !options.experts, options, &patterns)?;
            if reason.is_none() {
                check_quantizable(source, key, &shape, options)?;
                if PackedLayout::for_shape(&shape, options.config).is_err() {
                    reason = Some(Kept::Ragged);
                    ragged.push(key.to_string());
                }
            }
            match reason {
                Some(reason) => kept.push((module.to_string(), reason)),
                None => {
                    quantized.insert(key.to_string());
                }
            }
        }
        if options.embeddings && !any_embedding {
            return missing("embeddings", "a checkpoint with a token embedding", source);
        }
        let is_embedding = options.embeddings && tied != Some(false);
        let mut head_of_table = false;
        if options.head && !any_head && !is_embedding {
            if tied == Some(false) || !parameters.contains(&TIED_TABLE) {
                let expected =
                    "a checkpoint with an output head, or one that is `model.embed_tokens`";
                return missing("head", expected, source);
            }
            let head = module_of_weight(TIED_HEAD);
            head_of_table = reason_to_keep(head, false, options, &patterns)?.is_none();
            if head_of_table {
                let shape = shape_of(source, TIED_TABLE)?;
                check_quantizable(source, TIED_TABLE, &shape, options)?;
                head_of_table = PackedLayout::for_shape(&shape, options.config).is_ok();
                match head_of_table {
                    true => {
                        quantized.insert(TIED_HEAD.into());
                    }
                    false => ragged.push(TIED_HEAD.into()),
                }
            }
        }
        let skip_entry = skip_entry(&quantized, &kept, &options.skip_modules);
        let quantizes_head = quantized.iter().any(|key| is_head(module_of_weight(key)));
        let modules = kept.into_iter().map(|(module, _)| module);
        Ok(Self {
            ignore: ignore_entry(&quantized, modules),
            quantized,
            skip_entry,
            ragged,
            quantizes_head,
            head_of_table,
            expert_stacks: false,
        })
    }

    /// Of stacks of experts alone; `ignore` lists what the form is not to be expected of.
    pub fn of_stacks(
        quantized: BTreeSet<String>,
        ignore: Vec<String>,
        ragged: Vec<String>,
    ) -> Self {
        Self {
            quantized,
            skip_entry: None,
            ignore,
            ragged,
            quantizes_head: false,
            head_of_table: false,
            expert_stacks: true,
        }
    }

    /// Whether what is quantized is stacks of experts, as gpt-oss has them.
    pub fn has_expert_stacks(&self) -> bool {
        self.expert_stacks
    }

    /// The head that a parameter is tied to and that is quantized as one of its own: the parameter itself
    /// stays for the embeddings.
    pub fn head_of(&self, key: &str) -> Option<&'static str> {
        (self.head_of_table && key == TIED_TABLE).then_some(TIED_HEAD)
    }

    /// Whether an output head of its own is quantized.
    pub fn quantizes_head(&self) -> bool {
        self.quantizes_head
    }

    pub fn is_quantized(&self, key: &str) -> bool {
        self.quantized.contains(key)
    }

    /// The parameters to quantize.
    pub fn quantized(&self) -> &BTreeSet<String> {
        &self.quantized
    }

    /// The modules that compressed-tensors is to leave as they are.
    pub fn ignore(&self) -> &[String] {
        &self.ignore
    }

    /// Weights that stay as they are because their rows are not made of whole blocks.
    pub fn into_ragged(self) -> Vec<String> {
        self.ragged
    }

    /// The value of `llm_int8_skip_modules`. `None` leaves the choice to transformers, which then
    /// keeps the head.
    pub fn skip_entry(&self) -> Option<&[String]> {
        self.skip_entry.as_deref()
    }
}

/// The module of each parameter that is a weight or a bias; any other stands for itself.
pub(super) fn modules_of<'a>(parameters: &[&'a str]) -> impl Iterator<Item = &'a str> {
    let parameters = parameters.iter();
    parameters.map(|key| match key.rsplit_once('.') {
        Some((module, "weight" | "bias")) => module,
        _ => key,
    })
}

/// The shape of a parameter.
fn shape_of(source: &Checkpoint, key: &str) -> Result<Vec<usize>, Nf4Error> {
    match source.is_quantized(key) {
        true => Ok(source.weight_form(key)?.shape),
        false => Ok(source.tensor_info(key)?.shape.to_vec()),
    }
}

/// Checks that a weight holds floats, and that the type to quantize it to is stored for such a parameter.
fn check_quantizable(
    source: &Checkpoint,
    key: &str,
    shape: &[usize],
    options: &QuantizeOptions,
) -> Result<(), Nf4Error> {
    if !source.is_quantized(key) {
        expect_float(source.tensor_info(key)?.dtype, key)?;
    }
    let quant_type = options.config.quant_type;
    let is_stack = shape.len() != 2 || !key.ends_with(".weight");
    if is_stack && !quant_type.is_bitsandbytes() {
        return Err(Nf4Error::Config {
            field: "experts",
            expected: "false, or experts that are stored one by one",
            given: format!(
                "true for `{key}`, which {} does not store",
                quant_type.name()
            ),
        });
    }
    Ok(())
}

/// The entry `ignore` of compressed-tensors: paths of the modules that are no embeddings and are kept. The head
/// is listed too where it is not stored, as a model makes it a linear layer of its own first.
pub(crate) fn ignore_entry(
    quantized: &BTreeSet<String>,
    kept: impl Iterator<Item = String>,
) -> Vec<String> {
    let mut entries: BTreeSet<String> = kept.filter(|module| !is_embedding(module)).collect();
    let is_known = |module: &str| HEADS_KNOWN_TO_TRANSFORMERS.contains(&last_part(module));
    let mut modules = quantized.iter().map(|key| module_of_weight(key));
    if !modules.any(is_known) && !entries.iter().any(|module| is_known(module)) {
        entries.insert(module_of_weight(TIED_HEAD).into());
    }
    entries.into_iter().collect()
}

/// An entry of `llm_int8_skip_modules`, as transformers 5.24's `should_convert_module` reads it.
pub(crate) struct SkipPattern<'a> {
    text: &'a str,
    /// Matches from the beginning of a path to the end of one of its parts.
    regex: Regex,
}

impl<'a> SkipPattern<'a> {
    /// The entries of a list.
    ///
    /// # Errors
    /// [`Nf4Error::Pattern`].
    pub fn all(entries: &'a [String]) -> Result<Vec<Self>, Nf4Error> {
        entries.iter().map(|text| Self::new(text)).collect()
    }

    fn new(text: &'a str) -> Result<Self, Nf4Error> {
        // By itself first: the error then says at which position of the entry.
        if let Err(error) = Regex::new(text) {
            return Err(fault(text, &error));
        }
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

/// Checks that every entry fits a module: one that is mistyped would be passed over in silence.
///
/// # Errors
/// [`Nf4Error::Config`], [`Nf4Error::Pattern`] for an entry that takes too long to match.
pub(crate) fn check_used(patterns: &[SkipPattern<'_>], modules: &[&str]) -> Result<(), Nf4Error> {
    for pattern in patterns {
        let mut is_used = false;
        for module in modules {
            is_used = is_used || pattern.matches(module)?;
        }
        if !is_used {
            return Err(Nf4Error::Config {
                field: "skip_modules",
                expected: "the end of a module's path, or a regular expression for its beginning",
                given: format!("`{}`, which fits no module", pattern.text),
            });
        }
    }
    Ok(())
}

fn fault(pattern: &str, error: &fancy_regex::Error) -> Nf4Error {
    Nf4Error::Pattern {
        field: "skip_modules",
        pattern: pattern.into(),
        message: error.to_string(),
    }
}

fn missing<T>(
    field: &'static str,
    expected: &'static str,
    source: &Checkpoint,
) -> Result<T, Nf4Error> {
    Err(Nf4Error::Config {
        field,
        expected,
        given: format!("true for {}, which has none", source.path().display()),
    })
}

fn reason_to_keep(
    module: &str,
    kept_expert: bool,
    options: &QuantizeOptions,
    patterns: &[SkipPattern<'_>],
) -> Result<Option<Kept>, Nf4Error> {
    for pattern in patterns {
        if pattern.matches(module)? {
            return Ok(Some(Kept::Named));
        }
    }
    // Some heads are named as embeddings are.
    let by_default = if is_head(module) {
        !options.head
    } else if is_token_embedding(module) {
        !options.embeddings
    } else {
        kept_expert || is_kept_by_default(module)
    };
    Ok(by_default.then_some(Kept::Default))
}

/// Whether a module is an output layer, a router or an embedding, by its name.
pub(crate) fn is_kept_by_default(module: &str) -> bool {
    is_head(module) || ROUTERS.contains(&last_part(module)) || is_embedding(module)
}

/// The entry of `llm_int8_skip_modules` for a model with these quantized and float linear layers.
#[cfg(feature = "peft")]
pub(crate) fn skip_entry_of(
    quantized: &BTreeSet<String>,
    kept: impl Iterator<Item = String>,
) -> Option<Vec<String>> {
    let kept: Vec<(String, Kept)> = kept.map(|module| (module, Kept::Default)).collect();
    let is_known = |module: &str| HEADS_KNOWN_TO_TRANSFORMERS.contains(&last_part(module));
    let any_known_quantized = quantized.iter().any(|key| is_known(module_of_weight(key)));
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

fn is_token_embedding(module: &str) -> bool {
    TOKEN_EMBEDDINGS.contains(&last_part(module))
}

/// Whether a parameter or module belongs to the experts of a mixture, fused or apart: a part of its name is
/// `experts`.
pub fn is_expert(key: &str) -> bool {
    key.split('.').any(|part| part == "experts")
}

/// The entries that make transformers keep `kept` and nothing that is quantized.
///
/// Given any entry, transformers no longer keeps the head by itself, so that it is listed too;
/// also where the checkpoint has none because it is tied to the embeddings. Where the head is quantized,
/// an empty list says so.
fn skip_entry(
    quantized: &BTreeSet<String>,
    kept: &[(String, Kept)],
    named: &[String],
) -> Option<Vec<String>> {
    let is_known_embedding = |module: &str| EMBEDDINGS.contains(&last_part(module));
    let known = |(module, _): &(String, Kept)| {
        is_known_embedding(module) || HEADS_KNOWN_TO_TRANSFORMERS.contains(&last_part(module))
    };
    let quantized_head = |name: &str| {
        quantized
            .iter()
            .any(|key| last_part(module_of_weight(key)) == name)
    };
    if named.is_empty() && kept.iter().all(known) && !HEADS.iter().any(|name| quantized_head(name))
    {
        return None;
    }
    let mut entries = match quantized_head("lm_head") {
        true => Vec::new(),
        false => vec!["lm_head".to_string()],
    };
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
    let modules = || quantized.iter().map(|key| module_of_weight(key));
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
