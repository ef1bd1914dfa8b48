//! Burn's own `apply_lora`, `apply_qlora`, quantizers, `unfreeze`, `no_grad` and groups on modules
//! that hold packed weights: our layers, and unchanged `Linear`s with a packed weight inside.

mod tensors;

use burn::module::{
    Lora, Module, ModuleMapper, ModuleVisitor, Param, ParamGroup, QLora, Quantizer,
};
use burn::nn::transformer::{TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Linear, LinearConfig, LinearLayout};
use burn::optim::{AdamConfig, GradientsParams};
use burn::store::ModuleRecord;
use burn::tensor::quantization::{Calibration, QuantValue};
use burn::tensor::{DType, Device, Int, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::nn::{
    QLoraLinear, QLoraLinearConfig, QuantLinear, QuantReparameterization, lora_params,
    reparameterize_linears,
};
use burn_store::{BurnpackStore, ModuleSnapshot};
use rstest::rstest;
use tensors::*;

/// Few sizes, because CubeCL tunes each matrix product anew.
const D_INPUT: usize = 40;
const D_OUTPUT: usize = 24;
const RANK: usize = 4;
const ROWS: usize = 6;

/// A matrix product in TF32 (CUDA) keeps 11 bits of each factor; see `tests/modules.rs`.
const PRODUCT_TOLERANCE: f64 = 1.0 / 256.0;

/// A model of a user: a dense layer, one of ours that is trained and one that is frozen.
#[derive(Module, Debug)]
struct Model {
    dense: Linear,
    trained: QLoraLinear,
    frozen: QuantLinear,
}

impl Model {
    /// `D_INPUT -> D_OUTPUT` three times, summed.
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.dense.forward(x.clone()) + self.trained.forward(x.clone()) + self.frozen.forward(x)
    }
}

fn dense(seed: u64, device: &Device) -> Linear {
    let values = |elems, seed| weights(elems, seed);
    let (weight, bias) = (values(D_INPUT * D_OUTPUT, seed), values(D_OUTPUT, seed + 1));
    Linear {
        weight: Param::from_tensor(tensor(&weight, [D_INPUT, D_OUTPUT], FloatType::F32, device)),
        bias: Some(Param::from_tensor(tensor(
            &bias,
            [D_OUTPUT],
            FloatType::F32,
            device,
        ))),
    }
}

fn frozen(seed: u64, device: &Device) -> QuantLinear {
    QuantLinear::quantize(dense(seed, device), QuantConfig::default()).expect("finite")
}

fn qlora(seed: u64, use_dora: bool, device: &Device) -> QLoraLinear {
    let [a, b] = [[D_INPUT, RANK], [RANK, D_OUTPUT]].map(|shape| {
        let values = uniform(shape[0] * shape[1], seed + shape[0] as u64);
        tensor(&values, shape, FloatType::F32, device)
    });
    QLoraLinearConfig::new(RANK)
        .with_alpha(1.0)
        .with_use_dora(use_dora)
        .init_with(frozen(seed, device), a, b)
        .expect("it fits")
}

fn model(device: &Device) -> Model {
    Model {
        dense: dense(1, device),
        trained: qlora(10, true, device),
        frozen: frozen(20, device),
    }
}

/// An unchanged `Linear` with a packed weight, and the same as a layer of ours.
fn packed_linear(device: &Device) -> (Linear, QuantLinear) {
    let linear =
        reparameterize_linears(dense(30, device), QuantConfig::default(), ParamGroup::all());
    (linear.expect("a Linear"), frozen(30, device))
}

fn input(device: &Device) -> Tensor<2> {
    tensor(
        &uniform(ROWS * D_INPUT, 7),
        [ROWS, D_INPUT],
        FloatType::F32,
        device,
    )
}

/// What the gradient comes from, so that it is not all ones.
fn loss(y: Tensor<2>) -> Tensor<1> {
    let [rows, columns] = y.dims();
    let factors = tensor(
        &uniform(rows * columns, 8),
        [rows, columns],
        FloatType::F32,
        &y.device(),
    );
    (y * factors).sum()
}

fn quantizer(device: &Device) -> Quantizer {
    let scheme = device.settings().quantization.scheme;
    Quantizer::new(Calibration::MinMax, scheme.with_value(QuantValue::Q8S))
}

fn words(layer: &QuantLinear) -> Vec<u32> {
    layer.weight.packed().into_data().iter::<u32>().collect()
}

/// The paths of all parameters, and those among them that require a gradient.
#[derive(Default)]
struct Paths {
    path: Vec<String>,
    all: Vec<String>,
    trained: Vec<String>,
}

impl Paths {
    fn of(module: &impl Module) -> Self {
        let mut paths = Self::default();
        module.visit(&mut paths);
        paths
    }
}

impl ModuleVisitor for Paths {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.all.push(self.path.join("."));
        if param.base().is_require_grad() {
            self.trained.push(self.path.join("."));
        }
    }

    fn visit_int<const D: usize>(&mut self, _: &Param<Tensor<D, Int>>) {
        self.all.push(self.path.join("."));
    }
}

fn apply_lora_leaves_our_layers_alone(device: &Device) {
    let device = device.clone().autodiff();
    let before = model(&device);
    let x = input(&device);
    let y = values(&before.forward(x.clone()));
    let ids = [before.trained.lora_a.id, before.trained.lora_b.id];
    let ours = before.trained.clone();

    let after = before.apply_lora(Lora::new(2, 4.0));
    assert!(after.dense.weight.adapter().is_some());
    assert!(after.trained.lora_a.adapter().is_none());
    assert!(after.trained.lora_b.adapter().is_none());
    assert_eq!([after.trained.lora_a.id, after.trained.lora_b.id], ids);
    assert_eq!(
        values(&after.trained.lora_a.val()),
        values(&ours.lora_a.val())
    );
    assert_eq!(
        values(&after.trained.lora_b.val()),
        values(&ours.lora_b.val())
    );
    // A fresh adapter changes nothing.
    assert_near(&values(&after.forward(x)), &y, PRODUCT_TOLERANCE, "y");
    let paths = Paths::of(&after);
    assert_eq!(
        paths.trained,
        ["dense.weight.lora.a", "dense.weight.lora.b"]
    );
    let adapted = |path: &&String| path.contains("lora.");
    assert_eq!(paths.all.iter().filter(adapted).count(), 2);
}

/// The branch on a weight of floats is no other: its weight gets Burn's adapter, its factors get none.
fn apply_lora_leaves_the_branch_of_a_float_layer_alone(device: &Device) {
    let device = device.clone().autodiff();
    let layer = QLoraLinearConfig::new(RANK).with_use_dora(true);
    let layer = layer
        .init_dense(dense(9, &device), &device)
        .expect("it fits");
    let y = values(&layer.forward(input(&device)));
    let ids = [layer.lora_a.id, layer.lora_b.id];
    let layer = layer.apply_lora(Lora::new(2, 4.0));
    assert!(layer.base.weight.adapter().is_some());
    assert!(layer.lora_a.adapter().is_none() && layer.lora_b.adapter().is_none());
    assert_eq!([layer.lora_a.id, layer.lora_b.id], ids);
    assert!(
        layer
            .lora_magnitude
            .as_ref()
            .is_some_and(|magnitude| magnitude.adapter().is_none())
    );
    assert_near(
        &values(&layer.forward(input(&device))),
        &y,
        PRODUCT_TOLERANCE,
        "y",
    );
    let layer = layer.unfreeze_group(lora_params());
    assert!(layer.lora_a.is_require_grad() && layer.lora_b.is_require_grad());
}

fn both_branches_train_after_unfreezing_our_group(device: &Device) {
    let device = device.clone().autodiff();
    let model = model(&device)
        .apply_lora(Lora::new(2, 4.0))
        .unfreeze_group(lora_params());
    assert_eq!(
        Paths::of(&model).trained,
        [
            "dense.weight.lora.a",
            "dense.weight.lora.b",
            "trained.lora_a",
            "trained.lora_b",
            "trained.lora_magnitude",
        ]
    );
    let before = [words(&model.trained.base), words(&model.frozen)];
    let grads = loss(model.forward(input(&device))).backward();
    let grads = GradientsParams::from_grads(grads, &model);
    assert_eq!(grads.len(), 5);
    let (a, b) = (model.trained.lora_a.val(), model.trained.lora_b.val());
    let model = AdamConfig::new().init().step(0.1, model, grads);
    assert_ne!(values(&model.trained.lora_a.val()), values(&a));
    assert_ne!(values(&model.trained.lora_b.val()), values(&b));
    assert_eq!([words(&model.trained.base), words(&model.frozen)], before);
}

/// What Burn quantizes has a form of its own, which fits none of our products.
fn quantizers_leave_our_layers_alone(device: &Device) {
    let device = device.clone().autodiff();
    let before = model(&device);
    let x = input(&device);
    let ours = |model: &Model| {
        let y = model.trained.forward(x.clone()) + model.frozen.forward(x.clone());
        values(&y)
    };
    let y = ours(&before);

    let after = before.clone().quantize_weights(&mut quantizer(&device));
    assert!(matches!(
        after.dense.weight.base().dtype(),
        DType::QFloat(_)
    ));
    assert_eq!(ours(&after), y);
    assert_eq!(
        Paths::of(&after.trained).trained,
        Paths::of(&before.trained).trained
    );

    let qlora = QLora::new(Lora::new(2, 4.0), quantizer(&device));
    let after = before.apply_qlora(qlora);
    assert!(matches!(
        after.dense.weight.base().dtype(),
        DType::QFloat(_)
    ));
    assert!(after.dense.weight.adapter().is_some());
    assert!(after.trained.lora_a.adapter().is_none());
    assert_eq!(ours(&after), y);
    assert!(Paths::of(&after.trained).trained.is_empty());
}

fn unfreezing_all_trains_biases_and_never_packed_weights(device: &Device) {
    let device = device.clone().autodiff();
    let model = model(&device);
    let fresh = Paths::of(&model).trained;
    let branch = ["trained.lora_a", "trained.lora_b", "trained.lora_magnitude"];
    assert_eq!(
        fresh,
        [&["dense.weight", "dense.bias"][..], &branch].concat()
    );

    let unfrozen = model.clone().no_grad().unfreeze();
    let trained = Paths::of(&unfrozen).trained;
    for bias in ["trained.base.bias", "frozen.bias"] {
        assert!(
            trained.iter().any(|path| path == bias),
            "{bias}: {trained:?}"
        );
    }
    let before = [words(&unfrozen.trained.base), words(&unfrozen.frozen)];
    let grads = loss(unfrozen.forward(input(&device))).backward();
    let grads = GradientsParams::from_grads(grads, &unfrozen);
    assert_eq!(grads.len(), 7);
    let unfrozen = AdamConfig::new().init().step(0.1, unfrozen, grads);
    assert_eq!(
        [words(&unfrozen.trained.base), words(&unfrozen.frozen)],
        before
    );

    // What the docs say to give.
    let ours = model.no_grad().unfreeze_group(lora_params());
    assert_eq!(Paths::of(&ours).trained, branch);
}

fn no_grad_holds_through_valid_and_train(device: &Device) {
    let device = device.clone().autodiff();
    let model = model(&device).no_grad();
    assert!(Paths::of(&model).trained.is_empty());
    let y = loss(model.forward(input(&device)));
    assert!(!y.is_require_grad());
    let model = Module::train(model.valid());
    assert!(Paths::of(&model).trained.is_empty());
    let model = Module::train(model.valid().unfreeze_group(lora_params()));
    assert_eq!(Paths::of(&model).trained.len(), 3);
}

fn a_record_of_the_group_holds_the_branch_alone(device: &Device) {
    let trained = qlora(10, true, device);
    let record = trained.clone().into_record_group(lora_params());
    assert_eq!(record.len(), 3);
    let fresh = qlora(50, true, device);
    let packed = words(&fresh.base);
    let loaded = fresh
        .try_load_record(record.allow_partial(true))
        .expect("the same form");
    assert_eq!(values(&loaded.lora_a.val()), values(&trained.lora_a.val()));
    assert_eq!(values(&loaded.lora_b.val()), values(&trained.lora_b.val()));
    assert_eq!(loaded.lora_a.id, trained.lora_a.id);
    assert_eq!(words(&loaded.base), packed);
}

fn records_fit_models_that_burn_has_adapted(device: &Device) {
    let adapted = model(device).apply_lora(Lora::new(2, 4.0));
    let bytes = adapted.clone().into_record().into_bytes().expect("bytes");
    let record = ModuleRecord::from_bytes(bytes).expect("a record");
    let mut fresh = model(device);
    fresh.trained = qlora(60, true, device);
    let loaded = fresh
        .apply_lora(Lora::new(2, 4.0))
        .try_load_record(record)
        .expect("the same paths");
    let x = input(device);
    let expected = values(&adapted.forward(x.clone()));
    assert_eq!(values(&loaded.forward(x)), expected);
}

fn a_packed_linear_equals_the_layer_of_ours(device: &Device) {
    let device = device.clone().autodiff();
    let (linear, layer) = packed_linear(&device);
    let decoded: Tensor<2> = layer.weight.dequantize(FloatType::F32).expect("f32");
    assert_same_bits(
        &bits(linear.weight.val(), FloatType::F32),
        &bits(decoded.transpose(), FloatType::F32),
        "the effective weight",
    );
    assert_eq!(linear.weight.base().dims(), [D_INPUT, 1]);
    let run = |forward: &dyn Fn(Tensor<2>) -> Tensor<2>| {
        let x = input(&device).require_grad();
        let y = forward(x.clone());
        let grads = loss(y.clone()).backward();
        (values(&y), values(&x.grad(&grads).expect("a gradient")))
    };
    let (y, dx) = run(&|x| linear.forward(x));
    let (expected_y, expected_dx) = run(&|x| layer.forward(x));
    assert_near(&y, &expected_y, PRODUCT_TOLERANCE, "y");
    assert_near(&dx, &expected_dx, PRODUCT_TOLERANCE, "dx");
    // Without autodiff too.
    let y = values(&linear.valid().forward(input(&device).inner()));
    assert_near(&y, &expected_y, PRODUCT_TOLERANCE, "y without autodiff");
}

/// Batches that Burn folds into rows and batches that it does not, with and without recomputing.
fn a_packed_linear_takes_batches(device: &Device) {
    for device in [
        device.clone().autodiff(),
        device.clone().autodiff().gradient_checkpointing(),
    ] {
        let (linear, layer) = packed_linear(&device);
        for [batch, rows] in [[2, 3], [2, 32]] {
            let shape = [batch, rows, D_INPUT];
            let x = || {
                let values = uniform(batch * rows * D_INPUT, 9);
                tensor(&values, shape, FloatType::F32, &device).require_grad()
            };
            let run = |x: Tensor<3>, y: Tensor<3>| {
                let grads = (y.clone() * y.clone()).sum().backward();
                (values(&y), values(&x.grad(&grads).expect("a gradient")))
            };
            let (of_linear, of_layer) = (x(), x());
            let (y, dx) = run(of_linear.clone(), linear.forward(of_linear));
            let expected = run(of_layer.clone(), layer.forward(of_layer));
            assert_near(&y, &expected.0, PRODUCT_TOLERANCE, "y");
            assert_near(&dx, &expected.1, 2.0 * PRODUCT_TOLERANCE, "dx");
        }
    }
}

/// Sets the factors of every adapter of Burn's.
#[derive(Default)]
struct FillAdapters(Vec<String>);

impl ModuleMapper for FillAdapters {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.0.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.0.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.0.join(".");
        if !path.ends_with("lora.a") && !path.ends_with("lora.b") {
            return param;
        }
        param.map(|value| {
            let (shape, device) = (value.shape(), value.device());
            let seed = 40 + u64::from(path.ends_with('b'));
            let values = uniform(shape.num_elements(), seed);
            let is_require_grad = value.is_require_grad();
            let value = tensor(&values, [values.len()], FloatType::F32, &device).reshape(shape);
            value.detach().set_require_grad(is_require_grad)
        })
    }
}

fn apply_lora_on_a_packed_linear_equals_that_on_a_dense_one(device: &Device) {
    let device = device.clone().autodiff();
    let (packed, layer) = packed_linear(&device);
    let plain = layer.to_dense(FloatType::F32).expect("f32");
    let y = values(&packed.forward(input(&device)));
    let packed = packed.apply_lora(Lora::new(RANK, 2.0));
    // B is zero.
    let fresh = values(&packed.forward(input(&device)));
    assert_near(&fresh, &y, PRODUCT_TOLERANCE, "a fresh adapter");
    assert_eq!(
        Paths::of(&packed).trained,
        ["weight.nf4.lora.a", "weight.nf4.lora.b"]
    );
    let fill = |model: Linear| model.map(&mut FillAdapters::default());
    let packed = fill(packed);
    let plain = fill(plain.apply_lora(Lora::new(RANK, 2.0)));

    let x = || input(&device).require_grad();
    let (x_packed, x_plain) = (x(), x());
    let (y_packed, y_plain) = (
        packed.forward(x_packed.clone()),
        plain.forward(x_plain.clone()),
    );
    assert_near(
        &values(&y_packed),
        &values(&y_plain),
        PRODUCT_TOLERANCE,
        "y",
    );
    let got = loss(y_packed).backward();
    let expected = loss(y_plain).backward();
    let nf4 = packed
        .weight
        .reparameterization::<QuantReparameterization>();
    let ours = nf4.and_then(|nf4| nf4.lora()).expect("an adapter");
    let burns = plain.weight.adapter().expect("an adapter");
    assert_eq!(ours.scale, burns.scale);
    for (what, got, expected) in [
        ("dx", x_packed.grad(&got), x_plain.grad(&expected)),
        ("dA", ours.a.val().grad(&got), burns.a.val().grad(&expected)),
        ("dB", ours.b.val().grad(&got), burns.b.val().grad(&expected)),
    ] {
        let [got, expected] = [got, expected].map(|grad| values(&grad.expect("a gradient")));
        assert_near(&got, &expected, PRODUCT_TOLERANCE, what);
    }
    // Merged, on both.
    let got = values(&packed.materialize().weight.val());
    let expected = values(&plain.materialize().weight.val());
    assert_near(&got, &expected, PRODUCT_TOLERANCE, "the merged weight");
}

/// With one factor frozen the other is trained as before, and with both the gradient still passes.
fn frozen_factors_of_a_packed_linear_stay_out_of_the_graph(device: &Device) {
    let device = device.clone().autodiff();
    let (packed, _) = packed_linear(&device);
    let packed = packed.apply_lora(Lora::new(RANK, 2.0));
    let packed = packed.map(&mut FillAdapters::default());
    let run = |model: &Linear| {
        let x = input(&device).require_grad();
        let grads = loss(model.forward(x.clone())).backward();
        let dx = values(&x.grad(&grads).expect("a gradient"));
        let grads = GradientsParams::from_grads(grads, model);
        (dx, grads.len())
    };
    let (dx, trained) = run(&packed);
    assert_eq!(trained, 2);
    let of_a = ParamGroup::from_regex(r"lora\.a$").expect("a pattern");
    for (model, expected) in [
        (packed.clone().set_require_grad_group(of_a, false), 1),
        (packed.no_grad(), 0),
    ] {
        let (got, trained) = run(&model);
        assert_eq!(trained, expected);
        assert_near(&got, &dx, PRODUCT_TOLERANCE, "dx");
    }
}

fn training_a_packed_linear_changes_the_adapter_alone(device: &Device) {
    let device = device.clone().autodiff();
    let (packed, _) = packed_linear(&device);
    let mut model = packed.apply_lora(Lora::new(RANK, 2.0));
    let words = |model: &Linear| {
        let nf4 = model.weight.reparameterization::<QuantReparameterization>();
        let packed = nf4.expect("packed").weight().packed();
        packed.into_data().iter::<u32>().collect::<Vec<u32>>()
    };
    let (before, y) = (words(&model), values(&model.forward(input(&device))));
    let mut adam = AdamConfig::new().init();
    for _ in 0..2 {
        let grads = loss(model.forward(input(&device))).backward();
        let grads = GradientsParams::from_grads(grads, &model);
        assert_eq!(grads.len(), 2);
        model = adam.step(0.1, model, grads);
    }
    assert_eq!(words(&model), before);
    assert!(values(&model.weight.base()).iter().all(|&zero| zero == 0.0));
    assert!(is_far(
        &values(&model.forward(input(&device))),
        &y,
        PRODUCT_TOLERANCE
    ));
}

fn records_of_packed_linears_keep_every_bit(device: &Device) {
    let plain = device.clone();
    let device = device.clone().autodiff();
    let prepare = |seed| {
        let linear = dense(seed, &device);
        let linear = reparameterize_linears(linear, QuantConfig::default(), ParamGroup::all());
        linear.expect("a Linear").apply_lora(Lora::new(RANK, 2.0))
    };
    let saved = prepare(30).map(&mut FillAdapters::default());
    let expected = bits(saved.weight.val(), FloatType::F32);

    let bytes = saved.clone().into_record().into_bytes().expect("bytes");
    // Far below the 3,840 bytes of the dense weight alone (the pages of a file come on top).
    let entries: usize = Paths::of(&saved).all.len();
    assert_eq!(entries, 6, "weight, packed, host, A, B, bias");
    let record = ModuleRecord::from_bytes(bytes).expect("a record");
    let loaded = prepare(70)
        .try_load_record(record.clone())
        .expect("the same form");
    assert_same_bits(
        &bits(loaded.weight.val(), FloatType::F32),
        &expected,
        "by record",
    );
    assert_eq!(Paths::of(&loaded).trained, Paths::of(&saved).trained);
    assert_eq!(loaded.weight.id, saved.weight.id);

    let mut store = BurnpackStore::from_bytes(None);
    saved.save_into(&mut store).expect("saved");
    let bytes = store.get_bytes().expect("bytes");
    let mut loaded = prepare(80);
    let mut store = BurnpackStore::from_bytes(Some(bytes));
    loaded.load_from(&mut store).expect("loaded");
    assert_same_bits(
        &bits(loaded.weight.val(), FloatType::F32),
        &expected,
        "by store",
    );

    // A record of a weight of another form is refused.
    let other = reparameterize_linears(
        LinearConfig::new(D_INPUT, D_OUTPUT + 8).init(&plain),
        QuantConfig::default(),
        ParamGroup::all(),
    );
    assert!(other.expect("a Linear").try_load_record(record).is_err());
}

fn packed_linears_move_and_change_state_whole(device: &Device) {
    let (packed, layer) = packed_linear(&device.clone().autodiff());
    let decoded: Tensor<2> = layer.weight.dequantize(FloatType::F32).expect("f32");
    let expected = bits(decoded.transpose(), FloatType::F32);
    let id = packed.weight.id;
    let packed = packed
        .apply_lora(Lora::new(RANK, 2.0))
        .to_device(&device.clone().autodiff());
    let packed = Module::train(packed.valid()).fork(&device.clone().autodiff());
    assert_eq!(Paths::of(&packed).trained.len(), 2);
    assert_eq!(packed.weight.id, id);
    assert_eq!(packed.devices(), std::slice::from_ref(device));
    let dense = packed.valid().materialize();
    assert_eq!(dense.weight.base().dims(), [D_INPUT, D_OUTPUT]);
    assert!(
        dense
            .weight
            .reparameterization::<QuantReparameterization>()
            .is_none()
    );
    assert_same_bits(
        &bits(dense.weight.val(), FloatType::F32),
        &expected,
        "materialized",
    );
}

/// Casts every float parameter.
struct Cast(DType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| value.cast(self.0))
    }
}

fn a_cast_changes_what_is_decoded(device: &Device) {
    if lacks(device, DType::F16) {
        return;
    }
    let (packed, layer) = packed_linear(device);
    let packed = packed.map(&mut Cast(DType::F16));
    let expected: Tensor<2> = layer.weight.dequantize(FloatType::F16).expect("f16");
    assert_same_bits(
        &bits(packed.weight.val(), FloatType::F16),
        &bits(expected.transpose(), FloatType::F16),
        "the effective weight",
    );
    let packed = packed.apply_lora(Lora::new(RANK, 2.0));
    assert_eq!(packed.weight.val().dtype(), DType::F16);
}

fn apply_qlora_on_a_packed_linear_adds_the_branch(device: &Device) {
    let device = device.clone().autodiff();
    let (packed, _) = packed_linear(&device);
    let expected = values(&packed.weight.val());
    let qlora = QLora::new(Lora::new(RANK, 2.0), quantizer(&device));
    let packed = packed.apply_qlora(qlora);
    assert_eq!(values(&packed.weight.val()), expected);
    assert_eq!(Paths::of(&packed).trained.len(), 2);
}

fn groups_select_among_linears(device: &Device) {
    let device = device.clone().autodiff();
    let encoder = TransformerEncoderConfig::new(32, 64, 4, 2).init(&device);
    let x = tensor(&uniform(2 * 3 * 32, 5), [2, 3, 32], FloatType::F32, &device);
    let forward = |encoder: &burn::nn::transformer::TransformerEncoder| {
        encoder
            .valid()
            .forward(TransformerEncoderInput::new(x.clone().inner()))
    };
    let y = values(&forward(&encoder));
    let packed = |paths: &Paths| {
        let is_packed = |path: &&String| path.contains(".packed_nf4");
        paths.all.iter().filter(is_packed).count()
    };
    for (group, expected) in [
        (ParamGroup::all(), 12),
        (ParamGroup::from_predicate("mha.query"), 2),
    ] {
        let encoder = reparameterize_linears(encoder.clone(), QuantConfig::default(), group)
            .expect("it has linear layers");
        assert_eq!(packed(&Paths::of(&encoder)), expected);
        // 4 bits keep the output to some percent.
        assert_near(&values(&forward(&encoder)), &y, 0.25, "y");
        let group = ParamGroup::from_predicate("mha.query");
        let encoder = encoder.apply_lora(Lora::new(2, 4.0).set_param_group(group));
        assert_eq!(Paths::of(&encoder).trained.len(), 4);
    }
}

/// An adapter that Burn puts on the parameter itself is thrown away by Burn: the group has to name
/// the host, which has the parameter's id.
fn groups_reach_the_host_of_an_adapter(device: &Device) {
    let (packed, _) = packed_linear(device);
    let id = packed.weight.id;
    let adapters = |group: ParamGroup| {
        let packed = packed
            .clone()
            .apply_lora(Lora::new(RANK, 2.0).set_param_group(group));
        let nf4 = packed
            .weight
            .reparameterization::<QuantReparameterization>();
        let lora = nf4.expect("packed").lora().cloned();
        lora.map(|lora| (lora.a.val().dims(), lora.b.val().dims()))
    };
    let expected = Some(([D_INPUT, RANK], [RANK, D_OUTPUT]));
    for group in [
        ParamGroup::all(),
        ParamGroup::from_predicate("weight"),
        ParamGroup::from_ids(vec![id]),
        ParamGroup::from_path("weight.nf4.lora_host"),
    ] {
        assert_eq!(adapters(group.clone()), expected, "{group:?}");
    }
    assert_eq!(adapters(ParamGroup::from_path("weight")), None);
}

/// Burn nests no reparameterizations.
fn a_second_adapter_leaves_the_first(device: &Device) {
    let (packed, _) = packed_linear(device);
    let once = packed.apply_lora(Lora::new(RANK, 2.0));
    let paths = Paths::of(&once).all;
    let twice = once.clone().apply_lora(Lora::new(2 * RANK, 2.0));
    assert_eq!(Paths::of(&twice).all, paths);
    let expected = values(&once.weight.val());
    assert_eq!(values(&twice.weight.val()), expected);
}

#[track_caller]
fn config_error(result: Result<impl Sized, Nf4Error>) -> String {
    match result {
        Err(Nf4Error::Config { field, given, .. }) => format!("{field}: {given}"),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("accepted"),
    }
}

fn what_cannot_be_packed_is_an_error(device: &Device) {
    let pack = |linear, group| reparameterize_linears(linear, QuantConfig::default(), group);
    let nothing = ParamGroup::from_predicate("no such path");
    let error = config_error(pack(dense(1, device), nothing));
    assert!(error.contains("no such path"), "{error}");

    let (packed, _) = packed_linear(device);
    let adapted = dense(1, device).apply_lora(Lora::new(2, 4.0));
    for taken in [packed, adapted] {
        let error = config_error(pack(taken, ParamGroup::all()));
        assert_eq!(error, "group: weight");
    }

    let quantized = dense(1, device).quantize_weights(&mut quantizer(device));
    match pack(quantized, ParamGroup::all()) {
        Err(Nf4Error::Dtype { tensor, .. }) => assert_eq!(tensor, "weight"),
        other => panic!("{other:?}"),
    }
}

/// A layer whose parameters Burn stores transposed.
fn a_column_layout_is_packed_alike(device: &Device) {
    let config = LinearConfig::new(D_INPUT, D_OUTPUT).with_layout(LinearLayout::Col);
    let linear = config.init(device);
    let expected = QuantLinear::quantize(linear.clone(), QuantConfig::default()).expect("finite");
    let pack = |linear| {
        reparameterize_linears(linear, QuantConfig::default(), ParamGroup::all()).expect("a Linear")
    };
    let packed = pack(linear);
    let decoded: Tensor<2> = expected.weight.dequantize(FloatType::F32).expect("f32");
    let decoded = bits(decoded.transpose(), FloatType::F32);
    assert_same_bits(
        &bits(packed.weight.val(), FloatType::F32),
        &decoded,
        "packed",
    );
    let loaded = pack(config.init(device)).load_record(packed.into_record());
    assert_same_bits(
        &bits(loaded.weight.val(), FloatType::F32),
        &decoded,
        "loaded",
    );
}

/// The CPU checks values; a graphics card does not.
#[cfg(feature = "flex")]
#[rstest]
#[case::nan(f32::NAN)]
#[case::infinite(f32::INFINITY)]
fn a_weight_that_is_not_finite_is_named(#[case] value: f32) {
    let device = Device::flex();
    let mut encoder = TransformerEncoderConfig::new(32, 64, 4, 1).init(&device);
    let linear = &mut encoder.layers[0].pwff.linear_inner;
    linear.weight = Param::from_tensor(Tensor::full([32, 64], value, &device));
    match reparameterize_linears(encoder, QuantConfig::default(), ParamGroup::all()) {
        Err(Nf4Error::NonFinite { tensor, .. }) => {
            assert_eq!(tensor, "layers.0.pwff.linear_inner.weight");
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
}

macro_rules! device_tests {
    ($name:ident, $feature:literal, $device:expr) => {
        #[cfg(feature = $feature)]
        mod $name {
            use super::*;

            fn device() -> Device {
                $device
            }

            device_tests!(@each
                apply_lora_leaves_our_layers_alone
                apply_lora_leaves_the_branch_of_a_float_layer_alone
                both_branches_train_after_unfreezing_our_group
                quantizers_leave_our_layers_alone
                unfreezing_all_trains_biases_and_never_packed_weights
                no_grad_holds_through_valid_and_train
                a_record_of_the_group_holds_the_branch_alone
                records_fit_models_that_burn_has_adapted
                a_packed_linear_equals_the_layer_of_ours
                a_packed_linear_takes_batches
                apply_lora_on_a_packed_linear_equals_that_on_a_dense_one
                frozen_factors_of_a_packed_linear_stay_out_of_the_graph
                training_a_packed_linear_changes_the_adapter_alone
                records_of_packed_linears_keep_every_bit
                packed_linears_move_and_change_state_whole
                a_cast_changes_what_is_decoded
                apply_qlora_on_a_packed_linear_adds_the_branch
                groups_select_among_linears
                groups_reach_the_host_of_an_adapter
                a_second_adapter_leaves_the_first
                what_cannot_be_packed_is_an_error
                a_column_layout_is_packed_alike
            );
        }
    };
    (@each $($test:ident)*) => {
        $(
            #[test]
            fn $test() {
                super::$test(&device());
            }
        )*
    };
}

device_tests!(flex, "flex", Device::flex());
device_tests!(cuda, "cuda", Device::cuda(0));
device_tests!(rocm, "rocm", Device::rocm(0));
device_tests!(wgpu, "wgpu", Device::wgpu(Default::default()));
device_tests!(vulkan, "vulkan", Device::vulkan(Default::default()));
device_tests!(metal, "metal", Device::metal(Default::default()));
