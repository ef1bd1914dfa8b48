//! Stacks of packed matrices, taken apart.
#![cfg(all(feature = "checkpoint", feature = "flex"))]

mod blocks;
mod stored;

use blocks::{dequantized, tensors};
use burn::module::Module;
use burn::tensor::Device;
use burn_nf4::checkpoint::{Checkpoint, CheckpointStore, Dtype};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig, QuantType};
use burn_store::ModuleStore;
use rstest::rstest;
use std::sync::Arc;
use stored::{Stored, Tensors, floats};

const STACK: &str = r"^(.*\.experts)\.gate_up_proj$";
const PARTS: [&str; 2] = ["$1.{}.gate_proj.weight", "$1.{}.up_proj.weight"];

fn store(tensors: &Tensors) -> CheckpointStore {
    let folder = tempfile::tempdir().unwrap();
    stored::write(folder.path(), tensors);
    CheckpointStore::new(Arc::new(Checkpoint::read(folder.path()).unwrap()))
}

/// The values of each tensor of a store, which is a packed weight of a shape.
fn values(
    store: &mut CheckpointStore,
    quant_type: QuantType,
    shape: [usize; 2],
) -> Vec<(String, Vec<f32>)> {
    let tensors = store.get_all_tensors().unwrap();
    let value = |(name, tensor): (&String, &burn_store::burn_pack::Tensor)| {
        let data = tensor.to_bytes().unwrap();
        let words: Vec<u32> = data
            .chunks(4)
            .map(|w| u32::from_le_bytes(w.try_into().unwrap()))
            .collect();
        let config = QuantConfig::of(quant_type);
        let weight = BlockTensor::from_packed(&words, &shape, config, FloatType::BF16).unwrap();
        let (path, _) = name.rsplit_once('.').unwrap();
        (path.to_string(), weight.dequantize())
    };
    tensors.iter().map(value).collect()
}

/// Some rows of a matrix of 128 columns.
fn rows(values: &[f32], rows: impl Iterator<Item = usize>) -> Vec<f32> {
    rows.flat_map(|row| values[row * 128..(row + 1) * 128].to_vec())
        .collect()
}

/// Catches rows of another matrix, and scales of other rows.
#[rstest]
fn experts_of_gpt_oss_are_matrices(#[values(true, false)] interleaved: bool) {
    let tensors = tensors("mxfp4_gpt_oss", "model.experts.");
    let store = store(&tensors);
    let mut store = match interleaved {
        true => store.unstack_interleaved(STACK, &PARTS),
        false => store.unstack(STACK, &PARTS),
    }
    .unwrap();
    let found = values(&mut store, QuantType::Mxfp4, [12, 128]);
    let all = dequantized("mxfp4_gpt_oss");
    let mut expected = Vec::new();
    for expert in 0..3 {
        let first = expert * 24;
        let [gate, up] = match interleaved {
            true => [0, 1].map(|odd| rows(&all, (0..12).map(|row| first + 2 * row + odd))),
            false => [0, 12].map(|half| rows(&all, first + half..first + half + 12)),
        };
        expected.push((format!("model.experts.{expert}.gate_proj.weight"), gate));
        expected.push((format!("model.experts.{expert}.up_proj.weight"), up));
    }
    assert_eq!(found, expected);
}

/// Parts of floats take turns too, such as biases that are stacked as matrices.
#[test]
fn floats_are_taken_apart_by_turns() {
    let values: Vec<f32> = (0..24).map(|value| value as f32).collect();
    let key = "model.experts.gate_up_proj".to_string();
    let tensors = Tensors::from([(key, floats(&values, &[2, 4, 3]))]);
    let mut store = store(&tensors).unstack_interleaved(STACK, &PARTS).unwrap();
    let tensors = store.get_all_tensors().unwrap();
    let of = |name: &str| -> Vec<f32> {
        let bytes = tensors[name].to_bytes().unwrap();
        bytes
            .chunks(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    };
    assert_eq!(
        of("model.experts.0.gate_proj.weight"),
        [0., 1., 2., 6., 7., 8.]
    );
    assert_eq!(
        of("model.experts.1.up_proj.weight"),
        [15., 16., 17., 21., 22., 23.]
    );
}

/// A stack of FP8 with random codes and scales.
fn fp8(shape: [usize; 3], scales: &[usize], key: &str) -> Tensors {
    let elems: usize = shape.iter().product();
    let codes = Stored {
        dtype: Dtype::F8_E4M3,
        shape: shape.to_vec(),
        bytes: (0..elems).map(|i| (i * 37 % 251 % 0x7f) as u8).collect(),
    };
    let count: usize = scales.iter().product();
    let values: Vec<f32> = (0..count).map(|i| 0.5 + i as f32).collect();
    Tensors::from([
        ("experts.gate_up_proj".into(), codes),
        (
            format!("experts.gate_up_proj_{key}"),
            floats(&values, scales),
        ),
    ])
}

#[rstest]
#[case::rows([2, 4, 128], &[2, 4, 1], "scale", QuantType::Fp8Channel)]
#[case::tiles([2, 256, 128], &[2, 2, 1], "scale_inv", QuantType::Fp8Block)]
fn stacks_of_fp8_are_taken_apart(
    #[case] shape: [usize; 3],
    #[case] scales: &[usize],
    #[case] key: &str,
    #[case] quant_type: QuantType,
) {
    let tensors = fp8(shape, scales, key);
    let whole = store(&tensors);
    let all = whole
        .checkpoint()
        .load_quantized("experts.gate_up_proj")
        .unwrap();
    assert_eq!(all.quant_type(), quant_type);
    let all: Vec<f32> = all.dequantize();
    let mut store = whole.unstack(r"^(experts)\.gate_up_proj$", &PARTS).unwrap();
    let half = shape[1] / 2;
    let found = values(&mut store, quant_type, [half, 128]);
    let expected = (0..4).map(|part| rows(&all, part * half..(part + 1) * half));
    assert_eq!(
        found
            .into_iter()
            .map(|(_, values)| values)
            .collect::<Vec<_>>(),
        expected.collect::<Vec<_>>()
    );
}

/// Tiles are not cut.
#[rstest]
#[case::turns(256, true)]
#[case::half_a_tile(128, false)]
fn stacks_whose_parts_are_not_blocks_stay_whole(#[case] rows: usize, #[case] interleaved: bool) {
    let tensors = fp8([2, rows, 128], &[2, rows / 128, 1], "scale_inv");
    let store = store(&tensors);
    let pattern = r"^(experts)\.gate_up_proj$";
    let mut store = match interleaved {
        true => store.unstack_interleaved(pattern, &PARTS),
        false => store.unstack(pattern, &PARTS),
    }
    .unwrap();
    let keys = store.keys().unwrap();
    assert_eq!(keys.len(), 1);
    assert!(keys[0].starts_with("experts.gate_up_proj."), "{keys:?}");
}

/// A module is loaded from parts of a stack.
#[test]
fn a_module_takes_a_part() {
    use burn_nf4::nn::{QuantLinear, QuantLinearConfig};
    use burn_store::ModuleSnapshot;

    #[derive(Module, Debug)]
    struct Model {
        experts: Vec<Expert>,
    }

    #[derive(Module, Debug)]
    struct Expert {
        gate_proj: QuantLinear,
    }

    let device = Device::flex();
    let config = QuantLinearConfig::new(128, 12)
        .with_bias(false)
        .with_quant_type(QuantType::Mxfp4)
        .with_block_size(32)
        .with_double_quant(false)
        .with_dtype(FloatType::BF16);
    let expert = |_| Expert {
        gate_proj: config.init(&device).unwrap(),
    };
    let mut model = Model {
        experts: (0..3).map(expert).collect(),
    };
    let mut store = store(&tensors("mxfp4_gpt_oss", "experts."))
        .unstack_interleaved(r"^(experts)\.gate_up_proj$", &PARTS)
        .unwrap()
        .allow_unexpected(true);
    model.load_from(&mut store).unwrap();
    let all = dequantized("mxfp4_gpt_oss");
    for (number, expert) in model.experts.iter().enumerate() {
        let weight = expert.gate_proj.weight.to_host().unwrap();
        let even = rows(&all, (0..12).map(|row| number * 24 + 2 * row));
        assert_eq!(weight.dequantize::<f32>(), even);
    }
}
