//! Which parts of weights a rank loads.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Int, Shape, Tensor};

use super::parameters::{Kind, parameters_of};
use crate::error::Nf4Error;
use crate::format::PackedLayout;
use crate::op::PACKED_CONTAINER;
use crate::parallel::{Rank, Row};

/// Which parts of packed weights a rank loads, for
/// [`CheckpointStore::shard`](super::CheckpointStore::shard): each unit's weights are cut into equal
/// parts, as [`ShardedWeights::new`](crate::parallel::ShardedWeights::new) has them.
#[derive(Debug, Clone)]
pub struct ShardPlan {
    rank: usize,
    ranks: usize,
    units: Vec<String>,
}

impl ShardPlan {
    /// A plan for a rank.
    ///
    /// - `units`: the paths of modules in the model, such as `layers.0`; no module of another
    pub fn new(rank: &Rank, units: impl IntoIterator<Item = String>) -> Self {
        Self {
            rank: rank.index(),
            ranks: rank.size(),
            units: units.into_iter().collect(),
        }
    }

    /// The model with weights of units that only hold the words that the rank keeps, and which words
    /// those are, by the paths of the weights.
    ///
    /// # Errors
    /// [`Nf4Error::Config`] for a unit that the model has not, [`Nf4Error::ElementCount`] for an impossible weight.
    pub(crate) fn cut<M: Module>(
        &self,
        model: M,
    ) -> Result<(M, BTreeMap<String, Range<usize>>), Nf4Error> {
        let parameters = parameters_of(&model, true);
        let is_in = |unit: &str, path: &str| {
            let rest = path.strip_prefix(unit);
            rest.is_some_and(|rest| rest.starts_with('.'))
        };
        for unit in &self.units {
            if !parameters
                .iter()
                .any(|parameter| is_in(unit, &parameter.path))
            {
                return Err(Nf4Error::Config {
                    field: "units",
                    expected: "paths of modules of the model",
                    given: format!("`{unit}`, in which there is no parameter"),
                });
            }
        }
        let mut packed: Vec<(String, usize)> = Vec::new();
        for parameter in parameters {
            if let Kind::Packed(form) = &parameter.kind {
                let layout = PackedLayout::for_shape(&form.shape, form.config)?;
                packed.push((parameter.path, layout.words()));
            }
        }
        let mut kept: Vec<Option<Range<usize>>> = vec![None; packed.len()];
        for unit in &self.units {
            let of_unit: Vec<usize> = (0..packed.len())
                .filter(|&weight| is_in(unit, &packed[weight].0))
                .collect();
            let words = of_unit.iter().map(|&weight| packed[weight].1).collect();
            let row = Row::new(words, self.ranks);
            for (number, &weight) in of_unit.iter().enumerate() {
                let words = row.kept(number, self.rank).map(|(words, _)| words);
                // A tensor has elements. One word too many does no harm: it is not looked at.
                kept[weight] = Some(words.unwrap_or(0..1));
            }
        }
        let model = model.map(&mut Cut {
            kept: &kept,
            next: 0,
            in_weight: false,
        });
        let kept = packed.into_iter().zip(kept);
        let kept = kept.filter_map(|((path, _), words)| Some((path, words?)));
        Ok((model, kept.collect()))
    }
}

/// Has weights that are yet to be loaded hold only some of their words.
struct Cut<'a> {
    /// Of each weight.
    kept: &'a [Option<Range<usize>>],
    next: usize,
    in_weight: bool,
}

impl ModuleMapper for Cut<'_> {
    fn enter_module(&mut self, _name: &str, container: &str) {
        self.in_weight = container == PACKED_CONTAINER;
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.in_weight = false;
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        if !self.in_weight {
            return param;
        }
        self.next += 1;
        let Some(words) = self.kept[self.next - 1].clone() else {
            return param;
        };
        let shape = Shape::from([words.len(); D]);
        let of = shape.clone();
        Param::uninitialized(
            param.id,
            move |device: &Device, _| Tensor::zeros(of.clone(), (device, DType::U32)),
            param.lazy_device(),
            false,
            shape,
        )
    }
}
