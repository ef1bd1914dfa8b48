//! How a model hands out its linear layers.

use std::path::Path;

use burn::module::Module;
use burn::tensor::Device;

use super::check::{check_handed_out, check_names};
use super::count::ParameterCount;
use super::names::{model_dtype, module_name, other_floats};
use super::quantize::QuantizeLayers;
use super::save::SaveFolder;
use super::stack::StackPlace;
use super::{apply, extract, fresh, load, quantize, save};
use crate::checkpoint::{CheckpointStore, Written};
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::nn::AnyLinear;
use crate::op::MatmulStrategy;
use crate::peft::{Adapter, LoraConfig};

/// What [`LinearLayers::map_linears`] calls with the path of each layer and the layer, to get the one to
/// put in its place.
pub type MapLinear<'a> = dyn FnMut(&str, AnyLinear) -> Result<AnyLinear, Nf4Error> + 'a;

/// The head and the embedding that it takes its weight from, by the names that a checkpoint has for the
/// modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TiedHead {
    /// The head, such as `lm_head`.
    pub head: String,
    /// The embedding, such as `model.embed_tokens`.
    pub embedding: String,
}

/// A model whose linear layers can be quantized, loaded in any form, and adapted.
///
/// Implement it for the model and for each module that has such layers within it, with
/// [`linear_layers!`](crate::linear_layers) or by hand: a layer is reached under the names of the fields
/// that lead to it, as in Burn's records. [`AnyLinear`] itself, and an `Option` or a `Vec` of
/// modules have it already.
///
/// Everything else of the model, norms and embeddings, is reached by Burn's own visitors and mappers.
/// With them, and with these layers, a model can be
///
/// - [quantized](Self::quantize), whole or but for some layers,
/// - [loaded](Self::load_checkpoint) from a checkpoint, whichever of its layers are in 4 bit, and
///   [saved](Self::save_folder) as one,
/// - adapted: [`with_lora`](Self::with_lora), [`apply_adapter`](Self::apply_adapter),
///   [`extract_adapter`](Self::extract_adapter), [`merge`](Self::merge),
/// - [counted](Self::count_parameters).
///
/// A [`PeftModel`](super::PeftModel) keeps the base model beside the adapted one: to swap adapters, to
/// switch one off, or to undo a merge.
///
/// ```
/// use burn::module::Module;
/// use burn::nn::{LinearConfig, RmsNorm, RmsNormConfig};
/// use burn::tensor::{Device, Tensor, activation::silu};
/// use burn_nf4::linear_layers;
/// use burn_nf4::model::{LinearLayers, QuantizeLayers};
/// use burn_nf4::nn::AnyLinear;
///
/// #[derive(Module, Debug)]
/// struct Mlp {
///     norm: RmsNorm,
///     up_proj: AnyLinear,
///     down_proj: AnyLinear,
/// }
///
/// #[derive(Module, Debug)]
/// struct Model {
///     layers: Vec<Mlp>,
///     head: Option<AnyLinear>,
/// }
///
/// linear_layers!(Mlp { up_proj, down_proj });
/// linear_layers!(Model { layers, head });
///
/// let device = Device::default();
/// let linear = |d_input, d_output| LinearConfig::new(d_input, d_output).init(&device).into();
/// let mlp = Mlp {
///     norm: RmsNormConfig::new(64).init(&device),
///     up_proj: linear(64, 128),
///     down_proj: linear(128, 64),
/// };
/// let model = Model { layers: vec![mlp], head: Some(linear(64, 10)) };
/// let model = model.quantize(&QuantizeLayers { skip_modules: vec!["head".into()], ..Default::default() })?;
/// let paths: Vec<_> = model.linears().into_iter().map(|(path, layer)| (path, layer.is_quantized())).collect();
/// assert_eq!(paths[0], ("layers.0.up_proj".to_string(), true));
/// assert_eq!(paths[2], ("head".to_string(), false));
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
pub trait LinearLayers: Module {
    /// Adds each linear layer with its path, which begins with `path`.
    fn collect_linears<'a>(&'a self, path: &str, found: &mut Vec<(String, &'a AnyLinear)>);

    /// Puts another layer in the place of each one: what `map` gives for its path and itself. The paths
    /// are those of [`collect_linears`](Self::collect_linears).
    ///
    /// # Errors
    /// The first of `map`.
    fn map_linears(self, path: &str, map: &mut MapLinear<'_>) -> Result<Self, Nf4Error>;

    /// The name that a checkpoint or an adapter has for a parameter, from its path in the module, with
    /// `weight` and `bias` for what Burn's norms call `gamma` and `beta`. The same unless a model says
    /// otherwise, such as `format!("model.{path}")`.
    ///
    /// A parameter's name ends with `.weight` or `.bias`, and what stands before it is that of its
    /// module. No two parameters have one name. Only that of the whole model is asked: one that a module
    /// within it overrides has no effect.
    fn checkpoint_name(path: &str) -> String {
        path.into()
    }

    /// Whether the head is the table of the embedding, as it is now. A model that never ties them need
    /// not override it.
    fn tied_head(&self) -> Option<TiedHead> {
        None
    }

    /// Gives a head that is the embedding's table a weight of its own, which begins as that table
    /// ([`AnyLinear::from_weight`]). Called only where [`tied_head`](Self::tied_head) is something; after
    /// that it must be nothing, and the head one of the layers.
    fn untie_head(self) -> Self {
        self
    }

    /// Where a checkpoint holds the parameter of this name, if it has it as a part of a larger tensor, such as
    /// those of experts. [`save_folder`](Self::save_folder) puts such parameters together where all of a stack
    /// are of floats, and of one type, or where they are in MXFP4 and nothing else of the model is packed;
    /// others are written apart. Not asked by
    /// [`load_checkpoint`](Self::load_checkpoint): its store has to take stacks
    /// [apart](CheckpointStore::unstack_columns).
    ///
    /// Only that of the whole model is asked.
    fn stacked(&self, _name: &str) -> Option<StackPlace> {
        None
    }

    /// The name of the output layer, which [`quantize`](Self::quantize) keeps in floats. Only a model that
    /// calls it otherwise than `lm_head`, `embed_out`, `score`, `classifier` or `qa_outputs` need
    /// override it.
    fn head_name(&self) -> Option<String> {
        self.tied_head().map(|tied| tied.head)
    }

    /// Every linear layer with its name: the one that a checkpoint has for the module, such as
    /// `model.layers.0.self_attn.q_proj`.
    fn linears(&self) -> Vec<(String, &AnyLinear)> {
        let mut found = Vec::new();
        self.collect_linears("", &mut found);
        for (path, _) in &mut found {
            *path = module_name::<Self>(path);
        }
        found
    }

    /// Puts another layer in the place of each one, by its [name](Self::linears).
    ///
    /// # Errors
    /// The first of `map`.
    fn try_map_linears(
        self,
        mut map: impl FnMut(&str, AnyLinear) -> Result<AnyLinear, Nf4Error>,
    ) -> Result<Self, Nf4Error> {
        self.map_linears("", &mut |path, layer| {
            map(&module_name::<Self>(path), layer)
        })
    }

    /// Brings the linear layers to 4 bit, on their device, but for those to be skipped. Those that are in
    /// 4 bit already stay as they are.
    ///
    /// # Errors
    /// [`Nf4Error::Config`] for a model that does not hand out all of its layers, for layers with a
    /// reparameterization of Burn's, and for an entry of `skip_modules` that fits no module,
    /// [`Nf4Error::Pattern`] for one that is no regular expression,
    /// [`Nf4Error::NonFinite`] with the name of a weight that holds a NaN or an infinity (on the CPU),
    /// and those of [`BlockWeight::quantize`](crate::BlockWeight::quantize).
    fn quantize(self, options: &QuantizeLayers) -> Result<Self, Nf4Error> {
        quantize::quantize(self, options)
    }

    /// Brings the layers in 4 bit back to floats, of the values that they had.
    ///
    /// # Errors
    /// [`Nf4Error::DeviceDtype`] if a device has no such type.
    fn dequantize(self, dtype: FloatType) -> Result<Self, Nf4Error> {
        check_handed_out(&self)?;
        self.try_map_linears(|name, layer| {
            let dense = layer.dequantize(dtype);
            dense.map_err(|error| named(error, name))
        })
    }

    /// Sets how products of all layers in 4 bit are computed.
    ///
    /// # Errors
    /// None but those of a hand-written [`map_linears`](Self::map_linears).
    fn with_strategy(self, strategy: MatmulStrategy) -> Result<Self, Nf4Error> {
        self.try_map_linears(|_, layer| Ok(layer.with_strategy(strategy)))
    }

    /// Counts the parameters, those in packed weights too.
    fn count_parameters(&self) -> ParameterCount {
        ParameterCount::of(self)
    }

    /// Loads a checkpoint whose layers may be in 4 bit or of floats, each as it is there: the layers of
    /// the model say of what shape they are, not in which form. So a model that was just initialised can
    /// be given, whose weights are then never made.
    ///
    /// The settings of the store count: its dtype for floats, what may be missing, its progress
    /// callback, and its key remapping before [`checkpoint_name`](Self::checkpoint_name). Where the
    /// [head is tied](Self::tied_head) the checkpoint has the last word, as in transformers: a head that
    /// is there and is not the table becomes one of its own; a table that is not there is the head.
    ///
    /// Layers that come new are trainable as Burn's are; [`with_lora`](Self::with_lora) freezes them.
    ///
    /// # Errors
    /// - [`Nf4Error::Misfit`] with everything that is missing, unexpected or of another shape
    /// - the first of [`Checkpoint::faults`](crate::checkpoint::Checkpoint::faults)
    /// - [`Nf4Error::Config`] for a model with branches, that does not hand out all of its layers, or whose
    ///   overrides contradict each other
    /// - those of [`CheckpointStore`]
    fn load_checkpoint(self, store: CheckpointStore) -> Result<Self, Nf4Error> {
        load::load(self, store)
    }

    /// Writes the model as a Hugging Face folder that transformers loads, with the library that has the type of
    /// its quantized weights: see [`SaveFolder`].
    ///
    /// A [tied head](Self::tied_head) is left out where the names are those that transformers ties
    /// (`….model.embed_tokens` and `….lm_head`). Under other names nothing in the folder would tell that
    /// there is a head: it is written as a copy of the table. What Burn's `quantize_weights` has quantized
    /// is written as floats of the same values.
    ///
    /// # Errors
    /// - [`Nf4Error::Config`] for a model with branches: merge them, or take them
    ///   [off](Self::without_branches) and save the adapter; and for one with reparameterizations of
    ///   Burn's (`apply_lora`, `apply_qlora`, `reparameterize_linears`), which `materialize` takes off
    /// - [`Nf4Error::Config`] for a model with weights of two types, but for NF4 beside FP4
    /// - [`Nf4Error::FolderNotEmpty`], [`Nf4Error::Io`], [`Nf4Error::ModelConfig`]
    /// - [`Nf4Error::NameTaken`] for two parameters of one name
    /// - [`Nf4Error::Dtype`] for a dtype that safetensors has not, or a storage of codes that is none or that the
    ///   type of the weights has not
    /// - [`Nf4Error::NonFinite`] for an NVFP4 weight whose scale of the tensor has no finite reciprocal
    fn save_folder(
        &self,
        folder: impl AsRef<Path>,
        options: &SaveFolder<'_>,
    ) -> Result<Written, Nf4Error> {
        save::save(self, folder.as_ref(), options)
    }

    /// Freezes the model and puts a fresh branch on every layer that the settings select, by their
    /// meaning in PEFT.
    ///
    /// With `bias` the biases are trained as they are, and with `modules_to_save` the modules of those
    /// names. A tied head that is adapted, or is saved with its embedding or without, gets a weight of
    /// its own. The parameters that are trained have ids that follow from their names.
    ///
    /// # Errors
    /// - [`Nf4Error::Config`] for a model that has branches already, if the settings select no layer, or
    ///   something that is not trained here: a branch on an embedding or on a matrix that is no
    ///   [`AnyLinear`], a module to save that is not there or is in 4 bit
    /// - those of [`Adapter::new`] and [`AnyLinear::with_lora`]
    fn with_lora(self, lora: &LoraConfig, device: &Device) -> Result<Self, Nf4Error> {
        fresh::fresh(self, lora, device)
    }

    /// Freezes the model and puts an adapter on it. The adapter must have all that its settings ask for,
    /// and the model all that the adapter changes.
    ///
    /// Parameters that it holds as a whole take the place of the model's, in the model's dtype; a layer
    /// whose weight they are is then of floats. A branch on an embedding is added to the table. A head
    /// that is the embedding becomes one of its own where the adapter changes one of the two. Branches,
    /// biases and modules to save can be trained on, under ids that follow from their names.
    ///
    /// The model must have no branches. Where those of another adapter were taken
    /// [off](Self::without_branches), its biases and modules to save are there still and are mixed with
    /// this one: a [`PeftModel`](super::PeftModel) swaps adapters exactly.
    ///
    /// # Errors
    /// - [`Nf4Error::Config`] for a model with branches
    /// - [`Nf4Error::AdapterLacks`], [`Nf4Error::BaseLacks`], each with all that is missing
    /// - [`Nf4Error::Shape`], [`Nf4Error::ResizedEmbeddings`] for a tensor that does not fit
    /// - [`Nf4Error::NonFinite`] for one that the model's dtype cannot hold
    /// - [`Nf4Error::Config`] for two different tensors for a table and a head that are one
    fn apply_adapter(self, adapter: &Adapter, device: &Device) -> Result<Self, Nf4Error> {
        apply::apply(self, adapter, device, false)
    }

    /// As [`apply_adapter`](Self::apply_adapter), for an adapter that may lack what its settings ask for:
    /// such a layer stays as it is.
    ///
    /// # Errors
    /// Those of [`apply_adapter`](Self::apply_adapter) but for [`Nf4Error::AdapterLacks`].
    fn apply_partial_adapter(self, adapter: &Adapter, device: &Device) -> Result<Self, Nf4Error> {
        apply::apply(self, adapter, device, true)
    }

    /// The branches, biases and modules to save of the model as an adapter of these settings.
    ///
    /// A branch on an embedding is no longer apart from it and is missed;
    /// [`extract_into`](Self::extract_into) has it from the adapter that was applied, and so has a
    /// [`PeftModel`](super::PeftModel).
    ///
    /// # Errors
    /// [`Nf4Error::AdapterLacks`] for what the settings ask for and the model has not,
    /// [`Nf4Error::NotAdapted`] for a branch that the settings do not select, and those of
    /// [`Adapter::insert_layer`].
    fn extract_adapter(&self, lora: &LoraConfig) -> Result<Adapter, Nf4Error> {
        let adapter = self.extract_into(Adapter::new(lora.clone())?)?;
        apply::check_complete(self, &adapter)?;
        Ok(adapter)
    }

    /// Takes what was trained into the adapter that was applied to the model. All else that this holds
    /// stays, bit for bit.
    ///
    /// # Errors
    /// Those of [`extract_adapter`](Self::extract_adapter) but for [`Nf4Error::AdapterLacks`].
    fn extract_into(&self, adapter: Adapter) -> Result<Adapter, Nf4Error> {
        check_handed_out(self)?;
        check_names(self)?;
        extract::extract_into(self, adapter)
    }

    /// Switches all branches on or off. What an adapter put in the place of other parameters stays, as
    /// do its biases: a [`PeftModel`](super::PeftModel) switches those too.
    ///
    /// # Errors
    /// None but those of a hand-written [`map_linears`](Self::map_linears).
    fn with_branches_enabled(self, enabled: bool) -> Result<Self, Nf4Error> {
        self.try_map_linears(|_, layer| Ok(layer.with_branch_enabled(enabled)))
    }

    /// Takes the branches off. See [`with_branches_enabled`](Self::with_branches_enabled) for what stays.
    ///
    /// # Errors
    /// None but those of a hand-written [`map_linears`](Self::map_linears).
    fn without_branches(self) -> Result<Self, Nf4Error> {
        self.try_map_linears(|_, layer| Ok(layer.into_base()))
    }

    /// Puts the branches into the weights, which are then of floats: of `dtype`; without it a weight of
    /// floats keeps its own, and one that was in 4 bit gets that of the model, which is that of its
    /// embedding or of its other parameters of floats, whatever it had before it was quantized.
    ///
    /// The sums are rounded, so that taking a branch off again would not give back the weight: a
    /// [`PeftModel`](super::PeftModel) keeps what was there.
    ///
    /// # Errors
    /// Those of [`AnyLinear::merge`], with the name of the weight.
    fn merge(self, dtype: Option<FloatType>) -> Result<Self, Nf4Error> {
        check_handed_out(&self)?;
        let of_model = float_type_of(&self);
        self.try_map_linears(|name, layer| {
            let dtype = dtype.or(of_model.filter(|_| layer.is_quantized()));
            layer.merge(dtype).map_err(|error| named(error, name))
        })
    }

    /// As [`merge`](Self::merge), but a weight that was in 4 bit is so again. That is lossy.
    ///
    /// # Errors
    /// Those of [`AnyLinear::merge_4bit`], with the name of the weight.
    fn merge_4bit(self) -> Result<Self, Nf4Error> {
        check_handed_out(&self)?;
        self.try_map_linears(|name, layer| layer.merge_4bit().map_err(|error| named(error, name)))
    }
}

/// The dtype that a model computes in, where it is one that weights can have.
fn float_type_of<M: LinearLayers>(model: &M) -> Option<FloatType> {
    let dtype = model_dtype(model, &other_floats(model))?;
    FloatType::from_dtype(dtype, "model").ok()
}

/// An error about one layer, with its name.
pub(super) fn named(error: Nf4Error, module: &str) -> Nf4Error {
    error.of_module(module)
}
