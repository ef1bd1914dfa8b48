//! Quantized to float weights.

use std::path::Path;

use super::decode::decode;
use super::dense::write_dense;
use super::model_config::ModelConfig;
use super::options::DequantizeOptions;
use super::{ClaimFile, Converted, Reporter, check_source, copy_other_files, start_writer};
use crate::checkpoint::elements::{cast, le_bytes, stored_dtype, with_float_type};
use crate::checkpoint::orientation::Orientation;
use crate::checkpoint::{Checkpoint, CheckpointWriter, Progress};
use crate::error::Nf4Error;
use crate::format::{FloatElement, FloatType, PackedImage};

/// Decodes the quantized weights of a checkpoint into a new folder of float weights.
///
/// Each is decoded to the dtype that it had, as bitsandbytes does, and then rounded to the one
/// asked for. A weight that is stored transposed, as the packed experts of gpt-oss are, is written the way the
/// model has it.
/// `config.json` loses its `quantization_config`, and the other files of the folder are copied, but for
/// ModelOpt's `hf_quant_config.json`. Scales of activations stay behind: [`Converted::dropped`] names them.
///
/// # Errors
/// - those of [`SafetensorsFile::load_quantized`](crate::checkpoint::SafetensorsFile::load_quantized)
/// - [`Nf4Error::NonFinite`] for a weight that its own dtype or the one asked for cannot hold
/// - [`Nf4Error::NotAMatrix`] for a transposed weight of other than two dimensions
/// - the first of [`Checkpoint::faults`], as for a checkpoint that another method quantized or
///   weights whose `quant_state` is lost
/// - [`Nf4Error::Config`] for writing into the source
/// - [`Nf4Error::ModelConfig`], [`Nf4Error::FolderNotEmpty`], [`Nf4Error::Io`]
pub fn dequantize_checkpoint(
    source: &Checkpoint,
    folder: impl AsRef<Path>,
    options: &DequantizeOptions,
    progress: impl FnMut(Progress<'_>),
) -> Result<Converted, Nf4Error> {
    check_source(source)?;
    let mut model_config = ModelConfig::read(source)?;
    let mut writer = start_writer(
        source,
        folder.as_ref(),
        options.max_shard_bytes,
        options.overwrite,
    )?;
    let (parameters, dropped) = (source.parameters(), source.activation_scales());
    let mut reporter = Reporter::new(source, parameters.len(), progress);
    let mut converted = 0;
    for &key in &parameters {
        if source.is_quantized(key) {
            write_decoded(&mut writer, source, key, options.dtype)?;
            converted += 1;
        } else {
            let info = source.tensor_info(key)?;
            write_dense(
                &mut writer,
                key,
                info,
                source.tensor_bytes(key)?,
                options.dtype,
            )?;
        }
        reporter.done(key);
    }

    copy_other_files(&mut writer, source, ClaimFile::Replaced)?;
    if let Some(config) = &mut model_config {
        config.set_dense();
        if let Some(dtype) = options.dtype {
            config.set_dtype(dtype);
        }
        config.write(&mut writer)?;
    }
    Ok(Converted {
        converted,
        kept: parameters.len() - converted,
        dropped: dropped.into_iter().map(String::from).collect(),
        source_bytes: source.size_bytes(),
        written: writer.finish()?,
        ..Converted::default()
    })
}

/// Decodes a quantized parameter, rounded to `dtype` if that is another than its own.
pub(super) fn write_decoded(
    writer: &mut CheckpointWriter,
    source: &Checkpoint,
    key: &str,
    dtype: Option<FloatType>,
) -> Result<(), Nf4Error> {
    let (weight, orientation) = source.load_image(key)?;
    with_float_type!(weight.dtype(), T => {
        let (values, shape) = decode_upright::<T>(weight, orientation, key)?;
        write_values(writer, key, values, &shape, dtype)
    })
}

/// The values of a weight, the way the model has it, and their shape.
pub(super) fn decode_upright<T: FloatElement>(
    weight: PackedImage,
    orientation: Orientation,
    key: &str,
) -> Result<(Vec<T>, Vec<usize>), Nf4Error> {
    let mut shape = weight.shape().to_vec();
    let values = decode::<T>(&weight, key)?;
    drop(weight);
    let values = orientation.turn(key, values.into(), &mut shape)?;
    Ok((values.into_owned(), shape))
}

fn write_values<T: FloatElement>(
    writer: &mut CheckpointWriter,
    key: &str,
    values: Vec<T>,
    shape: &[usize],
    dtype: Option<FloatType>,
) -> Result<(), Nf4Error> {
    match dtype.filter(|&dtype| dtype != T::FLOAT_TYPE) {
        None => writer.write_tensor(key, stored_dtype(T::FLOAT_TYPE), shape, &le_bytes(&values)),
        Some(dtype) => with_float_type!(dtype, U => {
            let rounded = cast::<T, U>(&values, key)?;
            drop(values);
            writer.write_tensor(key, stored_dtype(dtype), shape, &le_bytes(&rounded))
        }),
    }
}
