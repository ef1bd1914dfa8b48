//! From a folder of float weights to one of quantized weights, and back.

mod claim;
mod decode;
mod dense;
mod dequantize;
mod entry;
mod expert_stacks;
mod fused;
mod model_config;
mod options;
mod quantize;
mod select;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::file::check_fetched;
use super::folder::Checkpoint;
use super::names::{CONFIG_FILE, QUANT_CONFIG_FILE, is_model_file, names_in};
use super::progress::{Counter, Progress};
use super::values::WeightLoss;
use super::writer::{CheckpointWriter, Written};
use crate::error::Nf4Error;
use crate::format::QuantType;

pub(crate) use claim::Claim;
pub(crate) use decode::check_decodes;
#[cfg(feature = "peft")]
pub(crate) use decode::decode;
#[cfg(feature = "peft")]
pub(crate) use dense::write_dense;
pub use dequantize::dequantize_checkpoint;
#[cfg(feature = "peft")]
pub(crate) use entry::Quantized;
pub(crate) use model_config::ModelConfig;
pub use options::{DequantizeOptions, QuantizeOptions};
#[cfg(feature = "peft")]
pub(crate) use quantize::quantize;
pub use quantize::quantize_checkpoint;
pub use select::is_expert;
pub(crate) use select::is_kept_by_default;
#[cfg(feature = "peft")]
pub(crate) use select::{
    SkipPattern, check_used, ignore_entry, is_embedding, is_head, skip_entry_of,
};
pub(super) use select::{TIED_HEAD, TIED_TABLE};

/// What a conversion did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Converted {
    /// Parameters quantized or dequantized.
    pub converted: usize,
    /// Parameters that stayed what they were, but perhaps for their dtype.
    pub kept: usize,
    /// Of the parameters kept, those that were quantized in the source in another way and are floats in the
    /// result.
    pub decoded: Vec<String>,
    /// Of the parameters kept, those that were to be quantized and whose rows are not made of whole
    /// blocks.
    pub ragged: Vec<String>,
    /// Scales of activations, which only have a meaning beside the weights as they were: they are not
    /// in the result.
    pub dropped: Vec<String>,
    /// How far each parameter that was quantized is from what it was in the source.
    pub losses: BTreeMap<String, WeightLoss>,
    /// The types in which weights were quantized before, and how many of the parameters that were quantized
    /// had each. What these have lost before is not in their losses.
    pub requantized: Vec<(QuantType, usize)>,
    /// Bytes of the source's tensors.
    pub source_bytes: usize,
    /// The new files.
    pub written: Written,
}

impl Converted {
    /// How far all parameters that were quantized are from what they were in the source.
    pub fn loss(&self) -> WeightLoss {
        let losses = self.losses.values().copied();
        losses.fold(WeightLoss::default(), WeightLoss::and)
    }
}

/// Extensions of files that hold weights in one form or another, which the new ones replace.
const WEIGHT_EXTENSIONS: [&str; 10] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "h5",
    "msgpack",
    "onnx",
    "gguf",
    "ot",
];

/// Folders of small files that belong to a tokenizer.
const TEMPLATE_FOLDERS: [&str; 2] = ["additional_chat_templates", "chat_templates"];

/// Refuses a source that is not what it claims to be.
///
/// # Errors
/// The first of [`Checkpoint::faults`].
pub(crate) fn check_source(source: &Checkpoint) -> Result<(), Nf4Error> {
    match source.faults().into_iter().next() {
        None => Ok(()),
        Some(fault) => Err(fault),
    }
}

/// Refuses to write a folder into itself, then starts it.
pub(crate) fn start_writer(
    source: &Checkpoint,
    folder: &Path,
    max_shard_bytes: usize,
    overwrite: bool,
) -> Result<CheckpointWriter, Nf4Error> {
    let own = source_folder(source).and_then(|folder| folder.canonicalize().ok());
    if own.is_some() && own == folder.canonicalize().ok() {
        return Err(Nf4Error::Config {
            field: "folder",
            expected: "another folder than the source",
            given: folder.display().to_string(),
        });
    }
    if overwrite {
        CheckpointWriter::overwrite(folder, max_shard_bytes)
    } else {
        CheckpointWriter::create(folder, max_shard_bytes)
    }
}

/// The folder that was opened; a single file has none that would be its own.
pub(crate) fn source_folder(source: &Checkpoint) -> Option<&Path> {
    source.path().is_dir().then(|| source.path())
}

/// What becomes of the file in which ModelOpt says how weights are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClaimFile {
    /// It holds for the new folder too.
    #[cfg_attr(
        not(feature = "peft"),
        allow(dead_code, reason = "merges keep what a folder claims")
    )]
    Kept,
    /// The new folder says something else.
    Replaced,
}

/// Copies tokenizer, chat templates, generation settings and the like: every file that holds
/// neither weights nor the model's configuration.
///
/// # Errors
/// [`Nf4Error::GitLfsPointer`] for a file that Git LFS has not fetched, [`Nf4Error::Io`].
pub(crate) fn copy_other_files(
    writer: &mut CheckpointWriter,
    source: &Checkpoint,
    claim: ClaimFile,
) -> Result<(), Nf4Error> {
    let Some(folder) = source_folder(source) else {
        return Ok(());
    };
    let left_out = |name: &str| claim == ClaimFile::Replaced && name == QUANT_CONFIG_FILE;
    copy_files(writer, folder, "", left_out)?;
    for name in TEMPLATE_FOLDERS {
        let templates = folder.join(name);
        if templates.is_dir() {
            copy_files(writer, &templates, &format!("{name}/"), |_| false)?;
        }
    }
    Ok(())
}

fn copy_files(
    writer: &mut CheckpointWriter,
    folder: &Path,
    prefix: &str,
    left_out: impl Fn(&str) -> bool,
) -> Result<(), Nf4Error> {
    for name in names_in(folder)? {
        if is_replaced(&name) || left_out(&name) {
            continue;
        }
        let path = folder.join(&name);
        // Links are followed: a folder of the Hub's cache consists of them.
        let metadata = fs::metadata(&path).map_err(Nf4Error::io(&path))?;
        if metadata.is_file() {
            check_fetched(&path)?;
            writer.copy_file(&format!("{prefix}{name}"), &path)?;
        }
    }
    Ok(())
}

/// Whether a file must not come along: it holds weights, says where they lie, or would make transformers look
/// for an adapter.
fn is_replaced(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|ext| ext.to_str());
    name.starts_with('.')
        || name == CONFIG_FILE
        || name == "adapter_config.json"
        || name.ends_with(".index.json")
        || is_model_file(name)
        || extension.is_some_and(|extension| WEIGHT_EXTENSIONS.contains(&extension))
}

/// Counts the parameters of a source.
pub(crate) struct Reporter<'a, F> {
    source: &'a Checkpoint,
    counter: Counter<F>,
}

impl<'a, F: FnMut(Progress<'_>)> Reporter<'a, F> {
    pub(crate) fn new(source: &'a Checkpoint, parameters_total: usize, callback: F) -> Self {
        Self {
            source,
            counter: Counter::new(parameters_total, source.size_bytes(), callback),
        }
    }

    pub(crate) fn done(&mut self, parameter: &str) {
        let size_bytes = self.source.parameter_bytes(parameter);
        self.counter.done(parameter, size_bytes);
    }
}
