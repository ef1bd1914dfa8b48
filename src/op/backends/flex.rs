//! The operations on Flex, Burn's CPU backend: the vectorised functions of `host`.

use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{DispatchDevice, TensorMetadata};
use burn::tensor::kind::Basic;
use burn::tensor::{Bytes, DType, Device, Int, Shape, Tensor, TensorData};
use burn_flex::{Flex, FlexTensor};
use half::{bf16, f16};

use super::products;
use crate::error::Nf4Error;
use crate::format::{self, FloatElement, FloatType};
use crate::host;
use crate::op::base::{
    DenseSpec, DequantizeSpec, EmbeddingSpec, LinearSpec, MatmulSpec, MatmulStrategy, QuantBackend,
    QuantizeSpec, add_bias, composed_matmul, debug_check, decoded_matmul,
};

impl QuantBackend for Flex {
    fn quant_quantize(weight: FloatTensor<Self>, spec: QuantizeSpec) -> IntTensor<Self> {
        let weight = weight.to_contiguous();
        let words = match spec.dtype {
            FloatType::F16 => quantize::<f16>(&weight, &spec),
            FloatType::BF16 => quantize::<bf16>(&weight, &spec),
            FloatType::F32 => quantize::<f32>(&weight, &spec),
        };
        let shape = Shape::from([spec.layout.words()]);
        FlexTensor::from_data(TensorData::from_bytes(
            Bytes::from_elems(words),
            shape,
            DType::U32,
        ))
    }

    fn quant_dequantize(packed: IntTensor<Self>, spec: DequantizeSpec) -> FloatTensor<Self> {
        debug_check(&packed, &spec.layout);
        let packed = packed.to_contiguous();
        let bytes = match spec.dtype {
            FloatType::F16 => dequantize::<f16>(&packed, &spec),
            FloatType::BF16 => dequantize::<bf16>(&packed, &spec),
            FloatType::F32 => dequantize::<f32>(&packed, &spec),
        };
        let shape = Shape::from([spec.rows, spec.columns]);
        FlexTensor::from_data(TensorData::from_bytes(bytes, shape, spec.dtype.into()))
    }

    fn quant_embedding(
        ids: IntTensor<Self>,
        packed: IntTensor<Self>,
        spec: EmbeddingSpec,
    ) -> FloatTensor<Self> {
        debug_check(&packed, &spec.layout);
        let packed = packed.to_contiguous();
        let ids = row_numbers(&ids.to_contiguous());
        let bytes = match spec.dtype {
            FloatType::F16 => embedding::<f16>(&ids, &packed, &spec),
            FloatType::BF16 => embedding::<bf16>(&ids, &packed, &spec),
            FloatType::F32 => embedding::<f32>(&ids, &packed, &spec),
        };
        let shape = Shape::from([spec.ids, spec.columns]);
        FlexTensor::from_data(TensorData::from_bytes(bytes, shape, spec.dtype.into()))
    }

    fn quant_matmul(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self> {
        if !reads_packed(&spec) {
            return Self::quant_linear(x, packed, spec.linear());
        }
        matmul(x, packed, None, spec)
    }

    fn quant_matmul_bias(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        bias: FloatTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self> {
        if !reads_packed(&spec) {
            return add_bias::<Self>(Self::quant_linear(x, packed, spec.linear()), bias);
        }
        matmul(x, packed, Some(bias), spec)
    }

    fn quant_linear(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: LinearSpec,
    ) -> FloatTensor<Self> {
        let m = x.shape()[0];
        match MatmulSpec::of(spec, m).filter(reads_packed) {
            Some(spec) => matmul(x, packed, None, spec),
            None if multiplies(m, &spec) => {
                debug_check(&packed, &spec.weight.layout);
                products::packed(None, x, &packed, spec.weight, true)
            }
            None => decoded_matmul::<Self>(x, packed, None, spec),
        }
    }

    fn quant_linear_backward(
        grad: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: LinearSpec,
    ) -> FloatTensor<Self> {
        debug_check(&packed, &spec.weight.layout);
        if multiplies(grad.shape()[0], &spec) {
            return products::packed(None, grad, &packed, spec.weight, false);
        }
        Self::float_matmul(grad, Self::quant_dequantize(packed, spec.weight))
    }

    fn quant_matmul_add(
        addend: FloatTensor<Self>,
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: MatmulSpec,
        transpose: bool,
    ) -> FloatTensor<Self> {
        debug_check(&packed, &spec.weight.layout);
        if multiplies(spec.m, &spec.linear()) {
            return products::packed(Some(addend), x, &packed, spec.weight, transpose);
        }
        let decoded = Self::quant_dequantize(packed, spec.weight);
        Self::dense_matmul_add(addend, x, decoded, spec.decoded(transpose))
    }

    fn dense_matmul(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        spec: DenseSpec,
    ) -> FloatTensor<Self> {
        match products::takes(&spec) {
            true => products::dense(None, lhs, rhs, spec),
            false => composed_matmul::<Self>(lhs, rhs, spec),
        }
    }

    fn dense_matmul_add(
        addend: FloatTensor<Self>,
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        spec: DenseSpec,
    ) -> FloatTensor<Self> {
        match products::takes(&spec) {
            true => products::dense(Some(addend), lhs, rhs, spec),
            false => Self::float_add(addend, composed_matmul::<Self>(lhs, rhs, spec)),
        }
    }
}

/// Whether a product with a packed weight is that of `products`.
fn multiplies(m: usize, spec: &LinearSpec) -> bool {
    let DequantizeSpec {
        rows,
        columns,
        dtype,
        ..
    } = spec.weight;
    spec.cublaslt && products::takes(&DenseSpec::of_matrices([m, rows, columns], true, dtype))
}

/// The numbers of a contiguous tensor.
pub(super) fn contents<T: FloatElement>(tensor: &FlexTensor) -> &[T] {
    let (start, elems) = (
        tensor.layout().start_offset(),
        tensor.layout().num_elements(),
    );
    &bytemuck::cast_slice(tensor.bytes())[start..start + elems]
}

/// A tensor of these numbers.
pub(super) fn tensor_of<T: FloatElement>(values: Vec<T>, shape: Shape) -> FlexTensor {
    let bytes = Bytes::from_elems(values);
    FlexTensor::from_data(TensorData::from_bytes(bytes, shape, T::FLOAT_TYPE.into()))
}

/// Rows up to which the packed weight is read as it is; more are for the tiles of `products`. Where the two cross
/// was not measured.
const MATMUL_ROWS: usize = products::FEW_ROWS;

fn reads_packed(spec: &MatmulSpec) -> bool {
    match spec.strategy {
        MatmulStrategy::Gemv => true,
        MatmulStrategy::Decode => false,
        _ => spec.m <= MATMUL_ROWS,
    }
}

/// Checks that the CPU has the kernel that was asked for.
pub(in crate::op) fn check_strategy(strategy: MatmulStrategy) -> Result<(), Nf4Error> {
    match strategy {
        MatmulStrategy::TensorCore | MatmulStrategy::Levels => Err(Nf4Error::Variant {
            variant: strategy.name(),
            reason: "a CPU has no tensor cores".into(),
        }),
        _ => Ok(()),
    }
}

fn matmul(
    x: FlexTensor,
    packed: FlexTensor,
    bias: Option<FlexTensor>,
    spec: MatmulSpec,
) -> FlexTensor {
    debug_check(&packed, &spec.weight.layout);
    let x = x.to_contiguous();
    let packed = packed.to_contiguous();
    let bias = bias.map(|bias| bias.to_contiguous());
    let bytes = match spec.weight.dtype {
        FloatType::F16 => matmul_bytes::<f16>(&x, &packed, bias.as_ref(), spec),
        FloatType::BF16 => matmul_bytes::<bf16>(&x, &packed, bias.as_ref(), spec),
        FloatType::F32 => matmul_bytes::<f32>(&x, &packed, bias.as_ref(), spec),
    };
    let shape = Shape::from([spec.m, spec.weight.rows]);
    FlexTensor::from_data(TensorData::from_bytes(
        bytes,
        shape,
        spec.weight.dtype.into(),
    ))
}

fn matmul_bytes<T: FloatElement>(
    x: &FlexTensor,
    packed: &FlexTensor,
    bias: Option<&FlexTensor>,
    spec: MatmulSpec,
) -> Bytes {
    let DequantizeSpec {
        layout,
        rows,
        columns,
        ..
    } = spec.weight;
    let mut out = vec![T::zeroed(); spec.m * rows];
    host::matmul::<T>(
        bytemuck::cast_slice(x.bytes()),
        spec.m,
        bytemuck::cast_slice(packed.bytes()),
        &layout,
        rows,
        columns,
        bias.map(|bias| bytemuck::cast_slice(bias.bytes())),
        &mut out,
    );
    Bytes::from_elems(out)
}

fn quantize<T: FloatElement>(weight: &FlexTensor, spec: &QuantizeSpec) -> Vec<u32> {
    let weight: &[T] = bytemuck::cast_slice(weight.bytes());
    host::quantize(weight, &spec.shape, spec.layout.config()).expect("arguments were validated")
}

/// Whether tensors of a device lie on the CPU.
pub(in crate::op) fn is_flex(device: &Device) -> bool {
    let device = device.clone().without_autodiff();
    matches!(device.as_dispatch(), DispatchDevice::Flex(_))
}

/// A part of a tensor in memory of its own where it lies on the CPU: Flex would copy a part whenever it is used.
pub(in crate::op) fn copied<const D: usize, K: Basic>(part: Tensor<D, K>) -> Tensor<D, K> {
    let device = part.device();
    if !matches!(device.as_dispatch(), DispatchDevice::Flex(_)) {
        return part;
    }
    let dtype = part.dtype();
    Tensor::from_data(part.into_data(), (&device, dtype))
}

/// Checks that a weight is finite if it lies on the CPU, where looking costs no waiting.
pub(in crate::op) fn check_finite<const D: usize>(weight: &Tensor<D>) -> Result<(), Nf4Error> {
    let device = weight.device().without_autodiff();
    if !matches!(device.as_dispatch(), DispatchDevice::Flex(_)) {
        return Ok(());
    }
    format::check_finite("weight", weight.to_data().iter::<f32>())
}

fn dequantize<T: FloatElement>(packed: &FlexTensor, spec: &DequantizeSpec) -> Bytes {
    let words: &[u32] = bytemuck::cast_slice(packed.bytes());
    let mut out = vec![T::zeroed(); spec.elems()];
    host::dequantize(words, &spec.layout, spec.start, &mut out);
    Bytes::from_elems(out)
}

/// Ids as numbers of rows; what can be none is one past all of them.
pub(super) fn row_numbers(ids: &FlexTensor) -> Vec<usize> {
    fn convert<T: bytemuck::Pod>(ids: &FlexTensor) -> Vec<usize>
    where
        usize: TryFrom<T>,
    {
        let ids = bytemuck::cast_slice::<u8, T>(ids.bytes()).iter();
        ids.map(|&id| usize::try_from(id).unwrap_or(usize::MAX))
            .collect()
    }
    match ids.dtype() {
        DType::I64 => convert::<i64>(ids),
        DType::I32 => convert::<i32>(ids),
        DType::I16 => convert::<i16>(ids),
        DType::I8 => convert::<i8>(ids),
        DType::U64 => convert::<u64>(ids),
        DType::U32 => convert::<u32>(ids),
        DType::U16 => convert::<u16>(ids),
        DType::U8 => convert::<u8>(ids),
        dtype => unreachable!("an integer tensor of {dtype:?}"),
    }
}

fn embedding<T: FloatElement>(ids: &[usize], packed: &FlexTensor, spec: &EmbeddingSpec) -> Bytes {
    let EmbeddingSpec {
        layout,
        rows,
        columns,
        transposed,
        ..
    } = *spec;
    let words: &[u32] = bytemuck::cast_slice(packed.bytes());
    let mut out = vec![T::zeroed(); spec.ids * columns];
    host::embedding(words, &layout, [rows, columns], transposed, ids, &mut out);
    Bytes::from_elems(out)
}

/// Checks ids that lie on the CPU, where looking costs no waiting. One number may be ignored.
pub(in crate::op) fn check_ids<const D: usize>(
    name: &str,
    ids: &Tensor<D, Int>,
    rows: usize,
    ignored: Option<i32>,
) -> Result<(), Nf4Error> {
    let device = ids.device().without_autodiff();
    if !matches!(device.as_dispatch(), DispatchDevice::Flex(_)) {
        return Ok(());
    }
    let data = ids.to_data();
    let numbers: Vec<i128> = match data.dtype() {
        DType::U64 => data.iter::<u64>().map(i128::from).collect(),
        _ => data.iter::<i64>().map(i128::from).collect(),
    };
    let ignored = ignored.map(i128::from);
    let inside = |id: &i128| (0..rows as i128).contains(id) || Some(*id) == ignored;
    match numbers.iter().position(|id| !inside(id)) {
        None => Ok(()),
        Some(index) => Err(Nf4Error::IdRange {
            tensor: name.into(),
            index,
            given: numbers[index],
            rows,
        }),
    }
}
