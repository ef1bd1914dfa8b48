//! The choice of tokens on a device: time a launch by settings and rows, at the vocabulary of Llama 3.
//!
//! ```text
//! cargo bench --features cuda --bench sample
//! ```

#[allow(dead_code, reason = "shared with the other benches")]
mod measure;
#[allow(dead_code, reason = "shared with the other benches")]
mod timing;

use burn::backend::DispatchDevice;
use burn::tensor::Device;
use burn_nf4::format::FloatType;
use burn_nf4::host;
use burn_nf4::launch::{self, SampleBuffers, SampleProblem};
use burn_nf4::op::SampleSettings;
use cubecl::ir::{ElemType, IntKind};
use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::timing::{Window, device_time};

const VOCABULARY: usize = 128_256;
const ROWS: [usize; 3] = [1, 16, 64];
const HEADER: usize = 3;

const DRAWN: SampleSettings = SampleSettings {
    temperature: 0.8,
    ..SampleSettings::greedy()
};

const CASES: [(&str, SampleSettings); 6] = [
    ("greedy", SampleSettings::greedy()),
    ("all", DRAWN),
    ("top_k", SampleSettings { top_k: 50, ..DRAWN }),
    (
        "top_p",
        SampleSettings {
            top_p: 0.95,
            ..DRAWN
        },
    ),
    (
        "top_p_hot",
        SampleSettings {
            temperature: 3.0,
            top_p: 0.95,
            ..DRAWN
        },
    ),
    (
        "everything",
        SampleSettings {
            top_k: 50,
            top_p: 0.95,
            min_p: 0.02,
            repetition_penalty: 1.1,
            ..DRAWN
        },
    ),
];

fn device() -> Device {
    #[cfg(feature = "cuda")]
    return Device::cuda(0);
    #[cfg(all(feature = "wgpu", not(feature = "cuda")))]
    return Device::wgpu(Default::default());
    #[cfg(not(any(feature = "cuda", feature = "wgpu")))]
    Device::default()
}

/// Of rows that are alike in kind: about normal, with a deviation of 3, as logits are.
fn logits(rows: usize, random: &mut StdRng) -> Vec<bf16> {
    let mut normal = || (0..12).map(|_| random.random::<f32>() - 0.5).sum::<f32>();
    let logits = (0..rows * VOCABULARY).map(|_| bf16::from_f32(3.0 * normal()));
    logits.collect()
}

fn main() {
    let device = device();
    let DispatchDevice::Cube(cube) = device.as_dispatch() else {
        println!("no CubeCL device is compiled in");
        return;
    };
    let client = cube.client();
    // Others take the values widened.
    let dtype = match launch::check_dtype(&client, FloatType::BF16) {
        Ok(()) => FloatType::BF16,
        Err(_) => FloatType::F32,
    };
    println!(
        "{}, {}, {VOCABULARY} logits a row",
        client.properties().identity.name,
        dtype.name()
    );
    let mut random = StdRng::seed_from_u64(1);
    for rows in ROWS {
        let logits = logits(rows, &mut random);
        let widened: Vec<f32> = logits.iter().map(|x| x.to_f32()).collect();
        let bytes = match dtype {
            FloatType::BF16 => bytemuck::cast_slice(&logits),
            _ => bytemuck::cast_slice(&widened),
        };
        let on_device = client.create_from_slice(bytes);
        for (name, settings) in CASES {
            let history = settings.repetition_penalty != 1.0;
            let words = HEADER + if history { VOCABULARY.div_ceil(32) } else { 0 };
            let mut state = vec![0u32; rows * words];
            let problem = SampleProblem {
                rows,
                vocabulary: VOCABULARY,
                history,
                settings,
                dtype,
                int: ElemType::Int(IntKind::I32),
            };
            let buffers = SampleBuffers {
                logits: on_device.clone(),
                state: client.create_from_slice(bytemuck::cast_slice(&state)),
                ids: client.empty(rows * 4),
                numbers: client.empty(rows * 4),
            };
            let launch = |_: usize| {
                launch::sample(&client, problem, buffers.clone()).expect("it can run");
            };
            launch(0);
            let given = client.read_one(buffers.ids.clone()).expect("it ran");
            let given: &[i32] = bytemuck::cast_slice(&given[..rows * 4]);
            let expected = host::sample(&logits, VOCABULARY, &mut state, &settings);
            let same = given
                .iter()
                .zip(&expected)
                .all(|(&id, choice)| id as u32 == choice.id);
            assert!(same, "{name}: {given:?} {expected:?}");
            let window = Window {
                launches: 20,
                launch: &launch,
                poison: None,
                copier: None,
            };
            let timing = device_time(&client, &window);
            println!(
                "sample/{name:10}/m{rows:<3} {:9.1} us, spread {:.1} ({:?})",
                timing.median_us, timing.spread_us, timing.method
            );
        }
    }
}
