//! Whether what a checkpoint holds and what its `config.json` says of it fit each other.

use std::collections::BTreeSet;

use safetensors::Dtype;

use super::convert::{Claim, ModelConfig};
use super::folder::Checkpoint;
use super::names::last_part;
use super::quant_state::QuantState;
use super::stored::TensorSource;
use super::weight::{PARTS, QUANT_TYPES, find_quant_state, prefix_of_quant_state, quant_state_key};
use crate::error::Nf4Error;

impl Checkpoint {
    /// What keeps this from being a checkpoint of float weights, some of them quantized to 4 bit
    /// by bitsandbytes; empty if nothing does. Names, headers and `config.json` are read, no weights.
    ///
    /// - [`Nf4Error::OtherQuantization`] with the first tensor of each other method, and for
    ///   codes that no name explains
    /// - [`Nf4Error::MissingKey`] for each quantized weight that lacks a part, its `quant_state`
    ///   among them
    /// - [`Nf4Error::QuantType`] for a `quant_state` of another type, and the errors of
    ///   [`QuantState::parse`]
    /// - [`Nf4Error::Config`] for a `quantization_config` that claims another method, or 4 bit
    ///   where no weight is quantized, and for a `config.json` that has none though a weight is
    ///   quantized; a checkpoint without `config.json` claims what it holds
    /// - [`Nf4Error::ModelConfig`], [`Nf4Error::Io`] for a `config.json` that cannot be read
    pub fn faults(&self) -> Vec<Nf4Error> {
        let (claims, unreadable) = match ModelConfig::read(self) {
            Ok(config) => (config.map(|config| config.claims()), None),
            Err(error) => (None, Some(error)),
        };
        let quantized = self.quantized_weights();
        let storage = claims.iter().flatten().find_map(Claim::storage);
        let mut faults = self.foreign_tensors();
        let lost = self.lost_states(&quantized, storage, faults.is_empty());
        faults.extend(self.missing_parts(&quantized));
        let any_lost = !lost.is_empty();
        faults.extend(lost.into_iter().map(|prefix| self.missing_state(&prefix)));
        faults.extend(unreadable);
        if let Some(claims) = claims {
            let first = quantized.first().copied();
            faults.extend(contradictions(&claims, first, any_lost));
        }
        faults
    }

    /// The first tensor of each method that is not bitsandbytes in 4 bit.
    fn foreign_tensors(&self) -> Vec<Nf4Error> {
        let unknown = self.keys().filter_map(|key| {
            let state = unknown_state(key)?;
            Some(Nf4Error::QuantType {
                tensor: key.into(),
                given: state.into(),
            })
        });
        let mut foreign = self.first_of_each(|key| self.method_of_name(key));
        if foreign.is_empty() {
            // A name says more than a dtype, so dtypes count only where no name tells.
            foreign = self.first_of_each(|key| self.method_of_dtype(key));
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
            "weight_packed"
            | "weight_shape"
            | "weight_zero_point"
            | "weight_global_scale"
            | "input_global_scale" => "compressed-tensors",
            "weight_scale" | "weight_scale_inv" | "weight_scale_2" | "weight_scales"
            | "activation_scale" | "input_scale" => "FP8, FP4 or int8 with scales",
            "W_q" => "HQQ",
            "codes" if has("codes", "codebooks") => "AQLM",
            "_data" | "_scale" | "_shift" if key.contains(".weight.") => "quanto",
            _ if has("_blocks", "_scales") => "MXFP4",
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
fn contradictions(claims: &[Claim], quantized: Option<&str>, any_lost: bool) -> Vec<Nf4Error> {
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
            given: format!("not there, but `{weight}` is quantized"),
        }),
        _ => {}
    }
    faults
}

/// The type of a `quant_state` that is not one of bitsandbytes' in 4 bit.
fn unknown_state(key: &str) -> Option<&str> {
    let (_, state) = key.rsplit_once(".quant_state")?;
    prefix_of_quant_state(key).is_none().then_some(state)
}
