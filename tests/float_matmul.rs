//! Products of a few rows of f32 with a matrix of fewer bits, and threads that stay awake for them.

mod random;

use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::format::{FloatElement, PackedLayout, QuantConfig};
use burn_nf4::host;
use burn_nf4::op::{MatmulOptions, keep_threads_awake, matmul};
use half::{bf16, f16};
use rstest::rstest;

use random::{Random, available};

fn check<T: FloatElement>([m, n, k]: [usize; 3]) {
    let mut random = Random((m * 31 + n * 7 + k) as u64);
    let (x, table) = (random.units::<f32>(m * k), random.units::<T>(n * k));
    for simd in available() {
        let mut out = vec![f32::NAN; m * n];
        host::float_matmul_with(simd, &x, m, &table, n, k, &mut out);
        for (i, &sum) in out.iter().enumerate() {
            let (row, column) = (i / n, i % n);
            let pairs = x[row * k..][..k].iter().zip(&table[column * k..][..k]);
            let products = pairs.map(|(x, w)| f64::from(*x) * f64::from(w.to_f32()));
            let (exact, size) = products.fold((0.0, 0.0), |(sum, size), product| {
                (sum + product, size + product.abs())
            });
            // Each addition rounds once.
            let bound = size * k as f64 * f64::from(f32::EPSILON) / 2.0;
            let error = (f64::from(sum) - exact).abs();
            assert!(
                error <= bound,
                "{simd:?}, {m}x{n}x{k}, {i}: {error:e} of {bound:e}"
            );
        }
    }
}

/// Whole tiles and parts of them, whole vectors and parts, one row and many.
#[rstest]
fn sums_are_those_of_exact_values(
    #[values([1, 4, 64], [1, 1, 1], [1, 7, 33], [2, 9, 16], [3, 5, 47], [4, 8, 96], [6, 13, 31], [64, 6, 19],
        [1, 1000, 576])]
    shape: [usize; 3],
) {
    check::<f32>(shape);
    check::<bf16>(shape);
    check::<f16>(shape);
}

#[rstest]
#[case::no_terms([2, 3, 0])]
#[case::no_rows([0, 3, 4])]
#[case::no_columns([2, 0, 4])]
fn sums_of_nothing_are_zero(#[case] shape: [usize; 3]) {
    let [m, n, k] = shape;
    let mut out = vec![f32::NAN; m * n];
    host::float_matmul(
        &vec![1.0; m * k],
        m,
        &vec![bf16::ONE; n * k],
        n,
        k,
        &mut out,
    );
    assert_eq!(out, vec![0.0; m * n]);
}

#[rstest]
#[case::x([5, 6, 2])]
#[case::table([6, 5, 2])]
#[case::out([6, 6, 3])]
#[should_panic(expected = "expected")]
fn lengths_that_do_not_fit_panic(#[case] lengths: [usize; 3]) {
    let [x, table, out] = lengths;
    // [2, 3] and [2, 3].
    let mut out = vec![0.0; out + 2];
    host::float_matmul(&vec![1.0; x], 2, &vec![1.0f32; table], 2, 3, &mut out);
}

/// Packed and of floats; the same bits whoever computes them.
#[test]
fn threads_change_no_bits() {
    let mut random = Random(3);
    let (n, k) = (768, 512);
    let x = random.units::<f32>(k);
    let table = random.units::<bf16>(n * k);
    let weight = random.units::<f32>(n * k);
    let words = host::quantize(&weight, &[n, k], QuantConfig::default()).unwrap();
    let layout = PackedLayout::new(n * k, QuantConfig::default());
    let products = || {
        let mut out = vec![f32::NAN; 2 * n];
        let (packed, floats) = out.split_at_mut(n);
        host::matmul(&x, 1, &words, &layout, n, k, None, packed);
        host::float_matmul(&x, 1, &table, n, k, floats);
        out
    };
    let expected = products();
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        assert_eq!(pool.install(products), expected);
        let awake = pool.install(|| {
            let _outer = host::keep_awake();
            let _inner = host::keep_awake();
            (0..20).map(|_| products()).collect::<Vec<_>>()
        });
        assert!(awake.iter().all(|out| *out == expected));
    }
    // From outside of the pool, and again after the others.
    let guard = keep_threads_awake(&Device::default());
    assert_eq!(guard.is_some(), cfg!(feature = "flex"));
    assert_eq!(products(), expected);
    drop(guard);
    assert_eq!(products(), expected);
}

/// Not more than rows are read as they are, and more.
#[rstest]
fn a_matrix_of_16_bit_is_multiplied_by_its_values(
    #[values(1, 5, 64, 65)] m: usize,
    #[values(DType::BF16, DType::F16)] dtype: DType,
    #[values(false, true)] transpose_rhs: bool,
) {
    let device = Device::default();
    let (n, k) = (37, 50);
    let x = Tensor::<2>::random([m, k], Distribution::Default, &device);
    let shape = if transpose_rhs { [n, k] } else { [k, n] };
    let table = Tensor::<2>::random(shape, Distribution::Default, &device).cast(dtype);
    let bias = Tensor::<1>::random([n], Distribution::Default, &device);
    let options = MatmulOptions {
        transpose_rhs,
        ..MatmulOptions::default()
    };
    let product = |table| matmul(x.clone(), table, Some(bias.clone()), options).unwrap();
    let (ours, expected) = (product(table.clone()), product(table.cast(DType::F32)));
    assert_eq!(ours.dtype(), DType::F32);
    let difference = (ours - expected).abs().max().into_scalar::<f32>();
    assert!(difference < 1e-4, "{difference:e}");
}

#[test]
fn gradients_flow_through_a_matrix_of_16_bit() {
    let device = Device::default().autodiff();
    let x = Tensor::<2>::random([2, 8], Distribution::Default, &device).require_grad();
    let table = Tensor::<2>::random([5, 8], Distribution::Default, &device).cast(DType::BF16);
    let y = matmul(x.clone(), table.clone(), None, MatmulOptions::TRANSPOSE_RHS).unwrap();
    let grads = y.sum().backward();
    let expected = table.cast(DType::F32).inner().sum_dim(0).expand([2, 8]);
    let difference = (x.grad(&grads).unwrap() - expected).abs().max();
    assert!(difference.into_scalar::<f32>() < 1e-5);
}

/// Rows of fewer bits than the matrix would lose some of it.
#[test]
fn rows_of_fewer_bits_are_an_error() {
    let device = Device::default();
    let x = Tensor::<2>::zeros([2, 8], (&device, DType::BF16));
    let table = Tensor::<2>::zeros([5, 8], &device);
    let error = matmul(x, table, None, MatmulOptions::TRANSPOSE_RHS).unwrap_err();
    assert!(matches!(error, Nf4Error::Dtype { .. }), "{error}");
}
