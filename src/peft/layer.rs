//! Between an adapter and the layers of a Burn model.

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::adapter::{Adapter, LoraModule};
use super::setting::LoraBias;
use super::tensor::DenseTensor;
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::nn::{Nf4Linear, QLoraLinear, QLoraLinearConfig};

impl Adapter {
    /// The settings of a module's branch.
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
    /// `base`, [`Nf4Error::Config`] if the adapter brings the weight of the layer along, which would
    /// have to take the place of the packed one.
    pub fn layer(
        &self,
        module: &str,
        base: Nf4Linear,
        device: &Device,
    ) -> Result<QLoraLinear, Nf4Error> {
        let config = self.layer_config(module)?;
        let tensors = self.module(module).ok_or_else(|| Nf4Error::NotAdapted {
            module: module.into(),
        })?;
        let (expected, given) = (base.dims(), tensors.dims());
        if expected != given {
            return Err(Nf4Error::Shape {
                tensor: module.into(),
                expected: expected.to_vec(),
                given: given.to_vec(),
            });
        }
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
        let lora_a = transposed(&tensors.lora_a, device);
        let lora_b = transposed(&tensors.lora_b, device);
        // The magnitudes are given, and need not be computed.
        let config = config.with_use_dora(false);
        let mut layer = config.init_with(base, lora_a, lora_b)?;
        if let Some(magnitude) = &tensors.magnitude {
            layer = layer.with_magnitude(vector(magnitude, device))?;
        }
        if self.config().bias != LoraBias::None
            && let Some(bias) = layer.base.bias.take()
        {
            let bias = match &tensors.bias {
                Some(trained) => vector(trained, device),
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
        let config = self.layer_config(module)?;
        if layer.rank() == config.rank && layer.scale != config.scale() {
            return Err(Nf4Error::Config {
                field: "scale",
                expected: "the factor that the adapter's settings give",
                given: layer.scale.to_string(),
            });
        }
        let bias = match (&layer.base.bias, self.config().bias) {
            (Some(bias), LoraBias::All | LoraBias::LoraOnly) => Some(to_host(bias.val())?),
            _ => None,
        };
        let magnitude = layer.lora_magnitude.as_ref();
        let tensors = LoraModule {
            lora_a: to_host(layer.lora_a.val().transpose())?,
            lora_b: to_host(layer.lora_b.val().transpose())?,
            magnitude: magnitude.map(|m| to_host(m.val())).transpose()?,
            bias,
        };
        self.insert(module, tensors)
    }
}

/// A matrix on the device, transposed, in f32.
fn transposed(matrix: &DenseTensor, device: &Device) -> Tensor<2> {
    let [rows, columns] = [matrix.shape()[0], matrix.shape()[1]];
    let values = matrix.to_f32();
    // On the host, so that the parameter is contiguous.
    let turned: Vec<f32> = (0..columns)
        .flat_map(|column| values[column..].iter().step_by(columns).copied())
        .collect();
    let data = TensorData::new(turned, [columns, rows]);
    Tensor::from_data(data, (device, DType::F32))
}

/// A vector on the device, in f32.
fn vector(vector: &DenseTensor, device: &Device) -> Tensor<1> {
    let data = TensorData::new(vector.to_f32(), [vector.shape()[0]]);
    Tensor::from_data(data, (device, DType::F32))
}

/// A tensor in host memory, in its dtype.
fn to_host<const D: usize>(tensor: Tensor<D>) -> Result<DenseTensor, Nf4Error> {
    let dtype = FloatType::from_dtype(tensor.dtype(), "adapter tensor")?;
    let shape = tensor.dims();
    let data = tensor.cast(DType::F32).into_data();
    let values: Vec<f32> = data.iter::<f32>().collect();
    // Widening was exact, so that this rounds to the same bits.
    DenseTensor::from_f32(&values, &shape, dtype)
}
