//! Folders in NVFP4 and MXFP4: what compressed-tensors makes of the same weights, and what a conversion
//! says of its losses.
#![cfg(feature = "checkpoint")]

mod stored;

use std::path::{Path, PathBuf};

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{
    Checkpoint, CheckpointWriter, Converted, DEFAULT_MAX_SHARD_BYTES, Dtype, QuantizeOptions,
    SafetensorsFile, quantize_checkpoint,
};
use burn_nf4::format::{
    Absmax, BlockTensor, CodedScales, E2M1_CODEBOOK, E4M3_CODEBOOK, FloatType, QuantConfig,
    QuantType, TensorScale, e2m1_code, e4m3_code,
};
use half::bf16;
use rstest::rstest;
use serde_json::json;
use stored::{config_of, quiet, sine, write_model};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new("tests/fixtures/compressed").join(name)
}

fn temp() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn options(quant_type: QuantType) -> QuantizeOptions {
    QuantizeOptions {
        config: QuantConfig::of(quant_type),
        ..QuantizeOptions::default()
    }
}

fn quantize(source: &Path, out: &Path, quant_type: QuantType) -> Converted {
    let source = Checkpoint::open(source).unwrap();
    quantize_checkpoint(&source, out, &options(quant_type), quiet).unwrap()
}

/// A weight in the names of compressed-tensors, read apart from the library.
fn packed(file: &SafetensorsFile, prefix: &str, dtype: FloatType) -> BlockTensor {
    let bytes = |part: &str| {
        file.tensor_bytes(&format!("{prefix}{part}"))
            .unwrap()
            .to_vec()
    };
    let shape = file.tensor_info(&format!("{prefix}_packed")).unwrap().shape;
    let global = format!("{prefix}_global_scale");
    let (quant_type, tensor_scale) = match file.keys().any(|key| key == global) {
        false => (QuantType::Mxfp4, TensorScale::None),
        true => {
            let value = file.load_float::<f32>(&global).unwrap().0[0];
            (QuantType::Nvfp4, TensorScale::Divides(value))
        }
    };
    BlockTensor::from_parts(
        bytes("_packed"),
        Absmax::Coded(CodedScales {
            codes: bytes("_scale"),
            tensor_scale,
        }),
        vec![shape[0], 2 * shape[1]],
        QuantConfig::of(quant_type).block_size,
        dtype,
        quant_type,
    )
    .unwrap()
}

/// Every tensor, and every word of `config.json`.
#[rstest]
#[case(QuantType::Nvfp4)]
#[case(QuantType::Mxfp4)]
fn a_folder_is_what_compressed_tensors_writes(#[case] quant_type: QuantType) {
    let folder = temp();
    let out = folder.path().join("out");
    let done = quantize(&fixture("dense"), &out, quant_type);
    assert_eq!((done.converted, done.kept), (14, 7));
    let theirs = fixture(quant_type.name());
    assert_eq!(config_of(&out), config_of(&theirs));
    let open = |folder: &Path| SafetensorsFile::open(folder.join("model.safetensors")).unwrap();
    let (ours, theirs) = (open(&out), open(&theirs));
    assert_eq!(
        ours.keys().collect::<Vec<_>>(),
        theirs.keys().collect::<Vec<_>>()
    );
    for key in theirs.keys() {
        let (a, b) = (
            ours.tensor_info(key).unwrap(),
            theirs.tensor_info(key).unwrap(),
        );
        assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{key}");
        let same = ours.tensor_bytes(key).unwrap() == theirs.tensor_bytes(key).unwrap();
        assert!(same, "{key}");
    }
}

#[rstest]
#[case("nvfp4_ct_17x64")]
#[case("nvfp4_ct_1x32")]
#[case("mxfp4_ct_17x64")]
#[case("mxfp4_ct_1x32")]
fn a_written_weight_is_the_golden_file(#[case] name: &str) {
    let golden = fixture("golden").join(format!("{name}.safetensors"));
    let golden = SafetensorsFile::open(golden).unwrap();
    let info = golden.tensor_info("source").unwrap();
    let shape = info.shape.to_vec();
    let config = QuantConfig::of(match name.starts_with("nvfp4") {
        true => QuantType::Nvfp4,
        false => QuantType::Mxfp4,
    });
    let weight = match info.dtype {
        Dtype::F32 => {
            let source = golden.load_float::<f32>("source").unwrap().0;
            BlockTensor::quantize(&source, &shape, config)
        }
        _ => {
            let source = golden.load_float::<bf16>("source").unwrap().0;
            BlockTensor::quantize(&source, &shape, config)
        }
    };
    let folder = temp();
    let out = folder.path().join("out");
    let mut writer = CheckpointWriter::create(&out, DEFAULT_MAX_SHARD_BYTES).unwrap();
    let weight = weight.unwrap();
    writer
        .write_nf4("weight", &weight, Dtype::U8, false)
        .unwrap();
    writer.finish().unwrap();
    let ours = SafetensorsFile::open(out.join("model.safetensors")).unwrap();
    let parts: Vec<&str> = ours.keys().collect();
    assert!(parts.len() == 2 + usize::from(config.quant_type == QuantType::Nvfp4));
    for key in parts {
        assert!(
            ours.tensor_bytes(key).unwrap() == golden.tensor_bytes(key).unwrap(),
            "{key}"
        );
    }
}

/// Rows of whole blocks alone, and what the caller names; a tied head is listed though it is not stored.
#[test]
fn what_is_kept_is_told_and_ignored() {
    let folder = temp();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    let shapes: [(&str, &[usize]); 6] = [
        ("model.embed_tokens.weight", &[8, 64]),
        ("model.layers.0.mlp.down_proj.weight", &[64, 48]),
        ("model.layers.0.mlp.gate.weight", &[4, 64]),
        ("model.layers.0.mlp.up_proj.weight", &[48, 64]),
        ("model.layers.0.q_proj.weight", &[64, 64]),
        ("model.norm.weight", &[64]),
    ];
    write_model(&source, &json!({"tie_word_embeddings": true}), &shapes);
    let options = QuantizeOptions {
        skip_modules: vec!["q_proj".into()],
        ..options(QuantType::Mxfp4)
    };
    let opened = Checkpoint::open(&source).unwrap();
    let done = quantize_checkpoint(&opened, &out, &options, quiet).unwrap();
    assert_eq!((done.converted, done.kept), (1, 5));
    assert_eq!(done.ragged, ["model.layers.0.mlp.down_proj.weight"]);
    let ignore = &config_of(&out)["quantization_config"]["ignore"];
    let expected = json!([
        "lm_head",
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate",
        "model.layers.0.q_proj",
    ]);
    assert_eq!(*ignore, expected);
    let written = SafetensorsFile::open(out.join("model.safetensors")).unwrap();
    let down = written
        .tensor_info("model.layers.0.mlp.down_proj.weight")
        .unwrap();
    assert_eq!(down.dtype, Dtype::F32);
    assert!(
        written
            .tensor_info("model.layers.0.mlp.up_proj.weight_packed")
            .is_ok()
    );

    // Blocks of 16 divide the rows of 48.
    let out = folder.path().join("nvfp4");
    assert!(quantize(&source, &out, QuantType::Nvfp4).ragged.is_empty());
}

/// The errors are those of the values that the stored tensors decode to, against the decoded source.
#[rstest]
#[case(QuantType::Nvfp4)]
#[case(QuantType::Mxfp4)]
#[case(QuantType::Fp4)]
fn another_type_loses_what_is_stated(#[case] quant_type: QuantType) {
    let folder = temp();
    let (dense, nf4) = (folder.path().join("dense"), folder.path().join("nf4"));
    let out = folder.path().join("out");
    let shapes: [(&str, &[usize]); 2] = [("a.weight", &[32, 64]), ("b.weight", &[16, 96])];
    write_model(&dense, &json!({"dtype": "float32"}), &shapes);
    assert!(
        quantize(&dense, &nf4, QuantType::Nf4)
            .requantized
            .is_empty()
    );
    let done = quantize(&nf4, &out, quant_type);
    assert_eq!(done.requantized, [(QuantType::Nf4, 2)]);
    assert_eq!(done.losses.len(), 2);

    let source = Checkpoint::open(&nf4).unwrap();
    let mut worst = 0.0f64;
    let (mut squared_error, mut squared) = (0.0, 0.0);
    for (name, _) in shapes {
        let before: Vec<f32> = source.load_quantized(name).unwrap().dequantize();
        let after: Vec<f32> = match quant_type {
            QuantType::Fp4 => Checkpoint::open(&out)
                .unwrap()
                .load_quantized(name)
                .unwrap(),
            _ => {
                let file = SafetensorsFile::open(out.join("model.safetensors")).unwrap();
                packed(&file, name, FloatType::F32)
            }
        }
        .dequantize();
        let errors: Vec<f64> = before
            .iter()
            .zip(&after)
            .map(|(a, b)| f64::from((a - b).abs()))
            .collect();
        let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
        let (error, all) = (
            squares(&mut errors.iter().copied()),
            squares(&mut before.iter().map(|&x| f64::from(x))),
        );
        let loss = done.losses[name];
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b;
        assert!(
            error > 0.0 && close(loss.relative_rms(), (error / all).sqrt()),
            "{loss:?}"
        );
        let max = errors.iter().copied().fold(0.0, f64::max);
        let largest = before
            .iter()
            .fold(0.0, |max: f64, &x| max.max(f64::from(x.abs())));
        assert!(close(loss.max_abs(), max) && close(loss.relative_max(), max / largest));
        worst = worst.max(loss.relative_max());
        squared_error += error;
        squared += all;
    }
    let total = done.loss();
    assert!((total.relative_rms() - (squared_error / squared).sqrt()).abs() < 1e-9);
    assert_eq!(total.relative_max(), worst);
    let claimed = &config_of(&out)["quantization_config"]["quant_method"];
    let expected = match quant_type.is_bitsandbytes() {
        true => "bitsandbytes",
        false => "compressed-tensors",
    };
    assert_eq!(claimed, expected);
}

#[test]
fn a_weight_that_is_not_to_be_quantized_becomes_floats() {
    let folder = temp();
    let (dense, nf4) = (folder.path().join("dense"), folder.path().join("nf4"));
    let out = folder.path().join("out");
    write_model(
        &dense,
        &json!({}),
        &[("a.weight", &[32, 64]), ("b.weight", &[16, 72])],
    );
    quantize(&dense, &nf4, QuantType::Nf4);
    let done = quantize(&nf4, &out, QuantType::Nvfp4);
    assert_eq!(
        (done.decoded, done.ragged),
        (vec!["b.weight".into()], vec!["b.weight".into()])
    );
    let written = SafetensorsFile::open(out.join("model.safetensors")).unwrap();
    let expected: Vec<f32> = Checkpoint::open(&nf4)
        .unwrap()
        .load_quantized("b.weight")
        .unwrap()
        .dequantize();
    assert_eq!(written.load_float::<f32>("b.weight").unwrap().0, expected);
}

#[rstest]
#[case::same_type("a.weight", QuantType::Nf4, Dtype::U8, "nf4")]
#[case::storage("a.weight", QuantType::Nvfp4, Dtype::BF16, "U8")]
fn impossible_settings_are_refused(
    #[case] key: &str,
    #[case] quant_type: QuantType,
    #[case] storage: Dtype,
    #[case] part: &str,
) {
    let folder = temp();
    let (dense, nf4) = (folder.path().join("dense"), folder.path().join("nf4"));
    write_model(&dense, &json!({}), &[(key, &[32, 64])]);
    quantize(&dense, &nf4, QuantType::Nf4);
    let options = QuantizeOptions {
        storage,
        ..options(quant_type)
    };
    let out = folder.path().join("out");
    let source = Checkpoint::open(&nf4).unwrap();
    let error = quantize_checkpoint(&source, &out, &options, quiet).unwrap_err();
    assert!(error.to_string().contains(part), "{error}");
    assert!(!out.exists());
}

#[test]
fn fused_experts_are_refused() {
    let folder = temp();
    let (dense, out) = (folder.path().join("dense"), folder.path().join("out"));
    write_model(
        &dense,
        &json!({}),
        &[("mlp.experts.down_proj", &[2, 32, 64])],
    );
    let options = QuantizeOptions {
        experts: true,
        ..options(QuantType::Nvfp4)
    };
    let source = Checkpoint::open(&dense).unwrap();
    let error = quantize_checkpoint(&source, &out, &options, quiet).unwrap_err();
    assert!(
        matches!(
            &error,
            Nf4Error::Config {
                field: "experts",
                ..
            }
        ),
        "{error}"
    );
    assert!(
        error.to_string().contains("mlp.experts.down_proj"),
        "{error}"
    );
}

/// The nearest code of a table, the even one of two.
fn nearest(table: &[f32], value: f32) -> u8 {
    let distance = |code: &usize| (f64::from(table[*code]) - f64::from(value)).abs();
    let order = |a: &usize, b: &usize| {
        distance(a)
            .total_cmp(&distance(b))
            .then((a % 2).cmp(&(b % 2)))
    };
    (0..table.len()).min_by(order).unwrap() as u8
}

#[test]
fn codes_of_small_floats_are_the_nearest() {
    let finite = &E4M3_CODEBOOK[..127];
    let positive = &E2M1_CODEBOOK[..8];
    for (table, code) in [
        (finite, e4m3_code as fn(f32) -> u8),
        (positive, e2m1_code as fn(f32) -> u8),
    ] {
        let ties = table.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
        let values: Vec<f32> = ties
            .chain(table.iter().copied())
            .chain([1e-12, 500.0])
            .collect();
        for value in values {
            let around = [value.next_down().max(0.0), value, value.next_up()];
            for value in around {
                assert_eq!(code(value), nearest(table, value), "{value}");
                let sign = if table.len() == 8 { 8 } else { 128 };
                assert_eq!(code(-value), sign | nearest(table, value), "-{value}");
            }
        }
    }
}

/// Codes and scales, whatever shares the work: the codes are the nearest by the scales that are stored.
#[rstest]
fn quantizing_does_not_depend_on_threads(
    #[values(
        QuantType::Nvfp4,
        QuantType::Mxfp4,
        QuantType::Fp8Block,
        QuantType::Fp8Channel
    )]
    quant_type: QuantType,
) {
    let shape = [700, 320];
    let weight: Vec<bf16> = sine(700 * 320).into_iter().map(bf16::from_f32).collect();
    let config = QuantConfig::of(quant_type);
    let with_threads = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| BlockTensor::quantize(&weight, &shape, config).unwrap())
    };
    let one = with_threads(1);
    assert!(
        [2, 3, 7]
            .into_iter()
            .all(|threads| with_threads(threads) == one)
    );
    let layout = one.packed_layout();
    for (index, value) in weight.iter().enumerate() {
        let scale = one.scale(layout.scale_of_run(index >> layout.run_log2()));
        assert_eq!(
            one.code(index),
            quant_type.code(value.to_f32() / scale),
            "{index}"
        );
    }
    let mut bad = weight.clone();
    bad[224_000 - 3] = bf16::NAN;
    let error = BlockTensor::quantize(&bad, &shape, config).unwrap_err();
    assert!(
        matches!(error, Nf4Error::NonFinite { index: 223_997, .. }),
        "{error}"
    );
}

/// The scale of the tensor is what is asked for, and large blocks saturate.
#[test]
fn a_scale_of_the_tensor_can_be_given() {
    let weight = sine(64 * 32);
    for scale in [
        TensorScale::Divides(2000.0),
        TensorScale::Multiplies(1.0 / 2000.0),
    ] {
        let quantized = BlockTensor::quantize_nvfp4(&weight, &[64, 32], scale).unwrap();
        let Absmax::Coded(scales) = quantized.absmax() else {
            panic!("NVFP4 has coded scales");
        };
        assert_eq!(scales.tensor_scale, scale);
        let back: Vec<f32> = quantized.dequantize();
        assert!(weight.iter().zip(&back).all(|(a, b)| (a - b).abs() < 0.2));
    }
    for scale in [
        TensorScale::Divides(0.0),
        TensorScale::Multiplies(0.0),
        TensorScale::Multiplies(1e-39),
    ] {
        let refused = BlockTensor::quantize_nvfp4(&weight, &[64, 32], scale);
        assert!(
            matches!(refused, Err(Nf4Error::NonFinite { .. })),
            "{scale:?}"
        );
    }
    let none = BlockTensor::quantize_nvfp4(&weight, &[64, 32], TensorScale::None);
    assert!(matches!(none, Err(Nf4Error::Length { .. })));
}

/// ModelOpt has such scales of weights that are zero; compressed-tensors cannot say it.
#[rstest]
fn a_scale_without_a_reciprocal_is_not_stored_as_one(#[values(0.0, 1e-39)] scale: f32) {
    let scales = CodedScales {
        codes: vec![0x38; 4],
        tensor_scale: TensorScale::Multiplies(scale),
    };
    let weight = BlockTensor::from_parts(
        vec![0; 32],
        Absmax::Coded(scales),
        vec![2, 32],
        QuantConfig::of(QuantType::Nvfp4).block_size,
        FloatType::BF16,
        QuantType::Nvfp4,
    );
    let folder = temp();
    let mut writer = CheckpointWriter::create(folder.path(), DEFAULT_MAX_SHARD_BYTES).unwrap();
    match writer.write_nf4("up.weight", &weight.unwrap(), Dtype::U8, false) {
        Err(Nf4Error::NonFinite { tensor, .. }) => assert_eq!(tensor, "up.weight_global_scale"),
        other => panic!("{other:?}"),
    }
}

/// Nothing but `config.json` tells what dtype these weights had.
#[rstest]
fn the_dtype_of_weights_is_noted(
    #[values(QuantType::Nf4, QuantType::Nvfp4, QuantType::Fp8Block)] quant_type: QuantType,
) {
    let folder = temp();
    let source = folder.path().join("dense");
    write_model(&source, &json!({}), &[("up.weight", &[8, 64])]);
    let out = folder.path().join("out");
    quantize(&source, &out, quant_type);
    let quantized = Checkpoint::open(&out).unwrap();
    let form = quantized.weight_form("up.weight").unwrap();
    assert_eq!(
        (form.dtype, form.config.quant_type),
        (FloatType::F32, quant_type)
    );
    let dtype = config_of(&out).get("dtype").cloned();
    let expected = (!quant_type.is_bitsandbytes()).then(|| json!("float32"));
    assert_eq!(dtype, expected);
}
