//! A PEFT adapter on a model.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use half::{bf16, f16};

use super::check::{check_model, refuse_branches, untied};
use super::fresh::{is_trained_whole, trains_bias, with_saved_weight};
use super::layers::{LinearLayers, TiedHead, named};
use super::names::{
    Change, ModelNames, OtherFloat, change_floats, model_dtype, of_linear, other_floats,
};
use crate::checkpoint::names::module_of_weight;
use crate::error::Nf4Error;
use crate::format::{FloatType, check_finite, check_shape};
use crate::nn::AnyLinear;
use crate::peft::{Adapter, DenseTensor, LoraModule, is_saved_unasked};

/// Checks that the adapter has all that its settings ask for of the model.
///
/// # Errors
/// [`Nf4Error::AdapterLacks`].
pub(super) fn check_complete<M: LinearLayers>(
    model: &M,
    adapter: &Adapter,
) -> Result<(), Nf4Error> {
    let names = ModelNames::of(model, &other_floats(model));
    adapter.check_complete(
        names.modules.iter().map(String::as_str),
        names.parameters.iter().map(String::as_str),
    )
}

pub(super) fn apply<M: LinearLayers>(
    model: M,
    adapter: &Adapter,
    device: &Device,
    is_partial: bool,
) -> Result<M, Nf4Error> {
    check_model(&model)?;
    refuse_branches(
        &model,
        "to apply an adapter to: take the branches off, or let a `PeftModel` swap adapters",
    )?;
    if !is_partial {
        check_complete(&model, adapter)?;
    }
    let mut model = replace_parameters(model.no_grad(), adapter, device)?;
    model = adapt_embeddings(model, adapter, device)?;
    if let Some(tied) = model.tied_head()
        && adapter.module(&tied.head).is_some()
    {
        model = untied(model)?.no_grad();
    }
    let mut left: BTreeSet<&str> = adapter.modules().map(|(path, _)| path).collect();
    let model = model.try_map_linears(|name, layer| {
        left.remove(name);
        adapt(layer, name, adapter, device)
    })?;
    lacks(left.into_iter().map(|path| of_linear(path, "weight")))?;
    Ok(model)
}

/// An error if there is anything that the model lacks.
fn lacks(parameters: impl Iterator<Item = String>) -> Result<(), Nf4Error> {
    let missing: Vec<String> = parameters.collect();
    match missing.is_empty() {
        true => Ok(()),
        false => Err(Nf4Error::BaseLacks { missing }),
    }
}

/// A linear layer with what the adapter has for it beside whole parameters.
fn adapt(
    layer: AnyLinear,
    name: &str,
    adapter: &Adapter,
    device: &Device,
) -> Result<AnyLinear, Nf4Error> {
    let module = adapter.module(name);
    let layer = match module {
        None if layer.is_quantized() => layer,
        None => with_saved_weight(layer, name, adapter)?,
        Some(module) => {
            check_vocabulary(name, layer.dims()[0], module.dims()[0])?;
            if module.bias.is_some() && layer.bias().is_none() {
                lacks(std::iter::once(of_linear(name, "bias")))?;
            }
            let adapted = match layer {
                AnyLinear::Nf4(base) => adapter.layer(name, base, device).map(AnyLinear::QLora),
                base => with_matrices(base, name, module, adapter, device),
            };
            adapted.map_err(|error| named(error, name))?
        }
    };
    let layer = match layer.bias().cloned() {
        Some(bias) if trains_bias(name, module.is_some(), adapter) => {
            let bias = match module.and_then(|module| module.bias.as_ref()) {
                // In f32, as the branch is.
                Some(trained) => trained.to_tensor(device)?,
                None => bias.val().detach(),
            };
            layer.with_bias(Param::from_tensor(bias))?
        }
        _ => layer,
    };
    Ok(layer.with_stable_ids(name))
}

/// The branch of a float layer with the tensors of an adapter, in f32 whatever they are stored in.
fn with_matrices(
    layer: AnyLinear,
    name: &str,
    module: &LoraModule,
    adapter: &Adapter,
    device: &Device,
) -> Result<AnyLinear, Nf4Error> {
    let dims = layer.dims();
    let AnyLinear::Dense(base) = layer else {
        return Ok(layer);
    };
    check_shape(name, &dims, &module.dims())?;
    // The magnitudes are given, and need not be computed.
    let lora = adapter.layer_config(name)?.with_use_dora(false);
    let lora_a = module.lora_a.transposed()?.to_tensor(device)?;
    let lora_b = module.lora_b.transposed()?.to_tensor(device)?;
    let mut layer = lora.init_dense_with(base.to_device(device), lora_a, lora_b)?;
    if let Some(magnitude) = &module.magnitude {
        layer = layer.with_magnitude(magnitude.to_tensor(device)?)?;
    }
    Ok(layer.into())
}

/// Puts the parameters that the adapter holds as a whole in the place of the model's.
fn replace_parameters<M: LinearLayers>(
    model: M,
    adapter: &Adapter,
    device: &Device,
) -> Result<M, Nf4Error> {
    let mut model = model;
    let mut given: BTreeMap<&str, &DenseTensor> = adapter.full_tensors().collect();
    if let Some(tied) = model.tied_head() {
        model = replace_tied(model, &tied, adapter, &mut given)?;
    }
    let others = other_floats(&model);
    let dtype = model_dtype(&model, &others);
    let mut changes = BTreeMap::new();
    for other in &others {
        let Some(tensor) = given.remove(other.name.as_str()) else {
            continue;
        };
        let name = &other.name;
        check_rows(name, &other.shape, tensor)?;
        FloatType::from_dtype(other.dtype, name)?;
        let shape = &other.shape;
        let value = on_device(tensor, shape, name, (&other.device, other.dtype))?;
        let change = Change {
            value: Some(other.in_burn_order(value)),
            is_trained: is_trained_whole(name, adapter),
        };
        changes.insert(name.clone(), change);
    }
    model = change_floats(model, changes);
    model = model.try_map_linears(|name, layer| {
        let (weight, bias) = (of_linear(name, "weight"), of_linear(name, "bias"));
        let mut layer = layer;
        if let Some(tensor) = given.remove(weight.as_str()) {
            layer = with_weight(layer, tensor, &weight, (device, dtype))?;
        }
        if let Some(place) = layer.bias().map(Param::val)
            && let Some(tensor) = given.remove(bias.as_str())
        {
            let given = on_device(tensor, &place.dims(), &bias, (device, place.dtype()))?;
            layer = layer.with_bias(Param::from_tensor(given).set_require_grad(false))?;
        }
        Ok(layer)
    })?;
    lacks(given.into_keys().map(String::from))?;
    Ok(model)
}

/// What becomes of a head and a table that are one. A copy of either is its own; what is no copy goes
/// into the one tensor that both share.
fn replace_tied<M: LinearLayers>(
    model: M,
    tied: &TiedHead,
    adapter: &Adapter,
    given: &mut BTreeMap<&str, &DenseTensor>,
) -> Result<M, Nf4Error> {
    let of_head = of_linear(&tied.head, "weight");
    let of_table = of_linear(&tied.embedding, "weight");
    let is_given = |name: &str| adapter.full_tensor(name).is_some();
    let (saves_head, saves_table) = (adapter.is_saved(&of_head), adapter.is_saved(&of_table));
    let copies_head = is_given(&of_head) && (saves_head || saves_table);
    if copies_head || (is_given(&of_table) && saves_table) {
        return Ok(untied(model)?.no_grad());
    }
    let Some(tensor) = given.remove(of_head.as_str()) else {
        return Ok(model);
    };
    match adapter.full_tensors().find(|(name, _)| *name == of_table) {
        Some((_, other)) if other != tensor => Err(Nf4Error::Config {
            field: "tie_word_embeddings",
            expected: "false for an adapter with two different weights",
            given: format!("true, and the adapter has `{of_head}` and `{of_table}`"),
        }),
        Some(_) => Ok(model),
        None => {
            // The table takes it, under the name that the model has it by.
            let place = other_floats(&model)
                .into_iter()
                .find(|other| other.name == of_table);
            let Some(place) = place else {
                return Err(Nf4Error::BaseLacks {
                    missing: vec![of_table],
                });
            };
            check_rows(&of_head, &place.shape, tensor)?;
            let at = (&place.device, place.dtype);
            let value = on_device(tensor, &place.shape, &of_head, at)?;
            let change = Change {
                value: Some(place.in_burn_order(value)),
                is_trained: false,
            };
            Ok(change_floats(model, BTreeMap::from([(of_table, change)])))
        }
    }
}

/// The layer with another weight, of floats whatever was there.
fn with_weight(
    layer: AnyLinear,
    tensor: &DenseTensor,
    key: &str,
    (device, dtype): (&Device, Option<DType>),
) -> Result<AnyLinear, Nf4Error> {
    let dims = layer.dims();
    let dtype = match &layer {
        AnyLinear::Dense(layer) => layer.weight.dtype(),
        packed => dtype.unwrap_or(packed.dtype()?.into()),
    };
    check_rows(key, &dims, tensor)?;
    let weight = on_device(tensor, &dims, key, (device, dtype))?;
    let dense = AnyLinear::from_weight(weight.reshape(dims), None);
    match layer.bias() {
        None => Ok(dense),
        Some(bias) => dense.with_bias(bias.clone()),
    }
}

/// Adds the branches on embeddings to their tables. A head that was the embedding stays what it was.
fn adapt_embeddings<M: LinearLayers>(
    model: M,
    adapter: &Adapter,
    device: &Device,
) -> Result<M, Nf4Error> {
    let mut model = model;
    for (path, module) in adapter.embeddings() {
        if model
            .tied_head()
            .is_some_and(|tied| [&tied.embedding, &tied.head].contains(&&path.to_string()))
        {
            model = untied(model)?.no_grad();
        }
        let others = other_floats(&model);
        let place = others
            .iter()
            .find(|other| other.matrix_module() == Some(path) && !other.transposed);
        let Some(place) = place else {
            return Err(Nf4Error::BaseLacks {
                missing: vec![of_linear(path, "weight")],
            });
        };
        let merged = merged_table(place, path, module, adapter, device)?;
        let elems = merged.shape().num_elements();
        let change = Change {
            value: Some(place.in_burn_order(merged.reshape([elems]))),
            is_trained: is_trained_whole(&place.name, adapter),
        };
        model = change_floats(model, BTreeMap::from([(place.name.clone(), change)]));
    }
    Ok(model)
}

/// A table with the branch on its embedding, in its dtype.
fn merged_table(
    place: &OtherFloat,
    path: &str,
    module: &LoraModule,
    adapter: &Adapter,
    device: &Device,
) -> Result<Tensor<2>, Nf4Error> {
    let table = place.matrix()?;
    let [rows, size] = table.dims();
    let [d_output, d_input] = module.dims();
    check_vocabulary(path, rows, d_input)?;
    check_shape(path, &[size, rows], &[d_output, d_input])?;
    let a: Tensor<2> = module.lora_a.to_tensor(device)?;
    let b: Tensor<2> = module.lora_b.to_tensor(device)?;
    let branch = a.transpose().matmul(b.transpose());
    let dtype = table.dtype();
    let mut merged = table.to_device(device).cast(DType::F32) + branch * adapter.scale(path)?;
    if let Some(magnitude) = &module.magnitude {
        let norms = merged.clone().square().sum_dim(0).sqrt();
        let magnitude = magnitude.to_tensor::<1>(device)?.unsqueeze::<2>();
        merged = merged * (magnitude / norms.clamp_min(f32::MIN_POSITIVE));
    }
    let merged = merged.cast(dtype);
    let name = format!(
        "{} with the branch of the adapter, in {dtype:?}",
        place.name
    );
    check_finite(&name, merged.to_data().iter::<f32>())?;
    Ok(merged.to_device(&place.device))
}

/// Whether the rows of an embedding or a head are as many as those of the adapter.
fn check_vocabulary(module: &str, expected: usize, given: usize) -> Result<(), Nf4Error> {
    if expected == given || !is_saved_unasked(module) {
        return Ok(());
    }
    Err(Nf4Error::ResizedEmbeddings {
        tensor: module.into(),
        expected,
        given,
    })
}

/// [`check_vocabulary`] of a whole tensor.
fn check_rows(name: &str, expected: &[usize], tensor: &DenseTensor) -> Result<(), Nf4Error> {
    let rows = |shape: &[usize]| shape.first().copied().unwrap_or(0);
    let module = module_of_weight(name);
    check_vocabulary(module, rows(expected), rows(tensor.shape())).map_err(|error| match error {
        Nf4Error::ResizedEmbeddings {
            expected, given, ..
        } => Nf4Error::ResizedEmbeddings {
            tensor: name.into(),
            expected,
            given,
        },
        other => other,
    })
}

/// The elements of a tensor of the adapter on the device, in the dtype of what they replace.
fn on_device(
    tensor: &DenseTensor,
    shape: &[usize],
    name: &str,
    (device, dtype): (&Device, DType),
) -> Result<Tensor<1>, Nf4Error> {
    tensor.check_shape(shape, name)?;
    let values = tensor.to_f32();
    let overflows = |value: &f32| match dtype {
        DType::F16 => !f16::from_f32(*value).is_finite(),
        DType::BF16 => !bf16::from_f32(*value).is_finite(),
        _ => false,
    };
    if let Some(index) = values.iter().position(overflows) {
        return Err(Nf4Error::NonFinite {
            tensor: format!("{name} in {dtype:?}"),
            index,
            given: f32::INFINITY.copysign(values[index]),
        });
    }
    let elems = values.len();
    let data = TensorData::new(values, [elems]);
    Ok(Tensor::from_data(data, (device, dtype)))
}
