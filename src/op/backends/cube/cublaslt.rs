//! Products of dense matrices on CUDA, by cuBLASLt.

use burn::backend::TensorMetadata;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl_environment::stream::StreamId;

use crate::error::Nf4Error;
use crate::launch::{DenseOperands, DensePlan, DenseProduct, MatrixLayout};
use crate::op::base::{DenseSpec, add_bias, composed_matmul};

/// `C + s A B + b`; in the place of `C` if nobody else holds it. What cuBLASLt cannot compute is Burn's.
///
/// # Panics
/// If the device has no cuBLASLt: whoever asks for it has checked.
pub(super) fn product(
    lhs: CubeTensor,
    rhs: CubeTensor,
    addend: Option<CubeTensor>,
    bias: Option<CubeTensor>,
    spec: DenseSpec,
) -> CubeTensor {
    let (lhs, lhs_layout) = matrices(lhs, spec.transpose_lhs);
    let (rhs, rhs_layout) = matrices(rhs, spec.transpose_rhs);
    let addend = addend.map(into_contiguous);
    let bias = bias.map(into_contiguous);
    let product = DenseProduct {
        batch: spec.batch.unwrap_or(1),
        lhs: lhs_layout,
        rhs: rhs_layout,
        tf32: spec.tf32,
        bias: bias.is_some(),
        ..DenseProduct::new(spec.m, spec.n, spec.k, spec.dtype)
    };
    let plan = match DensePlan::new(&lhs.client, product) {
        Ok(plan) => plan,
        Err(error @ Nf4Error::Library { .. }) => panic!("{error}"),
        Err(error) => {
            log::debug!("by Burn: {error}");
            let mut y = composed_matmul::<CubeBackend>(lhs, rhs, spec);
            if let Some(bias) = bias {
                y = add_bias::<CubeBackend>(y, bias);
            }
            return match addend {
                Some(addend) => CubeBackend::float_add(addend, y),
                None => y,
            };
        }
    };
    let out = match &addend {
        // What this stream writes has to be of this stream, or others would not wait for it.
        Some(addend) if addend.can_mut() && addend.handle.stream == StreamId::current() => {
            addend.handle.clone()
        }
        _ => lhs.client.empty(plan.out_bytes()),
    };
    let operands = DenseOperands {
        lhs: lhs.handle,
        rhs: rhs.handle,
        scale: spec.scale,
        addend: addend.map(|addend| addend.handle),
        bias: bias.map(|bias| bias.handle),
    };
    plan.launch(operands, out.clone())
        .expect("arguments were validated");
    let dtype = DType::from(spec.dtype);
    CubeTensor::new_contiguous(lhs.client, lhs.device, spec.out_shape(), out, dtype)
}

/// Matrices in a form that cuBLASLt takes, where they lie if they have one: rows, or columns, with
/// neighbouring elements.
fn matrices(tensor: CubeTensor, transposed: bool) -> (CubeTensor, MatrixLayout) {
    let rank = tensor.shape().rank();
    let layout_of = |tensor: &CubeTensor| {
        let (shape, strides) = (tensor.shape(), tensor.meta.strides().to_vec());
        let [rows, columns] = [shape[rank - 2], shape[rank - 1]];
        let [row, column] = [strides[rank - 2], strides[rank - 1]];
        let batch_stride = match rank > 2 && shape[0] > 1 {
            true => strides[0],
            false => 0,
        };
        let (stored_transposed, leading) = match (row, column) {
            (row, 1) if row >= columns => (false, row),
            (1, column) if column >= rows => (true, column),
            _ => return None,
        };
        Some(MatrixLayout {
            transposed: transposed != stored_transposed,
            leading,
            batch_stride,
        })
    };
    if let Some(layout) = layout_of(&tensor) {
        return (tensor, layout);
    }
    let tensor = into_contiguous(tensor);
    let layout = layout_of(&tensor).expect("contiguous rows");
    (tensor, layout)
}
