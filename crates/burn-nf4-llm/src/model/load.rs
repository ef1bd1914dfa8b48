//! From a checkpoint to a model.

use burn::module::Module;
use burn::tensor::Device;
use burn_nf4::checkpoint::CheckpointStore;
use burn_nf4::format::FloatType;
use burn_nf4::model::LinearLayers;

use crate::error::ModelError;
use crate::model::{Decoder, DecoderConfig};

/// Buffers that old checkpoints hold and transformers does not read either.
const NOT_READ: &str = r"\.rotary_emb\.inv_freq$";

/// Builds the model and reads its weights onto the device, one at a time.
///
/// Float tensors are cast to `dtype`, the type to compute in; packed ones stay as they are. Nothing
/// is trainable. Where the config ties the head to the table and the checkpoint holds two different
/// ones, the model has both, as in transformers: see [`Decoder::lm_head`].
///
/// # Errors
/// - [`Nf4Error::Misfit`](burn_nf4::Nf4Error::Misfit) with all that is missing, unexpected or of
///   another form, before anything is read
/// - those of [`LinearLayers::load_checkpoint`], such as for a checkpoint that its config.json says
///   something else of
pub fn load(
    store: CheckpointStore,
    config: &DecoderConfig,
    dtype: FloatType,
    device: &Device,
) -> Result<Decoder, ModelError> {
    let store = store.with_dtype(dtype).ignore(NOT_READ)?;
    Ok(config.init(device).load_checkpoint(store)?.no_grad())
}
