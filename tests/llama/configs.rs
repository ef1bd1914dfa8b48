//! What a `config.json` may say, and what a checkpoint must hold.

use std::path::Path;

use burn::tensor::Device;
use burn_nf4::checkpoint::Checkpoint;
use rstest::rstest;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::fixtures::{fixture, open};
use crate::load;

/// A small config with some fields set, or with `null` taken out.
fn config(fields: Value) -> Result<LlamaConfig, ModelError> {
    let mut config = json!({
        "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    });
    for (key, value) in fields.as_object().unwrap() {
        config[key] = value.clone();
    }
    LlamaConfig::from_json(
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
    inverse_frequencies: Vec<f32>,
    attention_factor: f64,
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
        let rope = config(fields).unwrap().rope;
        let ours = rope.inverse_frequencies(case.sequence);
        assert_eq!(ours.len(), case.inverse_frequencies.len(), "{}", case.name);
        for (ours, theirs) in ours.iter().zip(&case.inverse_frequencies) {
            // Powers of different libraries differ by an ulp or two, 1.2e-7 each.
            let relative = (ours - theirs).abs() / theirs;
            assert!(relative < 1e-6, "{}: {ours:e} and {theirs:e}", case.name);
        }
        let factor = rope.attention_factor();
        assert!(
            (factor - case.attention_factor).abs() < 1e-12,
            "{}",
            case.name
        );
    }
}

#[rstest]
#[case::family(json!({"model_type": "gemma"}), "model_type")]
#[case::activation(json!({"hidden_act": "gelu"}), "hidden_act")]
#[case::longrope(json!({"rope_scaling": {"type": "longrope"}}), "rope_type")]
#[case::no_factor(json!({"rope_parameters": {"rope_type": "linear"}}), "rope_parameters.factor")]
#[case::partial(json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor")]
#[case::heads(json!({"num_key_value_heads": 3}), "num_key_value_heads")]
#[case::odd_head(json!({"head_dim": 7}), "head_dim")]
fn what_is_not_implemented_is_refused_by_name(#[case] fields: Value, #[case] name: &str) {
    match config(fields) {
        Err(ModelError::Unsupported { field, .. }) => assert_eq!(field, name),
        other => panic!("{other:?}"),
    }
}

#[test]
fn fields_left_out_have_the_defaults_of_transformers() {
    let llama = config(json!({})).unwrap();
    assert_eq!((llama.num_key_value_heads, llama.head_dim), (4, 16));
    assert_eq!(llama.rms_norm_eps, 1e-6);
    assert!(!llama.tie_word_embeddings && llama.eos_token_ids.is_empty());

    let window = json!({"sliding_window": 4096, "eos_token_id": [2, 5], "head_dim": 32});
    let llama = config(window.clone()).unwrap();
    assert_eq!(llama.sliding_window, None, "Llama has no window");
    assert_eq!((llama.eos_token_ids, llama.head_dim), (vec![2, 5], 32));
    let mut mistral = window;
    mistral["model_type"] = "mistral".into();
    mistral["num_key_value_heads"] = 2.into();
    assert_eq!(config(mistral).unwrap().sliding_window, Some(4096));
}

#[test]
fn all_faults_of_a_checkpoint_are_listed_at_once() {
    let folder = fixture("hf/f32/model");
    let mut config = LlamaConfig::from_folder(&folder).unwrap();
    config.attention_bias = true;
    config.intermediate_size += 32;
    config.num_hidden_layers = 1;
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let device = Device::default();
    let result = load::load(&checkpoint, &config, config.dtype, &device, |_| ());
    let Err(ModelError::Tensors(faults)) = result else {
        panic!("loaded");
    };
    assert_eq!(faults.missing.len(), 4);
    assert!(faults.missing[0].contains("model.layers.0.self_attn.q_proj.bias"));
    assert_eq!(faults.mismatched.len(), 3);
    let text = faults.to_string();
    assert!(text.contains("mlp.up_proj.weight has shape [352, 128], expected [384, 128]"));
    // All of the second layer: two norms and seven linear layers, each once.
    assert_eq!(faults.unexpected.len(), 9);
}

#[test]
fn a_load_reports_every_parameter() {
    let folder = fixture("hf/f32_sharded/model");
    let config = LlamaConfig::from_folder(&folder).unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let mut done = Vec::new();
    let device = Device::default();
    load::load(&checkpoint, &config, config.dtype, &device, |progress| {
        assert!(progress.bytes_done <= progress.bytes_total);
        assert_eq!(progress.parameters_done, done.len() + 1);
        done.push((progress.parameter.to_string(), progress.parameters_total));
    })
    .unwrap();
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
