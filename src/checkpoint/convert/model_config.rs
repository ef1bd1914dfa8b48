//! The `config.json` of a folder.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::quantize::QuantizeOptions;
use super::{CONFIG_FILE, source_folder};
use crate::checkpoint::file::read_text;
use crate::checkpoint::python_json;
use crate::checkpoint::{Checkpoint, Dtype};
use crate::error::Nf4Error;
use crate::format::FloatType;

/// Models whose linear layers are transformers' `Conv1D`, with weights `[in, out]`.
const CONV1D_MODELS: [&str; 5] = [
    "gpt2",
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
    "clvp",
];

/// The names of the dtype entry: transformers 5's, and the one before.
const DTYPE_KEYS: [&str; 2] = ["dtype", "torch_dtype"];

const QUANTIZATION: &str = "quantization_config";

/// The entries, each as it was read unless it is set here.
#[derive(Debug)]
pub(crate) struct ModelConfig {
    entries: Map<String, Value>,
}

impl ModelConfig {
    /// Reads the file of a folder; `None` where there is none.
    ///
    /// # Errors
    /// [`Nf4Error::ModelConfig`] unless it holds a JSON object, [`Nf4Error::Io`].
    pub fn read(source: &Checkpoint) -> Result<Option<Self>, Nf4Error> {
        let Some(folder) = source_folder(source) else {
            return Ok(None);
        };
        let path: PathBuf = folder.join(CONFIG_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = read_text(&path)?;
        match python_json::from_slice(&text) {
            Ok(entries) => Ok(Some(Self { entries })),
            Err(error) => Err(Nf4Error::ModelConfig {
                path,
                message: error.to_string(),
            }),
        }
    }

    /// # Errors
    /// [`Nf4Error::Config`] for a model that is quantized or has transposed linear layers.
    pub fn check_quantizable(&self) -> Result<(), Nf4Error> {
        if self.quantization().is_some() {
            return Err(Nf4Error::Config {
                field: QUANTIZATION,
                expected: "none: float weights",
                given: self.method(),
            });
        }
        let model_type = self.entries.get("model_type").and_then(Value::as_str);
        match model_type.filter(|given| CONV1D_MODELS.contains(given)) {
            None => Ok(()),
            Some(given) => Err(Nf4Error::Config {
                field: "model_type",
                expected: "a model with linear weights [out, in]",
                given: given.into(),
            }),
        }
    }

    /// # Errors
    /// [`Nf4Error::Config`] for a model that is quantized otherwise than to 4 bit.
    pub fn check_dequantizable(&self) -> Result<(), Nf4Error> {
        let Some(quantization) = self.quantization() else {
            return Ok(());
        };
        // Older files name no method.
        let method = quantization.get("quant_method").and_then(Value::as_str);
        let in_8bit = quantization.get("load_in_8bit").and_then(Value::as_bool);
        if method.is_none_or(|method| method == "bitsandbytes") && in_8bit != Some(true) {
            return Ok(());
        }
        Err(Nf4Error::Config {
            field: QUANTIZATION,
            expected: "bitsandbytes in 4 bit",
            given: self.method(),
        })
    }

    fn quantization(&self) -> Option<&Value> {
        self.entries
            .get(QUANTIZATION)
            .filter(|value| !value.is_null())
    }

    fn method(&self) -> String {
        let method = self
            .quantization()
            .and_then(|config| config.get("quant_method")?.as_str());
        method.unwrap_or("unnamed").into()
    }

    /// Enters what transformers 5.17 writes for a model in 4 bit.
    pub fn set_quantized(
        &mut self,
        options: &QuantizeOptions,
        compute_dtype: FloatType,
        skip_entry: Option<&[String]>,
    ) {
        let storage = match options.storage {
            Dtype::BF16 => FloatType::BF16.name(),
            Dtype::F16 => FloatType::F16.name(),
            Dtype::F32 => FloatType::F32.name(),
            _ => "uint8",
        };
        let quantization = json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": compute_dtype.name(),
            "bnb_4bit_quant_storage": storage,
            "bnb_4bit_quant_type": options.config.quant_type.name(),
            "bnb_4bit_use_double_quant": options.config.nested_block_size.is_some(),
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": skip_entry,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        });
        self.entries.insert(QUANTIZATION.into(), quantization);
    }

    /// Whether it says that the output head is the embedding.
    pub fn ties_embeddings(&self) -> bool {
        let tied = self.entries.get("tie_word_embeddings");
        tied.and_then(Value::as_bool) == Some(true)
    }

    /// Takes out the quantization.
    pub fn set_dense(&mut self) {
        self.entries.remove(QUANTIZATION);
    }

    /// Enters the dtype of the weights, also in the parts of a composed model that name one.
    pub fn set_dtype(&mut self, dtype: FloatType) {
        for part in self.entries.values_mut().filter_map(Value::as_object_mut) {
            replace_dtype(part, dtype);
        }
        if !replace_dtype(&mut self.entries, dtype) {
            self.entries
                .insert(DTYPE_KEYS[0].into(), dtype.name().into());
        }
    }

    /// The text, as transformers writes it: indented, keys sorted.
    pub fn to_json(&self) -> String {
        // A map of values always has a text.
        python_json::to_string_pretty(&self.entries).unwrap_or_default() + "\n"
    }
}

/// Whether there was an entry to replace.
fn replace_dtype(entries: &mut Map<String, Value>, dtype: FloatType) -> bool {
    let mut replaced = false;
    for key in DTYPE_KEYS {
        if let Some(entry) = entries.get_mut(key) {
            *entry = dtype.name().into();
            replaced = true;
        }
    }
    replaced
}
