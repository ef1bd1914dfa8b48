//! Attention on a CubeCL device: forward, with the gradients, and for one query over a long cache, beside
//! PyTorch's `scaled_dot_product_attention` where asked for.
//!
//! ```text
//! cargo bench --bench attention --features cuda -- [--peer python3] [--variant rows] [FILTER]...
//! ```
//!
//! Every result is compared with sums in f64 before it is timed.

#[allow(dead_code, reason = "shared with another bench, which uses all of it")]
mod measure;
#[allow(dead_code, reason = "as above")]
mod timing;

use std::collections::HashMap;
use std::error::Error;
use std::process::Command;

use burn::backend::DispatchDevice;
use burn::tensor::Device;
use burn_nf4::format::FloatType;
use burn_nf4::launch::{
    AttentionOperands, AttentionPlan, AttentionProblem, AttentionResults, AttentionVariant,
    TokenMajor, check_dtype,
};
use clap::Parser;
use cubecl::prelude::Client;
use cubecl::server::Handle;
use half::bf16;
use serde_json::Value;

use timing::{Copier, Window, device_time};

/// Time attention.
#[derive(Parser)]
struct Args {
    /// Run only the cases whose name contains one of these. Names look like `4x32/8x2048/2048x128`: batch,
    /// heads of queries and of keys, queries and keys, elements of a head.
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,
    /// A Python with PyTorch, to time its attention on the same sizes.
    #[arg(long, value_name = "PYTHON")]
    peer: Option<String>,
    /// The kernels: `rows` or `tensor_core`. Those that suit by default.
    #[arg(long)]
    variant: Option<String>,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is timed: causal, bf16 where the device has it.
#[derive(Clone, Copy)]
struct Case {
    batch: usize,
    heads: [usize; 2],
    queries: usize,
    keys: usize,
    head_dim: usize,
}

const fn case(batch: usize, heads: [usize; 2], tokens: usize, head_dim: usize) -> Case {
    Case {
        batch,
        heads,
        queries: tokens,
        keys: tokens,
        head_dim,
    }
}

const fn decode(batch: usize, queries: usize) -> Case {
    Case {
        batch,
        heads: [32, 8],
        queries,
        keys: 8192,
        head_dim: 128,
    }
}

const CARD: [Case; 12] = [
    decode(1, 1),
    decode(16, 1),
    decode(1, 4),
    decode(64, 1),
    case(4, [32, 8], 2048, 128),
    case(1, [32, 8], 8192, 128),
    case(1, [32, 8], 2048, 128),
    case(1, [32, 8], 512, 128),
    case(4, [32, 8], 2048, 64),
    case(2, [8, 4], 2048, 256),
    case(4, [32, 32], 2048, 96),
    case(1, [32, 8], 131_072, 128),
];

const SOFTWARE: [Case; 3] = [
    case(1, [4, 2], 64, 64),
    case(1, [4, 2], 48, 32),
    Case {
        batch: 2,
        heads: [4, 2],
        queries: 1,
        keys: 100,
        head_dim: 64,
    },
];

impl Case {
    fn name(&self) -> String {
        let Self {
            batch,
            heads: [heads, kv_heads],
            queries,
            keys,
            head_dim,
        } = self;
        format!("{batch}x{heads}/{kv_heads}x{queries}/{keys}x{head_dim}")
    }

    /// Whether it is bound by reading keys and values.
    fn decodes(&self) -> bool {
        self.queries < 16
    }

    fn problem(&self, dtype: FloatType) -> AttentionProblem {
        AttentionProblem {
            batch: self.batch,
            heads: self.heads[0],
            kv_heads: self.heads[1],
            queries: self.queries,
            keys: self.keys,
            head_dim: self.head_dim,
            range_rows: 1,
            scale: (self.head_dim as f32).powf(-0.5),
            softcap: None,
            dtype,
        }
    }

    /// Operations of the forward pass, what is masked left out.
    fn flop(&self) -> f64 {
        let pairs: usize = (0..self.queries).map(|query| self.seen(query)).sum();
        4.0 * (self.batch * self.heads[0] * self.head_dim) as f64 * pairs as f64
    }

    /// Keys that a query sees.
    fn seen(&self, query: usize) -> usize {
        self.keys - self.queries + query + 1
    }

    fn ranges(&self) -> Vec<i32> {
        (0..self.queries)
            .flat_map(|query| [0, self.seen(query) as i32])
            .collect()
    }
}

/// Numbers that look random, rounded to bf16; after some millions the same again.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0).to_f32()
    };
    let some: Vec<f32> = (0..count.min((1 << 22) + 77)).map(|_| next()).collect();
    some.iter().copied().cycle().take(count).collect()
}

fn upload(client: &Client, values: &[f32], dtype: FloatType) -> Handle {
    match dtype {
        FloatType::F32 => client.create_from_slice(bytemuck::cast_slice(values)),
        _ => {
            let values: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
            client.create_from_slice(bytemuck::cast_slice(&values))
        }
    }
}

fn download(client: &Client, handle: &Handle, dtype: FloatType) -> Result<Vec<f32>, String> {
    let bytes = client
        .read_one(handle.clone())
        .map_err(|error| format!("{error:?}"))?;
    Ok(match dtype {
        FloatType::F32 => bytemuck::cast_slice(&bytes).to_vec(),
        _ => bytemuck::cast_slice::<u8, bf16>(&bytes)
            .iter()
            .map(|value| value.to_f32())
            .collect(),
    })
}

/// A case on the device.
struct Bench {
    client: Client,
    case: Case,
    problem: AttentionProblem,
    plan: AttentionPlan,
    /// Several, so that caches do not hold them.
    operands: Vec<AttentionOperands>,
    host: [Vec<f32>; 3],
    out: Handle,
    lse: Handle,
    grad: Handle,
    grads: [Handle; 3],
}

/// Bytes of keys and values that are read before the same ones are again.
const ROTATION_BYTES: usize = 256 << 20;

impl Bench {
    fn new(
        client: &Client,
        case: Case,
        dtype: FloatType,
        variant: Option<AttentionVariant>,
    ) -> Result<Self, Box<dyn Error>> {
        let problem = case.problem(dtype);
        let plan = AttentionPlan::new(client, problem, variant)?;
        let query_elems = case.batch * case.queries * case.heads[0] * case.head_dim;
        let key_elems = case.batch * case.keys * case.heads[1] * case.head_dim;
        let host = [
            numbers(query_elems, 1),
            numbers(key_elems, 2),
            numbers(key_elems, 3),
        ];
        let ranges = client.create_from_slice(bytemuck::cast_slice(&case.ranges()));
        let query_dims = [case.batch, case.queries, case.heads[0], case.head_dim];
        let key_dims = [case.batch, case.keys, case.heads[1], case.head_dim];
        let copies = match case.decodes() {
            true => (ROTATION_BYTES / (2 * problem.key_bytes())).clamp(1, 16),
            false => 1,
        };
        let operands = (0..copies).map(|_| {
            let [q, k, v] = host.each_ref().map(|values| upload(client, values, dtype));
            AttentionOperands {
                q: TokenMajor::contiguous(q, query_dims),
                k: TokenMajor::contiguous(k, key_dims),
                v: TokenMajor::contiguous(v, key_dims),
                ranges: ranges.clone(),
            }
        });
        Ok(Self {
            operands: operands.collect(),
            client: client.clone(),
            case,
            problem,
            plan,
            out: client.empty(problem.query_bytes()),
            lse: client.empty(problem.lse_bytes()),
            grad: upload(client, &numbers(query_elems, 4), dtype),
            grads: [
                client.empty(problem.query_bytes()),
                client.empty(problem.key_bytes()),
                client.empty(problem.key_bytes()),
            ],
            host,
        })
    }

    fn forward(&self, i: usize) {
        let operands = &self.operands[i % self.operands.len()];
        self.plan
            .forward(operands, self.out.clone(), self.lse.clone())
            .expect("the buffers fit");
    }

    fn backward(&self) {
        let Case {
            batch,
            heads,
            queries,
            head_dim,
            ..
        } = self.case;
        let dims = [batch, queries, heads[0], head_dim];
        let results = AttentionResults {
            output: TokenMajor::contiguous(self.out.clone(), dims),
            grad: TokenMajor::contiguous(self.grad.clone(), dims),
            lse: self.lse.clone(),
        };
        self.plan
            .backward(&self.operands[0], &results, self.grads.clone())
            .expect("the buffers fit");
    }

    /// Compares some rows of the output with f64.
    fn check(&self) -> Result<(), String> {
        self.forward(0);
        let out = download(&self.client, &self.out, self.problem.dtype)?;
        let Case {
            batch,
            heads: [heads, kv_heads],
            queries,
            keys,
            head_dim: d,
        } = self.case;
        let [q, k, v] = &self.host;
        for sample in 0..12 {
            let row = sample * 7919 % (batch * queries * heads);
            let (token, head) = (row / heads, row % heads);
            let (batch, query) = (token / queries, token % queries);
            let key_at = |key| ((batch * keys + key) * kv_heads + head / (heads / kv_heads)) * d;
            let q = &q[row * d..][..d];
            let seen = self.case.seen(query);
            let scores: Vec<f64> = (0..seen)
                .map(|key| {
                    let k = &k[key_at(key)..][..d];
                    let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q * k)).sum();
                    dot * (d as f64).powf(-0.5)
                })
                .collect();
            let high = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let powers: Vec<f64> = scores.iter().map(|score| (score - high).exp()).collect();
            let total: f64 = powers.iter().sum();
            for e in 0..d {
                let values = powers.iter().enumerate();
                let sum: f64 = values
                    .map(|(key, power)| power * f64::from(v[key_at(key) + e]))
                    .sum();
                let (expected, got) = (sum / total, f64::from(out[row * d + e]));
                if (got - expected).abs() > 0.01 {
                    return Err(format!(
                        "row {row}, element {e}: {got}, expected {expected}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Microseconds of a launch, and of one with its gradients where that is timed.
    fn time(&self, copier: &Copier) -> (f64, Option<f64>) {
        let launches = if self.case.flop() > 1e12 { 1 } else { 8 };
        let window = |launch: &(dyn Fn(usize) + Sync)| {
            let window = Window {
                launches: launches.max(self.operands.len()),
                launch,
                poison: None,
                copier: Some(copier),
            };
            device_time(&self.client, &window).median_us
        };
        let forward = window(&|i| self.forward(i));
        let both = (!self.case.decodes()).then(|| {
            window(&|i| {
                self.forward(i);
                self.backward();
            })
        });
        (forward, both)
    }
}

/// Microseconds of PyTorch's back ends by case: forward, and with the gradients.
type Peers = HashMap<String, Vec<(String, f64, Option<f64>)>>;

fn peers(python: &str, cases: &[Case]) -> Result<Peers, Box<dyn Error>> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peer_attention.py");
    let sizes = cases.iter().map(|case| {
        let [heads, kv_heads] = case.heads;
        let sizes = [
            case.batch,
            heads,
            kv_heads,
            case.queries,
            case.keys,
            case.head_dim,
        ];
        sizes.map(|size| size.to_string()).join(",")
    });
    let output = Command::new(python).arg(script).args(sizes).output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    let mut peers = Peers::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let line: Value = serde_json::from_str(line)?;
        if let Some(text) = line["note"].as_str() {
            println!("{text}");
            continue;
        }
        let index = line["case"].as_u64().ok_or("a line without a case")? as usize;
        let who = line["who"].as_str().unwrap_or_default().to_string();
        let forward = line["forward_us"].as_f64().ok_or("a line without a time")?;
        let row = (who, forward, line["both_us"].as_f64());
        peers.entry(cases[index].name()).or_default().push(row);
    }
    Ok(peers)
}

fn device() -> Device {
    #[cfg(feature = "cuda")]
    return Device::cuda(0);
    #[cfg(all(feature = "wgpu", not(feature = "cuda")))]
    return Device::wgpu(Default::default());
    #[cfg(all(feature = "cube", not(any(feature = "cuda", feature = "wgpu"))))]
    return Device::default();
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = device();
    let DispatchDevice::Cube(cube) = device.as_dispatch() else {
        return Err(format!("{device:?} is not a CubeCL device").into());
    };
    let client = cube.client();
    let identity = &client.properties().identity;
    let is_card = identity.physical.is_some();
    let mut cases = if is_card {
        CARD.to_vec()
    } else {
        SOFTWARE.to_vec()
    };
    if !args.filters.is_empty() {
        let filters = &args.filters;
        cases.retain(|case| filters.iter().any(|filter| case.name().contains(filter)));
    }
    let variant = match &args.variant {
        None => None,
        Some(name) => {
            let mut all = AttentionVariant::ALL.into_iter();
            let found = all.find(|variant| variant.name() == name);
            Some(found.ok_or_else(|| format!("there are no kernels named {name}"))?)
        }
    };
    let dtype = match check_dtype(&client, FloatType::BF16) {
        Ok(()) => FloatType::BF16,
        Err(_) => FloatType::F32,
    };
    let copier = Copier::new(&client, is_card);
    let copy = copier.bandwidth();
    println!(
        "== {}, {}; device copy {:.2} TB/s",
        identity.name,
        dtype.name(),
        copy / 1e12
    );
    let peers = match &args.peer {
        Some(python) => peers(python, &cases)?,
        None => Peers::new(),
    };
    for case in cases {
        let bench = Bench::new(&client, case, dtype, variant)?;
        bench
            .check()
            .map_err(|error| format!("{}: {error}", case.name()))?;
        let (forward, both) = bench.time(&copier);
        let describe = |forward: f64, both: Option<f64>| match case.decodes() {
            true => {
                let bytes = 2.0 * bench.problem.key_bytes() as f64;
                let share = bytes / (forward * 1e-6) / copy;
                format!("{forward:9.1} us, {:5.1}% of the copy", 100.0 * share)
            }
            false => {
                let rate = |us: f64, factor| factor * case.flop() / us / 1e6;
                let both = both.map_or(String::new(), |both| {
                    let rate = rate(both, 3.5);
                    format!("; with gradients {both:9.1} us, {rate:6.1} TFLOP/s")
                });
                let rate = rate(forward, 1.0);
                format!("{forward:9.1} us, {rate:6.1} TFLOP/s{both}")
            }
        };
        let variant = bench.plan.variant().name();
        println!(
            "{:24} {variant:12} {}",
            case.name(),
            describe(forward, both)
        );
        for (who, forward, both) in peers.get(&case.name()).into_iter().flatten() {
            println!("{:24} {who:12} {}", "", describe(*forward, *both));
        }
    }
    Ok(())
}
