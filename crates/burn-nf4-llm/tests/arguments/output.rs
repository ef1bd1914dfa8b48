//! What `generate` prints.

use std::process::{Command, Stdio};

use rstest::rstest;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::folder;

#[rstest]
fn a_text_that_nobody_reads_ends_quietly(#[values("", "--prompt abc", "--json")] further: &str) {
    let folder = folder();
    let mut generate = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
        .args(["generate", "--prompt", "ab", "--max-tokens", "40"])
        .args(["--temperature", "1.5", "--ignore-eos", "--model"])
        .arg(folder.path())
        .args(further.split_whitespace())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(generate.stdout.take());
    let output = generate.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert!(
        !errors.contains("panicked") && !errors.contains("error"),
        "{errors}"
    );
}

/// What a run prints, in its lines.
fn printed(folder: &TempDir, further: &str) -> Vec<String> {
    let output = Command::new(env!("CARGO_BIN_EXE_burn-nf4"))
        .args(["generate", "--max-tokens", "3", "--ignore-eos", "--model"])
        .arg(folder.path())
        .args(further.split(' '))
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    stdout.lines().map(String::from).collect()
}

/// A prompt of several lines takes one.
#[test]
fn each_text_of_several_stands_below_its_prompt() {
    let folder = folder();
    let lines = printed(&folder, "--prompt ab\ncd --prompt abc --batch 3");
    let heads: Vec<&String> = lines
        .iter()
        .filter(|line| line.starts_with("==>"))
        .collect();
    // The third says what the first does.
    let expected = [r#"==> 1 of 2: "ab\ncd""#, r#"==> 2 of 2: "abc""#];
    assert_eq!(heads, expected);
    let alone = printed(&folder, "--prompt abc");
    assert!(lines.ends_with(&alone), "{lines:?} {alone:?}");
}

#[rstest]
#[case::one("--prompt ab", &["ab"])]
#[case::several("--prompt ab --prompt abc --batch 3", &["ab", "abc", "ab"])]
fn each_row_is_a_line_of_json_with_its_prompt(#[case] arguments: &str, #[case] prompts: &[&str]) {
    let folder = folder();
    let lines = printed(&folder, &format!("{arguments} --json"));
    let rows = lines.iter().map(|line| serde_json::from_str(line).unwrap());
    let rows: Vec<Value> = rows.collect();
    let of_rows: Vec<&str> = rows
        .iter()
        .map(|row| row["prompt"].as_str().unwrap())
        .collect();
    assert_eq!(of_rows, prompts);
    for (row, prompt) in rows.iter().zip(prompts) {
        assert_eq!(
            [&row["tokens"], &row["ended_by"]],
            [&json!(3), &json!("max_tokens")]
        );
        let alone = printed(&folder, &format!("--prompt {prompt}")).join("\n");
        assert_eq!(row["text"], alone);
    }
}
