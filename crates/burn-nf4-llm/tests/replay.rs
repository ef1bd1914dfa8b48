//! Recorded steps say what launched ones say. In a program of its own, one test at a time: while CUDA
//! records, no other thread of the process may allocate or wait.
//!
//! ```text
//! cargo test -p burn-nf4-llm --features wgpu --test replay
//! ```
#![cfg(any(feature = "cuda", feature = "wgpu"))]

#[allow(dead_code, reason = "shared with the other tests")]
#[path = "models/fixtures.rs"]
mod fixtures;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use burn::tensor::Device;
use burn_nf4::model::{LinearLayers, PeftModel, QuantizeLayers};
use burn_nf4::peft::{InitLoraWeights, LoraConfig, TargetModules};
use burn_nf4_llm::generate::{EagerReason, Report, Request, Sampling, Session, generate};
use burn_nf4_llm::model::{Decoder, DecoderConfig};
use rstest::rstest;

use fixtures::{PROMPT, open, open_folder, tokens};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    let lock = ONE_AT_A_TIME.lock();
    lock.unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn device() -> Device {
    #[cfg(feature = "cuda")]
    if std::env::var_os("BURN_NF4_TEST_CUDA").is_some() {
        return Device::cuda(0);
    }
    #[cfg(feature = "wgpu")]
    return Device::wgpu(Default::default());
    #[cfg(not(feature = "wgpu"))]
    Device::cuda(0)
}

fn family(name: &str) -> (Decoder, DecoderConfig) {
    open(&format!("families/{name}/model"), None, &device())
}

const DRAWN: Sampling = Sampling {
    temperature: 0.9,
    top_k: 20,
    top_p: 0.95,
    min_p: 0.01,
    repetition_penalty: 1.2,
    seed: 7,
};

const PENALISED: Sampling = Sampling {
    repetition_penalty: 1.5,
    ..Sampling::greedy()
};

/// Rows of different length, so that two are padded.
fn prompts() -> Vec<Vec<u32>> {
    vec![vec![5, 9, 2, 7, 3, 11, 4], vec![8, 1, 6], vec![12, 3, 9, 4]]
}

fn request(prompts: Vec<Vec<u32>>, max_tokens: usize, sampling: Sampling) -> Request {
    Request {
        prompts,
        max_tokens,
        sampling,
        eos: Vec::new(),
        capture: true,
        ..Request::default()
    }
}

fn run(model: &Decoder, config: &DecoderConfig, request: &Request) -> Report {
    generate(model, config, request, |_, _| Ok(())).unwrap()
}

/// That replays were made, and gave what launches give.
fn assert_replays_as_launched(model: &Decoder, config: &DecoderConfig, request: &Request) {
    let replayed = run(model, config, request);
    assert_eq!(replayed.eager, None);
    let launched = Request {
        capture: false,
        ..request.clone()
    };
    let launched = run(model, config, &launched);
    assert_eq!(launched.eager, Some(EagerReason::Asked));
    assert_eq!(replayed.tokens, launched.tokens);
}

#[rstest]
fn every_family(
    #[files("tests/fixtures/families/*/model")]
    #[dirs]
    // Their experts are floats, which are not stacked: see `mixtures_of_stacked_experts`.
    #[exclude("qwen3_moe|gpt_oss")]
    folder: PathBuf,
) {
    let _alone = alone();
    let (model, config) = open_folder(&folder, None, &device());
    assert_replays_as_launched(&model, &config, &request(prompts(), 24, Sampling::greedy()));
    assert_replays_as_launched(&model, &config, &request(prompts(), 20, DRAWN));
    assert_replays_as_launched(&model, &config, &request(prompts(), 20, PENALISED));
}

/// Experts that the device alone chooses. They are stacked last: a model that is changed later is not recorded.
#[rstest]
#[case::softmax_first("qwen3_moe")]
#[case::choice_first("gpt_oss")]
fn mixtures_of_stacked_experts(#[case] name: &str) {
    let _alone = alone();
    let (model, config) = family(name);
    let options = QuantizeLayers {
        experts: true,
        ..QuantizeLayers::default()
    };
    let apart = model.quantize(&options).unwrap();
    let wanted = request(prompts(), 20, Sampling::greedy());
    let one_by_one = run(&apart, &config, &wanted);
    assert_eq!(one_by_one.eager, Some(EagerReason::Mixture));
    let model = apart.stack_experts().unwrap();
    assert_eq!(run(&model, &config, &wanted).tokens, one_by_one.tokens);
    assert_replays_as_launched(&model, &config, &wanted);
    assert_replays_as_launched(&model, &config, &request(prompts(), 20, DRAWN));
    let many = Request {
        prompts: vec![vec![5, 9]; 3],
        ..wanted
    };
    assert_replays_as_launched(&model, &config, &many);
    let changed = burn::module::Module::no_grad(model);
    assert_eq!(
        run(&changed, &config, &many).eager,
        Some(EagerReason::Mixture)
    );
}

/// Across the steps in which a cache grows, and across the border where another step is recorded.
#[test]
fn a_long_text() {
    let _alone = alone();
    let (model, config) = family("qwen3");
    for sampling in [Sampling::greedy(), DRAWN] {
        assert_replays_as_launched(&model, &config, &request(prompts(), 2200, sampling));
    }
}

#[test]
fn rows_that_end_at_different_times() {
    let _alone = alone();
    let (model, config) = family("llama3_tied");
    let mut request = request(prompts(), 40, DRAWN);
    let free = run(&model, &config, &request).tokens;
    // Ends that single rows have, each at its own place.
    request.eos = vec![free[0][5], free[1][20]];
    assert_replays_as_launched(&model, &config, &request);
    let report = run(&model, &config, &request);
    assert!(report.tokens[0].len() <= 5 && report.tokens[1].len() <= 20);
}

/// A graph names buffers: whatever comes and goes beside it must not be given its memory.
#[test]
fn after_other_prompts_and_other_models() {
    let _alone = alone();
    let (model, config) = family("qwen2");
    let wanted = request(prompts(), 32, Sampling::greedy());
    let expected = run(&model, &config, &wanted).tokens;
    for name in ["granite", "smollm3"] {
        let (other, of_other) = family(name);
        run(&other, &of_other, &request(vec![vec![3; 300]], 20, DRAWN));
        drop(other);
        let mut seen = 0;
        let report = generate(&model, &config, &wanted, |_, _| {
            seen += 1;
            if seen % 7 == 0 {
                // Beside the replays.
                let (between, of_between) = family("olmo2");
                run(&between, &of_between, &request(vec![vec![3; 40]], 2, DRAWN));
            }
            Ok(())
        });
        assert_eq!(report.unwrap().tokens, expected, "{name}");
    }
}

#[test]
fn with_an_adapter() {
    let _alone = alone();
    let (model, config) = family("llama3_tied");
    let plain = run(&model, &config, &request(prompts(), 24, Sampling::greedy()));
    let lora = LoraConfig {
        r: 4,
        lora_alpha: 64.0,
        init_lora_weights: InitLoraWeights::Default(false),
        ..LoraConfig::new(TargetModules::AllLinear)
    };
    let model = PeftModel::new(model, lora, &device()).unwrap();
    let model = model.into_model();
    let wanted = request(prompts(), 24, Sampling::greedy());
    assert_replays_as_launched(&model, &config, &wanted);
    assert_ne!(run(&model, &config, &wanted).tokens, plain.tokens);
}

/// A session hands its cache to a new recording each time, and gets it back.
#[rstest]
fn turns_of_a_session(#[values(Sampling::greedy(), DRAWN)] sampling: Sampling) {
    let _alone = alone();
    let (model, config) = family("qwen3");
    let mut session = Session::new(&model, &config);
    let mut prompt = prompts()[0].clone();
    for turn in 0..3 {
        let wanted = request(vec![prompt.clone()], 20, sampling);
        let mut seen = 0;
        let report = session.generate(&wanted, |_, _| {
            seen += 1;
            Ok(match seen < 18 {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            })
        });
        let report = report.unwrap();
        assert_eq!(report.eager, None);
        assert_eq!(report.reused_tokens > 0, turn > 0);
        let fresh = run(&model, &config, &wanted).tokens;
        assert_eq!(report.tokens[0], fresh[0][..18]);
        prompt.extend(&report.tokens[0]);
        prompt.extend([4, 9, 2]);
    }
}

#[test]
fn what_is_not_recorded_is_told() {
    let _alone = alone();
    let (model, config) = family("qwen3");
    let few = run(&model, &config, &request(prompts(), 3, Sampling::greedy()));
    assert_eq!(few.eager, Some(EagerReason::FewTokens));
    let (model, config) = family("qwen3_moe");
    let mixture = run(&model, &config, &request(prompts(), 20, Sampling::greedy()));
    assert_eq!(mixture.eager, Some(EagerReason::Mixture));
}

/// Rows that others take over in a recorded step: the texts of launches, and of each prompt alone.
#[rstest]
#[case::greedy(Sampling::greedy())]
#[case::drawn(DRAWN)]
fn prompts_that_wait_take_the_places_of_rows(
    #[case] sampling: Sampling,
    #[values("qwen3", "gemma3_text")] name: &str,
) {
    let _alone = alone();
    let (model, config) = family(name);
    let mut all = prompts();
    all.extend([vec![9], (3..40).collect(), vec![2, 4]]);
    let mut wanted = request(all, 40, sampling);
    let free = run(&model, &config, &wanted).tokens;
    wanted.max_batch = 2;
    // Ends that single rows have, each at its own place.
    wanted.eos = vec![free[0][5], free[1][20], free[4][11]];
    assert_replays_as_launched(&model, &config, &wanted);
    let waiting = run(&model, &config, &wanted);
    let until_end = |text: &Vec<u32>| -> Vec<u32> {
        let text = text.iter().take_while(|id| !wanted.eos.contains(id));
        text.copied().collect()
    };
    let expected: Vec<Vec<u32>> = free.iter().map(until_end).collect();
    assert_eq!(waiting.tokens, expected);
}

/// The greedy text is that of transformers, and the same again, in the same process and beside another model.
#[rstest]
fn recorded_texts_are_those_of_transformers(
    #[files("tests/fixtures/families/*/model")]
    #[dirs]
    folder: PathBuf,
) {
    let _alone = alone();
    let file = folder.with_file_name("io.safetensors");
    let file = burn_nf4::checkpoint::SafetensorsFile::open(file).unwrap();
    let (prompt, expected) = (
        tokens(&file, "input_ids")[..PROMPT].to_vec(),
        tokens(&file, "generated"),
    );
    let (model, config) = open_folder(&folder, None, &device());
    // Longer than theirs, so that it is worth a recording.
    let mut wanted = request(vec![prompt], expected.len().max(20), Sampling::greedy());
    for _ in 0..2 {
        let report = run(&model, &config, &wanted);
        let is_mixture = config.layers.iter().any(|layer| layer.mixture.is_some());
        assert_eq!(report.eager, is_mixture.then_some(EagerReason::Mixture));
        assert_eq!(report.tokens[0][..expected.len()], expected);
        let (other, of_other) = family("granite");
        run(&other, &of_other, &request(vec![vec![3; 30]], 20, DRAWN));
        drop(other);
    }
    // As rows that take turns.
    wanted.prompts = vec![wanted.prompts[0].clone(); 3];
    wanted.max_batch = 2;
    for text in run(&model, &config, &wanted).tokens {
        assert_eq!(text[..expected.len()], expected);
    }
}
