//! The names of the tensors of a weight in NVFP4, MXFP4 or FP8, and which tensors are such.

use std::collections::BTreeSet;

use safetensors::Dtype;

use super::folder::Checkpoint;
use super::names::last_part;
use super::stored::TensorSource;
use super::weight::has_quant_state;
use crate::error::Nf4Error;

/// How a library names the tensors of a weight `P`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Naming {
    /// compressed-tensors: `P_packed`, `P_scale`, and `P_global_scale` of NVFP4.
    Packed,
    /// ModelOpt: `P`, `P_scale`, and `P_scale_2` of NVFP4.
    Bytes,
    /// FP8: `P`, and `P_scale_inv` or `P_scale`.
    Fp8,
    /// gpt-oss: `P_blocks` and `P_scales`.
    Blocks,
}

pub(super) const PACKED: &str = "_packed";
pub(super) const SCALE: &str = "_scale";
pub(super) const SCALE_2: &str = "_scale_2";
pub(super) const SCALE_INV: &str = "_scale_inv";
pub(super) const GLOBAL_SCALE: &str = "_global_scale";
pub(super) const SHAPE: &str = "_shape";
pub(super) const ZERO_POINT: &str = "_zero_point";
pub(super) const BLOCKS: &str = "_blocks";
pub(super) const SCALES: &str = "_scales";

/// What follows the name of a parameter in the names of its tensors.
const PARTS: [&str; 9] = [
    PACKED,
    SCALE,
    SCALE_2,
    SCALE_INV,
    GLOBAL_SCALE,
    SHAPE,
    ZERO_POINT,
    BLOCKS,
    SCALES,
];

/// Numbers of a module with a quantized weight that belong to its inputs and outputs.
const OF_ACTIVATIONS: [&str; 7] = [
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "activation_scale",
    "output_scale",
    "output_global_scale",
    "output_zero_point",
];

/// Numbers of an attention for the keys and values that it keeps.
const OF_ATTENTION: [&str; 7] = [
    "q_scale",
    "k_scale",
    "v_scale",
    "prob_scale",
    "q_global_scale",
    "k_global_scale",
    "v_global_scale",
];

impl Naming {
    /// The naming of a parameter that is quantized so; `None` for any other.
    pub fn of(source: &impl TensorSource, prefix: &str) -> Option<Self> {
        let info = |part: &str| source.find(&format!("{prefix}{part}")).map(|it| it.info);
        let has = |part: &str| info(part).is_some();
        let is_weight = last_part(prefix) == "weight";
        if let Some(packed) = info(PACKED)
            && !is_integers(packed.dtype)
            && (is_weight || has(SCALE))
        {
            return Some(Self::Packed);
        }
        if let Some(blocks) = info(BLOCKS) {
            let is_alone = blocks.dtype == Dtype::U8 && matches!(blocks.shape, [_, _, .., 16]);
            if is_alone || has(SCALES) {
                return Some(Self::Blocks);
            }
        }
        // Without its blocks it is a weight that lacks something, not a parameter that is called so.
        if let Some(scales) = info(SCALES)
            && scales.dtype == Dtype::U8
            && scales.shape.len() > 2
            && !has(BLOCKS)
            && !has("")
        {
            return Some(Self::Blocks);
        }
        match info("")?.dtype {
            Dtype::F8_E4M3 if has(SCALE) || has(SCALE_INV) => Some(Self::Fp8),
            Dtype::U8 if has(SCALE) || has(SCALE_2) => Some(Self::Bytes),
            _ if has(SCALE_2) => Some(Self::Bytes),
            _ if has(SCALE_INV) => Some(Self::Fp8),
            _ => None,
        }
    }

    /// What follows the name of the parameter in that of its codes.
    pub fn codes(self) -> &'static str {
        match self {
            Self::Packed => PACKED,
            Self::Bytes | Self::Fp8 => "",
            Self::Blocks => BLOCKS,
        }
    }
}

/// Whether packed codes are integers, as compressed-tensors has them of 4 and 8 bit.
pub(super) fn is_integers(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::I32 | Dtype::I64)
}

/// The parameters among `keys` that are quantized so, sorted.
pub(super) fn block_weights<'a>(
    source: &impl TensorSource,
    keys: impl Iterator<Item = &'a str>,
) -> Vec<&'a str> {
    let mut found = BTreeSet::new();
    for key in keys {
        for prefix in PARTS.iter().filter_map(|part| key.strip_suffix(part)) {
            if !found.contains(prefix) && Naming::of(source, prefix).is_some() {
                found.insert(prefix);
            }
        }
    }
    found.into_iter().collect()
}

/// The keys of a parameter that is quantized so, as far as they are there.
pub(super) fn keys_of_block(source: &impl TensorSource, prefix: &str) -> Vec<String> {
    if Naming::of(source, prefix).is_none() {
        return Vec::new();
    }
    let keys = std::iter::once("").chain(PARTS);
    keys.map(|part| format!("{prefix}{part}"))
        .filter(|key| source.find(key).is_some())
        .collect()
}

/// Whether a key is that of a part of one of these parameters, which are sorted.
pub(super) fn is_part_of_block(key: &str, weights: &[&str]) -> bool {
    let mut prefixes = PARTS.iter().filter_map(|part| key.strip_suffix(part));
    prefixes.any(|prefix| weights.binary_search(&prefix).is_ok())
}

/// Refuses a parameter that is there in two forms, or with two scales of one kind.
///
/// # Errors
/// [`Nf4Error::TwoForms`].
pub(super) fn check_single(source: &impl TensorSource, prefix: &str) -> Result<(), Nf4Error> {
    let key = |part: &str| format!("{prefix}{part}");
    let pairs = [
        (PACKED, ""),
        (PACKED, BLOCKS),
        (BLOCKS, ""),
        (SCALE, SCALE_INV),
        (SCALE, SCALES),
        (SCALE_INV, SCALE_2),
        (GLOBAL_SCALE, SCALE_2),
        (GLOBAL_SCALE, SCALE_INV),
    ];
    let both = |(one, other): &(&str, &str)| {
        source.find(&key(one)).is_some() && source.find(&key(other)).is_some()
    };
    let two = |first: String, second: String| {
        Err(Nf4Error::TwoForms {
            tensor: prefix.into(),
            first,
            second,
        })
    };
    match pairs.iter().find(|pair| both(pair)) {
        Some((one, other)) => two(key(one), key(other)),
        None if has_quant_state(source, prefix) => {
            let scales = [SCALE, SCALE_INV, SCALE_2, PACKED, SCALES];
            let of_block = scales.into_iter().find(|part| both(&(part, part)));
            two(
                key(".quant_state.bitsandbytes__*"),
                key(of_block.unwrap_or_default()),
            )
        }
        None => Ok(()),
    }
}

impl Checkpoint {
    /// Tensors of activations in a checkpoint of NVFP4, MXFP4 or FP8 weights, sorted: scales by which other
    /// programs quantize the inputs and outputs of layers (`input_scale`, `input_global_scale`, …) and the
    /// keys and values that attention keeps (`k_scale`, `v_scale`, …: one number, or one a head of shape
    /// `[heads, 1, 1]`; a tensor of another shape is a parameter).
    ///
    /// They are no [`parameters`](Self::parameters), and nothing here computes with them: activations
    /// stay floats. They belong to the quantized weight, and have no meaning beside one of another form.
    pub fn activation_scales(&self) -> Vec<&str> {
        let weights = self.block_weights();
        if weights.is_empty() {
            return Vec::new();
        }
        let is_one = |key: &&str| is_of_activations(self, key, &weights);
        self.keys().filter(is_one).collect()
    }
}

/// Whether a key is that of a scale of activations in a source with these weights, which are sorted.
pub(super) fn is_of_activations(source: &impl TensorSource, key: &str, weights: &[&str]) -> bool {
    let name = last_part(key);
    if OF_ATTENTION.contains(&name) {
        // As compressed-tensors has them: one of all heads, or one a head. A model may have learned another.
        let is_scale =
            |shape: &[usize]| shape.iter().all(|&size| size == 1) || matches!(shape, [_, 1, 1]);
        let stored = source.find(key);
        return !weights.is_empty() && stored.is_some_and(|stored| is_scale(stored.info.shape));
    }
    OF_ACTIVATIONS.contains(&name) && {
        let weight = format!("{}weight", &key[..key.len() - name.len()]);
        weights.binary_search(&weight.as_str()).is_ok()
    }
}
