//! Adapter folders: what PEFT wrote, written back, taken into layers and out again, and what is
//! refused.
#![cfg(feature = "peft")]

mod tensors;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, Dtype, SafetensorsFile};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig};
use burn_nf4::nn::{QLoraLinearConfig, QuantLinear};
use burn_nf4::peft::{
    ADAPTER_FILE, Adapter, CONFIG_FILE, DenseTensor, LoraBias, LoraConfig, LoraModule,
    TargetModules,
};
use proptest::prelude::*;
use rstest::rstest;
use safetensors::tensor::TensorView;
use tempfile::TempDir;
use tensors::*;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf/f32")
}

const Q_PROJ: &str = "model.layers.0.self_attn.q_proj";
const Q_A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
const Q_B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

#[rstest]
fn a_folder_that_peft_wrote_is_written_back_byte_for_byte(
    #[values("adapter_init", "adapter_final")] name: &str,
) {
    let folder = fixtures().join(name);
    let adapter = Adapter::open(&folder).expect("PEFT wrote it");
    let copy = TempDir::new().expect("a folder");
    adapter.save(copy.path()).expect("it can be written");
    for file in [CONFIG_FILE, ADAPTER_FILE] {
        let read = |folder: &Path| fs::read(folder.join(file)).expect("it is there");
        assert!(read(&folder) == read(copy.path()), "{file} differs");
    }
    let names = fs::read_dir(copy.path()).expect("it is there").count();
    assert_eq!(names, 2, "nothing else is left in the folder");
}

#[test]
fn every_linear_of_the_fixture_is_adapted_with_its_factor() {
    let adapter = Adapter::open(fixtures().join("adapter_final")).expect("PEFT wrote it");
    let base = Checkpoint::open(fixtures().join("model")).expect("transformers wrote it");
    let modules: Vec<String> = adapter
        .modules()
        .map(|(path, _)| format!("{path}.weight"))
        .collect();
    assert_eq!(modules, base.quantized_weights());
    for (path, module) in adapter.modules() {
        assert_eq!(adapter.scale(path), Ok(2.0));
        assert_eq!(module.rank(), 8);
        let weight = base
            .load_quantized(&format!("{path}.weight"))
            .expect("it is there");
        assert_eq!(module.dims().as_slice(), weight.shape());
    }
}

#[test]
fn a_layer_is_the_base_plus_the_scaled_branch() {
    let adapter = Adapter::open(fixtures().join("adapter_final")).expect("PEFT wrote it");
    let base = Checkpoint::open(fixtures().join("model")).expect("transformers wrote it");
    let weight = base
        .load_quantized(&format!("{Q_PROJ}.weight"))
        .expect("it is there");
    let device = Device::default();
    let linear = QuantLinear::from_host(&weight, None, &device).expect("a matrix");
    let layer = adapter.layer(Q_PROJ, linear, &device).expect("it fits");

    let [d_output, d_input] = layer.base.dims();
    let x = uniform(d_input, 7);
    let y = values(&layer.forward(tensor(&x, [1, d_input], FloatType::F32, &device)));

    let module = adapter.module(Q_PROJ).expect("it is adapted");
    let (a, b) = (module.lora_a.to_f32(), module.lora_b.to_f32());
    let dense: Vec<f32> = weight.dequantize();
    let dot = |row: &[f32]| -> f64 {
        row.iter()
            .zip(&x)
            .map(|(w, x)| f64::from(*w) * f64::from(*x))
            .sum()
    };
    let inner: Vec<f64> = a.chunks(d_input).map(dot).collect();
    let expected: Vec<(f64, f64)> = (0..d_output)
        .map(|row| {
            let branch = b[row * 8..][..8].iter().zip(&inner);
            let branch: f64 = branch.map(|(b, inner)| f64::from(*b) * inner).sum();
            let value = dot(&dense[row * d_input..][..d_input]) + 2.0 * branch;
            // Sums of 128 products in f32, each of at most 0.2.
            (value, 128.0 * 0.2 * f64::from(f32::EPSILON))
        })
        .collect();
    assert_close(&y, &expected, "y");
}

#[test]
fn a_layer_taken_back_gives_the_same_file() {
    let folder = fixtures().join("adapter_final");
    let adapter = Adapter::open(&folder).expect("PEFT wrote it");
    let base = Checkpoint::open(fixtures().join("model")).expect("transformers wrote it");
    let device = Device::default().autodiff();
    let mut copy = Adapter::new(adapter.config().clone()).expect("valid");
    for (path, _) in adapter.modules() {
        let weight = base
            .load_quantized(&format!("{path}.weight"))
            .expect("it is there");
        let linear = QuantLinear::from_host(&weight, None, &device).expect("a matrix");
        let layer = adapter.layer(path, linear, &device).expect("it fits");
        copy.insert_layer(path, &layer).expect("it fits");
    }
    let out = TempDir::new().expect("a folder");
    copy.save(out.path()).expect("it can be written");
    let read = |folder: &Path| fs::read(folder.join(ADAPTER_FILE)).expect("it is there");
    assert!(read(&folder) == read(out.path()));
}

fn linear(d_output: usize, d_input: usize, bias: bool, device: &Device) -> QuantLinear {
    let values = uniform(d_output * d_input, 3);
    let weight = BlockTensor::quantize(&values, &[d_output, d_input], QuantConfig::default());
    let bias = bias.then(|| Tensor::zeros([d_output], device));
    QuantLinear::from_host(&weight.expect("valid"), bias, device).expect("it fits")
}

fn module(rank: usize, d_output: usize, d_input: usize) -> LoraModule {
    let dense = |shape: &[usize], seed| {
        let values = uniform(shape.iter().product(), seed);
        DenseTensor::from_f32(&values, shape, FloatType::F32).expect("it fits")
    };
    LoraModule {
        lora_a: dense(&[rank, d_input], 1),
        lora_b: dense(&[d_output, rank], 2),
        magnitude: None,
        bias: None,
    }
}

/// An adapter of two 32x64 modules, `a.q` and `b.q`.
fn small(config: LoraConfig) -> Adapter {
    let mut adapter = Adapter::new(config).expect("valid");
    for path in ["a.q", "b.q"] {
        let rank = adapter.matcher().rank(path).expect("a small pattern");
        adapter.insert(path, module(rank, 32, 64)).expect("it fits");
    }
    adapter
}

fn q_config() -> LoraConfig {
    LoraConfig::new(TargetModules::list(["q"]))
}

#[test]
fn ranks_and_alphas_by_pattern_reach_the_layers() {
    let adapter = small(LoraConfig {
        rank_pattern: [("a.q", 2)].into_iter().collect(),
        alpha_pattern: [("b.q", 3.0)].into_iter().collect(),
        use_rslora: true,
        ..q_config()
    });
    let folder = TempDir::new().expect("a folder");
    adapter.save(folder.path()).expect("it can be written");
    let adapter = Adapter::open(folder.path()).expect("it is valid");
    let device = Device::default();
    let layer = |path| adapter.layer(path, linear(32, 64, false, &device), &device);
    let (a, b) = (
        layer("a.q").expect("it fits"),
        layer("b.q").expect("it fits"),
    );
    assert_eq!((a.rank(), b.rank()), (2, 8));
    assert_eq!(a.scale, 8.0 / 2f64.sqrt());
    assert_eq!(b.scale, 3.0 / 8f64.sqrt());
}

#[rstest]
fn each_dtype_is_kept_in_the_file_and_widened_in_the_layer(
    #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] of_a: FloatType,
    #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] of_b: FloatType,
) {
    let narrow = |tensor: &DenseTensor, dtype| {
        DenseTensor::from_f32(&tensor.to_f32(), tensor.shape(), dtype).expect("it fits")
    };
    let wide = module(8, 32, 64);
    let stored = LoraModule {
        lora_a: narrow(&wide.lora_a, of_a),
        lora_b: narrow(&wide.lora_b, of_b),
        ..wide
    };
    let mut adapter = Adapter::new(q_config()).expect("valid");
    adapter.insert("q", stored.clone()).expect("it fits");
    let folder = TempDir::new().expect("a folder");
    adapter.save(folder.path()).expect("it can be written");
    let adapter = Adapter::open(folder.path()).expect("it is valid");
    assert_eq!(adapter.module("q"), Some(&stored));

    let device = Device::default();
    let layer = adapter
        .layer("q", linear(32, 64, false, &device), &device)
        .expect("it fits");
    for (parameter, stored) in [
        (&layer.lora_a, &stored.lora_a),
        (&layer.lora_b, &stored.lora_b),
    ] {
        let data = parameter.val().transpose().into_data();
        assert_eq!(data.dtype(), burn::tensor::DType::F32);
        assert_eq!(data.iter::<f32>().collect::<Vec<_>>(), stored.to_f32());
    }
    let y = layer.forward(Tensor::<2>::ones([1, 64], &device));
    assert!(values(&y).iter().all(|value| value.is_finite()));
}

#[test]
fn a_trained_bias_goes_into_the_layer_is_trainable_and_comes_back() {
    let mut adapter = small(LoraConfig {
        bias: LoraBias::LoraOnly,
        ..q_config()
    });
    let bias = DenseTensor::from_f32(&uniform(32, 9), &[32], FloatType::F32).expect("it fits");
    let with_bias = LoraModule {
        bias: Some(bias.clone()),
        ..module(8, 32, 64)
    };
    adapter.insert("a.q", with_bias).expect("it fits");
    let folder = TempDir::new().expect("a folder");
    adapter.save(folder.path()).expect("it can be written");
    let file = SafetensorsFile::open(folder.path().join(ADAPTER_FILE)).expect("valid");
    assert!(
        file.keys()
            .any(|key| key == "base_model.model.a.q.base_layer.bias")
    );

    let mut adapter = Adapter::open(folder.path()).expect("it is valid");
    let device = Device::default().autodiff();
    let base = linear(32, 64, true, &device);
    let layer = adapter.layer("a.q", base, &device).expect("it fits");
    let x = Tensor::<2>::ones([1, 64], &device);
    let grads = layer.forward(x).sum().backward();
    let trained = layer.base.bias.as_ref().expect("it has a bias");
    let grad = trained.grad(&grads).expect("it is trained");
    assert_eq!(values(&grad), [1.0; 32]);
    adapter.insert_layer("a.q", &layer).expect("it fits");
    assert_eq!(adapter.module("a.q").expect("it is there").bias, Some(bias));

    let without = adapter.layer("a.q", linear(32, 64, false, &device), &device);
    assert_eq!(
        without.err(),
        Some(Nf4Error::BaseLacks {
            missing: vec!["a.q.bias".into()]
        })
    );
}

#[test]
fn whole_modules_biases_and_embeddings_are_kept_under_the_names_of_the_base() {
    let mut adapter = small(LoraConfig {
        bias: LoraBias::All,
        modules_to_save: Some(vec!["score".into()]),
        ..q_config()
    });
    let tensor = |len: usize| DenseTensor::from_f32(&uniform(len, 4), &[len], FloatType::F16);
    let names = [
        "model.embed_tokens.weight",
        "model.norm.bias",
        "score.dense.weight",
    ];
    for (index, name) in names.into_iter().enumerate() {
        adapter
            .insert_full(name, tensor(index + 1).expect("it fits"))
            .expect("it is asked for");
    }
    let folder = TempDir::new().expect("a folder");
    adapter.save(folder.path()).expect("it can be written");
    let reread = Adapter::open(folder.path()).expect("it is valid");
    assert!(reread.full_tensors().eq(adapter.full_tensors()));
    assert_eq!(reread.full_tensors().count(), 3);
    let file = SafetensorsFile::open(folder.path().join(ADAPTER_FILE)).expect("valid");
    assert!(
        file.keys()
            .any(|key| key == "base_model.model.score.dense.weight")
    );

    let refused = adapter.insert_full("model.norm.weight", tensor(1).expect("it fits"));
    assert!(matches!(refused, Err(Nf4Error::NotAdapted { .. })));
}

/// The fixture's tensors, changed and written with the fixture's settings, themselves changed.
fn open_changed(
    settings: &[(&str, serde_json::Value)],
    change: impl FnOnce(&mut HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>),
) -> Result<Adapter, Nf4Error> {
    let source = fixtures().join("adapter_final");
    let file = SafetensorsFile::open(source.join(ADAPTER_FILE)).expect("PEFT wrote it");
    let mut entries: HashMap<_, _> = file
        .keys()
        .map(|key| {
            let info = file.tensor_info(key).expect("it is there");
            let bytes = file.tensor_bytes(key).expect("it is there").to_vec();
            (key.to_string(), (info.dtype, info.shape.to_vec(), bytes))
        })
        .collect();
    change(&mut entries);
    let json = fs::read(source.join(CONFIG_FILE)).expect("it is there");
    let mut json: serde_json::Value = serde_json::from_slice(&json).expect("PEFT wrote it");
    for (key, value) in settings {
        json[*key] = value.clone();
    }
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join(CONFIG_FILE), json.to_string()).expect("it can be written");
    let views = entries.iter().map(|(key, (dtype, shape, bytes))| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).expect("consistent");
        (key.as_str(), view)
    });
    safetensors::serialize_to_file(views, None, &folder.path().join(ADAPTER_FILE))
        .expect("it can be written");
    Adapter::open(folder.path())
}

#[test]
fn missing_and_unexpected_tensors_are_listed_together() {
    let error = open_changed(&[], |entries| {
        let a = entries.remove(Q_A).expect("it is there");
        entries.insert("model.norm.weight".into(), a.clone());
        entries.insert("base_model.model.lm_head.lora_A.weight".into(), a.clone());
        entries.insert("base_model.model.model.norm.weight".into(), a.clone());
        entries.insert(
            format!("base_model.model.{Q_PROJ}.lora_embedding_A"),
            a.clone(),
        );
        entries.insert(
            format!("base_model.model.{Q_PROJ}.lora_magnitude_vector"),
            a.clone(),
        );
        entries.insert(format!("base_model.model.{Q_PROJ}.base_layer.bias"), a);
    })
    .expect_err("it must be refused");
    let Nf4Error::AdapterKeys {
        missing,
        unexpected,
        ..
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!(missing, [Q_A]);
    assert_eq!(
        unexpected,
        [
            "base_model.model.lm_head.lora_A.weight".to_string(),
            format!("base_model.model.{Q_PROJ}.base_layer.bias"),
            format!("base_model.model.{Q_PROJ}.lora_embedding_A"),
            format!("base_model.model.{Q_PROJ}.lora_magnitude_vector"),
            "base_model.model.model.norm.weight".to_string(),
            "model.norm.weight".to_string(),
        ]
    );
}

#[test]
fn a_module_that_the_settings_do_not_select_is_unexpected() {
    let settings = [("layers_to_transform", serde_json::json!([1]))];
    let error = open_changed(&settings, |_| {}).expect_err("it must be refused");
    assert!(!error.to_string().contains("missing"), "{error}");
    let Nf4Error::AdapterKeys {
        missing,
        unexpected,
        ..
    } = error
    else {
        panic!("{error}");
    };
    assert!(missing.is_empty());
    assert_eq!(
        unexpected.len(),
        14,
        "two tensors of each of the seven modules of layer 0"
    );
    assert!(unexpected.iter().all(|key| key.contains(".layers.0.")));
}

#[test]
fn dora_asks_for_a_magnitude_of_every_module() {
    let settings = [("use_dora", serde_json::json!(true))];
    let error = open_changed(&settings, |_| {}).expect_err("it must be refused");
    assert!(!error.to_string().contains("unexpected"), "{error}");
    let Nf4Error::AdapterKeys { missing, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(missing.len(), 14);
    assert!(
        missing
            .iter()
            .all(|key| key.ends_with(".lora_magnitude_vector"))
    );
}

#[test]
fn a_rank_other_than_that_of_the_pattern_is_refused() {
    let settings = [("rank_pattern", serde_json::json!({"q_proj": 4}))];
    assert_eq!(
        open_changed(&settings, |_| {}).err(),
        Some(Nf4Error::Shape {
            tensor: Q_A.into(),
            expected: vec![4, 128],
            given: vec![8, 128],
        })
    );
}

#[test]
fn a_convolution_is_refused_by_its_shape() {
    let error = open_changed(&[], |entries| {
        let a = entries.get_mut(Q_A).expect("it is there");
        a.1 = vec![8, 128, 1, 1];
    });
    assert!(matches!(error, Err(Nf4Error::Shape { tensor, .. }) if tensor == Q_A));
}

#[test]
fn another_dtype_is_refused() {
    let error = open_changed(&[], |entries| {
        let b = entries.get_mut(Q_B).expect("it is there");
        b.0 = Dtype::I32;
    });
    assert!(matches!(error, Err(Nf4Error::Dtype { tensor, .. }) if tensor == Q_B));
}

#[rstest]
fn a_value_that_is_not_finite_is_refused(#[values(f32::NAN, f32::INFINITY)] value: f32) {
    let error = open_changed(&[], |entries| {
        let b = entries.get_mut(Q_B).expect("it is there");
        b.2[20..24].copy_from_slice(&value.to_le_bytes());
    });
    assert!(matches!(error, Err(Nf4Error::NonFinite { tensor, index: 5, .. }) if tensor == Q_B));
}

#[test]
fn a_layer_that_does_not_fit_the_adapter_is_refused() {
    let mut adapter = small(q_config());
    let device = Device::default();
    let base = || linear(32, 64, false, &device);
    assert!(matches!(
        adapter.layer("a.k", base(), &device),
        Err(Nf4Error::NotAdapted { .. })
    ));
    // The settings select it, but there are no tensors.
    assert!(matches!(
        adapter.layer("c.q", base(), &device),
        Err(Nf4Error::NotAdapted { .. })
    ));
    assert_eq!(
        adapter
            .layer("a.q", linear(64, 32, false, &device), &device)
            .err(),
        Some(Nf4Error::Shape {
            tensor: "a.q".into(),
            expected: vec![64, 32],
            given: vec![32, 64],
        })
    );
    let other = |rank, alpha| {
        let config = QLoraLinearConfig::new(rank).with_alpha(alpha);
        config.init(base(), &device).expect("valid")
    };
    assert!(adapter.insert_layer("a.q", &other(8, 8.0)).is_ok());
    assert!(matches!(
        adapter.insert_layer("a.q", &other(8, 16.0)),
        Err(Nf4Error::Config { field: "scale", .. })
    ));
    assert!(matches!(
        adapter.insert_layer("a.q", &other(4, 4.0)),
        Err(Nf4Error::Shape { .. })
    ));
}

#[test]
fn a_folder_without_the_files_is_an_error_that_names_them() {
    let folder = TempDir::new().expect("a folder");
    let missing = |file: &str| match Adapter::open(folder.path()) {
        Err(Nf4Error::Io { path, .. }) => assert_eq!(path, folder.path().join(file)),
        other => panic!("{other:?}"),
    };
    missing(CONFIG_FILE);
    let config = fixtures().join("adapter_final").join(CONFIG_FILE);
    fs::copy(config, folder.path().join(CONFIG_FILE)).expect("it can be written");
    missing(ADAPTER_FILE);
}

/// Bytes changed, or the end cut off.
fn mutated(bytes: &[u8], changes: &[(prop::sample::Index, u8)], cut: Option<usize>) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (index, byte) in changes {
        let index = index.index(bytes.len());
        bytes[index] = *byte;
    }
    bytes.truncate(cut.unwrap_or(usize::MAX));
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is read is valid: it can be written, and read again to the same.
    #[test]
    fn damaged_folders_are_refused_or_read_without_a_panic(
        config in prop::collection::vec((any::<prop::sample::Index>(), 32u8..127), 0..4),
        header in prop::collection::vec((any::<prop::sample::Index>(), 32u8..127), 0..4),
        cut in prop::option::weighted(0.1, 0usize..4000),
    ) {
        let source = fixtures().join("adapter_final");
        let read = |file: &str| fs::read(source.join(file)).expect("it is there");
        let folder = TempDir::new().expect("a folder");
        let json = mutated(&read(CONFIG_FILE), &config, cut.filter(|cut| cut % 2 == 0));
        fs::write(folder.path().join(CONFIG_FILE), json).expect("it can be written");
        let mut tensors = read(ADAPTER_FILE);
        let end = 8 + u64::from_le_bytes(*tensors.first_chunk().expect("a header")) as usize;
        // The data would only change values.
        let changed = mutated(&tensors[8..end], &header, None);
        tensors[8..end].copy_from_slice(&changed);
        tensors.truncate(cut.filter(|cut| cut % 2 == 1).unwrap_or(usize::MAX));
        fs::write(folder.path().join(ADAPTER_FILE), tensors).expect("it can be written");

        if let Ok(adapter) = Adapter::open(folder.path()) {
            let copy = TempDir::new().expect("a folder");
            adapter.save(copy.path()).expect("it can be written");
            let again = Adapter::open(copy.path()).expect("it was valid");
            prop_assert_eq!(again.config(), adapter.config());
            prop_assert!(again.modules().eq(adapter.modules()));
        }
    }
}
