//! Between an adapter and the layers of a Burn model.

use burn::module::Param;
use burn::tensor::{Device, Tensor};

use super::adapter::{Adapter, LoraModule};
use super::setting::LoraBias;
use super::tensor::DenseTensor;
use crate::error::Nf4Error;
use crate::format::check_shape;
use crate::nn::{LoraLinear, QLoraLinear, QLoraLinearConfig, QuantLinear};

impl Adapter {
    /// The settings of a module's branch, but for [`init`](QLoraLinearConfig::init): the factors are those
    /// of the adapter, however they began.
    ///
    /// # Errors
    /// [`Nf4Error::NotAdapted`] if the adapter's settings do not select the module.
    pub fn layer_config(&self, module: &str) -> Result<QLoraLinearConfig, Nf4Error> {
        if !self.matcher().is_target(module)? {
            return Err(Nf4Error::NotAdapted {
                module: module.into(),
            });
        }
        let config = QLoraLinearConfig::new(self.matcher().rank(module)?)
            .with_alpha(self.matcher().alpha(module)?)
            .with_dropout(self.config().lora_dropout)
            .with_use_rslora(self.config().use_rslora)
            .with_use_dora(self.config().use_dora);
        Ok(config)
    }

    /// The layer with a module's branch beside the frozen `base`, on `device`.
    ///
    /// The branch is in f32 whatever it is stored in, as in PEFT. With `bias` other than `none`
    /// the bias, too, is trainable, and it is the adapter's where the adapter holds one.
    ///
    /// # Errors
    /// [`Nf4Error::NotAdapted`] if the adapter has no tensors for the module, [`Nf4Error::Shape`]
    /// if they do not fit `base`, [`Nf4Error::BaseLacks`] if there is a trained bias but none in
    /// `base`, [`Nf4Error::Config`] if the adapter has a float weight for the layer, which would have
    /// to replace the packed one.
    pub fn layer(
        &self,
        module: &str,
        base: QuantLinear,
        device: &Device,
    ) -> Result<QLoraLinear, Nf4Error> {
        let config = self.layer_config(module)?;
        let tensors = self.module(module).ok_or_else(|| Nf4Error::NotAdapted {
            module: module.into(),
        })?;
        check_shape(module, &base.dims(), &tensors.dims())?;
        if tensors.bias.is_some() && base.bias.is_none() {
            return Err(Nf4Error::BaseLacks {
                missing: vec![format!("{module}.bias")],
            });
        }
        if self.full_tensor(&format!("{module}.weight")).is_some() {
            return Err(Nf4Error::Config {
                field: "base_layer.weight",
                expected: "none for a layer in 4 bit",
                given: format!("a float weight for `{module}`"),
            });
        }
        let base = burn::module::Module::to_device(base, device);
        // Transposed on the host, so that the parameters are contiguous.
        let lora_a = tensors.lora_a.transposed()?.to_tensor(device)?;
        let lora_b = tensors.lora_b.transposed()?.to_tensor(device)?;
        // The magnitudes are given, and need not be computed.
        let config = config.with_use_dora(false);
        let mut layer = config.init_with(base, lora_a, lora_b)?;
        if let Some(magnitude) = &tensors.magnitude {
            layer = layer.with_magnitude(magnitude.to_tensor(device)?)?;
        }
        if self.config().bias != LoraBias::None
            && let Some(bias) = layer.base.bias.take()
        {
            let bias = match &tensors.bias {
                Some(trained) => trained.to_tensor(device)?,
                None => bias.val().detach(),
            };
            layer.base.bias = Some(Param::from_tensor(bias));
        }
        Ok(layer)
    }

    /// Takes the branch of a layer into the adapter, in the dtypes that it has, and with `bias`
    /// other than `none` its bias too. Waits for the device.
    ///
    /// # Errors
    /// [`Nf4Error::Config`] if the factor of the layer is not the one that the adapter's settings
    /// give, and those of [`insert`](Self::insert).
    pub fn insert_layer(&mut self, module: &str, layer: &QLoraLinear) -> Result<(), Nf4Error> {
        let QLoraLinear {
            base,
            lora_a,
            lora_b,
            lora_magnitude,
            scale,
            ..
        } = layer;
        self.insert_branch(
            module,
            Branch {
                factors: [lora_a, lora_b],
                magnitude: lora_magnitude.as_ref(),
                bias: base.bias.as_ref(),
                scale: *scale,
            },
        )
    }

    /// As [`insert_layer`](Self::insert_layer), of a layer of floats.
    pub(crate) fn insert_dense_layer(
        &mut self,
        module: &str,
        layer: &LoraLinear,
    ) -> Result<(), Nf4Error> {
        let LoraLinear {
            base,
            lora_a,
            lora_b,
            lora_magnitude,
            scale,
            ..
        } = layer;
        self.insert_branch(
            module,
            Branch {
                factors: [lora_a, lora_b],
                magnitude: lora_magnitude.as_ref(),
                bias: base.bias.as_ref(),
                scale: *scale,
            },
        )
    }

    fn insert_branch(&mut self, module: &str, branch: Branch) -> Result<(), Nf4Error> {
        let config = self.layer_config(module)?;
        let [lora_a, lora_b] = branch.factors;
        if lora_a.lazy_shape()[1] == config.rank && branch.scale != config.scale() {
            return Err(Nf4Error::Config {
                field: "scale",
                expected: "the factor that the adapter's settings give",
                given: format!("{} for `{module}`", branch.scale),
            });
        }
        let vector = |param: Option<&Param<Tensor<1>>>| {
            let tensor = param.map(|param| DenseTensor::from_tensor(param.val()));
            tensor.transpose()
        };
        let bias = branch.bias.filter(|_| self.config().bias != LoraBias::None);
        let tensors = LoraModule {
            lora_a: DenseTensor::from_tensor(lora_a.val().transpose())?,
            lora_b: DenseTensor::from_tensor(lora_b.val().transpose())?,
            magnitude: vector(branch.magnitude)?,
            bias: vector(bias)?,
        };
        self.insert(module, tensors)
    }
}

/// What a layer with a branch trains, whatever form its weight has.
struct Branch<'a> {
    /// `A` and `B`.
    factors: [&'a Param<Tensor<2>>; 2],
    magnitude: Option<&'a Param<Tensor<1>>>,
    bias: Option<&'a Param<Tensor<1>>>,
    scale: f64,
}
