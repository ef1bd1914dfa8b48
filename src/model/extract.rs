//! What was trained on a model, into an adapter.

use super::fresh::is_trained_whole;
use super::layers::{LinearLayers, named};
use super::names::{of_linear, other_floats};
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::nn::AnyLinear;
use crate::peft::{Adapter, DenseTensor};

pub(super) fn extract_into<M: LinearLayers>(
    model: &M,
    adapter: Adapter,
) -> Result<Adapter, Nf4Error> {
    let mut adapter = adapter;
    for (name, layer) in model.linears() {
        match layer {
            AnyLinear::QLora(layer) => adapter.insert_layer(&name, layer),
            AnyLinear::Lora(layer) => adapter.insert_dense_layer(&name, layer),
            AnyLinear::Dense(_) | AnyLinear::Nf4(_) => Ok(()),
        }
        .map_err(|error| named(error, &name))?;
        let weight = of_linear(&name, "weight");
        if let AnyLinear::Dense(dense) = layer
            && is_trained_whole(&weight, &adapter)
        {
            let value = DenseTensor::from_tensor(dense.weight.val().detach().transpose());
            let value = value.map_err(|error| named(error, &name))?;
            insert_whole(&mut adapter, &weight, value)?;
        }
        let bias = of_linear(&name, "bias");
        // That of an adapted layer went with its branch.
        if let Some(param) = layer.bias().filter(|_| !layer.has_branch())
            && is_trained_whole(&bias, &adapter)
        {
            let value = DenseTensor::from_tensor(param.val().detach());
            let value = value.map_err(|error| named(error, &name))?;
            insert_whole(&mut adapter, &bias, value)?;
        }
    }
    for other in other_floats(model) {
        // A table with a branch in it is not the one that the adapter holds.
        let has_branch = other
            .matrix_module()
            .is_some_and(|module| adapter.embedding(module).is_some());
        if !has_branch && is_trained_whole(&other.name, &adapter) {
            insert_whole(&mut adapter, &other.name, other.to_dense()?)?;
        }
    }
    Ok(adapter)
}

/// Puts a parameter into the adapter, unless it is what this has already, rounded to the dtype of the
/// model.
fn insert_whole(adapter: &mut Adapter, name: &str, value: DenseTensor) -> Result<(), Nf4Error> {
    if let Some(held) = adapter.full_tensor(name)
        && held.shape() == value.shape()
    {
        let dtype: FloatType = value.float_type();
        let rounded = DenseTensor::from_f32(&held.to_f32(), held.shape(), dtype)?;
        if rounded == value {
            return Ok(());
        }
    }
    adapter.insert_full(name, value)
}
