//! Comparing two checkpoints, parameter by parameter.

use super::convert::{ModelConfig, TIED_HEAD, TIED_TABLE};
use super::folder::Checkpoint;
use super::progress::{Counter, Progress};
use super::stored::TensorSource;
use super::values::Values;
use crate::error::Nf4Error;

/// How two checkpoints differ.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct VerifyReport {
    /// Every parameter that both have, sorted by name.
    pub parameters: Vec<ComparedParameter>,
    /// Parameters that only the first has.
    pub missing: Vec<String>,
    /// Parameters that only the second has.
    pub extra: Vec<String>,
}

/// A parameter that both checkpoints have.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct ComparedParameter {
    /// Its name.
    pub name: String,
    /// The table of embeddings that one of the checkpoints has in its place: an output head that is tied to
    /// the table there has a weight of its own in the other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tied_to: Option<String>,
    /// What the comparison gave.
    #[serde(flatten)]
    pub difference: Difference,
}

/// How two tensors differ.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Difference {
    /// The stored bytes are the same, those of scales and tables included.
    IdenticalBytes,
    /// Every value is the same, stored otherwise.
    IdenticalValues,
    /// Some values differ.
    Values {
        /// The largest difference; infinite where one is NaN or infinite and the other is not
        /// the same.
        max_abs_error: f64,
        /// Root mean square of the differences over that of the first one's values.
        relative_rms_error: f64,
    },
    /// They cannot be compared: other shapes, or types that are not weights'.
    NotComparable {
        /// In what they differ.
        reason: String,
    },
}

impl VerifyReport {
    /// The parameters that are further apart than allowed, and those that cannot be compared.
    /// [`f64::INFINITY`] allows anything.
    pub fn exceeding(
        &self,
        max_abs_error: f64,
        relative_rms_error: f64,
    ) -> impl Iterator<Item = &ComparedParameter> {
        self.parameters
            .iter()
            .filter(move |parameter| match parameter.difference {
                Difference::IdenticalBytes | Difference::IdenticalValues => false,
                Difference::Values {
                    max_abs_error: abs,
                    relative_rms_error: rms,
                } => !(abs <= max_abs_error && rms <= relative_rms_error),
                Difference::NotComparable { .. } => true,
            })
    }

    /// Whether both have the same parameters, none of them further apart than allowed.
    pub fn is_within(&self, max_abs_error: f64, relative_rms_error: f64) -> bool {
        self.missing.is_empty()
            && self.extra.is_empty()
            && self
                .exceeding(max_abs_error, relative_rms_error)
                .next()
                .is_none()
    }

    /// The largest difference of any two values.
    pub fn max_abs_error(&self) -> f64 {
        let errors = self.parameters.iter().map(|p| match p.difference {
            Difference::Values { max_abs_error, .. } => max_abs_error,
            _ => 0.0,
        });
        errors.fold(0.0, f64::max)
    }
}

/// Compares two checkpoints, of which each may be quantized or not.
///
/// A quantized parameter counts as the values that it decodes to. An output head that is tied to
/// the table of embeddings counts as that table, unless `config.json` says that it is not tied. `progress`
/// counts the parameters that both have.
///
/// ```no_run
/// use burn_nf4::checkpoint::{Checkpoint, verify};
///
/// let dense = Checkpoint::open("SmolLM2-135M")?;
/// let quantized = Checkpoint::open("SmolLM2-135M-nf4")?;
/// let report = verify(&dense, &quantized, |_| ())?;
/// // Rounding normally distributed weights to NF4 costs about 9 % of their RMS.
/// assert!(report.is_within(f64::INFINITY, 0.12));
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Errors
/// Those of [`SafetensorsFile::load_quantized`](super::SafetensorsFile::load_quantized), and
/// [`Nf4Error::NonFinite`] for a quantized weight that decodes to an infinity; not for one whose
/// tensors are the same in both, which is not decoded. [`Nf4Error::ModelConfig`] for a malformed
/// `config.json` that was to say whether a head is tied.
pub fn verify(
    a: &Checkpoint,
    b: &Checkpoint,
    progress: impl FnMut(Progress<'_>),
) -> Result<VerifyReport, Nf4Error> {
    let (in_a, in_b) = (a.parameters(), b.parameters());
    let (mut both, mut missing, mut extra) = (Vec::new(), Vec::new(), Vec::new());
    for &name in &in_a {
        match key_in(b, &in_b, name)? {
            Some(key) => both.push((name, [name, key])),
            None => missing.push(name.to_string()),
        }
    }
    for &name in in_b.iter().filter(|name| in_a.binary_search(name).is_err()) {
        match key_in(a, &in_a, name)? {
            Some(key) => both.push((name, [key, name])),
            None => extra.push(name.to_string()),
        }
    }
    both.sort_unstable();

    let bytes_of = |[in_a, in_b]: [&str; 2]| a.parameter_bytes(in_a) + b.parameter_bytes(in_b);
    let bytes_total = both.iter().map(|(_, keys)| bytes_of(*keys)).sum();
    let mut counter = Counter::new(both.len(), bytes_total, progress);
    let mut parameters = Vec::with_capacity(both.len());
    for (name, keys) in both {
        let table = keys.into_iter().find(|key| *key != name);
        parameters.push(ComparedParameter {
            name: name.into(),
            tied_to: table.map(String::from),
            difference: compare(a, b, keys)?,
        });
        counter.done(name, bytes_of(keys));
    }
    Ok(VerifyReport {
        parameters,
        missing,
        extra,
    })
}

/// What a checkpoint with these parameters calls a parameter: by its name, but for an output head that is
/// tied to the table of embeddings and has no weight of its own.
fn key_in<'a>(
    checkpoint: &Checkpoint,
    parameters: &[&str],
    name: &'a str,
) -> Result<Option<&'a str>, Nf4Error> {
    let has = |key| parameters.binary_search(&key).is_ok();
    if has(name) {
        return Ok(Some(name));
    }
    if name != TIED_HEAD || !has(TIED_TABLE) {
        return Ok(None);
    }
    let config = ModelConfig::read(checkpoint)?;
    let tied = config.as_ref().and_then(ModelConfig::ties_embeddings);
    Ok((tied != Some(false)).then_some(TIED_TABLE))
}

/// Compares the parameter of the first checkpoint with that of the second.
fn compare(a: &Checkpoint, b: &Checkpoint, keys: [&str; 2]) -> Result<Difference, Nf4Error> {
    if stored_alike(a, b, keys)? {
        return Ok(Difference::IdenticalBytes);
    }
    let (a, b) = (Values::open(a, keys[0])?, Values::open(b, keys[1])?);
    let (a, b) = match (a, b) {
        (Ok(a), Ok(b)) => (a, b),
        (Err(dtype), _) | (_, Err(dtype)) => {
            return Ok(Difference::NotComparable {
                reason: format!("other bytes of type {dtype}"),
            });
        }
    };
    if a.shape != b.shape {
        return Ok(Difference::NotComparable {
            reason: format!("shapes {:?} and {:?}", a.shape, b.shape),
        });
    }
    let loss = a.compare(&b);
    Ok(match loss.max_abs() {
        0.0 => Difference::IdenticalValues,
        max_abs_error => Difference::Values {
            max_abs_error,
            relative_rms_error: loss.relative_rms(),
        },
    })
}

/// Whether the tensors of a parameter are the same, to the byte.
fn stored_alike(a: &Checkpoint, b: &Checkpoint, names: [&str; 2]) -> Result<bool, Nf4Error> {
    let keys = [a.keys_of(names[0]), b.keys_of(names[1])];
    // Behind the name: nothing, or the part of a quantized parameter.
    let parts = |of: usize| keys[of].iter().map(move |key| &key[names[of].len()..]);
    if !parts(0).eq(parts(1)) || a.is_quantized(names[0]) != b.is_quantized(names[1]) {
        return Ok(false);
    }
    for (in_a, in_b) in keys[0].iter().zip(&keys[1]) {
        if !a.stored(in_a)?.is_same(&b.stored(in_b)?) {
            return Ok(false);
        }
    }
    Ok(true)
}
