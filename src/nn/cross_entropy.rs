//! The cross-entropy of a head in whatever form.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Int, Tensor};

use super::AnyLinear;
use crate::error::Nf4Error;
use crate::format::{FloatType, check_shape};
use crate::op::{ChunkedLoss, Leaves, LinearCrossEntropyOptions};

/// The cross-entropy of the output of a head, without ever holding all of its logits, as
/// [`op::linear_cross_entropy`](crate::op::linear_cross_entropy) computes it.
///
/// Whatever parameter of the head is trained gets its gradient: weight, bias, the matrices of a branch, also by
/// way of a reparameterization of Burn's. A weight in 4 bit is decoded once for all parts if there are more than
/// one; dropout on a branch draws anew for each part.
///
/// # Shapes
/// - `x`: `[rows, d_input]`
/// - `targets`: `[rows]`
/// - returns `[1]`, f32
///
/// # Errors
/// Those of [`op::cross_entropy`](crate::op::cross_entropy) for targets and options, [`Nf4Error::Shape`] or
/// [`Nf4Error::Dtype`] if `x` does not fit the head, and those of [`AnyLinear::dequantize`].
///
/// # Panics
/// Where [`AnyLinear::forward`] does.
pub fn linear_cross_entropy(
    head: &AnyLinear,
    x: Tensor<2>,
    targets: Tensor<1, Int>,
    options: &LinearCrossEntropyOptions,
) -> Result<Tensor<1>, Nf4Error> {
    let [vocabulary, hidden] = head.dims();
    let [rows, _] = x.dims();
    check_shape("x", &[rows, hidden], &x.dims())?;
    let loss = ChunkedLoss {
        x,
        targets,
        vocabulary,
        options,
    };
    let dtype = loss.check()?;
    // One that Burn has quantized has no such type, and is multiplied by Burn.
    if let (false, Ok(of_head)) = (head.is_quantized(), head.dtype())
        && of_head != dtype
        && dtype != FloatType::F32
    {
        return Err(Nf4Error::Dtype {
            tensor: "x".into(),
            expected: format!("{:?} as the head", DType::from(of_head)),
            given: format!("{:?}", loss.x.dtype()),
        });
    }
    let mut leaves = Leaves::default();
    let mut head = head.clone().map(&mut IntoLeaves(&mut leaves));
    if loss.rows_of_a_chunk() < rows {
        head = head.dequantize(dtype)?;
    }
    loss.compute(leaves, |x| Ok(head.forward(x)))
}

/// Puts leaves in the places of parameters.
struct IntoLeaves<'a>(&'a mut Leaves);

impl ModuleMapper for IntoLeaves<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| self.0.leaf(tensor))
    }
}
