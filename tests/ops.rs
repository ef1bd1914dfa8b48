//! The functions over Burn tensors, on every device that is compiled in: golden files, the
//! reference and a dense matrix product. A device that is compiled in but missing fails its tests.
//!
//! With the feature `fusion` the CubeCL devices run everything here through `Fusion`.
#![cfg(feature = "checkpoint")]

mod golden;
mod tensors;

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Tensor};
use burn_nf4::format::{
    BlockSize, BlockTensor, FloatElement, FloatType, PackedLayout, QuantConfig, QuantType,
};
use burn_nf4::op::{
    DequantizeSpec, LinearSpec, LowRank, MatmulOptions, MatmulSpec, MatmulStrategy, QuantBackend,
    is_reproducible, linear_with, lora_linear, matmul, set_reproducible,
};
use burn_nf4::{BlockWeight, Nf4Error, linear};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use rstest::rstest;
use tensors::*;

/// Two runs of the same product: autotune may give them different kernels, CUDA's may use TF32.
fn assert_same_product(got: &Tensor<2>, expected: &Tensor<2>) {
    assert_near(&values(got), &values(expected), 1.0 / 256.0, "y");
}

fn supports(device: &Device, dtype: FloatType) -> bool {
    burn_nf4::op::supports_dtype(device, DType::from(dtype))
}

/// The words that a device holds.
fn words(weight: &BlockWeight) -> Vec<u32> {
    let data = weight.packed().into_data();
    assert_eq!(data.dtype(), DType::U32);
    data.iter::<u32>().collect()
}

#[track_caller]
fn assert_same_words(got: &[u32], expected: &[u32], what: &str) {
    let (got, expected) = (bytemuck::cast_slice(got), bytemuck::cast_slice(expected));
    assert_same_bits(got, expected, what);
}

/// The reference's packing of values rounded to a dtype.
fn reference(values: &[f32], shape: &[usize], dtype: FloatType, quant: QuantConfig) -> BlockTensor {
    fn quantize<T: FloatElement>(v: &[f32], shape: &[usize], quant: QuantConfig) -> BlockTensor {
        let values: Vec<T> = v.iter().map(|&v| T::from_f32(v)).collect();
        BlockTensor::quantize(&values, shape, quant).expect("valid")
    }
    match dtype {
        FloatType::F16 => quantize::<f16>(values, shape, quant),
        FloatType::BF16 => quantize::<bf16>(values, shape, quant),
        FloatType::F32 => quantize::<f32>(values, shape, quant),
    }
}

fn reference_bits(tensor: &BlockTensor, dtype: FloatType, start: usize, len: usize) -> Vec<u8> {
    fn bits<T: FloatElement>(tensor: &BlockTensor, start: usize, len: usize) -> Vec<u8> {
        bytemuck::cast_slice(&tensor.dequantize_range::<T>(start, len)).to_vec()
    }
    match dtype {
        FloatType::F16 => bits::<f16>(tensor, start, len),
        FloatType::BF16 => bits::<bf16>(tensor, start, len),
        FloatType::F32 => bits::<f32>(tensor, start, len),
    }
}

/// The bits of the whole decoded weight, whatever its rank.
fn dequantized(weight: &BlockWeight, dtype: FloatType) -> Result<Vec<u8>, Nf4Error> {
    fn read<const D: usize>(weight: &BlockWeight, dtype: FloatType) -> Result<Vec<u8>, Nf4Error> {
        let tensor = weight.dequantize::<D>(dtype)?;
        assert_eq!(tensor.dims().as_slice(), weight.shape());
        Ok(bits(tensor, dtype))
    }
    match weight.shape().len() {
        1 => read::<1>(weight, dtype),
        2 => read::<2>(weight, dtype),
        3 => read::<3>(weight, dtype),
        rank => panic!("rank {rank}"),
    }
}

fn quantize_bytes(
    bytes: Vec<u8>,
    shape: &[usize],
    dtype: FloatType,
    quant: QuantConfig,
    device: &Device,
) -> Result<BlockWeight, Nf4Error> {
    match *shape {
        [a] => BlockWeight::quantize(from_bytes(bytes, [a], dtype, device), quant),
        [a, b] => BlockWeight::quantize(from_bytes(bytes, [a, b], dtype, device), quant),
        [a, b, c] => BlockWeight::quantize(from_bytes(bytes, [a, b, c], dtype, device), quant),
        _ => panic!("{shape:?}"),
    }
}

fn golden_files_decode_to_the_bits_of_bitsandbytes(device: &Device) {
    let cases = golden::names();
    assert_eq!(cases.len(), 29);
    for name in cases {
        let case = golden::load(&name);
        let dtype = case.tensor.dtype();
        let weight = BlockWeight::from_host(&case.tensor, device);
        assert_eq!(weight.shape(), case.tensor.shape(), "{name}");
        assert_eq!(weight.dtype(), dtype, "{name}");
        assert_eq!(weight.config(), case.tensor.config(), "{name}");
        match dequantized(&weight, dtype) {
            Ok(got) => {
                assert!(supports(device, dtype), "{name}");
                assert_same_bits(&got, case.dequantized_bytes(), &name);
            }
            Err(error) => {
                assert!(!supports(device, dtype), "{name}: {error}");
                assert!(matches!(error, Nf4Error::DeviceDtype { .. }), "{error}");
            }
        }
    }
}

fn golden_files_come_back_from_the_device_as_they_were(device: &Device) {
    for name in golden::names() {
        let tensor = golden::load(&name).tensor;
        let weight = BlockWeight::from_host(&tensor, device);
        assert_eq!(weight.size_bytes(), tensor.packed_layout().words() * 4);
        let back = weight.to_host().expect("its own header");
        assert_same_words(&back.to_packed(), &tensor.to_packed(), &name);
        assert_eq!(back, tensor, "{name}");
    }
}

fn golden_sources_quantize_to_the_words_of_the_reference(device: &Device) {
    for name in golden::names() {
        let case = golden::load(&name);
        let dtype = case.tensor.dtype();
        if lacks(device, dtype.into()) {
            continue;
        }
        let source = case.source_f32();
        let (shape, quant) = (case.tensor.shape(), case.tensor.config());
        let expected = reference(&source, shape, dtype, quant);
        let weight = quantize_bytes(bytes(&source, dtype), shape, dtype, quant, device)
            .expect("finite values");
        let got = weight.to_host().expect("its own header");
        assert_same_words(&got.to_packed(), &expected.to_packed(), &name);
    }
}

fn rows_are_slices_of_the_whole(device: &Device) {
    // Rows that end within a block, a word and a byte; rows shorter than a block; aligned rows.
    for (shape, block) in [
        ([17, 33], 64),
        ([40, 9], 32),
        ([12, 128], 64),
        ([7, 300], 256),
    ] {
        let [rows, columns] = shape;
        let quant = config(QuantType::Nf4, block, true);
        let host = reference(&weights(rows * columns, 5), &shape, FloatType::F32, quant);
        let weight = BlockWeight::from_host(&host, device);
        for dtype in FloatType::ALL {
            if !supports(device, dtype) {
                let error = weight.dequantize_rows(0..1, dtype).unwrap_err();
                assert!(matches!(error, Nf4Error::DeviceDtype { .. }), "{error}");
                continue;
            }
            let whole = dequantized(&weight, dtype).expect("supported");
            let row = columns * dtype.size_bytes();
            for range in [0..rows, 0..1, 1..2, 3..rows, rows - 1..rows] {
                let what = format!("{shape:?} {range:?} {dtype:?}");
                let got = weight.dequantize_rows(range.clone(), dtype).expect(&what);
                assert_eq!(got.dims(), [range.len(), columns], "{what}");
                let expected = &whole[range.start * row..range.end * row];
                assert_same_bits(&bits(got, dtype), expected, &what);
            }
        }
    }
}

/// Views of a larger tensor, each as a tensor and as the values that it shows.
fn views(device: &Device) -> Vec<(&'static str, Tensor<2>, Vec<f32>)> {
    let base = weights(48 * 72, 9);
    let on_device = || tensor::<2>(&base, [48, 72], FloatType::F32, device);
    let at = |row: usize, column: usize| base[row * 72 + column];
    let collect = |rows: usize, columns: usize, value: &dyn Fn(usize, usize) -> f32| {
        (0..rows * columns)
            .map(|i| value(i / columns, i % columns))
            .collect::<Vec<f32>>()
    };
    vec![
        (
            "transposed",
            on_device().transpose(),
            collect(72, 48, &|r, c| at(c, r)),
        ),
        (
            "rows cut out",
            on_device().slice([5..20, 0..72]),
            collect(15, 72, &|r, c| at(r + 5, c)),
        ),
        (
            "columns cut out",
            on_device().slice([0..48, 3..40]),
            collect(48, 37, &|r, c| at(r, c + 3)),
        ),
        (
            "a row for all rows",
            on_device().slice([7..8, 0..72]).expand([20, 72]),
            collect(20, 72, &|_, c| at(7, c)),
        ),
        (
            "a part, transposed",
            on_device().slice([1..48, 2..67]).transpose(),
            collect(65, 47, &|r, c| at(c + 1, r + 2)),
        ),
    ]
}

fn quantize_takes_views(device: &Device) {
    let quant = config(QuantType::Nf4, 64, true);
    for (what, view, values) in views(device) {
        let shape = view.dims();
        let weight = BlockWeight::quantize(view, quant).expect("valid");
        let expected = reference(&values, &shape, FloatType::F32, quant);
        assert_same_words(&words(&weight), &expected.to_packed(), what);
    }
}

fn linear_takes_views(device: &Device) {
    // Every other one: CubeCL tunes the product of each anew.
    for (what, view, values) in views(device).into_iter().step_by(2) {
        let [m, k] = view.dims();
        let n = 24;
        let host = reference(
            &weights(n * k, 4),
            &[n, k],
            FloatType::F32,
            QuantConfig::default(),
        );
        let weight = BlockWeight::from_host(&host, device);
        let x: Vec<f64> = values.iter().map(|&v| v.into()).collect();
        let w: Vec<f64> = host.dequantize::<f32>().iter().map(|&v| v.into()).collect();
        let expected = dense_linear(&x, &w, &[], [m, k, n], FloatType::F32);
        let y = linear(view, &weight, None).expect("valid");
        assert_eq!(y.dims(), [m, n], "{what}");
        assert_close(&self::values(&y), &expected, what);
    }
}

/// A product with the dense, decoded weight: the same dtype, computed in f64.
fn linear_is_a_product_with_the_decoded_weight(device: &Device, dtype: FloatType) {
    if lacks(device, dtype.into()) {
        return;
    }
    for [m, k, n] in [[5, 96, 40], [1, 70, 33], [33, 64, 1], [16, 128, 64]] {
        let host = reference(&weights(n * k, 6), &[n, k], dtype, QuantConfig::default());
        let weight = BlockWeight::from_host(&host, device);
        let x: Tensor<2> = tensor(&uniform(m * k, 2), [m, k], dtype, device);
        let bias: Tensor<1> = tensor(&uniform(n, 8), [n], dtype, device);
        let w = values(&weight.dequantize::<2>(dtype).expect("supported"));
        let what = format!("{m}x{k}x{n} {dtype:?}");

        let expected = dense_linear(&values(&x), &w, &[], [m, k, n], dtype);
        let y = linear(x.clone(), &weight, None).expect("valid");
        assert_eq!((y.dims(), y.dtype()), ([m, n], dtype.into()), "{what}");
        assert_close(&values(&y), &expected, &what);

        let expected = dense_linear(&values(&x), &w, &values(&bias), [m, k, n], dtype);
        let y = linear(x, &weight, Some(bias)).expect("valid");
        assert_close(&values(&y), &expected, &format!("{what} with bias"));
    }
}

fn linear_keeps_the_leading_dimensions(device: &Device) {
    let [m, k, n] = [12, 64, 10];
    let host = reference(
        &weights(n * k, 6),
        &[n, k],
        FloatType::F32,
        QuantConfig::default(),
    );
    let weight = BlockWeight::from_host(&host, device);
    let bias: Tensor<1> = tensor(&uniform(n, 8), [n], FloatType::F32, device);
    let x: Tensor<2> = tensor(&uniform(m * k, 2), [m, k], FloatType::F32, device);
    let w = values(&weight.dequantize::<2>(FloatType::F32).expect("f32"));
    let expected = dense_linear(&values(&x), &w, &values(&bias), [m, k, n], FloatType::F32);

    fn check<const D: usize>(
        x: Tensor<D>,
        weight: &BlockWeight,
        bias: &Tensor<1>,
        expected: &[(f64, f64)],
    ) {
        let mut shape = x.dims();
        shape[D - 1] = bias.dims()[0];
        let y = linear(x, weight, Some(bias.clone())).expect("valid");
        assert_eq!(y.dims(), shape);
        assert_close(&values(&y), expected, &format!("rank {D}"));
    }
    let first = x.clone().slice([0..1, 0..k]).reshape([k]);
    check(first, &weight, &bias, &expected[..n]);
    check(x.clone(), &weight, &bias, &expected);
    check(x.clone().reshape([3, 4, k]), &weight, &bias, &expected);
    check(x.reshape([2, 3, 2, k]), &weight, &bias, &expected);
}

/// An empty batch is a batch: it gives an empty result, not an error, and gradients of zeros.
fn linear_maps_an_empty_batch_to_an_empty_batch(device: &Device) {
    let quant = QuantConfig::default();
    let weight = BlockWeight::zeros(&[10, 64], quant, FloatType::F32, device).expect("valid");
    let bias: Tensor<1> = Tensor::ones([10], (device, DType::F32));
    let x = Tensor::<2>::zeros([0, 64], (device, DType::F32));
    let y = linear(x, &weight, Some(bias)).expect("valid");
    assert_eq!(y.dims(), [0, 10]);
    assert_eq!(y.into_data().num_elements(), 0);
    let x = Tensor::<3>::zeros([2, 0, 64], (device, DType::F32));
    assert_eq!(linear(x, &weight, None).expect("valid").dims(), [2, 0, 10]);

    let options = &device.clone().autodiff();
    let ones = |shape: [usize; 2]| Tensor::<2>::ones(shape, (options, DType::F32)).require_grad();
    let x = Tensor::<3>::zeros([2, 0, 64], (options, DType::F32)).require_grad();
    let bias = Tensor::<1>::ones([10], (options, DType::F32)).require_grad();
    let (a, b) = (ones([64, 3]), ones([3, 10]));
    let branch = LowRank {
        a: a.clone(),
        b: b.clone(),
        scale: 2.0,
    };
    let strategy = MatmulStrategy::Auto;
    let y = lora_linear(x.clone(), &weight, Some(bias.clone()), branch, strategy).expect("valid");
    assert_eq!(y.dims(), [2, 0, 10]);
    // A loss that other rows have a part in, too.
    let grads = (y.sum() + a.clone().sum() * 0.5).backward();
    assert_eq!(x.grad(&grads).expect("x has a gradient").dims(), [2, 0, 64]);
    assert_eq!(values(&bias.grad(&grads).expect("a bias")), [0.0; 10]);
    assert_eq!(values(&a.grad(&grads).expect("A")), [0.5; 64 * 3]);
    assert_eq!(values(&b.grad(&grads).expect("B")), [0.0; 30]);

    // As in a batch with rows, only some of them need a graph.
    let x = Tensor::<2>::zeros([0, 64], (device, DType::F32));
    let y = linear(x, &weight, Some(bias.clone())).expect("valid");
    let grads = y.sum().backward();
    assert_eq!(values(&bias.grad(&grads).expect("a bias")), [0.0; 10]);
}

/// Sizes whose product overflows are not taken for those of a weight of as many elements as are left.
#[test]
fn a_product_of_more_elements_than_can_be_counted_is_none() {
    let (rows, columns) = (1 << 33, (1 << 31) + 1);
    let linear = LinearSpec {
        weight: DequantizeSpec {
            layout: PackedLayout::new(rows * (columns - (1 << 31)), QuantConfig::default()),
            rows,
            columns,
            start: 0,
            dtype: FloatType::F32,
        },
        strategy: MatmulStrategy::Auto,
        cublaslt: false,
    };
    assert_eq!(MatmulSpec::of(linear, 1), None);
}

/// What goes into a product is of one type: nothing is cast in silence, and nothing panics.
fn mixed_dtypes_are_refused(device: &Device) {
    let quant = QuantConfig::default();
    let weight = BlockWeight::zeros(&[10, 64], quant, FloatType::F32, device).expect("valid");
    if lacks(device, DType::F16) {
        return;
    }
    let dtype = |tensor: &str, expected: &str, given: &str| Nf4Error::Dtype {
        tensor: tensor.into(),
        expected: expected.into(),
        given: given.into(),
    };
    for device in [device.clone(), device.clone().autodiff()] {
        let ones = |shape: [usize; 2], dtype| Tensor::<2>::ones(shape, (&device, dtype));
        let x = ones([3, 64], DType::F16);
        let bias = Tensor::<1>::ones([10], (&device, DType::F32));
        let error = linear(x.clone(), &weight, Some(bias)).unwrap_err();
        assert_eq!(error, dtype("bias", "F16 as x", "F32"));
        let branch = LowRank {
            a: ones([64, 4], DType::F32),
            b: ones([4, 10], DType::F16),
            scale: 1.0,
        };
        let error = lora_linear(x, &weight, None, branch, MatmulStrategy::Auto).unwrap_err();
        assert_eq!(error, dtype("lora_b", "F32 as lora_a", "F16"));
    }
}

/// A mean of scales whose sum overflows f32 is a finite number, the same on every device.
fn scales_whose_sum_overflows_have_a_finite_mean(device: &Device) {
    let quant = QuantConfig::default();
    for (rows, magnitude) in [(2, 3e38), (2, f32::MAX), (1000, 1e36), (6, -8e37)] {
        let source: Vec<f32> = uniform(rows * 64, 3)
            .into_iter()
            .enumerate()
            .map(|(i, u)| if i % 5 == 0 { magnitude } else { u * magnitude })
            .collect();
        let dense: Tensor<2> = tensor(&source, [rows, 64], FloatType::F32, device);
        let weight = BlockWeight::quantize(dense, quant).expect("finite values");
        let expected = reference(&source, &[rows, 64], FloatType::F32, quant);
        assert_same_words(&words(&weight), &expected.to_packed(), "quantized");
        let back = values(&weight.dequantize::<2>(FloatType::F32).expect("f32"));
        for (back, value) in back.iter().zip(&source) {
            assert!(back.is_finite());
            // As in bitsandbytes, the reciprocal of a larger scale is flushed to zero.
            if magnitude.abs() < 2f32.powi(126) {
                let error = (back - f64::from(*value)).abs() / f64::from(magnitude).abs();
                assert!(error < 0.17, "{back} for {value}");
            }
        }
    }
}

/// The process can be told not to measure: the choice then follows from the sizes alone.
fn reproducible_products_are_those_of_the_rule(device: &Device) {
    let [m, k, n] = [9, 256, 96];
    let host = reference(
        &weights(n * k, 6),
        &[n, k],
        FloatType::F32,
        QuantConfig::default(),
    );
    let weight = BlockWeight::from_host(&host, device);
    let x: Tensor<2> = tensor(&uniform(m * k, 2), [m, k], FloatType::F32, device);
    let run = |strategy| {
        let y = linear_with(x.clone(), &weight, None, strategy).expect("valid");
        bits(y, FloatType::F32)
    };
    set_reproducible(true);
    assert!(is_reproducible());
    let (auto, rule) = (run(MatmulStrategy::Auto), run(MatmulStrategy::Rule));
    set_reproducible(false);
    assert!(!is_reproducible());
    assert_same_bits(&auto, &rule, "y");
}

/// CubeCL's Flex32 is f32 in memory with relaxed arithmetic; no other device has it.
fn relaxed_floats_count_as_f32(device: &Device) {
    if lacks(device, DType::Flex32) {
        return;
    }
    // With fusion Burn's CUDA kernel of that cast does not compile.
    let probe = Tensor::<2>::ones([4, 4], (device, DType::F32));
    if let Err(error) = probe.cast(DType::Flex32).try_to_data() {
        assert!(is_cuda(device), "{error}");
        skip("Burn's own cast to Flex32 does not compile");
        return;
    }
    let quant = QuantConfig::default();
    let source = weights(640, 1);
    let dense: Tensor<2> = tensor(&source, [10, 64], FloatType::F32, device);
    let weight = BlockWeight::quantize(dense.cast(DType::Flex32), quant).expect("valid");
    let expected = reference(&source, &[10, 64], FloatType::F32, quant);
    assert_same_words(&words(&weight), &expected.to_packed(), "quantized");
    let x: Tensor<2> = tensor(&uniform(128, 2), [2, 64], FloatType::F32, device);
    let plain = linear(x.clone(), &weight, None).expect("valid");
    let relaxed = linear(x.cast(DType::Flex32), &weight, None).expect("valid");
    // Without fusion Burn's own cast to Flex32 comes out as f32.
    let cast = plain.clone().cast(DType::Flex32);
    assert_eq!(relaxed.dtype(), cast.dtype());
    // The products may be rounded to 11 bits, as in f16.
    let bounds: Vec<(f64, f64)> = values(&plain).iter().map(|&y| (y, 2e-3)).collect();
    assert_close(&values(&relaxed), &bounds, "product");
}

/// `d(dy W) / d dy = ddx Wᵀ`: the backward pass itself can be differentiated.
fn the_input_gradient_has_a_gradient(device: &Device) {
    let [m, k, n] = [3, 64, 10];
    let device = &device.clone().autodiff();
    let host = reference(
        &weights(n * k, 6),
        &[n, k],
        FloatType::F32,
        QuantConfig::default(),
    );
    let weight = BlockWeight::from_host(&host, device);
    let grad: Tensor<2> = tensor(&uniform(m * n, 2), [m, n], FloatType::F32, device);
    let grad = grad.require_grad();
    let factor: Tensor<2> = tensor(&uniform(m * k, 3), [m, k], FloatType::F32, device);
    let spec = LinearSpec {
        weight: DequantizeSpec {
            layout: *weight.layout(),
            rows: n,
            columns: k,
            start: 0,
            dtype: FloatType::F32,
        },
        strategy: MatmulStrategy::Auto,
        cublaslt: false,
    };
    let dx = <Dispatch as QuantBackend>::quant_linear_backward(
        grad.clone().into_dispatch(),
        weight.packed().into_dispatch(),
        spec,
    );
    let dx = Tensor::<2>::from_dispatch(dx);

    let w: Vec<f64> = host.dequantize::<f32>().iter().map(|&v| v.into()).collect();
    let by_column = transposed(&w, n, k);
    let expected = dense_linear(&values(&grad), &by_column, &[], [m, n, k], FloatType::F32);
    assert_close(&values(&dx), &expected, "dx");

    let grads = (dx * factor.clone()).sum().backward();
    let got = grad.grad(&grads).expect("a gradient");
    let expected = dense_linear(&values(&factor), &w, &[], [m, k, n], FloatType::F32);
    assert_close(&values(&got), &expected, "ddy");
}

/// Autodiff over autodiff has the operations too; that it compiles is the test.
#[cfg(feature = "flex")]
#[test]
fn autodiff_nests() {
    use burn::backend::{Autodiff, Flex};
    fn has_operations<B: QuantBackend>() {}
    has_operations::<Autodiff<Autodiff<Flex>>>();
}

/// A weight made on an autodiff device is a constant there.
fn quantizing_cuts_the_graph(device: &Device) {
    let device = &device.clone().autodiff();
    let dense: Tensor<2> = tensor(&weights(640, 1), [10, 64], FloatType::F32, device);
    let dense = dense.require_grad();
    let weight = BlockWeight::quantize(dense.clone(), QuantConfig::default()).expect("valid");
    let back = weight.dequantize::<2>(FloatType::F32).expect("f32");
    assert!(!back.is_require_grad());
    let scale = Tensor::<1>::ones([1], (device, DType::F32)).require_grad();
    let grads = (back * scale.clone().unsqueeze()).sum().backward();
    assert!(scale.grad(&grads).is_some());
    assert!(dense.grad(&grads).is_none());
}

/// Tensors and weights with and without autodiff go together.
fn linear_mixes_autodiff_and_plain(device: &Device) {
    let host = reference(
        &weights(640, 1),
        &[10, 64],
        FloatType::F32,
        QuantConfig::default(),
    );
    let tracked = &device.clone().autodiff();
    let x: Tensor<2> = tensor(&uniform(128, 2), [2, 64], FloatType::F32, device);
    let plain = linear(x.clone(), &BlockWeight::from_host(&host, device), None).expect("valid");

    let x_tracked = x.clone().autodiff().require_grad();
    let y = linear(
        x_tracked.clone(),
        &BlockWeight::from_host(&host, device),
        None,
    )
    .expect("valid");
    assert_same_product(&y, &plain);
    assert!(x_tracked.grad(&y.sum().backward()).is_some());

    let y = linear(x, &BlockWeight::from_host(&host, tracked), None).expect("valid");
    assert_same_product(&y, &plain);
}

fn errors_name_what_does_not_fit(device: &Device) {
    let quant = QuantConfig::default();
    let zeros = |shape: &[usize]| {
        BlockWeight::zeros(shape, quant, FloatType::F32, device).expect("a possible shape")
    };
    let f32s = (device, DType::F32);
    let matrix = zeros(&[10, 64]);
    let x = || Tensor::<2>::zeros([3, 64], f32s);

    assert_eq!(
        linear(Tensor::<3>::zeros([2, 3, 10], f32s), &matrix, None).unwrap_err(),
        Nf4Error::Shape {
            tensor: "x".into(),
            expected: vec![2, 3, 64],
            given: vec![2, 3, 10],
        }
    );
    assert_eq!(
        linear(x(), &matrix, Some(Tensor::zeros([64], f32s))).unwrap_err(),
        Nf4Error::Shape {
            tensor: "bias".into(),
            expected: vec![10],
            given: vec![64],
        }
    );

    for shape in [&[640][..], &[2, 5, 64]] {
        let expected = Nf4Error::NotAMatrix {
            tensor: "weight".into(),
            shape: shape.into(),
        };
        let weight = zeros(shape);
        assert_eq!(linear(x(), &weight, None).unwrap_err(), expected);
        assert_eq!(weight.matrix_dims().unwrap_err(), expected);
        let rows = weight.dequantize_rows(0..1, FloatType::F32);
        assert_eq!(rows.unwrap_err(), expected);
    }
    let rank = matrix.dequantize::<3>(FloatType::F32).unwrap_err();
    assert_eq!(
        rank,
        Nf4Error::Rank {
            tensor: "weight".into(),
            expected: 3,
            shape: vec![10, 64],
        }
    );

    for (start, end) in [(0, 0), (3, 3), (5, 4), (0, 11), (10, 11), (0, usize::MAX)] {
        assert_eq!(
            matrix
                .dequantize_rows(start..end, FloatType::F32)
                .unwrap_err(),
            Nf4Error::RowRange {
                start,
                end,
                rows: 10,
            }
        );
    }

    for shape in [[0, 64], [64, 0]] {
        let expected = Nf4Error::ElementCount {
            tensor: "weight".into(),
            shape: shape.into(),
        };
        let empty = Tensor::<2>::zeros(shape, f32s);
        assert_eq!(BlockWeight::quantize(empty, quant).unwrap_err(), expected);
        let zeros = BlockWeight::zeros(&shape, quant, FloatType::F32, device);
        assert_eq!(zeros.unwrap_err(), expected);
    }
}

/// Every way to compute a product gives the same one, or says that it cannot: few rows and many, with
/// a bias and without. Values are centred and bounds follow from the dtype and the terms, so that a
/// bias left out, or four terms of 256, are far outside of them.
fn every_strategy_gives_the_product(device: &Device) {
    for dtype in FloatType::ALL {
        if lacks(device, dtype.into()) {
            continue;
        }
        let [n, k] = [96, 256];
        let bias: Tensor<1> = tensor(&uniform(n, 5), [n], dtype, device);
        for (m, block_size) in [(1, 64), (1, 32), (9, 64), (70, 64)] {
            let quant = config(QuantType::Nf4, block_size, true);
            let host = reference(&weights(n * k, 6), &[n, k], dtype, quant);
            let weight = BlockWeight::from_host(&host, device);
            let decoded = values(&weight.dequantize::<2>(dtype).expect("supported"));
            let x: Tensor<2> = tensor(&uniform(m * k, 2), [m, k], dtype, device);
            for bias in [None, Some(bias.clone())] {
                let of_bias = bias.as_ref().map_or(Vec::new(), values);
                let x_values = values(&x);
                let expected = dense_linear(&x_values, &decoded, &of_bias, [m, k, n], dtype);
                let dims = [m, k, n];
                let of_levels =
                    with_unrounded_weights(expected.clone(), &x_values, &decoded, dims, dtype);
                for strategy in [
                    MatmulStrategy::Auto,
                    MatmulStrategy::Rule,
                    MatmulStrategy::Decode,
                    MatmulStrategy::Gemv,
                    MatmulStrategy::TensorCore,
                    MatmulStrategy::Levels,
                ] {
                    let what = format!("{strategy:?}, {m} rows of {dtype:?}");
                    let levels = m == 1 && dtype != FloatType::F32 && is_cuda(device);
                    let expected = match strategy {
                        MatmulStrategy::Auto | MatmulStrategy::Rule if levels => &of_levels,
                        MatmulStrategy::Levels => &of_levels,
                        _ => &expected,
                    };
                    match linear_with(x.clone(), &weight, bias.clone(), strategy) {
                        Ok(y) => assert_close(&values(&y), expected, &what),
                        Err(Nf4Error::Variant { variant, .. }) => {
                            assert!(matches!(
                                strategy,
                                MatmulStrategy::TensorCore | MatmulStrategy::Levels
                            ));
                            assert_eq!(variant, strategy.name());
                            let levels = m == 1 && block_size == 64;
                            let can = dtype != FloatType::F32
                                && (strategy == MatmulStrategy::TensorCore || levels);
                            assert!(!can || !is_cuda(device), "{what}");
                        }
                        Err(error) => panic!("{what}: {error}"),
                    }
                }
            }
        }
    }
}

/// Bounds for a kernel that does not round the decoded weight to the dtype of `x`: half a unit in its
/// last place for each term more.
fn with_unrounded_weights(
    expected: Vec<(f64, f64)>,
    x: &[f64],
    w: &[f64],
    [m, k, n]: [usize; 3],
    dtype: FloatType,
) -> Vec<(f64, f64)> {
    let absolute = |values: &[f64]| values.iter().map(|v| v.abs()).collect::<Vec<f64>>();
    let magnitudes = product(&absolute(x), &absolute(w), m, k, n);
    let widened = expected.into_iter().zip(magnitudes);
    widened
        .map(|((value, bound), magnitude)| (value, bound + rounding(dtype) * magnitude))
        .collect()
}

/// Half a unit in the last place, relatively; of f32 with the inputs of TF32.
fn rounding(dtype: FloatType) -> f64 {
    match dtype {
        FloatType::F16 | FloatType::F32 => 2f64.powi(-11),
        FloatType::BF16 => 2f64.powi(-8),
    }
}

/// A low-rank branch gives the same whether it joins the product or is computed beside it.
fn a_branch_joins_the_product(device: &Device) {
    for dtype in FloatType::ALL {
        if lacks(device, dtype.into()) {
            continue;
        }
        let [n, k, rank] = [96, 256, 12];
        let centred = |[rows, columns]: [usize; 2], dtype, seed| -> Tensor<2> {
            tensor(
                &uniform(rows * columns, seed),
                [rows, columns],
                dtype,
                device,
            )
        };
        let bias: Tensor<1> = centred([n, 1], dtype, 5).reshape([n]);
        let host = reference(&weights(n * k, 6), &[n, k], dtype, QuantConfig::default());
        let weight = BlockWeight::from_host(&host, device);
        let decoded = values(&weight.dequantize::<2>(dtype).expect("a matrix"));
        let cases = [
            (1, false, dtype, MatmulStrategy::Auto),
            (5, true, dtype, MatmulStrategy::Gemv),
            (9, true, FloatType::F32, MatmulStrategy::Auto),
            (70, true, dtype, MatmulStrategy::Rule),
            // Beside the product; on a graphics card Burn tunes its own for seconds.
            (9, false, FloatType::F32, MatmulStrategy::Decode),
            (300, false, FloatType::F32, MatmulStrategy::Auto),
        ];
        let cases = if dtype == FloatType::F32 {
            &cases[..]
        } else {
            &cases[..4]
        };
        for &(m, with_bias, branch_dtype, strategy) in cases {
            let what = format!("{m} rows, {dtype:?} and {branch_dtype:?}, {strategy:?}");
            let bias = with_bias.then(|| bias.clone());
            let x = centred([m, k], dtype, 2);
            let branch = LowRank {
                a: centred([k, rank], branch_dtype, 3),
                b: centred([rank, n], branch_dtype, 4),
                scale: 0.25,
            };
            let x_values = values(&x);
            let of_bias = bias.as_ref().map_or(Vec::new(), values);
            let mut expected = dense_linear(&x_values, &decoded, &of_bias, [m, k, n], dtype);
            if m == 1 && is_cuda(device) {
                let dims = [m, k, n];
                expected = with_unrounded_weights(expected, &x_values, &decoded, dims, dtype);
            }
            let [a, b] = [&branch.a, &branch.b].map(values);
            let [a, b] = [transposed(&a, k, rank), transposed(&b, rank, n)];
            // Each factor of the branch, and its product, is rounded once; on the CPU Burn's product
            // of one row in f16 rounds every partial sum.
            let down = product(&x_values, &a, m, k, rank);
            let rounds_sums = !is_cuda(device) && branch_dtype == FloatType::F16;
            let absolute = |values: &[f64]| values.iter().map(|v| v.abs()).collect::<Vec<f64>>();
            let magnitudes = product(&absolute(&x_values), &absolute(&a), m, k, rank);
            for (i, (sum, bound)) in expected.iter_mut().enumerate() {
                for r in 0..rank {
                    let (at, b) = (i / n * rank + r, 0.25 * b[i % n * rank + r]);
                    *sum += down[at] * b;
                    *bound += 4.0 * rounding(dtype) * (down[at] * b).abs();
                    if rounds_sums {
                        *bound += rounding(dtype) * magnitudes[at] * b.abs();
                    }
                }
                *bound += rounding(dtype) * sum.abs();
            }
            let y = lora_linear(x, &weight, bias, branch, strategy).expect("fits");
            assert_eq!(y.dtype(), DType::from(dtype), "{what}");
            assert_close(&values(&y), &expected, &what);
        }
    }
}

/// `a bᵀ` in f64, of `[m, k]` and `[n, k]`.
fn product(a: &[f64], b: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
    let dot = |i: usize, j: usize| {
        let (a, b) = (&a[i * k..(i + 1) * k], &b[j * k..(j + 1) * k]);
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    };
    (0..m * n).map(|at| dot(at / n, at % n)).collect()
}

/// The branch is checked before anything runs.
fn a_branch_that_does_not_fit_is_an_error(device: &Device) {
    let options = (device, DType::F32);
    let x = Tensor::<2>::ones([2, 64], options);
    let dense = Tensor::<2>::ones([32, 64], options);
    let weight = BlockWeight::quantize(dense, QuantConfig::default()).expect("finite");
    for (a, b, tensor, expected) in [
        ([32, 4], [4, 32], "lora_a", [64, 4]),
        ([64, 4], [5, 32], "lora_b", [4, 32]),
        ([64, 4], [4, 64], "lora_b", [4, 32]),
    ] {
        let branch = LowRank {
            a: Tensor::ones(a, options),
            b: Tensor::ones(b, options),
            scale: 1.0,
        };
        let given = if tensor == "lora_a" { a } else { b };
        let error = lora_linear(x.clone(), &weight, None, branch, MatmulStrategy::Auto);
        assert_eq!(
            error.expect_err("it does not fit"),
            Nf4Error::Shape {
                tensor: tensor.into(),
                expected: expected.to_vec(),
                given: given.to_vec(),
            }
        );
    }
}

/// With a bias that is trained or not, of few rows and many: `y`, and the gradients of `sum(y g)`.
fn a_tracked_branch_has_its_gradients(device: &Device) {
    for dtype in FloatType::ALL {
        if lacks(device, dtype.into()) {
            continue;
        }
        let tracked = &device.clone().autodiff();
        let ([n, k, rank], scale) = ([64, 128, 8], 0.5);
        let host = reference(&weights(n * k, 6), &[n, k], dtype, QuantConfig::default());
        let weight = BlockWeight::from_host(&host, tracked);
        let w = values(&weight.dequantize::<2>(dtype).expect("a matrix"));
        for (m, with_bias) in [(3, false), (3, true), (300, true)] {
            let what = format!("{m} rows, {dtype:?}, bias {with_bias}");
            let matrix = |dims: [usize; 2], dtype, seed| -> Tensor<2> {
                tensor(&uniform(dims[0] * dims[1], seed), dims, dtype, tracked)
            };
            let x = matrix([m, k], dtype, 2).require_grad();
            let a = matrix([k, rank], FloatType::F32, 3).require_grad();
            let b = matrix([rank, n], FloatType::F32, 4).require_grad();
            let g = matrix([m, n], dtype, 7);
            let bias = with_bias.then(|| {
                let bias: Tensor<1> = matrix([1, n], dtype, 5).reshape([n]);
                bias.detach().require_grad()
            });
            let branch = LowRank {
                a: a.clone(),
                b: b.clone(),
                scale,
            };
            let strategy = MatmulStrategy::Auto;
            let y = lora_linear(x.clone(), &weight, bias.clone(), branch, strategy).expect("fits");
            let grads = (y.clone() * g.clone()).sum().backward();

            let [xs, av, bv, gv] = [&x, &a, &b, &g].map(values);
            let of_bias = bias.as_ref().map_or(vec![0.0; n], values);
            let (a_rows, b_rows) = (transposed(&av, k, rank), transposed(&bv, rank, n));
            let down = product(&xs, &a_rows, m, k, rank);
            let plain = product(&xs, &w, m, k, n);
            let added = product(&down, &b_rows, m, rank, n);
            let expected: Vec<f64> = (0..m * n)
                .map(|i| plain[i] + scale * added[i] + of_bias[i % n])
                .collect();
            // What a branch in the dtype of `x` may be off by.
            let tolerance = 8.0 * rounding(dtype).max(2f64.powi(-11));
            assert_near(&values(&y), &expected, tolerance, &what);

            let h = product(&gv, &bv, m, n, rank);
            let w_columns = transposed(&w, n, k);
            let (dx_plain, dx_branch) = (
                product(&gv, &w_columns, m, n, k),
                product(&h, &av, m, rank, k),
            );
            let dx: Vec<f64> = (0..m * k)
                .map(|i| dx_plain[i] + scale * dx_branch[i])
                .collect();
            let (x_columns, h_columns) = (transposed(&xs, m, k), transposed(&h, m, rank));
            let (d_columns, g_columns) = (transposed(&down, m, rank), transposed(&gv, m, n));
            let scaled = |values: Vec<f64>| values.iter().map(|v| scale * v).collect::<Vec<f64>>();
            let da = scaled(product(&x_columns, &h_columns, k, m, rank));
            let db = scaled(product(&d_columns, &g_columns, rank, m, n));
            for (name, got, expected, of) in [
                ("dx", x.grad(&grads), dx, dtype),
                ("da", a.grad(&grads), da, FloatType::F32),
                ("db", b.grad(&grads), db, FloatType::F32),
            ] {
                let got = got.expect("a gradient");
                assert_eq!(got.dtype(), DType::from(of), "{what}, {name}");
                assert_near(
                    &values(&got),
                    &expected,
                    tolerance,
                    &format!("{what}, {name}"),
                );
            }
            if let Some(bias) = bias {
                let sums: Vec<f64> = (0..n)
                    .map(|j| (0..m).map(|i| gv[i * n + j]).sum())
                    .collect();
                let got = values(&bias.grad(&grads).expect("a gradient"));
                assert_near(&got, &sums, tolerance, &format!("{what}, d bias"));
            }
        }
    }
}

/// Every way that operands can lie.
fn orientations() -> impl Iterator<Item = MatmulOptions> {
    [false, true].into_iter().flat_map(|transpose_lhs| {
        [false, true].map(|transpose_rhs| MatmulOptions {
            transpose_lhs,
            transpose_rhs,
            ..MatmulOptions::default()
        })
    })
}

/// `[batch, rows, columns]` as it is stored.
fn stored(batch: usize, [rows, columns]: [usize; 2], transposed: bool) -> [usize; 3] {
    match transposed {
        false => [batch, rows, columns],
        true => [batch, columns, rows],
    }
}

/// Batches, a matrix on the right for each or one for all, transposes, with a bias and without.
fn dense_products(device: &Device) {
    let [batch, m, n, k] = [3, 5, 24, 40];
    for dtype in FloatType::ALL {
        if lacks(device, dtype.into()) {
            continue;
        }
        let bias: Tensor<1> = tensor(&uniform(n, 5), [n], dtype, device);
        for options in orientations() {
            for (of_rhs, bias) in [
                (batch, None),
                (1, Some(bias.clone())),
                (batch, Some(bias.clone())),
            ] {
                let x = stored(batch, [m, k], options.transpose_lhs);
                let y = stored(of_rhs, [k, n], options.transpose_rhs);
                let x: Tensor<3> = tensor(&uniform(batch * m * k, 1), x, dtype, device);
                let y: Tensor<3> = tensor(&uniform(of_rhs * k * n, 2), y, dtype, device);
                let of_bias = bias.as_ref().map_or(Vec::new(), values);
                let got = matmul(x.clone(), y.clone(), bias, options).expect("they fit");
                assert_eq!(got.dims(), [batch, m, n]);
                assert_eq!(got.dtype(), DType::from(dtype));
                let got = values(&got);
                for index in 0..batch {
                    let of = |tensor: &Tensor<3>| {
                        let last = tensor.dims()[0] - 1;
                        values(&tensor.clone().narrow(0, index.min(last), 1))
                    };
                    let (mut x, mut y) = (of(&x), of(&y));
                    if options.transpose_lhs {
                        x = transposed(&x, k, m);
                    }
                    if !options.transpose_rhs {
                        y = transposed(&y, k, n);
                    }
                    let expected = dense_linear(&x, &y, &of_bias, [m, k, n], dtype);
                    let part = &got[index * m * n..][..m * n];
                    assert_close(part, &expected, &format!("{options:?} {dtype:?}"));
                }
            }
        }
        // Two dimensions, of a view.
        let x: Tensor<2> = tensor(&uniform(2 * m * k, 1), [m, 2 * k], dtype, device);
        let x = x.narrow(1, k, k);
        let y: Tensor<2> = tensor(&uniform(k * n, 2), [n, k], dtype, device);
        let expected = dense_linear(&values(&x), &values(&y), &[], [m, k, n], dtype);
        let options = MatmulOptions::default();
        let got = matmul(x, y.transpose(), None, options).expect("they fit");
        assert_close(&values(&got), &expected, "a view");
    }
}

/// The gradients of all operands are those of Burn's own product.
fn dense_products_have_their_gradients(device: &Device) {
    let [batch, m, n, k] = [3, 5, 24, 40];
    let device = &device.clone().autodiff();
    let dtype = FloatType::F32;
    let bias = || tensor::<1>(&uniform(n, 5), [n], dtype, device).require_grad();
    let factor: Tensor<3> = tensor(&uniform(batch * m * n, 6), [batch, m, n], dtype, device);
    for options in orientations() {
        for of_rhs in [1, batch] {
            let operands = || {
                let x = stored(batch, [m, k], options.transpose_lhs);
                let y = stored(of_rhs, [k, n], options.transpose_rhs);
                let x: Tensor<3> = tensor(&uniform(batch * m * k, 1), x, dtype, device);
                let y: Tensor<3> = tensor(&uniform(of_rhs * k * n, 2), y, dtype, device);
                (x.require_grad(), y.require_grad(), bias())
            };
            let (x, y, b) = operands();
            let got = matmul(x.clone(), y.clone(), Some(b.clone()), options).expect("they fit");
            let grads = (got * factor.clone()).sum().backward();

            let (x_burn, y_burn, b_burn) = operands();
            let oriented = |matrix: &Tensor<3>, transpose| match transpose {
                false => matrix.clone(),
                true => matrix.clone().swap_dims(1, 2),
            };
            let lhs = oriented(&x_burn, options.transpose_lhs);
            let expected =
                lhs.matmul(oriented(&y_burn, options.transpose_rhs)) + b_burn.clone().unsqueeze();
            let expected = (expected * factor.clone()).sum().backward();

            let what = format!("{options:?}, {of_rhs} on the right");
            for (name, got, expected) in [
                ("lhs", (&x, &grads), (&x_burn, &expected)),
                ("rhs", (&y, &grads), (&y_burn, &expected)),
            ] {
                let got = got.0.grad(got.1).expect("a gradient");
                let expected = expected.0.grad(expected.1).expect("a gradient");
                assert_eq!(got.dims(), expected.dims(), "{what}, {name}");
                let (got, expected) = (values(&got), values(&expected));
                assert_near(&got, &expected, 1.0 / 256.0, &format!("{what}, {name}"));
            }
            let got = values(&b.grad(&grads).expect("a gradient"));
            let expected = values(&b_burn.grad(&expected).expect("a gradient"));
            assert_near(&got, &expected, 1.0 / 256.0, &format!("{what}, bias"));
        }
    }
}

fn dense_operands_that_do_not_fit_are_errors(device: &Device) {
    let options = MatmulOptions::default();
    let f32s = (device, DType::F32);
    let lhs = || Tensor::<3>::ones([2, 3, 8], f32s);
    for (rhs, expected) in [
        ([2, 7, 4], [2, 8, 4]),
        ([3, 8, 4], [2, 8, 4]),
        ([1, 7, 4], [1, 8, 4]),
    ] {
        let error = matmul(lhs(), Tensor::ones(rhs, f32s), None, options);
        let expected = Nf4Error::Shape {
            tensor: "rhs".into(),
            expected: expected.to_vec(),
            given: rhs.to_vec(),
        };
        assert_eq!(error.expect_err("they do not fit"), expected);
    }
    let bias = Some(Tensor::ones([8], f32s));
    let error = matmul(lhs(), Tensor::ones([2, 8, 4], f32s), bias, options);
    let expected = Nf4Error::Shape {
        tensor: "bias".into(),
        expected: vec![4],
        given: vec![8],
    };
    assert_eq!(error.expect_err("it does not fit"), expected);
    let one = Tensor::<1>::ones([8], f32s);
    let error = matmul(one.clone(), one, None, options).expect_err("they are no matrices");
    assert!(
        matches!(error, Nf4Error::Rank { expected: 2, .. }),
        "{error}"
    );
    if burn_nf4::op::supports_dtype(device, DType::F16) {
        // The other way round the right matrix is widened.
        let rhs = Tensor::<3>::ones([2, 8, 4], (device, DType::F32));
        let error = matmul(lhs().cast(DType::F16), rhs, None, options).expect_err("types differ");
        assert!(matches!(error, Nf4Error::Dtype { .. }), "{error}");
    }
}

/// Products without elements, and sums of nothing, which are the bias.
fn dense_products_of_nothing(device: &Device) {
    let options = MatmulOptions::default();
    let ones = |shape: [usize; 3]| Tensor::<3>::ones(shape, (device, DType::F32));
    let bias = || Tensor::<1>::from_data([1.0f32, 2.0, 3.0, 4.0], (device, DType::F32));
    for (lhs, rhs) in [([2, 0, 8], [1, 8, 4]), ([0, 3, 8], [0, 8, 4])] {
        for bias in [None, Some(bias())] {
            let y = matmul(ones(lhs), ones(rhs), bias, options).expect("it is empty");
            assert_eq!(y.dims(), [lhs[0], lhs[1], 4]);
        }
    }
    for rhs in [[1, 0, 4], [2, 0, 4]] {
        let y = matmul(ones([2, 3, 0]), ones(rhs), None, options).expect("sums of nothing");
        assert_eq!(y.into_data().try_to_vec::<f32>().expect("f32"), [0.0; 24]);
        let y = matmul(ones([2, 3, 0]), ones(rhs), Some(bias()), options).expect("the bias");
        let expected = [1.0, 2.0, 3.0, 4.0].repeat(6);
        assert_eq!(y.into_data().try_to_vec::<f32>().expect("f32"), expected);
    }
    let device = device.clone().autodiff();
    let lhs = Tensor::<3>::ones([2, 3, 0], (&device, DType::F32)).require_grad();
    let bias = Tensor::<1>::ones([4], (&device, DType::F32)).require_grad();
    let rhs = Tensor::<3>::ones([1, 0, 4], (&device, DType::F32)).require_grad();
    let y = matmul(lhs.clone(), rhs.clone(), Some(bias.clone()), options).expect("the bias");
    let grads = y.sum().backward();
    assert_eq!(lhs.grad(&grads).expect("a gradient").dims(), [2, 3, 0]);
    assert_eq!(rhs.grad(&grads).expect("a gradient").dims(), [1, 0, 4]);
    let of_bias = bias.grad(&grads).expect("a gradient").into_data();
    assert_eq!(of_bias.try_to_vec::<f32>().expect("f32"), [6.0; 4]);
}

/// Operands on two devices are an error before anything runs.
fn operands_on_two_devices_are_an_error(device: &Device) {
    #[cfg(feature = "flex")]
    let other = Device::flex();
    #[cfg(not(feature = "flex"))]
    let other = device.clone();
    if *device == other {
        skip("there is but one device");
        return;
    }
    let of = |device: &Device, shape: [usize; 2]| Tensor::<2>::ones(shape, (device, DType::F32));
    let expect = |error: Nf4Error, tensor: &str| match &error {
        Nf4Error::Device { tensor: named, .. } => assert_eq!(named, tensor, "{error}"),
        _ => panic!("{error}"),
    };
    let options = MatmulOptions::default();
    let error = matmul(of(device, [2, 64]), of(&other, [64, 4]), None, options);
    expect(error.expect_err("two devices"), "rhs");
    let weight = BlockWeight::quantize(of(&other, [32, 64]), QuantConfig::default());
    let weight = weight.expect("finite");
    let error = linear(of(device, [2, 64]), &weight, None).expect_err("two devices");
    expect(error, "packed weight");
    let bias = Tensor::<1>::ones([32], (device, DType::F32));
    let error = linear(of(&other, [2, 64]), &weight, Some(bias)).expect_err("two devices");
    expect(error, "bias");
}

fn is_cuda(device: &Device) -> bool {
    format!("{:?}", device.as_dispatch())
        .to_lowercase()
        .contains("cuda")
}

/// A kernel that was asked for is checked before anything runs.
fn a_strategy_that_is_impossible_is_an_error(device: &Device) {
    let options = (device, DType::F32);
    let x = Tensor::<2>::ones([2, 64], options);
    let dense = Tensor::<2>::ones([32, 64], options);
    let weight = BlockWeight::quantize(dense, QuantConfig::default()).expect("finite");
    // No device multiplies f32 on these tensor cores.
    for strategy in [MatmulStrategy::TensorCore, MatmulStrategy::Levels] {
        let autodiff = x.clone().autodiff();
        for x in [x.clone(), autodiff] {
            let error = linear_with(x, &weight, None, strategy).expect_err("impossible");
            assert!(
                matches!(error, Nf4Error::Variant { variant, .. } if variant == strategy.name()),
                "{error}"
            );
        }
    }
}

/// f64 exists on the CPU devices and CUDA; where it does not, no such tensor can be made.
fn f64_is_refused(device: &Device) {
    if lacks(device, DType::F64) {
        return;
    }
    let quant = QuantConfig::default();
    let dtype = |tensor: &str| Nf4Error::Dtype {
        tensor: tensor.into(),
        expected: "f16, bf16 or f32".into(),
        given: "F64".into(),
    };
    let f64s = (device, DType::F64);
    let weight = Tensor::<2>::ones([10, 64], f64s);
    let error = BlockWeight::quantize(weight, quant).unwrap_err();
    assert_eq!(error, dtype("weight"));
    let weight = BlockWeight::zeros(&[10, 64], quant, FloatType::F32, device).expect("valid");
    let error = linear(Tensor::<2>::ones([3, 64], f64s), &weight, None).unwrap_err();
    assert_eq!(error, dtype("x"));
}

/// On the CPU values are checked; on a GPU that would mean to wait, and `quantize` says so.
#[cfg(feature = "flex")]
#[rstest]
#[case::nan(f32::NAN, FloatType::F32)]
#[case::infinity(f32::INFINITY, FloatType::F32)]
#[case::negative_infinity(f32::NEG_INFINITY, FloatType::BF16)]
#[case::beyond_f16(1e6, FloatType::F16)]
fn flex_reports_the_first_value_that_is_not_finite(#[case] bad: f32, #[case] dtype: FloatType) {
    let mut values = weights(640, 1);
    values[417] = bad;
    values[500] = f32::NAN;
    for device in [Device::flex(), Device::flex().autodiff()] {
        let weight: Tensor<2> = tensor(&values, [10, 64], dtype, &device);
        match BlockWeight::quantize(weight, QuantConfig::default()) {
            Err(Nf4Error::NonFinite {
                tensor,
                index: 417,
                given,
            }) => {
                assert_eq!(tensor, "weight");
                assert!(!given.is_finite(), "{given}");
                assert_eq!(given.is_nan(), bad.is_nan());
            }
            other => panic!("{other:?}"),
        }
    }
    // The index counts along the view, not along the memory behind it.
    values.resize(640, 0.0);
    let view = tensor::<2>(&values, [10, 64], dtype, &Device::flex()).transpose();
    let error = BlockWeight::quantize(view, QuantConfig::default()).unwrap_err();
    let expected = [417, 500].map(|flat| flat % 64 * 10 + flat / 64);
    assert!(
        matches!(error, Nf4Error::NonFinite { index, .. } if index == expected[0].min(expected[1])),
        "{error}"
    );
}

/// A random weight: its shape, type, settings and values of mixed magnitude.
#[derive(Debug, Clone)]
struct Sample {
    shape: Vec<usize>,
    dtype: FloatType,
    quant: QuantConfig,
    values: Vec<f32>,
}

fn samples(dtypes: Vec<FloatType>) -> impl Strategy<Value = Sample> {
    let shape = prop_oneof![
        prop::collection::vec(1usize..3000, 1),
        prop::collection::vec(1usize..60, 2),
        prop::collection::vec(1usize..14, 3),
    ];
    let quant = (
        prop::sample::select(vec![QuantType::Nf4, QuantType::Fp4]),
        prop::sample::select(BlockSize::ALL.to_vec()),
        prop::option::of(prop::sample::select(BlockSize::ALL.to_vec())),
    );
    // Runs of a magnitude each, so that whole blocks are zero, tiny or huge.
    let magnitude = prop::sample::select(vec![0.0, 1e-30, 1e-5, 0.02, 1.0, 6e4]);
    (
        shape,
        prop::sample::select(dtypes),
        quant,
        prop::collection::vec((magnitude, 1usize..400), 1..8),
        any::<u64>(),
    )
        .prop_map(|(shape, dtype, quant, runs, seed)| {
            let (quant_type, block_size, nested_block_size) = quant;
            let magnitudes = runs
                .iter()
                .flat_map(|&(magnitude, len)| std::iter::repeat_n(magnitude, len))
                .cycle();
            let elems = shape.iter().product();
            let values = uniform(elems, seed)
                .into_iter()
                .zip(magnitudes)
                .map(|(u, magnitude): (f32, f32)| u * magnitude)
                .collect();
            Sample {
                shape,
                dtype,
                quant: QuantConfig {
                    quant_type,
                    block_size,
                    nested_block_size,
                },
                values,
            }
        })
}

fn random_weights_match_the_reference(device: &Device, cases: u32) {
    let dtypes: Vec<FloatType> = FloatType::ALL
        .into_iter()
        .filter(|&dtype| supports(device, dtype))
        .collect();
    let check = |sample: Sample| {
        let Sample {
            shape,
            dtype,
            quant,
            values,
        } = sample;
        let expected = reference(&values, &shape, dtype, quant);
        let weight = quantize_bytes(bytes(&values, dtype), &shape, dtype, quant, device)
            .map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert_eq!(words(&weight), expected.to_packed());
        for &dtype in &dtypes {
            let got = dequantized(&weight, dtype).expect("supported");
            let elems = values.len();
            prop_assert_eq!(
                got,
                reference_bits(&expected, dtype, 0, elems),
                "{:?}",
                dtype
            );
        }
        Ok(())
    };
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let result = TestRunner::new(config).run(&samples(dtypes.clone()), check);
    if let Err(error) = result {
        panic!("{error}");
    }
}

macro_rules! device_tests {
    ($name:ident, $feature:literal, $device:expr, $cases:literal) => {
        #[cfg(feature = $feature)]
        mod $name {
            use super::*;

            fn device() -> Device {
                $device
            }

            device_tests!(@each
                golden_files_decode_to_the_bits_of_bitsandbytes
                golden_files_come_back_from_the_device_as_they_were
                golden_sources_quantize_to_the_words_of_the_reference
                rows_are_slices_of_the_whole
                quantize_takes_views
                linear_takes_views
                linear_keeps_the_leading_dimensions
                linear_maps_an_empty_batch_to_an_empty_batch
                mixed_dtypes_are_refused
                scales_whose_sum_overflows_have_a_finite_mean
                reproducible_products_are_those_of_the_rule
                the_input_gradient_has_a_gradient
                quantizing_cuts_the_graph
                linear_mixes_autodiff_and_plain
                errors_name_what_does_not_fit
                f64_is_refused
                relaxed_floats_count_as_f32
                every_strategy_gives_the_product
                a_strategy_that_is_impossible_is_an_error
                a_branch_joins_the_product
                a_branch_that_does_not_fit_is_an_error
                a_tracked_branch_has_its_gradients
                dense_products
                dense_products_have_their_gradients
                dense_operands_that_do_not_fit_are_errors
                dense_products_of_nothing
                operands_on_two_devices_are_an_error
            );

            #[rstest]
            fn linear_is_a_product_with_the_decoded_weight(
                #[values(FloatType::F16, FloatType::BF16, FloatType::F32)] dtype: FloatType,
            ) {
                super::linear_is_a_product_with_the_decoded_weight(&device(), dtype);
            }

            #[test]
            fn random_weights_match_the_reference() {
                super::random_weights_match_the_reference(&device(), $cases);
            }
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

device_tests!(flex, "flex", Device::flex(), 100);
device_tests!(cuda, "cuda", Device::cuda(0), 30);
device_tests!(rocm, "rocm", Device::rocm(0), 30);
device_tests!(wgpu, "wgpu", Device::wgpu(Default::default()), 12);
device_tests!(vulkan, "vulkan", Device::vulkan(Default::default()), 12);
device_tests!(metal, "metal", Device::metal(Default::default()), 12);
device_tests!(cpu, "cpu", Device::cpu(), 8);
