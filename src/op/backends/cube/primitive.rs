//! From Burn's tensors to those of CubeCL and back, outside of operations.

use burn::backend::tensor::FloatTensor;
use burn::tensor::kind::Basic;
use burn::tensor::{BackendPrimitive, Tensor};
use burn_cubecl::Cube;
use burn_cubecl::tensor::CubeTensor;

/// Floats or integers, which are one type on CubeCL.
pub(crate) trait Kind:
    Basic + BackendPrimitive<Cube, Primitive = FloatTensor<Cube>>
{
}

impl<K: Basic + BackendPrimitive<Cube, Primitive = FloatTensor<Cube>>> Kind for K {}

/// The tensor of CubeCL that a tensor without autodiff on one of its devices is, if it is one. All that computes it
/// has been submitted then, and all that was queued before it.
pub(crate) fn cube_tensor<const D: usize, K: Kind>(x: Tensor<D, K>) -> Option<CubeTensor> {
    let primitive = x.try_into_primitive::<Cube>().ok()?;
    #[cfg(feature = "fusion")]
    let primitive = {
        use burn_cubecl::CubeBackend;

        let client = primitive.client.clone();
        match primitive.dtype.is_float() {
            true => client.resolve_tensor_float::<CubeBackend>(primitive),
            false => client.resolve_tensor_int::<CubeBackend>(primitive),
        }
    };
    Some(primitive)
}

/// A tensor of that kind.
pub(crate) fn from_cube<const D: usize, K: Kind>(tensor: CubeTensor) -> Tensor<D, K> {
    #[cfg(feature = "fusion")]
    let tensor = fused(tensor);
    Tensor::from_primitive::<Cube>(tensor)
}

/// A tensor that is there already, made known to Burn's fusion as one of its own.
#[cfg(feature = "fusion")]
fn fused(tensor: CubeTensor) -> FloatTensor<Cube> {
    use burn::backend::fusion::custom::{CustomOpIr, OperationIr, StreamId, TensorIr};
    use burn::backend::fusion::{NoOp, get_client};
    use burn_cubecl::CubeBackend;

    let client = get_client::<CubeBackend>(&tensor.device);
    let (shape, dtype) = (tensor.meta.shape.clone(), tensor.dtype);
    let id = client.register_tensor_handle(tensor.into());
    let out = TensorIr::uninit(id, shape, dtype);
    let made = OperationIr::Custom(CustomOpIr::new("from_cube", &[], &[out]));
    let mut outputs = client.register(StreamId::current(), made, NoOp::<CubeBackend>::new());
    outputs.remove(0)
}
