//! Products of many rows on Flex, by `host`.

use burn::tensor::Shape;
use burn_flex::FlexTensor;

use super::flex::tensor_of;
use crate::format::FloatType;
use crate::host::{self, Gemm, PackedMatrix, Right, Simd, Strided};
use crate::op::base::{DenseSpec, DequantizeSpec};

/// Rows up to which products are another's: a vector holds as many rows, and would be empty in part.
pub(super) const FEW_ROWS: usize = 8;

/// Whether a product of dense matrices is computed here.
pub(super) fn takes(spec: &DenseSpec) -> bool {
    let sizes = [spec.m, spec.n, spec.k];
    let batches = spec.batch.is_none_or(|batch| batch == 1);
    spec.dtype == FloatType::F32 && batches && spec.m > FEW_ROWS && !sizes.contains(&0)
}

/// `C + s A B`, in the place of `C`, or without `C` `s A B`.
pub(super) fn dense(
    addend: Option<FlexTensor>,
    lhs: FlexTensor,
    rhs: FlexTensor,
    spec: DenseSpec,
) -> FlexTensor {
    let [lhs, rhs] = [lhs, rhs].map(in_place);
    let left = strided(&lhs, spec.transpose_lhs);
    let right = Right::Dense(strided(&rhs, spec.transpose_rhs));
    let sizes = [spec.m, spec.n, spec.k];
    multiply(addend, left, right, sizes, spec.scale, spec.out_shape())
}

/// `C + x Wᵀ`, in the place of `C`, or without `C` `x Wᵀ`; without `transpose` `x W`.
pub(super) fn packed(
    addend: Option<FlexTensor>,
    x: FlexTensor,
    packed: &FlexTensor,
    weight: DequantizeSpec,
    transpose: bool,
) -> FlexTensor {
    let (x, packed) = (in_place(x), packed.to_contiguous());
    let [m, k] = x.layout().shape().dims();
    let n = match transpose {
        true => weight.rows,
        false => weight.columns,
    };
    let right = Right::Packed(PackedMatrix {
        words: bytemuck::cast_slice(packed.bytes()),
        layout: &weight.layout,
        start: weight.start,
        columns: weight.columns,
        transposed: transpose,
    });
    let (left, shape) = (strided(&x, false), Shape::from([m, n]));
    multiply(addend, left, right, [m, n, k], 1.0, shape)
}

fn multiply(
    addend: Option<FlexTensor>,
    left: Strided,
    right: Right,
    sizes: [usize; 3],
    scale: f32,
    shape: Shape,
) -> FlexTensor {
    let gemm = Gemm { sizes, scale };
    let Some(addend) = addend else {
        return tensor_of(host::gemm(Simd::detect(), left, right, gemm), shape);
    };
    let mut out = match addend.is_contiguous() {
        true => addend,
        false => addend.to_contiguous(),
    };
    let start = out.layout().start_offset();
    let values = &mut out.storage_mut::<f32>()[start..][..sizes[0] * sizes[1]];
    host::gemm_add(Simd::detect(), left, right, gemm, values);
    out
}

/// A tensor that can be read with the strides of its last two dimensions.
fn in_place(tensor: FlexTensor) -> FlexTensor {
    match tensor.layout().strides().iter().all(|&stride| stride > 0) {
        true => tensor,
        false => tensor.to_contiguous(),
    }
}

/// The matrix of the last two dimensions, or its transpose.
fn strided(tensor: &FlexTensor, transposed: bool) -> Strided<'_> {
    let strides = tensor.layout().strides();
    let [row, column] = [strides.len() - 2, strides.len() - 1].map(|axis| strides[axis] as usize);
    let (row, column) = match transposed {
        false => (row, column),
        true => (column, row),
    };
    let all: &[f32] = bytemuck::cast_slice(tensor.bytes());
    Strided {
        values: &all[tensor.layout().start_offset()..],
        row,
        column,
    }
}
