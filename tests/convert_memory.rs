//! Conversions hold one tensor at a time, shown with an allocator that counts.
//!
//! Mapped files and the writer's temporary file are not counted: the system can drop their pages.
#![cfg(feature = "checkpoint")]

mod counting;

use std::path::Path;

use burn_nf4::checkpoint::{
    Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, DequantizeOptions, Dtype,
    QuantizeOptions, dequantize_checkpoint, quantize_checkpoint, verify,
};
use burn_nf4::format::FloatType;
use counting::alone;

/// The most bytes held while it runs, beyond those held before.
fn peak_bytes(run: impl FnOnce()) -> usize {
    counting::peak_bytes(run).0
}

const LAYERS: usize = 12;
const SIZE: usize = 1024;
const WEIGHT_BYTES: usize = SIZE * SIZE * 4;
/// Names, headers, rayon's bookkeeping; tables and scales, about a thirtieth of a packed weight.
const SMALL_BYTES: usize = WEIGHT_BYTES / 10;

fn model(folder: &Path) {
    let mut writer = CheckpointWriter::create(folder, DEFAULT_MAX_SHARD_BYTES).unwrap();
    for layer in 0..LAYERS {
        let value = |i: usize| ((i * 7 + layer) as f32 * 0.37).sin();
        let values: Vec<f32> = (0..SIZE * SIZE).map(value).collect();
        let bytes = bytemuck::cast_slice(&values);
        let key = format!("layers.{layer:02}.up_proj.weight");
        writer
            .write_tensor(&key, Dtype::F32, &[SIZE, SIZE], bytes)
            .unwrap();
    }
    writer.finish().unwrap();
}

/// The model has twelve weights of 4 MiB.
#[test]
fn one_weight_is_in_memory_at_a_time() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let [dense, nf4, back] = ["dense", "nf4", "back"].map(|name| folder.path().join(name));
    let written = peak_bytes(|| model(&dense));
    assert!(written < WEIGHT_BYTES + SMALL_BYTES, "{written} to write");
    // A weight of which nobody made a copy would not be seen.
    assert!(written > WEIGHT_BYTES, "{written} to write");

    let source = Checkpoint::open(&dense).unwrap();
    let quantized = peak_bytes(|| {
        let options = QuantizeOptions::default();
        quantize_checkpoint(&source, &nf4, &options, |_| ()).unwrap();
    });
    // Read from the map; the packed weight, and its parts taken out of it: an eighth each. For the loss
    // three buffers of a chunk, a quarter of a weight each.
    assert!(
        quantized < WEIGHT_BYTES + SMALL_BYTES,
        "{quantized} to quantize"
    );

    let source = Checkpoint::open(&nf4).unwrap();
    let dequantized = peak_bytes(|| {
        let options = DequantizeOptions::default();
        dequantize_checkpoint(&source, &back, &options, |_| ()).unwrap();
    });
    // The decoded weight and the packed one.
    assert!(
        dequantized < WEIGHT_BYTES + WEIGHT_BYTES / 8 + SMALL_BYTES,
        "{dequantized} to dequantize"
    );

    let verified = peak_bytes(|| {
        let report = verify(&source, &Checkpoint::open(&back).unwrap(), |_| ()).unwrap();
        assert!(report.is_within(0.0, 0.0));
    });
    // Three buffers of a chunk, a quarter of a weight here, and the packed weight.
    assert!(
        verified < WEIGHT_BYTES + SMALL_BYTES,
        "{verified} to verify"
    );
}

/// A weight that is rounded to another type on the way is held in that type as well.
#[test]
fn a_cast_adds_one_rounded_weight() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let [dense, nf4] = ["dense", "nf4"].map(|name| folder.path().join(name));
    model(&dense);
    let source = Checkpoint::open(&dense).unwrap();
    let quantized = peak_bytes(|| {
        let options = QuantizeOptions {
            dtype: Some(FloatType::BF16),
            ..QuantizeOptions::default()
        };
        quantize_checkpoint(&source, &nf4, &options, |_| ()).unwrap();
    });
    // A rounded weight is half of one; the packed one and the buffers as above.
    assert!(
        quantized < WEIGHT_BYTES / 2 + WEIGHT_BYTES + SMALL_BYTES,
        "{quantized}"
    );
}
