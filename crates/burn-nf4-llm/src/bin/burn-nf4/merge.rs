//! The command `merge`.

use std::path::PathBuf;

use burn_nf4::checkpoint::{Checkpoint, is_expert};
use burn_nf4::peft::{Adapter, MergeOptions, Merged, merge_4bit, merge_16bit};
use burn_nf4_llm::ModelError;
use clap::Args;

use crate::args::{FloatArg, parse_bytes};
use crate::convert::stacked_experts;
use crate::model_args::lacking;
use crate::output;
use crate::progress::Bar;

#[derive(Args, Debug)]
pub struct MergeArgs {
    /// Folder of the base model, in float weights or quantized
    base: PathBuf,
    /// PEFT folder
    adapter: PathBuf,
    /// Folder to write
    folder: PathBuf,
    /// Quantize again what was quantized, in the type and form of the base model, which loses something: how
    /// much is printed. Without it all weights become float ones
    #[arg(long, conflicts_with = "dtype")]
    requantize: bool,
    /// Type of all float weights of the result [default: the type each had]
    #[arg(long)]
    dtype: Option<FloatArg>,
    /// Merge an adapter even if it lacks layers that its settings name
    #[arg(long)]
    allow_missing: bool,
    /// Most bytes of tensors in a file, such as 5GB
    #[arg(long, value_parser = parse_bytes, default_value = "50GB")]
    max_shard_size: usize,
    /// Write into a folder that is not empty
    #[arg(long)]
    overwrite: bool,
}

impl MergeArgs {
    pub fn run(&self) -> Result<(), ModelError> {
        let options = MergeOptions {
            max_shard_bytes: self.max_shard_size,
            overwrite: self.overwrite,
            allow_missing: self.allow_missing,
        };
        let base = Checkpoint::open(&self.base)?;
        let adapter = match self.allow_missing {
            true => Adapter::open_partial(&self.adapter),
            false => Adapter::open(&self.adapter),
        };
        let adapter = adapter.map_err(|error| lacking(&self.adapter, error))?;
        let mut modules = adapter.modules().map(|(path, _)| path);
        if let Some(stack) = stacked_experts(&base)
            && let Some(expert) = modules.find(|path| is_expert(path))
        {
            return Err(ModelError::setting(
                "the base model",
                format!(
                    "{}, which has the experts of a layer in one tensor, `{stack}`",
                    self.base.display()
                ),
                format!("a tensor for each expert, as the adapter changes `{expert}`"),
            ));
        }
        let bar = Bar::new("merge");
        let show = |progress: burn_nf4::checkpoint::Progress<'_>| bar.show(progress);
        let merged = match self.requantize {
            true => merge_4bit(&base, &adapter, &self.folder, &options, show),
            false => {
                let dtype = self.dtype.map(Into::into);
                merge_16bit(&base, &adapter, &self.folder, dtype, &options, show)
            }
        };
        drop(bar);
        let merged = merged.map_err(|error| lacking(&self.adapter, error))?;
        output::show(self.summary(&merged))
    }

    fn summary(&self, merged: &Merged) -> String {
        let mut text = format!(
            "merged {} modules, replaced {} parameters, kept {}: {} bytes in {} file(s) in {}\n",
            merged.modules.len(),
            merged.replaced,
            merged.kept,
            merged.written.size_bytes,
            merged.written.files.len(),
            self.folder.display()
        );
        if self.requantize {
            let loss = merged.loss;
            text += &format!(
                "requantizing moved the adapted weights by {:.3e} (root mean square, relative), where \
                 the adapter had moved them by {:.3e}; the largest error is {:.3e}\n",
                loss.relative_rms, loss.relative_update, loss.max_abs
            );
            if loss.relative_rms > 0.5 * loss.relative_update {
                text += "warning: that is more than half of what was trained; a merge without --requantize keeps it\n";
            }
        }
        text
    }
}
