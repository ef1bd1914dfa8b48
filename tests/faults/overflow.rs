//! Weights that their dtype cannot hold once they are decoded.

use super::*;

/// A weight of one block a row, the first with another scale.
fn scaled(dtype: &str, quant_type: QuantType, scale: f32) -> Tensors {
    let config = QuantConfig {
        quant_type,
        ..QuantConfig::flat()
    };
    let weight = BlockTensor::quantize(&sine(8 * 64), &[8, 64], config).unwrap();
    let mut tensors = stored::weight("w", &weight);
    let absmax = tensors.get_mut("w.absmax").unwrap();
    absmax.bytes[..4].copy_from_slice(&scale.to_le_bytes());
    let name = format!("w.quant_state.bitsandbytes__{}", quant_type.name());
    let state = tensors.get_mut(&name).unwrap();
    let json = String::from_utf8(state.bytes.clone()).unwrap();
    state.bytes = json.replace("float32", dtype).into_bytes();
    state.shape = vec![state.bytes.len()];
    tensors
}

/// Everything that decodes on the host.
#[rstest]
#[case("float16", 1e5)]
#[case("float16", -65520.0)]
#[case("bfloat16", f32::MAX)]
fn a_weight_that_its_dtype_cannot_hold_is_named(
    #[case] dtype: &str,
    #[case] scale: f32,
    #[values(QuantType::Nf4, QuantType::Fp4)] quant_type: QuantType,
) {
    let folder = written(&scaled(dtype, quant_type, scale), None);
    let source = Checkpoint::open(folder.path()).unwrap();
    let assert_named = |error: Nf4Error| match error {
        Nf4Error::NonFinite {
            tensor,
            index,
            given,
        } => {
            assert_eq!(tensor, "w");
            assert!(index < 64 && given.is_infinite(), "{index} {given}");
        }
        other => panic!("{other:?}"),
    };
    let out = folder.path().join("out");
    for dtype in [None, Some(FloatType::F32)] {
        let options = DequantizeOptions {
            dtype,
            ..DequantizeOptions::default()
        };
        assert_named(dequantize_checkpoint(&source, &out, &options, quiet).unwrap_err());
    }
    let adapter = Adapter::new(LoraConfig::new(TargetModules::list(["up_proj"]))).unwrap();
    let merge = MergeOptions::default();
    assert_named(merge_16bit(&source, &adapter, &out, None, &merge, quiet).unwrap_err());
    assert!(!out.exists());
    let other = written(&scaled(dtype, quant_type, 1.0), None);
    let other = Checkpoint::open(other.path()).unwrap();
    assert_named(verify(&source, &other, quiet).unwrap_err());
    assert_named(verify(&other, &source, quiet).unwrap_err());
}

/// Two scales that are f32 can make one that is none.
#[test]
fn a_nested_scale_that_overflows_is_named() {
    let mut tensors = packed();
    for part in ["nested_absmax", "nested_quant_map"] {
        let values = tensors.get_mut(&format!("{UP}.{part}")).unwrap();
        let large = if part == "nested_absmax" {
            f32::MAX
        } else {
            2.0
        };
        values
            .bytes
            .chunks_mut(4)
            .for_each(|value| value.copy_from_slice(&large.to_le_bytes()));
    }
    let folder = written(&tensors, None);
    let source = Checkpoint::open(folder.path()).unwrap();
    let out = folder.path().join("out");
    let error = dequantize_checkpoint(&source, &out, &DequantizeOptions::default(), quiet);
    assert!(
        matches!(&error, Err(Nf4Error::NonFinite { tensor, .. }) if tensor == UP),
        "{error:?}"
    );
}

/// The scale alone does not tell: no value of the block need be that large.
#[rstest]
#[case("float32", f32::MAX, 0xff)]
#[case("float16", 65504.0, 0xff)]
#[case("float16", 1e5, 0x77)]
fn a_weight_that_its_dtype_holds_is_decoded(
    #[case] dtype: &str,
    #[case] scale: f32,
    #[case] codes: u8,
) {
    let mut tensors = scaled(dtype, QuantType::Nf4, scale);
    tensors.get_mut("w").unwrap().bytes[..32].fill(codes);
    let folder = written(&tensors, None);
    let source = Checkpoint::open(folder.path()).unwrap();
    let out = folder.path().join("out");
    dequantize_checkpoint(&source, &out, &DequantizeOptions::default(), quiet).unwrap();
    let report = verify(&source, &Checkpoint::open(out).unwrap(), quiet).unwrap();
    assert!(report.is_within(0.0, 0.0));
}

/// Quantized scales are a little off, and the largest f16 has nothing above it.
#[test]
fn quantizing_never_makes_an_infinity() {
    let mut values = vec![0.0; 64 * 64];
    // The scale of the first block makes the scale of the scales large.
    for block in values.chunks_mut(64).skip(1) {
        block[0] = 65504.0;
    }
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|&value| half::f16::from_f32(value).to_le_bytes())
        .collect();
    let weight = Stored {
        dtype: Dtype::F16,
        shape: vec![64, 64],
        bytes,
    };
    let folder = written(&Tensors::from([(UP.into(), weight)]), None);
    let source = Checkpoint::open(folder.path()).unwrap();
    let out = folder.path().join("out");
    let error = quantize_checkpoint(&source, &out, &QuantizeOptions::default(), quiet);
    assert!(
        matches!(&error, Err(Nf4Error::NonFinite { tensor, .. }) if tensor == UP),
        "{error:?}"
    );
    let flat = QuantizeOptions {
        config: QuantConfig::flat(),
        ..QuantizeOptions::default()
    };
    quantize_checkpoint(&source, &out, &flat, quiet).unwrap();
}
