//! Recorded training passes make the steps that launched ones make. In a program of its own, one test at a time:
//! while CUDA records, no other thread of the process may allocate or wait.
//!
//! ```text
//! cargo test -p burn-nf4-llm --features wgpu --test train_replay
//! ```
#![cfg(any(feature = "cuda", feature = "wgpu"))]

mod train_runs;

use burn_nf4::op::set_reproducible;
use burn_nf4_llm::train::Passes;
use burn_nf4_llm::train::data::{Batch, Dataset};
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
/// them. The pass is made again then, and recorded anew; but not for somebody who does so at every step.
#[rstest]
#[case::once(&[4], Passes::Replayed)]
#[case::at_every_step(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], Passes::Held)]
fn values_that_somebody_holds_cost_a_recording(
    #[case] held_at: &[usize],
    #[values(1, 2)] accumulate: usize,
    #[case] passes: Passes,
) {
    let _alone = alone();
    set_reproducible(true);
    let batches: Vec<Vec<Batch>> = (0..10)
        .map(|step| (0..accumulate).map(|i| rows(2 * step + i)).collect())
        .collect();
    let mut launched = trainer("qwen3", true, 0.0);
    launched.capture = false;
    let expected = steps(&mut launched, &batches);
    let mut replayed = trainer("qwen3", true, 0.0);
    let mut given = Vec::new();
    for (step, batches) in batches.iter().enumerate() {
        let held = held_at.contains(&step).then(|| replayed.model.clone());
        given.extend(steps(&mut replayed, std::slice::from_ref(batches)));
        drop(held);
    }
    assert_eq!(replayed.passes(), passes);
    assert_alike(&given, &expected);
}

/// Rows of nearly 24 tokens are filled, and one with little in it is launched.
#[test]
fn packed_rows_with_texts_of_other_lengths_are_replayed() {
    let _alone = alone();
    set_reproducible(true);
    let example = |number: usize, length: usize| -> Vec<u32> {
        (0..length)
            .map(|i| ((i * 11 + number * 5) % 50) as u32)
            .collect()
    };
    let lengths = [14, 9, 13, 8, 12, 12, 16, 7, 7];
    let texts = lengths.iter().enumerate();
    let texts = texts.map(|(number, &length)| example(number, length));
    let data = Dataset::new(texts.collect())
        .expect("there are some")
        .pack(24);
    let batches: Vec<Vec<Batch>> = (0..12).map(|step| data.step(step, 1, 1, 3)).collect();
    let mut sizes: Vec<usize> = batches.iter().map(|step| step[0].length).collect();
    sizes.sort_unstable();
    sizes.dedup();
    assert_eq!(sizes, [7, 12, 20, 23, 24]);
    let mut launched = trainer("gemma3_text", true, 0.0);
    launched.capture = false;
    let expected = steps(&mut launched, &batches);
    let mut replayed = trainer("gemma3_text", true, 0.0);
    let given = steps(&mut replayed, &batches);
    assert_eq!(replayed.passes(), Passes::Replayed);
    assert_alike(&given, &expected);
}
