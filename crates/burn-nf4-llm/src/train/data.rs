//! Training texts as batches of tokens.

use std::path::Path;

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::error::ModelError;
use crate::generate::check_ids;
use crate::text::Text;
use crate::text::chat::Ending;
use crate::text::plain_text::{self, with_unix_lines};
use crate::train::records::{self, Record};

/// Tokenized examples.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    examples: Vec<Vec<u32>>,
    /// Examples of the file that were cut off.
    pub cut: usize,
    /// Examples that were left out because they have no token to be predicted.
    pub left_out: usize,
}

/// Rows of tokens, padded on the right to one length.
///
/// Padding needs no mask in the model: it comes after every token that could see it. It is left
/// out of the loss.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// `[rows, length]`, row after row.
    pub ids: Vec<i64>,
    /// Texts.
    pub rows: usize,
    /// Tokens of the longest, to which the others are padded.
    pub length: usize,
    /// Tokens of each row.
    pub lengths: Vec<usize>,
}

impl Dataset {
    /// Reads a `.txt` file, cut into pieces of `length` tokens, or a `.jsonl` or `.json` file of
    /// examples (`text`, or `messages` for the chat template), each cut off at `length` tokens.
    pub fn read(
        path: &Path,
        text: &Text,
        eos: Option<u32>,
        length: usize,
    ) -> Result<Self, ModelError> {
        if length < 2 {
            return Err(ModelError::setting(
                "the sequence length",
                length,
                "at least 2",
            ));
        }
        let extension = path.extension().and_then(|extension| extension.to_str());
        let extension = extension.unwrap_or_default().to_lowercase();
        if !["txt", "jsonl", "json"].contains(&extension.as_str()) {
            return Err(ModelError::setting(
                "the data",
                path.display(),
                "a .txt, .jsonl or .json file",
            ));
        }
        let content = plain_text::read(path)?;
        if extension == "txt" {
            let ids = text.encode(&with_unix_lines(&content))?;
            return Self::new(ids.chunks(length).map(<[u32]>::to_vec).collect());
        }
        let mut cut = 0;
        let mut examples = Vec::new();
        for (place, record) in records::parse(&content, path)? {
            let mut ids = match record {
                Record::Text(example) => {
                    let mut ids = text.encode(&example)?;
                    ids.extend(eos);
                    ids
                }
                Record::Conversation(conversation) => text
                    .encode_chat(&conversation, Ending::Whole)
                    .map_err(|error| place.error(path, error))?,
            };
            cut += usize::from(ids.len() > length);
            ids.truncate(length);
            examples.push(ids);
        }
        Ok(Self {
            cut,
            ..Self::new(examples)?
        })
    }

    /// A dataset of tokens. Examples too short to predict anything are left out.
    pub fn new(mut examples: Vec<Vec<u32>>) -> Result<Self, ModelError> {
        let given = examples.len();
        examples.retain(|example| example.len() >= 2);
        if examples.is_empty() {
            return Err(ModelError::setting(
                "the data",
                format!("{given} examples, none of two tokens or more"),
                "at least one such",
            ));
        }
        Ok(Self {
            left_out: given - examples.len(),
            examples,
            cut: 0,
        })
    }

    /// Tokens of the longest example.
    pub fn longest(&self) -> usize {
        self.examples.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Refuses tokens that a model of this vocabulary does not know.
    pub fn check_vocabulary(&self, size: usize) -> Result<(), ModelError> {
        for (index, example) in self.examples.iter().enumerate() {
            check_ids(&format!("example {index}"), example, size)?;
        }
        Ok(())
    }

    /// Whether there is none, which [`new`](Self::new) refuses.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// Steps of an epoch; the last takes what is left.
    pub fn steps_per_epoch(&self, examples_per_step: usize) -> usize {
        self.examples.len().div_ceil(examples_per_step)
    }

    /// What tells one dataset from another in a resumed run.
    pub fn fingerprint(&self) -> u64 {
        stable_hash(&format!("{:?}", self.examples))
    }

    /// The batches of a step, counted from the start of the run.
    ///
    /// Every epoch has its own order, which follows from the seed and its number alone, so that a
    /// resumed run sees what an uninterrupted one would.
    pub fn step(&self, step: usize, batch: usize, accumulate: usize, seed: u64) -> Vec<Batch> {
        let per_step = batch * accumulate;
        let steps = self.steps_per_epoch(per_step);
        let (epoch, step) = (step / steps, step % steps);
        let mut order: Vec<usize> = (0..self.examples.len()).collect();
        order.shuffle(&mut StdRng::seed_from_u64(
            seed ^ stable_hash(&format!("epoch {epoch}")),
        ));
        order
            .iter()
            .skip(step * per_step)
            .take(per_step)
            .collect::<Vec<_>>()
            .chunks(batch)
            .map(|rows| {
                let rows: Vec<&[u32]> = rows.iter().map(|&&row| &*self.examples[row]).collect();
                Batch::new(&rows)
            })
            .collect()
    }
}

impl Batch {
    /// Pads rows to the longest.
    pub fn new(rows: &[&[u32]]) -> Self {
        let lengths: Vec<usize> = rows.iter().map(|row| row.len()).collect();
        let length = lengths.iter().copied().max().unwrap_or(0);
        let ids = rows
            .iter()
            .flat_map(|row| {
                let padding = std::iter::repeat_n(0, length - row.len());
                row.iter().map(|&id| i64::from(id)).chain(padding)
            })
            .collect();
        Self {
            ids,
            rows: rows.len(),
            length,
            lengths,
        }
    }

    /// Tokens that are predicted: all but the first of each row.
    pub fn targets(&self) -> usize {
        self.lengths.iter().map(|length| length - 1).sum()
    }

    /// Tokens of all rows, without padding.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// 1 for each target, 0 for padding, `[rows, length - 1]`.
    pub fn weights(&self) -> Vec<f32> {
        self.lengths
            .iter()
            .flat_map(|&length| {
                (1..self.length).map(move |position| f32::from(u8::from(position < length)))
            })
            .collect()
    }
}

/// FNV-1a, the same in every build, unlike the standard library's hasher.
fn stable_hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
