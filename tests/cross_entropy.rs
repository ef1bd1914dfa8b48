//! Cross-entropy against the formula in f64, and that of heads against the logits held at once, on every device.
#![cfg(feature = "flex")]

use burn::module::{Lora, Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Distribution, Gradients, Int, Tensor, TensorData};
use burn_nf4::Nf4Error;
use burn_nf4::format::QuantConfig;
use burn_nf4::nn::{self, AnyLinear, QLoraLinearConfig};
use burn_nf4::op::{
    CrossEntropyOptions, LinearCrossEntropyOptions, LossReduction, cross_entropy,
    linear_cross_entropy,
};

const PLAIN: CrossEntropyOptions = CrossEntropyOptions {
    ignore_index: -100,
    label_smoothing: 0.0,
    z_loss: 0.0,
    soft_cap: None,
    logit_scale: 1.0,
};

/// Each option by itself, and all of them.
const OPTIONS: [CrossEntropyOptions; 6] = [
    PLAIN,
    CrossEntropyOptions {
        label_smoothing: 0.1,
        ..PLAIN
    },
    CrossEntropyOptions {
        z_loss: 1e-2,
        ..PLAIN
    },
    CrossEntropyOptions {
        soft_cap: Some(3.0),
        ..PLAIN
    },
    CrossEntropyOptions {
        logit_scale: 0.3,
        ..PLAIN
    },
    CrossEntropyOptions {
        ignore_index: 1,
        label_smoothing: 0.2,
        z_loss: 1e-3,
        soft_cap: Some(2.5),
        logit_scale: 1.7,
    },
];

/// Rows and vocabularies that no vector, some and many divide; more than one of all units.
const SHAPES: [[usize; 2]; 6] = [[1, 1], [3, 7], [5, 64], [2, 1000], [3, 8192], [70_000, 2]];

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 2.0), device)
}

fn values<const D: usize>(x: &Tensor<D>) -> Vec<f64> {
    x.to_data().iter::<f64>().collect()
}

/// Some of each kind: the first, the last, those between, and ignored ones.
fn targets(rows: usize, vocabulary: usize, ignored: i32) -> Vec<i64> {
    let of = |row: usize| match row % 5 {
        0 => vocabulary as i64 - 1,
        2 => ignored.into(),
        4 => 0,
        _ => (row * 7919 % vocabulary) as i64,
    };
    (0..rows).map(of).collect()
}

fn ints(values: &[i64], dtype: DType, device: &Device) -> Tensor<1, Int> {
    let data = TensorData::new(values.to_vec(), [values.len()]);
    Tensor::from_data(data, (device, dtype))
}

fn expected(row: &[f64], target: i64, options: &CrossEntropyOptions) -> f64 {
    if target == i64::from(options.ignore_index) {
        return 0.0;
    }
    let capped = |x: &f64| {
        let x = x * options.logit_scale;
        options.soft_cap.map_or(x, |cap| cap * (x / cap).tanh())
    };
    let row: Vec<f64> = row.iter().map(capped).collect();
    let lse = row.iter().map(|x| x.exp()).sum::<f64>().ln();
    let mean = row.iter().sum::<f64>() / row.len() as f64;
    (1.0 - options.label_smoothing) * (lse - row[target as usize])
        + options.label_smoothing * (lse - mean)
        + options.z_loss * lse * lse
}

fn slope(row: &[f64], at: usize, target: i64, options: &CrossEntropyOptions) -> f64 {
    let step = 1e-4;
    let moved = |by: f64| {
        let mut row = row.to_vec();
        row[at] += by;
        expected(&row, target, options)
    };
    (moved(step) - moved(-step)) / (2.0 * step)
}

fn assert_near(given: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(given.len(), expected.len(), "{what}");
    for (i, (given, expected)) in given.iter().zip(expected).enumerate() {
        let difference = (given - expected).abs();
        let bound = tolerance * (1.0 + expected.abs());
        assert!(difference <= bound, "{what} {i}: {given} {expected}");
    }
}

/// A tolerance where Burn multiplies: on CUDA it does so in TF32.
fn of_products(tolerance: f64, device: &Device) -> f64 {
    match format!("{device:?}").contains("Cuda") {
        true => 3e-3,
        false => tolerance,
    }
}

/// Losses and gradients of every shape, option and type, by the formula and its finite differences. Logits that
/// are held elsewhere stay what they are.
fn rows_have_the_loss_and_gradients_of_the_formula(device: &Device) {
    let device = device.clone().autodiff();
    for [rows, vocabulary] in SHAPES {
        for options in OPTIONS {
            for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 1e-3), (DType::BF16, 8e-3)]
            {
                if !burn_nf4::op::supports_dtype(&device, dtype)
                    || (rows > 1000 && options != PLAIN)
                {
                    continue;
                }
                let what = format!("{rows} {vocabulary} {options:?} {dtype:?}");
                let numbers = targets(rows, vocabulary, options.ignore_index);
                let logits = random([rows, vocabulary], &device).cast(dtype);
                let before = values(&logits);
                let logits = logits.detach().require_grad();
                let ids = ints(&numbers, DType::I32, &device);
                let losses = cross_entropy(logits.clone(), ids, &options).expect("it fits");
                assert_eq!((losses.dims(), losses.dtype()), ([rows], DType::F32));
                let wanted: Vec<f64> = before
                    .chunks(vocabulary)
                    .zip(&numbers)
                    .map(|(row, &target)| expected(row, target, &options))
                    .collect();
                assert_near(&values(&losses), &wanted, 1e-5, &what);

                let factors: Vec<f32> = (0..rows).map(|row| (row % 7) as f32 - 2.5).collect();
                let factors = Tensor::<1>::from_floats(&factors[..], &device);
                let of_factors = values(&factors);
                let gradients = (losses * factors).sum().backward();
                let given = values(&logits.grad(&gradients).expect("a gradient"));
                assert_eq!(values(&logits), before, "{what}");
                let some = (0..rows * vocabulary).step_by((rows * vocabulary).div_ceil(60));
                for i in some {
                    let (row, at) = (i / vocabulary, i % vocabulary);
                    let of_row = &before[row * vocabulary..][..vocabulary];
                    let wanted = of_factors[row] * slope(of_row, at, numbers[row], &options);
                    let what = format!("{what}: gradient {i}");
                    assert_near(&given[i..=i], &[wanted], tolerance, &what);
                }
            }
        }
    }
}

fn targets_may_be_of_32_or_64_bit(device: &Device) {
    let logits = random([4, 10], device);
    let numbers = [9, -100, 0, 3];
    let losses = [DType::I32, DType::I64].into_iter().filter_map(|dtype| {
        let usable = dtype == DType::I32 || burn_nf4::op::supports_dtype(device, dtype);
        let ids = usable.then(|| ints(&numbers, dtype, device))?;
        Some(values(
            &cross_entropy(logits.clone(), ids, &PLAIN).expect("it fits"),
        ))
    });
    let losses: Vec<_> = losses.collect();
    assert!(losses.iter().all(|loss| *loss == losses[0]), "{losses:?}");
}

/// Infinite and NaN logits act as in a softmax; those of ignored rows have no part in anything.
fn logits_that_are_not_finite_are_not_hidden(device: &Device) {
    let device = device.clone().autodiff();
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let logits = Tensor::<2>::from_floats(
        [
            [1.0, -inf, 0.5],
            [nan, 0.0, 1.0],
            [nan, inf, 0.0],
            [inf, 0.0, 0.0],
        ],
        &device,
    );
    let logits = logits.require_grad();
    let ids = ints(&[0, 1, -100, 1], DType::I32, &device);
    let losses = cross_entropy(logits.clone(), ids, &PLAIN).expect("it fits");
    let given = values(&losses);
    let wanted = (1.0f64.exp() + 0.5f64.exp()).ln() - 1.0;
    assert!((given[0] - wanted).abs() < 1e-6, "{given:?}");
    assert!(!given[1].is_finite() && !given[3].is_finite(), "{given:?}");
    assert_eq!(given[2], 0.0);
    let gradients = losses.sum().backward();
    let given = values(&logits.grad(&gradients).expect("a gradient"));
    assert_eq!(given[1], 0.0, "{given:?}");
    assert!(given[3].is_nan(), "{given:?}");
    assert_eq!(given[6..9], [0.0; 3]);
}

fn is_flex(device: &Device) -> bool {
    format!("{device:?}").contains("Flex")
}

fn unknown_targets_are_not_silent(device: &Device) {
    let device = device.clone().autodiff();
    for unknown in [-1, 10, i64::from(i32::MAX), i64::from(i32::MIN)] {
        let logits = random([3, 10], &device).require_grad();
        let ids = ints(&[4, unknown, -100], DType::I32, &device);
        let losses = cross_entropy(logits.clone(), ids, &PLAIN);
        if is_flex(&device) {
            let given = losses.expect_err("a target that no row has");
            let is_named = matches!(&given, Nf4Error::IdRange { tensor, index: 1, given, rows: 10 }
                if tensor == "targets" && *given == i128::from(unknown));
            assert!(is_named, "{given:?}");
            continue;
        }
        let losses = losses.expect("nobody looks");
        let given = values(&losses);
        assert!(
            given[0].is_finite() && given[1].is_nan() && given[2] == 0.0,
            "{given:?}"
        );
        let gradients = losses.sum().backward();
        let given = values(&logits.grad(&gradients).expect("a gradient"));
        assert!(given[10..20].iter().all(|x| x.is_nan()), "{given:?}");
        assert!(given[..10].iter().all(|x| x.is_finite()), "{given:?}");
    }
}

const HIDDEN: usize = 24;
const VOCABULARY: usize = 131;
const ROWS: usize = 11;
/// Of f32 logits: a row at a time, parts that do not divide the rows, all of them.
const CHUNKS: [usize; 4] = [0, 4 * VOCABULARY * 4, 6 * VOCABULARY * 4, 1 << 20];

fn options(chunk_bytes: usize, reduction: LossReduction) -> LinearCrossEntropyOptions {
    LinearCrossEntropyOptions {
        loss: OPTIONS[5],
        reduction,
        chunk_bytes,
    }
}

/// By Burn's own operations, in the type of `logits`.
fn composed(logits: Tensor<2>, targets: &[i64], options: &LinearCrossEntropyOptions) -> Tensor<1> {
    let device = logits.device();
    let [rows, vocabulary] = logits.dims();
    let loss = options.loss;
    let weight = |&target: &i64| f32::from(u8::from(target != i64::from(loss.ignore_index)));
    let weights: Vec<f32> = targets.iter().map(weight).collect();
    let count: f32 = weights.iter().sum();
    let weights = Tensor::<1>::from_floats(&weights[..], &device);
    let inside: Vec<i64> = targets.iter().map(|&target| target.max(0)).collect();
    let ids = ints(&inside, DType::I32, &device).reshape([rows, 1]);
    let logits = logits * loss.logit_scale;
    let logits = match loss.soft_cap {
        Some(cap) => (logits / cap).tanh() * cap,
        None => logits,
    };
    let log = log_softmax(logits.clone(), 1);
    let lse = (logits - log.clone()).mean_dim(1);
    let of_target = -log.clone().gather(1, ids);
    let spread = -log.sum_dim(1) / vocabulary as f64;
    let losses = of_target * (1.0 - loss.label_smoothing)
        + spread * loss.label_smoothing
        + lse.square() * loss.z_loss;
    let sum = (losses.reshape([rows]) * weights).sum();
    match options.reduction {
        LossReduction::Sum => sum,
        LossReduction::Mean => sum / count,
    }
}

/// The gradient of a tensor that both computed.
fn assert_same<const D: usize>(tensor: &Tensor<D>, [ours, theirs]: [&Gradients; 2], what: &str) {
    let [ours, theirs] = [ours, theirs].map(|gradients| tensor.grad(gradients));
    let theirs = values(&theirs.expect(what));
    assert!(theirs.iter().any(|x| x.abs() > 1e-4), "{what}: nothing");
    let tolerance = of_products(2e-5, &tensor.device());
    assert_near(&values(&ours.expect(what)), &theirs, tolerance, what);
}

fn trained<const D: usize>(shape: [usize; D], is_trained: bool, device: &Device) -> Tensor<D> {
    let tensor = random(shape, device) * 0.3;
    let tensor = tensor.detach();
    match is_trained {
        true => tensor.require_grad(),
        false => tensor,
    }
}

/// Whatever is trained, however the rows are cut up, and whatever gradient comes.
fn a_linear_map_has_the_loss_of_its_logits(device: &Device) {
    let device = device.clone().autodiff();
    let numbers = targets(ROWS, VOCABULARY, OPTIONS[5].ignore_index);
    let (sum, mean) = (LossReduction::Sum, LossReduction::Mean);
    for ([of_x, of_weight, of_bias], chunk_bytes, reduction) in [
        ([true, true, true], CHUNKS[0], sum),
        ([true, true, true], CHUNKS[1], mean),
        ([true, true, true], CHUNKS[2], sum),
        ([true, true, true], CHUNKS[3], mean),
        ([true, false, false], CHUNKS[1], mean),
        ([false, true, false], CHUNKS[1], sum),
        ([false, false, true], CHUNKS[1], mean),
    ] {
        let what = format!("{of_x} {of_weight} {of_bias} {chunk_bytes} {reduction:?}");
        let options = options(chunk_bytes, reduction);
        let x = trained([ROWS, HIDDEN], of_x, &device);
        let weight = trained([VOCABULARY, HIDDEN], of_weight, &device);
        let bias = trained([VOCABULARY], of_bias, &device);
        let ids = ints(&numbers, DType::I32, &device);
        let with_bias = Some(bias.clone());
        let ours = linear_cross_entropy(x.clone(), weight.clone(), with_bias, ids, &options);
        let ours = ours.expect("it fits");
        assert_eq!((ours.dims(), ours.dtype()), ([1], DType::F32));
        let logits = x.clone().matmul(weight.clone().transpose());
        let theirs = composed(logits + bias.clone().unsqueeze(), &numbers, &options);
        let tolerance = of_products(1e-5, &device);
        assert_near(&values(&ours), &values(&theirs), tolerance, &what);
        let both = [ours, theirs].map(|loss| (loss * 0.7).backward());
        let both = both.each_ref();
        for (is_trained, matrix) in [(of_x, &x), (of_weight, &weight)] {
            if is_trained {
                assert_same(matrix, both, &what);
            }
        }
        if of_bias {
            assert_same(&bias, both, &what);
        }
    }
}

/// The table of a tied head takes part in what goes before, too.
fn a_tied_table_has_both_gradients(device: &Device) {
    let device = device.clone().autodiff();
    let numbers = targets(ROWS, VOCABULARY, -100);
    let options = LinearCrossEntropyOptions {
        chunk_bytes: CHUNKS[1],
        ..Default::default()
    };
    let table = trained([VOCABULARY, HIDDEN], true, &device);
    let hidden = || {
        let ids: Vec<i64> = (0..ROWS as i64).collect();
        table
            .clone()
            .select(0, ints(&ids, DType::I32, &device))
            .tanh()
    };
    let ids = ints(&numbers, DType::I32, &device);
    let ours = linear_cross_entropy(hidden(), table.clone(), None, ids, &options);
    let theirs = composed(
        hidden().matmul(table.clone().transpose()),
        &numbers,
        &options,
    );
    let both = [ours.expect("it fits"), theirs].map(|loss| loss.backward());
    assert_same(&table, both.each_ref(), "table");
}

fn without_a_graph_there_is_only_the_loss(device: &Device) {
    let numbers = targets(ROWS, VOCABULARY, OPTIONS[5].ignore_index);
    let options = options(CHUNKS[1], LossReduction::Mean);
    let x = random([ROWS, HIDDEN], device) * 0.3;
    let weight = random([VOCABULARY, HIDDEN], device) * 0.3;
    let theirs = composed(
        x.clone().matmul(weight.clone().transpose()),
        &numbers,
        &options,
    );
    for with_graphs in [false, true] {
        let [x, weight] = [&x, &weight].map(|tensor| match with_graphs {
            false => tensor.clone(),
            true => tensor.clone().autodiff(),
        });
        let ids = ints(&numbers, DType::I32, device);
        let ours = linear_cross_entropy(x, weight, None, ids, &options).expect("it fits");
        assert!(!ours.is_tracked());
        let tolerance = of_products(1e-5, device);
        assert_near(&values(&ours), &values(&theirs), tolerance, "loss");
    }
}

/// As PyTorch: a sum of zero, no mean, and gradients of zeros.
fn without_a_target_there_is_no_mean(device: &Device) {
    let device = device.clone().autodiff();
    for rows in [0, 3] {
        for reduction in [LossReduction::Sum, LossReduction::Mean] {
            let options = LinearCrossEntropyOptions {
                reduction,
                ..Default::default()
            };
            let x = Tensor::<2>::ones([rows, HIDDEN], &device).require_grad();
            let weight = trained([VOCABULARY, HIDDEN], true, &device);
            let ids = Tensor::full([rows], -100, (&device, DType::I32));
            let loss = linear_cross_entropy(x.clone(), weight.clone(), None, ids, &options);
            let loss = loss.expect("it fits");
            let value = values(&loss)[0];
            match reduction {
                LossReduction::Sum => assert_eq!(value, 0.0),
                LossReduction::Mean => assert!(value.is_nan(), "{value}"),
            }
            let gradients = loss.backward();
            let of_weight = values(&weight.grad(&gradients).expect("a gradient"));
            assert!(of_weight.iter().all(|&x| x == 0.0), "{rows} {reduction:?}");
            let of_x = x.grad(&gradients).expect("a gradient");
            assert_eq!(of_x.dims(), [rows, HIDDEN]);
            assert!(rows == 0 || values(&of_x).iter().all(|&x| x == 0.0));
        }
    }
}

/// A head in a form, and what of it is trained.
#[derive(Debug, Clone, Copy)]
enum Form {
    Dense,
    Trained,
    Nf4,
    Lora,
    Dora,
    QLora,
    BurnLora,
}

const FORMS: [Form; 7] = [
    Form::Dense,
    Form::Trained,
    Form::Nf4,
    Form::Lora,
    Form::Dora,
    Form::QLora,
    Form::BurnLora,
];

fn head(form: Form, device: &Device) -> AnyLinear {
    let linear = LinearConfig::new(HIDDEN, VOCABULARY).init(device);
    let lora = QLoraLinearConfig::new(4);
    let branched = |head: AnyLinear, lora: &QLoraLinearConfig| {
        let mut head = head.with_lora(lora, device).expect("a branch");
        // Not the zeros that a branch begins with.
        let b = |b: Param<Tensor<2>>| b.map(|b| (b + 0.1).detach().require_grad());
        head = match head {
            AnyLinear::Lora(mut layer) => {
                layer.lora_b = b(layer.lora_b);
                AnyLinear::Lora(layer)
            }
            AnyLinear::QLora(mut layer) => {
                layer.lora_b = b(layer.lora_b);
                AnyLinear::QLora(layer)
            }
            other => other,
        };
        head
    };
    let quantized = |linear: Linear| {
        let head = AnyLinear::from(linear.no_grad());
        head.quantize(QuantConfig::default()).expect("a weight")
    };
    match form {
        Form::Dense => AnyLinear::from(linear.no_grad()),
        Form::Trained => linear.into(),
        Form::Nf4 => quantized(linear),
        Form::Lora => branched(linear.into(), &lora),
        Form::Dora => branched(linear.into(), &lora.with_use_dora(true)),
        Form::QLora => branched(quantized(linear), &lora),
        Form::BurnLora => AnyLinear::from(linear).apply_lora(Lora::new(2, 4.0)),
    }
}

/// The gradients of all trained parameters of a head, in the order that Burn visits them in.
fn gradients_of(head: &AnyLinear, gradients: &Gradients) -> Vec<Option<Vec<f64>>> {
    struct Visitor<'a>(&'a Gradients, Vec<Option<Vec<f64>>>);

    impl burn::module::ModuleVisitor for Visitor<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let tensor = param.val();
            if tensor.is_require_grad() {
                self.1.push(tensor.grad(self.0).as_ref().map(values));
            }
        }
    }

    let mut visitor = Visitor(gradients, Vec::new());
    head.visit(&mut visitor);
    visitor.1
}

fn heads_of_every_form_have_the_loss_of_their_logits(device: &Device) {
    let device = device.clone().autodiff();
    let numbers = targets(ROWS, VOCABULARY, OPTIONS[5].ignore_index);
    for form in FORMS {
        let head = head(form, &device);
        for chunk_bytes in [CHUNKS[1], CHUNKS[3]] {
            let what = format!("{form:?} {chunk_bytes}");
            let options = options(chunk_bytes, LossReduction::Mean);
            let x = trained([ROWS, HIDDEN], true, &device);
            let ids = ints(&numbers, DType::I32, &device);
            let ours = nn::linear_cross_entropy(&head, x.clone(), ids, &options);
            let ours = ours.expect("it fits");
            let theirs = composed(head.forward(x.clone()), &numbers, &options);
            let tolerance = of_products(1e-5, &device);
            assert_near(&values(&ours), &values(&theirs), tolerance, &what);
            let both = [ours, theirs].map(|loss| loss.backward());
            let both = both.each_ref();
            assert_same(&x, both, &what);
            let [ours, theirs] = both.map(|gradients| gradients_of(&head, gradients));
            let is_frozen = matches!(form, Form::Dense | Form::Nf4);
            assert_eq!(theirs.is_empty(), is_frozen, "{what}");
            assert_eq!(ours.len(), theirs.len(), "{what}");
            for (ours, theirs) in ours.iter().zip(&theirs) {
                let (ours, theirs) = (ours.as_ref().expect(&what), theirs.as_ref().expect(&what));
                assert_near(ours, theirs, of_products(2e-5, &device), &what);
            }
        }
    }
}

/// In 16 bit: the loss of the rounded logits, and gradients of the type of their tensors.
fn types_of_16_bit_stay_what_they_are(device: &Device) {
    let device = device.clone().autodiff();
    let numbers = targets(ROWS, VOCABULARY, OPTIONS[5].ignore_index);
    for (dtype, tolerance) in [(DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        if !burn_nf4::op::supports_dtype(&device, dtype) {
            continue;
        }
        let options = options(CHUNKS[1] / 2, LossReduction::Mean);
        let x = trained([ROWS, HIDDEN], false, &device).cast(dtype);
        let weight = trained([VOCABULARY, HIDDEN], false, &device).cast(dtype);
        let (x, weight) = (x.detach().require_grad(), weight.detach().require_grad());
        let ids = ints(&numbers, DType::I32, &device);
        let ours = linear_cross_entropy(x.clone(), weight.clone(), None, ids, &options);
        let ours = ours.expect("it fits");
        let wide = [&x, &weight].map(|tensor| tensor.clone().cast(DType::F32));
        let [wide_x, wide_weight] = wide;
        let theirs = composed(wide_x.matmul(wide_weight.transpose()), &numbers, &options);
        assert_near(&values(&ours), &values(&theirs), tolerance, "loss");
        let both = [ours, theirs].map(|loss| loss.backward());
        for tensor in [&x, &weight] {
            let [ours, theirs] = both
                .each_ref()
                .map(|grads| tensor.grad(grads).expect("one"));
            assert_eq!(ours.dtype(), dtype);
            assert_near(&values(&ours), &values(&theirs), tolerance, "gradient");
        }
        // A head of 16 bit for rows of f32 has its exact values.
        let x = x.detach().cast(DType::F32);
        let ids = ints(&numbers, DType::I32, &device);
        let ours = linear_cross_entropy(x.clone(), weight.clone(), None, ids, &options);
        let wide = weight.cast(DType::F32);
        let theirs = composed(x.matmul(wide.transpose()), &numbers, &options);
        assert_near(
            &values(&ours.expect("it fits")),
            &values(&theirs),
            1e-5,
            "mixed",
        );
    }
}

fn what_does_not_fit_is_named(device: &Device) {
    let logits = || random([3, 8], device);
    let ids = |count: usize| ints(&vec![1; count], DType::I32, device);
    let named = |given: Result<Tensor<1>, Nf4Error>, name: &str| {
        let error = given.map(|loss| loss.dims()).expect_err(name);
        assert!(error.to_string().contains(name), "{name}: {error}");
    };
    named(cross_entropy(logits(), ids(4), &PLAIN), "targets");
    named(
        cross_entropy(logits().cast(DType::F64), ids(3), &PLAIN),
        "logits",
    );
    let small = ints(&[1, 1, 1], DType::I16, device);
    named(cross_entropy(logits(), small, &PLAIN), "targets");
    let none = Tensor::<2>::zeros([3, 0], device);
    named(cross_entropy(none, ids(3), &PLAIN), "logits");
    for (name, options) in [
        (
            "label_smoothing",
            CrossEntropyOptions {
                label_smoothing: 1.5,
                ..PLAIN
            },
        ),
        (
            "label_smoothing",
            CrossEntropyOptions {
                label_smoothing: f64::NAN,
                ..PLAIN
            },
        ),
        (
            "z_loss",
            CrossEntropyOptions {
                z_loss: -1.0,
                ..PLAIN
            },
        ),
        (
            "soft_cap",
            CrossEntropyOptions {
                soft_cap: Some(0.0),
                ..PLAIN
            },
        ),
        (
            "soft_cap",
            CrossEntropyOptions {
                soft_cap: Some(1e300),
                ..PLAIN
            },
        ),
        (
            "logit_scale",
            CrossEntropyOptions {
                logit_scale: f64::INFINITY,
                ..PLAIN
            },
        ),
    ] {
        named(cross_entropy(logits(), ids(3), &options), name);
    }
    let options = LinearCrossEntropyOptions::default();
    let x = || random([3, 4], device);
    let weight = || random([8, 4], device);
    let linear = |x, weight, bias, ids| linear_cross_entropy(x, weight, bias, ids, &options);
    named(linear(x(), random([8, 5], device), None, ids(3)), "weight");
    named(
        linear(x().cast(DType::F16), weight(), None, ids(3)),
        "weight",
    );
    named(
        linear(x(), weight(), Some(random([7], device)), ids(3)),
        "bias",
    );
    let bias = random([8], device).cast(DType::F16);
    named(linear(x(), weight(), Some(bias), ids(3)), "bias");
    named(linear(x(), weight(), None, ids(2)), "targets");
    let head = AnyLinear::from_weight(weight(), None);
    let of_head = |x: Tensor<2>| nn::linear_cross_entropy(&head, x, ids(3), &options);
    named(of_head(random([3, 5], device)), "x");
    named(of_head(x().cast(DType::F16)), "x");
}

macro_rules! device_tests {
    ($module:ident, $device:expr, $($test:ident),*) => {
        mod $module {
            use super::*;
            $(
                #[test]
                fn $test() {
                    super::$test(&$device);
                }
            )*
        }
    };
    ($module:ident, $device:expr) => {
        device_tests!(
            $module,
            $device,
            rows_have_the_loss_and_gradients_of_the_formula,
            targets_may_be_of_32_or_64_bit,
            logits_that_are_not_finite_are_not_hidden,
            unknown_targets_are_not_silent,
            a_linear_map_has_the_loss_of_its_logits,
            a_tied_table_has_both_gradients,
            without_a_graph_there_is_only_the_loss,
            without_a_target_there_is_no_mean,
            heads_of_every_form_have_the_loss_of_their_logits,
            types_of_16_bit_stay_what_they_are,
            what_does_not_fit_is_named
        );
    };
}

device_tests!(flex, Device::flex());
#[cfg(feature = "wgpu")]
device_tests!(wgpu, Device::wgpu(Default::default()));
#[cfg(feature = "cpu")]
device_tests!(cpu, Device::cpu());
#[cfg(feature = "cuda")]
device_tests!(cuda, Device::cuda(0));
