//! What was measured, for people and for machines.

use std::fs;
use std::path::Path;

use burn_nf4_llm::ModelError;
use burn_nf4_llm::train::Passes;
use chrono::{SecondsFormat, Utc};
use serde::Serialize;

use super::train::Kept;
use crate::output::say;
use crate::progress::mebibytes;

/// All that a run measured. Written as JSON as it is: fields are added, but none changes its meaning.
#[derive(Debug, Serialize)]
pub struct BenchReport {
    /// When it began, RFC 3339.
    pub date: String,
    /// The version of this crate.
    pub burn_nf4: &'static str,
    /// Whose sizes the model has.
    pub size: String,
    /// The value of `--device`.
    pub device: String,
    /// What the device calls itself.
    pub device_name: String,
    /// The type that is computed in.
    pub dtype: &'static str,
    /// What the linear layers are packed in.
    pub quant_type: &'static str,
    /// Of the branches that are decoded with.
    pub rank: Option<usize>,
    /// Whether the head is in 4 bit.
    pub quantized_head: bool,
    pub weights: Option<Weights>,
    pub copy: Option<Copy>,
    pub first_token: Option<FirstToken>,
    pub decode: Vec<DecodeRow>,
    pub prefill: Vec<PrefillRow>,
    pub train: Vec<TrainRow>,
    /// What was asked for and not measured.
    pub left_out: Vec<LeftOut>,
    pub peer: Option<PeerReport>,
    /// Unsloth, in training.
    pub unsloth: Option<PeerReport>,
}

/// Bytes of the weights.
#[derive(Debug, Serialize)]
pub struct Weights {
    pub packed_bytes: usize,
    pub float_bytes: usize,
    /// Of those what a step reads.
    pub read_bytes: usize,
}

/// How fast memory is copied.
#[derive(Debug, Clone, Serialize)]
pub struct Copy {
    pub bytes: usize,
    pub how: String,
    /// Bytes read and written a second.
    pub bytes_s: f64,
}

/// From the end of loading to the first token.
#[derive(Debug, Serialize)]
pub struct FirstToken {
    pub prompt_tokens: usize,
    pub first_ms: f64,
    pub second_ms: f64,
}

/// What is held, where that is told.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Memory {
    /// Of the device, by CubeCL.
    pub in_use_bytes: Option<u64>,
    pub reserved_bytes: Option<u64>,
    /// The most that the process has held so far (Linux).
    pub process_peak_bytes: Option<u64>,
}

/// Steps of decoding.
#[derive(Debug, Serialize)]
pub struct DecodeRow {
    pub batch: usize,
    /// Positions that the cache holds before the first step.
    pub context: usize,
    /// Steps.
    pub tokens: usize,
    /// Of all rows.
    pub tokens_s: f64,
    /// The median.
    pub step_ms: f64,
    /// The whole text the first time.
    pub first_s: f64,
    /// Why steps were launched and not replayed.
    pub launched_because: Option<String>,
    pub cache_bytes: usize,
    pub memory: Memory,
    /// Packed weights, head and cache: what a step must read.
    pub read_bytes: usize,
    /// The time of reading that at the speed of the copy.
    pub floor_ms: f64,
    /// `floor_ms / step_ms`.
    pub share_of_floor: f64,
}

/// The pass over a prompt.
#[derive(Debug, Serialize)]
pub struct PrefillRow {
    pub tokens: usize,
    pub ms: f64,
    pub tokens_s: f64,
}

/// A step of training.
#[derive(Debug, Serialize)]
pub struct TrainRow {
    /// Devices, each of which has a batch.
    pub devices: usize,
    /// Bytes of the layers' packed weights on each, if they are in parts.
    pub sharded_bytes: Option<usize>,
    /// Of a device.
    pub rows: usize,
    pub tokens: usize,
    /// Whether nothing was computed twice.
    pub keep_all: bool,
    /// What was kept from the pass forward to the pass backward, and where.
    pub kept: Kept,
    /// Of the branches.
    pub rank: usize,
    /// The median.
    pub ms: f64,
    /// Of all devices together.
    pub tokens_s: f64,
    /// The first step of a run on this shape. A device that has never seen it compiles and tunes in it.
    pub first_ms: f64,
    /// How the timed ones were made: launched, replayed, or launched as they could not be recorded.
    pub passes: Passes,
    /// The most that was in use in one more step, which was launched and not timed: that of samples taken after
    /// each layer and every 0.1 ms or so in between, as CubeCL keeps no peak. On a CPU the most that the process
    /// held in that step.
    pub peak_in_use_bytes: Option<u64>,
    /// After the timed steps. Pages that a recorded pass keeps to itself are reserved and not in use. The peak
    /// of the process is that of these steps where the system counts anew (Linux).
    pub memory: Memory,
}

/// What was not measured, and why.
#[derive(Debug, Serialize)]
pub struct LeftOut {
    pub what: String,
    pub why: String,
}

/// Another library on the same machine: transformers with bitsandbytes, or Unsloth.
#[derive(Debug, Serialize)]
pub struct PeerReport {
    /// Its versions.
    pub versions: String,
    pub decode: Vec<PeerDecode>,
    pub prefill: Vec<PeerPrefill>,
    pub train: Vec<PeerTrain>,
    pub left_out: Vec<LeftOut>,
}

/// Steps of the peer.
#[derive(Debug, Serialize)]
pub struct PeerDecode {
    pub batch: usize,
    pub context: usize,
    pub tokens_s: f64,
    pub step_ms: f64,
    /// The most that PyTorch's allocator held.
    pub peak_bytes: Option<u64>,
    /// How many times as fast as the peer ours is, by tokens a second.
    pub ratio: Option<f64>,
}

/// A prompt of the peer.
#[derive(Debug, Serialize)]
pub struct PeerPrefill {
    pub tokens: usize,
    pub ms: f64,
    pub ratio: Option<f64>,
}

/// A step of training of the peer.
#[derive(Debug, Serialize)]
pub struct PeerTrain {
    pub rows: usize,
    pub tokens: usize,
    pub keep_all: bool,
    pub ms: f64,
    /// The most that PyTorch's allocator held.
    pub peak_bytes: Option<u64>,
    /// How many times as fast as the peer ours is.
    pub ratio: Option<f64>,
    /// How many times our `peak_in_use_bytes` its peak is.
    pub memory_ratio: Option<f64>,
}

/// Now, as the report has it.
pub fn date() -> String {
    Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true)
}

impl BenchReport {
    /// Writes all so far: a run that breaks off leaves what it measured.
    pub fn write(&self, path: Option<&Path>) -> Result<(), ModelError> {
        let Some(path) = path else {
            return Ok(());
        };
        let mut text = serde_json::to_string_pretty(self).map_err(ModelError::json(path))?;
        text.push('\n');
        fs::write(path, text).map_err(ModelError::io(path))
    }

    /// Sets the ratios of the peers' rows to ours.
    pub fn compare(&mut self) {
        for peer in [&mut self.peer, &mut self.unsloth].into_iter().flatten() {
            peer.compare(&self.decode, &self.prefill, &self.train);
        }
    }

    /// What the measurements are of.
    pub fn print_head(&self) -> Result<(), ModelError> {
        say!(
            "{}, random weights in {}, {} ({}), {}{}{}",
            self.size,
            self.quant_type,
            self.device,
            self.device_name,
            self.dtype,
            self.rank
                .map_or_else(String::new, |rank| format!(", branches of rank {rank}")),
            if self.quantized_head {
                ", head in 4 bit"
            } else {
                ""
            },
        )
    }

    /// The weights, the speed of memory and the first token.
    pub fn print_model(&self) -> Result<(), ModelError> {
        if let Some(weights) = &self.weights {
            say!(
                "weights: {} packed, {} of floats",
                mebibytes(weights.packed_bytes as u64),
                mebibytes(weights.float_bytes as u64),
            )?;
        }
        if let Some(first) = &self.first_token {
            say!(
                "first token of a prompt of {}: {:.1} ms after loading, {:.1} ms the second time",
                first.prompt_tokens,
                first.first_ms,
                first.second_ms
            )?;
        }
        if let Some(copy) = &self.copy {
            say!(
                "copy of {}: {:.1} GB/s read and written ({})",
                mebibytes(copy.bytes as u64),
                copy.bytes_s / 1e9,
                copy.how
            )?;
        }
        Ok(())
    }

    /// Ours beside the peers'.
    pub fn print_peers(&self) -> Result<(), ModelError> {
        for peer in [&self.peer, &self.unsloth].into_iter().flatten() {
            say!("\n{}", peer.versions)?;
            peer.print_decode()?;
            peer.print_prefill()?;
            peer.print_train(&self.train)?;
            for left_out in &peer.left_out {
                left_out.print()?;
            }
        }
        Ok(())
    }
}

impl PeerReport {
    /// Sets the ratios of its rows to ours.
    fn compare(&mut self, decode: &[DecodeRow], prefill: &[PrefillRow], train: &[TrainRow]) {
        for theirs in &mut self.decode {
            let same =
                |ours: &&DecodeRow| (ours.batch, ours.context) == (theirs.batch, theirs.context);
            let ours = decode.iter().find(same);
            theirs.ratio = ours.map(|ours| ours.tokens_s / theirs.tokens_s);
        }
        for theirs in &mut self.prefill {
            let ours = prefill.iter().find(|ours| ours.tokens == theirs.tokens);
            theirs.ratio = ours.map(|ours| theirs.ms / ours.ms);
        }
        for theirs in &mut self.train {
            let Some(ours) = train.iter().find(|ours| theirs.is_like(ours)) else {
                continue;
            };
            theirs.ratio = Some(theirs.ms / ours.ms);
            let both = theirs.peak_bytes.zip(ours.peak_in_use_bytes);
            theirs.memory_ratio = both.map(|(theirs, ours)| theirs as f64 / ours as f64);
        }
    }

    fn print_decode(&self) -> Result<(), ModelError> {
        if !self.decode.is_empty() {
            say!(
                "{:>5} {:>8} {:>14} {:>14} {:>9}",
                "batch",
                "context",
                "tokens/s ours",
                "theirs",
                "ratio"
            )?;
        }
        for theirs in &self.decode {
            let ours = theirs.ratio.map(|ratio| ratio * theirs.tokens_s);
            say!(
                "{:>5} {:>8} {:>14} {:>14.1} {:>9}",
                theirs.batch,
                theirs.context,
                or_dash(ours, 1),
                theirs.tokens_s,
                or_dash(theirs.ratio, 2)
            )?;
        }
        Ok(())
    }

    fn print_prefill(&self) -> Result<(), ModelError> {
        if !self.prefill.is_empty() {
            say!(
                "{:>14} {:>14} {:>14} {:>9}",
                "prompt",
                "ms ours",
                "theirs",
                "ratio"
            )?;
        }
        for theirs in &self.prefill {
            let ours = theirs.ratio.map(|ratio| theirs.ms / ratio);
            say!(
                "{:>14} {:>14} {:>14.1} {:>9}",
                theirs.tokens,
                or_dash(ours, 1),
                theirs.ms,
                or_dash(theirs.ratio, 2)
            )?;
        }
        Ok(())
    }

    fn print_train(&self, rows: &[TrainRow]) -> Result<(), ModelError> {
        if !self.train.is_empty() {
            say!(
                "{:>14} {:>10} {:>14} {:>14} {:>9} {:>14} {:>14} {:>9}",
                "training step",
                "layers",
                "ms ours",
                "theirs",
                "ratio",
                "peak ours",
                "theirs",
                "ratio"
            )?;
        }
        for theirs in &self.train {
            let ours = rows.iter().find(|ours| theirs.is_like(ours));
            say!(
                "{:>14} {:>10} {:>14} {:>14.1} {:>9} {:>14} {:>14} {:>9}",
                shape(theirs.rows, theirs.tokens),
                theirs.kept().layers(),
                or_dash(ours.map(|ours| ours.ms), 1),
                theirs.ms,
                or_dash(theirs.ratio, 2),
                or_unknown(ours.and_then(|ours| ours.peak_in_use_bytes)),
                or_unknown(theirs.peak_bytes),
                or_dash(theirs.memory_ratio, 2)
            )?;
        }
        Ok(())
    }
}

impl PeerTrain {
    /// Whether ours is of the same shape.
    fn is_like(&self, ours: &TrainRow) -> bool {
        (self.rows, self.tokens, self.kept()) == (ours.rows, ours.tokens, ours.kept)
    }

    /// The peer offloads nothing.
    fn kept(&self) -> Kept {
        match self.keep_all {
            true => Kept::All,
            false => Kept::Inputs,
        }
    }
}

fn or_dash(number: Option<f64>, digits: usize) -> String {
    number.map_or_else(|| "-".into(), |number| format!("{number:.digits$}"))
}

fn or_unknown(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "-".into(), mebibytes)
}

impl DecodeRow {
    /// The head of the rows of a table.
    pub fn print_head() -> Result<(), ModelError> {
        say!(
            "\n{:>5} {:>8} {:>10} {:>9} {:>9} {:>7} {:>12} {:>12} {:>12}  steps",
            "batch",
            "context",
            "tokens/s",
            "ms/step",
            "floor ms",
            "share",
            "cache",
            "in use",
            "reserved"
        )
    }

    /// A row.
    pub fn print(&self) -> Result<(), ModelError> {
        let steps = match &self.launched_because {
            None => "replayed".into(),
            Some(why) => format!("launched: {why}"),
        };
        say!(
            "{:>5} {:>8} {:>10.1} {:>9.2} {:>9.2} {:>6.0}% {:>12} {:>12} {:>12}  {steps}",
            self.batch,
            self.context,
            self.tokens_s,
            self.step_ms,
            self.floor_ms,
            100.0 * self.share_of_floor,
            mebibytes(self.cache_bytes as u64),
            or_unknown(self.memory.in_use_bytes),
            or_unknown(self.memory.reserved_bytes),
        )
    }
}

impl PrefillRow {
    /// The head of the rows of a table.
    pub fn print_head() -> Result<(), ModelError> {
        say!("\n{:>14} {:>10} {:>10}", "prompt", "ms", "tokens/s")
    }

    /// A row.
    pub fn print(&self) -> Result<(), ModelError> {
        say!(
            "{:>14} {:>10.1} {:>10.0}",
            self.tokens,
            self.ms,
            self.tokens_s
        )
    }
}

impl TrainRow {
    /// The head of the rows of a table.
    pub fn print_head() -> Result<(), ModelError> {
        say!(
            "\n{:>14} {:>8} {:>10} {:>10} {:>10} {:>10} {:>12} {:>12} {:>12}  passes",
            "training step",
            "devices",
            "layers",
            "ms",
            "tokens/s",
            "first ms",
            "peak in use",
            "in use",
            "reserved"
        )
    }

    /// A row.
    pub fn print(&self) -> Result<(), ModelError> {
        say!(
            "{:>14} {:>8} {:>10} {:>10.1} {:>10.0} {:>10.0} {:>12} {:>12} {:>12}  {}{}",
            shape(self.rows, self.tokens),
            self.devices,
            self.kept.layers(),
            self.ms,
            self.tokens_s,
            self.first_ms,
            or_unknown(self.peak_in_use_bytes),
            or_unknown(self.memory.in_use_bytes),
            or_unknown(self.memory.reserved_bytes),
            self.passes,
            match self.sharded_bytes {
                Some(bytes) => format!("; {} of packed weights on each", mebibytes(bytes as u64)),
                None => String::new(),
            },
        )
    }
}

fn shape(rows: usize, tokens: usize) -> String {
    format!("{rows} x {tokens}")
}

impl LeftOut {
    /// A line.
    pub fn print(&self) -> Result<(), ModelError> {
        say!("left out: {}: {}", self.what, self.why)
    }
}
