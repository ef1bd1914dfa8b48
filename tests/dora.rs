//! DoRA in `QLoraLinear`, on every device that is compiled in: against PEFT's formula over a dense
//! weight, its gradients with the norm held constant, dropout, records, merging.
#![cfg(feature = "peft")]

mod tensors;

use burn::module::{Module, Param};
use burn::store::ModuleRecord;
use burn::tensor::{DType, Device, Tensor};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig};
use burn_nf4::nn::{QLoraLinear, QLoraLinearConfig, QuantLinear};
use burn_nf4::peft::{Adapter, LoraConfig, TargetModules};
use burn_nf4::{BlockWeight, Nf4Error};
use rstest::rstest;
use tensors::*;

const D_INPUT: usize = 40;
const D_OUTPUT: usize = 24;
const RANK: usize = 4;
const BATCH: [usize; 3] = [2, 3, D_INPUT];
const ALPHA: f64 = 3.0;
const SCALE: f64 = ALPHA / RANK as f64;

/// As in `modules.rs`: TF32 keeps 11 bits of each factor, and the sums are of at most 40 terms.
const PRODUCT_TOLERANCE: f64 = 1.0 / 256.0;

#[track_caller]
fn assert_near(got: &[f64], expected: &[f64], what: &str) {
    tensors::assert_near(got, expected, PRODUCT_TOLERANCE, what);
}

fn far(a: &[f64], b: &[f64]) -> bool {
    tensors::is_far(a, b, PRODUCT_TOLERANCE)
}

fn f32_tensor<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let values = uniform(shape.iter().product(), seed);
    tensor(&values, shape, FloatType::F32, device)
}

fn frozen(device: &Device) -> QuantLinear {
    let host = BlockTensor::quantize(
        &uniform(D_OUTPUT * D_INPUT, 1),
        &[D_OUTPUT, D_INPUT],
        QuantConfig::default(),
    );
    let bias = f32_tensor([D_OUTPUT], 2, device);
    QuantLinear::from_host(&host.expect("valid"), Some(bias), device).expect("it fits")
}

fn config() -> QLoraLinearConfig {
    QLoraLinearConfig::new(RANK)
        .with_alpha(ALPHA)
        .with_use_dora(true)
}

/// Magnitudes between 1 and 3; the rows have a norm of about 4.
fn magnitude(device: &Device) -> Tensor<1> {
    f32_tensor([D_OUTPUT], 5, device) + 2.0
}

fn layer(config: QLoraLinearConfig, device: &Device) -> QLoraLinear {
    let a = f32_tensor([D_INPUT, RANK], 3, device);
    let b = f32_tensor([RANK, D_OUTPUT], 4, device);
    let layer = config.init_with(frozen(device), a, b).expect("it fits");
    layer.with_magnitude(magnitude(device)).expect("it fits")
}

/// The parts of a layer as dense tensors: `Wᵀ`, `A`, `B`, `m`, the bias.
struct Dense {
    weight: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    m: Tensor<2>,
    bias: Tensor<2>,
}

/// The values alone, to be trained where the device can.
fn leaf(tensor: Tensor<2>) -> Tensor<2> {
    match tensor.is_autodiff() {
        true => tensor.detach().require_grad(),
        false => tensor,
    }
}

impl Dense {
    fn of(layer: &QLoraLinear) -> Self {
        let dense = layer.base.to_dense(FloatType::F32).expect("f32");
        let magnitude = layer.lora_magnitude.as_ref().expect("a DoRA layer");
        let m: Tensor<2> = magnitude.val().unsqueeze();
        Self {
            weight: dense.weight.val().detach(),
            a: leaf(layer.lora_a.val()),
            b: leaf(layer.lora_b.val()),
            m: leaf(m),
            bias: dense.bias.expect("a bias").val().detach().unsqueeze(),
        }
    }

    fn norms(&self) -> Tensor<2> {
        let merged = self.weight.clone() + self.a.clone().matmul(self.b.clone()) * SCALE;
        (merged.clone() * merged).sum_dim(0).sqrt()
    }

    /// PEFT's `DoraLinearLayer.forward`, term by term.
    fn forward(&self, x: Tensor<2>, norms: Tensor<2>) -> Tensor<2> {
        let base = x.clone().matmul(self.weight.clone());
        let result = base.clone() + self.bias.clone();
        let factor = self.m.clone() / norms;
        let lora = x.matmul(self.a.clone()).matmul(self.b.clone());
        result + (factor.clone() - 1.0) * base + factor * lora * SCALE
    }
}

fn loss<const D: usize>(y: Tensor<D>) -> Tensor<1> {
    (y.clone() * y).sum() / 2.0
}

fn forward_is_pefts_formula(device: &Device) {
    for device in [device.clone(), device.clone().autodiff()] {
        let layer = layer(config(), &device);
        let x = f32_tensor(BATCH, 6, &device);
        let y = layer.forward(x.clone());
        assert_eq!(y.dims(), [BATCH[0], BATCH[1], D_OUTPUT]);
        let dense = Dense::of(&layer);
        let expected = dense.forward(x.clone().reshape([6, D_INPUT]), dense.norms());
        assert_near(&values(&y), &values(&expected), "y");

        let mut plain = layer;
        plain.lora_magnitude = None;
        assert!(
            far(&values(&plain.forward(x)), &values(&expected)),
            "the magnitude counts"
        );
    }
}

fn gradients_take_the_norm_as_a_constant(device: &Device) {
    let device = device.clone().autodiff();
    for device in [device.clone(), device.gradient_checkpointing()] {
        let layer = layer(config(), &device);
        let x = f32_tensor(BATCH, 6, &device).require_grad();
        let grads = loss(layer.forward(x.clone())).backward();

        let dense = Dense::of(&layer);
        let dense_x = || leaf(x.clone().reshape([6, D_INPUT]));
        let tracked_x = dense_x();
        let norms = dense.norms().detach();
        let expected = loss(dense.forward(tracked_x.clone(), norms)).backward();
        let magnitude = layer.lora_magnitude.as_ref().expect("a DoRA layer");
        let same = |got: Vec<f64>, expected: Tensor<2>, what| {
            assert_near(&got, &values(&expected), what);
        };
        let a = values(&layer.lora_a.grad(&grads).expect("trained"));
        same(a.clone(), dense.a.grad(&expected).expect("trained"), "dA");
        let b = values(&layer.lora_b.grad(&grads).expect("trained"));
        same(b, dense.b.grad(&expected).expect("trained"), "dB");
        let m = values(&magnitude.grad(&grads).expect("trained"));
        same(m, dense.m.grad(&expected).expect("trained"), "dm");
        let dx = values(&x.grad(&grads).expect("tracked"));
        same(dx, tracked_x.grad(&expected).expect("tracked"), "dx");

        // With the norm in the graph, A's gradient is another.
        let dense = Dense::of(&layer);
        let through = loss(dense.forward(dense_x(), dense.norms())).backward();
        assert!(far(&a, &values(&dense.a.grad(&through).expect("trained"))));
    }
}

fn the_norm_follows_the_branch(device: &Device) {
    let device = device.clone().autodiff();
    let mut layer = layer(config(), &device);
    let x = f32_tensor(BATCH, 6, &device);
    let before = values(&layer.forward(x.clone()));
    layer.lora_b = Param::from_tensor(f32_tensor([RANK, D_OUTPUT], 9, &device));
    let after = values(&layer.forward(x.clone()));
    assert!(far(&after, &before));
    let dense = Dense::of(&layer);
    let expected = dense.forward(x.reshape([6, D_INPUT]), dense.norms());
    assert_near(&after, &values(&expected), "y");
}

/// With one input of several in use, dropout either keeps it or not, and both the base and the
/// branch see the same.
fn dropout_acts_as_in_peft(device: &Device) {
    const ROWS: usize = 64;
    let tracked = device.clone().autodiff();
    let layer = layer(config().with_dropout(0.25), &tracked);
    let dense = Dense::of(&layer);
    let one_hot = |device: &Device| {
        let mut x = vec![0.0; ROWS * D_INPUT];
        x.chunks_mut(D_INPUT).for_each(|row| row[7] = 0.5);
        tensor(&x, [ROWS, D_INPUT], FloatType::F32, device)
    };
    let y = values(&layer.forward(one_hot(&tracked)));

    let base = one_hot(&tracked).matmul(dense.weight.clone());
    let dropped = values(&(base + dense.bias.clone()));
    // PEFT: result + (m/n - 1) base(d) + m/n lora(d) s, with d = x / 0.75.
    let change = dense.forward(one_hot(&tracked), dense.norms());
    let kept: Vec<f64> = values(&change)
        .iter()
        .zip(&dropped)
        .map(|(full, dropped)| dropped + (full - dropped) / 0.75)
        .collect();
    let rows = |y: &[f64], row: usize| y[row * D_OUTPUT..][..D_OUTPUT].to_vec();
    let mut counts = [0; 2];
    for row in 0..ROWS {
        let y = rows(&y, row);
        let is_kept = far(&y, &rows(&dropped, row));
        let expected = if is_kept { &kept } else { &dropped };
        assert_near(&y, &rows(expected, row), "y");
        counts[usize::from(is_kept)] += 1;
    }
    // 48 of 64 are kept on average; fewer than 24 or all are, once in 10^8 runs.
    assert!((24..ROWS).contains(&counts[1]), "{counts:?}");

    // Not while nothing is trained.
    let x = f32_tensor(BATCH, 6, device);
    let still = layer.clone().valid().forward(x.clone());
    let expected = dense.forward(x.autodiff().reshape([6, D_INPUT]), dense.norms());
    assert_near(&values(&still), &values(&expected), "y");
}

fn a_fresh_layer_changes_nothing_and_has_the_norms_of_the_rows(device: &Device) {
    let device = device.clone().autodiff();
    let base = frozen(&device);
    let layer = config().init(base.clone(), &device).expect("valid");
    let x = f32_tensor(BATCH, 6, &device);
    let expected = values(&base.forward(x.clone()));
    assert_near(&values(&layer.forward(x.clone())), &expected, "y");

    let weight = base.weight.dequantize::<2>(FloatType::F32).expect("f32");
    let weight = values(&weight);
    let norms: Vec<f64> = weight
        .chunks(D_INPUT)
        .map(|row| row.iter().map(|w| w * w).sum::<f64>().sqrt())
        .collect();
    let magnitude = layer.lora_magnitude.as_ref().expect("a DoRA layer");
    assert_near(&values(&magnitude.val()), &norms, "m");
    let grads = loss(layer.forward(x)).backward();
    assert!(magnitude.grad(&grads).is_some(), "it is trained");
    assert!(
        layer
            .base
            .bias
            .as_ref()
            .is_some_and(|bias| bias.grad(&grads).is_none())
    );
}

fn records_hold_the_magnitude(device: &Device) {
    let layer = layer(config(), device);
    let bytes = layer.clone().into_record().into_bytes().expect("bytes");
    let record = ModuleRecord::from_bytes(bytes).expect("a record");
    let blank = config().init(frozen(device), device).expect("valid");
    let loaded = blank.load_record(record);
    let magnitude = |layer: &QLoraLinear| {
        let magnitude = layer.lora_magnitude.as_ref().expect("a DoRA layer");
        bits(magnitude.val(), FloatType::F32)
    };
    assert_same_bits(&magnitude(&loaded), &magnitude(&layer), "m");
    let x = f32_tensor(BATCH, 6, device);
    let (got, expected) = (loaded.forward(x.clone()), layer.forward(x));
    assert_same_bits(
        &bits(got, FloatType::F32),
        &bits(expected, FloatType::F32),
        "y",
    );
}

fn merging_brings_rows_to_their_magnitude(device: &Device) {
    let layer = layer(config(), &device.clone().autodiff());
    let merged = layer.merge(FloatType::F32).expect("finite");
    let x = f32_tensor(BATCH, 6, &device.clone().autodiff());
    let expected = values(&layer.forward(x.clone()));
    assert_near(&values(&merged.forward(x)), &expected, "y");
    let weight = merged.weight.val();
    let norms = (weight.clone() * weight).sum_dim(0).sqrt();
    assert_near(&values(&norms), &values(&magnitude(device)), "norms");
}

fn a_row_of_zeros_stays_finite(device: &Device) {
    let device = device.clone().autodiff();
    let mut weight = uniform(D_OUTPUT * D_INPUT, 1);
    weight[..D_INPUT].fill(0.0);
    // Blocks of 32 or more cross the rows, but a zero is a code of its own.
    let weight = tensor(&weight, [D_OUTPUT, D_INPUT], FloatType::F32, &device);
    let weight = BlockWeight::quantize(weight, QuantConfig::flat()).expect("valid");
    let base = QuantLinear::new(weight, None).expect("a matrix");
    let layer = config().init(base, &device).expect("valid");
    let y = layer.forward(f32_tensor(BATCH, 6, &device));
    assert!(values(&y).iter().all(|y| y.is_finite()));
    assert_eq!(values(&y)[0], 0.0);
    let grads = loss(y).backward();
    let magnitude = layer.lora_magnitude.as_ref().expect("a DoRA layer");
    for grad in [
        values(&magnitude.grad(&grads).expect("trained")),
        values(&layer.lora_b.grad(&grads).expect("trained")),
    ] {
        assert!(grad.iter().all(|grad| grad.is_finite()));
    }
}

fn half_precision_input_meets_f32_factors(device: &Device) {
    let layer = layer(config(), device);
    let x = f32_tensor(BATCH, 6, device);
    let expected = values(&layer.forward(x.clone()));
    let largest = expected.iter().fold(0f64, |max, v| max.max(v.abs()));
    // Some roundings of x, W and y to the dtype's 11 or 8 bits.
    for (dtype, tolerance) in [(DType::F16, 1.0 / 128.0), (DType::BF16, 1.0 / 32.0)] {
        if lacks(device, dtype) {
            continue;
        }
        let y = layer.forward(x.clone().cast(dtype));
        assert_eq!(y.dtype(), dtype);
        let bounds: Vec<(f64, f64)> = expected
            .iter()
            .map(|&value| (value, largest * tolerance))
            .collect();
        assert_close(&values(&y), &bounds, &format!("{dtype:?}"));
    }
}

fn an_empty_batch_gives_an_empty_result(device: &Device) {
    let y = layer(config(), device).forward(Tensor::<2>::zeros([0, D_INPUT], device));
    assert_eq!(y.dims(), [0, D_OUTPUT]);
}

fn magnitudes_that_do_not_fit_are_refused(device: &Device) {
    let plain = QLoraLinearConfig::new(RANK)
        .init(frozen(device), device)
        .expect("valid");
    assert!(plain.lora_magnitude.is_none());
    let result = plain.with_magnitude(Tensor::ones([D_INPUT], device));
    assert_eq!(
        result.err(),
        Some(Nf4Error::Shape {
            tensor: "lora_magnitude".into(),
            expected: vec![D_OUTPUT],
            given: vec![D_INPUT],
        })
    );
}

fn adapters_hold_the_magnitude(device: &Device) {
    let device = device.clone().autodiff();
    let settings = LoraConfig {
        r: RANK,
        lora_alpha: ALPHA,
        use_dora: true,
        ..LoraConfig::new(TargetModules::list(["q"]))
    };
    let mut adapter = Adapter::new(settings).expect("valid");
    let trained = layer(config(), &device);
    adapter.insert_layer("q", &trained).expect("it fits");
    let folder = tempfile::TempDir::new().expect("a folder");
    adapter.save(folder.path()).expect("it can be written");
    let reread = Adapter::open(folder.path()).expect("it is valid");
    let module = reread.module("q").expect("it is there");
    assert_eq!(module.magnitude.as_ref().expect("DoRA").shape(), [D_OUTPUT]);
    let back = reread
        .layer("q", frozen(&device), &device)
        .expect("it fits");
    let x = f32_tensor(BATCH, 6, &device);
    let (got, expected) = (back.forward(x.clone()), trained.forward(x.clone()));
    assert_same_bits(
        &bits(got, FloatType::F32),
        &bits(expected, FloatType::F32),
        "y",
    );
    let magnitude = back.lora_magnitude.as_ref().expect("a DoRA layer");
    let grads = loss(back.forward(x)).backward();
    assert!(magnitude.grad(&grads).is_some(), "it is trained");

    let mut plain = trained;
    plain.lora_magnitude = None;
    assert!(matches!(
        adapter.insert_layer("q", &plain),
        Err(Nf4Error::Config {
            field: "use_dora",
            ..
        })
    ));
}

/// Norms are taken a few rows at a time where the weight is large.
#[cfg(feature = "flex")]
#[rstest]
#[case::two_chunks_the_second_ragged(3, (1 << 21) - 64)]
#[case::a_row_longer_than_a_chunk(2, (1 << 22) + 64)]
fn norms_of_a_large_weight_cover_every_row(#[case] rows: usize, #[case] columns: usize) {
    let device = Device::flex();
    let config = QuantConfig::flat();
    let dense = Tensor::<2>::ones([rows, columns], &device);
    let scales = Tensor::<1>::from_floats([1.0, 2.0, 3.0], &device).narrow(0, 0, rows);
    let dense = dense * scales.unsqueeze_dim(1);
    let weight = BlockWeight::quantize(dense, config).expect("valid");
    let base = QuantLinear::new(weight, None).expect("a matrix");
    let layer = QLoraLinearConfig::new(1).with_use_dora(true);
    let layer = layer.init(base, &device).expect("valid");
    let magnitude = values(&layer.lora_magnitude.expect("a DoRA layer").val());
    // Every element is its block's scale; the sum is of millions of equal terms in f32.
    let expected: Vec<(f64, f64)> = (0..rows)
        .map(|row| (row as f64 + 1.0) * (columns as f64).sqrt())
        .map(|norm| (norm, norm * 1e-3))
        .collect();
    assert_close(&magnitude, &expected, "m");
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
                forward_is_pefts_formula
                gradients_take_the_norm_as_a_constant
                the_norm_follows_the_branch
                dropout_acts_as_in_peft
                a_fresh_layer_changes_nothing_and_has_the_norms_of_the_rows
                records_hold_the_magnitude
                merging_brings_rows_to_their_magnitude
                a_row_of_zeros_stays_finite
                half_precision_input_meets_f32_factors
                an_empty_batch_gives_an_empty_result
                magnitudes_that_do_not_fit_are_refused
                adapters_hold_the_magnitude
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
device_tests!(cpu, "cpu", Device::cpu());
