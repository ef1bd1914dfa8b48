//! A base model and what an adapter makes of it.

use burn::tensor::Device;

use super::layers::LinearLayers;
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::peft::{Adapter, LoraConfig};

/// A model with an adapter, beside the model as it was before.
///
/// The two share every tensor that the adapter does not change: of the packed weights there is one copy.
/// So the adapter can be switched off, swapped for another, merged and unmerged, each exactly: trained
/// biases, `modules_to_save`, replaced heads and branches on embeddings included.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::optim::{GradientsParams, Optimizer, SgdConfig};
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_nf4::format::QuantConfig;
/// use burn_nf4::linear_layers;
/// use burn_nf4::model::PeftModel;
/// use burn_nf4::nn::AnyLinear;
/// use burn_nf4::peft::{LoraConfig, TargetModules};
///
/// #[derive(burn::module::Module, Debug)]
/// struct Model {
///     proj: AnyLinear,
/// }
/// linear_layers!(Model { proj });
///
/// let device = Device::default().autodiff();
/// let proj: AnyLinear = LinearConfig::new(64, 64).init(&device).into();
/// let base = Model { proj: proj.quantize(QuantConfig::default())? };
/// let lora = LoraConfig::new(TargetModules::list(["proj"]));
/// let mut model = PeftModel::new(base, lora, &device)?;
///
/// let mut optimizer = SgdConfig::new().init();
/// let x = Tensor::<2>::random([4, 64], Distribution::Default, &device);
/// let grads = model.model().proj.forward(x).mean().backward();
/// let grads = GradientsParams::from_grads(grads, model.model());
/// model.update(|model| optimizer.step(0.1, model, grads));
///
/// let adapter = model.adapter()?;
/// model.disable();
/// assert!(!model.model().proj.has_branch());
/// model.swap(adapter, &device)?;
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// Not a module itself: a record is made of [`model`](Self::model), and whether the adapter is on is not
/// a part of it.
#[derive(Debug, Clone)]
pub struct PeftModel<M> {
    base: M,
    adapted: M,
    /// What was put on, with what of it is not trained.
    adapter: Adapter,
    state: State<M>,
}

#[derive(Debug, Clone)]
enum State<M> {
    Enabled,
    Disabled,
    Merged(M),
}

impl<M: LinearLayers> PeftModel<M> {
    /// A model with a fresh adapter.
    ///
    /// # Errors
    /// Those of [`LinearLayers::with_lora`].
    pub fn new(base: M, lora: LoraConfig, device: &Device) -> Result<Self, Nf4Error> {
        Ok(Self {
            adapted: base.clone().with_lora(&lora, device)?,
            base,
            adapter: Adapter::new(lora)?,
            state: State::Enabled,
        })
    }

    /// A model with an adapter.
    ///
    /// # Errors
    /// Those of [`LinearLayers::apply_adapter`].
    pub fn with_adapter(base: M, adapter: Adapter, device: &Device) -> Result<Self, Nf4Error> {
        Ok(Self {
            adapted: base.clone().apply_adapter(&adapter, device)?,
            base,
            adapter,
            state: State::Enabled,
        })
    }

    /// The model to compute with: with the adapter, without it where that is off, or merged.
    pub fn model(&self) -> &M {
        match &self.state {
            State::Enabled => &self.adapted,
            State::Disabled => &self.base,
            State::Merged(merged) => merged,
        }
    }

    /// The model without the adapter.
    pub fn base(&self) -> &M {
        &self.base
    }

    /// The base model alone, with the adapter gone.
    pub fn into_base(self) -> M {
        self.base
    }

    /// The model to compute with alone.
    pub fn into_model(self) -> M {
        match self.state {
            State::Enabled => self.adapted,
            State::Disabled => self.base,
            State::Merged(merged) => merged,
        }
    }

    /// Changes the adapted model, as a step of an optimizer does, whether the adapter is on or off. A
    /// merged model is not changed with it: [`unmerge`](Self::unmerge) it first.
    pub fn update(&mut self, change: impl FnOnce(M) -> M) {
        // Not a clone of it: an optimizer can then work in place.
        let adapted = std::mem::replace(&mut self.adapted, self.base.clone());
        self.adapted = change(adapted);
    }

    /// The adapter as it is now, with all that was applied and is not trained.
    ///
    /// # Errors
    /// Those of [`LinearLayers::extract_into`].
    pub fn adapter(&self) -> Result<Adapter, Nf4Error> {
        self.adapted.extract_into(self.adapter.clone())
    }

    /// Puts another adapter in the place of this one, and switches it on. On an error all stays as it
    /// was.
    ///
    /// # Errors
    /// Those of [`LinearLayers::apply_adapter`].
    pub fn swap(&mut self, adapter: Adapter, device: &Device) -> Result<(), Nf4Error> {
        self.adapted = self.base.clone().apply_adapter(&adapter, device)?;
        self.adapter = adapter;
        self.state = State::Enabled;
        Ok(())
    }

    /// Switches the adapter on. A merge is undone.
    pub fn enable(&mut self) {
        self.state = State::Enabled;
    }

    /// Switches the adapter off and keeps it. A merge is undone.
    pub fn disable(&mut self) {
        self.state = State::Disabled;
    }

    /// Whether the adapter takes part, merged or not.
    pub fn is_enabled(&self) -> bool {
        !matches!(self.state, State::Disabled)
    }

    /// Whether the model is merged.
    pub fn is_merged(&self) -> bool {
        matches!(self.state, State::Merged(_))
    }

    /// Puts the adapter into the weights of the [`model`](Self::model), which are then of floats. The
    /// base model and the adapter stay beside it, for [`unmerge`](Self::unmerge): that takes the memory
    /// of the merged weights. [`into_model`](Self::into_model) lets go of them.
    ///
    /// # Errors
    /// [`Nf4Error::Config`] while the adapter is off: [`enable`](Self::enable) it first. Those of
    /// [`LinearLayers::merge`].
    pub fn merge(&mut self, dtype: Option<FloatType>) -> Result<(), Nf4Error> {
        self.check_enabled()?;
        self.state = State::Merged(self.adapted.clone().merge(dtype)?);
        Ok(())
    }

    /// As [`merge`](Self::merge), but a weight that was in 4 bit is so again. That is lossy.
    ///
    /// # Errors
    /// [`Nf4Error::Config`] while the adapter is off, those of [`LinearLayers::merge_4bit`].
    pub fn merge_4bit(&mut self) -> Result<(), Nf4Error> {
        self.check_enabled()?;
        self.state = State::Merged(self.adapted.clone().merge_4bit()?);
        Ok(())
    }

    fn check_enabled(&self) -> Result<(), Nf4Error> {
        match self.is_enabled() {
            true => Ok(()),
            false => Err(Nf4Error::Config {
                field: "enabled",
                expected: "true for an adapter that is to be merged",
                given: "false".into(),
            }),
        }
    }

    /// Undoes a merge, to the bit: nothing is subtracted.
    pub fn unmerge(&mut self) {
        if self.is_merged() {
            self.state = State::Enabled;
        }
    }
}
