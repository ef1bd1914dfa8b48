//! Putting a PEFT adapter on the model, and taking it off again.

use std::collections::BTreeSet;

use burn::module::{Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_nf4::Nf4Error;
use burn_nf4::nn::QLoraLinear;
use burn_nf4::peft::{Adapter, DenseTensor, LoraBias, LoraConfig, LoraModule, TargetModules};
use half::{bf16, f16};

use crate::error::ModelError;
use crate::model::projection::{DenseLora, Projection};
use crate::model::{EMBEDDING, HEAD, LAYER_NORMS, Llama};

/// Puts a fresh branch on every layer that the settings select.
pub fn fresh(mut model: Llama, lora: LoraConfig, device: &Device) -> Result<Llama, ModelError> {
    let adapter = Adapter::new(lora)?;
    check_trainable(&adapter)?;
    if adapter.matcher().is_target(HEAD)? {
        model = with_own_head(model);
    }
    let mut adapted = 0;
    let model = model.map_projections(|path, layer| {
        if !adapter.matcher().is_target(path)? {
            return Ok(layer);
        }
        adapted += 1;
        let layer = layer.with_lora(&adapter.layer_config(path)?, device)?;
        let layer = with_trained_bias(layer, &adapter, None, device)?;
        Ok(with_stable_ids(layer, path))
    })?;
    if adapted == 0 {
        return Err(ModelError::Argument(
            "the target modules select no layer of the model".into(),
        ));
    }
    Ok(model)
}

/// Refuses what PEFT would train and this example does not.
fn check_trainable(adapter: &Adapter) -> Result<(), ModelError> {
    let config = adapter.config();
    let refused = |what: &str| {
        let message = format!("this example does not train {what}");
        Err(ModelError::Argument(message))
    };
    if config.modules_to_save.iter().flatten().next().is_some() {
        return refused("modules_to_save");
    }
    if config.bias == LoraBias::All {
        return refused("the biases of other layers than the adapted ones (bias \"all\")");
    }
    let takes_names = !matches!(config.target_modules, TargetModules::AllLinear);
    if takes_names && adapter.matcher().is_target(EMBEDDING)? {
        return refused("a branch on the embedding, which the target modules select");
    }
    Ok(())
}

/// Puts an adapter on the model. It must have all that its settings ask for of the model.
///
/// Parameters that it holds as a whole take the place of the model's, in the model's dtype, and a
/// branch on the embedding is added to the table. A head that is the embedding becomes one of its own
/// where the adapter changes one of the two.
pub fn apply(model: Llama, adapter: &Adapter, device: &Device) -> Result<Llama, ModelError> {
    check_complete(&model, adapter)?;
    apply_partial(model, adapter, device)
}

/// [`apply`] for an adapter that may lack what its settings ask for: such a layer stays as it is.
pub fn apply_partial(
    model: Llama,
    adapter: &Adapter,
    device: &Device,
) -> Result<Llama, ModelError> {
    let mut model = replace_parameters(model, adapter, device)?;
    model = adapt_embedding(model, adapter, device)?;
    if adapter.module(HEAD).is_some() {
        model = with_own_head(model);
    }
    let mut left: BTreeSet<&str> = adapter.modules().map(|(path, _)| path).collect();
    let model = model.map_projections(|path, layer| {
        let Some(module) = adapter.module(path) else {
            return Ok(layer);
        };
        left.remove(path);
        check_vocabulary(path, layer.dims()[0], module.dims()[0])?;
        if module.bias.is_some() && layer.bias().is_none() {
            lacks(std::iter::once(format!("{path}.bias")))?;
        }
        let layer = match layer.into_base() {
            Projection::Nf4(base) => Projection::QLora(adapter.layer(path, base, device)?),
            base => with_matrices(
                base.with_lora(&adapter.layer_config(path)?.with_use_dora(false), device)?,
                path,
                module,
                device,
            )?,
        };
        let layer = with_trained_bias(layer, adapter, Some(module), device)?;
        Ok(with_stable_ids(layer, path))
    })?;
    lacks(left.into_iter().map(|path| format!("{path}.weight")))?;
    Ok(model)
}

/// Takes the branches of the model into an adapter of these settings.
///
/// What the settings ask for and the model does not keep apart, such as a branch on the embedding,
/// is an error: [`extract_into`] takes the branches into the adapter that has it.
pub fn extract(model: &Llama, lora: LoraConfig) -> Result<Adapter, ModelError> {
    let adapter = extract_into(model, Adapter::new(lora)?)?;
    check_complete(model, &adapter)?;
    Ok(adapter)
}

/// Takes the branches of the model into the adapter that was applied to it. All else that this holds
/// stays, bit for bit.
pub fn extract_into(model: &Llama, mut adapter: Adapter) -> Result<Adapter, ModelError> {
    for (path, layer) in model.projections() {
        match layer {
            Projection::QLora(layer) => adapter.insert_layer(&path, layer)?,
            Projection::DenseLora(layer) => {
                let is_trained = adapter.config().bias != LoraBias::None;
                let bias = layer.base.bias.as_ref().filter(|_| is_trained);
                let magnitude = layer.lora_magnitude.as_ref();
                let tensors = LoraModule {
                    lora_a: DenseTensor::from_tensor(layer.lora_a.val().transpose())?,
                    lora_b: DenseTensor::from_tensor(layer.lora_b.val().transpose())?,
                    magnitude: magnitude
                        .map(|m| DenseTensor::from_tensor(m.val()))
                        .transpose()?,
                    bias: bias
                        .map(|bias| DenseTensor::from_tensor(bias.val()))
                        .transpose()?,
                };
                adapter.insert(&path, tensors)?;
            }
            Projection::Nf4(_) | Projection::Dense(_) => {}
        }
    }
    Ok(adapter)
}

/// Whether the adapter has all that its settings ask for of the model.
fn check_complete(model: &Llama, adapter: &Adapter) -> Result<(), ModelError> {
    let mut modules: Vec<String> = vec![EMBEDDING.into(), HEAD.into()];
    let mut parameters: Vec<String> = vec![
        format!("{EMBEDDING}.weight"),
        format!("{HEAD}.weight"),
        "model.norm.weight".into(),
    ];
    for index in 0..model.layers.len() {
        for norm in LAYER_NORMS {
            parameters.push(format!("model.layers.{index}.{norm}.weight"));
        }
    }
    for (path, layer) in model.projections() {
        parameters.push(format!("{path}.weight"));
        if layer.bias().is_some() {
            parameters.push(format!("{path}.bias"));
        }
        modules.push(path);
    }
    adapter.check_complete(
        modules.iter().map(String::as_str),
        parameters.iter().map(String::as_str),
    )?;
    Ok(())
}

/// An error if there is anything that the model lacks.
fn lacks(parameters: impl Iterator<Item = String>) -> Result<(), ModelError> {
    let missing: Vec<String> = parameters.collect();
    match missing.is_empty() {
        true => Ok(()),
        false => Err(ModelError::Nf4(Nf4Error::BaseLacks { missing })),
    }
}

/// Gives the model a head of its own, which begins as the embedding.
fn with_own_head(mut model: Llama) -> Llama {
    if model.lm_head.is_none() {
        let weight = model.embed_tokens.val().transpose();
        model.lm_head = Some(dense(weight, None));
    }
    model
}

/// A frozen float layer, of `[d_input, d_output]`.
fn dense(weight: Tensor<2>, bias: Option<Param<Tensor<1>>>) -> Projection {
    let weight = frozen(weight);
    Projection::Dense(Linear { weight, bias })
}

fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    Param::from_tensor(tensor.detach()).set_require_grad(false)
}

/// Puts the parameters that the adapter holds as a whole in the place of the model's.
fn replace_parameters(
    mut model: Llama,
    adapter: &Adapter,
    device: &Device,
) -> Result<Llama, ModelError> {
    let mut missing = Vec::new();
    for (key, tensor) in adapter.full_tensors() {
        let found = match key.rsplit_once('.') {
            Some((EMBEDDING, "weight")) => {
                if adapter.is_saved(key) {
                    model = with_own_head(model);
                }
                let table = model.embed_tokens.val();
                model.embed_tokens = frozen(given(tensor, table, key, device)?);
                true
            }
            Some((HEAD, "weight")) if model.lm_head.is_none() => {
                model = replace_tied_head(model, adapter, tensor, device)?;
                true
            }
            Some((path, "weight")) if path.ends_with("norm") => match norm(&mut model, path) {
                None => false,
                Some(weight) => {
                    *weight = frozen(given(tensor, weight.val(), key, device)?);
                    true
                }
            },
            Some((path, name)) => {
                let mut found = false;
                let dtype = model.embed_tokens.dtype();
                model = model.map_projections(|layer_path, layer| {
                    if layer_path != path {
                        return Ok(layer);
                    }
                    let replaced = replace_in(layer, name, tensor, key, (device, dtype))?;
                    found = replaced.1;
                    Ok(replaced.0)
                })?;
                found
            }
            None => false,
        };
        if !found {
            missing.push(key.to_string());
        }
    }
    lacks(missing.into_iter())?;
    Ok(model)
}

/// A weight for the head where that is the embedding. A copy is the head's own; what is no copy goes
/// into the one tensor that both share.
fn replace_tied_head(
    mut model: Llama,
    adapter: &Adapter,
    tensor: &DenseTensor,
    device: &Device,
) -> Result<Llama, ModelError> {
    let (key, of_embedding) = (format!("{HEAD}.weight"), format!("{EMBEDDING}.weight"));
    let table = model.embed_tokens.val();
    let weight = given(tensor, table, &key, device)?;
    if adapter.is_saved(&key) || adapter.is_saved(&of_embedding) {
        model.lm_head = Some(dense(weight.transpose(), None));
        return Ok(model);
    }
    match adapter.full_tensor(&of_embedding) {
        Some(other) if other != tensor => Err(ModelError::Argument(format!(
            "the adapter has different tensors for `{key}` and `{of_embedding}`, which are one in \
             the model (tie_word_embeddings)"
        ))),
        _ => {
            model.embed_tokens = frozen(weight);
            Ok(model)
        }
    }
}

/// The weight of a normalisation by its path.
fn norm<'a>(model: &'a mut Llama, path: &str) -> Option<&'a mut Param<Tensor<1>>> {
    if path == "model.norm" {
        return Some(&mut model.norm.weight);
    }
    let (index, name) = path.strip_prefix("model.layers.")?.split_once('.')?;
    let layer = model.layers.get_mut(index.parse::<usize>().ok()?)?;
    match name {
        "input_layernorm" => Some(&mut layer.input_layernorm.weight),
        "post_attention_layernorm" => Some(&mut layer.post_attention_layernorm.weight),
        _ => None,
    }
}

/// The layer with another weight or bias, and whether it has such a parameter. A weight that comes
/// with an adapter is a float one, whatever was there.
fn replace_in(
    layer: Projection,
    name: &str,
    tensor: &DenseTensor,
    key: &str,
    (device, dtype): (&Device, DType),
) -> Result<(Projection, bool), ModelError> {
    let layer = layer.into_base();
    match (name, layer.bias().cloned()) {
        ("weight", bias) => {
            let [d_output, d_input] = layer.dims();
            check_vocabulary(key, d_output, *tensor.shape().first().unwrap_or(&0))?;
            let weight = on_device::<2>(tensor, [d_output, d_input], key, (device, dtype))?;
            Ok((dense(weight.transpose(), bias), true))
        }
        ("bias", Some(bias)) => {
            let bias = given(tensor, bias.val(), key, device)?;
            Ok((layer.with_bias(frozen(bias)), true))
        }
        _ => Ok((layer, false)),
    }
}

/// Adds the branch on the embedding to the table. A head that was the embedding stays what it was.
fn adapt_embedding(
    mut model: Llama,
    adapter: &Adapter,
    device: &Device,
) -> Result<Llama, ModelError> {
    for (path, module) in adapter.embeddings() {
        let table = model.embed_tokens.val();
        let [rows, size] = table.dims();
        if path != EMBEDDING {
            lacks(std::iter::once(format!("{path}.weight")))?;
        }
        let [d_output, d_input] = module.dims();
        check_vocabulary(path, rows, d_input)?;
        if d_output != size {
            return Err(ModelError::Nf4(Nf4Error::Shape {
                tensor: path.into(),
                expected: vec![size, rows],
                given: vec![d_output, d_input],
            }));
        }
        model = with_own_head(model);
        let a = transposed(&module.lora_a, device)?;
        let branch = a.matmul(transposed(&module.lora_b, device)?);
        let dtype = table.dtype();
        let mut merged = table.cast(DType::F32) + branch * adapter.scale(path)?;
        if let Some(magnitude) = &module.magnitude {
            let norms = merged.clone().square().sum_dim(0).sqrt();
            let magnitude = magnitude.to_tensor::<1>(device)?.unsqueeze::<2>();
            merged = merged * (magnitude / norms.clamp_min(f32::MIN_POSITIVE));
        }
        let merged = merged.cast(dtype);
        let largest = merged.clone().abs().max().into_scalar::<f32>();
        if !largest.is_finite() {
            return Err(ModelError::Argument(format!(
                "`{path}` with the branch of the adapter is too large for {dtype:?}"
            )));
        }
        model.embed_tokens = frozen(merged);
    }
    Ok(model)
}

/// The branch of a float layer with the tensors of an adapter.
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
    let magnitude = match &module.magnitude {
        Some(magnitude) => Some(Param::from_tensor(magnitude.to_tensor(device)?)),
        None => None,
    };
    Ok(Projection::DenseLora(DenseLora {
        lora_a: Param::from_tensor(transposed(&module.lora_a, device)?),
        lora_b: Param::from_tensor(transposed(&module.lora_b, device)?),
        lora_magnitude: magnitude,
        ..layer
    }))
}

/// The layer with its bias trained, if the settings say so: the adapter's where it holds one, in f32
/// as the branch is, else that of the layer.
fn with_trained_bias(
    layer: Projection,
    adapter: &Adapter,
    module: Option<&LoraModule>,
    device: &Device,
) -> Result<Projection, ModelError> {
    let is_trained = adapter.config().bias != LoraBias::None;
    let Some(bias) = layer.bias().filter(|_| is_trained) else {
        return Ok(layer);
    };
    let bias = match module.and_then(|module| module.bias.as_ref()) {
        Some(trained) => trained.to_tensor(device)?,
        None => bias.val().detach(),
    };
    Ok(layer.with_bias(Param::from_tensor(bias)))
}

/// Whether the rows of an embedding or a head are as many as those of the adapter.
fn check_vocabulary(name: &str, expected: usize, given: usize) -> Result<(), ModelError> {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    if expected == given || ![EMBEDDING, HEAD].contains(&module) {
        return Ok(());
    }
    Err(ModelError::Nf4(Nf4Error::ResizedEmbeddings {
        tensor: name.into(),
        expected,
        given,
    }))
}

/// A tensor of the adapter in the place of another, in its dtype.
fn given<const D: usize>(
    tensor: &DenseTensor,
    place: Tensor<D>,
    key: &str,
    device: &Device,
) -> Result<Tensor<D>, ModelError> {
    let shape = place.dims();
    check_vocabulary(key, shape[0], *tensor.shape().first().unwrap_or(&0))?;
    on_device(tensor, shape, key, (device, place.dtype()))
}

/// A tensor of the adapter on the device.
fn on_device<const D: usize>(
    tensor: &DenseTensor,
    shape: [usize; D],
    key: &str,
    (device, dtype): (&Device, DType),
) -> Result<Tensor<D>, ModelError> {
    if tensor.shape() != shape {
        return Err(ModelError::Nf4(Nf4Error::Shape {
            tensor: key.into(),
            expected: shape.to_vec(),
            given: tensor.shape().to_vec(),
        }));
    }
    let values = tensor.to_f32();
    let overflows = |value: &f32| match dtype {
        DType::F16 => !f16::from_f32(*value).is_finite(),
        DType::BF16 => !bf16::from_f32(*value).is_finite(),
        _ => false,
    };
    if let Some(index) = values.iter().position(overflows) {
        return Err(ModelError::Nf4(Nf4Error::NonFinite {
            tensor: format!("{key} in {dtype:?}"),
            index,
            given: f32::INFINITY.copysign(values[index]),
        }));
    }
    let data = TensorData::new(values, shape);
    Ok(Tensor::from_data(data, (device, dtype)))
}

/// A matrix of the adapter on the device, transposed.
fn transposed(matrix: &DenseTensor, device: &Device) -> Result<Tensor<2>, Nf4Error> {
    Ok(matrix.to_tensor::<2>(device)?.transpose())
}

/// Names the trained tensors after their layer, so that the state of the optimizer, which knows
/// them by their id, finds them again in another run.
fn with_stable_ids(layer: Projection, path: &str) -> Projection {
    let magnitude = |magnitude: Option<Param<Tensor<1>>>| {
        magnitude.map(|magnitude| named(magnitude, path, "lora_magnitude_vector"))
    };
    let layer = match layer {
        Projection::QLora(layer) => Projection::QLora(QLoraLinear {
            lora_a: named(layer.lora_a, path, "lora_A"),
            lora_b: named(layer.lora_b, path, "lora_B"),
            lora_magnitude: magnitude(layer.lora_magnitude),
            ..layer
        }),
        Projection::DenseLora(layer) => Projection::DenseLora(DenseLora {
            lora_a: named(layer.lora_a, path, "lora_A"),
            lora_b: named(layer.lora_b, path, "lora_B"),
            lora_magnitude: magnitude(layer.lora_magnitude),
            ..layer
        }),
        frozen => frozen,
    };
    match layer.bias().filter(|bias| bias.is_require_grad()).cloned() {
        Some(bias) => layer.with_bias(named(bias, path, "bias")),
        None => layer,
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
