//! Tensors of stacked matrices, taken apart.

use fancy_regex::{Captures, Regex};

use super::source::{Entry, EntryKind};
use crate::error::Nf4Error;

/// Which tensors are stacks, and what their matrices are called.
#[derive(Debug, Clone)]
pub(super) struct Unstack {
    pattern: Regex,
    /// The names of the parts of each matrix, from the first row on.
    parts: Vec<String>,
}

/// Stands for the index in the stack.
const INDEX: &str = "{}";

impl Unstack {
    pub fn new(pattern: Regex, parts: &[&str]) -> Self {
        Self {
            pattern,
            parts: parts.iter().map(|part| part.to_string()).collect(),
        }
    }

    /// The parts of the entry, if it is such a stack, `[matrices, parts * rows, columns]` of floats.
    ///
    /// # Errors
    /// Those of the regular expression.
    pub fn parts(&self, entry: &Entry) -> Result<Option<Vec<Entry>>, Nf4Error> {
        let EntryKind::Dense { dtype, shape } = &entry.kind else {
            return Ok(None);
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
        let rows = all_rows / self.parts.len();
        let size_bytes = entry.size_bytes / (matrices * self.parts.len());
        let all = (0..matrices).flat_map(|index| self.parts.iter().map(move |part| (index, part)));
        let entries = all.enumerate().map(|(place, (index, part))| Entry {
            key: entry.key.clone(),
            path: expand(&captures, part).replace(INDEX, &index.to_string()),
            kind: EntryKind::Dense {
                dtype: *dtype,
                shape: vec![rows, columns],
            },
            size_bytes,
            part: Some(place * size_bytes..(place + 1) * size_bytes),
        });
        Ok(Some(entries.collect()))
    }
}

fn expand(captures: &Captures<'_>, part: &str) -> String {
    let mut text = String::new();
    captures.expand(part, &mut text);
    text
}
