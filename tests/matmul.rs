//! The matrix products with a packed weight at the launch level, on every device that is compiled
//! in, against a product in f64 of the decoded weight.
#![cfg(feature = "cube")]

use burn::backend::DispatchDevice;
use burn::tensor::Device;
use burn_nf4::Nf4Error;
use burn_nf4::format::{BlockSize, FloatElement, FloatType, Nf4Tensor, QuantConfig, QuantType};
use burn_nf4::launch::{MatmulPlan, MatmulVariant, Product, TensorCoreTile, check_dtype};
use cubecl::prelude::Client;
use half::{bf16, f16};
use rstest::rstest;

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
}

fn case(m: usize, n: usize, k: usize) -> Case {
    Case {
        m,
        n,
        k,
        config: QuantConfig::default(),
        bias: false,
        x_log2: 0,
    }
}

fn plan(
    client: &Client,
    case: Case,
    dtype: FloatType,
    choice: Choice,
) -> Result<MatmulPlan, Nf4Error> {
    let Case { m, n, k, .. } = case;
    let layout = burn_nf4::format::PackedLayout::new(n * k, case.config);
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

/// Runs one product and compares every element with an f64 product: of the weight as it is decoded
/// to the same dtype, or without rounding where the kernel multiplies with levels and scales.
fn check<T: FloatElement>(client: &Client, case: Case, choice: Choice) {
    let Case { m, n, k, .. } = case;
    let dtype = T::FLOAT_TYPE;
    let what = format!("{case:?} {} {choice:?}", dtype.name());
    let weight: Vec<T> = values(n * k, 1);
    let tensor = Nf4Tensor::quantize(&weight, &[n, k], case.config).expect("finite values");
    let x_scale = f32::powi(2.0, case.x_log2);
    let x: Vec<T> = values::<T>(m * k, 2)
        .iter()
        .map(|value| T::from_f32(value.to_f32() * x_scale))
        .collect();
    let bias: Vec<T> = values(n, 3);

    let upload = |values: &[T]| client.create_from_slice(bytemuck::cast_slice(values));
    let packed = client.create_from_slice(bytemuck::cast_slice(&tensor.to_packed()));
    let bytes = m * n * dtype.size_bytes();
    let out = client.create_from_slice(&vec![POISON; bytes + GUARD_BYTES]);
    let plan = plan(client, case, dtype, choice).expect(&what);
    let (decoded, level_rounding) = match plan.variant() {
        MatmulVariant::Levels => (tensor.dequantize::<f32>(), f64::powi(2.0, -12)),
        _ => (floats(&tensor.dequantize::<T>()), 0.0),
    };
    plan.launch(
        client,
        upload(&x),
        packed,
        &tensor.packed_layout(),
        case.bias.then(|| upload(&bias)),
        out.clone(),
    )
    .expect(&what);
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
    for row in 0..m {
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
            let tolerance =
                rounding * sum.abs() + of_products * magnitude + 1e-7 * f64::from(x_scale);
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

fn block_sizes(device: &Device, choice: Choice) {
    let client = client(device);
    for block in [32, 64, 128, 256, 512, 1024, 2048, 4096] {
        for (quant_type, nested) in [
            (QuantType::Nf4, true),
            (QuantType::Nf4, false),
            (QuantType::Fp4, true),
        ] {
            let case = Case {
                config: config(quant_type, block, nested),
                ..case(2, 24, 288)
            };
            check_dtypes(&client, case, choice);
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
    let layout = burn_nf4::format::PackedLayout::new(4 * 64, small.config);
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
    let error = plan.launch(&client, bytes.clone(), bytes.clone(), &layout, None, bytes);
    assert!(matches!(error, Err(Nf4Error::Length { .. })), "{error:?}");
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
    let client = client(&Device::cuda(0));
    let (row_planes, k_planes, chunks, depth) = shape;
    let tile = TensorCoreTile {
        row_tiles,
        row_planes,
        k_planes,
        chunks,
        depth,
        k_cubes,
    };
    let choice = Choice::Tile(MatmulVariant::TensorCore, tile);
    let mut ran = 0;
    for (m, n, k) in [(1, 80, 1024), (12, 130, 2112), (33, 300, 1536)] {
        if plan(&client, case(m, n, k), FloatType::BF16, choice).is_ok() {
            check::<bf16>(&client, case(m, n, k), choice);
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
    let client = client(&Device::cuda(0));
    let (row_planes, k_planes, depth) = planes;
    for (n, k) in [(80, 1024), (333, 2112), (16, 64), (4096, 4096usize)] {
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
            ..case(1, n, k)
        };
        let choice = Choice::Tile(MatmulVariant::Levels, tile);
        check::<bf16>(&client, case, choice);
        check::<f16>(&client, case, choice);
        for x_log2 in [60, 17, -20, -60] {
            check::<bf16>(
                &client,
                Case {
                    x_log2,
                    bias: false,
                    ..case
                },
                choice,
            );
        }
    }
    let forced = Choice::Forced(MatmulVariant::Levels);
    for refused in [case(2, 64, 64), case(1, 64, 96)] {
        let error = plan(&client, refused, FloatType::BF16, forced).expect_err("impossible");
        assert!(matches!(error, Nf4Error::Variant { .. }), "{error}");
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
