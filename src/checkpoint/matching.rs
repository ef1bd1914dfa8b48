//! Which tensor of a checkpoint goes to which parameter of a module.

use std::collections::BTreeMap;
use std::path::Path;

use super::elements::FLOATS;
use super::parameters::{INTS, Kind, Parameter};
use super::source::{Entry, EntryKind};
use crate::error::{Nf4Error, TensorMisfit};
use safetensors::Dtype;

/// What need not fit.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Allowed {
    pub missing: bool,
    pub unexpected: bool,
}

/// What fits, and what is left over.
#[derive(Debug)]
pub(super) struct Matched<'a> {
    pub pairs: Vec<(&'a Parameter, &'a Entry)>,
    pub unexpected: Vec<&'a Entry>,
}

/// Pairs parameters and tensors of the same path.
///
/// # Errors
/// [`Nf4Error::Misfit`] with all that do not fit, [`Nf4Error::SamePath`] for two tensors of one
/// path.
pub(super) fn match_up<'a>(
    parameters: &'a [Parameter],
    entries: &'a [Entry],
    allowed: Allowed,
    path: &Path,
) -> Result<Matched<'a>, Nf4Error> {
    let mut by_path: BTreeMap<&str, &Entry> = BTreeMap::new();
    for entry in entries {
        if let Some(first) = by_path.insert(&entry.path, entry) {
            return Err(Nf4Error::SamePath {
                path: entry.path.clone(),
                first: first.key.clone(),
                second: entry.key.clone(),
            });
        }
    }

    let mut misfits = Vec::new();
    let mut pairs = Vec::new();
    for parameter in parameters {
        let entry = by_path.remove(parameter.path.as_str()).or_else(|| {
            let pytorch_path = parameter.pytorch_path.as_deref()?;
            by_path.remove(pytorch_path)
        });
        match entry {
            Some(entry) if fits(parameter, entry) => pairs.push((parameter, entry)),
            None if allowed.missing => {}
            entry => misfits.push(TensorMisfit {
                key: match entry {
                    Some(entry) => entry.key.clone(),
                    None => parameter.path.clone(),
                },
                path: None,
                expected: Some(parameter.expected()),
                given: entry.map(Entry::given),
            }),
        }
    }
    let unexpected: Vec<&Entry> = by_path.into_values().collect();
    if !allowed.unexpected {
        misfits.extend(unexpected.iter().map(|entry| TensorMisfit {
            key: entry.key.clone(),
            path: (entry.path != entry.key).then(|| entry.path.clone()),
            expected: None,
            given: Some(entry.given()),
        }));
    }
    if misfits.is_empty() {
        return Ok(Matched { pairs, unexpected });
    }
    misfits.sort_by(|a, b| a.key.cmp(&b.key));
    Err(Nf4Error::Misfit {
        path: path.into(),
        tensors: misfits,
    })
}

fn fits(parameter: &Parameter, entry: &Entry) -> bool {
    let (dtypes, dtype, shape): (&[Dtype], _, _) = match (&parameter.kind, &entry.kind) {
        (Kind::Packed(expected), EntryKind::Packed(given)) => return expected == given,
        (Kind::Packed(_), _) | (_, EntryKind::Packed(_)) => return false,
        (Kind::Float(_), EntryKind::Dense { dtype, shape }) => (&FLOATS, dtype, shape),
        (Kind::Int(_), EntryKind::Dense { dtype, shape }) => (&INTS, dtype, shape),
        (Kind::Bool(_), EntryKind::Dense { dtype, shape }) => (&[Dtype::BOOL], dtype, shape),
    };
    dtypes.contains(dtype) && *shape == parameter.expected().shape
}
