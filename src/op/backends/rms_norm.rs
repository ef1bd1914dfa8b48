//! Norms on each backend.

use burn::backend::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use crate::op::rms_norm::{RmsNormBackend, RmsNormSpec, gradients};

impl<B: RmsNormBackend, C: CheckpointStrategy> RmsNormBackend for Autodiff<B, C> {
    fn rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        spec: RmsNormSpec,
    ) -> FloatTensor<Self> {
        let prep = RmsNormBackward.prepare::<C>([x.node(), weight.node()]);
        match prep.compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let ids = [prep.checkpoint(&x), prep.checkpoint(&weight)];
                let [x, weight] = [x, weight].map(|tensor| tensor.into_primitive());
                prep.finish((ids, spec), B::rms_norm(x, weight, spec))
            }
            OpsKind::UnTracked(prep) => {
                let [x, weight] = [x, weight].map(|tensor| tensor.into_primitive());
                prep.finish(B::rms_norm(x, weight, spec))
            }
        }
    }
}

#[derive(Debug)]
struct RmsNormBackward;

impl<B: RmsNormBackend> Backward<B, 2> for RmsNormBackward {
    type State = ([NodeId; 2], RmsNormSpec);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let (ids, spec) = ops.state;
        let [x, weight] = ids.map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
        let grad = grads.consume::<B>(&ops.node);
        let [of_x, of_weight] = ops.parents;
        let (dx, d_weight) = gradients::<B>(x, weight, grad, of_weight.is_some(), spec);
        if let Some(parent) = of_x {
            grads.register::<B>(parent.id, dx);
        }
        if let (Some(parent), Some(d_weight)) = (of_weight, d_weight) {
            grads.register::<B>(parent.id, d_weight);
        }
    }
}

#[cfg(feature = "flex")]
impl RmsNormBackend for burn_flex::Flex {
    fn rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        spec: RmsNormSpec,
    ) -> FloatTensor<Self> {
        use half::{bf16, f16};

        use super::flex::{contents, tensor_of};
        use crate::format::{FloatElement, FloatType};
        use crate::host;

        fn norm<T: FloatElement>(
            [x, weight]: &[burn_flex::FlexTensor; 2],
            spec: RmsNormSpec,
        ) -> burn_flex::FlexTensor {
            let RmsNormSpec {
                size, eps, form, ..
            } = spec;
            let norm = host::RmsNorm { size, eps, form };
            tensor_of(
                host::rms_norm::<T>(contents(x), contents(weight), norm),
                spec.shape(),
            )
        }

        let operands = [x, weight].map(|tensor| tensor.to_contiguous());
        match spec.dtype {
            FloatType::F16 => norm::<f16>(&operands, spec),
            FloatType::BF16 => norm::<bf16>(&operands, spec),
            FloatType::F32 => norm::<f32>(&operands, spec),
        }
    }
}

#[cfg(feature = "cube")]
mod cube {
    use burn_cubecl::CubeBackend;
    use burn_cubecl::kernel::into_contiguous;
    use burn_cubecl::tensor::CubeTensor;

    use super::*;
    use crate::launch::{self, Residual, RmsNormProblem};

    impl RmsNormBackend for CubeBackend {
        fn rms_norm(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            spec: RmsNormSpec,
        ) -> FloatTensor<Self> {
            launched(x, None, weight, spec).1
        }

        fn add_rms_norm(
            x: FloatTensor<Self>,
            y: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            spec: RmsNormSpec,
        ) -> (FloatTensor<Self>, FloatTensor<Self>) {
            launched(x, Some(y), weight, spec)
        }
    }

    /// The sum, or `x` without one, and the norm.
    fn launched(
        x: CubeTensor,
        y: Option<CubeTensor>,
        weight: CubeTensor,
        spec: RmsNormSpec,
    ) -> (CubeTensor, CubeTensor) {
        let [x, weight] = [x, weight].map(into_contiguous);
        let problem = RmsNormProblem {
            rows: spec.rows,
            size: spec.size,
            eps: spec.eps as f32,
            form: spec.form,
            dtype: spec.dtype,
        };
        let empty = || {
            let handle = x.client.empty(problem.out_bytes());
            let (client, device) = (x.client.clone(), x.device.clone());
            CubeTensor::new_contiguous(client, device, spec.shape(), handle, spec.dtype.into())
        };
        let out = empty();
        let (sum, residual) = match y.map(into_contiguous) {
            None => (x.clone(), None),
            Some(y) => {
                let sum = empty();
                let residual = Residual {
                    added: y.handle,
                    sum: sum.handle.clone(),
                };
                (sum, Some(residual))
            }
        };
        let (of_x, to) = (x.handle.clone(), out.handle.clone());
        launch::rms_norm(&x.client, problem, of_x, residual, weight.handle, to)
            .expect("arguments were validated");
        (sum, out)
    }
}
