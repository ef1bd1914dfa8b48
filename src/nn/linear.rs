//! A frozen linear layer with a packed weight.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, ModuleDisplay, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor};

use crate::error::Nf4Error;
use crate::format::{
    BlockSize, BlockTensor, FloatType, QuantConfig, QuantType, WeightForm, check_shape,
};
use crate::op::{BlockWeight, LowRank, MatmulStrategy, linear_with, lora_linear};

/// Configuration of an [`QuantLinear`] to load a record into.
///
/// A layer with weights in it comes from [`QuantLinear::quantize`], [`QuantLinear::from_host`] or
/// [`QuantLinear::new`].
#[derive(Config, Debug)]
pub struct QuantLinearConfig {
    /// Size of the input features.
    pub d_input: usize,
    /// Size of the output features.
    pub d_output: usize,
    /// Whether there is a bias.
    #[config(default = true)]
    pub bias: bool,
    /// The data type of the codes.
    #[config(default = "QuantType::Nf4")]
    pub quant_type: QuantType,
    /// Weights per scale of NF4 and FP4: a power of two from 32 to 4096. The other types have one size
    /// each, whatever is set here.
    #[config(default = 64)]
    pub block_size: usize,
    /// Whether the scales of NF4 and FP4 are quantized to 8 bit, in blocks of 256. Those of the other types
    /// are what they are, whatever is set here.
    #[config(default = true)]
    pub double_quant: bool,
    /// The dtype that the weight had before it was quantized, and that of the bias.
    #[config(default = "FloatType::F32")]
    pub dtype: FloatType,
    /// Whether the record holds the transpose of the weight, see [`BlockWeight::is_transposed`].
    #[config(default = false)]
    pub transposed: bool,
}

impl QuantLinearConfig {
    /// How the weight is quantized.
    ///
    /// # Errors
    /// [`Nf4Error::BlockSize`] if bitsandbytes has no such block size.
    pub fn quant_config(&self) -> Result<QuantConfig, Nf4Error> {
        quant_config(self.quant_type, self.block_size, self.double_quant)
    }

    /// A layer of zeros.
    ///
    /// # Errors
    /// [`Nf4Error::BlockSize`] if bitsandbytes has no such block size, [`Nf4Error::ElementCount`]
    /// if a size is zero, [`Nf4Error::Blocks`] if rows are not made of whole blocks where the type wants it,
    /// [`Nf4Error::Config`] for a transposed weight of a type that bitsandbytes does not have.
    pub fn init(&self, device: &Device) -> Result<QuantLinear, Nf4Error> {
        let form = WeightForm {
            shape: vec![self.d_output, self.d_input],
            dtype: self.dtype,
            config: self.quant_config()?,
            transposed: self.transposed,
        };
        let weight = BlockWeight::zeros_of(form, device)?;
        let bias = self
            .bias
            .then(|| Tensor::zeros([self.d_output], (device, DType::from(self.dtype))));
        QuantLinear::new(weight, bias)
    }
}

/// The quantization that the fields of a config describe: of bitsandbytes' types, with scales in blocks of 256.
///
/// # Errors
/// [`Nf4Error::BlockSize`] if bitsandbytes has no such block size.
pub(super) fn quant_config(
    quant_type: QuantType,
    block_size: usize,
    double_quant: bool,
) -> Result<QuantConfig, Nf4Error> {
    if !quant_type.is_bitsandbytes() {
        return Ok(QuantConfig::of(quant_type));
    }
    Ok(QuantConfig {
        quant_type,
        block_size: BlockSize::try_from(block_size)?,
        nested_block_size: double_quant.then_some(BlockSize::B256),
    })
}

/// A frozen linear layer whose weight stays in 4 bit: `y = x Wᵀ + b`.
///
/// Only the packed form of the weight is kept. Few rows of input are multiplied with it as it is; for
/// many it is decoded to the dtype of the input, each time anew. Neither weight nor bias is trained;
/// gradients flow through to the input.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::format::QuantConfig;
/// use burn_nf4::nn::QuantLinear;
///
/// let device = Device::default();
/// let dense = LinearConfig::new(128, 256).init(&device);
/// let layer = QuantLinear::quantize(dense, QuantConfig::default())?;
/// let x = Tensor::<3>::random([2, 5, 128], Distribution::Default, &device);
/// assert_eq!(layer.forward(x).dims(), [2, 5, 256]);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct QuantLinear {
    /// The packed weight, `[d_output, d_input]`.
    pub weight: BlockWeight,
    /// The bias, `[d_output]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// How products are computed; not part of a record.
    pub strategy: MatmulStrategy,
}

impl QuantLinear {
    /// A layer from a packed weight. The bias is taken as a value, without its graph.
    ///
    /// # Errors
    /// [`Nf4Error::NotAMatrix`] for a weight of another rank, [`Nf4Error::Shape`] if the bias does
    /// not fit it.
    pub fn new(weight: BlockWeight, bias: Option<Tensor<1>>) -> Result<Self, Nf4Error> {
        let [d_output, _] = weight.matrix_dims()?;
        if let Some(bias) = &bias {
            check_shape("bias", &[d_output], &bias.dims())?;
        }
        let bias = bias.map(|bias| Param::from_tensor(bias.detach()).set_require_grad(false));
        Ok(Self {
            weight,
            bias,
            strategy: MatmulStrategy::Auto,
        })
    }

    /// A layer from a quantized tensor in host memory, such as a checkpoint's.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn from_host(
        weight: &BlockTensor,
        bias: Option<Tensor<1>>,
        device: &Device,
    ) -> Result<Self, Nf4Error> {
        Self::new(BlockWeight::from_host(weight, device), bias)
    }

    /// Quantizes a dense layer, on its device.
    ///
    /// # Errors
    /// Those of [`BlockWeight::quantize`].
    pub fn quantize(dense: Linear, config: QuantConfig) -> Result<Self, Nf4Error> {
        let weight = BlockWeight::quantize(dense.weight.val().transpose(), config)?;
        let bias = dense.bias.map(|bias| bias.val());
        Self::new(weight, bias)
    }

    /// The same layer, with products computed in a given way.
    pub fn with_strategy(mut self, strategy: MatmulStrategy) -> Self {
        self.strategy = strategy;
        self
    }

    /// Applies the layer.
    ///
    /// # Shapes
    /// - `x`: `[..., d_input]`
    /// - returns `[..., d_output]`, of the dtype of `x`
    ///
    /// # Panics
    /// If `x` does not fit the weight or is neither f16, bf16 nor f32, or if the device cannot compute
    /// the product in the way that was asked for, where [`linear_with`] returns an error.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let bias = self.bias_of(&x);
        expect(linear_with(x, &self.weight, bias, self.strategy))
    }

    /// `x Wᵀ`.
    pub(super) fn forward_without_bias<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        expect(linear_with(x, &self.weight, None, self.strategy))
    }

    /// `x Wᵀ + b + s (x A) B`.
    pub(super) fn forward_with<const D: usize>(&self, x: Tensor<D>, branch: LowRank) -> Tensor<D> {
        let bias = self.bias_of(&x);
        expect(lora_linear(x, &self.weight, bias, branch, self.strategy))
    }

    /// The bias in the dtype of `x`.
    pub(super) fn bias_of<const D: usize>(&self, x: &Tensor<D>) -> Option<Tensor<1>> {
        self.bias.as_ref().map(|bias| bias.val().cast(x.dtype()))
    }

    /// The dense layer with the same values.
    ///
    /// # Errors
    /// [`Nf4Error::DeviceDtype`] if the device has no such type.
    pub fn to_dense(&self, dtype: FloatType) -> Result<Linear, Nf4Error> {
        let weight = self.weight.dequantize::<2>(dtype)?.transpose();
        let bias = self
            .bias
            .as_ref()
            .map(|bias| bias.val().cast(DType::from(dtype)));
        Ok(Linear {
            weight: Param::from_tensor(weight.detach()),
            bias: bias.map(|bias| Param::from_tensor(bias.detach())),
        })
    }

    /// `[d_output, d_input]`.
    pub fn dims(&self) -> [usize; 2] {
        let shape = self.weight.shape();
        [shape[0], shape[1]]
    }
}

fn expect<const D: usize>(y: Result<Tensor<D>, Nf4Error>) -> Tensor<D> {
    match y {
        Ok(y) => y,
        Err(error) => panic!("QuantLinear::forward: {error}"),
    }
}

impl ModuleDisplay for QuantLinear {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [d_output, d_input] = self.dims();
        let config = self.weight.config();
        content
            .add("d_input", &d_input)
            .add("d_output", &d_output)
            .add("bias", &self.bias.is_some())
            .add("quant_type", &config.quant_type.name().to_string())
            .add("block_size", &config.block_size.elems())
            .add("double_quant", &config.nested_block_size.is_some())
            .add("transposed", &self.weight.is_transposed())
            .optional()
    }
}
