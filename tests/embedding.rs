//! Embeddings and heads in 4 bit: the bits of the decoded rows on every device that is compiled in,
//! the module with its records and its tied head, and what conversions make of both.

mod stored;
mod tensors;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::Embedding;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_nf4::checkpoint::{
    Checkpoint, CheckpointStore, DequantizeOptions, QuantizeOptions, SafetensorsFile,
    dequantize_checkpoint, quantize_checkpoint,
};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig, QuantType};
use burn_nf4::nn::{QuantEmbedding, QuantEmbeddingConfig};
use burn_nf4::op::{MatmulStrategy, embedding};
use burn_nf4::{BlockWeight, Nf4Error, linear};
use burn_store::ModuleSnapshot;
use rstest::rstest;
use serde_json::{Value, json};
use stored::{config_of, quiet, write_model};
use tensors::*;

const DTYPES: [FloatType; 3] = [FloatType::F16, FloatType::BF16, FloatType::F32];

/// Ids in the integer type of the device.
fn ids<const N: usize>(values: [[i64; N]; 2], device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(values, device)
}

fn ids_of(values: &[i64], shape: [usize; 2], dtype: DType, device: &Device) -> Tensor<2, Int> {
    let data = TensorData::new(values.to_vec(), shape).convert_dtype(dtype);
    Tensor::from_data(data, (device, dtype))
}

fn host_table(shape: [usize; 2], quant: QuantConfig) -> BlockTensor {
    let values = weights(shape[0] * shape[1], shape[1] as u64);
    BlockTensor::quantize(&values, &shape, quant).expect("valid")
}

fn table(shape: [usize; 2], quant: QuantConfig, device: &Device) -> BlockWeight {
    BlockWeight::from_host(&host_table(shape, quant), device)
}

/// The bits of rows, each decoded by itself.
fn rows(weight: &BlockWeight, ids: &[i64], dtype: FloatType) -> Vec<u8> {
    ids.iter()
        .flat_map(|&id| {
            let id = id as usize;
            let row = weight.dequantize_rows(id..id + 1, dtype);
            bits(row.expect("a row"), dtype)
        })
        .collect()
}

/// The types that a device has; the others are skipped.
fn dtypes(device: &Device) -> Vec<FloatType> {
    let has = |dtype: &FloatType| !lacks(device, (*dtype).into());
    DTYPES.into_iter().filter(has).collect()
}

#[track_caller]
fn assert_rows(
    weight: &BlockWeight,
    values: &[i64],
    shape: [usize; 2],
    dtypes: &[FloatType],
    device: &Device,
) {
    for &dtype in dtypes {
        let ids = Tensor::from_data(TensorData::new(values.to_vec(), shape), device);
        let x = embedding(ids, weight, dtype).expect("rows that are there");
        let [batch, tokens] = shape;
        assert_eq!(x.dims(), [batch, tokens, weight.shape()[1]]);
        let what = format!("{:?} {dtype:?} {values:?}", weight.form());
        assert_same_bits(&bits(x, dtype), &rows(weight, values, dtype), &what);
    }
}

/// Rows that end within a block, a word and a byte; rows shorter and longer than a block; aligned rows;
/// one column; one row.
fn rows_have_the_bits_of_the_decoded_weight(device: &Device) {
    use QuantType::{Fp4, Nf4};
    let dtypes = dtypes(device);
    for (shape, quant) in [
        ([17, 33], config(Nf4, 64, true)),
        ([40, 9], config(Fp4, 32, false)),
        ([12, 128], config(Nf4, 64, false)),
        ([12, 128], config(Fp4, 64, true)),
        ([7, 300], config(Nf4, 256, true)),
        ([33, 50], config(Nf4, 32, true)),
        ([5, 1], config(Nf4, 64, true)),
        ([1, 64], config(Nf4, 64, true)),
        ([300, 72], config(Nf4, 4096, true)),
        ([300, 72], config(Fp4, 128, false)),
    ] {
        let weight = table(shape, quant, device);
        let last = shape[0] as i64 - 1;
        let mixed = [last, 0, last / 2, last / 2, last, last.min(1)];
        assert_rows(&weight, &mixed, [2, 3], &dtypes, device);
        assert_rows(&weight, &[last], [1, 1], &dtypes, device);
        let all: Vec<i64> = (0..=last).collect();
        assert_rows(&weight, &all, [1, all.len()], &[FloatType::F32], device);
    }
}

/// More than one cube, and on the CPU more than one thread.
fn many_rows_are_gathered(device: &Device) {
    let weight = table([50, 1024], QuantConfig::default(), device);
    let values: Vec<i64> = (0..1200).map(|i| i * 7 % 50).collect();
    let x = embedding(
        Tensor::from_data(TensorData::new(values.clone(), [3, 400]), device),
        &weight,
        FloatType::F32,
    );
    let got = bits(x.expect("rows that are there"), FloatType::F32);
    let decoded = bits(
        weight.dequantize::<2>(FloatType::F32).expect("f32"),
        FloatType::F32,
    );
    let expected = values.iter().flat_map(|&id| {
        let start = id as usize * 4096;
        decoded[start..start + 4096].iter().copied()
    });
    assert_same_bits(&got, &expected.collect::<Vec<_>>(), "many rows");
}

fn ids_may_be_of_any_integer_type(device: &Device) {
    let weight = table([300, 40], QuantConfig::default(), device);
    let mut tested = 0;
    for dtype in [
        DType::I64,
        DType::I32,
        DType::I16,
        DType::I8,
        DType::U64,
        DType::U32,
        DType::U16,
        DType::U8,
    ] {
        if lacks(device, dtype) {
            continue;
        }
        // 127 is the largest that all of them have.
        let mut values = vec![127, 0, 64, 127];
        if dtype == DType::U8 {
            values.push(255);
        } else if dtype != DType::I8 {
            values.push(299);
        }
        let ids = ids_of(&values, [1, values.len()], dtype, device);
        assert_eq!(ids.dtype(), dtype);
        let x = embedding(ids, &weight, FloatType::F32).expect("rows that are there");
        let expected = rows(&weight, &values, FloatType::F32);
        assert_same_bits(&bits(x, FloatType::F32), &expected, &format!("{dtype:?}"));
        tested += 1;
    }
    assert!(tested > 0);
}

/// Neither is contiguous from the start of its buffer.
fn ids_may_be_views(device: &Device) {
    let weight = table([17, 33], QuantConfig::default(), device);
    let base = ids([[3, 1, 16, 0], [5, 5, 2, 9]], device);
    for (view, values, shape) in [
        (
            base.clone().transpose(),
            vec![3, 5, 1, 5, 16, 2, 0, 9],
            [4, 2],
        ),
        (base.clone().slice([1..2, 1..4]), vec![5, 2, 9], [1, 3]),
        (base.slice([0..2, 2..4]), vec![16, 0, 2, 9], [2, 2]),
    ] {
        assert_eq!(view.dims(), shape);
        let x = embedding(view, &weight, FloatType::F32).expect("rows that are there");
        let expected = rows(&weight, &values, FloatType::F32);
        assert_same_bits(&bits(x, FloatType::F32), &expected, "a view");
    }
}

fn no_ids_give_an_empty_result(device: &Device) {
    let weight = table([17, 33], QuantConfig::default(), device);
    for shape in [[0, 3], [2, 0], [0, 0]] {
        let ids = Tensor::<2, Int>::zeros(shape, device);
        let x = embedding(ids, &weight, FloatType::F32).expect("nothing to look up");
        assert_eq!(x.dims(), [shape[0], shape[1], 33]);
        assert_eq!(x.dtype(), DType::F32);
    }
}

/// Of a weight that is stored the other way round, columns are gathered.
fn transposed_weights_give_their_rows(device: &Device) {
    let (tokens, d) = (21, 10);
    let stored = host_table([d, tokens], config(QuantType::Nf4, 32, true));
    let mut tensors = stored::weight("weight", &stored);
    stored::transpose(&mut tensors, "weight");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("weight.safetensors");
    std::fs::write(&path, stored::to_bytes(&tensors)).expect("written");
    let file = SafetensorsFile::open(&path).expect("a file");
    let weight = file.load_weight("weight", device).expect("a weight");
    assert!(weight.is_transposed());
    assert_eq!(weight.shape(), [tokens, d]);
    let dtypes = dtypes(device);
    assert_rows(&weight, &[20, 0, 7, 7, 19, 1], [2, 3], &dtypes, device);
}

/// On the CPU an error, and elsewhere a row of NaN beside rows that are right.
fn ids_without_a_row_are_not_silent(device: &Device) {
    let weight = table([300, 40], QuantConfig::default(), device);
    let dtype = Tensor::<1, Int>::zeros([1], device).dtype();
    for (wrong, dtype) in [
        (300, dtype),
        (-1, dtype),
        (i64::from(i32::MAX), dtype),
        (i64::from(i32::MIN), dtype),
        // To 32 bits, this would be row 5.
        ((1 << 32) + 5, DType::I64),
        // To 16 bits, this would be row 0.
        (1 << 16, DType::U32),
        // 300 is no number of this type.
        (-1, DType::I8),
    ] {
        if !burn_nf4::op::supports_dtype(device, dtype) {
            continue;
        }
        let what = format!("{wrong} as {dtype:?}");
        let values = [7, wrong, 120, 0];
        let x = embedding(
            ids_of(&values, [2, 2], dtype, device),
            &weight,
            FloatType::F32,
        );
        if is_flex(device) {
            let expected = Nf4Error::IdRange {
                tensor: "ids".into(),
                index: 1,
                given: i128::from(wrong),
                rows: 300,
            };
            assert_eq!(x.expect_err(&what), expected, "{what}");
            continue;
        }
        let got = bits(x.expect(&what), FloatType::F32);
        let row = 40 * 4;
        let expected = rows(&weight, &[7], FloatType::F32);
        assert_same_bits(&got[..row], &expected, &what);
        let nans: &[f32] = bytemuck::cast_slice(&got[row..2 * row]);
        assert!(nans.iter().all(|value| value.is_nan()), "{what}: {nans:?}");
        let expected = rows(&weight, &[120, 0], FloatType::F32);
        assert_same_bits(&got[2 * row..], &expected, &what);
    }
}

fn is_flex(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    let flex = *device == Device::flex();
    #[cfg(not(feature = "flex"))]
    let flex = false;
    flex
}

fn what_does_not_fit_is_an_error(device: &Device) {
    let values = weights(4 * 5 * 6, 3);
    let stack = BlockTensor::quantize(&values, &[4, 5, 6], QuantConfig::default()).expect("valid");
    let stack = BlockWeight::from_host(&stack, device);
    let error = embedding(ids([[1], [2]], device), &stack, FloatType::F32);
    assert!(
        matches!(error, Err(Nf4Error::NotAMatrix { .. })),
        "{error:?}"
    );
    assert!(matches!(
        QuantEmbedding::new(stack),
        Err(Nf4Error::NotAMatrix { .. })
    ));
    let weight = table([17, 33], QuantConfig::default(), device);
    for dtype in DTYPES {
        let x = embedding(ids([[1], [2]], device), &weight, dtype);
        match burn_nf4::op::supports_dtype(device, dtype.into()) {
            true => assert_eq!(x.expect("a type it has").dtype(), dtype.into()),
            false => assert!(matches!(x, Err(Nf4Error::DeviceDtype { .. })), "{x:?}"),
        }
    }
}

fn ids_and_weight_with_and_without_autodiff_mix(device: &Device) {
    let tracked = device.clone().autodiff();
    for (of_ids, of_weight) in [(&tracked, device), (device, &tracked), (&tracked, &tracked)] {
        let weight = table([17, 33], QuantConfig::default(), of_weight);
        let x = embedding(ids([[16, 2], [2, 0]], of_ids), &weight, FloatType::F32);
        let x = x.expect("rows that are there");
        assert!(x.device().is_autodiff());
        assert!(!x.is_require_grad());
        let expected = rows(&weight, &[16, 2, 2, 0], FloatType::F32);
        assert_same_bits(&bits(x, FloatType::F32), &expected, "autodiff");
    }
}

/// Through the head the gradient is that of a dense product.
fn a_tied_head_has_the_gradient_for_its_input(device: &Device) {
    let (vocabulary, d) = (24, 40);
    let tracked = device.clone().autodiff();
    for device in [tracked.clone(), tracked.gradient_checkpointing()] {
        let weight = table([vocabulary, d], QuantConfig::default(), &device);
        let module = QuantEmbedding::new(weight).expect("a matrix");
        let dense = module.to_dense(FloatType::F32).expect("f32");
        let dense = dense.weight.val().detach();
        let scale = tensor(&uniform(d, 5), [d], FloatType::F32, &device).require_grad();
        let upstream = tensor(
            &uniform(4 * vocabulary, 9),
            [2, 2, vocabulary],
            FloatType::F32,
            &device,
        );
        // The vectors are a leaf of the graph: the embedding itself has none.
        let x = module
            .forward(ids([[23, 2], [2, 0]], &device))
            .require_grad();
        let gradients = |y: &Tensor<3>| {
            let grads = (y.clone() * upstream.clone()).sum().backward();
            let dx = x.grad(&grads).expect("it is tracked");
            (dx, scale.grad(&grads).expect("it is tracked"))
        };
        let scaled = || x.clone() * scale.clone().unsqueeze();

        let y = module.logits(scaled());
        assert_eq!(y.dims(), [2, 2, vocabulary]);
        let (dx, dscale) = gradients(&y);
        let expected = scaled().matmul(dense.transpose().unsqueeze());
        let (dx_expected, dscale_expected) = gradients(&expected);
        // A product in TF32 keeps 11 bits of each factor.
        let tolerance = 1.0 / 256.0;
        assert_near(&values(&y), &values(&expected), tolerance, "logits");
        assert_near(&values(&dx), &values(&dx_expected), tolerance, "dx");
        assert_near(
            &values(&dscale),
            &values(&dscale_expected),
            tolerance,
            "dscale",
        );
    }
}

fn a_dense_embedding_is_quantized(device: &Device) {
    let (shape, quant) = ([40, 33], config(QuantType::Fp4, 32, true));
    let source = tensor(&weights(40 * 33, 1), shape, FloatType::F32, device);
    let dense = Embedding {
        weight: Param::from_tensor(source),
    };
    let module = QuantEmbedding::quantize(dense, quant).expect("finite values");
    assert_eq!(module.dims(), shape);
    assert_eq!(module.size_bytes(), module.weight.layout().words() * 4);
    assert!(module.size_bytes() < 40 * 33 * 4);
    let ids = ids([[39, 0, 7], [7, 1, 20]], device);
    let expected = module.to_dense(FloatType::F32).expect("f32");
    let expected = bits(expected.forward(ids.clone()), FloatType::F32);
    let got = bits(module.forward(ids.clone()), FloatType::F32);
    assert_same_bits(&got, &expected, "against Burn's own embedding");
    if burn_nf4::op::supports_dtype(device, DType::F16) {
        let half = module.clone().with_dtype(FloatType::F16).forward(ids);
        assert_eq!(half.dtype(), DType::F16);
    }

    let x = tensor(&uniform(2 * 33, 4), [2, 33], FloatType::F32, device);
    let expected = linear(x.clone(), &module.weight, None).expect("it fits");
    for strategy in [MatmulStrategy::Auto, MatmulStrategy::Decode] {
        let y = module.clone().with_strategy(strategy).logits(x.clone());
        assert_eq!(y.dims(), [2, 40]);
        assert_near(&values(&y), &values(&expected), 1.0 / 256.0, "logits");
    }
}

fn records_keep_every_bit(device: &Device) {
    let quant = QuantConfig::default();
    let module = QuantEmbedding::from_host(&host_table([40, 33], quant), device).expect("a matrix");
    let blank = QuantEmbeddingConfig::new(40, 33)
        .init(device)
        .expect("sizes");
    assert_eq!(values(&blank.forward(ids([[1], [2]], device))), [0.0; 66]);
    let loaded = blank.load_record(module.clone().into_record());
    let words = |module: &QuantEmbedding| {
        let data = module.weight.packed().into_data();
        data.iter::<u32>().collect::<Vec<u32>>()
    };
    assert_eq!(words(&loaded), words(&module));
    let other = QuantEmbeddingConfig::new(40, 33).with_block_size(32);
    let other = other.init(device).expect("sizes");
    assert!(other.try_load_record(module.into_record()).is_err());
}

#[derive(Default)]
struct Tensors {
    floats: usize,
    ints: Vec<usize>,
}

impl ModuleVisitor for Tensors {
    fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
        self.floats += 1;
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.ints.push(param.val().dims().iter().product());
    }
}

fn embedding_and_tied_head_are_one_packed_tensor(device: &Device) {
    let module = QuantEmbedding::new(table([40, 33], QuantConfig::default(), device));
    let module = module.expect("a matrix");
    let mut tensors = Tensors::default();
    module.visit(&mut tensors);
    assert_eq!(tensors.floats, 0);
    assert_eq!(tensors.ints, [module.weight.layout().words()]);
    let text = module.to_string();
    assert!(text.contains("n_embedding: 40, d_model: 33"), "{text}");
}

macro_rules! device_tests {
    ($name:ident, $feature:literal, $device:expr) => {
        #[cfg(feature = $feature)]
        mod $name {
            use super::*;

            device_tests!(@each $device;
                rows_have_the_bits_of_the_decoded_weight
                many_rows_are_gathered
                ids_may_be_of_any_integer_type
                ids_may_be_views
                no_ids_give_an_empty_result
                transposed_weights_give_their_rows
                ids_without_a_row_are_not_silent
                what_does_not_fit_is_an_error
                ids_and_weight_with_and_without_autodiff_mix
                a_tied_head_has_the_gradient_for_its_input
                a_dense_embedding_is_quantized
                records_keep_every_bit
                embedding_and_tied_head_are_one_packed_tensor
            );

            #[cfg(feature = "cube")]
            #[test]
            fn the_kernel_keeps_to_its_buffers() {
                super::the_kernel_keeps_to_its_buffers(&$device);
            }
        }
    };
    (@each $device:expr; $($test:ident)*) => {
        $(
            #[test]
            fn $test() {
                super::$test(&$device);
            }
        )*
    };
}

device_tests!(flex, "flex", Device::flex());
device_tests!(cuda, "cuda", Device::cuda(0));
device_tests!(rocm, "rocm", Device::rocm(0));
device_tests!(wgpu, "wgpu", Device::wgpu(Default::default()));
device_tests!(vulkan, "vulkan", Device::vulkan(Default::default()));
device_tests!(metal, "metal", Device::metal(Default::default()));
device_tests!(cpu, "cpu", Device::cpu());

/// The kernel itself: into a buffer of NaN with a guard behind it, and what it does not take.
#[cfg(feature = "cube")]
fn the_kernel_keeps_to_its_buffers(device: &Device) {
    use burn::backend::DispatchDevice;
    use burn_nf4::format::PackedLayout;
    use burn_nf4::launch::{EmbeddingPlan, EmbeddingProblem};
    use cubecl::ir::{ElemType, FloatKind, IntKind};

    let DispatchDevice::Cube(cube) = device.as_dispatch() else {
        return;
    };
    let client = cube.client();
    let host = host_table([40, 33], QuantConfig::default());
    let layout = host.packed_layout();
    let problem = EmbeddingProblem {
        rows: 40,
        columns: 33,
        transposed: false,
        ids: 3,
        ids_dtype: ElemType::Int(IntKind::I32),
        dtype: FloatType::F32,
    };
    let values = [39i32, 0, 39];
    let (bytes, guard) = (3 * 33 * 4, 64);
    let packed = client.create_from_slice(bytemuck::cast_slice(&host.to_packed()));
    let ids = client.create_from_slice(bytemuck::cast_slice(&values));
    let out = client.create_from_slice(&vec![0xff; bytes + guard]);
    let plan = EmbeddingPlan::new(&client, &layout, problem).expect("it fits");
    assert_eq!(plan.out_bytes(), bytes);
    assert_eq!(plan.vector(), 1);
    plan.launch(packed.clone(), ids.clone(), out.clone())
        .expect("buffers that are long enough");
    let read = client.read_one(out).expect("the kernel ran").to_vec();
    let expected: Vec<f32> = values
        .iter()
        .flat_map(|&id| host.dequantize_range::<f32>(id as usize * 33, 33))
        .collect();
    assert_same_bits(&read[..bytes], bytemuck::cast_slice(&expected), "decoded");
    assert!(read[bytes..].iter().take(guard).all(|&byte| byte == 0xff));

    let short = client.empty(bytes - 4);
    for (packed, ids, out, name) in [
        (packed.clone(), ids.clone(), short.clone(), "embedded"),
        (packed.clone(), client.empty(8), client.empty(bytes), "ids"),
        (short, ids, client.empty(bytes), "packed weight"),
    ] {
        let error = plan.launch(packed, ids, out).expect_err("a short buffer");
        assert!(
            matches!(&error, Nf4Error::Length { tensor, .. } if tensor == name),
            "{error}"
        );
    }
    let refused = |problem| EmbeddingPlan::new(&client, &layout, problem).expect_err("refused");
    let floats = ElemType::Float(FloatKind::F32);
    assert!(matches!(
        refused(EmbeddingProblem {
            ids_dtype: floats,
            ..problem
        }),
        Nf4Error::Dtype { .. }
    ));
    assert!(matches!(
        refused(EmbeddingProblem {
            rows: 41,
            ..problem
        }),
        Nf4Error::Length { .. }
    ));
    for ids in [0, usize::MAX / 4] {
        assert!(matches!(
            refused(EmbeddingProblem { ids, ..problem }),
            Nf4Error::ElementCount { .. }
        ));
    }
    let empty = PackedLayout::new(0, QuantConfig::default());
    let error = EmbeddingPlan::new(&client, &empty, EmbeddingProblem { rows: 0, ..problem });
    assert!(matches!(error, Err(Nf4Error::ElementCount { .. })));
}

#[test]
fn the_host_function_refuses_rows_that_are_not_there() {
    let host = host_table([40, 33], QuantConfig::default());
    let (words, layout) = (host.to_packed(), host.packed_layout());
    for (shape, id, room) in [([40, 33], 40, 33), ([40, 33], 0, 32), ([33, 33], 0, 33)] {
        let run = || {
            let mut out = vec![0f32; room];
            burn_nf4::host::embedding(&words, &layout, shape, false, &[id], &mut out);
        };
        assert!(catch_unwind(run).is_err(), "{shape:?} {id} {room}");
    }
    burn_nf4::host::embedding::<f32>(&words, &layout, [40, 33], false, &[], &mut []);
}

#[cfg(feature = "flex")]
#[test]
fn forward_panics_at_an_id_without_a_vector_as_burn_does() {
    let device = Device::flex();
    let module = QuantEmbedding::new(table([17, 33], QuantConfig::default(), &device));
    let module = module.expect("a matrix");
    let run = || module.forward(ids([[1], [17]], &device));
    let panic = catch_unwind(AssertUnwindSafe(run)).expect_err("there is no row 17");
    let message = panic.downcast_ref::<String>().expect("a text");
    let expected = "QuantEmbedding::forward: `ids`[1] is 17, expected an id in 0..17";
    assert_eq!(message, expected);
    let dense = module.to_dense(FloatType::F32).expect("f32");
    let run = || dense.forward(ids([[1], [17]], &device));
    assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
}

/// What is quantized of a model, and its `config.json`.
fn quantize(
    config: &Value,
    tensors: &[(&str, &[usize])],
    options: &QuantizeOptions,
    out: &Path,
) -> Result<(Vec<String>, Value), Nf4Error> {
    let source = tempfile::tempdir().expect("a folder");
    write_model(source.path(), config, tensors);
    let source = Checkpoint::open(source.path()).expect("a checkpoint");
    quantize_checkpoint(&source, out, options, quiet)?;
    let written = Checkpoint::open(out).expect("a checkpoint");
    assert_eq!(written.faults(), []);
    let names = written.quantized_weights();
    let names = names.iter().map(|name| name.to_string()).collect();
    Ok((names, config_of(out)))
}

const HEAD: (&str, &[usize]) = ("lm_head.weight", &[16, 64]);
const EMBEDDING: (&str, &[usize]) = ("model.embed_tokens.weight", &[16, 64]);
const LAYER: (&str, &[usize]) = ("model.layers.0.mlp.up_proj.weight", &[64, 64]);
const ROUTER: (&str, &[usize]) = ("model.layers.0.mlp.gate.weight", &[4, 64]);
const POSITIONS: (&str, &[usize]) = ("model.embed_positions.weight", &[16, 64]);

fn with(head: bool, embeddings: bool) -> QuantizeOptions {
    QuantizeOptions {
        head,
        embeddings,
        ..QuantizeOptions::default()
    }
}

/// Without an entry transformers keeps the head; with an empty list it does not.
#[rstest]
#[case::nothing_else_kept(&[], json!([]))]
#[case::with_a_router(&[ROUTER], json!(["gate"]))]
fn a_head_is_quantized_when_asked(
    #[case] more: &[(&str, &[usize])],
    #[case] listed: Value,
    #[values(None, Some(true), Some(false))] tied: Option<bool>,
) {
    let tensors = [&[HEAD, EMBEDDING, LAYER], more].concat();
    let mut config = json!({"model_type": "llama"});
    if let Some(tied) = tied {
        config["tie_word_embeddings"] = tied.into();
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (names, config) = quantize(&config, &tensors, &with(true, false), folder.path()).unwrap();
    assert_eq!(names, ["lm_head.weight", LAYER.0]);
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["llm_int8_skip_modules"], listed);
    // Else transformers would put the embedding in its place.
    assert_eq!(config["tie_word_embeddings"], json!(false));
}

#[test]
fn heads_of_classifiers_are_quantized_when_asked() {
    let folder = tempfile::tempdir().expect("a folder");
    let tensors: [(&str, &[usize]); 4] = [
        EMBEDDING,
        LAYER,
        ("score.weight", &[2, 64]),
        ("embed_out.weight", &[16, 64]),
    ];
    let (names, config) =
        quantize(&json!({}), &tensors, &with(true, false), folder.path()).unwrap();
    assert_eq!(names, ["embed_out.weight", LAYER.0, "score.weight"]);
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["llm_int8_skip_modules"], json!(["lm_head"]));
}

/// A name among those to skip counts for more than the wish for all heads.
#[test]
fn a_head_that_is_to_be_skipped_is_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let options = QuantizeOptions {
        skip_modules: vec!["lm_head".into()],
        ..with(true, false)
    };
    let config = json!({"tie_word_embeddings": true});
    let tensors = [HEAD, EMBEDDING, LAYER];
    let (names, config) = quantize(&config, &tensors, &options, folder.path()).unwrap();
    assert_eq!(names, [LAYER.0]);
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["llm_int8_skip_modules"], json!(["lm_head"]));
    assert_eq!(config["tie_word_embeddings"], json!(true));
}

#[rstest]
#[case::head(true, false, &[EMBEDDING, LAYER], "head")]
#[case::head_that_is_no_embedding(true, true, &[EMBEDDING, LAYER], "head")]
#[case::embeddings(false, true, &[HEAD, POSITIONS, LAYER], "embeddings")]
fn what_is_asked_for_must_be_there(
    #[case] head: bool,
    #[case] embeddings: bool,
    #[case] tensors: &[(&str, &[usize])],
    #[case] expected: &str,
) {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    let config = json!({"tie_word_embeddings": false});
    let error = quantize(&config, tensors, &with(head, embeddings), &out).unwrap_err();
    assert!(
        matches!(&error, Nf4Error::Config { field, .. } if *field == expected),
        "{error}"
    );
    assert!(!out.exists());
}

#[derive(Module, Debug)]
struct Tied {
    embed_tokens: QuantEmbedding,
}

/// One packed weight in the folder serves embedding and head, and comes back from it.
#[test]
fn a_tied_folder_holds_one_packed_weight_for_both() {
    let folder = tempfile::tempdir().expect("a folder");
    let (quantized, dense) = (folder.path().join("nf4"), folder.path().join("dense"));
    let config = json!({"model_type": "llama", "tie_word_embeddings": true});
    let tensors = [EMBEDDING, LAYER, POSITIONS];
    let (names, config) = quantize(&config, &tensors, &with(true, true), &quantized).unwrap();
    assert_eq!(names, [EMBEDDING.0, LAYER.0]);
    assert_eq!(config["tie_word_embeddings"], json!(true));

    let device = Device::default();
    let checkpoint = Checkpoint::open(&quantized).expect("a checkpoint");
    let weight = checkpoint.load_weight(EMBEDDING.0, &device).unwrap();
    let loaded = QuantEmbedding::new(weight).expect("a matrix");
    let blank = QuantEmbeddingConfig::new(16, 64).init(&device).unwrap();
    let mut model = Tied {
        embed_tokens: blank,
    };
    let mut store = CheckpointStore::open(&quantized)
        .and_then(|store| store.with_key_remapping("^model\\.", ""))
        .unwrap();
    store = store.allow_unexpected(true);
    model.load_from(&mut store).unwrap();
    let ids = || ids([[15, 3], [3, 0]], &device);
    let expected = bits(loaded.forward(ids()), FloatType::F32);
    let got = bits(model.embed_tokens.forward(ids()), FloatType::F32);
    assert_same_bits(&got, &expected, "loaded by path");
    let x = model.embed_tokens.forward(ids());
    assert_eq!(model.embed_tokens.logits(x).dims(), [2, 2, 16]);

    let options = DequantizeOptions::default();
    dequantize_checkpoint(&checkpoint, &dense, &options, quiet).unwrap();
    let back = Checkpoint::open(&dense).expect("a checkpoint");
    let (values, shape) = back.load_float::<f32>(EMBEDDING.0).unwrap();
    assert_eq!(shape, [16, 64]);
    let all: Vec<i64> = (0..16).collect();
    let expected = rows(&loaded.weight, &all, FloatType::F32);
    assert_same_bits(bytemuck::cast_slice(&values), &expected, "dequantized");
}
