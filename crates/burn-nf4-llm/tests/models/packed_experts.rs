//! gpt-oss with experts in MXFP4, as openai publishes it: `fixtures/families/gpt_oss_mxfp4`, and what transformers
//! computes of it with the experts decoded.

use std::path::Path;

use burn::tensor::Device;
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{
    Checkpoint, CheckpointStore, DequantizeOptions, Dtype, QuantizeOptions, SafetensorsFile,
    dequantize_checkpoint, quantize_checkpoint, verify,
};
use burn_nf4::format::{FloatType, QuantConfig, QuantType};
use burn_nf4::model::{LinearLayers, SaveFolder};
use burn_nf4::nn::AnyLinear;
use burn_nf4::peft::{
    InitLoraWeights, LoraConfig, MergeOptions, TargetModules, merge_4bit, merge_16bit,
};
use burn_nf4_llm::error::ModelError;
use burn_nf4_llm::model::{Decoder, DecoderConfig, load};
use rstest::rstest;

use crate::fixtures::{
    assert_text_is_theirs, fixture, io, logits, max_difference, open_folder, random_numbers,
};
use crate::stored::{self, Tensors, quiet};

const FOLDER: &str = "families/gpt_oss_mxfp4/model";
const IO: &str = "families/gpt_oss_mxfp4/io.safetensors";
const DOWN: &str = "model.layers.1.mlp.experts.down_proj";

/// Logits are about 0.7 and pass through sums of up to 64 products in f32.
const TOLERANCE: f32 = 2e-5;

fn opened(folder: &Path) -> (Decoder, DecoderConfig) {
    open_folder(folder, Some(FloatType::F32), &Device::default())
}

fn logits_of(folder: &Path) -> Vec<f32> {
    let (ids, shape, _) = io(IO);
    let (model, config) = opened(folder);
    logits(&model, &config, &ids, &shape)
}

/// Transformers' decoded weights give other sums than ours that decode as they go.
fn assert_theirs(ours: &[f32]) {
    let (.., theirs) = io(IO);
    let difference = max_difference(ours, &theirs);
    assert!(difference < TOLERANCE, "{difference:e}");
}

fn is_expert(module: &str) -> bool {
    module.contains(".mlp.experts.")
}

#[test]
fn the_logits_are_those_of_transformers() {
    assert_theirs(&logits_of(&fixture(FOLDER)));
}

#[test]
fn the_text_is_that_of_transformers() {
    let file = SafetensorsFile::open(fixture(IO)).unwrap();
    let (model, config) = opened(&fixture(FOLDER));
    assert_text_is_theirs(&model, &config, &file);
}

#[test]
fn experts_stay_packed() {
    let (model, config) = opened(&fixture(FOLDER));
    let linears = model.linears();
    let experts = linears.iter().filter(|(name, _)| is_expert(name)).count();
    assert_eq!(experts, 3 * 4 * config.layers.len());
    for (name, layer) in linears {
        let quant_type = match layer {
            AnyLinear::Nf4(layer) => Some(layer.weight.config().quant_type),
            _ => None,
        };
        let expected = is_expert(&name).then_some(QuantType::Mxfp4);
        assert_eq!(quant_type, expected, "{name}");
    }
}

fn saved(model: &Decoder, folder: &Path) -> Checkpoint {
    let source = Checkpoint::open(fixture(FOLDER)).unwrap();
    let options = SaveFolder {
        source: Some(&source),
        ..SaveFolder::default()
    };
    model.save_folder(folder, &options).unwrap();
    let saved = Checkpoint::open(folder).unwrap();
    assert_eq!(saved.faults(), []);
    saved
}

/// As transformers reads them: a stack a projection.
#[test]
fn a_model_is_saved_with_the_stacks_that_it_was_loaded_from() {
    let (model, _) = opened(&fixture(FOLDER));
    let folder = tempfile::tempdir().unwrap();
    let saved = saved(&model, folder.path());
    let source = Checkpoint::open(fixture(FOLDER)).unwrap();
    assert_eq!(saved.quantized_weights(), source.quantized_weights());
    for key in source.quantized_weights() {
        for part in ["_blocks", "_scales"] {
            let [ours, theirs] = [&saved, &source].map(|folder| {
                let key = format!("{key}{part}");
                let info = folder.tensor_info(&key).unwrap();
                let bytes = folder.tensor_bytes(&key).unwrap();
                (info.dtype, info.shape.to_vec(), bytes.to_vec())
            });
            assert!(ours == theirs, "{key}{part}");
        }
    }
    let claim = &stored::config_of(folder.path())["quantization_config"];
    assert_eq!(claim["quant_method"], "mxfp4");
    assert_theirs(&logits_of(folder.path()));
}

/// transformers has the experts of a layer in MXFP4 or not, as a whole.
#[test]
fn a_model_is_saved_with_the_experts_of_one_layer_in_floats() {
    let (model, _) = opened(&fixture(FOLDER));
    let model = model.try_map_linears(|name, layer| match name {
        name if name.starts_with("model.layers.1.mlp.experts.") => layer.dequantize(FloatType::F32),
        _ => Ok(layer),
    });
    let folder = tempfile::tempdir().unwrap();
    let saved = saved(&model.unwrap(), folder.path());
    let stacks = ["down_proj", "gate_up_proj"].map(|it| format!("model.layers.0.mlp.experts.{it}"));
    assert_eq!(saved.quantized_weights(), stacks);
    assert_eq!(saved.tensor_info(DOWN).unwrap().shape, [4, 32, 64]);
    let kept = &stored::config_of(folder.path())["quantization_config"]["modules_to_not_convert"];
    let kept: Vec<_> = kept
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it.as_str().unwrap())
        .collect();
    let experts = kept.iter().filter(|name| name.contains("experts"));
    assert_eq!(experts.collect::<Vec<_>>(), [&"model.layers.1.mlp.experts"]);
    assert_theirs(&logits_of(folder.path()));
}

/// The form has stacks of whole layers alone.
#[rstest]
#[case::one_expert_in_floats(|name: &str| name == "model.layers.1.mlp.experts.2.up_proj")]
#[case::one_projection_in_floats(|name: &str| name.contains("layers.1.") && name.ends_with(".down_proj"))]
fn other_packed_experts_are_saved_one_by_one(#[case] in_floats: fn(&str) -> bool) {
    let (model, _) = opened(&fixture(FOLDER));
    let model = model.try_map_linears(|name, layer| match in_floats(name) {
        true => layer.dequantize(FloatType::F32),
        false => Ok(layer),
    });
    let folder = tempfile::tempdir().unwrap();
    let saved = saved(&model.unwrap(), folder.path());
    assert!(saved.is_quantized("model.layers.0.mlp.experts.0.down_proj.weight"));
    assert_theirs(&logits_of(folder.path()));
}

/// Each matrix is transposed, as the model has it in floats.
#[test]
fn decoded_experts_are_those_of_transformers() {
    let source = Checkpoint::open(fixture(FOLDER)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("dense");
    let options = DequantizeOptions::default();
    let converted = dequantize_checkpoint(&source, &out, &options, quiet).unwrap();
    assert_eq!(converted.converted, 4);
    let dense = Checkpoint::open(&out).unwrap();
    assert_eq!(dense.faults(), []);
    let info = dense.tensor_info(DOWN).unwrap();
    assert_eq!((info.dtype, info.shape), (Dtype::BF16, &[4, 32, 64][..]));
    assert!(stored::config_of(&out).get("quantization_config").is_none());
    assert_theirs(&logits_of(&out));
    for (a, b) in [(&source, &dense), (&dense, &source)] {
        let report = verify(a, b, quiet).unwrap();
        assert!(report.is_within(0.0, 0.0), "{report:?}");
        assert_eq!(report.parameters.len(), 37);
    }
}

fn to_mxfp4() -> QuantizeOptions {
    QuantizeOptions {
        config: QuantConfig::of(QuantType::Mxfp4),
        experts: true,
        ..QuantizeOptions::default()
    }
}

/// The fixture was made of this folder, whose attention is in NF4, by Python.
#[test]
fn experts_in_floats_are_quantized_to_the_same_bytes() {
    let dense = Checkpoint::open(fixture("families/gpt_oss/model")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = QuantizeOptions {
        dtype: Some(FloatType::BF16),
        ..to_mxfp4()
    };
    let converted = quantize_checkpoint(&dense, folder.path(), &options, quiet).unwrap();
    assert_eq!((converted.converted, converted.decoded.len()), (4, 8));
    // Rounding normally distributed weights to MXFP4 costs about 11 % of their RMS.
    let loss = converted.losses[DOWN].relative_rms();
    assert!(loss > 0.08 && loss < 0.14, "{loss}");

    let [ours, theirs] = [folder.path().into(), fixture(FOLDER)].map(|folder| {
        let file = SafetensorsFile::open(folder.join("model.safetensors")).unwrap();
        (stored::read(&file), stored::config_of(&folder))
    });
    assert!(ours.0.keys().eq(theirs.0.keys()));
    for (key, tensor) in &ours.0 {
        // Of the vocabulary the fixture has a part.
        let bytes = theirs.0[key].bytes.as_slice();
        assert_eq!(&tensor.bytes[..bytes.len()], bytes, "{key}");
        let columns = tensor.shape.iter().skip(1);
        assert!(columns.eq(theirs.0[key].shape.iter().skip(1)), "{key}");
    }
    let field = "quantization_config";
    assert_eq!(ours.1[field], theirs.1[field]);
    let written = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(written.faults(), []);
    opened(folder.path());
}

/// A layer's experts are in MXFP4 or not, as a whole.
#[test]
fn experts_of_a_layer_are_kept_together() {
    let dense = Checkpoint::open(fixture("families/gpt_oss/model")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = QuantizeOptions {
        skip_modules: vec![DOWN.into()],
        ..to_mxfp4()
    };
    quantize_checkpoint(&dense, folder.path(), &options, quiet).unwrap();
    let written = Checkpoint::open(folder.path()).unwrap();
    let expected =
        ["down_proj", "gate_up_proj"].map(|it| format!("model.layers.0.mlp.experts.{it}"));
    assert_eq!(written.quantized_weights(), expected);
    let ignored =
        &stored::config_of(folder.path())["quantization_config"]["modules_to_not_convert"];
    assert_eq!(ignored[4], "model.layers.1.mlp.experts");
    assert_eq!(written.faults(), []);
    opened(folder.path());
}

#[rstest]
#[case::head(QuantizeOptions { head: true, ..to_mxfp4() }, "head")]
#[case::embeddings(QuantizeOptions { embeddings: true, ..to_mxfp4() }, "embeddings")]
#[case::no_module(QuantizeOptions { skip_modules: vec!["expert".into()], ..to_mxfp4() }, "skip_modules")]
#[case::other_type(QuantizeOptions { config: QuantConfig::of(QuantType::Nvfp4), ..to_mxfp4() }, "experts")]
fn what_the_form_has_not_is_refused(#[case] options: QuantizeOptions, #[case] name: &str) {
    let dense = Checkpoint::open(fixture("families/gpt_oss/model")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    match quantize_checkpoint(&dense, folder.path(), &options, quiet) {
        Err(Nf4Error::Config { field, .. }) => assert_eq!(field, name),
        other => panic!("{other:?}"),
    }
}

/// To another type the experts become floats the right way round.
#[test]
fn other_types_decode_the_experts() {
    let source = Checkpoint::open(fixture(FOLDER)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = QuantizeOptions::default();
    let converted = quantize_checkpoint(&source, folder.path(), &options, quiet).unwrap();
    assert_eq!((converted.converted, converted.decoded.len()), (8, 4));
    let written = Checkpoint::open(folder.path()).unwrap();
    let report = verify(&source, &written, quiet).unwrap();
    let attention = |name: &str| name.contains("self_attn") && name.ends_with("weight");
    for parameter in report.exceeding(0.0, 0.0) {
        assert!(attention(&parameter.name), "{parameter:?}");
    }
    opened(folder.path());
}

/// Experts that an adapter leaves alone stay as they are, or become floats.
#[test]
fn an_adapter_of_attention_is_merged() {
    let device = Device::default();
    let (ids, shape, _) = io(IO);
    let (model, config) = opened(&fixture(FOLDER));
    let lora = LoraConfig::new(TargetModules::List(vec!["q_proj".into(), "o_proj".into()]));
    let adapted = {
        let _drawn = random_numbers();
        device.seed(5);
        let lora = LoraConfig {
            init_lora_weights: InitLoraWeights::Default(false),
            ..lora.clone()
        };
        model.with_lora(&lora, &device).unwrap()
    };
    let adapter = adapted.extract_adapter(&lora).unwrap();
    let expected = logits(&adapted, &config, &ids, &shape);
    assert!(max_difference(&expected, &logits_of(&fixture(FOLDER))) > 1e-2);
    let base = Checkpoint::open(fixture(FOLDER)).unwrap();
    let out = tempfile::tempdir().unwrap();
    let [dense, packed] = ["dense", "packed"].map(|name| out.path().join(name));
    let options = MergeOptions::default();
    merge_16bit(
        &base,
        &adapter,
        &dense,
        Some(FloatType::F32),
        &options,
        |_| {},
    )
    .unwrap();
    merge_4bit(&base, &adapter, &packed, &options, |_| {}).unwrap();
    let difference = max_difference(&logits_of(&dense), &expected);
    assert!(difference < 1e-4, "{difference:e}");
    let packed = Checkpoint::open(&packed).unwrap();
    assert_eq!(packed.quantized_weights(), base.quantized_weights());
    for part in ["_blocks", "_scales"] {
        let key = format!("{DOWN}{part}");
        assert_eq!(
            packed.tensor_bytes(&key).unwrap(),
            base.tensor_bytes(&key).unwrap()
        );
    }
}

/// Loads the folder with some tensor changed.
fn refused(change: impl FnOnce(&mut Tensors)) -> String {
    let file = SafetensorsFile::open(fixture(FOLDER).join("model.safetensors")).unwrap();
    let mut tensors = stored::read(&file);
    change(&mut tensors);
    let folder = tempfile::tempdir().unwrap();
    stored::write(folder.path(), &tensors);
    let config = stored::config_of(&fixture(FOLDER)).to_string();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let config = DecoderConfig::from_folder(folder.path()).unwrap();
    let store = CheckpointStore::open(folder.path()).unwrap();
    match load(store, &config, FloatType::F32, &Device::default()) {
        Err(ModelError::Nf4(error)) => error.to_string(),
        other => panic!("{:?}", other.map(drop)),
    }
}

#[rstest]
#[case::no_scales("_scales", |tensors: &mut Tensors, key: &str| { tensors.remove(key); })]
#[case::blocks_of_8("_blocks", |tensors: &mut Tensors, key: &str| tensors.get_mut(key).unwrap().shape = vec![4, 64, 2, 8])]
#[case::flat_blocks("_blocks", |tensors: &mut Tensors, key: &str| tensors.get_mut(key).unwrap().shape = vec![256, 16])]
#[case::blocks_in_i8("_blocks", |tensors: &mut Tensors, key: &str| tensors.get_mut(key).unwrap().dtype = Dtype::I8)]
#[case::scales_in_e4m3("_scales", |tensors: &mut Tensors, key: &str| tensors.get_mut(key).unwrap().dtype = Dtype::F8_E4M3)]
#[case::scales_of_others("_scales", |tensors: &mut Tensors, key: &str| tensors.get_mut(key).unwrap().shape = vec![4, 1, 64])]
#[case::scale_of_nan("_scales", |tensors: &mut Tensors, key: &str| tensors.get_mut(key).unwrap().bytes[7] = 255)]
fn malformed_stacks_are_refused_by_name(
    #[case] part: &str,
    #[case] change: fn(&mut Tensors, &str),
) {
    let key = format!("{DOWN}{part}");
    let error = refused(|tensors| change(tensors, &key));
    assert!(error.contains(&key), "{error}");
}

#[test]
fn experts_that_are_missing_are_refused_by_name() {
    let error = refused(|tensors| {
        for part in ["_blocks", "_scales"] {
            let tensor = tensors.get_mut(&format!("{DOWN}{part}")).unwrap();
            tensor.shape[0] /= 2;
            tensor.bytes.truncate(tensor.bytes.len() / 2);
        }
    });
    assert!(
        error.contains("model.layers.1.mlp.experts.2.down_proj"),
        "{error}"
    );
}

/// Wherever they are read: they are no parameter of their own.
#[test]
fn scales_without_blocks_are_refused_by_name() {
    let blocks = format!("{DOWN}_blocks");
    let error = refused(|tensors| drop(tensors.remove(&blocks)));
    assert!(error.contains(&blocks), "{error}");
    let file = SafetensorsFile::open(fixture(FOLDER).join("model.safetensors")).unwrap();
    let mut tensors = stored::read(&file);
    tensors.remove(&blocks);
    let folder = tempfile::tempdir().unwrap();
    stored::write(folder.path(), &tensors);
    let config = stored::config_of(&fixture(FOLDER)).to_string();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let source = Checkpoint::open(folder.path()).unwrap();
    let faults = source.faults();
    assert!(
        faults
            .iter()
            .any(|fault| fault.to_string().contains(&blocks)),
        "{faults:?}"
    );
    let out = folder.path().join("dense");
    let error = dequantize_checkpoint(&source, &out, &DequantizeOptions::default(), quiet);
    let error = error.unwrap_err().to_string();
    assert!(error.contains(&blocks), "{error}");
}
