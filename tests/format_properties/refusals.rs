//! What makes no tensor is refused.

use super::*;

#[rstest]
#[case::no_dimension_is_one_element(&[], 1, None)]
#[case::zero(&[4, 0], 0, Some(()))]
#[case::overflow(&[usize::MAX, 2], 2, Some(()))]
#[case::overflow_to_a_small_product(&[1 << 32, 1 << 32, 7], 0, Some(()))]
#[case::too_many_bytes(&[usize::MAX / 4], 1, Some(()))]
fn impossible_shapes_are_refused(
    #[case] shape: &[usize],
    #[case] elems: usize,
    #[case] refused: Option<()>,
) {
    let result = BlockTensor::quantize(&vec![1.0f32; elems], shape, QuantConfig::default());
    let expected = Nf4Error::ElementCount {
        tensor: "weight".into(),
        shape: shape.to_vec(),
    };
    assert_eq!(result.err(), refused.map(|()| expected));
}

#[rstest]
fn block_sizes_that_bitsandbytes_does_not_know_are_refused(
    #[values(0, 1, 16, 31, 33, 63, 65, 96, 8192, 1 << 32, u64::MAX)] elems: u64,
) {
    let expected = Nf4Error::BlockSize {
        tensor: "layer".into(),
        given: elems,
    };
    assert_eq!(BlockSize::new(elems, "layer"), Err(expected));
}

fn nested(codes: usize, absmax: usize) -> Absmax {
    Absmax::Nested(NestedAbsmax {
        codes: vec![0; codes],
        absmax: vec![1.0; absmax],
        map: Box::new(DYNAMIC_MAP),
        offset: 0.5,
        block_size: BlockSize::B256,
    })
}

/// 257 blocks of 64 weights, the last of one weight.
#[rstest]
#[case::codes_short(8192, Absmax::Flat(vec![1.0; 257]), "weight", 8193, 8192)]
#[case::codes_long(8194, Absmax::Flat(vec![1.0; 257]), "weight", 8193, 8194)]
#[case::codes_unpacked(16385, Absmax::Flat(vec![1.0; 257]), "weight", 8193, 16385)]
#[case::scales_short(8193, Absmax::Flat(vec![1.0; 256]), "absmax", 257, 256)]
#[case::scales_long(8193, Absmax::Flat(vec![1.0; 258]), "absmax", 257, 258)]
#[case::scales_empty(8193, Absmax::Flat(vec![]), "absmax", 257, 0)]
#[case::scale_codes_short(8193, nested(256, 2), "absmax", 257, 256)]
#[case::nested_scales_short(8193, nested(257, 1), "nested_absmax", 2, 1)]
#[case::nested_scales_long(8193, nested(257, 257), "nested_absmax", 2, 257)]
fn parts_of_the_wrong_length_are_refused(
    #[case] codes: usize,
    #[case] absmax: Absmax,
    #[case] tensor: &str,
    #[case] expected: usize,
    #[case] given: usize,
) {
    let result = BlockTensor::from_parts(
        vec![0; codes],
        absmax,
        vec![5, 29, 113],
        BlockSize::B64,
        FloatType::BF16,
        QuantType::Nf4,
    );
    let error = Nf4Error::Length {
        tensor: tensor.into(),
        expected,
        given,
    };
    assert_eq!(result, Err(error));
}

#[rstest]
#[case::offset(None)]
#[case::first_map_entry(Some(0))]
#[case::last_map_entry(Some(255))]
fn nested_scales_must_be_finite(
    #[case] entry: Option<usize>,
    #[values(f32::NAN, f32::INFINITY)] value: f32,
) {
    let Absmax::Nested(mut scales) = nested(1, 1) else {
        unreachable!()
    };
    let name = match entry {
        None => {
            scales.offset = value;
            "nested_offset"
        }
        Some(index) => {
            scales.map[index] = value;
            "nested_quant_map"
        }
    };
    let result = BlockTensor::from_parts(
        vec![0; 32],
        Absmax::Nested(scales),
        vec![64],
        BlockSize::B64,
        FloatType::F32,
        QuantType::Nf4,
    );
    assert!(
        matches!(&result, Err(Nf4Error::NonFinite { tensor, index, .. })
            if tensor == name && *index == entry.unwrap_or(0)),
        "{result:?}"
    );
}

#[test]
fn a_weight_must_fill_its_shape() {
    let error = BlockTensor::quantize(&[1.0f32; 63], &[8, 8], QuantConfig::default());
    let expected = Nf4Error::Length {
        tensor: "weight".into(),
        expected: 64,
        given: 63,
    };
    assert_eq!(error, Err(expected));
}

/// 16 is NVFP4's alone, and neither of weights nor of scales in bitsandbytes' types.
#[rstest]
fn blocks_of_16_are_not_of_bitsandbytes(
    #[values(QuantType::Nf4, QuantType::Fp4)] quant_type: QuantType,
    #[values(true, false)] of_scales: bool,
) {
    let mut config = QuantConfig::of(quant_type);
    match of_scales {
        true => config.nested_block_size = Some(BlockSize::B16),
        false => config.block_size = BlockSize::B16,
    }
    let expected = Nf4Error::BlockSize {
        tensor: "layer".into(),
        given: 16,
    };
    assert_eq!(config.check("layer"), Err(expected));
}

#[rstest]
fn scales_of_other_types_are_not_nested(
    #[values(
        QuantType::Nvfp4,
        QuantType::Mxfp4,
        QuantType::Fp8Block,
        QuantType::Fp8Channel
    )]
    quant_type: QuantType,
) {
    let config = QuantConfig::of(quant_type);
    assert_eq!(config.check("layer"), Ok(()));
    let nested = QuantConfig {
        nested_block_size: Some(BlockSize::B256),
        ..config
    };
    let expected = Nf4Error::Scales {
        tensor: "layer".into(),
        format: quant_type.name(),
        expected: config.scale_type(),
    };
    assert_eq!(nested.check("layer"), Err(expected));
}
