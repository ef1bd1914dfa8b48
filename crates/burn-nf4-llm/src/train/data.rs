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
use crate::train::packing::best_fit_decreasing;
use crate::train::records::{self, Record};

pub use crate::train::batch::{Batch, Example, NO_LABEL};

/// Tokenized examples, and the rows that they are trained in.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    examples: Vec<Example>,
    /// The examples of each row.
    rows: Vec<Vec<usize>>,
    /// Most tokens of a row, if some have several examples.
    room: Option<usize>,
    /// Whether all of it is text, with no conversation and no completion in it.
    pub is_text: bool,
    /// Examples of the file that were cut off.
    pub cut: usize,
    /// Examples that were left out because they have no token to be predicted.
    pub left_out: usize,
}

/// Which tokens of conversations, and of prompts with completions, are predicted. Of texts all are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Predict {
    /// What the assistant says, and the completion.
    #[default]
    Answers,
    /// All.
    All,
}

impl Dataset {
    /// Reads a `.txt` file, cut into pieces of `length` tokens, or a `.jsonl` or `.json` file of examples, each
    /// cut off at `length` tokens: `text`, `messages` for the chat template, or `prompt` and `completion`, both
    /// as texts or as lists of messages.
    ///
    /// `eos` is put behind texts and completions.
    ///
    /// # Errors
    /// [`ModelError::Data`] for what a file should not hold, a conversation that the template does not take or
    /// whose answers cannot be found in its text among it; [`ModelError::Setting`] for a file of another kind,
    /// or one without anything to predict.
    pub fn read(
        path: &Path,
        text: &Text,
        eos: Option<u32>,
        length: usize,
        predict: Predict,
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
        let (mut cut, mut is_text) = (0, true);
        let mut examples = Vec::new();
        for (place, record) in records::parse(&content, path)? {
            is_text &= matches!(record, Record::Text(_));
            let mut example = encode(&record, text, eos, predict).map_err(|error| match error {
                ModelError::Template(_) => place.error(path, error),
                error => error,
            })?;
            cut += usize::from(example.truncate(length));
            examples.push(example);
        }
        Ok(Self {
            cut,
            is_text,
            ..Self::from_examples(examples)?
        })
    }

    /// A dataset of texts, given as tokens. Those too short to predict anything are left out.
    ///
    /// # Errors
    /// [`ModelError::Setting`] if none is left.
    pub fn new(examples: Vec<Vec<u32>>) -> Result<Self, ModelError> {
        Self::from_examples(examples.into_iter().map(Example::whole).collect())
    }

    /// A dataset of examples, a row for each. Those without a token to be predicted are left out.
    ///
    /// # Errors
    /// [`ModelError::Setting`] if none is left.
    pub fn from_examples(mut examples: Vec<Example>) -> Result<Self, ModelError> {
        let given = examples.len();
        examples.retain(|example| example.targets() > 0);
        if examples.is_empty() {
            return Err(ModelError::setting(
                "the data",
                format!("{given} examples, none of two tokens or more with one to be predicted"),
                "at least one such",
            ));
        }
        Ok(Self {
            left_out: given - examples.len(),
            rows: one_a_row(examples.len()),
            room: None,
            examples,
            is_text: true,
            cut: 0,
        })
    }

    /// The examples in rows of at most `length` tokens: see
    /// [`step`](Self::step) for how they are kept apart.
    pub fn pack(mut self, length: usize) -> Self {
        let lengths: Vec<usize> = self.examples.iter().map(|one| one.ids.len()).collect();
        self.rows = best_fit_decreasing(&lengths, length);
        self.room = (self.rows.len() < lengths.len()).then_some(length);
        self
    }

    /// Takes a part of the examples out, drawn with a seed: what is left, and that part, each with a row for
    /// each example. What was cut or left out counts for the first.
    ///
    /// # Errors
    /// [`ModelError::Setting`] for a fraction that leaves one of the two without an example.
    pub fn split(self, fraction: f64, seed: u64) -> Result<(Self, Self), ModelError> {
        let count = self.examples.len();
        let taken = (fraction * count as f64).ceil();
        if !(fraction > 0.0 && taken < count as f64) {
            return Err(ModelError::setting(
                "the part for evaluation",
                format!("{fraction} of {count} examples"),
                "a number above 0 that leaves at least one example to train on",
            ));
        }
        let mut order: Vec<usize> = (0..count).collect();
        order.shuffle(&mut rng(seed, "evaluation"));
        let mut is_taken = vec![false; count];
        for &example in &order[..taken as usize] {
            is_taken[example] = true;
        }
        let (mut rest, mut part) = (Vec::new(), Vec::new());
        for (example, is_taken) in self.examples.into_iter().zip(is_taken) {
            match is_taken {
                true => part.push(example),
                false => rest.push(example),
            }
        }
        let of = |examples: Vec<Example>, cut, left_out| Self {
            rows: one_a_row(examples.len()),
            room: None,
            examples,
            is_text: self.is_text,
            cut,
            left_out,
        };
        Ok((of(rest, self.cut, self.left_out), of(part, 0, 0)))
    }

    /// Tokens of the longest example.
    pub fn longest(&self) -> usize {
        let lengths = self.examples.iter().map(|example| example.ids.len());
        lengths.max().unwrap_or(0)
    }

    /// Refuses tokens that a model of this vocabulary does not know.
    pub fn check_vocabulary(&self, size: usize) -> Result<(), ModelError> {
        for (index, example) in self.examples.iter().enumerate() {
            check_ids(&format!("example {index}"), &example.ids, size)?;
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

    /// Number of rows: that of examples, or less where they are [packed](Self::pack).
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// The examples.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// Steps of an epoch; the last takes what is left.
    pub fn steps_per_epoch(&self, rows_per_step: usize) -> usize {
        self.rows.len().div_ceil(rows_per_step)
    }

    /// What tells one dataset from another in a resumed run.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = StableHash::new();
        for row in &self.rows {
            hash.add(&row.len().to_le_bytes());
            for example in row.iter().map(|&example| &self.examples[example]) {
                hash.add(&example.ids.len().to_le_bytes());
                for (id, &predicted) in example.ids.iter().zip(&example.predicted) {
                    hash.add(&id.to_le_bytes());
                    hash.add(&[u8::from(predicted)]);
                }
            }
        }
        hash.0
    }

    /// The batches of a step, counted from the start of the run, of `batch` rows each.
    ///
    /// The examples of all rows of a batch lie one after the other without padding. No token sees one of another
    /// example, the positions of each begin at 0, and nothing is predicted across their borders.
    ///
    /// Every epoch has its own order of rows, which follows from the seed and its number alone, so that a
    /// resumed run sees what an uninterrupted one would.
    pub fn step(&self, step: usize, batch: usize, accumulate: usize, seed: u64) -> Vec<Batch> {
        let per_step = batch * accumulate;
        let steps = self.steps_per_epoch(per_step);
        let (epoch, step) = (step / steps, step % steps);
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        order.shuffle(&mut rng(seed, &format!("epoch {epoch}")));
        let first = (step * per_step).min(order.len());
        let last = (first + per_step).min(order.len());
        order[first..last]
            .chunks(batch)
            .map(|rows| self.batch(rows, batch))
            .collect()
    }

    /// All rows in their order, in batches of `batch`.
    pub fn batches(&self, batch: usize) -> impl Iterator<Item = Batch> {
        let starts = (0..self.rows.len()).step_by(batch);
        starts.map(move |start| {
            let end = (start + batch).min(self.rows.len());
            self.batch(&(start..end).collect::<Vec<_>>(), batch)
        })
    }

    /// Rows of a batch that has at most `most` of them.
    fn batch(&self, rows: &[usize], most: usize) -> Batch {
        let examples = rows.iter().flat_map(|&row| &self.rows[row]);
        let examples: Vec<&Example> = examples.map(|&example| &self.examples[example]).collect();
        let batch = Batch::packed(&examples);
        match self.room {
            Some(room) => batch.with_room(room.saturating_mul(most)),
            None => batch,
        }
    }
}

fn one_a_row(count: usize) -> Vec<Vec<usize>> {
    (0..count).map(|example| vec![example]).collect()
}

fn encode(
    record: &Record,
    text: &Text,
    eos: Option<u32>,
    predict: Predict,
) -> Result<Example, ModelError> {
    let (mut ids, mut predicted) = match (record, predict) {
        (Record::Text(example), _) => text.encode_behind(example, 0)?,
        (Record::Completion { prompt, completion }, _) => {
            text.encode_behind(&format!("{prompt}{completion}"), prompt.len())?
        }
        (Record::Conversation(conversation), Predict::Answers) => {
            text.encode_answers(conversation)?
        }
        (
            Record::Continuation {
                conversation,
                prompt,
            },
            Predict::Answers,
        ) => text.encode_completion(conversation, *prompt)?,
        (
            Record::Conversation(conversation) | Record::Continuation { conversation, .. },
            Predict::All,
        ) => {
            let ids = text.encode_chat(conversation, Ending::Whole)?;
            return Ok(Example::whole(ids));
        }
    };
    if let (Record::Text(_) | Record::Completion { .. }, Some(eos)) = (record, eos) {
        ids.push(eos);
        predicted.push(true);
    }
    match (record, predict) {
        (Record::Text(_), _) | (_, Predict::All) => Ok(Example::whole(ids)),
        _ => Ok(Example { ids, predicted }),
    }
}

/// The random numbers for one purpose.
fn rng(seed: u64, purpose: &str) -> StdRng {
    let mut hash = StableHash::new();
    hash.add(purpose.as_bytes());
    StdRng::seed_from_u64(seed ^ hash.0)
}

/// FNV-1a, the same in every build, unlike the standard library's hasher.
pub(super) struct StableHash(pub u64);

impl StableHash {
    pub fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
