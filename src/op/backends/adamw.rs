//! The optimizer on each backend.

use burn::backend::tensor::{FloatTensor, IntTensor};

use crate::op::adamw::{AccumulateSpec, AdamWBackend, AdamWSpec, FlatParts, Moments};

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::Shape;
    use burn_flex::{Flex, FlexTensor};
    use half::{bf16, f16};

    use super::*;
    use crate::format::{FloatElement, FloatType};
    use crate::host::{self, AdamWStep, MomentSlices};
    use crate::op::backends::flex::{contents, tensor_of};

    impl AdamWBackend for Flex {
        fn flat_accumulate(
            flat: FloatTensor<Self>,
            parts: FlatParts<Self>,
            spec: AccumulateSpec,
        ) -> FloatTensor<Self> {
            let mut flat = flat.to_contiguous();
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
            grads: FloatTensor<Self>,
            report: FloatTensor<Self>,
            tiles: IntTensor<Self>,
            factors: FloatTensor<Self>,
            moments: Moments<Self>,
            spec: AdamWSpec,
        ) -> (FloatTensor<Self>, FloatTensor<Self>, Moments<Self>) {
            let [mut values, mut grads] = [values, grads].map(|tensor| tensor.to_contiguous());
            let [report, tiles, factors] =
                [report, tiles, factors].map(|tensor| tensor.to_contiguous());
            let report: &[f32] = contents(&report);
            let step = AdamWStep {
                values: values.storage_mut(),
                grads: grads.storage_mut(),
                report: [report[0], report[1]],
                tiles: bytemuck::cast_slice(tiles.bytes()),
                factors: contents(&factors),
                scalars: spec.scalars,
                form: spec.form,
            };
            let moments = match moments {
                Moments::F32 { first, second } => {
                    let [mut first, mut second] =
                        [first, second].map(|tensor| tensor.to_contiguous());
                    let slices = MomentSlices::F32 {
                        first: first.storage_mut(),
                        second: second.storage_mut(),
                    };
                    host::adamw(step, slices);
                    Moments::F32 { first, second }
                }
                Moments::Bits8 {
                    first,
                    second,
                    first_max,
                    second_max,
                    maps,
                } => {
                    let [mut first, mut second, mut first_max, mut second_max] =
                        [first, second, first_max, second_max].map(|tensor| tensor.to_contiguous());
                    let codes = [&mut first, &mut second]
                        .map(|tensor| bytemuck::cast_slice_mut(tensor.storage_mut::<u32>()));
                    let slices = MomentSlices::Bits8 {
                        codes,
                        maxima: [first_max.storage_mut(), second_max.storage_mut()],
                    };
                    host::adamw(step, slices);
                    Moments::Bits8 {
                        first,
                        second,
                        first_max,
                        second_max,
                        maps,
                    }
                }
            };
            (values, grads, moments)
        }
    }

    fn first<T: FloatElement>(tensor: &FlexTensor) -> T {
        contents(&tensor.to_contiguous())[0]
    }
}

#[cfg(feature = "cube")]
mod cube {
    use burn::tensor::{DType, Shape};
    use burn_cubecl::CubeBackend;
    use burn_cubecl::kernel::into_contiguous;
    use burn_cubecl::tensor::CubeTensor;

    use super::*;
    use crate::launch::{self, AccumulatePart, AdamWBuffers, MomentBuffers};
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
            grads: FloatTensor<Self>,
            report: FloatTensor<Self>,
            tiles: IntTensor<Self>,
            factors: FloatTensor<Self>,
            moments: Moments<Self>,
            spec: AdamWSpec,
        ) -> (FloatTensor<Self>, FloatTensor<Self>, Moments<Self>) {
            let [values, grads] = [values, grads].map(owned);
            let [report, tiles, factors] = [report, tiles, factors].map(into_contiguous);
            let moments = match moments {
                Moments::F32 { first, second } => {
                    let [first, second] = [first, second].map(owned);
                    Moments::F32 { first, second }
                }
                Moments::Bits8 {
                    first,
                    second,
                    first_max,
                    second_max,
                    maps,
                } => {
                    let [first, second, first_max, second_max] =
                        [first, second, first_max, second_max].map(owned);
                    Moments::Bits8 {
                        first,
                        second,
                        first_max,
                        second_max,
                        maps: into_contiguous(maps),
                    }
                }
            };
            let buffers = AdamWBuffers {
                values: values.handle.clone(),
                grads: grads.handle.clone(),
                report: report.handle,
                tiles: tiles.handle,
                factors: factors.handle,
            };
            let of = |tensor: &CubeTensor| tensor.handle.clone();
            let of_moments = match &moments {
                Moments::F32 { first, second } => MomentBuffers::F32 {
                    first: of(first),
                    second: of(second),
                },
                Moments::Bits8 {
                    first,
                    second,
                    first_max,
                    second_max,
                    maps,
                } => MomentBuffers::Bits8 {
                    codes: [of(first), of(second)],
                    maxima: [of(first_max), of(second_max)],
                    maps: of(maps),
                },
            };
            let numbers = (spec.scalars, spec.form);
            launch::adamw(
                &values.client,
                &spec.layout,
                spec.count,
                numbers,
                buffers,
                of_moments,
            )
            .expect("arguments were validated");
            (values, grads, moments)
        }
    }
}
