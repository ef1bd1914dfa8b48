//! Adapters merged into weights in FP8 and NVFP4, in the form of scales that the base model has.
#![cfg(feature = "peft")]

mod stored;

use std::fs;

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, Dtype};
use burn_nf4::format::{
    Absmax, BlockTensor, FloatType, QuantConfig, QuantType, TensorScale, nvfp4_global_scale,
};
use burn_nf4::peft::{
    Adapter, DenseTensor, LoraConfig, LoraModule, MergeOptions, TargetModules, merge_4bit,
};
use rstest::rstest;
use serde_json::{Value, json};
use stored::{Stored, floats, sine};
use tempfile::TempDir;

const Q: &str = "model.layers.0.self_attn.q_proj";
const ROWS: usize = 24;
const COLUMNS: usize = 48;

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

/// The folder of a merge, whose tensors have the names of the base model's.
fn merged(source: &Checkpoint) -> (TempDir, Checkpoint) {
    assert_eq!(source.faults(), []);
    let out = tempfile::tempdir().unwrap();
    let options = MergeOptions::default();
    merge_4bit(source, &adapter(), out.path(), &options, |_| {}).unwrap();
    let merged = Checkpoint::open(out.path()).unwrap();
    assert_eq!(merged.faults(), []);
    assert!(merged.keys().eq(source.keys()));
    (out, merged)
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
    let (_out, merged) = merged(&source);
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

/// ModelOpt's own file says of the result what it says of the base model.
#[test]
fn the_file_of_modelopt_comes_along() {
    let base = base("_scale", &[], &Value::Null);
    let claim = json!({"quantization": {"quant_algo": "FP8"}}).to_string();
    let name = "hf_quant_config.json";
    fs::write(base.path().join(name), &claim).unwrap();
    let (out, _) = merged(&Checkpoint::open(base.path()).unwrap());
    assert_eq!(fs::read_to_string(out.path().join(name)).unwrap(), claim);
}

/// A folder with one weight in NVFP4, as compressed-tensors or ModelOpt has it.
fn nvfp4_base(scale: TensorScale) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let weight = BlockTensor::quantize_nvfp4(&sine(ROWS * COLUMNS), &[ROWS, COLUMNS], scale);
    let weight = weight.unwrap();
    let Absmax::Coded(scales) = weight.absmax() else {
        panic!("NVFP4 has coded scales");
    };
    let (codes, of_tensor, shape, claim): (_, _, &[usize], _) = match scale {
        TensorScale::Multiplies(_) => {
            let claim = json!({"quant_method": "modelopt", "quant_algo": "NVFP4"});
            ("", "_scale_2", &[], claim)
        }
        _ => {
            let weights = json!({"num_bits": 4, "type": "float", "strategy": "tensor_group",
                "group_size": 16, "symmetric": true});
            let groups = json!({"group_0": {"targets": ["Linear"], "weights": weights}});
            let claim = json!({"quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized", "config_groups": groups});
            ("_packed", "_global_scale", &[1], claim)
        }
    };
    let bytes = |dtype, columns, bytes: &[u8]| Stored {
        dtype,
        shape: vec![ROWS, columns],
        bytes: bytes.to_vec(),
    };
    let tensors = [
        (codes, bytes(Dtype::U8, COLUMNS / 2, weight.codes())),
        ("_scale", bytes(Dtype::F8_E4M3, COLUMNS / 16, &scales.codes)),
        (of_tensor, floats(&[scale.value().unwrap()], shape)),
    ];
    let named = tensors.map(|(part, tensor)| (format!("{Q}.weight{part}"), tensor));
    stored::write(folder.path(), &named.into());
    let config = json!({"dtype": "float32", "quantization_config": claim});
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

/// vLLM decodes layers that it fuses with one scale. The base model's magnitudes are up to 1, the merged ones
/// above 2.
#[rstest]
#[case::room(4.0, true)]
#[case::no_room(1.0, false)]
fn the_scale_of_an_nvfp4_tensor_stays_if_it_fits(
    #[case] max: f32,
    #[case] fits: bool,
    #[values(true, false)] divides: bool,
) {
    let scale = match nvfp4_global_scale(max) {
        scale if divides => TensorScale::Divides(scale),
        scale => TensorScale::Multiplies(1.0 / scale),
    };
    let base = nvfp4_base(scale);
    let source = Checkpoint::open(base.path()).unwrap();
    let (_out, merged) = merged(&source);
    let weight = format!("{Q}.weight");
    let values = expected(&source.load_quantized(&weight).unwrap());
    let largest = values
        .iter()
        .fold(0.0f32, |max, value| max.max(value.abs()));
    assert!((2.0..4.0).contains(&largest), "{largest}");

    let merged = merged.load_quantized(&weight).unwrap();
    let Absmax::Coded(scales) = merged.absmax() else {
        panic!("NVFP4 has coded scales");
    };
    assert_eq!(
        scales.tensor_scale == scale,
        fits,
        "{:?}",
        scales.tensor_scale
    );
    // Levels are at most a third of the largest one apart, scales an eighth.
    for (ours, value) in merged.dequantize::<f32>().iter().zip(values) {
        assert!((ours - value).abs() < largest / 4.0, "{ours} for {value}");
    }
}
