//! The file of an optimizer's state: safetensors, named as PyTorch names the parts of its state.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn_nf4::checkpoint::SafetensorsFile;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};

use crate::error::ModelError;

/// The file in the folder of a checkpoint.
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// That of earlier versions, which had Burn's optimizer.
const EARLIER_FILE: &str = "optimizer.bpk";

pub const FIRST: &str = "exp_avg";
pub const SECOND: &str = "exp_avg_sq";
pub const VALUES: &str = "value";
const STEPS: &str = "step";

/// What is saved of a parameter.
pub struct Moments<'a> {
    pub path: &'a str,
    pub shape: &'a [usize],
    pub steps: u32,
    pub first: &'a [f32],
    pub second: &'a [f32],
    /// Its f32 values, if it is of another type itself.
    pub values: Option<&'a [f32]>,
}

fn key(path: &str, part: &str) -> String {
    format!("{path}.{part}")
}

/// Writes the state of all parameters after so many steps of the run.
pub fn write<'a>(
    folder: &Path,
    step: usize,
    all: impl Iterator<Item = Moments<'a>>,
) -> Result<(), ModelError> {
    let path = &folder.join(OPTIMIZER_FILE);
    let counted = |steps: f64| steps.to_le_bytes();
    let bytes_of = |values: &[f32]| -> Vec<u8> {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    };
    let mut tensors = vec![(
        STEPS.to_string(),
        Dtype::F64,
        Vec::new(),
        counted(step as f64).to_vec(),
    )];
    for one in all {
        let parts = [
            (FIRST, Some(one.first)),
            (SECOND, Some(one.second)),
            (VALUES, one.values),
        ];
        for (part, values) in parts {
            if let Some(values) = values {
                let key = key(one.path, part);
                tensors.push((key, Dtype::F32, one.shape.to_vec(), bytes_of(values)));
            }
        }
        let steps = counted(f64::from(one.steps)).to_vec();
        tensors.push((key(one.path, STEPS), Dtype::F64, Vec::new(), steps));
    }
    let fail = |error: &dyn ToString| ModelError::Resume {
        path: path.into(),
        message: error.to_string(),
    };
    let views = tensors
        .iter()
        .map(|(key, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            Ok((key.as_str(), view.map_err(|error| fail(&error))?))
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

    /// Reads a part of the state of a parameter.
    pub fn read(
        &mut self,
        path: &str,
        part: &str,
        shape: &[usize],
        into: &mut [f32],
    ) -> Result<(), ModelError> {
        let key = key(path, part);
        self.info(&key, Dtype::F32, shape)?;
        let (values, _) = self.file.load_float::<f32>(&key)?;
        into.copy_from_slice(&values);
        Ok(())
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
