//! Folders of weights in NVFP4, MXFP4 and FP8, and what their configurations say of them.
#![cfg(feature = "checkpoint")]

mod blocks;
mod stored;

use std::fs;

use blocks::{dequantized, tensors};
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{
    Checkpoint, DequantizeOptions, GroupWeights, QuantMethod, dequantize_checkpoint, verify,
};
use burn_nf4::format::{FloatType, QuantType};
use rstest::rstest;
use serde_json::{Value, json};
use stored::{Stored, Tensors, floats, quiet, sine};
use tempfile::TempDir;

const UP: &str = "model.layers.0.mlp.up_proj";
const DOWN: &str = "model.layers.0.mlp.down_proj";

fn written(tensors: &Tensors, config: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    stored::write(folder.path(), tensors);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

/// A layer from a golden file, beside a head, a table, a router and a norm in floats.
fn model(file: &str) -> Tensors {
    let mut all = tensors(file, &format!("{UP}."));
    for key in [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate.weight",
    ] {
        all.insert(key.into(), floats(&sine(64), &[8, 8]));
    }
    all.insert("model.norm.weight".into(), floats(&sine(8), &[8]));
    all
}

fn group(weights: Value, targets: &[&str]) -> Value {
    json!({"weights": weights, "targets": targets, "input_activations": null})
}

fn nvfp4() -> Value {
    json!({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": true})
}

fn mxfp4() -> Value {
    json!({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": true})
}

fn fp8(strategy: &str) -> Value {
    json!({"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": true,
           "block_structure": if strategy == "block" { json!([128, 128]) } else { json!(null) }})
}

fn compressed(format: &str, groups: Value, ignore: &[&str]) -> Value {
    json!({"quantization_config": {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": groups,
        "ignore": ignore,
    }})
}

fn compressed_nvfp4() -> Value {
    let groups = json!({"group_0": group(nvfp4(), &["Linear"])});
    compressed("nvfp4-pack-quantized", groups, &["lm_head"])
}

/// Inputs are multiplied with a Hadamard matrix first.
fn transformed() -> Value {
    let mut config = compressed_nvfp4();
    let apply = json!([{"targets": ["Linear"], "location": "input"}]);
    config["quantization_config"]["transform_config"] =
        json!({"config_groups": {"u": {"type": "hadamard", "apply": apply}}});
    config
}

fn compressed_mxfp4() -> Value {
    let groups = json!({"group_0": group(mxfp4(), &["Linear"])});
    compressed("mxfp4-pack-quantized", groups, &["lm_head"])
}

fn compressed_fp8(strategy: &str) -> Value {
    let groups = json!({"group_0": group(fp8(strategy), &["Linear"])});
    compressed("float-quantized", groups, &["re:.*lm_head"])
}

fn modelopt(algorithm: &str) -> Value {
    json!({"quantization_config": {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}})
}

fn deepseek() -> Value {
    json!({"quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }})
}

/// The last part of a key changed, as other libraries name the same tensors.
fn renamed(mut tensors: Tensors, from: &str, to: &str) -> Tensors {
    let tensor = tensors.remove(&format!("{UP}.{from}")).unwrap();
    tensors.insert(format!("{UP}.{to}"), tensor);
    tensors
}

/// One scale for all of a weight.
fn per_tensor(mut tensors: Tensors) -> Tensors {
    tensors.insert(format!("{UP}.weight_scale"), floats(&[0.5], &[]));
    tensors
}

/// Catches a kind of folder that is refused, and values that change on the way to a folder of floats.
#[rstest]
#[case(model("nvfp4_ct_17x64"), compressed_nvfp4(), QuantType::Nvfp4)]
#[case(model("mxfp4_ct_17x64"), compressed_mxfp4(), QuantType::Mxfp4)]
#[case(
    model("fp8_channel_200x300"),
    compressed_fp8("channel"),
    QuantType::Fp8Channel
)]
#[case(
    per_tensor(model("fp8_channel_200x300")),
    compressed_fp8("tensor"),
    QuantType::Fp8Channel
)]
#[case(
    renamed(model("fp8_block128_200x300"), "weight_scale_inv", "weight_scale"),
    compressed_fp8("block"),
    QuantType::Fp8Block
)]
#[case(model("nvfp4_modelopt_17x64"), modelopt("NVFP4"), QuantType::Nvfp4)]
#[case(
    per_tensor(model("fp8_channel_200x300")),
    modelopt("FP8"),
    QuantType::Fp8Channel
)]
#[case(model("fp8_block128_200x300"), deepseek(), QuantType::Fp8Block)]
fn a_folder_is_read_and_dequantized(
    #[case] mut tensors: Tensors,
    #[case] mut config: Value,
    #[case] quant_type: QuantType,
) {
    let up = format!("{UP}.weight");
    let scales = [
        format!("{UP}.input_scale"),
        "model.layers.0.self_attn.k_scale".into(),
        "model.layers.0.self_attn.v_scale".into(),
    ];
    for key in &scales {
        tensors.insert(key.clone(), floats(&[0.25], &[1]));
    }
    config["torch_dtype"] = "float32".into();
    let folder = written(&tensors, &config);
    let source = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(source.faults(), []);
    assert_eq!(source.activation_scales(), scales);
    let parameters = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate.weight",
        &up,
        "model.norm.weight",
    ];
    assert_eq!(source.parameters(), parameters);
    assert_eq!(source.quantized_weights(), [&up]);
    let form = source.weight_form(&up).unwrap();
    assert_eq!(
        (form.dtype, form.config.quant_type),
        (FloatType::F32, quant_type)
    );
    let of_weight = tensors.iter().filter(|(key, _)| key.starts_with(&up));
    let bytes: usize = of_weight.map(|(_, tensor)| tensor.bytes.len()).sum();
    assert_eq!(source.parameter_bytes(&up), bytes);

    let out = folder.path().join("out");
    dequantize_checkpoint(&source, &out, &DequantizeOptions::default(), quiet).unwrap();
    let dense = Checkpoint::open(&out).unwrap();
    assert_eq!(dense.faults(), []);
    let values: Vec<f32> = source.load_quantized(&up).unwrap().dequantize();
    assert_eq!(dense.load_float::<f32>(&up).unwrap().0, values);
    assert!(verify(&source, &dense, quiet).unwrap().is_within(0.0, 0.0));
}

/// ModelOpt's own file says the same, and does not go along into a folder of floats.
#[test]
fn the_file_of_modelopt_is_a_claim() {
    let folder = written(&model("nvfp4_modelopt_17x64"), &json!({}));
    let open = || Checkpoint::open(folder.path()).unwrap();
    assert_eq!(open().faults().len(), 1);
    let own = json!({
        "producer": {"name": "modelopt", "version": "0.33"},
        "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
                         "exclude_modules": ["lm_head", "model.layers.*.mlp.gate"]},
    });
    let path = folder.path().join("hf_quant_config.json");
    fs::write(&path, own.to_string()).unwrap();
    let source = open();
    assert_eq!(source.faults(), []);
    let [claim] = &source.quant_claims().unwrap()[..] else {
        panic!("one claim");
    };
    assert_eq!(claim.method, QuantMethod::ModelOpt);
    assert_eq!(claim.part, "hf_quant_config.json");
    assert!(claim.quantizes_cache);
    let in_nvfp4 = GroupWeights::Quantized(QuantType::Nvfp4);
    assert!(claim.groups.iter().all(|group| group.weights == in_nvfp4));
    let out = folder.path().join("out");
    dequantize_checkpoint(&source, &out, &DequantizeOptions::default(), quiet).unwrap();
    assert!(!out.join("hf_quant_config.json").exists());

    for malformed in ["[1", "{}", r#"{"quantization": 4}"#] {
        fs::write(&path, malformed).unwrap();
        let faults = open().faults();
        assert!(
            matches!(&faults[..], [Nf4Error::ModelConfig { .. }]),
            "{faults:?}"
        );
    }
}

/// Catches groups that are mixed up.
#[rstest]
#[case::as_targeted("NVFP4A16", &["re:.*up_proj$"], "FP8_DYNAMIC", &["re:.*down_proj$"], None)]
#[case::by_name("NVFP4A16", &[UP], "FP8_DYNAMIC", &["Linear"], None)]
#[case::the_other_way_round("NVFP4A16", &["re:.*down_proj$"], "FP8_DYNAMIC", &["re:.*up_proj$"], Some("to be quantized as"))]
#[case::one_is_missing("NVFP4A16", &["re:.*up_proj$"], "FP8_DYNAMIC", &["re:.*o_proj$"], Some("not targeted"))]
fn groups_are_told_apart(
    #[case] first: &str,
    #[case] of_first: &[&str],
    #[case] second: &str,
    #[case] of_second: &[&str],
    #[case] fault: Option<&str>,
) {
    let mut all = model("nvfp4_ct_17x64");
    all.extend(tensors("fp8_channel_200x300", &format!("{DOWN}.")));
    let groups = json!({first: of_first, second: of_second});
    let config = compressed("mixed-precision", groups, &["lm_head"]);
    let folder = written(&all, &config);
    let faults = Checkpoint::open(folder.path()).unwrap().faults();
    assert_claim(&faults, fault);
}

#[track_caller]
fn assert_claim(faults: &[Nf4Error], words: Option<&str>) {
    match (faults, words) {
        ([], None) => {}
        ([Nf4Error::Config { field, given, .. }, ..], Some(words)) => {
            assert_eq!(*field, "quantization_config");
            assert!(given.contains(words), "{given}");
        }
        _ => panic!("{faults:?}"),
    }
}

/// Catches lists that are not compared with the tensors.
#[rstest]
#[case::ignored(json!(["Linear"]), json!(["lm_head", UP]), Some("is to be ignored"))]
#[case::ignored_by_a_pattern(json!(["Linear"]), json!(["lm_head", "re:.*mlp.*"]), Some("is to be ignored"))]
#[case::not_ignored(json!(["Linear"]), json!(["lm_head", "mlp"]), None)]
#[case::floats_that_are_targeted(json!(["Linear"]), json!([]), Some("`model.other` is targeted"))]
#[case::floats_by_name(json!(["Linear", "model.other"]), json!(["lm_head"]), Some("`model.other` is targeted"))]
#[case::floats_that_are_ignored(json!(["Linear"]), json!(["model.other"]), None)]
#[case::floats_under_another_name(json!(["Linear"]), json!(["other"]), None)]
#[case::floats_that_are_not_targeted(json!(["re:.*proj"]), json!([]), None)]
#[case::a_class_that_nobody_knows(json!(["LlamaMLP"]), json!([]), None)]
#[case::no_pattern(json!(["re:("]), json!([]), Some(""))]
fn modules_are_compared_with_lists(
    #[case] targets: Value,
    #[case] mut ignore: Value,
    #[case] fault: Option<&str>,
) {
    let mut tensors = model("nvfp4_ct_17x64");
    let other = fault.is_some_and(|words| words.contains("other"))
        || ignore.to_string().contains("other")
        || targets.to_string().contains("re:.*proj");
    if other {
        tensors.insert("model.other.weight".into(), floats(&sine(64), &[8, 8]));
    }
    ignore.as_array_mut().unwrap().push("lm_head".into());
    let groups = json!({"group_0": {"weights": nvfp4(), "targets": targets}});
    let mut config = compressed("nvfp4-pack-quantized", groups, &[]);
    config["quantization_config"]["ignore"] = ignore;
    let folder = written(&tensors, &config);
    let faults = Checkpoint::open(folder.path()).unwrap().faults();
    match fault {
        Some("") => assert!(
            matches!(&faults[..], [Nf4Error::Pattern { .. }]),
            "{faults:?}"
        ),
        fault => assert_claim(&faults, fault),
    }
}

/// Catches a format that is taken for one that is read.
#[rstest]
#[case(json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}), "pack-quantized", "int weights of 4 bit by group of 128")]
#[case(json!({"num_bits": 8, "type": "int", "strategy": "channel"}), "int-quantized", "int weights of 8 bit by channel")]
#[case(json!({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": false}), "nvfp4-pack-quantized", "zero points")]
#[case(json!({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}), "mxfp8-quantized", "float weights of 8 bit by group of 32")]
#[case(json!({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 128]}), "float-quantized", "[64, 128]")]
#[case(nvfp4(), "dense", "stored as dense")]
fn other_formats_are_told(#[case] weights: Value, #[case] format: &str, #[case] words: &str) {
    let groups = json!({"group_0": group(weights, &["Linear"])});
    let config = compressed(format, groups, &["lm_head"]);
    let folder = written(&model("nvfp4_ct_17x64"), &config);
    let source = Checkpoint::open(folder.path()).unwrap();
    assert_claim(&source.faults(), Some(words));
    let out = folder.path().join("out");
    let error = dequantize_checkpoint(&source, &out, &DequantizeOptions::default(), quiet);
    assert_eq!(Some(&error.unwrap_err()), source.faults().first());
}

#[rstest]
#[case(model("nvfp4_modelopt_17x64"), modelopt("NVFP4_AWQ"), "NVFP4_AWQ")]
#[case(
    model("fp8_block128_200x300"),
    modelopt("FP8_PB_WO"),
    "weights in FP8_PB_WO"
)]
#[case(
    model("nvfp4_modelopt_17x64"),
    modelopt("FP8"),
    "to be quantized as fp8channel"
)]
#[case(
    model("nvfp4_ct_17x64"),
    transformed(),
    "transforms of weights or inputs"
)]
#[case(model("nvfp4_ct_17x64"), json!({}), "not there")]
#[case(model("nvfp4_ct_17x64"), json!({"quantization_config": {"load_in_4bit": true}}), "no weight is quantized")]
#[case(model("nvfp4_ct_17x64"), json!({"quantization_config": {"quant_method": "gptq"}}), "gptq")]
#[case(model("fp8_block128_200x300"), json!({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}), "e5m2")]
#[case(model("fp8_block128_200x300"), json!({"quantization_config": {"quant_method": "mxfp4"}}), "to be quantized as mxfp4")]
fn other_claims_are_told(#[case] tensors: Tensors, #[case] config: Value, #[case] words: &str) {
    let folder = written(&tensors, &config);
    assert_claim(
        &Checkpoint::open(folder.path()).unwrap().faults(),
        Some(words),
    );
}

/// A claim of what is not there.
#[rstest]
fn nothing_is_quantized(
    #[values(compressed_nvfp4(), modelopt("NVFP4"), deepseek())] config: Value,
) {
    let tensors = Tensors::from([(format!("{UP}.weight"), floats(&sine(64), &[8, 8]))]);
    let folder = written(&tensors, &config);
    let faults = Checkpoint::open(folder.path()).unwrap().faults();
    assert_claim(&faults, Some("no weight is quantized"));
}

/// Scales of tiles say how many they are, not how large a tile is.
#[test]
fn tiles_of_another_size_are_refused() {
    let mut config = deepseek();
    config["quantization_config"]["weight_block_size"] = json!([64, 64]);
    let folder = written(&model("fp8_block128_200x300"), &config);
    let source = Checkpoint::open(folder.path()).unwrap();
    let error = source.load_quantized(&format!("{UP}.weight")).unwrap_err();
    let expected = Nf4Error::Config {
        field: "weight_block_size",
        expected: "[128, 128]",
        given: "[64, 64]".into(),
    };
    assert_eq!(error, expected);
    assert_eq!(source.faults().first(), Some(&expected));
}

/// The dtype is that of the configuration; without one it is bf16.
#[rstest]
#[case(json!({}), Ok(FloatType::BF16))]
#[case(json!({"dtype": "float16", "torch_dtype": "float32"}), Ok(FloatType::F16))]
#[case(json!({"torch_dtype": "torch.float32"}), Ok(FloatType::F32))]
#[case(json!({"text_config": {"dtype": "float16"}}), Ok(FloatType::F16))]
#[case(json!({"dtype": "float64"}), Err("float64"))]
fn the_dtype_is_that_of_the_configuration(
    #[case] config: Value,
    #[case] expected: Result<FloatType, &str>,
) {
    let folder = written(&model("nvfp4_ct_17x64"), &config);
    let source = Checkpoint::open(folder.path()).unwrap();
    match (source.weight_form(&format!("{UP}.weight")), expected) {
        (Ok(form), Ok(dtype)) => assert_eq!(form.dtype, dtype),
        (Err(Nf4Error::ModelConfig { message, .. }), Err(name)) => {
            assert!(message.contains(name), "{message}");
        }
        (given, expected) => panic!("{given:?}, expected {expected:?}"),
    }
}

/// Numbers of other modules are parameters, whatever they are called.
#[test]
fn scales_of_activations_belong_to_quantized_layers() {
    let mut tensors = model("nvfp4_ct_17x64");
    let other = "model.vision.input_scale";
    tensors.insert(other.into(), floats(&[1.0], &[1]));
    tensors.insert(format!("{UP}.input_global_scale"), floats(&[1.0], &[1]));
    let folder = written(&tensors, &compressed_nvfp4());
    let source = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(
        source.activation_scales(),
        [format!("{UP}.input_global_scale")]
    );
    assert!(source.parameters().contains(&other));
    // And alone they tell of a weight that is not there.
    let expected = Nf4Error::OtherQuantization {
        tensor: other.into(),
        method: "FP8, FP4 or int8 with scales",
    };
    assert_eq!(source.faults(), [expected]);
}

/// A scale of the keys that attention keeps is one number, or one a head; a model may have learned another.
#[rstest]
#[case::one(&[1], true)]
#[case::scalar(&[], true)]
#[case::of_each_head(&[4, 1, 1], true)]
#[case::vector(&[8], false)]
#[case::matrix(&[4, 8], false)]
fn scales_of_attention_are_told_by_their_shape(#[case] shape: &[usize], #[case] is_scale: bool) {
    let key = "model.layers.0.self_attn.k_scale";
    let mut tensors = model("nvfp4_ct_17x64");
    let values = sine(shape.iter().product());
    tensors.insert(key.into(), floats(&values, shape));
    let folder = written(&tensors, &compressed_nvfp4());
    let source = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(source.faults(), []);
    assert_eq!(source.activation_scales() == [key], is_scale);
    assert_eq!(source.parameters().contains(&key), !is_scale);
}

/// The parts of a weight may lie in different shards.
#[test]
fn a_weight_may_lie_in_two_shards() {
    let folder = tempfile::tempdir().unwrap();
    let mut map = serde_json::Map::new();
    for (number, (key, tensor)) in tensors("nvfp4_ct_17x64", "up.").into_iter().enumerate() {
        let name = format!("model-0000{}-of-00003.safetensors", number + 1);
        let one: Tensors = [(key.clone(), tensor)].into();
        fs::write(folder.path().join(&name), stored::to_bytes(&one)).unwrap();
        map.insert(key, name.into());
    }
    let index = json!({ "weight_map": map }).to_string();
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    let source = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(source.parameters(), ["up.weight"]);
    let values: Vec<f32> = source.load_quantized("up.weight").unwrap().dequantize();
    assert_eq!(values, dequantized("nvfp4_ct_17x64"));
}

/// Scales of rows in bf16 are the same numbers.
#[test]
fn scales_in_bf16_are_widened() {
    let mut tensors = tensors("fp8_channel_200x300", "");
    let scales = tensors.get_mut("weight_scale").unwrap();
    let rounded = scales.bytes.chunks(4).flat_map(|bytes| bytes[2..].to_vec());
    *scales = Stored {
        dtype: burn_nf4::checkpoint::Dtype::BF16,
        shape: vec![200],
        bytes: rounded.collect(),
    };
    let mut wide = tensors.clone();
    let bf16 = &wide["weight_scale"].bytes;
    let bytes = bf16.chunks(2).flat_map(|bytes| [0, 0, bytes[0], bytes[1]]);
    let scales = Stored {
        dtype: burn_nf4::checkpoint::Dtype::F32,
        shape: vec![200, 1],
        bytes: bytes.collect(),
    };
    wide.insert("weight_scale".into(), scales);
    let load = |tensors| {
        let folder = written(tensors, &json!({}));
        Checkpoint::open(folder.path())
            .unwrap()
            .load_quantized("weight")
            .unwrap()
    };
    assert_eq!(load(&tensors), load(&wide));
}
