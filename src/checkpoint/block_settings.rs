//! What `config.json` says of weights in NVFP4, MXFP4 and FP8 that their tensors do not say.

use std::path::PathBuf;

use super::block_weight::TILE;
use super::convert::ModelConfig;
use super::folder::Checkpoint;
use super::quant_claim::QuantClaim;
use crate::error::Nf4Error;
use crate::format::FloatType;

/// The settings, of which each is checked where it matters.
#[derive(Debug, Default)]
pub(super) struct BlockSettings {
    path: PathBuf,
    dtype: Option<String>,
    tile: Option<Vec<u64>>,
}

impl BlockSettings {
    /// # Errors
    /// [`Nf4Error::ModelConfig`], [`Nf4Error::Io`] for a `config.json` that cannot be read.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, Nf4Error> {
        let Some(config) = ModelConfig::read(checkpoint)? else {
            return Ok(Self::default());
        };
        let claims = config.claims();
        let claims = claims.iter().filter_map(QuantClaim::of);
        Ok(Self {
            path: config.path().into(),
            dtype: config.dtype().map(String::from),
            tile: claims.into_iter().find_map(|claim| claim.tile),
        })
    }

    /// The dtype that weights had; bf16 if nothing is said of it.
    ///
    /// # Errors
    /// [`Nf4Error::ModelConfig`] for one that weights do not have here.
    pub fn dtype(&self) -> Result<FloatType, Nf4Error> {
        let Some(name) = &self.dtype else {
            return Ok(FloatType::BF16);
        };
        FloatType::from_name(name, "").map_err(|_| Nf4Error::ModelConfig {
            path: self.path.clone(),
            message: format!("the dtype is `{name}`, expected float16, bfloat16 or float32"),
        })
    }

    /// # Errors
    /// [`Nf4Error::Config`] for tiles of another size than 128 by 128.
    pub fn check_tile(&self) -> Result<(), Nf4Error> {
        match &self.tile {
            Some(tile) if *tile != TILE.map(|side| side as u64) => Err(Nf4Error::Config {
                field: "weight_block_size",
                expected: "[128, 128]",
                given: format!("{tile:?}"),
            }),
            _ => Ok(()),
        }
    }
}
