//! Training with the inputs of layers on the host makes the steps that training without makes. In a program of its
//! own, one test at a time: the bytes in use are those of the device.
//!
//! ```text
//! cargo test -p burn-nf4-llm --features wgpu --test train_offload
//! ```
#![cfg(any(feature = "cuda", feature = "wgpu"))]

mod train_runs;

use std::cell::Cell;
use std::fs;
use std::rc::Rc;

use burn_nf4::op::set_reproducible;
use burn_nf4_llm::train::data::Batch;
use burn_nf4_llm::train::{Passes, Phase, Trainer};
use rstest::rstest;

use train_runs::{alone, deep_trainer, device, packed, rows, steps};

/// More than those whose inputs are still on their way to the host when the pass backward begins.
const LAYERS: usize = 7;

/// The file of the adapter.
fn adapter(trainer: &Trainer) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("there is room");
    trainer.save_adapter(folder.path()).expect("it is saved");
    fs::read(folder.path().join("adapter_model.safetensors")).expect("it is there")
}

/// Losses and norms of steps, by their bits, and the adapter after them.
fn run(trainer: &mut Trainer, batches: &[Vec<Batch>]) -> (Vec<[u32; 2]>, Vec<u8>) {
    let steps = steps(trainer, batches);
    let bits = steps.iter().map(|step| step.map(f32::to_bits)).collect();
    assert_eq!(trainer.passes(), Passes::Launched);
    (bits, adapter(trainer))
}

#[rstest]
#[case::rows("llama3_tied", rows, 1, 0.0)]
#[case::packed_and_accumulated("gemma3_text", packed, 2, 0.0)]
#[case::dropout("qwen3", rows, 1, 0.2)]
#[case::mixture("qwen3_moe", packed, 1, 0.0)]
fn offloading_changes_no_bit(
    #[case] family: &str,
    #[case] batch: fn(usize) -> Batch,
    #[case] accumulate: usize,
    #[case] dropout: f64,
) {
    let _alone = alone();
    set_reproducible(true);
    let batches: Vec<Vec<Batch>> = (0..3)
        .map(|step| {
            (0..accumulate)
                .map(|i| batch(step * accumulate + i))
                .collect()
        })
        .collect();
    let mut on_device = deep_trainer(family, LAYERS, true, dropout);
    on_device.capture = false;
    let expected = run(&mut on_device, &batches);
    // It checkpoints whatever it was told.
    let mut on_host = deep_trainer(family, LAYERS, false, dropout);
    on_host.offload_inputs().expect("a device with memory");
    let given = run(&mut on_host, &batches);
    assert_eq!(given.0, expected.0);
    assert!(given.1 == expected.1, "the adapters differ");
}

/// Bytes in use when the loss has been computed, by a second step.
fn in_use_at_the_loss(offload: bool, batch: &Batch) -> u64 {
    let mut trainer = deep_trainer("llama3_tied", LAYERS, true, 0.0);
    if offload {
        trainer.offload_inputs().expect("a device with memory");
    }
    let seen = Rc::new(Cell::new(0));
    let (last, device) = (seen.clone(), device().without_autodiff());
    trainer.on_phase = Some(Box::new(move |phase| {
        if phase == Phase::Loss {
            device.sync().expect("a device that runs");
            let usage = device.memory_pool_usage();
            last.set(usage.expect("a device that counts").bytes_in_use);
        }
    }));
    for _ in 0..2 {
        trainer.step(std::slice::from_ref(batch)).expect("a step");
    }
    seen.get()
}

#[test]
fn inputs_on_the_host_take_no_memory_of_the_device() {
    let _alone = alone();
    set_reproducible(true);
    let tokens: Vec<u32> = (0..512).map(|i| i % 50).collect();
    let batch = Batch::new(&[&tokens]);
    // Of 128 in f32.
    let input = 512 * 128 * 4;
    let on_device = in_use_at_the_loss(false, &batch);
    let on_host = in_use_at_the_loss(true, &batch);
    // Two are on their way to the host, on wgpu each in two buffers.
    let fewer = (LAYERS as u64 - 4) * input;
    assert!(
        on_host + fewer <= on_device + input / 4,
        "{on_host} {on_device} {fewer}"
    );
}
