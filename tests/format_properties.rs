//! Properties of the host format that hold for every weight, and tables that pin its edges.

#[path = "format_properties/refusals.rs"]
mod refusals;

use burn_nf4::Nf4Error;
use burn_nf4::format::{
    Absmax, BlockSize, BlockTensor, DYNAMIC_MAP, FP4_THRESHOLDS, FloatElement, FloatType,
    NF4_THRESHOLDS, NestedAbsmax, QuantConfig, QuantType, SumF32x2, WeightForm, fp4_code,
    nested_code, nf4_code,
};
use half::{bf16, f16};
use proptest::prelude::*;
use rstest::rstest;

/// The NF4 levels as QLoRA's appendix E prints them.
const PUBLISHED_NF4: [f64; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// A level by its definition, not by the crate's tables.
fn level(quant_type: QuantType, code: u8) -> f32 {
    match quant_type {
        QuantType::Nf4 => PUBLISHED_NF4[code as usize] as f32,
        QuantType::Fp4 => {
            let twelfths = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];
            let magnitude = twelfths[code as usize % 8] / 12.0;
            if code < 8 { magnitude } else { -magnitude }
        }
        other => unreachable!("{other:?} is not bitsandbytes'"),
    }
}

/// Decodes one weight from the fields of a flat tensor, by the format's description.
fn decode(tensor: &BlockTensor, scales: &[f32], index: usize) -> f32 {
    let byte = tensor.codes()[index / 2];
    let code = [byte >> 4, byte & 15][index % 2];
    level(tensor.quant_type(), code) * scales[index / tensor.block_size().elems()]
}

/// Half the largest distance between neighbouring levels, for a block of scale 1: from -1 to
/// -0.696 in NF4, from 2/3 to 1 in FP4. The margin is for thresholds that are not exactly in the
/// middle (FP4's `0.583333` is off by 3e-7) and for the rounding of `x * (1 / absmax)`.
fn half_gap(quant_type: QuantType) -> f64 {
    1e-6 + match quant_type {
        QuantType::Nf4 => (1.0 - 0.6961928) / 2.0,
        QuantType::Fp4 => 1.0 / 6.0,
        other => unreachable!("{other:?} is not bitsandbytes'"),
    }
}

/// Half the largest distance between neighbours of the dynamic map, which is also the distance
/// from its lowest entry, -0.99297, to -1.
const HALF_MAP_GAP: f64 = 0.0070313;

#[derive(Debug, Clone)]
struct Weight {
    shape: Vec<usize>,
    config: QuantConfig,
    values: Vec<f32>,
}

fn block_size() -> impl Strategy<Value = BlockSize> {
    prop::sample::select(BlockSize::ALL.to_vec())
}

fn config() -> impl Strategy<Value = QuantConfig> {
    let quant_type = prop::sample::select(vec![QuantType::Nf4, QuantType::Fp4]);
    (quant_type, block_size(), prop::option::of(block_size())).prop_map(
        |(quant_type, block_size, nested_block_size)| QuantConfig {
            quant_type,
            block_size,
            nested_block_size,
        },
    )
}

/// One to four dimensions and up to about six thousand elements, odd counts as often as even.
fn shape() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        prop::collection::vec(1..6500usize, 1),
        prop::collection::vec(1..80usize, 2),
        prop::collection::vec(1..18usize, 3),
        prop::collection::vec(1..9usize, 4),
    ]
}

/// Values of one magnitude, huge or tiny, with zeros, blocks of zeros and outliers among them.
///
/// `exponents` are powers of two of the magnitude. From 2^126 on bitsandbytes' reciprocal is
/// flushed to zero; see `blocks_beyond_2_to_126_decode_to_zeros`.
fn weight(exponents: std::ops::Range<i32>) -> impl Strategy<Value = Weight> {
    (shape(), config(), exponents).prop_flat_map(|(shape, config, exponent)| {
        let magnitude = f64::powi(2.0, exponent);
        let value = prop_oneof![
            12 => -1.0..1.0f64,
            1 => Just(0.0),
            1 => Just(-0.0),
            1 => -1e-3..1e-3f64,
            1 => prop::sample::select(NF4_THRESHOLDS.to_vec()).prop_map(f64::from),
            1 => Just(1.0),
        ];
        let elems = shape.iter().product::<usize>();
        let values = prop::collection::vec(value, elems);
        (Just(shape), Just(config), values, any::<u64>()).prop_map(
            move |(shape, config, values, zeros)| {
                let size = config.block_size.elems();
                let values = values.into_iter().enumerate().map(|(i, value)| {
                    // A sixteenth of the blocks, at random.
                    let lot = zeros
                        .wrapping_add((i / size) as u64)
                        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    let zeroed = lot >> 60 == 0;
                    if zeroed {
                        0.0
                    } else {
                        (value * magnitude) as f32
                    }
                });
                Weight {
                    values: values.collect(),
                    shape,
                    config,
                }
            },
        )
    })
}

/// The largest magnitude of each block, subnormal ones counting as zero.
fn absmax(values: &[f32], block_size: BlockSize) -> Vec<f32> {
    values
        .chunks(block_size.elems())
        .map(|block| block.iter().fold(0.0f32, |max, value| max.max(value.abs())))
        .map(|max| if max.is_subnormal() { 0.0 } else { max })
        .collect()
}

/// The bound on a scale's error that double quantization makes, by block.
///
/// `scale - offset` is normalised by the largest such magnitude `m` of its nested block, so the
/// map's error is at most `HALF_MAP_GAP * m`; each of the five roundings on the way is relative to
/// `m` or to the scale and adds less than 2^-23 of it.
fn nested_bound(scales: &[f32], nested: &NestedAbsmax, block: usize) -> f64 {
    let size = nested.block_size.elems();
    let start = block / size * size;
    let of_nested_block = &scales[start..scales.len().min(start + size)];
    let offset = f64::from(nested.offset);
    let largest = of_nested_block.iter().fold(0.0f64, |max, &scale| {
        max.max((f64::from(scale) - offset).abs())
    });
    let rounding = f64::powi(2.0, -21);
    let tiny = f64::from(f32::MIN_POSITIVE);
    largest * (HALF_MAP_GAP + rounding) + f64::from(scales[block]) * rounding + tiny
}

fn check<T: FloatElement>(weight: &Weight) -> Result<(), TestCaseError> {
    let config = weight.config;
    let source: Vec<T> = weight
        .values
        .iter()
        .map(|&value| T::from_f32(value))
        .collect();
    let values: Vec<f32> = source.iter().map(|value| value.to_f32()).collect();
    let tensor = BlockTensor::quantize(&source, &weight.shape, config).unwrap();

    prop_assert_eq!(tensor.config(), config);
    prop_assert_eq!(tensor.dtype(), T::FLOAT_TYPE);
    prop_assert_eq!(tensor.shape(), &weight.shape[..]);
    prop_assert_eq!(tensor.codes().len(), values.len().div_ceil(2));
    if values.len() % 2 == 1 {
        let padding = tensor.codes().last().unwrap() & 15;
        prop_assert_eq!(padding, config.quant_type.zero_code());
    }

    let scales = absmax(&values, config.block_size);
    prop_assert_eq!(tensor.blocks(), scales.len());
    match tensor.absmax() {
        Absmax::Coded(_) => unreachable!("not bitsandbytes'"),
        Absmax::Flat(flat) => prop_assert_eq!(flat, &scales),
        Absmax::Nested(nested) => {
            let mean = scales.iter().map(|&s| f64::from(s)).sum::<f64>() / scales.len() as f64;
            let tolerance = mean * f64::powi(2.0, -22) + f64::powi(2.0, -149);
            prop_assert!((f64::from(nested.offset) - mean).abs() <= tolerance);
        }
    }

    let decoded: Vec<f32> = tensor.dequantize();
    for (index, (&value, &decoded)) in values.iter().zip(&decoded).enumerate() {
        let block = index / config.block_size.elems();
        let scale = scales[block];
        if scale == 0.0 {
            prop_assert_eq!(decoded, 0.0, "weight {} of an all-zero block", index);
            continue;
        }
        let nested = match tensor.absmax() {
            Absmax::Flat(_) | Absmax::Coded(_) => 0.0,
            Absmax::Nested(nested) => nested_bound(&scales, nested, block),
        };
        let largest = f64::from(scale) + nested;
        let rounding = largest * f64::powi(2.0, -23) + f64::powi(2.0, -149);
        let bound = half_gap(config.quant_type) * f64::from(scale) + nested + rounding;
        let error = (f64::from(value) - f64::from(decoded)).abs();
        prop_assert!(
            error <= bound,
            "weight {index}: {value} became {decoded}, scale {scale}"
        );
    }

    // The dtype's own rounding comes last, and once.
    let own: Vec<T> = tensor.dequantize();
    for (own, decoded) in own.iter().zip(&decoded) {
        prop_assert_eq!(
            own.to_f32().to_bits(),
            T::from_f32(*decoded).to_f32().to_bits()
        );
    }
    let (start, end) = (values.len() / 3, values.len() - values.len() / 4);
    let part: Vec<f32> = tensor.dequantize_range(start, end - start);
    prop_assert_eq!(&part, &decoded[start..end]);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn f32_weights_come_back_within_half_a_gap(weight in weight(-140..120)) {
        check::<f32>(&weight)?;
    }

    #[test]
    fn bf16_weights_come_back_within_half_a_gap(weight in weight(-140..120)) {
        check::<bf16>(&weight)?;
    }

    // From subnormal values up to the largest finite ones.
    #[test]
    fn f16_weights_come_back_within_half_a_gap(weight in weight(-24..17)) {
        let mut weight = weight;
        weight.values.iter_mut().for_each(|value| *value = value.clamp(-65504.0, 65504.0));
        check::<f16>(&weight)?;
    }

    /// With flat scales and f32 values, quantizing what was decoded changes nothing: each block
    /// holds its absmax exactly, and every level lies far from the thresholds. (Double
    /// quantization changes the scales, and a 16-bit dtype can round small levels to zero.)
    /// FP4's second zero becomes the first, so values are compared.
    #[test]
    fn flat_quantization_is_idempotent(weight in weight(-120..120)) {
        let config = QuantConfig { nested_block_size: None, ..weight.config };
        let once = BlockTensor::quantize(&weight.values, &weight.shape, config).unwrap();
        let decoded: Vec<f32> = once.dequantize();
        let twice = BlockTensor::quantize(&decoded, &weight.shape, config).unwrap();
        prop_assert_eq!(twice.absmax(), once.absmax());
        prop_assert_eq!(twice.dequantize::<f32>(), decoded);
        if config.quant_type == QuantType::Nf4 {
            prop_assert_eq!(twice.codes(), once.codes());
        }
    }

    /// Multiplying by a power of two is exact, so it moves the scales and nothing else.
    #[test]
    fn codes_do_not_depend_on_the_magnitude(weight in weight(-20..20), shift in -60..60i32) {
        let config = QuantConfig { nested_block_size: None, ..weight.config };
        let factor = f32::powi(2.0, shift);
        let scaled: Vec<f32> = weight.values.iter().map(|value| value * factor).collect();
        let plain = BlockTensor::quantize(&weight.values, &weight.shape, config).unwrap();
        let scaled = BlockTensor::quantize(&scaled, &weight.shape, config).unwrap();
        prop_assert_eq!(plain.codes(), scaled.codes());
    }

    /// Any codes and scales decode as the description says, whatever wrote them.
    #[test]
    fn arbitrary_codes_decode_by_the_description(
        shape in shape(), config in config(), seed in any::<u64>(),
    ) {
        let elems = shape.iter().product::<usize>();
        let byte = |i: usize| (seed.wrapping_add(i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
        let codes: Vec<u8> = (0..elems.div_ceil(2)).map(byte).collect();
        let scales: Vec<f32> = (0..config.block_size.blocks(elems))
            .map(|block| (f32::from(byte(block * 7)) - 100.0) * 0.37)
            .collect();
        let tensor = BlockTensor::from_parts(
            codes, Absmax::Flat(scales.clone()), shape, config.block_size,
            FloatType::F32, config.quant_type,
        ).unwrap();
        let decoded: Vec<f32> = tensor.dequantize();
        for (index, value) in decoded.iter().enumerate() {
            let expected = decode(&tensor, &scales, index);
            prop_assert_eq!(value.to_bits(), expected.to_bits(), "weight {}", index);
        }
    }

    /// The pair keeps what a plain f32 sum loses: 2^-45 of the sum, and the mean 2^-22.
    #[test]
    fn sums_are_good_to_twice_the_digits(
        values in prop::collection::vec((0..1u32 << 24, 0..12i32), 1..9000),
    ) {
        let values: Vec<f32> = values
            .iter()
            .map(|&(mantissa, exponent)| mantissa as f32 * f32::powi(2.0, exponent - 24))
            .collect();
        // Exact: every value is a multiple of 2^-24, and the sum is below 2^26.
        let exact: f64 = values.iter().map(|&value| f64::from(value)).sum();
        let pair = SumF32x2::of(values.iter().map(|&high| SumF32x2 { high, low: 0.0 }));
        let error = (f64::from(pair.high) + f64::from(pair.low) - exact).abs();
        prop_assert!(error <= exact * f64::powi(2.0, -45), "{pair:?} for {exact}");
        prop_assert_eq!(pair.high + pair.low, pair.high, "the pair is not normalised");
        let mean = exact / values.len() as f64;
        let error = (f64::from(SumF32x2::mean(&values)) - mean).abs();
        prop_assert!(error <= mean * f64::powi(2.0, -22));
    }

    /// A device image holds everything, for any shape and settings.
    #[test]
    fn device_image_round_trips(weight in weight(-20..20)) {
        let tensor = BlockTensor::quantize(&weight.values, &weight.shape, weight.config).unwrap();
        let words = tensor.to_packed();
        let back = BlockTensor::from_packed(&words, &weight.shape, weight.config, FloatType::F32);
        prop_assert_eq!(back.unwrap(), tensor);
    }
}

/// Catches swapped nibbles, a wrong level, and a code taken with its sign.
#[rstest]
fn all_256_bytes_decode(
    #[values(QuantType::Nf4, QuantType::Fp4)] quant_type: QuantType,
    #[values(1.0, 0.3, -2.5, 1e-38, 3e38)] scale: f32,
) {
    let tensor = BlockTensor::from_parts(
        (0..=255).collect(),
        Absmax::Flat(vec![scale; 8]),
        vec![512],
        BlockSize::B64,
        FloatType::F32,
        quant_type,
    )
    .unwrap();
    let decoded: Vec<f32> = tensor.dequantize();
    for byte in 0..=255u8 {
        let pair = [byte >> 4, byte & 15].map(|code| level(quant_type, code) * scale);
        let at = 2 * usize::from(byte);
        assert_eq!(
            [decoded[at].to_bits(), decoded[at + 1].to_bits()],
            pair.map(f32::to_bits),
            "byte {byte:#04x}"
        );
    }
}

/// Ties go to the lower code; one ulp above goes up. Catches a threshold rounded through f64 and
/// a `>=`.
#[test]
fn nf4_thresholds_are_exact_to_an_ulp() {
    for (code, threshold) in NF4_THRESHOLDS.into_iter().enumerate() {
        let code = code as u8;
        assert_eq!(nf4_code(threshold.next_down()), code);
        assert_eq!(nf4_code(threshold), code);
        assert_eq!(nf4_code(threshold.next_up()), code + 1);
    }
    assert_eq!(nf4_code(-1.0), 0);
    assert_eq!(nf4_code(0.0), 7);
    assert_eq!(nf4_code(-0.0), 7);
    assert_eq!(nf4_code(1.0), 15);
}

/// The four that come out one ulp off when rounded through f64, by their bits in CUDA's f32.
#[test]
fn nf4_thresholds_are_rounded_once() {
    let decimal = [
        "-0.8480964004993439",
        "-0.6106329262256622",
        "-0.4599952697753906",
        "-0.33967943489551544",
        "-0.23460740596055984",
        "-0.13791173323988914",
        "-0.045525018125772476",
        "0.03979014977812767",
        "0.1202552504837513",
        "0.2035212516784668",
        "0.2920137718319893",
        "0.3893125355243683",
        "0.5016634166240692",
        "0.6427869200706482",
        "0.8614784181118011",
    ];
    let direct = decimal.map(|text| text.parse::<f32>().unwrap());
    assert_eq!(direct, NF4_THRESHOLDS);
    let twice = decimal.map(|text| text.parse::<f64>().unwrap() as f32);
    let off = twice.iter().zip(direct).filter(|(a, b)| **a != *b).count();
    assert_eq!(off, 4);
}

#[rstest]
#[case(0, 0.00260417, 0, 1)]
#[case(1, 0.0859375, 1, 6)]
#[case(2, 0.20833333, 6, 7)]
#[case(3, 0.29166667, 7, 4)]
#[case(4, 0.4166667, 4, 5)]
#[case(5, 0.583333, 5, 2)]
#[case(6, 0.8333333, 2, 3)]
fn fp4_thresholds_are_exact_to_an_ulp(
    #[case] index: usize,
    #[case] threshold: f32,
    #[case] below: u8,
    #[case] above: u8,
) {
    assert_eq!(FP4_THRESHOLDS[index], threshold);
    assert_eq!(fp4_code(threshold.next_down()), below);
    assert_eq!(fp4_code(threshold), below);
    assert_eq!(fp4_code(threshold.next_up()), above);
    assert_eq!(fp4_code(-threshold), below + 8);
    assert_eq!(fp4_code(-threshold.next_up()), above + 8);
}

#[test]
fn every_level_takes_its_own_code() {
    for code in 0..16 {
        assert_eq!(nf4_code(level(QuantType::Nf4, code)), code);
        // FP4's second zero is never produced by an exact zero.
        let fp4 = if code == 8 { 0 } else { code };
        assert_eq!(fp4_code(level(QuantType::Fp4, code)), fp4);
    }
}

/// Every entry takes its own code, every midpoint the lower one.
#[test]
fn nested_codes_are_the_nearest_entries() {
    assert!(DYNAMIC_MAP.is_sorted());
    for (code, &value) in DYNAMIC_MAP.iter().enumerate() {
        assert_eq!(usize::from(nested_code(value)), code);
    }
    for (code, pair) in DYNAMIC_MAP.windows(2).enumerate() {
        let middle = (pair[0] + pair[1]) * 0.5;
        assert_eq!(usize::from(nested_code(middle)), code);
        assert_eq!(usize::from(nested_code(middle.next_up())), code + 1);
    }
    assert_eq!(nested_code(-1.0), 0);
    assert_eq!(nested_code(1.0), 255);
    let widest = DYNAMIC_MAP
        .windows(2)
        .map(|pair| f64::from(pair[1]) - f64::from(pair[0]))
        .fold(1.0 + f64::from(DYNAMIC_MAP[0]), f64::max);
    assert!(widest / 2.0 < HALF_MAP_GAP);
    assert!(1.0 + f64::from(DYNAMIC_MAP[0]) < HALF_MAP_GAP);
}

/// A partial last block has its own scale, from its own elements only.
#[rstest]
#[case::one_element(65, 2)]
#[case::odd_count(127, 2)]
#[case::single_partial_block(3, 1)]
#[case::exact(128, 2)]
fn partial_last_blocks(#[case] elems: usize, #[case] blocks: usize) {
    let mut weight = vec![1000.0f32; elems];
    for value in weight.iter_mut().skip((blocks - 1) * 64) {
        *value = -0.5;
    }
    let tensor = BlockTensor::quantize(&weight, &[elems], QuantConfig::flat()).unwrap();
    assert_eq!(tensor.blocks(), blocks);
    assert_eq!(tensor.scale(blocks - 1), 0.5);
    assert_eq!(tensor.dequantize::<f32>(), weight);
}

/// Double quantization keeps zeros exact too, which bitsandbytes' CUDA kernel does not.
#[rstest]
fn all_zero_weights_stay_zero(
    #[values(QuantType::Nf4, QuantType::Fp4)] quant_type: QuantType,
    #[values(None, Some(BlockSize::B256))] nested_block_size: Option<BlockSize>,
    #[values(0.0, -0.0, 1e-39)] value: f32,
) {
    let config = QuantConfig {
        quant_type,
        block_size: BlockSize::B64,
        nested_block_size,
    };
    let tensor = BlockTensor::quantize(&[value; 333], &[9, 37], config).unwrap();
    assert!(tensor.dequantize::<f32>().iter().all(|&w| w == 0.0));
    // One block that is not zero gives the zero blocks a decoded scale that is not zero.
    let mut mixed = vec![value; 333];
    mixed[100] = 7.0;
    let tensor = BlockTensor::quantize(&mixed, &[9, 37], config).unwrap();
    let decoded: Vec<f32> = tensor.dequantize();
    assert!(
        decoded
            .iter()
            .enumerate()
            .all(|(i, &w)| i == 100 || w == 0.0)
    );
    assert!((decoded[100] - 7.0).abs() < 0.1);
}

/// bitsandbytes flushes the reciprocal of a scale above 2^126 to zero, as every subnormal, so
/// such a block keeps its scale but all its codes are zero's.
#[test]
fn blocks_beyond_2_to_126_decode_to_zeros() {
    let limit = f32::powi(2.0, 126);
    let decode = |value: f32| {
        BlockTensor::quantize(&[value; 64], &[64], QuantConfig::flat())
            .unwrap()
            .dequantize::<f32>()
    };
    assert_eq!(decode(limit), vec![limit; 64]);
    assert_eq!(decode(limit.next_up()), vec![0.0; 64]);
}

#[rstest]
#[case::nan(f32::NAN, 70)]
#[case::infinity(f32::INFINITY, 0)]
#[case::negative_infinity(f32::NEG_INFINITY, 127)]
fn quantize_names_the_first_weight_that_is_not_finite(#[case] value: f32, #[case] index: usize) {
    let mut weight = vec![0.5f32; 128];
    weight[index] = value;
    weight[127] = value;
    match BlockTensor::quantize(&weight, &[2, 64], QuantConfig::default()) {
        Err(Nf4Error::NonFinite {
            tensor,
            index: named,
            given,
        }) => {
            assert_eq!((tensor.as_str(), named), ("weight", index));
            assert_eq!(given.to_bits(), value.to_bits());
        }
        other => panic!("{other:?}"),
    }
    // The same in 16 bit.
    let weight: Vec<bf16> = weight.into_iter().map(bf16::from_f32).collect();
    let result = BlockTensor::quantize(&weight, &[2, 64], QuantConfig::default());
    assert!(matches!(result, Err(Nf4Error::NonFinite { index: named, .. }) if named == index));
}

/// The name of a packed tensor tells its form, and no other name does.
#[rstest]
fn the_name_of_a_packed_tensor_tells_its_form(
    #[values(QuantType::Nf4, QuantType::Fp4)] quant_type: QuantType,
    #[values(32, 64, 4096)] block_size: usize,
    #[values(None, Some(BlockSize::B256))] nested_block_size: Option<BlockSize>,
    #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] dtype: FloatType,
    #[values(&[7][..], &[512, 256], &[4, 96, 128])] shape: &[usize],
    #[values(false, true)] transposed: bool,
) {
    let form = WeightForm {
        shape: shape.to_vec(),
        dtype,
        config: QuantConfig {
            quant_type,
            block_size: BlockSize::try_from(block_size).expect("a known block size"),
            nested_block_size,
        },
        transposed,
    };
    let name = form.packed_name();
    assert!(!name.contains('.'), "{name} is one part of a path");
    assert_eq!(WeightForm::from_packed_name(&name), Some(form));
    for other in [
        format!("{name}_"),
        format!("x{name}"),
        name.replace('_', "-"),
        name.replace("_64_", "_65_"),
    ] {
        assert!(
            other == name || WeightForm::from_packed_name(&other).is_none(),
            "{other}"
        );
    }
}

#[rstest]
#[case::plain("packed")]
#[case::another_tensor("weight")]
#[case::block_size("packed_nf4_63_256_float32_512x256")]
#[case::leading_zero("packed_nf4_064_256_float32_512x256")]
#[case::plus("packed_nf4_64_256_float32_+512x256")]
#[case::no_shape("packed_nf4_64_256_float32")]
#[case::torch("packed_nf4_64_256_torch.float32_512x256")]
#[case::word_behind("packed_nf4_64_256_float32_512x256_turned")]
fn other_names_tell_no_form(#[case] name: &str) {
    assert_eq!(WeightForm::from_packed_name(name), None);
}

/// The sum of the scales need not fit f32: their mean does.
#[rstest]
#[case::equal(&[8e37; 5])]
#[case::the_largest(&[f32::MAX; 3])]
#[case::mixed(&[3e38, 1.0, 2e38, 0.0, 1e-20, 3.2e38])]
fn scales_whose_sum_overflows_have_a_finite_mean(#[case] scales: &[f32]) {
    let exact = scales.iter().map(|&s| f64::from(s)).sum::<f64>() / scales.len() as f64;
    let mean = f64::from(SumF32x2::mean(scales));
    assert!(
        (mean - exact).abs() <= exact * f64::powi(2.0, -22),
        "{mean}, expected {exact}"
    );

    let weight: Vec<f32> = scales.iter().flat_map(|&s| [s; 64]).collect();
    let tensor = BlockTensor::quantize(&weight, &[scales.len(), 64], QuantConfig::default());
    let decoded = tensor.expect("finite weights").dequantize::<f32>();
    assert!(decoded.iter().all(|w| w.is_finite()));
}

/// As in bitsandbytes, the reciprocal of a scale above 2^126 is flushed to zero, and with it the block.
#[test]
fn weights_up_to_two_to_the_126_come_back() {
    let weight = vec![8e37f32; 64 * 5];
    for config in [QuantConfig::default(), QuantConfig::flat()] {
        let tensor = BlockTensor::quantize(&weight, &[5, 64], config).unwrap();
        assert_eq!(tensor.dequantize::<f32>(), weight);
    }
}

#[test]
fn all_eight_block_sizes_are_known() {
    let sizes = [32, 64, 128, 256, 512, 1024, 2048, 4096];
    assert_eq!(BlockSize::ALL.map(BlockSize::elems), sizes);
    for (expected, elems) in BlockSize::ALL.into_iter().zip(sizes) {
        assert_eq!(BlockSize::try_from(elems), Ok(expected));
        assert_eq!(1 << expected.log2(), elems);
        assert_eq!(expected.blocks(elems), 1);
        assert_eq!(expected.blocks(elems + 1), 2);
    }
}
