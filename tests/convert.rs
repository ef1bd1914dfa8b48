//! Whole folders from float to 4 bit and back.
#![cfg(feature = "checkpoint")]

mod golden;
mod stored;

use std::fs;
use std::path::{Path, PathBuf};

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{
    Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, DequantizeOptions, Difference, Dtype,
    QuantizeOptions, dequantize_checkpoint, quantize_checkpoint, verify,
};
use burn_nf4::format::{BlockTensor, FloatElement, FloatType, QuantConfig};
use half::{bf16, f16};
use rstest::rstest;
use serde_json::{Value, json};
use stored::{config_of, file_names, quiet, write_model};
use tempfile::TempDir;

fn temp() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn hf(name: &str) -> PathBuf {
    PathBuf::from("tests/fixtures/hf").join(name).join("model")
}

fn open(path: impl AsRef<Path>) -> Checkpoint {
    Checkpoint::open(path).unwrap()
}

/// f32 keeps a decoded weight exactly, its scales included, so that with flat scales nothing is
/// lost in another round; with nested ones the codes still come out the same.
#[rstest]
fn a_dequantized_folder_quantizes_to_the_same_codes(
    #[values("f32", "f32_sharded")] name: &str,
    #[values(QuantConfig::default(), QuantConfig::flat())] quant_config: QuantConfig,
) {
    let folder = temp();
    let (dense, quantized) = (folder.path().join("dense"), folder.path().join("nf4"));
    let source = open(hf(name));
    let options = DequantizeOptions::default();
    let converted = dequantize_checkpoint(&source, &dense, &options, quiet).unwrap();
    assert_eq!((converted.converted, converted.kept), (14, 7));
    assert!(open(&dense).quantized_weights().is_empty());
    let report = verify(&source, &open(&dense), quiet).unwrap();
    assert!(report.is_within(0.0, 0.0), "{report:?}");

    let options = QuantizeOptions {
        config: quant_config,
        ..QuantizeOptions::default()
    };
    let converted = quantize_checkpoint(&open(&dense), &quantized, &options, quiet).unwrap();
    assert_eq!((converted.converted, converted.kept), (14, 7));
    let again = open(&quantized);
    assert_eq!(again.parameters(), source.parameters());
    for prefix in source.quantized_weights() {
        let (theirs, ours) = (source.load_quantized(prefix), again.load_quantized(prefix));
        assert!(theirs.unwrap().codes() == ours.unwrap().codes(), "{prefix}");
    }
    if quant_config.nested_block_size.is_none() {
        let report = verify(&source, &again, quiet).unwrap();
        assert!(report.is_within(0.0, 0.0), "{report:?}");
    }
}

/// Everything but the weights themselves is what transformers wrote, to the byte.
#[rstest]
fn config_is_written_as_transformers_does(#[values("f32", "bf16")] name: &str) {
    let folder = temp();
    let (dense, quantized) = (folder.path().join("dense"), folder.path().join("nf4"));
    let options = DequantizeOptions::default();
    dequantize_checkpoint(&open(hf(name)), &dense, &options, quiet).unwrap();
    assert_eq!(config_of(&dense).get("quantization_config"), None);
    let options = QuantizeOptions::default();
    quantize_checkpoint(&open(&dense), &quantized, &options, quiet).unwrap();
    for file in ["config.json", "generation_config.json"] {
        let (theirs, ours) = (hf(name).join(file), quantized.join(file));
        assert_eq!(
            fs::read_to_string(ours).unwrap(),
            fs::read_to_string(theirs).unwrap()
        );
    }
}

/// The float weights that bitsandbytes quantized, in a folder.
#[rstest]
#[case("f32_b64_nested_512x512_normal")]
#[case("bf16_b64_nested_300x520_outliers")]
#[case("f16_b64_nested_17x33_normal")]
#[case("f32_b64_nested_17x33_normal_fp4")]
#[case("bf16_b1024_nested_32x2048_normal")]
fn codes_are_those_of_bitsandbytes(#[case] name: &str) {
    let golden = golden::load(name);
    let folder = temp();
    let source = folder.path().join("source");
    let mut writer = CheckpointWriter::create(&source, DEFAULT_MAX_SHARD_BYTES).unwrap();
    let info = golden.file.tensor_info("source").unwrap();
    let bytes = golden.file.tensor_bytes("source").unwrap();
    writer
        .write_tensor("layer.weight", info.dtype, info.shape, bytes)
        .unwrap();
    writer.finish().unwrap();

    let options = QuantizeOptions {
        config: golden.tensor.config(),
        ..QuantizeOptions::default()
    };
    let out = folder.path().join("out");
    quantize_checkpoint(&open(&source), &out, &options, quiet).unwrap();
    let ours = open(&out).load_quantized("layer.weight").unwrap();
    assert!(ours.codes() == golden.tensor.codes());
    assert_eq!(ours.dtype(), golden.tensor.dtype());
    assert_eq!(ours.config(), golden.tensor.config());
}

#[test]
fn settings_come_into_the_config() {
    let folder = temp();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    let composed = json!({"torch_dtype": "float32", "text_config": {"dtype": "float32"}});
    write_model(&source, &composed, &[("up.weight", &[64, 64])]);
    let options = QuantizeOptions {
        config: QuantConfig::flat(),
        storage: Dtype::BF16,
        dtype: Some(FloatType::F16),
        ..QuantizeOptions::default()
    };
    quantize_checkpoint(&open(&source), &out, &options, quiet).unwrap();
    let written = open(&out);
    assert_eq!(written.tensor_info("up.weight").unwrap().dtype, Dtype::BF16);
    let weight = written.load_quantized("up.weight").unwrap();
    assert_eq!(weight.dtype(), FloatType::F16);

    let config = config_of(&out);
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["bnb_4bit_quant_storage"], "bfloat16");
    assert_eq!(quantization["bnb_4bit_compute_dtype"], "float16");
    assert_eq!(quantization["bnb_4bit_use_double_quant"], false);
    assert_eq!(config["torch_dtype"], "float16");
    assert_eq!(config["text_config"]["dtype"], "float16");
    assert_eq!(config.get("dtype"), None);
}

#[test]
fn float_weights_are_rounded_before_they_are_quantized() {
    let folder = temp();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    let tensors: [(&str, &[usize]); 2] = [("norm.weight", &[64]), ("up.weight", &[64, 64])];
    write_model(&source, &json!({}), &tensors);
    let options = QuantizeOptions {
        dtype: Some(FloatType::BF16),
        ..QuantizeOptions::default()
    };
    quantize_checkpoint(&open(&source), &out, &options, quiet).unwrap();
    let round = |key: &str| -> Vec<bf16> {
        let (values, _) = open(&source).load_float::<f32>(key).unwrap();
        values.into_iter().map(bf16::from_f32).collect()
    };
    let expected = BlockTensor::quantize(&round("up.weight"), &[64, 64], options.config).unwrap();
    let written = open(&out);
    assert_eq!(written.load_quantized("up.weight").unwrap(), expected);
    let (norm, _) = written.load_float::<bf16>("norm.weight").unwrap();
    assert_eq!(norm, round("norm.weight"));
}

/// bitsandbytes decodes to the weight's own type; the one asked for comes after that.
#[rstest]
fn weights_are_decoded_to_their_own_type_first(
    #[values(FloatType::F16, FloatType::F32)] dtype: FloatType,
) {
    let folder = temp();
    let out = folder.path().join("out");
    let source = open(hf("bf16"));
    let options = DequantizeOptions {
        dtype: Some(dtype),
        ..DequantizeOptions::default()
    };
    dequantize_checkpoint(&source, &out, &options, quiet).unwrap();
    assert_eq!(config_of(&out)["dtype"], dtype.name());
    let written = open(&out);
    assert_eq!(written.parameters(), source.parameters());
    for &key in &source.parameters() {
        let values: Vec<bf16> = match source.load_quantized(key) {
            Ok(weight) => weight.dequantize(),
            Err(_) => source.load_float(key).unwrap().0,
        };
        match dtype {
            FloatType::F16 => same(
                &written,
                key,
                values.iter().map(|v| f16::from_f32(v.to_f32())),
            ),
            _ => same(&written, key, values.iter().map(|v| v.to_f32())),
        }
    }
}

#[track_caller]
fn same<T: FloatElement + PartialEq>(
    written: &Checkpoint,
    key: &str,
    expected: impl Iterator<Item = T>,
) {
    let (values, _) = written.load_float::<T>(key).unwrap();
    assert!(values.into_iter().eq(expected), "{key}");
}

#[test]
fn a_transposed_weight_is_decoded_the_way_the_model_has_it() {
    let folder = temp();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    let values: Vec<f32> = (0..6 * 10).map(|i| (i as f32 * 0.37).sin()).collect();
    let weight = BlockTensor::quantize(&values, &[6, 10], QuantConfig::default()).unwrap();
    let mut writer = CheckpointWriter::create(&source, DEFAULT_MAX_SHARD_BYTES).unwrap();
    writer.write_nf4("w", &weight, Dtype::U8, true).unwrap();
    writer.finish().unwrap();
    let options = DequantizeOptions::default();
    dequantize_checkpoint(&open(&source), &out, &options, quiet).unwrap();
    let (written, shape) = open(&out).load_float::<f32>("w").unwrap();
    assert_eq!(shape, [10, 6]);
    let decoded: Vec<f32> = weight.dequantize();
    for row in 0..10 {
        for column in 0..6 {
            assert_eq!(written[row * 6 + column], decoded[column * 10 + row]);
        }
    }
    let report = verify(&open(&source), &open(&out), quiet).unwrap();
    assert_eq!(report.parameters[0].difference, Difference::IdenticalValues);
}

/// transformers loads it as any quantized head: the table is left to the embeddings.
#[rstest]
#[case::said(json!({"tie_word_embeddings": true}))]
#[case::by_default(json!({}))]
fn a_tied_head_is_quantized_as_a_weight_of_its_own(
    #[case] config: Value,
    #[values(None, Some(FloatType::BF16))] dtype: Option<FloatType>,
) {
    let folder = temp();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    let (table, head) = ("model.embed_tokens.weight", "lm_head.weight");
    write_model(
        &source,
        &config,
        &[(table, &[96, 64]), ("model.up.weight", &[64, 64])],
    );
    let options = QuantizeOptions {
        head: true,
        dtype,
        ..QuantizeOptions::default()
    };
    let said = quantize_checkpoint(&open(&source), &out, &options, quiet).unwrap();
    assert_eq!((said.converted, said.kept), (2, 1));
    let written = open(&out);
    assert_eq!(written.quantized_weights(), [head, "model.up.weight"]);
    let (values, shape) = open(&source).load_float::<f32>(table).unwrap();
    let config = options.config;
    let expected = match dtype {
        None => BlockTensor::quantize(&values, &shape, config),
        Some(_) => {
            let rounded: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
            assert_eq!(written.load_float::<bf16>(table).unwrap().0, rounded);
            BlockTensor::quantize(&rounded, &shape, config)
        }
    };
    assert_eq!(written.load_quantized(head).unwrap(), expected.unwrap());
    let config = config_of(&out);
    assert_eq!(config["tie_word_embeddings"], false);
    assert_eq!(
        config["quantization_config"]["llm_int8_skip_modules"],
        json!([])
    );
    let faults: Vec<String> = written.faults().iter().map(ToString::to_string).collect();
    assert_eq!(faults, Vec::<String>::new());
}

#[rstest]
#[case::none(json!({"tie_word_embeddings": false}), "model.embed_tokens.weight")]
#[case::another_name(json!({"tie_word_embeddings": true}), "transformer.wte.weight")]
fn a_head_that_is_not_there_is_an_error(#[case] config: Value, #[case] table: &str) {
    let folder = temp();
    let source = folder.path().join("source");
    write_model(
        &source,
        &config,
        &[(table, &[96, 64]), ("model.up.weight", &[64, 64])],
    );
    let options = QuantizeOptions {
        head: true,
        ..QuantizeOptions::default()
    };
    let error = refused(&source, &options);
    assert!(
        matches!(error, Nf4Error::Config { field: "head", .. }),
        "{error}"
    );
    let options = QuantizeOptions {
        embeddings: true,
        ..options
    };
    // With the embedding: one weight for both, whatever its name, or none.
    let out = folder.path().join("out");
    let result = quantize_checkpoint(&open(&source), &out, &options, quiet);
    assert_eq!(result.is_ok(), config["tie_word_embeddings"] == true);
}

#[test]
fn other_files_come_along_and_other_weights_do_not() {
    let folder = temp();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    write_model(&source, &json!({}), &[("up.weight", &[64, 64])]);
    for name in [
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "README.md",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "adapter_config.json",
        ".gitattributes",
    ] {
        fs::write(source.join(name), name).unwrap();
    }
    let templates = source.join("additional_chat_templates");
    fs::create_dir(&templates).unwrap();
    fs::write(templates.join("tool.jinja"), "tool").unwrap();
    let options = QuantizeOptions::default();
    quantize_checkpoint(&open(&source), &out, &options, quiet).unwrap();
    let expected = [
        "README.md",
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ];
    assert_eq!(file_names(&out), expected);
    assert_eq!(
        fs::read(out.join("tokenizer.json")).unwrap(),
        b"tokenizer.json"
    );
    assert_eq!(
        file_names(&out.join("additional_chat_templates")),
        ["tool.jinja"]
    );
}

#[test]
fn a_large_model_is_quantized_into_shards() {
    let folder = temp();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    let tensors: [(&str, &[usize]); 3] = [
        ("a.weight", &[64, 64]),
        ("b.weight", &[64, 64]),
        ("c.weight", &[64, 64]),
    ];
    write_model(&source, &json!({}), &tensors);
    let options = QuantizeOptions {
        max_shard_bytes: 4000, // 2 KiB of codes and 1.1 KiB of tables each
        ..QuantizeOptions::default()
    };
    let converted = quantize_checkpoint(&open(&source), &out, &options, quiet).unwrap();
    assert_eq!(converted.written.files.len(), 3);
    assert_eq!(open(&out).quantized_weights().len(), 3);
}

#[test]
fn progress_ends_at_the_totals() {
    let folder = temp();
    let source = open(hf("f32"));
    let mut calls = Vec::new();
    let options = DequantizeOptions::default();
    dequantize_checkpoint(&source, folder.path(), &options, |now| {
        calls.push((
            now.parameter.to_string(),
            now.parameters_done,
            now.bytes_done,
        ));
        assert_eq!(now.parameters_total, 21);
        assert_eq!(now.bytes_total, source.size_bytes());
    })
    .unwrap();
    let names: Vec<&str> = calls.iter().map(|call| call.0.as_str()).collect();
    assert_eq!(names, source.parameters());
    assert!(calls.is_sorted_by_key(|call| call.2));
    let last = calls.last().unwrap();
    assert_eq!((last.1, last.2), (21, source.size_bytes()));
}

/// Runs a quantization that must fail, and checks that it leaves no folder behind.
#[track_caller]
fn refused(source: &Path, options: &QuantizeOptions) -> Nf4Error {
    let folder = temp();
    let out = folder.path().join("out");
    let error = quantize_checkpoint(&open(source), &out, options, quiet);
    assert!(!out.exists());
    error.expect_err("it must fail")
}

#[rstest]
fn a_weight_that_is_not_finite_is_named(
    #[values(f32::NAN, f32::INFINITY)] value: f32,
    #[values(None, Some(FloatType::BF16))] dtype: Option<FloatType>,
) {
    let folder = temp();
    let mut values = vec![0.5f32; 64 * 64];
    values[70] = value;
    let mut writer = CheckpointWriter::create(folder.path(), DEFAULT_MAX_SHARD_BYTES).unwrap();
    for (key, values) in [("a.weight", vec![0.5; 64 * 64]), ("b.weight", values)] {
        let bytes = bytemuck::cast_slice(&values);
        writer
            .write_tensor(key, Dtype::F32, &[64, 64], bytes)
            .unwrap();
    }
    writer.finish().unwrap();
    let options = QuantizeOptions {
        dtype,
        ..QuantizeOptions::default()
    };
    let error = refused(folder.path(), &options);
    assert!(
        matches!(&error, Nf4Error::NonFinite { tensor, index: 70, .. } if tensor == "b.weight"),
        "{error:?}"
    );
}

/// 1e5 is no f16.
#[test]
fn a_weight_that_the_type_cannot_hold_is_named() {
    let folder = temp();
    let mut writer = CheckpointWriter::create(folder.path(), DEFAULT_MAX_SHARD_BYTES).unwrap();
    let bytes = bytemuck::cast_slice(&[1f32, 1e5]);
    writer
        .write_tensor("norm", Dtype::F32, &[2], bytes)
        .unwrap();
    writer.finish().unwrap();
    let options = QuantizeOptions {
        dtype: Some(FloatType::F16),
        ..QuantizeOptions::default()
    };
    let error = refused(folder.path(), &options);
    let expected = Nf4Error::NonFinite {
        tensor: "norm".into(),
        index: 1,
        given: f32::INFINITY,
    };
    assert_eq!(error, expected);
}

#[test]
fn a_weight_of_another_type_is_named() {
    let folder = temp();
    let mut writer = CheckpointWriter::create(folder.path(), DEFAULT_MAX_SHARD_BYTES).unwrap();
    writer
        .write_tensor("up.weight", Dtype::F64, &[64, 64], &[0; 64 * 64 * 8])
        .unwrap();
    writer.finish().unwrap();
    let error = refused(folder.path(), &QuantizeOptions::default());
    assert!(
        matches!(&error, Nf4Error::Dtype { tensor, .. } if tensor == "up.weight"),
        "{error:?}"
    );
}

#[test]
fn a_quantized_source_is_refused() {
    let error = refused(&hf("f32"), &QuantizeOptions::default());
    assert!(
        matches!(
            error,
            Nf4Error::Config {
                field: "source",
                ..
            }
        ),
        "{error:?}"
    );
}

#[rstest]
#[case(json!({"model_type": "gpt2"}), "model_type")]
#[case(json!({"quantization_config": {"quant_method": "fp8"}}), "quantization_config")]
fn models_that_would_come_out_wrong_are_refused(#[case] config: Value, #[case] name: &str) {
    let folder = temp();
    write_model(folder.path(), &config, &[("c_attn.weight", &[64, 64])]);
    let error = refused(folder.path(), &QuantizeOptions::default());
    assert!(
        matches!(&error, Nf4Error::Config { field, .. } if *field == name),
        "{error:?}"
    );
}

#[rstest]
#[case(json!({"quant_method": "gptq"}))]
#[case(json!({"quant_method": "bitsandbytes", "load_in_8bit": true}))]
fn other_quantizations_are_not_decoded(#[case] quantization: Value) {
    let folder = temp();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    let config = json!({ "quantization_config": quantization });
    write_model(&source, &config, &[("up.weight", &[64, 64])]);
    let options = DequantizeOptions::default();
    let error = dequantize_checkpoint(&open(&source), &out, &options, quiet);
    assert!(
        matches!(
            &error,
            Err(Nf4Error::Config {
                field: "quantization_config",
                ..
            })
        ),
        "{error:?}"
    );
    assert!(!out.exists());
}

#[rstest]
#[case("[1")]
#[case("[]")]
fn a_malformed_config_is_named(#[case] text: &str) {
    let folder = temp();
    write_model(folder.path(), &json!({}), &[("up.weight", &[64, 64])]);
    let path = folder.path().join("config.json");
    fs::write(&path, text).unwrap();
    let error = refused(folder.path(), &QuantizeOptions::default());
    assert!(
        matches!(&error, Nf4Error::ModelConfig { path: named, .. } if *named == path),
        "{error:?}"
    );
}

#[test]
fn the_source_is_never_written_into() {
    let folder = temp();
    write_model(folder.path(), &json!({}), &[("up.weight", &[64, 64])]);
    let before = file_names(folder.path());
    let options = QuantizeOptions {
        overwrite: true,
        ..QuantizeOptions::default()
    };
    let same_folder = folder.path().join(".");
    let error = quantize_checkpoint(&open(folder.path()), same_folder, &options, quiet);
    assert!(
        matches!(
            &error,
            Err(Nf4Error::Config {
                field: "folder",
                ..
            })
        ),
        "{error:?}"
    );
    assert_eq!(file_names(folder.path()), before);
}
