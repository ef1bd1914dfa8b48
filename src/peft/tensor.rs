//! A float tensor in host memory, of any of the dtypes of an adapter.

use std::borrow::Cow;

use half::{bf16, f16};
use safetensors::tensor::View;

use crate::checkpoint::{Dtype, SafetensorsFile};
use crate::error::Nf4Error;
use crate::format::FloatType;

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
        if elems != Some(values.len()) {
            return Err(Nf4Error::Length {
                tensor: "values".into(),
                expected: elems.unwrap_or(usize::MAX),
                given: values.len(),
            });
        }
        let bytes = match dtype {
            FloatType::F16 => to_bytes(values, |v| f16::from_f32(v).to_le_bytes()),
            FloatType::BF16 => to_bytes(values, |v| bf16::from_f32(v).to_le_bytes()),
            FloatType::F32 => to_bytes(values, f32::to_le_bytes),
        };
        Ok(Self {
            dtype,
            shape: shape.to_vec(),
            bytes,
        })
    }

    /// Reads a tensor of a file, bit for bit.
    pub(super) fn read(file: &SafetensorsFile, key: &str) -> Result<Self, Nf4Error> {
        let info = file.tensor_info(key)?;
        Ok(Self {
            dtype: float_type(info.dtype, key)?,
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
        widen(&self.bytes, self.dtype)
    }

    /// Looks for a NaN or an infinity; `key` is named in the error.
    pub(super) fn check_finite(&self, key: &str) -> Result<(), Nf4Error> {
        check_finite(&self.to_f32(), key)
    }

    pub(super) fn check_shape(&self, expected: &[usize], key: &str) -> Result<(), Nf4Error> {
        if self.shape == expected {
            return Ok(());
        }
        Err(Nf4Error::Shape {
            tensor: key.into(),
            expected: expected.to_vec(),
            given: self.shape.clone(),
        })
    }
}

/// The float type of a stored tensor.
pub(super) fn float_type(dtype: Dtype, key: &str) -> Result<FloatType, Nf4Error> {
    match dtype {
        Dtype::F16 => Ok(FloatType::F16),
        Dtype::BF16 => Ok(FloatType::BF16),
        Dtype::F32 => Ok(FloatType::F32),
        given => Err(Nf4Error::Dtype {
            tensor: key.into(),
            expected: "F16, BF16, F32".into(),
            given: given.to_string(),
        }),
    }
}

/// Little-endian elements as f32.
pub(super) fn widen(bytes: &[u8], dtype: FloatType) -> Vec<f32> {
    fn values<const N: usize>(bytes: &[u8], of: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|bytes| of(*bytes)).collect()
    }
    match dtype {
        FloatType::F16 => values(bytes, |bytes| f16::from_le_bytes(bytes).to_f32()),
        FloatType::BF16 => values(bytes, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        FloatType::F32 => values(bytes, f32::from_le_bytes),
    }
}

fn to_bytes<const N: usize>(values: &[f32], of: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&value| of(value)).collect()
}

pub(super) fn check_finite(values: &[f32], key: &str) -> Result<(), Nf4Error> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Nf4Error::NonFinite {
            tensor: key.into(),
            index,
            given: values[index],
        }),
    }
}

impl View for &DenseTensor {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            FloatType::F16 => Dtype::F16,
            FloatType::BF16 => Dtype::BF16,
            FloatType::F32 => Dtype::F32,
        }
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
