//! Losses over the rows of logits in parts: the gradients of a part are computed before the next is begun.

use burn::tensor::{DType, Gradients, Int, Tensor};

use super::base::CrossEntropySpec;
use super::linear::{LinearCrossEntropyOptions, LossReduction};
use super::{check_targets, losses, with_gradient};
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::op::tensor::{check_device, connect_empty, tracked_zero};

/// Tensors that the loss has gradients for, beside its input. While parts of it are computed, leaves of graphs of
/// their own are in their places.
#[derive(Default)]
pub(crate) struct Leaves(Vec<Box<dyn Leaf>>);

impl Leaves {
    /// The leaf in the place of a tensor; the tensor itself if it has no graph.
    pub fn leaf<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
        if !tensor.is_tracked() {
            return tensor;
        }
        let leaf = tensor.clone().detach().require_grad();
        self.0.push(Box::new(Summed {
            original: tensor,
            leaf: leaf.clone(),
            sum: None,
        }));
        leaf
    }
}

trait Leaf {
    /// Adds the gradient of a part, in f32.
    fn add(&mut self, gradients: &mut Gradients);

    /// The loss with the sum as its gradient with respect to the original.
    fn connect(self: Box<Self>, loss: Tensor<1>) -> Tensor<1>;
}

struct Summed<const D: usize> {
    original: Tensor<D>,
    leaf: Tensor<D>,
    sum: Option<Tensor<D>>,
}

impl<const D: usize> Leaf for Summed<D> {
    fn add(&mut self, gradients: &mut Gradients) {
        let Some(gradient) = self.leaf.grad_remove(gradients) else {
            return;
        };
        let gradient = gradient.cast(DType::F32);
        self.sum = Some(match self.sum.take() {
            Some(sum) => sum + gradient,
            None => gradient,
        });
    }

    fn connect(self: Box<Self>, loss: Tensor<1>) -> Tensor<1> {
        let Self { original, sum, .. } = *self;
        match sum {
            Some(sum) => with_gradient(loss, original, sum),
            None => connect_empty(loss, tracked_zero(original)),
        }
    }
}

/// The loss of rows whose logits are computed in parts.
pub(crate) struct ChunkedLoss<'a> {
    /// `[rows, hidden]`.
    pub x: Tensor<2>,
    /// `[rows]`.
    pub targets: Tensor<1, Int>,
    /// Logits of a row.
    pub vocabulary: usize,
    pub options: &'a LinearCrossEntropyOptions,
}

impl ChunkedLoss<'_> {
    /// # Errors
    /// Those of [`cross_entropy`](super::cross_entropy).
    pub fn check(&self) -> Result<FloatType, Nf4Error> {
        let dtype = FloatType::from_dtype(self.x.dtype(), "x")?;
        let [rows, _] = self.x.dims();
        check_targets(&self.targets, rows, self.vocabulary, &self.options.loss)?;
        check_device("targets", &self.targets.device(), &self.x.device())?;
        Ok(dtype)
    }

    /// Rows of each part but the last: as many as the bytes allow, in parts that are about alike.
    pub fn rows_of_a_chunk(&self) -> usize {
        let [rows, _] = self.x.dims();
        let row_bytes = self.vocabulary * self.x.dtype().size();
        let most = (self.options.chunk_bytes / row_bytes).max(1);
        let chunks = rows.div_ceil(most).max(1);
        rows.div_ceil(chunks).max(1)
    }

    /// The sum or mean, `[1]`.
    ///
    /// - `logits`: of some of the rows, `[.., hidden]`, those of the vocabulary, in whatever float type. Whatever
    ///   is to have a gradient in it is one of the `leaves`.
    ///
    /// # Errors
    /// Those of [`check`](Self::check) and of `logits`.
    pub fn compute(
        self,
        mut leaves: Leaves,
        logits: impl Fn(Tensor<2>) -> Result<Tensor<2>, Nf4Error>,
    ) -> Result<Tensor<1>, Nf4Error> {
        self.check()?;
        let [rows, _] = self.x.dims();
        let chunk = self.rows_of_a_chunk();
        let Self {
            x,
            targets,
            vocabulary,
            options,
        } = self;
        let of_x = x.is_tracked();
        let values = x.clone().detach().set_require_grad(false);
        let mut loss = Tensor::<1>::zeros([1], (&x.device(), DType::F32));
        let mut gradients_of_x = Vec::new();
        for start in (0..rows).step_by(chunk) {
            let count = chunk.min(rows - start);
            let part = values.clone().narrow(0, start, count);
            let part = match of_x {
                true => part.require_grad(),
                false => part,
            };
            let logits = logits(part.clone())?;
            let spec = CrossEntropySpec {
                rows: count,
                vocabulary,
                options: options.loss,
                dtype: FloatType::from_dtype(logits.dtype(), "logits")?,
                is_root: true,
            };
            let sum = losses(logits, targets.clone().narrow(0, start, count), spec).sum();
            if sum.is_tracked() {
                let mut gradients = sum.backward();
                gradients_of_x.extend(part.grad_remove(&mut gradients));
                leaves
                    .0
                    .iter_mut()
                    .for_each(|leaf| leaf.add(&mut gradients));
            }
            loss = loss + sum.detach();
        }
        for leaf in leaves.0 {
            loss = leaf.connect(loss);
        }
        let loss = match (of_x, rows) {
            (false, _) => loss,
            (true, 0) => connect_empty(loss, tracked_zero(x)),
            (true, _) => with_gradient(loss, x, Tensor::cat(gradients_of_x, 0)),
        };
        Ok(match options.reduction {
            LossReduction::Sum => loss,
            LossReduction::Mean => mean(loss, targets, options.loss.ignore_index),
        })
    }
}

/// As PyTorch has it: NaN without a row that counts, whose gradients are zeros.
fn mean(sum: Tensor<1>, targets: Tensor<1, Int>, ignored: i32) -> Tensor<1> {
    let counted = match targets.dims() {
        // Devices have no sum of nothing.
        [0] => Tensor::zeros([1], &targets.device()),
        _ => targets.not_equal_elem(ignored).int().sum(),
    };
    let none = counted.clone().equal_elem(0);
    let count = counted.clamp_min(1).float().cast(DType::F32);
    (sum / count).mask_fill(none, f32::NAN)
}
