//! The host format against bitsandbytes: every golden file, bit for bit.
#![cfg(feature = "checkpoint")]

mod golden;

use std::collections::BTreeSet;
use std::path::PathBuf;

use burn_nf4::Nf4Error;
use burn_nf4::format::{
    Absmax, BlockSize, BlockTensor, FloatElement, FloatType, HEADER_WORDS, NestedAbsmax,
    PackedLayout, QuantConfig, QuantType, reciprocal,
};
use golden::{Golden, load};
use half::{bf16, f16};
use rstest::rstest;

fn stem(path: &std::path::Path) -> String {
    path.file_stem().unwrap().to_str().unwrap().into()
}

/// Catches a golden file that no longer reaches the tests below.
#[test]
fn every_file_of_the_manifest_is_tested() {
    let listed: BTreeSet<String> = golden::names().into_iter().collect();
    let found: BTreeSet<String> = std::fs::read_dir(golden::path(""))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "safetensors"))
        .map(|path| stem(&path))
        .collect();
    assert_eq!(listed.len(), 29);
    assert_eq!(found, listed);
}

/// Catches a `quant_state` field that is misread or dropped.
#[test]
fn loaded_settings_are_those_of_the_manifest() {
    for case in golden::cases() {
        let golden = load(&case.name);
        let config = golden.tensor.config();
        let dtype = match golden.tensor.dtype() {
            FloatType::F16 => "f16",
            FloatType::BF16 => "bf16",
            FloatType::F32 => "f32",
        };
        assert_eq!(golden.tensor.shape(), case.shape, "{}", case.name);
        assert_eq!(dtype, case.dtype, "{}", case.name);
        assert_eq!(config.quant_type.name(), case.quant_type, "{}", case.name);
        assert_eq!(config.block_size.elems(), case.blocksize, "{}", case.name);
        let nested = case.nested.then_some(BlockSize::B256);
        assert_eq!(config.nested_block_size, nested, "{}", case.name);
        let stored = golden.file.tensor_info("weight").unwrap().dtype;
        assert_eq!(
            stored.to_string(),
            case.quant_storage.to_uppercase(),
            "{}",
            case.name
        );
        assert!(golden.file.is_quantized("weight"));
        assert!(!golden.file.is_quantized("source"));
        assert!(!golden.file.is_transposed("weight").unwrap());
        assert_eq!(golden.file.quantized_weights(), ["weight"]);
    }
}

#[rstest]
fn dequantizes_to_the_bits_of_bitsandbytes(
    #[files("tests/fixtures/golden/*.safetensors")] path: PathBuf,
) {
    let golden = load(&stem(&path));
    match golden.tensor.dtype() {
        FloatType::F16 => check_dequantize::<f16>(&golden),
        FloatType::BF16 => check_dequantize::<bf16>(&golden),
        FloatType::F32 => check_dequantize::<f32>(&golden),
    }
}

fn check_dequantize<T: FloatElement>(golden: &Golden) {
    let ours: Vec<T> = golden.tensor.dequantize();
    let ours: &[u8] = bytemuck::cast_slice(&ours);
    let theirs = golden.dequantized_bytes();
    assert_eq!(ours.len(), theirs.len());
    let size = T::FLOAT_TYPE.size_bytes();
    let differing = ours
        .chunks(size)
        .zip(theirs.chunks(size))
        .position(|(a, b)| a != b);
    assert_eq!(differing, None, "first weight that differs");
}

#[rstest]
fn quantizes_to_the_bits_of_bitsandbytes(
    #[files("tests/fixtures/golden/*.safetensors")] path: PathBuf,
) {
    let golden = load(&stem(&path));
    match golden.tensor.dtype() {
        FloatType::F16 => check_quantize::<f16>(&golden),
        FloatType::BF16 => check_quantize::<bf16>(&golden),
        FloatType::F32 => check_quantize::<f32>(&golden),
    }
}

fn check_quantize<T: FloatElement>(golden: &Golden) {
    let theirs = &golden.tensor;
    let source: Vec<T> = golden.source();
    let ours = BlockTensor::quantize(&source, theirs.shape(), theirs.config()).unwrap();
    assert_eq!(ours.config(), theirs.config());
    assert_eq!(ours.dtype(), theirs.dtype());

    // The scales before they are quantized themselves.
    let flat = QuantConfig {
        nested_block_size: None,
        ..theirs.config()
    };
    let flat = BlockTensor::quantize(&source, theirs.shape(), flat).unwrap();
    assert_eq!(flat.codes(), ours.codes());
    let Absmax::Flat(scales) = flat.absmax() else {
        panic!("asked for flat scales");
    };
    match (ours.absmax(), theirs.absmax()) {
        (Absmax::Flat(ours), Absmax::Flat(theirs)) => assert_eq!(bits(ours), bits(theirs)),
        (Absmax::Nested(ours), Absmax::Nested(theirs)) => check_nested(scales, ours, theirs),
        _ => panic!("one is flat, the other nested"),
    }
    check_codes(golden, &ours, scales);
}

/// The nested scales follow exactly from the offset; the offset is a mean good to 2^-22.
fn check_nested(scales: &[f32], ours: &NestedAbsmax, theirs: &NestedAbsmax) {
    let given = NestedAbsmax::quantize_with_offset(scales, theirs.block_size, theirs.offset);
    assert_eq!(given.codes, theirs.codes);
    assert_eq!(bits(&given.absmax), bits(&theirs.absmax));
    assert_eq!(bits(&given.map[..]), bits(&theirs.map[..]));

    let mean = scales.iter().map(|&s| f64::from(s)).sum::<f64>() / scales.len() as f64;
    let tolerance = mean * f64::powi(2.0, -22);
    for other in [mean, f64::from(theirs.offset)] {
        let distance = (f64::from(ours.offset) - other).abs();
        assert!(distance <= tolerance, "{} against {other}", ours.offset);
    }
    // And our own offset leads to what we stored.
    let own = NestedAbsmax::quantize_with_offset(scales, ours.block_size, ours.offset);
    assert_eq!(own, *ours);
}

/// The codes are equal, with the two exceptions that `BlockTensor::quantize` documents.
fn check_codes(golden: &Golden, ours: &BlockTensor, scales: &[f32]) {
    let theirs = &golden.tensor;
    let differing: Vec<usize> = (0..theirs.elems())
        .filter(|&index| ours.code(index) != theirs.code(index))
        .collect();
    let zero_blocks = scales.iter().filter(|&&scale| scale == 0.0).count();
    match golden.name.as_str() {
        // 37 blocks of zeros: bitsandbytes multiplies 0 by infinity and stores code 0, which
        // decodes to something near but not zero. We store the code of zero.
        "f16_b64_nested_300x520_zeros" => {
            assert_eq!(zero_blocks, 37);
            check_zero_blocks(ours, theirs, scales, &differing);
            let source = golden.source_f32();
            let decoded: Vec<f32> = ours.dequantize();
            assert!(differing.iter().all(|&i| source[i] == 0.0));
            assert!(differing.iter().all(|&i| decoded[i] == 0.0));
        }
        // Every block's absmax is subnormal, and so flushed to zero.
        "f32_b64_flat_64x64_subnormal" => {
            assert_eq!(zero_blocks, 64);
            assert!(golden.source_f32().iter().all(|&w| w.is_subnormal()));
            check_zero_blocks(ours, theirs, scales, &differing);
            assert_eq!(bits(&ours.dequantize::<f32>()), vec![0; 4096]);
        }
        // The padding of an odd count included.
        _ => {
            assert_eq!(zero_blocks, 0);
            assert_eq!(ours.codes(), theirs.codes());
        }
    }
}

/// The codes differ in blocks without a scale and nowhere else: 0 there, the code of zero here.
fn check_zero_blocks(
    ours: &BlockTensor,
    theirs: &BlockTensor,
    scales: &[f32],
    differing: &[usize],
) {
    let in_zero_blocks: Vec<usize> = (0..theirs.elems())
        .filter(|index| scales[index >> theirs.block_size().log2()] == 0.0)
        .collect();
    assert_eq!(differing, in_zero_blocks);
    assert!(differing.iter().all(|&index| theirs.code(index) == 0));
    assert!(differing.iter().all(|&index| ours.code(index) == 7));
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[rstest]
fn device_image_round_trips(#[files("tests/fixtures/golden/*.safetensors")] path: PathBuf) {
    let tensor = load(&stem(&path)).tensor;
    let (shape, config, dtype) = (tensor.shape(), tensor.config(), tensor.dtype());
    let layout = tensor.packed_layout();
    let words = tensor.to_packed();
    assert_eq!(words.len(), layout.words());

    let back = BlockTensor::from_packed(&words, shape, config, dtype).unwrap();
    assert_eq!(back, tensor);
    // `==` on f32 does not tell the zeros apart, the image does.
    assert_eq!(back.to_packed(), words);

    // The documented place of each code and scale, as a kernel reads them.
    for index in 0..tensor.elems() {
        let shift = (index % 8 / 2) * 8 + if index % 2 == 0 { 4 } else { 0 };
        let code = words[index / 8] >> shift & 15;
        assert_eq!(code, u32::from(tensor.code(index)), "weight {index}");
    }
    for block in 0..tensor.blocks() {
        let scale = match config.nested_block_size {
            None => f32::from_bits(words[layout.scales_start() + block]),
            Some(size) => {
                let code = words[layout.scales_start() + block / 4] >> (block % 4 * 8) & 255;
                let map = f32::from_bits(words[layout.nested_map_start() + code as usize]);
                let absmax =
                    f32::from_bits(words[layout.nested_scales_start() + block / size.elems()]);
                let product = map * absmax;
                product + f32::from_bits(words[layout.nested_offset_start()])
            }
        };
        assert_eq!(scale.to_bits(), tensor.scale(block).to_bits(), "{block}");
    }
    for (code, level) in config.quant_type.codebook().iter().enumerate() {
        assert_eq!(words[layout.codebook_start() + code], level.to_bits());
    }
    let tables = layout.tables();
    assert_eq!(words[layout.codebook_start()..][..tables.len()], tables);
}

fn header_error(result: Result<BlockTensor, Nf4Error>) -> &'static str {
    match result {
        Err(Nf4Error::Header { what, .. }) => what,
        other => panic!("expected a header error, got {other:?}"),
    }
}

#[rstest]
#[case::nested("bf16_b64_nested_128x256_normal")]
#[case::flat("bf16_b64_flat_128x256_normal")]
fn image_of_another_weight_is_refused(#[case] name: &str) {
    let tensor = load(name).tensor;
    let (shape, config, dtype) = (tensor.shape(), tensor.config(), tensor.dtype());
    let words = tensor.to_packed();
    let read = |words: &[u32], shape: &[usize], config, dtype| {
        BlockTensor::from_packed(words, shape, config, dtype)
    };

    for other in [vec![256, 128], vec![128 * 256], vec![2, 64, 256]] {
        let what = header_error(read(&words, &other, config, dtype));
        assert_eq!(what, "shape hash");
    }
    for other in [FloatType::F16, FloatType::F32] {
        assert_eq!(header_error(read(&words, shape, config, other)), "settings");
    }
    let fp4 = QuantConfig {
        quant_type: QuantType::Fp4,
        ..config
    };
    assert_eq!(header_error(read(&words, shape, fp4, dtype)), "settings");

    let header = tensor.packed_layout().header_start();
    let fields = ["magic number", "settings", "shape hash", "shape hash"];
    assert_eq!(fields.len(), HEADER_WORDS);
    for (i, field) in fields.into_iter().enumerate() {
        let mut altered = words.clone();
        altered[header + i] ^= 1;
        assert_eq!(header_error(read(&altered, shape, config, dtype)), field);
    }

    let short = read(&words[..words.len() - 1], shape, config, dtype);
    assert_eq!(
        short,
        Err(Nf4Error::Length {
            tensor: "packed weight".into(),
            expected: words.len(),
            given: words.len() - 1,
        })
    );
}

/// Catches a changed header, which would make images that were saved unreadable. The hash was
/// computed by an FNV-1a of its own, in Python.
#[test]
fn header_is_pinned() {
    let nested = PackedLayout::new(4096 * 11008, QuantConfig::default());
    let header = nested.header(&[4096, 11008], FloatType::BF16);
    assert_eq!(header, [0x0134_464e, 0x0806_0100, 0xa70335ec, 0x44f1bcaa]);

    let flat_fp4 = QuantConfig {
        quant_type: QuantType::Fp4,
        block_size: BlockSize::ALL[7],
        nested_block_size: None,
    };
    let flat = PackedLayout::new(4096 * 11008, flat_fp4);
    let header = flat.header(&[4096, 11008], FloatType::F32);
    assert_eq!(header, [0x0134_464e, 0x000c_0201, 0xa70335ec, 0x44f1bcaa]);
}

/// 1/2 for the code, 1/64 for the 8-bit scale, 4 / (64 * 256) for the scale's scale.
#[test]
fn a_large_layer_takes_half_a_byte_a_weight() {
    let (elems, blocks, nested) = (4096 * 4096, 4096 * 64, 4096 / 4);
    let layout = PackedLayout::new(elems, QuantConfig::default());
    assert_eq!(
        layout.words() * 4,
        elems / 2 + blocks + 16 * 4 + (256 + 4 + nested + 4) * 4
    );
    let per_weight = (layout.words() * 4) as f64 / elems as f64;
    assert!((0.5158..0.5160).contains(&per_weight), "{per_weight}");

    let absmax = NestedAbsmax {
        codes: vec![0; blocks],
        absmax: vec![0.0; nested],
        map: Box::new([0.0; 256]),
        offset: 0.0,
        block_size: BlockSize::B256,
    };
    let tensor = BlockTensor::from_parts(
        vec![0; elems / 2],
        Absmax::Nested(absmax),
        vec![4096, 4096],
        BlockSize::B64,
        FloatType::BF16,
        QuantType::Nf4,
    )
    .unwrap();
    assert_eq!(
        tensor.size_bytes(),
        elems / 2 + blocks + (nested + 256 + 1) * 4
    );
    let per_weight = tensor.size_bytes() as f64 / elems as f64;
    assert!((0.5158..0.5160).contains(&per_weight), "{per_weight}");
}

/// Catches a 32-bit intermediate: element, byte and bit counts all pass 2^32 here.
#[cfg(target_pointer_width = "64")]
#[rstest]
#[case::past_i32(1 << 31)]
#[case::past_u32((1 << 33) + 1)]
#[case::the_most_there_can_be(isize::MAX as usize / 4)]
fn layout_is_right_beyond_32_bits(#[case] elems: usize) {
    let wide = |words: u128| words.next_multiple_of(4);
    let n = elems as u128;
    let blocks = n.div_ceil(64);

    let flat = PackedLayout::new(elems, QuantConfig::flat());
    let scales = wide(n.div_ceil(8));
    assert_eq!(flat.blocks() as u128, blocks);
    assert_eq!(flat.scales_start() as u128, scales);
    assert_eq!(flat.codebook_start() as u128, scales + wide(blocks));
    assert_eq!(flat.header_start() as u128, scales + wide(blocks) + 16);
    assert_eq!(flat.words() as u128, scales + wide(blocks) + 16 + 4);

    let nested = PackedLayout::new(elems, QuantConfig::default());
    let codebook = scales + wide(blocks.div_ceil(4));
    assert_eq!(nested.codebook_start() as u128, codebook);
    assert_eq!(nested.nested_map_start() as u128, codebook + 16);
    assert_eq!(nested.nested_offset_start() as u128, codebook + 16 + 256);
    assert_eq!(nested.nested_scales_start() as u128, codebook + 16 + 260);
    let header = codebook + 16 + 260 + wide(blocks.div_ceil(256));
    assert_eq!(nested.header_start() as u128, header);
    assert_eq!(nested.words() as u128, header + 4);
}

/// Loads of 16 bytes are aligned wherever a section starts.
#[rstest]
fn sections_start_at_multiples_of_four_words(
    #[values(1, 2, 63, 64, 65, 561, 4097, 1_000_001)] elems: usize,
    #[values(None, Some(BlockSize::B256))] nested_block_size: Option<BlockSize>,
) {
    for block_size in BlockSize::ALL {
        let layout = PackedLayout::new(
            elems,
            QuantConfig {
                block_size,
                nested_block_size,
                ..QuantConfig::default()
            },
        );
        let starts = [
            layout.scales_start(),
            layout.codebook_start(),
            layout.nested_map_start(),
            layout.nested_offset_start(),
            layout.nested_scales_start(),
            layout.header_start(),
            layout.words(),
        ];
        assert!(starts.iter().all(|start| start % 4 == 0), "{layout:?}");
        assert!(starts.is_sorted(), "{layout:?}");
    }
}

/// A reciprocal that is exact everywhere would get three codes of a golden file wrong, so these
/// are the blocks' scales in that file, with what is added to the exact result.
#[rstest]
#[case(0.060058594, 1)]
#[case(0.07324219, -1)]
#[case(0.064453125, -1)]
#[case(1.0, 0)]
fn reciprocal_of_a_short_mantissa_is_the_gpus(#[case] x: f32, #[case] step: i32) {
    let exact = (1.0 / x).to_bits() as i32;
    assert_eq!(reciprocal(x).to_bits() as i32 - exact, step);
    // The exponent makes no difference.
    let scaled = x * f32::powi(2.0, 40);
    let exact = (1.0 / scaled).to_bits() as i32;
    assert_eq!(reciprocal(scaled).to_bits() as i32 - exact, step);
}

#[test]
fn reciprocal_is_within_one_unit_in_the_last_place() {
    let mut steps = [0; 3];
    for mantissa in 0..1 << 10 {
        let x = f32::from_bits(127 << 23 | mantissa << 13);
        let step = reciprocal(x).to_bits() as i32 - (1.0 / x).to_bits() as i32;
        steps[(step + 1) as usize] += 1;
        // A longer mantissa is divided exactly.
        let longer = f32::from_bits(x.to_bits() | 1);
        assert_eq!(reciprocal(longer), 1.0 / longer);
    }
    assert_eq!(steps, [40, 894, 90]);
}
