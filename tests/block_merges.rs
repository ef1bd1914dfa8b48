//! Adapters merged into weights in FP8, in the form of scales that the base model has.
#![cfg(feature = "peft")]

mod stored;

use std::fs;

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, Dtype};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig, QuantType};
use burn_nf4::peft::{
    Adapter, DenseTensor, LoraConfig, LoraModule, MergeOptions, TargetModules, merge_4bit,
};
use rstest::rstest;
use serde_json::{Value, json};
use stored::{Stored, floats, sine};
use tempfile::TempDir;

const Q: &str = "model.layers.0.self_attn.q_proj";
const ROWS: usize = 24;
const COLUMNS: usize = 40;

fn compressed(strategy: &str) -> Value {
    json!({"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": null, "weights":
            {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": true}}}})
}

/// A folder with one weight in FP8, whose scales are named and shaped so.
fn base(scale: &str, shape: &[usize], claim: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let scales = vec![0.01; shape.iter().product()];
    // From -448 to 448, with no code for NaN.
    let codes = (0..ROWS * COLUMNS).map(|index| (index % 127) as u8 | ((index % 2) as u8) << 7);
    let weight = Stored {
        dtype: Dtype::F8_E4M3,
        shape: vec![ROWS, COLUMNS],
        bytes: codes.collect(),
    };
    let tensors = [
        (format!("{Q}.weight"), weight),
        (format!("{Q}.weight{scale}"), floats(&scales, shape)),
    ];
    stored::write(folder.path(), &tensors.into());
    let config = json!({"dtype": "float32", "quantization_config": claim});
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

fn adapter() -> Adapter {
    let lora = LoraConfig {
        r: 2,
        lora_alpha: 2.0,
        ..LoraConfig::new(TargetModules::list(["q_proj"]))
    };
    let dense = |shape: &[usize]| {
        let values = sine(shape.iter().product());
        DenseTensor::from_f32(&values, shape, FloatType::F32).unwrap()
    };
    let module = LoraModule {
        lora_a: dense(&[2, COLUMNS]),
        lora_b: dense(&[ROWS, 2]),
        magnitude: None,
        bias: None,
    };
    let mut adapter = Adapter::new(lora).unwrap();
    adapter.insert(Q, module).unwrap();
    adapter
}

/// What the weight is with the branch, in f32.
fn expected(base: &BlockTensor) -> Vec<f32> {
    let (a, b) = (sine(2 * COLUMNS), sine(2 * ROWS));
    let branch = |row: usize, column: usize| -> f32 {
        (0..2)
            .map(|r| b[2 * row + r] * a[r * COLUMNS + column])
            .sum()
    };
    let weight = base.dequantize::<f32>().into_iter().enumerate();
    weight
        .map(|(index, value)| value + branch(index / COLUMNS, index % COLUMNS))
        .collect()
}

#[rstest]
#[case::one("_scale", &[1], compressed("tensor"))]
#[case::scalar("_scale", &[], json!({"quant_method": "modelopt", "quant_algo": "FP8"}))]
#[case::inverse("_scale_inv", &[], json!({"quant_method": "fp8"}))]
#[case::rows("_scale", &[ROWS, 1], compressed("channel"))]
#[case::inverse_rows("_scale_inv", &[ROWS, 1], json!({"quant_method": "fp8"}))]
fn scales_keep_their_form(#[case] scale: &str, #[case] shape: &[usize], #[case] claim: Value) {
    let base = base(scale, shape, &claim);
    let source = Checkpoint::open(base.path()).unwrap();
    assert_eq!(source.faults(), []);
    let out = tempfile::tempdir().unwrap();
    merge_4bit(
        &source,
        &adapter(),
        out.path(),
        &MergeOptions::default(),
        |_| {},
    )
    .unwrap();
    let merged = Checkpoint::open(out.path()).unwrap();
    assert_eq!(merged.faults(), []);
    assert!(merged.keys().eq(source.keys()));
    let key = format!("{Q}.weight{scale}");
    let info = merged.tensor_info(&key).unwrap();
    assert_eq!((info.dtype, info.shape), (Dtype::F32, shape));

    let weight = format!("{Q}.weight");
    let values = expected(&source.load_quantized(&weight).unwrap());
    // One scale is that of the largest magnitude of all.
    let rows: [usize; 2] = match shape.len() {
        2 => [ROWS, COLUMNS],
        _ => [1, ROWS * COLUMNS],
    };
    let config = QuantConfig::of(QuantType::Fp8Channel);
    let best = BlockTensor::quantize(&values, &rows, config).unwrap();
    let merged = merged.load_quantized(&weight).unwrap();
    assert_eq!(merged.shape(), [ROWS, COLUMNS]);
    for (ours, best) in merged
        .dequantize::<f32>()
        .iter()
        .zip(best.dequantize::<f32>())
    {
        // Sums in another order can be rounded to the neighbouring code, an eighth apart.
        assert!((ours - best).abs() <= best.abs() / 7.0, "{ours} and {best}");
    }
}

/// A scale that is neither of one row, of each row nor of tiles has no form to keep.
#[test]
fn other_scales_are_refused_by_name() {
    let base = base("_scale", &[7], &compressed("channel"));
    let source = Checkpoint::open(base.path()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let options = MergeOptions::default();
    match merge_4bit(&source, &adapter(), out.path(), &options, |_| {}) {
        Err(Nf4Error::Shape { tensor, .. }) => assert_eq!(tensor, format!("{Q}.weight_scale")),
        other => panic!("{other:?}"),
    }
}
