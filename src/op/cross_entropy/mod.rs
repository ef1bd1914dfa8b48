//! Cross-entropy of logits, and of the output of a linear map whose logits are never held all at once.

mod base;
mod chunks;
mod linear;

use burn::backend::Dispatch;
use burn::tensor::{DType, Int, Tensor};

pub use base::{CrossEntropyBackend, CrossEntropySpec};
pub(crate) use chunks::{ChunkedLoss, Leaves};
pub use linear::{LinearCrossEntropyOptions, LossReduction, linear_cross_entropy};

use super::tensor::{check_device, connect_empty, tracked_zero};
use crate::cross_entropy::CrossEntropyOptions;
use crate::error::Nf4Error;
use crate::format::{FloatType, check_shape};

/// The cross-entropy of each row, in f32 whatever the type of the logits. Where a gradient is wanted it is
/// computed at once, in the place of the logits if nobody else holds them.
///
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use burn_nf4::op::{CrossEntropyOptions, cross_entropy};
///
/// let device = Device::default();
/// let logits = Tensor::<2>::from_floats([[2.0, 1.0, 0.0], [0.0, 5.0, 1.0]], &device);
/// let targets = Tensor::<1, Int>::from_ints([0, -100], &device);
/// let loss = cross_entropy(logits, targets, &CrossEntropyOptions::default())?;
/// loss.into_data().assert_approx_eq::<f32>(&[0.407606, 0.0].into(), Default::default());
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Shapes
/// - `logits`: `[rows, vocabulary]`
/// - `targets`: `[rows]`, and so the result
///
/// A target that is neither a logit's number nor the one to be ignored is an error on the CPU (Flex), and a loss
/// and gradients of NaN elsewhere.
///
/// # Errors
/// [`Nf4Error::Shape`] for targets that do not fit, [`Nf4Error::Dtype`] unless the logits are f16, bf16 or f32 and
/// the targets i32 or i64, [`Nf4Error::Config`] for options that make no sense, [`Nf4Error::ElementCount`] for
/// rows of no logits or more than 2^31 - 1, [`Nf4Error::Device`] unless both are on one device, and
/// [`Nf4Error::IdRange`] as above.
pub fn cross_entropy(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    options: &CrossEntropyOptions,
) -> Result<Tensor<1>, Nf4Error> {
    let dtype = FloatType::from_dtype(logits.dtype(), "logits")?;
    let [rows, vocabulary] = logits.dims();
    check_targets(&targets, rows, vocabulary, options)?;
    check_device("targets", &targets.device(), &logits.device())?;
    if rows == 0 {
        let loss = Tensor::zeros([0], (&logits.device(), DType::F32));
        return Ok(connect_empty(loss, tracked_zero(logits)));
    }
    let spec = CrossEntropySpec {
        rows,
        vocabulary,
        options: *options,
        dtype,
        is_root: false,
    };
    Ok(losses(logits, targets, spec))
}

/// The loss of each row of a problem that was checked.
fn losses(logits: Tensor<2>, targets: Tensor<1, Int>, spec: CrossEntropySpec) -> Tensor<1> {
    // CubeCL's relaxed f32 is f32 in memory.
    let logits = logits.cast(DType::from(spec.dtype)).into_dispatch();
    let losses =
        <Dispatch as CrossEntropyBackend>::cross_entropy(logits, targets.into_dispatch(), spec);
    Tensor::from_dispatch(losses)
}

/// `value`, whose gradient with respect to `parent` is `gradient`.
fn with_gradient<const D: usize>(
    value: Tensor<1>,
    parent: Tensor<D>,
    gradient: Tensor<D>,
) -> Tensor<1> {
    let (parent, gradient) = (parent.into_dispatch(), gradient.into_dispatch());
    let value = value.into_dispatch();
    Tensor::from_dispatch(<Dispatch as CrossEntropyBackend>::with_gradient(
        value, parent, gradient,
    ))
}

fn check_targets(
    targets: &Tensor<1, Int>,
    rows: usize,
    vocabulary: usize,
    options: &CrossEntropyOptions,
) -> Result<(), Nf4Error> {
    options.check()?;
    check_shape("targets", &[rows], &targets.dims())?;
    if !matches!(targets.dtype(), DType::I32 | DType::I64) {
        return Err(Nf4Error::Dtype {
            tensor: "targets".into(),
            expected: "i32 or i64".into(),
            given: format!("{:?}", targets.dtype()),
        });
    }
    if vocabulary == 0 || i32::try_from(vocabulary).is_err() {
        return Err(Nf4Error::ElementCount {
            tensor: "logits".into(),
            shape: vec![rows, vocabulary],
        });
    }
    #[cfg(feature = "flex")]
    super::backends::flex::check_ids("targets", targets, vocabulary, Some(options.ignore_index))?;
    Ok(())
}
