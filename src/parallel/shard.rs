//! Packed weights of which each rank keeps an equal part.

use std::ops::Range;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Int, Tensor};

use super::rank::{GatheredWords, Gathering, Rank};
use crate::error::Nf4Error;
use crate::format::{PackedLayout, WeightForm, check_len};
use crate::op::PACKED_CONTAINER;

/// Words at whose multiples each weight begins, so that a view of it begins at a multiple of 512 bytes.
const ALIGNMENT: usize = 128;

/// The words of packed weights, one after the other in one row that is cut into equal parts, one a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    /// Of each weight, in the order in which a visitor meets them.
    words: Vec<usize>,
    starts: Vec<usize>,
    /// Of each rank.
    part: usize,
}

impl Row {
    pub fn new(words: Vec<usize>, ranks: usize) -> Self {
        let mut starts = Vec::with_capacity(words.len());
        let mut end = 0;
        for &words in &words {
            starts.push(end);
            end += words.next_multiple_of(ALIGNMENT);
        }
        // A tensor has elements, also where there are no weights.
        let part = end.div_ceil(ranks).max(1).next_multiple_of(ALIGNMENT);
        Self {
            words,
            starts,
            part,
        }
    }

    /// The words of a weight that a rank keeps, and where in its part they lie; none if it keeps none.
    pub fn kept(&self, weight: usize, rank: usize) -> Option<(Range<usize>, usize)> {
        let (first, end) = (rank * self.part, (rank + 1) * self.part);
        let start = self.starts[weight];
        let from = start.max(first);
        let to = (start + self.words[weight]).min(end);
        (from < to).then(|| (from - start..to - start, from - first))
    }
}

/// The packed weights of a module, of which this rank keeps a part: 1 / ranks of their bytes, rounded up to 512.
///
/// FSDP2 calls such a module a unit, for which [`gather`](Self::gather) is `unshard`. What is not packed, such as norms
/// and low-rank branches, stays as it is on each rank.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use burn_nf4::format::QuantConfig;
/// use burn_nf4::parallel::{self, ShardedWeights};
/// use burn_nf4::{Nf4Error, BlockWeight};
///
/// let devices = vec![Device::default(), Device::default()];
/// parallel::run(devices, |rank| -> Result<(), Nf4Error> {
///     let dense = Tensor::<2>::ones([256, 128], rank.device());
///     let weight = BlockWeight::quantize(dense, QuantConfig::default())?;
///     let bytes = weight.size_bytes();
///     let (empty, sharded) = ShardedWeights::new(weight, &rank)?;
///     assert!(sharded.size_bytes() <= bytes / 2 + 512);
///     // Before each use, and again for its gradients.
///     let words = sharded.gather(&rank)?.end();
///     let weight = sharded.put(empty.clone(), &words);
///     assert_eq!(weight.to_host()?.shape(), [256, 128]);
///     Ok(())
/// })?;
/// # Ok::<(), Nf4Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ShardedWeights {
    row: Row,
    /// `[row.part]`, u32.
    part: Tensor<1, Int>,
    /// Whether the tensors of the module are on an autodiff device.
    in_autodiff: bool,
}

impl ShardedWeights {
    /// Takes the packed weights out of a module, and keeps the part of them that is this rank's; for all ranks. The
    /// module cannot be used until they are [put in](Self::put) again.
    ///
    /// Each rank needs the same weights, which is not checked: parts of other ones are gathered to weights that nobody
    /// had. Fresh ones are the same where they are made [in turn](Rank::in_turn), from the same seed.
    ///
    /// Of a module that was loaded [by a plan](crate::checkpoint::ShardPlan) the parts are there already.
    ///
    /// # Errors
    /// [`Nf4Error::Length`] for a weight that is neither whole nor the part of it that a plan gives this rank, and
    /// unless all ranks have weights of the same sizes. [`Nf4Error::Parallel`] if a rank has failed.
    pub fn new<M: Module>(module: M, rank: &Rank) -> Result<(M, Self), Nf4Error> {
        let mut taken = Taken::default();
        let module = module.map(&mut taken);
        let words: Vec<usize> = taken.weights.iter().map(|(words, _)| *words).collect();
        let row = Row::new(words, rank.size());
        for other in rank.exchange(row.words.clone())? {
            check_len(
                "packed weights of another rank",
                row.words.len(),
                other.len(),
            )?;
            for (own, other) in row.words.iter().zip(other) {
                check_len("packed weight of another rank", *own, other)?;
            }
        }
        let in_autodiff = taken.in_autodiff;
        let device = rank.device().clone().without_autodiff();
        let mut part = Tensor::<1, Int>::zeros([row.part], (&device, DType::U32));
        for (weight, (words, given)) in taken.weights.into_iter().enumerate() {
            let Some((kept, at)) = row.kept(weight, rank.index()) else {
                continue;
            };
            let [len] = given.dims();
            let given = match len == words {
                true => given.narrow(0, kept.start, kept.len()),
                false => {
                    check_len("part of a packed weight", kept.len(), len)?;
                    given
                }
            };
            #[allow(clippy::single_range_in_vec_init, reason = "one axis")]
            {
                part = part.slice_assign([at..at + kept.len()], given);
            }
        }
        let sharded = Self {
            row,
            part,
            in_autodiff,
        };
        Ok((module, sharded))
    }

    /// Whether the module has no packed weights.
    pub fn is_empty(&self) -> bool {
        self.row.words.is_empty()
    }

    /// Bytes on this rank's device.
    pub fn size_bytes(&self) -> usize {
        self.row.part * size_of::<u32>()
    }

    /// Begins to gather the parts of all ranks; for all ranks.
    ///
    /// # Errors
    /// Those of [`Rank::gather`].
    pub fn gather(&self, rank: &Rank) -> Result<Gathering, Nf4Error> {
        rank.gather(self.part.clone())
    }

    /// Puts the weights into the module that they were taken from, as views of what was gathered where the
    /// device has views.
    ///
    /// - `words`: of a [gathering](Self::gather) that has ended
    ///
    /// # Panics
    /// If the module has more packed weights.
    pub fn put<M: Module>(&self, module: M, words: &GatheredWords) -> M {
        module.map(&mut Put {
            sharded: self,
            words,
            next: 0,
            in_weight: false,
        })
    }
}

/// Takes the packed tensors out of weights, with how many words they have.
#[derive(Default)]
struct Taken {
    weights: Vec<(usize, Tensor<1, Int>)>,
    /// Words of the weight that is visited.
    words: Option<usize>,
    in_autodiff: bool,
}

impl ModuleMapper for Taken {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.words = words_of(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.words = None;
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let Some(words) = self.words else {
            return param;
        };
        let mut value = param.val();
        let nothing = Tensor::zeros([1; D], (&value.device(), DType::U32));
        if value.is_autodiff() {
            self.in_autodiff = true;
            value = value.inner();
        }
        self.weights.push((words, value.flatten(0, D - 1)));
        replaced(param, nothing)
    }
}

struct Put<'a> {
    sharded: &'a ShardedWeights,
    words: &'a GatheredWords,
    next: usize,
    in_weight: bool,
}

impl ModuleMapper for Put<'_> {
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
        let ShardedWeights {
            row, in_autodiff, ..
        } = self.sharded;
        let (start, words) = (row.starts[self.next], row.words[self.next]);
        self.next += 1;
        let mut value = self.words.part(start, words);
        if *in_autodiff {
            value = Tensor::from_inner(value);
        }
        replaced(param, value.reshape([words as i32; D]))
    }
}

fn replaced<const D: usize>(
    param: Param<Tensor<D, Int>>,
    value: Tensor<D, Int>,
) -> Param<Tensor<D, Int>> {
    let (id, _, mapper) = param.consume();
    Param::from_mapped_value(id, value, mapper)
}

/// The words of a packed weight, by what visitors are told of it.
fn words_of(name: &str, container: &str) -> Option<usize> {
    if container != PACKED_CONTAINER {
        return None;
    }
    let form = WeightForm::from_packed_name(name)?;
    let layout = PackedLayout::for_shape(&form.shape, form.config).ok()?;
    Some(layout.words())
}
