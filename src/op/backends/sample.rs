//! The choice of tokens on each backend.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::{FloatTensor, IntTensor};

use crate::op::sample::{SampleBackend, SampleSpec};

impl<B: SampleBackend, C: CheckpointStrategy> SampleBackend for Autodiff<B, C> {
    fn sample(
        logits: FloatTensor<Self>,
        state: IntTensor<Self>,
        spec: SampleSpec,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
        B::sample(logits.into_primitive(), state, spec)
    }
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::{Bytes, DType, Shape, TensorData};
    use burn_flex::{Flex, FlexTensor};
    use half::{bf16, f16};

    use super::*;
    use crate::format::{FloatElement, FloatType};
    use crate::host::{self, Choice};

    impl SampleBackend for Flex {
        fn sample(
            logits: FloatTensor<Self>,
            state: IntTensor<Self>,
            spec: SampleSpec,
        ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
            let logits = logits.to_contiguous();
            let state = state.to_contiguous();
            let mut words: Vec<u32> = bytemuck::cast_slice(state.bytes()).to_vec();
            let choices = match spec.dtype {
                FloatType::F16 => chosen::<f16>(&logits, &mut words, &spec),
                FloatType::BF16 => chosen::<bf16>(&logits, &mut words, &spec),
                FloatType::F32 => chosen::<f32>(&logits, &mut words, &spec),
            };
            let ids = choices.iter().map(|choice| i64::from(choice.id)).collect();
            let number = |choice: &Choice| match choice.number {
                Some(number) => i64::from(number & 0x7fff_ffff),
                None => -1,
            };
            let numbers = choices.iter().map(number).collect();
            let words =
                TensorData::from_bytes(Bytes::from_elems(words), spec.state_shape(), DType::U32);
            let state = FlexTensor::from_data(words);
            (integers(ids, &spec), integers(numbers, &spec), state)
        }
    }

    fn chosen<T: FloatElement>(
        logits: &FlexTensor,
        state: &mut [u32],
        spec: &SampleSpec,
    ) -> Vec<Choice> {
        let logits: &[T] = bytemuck::cast_slice(logits.bytes());
        host::sample(logits, spec.vocabulary, state, &spec.settings)
    }

    fn integers(values: Vec<i64>, spec: &SampleSpec) -> FlexTensor {
        let data = TensorData::new(values, Shape::from([spec.rows]));
        FlexTensor::from_data(data.convert_dtype(spec.int))
    }
}

#[cfg(feature = "cube")]
impl SampleBackend for burn_cubecl::CubeBackend {
    fn sample(
        logits: FloatTensor<Self>,
        state: IntTensor<Self>,
        spec: SampleSpec,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
        use burn::backend::cubecl::dtype_to_elem_type;
        use burn::tensor::Shape;
        use burn_cubecl::kernel::into_contiguous;
        use burn_cubecl::tensor::CubeTensor;

        use crate::launch::{self, SampleBuffers, SampleProblem};

        let logits = into_contiguous(logits);
        let mut state = into_contiguous(state);
        if !state.can_mut() {
            state = state.copy();
        }
        let problem = SampleProblem {
            rows: spec.rows,
            vocabulary: spec.vocabulary,
            history: spec.history,
            settings: spec.settings,
            dtype: spec.dtype,
            int: dtype_to_elem_type(spec.int),
        };
        let results = [(); 2].map(|()| logits.client.empty(spec.rows * spec.int.size()));
        let [ids, numbers] = results.clone();
        let buffers = SampleBuffers {
            logits: logits.handle,
            state: state.handle.clone(),
            ids,
            numbers,
        };
        launch::sample(&logits.client, problem, buffers).expect("arguments were validated");
        let [ids, numbers] = results.map(|handle| {
            let (client, device) = (logits.client.clone(), logits.device.clone());
            CubeTensor::new_contiguous(client, device, Shape::from([spec.rows]), handle, spec.int)
        });
        (ids, numbers, state)
    }
}
