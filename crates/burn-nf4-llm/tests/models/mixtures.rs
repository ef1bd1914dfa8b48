//! Mixtures of experts: in which forms experts are, and what is trained of them.

use burn::tensor::Device;
use burn_nf4::checkpoint::Checkpoint;
use burn_nf4::model::{LinearLayers, QuantizeLayers, SaveFolder};
use burn_nf4::peft::{LoraConfig, TargetModules};
use burn_nf4_llm::model::{Decoder, MixtureMlp, Mlp};
use burn_nf4_llm::train::data::Batch;
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{Settings, Trainer};

use crate::fixtures::{
    fixture, io, logits, max_difference, open_folder, random_model, random_numbers,
};

const FOLDER: &str = "families/qwen3_moe/model";
const EXPERT: &str = "model.layers.1.mlp.experts.3.down_proj.weight";

/// transformers 5 does not load packed ones, so that they stay in floats unless they are asked for.
#[test]
fn experts_are_packed_one_by_one_if_they_are_asked_for() {
    let device = Device::default();
    let (ids, shape, theirs) = io("families/qwen3_moe/io.safetensors");
    let source = Checkpoint::open(fixture(FOLDER)).unwrap();
    let packed = [false, true].map(|experts| {
        let (model, config) = open_folder(&fixture(FOLDER), None, &device);
        let options = QuantizeLayers {
            experts,
            ..QuantizeLayers::default()
        };
        let model = model.quantize(&options).unwrap();
        let ours = logits(&model, &config, &ids, &shape);
        let out = tempfile::tempdir().unwrap();
        let options = SaveFolder {
            source: Some(&source),
            ..SaveFolder::default()
        };
        model.save_folder(out.path(), &options).unwrap();
        let saved = Checkpoint::open(out.path()).unwrap();
        let router = "model.layers.0.mlp.gate.weight";
        assert!(saved.contains(router) && !saved.is_quantized(router));
        let (loaded, config) = open_folder(out.path(), None, &device);
        assert_eq!(logits(&loaded, &config, &ids, &shape), ours);
        assert_eq!(max_difference(&ours, &theirs) > 2e-5, experts);
        saved.is_quantized(EXPERT)
    });
    assert_eq!(packed, [false, true]);
}

/// An expert that no token chose has branches, and the optimizer no state for them.
#[test]
fn a_run_goes_on_without_state_of_experts_that_were_never_chosen() {
    let device = Device::default().autodiff();
    let lora = LoraConfig::new(TargetModules::AllLinear);
    let trainer = || {
        let (model, config) = open_folder(&fixture(FOLDER), None, &device);
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
        Trainer::new(model, &config, lora.clone(), settings, false).unwrap()
    };
    // Two equal tokens have equal hidden states, and choose the same two of four experts.
    let batch = Batch::new(&[&[5, 5]]);
    let batch = std::slice::from_ref(&batch);
    let mut first = trainer();
    first.step(batch).unwrap();
    let out = tempfile::tempdir().unwrap();
    let folder = first.save_checkpoint(out.path()).unwrap();
    let mut second = trainer().resume(&folder).unwrap();
    assert_eq!(
        second.step(batch).unwrap().loss,
        first.step(batch).unwrap().loss
    );
}

/// As in checkpoints.
#[test]
fn random_weights_leave_routers_in_floats() {
    let device = Device::default();
    for (family, router) in [("qwen3_moe", ".mlp.gate"), ("gpt_oss", ".mlp.router")] {
        let (_, config) = open_folder(&fixture(&format!("families/{family}/model")), None, &device);
        let model = random_model(&config, &device);
        let linears = model.linears();
        let routers = linears.iter().filter(|(name, _)| name.ends_with(router));
        assert_eq!(routers.clone().count(), config.layers.len());
        for (name, layer) in &linears {
            let is_float = name.ends_with(router) || name == "lm_head";
            assert_eq!(layer.is_quantized(), !is_float, "{name}");
        }
    }
}

/// transformers has no other place for them.
#[test]
fn experts_of_gpt_oss_are_stacked_in_floats_and_apart_where_they_are_packed() {
    let device = Device::default();
    let folder = fixture("families/gpt_oss/model");
    let (ids, shape, theirs) = io("families/gpt_oss/io.safetensors");
    let source = Checkpoint::open(&folder).unwrap();
    for experts in [false, true] {
        let (model, _) = open_folder(&folder, None, &device);
        let options = QuantizeLayers {
            experts,
            ..QuantizeLayers::default()
        };
        let model = model.quantize(&options).unwrap();
        let out = tempfile::tempdir().unwrap();
        let options = SaveFolder {
            source: Some(&source),
            ..SaveFolder::default()
        };
        model.save_folder(out.path(), &options).unwrap();
        let saved = Checkpoint::open(out.path()).unwrap();
        let stack = "model.layers.1.mlp.experts.gate_up_proj";
        assert_eq!(saved.contains(stack), !experts);
        assert_eq!(
            saved.is_quantized("model.layers.1.mlp.experts.3.up_proj.weight"),
            experts
        );
        if !experts {
            for stack in [
                "gate_up_proj",
                "gate_up_proj_bias",
                "down_proj",
                "down_proj_bias",
            ] {
                let key = format!("model.layers.1.mlp.experts.{stack}");
                assert_eq!(
                    saved.tensor_bytes(&key).unwrap(),
                    source.tensor_bytes(&key).unwrap()
                );
            }
        }
        let (loaded, config) = open_folder(out.path(), None, &device);
        let ours = logits(&loaded, &config, &ids, &shape);
        assert_eq!(max_difference(&ours, &theirs) > 2e-5, experts);
    }
}

fn mixtures(model: &mut Decoder) -> impl Iterator<Item = &mut MixtureMlp> {
    let layers = model.layers.iter_mut();
    layers.filter_map(|layer| match &mut layer.mlp {
        Mlp::Mixture(mixture) => Some(mixture),
        _ => None,
    })
}

/// Few rows go to experts that the device chooses, with the numbers of the experts one by one.
#[test]
fn stacked_experts_compute_at_once_what_they_do_one_by_one() {
    let device = Device::default();
    for family in ["qwen3_moe", "gpt_oss"] {
        let (model, config) =
            open_folder(&fixture(&format!("families/{family}/model")), None, &device);
        let (ids, shape, _) = io(&format!("families/{family}/io.safetensors"));
        let options = QuantizeLayers {
            experts: true,
            ..QuantizeLayers::default()
        };
        let dense = model.clone();
        let mut model = model.quantize(&options).unwrap();
        let one_by_one = logits(&model, &config, &ids, &shape);
        for mixture in mixtures(&mut model) {
            assert!(!mixture.is_grouped(1));
            *mixture = mixture.clone().stacked().unwrap();
            assert!(
                mixture.is_grouped(1) && !mixture.is_grouped(4096),
                "{family}"
            );
        }
        assert!(mixtures(&mut model).count() > 0);
        let at_once = logits(&model, &config, &ids, &shape);
        let difference = max_difference(&at_once, &one_by_one);
        assert!(difference < 1e-4, "{family}: {difference}");

        // An expert that is put in place of another is not passed over.
        let mut other = model.clone();
        for mixture in mixtures(&mut other) {
            mixture.experts.swap(0, 1);
            assert!(!mixture.is_grouped(1));
        }
        // Floats cannot be stacked, and a mapper undoes stacks.
        let mut dense = dense;
        for mixture in mixtures(&mut dense) {
            assert!(!mixture.clone().stacked().unwrap().is_grouped(1));
        }
        let mut moved = burn::module::Module::no_grad(model);
        assert!(mixtures(&mut moved).all(|mixture| !mixture.is_grouped(1)));
    }
}
