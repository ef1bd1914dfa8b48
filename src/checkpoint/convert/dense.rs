//! Weights that stay dense.

use crate::checkpoint::elements::{
    cast, elements, float_type, le_bytes, stored_dtype, with_float_type,
};
use crate::checkpoint::{CheckpointWriter, TensorInfo};
use crate::error::Nf4Error;
use crate::format::FloatType;

/// Writes a tensor that is not quantized, rounded to `dtype` if it is of another float type.
pub(crate) fn write_dense(
    writer: &mut CheckpointWriter,
    key: &str,
    info: TensorInfo<'_>,
    bytes: &[u8],
    dtype: Option<FloatType>,
) -> Result<(), Nf4Error> {
    let other = |(stored, dtype): &(FloatType, FloatType)| stored != dtype;
    match float_type(info.dtype).zip(dtype).filter(other) {
        None => writer.write_tensor(key, info.dtype, info.shape, bytes),
        Some((stored, dtype)) => with_float_type!(stored, S => with_float_type!(dtype, T => {
            let rounded = cast::<S, T>(&elements::<S>(bytes), key)?;
            writer.write_tensor(key, stored_dtype(dtype), info.shape, &le_bytes(&rounded))
        })),
    }
}
