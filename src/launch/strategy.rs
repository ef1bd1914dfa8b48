//! Which kernel computes a product with a packed weight: the kernels there are, which of them the sizes
//! suggest, and which are worth a measurement.

use super::tile::{TENSOR_CORE_ROWS, TensorCoreTile, TileRule};

/// Rows of `x` up to which the plain kernel is taken unmeasured where there are no tensor cores: it
/// reads an eighth of what decoding writes and reads.
const GEMV_ROWS: usize = 4;

/// Rows of `x` from which it is not even measured.
const MAX_GEMV_ROWS: usize = 32;

/// Rows of `x` up to which the kernel on tensor cores is taken unmeasured where cuBLASLt is there: on an
/// H100 the two break even between 128 and 192 rows for a large weight.
const CUBLASLT_ROWS: usize = 128;

/// A kernel that multiplies with a packed weight without decoding it to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MatmulVariant {
    /// A plane per row of the weight; any device, any shape, few rows of `x`.
    Gemv,
    /// Tensor cores; rows of f16 or bf16, 64 of them at a time.
    TensorCore,
    /// Tensor cores, one row of f16 or bf16: multiplies with levels in f16, and their sums with
    /// scales in f32, rather than with what dequantization gives.
    Levels,
}

impl MatmulVariant {
    /// All kernels.
    pub const ALL: [Self; 3] = [Self::Gemv, Self::TensorCore, Self::Levels];

    /// The name used in files, tests and benches.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gemv => "gemv",
            Self::TensorCore => "tensor_core",
            Self::Levels => "levels",
        }
    }
}

impl MatmulVariant {
    /// The kernels to try in this order for `m` rows of `x`, by the sizes alone; where the device has
    /// none of them, the weight is decoded. `cublaslt`: products with the decoded weight are
    /// cuBLASLt's.
    pub(crate) fn by_rule(
        tensor_cores: bool,
        cublaslt: bool,
        m: usize,
    ) -> impl Iterator<Item = Self> {
        let decode = cublaslt && m > CUBLASLT_ROWS;
        [
            (tensor_cores && m == 1, Self::Levels),
            (tensor_cores && !decode, Self::TensorCore),
            (m <= GEMV_ROWS, Self::Gemv),
        ]
        .into_iter()
        .filter_map(|(wanted, variant)| wanted.then_some(variant))
    }
}

/// A way to compute a product that may be the fastest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    /// The name used in the log of the autotuner.
    pub name: &'static str,
    /// The kernel; without one the weight is decoded, for a dense product.
    pub variant: Option<MatmulVariant>,
    /// How the kernel cuts the weight up.
    pub tile: Option<TileRule>,
    /// See [`priority`](Self::priority).
    priority: fn(bool, usize) -> i8,
}

impl Candidate {
    /// All that may be the fastest, the one that decodes last. What does not fit a device fails, and is
    /// left out then.
    pub const ALL: [Self; 6] = [
        Self::tiled(
            "tensor_core-whole",
            TensorCoreTile::whole,
            |tensor_cores, m| on_tensor_cores(tensor_cores, m <= 16),
        ),
        Self::tiled(
            "tensor_core-wide",
            TensorCoreTile::wide,
            |tensor_cores, m| on_tensor_cores(tensor_cores, m <= 32),
        ),
        Self::tiled(
            "tensor_core-narrow",
            TensorCoreTile::narrow,
            |tensor_cores, m| on_tensor_cores(tensor_cores, m > 4),
        ),
        Self {
            name: MatmulVariant::Levels.name(),
            variant: Some(MatmulVariant::Levels),
            tile: None,
            priority: |tensor_cores, m| if tensor_cores && m == 1 { 1 } else { -1 },
        },
        Self {
            name: MatmulVariant::Gemv.name(),
            variant: Some(MatmulVariant::Gemv),
            tile: None,
            priority: |tensor_cores, m| i8::from(!tensor_cores && m <= MAX_GEMV_ROWS),
        },
        Self::DECODE,
    ];

    /// Decode the weight, then a dense product.
    pub const DECODE: Self = Self {
        name: "decode",
        variant: None,
        tile: None,
        // Up to 64 rows it needs at least twice the time wherever it was measured.
        priority: |tensor_cores, m| {
            let rows = if tensor_cores {
                TENSOR_CORE_ROWS
            } else {
                GEMV_ROWS
            };
            i8::from(m > rows)
        },
    };

    const fn tiled(name: &'static str, tile: TileRule, priority: fn(bool, usize) -> i8) -> Self {
        Self {
            name,
            variant: Some(MatmulVariant::TensorCore),
            tile: Some(tile),
            priority,
        }
    }

    /// Whether it takes part in a measurement of `m` rows, on a device with or without tensor cores: 1
    /// if so, 0 if it stands in where all others fail, -1 if never.
    pub fn priority(&self, tensor_cores: bool, m: usize) -> i8 {
        (self.priority)(tensor_cores, m)
    }
}

fn on_tensor_cores(tensor_cores: bool, takes_part: bool) -> i8 {
    match tensor_cores {
        false => -1,
        true => i8::from(takes_part),
    }
}
