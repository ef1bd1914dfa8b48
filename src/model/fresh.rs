//! Fresh branches on a model, to be trained.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::Device;

use super::check::{check_model, refuse_branches, untied};
use super::layers::{LinearLayers, named};
use super::names::{Change, ModelNames, OtherFloat, change_floats, of_linear, other_floats};
use crate::checkpoint::convert::is_embedding;
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::nn::AnyLinear;
use crate::peft::{Adapter, LoraBias, LoraConfig, TargetModules};

pub(super) fn fresh<M: LinearLayers>(
    model: M,
    lora: &LoraConfig,
    device: &Device,
) -> Result<M, Nf4Error> {
    check_model(&model)?;
    refuse_branches(&model, "to put fresh ones on: take those off first")?;
    let adapter = Adapter::new(lora.clone())?;
    let Some(init) = lora.init_lora_weights.of_fresh() else {
        return Err(Nf4Error::Config {
            field: "init_lora_weights",
            expected: "true, false or \"gaussian\" for a fresh adapter",
            given: format!("{:?}", lora.init_lora_weights),
        });
    };
    let mut model = model;
    if let Some(tied) = model.tied_head() {
        let weights = [&tied.head, &tied.embedding].map(|module| of_linear(module, "weight"));
        let is_copied = weights.iter().any(|weight| adapter.is_saved(weight));
        if is_copied || adapter.matcher().is_target(&tied.head)? {
            model = untied(model)?;
        }
    }
    let others = other_floats(&model);
    check_trainable(&model, &others, &adapter)?;

    let mut adapted = 0;
    let model = model.no_grad().try_map_linears(|name, layer| {
        let is_target = adapter.matcher().is_target(name)?;
        let layer = match is_target {
            false => with_saved_weight(layer, name, &adapter)?,
            true => {
                adapted += 1;
                let lora = adapter.layer_config(name)?.with_init(init);
                let layer = layer.with_lora(&lora, device);
                layer.map_err(|error| named(error, name))?
            }
        };
        let layer = match trains_bias(name, is_target, &adapter) {
            false => layer,
            true => with_trained_bias(layer)?,
        };
        Ok(layer.with_stable_ids(name))
    })?;
    if adapted == 0 {
        return Err(Nf4Error::Config {
            field: "target_modules",
            expected: "names of linear layers of the model",
            given: format!(
                "{:?}, which select none{}",
                lora.target_modules,
                narrowed(&model, lora)?
            ),
        });
    }
    let trained: Vec<OtherFloat> = others
        .into_iter()
        .filter(|other| is_trained_whole(&other.name, &adapter))
        .collect();
    for other in &trained {
        // An adapter has no other, and what Burn has quantized cannot be trained.
        FloatType::from_dtype(other.dtype, &other.name)?;
    }
    let trained = trained.into_iter();
    let changes: BTreeMap<String, Change> = trained
        .map(|other| {
            let change = Change {
                value: None,
                is_trained: true,
            };
            (other.name, change)
        })
        .collect();
    Ok(change_floats(model, changes))
}

/// The settings without which others would select a layer, for the error that none is selected.
///
/// # Errors
/// [`Nf4Error::Pattern`].
fn narrowed<M: LinearLayers>(model: &M, lora: &LoraConfig) -> Result<String, Nf4Error> {
    let linears = model.linears();
    let selects = |lora: &LoraConfig| -> Result<bool, Nf4Error> {
        let matcher = lora.matcher()?;
        for (name, _) in &linears {
            if matcher.is_target(name)? {
                return Ok(true);
            }
        }
        Ok(false)
    };
    type Narrowing = (&'static str, bool, fn(&mut LoraConfig));
    let all: [Narrowing; 3] = [
        ("exclude_modules", lora.exclude_modules.is_some(), |lora| {
            lora.exclude_modules = None;
        }),
        (
            "layers_to_transform",
            lora.layers_to_transform.is_some(),
            |lora| {
                lora.layers_to_transform = None;
                lora.layers_pattern = None;
            },
        ),
        ("modules_to_save", lora.modules_to_save.is_some(), |lora| {
            lora.modules_to_save = None;
        }),
    ];
    let given: Vec<Narrowing> = all.into_iter().filter(|(_, given, _)| *given).collect();
    let mut wide = lora.clone();
    for (_, _, widen) in &given {
        widen(&mut wide);
    }
    if given.is_empty() || !selects(&wide)? {
        return Ok(String::new());
    }
    let mut causes = Vec::new();
    for (name, _, widen) in &given {
        let mut wide = lora.clone();
        widen(&mut wide);
        if selects(&wide)? {
            causes.push(format!("`{name}`"));
        }
    }
    if causes.is_empty() {
        // Each alone would be enough.
        causes.extend(given.iter().map(|(name, ..)| format!("`{name}`")));
    }
    Ok(format!(" beside {}", causes.join(" and ")))
}

/// Whether a parameter outside of the adapted layers is trained as a whole.
pub(super) fn is_trained_whole(name: &str, adapter: &Adapter) -> bool {
    let is_bias = name.ends_with(".bias");
    adapter.is_saved(name) || (is_bias && adapter.config().bias == LoraBias::All)
}

/// Whether the bias of a linear layer is trained.
pub(super) fn trains_bias(module: &str, has_branch: bool, adapter: &Adapter) -> bool {
    let of_branch = has_branch && adapter.config().bias != LoraBias::None;
    of_branch || is_trained_whole(&of_linear(module, "bias"), adapter)
}

/// The layer with the bias that it has, if any, trained.
fn with_trained_bias(layer: AnyLinear) -> Result<AnyLinear, Nf4Error> {
    match layer.bias().map(|bias| bias.val().detach()) {
        None => Ok(layer),
        Some(bias) => layer.with_bias(Param::from_tensor(bias)),
    }
}

/// The layer with its weight trained, if the settings have it saved as a whole.
///
/// # Errors
/// [`Nf4Error::Config`] for a weight in 4 bit.
pub(super) fn with_saved_weight(
    layer: AnyLinear,
    module: &str,
    adapter: &Adapter,
) -> Result<AnyLinear, Nf4Error> {
    let name = of_linear(module, "weight");
    if !adapter.is_saved(&name) {
        return Ok(layer);
    }
    match layer {
        AnyLinear::Dense(mut layer) => {
            let weight = crate::nn::with_stable_id(layer.weight, &name);
            layer.weight = weight.set_require_grad(true);
            Ok(AnyLinear::Dense(layer))
        }
        _ => Err(Nf4Error::Config {
            field: "modules_to_save",
            expected: "modules of floats: a weight in 4 bit cannot be trained, dequantize it first",
            given: format!("`{module}`, which is in 4 bit"),
        }),
    }
}

/// Refuses what PEFT would train and is not trained here, and modules to save that are not there.
fn check_trainable<M: LinearLayers>(
    model: &M,
    others: &[OtherFloat],
    adapter: &Adapter,
) -> Result<(), Nf4Error> {
    let config = adapter.config();
    let takes_names = !matches!(config.target_modules, TargetModules::AllLinear);
    for other in others {
        let Some(module) = other.matrix_module() else {
            continue;
        };
        let is_table = !other.transposed;
        let is_exempt = !takes_names && (is_table || is_embedding(module));
        if !is_exempt && adapter.matcher().is_target(module)? {
            return Err(Nf4Error::Config {
                field: "target_modules",
                expected: match takes_names {
                    true => {
                        "linear layers that the model hands out: a fresh branch on an embedding, or \
                         on a layer that is no `AnyLinear`, is not trained"
                    }
                    false => {
                        "linear layers that the model hands out: a fresh branch on a layer that is no \
                         `AnyLinear` is not trained; name the layers, or list this one in \
                         `exclude_modules`"
                    }
                },
                given: format!("`{module}` among them"),
            });
        }
    }
    let names = ModelNames::of(model, others);
    for saved in config.modules_to_save.iter().flatten() {
        let mut alone = config.clone();
        alone.modules_to_save = Some(vec![saved.clone()]);
        let alone = Adapter::new(alone)?;
        if !names.parameters.iter().any(|name| alone.is_saved(name)) {
            return Err(Nf4Error::Config {
                field: "modules_to_save",
                expected: "modules of the model",
                given: format!("`{saved}`, which it does not have"),
            });
        }
    }
    Ok(())
}
