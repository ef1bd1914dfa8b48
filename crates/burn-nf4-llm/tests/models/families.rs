//! Every family against transformers: `fixtures/families` holds a tiny model of each, in NF4, and what
//! transformers computes with it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_nf4::checkpoint::{Checkpoint, SafetensorsFile};
use burn_nf4::format::{FloatType, QuantConfig, QuantType};
use burn_nf4::model::{LinearLayers, QuantizeLayers, SaveFolder};
use burn_nf4::peft::{Adapter, LoraConfig, TargetModules};
use burn_nf4_llm::error::ModelError;
use burn_nf4_llm::generate::{Request, Sampling, generate};
use burn_nf4_llm::model::cache::KvCache;
use burn_nf4_llm::model::config::Biases;
use burn_nf4_llm::model::family::model_types;
use burn_nf4_llm::model::{Activation, Decoder, DecoderConfig, HEAD};
use burn_nf4_llm::train::data::Batch;
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{Settings, Trainer};

use rstest::rstest;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::fixtures::{
    PROMPT, assert_text_is_theirs, fixture, floats, ints, logits, max_difference, open,
    open_folder, random_numbers,
};
use crate::stored;

/// Logits are about 1 and pass through sums of up to 192 products in f32.
const TOLERANCE: f32 = 2e-5;

fn is_router(module: &str) -> bool {
    [".mlp.gate", ".mlp.router"]
        .iter()
        .any(|end| module.ends_with(end))
}

struct Family {
    folder: PathBuf,
    model: Decoder,
    config: DecoderConfig,
    theirs: SafetensorsFile,
}

impl Family {
    fn open(name: &str) -> Self {
        let folder = format!("families/{name}");
        let (model, config) = open(&format!("{folder}/model"), None, &Device::default());
        let theirs = SafetensorsFile::open(fixture(&format!("{folder}/io.safetensors"))).unwrap();
        Self {
            folder: fixture(&folder),
            model,
            config,
            theirs,
        }
    }

    fn assert_near(&self, ours: &[f32], key: &str) {
        let (theirs, _) = self.theirs.load_float::<f32>(key).unwrap();
        let difference = max_difference(ours, &theirs);
        assert!(difference < TOLERANCE, "{key}: {difference:e}");
    }

    fn tokens(&self, ids: Vec<i64>, shape: [usize; 2]) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(ids, shape), &self.model.device())
    }
}

fn has_the_logits(family: &Family) {
    let (ids, shape) = ints(&family.theirs, "input_ids");
    let ours = logits(&family.model, &family.config, &ids, &shape);
    family.assert_near(&ours, "logits");
}

/// Past the window of those that have one: 12 tokens.
fn has_them_in_two_parts_with_a_cache(family: &Family) {
    let (ids, shape) = ints(&family.theirs, "input_ids");
    let [rows, length] = [shape[0], shape[1]];
    let ids = family.tokens(ids, [rows, length]);
    let mut rope = family.model.rope_tables(&family.config);
    let mut cache = KvCache::new(family.config.layers.len(), vec![0; rows]);
    let first = 17;
    let parts = [(0, first), (first, length - first)].map(|(start, length)| {
        let ids = ids.clone().narrow(1, start, length);
        let hidden = family.model.hidden(ids, &mut rope, Some(&mut cache));
        family.model.head(hidden)
    });
    let ours = floats(Tensor::cat(parts.into(), 1));
    family.assert_near(&ours, "logits");
}

fn has_those_of_a_padded_batch(family: &Family) {
    let (ids, shape) = ints(&family.theirs, "padded_ids");
    let (mask, _) = ints(&family.theirs, "padded_mask");
    let [rows, length] = [shape[0], shape[1]];
    let padding = mask.chunks(length).map(|row| {
        let pad = row.iter().position(|&seen| seen == 1).unwrap();
        assert!(row[pad..].iter().all(|&seen| seen == 1));
        pad
    });
    let padding: Vec<usize> = padding.collect();
    assert!(padding.iter().any(|&pad| pad > 0));
    let mut rope = family.model.rope_tables(&family.config);
    let mut cache = KvCache::new(family.config.layers.len(), padding);
    let ids = family.tokens(ids, [rows, length]);
    let ours = floats(family.model.next_logits(ids, &mut rope, &mut cache));
    family.assert_near(&ours, "padded_logits");
}

fn generates_the_same_text(family: &Family) {
    assert_text_is_theirs(&family.model, &family.config, &family.theirs);
}

/// Under the names that it had.
fn is_saved_as_it_was(family: &Family) {
    let source = Checkpoint::open(family.folder.join("model")).unwrap();
    let options = SaveFolder {
        source: Some(&source),
        ..SaveFolder::default()
    };
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("saved");
    family.model.save_folder(&folder, &options).unwrap();
    let saved = Checkpoint::open(&folder).unwrap();
    assert_eq!(saved.parameters(), source.parameters());
    let (model, config) = open_folder(&folder, None, &Device::default());
    let (ids, shape) = ints(&family.theirs, "input_ids");
    family.assert_near(&logits(&model, &config, &ids, &shape), "logits");
}

/// In 4 bit and in files, whatever of it was there before. Other layers than those that it had in 4 bit are
/// quantized too; a mixture's experts one by one.
fn is_the_same_quantized_and_saved(family: &Family) {
    let device = Device::default();
    let source = Checkpoint::open(family.folder.join("model")).unwrap();
    let (model, config) = open_folder(&family.folder.join("model"), None, &device);
    let dense = model.dequantize(FloatType::F32).unwrap();
    let (ids, shape) = ints(&family.theirs, "input_ids");
    family.assert_near(&logits(&dense, &config, &ids, &shape), "logits");
    let options = QuantizeLayers {
        config: QuantConfig {
            quant_type: QuantType::Fp4,
            ..QuantConfig::default()
        },
        experts: true,
        ..QuantizeLayers::default()
    };
    let model = dense.quantize(&options).unwrap();
    let ours = logits(&model, &config, &ids, &shape);
    let out = tempfile::tempdir().unwrap();
    let options = SaveFolder {
        source: Some(&source),
        ..SaveFolder::default()
    };
    model.save_folder(out.path(), &options).unwrap();
    let (loaded, config) = open_folder(out.path(), None, &device);
    let layers = loaded.linears();
    for (name, layer) in layers {
        let is_kept = name == HEAD || is_router(&name);
        assert_eq!(layer.is_quantized(), !is_kept, "{name}");
    }
    assert_eq!(logits(&loaded, &config, &ids, &shape), ours);
}

/// A few steps of QLoRA lessen the loss, and the adapter gives the same logits on the model and in it.
fn learns_an_adapter(family: &Family) {
    let device = Device::default().autodiff();
    let folder = family.folder.join("model");
    let lora = LoraConfig::new(TargetModules::AllLinear);
    let (ids, shape) = ints(&family.theirs, "input_ids");
    let rows: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
    let batch = Batch::new(&rows.chunks(shape[1]).collect::<Vec<_>>());
    let [mut kept, mut again] = [false, true].map(|checkpointing| {
        let (model, config) = open_folder(&folder, None, &device);
        let _drawn = random_numbers();
        device.seed(3);
        let model = model.with_lora(&lora, &device).unwrap();
        let schedule = Schedule {
            peak: 1e-2,
            decay: Decay::Constant,
            warmup: 0,
            total: 3,
        };
        let settings = Settings::new(schedule, &lora).unwrap();
        Trainer::new(model, &config, lora.clone(), settings, checkpointing).unwrap()
    });
    let losses = [(); 3].map(|()| kept.step(std::slice::from_ref(&batch)).unwrap().loss);
    assert!(losses[2] < losses[1] && losses[1] < losses[0], "{losses:?}");
    // Computed twice, each layer has the gradients that it has at once.
    for loss in &losses[..2] {
        let difference = (again.step(std::slice::from_ref(&batch)).unwrap().loss - loss).abs();
        assert!(difference < 1e-5, "{difference:e}");
    }

    let out = tempfile::tempdir().unwrap();
    kept.save_adapter(out.path()).unwrap();
    let adapter = Adapter::open(out.path()).unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let adapted: BTreeSet<String> = adapter
        .modules()
        .map(|(name, _)| format!("{name}.weight"))
        .collect();
    for weight in checkpoint.quantized_weights() {
        assert!(adapted.contains(weight), "{weight}");
    }
    for weight in &adapted {
        // PEFT counts the experts and the router of a mixture among all linear layers, and so they are here.
        let module = weight.trim_end_matches(".weight");
        let is_of_mixture = weight.contains(".experts.") || is_router(module);
        assert!(is_of_mixture || checkpoint.is_quantized(weight), "{weight}");
    }
    let (base, config) = open_folder(&folder, None, &Device::default());
    let model = base.apply_adapter(&adapter, &Device::default()).unwrap();
    let adapted = logits(&model, &config, &ids, &shape);
    let trained = logits(&kept.model.valid(), &config, &ids, &shape);
    assert_eq!(max_difference(&adapted, &trained), 0.0);
    let merged = model.clone().merge(None).unwrap();
    let difference = max_difference(&logits(&merged, &config, &ids, &shape), &adapted);
    // The branch is summed apart or within the weight.
    assert!(difference < 1e-4, "{difference:e}");

    // Merged into the weights as they are in files: in 4 bit where they were so.
    let options = SaveFolder {
        source: Some(&checkpoint),
        ..SaveFolder::default()
    };
    let saved = tempfile::tempdir().unwrap();
    let merged = model.merge_4bit().unwrap();
    merged.save_folder(saved.path(), &options).unwrap();
    let ours = logits(&merged, &config, &ids, &shape);
    let (loaded, config) = open_folder(saved.path(), None, &Device::default());
    assert_eq!(logits(&loaded, &config, &ids, &shape), ours);
    let merged = Checkpoint::open(saved.path()).unwrap();
    assert_eq!(merged.quantized_weights(), checkpoint.quantized_weights());
}

macro_rules! families {
    ($($name:ident)*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn logits() {
                has_the_logits(&Family::open(stringify!($name)));
            }

            #[test]
            fn two_parts() {
                has_them_in_two_parts_with_a_cache(&Family::open(stringify!($name)));
            }

            #[test]
            fn padded() {
                has_those_of_a_padded_batch(&Family::open(stringify!($name)));
            }

            #[test]
            fn saved() {
                is_saved_as_it_was(&Family::open(stringify!($name)));
            }

            #[test]
            fn quantized() {
                is_the_same_quantized_and_saved(&Family::open(stringify!($name)));
            }

            #[test]
            fn trained() {
                learns_an_adapter(&Family::open(stringify!($name)));
            }

            #[test]
            fn generated() {
                generates_the_same_text(&Family::open(stringify!($name)));
            }
        }
    )*};
}

families! {
    gemma2 gemma3_text gpt_oss granite llama3_tied llama_biases mistral_window olmo2 phi3 qwen2 qwen2_window qwen3
    qwen3_moe smollm3
}

#[rstest]
#[case::llama("llama3_tied", &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])]
#[case::gpt_oss("gpt_oss", &["q_proj", "k_proj", "v_proj", "o_proj"])]
#[case::phi3("phi3", &["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])]
#[case::qwen3_moe("qwen3_moe", &["q_proj", "k_proj", "v_proj", "o_proj"])]
fn the_linear_layers_of_a_family_are_adapted_by_default(
    #[case] name: &str,
    #[case] expected: &[&str],
) {
    let model = Family::open(name).model;
    assert_eq!(model.default_target_modules(), expected);
}

#[derive(Deserialize)]
struct Variants {
    ids: Vec<i64>,
    variants: Vec<Variant>,
}

#[derive(Deserialize)]
struct Variant {
    name: String,
    config: Value,
    generated: Vec<u32>,
}

/// `variants.json` comes from transformers, see `make_variants.py`: what the models above do not have, and
/// older spellings. Texts of 20 tokens, past windows of 5, and past the 12 where long factors begin.
struct Checked {
    ids: Vec<i64>,
    variants: Vec<Variant>,
    file: SafetensorsFile,
}

impl Checked {
    fn open() -> Self {
        let text = std::fs::read(fixture("families/variants.json")).unwrap();
        let Variants { ids, variants } = serde_json::from_slice(&text).unwrap();
        let file = SafetensorsFile::open(fixture("families/variants.safetensors")).unwrap();
        Self {
            ids,
            variants,
            file,
        }
    }

    fn model(&self, variant: &Variant, dtype: FloatType) -> (Decoder, DecoderConfig) {
        let prefix = format!("{}/", variant.name);
        let held = stored::read(&self.file);
        let tensors = held.into_iter().filter_map(|(key, tensor)| {
            let key = key.strip_prefix(&prefix)?;
            (!key.starts_with("logits")).then(|| (key.to_string(), tensor))
        });
        let folder = tempfile::tempdir().unwrap();
        stored::write(folder.path(), &tensors.collect());
        let config = variant.config.to_string();
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        open_folder(folder.path(), Some(dtype), &Device::default())
    }

    fn logits(&self, variant: &Variant, dtype: FloatType) -> (Vec<f32>, DecoderConfig) {
        let (model, config) = self.model(variant, dtype);
        let ours = logits(&model, &config, &self.ids, &[1, self.ids.len()]);
        (ours, config)
    }

    fn theirs(&self, variant: &Variant, key: &str) -> Vec<f32> {
        let key = format!("{}/{key}", variant.name);
        self.file.load_float::<f32>(&key).unwrap().0
    }
}

#[test]
fn configs_that_say_something_else_have_the_logits_of_transformers() {
    let checked = Checked::open();
    for variant in &checked.variants {
        let (ours, _) = checked.logits(variant, FloatType::F32);
        let theirs = checked.theirs(variant, "logits");
        let difference = max_difference(&ours, &theirs);
        let largest = max_difference(&theirs, &vec![0.0; ours.len()]);
        let name = &variant.name;
        // Sums of up to 32 products, relative to the largest logit.
        assert!(
            difference < 2e-5 * largest.max(1.0),
            "{name}: {difference:e}"
        );
    }
}

#[test]
fn configs_that_say_something_else_have_the_texts_of_transformers() {
    let checked = Checked::open();
    for variant in &checked.variants {
        let (model, config) = checked.model(variant, FloatType::F32);
        let prompt = checked.ids[..PROMPT].iter().map(|&id| id as u32).collect();
        let request = Request {
            prompts: vec![prompt],
            max_tokens: variant.generated.len(),
            sampling: Sampling::greedy(),
            eos: Vec::new(),
            capture: true,
            ..Request::default()
        };
        let report = generate(&model, &config, &request, |_, _| Ok(())).unwrap();
        assert_eq!(report.tokens[0], variant.generated, "{}", variant.name);
    }
}

/// Rounded where transformers rounds, with the scores of attention in f32 as its flash kernels have them.
/// The measure is how far the rounding takes transformers from its own logits in f32.
#[test]
fn bf16_is_rounded_as_in_transformers() {
    let checked = Checked::open();
    for variant in &checked.variants {
        let (ours, config) = checked.logits(variant, FloatType::BF16);
        let theirs = checked.theirs(variant, "logits_bf16");
        let exact = checked.theirs(variant, "logits");
        let rounding = root_mean_square(&theirs, &exact);
        let difference = root_mean_square(&ours, &theirs) / rounding;
        let bound = match (config.biases == Biases::default(), config.activation) {
            // The same operations in the same types: sums in another order are left.
            (true, Activation::GeluTanh) => 0.1,
            // Burn rounds the sigmoid of SiLU too.
            (true, Activation::Silu | Activation::ClampedSwiGlu) => 1.0,
            // PyTorch adds a bias before it rounds the product. Two independent roundings would be the
            // square root of two apart.
            (false, _) => 1.42,
        };
        let name = &variant.name;
        assert!(difference <= bound, "{name}: {difference}");
        assert_ne!(
            root_mean_square(&ours, &exact),
            0.0,
            "{name}: in another type"
        );
    }
}

fn root_mean_square(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
    (squares.sum::<f64>() / a.len() as f64).sqrt()
}

#[derive(Deserialize)]
struct Defaults {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    tie_word_embeddings: bool,
    eos_token_id: Option<u32>,
    head_dim: usize,
    windows: Vec<Option<usize>>,
    thetas: Vec<Option<f32>>,
}

/// `defaults.json` comes from transformers, see `make_variants.py`.
#[test]
fn fields_left_out_have_the_defaults_of_the_family() {
    let text = std::fs::read(fixture("families/defaults.json")).unwrap();
    let all: BTreeMap<String, Defaults> = serde_json::from_slice(&text).unwrap();
    assert!(all.keys().map(String::as_str).eq(model_types()));
    for (name, theirs) in all {
        let ours = config(json!({ "model_type": name })).unwrap();
        assert_eq!(ours.vocab_size, theirs.vocab_size, "{name}");
        assert_eq!(ours.hidden_size, theirs.hidden_size, "{name}");
        assert_eq!(ours.intermediate_size, theirs.intermediate_size, "{name}");
        let heads = [ours.num_attention_heads, ours.num_key_value_heads];
        let expected = [theirs.num_attention_heads, theirs.num_key_value_heads];
        assert_eq!(heads, expected, "{name}");
        assert_eq!(ours.head_dim, theirs.head_dim, "{name}");
        let positions = theirs.max_position_embeddings;
        assert_eq!(ours.max_positions, positions, "{name}");
        assert_eq!(ours.rms_norm_eps, theirs.rms_norm_eps, "{name}");
        let (tied, eos) = (theirs.tie_word_embeddings, theirs.eos_token_id);
        assert_eq!(ours.tie_word_embeddings, tied, "{name}");
        assert!(ours.eos_token_ids.into_iter().eq(eos), "{name}");
        let windows: Vec<_> = ours.layers.iter().map(|layer| layer.window).collect();
        assert_eq!(windows, theirs.windows, "{name}");
        let theta = |rope: usize| {
            // The second pair of channels turns by theta^(-2 / dim).
            let rope = &ours.ropes[rope];
            rope.inverse_frequencies(1)[1].powf(rope.rotary_dim as f32 / -2.0)
        };
        for (layer, expected) in ours.layers.iter().zip(theirs.thetas) {
            let ours = layer.rope.map(theta);
            let is_near = match (ours, expected) {
                (Some(ours), Some(expected)) => (ours / expected - 1.0).abs() < 1e-4,
                (ours, expected) => ours == expected,
            };
            assert!(is_near, "{name}: {ours:?} and {expected:?}");
        }
    }
}

fn config(fields: Value) -> Result<DecoderConfig, ModelError> {
    DecoderConfig::from_json(fields.to_string().as_bytes(), Path::new("config.json"))
}

/// Of 4 pairs of channels.
fn longrope(name: &str, value: Value) -> Value {
    let mut fields = json!({
        "type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 2.0, 3.0, 4.0],
    });
    fields[name] = value;
    json!({"hidden_size": 64, "num_attention_heads": 8, "rope_scaling": fields})
}

/// What a family has that is not implemented, and what makes no sense: transformers stops at some of it,
/// and reads other of it without effect.
#[rstest]
#[case::gemma2_both_ways("gemma2", json!({"use_bidirectional_attention": true}), "use_bidirectional_attention")]
#[case::gemma2_cap("gemma2", json!({"attn_logit_softcapping": 0.0}), "attn_logit_softcapping")]
#[case::gemma2_final_cap("gemma2", json!({"final_logit_softcapping": -1.0}), "final_logit_softcapping")]
#[case::gemma2_scalar("gemma2", json!({"query_pre_attn_scalar": 0}), "query_pre_attn_scalar")]
#[case::gemma2_scalar_null("gemma2", json!({"query_pre_attn_scalar": null}), "query_pre_attn_scalar")]
#[case::gemma2_activation("gemma2", json!({"hidden_activation": "gelu"}), "hidden_activation")]
#[case::gemma2_head("gemma2", json!({"head_dim": null}), "head_dim")]
#[case::gemma2_no_window("gemma2", json!({"sliding_window": null}), "layer_types")]
#[case::gemma2_window("gemma2", json!({"sliding_window": 0}), "sliding_window")]
#[case::gemma2_types("gemma2", json!({"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}), "layer_types")]
#[case::gemma2_few_types("gemma2", json!({"layer_types": ["full_attention"]}), "layer_types")]
#[case::gemma2_ropes(
    "gemma2",
    json!({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}),
    "rope_parameters.full_attention"
)]
#[case::gemma3_both_ways("gemma3_text", json!({"use_bidirectional_attention": true}), "use_bidirectional_attention")]
#[case::gemma3_cap("gemma3_text", json!({"attn_logit_softcapping": 50.0}), "attn_logit_softcapping")]
#[case::gemma3_pattern("gemma3_text", json!({"sliding_window_pattern": 0}), "sliding_window_pattern")]
#[case::gemma3_rope_of_all("gemma3_text", json!({"rope_parameters": {"rope_theta": 1e6}}), "rope_parameters.rope_theta")]
#[case::gemma3_rope_kind(
    "gemma3_text",
    json!({"rope_parameters": {"sliding_attention": {"rope_type": "mrope"}}}),
    "rope_parameters.sliding_attention.rope_type"
)]
#[case::gemma3_scaling("gemma3_text", json!({"rope_scaling": {"rope_type": "linear"}}), "rope_scaling.factor")]
#[case::gemma3_older_type(
    "gemma3_text",
    json!({"rope_scaling": {"type": "linear", "factor": 8.0}}),
    "rope_scaling.type"
)]
#[case::gemma3_base("gemma3_text", json!({"rope_local_base_freq": 0}), "rope_local_base_freq")]
#[case::gemma3_vision("gemma3", json!({}), "text_config")]
#[case::gemma2_tiny_cap("gemma2", json!({"attn_logit_softcapping": 1e-60}), "attn_logit_softcapping")]
#[case::granite_huge_scores("granite", json!({"attention_multiplier": 1e60}), "attention_multiplier")]
#[case::llama_layers("llama", json!({"num_hidden_layers": 1_000_000}), "num_hidden_layers")]
#[case::llama_hidden("llama", json!({"hidden_size": u64::MAX}), "hidden_size")]
#[case::gpt_oss_activation("gpt_oss", json!({"hidden_act": "gelu_pytorch_tanh"}), "hidden_act")]
#[case::gpt_oss_limit("gpt_oss", json!({"swiglu_limit": 6.0}), "swiglu_limit")]
#[case::gpt_oss_alpha("gpt_oss", json!({"swiglu_alpha": 1.0}), "swiglu_alpha")]
#[case::gpt_oss_no_experts("gpt_oss", json!({"num_local_experts": 0}), "num_local_experts")]
#[case::gpt_oss_chosen("gpt_oss", json!({"num_experts_per_tok": 9, "num_local_experts": 8}), "num_experts_per_tok")]
#[case::gpt_oss_two_counts("gpt_oss", json!({"num_local_experts": 4, "num_experts": 8}), "num_local_experts")]
#[case::gpt_oss_no_window("gpt_oss", json!({"sliding_window": null}), "layer_types")]
#[case::gpt_oss_types("gpt_oss", json!({"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}), "layer_types")]
#[case::gpt_oss_rope("gpt_oss", json!({"rope_parameters": {"rope_type": "ntk"}}), "rope_parameters.rope_type")]
#[case::gpt_oss_biases("gpt_oss", json!({"attention_bias": "yes"}), "attention_bias")]
#[case::granite_scaling("granite", json!({"logits_scaling": 0}), "logits_scaling")]
#[case::granite_scores("granite", json!({"attention_multiplier": null}), "attention_multiplier")]
#[case::granite_types("granite", json!({"layer_types": ["sliding_attention"]}), "layer_types")]
#[case::olmo2_activation("olmo2", json!({"hidden_act": "relu"}), "hidden_act")]
#[case::phi3_odd_part("phi3", json!({"partial_rotary_factor": 0.1}), "rope_parameters.partial_rotary_factor")]
#[case::phi3_no_part("phi3", json!({"partial_rotary_factor": 0.0}), "rope_parameters.partial_rotary_factor")]
#[case::phi3_more_than_all("phi3", json!({"partial_rotary_factor": 2.0}), "rope_parameters.partial_rotary_factor")]
#[case::phi3_linear("phi3", json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), "rope_scaling.rope_type")]
#[case::phi3_few_factors("phi3", longrope("short_factor", json!([1.0])), "rope_scaling.short_factor")]
#[case::phi3_no_factors(
    "phi3",
    longrope("long_factor", Value::Null),
    "rope_scaling.long_factor"
)]
#[case::phi3_factor_zero("phi3", longrope("long_factor", json!([1.0, 1.0, 0.0, 1.0])), "rope_scaling.long_factor")]
#[case::phi3_factor_text("phi3", longrope("long_factor", json!(["1", 1.0, 1.0, 1.0])), "rope_scaling.long_factor")]
#[case::phi3_scale("phi3", longrope("attention_factor", json!(-1.0)), "rope_scaling.attention_factor")]
#[case::phi3_other_key("phi3", longrope("short_mscale", json!(1.0)), "rope_scaling.short_mscale")]
#[case::qwen2_window_unused(
    "qwen2",
    json!({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}),
    "layer_types"
)]
#[case::qwen2_part("qwen2", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor")]
#[case::qwen3_head("qwen3", json!({"head_dim": 7}), "head_dim")]
#[case::qwen3_long_head("qwen3", json!({"head_dim": 258}), "head_dim")]
#[case::qwen3_moe_chosen("qwen3_moe", json!({"num_experts_per_tok": 9, "num_experts": 8}), "num_experts_per_tok")]
#[case::qwen3_moe_none_chosen("qwen3_moe", json!({"num_experts_per_tok": 0}), "num_experts_per_tok")]
#[case::qwen3_moe_two_counts("qwen3_moe", json!({"num_local_experts": 4, "num_experts": 8}), "num_local_experts")]
#[case::qwen3_moe_step("qwen3_moe", json!({"decoder_sparse_step": 0}), "decoder_sparse_step")]
#[case::qwen3_moe_dense("qwen3_moe", json!({"mlp_only_layers": [-1]}), "mlp_only_layers")]
#[case::qwen2_moe("qwen2_moe", json!({}), "model_type")]
#[case::smollm3_list("smollm3", json!({"no_rope_layers": [1, 0]}), "no_rope_layers")]
#[case::smollm3_flags("smollm3", json!({"no_rope_layers": [true, false]}), "no_rope_layers")]
#[case::smollm3_window_unused(
    "smollm3",
    json!({"num_hidden_layers": 1, "sliding_window": 8, "layer_types": ["sliding_attention"]}),
    "layer_types"
)]
fn what_a_family_has_and_is_not_implemented_is_refused_by_name(
    #[case] family: &str,
    #[case] mut fields: Value,
    #[case] name: &str,
) {
    fields["model_type"] = family.into();
    match config(fields) {
        Err(ModelError::Unsupported { field, .. }) => assert_eq!(field, name),
        other => panic!("{other:?}"),
    }
}
