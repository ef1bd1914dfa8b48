//! The optimizer on each backend.

use burn::backend::tensor::{FloatTensor, IntTensor};

use crate::op::adamw::{AccumulateSpec, AdamWBackend, AdamWSpec, FlatParts};

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::Shape;
    use burn_flex::{Flex, FlexTensor};
    use half::{bf16, f16};

    use super::*;
    use crate::format::{FloatElement, FloatType};
    use crate::host::{self, AdamWSlices};
    use crate::op::backends::flex::{contents, tensor_of};

    impl AdamWBackend for Flex {
        fn flat_accumulate(
            flat: FloatTensor<Self>,
            parts: FlatParts<Self>,
            spec: AccumulateSpec,
        ) -> FloatTensor<Self> {
            let mut flat = owned(flat);
            let sums = flat.storage_mut::<f32>();
            for (part, &tensor) in parts.into_vec().into_iter().zip(&spec.tensors) {
                let part = part.to_contiguous();
                let sums = &mut sums[spec.layout.range(tensor)];
                match spec.dtype {
                    FloatType::F16 => host::accumulate::<f16>(sums, contents(&part)),
                    FloatType::BF16 => host::accumulate::<bf16>(sums, contents(&part)),
                    FloatType::F32 => host::accumulate::<f32>(sums, contents(&part)),
                }
            }
            flat
        }

        fn step_report(flat: FloatTensor<Self>, loss: FloatTensor<Self>) -> FloatTensor<Self> {
            let flat = flat.to_contiguous();
            let norm = host::norm(contents(&flat));
            tensor_of(vec![first::<f32>(&loss), norm], Shape::from([2]))
        }

        fn flat_adamw(
            values: FloatTensor<Self>,
            first: FloatTensor<Self>,
            second: FloatTensor<Self>,
            grads: FloatTensor<Self>,
            report: FloatTensor<Self>,
            _tile_tensors: IntTensor<Self>,
            factors: FloatTensor<Self>,
            spec: AdamWSpec,
        ) -> (
            FloatTensor<Self>,
            FloatTensor<Self>,
            FloatTensor<Self>,
            FloatTensor<Self>,
        ) {
            let [mut values, mut first, mut second, mut grads] =
                [values, first, second, grads].map(owned);
            let (report, factors) = (report.to_contiguous(), factors.to_contiguous());
            let report = contents::<f32>(&report);
            let slices = AdamWSlices {
                values: values.storage_mut(),
                first: first.storage_mut(),
                second: second.storage_mut(),
                grads: grads.storage_mut(),
            };
            let report = [report[0], report[1]];
            host::adamw(
                slices,
                report,
                &spec.layout,
                contents(&factors),
                spec.scalars,
            );
            (values, first, second, grads)
        }
    }

    fn first<T: FloatElement>(tensor: &FlexTensor) -> T {
        contents(&tensor.to_contiguous())[0]
    }

    /// A tensor whose memory is what it holds, and its own if nobody else has it.
    fn owned(tensor: FlexTensor) -> FlexTensor {
        tensor.to_contiguous()
    }
}

#[cfg(feature = "cube")]
mod cube {
    use burn::tensor::{DType, Shape};
    use burn_cubecl::CubeBackend;
    use burn_cubecl::kernel::into_contiguous;
    use burn_cubecl::tensor::CubeTensor;

    use super::*;
    use crate::launch::{self, AccumulatePart, AdamWBuffers};
    use crate::op::backends::cube::owned;

    impl AdamWBackend for CubeBackend {
        fn flat_accumulate(
            flat: FloatTensor<Self>,
            parts: FlatParts<Self>,
            spec: AccumulateSpec,
        ) -> FloatTensor<Self> {
            let flat = owned(flat);
            let parts = parts.into_vec().into_iter().zip(&spec.tensors);
            let parts: Vec<AccumulatePart> = parts
                .map(|(part, &tensor)| AccumulatePart {
                    tensor,
                    values: into_contiguous(part).handle,
                })
                .collect();
            launch::flat_accumulate(&flat.client, &spec.layout, &flat.handle, &parts, spec.dtype)
                .expect("arguments were validated");
            flat
        }

        fn step_report(flat: FloatTensor<Self>, loss: FloatTensor<Self>) -> FloatTensor<Self> {
            let [flat, loss] = [flat, loss].map(into_contiguous);
            let elems = flat.meta.num_elements();
            let report = flat.client.empty(2 * size_of::<f32>());
            launch::step_report(
                &flat.client,
                elems,
                flat.handle,
                loss.handle,
                report.clone(),
            )
            .expect("arguments were validated");
            let shape = Shape::from([2]);
            CubeTensor::new_contiguous(flat.client, flat.device, shape, report, DType::F32)
        }

        fn flat_adamw(
            values: FloatTensor<Self>,
            first: FloatTensor<Self>,
            second: FloatTensor<Self>,
            grads: FloatTensor<Self>,
            report: FloatTensor<Self>,
            tile_tensors: IntTensor<Self>,
            factors: FloatTensor<Self>,
            spec: AdamWSpec,
        ) -> (
            FloatTensor<Self>,
            FloatTensor<Self>,
            FloatTensor<Self>,
            FloatTensor<Self>,
        ) {
            let [values, first, second, grads] = [values, first, second, grads].map(owned);
            let [report, tile_tensors, factors] =
                [report, tile_tensors, factors].map(into_contiguous);
            let buffers = AdamWBuffers {
                values: values.handle.clone(),
                first: first.handle.clone(),
                second: second.handle.clone(),
                grads: grads.handle.clone(),
                report: report.handle,
                tile_tensors: tile_tensors.handle,
                factors: factors.handle,
            };
            launch::adamw(&values.client, &spec.layout, spec.scalars, buffers)
                .expect("arguments were validated");
            (values, first, second, grads)
        }
    }
}
