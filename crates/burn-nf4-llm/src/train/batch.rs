//! Examples, and what goes through the model at once.

use std::borrow::Cow;

use crate::model::{Decoder, Pass, RopeTables};

/// The label of a position that predicts nothing, as PyTorch has it.
pub const NO_LABEL: i64 = -100;

/// The tokens of a text, and which of them are predicted.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// For each token whether it is to be predicted from those before it. The first never is.
    pub predicted: Vec<bool>,
}

/// Rows of tokens.
///
/// Padding comes last in a row and needs no mask: it comes after every token that could see it. Of several
/// examples packed in a row each sees itself only and begins at position 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// `[rows, length]`, row after row.
    pub ids: Vec<i64>,
    /// Rows of tokens.
    pub rows: usize,
    /// Tokens of the longest, to which the others are padded, or of the padding of one that is
    /// [filled](Self::filled).
    pub length: usize,
    /// Tokens of each row, without padding.
    pub lengths: Vec<usize>,
    /// `[rows, length]`.
    labels: Vec<i64>,
    /// Where examples end in each row, if there are several in one.
    ends: Option<Vec<Vec<usize>>>,
    /// Tokens that there is room for, of a batch of packed rows.
    room: Option<usize>,
}

impl Example {
    /// An example of which all tokens but the first are predicted.
    pub fn whole(ids: Vec<u32>) -> Self {
        let predicted = vec![true; ids.len()];
        Self { ids, predicted }
    }

    /// Cuts off what is behind so many tokens. Returns whether there was something.
    pub fn truncate(&mut self, length: usize) -> bool {
        let longer = self.ids.len() > length;
        self.ids.truncate(length);
        self.predicted.truncate(length);
        longer
    }

    /// For each position the token that it predicts, or [`NO_LABEL`].
    pub fn labels(&self) -> impl Iterator<Item = i64> {
        let next = self.ids.iter().zip(&self.predicted).skip(1);
        let next = next.map(|(&id, &predicted)| match predicted {
            true => i64::from(id),
            false => NO_LABEL,
        });
        next.chain([NO_LABEL]).take(self.ids.len())
    }

    /// Tokens that are predicted.
    pub fn targets(&self) -> usize {
        self.labels().filter(|&label| label != NO_LABEL).count()
    }
}

impl Batch {
    /// A row for each text, all of whose tokens are predicted, padded to the longest.
    pub fn new(rows: &[&[u32]]) -> Self {
        let examples: Vec<Example> = rows
            .iter()
            .map(|row| Example::whole(row.to_vec()))
            .collect();
        Self::padded(&examples.iter().collect::<Vec<_>>())
    }

    /// A row for each example, padded to the longest.
    pub fn padded(examples: &[&Example]) -> Self {
        let lengths: Vec<usize> = examples.iter().map(|example| example.ids.len()).collect();
        let length = lengths.iter().copied().max().unwrap_or(0);
        let (mut ids, mut labels) = (Vec::new(), Vec::new());
        for (row, example) in (1..).zip(examples) {
            ids.extend(example.ids.iter().map(|&id| i64::from(id)));
            ids.resize(row * length, 0);
            labels.extend(example.labels());
            labels.resize(row * length, NO_LABEL);
        }
        Self {
            ids,
            rows: examples.len(),
            length,
            lengths,
            labels,
            ends: None,
            room: None,
        }
    }

    /// All examples in one row, without padding; a row for each where they are of one length.
    pub fn packed(examples: &[&Example]) -> Self {
        let first = examples.first().map_or(0, |example| example.ids.len());
        if examples.iter().all(|example| example.ids.len() == first) {
            return Self::padded(examples);
        }
        let ids = examples.iter().flat_map(|example| &example.ids);
        let ids: Vec<i64> = ids.map(|&id| i64::from(id)).collect();
        let labels = examples.iter().flat_map(|example| example.labels());
        let mut end = 0;
        let ends = examples.iter().map(|example| {
            end += example.ids.len();
            end
        });
        Self {
            labels: labels.collect(),
            rows: 1,
            length: ids.len(),
            lengths: vec![ids.len()],
            ends: Some(vec![ends.collect()]),
            room: None,
            ids,
        }
    }

    /// With room for so many tokens. The batch has no padding.
    pub(super) fn with_room(self, room: usize) -> Self {
        Self {
            room: Some(room),
            ..self
        }
    }

    /// A batch of packed rows as one row of all the room that they have, so that all batches are of one size and
    /// a recorded pass can be replayed. What is no token of an example is padding: each position of it sees itself
    /// only and predicts nothing.
    ///
    /// Other batches are returned as they are, and those of which more than a quarter would be padding, such as
    /// the last of an epoch may be.
    pub fn filled(&self) -> Cow<'_, Self> {
        let tokens = self.tokens();
        let padding = |room: usize| room.checked_sub(tokens).filter(|&rest| rest <= room / 4);
        let Some((room, padding)) = self.room.and_then(|room| Some((room, padding(room)?))) else {
            return Cow::Borrowed(self);
        };
        let filled = |of: &[i64], with: i64| [of, &vec![with; padding]].concat();
        let mut ends = match &self.ends {
            Some(rows) => rows.concat(),
            None => (1..=self.rows).map(|row| row * self.length).collect(),
        };
        // A text of all the padding could be the longest, by which some models choose their angles.
        ends.extend(tokens + 1..=room);
        Cow::Owned(Self {
            ids: filled(&self.ids, 0),
            labels: filled(&self.labels, NO_LABEL),
            rows: 1,
            length: room,
            lengths: vec![tokens],
            ends: Some(vec![ends]),
            room: Some(room),
        })
    }

    /// `[rows, length]`: the token that each position predicts, or [`NO_LABEL`].
    pub fn labels(&self) -> &[i64] {
        &self.labels
    }

    /// Tokens that are predicted.
    pub fn targets(&self) -> usize {
        self.labels
            .iter()
            .filter(|&&label| label != NO_LABEL)
            .count()
    }

    /// Tokens of all rows, without padding.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// What the layers share in the pass over the batch: positions, and which tokens see which.
    pub fn pass(&self, model: &Decoder, rope: &mut RopeTables) -> Pass {
        match &self.ends {
            None => model.pass(self.length, rope, None),
            Some(ends) => model.packed_pass(ends, rope),
        }
    }
}
