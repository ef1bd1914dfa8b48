//! `adapter_config.json`: which modules the settings select, with what rank and factor, what is kept
//! and what is refused. The expected answers come from PEFT 0.21.0's own functions.
#![cfg(feature = "peft")]

use std::path::Path;

use burn_nf4::Nf4Error;
use burn_nf4::peft::{
    InitLoraWeights, LoraBias, LoraConfig, ModuleNames, OneOrMany, TargetModules,
};
use rstest::rstest;
use serde_json::{Value, json};

fn parse(settings: &str) -> Result<LoraConfig, Nf4Error> {
    // As text: `Value` does not keep the order of patterns.
    let text = format!(r#"{{"peft_type": "LORA", {}"#, &settings.trim_start()[1..]);
    LoraConfig::parse(text.as_bytes(), Path::new("adapter_config.json"))
}

const MODULES: [&str; 9] = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "model.layers.2.experts.0.q_proj",
    "lm_head",
    "q_proj",
    "model.xq_proj",
    "h.1.attn.q_proj",
    "model.score.q_proj",
];

/// What `check_target_module_exists` gives for each of [`MODULES`].
#[rstest]
#[case(r#"{"target_modules": ["q_proj"]}"#, "110101011")]
#[case(r#"{"target_modules": ["q_proj", "lm_head"]}"#, "110111011")]
#[case(r#"{"target_modules": ["self_attn.q_proj"]}"#, "110000000")]
#[case(r#"{"target_modules": ["attn.q_proj"]}"#, "000000010")]
#[case(
    r#"{"target_modules": ["model.layers.1.self_attn.q_proj"], "layers_to_transform": [0]}"#,
    "010000000"
)]
#[case(r#"{"target_modules": "q_proj"}"#, "000001000")]
#[case(r#"{"target_modules": ".*q_proj"}"#, "110101111")]
#[case(r#"{"target_modules": "(.*\\.)?[qk]_proj"}"#, "110101011")]
#[case(
    r#"{"target_modules": "model\\.layers\\.\\d+\\.(self_attn|mlp)\\.(q|up)_proj"}"#,
    "111000000"
)]
#[case(r#"{"target_modules": ".*(?<!x)q_proj"}"#, "110101011")]
#[case(r#"{"target_modules": "a|q_proj"}"#, "000001000")]
#[case(r#"{"target_modules": "(?!.*experts).*\\.q_proj"}"#, "110000011")]
#[case(
    r#"{"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]}"#,
    "000101011"
)]
#[case(
    r#"{"target_modules": ["q_proj"], "exclude_modules": ".*\\.layers\\.[1-9].*"}"#,
    "100001011"
)]
#[case(
    r#"{"target_modules": ["q_proj"], "exclude_modules": []}"#,
    "110101011"
)]
#[case(
    r#"{"target_modules": ["q_proj"], "exclude_modules": "q_proj"}"#,
    "110100011"
)]
#[case(
    r#"{"target_modules": ["q_proj"], "modules_to_save": ["score"]}"#,
    "110101010"
)]
#[case(
    r#"{"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}"#,
    "110101011"
)]
#[case(
    r#"{"target_modules": ["q_proj"], "modules_to_save": ["self_.*"]}"#,
    "000101011"
)]
#[case(
    r#"{"target_modules": ["q_proj"], "modules_to_save": ["attn"]}"#,
    "110101001"
)]
#[case(
    r#"{"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 2]}"#,
    "010101000"
)]
#[case(
    r#"{"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 11}"#,
    "001001000"
)]
#[case(
    r#"{"target_modules": ["q_proj"], "layers_to_transform": 0}"#,
    "100001000"
)]
#[case(
    r#"{"target_modules": ["q_proj"], "layers_to_transform": []}"#,
    "110101011"
)]
#[case(
    r#"{"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}"#,
    "010001000"
)]
#[case(r#"{"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "h"]}"#, "000001010")]
#[case(r#"{"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["experts", "layers"]}"#, "100101000")]
#[case(r#"{"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": ["layers", "experts"]}"#, "000101000")]
#[case(
    r#"{"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []}"#,
    "010001000"
)]
#[case(r#"{"target_modules": []}"#, "000000000")]
fn modules_are_selected_as_by_peft(#[case] settings: &str, #[case] expected: &str) {
    let matcher = parse(settings).expect("valid").matcher().expect("valid");
    let got: String = MODULES
        .iter()
        .map(|module| matcher.is_target(module).expect("a small pattern"))
        .map(|selected| if selected { '1' } else { '0' })
        .collect();
    assert_eq!(got, expected);
}

/// What `rank_pattern.get(get_pattern_key(..), 8)` gives for each of [`MODULES`].
#[rstest]
#[case(r#"{"q_proj": 2}"#, [2, 2, 8, 2, 8, 2, 8, 2, 2])]
#[case(r#"{"self_attn.q_proj": 2}"#, [2, 2, 8, 8, 8, 8, 8, 8, 8])]
#[case(r#"{"attn.q_proj": 2}"#, [8, 8, 8, 8, 8, 8, 8, 2, 8])]
#[case(r#"{"proj": 2}"#, [8, 8, 8, 8, 8, 8, 8, 8, 8])]
#[case(r#"{".*proj": 2}"#, [2, 2, 2, 2, 8, 2, 2, 2, 2])]
#[case(r#"{"layers.1.*": 2, "q_proj": 4}"#, [4, 2, 2, 4, 8, 4, 8, 4, 4])]
#[case(r#"{"q_proj": 4, "layers.1.*": 2}"#, [4, 4, 2, 4, 8, 4, 8, 4, 4])]
#[case(r#"{"model.layers.[01].self_attn.q_proj": 2}"#, [2, 2, 8, 8, 8, 8, 8, 8, 8])]
#[case(r#"{"^q_proj": 2}"#, [8, 8, 8, 8, 8, 2, 8, 8, 8])]
#[case(r#"{"^model.layers.1.self_attn.q_proj": 2}"#, [8, 2, 8, 8, 8, 8, 8, 8, 8])]
#[case(r#"{"q_proj|up_proj": 2}"#, [2, 2, 2, 2, 8, 2, 8, 2, 2])]
#[case(r#"{"layers\\.1\\d?\\..*": 2}"#, [8, 2, 2, 8, 8, 8, 8, 8, 8])]
#[case(r#"{"h.(\\d).attn.q_proj": 2}"#, [8, 8, 8, 8, 8, 8, 8, 2, 8])]
#[case(r#"{"layers": 2}"#, [8, 8, 8, 8, 8, 8, 8, 8, 8])]
#[case(r#"{}"#, [8, 8, 8, 8, 8, 8, 8, 8, 8])]
fn ranks_and_alphas_follow_the_first_pattern_that_matches(
    #[case] patterns: &str,
    #[case] expected: [usize; 9],
) {
    let settings = format!(
        r#"{{"target_modules": [], "rank_pattern": {patterns}, "alpha_pattern": {patterns}}}"#
    );
    let config = parse(&settings).expect("valid");
    let matcher = config.matcher().expect("valid");
    for (module, expected) in MODULES.into_iter().zip(expected) {
        assert_eq!(matcher.rank(module), Ok(expected), "{module}");
        assert_eq!(matcher.alpha(module), Ok(expected as f64), "{module}");
    }
    let back = LoraConfig::parse(config.to_json().as_bytes(), Path::new("")).expect("valid");
    assert!(
        back.rank_pattern.iter().eq(config.rank_pattern.iter()),
        "the order is kept"
    );
}

#[test]
fn all_linear_takes_every_linear_but_the_head() {
    let select = |settings: &str, module: &str| {
        let matcher = parse(settings).expect("valid").matcher().expect("valid");
        matcher.is_target(module).expect("a small pattern")
    };
    for spelling in ["all-linear", "ALL-LINEAR"] {
        let settings = format!(r#"{{"target_modules": "{spelling}"}}"#);
        assert!(select(&settings, "model.layers.0.mlp.up_proj"));
        assert!(select(&settings, "score"));
        assert!(!select(&settings, "lm_head"));
        assert!(!select(&settings, "language_model.lm_head"));
    }
    let classifier = r#"{"target_modules": "all-linear", "task_type": "SEQ_CLS"}"#;
    assert!(!select(classifier, "score"));
    let excluded = r#"{"target_modules": "all-linear", "exclude_modules": ["up_proj"]}"#;
    assert!(!select(excluded, "model.layers.0.mlp.up_proj"));
    assert!(select(excluded, "model.layers.0.mlp.down_proj"));
}

#[rstest]
#[case(false, 16.0 / 8.0)]
#[case(true, 16.0 / 2.828_427_124_746_190_3)]
fn the_factor_is_alpha_over_the_rank_or_its_root(#[case] use_rslora: bool, #[case] scale: f64) {
    let config = LoraConfig {
        lora_alpha: 16.0,
        use_rslora,
        ..LoraConfig::new(TargetModules::list(["q"]))
    };
    assert_eq!(config.matcher().expect("valid").scale("q"), Ok(scale));
}

#[test]
fn fields_come_from_their_json_forms() {
    let config = parse(
        r#"{"r": 4, "lora_alpha": 2.5, "lora_dropout": 0.1, "target_modules": ["a", "b"],
            "exclude_modules": "c.*", "layers_to_transform": 3, "layers_pattern": ["h"],
            "bias": "lora_only", "modules_to_save": ["lm_head"], "use_dora": true,
            "init_lora_weights": "gaussian", "rank_pattern": null, "alpha_pattern": {"a": 7},
            "task_type": "CAUSAL_LM", "base_model_name_or_path": "m", "new_in_1.0": [1]}"#,
    )
    .expect("valid");
    let expected = LoraConfig {
        r: 4,
        lora_alpha: 2.5,
        lora_dropout: 0.1,
        exclude_modules: Some(ModuleNames::Regex("c.*".into())),
        layers_to_transform: Some(OneOrMany::One(3)),
        layers_pattern: Some(OneOrMany::Many(vec!["h".into()])),
        bias: LoraBias::LoraOnly,
        modules_to_save: Some(vec!["lm_head".into()]),
        use_dora: true,
        init_lora_weights: InitLoraWeights::Named("gaussian".into()),
        alpha_pattern: [("a", 7.0)].into_iter().collect(),
        task_type: Some("CAUSAL_LM".into()),
        base_model_name_or_path: Some("m".into()),
        other: [("new_in_1.0".to_string(), json!([1]))]
            .into_iter()
            .collect(),
        ..LoraConfig::new(TargetModules::list(["a", "b"]))
    };
    assert_eq!(config, expected);
    let back = LoraConfig::parse(config.to_json().as_bytes(), Path::new(""));
    assert_eq!(back, Ok(config));
}

#[test]
fn new_settings_are_written_as_peft_writes_them() {
    let config = LoraConfig {
        lora_alpha: 16.0,
        ..LoraConfig::new(TargetModules::AllLinear)
    };
    let json: Value = serde_json::from_str(&config.to_json()).expect("JSON");
    assert_eq!(json["peft_type"], "LORA");
    assert_eq!(json["target_modules"], "all-linear");
    assert_eq!(json["bias"], "none");
    assert_eq!(json["inference_mode"], true);
    // Python tells 16 from 16.0.
    assert_eq!(json["lora_alpha"].to_string(), "16");
    assert_eq!(json["lora_dropout"].to_string(), "0.0");
    let text = config.to_json();
    let keys: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split('"').nth(1))
        .collect();
    assert!(keys.is_sorted(), "{keys:?}");
}

/// Each of these makes PEFT compute something else.
#[rstest]
#[case("alora_invocation_tokens", json!([1, 2]))]
#[case("alora_invocation_tokens", json!([]))]
#[case("arrow_config", json!({"top_k": 3}))]
#[case("kasa_config", json!({}))]
#[case("monteclora_config", json!({}))]
#[case("use_bdlora", json!({}))]
#[case("ensure_weight_tying", json!(true))]
#[case("layer_replication", json!([[0, 4], [2, 5]]))]
#[case("lora_bias", json!(true))]
#[case("megatron_config", json!({"tp": 2}))]
#[case("target_parameters", json!(["experts.gate_up_proj"]))]
#[case("trainable_token_indices", json!({"embed_tokens": [1]}))]
#[case("use_qalora", json!(true))]
#[case("init_lora_weights", json!("pissa"))]
#[case("init_lora_weights", json!("pissa_niter_16"))]
#[case("init_lora_weights", json!("corda"))]
#[case("init_lora_weights", json!("OLoRA"))]
#[case("init_lora_weights", json!("loftq"))]
#[case("init_lora_weights", json!("lora_ga"))]
#[case("peft_type", json!("IA3"))]
fn settings_that_change_the_result_are_refused_by_name(#[case] key: &str, #[case] value: Value) {
    let mut settings = json!({"peft_type": "LORA", "target_modules": ["q"]});
    settings[key] = value.clone();
    let result = LoraConfig::parse(settings.to_string().as_bytes(), Path::new(""));
    assert_eq!(
        result,
        Err(Nf4Error::AdapterOption {
            key: key.into(),
            given: value.to_string(),
        })
    );
}

/// The same settings switched off, and those that a trained adapter does not depend on.
#[rstest]
#[case("alora_invocation_tokens", json!(null))]
#[case("kasa_config", json!(null))]
#[case("layer_replication", json!([]))]
#[case("lora_bias", json!(false))]
#[case("target_parameters", json!([]))]
#[case("trainable_token_indices", json!(null))]
#[case("use_qalora", json!(false))]
#[case("qalora_group_size", json!(32))]
#[case("megatron_core", json!("megatron.core"))]
#[case("loftq_config", json!({"loftq_bits": 4}))]
#[case("eva_config", json!({"rho": 2.0}))]
#[case("corda_config", json!({"corda_method": "ipm"}))]
#[case("velora_config", json!({"num_groups": 4}))]
#[case("init_lora_weights", json!("eva"))]
#[case("init_lora_weights", json!("orthogonal"))]
#[case("init_lora_weights", json!(false))]
#[case("something_new", json!({"a": [1, 2.5, null]}))]
fn settings_that_do_not_are_kept(#[case] key: &str, #[case] value: Value) {
    let mut settings = json!({"peft_type": "LORA", "target_modules": ["q"]});
    settings[key] = value.clone();
    let config = LoraConfig::parse(settings.to_string().as_bytes(), Path::new("")).expect("valid");
    let written: Value = serde_json::from_str(&config.to_json()).expect("JSON");
    assert_eq!(written[key], value);
}

/// What `json.dumps(json.loads(text), indent=2, sort_keys=True)` makes of the value.
#[rstest]
#[case("eva_config", r#"{"rho": Infinity}"#, "\"rho\": Infinity")]
#[case("eva_config", r#"{"rho": [NaN, -Infinity]}"#, "NaN,\n      -Infinity")]
#[case("something_new", "NaN", "\"something_new\": NaN")]
#[case("something_new", "1e999", "\"something_new\": Infinity")]
#[case(
    "something_new",
    "1000000000000000019884624838656",
    ": 1000000000000000019884624838656"
)]
#[case("something_new", r#""\u00e9 Infinity""#, r#""\u00e9 Infinity""#)]
#[case("lora_alpha", "1e+30", "\"lora_alpha\": 1e+30")]
#[case(
    "lora_alpha",
    "1000000000000000019884624838656",
    "\"lora_alpha\": 1e+30"
)]
#[case("lora_dropout", "1e-06", "\"lora_dropout\": 1e-06")]
fn numbers_of_pythons_json_are_read_and_written_back(
    #[case] key: &str,
    #[case] value: &str,
    #[case] written: &str,
) {
    let config = parse(&format!(r#"{{"target_modules": ["q"], "{key}": {value}}}"#));
    let json = config.expect("Python reads it").to_json();
    assert!(json.contains(written), "{json}");
    let again = LoraConfig::parse(json.as_bytes(), Path::new("")).expect("it was valid");
    assert_eq!(again.to_json(), json);
}

#[rstest]
fn numbers_that_are_not_finite_are_refused_where_they_count(
    #[values("NaN", "Infinity", "-Infinity", "1e999", "1e39")] value: &str,
    #[values("lora_alpha", "lora_dropout", "alpha_pattern")] key: &str,
) {
    let value = match key {
        "alpha_pattern" => format!(r#"{{"q": {value}}}"#),
        _ => value.into(),
    };
    match parse(&format!(r#"{{"target_modules": ["q"], "{key}": {value}}}"#)) {
        Err(Nf4Error::Config { field, .. }) => assert_eq!(field, key),
        other => panic!("{other:?}"),
    }
}

/// Python takes `null` as false.
#[test]
fn null_switches_a_setting_off() {
    let off = parse(
        r#"{"target_modules": ["q"], "use_rslora": null, "use_dora": null, "fan_in_fan_out": null,
            "init_lora_weights": null}"#,
    );
    let expected = LoraConfig {
        init_lora_weights: InitLoraWeights::Default(false),
        other: Default::default(),
        ..LoraConfig::new(TargetModules::list(["q"]))
    };
    assert_eq!(off, Ok(expected));
}

#[rstest]
#[case(r#"{"target_modules": ["q"], "r": 0}"#, "r")]
#[case(
    r#"{"target_modules": ["q"], "rank_pattern": {"q": 0}}"#,
    "rank_pattern"
)]
#[case(r#"{"target_modules": ["q"], "lora_dropout": 1.0}"#, "lora_dropout")]
#[case(
    r#"{"target_modules": ".*", "layers_to_transform": [0]}"#,
    "layers_to_transform"
)]
#[case(
    r#"{"target_modules": "all-linear", "layers_pattern": "h"}"#,
    "layers_pattern"
)]
#[case(
    r#"{"target_modules": ["q"], "layers_pattern": "h"}"#,
    "layers_pattern"
)]
fn values_that_make_no_sense_are_refused(#[case] settings: &str, #[case] expected: &str) {
    match parse(settings) {
        Err(Nf4Error::Config { field, .. }) => assert_eq!(field, expected),
        other => panic!("{other:?}"),
    }
}

#[rstest]
#[case(r#"{"target_modules": "(q"}"#, "target_modules")]
#[case(
    r#"{"target_modules": ["q"], "exclude_modules": "*"}"#,
    "exclude_modules"
)]
#[case(
    r#"{"target_modules": ["q"], "modules_to_save": ["["]}"#,
    "modules_to_save"
)]
#[case(
    r#"{"target_modules": ["q"], "rank_pattern": {"(": 2}}"#,
    "rank_pattern"
)]
#[case(
    r#"{"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "("}"#,
    "layers_pattern"
)]
fn a_pattern_that_is_none_is_refused(#[case] settings: &str, #[case] expected: &str) {
    match parse(settings) {
        Err(Nf4Error::Pattern { field, .. }) => assert_eq!(field, expected),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pattern_that_takes_too_long_is_an_error() {
    // The look-ahead keeps it from the engine that needs no backtracking.
    let config = parse(r#"{"target_modules": "(?=x)(x+x+)+y"}"#).expect("it compiles");
    let matcher = config.matcher().expect("it compiles");
    let result = matcher.is_target(&"x".repeat(64));
    assert!(
        matches!(
            &result,
            Err(Nf4Error::Pattern {
                field: "target_modules",
                ..
            })
        ),
        "{result:?}"
    );
}

#[rstest]
#[case("")]
#[case("[]")]
#[case("{")]
#[case(r#"{"peft_type": "LORA"}"#)]
#[case(r#"{"peft_type": "LORA", "target_modules": null}"#)]
#[case(r#"{"peft_type": "LORA", "target_modules": 3}"#)]
#[case(r#"{"peft_type": "LORA", "target_modules": ["q"], "r": -1}"#)]
#[case(r#"{"peft_type": "LORA", "target_modules": ["q"], "bias": "some"}"#)]
#[case(r#"{"peft_type": "LORA", "target_modules": ["q"], "lora_alpha": null}"#)]
fn text_that_is_no_config_is_an_error(#[case] text: &str) {
    let path = Path::new("folder/adapter_config.json");
    match LoraConfig::parse(text.as_bytes(), path) {
        Err(Nf4Error::AdapterConfig { path: named, .. }) => assert_eq!(named, path),
        other => panic!("{other:?}"),
    }
}

#[rstest]
#[case(r#"{"target_modules": ["q"], "bias": false}"#, "boolean `false`")]
#[case(r#"{"target_modules": ["q"], "bias": null}"#, "null")]
#[case(r#"{"target_modules": ["q"], "bias": "some"}"#, "`lora_only`")]
fn a_value_of_another_kind_is_told(#[case] settings: &str, #[case] expected: &str) {
    let error = parse(settings).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
}

#[rstest]
#[case(
    r#"{"target_modules": ["q"], "lora_alpha": "x"}"#,
    "`lora_alpha` is \"x\": "
)]
#[case(r#"{"target_modules": ["q"], "use_rslora": 3}"#, "`use_rslora` is 3: ")]
#[case(r#"{"target_modules": null}"#, "`target_modules` is null: ")]
#[case(
    r#"{"target_modules": ["q"], "alpha_pattern": {"q_proj": null}}"#,
    "`alpha_pattern` is {\"q_proj\": null}: "
)]
#[case(r#"{"target_modules": ["q"], "r": 2.5}"#, "`r` is 2.5: ")]
#[case(
    r#"{"target_modules": ["q"], "lora_alpha": NaN, "modules_to_save": 1}"#,
    "`modules_to_save` is 1: "
)]
fn a_setting_that_cannot_be_read_is_named(#[case] settings: &str, #[case] expected: &str) {
    let error = parse(settings).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
    assert!(!error.contains(" line "), "{error}");
}
