//! The operations on CubeCL runtimes: allocate, launch.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::backend::{
    DequantizeSpec, MatmulSpec, Nf4Backend, QuantizeSpec, add_bias, debug_check, decoded_matmul,
};
use crate::launch::{self, MatmulPlan, Product};

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

    fn nf4_matmul(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self> {
        match fused_matmul(&x, &packed, None, spec) {
            Some(y) => y,
            None => decoded_matmul::<Self>(x, packed, spec.weight),
        }
    }

    fn nf4_matmul_bias(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        bias: FloatTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self> {
        match fused_matmul(&x, &packed, Some(&bias), spec) {
            Some(y) => y,
            None => {
                let y = decoded_matmul::<Self>(x, packed, spec.weight);
                add_bias::<Self>(y, bias, spec)
            }
        }
    }
}

/// The product with the packed weight in one launch, where that is the faster way.
fn fused_matmul(
    x: &CubeTensor,
    packed: &CubeTensor,
    bias: Option<&CubeTensor>,
    spec: MatmulSpec,
) -> Option<CubeTensor> {
    let layout = &spec.weight.layout;
    debug_check(packed, layout);
    let product = Product {
        m: spec.m,
        n: spec.weight.rows,
        k: spec.weight.columns,
        dtype: spec.weight.dtype,
    };
    let plan = MatmulPlan::preferred(&x.client, layout, product, bias.is_some())?;
    let x = into_contiguous(x.clone());
    let packed = into_contiguous(packed.clone());
    let bias = bias.map(|bias| into_contiguous(bias.clone()).handle);
    let size = product.m * product.n * product.dtype.size_bytes();
    let out = x.client.empty(size);
    plan.launch(
        &x.client,
        x.handle,
        packed.handle,
        layout,
        bias,
        out.clone(),
    )
    .expect("arguments were validated");
    Some(CubeTensor::new_contiguous(
        x.client,
        x.device,
        Shape::from([product.m, product.n]),
        out,
        product.dtype.into(),
    ))
}
