//! Benches of the CubeCL kernels.

use burn::backend::DispatchDevice;
use burn::tensor::Device;
use burn_nf4::format::{FloatElement, FloatType, PackedLayout, QuantConfig};
use burn_nf4::host;
use burn_nf4::launch::{self, Variant};
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::{bf16, f16};

use crate::problems::{self, Problem};
use crate::timing::{self, Timing};

/// Bytes that a rotation goes through before it comes back to a buffer: several times the L2.
const ROTATION_BYTES: usize = 512 << 20;

pub fn benches(wanted: &dyn Fn(&str) -> bool) {
    for device in devices() {
        let DispatchDevice::Cube(cube) = device.as_dispatch() else {
            continue;
        };
        let client = cube.client();
        let identity = &client.properties().identity;
        println!("\n{} ({})", identity.name, client.name());
        let copy = timing::copy_bandwidth(&client);
        println!("device copy: {:.1} GB/s read + written", copy / 1e9);
        let is_gpu = client
            .properties()
            .hardware
            .num_streaming_multiprocessors
            .is_some();
        for problem in problems::GPU {
            if !is_gpu && problem.shape[0] * problem.shape[1] > 1 << 22 {
                continue;
            }
            if launch::check_dtype(&client, problem.dtype).is_err() {
                continue;
            }
            dequantize(&client, problem, copy, is_gpu, wanted);
        }
    }
}

/// The devices compiled in.
fn devices() -> Vec<Device> {
    vec![
        #[cfg(feature = "cuda")]
        Device::cuda(0),
        #[cfg(feature = "rocm")]
        Device::rocm(0),
        #[cfg(feature = "metal")]
        Device::metal(Default::default()),
        #[cfg(feature = "vulkan")]
        Device::vulkan(Default::default()),
        #[cfg(all(feature = "wgpu", not(feature = "cuda")))]
        Device::wgpu(Default::default()),
    ]
}

fn dequantize(
    client: &Client,
    problem: &Problem,
    copy: f64,
    is_gpu: bool,
    wanted: &dyn Fn(&str) -> bool,
) {
    let [rows, columns] = problem.shape;
    let name = |variant: Variant| {
        format!(
            "dequant/{}/{}/{rows}x{columns}",
            variant.name(),
            problem.dtype.name()
        )
    };
    if !Variant::ALL.iter().any(|&variant| wanted(&name(variant))) {
        return;
    }
    let weight = problems::weight(problem.shape, 1);
    let words = weight.to_packed();
    let layout = weight.packed_layout();
    let bytes = problem.bytes(QuantConfig::default());
    let copies = if is_gpu {
        (ROTATION_BYTES / bytes).max(2)
    } else {
        2
    };
    let packed: Vec<Handle> = (0..copies)
        .map(|_| client.create_from_slice(bytemuck::cast_slice(&words)))
        .collect();
    let out_bytes = layout.elems * problem.dtype.size_bytes();
    let out: Vec<Handle> = (0..copies).map(|_| client.empty(out_bytes)).collect();

    for variant in Variant::ALL {
        let name = name(variant);
        if !wanted(&name) {
            continue;
        }
        let launch_on = |packed: &Handle, out: &Handle| {
            launch::dequantize(
                client,
                packed.clone(),
                &layout,
                0,
                layout.elems,
                problem.dtype,
                out.clone(),
                Some(variant),
            )
            .expect("a valid launch");
        };
        let poison = client.create_from_slice(&vec![0xff; out_bytes]);
        launch_on(&packed[0], &poison);
        let read = client.read_one(poison).expect("the kernel ran");
        check(&words, &layout, problem.dtype, &read[..out_bytes], &name);

        let launches = if is_gpu { copies.max(20) } else { 2 };
        let timing = timing::device_time(client, launches, &|i| {
            launch_on(&packed[i % copies], &out[i % copies]);
        });
        report(&name, timing, bytes, copy);
    }
}

/// Compares with the host path, bit for bit.
fn check(words: &[u32], layout: &PackedLayout, dtype: FloatType, got: &[u8], name: &str) {
    fn same<T: FloatElement>(words: &[u32], layout: &PackedLayout, got: &[u8]) -> bool {
        let mut expected = vec![T::zeroed(); layout.elems];
        host::dequantize(words, layout, 0, &mut expected);
        bytemuck::cast_slice::<T, u8>(&expected) == got
    }
    let same = match dtype {
        FloatType::F16 => same::<f16>(words, layout, got),
        FloatType::BF16 => same::<bf16>(words, layout, got),
        FloatType::F32 => same::<f32>(words, layout, got),
    };
    assert!(same, "{name} differs from the host path");
}

fn report(name: &str, timing: Timing, bytes: usize, copy: f64) {
    let rate = bytes as f64 / (timing.median_us * 1e-6);
    println!(
        "{name:45} {:9.2} us  +- {:6.2}  {:7.1} GB/s  {:5.1}% of copy{}",
        timing.median_us,
        timing.spread_us,
        rate / 1e9,
        100.0 * rate / copy,
        if timing.graph {
            ""
        } else {
            "  (host launches)"
        }
    );
}
