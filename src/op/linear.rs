//! Linear maps with a packed weight.

use burn::backend::{Dispatch, DispatchDevice};
use burn::tensor::{DType, Shape, Tensor};

use super::backend::{DequantizeSpec, LinearSpec, MatmulSpec, MatmulStrategy, Nf4Backend};
use super::weight::Nf4Weight;
use crate::error::Nf4Error;
use crate::format::FloatType;

/// `y = x Wᵀ + b` with a packed weight `W`.
///
/// Few rows of `x` are multiplied with `W` as it is packed, see [`linear_with`]; for many it is
/// decoded to the dtype of `x`, here and again in the backward pass, and not kept in between. The gradient flows to `x` and `bias`, never to `W`. An empty batch gives an empty
/// result, which is a constant to autodiff.
///
/// # Shapes
/// - `x`: `[..., in_features]`
/// - `weight`: `[out_features, in_features]`
/// - `bias`: `[out_features]`
/// - returns `[..., out_features]`
///
/// # Errors
/// [`Nf4Error::NotAMatrix`] for a weight of another rank, [`Nf4Error::Shape`] if `x` or `bias`
/// does not fit it, [`Nf4Error::Dtype`] unless `x` is f16, bf16 or f32.
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: &Nf4Weight,
    bias: Option<Tensor<1>>,
) -> Result<Tensor<D>, Nf4Error> {
    linear_with(x, weight, bias, MatmulStrategy::Auto)
}

/// [`linear`], computed in a given way.
///
/// On a graphics card [`MatmulStrategy::Auto`] measures the ways that come into question the first
/// time that a product of its kind (sizes, dtype, quantization) is computed: kernels that read the
/// packed weight, and for more than a few rows decoding it. CubeCL's autotuner keeps the result, in
/// memory and by default in a file. The gradient is always computed over the decoded weight.
///
/// # Errors
/// Those of [`linear`], and [`Nf4Error::Variant`] if the device or the weight does not allow what is
/// asked for.
pub fn linear_with<const D: usize>(
    x: Tensor<D>,
    weight: &Nf4Weight,
    bias: Option<Tensor<1>>,
    strategy: MatmulStrategy,
) -> Result<Tensor<D>, Nf4Error> {
    linear_at(x, weight, weight.matrix_dims()?, 0, bias, strategy)
}

/// `y = x Wₑᵀ + b` with one matrix of a packed stack of them, such as an expert's.
///
/// Like [`linear`] with `W = weight[expert]`: that matrix alone is decoded.
///
/// # Shapes
/// - `x`: `[..., in_features]`
/// - `weight`: `[experts, out_features, in_features]`
/// - `bias`: `[out_features]`
/// - returns `[..., out_features]`
///
/// # Errors
/// [`Nf4Error::Shape`] for a weight of another rank or if `x` or `bias` does not fit it,
/// [`Nf4Error::RowRange`] if there is no such expert, [`Nf4Error::Dtype`] unless `x` is f16, bf16
/// or f32.
pub fn expert_linear<const D: usize>(
    x: Tensor<D>,
    weight: &Nf4Weight,
    expert: usize,
    bias: Option<Tensor<1>>,
) -> Result<Tensor<D>, Nf4Error> {
    let &[_, out_features, in_features] = weight.shape() else {
        return Err(Nf4Error::Shape {
            tensor: "weight".into(),
            expected: vec![0; 3],
            given: weight.shape().to_vec(),
        });
    };
    let start = weight.start_of(expert)?;
    let dims = [out_features, in_features];
    linear_at(x, weight, dims, start, bias, MatmulStrategy::Auto)
}

/// The linear map of the matrix whose elements begin at `start`.
fn linear_at<const D: usize>(
    x: Tensor<D>,
    weight: &Nf4Weight,
    [out_features, in_features]: [usize; 2],
    start: usize,
    bias: Option<Tensor<1>>,
    strategy: MatmulStrategy,
) -> Result<Tensor<D>, Nf4Error> {
    let dtype = FloatType::from_dtype(x.dtype(), "x")?;
    let mut shape: Vec<usize> = x.dims().to_vec();
    if shape.last() != Some(&in_features) {
        let given = shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = in_features;
        }
        return Err(Nf4Error::Shape {
            tensor: "x".into(),
            expected: shape,
            given,
        });
    }
    if let Some(bias) = &bias
        && bias.dims() != [out_features]
    {
        return Err(Nf4Error::Shape {
            tensor: "bias".into(),
            expected: vec![out_features],
            given: bias.dims().to_vec(),
        });
    }

    let rows = shape.iter().product::<usize>() / in_features;
    shape[D - 1] = out_features;
    if rows == 0 {
        // Burn's reshape would read the zero as "keep this dimension".
        return Ok(Tensor::zeros(Shape::from(shape), (&x.device(), x.dtype())));
    }
    let transposed = weight.is_transposed();
    let [rows_stored, columns_stored] = match transposed {
        false => [out_features, in_features],
        true => [in_features, out_features],
    };
    let spec = LinearSpec {
        weight: DequantizeSpec {
            layout: *weight.layout(),
            rows: rows_stored,
            columns: columns_stored,
            start,
            dtype,
        },
        strategy,
    };
    if strategy.is_kernel() {
        check_strategy(&x, spec, rows, transposed, bias.is_some())?;
    }
    // CubeCL's relaxed f32 is f32 in memory; a product of the two would come out as f32.
    let given = x.dtype();
    let x = x.reshape([rows, in_features]).cast(DType::from(dtype));
    // Autodiff wants the sum as an operation of its own.
    let fused = match (&bias, MatmulSpec::of(spec, rows)) {
        (Some(bias), Some(fused)) if !transposed && !x.device().is_autodiff() => {
            (bias.dtype() == DType::from(dtype)).then_some(fused)
        }
        _ => None,
    };
    let (x, packed) = (x.into_dispatch(), weight.packed().into_dispatch());
    if let (Some(fused), Some(bias)) = (fused, &bias) {
        let bias = bias.clone().into_dispatch();
        let y = <Dispatch as Nf4Backend>::nf4_matmul_bias(x, packed, bias, fused);
        let y = Tensor::<2>::from_dispatch(y);
        return Ok(y.cast(given).reshape(Shape::from(shape)));
    }
    let y = match transposed {
        false => <Dispatch as Nf4Backend>::nf4_linear(x, packed, spec),
        // With V = Wᵀ stored, x Wᵀ = x V: the product that the other form has as its gradient.
        true => <Dispatch as Nf4Backend>::nf4_linear_backward(x, packed, spec.weight),
    };
    let mut y = Tensor::<2>::from_dispatch(y);
    if let Some(bias) = bias {
        y = y + bias.unsqueeze();
    }
    Ok(y.cast(given).reshape(Shape::from(shape)))
}

/// Checks that a kernel that was asked for can multiply `rows` rows of `x` with a weight.
fn check_strategy<const D: usize>(
    x: &Tensor<D>,
    spec: LinearSpec,
    rows: usize,
    transposed: bool,
    bias: bool,
) -> Result<(), Nf4Error> {
    let fail = |reason: String| {
        Err(Nf4Error::Variant {
            variant: spec.strategy.name(),
            reason,
        })
    };
    if transposed {
        return fail("the weight is stored transposed".into());
    }
    let Some(product) = MatmulSpec::of(spec, rows) else {
        return fail("it takes a whole weight".into());
    };
    let device = x.device().without_autodiff();
    match device.as_dispatch() {
        #[cfg(feature = "cube")]
        DispatchDevice::Cube(device) => {
            super::cube::check_strategy(&device.client(), product, bias)
        }
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => super::flex::check_strategy(spec.strategy),
        _ => fail(format!(
            "{product:?} with bias {bias} is for no device known"
        )),
    }
}
