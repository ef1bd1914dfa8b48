//! Tensors of stacked matrices, taken apart.

use fancy_regex::{Captures, Regex};

use super::source::{Columns, Entry, EntryKind, Part};
use crate::error::Nf4Error;

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
    Rows,
    /// `[matrices, columns, rows * parts]`, or of vectors `[matrices, rows * parts]`: transposed, a row of each
    /// part in turn.
    Columns,
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

    /// The parts of the entry, if it is such a stack of floats.
    ///
    /// # Errors
    /// Those of the regular expression.
    pub fn parts(&self, entry: &Entry) -> Result<Option<Vec<Entry>>, Nf4Error> {
        let EntryKind::Dense { dtype, shape } = &entry.kind else {
            return Ok(None);
        };
        let Some((matrices, part_shape)) = self.part_shape(shape) else {
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
        let size_bytes = entry.size_bytes / (matrices * self.parts.len());
        let all = (0..matrices)
            .flat_map(|index| self.parts.iter().enumerate().map(move |part| (index, part)));
        let entries = all.map(|(index, (number, part))| Entry {
            key: entry.key.clone(),
            path: expand(&captures, part).replace(INDEX, &index.to_string()),
            kind: EntryKind::Dense {
                dtype: *dtype,
                shape: part_shape.clone(),
            },
            size_bytes,
            part: Some(self.part(index, number, size_bytes)),
        });
        Ok(Some(entries.collect()))
    }

    /// How many matrices a stack of this shape has, and the shape of a part of one.
    fn part_shape(&self, shape: &[usize]) -> Option<(usize, Vec<usize>)> {
        let (matrices, rows, columns) = match (self.layout, shape) {
            (StackLayout::Rows, &[matrices, rows, columns])
            | (StackLayout::Columns, &[matrices, columns, rows]) => (matrices, rows, Some(columns)),
            (StackLayout::Columns, &[matrices, rows]) => (matrices, rows, None),
            _ => return None,
        };
        if !rows.is_multiple_of(self.parts.len()) {
            return None;
        }
        let rows = rows / self.parts.len();
        Some((matrices, std::iter::once(rows).chain(columns).collect()))
    }

    fn part(&self, matrix: usize, number: usize, size_bytes: usize) -> Part {
        let step = self.parts.len();
        match self.layout {
            StackLayout::Rows => {
                let place = matrix * step + number;
                Part {
                    bytes: place * size_bytes..(place + 1) * size_bytes,
                    columns: None,
                }
            }
            StackLayout::Columns => Part {
                bytes: matrix * step * size_bytes..(matrix + 1) * step * size_bytes,
                columns: Some(Columns {
                    first: number,
                    step,
                }),
            },
        }
    }
}

fn expand(captures: &Captures<'_>, part: &str) -> String {
    let mut text = String::new();
    captures.expand(part, &mut text);
    text
}
