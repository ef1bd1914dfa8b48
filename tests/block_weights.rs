//! Weights in NVFP4, MXFP4 and FP8 as Burn tensors, on every device that is compiled in: the golden files
//! bit for bit, products, gathered rows, and what goes into records.
#![cfg(feature = "checkpoint")]

#[macro_use]
mod devices;
mod block_files;
mod tensors;

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_nf4::format::{BlockTensor, FloatType, QuantConfig, QuantType, WeightForm};
use burn_nf4::nn::{QuantEmbeddingConfig, QuantLinearConfig};
use burn_nf4::op::embedding;
use burn_nf4::{BlockWeight, Nf4Error, linear};
use tensors::*;

const NEW: [QuantType; 4] = [
    QuantType::Nvfp4,
    QuantType::Mxfp4,
    QuantType::Fp8Block,
    QuantType::Fp8Channel,
];

fn host_weight(quant_type: QuantType, shape: &[usize]) -> BlockTensor {
    let values = weights(shape.iter().product(), 3);
    BlockTensor::quantize(&values, shape, QuantConfig::of(quant_type)).expect("whole blocks")
}

/// Rows that begin in the middle of a word or tile, where the format has such.
fn shape_of(quant_type: QuantType) -> [usize; 2] {
    match quant_type {
        QuantType::Fp8Block | QuantType::Fp8Channel => [131, 77],
        _ => [70, 160],
    }
}

fn golden_files(device: &Device) {
    for name in block_files::NAMES {
        let file = block_files::load(name);
        let weight = BlockWeight::from_host(&file.tensor, device);
        let expected = bytemuck::cast_slice(&file.dequantized);
        let got = match file.tensor.shape().len() {
            2 => bits::<2>(weight.dequantize(FloatType::F32).unwrap(), FloatType::F32),
            _ => bits::<3>(weight.dequantize(FloatType::F32).unwrap(), FloatType::F32),
        };
        assert_same_bits(&got, expected, name);
        assert_eq!(weight.to_host().as_ref(), Ok(&file.tensor), "{name}");
    }
}

fn products(device: &Device) {
    for quant_type in NEW {
        for [n, k] in [shape_of(quant_type), [64, 256]] {
            let tensor_ = host_weight(quant_type, &[n, k]);
            let weight = BlockWeight::from_host(&tensor_, device);
            let decoded = tensor_.dequantize::<f32>();
            for m in [1, 3, 17, 70] {
                let x = uniform(m * k, 9);
                let input = tensor::<2>(&x, [m, k], FloatType::F32, device);
                let y = linear(input, &weight, None).expect("sizes that fit");
                let mut expected = Vec::with_capacity(m * n);
                for x in x.chunks(k) {
                    for w in decoded.chunks(k) {
                        let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                        expected.push(products.sum::<f64>());
                    }
                }
                let what = format!("{quant_type:?} {m} rows, {n} by {k}");
                assert_near(&values(&y), &expected, 1.0 / 256.0, &what);
            }
        }
    }
}

fn gathered_rows(device: &Device) {
    for quant_type in NEW {
        let [rows, columns] = shape_of(quant_type);
        let tensor = host_weight(quant_type, &[rows, columns]);
        let weight = BlockWeight::from_host(&tensor, device);
        let ids = [0i64, rows as i64 - 1, 7, 7];
        let of_ids = TensorData::new(ids.to_vec(), [1, ids.len()]);
        let of_ids = Tensor::<2, Int>::from_data(of_ids, device);
        let got = embedding(of_ids, &weight, FloatType::F32).expect("rows that are there");
        let expected = ids.map(|id| tensor.dequantize_range::<f32>(id as usize * columns, columns));
        let expected = bytes(&expected.concat(), FloatType::F32);
        assert_same_bits(&bits(got, FloatType::F32), &expected, "gathered");
        let part = weight.dequantize_rows(5..8, FloatType::F32).expect("rows");
        let expected = tensor.dequantize_range::<f32>(5 * columns, 3 * columns);
        let expected = bytes(&expected, FloatType::F32);
        assert_same_bits(&bits(part, FloatType::F32), &expected, "rows");
    }
}

fn quantized_weights(device: &Device) {
    for quant_type in NEW {
        let shape = shape_of(quant_type);
        let values = weights(shape[0] * shape[1], 3);
        let dense = tensor::<2>(&values, shape, FloatType::F32, device);
        let weight = BlockWeight::quantize(dense, QuantConfig::of(quant_type)).expect("finite");
        assert_eq!(weight.to_host(), Ok(host_weight(quant_type, &shape)));
    }
}

on_every_device!(golden_files, products, gathered_rows, quantized_weights);

/// The name under which a record has a packed weight tells its form.
#[test]
fn forms_are_known_by_their_names() {
    for quant_type in QuantType::ALL {
        let form = WeightForm {
            shape: vec![4, 128],
            dtype: FloatType::BF16,
            config: QuantConfig::of(quant_type),
            transposed: false,
        };
        let name = form.packed_name();
        assert_eq!(WeightForm::from_packed_name(&name), Some(form), "{name}");
    }
}

/// Settings of bitsandbytes' types are not those of others.
#[test]
fn layers_of_zeros_have_the_type_of_their_config() {
    let device = Device::flex();
    for quant_type in QuantType::ALL {
        let linear = QuantLinearConfig::new(160, 70).with_quant_type(quant_type);
        let table = QuantEmbeddingConfig::new(70, 160).with_quant_type(quant_type);
        let weights = [
            linear.init(&device).expect("whole blocks").weight,
            table.init(&device).expect("whole blocks").weight,
        ];
        for weight in weights {
            assert_eq!(weight.config(), QuantConfig::of(quant_type));
            let zeros = weight.dequantize::<2>(FloatType::F32).expect("a matrix");
            assert!(values(&zeros).iter().all(|&value| value == 0.0));
        }
    }
}

/// Blocks of other types than bitsandbytes' follow the rows of what is stored.
#[test]
fn transposed_forms_are_of_bitsandbytes() {
    for quant_type in QuantType::ALL {
        let form = WeightForm {
            shape: vec![70, 160],
            dtype: FloatType::BF16,
            config: QuantConfig::of(quant_type),
            transposed: true,
        };
        match BlockWeight::zeros_of(form, &Device::flex()) {
            Ok(weight) => {
                assert!(quant_type.is_bitsandbytes());
                weight.dequantize::<2>(FloatType::F32).expect("a matrix");
            }
            Err(Nf4Error::Config { field, given, .. }) => {
                assert!(!quant_type.is_bitsandbytes());
                assert_eq!(field, "transposed");
                assert!(given.contains(quant_type.name()), "{given}");
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}
