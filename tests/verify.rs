//! Folders that are compared.
#![cfg(feature = "checkpoint")]

mod stored;

use std::path::Path;

use burn_nf4::checkpoint::{
    Checkpoint, CheckpointWriter, ComparedParameter, DEFAULT_MAX_SHARD_BYTES, DequantizeOptions,
    Difference, Dtype, QuantizeOptions, dequantize_checkpoint, quantize_checkpoint, verify,
};
use rstest::rstest;
use serde_json::{Value, json};
use stored::{quiet, write_model};
use tempfile::TempDir;

fn temp() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn open(path: impl AsRef<Path>) -> Checkpoint {
    Checkpoint::open(path).unwrap()
}

/// Two folders of one f32 tensor each.
fn difference(a: (&[f32], &[usize]), b: (&[f32], &[usize])) -> Difference {
    let folder = temp();
    let folders = ["a", "b"].map(|name| folder.path().join(name));
    for (folder, (values, shape)) in folders.iter().zip([a, b]) {
        let mut writer = CheckpointWriter::create(folder, DEFAULT_MAX_SHARD_BYTES).unwrap();
        let bytes = bytemuck::cast_slice(values);
        writer.write_tensor("t", Dtype::F32, shape, bytes).unwrap();
        writer.finish().unwrap();
    }
    let [a, b] = folders.map(open);
    let mut report = verify(&a, &b, quiet).unwrap();
    report.parameters.remove(0).difference
}

#[rstest]
#[case(&[1.0, f32::NAN], &[1.0, f32::NAN], Difference::IdenticalBytes)]
#[case(&[0.0, 3.0], &[-0.0, 3.0], Difference::IdenticalValues)]
#[case(&[3.0, 4.0], &[3.0, 3.5], Difference::Values { max_abs_error: 0.5, relative_rms_error: 0.1 })]
#[case(&[0.0, 0.0], &[1.0, 0.0], Difference::Values { max_abs_error: 1.0, relative_rms_error: f64::INFINITY })]
#[case(&[1.0, f32::NAN], &[1.0, 2.0], Difference::Values { max_abs_error: f64::INFINITY, relative_rms_error: f64::INFINITY })]
#[case(&[f32::INFINITY, 1.0], &[f32::INFINITY, -1.0], Difference::Values { max_abs_error: 2.0, relative_rms_error: 0.0 })]
fn values_are_compared(#[case] a: &[f32], #[case] b: &[f32], #[case] expected: Difference) {
    assert_eq!(difference((a, &[2]), (b, &[2])), expected);
}

#[test]
fn other_shapes_are_not_compared() {
    let values = [1.0, 2.0];
    let difference = difference((&values, &[2]), (&values, &[1, 2]));
    assert!(matches!(difference, Difference::NotComparable { .. }));
}

#[test]
fn a_report_lists_what_only_one_has_and_what_exceeds() {
    let folder = temp();
    let folders = ["a", "b"].map(|name| folder.path().join(name));
    for (folder, own) in folders.iter().zip(["only_a", "only_b"]) {
        let mut writer = CheckpointWriter::create(folder, DEFAULT_MAX_SHARD_BYTES).unwrap();
        let value = if own == "only_a" { 2.0f32 } else { 2.5 };
        for (key, dtype) in [("both", Dtype::F32), ("ids", Dtype::I32), (own, Dtype::F32)] {
            writer
                .write_tensor(key, dtype, &[1], &value.to_le_bytes())
                .unwrap();
        }
        writer.finish().unwrap();
    }
    let [a, b] = folders.map(open);
    let report = verify(&a, &b, quiet).unwrap();
    assert_eq!(report.missing, ["only_a"]);
    assert_eq!(report.extra, ["only_b"]);
    assert_eq!(report.max_abs_error(), 0.5);
    let names = |abs, rms| -> Vec<&str> {
        report
            .exceeding(abs, rms)
            .map(|p| p.name.as_str())
            .collect()
    };
    assert_eq!(names(0.0, 0.0), ["both", "ids"]);
    // Integers that differ have no tolerance.
    assert_eq!(names(0.5, 0.25), ["ids"]);
    assert_eq!(names(0.49, f64::INFINITY), ["both", "ids"]);
    assert_eq!(names(f64::INFINITY, 0.24), ["both", "ids"]);
    assert!(!report.is_within(f64::INFINITY, f64::INFINITY));
    assert!(verify(&a, &a, quiet).unwrap().is_within(0.0, 0.0));
}

const TABLE: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Whichever is the first, a head of its own is compared with the table that is the head of the other.
#[rstest]
#[case::said(json!({"tie_word_embeddings": true}))]
#[case::not_said(json!({}))]
fn a_tied_head_is_compared_as_its_table(#[case] config: Value) {
    let folder = temp();
    let [tied, packed, dense] = ["tied", "packed", "dense"].map(|name| folder.path().join(name));
    write_model(&tied, &config, &[(TABLE, &[64, 64])]);
    let options = QuantizeOptions {
        head: true,
        ..QuantizeOptions::default()
    };
    quantize_checkpoint(&open(&tied), &packed, &options, quiet).unwrap();
    let options = DequantizeOptions::default();
    dequantize_checkpoint(&open(&packed), &dense, &options, quiet).unwrap();
    for other in [&packed, &dense] {
        let report = verify(&open(&tied), &open(other), quiet).unwrap();
        assert!(report.missing.is_empty() && report.extra.is_empty());
        let [head, table] = &report.parameters[..] else {
            panic!("{report:?}");
        };
        let tied_to = |parameter: &ComparedParameter| parameter.tied_to.clone();
        assert_eq!(
            (head.name.as_str(), tied_to(head)),
            (HEAD, Some(TABLE.into()))
        );
        assert!(
            matches!(head.difference, Difference::Values { relative_rms_error, .. }
                if (0.01..0.12).contains(&relative_rms_error)),
            "{head:?}"
        );
        assert_eq!((table.name.as_str(), tied_to(table)), (TABLE, None));
        assert_eq!(table.difference, Difference::IdenticalBytes);
        let turned = verify(&open(other), &open(&tied), quiet).unwrap();
        assert!(turned.missing.is_empty() && turned.extra.is_empty());
        assert_eq!(turned.max_abs_error(), report.max_abs_error());
    }
}

#[rstest]
#[case::not_tied(json!({"tie_word_embeddings": false}), TABLE)]
#[case::no_table(json!({}), "transformer.wte.weight")]
fn a_head_that_is_not_tied_is_missing_where_it_is_not(
    #[case] config: Value,
    #[case] table: &'static str,
) {
    let folder = temp();
    let [whole, lacking] = ["whole", "lacking"].map(|name| folder.path().join(name));
    write_model(&whole, &config, &[(table, &[64, 64]), (HEAD, &[64, 64])]);
    write_model(&lacking, &config, &[(table, &[64, 64])]);
    let report = verify(&open(&whole), &open(&lacking), quiet).unwrap();
    assert_eq!(report.missing, [HEAD]);
    let report = verify(&open(&lacking), &open(&whole), quiet).unwrap();
    assert_eq!(report.extra, [HEAD]);
}

/// Rounding to 4 bit shows, and is of the size that NF4 has.
#[test]
fn quantizing_costs_what_nf4_costs() {
    let folder = temp();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    write_model(&source, &json!({}), &[("up.weight", &[640, 64])]);
    let options = QuantizeOptions::default();
    quantize_checkpoint(&open(&source), &out, &options, quiet).unwrap();
    let report = verify(&open(&source), &open(&out), quiet).unwrap();
    let Difference::Values {
        max_abs_error,
        relative_rms_error,
    } = report.parameters[0].difference
    else {
        panic!("{report:?}");
    };
    // The widest gap between two levels, 0.3038 at -1, halved; scales are below 1.01.
    assert!((0.01..0.16).contains(&max_abs_error), "{max_abs_error}");
    assert!(
        (0.02..0.12).contains(&relative_rms_error),
        "{relative_rms_error}"
    );
}
