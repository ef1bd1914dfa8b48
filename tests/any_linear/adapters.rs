//! Adapters as PEFT saves them, on any model: against the logits of PEFT's model.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, SafetensorsFile};
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::model::{LinearLayers, PeftModel, SaveFolder};
use burn_nf4::nn::{AnyLinear, LoraInit};
use burn_nf4::peft::{
    Adapter, DenseTensor, InitLoraWeights, LoraBias, LoraConfig, LoraModule, MergeOptions,
    TargetModules, merge_16bit,
};
use rstest::rstest;
use tempfile::TempDir;

use crate::peft_cases::{self, Case, IDS, PREFIX, model};
use crate::toy::{Toy, fixture, max_difference};

fn logits(toy: &Toy) -> Vec<f32> {
    toy.logits(&IDS, [1, IDS.len()], &Device::default())
}

fn base(is_tied: bool) -> Toy {
    Toy::open(model(is_tied).path(), &Device::default())
}

fn adapter(case: &Case) -> Adapter {
    Adapter::open(case.folder().path()).expect("PEFT wrote it")
}

/// Sums of at most 16 products of values of about 1, in f32, through one layer and a head.
const TOLERANCE: f32 = 1e-5;

#[test]
fn whatever_peft_saves_is_applied_to_its_logits_and_can_be_switched_off() {
    let device = Device::default();
    for name in &peft_cases::names() {
        let case = Case::open(name);
        let base = base(case.is_tied);
        let before = logits(&base);
        let mut model = PeftModel::with_adapter(base, adapter(&case), &device).expect(name);
        let ours = logits(model.model());
        assert!(max_difference(&ours, &case.logits) < TOLERANCE, "{name}");
        assert!(
            max_difference(&before, &case.logits) > 0.1,
            "{name} changes nothing"
        );
        model.disable();
        assert_eq!(logits(model.model()), before, "{name}");
        model.enable();
        assert_eq!(logits(model.model()), ours, "{name}");
    }
}

#[test]
fn whatever_peft_saves_is_merged_and_unmerged_and_saved() {
    let device = Device::default();
    for name in &peft_cases::names() {
        let case = Case::open(name);
        let folder = model(case.is_tied);
        let source = Checkpoint::open(folder.path()).expect("valid");
        let toy = Toy::open(folder.path(), &device);
        let mut model = PeftModel::with_adapter(toy, adapter(&case), &device).expect(name);
        let ours = logits(model.model());
        model.merge(None).expect(name);
        let merged = logits(model.model());
        assert!(max_difference(&merged, &case.logits) < TOLERANCE, "{name}");

        // In a folder it is what a merge of folders gives, as far as sums in another order are.
        let (out, theirs) = (
            TempDir::new().expect("a folder"),
            TempDir::new().expect("a folder"),
        );
        let options = SaveFolder {
            source: Some(&source),
            ..SaveFolder::default()
        };
        model.model().save_folder(out.path(), &options).expect(name);
        assert_eq!(logits(&Toy::open(out.path(), &device)), merged, "{name}");
        let options = MergeOptions::default();
        merge_16bit(
            &source,
            &adapter(&case),
            theirs.path(),
            None,
            &options,
            |_| {},
        )
        .expect(name);
        let [out, theirs] = [out, theirs].map(|folder| {
            let path = folder.path().join("model.safetensors");
            crate::stored::read(&SafetensorsFile::open(path).expect("valid"))
        });
        assert!(out.keys().eq(theirs.keys()), "{name}");

        model.unmerge();
        assert_eq!(logits(model.model()), ours, "{name}");
    }
}

#[test]
fn nothing_of_an_adapter_is_lost_on_its_way_through_the_model() {
    let device = Device::default();
    for name in &peft_cases::names() {
        let case = Case::open(name);
        let adapter = adapter(&case);
        let model = PeftModel::with_adapter(base(case.is_tied), adapter.clone(), &device);
        let model = model.expect(name);
        let back = model.adapter().expect(name);
        assert!(back.modules().eq(adapter.modules()), "{name}");
        assert!(back.embeddings().eq(adapter.embeddings()), "{name}");
        assert!(back.full_tensors().eq(adapter.full_tensors()), "{name}");

        // Without what was applied there are the branches, the biases and the modules to save: all, or
        // an error.
        let is_apart = adapter.embeddings().next().is_none();
        match model.model().extract_adapter(adapter.config()) {
            Ok(back) => {
                assert!(is_apart && back.modules().eq(adapter.modules()), "{name}");
                for (parameter, tensor) in adapter.full_tensors() {
                    if adapter.is_saved(parameter) {
                        assert_eq!(back.full_tensor(parameter), Some(tensor), "{name}");
                    }
                }
            }
            Err(Nf4Error::AdapterLacks { .. }) => assert!(!is_apart, "{name}"),
            Err(other) => panic!("{name}: {other}"),
        }
    }
}

/// One call a swap, and no trace of the adapter before: heads and tables that it replaced included.
#[test]
fn adapters_are_swapped_for_each_other() {
    let device = Device::default();
    for is_tied in [false, true] {
        let cases = peft_cases::names();
        let cases: Vec<Case> = cases.iter().map(|name| Case::open(name)).collect();
        let cases = || cases.iter().filter(|case| case.is_tied == is_tied);
        let first = adapter(cases().next().expect("there are some"));
        let mut model = PeftModel::with_adapter(base(is_tied), first, &device).expect("it fits");
        for case in cases().chain(cases()) {
            model.swap(adapter(case), &device).expect("it fits");
            assert!(max_difference(&logits(model.model()), &case.logits) < TOLERANCE);
        }
        // What does not fit leaves all as it was.
        let before = logits(model.model());
        let other = Case::open("plain").renamed(|key| key.replace("layers.0", "layers.7"));
        assert!(model.swap(adapter(&other), &device).is_err());
        assert_eq!(logits(model.model()), before);
        assert_eq!(logits(&model.into_base()), logits(&base(is_tied)));
    }
}

/// The checkpoint of transformers and a QLoRA run of PEFT on it.
#[test]
fn the_adapter_of_a_qlora_run_gives_its_logits() {
    let device = Device::default();
    let toy = Toy::open(&fixture("hf/f32/model"), &device);
    let file = SafetensorsFile::open(fixture("hf/f32/io.safetensors")).expect("valid");
    let shape = file.tensor_info("input_ids").expect("there").shape.to_vec();
    let bytes = file.tensor_bytes("input_ids").expect("there");
    let ids: Vec<i64> = bytes
        .chunks_exact(8)
        .map(|bytes| i64::from_le_bytes(bytes.try_into().expect("eight")))
        .collect();
    let shape = [shape[0], shape[1]];
    let (theirs, _) = file.load_float::<f32>("logits").expect("there");
    let ours = toy.logits(&ids, shape, &device);
    // As of the example: f32 through two layers, sums in another order.
    assert!(max_difference(&ours, &theirs) < 2e-4);

    let adapter = Adapter::open(fixture("hf/f32/adapter_final")).expect("PEFT wrote it");
    let file = SafetensorsFile::open(fixture("hf/f32/adapter_final_logits.safetensors"));
    let (theirs, _) = file
        .expect("valid")
        .load_float::<f32>("logits")
        .expect("there");
    let model = PeftModel::with_adapter(toy, adapter.clone(), &device).expect("it fits");
    let ours = model.model().logits(&ids, shape, &device);
    assert!(
        max_difference(&ours, &theirs) < 1e-3,
        "{}",
        max_difference(&ours, &theirs)
    );
    let back = model.adapter().expect("it has all");
    assert!(back.modules().eq(adapter.modules()));
}

#[rstest]
#[case("plain", "self_attn.q_proj", &["model.layers.0.self_attn.q_proj"])]
#[case("tied_head", "lm_head", &["lm_head"])]
#[case("embed", "embed_tokens", &["model.embed_tokens"])]
#[case("saved_head", "lm_head", &["lm_head.weight"])]
#[case("tied_saved_ends", "lm_head", &["lm_head.weight"])]
#[case("saved_norm", "layernorm", &[
    "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
])]
fn what_an_adapter_lacks_of_the_model_is_listed_and_can_be_allowed(
    #[case] name: &str,
    #[case] part: &str,
    #[case] expected: &[&str],
) {
    let case = Case::open(name).without(part);
    let adapter = Adapter::open_partial(case.folder().path()).expect("it is valid");
    let device = Device::default();
    match base(case.is_tied).apply_adapter(&adapter, &device) {
        Err(Nf4Error::AdapterLacks { missing }) => assert_eq!(missing, expected),
        other => panic!("{other:?}"),
    }
    assert!(
        base(case.is_tied)
            .apply_partial_adapter(&adapter, &device)
            .is_ok()
    );
}

#[test]
fn what_the_model_does_not_have_is_listed() {
    for (case, named) in [
        ("bias_all", "model.layers.7.self_attn.k_proj.bias"),
        ("plain", "model.layers.7.self_attn.q_proj.weight"),
    ] {
        let case = Case::open(case).renamed(|key| {
            key.replace("layers.0.self_attn.k_proj", "layers.7.self_attn.k_proj")
                .replace("layers.0.self_attn.q_proj", "layers.7.self_attn.q_proj")
        });
        match base(false).apply_partial_adapter(&adapter(&case), &Device::default()) {
            Err(Nf4Error::BaseLacks { missing }) => {
                assert!(missing.contains(&named.to_string()), "{missing:?}");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// The head that PEFT saves under a branch is one of floats, in the dtype of the model.
#[test]
fn a_head_in_4_bit_gives_way_to_that_of_the_adapter() {
    let device = Device::default();
    let toy = base(false).try_map_linears(|_, layer| layer.quantize(QuantConfig::default()));
    let toy = toy.expect("finite");
    let adapter = adapter(&Case::open("head"));
    let mut model = PeftModel::with_adapter(toy, adapter.clone(), &device).expect("it fits");
    let AnyLinear::Lora(head) = model.model().linear("lm_head") else {
        panic!("{:?}", model.model().lm_head);
    };
    let weight = head.base.weight.val().transpose().into_data();
    let given = adapter.full_tensor("lm_head.weight").expect("it is there");
    assert_eq!(weight.iter::<f32>().collect::<Vec<_>>(), given.to_f32());
    model.disable();
    assert!(model.model().linear("lm_head").is_quantized());
}

fn zeros(shape: &[usize]) -> DenseTensor {
    let values = vec![0.0; shape.iter().product()];
    DenseTensor::from_f32(&values, shape, FloatType::F32).expect("it fits")
}

/// Two more tokens than the base model has.
#[rstest]
fn resized_embeddings_are_told_from_other_misfits(
    #[values("lm_head", "model.embed_tokens")] module: &str,
    #[values(false, true)] is_branch: bool,
    #[values(false, true)] is_tied: bool,
) {
    let names = if is_branch {
        ["lm_head", "embed_tokens"]
    } else {
        ["x", "y"]
    };
    let mut adapter = Adapter::new(LoraConfig {
        r: 1,
        ..LoraConfig::new(TargetModules::list(names))
    })
    .expect("valid");
    let is_embedding = module != "lm_head";
    let [d_output, d_input] = if is_embedding { [8, 18] } else { [18, 8] };
    let branch = LoraModule {
        lora_a: zeros(&[1, d_input]),
        lora_b: zeros(&[d_output, 1]),
        magnitude: None,
        bias: None,
    };
    match (is_branch, is_embedding) {
        (false, _) => adapter.insert_full(&format!("{module}.weight"), zeros(&[18, 8])),
        (true, true) => adapter.insert_embedding(module, branch),
        (true, false) => adapter.insert(module, branch),
    }
    .expect("it is asked for");
    match base(is_tied).apply_partial_adapter(&adapter, &Device::default()) {
        Err(Nf4Error::ResizedEmbeddings {
            tensor,
            expected: 16,
            given: 18,
        }) => assert!(tensor.starts_with(module), "{tensor}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_weight_that_overflows_the_type_of_the_model_is_named() {
    let mut case = Case::open("saved_head");
    let head = case.tensors.get_mut(&format!("{PREFIX}lm_head.weight"));
    head.expect("it is there").bytes[..4].copy_from_slice(&1e6f32.to_le_bytes());
    let folder = model(false);
    let store = burn_nf4::checkpoint::CheckpointStore::open(folder.path()).expect("valid");
    let device = Device::default();
    let toy = Toy::new(&crate::stored::config_of(folder.path()), &device);
    let toy = toy
        .load_checkpoint(store.with_dtype(FloatType::F16))
        .expect("it fits");
    match toy.apply_adapter(&adapter(&case), &device) {
        Err(Nf4Error::NonFinite { tensor, index, .. }) => {
            assert_eq!((tensor.as_str(), index), ("lm_head.weight in F16", 0));
        }
        other => panic!("{other:?}"),
    }
}

/// Rounded to the model's dtype it is still what the adapter holds, as long as nobody trains it.
#[test]
fn what_is_not_trained_keeps_its_bits_in_a_model_of_16_bit() {
    let device = Device::default();
    let folder = model(false);
    let store = burn_nf4::checkpoint::CheckpointStore::open(folder.path()).expect("valid");
    let toy = Toy::new(&crate::stored::config_of(folder.path()), &device);
    let toy = toy
        .load_checkpoint(store.with_dtype(FloatType::BF16))
        .expect("it fits");
    for name in ["saved_head", "saved_norm", "bias_all"] {
        let adapter = adapter(&Case::open(name));
        let model = PeftModel::with_adapter(toy.clone(), adapter.clone(), &device).expect(name);
        let back = model.adapter().expect(name);
        assert!(back.full_tensors().eq(adapter.full_tensors()), "{name}");
        assert!(back.modules().eq(adapter.modules()), "{name}");
    }
}

#[rstest]
fn biases_are_trained_in_f32_where_the_adapter_holds_them(
    #[values(false, true)] in_4bit: bool,
    #[values(false, true)] use_dora: bool,
) {
    let device = Device::default().autodiff();
    let folder = model(false);
    let mut toy = Toy::open(folder.path(), &device);
    if in_4bit {
        let quantized = toy.try_map_linears(|_, layer| layer.quantize(QuantConfig::default()));
        toy = quantized.expect("finite");
    }
    let lora = LoraConfig {
        use_dora,
        bias: LoraBias::LoraOnly,
        ..LoraConfig::new(TargetModules::list(["q_proj", "k_proj"]))
    };
    let fresh = toy.clone().with_lora(&lora, &device).expect("it fits");
    let trained = |toy: &Toy| -> Vec<String> {
        let linears = toy.linears().into_iter();
        linears
            .filter(|(_, layer)| layer.bias().is_some_and(|bias| bias.is_require_grad()))
            .map(|(name, _)| name)
            .collect()
    };
    let expected = ["q_proj", "k_proj"].map(|name| format!("model.layers.0.self_attn.{name}"));
    assert_eq!(trained(&fresh), expected);
    let adapter = fresh.extract_adapter(&lora).expect("it has all");
    let again = toy.apply_adapter(&adapter, &device).expect("it fits");
    assert_eq!(trained(&again), expected);
    for name in &expected {
        let bias = again.linear(name).bias().expect("a bias");
        assert_eq!(bias.dtype(), burn::tensor::DType::F32);
        // The optimizer of the first run knows the parameters of the second.
        assert_eq!(bias.id, fresh.linear(name).bias().expect("a bias").id);
    }
    assert_eq!(
        again.count_parameters().trainable,
        fresh.count_parameters().trainable
    );
    assert!(again.no_grad().count_parameters().trainable == 0);
}

/// The factors of an adapter are given, however they began.
#[test]
fn the_settings_of_a_branch_say_nothing_of_its_beginning() {
    for init in [
        InitLoraWeights::Default(false),
        InitLoraWeights::Named("gaussian".into()),
        InitLoraWeights::Named("orthogonal".into()),
    ] {
        let lora = LoraConfig {
            init_lora_weights: init,
            ..LoraConfig::new(TargetModules::AllLinear)
        };
        let adapter = Adapter::new(lora).unwrap();
        let config = adapter.layer_config("layers.0.q_proj").unwrap();
        assert_eq!(config.init, LoraInit::default());
    }
}

/// As PEFT begins them: `B` zero, or random, or `A` normal; what is not known is an error.
#[test]
fn fresh_factors_begin_as_the_adapter_says() {
    let device = Device::default();
    let layer = |init: InitLoraWeights| {
        let lora = LoraConfig {
            r: 16,
            init_lora_weights: init,
            ..LoraConfig::new(TargetModules::AllLinear)
        };
        let model = base(false).with_lora(&lora, &device)?;
        let linears = model.linears();
        let (a, b) = linears
            .iter()
            .find_map(|(_, layer)| match layer {
                AnyLinear::QLora(layer) => Some((layer.lora_a.val(), layer.lora_b.val())),
                AnyLinear::Lora(layer) => Some((layer.lora_a.val(), layer.lora_b.val())),
                _ => None,
            })
            .expect("a branch");
        let [d_input, _] = a.dims();
        let deviation = |x: Tensor<2>| x.square().mean().sqrt().into_scalar::<f32>();
        let bound = b.clone().abs().max().into_scalar::<f32>();
        Ok::<_, Nf4Error>((
            deviation(a) * (d_input as f32).sqrt(),
            deviation(b),
            bound,
            d_input,
        ))
    };
    // A uniform number in `±1` deviates by `1/√3`.
    let uniform = 1.0 / 3f32.sqrt();
    let near = |given: f32, expected: f32| (given / expected - 1.0).abs() < 0.2;
    let (a, b, ..) = layer(InitLoraWeights::Default(true)).unwrap();
    assert!(near(a, uniform) && b == 0.0, "{a} {b}");
    let (a, b, bound, _) = layer(InitLoraWeights::Default(false)).unwrap();
    assert!(
        near(a, uniform) && near(b, uniform / 4.0) && bound <= 0.25,
        "{a} {b}"
    );
    let (a, b, _, d_input) = layer(InitLoraWeights::Named("Gaussian".into())).unwrap();
    assert!(
        near(a, (d_input as f32).sqrt() / 16.0) && b == 0.0,
        "{a} {b}"
    );
    let error = layer(InitLoraWeights::Named("orthogonal".into())).unwrap_err();
    assert!(error.to_string().contains("init_lora_weights"), "{error}");
}
