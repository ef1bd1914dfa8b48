//! Attention on CubeCL runtimes.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use crate::launch::{
    AttentionOperands, AttentionPlan, AttentionProblem, AttentionResults, TokenMajor,
};
use crate::op::attention::{AttentionBackend, AttentionSpec};

impl AttentionBackend for CubeBackend {
    fn attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let empty = like(&q);
        let (plan, operands) = plan(q, k, v, ranges, spec);
        let problem = plan.problem();
        let output = empty(spec.query_shape(), problem.query_bytes(), spec.dtype.into());
        let lse = empty(spec.lse_shape(), problem.lse_bytes(), DType::F32);
        plan.forward(&operands, output.handle.clone(), lse.handle.clone())
            .expect("arguments were validated");
        (output, lse)
    }

    fn attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        output: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let empty = like(&q);
        let (plan, operands) = plan(q, k, v, ranges, spec);
        let problem = plan.problem();
        let results = AttentionResults {
            output: token_major(into_contiguous(output), &plan),
            grad: token_major(grad, &plan),
            lse: into_contiguous(lse).handle,
        };
        let dtype = spec.dtype.into();
        let dq = empty(spec.query_shape(), problem.query_bytes(), dtype);
        let dk = empty(spec.key_shape(), problem.key_bytes(), dtype);
        let dv = empty(spec.key_shape(), problem.key_bytes(), dtype);
        let grads = [&dq, &dk, &dv].map(|tensor| tensor.handle.clone());
        plan.backward(&operands, &results, grads)
            .expect("arguments were validated");
        (dq, dk, dv)
    }
}

fn plan(
    q: CubeTensor,
    k: CubeTensor,
    v: CubeTensor,
    ranges: CubeTensor,
    spec: AttentionSpec,
) -> (AttentionPlan, AttentionOperands) {
    assert_eq!(ranges.dtype, DType::I32, "key ranges are i32");
    let problem = AttentionProblem {
        batch: spec.batch,
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        queries: spec.queries,
        keys: spec.keys,
        head_dim: spec.head_dim,
        range_rows: ranges.meta.shape()[0],
        scale: spec.scale,
        softcap: spec.softcap,
        dtype: spec.dtype,
    };
    let plan = AttentionPlan::new(&q.client, problem, None).expect("arguments were validated");
    let operands = AttentionOperands {
        q: token_major(q, &plan),
        k: token_major(k, &plan),
        v: token_major(v, &plan),
        ranges: into_contiguous(ranges).handle,
    };
    (plan, operands)
}

/// A tensor where it lies, or a contiguous copy if its heads are not, or it is not as the kernels want it.
fn token_major(tensor: CubeTensor, plan: &AttentionPlan) -> TokenMajor {
    let fits = |tensor: &CubeTensor| {
        let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
        let multiple = plan.stride_multiple();
        let steps = (0..3).all(|dim| shape[dim] == 1 || strides[dim].is_multiple_of(multiple));
        let start = tensor.handle.offset_start.unwrap_or(0);
        strides[3] == 1 && steps && start.is_multiple_of(ALIGNMENT_BYTES)
    };
    let tensor = match fits(&tensor) {
        true => tensor,
        false => into_contiguous(tensor),
    };
    let strides = tensor.meta.strides();
    TokenMajor {
        strides: [strides[0], strides[1], strides[2]],
        handle: tensor.handle,
    }
}

/// Where a buffer may begin.
const ALIGNMENT_BYTES: u64 = 16;

/// Makes tensors on the device of one that there is.
fn like(tensor: &CubeTensor) -> impl Fn(Shape, usize, DType) -> CubeTensor + use<> {
    let (client, device) = (tensor.client.clone(), tensor.device.clone());
    move |shape, bytes, dtype| {
        let handle = client.empty(bytes);
        CubeTensor::new_contiguous(client.clone(), device.clone(), shape, handle, dtype)
    }
}
