//! A float tensor in host memory, of any of the dtypes of an adapter.

use std::borrow::Cow;

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::tensor::View;

use crate::checkpoint::elements::{
    elements, expect_float, le_bytes, stored_dtype, transpose, widen, with_float_type,
};
use crate::checkpoint::{Dtype, SafetensorsFile};
use crate::error::Nf4Error;
use crate::format::{FloatElement, FloatType, check_finite, check_len, check_shape, matrix_dims};

/// A dense float tensor in host memory, with the bits that a file holds or will hold.
///
/// ```
/// use burn_nf4::format::FloatType;
/// use burn_nf4::peft::DenseTensor;
///
/// let tensor = DenseTensor::from_f32(&[1.0, 2.0, 3.0], &[3, 1], FloatType::BF16)?;
/// assert_eq!(tensor.shape(), [3, 1]);
/// assert_eq!(tensor.to_f32(), [1.0, 2.0, 3.0]);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DenseTensor {
    dtype: FloatType,
    shape: Vec<usize>,
    /// Little-endian.
    bytes: Vec<u8>,
}

impl DenseTensor {
    /// A tensor of values, each rounded to `dtype`.
    ///
    /// # Errors
    /// [`Nf4Error::Length`] unless there are as many values as the shape asks for.
    pub fn from_f32(values: &[f32], shape: &[usize], dtype: FloatType) -> Result<Self, Nf4Error> {
        let elems = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        check_len("values", elems.unwrap_or(usize::MAX), values.len())?;
        let bytes = with_float_type!(dtype, T => {
            let rounded: Vec<T> = values.iter().map(|&value| T::from_f32(value)).collect();
            le_bytes(&rounded).into_owned()
        });
        Ok(Self {
            dtype,
            shape: shape.to_vec(),
            bytes,
        })
    }

    /// A tensor of a device, in its dtype. Waits for the device.
    ///
    /// # Errors
    /// [`Nf4Error::Dtype`] unless it is f16, bf16 or f32.
    pub fn from_tensor<const D: usize>(tensor: Tensor<D>) -> Result<Self, Nf4Error> {
        let dtype = FloatType::from_dtype(tensor.dtype(), "adapter tensor")?;
        let shape = tensor.dims();
        let values: Vec<f32> = tensor.cast(DType::F32).into_data().iter::<f32>().collect();
        // Widening was exact, so that this rounds to the same bits.
        Self::from_f32(&values, &shape, dtype)
    }

    /// The tensor on a device, in f32.
    ///
    /// # Errors
    /// [`Nf4Error::Rank`] if it does not have `D` dimensions.
    pub fn to_tensor<const D: usize>(&self, device: &Device) -> Result<Tensor<D>, Nf4Error> {
        if self.shape.len() != D {
            return Err(Nf4Error::Rank {
                tensor: "adapter tensor".into(),
                expected: D,
                shape: self.shape.clone(),
            });
        }
        let data = TensorData::new(self.to_f32(), self.shape.clone());
        Ok(Tensor::from_data(data, (device, DType::F32)))
    }

    /// The transpose of a matrix.
    ///
    /// # Errors
    /// [`Nf4Error::NotAMatrix`].
    pub(crate) fn transposed(&self) -> Result<Self, Nf4Error> {
        let [rows, columns] = matrix_dims("adapter tensor", &self.shape)?;
        let bytes = with_float_type!(self.dtype, T => {
            let elements = elements::<T>(&self.bytes);
            le_bytes(&transpose([rows, columns], |index| elements[index])).into_owned()
        });
        Ok(Self {
            dtype: self.dtype,
            shape: vec![columns, rows],
            bytes,
        })
    }

    /// Reads a tensor of a file, bit for bit.
    pub(super) fn read(file: &SafetensorsFile, key: &str) -> Result<Self, Nf4Error> {
        let info = file.tensor_info(key)?;
        Ok(Self {
            dtype: expect_float(info.dtype, key)?,
            shape: info.shape.to_vec(),
            bytes: file.tensor_bytes(key)?.to_vec(),
        })
    }

    /// The dtype of the elements.
    pub fn float_type(&self) -> FloatType {
        self.dtype
    }

    /// The shape, row-major.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The bytes of the elements, little-endian.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The values, widened exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        with_float_type!(self.dtype, T => widen(&elements::<T>(&self.bytes)))
    }

    /// Looks for a NaN or an infinity; `key` is named in the error.
    pub(super) fn check_finite(&self, key: &str) -> Result<(), Nf4Error> {
        check_finite(key, self.to_f32())
    }

    pub(crate) fn check_shape(&self, expected: &[usize], key: &str) -> Result<(), Nf4Error> {
        check_shape(key, expected, &self.shape)
    }
}

impl View for &DenseTensor {
    fn dtype(&self) -> Dtype {
        stored_dtype(self.dtype)
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}
