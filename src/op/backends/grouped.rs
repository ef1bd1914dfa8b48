//! Grouped products on each backend.

#[cfg(feature = "flex")]
mod flex {
    use burn::backend::tensor::{FloatTensor, IntTensor};
    use burn::tensor::{Bytes, DType, Shape, TensorData};
    use burn_flex::{Flex, FlexTensor};
    use half::{bf16, f16};

    use crate::format::{FloatElement, FloatType};
    use crate::host::{self, Simd};
    use crate::op::backends::flex::{contents, row_numbers, tensor_of};
    use crate::op::backends::products::FEW_ROWS;
    use crate::op::base::{DequantizeSpec, LinearSpec, MatmulStrategy, QuantBackend};
    use crate::op::grouped::{GroupedBackend, GroupedSpec, GroupedWeights};
    use crate::stack_layout::StackLayout;

    impl GroupedBackend for Flex {
        fn grouped_product(
            x: FloatTensor<Self>,
            ids: IntTensor<Self>,
            weights: GroupedWeights<Self>,
            spec: GroupedSpec,
        ) -> FloatTensor<Self> {
            let x = x.to_contiguous();
            let ids = row_numbers(&ids.to_contiguous());
            match spec.dtype {
                FloatType::F16 => product::<f16>(&x, &ids, weights, &spec),
                FloatType::BF16 => product::<bf16>(&x, &ids, weights, &spec),
                FloatType::F32 => product::<f32>(&x, &ids, weights, &spec),
            }
        }
    }

    fn product<T: FloatElement>(
        x: &FlexTensor,
        ids: &[usize],
        weights: GroupedWeights<Flex>,
        spec: &GroupedSpec,
    ) -> FlexTensor {
        let mut entries_of = vec![Vec::new(); spec.stacks[0].experts()];
        for (entry, &expert) in ids.iter().enumerate() {
            entries_of[expert].push(entry);
        }
        let products = spec.stacks.iter().zip(weights.into_vec());
        let mut products = products.map(|(stack, (packed, bias))| {
            let (packed, bias) = (
                packed.to_contiguous(),
                bias.map(|bias| bias.to_contiguous()),
            );
            let experts = Experts {
                stack,
                packed: &packed,
                bias: bias.as_ref(),
            };
            experts.multiply::<T>(contents(x), &entries_of, spec)
        });
        let first = products.next().expect("one stack or two");
        let second = products.next();
        let y = match (spec.gate, second) {
            (None, _) => first,
            (Some(gate), Some(second)) => host::gated(Simd::detect(), &first, &second, gate),
            (Some(gate), None) => {
                let [even, odd] = [0, 1]
                    .map(|at| -> Vec<T> { first.iter().skip(at).step_by(2).copied().collect() });
                host::gated(Simd::detect(), &even, &odd, gate)
            }
        };
        tensor_of(y, Shape::from([spec.entries, spec.columns()]))
    }

    /// The weights of experts.
    struct Experts<'a> {
        stack: &'a StackLayout,
        packed: &'a FlexTensor,
        bias: Option<&'a FlexTensor>,
    }

    impl Experts<'_> {
        /// `x Wₑᵀ + bₑ` of each entry.
        fn multiply<T: FloatElement>(
            &self,
            x: &[T],
            entries_of: &[Vec<usize>],
            spec: &GroupedSpec,
        ) -> Vec<T> {
            let [n, k] = self.stack.matrix_dims();
            let mut y = vec![T::zeroed(); spec.entries * n];
            let mut rows = Vec::new();
            for (expert, entries) in entries_of.iter().enumerate() {
                if entries.is_empty() {
                    continue;
                }
                rows.clear();
                for entry in entries {
                    rows.extend_from_slice(&x[entry / spec.per_row * k..][..k]);
                }
                let products = self.of_expert(expert, &rows, spec.dtype);
                for (&entry, product) in entries.iter().zip(products.chunks_exact(n)) {
                    y[entry * n..][..n].copy_from_slice(product);
                }
            }
            y
        }

        /// The product of rows with the weight of an expert.
        fn of_expert<T: FloatElement>(&self, expert: usize, x: &[T], dtype: FloatType) -> Vec<T> {
            let Self { stack, .. } = self;
            let [n, k] = stack.matrix_dims();
            let (m, image) = (x.len() / k, stack.image());
            let bias: Option<&[T]> = self.bias.map(|bias| &contents(bias)[expert * n..][..n]);
            let words: &[u32] = bytemuck::cast_slice(self.packed.bytes());
            let words = &words[expert * stack.image_stride()..][..image.words()];
            if m <= FEW_ROWS && !stack.is_whole() {
                let mut y = vec![T::zeroed(); m * n];
                host::matmul(x, m, words, image, n, k, bias, &mut y);
                return y;
            }
            let linear = LinearSpec {
                weight: DequantizeSpec {
                    layout: *image,
                    rows: n,
                    columns: k,
                    start: expert * stack.elem_stride(),
                    dtype,
                },
                strategy: MatmulStrategy::Auto,
                cublaslt: true,
            };
            let x = tensor_of(x.to_vec(), Shape::from([m, k]));
            let packed = match stack.is_whole() {
                true => self.packed.clone(),
                false => words_tensor(words),
            };
            let y = Flex::quant_linear(x, packed, linear).to_contiguous();
            let mut y = contents::<T>(&y).to_vec();
            if let Some(bias) = bias {
                for y in y.chunks_exact_mut(n) {
                    for (y, bias) in y.iter_mut().zip(bias) {
                        *y = T::from_f32(y.to_f32() + bias.to_f32());
                    }
                }
            }
            y
        }
    }

    fn words_tensor(words: &[u32]) -> FlexTensor {
        let bytes = Bytes::from_elems(words.to_vec());
        let shape = Shape::from([words.len()]);
        FlexTensor::from_data(TensorData::from_bytes(bytes, shape, DType::U32))
    }
}

#[cfg(feature = "cube")]
impl crate::op::grouped::GroupedBackend for burn_cubecl::CubeBackend {
    fn grouped_product(
        x: burn::backend::tensor::FloatTensor<Self>,
        ids: burn::backend::tensor::IntTensor<Self>,
        weights: crate::op::grouped::GroupedWeights<Self>,
        spec: crate::op::grouped::GroupedSpec,
    ) -> burn::backend::tensor::FloatTensor<Self> {
        use burn::backend::cubecl::dtype_to_elem_type;
        use burn::tensor::Shape;
        use burn_cubecl::kernel::into_contiguous;
        use burn_cubecl::tensor::CubeTensor;

        use crate::launch::{GroupedOperands, GroupedPlan, GroupedProblem};

        let (x, ids) = (into_contiguous(x), into_contiguous(ids));
        let problem = GroupedProblem {
            entries: spec.entries,
            per_row: spec.per_row,
            tokens: spec.tokens,
            ids_dtype: dtype_to_elem_type(ids.dtype),
            dtype: spec.dtype,
            gate: spec.gate,
        };
        let plan =
            GroupedPlan::new(&x.client, &spec.stacks, problem).expect("arguments were validated");
        let handle = |tensor: CubeTensor| into_contiguous(tensor).handle;
        let weights = weights.into_vec().into_iter();
        let weights = weights.map(|(packed, bias)| (handle(packed), bias.map(handle)));
        let out = x.client.empty(plan.out_bytes());
        let operands = GroupedOperands {
            x: x.handle,
            ids: ids.handle,
            weights: weights.collect(),
        };
        plan.launch(operands, out.clone())
            .expect("arguments were validated");
        let shape = Shape::from([spec.entries, plan.columns()]);
        CubeTensor::new_contiguous(x.client, x.device, shape, out, spec.dtype.into())
    }
}
