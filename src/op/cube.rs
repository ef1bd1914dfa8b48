//! The operations on CubeCL runtimes: allocate, launch.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::backend::{DequantizeSpec, Nf4Backend, QuantizeSpec, debug_check};
use crate::launch;

impl Nf4Backend for CubeBackend {
    fn nf4_quantize(weight: FloatTensor<Self>, spec: QuantizeSpec) -> IntTensor<Self> {
        let weight = into_contiguous(weight);
        let packed = launch::quantize(
            &weight.client,
            weight.handle,
            spec.dtype,
            &spec.shape,
            &spec.layout,
        )
        .expect("arguments were validated");
        CubeTensor::new_contiguous(
            weight.client,
            weight.device,
            Shape::from([spec.layout.words]),
            packed,
            DType::U32,
        )
    }

    fn nf4_dequantize(packed: IntTensor<Self>, spec: DequantizeSpec) -> FloatTensor<Self> {
        debug_check(&packed, &spec.layout);
        let packed = into_contiguous(packed);
        let len = spec.rows * spec.columns;
        let out = packed.client.empty(len * spec.dtype.size_bytes());
        launch::dequantize(
            &packed.client,
            packed.handle,
            &spec.layout,
            spec.start,
            len,
            spec.dtype,
            out.clone(),
            None,
        )
        .expect("arguments were validated");
        CubeTensor::new_contiguous(
            packed.client,
            packed.device,
            Shape::from([spec.rows, spec.columns]),
            out,
            spec.dtype.into(),
        )
    }
}
