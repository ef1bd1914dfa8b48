//! The optimizer of a run, whose state lies on the device of the run.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use burn::module::ParamGroup;
use burn::optim::{
    AdamWConfig, DynOptimizer, DynState, LearningRate, ModuleOptimizer, StateSink, StateSource,
};
use burn::tensor::Device;
use burn::tensor::kind::BridgeTensor;

/// An optimizer that puts the state it loads on one device.
///
/// [`ModuleOptimizer::load_record`] puts it on the default one, to be moved at the first step. In a
/// build with several backends that may be a device which is not there.
pub struct OnDevice<O> {
    inner: O,
    device: Device,
    loaded: Loaded,
}

/// The parameters whose state was loaded, by their ids.
#[derive(Debug, Clone, Default)]
pub struct Loaded(Arc<Mutex<BTreeSet<u64>>>);

impl Loaded {
    /// Whether there is a state for a parameter.
    pub fn contains(&self, id: u64) -> bool {
        self.0.lock().is_ok_and(|ids| ids.contains(&id))
    }
}

/// Burn's optimizer states have at most this rank.
const MAX_RANK: usize = 8;

impl<O> OnDevice<O> {
    /// An optimizer of parameters on a device, and the list of what is loaded.
    pub fn new(inner: O, device: Device) -> (Self, Loaded) {
        let loaded = Loaded::default();
        let optimizer = Self {
            inner,
            device,
            loaded: loaded.clone(),
        };
        (optimizer, loaded)
    }
}

impl<O: DynOptimizer> DynOptimizer for OnDevice<O> {
    fn step_dyn(
        &self,
        rank: usize,
        rate: LearningRate,
        tensor: BridgeTensor,
        gradient: BridgeTensor,
        state: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        self.inner.step_dyn(rank, rate, tensor, gradient, state)
    }

    fn to_device_dyn(&self, state: DynState, device: &Device) -> DynState {
        self.inner.to_device_dyn(state, device)
    }

    fn state_flatten(&self, prefix: &str, state: &DynState, out: &mut StateSink) {
        self.inner.state_flatten(prefix, state, out);
    }

    /// `prefix` is the id of the parameter.
    fn state_unflatten(
        &self,
        rank: usize,
        prefix: &str,
        source: &mut StateSource,
        _default: &Device,
    ) -> Option<DynState> {
        if rank > MAX_RANK {
            return None;
        }
        let state = self
            .inner
            .state_unflatten(rank, prefix, source, &self.device)?;
        if let (Ok(id), Ok(mut ids)) = (prefix.parse(), self.loaded.0.lock()) {
            ids.insert(id);
        }
        Some(state)
    }
}

/// AdamW as PyTorch has it, for parameters on a device.
pub fn adamw(weight_decay: f32, device: &Device) -> (ModuleOptimizer, Loaded) {
    let config = AdamWConfig::new()
        // PyTorch's; Burn's own default is larger.
        .with_epsilon(1e-8)
        .with_weight_decay(weight_decay);
    // Gradients, and so their averages, are tensors of the device without autodiff.
    let (on_device, loaded) = OnDevice::new(config.build(), device.clone().without_autodiff());
    let optimizer = config.init().with_group(ParamGroup::all(), on_device, None);
    (optimizer, loaded)
}
