//! The head in 4 bit: one of its own, and one that was the table of the embeddings.

use std::path::Path;

use burn::tensor::{DType, Device, Tensor};
use burn_nf4::checkpoint::{
    Checkpoint, DequantizeOptions, QuantizeOptions, dequantize_checkpoint, quantize_checkpoint,
};
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::model::{LinearLayers, SaveFolder};
use burn_nf4::nn::AnyLinear;
use burn_nf4::peft::{Adapter, MergeOptions, merge_4bit, merge_16bit};
use burn_nf4_llm::generate::{Request, Sampling, generate};
use burn_nf4_llm::model::config::DecoderConfig;
use burn_nf4_llm::model::{Decoder, HEAD};
use rstest::rstest;
use serde_json::json;

use crate::fixtures::{fixture, logits, max_difference, open, open_folder};
use crate::peft_cases::{self, Case, IDS, model};
use crate::stored::config_of;

const WEIGHT: &str = "lm_head.weight";

fn text(model: &Decoder, config: &DecoderConfig) -> Vec<Vec<u32>> {
    let request = Request {
        prompts: vec![vec![5, 9, 2, 7], vec![3, 1]],
        max_tokens: 12,
        sampling: Sampling::greedy(),
        eos: Vec::new(),
        capture: true,
        ..Request::default()
    };
    generate(model, config, &request, |_, _| Ok(()))
        .unwrap()
        .tokens
}

fn logits_of(model: &Decoder, config: &DecoderConfig) -> Vec<f32> {
    logits(model, config, &IDS, &[1, IDS.len()])
}

fn is_packed(model: &Decoder) -> bool {
    model
        .lm_head
        .as_ref()
        .is_some_and(|head| head.is_quantized())
}

fn norm(values: &[f32]) -> f32 {
    values.iter().map(|value| value * value).sum::<f32>().sqrt()
}

/// Soft caps and scales of logits among them.
#[rstest]
fn a_head_in_4_bit_says_what_its_decoded_values_say(
    #[values("gemma2", "gemma3_text", "granite", "llama3_tied", "qwen2", "qwen3")] name: &str,
) {
    let folder = format!("families/{name}/model");
    let (dense, config) = open(&folder, Some(FloatType::F32), &Device::default());
    let packed = dense.clone().quantize_head(QuantConfig::default()).unwrap();
    assert!(is_packed(&packed));
    let decoded = packed.clone().try_map_linears(|name, layer| match name {
        HEAD => layer.dequantize(FloatType::F32),
        _ => Ok(layer),
    });
    let decoded = decoded.unwrap();
    assert_eq!(text(&packed, &config), text(&decoded, &config));
    let [dense, packed, decoded] = [dense, packed, decoded].map(|model| logits_of(&model, &config));
    let rounding = max_difference(&packed, &decoded);
    assert!(rounding < 1e-4, "{rounding:e}");
    let error: Vec<f32> = packed
        .iter()
        .zip(&dense)
        .map(|(ours, exact)| ours - exact)
        .collect();
    // Of normal weights it is 9%; caps make it less.
    let share = norm(&error) / norm(&dense);
    assert!((1e-3..0.15).contains(&share), "{share}");
}

/// In the model, saved and loaded, or in the folder: the same weight and the same logits.
#[rstest]
fn a_folder_keeps_a_head_in_4_bit(#[values("llama3_tied", "qwen3", "gemma2")] name: &str) {
    let temporary = tempfile::tempdir().unwrap();
    let [dense, converted, saved] =
        ["dense", "converted", "saved"].map(|name| temporary.path().join(name));
    let source = Checkpoint::open(fixture(&format!("families/{name}/model"))).unwrap();
    dequantize_checkpoint(&source, &dense, &DequantizeOptions::default(), |_| ()).unwrap();
    let source = Checkpoint::open(&dense).unwrap();
    let options = QuantizeOptions {
        head: true,
        ..QuantizeOptions::default()
    };
    quantize_checkpoint(&source, &converted, &options, |_| ()).unwrap();
    let (of_folder, config) = open_folder(&converted, None, &Device::default());
    assert!(is_packed(&of_folder) && !config.tie_word_embeddings);
    let ours = logits_of(&of_folder, &config);

    let (model, config) = open_folder(&dense, None, &Device::default());
    let model = model.quantize(&Default::default()).unwrap();
    let model = model.quantize_head(QuantConfig::default()).unwrap();
    assert_eq!(max_difference(&logits_of(&model, &config), &ours), 0.0);
    let options = SaveFolder {
        source: Some(&source),
        ..SaveFolder::default()
    };
    model.save_folder(&saved, &options).unwrap();
    let (again, config) = open_folder(&saved, None, &Device::default());
    assert_eq!(max_difference(&logits_of(&again, &config), &ours), 0.0);
    let [saved, converted] = [saved, converted].map(|folder| {
        let config = config_of(&folder);
        assert_eq!(config["tie_word_embeddings"], json!(false));
        assert_eq!(
            config["quantization_config"]["llm_int8_skip_modules"],
            json!([])
        );
        Checkpoint::open(folder)
            .unwrap()
            .load_quantized(WEIGHT)
            .unwrap()
    });
    assert_eq!(saved, converted);
}

/// The folder of a model of floats whose head alone is in 4 bit.
fn base(is_tied: bool, folder: &Path) {
    let options = QuantizeOptions {
        head: true,
        skip_modules: vec!["model".into()],
        ..QuantizeOptions::default()
    };
    let dense = model(is_tied);
    let source = Checkpoint::open(dense.path()).unwrap();
    quantize_checkpoint(&source, folder, &options, |_| ()).unwrap();
}

/// Whatever an adapter changes, head and table among it: what is applied is what is merged.
#[test]
fn adapters_go_onto_a_head_in_4_bit() {
    let mut heads = [0; 2];
    for name in &peft_cases::names() {
        let case = Case::open(name);
        let temporary = tempfile::tempdir().unwrap();
        let [folder, floats, packed] =
            ["base", "floats", "packed"].map(|name| temporary.path().join(name));
        base(case.is_tied, &folder);
        let adapter = Adapter::open(case.folder().path()).expect(name);
        let (model, config) = open_folder(&folder, None, &Device::default());
        let applied = model
            .apply_adapter(&adapter, &Device::default())
            .expect(name);
        let ours = logits_of(&applied, &config);
        // A head that the adapter brings along is not in 4 bit.
        if !is_packed(&applied) {
            assert!(max_difference(&ours, &case.logits) < 1e-5, "{name}");
        }
        heads[usize::from(is_packed(&applied))] += 1;

        let checkpoint = Checkpoint::open(&folder).unwrap();
        let options = MergeOptions::default();
        merge_16bit(&checkpoint, &adapter, &floats, None, &options, |_| {}).expect(name);
        let (merged, config) = open_folder(&floats, None, &Device::default());
        let difference = max_difference(&logits_of(&merged, &config), &ours);
        assert!(difference < 1e-5, "{name}: {difference:e}");
        merge_4bit(&checkpoint, &adapter, &packed, &options, |_| {}).expect(name);
        let (merged, config) = open_folder(&packed, None, &Device::default());
        assert!(is_packed(&merged), "{name}");
        assert!(
            logits_of(&merged, &config)
                .iter()
                .all(|logit| logit.is_finite())
        );
    }
    assert!(heads.iter().all(|&count| count > 2), "{heads:?}");
}

/// Published in 16 bit and loaded in f32: the table goes back to what it was, and nothing else changes.
#[rstest]
fn a_table_goes_back_to_16_bit(
    #[values("llama3_tied", "gemma2", "qwen3", "smollm3")] name: &str,
    #[values(DType::BF16, DType::F16)] dtype: DType,
) {
    let folder = format!("families/{name}/model");
    let (mut model, config) = open(&folder, Some(FloatType::F32), &Device::default());
    let as_published = |table: Tensor<2>| table.cast(dtype).cast(DType::F32);
    model.embed_tokens = model.embed_tokens.map(as_published);
    if let Some(AnyLinear::Dense(head)) = &model.lm_head {
        let weight = as_published(head.weight.val().transpose());
        model.lm_head = Some(AnyLinear::from_weight(weight, None));
    }
    let small = model.clone().with_exact_tables();
    assert_eq!(small.embed_tokens.dtype(), dtype);
    let [_, floats] = <[usize; 2]>::from(small.size_bytes());
    let [_, before] = <[usize; 2]>::from(model.size_bytes());
    assert_eq!(2 * floats, before);
    assert_eq!(text(&small, &config), text(&model, &config));
    let difference = max_difference(&logits_of(&small, &config), &logits_of(&model, &config));
    assert!(difference < 1e-5, "{difference:e}");
}

/// One value that has no such type keeps the table in f32, and a model in another type is as it was.
#[rstest]
#[case::f32(FloatType::F32, DType::F32)]
#[case::bf16(FloatType::BF16, DType::BF16)]
fn a_table_that_would_lose_something_stays(#[case] dtype: FloatType, #[case] expected: DType) {
    let (model, config) = open(
        "families/llama3_tied/model",
        Some(dtype),
        &Device::default(),
    );
    let same = model.clone().with_exact_tables();
    assert_eq!(same.embed_tokens.dtype(), expected);
    assert_eq!(logits_of(&same, &config), logits_of(&model, &config));
}
