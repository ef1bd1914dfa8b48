//! Which layers are quantized, and how transformers is told of the others.
#![cfg(feature = "checkpoint")]

mod stored;

use std::path::Path;

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, QuantizeOptions, quantize_checkpoint};
use rstest::rstest;
use serde_json::{Value, json};
use stored::{config_of, quiet, write_model};
use tempfile::TempDir;

fn temp() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn open(path: impl AsRef<Path>) -> Checkpoint {
    Checkpoint::open(path).unwrap()
}

const LAYERS: [(&str, &[usize]); 12] = [
    ("lm_head.weight", &[16, 64]),
    ("model.embed_tokens.weight", &[16, 64]),
    ("model.layers.0.input_layernorm.weight", &[64]),
    ("model.layers.0.mlp.experts.0.up_proj.weight", &[64, 64]),
    ("model.layers.0.mlp.experts.down_proj", &[2, 64, 64]),
    ("model.layers.0.mlp.gate.weight", &[4, 64]),
    ("model.layers.0.mlp.gate_proj.weight", &[64, 64]),
    ("model.layers.0.mlp.shared_expert_gate.weight", &[1, 64]),
    ("model.layers.0.self_attn.q_proj.bias", &[64]),
    ("model.layers.0.self_attn.q_proj.weight", &[64, 64]),
    ("model.vision.patch_embed.weight", &[8, 4, 4]),
    ("transformer.wte.weight", &[16, 64]),
];

/// What is quantized of [`LAYERS`], and the entry that transformers reads.
fn selected(options: &QuantizeOptions, tensors: &[(&str, &[usize])]) -> (Vec<String>, Value) {
    let folder = temp();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    write_model(&source, &json!({"model_type": "llama"}), tensors);
    let converted = quantize_checkpoint(&open(&source), &out, options, quiet).unwrap();
    let written = open(&out);
    assert_eq!(written.parameters(), open(&source).parameters());
    let names: Vec<String> = written
        .quantized_weights()
        .iter()
        .map(|name| name.to_string())
        .collect();
    assert_eq!(converted.converted, names.len());
    assert_eq!(converted.kept, tensors.len() - names.len());
    let quantization = &config_of(&out)["quantization_config"];
    (names, quantization["llm_int8_skip_modules"].clone())
}

#[test]
fn linear_layers_are_quantized_and_the_rest_is_kept() {
    let (names, skipped) = selected(&QuantizeOptions::default(), &LAYERS);
    let linear = [
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ];
    assert_eq!(names, linear);
    // `gate` would also end the path of `shared_expert_gate`, which is quantized.
    let entries = ["lm_head", "up_proj", "mlp.gate"];
    assert_eq!(skipped, json!(entries));
}

/// transformers keeps heads and embeddings by itself, and tied heads only then.
#[test]
fn nothing_is_listed_where_transformers_knows() {
    let tensors: Vec<_> = LAYERS
        .into_iter()
        .filter(|(name, _)| !name.contains(".mlp."))
        .collect();
    let (names, skipped) = selected(&QuantizeOptions::default(), &tensors);
    assert_eq!(names, ["model.layers.0.self_attn.q_proj.weight"]);
    assert_eq!(skipped, Value::Null);
}

/// With any entry, transformers keeps no head by itself any more.
#[test]
fn heads_are_listed_with_the_others() {
    let tensors: [(&str, &[usize]); 4] = [
        ("gpt_neox.embed_in.weight", &[16, 64]),
        ("embed_out.weight", &[16, 64]),
        ("gpt_neox.layers.0.dense.weight", &[64, 64]),
        ("gpt_neox.time_embed.weight", &[64, 64]),
    ];
    let (names, skipped) = selected(&QuantizeOptions::default(), &tensors);
    assert_eq!(names, ["gpt_neox.layers.0.dense.weight"]);
    assert_eq!(skipped, json!(["lm_head", "embed_out", "time_embed"]));
}

/// The path of the kept layer begins and ends as paths of quantized ones do.
#[test]
fn an_entry_never_covers_a_quantized_layer() {
    let tensors: [(&str, &[usize]); 3] = [
        ("mlp.gate.weight", &[4, 64]),
        ("mlp.gate_proj.weight", &[64, 64]),
        ("other_mlp.gated.mlp.gate_gate.weight", &[64, 64]),
    ];
    let (names, skipped) = selected(&QuantizeOptions::default(), &tensors);
    assert_eq!(names.len(), 2);
    assert_eq!(skipped, json!(["lm_head", r"mlp\.gate$"]));
}

#[test]
fn experts_are_quantized_when_asked() {
    let options = QuantizeOptions {
        experts: true,
        ..QuantizeOptions::default()
    };
    let (names, _) = selected(&options, &LAYERS);
    let experts: Vec<&String> = names.iter().filter(|n| n.contains(".experts.")).collect();
    let expected = [
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.down_proj",
    ];
    assert_eq!(experts, expected);
}

/// The indices are those of `[n for n in MODULES if not should_convert_module(n, [pattern])]` with
/// transformers 5.24.
#[rstest]
#[case("model.layers.1", &[0, 1, 2])]
#[case("model.layers.1.", &[0, 1, 2, 3, 4])]
#[case(r"model.layers.1\.", &[0, 1, 2])]
#[case("model.layers", &[0, 1, 2, 3, 4])]
#[case("model.layers.*", &[0, 1, 2, 3, 4])]
#[case("model.layers.1.mlp.fc2", &[1])]
#[case("mlp.fc2", &[1])]
#[case("fc2", &[1])]
#[case("fc1", &[0, 3])]
#[case("1.mlp.fc1", &[0])]
#[case("0.mlp.fc1", &[3])]
#[case("layers.1", &[])]
#[case("model", &[0, 1, 2, 3, 4, 5])]
#[case("mod", &[])]
#[case("other|model.layers.1", &[0, 1, 2])]
#[case("model.layers.1|model.vision", &[0, 1, 2, 5])]
#[case("model.layers.1$", &[])]
#[case(r"model\.layers\.(0|1)\.mlp", &[0, 1, 2])]
#[case(r"model\.layers\.1[01]", &[3, 4])]
#[case(r".*\.q_proj", &[4, 5])]
#[case("model.*fc2", &[1])]
#[case("", &[0, 1, 2, 3, 4, 5])]
#[case("^model.layers.10", &[3])]
#[case("model.layers.1.mlp.f", &[])]
#[case("vision", &[])]
#[case("_proj", &[2, 4, 5])]
#[case("model.vision", &[5])]
#[case("(?i:MODEL.LAYERS.1)", &[0, 1, 2])]
#[case("model.layers.1.mlp.fc1.weight", &[])]
fn modules_are_kept_as_transformers_keeps_them(#[case] pattern: &str, #[case] kept: &[usize]) {
    const MODULES: [&str; 6] = [
        "model.layers.1.mlp.fc1",
        "model.layers.1.mlp.fc2",
        "model.layers.1.mlp.fc2_proj",
        "model.layers.10.mlp.fc1",
        "model.layers.11.attn.q_proj",
        "model.vision.layers.1.q_proj",
    ];
    let keys = MODULES.map(|module| format!("{module}.weight"));
    let tensors = keys
        .each_ref()
        .map(|key| (key.as_str(), [64, 64].as_slice()));
    let options = QuantizeOptions {
        skip_modules: vec![pattern.into()],
        ..QuantizeOptions::default()
    };
    if kept.is_empty() {
        return refused(pattern, &options, &tensors);
    }
    let (names, skipped) = selected(&options, &tensors);
    // What quantizes nothing claims nothing, and needs no list.
    let listed = match names.is_empty() {
        true => Value::Null,
        false => json!(["lm_head", pattern]),
    };
    assert_eq!(skipped, listed);
    let expected = keys.iter().enumerate();
    let expected = expected.filter(|(index, _)| !kept.contains(index));
    assert!(names.iter().eq(expected.map(|(_, key)| key)), "{names:?}");
}

/// transformers passes over an entry that keeps nothing.
fn refused(entry: &str, options: &QuantizeOptions, tensors: &[(&str, &[usize])]) {
    let folder = temp();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    write_model(&source, &json!({"model_type": "llama"}), tensors);
    match quantize_checkpoint(&open(&source), &out, options, quiet) {
        Err(Nf4Error::Config { field, given, .. }) => {
            assert_eq!(field, "skip_modules");
            assert_eq!(given, format!("`{entry}`, which fits no module"));
        }
        other => panic!("{other:?}"),
    }
    assert!(!out.exists());
}

/// As `should_convert_module` of transformers 5.24 has it.
#[rstest]
#[case::end_of_a_path("q_proj", &["k_proj", "0.mlp.up_proj", "1.mlp.up_proj"])]
#[case::beginning_of_a_path("model.layers.0", &["1.mlp.up_proj"])]
#[case::regular_expression(r"model\.layers\.\d+\.mlp", &["q_proj", "k_proj"])]
#[case::whole_path("model.layers.0.mlp.up_proj", &["q_proj", "k_proj", "1.mlp.up_proj"])]
fn named_modules_are_kept(#[case] pattern: &str, #[case] quantized: &[&str]) {
    let tensors: [(&str, &[usize]); 4] = [
        ("model.layers.0.attn.q_proj.weight", &[64, 64]),
        ("model.layers.0.attn.k_proj.weight", &[64, 64]),
        ("model.layers.0.mlp.up_proj.weight", &[64, 64]),
        ("model.layers.1.mlp.up_proj.weight", &[64, 64]),
    ];
    let options = QuantizeOptions {
        skip_modules: vec![pattern.into()],
        ..QuantizeOptions::default()
    };
    let (names, skipped) = selected(&options, &tensors);
    assert_eq!(skipped, json!(["lm_head", pattern]));
    assert_eq!(names.len(), quantized.len(), "{names:?}");
    for end in quantized {
        let end = format!("{end}.weight");
        assert!(names.iter().any(|name| name.ends_with(&end)), "{names:?}");
    }
}

#[test]
fn a_pattern_that_is_no_regular_expression_is_named() {
    let folder = temp();
    write_model(folder.path(), &json!({}), &[("up.weight", &[64, 64])]);
    let options = QuantizeOptions {
        skip_modules: vec!["layers.(0".into()],
        ..QuantizeOptions::default()
    };
    let out = folder.path().join("out");
    let error = quantize_checkpoint(&open(folder.path()), &out, &options, quiet);
    assert!(
        matches!(&error, Err(Nf4Error::Pattern { pattern, .. }) if pattern == "layers.(0"),
        "{error:?}"
    );
    assert!(!out.exists());
}
