//! The CubeCL kernels at the launch level: every variant, dtype and shape class, against the
//! reference and so against each other, on every device that is compiled in. A device that is
//! compiled in but missing fails its tests.
#![cfg(feature = "checkpoint")]
#![cfg(feature = "cube")]

mod block_files;
mod golden;

use burn::backend::DispatchDevice;
use burn::tensor::Device;
use burn_nf4::Nf4Error;
use burn_nf4::format::{
    BlockSize, BlockTensor, FloatElement, FloatType, PackedLayout, QuantConfig, QuantType,
};
use burn_nf4::launch::{self, DequantizePlan, Variant};
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

/// Decodes with a kernel into a poisoned buffer and checks that nothing behind it was touched.
fn run_dequantize(
    client: &Client,
    words: &[u32],
    layout: &PackedLayout,
    range: (usize, usize),
    dtype: FloatType,
    variant: Variant,
) -> Result<Vec<u8>, Nf4Error> {
    let (start, len) = range;
    let packed = client.create_from_slice(bytemuck::cast_slice(words));
    let bytes = len * dtype.size_bytes();
    let out = client.create_from_slice(&vec![POISON; bytes + GUARD_BYTES]);
    let elems = start..start + len;
    let plan = DequantizePlan::new(client, layout, elems, dtype, Some(variant))?;
    plan.launch(packed, out.clone())?;
    let mut read = client.read_one(out).expect("the kernel ran").to_vec();
    let guard = read.split_off(bytes);
    assert!(
        guard.iter().take(GUARD_BYTES).all(|&byte| byte == POISON),
        "{} wrote behind its output",
        variant.name()
    );
    Ok(read)
}

fn reference_bytes(tensor: &BlockTensor, dtype: FloatType, start: usize, len: usize) -> Vec<u8> {
    fn bytes<T: FloatElement>(tensor: &BlockTensor, start: usize, len: usize) -> Vec<u8> {
        bytemuck::cast_slice(&tensor.dequantize_range::<T>(start, len)).to_vec()
    }
    match dtype {
        FloatType::F16 => bytes::<f16>(tensor, start, len),
        FloatType::BF16 => bytes::<bf16>(tensor, start, len),
        FloatType::F32 => bytes::<f32>(tensor, start, len),
    }
}

#[track_caller]
fn assert_same_bits(got: &[u8], expected: &[u8], dtype: FloatType, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    let size = dtype.size_bytes();
    let differing: Vec<usize> = (0..got.len() / size)
        .filter(|i| got[i * size..(i + 1) * size] != expected[i * size..(i + 1) * size])
        .collect();
    if let Some(&first) = differing.first() {
        panic!(
            "{what}: {} of {} elements differ, the first at {first}: {:02x?} instead of {:02x?}",
            differing.len(),
            got.len() / size,
            &got[first * size..(first + 1) * size],
            &expected[first * size..(first + 1) * size],
        );
    }
}

/// Compares a kernel with the reference, or checks the error where the device lacks the dtype.
fn check_range(
    client: &Client,
    tensor: &BlockTensor,
    range: (usize, usize),
    dtype: FloatType,
    variant: Variant,
    what: &str,
) {
    let layout = tensor.packed_layout();
    let got = run_dequantize(client, &tensor.to_packed(), &layout, range, dtype, variant);
    if launch::check_dtype(client, dtype).is_err() {
        assert!(matches!(got, Err(Nf4Error::DeviceDtype { .. })), "{what}");
        return;
    }
    let expected = reference_bytes(tensor, dtype, range.0, range.1);
    assert_same_bits(&got.expect(what), &expected, dtype, what);
}

/// Values like those of a trained weight, with some zeros, and reproducible.
fn weights(elems: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..elems)
        .map(|i| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let uniform = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            if i % 97 == 0 {
                0.0
            } else {
                uniform * uniform * uniform
            }
        })
        .collect()
}

fn config(quant_type: QuantType, block: usize, nested: bool) -> QuantConfig {
    QuantConfig {
        quant_type,
        block_size: BlockSize::try_from(block).expect("a known block size"),
        nested_block_size: nested.then_some(BlockSize::B256),
    }
}

/// All golden files in their own dtype: bitsandbytes' own bits.
fn golden_files(device: &Device, variant: Variant) {
    let client = client(device);
    for name in golden::names() {
        let case = golden::load(&name);
        let tensor = &case.tensor;
        let dtype = tensor.dtype();
        let layout = tensor.packed_layout();
        let range = (0, tensor.elems());
        let got = run_dequantize(&client, &tensor.to_packed(), &layout, range, dtype, variant);
        if launch::check_dtype(&client, dtype).is_err() {
            assert!(matches!(got, Err(Nf4Error::DeviceDtype { .. })), "{name}");
            continue;
        }
        assert_same_bits(
            &got.expect("a launch"),
            case.dequantized_bytes(),
            dtype,
            &name,
        );
    }
}

/// All golden files in each dtype, against the reference.
fn golden_files_in_other_dtypes(device: &Device, variant: Variant, dtype: FloatType) {
    let client = client(device);
    for name in golden::names() {
        let tensor = golden::load(&name).tensor;
        check_range(&client, &tensor, (0, tensor.elems()), dtype, variant, &name);
    }
}

/// The golden files of NVFP4, MXFP4 and FP8, and parts of them that begin and end anywhere.
fn block_files(device: &Device, variant: Variant, dtype: FloatType) {
    let client = client(device);
    for name in block_files::NAMES {
        let file = block_files::load(name);
        let elems = file.tensor.elems();
        for range in [(0, elems), (1, elems - 1), (8, 16), (elems - 21, 20)] {
            check_range(&client, &file.tensor, range, dtype, variant, name);
        }
        if dtype == FloatType::F32 {
            let (words, layout) = (file.tensor.to_packed(), file.tensor.packed_layout());
            let got = run_dequantize(&client, &words, &layout, (0, elems), dtype, variant);
            let expected = bytemuck::cast_slice(&file.dequantized);
            assert_same_bits(&got.expect("a launch"), expected, dtype, name);
        }
    }
}

/// One shape a code path: exact, ragged rows, a single block, wide, tall, odd counts, one element.
fn shapes(device: &Device, variant: Variant, dtype: FloatType) {
    let client = client(device);
    for (case, shape) in [
        ("exact", &[64, 128][..]),
        ("ragged rows", &[17, 33]),
        ("single block", &[1, 64]),
        ("part of a block", &[1, 40]),
        ("wide", &[2, 8200]),
        ("tall", &[3000, 8]),
        ("odd count", &[5, 5, 5]),
        ("one element", &[1]),
        ("many cubes", &[1024, 520]),
    ] {
        for quant in [
            config(QuantType::Nf4, 64, true),
            config(QuantType::Fp4, 64, false),
        ] {
            let elems = shape.iter().product();
            let tensor = BlockTensor::quantize(&weights(elems, 3), shape, quant).expect("valid");
            check_range(&client, &tensor, (0, elems), dtype, variant, case);
        }
    }
}

/// Every block size, flat and nested, with several nested blocks and a partial last block.
fn block_sizes(device: &Device, variant: Variant, dtype: FloatType) {
    let client = client(device);
    for block in BlockSize::ALL {
        for nested in [false, true] {
            let elems = 300 * block.elems().min(512) + 24;
            let quant = config(QuantType::Nf4, block.elems(), nested);
            let tensor = BlockTensor::quantize(&weights(elems, 5), &[elems], quant).expect("valid");
            let what = format!("block {} nested {nested}", block.elems());
            check_range(&client, &tensor, (0, elems), dtype, variant, &what);
        }
    }
}

/// Ranges that start and end anywhere: aligned, in the middle of a word, of a byte, of a block.
fn ranges(device: &Device, variant: Variant, dtype: FloatType) {
    let client = client(device);
    let elems = 4096 + 77;
    let quant = config(QuantType::Nf4, 64, true);
    let tensor = BlockTensor::quantize(&weights(elems, 7), &[elems], quant).expect("valid");
    for range in [
        (0, 64),
        (64, 1024),
        (8, 16),
        (4, 12),
        (2, 2),
        (1, 1),
        (3, 500),
        (63, 2),
        (1000, 2173),
        (elems - 1, 1),
    ] {
        check_range(
            &client,
            &tensor,
            range,
            dtype,
            variant,
            &format!("{range:?}"),
        );
    }
}

/// Blocks of zeros, of huge and of tiny values, and all 256 byte values.
fn values(device: &Device, variant: Variant, dtype: FloatType) {
    let client = client(device);
    let quant = config(QuantType::Nf4, 64, false);
    for (case, scale) in [
        ("zeros", 0.0f32),
        ("huge", 3e4),
        ("beyond f16", 1e30),
        ("tiny", 1e-30),
    ] {
        let values: Vec<f32> = weights(640, 11).iter().map(|w| w * scale).collect();
        let tensor = BlockTensor::quantize(&values, &[10, 64], quant).expect("valid");
        check_range(&client, &tensor, (0, 640), dtype, variant, case);
    }
    let bytes = BlockTensor::from_parts(
        (0..=255).collect(),
        burn_nf4::format::Absmax::Flat(vec![0.7; 8]),
        vec![512],
        BlockSize::B64,
        FloatType::F32,
        QuantType::Nf4,
    )
    .expect("valid");
    check_range(&client, &bytes, (0, 512), dtype, variant, "all bytes");
}

/// Quantizing on the device gives the packed words of the reference.
fn quantize_like_reference(device: &Device, dtype: FloatType) {
    let client = client(device);
    if launch::check_dtype(&client, dtype).is_err() {
        let layout = PackedLayout::new(64, QuantConfig::default());
        let weight = client.empty(64 * dtype.size_bytes());
        let refused = launch::quantize(&client, weight, dtype, &[64], &layout);
        assert!(matches!(refused, Err(Nf4Error::DeviceDtype { .. })));
        return;
    }
    fn check<T: FloatElement>(
        client: &Client,
        values: &[f32],
        shape: &[usize],
        quant: QuantConfig,
    ) {
        let values: Vec<T> = values.iter().map(|&v| T::from_f32(v)).collect();
        let expected = BlockTensor::quantize(&values, shape, quant).expect("valid");
        let weight = client.create_from_slice(bytemuck::cast_slice(&values));
        let layout = expected.packed_layout();
        let packed =
            launch::quantize(client, weight, T::FLOAT_TYPE, shape, &layout).expect("valid");
        let got = client.read_one(packed).expect("the kernels ran").to_vec();
        let got: &[u32] = bytemuck::cast_slice(&got[..layout.words() * 4]);
        let expected = expected.to_packed();
        let differing: Vec<usize> = (0..got.len()).filter(|&i| got[i] != expected[i]).collect();
        assert!(
            differing.is_empty(),
            "{shape:?} {quant:?}: {} words differ, the first is {}: {:08x} instead of {:08x}; {layout:?}",
            differing.len(),
            differing[0],
            got[differing[0]],
            expected[differing[0]],
        );
    }
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for nested in [false, true] {
            for (shape, block) in [
                (&[64, 128][..], 64),
                (&[17, 33], 64),
                (&[1], 64),
                (&[3, 1000], 32),
                (&[6, 4096], 4096),
                (&[7, 777], 128),
                (&[1024, 300], 64),
                (&[2048, 512], 64),
            ] {
                let elems = shape.iter().product();
                let values = weights(elems, 13);
                let quant = config(quant_type, block, nested);
                match dtype {
                    FloatType::F16 => check::<f16>(&client, &values, shape, quant),
                    FloatType::BF16 => check::<bf16>(&client, &values, shape, quant),
                    FloatType::F32 => check::<f32>(&client, &values, shape, quant),
                }
            }
        }
    }
    let mut special = weights(1024, 17);
    special[64..128].fill(0.0);
    special[128..192].fill(f32::MIN_POSITIVE / 4.0);
    special[192..256].fill(3.0e38);
    let quant = config(QuantType::Nf4, 64, false);
    if dtype == FloatType::F32 {
        check::<f32>(&client, &special, &[16, 64], quant);
    }
}

/// A range that leaves the weight and buffers that are too small are refused before a launch.
fn refusals(device: &Device, variant: Variant) {
    let client = client(device);
    let quant = config(QuantType::Nf4, 64, true);
    let tensor = BlockTensor::quantize(&weights(640, 1), &[10, 64], quant).expect("valid");
    let layout = tensor.packed_layout();
    let plan = |elems| DequantizePlan::new(&client, &layout, elems, FloatType::F32, Some(variant));
    let backwards = std::ops::Range { start: 5, end: 4 };
    for elems in [
        0..0,
        0..641,
        640..641,
        backwards,
        usize::MAX - 1..usize::MAX,
    ] {
        let expected = Nf4Error::ElementRange {
            start: elems.start,
            end: elems.end,
            elems: 640,
        };
        assert_eq!(plan(elems).err(), Some(expected));
    }
    let plan = plan(0..640).expect("a valid range");
    let packed = client.create_from_slice(bytemuck::cast_slice(&tensor.to_packed()));
    let length = |tensor: &str, expected, given| Nf4Error::Length {
        tensor: tensor.into(),
        expected,
        given,
    };
    let words = layout.words();
    let full = || client.empty(640 * 4);
    // Nothing that is launched reaches past a buffer, also where it is a part of a larger one.
    let whole = client.empty(4 * words + 64);
    for (packed, out, expected) in [
        (
            packed.clone(),
            client.empty(639 * 4),
            length("dequantized", 2560, 2556),
        ),
        (
            client.empty(4 * words - 4),
            full(),
            length("packed weight", 4 * words, 4 * words - 4),
        ),
        (
            whole.clone().offset_start(128),
            full(),
            length("packed weight", 4 * words, 4 * words - 64),
        ),
        (
            whole.clone().offset_end(1 << 40),
            full(),
            length("packed weight", 4 * words, 0),
        ),
        (
            whole.offset_start(4),
            full(),
            Nf4Error::Alignment {
                tensor: "packed weight".into(),
                expected: 16,
                given: 4,
            },
        ),
    ] {
        assert_eq!(plan.launch(packed, out), Err(expected));
    }

    // Shapes whose product overflows do not pass for others.
    let weight = client.empty(640 * 4);
    let empty = PackedLayout::new(0, layout.config());
    let error = launch::quantize(&client, weight.clone(), FloatType::F32, &[0, 8], &empty);
    assert!(
        matches!(&error, Err(Nf4Error::ElementCount { shape, .. }) if shape == &[0, 8]),
        "{error:?}"
    );
    for shape in [
        &[1usize << 32, 1 << 32][..],
        &[640, 1 << 60],
        &[640, 2],
        &[639],
    ] {
        let error = launch::quantize(&client, weight.clone(), FloatType::F32, shape, &layout);
        assert!(
            matches!(&error, Err(Nf4Error::Length { tensor, .. }) if tensor == "weight"),
            "{shape:?}: {error:?}"
        );
    }
}

/// More than 2^31 elements: indices need 64 bits. Needs 6 GB on the device.
#[cfg(feature = "cuda")]
#[rstest]
fn cuda_beyond_two_to_the_31(#[values(Variant::Tiled2d, Variant::WarpPerBlock)] variant: Variant) {
    let client = client(&Device::cuda(0));
    let elems = (1usize << 31) + 4096 + 24;
    let layout = PackedLayout::new(elems, QuantConfig::default());
    // A weight whose every word differs from its neighbours', without quantizing gigabytes.
    let mut words: Vec<u32> = (0..layout.words() as u32)
        .map(|i| i.wrapping_mul(0x9e37_79b9))
        .collect();
    for (word, value) in words[layout.codebook_start()..]
        .iter_mut()
        .zip(layout.tables())
    {
        *word = value;
    }
    words[layout.nested_offset_start()] = 0.05f32.to_bits();
    words[layout.nested_scales_start()..layout.header_start()].fill(0.01f32.to_bits());

    let packed = client.create_from_slice(bytemuck::cast_slice(&words));
    let out = client.empty(elems * 2);
    let dtype = FloatType::BF16;
    DequantizePlan::new(&client, &layout, 0..elems, dtype, Some(variant))
        .and_then(|plan| plan.launch(packed, out.clone()))
        .expect("a valid launch");
    for start in [0, (1 << 31) - 512, elems - 1024] {
        let mut expected = vec![bf16::ZERO; 1024];
        burn_nf4::host::dequantize(&words, &layout, start, &mut expected);
        let end = elems - start - 1024;
        let part = out
            .clone()
            .offset_start(start as u64 * 2)
            .offset_end(end as u64 * 2);
        let got = client.read_one(part).expect("the kernel ran");
        assert_same_bits(
            &got[..2048],
            bytemuck::cast_slice(&expected),
            dtype,
            &format!("{} from {start}", variant.name()),
        );
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

            #[rstest]
            fn golden_files(#[values(Variant::Tiled2d, Variant::WarpPerBlock)] variant: Variant) {
                super::golden_files(&device(), variant);
            }

            #[rstest]
            fn golden_files_in_other_dtypes(
                #[values(Variant::Tiled2d, Variant::WarpPerBlock)] variant: Variant,
                #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] dtype: FloatType,
            ) {
                super::golden_files_in_other_dtypes(&device(), variant, dtype);
            }

            #[rstest]
            fn block_files(
                #[values(Variant::Tiled2d, Variant::WarpPerBlock)] variant: Variant,
                #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] dtype: FloatType,
            ) {
                super::block_files(&device(), variant, dtype);
            }

            #[rstest]
            fn shapes(
                #[values(Variant::Tiled2d, Variant::WarpPerBlock)] variant: Variant,
                #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] dtype: FloatType,
            ) {
                super::shapes(&device(), variant, dtype);
            }

            #[rstest]
            fn block_sizes(
                #[values(Variant::Tiled2d, Variant::WarpPerBlock)] variant: Variant,
                #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] dtype: FloatType,
            ) {
                super::block_sizes(&device(), variant, dtype);
            }

            #[rstest]
            fn ranges(
                #[values(Variant::Tiled2d, Variant::WarpPerBlock)] variant: Variant,
                #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] dtype: FloatType,
            ) {
                super::ranges(&device(), variant, dtype);
            }

            #[rstest]
            fn values(
                #[values(Variant::Tiled2d, Variant::WarpPerBlock)] variant: Variant,
                #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] dtype: FloatType,
            ) {
                super::values(&device(), variant, dtype);
            }

            #[rstest]
            fn quantize_like_reference(
                #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] dtype: FloatType,
            ) {
                super::quantize_like_reference(&device(), dtype);
            }

            #[rstest]
            fn refusals(#[values(Variant::Tiled2d, Variant::WarpPerBlock)] variant: Variant) {
                super::refusals(&device(), variant);
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
