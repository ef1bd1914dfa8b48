//! Whole models: quantized, counted, trained.

use burn::module::Module;
use burn::nn::LinearConfig;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::linear_layers;
use burn_nf4::model::{LinearLayers, ParameterCount, PeftModel, QuantizeLayers, SaveFolder};
use burn_nf4::nn::AnyLinear;
use burn_nf4::op::MatmulStrategy;
use burn_nf4::peft::{LoraBias, LoraConfig, TargetModules};
use burn_nf4::{BlockWeight, Nf4Error};
use rstest::rstest;

use crate::peft_cases::{IDS, model};
use crate::toy::{Toy, max_difference};

fn toy(is_tied: bool, device: &Device) -> Toy {
    Toy::open(model(is_tied).path(), device)
}

fn quantized(model: &Toy) -> Vec<String> {
    let linears = model.linears().into_iter();
    linears
        .filter(|(_, layer)| layer.is_quantized())
        .map(|(name, _)| name)
        .collect()
}

fn quantize(skip: &[&str], heads: bool) -> QuantizeLayers {
    QuantizeLayers {
        skip_modules: skip.iter().map(|name| name.to_string()).collect(),
        heads,
        ..QuantizeLayers::default()
    }
}

#[test]
fn layers_are_handed_out_under_the_names_of_a_checkpoint() {
    let names: Vec<String> = toy(false, &Device::default())
        .linears()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names.len(), 8);
    assert_eq!(names[0], "model.layers.0.self_attn.q_proj");
    assert_eq!(names[7], "lm_head");
}

/// The table stays as it is for the embeddings, and so does a head that is to be skipped.
#[rstest]
#[case::asked_for(&[], true, true)]
#[case::skipped(&["lm_head"], true, false)]
#[case::not_asked_for(&[], false, false)]
fn a_tied_head_in_4_bit_is_one_of_its_own(
    #[case] skip: &[&str],
    #[case] heads: bool,
    #[case] expected: bool,
) {
    let tied = toy(true, &Device::default());
    let table = tied.embed_tokens.weight.val();
    let model = tied.quantize(&quantize(skip, heads)).expect("finite");
    assert_eq!(quantized(&model).contains(&"lm_head".to_string()), expected);
    assert_eq!(model.tied_head().is_none(), expected);
    model
        .embed_tokens
        .weight
        .val()
        .into_data()
        .assert_eq(&table.clone().into_data(), true);
    if expected {
        let packed = BlockWeight::quantize(table, QuantConfig::default()).expect("finite");
        let decoded = packed
            .dequantize::<2>(FloatType::F32)
            .expect("a dtype")
            .into_data();
        let head = model
            .linear("lm_head")
            .clone()
            .dequantize(FloatType::F32)
            .expect("a dtype");
        let AnyLinear::Dense(head) = head else {
            panic!("{head:?}")
        };
        head.weight
            .val()
            .transpose()
            .into_data()
            .assert_eq(&decoded, true);
    }
}

#[rstest]
#[case::all_but_the_head(&[], false, 7, &[])]
#[case::all(&[], true, 8, &[])]
#[case::by_the_end(&["down_proj", "k_proj"], false, 5, &["mlp.down_proj", "self_attn.k_proj"])]
#[case::by_a_prefix(&[r"model\.layers\.0\.self_attn"], false, 3, &["self_attn"])]
#[case::by_a_regex(&[r"model\.layers\.\d+\.mlp\.(up|gate)_proj"], false, 5, &["up_proj", "gate_proj"])]
fn layers_are_quantized_but_for_those_to_skip(
    #[case] skip: &[&str],
    #[case] heads: bool,
    #[case] count: usize,
    #[case] kept: &[&str],
) {
    let model = toy(false, &Device::default());
    let model = model.quantize(&quantize(skip, heads)).expect("finite");
    let names = quantized(&model);
    assert_eq!(names.len(), count, "{names:?}");
    for kept in kept {
        assert!(!names.iter().any(|name| name.contains(kept)), "{names:?}");
    }
    let dense = model.dequantize(FloatType::F32).expect("f32 is there");
    assert!(quantized(&dense).is_empty());
}

#[test]
fn a_wrong_pattern_and_a_weight_that_is_not_finite_are_named() {
    let device = Device::default();
    let error = toy(false, &device).quantize(&quantize(&["("], false));
    match error {
        Err(Nf4Error::Pattern {
            pattern, message, ..
        }) => {
            assert_eq!(pattern, "(");
            assert!(message.contains("position 1"), "{message}");
        }
        other => panic!("{other:?}"),
    }

    let broken = toy(false, &device).try_map_linears(|name, layer| match layer {
        AnyLinear::Dense(mut layer) if name.ends_with("up_proj") => {
            layer.weight = layer.weight.map(|weight| weight * f32::NAN);
            Ok(layer.into())
        }
        other => Ok(other),
    });
    match broken
        .expect("nothing fails")
        .quantize(&quantize(&[], false))
    {
        Err(Nf4Error::NonFinite { tensor, .. }) => {
            assert_eq!(tensor, "model.layers.0.mlp.up_proj.weight");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_strategy_is_set_everywhere() {
    let model = toy(false, &Device::default()).quantize(&quantize(&[], true));
    let model = model.expect("finite").with_strategy(MatmulStrategy::Decode);
    for (name, layer) in model.expect("nothing fails").linears() {
        let AnyLinear::Nf4(layer) = layer else {
            panic!("{name}");
        };
        assert_eq!(layer.strategy, MatmulStrategy::Decode, "{name}");
    }
}

#[test]
fn packed_parameters_are_counted_as_what_they_hold() {
    let device = Device::default().autodiff();
    let dense = toy(false, &device).no_grad();
    let before = dense.count_parameters();
    assert_eq!(before.total, dense.num_params());
    assert_eq!((before.trainable, before.packed), (0, 0));
    assert_eq!(before.size_bytes, before.total * 4);

    let model = dense.quantize(&quantize(&[], false)).expect("finite");
    let packed: usize = 8 * 8 * 2 + 4 * 8 * 2 + 12 * 8 * 3;
    let count = model.count_parameters();
    assert_eq!((count.total, count.packed), (before.total, packed));
    assert_eq!(count, ParameterCount::of(&model));
    let bytes: usize = model.linears().iter().map(|(_, l)| l.packed_bytes()).sum();
    assert_eq!(count.packed_bytes, bytes);
    assert_eq!(count.size_bytes, (before.total - packed) * 4 + bytes);

    let lora = LoraConfig::new(TargetModules::list(["q_proj"]));
    let adapted = model.with_lora(&lora, &device).expect("it fits");
    let count = adapted.count_parameters();
    assert_eq!(count.trainable, 8 * (8 + 8));
    assert_eq!(count.total, before.total + count.trainable);
}

fn lora(targets: TargetModules) -> LoraConfig {
    LoraConfig {
        r: 2,
        ..LoraConfig::new(targets)
    }
}

#[rstest]
#[case::names(TargetModules::list(["q_proj", "mlp.up_proj"]), &["self_attn.q_proj", "mlp.up_proj"])]
#[case::regex(TargetModules::Regex(r".*\.mlp\..*_proj".into()), &["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"])]
#[case::all(TargetModules::AllLinear, &[
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
])]
fn branches_go_where_the_settings_say(#[case] targets: TargetModules, #[case] expected: &[&str]) {
    let device = Device::default().autodiff();
    let model = toy(false, &device).quantize(&quantize(&["up_proj"], false));
    let model = model.expect("finite").with_lora(&lora(targets), &device);
    let model = model.expect("it fits");
    let adapted = model
        .linears()
        .into_iter()
        .filter(|(_, layer)| layer.has_branch());
    let adapted: Vec<String> = adapted.map(|(name, _)| name).collect();
    let expected: Vec<String> = expected
        .iter()
        .map(|name| format!("model.layers.0.{name}"))
        .collect();
    assert_eq!(adapted, expected);
}

/// A second adapter over a first would keep what the first put in the place of other parameters.
#[test]
fn a_model_with_branches_takes_no_others() {
    let device = Device::default();
    let case = crate::peft_cases::Case::open("plain");
    let adapter = burn_nf4::peft::Adapter::open(case.folder().path()).expect("valid");
    let adapted = toy(false, &device).apply_adapter(&adapter, &device);
    let adapted = adapted.expect("it fits");
    let fresh = lora(TargetModules::AllLinear);
    let results = [
        adapted.clone().apply_adapter(&adapter, &device).map(|_| ()),
        adapted
            .clone()
            .apply_partial_adapter(&adapter, &device)
            .map(|_| ()),
        adapted.clone().with_lora(&fresh, &device).map(|_| ()),
        PeftModel::with_adapter(adapted.clone(), adapter.clone(), &device).map(|_| ()),
        PeftModel::new(adapted.clone(), fresh, &device).map(|_| ()),
    ];
    for result in results {
        match result {
            Err(Nf4Error::Config { field, given, .. }) => {
                assert_eq!(field, "model");
                assert!(given.contains("`model.layers.0.self_attn."), "{given}");
            }
            other => panic!("{other:?}"),
        }
    }
    let base = adapted.without_branches().expect("nothing fails");
    assert!(base.apply_adapter(&adapter, &device).is_ok());
}

/// The weights before they were quantized are of one type, and the model is loaded in another.
#[rstest]
fn a_merged_layer_is_of_the_type_of_the_model(
    #[values("f32", "bf16")] stored: &str,
    #[values(FloatType::F32, FloatType::BF16)] dtype: FloatType,
) {
    let device = Device::default();
    let folder = crate::toy::fixture(&format!("hf/{stored}/model"));
    let store = burn_nf4::checkpoint::CheckpointStore::open(&folder).expect("valid");
    let toy = Toy::new(&crate::stored::config_of(&folder), &device);
    let toy = toy
        .load_checkpoint(store.with_dtype(dtype))
        .expect("it fits");
    let adapter = crate::toy::fixture("hf/f32/adapter_final");
    let adapter = burn_nf4::peft::Adapter::open(adapter).expect("PEFT wrote it");
    let mut model = PeftModel::with_adapter(toy, adapter, &device).expect("it fits");
    let expected = model.model().logits(&IDS, [1, IDS.len()], &device);
    model.merge(None).expect("finite");
    assert_eq!(model.model().linear(Q_PROJ).dtype(), Ok(dtype));
    let merged = model.into_model();
    let logits = merged.logits(&IDS, [1, IDS.len()], &device);
    // Weights rounded to 8 bits, through two layers.
    let tolerance = match dtype {
        FloatType::F32 => 1e-3,
        _ => 0.2,
    };
    let difference = max_difference(&logits, &expected);
    assert!(difference < tolerance, "{difference}");
}

const Q_PROJ: &str = "model.layers.0.self_attn.q_proj";

#[test]
fn an_adapter_that_is_off_is_not_merged() {
    let device = Device::default();
    let config = lora(TargetModules::AllLinear);
    let mut model = PeftModel::new(toy(false, &device), config, &device).expect("it fits");
    model.disable();
    for result in [model.merge(None), model.merge_4bit()] {
        assert!(matches!(
            result,
            Err(Nf4Error::Config {
                field: "enabled",
                ..
            })
        ));
        assert!(!model.is_enabled() && !model.is_merged());
    }
    model.enable();
    model.merge(None).expect("finite");
    model.disable();
    assert!(!model.is_merged() && model.merge(None).is_err());
}

#[test]
fn an_error_about_a_layer_names_it() {
    let device = Device::default();
    let config = lora(TargetModules::AllLinear);
    let model = toy(false, &device).with_lora(&config, &device);
    let model = model.expect("it fits");
    let off = model
        .clone()
        .with_branches_enabled(false)
        .expect("nothing fails");
    let other = LoraConfig {
        lora_alpha: 32.0,
        ..config
    };
    let dora = LoraConfig {
        use_dora: true,
        ..other.clone()
    };
    let errors = [
        off.merge(None).map(|_| ()),
        model.extract_adapter(&other).map(|_| ()),
        model.extract_adapter(&dora).map(|_| ()),
    ];
    for error in errors {
        let text = error.expect_err("it is refused").to_string();
        assert!(text.contains(&format!("for `{Q_PROJ}`")), "{text}");
    }
}

#[rstest]
#[case("upproj")]
#[case("model.layers.7")]
fn an_entry_that_skips_nothing_is_refused(#[case] entry: &str) {
    let model = toy(false, &Device::default());
    match model.quantize(&quantize(&["down_proj", entry], false)) {
        Err(Nf4Error::Config { field, given, .. }) => {
            assert_eq!(field, "skip_modules");
            assert!(given.contains(&format!("`{entry}`")), "{given}");
        }
        other => panic!("{other:?}"),
    }
    // What is there and is in floats anyway is no mistake.
    let kept = ["lm_head", "embed_tokens", "norm"];
    for is_tied in [false, true] {
        let model = toy(is_tied, &Device::default());
        assert!(model.quantize(&quantize(&kept, false)).is_ok());
    }
}

/// The settings that leave nothing are named, each by itself or together.
#[test]
fn settings_that_select_no_layer_say_which_of_them_leaves_none() {
    use burn_nf4::peft::{ModuleNames, OneOrMany};

    let device = Device::default();
    let excluded = |names: &[&str]| {
        let names = names.iter().map(|name| name.to_string()).collect();
        Some(ModuleNames::List(names))
    };
    let base = || lora(TargetModules::list(["q_proj"]));
    let cases = [
        (
            LoraConfig {
                exclude_modules: excluded(&["q_proj"]),
                ..base()
            },
            "beside `exclude_modules`,",
        ),
        (
            LoraConfig {
                layers_to_transform: Some(OneOrMany::Many(vec![5])),
                ..base()
            },
            "beside `layers_to_transform`,",
        ),
        (
            LoraConfig {
                exclude_modules: excluded(&["q_proj"]),
                layers_to_transform: Some(OneOrMany::Many(vec![5])),
                ..base()
            },
            "beside `exclude_modules` and `layers_to_transform`,",
        ),
        (
            LoraConfig {
                exclude_modules: excluded(&["k_proj"]),
                ..lora(TargetModules::list(["nothing"]))
            },
            "which select none,",
        ),
    ];
    for (config, expected) in cases {
        let error = toy(false, &device).with_lora(&config, &device);
        let text = error.expect_err("it is refused").to_string();
        assert!(text.contains(expected), "{text}");
    }
}

fn named(config: LoraConfig, is_tied: bool, in_4bit: bool) -> String {
    let device = Device::default().autodiff();
    let mut model = toy(is_tied, &device);
    if in_4bit {
        model = model.quantize(&quantize(&[], true)).expect("finite");
    }
    let error = model
        .with_lora(&config, &device)
        .expect_err("it is refused");
    error.to_string()
}

#[rstest]
#[case::no_layer(LoraConfig::new(TargetModules::list(["nothing"])), "nothing")]
#[case::embedding(LoraConfig::new(TargetModules::list(["embed_tokens"])), "model.embed_tokens")]
#[case::unknown_module(LoraConfig { modules_to_save: Some(vec!["score".into()]), ..lora(TargetModules::AllLinear) }, "`score`")]
#[case::head_in_4_bit(LoraConfig { modules_to_save: Some(vec!["lm_head".into()]), ..lora(TargetModules::AllLinear) }, "`lm_head`, which is in 4 bit")]
fn what_cannot_be_trained_is_refused_by_name(#[case] config: LoraConfig, #[case] text: &str) {
    let error = named(config, false, true);
    assert!(error.contains(text), "{error}");
}

#[derive(Module, Debug)]
struct Mixed {
    proj: AnyLinear,
    plain: burn::nn::Linear,
}

linear_layers!(Mixed { proj });

#[test]
fn a_target_that_is_not_handed_out_is_refused() {
    let device = Device::default().autodiff();
    let linear = || LinearConfig::new(8, 8).init(&device);
    let model = || Mixed {
        proj: linear().into(),
        plain: linear(),
    };
    for targets in [
        TargetModules::list(["proj", "plain"]),
        TargetModules::AllLinear,
    ] {
        let error = model()
            .with_lora(&lora(targets), &device)
            .expect_err("refused");
        assert!(error.to_string().contains("`plain`"), "{error}");
    }
    // As a whole it can be trained.
    let config = LoraConfig {
        modules_to_save: Some(vec!["plain".into()]),
        ..lora(TargetModules::list(["proj"]))
    };
    let adapted = model().with_lora(&config, &device).expect("it fits");
    let adapter = adapted.extract_adapter(&config).expect("it has all");
    let weight = adapter.full_tensor("plain.weight").expect("it is saved");
    let ours = adapted.plain.weight.val().transpose().into_data();
    assert_eq!(weight.to_f32(), ours.iter::<f32>().collect::<Vec<_>>());
    let again = model().apply_adapter(&adapter, &device).expect("it fits");
    let theirs = again.plain.weight.val().into_data();
    assert_eq!(theirs, adapted.plain.weight.val().into_data());
}

#[derive(Module, Debug)]
struct Forgetful {
    up_proj: AnyLinear,
    down_proj: AnyLinear,
}

linear_layers!(Forgetful { up_proj });

/// What is left out would stay in floats, or without a branch, unseen.
#[test]
fn a_layer_that_is_not_handed_out_is_an_error() {
    let device = Device::default().autodiff();
    let linear = || AnyLinear::from(LinearConfig::new(8, 8).init(&device));
    let model = Forgetful {
        up_proj: linear(),
        down_proj: linear(),
    };
    let folder = tempfile::TempDir::new().expect("a folder");
    let saved = model.save_folder(folder.path(), &SaveFolder::default());
    let adapted = model
        .clone()
        .with_lora(&lora(TargetModules::AllLinear), &device);
    let errors = [
        model.quantize(&quantize(&[], false)).map(|_| ()),
        adapted.map(|_| ()),
        saved.map(|_| ()),
    ];
    for error in errors {
        let text = error.expect_err("it is refused").to_string();
        assert!(text.contains("without `down_proj`"), "{text}");
    }
}

#[derive(Module, Debug)]
struct Plain {
    proj: burn::nn::Linear,
}

linear_layers!(Plain {});

/// A module without such layers can be a field like any other.
#[test]
fn a_module_may_have_no_layer() {
    let device = Device::default();
    let proj = LinearConfig::new(8, 8).init(&device);
    let model = Plain { proj };
    assert!(model.linears().is_empty());
    assert!(model.quantize(&quantize(&[], false)).is_ok());
}

fn ids(device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(IDS.to_vec(), [1, IDS.len()]), device)
}

/// Everything that the settings name learns, nothing else, and all of it comes back from the adapter.
#[rstest]
fn what_is_trained_goes_into_the_adapter_and_nothing_else_moves(
    #[values(false, true)] in_4bit: bool,
    #[values(false, true)] use_dora: bool,
    #[values(false, true)] is_tied: bool,
    #[values(LoraBias::None, LoraBias::LoraOnly, LoraBias::All)] bias: LoraBias,
) {
    let device = Device::default().autodiff();
    let mut base = toy(is_tied, &device);
    if in_4bit {
        base = base.quantize(&quantize(&[], false)).expect("finite");
    }
    let config = LoraConfig {
        use_dora,
        bias,
        modules_to_save: Some(vec!["lm_head".into(), "input_layernorm".into()]),
        ..lora(TargetModules::list(["q_proj", "v_proj"]))
    };
    let mut model = PeftModel::new(base.clone(), config.clone(), &device).expect("it fits");
    let before = base.forward(ids(&device)).into_data();
    let fresh = model.adapter().expect("it has all");
    let mut optimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    for _ in 0..3 {
        let loss = model.model().forward(ids(&device)).square().mean();
        losses.push(loss.clone().into_scalar::<f32>());
        let grads = GradientsParams::from_grads(loss.backward(), model.model());
        model.update(|model| optimizer.step(1e-2, model, grads));
    }
    assert!(losses[2] < losses[0], "{losses:?}");

    let adapter = model.adapter().expect("it has all");
    for (path, module) in adapter.modules() {
        let old = fresh.module(path).expect("it was there");
        assert_ne!(module.lora_b, old.lora_b, "{path}");
        assert_eq!(module.magnitude.is_some(), use_dora);
        assert_eq!(module.bias.is_some(), bias != LoraBias::None, "{path}");
        if bias != LoraBias::None {
            assert_ne!(module.bias, old.bias, "{path}");
        }
    }
    let mut whole = vec!["lm_head.weight", "model.layers.0.input_layernorm.weight"];
    if bias == LoraBias::All {
        whole.push("model.layers.0.self_attn.k_proj.bias");
        whole.push("model.layers.0.self_attn.o_proj.bias");
    }
    let held: Vec<&str> = adapter.full_tensors().map(|(name, _)| name).collect();
    whole.sort_unstable();
    assert_eq!(held, whole);
    for name in &held {
        // A constant added to all scores of a query moves no softmax: the gradient of the bias of the
        // keys is rounding.
        assert_ne!(adapter.full_tensor(name), fresh.full_tensor(name), "{name}");
    }

    // The base is what it was, and is what is there with the adapter off.
    assert_eq!(model.base().forward(ids(&device)).into_data(), before);
    let trained = model.model().forward(ids(&device)).into_data();
    model.disable();
    assert_eq!(model.model().forward(ids(&device)).into_data(), before);
    model.enable();
    assert_eq!(model.model().forward(ids(&device)).into_data(), trained);

    // Saved and applied anew it is the same model.
    let folder = tempfile::TempDir::new().expect("a folder");
    adapter.save(folder.path()).expect("it can be written");
    let adapter = burn_nf4::peft::Adapter::open(folder.path()).expect("it was written");
    let again = base.apply_adapter(&adapter, &device).expect("it fits");
    assert_eq!(again.forward(ids(&device)).into_data(), trained);
}

#[test]
fn a_merge_is_undone_to_the_bit() {
    let device = Device::default();
    let base = toy(false, &device)
        .quantize(&quantize(&["up_proj"], false))
        .expect("finite");
    let case = crate::peft_cases::Case::open("plain");
    let adapter = burn_nf4::peft::Adapter::open(case.folder().path()).expect("valid");
    let mut model = PeftModel::with_adapter(base, adapter, &device).expect("it fits");
    let logits = |model: &PeftModel<Toy>| model.model().logits(&IDS, [1, IDS.len()], &device);
    let adapted = logits(&model);
    model.merge(None).expect("finite");
    assert!(model.is_merged() && !model.model().linears().iter().any(|(_, l)| l.has_branch()));
    // The same sums in another order.
    assert!(max_difference(&logits(&model), &adapted) < 1e-5);
    model.unmerge();
    assert_eq!(logits(&model), adapted);
    model.merge_4bit().expect("finite");
    assert_eq!(quantized(model.model()).len(), 6);
    // Alone it is what there is to compute with, in each state.
    let alone = |model: &PeftModel<Toy>| {
        let toy = model.clone().into_model();
        assert_eq!(toy.logits(&IDS, [1, IDS.len()], &device), logits(model));
        toy.linears().iter().any(|(_, layer)| layer.has_branch())
    };
    assert!(!alone(&model));
    model.enable();
    assert!(alone(&model));
    model.disable();
    assert!(!alone(&model));
    model.enable();
    assert_eq!(logits(&model), adapted);
}

#[test]
fn branches_of_a_whole_model_can_be_switched_and_taken_off() {
    let device = Device::default();
    let base = toy(false, &device).quantize(&QuantizeLayers {
        config: QuantConfig::default(),
        ..QuantizeLayers::default()
    });
    let base = base.expect("finite");
    let logits = |model: &Toy| model.logits(&IDS, [1, IDS.len()], &device);
    let before = logits(&base);
    let case = crate::peft_cases::Case::open("plain");
    let adapter = burn_nf4::peft::Adapter::open(case.folder().path()).expect("valid");
    let model = base.apply_adapter(&adapter, &device).expect("it fits");
    let with = logits(&model);
    assert_ne!(with, before);
    let off = model.with_branches_enabled(false).expect("nothing fails");
    assert_eq!(logits(&off), before);
    let on = off
        .clone()
        .with_branches_enabled(true)
        .expect("nothing fails");
    assert_eq!(logits(&on), with);
    assert_eq!(
        logits(&off.without_branches().expect("nothing fails")),
        before
    );
}
