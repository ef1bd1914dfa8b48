//! Joined products on CubeCL runtimes.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::ops::Backward;
use burn::backend::tensor::FloatTensor;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::Client;

use super::lora::{LoraBackward, fork, lora};
use crate::activation::Activation;
use crate::format::FloatType;
use crate::launch::{JoinedPlan, JoinedWeight as Operands, Lora};
use crate::op::joined::{
    JoinedBackend, JoinedLoraSpec, JoinedPart, JoinedResults, JoinedSpec, JoinedWeight,
    JoinedWeights,
};

/// The launch that computes all products, if the device has a kernel for it.
pub(in crate::op) fn plan(
    client: &Client,
    parts: &[JoinedPart],
    k: usize,
    dtype: FloatType,
    gate: Option<Activation>,
) -> Option<JoinedPlan> {
    let mut branches = parts.iter().filter_map(|part| part.branch);
    if branches.any(|branch| branch.rank == 0 || Lora::check(client, branch.dtype).is_err()) {
        return None;
    }
    let weights: Vec<_> = parts.iter().map(|part| (part.layout, part.n)).collect();
    JoinedPlan::new(client, &weights, k, dtype, gate).ok()
}

impl<B: JoinedBackend, C: CheckpointStrategy> JoinedBackend for Autodiff<B, C> {
    fn quant_joined(
        _x: FloatTensor<Self>,
        _weights: JoinedWeights<Self>,
        _spec: JoinedSpec,
    ) -> JoinedResults<Self> {
        unreachable!("a single row is not joined with autodiff")
    }

    fn quant_joined_lora(
        x: FloatTensor<Self>,
        weights: JoinedWeights<Self>,
        spec: JoinedLoraSpec,
    ) -> JoinedResults<Self> {
        let (x, shared) = fork::<B, C>(x);
        let weights = weights.into_vec().into_iter().zip(spec.parts);
        JoinedResults::of(weights.map(|(weight, spec)| {
            let (x, shared) = (x.clone(), Some(shared.clone()));
            match weight {
                JoinedWeight::Lora { packed, a, b } => {
                    let kind = LoraBackward.prepare::<C>([x.node(), a.node(), b.node()]);
                    let kind = kind.compute_bound().stateful();
                    lora(kind, x, packed, [a, b], None, spec, shared)
                }
                JoinedWeight::BiasLora { packed, bias, a, b } => {
                    let nodes = [x.node(), a.node(), b.node(), bias.node()];
                    let kind = LoraBackward.prepare::<C>(nodes).compute_bound().stateful();
                    let bias = Some(bias.into_primitive());
                    lora(kind, x, packed, [a, b], bias, spec, shared)
                }
                JoinedWeight::Plain { .. } | JoinedWeight::Bias { .. } => {
                    unreachable!("arguments were validated")
                }
            }
        }))
    }
}

impl JoinedBackend for CubeBackend {
    fn quant_joined(
        x: FloatTensor<Self>,
        weights: JoinedWeights<Self>,
        spec: JoinedSpec,
    ) -> JoinedResults<Self> {
        let x = into_contiguous(x);
        let plan = &spec.plan;
        let weights = weights.into_vec().into_iter().zip(&spec.parts);
        let weights: Vec<Operands> = weights
            .map(|(weight, part)| operands(weight, part))
            .collect();
        let out = x.client.empty(plan.out_bytes());
        plan.launch(&x.handle, &weights, out.clone())
            .expect("arguments were validated");
        let results = plan.results().enumerate().map(|(part, bytes)| {
            let end = (plan.out_bytes() - bytes.end) as u64;
            let out = out.clone().offset_start(bytes.start as u64).offset_end(end);
            let (client, device) = (x.client.clone(), x.device.clone());
            let dtype = DType::from(spec.dtype);
            CubeTensor::new_contiguous(client, device, spec.result_shape(part), out, dtype)
        });
        let mut results = results;
        let mut next = || results.next().expect("a result of each weight");
        match (spec.gate, spec.parts.len()) {
            (Some(_), _) => JoinedResults::Gated(next()),
            (None, 2) => JoinedResults::Two(next(), next()),
            (None, _) => JoinedResults::Three(next(), next(), next()),
        }
    }
}

fn operands(weight: JoinedWeight<CubeBackend>, part: &JoinedPart) -> Operands {
    let handle = |tensor: CubeTensor| into_contiguous(tensor).handle;
    let lora = |a, b| {
        let branch = part.branch.expect("arguments were validated");
        Some(Lora {
            a: handle(a),
            b: handle(b),
            rank: branch.rank,
            scale: branch.scale as f32,
            dtype: branch.dtype,
        })
    };
    let (packed, bias, lora) = match weight {
        JoinedWeight::Plain { packed } => (packed, None, None),
        JoinedWeight::Bias { packed, bias } => (packed, Some(bias), None),
        JoinedWeight::Lora { packed, a, b } => (packed, None, lora(a, b)),
        JoinedWeight::BiasLora { packed, bias, a, b } => (packed, Some(bias), lora(a, b)),
    };
    Operands {
        packed: handle(packed),
        bias: bias.map(handle),
        lora,
    }
}
