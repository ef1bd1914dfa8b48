//! A head and an embedding that are one weight in the base model, or are said to be.

use super::*;

/// Either of the two can be the one that is stored, and the settings that tie them lie in a part of a
/// composed model, or are left out where they are the model's default.
#[rstest]
#[case::head_stored(r#"{"tie_word_embeddings": true}"#, "lm_head", "lm_head")]
#[case::embedding_stored(r#"{"tie_word_embeddings": true}"#, "model.embed_tokens", "lm_head")]
#[case::default_of_the_model(r#"{"model_type": "gemma2"}"#, "model.embed_tokens", "lm_head")]
#[case::composed(
    r#"{"text_config": {"tie_word_embeddings": true}}"#,
    "model.language_model.embed_tokens",
    "lm_head"
)]
#[case::composed_before_5(
    r#"{"text_config": {"tie_word_embeddings": true}, "tie_word_embeddings": true}"#,
    "language_model.model.embed_tokens",
    "language_model.lm_head"
)]
fn one_of_two_tied_weights_changed_becomes_a_weight_of_its_own(
    #[case] config: &str,
    #[case] stored_module: &str,
    #[case] changed: &str,
    #[values(false, true)] in_4bit: bool,
) {
    let (_folder, base) = checkpoint(|writer| {
        let key = format!("{stored_module}.weight");
        write_dense(writer, &key, &[D_OUTPUT, D_INPUT], &weight());
        writer
            .write_file("config.json", config.as_bytes())
            .expect("a free name");
    });
    let lora_config = LoraConfig {
        target_modules: TargetModules::list(["lm_head"]),
        ..q_config()
    };
    let mut adapter = Adapter::new(lora_config).expect("valid");
    adapter.insert(changed, lora(false)).expect("it fits");
    let (out, options) = (folder(), MergeOptions::default());
    match in_4bit {
        false => merge_16bit(&base, &adapter, out.path(), None, &options, |_| {}),
        true => merge_4bit(&base, &adapter, out.path(), &options, |_| {}),
    }
    .expect("it fits");
    let json = fs::read(out.path().join("config.json")).expect("it is there");
    let json: serde_json::Value = serde_json::from_slice(&json).expect("valid");
    assert_eq!(json["tie_word_embeddings"], false);
    assert!(json["text_config"]["tie_word_embeddings"] != true);
    let out = Checkpoint::open(out.path()).expect("it is valid");
    let head = bounded(
        &merged(&wide(&weight()), &lora(false), SCALE),
        FloatType::F32,
    );
    assert_close(
        &stored(&out, &format!("{changed}.weight")),
        &head,
        "the head",
    );
    let embedding = match stored_module {
        "lm_head" => "model.embed_tokens",
        other => other,
    };
    assert_eq!(
        stored(&out, &format!("{embedding}.weight")),
        wide(&weight())
    );
}

/// Whatever the settings say, as transformers keeps two weights that differ.
#[test]
fn a_head_of_its_own_that_is_said_to_be_tied_is_said_to_be_its_own_once_it_is_changed() {
    let (_folder, base) = checkpoint(|writer| {
        write_dense(writer, "lm_head.weight", &[D_OUTPUT, D_INPUT], &weight());
        let table = uniform(D_OUTPUT * D_INPUT, 12);
        write_dense(
            writer,
            "model.embed_tokens.weight",
            &[D_OUTPUT, D_INPUT],
            &table,
        );
        writer
            .write_file("config.json", br#"{"tie_word_embeddings": true}"#)
            .expect("a free name");
    });
    let config = |out: &TempDir| {
        let json = fs::read(out.path().join("config.json")).expect("it is there");
        let json: serde_json::Value = serde_json::from_slice(&json).expect("valid");
        json["tie_word_embeddings"].clone()
    };
    let merge = |target: &str| {
        let mut adapter = Adapter::new(LoraConfig {
            target_modules: TargetModules::list([target]),
            ..q_config()
        })
        .expect("valid");
        if target == "lm_head" {
            adapter.insert(target, lora(false)).expect("it fits");
        }
        let out = folder();
        let options = MergeOptions::default();
        merge_16bit(&base, &adapter, out.path(), None, &options, |_| {}).expect("it fits");
        out
    };
    assert_eq!(config(&merge("lm_head")), false);
    assert_eq!(config(&merge("none")), true, "nothing was changed");
}

#[test]
fn two_different_weights_for_two_that_are_one_are_refused() {
    let (_folder, base) = checkpoint(|writer| {
        let key = "model.embed_tokens.weight";
        write_dense(writer, key, &[D_OUTPUT, D_INPUT], &weight());
    });
    let table = |seed| {
        let values = uniform(D_OUTPUT * D_INPUT, seed);
        DenseTensor::from_f32(&values, &[D_OUTPUT, D_INPUT], FloatType::F32).expect("it fits")
    };
    let mut adapter = Adapter::new(q_config()).expect("valid");
    let insert = |adapter: &mut Adapter, name: &str, seed| {
        adapter.insert_full(name, table(seed)).expect("asked for");
    };
    insert(&mut adapter, "model.embed_tokens.weight", 1);
    insert(&mut adapter, "lm_head.weight", 2);
    let merge = |adapter: &Adapter, out: &TempDir| {
        let options = MergeOptions::default();
        merge_16bit(&base, adapter, out.path(), None, &options, |_| {})
    };
    let result = merge(&adapter, &folder());
    assert!(
        matches!(
            result,
            Err(Nf4Error::Config {
                field: "tie_word_embeddings",
                ..
            })
        ),
        "{result:?}"
    );
    insert(&mut adapter, "lm_head.weight", 1);
    let out = folder();
    merge(&adapter, &out).expect("they are one still");
    let out = Checkpoint::open(out.path()).expect("it is valid");
    assert_eq!(out.parameters(), ["model.embed_tokens.weight"]);
}
