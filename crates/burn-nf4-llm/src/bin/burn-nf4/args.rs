//! The values of arguments.

use burn_nf4::checkpoint::Dtype;
use burn_nf4::format::{FloatType, QuantType};
use clap::ValueEnum;

/// A float type, by transformers' name or Burn's.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum FloatArg {
    #[value(alias = "f16")]
    Float16,
    #[value(alias = "bf16")]
    Bfloat16,
    #[value(alias = "f32")]
    Float32,
}

impl From<FloatArg> for FloatType {
    fn from(arg: FloatArg) -> Self {
        match arg {
            FloatArg::Float16 => Self::F16,
            FloatArg::Bfloat16 => Self::BF16,
            FloatArg::Float32 => Self::F32,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum StorageArg {
    #[value(alias = "u8")]
    Uint8,
    #[value(alias = "f16")]
    Float16,
    #[value(alias = "bf16")]
    Bfloat16,
    #[value(alias = "f32")]
    Float32,
}

impl From<StorageArg> for Dtype {
    fn from(arg: StorageArg) -> Self {
        match arg {
            StorageArg::Uint8 => Self::U8,
            StorageArg::Float16 => Self::F16,
            StorageArg::Bfloat16 => Self::BF16,
            StorageArg::Float32 => Self::F32,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum QuantArg {
    /// 4-bit NormalFloat (bitsandbytes)
    Nf4,
    /// bitsandbytes' 4-bit float
    Fp4,
    /// NVIDIA's: 4-bit floats in blocks of 16 (compressed-tensors)
    Nvfp4,
    /// OCP's: 4-bit floats in blocks of 32 with scales that are powers of two (compressed-tensors)
    Mxfp4,
}

impl From<QuantArg> for QuantType {
    fn from(arg: QuantArg) -> Self {
        match arg {
            QuantArg::Nf4 => Self::Nf4,
            QuantArg::Fp4 => Self::Fp4,
            QuantArg::Nvfp4 => Self::Nvfp4,
            QuantArg::Mxfp4 => Self::Mxfp4,
        }
    }
}

/// Reads a size as transformers does (`5GB`, in powers of ten), or a plain number of bytes.
pub fn parse_bytes(text: &str) -> Result<usize, String> {
    const UNITS: [(&str, usize); 5] = [
        ("TB", 1_000_000_000_000),
        ("GB", 1_000_000_000),
        ("MB", 1_000_000),
        ("KB", 1_000),
        ("", 1),
    ];
    let upper = text.to_ascii_uppercase();
    UNITS
        .iter()
        .find_map(|(unit, bytes)| {
            let number: usize = upper.strip_suffix(unit)?.trim().parse().ok()?;
            number.checked_mul(*bytes)
        })
        .filter(|&bytes| bytes > 0)
        .ok_or_else(|| "expected a size such as 5GB, 200MB or 4096".into())
}
