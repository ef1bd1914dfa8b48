//! Norms on each backend.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use super::shared_gradient::SharedGradient;
use crate::op::rms_norm::{RmsNormBackend, RmsNormSpec, gradient_of_weight};

// What is normalised and goes past the norm too is three nodes: one that it comes from, and one for each
// way on. Those hand their gradients to the first, which adds both in one operation.
impl<B: RmsNormBackend, C: CheckpointStrategy> RmsNormBackend for Autodiff<B, C> {
    fn rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        spec: RmsNormSpec,
    ) -> FloatTensor<Self> {
        Self::rms_norm_beside(x, weight, spec).1
    }

    fn rms_norm_beside(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        spec: RmsNormSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (kind, x) = (Origin.prepare::<C>([x.node()]), x.into_primitive());
        let values = B::rms_norm(x.clone(), weight.primitive().clone(), spec);
        let kind = kind.compute_bound().stateful();
        let [x, values] = ways(kind, x, values, weight, spec);
        (x, values)
    }

    fn add_rms_norm(
        x: FloatTensor<Self>,
        y: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        spec: RmsNormSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let kind = Origin.prepare::<C>([x.node(), y.node()]);
        let [x, y] = [x, y].map(|tensor| tensor.into_primitive());
        let (sum, values) = B::add_rms_norm(x, y, weight.primitive().clone(), spec);
        let kind = kind.compute_bound().stateful();
        let [sum, values] = ways(kind, sum, values, weight, spec);
        (sum, values)
    }
}

type Tracked<B, C> = FloatTensor<Autodiff<B, C>>;

/// The nodes of what was normalised, with what they hold.
fn ways<B: RmsNormBackend, C: CheckpointStrategy, const N: usize>(
    kind: OpsKind<Origin, B, OriginState<B>, C, N>,
    x: FloatTensor<B>,
    normed: FloatTensor<B>,
    weight: Tracked<B, C>,
    spec: RmsNormSpec,
) -> [Tracked<B, C>; 2] {
    let (of_past, of_norm) = (SharedGradient::default(), SharedGradient::default());
    let origin = match kind {
        OpsKind::Tracked(prep) => {
            let ways = [of_past.clone(), of_norm.clone()];
            let state = (ways, x.clone(), weight.primitive().clone(), spec);
            prep.finish(state, x.clone())
        }
        OpsKind::UnTracked(prep) => prep.finish(x.clone()),
    };
    let past = match Past
        .prepare::<C>([origin.node()])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => prep.finish(of_past, x.clone()),
        OpsKind::UnTracked(prep) => prep.finish(x.clone()),
    };
    let kind = Norm.prepare::<C>([origin.node(), weight.node()]);
    let normed = match kind.compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((of_norm, x, spec), normed),
        OpsKind::UnTracked(prep) => prep.finish(normed),
    };
    [past, normed]
}

/// What is normalised: its gradient is that of all its parents.
#[derive(Debug)]
struct Origin;

type OriginState<B> = (
    [SharedGradient<FloatTensor<B>>; 2],
    FloatTensor<B>,
    FloatTensor<B>,
    RmsNormSpec,
);

impl<B: RmsNormBackend, const N: usize> Backward<B, N> for Origin {
    type State = OriginState<B>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([of_past, of_norm], x, weight, spec) = ops.state;
        let gradient = match (of_past.take(), of_norm.take()) {
            (None, None) => return,
            (Some(past), None) => past,
            (None, Some(grad)) => B::rms_norm_backward(x, weight, grad, spec),
            (Some(past), Some(grad)) => B::rms_norm_backward_add(x, weight, grad, past, spec),
        };
        for parent in ops.parents.into_iter().flatten() {
            grads.register::<B>(parent.id, gradient.clone());
        }
    }
}

/// The way past the norm.
#[derive(Debug)]
struct Past;

impl<B: RmsNormBackend> Backward<B, 1> for Past {
    type State = SharedGradient<FloatTensor<B>>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        ops.state.put(grads.consume::<B>(&ops.node));
    }
}

/// The norm.
#[derive(Debug)]
struct Norm;

impl<B: RmsNormBackend> Backward<B, 2> for Norm {
    type State = (SharedGradient<FloatTensor<B>>, FloatTensor<B>, RmsNormSpec);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (of_norm, x, spec) = ops.state;
        let grad = grads.consume::<B>(&ops.node);
        let [origin, of_weight] = ops.parents;
        if let Some(parent) = of_weight {
            let gradient = gradient_of_weight::<B>(x, grad.clone(), spec);
            grads.register::<B>(parent.id, gradient);
        }
        if origin.is_some() {
            of_norm.put(grad);
        }
    }
}

#[cfg(feature = "flex")]
mod flex {
    use burn_flex::{Flex, FlexTensor};
    use half::{bf16, f16};

    use super::*;
    use crate::format::{FloatElement, FloatType};
    use crate::host;
    use crate::op::backends::flex::{contents, tensor_of};

    impl RmsNormBackend for Flex {
        fn rms_norm(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            spec: RmsNormSpec,
        ) -> FloatTensor<Self> {
            fn norm<T: FloatElement>(
                [x, weight]: &[FlexTensor; 2],
                spec: RmsNormSpec,
            ) -> FlexTensor {
                let (x, weight) = (contents::<T>(x), contents(weight));
                tensor_of(host::rms_norm(x, weight, norm_of(spec)), spec.shape())
            }

            let operands = [x, weight].map(|tensor| tensor.to_contiguous());
            match spec.dtype {
                FloatType::F16 => norm::<f16>(&operands, spec),
                FloatType::BF16 => norm::<bf16>(&operands, spec),
                FloatType::F32 => norm::<f32>(&operands, spec),
            }
        }

        fn rms_norm_backward(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            spec: RmsNormSpec,
        ) -> FloatTensor<Self> {
            backward(x, weight, grad, None, spec)
        }

        fn rms_norm_backward_add(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            residual: FloatTensor<Self>,
            spec: RmsNormSpec,
        ) -> FloatTensor<Self> {
            backward(x, weight, grad, Some(residual), spec)
        }
    }

    fn norm_of(spec: RmsNormSpec) -> host::RmsNorm {
        let RmsNormSpec {
            size, eps, form, ..
        } = spec;
        host::RmsNorm { size, eps, form }
    }

    fn backward(
        x: FlexTensor,
        weight: FlexTensor,
        grad: FlexTensor,
        residual: Option<FlexTensor>,
        spec: RmsNormSpec,
    ) -> FlexTensor {
        fn gradient<T: FloatElement>(
            operands: &[FlexTensor; 3],
            residual: Option<&FlexTensor>,
            spec: RmsNormSpec,
        ) -> FlexTensor {
            let [x, weight, grad] = operands.each_ref().map(contents::<T>);
            let residual = residual.map(contents);
            let gradient = host::rms_norm_backward(x, weight, grad, residual, norm_of(spec));
            tensor_of(gradient, spec.shape())
        }

        let operands = [x, weight, grad].map(|tensor| tensor.to_contiguous());
        let residual = residual.map(|tensor| tensor.to_contiguous());
        match spec.dtype {
            FloatType::F16 => gradient::<f16>(&operands, residual.as_ref(), spec),
            FloatType::BF16 => gradient::<bf16>(&operands, residual.as_ref(), spec),
            FloatType::F32 => gradient::<f32>(&operands, residual.as_ref(), spec),
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

        fn rms_norm_backward(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            spec: RmsNormSpec,
        ) -> FloatTensor<Self> {
            backward(x, weight, grad, None, spec)
        }

        fn rms_norm_backward_add(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            residual: FloatTensor<Self>,
            spec: RmsNormSpec,
        ) -> FloatTensor<Self> {
            backward(x, weight, grad, Some(residual), spec)
        }
    }

    fn problem_of(spec: RmsNormSpec) -> RmsNormProblem {
        RmsNormProblem {
            rows: spec.rows,
            size: spec.size,
            eps: spec.eps as f32,
            form: spec.form,
            dtype: spec.dtype,
        }
    }

    fn empty_like(x: &CubeTensor, spec: RmsNormSpec) -> CubeTensor {
        let handle = x.client.empty(problem_of(spec).out_bytes());
        let (client, device) = (x.client.clone(), x.device.clone());
        CubeTensor::new_contiguous(client, device, spec.shape(), handle, spec.dtype.into())
    }

    fn backward(
        x: CubeTensor,
        weight: CubeTensor,
        grad: CubeTensor,
        residual: Option<CubeTensor>,
        spec: RmsNormSpec,
    ) -> CubeTensor {
        let [x, weight, grad] = [x, weight, grad].map(into_contiguous);
        let residual = residual.map(into_contiguous);
        let out = empty_like(&x, spec);
        launch::rms_norm_backward(
            &x.client,
            problem_of(spec),
            x.handle.clone(),
            grad.handle,
            residual.map(|residual| residual.handle),
            weight.handle,
            out.handle.clone(),
        )
        .expect("arguments were validated");
        out
    }

    /// The sum, or `x` without one, and the norm.
    fn launched(
        x: CubeTensor,
        y: Option<CubeTensor>,
        weight: CubeTensor,
        spec: RmsNormSpec,
    ) -> (CubeTensor, CubeTensor) {
        let [x, weight] = [x, weight].map(into_contiguous);
        let problem = problem_of(spec);
        let out = empty_like(&x, spec);
        let (sum, residual) = match y.map(into_contiguous) {
            None => (x.clone(), None),
            Some(y) => {
                let sum = empty_like(&x, spec);
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
