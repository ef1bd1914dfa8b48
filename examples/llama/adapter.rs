//! Putting a PEFT adapter on the model, and taking it off again.

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_nf4::Nf4Error;
use burn_nf4::format::FloatType;
use burn_nf4::nn::QLoraLinear;
use burn_nf4::peft::{Adapter, DenseTensor, LoraConfig, LoraModule};

use crate::error::ModelError;
use crate::model::Llama;
use crate::projection::{DenseLora, Projection};

/// Puts a fresh branch on every layer that the settings select.
pub fn fresh(model: Llama, lora: LoraConfig, device: &Device) -> Result<Llama, ModelError> {
    let adapter = Adapter::new(lora)?;
    check_supported(&adapter)?;
    let mut adapted = 0;
    let model = model.map_projections(|path, layer| {
        if !adapter.matcher().is_target(path)? {
            return Ok(layer);
        }
        check_layer(&adapter, path, &layer)?;
        adapted += 1;
        let layer = layer.with_lora(&adapter.layer_config(path)?, device)?;
        Ok(with_stable_ids(layer, path))
    })?;
    if adapted == 0 {
        return Err(ModelError::Argument(
            "the target modules select no layer of the model".into(),
        ));
    }
    Ok(model)
}

/// Puts the branches of an adapter on the model. Each must find its layer.
pub fn apply(model: Llama, adapter: &Adapter, device: &Device) -> Result<Llama, ModelError> {
    check_supported(adapter)?;
    let mut left: Vec<&str> = adapter.modules().map(|(path, _)| path).collect();
    let model = model.map_projections(|path, layer| {
        let Some(module) = adapter.module(path) else {
            return Ok(layer);
        };
        left.retain(|left| *left != path);
        check_layer(adapter, path, &layer)?;
        let layer = match layer {
            Projection::Nf4(base) => Projection::QLora(adapter.layer(path, base, device)?),
            Projection::QLora(QLoraLinear { base, .. }) => {
                Projection::QLora(adapter.layer(path, base, device)?)
            }
            dense => with_matrices(
                dense.with_lora(&adapter.layer_config(path)?, device)?,
                path,
                module,
                device,
            )?,
        };
        Ok(with_stable_ids(layer, path))
    })?;
    if left.is_empty() {
        return Ok(model);
    }
    Err(ModelError::Argument(format!(
        "the adapter is for layers that the model does not have: {}",
        left.join(", ")
    )))
}

/// Takes the branches of the model into an adapter.
pub fn extract(model: &Llama, lora: LoraConfig) -> Result<Adapter, ModelError> {
    let mut adapter = Adapter::new(lora)?;
    for (path, layer) in model.projections() {
        match layer {
            Projection::QLora(layer) => adapter.insert_layer(&path, layer)?,
            Projection::DenseLora(layer) => {
                let tensors = LoraModule {
                    lora_a: to_host(layer.lora_a.val().transpose())?,
                    lora_b: to_host(layer.lora_b.val().transpose())?,
                    magnitude: None,
                    bias: None,
                };
                adapter.insert(&path, tensors)?;
            }
            Projection::Nf4(_) | Projection::Dense(_) => {}
        }
    }
    Ok(adapter)
}

/// The library reads more than this model trains or applies.
fn check_supported(adapter: &Adapter) -> Result<(), ModelError> {
    if adapter.full_tensors().next().is_none() {
        return Ok(());
    }
    Err(ModelError::Argument(
        "the adapter has modules_to_save or trained biases, which this example does not apply"
            .into(),
    ))
}

/// DoRA is there for packed layers only.
fn check_layer(adapter: &Adapter, path: &str, layer: &Projection) -> Result<(), ModelError> {
    let dense = matches!(layer, Projection::Dense(_) | Projection::DenseLora(_));
    if dense && adapter.config().use_dora {
        return Err(ModelError::Argument(format!(
            "the adapter has use_dora, and `{path}` is not quantized"
        )));
    }
    Ok(())
}

/// The branch of a float layer with the matrices of an adapter.
fn with_matrices(
    layer: Projection,
    path: &str,
    module: &LoraModule,
    device: &Device,
) -> Result<Projection, ModelError> {
    let Projection::DenseLora(layer) = layer else {
        return Ok(layer);
    };
    let [d_input, d_output] = layer.base.weight.dims();
    if module.dims() != [d_output, d_input] {
        return Err(ModelError::Nf4(Nf4Error::Shape {
            tensor: path.into(),
            expected: vec![d_output, d_input],
            given: module.dims().to_vec(),
        }));
    }
    let matrix = |tensor: &DenseTensor| {
        let [rows, columns] = [tensor.shape()[0], tensor.shape()[1]];
        let data = TensorData::new(tensor.to_f32(), [rows, columns]);
        let matrix = Tensor::<2>::from_data(data, (device, DType::F32)).transpose();
        Param::from_tensor(matrix)
    };
    Ok(Projection::DenseLora(DenseLora {
        lora_a: matrix(&module.lora_a),
        lora_b: matrix(&module.lora_b),
        ..layer
    }))
}

/// Names the trained matrices after their layer, so that the state of the optimizer, which knows
/// them by their id, finds them again in another run.
fn with_stable_ids(layer: Projection, path: &str) -> Projection {
    match layer {
        Projection::QLora(layer) => Projection::QLora(QLoraLinear {
            lora_a: named(layer.lora_a, path, "lora_A"),
            lora_b: named(layer.lora_b, path, "lora_B"),
            lora_magnitude: layer
                .lora_magnitude
                .map(|magnitude| named(magnitude, path, "lora_magnitude_vector")),
            ..layer
        }),
        Projection::DenseLora(layer) => Projection::DenseLora(DenseLora {
            lora_a: named(layer.lora_a, path, "lora_A"),
            lora_b: named(layer.lora_b, path, "lora_B"),
            ..layer
        }),
        frozen => frozen,
    }
}

fn named<const D: usize>(param: Param<Tensor<D>>, path: &str, name: &str) -> Param<Tensor<D>> {
    let id = ParamId::from(stable_hash(&format!("{path}.{name}")));
    let (_, value, mapper) = param.consume();
    Param::from_mapped_value(id, value, mapper)
}

/// FNV-1a, the same in every build, unlike the standard library's hasher.
pub fn stable_hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn to_host(tensor: Tensor<2>) -> Result<DenseTensor, ModelError> {
    let shape = tensor.dims();
    let values: Vec<f32> = tensor.into_data().iter::<f32>().collect();
    Ok(DenseTensor::from_f32(&values, &shape, FloatType::F32)?)
}
