//! The head and the table of the embeddings, in every combination of flag and files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::Device;
use burn_nf4::checkpoint::{CheckpointStore, SafetensorsFile};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig};
use burn_nf4::nn::AnyLinear;
use burn_nf4::{Nf4Error, TensorMisfit};
use burn_nf4_llm::error::ModelError;
use burn_nf4_llm::model::Decoder;
use burn_nf4_llm::model::config::DecoderConfig;
use burn_nf4_llm::model::load as load_model;
use rstest::rstest;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::fixtures::{fixture, logits, max_difference};
use crate::stored::{self, Tensors};

const TABLE: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

#[derive(Deserialize)]
struct Ties {
    ids: Vec<i64>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    config: Value,
    form: String,
    /// By its key the tensor of the fixture.
    matrices: BTreeMap<String, String>,
    missing: Vec<String>,
    tied: bool,
    logits: Vec<f32>,
}

fn ties() -> Ties {
    let text = fs::read(fixture("configs/ties.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// The tensors of a folder, with some matrices.
fn tensors(matrices: &BTreeMap<String, String>) -> Tensors {
    let file = SafetensorsFile::open(fixture("configs/ties.safetensors")).unwrap();
    let held = stored::read(&file);
    let matrices = matrices
        .iter()
        .map(|(key, source)| (key.clone(), held[source].clone()));
    let mut tensors = held.clone();
    tensors.retain(|key, _| key.contains('.') && key != TABLE);
    tensors.extend(matrices);
    tensors
}

fn load(
    folder: &Path,
    config: &Value,
    tensors: &Tensors,
) -> Result<(Decoder, DecoderConfig), ModelError> {
    stored::write(folder, tensors);
    let config = DecoderConfig::from_json(config.to_string().as_bytes(), Path::new("config.json"))?;
    let store = CheckpointStore::open(folder)?;
    let model = load_model(store, &config, config.dtype, &Device::default())?;
    Ok((model, config))
}

fn misfits(result: Result<(Decoder, DecoderConfig), ModelError>) -> Vec<TensorMisfit> {
    match result {
        Err(ModelError::Nf4(Nf4Error::Misfit { tensors, .. })) => tensors,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("loaded"),
    }
}

/// Loads something that does not fit in one tensor, to be told which.
fn misfit(tensors: &Tensors) -> String {
    let folder = tempfile::tempdir().unwrap();
    let misfits = misfits(load(folder.path(), &tied(), tensors));
    assert_eq!(misfits.len(), 1, "{misfits:?}");
    misfits[0].to_string()
}

/// `ties.json` comes from transformers, see `make_ties.py`. It draws a missing matrix at random;
/// here that is an error.
#[test]
fn heads_are_tied_as_in_transformers() {
    let Ties { ids, cases } = ties();
    assert_eq!(cases.len(), 36);
    for case in cases {
        let name = format!("{} {}", case.form, case.config);
        let folder = tempfile::tempdir().unwrap();
        let loaded = load(folder.path(), &case.config, &tensors(&case.matrices));
        if !case.missing.is_empty() {
            let misfits = misfits(loaded);
            let mut missing = misfits.iter().filter(|tensor| tensor.given.is_none());
            let named = missing.any(|tensor| case.missing.contains(&tensor.key));
            assert!(named, "{name}: {misfits:?}");
            continue;
        }
        let (model, config) = loaded.unwrap_or_else(|error| panic!("{name}: {error}"));
        let all = logits(&model, &config, &ids, &[1, ids.len()]);
        let last = &all[(ids.len() - 1) * config.vocab_size..];
        let difference = max_difference(last, &case.logits);
        assert!(difference < 2e-5, "{name}: {difference:e}");
        // Equal ones are one matrix where the flag asks for it.
        assert_eq!(model.lm_head.is_none(), case.tied, "{name}");
    }
}

fn own_head() -> Tensors {
    let own = [(TABLE, TABLE), (HEAD, "other")];
    tensors(&own.map(|(key, source)| (key.into(), source.into())).into())
}

/// The config of the fixture, tied.
fn tied() -> Value {
    ties().cases.swap_remove(0).config
}

/// In place of a float tensor its packed form.
fn pack(tensors: &mut Tensors, key: &str) {
    let values: Vec<f32> = tensors[key]
        .bytes
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    let shape = tensors[key].shape.clone();
    let packed = BlockTensor::quantize(&values, &shape, QuantConfig::default()).unwrap();
    tensors.remove(key);
    tensors.extend(stored::weight(key, &packed));
}

#[test]
fn a_quantized_head_of_its_own_is_kept() {
    let mut tensors = own_head();
    pack(&mut tensors, HEAD);
    let folder = tempfile::tempdir().unwrap();
    let (model, _) = load(folder.path(), &tied(), &tensors).unwrap();
    assert!(matches!(model.lm_head, Some(AnyLinear::Nf4(_))));
}

#[test]
fn a_packed_table_is_refused_by_name() {
    let mut tensors = own_head();
    pack(&mut tensors, TABLE);
    let folder = tempfile::tempdir().unwrap();
    match load(folder.path(), &tied(), &tensors).map(|_| ()) {
        Err(ModelError::Setting { name, given, .. }) => {
            assert_eq!((name, given), (format!("`{TABLE}`"), "quantized".into()));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_packed_head_gives_no_embeddings() {
    let mut tensors = own_head();
    pack(&mut tensors, HEAD);
    tensors.remove(TABLE);
    let text = misfit(&tensors);
    assert!(
        text.contains(TABLE) && text.contains("is missing"),
        "{text}"
    );
}

#[rstest]
#[case::bias("lm_head.bias", &[24], "`lm_head.bias` is unexpected")]
#[case::other_vocabulary(HEAD, &[23, 16], "`lm_head.weight` is [23, 16] of F32, expected [24, 16] of")]
fn a_head_of_another_form_is_refused_by_name(
    #[case] key: &str,
    #[case] shape: &[usize],
    #[case] expected: &str,
) {
    let mut tensors = own_head();
    let values = vec![0.5; shape.iter().product()];
    tensors.insert(key.into(), stored::floats(&values, shape));
    let text = misfit(&tensors);
    assert!(text.contains(expected), "{text}");
}

/// Llama's first checkpoints hold these buffers, which transformers computes.
#[test]
fn rotary_buffers_are_not_read() {
    let mut tensors = own_head();
    let buffer = "model.layers.0.self_attn.rotary_emb.inv_freq";
    tensors.insert(buffer.into(), stored::floats(&[f32::NAN; 4], &[4]));
    let folder = tempfile::tempdir().unwrap();
    load(folder.path(), &tied(), &tensors).unwrap();
    let other = buffer.replace("inv_freq", "other");
    tensors.insert(other.clone(), stored::floats(&[1.0; 4], &[4]));
    assert!(misfit(&tensors).contains(&other));
}

/// As in transformers, the type that both are cast to decides whether they are equal.
#[test]
fn heads_are_compared_in_the_type_of_the_model() {
    let rounded = [(TABLE, TABLE), (HEAD, "rounded")];
    let rounded = rounded.map(|(key, source)| (key.into(), source.into()));
    let folder = tempfile::tempdir().unwrap();
    let mut config = tied();
    config["dtype"] = json!("bfloat16");
    let (model, config) = load(folder.path(), &config, &tensors(&rounded.into())).unwrap();
    assert_eq!(config.dtype, FloatType::BF16);
    assert!(model.lm_head.is_none());
}
