//! The command `finetune`: what it reads, and what it leaves behind.

#![cfg(feature = "cli")]

mod program;

use std::fs;
use std::path::Path;

use burn_nf4::peft::Adapter;
use rstest::rstest;
use serde_json::Value;
use tempfile::TempDir;

use program::{finetune, folder};

/// A model with a chat template, and data.
fn with_data(data: &str) -> TempDir {
    let folder = folder();
    fs::write(folder.path().join("data.jsonl"), data).unwrap();
    let template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}\
                    {% if add_generation_prompt %}assistant:{% endif %}";
    fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    folder
}

fn texts() -> String {
    let line = |index: usize| format!("{{\"text\": \"{}\"}}\n", "abcdef".repeat(index % 4 + 1));
    (0..8).map(line).collect()
}

fn log(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    let line = |line| serde_json::from_str(line).unwrap();
    text.lines().map(line).collect()
}

#[test]
fn a_run_is_evaluated_logged_and_drawn() {
    let folder = with_data(&texts());
    let out = folder.path().join("out");
    finetune(
        folder.path(),
        "--eval-split 0.25 --eval-every 2 --steps 3 --packing never",
    )
    .unwrap();
    let lines = log(&out.join("log.jsonl"));
    let steps = |field: &str| -> Vec<u64> {
        let with_it = lines.iter().filter(|line| line[field].is_number());
        with_it.map(|line| line["step"].as_u64().unwrap()).collect()
    };
    assert_eq!(steps("loss"), [1, 2, 3]);
    assert_eq!(steps("grad_norm"), [1, 2, 3]);
    assert_eq!(steps("eval_loss"), [2, 3]);
    let last = lines.last().unwrap();
    let [loss, perplexity] =
        ["eval_loss", "eval_perplexity"].map(|name| last[name].as_f64().unwrap());
    assert!(
        (loss.exp() - perplexity).abs() < 1e-6 * perplexity,
        "{last}"
    );
    let plot = fs::read_to_string(out.join("loss.svg")).unwrap();
    assert!(
        plot.starts_with("<svg") && plot.contains("evaluation"),
        "{plot}"
    );
}

#[test]
fn a_resumed_run_goes_on_with_its_log() {
    let folder = with_data(&texts());
    let file = folder.path().join("steps.jsonl");
    let run = |further: &str| {
        let log = file.to_str().unwrap();
        finetune(
            folder.path(),
            &format!("--log {log} --packing never {further}"),
        )
    };
    run("--steps 3 --save-every 2").unwrap();
    let first = log(&file);
    // As a run leaves it that was ended while it wrote.
    fs::write(
        &file,
        fs::read_to_string(&file).unwrap() + "{\"step\": 4, \"lo",
    )
    .unwrap();
    run("--steps 4 --resume").unwrap();
    let lines = log(&file);
    let steps: Vec<u64> = lines
        .iter()
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [1, 2, 3, 4]);
    // The third step was done again after the checkpoint of the second.
    for (line, of_first) in lines.iter().zip(&first) {
        assert_eq!(line["loss"], of_first["loss"]);
    }
}

/// Several devices, with whole weights or parts of them, make the steps of one that makes all passes, and a run goes on
/// on another number of them.
#[rstest]
#[case("--devices 0,1 --gradient-checkpointing")]
#[case("--devices 0,1,2 --shard --gradient-checkpointing --grad-accum 1")]
fn several_devices_make_the_steps_of_one(#[case] devices: &str) {
    let folder = with_data(&texts());
    let values = |field: &str| -> Vec<f64> {
        let lines = log(&folder.path().join("out/log.jsonl"));
        let values = lines.iter().filter_map(|line| line[field].as_f64());
        values.collect()
    };
    let count = devices.split(' ').nth(1).unwrap().split(',').count();
    let fixed = "--eval-split 0.25 --packing never --save-every 2 --overwrite";
    finetune(
        folder.path(),
        &format!("--steps 4 {fixed} --grad-accum {count} --gradient-checkpointing"),
    )
    .unwrap();
    let of_one = ["loss", "grad_norm", "eval_loss"].map(values);
    finetune(folder.path(), &format!("--steps 4 {fixed} {devices}")).unwrap();
    let of_all = ["loss", "grad_norm", "eval_loss"].map(values);
    for (one, all) in of_one.concat().iter().zip(of_all.concat()) {
        assert!(
            (one - all).abs() <= 1e-5 * one.abs(),
            "{of_one:?} {of_all:?}"
        );
    }
    assert_eq!(
        of_one.map(|values| values.len()),
        of_all.clone().map(|values| values.len())
    );
    let resume = "--resume --eval-split 0.25 --packing never --gradient-checkpointing";
    finetune(
        folder.path(),
        &format!("--steps 5 {resume} --grad-accum {count}"),
    )
    .unwrap();
    assert_eq!(values("loss").len(), 5);
    assert_eq!(values("loss")[..4], of_all[0]);
}

/// The same sizes with other weights would go on in silence.
#[test]
fn a_run_is_not_continued_on_another_model() {
    let folder = with_data(&texts());
    let run = |further: &str| finetune(folder.path(), &format!("--packing never {further}"));
    run("--steps 2 --save-every 2").unwrap();
    let error = run("--steps 3 --resume --dtype bfloat16").unwrap_err();
    assert!(
        error.contains("compute was \"float32\", now \"bfloat16\""),
        "{error}"
    );
    let path = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    // Of the first tensor.
    bytes[8 + header] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = run("--steps 3 --resume").unwrap_err();
    assert!(error.contains("the model differs"), "{error}");
}

#[test]
fn a_folder_in_which_a_run_is_under_way_is_refused() {
    let folder = with_data(&texts());
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    // As a run leaves it that was killed.
    let lock = fs::File::create(out.join(".lock")).unwrap();
    lock.lock().unwrap();
    let error = finetune(folder.path(), "--steps 1").unwrap_err();
    assert!(error.contains("another run is under way"), "{error}");
    drop(lock);
    finetune(folder.path(), "--steps 1").unwrap();
    assert!(!out.join(".lock").exists());
}

/// The adapter is there all the same.
#[test]
fn a_plot_that_cannot_be_drawn_costs_nothing_else() {
    let folder = with_data(&texts());
    let out = folder.path().join("out");
    finetune(folder.path(), "--steps 1 --save-every 1").unwrap();
    let _ = fs::remove_file(out.join("loss.svg"));
    fs::create_dir(out.join("loss.svg")).unwrap();
    finetune(folder.path(), "--steps 2 --resume").unwrap();
    let steps = log(&out.join("log.jsonl")).len();
    assert_eq!(steps, 2);
    assert!(Adapter::open(&out).is_ok());
}

/// Nor by a run that goes on, of which it is not the log.
#[test]
fn a_log_that_is_there_is_not_written_over() {
    let folder = with_data(&texts());
    let file = folder.path().join("steps.jsonl");
    fs::write(&file, "mine").unwrap();
    let error = finetune(folder.path(), &format!("--log {}", file.display())).unwrap_err();
    assert!(
        error.contains("--log is") && error.contains("which exists"),
        "{error}"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    finetune(folder.path(), "--steps 1 --save-every 1").unwrap();
    fs::write(&file, "mine\n").unwrap();
    let resumed = format!("--steps 2 --resume --log {}", file.display());
    let error = finetune(folder.path(), &resumed).unwrap_err();
    assert!(error.contains("steps.jsonl"), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine\n");
}

const CHAT: &str = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]}
{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
{"prompt": "abc", "completion": "d"}
{"messages": [{"role": "user", "content": "a"}]}
"#;

/// Losses of another number of targets differ.
#[test]
fn chats_are_trained_on_answers_unless_prompts_are_asked_for() {
    let losses = |further: &str| {
        let folder = with_data(CHAT);
        finetune(
            folder.path(),
            &format!("--steps 1 --batch-size 9 {further}"),
        )
        .unwrap();
        log(&folder.path().join("out/log.jsonl"))[0]["loss"]
            .as_f64()
            .unwrap()
    };
    let answers = losses("");
    // In one row the answers are the same, but for roundings.
    assert!((answers - losses("--packing always")).abs() < 1e-5);
    assert!((answers - losses("--train-on-prompts")).abs() > 1e-4);
}

/// Packed and not, plain and as DoRA.
#[rstest]
#[case::adapter("")]
#[case::dora("--dora --rslora --packing always")]
#[case::dropout("--dropout 0.1")]
fn head_and_embeddings_are_saved_as_peft_saves_them(#[case] further: &str) {
    let folder = with_data(&texts());
    let saved = "--modules-to-save lm_head,embed_tokens --gradient-checkpointing --steps 2";
    finetune(folder.path(), &format!("{saved} --save-every 1 {further}")).unwrap();
    let adapter = Adapter::open(folder.path().join("out")).unwrap();
    let mut names: Vec<&str> = adapter.full_tensors().map(|(name, _)| name).collect();
    names.sort_unstable();
    assert_eq!(names, ["lm_head.weight", "model.embed_tokens.weight"]);
    let expected = ["lm_head".to_string(), "embed_tokens".into()];
    assert_eq!(
        adapter.config().modules_to_save.as_deref(),
        Some(&expected[..])
    );

    // From a checkpoint of the first step the second ends at the same weights.
    let whole = fs::read(folder.path().join("out/adapter_model.safetensors")).unwrap();
    fs::remove_dir_all(folder.path().join("out/checkpoint-2")).unwrap();
    finetune(folder.path(), &format!("{saved} --resume {further}")).unwrap();
    let resumed = fs::read(folder.path().join("out/adapter_model.safetensors")).unwrap();
    assert_eq!(whole, resumed);
}

#[test]
fn modules_that_cannot_be_trained_are_refused() {
    let folder = with_data(&texts());
    let error = finetune(folder.path(), "--modules-to-save lm_hat").unwrap_err();
    assert!(
        error.contains("modules_to_save") && error.contains("lm_hat"),
        "{error}"
    );
    let error = finetune(folder.path(), "--modules-to-save lm_head --quantize-head");
    let error = error.unwrap_err();
    assert!(error.contains("in 4 bit"), "{error}");
}

#[test]
fn a_template_that_does_not_show_answers_is_refused_with_the_line() {
    let folder = with_data(CHAT);
    let template =
        "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}?";
    let path = folder.path().join("other.jinja");
    fs::write(&path, template).unwrap();
    let error = finetune(
        folder.path(),
        &format!("--chat-template {}", path.display()),
    );
    let error = error.unwrap_err();
    assert!(error.contains("data.jsonl, line 1"), "{error}");
    assert!(error.contains("{% generation %}"), "{error}");
}

#[test]
fn memory_is_reported_by_phase() {
    let folder = with_data(&texts());
    let said = program::output(
        folder.path(),
        "--memory-report --steps 2 --gradient-checkpointing",
    );
    let (_, table) = said.split_once("memory by phase").unwrap();
    let names: Vec<&str> = table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    let phases = ["model", "adapter", "forward", "loss", "backward", "step"];
    assert_eq!(names, phases, "{said}");
}
