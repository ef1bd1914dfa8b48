//! Device time of dequantization and quantization, cold: buffers rotate over several times the
//! device's cache.

use burn_nf4::format::{FloatType, PackedLayout, QuantConfig};
use burn_nf4::{host, launch};
use cubecl::server::Handle;

use crate::args::Args;
use crate::formats;
use crate::gpu::{DeviceWeight, Gpu, Implementation};
use crate::problems::{self, Problem, Weight};
use crate::report::{Report, Subject};
use crate::timing::{self, Kept, Window};
use crate::unfused;

/// Bytes that a rotation goes through before it comes back to a buffer: several times the L2.
pub const ROTATION_BYTES: usize = 512 << 20;
/// The same for software that plays a graphics card.
const SMALL_ROTATION_BYTES: usize = 32 << 20;

/// The name of a dequantization bench.
pub fn dequantize_name(variant: &str, problem: &Problem, hot: bool) -> String {
    let hot = if hot { "/hot" } else { "" };
    format!("dequant/{variant}/{}{hot}", problem.id())
}

/// The name of a quantization bench.
pub fn quantize_name(variant: &str, problem: &Problem, config: QuantConfig) -> String {
    let variant = if variant.is_empty() {
        String::new()
    } else {
        format!("{variant}/")
    };
    let flat = if config.nested_block_size.is_none() {
        "/flat"
    } else {
        ""
    };
    format!("quantize/{variant}{}{flat}", problem.id())
}

impl Gpu {
    /// Buffers to rotate over, and launches in a window.
    fn rotation(&self, bytes: usize) -> (usize, usize) {
        if self.is_card {
            let copies = self.copies(bytes);
            (copies, copies.max(20))
        } else {
            let copies = (SMALL_ROTATION_BYTES / bytes).max(2);
            (copies, copies.min(4))
        }
    }
}

/// Every implementation on every shape, and one shape from a warm cache.
pub fn dequantize(gpu: &Gpu, args: &Args, report: &mut Report) {
    let mut headed = false;
    let problems = problems::device(gpu.sizes).iter();
    let runs = problems.flat_map(|&problem| {
        let configs = formats::of_problem(gpu, &problem);
        configs.map(move |config| (problem, config))
    });
    for (problem, config) in runs {
        let rows: Vec<(Implementation, bool)> = [false, true]
            .into_iter()
            .filter(|hot| !hot || problem == problems::hot(gpu.sizes))
            .flat_map(|hot| Implementation::all().map(move |implementation| (implementation, hot)))
            .filter(|&(implementation, hot)| {
                formats::is_nf4(config) || !(hot || implementation == Implementation::Unfused)
            })
            .filter(|&(implementation, hot)| {
                let variant = formats::variant(implementation.name(), config);
                args.starts(&dequantize_name(&variant, &problem, hot))
            })
            .collect();
        if rows.is_empty() {
            continue;
        }
        if !headed {
            report.head("Dequantization, device time, buffers rotated (hot: the same ones again)");
            headed = true;
        }
        if let Err(error) = launch::check_dtype(&gpu.client, problem.dtype) {
            println!("dequant/*/{:34} not run: {error}", problem.id());
            continue;
        }
        dequantize_problem(gpu, problem, config, &rows, report);
    }
}

fn dequantize_problem(
    gpu: &Gpu,
    problem: Problem,
    config: QuantConfig,
    rows: &[(Implementation, bool)],
    report: &mut Report,
) {
    let client = &gpu.client;
    let weight = Weight::new(problem.shape, config, 1);
    let expected = weight.decoded(problem.dtype);
    let out_bytes = expected.len();
    let (copies, launches) = gpu.rotation(problem.bytes(config));
    let weights: Vec<DeviceWeight> = (0..copies)
        .map(|_| DeviceWeight::new(client, &weight))
        .collect();
    let out: Vec<Handle> = (0..copies).map(|_| client.empty(out_bytes)).collect();
    let scales = client.empty(unfused::scales_bytes(&weight.layout));
    let poison = client.create_from_slice(&vec![0xff; out_bytes]);

    for &(implementation, hot) in rows {
        let variant = formats::variant(implementation.name(), config);
        let name = dequantize_name(&variant, &problem, hot);
        if let Some(obstacle) = implementation.obstacle(gpu, &weight, problem.dtype) {
            println!("{name:44} not run: {obstacle}");
            continue;
        }
        let copies = if hot { 1 } else { copies };
        let check = |when: &str| {
            let got = gpu.read(&out[0], out_bytes);
            assert!(
                got == expected,
                "{name}, {when}: other bits than the host path"
            );
        };
        let spoil = || timing::copy(client, &poison, &out[0], out_bytes);
        let launch = |i: usize| {
            let (weight, out) = (&weights[i % copies], &out[i % copies]);
            implementation.launch(client, weight, problem.dtype, &scales, out);
        };
        spoil();
        launch(0);
        check("before timing");
        let window = Window {
            launches,
            launch: &launch,
            poison: Some(&spoil),
            copier: Some(&gpu.copier),
        };
        let timing = timing::device_time(client, &window);
        check("as timed");
        let subject = Subject {
            kind: "dequantize",
            name: name.clone(),
            variant,
            problem,
            config,
            hot,
            same_bits: None,
        };
        report.add(&gpu.place, subject, timing, gpu.copy);
    }
}

/// The settings that are quantized to: with double quantization and without.
pub fn quantize_configs() -> [QuantConfig; 2] {
    [QuantConfig::default(), QuantConfig::flat()]
}

/// Quantization of dense weights on the device. The call allocates what it returns.
pub fn quantize(gpu: &Gpu, args: &Args, report: &mut Report) {
    let mut headed = false;
    for problem in problems::quantize(gpu.sizes) {
        for config in quantize_configs() {
            let name = quantize_name("", &problem, config);
            if !args.starts(&name) {
                continue;
            }
            if !headed {
                report.head("Quantization, all launches of it, device time, buffers rotated");
                headed = true;
            }
            if let Err(error) = launch::check_dtype(&gpu.client, problem.dtype) {
                println!("{name:44} not run: {error}");
                continue;
            }
            quantize_problem(gpu, problem, config, name, report);
        }
    }
}

fn quantize_problem(
    gpu: &Gpu,
    problem: Problem,
    config: QuantConfig,
    name: String,
    report: &mut Report,
) {
    let client = &gpu.client;
    let layout = PackedLayout::new(problem.elems(), config);
    let dense = problems::dense(problem.shape, 1);
    let bytes = problems::round_bytes(&dense, problem.dtype);
    let expected = quantized(&bytes, problem, config);
    let (copies, launches) = gpu.rotation(problem.bytes(config));
    let dense: Vec<Handle> = (0..copies)
        .map(|_| client.create_from_slice(&bytes))
        .collect();
    let call = |i: usize| {
        let weight = dense[i % copies].clone();
        launch::quantize(client, weight, problem.dtype, &problem.shape, &layout)
            .expect("a valid launch")
    };
    let got = gpu.read(&call(0), layout.words() * 4);
    assert!(
        got == bytemuck::cast_slice::<u32, u8>(&expected),
        "{name}: other words than the host path"
    );
    // A few launches a window, so that they can be queued while the device is kept busy.
    let launches = launches.min(8);
    let kept = Kept::default();
    let launch = |i: usize| kept.keep(call(i), launches);
    let window = Window {
        launches,
        launch: &launch,
        poison: None,
        copier: Some(&gpu.copier),
    };
    let timing = timing::device_time(client, &window);
    let subject = Subject {
        kind: "quantize",
        name,
        variant: "default".into(),
        problem,
        config,
        hot: false,
        same_bits: None,
    };
    report.add(&gpu.place, subject, timing, gpu.copy);
}

/// What quantizing has to give: the host path's words.
pub fn quantized(bytes: &[u8], problem: Problem, config: QuantConfig) -> Vec<u32> {
    let shape = &problem.shape;
    let words = match problem.dtype {
        FloatType::F16 => {
            let weight: Vec<half::f16> = bytemuck::pod_collect_to_vec(bytes);
            host::quantize(&weight, shape, config)
        }
        FloatType::BF16 => {
            let weight: Vec<half::bf16> = bytemuck::pod_collect_to_vec(bytes);
            host::quantize(&weight, shape, config)
        }
        FloatType::F32 => {
            let weight: Vec<f32> = bytemuck::pod_collect_to_vec(bytes);
            host::quantize(&weight, shape, config)
        }
    };
    words.expect("finite weights")
}
