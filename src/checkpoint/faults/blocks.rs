//! Whether weights in NVFP4, MXFP4 and FP8 are whole, and are those that the configuration claims.

use crate::checkpoint::convert::{Claim, is_kept_by_default};
use crate::checkpoint::elements::float_type;
use crate::checkpoint::folder::Checkpoint;
use crate::checkpoint::names::module_of_weight;
use crate::checkpoint::quant_claim::{GroupWeights, Modules, QuantClaim, QuantMethod};
use crate::checkpoint::stored::TensorSource;
use crate::checkpoint::weight::locate_weight;
use crate::error::Nf4Error;
use crate::format::QuantType;

/// What the tensors tell of weights in these formats.
#[derive(Debug, Default)]
pub(super) struct BlockWeights<'a> {
    /// The weights that are as they should be, and their types.
    whole: Vec<(&'a str, QuantType)>,
    /// What is wrong with the others.
    pub faults: Vec<Nf4Error>,
}

impl<'a> BlockWeights<'a> {
    pub fn of(checkpoint: &'a Checkpoint, weights: &[&'a str]) -> Self {
        let mut found = Self::default();
        for &weight in weights {
            match locate_weight(checkpoint, weight) {
                Ok(stored) => found.whole.push((weight, stored.config.quant_type)),
                Err(error) => found.faults.push(error),
            }
        }
        found
    }

    /// Where claims and tensors disagree. `has_config` says whether anything could have been claimed.
    pub fn contradictions(
        &self,
        checkpoint: &Checkpoint,
        claims: &[QuantClaim],
        has_config: bool,
    ) -> Vec<Nf4Error> {
        let mut faults: Vec<Nf4Error> = claims.iter().flat_map(QuantClaim::check).collect();
        let Some((first, quant_type)) = self.whole.first() else {
            let is_all = faults.is_empty() && self.faults.is_empty();
            let nothing = |claim: &QuantClaim| {
                claim.fault("a weight in such a format", "no weight is quantized".into())
            };
            faults.extend(claims.iter().filter(|_| is_all).map(nothing));
            return faults;
        };
        if claims.is_empty() {
            if has_config {
                faults.push(Nf4Error::Config {
                    field: Claim::FIELD,
                    expected: "the format of its weights",
                    given: format!(
                        "not there, but `{first}` is quantized as {}",
                        quant_type.name()
                    ),
                });
            }
            return faults;
        }
        let modules: Result<Vec<Modules<'_>>, Nf4Error> =
            claims.iter().map(QuantClaim::modules).collect();
        match modules.and_then(|modules| self.compare(checkpoint, claims, &modules)) {
            Ok(others) => faults.extend(others),
            Err(error) => faults.push(error),
        }
        faults
    }

    fn compare(
        &self,
        checkpoint: &Checkpoint,
        claims: &[QuantClaim],
        modules: &[Modules<'_>],
    ) -> Result<Vec<Nf4Error>, Nf4Error> {
        let mut faults = Vec::new();
        for &(weight, quant_type) in &self.whole {
            let mut reasons = Vec::new();
            for (claim, modules) in claims.iter().zip(modules) {
                reasons.push(contradiction(claim, modules, weight, quant_type)?);
            }
            // What one claim says is enough.
            if reasons.iter().all(Option::is_some) {
                faults.extend(reasons.into_iter().flatten().next());
            }
        }
        for key in checkpoint.parameters() {
            let Some(module) = key.strip_suffix(".weight") else {
                continue;
            };
            let Some(stored) = checkpoint.find(key).map(|stored| stored.info) else {
                continue;
            };
            let is_matrix = stored.shape.len() == 2 && float_type(stored.dtype).is_some();
            if !is_matrix || checkpoint.is_quantized(key) {
                continue;
            }
            for (claim, modules) in claims.iter().zip(modules) {
                if must_be_quantized(claim, modules, module)? {
                    faults.push(claim.fault(
                        "modules that are targeted to be quantized, or ignored",
                        format!("`{module}` is targeted, but its weight is {}", stored.dtype),
                    ));
                }
            }
        }
        Ok(faults)
    }
}

/// What a claim has against a weight of a type.
fn contradiction(
    claim: &QuantClaim,
    modules: &Modules<'_>,
    weight: &str,
    quant_type: QuantType,
) -> Result<Option<Nf4Error>, Nf4Error> {
    let module = module_of_weight(weight);
    let name = quant_type.name();
    let expected = "modules that are quantized as they are targeted, and none that is ignored";
    if modules.ignores(module)? {
        let given = format!("`{module}` is to be ignored, but its weight is quantized as {name}");
        return Ok(Some(claim.fault(expected, given)));
    }
    let types = match claim.method {
        // They say nothing of modules, but for those to be ignored.
        QuantMethod::Fp8 | QuantMethod::Mxfp4 => claim
            .groups
            .iter()
            .filter_map(|group| match group.weights {
                GroupWeights::Quantized(quant_type) => Some(quant_type),
                _ => None,
            })
            .collect(),
        QuantMethod::CompressedTensors | QuantMethod::ModelOpt => {
            let targeted = modules.targeted(module)?;
            if targeted.is_unknown {
                return Ok(None);
            }
            targeted.types
        }
    };
    let Some(first) = types.first() else {
        let has_other = claim
            .groups
            .iter()
            .any(|group| matches!(group.weights, GroupWeights::Other(_)));
        let given = format!("`{module}` is not targeted, but its weight is quantized as {name}");
        // A group that cannot be read is a fault already.
        return Ok((!has_other).then(|| claim.fault(expected, given)));
    };
    let strict = claim.method == QuantMethod::CompressedTensors;
    let is_fp8 = |kind: QuantType| matches!(kind, QuantType::Fp8Block | QuantType::Fp8Channel);
    let same =
        |kind: &QuantType| *kind == quant_type || (!strict && is_fp8(*kind) && is_fp8(quant_type));
    if types.iter().any(same) {
        return Ok(None);
    }
    let first = first.name();
    let given = format!("`{module}` is to be quantized as {first}, but its weight is {name}");
    Ok(Some(claim.fault(expected, given)))
}

/// Whether a claim leaves no room for a module whose weight is a matrix of floats.
fn must_be_quantized(
    claim: &QuantClaim,
    modules: &Modules<'_>,
    module: &str,
) -> Result<bool, Nf4Error> {
    // The others leave it to the model which layers are quantized.
    let lists_all = matches!(
        claim.method,
        QuantMethod::CompressedTensors | QuantMethod::ModelOpt
    );
    if !lists_all {
        return Ok(false);
    }
    let targeted = modules.targeted(module)?;
    // The class of a head, a router or an embedding is not always that of a linear layer.
    let is_targeted =
        targeted.by_name || !(targeted.types.is_empty() || is_kept_by_default(module));
    Ok(is_targeted && !modules.may_ignore(module)?)
}
