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
        float_bytes(&stored, from, to, None),
        Shape::from(stored.info.shape.to_vec()),
        DType::from(to),
    );
    Ok(Tensor::from_data(data, (device, DType::from(to))))
}

/// The elements of a tensor of type `from`, as `to`, in one allocation; as those of the transpose
/// of a matrix where its rows and columns are given.
pub(super) fn float_bytes(
    stored: &StoredTensor<'_>,
    from: FloatType,
    to: FloatType,
    transposed: Option<[usize; 2]>,
) -> Bytes {
    fn as_type<T: FloatElement>(
        bytes: &[u8],
        from: FloatType,
        transposed: Option<[usize; 2]>,
    ) -> Bytes {
        let values: Vec<T> = match (transposed, from) {
            (Some(dims), FloatType::F16) => transpose(bytes, dims, read::<f16, T>),
            (Some(dims), FloatType::BF16) => transpose(bytes, dims, read::<bf16, T>),
            (Some(dims), FloatType::F32) => transpose(bytes, dims, read::<f32, T>),
            (None, from) if from == T::FLOAT_TYPE => elements(bytes),
            (None, FloatType::F16) => bytes.chunks_exact(2).map(read::<f16, T>).collect(),
            (None, FloatType::BF16) => bytes.chunks_exact(2).map(read::<bf16, T>).collect(),
            (None, FloatType::F32) => bytes.chunks_exact(4).map(read::<f32, T>).collect(),
        };
        Bytes::from_elems(values)
    }
    match to {
        FloatType::F16 => as_type::<f16>(stored.bytes, from, transposed),
        FloatType::BF16 => as_type::<bf16>(stored.bytes, from, transposed),
        FloatType::F32 => as_type::<f32>(stored.bytes, from, transposed),
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

/// One stored element of type `S`, as `T`. Without a conversion the bits are kept.
fn read<S: FloatElement, T: FloatElement>(bytes: &[u8]) -> T {
    if S::FLOAT_TYPE == T::FLOAT_TYPE {
        return element(bytes);
    }
    T::from_f32(element::<S>(bytes).to_f32())
}

fn element<T: FloatElement>(bytes: &[u8]) -> T {
    let mut element = T::zeroed();
    let target = bytemuck::bytes_of_mut(&mut element);
    target.copy_from_slice(bytes);
    if cfg!(target_endian = "big") {
        target.reverse();
    }
    element
}

/// The elements of the transpose of a stored matrix.
fn transpose<T: FloatElement>(
    bytes: &[u8],
    [rows, columns]: [usize; 2],
    read: impl Fn(&[u8]) -> T,
) -> Vec<T> {
    /// Elements on a side of the tiles in which both matrices stay in the cache.
    const TILE: usize = 32;
    let mut out = vec![T::zeroed(); rows * columns];
    let size = bytes.len() / out.len().max(1);
    for row_start in (0..rows).step_by(TILE) {
        for column_start in (0..columns).step_by(TILE) {
            for column in column_start..columns.min(column_start + TILE) {
                for row in row_start..rows.min(row_start + TILE) {
                    let at = (row * columns + column) * size;
                    out[column * rows + row] = read(&bytes[at..at + size]);
                }
            }
        }
    }
    out
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
