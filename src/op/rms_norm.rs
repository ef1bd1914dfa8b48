//! Root-mean-square normalisation (arXiv 1910.07467).

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{DType, Shape, Tensor};

use super::tensor::{check_device, check_dtype};
use crate::error::Nf4Error;
use crate::format::{FloatType, check_shape};
use crate::norm_form::NormForm;

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;

/// How rows are normalised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmsNormSpec {
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub size: usize,
    /// Added to the mean of the squares.
    pub eps: f64,
    /// How the weight is applied.
    pub form: NormForm,
    /// Type of all tensors.
    pub dtype: FloatType,
}

impl RmsNormSpec {
    /// Shape of what is normalised.
    pub fn shape(&self) -> Shape {
        Shape::from([self.rows, self.size])
    }
}

/// Normalisation of a backend: by one kernel on CubeCL, by `host` on Flex.
#[backend_extension(
    Autodiff,
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait RmsNormBackend: Backend {
    /// `x / rms(x) * weight` of each row.
    ///
    /// # Shapes
    /// - `x`: [`RmsNormSpec::shape`], and so the result; `weight`: `[size]`
    #[fusion(meta = |x: &TensorSpec, _weight: &TensorSpec, spec: &RmsNormSpec| {
        TensorSpec::new(spec.shape(), x.dtype)
    })]
    fn rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        spec: RmsNormSpec,
    ) -> FloatTensor<Self>;

    /// `x + y`, and [`rms_norm`](Self::rms_norm) of it.
    ///
    /// # Shapes
    /// - `x`, `y`: [`RmsNormSpec::shape`], and so the results
    #[fusion(meta = |x: &TensorSpec, _y: &TensorSpec, _weight: &TensorSpec, spec: &RmsNormSpec| {
        let like_x = TensorSpec::new(spec.shape(), x.dtype);
        (like_x.clone(), like_x)
    })]
    fn add_rms_norm(
        x: FloatTensor<Self>,
        y: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        spec: RmsNormSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let sum = Self::float_add(x, y);
        (sum.clone(), Self::rms_norm(sum, weight, spec))
    }

    /// `x`, to go past the norm, and [`rms_norm`](Self::rms_norm) of it.
    ///
    /// # Shapes
    /// - `x`: [`RmsNormSpec::shape`], and so the results
    #[fusion(default)]
    fn rms_norm_beside(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        spec: RmsNormSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        (x.clone(), Self::rms_norm(x, weight, spec))
    }

    /// The gradient of `x` in [`rms_norm`](Self::rms_norm).
    ///
    /// # Shapes
    /// - `x`, `grad`: [`RmsNormSpec::shape`], and so the result
    #[fusion(meta = |x: &TensorSpec, _weight: &TensorSpec, _grad: &TensorSpec, spec: &RmsNormSpec| {
        TensorSpec::new(spec.shape(), x.dtype)
    })]
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        spec: RmsNormSpec,
    ) -> FloatTensor<Self> {
        gradient_of_x::<Self>(x, weight, grad, spec)
    }

    /// That gradient and `residual`, the one that comes past the norm.
    ///
    /// # Shapes
    /// - `residual`: [`RmsNormSpec::shape`]
    #[fusion(meta = |
        x: &TensorSpec,
        _weight: &TensorSpec,
        _grad: &TensorSpec,
        _residual: &TensorSpec,
        spec: &RmsNormSpec,
    | { TensorSpec::new(spec.shape(), x.dtype) })]
    fn rms_norm_backward_add(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        spec: RmsNormSpec,
    ) -> FloatTensor<Self> {
        Self::float_add(Self::rms_norm_backward(x, weight, grad, spec), residual)
    }
}

/// What norms are made of, in f32.
struct Normed<B: Backend> {
    /// `[rows, size]`: rows of a mean square of one.
    values: FloatTensor<B>,
    /// `[rows, 1]`: what rows were multiplied by.
    scale: FloatTensor<B>,
}

fn normed<B: Backend>(x: FloatTensor<B>, eps: f64) -> Normed<B> {
    let x = B::float_cast(x, DType::F32.into());
    let mean = B::float_mean_dim(B::float_mul(x.clone(), x.clone()), 1);
    let scale = B::float_recip(B::float_sqrt(B::float_add_scalar(mean, eps.into())));
    Normed {
        values: B::float_mul(x, scale.clone()),
        scale,
    }
}

/// The factors of the values, `[1, size]`, f32.
fn factors<B: Backend>(weight: FloatTensor<B>, spec: RmsNormSpec) -> FloatTensor<B> {
    let weight = B::float_cast(weight, DType::F32.into());
    let weight = B::float_reshape(weight, Shape::from([1, spec.size]));
    match spec.form {
        NormForm::CastThenWeight | NormForm::WeightThenCast => weight,
        NormForm::OnePlusWeight => B::float_add_scalar(weight, 1.0.into()),
    }
}

/// With `n` the normalised row, `w` the factors and `s` the scale: `s (g w - n mean(g w n))`.
fn gradient_of_x<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    spec: RmsNormSpec,
) -> FloatTensor<B> {
    let dtype = x.dtype();
    let Normed { values, scale } = normed::<B>(x, spec.eps);
    let grad = B::float_cast(grad, DType::F32.into());
    let weighted = B::float_mul(grad, factors::<B>(weight, spec));
    let along = B::float_mean_dim(B::float_mul(weighted.clone(), values.clone()), 1);
    let across = B::float_sub(weighted, B::float_mul(values, along));
    B::float_cast(B::float_mul(across, scale), dtype.into())
}

/// The sum of `g n` over the rows.
pub(super) fn gradient_of_weight<B: Backend>(
    x: FloatTensor<B>,
    grad: FloatTensor<B>,
    spec: RmsNormSpec,
) -> FloatTensor<B> {
    let dtype = x.dtype();
    let Normed { values, .. } = normed::<B>(x, spec.eps);
    let grad = B::float_cast(grad, DType::F32.into());
    let sum = B::float_sum_dim(B::float_mul(grad, values), 0);
    let sum = B::float_reshape(sum, Shape::from([spec.size]));
    B::float_cast(sum, dtype.into())
}

/// `x / rms(x) * weight` over the last axis, in f32 inside whatever the type: `rms(x)` is the root of the mean
/// of the squares and `eps`. The gradient flows to `x` and the weight.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use burn_nf4::op::{NormForm, rms_norm};
///
/// let device = Device::default();
/// let x = Tensor::<2>::from_floats([[3.0, 4.0]], &device);
/// let y = rms_norm(x, Tensor::ones([2], &device), 0.0, NormForm::CastThenWeight)?;
/// y.into_data().assert_approx_eq::<f32>(&[[0.8485281, 1.1313709]].into(), Default::default());
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Shapes
/// - `x`: `[.., size]`, and so the result; `weight`: `[size]`
///
/// # Errors
/// [`Nf4Error::Shape`] for a weight that does not fit, [`Nf4Error::Dtype`] unless both are of one type, f16,
/// bf16 or f32, [`Nf4Error::Device`] unless both are on one device.
pub fn rms_norm<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    eps: f64,
    form: NormForm,
) -> Result<Tensor<D>, Nf4Error> {
    let shape = x.shape();
    let spec = check(&x, &weight, eps, form)?;
    if shape.num_elements() == 0 {
        return Ok(x);
    }
    let rows = x.reshape([spec.rows, spec.size]).into_dispatch();
    let y = <Dispatch as RmsNormBackend>::rms_norm(rows, weight.into_dispatch(), spec);
    Ok(Tensor::<2>::from_dispatch(y).reshape(shape))
}

/// `x + y`, and [`rms_norm`] of it: what stands between two blocks of a model.
///
/// # Shapes
/// - `x`, `y`: `[.., size]`, and so the results; `weight`: `[size]`
///
/// # Errors
/// Those of [`rms_norm`], for `y` too.
pub fn add_rms_norm<const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    weight: Tensor<1>,
    eps: f64,
    form: NormForm,
) -> Result<(Tensor<D>, Tensor<D>), Nf4Error> {
    let shape = x.shape();
    let spec = check(&x, &weight, eps, form)?;
    check_shape("y", &x.dims(), &y.dims())?;
    check_dtype("y", &y, "as x", &[x.dtype()])?;
    check_device("y", &y.device(), &x.device())?;
    if shape.num_elements() == 0 {
        return Ok((x, y));
    }
    let [x, y] = [x, y].map(|tensor| tensor.reshape([spec.rows, spec.size]).into_dispatch());
    let (sum, normed) =
        <Dispatch as RmsNormBackend>::add_rms_norm(x, y, weight.into_dispatch(), spec);
    let back = |tensor| Tensor::<2>::from_dispatch(tensor).reshape(shape.clone());
    Ok((back(sum), back(normed)))
}

/// `x`, to go past the norm, and [`rms_norm`] of it. The gradients that come back by both ways are added in one
/// operation, which two uses of `x` would not have.
///
/// # Shapes
/// - `x`: `[.., size]`, and so the results; `weight`: `[size]`
///
/// # Errors
/// Those of [`rms_norm`].
pub fn rms_norm_beside<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    eps: f64,
    form: NormForm,
) -> Result<(Tensor<D>, Tensor<D>), Nf4Error> {
    let shape = x.shape();
    let spec = check(&x, &weight, eps, form)?;
    if shape.num_elements() == 0 {
        return Ok((x.clone(), x));
    }
    let x = x.reshape([spec.rows, spec.size]).into_dispatch();
    let (x, normed) =
        <Dispatch as RmsNormBackend>::rms_norm_beside(x, weight.into_dispatch(), spec);
    let back = |tensor| Tensor::<2>::from_dispatch(tensor).reshape(shape.clone());
    Ok((back(x), back(normed)))
}

fn check<const D: usize>(
    x: &Tensor<D>,
    weight: &Tensor<1>,
    eps: f64,
    form: NormForm,
) -> Result<RmsNormSpec, Nf4Error> {
    let size = x.dims()[D - 1];
    check_shape("weight", &[size], &weight.dims())?;
    let dtype = FloatType::from_dtype(x.dtype(), "x")?;
    check_dtype("weight", weight, "as x", &[x.dtype()])?;
    check_device("weight", &weight.device(), &x.device())?;
    Ok(RmsNormSpec {
        rows: x.shape().num_elements() / size.max(1),
        size,
        eps,
        form,
        dtype,
    })
}
