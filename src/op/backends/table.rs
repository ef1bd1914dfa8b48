//! Products with a large matrix of floats on Flex.

use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Shape};
use burn_flex::{Flex, FlexTensor};
use half::{bf16, f16};

use crate::format::FloatElement;
use crate::host;
use crate::op::backends::flex::{contents, tensor_of};
use crate::op::table::TableBackend;

impl TableBackend for Flex {
    fn table_matmul(x: FloatTensor<Self>, table: FloatTensor<Self>) -> FloatTensor<Self> {
        match (x.dtype(), table.dtype()) {
            // The columns lie one after the other: such a matrix is Burn's.
            _ if !table.is_contiguous() => burn_matmul(x, table),
            (DType::F32, DType::F32) => by_rows::<f32>(&x, &table),
            (DType::F32, DType::BF16) => by_rows::<bf16>(&x, &table),
            (DType::F32, DType::F16) => by_rows::<f16>(&x, &table),
            _ => burn_matmul(x, table),
        }
    }
}

fn burn_matmul(x: FlexTensor, table: FlexTensor) -> FlexTensor {
    let table = match table.dtype() == x.dtype() {
        true => table,
        false => Flex::float_cast(table, x.dtype().into()),
    };
    Flex::float_matmul(x, Flex::float_transpose(table))
}

fn by_rows<T: FloatElement>(x: &FlexTensor, table: &FlexTensor) -> FlexTensor {
    let x = x.to_contiguous();
    let [m, k] = x.layout().shape().dims();
    let [n, _] = table.layout().shape().dims::<2>();
    let mut out = vec![0.0f32; m * n];
    host::float_matmul::<T>(contents(&x), m, contents(table), n, k, &mut out);
    tensor_of(out, Shape::from([m, n]))
}
