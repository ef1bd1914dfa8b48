//! The CPU implementation against the reference, bit for bit, with every set of vector
//! instructions that this processor has.

mod random;

use std::fmt::Debug;

use bytemuck::{bytes_of, cast_slice};
use half::{bf16, f16};
use proptest::prelude::*;
use rstest::rstest;

use burn_nf4::Nf4Error;
use burn_nf4::format::{
    Absmax, BlockSize, BlockTensor, DYNAMIC_MAP, FP4_THRESHOLDS, FloatElement, FloatType,
    NF4_THRESHOLDS, NestedAbsmax, QuantConfig, QuantType,
};
use burn_nf4::host;
use random::{Random, available};

fn config(quant_type: QuantType, block_elems: u64, nested: Option<u64>) -> QuantConfig {
    let size = |elems| BlockSize::new(elems, "test").expect("a block size of the format");
    QuantConfig {
        quant_type,
        block_size: size(block_elems),
        nested_block_size: nested.map(size),
    }
}

/// A weight with any codes and the scales given for its blocks, in turn.
fn tensor_with_scales(elems: usize, config: QuantConfig, scales: &[f32]) -> BlockTensor {
    let mut random = Random(elems as u64);
    let codes = (0..elems.div_ceil(2))
        .map(|_| random.next() as u8)
        .collect();
    let blocks = config.block_size.blocks(elems);
    let absmax = match config.nested_block_size {
        None => Absmax::Flat(scales.iter().copied().cycle().take(blocks).collect()),
        Some(block_size) => Absmax::Nested(NestedAbsmax {
            codes: (0..blocks).map(|_| random.next() as u8).collect(),
            absmax: scales
                .iter()
                .copied()
                .cycle()
                .take(block_size.blocks(blocks))
                .collect(),
            map: Box::new(DYNAMIC_MAP),
            offset: 0.043_512_3,
            block_size,
        }),
    };
    let (shape, dtype) = (vec![elems], FloatType::BF16);
    BlockTensor::from_parts(
        codes,
        absmax,
        shape,
        config.block_size,
        dtype,
        config.quant_type,
    )
    .expect("a consistent weight")
}

fn assert_same_bits<T: FloatElement + Debug>(given: &[T], expected: &[T], what: impl Debug) {
    assert_eq!(given.len(), expected.len(), "{what:?}");
    if cast_slice::<T, u8>(given) == cast_slice::<T, u8>(expected) {
        return;
    }
    let differs = |&i: &usize| bytes_of(&given[i]) != bytes_of(&expected[i]);
    let i = (0..given.len()).find(differs).expect("some byte differs");
    let (given, expected) = (given[i], expected[i]);
    panic!("{what:?}, element {i}: {given:?}, expected {expected:?}");
}

/// Decodes each range with all instructions, streaming or not, to outputs of different alignment.
fn check_dequantize<T: FloatElement + Debug>(tensor: &BlockTensor, ranges: &[(usize, usize)]) {
    let (words, layout) = (tensor.to_packed(), tensor.packed_layout());
    let all: Vec<T> = tensor.dequantize();
    let nan = T::from_f32(f32::NAN);
    for &(start, len) in ranges {
        for simd in available() {
            // By elements off an allocation, which is aligned to 16 bytes. Streaming needs that.
            for (stream, shift) in [(false, 0), (true, 0), (true, 1), (true, 8)] {
                let mut out = vec![nan; shift + len + 1];
                let part = &mut out[shift..shift + len];
                host::dequantize_with(simd, stream, &words, &layout, start, part);
                let what = (simd, stream, start, len, shift, tensor.config());
                assert_same_bits(part, &all[start..start + len], what);
                let after = out[shift + len].to_f32();
                assert!(after.is_nan(), "wrote past the end: {what:?}");
            }
        }
    }
}

fn check_dequantize_all_types(tensor: &BlockTensor, ranges: &[(usize, usize)]) {
    check_dequantize::<f16>(tensor, ranges);
    check_dequantize::<bf16>(tensor, ranges);
    check_dequantize::<f32>(tensor, ranges);
}

/// Ranges for each way through the code, in a weight of `elems`.
fn ranges(elems: usize, block: usize) -> Vec<(usize, usize)> {
    let candidates = [
        (0, elems),
        (0, 0),
        (elems, 0),
        (0, 1),
        (1, 1),
        (7, 1),
        (1, 2),
        (3, 4),
        (7, 9),
        (8, 8),
        (8, 31),
        (5, 27),
        (16, 40),
        (1, elems.saturating_sub(1)),
        (2, elems.saturating_sub(2)),
        (9, elems.saturating_sub(11)),
        (31, elems.saturating_sub(40)),
        (block - 1, 2),
        (block - 8, 16),
        (block, block),
        (block + 8, block + 24),
        (block + 1, 2 * block),
        (2 * block - 3, block + 7),
    ];
    let fits = |&(start, len): &(usize, usize)| start + len <= elems;
    candidates.into_iter().filter(fits).collect()
}

#[rstest]
fn every_range_decodes_as_the_reference(
    #[values(QuantType::Nf4, QuantType::Fp4)] quant_type: QuantType,
    #[values(32, 64, 128, 256, 512, 1024, 2048, 4096)] block: usize,
    #[values(None, Some(32))] nested: Option<u64>,
) {
    let config = config(quant_type, block as u64, nested);
    // Exact, ragged, odd, a single block, less than one, a single weight.
    for elems in [
        4 * block,
        5 * block + 18,
        3 * block + 7,
        block,
        block - 3,
        1,
    ] {
        let tensor = tensor_with_scales(elems, config, &[0.1, 1.7, 0.012_345_6]);
        check_dequantize_all_types(&tensor, &ranges(elems, block));
    }
}

#[rstest]
fn extreme_scales_decode_as_the_reference(
    #[values(QuantType::Nf4, QuantType::Fp4)] quant_type: QuantType,
    #[values(None, Some(256))] nested: Option<u64>,
) {
    let scales = [
        0.0,
        -0.0,
        1.0,
        -3.25,
        f32::MAX,
        f32::MIN_POSITIVE,
        1e-40, // subnormal
        f32::from_bits(1),
        9.2e-8, // f16 results around half its smallest subnormal
        6.1e-5, // f16 results on both sides of its smallest normal
        65_504.0,
        65_520.0, // the first f16 infinity
        3.4e38,
        3.395e38, // bf16 results that round up to infinity
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::from_bits(0x7f80_0001), // a NaN whose payload a plain shift would lose
        f32::from_bits(0xffc1_2345),
    ];
    let elems = 64 * 64 * scales.len();
    let config = config(quant_type, 32, nested);
    check_dequantize_all_types(&tensor_with_scales(elems, config, &scales), &[(0, elems)]);
}

#[rstest]
fn many_scales_round_as_the_reference(
    #[values(QuantType::Nf4, QuantType::Fp4)] quant_type: QuantType,
) {
    // Scales of any bits, to meet every case of rounding to 16 bits.
    let mut random = Random(7);
    let scales: Vec<f32> = (0..20_000)
        .map(|_| f32::from_bits(random.next() as u32))
        .collect();
    let elems = 32 * scales.len();
    let tensor = tensor_with_scales(elems, config(quant_type, 32, None), &scales);
    check_dequantize_all_types(&tensor, &[(0, elems)]);
}

#[rstest]
fn a_checkpoints_own_nested_map_is_used(#[values(0, 5)] start: usize) {
    let mut parts = tensor_with_scales(3000, QuantConfig::default(), &[1.5]);
    if let Absmax::Nested(nested) = parts.absmax().clone() {
        let map = Box::new(nested.map.map(|value| value * 0.75 + 0.01));
        let absmax = Absmax::Nested(NestedAbsmax { map, ..nested });
        let (codes, shape) = (parts.codes().to_vec(), parts.shape().to_vec());
        let (dtype, quant_type) = (parts.dtype(), parts.quant_type());
        parts =
            BlockTensor::from_parts(codes, absmax, shape, parts.block_size(), dtype, quant_type)
                .expect("a consistent weight");
    }
    check_dequantize_all_types(&parts, &[(start, 3000 - start)]);
}

/// Large enough for several threads.
#[rstest]
fn large_outputs_decode_as_the_reference(#[values(None, Some(256))] nested: Option<u64>) {
    let elems = (3 << 19) + 12_345;
    let config = config(QuantType::Nf4, 64, nested);
    let tensor = tensor_with_scales(elems, config, &[0.1, 1.7, 0.012_345_6]);
    check_dequantize_all_types(&tensor, &[(0, elems), (4097, elems - 4097)]);
}

/// The entry point for users: instructions and stores of its own choice.
#[test]
fn dequantize_chooses_by_itself() {
    let elems = (32 << 20) / 4 + 3;
    let tensor = tensor_with_scales(elems, QuantConfig::default(), &[0.7, 1.1]);
    let (words, layout) = (tensor.to_packed(), tensor.packed_layout());
    for (start, len) in [(0, elems), (12_345, 999)] {
        let mut out = vec![f32::NAN; len];
        host::dequantize(&words, &layout, start, &mut out);
        assert_same_bits(&out, &tensor.dequantize_range(start, len), (start, len));
    }
}

#[rstest]
#[case::past_the_end(0, 129, 0)]
#[case::start_past_the_end(129, 0, 0)]
#[case::overflow(usize::MAX, 2, 0)]
#[case::short_image(0, 128, 1)]
#[should_panic(expected = "of")]
fn dequantize_refuses(#[case] start: usize, #[case] len: usize, #[case] words_missing: usize) {
    let tensor = tensor_with_scales(128, QuantConfig::flat(), &[1.0]);
    let words = tensor.to_packed();
    let words = &words[..words.len() - words_missing];
    host::dequantize(
        words,
        &tensor.packed_layout(),
        start,
        &mut vec![0.0f32; len],
    );
}

/// Weights for each way through the code: plain, with all-zero, subnormal and huge blocks, and
/// with values at and one ulp beside every threshold.
fn weights(elems: usize, block: usize) -> Vec<Vec<f32>> {
    let mut random = Random(elems as u64 ^ 0x5eed);
    let plain: Vec<f32> = (0..elems).map(|_| random.unit()).collect();
    // One block each; the second list is for f16, in which 3e38 is infinite.
    let wide = [1.0, 0.0, 1e-38, 1e-42, 3e38, -0.0, 1e-36, 2.5e-37, 3.0];
    let narrow = [1.0, 0.0, 6e4, 1e-7, -0.0, 1e-5, 0.01];
    let scaled = |factors: &[f32]| -> Vec<f32> {
        let scale = |(i, value): (usize, &f32)| value * factors[i / block % factors.len()];
        plain.iter().enumerate().map(scale).collect()
    };
    let (wide, narrow) = (scaled(&wide), scaled(&narrow));
    let around = |value: f32| [value.next_down(), value, value.next_up()];
    let ties: Vec<f32> = NF4_THRESHOLDS
        .into_iter()
        .chain(FP4_THRESHOLDS)
        .chain(FP4_THRESHOLDS.map(|value| -value))
        .chain([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0])
        .flat_map(around)
        .collect();
    let mut tied: Vec<f32> = (0..elems)
        .map(|i| ties[i % ties.len()].clamp(-1.0, 1.0))
        .collect();
    for block in tied.chunks_mut(block) {
        block[0] = 1.0;
    }
    vec![
        plain,
        wide,
        narrow,
        tied,
        vec![0.0; elems],
        vec![-0.0; elems],
        vec![2.5; elems],
    ]
}

fn check_quantize<T: FloatElement>(weight: &[f32], config: QuantConfig) {
    let weight: Vec<T> = weight.iter().map(|&value| T::from_f32(value)).collect();
    let shape = [1, weight.len()];
    let expected = BlockTensor::quantize(&weight, &shape, config).map(|tensor| tensor.to_packed());
    for simd in available() {
        let given = host::quantize_with(simd, &weight, &shape, config);
        match (&given, &expected) {
            (Ok(given), Ok(expected)) => {
                let what = (simd, weight.len(), T::FLOAT_TYPE, config);
                assert_eq!(given.len(), expected.len(), "{what:?}");
                let differs = (0..given.len()).find(|&i| given[i] != expected[i]);
                if let Some(i) = differs {
                    let (given, expected) = (given[i], expected[i]);
                    panic!("{what:?}, word {i}: {given:#010x}, expected {expected:#010x}");
                }
            }
            // Through text, because a NaN differs from itself.
            _ => assert_eq!(format!("{given:?}"), format!("{expected:?}"), "{simd:?}"),
        }
    }
}

fn check_quantize_all_types(weight: &[f32], config: QuantConfig) {
    // What overflows f16 is an error there, which is checked too.
    check_quantize::<f16>(weight, config);
    check_quantize::<bf16>(weight, config);
    check_quantize::<f32>(weight, config);
}

#[rstest]
fn every_weight_quantizes_as_the_reference(
    #[values(QuantType::Nf4, QuantType::Fp4)] quant_type: QuantType,
    #[values(32, 64, 128, 256, 512, 1024, 2048, 4096)] block: usize,
    #[values(None, Some(32))] nested: Option<u64>,
) {
    let config = config(quant_type, block as u64, nested);
    for elems in [
        12 * block,
        9 * block + 18,
        9 * block + 7,
        3 * block + 1,
        block,
        block - 3,
        1,
    ] {
        for weight in weights(elems, block) {
            check_quantize_all_types(&weight, config);
        }
    }
}

/// Large enough for several threads and for several chunks of the scales' mean.
#[rstest]
fn large_weights_quantize_as_the_reference(
    #[values(QuantType::Nf4, QuantType::Fp4)] quant_type: QuantType,
    #[values(None, Some(256), Some(4096))] nested: Option<u64>,
) {
    let mut random = Random(11);
    let elems = 270_000 + 777;
    let weight: Vec<f32> = (0..elems)
        .map(|_| random.unit() * random.unit() * 0.1)
        .collect();
    check_quantize_all_types(&weight, config(quant_type, 32, nested));
}

#[rstest]
#[case::nan(f32::NAN)]
#[case::infinity(f32::INFINITY)]
#[case::minus_infinity(f32::NEG_INFINITY)]
fn the_first_weight_that_is_not_finite_is_named(
    #[case] value: f32,
    #[values(0, 63, 64, 200)] index: usize,
    #[values(None, Some(256))] nested: Option<u64>,
) {
    let mut weight = vec![0.25f32; 201];
    weight[200] = f32::INFINITY;
    weight[index] = value;
    let config = config(QuantType::Nf4, 64, nested);
    check_quantize_all_types(&weight, config);
    let result = host::quantize(&weight, &[201], config);
    assert!(matches!(
        result,
        Err(Nf4Error::NonFinite { index: given, tensor, .. })
            if given == index && tensor == "weight"
    ));
}

/// Of two in the parts of different threads.
#[test]
fn the_first_weight_that_is_not_finite_is_named_across_threads() {
    let mut weight = vec![0.25f32; 300_000];
    weight[299_999] = f32::NAN;
    weight[290_000] = f32::INFINITY;
    check_quantize::<f32>(&weight, QuantConfig::default());
}

/// In one chunk and in several, on one thread and on several.
#[rstest]
fn scales_whose_sum_overflows_give_the_mean_of_the_reference(
    #[values(1000, 700_000)] elems: usize,
    #[values(f32::MAX, 1e38, 1e36)] largest: f32,
) {
    let mut random = Random(7);
    let weight: Vec<f32> = (0..elems).map(|_| random.unit() * largest).collect();
    check_quantize::<f32>(&weight, QuantConfig::default());
    check_quantize::<f32>(&vec![largest; elems], QuantConfig::default());
}

#[rstest]
#[case::empty(&[4, 0], 0)]
#[case::overflow(&[usize::MAX, 2], 4)]
#[case::too_few(&[2, 3], 5)]
#[case::too_many(&[2, 3], 7)]
fn quantize_refuses_as_the_reference(#[case] shape: &[usize], #[case] elems: usize) {
    let (weight, config) = (vec![0.5f32; elems], QuantConfig::default());
    let expected = BlockTensor::quantize(&weight, shape, config).expect_err("an impossible shape");
    assert_eq!(host::quantize(&weight, shape, config), Err(expected));
}

fn any_config() -> impl Strategy<Value = QuantConfig> {
    let sizes = || prop::sample::select(&BlockSize::ALL[..]);
    let types = prop::sample::select(&[QuantType::Nf4, QuantType::Fp4][..]);
    (types, sizes(), prop::option::of(sizes())).prop_map(
        |(quant_type, block_size, nested_block_size)| QuantConfig {
            quant_type,
            block_size,
            nested_block_size,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_range_of_any_weight_decodes_as_the_reference(
        config in any_config(),
        elems in 1usize..10_000,
        from in 0.0f64..1.0,
        part in 0.0f64..1.0,
        scales in prop::collection::vec(any::<f32>(), 1..40),
    ) {
        let start = (elems as f64 * from) as usize;
        let len = ((elems - start) as f64 * part) as usize;
        let tensor = tensor_with_scales(elems, config, &scales);
        check_dequantize_all_types(&tensor, &[(start, len)]);
    }

    #[test]
    fn any_finite_weight_quantizes_as_the_reference(
        config in any_config(),
        weight in prop::collection::vec(
            any::<f32>().prop_filter("finite", |value| value.is_finite()), 1..5000,
        ),
        exponent in prop::option::of(-126i32..127),
    ) {
        // Either of any magnitudes, or of like ones, in which all codes occur.
        let weight: Vec<f32> = weight.iter().map(|&value| match exponent {
            None => value,
            Some(exponent) => {
                let bits = value.to_bits() & 0x807f_ffff | 127 << 23;
                let unit = f32::from_bits(bits);
                (unit - unit.signum()) * 2f32.powi(exponent)
            }
        }).collect();
        check_quantize_all_types(&weight, config);
    }
}
