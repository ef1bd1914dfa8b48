//! The golden files of NVFP4, MXFP4 and FP8: weights by compressed-tensors, ModelOpt's and DeepSeek's
//! rules and transformers' gpt-oss, with what each decodes to.
//!
//! Shared by the integration tests, each of which uses a part of it.
#![allow(dead_code)]

use burn_nf4::checkpoint::SafetensorsFile;
use burn_nf4::format::{
    Absmax, BlockTensor, CodedScales, FloatType, QuantConfig, QuantType, TensorScale,
};

/// One golden file.
pub struct BlockFile {
    pub name: String,
    pub tensor: BlockTensor,
    /// The weight that was quantized; gpt-oss' codes and scales are random.
    pub source: Option<Vec<f32>>,
    pub dequantized: Vec<f32>,
}

/// All 17 files, without extension.
pub const NAMES: [&str; 17] = [
    "fp8_block128_200x300",
    "fp8_block128_256x384",
    "fp8_channel_200x300",
    "fp8_channel_256x384",
    "mxfp4_ct_128x256",
    "mxfp4_ct_17x64",
    "mxfp4_ct_1x32",
    "mxfp4_ct_96x160",
    "mxfp4_gpt_oss",
    "nvfp4_ct_128x256",
    "nvfp4_ct_17x64",
    "nvfp4_ct_1x32",
    "nvfp4_ct_96x160",
    "nvfp4_modelopt_128x256",
    "nvfp4_modelopt_17x64",
    "nvfp4_modelopt_1x32",
    "nvfp4_modelopt_96x160",
];

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (quads, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty());
    quads.iter().map(|&quad| f32::from_le_bytes(quad)).collect()
}

/// Puts a weight together from the tensors of its file, without the crate's readers.
pub fn load(name: &str) -> BlockFile {
    let file = SafetensorsFile::open(format!("tests/fixtures/fp4/{name}.safetensors"))
        .expect("a golden file");
    let bytes = |key: &str| file.tensor_bytes(key).expect("in the file").to_vec();
    let coded = |codes: &str, tensor_scale| {
        Absmax::Coded(CodedScales {
            codes: bytes(codes),
            tensor_scale,
        })
    };
    let start = name.rsplit_once('_').map_or(name, |(start, _)| start);
    let (quant_type, codes, scales) = match start {
        "nvfp4_ct" => {
            let global = floats(&bytes("weight_global_scale"))[0];
            let scales = coded("weight_scale", TensorScale::Divides(global));
            (QuantType::Nvfp4, "weight_packed", scales)
        }
        "nvfp4_modelopt" => {
            let second = floats(&bytes("weight_scale_2"))[0];
            let scales = coded("weight_scale", TensorScale::Multiplies(second));
            (QuantType::Nvfp4, "weight", scales)
        }
        "mxfp4_ct" => {
            let scales = coded("weight_scale", TensorScale::None);
            (QuantType::Mxfp4, "weight_packed", scales)
        }
        "mxfp4_gpt" => {
            let scales = coded("gate_up_proj_scales", TensorScale::None);
            (QuantType::Mxfp4, "gate_up_proj_blocks", scales)
        }
        "fp8_block128" => {
            let scales = Absmax::Flat(floats(&bytes("weight_scale_inv")));
            (QuantType::Fp8Block, "weight", scales)
        }
        _ => {
            let scales = Absmax::Flat(floats(&bytes("weight_scale")));
            (QuantType::Fp8Channel, "weight", scales)
        }
    };
    let shape = file
        .tensor_info("dequantized")
        .expect("in the file")
        .shape
        .to_vec();
    let block_size = QuantConfig::of(quant_type).block_size;
    let dtype = FloatType::F32;
    let tensor =
        BlockTensor::from_parts(bytes(codes), scales, shape, block_size, dtype, quant_type)
            .expect("a consistent weight");
    BlockFile {
        name: name.into(),
        tensor,
        source: file.tensor_bytes("source").ok().map(floats),
        dequantized: floats(&bytes("dequantized")),
    }
}
