//! Joined products on CubeCL runtimes.

use burn::backend::tensor::FloatTensor;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::Client;

use crate::launch::{JoinedPlan, JoinedWeight as Operands, Lora};
use crate::op::joined::{
    JoinedBackend, JoinedPart, JoinedResults, JoinedSpec, JoinedWeight, JoinedWeights,
};

/// Whether a device computes it in one launch.
pub(in crate::op) fn has_kernel(client: &Client, spec: &JoinedSpec) -> bool {
    plan(client, spec).is_ok()
        && spec.parts.iter().all(|part| {
            part.branch
                .is_none_or(|branch| branch.rank > 0 && Lora::check(client, branch.dtype).is_ok())
        })
}

fn plan(client: &Client, spec: &JoinedSpec) -> Result<JoinedPlan, crate::Nf4Error> {
    JoinedPlan::new(client, &spec.weights(), spec.k, spec.dtype, spec.gate)
}

impl JoinedBackend for CubeBackend {
    fn nf4_joined(
        x: FloatTensor<Self>,
        weights: JoinedWeights<Self>,
        spec: JoinedSpec,
    ) -> JoinedResults<Self> {
        let x = into_contiguous(x);
        let plan = plan(&x.client, &spec).expect("arguments were validated");
        let weights = match weights {
            JoinedWeights::Two(first, second) => vec![first, second],
            JoinedWeights::Three(first, second, third) => vec![first, second, third],
        };
        let weights = weights.into_iter().zip(&spec.parts);
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
