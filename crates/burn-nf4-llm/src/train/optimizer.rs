//! The optimizer of a run: AdamW over all trained parameters of a model at once.

use std::collections::HashMap;
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::op::{AdamWMoments, AdamWSettings, FlatAdamW, StepReport, TensorState};
use burn_nf4::parallel::Rank;

use crate::error::ModelError;
use crate::train::optimizer_file;

/// Runs a body for the rank of a parameter as a constant.
macro_rules! of_rank {
    ($rank:expr, $d:ident => $body:expr, [$($value:literal)+]) => {
        match $rank {
            $($value => {
                const $d: usize = $value;
                $body
            })+
            rank => unreachable!("Burn has no tensors of rank {rank}"),
        }
    };
    ($rank:expr, $d:ident => $body:expr) => {
        of_rank!($rank, $d => $body, [1 2 3 4 5 6 7 8])
    };
}

/// A trained parameter.
#[derive(Debug)]
struct Trained {
    id: ParamId,
    /// Its path in the model.
    path: String,
    shape: Vec<usize>,
    /// The type in which the model has it.
    dtype: DType,
    /// The type in which it is saved.
    kept: DType,
}

/// AdamW over all parameters of a model that want a gradient. In f32 they are views of its buffer of values;
/// others are casts of them.
///
/// Branches of a model in bf16 whose products are cuBLASLt's are handed out in bf16: they are rounded to it for
/// each product anyway, as by PyTorch's autocast.
#[derive(Debug)]
pub struct Optimizer {
    trained: Vec<Trained>,
    numbers: HashMap<ParamId, usize>,
    flat: FlatAdamW,
    settings: AdamWSettings,
    /// Why gradients were not taken, to be told by the step.
    refused: Option<Nf4Error>,
}

impl Optimizer {
    /// An optimizer of the parameters of a model that want a gradient, and the model with its parameters there.
    ///
    /// - `of_branches`: the type in which the model has the matrices of low-rank branches that are in f32
    ///
    /// # Errors
    /// [`ModelError::Nf4`] if the model has none, for settings that make no sense, and unless all are in f16, bf16
    /// or f32 and on one device.
    pub fn new<M: Module>(
        model: M,
        settings: AdamWSettings,
        moments: AdamWMoments,
        of_branches: Option<DType>,
    ) -> Result<(Self, M), ModelError> {
        settings.check()?;
        let mut collected = Collected {
            of_branches,
            ..Collected::default()
        };
        model.visit(&mut collected);
        let Collected {
            trained, values, ..
        } = collected;
        let numbers = trained.iter().enumerate();
        let optimizer = Self {
            numbers: numbers.map(|(number, one)| (one.id, number)).collect(),
            flat: FlatAdamW::new(values, moments)?,
            trained,
            settings,
            refused: None,
        };
        let model = optimizer.with_values(model);
        Ok((optimizer, model))
    }

    /// Adds gradients to those of the next step. What is wrong with them is told by the step.
    pub fn accumulate(&mut self, mut gradients: GradientsParams) {
        let mut parts = Vec::with_capacity(gradients.len());
        for (number, one) in self.trained.iter().enumerate() {
            if gradients.is_empty() {
                break;
            }
            let gradient = of_rank!(one.shape.len(), D => {
                gradients.remove::<D>(one.id).map(|gradient| gradient.flatten(0, D - 1))
            });
            if let Some(gradient) = gradient {
                parts.push((number, gradient));
            }
        }
        if let Err(error) = self.flat.accumulate(parts) {
            self.refused.get_or_insert(error);
        }
    }

    /// A step with the gradients that were accumulated, of a model whose parameters are here; other owners of its
    /// parameters cost a copy. The host waits for nothing until [`report`](Self::report).
    ///
    /// # Errors
    /// [`ModelError::Nf4`] for gradients, a rate or a loss that make no sense. Then the model is as before.
    pub fn step<M: Module>(
        &mut self,
        rate: f64,
        model: &mut M,
        loss: Tensor<1>,
    ) -> Result<(), ModelError> {
        if let Some(error) = self.refused.take() {
            return Err(error.into());
        }
        // Views of the values would keep them from being written in place.
        *model = self.without_values(model.clone());
        let made = self.flat.step(rate, &self.settings, loss);
        *model = self.with_values(model.clone());
        Ok(made?)
    }

    /// The model with something else in the place of its parameters.
    pub(super) fn without_values<M: Module>(&self, model: M) -> M {
        let nothing = Tensor::zeros([1], (&self.flat.device(), DType::F32));
        let numbers = &self.numbers;
        model.map(&mut Released { numbers, nothing })
    }

    /// Sums the gradients and a loss over the ranks of a group; for all ranks.
    ///
    /// # Shapes
    /// - `loss`: `[1]`, f32, and so the result
    ///
    /// # Errors
    /// Those of [`FlatAdamW::all_reduce`].
    pub(super) fn all_reduce(
        &mut self,
        rank: &Rank,
        loss: Tensor<1>,
    ) -> Result<Tensor<1>, ModelError> {
        self.flat.all_reduce(rank)?;
        Ok(rank.all_reduce(loss)?)
    }

    /// Gives the model the values of rank 0; for all ranks.
    ///
    /// # Errors
    /// Those of [`FlatAdamW::broadcast`].
    pub(super) fn broadcast<M: Module>(&mut self, rank: &Rank, model: M) -> Result<M, ModelError> {
        let model = self.without_values(model);
        self.flat.broadcast(rank)?;
        Ok(self.with_values(model))
    }

    /// See [`FlatAdamW::probe`].
    pub(super) fn probe(&self) -> Tensor<1> {
        self.flat.probe()
    }

    /// See [`FlatAdamW::with_gradients`].
    pub(super) fn with_gradients(&self) -> Vec<usize> {
        self.flat.with_gradients()
    }

    /// See [`FlatAdamW::set_with_gradients`].
    pub(super) fn set_with_gradients(&mut self, tensors: &[usize]) {
        self.flat.set_with_gradients(tensors);
    }

    /// See [`FlatAdamW::drop_gradients`].
    pub(super) fn drop_gradients(&mut self) {
        self.flat.drop_gradients();
    }

    /// Waits for the last step and says what became of it, once.
    ///
    /// # Errors
    /// Those of [`FlatAdamW::report`].
    pub fn report(&mut self) -> Result<Option<StepReport>, ModelError> {
        Ok(self.flat.report()?)
    }

    /// The model with its parameters there.
    pub(super) fn with_values<M: Module>(&self, model: M) -> M {
        model.map(&mut Values {
            optimizer: self,
            flat: HashMap::new(),
            saves: false,
        })
    }

    /// The model with its parameters in the types in which they came.
    pub fn to_save<M: Module>(&self, model: M) -> M {
        model.map(&mut Values {
            optimizer: self,
            flat: HashMap::new(),
            saves: true,
        })
    }

    /// Writes `optimizer.safetensors` into a folder, after so many steps of the run: moments, numbers of steps, and
    /// the f32 values of parameters of other types.
    ///
    /// # Errors
    /// [`ModelError::Resume`] if it cannot be written.
    pub fn save(&mut self, folder: &Path, step: usize) -> Result<(), ModelError> {
        let state = self.flat.state()?;
        let all = self
            .trained
            .iter()
            .zip(&state)
            .map(|(one, state)| optimizer_file::Saved {
                path: &one.path,
                shape: &one.shape,
                state,
                has_values: one.kept != DType::F32,
            });
        optimizer_file::write(folder, step, all)
    }

    /// Goes on from what [`save`](Self::save) wrote into a folder after so many steps, with the model of that time.
    ///
    /// # Errors
    /// [`ModelError::Resume`] for a file of another step or of other parameters, or of an earlier version,
    /// [`ModelError::Nf4`] for one that cannot be read. Then nothing is changed.
    pub fn load<M: Module>(
        &mut self,
        folder: &Path,
        step: usize,
        model: M,
    ) -> Result<M, ModelError> {
        let mut state = self.flat.state()?;
        let mut file = optimizer_file::open(folder, step)?;
        for (
            one,
            TensorState {
                values,
                moments,
                steps,
            },
        ) in self.trained.iter().zip(&mut state)
        {
            file.read_moments(&one.path, &one.shape, moments)?;
            if one.kept != DType::F32 {
                file.read_values(&one.path, &one.shape, values)?;
            }
            *steps = file.steps(&one.path)?;
        }
        file.check_all_read()?;
        self.flat.load_state(&state)?;
        Ok(self.with_values(model))
    }
}

/// What a model trains.
#[derive(Default)]
struct Collected {
    of_branches: Option<DType>,
    path: Vec<String>,
    trained: Vec<Trained>,
    values: Vec<Tensor<1>>,
}

impl ModuleVisitor for Collected {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // A tied one is met twice.
        if !param.is_require_grad() || self.trained.iter().any(|one| one.id == param.id) {
            return;
        }
        let value = param.val().inner();
        let name = self.path.last().map(String::as_str);
        let of_branch = matches!(name, Some("lora_a" | "lora_b")) && value.dtype() == DType::F32;
        self.trained.push(Trained {
            id: param.id,
            path: self.path.join("."),
            shape: value.dims().into(),
            dtype: match self.of_branches.filter(|_| of_branch) {
                Some(dtype) => dtype,
                None => value.dtype(),
            },
            kept: value.dtype(),
        });
        self.values.push(value.flatten(0, D - 1));
    }
}

/// Takes the values out of trained parameters.
struct Released<'a> {
    numbers: &'a HashMap<ParamId, usize>,
    /// What is there in the meantime, `[1]`.
    nothing: Tensor<1>,
}

impl ModuleMapper for Released<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.numbers.contains_key(&param.id) {
            true => replaced(param, self.nothing.clone().reshape([1; D])),
            false => param,
        }
    }
}

/// Puts the values of the optimizer into trained parameters.
struct Values<'a> {
    optimizer: &'a Optimizer,
    /// The flat buffer in each type that is met.
    flat: HashMap<DType, Tensor<1>>,
    /// Whether it is to be saved.
    saves: bool,
}

impl ModuleMapper for Values<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Optimizer {
            trained,
            numbers,
            flat,
            ..
        } = self.optimizer;
        let Some(&number) = numbers.get(&param.id) else {
            return param;
        };
        let one = &trained[number];
        let shape: [usize; D] = match one.shape.as_slice().try_into() {
            Ok(shape) => shape,
            Err(_) => unreachable!("a parameter keeps its rank"),
        };
        let dtype = match self.saves {
            true => one.kept,
            false => one.dtype,
        };
        let values = self.flat.entry(dtype);
        let values = values.or_insert_with(|| flat.values(dtype));
        replaced(param, flat.view(values, number, shape))
    }
}

/// A trained parameter with another value, which comes without a graph.
fn replaced<const D: usize>(param: Param<Tensor<D>>, value: Tensor<D>) -> Param<Tensor<D>> {
    let (id, before, mapper) = param.consume();
    let mut value = Tensor::from_inner(value);
    if let Some(strategy) = before.gradient_checkpointing_strategy() {
        value = value.with_gradient_checkpointing_strategy(strategy);
    }
    Param::from_mapped_value(id, value.require_grad(), mapper)
}
