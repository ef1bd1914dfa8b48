//! What a folder's `config.json` claims must be there, and what is there must be claimed: by
//! everything that writes a folder from another one.
#![cfg(feature = "peft")]

mod stored;

#[path = "faults/overflow.rs"]
mod overflow;

use std::fs;
use std::path::Path;

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{
    Checkpoint, DequantizeOptions, Dtype, QuantizeOptions, dequantize_checkpoint,
    quantize_checkpoint, verify,
};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig, QuantType};
use burn_nf4::peft::{Adapter, LoraConfig, MergeOptions, TargetModules, merge_4bit, merge_16bit};
use rstest::rstest;
use serde_json::{Value, json};
use stored::{Stored, Tensors, config_of, quiet, sine};
use tempfile::TempDir;

const UP: &str = "model.layers.0.mlp.up_proj.weight";
const DOWN: &str = "model.layers.0.mlp.down_proj.weight";
const NORM: &str = "model.norm.weight";

fn float_weight() -> Stored {
    stored::floats(&sine(64 * 64), &[64, 64])
}

fn raw(dtype: Dtype, shape: &[usize]) -> Stored {
    let elems: usize = shape.iter().product();
    Stored {
        dtype,
        shape: shape.to_vec(),
        bytes: vec![1; elems * dtype.bitsize() / 8],
    }
}

/// Two matrices and a norm in floats.
fn floats() -> Tensors {
    Tensors::from([
        (UP.into(), float_weight()),
        (DOWN.into(), float_weight()),
        (NORM.into(), stored::floats(&[1.0; 64], &[64])),
    ])
}

/// The same in 4 bit.
fn packed() -> Tensors {
    let mut tensors = floats();
    for key in [UP, DOWN] {
        let weight = BlockTensor::quantize(&sine(64 * 64), &[64, 64], QuantConfig::default());
        tensors.extend(stored::weight(key, &weight.unwrap()));
    }
    tensors
}

fn in_4bit() -> Value {
    json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}})
}

fn written(tensors: &Tensors, config: Option<&Value>) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    stored::write(folder.path(), tensors);
    if let Some(config) = config {
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    }
    folder
}

/// The error of dequantizing a folder, which is also that of merging an adapter into it.
#[track_caller]
fn refused(folder: &Path) -> Nf4Error {
    let source = Checkpoint::open(folder).unwrap();
    let adapter = Adapter::new(LoraConfig::new(TargetModules::list(["up_proj"]))).unwrap();
    let out = folder.join("out");
    let (dequantize, merge) = (DequantizeOptions::default(), MergeOptions::default());
    let errors = [
        dequantize_checkpoint(&source, &out, &dequantize, quiet).unwrap_err(),
        merge_16bit(&source, &adapter, &out, None, &merge, quiet).unwrap_err(),
        merge_4bit(&source, &adapter, &out, &merge, quiet).unwrap_err(),
    ];
    assert!(!out.exists());
    let [first, others @ ..] = errors;
    assert!(others.iter().all(|other| *other == first), "{others:?}");
    assert_eq!(source.faults().first(), Some(&first));
    first
}

#[track_caller]
fn assert_claim(error: &Nf4Error, words: &str) {
    match error {
        Nf4Error::Config { field, given, .. } => {
            assert_eq!(*field, "quantization_config");
            assert!(given.contains(words), "{given}");
        }
        other => panic!("{other:?}"),
    }
}

/// Reads, decodes and quantizes again.
#[track_caller]
fn accepted(tensors: &Tensors, config: Option<&Value>) {
    let folder = written(tensors, config);
    let source = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(source.faults(), []);
    let (dense, again) = (folder.path().join("dense"), folder.path().join("again"));
    dequantize_checkpoint(&source, &dense, &DequantizeOptions::default(), quiet).unwrap();
    let dense = Checkpoint::open(dense).unwrap();
    assert_eq!(dense.faults(), []);
    quantize_checkpoint(&dense, &again, &QuantizeOptions::default(), quiet).unwrap();
    assert_eq!(Checkpoint::open(again).unwrap().faults(), []);
}

/// A folder of LLM.int8 as transformers writes it, whatever its config says.
#[rstest]
#[case::no_config(None)]
#[case::no_claim(Some(json!({})))]
#[case::both(Some(json!({"load_in_8bit": true, "_load_in_8bit": true, "load_in_4bit": false})))]
#[case::under(Some(json!({"_load_in_8bit": true, "_load_in_4bit": false})))]
#[case::strings(Some(json!({"load_in_8bit": "true", "load_in_4bit": "false"})))]
#[case::in_4bit(Some(json!({"load_in_4bit": true})))]
fn llm_int8_is_refused_by_name(
    #[case] flags: Option<Value>,
    #[values(true, false)] with_states: bool,
) {
    // Some layers may be in 4 bit still.
    let mut tensors = if with_states { packed() } else { floats() };
    for part in tensors
        .clone()
        .into_keys()
        .filter(|key| key.starts_with(UP))
    {
        tensors.remove(&part);
    }
    let module = UP.strip_suffix(".weight").unwrap();
    tensors.insert(UP.into(), raw(Dtype::I8, &[64, 64]));
    tensors.insert(format!("{module}.SCB"), raw(Dtype::F32, &[64]));
    tensors.insert(format!("{module}.weight_format"), raw(Dtype::U8, &[]));
    let config = flags.map(|flags| match flags.as_object().unwrap().is_empty() {
        true => flags,
        false => {
            let mut claim = json!({"quant_method": "bitsandbytes", "llm_int8_threshold": 6.0});
            claim
                .as_object_mut()
                .unwrap()
                .extend(flags.as_object().unwrap().clone());
            json!({ "quantization_config": claim })
        }
    });
    let folder = written(&tensors, config.as_ref());
    let expected = Nf4Error::OtherQuantization {
        tensor: format!("{module}.SCB"),
        method: "LLM.int8",
    };
    assert_eq!(refused(folder.path()), expected);
    if !with_states {
        let source = Checkpoint::open(folder.path()).unwrap();
        let out = folder.path().join("out");
        let error = quantize_checkpoint(&source, &out, &QuantizeOptions::default(), quiet);
        assert_eq!(error.unwrap_err(), expected);
    }
}

/// One tensor is enough to tell, without any claim.
#[rstest]
#[case("model.layers.0.q_proj.weight", Dtype::I8, "8 bit, as LLM.int8")]
#[case("model.layers.0.q_proj.SCB", Dtype::F32, "LLM.int8")]
#[case("model.layers.0.q_proj.qweight", Dtype::I32, "GPTQ or AWQ")]
#[case("model.layers.0.q_proj.qzeros", Dtype::I32, "GPTQ or AWQ")]
#[case("model.layers.0.q_proj.g_idx", Dtype::I32, "GPTQ or AWQ")]
#[case(
    "model.layers.0.q_proj.weight_packed",
    Dtype::I32,
    "integers, as compressed-tensors packs them"
)]
#[case("model.layers.0.q_proj.weight_shape", Dtype::I64, "compressed-tensors")]
#[case(
    "model.layers.0.q_proj.weight_scale",
    Dtype::F32,
    "FP8, FP4 or int8 with scales"
)]
#[case(
    "model.layers.0.q_proj.weight_scale_inv",
    Dtype::F32,
    "FP8, FP4 or int8 with scales"
)]
#[case("model.layers.0.q_proj.pre_quant_scale", Dtype::BF16, "ModelOpt's AWQ")]
#[case("model.layers.0.q_proj.weight", Dtype::F8_E4M3, "8, 6 or 4-bit floats")]
#[case(
    "model.layers.0.mlp.experts.down_proj",
    Dtype::F8_E5M2,
    "8, 6 or 4-bit floats"
)]
#[case("model.layers.0.q_proj.weight", Dtype::I32, "integers")]
#[case("model.layers.0.q_proj.W_q", Dtype::U8, "HQQ")]
#[case("model.layers.0.q_proj.weight._data", Dtype::I8, "quanto")]
fn other_quantizations_are_named(
    #[case] key: &str,
    #[case] dtype: Dtype,
    #[case] method: &'static str,
    #[values(false, true)] claimed: bool,
) {
    let mut tensors = packed();
    tensors.insert(key.into(), raw(dtype, &[64, 64]));
    let config = in_4bit();
    let folder = written(&tensors, claimed.then_some(&config));
    let expected = Nf4Error::OtherQuantization {
        tensor: key.into(),
        method,
    };
    assert_eq!(refused(folder.path()), expected);
}

#[rstest]
#[case("q_proj.codes", "q_proj.codebooks", "AQLM")]
fn quantizations_of_two_tensors_are_named(
    #[case] key: &str,
    #[case] other: &str,
    #[case] method: &'static str,
) {
    let mut tensors = floats();
    tensors.insert(other.into(), raw(Dtype::U8, &[4]));
    accepted(&tensors, None);
    tensors.insert(key.into(), raw(Dtype::U8, &[4, 2]));
    let folder = written(&tensors, None);
    let expected = Nf4Error::OtherQuantization {
        tensor: key.into(),
        method,
    };
    assert_eq!(refused(folder.path()), expected);
}

fn state_of(key: &str) -> String {
    format!("{key}.quant_state.bitsandbytes__nf4")
}

/// The parameters whose `quant_state` is missing, as they are told.
#[track_caller]
fn assert_lost(tensors: &Tensors, config: Option<&Value>, lost: &[&str]) {
    let folder = written(tensors, config);
    let source = Checkpoint::open(folder.path()).unwrap();
    let missing = lost.iter().map(|key| Nf4Error::MissingKey {
        path: folder.path().into(),
        key: state_of(key),
    });
    assert_eq!(source.faults(), missing.collect::<Vec<_>>());
    refused(folder.path());
    let out = folder.path().join("out");
    assert!(quantize_checkpoint(&source, &out, &QuantizeOptions::default(), quiet).is_err());
    assert!(!out.exists());
}

#[rstest]
#[case::all(&[DOWN, UP])]
#[case::one(&[UP])]
fn a_lost_quant_state_is_named(
    #[case] lost: &[&str],
    #[values(None, Some(in_4bit()), Some(json!({"text_config": in_4bit()})))] config: Option<Value>,
) {
    let mut tensors = packed();
    for key in lost {
        tensors.remove(&state_of(key)).unwrap();
    }
    assert_lost(&tensors, config.as_ref(), lost);
}

/// Whatever is left of a weight tells that it was one.
#[rstest]
#[case::codes(&[""])]
#[case::scales(&[".absmax"])]
#[case::table(&[".quant_map"])]
#[case::nested_scales(&[".nested_absmax"])]
#[case::nested_table(&[".nested_quant_map"])]
#[case::codes_and_scales(&["", ".absmax"])]
fn what_is_left_of_a_weight_is_not_taken_for_another(#[case] left: &[&str]) {
    let mut tensors = packed();
    let parts: Vec<String> = tensors
        .keys()
        .filter(|key| key.starts_with(UP))
        .cloned()
        .collect();
    for part in parts {
        if !left.contains(&part.strip_prefix(UP).unwrap()) {
            tensors.remove(&part);
        }
    }
    assert_lost(&tensors, None, &[UP]);
    assert_lost(&tensors, Some(&in_4bit()), &[UP]);
}

/// Codes under the name of a float type are told by the config.
#[test]
fn codes_stored_as_floats_are_told_by_the_config() {
    let mut tensors = floats();
    tensors.insert(UP.into(), raw(Dtype::BF16, &[1024, 1]));
    let mut config = in_4bit();
    config["quantization_config"]["bnb_4bit_quant_storage"] = "bfloat16".into();
    assert_lost(&tensors, Some(&config), &[UP]);
    // A layer of one input is no code.
    accepted(&tensors, None);
}

#[rstest]
fn a_part_that_is_missing_is_named(
    #[values("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")] part: &str,
) {
    let mut tensors = packed();
    tensors.remove(&format!("{UP}{part}")).unwrap();
    let folder = written(&tensors, Some(&in_4bit()));
    let expected = Nf4Error::MissingKey {
        path: folder.path().into(),
        key: format!("{UP}{part}"),
    };
    assert_eq!(refused(folder.path()), expected);
}

#[rstest]
#[case("quant_state.bitsandbytes__int4", ".bitsandbytes__int4")]
#[case("quant_state", "")]
fn a_quant_state_of_another_type_is_named(#[case] part: &str, #[case] given: &str) {
    let mut tensors = packed();
    let state = tensors.remove(&state_of(UP)).unwrap();
    let key = format!("{UP}.{part}");
    tensors.insert(key.clone(), state);
    let folder = written(&tensors, Some(&in_4bit()));
    let expected = Nf4Error::QuantType {
        tensor: key,
        given: given.into(),
    };
    assert_eq!(refused(folder.path()), expected);
}

/// Claims of what is not bitsandbytes in 4 bit, and flags that are none.
#[rstest]
#[case(json!({"quant_method": "gptq", "bits": 4}), "gptq")]
#[case(json!({"quant_method": "fp8"}), "fp8")]
#[case(json!({"quant_method": "compressed-tensors"}), "compressed-tensors")]
#[case(json!({"quant_method": "bitsandbytes", "load_in_8bit": true}), "bitsandbytes in 8 bit")]
#[case(json!({"quant_method": "bitsandbytes", "_load_in_8bit": true}), "bitsandbytes in 8 bit")]
#[case(json!({"quant_method": "bitsandbytes_8bit"}), "bitsandbytes_8bit")]
#[case(json!({"load_in_8bit": true, "load_in_4bit": true}), "in 8 bit")]
#[case(json!({"quant_method": "bitsandbytes", "load_in_4bit": false}), "load_in_4bit false")]
#[case(json!({"quant_method": "bitsandbytes", "_load_in_4bit": false}), "load_in_4bit false")]
#[case(json!({"load_in_4bit": "true"}), "load_in_4bit \"true\"")]
#[case(json!({"quant_method": "bitsandbytes", "_load_in_8bit": "false"}), "_load_in_8bit \"false\"")]
#[case(json!({"quant_method": "bitsandbytes", "load_in_4bit": 1}), "load_in_4bit 1")]
#[case(json!({"quant_method": 4}), "without a name")]
#[case(json!({"bits": 4}), "without a name")]
#[case(json!(["bitsandbytes"]), "without a name")]
#[case(json!("bitsandbytes"), "without a name")]
fn other_claims_are_refused(
    #[case] claim: Value,
    #[case] words: &str,
    #[values(None, Some("text_config"), Some("vision_config"))] part: Option<&str>,
    #[values(true, false)] is_packed: bool,
) {
    let claim = json!({ "quantization_config": claim });
    let config = match part {
        None => claim,
        Some(part) => json!({ part: claim }),
    };
    let tensors = if is_packed { packed() } else { floats() };
    let error = refused(written(&tensors, Some(&config)).path());
    assert_claim(&error, words);
    assert!(
        part.is_none_or(|part| error.to_string().contains(part)),
        "{error}"
    );
}

/// Also the claims that are as they should be, where nothing is there.
#[rstest]
#[case(in_4bit())]
#[case(json!({"quantization_config": {"load_in_4bit": true}}))]
#[case(json!({"text_config": in_4bit()}))]
fn a_claim_of_what_is_not_there_is_refused(#[case] config: Value) {
    let folder = written(&floats(), Some(&config));
    assert_claim(&refused(folder.path()), "no weight is quantized");
    let source = Checkpoint::open(folder.path()).unwrap();
    let out = folder.path().join("out");
    let error = quantize_checkpoint(&source, &out, &QuantizeOptions::default(), quiet);
    assert_claim(&error.unwrap_err(), "no weight is quantized");
}

/// Nor is it made: where no layer is left to be quantized, nothing is claimed.
#[test]
fn what_quantizes_nothing_claims_nothing() {
    let config = json!({"model_type": "llama"});
    let folder = written(&floats(), Some(&config));
    let source = Checkpoint::open(folder.path()).unwrap();
    let out = folder.path().join("out");
    let options = QuantizeOptions {
        skip_modules: vec!["model".into()],
        ..QuantizeOptions::default()
    };
    let converted = quantize_checkpoint(&source, &out, &options, quiet).unwrap();
    assert_eq!(converted.converted, 0);
    assert_eq!(config_of(&out), config);
    assert_eq!(Checkpoint::open(out).unwrap().faults(), []);
}

/// transformers would take the codes for the weights.
#[rstest]
#[case(json!({}))]
#[case(json!({"quantization_config": null}))]
#[case(json!({"quantization_config": {}, "text_config": {"quantization_config": null}}))]
fn a_weight_that_the_config_does_not_claim_is_named(#[case] config: Value) {
    let folder = written(&packed(), Some(&config));
    assert_claim(&refused(folder.path()), &format!("`{DOWN}` is quantized"));
}

#[test]
fn a_malformed_config_is_a_fault() {
    let folder = written(&packed(), None);
    fs::write(folder.path().join("config.json"), "[1").unwrap();
    assert!(matches!(
        refused(folder.path()),
        Nf4Error::ModelConfig { .. }
    ));
}

#[rstest]
#[case::no_config(None)]
#[case::claimed(Some(in_4bit()))]
#[case::without_method(Some(json!({"quantization_config": {"load_in_4bit": true}})))]
#[case::without_flags(Some(json!({"quantization_config": {"quant_method": "bitsandbytes"}})))]
#[case::by_attribute(Some(json!({"quantization_config": {"quant_method": "bitsandbytes", "_load_in_4bit": true, "_load_in_8bit": false, "load_in_8bit": null}})))]
#[case::in_a_part(Some(json!({"text_config": in_4bit(), "vision_config": {"quantization_config": null}})))]
#[case::twice(Some(json!({"quantization_config": {"load_in_4bit": true}, "text_config": in_4bit()})))]
fn what_is_claimed_and_there_is_accepted(#[case] config: Option<Value>) {
    accepted(&packed(), config.as_ref());
}

/// "Dynamic" repositories leave layers in float and need not list them, and models have buffers.
#[test]
fn layers_in_float_and_buffers_are_accepted() {
    let mut tensors = packed();
    tensors.insert("model.layers.1.mlp.up_proj.weight".into(), float_weight());
    tensors.insert(
        "model.layers.1.mlp.gate.weight".into(),
        raw(Dtype::F32, &[64, 1]),
    );
    for (key, dtype) in [
        ("embeddings.position_ids", Dtype::I64),
        ("h.0.attn.bias", Dtype::U8),
        ("h.0.attn.mask", Dtype::BOOL),
        ("bn.num_batches_tracked", Dtype::I64),
        ("observer.absmax", Dtype::F32),
        ("stem.codes", Dtype::I64),
        ("stem.num_blocks", Dtype::I64),
    ] {
        tensors.insert(key.into(), raw(dtype, &[2, 2]));
    }
    accepted(&tensors, Some(&in_4bit()));
}

/// Wherever it was.
#[test]
fn a_dequantized_folder_claims_nothing() {
    let claim = &in_4bit()["quantization_config"];
    let config = json!({
        "quantization_config": claim,
        "text_config": {"quantization_config": claim, "hidden_size": 64},
        "thinker_config": {"text_config": {"quantization_config": claim, "dtype": "float16"}},
        "vision_config": {"quantization_config": null, "torch_dtype": "float16"},
        "transformers_weights": "model.safetensors",
    });
    let folder = written(&packed(), Some(&config));
    let source = Checkpoint::open(folder.path()).unwrap();
    let out = folder.path().join("out");
    let options = DequantizeOptions {
        dtype: Some(FloatType::BF16),
        ..DequantizeOptions::default()
    };
    dequantize_checkpoint(&source, &out, &options, quiet).unwrap();
    let expected = json!({
        "dtype": "bfloat16",
        "text_config": {"hidden_size": 64},
        "thinker_config": {"text_config": {"dtype": "bfloat16"}},
        "vision_config": {"torch_dtype": "bfloat16"},
    });
    assert_eq!(config_of(&out), expected);
}

/// The file that the config names is not in the new folder under that name.
#[test]
fn a_new_folder_does_not_name_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(
        folder.path().join("other.safetensors"),
        stored::to_bytes(&packed()),
    )
    .unwrap();
    let mut config = in_4bit();
    config["transformers_weights"] = "other.safetensors".into();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let source = Checkpoint::open(folder.path()).unwrap();
    let adapter = Adapter::new(LoraConfig::new(TargetModules::list(["up_proj"]))).unwrap();
    let out = folder.path().join("out");
    let options = MergeOptions {
        allow_missing: true,
        ..MergeOptions::default()
    };
    merge_4bit(&source, &adapter, &out, &options, quiet).unwrap();
    assert_eq!(config_of(&out), in_4bit());
    assert_eq!(
        Checkpoint::open(out).unwrap().quantized_weights(),
        [DOWN, UP]
    );
}

/// As Python's `json.dumps(json.loads(text), indent=2, sort_keys=True)` has them.
#[test]
fn numbers_of_python_are_kept() {
    let text = r#"{
  "a": [NaN, -Infinity, 1e999, {"__float__": "Infinity"}],
  "max_length": 1000000000000000019884624838656,
  "scale": 0.20868301391601562,
  "time_step_limit": [0.0, Infinity]
}"#;
    let expected = r#"{
  "a": [
    NaN,
    -Infinity,
    Infinity,
    {
      "__float__": "Infinity"
    }
  ],
  "max_length": 1000000000000000019884624838656,
  "scale": 0.20868301391601562,
  "time_step_limit": [
    0.0,
    Infinity
  ]
}
"#;
    let folder = written(&floats(), None);
    fs::write(folder.path().join("config.json"), text).unwrap();
    let [quantized, dense] = ["quantized", "dense"].map(|name| folder.path().join(name));
    let source = Checkpoint::open(folder.path()).unwrap();
    quantize_checkpoint(&source, &quantized, &QuantizeOptions::default(), quiet).unwrap();
    let source = Checkpoint::open(&quantized).unwrap();
    dequantize_checkpoint(&source, &dense, &DequantizeOptions::default(), quiet).unwrap();
    assert_eq!(
        fs::read_to_string(dense.join("config.json")).unwrap(),
        expected
    );
}

/// It would be lost in the new folder, which is no repository.
#[rstest]
fn a_file_that_git_lfs_has_not_fetched_is_named(
    #[values("tokenizer.json", "additional_chat_templates/tool.jinja")] name: &str,
) {
    let folder = written(&packed(), Some(&in_4bit()));
    let path = folder.path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(
        &path,
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    )
    .unwrap();
    let source = Checkpoint::open(folder.path()).unwrap();
    let out = folder.path().join("out");
    let error = dequantize_checkpoint(&source, &out, &DequantizeOptions::default(), quiet);
    assert_eq!(error.unwrap_err(), Nf4Error::GitLfsPointer { path });
    assert!(!out.exists());
}

/// As in a cache whose blobs are gone.
#[cfg(unix)]
#[rstest]
fn a_link_that_leads_nowhere_is_named(#[values("tokenizer.json", "config.json")] name: &str) {
    let folder = written(&packed(), None);
    let path = folder.path().join(name);
    std::os::unix::fs::symlink(folder.path().join("nowhere"), &path).unwrap();
    let source = Checkpoint::open(folder.path()).unwrap();
    let out = folder.path().join("out");
    let error = dequantize_checkpoint(&source, &out, &DequantizeOptions::default(), quiet);
    assert!(
        matches!(&error, Err(Nf4Error::Io { path: at, .. }) if *at == path),
        "{error:?}"
    );
    assert!(!out.exists());
}
