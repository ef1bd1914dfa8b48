//! Grouped products of experts against the product of each expert alone.
#![cfg(feature = "flex")]

use burn::module::Module;
use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use burn_nf4::format::{BlockSize, FloatType, PackedLayout, QuantConfig, QuantType};
use burn_nf4::op::{
    Activation, ExpertPart, ExpertStack, GatedExperts, MatmulStrategy, StackLayout,
    grouped_gated_linear, grouped_linear, grouped_pays, linear_with,
};
use burn_nf4::{BlockWeight, Nf4Error, expert_linear};

#[macro_use]
mod devices;
mod random;

use random::Random;

const FLAT: QuantConfig = QuantConfig {
    quant_type: QuantType::Nf4,
    block_size: BlockSize::B64,
    nested_block_size: None,
};
const NESTED: QuantConfig = QuantConfig {
    quant_type: QuantType::Nf4,
    block_size: BlockSize::B64,
    nested_block_size: Some(BlockSize::B256),
};
const FP4: QuantConfig = QuantConfig {
    quant_type: QuantType::Fp4,
    block_size: BlockSize::ALL[0],
    nested_block_size: Some(BlockSize::B256),
};

/// Experts, their rows and columns: even and ragged, where rows begin within a word or a block.
const SIZES: [([usize; 3], QuantConfig); 5] = [
    ([4, 32, 64], NESTED),
    ([3, 17, 36], FP4),
    ([5, 7, 75], NESTED),
    ([32, 24, 128], FLAT),
    ([2, 150, 264], FP4),
];

/// Tokens, and experts of each.
const ROUTES: [[usize; 2]; 6] = [[1, 1], [1, 2], [2, 2], [5, 1], [9, 2], [64, 2]];

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

fn dtypes(device: &Device) -> impl Iterator<Item = DType> + '_ {
    let all = [FloatType::F16, FloatType::BF16, FloatType::F32].map(DType::from);
    all.into_iter()
        .filter(|&dtype| burn_nf4::op::supports_dtype(device, dtype))
}

/// Weights of magnitudes of their own, so that one in the place of another is seen.
fn weights([experts, n, k]: [usize; 3], config: QuantConfig, device: &Device) -> Vec<BlockWeight> {
    let weight = |i: usize| random([n, k], device) * (0.05 * (i % 5 + 1) as f64);
    (0..experts)
        .map(|i| BlockWeight::quantize(weight(i), config).expect("it can be quantized"))
        .collect()
}

/// Different experts of each token, the first one twice as often as others and the last never, if there are
/// enough.
fn routes([tokens, per_token]: [usize; 2], experts: usize, seed: u64) -> Vec<usize> {
    let mut numbers = Random(seed);
    let used = (experts - 1).max(per_token);
    (0..tokens)
        .flat_map(|_| {
            let first = match numbers.next().is_multiple_of(2) {
                true => 0,
                false => numbers.next() as usize % used,
            };
            (0..per_token).map(move |i| (first + i) % used)
        })
        .collect()
}

fn ids_tensor(ids: &[usize], per_token: usize, device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let shape = [ids.len() / per_token, per_token];
    Tensor::from_data(TensorData::new(ids, shape), device)
}

fn floats<const D: usize>(y: Tensor<D>) -> Vec<f32> {
    y.into_data().iter::<f32>().collect()
}

/// What a value may be off by, beside values of some size: weights and `y` are rounded to the dtype.
#[track_caller]
fn assert_near(given: &[f32], expected: &[f32], dtype: DType, what: &str) {
    assert_eq!(given.len(), expected.len(), "{what}");
    let relative = match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 1.0 / 256.0,
        _ => 1.0 / 32.0,
    };
    let square = expected.iter().map(|y| y * y).sum::<f32>() / expected.len() as f32;
    let size = square.sqrt().max(0.25);
    for (i, (given, expected)) in given.iter().zip(expected).enumerate() {
        let bound = relative * (expected.abs() + size);
        let difference = (given - expected).abs();
        assert!(difference <= bound, "{what} {i}: {given} {expected}");
    }
}

/// Each entry alone, in f64 over the decoded weights.
fn one_by_one(
    x: &Tensor<2>,
    ids: &[usize],
    per_row: usize,
    decoded: &[Vec<f32>],
    bias: Option<&Tensor<2>>,
) -> Vec<f32> {
    let [_, k] = x.dims();
    let x = floats(x.clone());
    let bias = bias.map(|bias| floats(bias.clone()));
    let of_entry = |(entry, &expert): (usize, &usize)| -> Vec<f32> {
        let x = &x[entry / per_row * k..][..k];
        let rows = decoded[expert].chunks_exact(k);
        let n = rows.len();
        let sums = rows.enumerate().map(|(row, weights)| {
            let products = x.iter().zip(weights);
            let products = products.map(|(x, w)| f64::from(*x) * f64::from(*w));
            let bias = bias.as_ref().map_or(0.0, |bias| bias[expert * n + row]);
            (products.sum::<f64>() + f64::from(bias)) as f32
        });
        sums.collect()
    };
    ids.iter().enumerate().flat_map(of_entry).collect()
}

/// What a gate makes of the two products.
fn gated(gate: &[f32], up: &[f32], activation: Activation) -> Vec<f32> {
    let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
    let of_both = |(&gate, &up): (&f32, &f32)| match activation {
        Activation::Silu => gate * sigmoid(gate) * up,
        Activation::GeluTanh => {
            let inner = 0.797_884_6 * (gate + 0.044_715 * gate.powi(3));
            0.5 * gate * (1.0 + inner.tanh()) * up
        }
        Activation::ClampedSwiGlu => {
            let gate = gate.min(7.0);
            gate * sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1.0)
        }
    };
    gate.iter().zip(up).map(of_both).collect()
}

fn decoded(weights: &[BlockWeight]) -> Vec<Vec<f32>> {
    let decoded = |weight: &BlockWeight| {
        let dense = weight.dequantize::<2>(FloatType::F32);
        floats(dense.expect("a matrix"))
    };
    weights.iter().map(decoded).collect()
}

fn each_entry_is_the_product_with_its_expert(device: &Device) {
    for (sizes, config) in SIZES {
        let [experts, n, k] = sizes;
        let weights = weights(sizes, config, device);
        let stack = ExpertStack::new(&weights).expect("of one form");
        let decoded = decoded(&weights);
        for ([tokens, per_token], dtype) in cases(device) {
            let ids = routes([tokens, per_token], experts, (tokens * k) as u64);
            let of_ids = ids_tensor(&ids, per_token, device);
            for (shared, with_bias) in [(true, false), (false, true)] {
                let per_row = if shared { per_token } else { 1 };
                let x = random([ids.len() / per_row, k], device).cast(dtype);
                let bias = with_bias.then(|| random([experts, n], device).cast(dtype));
                let y = grouped_linear(x.clone(), of_ids.clone(), &stack, bias.clone());
                let y = y.expect("it fits");
                assert_eq!((y.dims(), y.dtype()), ([ids.len(), n], dtype));
                let expected = one_by_one(&x, &ids, per_row, &decoded, bias.as_ref());
                let what = format!("{sizes:?} {tokens} {per_token} {dtype:?} {with_bias}");
                assert_near(&floats(y), &expected, dtype, &what);
            }
        }
    }
}

/// All routes in f32, and one with each other dtype.
fn cases(device: &Device) -> Vec<([usize; 2], DType)> {
    let all = dtypes(device).flat_map(|dtype| ROUTES.map(|route| (route, dtype)));
    all.filter(|&(route, dtype)| dtype == DType::F32 || route == [9, 2])
        .collect()
}

/// The order of the sums is that of a product alone: on CubeCL of `gemv`, on the CPU of the same rows together.
fn sums_are_those_of_each_expert_alone_to_the_last_bit(device: &Device) {
    let is_flex = format!("{device:?}").contains("Flex");
    for (sizes, config) in SIZES {
        let [experts, n, k] = sizes;
        let weights = weights(sizes, config, device);
        let stack = ExpertStack::new(&weights).expect("of one form");
        for ([tokens, per_token], dtype) in cases(device) {
            let ids = routes([tokens, per_token], experts, tokens as u64);
            let x = random([tokens, k], device).cast(dtype);
            let of_ids = ids_tensor(&ids, per_token, device);
            let y = grouped_linear(x.clone(), of_ids, &stack, None).expect("it fits");
            let (x, y) = (floats(x), floats(y));
            for (expert, weight) in weights.iter().enumerate() {
                let entries: Vec<usize> = (0..ids.len()).filter(|&i| ids[i] == expert).collect();
                if entries.is_empty() {
                    continue;
                }
                let rows = entries.iter().map(|entry| &x[entry / per_token * k..][..k]);
                let rows = TensorData::new(rows.collect::<Vec<_>>().concat(), [entries.len(), k]);
                let rows = Tensor::<2>::from_data(rows, device).cast(dtype);
                let strategy = match is_flex {
                    true => MatmulStrategy::Auto,
                    false => MatmulStrategy::Gemv,
                };
                let alone = linear_with(rows, weight, None, strategy).expect("it fits");
                let given = entries.iter().map(|entry| &y[entry * n..][..n]);
                let given = given.collect::<Vec<_>>().concat();
                assert_eq!(
                    given,
                    floats(alone),
                    "{sizes:?} {tokens} {dtype:?} {expert}"
                );
            }
        }
    }
}

fn experts_of_one_weight(device: &Device) {
    for (sizes, config) in SIZES {
        let [experts, n, k] = sizes;
        let dense = random(sizes, device);
        let weight = BlockWeight::quantize(dense, config).expect("it can be quantized");
        let decoded: Tensor<3> = weight.dequantize(FloatType::F32).expect("three dimensions");
        let decoded = floats(decoded);
        let decoded: Vec<Vec<f32>> = decoded.chunks_exact(n * k).map(<[f32]>::to_vec).collect();
        let stack = ExpertStack::from_whole(weight.clone()).expect("three dimensions");
        assert_eq!(stack.size_bytes(), weight.size_bytes());
        for [tokens, per_token] in [[1, 2], [9, 2], [40, 1]] {
            let ids = routes([tokens, per_token], experts, 3);
            let x = random([tokens, k], device);
            let bias = random([experts, n], device);
            let of_ids = ids_tensor(&ids, per_token, device);
            let y = grouped_linear(x.clone(), of_ids, &stack, Some(bias.clone()));
            let expected = one_by_one(&x, &ids, per_token, &decoded, Some(&bias));
            let what = format!("{sizes:?} {tokens}");
            assert_near(&floats(y.expect("it fits")), &expected, DType::F32, &what);
        }
        let x = random([3, k], device);
        let alone = stack.linear(x.clone(), 1, None).expect("it fits");
        let expected = expert_linear(x, &weight, 1, None).expect("it fits");
        assert_eq!(floats(alone), floats(expected));
    }
}

/// Entries of one expert in a row: more than are taken at once, and twice for a token.
fn all_tokens_at_one_expert(device: &Device) {
    let sizes = [6, 24, 64];
    let weights = weights(sizes, NESTED, device);
    let stack = ExpertStack::new(&weights).expect("of one form");
    for per_token in [1, 2, 3] {
        let ids = vec![4; 21 * per_token];
        let x = random([21, 64], device);
        let y = grouped_linear(x.clone(), ids_tensor(&ids, per_token, device), &stack, None);
        let expected = one_by_one(&x, &ids, per_token, &decoded(&weights), None);
        let what = format!("{per_token}");
        assert_near(&floats(y.expect("it fits")), &expected, DType::F32, &what);
    }
}

const ACTIVATIONS: [Activation; 3] = [
    Activation::Silu,
    Activation::GeluTanh,
    Activation::ClampedSwiGlu,
];

fn gates_and_what_they_open(device: &Device) {
    for (sizes, config) in &SIZES[..3] {
        let [experts, n, k] = *sizes;
        let parts = [(); 2].map(|()| weights(*sizes, *config, device));
        let stacks = parts.each_ref().map(|part| ExpertStack::new(part).unwrap());
        let decoded = parts.each_ref().map(|part| decoded(part));
        let cases = dtypes(device).flat_map(|dtype| ACTIVATIONS.map(|kind| (kind, dtype)));
        let cases = cases.filter(|&(kind, dtype)| dtype == DType::F32 || kind == Activation::Silu);
        for (activation, dtype) in cases {
            for ([tokens, per_token], with_bias) in [([1, 2], true), ([9, 2], false)] {
                let ids = routes([tokens, per_token], experts, 5);
                let x = random([tokens, k], device).cast(dtype);
                let biases = [(); 2].map(|()| {
                    let bias = || random([experts, n], device) * 4.0;
                    with_bias.then(|| bias().cast(dtype))
                });
                let [gate, up] = [0, 1].map(|i| ExpertPart {
                    stack: &stacks[i],
                    bias: biases[i].clone(),
                });
                let y = grouped_gated_linear(
                    x.clone(),
                    ids_tensor(&ids, per_token, device),
                    GatedExperts::Apart { gate, up },
                    activation,
                );
                let [gate, up] = [0, 1].map(|i| {
                    let bias = biases[i].as_ref();
                    one_by_one(&x, &ids, per_token, &decoded[i], bias)
                });
                let expected = gated(&gate, &up, activation);
                let what = format!("{sizes:?} {activation:?} {dtype:?} {tokens}");
                assert_near(&floats(y.expect("it fits")), &expected, dtype, &what);
            }
        }
    }
}

/// The even rows of a weight are those of the gate.
fn interleaved_gates(device: &Device) {
    let (experts, n, k) = (4, 20, 72);
    let weights = weights([experts, 2 * n, k], NESTED, device);
    let stack = ExpertStack::new(&weights).expect("of one form");
    let bias = random([experts, 2 * n], device);
    for tokens in [1, 6] {
        let ids = routes([tokens, 2], experts, 8);
        let x = random([tokens, k], device);
        let part = ExpertPart {
            stack: &stack,
            bias: Some(bias.clone()),
        };
        let y = grouped_gated_linear(
            x.clone(),
            ids_tensor(&ids, 2, device),
            GatedExperts::Interleaved(part),
            Activation::ClampedSwiGlu,
        );
        let both = one_by_one(&x, &ids, 2, &decoded(&weights), Some(&bias));
        let [gate, up] = [0, 1].map(|at| {
            let half = both.iter().skip(at).step_by(2);
            half.copied().collect::<Vec<f32>>()
        });
        let expected = gated(&gate, &up, Activation::ClampedSwiGlu);
        let y = y.expect("it fits");
        assert_eq!(y.dims(), [ids.len(), n]);
        assert_near(&floats(y), &expected, DType::F32, "interleaved");
    }
}

fn ids_of_no_expert(device: &Device) {
    let weights = weights([3, 8, 64], NESTED, device);
    let stack = ExpertStack::new(&weights).expect("of one form");
    let x = random([3, 64], device);
    let ids = [[0, 3], [-1, 1], [2, i32::MAX]];
    let y = grouped_linear(x.clone(), Tensor::from_data(ids, device), &stack, None);
    if format!("{device:?}").contains("Flex") {
        let expected = Nf4Error::IdRange {
            tensor: "ids".into(),
            index: 1,
            given: 3,
            rows: 3,
        };
        return assert_eq!(y.unwrap_err(), expected);
    }
    let y = floats(y.expect("the device alone knows the ids"));
    let ids = ids.concat();
    for (entry, row) in y.chunks_exact(8).enumerate() {
        if !(0..3).contains(&ids[entry]) {
            assert!(row.iter().all(|y| y.is_nan()), "entry {entry}: {row:?}");
            continue;
        }
        let x = x.clone().narrow(0, entry / 2, 1);
        let expert = ids[entry] as usize;
        let expected = one_by_one(&x, &[expert], 1, &decoded(&weights), None);
        assert_near(row, &expected, DType::F32, "a valid entry");
    }
}

fn stacks_give_weights_back_and_keep_them_in_records(device: &Device) {
    let weights = weights([3, 17, 36], NESTED, device);
    let stack = ExpertStack::new(&weights).expect("of one form");
    assert_eq!((stack.experts(), stack.matrix_dims()), (3, [17, 36]));
    let words = weights[0].layout().words();
    let stride = words.next_multiple_of(128);
    assert_eq!(stack.packed().dims(), [2 * stride + words]);
    for (expert, weight) in weights.iter().enumerate() {
        let back = stack.expert(expert).expect("there is one");
        assert_eq!(back.to_host().unwrap(), weight.to_host().unwrap());
        let x = random([2, 36], device);
        let alone = stack.linear(x.clone(), expert, None).expect("it fits");
        let expected = burn_nf4::linear(x, weight, None).expect("it fits");
        assert_eq!(floats(alone), floats(expected));
    }
    let blank = |experts, rows| {
        ExpertStack::zeros(experts, [rows, 36], NESTED, FloatType::F32, device).expect("sizes")
    };
    let zeros = blank(3, 17).expert(2).expect("there is one");
    let zeros: Tensor<2> = zeros.dequantize(FloatType::F32).expect("a matrix");
    assert!(floats(zeros).iter().all(|&w| w == 0.0));
    let loaded = blank(3, 17).load_record(stack.clone().into_record());
    assert_eq!(loaded.packed().into_data(), stack.packed().into_data());
    for other in [blank(4, 17), blank(3, 16)] {
        assert!(other.try_load_record(stack.clone().into_record()).is_err());
    }
    let moved = stack.clone().to_device(&Device::flex()).to_device(device);
    assert_eq!(moved.packed().into_data(), stack.packed().into_data());
}

/// Each names what is wrong.
fn what_does_not_fit_is_an_error(device: &Device) {
    let of = |[n, k]: [usize; 2], config| {
        BlockWeight::quantize(random([n, k], device), config).expect("it can be quantized")
    };
    let first = of([8, 64], NESTED);
    let error = ExpertStack::new(&[]).unwrap_err();
    assert!(matches!(error, Nf4Error::ElementCount { .. }), "{error}");
    let error = ExpertStack::new(&[first.clone(), of([8, 32], NESTED)]).unwrap_err();
    let expected = Nf4Error::Shape {
        tensor: "experts[1]".into(),
        expected: vec![8, 64],
        given: vec![8, 32],
    };
    assert_eq!(error, expected);
    let others = [first.clone(), first.clone(), of([8, 64], FLAT)];
    let error = ExpertStack::new(&others).unwrap_err();
    let named = matches!(&error, Nf4Error::Dtype { tensor, .. } if tensor == "experts[2]");
    assert!(named, "{error}");
    let error = ExpertStack::from_whole(first.clone()).unwrap_err();
    assert!(
        matches!(error, Nf4Error::Rank { expected: 3, .. }),
        "{error}"
    );

    let stack = ExpertStack::new(&[first.clone(), first]).expect("of one form");
    let error = stack.expert(2).unwrap_err();
    assert!(
        matches!(error, Nf4Error::RowRange { rows: 2, .. }),
        "{error}"
    );
    let ids = || Tensor::<2, Int>::from_data([[0, 1], [1, 0], [0, 1]], device);
    let linear = |x, bias| grouped_linear(x, ids(), &stack, bias).unwrap_err();
    for shape in [[3, 32], [4, 64], [2, 64]] {
        let error = linear(random(shape, device), None);
        assert!(
            matches!(&error, Nf4Error::Shape { tensor, .. } if tensor == "x"),
            "{error}"
        );
    }
    let error = linear(random([3, 64], device), Some(random([2, 7], device)));
    assert!(
        matches!(&error, Nf4Error::Shape { tensor, .. } if tensor == "bias"),
        "{error}"
    );
    let tracked = device.clone().autodiff();
    let error = linear(random([3, 64], &tracked), None);
    assert!(matches!(error, Nf4Error::Variant { .. }), "{error}");
    let none = Tensor::<2, Int>::zeros([0, 2], device);
    let y = grouped_linear(random([0, 64], device), none, &stack, None).expect("no tokens");
    assert_eq!(y.dims(), [0, 8]);
    let part = || ExpertPart {
        stack: &stack,
        bias: None,
    };
    let up = ExpertPart {
        bias: Some(random([2, 8], device)),
        ..part()
    };
    let experts = GatedExperts::Apart { gate: part(), up };
    let x = random([3, 64], device);
    let error = grouped_gated_linear(x, ids(), experts, Activation::Silu).unwrap_err();
    assert!(
        matches!(error, Nf4Error::Config { field: "bias", .. }),
        "{error}"
    );
}

/// A launch trusts the layout with the size of its buffer.
#[test]
fn stacks_that_cannot_be_addressed_are_refused() {
    let image = PackedLayout::new(1, FLAT);
    for experts in [1 << 57, (1 << 57) + 1, usize::MAX] {
        let error = StackLayout::of_images(image, experts, [1, 1]).unwrap_err();
        assert!(matches!(error, Nf4Error::ElementCount { .. }), "{error}");
    }
}

/// Of these, scales go by rows.
#[test]
fn stacks_of_rows_of_another_length_are_refused() {
    let config = QuantConfig::of(QuantType::Fp8Channel);
    let image = PackedLayout::for_shape(&[8, 16], config).unwrap();
    assert!(StackLayout::of_images(image, 2, [8, 16]).is_ok());
    for refused in [
        StackLayout::of_images(image, 2, [16, 8]),
        StackLayout::of_whole(image, 2, [8, 8]),
    ] {
        assert!(matches!(refused, Err(Nf4Error::Length { .. })));
    }
}

#[test]
fn a_few_tokens_are_grouped_and_long_texts_are_not() {
    for (tokens, per_token, experts, expected) in [
        (1, 8, 128, true),
        (64, 4, 32, true),
        (64, 8, 128, true),
        (4096, 8, 128, false),
        (512, 2, 8, false),
        (usize::MAX, 2, 8, false),
    ] {
        assert_eq!(grouped_pays(tokens, per_token, experts), expected);
    }
}

on_every_device!(
    each_entry_is_the_product_with_its_expert,
    sums_are_those_of_each_expert_alone_to_the_last_bit,
    experts_of_one_weight,
    all_tokens_at_one_expert,
    gates_and_what_they_open,
    interleaved_gates,
    ids_of_no_expert,
    stacks_give_weights_back_and_keep_them_in_records,
    what_does_not_fit_is_an_error,
);
