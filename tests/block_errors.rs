//! Weights in NVFP4, MXFP4 and FP8 whose tensors are not as they should be: each a typed error that names
//! the tensor, the same from the file, to a device and among the faults.
#![cfg(feature = "checkpoint")]

mod blocks;
mod stored;

use blocks::tensors;
use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, Dtype, SafetensorsFile};
use rstest::rstest;
use stored::{Stored, Tensors, floats};

const CT: &str = "nvfp4_ct_17x64";
const MODELOPT: &str = "nvfp4_modelopt_17x64";
const MXFP4: &str = "mxfp4_ct_17x64";
const GPT_OSS: &str = "mxfp4_gpt_oss";
const TILES: &str = "fp8_block128_200x300";
const ROWS: &str = "fp8_channel_200x300";

/// The first error of loading a weight whose tensors were changed.
#[track_caller]
fn refused(file: &str, parameter: &str, change: impl FnOnce(&mut Tensors)) -> Nf4Error {
    let mut all = tensors(file, "");
    change(&mut all);
    let folder = tempfile::tempdir().unwrap();
    stored::write(folder.path(), &all);
    let path = folder.path().join("model.safetensors");
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.quantized_weights(), [parameter]);
    let error = file.load_quantized(parameter).unwrap_err();
    let same = |other: Nf4Error| assert_eq!(other.to_string(), error.to_string());
    same(file.weight_form(parameter).unwrap_err());
    let checkpoint = Checkpoint::open(&path).unwrap();
    same(checkpoint.load_quantized(parameter).unwrap_err());
    // Names and headers tell all but the values of scales.
    match checkpoint.faults().into_iter().next() {
        Some(fault) => same(fault),
        None => assert!(matches!(error, Nf4Error::NonFinite { .. }), "{error}"),
    }
    match error {
        Nf4Error::MissingKey { key, .. } => Nf4Error::MissingKey {
            path: "file".into(),
            key,
        },
        error => error,
    }
}

fn raw(dtype: Dtype, shape: &[usize]) -> Stored {
    let elems: usize = shape.iter().product();
    Stored {
        dtype,
        shape: shape.to_vec(),
        bytes: vec![0x38; elems * dtype.bitsize() / 8],
    }
}

#[rstest]
#[case(CT, "weight", "weight_scale")]
#[case(CT, "weight", "weight_global_scale")]
#[case(MXFP4, "weight", "weight_scale")]
#[case(MODELOPT, "weight", "weight_scale")]
#[case(MODELOPT, "weight", "weight_scale_2")]
#[case(GPT_OSS, "gate_up_proj", "gate_up_proj_scales")]
fn a_scale_that_is_missing_is_named(
    #[case] file: &str,
    #[case] parameter: &str,
    #[case] key: &str,
) {
    let error = refused(file, parameter, |all| drop(all.remove(key).unwrap()));
    let expected = Nf4Error::MissingKey {
        path: "file".into(),
        key: key.into(),
    };
    assert_eq!(error, expected);
}

#[rstest]
#[case(CT, "weight_packed", Dtype::I8, "U8")]
#[case(CT, "weight_scale", Dtype::U8, "F8_E4M3")]
#[case(CT, "weight_global_scale", Dtype::I32, "F32")]
#[case(MODELOPT, "weight", Dtype::I8, "U8")]
#[case(MODELOPT, "weight_scale", Dtype::I8, "F8_E4M3")]
#[case(MODELOPT, "weight_scale", Dtype::U8, "F8_E4M3")]
#[case(MXFP4, "weight_scale", Dtype::I8, "F8_E4M3, U8, F8_E8M0")]
#[case(GPT_OSS, "gate_up_proj_blocks", Dtype::I8, "U8")]
#[case(GPT_OSS, "gate_up_proj_scales", Dtype::F8_E4M3, "U8, F8_E8M0")]
#[case(TILES, "weight", Dtype::F8_E5M2, "F8_E4M3")]
#[case(TILES, "weight_scale_inv", Dtype::I32, "F16, BF16, F32")]
#[case(ROWS, "weight_scale", Dtype::I32, "F16, BF16, F32")]
fn another_dtype_is_named(
    #[case] file: &str,
    #[case] key: &str,
    #[case] dtype: Dtype,
    #[case] expected: &str,
) {
    let parameter = if file == GPT_OSS {
        "gate_up_proj"
    } else {
        "weight"
    };
    let error = refused(file, parameter, |all| {
        all.get_mut(key).unwrap().dtype = dtype
    });
    let expected = Nf4Error::Dtype {
        tensor: key.into(),
        expected: expected.into(),
        given: dtype.to_string(),
    };
    assert_eq!(error, expected);
}

#[rstest]
#[case(CT, "weight_scale", &[4, 17], &[17, 4])]
#[case(CT, "weight_scale", &[68], &[17, 4])]
#[case(CT, "weight_packed", &[32, 17], &[32, 2])]
#[case(MODELOPT, "weight_scale", &[34, 2], &[17, 4])]
#[case(MXFP4, "weight_scale", &[17, 2, 1], &[17, 2])]
#[case(GPT_OSS, "gate_up_proj_scales", &[3, 4, 24], &[3, 24, 4])]
#[case(TILES, "weight_scale_inv", &[3, 2], &[2, 3])]
#[case(TILES, "weight", &[300, 200], &[3, 2])]
#[case(ROWS, "weight_scale", &[1, 200], &[200, 1])]
#[case(ROWS, "weight_scale", &[100, 2], &[200, 1])]
fn another_shape_is_named(
    #[case] file: &str,
    #[case] key: &str,
    #[case] shape: &[usize],
    #[case] expected: &[usize],
) {
    let parameter = if file == GPT_OSS {
        "gate_up_proj"
    } else {
        "weight"
    };
    let error = refused(file, parameter, |all| {
        all.get_mut(key).unwrap().shape = shape.to_vec();
    });
    match error {
        Nf4Error::Shape {
            expected: given, ..
        } => assert_eq!(given, expected),
        // Rows of 17 bytes are no whole blocks.
        Nf4Error::Blocks { tensor, .. } => {
            assert_eq!((tensor.as_str(), key), ("weight", "weight_packed"))
        }
        error => panic!("{error:?}"),
    }
}

/// Catches rows that are not made of whole blocks.
#[rstest]
#[case(CT, "weight_packed", &[34, 16], "weight")]
#[case(CT, "weight_packed", &[544], "weight")]
#[case(MODELOPT, "weight", &[136, 4], "weight")]
#[case(MXFP4, "weight_packed", &[68, 8], "weight")]
#[case(TILES, "weight", &[60000], "weight")]
#[case(GPT_OSS, "gate_up_proj_blocks", &[3, 24, 8, 8], "gate_up_proj_blocks")]
#[case(GPT_OSS, "gate_up_proj_blocks", &[288, 16], "gate_up_proj_blocks")]
fn rows_of_other_blocks_are_refused(
    #[case] file: &str,
    #[case] key: &str,
    #[case] shape: &[usize],
    #[case] named: &str,
) {
    let parameter = if file == GPT_OSS {
        "gate_up_proj"
    } else {
        "weight"
    };
    let error = refused(file, parameter, |all| {
        all.get_mut(key).unwrap().shape = shape.to_vec()
    });
    match error {
        Nf4Error::Blocks { tensor, .. } => assert_eq!(tensor, named),
        // Rows of 32 are made of blocks of 16, but there are other scales.
        Nf4Error::Shape { tensor, .. } => {
            assert_eq!((tensor.as_str(), shape), ("weight_scale", &[34, 16][..]));
        }
        error => panic!("{error:?}"),
    }
}

#[rstest]
#[case(CT, "weight_global_scale", 0.0)]
#[case(CT, "weight_global_scale", -0.0)]
#[case(CT, "weight_global_scale", 1e-45)]
fn a_scale_that_nothing_can_be_divided_by_is_refused(
    #[case] file: &str,
    #[case] key: &str,
    #[case] value: f32,
) {
    let error = refused(file, "weight", |all| {
        all.insert(key.into(), floats(&[value], &[1]));
    });
    let expected = Nf4Error::Divisor {
        tensor: key.into(),
        given: value,
    };
    assert_eq!(error, expected);
}

#[rstest]
#[case(CT, "weight_global_scale", &[0xc0, 0x7f], 0)]
#[case(CT, "weight_global_scale", &[0x80, 0x7f], 0)]
#[case(MODELOPT, "weight_scale_2", &[0x80, 0xff], 0)]
#[case(TILES, "weight_scale_inv", &[0xc0, 0x7f], 5)]
#[case(ROWS, "weight_scale", &[0x80, 0x7f], 199)]
#[case(CT, "weight_scale", &[0x7f], 67)]
#[case(CT, "weight_scale", &[0xff], 67)]
#[case(MXFP4, "weight_scale", &[0xff], 33)]
#[case(GPT_OSS, "gate_up_proj_scales", &[0xff], 287)]
fn a_scale_that_is_no_number_is_refused(
    #[case] file: &str,
    #[case] key: &str,
    #[case] last_bytes: &[u8],
    #[case] at: usize,
) {
    let parameter = if file == GPT_OSS {
        "gate_up_proj"
    } else {
        "weight"
    };
    let error = refused(file, parameter, |all| {
        let bytes = &mut all.get_mut(key).unwrap().bytes;
        let start = bytes.len() - last_bytes.len();
        bytes[start..].copy_from_slice(last_bytes);
    });
    match error {
        Nf4Error::NonFinite { tensor, index, .. } => {
            assert_eq!((tensor.as_str(), index), (key, at))
        }
        error => panic!("{error:?}"),
    }
}

#[rstest]
#[case(TILES, "weight_scale", raw(Dtype::F32, &[200, 1]), ["weight_scale", "weight_scale_inv"])]
#[case(CT, "weight", raw(Dtype::BF16, &[17, 64]), ["weight_packed", "weight"])]
#[case(CT, "weight_scale_2", raw(Dtype::F32, &[1]), ["weight_global_scale", "weight_scale_2"])]
#[case(MODELOPT, "weight_packed", raw(Dtype::U8, &[17, 32]), ["weight_packed", "weight"])]
#[case(GPT_OSS, "gate_up_proj", raw(Dtype::BF16, &[3, 24, 128]), ["gate_up_proj_blocks", "gate_up_proj"])]
fn a_weight_in_two_forms_is_refused(
    #[case] file: &str,
    #[case] key: &str,
    #[case] tensor: Stored,
    #[case] both: [&str; 2],
) {
    let parameter = if file == GPT_OSS {
        "gate_up_proj"
    } else {
        "weight"
    };
    let error = refused(file, parameter, |all| drop(all.insert(key.into(), tensor)));
    let expected = Nf4Error::TwoForms {
        tensor: parameter.into(),
        first: both[0].into(),
        second: both[1].into(),
    };
    assert_eq!(error, expected);
}

#[test]
fn a_quant_state_beside_other_scales_is_refused() {
    let state =
        br#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [17, 64]}"#;
    let tensor = Stored {
        dtype: Dtype::U8,
        shape: vec![state.len()],
        bytes: state.to_vec(),
    };
    let key = "weight.quant_state.bitsandbytes__nf4";
    let error = refused(MODELOPT, "weight", |all| {
        drop(all.insert(key.into(), tensor))
    });
    assert!(matches!(error, Nf4Error::TwoForms { .. }), "{error}");
}

#[rstest]
#[case(CT)]
#[case(MXFP4)]
fn zero_points_are_refused(#[case] file: &str) {
    let key = "weight_zero_point";
    let error = refused(file, "weight", |all| {
        all.insert(key.into(), raw(Dtype::U8, &[17, 4]));
    });
    let Nf4Error::OtherQuantization { tensor, method } = error else {
        panic!("{error:?}");
    };
    assert_eq!(
        (tensor.as_str(), method),
        (key, "a format with zero points")
    );
}

/// The shape that some versions store beside the codes.
#[rstest]
#[case(&[17, 64], true)]
#[case(&[64, 17], false)]
#[case(&[-17, 64], false)]
#[case(&[17], false)]
fn a_stored_shape_is_compared(#[case] dims: &[i64], #[case] fits: bool) {
    let shape = Stored {
        dtype: Dtype::I64,
        shape: vec![dims.len()],
        bytes: dims.iter().flat_map(|dim| dim.to_le_bytes()).collect(),
    };
    if !fits {
        let error = refused(CT, "weight", |all| {
            drop(all.insert("weight_shape".into(), shape))
        });
        let (Nf4Error::Shape { tensor, .. } | Nf4Error::Length { tensor, .. }) = error else {
            panic!("{error:?}");
        };
        assert_eq!(tensor, "weight_shape");
        return;
    }
    let mut all = tensors(CT, "");
    all.insert("weight_shape".into(), shape);
    let folder = tempfile::tempdir().unwrap();
    stored::write(folder.path(), &all);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.parameters(), ["weight"]);
    assert_eq!(checkpoint.faults(), []);
}

/// Integers have the names of packed floats.
#[test]
fn packed_integers_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let all = Tensors::from([
        ("up.weight_packed".into(), raw(Dtype::I32, &[64, 8])),
        ("up.weight_scale".into(), raw(Dtype::BF16, &[64, 1])),
        ("up.weight_shape".into(), raw(Dtype::I64, &[2])),
    ]);
    stored::write(folder.path(), &all);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.quantized_weights().is_empty());
    let expected = Nf4Error::OtherQuantization {
        tensor: "up.weight_packed".into(),
        method: "integers, as compressed-tensors packs them",
    };
    assert_eq!(
        checkpoint.load_quantized("up.weight"),
        Err(expected.clone())
    );
    assert_eq!(checkpoint.faults().first(), Some(&expected));
}
