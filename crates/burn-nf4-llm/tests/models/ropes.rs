//! The parameters of rotary embeddings in every spelling.

use burn_nf4_llm::error::ModelError;
use rstest::rstest;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::configs::{Rope, config};
use crate::fixtures::fixture;

#[derive(Deserialize)]
struct Case {
    name: String,
    config: Value,
    #[serde(flatten)]
    rope: Rope,
}

/// `ropes.json` comes from transformers, see `make_ropes.py`.
#[test]
fn every_spelling_is_resolved_as_in_transformers() {
    let text = std::fs::read(fixture("configs/ropes.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&text).unwrap();
    assert!(cases.len() > 30);
    for case in cases {
        let mut fields = case.config;
        fields["max_position_embeddings"] = 64.into();
        let rope = match config(fields) {
            Ok(config) => config.ropes[0].clone(),
            Err(error) => panic!("{}: {error}", case.name),
        };
        case.rope.assert_is(&rope, 1, &case.name);
    }
}

fn yarn(name: &str, value: Value) -> Value {
    let mut fields =
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16});
    fields[name] = value;
    json!({ "rope_scaling": fields })
}

fn llama3(name: &str, value: Value) -> Value {
    let mut fields = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
    fields[name] = value;
    json!({ "rope_parameters": fields })
}

fn linear(factor: Value) -> Value {
    json!({"rope_scaling": {"type": "linear", "factor": factor}})
}

/// transformers stops at some of these, and reads others as the default or computes nonsense, with
/// a warning.
#[rstest]
#[case::text(json!({"rope_scaling": "linear"}), "rope_scaling")]
#[case::flag(json!({"rope_scaling": false}), "rope_scaling")]
#[case::list(json!({"rope_parameters": []}), "rope_parameters")]
#[case::nonsense_beside_it(json!({"rope_scaling": {"type": "default"}, "rope_parameters": 1}), "rope_parameters")]
#[case::no_type(json!({"rope_scaling": {"factor": 2.0}}), "rope_scaling.factor")]
#[case::type_null(json!({"rope_scaling": {"rope_type": null, "type": "default"}}), "rope_scaling.rope_type")]
#[case::type_number(json!({"rope_scaling": {"type": 1}}), "rope_scaling.type")]
#[case::type_unknown(json!({"rope_scaling": {"type": "ntk"}}), "rope_scaling.rope_type")]
#[case::type_capital(json!({"rope_scaling": {"type": "Linear", "factor": 2.0}}), "rope_scaling.rope_type")]
#[case::longrope(json!({"rope_scaling": {"type": "longrope"}}), "rope_scaling.short_factor")]
#[case::su(json!({"rope_scaling": {"type": "su"}}), "rope_scaling.rope_type")]
#[case::proportional(json!({"rope_parameters": {"rope_type": "proportional"}}), "rope_parameters.rope_type")]
#[case::by_layer_type(
    json!({"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}}),
    "rope_parameters.full_attention, sliding_attention"
)]
#[case::by_layer_type_older(json!({"rope_scaling": {"full_attention": {"factor": 2.0}}}), "rope_scaling.full_attention")]
#[case::factor_missing(json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor")]
#[case::factor_null(linear(Value::Null), "rope_scaling.factor")]
#[case::factor_text(linear(json!("2")), "rope_scaling.factor")]
#[case::factor_flag(linear(json!(true)), "rope_scaling.factor")]
#[case::factor_small(linear(json!(0.5)), "rope_scaling.factor")]
#[case::factor_zero(linear(json!(0)), "rope_scaling.factor")]
#[case::factor_negative(linear(json!(-2.0)), "rope_scaling.factor")]
#[case::factor_nan(linear(json!({"$python::number": "NaN"})), "rope_scaling")]
#[case::dynamic_alpha(json!({"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}}), "rope_scaling.alpha")]
#[case::dynamic_narrow(json!({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}), "head_dim")]
#[case::yarn_key_of_another(yarn("low_freq_factor", json!(1.0)), "rope_scaling.low_freq_factor")]
#[case::yarn_attn_factor(yarn("attn_factor", json!(1.0)), "rope_scaling.attn_factor")]
#[case::yarn_original_null(
    yarn("original_max_position_embeddings", Value::Null),
    "rope_scaling.original_max_position_embeddings"
)]
#[case::yarn_original_zero(yarn("original_max_position_embeddings", json!(0)), "rope_scaling.original_max_position_embeddings")]
#[case::yarn_attention_negative(yarn("attention_factor", json!(-1.0)), "rope_scaling.attention_factor")]
#[case::yarn_attention_text(yarn("attention_factor", json!("1")), "rope_scaling.attention_factor")]
#[case::yarn_attention_of_no_f32(yarn("attention_factor", json!(1e39)), "rope_scaling.attention_factor")]
#[case::yarn_attention_inferred(
    json!({"rope_scaling": {
        "rope_type": "yarn", "factor": 1e300, "original_max_position_embeddings": 16, "mscale": 1e308,
        "mscale_all_dim": 1e308
    }}),
    "rope_scaling.attention_factor"
)]
#[case::yarn_truncate_number(yarn("truncate", json!(0)), "rope_scaling.truncate")]
#[case::yarn_betas_swapped(yarn("beta_slow", json!(64)), "rope_scaling.beta_slow")]
#[case::yarn_theta_one(yarn("rope_theta", json!(1)), "rope_scaling.rope_theta")]
#[case::original_null_at_the_top(
    json!({"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": null}),
    "original_max_position_embeddings"
)]
#[case::llama3_low_missing(json!({"rope_scaling": {"type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}), "rope_scaling.low_freq_factor")]
#[case::llama3_low_null(
    llama3("low_freq_factor", Value::Null),
    "rope_parameters.low_freq_factor"
)]
#[case::llama3_low_zero(llama3("low_freq_factor", json!(0)), "rope_parameters.low_freq_factor")]
#[case::llama3_equal(llama3("high_freq_factor", json!(1.0)), "rope_parameters.high_freq_factor")]
#[case::llama3_list(llama3("factor", json!([8.0])), "rope_parameters.factor")]
#[case::theta_null(json!({"rope_theta": null}), "rope_theta")]
#[case::theta_null_inside(json!({"rope_parameters": {"rope_theta": null}, "rope_theta": 1e4}), "rope_parameters.rope_theta")]
#[case::theta_text(json!({"rope_theta": "10000"}), "rope_theta")]
#[case::theta_zero(json!({"rope_theta": 0}), "rope_theta")]
#[case::theta_negative(json!({"rope_theta": -1.0}), "rope_theta")]
#[case::partial(json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor")]
#[case::partial_inside(json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "rope_parameters.partial_rotary_factor")]
fn a_form_that_is_not_understood_is_refused(#[case] fields: Value, #[case] name: &str) {
    match config(fields) {
        Err(ModelError::Unsupported { field, .. }) => {
            let (object, _) = field.split_once('.').unwrap_or((&field, ""));
            assert!(field == name || object == name, "{field}");
        }
        Err(other) => panic!("{other}"),
        Ok(config) => panic!("{:?}", config.ropes),
    }
}
