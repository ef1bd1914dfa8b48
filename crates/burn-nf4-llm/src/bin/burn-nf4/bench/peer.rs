//! transformers with bitsandbytes, and Unsloth, on the same machine: `scripts/peer_llm.py`, run by Python, a
//! process for each.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::process::{Command, Stdio};

use burn_nf4::format::FloatType;
use burn_nf4_llm::ModelError;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::report::{LeftOut, PeerDecode, PeerPrefill, PeerReport, PeerTrain};
use super::train::{Kept, Recipe, TrainShape};
use crate::device::DeviceName;

const SCRIPT: &str = include_str!("../../../../scripts/peer_llm.py");

/// A Python that has all that the script needs.
pub struct Peer<'a> {
    python: &'a str,
    /// As PyTorch calls it.
    device: &'static str,
}

/// What the script measures.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Library {
    Transformers,
    /// Steps of training alone.
    Unsloth,
}

/// What the peer is to measure.
pub struct Job<'a> {
    /// The `config.json` of the model.
    pub config: &'a Value,
    pub dtype: FloatType,
    pub quantize_head: bool,
    /// Batches and contexts.
    pub decode: Vec<[usize; 2]>,
    pub tokens: usize,
    pub prefill: &'a [usize],
    pub train: &'a [TrainShape],
    pub recipe: Recipe,
}

/// A line of the script.
#[derive(Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
enum Line {
    Hello {
        text: String,
    },
    Missing {
        name: String,
        message: String,
    },
    Decode {
        batch: usize,
        context: usize,
        tokens_s: f64,
        step_ms: f64,
        peak_bytes: Option<u64>,
    },
    Prefill {
        tokens: usize,
        ms: f64,
    },
    Train {
        rows: usize,
        tokens: usize,
        keep_all: bool,
        ms: f64,
        peak_bytes: Option<u64>,
    },
    LeftOut {
        of: String,
        why: String,
    },
}

impl<'a> Peer<'a> {
    /// Looks for the Python and what it needs.
    ///
    /// # Errors
    /// [`ModelError::Setting`] that says what is missing.
    pub fn find(python: &'a str, device: DeviceName) -> Result<Self, ModelError> {
        let device = match device {
            DeviceName::Cpu | DeviceName::CubeclCpu => "cpu",
            DeviceName::Cuda => "cuda",
            DeviceName::Rocm | DeviceName::Wgpu => {
                let expected = "--device cuda or a CPU, which bitsandbytes has kernels for";
                return Err(ModelError::setting("--peer", python, expected));
            }
        };
        let peer = Self { python, device };
        peer.run(&json!({ "device": device }))?;
        Ok(peer)
    }

    /// Measures.
    ///
    /// # Errors
    /// Those of [`find`](Self::find), and [`ModelError::Device`] if the script fails.
    pub fn measure(&self, library: Library, job: &Job<'_>) -> Result<PeerReport, ModelError> {
        let offloads = |shape: &&TrainShape| shape.kept == Kept::OffloadedInputs;
        let train = job.train.iter().filter(|shape| !offloads(shape));
        let train = train.map(|shape| json!([shape.rows, shape.tokens, shape.kept == Kept::All]));
        let mut report = self.run(&json!({
            "library": library,
            "config": job.config,
            "device": self.device,
            "dtype": job.dtype.name(),
            "quantize_head": job.quantize_head,
            "decode": job.decode,
            "tokens": job.tokens,
            "prefill": job.prefill,
            "train": train.collect::<Vec<_>>(),
            "lora": job.recipe,
        }))?;
        let left_out = job.train.iter().filter(offloads).map(|shape| LeftOut {
            what: format!("training on {shape}"),
            why: "the peer has nothing like it".into(),
        });
        report.left_out.extend(left_out);
        Ok(report)
    }

    fn run(&self, job: &Value) -> Result<PeerReport, ModelError> {
        let python = self.python;
        let child = Command::new(python)
            .args(["-", &job.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(ModelError::setting(
                    "--peer",
                    python,
                    "a program that is there",
                ));
            }
            Err(error) => return Err(ModelError::io(python)(error)),
        };
        let mut stdin = child.stdin.take().expect("piped");
        // A program that is no Python may not read it; its output then tells.
        let _ = stdin.write_all(SCRIPT.as_bytes());
        drop(stdin);
        let mut report = PeerReport::empty();
        let mut missing = None;
        for line in BufReader::new(child.stdout.take().expect("piped")).lines() {
            let line = line.map_err(ModelError::io(python))?;
            match serde_json::from_str(&line) {
                Ok(Line::Missing { name, message }) => missing = Some((name, message)),
                Ok(line) => report.take(line),
                // Libraries print what they like.
                Err(_) => eprintln!("{python}: {line}"),
            }
        }
        let status = child.wait().map_err(ModelError::io(python))?;
        if let Some((name, message)) = missing {
            let expected =
                format!("a Python with transformers, bitsandbytes and torch: no {name}: {message}");
            return Err(ModelError::setting("--peer", python, expected));
        }
        if !status.success() || report.versions.is_empty() {
            return Err(ModelError::Device {
                device: format!("--peer {python}"),
                message: format!("the script of the peer failed ({status})"),
            });
        }
        Ok(report)
    }
}

impl PeerReport {
    /// Of a library whose process failed: others go on.
    pub fn failed(library: Library, error: &ModelError) -> Self {
        let what = format!("{library:?}").to_lowercase();
        let why = error.to_string();
        Self {
            left_out: vec![LeftOut { what, why }],
            ..Self::empty()
        }
    }

    fn empty() -> Self {
        Self {
            versions: String::new(),
            decode: Vec::new(),
            prefill: Vec::new(),
            train: Vec::new(),
            left_out: Vec::new(),
        }
    }

    fn take(&mut self, line: Line) {
        match line {
            Line::Hello { text } => self.versions = text,
            Line::Missing { .. } => {}
            Line::Decode {
                batch,
                context,
                tokens_s,
                step_ms,
                peak_bytes,
            } => self.decode.push(PeerDecode {
                batch,
                context,
                tokens_s,
                step_ms,
                peak_bytes,
                ratio: None,
            }),
            Line::Prefill { tokens, ms } => self.prefill.push(PeerPrefill {
                tokens,
                ms,
                ratio: None,
            }),
            Line::Train {
                rows,
                tokens,
                keep_all,
                ms,
                peak_bytes,
            } => self.train.push(PeerTrain {
                rows,
                tokens,
                keep_all,
                ms,
                peak_bytes,
                ratio: None,
                memory_ratio: None,
            }),
            Line::LeftOut { of, why } => self.left_out.push(LeftOut { what: of, why }),
        }
    }
}
