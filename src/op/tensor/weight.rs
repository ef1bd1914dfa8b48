//! A quantized weight on a device.

use burn::backend::Dispatch;
use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    Param, ParamId,
};
use burn::tensor::{DType, Device, Int, Shape, Tensor, TensorData};
use std::ops::Range;

use super::spec::WeightSpec;
use crate::error::Nf4Error;
use crate::format::{
    BlockTensor, FloatType, PackedLayout, QuantConfig, WeightForm, check_header_words, check_len,
    matrix_dims, with_float_type,
};
use crate::op::base::{DequantizeSpec, QuantBackend, QuantizeSpec};

/// A quantized weight on a device.
///
/// One integer tensor holds codes, scales and tables (see [`PackedLayout`]), about 0.516 byte per
/// weight with double quantization and blocks of 64. It is a Burn module: it moves between devices
/// and goes into records with the modules around it, and no float cast or optimizer touches it.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::BlockWeight;
/// use burn_nf4::format::{FloatType, QuantConfig};
///
/// let device = Device::default();
/// let dense = Tensor::<2>::random([256, 128], Distribution::Default, &device);
/// let weight = BlockWeight::quantize(dense, QuantConfig::default())?;
/// let back: Tensor<2> = weight.dequantize(FloatType::F32)?;
/// assert_eq!(back.dims(), [256, 128]);
/// assert!(weight.size_bytes() < 256 * 128);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// In a record, and to a visitor, the tensor is named by its form, such as
/// `packed_nf4_64_256_float32_256x128`, so that a record of a weight of another form lacks it: it is
/// an error of [`try_load_record`](Module::try_load_record), and nothing has to be read back from the
/// device to find it.
#[derive(Debug, Clone)]
pub struct BlockWeight {
    spec: WeightSpec,
    packed: Param<Tensor<1, Int>>,
}

/// What visitors and mappers are told that the packed tensor lies in.
pub(crate) const PACKED_CONTAINER: &str = "Struct:BlockWeight";

impl Module for BlockWeight {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        let name = self.spec.form.packed_name();
        visitor.enter_module(&name, PACKED_CONTAINER);
        self.packed.visit(visitor);
        visitor.exit_module(&name, PACKED_CONTAINER);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let name = self.spec.form.packed_name();
        mapper.enter_module(&name, PACKED_CONTAINER);
        let packed = Module::map(self.packed, mapper);
        mapper.exit_module(&name, PACKED_CONTAINER);
        Self { packed, ..self }
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.packed.collect_devices(devices)
    }

    fn to_device(self, device: &Device) -> Self {
        Self {
            packed: self.packed.to_device(device),
            ..self
        }
    }

    fn fork(self, device: &Device) -> Self {
        Self {
            packed: self.packed.fork(device),
            ..self
        }
    }

    fn materialize(self) -> Self {
        Self {
            packed: self.packed.materialize(),
            ..self
        }
    }

    fn valid(&self) -> Self {
        Self {
            spec: self.spec.clone(),
            packed: self.packed.valid(),
        }
    }

    fn train(self) -> Self {
        Self {
            packed: self.packed.train(),
            ..self
        }
    }
}

impl ModuleDisplayDefault for BlockWeight {
    fn content(&self, content: Content) -> Option<Content> {
        let form = &self.spec.form;
        let text = format!("{:?}, {form}", form.shape);
        content.add_formatted(&text).optional()
    }
}

impl ModuleDisplay for BlockWeight {}

impl BlockWeight {
    /// Uploads a quantized tensor.
    pub fn from_host(tensor: &BlockTensor, device: &Device) -> Self {
        let form = WeightForm {
            shape: tensor.shape().to_vec(),
            dtype: tensor.dtype(),
            config: tensor.config(),
            transposed: false,
        };
        let layout = tensor.packed_layout();
        Self::from_words(tensor.to_packed(), WeightSpec { form, layout }, device)
    }

    /// Uploads an image of a weight of the given form, with the form's header.
    #[cfg(feature = "checkpoint")]
    pub(crate) fn from_image(
        words: Vec<u32>,
        form: WeightForm,
        device: &Device,
    ) -> Result<Self, Nf4Error> {
        let spec = WeightSpec::new(form)?;
        Ok(Self::from_words(words, spec, device))
    }

    fn from_words(words: Vec<u32>, spec: WeightSpec, device: &Device) -> Self {
        let data = TensorData::new(words, [spec.layout.words()]);
        Self::from_packed(Tensor::from_data(data, (device, DType::U32)), spec)
    }

    /// Downloads the weight as it is stored: of a [transposed](Self::is_transposed) weight, the
    /// transpose. Waits for the device.
    ///
    /// # Errors
    /// [`Nf4Error::Header`] if a module mapper has put the tensor of another weight into this one, and
    /// [`Nf4Error::Length`] or [`Nf4Error::Dtype`] if it is of another kind.
    pub fn to_host(&self) -> Result<BlockTensor, Nf4Error> {
        let data = self.checked_packed()?.into_data();
        let words: &[u32] = bytemuck::cast_slice(data.as_bytes());
        let WeightSpec { form, layout } = &self.spec;
        check_header_words(&layout.form_header(form), &words[layout.header_start()..])?;
        BlockTensor::from_image(words, layout, &form.stored_shape(), form.dtype)
    }

    /// A weight of zeros, to load a record into. Its memory is taken when it is first used.
    ///
    /// # Errors
    /// What [`PackedLayout::for_shape`] returns.
    pub fn zeros(
        shape: &[usize],
        config: QuantConfig,
        dtype: FloatType,
        device: &Device,
    ) -> Result<Self, Nf4Error> {
        let form = WeightForm {
            shape: shape.to_vec(),
            dtype,
            config,
            transposed: false,
        };
        Self::zeros_of(form, device)
    }

    /// A weight of zeros of a given form, to load a record or a checkpoint into. Its memory is
    /// taken when it is first used.
    ///
    /// # Errors
    /// What [`PackedLayout::for_shape`] returns; for a transposed form [`Nf4Error::NotAMatrix`] if it has
    /// another rank, [`Nf4Error::Config`] if its type is one that bitsandbytes does not have.
    pub fn zeros_of(form: WeightForm, device: &Device) -> Result<Self, Nf4Error> {
        let spec = WeightSpec::new(form)?;
        let of = spec.clone();
        let packed = Param::uninitialized(
            ParamId::new(),
            move |device, _| {
                let data = TensorData::new(of.zero_words(), [of.layout.words()]);
                Tensor::from_data(data, (device, DType::U32))
            },
            device.clone(),
            false,
            Shape::from([spec.layout.words()]),
        );
        Ok(Self { packed, spec })
    }

    /// Quantizes a weight on its device; to a format that bitsandbytes does not have, on the host, which
    /// waits for the device.
    ///
    /// On GPUs the values are not checked: with a NaN or an infinity in it, a block decodes to
    /// unspecified values, and where scales are quantized too, so does the whole weight. On every
    /// device, as in bitsandbytes, a block with a magnitude above 2^126 (8.5e37) decodes to zeros.
    ///
    /// # Shapes
    /// - `weight`: any; `[out_features, in_features]` for a linear layer
    ///
    /// # Errors
    /// [`Nf4Error::Dtype`] unless the weight is f16, bf16 or f32, what [`PackedLayout::for_shape`]
    /// returns, [`Nf4Error::NonFinite`] at the first NaN or infinity, for bitsandbytes' formats on the
    /// CPU alone.
    pub fn quantize<const D: usize>(
        weight: Tensor<D>,
        config: QuantConfig,
    ) -> Result<Self, Nf4Error> {
        let dtype = FloatType::from_dtype(weight.dtype(), "weight")?;
        let spec = WeightSpec::new(WeightForm {
            shape: weight.shape().to_vec(),
            dtype,
            config,
            transposed: false,
        })?;
        if !config.quant_type.is_bitsandbytes() {
            return Self::quantize_on_host(weight, &spec);
        }
        #[cfg(feature = "flex")]
        crate::op::backends::flex::check_finite(&weight)?;
        let packed = <Dispatch as QuantBackend>::quant_quantize(
            weight.into_dispatch(),
            QuantizeSpec {
                layout: spec.layout,
                shape: spec.form.shape.clone(),
                dtype,
            },
        );
        Ok(Self::from_packed(Tensor::from_dispatch(packed), spec))
    }

    fn quantize_on_host<const D: usize>(
        weight: Tensor<D>,
        spec: &WeightSpec,
    ) -> Result<Self, Nf4Error> {
        let WeightForm { shape, config, .. } = &spec.form;
        let device = weight.device();
        let data = weight.into_data();
        let tensor = with_float_type!(spec.form.dtype, T => {
            let values = data.as_slice::<T>().expect("of the weight's dtype");
            BlockTensor::quantize(values, shape, *config)?
        });
        Ok(Self::from_host(&tensor, &device))
    }

    pub(super) fn from_packed(packed: Tensor<1, Int>, spec: WeightSpec) -> Self {
        let packed = Param::initialized(ParamId::new(), packed);
        Self { packed, spec }
    }

    /// The packed tensor, which a module mapper may have replaced by another.
    pub(in crate::op) fn checked_packed(&self) -> Result<Tensor<1, Int>, Nf4Error> {
        let packed = self.packed.val();
        let (expected, given) = (self.spec.layout.words(), packed.shape().num_elements());
        check_len("packed weight", expected, given)?;
        if packed.dtype() != DType::U32 {
            return Err(Nf4Error::Dtype {
                tensor: "packed weight".into(),
                expected: "U32".into(),
                given: format!("{:?}", packed.dtype()),
            });
        }
        Ok(packed)
    }

    /// Decodes the whole weight.
    ///
    /// # Shapes
    /// - returns the weight's shape, which must have `D` dimensions
    ///
    /// # Errors
    /// [`Nf4Error::Rank`] if the weight has another rank, [`Nf4Error::DeviceDtype`] if the device
    /// has no such type.
    pub fn dequantize<const D: usize>(&self, dtype: FloatType) -> Result<Tensor<D>, Nf4Error> {
        let shape = &self.spec.form.shape;
        if shape.len() != D {
            return Err(Nf4Error::Rank {
                tensor: "weight".into(),
                expected: D,
                shape: shape.clone(),
            });
        }
        let stored = self.decode(0, &self.spec.form.stored_shape(), dtype)?;
        if self.spec.form.transposed {
            return Ok(stored.transpose());
        }
        Ok(stored)
    }

    /// Decodes rows `rows.start..rows.end` of a matrix. A [transposed](Self::is_transposed) weight
    /// is decoded whole for it, for a moment.
    ///
    /// # Shapes
    /// - returns `[rows.len(), in_features]`
    ///
    /// # Errors
    /// [`Nf4Error::NotAMatrix`] for a weight of another rank, [`Nf4Error::RowRange`] for an empty
    /// range or one that leaves the weight, [`Nf4Error::DeviceDtype`] if the device has no such
    /// type.
    pub fn dequantize_rows(
        &self,
        rows: Range<usize>,
        dtype: FloatType,
    ) -> Result<Tensor<2>, Nf4Error> {
        let [out_features, in_features] = self.matrix_dims()?;
        if rows.start >= rows.end || rows.end > out_features {
            return Err(Nf4Error::RowRange {
                start: rows.start,
                end: rows.end,
                rows: out_features,
            });
        }
        if self.spec.form.transposed {
            let stored: Tensor<2> = self.decode(0, &[in_features, out_features], dtype)?;
            return Ok(stored.slice([0..in_features, rows]).transpose());
        }
        self.decode(rows.start * in_features, &[rows.len(), in_features], dtype)
    }

    /// Decodes `weight[index]` along the first dimension, such as the matrix of one expert, and
    /// nothing else.
    ///
    /// # Shapes
    /// - returns the weight's shape without its first dimension, which must leave `D` dimensions
    ///
    /// # Errors
    /// [`Nf4Error::Rank`] if the weight has another rank than `D + 1`, [`Nf4Error::RowRange`] if
    /// there is no such index, [`Nf4Error::DeviceDtype`] if the device has no such type.
    pub fn dequantize_index<const D: usize>(
        &self,
        index: usize,
        dtype: FloatType,
    ) -> Result<Tensor<D>, Nf4Error> {
        let shape = &self.spec.form.shape;
        if D == 0 || shape.len() != D + 1 {
            return Err(Nf4Error::Rank {
                tensor: "weight".into(),
                expected: D + 1,
                shape: shape.clone(),
            });
        }
        let start = self.start_of(index)?;
        if self.spec.form.transposed {
            let row = self.dequantize_rows(index..index + 1, dtype)?;
            return Ok(row.reshape(Shape::from(shape[1..].to_vec())));
        }
        self.decode(start, &shape[1..], dtype)
    }

    /// The first element of `weight[index]`.
    pub(super) fn start_of(&self, index: usize) -> Result<usize, Nf4Error> {
        let count = self.spec.form.shape.first().copied().unwrap_or(0);
        if index >= count {
            return Err(Nf4Error::RowRange {
                start: index,
                end: index.saturating_add(1),
                rows: count,
            });
        }
        Ok(index * (self.spec.layout.elems() / count))
    }

    /// Decodes a range of the stored elements.
    fn decode<const D: usize>(
        &self,
        start: usize,
        shape: &[usize],
        dtype: FloatType,
    ) -> Result<Tensor<D>, Nf4Error> {
        let packed = self.checked_packed()?;
        dtype.check_device(&packed.device())?;
        let columns = shape.last().copied().unwrap_or(1);
        let spec = DequantizeSpec {
            layout: self.spec.layout,
            rows: shape.iter().product::<usize>() / columns,
            columns,
            start,
            dtype,
        };
        let out = <Dispatch as QuantBackend>::quant_dequantize(packed.into_dispatch(), spec);
        Ok(Tensor::<2>::from_dispatch(out).reshape(Shape::from(shape.to_vec())))
    }

    /// The shape of the weight.
    pub fn shape(&self) -> &[usize] {
        &self.spec.form.shape
    }

    /// `[out_features, in_features]`.
    ///
    /// # Errors
    /// [`Nf4Error::NotAMatrix`] for a weight of another rank.
    pub fn matrix_dims(&self) -> Result<[usize; 2], Nf4Error> {
        matrix_dims("weight", &self.spec.form.shape)
    }

    /// Whether the packed tensor holds the transpose of the weight, as in checkpoints whose codes
    /// have the shape `[1, k]`. Blocks then run along the columns; shapes, decoded values and
    /// products are those of the weight, and only [`to_host`](Self::to_host) gives what is stored.
    pub fn is_transposed(&self) -> bool {
        self.spec.form.transposed
    }

    /// The id of the packed tensor as a parameter.
    pub fn id(&self) -> ParamId {
        self.packed.id
    }

    /// What the weight is, apart from its values.
    pub fn form(&self) -> &WeightForm {
        &self.spec.form
    }

    /// The dtype that the weight had before it was quantized.
    pub fn dtype(&self) -> FloatType {
        self.spec.form.dtype
    }

    /// How the weight is quantized.
    pub fn config(&self) -> QuantConfig {
        self.spec.layout.config()
    }

    /// Where the parts lie in the packed tensor.
    pub fn layout(&self) -> &PackedLayout {
        &self.spec.layout
    }

    /// The packed tensor, `[layout().words()]` u32 words.
    pub fn packed(&self) -> Tensor<1, Int> {
        self.packed.val()
    }

    /// The device that holds the weight.
    pub fn device(&self) -> Device {
        self.packed.lazy_device()
    }

    /// Bytes of device memory held.
    pub fn size_bytes(&self) -> usize {
        self.spec.layout.words() * 4
    }
}
