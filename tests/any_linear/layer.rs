//! One layer.

use burn::module::{Lora, Module, Param, ParamGroup, QLora, Quantizer};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::quantization::{Calibration, QuantValue};
use burn::tensor::{DType, Device, Distribution, Tensor, Tolerance};
use burn_nf4::Nf4Error;
use burn_nf4::format::{FloatType, QuantConfig};
use burn_nf4::nn::{AnyLinear, QLoraLinearConfig, QuantLinear, reparameterize_linears};
use burn_nf4::op::MatmulStrategy;
use rstest::rstest;

use crate::toy::max_difference;

const D_INPUT: usize = 96;
const D_OUTPUT: usize = 80;

fn dense(device: &Device) -> Linear {
    LinearConfig::new(D_INPUT, D_OUTPUT).init(device)
}

fn input(device: &Device) -> Tensor<3> {
    Tensor::random([2, 3, D_INPUT], Distribution::Normal(0.0, 1.0), device)
}

fn lora(use_dora: bool) -> QLoraLinearConfig {
    QLoraLinearConfig::new(4).with_use_dora(use_dora)
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// A branch that changes something, the same for every form of a layer.
fn with_branch(layer: AnyLinear, use_dora: bool, device: &Device) -> AnyLinear {
    let matrix = |shape: [usize; 2]| {
        let elems = shape[0] * shape[1];
        let sine: Vec<f32> = (0..elems).map(|i| 0.2 * (i as f32 * 0.7).sin()).collect();
        Tensor::<1>::from_data(sine.as_slice(), device).reshape(shape)
    };
    let magnitude = matrix([1, D_OUTPUT]).reshape([D_OUTPUT]).abs() + 0.5;
    match layer.with_lora(&lora(use_dora), device).expect("valid") {
        AnyLinear::Lora(mut layer) => {
            layer.lora_a = Param::from_tensor(matrix([D_INPUT, 4]));
            layer.lora_b = Param::from_tensor(matrix([4, D_OUTPUT]));
            if use_dora {
                layer = layer.with_magnitude(magnitude).expect("it fits");
            }
            layer.into()
        }
        AnyLinear::QLora(mut layer) => {
            layer.lora_a = Param::from_tensor(matrix([D_INPUT, 4]));
            layer.lora_b = Param::from_tensor(matrix([4, D_OUTPUT]));
            if use_dora {
                layer = layer.with_magnitude(magnitude).expect("it fits");
            }
            layer.into()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_dense_layer_is_burns() {
    let device = Device::default();
    let layer = dense(&device);
    let x = input(&device);
    let expected = layer.forward(x.clone());
    let row: Tensor<1> = x.clone().slice([0..1, 0..1, 0..D_INPUT]).reshape([D_INPUT]);
    let of_row = values(layer.forward(row.clone()));
    let layer = AnyLinear::from(layer);
    // Sums of 96 products in f32, which may be taken in another order.
    let tolerance = Tolerance::<f32>::absolute(1e-5);
    let y = layer.forward(x).into_data();
    y.assert_approx_eq(&expected.into_data(), tolerance);
    assert!(max_difference(&values(layer.forward(row)), &of_row) < 1e-5);
    assert_eq!(layer.dims(), [D_OUTPUT, D_INPUT]);
    assert_eq!(layer.float_bytes(), D_OUTPUT * D_INPUT * 4);
    assert_eq!(layer.packed_bytes(), 0);
}

#[test]
fn a_quantized_layer_is_an_nf4_linear() {
    let device = Device::default();
    let layer = dense(&device);
    let x = input(&device);
    let expected = QuantLinear::quantize(layer.clone(), QuantConfig::default()).expect("finite");
    let quantized = AnyLinear::from(layer).quantize(QuantConfig::default());
    let quantized = quantized.expect("finite");
    assert_eq!(
        values(quantized.forward(x.clone())),
        values(expected.forward(x))
    );
    assert_eq!(quantized.packed_bytes(), expected.weight.size_bytes());
    assert_eq!(quantized.float_bytes(), 0);
    assert!(quantized.is_quantized() && quantized.bias().is_some());

    let again = quantized
        .clone()
        .quantize(QuantConfig::default())
        .expect("it is");
    assert_eq!(again.packed_bytes(), quantized.packed_bytes());
    let back = quantized.dequantize(FloatType::F32).expect("it is f32");
    let dense = expected.to_dense(FloatType::F32).expect("it is f32");
    let AnyLinear::Dense(back) = back else {
        panic!("{back:?}");
    };
    assert_eq!(values(back.weight.val()), values(dense.weight.val()));
}

/// A branch on a weight of floats computes what one on the same weight in 4 bit does.
#[rstest]
fn a_branch_on_floats_is_that_on_4_bit(
    #[values(false, true)] use_dora: bool,
    #[values(false, true)] is_tracked: bool,
) {
    let device = match is_tracked {
        false => Device::default(),
        true => Device::default().autodiff(),
    };
    let packed = AnyLinear::from(dense(&device)).quantize(QuantConfig::default());
    let packed = with_branch(packed.expect("finite"), use_dora, &device);
    let floats = packed
        .clone()
        .dequantize(FloatType::F32)
        .expect("it is f32");
    assert!(matches!(floats, AnyLinear::Lora(_)));
    let x = input(&device);
    let (ours, theirs) = (floats.forward(x.clone()), packed.forward(x.clone()));
    let tolerance = Tolerance::<f32>::absolute(2e-5);
    ours.into_data()
        .assert_approx_eq(&theirs.into_data(), tolerance);

    // And is a part of the weight once it is merged.
    for layer in [floats, packed] {
        let expected = layer.forward(x.clone()).into_data();
        let merged = layer.merge(None).expect("finite");
        assert!(matches!(merged, AnyLinear::Dense(_)));
        let y = merged.forward(x.clone()).into_data();
        y.assert_approx_eq(&expected, tolerance);
    }
}

#[rstest]
fn a_fresh_branch_changes_nothing_and_is_all_that_is_trained(
    #[values(false, true)] use_dora: bool,
    #[values(false, true)] in_4bit: bool,
) {
    let device = Device::default().autodiff();
    let mut layer = AnyLinear::from(dense(&device));
    if in_4bit {
        layer = layer.quantize(QuantConfig::default()).expect("finite");
    }
    let x = input(&device);
    let before = values(layer.forward(x.clone()));
    let layer = layer.with_lora(&lora(use_dora), &device).expect("valid");
    let y = layer.forward(x);
    assert!(max_difference(&before, &values(y.clone())) < 1e-5);
    let grads = y.square().mean().backward();
    let (a, b, magnitude, weight) = match &layer {
        AnyLinear::Lora(layer) => {
            let weight = layer.base.weight.grad(&grads).is_some();
            (&layer.lora_a, &layer.lora_b, &layer.lora_magnitude, weight)
        }
        AnyLinear::QLora(layer) => (&layer.lora_a, &layer.lora_b, &layer.lora_magnitude, false),
        other => panic!("{other:?}"),
    };
    assert!(a.grad(&grads).is_some() && b.grad(&grads).is_some());
    assert_eq!(magnitude.is_some(), use_dora);
    if let Some(magnitude) = magnitude {
        assert!(magnitude.grad(&grads).is_some());
    }
    assert!(!weight && layer.bias().expect("a bias").grad(&grads).is_none());
}

#[rstest]
fn dropout_acts_on_the_branch_alone_while_training(#[values(false, true)] use_dora: bool) {
    let device = Device::default().autodiff();
    let config = lora(use_dora).with_dropout(0.5);
    let layer = config.init_dense(dense(&device), &device).expect("valid");
    let layer = AnyLinear::from(layer);
    let x = input(&device);
    // B is zero, so that only DoRA's change of the base product can differ, and its factor is one.
    let base = values(layer.clone().into_base().forward(x.clone()));
    assert!(max_difference(&values(layer.forward(x)), &base) < 1e-5);

    let layer = with_branch(AnyLinear::from(dense(&device)), use_dora, &device);
    let AnyLinear::Lora(mut layer) = layer else {
        panic!("{layer:?}");
    };
    layer.dropout.prob = 0.5;
    let layer = AnyLinear::from(layer);
    let x = input(&device);
    let first = values(layer.forward(x.clone()));
    assert!(max_difference(&first, &values(layer.forward(x.clone()))) > 1e-3);
    let inner = layer.valid();
    let x = x.inner();
    let first = values(inner.forward(x.clone()));
    assert_eq!(first, values(inner.forward(x)));
}

#[rstest]
fn a_branch_that_is_off_leaves_the_base_and_is_kept(
    #[values(false, true)] use_dora: bool,
    #[values(false, true)] in_4bit: bool,
) {
    let device = Device::default();
    let mut layer = AnyLinear::from(dense(&device));
    if in_4bit {
        layer = layer.quantize(QuantConfig::default()).expect("finite");
    }
    let layer = with_branch(layer, use_dora, &device);
    let x = input(&device);
    let with = values(layer.forward(x.clone()));
    let off = layer.with_branch_enabled(false);
    assert!(off.has_branch() && !off.is_branch_enabled());
    let base = values(off.clone().into_base().forward(x.clone()));
    assert_eq!(values(off.forward(x.clone())), base);
    assert!(max_difference(&with, &base) > 0.1);

    match off.clone().merge(None) {
        Err(Nf4Error::Config { field, .. }) => assert_eq!(field, "enabled"),
        other => panic!("{other:?}"),
    }
    // The switch is the layer's own: a record neither has nor sets it.
    let on = off.clone().with_branch_enabled(true);
    let loaded = off.clone().load_record(on.clone().into_record());
    assert!(!loaded.is_branch_enabled());
    assert_eq!(values(on.forward(x)), with);
}

#[test]
fn a_merge_to_4_bit_is_the_merged_weight_in_4_bit() {
    let device = Device::default();
    let layer = AnyLinear::from(dense(&device)).quantize(QuantConfig::default());
    let layer = layer.expect("finite").with_strategy(MatmulStrategy::Decode);
    let layer = with_branch(layer, false, &device);
    let expected = layer.clone().merge(None).expect("finite");
    let expected = expected.quantize(QuantConfig::default()).expect("finite");
    let expected = expected.with_strategy(MatmulStrategy::Decode);
    let merged = layer.merge_4bit().expect("finite");
    let AnyLinear::Nf4(merged) = merged else {
        panic!("{merged:?}");
    };
    assert_eq!(merged.strategy, MatmulStrategy::Decode);
    let x = input(&device);
    assert_eq!(
        values(merged.forward(x.clone())),
        values(expected.forward(x))
    );
}

#[test]
fn a_merge_that_overflows_is_an_error() {
    let device = Device::default();
    let layer = with_branch(AnyLinear::from(dense(&device)), false, &device);
    let AnyLinear::Lora(mut layer) = layer else {
        panic!("{layer:?}");
    };
    layer.scale = 1e9;
    match layer.merge(FloatType::F16) {
        Err(Nf4Error::NonFinite { tensor, .. }) => assert_eq!(tensor, "merged weight"),
        other => panic!("{other:?}"),
    }
}

#[rstest]
fn a_trained_bias_stays_in_f32_beside_a_weight_of_16_bit(#[values(false, true)] use_dora: bool) {
    let device = Device::default();
    let Linear { weight, bias } = dense(&device);
    let layer = AnyLinear::from(Linear {
        weight: Param::from_tensor(weight.val().cast(DType::BF16)),
        bias,
    });
    let layer = layer.with_lora(&lora(use_dora), &device).expect("valid");
    let y = layer.forward(input(&device).cast(DType::BF16));
    assert_eq!(y.dtype(), DType::BF16);
    assert_eq!(layer.bias().expect("a bias").dtype(), DType::F32);
    let merged = layer.merge(None).expect("finite");
    assert_eq!(merged.dtype(), Ok(FloatType::BF16));
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let device = Device::default();
    let layer = || AnyLinear::from(dense(&device));
    let bias = Param::from_tensor(Tensor::<1>::zeros([3], &device));
    match layer().with_bias(bias) {
        Err(Nf4Error::Shape {
            tensor,
            expected,
            given,
        }) => assert_eq!(
            (tensor.as_str(), expected, given),
            ("bias", vec![80], vec![3])
        ),
        other => panic!("{other:?}"),
    }
    for (config, field) in [
        (QLoraLinearConfig::new(0), "rank"),
        (QLoraLinearConfig::new(4).with_alpha(f64::NAN), "alpha"),
        (QLoraLinearConfig::new(4).with_dropout(1.0), "dropout"),
    ] {
        match layer().with_lora(&config, &device) {
            Err(Nf4Error::Config { field: named, .. }) => assert_eq!(named, field),
            other => panic!("{other:?}"),
        }
    }
    let a = Tensor::<2>::zeros([D_INPUT, 5], &device);
    let b = Tensor::<2>::zeros([4, D_OUTPUT], &device);
    let misfit = QLoraLinearConfig::new(4).init_dense_with(dense(&device), a, b);
    assert!(matches!(misfit, Err(Nf4Error::Shape { tensor, .. }) if tensor == "lora_a"));
}

/// A record of a layer in another form is an error, not a layer of the old values.
#[test]
fn a_record_names_the_form_of_the_layer() {
    let device = Device::default();
    let floats = AnyLinear::from(dense(&device));
    let packed = floats
        .clone()
        .quantize(QuantConfig::default())
        .expect("finite");
    assert!(
        floats
            .clone()
            .try_load_record(packed.clone().into_record())
            .is_err()
    );
    assert!(
        packed
            .clone()
            .try_load_record(floats.into_record())
            .is_err()
    );
    assert!(packed.clone().try_load_record(packed.into_record()).is_ok());
}

#[test]
fn ids_of_what_is_trained_follow_from_the_path() {
    let device = Device::default().autodiff();
    let ids = |path: &str| {
        let layer = AnyLinear::from(dense(&device)).with_lora(&lora(true), &device);
        match layer.expect("valid").with_stable_ids(path) {
            AnyLinear::Lora(layer) => {
                let magnitude = layer.lora_magnitude.expect("DoRA");
                [layer.lora_a.id, layer.lora_b.id, magnitude.id]
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(ids("a.q_proj"), ids("a.q_proj"));
    assert_ne!(ids("a.q_proj"), ids("a.k_proj"));
}

fn quantizer(device: &Device) -> Quantizer {
    let scheme = device.settings().quantization.scheme;
    Quantizer::new(Calibration::MinMax, scheme.with_value(QuantValue::Q8S))
}

/// Burn puts its quantized tensors into our layers as it does into its own.
#[rstest]
fn what_burn_has_quantized_is_multiplied_as_in_its_linear(
    #[values(false, true)] with_adapter: bool,
    #[values(false, true)] is_tracked: bool,
) {
    let device = match is_tracked {
        false => Device::default(),
        true => Device::default().autodiff(),
    };
    let theirs = dense(&device);
    let ours = AnyLinear::from(theirs.clone());
    let x = input(&device);
    let row: Tensor<1> = x.clone().slice([0..1, 0..1, 0..D_INPUT]).reshape([D_INPUT]);
    let (theirs, ours) = match with_adapter {
        false => (
            theirs.quantize_weights(&mut quantizer(&device)),
            ours.quantize_weights(&mut quantizer(&device)),
        ),
        true => {
            device.seed(1);
            let qlora = || QLora::new(Lora::new(2, 4.0), quantizer(&device));
            let theirs = theirs.apply_qlora(qlora());
            device.seed(1);
            (theirs, ours.apply_qlora(qlora()))
        }
    };
    assert!(matches!(theirs.weight.base().dtype(), DType::QFloat(_)));
    let (y, expected) = (ours.forward(x.clone()), theirs.forward(x));
    assert!(max_difference(&values(y), &values(expected)) < 1e-4);
    let (y, expected) = (ours.forward(row.clone()), theirs.forward(row));
    assert!(max_difference(&values(y), &values(expected)) < 1e-4);
}

/// And with a branch of ours on such a weight, which is merged into floats.
#[rstest]
fn a_branch_on_what_burn_has_quantized_computes_and_merges(#[values(false, true)] use_dora: bool) {
    let device = Device::default();
    let layer = AnyLinear::from(dense(&device)).quantize_weights(&mut quantizer(&device));
    assert!(layer.dtype().is_err(), "it is quantized");
    let layer = with_branch(layer, use_dora, &device);
    let x = input(&device);
    let y = values(layer.forward(x.clone()));
    let merged = layer.merge(Some(FloatType::F32)).expect("finite");
    assert!(max_difference(&values(merged.forward(x)), &y) < 1e-3);
}

#[test]
fn a_weight_with_a_reparameterization_takes_no_branch() {
    let device = Device::default().autodiff();
    let config = QuantConfig::default();
    let packed = AnyLinear::from(dense(&device));
    let packed = reparameterize_linears(packed, config, ParamGroup::all()).expect("finite");
    let adapted = AnyLinear::from(dense(&device)).apply_lora(Lora::new(2, 4.0));
    for layer in [packed, adapted] {
        assert_eq!(layer.dims(), [D_OUTPUT, D_INPUT]);
        match layer.clone().with_lora(&lora(false), &device) {
            Err(Nf4Error::Config { given, .. }) => assert!(given.contains("`weight`"), "{given}"),
            other => panic!("{other:?}"),
        }
        let layer = layer.materialize();
        assert!(layer.with_lora(&lora(false), &device).is_ok());
    }
}

#[rstest]
#[should_panic(expected = "AnyLinear::forward: `x` has shape [2, 3, 95], expected [2, 3, 96]")]
fn an_input_that_does_not_fit_is_named() {
    let device = Device::default();
    let x = Tensor::<3>::zeros([2, 3, D_INPUT - 1], &device);
    AnyLinear::from(dense(&device)).forward(x);
}
