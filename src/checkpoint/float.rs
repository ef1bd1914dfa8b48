//! Plain float tensors, to host memory or to a device.

use burn::tensor::{Bytes, DType, Device, Shape, Tensor, TensorData};

use super::elements::{elements, expect_float, stored_dtype, transpose, with_float_type};
use super::stored::{StoredTensor, TensorSource};
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
    let from = expect_float(stored.info.dtype, key)?;
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
                Some(dims) => transpose(dims, |index| {
                    let size = size_of::<S>();
                    read::<S, T>(&stored.bytes[index * size..][..size])
                }),
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
