//! Recorded training passes make the steps that launched ones make. In a program of its own, one test at a time:
//! while CUDA records, no other thread of the process may allocate or wait.
//!
//! ```text
//! cargo test -p burn-nf4-llm --features wgpu --test train_replay
//! ```
#![cfg(any(feature = "cuda", feature = "wgpu"))]

mod train_runs;

use burn_nf4::op::set_reproducible;
use burn_nf4_llm::error::ModelError;
use burn_nf4_llm::train::Passes;
use burn_nf4_llm::train::data::Batch;
use rstest::rstest;

use train_runs::{alone, packed, rows, steps, trainer};

fn assert_alike(replayed: &[[f32; 2]], launched: &[[f32; 2]]) {
    for (step, (ours, theirs)) in replayed.iter().zip(launched).enumerate() {
        for (ours, theirs) in ours.iter().zip(theirs) {
            let difference = (ours - theirs).abs();
            assert!(
                difference <= 1e-4 * theirs.abs(),
                "step {step}: {ours} {theirs}"
            );
        }
    }
    // A run that stands still would be alike too.
    assert!((launched[0][0] - launched[launched.len() - 1][0]).abs() > 1e-3);
}

#[rstest]
fn replays_make_the_steps_of_launches(
    #[values("llama3_tied", "gemma3_text", "qwen3")] family: &str,
    #[values(true, false)] checkpointing: bool,
    #[values(rows, packed)] batch: fn(usize) -> Batch,
    #[values(1, 2)] accumulate: usize,
) {
    let _alone = alone();
    set_reproducible(true);
    let batches: Vec<Vec<Batch>> = (0..7)
        .map(|step| {
            (0..accumulate)
                .map(|i| batch(step * accumulate + i))
                .collect()
        })
        .collect();
    let mut launched = trainer(family, checkpointing, 0.0);
    launched.capture = false;
    let expected = steps(&mut launched, &batches);
    assert_eq!(launched.passes(), Passes::Launched);
    let mut replayed = trainer(family, checkpointing, 0.0);
    let given = steps(&mut replayed, &batches);
    assert_eq!(replayed.passes(), Passes::Replayed);
    assert_alike(&given, &expected);
}

/// Other sizes in between are launched, until they come twice.
#[test]
fn sizes_that_change_are_launched() {
    let _alone = alone();
    set_reproducible(true);
    let sizes = [0, 0, 0, 1, 0, 1, 1, 1, 0];
    let batches: Vec<Vec<Batch>> = sizes
        .iter()
        .enumerate()
        .map(|(step, &size)| vec![if size == 0 { rows(step) } else { packed(step) }])
        .collect();
    let mut launched = trainer("qwen3", true, 0.0);
    launched.capture = false;
    let expected = steps(&mut launched, &batches);
    let given = steps(&mut trainer("qwen3", true, 0.0), &batches);
    assert_alike(&given, &expected);
}

/// Dropout draws anew in each pass, experts are chosen by the host.
#[rstest]
#[case::dropout("qwen3", 0.1)]
#[case::mixture("qwen3_moe", 0.0)]
fn what_cannot_be_replayed_is_launched(#[case] family: &str, #[case] dropout: f64) {
    let _alone = alone();
    let mut trainer = trainer(family, true, dropout);
    for step in 0..4 {
        trainer.step(&[rows(step)]).expect("a step");
    }
    assert_eq!(trainer.passes(), Passes::Launched);
}

/// A replay reads the buffers that it was recorded with, which a step leaves for others if it must not write to
/// them.
#[test]
fn values_that_somebody_holds_are_an_error() {
    let _alone = alone();
    let mut trainer = trainer("qwen3", true, 0.0);
    for step in 0..4 {
        trainer.step(&[rows(step)]).expect("a step");
    }
    let held = trainer.model.clone();
    trainer
        .step(&[rows(4)])
        .expect("the values are copied behind it");
    drop(held);
    let error = trainer
        .step(&[rows(5)])
        .expect_err("it reads what was held");
    assert!(matches!(error, ModelError::Replay { .. }), "{error}");
}
