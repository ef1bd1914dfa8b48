//! What a `config.json` may say, and what a checkpoint must hold.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use burn::tensor::Device;
use burn_nf4::checkpoint::{
    Checkpoint, CheckpointStore, DequantizeOptions, SINGLE_FILE, dequantize_checkpoint,
};
use burn_nf4::{Nf4Error, TensorMisfit};
use burn_nf4_llm::error::ModelError;
use burn_nf4_llm::model::config::{Biases, DecoderConfig, GenerationConfig};
use burn_nf4_llm::model::load;
use burn_nf4_llm::model::rope::RopeConfig;
use rstest::rstest;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::fixtures::{fixture, open};

/// A small config with some fields set, or with `null` taken out.
pub fn config(fields: Value) -> Result<DecoderConfig, ModelError> {
    let mut config = json!({
        "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    });
    for (key, value) in fields.as_object().unwrap() {
        config[key] = value.clone();
    }
    DecoderConfig::from_json(
        &serde_json::to_vec(&config).unwrap(),
        Path::new("config.json"),
    )
}

#[derive(Deserialize)]
struct RopeCase {
    name: String,
    head_dim: usize,
    config: Value,
    sequence: usize,
    #[serde(flatten)]
    rope: Rope,
}

/// What a rotary embedding computes.
#[derive(Deserialize)]
pub struct Rope {
    inverse_frequencies: Vec<f32>,
    attention_factor: f64,
}

impl Rope {
    /// Compares a config of ours for a sequence of this length.
    pub fn assert_is(&self, ours: &RopeConfig, sequence: usize, name: &str) {
        let frequencies = ours.inverse_frequencies(sequence);
        assert_eq!(frequencies.len(), self.inverse_frequencies.len(), "{name}");
        for (ours, theirs) in frequencies.iter().zip(&self.inverse_frequencies) {
            // Powers of different libraries differ by an ulp or two, 1.2e-7 each.
            let relative = (ours - theirs).abs() / theirs;
            assert!(relative < 1e-6, "{name}: {ours:e} and {theirs:e}");
        }
        let difference = (ours.attention_factor() - self.attention_factor).abs();
        assert!(difference < 1e-12, "{name}: {difference:e}");
    }
}

/// `rope.json` comes from `make_rope.py`, transformers' formulas in numpy.
#[test]
fn rotary_frequencies_are_those_of_transformers() {
    let text = std::fs::read(fixture("rope.json")).unwrap();
    let cases: Vec<RopeCase> = serde_json::from_slice(&text).unwrap();
    assert!(cases.len() > 10);
    for case in cases {
        let mut fields = case.config;
        fields["head_dim"] = case.head_dim.into();
        let rope = config(fields).unwrap().ropes.remove(0);
        case.rope.assert_is(&rope, case.sequence, &case.name);
    }
}

#[rstest]
#[case::family(json!({"model_type": "gemma"}), "model_type")]
#[case::activation(json!({"hidden_act": "gelu"}), "hidden_act")]
#[case::longrope(json!({"rope_scaling": {"type": "longrope"}}), "rope_scaling.short_factor")]
#[case::no_factor(json!({"rope_parameters": {"rope_type": "linear"}}), "rope_parameters.factor")]
#[case::partial(json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor")]
#[case::heads(json!({"num_key_value_heads": 3}), "num_key_value_heads")]
#[case::odd_head(json!({"head_dim": 7}), "head_dim")]
#[case::no_head(json!({"head_dim": 0}), "head_dim")]
#[case::long_head(json!({"head_dim": 258}), "head_dim")]
#[case::no_layers(json!({"num_hidden_layers": 0}), "num_hidden_layers")]
#[case::no_positions(json!({"max_position_embeddings": null}), "max_position_embeddings")]
#[case::text_for_a_number(json!({"num_attention_heads": "4"}), "num_attention_heads")]
#[case::float_for_a_count(json!({"vocab_size": 256.0}), "vocab_size")]
#[case::null_for_a_count(json!({"hidden_size": null}), "hidden_size")]
#[case::negative(json!({"intermediate_size": -1}), "intermediate_size")]
#[case::tied_null(json!({"tie_word_embeddings": null}), "tie_word_embeddings")]
#[case::tied_text(json!({"tie_word_embeddings": "true"}), "tie_word_embeddings")]
#[case::tied_number(json!({"tie_word_embeddings": 1}), "tie_word_embeddings")]
#[case::bias_text(json!({"attention_bias": "false"}), "attention_bias")]
#[case::eps_nan(json!({"rms_norm_eps": {"$python::number": "NaN"}}), "rms_norm_eps")]
#[case::eos_text(json!({"eos_token_id": "</s>"}), "eos_token_id")]
#[case::eos_negative(json!({"eos_token_id": [2, -1]}), "eos_token_id")]
#[case::eps_negative(json!({"rms_norm_eps": -1e-6}), "rms_norm_eps")]
#[case::softcap(json!({"model_type": "gemma2", "attn_logit_softcapping": 1e5}), "attn_logit_softcapping")]
#[case::scalar(json!({"model_type": "gemma2", "query_pre_attn_scalar": 1e-20}), "query_pre_attn_scalar")]
#[case::scalar_of_gemma3(json!({"model_type": "gemma3_text", "query_pre_attn_scalar": 1e-20}), "query_pre_attn_scalar")]
#[case::multiplier(json!({"model_type": "granite", "attention_multiplier": 1e9}), "attention_multiplier")]
#[case::not_causal(json!({"is_causal": false}), "is_causal")]
#[case::causal_null(json!({"model_type": "qwen2", "is_causal": null}), "is_causal")]
#[case::layers_of_their_own(json!({"per_layer_config": {"0": {"intermediate_size": 48}}}), "per_layer_config")]
#[case::window_in_some_layers(
    json!({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}),
    "layer_types"
)]
#[case::too_few_types(json!({"layer_types": ["full_attention"]}), "layer_types")]
#[case::no_window(json!({"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 0}), "sliding_window")]
#[case::gptq(json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}), "quantization_config.quant_method")]
#[case::awq(json!({"quantization_config": {"quant_method": "awq"}}), "quantization_config.quant_method")]
#[case::eight_bit(
    json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}),
    "quantization_config.load_in_8bit"
)]
#[case::eight_bit_beneath(
    json!({"quantization_config": {"quant_method": "bitsandbytes", "_load_in_8bit": true}}),
    "quantization_config._load_in_8bit"
)]
#[case::eight_bit_as_text(json!({"quantization_config": {"load_in_8bit": "true"}}), "quantization_config.load_in_8bit")]
#[case::compressed(json!({"compression_config": {"format": "int-quantized"}}), "compression_config")]
fn what_is_not_implemented_is_refused_by_name(#[case] fields: Value, #[case] name: &str) {
    match config(fields) {
        Err(ModelError::Unsupported { field, .. }) => assert_eq!(field, name),
        other => panic!("{other:?}"),
    }
}

/// What transformers' classes do not read, or have under another name.
#[rstest]
#[case::pretraining(json!({"pretraining_tp": 2}))]
#[case::causal(json!({"is_causal": true}))]
#[case::swish(json!({"hidden_act": "swish"}))]
#[case::window_of_a_llama(json!({"sliding_window": 8, "use_sliding_window": true}))]
#[case::types_of_all_layers(json!({"layer_types": ["full_attention", "full_attention"]}))]
#[case::types_of_a_mistral(json!({
    "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention"],
}))]
#[case::packed(json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}))]
#[case::compressed(json!({"quantization_config": {"quant_method": "compressed-tensors"}}))]
#[case::modelopt(json!({"quantization_config": {"quant_method": "modelopt"}}))]
#[case::fp8(json!({"quantization_config": {"quant_method": "fp8"}}))]
#[case::experts_alone(json!({"quantization_config": {"quant_method": "mxfp4"}}))]
#[case::packed_by_its_other_name(json!({"quantization_config": {"quant_method": "bitsandbytes_4bit"}}))]
#[case::packed_older(json!({"quantization_config": {"load_in_4bit": true, "load_in_8bit": false}}))]
#[case::no_quantization(json!({"quantization_config": null, "per_layer_config": null}))]
#[case::floats_of_python(json!({"time_step_limit": [0.0, {"$python::number": "Infinity"}]}))]
fn what_changes_nothing_is_read(#[case] fields: Value) {
    config(fields).unwrap();
}

/// As `generate` of transformers 5.24.0 has it, but for the last two: there it would never end.
#[rstest]
#[case::one(json!(3), None, &[3])]
#[case::several(json!([3, 4]), None, &[3, 4])]
#[case::none(Value::Null, None, &[])]
#[case::generation(json!(3), Some(json!({"eos_token_id": 5})), &[5])]
#[case::several_of_generation(json!([3, 4]), Some(json!({"eos_token_id": [5, 6]})), &[5, 6])]
#[case::generation_alone(Value::Null, Some(json!({"eos_token_id": 5})), &[5])]
#[case::generation_without(json!(3), Some(json!({"temperature": 0.6})), &[3])]
#[case::generation_null(json!([3, 4]), Some(json!({"eos_token_id": null})), &[3, 4])]
fn the_tokens_that_end_a_text_are_those_of_generation(
    #[case] config: Value,
    #[case] generation: Option<Value>,
    #[case] expected: &[u32],
) {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "llama", "eos_token_id": config});
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    if let Some(generation) = generation {
        let path = folder.path().join("generation_config.json");
        fs::write(path, generation.to_string()).unwrap();
    }
    let config = DecoderConfig::from_folder(folder.path()).unwrap();
    assert_eq!(config.eos_token_ids, expected);
}

fn generation(fields: Value) -> Result<GenerationConfig, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("generation_config.json");
    fs::write(path, fields.to_string()).unwrap();
    GenerationConfig::from_folder(folder.path())
}

/// Of which transformers makes a processor of the logits, or another search than the greedy one.
#[rstest]
#[case::penalty(json!({"encoder_repetition_penalty": 1.5}), &["encoder_repetition_penalty: 1.5"])]
#[case::several(
    json!({"no_repeat_ngram_size": 2, "do_sample": true, "temperature": 0.7, "num_beams": 3}),
    &["no_repeat_ngram_size: 2", "num_beams: 3"]
)]
#[case::tokens(
    json!({"begin_suppress_tokens": [3], "forced_eos_token_id": 2, "suppress_tokens": [5, 6]}),
    &["begin_suppress_tokens: [3]", "forced_eos_token_id: 2", "suppress_tokens: [5, 6]"]
)]
#[case::words(
    json!({"bad_words_ids": [[4]], "sequence_bias": [[[4], -10.0]]}),
    &["bad_words_ids: [[4]]", "sequence_bias: [[[4], -10.0]]"]
)]
#[case::lengths(
    json!({"exponential_decay_length_penalty": [2, 5.0], "min_length": 4, "min_new_tokens": 5}),
    &["exponential_decay_length_penalty: [2, 5.0]", "min_length: 4", "min_new_tokens: 5"]
)]
#[case::guidance(json!({"guidance_scale": 2}), &["guidance_scale: 2"])]
#[case::without_effect(
    json!({
        "repetition_penalty": 1.5, "min_p": 0.1, "num_beams": 1, "min_length": 0, "suppress_tokens": [],
        "guidance_scale": null, "forced_eos_token_id": null, "max_length": 20, "token_healing": false,
    }),
    &[]
)]
fn fields_of_generation_that_are_not_applied_are_told(
    #[case] fields: Value,
    #[case] expected: &[&str],
) {
    let generation = generation(fields).unwrap();
    assert_eq!(generation.not_applied, expected);
    assert_eq!(generation.warn_of_fields().is_some(), !expected.is_empty());
}

#[test]
fn settings_of_draws_are_those_of_generation() {
    let given = generation(json!({"repetition_penalty": 1.5, "min_p": 0.25})).unwrap();
    assert_eq!(
        (given.repetition_penalty, given.min_p),
        (Some(1.5), Some(0.25))
    );
    let none = generation(json!({"repetition_penalty": null})).unwrap();
    assert_eq!((none.repetition_penalty, none.min_p), (None, None));
    let error = generation(json!({"min_p": "much"})).unwrap_err();
    assert!(error.to_string().contains("min_p"), "{error}");
}

#[rstest]
#[case::one(json!("x"), Some(vec!["x"]))]
#[case::several(json!(["x", "yz"]), Some(vec!["x", "yz"]))]
#[case::none(Value::Null, Some(vec![]))]
#[case::empty(json!(["x", ""]), None)]
#[case::number(json!(3), None)]
fn stop_strings_are_those_of_generation(
    #[case] fields: Value,
    #[case] expected: Option<Vec<&str>>,
) {
    match (generation(json!({"stop_strings": fields})), expected) {
        (Ok(generation), Some(expected)) => assert_eq!(generation.stop_strings, expected),
        (Err(ModelError::Unsupported { field, .. }), None) => assert_eq!(field, "stop_strings"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn fields_left_out_have_the_defaults_of_transformers() {
    let llama = config(json!({})).unwrap();
    assert_eq!((llama.num_key_value_heads, llama.head_dim), (4, 16));
    assert_eq!((llama.rms_norm_eps, llama.max_positions), (1e-6, 2048));
    assert!(!llama.tie_word_embeddings);
    assert_eq!(llama.eos_token_ids, [2]);
    assert!(
        config(json!({"eos_token_id": null}))
            .unwrap()
            .eos_token_ids
            .is_empty()
    );

    let window = json!({"sliding_window": 4096, "eos_token_id": [2, 5], "head_dim": 32});
    let llama = config(window.clone()).unwrap();
    assert_eq!(llama.layers[0].window, None, "Llama has no window");
    assert_eq!((llama.eos_token_ids, llama.head_dim), (vec![2, 5], 32));
    let mut mistral = window;
    mistral["model_type"] = "mistral".into();
    mistral["num_key_value_heads"] = 2.into();
    assert_eq!(config(mistral).unwrap().layers[1].window, Some(4096));
    let path = Path::new("config.json");
    let llama = DecoderConfig::from_json(br#"{"model_type": "llama"}"#, path).unwrap();
    assert_eq!(
        (llama.vocab_size, llama.hidden_size, llama.intermediate_size),
        (32_000, 4096, 11_008)
    );
    assert_eq!((llama.layers.len(), llama.num_attention_heads), (32, 32));
}

/// Mistral's class has defaults of its own; a `null` is not the same as nothing.
#[test]
fn mistral_has_its_own_defaults() {
    let mistral = |fields: Value| {
        let mut fields = fields;
        fields["model_type"] = "mistral".into();
        config(fields).unwrap()
    };
    let heads = json!({"num_attention_heads": 16, "hidden_size": 128});
    let nothing = mistral(heads.clone());
    assert_eq!(
        (nothing.num_key_value_heads, nothing.layers[0].window),
        (8, Some(4096))
    );
    assert_eq!(nothing.max_positions, 131_072);
    let mut null = heads;
    null["num_key_value_heads"] = Value::Null;
    null["sliding_window"] = Value::Null;
    null["attention_bias"] = true.into();
    let null = mistral(null);
    assert_eq!(
        (null.num_key_value_heads, null.layers[0].window),
        (16, None)
    );
    assert_eq!(null.biases, Biases::default(), "its layers have no biases");
}

/// `Infinity` and integers beyond 64 bits, as Python writes them.
#[test]
fn json_of_python_is_read() {
    let text = br#"{"model_type": "llama", "a": NaN, "b": [-Infinity], "c": 1000000000000000019884624838656}"#;
    DecoderConfig::from_json(text, Path::new("config.json")).unwrap();
}

#[test]
fn all_faults_of_a_checkpoint_are_listed_at_once() {
    let folder = fixture("hf/f32/model");
    let mut config = DecoderConfig::from_folder(&folder).unwrap();
    config.biases = Biases::of(true, false);
    config.intermediate_size += 32;
    config.layers.truncate(1);
    let store = CheckpointStore::open(&folder).unwrap();
    let result = load(store, &config, config.dtype, &Device::default());
    let Err(ModelError::Nf4(Nf4Error::Misfit { tensors, .. })) = result else {
        panic!("loaded");
    };
    let of = |is: fn(&TensorMisfit) -> bool| -> Vec<&str> {
        let found = tensors.iter().filter(|tensor| is(tensor));
        found.map(|tensor| tensor.key.as_str()).collect()
    };
    let missing = of(|tensor| tensor.given.is_none());
    let proj = |name: &str| format!("model.layers.0.self_attn.{name}_proj.bias");
    assert_eq!(missing, ["k", "o", "q", "v"].map(proj));
    let mismatched = of(|tensor| tensor.given.is_some() && tensor.expected.is_some());
    let proj = |name: &str| format!("model.layers.0.mlp.{name}_proj.weight");
    assert_eq!(mismatched, ["down", "gate", "up"].map(proj));
    // All of the second layer: two norms and seven linear layers, each once.
    assert_eq!(of(|tensor| tensor.expected.is_none()).len(), 9);
}

/// What the config claims must be there, and what is there must be claimed.
#[rstest]
#[case::packed_and_not_claimed(true, Value::Null)]
#[case::packed_and_another_claim(true, json!({"text_config": {"quant_method": "gptq"}}))]
#[case::claimed_and_not_packed(false, json!({"quant_method": "bitsandbytes", "load_in_4bit": true}))]
fn a_checkpoint_that_is_not_what_its_config_says_is_refused(
    #[case] packed: bool,
    #[case] claim: Value,
) {
    let folder = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(fixture("hf/f32/model")).unwrap();
    let written = folder.path().join("model");
    if packed {
        std::fs::create_dir(&written).unwrap();
        std::fs::copy(source.path().join(SINGLE_FILE), written.join(SINGLE_FILE)).unwrap();
    } else {
        let options = DequantizeOptions::default();
        dequantize_checkpoint(&source, &written, &options, |_| ()).unwrap();
    }
    let text = std::fs::read(source.path().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    match claim.get("text_config") {
        Some(claim) => config["text_config"] = json!({ "quantization_config": claim }),
        None => config["quantization_config"] = claim,
    }
    std::fs::write(written.join("config.json"), config.to_string()).unwrap();
    let config = DecoderConfig::from_folder(&written).unwrap();
    let store = CheckpointStore::open(&written).unwrap();
    let result = load(store, &config, config.dtype, &Device::default());
    let Err(error) = result else {
        panic!("loaded");
    };
    let error = error.to_string();
    assert!(error.contains("`quantization_config`"), "{error}");
}

#[test]
fn a_load_reports_every_parameter() {
    let folder = fixture("hf/f32_sharded/model");
    let config = DecoderConfig::from_folder(&folder).unwrap();
    let done = Arc::new(Mutex::new(Vec::new()));
    let told = done.clone();
    let store = CheckpointStore::open(&folder)
        .unwrap()
        .on_progress(move |progress| {
            let mut told = told.lock().unwrap();
            assert!(progress.bytes_done <= progress.bytes_total);
            assert_eq!(progress.parameters_done, told.len() + 1);
            told.push((progress.parameter.to_string(), progress.parameters_total));
        });
    let checkpoint = store.checkpoint().clone();
    load(store, &config, config.dtype, &Device::default()).unwrap();
    let done = done.lock().unwrap();
    let mut names: Vec<&str> = done.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, checkpoint.parameters());
    assert!(done.iter().all(|(_, total)| *total == names.len()));
}

#[test]
fn packed_layers_stay_packed() {
    let (model, config) = open("hf/f32/model", None, &Device::default());
    let (packed, dense) = model.size_bytes();
    let linear = 2 * (128 * 128 * 2 + 64 * 128 * 2 + 352 * 128 * 3);
    // Half a byte, the scales, and a table of a kilobyte for each of the small layers here.
    assert!(
        packed > linear / 2 && packed < linear,
        "{packed} of {linear}"
    );
    assert_eq!(dense, 2 * config.vocab_size * config.hidden_size * 4);
}
