//! A quantized weight where it lies in its files.

use std::borrow::Cow;

use crate::error::Nf4Error;
use crate::format::{
    BlockShape, BlockSize, E4M3_CODEBOOK, FloatType, Floats, PackedLayout, QuantConfig, ScaleParts,
    ScaleType, TensorScale, WeightForm, WeightParts, check_finite, e8m0_value, stored_floats,
};

/// A quantized weight in its files, with nothing of any size copied where that can be helped.
#[derive(Debug)]
pub(super) struct StoredWeight<'a> {
    /// The shape that was quantized.
    pub shape: Vec<usize>,
    /// The dtype that the weight had.
    pub dtype: FloatType,
    pub config: QuantConfig,
    /// Whether the parameter is the transpose of what is stored.
    pub transposed: bool,
    pub codes: Cow<'a, [u8]>,
    pub scales: StoredScales<'a>,
}

/// Scales in files.
#[derive(Debug)]
pub(super) enum StoredScales<'a> {
    /// f32, little-endian.
    Flat(Cow<'a, [u8]>),
    Nested {
        codes: &'a [u8],
        absmax: &'a [u8],
        map: Box<[f32; 256]>,
        offset: f32,
        block_size: BlockSize,
    },
    /// 8-bit floats.
    Coded {
        codes: Cow<'a, [u8]>,
        tensor_scale: TensorScale,
    },
}

/// Rows of a stack of matrices, counted through all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rows {
    pub first: usize,
    /// From one row to the next.
    pub step: usize,
    pub count: usize,
}

impl Rows {
    /// The bytes of the rows, which are there; in place where they follow one another.
    pub fn of<'a>(&self, bytes: &'a [u8], row_bytes: usize) -> Cow<'a, [u8]> {
        let row = |number: usize| &bytes[number * row_bytes..(number + 1) * row_bytes];
        match self.step {
            1 => bytes[self.first * row_bytes..(self.first + self.count) * row_bytes].into(),
            step => {
                let rows = (0..self.count).map(|number| row(self.first + step * number));
                Cow::Owned(rows.collect::<Vec<_>>().concat())
            }
        }
    }
}

impl StoredWeight<'_> {
    /// The parts, in the files.
    pub fn parts(&self) -> WeightParts<'_> {
        let scales = match &self.scales {
            StoredScales::Flat(scales) => ScaleParts::Flat(Floats::Stored(scales)),
            StoredScales::Nested {
                codes,
                absmax,
                map,
                offset,
                block_size,
            } => ScaleParts::Nested {
                codes,
                absmax: Floats::Stored(absmax),
                map,
                offset: *offset,
                block_size: *block_size,
            },
            StoredScales::Coded {
                codes,
                tensor_scale,
            } => ScaleParts::Coded {
                codes,
                tensor_scale: *tensor_scale,
            },
        };
        WeightParts {
            codes: &self.codes,
            scales,
            shape: &self.shape,
            dtype: self.dtype,
            config: self.config,
        }
    }

    /// What the parameter is that the weight is stored for.
    pub fn form(&self, prefix: &str) -> Result<WeightForm, Nf4Error> {
        let mut shape = self.shape.clone();
        // The transpose of a vector is itself, and bitsandbytes has none for more dimensions.
        let transposed = self.transposed && shape.len() > 1;
        if transposed {
            if shape.len() > 2 {
                return Err(Nf4Error::NotAMatrix {
                    tensor: prefix.into(),
                    shape,
                });
            }
            shape.reverse();
        }
        Ok(WeightForm {
            shape,
            dtype: self.dtype,
            config: self.config,
            transposed,
        })
    }

    /// The device image, in the one allocation that it needs.
    pub fn to_packed(&self, form: &WeightForm) -> Result<Vec<u32>, Nf4Error> {
        let layout = PackedLayout::for_shape(&form.shape, form.config)?;
        let mut words = self.parts().to_packed(&layout);
        words[layout.header_start()..].copy_from_slice(&layout.form_header(form));
        Ok(words)
    }

    /// Checks that no scale is NaN or infinite; `key` is that of the tensor that holds them.
    ///
    /// # Errors
    /// [`Nf4Error::NonFinite`].
    pub fn check_scales(&self, key: &str) -> Result<(), Nf4Error> {
        let StoredScales::Coded { codes, .. } = &self.scales else {
            return match &self.scales {
                StoredScales::Flat(scales) => check_finite(key, stored_floats(scales)),
                _ => Ok(()),
            };
        };
        let value = |code: u8| match self.config.scale_type() {
            ScaleType::E8m0 => e8m0_value(code),
            _ => E4M3_CODEBOOK[usize::from(code)],
        };
        match codes.iter().position(|&code| value(code).is_nan()) {
            None => Ok(()),
            Some(index) => Err(Nf4Error::NonFinite {
                tensor: key.into(),
                index,
                given: value(codes[index]),
            }),
        }
    }

    /// The matrix of some rows of a stack; `None` unless they are made of [whole blocks](holds_rows).
    pub fn rows(&self, rows: Rows) -> Option<StoredWeight<'_>> {
        let columns = *self.shape.last()?;
        if !holds_rows(self.config, &self.shape, rows) {
            return None;
        }
        let code_bytes = self.config.quant_type.code_bytes(columns);
        let scales = match (&self.scales, self.config.format().block) {
            (StoredScales::Flat(scales), BlockShape::Tile(high, wide)) => {
                let tiles = Rows {
                    first: rows.first / high,
                    step: 1,
                    count: rows.count.div_ceil(high),
                };
                StoredScales::Flat(tiles.of(scales, 4 * columns.div_ceil(wide)))
            }
            (StoredScales::Flat(scales), _) => StoredScales::Flat(rows.of(scales, 4)),
            (
                StoredScales::Coded {
                    codes,
                    tensor_scale,
                },
                BlockShape::Row(size),
            ) => StoredScales::Coded {
                codes: rows.of(codes, columns / size),
                tensor_scale: *tensor_scale,
            },
            _ => return None,
        };
        Some(StoredWeight {
            shape: vec![rows.count, columns],
            dtype: self.dtype,
            config: self.config,
            transposed: false,
            codes: rows.of(&self.codes, code_bytes),
            scales,
        })
    }
}

/// Whether rows of a stack of such a shape are made of whole blocks, so that they can be taken out as they are.
pub(super) fn holds_rows(config: QuantConfig, shape: &[usize], rows: Rows) -> bool {
    let [.., of_matrix, _] = shape else {
        return false;
    };
    match config.format().block {
        BlockShape::Flat(_) => false,
        BlockShape::Row(_) | BlockShape::WholeRow => true,
        BlockShape::Tile(high, _) => {
            let is_whole = rows.count.is_multiple_of(high) || rows.count == *of_matrix;
            rows.step == 1 && rows.first.is_multiple_of(high) && is_whole
        }
    }
}
