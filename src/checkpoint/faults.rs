//! Whether what a checkpoint holds and what its `config.json` says of it fit each other.

mod blocks;

use std::collections::BTreeSet;

use safetensors::Dtype;

use super::block_weight::PACKED_INTEGERS;
use super::convert::{Claim, ModelConfig};
use super::folder::Checkpoint;
use super::names::last_part;
use super::naming::{is_of_activations, is_part_of_block};
use super::quant_claim::QuantClaim;
use super::quant_state::QuantState;
use super::stored::TensorSource;
use super::weight::{PARTS, QUANT_TYPES, find_quant_state, prefix_of_quant_state, quant_state_key};
use crate::error::Nf4Error;
use blocks::BlockWeights;

impl Checkpoint {
    /// What keeps this from being a checkpoint of float weights, some of them quantized in a
    /// [format](super#the-tensors-of-one-weight) that is read; empty if nothing does. Names, headers and
    /// `config.json` are read, and `hf_quant_config.json`, but no weights.
    ///
    /// - [`Nf4Error::OtherQuantization`] with the first tensor of each other method, and for
    ///   codes that no name explains
    /// - [`Nf4Error::MissingKey`] for each quantized weight that lacks a part, its `quant_state`
    ///   among them
    /// - the errors of [`SafetensorsFile::load_quantized`](super::SafetensorsFile::load_quantized) that names,
    ///   dtypes and shapes of weights in NVFP4, MXFP4 and FP8 tell
    /// - [`Nf4Error::QuantType`] for a `quant_state` of another type, and the errors of
    ///   [`QuantState::parse`]
    /// - [`Nf4Error::Config`] for a `quantization_config` that claims another method, or 4 bit
    ///   where no weight is quantized, and for a `config.json` that has none though a weight is
    ///   quantized; a checkpoint without `config.json` claims what it holds
    /// - [`Nf4Error::Config`] for a weight in NVFP4, MXFP4 or FP8 whose module is ignored, not targeted or
    ///   targeted for another format, for a matrix of floats that is targeted, and for a group of another
    ///   format; [`Nf4Error::Pattern`] for a pattern among them that is none
    /// - [`Nf4Error::ModelConfig`], [`Nf4Error::Io`] for a `config.json` that cannot be read
    pub fn faults(&self) -> Vec<Nf4Error> {
        let config = ModelConfig::read(self).map(|config| config.map(|config| config.claims()));
        let (claims, block_claims, unreadable) = match (config, self.quant_claims()) {
            (Ok(claims), Ok(block_claims)) => (claims, block_claims, None),
            (Err(error), _) | (_, Err(error)) => (None, Vec::new(), Some(error)),
        };
        let of_blocks = self.block_weights();
        let quantized = self.quantized_weights();
        let of_bitsandbytes: Vec<&str> = quantized
            .iter()
            .filter(|weight| of_blocks.binary_search(weight).is_err())
            .copied()
            .collect();
        let storage = claims.iter().flatten().find_map(Claim::storage);
        let mut faults = self.foreign_tensors(&of_blocks);
        let lost = self.lost_states(&quantized, storage, faults.is_empty());
        let blocks = BlockWeights::of(self, &of_blocks);
        faults.extend(blocks.faults.iter().cloned());
        faults.extend(self.missing_parts(&of_bitsandbytes));
        let any_lost = !lost.is_empty();
        faults.extend(lost.into_iter().map(|prefix| self.missing_state(&prefix)));
        if unreadable.is_none() {
            let has_config = claims.is_some();
            let others = claims.unwrap_or_default();
            let others = others
                .iter()
                .filter(|claim| QuantClaim::of(claim).is_none());
            let others: Vec<&Claim> = others.collect();
            // A claim of another method is a fault, and explains the weights no better than none.
            let is_explained = !block_claims.is_empty() || others.is_empty();
            let first = of_bitsandbytes.first().copied();
            if has_config || !block_claims.is_empty() {
                faults.extend(contradictions(&others, &block_claims, first, any_lost));
            }
            faults.extend(blocks.contradictions(self, &block_claims, has_config && is_explained));
            faults.extend(unexplained(
                &others,
                is_explained,
                of_blocks.first().copied(),
            ));
        }
        faults.extend(unreadable);
        faults
    }

    /// The first tensor of each method that is not bitsandbytes in 4 bit.
    fn foreign_tensors(&self, of_blocks: &[&str]) -> Vec<Nf4Error> {
        let is_known = |key: &str| {
            of_blocks.binary_search(&key).is_ok()
                || is_part_of_block(key, of_blocks)
                || is_of_activations(self, key, of_blocks)
        };
        let unknown = self.keys().filter_map(|key| {
            let state = unknown_state(key)?;
            Some(Nf4Error::QuantType {
                tensor: key.into(),
                given: state.into(),
            })
        });
        let of_name = |key: &str| self.method_of_name(key).filter(|_| !is_known(key));
        let mut foreign = self.first_of_each(of_name);
        if foreign.is_empty() {
            // A name says more than a dtype, so dtypes count only where no name tells.
            let of_dtype = |key: &str| self.method_of_dtype(key).filter(|_| !is_known(key));
            foreign = self.first_of_each(of_dtype);
        }
        unknown.chain(foreign).collect()
    }

    fn first_of_each(&self, method_of: impl Fn(&str) -> Option<&'static str>) -> Vec<Nf4Error> {
        let mut methods = BTreeSet::new();
        let mut faults = Vec::new();
        for key in self.keys() {
            if let Some(method) = method_of(key).filter(|&method| methods.insert(method)) {
                faults.push(Nf4Error::OtherQuantization {
                    tensor: key.into(),
                    method,
                });
            }
        }
        faults
    }

    /// The method whose weights have parts of such a name.
    fn method_of_name(&self, key: &str) -> Option<&'static str> {
        let has = |part: &str, other: &str| {
            let other = key
                .strip_suffix(part)
                .map(|prefix| format!("{prefix}{other}"));
            other.is_some_and(|other| self.contains(&other))
        };
        Some(match last_part(key) {
            "SCB" | "weight_format" => "LLM.int8",
            "qweight" | "qzeros" | "g_idx" => "GPTQ or AWQ",
            "weight_packed" => PACKED_INTEGERS,
            "pre_quant_scale" => "ModelOpt's AWQ",
            "weight_shape" | "weight_zero_point" | "weight_global_scale" | "input_global_scale" => {
                "compressed-tensors"
            }
            "weight_scale" | "weight_scale_inv" | "weight_scale_2" | "weight_scales"
            | "activation_scale" | "input_scale" => "FP8, FP4 or int8 with scales",
            "W_q" => "HQQ",
            "codes" if has("codes", "codebooks") => "AQLM",
            "_data" | "_scale" | "_shift" if key.contains(".weight.") => "quanto",
            _ => return None,
        })
    }

    /// The method that a weight is quantized with, as no float weight has such a dtype.
    fn method_of_dtype(&self, key: &str) -> Option<&'static str> {
        let dtype = self.find(key)?.info.dtype;
        let is_weight = last_part(key).contains("weight") && !self.is_quantized(key);
        match dtype {
            Dtype::I8 if is_weight => Some("8 bit, as LLM.int8"),
            // U8 are codes of 4 bit unless a name beside them says otherwise.
            Dtype::I16 | Dtype::U16 | Dtype::I32 | Dtype::U32 | Dtype::I64 | Dtype::U64
                if is_weight =>
            {
                Some("integers")
            }
            // Nothing but quantized weights and their scales has these.
            Dtype::F8_E5M2
            | Dtype::F8_E4M3
            | Dtype::F8_E5M2FNUZ
            | Dtype::F8_E4M3FNUZ
            | Dtype::F8_E8M0
            | Dtype::F6_E2M3
            | Dtype::F6_E3M2
            | Dtype::F4 => Some("8, 6 or 4-bit floats"),
            _ => None,
        }
    }

    /// Parameters that have codes or scales, but no `quant_state`. `storage` is the float
    /// type that codes are stored as, as `config.json` has it; `alone` says that no other method
    /// explains the codes.
    fn lost_states(
        &self,
        quantized: &[&str],
        storage: Option<Dtype>,
        alone: bool,
    ) -> BTreeSet<String> {
        let mut lost = BTreeSet::new();
        for key in self.keys() {
            let part = PARTS
                .iter()
                .find_map(|part| Some((key.strip_suffix(part)?, *part)));
            let prefix = match part {
                // A parameter may have this name where it is not a part of a weight.
                Some((prefix, ".absmax"))
                    if !self.contains(prefix) && last_part(prefix) != "weight" =>
                {
                    continue;
                }
                Some((prefix, _)) => prefix,
                None if alone && self.has_form_of_codes(key, storage) => key,
                None => continue,
            };
            if quantized.binary_search(&prefix).is_err() {
                lost.insert(prefix.to_string());
            }
        }
        lost
    }

    fn has_form_of_codes(&self, key: &str, storage: Option<Dtype>) -> bool {
        let Some(info) = self.find(key).map(|stored| stored.info) else {
            return false;
        };
        let is_column = matches!(info.shape, [rows, 1] if *rows > 1);
        last_part(key) == "weight"
            && (info.dtype == Dtype::U8 || (storage == Some(info.dtype) && is_column))
    }

    /// Parts that quantized weights lack.
    fn missing_parts(&self, quantized: &[&str]) -> Vec<Nf4Error> {
        let mut faults = Vec::new();
        for &prefix in quantized {
            let nested = find_quant_state(self, prefix)
                .and_then(|(_, key, state)| QuantState::parse(state.bytes, &key))
                .map(|state| state.nested.is_some());
            let nested = match nested {
                Ok(nested) => nested,
                Err(error) => {
                    faults.push(error);
                    continue;
                }
            };
            let parts = if nested { &PARTS[..] } else { &PARTS[..2] };
            let keys = std::iter::once("").chain(parts.iter().copied());
            let missing = keys
                .map(|part| format!("{prefix}{part}"))
                .filter(|key| !self.contains(key));
            faults.extend(missing.map(|key| self.missing_key(&key)));
        }
        faults
    }

    fn missing_state(&self, prefix: &str) -> Nf4Error {
        self.missing_key(&quant_state_key(prefix, QUANT_TYPES[0]))
    }
}

/// Where `config.json` and the tensors disagree.
fn contradictions(
    claims: &[&Claim],
    of_blocks: &[QuantClaim],
    quantized: Option<&str>,
    any_lost: bool,
) -> Vec<Nf4Error> {
    let mut faults: Vec<Nf4Error> = claims
        .iter()
        .filter_map(|claim| claim.check().err())
        .collect();
    match quantized {
        // A weight that has lost its state is a fault already.
        None if !claims.is_empty() && faults.is_empty() && !any_lost => {
            faults.push(Nf4Error::Config {
                field: Claim::FIELD,
                expected: "a weight with a quant_state",
                given: "bitsandbytes in 4 bit, but no weight is quantized".into(),
            });
        }
        Some(weight) if claims.is_empty() => faults.push(Nf4Error::Config {
            field: Claim::FIELD,
            expected: "bitsandbytes in 4 bit",
            given: match of_blocks.first() {
                None => format!("not there, but `{weight}` is quantized"),
                Some(claim) => format!("{claim}, but `{weight}` is quantized by bitsandbytes"),
            },
        }),
        _ => {}
    }
    faults
}

/// Weights in NVFP4, MXFP4 or FP8 where nothing but bitsandbytes is claimed.
fn unexplained(claims: &[&Claim], is_explained: bool, weight: Option<&str>) -> Option<Nf4Error> {
    let weight = weight.filter(|_| !is_explained)?;
    let claim = claims.iter().find(|claim| claim.check().is_ok())?;
    Some(Nf4Error::Config {
        field: Claim::FIELD,
        expected: "the format of its weights",
        given: format!("{claim}, but `{weight}` is quantized otherwise"),
    })
}

/// The type of a `quant_state` that is not one of bitsandbytes' in 4 bit.
fn unknown_state(key: &str) -> Option<&str> {
    let (_, state) = key.rsplit_once(".quant_state")?;
    prefix_of_quant_state(key).is_none().then_some(state)
}
