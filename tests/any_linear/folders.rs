//! Folders of checkpoints in and out.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::module::Module;
use burn::tensor::Device;
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, CheckpointStore, Dtype};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig, QuantType};
use burn_nf4::model::{LinearLayers, QuantizeLayers, SaveFolder};
use burn_nf4::nn::{AnyLinear, QLoraLinearConfig};
use burn_nf4::peft::{LoraConfig, TargetModules};
use rstest::rstest;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::peft_cases::{IDS, model};
use crate::stored::{self, Tensors};
use crate::toy::{Toy, fixture, tensors};

const TABLE: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// All tensors of a folder, whatever the files.
fn all_tensors(folder: &Path) -> Tensors {
    let checkpoint = Checkpoint::open(folder).expect("valid");
    checkpoint.files().iter().flat_map(stored::read).collect()
}

/// The layers of these folders are in 4 bit but for the head; the model did not know.
#[rstest]
fn a_folder_of_transformers_comes_back_byte_for_byte(
    #[values("hf/f32/model", "hf/bf16/model", "hf/f32_sharded/model")] name: &str,
) {
    let device = Device::default();
    let folder = fixture(name);
    let toy = Toy::open(&folder, &device);
    let linears = toy.linears();
    assert_eq!(
        linears
            .iter()
            .filter(|(_, layer)| layer.is_quantized())
            .count(),
        14
    );
    assert!(!toy.linear("lm_head").is_quantized());

    let out = TempDir::new().expect("a folder");
    let source = Checkpoint::open(&folder).expect("valid");
    let options = SaveFolder {
        source: Some(&source),
        ..SaveFolder::default()
    };
    let written = toy
        .save_folder(out.path(), &options)
        .expect("it can be written");
    assert_eq!(written.files.len(), 1);
    assert_eq!(all_tensors(out.path()), all_tensors(&folder));
    // To the last entry, the note of what needs no list among them.
    assert_eq!(stored::config_of(out.path()), stored::config_of(&folder));
    assert!(out.path().join("generation_config.json").exists());
    assert!(
        Checkpoint::open(out.path())
            .expect("valid")
            .faults()
            .is_empty()
    );
}

/// Each form of each layer, by chance.
#[rstest]
#[case::dense(&[], &json!(null))]
#[case::all_but_the_head(&["self_attn", "mlp"], &json!(null))]
#[case::one(&["up_proj"], &json!(["lm_head", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.gate_proj"]))]
#[case::with_the_head(&["lm_head", "mlp", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], &json!(["o_proj"]))]
#[case::everything(&["lm_head", "mlp", "self_attn"], &json!([]))]
fn a_mixed_model_is_saved_and_loaded_as_it_is(#[case] parts: &[&str], #[case] skipped: &Value) {
    let device = Device::default();
    let folder = model(false);
    let source = Checkpoint::open(folder.path()).expect("valid");
    let toy = Toy::open(folder.path(), &device).try_map_linears(|name, layer| {
        match parts.iter().any(|part| name.contains(part)) {
            true => layer.quantize(QuantConfig::default()),
            false => Ok(layer),
        }
    });
    let toy = toy.expect("finite");
    let temporary = TempDir::new().expect("a folder");
    let out = match std::env::var_os("NF4_EXPORT") {
        // For `scripts/peer_load.py` elsewhere.
        Some(folder) => Path::new(&folder).join(format!("mixed_{}", parts.len())),
        None => temporary.path().join("mixed"),
    };
    let out = out.as_path();
    let options = SaveFolder {
        source: Some(&source),
        ..SaveFolder::default()
    };
    toy.save_folder(out, &options).expect("it can be written");

    let config = stored::config_of(out);
    let given = &config["quantization_config"]["llm_int8_skip_modules"];
    let sorted = |value: &Value| {
        let mut names: Option<Vec<String>> = serde_json::from_value(value.clone()).expect("names");
        names.iter_mut().for_each(|names| names.sort());
        names
    };
    let shorter = |names: Option<Vec<String>>| {
        // The shortest end of a path that tells it from others will do.
        let last = |name: &String| name.rsplit('.').next().unwrap_or(name).to_string();
        names.map(|names| {
            names
                .iter()
                .map(last)
                .collect::<std::collections::BTreeSet<_>>()
        })
    };
    assert_eq!(shorter(sorted(given)), shorter(sorted(skipped)), "{given}");
    assert_eq!(
        config.get("quantization_config").is_some(),
        !parts.is_empty()
    );

    let again = Toy::open(out, &device);
    for ((name, ours), (_, theirs)) in again.linears().into_iter().zip(toy.linears()) {
        assert_eq!(ours.is_quantized(), theirs.is_quantized(), "{name}");
    }
    let logits = |toy: &Toy| toy.logits(&IDS, [1, IDS.len()], &device);
    assert_eq!(logits(&again), logits(&toy));
    fs::write(out.join("logits.json"), json!(logits(&toy)).to_string()).expect("a file");
}

/// One `quantization_config` tells of one type, and of NF4 and FP4 together.
#[rstest]
#[case(QuantType::Nf4, QuantType::Fp8Channel, false)]
#[case(QuantType::Fp8Block, QuantType::Fp8Channel, false)]
#[case(QuantType::Nf4, QuantType::Fp4, true)]
fn weights_of_two_types_are_not_saved(
    #[case] first: QuantType,
    #[case] second: QuantType,
    #[case] is_saved: bool,
) {
    let toy = Toy::open(model(false).path(), &Device::default());
    let toy = toy.try_map_linears(|name, layer| match name {
        name if name.contains("mlp.") => layer.quantize(QuantConfig::of(second)),
        name if name.contains("q_proj") => layer.quantize(QuantConfig::of(first)),
        _ => Ok(layer),
    });
    let out = TempDir::new().expect("a folder");
    let result = toy
        .expect("finite")
        .save_folder(out.path(), &SaveFolder::default());
    match result {
        Ok(_) => {
            assert!(is_saved);
            let saved = Checkpoint::open(out.path()).expect("valid");
            assert_eq!(saved.faults(), []);
        }
        Err(Nf4Error::Config { field, given, .. }) => {
            assert!(!is_saved);
            assert_eq!(field, "model");
            for part in [first.name(), second.name(), "q_proj.weight`", "mlp."] {
                assert!(given.contains(part), "{given}");
            }
            assert!(stored::file_names(out.path()).is_empty());
        }
        Err(other) => panic!("{other:?}"),
    }
}

#[test]
fn floats_are_loaded_in_another_type_and_the_progress_is_told() {
    let device = Device::default();
    let folder = fixture("hf/bf16/model");
    let told = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let names = told.clone();
    let store = CheckpointStore::open(&folder)
        .expect("valid")
        .with_dtype(FloatType::F32)
        .on_progress(move |progress| names.lock().unwrap().push(progress.parameter.to_string()));
    let toy = Toy::new(&stored::config_of(&folder), &device);
    let toy = toy.load_checkpoint(store).expect("it fits");
    assert_eq!(toy.linear("lm_head").dtype(), Ok(FloatType::F32));
    let mut told = told.lock().unwrap().clone();
    told.sort();
    let checkpoint = Checkpoint::open(&folder).expect("valid");
    assert_eq!(told, checkpoint.parameters());
}

fn load(tensors: &Tensors, is_tied: bool) -> Result<Toy, Nf4Error> {
    let folder = model(is_tied);
    stored::write(folder.path(), tensors);
    let toy = Toy::new(&stored::config_of(folder.path()), &Device::default());
    toy.load_checkpoint(CheckpointStore::open(folder.path()).expect("valid"))
}

fn misfits(result: Result<Toy, Nf4Error>) -> String {
    match result {
        Err(error @ Nf4Error::Misfit { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn all_that_does_not_fit_is_listed_by_its_name_in_the_checkpoint() {
    let mut tensors = tensors(model(false).path());
    tensors.remove("model.layers.0.mlp.up_proj.weight");
    tensors.remove("model.norm.weight");
    tensors.insert("model.extra".into(), stored::floats(&[1.0], &[1]));
    let wide = stored::floats(&[0.5; 9 * 8], &[9, 8]);
    tensors.insert("model.layers.0.self_attn.q_proj.weight".into(), wide);
    let values = stored::sine(16 * 9);
    let packed = BlockTensor::quantize(&values, &[16, 9], QuantConfig::default()).expect("finite");
    tensors.remove(HEAD);
    tensors.extend(stored::weight(HEAD, &packed));
    let folder = model(false);
    stored::write(folder.path(), &tensors);
    // A checkpoint without `config.json` claims what it holds.
    let config = stored::config_of(folder.path());
    fs::remove_file(folder.path().join("config.json")).expect("it is there");
    let toy = Toy::new(&config, &Device::default());
    let store = CheckpointStore::open(folder.path()).expect("valid");
    let text = misfits(toy.load_checkpoint(store));
    for expected in [
        "5 tensors",
        "`model.layers.0.mlp.up_proj.weight` is missing",
        "`model.norm.weight` is missing",
        "`model.extra` is unexpected",
        "`model.layers.0.self_attn.q_proj.weight` is [9, 8]",
        "`lm_head.weight` is [16, 9]",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    // A layer takes either form; what does not fit is the shape.
    assert!(!text.contains("for a dense tensor"), "{text}");
}

/// A mistyped remapping gives a key that is missing and one that is unexpected: both sides are told.
#[test]
fn an_unexpected_tensor_is_told_with_its_place_in_the_module() {
    let folder = model(false);
    let toy = Toy::new(&stored::config_of(folder.path()), &Device::default());
    let store = CheckpointStore::open(folder.path())
        .and_then(|store| store.with_key_remapping("mlp", "ffn"))
        .expect("valid");
    let text = misfits(toy.load_checkpoint(store));
    let expected = "`model.layers.0.mlp.up_proj.weight`, in the module \
                    `model.layers.0.ffn.up_proj.weight`, is unexpected";
    assert!(text.contains(expected), "{text}");
    assert!(text.contains("`model.layers.0.mlp.up_proj.weight` is missing"));
}

/// They have other parameters than a folder has names for, or others than they compute with.
#[rstest]
fn a_model_with_reparameterizations_is_saved_once_they_are_materialized(
    #[values("apply_lora", "apply_qlora", "reparameterize_linears")] how: &str,
    #[values(false, true)] with_lora: bool,
) {
    use burn::module::{Lora, ParamGroup, QLora, Quantizer};
    use burn::tensor::quantization::Calibration;

    let device = Device::default();
    let toy = Toy::open(model(false).path(), &device);
    let toy = match how {
        "apply_lora" => toy.apply_lora(Lora::new(2, 4.0)),
        "apply_qlora" => {
            let scheme = device.settings().quantization.scheme;
            let quantizer = Quantizer::new(Calibration::MinMax, scheme);
            toy.apply_qlora(QLora::new(Lora::new(2, 4.0), quantizer))
        }
        _ => {
            let group = ParamGroup::all();
            burn_nf4::nn::reparameterize_linears(toy, QuantConfig::default(), group)
                .expect("finite")
        }
    };
    let out = TempDir::new().expect("a folder");
    let lora = LoraConfig::new(TargetModules::AllLinear);
    let act = |toy: Toy| match with_lora {
        true => toy.with_lora(&lora, &device).map(|_| ()),
        false => toy
            .save_folder(out.path(), &SaveFolder::default())
            .map(|_| ()),
    };
    match act(toy.clone()) {
        Err(Nf4Error::Config {
            field,
            expected,
            given,
        }) => {
            assert_eq!(field, "model");
            assert!(expected.contains("materialize"), "{expected}");
            assert!(given.contains("weight`"), "{given}");
        }
        other => panic!("{other:?}"),
    }
    assert!(stored::file_names(out.path()).is_empty());
    if how != "apply_qlora" {
        act(toy.materialize()).expect("it is of floats");
    }
}

/// Its bits are in a form that safetensors has not, its values are not.
#[test]
fn what_burn_has_quantized_is_saved_as_floats_of_its_values() {
    use burn::module::Quantizer;
    use burn::tensor::quantization::Calibration;

    let device = Device::default();
    let scheme = device.settings().quantization.scheme;
    let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
    let folder = fixture("hf/f32/model");
    let toy = Toy::open(&folder, &device).quantize_weights(&mut quantizer);
    let table = &toy.embed_tokens.weight;
    assert!(matches!(table.dtype(), burn::tensor::DType::QFloat(_)));
    let out = TempDir::new().expect("a folder");
    let source = Checkpoint::open(&folder).expect("valid");
    let options = SaveFolder {
        source: Some(&source),
        ..SaveFolder::default()
    };
    toy.save_folder(out.path(), &options)
        .expect("it can be written");
    let again = Toy::open(out.path(), &device).embed_tokens.weight.val();
    assert_eq!(again.into_data(), table.val().dequantize().into_data());

    // A table that is no longer of floats is not trained, nor replaced.
    let lora = LoraConfig {
        modules_to_save: Some(vec!["embed_tokens".into()]),
        ..LoraConfig::new(TargetModules::AllLinear)
    };
    match toy.with_lora(&lora, &device) {
        Err(Nf4Error::Dtype { tensor, .. }) => assert_eq!(tensor, TABLE),
        other => panic!("{other:?}"),
    }
}

/// A tied model says so, whatever the entries that it is given.
#[rstest]
fn the_tie_is_written_down(#[values(false, true)] is_tied: bool) {
    let toy = Toy::open(model(is_tied).path(), &Device::default());
    let out = TempDir::new().expect("a folder");
    let entries = BTreeMap::from([("tie_word_embeddings".to_string(), json!(!is_tied))]);
    let options = SaveFolder {
        model_config: Some(entries.into_iter().collect()),
        ..SaveFolder::default()
    };
    toy.save_folder(out.path(), &options)
        .expect("it can be written");
    let config = stored::config_of(out.path());
    assert_eq!(config["tie_word_embeddings"], json!(is_tied));
    assert_eq!(tensors(out.path()).contains_key(HEAD), !is_tied);
}

#[test]
fn an_embedding_in_4_bit_is_refused() {
    let mut tensors = tensors(model(false).path());
    let values = stored::sine(16 * 8);
    let packed = BlockTensor::quantize(&values, &[16, 8], QuantConfig::default()).expect("finite");
    tensors.remove(TABLE);
    tensors.extend(stored::weight(TABLE, &packed));
    let folder = TempDir::new().expect("a folder");
    stored::write(folder.path(), &tensors);
    let toy = Toy::new(&stored::config_of(model(false).path()), &Device::default());
    let store = CheckpointStore::open(folder.path()).expect("valid");
    let text = misfits(toy.load_checkpoint(store));
    assert!(text.contains("1 tensor does not fit"), "{text}");
    assert!(text.contains("`model.embed_tokens.weight`"), "{text}");
    assert!(
        text.contains("a quantized weight for a dense tensor"),
        "{text}"
    );
}

#[test]
fn what_a_folder_claims_and_does_not_hold_is_an_error() {
    let folder = model(false);
    let mut config = stored::config_of(folder.path());
    config["quantization_config"] = json!({"quant_method": "bitsandbytes", "load_in_4bit": true});
    fs::write(folder.path().join("config.json"), config.to_string()).expect("a file");
    let toy = Toy::new(&config, &Device::default());
    let store = CheckpointStore::open(folder.path()).expect("valid");
    let error = toy.load_checkpoint(store).expect_err("it is refused");
    assert!(
        matches!(
            error,
            Nf4Error::Config {
                field: "quantization_config",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_model_with_branches_is_neither_loaded_nor_saved() {
    let device = Device::default();
    let folder = model(false);
    let lora = LoraConfig::new(TargetModules::AllLinear);
    let toy = Toy::open(folder.path(), &device)
        .with_lora(&lora, &device)
        .expect("it fits");
    let out = TempDir::new().expect("a folder");
    let saved = toy.save_folder(out.path(), &SaveFolder::default());
    let store = CheckpointStore::open(folder.path()).expect("valid");
    for error in [saved.map(|_| ()), toy.load_checkpoint(store).map(|_| ())] {
        let error = error.expect_err("it is refused").to_string();
        assert!(
            error.contains("`model.layers.0.self_attn.q_proj`"),
            "{error}"
        );
    }
    assert!(stored::file_names(out.path()).is_empty());
}

/// As `heads_are_tied_as_in_transformers` has it for the example.
#[rstest]
#[case::table(&[TABLE], Ok(true))]
#[case::head(&[HEAD], Ok(true))]
#[case::both_equal(&[TABLE, HEAD], Ok(true))]
#[case::both(&[TABLE, "other"], Ok(false))]
#[case::neither(&[], Err(TABLE))]
fn a_tied_model_takes_what_the_checkpoint_has(
    #[case] given: &[&str],
    #[case] expected: Result<bool, &str>,
) {
    let mut held = tensors(model(false).path());
    let table = held.remove(TABLE).expect("it is there");
    let other = held.remove(HEAD).expect("it is there");
    for &name in given {
        match name {
            "other" => held.insert(HEAD.into(), other.clone()),
            name => held.insert(name.into(), table.clone()),
        };
    }
    match (load(&held, true), expected) {
        (Ok(toy), Ok(is_tied)) => {
            assert_eq!(toy.lm_head.is_none(), is_tied);
            let values: Vec<u8> = toy
                .embed_tokens
                .weight
                .val()
                .into_data()
                .as_bytes()
                .to_vec();
            assert_eq!(values, table.bytes);
            // And back: an untied head is said to be one.
            let (folder, out) = (model(true), TempDir::new().expect("a folder"));
            let source = Checkpoint::open(folder.path()).expect("valid");
            let options = SaveFolder {
                source: Some(&source),
                ..SaveFolder::default()
            };
            toy.save_folder(out.path(), &options)
                .expect("it can be written");
            let config = stored::config_of(out.path());
            assert_eq!(config["tie_word_embeddings"], json!(is_tied));
            assert_eq!(tensors(out.path()).contains_key(HEAD), !is_tied);
        }
        (result, Err(named)) => {
            let text = misfits(result);
            assert!(text.contains(named), "{text}");
        }
        (Err(error), _) => panic!("{error}"),
    }
}

#[rstest]
fn codes_are_stored_as_asked_and_a_model_needs_no_source(
    #[values(Dtype::U8, Dtype::BF16)] storage: Dtype,
) {
    let device = Device::default();
    let toy = Toy::open(model(true).path(), &device);
    let toy = toy.quantize(&QuantizeLayers::default()).expect("finite");
    let out = TempDir::new().expect("a folder");
    let entries = BTreeMap::from([("model_type".to_string(), json!("toy"))]);
    let options = SaveFolder {
        model_config: Some(entries.into_iter().collect()),
        storage,
        compute_dtype: Some(FloatType::F16),
        ..SaveFolder::default()
    };
    toy.save_folder(out.path(), &options)
        .expect("it can be written");
    let config = stored::config_of(out.path());
    assert_eq!(config["model_type"], "toy");
    assert_eq!(config["dtype"], "float32");
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["bnb_4bit_compute_dtype"], "float16");
    let name = if storage == Dtype::U8 {
        "uint8"
    } else {
        "bfloat16"
    };
    assert_eq!(quantization["bnb_4bit_quant_storage"], name);
    let held = tensors(out.path());
    assert_eq!(held["model.layers.0.mlp.up_proj.weight"].dtype, storage);

    let again = toy
        .clone()
        .load_checkpoint(CheckpointStore::open(out.path()).expect("valid"));
    let logits = |toy: &Toy| toy.logits(&IDS, [1, IDS.len()], &device);
    assert_eq!(logits(&again.expect("it fits")), logits(&toy));
    match toy.save_folder(out.path(), &options) {
        Err(Nf4Error::FolderNotEmpty { .. }) => {}
        other => panic!("{other:?}"),
    }
    let options = SaveFolder {
        overwrite: true,
        ..options
    };
    toy.save_folder(out.path(), &options).expect("it may");
}

/// A model of floats keeps no claim to be in 4 bit.
#[test]
fn a_dequantized_model_is_saved_as_one_of_floats() {
    let device = Device::default();
    let folder = fixture("hf/bf16/model");
    let source = Checkpoint::open(&folder).expect("valid");
    let toy = Toy::open(&folder, &device)
        .dequantize(FloatType::BF16)
        .expect("it is there");
    let out = TempDir::new().expect("a folder");
    let options = SaveFolder {
        source: Some(&source),
        ..SaveFolder::default()
    };
    toy.save_folder(out.path(), &options)
        .expect("it can be written");
    let config = stored::config_of(out.path());
    assert!(config.get("quantization_config").is_none());
    assert_eq!(config["dtype"], "bfloat16");
    let checkpoint = Checkpoint::open(out.path()).expect("valid");
    assert!(checkpoint.quantized_weights().is_empty() && checkpoint.faults().is_empty());
}

#[test]
fn a_record_brings_branches_back() {
    let device = Device::default();
    let layer = |seed: u64| -> AnyLinear {
        device.seed(seed);
        let dense = burn::nn::LinearConfig::new(64, 32).init(&device);
        let layer = AnyLinear::from(dense)
            .quantize(QuantConfig::default())
            .expect("finite");
        layer
            .with_lora(&QLoraLinearConfig::new(2), &device)
            .expect("valid")
    };
    let (first, second) = (layer(1), layer(2));
    let loaded = second.load_record(first.clone().into_record());
    let x = burn::tensor::Tensor::<2>::ones([3, 64], &device);
    assert_eq!(
        loaded.forward(x.clone()).into_data(),
        first.forward(x).into_data()
    );
}
