//! NVFP4, MXFP4 and FP8 on the host: the golden files bit for bit, decoded and quantized, with every set
//! of vector instructions that this processor has; and what the formats refuse.
#![cfg(feature = "checkpoint")]

mod block_files;
mod random;

use half::{bf16, f16};
use rstest::rstest;

use burn_nf4::Nf4Error;
use burn_nf4::format::{
    Absmax, BlockSize, BlockTensor, CodedScales, E2M1_CODEBOOK, E4M3_CODEBOOK, FloatElement,
    FloatType, PackedLayout, QuantConfig, QuantType, TensorScale, e2m1_code, e4m3_code, e8m0_value,
};
use burn_nf4::host;
use random::{Random, available};

const NEW: [QuantType; 4] = [
    QuantType::Nvfp4,
    QuantType::Mxfp4,
    QuantType::Fp8Block,
    QuantType::Fp8Channel,
];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn golden_files_decode_to_the_bit() {
    for name in block_files::NAMES {
        let file = block_files::load(name);
        assert_eq!(
            bits(&file.tensor.dequantize::<f32>()),
            bits(&file.dequantized),
            "{name}"
        );
    }
}

#[test]
fn golden_files_go_through_the_device_image_and_back() {
    for name in block_files::NAMES {
        let tensor = block_files::load(name).tensor;
        let back = BlockTensor::from_packed(
            &tensor.to_packed(),
            tensor.shape(),
            tensor.config(),
            tensor.dtype(),
        );
        assert_eq!(back.as_ref(), Ok(&tensor), "{name}");
    }
}

#[test]
fn quantizing_gives_the_codes_and_scales_of_the_golden_files() {
    let mut compared = 0;
    for name in block_files::NAMES {
        let file = block_files::load(name);
        // ModelOpt's scale of the tensor multiplies; ours divides.
        let (Some(source), false) = (&file.source, name.contains("modelopt")) else {
            continue;
        };
        let config = file.tensor.config();
        let quantized = BlockTensor::quantize(source, file.tensor.shape(), config).expect("finite");
        assert_eq!(quantized, file.tensor, "{name}");
        let words = host::quantize(source, file.tensor.shape(), config).expect("finite");
        assert_eq!(words, file.tensor.to_packed(), "{name}");
        compared += 1;
    }
    assert_eq!(compared, 12);
}

/// Any codes and scales, among them the largest, the smallest and those for NaN.
fn any_tensor(quant_type: QuantType, shape: &[usize], dtype: FloatType) -> BlockTensor {
    let config = QuantConfig::of(quant_type);
    let layout = PackedLayout::for_shape(shape, config).expect("whole blocks");
    let mut random = Random(layout.elems() as u64);
    let mut bytes = |len: usize| -> Vec<u8> { (0..len).map(|_| random.next() as u8).collect() };
    let codes = bytes(quant_type.code_bytes(layout.elems()));
    let scales = bytes(layout.blocks());
    let absmax = match quant_type {
        QuantType::Nvfp4 => Absmax::Coded(CodedScales {
            codes: scales,
            tensor_scale: TensorScale::Divides(1234.5),
        }),
        QuantType::Mxfp4 => Absmax::Coded(CodedScales {
            codes: scales,
            tensor_scale: TensorScale::None,
        }),
        _ => Absmax::Flat(
            scales
                .iter()
                .map(|&byte| f32::from(byte) * 0.01 - 0.3)
                .collect(),
        ),
    };
    BlockTensor::from_parts(
        codes,
        absmax,
        shape.to_vec(),
        config.block_size,
        dtype,
        quant_type,
    )
    .expect("a consistent weight")
}

/// Values as bits, all NaN alike.
fn comparable<T: FloatElement>(values: &[T]) -> Vec<u32> {
    let bits = |value: &T| match value.to_f32() {
        value if value.is_nan() => u32::MAX,
        value => value.to_bits(),
    };
    values.iter().map(bits).collect()
}

fn decodes_like_the_reference<T: FloatElement>(tensor: &BlockTensor) {
    let (words, layout) = (tensor.to_packed(), tensor.packed_layout());
    let elems = tensor.elems();
    for simd in available() {
        for stream in [false, true] {
            for (start, len) in [
                (0, elems),
                (1, elems - 1),
                (7, 100),
                (16, 48),
                (130, 333),
                (elems - 3, 3),
            ] {
                let mut out = vec![T::from_f32(0.0); len];
                host::dequantize_with(simd, stream, &words, &layout, start, &mut out);
                assert_eq!(
                    comparable(&out),
                    comparable(&tensor.dequantize_range::<T>(start, len)),
                    "{:?} {simd:?} stream {stream} from {start}, {len}",
                    tensor.quant_type()
                );
            }
        }
    }
}

#[rstest]
fn vector_code_decodes_like_the_reference(
    #[values(
        QuantType::Nvfp4,
        QuantType::Mxfp4,
        QuantType::Fp8Block,
        QuantType::Fp8Channel
    )]
    quant_type: QuantType,
    #[values(&[48, 416], &[130, 160], &[3, 128, 96])] shape: &[usize],
) {
    let shape = match quant_type {
        QuantType::Fp8Block if shape.len() == 3 => &[2, 128, 96],
        _ => shape,
    };
    let tensor = any_tensor(quant_type, shape, FloatType::BF16);
    decodes_like_the_reference::<f32>(&tensor);
    decodes_like_the_reference::<f16>(&tensor);
    decodes_like_the_reference::<bf16>(&tensor);
}

/// Tiles and rows of any size, whatever it has in common with powers of two.
#[rstest]
fn fp8_rows_may_have_any_length(
    #[values(QuantType::Fp8Block, QuantType::Fp8Channel)] quant_type: QuantType,
    #[values([1, 1001], [131, 77], [200, 300], [257, 130])] shape: [usize; 2],
) {
    let tensor = any_tensor(quant_type, &shape, FloatType::F32);
    decodes_like_the_reference::<f32>(&tensor);
}

#[rstest]
fn products_are_those_of_the_decoded_weight(
    #[values(
        QuantType::Nvfp4,
        QuantType::Mxfp4,
        QuantType::Fp8Block,
        QuantType::Fp8Channel
    )]
    quant_type: QuantType,
    #[values(1, 3, 9)] m: usize,
) {
    let [n, k] = [70, 160];
    let mut random = Random(5);
    let mut value = || (random.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
    let weight: Vec<f32> = (0..n * k).map(|_| value()).collect();
    let tensor = BlockTensor::quantize(&weight, &[n, k], QuantConfig::of(quant_type)).unwrap();
    let decoded = tensor.dequantize::<f32>();
    let x: Vec<f32> = (0..m * k).map(|_| value()).collect();
    for simd in available() {
        let mut out = vec![0.0; m * n];
        host::matmul_with(
            simd,
            &x,
            m,
            &tensor.to_packed(),
            &tensor.packed_layout(),
            n,
            k,
            None,
            &mut out,
        );
        for (row, x) in x.chunks(k).enumerate() {
            for (column, w) in decoded.chunks(k).enumerate() {
                let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                let expected: f64 = terms.sum();
                let given = f64::from(out[row * n + column]);
                assert!((given - expected).abs() < 1e-4, "{given} for {expected}");
            }
        }
    }
}

#[test]
fn the_nearest_code_is_taken_and_ties_go_to_the_even_one() {
    for (code, level) in E2M1_CODEBOOK.iter().enumerate() {
        assert_eq!(usize::from(e2m1_code(*level)), code);
    }
    let ties = [
        (0.25, 0.0),
        (0.75, 1.0),
        (1.25, 1.0),
        (1.75, 2.0),
        (2.5, 2.0),
        (3.5, 4.0),
        (5.0, 4.0),
        (9.0, 6.0),
    ];
    for (value, level) in ties {
        assert_eq!(
            E2M1_CODEBOOK[usize::from(e2m1_code(value))],
            level,
            "{value}"
        );
        assert_eq!(
            E2M1_CODEBOOK[usize::from(e2m1_code(-value))],
            -level,
            "-{value}"
        );
    }
    for (code, value) in E4M3_CODEBOOK.iter().enumerate() {
        assert_eq!(usize::from(e4m3_code(*value)), code, "{value}");
    }
    for code in 0..0x7e {
        let middle = (E4M3_CODEBOOK[code] + E4M3_CODEBOOK[code + 1]) / 2.0;
        let even = code + code % 2;
        assert_eq!(usize::from(e4m3_code(middle)), even, "{middle}");
        assert_eq!(usize::from(e4m3_code(middle.next_down())), code);
        assert_eq!(usize::from(e4m3_code(middle.next_up())), code + 1);
    }
    assert_eq!(E4M3_CODEBOOK[usize::from(e4m3_code(1e9))], 448.0);
    assert_eq!(e8m0_value(127), 1.0);
    assert_eq!(e8m0_value(0), 2.0f32.powi(-127));
    assert!(e8m0_value(255).is_nan());
}

#[test]
fn zeros_decode_to_zeros_and_tiny_weights_are_finite() {
    for quant_type in NEW {
        for scale in [0.0, 1e-38, 1e-44, 1e38] {
            let weight: Vec<f32> = (0..256).map(|i| scale * (i % 3) as f32).collect();
            let config = QuantConfig::of(quant_type);
            let tensor = BlockTensor::quantize(&weight, &[2, 128], config).expect("finite");
            let back = tensor.dequantize::<f32>();
            assert!(back.iter().all(|value| value.is_finite()), "{quant_type:?}");
            if scale == 0.0 {
                assert!(back.iter().all(|&value| value == 0.0), "{quant_type:?}");
            }
        }
    }
}

#[test]
fn shapes_that_are_not_whole_blocks_are_refused() {
    let refused = |quant_type, shape: &[usize]| {
        let elems = shape.iter().product();
        let weight = vec![1.0f32; elems];
        let error = BlockTensor::quantize(&weight, shape, QuantConfig::of(quant_type));
        let error = error.expect_err("no whole blocks");
        assert!(matches!(error, Nf4Error::Blocks { .. }), "{error}");
        error.to_string()
    };
    assert_eq!(
        refused(QuantType::Nvfp4, &[4, 24]),
        "`weight` has shape [4, 24], expected rows of a multiple of 16 elements, as nvfp4 is quantized"
    );
    refused(QuantType::Mxfp4, &[4, 48]);
    refused(QuantType::Fp8Block, &[2, 100, 128]);
    refused(QuantType::Fp8Channel, &[64]);
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let parts = |codes: usize, scales: usize, tensor_scale, quant_type, block_size| {
        BlockTensor::from_parts(
            vec![0; codes],
            Absmax::Coded(CodedScales {
                codes: vec![56; scales],
                tensor_scale,
            }),
            vec![2, 32],
            block_size,
            FloatType::BF16,
            quant_type,
        )
    };
    let (b16, b32) = (BlockSize::B16, BlockSize::B32);
    let good = parts(32, 4, TensorScale::Divides(2.0), QuantType::Nvfp4, b16);
    assert!(good.is_ok());
    for (codes, scales, tensor_scale, quant_type, block_size) in [
        (31, 4, TensorScale::Divides(2.0), QuantType::Nvfp4, b16),
        (32, 3, TensorScale::Divides(2.0), QuantType::Nvfp4, b16),
        (32, 4, TensorScale::None, QuantType::Nvfp4, b16),
        (32, 2, TensorScale::Multiplies(2.0), QuantType::Mxfp4, b32),
        (32, 4, TensorScale::Divides(0.0), QuantType::Nvfp4, b16),
        (32, 4, TensorScale::Divides(f32::NAN), QuantType::Nvfp4, b16),
        (32, 2, TensorScale::Divides(2.0), QuantType::Nvfp4, b32),
        (32, 4, TensorScale::None, QuantType::Nf4, b32),
        (
            64,
            1,
            TensorScale::None,
            QuantType::Fp8Block,
            BlockSize::B128,
        ),
    ] {
        let refused = parts(codes, scales, tensor_scale, quant_type, block_size);
        assert!(refused.is_err(), "{quant_type:?} {tensor_scale:?}");
    }
}
