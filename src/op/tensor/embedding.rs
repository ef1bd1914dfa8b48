//! Rows of a packed weight by their numbers.

use burn::backend::Dispatch;
use burn::tensor::{DType, Int, Shape, Tensor};

use super::check::check_device;
use super::weight::BlockWeight;
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::op::base::{EmbeddingSpec, QuantBackend};

/// Looks up rows of a packed weight: only those that `ids` name are decoded, to the bits of
/// [`BlockWeight::dequantize_rows`].
///
/// Ids may repeat and come in any order. There is no gradient: the weight is frozen. No ids give an
/// empty result.
///
/// An id that no row has, a negative one among them, is an error on the CPU (Flex), as it is a panic in
/// Burn's own embedding. On other devices looking at the ids would wait for the device, so it is not
/// done: such an id gives a row of NaN there, which every later result shows. Nothing outside of the
/// weight is read. (Burn's own embedding reads past its table there.)
///
/// # Shapes
/// - `ids`: `[batch, tokens]`, of any integer type
/// - `weight`: `[vocabulary, d]`
/// - returns `[batch, tokens, d]`, of `dtype`
///
/// ```
/// use burn::tensor::{Device, Distribution, Int, Tensor};
/// use burn_nf4::BlockWeight;
/// use burn_nf4::format::{FloatType, QuantConfig};
/// use burn_nf4::op::embedding;
///
/// let device = Device::default();
/// let table = Tensor::<2>::random([1000, 128], Distribution::Default, &device);
/// let weight = BlockWeight::quantize(table, QuantConfig::default())?;
/// let ids = Tensor::<2, Int>::from_data([[7, 3, 999], [3, 3, 0]], &device);
/// let x: Tensor<3> = embedding(ids, &weight, FloatType::F32)?;
/// assert_eq!(x.dims(), [2, 3, 128]);
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Errors
/// [`Nf4Error::NotAMatrix`] for a weight of another rank, [`Nf4Error::IdRange`] on the CPU at the
/// first id that no row has, [`Nf4Error::Device`] unless both are on one device,
/// [`Nf4Error::DeviceDtype`] if the device has no such type, [`Nf4Error::ElementCount`] if the result
/// would have more elements than can be addressed.
pub fn embedding(
    ids: Tensor<2, Int>,
    weight: &BlockWeight,
    dtype: FloatType,
) -> Result<Tensor<3>, Nf4Error> {
    let [rows, columns] = weight.matrix_dims()?;
    let packed = weight.checked_packed()?;
    let device = ids.device();
    check_device("packed weight", &packed.device(), &device)?;
    dtype.check_device(&device)?;
    let [batch, tokens] = ids.dims();
    let shape = [batch, tokens, columns];
    let bytes = [batch, tokens, columns, dtype.size_bytes()];
    let bytes = bytes.iter().try_fold(1usize, |n, &m| n.checked_mul(m));
    match bytes {
        None => {
            return Err(Nf4Error::ElementCount {
                tensor: "embedded".into(),
                shape: shape.to_vec(),
            });
        }
        Some(0) => return Ok(Tensor::zeros(shape, (&device, DType::from(dtype)))),
        Some(_) => {}
    }
    #[cfg(feature = "flex")]
    crate::op::backends::flex::check_ids("ids", &ids, rows, None)?;
    let spec = EmbeddingSpec {
        layout: *weight.layout(),
        rows,
        columns,
        transposed: weight.is_transposed(),
        ids: batch * tokens,
        dtype,
    };
    let ids = ids.reshape([batch * tokens]).into_dispatch();
    let out = <Dispatch as QuantBackend>::quant_embedding(ids, packed.into_dispatch(), spec);
    Ok(Tensor::<2>::from_dispatch(out).reshape(Shape::from(shape)))
}
