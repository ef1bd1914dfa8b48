//! The file of an optimizer's state: safetensors, its parts named as PyTorch and bitsandbytes name them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn_nf4::checkpoint::SafetensorsFile;
use burn_nf4::op::{MomentState, TensorState};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};

use crate::error::ModelError;

/// The file in the folder of a checkpoint.
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// That of earlier versions, which had Burn's optimizer.
const EARLIER_FILE: &str = "optimizer.bpk";

/// In f32, as PyTorch has them.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];
/// In 8 bit, as bitsandbytes has them.
const CODES: [&str; 2] = ["state1", "state2"];
/// What codes are multiplied by.
const MAXIMA: [&str; 2] = ["absmax1", "absmax2"];
const VALUES: &str = "value";
const STEPS: &str = "step";

/// What is saved of a parameter.
pub struct Saved<'a> {
    pub path: &'a str,
    pub shape: &'a [usize],
    pub state: &'a TensorState,
    /// Whether its f32 values are saved: it is of another type itself.
    pub has_values: bool,
}

/// A tensor as it is written.
struct Part {
    key: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Part {
    fn f32(key: String, shape: &[usize], values: &[f32]) -> Self {
        Self {
            key,
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            bytes: values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        }
    }

    fn number(key: String, number: f64) -> Self {
        Self {
            key,
            dtype: Dtype::F64,
            shape: Vec::new(),
            bytes: number.to_le_bytes().to_vec(),
        }
    }
}

fn key(path: &str, part: &str) -> String {
    format!("{path}.{part}")
}

impl Saved<'_> {
    fn parts(&self) -> Vec<Part> {
        let Self {
            path, shape, state, ..
        } = self;
        let f32 = |part, shape: &[usize], values| Part::f32(key(path, part), shape, values);
        let mut parts = Vec::new();
        match &state.moments {
            MomentState::F32 { first, second } => {
                for (part, values) in MOMENTS.into_iter().zip([first, second]) {
                    parts.push(f32(part, shape, values));
                }
            }
            MomentState::Bits8 {
                first,
                second,
                first_max,
                second_max,
            } => {
                for (part, codes) in CODES.into_iter().zip([first, second]) {
                    parts.push(Part {
                        key: key(path, part),
                        dtype: Dtype::U8,
                        shape: shape.to_vec(),
                        bytes: codes.clone(),
                    });
                }
                for (part, maxima) in MAXIMA.into_iter().zip([first_max, second_max]) {
                    parts.push(f32(part, &[maxima.len()], maxima));
                }
            }
        }
        if self.has_values {
            parts.push(f32(VALUES, shape, &state.values));
        }
        parts.push(Part::number(key(path, STEPS), f64::from(state.steps)));
        parts
    }
}

/// Writes the state of all parameters after so many steps of the run.
pub fn write<'a>(
    folder: &Path,
    step: usize,
    all: impl Iterator<Item = Saved<'a>>,
) -> Result<(), ModelError> {
    let path = &folder.join(OPTIMIZER_FILE);
    let mut parts = vec![Part::number(STEPS.into(), step as f64)];
    parts.extend(all.flat_map(|one| one.parts()));
    let fail = |error: &dyn ToString| ModelError::Resume {
        path: path.into(),
        message: error.to_string(),
    };
    let views = parts
        .iter()
        .map(|part| {
            let view = TensorView::new(part.dtype, part.shape.clone(), &part.bytes);
            Ok((part.key.as_str(), view.map_err(|error| fail(&error))?))
        })
        .collect::<Result<Vec<_>, ModelError>>()?;
    serialize_to_file(views, None, path).map_err(|error| fail(&error))
}

/// A file that is read.
pub struct OptimizerFile {
    file: SafetensorsFile,
    path: PathBuf,
    unread: BTreeSet<String>,
}

/// Opens the file of a checkpoint that was saved after so many steps.
pub fn open(folder: &Path, step: usize) -> Result<OptimizerFile, ModelError> {
    let path = folder.join(OPTIMIZER_FILE);
    if !path.exists() && folder.join(EARLIER_FILE).exists() {
        return Err(ModelError::Resume {
            path: folder.join(EARLIER_FILE),
            message: format!(
                "is the optimizer's state as an earlier version wrote it, expected {OPTIMIZER_FILE}: end the \
                 run with the version that began it, or start a new one"
            ),
        });
    }
    let file = SafetensorsFile::read(&path)?;
    let unread = file.keys().map(String::from).collect();
    let mut file = OptimizerFile { file, path, unread };
    let given = file.number(STEPS)?;
    if given != step as f64 {
        return Err(file.wrong(format!("is of step {given}, the checkpoint of step {step}")));
    }
    Ok(file)
}

impl OptimizerFile {
    fn wrong(&self, message: String) -> ModelError {
        ModelError::Resume {
            path: self.path.clone(),
            message,
        }
    }

    fn info(&mut self, key: &str, dtype: Dtype, shape: &[usize]) -> Result<(), ModelError> {
        if !self.unread.remove(key) {
            return Err(self.wrong(format!("has no state for `{key}`")));
        }
        let info = self.file.tensor_info(key)?;
        if info.dtype != dtype || info.shape != shape {
            return Err(self.wrong(format!(
                "`{key}` is {:?} of {:?}, expected {dtype:?} of {shape:?}",
                info.shape, info.dtype
            )));
        }
        Ok(())
    }

    fn read_f32(&mut self, key: &str, shape: &[usize], into: &mut [f32]) -> Result<(), ModelError> {
        self.info(key, Dtype::F32, shape)?;
        let (values, _) = self.file.load_float::<f32>(key)?;
        into.copy_from_slice(&values);
        Ok(())
    }

    /// Reads the moments of a parameter, of the kind and size of those that are there.
    pub fn read_moments(
        &mut self,
        path: &str,
        shape: &[usize],
        into: &mut MomentState,
    ) -> Result<(), ModelError> {
        match into {
            MomentState::F32 { first, second } => {
                for (part, into) in MOMENTS.into_iter().zip([first, second]) {
                    self.read_f32(&key(path, part), shape, into)?;
                }
            }
            MomentState::Bits8 {
                first,
                second,
                first_max,
                second_max,
            } => {
                for (part, into) in CODES.into_iter().zip([first, second]) {
                    let key = key(path, part);
                    self.info(&key, Dtype::U8, shape)?;
                    into.copy_from_slice(self.file.tensor_bytes(&key)?);
                }
                for (part, into) in MAXIMA.into_iter().zip([first_max, second_max]) {
                    self.read_f32(&key(path, part), &[into.len()], into)?;
                }
            }
        }
        Ok(())
    }

    /// Reads the f32 values of a parameter of another type.
    pub fn read_values(
        &mut self,
        path: &str,
        shape: &[usize],
        into: &mut [f32],
    ) -> Result<(), ModelError> {
        self.read_f32(&key(path, VALUES), shape, into)
    }

    /// The number of steps of a parameter.
    pub fn steps(&mut self, path: &str) -> Result<u32, ModelError> {
        let key = key(path, STEPS);
        let steps = self.number(&key)?;
        let whole = steps.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&steps);
        match whole {
            true => Ok(steps as u32),
            false => Err(self.wrong(format!("`{key}` is {steps}, expected a number of steps"))),
        }
    }

    fn number(&mut self, key: &str) -> Result<f64, ModelError> {
        self.info(key, Dtype::F64, &[])?;
        let bytes = self.file.tensor_bytes(key)?;
        match bytes.try_into() {
            Ok(bytes) => Ok(f64::from_le_bytes(bytes)),
            Err(_) => Err(self.wrong(format!("`{key}` has {} bytes, expected 8", bytes.len()))),
        }
    }

    /// Refuses state of parameters that the model does not train.
    pub fn check_all_read(&self) -> Result<(), ModelError> {
        match self.unread.first() {
            None => Ok(()),
            Some(key) => Err(self.wrong(format!(
                "has a state `{key}`, which the model does not train"
            ))),
        }
    }
}
