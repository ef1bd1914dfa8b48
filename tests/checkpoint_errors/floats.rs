//! Float tensors are read as they are stored.

use super::*;

#[test]
fn float_tensors_are_not_converted() {
    let file = SafetensorsFile::open(golden::path(&format!("{NESTED}.safetensors"))).unwrap();
    assert!(
        file.path()
            .ends_with(Path::new(&format!("{NESTED}.safetensors")))
    );
    let (source, shape) = file.load_float::<bf16>("source").unwrap();
    assert_eq!((source.len(), shape), (128 * 256, vec![128, 256]));
    let dtype = |expected: &str| Nf4Error::Dtype {
        tensor: "source".into(),
        expected: expected.into(),
        given: "BF16".into(),
    };
    assert_eq!(file.load_float::<f16>("source").err(), Some(dtype("F16")));
    assert_eq!(file.load_float::<f32>("source").err(), Some(dtype("F32")));

    let missing = Nf4Error::MissingKey {
        path: file.path().into(),
        key: "bias".into(),
    };
    assert_eq!(file.load_float::<f32>("bias").err(), Some(missing.clone()));
    assert_eq!(file.tensor_info("bias").err(), Some(missing.clone()));
    assert_eq!(file.tensor_bytes("bias").err(), Some(missing.clone()));
    assert_eq!(file.is_transposed("bias").err(), Some(missing));
    let info = file.tensor_info("weight").unwrap();
    assert_eq!((info.dtype, info.shape), (Dtype::U8, &[16384, 1][..]));
}

/// NaNs keep their bits: a packed byte pair can look like one.
#[test]
fn float_bits_are_kept() {
    let patterns: Vec<u16> = (0..=u16::MAX).collect();
    let bytes: Vec<u8> = patterns
        .iter()
        .flat_map(|bits| bits.to_le_bytes())
        .collect();
    let mut draft = Draft(BTreeMap::new());
    // A name that leaves the data unaligned in the file or not, as it comes.
    for (name, bytes) in [("a", vec![1u8, 2, 3]), ("b", bytes)] {
        let (dtype, size) = if name == "a" {
            (Dtype::U8, 1)
        } else {
            (Dtype::BF16, 2)
        };
        let shape = vec![bytes.len() / size];
        draft.0.insert(
            name.into(),
            Tensor {
                dtype,
                shape,
                bytes,
            },
        );
    }
    let written = written(&draft.to_bytes());
    let file = SafetensorsFile::open(written.path()).unwrap();
    let (values, shape) = file.load_float::<bf16>("b").unwrap();
    assert_eq!(shape, [65536]);
    assert!(
        values
            .iter()
            .zip(patterns)
            .all(|(value, bits)| value.to_bits() == bits)
    );
}

/// All 65536 pairs of packed bytes, as 16-bit and as 32-bit floats, signalling NaNs included.
#[rstest]
fn float_storage_is_never_converted(
    #[values(Dtype::U8, Dtype::BF16, Dtype::F16, Dtype::F32)] storage: Dtype,
) {
    let codes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_be_bytes).collect();
    let mut draft = Draft::of(FLAT);
    let elems = codes.len() * 2;
    draft.edit_json("[128, 256]", &format!("[{elems}]"));
    *draft.part("") = Tensor {
        dtype: storage,
        shape: vec![codes.len() / (storage.bitsize() / 8), 1],
        bytes: codes.clone(),
    };
    let blocks = elems / 64;
    let absmax = draft.part("absmax");
    absmax.shape = vec![blocks];
    absmax.bytes = 1f32.to_le_bytes().repeat(blocks);
    assert_eq!(draft.load().unwrap().codes(), codes);
}
