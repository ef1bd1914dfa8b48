//! The float parameters of the layers as Burn's own mappers see them.

use burn::module::{LoraAdapter, Module, ModuleMapper, Param, ParamGroup};
use burn::tensor::{DType, Tensor};

/// What Burn has quantized as floats; floats as they are.
pub(crate) fn in_floats<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    match tensor.dtype() {
        DType::QFloat(_) => tensor.dequantize(),
        _ => tensor,
    }
}

/// What a mapper made of a parameter of ours.
pub(super) struct Mapped<const D: usize> {
    /// The parameter, without a LoRA adapter and not quantized.
    pub param: Param<Tensor<D>>,
    /// The adapter that was put on it and taken off again.
    pub adapter: Option<LoraAdapter>,
}

/// Maps a parameter that neither `apply_lora` nor a quantizer of Burn is to change.
///
/// Both take whatever float parameter they meet: `apply_lora` would put an adapter on the factors of
/// another, and a quantized factor or bias fits no product in here. Such a parameter comes back as it
/// was; after `apply_lora` or `apply_qlora` it is frozen, as everything is that carries no adapter of
/// Burn's. All other mappers (records, optimizers, casts, `set_require_grad`) act as ever.
pub(super) fn map_plain<const D: usize, M: ModuleMapper>(
    param: Param<Tensor<D>>,
    mapper: &mut M,
) -> Mapped<D> {
    // Shares the value, which a quantizer does not keep.
    let before = param.clone();
    let param = Module::map(param, mapper);
    if before.adapter().is_some() {
        // Put there on purpose, by way of the parameter itself.
        return Mapped {
            param,
            adapter: None,
        };
    }
    let adapter = param.adapter().cloned();
    let is_quantized = param.is_initialized() && matches!(param.base().dtype(), DType::QFloat(_));
    let param = match adapter.is_none() && !is_quantized {
        true => param,
        // The old value with the new state of training, which nothing else tells of a quantized one.
        false => param.transform_for_load(before.base().detach(), before.id),
    };
    Mapped { param, adapter }
}

/// The trained parameters of every [`QLoraLinear`](super::QLoraLinear) and
/// [`LoraLinear`](super::LoraLinear) in a module: the matrices `lora_a` and `lora_b` and the magnitudes
/// `lora_magnitude`.
///
/// The group for Burn's `unfreeze_group`, `set_require_grad_group`, optimizers by group and
/// `into_record_group`, where their variants without a group would reach the biases of frozen layers
/// too, embeddings and norms.
///
/// ```
/// use burn::module::Module;
/// use burn::nn::LinearConfig;
/// use burn::tensor::Device;
/// use burn_nf4::format::QuantConfig;
/// use burn_nf4::nn::{QuantLinear, QLoraLinearConfig, lora_params};
///
/// let device = Device::default().autodiff();
/// let dense = LinearConfig::new(128, 256).init(&device);
/// let base = QuantLinear::quantize(dense, QuantConfig::default())?;
/// let layer = QLoraLinearConfig::new(8).init(base, &device)?;
///
/// let layer = layer.no_grad().unfreeze_group(lora_params());
/// assert!(layer.lora_a.is_require_grad());
/// assert!(!layer.base.bias.as_ref().is_some_and(|bias| bias.is_require_grad()));
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
pub fn lora_params() -> ParamGroup {
    match ParamGroup::from_regex(r"(^|\.)lora_(a|b|magnitude)$") {
        Ok(group) => group,
        Err(error) => unreachable!("a constant pattern: {error:?}"),
    }
}
