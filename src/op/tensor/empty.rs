//! Results without elements, which no kernel computes.

use burn::tensor::{Int, Tensor};

/// A result without elements, connected to the graph through sums of all that has a part in it: the
/// gradients of those are zeros.
pub(crate) fn connect_empty<const D: usize>(
    y: Tensor<D>,
    operands: impl IntoIterator<Item = Tensor<1>>,
) -> Tensor<D> {
    let dtype = y.dtype();
    let operands = operands.into_iter();
    operands.fold(y, |y, sum| y + sum.cast(dtype).unsqueeze() * 0.0)
}

/// The sum of a tensor that can have a graph.
pub(in crate::op) fn tracked_sum<const D: usize>(tensor: Tensor<D>) -> Option<Tensor<1>> {
    tensor.device().is_autodiff().then(|| tensor.sum())
}

/// A zero in place of the sum of a tensor that can have a graph: whatever the tensor holds, NaN too, and
/// whatever gradient comes, the tensor's is zeros.
pub(in crate::op) fn tracked_zero<const D: usize>(tensor: Tensor<D>) -> Option<Tensor<1>> {
    if tensor.shape().num_elements() == 0 {
        return tracked_sum(tensor);
    }
    tensor.device().is_autodiff().then(|| {
        let all = Tensor::<D, Int>::ones(tensor.shape(), &tensor.device()).bool();
        tensor.mask_fill(all, 0.0).sum()
    })
}
