//! The operations on CubeCL runtimes: allocate, launch.

use burn::backend::cubecl::dtype_to_elem_type;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use cubecl::prelude::Client;

#[cfg(feature = "cublaslt")]
use super::cublaslt;
use super::tune::{self, Inputs, LoraInputs};
use crate::error::Nf4Error;
use crate::launch::{
    self, DequantizePlan, EmbeddingPlan, EmbeddingProblem, MatmulPlan, MatmulVariant,
};
#[cfg(feature = "cublaslt")]
use crate::op::base::DenseSpec;
use crate::op::base::{
    DequantizeSpec, EmbeddingSpec, LoraSpec, MatmulSpec, MatmulStrategy, QuantBackend,
    QuantizeSpec, debug_check,
};
use crate::op::reproducible::is_reproducible;

impl QuantBackend for CubeBackend {
    fn quant_quantize(weight: FloatTensor<Self>, spec: QuantizeSpec) -> IntTensor<Self> {
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
            Shape::from([spec.layout.words()]),
            packed,
            DType::U32,
        )
    }

    fn quant_dequantize(packed: IntTensor<Self>, spec: DequantizeSpec) -> FloatTensor<Self> {
        debug_check(&packed, &spec.layout);
        let packed = into_contiguous(packed);
        let end = spec.start.checked_add(spec.elems());
        let elems = spec.start..end.expect("as many elements as a weight can have");
        let plan = DequantizePlan::new(&packed.client, &spec.layout, elems, spec.dtype, None)
            .expect("arguments were validated");
        let out = packed.client.empty(plan.out_bytes());
        plan.launch(packed.handle, out.clone())
            .expect("arguments were validated");
        CubeTensor::new_contiguous(
            packed.client,
            packed.device,
            Shape::from([spec.rows, spec.columns]),
            out,
            spec.dtype.into(),
        )
    }

    fn quant_embedding(
        ids: IntTensor<Self>,
        packed: IntTensor<Self>,
        spec: EmbeddingSpec,
    ) -> FloatTensor<Self> {
        debug_check(&packed, &spec.layout);
        let (ids, packed) = (into_contiguous(ids), into_contiguous(packed));
        let problem = EmbeddingProblem {
            rows: spec.rows,
            columns: spec.columns,
            transposed: spec.transposed,
            ids: spec.ids,
            ids_dtype: dtype_to_elem_type(ids.dtype),
            dtype: spec.dtype,
        };
        let plan = EmbeddingPlan::new(&packed.client, &spec.layout, problem)
            .expect("arguments were validated");
        let out = packed.client.empty(plan.out_bytes());
        plan.launch(packed.handle, ids.handle, out.clone())
            .expect("arguments were validated");
        CubeTensor::new_contiguous(
            packed.client,
            packed.device,
            Shape::from([spec.ids, spec.columns]),
            out,
            spec.dtype.into(),
        )
    }

    fn quant_matmul(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self> {
        matmul(x, packed, None, None, spec)
    }

    fn quant_matmul_bias(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        bias: FloatTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self> {
        matmul(x, packed, Some(bias), None, spec)
    }

    fn quant_matmul_lora(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: LoraSpec,
    ) -> FloatTensor<Self> {
        let lora = LoraInputs::new(a, b, spec);
        matmul(x, packed, None, Some(lora), spec.matmul)
    }

    fn quant_matmul_bias_lora(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        bias: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: LoraSpec,
    ) -> FloatTensor<Self> {
        let lora = LoraInputs::new(a, b, spec);
        matmul(x, packed, Some(bias), Some(lora), spec.matmul)
    }

    #[cfg(feature = "cublaslt")]
    fn dense_matmul(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        spec: DenseSpec,
    ) -> FloatTensor<Self> {
        cublaslt::product(lhs, rhs, None, None, spec)
    }

    #[cfg(feature = "cublaslt")]
    fn dense_matmul_bias(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        spec: DenseSpec,
    ) -> FloatTensor<Self> {
        cublaslt::product(lhs, rhs, None, Some(bias), spec)
    }

    #[cfg(feature = "cublaslt")]
    fn dense_matmul_add(
        addend: FloatTensor<Self>,
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        spec: DenseSpec,
    ) -> FloatTensor<Self> {
        cublaslt::product(lhs, rhs, Some(addend), None, spec)
    }
}

fn matmul(
    x: CubeTensor,
    packed: CubeTensor,
    bias: Option<CubeTensor>,
    lora: Option<LoraInputs>,
    spec: MatmulSpec,
) -> CubeTensor {
    debug_check(&packed, &spec.weight.layout);
    let inputs = Inputs {
        x: into_contiguous(x),
        packed: into_contiguous(packed),
        bias: bias.map(into_contiguous),
        lora,
        spec,
    };
    match spec.strategy {
        MatmulStrategy::Auto if !is_reproducible() => tune::fastest(inputs),
        MatmulStrategy::Auto | MatmulStrategy::Rule => tune::by_rule(inputs),
        strategy => tune::run(inputs, kernel(strategy), None).expect("arguments were validated"),
    }
}

/// The kernel that a strategy asks for.
fn kernel(strategy: MatmulStrategy) -> Option<MatmulVariant> {
    match strategy {
        MatmulStrategy::Auto | MatmulStrategy::Rule | MatmulStrategy::Decode => None,
        MatmulStrategy::Gemv => Some(MatmulVariant::Gemv),
        MatmulStrategy::TensorCore => Some(MatmulVariant::TensorCore),
        MatmulStrategy::Levels => Some(MatmulVariant::Levels),
    }
}

/// Checks that a device can compute a product with a kernel that was asked for.
pub(in crate::op) fn check_strategy(
    client: &Client,
    spec: MatmulSpec,
    bias: bool,
) -> Result<(), Nf4Error> {
    let Some(variant) = kernel(spec.strategy) else {
        return Ok(());
    };
    let layout = &spec.weight.layout;
    MatmulPlan::new(client, layout, spec.product(), bias, Some(variant)).map(drop)
}
