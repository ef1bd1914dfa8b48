//! Real checkpoints, damaged at random: whatever is read is either refused by a typed error or
//! gives weights that every accessor can decode, and nothing panics.
//!
//! A run takes some hundred inputs. `NF4_FUZZ_SECONDS=600 cargo test --release --test fuzz_readers
//! -- --nocapture` goes on for ten minutes with other seeds each time and says how many it took;
//! `NF4_FUZZ_SEED` repeats the one input that a failure names.
#![cfg(feature = "checkpoint")]
#![cfg(feature = "flex")]

mod blocks;
mod golden;
mod mutation;
mod stored;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{
    Checkpoint, CheckpointStore, DequantizeOptions, SafetensorsFile, dequantize_checkpoint, verify,
};
use burn_nf4::format::{BlockTensor, FloatType};
use burn_nf4::nn::{QuantLinear, QuantLinearConfig};
use burn_store::{ModuleSnapshot, ModuleStore};
use mutation::{Files, mutate};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

/// Inputs of a run without a time limit.
const CASES: u64 = 400;

/// Folders at the end of the corpus.
const FOLDERS: usize = 9;

/// What became of the inputs.
#[derive(Debug, Default)]
struct Tally {
    inputs: u64,
    opened: u64,
    weights_loaded: u64,
    weights_refused: u64,
    /// In NVFP4, MXFP4 and FP8.
    blocks_loaded: u64,
    blocks_refused: u64,
    modules_loaded: u64,
    converted: u64,
}

/// Some real folders, small ones more often.
fn corpus() -> Vec<Files> {
    let mut corpus = Vec::new();
    for name in golden::names() {
        let bytes = fs::read(golden::path(&format!("{name}.safetensors"))).unwrap();
        if bytes.len() < 200_000 {
            corpus.push(vec![("model.safetensors".to_string(), bytes)]);
        }
    }
    assert!(corpus.len() > 10);
    corpus.extend(block_folders());
    for name in ["f32", "bf16", "f32_sharded"] {
        let folder = PathBuf::from("tests/fixtures/hf").join(name).join("model");
        let mut files = Files::new();
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            if name.contains("safetensors") || name == "config.json" {
                files.push((name, fs::read(entry.path()).unwrap()));
            }
        }
        files.sort();
        corpus.push(files);
    }
    corpus
}

/// Folders of the small golden files of each other format, with what a config claims of them.
fn block_folders() -> Vec<Files> {
    let weights = |bits: u32, strategy: &str, size: Option<u32>| json!({"num_bits": bits, "type": "float", "strategy": strategy, "group_size": size});
    let compressed = |weights| {
        json!({"quant_method": "compressed-tensors", "ignore": ["lm_head", "re:.*gate$"],
               "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
    };
    let nvfp4 = compressed(weights(4, "tensor_group", Some(16)));
    let mxfp4 = compressed(weights(4, "group", Some(32)));
    let channel = compressed(weights(8, "channel", None));
    let modelopt = json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_*"]});
    let tiles = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
    let experts = json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]});
    let cases = [
        ("nvfp4_ct_17x64", nvfp4),
        ("nvfp4_modelopt_17x64", modelopt),
        ("mxfp4_ct_17x64", mxfp4),
        ("mxfp4_gpt_oss", experts),
        ("fp8_block128_200x300", tiles),
        ("fp8_channel_200x300", channel),
    ];
    let folder = |(file, claim): (&str, Value)| {
        let mut tensors = blocks::tensors(file, "up.");
        tensors.insert("up.input_scale".into(), stored::floats(&[0.5], &[1]));
        tensors.insert("norm.weight".into(), stored::floats(&[1.0; 8], &[8]));
        let config = json!({"torch_dtype": "bfloat16", "quantization_config": claim});
        vec![
            ("config.json".to_string(), config.to_string().into_bytes()),
            ("model.safetensors".to_string(), stored::to_bytes(&tensors)),
        ]
    };
    cases.into_iter().map(folder).collect()
}

/// A part of the model of `tests/fixtures/hf`.
#[derive(Module, Debug)]
struct Model {
    embed_tokens: Embedding,
    norm: RmsNorm,
    layers: Vec<Layer>,
}

#[derive(Module, Debug)]
struct Layer {
    down_proj: QuantLinear,
    up_proj: QuantLinear,
}

fn model(device: &Device) -> Model {
    let linear = |d_input, d_output| {
        QuantLinearConfig::new(d_input, d_output)
            .with_bias(false)
            .init(device)
            .unwrap()
    };
    let layer = |_| Layer {
        down_proj: linear(352, 128),
        up_proj: linear(128, 352),
    };
    Model {
        embed_tokens: EmbeddingConfig::new(256, 128).init(device),
        norm: RmsNormConfig::new(128).init(device),
        layers: (0..2).map(layer).collect(),
    }
}

/// Loads and decodes a weight in every way there is.
fn use_weight(checkpoint: &Checkpoint, prefix: &str, tally: &mut Tally) {
    let device = Device::flex();
    let host = checkpoint.load_quantized(prefix);
    let transposed = checkpoint.is_transposed(prefix);
    let weight = checkpoint.load_weight(prefix, &device);
    let host = match (host, &weight) {
        (Ok(host), Ok(_)) => host,
        (Ok(host), Err(error)) => {
            // The one thing that has no device form.
            assert!(matches!(error, Nf4Error::NotAMatrix { .. }), "{error}");
            assert!(transposed.unwrap() && host.shape().len() > 2);
            return;
        }
        (Err(error), _) => {
            let also = weight.expect_err("refused on the way to the host");
            // As text: a NaN in it is not equal to itself.
            assert_eq!(error.to_string(), also.to_string());
            let is_state = |key: &str| key.starts_with(&format!("{prefix}.quant_state"));
            match checkpoint.keys().any(is_state) {
                true => tally.weights_refused += 1,
                false => tally.blocks_refused += 1,
            }
            return;
        }
    };
    match host.quant_type().is_bitsandbytes() {
        true => tally.weights_loaded += 1,
        false => tally.blocks_loaded += 1,
    }
    let weight = weight.unwrap();
    assert_eq!(weight.to_host().unwrap(), host);
    assert_eq!(checkpoint.weight_form(prefix).unwrap(), *weight.form());
    let bits = host.quant_type().bits();
    assert!(usize::from(host.code(host.elems() - 1)) < 1 << bits);
    let words = host.to_packed();
    let layout = host.packed_layout();
    assert_eq!(words.len(), layout.words());
    let back = BlockTensor::from_packed(&words, host.shape(), host.config(), host.dtype());
    assert_eq!(back.unwrap(), host);
    let decoded: Vec<f32> = host.dequantize();
    assert_eq!(decoded.len(), host.elems());
    assert!(host.size_bytes() > 0 && weight.size_bytes() > 0);

    let shape = weight.shape().to_vec();
    match *shape.as_slice() {
        [_] => assert_eq!(
            weight.dequantize::<1>(FloatType::F32).unwrap().dims(),
            [decoded.len()]
        ),
        [rows, columns] => {
            let dense = weight.dequantize::<2>(FloatType::BF16).unwrap();
            assert_eq!(dense.dims(), [rows, columns]);
            let last = weight.dequantize_rows(rows - 1..rows, FloatType::F32);
            assert_eq!(last.unwrap().dims(), [1, columns]);
            let layer = QuantLinear::new(weight, None).unwrap();
            let y = layer.forward(Tensor::<2>::ones([1, columns], &device));
            assert_eq!(y.into_data().num_elements(), rows);
        }
        [experts, rows, columns] => {
            let one = weight.dequantize_index::<2>(experts - 1, FloatType::F16);
            assert_eq!(one.unwrap().dims(), [rows, columns]);
        }
        _ => assert!(weight.matrix_dims().is_err()),
    }
}

/// Dequantizes a folder, if it can be; nothing is lost then.
fn convert(checkpoint: &Checkpoint, tally: &mut Tally) {
    let out = tempfile::tempdir().unwrap();
    let faults = checkpoint.faults();
    let options = DequantizeOptions::default();
    match dequantize_checkpoint(checkpoint, out.path(), &options, |_| ()) {
        Ok(converted) => {
            assert!(faults.is_empty(), "{faults:?}");
            assert_eq!(converted.converted, checkpoint.quantized_weights().len());
            let dense = Checkpoint::open(out.path()).unwrap();
            assert_eq!(dense.faults(), []);
            let report = verify(checkpoint, &dense, |_| ()).unwrap();
            assert!(report.is_within(0.0, 0.0), "{report:?}");
            tally.converted += 1;
        }
        Err(error) => {
            let first = faults.first().map(Nf4Error::to_string);
            assert!(
                first.is_none_or(|first| first == error.to_string()),
                "{error}"
            );
        }
    }
}

/// Reads all of a folder.
fn use_folder(folder: &Path, tally: &mut Tally) {
    let device = Device::flex();
    for entry in fs::read_dir(folder).unwrap() {
        // Alone a shard is as good as any file.
        if let Ok(file) = SafetensorsFile::open(entry.unwrap().path()) {
            for prefix in file.quantized_weights() {
                let host = file.load_quantized(prefix);
                let weight = file.load_weight(prefix, &device);
                assert!(host.is_ok() || weight.is_err());
            }
        }
    }
    let checkpoint = match Checkpoint::open(folder) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            let (Nf4Error::Io { path, .. }
            | Nf4Error::ModelConfig { path, .. }
            | Nf4Error::NoWeights { path, .. }
            | Nf4Error::Safetensors { path, .. }
            | Nf4Error::Index { path, .. }) = &error
            else {
                panic!("{error:?}");
            };
            assert!(path.starts_with(folder), "{error}");
            return;
        }
    };
    tally.opened += 1;
    use_tensors(&checkpoint, &device);
    let parameters = checkpoint.parameters();
    for key in &parameters {
        let _ = checkpoint.is_quantized(key);
        let _ = checkpoint.is_transposed(key);
    }
    let _ = checkpoint.quant_claims();
    for key in checkpoint.activation_scales() {
        assert!(!parameters.contains(&key));
    }
    for prefix in checkpoint.quantized_weights() {
        use_weight(&checkpoint, prefix, tally);
    }
    convert(&checkpoint, tally);
    use_store(folder, tally);
}

/// Reads every tensor as it is stored.
fn use_tensors(checkpoint: &Checkpoint, device: &Device) {
    let mut size_bytes = 0;
    for key in checkpoint.keys() {
        assert!(checkpoint.contains(key));
        let info = checkpoint.tensor_info(key).unwrap();
        let bytes = checkpoint.tensor_bytes(key).unwrap();
        size_bytes += bytes.len();
        assert_eq!(
            info.shape.iter().product::<usize>() * info.dtype.bitsize(),
            bytes.len() * 8
        );
        let floats = checkpoint.load_float::<f32>(key);
        assert!(floats.is_err() || bytes.len() == 4 * floats.unwrap().0.len());
        let to = Some(FloatType::F16);
        let same = |dims: &[usize]| assert_eq!(dims, info.shape);
        match info.shape.len() {
            1 => drop(
                checkpoint
                    .load_tensor::<1>(key, None, device)
                    .map(|t| same(&t.dims())),
            ),
            2 => drop(
                checkpoint
                    .load_tensor::<2>(key, to, device)
                    .map(|t| same(&t.dims())),
            ),
            _ => drop(
                checkpoint
                    .load_tensor::<3>(key, to, device)
                    .map(|t| same(&t.dims())),
            ),
        }
    }
    assert_eq!(checkpoint.size_bytes(), size_bytes);
}

/// Loads a folder into a module.
fn use_store(folder: &Path, tally: &mut Tally) {
    let store = CheckpointStore::open(folder).unwrap().allow_partial(true);
    let parts = ["$1.{}.gate", "$1.{}.up"];
    let mut store = store.unstack_interleaved("^(up)", &parts).unwrap();
    if let Ok(tensors) = store.get_all_tensors() {
        for tensor in tensors.values() {
            assert_eq!(tensor.to_bytes().unwrap().len(), tensor.byte_len());
        }
    }
    let mut store = store
        .with_key_remapping(r"^model\.(layers\.\d\.mlp\.)?", "$1")
        .unwrap()
        .with_key_remapping(r"mlp\.", "")
        .unwrap();
    match model(&Device::flex()).load_from(&mut store) {
        Ok(result) => {
            assert!(result.errors.is_empty());
            tally.modules_loaded += u64::from(!result.applied.is_empty());
        }
        Err(error) => assert!(!matches!(error, Nf4Error::Load { .. }), "{error}"),
    }
}

fn run(corpus: &[Files], seed: u64, tally: &mut Tally) {
    let mut rng = StdRng::seed_from_u64(seed);
    // The folders come last and have more to damage.
    let at = if rng.random_bool(0.4) {
        corpus.len() - 1 - rng.random_range(0..FOLDERS)
    } else {
        rng.random_range(0..corpus.len() - FOLDERS)
    };
    let mut files = corpus[at].clone();
    mutate(&mut files, &mut rng);
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in &files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    tally.inputs += 1;
    let result = catch_unwind(AssertUnwindSafe(|| use_folder(folder.path(), tally)));
    assert!(result.is_ok(), "NF4_FUZZ_SEED={seed}");
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().expect("a number"))
}

#[test]
fn damaged_checkpoints_are_refused_or_read() {
    let corpus = corpus();
    let mut tally = Tally::default();
    if let Some(seed) = number("NF4_FUZZ_SEED") {
        run(&corpus, seed, &mut tally);
        println!("{tally:?}");
        return;
    }
    match number("NF4_FUZZ_SECONDS") {
        None => (0..CASES).for_each(|seed| run(&corpus, seed, &mut tally)),
        Some(seconds) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            let start = Instant::now();
            let mut seed = now.as_secs() << 32;
            while start.elapsed() < Duration::from_secs(seconds) {
                run(&corpus, seed, &mut tally);
                seed += 1;
            }
        }
    }
    println!("{tally:?}");
    // Damage that never gets past the header would test little.
    assert!(tally.opened > tally.inputs / 4, "{tally:?}");
    assert!(
        tally.weights_loaded > 0 && tally.weights_refused > 0,
        "{tally:?}"
    );
    assert!(
        tally.blocks_loaded > 0 && tally.blocks_refused > 0,
        "{tally:?}"
    );
    assert!(tally.modules_loaded > 0 && tally.converted > 0, "{tally:?}");
}
