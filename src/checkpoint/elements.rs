//! The float elements of stored tensors, and casts between their types.

use std::borrow::Cow;

use rayon::prelude::*;
use safetensors::Dtype;

use crate::error::Nf4Error;
pub(crate) use crate::format::with_float_type;
use crate::format::{FloatElement, FloatType};

/// Fewer elements than this are cast by one thread.
const TASK_ELEMS: usize = 1 << 16;

/// The dtypes of weights that are not quantized.
pub(super) const FLOATS: [Dtype; 3] = [Dtype::F16, Dtype::BF16, Dtype::F32];

/// The type of a stored float tensor; `None` for integers and for floats that are not weights'.
pub(crate) fn float_type(dtype: Dtype) -> Option<FloatType> {
    match dtype {
        Dtype::F16 => Some(FloatType::F16),
        Dtype::BF16 => Some(FloatType::BF16),
        Dtype::F32 => Some(FloatType::F32),
        _ => None,
    }
}

/// As [`float_type`], but any other dtype is an error.
///
/// # Errors
/// [`Nf4Error::Dtype`], with `key`.
pub(crate) fn expect_float(dtype: Dtype, key: &str) -> Result<FloatType, Nf4Error> {
    float_type(dtype).ok_or_else(|| dtype_error(key, &FLOATS, dtype))
}

/// The error for a tensor of another dtype than those allowed.
pub(super) fn dtype_error(key: &str, allowed: &[Dtype], given: Dtype) -> Nf4Error {
    Nf4Error::Dtype {
        tensor: key.into(),
        expected: dtype_names(allowed),
        given: given.to_string(),
    }
}

pub(super) fn dtype_names(dtypes: &[Dtype]) -> String {
    let names: Vec<String> = dtypes.iter().map(Dtype::to_string).collect();
    names.join(", ")
}

/// The dtype under which a type is stored.
pub(crate) fn stored_dtype(float_type: FloatType) -> Dtype {
    match float_type {
        FloatType::F16 => Dtype::F16,
        FloatType::BF16 => Dtype::BF16,
        FloatType::F32 => Dtype::F32,
    }
}

/// The elements of a tensor stored as `T`; in place, where the file has them aligned.
pub(crate) fn elements<T: FloatElement>(bytes: &[u8]) -> Cow<'_, [T]> {
    if cfg!(target_endian = "little")
        && let Ok(elements) = bytemuck::try_cast_slice(bytes)
    {
        return elements.into();
    }
    let mut elements = vec![T::zeroed(); bytes.len() / size_of::<T>()];
    let target = bytemuck::cast_slice_mut::<T, u8>(&mut elements);
    target.copy_from_slice(&bytes[..target.len()]);
    swap_bytes::<T>(target);
    elements.into()
}

/// The bytes to store; the reverse of [`elements`].
pub(crate) fn le_bytes<T: FloatElement>(elements: &[T]) -> Cow<'_, [u8]> {
    let bytes = bytemuck::cast_slice(elements);
    if cfg!(target_endian = "little") {
        return bytes.into();
    }
    let mut bytes = bytes.to_vec();
    swap_bytes::<T>(&mut bytes);
    bytes.into()
}

fn swap_bytes<T>(bytes: &mut [u8]) {
    if cfg!(target_endian = "big") {
        bytes
            .chunks_exact_mut(size_of::<T>())
            .for_each(<[u8]>::reverse);
    }
}

/// The values of elements, exactly.
pub(crate) fn widen<T: FloatElement>(elements: &[T]) -> Vec<f32> {
    elements.iter().map(|element| element.to_f32()).collect()
}

/// The transpose of a `[rows, columns]` matrix whose elements are read by their index.
pub(crate) fn transpose<T: FloatElement>(
    [rows, columns]: [usize; 2],
    element: impl Fn(usize) -> T,
) -> Vec<T> {
    /// Elements on a side of the tiles in which both matrices stay in the cache.
    const TILE: usize = 32;
    let mut out = vec![T::zeroed(); rows * columns];
    for row_start in (0..rows).step_by(TILE) {
        for column_start in (0..columns).step_by(TILE) {
            for column in column_start..columns.min(column_start + TILE) {
                for row in row_start..rows.min(row_start + TILE) {
                    out[column * rows + row] = element(row * columns + column);
                }
            }
        }
    }
    out
}

/// Rounds every element to nearest.
///
/// # Errors
/// [`Nf4Error::NonFinite`], with `key`, at the first finite one that has no finite neighbour.
pub(crate) fn cast<S: FloatElement, T: FloatElement>(
    elements: &[S],
    key: &str,
) -> Result<Vec<T>, Nf4Error> {
    let cast: Vec<T> = elements
        .par_iter()
        .with_min_len(TASK_ELEMS)
        .map(|element| T::from_f32(element.to_f32()))
        .collect();
    let overflows = |(from, to): (&S, &T)| from.to_f32().is_finite() && !to.to_f32().is_finite();
    match elements.par_iter().zip(&cast).position_first(overflows) {
        None => Ok(cast),
        Some(index) => Err(Nf4Error::NonFinite {
            tensor: key.into(),
            index,
            given: cast[index].to_f32(),
        }),
    }
}
