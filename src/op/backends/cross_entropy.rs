//! Cross-entropy on each backend.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, TensorMetadata};
use burn::tensor::{DType, Shape};

use crate::op::cross_entropy::{CrossEntropyBackend, CrossEntropySpec};

impl<B: CrossEntropyBackend, C: CheckpointStrategy> CrossEntropyBackend for Autodiff<B, C> {
    fn cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        spec: CrossEntropySpec,
    ) -> FloatTensor<Self> {
        let (logits, node) = logits.into_parts();
        let prep = CrossEntropyBackward.prepare::<C>([node]);
        match prep.compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (loss, gradient) = B::cross_entropy_with_gradient(logits, targets, spec);
                prep.finish((gradient, spec), loss)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::cross_entropy(logits, targets, spec)),
        }
    }

    fn cross_entropy_with_gradient(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        spec: CrossEntropySpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (loss, gradient) =
            B::cross_entropy_with_gradient(logits.into_primitive(), targets, spec);
        (Self::from_inner(loss), Self::from_inner(gradient))
    }

    fn with_gradient(
        value: FloatTensor<Self>,
        parent: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let dtype = parent.dtype();
        let (value, of_value) = value.into_parts();
        let prep = GivenBackward.prepare::<C>([of_value, parent.node()]);
        match prep.compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((gradient.into_primitive(), dtype), value),
            OpsKind::UnTracked(prep) => prep.finish(value),
        }
    }
}

/// Backward of the loss of rows: the gradient of each row, multiplied by the one that comes.
#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: CrossEntropyBackend> Backward<B, 1> for CrossEntropyBackward {
    type State = (FloatTensor<B>, CrossEntropySpec);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [Some(parent)] = ops.parents else { return };
        let (gradient, spec) = ops.state;
        let gradient = match spec.is_root {
            true => gradient,
            false => {
                let grad = B::float_reshape(grad, Shape::from([spec.rows, 1]));
                scaled::<B>(gradient, grad, spec.dtype.into())
            }
        };
        grads.register::<B>(parent.id, gradient);
    }
}

/// Backward of a value whose gradient with respect to the second parent is known.
#[derive(Debug)]
struct GivenBackward;

impl<B: CrossEntropyBackend> Backward<B, 2> for GivenBackward {
    type State = (FloatTensor<B>, DType);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [of_value, of_parent] = ops.parents;
        if let Some(parent) = of_parent {
            let (gradient, dtype) = ops.state;
            let ones = vec![1; gradient.shape().rank()];
            let grad = B::float_reshape(grad.clone(), Shape::from(ones));
            grads.register::<B>(parent.id, scaled::<B>(gradient, grad, dtype));
        }
        if let Some(parent) = of_value {
            grads.register::<B>(parent.id, grad);
        }
    }
}

/// The product in f32, in a type.
fn scaled<B: CrossEntropyBackend>(
    gradient: FloatTensor<B>,
    factor: FloatTensor<B>,
    dtype: DType,
) -> FloatTensor<B> {
    let in_type = |tensor: FloatTensor<B>, dtype: DType| match tensor.dtype() == dtype {
        true => tensor,
        false => B::float_cast(tensor, dtype.into()),
    };
    let product = B::float_mul(in_type(gradient, DType::F32), factor);
    in_type(product, dtype)
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::Element;
    use burn_flex::{Flex, FlexTensor};
    use half::{bf16, f16};

    use super::*;
    use crate::format::{FloatElement, FloatType};
    use crate::host::{self, Simd};
    use crate::op::backends::flex::{contents, tensor_of};

    impl CrossEntropyBackend for Flex {
        fn cross_entropy(
            logits: FloatTensor<Self>,
            targets: IntTensor<Self>,
            spec: CrossEntropySpec,
        ) -> FloatTensor<Self> {
            fn losses<T: FloatElement>(
                logits: &FlexTensor,
                targets: &[i64],
                spec: CrossEntropySpec,
            ) -> Vec<f32> {
                let logits = contents::<T>(logits);
                host::cross_entropy(Simd::detect(), logits, targets, &spec.options)
            }
            let (logits, targets) = (logits.to_contiguous(), numbers(&targets.to_contiguous()));
            let losses = match spec.dtype {
                FloatType::F16 => losses::<f16>(&logits, &targets, spec),
                FloatType::BF16 => losses::<bf16>(&logits, &targets, spec),
                FloatType::F32 => losses::<f32>(&logits, &targets, spec),
            };
            tensor_of(losses, Shape::from([spec.rows]))
        }

        fn cross_entropy_with_gradient(
            logits: FloatTensor<Self>,
            targets: IntTensor<Self>,
            spec: CrossEntropySpec,
        ) -> (FloatTensor<Self>, FloatTensor<Self>) {
            fn losses<T: FloatElement + Element>(
                logits: &mut FlexTensor,
                targets: &[i64],
                spec: CrossEntropySpec,
            ) -> Vec<f32> {
                let start = logits.layout().start_offset();
                let elems = spec.rows * spec.vocabulary;
                let logits = &mut logits.storage_mut::<T>()[start..start + elems];
                host::cross_entropy_gradient(Simd::detect(), logits, targets, &spec.options)
            }
            // Not held twice, or it would be copied before it is written to.
            let mut logits = match logits.is_contiguous() {
                true => logits,
                false => logits.to_contiguous(),
            };
            let targets = numbers(&targets.to_contiguous());
            let losses = match spec.dtype {
                FloatType::F16 => losses::<f16>(&mut logits, &targets, spec),
                FloatType::BF16 => losses::<bf16>(&mut logits, &targets, spec),
                FloatType::F32 => losses::<f32>(&mut logits, &targets, spec),
            };
            (tensor_of(losses, Shape::from([spec.rows])), logits)
        }
    }

    /// Targets, one after the other.
    fn numbers(targets: &FlexTensor) -> Vec<i64> {
        let start = targets.layout().start_offset();
        let end = start + targets.layout().num_elements();
        match targets.dtype() {
            DType::I32 => {
                let targets = &bytemuck::cast_slice::<u8, i32>(targets.bytes())[start..end];
                targets.iter().map(|&target| target.into()).collect()
            }
            _ => bytemuck::cast_slice::<u8, i64>(targets.bytes())[start..end].to_vec(),
        }
    }
}

#[cfg(feature = "cube")]
mod cube {
    use burn::backend::cubecl::dtype_to_elem_type;
    use burn_cubecl::CubeBackend;
    use burn_cubecl::kernel::into_contiguous;
    use burn_cubecl::tensor::CubeTensor;

    use super::*;
    use crate::launch::{self, CrossEntropyProblem};

    impl CrossEntropyBackend for CubeBackend {
        fn cross_entropy(
            logits: FloatTensor<Self>,
            targets: IntTensor<Self>,
            spec: CrossEntropySpec,
        ) -> FloatTensor<Self> {
            launched(&into_contiguous(logits), targets, spec, false)
        }

        fn cross_entropy_with_gradient(
            logits: FloatTensor<Self>,
            targets: IntTensor<Self>,
            spec: CrossEntropySpec,
        ) -> (FloatTensor<Self>, FloatTensor<Self>) {
            let mut logits = into_contiguous(logits);
            if !logits.can_mut() {
                logits = logits.copy();
            }
            let loss = launched(&logits, targets, spec, true);
            (loss, logits)
        }
    }

    fn launched(
        logits: &CubeTensor,
        targets: CubeTensor,
        spec: CrossEntropySpec,
        gradient: bool,
    ) -> CubeTensor {
        let targets = into_contiguous(targets);
        let problem = CrossEntropyProblem {
            rows: spec.rows,
            vocabulary: spec.vocabulary,
            options: spec.options,
            gradient,
            dtype: spec.dtype,
            targets_dtype: dtype_to_elem_type(targets.dtype),
        };
        let loss = logits.client.empty(spec.rows * DType::F32.size());
        let (values, to) = (logits.handle.clone(), loss.clone());
        launch::cross_entropy(&logits.client, problem, values, targets.handle, to)
            .expect("arguments were validated");
        let (client, device) = (logits.client.clone(), logits.device.clone());
        CubeTensor::new_contiguous(client, device, Shape::from([spec.rows]), loss, DType::F32)
    }
}
