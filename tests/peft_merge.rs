//! Adapters merged into 16 bit and into 4 bit, against the formula in f64, and what is refused.
#![cfg(feature = "peft")]

mod tensors;

#[path = "peft_merge/ties.rs"]
mod ties;

#[path = "peft_merge/missing.rs"]
mod missing;

use std::fs;
use std::path::{Path, PathBuf};

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{
    Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_BYTES, DequantizeOptions, Dtype,
    dequantize_checkpoint,
};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig, QuantType};
use burn_nf4::peft::{
    Adapter, DenseTensor, LoraBias, LoraConfig, LoraModule, MergeOptions, Merged, TargetModules,
    merge_4bit, merge_16bit,
};
use half::{bf16, f16};
use rstest::rstest;
use tempfile::TempDir;
use tensors::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/hf")
        .join(name)
}

fn final_adapter() -> Adapter {
    Adapter::open(fixture("f32/adapter_final")).expect("PEFT wrote it")
}

fn folder() -> TempDir {
    TempDir::new().expect("a folder")
}

/// A float tensor of a checkpoint, widened.
fn stored(checkpoint: &Checkpoint, key: &str) -> Vec<f64> {
    let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
    match checkpoint.tensor_info(key).expect("it is there").dtype {
        Dtype::F32 => wide(checkpoint.load_float::<f32>(key).expect("f32").0),
        Dtype::F16 => {
            let values = checkpoint.load_float::<f16>(key).expect("f16").0;
            wide(values.into_iter().map(f16::to_f32).collect())
        }
        _ => {
            let values = checkpoint.load_float::<bf16>(key).expect("bf16").0;
            wide(values.into_iter().map(bf16::to_f32).collect())
        }
    }
}

/// The values of a quantized weight in the dtype that it had.
fn decoded(weight: &BlockTensor) -> Vec<f64> {
    let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
    match weight.dtype() {
        FloatType::F32 => wide(weight.dequantize::<f32>()),
        FloatType::F16 => wide(
            weight
                .dequantize::<f16>()
                .into_iter()
                .map(f16::to_f32)
                .collect(),
        ),
        FloatType::BF16 => wide(
            weight
                .dequantize::<bf16>()
                .into_iter()
                .map(bf16::to_f32)
                .collect(),
        ),
    }
}

/// `W + s B A` in f64, and with a magnitude each row brought to that length.
fn merged(weight: &[f64], module: &LoraModule, scale: f64) -> Vec<f64> {
    let wide =
        |tensor: &DenseTensor| -> Vec<f64> { tensor.to_f32().into_iter().map(f64::from).collect() };
    let [_, d_input] = module.dims();
    let rank = module.rank();
    let (a, b) = (wide(&module.lora_a), wide(&module.lora_b));
    let magnitude = module.magnitude.as_ref().map(wide);
    let rows = weight.chunks(d_input).enumerate();
    rows.flat_map(|(row, weight)| {
        let branch = |column: usize| -> f64 {
            (0..rank)
                .map(|r| b[row * rank + r] * a[r * d_input + column])
                .sum()
        };
        let sum: Vec<f64> = weight
            .iter()
            .enumerate()
            .map(|(column, w)| w + scale * branch(column))
            .collect();
        let factor = magnitude.as_ref().map_or(1.0, |magnitude| {
            magnitude[row] / sum.iter().map(|w| w * w).sum::<f64>().sqrt()
        });
        sum.into_iter().map(|w| w * factor).collect::<Vec<f64>>()
    })
    .collect()
}

/// Each value within half an ulp of the dtype, and the rounding of at most 16 sums in f32 of
/// values up to `largest`.
fn bounded(values: &[f64], dtype: FloatType) -> Vec<(f64, f64)> {
    let half_ulp = match dtype {
        FloatType::F32 => 2f64.powi(-24),
        FloatType::F16 => 2f64.powi(-11),
        FloatType::BF16 => 2f64.powi(-8),
    };
    let largest = values.iter().fold(0f64, |max, v| max.max(v.abs()));
    let sums = 16.0 * 2f64.powi(-24) * largest;
    // Below the normal numbers of f16 the spacing stays 2^-24.
    values
        .iter()
        .map(|v| (*v, v.abs() * half_ulp + sums + 2f64.powi(-25)))
        .collect()
}

#[rstest]
fn a_16_bit_merge_is_the_decoded_weight_plus_the_scaled_branch(
    #[values("f32/model", "f32_sharded/model", "bf16/model")] base: &str,
    #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] dtype: FloatType,
) {
    let base = Checkpoint::open(fixture(base)).expect("transformers wrote it");
    let adapter = final_adapter();
    let (out, dense) = (folder(), folder());
    let options = MergeOptions::default();
    let mut seen = Vec::new();
    let result = merge_16bit(
        &base,
        &adapter,
        out.path(),
        Some(dtype),
        &options,
        |progress| {
            seen.push((progress.parameter.to_string(), progress.parameters_done));
        },
    )
    .expect("it fits");
    let parameters = base.parameters();
    let expected: Vec<(String, usize)> = parameters
        .iter()
        .zip(1..)
        .map(|(name, done)| (name.to_string(), done))
        .collect();
    assert_eq!(seen, expected);
    assert_eq!((result.modules.len(), result.replaced), (14, 0));
    assert_eq!(result.kept, parameters.len() - 14);

    // All but the adapted weights is what it is without an adapter.
    let options = DequantizeOptions {
        dtype: Some(dtype),
        ..DequantizeOptions::default()
    };
    dequantize_checkpoint(&base, dense.path(), &options, |_| {}).expect("it is valid");
    let config = |folder: &TempDir| fs::read(folder.path().join("config.json")).expect("there");
    assert!(config(&out) == config(&dense));
    let open = |folder: &TempDir| Checkpoint::open(folder.path()).expect("it is valid");
    let (out, dense) = (open(&out), open(&dense));
    assert!(out.keys().eq(dense.keys()));
    for key in out.keys() {
        let Some(module) = key
            .strip_suffix(".weight")
            .and_then(|path| adapter.module(path))
        else {
            assert_eq!(out.tensor_bytes(key), dense.tensor_bytes(key), "{key}");
            continue;
        };
        let weight = decoded(&base.load_quantized(key).expect("it is quantized"));
        let expected = merged(&weight, module, 2.0);
        assert_close(&stored(&out, key), &bounded(&expected, dtype), key);
    }
}

/// The parts of a sum of squares that a report speaks of.
fn rms(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
}

#[rstest]
fn a_4_bit_merge_states_what_it_lost(#[values("f32/model", "bf16/model")] name: &str) {
    let base = Checkpoint::open(fixture(name)).expect("transformers wrote it");
    let adapter = final_adapter();
    let out = folder();
    let Merged { modules, loss, .. } = merge_4bit(
        &base,
        &adapter,
        out.path(),
        &MergeOptions::default(),
        |_| {},
    )
    .expect("it fits");
    let config = |folder: &Path| fs::read(folder.join("config.json")).expect("it is there");
    assert!(config(out.path()) == config(base.path()));
    let out = Checkpoint::open(out.path()).expect("it is valid");
    assert!(out.keys().eq(base.keys()));

    let mut all = [Vec::new(), Vec::new(), Vec::new()];
    for key in base.parameters() {
        let Some(module) = key
            .strip_suffix(".weight")
            .and_then(|path| adapter.module(path))
        else {
            assert_eq!(out.tensor_bytes(key), base.tensor_bytes(key), "{key}");
            continue;
        };
        let (old, new) = (
            base.load_quantized(key).expect("quantized"),
            out.load_quantized(key).expect("quantized"),
        );
        assert_eq!((new.config(), new.dtype()), (old.config(), old.dtype()));
        assert_eq!(out.tensor_info(key), base.tensor_info(key));
        let old = decoded(&old);
        let exact = merged(&old, module, 2.0);
        let error: Vec<f64> = decoded(&new)
            .iter()
            .zip(&exact)
            .map(|(new, exact)| new - exact)
            .collect();
        let update: Vec<f64> = old
            .iter()
            .zip(&exact)
            .map(|(old, exact)| exact - old)
            .collect();

        let loss = modules[key.strip_suffix(".weight").expect("a weight")];
        let norm = rms(exact.iter().copied());
        // The merged weights are rounded to f32 before they are compared: the parts are known to
        // about 2^-24 of the weights, they themselves are 2^-4 of them and more.
        let same = |got: f64, part: f64| (got / (part / norm) - 1.0).abs() < 1e-5;
        assert!(
            same(loss.relative_rms, rms(error.iter().copied())),
            "{key}: {loss:?}"
        );
        assert!(
            same(loss.relative_update, rms(update.iter().copied())),
            "{key}: {loss:?}"
        );
        let max_abs = error.iter().fold(0f64, |max, error| max.max(error.abs()));
        assert!(
            (f64::from(loss.max_abs) / max_abs - 1.0).abs() < 1e-5,
            "{key}: {loss:?}"
        );
        // NF4 with blocks of 64 loses about 9 % of normally distributed weights; less here, as
        // most of what the base adds up to lies on the codes already.
        assert!((0.03..0.12).contains(&loss.relative_rms), "{key}: {loss:?}");
        for (all, part) in all.iter_mut().zip([exact, error, update]) {
            all.extend(part);
        }
    }
    let [exact, error, update] = all.map(|part| rms(part.into_iter()));
    assert!(
        (loss.relative_rms / (error / exact) - 1.0).abs() < 1e-5,
        "{loss:?}"
    );
    assert!(
        (loss.relative_update / (update / exact) - 1.0).abs() < 1e-5,
        "{loss:?}"
    );
    let max_abs = modules
        .values()
        .fold(0f32, |max, module| max.max(module.max_abs));
    assert_eq!(loss.max_abs, max_abs);
}

const D_OUTPUT: usize = 32;
const D_INPUT: usize = 96;
const RANK: usize = 4;

fn lora(magnitude: bool) -> LoraModule {
    let dense = |shape: &[usize], seed, offset: f32| {
        let values = uniform(shape.iter().product(), seed);
        let values: Vec<f32> = values.iter().map(|v| v + offset).collect();
        DenseTensor::from_f32(&values, shape, FloatType::F32).expect("it fits")
    };
    LoraModule {
        lora_a: dense(&[RANK, D_INPUT], 1, 0.0),
        lora_b: dense(&[D_OUTPUT, RANK], 2, 0.0),
        magnitude: magnitude.then(|| dense(&[D_OUTPUT], 3, 2.0)),
        bias: None,
    }
}

fn q_config() -> LoraConfig {
    LoraConfig {
        r: RANK,
        lora_alpha: 3.0,
        ..LoraConfig::new(TargetModules::list(["q"]))
    }
}

/// An adapter of the module `q` of 32x96.
fn q_adapter(config: LoraConfig) -> Adapter {
    let module = lora(config.use_dora);
    let mut adapter = Adapter::new(config).expect("valid");
    adapter.insert("q", module).expect("it fits");
    adapter
}

const SCALE: f64 = 3.0 / RANK as f64;

/// A checkpoint in a folder that lives as long as it.
fn checkpoint(write: impl FnOnce(&mut CheckpointWriter)) -> (TempDir, Checkpoint) {
    let folder = folder();
    let mut writer =
        CheckpointWriter::create(folder.path(), DEFAULT_MAX_SHARD_BYTES).expect("empty");
    write(&mut writer);
    writer.finish().expect("it can be written");
    let checkpoint = Checkpoint::open(folder.path()).expect("it is valid");
    (folder, checkpoint)
}

fn write_dense(writer: &mut CheckpointWriter, key: &str, shape: &[usize], values: &[f32]) {
    let bytes = bytes(values, FloatType::F32);
    writer
        .write_tensor(key, Dtype::F32, shape, &bytes)
        .expect("it fits");
}

fn weight() -> Vec<f32> {
    uniform(D_OUTPUT * D_INPUT, 11)
}

fn merge_f32(base: &Checkpoint, adapter: &Adapter) -> Result<Vec<f64>, Nf4Error> {
    let out = folder();
    merge_16bit(
        base,
        adapter,
        out.path(),
        None,
        &MergeOptions::default(),
        |_| {},
    )?;
    Ok(stored(&Checkpoint::open(out.path())?, "q.weight"))
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

fn turned<T: Copy>(values: &[T], rows: usize) -> Vec<T> {
    let columns = values.len() / rows;
    let index = (0..columns).flat_map(|column| (0..rows).map(move |row| row * columns + column));
    index.map(|index| values[index]).collect()
}

#[rstest]
fn a_dense_base_is_merged_too(#[values(false, true)] use_dora: bool) {
    let (_folder, base) =
        checkpoint(|writer| write_dense(writer, "q.weight", &[D_OUTPUT, D_INPUT], &weight()));
    let adapter = q_adapter(LoraConfig {
        use_dora,
        ..q_config()
    });
    let expected = merged(&wide(&weight()), &lora(use_dora), SCALE);
    let got = merge_f32(&base, &adapter).expect("it fits");
    assert_close(&got, &bounded(&expected, FloatType::F32), "q.weight");

    // In its own form a dense weight stays dense.
    let out = folder();
    merge_4bit(
        &base,
        &adapter,
        out.path(),
        &MergeOptions::default(),
        |_| {},
    )
    .expect("it fits");
    let out = Checkpoint::open(out.path()).expect("it is valid");
    assert_eq!(stored(&out, "q.weight"), got);
}

#[rstest]
fn fan_in_fan_out_means_a_base_stored_the_other_way_round(#[values(false, true)] use_dora: bool) {
    let (_folder, base) = checkpoint(|writer| {
        write_dense(
            writer,
            "q.weight",
            &[D_INPUT, D_OUTPUT],
            &turned(&weight(), D_OUTPUT),
        );
    });
    let adapter = q_adapter(LoraConfig {
        fan_in_fan_out: true,
        use_dora,
        ..q_config()
    });
    let expected = turned(&merged(&wide(&weight()), &lora(use_dora), SCALE), D_OUTPUT);
    let got = merge_f32(&base, &adapter).expect("it fits");
    assert_close(&got, &bounded(&expected, FloatType::F32), "q.weight");

    let plain = q_adapter(q_config());
    assert_eq!(
        merge_f32(&base, &plain),
        Err(Nf4Error::Shape {
            tensor: "q.weight".into(),
            expected: vec![D_OUTPUT, D_INPUT],
            given: vec![D_INPUT, D_OUTPUT],
        })
    );
}

#[rstest]
fn a_weight_stored_transposed_is_merged_as_the_model_has_it(
    #[values(QuantType::Nf4, QuantType::Fp4)] quant_type: QuantType,
) {
    let quant = config(quant_type, 128, false);
    let host = BlockTensor::quantize(&turned(&weight(), D_OUTPUT), &[D_INPUT, D_OUTPUT], quant)
        .expect("valid");
    let (_folder, base) = checkpoint(|writer| {
        writer
            .write_nf4("q.weight", &host, Dtype::F32, true)
            .expect("it fits");
    });
    let exact = merged(&turned(&decoded(&host), D_INPUT), &lora(false), SCALE);
    let got = merge_f32(&base, &q_adapter(q_config())).expect("it fits");
    assert_close(&got, &bounded(&exact, FloatType::F32), "q.weight");

    let out = folder();
    merge_4bit(
        &base,
        &q_adapter(q_config()),
        out.path(),
        &MergeOptions::default(),
        |_| {},
    )
    .expect("it fits");
    let out = Checkpoint::open(out.path()).expect("it is valid");
    assert_eq!(out.is_transposed("q.weight"), Ok(true));
    assert_eq!(out.tensor_info("q.weight"), base.tensor_info("q.weight"));
    let exact: Vec<f32> = turned(&got, D_OUTPUT).iter().map(|v| *v as f32).collect();
    let expected = BlockTensor::quantize(&exact, &[D_INPUT, D_OUTPUT], quant).expect("valid");
    assert_eq!(out.load_quantized("q.weight"), Ok(expected));
}

#[test]
fn an_adapted_fp16_weight_is_quantized_again_from_fp16() {
    let half: Vec<f16> = weight().iter().map(|v| f16::from_f32(*v)).collect();
    let quant = QuantConfig::default();
    let host = BlockTensor::quantize(&half, &[D_OUTPUT, D_INPUT], quant).expect("valid");
    let (_folder, base) = checkpoint(|writer| {
        writer
            .write_nf4("q.weight", &host, Dtype::U8, false)
            .expect("it fits");
    });
    let (out, dense) = (folder(), folder());
    let (adapter, options) = (q_adapter(q_config()), MergeOptions::default());
    merge_4bit(&base, &adapter, out.path(), &options, |_| {}).expect("it fits");
    merge_16bit(&base, &adapter, dense.path(), None, &options, |_| {}).expect("it fits");
    let dense = Checkpoint::open(dense.path()).expect("it is valid");
    let (values, shape) = dense.load_float::<f16>("q.weight").expect("its own dtype");
    let expected = BlockTensor::quantize(&values, &shape, quant).expect("valid");
    let out = Checkpoint::open(out.path()).expect("it is valid");
    assert_eq!(out.load_quantized("q.weight"), Ok(expected));
}

#[test]
fn whole_modules_and_biases_take_the_place_of_the_bases() {
    let mut adapter = q_adapter(LoraConfig {
        bias: LoraBias::All,
        modules_to_save: Some(vec!["norm".into()]),
        ..q_config()
    });
    let tensor = |value: f32, len: usize, dtype| {
        DenseTensor::from_f32(&vec![value; len], &[len], dtype).expect("it fits")
    };
    let bias = tensor(1.0, D_OUTPUT, FloatType::F32);
    let module = LoraModule {
        bias: Some(bias),
        ..lora(false)
    };
    adapter.insert("q", module).expect("it fits");
    adapter
        .insert_full("norm.weight", tensor(2.0, 3, FloatType::F16))
        .expect("asked for");
    adapter
        .insert_full("k.bias", tensor(3.0, 2, FloatType::F32))
        .expect("asked for");
    let (_folder, base) = checkpoint(|writer| {
        write_dense(writer, "q.weight", &[D_OUTPUT, D_INPUT], &weight());
        write_dense(writer, "q.bias", &[D_OUTPUT], &[0.0; D_OUTPUT]);
        write_dense(writer, "norm.weight", &[3], &[0.0; 3]);
        write_dense(writer, "k.bias", &[2], &[0.0; 2]);
        write_dense(writer, "v.bias", &[2], &[0.5; 2]);
        let integers = [7u8; 16];
        writer
            .write_tensor("position_ids", Dtype::I64, &[2], &integers)
            .expect("it fits");
    });
    for dtype in [Some(FloatType::BF16), None] {
        let out = folder();
        let options = MergeOptions::default();
        let result = match dtype {
            None => merge_4bit(&base, &adapter, out.path(), &options, |_| {}),
            Some(_) => merge_16bit(&base, &adapter, out.path(), dtype, &options, |_| {}),
        }
        .expect("it fits");
        assert_eq!(
            (result.modules.len(), result.replaced, result.kept),
            (1, 3, 2)
        );
        let out = Checkpoint::open(out.path()).expect("it is valid");
        assert_eq!(stored(&out, "q.bias"), [1.0; D_OUTPUT]);
        assert_eq!(stored(&out, "norm.weight"), [2.0; 3]);
        assert_eq!(stored(&out, "k.bias"), [3.0; 2]);
        assert_eq!(stored(&out, "v.bias"), [0.5; 2]);
        let expected = if dtype.is_some() {
            Dtype::BF16
        } else {
            Dtype::F32
        };
        for key in ["q.bias", "norm.weight", "v.bias", "q.weight"] {
            assert_eq!(
                out.tensor_info(key).expect("it is there").dtype,
                expected,
                "{key}"
            );
        }
        assert_eq!(
            out.tensor_bytes("position_ids"),
            base.tensor_bytes("position_ids")
        );
    }

    let (_folder, base) = checkpoint(|writer| {
        write_dense(writer, "q.weight", &[D_OUTPUT, D_INPUT], &weight());
        write_dense(writer, "norm.weight", &[3], &[0.0; 3]);
    });
    assert_eq!(
        merge_f32(&base, &adapter),
        Err(Nf4Error::BaseLacks {
            missing: vec!["k.bias".into(), "q.bias".into()]
        })
    );
}

#[rstest]
fn a_merged_weight_too_large_for_the_dtype_is_named() {
    let mut values = weight();
    values[5] = 65_600.0;
    let (_folder, base) =
        checkpoint(|writer| write_dense(writer, "q.weight", &[D_OUTPUT, D_INPUT], &values));
    let adapter = q_adapter(q_config());
    let out = folder();
    let path = out.path().join("merged");
    let options = MergeOptions::default();
    let merge = |dtype| merge_16bit(&base, &adapter, &path, Some(dtype), &options, |_| {});
    let result = merge(FloatType::F16);
    assert!(
        matches!(&result, Err(Nf4Error::NonFinite { tensor, index: 5, .. }) if tensor == "q.weight"),
        "{result:?}"
    );
    assert!(!path.exists(), "nothing is left of a merge that failed");
    assert!(merge(FloatType::BF16).is_ok());
}

#[rstest]
#[case("q.weight", &[D_OUTPUT, D_INPUT])]
#[case("norm.weight", &[7])]
fn a_base_that_is_not_finite_is_named(#[case] bad: &str, #[case] shape: &[usize]) {
    let (_folder, base) = checkpoint(|writer| {
        let mut values = uniform(shape.iter().product(), 5);
        values[6] = f32::NAN;
        write_dense(writer, bad, shape, &values);
        if bad != "q.weight" {
            write_dense(writer, "q.weight", &[D_OUTPUT, D_INPUT], &weight());
        }
    });
    for in_4bit in [false, true] {
        let (out, options) = (folder(), MergeOptions::default());
        let adapter = q_adapter(q_config());
        let result = match in_4bit {
            false => merge_16bit(&base, &adapter, out.path(), None, &options, |_| {}),
            true => merge_4bit(&base, &adapter, out.path(), &options, |_| {}),
        };
        assert!(
            matches!(&result, Err(Nf4Error::NonFinite { tensor, index: 6, .. }) if tensor == bad),
            "{result:?}"
        );
    }
}

/// Models with `Conv1D` store `[in, out]`, but for their head; PEFT goes by the layer, and writes
/// whatever the last layer made of the setting.
#[rstest]
fn the_orientation_of_a_weight_is_that_of_the_model_not_of_the_setting(
    #[values(false, true)] fan_in_fan_out: bool,
    #[values(false, true)] has_conv1d: bool,
) {
    let of_layer = match has_conv1d {
        false => weight(),
        true => turned(&weight(), D_OUTPUT),
    };
    let shape = match has_conv1d {
        false => [D_OUTPUT, D_INPUT],
        true => [D_INPUT, D_OUTPUT],
    };
    let (_folder, base) = checkpoint(|writer| {
        write_dense(writer, "q.weight", &shape, &of_layer);
        write_dense(writer, "lm_head.weight", &[D_OUTPUT, D_INPUT], &weight());
        let table = uniform(D_OUTPUT * D_INPUT, 12);
        write_dense(writer, "wte.weight", &[D_OUTPUT, D_INPUT], &table);
        let model_type = if has_conv1d { "gpt2" } else { "llama" };
        let config = format!(r#"{{"model_type": "{model_type}"}}"#);
        writer
            .write_file("config.json", config.as_bytes())
            .expect("a free name");
    });
    let mut adapter = Adapter::new(LoraConfig {
        fan_in_fan_out,
        target_modules: TargetModules::list(["q", "lm_head"]),
        ..q_config()
    })
    .expect("valid");
    for path in ["q", "lm_head"] {
        adapter.insert(path, lora(false)).expect("it fits");
    }
    let (out, options) = (folder(), MergeOptions::default());
    merge_16bit(&base, &adapter, out.path(), None, &options, |_| {}).expect("it fits");
    let out = Checkpoint::open(out.path()).expect("it is valid");
    let expected = merged(&wide(&weight()), &lora(false), SCALE);
    let head = stored(&out, "lm_head.weight");
    assert_close(&head, &bounded(&expected, FloatType::F32), "lm_head.weight");
    let layer = match has_conv1d {
        false => stored(&out, "q.weight"),
        true => turned(&stored(&out, "q.weight"), D_INPUT),
    };
    assert_close(&layer, &bounded(&expected, FloatType::F32), "q.weight");
}

#[test]
fn dora_leaves_a_row_of_zeros_finite() {
    let mut values = weight();
    values[..D_INPUT].fill(0.0);
    let (_folder, base) =
        checkpoint(|writer| write_dense(writer, "q.weight", &[D_OUTPUT, D_INPUT], &values));
    let config = LoraConfig {
        use_dora: true,
        ..q_config()
    };
    let mut module = lora(true);
    let mut b = module.lora_b.to_f32();
    b[..RANK].fill(0.0);
    module.lora_b = DenseTensor::from_f32(&b, &[D_OUTPUT, RANK], FloatType::F32).expect("it fits");
    let mut adapter = Adapter::new(config).expect("valid");
    adapter.insert("q", module).expect("it fits");
    let got = merge_f32(&base, &adapter).expect("it is finite");
    assert_eq!(got[..D_INPUT], [0.0; D_INPUT]);
}
