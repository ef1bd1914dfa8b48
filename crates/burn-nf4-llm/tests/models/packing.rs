//! Examples packed into one row against the same examples in rows of their own.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_nf4::format::FloatType;
use burn_nf4::model::LinearLayers;
use burn_nf4::peft::{InitLoraWeights, LoraConfig, TargetModules};
use burn_nf4_llm::model::{Decoder, DecoderConfig};
use burn_nf4_llm::train::data::{Batch, Dataset, Example, NO_LABEL};
use burn_nf4_llm::train::schedule::{Decay, Schedule};
use burn_nf4_llm::train::{Evaluation, Settings, Trainer};
use rstest::rstest;

use crate::fixtures::{floats, max_difference, open, random_numbers};

fn lora(use_dora: bool) -> LoraConfig {
    LoraConfig {
        r: 4,
        use_dora,
        ..LoraConfig::new(TargetModules::AllLinear)
    }
}

/// A model whose branches do something: their second factors are not zero.
fn model(family: &str, lora: &LoraConfig) -> (Decoder, DecoderConfig) {
    let device = Device::default().autodiff();
    let folder = format!("families/{family}/model");
    let (model, config) = open(&folder, Some(FloatType::F32), &device);
    let lora = LoraConfig {
        init_lora_weights: InitLoraWeights::Default(false),
        ..lora.clone()
    };
    let _drawn = random_numbers();
    device.seed(3);
    (model.with_lora(&lora, &device).unwrap(), config)
}

/// Of unequal lengths, the longest beyond the windows of the families, and with tokens that are not
/// predicted.
fn examples(vocabulary: usize) -> Vec<Example> {
    let example = |(seed, length): (usize, usize)| {
        let id = |index: usize| ((index * 37 + seed * 101 + 5) % vocabulary) as u32;
        let mut example = Example::whole((0..length).map(id).collect());
        example.predicted[length / 3] = false;
        example
    };
    [(0, 29), (1, 7), (2, 40), (3, 18)].map(example).to_vec()
}

fn packed(vocabulary: usize) -> Batch {
    Batch::packed(&examples(vocabulary).iter().collect::<Vec<_>>())
}

/// The mean loss, and the gradient of every trained parameter.
fn gradients(
    model: &Decoder,
    config: &DecoderConfig,
    batch: &Batch,
) -> (f32, BTreeMap<u64, Vec<f32>>) {
    let device = model.device();
    let shape = [batch.rows, batch.length];
    let ids = Tensor::<2, Int>::from_data(TensorData::new(batch.ids.clone(), shape), &device);
    let pass = batch.pass(model, &mut model.rope_tables(config));
    let mut x = model.embed(ids);
    for layer in &model.layers {
        x = layer.forward(x, &pass, None);
    }
    let logits = model.head(x);
    let [rows, length, vocabulary] = logits.dims();
    let count = rows * length;
    let log_probabilities = log_softmax(logits.reshape([count, vocabulary]), 1);
    let labels = batch.labels();
    let chosen: Vec<i64> = labels.iter().map(|&label| label.max(0)).collect();
    let mask: Vec<f32> = labels
        .iter()
        .map(|&label| if label == NO_LABEL { 0.0 } else { 1.0 })
        .collect();
    let chosen = Tensor::<2, Int>::from_data(TensorData::new(chosen, [count, 1]), &device);
    let mask = Tensor::<2>::from_data(TensorData::new(mask, [count, 1]), &device);
    let loss = (log_probabilities.gather(1, chosen) * mask).sum() / -(batch.targets() as f64);
    let value = loss.clone().into_scalar::<f32>();
    let mut found = Found {
        gradients: GradientsParams::from_grads(loss.backward(), model),
        values: BTreeMap::new(),
    };
    model.visit(&mut found);
    (value, found.values)
}

struct Found {
    gradients: GradientsParams,
    values: BTreeMap<u64, Vec<f32>>,
}

impl ModuleVisitor for Found {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            self.values.insert(param.id.val(), floats(gradient));
        }
    }
}

/// Windows, norms of queries and keys, several rotary embeddings, norms after blocks, mixtures, sinks.
#[rstest]
fn packed_examples_have_the_loss_and_gradients_of_examples_in_rows(
    #[values(
        "mistral_window",
        "qwen2_window",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "olmo2",
        "qwen3_moe",
        "smollm3"
    )]
    family: &str,
    #[values(false, true)] use_dora: bool,
) {
    let (model, config) = model(family, &lora(use_dora));
    let examples = examples(config.vocab_size);
    let examples: Vec<&Example> = examples.iter().collect();
    let packed = Batch::packed(&examples);
    assert_eq!((packed.rows, packed.length), (1, 94));
    assert_alike(&model, &config, &packed, &Batch::padded(&examples));
}

/// That the losses and gradients of two batches are the same.
fn assert_alike(model: &Decoder, config: &DecoderConfig, one: &Batch, other: &Batch) {
    let (loss, ours) = gradients(model, config, one);
    let (expected, theirs) = gradients(model, config, other);
    // Sums in another order, in f32.
    assert!((loss - expected).abs() < 1e-5, "{loss} and {expected}");
    assert!(!theirs.is_empty());
    assert_eq!(
        ours.keys().collect::<Vec<_>>(),
        theirs.keys().collect::<Vec<_>>()
    );
    for (id, theirs) in &theirs {
        let largest = theirs
            .iter()
            .fold(0f32, |most, value| most.max(value.abs()));
        let difference = max_difference(&ours[id], theirs);
        assert!(
            difference <= 1e-6 + 1e-4 * largest,
            "{difference:e} of {largest:e}"
        );
    }
}

/// Windows, angles that change with the length of the longest text, mixtures, sinks.
#[rstest]
fn filled_rows_have_the_loss_and_gradients_of_packed_ones(
    #[values("qwen2_window", "gemma3_text", "gpt_oss", "phi3", "qwen3_moe")] family: &str,
) {
    let (model, config) = model(family, &lora(false));
    let data = Dataset::from_examples(examples(config.vocab_size)).unwrap();
    let batch = data.pack(120).batches(1).next().unwrap();
    let filled = batch.filled();
    assert_eq!((batch.length, filled.length), (94, 120));
    assert_eq!(filled.tokens(), 94);
    assert_alike(&model, &config, &filled, &batch);
}

/// Without the borders between them the examples would see each other.
#[test]
fn one_long_example_is_another_one_than_its_parts_packed() {
    let (model, config) = model("qwen3", &lora(false));
    let examples = examples(config.vocab_size);
    let ids = examples
        .iter()
        .flat_map(|example| example.ids.clone())
        .collect();
    let predicted = examples
        .iter()
        .flat_map(|example| example.predicted.clone());
    let whole = Example {
        ids,
        predicted: predicted.collect(),
    };
    let (loss, _) = gradients(&model, &config, &packed(config.vocab_size));
    let (of_whole, _) = gradients(&model, &config, &Batch::packed(&[&whole]));
    assert!((loss - of_whole).abs() > 1e-3, "{loss} and {of_whole}");
}

fn trainer(family: &str, lora: LoraConfig, checkpointing: bool) -> (Trainer, usize) {
    let (model, config) = model(family, &lora);
    let schedule = Schedule {
        peak: 1e-3,
        decay: Decay::Constant,
        warmup: 0,
        total: 3,
    };
    let settings = Settings::new(schedule, &lora).unwrap();
    let trainer = Trainer::new(model, &config, lora, settings, checkpointing);
    (trainer.unwrap(), config.vocab_size)
}

fn loss_of(trainer: &mut Trainer, batch: &Batch) -> f32 {
    trainer.step(std::slice::from_ref(batch)).unwrap().loss
}

fn three_losses(trainer: &mut Trainer, batch: &Batch) -> [u32; 3] {
    [0; 3].map(|_| loss_of(trainer, batch).to_bits())
}

/// Running layers again changes no operation, so the losses are the same bits.
#[rstest]
#[case::plain(lora(false))]
#[case::dora(lora(true))]
#[case::rs_lora(LoraConfig { use_rslora: true, ..lora(false) })]
#[case::head_and_embeddings(LoraConfig {
    modules_to_save: Some(vec!["lm_head".into(), "embed_tokens".into()]),
    ..lora(false)
})]
fn packed_batches_go_with_gradient_checkpointing(
    #[case] lora: LoraConfig,
    #[values("mistral_window", "llama3_tied")] family: &str,
) {
    let [kept, again] = [false, true].map(|checkpointing| {
        let (mut trainer, vocabulary) = trainer(family, lora.clone(), checkpointing);
        three_losses(&mut trainer, &packed(vocabulary))
    });
    assert_eq!(kept, again);
}

#[test]
fn dropout_drops_the_same_of_packed_batches_when_layers_run_again() {
    let with_dropout = LoraConfig {
        lora_dropout: 0.3,
        ..lora(false)
    };
    let trainers =
        [false, true].map(|again| trainer("mistral_window", with_dropout.clone(), again));
    let _drawn = random_numbers();
    let [kept, again] =
        trainers.map(|(mut trainer, vocabulary)| three_losses(&mut trainer, &packed(vocabulary)));
    assert_eq!(kept, again);
}

/// Each is far enough from where it was that the loss of the next step shows it.
#[test]
fn embeddings_and_head_are_trained_beside_the_branches() {
    let saved = |names: &[&str]| LoraConfig {
        modules_to_save: Some(names.iter().map(|&name| name.into()).collect()),
        ..lora(false)
    };
    let losses: Vec<[u32; 3]> = [
        &["lm_head"][..],
        &["embed_tokens"],
        &["lm_head", "embed_tokens"],
    ]
    .into_iter()
    .map(|names| {
        let (mut trainer, vocabulary) = trainer("mistral_window", saved(names), true);
        three_losses(&mut trainer, &packed(vocabulary))
    })
    .collect();
    assert_eq!(losses[0][0], losses[1][0]);
    assert_ne!(losses[0][1], losses[1][1]);
    assert_ne!(losses[0][1], losses[2][1]);
    assert_ne!(losses[1][1], losses[2][1]);
}

/// Without dropout the next step has the loss that the evaluation found; with it the evaluation does not
/// drop anything.
#[test]
fn an_evaluation_is_the_loss_without_dropout_and_changes_nothing() {
    let (mut plain, vocabulary) = trainer("gemma3_text", lora(false), true);
    let batch = packed(vocabulary);
    let Evaluation { loss, targets } = plain.evaluate([batch.clone(), batch.clone()]).unwrap();
    assert_eq!(targets, 2 * batch.targets());
    let step = loss_of(&mut plain, &batch);
    assert!((loss - f64::from(step)).abs() < 1e-5, "{loss} and {step}");

    let with_dropout = LoraConfig {
        lora_dropout: 0.5,
        ..lora(false)
    };
    let (mut dropping, _) = trainer("gemma3_text", with_dropout, true);
    let evaluation = dropping.evaluate([batch.clone()]).unwrap();
    assert!((evaluation.loss - loss).abs() < 1e-5);
    assert!((evaluation.perplexity() - loss.exp()).abs() < 1e-3);
    let _drawn = random_numbers();
    let step = loss_of(&mut dropping, &batch);
    assert!((loss - f64::from(step)).abs() > 1e-3, "{loss} and {step}");
}
