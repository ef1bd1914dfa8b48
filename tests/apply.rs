//! Checkpoints applied to modules: real ones against direct loads of every tensor, and every way
//! in which a checkpoint and a module can differ.
#![cfg(feature = "checkpoint")]

mod stored;
mod tensors;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::tensor::{Bool, DType, Device, Int, Tensor};
use burn_nf4::checkpoint::{Checkpoint, CheckpointStore, Dtype};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig, QuantType};
use burn_nf4::nn::{QuantLinear, QuantLinearConfig};
use burn_nf4::{BlockWeight, Nf4Error, TensorMisfit};
use burn_store::{KeyRemapper, ModuleSnapshot, ModuleStore, bridge};
use rstest::rstest;
use stored::{Stored, Tensors};
use tempfile::TempDir;
use tensors::*;

#[derive(Module, Debug)]
struct Model {
    embed_tokens: Embedding,
    layers: Vec<Block>,
    norm: RmsNorm,
    lm_head: Linear,
}

#[derive(Module, Debug)]
struct Block {
    self_attn: Attention,
    mlp: Mlp,
    input_layernorm: RmsNorm,
    post_attention_layernorm: RmsNorm,
}

#[derive(Module, Debug)]
struct Attention {
    q_proj: QuantLinear,
    k_proj: QuantLinear,
    v_proj: QuantLinear,
    o_proj: QuantLinear,
}

#[derive(Module, Debug)]
struct Mlp {
    gate_proj: QuantLinear,
    up_proj: QuantLinear,
    down_proj: QuantLinear,
}

/// The model of `tests/fixtures/hf`.
fn llama(dtype: FloatType, device: &Device) -> Model {
    let linear = |d_input, d_output| {
        QuantLinearConfig::new(d_input, d_output)
            .with_bias(false)
            .with_dtype(dtype)
            .init(device)
            .unwrap()
    };
    let norm = || RmsNormConfig::new(128).init(device);
    let block = |_| Block {
        self_attn: Attention {
            q_proj: linear(128, 128),
            k_proj: linear(128, 64),
            v_proj: linear(128, 64),
            o_proj: linear(128, 128),
        },
        mlp: Mlp {
            gate_proj: linear(128, 352),
            up_proj: linear(128, 352),
            down_proj: linear(352, 128),
        },
        input_layernorm: norm(),
        post_attention_layernorm: norm(),
    };
    Model {
        embed_tokens: EmbeddingConfig::new(256, 128).init(device),
        layers: (0..2).map(block).collect(),
        norm: norm(),
        lm_head: LinearConfig::new(128, 256).with_bias(false).init(device),
    }
}

fn hf(name: &str) -> PathBuf {
    PathBuf::from("tests/fixtures/hf").join(name).join("model")
}

fn store(path: &Path) -> CheckpointStore {
    CheckpointStore::open(path)
        .unwrap()
        .with_key_remapping(r"^model\.", "")
        .unwrap()
}

#[rstest]
#[case::f32("f32", FloatType::F32)]
#[case::bf16("bf16", FloatType::BF16)]
#[case::sharded("f32_sharded", FloatType::F32)]
fn every_tensor_of_a_real_model_lands_in_its_place(#[case] name: &str, #[case] dtype: FloatType) {
    let device = Device::default();
    let mut model = llama(dtype, &device);
    let result = model.load_from(&mut store(&hf(name))).unwrap();
    assert_eq!(result.applied.len(), 21, "{result}");
    assert!(
        result.missing.is_empty() && result.unused.is_empty(),
        "{result}"
    );

    let checkpoint = Checkpoint::open(hf(name)).unwrap();
    let dense = |key: &str| -> Tensor<2> { checkpoint.load_tensor(key, None, &device).unwrap() };
    let vector = |key: &str| -> Tensor<1> { checkpoint.load_tensor(key, None, &device).unwrap() };
    let same = |got: Tensor<1>, expected: Tensor<1>, key: &str| {
        assert_same_bits(&bits(got, dtype), &bits(expected, dtype), key);
    };
    same(
        model.embed_tokens.weight.val().flatten(0, 1),
        dense("model.embed_tokens.weight").flatten(0, 1),
        "embed_tokens",
    );
    assert_eq!(model.lm_head.weight.dims(), [128, 256]);
    same(
        model.lm_head.weight.val().transpose().flatten(0, 1),
        dense("lm_head.weight").flatten(0, 1),
        "lm_head",
    );
    same(model.norm.gamma.val(), vector("model.norm.weight"), "norm");
    for (i, layer) in model.layers.iter().enumerate() {
        let key = |rest: &str| format!("model.layers.{i}.{rest}.weight");
        for (norm, name) in [
            (&layer.input_layernorm, "input_layernorm"),
            (&layer.post_attention_layernorm, "post_attention_layernorm"),
        ] {
            same(norm.gamma.val(), vector(&key(name)), name);
        }
        for (linear, name) in [
            (&layer.self_attn.q_proj, "self_attn.q_proj"),
            (&layer.self_attn.k_proj, "self_attn.k_proj"),
            (&layer.self_attn.v_proj, "self_attn.v_proj"),
            (&layer.self_attn.o_proj, "self_attn.o_proj"),
            (&layer.mlp.gate_proj, "mlp.gate_proj"),
            (&layer.mlp.up_proj, "mlp.up_proj"),
            (&layer.mlp.down_proj, "mlp.down_proj"),
        ] {
            let expected = checkpoint.load_quantized(&key(name)).unwrap();
            assert_eq!(linear.weight.to_host().unwrap(), expected, "{name}");
        }
    }
}

#[test]
fn dense_tensors_are_converted_when_asked() {
    let device = Device::default();
    let mut model = llama(FloatType::BF16, &device);
    let mut store = store(&hf("bf16")).with_dtype(FloatType::F32);
    model.load_from(&mut store).unwrap();
    let checkpoint = Checkpoint::open(hf("bf16")).unwrap();
    let expected: Tensor<2> = checkpoint
        .load_tensor("lm_head.weight", Some(FloatType::F32), &device)
        .unwrap();
    let got = model.lm_head.weight.val();
    assert_eq!(got.dtype(), DType::F32);
    assert_eq!(values(&got.transpose()), values(&expected));
    assert_eq!(model.norm.gamma.val().dtype(), DType::F32);
    assert_eq!(
        model.layers[0].mlp.up_proj.weight.dtype(),
        FloatType::BF16,
        "what was quantized stays as it is"
    );
}

#[test]
fn progress_counts_every_parameter_and_byte() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let mut store = store(&hf("f32_sharded")).on_progress({
        let seen = seen.clone();
        move |progress| {
            seen.lock().unwrap().push((
                progress.parameter.to_string(),
                [progress.parameters_done, progress.parameters_total],
                [progress.bytes_done, progress.bytes_total],
            ));
        }
    });
    let device = Device::default();
    for _ in 0..2 {
        seen.lock().unwrap().clear();
        llama(FloatType::F32, &device)
            .load_from(&mut store)
            .unwrap();
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 21);
        let mut last = 0;
        for (i, (_, parameters, [done, total])) in seen.iter().enumerate() {
            assert_eq!(*parameters, [i + 1, 21]);
            assert!(last < *done && done <= total);
            last = *done;
        }
        let (_, _, [done, total]) = &seen[20];
        assert_eq!(done, total);
        let mut keys: Vec<&str> = seen.iter().map(|(key, ..)| key.as_str()).collect();
        keys.sort_unstable();
        assert_eq!(keys, store.checkpoint().parameters());
    }
}

/// Every kind of parameter, for files that a test writes.
#[derive(Module, Debug)]
struct Small {
    embed: Embedding,
    norm: RmsNorm,
    frozen: QuantLinear,
    head: Linear,
    steps: Param<Tensor<1, Int>>,
    mask: Param<Tensor<1, Bool>>,
}

const SIZE: usize = 32;

fn small(device: &Device) -> Small {
    Small {
        embed: EmbeddingConfig::new(5, SIZE).init(device),
        norm: RmsNormConfig::new(SIZE).init(device),
        frozen: QuantLinearConfig::new(SIZE, 2 * SIZE).init(device).unwrap(),
        head: LinearConfig::new(SIZE, 5).init(device),
        steps: Param::initialized(Default::default(), Tensor::zeros([3], device)),
        mask: Param::initialized(
            Default::default(),
            Tensor::<1, Int>::zeros([4], device).bool(),
        ),
    }
}

fn quantized(shape: &[usize], config: QuantConfig) -> BlockTensor {
    BlockTensor::quantize(&uniform(shape.iter().product(), 3), shape, config).unwrap()
}

fn plain(dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Stored {
    Stored {
        dtype,
        shape: shape.to_vec(),
        bytes,
    }
}

fn random(shape: &[usize], seed: u64) -> Stored {
    stored::floats(&uniform(shape.iter().product(), seed), shape)
}

/// What [`small`] loads.
fn small_file() -> Tensors {
    let weight = quantized(&[2 * SIZE, SIZE], QuantConfig::default());
    let mut tensors = stored::weight("frozen.weight", &weight);
    let steps: Vec<u8> = [7i64, -8, 1 << 40]
        .iter()
        .flat_map(|step| step.to_le_bytes())
        .collect();
    tensors.extend(
        [
            ("embed.weight", random(&[5, SIZE], 1)),
            ("norm.weight", random(&[SIZE], 2)),
            ("frozen.bias", random(&[2 * SIZE], 4)),
            ("head.weight", random(&[5, SIZE], 5)),
            ("head.bias", random(&[5], 6)),
            ("steps", plain(Dtype::I64, &[3], steps)),
            ("mask", plain(Dtype::BOOL, &[4], vec![0, 1, 7, 0])),
        ]
        .map(|(key, tensor)| (key.to_string(), tensor)),
    );
    tensors
}

fn folder(tensors: &Tensors) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    stored::write(folder.path(), tensors);
    folder
}

/// Loads a file into [`small`], which must fail and leave it as it was.
#[track_caller]
fn misfits(tensors: &Tensors) -> Vec<TensorMisfit> {
    let folder = folder(tensors);
    let mut model = small(&Device::default());
    let before = model.head.weight.val();
    let mut store = CheckpointStore::open(folder.path()).unwrap();
    let error = model.load_from(&mut store).unwrap_err();
    assert_eq!(values(&model.head.weight.val()), values(&before));
    match error {
        Nf4Error::Misfit { path, tensors } => {
            assert_eq!(path, folder.path());
            tensors
        }
        other => panic!("{other}"),
    }
}

/// A single misfit, as it is told.
#[track_caller]
fn misfit(tensors: &Tensors) -> String {
    let misfits = misfits(tensors);
    assert_eq!(misfits.len(), 1, "{misfits:?}");
    misfits[0].to_string()
}

#[test]
fn every_kind_of_parameter_is_loaded() {
    let device = Device::default();
    let tensors = small_file();
    let folder = folder(&tensors);
    let mut model = small(&device);
    let mut store = CheckpointStore::open(folder.path()).unwrap();
    model.load_from(&mut store).unwrap();
    let steps: Vec<i64> = model.steps.val().into_data().iter::<i64>().collect();
    assert_eq!(steps, [7, -8, 1 << 40]);
    let mask: Vec<bool> = model.mask.val().into_data().iter::<bool>().collect();
    assert_eq!(mask, [false, true, true, false]);
    let checkpoint = store.checkpoint();
    let head: Tensor<2> = checkpoint
        .load_tensor("head.weight", None, &device)
        .unwrap();
    assert_eq!(values(&model.head.weight.val().transpose()), values(&head));
    let bias: Tensor<1> = checkpoint
        .load_tensor("frozen.bias", None, &device)
        .unwrap();
    assert_eq!(values(&model.frozen.bias.unwrap().val()), values(&bias));
    assert_eq!(
        model.frozen.weight.to_host().unwrap(),
        checkpoint.load_quantized("frozen.weight").unwrap()
    );
}

#[test]
fn everything_that_does_not_fit_is_listed_at_once() {
    let mut tensors = small_file();
    tensors.remove("norm.weight");
    tensors.remove("mask");
    tensors.insert("extra".into(), random(&[2, 3], 1));
    tensors.insert("embed.weight".into(), random(&[SIZE, 5], 1));
    tensors.extend(stored::weight(
        "lora.weight",
        &quantized(&[64], QuantConfig::flat()),
    ));
    let misfits = misfits(&tensors);
    let text: Vec<String> = misfits.iter().map(TensorMisfit::to_string).collect();
    assert_eq!(
        text,
        [
            "`embed.weight` is [32, 5] of F32, expected [5, 32] of F16, BF16, F32",
            "`extra` is unexpected, a [2, 3] of F32",
            "`lora.weight` is unexpected, a [64] of nf4 of float32 in blocks of 64",
            "`mask` is missing, expected [4] of BOOL",
            "`norm.gamma` is missing, expected [32] of F16, BF16, F32",
        ]
    );
    let error = Nf4Error::Misfit {
        path: "folder".into(),
        tensors: misfits,
    };
    let text = error.to_string();
    assert!(
        text.starts_with("folder: 5 tensors do not fit the module\n  `embed.weight` is"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 6);
}

#[rstest]
#[case::head_transposed("head.weight", random(&[SIZE, 5], 5),
    "`head.weight` is [32, 5] of F32, expected [5, 32] of F16, BF16, F32")]
#[case::rank("norm.weight", random(&[1, SIZE], 5),
    "`norm.weight` is [1, 32] of F32, expected [32] of F16, BF16, F32")]
#[case::ints_for_floats("head.bias", plain(Dtype::I32, &[5], vec![0; 20]),
    "`head.bias` is [5] of I32, expected [5] of F16, BF16, F32")]
#[case::no_burn_dtype("head.bias", plain(Dtype::F8_E4M3, &[5], vec![0; 5]),
    "`head.bias` is [5] of F8_E4M3, expected [5] of F16, BF16, F32")]
#[case::floats_for_ints("steps", random(&[3], 1),
    "`steps` is [3] of F32, expected [3] of I64, I32, I16, I8, U64, U32, U16, U8")]
#[case::ints_for_bools("mask", plain(Dtype::U8, &[4], vec![0; 4]),
    "`mask` is [4] of U8, expected [4] of BOOL")]
fn dense_mismatch(#[case] key: &str, #[case] tensor: Stored, #[case] expected: &str) {
    let mut tensors = small_file();
    tensors.insert(key.into(), tensor);
    assert_eq!(misfit(&tensors), expected);
}

fn block_128() -> QuantConfig {
    config(QuantType::Nf4, 128, true)
}

const WANTED: &str = "expected [64, 32] of nf4 of float32 in blocks of 64, scales in blocks of 256";

/// Each has another header, which would end the process inside of Burn's load.
#[rstest]
#[case::quant_type(&[64, 32], config(QuantType::Fp4, 64, true), false,
    "[64, 32] of fp4 of float32 in blocks of 64, scales in blocks of 256")]
#[case::block_size(&[64, 32], block_128(), false,
    "[64, 32] of nf4 of float32 in blocks of 128, scales in blocks of 256")]
#[case::flat(&[64, 32], QuantConfig::flat(), false,
    "[64, 32] of nf4 of float32 in blocks of 64")]
#[case::same_words(&[32, 64], QuantConfig::default(), false,
    "[32, 64] of nf4 of float32 in blocks of 64, scales in blocks of 256")]
#[case::rank(&[2, 32, 32], QuantConfig::default(), false,
    "[2, 32, 32] of nf4 of float32 in blocks of 64, scales in blocks of 256")]
#[case::transposed(&[32, 64], QuantConfig::default(), true,
    "[64, 32] of nf4 of float32 in blocks of 64, scales in blocks of 256, transposed")]
fn quantized_mismatch(
    #[case] shape: &[usize],
    #[case] config: QuantConfig,
    #[case] transposed: bool,
    #[case] given: &str,
) {
    let mut tensors = small_file();
    tensors.retain(|key, _| !key.starts_with("frozen.weight"));
    tensors.extend(stored::weight("frozen.weight", &quantized(shape, config)));
    if transposed {
        stored::transpose(&mut tensors, "frozen.weight");
    }
    assert_eq!(
        misfit(&tensors),
        format!("`frozen.weight` is {given}, {WANTED}")
    );
}

#[test]
fn dense_and_quantized_are_told_apart() {
    let mut tensors = small_file();
    tensors.retain(|key, _| !key.starts_with("frozen.weight"));
    tensors.insert("frozen.weight".into(), random(&[2 * SIZE, SIZE], 1));
    assert_eq!(
        misfit(&tensors),
        format!(
            "`frozen.weight` is [64, 32] of F32, {WANTED} (a dense tensor for a quantized weight)"
        )
    );

    let mut tensors = small_file();
    tensors.remove("head.weight");
    let head = quantized(&[5, SIZE], QuantConfig::default());
    tensors.extend(stored::weight("head.weight", &head));
    assert_eq!(
        misfit(&tensors),
        "`head.weight` is [5, 32] of nf4 of float32 in blocks of 64, scales in blocks of 256, \
         expected [5, 32] of F16, BF16, F32 (a quantized weight for a dense tensor)"
    );
}

#[test]
fn two_keys_of_one_path_are_not_both_loaded() {
    let mut tensors = small_file();
    tensors.insert("norm.gamma".into(), random(&[SIZE], 9));
    assert_eq!(
        misfit(&tensors),
        "`norm.weight` is unexpected, a [32] of F32"
    );
    let folder = folder(&small_file());
    let mut store = CheckpointStore::open(folder.path())
        .unwrap()
        .with_key_remapping("^head.bias$", "frozen.bias")
        .unwrap();
    for allow in [false, true] {
        store = store.allow_partial(allow);
        let error = small(&Device::default()).load_from(&mut store).unwrap_err();
        let expected = Nf4Error::SamePath {
            path: "frozen.bias".into(),
            first: "frozen.bias".into(),
            second: "head.bias".into(),
        };
        assert_eq!(error, expected);
    }
}

#[test]
fn partial_loads_leave_the_rest_as_it_was() {
    let device = Device::default();
    let mut tensors = small_file();
    tensors.remove("head.bias");
    tensors.insert("extra".into(), random(&[2], 1));
    let folder = folder(&tensors);
    let open = || CheckpointStore::open(folder.path()).unwrap();
    let mut model = small(&device);
    let bias = values(&model.head.bias.as_ref().unwrap().val());
    let result = model.load_from(&mut open().allow_partial(true)).unwrap();
    assert_eq!(result.unused, ["extra"]);
    let missing: Vec<&str> = result
        .missing
        .iter()
        .map(|(path, _)| path.as_str())
        .collect();
    assert_eq!(missing, ["head.bias"]);
    assert_eq!(values(&model.head.bias.as_ref().unwrap().val()), bias);

    let keys = |mut store: CheckpointStore| -> Vec<String> {
        match small(&device).load_from(&mut store) {
            Err(Nf4Error::Misfit { tensors, .. }) => {
                tensors.into_iter().map(|tensor| tensor.key).collect()
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(keys(open().allow_missing(true)), ["extra"]);
    assert_eq!(keys(open().allow_unexpected(true)), ["head.bias"]);
    assert_eq!(keys(open().ignore("^ext").unwrap()), ["head.bias"]);
    // What is left out is as if it was not there.
    let ignoring = open().ignore("x").unwrap().ignore(r"^frozen\.").unwrap();
    let expected = ["frozen.bias", "frozen.weight", "head.bias"];
    assert_eq!(keys(ignoring), expected);
    let error = open().ignore("(").unwrap_err().to_string();
    assert!(error.starts_with("`ignore`: pattern `(`: "), "{error}");

    // A mismatch is one all the same.
    tensors.insert("head.bias".into(), random(&[6], 1));
    stored::write(folder.path(), &tensors);
    assert_eq!(keys(open().allow_partial(true)), ["head.bias"]);
}

#[test]
fn stacks_are_read_as_the_matrices_that_they_are_made_of() {
    let folder = tempfile::tempdir().unwrap();
    let values: Vec<f32> = (0..24).map(|value| value as f32).collect();
    let stacks = Tensors::from([
        (
            "m.experts.up".to_string(),
            stored::floats(&values, &[2, 4, 3]),
        ),
        // Not three dimensions, and not rows for two parts.
        ("flat.experts.up".into(), stored::floats(&values, &[6, 4])),
        ("odd.experts.up".into(), stored::floats(&values, &[2, 3, 4])),
    ]);
    stored::write(folder.path(), &stacks);
    let store = CheckpointStore::open(folder.path()).unwrap();
    let parts = ["$1.{}.a.weight", "$1.{}.b.weight"];
    let mut store = store.unstack(r"^(.*\.experts)\.up$", &parts).unwrap();
    let expected = [
        "flat.experts.up",
        "m.experts.0.a.weight",
        "m.experts.0.b.weight",
        "m.experts.1.a.weight",
        "m.experts.1.b.weight",
        "odd.experts.up",
    ];
    assert_eq!(store.keys().unwrap(), expected);
    let tensor = store.get_tensor("m.experts.1.a.weight").unwrap().unwrap();
    let data = bridge::to_data(tensor).unwrap();
    assert_eq!(data.shape().to_vec(), [2, 3]);
    assert_eq!(data.iter::<f32>().collect::<Vec<_>>(), values[12..18]);

    let open = || CheckpointStore::open(folder.path()).unwrap();
    let error = open().unstack("(", &parts).unwrap_err().to_string();
    assert!(error.starts_with("`unstack`: pattern `(`: "), "{error}");
    assert!(open().unstack("a", &[]).is_err());
}

/// Two experts of three inputs, with two parts of two outputs each in turn, and their biases.
#[test]
fn stacks_of_transposed_matrices_are_read_as_tensors_of_their_own() {
    let values: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let folder = tempfile::tempdir().unwrap();
    let stacks = Tensors::from([
        (
            "experts.up".to_string(),
            stored::floats(&values, &[2, 3, 4]),
        ),
        (
            "experts.up_bias".into(),
            stored::floats(&values[..8], &[2, 4]),
        ),
        // Not an output for each of two parts.
        ("odd.up".into(), stored::floats(&values, &[2, 4, 3])),
    ]);
    stored::write(folder.path(), &stacks);
    let open = || {
        let store = CheckpointStore::open(folder.path()).unwrap();
        let weights = ["$1.{}.a.weight", "$1.{}.b.weight"];
        let biases = ["$1.{}.a.bias", "$1.{}.b.bias"];
        let store = store.unstack_columns(r"^(experts|odd)\.up$", &weights);
        let store = store.unwrap().with_dtype(FloatType::F32);
        store
            .unstack_columns(r"^(experts)\.up_bias$", &biases)
            .unwrap()
    };
    let mut store = open();
    assert_eq!(store.keys().unwrap().len(), 9);
    assert!(store.get_tensor("odd.up").unwrap().is_some());
    let mut read = |name: &str| {
        let data = bridge::to_data(store.get_tensor(name).unwrap().unwrap()).unwrap();
        let values: Vec<f32> = data.iter::<f32>().collect();
        (data.shape().to_vec(), values)
    };
    let weight = vec![13.0, 17.0, 21.0, 15.0, 19.0, 23.0];
    assert_eq!(read("experts.1.b.weight"), (vec![2, 3], weight));
    assert_eq!(read("experts.1.b.bias"), (vec![2], vec![5.0, 7.0]));

    // Burn has weights as they are stored here.
    #[derive(Module, Debug)]
    struct Expert {
        a: Linear,
        b: Linear,
    }
    #[derive(Module, Debug)]
    struct Experts {
        experts: Vec<Expert>,
    }
    let linear = || LinearConfig::new(3, 2).init(&Device::default());
    let expert = || Expert {
        a: linear(),
        b: linear(),
    };
    let mut module = Experts {
        experts: vec![expert(), expert()],
    };
    let mut store = open().ignore("^odd").unwrap();
    module.load_from(&mut store).unwrap();
    let weight = module.experts[1].b.weight.val().into_data();
    let expected = [13.0, 15.0, 17.0, 19.0, 21.0, 23.0];
    assert_eq!(weight.iter::<f32>().collect::<Vec<_>>(), expected);
    let bias = module.experts[0].a.bias.as_ref().unwrap().val().into_data();
    assert_eq!(bias.iter::<f32>().collect::<Vec<_>>(), [0.0, 2.0]);
}

#[test]
fn a_module_built_from_the_forms_of_a_checkpoint_takes_it() {
    #[derive(Module, Debug)]
    struct Weights {
        items: Vec<BlockWeight>,
    }
    let device = Device::default();
    let mut tensors = Tensors::new();
    let of = |config, shape: &[usize]| quantized(shape, config);
    let weights = [
        of(config(QuantType::Fp4, 128, false), &[17, 33]),
        of(QuantConfig::flat(), &[3, 8, 16]),
        of(QuantConfig::default(), &[24, 40]),
    ];
    for (i, weight) in weights.iter().enumerate() {
        tensors.extend(stored::weight(&format!("items.{i}"), weight));
    }
    stored::transpose(&mut tensors, "items.2");
    let folder = folder(&tensors);
    let mut store = CheckpointStore::open(folder.path()).unwrap();
    let zeros = |i: usize| {
        let form = store
            .checkpoint()
            .weight_form(&format!("items.{i}"))
            .unwrap();
        BlockWeight::zeros_of(form, &device).unwrap()
    };
    let mut module = Weights {
        items: (0..3).map(zeros).collect(),
    };
    module.load_from(&mut store).unwrap();
    for (loaded, weight) in module.items.iter().zip(&weights) {
        assert_eq!(loaded.to_host().unwrap(), *weight);
    }
    assert_eq!(module.items[2].shape(), [40, 24]);
}

#[test]
fn enum_variants_are_skipped_when_asked() {
    #[derive(Module, Debug)]
    #[allow(clippy::large_enum_variant)]
    enum Head {
        Packed(QuantLinear),
        #[allow(dead_code)]
        Dense(Linear),
    }
    #[derive(Module, Debug)]
    struct WithEnum {
        head: Head,
    }
    let device = Device::default();
    let weight = quantized(&[2 * SIZE, SIZE], QuantConfig::default());
    let folder = folder(&stored::weight("head.weight", &weight));
    let model = || WithEnum {
        head: Head::Packed(
            QuantLinearConfig::new(SIZE, 2 * SIZE)
                .with_bias(false)
                .init(&device)
                .unwrap(),
        ),
    };
    let open = || CheckpointStore::open(folder.path()).unwrap();
    let mut loaded = model();
    loaded
        .load_from(&mut open().skip_enum_variants(true))
        .unwrap();
    let Head::Packed(layer) = &loaded.head else {
        panic!("{loaded}");
    };
    assert_eq!(layer.weight.to_host().unwrap(), weight);
    let error = model().load_from(&mut open()).unwrap_err();
    assert!(matches!(error, Nf4Error::Misfit { tensors, .. } if tensors.len() == 2));
}

#[test]
fn the_store_gives_single_tensors_by_remapped_name() {
    let folder = folder(&small_file());
    let remapper = KeyRemapper::new()
        .add_pattern("^", "model.")
        .expect("an expression");
    let mut store = CheckpointStore::open(folder.path())
        .unwrap()
        .remap(remapper);
    // The name says what the packed weight is.
    const PACKED: &str = "model.frozen.weight.packed_nf4_64_256_float32_64x32";
    let keys = store.keys().unwrap();
    assert_eq!(
        keys,
        [
            "model.embed.weight",
            "model.frozen.bias",
            PACKED,
            "model.head.bias",
            "model.head.weight",
            "model.mask",
            "model.norm.weight",
            "model.steps",
        ]
    );
    let head = store.get_tensor("model.head.weight").unwrap().unwrap();
    assert_eq!(head.shape.as_slice(), [5, SIZE]);
    let packed = store.get_tensor(PACKED).unwrap().unwrap();
    let bytes = packed.to_bytes().unwrap();
    let expected = quantized(&[2 * SIZE, SIZE], QuantConfig::default()).to_packed();
    assert_same_bits(&bytes, bytemuck::cast_slice(&expected), "packed");
    assert!(store.get_tensor("head.weight").unwrap().is_none());

    let error = small(&Device::default()).save_into(&mut store).unwrap_err();
    let path = folder.path().into();
    assert_eq!(error, Nf4Error::ReadOnly { path });
    let error = CheckpointStore::open(folder.path())
        .unwrap()
        .with_key_remapping("(", "")
        .unwrap_err();
    assert!(matches!(error, Nf4Error::Pattern { pattern, .. } if pattern == "("));
}

#[test]
fn a_broken_weight_is_an_error_that_names_its_key() {
    let mut tensors = small_file();
    tensors.remove("frozen.weight.absmax");
    let folder = folder(&tensors);
    let mut store = CheckpointStore::open(folder.path()).unwrap();
    let error = small(&Device::default()).load_from(&mut store).unwrap_err();
    assert!(matches!(error, Nf4Error::MissingKey { key, .. } if key == "frozen.weight.absmax"));
}

#[test]
fn a_callback_that_panics_is_an_error() {
    let folder = folder(&small_file());
    let mut store = CheckpointStore::open(folder.path())
        .unwrap()
        .on_progress(|progress| assert_ne!(progress.parameter, "head.bias", "no heads"));
    let error = small(&Device::default()).load_from(&mut store).unwrap_err();
    assert!(
        matches!(&error, Nf4Error::Load { key, message } if key == "head.bias" && message.contains("no heads")),
        "{error}"
    );
}

/// burn-store knows texts only; the error is the library's own all the same.
#[test]
fn a_read_that_fails_is_told_as_it_is() {
    let mut tensors = small_file();
    let values = tensors.get_mut("head.bias").unwrap();
    let expected = Nf4Error::NonFinite {
        tensor: "head.bias".into(),
        index: 0,
        given: f32::NEG_INFINITY,
    };
    *values = stored::floats(&[-1e5; 5], &[5]);
    let folder = folder(&tensors);
    let mut store = CheckpointStore::open(folder.path())
        .unwrap()
        .with_dtype(FloatType::F16);
    let error = small(&Device::default()).load_from(&mut store).unwrap_err();
    assert_eq!(error, expected);
}
