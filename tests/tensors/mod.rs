//! Reproducible values, and tensors to and from them. Shared by the tests of the Burn layer, each
//! of which uses a part of it.
#![allow(dead_code)]

use std::io::Write;

use burn::tensor::{DType, Device, Shape, Tensor, TensorData};
use burn_nf4::format::{BlockSize, FloatElement, FloatType, QuantConfig, QuantType};
use half::{bf16, f16};

/// Says that a test, or a part of one, has nothing to run here. Written past libtest's capture, so that
/// `.ci/run` counts it.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    // Nothing to be done if stderr is gone.
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {reason}");
}

/// Whether a device has no tensors of a dtype, which then is skipped.
pub fn lacks(device: &Device, dtype: DType) -> bool {
    if burn_nf4::op::supports_dtype(device, dtype) {
        return false;
    }
    skip(&format!("{device:?} has no {dtype:?}"));
    true
}

/// Values like those of a trained weight, within `±0.125`, with some zeros.
pub fn weights(elems: usize, seed: u64) -> Vec<f32> {
    uniform(elems, seed)
        .into_iter()
        .enumerate()
        .map(|(i, u)| if i % 97 == 0 { 0.0 } else { u * u * u / 8.0 })
        .collect()
}

/// Values spread evenly over `±1`.
pub fn uniform(elems: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..elems)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

pub fn config(quant_type: QuantType, block: usize, nested: bool) -> QuantConfig {
    QuantConfig {
        quant_type,
        block_size: BlockSize::try_from(block).expect("a known block size"),
        nested_block_size: nested.then_some(BlockSize::B256),
    }
}

/// The bytes of values rounded to a dtype.
pub fn bytes(values: &[f32], dtype: FloatType) -> Vec<u8> {
    fn bytes<T: FloatElement>(values: &[f32]) -> Vec<u8> {
        let values: Vec<T> = values.iter().map(|&v| T::from_f32(v)).collect();
        bytemuck::cast_slice(&values).to_vec()
    }
    match dtype {
        FloatType::F16 => bytes::<f16>(values),
        FloatType::BF16 => bytes::<bf16>(values),
        FloatType::F32 => bytes::<f32>(values),
    }
}

/// A tensor with given bits.
pub fn from_bytes<const D: usize>(
    bytes: Vec<u8>,
    shape: [usize; D],
    dtype: FloatType,
    device: &Device,
) -> Tensor<D> {
    let dtype = DType::from(dtype);
    let data = TensorData::from_bytes_vec(bytes, Shape::from(shape), dtype);
    Tensor::from_data(data, (device, dtype))
}

/// A tensor of values rounded to a dtype.
pub fn tensor<const D: usize>(
    values: &[f32],
    shape: [usize; D],
    dtype: FloatType,
    device: &Device,
) -> Tensor<D> {
    from_bytes(bytes(values, dtype), shape, dtype, device)
}

/// The bits of a float tensor, which must have the given dtype.
#[track_caller]
pub fn bits<const D: usize>(tensor: Tensor<D>, dtype: FloatType) -> Vec<u8> {
    let data = tensor.into_data();
    assert_eq!(data.dtype(), DType::from(dtype));
    data.as_bytes().to_vec()
}

/// The values of a float tensor, widened.
pub fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
    tensor.to_data().iter::<f64>().collect()
}

#[track_caller]
pub fn assert_same_bits(got: &[u8], expected: &[u8], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: length in bytes");
    let differing: Vec<usize> = (0..got.len()).filter(|&i| got[i] != expected[i]).collect();
    if let Some(first) = differing.first() {
        let count = differing.len();
        panic!(
            "{what}: {count} of {} bytes differ, the first at {first}",
            got.len()
        );
    }
}

/// Checks values against expected ones, each within its own bound.
#[track_caller]
pub fn assert_close(got: &[f64], expected: &[(f64, f64)], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (i, (got, (value, bound))) in got.iter().zip(expected).enumerate() {
        // Not `> bound`: a NaN must fail.
        assert!(
            (got - value).abs() <= *bound,
            "{what}[{i}] is {got}, expected {value} within {bound}"
        );
    }
}

/// Checks values against expected ones, to within a part of the largest of these.
#[track_caller]
pub fn assert_near(got: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    let largest = expected.iter().fold(0f64, |max, v| max.max(v.abs()));
    assert!(largest > 0.0, "{what}: nothing to compare with");
    let bounds: Vec<(f64, f64)> = expected
        .iter()
        .map(|&value| (value, largest * tolerance))
        .collect();
    assert_close(got, &bounds, what);
}

/// Whether any value differs from an expected one by more than that part of the largest.
pub fn is_far(got: &[f64], expected: &[f64], tolerance: f64) -> bool {
    let largest = expected.iter().fold(0f64, |max, v| max.max(v.abs()));
    got.iter()
        .zip(expected)
        .any(|(got, value)| (got - value).abs() > largest * tolerance)
}

/// How far a matrix product in a dtype may lie from the exact one, where `sum` is the exact value
/// and `magnitude` the sum of the terms' magnitudes.
///
/// f32: CUDA may multiply in TF32, whose inputs keep 11 bits: each term is off by up to 2^-10
/// relatively. f16, bf16: products are exact in the f32 accumulator, the sum (2^-24 an addition,
/// 2^-14 covers 1024 of them) and a bias are each rounded once to 11 or 8 bits.
pub fn product_bound(dtype: FloatType, sum: f64, magnitude: f64) -> f64 {
    match dtype {
        FloatType::F32 => magnitude * 2f64.powi(-10) + 1e-30,
        FloatType::F16 => sum.abs() * 2f64.powi(-10) + magnitude * 2f64.powi(-14) + 2f64.powi(-23),
        FloatType::BF16 => sum.abs() * 2f64.powi(-7) + magnitude * 2f64.powi(-14),
    }
}

/// `x wᵀ + b` in f64, with the bounds of [`product_bound`].
///
/// # Shapes
/// - `x`: `[m, k]`
/// - `w`: `[n, k]`
/// - `bias`: `[n]`, or empty
pub fn dense_linear(
    x: &[f64],
    w: &[f64],
    bias: &[f64],
    [m, k, n]: [usize; 3],
    dtype: FloatType,
) -> Vec<(f64, f64)> {
    assert_eq!((x.len(), w.len()), (m * k, n * k));
    (0..m * n)
        .map(|i| {
            let (row, column) = (i / n, i % n);
            let terms = (0..k).map(|j| x[row * k + j] * w[column * k + j]);
            let terms = terms.chain(bias.get(column).copied());
            let (sum, magnitude) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
            // With a bias the product alone is rounded too, and it can be larger than the sum.
            let rounded = sum.abs() + bias.get(column).map_or(0.0, |b| b.abs());
            (sum, product_bound(dtype, rounded, magnitude))
        })
        .collect()
}

/// The transpose of a row-major `[rows, columns]` matrix.
pub fn transposed(matrix: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    (0..rows * columns)
        .map(|i| matrix[i % rows * columns + i / rows])
        .collect()
}
