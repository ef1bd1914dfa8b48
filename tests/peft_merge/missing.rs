//! What an adapter or a base model lacks of the other.

use super::*;

#[test]
fn modules_that_the_base_lacks_are_listed_and_nothing_is_written() {
    let (_folder, base) = checkpoint(|writer| write_dense(writer, "v.weight", &[1], &[1.0]));
    let mut adapter = q_adapter(q_config());
    adapter.insert("layers.0.q", lora(false)).expect("it fits");
    let out = folder();
    let path = out.path().join("merged");
    let result = merge_16bit(
        &base,
        &adapter,
        &path,
        None,
        &MergeOptions::default(),
        |_| {},
    );
    assert_eq!(
        result,
        Err(Nf4Error::BaseLacks {
            missing: vec!["layers.0.q.weight".into(), "q.weight".into()]
        })
    );
    assert!(!path.exists());
}

/// Each base is a list of weights, all of one size. What is missing of it is listed, and nothing is
/// written; where it is allowed, it stays what it was.
#[rstest]
#[case::nothing(&["q", "v"], &[], &["a.q", "a.v", "b.q", "b.v"])]
#[case::a_layer(&["q", "v"], &["a.q", "a.v"], &["b.q", "b.v"])]
#[case::a_module_of_each(&["q", "v"], &["a.q", "b.q"], &["a.v", "b.v"])]
#[case::a_module_of_one(&["q", "v"], &["a.q", "a.v", "b.q"], &["b.v"])]
#[case::an_expert(&["e.0.w", "e.1.w"], &["c.e.0.w"], &["c.e.1.w"])]
#[case::all(&["q"], &["a.q", "b.q"], &[])]
#[case::a_name_that_the_base_does_not_have(&["q", "query"], &["a.q", "b.q"], &[])]
fn what_an_adapter_lacks_of_the_base_is_listed(
    #[case] targets: &[&str],
    #[case] adapted: &[&str],
    #[case] missing: &[&str],
    #[values(false, true)] is_quantized: bool,
) {
    let (_folder, base) = checkpoint(|writer| {
        for path in ["a.q", "a.v", "b.q", "b.v", "c.e.0.w", "c.e.1.w"] {
            let (key, shape) = (format!("{path}.weight"), [D_OUTPUT, D_INPUT]);
            let packed = BlockTensor::quantize(&weight(), &shape, QuantConfig::default());
            match is_quantized {
                true => writer
                    .write_nf4(&key, &packed.expect("valid"), Dtype::U8, false)
                    .expect("it fits"),
                false => write_dense(writer, &key, &shape, &weight()),
            }
        }
        // A norm is no linear layer, whatever a pattern selects.
        write_dense(writer, "norm.q.weight", &[D_INPUT], &[1.0; D_INPUT]);
    });
    let config = LoraConfig {
        target_modules: TargetModules::list(targets.iter().copied()),
        ..q_config()
    };
    let mut adapter = Adapter::new(config).expect("valid");
    for path in adapted {
        adapter.insert(path, lora(false)).expect("it is selected");
    }
    let missing: Vec<String> = missing.iter().map(ToString::to_string).collect();
    let expected = match missing.is_empty() {
        true => Ok(()),
        false => Err(Nf4Error::AdapterLacks { missing }),
    };
    assert_eq!(adapter.check_base(&base), expected);
    let strict = MergeOptions::default();
    let lax = MergeOptions {
        allow_missing: true,
        ..strict.clone()
    };
    for in_4bit in [false, true] {
        let merge = |out: &TempDir, options: &MergeOptions| {
            let path = out.path().join("merged");
            match in_4bit {
                false => merge_16bit(&base, &adapter, &path, None, options, |_| {}),
                true => merge_4bit(&base, &adapter, &path, options, |_| {}),
            }
        };
        let out = folder();
        assert_eq!(merge(&out, &strict).map(|_| ()), expected);
        assert_eq!(out.path().join("merged").exists(), expected.is_ok());
        let result = merge(&folder(), &lax).expect("it is allowed");
        assert_eq!(result.modules.len(), adapted.len());
    }
}
