//! What a conversion did, as text.

use std::collections::BTreeMap;
use std::path::Path;

use burn_nf4::checkpoint::{Converted, WeightLoss};

/// Names shown of a list.
const SHOWN: usize = 3;

/// A line, and what there is to say of parameters: how far they are from what they were, by the kind of
/// their layers, and which are not what was asked for.
pub fn summary(what: &str, converted: &Converted, folder: &Path) -> String {
    let written = &converted.written;
    let mut text = format!(
        "{what} {} parameters, kept {}: {} bytes to {} in {} file(s) in {}\n",
        converted.converted,
        converted.kept,
        converted.source_bytes,
        written.size_bytes,
        written.files.len(),
        folder.display()
    );
    if converted.converted == 0 {
        text += &format!("note: nothing was {what}\n");
    }
    text += &loss_table(converted);
    for (quant_type, count) in &converted.requantized {
        text += &format!(
            "note: {count} of them were {} in the source and have lost accuracy twice: the errors above are \
             those of the second time alone\n",
            quant_type.name()
        );
    }
    let notes = [
        (
            &converted.ragged,
            "stay as they are: their rows are not made of whole blocks",
        ),
        (
            &converted.decoded,
            "were quantized in the source and are floats here",
        ),
        (
            &converted.dropped,
            "are left out: scales of activations, which belong to the weights as they were",
        ),
    ];
    for (names, what) in notes {
        if !names.is_empty() {
            text += &format!("note: {} tensors {what} ({})\n", names.len(), some(names));
        }
    }
    text
}

/// The first names of a list.
fn some(names: &[String]) -> String {
    let mut text = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN {
        text += ", …";
    }
    text
}

/// A row for each kind of layer, and one for all.
fn loss_table(converted: &Converted) -> String {
    if converted.losses.is_empty() {
        return String::new();
    }
    let mut kinds: BTreeMap<&str, (usize, WeightLoss)> = BTreeMap::new();
    for (name, &loss) in &converted.losses {
        let (count, sum) = kinds.entry(kind(name)).or_default();
        *count += 1;
        *sum = sum.and(loss);
    }
    let all = (converted.losses.len(), converted.loss());
    let rows: Vec<_> = kinds.into_iter().chain([("all", all)]).collect();
    let header = "weights";
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let width = width.max(header.len());
    let mut text = format!("\n{header:<width$}  count  RMS error  largest error\n");
    for (name, (count, loss)) in rows {
        text += &format!(
            "{name:<width$}  {count:>5}  {:>8.3}%  {:>12.3}%\n",
            100.0 * loss.relative_rms(),
            100.0 * loss.relative_max()
        );
    }
    text + "(of the RMS of the weights, and of the largest weight of a parameter)\n"
}

/// The last part of a module's path.
fn kind(name: &str) -> &str {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    module.rsplit_once('.').map_or(module, |(_, last)| last)
}
