//! The choice of experts on each backend.

use burn::backend::Autodiff;
use burn::backend::AutodiffBackend;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::{FloatTensor, IntTensor};

use crate::op::route::{RouteBackend, RouteSpec};

impl<B: RouteBackend, C: CheckpointStrategy> RouteBackend for Autodiff<B, C> {
    fn route(logits: FloatTensor<Self>, spec: RouteSpec) -> (IntTensor<Self>, FloatTensor<Self>) {
        let (ids, weights) = B::route(logits.into_primitive(), spec);
        (ids, Self::from_inner(weights))
    }
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::{Shape, TensorData};
    use burn_flex::{Flex, FlexTensor};
    use half::{bf16, f16};

    use super::*;
    use crate::format::{FloatElement, FloatType};
    use crate::host;
    use crate::op::backends::flex::{contents, tensor_of};

    impl RouteBackend for Flex {
        fn route(
            logits: FloatTensor<Self>,
            spec: RouteSpec,
        ) -> (IntTensor<Self>, FloatTensor<Self>) {
            let logits = logits.to_contiguous();
            let (ids, weights) = match spec.dtype {
                FloatType::F16 => chosen::<f16>(&logits, &spec),
                FloatType::BF16 => chosen::<bf16>(&logits, &spec),
                FloatType::F32 => chosen::<f32>(&logits, &spec),
            };
            let shape = Shape::from([spec.tokens, spec.per_token]);
            let ids: Vec<i64> = ids.into_iter().map(|id| id as i64).collect();
            let ids = TensorData::new(ids, shape.clone()).convert_dtype(spec.int);
            (FlexTensor::from_data(ids), tensor_of(weights, shape))
        }
    }

    fn chosen<T: FloatElement>(logits: &FlexTensor, spec: &RouteSpec) -> (Vec<usize>, Vec<f32>) {
        host::route::<T>(contents(logits), spec.experts, spec.per_token, spec.form)
    }
}

#[cfg(feature = "cube")]
impl RouteBackend for burn_cubecl::CubeBackend {
    fn route(logits: FloatTensor<Self>, spec: RouteSpec) -> (IntTensor<Self>, FloatTensor<Self>) {
        use burn::backend::cubecl::dtype_to_elem_type;
        use burn::tensor::{DType, Shape};
        use burn_cubecl::kernel::into_contiguous;
        use burn_cubecl::tensor::CubeTensor;

        use crate::launch::{self, RouteProblem};

        let logits = into_contiguous(logits);
        let problem = RouteProblem {
            tokens: spec.tokens,
            experts: spec.experts,
            per_token: spec.per_token,
            form: spec.form,
            dtype: spec.dtype,
            int: dtype_to_elem_type(spec.int),
        };
        let entries = spec.tokens * spec.per_token;
        let ids = logits.client.empty(entries * spec.int.size());
        let weights = logits.client.empty(entries * size_of::<f32>());
        launch::route(
            &logits.client,
            problem,
            logits.handle,
            ids.clone(),
            weights.clone(),
        )
        .expect("arguments were validated");
        let result = |handle, dtype| {
            let (client, device) = (logits.client.clone(), logits.device.clone());
            let shape = Shape::from([spec.tokens, spec.per_token]);
            CubeTensor::new_contiguous(client, device, shape, handle, dtype)
        };
        (result(ids, spec.int), result(weights, DType::F32))
    }
}
