//! Plain float tensors, to host memory or to a device.

use burn::tensor::{Bytes, DType, Device, Shape, Tensor, TensorData};

use super::elements::{elements, float_type, stored_dtype, with_float_type};
use super::weight::{StoredTensor, TensorSource};
use crate::error::Nf4Error;
use crate::format::{FloatElement, FloatType};

/// Reads a tensor that is stored as `T`.
pub(super) fn load_float<T: FloatElement>(
    source: &impl TensorSource,
    key: &str,
) -> Result<(Vec<T>, Vec<usize>), Nf4Error> {
    let stored = source.stored(key)?;
    stored.check_dtype(key, &[stored_dtype(T::FLOAT_TYPE)])?;
    let elements = elements(stored.bytes).into_owned();
    Ok((elements, stored.info.shape.to_vec()))
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
        return Err(Nf4Error::Rank {
            tensor: key.into(),
            expected: D,
            shape: stored.info.shape.to_vec(),
        });
    }
    let to = dtype.unwrap_or(from);
    to.check_device(device)?;
    let data = TensorData::from_bytes(
        float_bytes(&stored, key, from, to, None)?,
        Shape::from(stored.info.shape.to_vec()),
        DType::from(to),
    );
    Ok(Tensor::from_data(data, (device, DType::from(to))))
}

/// The elements of a tensor of type `from`, as `to`, in one allocation; as those of the transpose
/// of a matrix where its rows and columns are given.
///
/// # Errors
/// [`Nf4Error::NonFinite`], with `key`, for the first finite one that `to` cannot hold.
pub(super) fn float_bytes(
    stored: &StoredTensor<'_>,
    key: &str,
    from: FloatType,
    to: FloatType,
    transposed: Option<[usize; 2]>,
) -> Result<Bytes, Nf4Error> {
    with_float_type!(to, T => {
        let values: Vec<T> = with_float_type!(from, S => {
            let values = match transposed {
                Some(dims) => transpose(stored.bytes, dims, read::<S, T>),
                None if from == to => elements::<T>(stored.bytes).into_owned(),
                None => stored
                    .bytes
                    .chunks_exact(from.size_bytes())
                    .map(read::<S, T>)
                    .collect(),
            };
            check_held::<S, T>(stored.bytes, &values, key)?;
            values
        });
        Ok(Bytes::from_elems(values))
    })
}

/// Checks that no finite element has become an infinity. `values` may be in another order.
fn check_held<S: FloatElement, T: FloatElement>(
    stored: &[u8],
    values: &[T],
    key: &str,
) -> Result<(), Nf4Error> {
    let is_finite = |value: &T| value.to_f32().is_finite();
    let holds_all = S::FLOAT_TYPE == T::FLOAT_TYPE || T::FLOAT_TYPE == FloatType::F32;
    if holds_all || values.iter().all(is_finite) {
        return Ok(());
    }
    let stored = stored.chunks_exact(size_of::<S>()).enumerate();
    let lost = stored
        .map(|(index, bytes)| (index, element::<S>(bytes).to_f32()))
        .find_map(|(index, from)| {
            let to = T::from_f32(from);
            (from.is_finite() && !is_finite(&to)).then(|| (index, to.to_f32()))
        });
    match lost {
        None => Ok(()),
        Some((index, given)) => Err(Nf4Error::NonFinite {
            tensor: key.into(),
            index,
            given,
        }),
    }
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
        float_type(self.info.dtype).ok_or_else(|| Nf4Error::Dtype {
            tensor: key.into(),
            expected: "F16, BF16, F32".into(),
            given: self.info.dtype.to_string(),
        })
    }
}
