//! Tensors of stacked matrices, taken apart.

use fancy_regex::{Captures, Regex};

use super::source::{Columns, Entry, EntryKind, Part};
use super::stored_weight::{Rows, holds_rows};
use crate::error::Nf4Error;
use crate::format::WeightForm;

/// Which tensors are stacks, and what their matrices are called.
#[derive(Debug, Clone)]
pub(super) struct Unstack {
    pattern: Regex,
    /// The names of the parts of each matrix, from the first row on.
    parts: Vec<String>,
    layout: StackLayout,
}

/// How the parts of a stack lie in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StackLayout {
    /// `[matrices, parts * rows, columns]`: one part after another.
    Following,
    /// `[matrices, rows * parts, columns]`: a row of each part in turn.
    Interleaved,
    /// `[matrices, columns, rows * parts]`, or of vectors `[matrices, rows * parts]`: transposed, a row of each
    /// part in turn. Packed stacks are not transposed.
    Transposed,
}

/// Stands for the index in the stack.
const INDEX: &str = "{}";

impl Unstack {
    pub fn new(pattern: Regex, parts: &[&str], layout: StackLayout) -> Self {
        Self {
            pattern,
            parts: parts.iter().map(|part| part.to_string()).collect(),
            layout,
        }
    }

    /// The parts of the entry, if it is such a stack.
    ///
    /// # Errors
    /// Those of the regular expression.
    pub fn parts(&self, entry: &Entry) -> Result<Option<Vec<Entry>>, Nf4Error> {
        let (shape, layout) = match (&entry.kind, self.layout) {
            (EntryKind::Packed(form), StackLayout::Transposed) => {
                (&form.shape, StackLayout::Interleaved)
            }
            (EntryKind::Packed(form), layout) => (&form.shape, layout),
            (EntryKind::Dense { shape, .. }, layout) => (shape, layout),
        };
        let Some(stack) = Stack::new(shape, layout, self.parts.len()) else {
            return Ok(None);
        };
        if entry.size_bytes == 0 || entry.part.is_some() {
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
                let rows = stack.rows(0, part);
                !form.transposed && holds_rows(form.config, &form.shape, rows)
            })
        {
            return Ok(None);
        }
        let size_bytes = entry.size_bytes / (stack.matrices * self.parts.len());
        let part = |matrix: usize, part: usize| Entry {
            key: entry.key.clone(),
            path: expand(&captures, &self.parts[part]).replace(INDEX, &matrix.to_string()),
            kind: part_kind(&entry.kind, &stack.part_shape),
            size_bytes,
            part: Some(stack.part(matrix, part, size_bytes)),
        };
        let all = (0..stack.matrices).flat_map(|m| (0..self.parts.len()).map(move |p| (m, p)));
        Ok(Some(all.map(|(m, p)| part(m, p)).collect()))
    }
}

/// A stack of some shape.
struct Stack {
    layout: StackLayout,
    matrices: usize,
    parts: usize,
    /// That of a part of a matrix.
    part_shape: Vec<usize>,
}

impl Stack {
    fn new(shape: &[usize], layout: StackLayout, parts: usize) -> Option<Self> {
        let (matrices, rows, columns) = match (layout, shape) {
            (StackLayout::Transposed, &[matrices, columns, rows]) => {
                (matrices, rows, Some(columns))
            }
            (StackLayout::Transposed, &[matrices, rows]) => (matrices, rows, None),
            (_, &[matrices, rows, columns]) => (matrices, rows, Some(columns)),
            _ => return None,
        };
        if !rows.is_multiple_of(parts) {
            return None;
        }
        Some(Self {
            layout,
            matrices,
            parts,
            part_shape: std::iter::once(rows / parts).chain(columns).collect(),
        })
    }

    /// The rows of a part of a matrix.
    fn rows(&self, matrix: usize, part: usize) -> Rows {
        let count = self.part_shape[0];
        let (offset, step) = match self.layout {
            StackLayout::Following => (part * count, 1),
            StackLayout::Interleaved | StackLayout::Transposed => (part, self.parts),
        };
        Rows {
            first: matrix * self.parts * count + offset,
            step,
            count,
        }
    }

    /// Where a part of a matrix lies, which has so many bytes.
    fn part(&self, matrix: usize, part: usize, size_bytes: usize) -> Part {
        match self.layout {
            StackLayout::Following | StackLayout::Interleaved => {
                Part::Rows(self.rows(matrix, part))
            }
            StackLayout::Transposed => Part::Columns(Columns {
                bytes: matrix * self.parts * size_bytes..(matrix + 1) * self.parts * size_bytes,
                first: part,
                step: self.parts,
            }),
        }
    }
}

/// What a part of a stack is.
fn part_kind(of: &EntryKind, shape: &[usize]) -> EntryKind {
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
