//! Device time of matrix products with a packed weight, cold: weights rotate over several times
//! the device's cache.

use std::sync::Mutex;

use burn::backend::ops::FloatTensorOps;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use burn_nf4::format::{BlockTensor, FloatType, PackedLayout, QuantConfig};
use burn_nf4::launch::{MatmulPlan, MatmulVariant, Operands, Product, TensorCoreTile, check_dtype};
use burn_nf4::op::{DequantizeSpec, LinearSpec, MatmulSpec, MatmulStrategy, QuantBackend};
use cubecl::server::Handle;
use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::json;

use crate::args::{Args, Sizes};
use crate::formats;
use crate::gpu::{DeviceWeight, Gpu};
use crate::problems::{Weight, dtype_name};
use crate::report::{Report, Timing};
use crate::timing::{self, Window};

pub const DTYPE: FloatType = FloatType::BF16;
/// `[n, k]`.
const SHAPES: [[usize; 2]; 3] = [[14336, 4096], [4096, 14336], [4096, 4096]];
const SMALL_SHAPES: [[usize; 2]; 1] = [[512, 1024]];
/// Rows of `x`.
pub const ROWS: [usize; 8] = [1, 2, 4, 8, 16, 32, 48, 64];
/// The Burn op with a packed weight.
pub const AUTO: &str = "auto";
/// Burn's own product with a dense weight.
pub const BURN_DENSE: &str = "burn_dense";

/// The time of one implementation on one product.
#[derive(Clone)]
pub struct Timed {
    pub variant: String,
    pub dtype: FloatType,
    pub shape: [usize; 2],
    pub m: usize,
    pub timing: Timing,
    /// `|y - exact| / |exact|` in the Frobenius norm, the exact product in f64 over the weight
    /// decoded to bf16.
    pub relative_error: Option<f64>,
}

/// What is timed.
#[derive(Clone, Copy)]
enum Implementation {
    /// The Burn op, which goes the way that it measured.
    Auto,
    /// The kernel and the tile that the rule gives.
    Default,
    Forced(MatmulVariant),
    Tile(MatmulVariant, TensorCoreTile),
}

impl Implementation {
    fn all(args: &Args) -> Vec<Self> {
        let forced = MatmulVariant::ALL.into_iter().map(Self::Forced);
        let tiles = args
            .tile
            .iter()
            .map(|&(variant, tile)| Self::Tile(variant, tile));
        forced
            .chain([Self::Default, Self::Auto])
            .chain(tiles)
            .collect()
    }

    fn name(self) -> String {
        match self {
            Self::Auto => AUTO.into(),
            Self::Default => "default".into(),
            Self::Forced(variant) => variant.name().into(),
            Self::Tile(variant, tile) => {
                let sizes = tile.sizes().map(|size| size.to_string());
                format!("{}-{}", variant.name(), sizes.join("-"))
            }
        }
    }

    /// The launch; none for the op, which plans anew in each call.
    fn plan(
        self,
        gpu: &Gpu,
        layout: &PackedLayout,
        product: Product,
    ) -> Result<Option<MatmulPlan>, String> {
        let client = &gpu.client;
        let plan = match self {
            Self::Auto => return Ok(None),
            Self::Default => MatmulPlan::new(client, layout, product, false, None),
            Self::Forced(variant) => MatmulPlan::new(client, layout, product, false, Some(variant)),
            Self::Tile(variant, tile) => {
                MatmulPlan::with_tile(client, layout, product, false, variant, tile)
            }
        };
        plan.map(Some).map_err(|error| error.to_string())
    }
}

/// The product of a whole weight as the Burn op takes it.
pub fn op_spec(layout: &PackedLayout, [n, k]: [usize; 2], m: usize) -> MatmulSpec {
    let weight = DequantizeSpec {
        layout: *layout,
        rows: n,
        columns: k,
        start: 0,
        dtype: DTYPE,
    };
    let strategy = MatmulStrategy::Auto;
    let linear = LinearSpec {
        weight,
        strategy,
        cublaslt: cfg!(feature = "cublaslt"),
    };
    MatmulSpec::of(linear, m).expect("few rows of a whole weight")
}

/// The name of a bench.
pub fn name(variant: &str, dtype: FloatType, [n, k]: [usize; 2], m: usize) -> String {
    let dtype = dtype_name(dtype);
    format!("matmul/{variant}/{dtype}/{n}x{k}/m{m}")
}

/// The shapes that are timed, `[n, k]`.
pub fn shapes(gpu: &Gpu) -> &'static [[usize; 2]] {
    match gpu.sizes {
        Sizes::Full => &SHAPES,
        Sizes::Small => &SMALL_SHAPES,
    }
}

/// All shapes with all numbers of rows.
pub fn products(gpu: &Gpu) -> impl Iterator<Item = ([usize; 2], usize)> {
    let shapes = shapes(gpu).iter();
    shapes.flat_map(|&shape| ROWS.into_iter().map(move |m| (shape, m)))
}

/// The same for ours and for peers.
pub fn x_values(m: usize, k: usize) -> Vec<bf16> {
    (0..m * k)
        .map(|i| bf16::from_f32((i * 7919 % 1013) as f32 / 506.5 - 1.0))
        .collect()
}

/// The bytes of values in a dtype.
pub fn floats(dtype: FloatType, values: &[bf16]) -> Vec<u8> {
    match dtype {
        FloatType::BF16 => bytemuck::cast_slice(values).to_vec(),
        FloatType::F16 => {
            let values: Vec<f16> = values.iter().map(|v| f16::from_f32(v.to_f32())).collect();
            bytemuck::cast_slice(&values).to_vec()
        }
        FloatType::F32 => {
            let values: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
            bytemuck::cast_slice(&values).to_vec()
        }
    }
}

/// Every kernel on every shape and number of rows, then Burn's dense product.
pub fn benches(gpu: &Gpu, args: &Args, report: &mut Report) -> Vec<Timed> {
    let mut all = Vec::new();
    if let Err(error) = check_dtype(&gpu.client, DTYPE) {
        if !args.list {
            println!("matmul/* not run: {error}");
        }
        return all;
    }
    let runs = shapes(gpu).iter().flat_map(|&shape| {
        let configs = formats::of_product(gpu, shape);
        configs.map(move |config| (shape, config))
    });
    for (shape, config) in runs {
        let wanted: Vec<(Implementation, usize)> = ROWS
            .into_iter()
            .flat_map(|m| Implementation::all(args).into_iter().map(move |i| (i, m)))
            .filter(|(implementation, m)| {
                let variant = formats::variant(&implementation.name(), config);
                args.starts(&name(&variant, DTYPE, shape, *m))
            })
            .collect();
        if wanted.is_empty() {
            continue;
        }
        if all.is_empty() {
            head("Matrix products with a packed weight, bf16, device time, weights rotated");
        }
        all.extend(packed(gpu, shape, config, &wanted, report));
    }
    dense(gpu, args, report, &mut all);
    all
}

pub fn head(title: &str) {
    println!("\n{title}");
    println!(
        "{:44} {:>10} {:>8} {:>10}",
        "", "median us", "spread", "rel. error"
    );
}

/// Prints, writes and returns a result.
pub fn take(gpu: &Gpu, timed: Timed, report: &mut Report) -> Timed {
    let name = name(&timed.variant, timed.dtype, timed.shape, timed.m);
    let Timing {
        median_us,
        spread_us,
        method,
        ..
    } = timed.timing;
    let error = timed.relative_error;
    println!(
        "{name:44} {median_us:>10.2} {spread_us:>8.2} {:>10}",
        error.map_or("-".into(), |error| format!("{error:.2e}"))
    );
    report.record(&json!({
        "kind": "matmul",
        "name": name,
        "device": gpu.place.device,
        "backend": gpu.place.backend,
        "variant": timed.variant,
        "dtype": dtype_name(timed.dtype),
        "shape": timed.shape,
        "m": timed.m,
        "median_us": median_us,
        "spread_us": spread_us,
        "method": method,
        "relative_error": error,
    }));
    timed
}

/// `x Wᵀ` in f64 over the weight decoded to bf16, `[m, n]`. Fewer rows of `x` are the first of more.
fn exact_product(weight: &BlockTensor, [n, k]: [usize; 2], m: usize) -> Vec<f64> {
    let x: Vec<f64> = x_values(m, k).into_iter().map(f64::from).collect();
    let columns: Vec<Vec<f64>> = (0..n)
        .into_par_iter()
        .map(|row| {
            let decoded = weight.dequantize_range::<bf16>(row * k, k);
            let decoded: Vec<f64> = decoded.into_iter().map(f64::from).collect();
            x.chunks(k).map(|x| dot(x, &decoded)).collect()
        })
        .collect();
    (0..m * n).map(|i| columns[i % n][i / n]).collect()
}

/// A weight on the device, as often as it takes to read it past the caches.
pub fn packed_copies(gpu: &Gpu, weight: &Weight) -> Vec<CubeTensor> {
    let words = weight.layout.words();
    let packed = |_| DeviceWeight::new(&gpu.client, weight).packed;
    (0..gpu.copies(words * 4))
        .map(packed)
        .map(|handle| gpu.tensor(handle, [words], DType::U32))
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Several sums at a time, so that it takes vectors.
    let mut sums = [0.0; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

fn packed(
    gpu: &Gpu,
    shape: [usize; 2],
    config: QuantConfig,
    wanted: &[(Implementation, usize)],
    report: &mut Report,
) -> Vec<Timed> {
    let [n, k] = shape;
    let client = &gpu.client;
    let weight = Weight::new(shape, config, 1);
    let layout = &weight.layout;
    let weights = packed_copies(gpu, &weight);
    let copies = weights.len();
    let most_rows = wanted.iter().map(|&(_, m)| m).max().unwrap_or(0);
    let exact = exact_product(&weight.tensor(), shape, most_rows);

    let mut all = Vec::new();
    for &(implementation, m) in wanted {
        let variant = formats::variant(&implementation.name(), config);
        let name = name(&variant, DTYPE, shape, m);
        let dtype = DTYPE;
        let plan = match implementation.plan(gpu, layout, Product { m, n, k, dtype }) {
            Ok(plan) => plan,
            Err(error) => {
                println!("{name:44} not run: {error}");
                continue;
            }
        };
        let x = client.create_from_slice(bytemuck::cast_slice(&x_values(m, k)));
        let x = gpu.tensor(x, [m, k], dtype.into());
        let out: Vec<Handle> = (0..copies).map(|_| client.empty(m * n * 2)).collect();
        let spec = op_spec(layout, shape, m);
        let newest = Mutex::new(out[0].clone());
        let launch = |i: usize| {
            let packed = weights[i % copies].clone();
            let Some(plan) = &plan else {
                let y = CubeBackend::quant_matmul(x.clone(), packed, spec);
                *newest.lock().expect("no one panicked") = y.handle;
                return;
            };
            let operands = Operands {
                x: x.handle.clone(),
                packed: packed.handle,
                bias: None,
                lora: None,
            };
            plan.launch(operands, out[i % copies].clone())
                .expect("buffers are large enough");
        };
        let error = || {
            let y = newest.lock().expect("no one panicked").clone();
            let read = gpu.read(&y, m * n * 2);
            let got: Vec<bf16> = bytemuck::pod_collect_to_vec(&read);
            let (mut error, mut norm) = (0.0, 0.0);
            for (&got, exact) in got.iter().zip(&exact) {
                error += (f64::from(got) - exact).powi(2);
                norm += exact * exact;
            }
            // Rounding to bf16 alone is 2^-9 at worst.
            let relative = f64::sqrt(error / norm);
            assert!(relative < 4e-3, "{name}: relative error {relative}");
            relative
        };
        launch(0);
        error();
        let window = Window {
            launches: if gpu.is_card { copies } else { 2 },
            launch: &launch,
            poison: None,
            copier: Some(&gpu.copier),
        };
        let timing = timing::device_time(client, &window);
        let timed = Timed {
            variant,
            dtype,
            shape,
            m,
            timing,
            relative_error: Some(error()),
        };
        all.push(take(gpu, timed, report));
    }
    all
}

/// Burn's product with a dense weight. It is tuned on its first call, which can take half a minute
/// for each product.
fn dense(gpu: &Gpu, args: &Args, report: &mut Report, all: &mut Vec<Timed>) {
    for (shape, m) in products(gpu) {
        let name = name(BURN_DENSE, DTYPE, shape, m);
        if !args.starts(&name) {
            continue;
        }
        let [n, k] = shape;
        let copies = gpu.copies(n * k * 2);
        let weights: Vec<CubeTensor> = (0..copies)
            .map(|_| CubeBackend::float_swap_dims(gpu.random([n, k], DTYPE), 0, 1))
            .collect();
        let x = gpu.random([m, k], DTYPE);
        let launch = |i: usize| {
            drop(CubeBackend::float_matmul(
                x.clone(),
                weights[i % copies].clone(),
            ));
        };
        let window = Window {
            launches: if gpu.is_card { 4 * copies } else { 2 },
            launch: &launch,
            poison: None,
            copier: Some(&gpu.copier),
        };
        let timed = Timed {
            variant: BURN_DENSE.into(),
            dtype: DTYPE,
            shape,
            m,
            timing: timing::device_time(&gpu.client, &window),
            relative_error: None,
        };
        all.push(take(gpu, timed, report));
    }
}

/// Prints ours beside the others, and draws time against rows.
pub fn summarise(all: &[Timed]) {
    let of = |variant: &str, shape, m| {
        all.iter().find(|timed| {
            (timed.dtype, timed.shape, timed.m) == (DTYPE, shape, m) && timed.variant == variant
        })
    };
    let mut headed = false;
    let few = |timed: &&Timed| timed.variant == AUTO && ROWS.contains(&timed.m);
    for ours in all.iter().filter(few) {
        let others = ["bitsandbytes", "cublas", BURN_DENSE].map(|v| of(v, ours.shape, ours.m));
        if others.iter().all(Option::is_none) {
            continue;
        }
        if !headed {
            println!("\nMedian time in microseconds, and how many times ours; relative errors");
            println!(
                "{:18} {:>8} {:>18} {:>18} {:>18} {:>10} {:>13}",
                "", "ours", "bitsandbytes", "cuBLAS dense", "Burn dense", "error", "bitsandbytes"
            );
            headed = true;
        }
        let us = ours.timing.median_us;
        let cell = |other: Option<&Timed>| match other {
            Some(other) => {
                let theirs = other.timing.median_us;
                format!("{theirs:.1} ({:.2}x)", theirs / us)
            }
            None => "-".into(),
        };
        let error = |timed: Option<&Timed>| {
            let error = timed.and_then(|timed| timed.relative_error);
            error.map_or("-".into(), |error| format!("{error:.2e}"))
        };
        let [n, k] = ours.shape;
        println!(
            "{:18} {us:>8.1} {:>18} {:>18} {:>18} {:>10} {:>13}",
            format!("{n}x{k} m{}", ours.m),
            cell(others[0]),
            cell(others[1]),
            cell(others[2]),
            error(Some(ours)),
            error(others[0]),
        );
    }
}
