//! The matrix products with a packed weight at the launch level, on every device that is compiled
//! in, against a product in f64 of the decoded weight.
#![cfg(feature = "cube")]

use burn::backend::DispatchDevice;
use burn::tensor::Device;
use burn_nf4::Nf4Error;
use burn_nf4::format::{
    BlockSize, BlockTensor, FloatElement, FloatType, PackedLayout, QuantConfig, QuantType,
};
use burn_nf4::launch::{
    Lora, MatmulPlan, MatmulVariant, Operands, Product, TensorCoreTile, check_dtype,
};
use cubecl::prelude::Client;
use half::{bf16, f16};
#[cfg(feature = "cuda")]
use {
    QuantType::{Fp4, Fp8Block, Fp8Channel, Mxfp4, Nf4, Nvfp4},
    rstest::rstest,
};

/// Bytes that are NaN in every float type; outputs are filled with them before a launch.
const POISON: u8 = 0xff;
/// Bytes behind every output that must stay as they are.
const GUARD_BYTES: usize = 64;

fn client(device: &Device) -> Client {
    match device.as_dispatch() {
        DispatchDevice::Cube(device) => device.client(),
        other => panic!("{other:?} is not a CubeCL device"),
    }
}

/// Reproducible values between -1 and 1, rounded to `T`.
fn values<T: FloatElement>(elems: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        T::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    };
    (0..elems).map(next).collect()
}

fn floats<T: FloatElement>(values: &[T]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// How the kernel is chosen.
#[derive(Clone, Copy, Debug)]
enum Choice {
    Default,
    Forced(MatmulVariant),
    #[cfg_attr(
        not(feature = "cuda"),
        expect(dead_code, reason = "tiles are of CUDA's kernels")
    )]
    Tile(MatmulVariant, TensorCoreTile),
}

#[derive(Clone, Copy, Debug)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    config: QuantConfig,
    bias: bool,
    /// `x` is between `-2^x_log2` and `2^x_log2`.
    x_log2: i32,
    /// Rank of a low-rank branch, zero for none.
    rank: usize,
    /// Its matrices are in f32, not in the dtype of `x`.
    f32_branch: bool,
    /// `A` is larger by this power of two, and `B` smaller.
    a_log2: i32,
}

/// The factor of the branch.
const SCALE: f32 = 0.75;

fn case(m: usize, n: usize, k: usize) -> Case {
    Case {
        m,
        n,
        k,
        config: QuantConfig::default(),
        bias: false,
        x_log2: 0,
        rank: 0,
        f32_branch: false,
        a_log2: 0,
    }
}

fn plan(
    client: &Client,
    case: Case,
    dtype: FloatType,
    choice: Choice,
) -> Result<MatmulPlan, Nf4Error> {
    let Case { m, n, k, .. } = case;
    let layout = PackedLayout::for_shape(&[n, k], case.config)?;
    let product = Product { m, n, k, dtype };
    match choice {
        Choice::Default => MatmulPlan::new(client, &layout, product, case.bias, None),
        Choice::Forced(variant) => {
            MatmulPlan::new(client, &layout, product, case.bias, Some(variant))
        }
        Choice::Tile(variant, tile) => {
            MatmulPlan::with_tile(client, &layout, product, case.bias, variant, tile)
        }
    }
}

/// A low-rank branch, its matrices as they are on the device.
struct Branch {
    rank: usize,
    dtype: FloatType,
    a: Vec<f64>,
    b: Vec<f64>,
}

impl Branch {
    fn new<T: FloatElement>(case: Case, seed: u64) -> Self {
        let Case { n, k, rank, .. } = case;
        let dtype = match case.f32_branch {
            true => FloatType::F32,
            false => T::FLOAT_TYPE,
        };
        let matrix = |elems, seed, log2| -> Vec<f64> {
            match case.f32_branch {
                true => floats(&values::<f32>(elems, seed)),
                false => floats(&values::<T>(elems, seed)),
            }
            .into_iter()
            .map(|value| f64::from(value) * f64::powi(2.0, log2))
            .collect()
        };
        Self {
            rank,
            dtype,
            a: matrix(k * rank, seed, case.a_log2),
            b: matrix(rank * n, seed + 1, -case.a_log2),
        }
    }

    fn upload(&self, client: &Client) -> Lora {
        let buffer = |values: &[f64]| match self.dtype {
            FloatType::F16 => client.create_from_slice(&bytes::<f16>(values)),
            FloatType::BF16 => client.create_from_slice(&bytes::<bf16>(values)),
            FloatType::F32 => client.create_from_slice(&bytes::<f32>(values)),
        };
        Lora {
            a: buffer(&self.a),
            b: buffer(&self.b),
            rank: self.rank,
            scale: SCALE,
            dtype: self.dtype,
        }
    }

    /// `s x A` of a row of `x`, and the sum of the magnitudes in it.
    fn down<T: FloatElement>(&self, x: &[T]) -> Vec<[f64; 2]> {
        let mut sums = vec![[0.0; 2]; self.rank];
        for (x, row) in x.iter().zip(self.a.chunks(self.rank.max(1))) {
            for (sum, a) in sums.iter_mut().zip(row) {
                let product = f64::from(x.to_f32()) * a * f64::from(SCALE);
                sum[0] += product;
                sum[1] += product.abs();
            }
        }
        sums
    }
}

/// Values that are exact in `T`.
fn bytes<T: FloatElement>(values: &[f64]) -> Vec<u8> {
    let values: Vec<T> = values.iter().map(|&v| T::from_f32(v as f32)).collect();
    bytemuck::cast_slice(&values).to_vec()
}

/// Runs one product and compares every element with an f64 product: of the weight as it is decoded
/// to the same dtype, or without rounding where the kernel multiplies with levels and scales.
fn check<T: FloatElement>(client: &Client, case: Case, choice: Choice) {
    let Case { m, n, k, .. } = case;
    let dtype = T::FLOAT_TYPE;
    let what = format!("{case:?} {} {choice:?}", dtype.name());
    let weight: Vec<T> = values(n * k, 1);
    let tensor = BlockTensor::quantize(&weight, &[n, k], case.config).expect("finite values");
    let x_scale = f32::powi(2.0, case.x_log2);
    let x: Vec<T> = values::<T>(m * k, 2)
        .iter()
        .map(|value| T::from_f32(value.to_f32() * x_scale))
        .collect();
    let bias: Vec<T> = values(n, 3);
    let branch = Branch::new::<T>(case, 4);

    let upload = |values: &[T]| client.create_from_slice(bytemuck::cast_slice(values));
    let packed = client.create_from_slice(bytemuck::cast_slice(&tensor.to_packed()));
    let bytes = m * n * dtype.size_bytes();
    let out = client.create_from_slice(&vec![POISON; bytes + GUARD_BYTES]);
    let plan = plan(client, case, dtype, choice).expect(&what);
    let (decoded, level_rounding) = match plan.variant() {
        MatmulVariant::Levels => (tensor.dequantize::<f32>(), f64::powi(2.0, -12)),
        _ => (floats(&tensor.dequantize::<T>()), 0.0),
    };
    let operands = Operands {
        x: upload(&x),
        packed,
        bias: case.bias.then(|| upload(&bias)),
        lora: (case.rank > 0).then(|| branch.upload(client)),
    };
    plan.launch(operands, out.clone()).expect(&what);
    let read = client.read_one(out).expect("the kernel ran");
    assert!(
        read[bytes..bytes + GUARD_BYTES]
            .iter()
            .all(|&b| b == POISON),
        "{what}: wrote behind its output"
    );
    let got: Vec<T> = bytemuck::pod_collect_to_vec(&read[..bytes]);

    // Half a unit in the last place of the result, and f32 sums whose error grows with the sum of
    // magnitudes; tensor cores cut the bits of their partial sums off instead of rounding.
    let rounding = match dtype {
        FloatType::F16 => f64::powi(2.0, -11),
        FloatType::BF16 => f64::powi(2.0, -8),
        FloatType::F32 => f64::powi(2.0, -24),
    };
    // Tensor cores take `s x A`, and `B` if it is in f32, rounded to bf16; for f16 each as two values
    // of bf16, 16 bits together.
    let branch_rounding = match (plan.variant(), dtype) {
        (MatmulVariant::TensorCore, FloatType::F16) => f64::powi(2.0, -15),
        (MatmulVariant::TensorCore, _) => 2.0 * rounding,
        _ => 0.0,
    } + f64::powi(2.0, -20);
    for row in 0..m {
        let down = branch.down(&x[row * k..(row + 1) * k]);
        for column in 0..n {
            let mut sum = 0.0;
            let mut magnitude = 0.0;
            for i in 0..k {
                let product =
                    f64::from(x[row * k + i].to_f32()) * f64::from(decoded[column * k + i]);
                sum += product;
                magnitude += product.abs();
            }
            if case.bias {
                sum += f64::from(bias[column].to_f32());
            }
            let value = f64::from(got[row * n + column].to_f32());
            let of_products = f64::powi(2.0, -20) + level_rounding;
            let mut tolerance = of_products * magnitude + 1e-7 * f64::from(x_scale);
            for (r, [value, magnitude]) in down.iter().enumerate() {
                let up = branch.b[r * n + column];
                sum += value * up;
                tolerance += branch_rounding * (value * up).abs()
                    + f64::powi(2.0, -20) * (magnitude * up).abs();
            }
            tolerance += rounding * sum.abs();
            assert!(
                (value - sum).abs() <= tolerance,
                "{what}: y[{row}, {column}] is {value}, expected {sum} within {tolerance}"
            );
        }
    }
}

fn check_dtypes(client: &Client, case: Case, choice: Choice) {
    for dtype in FloatType::ALL {
        if check_dtype(client, dtype).is_err() {
            let error = plan(client, case, dtype, choice).expect_err("the device lacks the type");
            assert!(matches!(error, Nf4Error::DeviceDtype { .. }), "{error}");
            continue;
        }
        if matches!(
            choice,
            Choice::Forced(MatmulVariant::TensorCore) | Choice::Tile(..)
        ) && dtype == FloatType::F32
        {
            let error = plan(client, case, dtype, choice).expect_err("no such instruction");
            assert!(matches!(error, Nf4Error::Variant { .. }), "{error}");
            continue;
        }
        match dtype {
            FloatType::F16 => check::<f16>(client, case, choice),
            FloatType::BF16 => check::<bf16>(client, case, choice),
            FloatType::F32 => check::<f32>(client, case, choice),
        }
    }
}

fn config(quant_type: QuantType, block: usize, nested: bool) -> QuantConfig {
    QuantConfig {
        quant_type,
        block_size: BlockSize::try_from(block).expect("a known block size"),
        nested_block_size: nested.then_some(BlockSize::B256),
    }
}

/// Rows of x, and shapes that fill tiles, that end inside of one, and that are less than one.
fn shapes(device: &Device, choice: Choice) {
    let client = client(device);
    for (m, n, k) in [
        (1, 64, 256),
        (1, 33, 4096),
        (2, 17, 512),
        (3, 100, 1024),
        (4, 16, 64),
        (5, 1, 128),
    ] {
        check_dtypes(&client, case(m, n, k), choice);
        let with_bias = Case {
            bias: true,
            ..case(m, n, k)
        };
        check_dtypes(&client, with_bias, choice);
    }
}

/// Every block size and kind of scales; rows of one length that no block over 32 divides, and of one
/// that 64 does, which one row on tensor cores asks for.
fn block_sizes(device: &Device, choice: Choice) {
    let client = client(device);
    for block in [32, 64, 128, 256, 512, 1024, 2048, 4096] {
        for quant_type in [QuantType::Nf4, QuantType::Fp4] {
            for nested in [true, false] {
                for (m, k) in [(2, 288), (1, 320)] {
                    let case = Case {
                        config: config(quant_type, block, nested),
                        ..case(m, 24, k)
                    };
                    check_dtypes(&client, case, choice);
                }
            }
        }
    }
}

/// Rows that start inside of a block, and inside of a word.
fn ragged(device: &Device) {
    let client = client(device);
    let gemv = Choice::Forced(MatmulVariant::Gemv);
    for (m, n, k) in [(1, 5, 72), (3, 7, 129), (2, 9, 1), (7, 11, 1001), (1, 1, 7)] {
        check_dtypes(&client, case(m, n, k), gemv);
        check_dtypes(&client, case(m, n, k), Choice::Default);
    }
}

fn refusals(device: &Device) {
    let client = client(device);
    let small = case(1, 4, 64);
    let wrong = Case { k: 32, ..small };
    let layout = PackedLayout::new(4 * 64, small.config);
    let product = Product {
        m: 1,
        n: wrong.n,
        k: wrong.k,
        dtype: FloatType::F32,
    };
    assert!(matches!(
        MatmulPlan::new(&client, &layout, product, false, None),
        Err(Nf4Error::Length { .. })
    ));
    // Its scales go by rows, of which this has one.
    let flat = PackedLayout::new(4 * 64, QuantConfig::of(QuantType::Fp8Channel));
    let product = Product { k: 64, ..product };
    assert!(matches!(
        MatmulPlan::new(&client, &flat, product, false, None),
        Err(Nf4Error::Length { .. })
    ));
    let forced = Choice::Forced(MatmulVariant::TensorCore);
    let levels = Choice::Forced(MatmulVariant::Levels);
    for (m, k, forced) in [(1, 72, forced), (1, 72, levels), (2, 64, levels)] {
        let error = plan(&client, case(m, 4, k), FloatType::F16, forced).expect_err("impossible");
        assert!(
            matches!(
                error,
                Nf4Error::Variant { .. } | Nf4Error::DeviceDtype { .. }
            ),
            "{error}"
        );
    }
    let plan = plan(&client, small, FloatType::F32, Choice::Default).expect("any device can");
    let bytes = client.empty(4);
    let operands = Operands {
        x: bytes.clone(),
        packed: bytes.clone(),
        bias: None,
        lora: None,
    };
    let error = plan.launch(operands, bytes);
    assert!(matches!(error, Err(Nf4Error::Length { .. })), "{error:?}");
    let operands = Operands {
        x: client.empty(64 * 4 + 32).offset_start(8),
        packed: client.empty(layout.words() * 4),
        bias: None,
        lora: None,
    };
    let expected = Nf4Error::Alignment {
        tensor: "x".into(),
        expected: 16,
        given: 8,
    };
    assert_eq!(plan.launch(operands, client.empty(4 * 4)), Err(expected));
    let with_bias = MatmulPlan::new(&client, &layout, plan.product(), true, None).expect("it can");
    let operands = Operands {
        x: client.empty(64 * 4),
        packed: client.empty(layout.words() * 4),
        bias: None,
        lora: None,
    };
    let error = with_bias.launch(operands, client.empty(4 * 4));
    assert!(
        matches!(&error, Err(Nf4Error::Length { tensor, .. }) if tensor == "bias"),
        "{error:?}"
    );
    // Sizes whose products overflow do not pass for small ones.
    let vast = Product {
        m: usize::MAX / 32,
        ..plan.product()
    };
    let error = MatmulPlan::new(&client, &layout, vast, false, None).err();
    assert!(
        matches!(&error, Some(Nf4Error::ElementCount { tensor, .. }) if tensor == "x"),
        "{error:?}"
    );
    // Nothing is divided by a size of zero.
    let empty = PackedLayout::new(0, small.config);
    for (n, k) in [(0, 0), (0, 64), (4, 0)] {
        let product = Product {
            n,
            k,
            ..plan.product()
        };
        let error = MatmulPlan::new(&client, &empty, product, false, None).err();
        assert!(
            matches!(&error, Some(Nf4Error::ElementCount { tensor, .. }) if tensor == "weight"),
            "{error:?}"
        );
        let tile = TensorCoreTile::for_product(&client, &empty, product);
        assert!(!tile.sizes().contains(&0), "{tile:?}");
    }
    let lora = Lora {
        a: client.empty(64 * 2 * 4),
        b: client.empty(2 * 4 * 4 - 4),
        rank: 2,
        scale: 1.0,
        dtype: FloatType::F32,
    };
    for (lora, expected) in [
        (
            Lora {
                rank: 0,
                ..lora.clone()
            },
            "rank",
        ),
        (lora, "lora_b"),
    ] {
        let operands = Operands {
            x: client.empty(64 * 4),
            packed: client.empty(layout.words() * 4),
            bias: None,
            lora: Some(lora),
        };
        let error = plan.launch(operands, client.empty(4 * 4));
        match error {
            Err(Nf4Error::Length { tensor, .. }) => assert_eq!(tensor, expected),
            Err(Nf4Error::Variant { variant, .. }) => {
                assert_eq!((variant, client.name()), ("lora", "cpu"));
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Branches of any rank, in the dtype of `x` and in f32, with few rows and more than a cube takes.
fn branches(device: &Device, choice: Choice) {
    let client = client(device);
    if let Err(error) = Lora::check(&client, FloatType::F32) {
        assert!(matches!(error, Nf4Error::Variant { .. }), "{error}");
        assert_eq!(client.name(), "cpu");
        return;
    }
    for (m, n, k, rank) in [
        (1, 33, 4096, 16),
        (1, 64, 256, 1),
        (2, 17, 512, 8),
        (3, 100, 1024, 5),
        (4, 16, 64, 64),
        (9, 40, 2112, 24),
        (1, 48, 96, 300),
    ] {
        for (f32_branch, bias) in [(false, false), (true, true)] {
            let case = Case {
                rank,
                f32_branch,
                bias,
                ..case(m, n, k)
            };
            check_dtypes(&client, case, choice);
        }
    }
}

/// Counts of rows where tiles of x are partly filled, and of more than one launch takes.
#[cfg(feature = "cuda")]
#[rstest]
fn cuda_tensor_core_rows(#[values(false, true)] bias: bool) {
    let client = client(&Device::cuda(0));
    for m in [1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 40, 63, 64, 65, 150] {
        let case = Case {
            bias,
            ..case(m, 144, 576)
        };
        check::<bf16>(&client, case, Choice::Forced(MatmulVariant::TensorCore));
        check::<f16>(&client, case, Choice::Default);
    }
}

/// Branches where tiles of `x` are partly filled, and of more rows than one launch takes.
#[cfg(feature = "cuda")]
#[rstest]
fn cuda_tensor_core_branches(
    #[values(1, 8, 16, 40)] rank: usize,
    #[values(false, true)] f32_branch: bool,
) {
    let client = client(&Device::cuda(0));
    for m in [1, 3, 8, 17, 64, 150] {
        let case = Case {
            rank,
            f32_branch,
            bias: f32_branch,
            ..case(m, 144, 576)
        };
        check::<bf16>(&client, case, Choice::Forced(MatmulVariant::TensorCore));
        check::<f16>(&client, case, Choice::Default);
    }
}

/// `s x A` may be larger than f16 holds, though its product with `B` is not: what was trained in f32
/// stays finite.
#[cfg(feature = "cuda")]
#[rstest]
fn cuda_branches_beyond_f16(
    #[values(1, 3, 17, 70)] m: usize,
    #[values(14, 20)] a_log2: i32,
    #[values(true, false)] with_bias: bool,
) {
    let case = Case {
        rank: 20,
        f32_branch: true,
        a_log2,
        bias: with_bias,
        ..case(m, 144, 576)
    };
    check::<f16>(&client(&Device::cuda(0)), case, Choice::Default);
}

/// A weight, an `x` and a `y` with more than 2^31 elements: indices need 64 bits. Some columns at either
/// end and around the border are compared. Needs 10 GB on the device.
#[cfg(feature = "cuda")]
#[rstest]
#[case::many_rows_of_the_weight(65, (1 << 25) + 48, 64)]
#[case::long_rows(3, 64, (1 << 25) + 64)]
#[case::one_row(1, (1 << 25) + 48, 64)]
fn cuda_beyond_two_to_the_31(
    #[case] m: usize,
    #[case] n: usize,
    #[case] k: usize,
    #[values(MatmulVariant::Gemv, MatmulVariant::TensorCore)] variant: MatmulVariant,
) {
    let client = client(&Device::cuda(0));
    let config = QuantConfig::default();
    let layout = PackedLayout::new(n * k, config);
    assert!(layout.elems() > 1 << 31);
    // A weight whose every word differs from its neighbours', without quantizing gigabytes.
    let mut words: Vec<u32> = (0..layout.words() as u32)
        .map(|i| i.wrapping_mul(0x9e37_79b9))
        .collect();
    words[layout.codebook_start()..][..layout.tables().len()].copy_from_slice(&layout.tables());
    words[layout.nested_offset_start()] = 0.05f32.to_bits();
    words[layout.nested_scales_start()..layout.header_start()].fill(0.01f32.to_bits());

    let x: Vec<bf16> = values(m * k, 2);
    let dtype = FloatType::BF16;
    let product = Product { m, n, k, dtype };
    let plan = MatmulPlan::new(&client, &layout, product, false, Some(variant)).expect("it can");
    let operands = Operands {
        x: client.create_from_slice(bytemuck::cast_slice(&x)),
        packed: client.create_from_slice(bytemuck::cast_slice(&words)),
        bias: None,
        lora: None,
    };
    let out = client.empty(plan.out_bytes());
    plan.launch(operands, out.clone())
        .expect("buffers are large enough");

    let border = (1 << 31) / k;
    let columns = [0, 1, border.min(n) - 1, border.min(n - 1), n - 2, n - 1];
    for row in [0, m / 2, m - 1] {
        let x = &x[row * k..(row + 1) * k];
        for column in columns {
            let mut weights = vec![bf16::ZERO; k];
            burn_nf4::host::dequantize(&words, &layout, column * k, &mut weights);
            let terms = x.iter().zip(&weights);
            let terms = terms.map(|(x, w)| f64::from(x.to_f32()) * f64::from(w.to_f32()));
            let (sum, magnitude) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
            let start = (row * n + column) * 2;
            let part = out.clone().offset_start(start as u64);
            let part = part.offset_end((plan.out_bytes() - start - 2) as u64);
            let read = client.read_one(part).expect("the kernel ran");
            let got = f64::from(bf16::from_le_bytes([read[0], read[1]]));
            let bound = sum.abs() * f64::powi(2.0, -8) + magnitude * f64::powi(2.0, -16);
            assert!(
                (got - sum).abs() <= bound,
                "{variant:?}: y[{row}, {column}] is {got}, expected {sum} within {bound}"
            );
        }
    }
}

/// Cubes that share sums count their arrivals in a buffer of their stream: threads, each with a stream
/// of its own, and more of them than buffers are kept for, do not count in each other's.
#[cfg(feature = "cuda")]
#[test]
fn cuda_split_k_from_many_threads() {
    let device = Device::cuda(0);
    let tile = TensorCoreTile {
        row_tiles: 1,
        row_planes: 2,
        k_planes: 2,
        chunks: 1,
        depth: 2,
        k_cubes: 4,
    };
    let choice = Choice::Tile(MatmulVariant::TensorCore, tile);
    for _ in 0..3 {
        std::thread::scope(|scope| {
            for thread in 0..32 {
                let device = &device;
                scope.spawn(move || {
                    let client = client(device);
                    for m in [1, 5, 16] {
                        let case = Case {
                            bias: thread % 2 == 0,
                            ..case(m, 80 + thread, 4096)
                        };
                        check::<bf16>(&client, case, choice);
                    }
                });
            }
        });
    }
}

/// Any way to cut a weight up gives the product.
#[cfg(feature = "cuda")]
#[rstest]
fn cuda_tensor_core_tiles(
    #[values(1, 2)] row_tiles: usize,
    #[values(
        (1, 4, 3, 1), (8, 1, 1, 2), (4, 2, 1, 2), (2, 4, 1, 2), (4, 8, 1, 1), (7, 4, 3, 3),
        (2, 4, 4, 2)
    )]
    shape: (usize, usize, usize, usize),
    #[values(1, 3)] k_cubes: usize,
) {
    let (row_planes, k_planes, chunks, depth) = shape;
    let tile = TensorCoreTile {
        row_tiles,
        row_planes,
        k_planes,
        chunks,
        depth,
        k_cubes,
    };
    check_tile(tile, QuantConfig::default());
}

/// The formats with scales and codes of another kind; of rows that end within a chunk too.
#[cfg(feature = "cuda")]
#[rstest]
fn cuda_tensor_core_formats(
    #[values((1, 1, 4, 3, 1), (2, 4, 1, 1, 2), (1, 2, 4, 4, 2))] shape: (
        usize,
        usize,
        usize,
        usize,
        usize,
    ),
    #[values(Nvfp4, Mxfp4, Fp8Block, Fp8Channel)] quant_type: QuantType,
) {
    let (row_tiles, row_planes, k_planes, chunks, depth) = shape;
    let tile = TensorCoreTile {
        row_tiles,
        row_planes,
        k_planes,
        chunks,
        depth,
        k_cubes: 1,
    };
    check_tile(tile, QuantConfig::of(quant_type));
}

#[cfg(feature = "cuda")]
fn check_tile(tile: TensorCoreTile, config: QuantConfig) {
    let client = client(&Device::cuda(0));
    let choice = Choice::Tile(MatmulVariant::TensorCore, tile);
    let mut ran = 0;
    for (m, n, k) in [(1, 80, 1024), (12, 130, 2144), (33, 300, 1536)] {
        let case = Case {
            config,
            ..case(m, n, k)
        };
        if plan(&client, case, FloatType::BF16, choice).is_ok() {
            check::<bf16>(&client, case, choice);
            let branch = Case { rank: 20, ..case };
            check::<bf16>(&client, branch, choice);
            ran += 1;
        }
    }
    assert!(ran > 0, "{tile:?} does not fit the device");
}

/// One row: tails in both directions, tiles of any shape, and values that f16 cannot hold.
#[cfg(feature = "cuda")]
#[rstest]
fn cuda_levels(
    #[values(1, 2)] row_tiles: usize,
    #[values((1, 4, 1), (2, 16, 1), (7, 4, 2), (8, 1, 3))] planes: (usize, usize, usize),
    #[values(false, true)] bias: bool,
) {
    let shapes = [(80, 1024), (333, 2112), (16, 64), (4096, 4096)];
    check_levels(row_tiles, planes, bias, QuantConfig::default(), &shapes);
    let client = client(&Device::cuda(0));
    let forced = Choice::Forced(MatmulVariant::Levels);
    for refused in [case(2, 64, 64), case(1, 64, 96)] {
        let error = plan(&client, refused, FloatType::BF16, forced).expect_err("impossible");
        assert!(matches!(error, Nf4Error::Variant { .. }), "{error}");
    }
}

/// The formats with shorter runs, and with codes of eight bits.
#[cfg(feature = "cuda")]
#[rstest]
fn cuda_levels_formats(
    #[values((1, 1, 4, 1), (2, 7, 4, 2))] planes: (usize, usize, usize, usize),
    #[values(
        config(Fp4, 32, false),
        config(Nf4, 32, true),
        QuantConfig::of(Nvfp4),
        QuantConfig::of(Mxfp4),
        QuantConfig::of(Fp8Block),
        QuantConfig::of(Fp8Channel)
    )]
    config: QuantConfig,
) {
    let (row_tiles, row_planes, k_planes, depth) = planes;
    let planes = (row_planes, k_planes, depth);
    let shapes = [(80, 1024), (333, 2112), (16, 64)];
    check_levels(row_tiles, planes, row_tiles == 2, config, &shapes);
}

#[cfg(feature = "cuda")]
fn check_levels(
    row_tiles: usize,
    (row_planes, k_planes, depth): (usize, usize, usize),
    bias: bool,
    config: QuantConfig,
    shapes: &[(usize, usize)],
) {
    let client = client(&Device::cuda(0));
    for &(n, k) in shapes {
        let tile = TensorCoreTile {
            row_tiles,
            row_planes,
            k_planes,
            chunks: k.div_ceil(128 * k_planes * depth) * depth,
            depth,
            k_cubes: 1,
        };
        let case = Case {
            bias,
            config,
            ..case(1, n, k)
        };
        let choice = Choice::Tile(MatmulVariant::Levels, tile);
        check::<bf16>(&client, case, choice);
        check::<f16>(&client, case, choice);
        let branch = Case {
            rank: 20,
            f32_branch: bias,
            ..case
        };
        check::<bf16>(&client, branch, choice);
        for x_log2 in [60, 17, -20, -60] {
            let case = Case {
                x_log2,
                bias: false,
                ..case
            };
            check::<bf16>(&client, case, choice);
        }
    }
}

/// NaN is a code of FP8: the results of its row are NaN, also where `x` is zero, and no others.
#[cfg(feature = "cuda")]
#[rstest]
#[case::levels(MatmulVariant::Levels, 1)]
#[case::one_row(MatmulVariant::TensorCore, 1)]
#[case::rows(MatmulVariant::TensorCore, 20)]
#[case::plain(MatmulVariant::Gemv, 3)]
fn cuda_nan_codes(
    #[case] variant: MatmulVariant,
    #[case] m: usize,
    #[values(0x7f, 0xff)] nan: u8,
    #[values([0, 0], [37, 700], [69, 1087], [42, 1024])] at: [usize; 2],
) {
    let client = client(&Device::cuda(0));
    let (n, k) = (70, 1088);
    let config = QuantConfig::of(QuantType::Fp8Channel);
    let tensor = BlockTensor::quantize(&values::<bf16>(n * k, 1), &[n, k], config).unwrap();
    let mut codes = tensor.codes().to_vec();
    codes[at[0] * k + at[1]] = nan;
    let (absmax, shape) = (tensor.absmax().clone(), vec![n, k]);
    let (block, dtype) = (tensor.block_size(), tensor.dtype());
    let tensor =
        BlockTensor::from_parts(codes, absmax, shape, block, dtype, config.quant_type).unwrap();
    let plan = plan(
        &client,
        Case {
            config,
            ..case(m, n, k)
        },
        FloatType::BF16,
        Choice::Forced(variant),
    )
    .unwrap();
    let out = client.empty(plan.out_bytes());
    let operands = Operands {
        x: client.create_from_slice(&vec![0; m * k * 2]),
        packed: client.create_from_slice(bytemuck::cast_slice(&tensor.to_packed())),
        bias: None,
        lora: None,
    };
    plan.launch(operands, out.clone()).unwrap();
    let read = client.read_one(out).expect("the kernel ran");
    let got: Vec<bf16> = bytemuck::pod_collect_to_vec(&read[..m * n * 2]);
    for (i, value) in got.iter().enumerate() {
        assert_eq!(value.is_nan(), i % n == at[0], "{i}: {value}");
    }
}

macro_rules! device_tests {
    ($name:ident, $feature:literal, $device:expr) => {
        #[cfg(feature = $feature)]
        mod $name {
            use super::*;

            fn device() -> Device {
                $device
            }

            #[test]
            fn gemv_shapes() {
                super::shapes(&device(), Choice::Forced(MatmulVariant::Gemv));
            }

            #[test]
            fn default_shapes() {
                super::shapes(&device(), Choice::Default);
            }

            #[test]
            fn gemv_block_sizes() {
                super::block_sizes(&device(), Choice::Forced(MatmulVariant::Gemv));
            }

            #[test]
            fn default_block_sizes() {
                super::block_sizes(&device(), Choice::Default);
            }

            #[test]
            fn gemv_branches() {
                super::branches(&device(), Choice::Forced(MatmulVariant::Gemv));
            }

            #[test]
            fn default_branches() {
                super::branches(&device(), Choice::Default);
            }

            #[test]
            fn ragged() {
                super::ragged(&device());
            }

            #[test]
            fn refusals() {
                super::refusals(&device());
            }
        }
    };
}

device_tests!(cuda, "cuda", Device::cuda(0));
device_tests!(rocm, "rocm", Device::rocm(0));
device_tests!(wgpu, "wgpu", Device::wgpu(Default::default()));
device_tests!(vulkan, "vulkan", Device::vulkan(Default::default()));
device_tests!(metal, "metal", Device::metal(Default::default()));
device_tests!(cpu, "cpu", Device::cpu());
