//! Logits against transformers'.

use burn::tensor::Device;
use burn_nf4::checkpoint::{
    Checkpoint, DequantizeOptions, QuantizeOptions, dequantize_checkpoint, quantize_checkpoint,
};
use burn_nf4::format::FloatType;
use rstest::rstest;

use crate::fixtures::{fixture, io, logits, max_difference, open, write_io};

#[rstest]
#[case::single("hf/f32/model")]
#[case::sharded("hf/f32_sharded/model")]
fn f32_logits_are_those_of_transformers(#[case] folder: &str) {
    let (model, config) = open(folder, None, &Device::default());
    let (ids, shape, theirs) = io("hf/f32/io.safetensors");
    let ours = logits(&model, &config, &ids, &shape);
    let difference = max_difference(&ours, &theirs);
    // Logits are about 4 and pass through sums of up to 352 products in f32.
    assert!(difference < 2e-5, "{difference:e}");
}

/// bf16 keeps 8 bits, so the order of a sum changes logits near 4 by a few steps of 2⁻⁶. What can
/// be asked is that we are no further from transformers' bf16 than that is from exact arithmetic.
#[test]
fn bf16_logits_are_within_the_rounding_of_transformers() {
    let (ids, shape, theirs) = io("hf/bf16/io.safetensors");
    let run = |dtype| {
        let (model, config) = open("hf/bf16/model", Some(dtype), &Device::default());
        logits(&model, &config, &ids, &shape)
    };
    let (ours, exact) = (run(FloatType::BF16), run(FloatType::F32));

    let their_rounding = max_difference(&theirs, &exact);
    let difference = max_difference(&ours, &theirs);
    assert!(difference > 0.0, "computed in another type");
    assert!(
        difference <= their_rounding,
        "{difference:e} from transformers, which is {their_rounding:e} from f32"
    );
    // And on the whole, not at the worst logit alone.
    let (ours, theirs) = (rms(&ours, &theirs), rms(&theirs, &exact));
    assert!(ours <= theirs, "{ours:e} against {theirs:e}");
}

/// A folder that was quantized here is a model again. Its layers were in NF4 before, so that only
/// their scales are rounded anew; its head was not.
#[rstest]
#[case::layers("quantized", QuantizeOptions::default())]
#[case::layers_and_head("quantized_head", QuantizeOptions { head: true, ..Default::default() })]
fn a_folder_quantized_here_has_nearly_the_same_logits(
    #[case] name: &str,
    #[case] options: QuantizeOptions,
) {
    let temporary = tempfile::tempdir().unwrap();
    let folder = match std::env::var_os("NF4_EXPORT") {
        // For `scripts/peer_load.py` elsewhere.
        Some(folder) => folder.into(),
        None => temporary.path().to_path_buf(),
    };
    let quantized = Checkpoint::open(fixture("hf/f32/model")).unwrap();
    let dense = temporary.path().join("dense");
    dequantize_checkpoint(&quantized, &dense, &DequantizeOptions::default(), |_| ()).unwrap();
    let dense = Checkpoint::open(dense).unwrap();
    let model = folder.join(name);
    quantize_checkpoint(&dense, &model, &options, |_| ()).unwrap();
    let (model, config) = open(model.to_str().unwrap(), None, &Device::default());
    let (ids, shape, theirs) = io("hf/f32/io.safetensors");
    let ours = logits(&model, &config, &ids, &shape);
    let difference = max_difference(&ours, &theirs);
    // Scales have eight bits, but are near the values that they had: see `verify`. A head was dense.
    let most = if options.head { 1.0 } else { 1e-2 };
    assert!(difference > 0.0 && difference < most, "{difference:e}");
    let io = folder.join(format!("{name}.safetensors"));
    write_io(&io, &ids, &shape, &ours);
}

fn rms(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
    (squares.sum::<f64>() / a.len() as f64).sqrt()
}
