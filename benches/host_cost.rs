//! What a call costs the host: calls back to back on a weight so small that the device keeps up.

use std::time::Instant;

use burn::tensor::{DType, Tensor};
use burn_nf4::BlockWeight;
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::launch::{DequantizePlan, elem_type};
use burn_nf4::op::{LowRank, MatmulStrategy, linear_with, lora_linear};
use cubecl::prelude::*;
use cubecl::server::Handle;
use serde_json::json;

use crate::args::Args;
use crate::gpu::{DeviceWeight, Gpu, Implementation};
use crate::problems::Weight;
use crate::report::{Method, Report, Timing};
use crate::timing::sync;

const SAMPLES: usize = 11;

/// Times, and prints where a call's time goes.
pub fn run(gpu: &Gpu, args: &Args, report: &mut Report) {
    let client = &gpu.client;
    let default_calls = if gpu.is_card { 1000 } else { 100 };
    let calls = args.host_calls.unwrap_or(default_calls);
    let dtype = FloatType::F32;
    let host = Weight::new([64, 64], QuantConfig::default(), 1);
    let elems = host.layout.elems();
    let weight = DeviceWeight::new(client, &host);
    let out = client.empty(elems * dtype.size_bytes());
    let burn_weight = BlockWeight::from_host(&host.tensor(), &gpu.device);
    let plan = DequantizePlan::new(client, &host.layout, 0..elems, dtype, None)
        .expect("the default runs everywhere");

    let wait_for_op = || gpu.device.sync().expect("the device works");
    let wait = || sync(client);
    let launch = || Implementation::Default.launch(client, &weight, dtype, &out, &out);
    let empty = || empty_launch(client, &plan, &weight, &out, dtype);
    let allocate = || {
        drop(std::hint::black_box(
            client.empty(elems * dtype.size_bytes()),
        ))
    };
    let both = || drop(Implementation::Default.allocate_and_launch(client, &weight, dtype));
    let op = || {
        let decoded: Tensor<2> = burn_weight.dequantize(dtype).expect("a matrix");
        drop(decoded);
    };
    // Two rows of bf16 have several ways to be computed on tensor cores.
    let x_dtype = match gpu.device.supports_dtype(DType::BF16) {
        true => DType::BF16,
        false => DType::F32,
    };
    let x = Tensor::<2>::ones([2, 64], (&gpu.device, x_dtype));
    let product = |strategy| {
        let y = linear_with(x.clone(), &burn_weight, None, strategy).expect("they fit");
        drop(y);
    };
    let auto = || product(MatmulStrategy::Auto);
    let rule = || product(MatmulStrategy::Rule);
    let branch = LowRank {
        a: Tensor::ones([64, 16], (&gpu.device, DType::F32)),
        b: Tensor::ones([16, 64], (&gpu.device, DType::F32)),
        scale: 0.5,
    };
    let lora = || {
        let (branch, strategy) = (branch.clone(), MatmulStrategy::Auto);
        let y = lora_linear(x.clone(), &burn_weight, None, branch, strategy).expect("they fit");
        drop(y);
    };
    type Case<'a> = (&'a str, &'a str, &'a dyn Fn(), &'a dyn Fn());
    let cases: [Case; 8] = [
        ("empty", "empty kernel, same bindings", &empty, &wait),
        ("launch", "launch::dequantize", &launch, &wait),
        ("allocate", "allocation of the result", &allocate, &wait),
        ("allocate_and_launch", "allocation and launch", &both, &wait),
        ("op", "BlockWeight::dequantize", &op, &wait_for_op),
        (
            "linear_auto",
            "linear, way as measured",
            &auto,
            &wait_for_op,
        ),
        ("linear_rule", "linear, way by rule", &rule, &wait_for_op),
        ("linear_lora", "linear, rank 16 joined", &lora, &wait_for_op),
    ];
    dense_product(gpu, args, report);
    let mut medians = [None; 8];
    let mut headed = false;
    for (i, (id, what, call, wait)) in cases.into_iter().enumerate() {
        let name = format!("host_cost/{id}");
        if !args.starts(&name) {
            continue;
        }
        if !headed {
            println!("\nHost time a call, {calls} calls back to back, 64x64 f32, microseconds");
            println!(
                "{:34} {:28} {:>8} {:>8} {:>14}",
                "", "", "median", "spread", "with last sync"
            );
            headed = true;
        }
        let (submit, drained) = time(calls, call, wait);
        println!(
            "{name:34} {what:28} {:>8.3} {:>8.3} {:>14.3}",
            submit.median_us, submit.spread_us, drained.median_us
        );
        medians[i] = Some(submit.median_us);
        report.record(&json!({
            "kind": "host_cost",
            "name": name,
            "device": gpu.place.device,
            "backend": gpu.place.backend,
            "median_us": submit.median_us,
            "spread_us": submit.spread_us,
            "with_sync_us": drained.median_us,
        }));
    }
    if let [Some(empty), Some(launch), _, Some(both), Some(op), ..] = medians {
        println!(
            "ours: {:.3} us a launch (launch - empty), {:.3} us more in the op (op - allocation and launch)",
            launch - empty,
            op - both
        );
    }
}

/// How long a product by cuBLASLt blocks the caller while the device has tens of milliseconds of other
/// work; a synchronisation in its path would show as all of that.
#[cfg(feature = "cublaslt")]
fn dense_product(gpu: &Gpu, args: &Args, report: &mut Report) {
    use burn_nf4::launch::{DenseOperands, DensePlan, DenseProduct};

    let name = "host_cost/dense_product";
    if gpu.place.backend != "cuda" || !args.starts(name) {
        return;
    }
    let client = &gpu.client;
    let product = DenseProduct::new(64, 64, 64, FloatType::F32);
    let plan = DensePlan::new(client, product).expect("cuBLASLt is there");
    let matrix = || client.empty(64 * 64 * 4);
    let (lhs, rhs, out) = (matrix(), matrix(), matrix());
    let launch = || {
        let operands = DenseOperands {
            lhs: lhs.clone(),
            rhs: rhs.clone(),
            scale: 1.0,
            addend: None,
            bias: None,
        };
        plan.launch(operands, out.clone()).expect("buffers fit");
    };
    launch();
    let (mut calls, mut busy) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        sync(client);
        let started = Instant::now();
        (0..8).for_each(|_| gpu.copier.keep_busy());
        for _ in 0..10 {
            let called = Instant::now();
            launch();
            calls.push(called.elapsed().as_secs_f64() * 1e6);
        }
        sync(client);
        busy.push(started.elapsed().as_secs_f64() * 1e6);
    }
    let (call, busy) = (
        Timing::of(calls, Method::Clock),
        Timing::of(busy, Method::Clock),
    );
    println!(
        "\nA product by cuBLASLt behind {:.1} ms of work returns after {:.2} us (median of 50, spread {:.2})",
        busy.median_us / 1e3,
        call.median_us,
        call.spread_us
    );
    report.record(&json!({
        "kind": "host_cost",
        "name": name,
        "device": gpu.place.device,
        "backend": gpu.place.backend,
        "median_us": call.median_us,
        "spread_us": call.spread_us,
        "busy_us": busy.median_us,
    }));
}

#[cfg(not(feature = "cublaslt"))]
fn dense_product(_gpu: &Gpu, _args: &Args, _report: &mut Report) {}

/// Time a call: of the calls alone, and of the calls and one wait for the device.
fn time(calls: usize, call: &dyn Fn(), wait: &dyn Fn()) -> (Timing, Timing) {
    (0..calls).for_each(|_| call());
    wait();
    let samples = (0..SAMPLES).map(|_| {
        let started = Instant::now();
        (0..calls).for_each(|_| call());
        let submitted = started.elapsed();
        wait();
        [submitted, started.elapsed()].map(|time| time.as_secs_f64() * 1e6 / calls as f64)
    });
    let (submitted, drained) = samples.map(|[a, b]| (a, b)).unzip();
    (
        Timing::of(submitted, Method::Clock),
        Timing::of(drained, Method::Clock),
    )
}

/// As the kernels' view of a weight: five scalars.
#[derive(CubeType, CubeLaunch)]
struct EmptyView {
    start: usize,
    len: usize,
    scales: usize,
    codebook: usize,
    zero: u32,
}

/// As the kernels' blueprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct EmptyBlueprint {
    block_log2: u32,
    nested_log2: u32,
    shared: bool,
    skewed: bool,
    ragged: bool,
    per_unit: usize,
    group: usize,
}

/// Does nothing, as no weight is without elements, but keeps all its arguments.
#[cube(launch_unchecked, address_type = "dynamic")]
fn empty_kernel<F: Float, N: Size>(
    packed: &[u32],
    out: &mut [Vector<F, N>],
    view: EmptyView,
    #[comptime] blueprint: EmptyBlueprint,
    #[define(F)] _dtype: ElemType,
) {
    if view.len == 0 {
        let word = packed[view.scales + view.codebook] ^ view.zero;
        let value = f32::cast_from(word >> comptime!(blueprint.block_log2));
        out[view.start] = Vector::<F, N>::cast_from(Vector::<f32, N>::new(value));
    }
}

fn empty_launch(
    client: &Client,
    plan: &DequantizePlan,
    weight: &DeviceWeight,
    out: &Handle,
    dtype: FloatType,
) {
    let layout = &weight.host.layout;
    let len = layout.elems();
    // SAFETY: the kernel reads and writes nothing.
    unsafe {
        empty_kernel::launch_unchecked(
            client,
            plan.cube_count(),
            plan.cube_dim(),
            AddressType::from_len_signed(len),
            plan.vector(),
            BufferArg::from_raw_parts(weight.packed.clone(), layout.words()),
            BufferArg::from_raw_parts(out.clone(), len),
            EmptyViewLaunch::new(0, len, layout.scales_start(), layout.codebook_start(), 0),
            EmptyBlueprint {
                block_log2: 6,
                nested_log2: 8,
                shared: true,
                skewed: false,
                ragged: false,
                per_unit: 4,
                group: 8,
            },
            elem_type(dtype),
        );
    }
}
