//! Models of the fixtures `hf`, and what belongs to them.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_nf4::checkpoint::{CheckpointStore, SafetensorsFile};
use burn_nf4::format::{FloatType, QuantConfig};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use burn_nf4_llm::generate::{Request, Sampling, generate};
use burn_nf4_llm::model::Decoder;
use burn_nf4_llm::model::config::DecoderConfig;
use burn_nf4_llm::model::{load, random};

/// Tokens of the prompt of the generated text.
pub const PROMPT: usize = 8;

/// A file or folder of the fixtures: those of models and adapters are the workspace's.
pub fn fixture(path: &str) -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fixtures = match path.starts_with("hf/") {
        true => package.join("../../tests/fixtures"),
        false => package.join("tests/fixtures"),
    };
    fixtures.join(path)
}

/// A model in its own dtype, or another.
pub fn open(folder: &str, dtype: Option<FloatType>, device: &Device) -> (Decoder, DecoderConfig) {
    open_folder(&fixture(folder), dtype, device)
}

/// A model of any folder.
pub fn open_folder(
    folder: &Path,
    dtype: Option<FloatType>,
    device: &Device,
) -> (Decoder, DecoderConfig) {
    let config = DecoderConfig::from_folder(folder).unwrap();
    let store = CheckpointStore::open(folder).unwrap();
    let dtype = dtype.unwrap_or(config.dtype);
    let model = load(store, &config, dtype, device).unwrap();
    (model, config)
}

/// An I64 tensor of a safetensors file.
pub fn ints(file: &SafetensorsFile, key: &str) -> (Vec<i64>, Vec<usize>) {
    let shape = file.tensor_info(key).unwrap().shape.to_vec();
    let values = file
        .tensor_bytes(key)
        .unwrap()
        .chunks_exact(8)
        .map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    (values, shape)
}

/// The tokens and the logits of an `io.safetensors`.
pub fn io(path: &str) -> (Vec<i64>, Vec<usize>, Vec<f32>) {
    let file = SafetensorsFile::open(fixture(path)).unwrap();
    let (ids, shape) = ints(&file, "input_ids");
    let (logits, _) = file.load_float::<f32>("logits").unwrap();
    (ids, shape, logits)
}

/// Writes what [`io`] reads.
pub fn write_io(path: &Path, ids: &[i64], shape: &[usize], logits: &[f32]) {
    let vocabulary = logits.len() / ids.len();
    let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let logits: Vec<u8> = logits
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let of_logits = [shape, &[vocabulary]].concat();
    let view =
        |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
    let tensors = [
        ("input_ids", view(Dtype::I64, shape, &ids)),
        ("logits", view(Dtype::F32, &of_logits, &logits)),
    ];
    safetensors::serialize_to_file(tensors, None, path).unwrap();
}

/// The logits of every position.
pub fn logits(model: &Decoder, config: &DecoderConfig, ids: &[i64], shape: &[usize]) -> Vec<f32> {
    let ids = TensorData::new(ids.to_vec(), shape.to_vec());
    let ids = Tensor::<2, Int>::from_data(ids, &model.device());
    let mut rope = model.rope_tables(config);
    floats(model.head(model.hidden(ids, &mut rope, None)))
}

/// Ids of tokens in a file.
pub fn tokens(file: &SafetensorsFile, key: &str) -> Vec<u32> {
    let (ids, _) = ints(file, key);
    ids.into_iter().map(|id| id as u32).collect()
}

/// The greedy text behind the first tokens is that of transformers, as a file has it.
pub fn assert_text_is_theirs(model: &Decoder, config: &DecoderConfig, theirs: &SafetensorsFile) {
    let expected = tokens(theirs, "generated");
    let request = Request {
        prompts: vec![tokens(theirs, "input_ids")[..PROMPT].to_vec()],
        max_tokens: expected.len(),
        sampling: Sampling::greedy(),
        eos: Vec::new(),
        capture: true,
        ..Request::default()
    };
    let report = generate(model, config, &request, |_, _| Ok(())).unwrap();
    assert_eq!(report.tokens[0], expected);
}

/// The values of a tensor.
pub fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// The largest difference; NaN if there is one.
pub fn max_difference(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter()
        .zip(theirs)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |max, d| if d.is_nan() { d } else { max.max(d) })
}

/// To be held by a test that draws random numbers: those of the device are one row for all threads.
pub fn random_numbers() -> MutexGuard<'static, ()> {
    static DRAWN: Mutex<()> = Mutex::new(());
    DRAWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A model of random weights in f32.
pub fn random_model(config: &DecoderConfig, device: &Device) -> Decoder {
    let _drawn = random_numbers();
    random(config, QuantConfig::default(), FloatType::F32, None, device).unwrap()
}
