//! What a low-rank branch adds to a product with a packed weight: joined to it, and beside it with
//! Burn's own products.

use std::time::Instant;

use burn::backend::ops::FloatTensorOps;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use burn_nf4::format::QuantConfig;
use burn_nf4::launch::check_dtype;
use burn_nf4::op::{LoraSpec, QuantBackend};
use serde_json::json;

use crate::args::Args;
use crate::gpu::Gpu;
use crate::matmul::{DTYPE, op_spec, packed_copies, shapes};
use crate::problems::Weight;
use crate::report::{Method, Report, Timing};
use crate::timing::{self, Window, sync};

const RANKS: [usize; 2] = [16, 64];
/// Rows of `x`.
const ROWS: [usize; 4] = [1, 4, 16, 64];

/// What is timed.
#[derive(Clone, Copy)]
enum Branch {
    None,
    Joined,
    Apart,
}

impl Branch {
    const ALL: [Self; 3] = [Self::None, Self::Joined, Self::Apart];

    const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Joined => "joined",
            Self::Apart => "apart",
        }
    }

    fn run(self, case: &Case, i: usize) -> CubeTensor {
        let x = case.x.clone();
        let packed = case.packed[i % case.packed.len()].clone();
        let (a, b) = case.branches[i % case.branches.len()].clone();
        let matmul = case.spec.matmul;
        match self {
            Self::None => CubeBackend::quant_matmul(x, packed, matmul),
            Self::Joined => CubeBackend::quant_matmul_lora(x, packed, a, b, case.spec),
            Self::Apart => {
                let y = CubeBackend::quant_matmul(x.clone(), packed, matmul);
                let branch = CubeBackend::float_matmul(CubeBackend::float_matmul(x, a), b);
                let branch = CubeBackend::float_mul_scalar(branch, case.spec.scale.into());
                CubeBackend::float_add(y, branch)
            }
        }
    }
}

struct Case {
    x: CubeTensor,
    packed: Vec<CubeTensor>,
    branches: Vec<(CubeTensor, CubeTensor)>,
    spec: LoraSpec,
}

fn name(branch: Branch, rank: usize, [n, k]: [usize; 2], m: usize) -> String {
    format!("lora/{}/bf16/{n}x{k}/r{rank}/m{m}", branch.name())
}

/// Times the product alone, with the branch joined to it, and with the branch beside it: on the
/// device, weights rotated, and by the clock over calls back to back, which the host can bound.
pub fn benches(gpu: &Gpu, args: &Args, report: &mut Report) {
    if check_dtype(&gpu.client, DTYPE).is_err() {
        return;
    }
    let mut headed = false;
    for (&shape, rank) in shapes(gpu).iter().flat_map(|s| RANKS.map(|r| (s, r))) {
        for m in ROWS {
            let wanted: Vec<Branch> = Branch::ALL
                .into_iter()
                .filter(|&branch| args.starts(&name(branch, rank, shape, m)))
                .collect();
            if wanted.is_empty() {
                continue;
            }
            if !headed {
                println!("\nProducts with a low-rank branch, bf16, microseconds");
                println!(
                    "{:38} {:>10} {:>8} {:>12} {:>8}",
                    "", "device", "spread", "call", "spread"
                );
                headed = true;
            }
            let case = case(gpu, shape, m, rank);
            for branch in wanted {
                time(gpu, &case, branch, &name(branch, rank, shape, m), report);
            }
        }
    }
}

fn case(gpu: &Gpu, [n, k]: [usize; 2], m: usize, rank: usize) -> Case {
    let weight = Weight::new([n, k], QuantConfig::default(), 1);
    let packed = packed_copies(gpu, &weight);
    let random = |dims: [usize; 2]| gpu.random(dims, DTYPE);
    Case {
        x: random([m, k]),
        branches: packed
            .iter()
            .map(|_| (random([k, rank]), random([rank, n])))
            .collect(),
        packed,
        spec: LoraSpec {
            matmul: op_spec(&weight.layout, [n, k], m),
            rank,
            scale: 0.5,
            dtype: DTYPE,
        },
    }
}

fn time(gpu: &Gpu, case: &Case, branch: Branch, name: &str, report: &mut Report) {
    let client = &gpu.client;
    let launch = |i: usize| drop(branch.run(case, i));
    // Autotune.
    launch(0);
    let launches = if gpu.is_card {
        case.packed.len().min(64)
    } else {
        2
    };
    let window = Window {
        launches,
        launch: &launch,
        poison: None,
        copier: Some(&gpu.copier),
    };
    let device = timing::device_time(client, &window);
    let calls = if gpu.is_card { 300 } else { 2 };
    let samples = (0..7).map(|_| {
        sync(client);
        let start = Instant::now();
        (0..calls).for_each(launch);
        sync(client);
        start.elapsed().as_secs_f64() * 1e6 / calls as f64
    });
    let call = Timing::of(samples.collect(), Method::Clock);
    println!(
        "{name:38} {:>10.2} {:>8.2} {:>12.2} {:>8.2}",
        device.median_us, device.spread_us, call.median_us, call.spread_us
    );
    report.record(&json!({
        "kind": "lora",
        "name": name,
        "device": gpu.place.device,
        "backend": gpu.place.backend,
        "median_us": device.median_us,
        "spread_us": device.spread_us,
        "method": device.method,
        "call_us": call.median_us,
        "call_spread_us": call.spread_us,
    }));
}
