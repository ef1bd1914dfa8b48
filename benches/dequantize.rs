//! Device time of every dequantization kernel, as a share of a device copy measured in the same
//! run. Every result is compared with the host's before it is timed.
//!
//! ```text
//! cargo bench --bench dequantize --features cuda [-- FILTER...]
//! ```
//!
//! A bench is named `dequant/VARIANT/DTYPE/SHAPE`; with filters only those run whose name contains
//! one of them. Without a GPU feature the Flex path is timed by the clock.

#[cfg(feature = "cube")]
mod gpu;
mod problems;
#[cfg(feature = "cube")]
mod timing;

use std::time::Instant;

use burn_nf4::format::{FloatElement, FloatType, Nf4Tensor, QuantConfig};
use burn_nf4::host;
use half::{bf16, f16};

fn main() {
    // Cargo passes `--bench`, and users may pass flags of other harnesses.
    let filters: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(f));
    host_benches(&wanted);
    #[cfg(feature = "cube")]
    gpu::benches(&wanted);
}

/// The CPU path, by the clock: median of eleven calls after a warm-up.
fn host_benches(wanted: &dyn Fn(&str) -> bool) {
    for problem in problems::HOST {
        let [rows, columns] = problem.shape;
        let name = format!("dequant/host/{}/{rows}x{columns}", problem.dtype.name());
        if !wanted(&name) {
            continue;
        }
        let weight = problems::weight(problem.shape, 1);
        let packed = weight.to_packed();
        let (median_us, spread_us) = match problem.dtype {
            FloatType::F16 => time_host::<f16>(&weight, &packed),
            FloatType::BF16 => time_host::<bf16>(&weight, &packed),
            FloatType::F32 => time_host::<f32>(&weight, &packed),
        };
        let bytes = problem.bytes(QuantConfig::default());
        println!(
            "{name:45} {median_us:9.1} us  +- {spread_us:7.1}  {:7.1} GB/s",
            bytes as f64 / median_us / 1e3
        );
    }
}

fn time_host<T: FloatElement>(weight: &Nf4Tensor, packed: &[u32]) -> (f64, f64) {
    let layout = weight.packed_layout();
    let mut out = vec![T::zeroed(); layout.elems];
    host::dequantize(packed, &layout, 0, &mut out);
    let checked = layout.elems.min(1 << 16);
    let expected = weight.dequantize_range::<T>(0, checked);
    assert_eq!(
        bytemuck::cast_slice::<T, u8>(&out[..checked]),
        bytemuck::cast_slice::<T, u8>(&expected),
        "the host path differs from the reference"
    );
    let mut times: Vec<f64> = (0..11)
        .map(|_| {
            let started = Instant::now();
            host::dequantize(packed, &layout, 0, &mut out);
            started.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[5], times[8] - times[2])
}
