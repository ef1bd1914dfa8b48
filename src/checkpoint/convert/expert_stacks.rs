//! The experts of gpt-oss in stacks, for which MXFP4 has a form of its own.

use std::collections::{BTreeMap, BTreeSet};

use super::options::QuantizeOptions;
use super::select::{Selection, SkipPattern, check_used, modules_of};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::elements::expect_float;
use crate::error::Nf4Error;
use crate::format::{PackedLayout, QuantType};

/// The model that has such stacks, by its `model_type`.
const MODEL: &str = "gpt_oss";

/// The stacks of a layer, `[experts, k, rows]`.
const STACKS: [&str; 2] = [".experts.gate_up_proj", ".experts.down_proj"];

/// What openai lists as modules that are not in MXFP4.
const NOT_EXPERTS: [&str; 4] = [
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
];

/// Whether experts in stacks are what is to be quantized.
pub(super) fn are_wanted(
    model_type: Option<&str>,
    parameters: &[&str],
    options: &QuantizeOptions,
) -> bool {
    let any_stack = || parameters.iter().any(|key| module_of(key).is_some());
    options.experts
        && options.config.quant_type == QuantType::Mxfp4
        && model_type == Some(MODEL)
        && any_stack()
}

/// Decides on the experts of each layer as a whole: transformers has both stacks of a layer in MXFP4, or none.
/// All other parameters are kept, as the form has experts alone.
///
/// # Errors
/// [`Nf4Error::Config`] for a head or embeddings that are to be quantized too, and for an entry of `skip_modules`
/// that fits no module, [`Nf4Error::Pattern`], [`Nf4Error::Dtype`].
pub(super) fn select(
    source: &Checkpoint,
    parameters: &[&str],
    options: &QuantizeOptions,
) -> Result<Selection, Nf4Error> {
    let others = [("head", options.head), ("embeddings", options.embeddings)];
    if let Some((field, _)) = others.into_iter().find(|(_, is_set)| *is_set) {
        return Err(Nf4Error::Config {
            field,
            expected: "false where the experts of gpt-oss go to MXFP4: that form has experts alone",
            given: "true".into(),
        });
    }
    let patterns = SkipPattern::all(&options.skip_modules)?;
    let modules = modules_of(parameters);
    let experts = parameters.iter().filter_map(|key| module_of(key));
    check_used(&patterns, &modules.chain(experts).collect::<Vec<_>>())?;

    let mut layers: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for key in parameters {
        if let Some(module) = module_of(key) {
            layers.entry(module).or_default().push(key);
        }
    }
    let (mut quantized, mut ragged) = (BTreeSet::new(), Vec::new());
    let mut ignore: Vec<String> = NOT_EXPERTS.map(String::from).into();
    for (module, stacks) in layers {
        let mut is_named = false;
        for pattern in &patterns {
            for name in stacks.iter().chain([&module]) {
                is_named |= pattern.matches(name)?;
            }
        }
        let mut is_whole = true;
        for key in &stacks {
            is_whole &= has_blocks(source, key, options)?;
        }
        let stacks = stacks.iter().map(|key| key.to_string());
        match (is_named, is_whole) {
            (false, true) => quantized.extend(stacks),
            (false, false) => ragged.extend(stacks),
            (true, _) => {}
        }
        if is_named || !is_whole {
            ignore.push(module.into());
        }
    }
    Ok(Selection::of_stacks(quantized, ignore, ragged))
}

/// The experts that a stack belongs to, if the parameter is one.
fn module_of(key: &str) -> Option<&str> {
    let is_stack = STACKS.iter().any(|end| key.ends_with(end));
    is_stack.then(|| key.rsplit_once('.').map_or(key, |(module, _)| module))
}

/// Whether the inputs of each expert are whole blocks.
fn has_blocks(source: &Checkpoint, key: &str, options: &QuantizeOptions) -> Result<bool, Nf4Error> {
    if source.is_quantized(key) {
        // Of whatever type, it is refused for what it is.
        return Ok(true);
    }
    let info = source.tensor_info(key)?;
    expect_float(info.dtype, key)?;
    let &[experts, inputs, rows] = info.shape else {
        return Err(Nf4Error::Rank {
            tensor: key.into(),
            expected: 3,
            shape: info.shape.to_vec(),
        });
    };
    Ok(PackedLayout::for_shape(&[experts, rows, inputs], options.config).is_ok())
}
