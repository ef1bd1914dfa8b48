//! Training on several devices: each has its part of the batches, and may hold its part of the packed weights only.

use std::borrow::Cow;
use std::sync::Arc;

use burn::tensor::Device;
use burn_nf4::checkpoint::{CheckpointStore, ShardPlan};
use burn_nf4::format::FloatType;
use burn_nf4::parallel::{GatheredWords, Gathering, Rank, ShardedWeights};

use crate::error::ModelError;
use crate::model::{Decoder, DecoderConfig, DecoderLayer, load};

/// The packed weights of a model's layers, of which each rank keeps an equal part, as FSDP2 does it with each layer
/// a unit. Embedding, head, norms and adapters are on every rank.
#[derive(Debug, Clone)]
pub struct Shards {
    rank: Arc<Rank>,
    layers: Vec<ShardedWeights>,
}

impl Shards {
    /// Loads a model as [`load`] does, of which this rank keeps its part: no device holds more of the layers, and the
    /// host no more than the weight that is being read.
    ///
    /// # Errors
    /// Those of [`load`].
    pub fn load(
        store: CheckpointStore,
        config: &DecoderConfig,
        dtype: FloatType,
        device: &Device,
        rank: &Arc<Rank>,
    ) -> Result<(Decoder, Self), ModelError> {
        let plan = Self::plan(config, rank);
        Self::of(load(store.shard(plan), config, dtype, device)?, rank)
    }

    /// Which words of packed weights a rank loads: what [`CheckpointStore::shard`] takes.
    pub fn plan(config: &DecoderConfig, rank: &Rank) -> ShardPlan {
        let layers = (0..config.layers.len()).map(|layer| format!("layers.{layer}"));
        ShardPlan::new(rank, layers)
    }

    /// Takes the packed weights out of a model's layers. The model can be trained by a
    /// [`Trainer`](super::Trainer) that is [given the shards](super::Trainer::in_group), and do nothing else.
    ///
    /// # Errors
    /// Those of [`ShardedWeights::new`].
    pub fn of(mut model: Decoder, rank: &Arc<Rank>) -> Result<(Decoder, Self), ModelError> {
        let mut shards = Self::new(rank);
        let layers = std::mem::take(&mut model.layers);
        for layer in layers {
            let layer = shards.take(layer)?;
            model.layers.push(layer);
        }
        Ok((model, shards))
    }

    /// Those of a model without layers.
    pub fn new(rank: &Arc<Rank>) -> Self {
        Self {
            rank: rank.clone(),
            layers: Vec::new(),
        }
    }

    /// Takes the packed weights out of the next layer; for all ranks.
    ///
    /// # Errors
    /// Those of [`ShardedWeights::new`].
    pub fn take(&mut self, layer: DecoderLayer) -> Result<DecoderLayer, ModelError> {
        let (layer, shard) = ShardedWeights::new(layer, &self.rank)?;
        self.layers.push(shard);
        Ok(layer)
    }

    /// Whether they are of a model of so many layers, and of this rank.
    pub(super) fn fit(&self, rank: &Arc<Rank>, layers: usize) -> bool {
        Arc::ptr_eq(&self.rank, rank) && self.layers.len() == layers
    }

    /// Whether no layer has packed weights.
    pub fn is_empty(&self) -> bool {
        self.layers.iter().all(ShardedWeights::is_empty)
    }

    /// Bytes of packed weights on this rank's device.
    pub fn size_bytes(&self) -> usize {
        self.layers.iter().map(ShardedWeights::size_bytes).sum()
    }
}

/// The layers of a model, whose weights are gathered where ranks keep parts of them: those of a layer while the one
/// before it is computed.
pub(super) struct Layers<'a> {
    model: &'a Decoder,
    shards: Option<&'a Shards>,
    /// The layer whose weights are on their way.
    next: Option<(usize, Gathering)>,
    /// The layer whose weights were asked for again.
    kept: Option<(usize, GatheredWords)>,
}

impl<'a> Layers<'a> {
    pub fn new(model: &'a Decoder, shards: Option<&'a Shards>) -> Self {
        Self {
            model,
            shards,
            next: None,
            kept: None,
        }
    }

    pub fn len(&self) -> usize {
        self.model.layers.len()
    }

    /// A layer with its weights; those of layer `then` are gathered from now on, or kept if it is the same.
    ///
    /// # Errors
    /// Those of [`Rank::gather`].
    pub fn get(
        &mut self,
        index: usize,
        then: Option<usize>,
    ) -> Result<Cow<'a, DecoderLayer>, ModelError> {
        let layer = &self.model.layers[index];
        let Some(shards) = self.shards else {
            return Ok(Cow::Borrowed(layer));
        };
        let shard = &shards.layers[index];
        let words = match (self.kept.take(), self.next.take()) {
            (Some((kept, words)), _) if kept == index => words,
            (_, Some((next, gathering))) if next == index => gathering.end(),
            _ => shard.gather(&shards.rank)?.end(),
        };
        let layer = shard.put(layer.clone(), &words);
        match then {
            Some(then) if then == index => self.kept = Some((index, words)),
            Some(then) => {
                let gathering = shards.layers[then].gather(&shards.rank)?;
                self.next = Some((then, gathering));
            }
            None => {}
        }
        Ok(Cow::Owned(layer))
    }
}
