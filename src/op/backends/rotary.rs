//! Rotations on each backend.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use crate::op::rotary::{RotaryBackend, RotarySpec};

impl<B: RotaryBackend, C: CheckpointStrategy> RotaryBackend for Autodiff<B, C> {
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: RotarySpec,
    ) -> FloatTensor<Self> {
        let [cos, sin] = [cos, sin].map(|table| table.into_primitive());
        let prep = RotaryBackward.prepare::<C>([x.node()]);
        match prep.compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = B::rotary(x.into_primitive(), cos.clone(), sin.clone(), spec);
                prep.finish((cos, sin, spec), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rotary(x.into_primitive(), cos, sin, spec)),
        }
    }
}

/// The gradient of a rotation is the rotation back of the gradient.
#[derive(Debug)]
struct RotaryBackward;

impl<B: RotaryBackend> Backward<B, 1> for RotaryBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, RotarySpec);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            let (cos, sin, spec) = ops.state;
            grads.register::<B>(parent.id, B::rotary(grad, cos, sin, spec.inverted()));
        }
    }
}

#[cfg(feature = "flex")]
impl RotaryBackend for burn_flex::Flex {
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: RotarySpec,
    ) -> FloatTensor<Self> {
        use half::{bf16, f16};

        use super::flex::{contents, tensor_of};
        use crate::format::{FloatElement, FloatType};
        use crate::host;

        fn rotate<T: FloatElement, D: FloatElement>(
            [x, cos, sin]: &[burn_flex::FlexTensor; 3],
            spec: RotarySpec,
        ) -> burn_flex::FlexTensor {
            let rotation = host::Rotation {
                tokens: spec.tokens,
                heads: spec.heads,
                head_dim: spec.head_dim,
                rotary_dim: spec.rotary_dim,
                table_rows: spec.table_rows,
                inverse: spec.inverse,
            };
            let y = host::rotate::<T, D>(contents(x), contents(cos), contents(sin), rotation);
            tensor_of(y, spec.shape())
        }

        fn by_table<T: FloatElement>(
            operands: &[burn_flex::FlexTensor; 3],
            spec: RotarySpec,
        ) -> burn_flex::FlexTensor {
            match spec.table_dtype {
                FloatType::F16 => rotate::<T, f16>(operands, spec),
                FloatType::BF16 => rotate::<T, bf16>(operands, spec),
                FloatType::F32 => rotate::<T, f32>(operands, spec),
            }
        }

        let operands = [x, cos, sin].map(|tensor| tensor.to_contiguous());
        match spec.dtype {
            FloatType::F16 => by_table::<f16>(&operands, spec),
            FloatType::BF16 => by_table::<bf16>(&operands, spec),
            FloatType::F32 => by_table::<f32>(&operands, spec),
        }
    }
}

#[cfg(feature = "cube")]
impl RotaryBackend for burn_cubecl::CubeBackend {
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: RotarySpec,
    ) -> FloatTensor<Self> {
        use burn_cubecl::kernel::into_contiguous;
        use burn_cubecl::tensor::CubeTensor;

        use crate::launch::{self, RotaryProblem};

        let [x, cos, sin] = [x, cos, sin].map(into_contiguous);
        let problem = RotaryProblem {
            batch: spec.batch,
            tokens: spec.tokens,
            heads: spec.heads,
            head_dim: spec.head_dim,
            rotary_dim: spec.rotary_dim,
            table_rows: spec.table_rows,
            inverse: spec.inverse,
            dtype: spec.dtype,
            table_dtype: spec.table_dtype,
        };
        let out = x.client.empty(problem.out_bytes());
        let tables = [cos.handle, sin.handle];
        launch::rotary(&x.client, problem, x.handle, tables, out.clone())
            .expect("arguments were validated");
        CubeTensor::new_contiguous(x.client, x.device, spec.shape(), out, spec.dtype.into())
    }
}
