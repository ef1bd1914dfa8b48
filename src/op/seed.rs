//! Backward passes that begin with given gradients.

use burn::backend::Dispatch;
use burn::tensor::{Gradients, Tensor};

use super::base::{MatmulStrategy, QuantBackend};
use super::tensor::{BlockWeight, LowRank, check_device, check_dtype, lora_linear};
use crate::error::Nf4Error;
use crate::format::check_shape;

/// Where a backward pass begins: tensors with the gradients that they have from elsewhere, as when a layer is
/// computed again for its gradients alone.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use burn_nf4::op::Seed;
///
/// let device = Device::default().autodiff();
/// let x = Tensor::<1>::from_floats([1.0, 2.0], &device).require_grad();
/// let y = x.clone().powf_scalar(2.0);
/// let from_above = Tensor::from_floats([3.0, 5.0], &device.without_autodiff());
/// let gradients = Seed::of(y, from_above)?.backward();
/// let gradient = x.grad(&gradients).expect("there is a path to x");
/// gradient.into_data().assert_approx_eq::<f32>(&[6.0, 20.0].into(), Default::default());
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Seed(Tensor<1>);

impl Seed {
    /// `y` has the gradient `grad`.
    ///
    /// # Shapes
    /// - `grad`: that of `y`
    ///
    /// # Errors
    /// [`Nf4Error::Shape`], [`Nf4Error::Dtype`] and [`Nf4Error::Device`] unless both are alike.
    pub fn of<const D: usize>(y: Tensor<D>, grad: Tensor<D>) -> Result<Self, Nf4Error> {
        check_shape("grad", &y.dims(), &grad.dims())?;
        check_dtype("grad", &grad, "as y", &[y.dtype()])?;
        let grad = with_autodiff_of(&y, grad);
        check_device("grad", &grad.device(), &y.device())?;
        let zero =
            <Dispatch as QuantBackend>::gradient_seed(y.into_dispatch(), grad.into_dispatch());
        Ok(Self(Tensor::from_dispatch(zero)))
    }

    /// The result of [`lora_linear`] has the gradient `grad`. Where cuBLASLt computes it, or Flex in
    /// f32, the result itself is not computed.
    ///
    /// # Shapes
    /// - `grad`: `[..., out_features]`
    ///
    /// # Errors
    /// Those of [`lora_linear`], and of [`of`](Self::of).
    pub fn of_lora_linear<const D: usize>(
        x: Tensor<D>,
        weight: &BlockWeight,
        bias: Option<Tensor<1>>,
        branch: LowRank,
        strategy: MatmulStrategy,
        grad: Tensor<D>,
    ) -> Result<Self, Nf4Error> {
        if bias.is_none()
            && let Some(spec) = branch.trained_spec(&x, weight, None, strategy)?
        {
            let [n, k] = weight.matrix_dims()?;
            let mut shape = x.dims();
            shape[D - 1] = n;
            check_shape("grad", &shape, &grad.dims())?;
            check_dtype("grad", &grad, "as x", &[x.dtype()])?;
            let grad = with_autodiff_of(&x, grad);
            check_device("grad", &grad.device(), &x.device())?;
            let zero = <Dispatch as QuantBackend>::quant_lora_seed(
                x.reshape([spec.matmul.m, k]).into_dispatch(),
                weight.checked_packed()?.into_dispatch(),
                branch.a.into_dispatch(),
                branch.b.into_dispatch(),
                grad.reshape([spec.matmul.m, n]).into_dispatch(),
                spec,
            );
            return Ok(Self(Tensor::from_dispatch(zero)));
        }
        Self::of(lora_linear(x, weight, bias, branch, strategy)?, grad)
    }

    /// Both. One seed twice counts once.
    pub fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// The gradients of all that the tensors come from.
    ///
    /// # Panics
    /// If none of them comes from a tensor that wants a gradient, as [`Tensor::backward`].
    pub fn backward(self) -> Gradients {
        self.0.backward()
    }
}

/// A gradient as a constant on the device of what it is for.
fn with_autodiff_of<const D: usize>(y: &Tensor<D>, grad: Tensor<D>) -> Tensor<D> {
    match (y.device().is_autodiff(), grad.device().is_autodiff()) {
        (true, false) => grad.autodiff(),
        _ => grad,
    }
}
