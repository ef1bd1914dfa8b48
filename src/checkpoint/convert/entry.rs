//! What `config.json` says of quantized weights.

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::format::{FloatType, QuantConfig, QuantType};

/// How the weights of a folder are quantized, and which are not.
pub(crate) struct Quantized<'a> {
    pub config: QuantConfig,
    /// The dtype of bitsandbytes' codes.
    pub storage: Dtype,
    /// What transformers computes in.
    pub compute_dtype: FloatType,
    /// bitsandbytes' `llm_int8_skip_modules`.
    pub skip_entry: Option<&'a [String]>,
    /// The modules that the other methods leave as they are.
    pub ignore: &'a [String],
    /// Whether embeddings are quantized too.
    pub embeddings: bool,
    /// Whether what is in MXFP4 is stacks of experts, as gpt-oss has them.
    pub expert_stacks: bool,
}

/// The version of compressed-tensors whose entry this is.
const COMPRESSED_TENSORS: &str = "0.20.0";

impl Quantized<'_> {
    /// The `quantization_config`.
    pub fn entry(&self) -> Value {
        match self.config.quant_type {
            QuantType::Nf4 | QuantType::Fp4 => self.bitsandbytes(),
            QuantType::Nvfp4 => self.compressed_tensors(
                "nvfp4-pack-quantized",
                json!({
                    "dynamic": false,
                    "group_size": self.config.block_size.elems(),
                    "num_bits": 4,
                    "scale_dtype": "torch.float8_e4m3fn",
                    "strategy": "tensor_group",
                    "symmetric": true,
                    "type": "float",
                }),
            ),
            QuantType::Mxfp4 if self.expert_stacks => json!({
                "modules_to_not_convert": self.ignore,
                "quant_method": "mxfp4",
            }),
            QuantType::Mxfp4 => self.compressed_tensors(
                "mxfp4-pack-quantized",
                json!({
                    "dynamic": false,
                    "group_size": self.config.block_size.elems(),
                    "num_bits": 4,
                    "scale_dtype": "torch.uint8",
                    "strategy": "group",
                    "symmetric": true,
                    "type": "float",
                }),
            ),
            QuantType::Fp8Channel => self.compressed_tensors(
                "float-quantized",
                json!({
                    "dynamic": false,
                    "group_size": null,
                    "num_bits": 8,
                    "strategy": "channel",
                    "symmetric": true,
                    "type": "float",
                }),
            ),
            QuantType::Fp8Block => self.fp8(),
        }
    }

    /// What transformers 5.17 writes for a model in 4 bit.
    fn bitsandbytes(&self) -> Value {
        let storage = match self.storage {
            Dtype::BF16 => FloatType::BF16.name(),
            Dtype::F16 => FloatType::F16.name(),
            Dtype::F32 => FloatType::F32.name(),
            _ => "uint8",
        };
        json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": self.compute_dtype.name(),
            "bnb_4bit_quant_storage": storage,
            "bnb_4bit_quant_type": self.config.quant_type.name(),
            "bnb_4bit_use_double_quant": self.config.nested_block_size.is_some(),
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": self.skip_entry,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        })
    }

    /// What compressed-tensors 0.20 writes for a model with quantized weights and float activations.
    fn compressed_tensors(&self, format: &str, weights: Value) -> Value {
        let mut targets = vec!["Linear"];
        if self.embeddings {
            targets.push("Embedding");
        }
        json!({
            "config_groups": {
                "group_0": {
                    "format": format,
                    "input_activations": null,
                    "output_activations": null,
                    "targets": targets,
                    "weights": weights,
                },
            },
            "format": format,
            "global_compression_ratio": null,
            "ignore": self.ignore,
            "kv_cache_scheme": null,
            "moe_sparsity_config": null,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": COMPRESSED_TENSORS,
        })
    }

    /// What transformers 5.24 reads for weights in tiles, as DeepSeek's models have it.
    fn fp8(&self) -> Value {
        let side = self.config.block_size.elems();
        json!({
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": self.ignore,
            "quant_method": "fp8",
            "weight_block_size": [side, side],
        })
    }
}
