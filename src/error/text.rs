//! Parts of the texts of errors.

use super::TensorMisfit;

/// The first of the files that are there instead, and the advice.
pub(super) fn found_instead(found: &[String], advice: &str) -> String {
    let (first, more) = match found {
        [] => return String::new(),
        [first] => (first, String::new()),
        [first, more @ ..] => (first, format!(" and {} more", more.len())),
    };
    format!(", but `{first}`{more}: {advice}")
}

/// How many tensors, and the verb.
pub(super) fn tensors_do(count: usize) -> String {
    match count {
        1 => "1 tensor does".into(),
        count => format!("{count} tensors do"),
    }
}

/// Keys that are missing and those that are not asked for; nothing of what there is none of.
pub(super) fn misfits(missing: &[String], unexpected: &[String]) -> String {
    let lists = [
        ("missing tensors", missing),
        (
            "unexpected tensors, which the settings do not ask for",
            unexpected,
        ),
    ];
    let lists = lists.into_iter().filter(|(_, keys)| !keys.is_empty());
    let lists: Vec<String> = lists
        .map(|(what, keys)| format!("{what}: [{}]", keys.join(", ")))
        .collect();
    lists.join(", ")
}

/// One line each.
pub(super) fn lines(tensors: &[TensorMisfit]) -> String {
    tensors
        .iter()
        .map(|tensor| format!("\n  {tensor}"))
        .collect()
}
