//! Where the state of an optimizer lies.

use std::sync::{Arc, Mutex};

use burn::module::{Module, Param, ParamGroup};
use burn::optim::{
    AdamW, AdamWConfig, DynOptimizer, DynState, GradientsParams, LearningRate, ModuleOptimizer,
    StateSink, StateSource,
};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{Device, Tensor};

use burn_nf4_llm::train::optimizer::{OnDevice, adamw};

/// AdamW that notes whether the device it is to load its state to has autodiff, which the default
/// one has not: the same hardware is all that these tests have.
struct Watched {
    inner: AdamW,
    autodiff: Arc<Mutex<Vec<bool>>>,
}

impl DynOptimizer for Watched {
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

    fn state_unflatten(
        &self,
        rank: usize,
        prefix: &str,
        source: &mut StateSource,
        device: &Device,
    ) -> Option<DynState> {
        self.autodiff.lock().unwrap().push(device.is_autodiff());
        self.inner.state_unflatten(rank, prefix, source, device)
    }
}

#[derive(Module, Debug)]
struct Weights {
    weights: Param<Tensor<1>>,
}

/// The record of an optimizer after a step, and the id of its only parameter.
fn stepped(mut optimizer: ModuleOptimizer) -> (burn::optim::OptimizerRecord, u64) {
    let device = Device::default().autodiff();
    let module = Weights {
        weights: Param::from_tensor(Tensor::from_data([1.0, 2.0], &device)),
    };
    let id = module.weights.id.val();
    let gradients = module.weights.val().square().sum().backward();
    let gradients = GradientsParams::from_grads(gradients, &module);
    optimizer.step(0.1, module, gradients);
    (optimizer.to_record(), id)
}

#[test]
fn loaded_state_lies_on_the_device_of_the_run() {
    let config = AdamWConfig::new();
    let (record, id) = stepped(config.init());
    let autodiff = Arc::new(Mutex::new(Vec::new()));
    let watched = Watched {
        inner: config.build(),
        autodiff: autodiff.clone(),
    };
    let (on_device, loaded) = OnDevice::new(watched, Device::default().autodiff());
    let optimizer = config.init().with_group(ParamGroup::all(), on_device, None);
    assert!(!loaded.contains(id));
    optimizer.load_record(record);
    assert_eq!(*autodiff.lock().unwrap(), [true]);
    assert!(loaded.contains(id) && !loaded.contains(id + 1));
}

/// The state itself is a tensor without autodiff, as the gradients are.
#[test]
fn the_optimizer_of_a_run_keeps_what_it_saved() {
    let device = Device::default().autodiff();
    let (record, id) = stepped(adamw(0.01, &device).0);
    let before = record.into_bytes().unwrap();
    let (optimizer, loaded) = adamw(0.01, &device);
    let optimizer = optimizer.from_bytes(before.clone()).unwrap();
    assert!(loaded.contains(id));
    assert_eq!(optimizer.into_bytes().unwrap().to_vec(), before.to_vec());
}
