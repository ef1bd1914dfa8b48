//! Tensors of stacked matrices, taken apart.

use fancy_regex::{Captures, Regex};

use super::source::{Entry, EntryKind};
use super::stored_weight::{Rows, holds_rows};
use crate::error::Nf4Error;
use crate::format::WeightForm;

/// Which tensors are stacks, and what their matrices are called.
#[derive(Debug, Clone)]
pub(super) struct Unstack {
    pattern: Regex,
    /// The names of the parts of each matrix, from the first row on.
    parts: Vec<String>,
    order: Order,
}

/// Which rows of a matrix are those of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Those of one part follow one another.
    Following,
    /// One of each part in turn.
    Interleaved,
}

/// Stands for the index in the stack.
const INDEX: &str = "{}";

impl Unstack {
    pub fn new(pattern: Regex, parts: &[&str], order: Order) -> Self {
        Self {
            pattern,
            parts: parts.iter().map(|part| part.to_string()).collect(),
            order,
        }
    }

    /// The parts of the entry, if it is such a stack: `[matrices, parts * rows, columns]`.
    ///
    /// # Errors
    /// Those of the regular expression.
    pub fn parts(&self, entry: &Entry) -> Result<Option<Vec<Entry>>, Nf4Error> {
        let shape = match &entry.kind {
            EntryKind::Dense { shape, .. } => shape,
            EntryKind::Packed(form) => &form.shape,
        };
        let &[matrices, all_rows, columns] = shape.as_slice() else {
            return Ok(None);
        };
        let is_whole = all_rows.is_multiple_of(self.parts.len()) && entry.size_bytes > 0;
        if !is_whole || entry.part.is_some() {
            return Ok(None);
        }
        let captures = self.pattern.captures(&entry.path);
        let captures = captures.map_err(|error| Nf4Error::Pattern {
            field: "unstack",
            pattern: self.pattern.as_str().into(),
            message: error.to_string(),
        })?;
        let Some(captures) = captures else {
            return Ok(None);
        };
        if let EntryKind::Packed(form) = &entry.kind
            && !(0..self.parts.len()).all(|part| {
                let rows = self.rows(0, part, all_rows);
                !form.transposed && holds_rows(form.config, &form.shape, rows)
            })
        {
            return Ok(None);
        }
        let size_bytes = entry.size_bytes / (matrices * self.parts.len());
        let part = |matrix: usize, part: usize| {
            let rows = self.rows(matrix, part, all_rows);
            Entry {
                key: entry.key.clone(),
                path: expand(&captures, &self.parts[part]).replace(INDEX, &matrix.to_string()),
                kind: part_kind(&entry.kind, [rows.count, columns]),
                size_bytes,
                part: Some(rows),
            }
        };
        let all = (0..matrices).flat_map(|m| (0..self.parts.len()).map(move |p| (m, p)));
        Ok(Some(all.map(|(m, p)| part(m, p)).collect()))
    }

    /// The rows of a part of a matrix.
    fn rows(&self, matrix: usize, part: usize, all_rows: usize) -> Rows {
        let count = all_rows / self.parts.len();
        let (offset, step) = match self.order {
            Order::Following => (part * count, 1),
            Order::Interleaved => (part, self.parts.len()),
        };
        Rows {
            first: matrix * all_rows + offset,
            step,
            count,
        }
    }
}

/// What a part of a stack is.
fn part_kind(of: &EntryKind, shape: [usize; 2]) -> EntryKind {
    match of {
        EntryKind::Dense { dtype, .. } => EntryKind::Dense {
            dtype: *dtype,
            shape: shape.into(),
        },
        EntryKind::Packed(form) => EntryKind::Packed(WeightForm {
            shape: shape.into(),
            ..form.clone()
        }),
    }
}

fn expand(captures: &Captures<'_>, part: &str) -> String {
    let mut text = String::new();
    captures.expand(part, &mut text);
    text
}
