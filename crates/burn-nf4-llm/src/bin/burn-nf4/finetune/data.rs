//! The texts of a run.

use std::path::{Path, PathBuf};

use burn_nf4_llm::ModelError;
use burn_nf4_llm::model::DecoderConfig;
use burn_nf4_llm::text::Text;
use burn_nf4_llm::train::data::{Dataset, Predict};
use clap::{Args, ValueEnum};

use crate::model_args::at_least;

/// The texts to train on, and those to evaluate with.
#[derive(Args, Clone, Debug)]
pub struct DataArgs {
    /// A .txt file, or a .jsonl or .json file of objects with `text`, `messages`, or `prompt` and `completion`
    #[arg(long)]
    pub data: PathBuf,
    /// Examples to evaluate with, in a file of the same kinds
    #[arg(long, value_name = "FILE", conflicts_with = "eval_split")]
    pub eval_data: Option<PathBuf>,
    /// Evaluate with a part of the examples, drawn by --seed, such as 0.05, and train on the others
    #[arg(long, value_name = "FRACTION")]
    pub eval_split: Option<f64>,
    /// Evaluate every so many steps [default: after every epoch]; always after the last one too
    #[arg(long, value_name = "STEPS")]
    pub eval_every: Option<usize>,
    /// Most tokens of an example, and of a row of packed ones
    #[arg(long, default_value_t = 512)]
    pub seq_len: usize,
    /// When to put several examples into a row of --seq-len: no token sees another example's
    #[arg(long, value_enum, default_value_t = Packing::Text)]
    pub packing: Packing,
    /// Predict prompts too: by default only what the assistant says, and completions
    #[arg(long)]
    pub train_on_prompts: bool,
    /// The chat template: the name of one that the model has, or a file
    #[arg(long)]
    pub chat_template: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Packing {
    /// Files of plain text only
    Text,
    /// Conversations and completions too
    Always,
    /// Every example is a row of its own
    Never,
}

/// What was read.
pub struct Data {
    pub train: Dataset,
    pub eval: Option<Dataset>,
    /// Steps between evaluations, if not an epoch.
    eval_every: Option<usize>,
}

impl Data {
    /// Steps between evaluations.
    pub fn eval_every(&self, per_epoch: usize) -> usize {
        self.eval_every.unwrap_or(per_epoch)
    }
}

impl DataArgs {
    /// Refuses what cannot be served, before anything is read.
    pub fn check(&self) -> Result<(), ModelError> {
        at_least(2, "--seq-len", self.seq_len)?;
        at_least(1, "--eval-every", self.eval_every.unwrap_or(1))?;
        if let Some(split) = self.eval_split
            && !(split > 0.0 && split < 1.0)
        {
            let expected = "a number between 0 and 1";
            return Err(ModelError::setting("--eval-split", split, expected));
        }
        match self.eval_every {
            Some(every) if self.eval_data.is_none() && self.eval_split.is_none() => {
                let expected = "--eval-data or --eval-split beside it";
                Err(ModelError::setting("--eval-every", every, expected))
            }
            _ => Ok(()),
        }
    }

    /// Reads the files.
    pub fn read(
        &self,
        text: &mut Text,
        config: &DecoderConfig,
        seed: u64,
    ) -> Result<Data, ModelError> {
        if let Some(template) = &self.chat_template {
            text.chat.choose(template)?;
        }
        let mut train = self.read_file(&self.data, text, config)?;
        let mut eval = match &self.eval_data {
            Some(path) => Some(self.read_file(path, text, config)?),
            None => None,
        };
        if let Some(fraction) = self.eval_split {
            let (rest, part) = train.split(fraction, seed)?;
            (train, eval) = (rest, Some(part));
        }
        Ok(Data {
            train: self.in_rows(train),
            eval: eval.map(|eval| self.in_rows(eval)),
            eval_every: self.eval_every,
        })
    }

    fn read_file(
        &self,
        path: &Path,
        text: &Text,
        config: &DecoderConfig,
    ) -> Result<Dataset, ModelError> {
        let predict = match self.train_on_prompts {
            true => Predict::All,
            false => Predict::Answers,
        };
        let eos = text.eos.or(config.eos_token_ids.first().copied());
        let data = Dataset::read(path, text, eos, self.seq_len, predict)?;
        data.check_vocabulary(config.vocab_size)?;
        let what = format!("the longest example of {}", path.display());
        if let Some(warning) = config.warn_of_length(&what, data.longest()) {
            eprintln!("{warning}");
        }
        Ok(data)
    }

    fn in_rows(&self, data: Dataset) -> Dataset {
        match self.packing {
            Packing::Always => data.pack(self.seq_len),
            Packing::Text if data.is_text => data.pack(self.seq_len),
            Packing::Text | Packing::Never => data,
        }
    }
}

/// What there is, for people: `3 examples in 2 rows, 1 cut at --seq-len`.
pub fn describe(data: &Dataset) -> String {
    let several = |count: usize, what: &str| match count {
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    };
    let mut text = several(data.len(), "example");
    if data.rows() < data.len() {
        text += &format!(" in {}", several(data.rows(), "row"));
    }
    for (count, what) in [
        (data.cut, "cut at --seq-len"),
        (data.left_out, "left out with nothing to predict"),
    ] {
        if count > 0 {
            text += &format!(", {count} {what}");
        }
    }
    text
}
