//! The Burn modules on every device that is compiled in: against dense layers with the same
//! weights, finite differences, and Burn's own records, optimizers and device moves.

mod tensors;

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::config::Config;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::store::{ModuleRecord, RecordError};
use burn::tensor::{DType, Device, Int, Tensor};
use burn_nf4::format::{BlockSize, BlockTensor, FloatType, QuantConfig, QuantType};
use burn_nf4::nn::{QLoraLinear, QLoraLinearConfig, QuantLinear, QuantLinearConfig};
use burn_nf4::op::MatmulStrategy;
use burn_nf4::{BlockWeight, Nf4Error, linear};
use burn_store::{BurnpackStore, ModuleSnapshot};
use rstest::rstest;
use tensors::*;

/// The sizes of all layers in here: few, because CubeCL tunes each matrix product anew.
const D_INPUT: usize = 40;
const D_OUTPUT: usize = 24;
const RANK: usize = 4;
const BATCH: [usize; 3] = [2, 3, D_INPUT];

/// A matrix product in TF32 (CUDA) keeps 11 bits of each factor. Its error over sums of at most
/// 40 terms, a second product after it included, stays well below 2^-8 of the largest value.
const PRODUCT_TOLERANCE: f64 = 1.0 / 256.0;

/// Whether values differ by more than two ways to take the same product.
fn far(a: &[f64], b: &[f64]) -> bool {
    tensors::is_far(a, b, PRODUCT_TOLERANCE)
}

fn words(weight: &BlockWeight) -> Vec<u32> {
    weight.packed().into_data().iter::<u32>().collect()
}

fn host_weight(seed: u64, dtype: FloatType) -> BlockTensor {
    let values: Vec<f32> = uniform(D_OUTPUT * D_INPUT, seed);
    let shape = [D_OUTPUT, D_INPUT];
    let quant = QuantConfig::default();
    match dtype {
        FloatType::F16 => {
            let values: Vec<half::f16> = values
                .iter()
                .map(|&v| half::f16::from_f32(v / 2.0))
                .collect();
            BlockTensor::quantize(&values, &shape, quant)
        }
        _ => {
            let values: Vec<f32> = values.iter().map(|v| v / 2.0).collect();
            BlockTensor::quantize(&values, &shape, quant)
        }
    }
    .expect("valid")
}

fn frozen(seed: u64, device: &Device) -> QuantLinear {
    let bias = tensor(
        &uniform(D_OUTPUT, seed + 1),
        [D_OUTPUT],
        FloatType::F32,
        device,
    );
    QuantLinear::from_host(&host_weight(seed, FloatType::F32), Some(bias), device).expect("it fits")
}

fn branch(seed: u64, device: &Device) -> (Tensor<2>, Tensor<2>) {
    let [a, b] = [[D_INPUT, RANK], [RANK, D_OUTPUT]].map(|shape| {
        let values = uniform(shape[0] * shape[1], seed + shape[0] as u64);
        tensor(&values, shape, FloatType::F32, device)
    });
    (a, b)
}

/// A layer whose branch is as large as its frozen part, with `s = 3 / 4`.
fn qlora(seed: u64, device: &Device) -> QLoraLinear {
    let (a, b) = branch(seed, device);
    QLoraLinearConfig::new(RANK)
        .with_alpha(3.0)
        .init_with(frozen(seed, device), a, b)
        .expect("it fits")
}

fn input(seed: u64, device: &Device) -> Tensor<3> {
    tensor(
        &uniform(BATCH.iter().product(), seed),
        BATCH,
        FloatType::F32,
        device,
    )
}

fn target(seed: u64, device: &Device) -> Tensor<3> {
    let shape = [BATCH[0], BATCH[1], D_OUTPUT];
    tensor(
        &uniform(shape.iter().product(), seed),
        shape,
        FloatType::F32,
        device,
    )
}

/// A loss whose gradient depends on the output.
fn loss(y: Tensor<3>, target: Tensor<3>) -> Tensor<1> {
    let error = y - target;
    (error.clone() * error).sum() / 2.0
}

/// The same in f64.
fn loss_of(y: &Tensor<3>, target: &[f64]) -> f64 {
    let squares = values(y)
        .into_iter()
        .zip(target)
        .map(|(y, t)| (y - t) * (y - t));
    squares.sum::<f64>() / 2.0
}

fn autodiff_devices(device: &Device) -> [Device; 2] {
    let device = device.clone().autodiff();
    [device.clone(), device.gradient_checkpointing()]
}

/// The message of a panic.
#[track_caller]
fn panic_message<T>(f: impl FnOnce() -> T) -> String {
    let Err(panic) = catch_unwind(AssertUnwindSafe(f)) else {
        panic!("expected a panic");
    };
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()))
        .expect("a text")
}

/// The paths of the float parameters, and of those that are trained.
#[derive(Default)]
struct FloatParams {
    path: Vec<String>,
    all: Vec<String>,
    trained: Vec<String>,
}

impl FloatParams {
    fn of<M: Module>(module: &M) -> Self {
        let mut params = Self::default();
        module.visit(&mut params);
        params
    }
}

impl ModuleVisitor for FloatParams {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.all.push(self.path.join("."));
        if param.val().is_require_grad() {
            self.trained.push(self.path.join("."));
        }
    }
}

fn frozen_forward_equals_the_dense_layer(device: &Device) {
    let layer = frozen(1, device);
    let dense = layer.to_dense(FloatType::F32).expect("f32");
    let decoded = layer.weight.dequantize::<2>(FloatType::F32).expect("f32");
    assert_eq!(values(&dense.weight.val().transpose()), values(&decoded));
    let (bias, dense_bias) = (layer.bias.clone().unwrap(), dense.bias.clone().unwrap());
    assert_eq!(values(&bias.val()), values(&dense_bias.val()));

    let x = input(2, device);
    let y = layer.forward(x.clone());
    assert_eq!(y.dims(), [BATCH[0], BATCH[1], D_OUTPUT]);
    assert_near(
        &values(&y),
        &values(&dense.forward(x)),
        PRODUCT_TOLERANCE,
        "y",
    );
}

fn quantizing_a_dense_layer_keeps_it_nearly(device: &Device) {
    for device in [device.clone(), device.clone().autodiff()] {
        let dense: Linear = LinearConfig::new(D_INPUT, D_OUTPUT).init(&device);
        let layer = QuantLinear::quantize(dense.clone(), QuantConfig::default()).expect("valid");
        assert_eq!(layer.dims(), [D_OUTPUT, D_INPUT]);
        // The words of the reference, from the transposed weight.
        let weight: Vec<f32> = dense.weight.val().transpose().into_data().iter().collect();
        let shape = [D_OUTPUT, D_INPUT];
        let expected = BlockTensor::quantize(&weight, &shape, QuantConfig::default());
        assert_eq!(words(&layer.weight), expected.expect("valid").to_packed());
        let (bias, dense_bias) = (layer.bias.unwrap(), dense.bias.unwrap());
        assert_eq!(values(&bias.val()), values(&dense_bias.val()));
        assert!(!bias.val().is_require_grad());
    }
}

fn frozen_passes_the_gradient_to_the_input_alone(device: &Device) {
    for device in autodiff_devices(device) {
        let layer = frozen(1, &device);
        let dense = layer.to_dense(FloatType::F32).expect("f32");
        let [x, x_dense] = [(); 2].map(|()| input(2, &device).require_grad());

        let grads = loss(layer.forward(x.clone()), target(3, &device)).backward();
        let dense_y = dense.forward(x_dense.clone());
        let dense_grads = loss(dense_y, target(3, &device)).backward();

        let expected = x_dense.grad(&dense_grads).expect("a gradient");
        let got = x.grad(&grads).expect("a gradient");
        assert_eq!(got.dims(), BATCH);
        assert_near(&values(&got), &values(&expected), PRODUCT_TOLERANCE, "dx");

        assert!(dense.bias.unwrap().val().grad(&dense_grads).is_some());
        assert!(layer.bias.as_ref().unwrap().val().grad(&grads).is_none());
        let params = FloatParams::of(&layer);
        assert_eq!(params.all, ["bias"]); // the weight is no float parameter
        assert!(params.trained.is_empty(), "{:?}", params.trained);
    }
}

fn branch_gradients_equal_those_of_dense_products(device: &Device) {
    for device in autodiff_devices(device) {
        let layer = qlora(1, &device);
        let x = input(2, &device).require_grad();
        let y = layer.forward(x.clone());
        let grads = loss(y.clone(), target(3, &device)).backward();

        let dense = layer.base.to_dense(FloatType::F32).expect("f32").no_grad();
        let x_dense = input(2, &device).require_grad();
        let (a, b) = branch(1, &device);
        let (a, b) = (a.require_grad(), b.require_grad());
        let branch_y = x_dense
            .clone()
            .matmul(a.clone().unsqueeze())
            .matmul(b.clone().unsqueeze());
        let dense_y = dense.forward(x_dense.clone()) + branch_y * 0.75;
        let dense_grads = loss(dense_y.clone(), target(3, &device)).backward();

        assert_near(&values(&y), &values(&dense_y), PRODUCT_TOLERANCE, "y");
        for (what, got, expected) in [
            (
                "dx",
                values(&x.grad(&grads).expect("a gradient")),
                values(&x_dense.grad(&dense_grads).expect("a gradient")),
            ),
            (
                "da",
                values(&layer.lora_a.grad(&grads).expect("a gradient")),
                values(&a.grad(&dense_grads).expect("a gradient")),
            ),
            (
                "db",
                values(&layer.lora_b.grad(&grads).expect("a gradient")),
                values(&b.grad(&dense_grads).expect("a gradient")),
            ),
        ] {
            assert_near(&got, &expected, PRODUCT_TOLERANCE, what);
        }
        assert!(layer.base.bias.unwrap().val().grad(&grads).is_none());
    }
}

/// Central differences of the loss, which is quadratic in each single value: they have no
/// truncation error whatever the step, so the step is large and only rounding remains.
fn gradients_equal_finite_differences(device: &Device) {
    const STEP: f32 = 0.5;
    let tracked = &device.clone().autodiff();
    let layer = qlora(1, tracked);
    let x = input(2, tracked).require_grad();
    let grads = loss(layer.forward(x.clone()), target(3, tracked)).backward();
    let gradients = [
        values(&x.grad(&grads).expect("a gradient")),
        values(&layer.lora_a.grad(&grads).expect("a gradient")),
        values(&layer.lora_b.grad(&grads).expect("a gradient")),
    ];

    let (a, b) = branch(1, device);
    let start: [Vec<f32>; 3] = [
        input(2, device).into_data().iter().collect(),
        a.into_data().iter().collect(),
        b.into_data().iter().collect(),
    ];
    let target = values(&target(3, device));
    let config = QLoraLinearConfig::new(RANK).with_alpha(3.0);
    let base = frozen(1, device);
    let loss_at = |[x, a, b]: &[Vec<f32>; 3]| {
        let a = tensor(a, [D_INPUT, RANK], FloatType::F32, device);
        let b = tensor(b, [RANK, D_OUTPUT], FloatType::F32, device);
        let layer = config.init_with(base.clone(), a, b).expect("it fits");
        let y = layer.forward(tensor(x, BATCH, FloatType::F32, device));
        loss_of(&y, &target)
    };
    for (which, what) in ["dx", "da", "db"].into_iter().enumerate() {
        let gradient = &gradients[which];
        let largest = gradient.iter().fold(0f64, |max, v| max.max(v.abs()));
        // A prime stride meets every row and column of the small matrices.
        for index in (0..gradient.len()).step_by(7) {
            let mut moved = start.clone();
            moved[which][index] += STEP;
            let above = loss_at(&moved);
            moved[which][index] -= 2.0 * STEP;
            let below = loss_at(&moved);
            let difference = (above - below) / (2.0 * f64::from(STEP));
            // Each loss is off by at most some 2^-11 of itself (TF32), and it is of the size of
            // the largest gradients; in f32 the difference is a thousand times smaller.
            assert!(
                (difference - gradient[index]).abs() <= 0.02 * largest,
                "{what}[{index}] is {}, the difference {difference}",
                gradient[index]
            );
        }
    }
}

fn only_the_branch_is_trained(device: &Device) {
    let device = &device.clone().autodiff();
    let layer = qlora(1, device);
    let params = FloatParams::of(&layer);
    assert_eq!(params.all, ["base.bias", "lora_a", "lora_b"]);
    assert_eq!(params.trained, ["lora_a", "lora_b"]);

    let valid = layer.valid();
    assert!(FloatParams::of(&valid).trained.is_empty());
    let params = FloatParams::of(&valid.train());
    assert_eq!(params.trained, ["lora_a", "lora_b"]);

    let fresh = QLoraLinearConfig::new(RANK)
        .init(frozen(1, device), device)
        .expect("valid");
    assert_eq!(FloatParams::of(&fresh).trained, ["lora_a", "lora_b"]);
}

fn adam_changes_the_branch_alone(device: &Device) {
    let device = &device.clone().autodiff();
    let start = qlora(1, device);
    let mut layer = start.clone();
    let mut optimizer = AdamConfig::new().init();
    let mut losses = Vec::new();
    for _ in 0..10 {
        let loss = loss(layer.forward(input(2, device)), target(3, device));
        losses.push(values(&loss)[0]);
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        assert_eq!(grads.len(), 2);
        layer = optimizer.step(0.05, layer, grads);
    }
    assert!(losses[9] < losses[0] / 2.0, "{losses:?}");
    assert_eq!(words(&layer.base.weight), words(&start.base.weight));
    let bias = |layer: &QLoraLinear| values(&layer.base.bias.as_ref().unwrap().val());
    assert_eq!(bias(&layer), bias(&start));
    for (after, before) in [
        (&layer.lora_a, &start.lora_a),
        (&layer.lora_b, &start.lora_b),
    ] {
        let (after, before) = (values(&after.val()), values(&before.val()));
        assert!(
            after
                .iter()
                .zip(&before)
                .all(|(after, before)| after != before)
        );
    }
}

fn a_fresh_branch_changes_nothing(device: &Device) {
    let base = frozen(1, device);
    let layer = QLoraLinearConfig::new(RANK)
        .init(base.clone(), device)
        .expect("valid");
    assert_eq!(layer.rank(), RANK);
    let bound = 1.0 / (D_INPUT as f64).sqrt();
    let a = values(&layer.lora_a.val());
    assert!(a.iter().all(|a| a.abs() <= bound), "{a:?}");
    // Uniform in ±bound: 160 values reach beyond half of it, on both sides.
    assert!(a.iter().any(|&a| a > bound / 2.0) && a.iter().any(|&a| a < -bound / 2.0));
    assert!(values(&layer.lora_b.val()).iter().all(|&b| b == 0.0));
    let x = input(2, device);
    let expected = values(&base.forward(x.clone()));
    assert_near(
        &values(&layer.forward(x)),
        &expected,
        PRODUCT_TOLERANCE,
        "y",
    );
}

fn dropout_acts_on_the_branch_while_training_alone(device: &Device) {
    let tracked = &device.clone().autodiff();
    let with_dropout = |device: &Device, b: Option<Tensor<2>>| {
        let (a, given) = branch(1, device);
        QLoraLinearConfig::new(RANK)
            .with_alpha(3.0)
            .with_dropout(0.5)
            .init_with(frozen(1, device), a, b.unwrap_or(given))
            .expect("it fits")
    };
    let layer = with_dropout(tracked, None);
    let without = values(&qlora(1, device).forward(input(2, device)));

    let [first, second] = [(); 2].map(|()| values(&layer.forward(input(2, tracked))));
    assert!(far(&first, &without), "dropout changes the output");
    assert!(far(&first, &second), "and differs from call to call");

    let valid = values(&layer.valid().forward(input(2, device)));
    assert_near(&valid, &without, PRODUCT_TOLERANCE, "after valid()");
    let plain = values(&with_dropout(device, None).forward(input(2, device)));
    assert_near(&plain, &without, PRODUCT_TOLERANCE, "without autodiff");

    // With B = 0 the branch is silent: what is left has seen the whole input.
    let zero = Tensor::zeros([RANK, D_OUTPUT], (tracked, DType::F32));
    let silent = values(&with_dropout(tracked, Some(zero)).forward(input(2, tracked)));
    let expected = values(&frozen(1, device).forward(input(2, device)));
    assert_near(&silent, &expected, PRODUCT_TOLERANCE, "a silent branch");
}

fn records_keep_every_bit(device: &Device) {
    let blank = || {
        let base = QuantLinearConfig::new(D_INPUT, D_OUTPUT)
            .init(device)
            .expect("valid");
        QLoraLinearConfig::new(RANK)
            .with_alpha(3.0)
            .init(base, device)
            .expect("valid")
    };
    #[track_caller]
    fn assert_same(got: &QLoraLinear, expected: &QLoraLinear, what: &str) {
        assert_eq!(
            words(&got.base.weight),
            words(&expected.base.weight),
            "{what}"
        );
        let bias = |layer: &QLoraLinear| values(&layer.base.bias.as_ref().unwrap().val());
        assert_eq!(bias(got), bias(expected), "{what}");
        let a = |layer: &QLoraLinear| values(&layer.lora_a.val());
        assert_eq!(a(got), a(expected), "{what}");
        let b = |layer: &QLoraLinear| values(&layer.lora_b.val());
        assert_eq!(b(got), b(expected), "{what}");
        got.base.weight.to_host().expect("its own header");
    }
    let layer = qlora(1, device);
    assert_ne!(words(&blank().base.weight), words(&layer.base.weight));

    let loaded = blank().load_record(layer.clone().into_record());
    assert_same(&loaded, &layer, "record");

    let bytes = layer.clone().into_record().into_bytes().expect("bytes");
    let loaded = blank().load_record(ModuleRecord::from_bytes(bytes).expect("a record"));
    assert_same(&loaded, &layer, "bytes");

    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("layer.bpk");
    layer.clone().save_file(&path).expect("saved");
    assert_same(&blank().load_file(&path), &layer, "file");

    // A loaded layer works as the original does, and can be trained.
    let loaded = blank().load_file(&path);
    let x = input(2, device);
    assert_eq!(
        values(&loaded.forward(x.clone())),
        values(&layer.forward(x))
    );
    let tracked = &device.clone().autodiff();
    let record = layer.into_record();
    let trained = qlora(7, tracked).load_record(record);
    assert_eq!(FloatParams::of(&trained).trained, ["lora_a", "lora_b"]);
}

fn records_of_other_weights_are_refused(device: &Device) {
    let layer = |d_input, d_output| {
        QuantLinearConfig::new(d_input, d_output)
            .with_bias(false)
            .init(device)
            .expect("valid")
    };
    let record = || layer(64, 128).into_record();
    assert!(layer(64, 128).try_load_record(record()).is_ok());

    let other_dtype = QuantLinearConfig::new(64, 128)
        .with_bias(false)
        .with_dtype(FloatType::F16)
        .init(device)
        .expect("valid");
    // Another number of words, the same number in another shape, another dtype. The error says what
    // was looked for and what there is.
    let wanted = "weight.packed_nf4_64_256_float32_128x64";
    for (other, its_own) in [
        (layer(64, 64), "weight.packed_nf4_64_256_float32_64x64"),
        (layer(128, 64), "weight.packed_nf4_64_256_float32_64x128"),
        (other_dtype, "weight.packed_nf4_64_256_float16_128x64"),
    ] {
        let partial = record().allow_partial(true);
        let error = other.clone().try_load_record(partial).unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}");
        let error = other.try_load_record(record()).unwrap_err();
        assert!(error.to_string().contains(its_own), "{error}");
    }
    // As a file of burn-store.
    let mut store = BurnpackStore::from_bytes(None);
    layer(64, 128).save_into(&mut store).expect("in memory");
    let bytes = store.get_bytes().expect("saved");
    let mut store = BurnpackStore::from_bytes(Some(bytes));
    let error = layer(128, 64).load_from(&mut store).unwrap_err();
    assert!(error.to_string().contains("64x128"), "{error}");
    assert!(layer(64, 128).load_from(&mut store).is_ok());

    // The form stays with the weight through what modules go through.
    let tracked = device.clone().autodiff();
    for moved in [
        layer(128, 64).valid(),
        layer(128, 64).to_device(device),
        layer(128, 64).fork(&tracked),
        layer(128, 64).train().valid(),
        layer(128, 64).load_record(layer(128, 64).into_record()),
        layer(128, 64).no_grad(),
    ] {
        let error = moved.try_load_record(record()).unwrap_err();
        assert!(matches!(error, RecordError::Validation(_)), "{error}");
    }

    // A dense layer's record and one without a bias.
    let dense: Linear = LinearConfig::new(64, 128).with_bias(false).init(device);
    assert!(layer(64, 128).try_load_record(dense.into_record()).is_err());
    let with_bias = QuantLinearConfig::new(64, 128).init(device).expect("valid");
    let error = with_bias.try_load_record(record()).unwrap_err();
    assert!(error.to_string().contains("bias"), "{error}");
}

/// A mapper can put any tensor in the place of a packed one; it is told when it is used.
fn a_packed_tensor_of_another_kind_is_an_error(device: &Device) {
    struct Replace(Tensor<1, Int>);
    impl ModuleMapper for Replace {
        fn map_int<const D: usize>(
            &mut self,
            param: Param<Tensor<D, Int>>,
        ) -> Param<Tensor<D, Int>> {
            let words = self.0.clone();
            param.map(|_| words.reshape([-1; D]))
        }
    }
    let weight = BlockWeight::zeros(&[8, 64], QuantConfig::default(), FloatType::F32, device);
    let weight = weight.expect("valid");
    let words = weight.layout().words();
    let x = Tensor::<2>::ones([2, 64], (device, DType::F32));
    for (packed, expected) in [
        (
            Tensor::zeros([words - 4], (device, DType::U32)),
            Nf4Error::Length {
                tensor: "packed weight".into(),
                expected: words,
                given: words - 4,
            },
        ),
        (
            Tensor::zeros([words], (device, DType::I32)),
            Nf4Error::Dtype {
                tensor: "packed weight".into(),
                expected: "U32".into(),
                given: "I32".into(),
            },
        ),
    ] {
        let other = weight.clone().map(&mut Replace(packed));
        assert_eq!(linear(x.clone(), &other, None).unwrap_err(), expected);
        assert_eq!(other.dequantize::<2>(FloatType::F32).unwrap_err(), expected);
        assert_eq!(other.to_host().unwrap_err(), expected);
    }
}

fn modules_move_between_devices(device: &Device) {
    let tracked = device.clone().autodiff();
    let layer = qlora(1, &tracked);
    let expected = values(&layer.forward(input(2, &tracked)));

    let valid = layer.valid();
    assert!(!valid.base.weight.device().is_autodiff());
    assert!(!valid.lora_a.device().is_autodiff());
    let y = valid.forward(input(2, device));
    assert!(!y.device().is_autodiff());
    assert_near(&values(&y), &expected, PRODUCT_TOLERANCE, "y");

    let moved = layer.clone().to_device(&tracked);
    let got = values(&moved.forward(input(2, &tracked)));
    assert_near(&got, &expected, PRODUCT_TOLERANCE, "moved");

    // Without the graph, still trained.
    let fork = layer.clone().fork(&tracked);
    let got = values(&fork.forward(input(2, &tracked)));
    assert_near(&got, &expected, PRODUCT_TOLERANCE, "fork");
    let grads = loss(fork.forward(input(2, &tracked)), target(3, &tracked)).backward();
    assert!(fork.lora_a.grad(&grads).is_some());
    assert!(layer.lora_a.grad(&grads).is_none());

    assert_eq!(layer.devices().len(), 1);
}

/// From the CPU to the device and back, as a record loaded on the host would go.
#[cfg(feature = "flex")]
fn modules_move_from_the_host_and_back(device: &Device) {
    let host = Device::flex();
    let layer = qlora(1, &host);
    let moved = layer.clone().to_device(device);
    assert_eq!(moved.base.weight.device(), *device);
    assert_eq!(words(&moved.base.weight), words(&layer.base.weight));
    let expected = values(&layer.forward(input(2, &host)));
    let got = values(&moved.forward(input(2, device)));
    assert_near(&got, &expected, PRODUCT_TOLERANCE, "y");
    let back = moved.to_device(&host);
    assert_eq!(back.base.weight.device(), host);
    assert_eq!(values(&back.forward(input(2, &host))), expected);
}

fn a_plain_layer_takes_a_tracked_input(device: &Device) {
    let tracked = &device.clone().autodiff();
    let layer = qlora(1, device);
    let expected = values(&layer.forward(input(2, device)));
    let x = input(2, tracked).require_grad();
    let y = layer.forward(x.clone());
    assert_near(&values(&y), &expected, PRODUCT_TOLERANCE, "y");
    assert!(x.grad(&y.sum().backward()).is_some());
}

/// Tensors that come out of a computation are taken as values, without their graph.
fn layers_take_tensors_that_are_not_leaves(device: &Device) {
    let tracked = &device.clone().autodiff();
    let bias = Tensor::<1>::ones([D_OUTPUT], (tracked, DType::F32)).require_grad();
    let weight = BlockWeight::from_host(&host_weight(1, FloatType::F32), tracked);
    let base = QuantLinear::new(weight, Some(bias.clone() * 2.0)).expect("it fits");
    let (a, b) = branch(1, tracked);
    let (a, b) = (a.require_grad(), b.require_grad());
    let layer = QLoraLinearConfig::new(RANK)
        .init_with(base, a.clone() * 2.0, b.clone() * 2.0)
        .expect("it fits");
    let grads = layer.forward(input(2, tracked)).sum().backward();
    assert!(layer.lora_a.grad(&grads).is_some());
    assert!(layer.lora_b.grad(&grads).is_some());
    assert!(a.grad(&grads).is_none() && b.grad(&grads).is_none());
    assert!(bias.grad(&grads).is_none());
}

fn merging_adds_the_branch_to_the_weight(device: &Device) {
    for device in [device.clone(), device.clone().autodiff()] {
        let layer = qlora(1, &device);
        let merged = layer.merge(FloatType::F32).expect("finite");
        let x = input(2, &device);
        let expected = values(&layer.forward(x.clone()));
        let got = values(&merged.forward(x));
        assert_near(&got, &expected, PRODUCT_TOLERANCE, "y");

        // The weight itself, in f64: W + s (A B)ᵀ.
        let w = values(
            &layer
                .base
                .weight
                .dequantize::<2>(FloatType::F32)
                .expect("f32"),
        );
        let (a, b) = (values(&layer.lora_a.val()), values(&layer.lora_b.val()));
        let expected: Vec<f64> = (0..D_INPUT * D_OUTPUT)
            .map(|i| {
                let (row, column) = (i / D_OUTPUT, i % D_OUTPUT);
                let terms = (0..RANK).map(|r| a[row * RANK + r] * b[r * D_OUTPUT + column]);
                w[column * D_INPUT + row] + 0.75 * terms.sum::<f64>()
            })
            .collect();
        let weight = merged.weight.val();
        assert_eq!(weight.dims(), [D_INPUT, D_OUTPUT]);
        assert_near(&values(&weight), &expected, PRODUCT_TOLERANCE, "weight");
        // The merged layer is an ordinary one: it can be trained.
        assert_eq!(weight.is_require_grad(), device.is_autodiff());
    }
}

fn merging_reports_what_does_not_fit(device: &Device) {
    let (a, b) = branch(1, device);
    let huge = QLoraLinearConfig::new(RANK)
        .init_with(frozen(1, device), a * 1e4, b * 1e4)
        .expect("it fits");
    huge.merge(FloatType::F32).expect("1e8 is an f32");
    for dtype in [FloatType::F16, FloatType::BF16] {
        let merged = huge.merge(dtype);
        match (
            burn_nf4::op::supports_dtype(device, DType::from(dtype)),
            dtype,
        ) {
            (false, _) => assert!(matches!(merged, Err(Nf4Error::DeviceDtype { .. }))),
            (true, FloatType::F16) => match merged {
                Err(Nf4Error::NonFinite { tensor, given, .. }) => {
                    assert_eq!(tensor, "merged weight");
                    assert!(given.is_infinite());
                }
                other => panic!("{other:?}"),
            },
            (true, _) => {
                let merged = merged.expect("1e8 is a bf16");
                assert_eq!(merged.weight.val().dtype(), DType::BF16);
                assert_eq!(merged.bias.unwrap().val().dtype(), DType::BF16);
            }
        }
    }
    let (a, b) = branch(1, device);
    let nan = QLoraLinearConfig::new(RANK)
        .init_with(frozen(1, device), a * f32::NAN, b)
        .expect("it fits");
    let merged = nan.merge(FloatType::F32);
    assert!(
        matches!(merged, Err(Nf4Error::NonFinite { .. })),
        "{merged:?}"
    );
}

/// Half-precision activations with an f32 branch, as mixed-precision training has it.
fn half_precision_input_meets_an_f32_branch(device: &Device) {
    let tracked = &device.clone().autodiff();
    let expected = values(&qlora(1, device).forward(input(2, device)));
    for (dtype, tolerance) in [(FloatType::F16, 1.0 / 128.0), (FloatType::BF16, 1.0 / 32.0)] {
        if lacks(device, dtype.into()) {
            continue;
        }
        let layer = qlora(1, tracked);
        let x = input(2, tracked).cast(DType::from(dtype)).require_grad();
        let y = layer.forward(x.clone());
        assert_eq!(y.dtype(), DType::from(dtype));
        // Some roundings of x, W and each part of y to the dtype's 11 or 8 bits.
        assert_near(&values(&y), &expected, tolerance, &format!("{dtype:?}"));
        let grads = y.cast(DType::F32).sum().backward();
        let da = layer.lora_a.grad(&grads).expect("a gradient");
        assert_eq!(da.dtype(), DType::F32);
        let dx = x.grad(&grads).expect("a gradient");
        assert_eq!(dx.dtype(), DType::from(dtype));
    }
}

fn an_empty_batch_gives_an_empty_result(device: &Device) {
    let layer = qlora(1, device);
    let x = Tensor::<3>::zeros([2, 0, D_INPUT], (device, DType::F32));
    assert_eq!(layer.forward(x.clone()).dims(), [2, 0, D_OUTPUT]);
    assert_eq!(layer.base.forward(x).dims(), [2, 0, D_OUTPUT]);
}

fn wrong_inputs_panic_with_the_shapes(device: &Device) {
    let layer = qlora(1, device);
    let x = || Tensor::<2>::zeros([3, D_INPUT + 1], (device, DType::F32));
    for message in [
        panic_message(|| layer.forward(x())),
        panic_message(|| layer.base.forward(x())),
    ] {
        let expected = "QuantLinear::forward: `x` has shape [3, 41], expected [3, 40]";
        assert_eq!(message, expected);
    }
}

fn a_strategy_goes_with_the_layer(device: &Device) {
    let tracked = device.clone().autodiff();
    let gradient = |layer: &QuantLinear| {
        let x = input(2, &tracked).require_grad();
        let grads = layer.forward(x.clone()).sum().backward();
        values(&x.grad(&grads).expect("x is tracked"))
    };
    let auto = frozen(1, &tracked);
    assert_eq!(auto.strategy, MatmulStrategy::Auto);
    let expected = values(&auto.forward(input(2, &tracked)));
    for strategy in [
        MatmulStrategy::Rule,
        MatmulStrategy::Decode,
        MatmulStrategy::Gemv,
    ] {
        let layer = frozen(1, &tracked).with_strategy(strategy);
        let what = format!("{strategy:?}");
        let got = values(&layer.forward(input(2, &tracked)));
        assert_near(&got, &expected, PRODUCT_TOLERANCE, &what);
        assert_near(
            &gradient(&layer),
            &gradient(&auto),
            PRODUCT_TOLERANCE,
            &what,
        );
        for other in [
            layer.valid(),
            layer.clone().to_device(device),
            layer.clone().fork(&tracked),
        ] {
            assert_eq!(other.strategy, strategy);
        }
    }
    // Rows of 40 elements do not come in runs that tensor cores take, on any device.
    let layer = frozen(1, device).with_strategy(MatmulStrategy::TensorCore);
    let message = panic_message(|| layer.forward(input(2, device)));
    let expected = "QuantLinear::forward: kernel variant `tensor_core` cannot run here: ";
    assert!(message.starts_with(expected), "{message}");
}

fn parts_that_do_not_fit_are_refused(device: &Device) {
    let weight = || BlockWeight::from_host(&host_weight(1, FloatType::F32), device);
    let bias = Tensor::zeros([D_INPUT], (device, DType::F32));
    assert_eq!(
        QuantLinear::new(weight(), Some(bias)).unwrap_err(),
        Nf4Error::Shape {
            tensor: "bias".into(),
            expected: vec![D_OUTPUT],
            given: vec![D_INPUT],
        }
    );
    let cube = BlockWeight::zeros(&[2, 3, 4], QuantConfig::default(), FloatType::F32, device);
    assert_eq!(
        QuantLinear::new(cube.expect("valid"), None).unwrap_err(),
        Nf4Error::NotAMatrix {
            tensor: "weight".into(),
            shape: vec![2, 3, 4],
        }
    );
    // PEFT's matrices, not transposed.
    let config = QLoraLinearConfig::new(RANK);
    let (a, b) = branch(1, device);
    let error = config.init_with(frozen(1, device), a.clone().transpose(), b.clone());
    assert_eq!(
        error.unwrap_err(),
        Nf4Error::Shape {
            tensor: "lora_a".into(),
            expected: vec![D_INPUT, RANK],
            given: vec![RANK, D_INPUT],
        }
    );
    let error = config.init_with(frozen(1, device), a, b.transpose());
    assert_eq!(
        error.unwrap_err(),
        Nf4Error::Shape {
            tensor: "lora_b".into(),
            expected: vec![RANK, D_OUTPUT],
            given: vec![D_OUTPUT, RANK],
        }
    );

    for (config, field) in [
        (QLoraLinearConfig::new(0), "rank"),
        (QLoraLinearConfig::new(4).with_alpha(f64::NAN), "alpha"),
        (QLoraLinearConfig::new(4).with_alpha(f64::INFINITY), "alpha"),
        (QLoraLinearConfig::new(4).with_dropout(1.0), "dropout"),
        (QLoraLinearConfig::new(4).with_dropout(-0.1), "dropout"),
        (QLoraLinearConfig::new(4).with_dropout(f64::NAN), "dropout"),
    ] {
        match config.init(frozen(1, device), device) {
            Err(Nf4Error::Config { field: given, .. }) => assert_eq!(given, field),
            other => panic!("{field}: {other:?}"),
        }
    }

    let sizes = |d_input, d_output| QuantLinearConfig::new(d_input, d_output).init(device);
    assert!(matches!(sizes(0, 8), Err(Nf4Error::ElementCount { .. })));
    assert!(matches!(sizes(8, 0), Err(Nf4Error::ElementCount { .. })));
    for given in [0, 16, 48, 63, 8192] {
        let error = QuantLinearConfig::new(8, 8)
            .with_block_size(given)
            .init(device)
            .unwrap_err();
        let expected = Nf4Error::BlockSize {
            tensor: "weight".into(),
            given: given as u64,
        };
        assert_eq!(error, expected);
    }
}

fn a_blank_layer_is_zero(device: &Device) {
    let layer = QuantLinearConfig::new(D_INPUT, D_OUTPUT)
        .with_quant_type(QuantType::Fp4)
        .with_block_size(128)
        .with_double_quant(false)
        .init(device)
        .expect("valid");
    let config = layer.weight.config();
    assert_eq!(config.quant_type, QuantType::Fp4);
    assert_eq!(config.block_size.elems(), 128);
    assert_eq!(config.nested_block_size, None);
    assert!(
        values(&layer.forward(input(2, device)))
            .iter()
            .all(|&y| y == 0.0)
    );
}

#[test]
fn linear_config_survives_json() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.json");
    let config = QuantLinearConfig::new(3, 5)
        .with_bias(false)
        .with_quant_type(QuantType::Fp4)
        .with_block_size(256)
        .with_double_quant(false)
        .with_dtype(FloatType::BF16);
    config.save(&path).expect("saved");
    let back = QuantLinearConfig::load(&path).expect("loaded");
    assert_eq!(back.to_string(), config.to_string());
    assert_eq!((back.d_input, back.d_output, back.bias), (3, 5, false));
    assert_eq!(back.dtype, FloatType::BF16);
    assert_eq!(
        back.quant_config().expect("valid"),
        tensors::config(QuantType::Fp4, 256, false)
    );

    let text = config.to_string();
    assert!(
        text.contains("\"fp4\"") && text.contains("\"bfloat16\""),
        "{text}"
    );
    let broken = text.replace("fp4", "int4");
    assert!(QuantLinearConfig::load_binary(broken.as_bytes()).is_err());
}

#[test]
fn linear_config_defaults_to_the_settings_of_qlora() {
    let config = QuantLinearConfig::new(3, 5);
    assert_eq!(config.quant_config(), Ok(QuantConfig::default()));
    assert_eq!(config.block_size, BlockSize::B64.elems());
    assert!(config.bias);
}

#[test]
fn branch_config_survives_json() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.json");
    let config = QLoraLinearConfig::new(7)
        .with_alpha(12.5)
        .with_dropout(0.25)
        .with_use_rslora(true);
    config.save(&path).expect("saved");
    let back = QLoraLinearConfig::load(&path).expect("loaded");
    assert_eq!(back.to_string(), config.to_string());
    assert_eq!((back.rank, back.alpha, back.dropout), (7, 12.5, 0.25));
    assert!(back.use_rslora);
}

#[rstest]
#[case::standard(16, 8.0, false, 0.5)]
#[case::default_alpha(8, 16.0, false, 2.0)]
#[case::rank_stabilised(16, 8.0, true, 2.0)]
fn the_scale_follows_from_rank_and_alpha(
    #[case] rank: usize,
    #[case] alpha: f64,
    #[case] use_rslora: bool,
    #[case] scale: f64,
) {
    let config = QLoraLinearConfig::new(rank)
        .with_alpha(alpha)
        .with_use_rslora(use_rslora);
    assert_eq!(config.scale(), scale);
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
                frozen_forward_equals_the_dense_layer
                quantizing_a_dense_layer_keeps_it_nearly
                frozen_passes_the_gradient_to_the_input_alone
                branch_gradients_equal_those_of_dense_products
                gradients_equal_finite_differences
                only_the_branch_is_trained
                adam_changes_the_branch_alone
                a_fresh_branch_changes_nothing
                dropout_acts_on_the_branch_while_training_alone
                records_keep_every_bit
                records_of_other_weights_are_refused
                a_packed_tensor_of_another_kind_is_an_error
                modules_move_between_devices
                a_plain_layer_takes_a_tracked_input
                layers_take_tensors_that_are_not_leaves
                merging_adds_the_branch_to_the_weight
                merging_reports_what_does_not_fit
                half_precision_input_meets_an_f32_branch
                an_empty_batch_gives_an_empty_result
                wrong_inputs_panic_with_the_shapes
                a_strategy_goes_with_the_layer
                parts_that_do_not_fit_are_refused
                a_blank_layer_is_zero
            );

            #[cfg(feature = "flex")]
            device_tests!(@each modules_move_from_the_host_and_back);
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
device_tests!(cpu, "cpu", Device::cpu());
