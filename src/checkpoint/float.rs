//! Plain float tensors, to host memory or to a device.

use burn::tensor::{Bytes, DType, Device, Shape, Tensor, TensorData};
use half::{bf16, f16};
use safetensors::Dtype;

use super::weight::{StoredTensor, TensorSource, stored_dtype};
use crate::error::Nf4Error;
use crate::format::{FloatElement, FloatType};

/// Reads a tensor that is stored as `T`.
pub(super) fn load_float<T: FloatElement>(
    source: &impl TensorSource,
    key: &str,
) -> Result<(Vec<T>, Vec<usize>), Nf4Error> {
    let stored = source.stored(key)?;
    stored.check_dtype(key, &[stored_dtype(T::FLOAT_TYPE)])?;
    Ok((elements(stored.bytes), stored.info.shape.to_vec()))
}

/// Reads a tensor to a device, as `dtype` or as it is stored.
pub(super) fn load_tensor<const D: usize>(
    source: &impl TensorSource,
    key: &str,
    dtype: Option<FloatType>,
    device: &Device,
) -> Result<Tensor<D>, Nf4Error> {
    let stored = source.stored(key)?;
    let from = stored.float_type(key)?;
    if stored.info.shape.len() != D || D == 0 {
        return Err(Nf4Error::Shape {
            tensor: key.into(),
            expected: vec![0; D],
            given: stored.info.shape.to_vec(),
        });
    }
    let to = dtype.unwrap_or(from);
    to.check_device(device)?;
    let data = TensorData::from_bytes(
        float_bytes(&stored, from, to),
        Shape::from(stored.info.shape.to_vec()),
        DType::from(to),
    );
    Ok(Tensor::from_data(data, (device, DType::from(to))))
}

/// The elements of a tensor of type `from`, as `to`, in one allocation.
pub(super) fn float_bytes(stored: &StoredTensor<'_>, from: FloatType, to: FloatType) -> Bytes {
    fn as_type<T: FloatElement>(bytes: &[u8], from: FloatType) -> Bytes {
        let values: Vec<T> = if from == T::FLOAT_TYPE {
            elements(bytes)
        } else {
            match from {
                FloatType::F16 => convert::<f16, T>(bytes),
                FloatType::BF16 => convert::<bf16, T>(bytes),
                FloatType::F32 => convert::<f32, T>(bytes),
            }
        };
        Bytes::from_elems(values)
    }
    match to {
        FloatType::F16 => as_type::<f16>(stored.bytes, from),
        FloatType::BF16 => as_type::<bf16>(stored.bytes, from),
        FloatType::F32 => as_type::<f32>(stored.bytes, from),
    }
}

/// Elements as they are stored: bits are kept, NaNs included.
fn elements<T: FloatElement>(bytes: &[u8]) -> Vec<T> {
    let size = T::FLOAT_TYPE.size_bytes();
    let mut elements = vec![T::zeroed(); bytes.len() / size];
    // A mapped tensor need not be aligned, so its bytes are copied, not cast.
    let target = bytemuck::cast_slice_mut::<T, u8>(&mut elements);
    target.copy_from_slice(bytes);
    if cfg!(target_endian = "big") {
        target.chunks_exact_mut(size).for_each(<[u8]>::reverse);
    }
    elements
}

/// Elements of type `S`, rounded to `T`.
fn convert<S: FloatElement, T: FloatElement>(bytes: &[u8]) -> Vec<T> {
    let size = S::FLOAT_TYPE.size_bytes();
    let one = |chunk: &[u8]| {
        let mut element = S::zeroed();
        let target = bytemuck::bytes_of_mut(&mut element);
        target.copy_from_slice(chunk);
        if cfg!(target_endian = "big") {
            target.reverse();
        }
        T::from_f32(element.to_f32())
    };
    bytes.chunks_exact(size).map(one).collect()
}

impl StoredTensor<'_> {
    /// The float type that a tensor is stored as.
    pub fn float_type(&self, key: &str) -> Result<FloatType, Nf4Error> {
        self.check_dtype(key, &[Dtype::F16, Dtype::BF16, Dtype::F32])?;
        Ok(match self.info.dtype {
            Dtype::F16 => FloatType::F16,
            Dtype::BF16 => FloatType::BF16,
            _ => FloatType::F32,
        })
    }
}
