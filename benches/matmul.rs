//! Device time of matrix products with a packed weight, cold: weights rotate over several times
//! the device's cache.

use burn_nf4::format::{FloatType, Nf4Tensor, QuantConfig};
use burn_nf4::launch::{MatmulPlan, MatmulVariant, Product, TensorCoreTile};
use cubecl::server::Handle;
use half::bf16;
use serde_json::json;

use crate::args::Args;
use crate::device_time::ROTATION_BYTES;
use crate::gpu::{DeviceWeight, Gpu};
use crate::problems::Weight;
use crate::report::Report;
use crate::timing::{self, Window};

/// `[n, k]`.
pub const SHAPES: [[usize; 2]; 3] = [[14336, 4096], [4096, 14336], [4096, 4096]];
/// Rows of x.
pub const ROWS: [usize; 8] = [1, 2, 4, 8, 16, 32, 48, 64];

/// The name of a bench.
pub fn name(variant: &str, [n, k]: [usize; 2], m: usize) -> String {
    format!("matmul/{variant}/bf16/{n}x{k}/m{m}")
}

/// Every kernel on every shape and number of rows.
pub fn benches(gpu: &Gpu, args: &Args, report: &mut Report) {
    let dtype = FloatType::BF16;
    let mut headed = false;
    for shape in SHAPES {
        let [n, k] = shape;
        let mut wanted: Vec<(String, usize, Option<MatmulVariant>, Option<TensorCoreTile>)> =
            Vec::new();
        for m in ROWS {
            for variant in MatmulVariant::ALL {
                wanted.push((name(variant.name(), shape, m), m, Some(variant), None));
            }
            wanted.push((name("default", shape, m), m, None, None));
            for &tile in &args.tile {
                let TensorCoreTile {
                    row_tiles,
                    row_planes,
                    k_planes,
                    chunks,
                    k_cubes,
                } = tile;
                let id = format!("tile-{row_tiles}-{row_planes}-{k_planes}-{chunks}-{k_cubes}");
                wanted.push((name(&id, shape, m), m, None, Some(tile)));
            }
        }
        wanted.retain(|(name, ..)| args.starts(name));
        if wanted.is_empty() {
            continue;
        }
        if !headed {
            println!("\nMatrix products, bf16, device time, weights rotated");
            println!(
                "{:44} {:>10} {:>8} {:>8} {:>7}",
                "", "median us", "spread", "GB/s", "% copy"
            );
            headed = true;
        }
        let weight = Weight::new(shape, QuantConfig::default(), 1);
        let packed_bytes = weight.layout.words * 4;
        let copies = (ROTATION_BYTES / packed_bytes).max(2);
        let weights: Vec<DeviceWeight> = (0..copies)
            .map(|_| DeviceWeight::new(&gpu.client, &weight))
            .collect();
        let tensor: Nf4Tensor = weight.tensor();
        let check_rows: Vec<usize> = (0..n).step_by(n / 61).collect();
        let decoded: Vec<Vec<bf16>> = check_rows
            .iter()
            .map(|row| tensor.dequantize_range(row * k, k))
            .collect();
        for (name, m, variant, tile) in wanted {
            let x: Vec<bf16> = (0..m * k)
                .map(|i| bf16::from_f32(((i * 7919 % 1013) as f32 / 506.5) - 1.0))
                .collect();
            let x_handle = gpu.client.create_from_slice(bytemuck::cast_slice(&x));
            let product = Product { m, n, k, dtype };
            let layout = &weight.layout;
            let plan = match tile {
                Some(tile) => MatmulPlan::with_tile(&gpu.client, layout, product, false, tile),
                None => MatmulPlan::new(&gpu.client, layout, product, false, variant),
            };
            let plan = match plan {
                Ok(plan) => plan,
                Err(error) => {
                    println!("{name:44} not run: {error}");
                    continue;
                }
            };
            let out: Vec<Handle> = (0..copies).map(|_| gpu.client.empty(m * n * 2)).collect();
            let launch = |i: usize| {
                let i = i % copies;
                plan.launch(
                    &gpu.client,
                    x_handle.clone(),
                    weights[i].packed.clone(),
                    layout,
                    None,
                    out[i].clone(),
                )
                .expect("buffers are large enough");
            };
            let check = |when: &str| {
                let read = gpu.read(&out[0], m * n * 2);
                let got: Vec<bf16> = bytemuck::pod_collect_to_vec(&read);
                let mut error = 0.0f64;
                let mut norm = 0.0f64;
                for (at, row) in check_rows.iter().enumerate() {
                    for column in 0..m {
                        let sum: f64 = (0..k)
                            .map(|i| f64::from(x[column * k + i]) * f64::from(decoded[at][i]))
                            .sum();
                        error += (f64::from(got[column * n + row]) - sum).powi(2);
                        norm += sum * sum;
                    }
                }
                let relative = (error / norm).sqrt();
                assert!(relative < 4e-3, "{name}, {when}: relative error {relative}");
                relative
            };
            launch(0);
            let relative = check("before timing");
            let timing = timing::device_time(
                &gpu.client,
                &Window {
                    launches: copies,
                    launch: &launch,
                    poison: None,
                    copier: Some(&gpu.copier),
                },
            );
            check("as timed");
            let bytes = packed_bytes + (m * k + m * n) * 2;
            let gb_s = bytes as f64 / timing.median_us / 1e3;
            println!(
                "{name:44} {:>10.2} {:>8.2} {:>8.1} {:>7.1}",
                timing.median_us,
                timing.spread_us,
                gb_s,
                gb_s * 1e11 / gpu.copy
            );
            report.record(&json!({
                "kind": "matmul",
                "name": name,
                "device": gpu.place.device,
                "variant": plan.variant().name(),
                "shape": shape,
                "m": m,
                "median_us": timing.median_us,
                "spread_us": timing.spread_us,
                "bytes": bytes,
                "gb_s": gb_s,
                "percent_of_copy": gb_s * 1e11 / gpu.copy,
                "relative_error": relative,
            }));
        }
    }
}
