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
use std::sync::{Mutex, MutexGuard};

use burn::tensor::Device;
use burn_nf4::model::PeftModel;
use burn_nf4::peft::{InitLoraWeights, LoraConfig, TargetModules};
use burn_nf4_llm::generate::{EagerReason, Report, Request, Sampling, Session, generate};
use burn_nf4_llm::model::{Decoder, DecoderConfig};
use rstest::rstest;

use fixtures::open;

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
    seed: 7,
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
    #[values(
        "gemma2",
        "gemma3_text",
        "granite",
        "llama3_tied",
        "llama_biases",
        "mistral_window",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen2_window",
        "qwen3",
        "smollm3"
    )]
    name: &str,
) {
    let _alone = alone();
    let (model, config) = family(name);
    assert_replays_as_launched(&model, &config, &request(prompts(), 24, Sampling::greedy()));
    assert_replays_as_launched(&model, &config, &request(prompts(), 20, DRAWN));
}

/// Across the steps in which a cache grows, and across the border where another step is recorded.
#[test]
fn a_long_text() {
    let _alone = alone();
    let (model, config) = family("qwen3");
    let greedy = Sampling::greedy();
    assert_replays_as_launched(&model, &config, &request(prompts(), 2200, greedy));
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
#[test]
fn turns_of_a_session() {
    let _alone = alone();
    let (model, config) = family("qwen3");
    let mut session = Session::new(&model, &config);
    let mut prompt = prompts()[0].clone();
    for turn in 0..3 {
        let wanted = request(vec![prompt.clone()], 20, Sampling::greedy());
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
