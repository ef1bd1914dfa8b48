//! The cross-entropy of a linear map with a dense weight.

use burn::tensor::{DType, Int, Tensor};

use super::chunks::{ChunkedLoss, Leaves};
use crate::cross_entropy::CrossEntropyOptions;
use crate::error::Nf4Error;
use crate::format::{FloatType, check_shape};
use crate::op::tensor::{MatmulOptions, check_device, check_dtype, matmul};

/// What becomes of the losses of all rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LossReduction {
    /// Their sum.
    Sum,
    /// Their sum over the number of rows that are not ignored; NaN if there are none, as in PyTorch, with
    /// gradients of zeros.
    #[default]
    Mean,
}

/// How [`linear_cross_entropy`] is computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinearCrossEntropyOptions {
    /// The loss of a row.
    pub loss: CrossEntropyOptions,
    /// What becomes of the losses of all rows.
    pub reduction: LossReduction,
    /// Most bytes of logits that are held at once, if that is a row at least. Fewer make products of fewer rows,
    /// which are slower at some point.
    pub chunk_bytes: usize,
}

impl LinearCrossEntropyOptions {
    /// 128 MiB: some 500 rows of 16 bit with a vocabulary of 128,256.
    pub const DEFAULT_CHUNK_BYTES: usize = 128 << 20;
}

impl Default for LinearCrossEntropyOptions {
    fn default() -> Self {
        Self {
            loss: CrossEntropyOptions::default(),
            reduction: LossReduction::default(),
            chunk_bytes: Self::DEFAULT_CHUNK_BYTES,
        }
    }
}

/// The cross-entropy of `x Wᵀ + b`, without ever holding all of these logits: what takes most of the memory of
/// a training step otherwise.
///
/// The rows go through in parts of [`chunk_bytes`](LinearCrossEntropyOptions::chunk_bytes) of logits. Where `x`,
/// the weight or the bias has a graph, gradients are computed along with the loss, in the place of the logits, and
/// the backward pass only multiplies them by the gradient that comes; those of the weight and the bias are summed
/// up in f32. So Liger does it (arXiv 2410.10989). Products are those of [`matmul`](crate::op::matmul), in the
/// type of `x`; the rest is in f32.
///
/// There are no gradients of these gradients.
///
/// ```
/// use burn::tensor::{Device, Distribution, Int, Tensor};
/// use burn_nf4::op::{LinearCrossEntropyOptions, linear_cross_entropy};
///
/// let device = Device::default().autodiff();
/// let x = Tensor::<2>::random([6, 32], Distribution::Default, &device).require_grad();
/// let head = Tensor::<2>::random([100, 32], Distribution::Default, &device);
/// let targets = Tensor::<1, Int>::from_ints([5, 99, -100, 0, 17, 3], &device);
/// let options = LinearCrossEntropyOptions::default();
/// let loss = linear_cross_entropy(x.clone(), head, None, targets, &options)?;
/// let gradients = loss.backward();
/// assert!(x.grad(&gradients).is_some());
/// # Ok::<(), burn_nf4::Nf4Error>(())
/// ```
///
/// # Shapes
/// - `x`: `[rows, hidden]`
/// - `weight`: `[vocabulary, hidden]`, of the dtype of `x`, or where that is f32 of f16 or bf16 too; a view of its
///   transpose is not copied on CUDA with cuBLASLt
/// - `bias`: `[vocabulary]`, of the dtype of `x`
/// - `targets`: `[rows]`
/// - returns `[1]`, f32
///
/// For heads in other forms, in 4 bit or with a low-rank branch, there is
/// [`nn::linear_cross_entropy`](crate::nn::linear_cross_entropy).
///
/// # Errors
/// [`Nf4Error::Shape`] for shapes that do not fit, [`Nf4Error::Dtype`] for dtypes that do not, [`Nf4Error::Device`]
/// unless all are on one device, those of [`cross_entropy`](super::cross_entropy) for targets and options, and those
/// of [`matmul`](crate::op::matmul) where cuBLASLt was asked for and cannot be used.
pub fn linear_cross_entropy(
    x: Tensor<2>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    targets: Tensor<1, Int>,
    options: &LinearCrossEntropyOptions,
) -> Result<Tensor<1>, Nf4Error> {
    let [vocabulary, _] = weight.dims();
    let [_, hidden] = x.dims();
    let device = x.device();
    FloatType::from_dtype(x.dtype(), "x")?;
    check_shape("weight", &[vocabulary, hidden], &weight.dims())?;
    let of_weight: &[DType] = match x.dtype() {
        DType::F32 => &[DType::F32, DType::F16, DType::BF16],
        _ => &[x.dtype()],
    };
    check_dtype("weight", &weight, "as x", of_weight)?;
    check_device("weight", &weight.device(), &device)?;
    if let Some(bias) = &bias {
        check_shape("bias", &[vocabulary], &bias.dims())?;
        check_dtype("bias", bias, "as x", &[x.dtype()])?;
        check_device("bias", &bias.device(), &device)?;
    }
    // Once, and not for each part.
    let weight = match weight.dtype() == x.dtype() {
        true => weight,
        false => weight.cast(x.dtype()),
    };
    let mut leaves = Leaves::default();
    let weight = leaves.leaf(weight);
    let bias = bias.map(|bias| leaves.leaf(bias));
    let loss = ChunkedLoss {
        x,
        targets,
        vocabulary,
        options,
    };
    loss.compute(leaves, |x| {
        matmul(
            x,
            weight.clone(),
            bias.clone(),
            MatmulOptions::TRANSPOSE_RHS,
        )
    })
}
