//! The command line: what is refused, and that what is not works.

#![cfg(feature = "cli")]

#[path = "arguments/output.rs"]
mod output;
mod program;

use std::fs;
#[cfg(unix)]
use std::io::Read;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use burn_nf4_llm::fetch::beside_the_weights;
use rstest::rstest;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use program::{finetune, fixture, folder, run};

/// The model does not exist: what is refused is refused before it is looked for.
#[rstest]
#[case::temperature_nan("generate --prompt a --temperature nan", "`temperature` is NaN")]
#[case::temperature_negative("generate --prompt a --temperature=-1", "`temperature` is -1")]
#[case::temperature_infinite("generate --prompt a --temperature inf", "`temperature` is inf")]
#[case::temperature_word("generate --prompt a --temperature warm", "--temperature")]
#[case::top_p_zero("generate --prompt a --temperature 1 --top-p 0", "`top_p` is 0")]
#[case::top_p_large("generate --prompt a --temperature 1 --top-p 1.1", "`top_p` is 1.1")]
#[case::top_p_nan("generate --prompt a --temperature 1 --top-p NaN", "`top_p` is NaN")]
#[case::top_p_greedy(
    "generate --prompt a --top-p 0.9",
    "`temperature` is 0, expected above 0"
)]
#[case::top_k_greedy(
    "generate --prompt a --top-k 5",
    "`temperature` is 0, expected above 0"
)]
#[case::top_k_negative("generate --prompt a --top-k=-1", "--top-k")]
#[case::batch_small(
    "generate --prompt a --prompt b --batch 1",
    "--batch is 1, expected at least as many rows as prompts, which are 2"
)]
#[case::batch_zero("generate --prompt a --batch 0", "--batch is 0")]
#[case::batch_large(
    "generate --prompt a --batch 100000000000",
    "--batch is 100000000000, expected at most"
)]
#[case::max_tokens(
    "generate --prompt a --max-tokens 0",
    "--max-tokens is 0, expected at least 1"
)]
#[case::max_batch("generate --prompt a --max-batch 0", "--max-batch is 0")]
#[case::max_cache("generate --prompt a --max-cache 0", "--max-cache is 0")]
#[case::stop_empty("generate --prompt a --stop=", "a stop string is empty")]
#[case::system_alone("generate --prompt a --system b", "--chat")]
#[case::template_alone("generate --prompt a --chat-template b", "--chat")]
#[case::prefill_alone("generate --prompt a --prefill b", "--chat")]
#[case::no_prompt("generate", "--prompt")]
#[case::seed("generate --prompt a --seed=-1", "--seed")]
#[case::batch_size("finetune --batch-size 0", "--batch-size is 0")]
#[case::batch_size_large(
    "finetune --batch-size 100000000000",
    "--batch-size is 100000000000, expected at most"
)]
#[case::grad_accum("finetune --grad-accum 0", "--grad-accum is 0")]
#[case::offload("finetune --offload", "--device is cpu, expected a GPU for --offload")]
#[case::shard_keeping_all(
    "finetune --devices 0,1 --shard",
    "--shard is given without --gradient-checkpointing and --offload"
)]
#[case::shard_dora(
    "finetune --devices 0,1 --shard --gradient-checkpointing --dora",
    "--shard is given with --dora"
)]
#[case::shard_alone("finetune --shard", "--devices")]
#[case::dropout_devices(
    "finetune --devices 0,1 --dropout 0.1",
    "--dropout is 0.1, expected 0 with --devices"
)]
#[case::seq_len("finetune --seq-len 1", "--seq-len is 1, expected at least 2")]
#[case::epochs("finetune --epochs 0", "--epochs is 0")]
#[case::steps("finetune --steps 0", "--steps is 0")]
#[case::save_every("finetune --save-every 0", "--save-every is 0")]
#[case::eval_every("finetune --eval-split 0.5 --eval-every 0", "--eval-every is 0")]
#[case::eval_every_alone("finetune --eval-every 3", "expected --eval-data or --eval-split")]
#[case::eval_split_zero("finetune --eval-split 0", "--eval-split is 0")]
#[case::eval_split_large("finetune --eval-split 1.5", "--eval-split is 1.5")]
#[case::eval_split_nan("finetune --eval-split nan", "--eval-split is NaN")]
#[case::two_evaluations("finetune --eval-split 0.5 --eval-data a.txt", "cannot be used with")]
#[case::packing("finetune --packing some", "possible values: text, always, never")]
#[case::lr_zero("finetune --lr 0", "--lr is 0")]
#[case::lr_negative("finetune --lr=-1", "--lr is -1")]
#[case::lr_below_zero("finetune --lr -1", "--lr is -1")]
#[case::lr_beyond_f32("finetune --lr 1e39", "--lr is 1e39")]
#[case::lr_nothing_in_f32("finetune --lr 1e-320", "--lr is 1e-320")]
#[case::lr_nan("finetune --lr nan", "--lr is NaN")]
#[case::lr_infinite("finetune --lr inf", "--lr is inf")]
#[case::alpha_zero("finetune --alpha 0", "--alpha is 0")]
#[case::alpha_nan("finetune --alpha nan", "--alpha is NaN")]
#[case::weight_decay("finetune --weight-decay=-0.1", "--weight-decay is -0.1")]
#[case::max_grad_norm("finetune --max-grad-norm=-1", "--max-grad-norm is -1")]
#[case::max_grad_norm_nan("finetune --max-grad-norm nan", "--max-grad-norm is NaN")]
#[case::max_grad_norm_beyond_f32("finetune --max-grad-norm 1e39", "--max-grad-norm is 1e39")]
#[case::max_grad_norm_nothing_in_f32("finetune --max-grad-norm 1e-50", "--max-grad-norm is 1e-50")]
#[case::steps_below_zero("finetune --steps -1", "invalid value '-1' for '--steps")]
#[case::split_below_zero("finetune --eval-split -0.1", "--eval-split is -0.1")]
#[case::modules_to_save(
    "finetune --modules-to-save lm_head,",
    "`modules_to_save` is an empty one"
)]
#[case::optim("finetune --optim sgd", "adamw_torch, adamw_8bit")]
#[case::weight_decay_nan("finetune --weight-decay nan", "--weight-decay is NaN")]
#[case::rank("finetune --r 0", "r")]
#[case::dropout("finetune --dropout 1", "lora_dropout")]
#[case::dropout_nan("finetune --dropout nan", "lora_dropout")]
fn what_cannot_be_served_is_refused_at_once(#[case] arguments: &str, #[case] expected: &str) {
    let mut arguments: Vec<&str> = arguments.split(' ').collect();
    arguments.extend(["--model", "none"]);
    if arguments[0] == "finetune" {
        arguments.extend(["--data", "none.txt", "--output", "none"]);
    }
    let error = run(&arguments).unwrap_err();
    assert!(error.contains(expected), "{error}");
    assert!(!error.contains("neither a folder"), "{error}");
}

#[rstest]
#[case::greedy("--prompt ab --max-tokens 3")]
#[case::drawn("--prompt ab --max-tokens 3 --temperature 0.7 --top-k 9 --top-p 0.9 --seed 3")]
#[case::rows("--prompt ab --prompt abc --batch 3 --max-tokens 2")]
#[case::rows_that_wait("--prompt ab --prompt abc --batch 5 --max-batch 2 --max-tokens 3")]
#[case::beyond_the_positions("--prompt abcdefghijklmnopqrstuvwxyz --max-tokens 2")]
#[case::chat("--prompt ab --chat --system b --chat-template TEMPLATE --prefill abc --max-tokens 2")]
fn a_text_is_continued(#[case] arguments: &str) {
    let folder = folder();
    let template = folder.path().join("own.jinja");
    fs::write(
        &template,
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    .unwrap();
    let (model, template) = (folder.path().to_str().unwrap(), template.to_str().unwrap());
    let mut all = vec!["generate", "--model", model];
    all.extend(arguments.split(' ').map(|argument| match argument {
        "TEMPLATE" => template,
        argument => argument,
    }));
    run(&all).unwrap();
}

#[test]
fn a_text_whose_cache_does_not_fit_is_refused_with_its_size() {
    let folder = folder();
    let model = folder.path().to_str().unwrap();
    let mut all = vec![
        "generate", "--model", model, "--prompt", "ab", "--batch", "8",
    ];
    all.extend(["--max-tokens", "200", "--max-cache"]);
    let told = told(&[&all[..], &["2"]].concat());
    // 1 KiB a position of each row.
    let size = "KV cache: 2.0 MiB for 8 rows of 256 positions";
    assert!(told.contains(size), "{told}");
    let error = run(&[&all[..], &["1"]].concat()).unwrap_err();
    let expected =
        "the KV cache of 8 rows of 256 positions needs 2.0 MiB, the limit given is 1.0 MiB";
    assert!(error.contains(expected), "{error}");
}

/// The program's own output, with and without a stop string that the text has; one row and two.
#[rstest]
fn a_text_ends_before_a_stop_string(#[values("1", "2")] rows: &str) {
    let folder = folder();
    let shown = |further: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
            .args([
                "generate",
                "--prompt",
                "ab",
                "--max-tokens",
                "40",
                "--seed",
                "4",
            ])
            .args([
                "--temperature",
                "1.5",
                "--batch",
                rows,
                "--ignore-eos",
                "--model",
            ])
            .arg(folder.path())
            .args(further)
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let free = shown(&[]);
    let letters: Vec<char> = free.chars().collect();
    let is_plain = |letters: &[char]| letters.iter().all(char::is_ascii_alphanumeric);
    let head = free.strip_prefix("==> 1 of 2: \"ab\"\n");
    let start = head.map_or(0, |text| free.len() - text.len());
    assert_eq!(head.is_some(), rows == "2");
    let at = (start + 2..letters.len() - 1).find(|&at| is_plain(&letters[at..at + 2]));
    let stop: String = letters[at.unwrap()..][..2].iter().collect();
    let given = shown(&["--stop", "never\\n", "--stop", &stop]);
    let first = free.split(&stop).next().unwrap();
    let ends = |rest: &str| rest.starts_with("\n\n==> 2 of 2: \"ab\"\n") || rest == "\n";
    assert!(
        given.strip_prefix(first).is_some_and(ends),
        "{given:?} {free:?} {stop}"
    );
}

/// The text ends before what it says, and what is not applied is told.
#[test]
fn a_text_goes_by_generation_config() {
    let folder = folder();
    let shown = || {
        let output = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
            .args(["generate", "--prompt", "ab", "--max-tokens", "40"])
            .args(["--temperature", "1.5", "--seed", "4", "--model"])
            .arg(folder.path())
            .output()
            .unwrap();
        assert!(output.status.success());
        let [text, told] = [output.stdout, output.stderr];
        (
            String::from_utf8(text).unwrap(),
            String::from_utf8(told).unwrap(),
        )
    };
    let (free, told) = shown();
    assert!(!told.contains("generation_config.json"), "{told}");
    let stop = free.chars().find(char::is_ascii_alphanumeric).unwrap();
    let generation = json!({"stop_strings": stop.to_string(), "no_repeat_ngram_size": 2});
    let path = folder.path().join("generation_config.json");
    fs::write(path, generation.to_string()).unwrap();
    let (given, told) = shown();
    assert_eq!(given, format!("{}\n", free.split(stop).next().unwrap()));
    let warning = "warning: generation_config.json has fields that are not applied: \
                   no_repeat_ngram_size: 2";
    assert!(told.contains(warning), "{told}");
}

/// Arguments come before what the model says, and that before no penalty.
#[test]
fn a_penalty_is_that_of_generation_config() {
    let folder = folder();
    let shown = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
            .args([
                "generate",
                "--prompt",
                "ab",
                "--max-tokens",
                "40",
                "--model",
            ])
            .arg(folder.path())
            .args(arguments)
            .output()
            .unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(!told.contains("not applied"), "{told}");
        match output.status.success() {
            true => Ok(output.stdout),
            false => Err(told),
        }
    };
    let free = shown(&[]).unwrap();
    let penalised = shown(&["--repetition-penalty", "3"]).unwrap();
    assert_ne!(penalised, free);
    let drawn = ["--temperature", "2.5", "--seed", "4"];
    let free_drawn = shown(&drawn).unwrap();
    let write = |generation: Value| {
        let path = folder.path().join("generation_config.json");
        fs::write(path, generation.to_string()).unwrap();
    };
    write(json!({"repetition_penalty": 3.0, "min_p": 1.0}));
    assert_eq!(shown(&[]).unwrap(), penalised);
    assert_eq!(shown(&["--repetition-penalty", "1"]).unwrap(), free);
    // No token but the likeliest has its probability.
    assert_eq!(shown(&drawn).unwrap(), penalised);
    let all = [&drawn[..], &["--min-p", "0", "--repetition-penalty", "1"]].concat();
    assert_eq!(shown(&all).unwrap(), free_drawn);
    // What no text can go by is refused, whatever is asked for.
    for (field, value) in [("repetition_penalty", 0), ("min_p", 2)] {
        write(json!({ field: value }));
        let error = shown(&["--repetition-penalty", "1"]).unwrap_err();
        let named = format!("generation_config.json: `{field}` is {value}, supported: ");
        assert!(error.contains(&named), "{error}");
    }
}

#[test]
fn a_chat_without_a_template_says_so() {
    let folder = folder();
    let model = folder.path().to_str().unwrap();
    let error = run(&["generate", "--model", model, "--prompt", "a", "--chat"]).unwrap_err();
    assert!(error.contains("chat_template.jinja"), "{error}");
}

#[test]
fn a_conversation_is_answered_line_by_line() {
    let folder = folder();
    let template = folder.path().join("own.jinja");
    fs::write(
        &template,
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    )
    .unwrap();
    let mut chat = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
        .args([
            "chat",
            "--eager",
            "--max-tokens",
            "2",
            "--system",
            "be brief",
            "--model",
        ])
        .arg(folder.path())
        .arg("--chat-template")
        .arg(&template)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = chat.stdin.take().unwrap();
    stdin.write_all(b"ab\n\ncd").unwrap();
    drop(stdin);
    let output = chat.wait_with_output().unwrap();
    assert!(output.status.success());
    // Two answers; the empty line asks for none.
    let answers = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        answers.ends_with('\n') && answers.lines().count() >= 2,
        "{answers:?}"
    );
}

/// The program goes on to the next line, of which there is none.
#[cfg(unix)]
#[test]
fn an_interrupt_ends_an_answer_and_not_the_chat() {
    let folder = folder();
    // Nothing ends a text but its length.
    let config = folder.path().join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        config,
        text.replace("\"eos_token_id\":2", "\"eos_token_id\":[]"),
    )
    .unwrap();
    let template = folder.path().join("own.jinja");
    fs::write(
        &template,
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    .unwrap();
    let mut chat = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
        .args(["chat", "--max-tokens", "100000000", "--model"])
        .arg(folder.path())
        .arg("--chat-template")
        .arg(&template)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = chat.stdin.take().unwrap();
    stdin.write_all(b"ab\n").unwrap();
    let mut stdout = chat.stdout.take().unwrap();
    let mut answer = [0; 20];
    stdout.read_exact(&mut answer).unwrap();
    let id = chat.id().to_string();
    let sent = Command::new("kill").args(["-INT", &id]).status().unwrap();
    assert!(sent.success());
    let mut rest = Vec::new();
    drop(stdin);
    stdout.read_to_end(&mut rest).unwrap();
    let status = chat.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(rest.ends_with(b"\n"));
}

#[test]
fn a_run_is_resumed_with_more_steps() {
    let folder = folder();
    finetune(folder.path(), "--steps 2 --save-every 1").unwrap();
    finetune(folder.path(), "--steps 3 --save-every 1 --resume").unwrap();
    assert!(folder.path().join("out/checkpoint-3").exists());
    let error = finetune(folder.path(), "--steps 2 --resume").unwrap_err();
    assert!(error.contains("has 3 steps already"), "{error}");
    let error = finetune(folder.path(), "--steps 4 --lr 1 --resume").unwrap_err();
    assert!(error.contains("schedule.peak"), "{error}");
}

/// A new run beside the checkpoints of an old one would let the old one go on later.
#[test]
fn a_run_does_not_write_over_another() {
    let folder = folder();
    let out = folder.path().join("out");
    finetune(folder.path(), "--steps 3 --save-every 3").unwrap();
    fs::write(out.join("notes.txt"), "mine").unwrap();
    let before = fs::read(out.join("adapter_model.safetensors")).unwrap();
    let error = finetune(folder.path(), "--steps 1 --seed 7").unwrap_err();
    assert!(error.contains("--output is"), "{error}");
    assert!(error.contains("--overwrite"), "{error}");
    let after = fs::read(out.join("adapter_model.safetensors")).unwrap();
    assert_eq!(before, after);
    assert!(out.join("checkpoint-3").exists());

    finetune(folder.path(), "--steps 1 --seed 7 --overwrite").unwrap();
    assert!(!out.join("checkpoint-3").exists());
    assert!(out.join("notes.txt").exists());
    let error = finetune(folder.path(), "--steps 4 --resume").unwrap_err();
    assert!(error.contains("holds no checkpoint"), "{error}");
    let error = finetune(folder.path(), "--resume --overwrite").unwrap_err();
    assert!(error.contains("cannot be used with"), "{error}");
}

#[rstest]
fn a_rank_that_no_layer_has_is_refused(#[values("100000", "18446744073709551615")] rank: &str) {
    let folder = folder();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let [model, data, output] = ["", "data.jsonl", "out"].map(path);
    let mut arguments = vec!["finetune", "--model", &model, "--data", &data];
    arguments.extend(["--output", &output, "--r", rank]);
    let error = run(&arguments).unwrap_err();
    let expected = format!("--r is {rank}, expected at most ");
    assert!(error.contains(&expected), "{error}");
}

/// The weights are damaged: what is missing beside them is told before they are read.
#[test]
fn what_is_missing_is_told_before_the_model_is_loaded() {
    let folder = folder();
    fs::write(folder.path().join("model.safetensors"), "damaged").unwrap();
    let model = folder.path().to_str().unwrap();
    let generate = |further: &[&str]| {
        let mut all = vec!["generate", "--model", model, "--prompt", "a"];
        all.extend(further);
        run(&all).unwrap_err()
    };
    let error = generate(&[]);
    assert!(error.contains("not a valid safetensors file"), "{error}");
    let error = generate(&["--adapter", "no/such/adapter"]);
    assert!(error.contains("no/such/adapter"), "{error}");
    let error = generate(&["--chat", "--chat-template", "no/such.jinja"]);
    assert!(error.contains("`no/such.jinja`"), "{error}");
    let error = generate(&["--chat"]);
    assert!(error.contains("chat_template.jinja"), "{error}");
    let error = run(&["chat", "--model", model, "--adapter", "no/such/adapter"]).unwrap_err();
    assert!(error.contains("no/such/adapter"), "{error}");

    let error = finetune(folder.path(), "--target-modules q_proj,qkv_proj").unwrap_err();
    assert!(error.contains("`qkv_proj`"), "{error}");
    let error = finetune(folder.path(), "--resume").unwrap_err();
    assert!(error.contains("holds no checkpoint"), "{error}");
    fs::remove_file(folder.path().join("data.jsonl")).unwrap();
    let error = finetune(folder.path(), "").unwrap_err();
    assert!(error.contains("data.jsonl"), "{error}");
}

/// One list of names for all commands, and a device for each feature.
#[rstest]
#[case("bfloat16")]
#[case("bf16")]
fn float_types_have_both_names_everywhere(#[case] dtype: &str) {
    let folder = folder();
    let model = folder.path().to_str().unwrap();
    let out = folder.path().join("dense");
    run(&["dequantize", model, out.to_str().unwrap(), "--dtype", dtype]).unwrap();
    let limit = ["--max-tokens", "1"];
    let generate = [
        "generate", "--model", model, "--prompt", "a", "--dtype", dtype,
    ];
    run(&[&generate[..], &limit].concat()).unwrap();
}

#[rstest]
#[case("cuda", cfg!(feature = "cuda"))]
#[case("rocm", cfg!(feature = "rocm"))]
#[case("wgpu", cfg!(feature = "wgpu"))]
#[case("cubecl-cpu", cfg!(feature = "cpu"))]
fn a_device_that_is_not_compiled_in_names_its_feature(
    #[case] device: &str,
    #[case] is_there: bool,
) {
    if is_there {
        return;
    }
    let error = run(&[
        "generate", "--model", "none", "--prompt", "a", "--device", device,
    ]);
    let error = error.unwrap_err();
    let feature = device.strip_prefix("cubecl-").unwrap_or(device);
    assert!(error.contains(&format!("--device is {device}")), "{error}");
    assert!(
        error.contains(&format!("cargo feature `{feature}`")),
        "{error}"
    );
}

#[test]
fn a_target_that_no_layer_has_is_refused() {
    let folder = folder();
    let error = finetune(folder.path(), "--target-modules q_proj,qkv_proj").unwrap_err();
    assert!(error.contains("`qkv_proj`"), "{error}");
}

/// transformers would apply it in training.
#[test]
fn dropout_of_the_attention_is_not_trained_with() {
    let folder = folder();
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["attention_dropout"] = 0.1.into();
    fs::write(&path, config.to_string()).unwrap();
    let error = finetune(folder.path(), "").unwrap_err();
    assert!(error.contains("attention_dropout"), "{error}");
    let model = folder.path().to_str().unwrap();
    run(&[
        "generate",
        "--model",
        model,
        "--prompt",
        "a",
        "--max-tokens",
        "1",
    ])
    .unwrap();
}

#[test]
fn what_is_read_is_fetched() {
    let held = [
        "README.md",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "additional_chat_templates/rag.jinja",
        "additional_chat_templates/README.md",
        "additional_chat_templates/old/rag.jinja",
        "model.safetensors",
        "onnx/config.json",
        "added_tokens.json",
    ];
    let held = held.map(String::from).into_iter().collect();
    let mut files = beside_the_weights(&held);
    files.sort_unstable();
    let expected = [
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(files, expected);
}

/// What the program writes to stderr, whether or not it fails.
fn told(arguments: &[&str]) -> String {
    let program = env!("CARGO_BIN_EXE_burn-nf4");
    let output = Command::new(program).args(arguments).output().unwrap();
    String::from_utf8(output.stderr).unwrap()
}

#[rstest]
#[case::dropout("--target-modules all-linear --dropout 0.1", Some("--dropout"))]
#[case::dora("--target-modules down_proj --dora", Some("--dora"))]
#[case::plain("--target-modules all-linear", None)]
#[case::attention("--target-modules q_proj --dora", None)]
fn an_adapter_of_experts_that_peft_refuses_is_told(
    #[case] further: &str,
    #[case] expected: Option<&str>,
) {
    let folder = folder();
    let model = fixture("families/qwen3_moe/model");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(model.join(name), folder.path().join(name)).unwrap();
    }
    let [data, output] = ["data.jsonl", "out"].map(|name| folder.path().join(name));
    let mut arguments = vec!["finetune", "--model", folder.path().to_str().unwrap()];
    arguments.extend(["--data", data.to_str().unwrap()]);
    arguments.extend(["--output", output.to_str().unwrap(), "--steps", "1"]);
    arguments.extend(further.split(' '));
    let told = told(&arguments);
    let warning = "PEFT 0.21 does not load an adapter on experts";
    assert_eq!(told.contains(warning), expected.is_some(), "{told}");
    if let Some(setting) = expected {
        let line = told.lines().find(|line| line.contains(warning)).unwrap();
        assert!(line.ends_with(&format!("with {setting}")), "{line}");
    }
}

#[test]
fn a_packed_embedding_is_refused_by_name() {
    let folder = folder();
    let [dense, packed] = ["dense", "packed"].map(|name| folder.path().join(name));
    let [source, dense, packed] =
        [folder.path(), &dense, &packed].map(|path| path.to_str().unwrap());
    run(&["dequantize", source, dense]).unwrap();
    run(&["quantize", dense, packed, "--embeddings"]).unwrap();
    let error = run(&["generate", "--model", packed, "--prompt", "a"]).unwrap_err();
    let expected = "`model.embed_tokens.weight` is quantized, expected floats";
    assert!(error.contains(expected), "{error}");
}

/// Zeros.
fn write_tensors(path: &Path, tensors: &[(&str, &[usize])]) {
    let zeros = vec![
        0;
        4 * tensors
            .iter()
            .map(|(_, shape)| shape.iter().product())
            .max()
            .unwrap_or(0)
    ];
    let views = tensors.iter().map(|(name, shape)| {
        let bytes = &zeros[..4 * shape.iter().product::<usize>()];
        let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap();
        (*name, view)
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// As transformers 5 holds them.
#[test]
fn experts_in_stacks_are_neither_packed_nor_adapted() {
    let folder = tempfile::tempdir().unwrap();
    let [base, adapter, out] = ["base", "adapter", "out"].map(|name| folder.path().join(name));
    fs::create_dir_all(&base).unwrap();
    fs::create_dir_all(&adapter).unwrap();
    let stack = "model.layers.0.mlp.experts.gate_up_proj";
    write_tensors(&base.join("model.safetensors"), &[(stack, &[2, 64, 64])]);
    fs::write(base.join("config.json"), r#"{"model_type": "qwen3_moe"}"#).unwrap();
    let expert = "base_model.model.model.layers.0.mlp.experts.1.gate_proj";
    let (a, b) = (
        format!("{expert}.lora_A.weight"),
        format!("{expert}.lora_B.weight"),
    );
    write_tensors(
        &adapter.join("adapter_model.safetensors"),
        &[(&a, &[8, 64]), (&b, &[32, 8])],
    );
    let config = r#"{"peft_type": "LORA", "target_modules": "all-linear"}"#;
    fs::write(adapter.join("adapter_config.json"), config).unwrap();

    let [base, adapter, out] = [&base, &adapter, &out].map(|path| path.to_str().unwrap());
    let error = run(&["quantize", base, out, "--experts"]).unwrap_err();
    assert!(
        error.contains("--experts") && error.contains(stack),
        "{error}"
    );
    let error = run(&["merge", base, adapter, out]).unwrap_err();
    let expected = "a tensor for each expert, as the adapter changes \
                    `model.layers.0.mlp.experts.1.gate_proj`";
    assert!(error.contains(expected) && error.contains(stack), "{error}");
    assert!(!Path::new(out).exists());
}
