//! The CPU product with a packed weight, against an f64 product of the weight as the reference
//! decodes it, with every set of vector instructions that this processor has.

mod random;

use std::fmt::Debug;

use bytemuck::cast_slice;
use half::{bf16, f16};
use proptest::prelude::*;
use rstest::rstest;

use burn_nf4::format::{
    Absmax, BlockSize, BlockTensor, DYNAMIC_MAP, FloatElement, FloatType, NestedAbsmax,
    PackedLayout, QuantConfig, QuantType,
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
fn weight(shape: [usize; 2], config: QuantConfig, scales: &[f32]) -> BlockTensor {
    let elems = shape[0] * shape[1];
    let mut random = Random(elems as u64);
    let codes = (0..elems.div_ceil(2))
        .map(|_| random.next() as u8)
        .collect();
    let blocks = config.block_size.blocks(elems);
    let cycled = |len| scales.iter().copied().cycle().take(len).collect::<Vec<_>>();
    let absmax = match config.nested_block_size {
        None => Absmax::Flat(cycled(blocks)),
        Some(block_size) => Absmax::Nested(NestedAbsmax {
            codes: (0..blocks).map(|_| random.next() as u8).collect(),
            absmax: cycled(block_size.blocks(blocks)),
            map: Box::new(DYNAMIC_MAP),
            offset: 0.043_512_3,
            block_size,
        }),
    };
    let (block_size, quant_type) = (config.block_size, config.quant_type);
    let dtype = FloatType::BF16;
    BlockTensor::from_parts(codes, absmax, shape.to_vec(), block_size, dtype, quant_type)
        .expect("a consistent weight")
}

/// The product and, for each element, the sum of the magnitudes of what is added.
fn expected<T: FloatElement>(
    x: &[T],
    m: usize,
    tensor: &BlockTensor,
    bias: Option<&[T]>,
) -> Vec<(f64, f64)> {
    let (n, k) = (tensor.shape()[0], tensor.shape()[1]);
    let weight: Vec<T> = tensor.dequantize();
    let f64 = |value: T| f64::from(value.to_f32());
    let element = |i: usize| {
        let (row, column) = (i / n, i % n);
        let x = &x[row * k..][..k];
        let bias = bias.map_or(0.0, |bias| f64(bias[column]));
        let products = x.iter().zip(&weight[column * k..]);
        products.fold((bias, bias.abs()), |(sum, magnitude), (&x, &w)| {
            let product = f64(x) * f64(w);
            (sum + product, magnitude + product.abs())
        })
    };
    (0..m * n).map(element).collect()
}

/// What `out` may differ by: its own rounding, half an ulp, and for each of `k` products and its
/// addition half an ulp of f32 of what has been added.
fn tolerance<T: FloatElement>(k: usize, (value, magnitude): (f64, f64)) -> f64 {
    let (half_ulp, smallest) = match T::FLOAT_TYPE {
        FloatType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        FloatType::BF16 => (2f64.powi(-8), 2f64.powi(-134)),
        FloatType::F32 => (2f64.powi(-24), 2f64.powi(-150)),
    };
    let sums = (k + 2) as f64 * 2f64.powi(-24) * magnitude;
    sums + half_ulp * (value.abs() + sums) + smallest
}

fn check<T: FloatElement + Debug>(m: usize, tensor: &BlockTensor, seed: u64, with_bias: bool) {
    let (n, k) = (tensor.shape()[0], tensor.shape()[1]);
    let mut random = Random(seed);
    let x: Vec<T> = random.units(m * k);
    let bias: Option<Vec<T>> = with_bias.then(|| random.units(n));
    check_x(&x, m, tensor, bias.as_deref());
}

fn check_x<T: FloatElement + Debug>(x: &[T], m: usize, tensor: &BlockTensor, bias: Option<&[T]>) {
    let (n, k) = (tensor.shape()[0], tensor.shape()[1]);
    let (words, layout) = (tensor.to_packed(), tensor.packed_layout());
    let expected = expected(x, m, tensor, bias);
    for simd in available() {
        let mut out = vec![T::from_f32(f32::NAN); m * n];
        host::matmul_with(simd, x, m, &words, &layout, n, k, bias, &mut out);
        for (i, (&given, &expected)) in out.iter().zip(&expected).enumerate() {
            let error = (f64::from(given.to_f32()) - expected.0).abs();
            assert!(
                error <= tolerance::<T>(k, expected),
                "{simd:?}, [{m}, {n}, {k}], {:?}, element {i}: {given:?}, expected {expected:?}",
                tensor.config()
            );
        }
    }
}

fn check_all_types(m: usize, tensor: &BlockTensor) {
    for (with_bias, seed) in [(false, 1), (true, 2)] {
        check::<f16>(m, tensor, seed, with_bias);
        check::<bf16>(m, tensor, seed, with_bias);
        check::<f32>(m, tensor, seed, with_bias);
    }
}

const SCALES: [f32; 3] = [0.1, 1.7, 0.012_345_6];

#[rstest]
fn every_number_of_rows_of_x(
    #[values(1, 2, 3, 4, 5, 6, 7, 8, 9, 33)] m: usize,
    #[values([8, 256], [7, 320], [5, 131], [1, 128])] shape: [usize; 2],
    #[values(None, Some(256))] nested: Option<u64>,
) {
    check_all_types(
        m,
        &weight(shape, config(QuantType::Nf4, 64, nested), &SCALES),
    );
}

#[rstest]
#[case::aligned([6, 128])]
#[case::half_a_chunk([9, 64])]
#[case::scales_in_the_middle_of_a_vector([10, 576])]
#[case::two_chunks([5, 256])]
#[case::chunks_and_a_half([5, 192])]
#[case::word_aligned([9, 72])]
#[case::ragged([11, 77])]
#[case::odd_rows([13, 33])]
#[case::one_row([1, 1000])]
#[case::one_column([37, 1])]
#[case::one_weight([1, 1])]
#[case::longer_than_a_piece([3, 1301])]
#[case::several_pieces([2, 4608])]
fn every_shape_and_block_size(
    #[case] shape: [usize; 2],
    #[values(QuantType::Nf4, QuantType::Fp4)] quant_type: QuantType,
    #[values(32, 64, 128, 256, 512, 1024, 2048, 4096)] block: u64,
    #[values(None, Some(32))] nested: Option<u64>,
) {
    let tensor = weight(shape, config(quant_type, block, nested), &SCALES);
    for m in [1, 5] {
        check_all_types(m, &tensor);
    }
}

/// More blocks in a row than scales that are decoded at a time, and rows that start anywhere in a
/// run of them.
#[rstest]
fn long_rows(
    #[values(4096, 4096 + 128, 8256)] k: usize,
    #[values(None, Some(64))] nested: Option<u64>,
) {
    let tensor = weight([3, k], config(QuantType::Nf4, 64, nested), &SCALES);
    for m in [1, 3, 6] {
        check_all_types(m, &tensor);
    }
}

/// Products that vector instructions must not take for zero.
#[rstest]
fn tiny_numbers_count(#[values(128, 96)] k: usize, #[values(1, 6)] m: usize) {
    let config = config(QuantType::Nf4, 64, None);
    let huge: Vec<bf16> = (0..m * k).map(|_| bf16::from_f32(1e37)).collect();
    check_x(
        &huge,
        m,
        &weight([6, k], config, &[1e-38, 1.0, 1e-40, 1e-36]),
        None,
    );
    let tiny: Vec<bf16> = (0..m * k).map(|_| bf16::from_f32(1e-39)).collect();
    check_x(&tiny, m, &weight([6, k], config, &[1e37]), None);
}

/// An infinite or NaN scale spoils its own rows and no others.
#[rstest]
fn scales_that_are_not_finite_stay_in_their_rows(
    #[values(f32::INFINITY, f32::NAN, f32::from_bits(0x7fff_ffff))] scale: f32,
    #[values(128, 64, 160)] k: usize,
    #[values(1, 5)] m: usize,
) {
    fn check<T: FloatElement>(scale: f32, k: usize, m: usize) {
        let n = 9;
        let config = config(QuantType::Nf4, 32, None);
        for block_elems in [32, 64] {
            let config = QuantConfig {
                block_size: BlockSize::new(block_elems, "test").expect("a block size"),
                ..config
            };
            let mut scales = vec![1.0; config.block_size.blocks(n * k)];
            let bad = (4 * k / block_elems as usize) + 1;
            scales[bad] = scale;
            let tensor = weight([n, k], config, &scales);
            let rows = bad * block_elems as usize / k..=((bad + 1) * block_elems as usize - 1) / k;
            let x: Vec<T> = Random(5).units(m * k);
            let (words, layout) = (tensor.to_packed(), tensor.packed_layout());
            for simd in available() {
                let mut out = vec![T::from_f32(0.0); m * n];
                host::matmul_with(simd, &x, m, &words, &layout, n, k, None, &mut out);
                for (i, value) in out.iter().enumerate() {
                    let finite = value.to_f32().is_finite();
                    let (row, what) = (i % n, (simd, scale, [m, n, k], block_elems));
                    assert_eq!(finite, !rows.contains(&row), "{what:?}, element {i}");
                }
            }
        }
    }
    check::<f16>(scale, k, m);
    check::<bf16>(scale, k, m);
    check::<f32>(scale, k, m);
}

#[rstest]
fn threads_do_not_change_a_bit(
    #[values(1, 3, 6)] m: usize,
    #[values([1537, 1024], [1203, 1001])] shape: [usize; 2],
) {
    let [n, k] = shape;
    let tensor = weight(shape, QuantConfig::default(), &SCALES);
    let (words, layout) = (tensor.to_packed(), tensor.packed_layout());
    let x: Vec<bf16> = Random(3).units(m * k);
    let bias: Vec<bf16> = Random(4).units(n);
    for simd in available() {
        let with_threads = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let mut out = vec![bf16::NAN; m * n];
            let call = || {
                host::matmul_with(simd, &x, m, &words, &layout, n, k, Some(&bias), &mut out);
            };
            pool.expect("a pool").install(call);
            cast_slice::<bf16, u16>(&out).to_vec()
        };
        assert!(with_threads(1) == with_threads(3), "{simd:?}");
    }
}

/// The entry point for users: instructions of its own choice.
#[test]
fn matmul_chooses_by_itself() {
    let tensor = weight([65, 512], QuantConfig::default(), &SCALES);
    let (words, layout) = (tensor.to_packed(), tensor.packed_layout());
    let x: Vec<bf16> = Random(6).units(2 * 512);
    let best = available().last().expect("portable code at least");
    let [mut given, mut expected] = [(); 2].map(|()| vec![bf16::NAN; 2 * 65]);
    host::matmul(&x, 2, &words, &layout, 65, 512, None, &mut given);
    host::matmul_with(best, &x, 2, &words, &layout, 65, 512, None, &mut expected);
    assert!(given.iter().all(|value| value.is_finite()));
    assert_eq!(given, expected);
}

#[test]
fn no_rows_of_x_make_no_rows_of_y() {
    let tensor = weight([4, 64], QuantConfig::default(), &SCALES);
    let (words, layout) = (tensor.to_packed(), tensor.packed_layout());
    host::matmul::<f32>(&[], 0, &words, &layout, 4, 64, None, &mut []);
}

/// Sums of nothing, whatever the block size.
#[rstest]
fn no_columns_of_x_leave_the_bias(
    #[values(32, 64, 128, 4096)] block_elems: u64,
    #[values(None, Some(256))] nested: Option<u64>,
    #[values(1, 5)] m: usize,
) {
    let layout = PackedLayout::new(0, config(QuantType::Nf4, block_elems, nested));
    let words = vec![0; layout.words()];
    let bias: Vec<bf16> = Random(5).units(3);
    for simd in available() {
        let mut out = vec![bf16::NAN; m * 3];
        host::matmul_with(simd, &[], m, &words, &layout, 3, 0, Some(&bias), &mut out);
        assert_eq!(out, bias.repeat(m), "{simd:?}");
        host::matmul_with(simd, &[], m, &words, &layout, 3, 0, None, &mut out);
        assert_eq!(out, vec![bf16::ZERO; 3 * m], "{simd:?}");
    }
}

#[rstest]
#[case::x("x of", 63, 3 * 64, 3, 3, 0)]
#[case::weight("weight of", 64, 2 * 64, 3, 3, 0)]
#[case::bias("bias of", 64, 3 * 64, 2, 3, 0)]
#[case::out("out of", 64, 3 * 64, 3, 4, 0)]
#[case::words("packed weight of", 64, 3 * 64, 3, 3, 1)]
fn wrong_lengths_are_refused(
    #[case] message: &str,
    #[case] x: usize,
    #[case] elems: usize,
    #[case] bias: usize,
    #[case] out: usize,
    #[case] words_missing: usize,
) {
    let tensor = weight([1, elems], QuantConfig::flat(), &SCALES);
    let (words, layout) = (tensor.to_packed(), tensor.packed_layout());
    let words = &words[..words.len() - words_missing];
    let (x, bias, mut out) = (vec![0f32; x], vec![0f32; bias], vec![0f32; out]);
    let call = || host::matmul(&x, 1, words, &layout, 3, 64, Some(&bias), &mut out);
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
    let panic = panic.expect_err("a length is wrong");
    let text = panic.downcast::<String>().expect("a formatted message");
    assert!(text.contains(message), "{text}");
}

/// Their product would overflow to the length that is there.
#[test]
#[should_panic(expected = "x of 0 elements")]
fn overflowing_shapes_are_refused() {
    let tensor = weight([1, 64], QuantConfig::flat(), &SCALES);
    let (words, layout) = (tensor.to_packed(), tensor.packed_layout());
    let (m, k) = (1 << (usize::BITS / 2), 1 << (usize::BITS / 2));
    host::matmul::<f32>(&[], m, &words, &layout, 1, k, None, &mut []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_product(
        fp4 in any::<bool>(),
        block_size in prop::sample::select(&BlockSize::ALL[..]),
        nested_block_size in prop::option::of(prop::sample::select(&BlockSize::ALL[..])),
        (n, k) in (1usize..30, 1usize..400),
        chunks in 0usize..4,
        m in 1usize..10,
        scales in prop::collection::vec(-3f32..3.0, 1..40),
    ) {
        let quant_type = if fp4 { QuantType::Fp4 } else { QuantType::Nf4 };
        let config = QuantConfig { quant_type, block_size, nested_block_size };
        // Half of them such as AVX-512 decodes into registers.
        let k = if chunks > 1 { chunks * 128 } else { k };
        check_all_types(m, &weight([n, k], config, &scales));
    }
}
