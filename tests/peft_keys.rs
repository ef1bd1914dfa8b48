//! The keys of adapter files: every spelling that PEFT 0.21 or transformers 5.24 reads means the same,
//! and what is not read is refused by its name. `tests/fixtures/make_peft.py --spellings` shows what
//! those two do.
#![cfg(feature = "peft")]

mod peft_cases;
mod stored;

use std::fs;

use burn::tensor::Device;
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Dtype, SafetensorsFile};
use burn_nf4::nn::QuantLinearConfig;
use burn_nf4::peft::{ADAPTER_FILE, Adapter, CONFIG_FILE};
use peft_cases::{Case, PREFIX};
use proptest::prelude::*;
use rstest::rstest;
use stored::Stored;
use tempfile::TempDir;

fn open(case: &Case) -> Result<Adapter, Nf4Error> {
    Adapter::open(case.folder().path())
}

fn same(a: &Adapter, b: &Adapter) -> bool {
    a.modules().eq(b.modules())
        && a.embeddings().eq(b.embeddings())
        && a.full_tensors().eq(b.full_tensors())
}

/// The text before a key's last part is kept; `old` must be that part, or nothing is renamed.
fn end(key: &str, old: &str, new: &str) -> String {
    match key.strip_suffix(old) {
        Some(start) => format!("{start}{new}"),
        None => key.into(),
    }
}

fn after_prefix(key: &str, wrapper: &str) -> String {
    let name = key.strip_prefix(PREFIX).expect("PEFT's prefix");
    format!("{PREFIX}{wrapper}{name}")
}

fn plain(key: &str) -> String {
    key.into()
}

fn bare(key: &str) -> String {
    key.replacen(PREFIX, "", 1)
}

fn compiled(key: &str) -> String {
    after_prefix(key, "_orig_mod.")
}

fn compiled_whole(key: &str) -> String {
    format!("_orig_mod.{key}")
}

fn fsdp(key: &str) -> String {
    after_prefix(key, "_fsdp_wrapped_module.")
        .replace("layers.0.", "layers.0._fsdp_wrapped_module.")
}

fn checkpointed(key: &str) -> String {
    key.replace("layers.0.", "layers.0._checkpoint_wrapped_module.")
}

fn data_parallel(key: &str) -> String {
    format!("module.{key}")
}

fn named(key: &str) -> String {
    let key = end(key, "lora_A.weight", "lora_A.default.weight");
    let key = end(&key, "lora_B.weight", "lora_B.default.weight");
    let key = end(&key, "lora_embedding_A", "lora_embedding_A.default");
    let key = end(&key, "lora_embedding_B", "lora_embedding_B.default");
    end(
        &key,
        "lora_magnitude_vector",
        "lora_magnitude_vector.default.weight",
    )
}

fn magnitude_with_weight(key: &str) -> String {
    end(key, "lora_magnitude_vector", "lora_magnitude_vector.weight")
}

fn magnitude_with_name(key: &str) -> String {
    end(
        key,
        "lora_magnitude_vector",
        "lora_magnitude_vector.default",
    )
}

fn saved(key: &str) -> String {
    let key = end(key, "lm_head.weight", "lm_head.modules_to_save.weight");
    end(&key, "tokens.weight", "tokens.modules_to_save.weight")
}

fn saved_and_named(key: &str) -> String {
    let key = end(
        key,
        "lm_head.weight",
        "lm_head.modules_to_save.default.weight",
    );
    end(
        &key,
        "tokens.weight",
        "tokens.modules_to_save.default.weight",
    )
}

#[rstest]
fn every_spelling_is_read_to_the_same_adapter_and_saved_as_peft_saves_it(
    #[values(
        "plain",
        "dora",
        "patterns",
        "saved_norm",
        "bias_lora_only",
        "bias_all",
        "bias_all_saved",
        "head",
        "head_dora",
        "embed_dora",
        "ends",
        "saved_ends",
        "along"
    )]
    name: &str,
) {
    let case = Case::open(name);
    let expected = open(&case).expect("PEFT wrote it");
    let spellings: [fn(&str) -> String; 12] = [
        plain,
        bare,
        compiled,
        compiled_whole,
        fsdp,
        checkpointed,
        data_parallel,
        named,
        magnitude_with_weight,
        magnitude_with_name,
        saved,
        saved_and_named,
    ];
    for (index, spelling) in spellings.into_iter().enumerate() {
        let is_saved = case.config.get("modules_to_save").is_some();
        if index >= 10 && !is_saved {
            continue;
        }
        let adapter = open(&Case::open(name).renamed(spelling)).expect("it is read");
        assert!(same(&adapter, &expected), "{name}: spelling {index}");
        let out = TempDir::new().expect("a folder");
        adapter.save(out.path()).expect("it can be written");
        let written = SafetensorsFile::open(out.path().join(ADAPTER_FILE)).expect("valid");
        // PEFT writes some of this twice, and a copy of what was there before.
        let twice = |key: &str| key.contains(".modules_to_save.") || key.contains(".original_");
        let mut by_peft = Case::open(name).tensors;
        by_peft.retain(|key, _| !twice(key));
        assert!(
            stored::read(&written) == by_peft,
            "{name}: spelling {index}"
        );
    }
}

fn ones(shape: &[usize]) -> Stored {
    stored::floats(&vec![1.0; shape.iter().product()], shape)
}

fn with(mut case: Case, key: &str, tensor: Stored) -> Case {
    case.tensors.insert(format!("{PREFIX}{key}"), tensor);
    case
}

const Q: &str = "model.layers.0.self_attn.q_proj";

/// Tensors that PEFT finds no place for, or that mean something else than what is supported.
#[rstest]
#[case::factor_of_another_method("plain", &format!("{Q}.lora_E"))]
#[case::bias_of_a_factor("plain", &format!("{Q}.lora_B.bias"))]
#[case::magnitude_without_dora("plain", &format!("{Q}.lora_magnitude_vector"))]
#[case::bias_without_bias("plain", &format!("{Q}.base_layer.bias"))]
#[case::another_module("plain", "model.layers.0.self_attn.k_proj.lora_A.weight")]
#[case::norm_that_is_not_saved("plain", "model.norm.weight")]
#[case::copy_of_what_is_not_saved("plain", "model.norm.original_module.weight")]
#[case::saved_that_is_not_saved("plain", "model.norm.modules_to_save.default.weight")]
#[case::weight_under_a_branch("head", "lm_head.weight")]
#[case::base_of_what_is_not_adapted("plain", "lm_head.base_layer.weight")]
#[case::wrapper_in_a_factor("saved_norm", "model.norm.lora_embedding_A.modules_to_save.weight")]
#[case::factors_of_both_kinds("embed", "model.embed_tokens.lora_A.weight")]
fn what_the_settings_do_not_ask_for_is_unexpected(#[case] name: &str, #[case] key: &str) {
    let case = with(Case::open(name), key, ones(&[2, 4]));
    match open(&case) {
        Err(Nf4Error::AdapterKeys {
            missing,
            unexpected,
            ..
        }) => {
            assert_eq!(unexpected, [format!("{PREFIX}{key}")]);
            assert!(missing.is_empty(), "{missing:?}");
        }
        other => panic!("{other:?}"),
    }
}

/// A branch is whole or not there: PEFT would make up the rest, `A` from random numbers.
#[rstest]
#[case("plain", &["self_attn.q_proj.lora_A.weight"])]
#[case("plain", &["self_attn.q_proj.lora_B.weight"])]
#[case("plain", &["self_attn.q_proj.lora_A.weight", "self_attn.v_proj.lora_B.weight"])]
#[case("dora", &["self_attn.q_proj.lora_magnitude_vector"])]
#[case("embed", &["embed_tokens.lora_embedding_A"])]
#[case("embed_dora", &["embed_tokens.lora_embedding_B", "embed_tokens.lora_magnitude_vector"])]
#[case("head", &["lm_head.lora_A.weight", "lm_head.lora_B.weight"])]
#[case("bias_lora_only", &["self_attn.q_proj.lora_A.weight", "self_attn.q_proj.lora_B.weight"])]
fn a_part_of_a_branch_that_is_missing_is_listed(#[case] name: &str, #[case] gone: &[&str]) {
    let case = gone
        .iter()
        .fold(Case::open(name), |case, gone| case.without(gone));
    for open in [Adapter::open, Adapter::open_partial] {
        match open(case.folder().path().to_path_buf()) {
            Err(Nf4Error::AdapterKeys {
                missing,
                unexpected,
                ..
            }) => {
                assert_eq!(missing.len(), gone.len(), "{missing:?}");
                let named = |key: &String| gone.iter().any(|gone| key.ends_with(gone));
                assert!(missing.iter().all(named), "{missing:?}");
                assert!(unexpected.is_empty(), "{unexpected:?}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_adapter_without_a_tensor_is_opened_only_where_that_is_asked_for() {
    let case = Case::open("saved_head").without("");
    assert_eq!(
        open(&case).err(),
        Some(Nf4Error::AdapterLacks {
            missing: vec!["q_proj".into(), "v_proj".into(), "lm_head".into()]
        })
    );
    let adapter = Adapter::open_partial(case.folder().path()).expect("it is asked for");
    assert_eq!(adapter.modules().count(), 0);
}

/// What DeepSpeed ZeRO-3 and FSDP leave of a tensor that was not gathered.
#[rstest]
#[case("plain", "q_proj.lora_A.weight", vec![0])]
#[case("plain", "q_proj.lora_B.weight", vec![0, 2])]
#[case("plain", "q_proj.lora_A.weight", vec![16])]
#[case("dora", "q_proj.lora_magnitude_vector", vec![0])]
#[case("embed", "lora_embedding_A", vec![0])]
#[case("embed", "lora_embedding_B", vec![8])]
#[case("saved_head", "lm_head.weight", vec![0])]
#[case("head", "lm_head.base_layer.weight", vec![0])]
#[case("bias_all", "k_proj.bias", vec![0])]
fn a_tensor_that_was_not_gathered_is_told_as_such(
    #[case] name: &str,
    #[case] key: &str,
    #[case] shape: Vec<usize>,
) {
    let mut case = Case::open(name);
    let mut tensors = case.tensors.iter_mut();
    let found = tensors.find(|(name, _)| name.ends_with(key));
    let (name, tensor) = found.expect("it is there");
    let name = name.clone();
    tensor.bytes.truncate(4 * shape.iter().product::<usize>());
    tensor.shape = shape;
    match open(&case) {
        Err(error @ Nf4Error::AdapterTensor { .. }) => {
            let text = error.to_string();
            assert!(text.contains(&name) && text.contains("ZeRO-3"), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

#[rstest]
#[case("plain", &format!("{Q}.lora_A.other.weight"), "`other`")]
#[case("plain", &format!("{Q}.lora_magnitude_vector.other.weight"), "`other`")]
#[case("embed", "model.embed_tokens.lora_embedding_A.other", "`other`")]
#[case(
    "head",
    "lm_head.base_layer.weight.absmax",
    "save_embedding_layers=False"
)]
fn what_is_not_read_is_told_why(#[case] name: &str, #[case] key: &str, #[case] reason: &str) {
    let case = with(Case::open(name), key, ones(&[2, 4]));
    match open(&case) {
        Err(error @ Nf4Error::AdapterTensor { .. }) => {
            let text = error.to_string();
            assert!(text.contains(key) && text.contains(reason), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_packed_head_in_an_adapter_is_told_as_such() {
    let mut case = Case::open("head");
    let mut tensors = case.tensors.iter_mut();
    let head = tensors.find(|(key, _)| key.contains("base_layer"));
    *head.expect("it is there").1 = Stored {
        dtype: Dtype::U8,
        shape: vec![64, 1],
        bytes: vec![0; 64],
    };
    let error = open(&case).expect_err("it is refused");
    assert!(error.to_string().contains("a quantized weight"), "{error}");
}

/// PEFT itself writes a trained bias of a saved module twice.
#[rstest]
#[case("plain", &format!("{Q}.lora_A.weight"), &format!("{Q}.lora_A.default.weight"))]
#[case(
    "saved_head",
    "lm_head.weight",
    "lm_head.modules_to_save.default.weight"
)]
fn a_tensor_under_two_names_must_have_the_same_values(
    #[case] name: &str,
    #[case] key: &str,
    #[case] again: &str,
    #[values(false, true)] differs: bool,
) {
    let case = Case::open(name);
    let mut tensor = case.tensors[&format!("{PREFIX}{key}")].clone();
    if differs {
        tensor.bytes[0] ^= 1;
    }
    let case = with(case, again, tensor);
    match open(&case) {
        Ok(_) => assert!(!differs),
        Err(error @ Nf4Error::AdapterTensor { .. }) => {
            assert!(differs && error.to_string().contains(again), "{error}");
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn pickled_tensors_are_refused_unless_there_are_others_too() {
    let case = Case::open("plain");
    let folder = case.folder();
    let pickle = folder.path().join("adapter_model.bin");
    fs::write(&pickle, b"\x80\x02}q\x00.").expect("a file");
    assert!(Adapter::open(folder.path()).is_ok());
    fs::remove_file(folder.path().join(ADAPTER_FILE)).expect("it is there");
    assert_eq!(
        Adapter::open(folder.path()).err(),
        Some(Nf4Error::PickledAdapter { path: pickle })
    );
    assert!(folder.path().join(CONFIG_FILE).exists());
}

/// A head under a branch is saved with its own weight, which comes before the branch.
#[test]
fn the_layer_under_a_branch_is_a_parameter_of_the_base() {
    let adapter = open(&Case::open("ends")).expect("PEFT wrote it");
    let full: Vec<&str> = adapter.full_tensors().map(|(name, _)| name).collect();
    assert_eq!(full, ["lm_head.weight", "model.embed_tokens.weight"]);
    assert!(!adapter.is_saved("lm_head.weight"));
    let embedding = adapter
        .embedding("model.embed_tokens")
        .expect("it is adapted");
    assert_eq!((embedding.dims(), embedding.rank()), ([8, 16], 2));
    assert_eq!(
        adapter.module("lm_head").expect("it is adapted").dims(),
        [16, 8]
    );
}

/// With the head its bias is saved whatever the settings say; it is the trained one if they say so.
#[rstest]
#[case("none", false)]
#[case("lora_only", true)]
#[case("all", true)]
fn the_bias_of_a_head_is_there_trained_or_not(#[case] bias: &str, #[case] is_trained: bool) {
    let mut case = Case::open("head");
    case.config["bias"] = bias.into();
    let case = with(case, "lm_head.base_layer.bias", ones(&[16]));
    let adapter = open(&case).expect("PEFT writes it so");
    let module = adapter.module("lm_head").expect("it is adapted");
    assert_eq!(module.bias.is_some(), is_trained);
    assert_eq!(adapter.full_tensor("lm_head.bias").is_some(), !is_trained);
    let out = TempDir::new().expect("a folder");
    adapter.save(out.path()).expect("it can be written");
    let written = SafetensorsFile::open(out.path().join(ADAPTER_FILE)).expect("valid");
    let key = format!("{PREFIX}lm_head.base_layer.bias");
    assert!(written.keys().any(|written| written == key));
}

/// It would have to take the place of the packed weight.
#[test]
fn a_float_weight_for_a_layer_in_4_bit_is_refused() {
    let adapter = open(&Case::open("head")).expect("PEFT wrote it");
    let device = Device::default();
    let linear = QuantLinearConfig::new(8, 16).with_bias(false).init(&device);
    let layer = adapter.layer("lm_head", linear.expect("valid"), &device);
    assert!(
        matches!(
            layer,
            Err(Nf4Error::Config {
                field: "base_layer.weight",
                ..
            })
        ),
        "{layer:?}"
    );
}

const SEGMENTS: [&str; 20] = [
    "base_model",
    "model",
    "module",
    "_orig_mod",
    "layers",
    "0",
    "q_proj",
    "lm_head",
    "embed_tokens",
    "norm",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "base_layer",
    "modules_to_save",
    "original_module",
    "default",
    "weight",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever is read is saved under the keys of PEFT, and read again to the same.
    #[test]
    fn any_keys_are_refused_or_read_without_a_panic(
        keys in prop::collection::vec(
            prop::collection::vec(prop::sample::select(SEGMENTS.as_slice()), 0..7), 0..6),
        use_dora: bool,
        all_linear: bool,
    ) {
        let mut case = Case::open("saved_norm").without("");
        case.config["r"] = 2.into();
        case.config["use_dora"] = use_dora.into();
        case.config["bias"] = "all".into();
        case.config["target_modules"] = match all_linear {
            true => "all-linear".into(),
            false => serde_json::json!(["q_proj", "lm_head", "embed_tokens"]),
        };
        for key in keys.into_iter().map(|key| key.join(".")) {
            case.tensors.insert(key, ones(&[2, 2]));
        }
        if let Ok(adapter) = Adapter::open_partial(case.folder().path()) {
            let out = TempDir::new().expect("a folder");
            adapter.save(out.path()).expect("it can be written");
            let again = Adapter::open_partial(out.path()).expect("it was valid");
            prop_assert!(same(&again, &adapter));
        }
    }
}
