//! Adapters as PEFT saves them, on the model and merged into it: against the logits of PEFT's model.

use burn::tensor::Device;
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::Checkpoint;
use burn_nf4::format::FloatType;
use burn_nf4::model::LinearLayers;
use burn_nf4::nn::AnyLinear;
use burn_nf4::peft::{
    Adapter, DenseTensor, LoraBias, LoraConfig, LoraModule, MergeOptions, TargetModules,
    merge_4bit, merge_16bit,
};
use burn_nf4_llm::error::ModelError;
use burn_nf4_llm::model::Decoder;
use burn_nf4_llm::model::config::DecoderConfig;
use rstest::rstest;
use tempfile::TempDir;

use crate::fixtures::{logits, max_difference, open_folder, random_numbers};
use crate::peft_cases::{self, Case, IDS, PREFIX, model};

fn apply(model: Decoder, adapter: &Adapter, device: &Device) -> Result<Decoder, ModelError> {
    Ok(model.apply_adapter(adapter, device)?)
}

fn apply_partial(
    model: Decoder,
    adapter: &Adapter,
    device: &Device,
) -> Result<Decoder, ModelError> {
    Ok(model.apply_partial_adapter(adapter, device)?)
}

fn logits_of(model: &Decoder, config: &DecoderConfig) -> Vec<f32> {
    logits(model, config, &IDS, &[1, IDS.len()])
}

fn opened(folder: &TempDir) -> (Decoder, DecoderConfig) {
    open_folder(folder.path(), None, &Device::default())
}

/// Sums of at most 16 products of values of about 1, in f32, through one layer and a head.
const TOLERANCE: f32 = 1e-5;

#[test]
fn whatever_peft_saves_is_applied_to_its_logits() {
    for name in &peft_cases::names() {
        let case = Case::open(name);
        let adapter = Adapter::open(case.folder().path()).expect(name);
        let (base, config) = opened(&model(case.is_tied));
        let before = logits_of(&base, &config);
        let model = apply(base, &adapter, &Device::default()).expect(name);
        let ours = logits_of(&model, &config);
        assert!(max_difference(&ours, &case.logits) < TOLERANCE, "{name}");
        // Nothing is trained in what was saved along.
        let changes = max_difference(&before, &case.logits);
        assert!(changes > 0.1, "{name} changes the logits by {changes}");
    }
}

/// A head that was the embedding gets a weight of its own where the adapter changes one of the two.
#[test]
fn whatever_peft_saves_is_merged_to_its_logits() {
    for name in &peft_cases::names() {
        let case = Case::open(name);
        let adapter = Adapter::open(case.folder().path()).expect(name);
        let base = model(case.is_tied);
        let base = Checkpoint::open(base.path()).expect("it is valid");
        let stays_tied = name == "tied_along";
        for to_4bit in [false, true] {
            let out = TempDir::new().expect("a folder");
            let options = MergeOptions::default();
            match to_4bit {
                false => merge_16bit(&base, &adapter, out.path(), None, &options, |_| {}),
                // Nothing in the base is quantized, and so nothing is lost.
                true => merge_4bit(&base, &adapter, out.path(), &options, |_| {}),
            }
            .expect(name);
            let (merged, config) = opened(&out);
            let ours = logits_of(&merged, &config);
            assert!(max_difference(&ours, &case.logits) < TOLERANCE, "{name}");
            assert_eq!(config.tie_word_embeddings, stays_tied, "{name}");
            let head = Checkpoint::open(out.path()).expect("valid");
            assert_eq!(head.contains("lm_head.weight"), !stays_tied, "{name}");
        }
    }
}

/// Whatever of it is trained here or not: branches, magnitudes, biases, embeddings, whole modules.
#[test]
fn nothing_of_an_adapter_is_lost_on_its_way_through_the_model() {
    for name in &peft_cases::names() {
        let case = Case::open(name);
        let adapter = Adapter::open(case.folder().path()).expect(name);
        let (base, _) = opened(&model(case.is_tied));
        let model = apply(base, &adapter, &Device::default()).expect(name);
        let back = model.extract_into(adapter.clone()).expect(name);
        assert!(back.modules().eq(adapter.modules()), "{name}");
        let out = TempDir::new().expect("a folder");
        back.save(out.path()).expect("it can be written");
        let saved = Adapter::open(out.path()).expect(name);
        assert!(saved.modules().eq(adapter.modules()), "{name}");
        assert!(saved.embeddings().eq(adapter.embeddings()), "{name}");
        assert!(saved.full_tensors().eq(adapter.full_tensors()), "{name}");

        // Without the adapter that was applied the branches alone are there: all, or an error.
        let is_whole = adapter.embeddings().next().is_none();
        match model.extract_adapter(adapter.config()) {
            Ok(back) => assert!(is_whole && back.modules().eq(adapter.modules()), "{name}"),
            Err(Nf4Error::AdapterLacks { .. }) => assert!(!is_whole, "{name}"),
            Err(other) => panic!("{name}: {other}"),
        }
    }
}

fn lacks(result: Result<Decoder, ModelError>) -> Vec<String> {
    match result {
        Err(ModelError::Nf4(Nf4Error::AdapterLacks { missing })) => missing,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("applied"),
    }
}

/// Every name is that of a part of the case, all of whose tensors are taken out.
#[rstest]
#[case("plain", "self_attn.q_proj", &["model.layers.0.self_attn.q_proj"])]
#[case("plain", "self_attn", &["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"])]
#[case("head", "lm_head", &["lm_head"])]
#[case("tied_head", "lm_head", &["lm_head"])]
#[case("embed", "embed_tokens", &["model.embed_tokens"])]
#[case("saved_head", "lm_head", &["lm_head.weight"])]
#[case("tied_saved_ends", "lm_head", &["lm_head.weight"])]
#[case("saved_norm", "model.norm", &["model.norm.weight"])]
#[case("saved_norm", "layernorm", &[
    "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
])]
fn what_an_adapter_lacks_of_the_model_is_listed_and_can_be_allowed(
    #[case] name: &str,
    #[case] part: &str,
    #[case] missing: &[&str],
) {
    let case = Case::open(name).without(part);
    let adapter = Adapter::open_partial(case.folder().path()).expect("it is valid");
    let device = Device::default();
    let base = || opened(&model(case.is_tied)).0;
    assert_eq!(lacks(apply(base(), &adapter, &device)), missing);
    assert!(apply_partial(base(), &adapter, &device).is_ok());
}

/// The base model with its layers in 4 bit or as they are.
fn base_in(in_4bit: bool, device: &Device) -> (Decoder, DecoderConfig) {
    let folder = model(false);
    let (model, config) = open_folder(folder.path(), None, device);
    let model = model.try_map_linears(|_, layer| match layer {
        AnyLinear::Dense(layer) if in_4bit => {
            let quantized = burn_nf4::nn::QuantLinear::quantize(
                layer,
                burn_nf4::format::QuantConfig::default(),
            );
            Ok(AnyLinear::Nf4(quantized?))
        }
        other => Ok(other),
    });
    (model.expect("they are matrices"), config)
}

fn with_bias(bias: LoraBias) -> LoraConfig {
    LoraConfig {
        bias,
        ..LoraConfig::new(TargetModules::list(["q_proj", "k_proj"]))
    }
}

#[rstest]
fn biases_are_trained_and_saved_whatever_form_the_layer_has(
    #[values(false, true)] in_4bit: bool,
    #[values(false, true)] use_dora: bool,
) {
    let device = Device::default().autodiff();
    let (model, _) = base_in(in_4bit, &device);
    let lora = LoraConfig {
        use_dora,
        ..with_bias(LoraBias::LoraOnly)
    };
    let drawn = random_numbers();
    let model = model.with_lora(&lora, &device).expect("it fits");
    drop(drawn);
    let trained = model.linears().into_iter().filter(|(_, layer)| {
        let bias = layer.bias();
        bias.is_some_and(|bias| bias.is_require_grad())
    });
    let trained: Vec<String> = trained.map(|(path, _)| path).collect();
    let expected = ["k_proj", "q_proj"].map(|name| format!("model.layers.0.self_attn.{name}"));
    let mut sorted = trained.clone();
    sorted.sort();
    assert_eq!(sorted, expected);

    let adapter = model.extract_adapter(&lora).expect("it has all");
    for path in &trained {
        let module = adapter.module(path).expect("it is adapted");
        let bias = module.bias.as_ref().expect("it has a bias");
        let ours = model.linears().into_iter().find(|(name, _)| name == path);
        let values = ours.and_then(|(_, layer)| layer.bias().cloned());
        let values: Vec<f32> = values.expect("a bias").val().into_data().iter().collect();
        assert_eq!(bias.to_f32(), values);
        assert_eq!(module.magnitude.is_some(), use_dora);
    }
}

#[rstest]
#[case(LoraConfig::new(TargetModules::list(["q_proj", "embed_tokens"])), "embedding")]
fn what_is_not_trained_is_refused_by_name(#[case] lora: LoraConfig, #[case] named: &str) {
    let device = Device::default().autodiff();
    let error = base_in(false, &device).0.with_lora(&lora, &device);
    let error = error.expect_err("it is refused");
    assert!(error.to_string().contains(named), "{error}");
}

/// The head that PEFT saves under a branch is a float one.
#[test]
fn a_head_in_4_bit_gives_way_to_that_of_the_adapter() {
    let device = Device::default();
    let adapter = Adapter::open(Case::open("head").folder().path()).expect("PEFT wrote it");
    let model = apply(base_in(true, &device).0, &adapter, &device).expect("it fits");
    let Some(AnyLinear::Lora(head)) = &model.lm_head else {
        panic!("{:?}", model.lm_head);
    };
    let weight = head.base.weight.val().transpose().into_data();
    let given = adapter.full_tensor("lm_head.weight").expect("it is there");
    assert_eq!(weight.iter::<f32>().collect::<Vec<_>>(), given.to_f32());
}

/// With DoRA in a float layer, as on every head: from the start nothing changes.
#[test]
fn a_fresh_branch_on_a_tied_head_changes_nothing() {
    let device = Device::default();
    let (model, config) = opened(&model(true));
    let before = logits_of(&model, &config);
    let lora = LoraConfig {
        use_dora: true,
        ..LoraConfig::new(TargetModules::list(["lm_head"]))
    };
    let drawn = random_numbers();
    let model = model.with_lora(&lora, &device).expect("it fits");
    drop(drawn);
    assert!(max_difference(&before, &logits_of(&model, &config)) < TOLERANCE);
    let paths: Vec<String> = model.linears().into_iter().map(|(path, _)| path).collect();
    assert!(paths.contains(&"lm_head".to_string()));
}

fn zeros(shape: &[usize]) -> DenseTensor {
    let values = vec![0.0; shape.iter().product()];
    DenseTensor::from_f32(&values, shape, FloatType::F32).expect("it fits")
}

/// Two more tokens than the base model has: saved along after a resize, under a branch, as branches.
#[rstest]
fn resized_embeddings_are_told_from_other_misfits(
    #[values("lm_head", "model.embed_tokens")] module: &str,
    #[values(false, true)] is_branch: bool,
    #[values(false, true)] is_tied: bool,
) {
    let names = ["lm_head", "embed_tokens"];
    let mut adapter = Adapter::new(LoraConfig {
        r: 1,
        ..LoraConfig::new(TargetModules::list(if is_branch {
            names
        } else {
            ["x", "y"]
        }))
    })
    .expect("valid");
    let is_embedding = module != "lm_head";
    match (is_branch, is_embedding) {
        (false, _) => adapter.insert_full(&format!("{module}.weight"), zeros(&[18, 8])),
        (true, is_embedding) => {
            let [d_output, d_input] = if is_embedding { [8, 18] } else { [18, 8] };
            let branch = LoraModule {
                lora_a: zeros(&[1, d_input]),
                lora_b: zeros(&[d_output, 1]),
                magnitude: None,
                bias: None,
            };
            match is_embedding {
                true => adapter.insert_embedding(module, branch),
                false => adapter.insert(module, branch),
            }
        }
    }
    .expect("it is asked for");
    // Of two that are one, either is named.
    let is_resized = |error: &Nf4Error| {
        matches!(error, Nf4Error::ResizedEmbeddings { tensor, expected: 16, given: 18 }
            if is_tied || tensor.starts_with(module))
    };
    let folder = model(is_tied);
    let applied = apply_partial(opened(&folder).0, &adapter, &Device::default());
    match applied.expect_err("it does not fit") {
        ModelError::Nf4(error) => assert!(is_resized(&error), "{error}"),
        other => panic!("{other}"),
    }
    let base = Checkpoint::open(folder.path()).expect("valid");
    let options = MergeOptions {
        allow_missing: true,
        ..MergeOptions::default()
    };
    let out = TempDir::new().expect("a folder");
    let error = merge_16bit(&base, &adapter, out.path(), None, &options, |_| {});
    let error = error.expect_err("it does not fit");
    assert!(is_resized(&error), "{error}");
}

#[test]
fn what_the_model_does_not_have_is_listed() {
    let case = Case::open("bias_all")
        .renamed(|key| key.replace("layers.0.self_attn.k_proj", "layers.7.self_attn.k_proj"));
    let adapter = Adapter::open(case.folder().path()).expect("it is valid");
    let applied = apply(opened(&model(false)).0, &adapter, &Device::default());
    match applied {
        Err(ModelError::Nf4(Nf4Error::BaseLacks { missing })) => {
            assert_eq!(missing, ["model.layers.7.self_attn.k_proj.bias"]);
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("applied"),
    }
}

#[test]
fn a_weight_that_overflows_the_type_of_the_model_is_named() {
    let mut case = Case::open("saved_head");
    let head = case.tensors.get_mut(&format!("{PREFIX}lm_head.weight"));
    head.expect("it is there").bytes[..4].copy_from_slice(&1e6f32.to_le_bytes());
    let adapter = Adapter::open(case.folder().path()).expect("it is valid");
    let device = Device::default();
    let folder = model(false);
    let (model, _) = open_folder(folder.path(), Some(FloatType::F16), &device);
    match apply(model, &adapter, &device) {
        Err(ModelError::Nf4(Nf4Error::NonFinite {
            tensor, index: 0, ..
        })) => {
            assert!(tensor.starts_with("lm_head.weight"), "{tensor}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("applied"),
    }
}
