//! From a checkpoint to a model.

use burn::module::Module;
use burn::tensor::Device;
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, CheckpointStore};
use burn_nf4::format::FloatType;
use burn_nf4::model::LinearLayers;
use burn_nf4::op::MatmulStrategy;

use crate::error::ModelError;
use crate::model::family::vision;
use crate::model::stacks::unstacked;
use crate::model::{Decoder, DecoderConfig};

/// Buffers that old checkpoints hold and transformers does not read either.
const NOT_READ: &str = r"\.rotary_emb\.inv_freq$";

/// Builds the model and reads its weights onto the device, one at a time.
///
/// Float tensors are cast to `dtype`, the type to compute in; packed ones stay as they are. Nothing
/// is trainable. Where the config ties the head to the table and the checkpoint holds two different
/// ones, the model has both, as in transformers: see [`Decoder::lm_head`]. Of a model of text and images
/// the text part is read; [`left_out`] says what is not.
///
/// # Errors
/// - [`Nf4Error::Misfit`](burn_nf4::Nf4Error::Misfit) with all that is missing, unexpected or of
///   another form, before anything is read
/// - [`ModelError::Setting`] for a quantized embedding: a [`Decoder`] has it in floats
/// - those of [`LinearLayers::load_checkpoint`], such as for a checkpoint that its config.json says
///   something else of
pub fn load(
    store: CheckpointStore,
    config: &DecoderConfig,
    dtype: FloatType,
    device: &Device,
) -> Result<Decoder, ModelError> {
    check_embedding(store.checkpoint())?;
    let store = store.with_dtype(dtype).ignore(NOT_READ)?;
    let mut store = unstacked(store, config)?;
    if config.text_part_of.is_some() {
        store = store.ignore(vision::OTHER_KEYS)?;
        for (key, of_text) in vision::TEXT_KEYS {
            store = store.with_key_remapping(key, of_text)?;
        }
    }
    let model = config.init(device).load_checkpoint(store)?.no_grad();
    Ok(by_rule(model)?)
}

/// The model with products of weights in 4 bit by kernels that follow from the sizes. To measure which are
/// fastest, for each size and number of rows, takes several times as long as a first text, and in steps of 1,
/// 16 and 64 rows of an 8B model on an H100 it gained less than 1%.
pub(super) fn by_rule(model: Decoder) -> Result<Decoder, Nf4Error> {
    model.try_map_linears(|_, layer| Ok(layer.with_strategy(MatmulStrategy::Rule)))
}

/// Refuses a packed table of the embedding, which `quantize --embeddings` makes.
fn check_embedding(checkpoint: &Checkpoint) -> Result<(), ModelError> {
    let parameters = checkpoint.parameters().into_iter();
    let mut quantized = parameters.filter(|key| checkpoint.is_quantized(key));
    match quantized.find(|key| key.ends_with(".embed_tokens.weight")) {
        None => Ok(()),
        Some(key) => Err(ModelError::setting(
            format!("`{key}`"),
            "quantized",
            "floats: the models here have no packed embeddings; quantize without --embeddings",
        )),
    }
}

/// The parameters of a checkpoint that [`load`] leaves out as they belong to another part of the model: of
/// one of text and images the vision tower and the projector.
pub fn left_out<'a>(checkpoint: &'a Checkpoint, config: &DecoderConfig) -> Vec<&'a str> {
    match config.text_part_of {
        Some(_) => vision::other_parameters(checkpoint),
        None => Vec::new(),
    }
}
