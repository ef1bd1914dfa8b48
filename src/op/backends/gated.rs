//! Gates on each backend, with gradients.

use burn::backend::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use crate::op::gated::{GatedBackend, GatedSpec};

impl<B: GatedBackend, C: CheckpointStrategy> GatedBackend for Autodiff<B, C> {
    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, spec: GatedSpec) -> FloatTensor<Self> {
        let kind = GatedBackward.prepare::<C>([gate.node(), up.node()]);
        match kind.compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let ids = [prep.checkpoint(&gate), prep.checkpoint(&up)];
                let y = B::gated(gate.into_primitive(), up.into_primitive(), spec);
                prep.finish((ids, spec), y)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::gated(gate.into_primitive(), up.into_primitive(), spec))
            }
        }
    }

    fn gated_backward(
        _gate: FloatTensor<Self>,
        _up: FloatTensor<Self>,
        _grad: FloatTensor<Self>,
        _spec: GatedSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unimplemented!("the backward pass calls it on the backend under autodiff")
    }
}

#[derive(Debug)]
struct GatedBackward;

impl<B: GatedBackend> Backward<B, 2> for GatedBackward {
    type State = ([NodeId; 2], GatedSpec);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let (ids, spec) = ops.state;
        let [gate, up] = ids.map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
        let grad = grads.consume::<B>(&ops.node);
        let (d_gate, d_up) = B::gated_backward(gate, up, grad, spec);
        for (parent, gradient) in ops.parents.into_iter().zip([d_gate, d_up]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::Shape;
    use burn_flex::{Flex, FlexTensor};
    use half::{bf16, f16};

    use super::*;
    use crate::format::{FloatElement, FloatType};
    use crate::host::{self, Simd};
    use crate::op::backends::flex::{contents, tensor_of};

    impl GatedBackend for Flex {
        fn gated(
            gate: FloatTensor<Self>,
            up: FloatTensor<Self>,
            spec: GatedSpec,
        ) -> FloatTensor<Self> {
            fn forward<T: FloatElement>(
                [gate, up]: &[FlexTensor; 2],
                spec: GatedSpec,
            ) -> FlexTensor {
                let (gate, up) = (contents::<T>(gate), contents(up));
                let y = host::gated(Simd::detect(), gate, up, spec.activation);
                tensor_of(y, Shape::from([spec.elems]))
            }

            let operands = [gate, up].map(|tensor| tensor.to_contiguous());
            match spec.dtype {
                FloatType::F16 => forward::<f16>(&operands, spec),
                FloatType::BF16 => forward::<bf16>(&operands, spec),
                FloatType::F32 => forward::<f32>(&operands, spec),
            }
        }

        fn gated_backward(
            gate: FloatTensor<Self>,
            up: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            spec: GatedSpec,
        ) -> (FloatTensor<Self>, FloatTensor<Self>) {
            fn backward<T: FloatElement>(
                operands: &[FlexTensor; 3],
                spec: GatedSpec,
            ) -> (FlexTensor, FlexTensor) {
                let [gate, up, grad] = operands.each_ref().map(contents::<T>);
                let gradients =
                    host::gated_backward(Simd::detect(), [gate, up], grad, spec.activation);
                let shape = Shape::from([spec.elems]);
                let [of_gate, of_up] = gradients.map(|values| tensor_of(values, shape.clone()));
                (of_gate, of_up)
            }

            let operands = [gate, up, grad].map(|tensor| tensor.to_contiguous());
            match spec.dtype {
                FloatType::F16 => backward::<f16>(&operands, spec),
                FloatType::BF16 => backward::<bf16>(&operands, spec),
                FloatType::F32 => backward::<f32>(&operands, spec),
            }
        }
    }
}

#[cfg(feature = "cube")]
mod cube {
    use burn::tensor::Shape;
    use burn_cubecl::CubeBackend;
    use burn_cubecl::kernel::into_contiguous;
    use burn_cubecl::tensor::CubeTensor;

    use super::*;
    use crate::launch::{self, GatedProblem};

    impl GatedBackend for CubeBackend {
        fn gated(
            gate: FloatTensor<Self>,
            up: FloatTensor<Self>,
            spec: GatedSpec,
        ) -> FloatTensor<Self> {
            let [gate, up] = [gate, up].map(into_contiguous);
            let out = empty_like(&gate, spec);
            let operands = [gate.handle, up.handle];
            launch::gated(&gate.client, problem(spec), operands, out.handle.clone())
                .expect("arguments were validated");
            out
        }

        fn gated_backward(
            gate: FloatTensor<Self>,
            up: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            spec: GatedSpec,
        ) -> (FloatTensor<Self>, FloatTensor<Self>) {
            let [gate, up, grad] = [gate, up, grad].map(into_contiguous);
            let (d_gate, d_up) = (empty_like(&gate, spec), empty_like(&gate, spec));
            launch::gated_backward(
                &gate.client,
                problem(spec),
                [gate.handle, up.handle],
                grad.handle,
                [d_gate.handle.clone(), d_up.handle.clone()],
            )
            .expect("arguments were validated");
            (d_gate, d_up)
        }
    }

    fn problem(spec: GatedSpec) -> GatedProblem {
        GatedProblem {
            elems: spec.elems,
            activation: spec.activation,
            dtype: spec.dtype,
        }
    }

    fn empty_like(x: &CubeTensor, spec: GatedSpec) -> CubeTensor {
        let handle = x.client.empty(spec.elems * spec.dtype.size_bytes());
        let (client, device) = (x.client.clone(), x.device.clone());
        let shape = Shape::from([spec.elems]);
        CubeTensor::new_contiguous(client, device, shape, handle, spec.dtype.into())
    }
}
