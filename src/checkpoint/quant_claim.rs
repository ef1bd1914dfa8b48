//! What a `quantization_config` says of weights in NVFP4, MXFP4 and FP8.

mod compressed_tensors;
mod matching;
mod modelopt;

use std::fmt;

use serde_json::Value;

use super::block_weight::TILE;
use super::convert::{Claim, ModelConfig};
use super::file::read_text;
use super::folder::Checkpoint;
use super::names::QUANT_CONFIG_FILE;
use super::python_json;
use crate::error::Nf4Error;
use crate::format::QuantType;

pub(super) use matching::Modules;

/// Which library's description of quantized weights it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantMethod {
    /// compressed-tensors, of llm-compressor and vLLM.
    CompressedTensors,
    /// NVIDIA's ModelOpt, in `config.json` or in a `hf_quant_config.json` of its own.
    ModelOpt,
    /// FP8 as DeepSeek's models have it.
    Fp8,
    /// The experts of gpt-oss.
    Mxfp4,
}

/// A `quantization_config` of such a library: which modules are quantized, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantClaim {
    /// Where it was found: a part of a composed model such as `text_config`, `hf_quant_config.json`, or
    /// empty for the model itself.
    pub part: String,
    /// The library.
    pub method: QuantMethod,
    /// The groups of modules; more than one where a model mixes formats.
    pub groups: Vec<QuantGroup>,
    /// Modules that stay floats although a group targets them, as the file has them: names, and patterns of
    /// the kind that the library has.
    pub ignore: Vec<String>,
    /// Whether the keys and values that attention keeps are to be quantized.
    pub quantizes_cache: bool,
    /// Rows and columns of a tile of FP8, where it says so.
    pub tile: Option<Vec<u64>>,
}

/// Modules that are quantized alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantGroup {
    /// Its name.
    pub name: String,
    /// The modules: names, patterns of the kind that the library has, and classes such as `Linear`.
    pub targets: Vec<String>,
    /// What their weights are.
    pub weights: GroupWeights,
}

/// What the weights of a group are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupWeights {
    /// In a format that is read.
    Quantized(QuantType),
    /// Floats: the group is about activations.
    Float,
    /// In a format that is not read, or in none that can be understood.
    Other(String),
}

impl QuantMethod {
    /// As in `quant_method`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::CompressedTensors => "compressed-tensors",
            Self::ModelOpt => "modelopt",
            Self::Fp8 => "fp8",
            Self::Mxfp4 => "mxfp4",
        }
    }
}

impl QuantClaim {
    /// Reads a claim; `None` for one of another method.
    pub(super) fn of(claim: &Claim) -> Option<Self> {
        let value = claim.value();
        let method = match value.get("quant_method")?.as_str()? {
            "compressed-tensors" => QuantMethod::CompressedTensors,
            "modelopt" => QuantMethod::ModelOpt,
            "fp8" => QuantMethod::Fp8,
            "mxfp4" => QuantMethod::Mxfp4,
            _ => return None,
        };
        let part = claim.part().to_string();
        Some(match method {
            QuantMethod::CompressedTensors => compressed_tensors::claim(part, value),
            QuantMethod::ModelOpt => modelopt::claim(part, value),
            QuantMethod::Fp8 => fp8(part, value),
            QuantMethod::Mxfp4 => Self {
                ignore: strings(value.get("modules_to_not_convert")),
                ..Self::new(part, method, vec![mxfp4_experts()])
            },
        })
    }

    fn new(part: String, method: QuantMethod, groups: Vec<QuantGroup>) -> Self {
        Self {
            part,
            method,
            groups,
            ignore: Vec::new(),
            quantizes_cache: false,
            tile: None,
        }
    }

    /// The errors for groups that are not read.
    pub(super) fn check(&self) -> Vec<Nf4Error> {
        let other = |group: &QuantGroup| {
            match &group.weights {
            GroupWeights::Other(what) => Some(self.fault(
                "bitsandbytes in 4 bit, NVFP4, MXFP4, FP8 by rows or in tiles of 128 by 128, or none",
                format!("{what} in `{}`", group.name),
            )),
            _ => None,
        }
        };
        self.groups.iter().filter_map(other).collect()
    }

    /// An error about what the claim says.
    pub(super) fn fault(&self, expected: &'static str, given: String) -> Nf4Error {
        Nf4Error::Config {
            field: Claim::FIELD,
            expected,
            given: format!("{self}: {given}"),
        }
    }
}

/// The library, and where.
impl fmt::Display for QuantClaim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.method.name())?;
        match self.part.as_str() {
            "" => Ok(()),
            part => write!(f, " in {part}"),
        }
    }
}

impl Checkpoint {
    /// What `config.json` and `hf_quant_config.json` say of weights in NVFP4, MXFP4 and FP8; nothing for a
    /// single file. Of the two ModelOpt writes both, and the first counts where it says anything.
    ///
    /// ```no_run
    /// use burn_nf4::checkpoint::{Checkpoint, GroupWeights};
    /// use burn_nf4::format::QuantType;
    ///
    /// let checkpoint = Checkpoint::open("Qwen3-8B-NVFP4")?;
    /// for claim in checkpoint.quant_claims()? {
    ///     let in_nvfp4 = GroupWeights::Quantized(QuantType::Nvfp4);
    ///     assert!(claim.groups.iter().all(|group| group.weights == in_nvfp4));
    ///     println!("all but {:?}", claim.ignore);
    /// }
    /// # Ok::<(), burn_nf4::Nf4Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Nf4Error::ModelConfig`], [`Nf4Error::Io`] for a file that cannot be read.
    pub fn quant_claims(&self) -> Result<Vec<QuantClaim>, Nf4Error> {
        let config = ModelConfig::read(self)?;
        let claims = config.map(|config| config.claims()).unwrap_or_default();
        let claims: Vec<QuantClaim> = claims.iter().filter_map(QuantClaim::of).collect();
        match claims.is_empty() {
            false => Ok(claims),
            true => Ok(self.own_file_of_modelopt()?.into_iter().collect()),
        }
    }

    fn own_file_of_modelopt(&self) -> Result<Option<QuantClaim>, Nf4Error> {
        let path = self.path().join(QUANT_CONFIG_FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let value: Value =
            python_json::from_slice(&read_text(&path)?).map_err(|error| Nf4Error::ModelConfig {
                path: path.clone(),
                message: error.to_string(),
            })?;
        match value.get("quantization") {
            Some(Value::Object(_)) => Ok(modelopt::own_file(&value)),
            _ => Err(Nf4Error::ModelConfig {
                path,
                message: "has no `quantization`, expected an object".into(),
            }),
        }
    }
}

fn fp8(part: String, value: &Value) -> QuantClaim {
    let tile = value.get("weight_block_size").and_then(integers);
    let format = value.get("fmt").and_then(Value::as_str);
    let weights = match (&tile, format) {
        (_, Some(format)) if format != "e4m3" => {
            GroupWeights::Other(format!("weights in the format {format}"))
        }
        (None, _) => GroupWeights::Quantized(QuantType::Fp8Channel),
        (Some(tile), _) => weights_of_tile(tile),
    };
    let group = QuantGroup {
        name: "fp8".into(),
        targets: vec![LINEAR.into()],
        weights,
    };
    let lists = ["modules_to_not_convert", "ignored_layers"];
    QuantClaim {
        ignore: lists
            .iter()
            .flat_map(|key| strings(value.get(*key)))
            .collect(),
        tile,
        ..QuantClaim::new(part, QuantMethod::Fp8, vec![group])
    }
}

fn mxfp4_experts() -> QuantGroup {
    QuantGroup {
        name: "experts".into(),
        targets: vec!["experts".into()],
        weights: GroupWeights::Quantized(QuantType::Mxfp4),
    }
}

/// The class of layers that groups target as a rule.
const LINEAR: &str = "Linear";

fn weights_of_tile(tile: &[u64]) -> GroupWeights {
    match tile == TILE.map(|side| side as u64) {
        true => GroupWeights::Quantized(QuantType::Fp8Block),
        false => GroupWeights::Other(format!("FP8 in tiles of {tile:?}")),
    }
}

/// The strings of a list; none of what is no list.
fn strings(value: Option<&Value>) -> Vec<String> {
    let items = value.and_then(Value::as_array).into_iter().flatten();
    let strings = items.filter_map(Value::as_str);
    strings.map(str::to_string).collect()
}

fn integers(value: &Value) -> Option<Vec<u64>> {
    let numbers = value.as_array()?.iter().map(Value::as_u64);
    // One that is negative or none is no size.
    Some(numbers.map(Option::unwrap_or_default).collect())
}
