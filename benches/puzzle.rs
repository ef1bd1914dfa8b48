//! The puzzle: the protocol of Unsloth's `test_dequantize`.
//!
//! Three models of gate, up and down projections. Two rounds warm up and are checked; then each
//! round decodes up, gate and down of a model, waiting for the device after each, and the host's
//! clock runs. A call allocates what it returns; the three results of a round live until its end.

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use burn_nf4::BlockWeight;
use burn_nf4::format::{FloatType, QuantConfig};
use serde_json::json;

use crate::args::{Args, Sizes};
use crate::problems::{Weight, dtype_name};
use crate::report::{Place, Report};

/// A model of the puzzle.
#[derive(Clone, Copy)]
pub struct Model {
    /// Hidden size.
    pub hd: usize,
    /// Size of the intermediate layer.
    pub m: usize,
    pub dtype: FloatType,
    pub seed: u64,
}

pub fn models(sizes: Sizes) -> [Model; 3] {
    let divisor = match sizes {
        Sizes::Full => 1,
        Sizes::Small => 4,
    };
    [
        (2048, 8192, FloatType::F16, 3407),
        (1024, 4096, FloatType::BF16, 3409),
        (4096, 14336, FloatType::BF16, 3408),
    ]
    .map(|(hd, m, dtype, seed)| Model {
        hd: hd / divisor,
        m: m / divisor,
        dtype,
        seed,
    })
}

impl Model {
    /// Up, gate, down.
    pub fn weights(&self) -> [Weight; 3] {
        let shapes = [[self.m, self.hd], [self.m, self.hd], [self.hd, self.m]];
        [0, 1, 2].map(|i| {
            let seed = self.seed * 3 + i as u64;
            Weight::new(shapes[i], QuantConfig::default(), seed)
        })
    }
}

/// Rounds a model.
pub fn rounds(args: &Args, sizes: Sizes) -> usize {
    args.rounds.unwrap_or(match sizes {
        Sizes::Full => 1000,
        Sizes::Small => 10,
    })
}

/// Seconds that one implementation took.
#[derive(Clone)]
pub struct Score {
    pub implementation: String,
    pub seconds: Vec<f64>,
}

impl Score {
    pub fn total(&self) -> f64 {
        self.seconds.iter().sum()
    }
}

/// The scores on one device.
pub struct Puzzle {
    pub place: Place,
    pub models: [Model; 3],
    pub rounds: usize,
    pub scores: Vec<Score>,
}

impl Puzzle {
    pub fn new(place: Place, models: [Model; 3], rounds: usize) -> Self {
        Self {
            place,
            models,
            rounds,
            scores: Vec::new(),
        }
    }

    /// Takes down the next model's time.
    pub fn add(&mut self, implementation: &str, seconds: f64) {
        let score = self
            .scores
            .iter_mut()
            .find(|score| score.implementation == implementation);
        match score {
            Some(score) => score.seconds.push(seconds),
            None => self.scores.push(Score {
                implementation: implementation.into(),
                seconds: vec![seconds],
            }),
        }
    }

    fn total_of(&self, implementation: &str) -> Option<f64> {
        let score = self
            .scores
            .iter()
            .find(|score| score.implementation == implementation)?;
        Some(score.total())
    }

    /// Prints the scores with the speed-up over each of `references` that took part.
    pub fn print(&self, references: &[&str]) {
        if self.scores.is_empty() {
            return;
        }
        let references: Vec<(&str, f64)> = references
            .iter()
            .filter_map(|&name| Some((name, self.total_of(name)?)))
            .collect();
        println!(
            "\nThe puzzle on {}: {} rounds, {} calls, wall time in seconds",
            self.place.device,
            self.rounds,
            self.rounds * 9
        );
        print!("{:24}", "");
        for model in &self.models {
            let head = format!("{}x{} {}", model.m, model.hd, dtype_name(model.dtype));
            print!(" {head:>16}");
        }
        print!(" {:>9}", "total");
        for (name, _) in &references {
            let head = format!("over {name}");
            print!("  {head:>16}");
        }
        println!();
        for score in &self.scores {
            print!("{:24}", format!("puzzle/{}", score.implementation));
            for seconds in &score.seconds {
                print!(" {seconds:>16.4}");
            }
            print!(" {:>9.4}", score.total());
            for (_, total) in &references {
                let head = format!("{:.2}x", total / score.total());
                print!("  {head:>16}");
            }
            println!();
        }
    }

    /// Records the scores from the `from`-th on.
    pub fn record(&self, report: &mut Report, from: usize) {
        for score in &self.scores[from..] {
            let models = self.models.iter().zip(&score.seconds).map(|(model, seconds)| {
                json!({
                    "hd": model.hd, "m": model.m, "dtype": dtype_name(model.dtype), "seconds": seconds,
                })
            });
            report.record(&json!({
                "kind": "puzzle",
                "name": format!("puzzle/{}", score.implementation),
                "variant": score.implementation,
                "device": self.place.device,
                "backend": self.place.backend,
                "rounds": self.rounds,
                "models": models.collect::<Vec<_>>(),
                "total_s": score.total(),
            }));
        }
    }
}

/// Times the rounds of one model, in seconds. `call(i)` decodes weight `i`, `wait` waits for the
/// device, `bytes` downloads a result.
pub fn time_model<T>(
    name: &str,
    expected: &[Vec<u8>; 3],
    rounds: usize,
    call: impl Fn(usize) -> T,
    wait: impl Fn(),
    bytes: impl Fn(&T) -> Vec<u8>,
) -> f64 {
    for _ in 0..2 {
        for (i, expected) in expected.iter().enumerate() {
            let result = call(i);
            wait();
            assert!(
                bytes(&result) == *expected,
                "puzzle/{name}: wrong weight {i}"
            );
        }
    }
    wait();
    let started = Instant::now();
    for _ in 0..rounds {
        let up = call(0);
        wait();
        let gate = call(1);
        wait();
        let down = call(2);
        wait();
        black_box((up, gate, down));
    }
    started.elapsed().as_secs_f64()
}

/// [`time_model`] of the Burn op.
pub fn time_op(
    device: &Device,
    weights: &[Weight; 3],
    dtype: FloatType,
    expected: &[Vec<u8>; 3],
    rounds: usize,
) -> f64 {
    let weights = weights
        .each_ref()
        .map(|weight| BlockWeight::from_host(&weight.tensor(), device));
    time_model(
        "op",
        expected,
        rounds,
        |i| -> Tensor<2> { weights[i].dequantize(dtype).expect("a matrix") },
        || device.sync().expect("the device works"),
        |tensor| tensor.to_data().as_bytes().to_vec(),
    )
}

/// The puzzle on a device of CubeCL's.
#[cfg(feature = "cube")]
pub fn on_gpu(gpu: &crate::gpu::Gpu, args: &Args, report: &mut Report) -> Option<Puzzle> {
    use crate::gpu::{DeviceWeight, Implementation};
    use crate::timing::sync;

    let implementations: Vec<Implementation> = Implementation::all()
        .filter(|implementation| args.starts(&format!("puzzle/{}", implementation.name())))
        .collect();
    let op = args.starts("puzzle/op");
    if implementations.is_empty() && !op {
        return None;
    }
    let client = &gpu.client;
    let models = models(gpu.sizes).map(|model| Model {
        dtype: gpu.dtype_or_f32(model.dtype),
        ..model
    });
    let rounds = rounds(args, gpu.sizes);
    let mut puzzle = Puzzle::new(gpu.place.clone(), models, rounds);
    for model in models {
        let weights = model.weights();
        let expected = weights.each_ref().map(|weight| weight.decoded(model.dtype));
        let on_device = weights
            .each_ref()
            .map(|weight| DeviceWeight::new(client, weight));
        for &implementation in &implementations {
            let name = implementation.name();
            if let Some(obstacle) = implementation.obstacle(gpu, &weights[0], model.dtype) {
                println!("puzzle/{name} not run: {obstacle}");
                continue;
            }
            let seconds = time_model(
                name,
                &expected,
                rounds,
                |i| implementation.allocate_and_launch(client, &on_device[i], model.dtype),
                || sync(client),
                |out| gpu.read(out, expected[0].len()),
            );
            puzzle.add(name, seconds);
        }
        if op {
            let seconds = time_op(&gpu.device, &weights, model.dtype, &expected, rounds);
            puzzle.add("op", seconds);
        }
    }
    puzzle.print(&["unfused"]);
    puzzle.record(report, 0);
    Some(puzzle)
}
