//! A float tensor in host memory, of any of the dtypes of an adapter.

use std::borrow::Cow;

use safetensors::tensor::View;

use crate::checkpoint::elements::{elements, float_type, le_bytes, stored_dtype, with_float_type};
use crate::checkpoint::{Dtype, SafetensorsFile};
use crate::error::Nf4Error;
use crate::format::{FloatElement, FloatType};

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

    /// Reads a tensor of a file, bit for bit.
    pub(super) fn read(file: &SafetensorsFile, key: &str) -> Result<Self, Nf4Error> {
        let info = file.tensor_info(key)?;
        let dtype = float_type(info.dtype).ok_or_else(|| Nf4Error::Dtype {
            tensor: key.into(),
            expected: "F16, BF16, F32".into(),
            given: info.dtype.to_string(),
        })?;
        Ok(Self {
            dtype,
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

pub(super) fn widen<T: FloatElement>(elements: &[T]) -> Vec<f32> {
    elements.iter().map(|element| element.to_f32()).collect()
}

/// Looks for a NaN or an infinity; `key` is named in the error.
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
