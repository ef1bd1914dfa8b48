//! A weight of the base model on its way through a merge.

use super::loss::Sums;
use super::target::Target;
use crate::checkpoint::convert::{decode, quantize};
use crate::checkpoint::elements::{
    cast, elements, expect_float, le_bytes, stored_dtype, transpose, widen, with_float_type,
};
use crate::checkpoint::orientation::Orientation;
use crate::checkpoint::stored_form::StoredForm;
use crate::checkpoint::{Checkpoint, CheckpointWriter};
use crate::error::Nf4Error;
use crate::format::{
    FloatElement, FloatType, PackedImage, QuantConfig, ScaleParts, TensorScale, WeightParts,
    check_finite, matrix_dims,
};

/// A weight of the base model, widened, in the orientation that the model has it in.
pub(super) struct BaseWeight {
    pub values: Vec<f32>,
    pub shape: Vec<usize>,
    dtype: FloatType,
    form: Form,
}

/// How a weight is stored.
#[derive(Clone, Copy)]
enum Form {
    Dense,
    Quantized {
        config: QuantConfig,
        stored: StoredForm,
        orientation: Orientation,
        /// The scale of an NVFP4 tensor.
        scale: Option<TensorScale>,
    },
}

impl BaseWeight {
    pub fn read(base: &Checkpoint, key: &str) -> Result<Self, Nf4Error> {
        if !base.is_quantized(key) {
            let info = base.tensor_info(key)?;
            let dtype = expect_float(info.dtype, key)?;
            let bytes = base.tensor_bytes(key)?;
            return Ok(Self {
                values: with_float_type!(dtype, T => widen(&elements::<T>(bytes))),
                shape: info.shape.to_vec(),
                dtype,
                form: Form::Dense,
            });
        }
        let (weight, orientation) = base.load_image(key)?;
        let dtype = weight.dtype();
        let config = weight.layout().config();
        let form = Form::Quantized {
            config,
            stored: StoredForm::of(base, key, config.quant_type)?,
            orientation,
            scale: match weight.parts().scales {
                ScaleParts::Coded { tensor_scale, .. } => Some(tensor_scale),
                _ => None,
            },
        };
        let mut shape = weight.shape().to_vec();
        let values = with_float_type!(dtype, T => widen_decoded::<T>(weight, key)?);
        Ok(Self {
            values: orientation
                .turn(key, values.into(), &mut shape)?
                .into_owned(),
            shape,
            dtype,
            form,
        })
    }

    pub fn dims(&self, key: &str) -> Result<[usize; 2], Nf4Error> {
        matrix_dims(key, &self.shape)
    }

    pub fn transpose(&mut self, key: &str) -> Result<(), Nf4Error> {
        self.values = transpose(self.dims(key)?, |index| self.values[index]);
        self.shape.reverse();
        Ok(())
    }

    /// Stores the weight, and adds to `sums` what that costs.
    pub fn write(
        mut self,
        writer: &mut CheckpointWriter,
        key: &str,
        target: Target,
        sums: Option<&mut Sums>,
    ) -> Result<(), Nf4Error> {
        check_finite(key, self.values.iter().copied())?;
        let stored = match (target, self.form) {
            (
                Target::AsBase,
                Form::Quantized {
                    config,
                    stored,
                    orientation,
                    scale,
                },
            ) => {
                let values = orientation.turn(key, self.values.into(), &mut self.shape)?;
                self.values = values.into_owned();
                with_float_type!(self.dtype, T => {
                    let rounded = cast::<f32, T>(&self.values, key)?;
                    // With one scale it is quantized as one row.
                    let rows = match stored {
                        StoredForm::OneScale { .. } => vec![1, rounded.len()],
                        _ => self.shape.clone(),
                    };
                    // Layers that others fuse share theirs.
                    let magnitudes = rounded.iter().map(|value| value.to_f32().abs());
                    let max = magnitudes.fold(0.0, f32::max);
                    let scale = scale.filter(|scale| scale.fits(max));
                    let weight = quantize(&rounded, &rows, config, scale, key)?;
                    let parts = WeightParts { shape: &self.shape, ..weight.parts() };
                    writer.write_parts(key, parts, stored)?;
                    widen_decoded::<T>(weight, key)?
                })
            }
            _ => {
                let dtype = match target {
                    Target::Float(Some(dtype)) => dtype,
                    _ => self.dtype,
                };
                with_float_type!(dtype, T => {
                    let rounded = cast::<f32, T>(&self.values, key)?;
                    let bytes = le_bytes(&rounded);
                    writer.write_tensor(key, stored_dtype(dtype), &self.shape, &bytes)?;
                    widen(&rounded)
                })
            }
        };
        if let Some(sums) = sums {
            sums.compare(&self.values, &stored);
        }
        Ok(())
    }
}

/// The values of a weight, which is gone once they are decoded.
fn widen_decoded<T: FloatElement>(weight: PackedImage, key: &str) -> Result<Vec<f32>, Nf4Error> {
    let values = decode::<T>(&weight, key)?;
    drop(weight);
    Ok(widen(&values))
}
