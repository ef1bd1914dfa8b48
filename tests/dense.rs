//! Products of dense matrices by cuBLASLt, on a CUDA device, against products in f64.
//!
//! `BURN_NF4_SOAK` sets how many products of random sizes `soak` makes.
#![cfg(feature = "cublaslt")]

use burn::backend::DispatchDevice;
use burn::tensor::{Device, Tensor, TensorData};
use burn_nf4::Nf4Error;
use burn_nf4::format::{FloatElement, FloatType};
use burn_nf4::launch::{DenseOperands, DensePlan, DenseProduct, MatrixLayout};
use burn_nf4::op::{DenseProvider, MatmulOptions, matmul, set_dense_provider};
use cubecl::future::block_on;
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::{bf16, f16};
use rayon::prelude::*;
use rstest::rstest;

/// Bytes behind every result that must stay as they are.
const GUARD_BYTES: usize = 64;
/// Bytes that are NaN in every float type.
const POISON: u8 = 0xff;

fn client() -> Client {
    match Device::cuda(0).as_dispatch() {
        DispatchDevice::Cube(device) => device.client(),
        other => panic!("{other:?} is not a CubeCL device"),
    }
}

/// Reproducible random numbers.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 20
    }

    /// From `low` to `high`.
    fn size(&mut self, low: usize, high: usize) -> usize {
        low + self.next() as usize % (high - low + 1)
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.next().is_multiple_of(one_in)
    }

    /// Between -1 and 1.
    fn values<T: FloatElement>(&mut self, elems: usize) -> Vec<T> {
        let value = |_| T::from_f32((self.next() & 0xffff) as f32 / 32768.0 - 1.0);
        (0..elems).map(value).collect()
    }

    /// Sizes and a layout.
    fn product(&mut self, dtype: FloatType) -> DenseProduct {
        let mut size = |most| match self.size(0, 4) {
            0 => 1,
            1 => self.size(1, 9),
            2 => 8 * self.size(1, most / 8),
            _ => self.size(1, most),
        };
        let (m, n, k) = (size(200), size(200), size(400));
        let batch = if self.chance(3) { self.size(2, 4) } else { 1 };
        let mut layout = |rows, columns, may_be_shared| {
            let transposed = self.chance(2);
            let (rows, columns) = if transposed {
                (columns, rows)
            } else {
                (rows, columns)
            };
            let leading = columns + if self.chance(3) { self.size(1, 16) } else { 0 };
            let gap = if self.chance(3) { self.size(0, 40) } else { 0 };
            MatrixLayout {
                transposed,
                leading,
                batch_stride: match may_be_shared && self.chance(2) {
                    true => 0,
                    false => rows * leading + gap,
                },
            }
        };
        let (lhs, rhs) = (layout(m, k, false), layout(k, n, true));
        DenseProduct {
            batch,
            lhs,
            rhs,
            bias: self.chance(3),
            ..DenseProduct::new(m, n, k, dtype)
        }
    }
}

/// The elements of a buffer that a layout reaches into.
fn elems(layout: &MatrixLayout, rows: usize, columns: usize, batch: usize) -> usize {
    let (rows, columns) = if layout.transposed {
        (columns, rows)
    } else {
        (rows, columns)
    };
    (batch - 1) * layout.batch_stride + (rows - 1) * layout.leading + columns
}

fn at(layout: &MatrixLayout, batch: usize, row: usize, column: usize) -> usize {
    let (row, column) = if layout.transposed {
        (column, row)
    } else {
        (row, column)
    };
    batch * layout.batch_stride + row * layout.leading + column
}

/// A product with its operands on the host.
struct Case<T> {
    product: DenseProduct,
    lhs: Vec<T>,
    rhs: Vec<T>,
    scale: f32,
    addend: Option<Vec<T>>,
    bias: Option<Vec<T>>,
}

impl<T: FloatElement + Sync> Case<T> {
    fn new(product: DenseProduct, with_addend: bool, random: &mut Random) -> Self {
        let DenseProduct { batch, m, n, k, .. } = product;
        Self {
            product,
            lhs: random.values(elems(&product.lhs, m, k, batch)),
            rhs: random.values(elems(&product.rhs, k, n, batch)),
            scale: if random.chance(3) { 0.375 } else { 1.0 },
            addend: with_addend.then(|| random.values(batch * m * n)),
            bias: product.bias.then(|| random.values(n)),
        }
    }

    /// Uploads, and drops every handle but the result's at once.
    fn launch(&self, client: &Client, in_place: bool) -> Handle {
        let upload = |values: &Vec<T>| client.create_from_slice(bytemuck::cast_slice(values));
        let plan = DensePlan::new(client, self.product).expect("cuBLASLt is there");
        let addend = self.addend.as_ref().map(upload);
        let out = match &addend {
            Some(addend) if in_place => addend.clone(),
            _ => client.create_from_slice(&vec![POISON; plan.out_bytes() + GUARD_BYTES]),
        };
        let operands = DenseOperands {
            lhs: upload(&self.lhs),
            rhs: upload(&self.rhs),
            scale: self.scale,
            addend,
            bias: self.bias.as_ref().map(upload),
        };
        plan.launch(operands, out.clone()).expect("buffers fit");
        out
    }

    /// Compares a result with the product in f64; tells how far the worst element is off.
    fn compare(&self, client: &Client, out: &Handle) -> Result<(), String> {
        let DenseProduct { batch, m, n, k, .. } = self.product;
        let read = client
            .read_one(out.clone())
            .map_err(|error| format!("{}: {error:?}", self.product))?;
        let bytes = batch * m * n * T::FLOAT_TYPE.size_bytes();
        if read[bytes..].iter().any(|&byte| byte != POISON) {
            return Err(format!("{} wrote behind its result", self.product));
        }
        let got: Vec<T> = bytemuck::pod_collect_to_vec(&read[..bytes]);
        let scale = f64::from(self.scale);
        let epsilon = match T::FLOAT_TYPE {
            FloatType::BF16 => 2f64.powi(-8),
            FloatType::F16 => 2f64.powi(-11),
            FloatType::F32 => 2f64.powi(-23),
        };
        let value = |values: &[T], index: usize| f64::from(values[index].to_f32());
        let of_element = |index: usize| {
            let (of, row, column) = (index / (m * n), index / n % m, index % n);
            let (mut sum, mut size) = (0.0, 0.0);
            for i in 0..k {
                let a = value(&self.lhs, at(&self.product.lhs, of, row, i));
                let b = value(&self.rhs, at(&self.product.rhs, of, i, column));
                sum += a * b;
                size += (a * b).abs();
            }
            let addend = self.addend.as_ref().map_or(0.0, |c| value(c, index));
            let bias = self.bias.as_ref().map_or(0.0, |b| value(b, column));
            let exact = scale * sum + addend + bias;
            let size = scale * size + addend.abs() + bias.abs();
            // Sums are in f32 and rounded once; before a bias or an addend is added, if there is one, they
            // may be rounded too.
            let joined = self.addend.is_some() || self.bias.is_some();
            let rounded = if joined {
                (scale * sum).abs() + addend.abs()
            } else {
                0.0
            };
            let allowed = epsilon * (exact.abs() + rounded)
                + (k as f64).sqrt() * 2f64.powi(-22) * size
                + 1e-7;
            let got = f64::from(got[index].to_f32());
            // A NaN is not close to anything.
            let off = (got - exact).abs() / allowed;
            if off.is_nan() { f64::INFINITY } else { off }
        };
        let worst = (0..batch * m * n)
            .into_par_iter()
            .map(of_element)
            .reduce(|| 0.0, f64::max);
        match worst <= 1.0 {
            true => Ok(()),
            false => Err(format!(
                "{:?}, scale {}, addend {}: off by {worst:.2} times what is allowed",
                self.product,
                self.scale,
                self.addend.is_some()
            )),
        }
    }

    fn check(&self, client: &Client, out: &Handle) {
        self.compare(client, out)
            .unwrap_or_else(|error| panic!("{error}"));
    }
}

fn random_products<T: FloatElement + Sync>(seed: u64, count: usize) {
    let client = client();
    let mut random = Random::new(seed);
    let mut failures = Vec::new();
    for _ in 0..count {
        let product = random.product(T::FLOAT_TYPE);
        let case = Case::<T>::new(product, random.chance(3), &mut random);
        let in_place = case.addend.is_some() && random.chance(2);
        let out = case.launch(&client, in_place);
        failures.extend(case.compare(&client, &out).err());
    }
    assert!(
        failures.is_empty(),
        "{} of {count}:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[rstest]
fn cuda_random_layouts(#[values(1, 2, 3, 4)] seed: u64) {
    random_products::<bf16>(seed, 40);
    random_products::<f16>(seed, 40);
    random_products::<f32>(seed, 40);
}

/// Sizes of language models: one row, and many.
#[rstest]
#[case(1, 4096, 4096)]
#[case(65, 1024, 4096)]
#[case(512, 14336, 512)]
fn cuda_models_sizes(#[case] m: usize, #[case] n: usize, #[case] k: usize) {
    let client = client();
    let mut random = Random::new(7);
    let product = DenseProduct {
        rhs: MatrixLayout::contiguous_transposed(k, n),
        bias: true,
        ..DenseProduct::new(m, n, k, FloatType::BF16)
    };
    let case = Case::<bf16>::new(product, false, &mut random);
    let out = case.launch(&client, false);
    case.check(&client, &out);
}

/// TF32 is there for who asks, and only then.
#[test]
fn cuda_tf32_only_if_asked_for() {
    let client = client();
    let mut random = Random::new(8);
    let exact = DenseProduct::new(128, 256, 512, FloatType::F32);
    let case = Case::<f32>::new(exact, false, &mut random);
    let out = case.launch(&client, false);
    case.check(&client, &out);
    let relaxed = Case {
        product: DenseProduct {
            tf32: true,
            ..exact
        },
        ..case
    };
    let relaxed_out = relaxed.launch(&client, false);
    let [exact, relaxed] = [out, relaxed_out].map(|out| {
        let read = client.read_one(out).expect("it ran");
        bytemuck::pod_collect_to_vec::<u8, f32>(&read[..128 * 256 * 4])
    });
    assert_ne!(exact, relaxed);
    let far = exact.iter().zip(&relaxed).any(|(a, b)| (a - b).abs() > 0.1);
    assert!(!far);
}

#[test]
fn cuda_bad_arguments_are_typed_errors() {
    let client = client();
    let plain = DenseProduct::new(16, 32, 64, FloatType::BF16);
    for product in [
        DenseProduct { m: 0, ..plain },
        DenseProduct { batch: 0, ..plain },
        DenseProduct {
            n: i32::MAX as usize + 1,
            ..plain
        },
    ] {
        let error = DensePlan::new(&client, product).expect_err("it has no such size");
        assert!(matches!(error, Nf4Error::ElementCount { .. }), "{error}");
    }
    let overlapping = DenseProduct {
        lhs: MatrixLayout {
            leading: 63,
            ..plain.lhs
        },
        ..plain
    };
    let error = DensePlan::new(&client, overlapping).expect_err("rows overlap");
    assert!(matches!(error, Nf4Error::Shape { .. }), "{error}");

    let operands = |lhs: usize, rhs: usize, bias: Option<usize>| DenseOperands {
        lhs: client.empty(lhs),
        rhs: client.empty(rhs),
        scale: 1.0,
        addend: None,
        bias: bias.map(|bytes| client.empty(bytes)),
    };
    let plan = DensePlan::new(&client, plain).expect("cuBLASLt is there");
    let (lhs, rhs, out) = (16 * 64 * 2, 64 * 32 * 2, 16 * 32 * 2);
    for (lhs, rhs, out) in [
        (lhs - 2, rhs, out),
        (lhs, rhs - 2, out),
        (lhs, rhs, out - 2),
    ] {
        let error = plan
            .launch(operands(lhs, rhs, None), client.empty(out))
            .expect_err("it is too small");
        assert!(matches!(error, Nf4Error::Length { .. }), "{error}");
    }
    let unaligned = DenseOperands {
        lhs: client.empty(lhs + 16).offset_start(2),
        ..operands(lhs, rhs, None)
    };
    let error = plan
        .launch(unaligned, client.empty(out))
        .expect_err("it is not aligned");
    assert!(matches!(error, Nf4Error::Alignment { .. }), "{error}");

    let with_bias = DensePlan::new(
        &client,
        DenseProduct {
            bias: true,
            ..plain
        },
    );
    let with_bias = with_bias.expect("cuBLASLt is there");
    for bias in [None, Some(62)] {
        let error = with_bias
            .launch(operands(lhs, rhs, bias), client.empty(out))
            .expect_err("it needs a bias");
        assert!(matches!(error, Nf4Error::Length { .. }), "{error}");
    }
    // A bias that the product would not add.
    let error = plan
        .launch(operands(lhs, rhs, Some(64)), client.empty(out))
        .expect_err("it has no bias");
    assert!(matches!(error, Nf4Error::Length { .. }), "{error}");
}

/// A result may lie where the addend lies, and nowhere else where an operand does.
#[test]
fn cuda_results_over_operands_are_refused() {
    let client = client();
    let product = DenseProduct::new(64, 64, 64, FloatType::BF16);
    let plan = DensePlan::new(&client, product).expect("cuBLASLt is there");
    let bytes = 64 * 64 * 2;
    let memory: [Handle; 4] = std::array::from_fn(|_| client.empty(2 * bytes));
    let operands = || DenseOperands {
        lhs: memory[0].clone(),
        rhs: memory[1].clone(),
        scale: 1.0,
        addend: Some(memory[2].clone()),
        bias: None,
    };
    plan.launch(operands(), memory[2].clone())
        .expect("in the place of the addend");
    for out in [
        memory[0].clone(),
        memory[1].clone(),
        memory[1].clone().offset_start(bytes as u64),
        memory[2].clone().offset_start(512),
    ] {
        let error = plan.launch(operands(), out).expect_err("they overlap");
        assert!(matches!(error, Nf4Error::Config { .. }), "{error}");
    }
}

/// A buffer that claims more memory than it has is the error of its result, and nothing is read.
#[test]
fn cuda_claims_of_memory_are_checked() {
    let client = client();
    let plan = DensePlan::new(&client, DenseProduct::new(512, 512, 512, FloatType::F32));
    let plan = plan.expect("cuBLASLt is there");
    let bytes = 512 * 512 * 4;
    let small = client.create_from_slice(&[0; 1024]);
    let claimed = Handle::from_memory(small.memory.clone(), small.service, small.stream, bytes);
    let operands = DenseOperands {
        lhs: claimed,
        rhs: client.create_from_slice(&vec![0; bytes as usize]),
        scale: 1.0,
        addend: None,
        bias: None,
    };
    let out = client.empty(bytes as usize);
    plan.launch(operands, out.clone())
        .expect("by its size it fits");
    let error = client.read_one(out).expect_err("it has 1,024 bytes");
    assert!(format!("{error:?}").contains("claims"), "{error:?}");
}

/// The product of what was never written is the error of the one who reads it, not a panic, and what comes
/// after it works.
#[test]
fn cuda_operands_that_failed_make_a_result_that_failed() {
    let client = client();
    let plan = DensePlan::new(&client, DenseProduct::new(8, 8, 8, FloatType::F32));
    let plan = plan.expect("cuBLASLt is there");
    let operands = DenseOperands {
        // More than any card has.
        lhs: client.empty(1 << 46),
        rhs: client.empty(1 << 10),
        scale: 1.0,
        addend: None,
        bias: None,
    };
    let out = client.empty(plan.out_bytes());
    plan.launch(operands, out.clone()).expect("buffers fit");
    client.read_one(out).expect_err("nothing was computed");

    random_products::<bf16>(9, 5);
}

/// What cuBLASLt has no algorithm for: rows further apart than it can count.
#[test]
fn cuda_what_cublaslt_cannot_compute_is_a_typed_error() {
    let far = DenseProduct {
        lhs: MatrixLayout {
            leading: 1 << 40,
            ..MatrixLayout::contiguous(2, 8)
        },
        ..DenseProduct::new(2, 8, 8, FloatType::F32)
    };
    let error = DensePlan::new(&client(), far).expect_err("it cannot");
    assert!(
        matches!(&error, Nf4Error::Variant { variant, .. } if *variant == "cublaslt"),
        "{error}"
    );
}

/// The same product has the same bits each time.
#[test]
fn cuda_products_repeat_bit_for_bit() {
    let client = client();
    for (m, n, k) in [(9, 96, 256), (40, 40, 40), (16, 64, 16384), (300, 200, 100)] {
        let product = DenseProduct::new(m, n, k, FloatType::F32);
        let case = Case::<f32>::new(product, false, &mut Random::new(12));
        let bits = |_| {
            let out = case.launch(&client, false);
            client.read_one(out).expect("it ran").to_vec()
        };
        let runs: Vec<Vec<u8>> = (0..4).map(bits).collect();
        assert!(runs.iter().all(|run| *run == runs[0]), "{product}");
    }
}

/// More matrices in a batch than a grid has places along one side.
#[test]
fn cuda_large_batches() {
    let client = client();
    let product = DenseProduct {
        batch: 70_000,
        ..DenseProduct::new(3, 4, 8, FloatType::BF16)
    };
    let case = Case::<bf16>::new(product, false, &mut Random::new(13));
    let out = case.launch(&client, false);
    case.check(&client, &out);
}

/// Adds one to each, slowly enough that work on another stream would overtake it.
#[cube(launch_unchecked)]
fn slow_add(x: &[f32], y: &mut [f32], rounds: u32) {
    if ABSOLUTE_POS < y.len() {
        let mut value = x[ABSOLUTE_POS];
        let mut i = 0u32;
        while i < rounds {
            // Stays what it is, but the compiler cannot know.
            value = value * 1.0f32 + 0.0f32 * value;
            i += 1u32;
        }
        y[ABSOLUTE_POS] = value + 1.0f32;
    }
}

fn add_one(client: &Client, x: &Handle, elems: usize) -> Handle {
    let y = client.empty(elems * 4);
    // SAFETY: both buffers hold `elems` floats, and the kernel checks its index.
    unsafe {
        slow_add::launch_unchecked(
            client,
            CubeCount::Static(elems.div_ceil(256) as u32, 1, 1),
            CubeDim::new_1d(256),
            BufferArg::from_raw_parts(x.clone(), elems),
            BufferArg::from_raw_parts(y.clone(), elems),
            2000,
        );
    }
    y
}

/// A chain of kernels and products: what each reads was written by the one before it, and is freed while
/// the next is still waiting. `wait` waits for the device on each side of a product.
fn chain(client: &Client, seed: u64, steps: usize, wait: bool) -> Vec<f32> {
    let mut random = Random::new(seed);
    let size = 8 * random.size(4, 24);
    let elems = size * size;
    let start: Vec<f32> = random.values(elems);
    let mut x = client.create_from_slice(bytemuck::cast_slice(&start));
    for _ in 0..steps {
        let factor: Vec<f32> = random.values(elems);
        let rhs = client.create_from_slice(bytemuck::cast_slice(&factor));
        x = add_one(client, &x, elems);
        if wait {
            block_on(client.sync()).expect("the device works");
        }
        let product = DenseProduct::new(size, size, size, FloatType::F32);
        let plan = DensePlan::new(client, product).expect("cuBLASLt is there");
        let out = client.empty(plan.out_bytes());
        let operands = DenseOperands {
            lhs: x,
            rhs,
            scale: 1.0 / size as f32,
            addend: None,
            bias: None,
        };
        plan.launch(operands, out.clone()).expect("buffers fit");
        if wait {
            block_on(client.sync()).expect("the device works");
        }
        // Would be taken from what was just freed.
        drop(client.create_from_slice(&vec![POISON; elems * 4]));
        x = add_one(client, &out, elems);
    }
    let read = client.read_one(x).expect("it ran");
    bytemuck::pod_collect_to_vec(&read[..elems * 4])
}

/// Between kernels of the same thread and others', without waiting, products are those with a wait on
/// each side.
#[test]
fn cuda_order_from_many_threads() {
    std::thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || {
                let client = client();
                for round in 0..20 {
                    let seed = thread * 100 + round;
                    let fast = chain(&client, seed, 6, false);
                    let waited = chain(&client, seed, 6, true);
                    assert!(fast == waited, "seed {seed}: other bits");
                    assert!(fast.iter().all(|value| value.is_finite()));
                }
            });
        }
    });
}

/// A buffer that one thread's stream writes and another's reads.
#[test]
fn cuda_operands_of_other_streams() {
    let size = 512;
    let elems = size * size;
    for round in 0..20u64 {
        let x: Vec<f32> = Random::new(round).values(elems);
        let written = std::thread::spawn({
            let x = x.clone();
            move || {
                let client = client();
                let x = client.create_from_slice(bytemuck::cast_slice(&x));
                add_one(&client, &x, elems)
            }
        });
        let lhs = written.join().expect("it launched");
        let client = client();
        let mut identity = vec![0f32; elems];
        (0..size).for_each(|i| identity[i * size + i] = 1.0);
        let operands = DenseOperands {
            lhs,
            rhs: client.create_from_slice(bytemuck::cast_slice(&identity)),
            scale: 1.0,
            addend: None,
            bias: None,
        };
        let product = DenseProduct::new(size, size, size, FloatType::F32);
        let plan = DensePlan::new(&client, product).expect("cuBLASLt is there");
        let out = client.empty(plan.out_bytes());
        plan.launch(operands, out.clone()).expect("buffers fit");
        let read = client.read_one(out).expect("it ran");
        let got: Vec<f32> = bytemuck::pod_collect_to_vec(&read[..elems * 4]);
        for (got, x) in got.iter().zip(&x) {
            assert_eq!(*got, x + 1.0, "round {round}");
        }
    }
}

/// As many products as `BURN_NF4_SOAK` says, from several threads, through Burn's fusion and tuning.
#[test]
fn cuda_soak() {
    let count = std::env::var("BURN_NF4_SOAK").map_or(400, |count| {
        count.parse().expect("BURN_NF4_SOAK is a number")
    });
    set_dense_provider(DenseProvider::CublasLt);
    let threads = 4;
    std::thread::scope(|scope| {
        for thread in 0..threads as u64 {
            scope.spawn(move || {
                let device = Device::cuda(0);
                let mut random = Random::new(1000 + thread);
                for round in 0..count / threads {
                    soak_step(&device, &mut random, round);
                }
            });
        }
    });
}

/// `(x + 1) (w / 2) - 1` with fused operations on either side of the product, all of them enqueued
/// before anything is read, and nothing held.
fn soak_step(device: &Device, random: &mut Random, round: usize) {
    let [m, n, k] = [random.size(1, 96), random.size(1, 96), random.size(1, 96)];
    let x: Vec<f32> = random.values(m * k);
    let w: Vec<f32> = random.values(k * n);
    let tensor = |values: &[f32], dims: [usize; 2]| {
        Tensor::<2>::from_data(TensorData::new(values.to_vec(), dims), device)
    };
    let transpose_rhs = random.chance(2);
    let w_tensor = match transpose_rhs {
        true => {
            let transposed: Vec<f32> = (0..n * k).map(|i| w[i % k * n + i / k]).collect();
            tensor(&transposed, [n, k])
        }
        false => tensor(&w, [k, n]),
    };
    let options = MatmulOptions {
        transpose_rhs,
        ..MatmulOptions::default()
    };
    let y = matmul(tensor(&x, [m, k]) + 1.0, w_tensor / 2.0, None, options).expect("they fit");
    let y: Vec<f32> = (y - 1.0).into_data().try_to_vec().expect("f32");
    for (index, got) in y.iter().enumerate() {
        let (row, column) = (index / n, index % n);
        let terms =
            (0..k).map(|i| f64::from(x[row * k + i] + 1.0) * f64::from(w[i * n + column] / 2.0));
        let exact = terms.sum::<f64>() - 1.0;
        let difference = (f64::from(*got) - exact).abs();
        assert!(
            difference <= 1e-6 * k as f64 + 1e-6,
            "round {round}, [{m}, {k}] x [{k}, {n}] at {index}: {got}, expected {exact}"
        );
    }
}
