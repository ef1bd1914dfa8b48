//! From Burn's tensors to those of CubeCL and back, outside of operations.

use burn::tensor::Tensor;
use burn_cubecl::Cube;
use burn_cubecl::tensor::CubeTensor;

/// The tensor of CubeCL that a float tensor without autodiff on one of its devices is, if it is one. All that
/// computes it has been submitted then.
pub(in crate::op) fn cube_tensor<const D: usize>(x: Tensor<D>) -> Option<CubeTensor> {
    let primitive = x.try_into_primitive::<Cube>().ok()?;
    #[cfg(feature = "fusion")]
    let primitive = {
        let client = primitive.client.clone();
        client.resolve_tensor_float::<burn_cubecl::CubeBackend>(primitive)
    };
    Some(primitive)
}

/// A float tensor.
pub(in crate::op) fn from_cube<const D: usize>(tensor: CubeTensor) -> Tensor<D> {
    #[cfg(feature = "fusion")]
    let tensor = fused(tensor);
    Tensor::from_primitive::<Cube>(tensor)
}

/// A tensor that is there already, made known to Burn's fusion as one of its own.
#[cfg(feature = "fusion")]
fn fused(tensor: CubeTensor) -> burn::backend::tensor::FloatTensor<Cube> {
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
