//! Logits against transformers'.

use burn::tensor::Device;
use burn_nf4::format::FloatType;
use rstest::rstest;

use crate::fixtures::{io, logits, max_difference, open};

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

fn rms(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
    (squares.sum::<f64>() / a.len() as f64).sqrt()
}
