//! A linear layer of floats or in 4 bit, with or without a low-rank branch.

use burn::module::{Module, Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};

use super::lora::{LoraLinear, dense_linear};
use super::{QLoraLinear, QLoraLinearConfig, QuantLinear, QuantReparameterization};
use crate::error::Nf4Error;
use crate::format::{FloatType, QuantConfig, check_shape};
use crate::op::{MatmulStrategy, Seed};

/// A linear layer in whatever form it is: of floats or in 4 bit, with or without a low-rank branch.
///
/// The type of the fields of a model that can be quantized, loaded from any checkpoint, and adapted; see
/// [`LinearLayers`](crate::model::LinearLayers) for what that does to a whole model.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::format::QuantConfig;
/// use burn_nf4::nn::{AnyLinear, QLoraLinearConfig};
///
/// let device = Device::default().autodiff();
/// let layer: AnyLinear = LinearConfig::new(128, 256).init(&device).into();
/// let layer = layer.quantize(QuantConfig::default())?;
/// let layer = layer.with_lora(&QLoraLinearConfig::new(8), &device)?;
/// let x = Tensor::<3>::random([2, 5, 128], Distribution::Default, &device);
/// assert_eq!(layer.forward(x).dims(), [2, 5, 256]);
/// assert!(layer.is_quantized() && layer.has_branch());
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// In a record the path of each parameter names the variant, so that a record of a layer in another form
/// is an error of [`try_load_record`](Module::try_load_record).
#[derive(Module, Debug)]
pub enum AnyLinear {
    /// A weight of floats.
    Dense(Linear),
    /// A weight in 4 bit.
    Nf4(QuantLinear),
    /// A weight of floats and a trained branch.
    Lora(LoraLinear),
    /// A weight in 4 bit and a trained branch.
    QLora(QLoraLinear),
}

impl From<Linear> for AnyLinear {
    fn from(layer: Linear) -> Self {
        Self::Dense(layer)
    }
}

impl From<QuantLinear> for AnyLinear {
    fn from(layer: QuantLinear) -> Self {
        Self::Nf4(layer)
    }
}

impl From<LoraLinear> for AnyLinear {
    fn from(layer: LoraLinear) -> Self {
        Self::Lora(layer)
    }
}

impl From<QLoraLinear> for AnyLinear {
    fn from(layer: QLoraLinear) -> Self {
        Self::QLora(layer)
    }
}

/// The layer under a branch, or the layer itself.
enum Base<'a> {
    Dense(&'a Linear),
    Nf4(&'a QuantLinear),
}

impl AnyLinear {
    /// A frozen layer of floats. Weight and bias are taken as values, without their graph.
    ///
    /// # Shapes
    /// - `weight`: `[d_output, d_input]`, such as the table of an embedding for a head
    /// - `bias`: `[d_output]`
    pub fn from_weight(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        let bias = bias.map(|bias| Param::from_tensor(bias.detach()));
        // A detached leaf would still ask for a gradient, and so its transpose for a graph.
        let weight = Param::from_tensor(weight.transpose().detach());
        Self::Dense(Linear { weight, bias }.no_grad())
    }

    /// Applies the layer.
    ///
    /// # Shapes
    /// - `x`: `[..., d_input]`
    /// - returns `[..., d_output]`, of the dtype of `x`
    ///
    /// A weight or a bias that Burn has quantized (`apply_qlora`, `quantize_weights`) is multiplied by
    /// Burn, as in its own [`Linear`].
    ///
    /// # Panics
    /// If `x` does not fit the weight, or is not of its dtype where that is of floats.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Dense(layer) => {
                let bias = layer.bias.as_ref().map(Param::val);
                dense_linear("AnyLinear", x, layer.weight.val(), bias)
            }
            Self::Nf4(layer) => layer.forward(x),
            Self::Lora(layer) => layer.forward(x),
            Self::QLora(layer) => layer.forward(x),
        }
    }

    /// Where a backward pass begins that knows the gradient of the layer's result, which is not computed where
    /// that can be, see [`Seed::of_lora_linear`].
    ///
    /// # Shapes
    /// - `x`: `[..., d_input]`, `grad`: `[..., d_output]`, of one dtype
    ///
    /// # Panics
    /// Where [`forward`](Self::forward) does, and if `grad` does not fit.
    pub fn seed<const D: usize>(&self, x: Tensor<D>, grad: Tensor<D>) -> Seed {
        let seed = match self {
            Self::QLora(layer) if layer.enabled => match layer.plain_branch(&x) {
                Some(branch) => {
                    let (base, bias) = (&layer.base, layer.base.bias_of(&x));
                    Seed::of_lora_linear(x, &base.weight, bias, branch, base.strategy, grad)
                }
                None => Seed::of(layer.forward(x), grad),
            },
            _ => Seed::of(self.forward(x), grad),
        };
        match seed {
            Ok(seed) => seed,
            Err(error) => panic!("AnyLinear::seed: {error}"),
        }
    }

    fn base(&self) -> Base<'_> {
        match self {
            Self::Dense(layer) => Base::Dense(layer),
            Self::Lora(layer) => Base::Dense(&layer.base),
            Self::Nf4(layer) => Base::Nf4(layer),
            Self::QLora(layer) => Base::Nf4(&layer.base),
        }
    }

    /// `[d_output, d_input]`.
    pub fn dims(&self) -> [usize; 2] {
        match self.base() {
            Base::Dense(layer) => {
                match layer.weight.reparameterization::<QuantReparameterization>() {
                    // The parameter itself is a column.
                    Some(packed) => {
                        let shape = packed.weight().shape();
                        [shape[0], shape[1]]
                    }
                    None => {
                        // Does not make a weight that was not asked for yet.
                        let shape = layer.weight.lazy_shape();
                        [shape[1], shape[0]]
                    }
                }
            }
            Base::Nf4(layer) => layer.dims(),
        }
    }

    /// The bias, `[d_output]`.
    pub fn bias(&self) -> Option<&Param<Tensor<1>>> {
        match self.base() {
            Base::Dense(layer) => layer.bias.as_ref(),
            Base::Nf4(layer) => layer.bias.as_ref(),
        }
    }

    fn bias_mut(&mut self) -> &mut Option<Param<Tensor<1>>> {
        match self {
            Self::Dense(layer) => &mut layer.bias,
            Self::Nf4(layer) => &mut layer.bias,
            Self::Lora(layer) => &mut layer.base.bias,
            Self::QLora(layer) => &mut layer.base.bias,
        }
    }

    /// The layer with another bias, or one for the first time. Its dtype need not be that of the
    /// weight: it is added in the dtype of the input.
    ///
    /// # Errors
    /// [`Nf4Error::Shape`] unless it is `[d_output]`.
    pub fn with_bias(mut self, bias: Param<Tensor<1>>) -> Result<Self, Nf4Error> {
        let [d_output, _] = self.dims();
        check_shape("bias", &[d_output], &bias.lazy_shape())?;
        *self.bias_mut() = Some(bias);
        Ok(self)
    }

    /// Whether the weight is in 4 bit.
    pub fn is_quantized(&self) -> bool {
        matches!(self.base(), Base::Nf4(_))
    }

    /// The dtype of the weight; of one in 4 bit, that which it had before.
    ///
    /// # Errors
    /// [`Nf4Error::Dtype`] unless it is f16, bf16 or f32.
    pub fn dtype(&self) -> Result<FloatType, Nf4Error> {
        match self.base() {
            Base::Dense(layer) => FloatType::from_dtype(layer.weight.dtype(), "weight"),
            Base::Nf4(layer) => Ok(layer.weight.dtype()),
        }
    }

    /// Bytes of the packed weight; zero for one of floats.
    pub fn packed_bytes(&self) -> usize {
        match self.base() {
            Base::Dense(_) => 0,
            Base::Nf4(layer) => layer.weight.size_bytes(),
        }
    }

    /// Bytes of the float weight, without bias and branch; zero for one in 4 bit.
    pub fn float_bytes(&self) -> usize {
        match self.base() {
            Base::Dense(layer) => {
                let weight = layer.weight.val();
                weight.shape().num_elements() * weight.dtype().size()
            }
            Base::Nf4(_) => 0,
        }
    }

    /// The layer without its branch, whether that was on or off. A bias that was trained stays so.
    pub fn into_base(self) -> Self {
        match self {
            Self::Lora(layer) => Self::Dense(layer.base),
            Self::QLora(layer) => Self::Nf4(layer.base),
            frozen => frozen,
        }
    }

    /// Puts a fresh branch on the layer, in place of any that is there, and freezes the rest.
    ///
    /// # Errors
    /// Those of [`QLoraLinearConfig::init`] and [`QLoraLinearConfig::init_dense`].
    pub fn with_lora(self, lora: &QLoraLinearConfig, device: &Device) -> Result<Self, Nf4Error> {
        match self.into_base() {
            Self::Nf4(base) => Ok(Self::QLora(lora.init(base.no_grad(), device)?)),
            Self::Dense(base) => Ok(Self::Lora(lora.init_dense(base, device)?)),
            adapted => Ok(adapted),
        }
    }

    /// Whether there is a branch, on or off.
    pub fn has_branch(&self) -> bool {
        matches!(self, Self::Lora(_) | Self::QLora(_))
    }

    /// Whether there is a branch and it is on.
    pub fn is_branch_enabled(&self) -> bool {
        match self {
            Self::Lora(layer) => layer.enabled,
            Self::QLora(layer) => layer.enabled,
            Self::Dense(_) | Self::Nf4(_) => false,
        }
    }

    /// Switches the branch on or off; off, the layer computes what its base does. A bias that was
    /// trained stays, as in PEFT.
    ///
    /// The switch is not part of a record: a layer that a record is loaded into keeps its own.
    pub fn with_branch_enabled(mut self, enabled: bool) -> Self {
        match &mut self {
            Self::Lora(layer) => layer.enabled = enabled,
            Self::QLora(layer) => layer.enabled = enabled,
            Self::Dense(_) | Self::Nf4(_) => {}
        }
        self
    }

    /// The layer with products of a weight in 4 bit computed in a given way. One of floats is as it was.
    pub fn with_strategy(mut self, strategy: MatmulStrategy) -> Self {
        match &mut self {
            Self::Nf4(layer) => layer.strategy = strategy,
            Self::QLora(layer) => layer.base.strategy = strategy,
            Self::Dense(_) | Self::Lora(_) => {}
        }
        self
    }

    /// The layer with its weight in 4 bit. One that is already in 4 bit is as it was, whatever its
    /// settings; a branch stays on what has then become another weight.
    ///
    /// # Errors
    /// Those of [`QuantLinear::quantize`].
    pub fn quantize(self, config: QuantConfig) -> Result<Self, Nf4Error> {
        match self {
            Self::Dense(layer) => quantized(layer, config).map(Self::Nf4),
            Self::Lora(layer) => Ok(Self::QLora(QLoraLinear {
                base: quantized(layer.base, config)?,
                lora_a: layer.lora_a,
                lora_b: layer.lora_b,
                lora_magnitude: layer.lora_magnitude,
                dropout: layer.dropout,
                scale: layer.scale,
                enabled: layer.enabled,
            })),
            packed => Ok(packed),
        }
    }

    /// The layer with its weight in floats, of the same values; a branch stays. One of floats is as it
    /// was, whatever its dtype. The bias keeps its dtype.
    ///
    /// # Errors
    /// Those of [`QuantLinear::to_dense`].
    pub fn dequantize(self, dtype: FloatType) -> Result<Self, Nf4Error> {
        match self {
            Self::Nf4(layer) => dequantized(layer, dtype).map(Self::Dense),
            Self::QLora(layer) => Ok(Self::Lora(LoraLinear {
                base: dequantized(layer.base, dtype)?,
                lora_a: layer.lora_a,
                lora_b: layer.lora_b,
                lora_magnitude: layer.lora_magnitude,
                dropout: layer.dropout,
                scale: layer.scale,
                enabled: layer.enabled,
            })),
            dense => Ok(dense),
        }
    }

    /// The branch put into the weight, which is then of floats: summed in f32 and rounded once to
    /// `dtype`, or to [that of the weight](Self::dtype). Of a weight in 4 bit this is what it had before,
    /// which inputs need not have had: [`LinearLayers::merge`](crate::model::LinearLayers::merge) takes
    /// that of the model. A layer without a branch is as it was.
    ///
    /// # Errors
    /// [`Nf4Error::Config`] for a branch that is off: it would change what the layer computes.
    /// [`Nf4Error::NonFinite`], [`Nf4Error::DeviceDtype`], see [`QLoraLinear::merge`].
    pub fn merge(self, dtype: Option<FloatType>) -> Result<Self, Nf4Error> {
        if self.has_branch() && !self.is_branch_enabled() {
            return Err(Nf4Error::Config {
                field: "enabled",
                expected: "true for a branch that is to be merged",
                given: "false".into(),
            });
        }
        let dtype = match dtype {
            Some(dtype) => dtype,
            None => self.dtype()?,
        };
        match &self {
            Self::Lora(layer) => layer.merge(dtype).map(|layer| Self::Dense(layer.no_grad())),
            Self::QLora(layer) => layer.merge(dtype).map(|layer| Self::Dense(layer.no_grad())),
            Self::Dense(_) | Self::Nf4(_) => Ok(self),
        }
    }

    /// As [`merge`](Self::merge), but a weight that was in 4 bit is so again, with its own settings.
    /// That is lossy: the branch is rounded to 4 bit with the weight. A
    /// [transposed](crate::BlockWeight::is_transposed) weight comes out as one that is not.
    ///
    /// # Errors
    /// Those of [`merge`](Self::merge) and of [`QuantLinear::quantize`].
    pub fn merge_4bit(self) -> Result<Self, Nf4Error> {
        match &self {
            Self::QLora(layer) => {
                let config = layer.base.weight.config();
                let strategy = layer.base.strategy;
                let merged = self.merge(None)?.quantize(config)?;
                Ok(merged.with_strategy(strategy))
            }
            _ => self.merge(None),
        }
    }

    /// The layer with each parameter that is trained named after the path of the layer, so that an
    /// optimizer, which knows parameters by their id, finds its state again in another run.
    pub fn with_stable_ids(mut self, path: &str) -> Self {
        let magnitude = |magnitude: Option<Param<Tensor<1>>>| {
            magnitude.map(|param| with_stable_id(param, &format!("{path}.lora_magnitude_vector")))
        };
        self = match self {
            Self::QLora(layer) => Self::QLora(QLoraLinear {
                lora_a: with_stable_id(layer.lora_a, &format!("{path}.lora_A")),
                lora_b: with_stable_id(layer.lora_b, &format!("{path}.lora_B")),
                lora_magnitude: magnitude(layer.lora_magnitude),
                ..layer
            }),
            Self::Lora(layer) => Self::Lora(LoraLinear {
                lora_a: with_stable_id(layer.lora_a, &format!("{path}.lora_A")),
                lora_b: with_stable_id(layer.lora_b, &format!("{path}.lora_B")),
                lora_magnitude: magnitude(layer.lora_magnitude),
                ..layer
            }),
            frozen => frozen,
        };
        let slot = self.bias_mut();
        if let Some(bias) = slot.take() {
            *slot = Some(match bias.is_require_grad() {
                true => with_stable_id(bias, &format!("{path}.bias")),
                false => bias,
            });
        }
        self
    }
}

/// As [`QuantLinear::quantize`], but the bias stays what it is, trained or not.
fn quantized(mut layer: Linear, config: QuantConfig) -> Result<QuantLinear, Nf4Error> {
    let bias = layer.bias.take();
    let quantized = QuantLinear::quantize(layer, config)?;
    Ok(QuantLinear { bias, ..quantized })
}

fn dequantized(mut layer: QuantLinear, dtype: FloatType) -> Result<Linear, Nf4Error> {
    let bias = layer.bias.take();
    let dense = layer.to_dense(dtype)?.no_grad();
    Ok(Linear { bias, ..dense })
}

/// The parameter with an id that is the same in every run for the same name.
pub(crate) fn with_stable_id<const D: usize>(
    param: Param<Tensor<D>>,
    name: &str,
) -> Param<Tensor<D>> {
    // FNV-1a, the same in every build, unlike the standard library's hasher.
    let id = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let (_, value, mapper) = param.consume();
    Param::from_mapped_value(ParamId::from(id), value, mapper)
}
