//! A frozen embedding with a packed weight.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::Embedding;
use burn::tensor::{Device, Int, Tensor};

use super::linear::quant_config;
use crate::error::Nf4Error;
use crate::format::{BlockTensor, FloatType, QuantConfig, QuantType, WeightForm};
use crate::op::{BlockWeight, MatmulStrategy, embedding, linear_with};

/// Configuration of an [`QuantEmbedding`] to load a record into.
///
/// An embedding with weights in it comes from [`QuantEmbedding::quantize`], [`QuantEmbedding::from_host`]
/// or [`QuantEmbedding::new`].
#[derive(Config, Debug)]
pub struct QuantEmbeddingConfig {
    /// Number of vectors, the size of the vocabulary.
    pub n_embedding: usize,
    /// Size of each vector.
    pub d_model: usize,
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
    /// The dtype that the weight had before it was quantized, and that of the vectors.
    #[config(default = "FloatType::F32")]
    pub dtype: FloatType,
    /// Whether the record holds the transpose of the weight, see [`BlockWeight::is_transposed`].
    #[config(default = false)]
    pub transposed: bool,
}

impl QuantEmbeddingConfig {
    /// How the weight is quantized.
    ///
    /// # Errors
    /// [`Nf4Error::BlockSize`] if bitsandbytes has no such block size.
    pub fn quant_config(&self) -> Result<QuantConfig, Nf4Error> {
        quant_config(self.quant_type, self.block_size, self.double_quant)
    }

    /// An embedding of zeros.
    ///
    /// # Errors
    /// [`Nf4Error::BlockSize`] if bitsandbytes has no such block size, [`Nf4Error::ElementCount`]
    /// if a size is zero, [`Nf4Error::Blocks`] if rows are not made of whole blocks where the type wants it,
    /// [`Nf4Error::Config`] for a transposed weight of a type that bitsandbytes does not have.
    pub fn init(&self, device: &Device) -> Result<QuantEmbedding, Nf4Error> {
        let form = WeightForm {
            shape: vec![self.n_embedding, self.d_model],
            dtype: self.dtype,
            config: self.quant_config()?,
            transposed: self.transposed,
        };
        QuantEmbedding::new(BlockWeight::zeros_of(form, device)?)
    }
}

/// A frozen embedding whose weight stays in 4 bit.
///
/// [`forward`](Self::forward) decodes only the rows that are asked for. Where the output head is tied to
/// the embedding, [`logits`](Self::logits) is that head: one packed weight serves both, in memory, in a
/// record and in a folder. A head of its own is an [`QuantLinear`](super::QuantLinear).
///
/// The weight is not trained; gradients flow through `logits` to its input.
///
/// ```
/// use burn::nn::EmbeddingConfig;
/// use burn::tensor::{Device, Int, Tensor};
/// use burn_nf4::format::QuantConfig;
/// use burn_nf4::nn::QuantEmbedding;
///
/// let device = Device::default();
/// let dense = EmbeddingConfig::new(1000, 128).init(&device);
/// let embedding = QuantEmbedding::quantize(dense, QuantConfig::default())?;
/// let ids = Tensor::<2, Int>::from_data([[7, 3, 999], [3, 3, 0]], &device);
/// let x = embedding.forward(ids);
/// assert_eq!(x.dims(), [2, 3, 128]);
/// assert_eq!(embedding.logits(x).dims(), [2, 3, 1000]);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// From a checkpoint, with [`Checkpoint::load_weight`](crate::checkpoint::Checkpoint::load_weight):
///
/// ```no_run
/// # use burn_nf4::checkpoint::Checkpoint;
/// # use burn_nf4::nn::QuantEmbedding;
/// # let device = burn::tensor::Device::default();
/// let checkpoint = Checkpoint::open("model-nf4")?;
/// let weight = checkpoint.load_weight("model.embed_tokens.weight", &device)?;
/// let embedding = QuantEmbedding::new(weight)?;
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct QuantEmbedding {
    /// The packed weight, `[n_embedding, d_model]`.
    pub weight: BlockWeight,
    /// Type of the vectors, at first the dtype that the weight had before it was quantized; not part
    /// of a record.
    #[module(skip)]
    pub dtype: FloatType,
    /// How [`logits`](Self::logits) is computed; not part of a record.
    #[module(skip)]
    pub strategy: MatmulStrategy,
}

impl QuantEmbedding {
    /// An embedding from a packed weight.
    ///
    /// # Errors
    /// [`Nf4Error::NotAMatrix`] for a weight of another rank.
    pub fn new(weight: BlockWeight) -> Result<Self, Nf4Error> {
        weight.matrix_dims()?;
        Ok(Self {
            dtype: weight.dtype(),
            weight,
            strategy: MatmulStrategy::Auto,
        })
    }

    /// An embedding from a quantized tensor in host memory, such as a checkpoint's.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn from_host(weight: &BlockTensor, device: &Device) -> Result<Self, Nf4Error> {
        Self::new(BlockWeight::from_host(weight, device))
    }

    /// Quantizes a dense embedding, on its device.
    ///
    /// # Errors
    /// Those of [`BlockWeight::quantize`].
    pub fn quantize(dense: Embedding, config: QuantConfig) -> Result<Self, Nf4Error> {
        Self::new(BlockWeight::quantize(dense.weight.val(), config)?)
    }

    /// The same embedding with vectors of a given type, such as f16 on a device without bf16.
    pub fn with_dtype(mut self, dtype: FloatType) -> Self {
        self.dtype = dtype;
        self
    }

    /// The same embedding, with logits computed in a given way.
    pub fn with_strategy(mut self, strategy: MatmulStrategy) -> Self {
        self.strategy = strategy;
        self
    }

    /// Looks up the vectors of ids; see [`op::embedding`](embedding()).
    ///
    /// # Shapes
    /// - `ids`: `[batch, tokens]`
    /// - returns `[batch, tokens, d_model]`, of [`dtype`](Self::dtype)
    ///
    /// # Panics
    /// On the CPU (Flex) at an id that has no vector, as Burn's own embedding does; on other devices
    /// such an id gives a vector of NaN. If the device has no such dtype, or the ids lie on another
    /// device.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        match embedding(ids, &self.weight, self.dtype) {
            Ok(x) => x,
            Err(error) => panic!("QuantEmbedding::forward: {error}"),
        }
    }

    /// Applies the embedding as an output head that is tied to it: `x Wᵀ` with the same packed weight.
    ///
    /// # Shapes
    /// - `x`: `[..., d_model]`
    /// - returns `[..., n_embedding]`, of the dtype of `x`
    ///
    /// # Panics
    /// If `x` does not fit the weight or is neither f16, bf16 nor f32, or if the device cannot compute
    /// the product in the way that was asked for, where [`linear_with`] returns an error.
    pub fn logits<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match linear_with(x, &self.weight, None, self.strategy) {
            Ok(y) => y,
            Err(error) => panic!("QuantEmbedding::logits: {error}"),
        }
    }

    /// The dense embedding with the same values.
    ///
    /// # Errors
    /// [`Nf4Error::DeviceDtype`] if the device has no such type.
    pub fn to_dense(&self, dtype: FloatType) -> Result<Embedding, Nf4Error> {
        let weight = self.weight.dequantize::<2>(dtype)?;
        Ok(Embedding {
            weight: Param::from_tensor(weight.detach()),
        })
    }

    /// `[n_embedding, d_model]`.
    pub fn dims(&self) -> [usize; 2] {
        let shape = self.weight.shape();
        [shape[0], shape[1]]
    }

    /// Bytes of device memory held, for the tied head too.
    pub fn size_bytes(&self) -> usize {
        self.weight.size_bytes()
    }
}

impl ModuleDisplay for QuantEmbedding {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [n_embedding, d_model] = self.dims();
        let config = self.weight.config();
        content
            .add("n_embedding", &n_embedding)
            .add("d_model", &d_model)
            .add("quant_type", &config.quant_type.name().to_string())
            .add("block_size", &config.block_size.elems())
            .add("double_quant", &config.nested_block_size.is_some())
            .add("transposed", &self.weight.is_transposed())
            .optional()
    }
}
