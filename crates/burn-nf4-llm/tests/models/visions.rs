//! The text part of a model of text and images, against transformers: `fixtures/vision`.

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, CheckpointStore, SafetensorsFile};
use burn_nf4::format::FloatType;
use burn_nf4::model::{LinearLayers, SaveFolder};
use burn_nf4::peft::{
    Adapter, DenseTensor, LoraConfig, LoraModule, MergeOptions, TargetModules, merge_16bit,
};
use burn_nf4_llm::ModelError;
use burn_nf4_llm::model::{DecoderConfig, left_out, load};
use rstest::rstest;
use serde_json::{Value, json};

use crate::fixtures::{
    assert_text_is_theirs, fixture, io, logits, max_difference, open, open_folder,
};
use crate::stored::{self, config_of};

const MODEL: &str = "vision/gemma3/model";
const IO: &str = "vision/gemma3/io.safetensors";

/// A copy whose keys begin otherwise.
fn renamed(rename: impl Fn(&str) -> String) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let file = SafetensorsFile::open(fixture(MODEL).join("model.safetensors")).unwrap();
    let tensors = stored::read(&file).into_iter();
    let tensors = tensors.map(|(key, tensor)| (rename(&key), tensor));
    stored::write(folder.path(), &tensors.collect());
    fs::copy(
        fixture(MODEL).join("config.json"),
        folder.path().join("config.json"),
    )
    .unwrap();
    folder
}

/// As transformers 5 has the names in memory, and writes them if it is asked to.
fn newer_names(key: &str) -> String {
    match key.strip_prefix("language_model.model.") {
        Some(rest) => format!("model.language_model.{rest}"),
        None => format!("model.{key}"),
    }
}

#[rstest]
#[case::older_names(str::to_string)]
#[case::newer_names(newer_names)]
fn the_text_part_has_the_logits_of_the_whole(#[case] rename: fn(&str) -> String) {
    let folder = renamed(rename);
    let (model, config) = open_folder(folder.path(), None, &Device::default());
    let (ids, shape, theirs) = io(IO);
    let ours = logits(&model, &config, &ids, &shape);
    let difference = max_difference(&ours, &theirs);
    assert!(difference < 2e-5, "{difference:e}");
    assert!(
        model
            .linears()
            .iter()
            .all(|(_, layer)| layer.is_quantized())
    );
    assert_eq!(config.text_part_of.as_deref(), Some("gemma3"));

    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let out = left_out(&checkpoint, &config);
    let all = checkpoint.parameters();
    let text: Vec<_> = all.iter().filter(|key| !out.contains(key)).collect();
    assert_eq!((out.len(), text.len()), (34, 28));
    assert!(text.iter().all(|key| key.contains("language_model.")));
}

#[test]
fn the_text_part_has_the_text_of_the_whole() {
    let (model, config) = open(MODEL, None, &Device::default());
    assert_eq!(config.eos_token_ids, [2, 3]);
    let file = SafetensorsFile::open(fixture(IO)).unwrap();
    assert_text_is_theirs(&model, &config, &file);
}

/// Under the config of a model of text alone.
#[test]
fn the_text_part_is_saved_alone() {
    let (model, config) = open(MODEL, None, &Device::default());
    let source = Checkpoint::open(fixture(MODEL)).unwrap();
    let options = SaveFolder {
        source: Some(&source),
        model_config: Some(DecoderConfig::model_entries(&fixture(MODEL)).unwrap()),
        ..SaveFolder::default()
    };
    let out = tempfile::tempdir().unwrap();
    model.save_folder(out.path(), &options).unwrap();
    let written = config_of(out.path());
    assert_eq!(written["model_type"], "gemma3_text");
    assert_eq!(written["architectures"], json!(["Gemma3ForCausalLM"]));
    assert_eq!(written["quantization_config"]["load_in_4bit"], true);
    let (ids, shape, _) = io(IO);
    let before = logits(&model, &config, &ids, &shape);
    let (loaded, config) = open_folder(out.path(), None, &Device::default());
    assert_eq!(config.text_part_of, None);
    assert_eq!(logits(&loaded, &config, &ids, &shape), before);
}

#[rstest]
#[case::llama(json!({}), Some("LlamaForCausalLM"))]
#[case::phi3(json!({"model_type": "phi3"}), Some("Phi3ForCausalLM"))]
#[case::qwen3(json!({"model_type": "qwen3"}), Some("Qwen3ForCausalLM"))]
#[case::of_no_family(json!({"model_type": "opt"}), None)]
fn the_text_part_has_the_class_of_its_family(#[case] text: Value, #[case] class: Option<&str>) {
    let folder = tempfile::tempdir().unwrap();
    let whole = json!({
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text
    });
    fs::write(folder.path().join("config.json"), whole.to_string()).unwrap();
    let entries = DecoderConfig::model_entries(folder.path()).unwrap();
    let expected = class.map(|class| json!([class]));
    assert_eq!(entries.get("architectures"), expected.as_ref());
}

/// What is neither of the text nor of a known part is told of.
#[test]
fn a_tensor_of_another_part_is_an_error() {
    let folder = renamed(|key| key.replace("multi_modal_projector", "audio_tower"));
    let config = DecoderConfig::from_folder(folder.path()).unwrap();
    let store = CheckpointStore::open(folder.path()).unwrap();
    match load(store, &config, FloatType::F32, &Device::default()) {
        Err(ModelError::Nf4(Nf4Error::Misfit { tensors, .. })) => {
            let keys: Vec<&str> = tensors.iter().map(|tensor| tensor.key.as_str()).collect();
            let expected = ["mm_input_projection_weight", "mm_soft_emb_norm.weight"];
            assert_eq!(keys, expected.map(|key| format!("audio_tower.{key}")));
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
}

fn config(fields: Value) -> Result<DecoderConfig, ModelError> {
    DecoderConfig::from_json(fields.to_string().as_bytes(), Path::new("config.json"))
}

#[rstest]
#[case::no_text(json!({"model_type": "gemma3"}), "text_config")]
#[case::text_of_another_family(
    json!({"model_type": "llava", "text_config": {"model_type": "opt"}}),
    "text_config.model_type"
)]
#[case::field_of_the_text(
    json!({"model_type": "mistral3", "text_config": {"hidden_size": 0}}),
    "text_config.hidden_size"
)]
#[case::not_causal(
    json!({"model_type": "llava", "text_config": {"is_causal": false}}),
    "text_config.is_causal"
)]
#[case::not_causal_as_a_whole(
    json!({"model_type": "llava", "is_causal": false, "text_config": {}}),
    "is_causal"
)]
#[case::layers_that_see_images(json!({"model_type": "mllama", "text_config": {}}), "model_type")]
fn other_models_of_text_and_images_are_refused_by_name(#[case] fields: Value, #[case] name: &str) {
    match config(fields) {
        Err(ModelError::Unsupported { field, .. }) => assert_eq!(field, name),
        other => panic!("{other:?}"),
    }
}

#[rstest]
#[case::gemma3("gemma3", None, None, true)]
#[case::gemma3_of_its_own("gemma3", Some(false), Some(true), false)]
#[case::mistral3("mistral3", None, Some(false), true)]
#[case::llava("llava", None, None, false)]
#[case::llava_text("llava", Some(false), Some(true), true)]
#[case::llava_whole("llava", Some(true), None, true)]
fn the_head_is_tied_as_transformers_5_says(
    #[case] model_type: &str,
    #[case] whole: Option<bool>,
    #[case] text: Option<bool>,
    #[case] expected: bool,
) {
    let fields = json!({
        "model_type": model_type,
        "tie_word_embeddings": whole,
        "text_config": {"tie_word_embeddings": text.unwrap_or(false)},
    });
    assert_eq!(config(fields).unwrap().tie_word_embeddings, expected);
}

/// transformers' classes of text and images take the logits as the head gives them.
#[rstest]
#[case::gemma3("gemma3", json!({"final_logit_softcapping": 2.0}))]
#[case::gemma2_by_default("llava", json!({"model_type": "gemma2"}))]
#[case::granite("llava", json!({"model_type": "granite", "logits_scaling": 3.0}))]
fn logits_are_neither_capped_nor_scaled(#[case] model_type: &str, #[case] text: Value) {
    let whole = json!({"model_type": model_type, "text_config": text});
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), whole.to_string()).unwrap();
    // Also where the text part is saved alone.
    let entries = DecoderConfig::model_entries(folder.path()).unwrap();
    for fields in [whole, entries.into()] {
        let config = config(fields).unwrap();
        assert_eq!((config.logits_softcap, config.logits_scaling), (None, 1.0));
    }
}

/// Of branches of rank 2 on some of the layers of the model, which `rename` gives the names of the adapter.
fn adapter(targets: TargetModules, rename: impl Fn(&str) -> Option<String>) -> Adapter {
    let mut adapter = Adapter::new(LoraConfig {
        r: 2,
        ..LoraConfig::new(targets)
    })
    .unwrap();
    let source = Checkpoint::open(fixture(MODEL)).unwrap();
    for key in source.parameters() {
        let module = key.strip_suffix(".weight").unwrap_or_default();
        let Some(path) = rename(module).filter(|_| module.ends_with(".q_proj")) else {
            continue;
        };
        let [d_output, d_input] = match source.is_quantized(key) {
            true => source.weight_form(key).unwrap().shape,
            false => source.tensor_info(key).unwrap().shape.to_vec(),
        }[..] else {
            panic!("{key} is no matrix");
        };
        let factor = |shape: [usize; 2]| {
            let values = (0..shape[0] * shape[1]).map(|index| ((index % 7) as f32 - 3.0) / 20.0);
            let values: Vec<f32> = values.collect();
            DenseTensor::from_f32(&values, &shape, FloatType::F32).unwrap()
        };
        let branch = LoraModule {
            lora_a: factor([2, d_input]),
            lora_b: factor([d_output, 2]),
            magnitude: None,
            bias: None,
        };
        adapter.insert(&path, branch).unwrap();
    }
    adapter
}

/// As `finetune` makes it of the text part.
fn of_text(module: &str) -> Option<String> {
    let rest = module.strip_prefix("language_model.model.")?;
    Some(format!("model.{rest}"))
}

/// As PEFT makes it of the whole model with transformers 5.
fn of_whole(module: &str) -> Option<String> {
    Some(newer_names(module))
}

/// On the model and merged into its folder, whichever names that has.
#[rstest]
#[case::of_text(TargetModules::list(["q_proj"]), of_text)]
#[case::of_whole(TargetModules::list(["q_proj"]), of_whole)]
#[case::of_whole_by_pattern(
    TargetModules::Regex(r"model\.(language_model|vision_tower)\..*q_proj".into()),
    of_whole
)]
fn adapters_of_the_text_and_of_the_whole_fit(
    #[case] targets: TargetModules,
    #[case] names: fn(&str) -> Option<String>,
    #[values(str::to_string, newer_names)] rename: fn(&str) -> String,
) {
    let written = tempfile::tempdir().unwrap();
    adapter(targets, names).save(written.path()).unwrap();
    let adapter = Adapter::open(written.path()).unwrap();
    let folder = renamed(rename);
    let (ids, shape, before) = io(IO);
    let device = Device::default();

    let (model, config) = open_folder(folder.path(), None, &device);
    let (of_text, left_out) = adapter.clone().text_part();
    let is_of_images = |name: &String| name.starts_with("model.vision_tower.");
    assert!(left_out.iter().all(is_of_images), "{left_out:?}");
    let adapted = model.apply_adapter(&of_text, &device).unwrap();
    let adapted = logits(&adapted, &config, &ids, &shape);
    assert!(max_difference(&adapted, &before) > 1e-2);

    let base = Checkpoint::open(folder.path()).unwrap();
    adapter.check_base(&base).unwrap();
    let merged = tempfile::tempdir().unwrap();
    let options = MergeOptions::default();
    merge_16bit(
        &base,
        &adapter,
        merged.path(),
        Some(FloatType::F32),
        &options,
        |_| {},
    )
    .unwrap();
    let (model, config) = open_folder(merged.path(), None, &device);
    let difference = max_difference(&logits(&model, &config, &ids, &shape), &adapted);
    assert!(difference < 2e-5, "{difference:e}");

    // What is written again is what was read.
    let again = tempfile::tempdir().unwrap();
    of_text.save(again.path()).unwrap();
    let keys = |folder: &Path| -> Vec<String> {
        let file = SafetensorsFile::open(folder.join("adapter_model.safetensors")).unwrap();
        file.keys().map(String::from).collect()
    };
    let all = keys(written.path());
    assert!(keys(again.path()).iter().all(|key| all.contains(key)));
}
