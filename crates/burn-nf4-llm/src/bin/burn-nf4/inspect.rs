//! What a checkpoint holds.

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, QuantState};
use burn_nf4::format::QuantType;
use serde::Serialize;

#[derive(Serialize)]
pub struct Inspection {
    parameters: Vec<Parameter>,
    quantized: Totals,
    total: Totals,
    /// What keeps it from being converted.
    faults: Vec<String>,
}

#[derive(Serialize)]
struct Parameter {
    name: String,
    shape: Vec<usize>,
    /// `nf4`, `fp4` or the dtype.
    #[serde(rename = "type")]
    kind: String,
    #[serde(flatten)]
    quantization: Option<Quantization>,
    bytes: usize,
}

#[derive(Serialize)]
struct Quantization {
    dtype: &'static str,
    block_size: usize,
    double_quant: bool,
    storage: String,
    transposed: bool,
}

#[derive(Serialize, Default)]
struct Totals {
    parameters: usize,
    weights: usize,
    bytes: usize,
    bytes_per_weight: f64,
}

impl Totals {
    fn of<'a>(parameters: impl Iterator<Item = &'a Parameter>) -> Self {
        let mut totals = Self::default();
        for parameter in parameters {
            totals.parameters += 1;
            // Headers of files lie: two of their numbers may be too large to add.
            let weights = parameter.shape.iter().product();
            totals.weights = totals.weights.saturating_add(weights);
            totals.bytes = totals.bytes.saturating_add(parameter.bytes);
        }
        totals.bytes_per_weight = totals.bytes as f64 / totals.weights.max(1) as f64;
        totals
    }

    fn line(&self, what: &str) -> String {
        format!(
            "{what}: {} parameters, {} weights in {} bytes, {:.3} bytes per weight\n",
            self.parameters, self.weights, self.bytes, self.bytes_per_weight
        )
    }
}

impl Inspection {
    /// Reads headers and the texts beside quantized weights, and no weight.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, Nf4Error> {
        let parameters = checkpoint
            .parameters()
            .into_iter()
            .map(|name| Parameter::of(checkpoint, name))
            .collect::<Result<Vec<_>, _>>()?;
        let quantized = |parameter: &&Parameter| parameter.quantization.is_some();
        Ok(Self {
            quantized: Totals::of(parameters.iter().filter(quantized)),
            total: Totals::of(parameters.iter()),
            parameters,
            faults: faults(checkpoint),
        })
    }

    pub fn table(&self) -> String {
        let header = ["parameter", "shape", "type", "block", "double", "bytes"];
        let mut rows: Vec<[String; 6]> = vec![header.map(str::to_string)];
        for parameter in &self.parameters {
            let (block, double) = match &parameter.quantization {
                None => ("-".to_string(), "-"),
                Some(quantization) => (
                    quantization.block_size.to_string(),
                    if quantization.double_quant {
                        "yes"
                    } else {
                        "no"
                    },
                ),
            };
            rows.push([
                parameter.name.clone(),
                format!("{:?}", parameter.shape),
                parameter.kind_text(),
                block,
                double.into(),
                parameter.bytes.to_string(),
            ]);
        }
        let widths: [usize; 6] = std::array::from_fn(|column| {
            let widths = rows.iter().map(|row| row[column].chars().count());
            widths.max().unwrap_or(0)
        });
        let mut text = String::new();
        for [name, shape, kind, block, double, bytes] in &rows {
            text += &format!(
                "{name:<0$}  {shape:<1$}  {kind:<2$}  {block:>3$}  {double:>4$}  {bytes:>5$}\n",
                widths[0], widths[1], widths[2], widths[3], widths[4], widths[5],
            );
        }
        text += "\n";
        if self.quantized.parameters > 0 {
            text += &self.quantized.line("quantized");
        }
        text += &self.total.line("total");
        text + &fault_lines(&self.faults)
    }
}

/// What is wrong with a checkpoint, see [`Checkpoint::faults`].
pub fn faults(checkpoint: &Checkpoint) -> Vec<String> {
    let faults = checkpoint.faults();
    faults.iter().map(Nf4Error::to_string).collect()
}

/// A line for each of the first ten: every weight can have one.
pub fn fault_lines(faults: &[String]) -> String {
    const SHOWN: usize = 10;
    let mut text: String = faults
        .iter()
        .take(SHOWN)
        .map(|fault| format!("fault: {fault}\n"))
        .collect();
    if faults.len() > SHOWN {
        text += &format!("and {} more faults\n", faults.len() - SHOWN);
    }
    text
}

impl Parameter {
    fn of(checkpoint: &Checkpoint, name: &str) -> Result<Self, Nf4Error> {
        let info = checkpoint.tensor_info(name)?;
        let bytes = checkpoint.parameter_bytes(name);
        let state_key = [QuantType::Nf4, QuantType::Fp4]
            .map(|kind| format!("{name}.quant_state.bitsandbytes__{}", kind.name()))
            .into_iter()
            .find(|key| checkpoint.contains(key));
        let Some(state_key) = state_key else {
            return Ok(Self {
                name: name.into(),
                shape: info.shape.to_vec(),
                kind: info.dtype.to_string(),
                quantization: None,
                bytes,
            });
        };
        let state = QuantState::parse(checkpoint.tensor_bytes(&state_key)?, &state_key)?;
        Ok(Self {
            name: name.into(),
            kind: state.quant_type.name().into(),
            quantization: Some(Quantization {
                dtype: state.dtype.name(),
                block_size: state.block_size.elems(),
                double_quant: state.nested.is_some(),
                storage: info.dtype.to_string(),
                transposed: checkpoint.is_transposed(name)?,
            }),
            shape: state.shape,
            bytes,
        })
    }

    /// The type, with what is unusual about it.
    fn kind_text(&self) -> String {
        let Some(quantization) = &self.quantization else {
            return self.kind.clone();
        };
        let mut text = format!("{} of {}", self.kind, quantization.dtype);
        if quantization.storage != "U8" {
            text += &format!(" in {}", quantization.storage);
        }
        if quantization.transposed {
            text += ", transposed";
        }
        text
    }
}
