//! Files that are broken or lie: every one is refused by a typed error that names the key at
//! fault, and none by a panic.
#![cfg(feature = "checkpoint")]

mod golden;

#[path = "checkpoint_errors/files.rs"]
mod files;

#[path = "checkpoint_errors/floats.rs"]
mod floats;

use std::collections::BTreeMap;
use std::path::Path;

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Dtype, NestedState, QuantState, SafetensorsFile};
use burn_nf4::format::{BlockSize, BlockTensor, FloatType, QuantType};
use half::{bf16, f16};
use rstest::rstest;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use tempfile::NamedTempFile;

const NESTED: &str = "bf16_b64_nested_128x256_normal";
const FLAT: &str = "bf16_b64_flat_128x256_normal";
const FP4: &str = "f16_b64_nested_128x256_normal_fp4";
/// The parameter's name in the edited files.
const PREFIX: &str = "model.layers.0.mlp.up_proj.weight";

#[derive(Debug, Clone)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A golden weight under a longer name, to be edited and written.
#[derive(Debug, Clone)]
struct Draft(BTreeMap<String, Tensor>);

fn key(part: &str) -> String {
    match part {
        "" => PREFIX.into(),
        part => format!("{PREFIX}.{part}"),
    }
}

fn state_key() -> String {
    key("quant_state.bitsandbytes__nf4")
}

impl Draft {
    fn of(name: &str) -> Self {
        let bytes = std::fs::read(golden::path(&format!("{name}.safetensors"))).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let weight = file.iter().filter_map(|(name, view)| {
            let rest = name.strip_prefix("weight")?;
            let tensor = Tensor {
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                bytes: view.data().to_vec(),
            };
            Some((format!("{PREFIX}{rest}"), tensor))
        });
        Self(weight.collect())
    }

    fn part(&mut self, part: &str) -> &mut Tensor {
        self.0.get_mut(&key(part)).unwrap()
    }

    fn remove(&mut self, part: &str) -> Tensor {
        self.0.remove(&key(part)).unwrap()
    }

    fn put_f32(&mut self, part: &str, index: usize, value: f32) {
        self.part(part).bytes[4 * index..][..4].copy_from_slice(&value.to_le_bytes());
    }

    fn set_json(&mut self, json: impl Into<Vec<u8>>) {
        let bytes = json.into();
        let state = self.part("quant_state.bitsandbytes__nf4");
        state.shape = vec![bytes.len()];
        state.bytes = bytes;
    }

    /// Replaces a piece of the JSON text that must be there.
    fn edit_json(&mut self, from: &str, to: &str) {
        let state = &self.part("quant_state.bitsandbytes__nf4").bytes;
        let text = String::from_utf8(state.clone()).unwrap();
        assert!(text.contains(from), "{text}");
        self.set_json(text.replacen(from, to, 1));
    }

    fn to_bytes(&self) -> Vec<u8> {
        let views = self.0.iter().map(|(name, tensor)| {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
            (name.clone(), view.unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    fn load(&self) -> Result<BlockTensor, Nf4Error> {
        let file = written(&self.to_bytes());
        SafetensorsFile::open(file.path())?.load_quantized(PREFIX)
    }

    fn error(&self) -> Nf4Error {
        self.load().unwrap_err()
    }
}

fn written(bytes: &[u8]) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

/// The edits below must be what breaks the file.
#[rstest]
#[case(NESTED)]
#[case(FLAT)]
#[case(FP4)]
fn unedited_draft_loads(#[case] name: &str) {
    assert_eq!(Draft::of(name).load().unwrap(), golden::load(name).tensor);
}

#[rstest]
#[case::weight("")]
#[case::absmax("absmax")]
#[case::quant_map("quant_map")]
#[case::nested_absmax("nested_absmax")]
#[case::nested_quant_map("nested_quant_map")]
#[case::quant_state("quant_state.bitsandbytes__nf4")]
fn missing_tensor(#[case] part: &str) {
    let mut draft = Draft::of(NESTED);
    draft.remove(part);
    let file = written(&draft.to_bytes());
    let error = SafetensorsFile::open(file.path())
        .unwrap()
        .load_quantized(PREFIX)
        .unwrap_err();
    let expected = Nf4Error::MissingKey {
        path: file.path().into(),
        key: key(part),
    };
    assert_eq!(error, expected);
}

#[rstest]
#[case::weight("", Dtype::I8, "U8, BF16, F16, F32")]
#[case::absmax_of_nested("absmax", Dtype::I8, "U8")]
#[case::quant_map("quant_map", Dtype::I32, "F32")]
#[case::nested_absmax("nested_absmax", Dtype::U32, "F32")]
#[case::nested_quant_map("nested_quant_map", Dtype::I32, "F32")]
#[case::quant_state("quant_state.bitsandbytes__nf4", Dtype::I8, "U8")]
fn wrong_dtype(#[case] part: &str, #[case] dtype: Dtype, #[case] expected: &str) {
    let mut draft = Draft::of(NESTED);
    draft.part(part).dtype = dtype;
    let expected = Nf4Error::Dtype {
        tensor: key(part),
        expected: expected.into(),
        given: dtype.to_string(),
    };
    assert_eq!(draft.error(), expected);
}

/// Flat scales under a nested state and the other way round.
#[test]
fn scales_of_the_other_kind() {
    let (mut nested, mut flat) = (Draft::of(NESTED), Draft::of(FLAT));
    std::mem::swap(nested.part("absmax"), flat.part("absmax"));
    let dtype = |expected: &str, given: &str| Nf4Error::Dtype {
        tensor: key("absmax"),
        expected: expected.into(),
        given: given.into(),
    };
    assert_eq!(nested.error(), dtype("U8", "F32"));
    assert_eq!(flat.error(), dtype("F32", "U8"));
}

#[rstest]
#[case::weight_short("", vec![16383, 1], 16384, 16383)]
#[case::weight_long("", vec![16385, 1], 16384, 16385)]
#[case::absmax_short("absmax", vec![511], 512, 511)]
#[case::absmax_empty("absmax", vec![0], 512, 0)]
#[case::quant_map_short("quant_map", vec![15], 16, 15)]
#[case::quant_map_of_8_bit("quant_map", vec![256], 16, 256)]
#[case::nested_absmax_short("nested_absmax", vec![1], 2, 1)]
#[case::nested_absmax_long("nested_absmax", vec![512], 2, 512)]
#[case::nested_quant_map_short("nested_quant_map", vec![255], 256, 255)]
#[case::nested_quant_map_of_4_bit("nested_quant_map", vec![16], 256, 16)]
fn wrong_length(
    #[case] part: &str,
    #[case] shape: Vec<usize>,
    #[case] expected: usize,
    #[case] given: usize,
) {
    let mut draft = Draft::of(NESTED);
    let tensor = draft.part(part);
    let elem_bytes = tensor.dtype.bitsize() / 8;
    tensor
        .bytes
        .resize(shape.iter().product::<usize>() * elem_bytes, 0);
    tensor.shape = shape;
    let expected = Nf4Error::Length {
        tensor: key(part),
        expected,
        given,
    };
    assert_eq!(draft.error(), expected);
}

/// Lengths of a float-stored weight count bytes, whatever the dtype.
#[test]
fn wrong_length_of_float_storage() {
    let mut draft = Draft::of("f32_b64_flat_128x256_normal_in_f32");
    let weight = draft.part("");
    weight.bytes.truncate(16380);
    weight.shape = vec![4095, 1];
    let expected = Nf4Error::Length {
        tensor: key(""),
        expected: 16384,
        given: 16380,
    };
    assert_eq!(draft.error(), expected);
}

#[rstest]
#[case::flat(vec![16384])]
#[case::unpacked_matrix(vec![128, 128])]
#[case::three_dimensions(vec![16384, 1, 1])]
fn wrong_shape_of_the_codes(#[case] shape: Vec<usize>) {
    let mut draft = Draft::of(NESTED);
    draft.part("").shape = shape.clone();
    let expected = Nf4Error::Shape {
        tensor: key(""),
        expected: vec![16384, 1],
        given: shape,
    };
    assert_eq!(draft.error(), expected);
}

/// bitsandbytes' mark of a transposed weight: the same codes, to be transposed once decoded.
#[test]
fn transposed_storage_is_read_and_told() {
    let mut draft = Draft::of(NESTED);
    draft.part("").shape.reverse();
    let written = written(&draft.to_bytes());
    let file = SafetensorsFile::open(written.path()).unwrap();
    assert_eq!(file.is_transposed(PREFIX), Ok(true));
    assert_eq!(
        file.load_quantized(PREFIX).unwrap(),
        golden::load(NESTED).tensor
    );
}

#[rstest]
#[case::other_type("\"nf4\"", "\"int8\"", "int8")]
#[case::other_case("\"nf4\"", "\"NF4\"", "NF4")]
#[case::empty("\"nf4\"", "\"\"", "")]
fn unknown_quant_type(#[case] from: &str, #[case] to: &str, #[case] given: &str) {
    let mut draft = Draft::of(NESTED);
    draft.edit_json(from, to);
    let expected = Nf4Error::QuantType {
        tensor: state_key(),
        given: given.into(),
    };
    assert_eq!(draft.error(), expected);
}

fn assert_quant_state_error(error: Nf4Error, words: &str) {
    match error {
        Nf4Error::QuantState { key, message } => {
            assert_eq!(key, state_key());
            assert!(message.contains(words), "{message}");
        }
        other => panic!("expected a quant_state error, got {other:?}"),
    }
}

#[rstest]
#[case::cut_short("\"shape\": [128, 256]", "\"shape\": [128, 25", "")]
#[case::not_a_number("\"blocksize\": 64", "\"blocksize\": \"64\"", "invalid type")]
#[case::negative_size("\"blocksize\": 64", "\"blocksize\": -64", "invalid value")]
#[case::fractional_size("\"blocksize\": 64", "\"blocksize\": 64.5", "invalid type")]
#[case::negative_dimension("[128, 256]", "[-128, 256]", "invalid value")]
#[case::dimension_beyond_64_bits("[128, 256]", "[18446744073709551616]", "invalid type")]
#[case::shape_of_text("[128, 256]", "\"128x256\"", "invalid type")]
#[case::no_shape("\"shape\"", "\"form\"", "missing field `shape`")]
#[case::no_block_size("\"blocksize\"", "\"size\"", "missing field `blocksize`")]
#[case::no_quant_type("\"quant_type\"", "\"type\"", "missing field `quant_type`")]
#[case::no_dtype("\"dtype\"", "\"type\"", "missing field `dtype`")]
#[case::twice(
    "\"blocksize\": 64",
    "\"blocksize\": 64, \"blocksize\": 128",
    "duplicate"
)]
#[case::no_offset("\"nested_offset\"", "\"offset\"", "not all")]
#[case::no_nested_size("\"nested_blocksize\"", "\"size\"", "not all")]
#[case::no_nested_dtype("\"nested_dtype\"", "\"type\"", "not all")]
#[case::null_offset(
    "\"nested_offset\": 0.05",
    "\"nested_offset\": null, \"x\": 0.05",
    "not all"
)]
#[case::another_type_than_the_key("\"nf4\"", "\"fp4\"", "the key says `nf4`")]
fn malformed_quant_state(#[case] from: &str, #[case] to: &str, #[case] words: &str) {
    let mut draft = Draft::of(NESTED);
    draft.edit_json(from, to);
    assert_quant_state_error(draft.error(), words);
}

#[rstest]
#[case::empty(b"".as_slice())]
#[case::not_utf8(b"{\"quant_type\": \"\xff\xfe\"}")]
#[case::not_json(b"\x80\x02}q\x00")]
#[case::other_value(b"42")]
#[case::trailing(b"{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"bfloat16\", \"shape\": [128, 256]} {}")]
fn quant_state_that_is_not_json(#[case] json: &[u8]) {
    let mut draft = Draft::of(NESTED);
    draft.set_json(json);
    assert_quant_state_error(draft.error(), "");
}

/// Nesting deep enough to overflow a stack that follows it.
#[test]
fn deeply_nested_quant_state() {
    let mut draft = Draft::of(NESTED);
    draft.set_json("[".repeat(1_000_000));
    assert_quant_state_error(draft.error(), "");
    draft.set_json(format!("{{\"x\": {}", "[".repeat(1_000_000)));
    assert_quant_state_error(draft.error(), "");
}

#[rstest]
fn unknown_block_size(
    #[values("\"blocksize\": 64", "\"nested_blocksize\": 256")] from: &str,
    #[values(0, 1, 48, 8192, u64::MAX)] given: u64,
) {
    let mut draft = Draft::of(NESTED);
    let (name, _) = from.split_once(':').unwrap();
    draft.edit_json(from, &format!("{name}: {given}"));
    let expected = Nf4Error::BlockSize {
        tensor: state_key(),
        given,
    };
    assert_eq!(draft.error(), expected);
}

#[rstest]
#[case::of_the_weight("bfloat16", "int8", "float16, bfloat16 or float32")]
#[case::double("bfloat16", "float64", "float16, bfloat16 or float32")]
#[case::of_the_scales("float32", "float16", "nested_dtype float32")]
fn unknown_dtype_name(#[case] from: &str, #[case] to: &str, #[case] expected: &str) {
    let mut draft = Draft::of(NESTED);
    draft.edit_json(from, to);
    let expected = Nf4Error::Dtype {
        tensor: state_key(),
        expected: expected.into(),
        given: to.into(),
    };
    assert_eq!(draft.error(), expected);
}

/// Shapes whose product overflows, also to something small, or is zero. Nothing is allocated.
#[cfg(target_pointer_width = "64")]
#[rstest]
#[case::zero(vec![0, 256])]
#[case::overflow(vec![usize::MAX, usize::MAX])]
#[case::overflow_to_the_right_size(vec![(1 << 63) + 128, 256, 1])]
#[case::overflow_to_zero(vec![1 << 32, 1 << 32])]
#[case::more_than_memory(vec![usize::MAX / 4, 1])]
fn impossible_shape(#[case] shape: Vec<usize>) {
    let mut draft = Draft::of(NESTED);
    draft.edit_json("[128, 256]", &format!("{shape:?}"));
    let expected = Nf4Error::ElementCount {
        tensor: state_key(),
        shape,
    };
    assert_eq!(draft.error(), expected);
}

/// A shape that is possible but not of these codes.
#[rstest]
#[case::larger("[128, 512]", 32768)]
#[case::smaller("[128, 255]", 16320)]
#[case::no_dimensions("[]", 1)]
#[case::huge("[1099511627776]", 549755813888)]
fn lying_shape(#[case] shape: &str, #[case] expected: usize) {
    let mut draft = Draft::of(NESTED);
    draft.edit_json("[128, 256]", shape);
    let expected = Nf4Error::Length {
        tensor: key(""),
        expected,
        given: 16384,
    };
    assert_eq!(draft.error(), expected);
}

/// The same element count in another shape is the file's to say.
#[test]
fn shape_is_authoritative() {
    let mut draft = Draft::of(NESTED);
    draft.edit_json("[128, 256]", "[2, 64, 256]");
    let tensor = draft.load().unwrap();
    assert_eq!(tensor.shape(), [2, 64, 256]);
    assert_eq!(tensor.codes(), golden::load(NESTED).tensor.codes());
}

#[rstest]
#[case::first(NESTED, 0, -0.99, -1.0)]
#[case::one_ulp(NESTED, 15, 0.99999994, 1.0)]
#[case::negative_zero(NESTED, 7, -0.0, 0.0)]
#[case::fp4_zero(FP4, 0, -0.0, 0.0)]
#[case::fp4_second_zero(FP4, 8, 1e-45, -0.0)]
#[case::fp4_level(FP4, 3, 0.5, 1.0)]
fn altered_codebook(
    #[case] name: &str,
    #[case] index: usize,
    #[case] given: f32,
    #[case] expected: f32,
) {
    let mut draft = Draft::of(name);
    draft.put_f32("quant_map", index, given);
    let expected = Nf4Error::Codebook {
        tensor: key("quant_map"),
        index,
        expected,
        given,
    };
    assert_eq!(draft.error(), expected);
}

#[test]
fn codebook_with_a_nan() {
    let mut draft = Draft::of(NESTED);
    draft.put_f32("quant_map", 4, f32::NAN);
    let error = draft.error();
    assert!(
        matches!(&error, Nf4Error::Codebook { tensor, index: 4, given, .. }
            if *tensor == key("quant_map") && given.is_nan()),
        "{error:?}"
    );
}

/// bitsandbytes stores FP4's second zero as +0.0 and decodes it to -0.0.
#[rstest]
fn either_sign_of_the_second_fp4_zero(#[values(0.0, -0.0)] zero: f32) {
    let mut draft = Draft::of(FP4);
    draft.put_f32("quant_map", 8, zero);
    assert_eq!(draft.load().unwrap(), golden::load(FP4).tensor);
}

#[test]
fn codebook_of_the_other_type() {
    let mut draft = Draft::of(NESTED);
    *draft.part("quant_map") = Draft::of(FP4).remove("quant_map");
    let expected = Nf4Error::Codebook {
        tensor: key("quant_map"),
        index: 0,
        expected: -1.0,
        given: 0.0,
    };
    assert_eq!(draft.error(), expected);
}

#[rstest]
#[case(NESTED, "nested_absmax", 1)]
#[case(NESTED, "nested_quant_map", 0)]
#[case(NESTED, "nested_quant_map", 255)]
#[case(FLAT, "absmax", 511)]
fn scales_that_are_not_finite(
    #[case] name: &str,
    #[case] part: &str,
    #[case] at: usize,
    #[values(f32::NAN, f32::INFINITY, f32::NEG_INFINITY)] value: f32,
) {
    let mut draft = Draft::of(name);
    draft.put_f32(part, at, value);
    match draft.error() {
        Nf4Error::NonFinite {
            tensor,
            index,
            given,
        } => {
            assert_eq!((tensor, index), (key(part), at));
            assert_eq!(given.to_bits(), value.to_bits());
        }
        other => panic!("{other:?}"),
    }
}

/// An offset that is a number to Python, but not an f32.
#[rstest]
#[case::beyond_f32("1e39", f32::INFINITY)]
#[case::beyond_f64("-1e999", f32::NEG_INFINITY)]
#[case::infinity("Infinity", f32::INFINITY)]
#[case::nan("NaN", f32::NAN)]
#[case::huge_integer("1000000000000000000000000000000000000000", f32::INFINITY)]
fn offset_that_is_no_f32(#[case] offset: &str, #[case] value: f32) {
    let mut draft = Draft::of(NESTED);
    let to = format!("\"nested_offset\": {offset}, \"x\": ");
    draft.edit_json("\"nested_offset\": ", &to);
    match draft.error() {
        Nf4Error::NonFinite { tensor, given, .. } => {
            assert_eq!(tensor, state_key());
            assert!(
                given == value || (given.is_nan() && value.is_nan()),
                "{given}"
            );
        }
        other => panic!("{other:?}"),
    }
}

/// Python writes them, and a newer version may have other fields.
#[test]
fn numbers_of_python_in_other_fields_are_ignored() {
    let mut draft = Draft::of(NESTED);
    draft.edit_json(
        "\"blocksize\"",
        "\"x\": [Infinity, NaN, 1e999, 99999999999999999999], \"blocksize\"",
    );
    assert_eq!(draft.load().unwrap(), golden::load(NESTED).tensor);
}

/// The map of the scales is the file's own, and used as it is.
#[test]
fn nested_map_is_taken_from_the_file() {
    let mut draft = Draft::of(NESTED);
    for index in 0..256 {
        draft.put_f32("nested_quant_map", index, 0.0);
    }
    let tensor = draft.load().unwrap();
    let json = &draft.part("quant_state.bitsandbytes__nf4").bytes;
    let offset = QuantState::parse(json, "").unwrap().nested.unwrap().offset;
    assert!((0..tensor.blocks()).all(|block| tensor.scale(block) == offset));
}

#[test]
fn two_states_of_one_weight() {
    let mut draft = Draft::of(NESTED);
    let state = draft.part("quant_state.bitsandbytes__nf4").clone();
    draft.0.insert(key("quant_state.bitsandbytes__fp4"), state);
    assert_quant_state_error(draft.error(), "bitsandbytes__fp4` is there too");
}

#[test]
fn flat_state_beside_nested_scales() {
    let mut draft = Draft::of(FLAT);
    let nested_absmax = Draft::of(NESTED).remove("nested_absmax");
    draft.0.insert(key("nested_absmax"), nested_absmax);
    assert_quant_state_error(draft.error(), "nested_absmax` is there");
}

/// Keys that only look like a quantized weight's.
#[test]
fn quantized_weights_are_found_by_their_state() {
    let mut draft = Draft::of(NESTED);
    let plain = draft.part("absmax").clone();
    let names = [
        "model.norm.weight",
        "z.weight.quant_state.bitsandbytes__fp4",
        "a.weight.quant_state.bitsandbytes__nf4",
        "b.weight.quant_state.bitsandbytes__nf4.copy",
        "c.weight.quant_state.bitsandbytes__int8",
        "quant_state.bitsandbytes__nf4",
    ];
    for name in names {
        draft.0.insert(name.into(), plain.clone());
    }
    let written = written(&draft.to_bytes());
    let file = SafetensorsFile::open(written.path()).unwrap();
    assert_eq!(file.quantized_weights(), ["a.weight", PREFIX, "z.weight"]);
    assert!(file.is_quantized("z.weight"));
    for other in ["b.weight", "c.weight", "model.norm.weight", "", "a"] {
        assert!(!file.is_quantized(other), "{other}");
    }
    assert!(file.keys().is_sorted());
    assert_eq!(file.keys().count(), draft.0.len());
}

#[test]
fn quant_state_fields() {
    let json = br#"{"quant_type": "fp4", "blocksize": 4096, "dtype": "torch.float16",
        "shape": [3, 5, 7, 11], "nested_blocksize": 256, "nested_dtype": "float32",
        "nested_offset": 0.0527377650141716, "added_later": {"x": [1, 2]}}"#;
    let state = QuantState::parse(json, "key").unwrap();
    let expected = QuantState {
        quant_type: QuantType::Fp4,
        block_size: BlockSize::ALL[7],
        dtype: FloatType::F16,
        shape: vec![3, 5, 7, 11],
        nested: Some(NestedState {
            block_size: BlockSize::B256,
            offset: 0.052737765,
        }),
    };
    assert_eq!(state, expected);
    assert_eq!(state.config().nested_block_size, Some(BlockSize::B256));
}

/// Bytes of a real file changed at random: an error or a weight, never a panic.
#[test]
fn random_corruption_never_panics() {
    for name in ["f16_b64_nested_17x33_normal", "bf16_b64_flat_17x33_normal"] {
        let original = std::fs::read(golden::path(&format!("{name}.safetensors"))).unwrap();
        let mut random = 0x2545_f491_4f6c_dd1du64;
        let mut next = |below: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % below as u64) as usize
        };
        let mut refused = 0;
        for _ in 0..500 {
            let mut bytes = original.clone();
            for _ in 0..=next(3) {
                let at = next(bytes.len());
                bytes[at] = match next(3) {
                    0 => bytes[at] ^ 1 << next(8),
                    1 => b"0123456789-\"[]{},.eE"[next(20)],
                    _ => next(256) as u8,
                };
            }
            bytes.truncate(if next(8) == 0 {
                next(bytes.len())
            } else {
                bytes.len()
            });
            let file = written(&bytes);
            match SafetensorsFile::open(file.path()).and_then(|file| file.load_quantized("weight"))
            {
                Err(_) => refused += 1,
                Ok(tensor) => assert_eq!(tensor.dequantize::<f32>().len(), tensor.elems()),
            }
        }
        assert!(refused > 50, "{refused}");
    }
}
