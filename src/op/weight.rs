//! A quantized weight on a device, and the functions over tensors.

use burn::backend::Dispatch;
use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Int, Shape, Tensor, TensorData};
use std::ops::Range;

use super::backend::{DequantizeSpec, Nf4Backend, QuantizeSpec};
use crate::error::Nf4Error;
use crate::format::{FloatType, HEADER_WORDS, Nf4Tensor, PackedLayout, QuantConfig};

/// A quantized weight on a device.
///
/// One integer tensor holds codes, scales and tables (see [`PackedLayout`]), about 0.516 byte per
/// weight with double quantization and blocks of 64. It is a Burn module: it moves between devices
/// and goes into records with the modules around it, and no float cast or optimizer touches it.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::Nf4Weight;
/// use burn_nf4::format::{FloatType, QuantConfig};
///
/// let device = Device::default();
/// let dense = Tensor::<2>::random([256, 128], Distribution::Default, &device);
/// let weight = Nf4Weight::quantize(dense, QuantConfig::default())?;
/// let back: Tensor<2> = weight.dequantize(FloatType::F32)?;
/// assert_eq!(back.dims(), [256, 128]);
/// assert!(weight.size_bytes() < 256 * 128);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Module, Debug)]
pub struct Nf4Weight {
    packed: Param<Tensor<1, Int>>,
    #[module(skip)]
    spec: WeightSpec,
}

/// What a packed weight is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct WeightSpec {
    shape: Vec<usize>,
    dtype: FloatType,
    layout: PackedLayout,
}

impl Nf4Weight {
    /// Uploads a quantized tensor.
    pub fn from_host(tensor: &Nf4Tensor, device: &Device) -> Self {
        let words = tensor.to_packed();
        let spec = WeightSpec {
            shape: tensor.shape().to_vec(),
            dtype: tensor.dtype(),
            layout: tensor.packed_layout(),
        };
        let data = TensorData::new(words, [spec.layout.words]);
        Self::from_packed(Tensor::from_data(data, (device, DType::U32)), spec)
    }

    /// Downloads the weight. Waits for the device.
    ///
    /// # Errors
    /// [`Nf4Error::Header`] if a record of another weight has been loaded into this one.
    pub fn to_host(&self) -> Result<Nf4Tensor, Nf4Error> {
        let data = self.packed.val().into_data();
        let words: Vec<u32> = bytemuck::cast_slice(data.as_bytes()).to_vec();
        let spec = &self.spec;
        Nf4Tensor::from_packed(&words, &spec.shape, spec.layout.config, spec.dtype)
    }

    /// A weight of zeros, to load a record into.
    ///
    /// # Errors
    /// [`Nf4Error::ElementCount`] for an impossible shape.
    pub fn zeros(
        shape: &[usize],
        config: QuantConfig,
        dtype: FloatType,
        device: &Device,
    ) -> Result<Self, Nf4Error> {
        let tensor = Nf4Tensor::zeros(shape, config, dtype)?;
        Ok(Self::from_host(&tensor, device))
    }

    /// Quantizes a weight on its device.
    ///
    /// On GPUs the values are not checked: a NaN or an infinity makes its block decode to
    /// unspecified values.
    ///
    /// # Shapes
    /// - `weight`: any; `[out_features, in_features]` for a linear layer
    ///
    /// # Errors
    /// [`Nf4Error::Dtype`] unless the weight is f16, bf16 or f32, [`Nf4Error::ElementCount`] if it
    /// is empty, [`Nf4Error::NonFinite`] on the CPU at the first NaN or infinity.
    pub fn quantize<const D: usize>(
        weight: Tensor<D>,
        config: QuantConfig,
    ) -> Result<Self, Nf4Error> {
        let dtype = FloatType::from_dtype(weight.dtype(), "weight")?;
        let spec = WeightSpec::new(weight.shape().as_slice(), config, dtype)?;
        #[cfg(feature = "flex")]
        super::flex::check_finite(&weight)?;
        let packed = <Dispatch as Nf4Backend>::nf4_quantize(
            weight.into_dispatch(),
            QuantizeSpec {
                layout: spec.layout,
                shape: spec.shape.clone(),
                dtype,
            },
        );
        Ok(Self::from_packed(Tensor::from_dispatch(packed), spec))
    }

    fn from_packed(packed: Tensor<1, Int>, spec: WeightSpec) -> Self {
        let expected = spec.clone();
        let packed = Param::initialized(ParamId::new(), packed).load_mapper(move |tensor| {
            expected.assert_header(&tensor);
            tensor
        });
        Self { packed, spec }
    }

    /// Decodes the whole weight.
    ///
    /// # Shapes
    /// - returns the weight's shape, which must have `D` dimensions
    ///
    /// # Errors
    /// [`Nf4Error::Shape`] if the weight has another rank, [`Nf4Error::DeviceDtype`] if the device
    /// has no such type.
    pub fn dequantize<const D: usize>(&self, dtype: FloatType) -> Result<Tensor<D>, Nf4Error> {
        let shape = &self.spec.shape;
        if shape.len() != D {
            return Err(Nf4Error::Shape {
                tensor: "weight".into(),
                expected: vec![0; D],
                given: shape.clone(),
            });
        }
        let columns = shape.last().copied().unwrap_or(1);
        let flat = self.decode(0, self.spec.layout.elems / columns, columns, dtype)?;
        Ok(flat.reshape(Shape::from(shape.clone())))
    }

    /// Decodes rows `rows.start..rows.end` of a matrix.
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
        self.decode(rows.start * in_features, rows.len(), in_features, dtype)
    }

    fn decode(
        &self,
        start: usize,
        rows: usize,
        columns: usize,
        dtype: FloatType,
    ) -> Result<Tensor<2>, Nf4Error> {
        let packed = self.packed.val();
        self.check_device_dtype(&packed.device(), dtype)?;
        let spec = DequantizeSpec {
            layout: self.spec.layout,
            rows,
            columns,
            start,
            dtype,
        };
        let out = <Dispatch as Nf4Backend>::nf4_dequantize(packed.into_dispatch(), spec);
        Ok(Tensor::from_dispatch(out))
    }

    fn check_device_dtype(&self, device: &Device, dtype: FloatType) -> Result<(), Nf4Error> {
        if device.supports_dtype(DType::from(dtype)) {
            return Ok(());
        }
        Err(Nf4Error::DeviceDtype {
            device: format!("{device:?}"),
            dtype: dtype.name().into(),
        })
    }

    /// The shape of the weight.
    pub fn shape(&self) -> &[usize] {
        &self.spec.shape
    }

    /// `[out_features, in_features]`.
    ///
    /// # Errors
    /// [`Nf4Error::NotAMatrix`] for a weight of another rank.
    pub fn matrix_dims(&self) -> Result<[usize; 2], Nf4Error> {
        self.spec
            .shape
            .as_slice()
            .try_into()
            .map_err(|_| Nf4Error::NotAMatrix {
                tensor: "weight".into(),
                shape: self.spec.shape.clone(),
            })
    }

    /// The dtype that the weight had before it was quantized.
    pub fn dtype(&self) -> FloatType {
        self.spec.dtype
    }

    /// How the weight is quantized.
    pub fn config(&self) -> QuantConfig {
        self.spec.layout.config
    }

    /// Where the parts lie in the packed tensor.
    pub fn layout(&self) -> &PackedLayout {
        &self.spec.layout
    }

    /// The packed tensor, `[layout().words]` u32 words.
    pub fn packed(&self) -> Tensor<1, Int> {
        self.packed.val()
    }

    /// The device that holds the weight.
    pub fn device(&self) -> Device {
        self.packed.lazy_device()
    }

    /// Bytes of device memory held.
    pub fn size_bytes(&self) -> usize {
        self.spec.layout.words * 4
    }

    /// Bytes that the weight takes when decoded to its original dtype.
    pub fn dense_size_bytes(&self) -> usize {
        self.spec.layout.elems * self.spec.dtype.size_bytes()
    }
}

impl WeightSpec {
    fn new(shape: &[usize], config: QuantConfig, dtype: FloatType) -> Result<Self, Nf4Error> {
        Ok(Self {
            shape: shape.to_vec(),
            dtype,
            layout: PackedLayout::for_shape(shape, config)?,
        })
    }

    /// Reads the header of a packed tensor that a record brings.
    fn assert_header(&self, packed: &Tensor<1, Int>) {
        let header = self.layout.header;
        let found = packed
            .clone()
            .slice(header..header + HEADER_WORDS)
            .into_data();
        let found: Vec<u32> = found.iter::<u32>().collect();
        if let Err(error) = self.layout.check_header(&found, &self.shape, self.dtype) {
            panic!("cannot load the record: {error}");
        }
    }
}

/// `y = x Wᵀ + b` with a packed weight `W`.
///
/// `W` is decoded to the dtype of `x`, here and again in the backward pass, and not kept in
/// between. The gradient flows to `x` and `bias`, never to `W`. An empty batch gives an empty
/// result, which is a constant to autodiff.
///
/// # Shapes
/// - `x`: `[..., in_features]`
/// - `weight`: `[out_features, in_features]`
/// - `bias`: `[out_features]`
/// - returns `[..., out_features]`
///
/// # Errors
/// [`Nf4Error::NotAMatrix`] for a weight of another rank, [`Nf4Error::Shape`] if `x` or `bias`
/// does not fit it, [`Nf4Error::Dtype`] unless `x` is f16, bf16 or f32.
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: &Nf4Weight,
    bias: Option<Tensor<1>>,
) -> Result<Tensor<D>, Nf4Error> {
    let [out_features, in_features] = weight.matrix_dims()?;
    let dtype = FloatType::from_dtype(x.dtype(), "x")?;
    let mut shape: Vec<usize> = x.dims().to_vec();
    if shape.last() != Some(&in_features) {
        let given = shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = in_features;
        }
        return Err(Nf4Error::Shape {
            tensor: "x".into(),
            expected: shape,
            given,
        });
    }
    if let Some(bias) = &bias
        && bias.dims() != [out_features]
    {
        return Err(Nf4Error::Shape {
            tensor: "bias".into(),
            expected: vec![out_features],
            given: bias.dims().to_vec(),
        });
    }

    let rows = shape.iter().product::<usize>() / in_features;
    shape[D - 1] = out_features;
    if rows == 0 {
        // Burn's reshape would read the zero as "keep this dimension".
        return Ok(Tensor::zeros(Shape::from(shape), (&x.device(), x.dtype())));
    }
    let spec = DequantizeSpec {
        layout: weight.spec.layout,
        rows: out_features,
        columns: in_features,
        start: 0,
        dtype,
    };
    // CubeCL's relaxed f32 is f32 in memory; a product of the two would come out as f32.
    let given = x.dtype();
    let x = x.reshape([rows, in_features]).cast(DType::from(dtype));
    let y = <Dispatch as Nf4Backend>::nf4_linear(
        x.into_dispatch(),
        weight.packed.val().into_dispatch(),
        spec,
    );
    let mut y = Tensor::<2>::from_dispatch(y);
    if let Some(bias) = bias {
        y = y + bias.unsqueeze();
    }
    Ok(y.cast(given).reshape(Shape::from(shape)))
}
