//! The command `bench`.
#![cfg(feature = "cli")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rstest::rstest;
use serde_json::{Value, json};
use tempfile::TempDir;

const CONFIG: &str = "tests/fixtures/families/llama3_tied/model/config.json";

fn run(arguments: &str, folder: &Path) -> Output {
    let place = |argument: &str| argument.replace("FOLDER", folder.to_str().unwrap());
    Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
        .arg("bench")
        .args(arguments.split(' ').map(place))
        .output()
        .unwrap()
}

/// What a run of a small model says, and its JSON.
#[track_caller]
fn measured(arguments: &str, folder: &Path) -> (String, Value) {
    let arguments = format!("--config {CONFIG} --json FOLDER/bench.json {arguments}");
    let output = run(&arguments, folder);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    let json = fs::read(folder.join("bench.json")).unwrap();
    (
        String::from_utf8(output.stdout).unwrap(),
        serde_json::from_slice(&json).unwrap(),
    )
}

#[track_caller]
fn refused(arguments: &str, folder: &Path) -> String {
    let output = run(arguments, folder);
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

fn keys(object: &Value) -> Vec<&str> {
    object
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

#[track_caller]
fn positive(object: &Value, names: &[&str]) {
    for name in names {
        let number = object[name].as_f64().unwrap_or(f64::NAN);
        assert!(number > 0.0 && number.is_finite(), "{name}: {object}");
    }
}

#[test]
fn a_run_is_written_as_json_with_all_that_it_measured() {
    let folder = tempfile::tempdir().unwrap();
    let (said, json) = measured(
        "--batch 1 --batch 2 --context 3 --context 5 --tokens 4 --prefill 6 --train 1x4 \
         --chart FOLDER/bench.svg",
        folder.path(),
    );
    let expected = [
        "burn_nf4",
        "copy",
        "date",
        "decode",
        "device",
        "device_name",
        "dtype",
        "first_token",
        "left_out",
        "peer",
        "prefill",
        "quant_type",
        "quantized_head",
        "rank",
        "size",
        "train",
        "unsloth",
        "weights",
    ];
    let mut found = keys(&json);
    found.sort_unstable();
    assert_eq!(found, expected);
    assert_eq!(
        (&json["device"], &json["dtype"]),
        (&json!("cpu"), &json!("float32"))
    );
    assert_eq!(
        (&json["peer"], &json["left_out"]),
        (&Value::Null, &json!([]))
    );
    positive(&json["copy"], &["bytes", "bytes_s"]);
    positive(
        &json["first_token"],
        &["prompt_tokens", "first_ms", "second_ms"],
    );
    positive(
        &json["weights"],
        &["packed_bytes", "float_bytes", "read_bytes"],
    );

    let rows = json["decode"].as_array().unwrap();
    let shapes: Vec<_> = rows
        .iter()
        .map(|row| [&row["batch"], &row["context"]])
        .collect();
    let expected = [[1, 3], [2, 3], [1, 5], [2, 5]].map(|shape| shape.map(Value::from));
    assert!(
        shapes
            .iter()
            .zip(&expected)
            .all(|(shape, [batch, context])| *shape == [batch, context])
    );
    assert_eq!(rows.len(), expected.len());
    let config: Value = serde_json::from_slice(&fs::read(CONFIG).unwrap()).unwrap();
    let of = |name: &str| config[name].as_u64().unwrap();
    let position = of("num_hidden_layers") * 2 * of("num_key_value_heads") * of("head_dim") * 4;
    for row in rows {
        positive(
            row,
            &[
                "tokens_s",
                "step_ms",
                "first_s",
                "floor_ms",
                "share_of_floor",
            ],
        );
        assert_eq!(row["tokens"], 4);
        assert_eq!(row["launched_because"], "there are few tokens");
        let [batch, context] = ["batch", "context"].map(|name| row[name].as_u64().unwrap());
        // The cache of the middle step.
        let read =
            json["weights"]["read_bytes"].as_u64().unwrap() + batch * (context + 2) * position;
        assert_eq!(row["read_bytes"], read);
        assert_eq!(row["cache_bytes"], batch * 256 * position);
        assert_eq!(row["memory"]["in_use_bytes"], Value::Null);
        let share = row["floor_ms"].as_f64().unwrap() / row["step_ms"].as_f64().unwrap();
        assert!((row["share_of_floor"].as_f64().unwrap() / share - 1.0).abs() < 1e-9);
    }
    positive(&json["prefill"][0], &["ms", "tokens_s"]);
    assert_eq!(json["prefill"][0]["tokens"], 6);
    let step = &json["train"][0];
    positive(step, &["ms", "tokens_s", "first_ms"]);
    assert_eq!([&step["rows"], &step["tokens"], &step["rank"]], [1, 4, 16]);
    // There are no graphs on a CPU.
    assert_eq!(step["passes"], "launched");
    assert_eq!(step["memory"]["in_use_bytes"], Value::Null);
    if cfg!(target_os = "linux") {
        positive(step, &["peak_in_use_bytes"]);
        positive(&step["memory"], &["process_peak_bytes"]);
    }

    for part in [
        "first token of a prompt of 128",
        "GB/s read and written",
        "floor ms",
        "training step",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let chart = fs::read_to_string(folder.path().join("bench.svg")).unwrap();
    assert!(
        chart.starts_with("<svg") && chart.contains("batch 2"),
        "{chart}"
    );
}

/// A step reads a tied table, or a head in 4 bit and not the table.
#[test]
fn a_head_in_4_bit_is_read_in_place_of_the_table() {
    let folder = tempfile::tempdir().unwrap();
    let of = |flags: &str| {
        let arguments = format!("--batch 1 --context 3 --tokens 1 {flags}");
        let (_, json) = measured(arguments.trim(), folder.path());
        let bytes = |name: &str| json["weights"][name].as_u64().unwrap();
        (
            ["packed_bytes", "float_bytes", "read_bytes"].map(bytes),
            json,
        )
    };
    let ([packed, floats, read], dense) = of("");
    let ([packed_with, floats_with, read_with], json) = of("--quantize-head");
    assert_eq!(dense["quantized_head"], false);
    assert_eq!(json["quantized_head"], true);
    assert_eq!(read, packed + floats);
    assert_eq!(floats_with, floats);
    assert!(packed_with > packed);
    assert_eq!(read_with, packed_with);
}

#[rstest]
#[case::prompts_alone("--prefill 4", [0, 1, 0])]
#[case::training_alone("--train 1x4", [0, 0, 1])]
#[case::decoding_alone("--batch 1 --context 2 --tokens 1", [1, 0, 0])]
fn what_is_not_asked_for_is_not_measured(#[case] arguments: &str, #[case] expected: [usize; 3]) {
    let folder = tempfile::tempdir().unwrap();
    let (_, json) = measured(arguments, folder.path());
    let rows = ["decode", "prefill", "train"].map(|name| json[name].as_array().unwrap().len());
    assert_eq!(rows, expected);
}

#[rstest]
#[case::by_shape("--train 1x4 --train 2x3:keep", [false, true])]
#[case::by_the_switch("--train 1x4 --train 2x3:keep --keep-all", [true, true])]
#[case::with_a_head_in_4_bit("--train 1x4 --train 2x3:keep --quantize-head --eager", [false, true])]
fn a_run_trains_with_and_without_checkpointing(
    #[case] arguments: &str,
    #[case] expected: [bool; 2],
) {
    let folder = tempfile::tempdir().unwrap();
    let (said, json) = measured(&format!("{arguments} --rank 2"), folder.path());
    let rows = json["train"].as_array().unwrap();
    let keeps: Vec<_> = rows.iter().map(|row| &row["keep_all"]).collect();
    assert_eq!(keeps, expected);
    assert!(rows.iter().all(|row| row["rank"] == 2), "{json}");
    let lines: Vec<_> = said
        .lines()
        .filter(|line| line.ends_with("launched"))
        .collect();
    let times = expected.map(|keep_all| if keep_all { " once " } else { " twice " });
    assert_eq!(lines.len(), 2, "{said}");
    for (line, (shape, times)) in lines.iter().zip(["1 x 4", "2 x 3"].iter().zip(times)) {
        assert!(line.contains(shape) && line.contains(times), "{line}");
    }
}

#[rstest]
#[case::batch("--batch 0", "--batch is 0")]
#[case::batch_large("--batch 100000000", "--batch is 100000000, expected at most")]
#[case::context("--context 0", "--context is 0")]
#[case::prefill("--prefill 0", "--prefill is 0")]
#[case::tokens("--tokens 0", "--tokens is 0")]
#[case::rank("--rank 0", "--rank is 0")]
#[case::shape("--train 4", "expected rows and tokens")]
#[case::what_is_kept("--train 1x4:all", "such as 4x2048, 4x2048:keep or 4x2048:offload")]
#[case::offloading_on_a_cpu("--train 1x4:offload", "--device is cpu, expected a GPU")]
#[case::offloading_all("--train 1x4:offload --keep-all", "expected no --keep-all")]
#[case::devices_alone("--devices 0,1", "--train")]
#[case::shard_keeping_all(
    "--train 1x8:keep --devices 0,1 --shard",
    "--train is 1 x 8, keeping all, expected layers that are computed twice"
)]
#[case::head_on_devices("--train 1x8 --devices 0,1 --quantize-head", "--quantize-head is true")]
#[case::train_steps("--train 1x8 --train-steps 0", "--train-steps is 0")]
#[case::kept_of_nothing("--train :keep", "expected rows and tokens")]
#[case::two_sizes("--size smollm2 --config none", "--config")]
#[case::no_config("--config FOLDER/none.json", "none.json")]
#[case::no_folder("--json FOLDER/none/out.json", "none/out.json")]
#[case::chart_of_nothing("--prefill 4 --chart FOLDER/out.svg", "expected left out, or decoding")]
#[case::chart_in_png("--chart FOLDER/out.png", "expected a file that ends with .svg")]
#[case::no_python("--peer FOLDER/python", "expected a program that is there")]
fn what_cannot_be_measured_is_refused_at_once(#[case] arguments: &str, #[case] expected: &str) {
    let folder = tempfile::tempdir().unwrap();
    let error = refused(arguments, folder.path());
    assert!(error.contains(expected), "{error}");
    assert!(!folder.path().join("out.svg").exists());
}

/// Before the weights are made: this would take minutes otherwise.
#[rstest]
#[case::context(
    "--size llama8b --context 1000000000000",
    "batch 1 at context 1000000000000"
)]
#[case::batch(
    "--size llama8b --batch 65536 --context 10000000",
    "batch 65536 at context 10000000"
)]
#[case::tokens(
    "--size llama8b --batch 1 --tokens 1000000000000",
    "batch 1 at context 128"
)]
#[case::prefill("--size llama8b --prefill 1000000000000", "a prompt of 1000000000000")]
#[case::train(
    "--size llama8b --train 1000000x1000000",
    "training on 1000000 x 1000000"
)]
#[case::beyond_all_numbers(
    "--size llama8b --train 18446744073709551615x18446744073709551615",
    "training on"
)]
fn what_no_device_has_memory_for_is_refused_with_its_size(
    #[case] arguments: &str,
    #[case] what: &str,
) {
    let folder = tempfile::tempdir().unwrap();
    let (needed, there) = refused_for_memory(arguments, what, folder.path());
    assert!(needed > there, "{needed} {there}");
}

/// The MiB that are needed and those that are there.
#[track_caller]
fn refused_for_memory(arguments: &str, what: &str, folder: &Path) -> (f64, f64) {
    let error = refused(arguments, folder);
    let begins = format!("error: the memory of {what}");
    assert!(error.starts_with(&begins), "{error}");
    let sizes = error.split_once(" is about ").unwrap().1;
    let (needed, there) = sizes.split_once(" MiB, expected at most the ").unwrap();
    let number = |size: &str| size.parse().unwrap();
    (number(needed), number(there.split(' ').next().unwrap()))
}

/// Of 2^28 tokens in f32. With checkpointing that is the inputs of 32 layers, and of one layer some 20 times as
/// much as its input; without it all layers hold 17 times their input.
#[test]
fn training_needs_memory_by_what_its_layers_keep() {
    let folder = tempfile::tempdir().unwrap();
    let needed = |flags: &str, what: &str| {
        let arguments = format!("--size llama8b {flags}");
        refused_for_memory(&arguments, what, folder.path()).0
    };
    let tokens = "65536 x 4096";
    let twice = needed("--train 65536x4096", &format!("training on {tokens} is"));
    let once = needed(
        "--train 65536x4096:keep",
        &format!("training on {tokens}, keeping all is"),
    );
    let wide = needed("--train 65536x4096 --rank 1024", "training on");
    // MiB of an input of a layer.
    let input = 4096.0 * 4.0 * 256.0;
    assert!((45.0..65.0).contains(&(twice / input)), "{twice}");
    assert!((500.0..600.0).contains(&(once / input)), "{once}");
    // 16 bytes of each of 42 million elements for 16 ranks.
    let branches = 1008.0 * 41_943_040.0 * 16.0 / 16.0 / f64::from(1 << 20);
    assert!(
        ((wide - twice) / branches - 1.0).abs() < 0.01,
        "{wide} {twice}"
    );
}

/// As `head` does, which has read enough. What was measured until then is in the file.
#[cfg(unix)]
#[test]
fn a_run_whose_reader_goes_away_ends_quietly() {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;

    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("bench.json");
    let mut bench = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
        .args([
            "bench",
            "--config",
            CONFIG,
            "--batch",
            "1",
            "--context",
            "3",
        ])
        .args(["--prefill", "4"])
        .arg("--json")
        .arg(&json)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(bench.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert!(line.contains("random weights"), "{line}");
    drop(stdout);
    let output = bench.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
    let json: Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    positive(&json["weights"], &["packed_bytes"]);
    // It did not go on.
    assert_eq!(json["prefill"], json!([]));
}

/// A program in the place of Python, which says these lines if it is asked to measure and if not.
#[cfg(unix)]
fn python(folder: &TempDir, first: &str, measured: &str, code: u8) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;

    let path = folder.path().join("python");
    let script = format!(
        "#!/bin/sh\nhere=$(dirname \"$0\")\ncat > \"$here/script.py\"\nprintf '%s' \"$2\" > \"$here/job.json\"\ncase \"$2\" in\n*config*) printf '%s\\n' '{first}' \
         '{measured}';;\n*) printf '%s\\n' '{first}';;\nesac\nexit {code}\n"
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[cfg(unix)]
const HELLO: &str = r#"{"what": "hello", "text": "transformers 0"}"#;

#[cfg(unix)]
#[test]
fn the_peer_stands_beside_ours_with_the_ratio() {
    let folder = tempfile::tempdir().unwrap();
    let rows = [
        r#"{"what": "decode", "batch": 1, "context": 3, "tokens_s": 0.5, "step_ms": 2000, "peak_bytes": null}"#,
        r#"{"what": "decode", "batch": 9, "context": 9, "tokens_s": 1, "step_ms": 1, "peak_bytes": 5}"#,
        "a word of a library",
        r#"{"what": "prefill", "tokens": 6, "ms": 1e9}"#,
        r#"{"what": "left_out", "of": "batch 64 at 8192", "why": "no memory"}"#,
    ];
    python(&folder, HELLO, &rows.join("' '"), 0);
    let (said, json) = measured(
        "--batch 1 --context 3 --tokens 2 --prefill 6 --peer FOLDER/python --chart FOLDER/bench.svg",
        folder.path(),
    );
    let peer = &json["peer"];
    assert_eq!(peer["versions"], "transformers 0");
    let ours = json["decode"][0]["tokens_s"].as_f64().unwrap();
    assert_eq!(peer["decode"][0]["ratio"], ours / 0.5);
    // There is none of ours.
    assert_eq!(peer["decode"][1]["ratio"], Value::Null);
    let ms = json["prefill"][0]["ms"].as_f64().unwrap();
    assert_eq!(peer["prefill"][0]["ratio"], 1e9 / ms);
    assert_eq!(peer["left_out"][0]["why"], "no memory");
    assert!(
        said.contains("left out: batch 64 at 8192: no memory"),
        "{said}"
    );
    let chart = fs::read_to_string(folder.path().join("bench.svg")).unwrap();
    assert!(chart.contains("bitsandbytes"), "{chart}");
    let script = fs::read_to_string(folder.path().join("script.py")).unwrap();
    assert!(script.contains("import importlib"), "{script}");
}

/// A peer may be asked for training alone; what it lacks for that it leaves out.
#[cfg(unix)]
#[test]
fn steps_of_training_stand_beside_those_of_the_peer() {
    let folder = tempfile::tempdir().unwrap();
    let rows = [
        r#"{"what": "train", "rows": 1, "tokens": 4, "keep_all": false, "ms": 1e9, "peak_bytes": 1000000000000}"#,
        r#"{"what": "train", "rows": 1, "tokens": 4, "keep_all": true, "ms": 1e6, "peak_bytes": null}"#,
        r#"{"what": "train", "rows": 2, "tokens": 4, "keep_all": true, "ms": 1, "peak_bytes": 5}"#,
        r#"{"what": "left_out", "of": "training on 2 x 4", "why": "no peft: none"}"#,
    ];
    python(&folder, HELLO, &rows.join("' '"), 0);
    let arguments = "--train 1x4 --train 1x4:keep --train 2x4 --rank 3 --peer FOLDER/python";
    let (said, json) = measured(arguments, folder.path());
    let (ours, theirs) = (&json["train"], &json["peer"]["train"]);
    for (row, ms) in [(0, 1e9), (1, 1e6)] {
        assert_eq!(theirs[row]["ratio"], ms / ours[row]["ms"].as_f64().unwrap());
    }
    if cfg!(target_os = "linux") {
        let bytes = ours[0]["peak_in_use_bytes"].as_f64().unwrap();
        assert_eq!(theirs[0]["memory_ratio"], 1e12 / bytes);
        assert!(said.contains(" 953674.3 MiB"), "{said}");
    }
    assert_eq!(theirs[1]["memory_ratio"], Value::Null);
    // There is none of ours that keeps all.
    assert_eq!(
        [&theirs[2]["ratio"], &theirs[2]["memory_ratio"]],
        [&Value::Null; 2]
    );
    assert!(
        said.contains("left out: training on 2 x 4: no peft: none"),
        "{said}"
    );

    let job = fs::read(folder.path().join("job.json")).unwrap();
    let job: Value = serde_json::from_slice(&job).unwrap();
    assert_eq!(
        job["train"],
        json!([[1, 4, false], [1, 4, true], [2, 4, false]])
    );
    let lora = json!({"rank": 3, "alpha": 6.0, "learning_rate": 1e-4, "weight_decay": 0.01});
    assert_eq!(job["lora"], lora);
    assert_eq!((&job["decode"], &job["prefill"]), (&json!([]), &json!([])));
    // The last one to be asked.
    assert_eq!(job["library"], "unsloth");
    assert_eq!(json["unsloth"]["train"], json["peer"]["train"]);
}

/// Each library is measured by a process of its own.
#[cfg(unix)]
#[rstest]
#[case::unsloth("unsloth", "peer", true)]
#[case::transformers("transformers", "unsloth", false)]
fn a_library_that_fails_leaves_the_rows_of_the_other(
    #[case] failing: &str,
    #[case] other: &str,
    #[case] succeeds: bool,
) {
    let folder = tempfile::tempdir().unwrap();
    let row = r#"{"what": "train", "rows": 1, "tokens": 4, "keep_all": false, "ms": 1e9, "peak_bytes": null}"#;
    let path = python(&folder, HELLO, row, 0);
    let script = fs::read_to_string(&path).unwrap();
    // The configuration names transformers too.
    let library = format!(r#"*'"library":"{failing}"'*"#);
    let fails = format!("case \"$2\" in {library}) exit 7;; esac\ncase \"$2\" in\n");
    assert!(script.contains("case \"$2\" in\n"));
    fs::write(&path, script.replacen("case \"$2\" in\n", &fails, 1)).unwrap();
    let arguments = "--train 1x4 --peer FOLDER/python --json FOLDER/bench.json";
    let output = run(&format!("--config {CONFIG} {arguments}"), folder.path());
    assert_eq!(output.status.success(), succeeds);
    let json = fs::read(folder.path().join("bench.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json[other]["train"][0]["ms"], 1e9);
    let (said, error) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    let expected = "the script of the peer failed (exit status: 7)";
    if succeeds {
        let why = json[failing]["left_out"][0]["why"].as_str().unwrap();
        assert!(why.contains(expected), "{why}");
        assert!(said.contains("left out: unsloth: "), "{said}");
    } else {
        assert_eq!(json["peer"], Value::Null);
        assert!(error.contains(expected), "{error}");
    }
}

#[cfg(unix)]
#[rstest]
#[case::package(
    r#"{"what": "missing", "name": "bitsandbytes", "message": "ModuleNotFoundError"}"#,
    3,
    "no bitsandbytes: ModuleNotFoundError"
)]
#[case::card(
    r#"{"what": "missing", "name": "CUDA", "message": "none"}"#,
    3,
    "no CUDA: none"
)]
#[case::fault(HELLO, 1, "the script of the peer failed")]
#[case::no_python("good morning", 0, "the script of the peer failed")]
fn a_peer_that_lacks_something_is_an_error(
    #[case] line: &str,
    #[case] code: u8,
    #[case] expected: &str,
) {
    let folder = tempfile::tempdir().unwrap();
    python(&folder, line, line, code);
    let error = refused("--batch 1 --context 3 --peer FOLDER/python", folder.path());
    assert!(error.contains(expected), "{error}");
}
