//! Attention on Flex: the vectorised functions of `host`.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{Bytes, DType, Shape, TensorData};
use burn_flex::{Flex, FlexTensor};
use half::{bf16, f16};

use crate::format::{FloatElement, FloatType};
use crate::host::{self, AttentionSettings, Heads};
use crate::op::attention::{AttentionBackend, AttentionSpec};

impl AttentionBackend for Flex {
    fn attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let operands = [q, k, v];
        match spec.dtype {
            FloatType::F16 => forward::<f16>(operands, ranges, spec),
            FloatType::BF16 => forward::<bf16>(operands, ranges, spec),
            FloatType::F32 => forward::<f32>(operands, ranges, spec),
        }
    }

    fn attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        output: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let operands = [q, k, v, output, grad];
        match spec.dtype {
            FloatType::F16 => backward::<f16>(operands, ranges, lse, spec),
            FloatType::BF16 => backward::<bf16>(operands, ranges, lse, spec),
            FloatType::F32 => backward::<f32>(operands, ranges, lse, spec),
        }
    }
}

fn settings(spec: AttentionSpec) -> AttentionSettings {
    let AttentionSpec {
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        head_dim,
        scale,
        softcap,
        dtype: _,
    } = spec;
    AttentionSettings {
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        head_dim,
        scale,
        softcap,
    }
}

/// A tensor whose heads have their elements side by side, the same if it does so already.
fn with_whole_heads(tensor: FlexTensor) -> FlexTensor {
    let strides = tensor.layout().strides();
    match strides[3] == 1 && strides.iter().all(|&stride| stride >= 0) {
        true => tensor,
        false => tensor.to_contiguous(),
    }
}

fn heads<T: FloatElement>(tensor: &FlexTensor) -> Heads<'_, T> {
    let layout = tensor.layout();
    let data = bytemuck::cast_slice::<u8, T>(tensor.bytes());
    Heads {
        data: &data[layout.start_offset()..],
        strides: [0, 1, 2].map(|dim| layout.strides()[dim] as usize),
    }
}

/// A tensor of numbers in the order of its elements.
fn tensor<T: FloatElement>(numbers: Vec<T>, shape: Shape) -> FlexTensor {
    let dtype = DType::from(T::FLOAT_TYPE);
    FlexTensor::from_data(TensorData::from_bytes(
        Bytes::from_elems(numbers),
        shape,
        dtype,
    ))
}

fn forward<T: FloatElement>(
    operands: [FlexTensor; 3],
    ranges: FlexTensor,
    spec: AttentionSpec,
) -> (FlexTensor, FlexTensor) {
    let operands = operands.map(with_whole_heads);
    let [q, k, v] = operands.each_ref().map(heads::<T>);
    let ranges = ranges.to_contiguous();
    let ranges = bytemuck::cast_slice(ranges.bytes());
    let mut out = vec![T::zeroed(); spec.query_shape().num_elements()];
    let mut lse = vec![0.0; spec.lse_shape().num_elements()];
    host::attention(q, k, v, ranges, settings(spec), &mut out, &mut lse);
    (
        tensor(out, spec.query_shape()),
        tensor(lse, spec.lse_shape()),
    )
}

fn backward<T: FloatElement>(
    operands: [FlexTensor; 5],
    ranges: FlexTensor,
    lse: FlexTensor,
    spec: AttentionSpec,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let operands = operands.map(with_whole_heads);
    let [q, k, v, output, grad] = operands.each_ref().map(heads::<T>);
    let [ranges, lse] = [ranges, lse].map(|tensor| tensor.to_contiguous());
    let zeros = |shape: Shape| vec![T::zeroed(); shape.num_elements()];
    let mut dq = zeros(spec.query_shape());
    let [mut dk, mut dv] = [0; 2].map(|_| zeros(spec.key_shape()));
    host::attention_backward(
        q,
        k,
        v,
        bytemuck::cast_slice(ranges.bytes()),
        output,
        bytemuck::cast_slice(lse.bytes()),
        grad,
        settings(spec),
        &mut dq,
        &mut dk,
        &mut dv,
    );
    (
        tensor(dq, spec.query_shape()),
        tensor(dk, spec.key_shape()),
        tensor(dv, spec.key_shape()),
    )
}
