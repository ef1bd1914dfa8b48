//! What a checkpoint holds.

use burn_nf4::Nf4Error;
use burn_nf4::checkpoint::{Checkpoint, QuantState};
use burn_nf4::format::{BlockShape, QuantConfig, QuantType, ScaleType, WeightForm};
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
    /// `nf4`, `nvfp4` and so on, or the dtype.
    #[serde(rename = "type")]
    kind: String,
    #[serde(flatten)]
    quantization: Option<Quantization>,
    bytes: usize,
    bytes_per_weight: f64,
}

#[derive(Serialize)]
struct Quantization {
    dtype: &'static str,
    block_size: usize,
    /// The weights that share a scale, as text.
    block: String,
    /// What the scales are, as text.
    scales: String,
    double_quant: bool,
    /// The dtype of bitsandbytes' codes.
    #[serde(skip_serializing_if = "Option::is_none")]
    storage: Option<String>,
    transposed: bool,
}

impl Quantization {
    fn new(form: &WeightForm, storage: Option<String>) -> Self {
        let config = form.config;
        Self {
            dtype: form.dtype.name(),
            block_size: config.block_size.elems(),
            block: block(config),
            scales: scales(config),
            double_quant: config.nested_block_size.is_some(),
            storage,
            transposed: form.transposed,
        }
    }
}

fn block(config: QuantConfig) -> String {
    match config.format().block {
        BlockShape::Flat(size) | BlockShape::Row(size) => size.to_string(),
        BlockShape::Tile(high, wide) => format!("{high}x{wide}"),
        BlockShape::WholeRow => "row".into(),
    }
}

fn scales(config: QuantConfig) -> String {
    match config.format().scale {
        ScaleType::F32 => "f32".into(),
        ScaleType::Nested(size) => format!("u8/{}", size.elems()),
        ScaleType::E4m3 => "e4m3".into(),
        ScaleType::E8m0 => "e8m0".into(),
    }
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
        let header = [
            "parameter",
            "shape",
            "type",
            "block",
            "scales",
            "bytes",
            "per weight",
        ];
        let mut rows: Vec<[String; 7]> = vec![header.map(str::to_string)];
        for parameter in &self.parameters {
            let quantization = parameter.quantization.as_ref();
            let of_quantized = |text: fn(&Quantization) -> &String| match quantization {
                None => "-".to_string(),
                Some(quantization) => text(quantization).clone(),
            };
            rows.push([
                parameter.name.clone(),
                format!("{:?}", parameter.shape),
                parameter.kind_text(),
                of_quantized(|quantization| &quantization.block),
                of_quantized(|quantization| &quantization.scales),
                parameter.bytes.to_string(),
                format!("{:.3}", parameter.bytes_per_weight),
            ]);
        }
        let widths: [usize; 7] = std::array::from_fn(|column| {
            let widths = rows.iter().map(|row| row[column].chars().count());
            widths.max().unwrap_or(0)
        });
        let mut text = String::new();
        for [name, shape, kind, block, scales, bytes, per_weight] in &rows {
            text += &format!(
                "{name:<0$}  {shape:<1$}  {kind:<2$}  {block:>3$}  {scales:>4$}  {bytes:>5$}  \
                 {per_weight:>6$}\n",
                widths[0], widths[1], widths[2], widths[3], widths[4], widths[5], widths[6],
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
        let bytes = checkpoint.parameter_bytes(name);
        let quantized = |form: WeightForm, storage| {
            let kind = form.config.quant_type.name().into();
            let quantization = Quantization::new(&form, storage);
            Self::new(name, form.shape, kind, Some(quantization), bytes)
        };
        let state_key = [QuantType::Nf4, QuantType::Fp4]
            .map(|kind| format!("{name}.quant_state.bitsandbytes__{}", kind.name()))
            .into_iter()
            .find(|key| checkpoint.contains(key));
        if let Some(state_key) = state_key {
            let state = QuantState::parse(checkpoint.tensor_bytes(&state_key)?, &state_key)?;
            let form = WeightForm {
                config: state.config(),
                shape: state.shape,
                dtype: state.dtype,
                transposed: checkpoint.is_transposed(name)?,
            };
            let storage = checkpoint.tensor_info(name)?.dtype.to_string();
            return Ok(quantized(form, Some(storage)));
        }
        if checkpoint.is_quantized(name) {
            return Ok(quantized(checkpoint.weight_form(name)?, None));
        }
        let info = checkpoint.tensor_info(name)?;
        let kind = info.dtype.to_string();
        Ok(Self::new(name, info.shape.to_vec(), kind, None, bytes))
    }

    fn new(
        name: &str,
        shape: Vec<usize>,
        kind: String,
        quantization: Option<Quantization>,
        bytes: usize,
    ) -> Self {
        // The product of a header that lies may be too large.
        let weights = shape
            .iter()
            .fold(1usize, |product, &dim| product.saturating_mul(dim));
        Self {
            name: name.into(),
            shape,
            kind,
            quantization,
            bytes,
            bytes_per_weight: bytes as f64 / weights.max(1) as f64,
        }
    }

    /// The type, with what is unusual about it.
    fn kind_text(&self) -> String {
        let Some(quantization) = &self.quantization else {
            return self.kind.clone();
        };
        let mut text = format!("{} of {}", self.kind, quantization.dtype);
        if let Some(storage) = quantization
            .storage
            .as_deref()
            .filter(|&dtype| dtype != "U8")
        {
            text += &format!(" in {storage}");
        }
        if quantization.transposed {
            text += ", transposed";
        }
        text
    }
}
