//! The command-line program.
#![cfg(feature = "cli")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use burn_nf4::checkpoint::Checkpoint;
use rstest::rstest;
use serde_json::Value;

const F32: &str = "../../tests/fixtures/hf/f32/model";
const SHARDED: &str = "../../tests/fixtures/hf/f32_sharded/model";

fn run<const N: usize>(args: [&str; N]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
        .args(args)
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn succeeds<const N: usize>(args: [&str; N]) -> String {
    let output = run(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    // No bar where stderr is no terminal.
    assert_eq!(errors, "");
    stdout(&output)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn folders<const N: usize>(names: [&str; N]) -> (tempfile::TempDir, [PathBuf; N]) {
    let folder = tempfile::tempdir().unwrap();
    let paths = names.map(|name| folder.path().join(name));
    (folder, paths)
}

#[test]
fn inspect_lists_parameters_and_totals() {
    let table = succeeds(["inspect", F32]);
    let row = |name: &str| -> Vec<String> {
        let line = table.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().map(String::from).collect()
    };
    let norm = row("model.norm.weight");
    assert_eq!(norm[1..], ["[128]", "F32", "-", "-", "512", "4.000"]);
    let q_proj = row("model.layers.0.self_attn.q_proj.weight");
    let state = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4";
    let state = Checkpoint::open(F32)
        .unwrap()
        .tensor_bytes(state)
        .unwrap()
        .len();
    let bytes = 128 * 128 / 2 + 256 + 4 + 1024 + 64 + state;
    let per_weight = format!("{:.3}", bytes as f64 / (128.0 * 128.0));
    let bytes = bytes.to_string();
    let end = ["nf4", "of", "float32", "64", "u8/256", &bytes, &per_weight];
    assert_eq!(q_proj[3..], end);
    assert!(
        table.ends_with(
            "quantized: 14 parameters, 368640 weights in 207775 bytes, 0.564 bytes per weight\n\
         total: 21 parameters, 434816 weights in 472479 bytes, 1.087 bytes per weight\n"
        ),
        "{table}"
    );
}

/// A folder whose `config.json` claims LLM.int8, and which has none.
fn faulty(folder: &Path) {
    fs::create_dir(folder).unwrap();
    for name in ["model.safetensors", "config.json"] {
        fs::copy(Path::new(F32).join(name), folder.join(name)).unwrap();
    }
    let config = folder.join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace("\"load_in_8bit\": false", "\"load_in_8bit\": true"),
    )
    .unwrap();
}

#[test]
fn faults_are_told_by_all_commands() {
    let (_parent, [folder, out]) = folders(["model", "out"]);
    faulty(&folder);
    let fault = "`quantization_config` is bitsandbytes in 8 bit";
    let table = succeeds(["inspect", text(&folder)]);
    assert!(table.contains(&format!("fault: {fault}")), "{table}");
    let json: Value =
        serde_json::from_str(&succeeds(["inspect", "--json", text(&folder)])).unwrap();
    let faults = json["faults"].as_array().unwrap();
    assert!(faults[0].as_str().unwrap().starts_with(fault), "{json}");
    assert_eq!(faults.len(), 1);

    let output = run(["verify", F32, text(&folder)]);
    assert_eq!(output.status.code(), Some(0));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(
        errors.starts_with(&format!("B: fault: {fault}")),
        "{errors}"
    );
    let output = run(["dequantize", text(&folder), text(&out)]);
    assert_eq!(output.status.code(), Some(2));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.starts_with(&format!("error: {fault}")), "{errors}");
    assert!(!out.exists());
}

/// What is not written must not look as if it were.
#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_written_is_an_error() {
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
        .args(["inspect", F32])
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(
        errors.starts_with("error: stdout: No space left"),
        "{errors}"
    );
}

#[test]
fn inspect_prints_json() {
    let json: Value = serde_json::from_str(&succeeds(["inspect", "--json", SHARDED])).unwrap();
    assert_eq!(json["total"]["weights"], 434816);
    assert_eq!(json["total"]["bytes"], 472479);
    let parameters = json["parameters"].as_array().unwrap();
    let find = |name: &str| parameters.iter().find(|p| p["name"] == name).unwrap();
    let down = find("model.layers.1.mlp.down_proj.weight");
    assert_eq!(down["shape"], serde_json::json!([128, 352]));
    assert_eq!(down["type"], "nf4");
    assert_eq!(down["double_quant"], true);
    assert_eq!(down["storage"], "U8");
    assert_eq!(find("lm_head.weight")["type"], "F32");
    assert_eq!(find("lm_head.weight").get("block_size"), None);
}

#[test]
fn a_folder_goes_to_float_and_back() {
    let (_guard, [dense, nf4]) = folders(["dense", "nf4"]);
    let (dense, nf4) = (text(&dense), text(&nf4));
    let said = succeeds(["dequantize", F32, dense]);
    assert!(
        said.starts_with("dequantized 14 parameters, kept 7: "),
        "{said}"
    );
    let said = succeeds(["quantize", "--no-double-quant", dense, nf4]);
    assert!(
        said.starts_with("quantized 14 parameters, kept 7: "),
        "{said}"
    );
    let said = succeeds(["verify", F32, nf4]);
    let summary = "21 parameters: 7 with identical bytes, 14 with identical values, 0 other";
    assert!(said.starts_with(summary), "{said}");
}

#[test]
fn settings_are_taken_over() {
    let (_guard, [dense, nf4]) = folders(["dense", "nf4"]);
    let (dense, nf4) = (text(&dense), text(&nf4));
    succeeds(["dequantize", F32, dense, "--dtype", "bf16"]);
    let settings = "--quant-type fp4 --block-size 128 --skip down_proj --skip q_proj \
                    --storage bfloat16 --compute-dtype float16 --max-shard-size 100KB";
    let mut args = vec!["quantize", dense, nf4];
    args.extend(settings.split_whitespace());
    let args: [&str; 17] = args.try_into().unwrap();
    succeeds(args);
    let written = Checkpoint::open(nf4).unwrap();
    assert_eq!(written.quantized_weights().len(), 10);
    assert!(written.files().len() > 1);
    let prefix = "model.layers.0.mlp.up_proj.weight";
    let weight = written.load_quantized(prefix).unwrap();
    assert_eq!(weight.config().block_size.elems(), 128);
    assert_eq!(weight.quant_type().name(), "fp4");
    assert_eq!(weight.dtype().name(), "bfloat16");
    assert_eq!(
        written.tensor_info(prefix).unwrap().dtype.to_string(),
        "BF16"
    );
    let config = fs::read(Path::new(nf4).join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["bnb_4bit_compute_dtype"], "float16");
    let skipped = serde_json::json!(["lm_head", "down_proj", "q_proj"]);
    assert_eq!(quantization["llm_int8_skip_modules"], skipped);
}

/// From floats, and from weights that have lost accuracy before.
#[test]
fn losses_are_told_by_the_kind_of_layer() {
    let (_guard, [dense, from_floats, from_nf4]) = folders(["dense", "from_floats", "from_nf4"]);
    succeeds(["dequantize", F32, text(&dense)]);
    let said = succeeds([
        "quantize",
        "--to",
        "mxfp4",
        text(&dense),
        text(&from_floats),
    ]);
    assert!(
        said.starts_with("quantized 14 parameters, kept 7: "),
        "{said}"
    );
    let row = |name: &str| {
        let line = said.lines().find(|line| line.starts_with(name));
        let words: Vec<String> = line.unwrap().split_whitespace().map(String::from).collect();
        words
    };
    assert_eq!(row("q_proj")[1], "2");
    assert_eq!(row("all")[1], "14");
    let percent: f64 = row("all")[2].trim_end_matches('%').parse().unwrap();
    assert!((5.0..20.0).contains(&percent), "{said}");
    assert!(!said.contains("twice"), "{said}");

    let said = succeeds(["quantize", "--to", "nvfp4", F32, text(&from_nf4)]);
    let note = "note: 14 of them were nf4 in the source and have lost accuracy twice";
    assert!(said.contains(note), "{said}");
    let config = fs::read(from_nf4.join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["format"], "nvfp4-pack-quantized");
    assert_eq!(quantization["ignore"], serde_json::json!(["lm_head"]));
}

/// A norm is moved by 0.25, everything else stays.
#[rstest]
#[case(&[], 1)]
#[case(&["--tolerance", "0.2"], 1)]
#[case(&["--tolerance", "0.25"], 0)]
#[case(&["--rms-tolerance", "0.01"], 1)]
#[case(&["--rms-tolerance", "1"], 0)]
#[case(&["--tolerance", "0.25", "--rms-tolerance", "0.01"], 1)]
fn verify_says_what_differs(#[case] limits: &[&str], #[case] code: i32) {
    let (_guard, [moved]) = folders(["moved"]);
    fs::create_dir(&moved).unwrap();
    let file = moved.join("model.safetensors");
    let mut bytes = fs::read(Path::new(F32).join("model.safetensors")).unwrap();
    let source = Checkpoint::open(F32).unwrap();
    let name = "model.norm.weight";
    let value = source.load_float::<f32>(name).unwrap().0[0];
    let norm = source.tensor_bytes(name).unwrap();
    let start = bytes.windows(norm.len()).position(|w| w == norm).unwrap();
    bytes[start..start + 4].copy_from_slice(&(value + 0.25).to_le_bytes());
    fs::write(file, bytes).unwrap();

    for json in [false, true] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_burn-nf4"));
        command.args(["verify", F32, text(&moved)]).args(limits);
        let output = if json {
            command.arg("--json").output().unwrap()
        } else {
            command.output().unwrap()
        };
        assert_eq!(output.status.code(), Some(code));
        let said = stdout(&output);
        if json {
            let json: Value = serde_json::from_str(&said).unwrap();
            assert_eq!(json["within"], code == 0);
            let parameters = json["parameters"].as_array().unwrap();
            let moved = parameters.iter().find(|p| p["name"] == name).unwrap();
            assert_eq!(moved["result"], "values");
            // The sum is rounded to f32 near 1.
            let error = moved["max_abs_error"].as_f64().unwrap();
            assert!((error - 0.25).abs() < 1e-6, "{error}");
        } else {
            let line = format!("{name}: max abs error 2.500e-1");
            assert!(said.starts_with(&line), "{said}");
        }
    }
    // The code says it to one who reads nothing.
    let mut unread = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
        .args(["verify", F32, text(&moved)])
        .args(limits)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(unread.stdout.take());
    assert_eq!(unread.wait().unwrap().code(), Some(code));
}

#[rstest]
#[case::no_such_file(&["inspect", "no/such/folder"], "no/such/folder")]
#[case::not_safetensors(&["inspect", "Cargo.toml"], "Cargo.toml: not a valid safetensors file")]
#[case::block_size(&["quantize", F32, "out", "--block-size", "63"], "--block-size")]
#[case::quantized_source(&["quantize", F32, "out"], "is quantized already")]
#[case::block_size_of_nvfp4(&["quantize", F32, "out", "--to", "nvfp4", "--block-size", "64"], "--block-size")]
#[case::storage_of_mxfp4(&["quantize", F32, "out", "--to", "mxfp4", "--storage", "u8"], "--storage")]
#[case::occupied_folder(&["dequantize", F32, "src"], "src: the folder is not empty")]
fn errors_are_one_line_and_code_2(#[case] args: &[&str], #[case] part: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
        .args(args)
        .output()
        .unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(output.stdout.is_empty());
    assert!(errors.starts_with("error: "), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert!(errors.contains(part), "{errors}");
    assert!(!Path::new("out").exists());
}

#[rstest]
#[case("5GB", true)]
#[case("200 kb", true)]
#[case("4096", true)]
#[case("0", false)]
#[case("5 apples", false)]
#[case("99999999999999TB", false)]
fn sizes_are_read_as_in_transformers(#[case] size: &str, #[case] valid: bool) {
    let (_guard, [out]) = folders(["out"]);
    let output = run(["dequantize", F32, text(&out), "--max-shard-size", size]);
    let code = if valid { 0 } else { 2 };
    assert_eq!(output.status.code(), Some(code));
    assert_eq!(out.exists(), valid);
}

const ADAPTER: &str = "../../tests/fixtures/hf/f32/adapter_final";

#[test]
fn an_adapter_is_merged_into_float_weights_or_into_4_bit() {
    let (_guard, [float, packed]) = folders(["float", "packed"]);
    let said = succeeds(["merge", F32, ADAPTER, text(&float), "--dtype", "bfloat16"]);
    assert!(said.starts_with("merged "), "{said}");
    assert!(!said.contains("requantizing"), "{said}");
    let table = succeeds(["inspect", text(&float)]);
    assert!(table.contains("BF16") && !table.contains("nf4"), "{table}");
    let said = succeeds(["merge", F32, ADAPTER, text(&packed), "--requantize"]);
    assert!(
        said.contains("requantizing moved the adapted weights by "),
        "{said}"
    );
    assert!(succeeds(["inspect", text(&packed)]).contains("nf4"));
    // Close to each other, as requantizing loses something.
    let limits = ["--rms-tolerance", "0.2"];
    succeeds(["verify", text(&float), text(&packed), limits[0], limits[1]]);
    let both = run([
        "merge",
        F32,
        ADAPTER,
        "x",
        "--requantize",
        "--dtype",
        "float32",
    ]);
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn head_and_embeddings_are_quantized_when_asked() {
    let (_parent, [dense, out]) = folders(["dense", "out"]);
    succeeds(["dequantize", F32, text(&dense)]);
    for (flags, more) in [
        (vec![], vec![]),
        (vec!["--head"], vec!["lm_head.weight"]),
        (
            vec!["--head", "--embeddings"],
            vec!["lm_head.weight", "model.embed_tokens.weight"],
        ),
    ] {
        let paths = ["quantize", text(&dense), text(&out), "--overwrite"];
        let output = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
            .args(paths)
            .args(&flags)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{flags:?}");
        let written = Checkpoint::open(&out).unwrap();
        let names = written.quantized_weights();
        assert_eq!(names.len(), 14 + more.len(), "{names:?}");
        assert!(more.iter().all(|name| names.contains(name)), "{names:?}");
    }
}

/// When it is written, or when it is loaded.
#[test]
fn a_head_in_4_bit_is_read_by_all_commands() {
    let (_parent, [dense, packed, again, merged]) = folders(["dense", "packed", "again", "merged"]);
    succeeds(["dequantize", F32, text(&dense)]);
    let said = succeeds(["quantize", "--quantize-head", text(&dense), text(&packed)]);
    assert!(
        said.starts_with("quantized 15 parameters, kept 6"),
        "{said}"
    );
    let table = succeeds(["inspect", text(&packed)]);
    let head = table
        .lines()
        .find(|line| line.starts_with("lm_head.weight"));
    assert!(head.unwrap().contains("nf4"), "{table}");
    succeeds(["dequantize", text(&packed), text(&again)]);
    let same = succeeds(["verify", text(&packed), text(&again)]);
    assert!(same.contains("15 with identical values, 0 other"), "{same}");
    let said = succeeds([
        "merge",
        text(&packed),
        ADAPTER,
        text(&merged),
        "--requantize",
    ]);
    assert!(said.starts_with("merged "), "{said}");

    let tokenizer = "tests/fixtures/tokenizers/bytes.json";
    let text_of = |folder: &Path, flags: &[&str]| {
        fs::copy(tokenizer, folder.join("tokenizer.json")).unwrap();
        fs::write(folder.join("tokenizer_config.json"), "{}").unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
            .args([
                "generate",
                "--prompt",
                "ab",
                "--max-tokens",
                "12",
                "--ignore-eos",
                "--model",
            ])
            .arg(folder)
            .args(flags)
            .output()
            .unwrap();
        assert_eq!(
            output.status.code(),
            Some(0),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        stdout(&output)
    };
    let nf4 = packed.with_file_name("nf4");
    succeeds(["quantize", text(&dense), text(&nf4)]);
    let written = text_of(&packed, &[]);
    assert_eq!(written, text_of(&nf4, &["--quantize-head"]));
    assert_ne!(written, text_of(&nf4, &[]), "the head has no part in it");
}
