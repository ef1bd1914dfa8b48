//! The device image of a quantized weight: one buffer of u32 words.
//!
//! One buffer rather than six makes a launch cheap (each binding costs host time), lets a weight
//! travel, be recorded and be moved as one integer tensor whose bits no float cast can touch, and
//! needs no u8 support on the device.
//!
//! | section | words | content |
//! |---|---|---|
//! | codes | `ceil(n / 8)` | bytes, little-endian: element `8w` in bits 4..8 of word `w`, `8w + 1` in bits 0..4, `8w + 2` in bits 12..16, …, whatever the order of nibbles in files; or of 8-bit codes `ceil(n / 4)` |
//! | scales | `blocks`, or `ceil(blocks / 4)` | f32 bits, or 8-bit codes four a word |
//! | codebook | 16 or 256 | f32 bits of the levels |
//! | scale map | 256 | f32 bits of what a code of a scale stands for, the scale of the tensor included (where scales are 8-bit codes) |
//! | nested offset | 4 | f32 bits, then zeros; or the scale of the tensor and whether it divides (1) or multiplies (2) (where scales are 8-bit codes) |
//! | nested scales | `ceil(blocks / nested block size)` | f32 bits (nested only) |
//! | header | 4 | what the buffer is, see [`PackedLayout::header`] |
//!
//! Each section starts at a multiple of four words, so that 16-byte loads are aligned; the padding
//! is zero.

use super::check::{check_len, checked_elems};
use super::codebook::DYNAMIC_MAP;
use super::description::{BlockShape, ScaleType};
use super::form::WeightForm;
use super::spec::{BlockSize, FloatType, QuantConfig, QuantType};
use crate::error::Nf4Error;

/// Words of the header, the last section of the image.
pub const HEADER_WORDS: usize = 4;

/// Where each section of a packed weight starts, in words.
///
/// The fields are private because bounds of unsafe code rest on them: a layout is always the one that
/// [`new`](Self::new) computes from a number of elements and a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PackedLayout {
    elems: usize,
    /// Elements of a row.
    columns: usize,
    blocks: usize,
    config: QuantConfig,
    scales: usize,
    codebook: usize,
    /// As the two below: the end of the codebook where the scales are flat.
    nested_map: usize,
    nested_offset: usize,
    nested_scales: usize,
    header: usize,
    words: usize,
}

const fn align4(words: usize) -> usize {
    words.next_multiple_of(4)
}

impl PackedLayout {
    /// Words of a codebook of 4-bit codes.
    pub const CODEBOOK_WORDS: usize = 16;

    /// Words of the map of scales.
    pub const NESTED_MAP_WORDS: usize = 256;

    /// Words of the nested offset, of which the first holds it.
    pub const NESTED_OFFSET_WORDS: usize = 4;

    /// Words from the start of the codebook of 4-bit codes to the map of scales.
    pub const NESTED_MAP: usize = Self::CODEBOOK_WORDS;

    /// Words from the start of the codebook of 4-bit codes to the nested offset.
    pub const NESTED_OFFSET: usize = Self::NESTED_MAP + Self::NESTED_MAP_WORDS;

    /// Words from the start of the codebook of 4-bit codes to the nested scales.
    pub const NESTED_SCALES: usize = Self::NESTED_OFFSET + Self::NESTED_OFFSET_WORDS;

    /// The layout of a weight of `elems` elements, where its shape does not matter: see
    /// [`for_shape`](Self::for_shape). Formats whose blocks follow the rows take it for one row.
    pub const fn new(elems: usize, config: QuantConfig) -> Self {
        Self::of_rows(1, elems, config)
    }

    /// The layout of a matrix.
    const fn of_rows(rows: usize, columns: usize, config: QuantConfig) -> Self {
        let elems = rows * columns;
        let blocks = match config.format().block {
            BlockShape::Flat(size) | BlockShape::Row(size) => elems.div_ceil(size),
            BlockShape::Tile(high, wide) => rows.div_ceil(high) * columns.div_ceil(wide),
            BlockShape::WholeRow => rows,
        };
        let scales = align4(elems.div_ceil(config.quant_type.codes_a_word()));
        let scale_type = config.scale_type();
        let scale_words = match scale_type {
            ScaleType::F32 => blocks,
            ScaleType::Nested(_) | ScaleType::E4m3 | ScaleType::E8m0 => blocks.div_ceil(4),
        };
        let codebook = scales + align4(scale_words);
        let codebook_end = codebook + config.quant_type.codebook().len();
        let (nested_offset, nested_scales, header) = match scale_type {
            ScaleType::F32 => (codebook_end, codebook_end, codebook_end),
            _ => {
                let nested_blocks = match scale_type {
                    ScaleType::Nested(size) => size.blocks(blocks),
                    _ => 0,
                };
                let nested_scales = codebook + Self::NESTED_SCALES;
                let header = nested_scales + align4(nested_blocks);
                (codebook + Self::NESTED_OFFSET, nested_scales, header)
            }
        };
        Self {
            elems,
            columns,
            blocks,
            config,
            scales,
            codebook,
            nested_map: codebook_end,
            nested_offset,
            nested_scales,
            header,
            words: header + HEADER_WORDS,
        }
    }

    /// The layout of a weight of a given shape.
    ///
    /// # Errors
    /// [`Nf4Error::ElementCount`] if the shape has no elements or too many, [`Nf4Error::BlockSize`] or
    /// [`Nf4Error::Scales`] if the format has not this block size or such scales, [`Nf4Error::Blocks`] if rows
    /// are not made of whole blocks where the format wants it.
    pub fn for_shape(shape: &[usize], config: QuantConfig) -> Result<Self, Nf4Error> {
        let elems = checked_elems("weight", shape)?;
        config.check("weight")?;
        check_blocks(shape, config)?;
        let columns = shape.last().copied().unwrap_or(1);
        Ok(Self::of_rows(elems / columns, columns, config))
    }

    /// Base-2 logarithm of a number of neighbours in the flat weight that share a scale, from each
    /// multiple of it on: that of the block size, unless blocks follow rows of another length.
    pub const fn run_log2(&self) -> u32 {
        let block_log2 = self.config.block_size.log2();
        match self.config.format().block {
            BlockShape::Flat(_) | BlockShape::Row(_) => block_log2,
            BlockShape::Tile(..) | BlockShape::WholeRow => {
                let of_rows = self.columns.trailing_zeros();
                if of_rows < block_log2 {
                    of_rows
                } else {
                    block_log2
                }
            }
        }
    }

    /// Elements of a row; all of them if the layout is not that of a [shape](Self::for_shape).
    pub const fn columns(&self) -> usize {
        self.columns
    }

    /// Checks that scales which go by rows are those of rows of `k` elements.
    pub(crate) fn check_columns(&self, k: usize) -> Result<(), Nf4Error> {
        match self.config.format().block {
            BlockShape::Flat(_) | BlockShape::Row(_) => Ok(()),
            BlockShape::Tile(..) | BlockShape::WholeRow => {
                check_len("row of the packed weight", k, self.columns)
            }
        }
    }

    /// The scale of the run of elements with this number, see [`run_log2`](Self::run_log2).
    pub const fn scale_of_run(&self, run: usize) -> usize {
        let first = run << self.run_log2();
        match self.config.format().block {
            BlockShape::Flat(_) | BlockShape::Row(_) => run,
            BlockShape::Tile(high, wide) => {
                let (row, column) = (first / self.columns, first % self.columns);
                row / high * self.columns.div_ceil(wide) + column / wide
            }
            BlockShape::WholeRow => first / self.columns,
        }
    }

    /// Number of weights.
    pub const fn elems(&self) -> usize {
        self.elems
    }

    /// Number of blocks of weights, and of scales.
    pub const fn blocks(&self) -> usize {
        self.blocks
    }

    /// How the weight is quantized.
    pub const fn config(&self) -> QuantConfig {
        self.config
    }

    /// Words in all.
    pub const fn words(&self) -> usize {
        self.words
    }

    /// Start of the scales; the codes start at 0.
    pub const fn scales_start(&self) -> usize {
        self.scales
    }

    /// Start of the codebook.
    pub const fn codebook_start(&self) -> usize {
        self.codebook
    }

    /// Start of the map of scales; the end of the codebook where scales are f32.
    pub const fn nested_map_start(&self) -> usize {
        self.nested_map
    }

    /// Start of the nested offset; the end of the codebook where scales are f32.
    pub const fn nested_offset_start(&self) -> usize {
        self.nested_offset
    }

    /// Start of the nested scales; the end of the codebook where scales are f32.
    pub const fn nested_scales_start(&self) -> usize {
        self.nested_scales
    }

    /// Start of the header.
    pub const fn header_start(&self) -> usize {
        self.header
    }

    /// The four words that say what the buffer is: a magic number with a version, the settings,
    /// and 64 bits of FNV-1a hash over the shape.
    pub fn header(&self, shape: &[usize], dtype: FloatType) -> [u32; HEADER_WORDS] {
        let nested_log2 = self.config.nested_block_size.map_or(0, BlockSize::log2);
        let settings = match self.config.quant_type {
            QuantType::Nf4 => 0,
            QuantType::Fp4 => 1,
            QuantType::Nvfp4 => 2,
            QuantType::Mxfp4 => 3,
            QuantType::Fp8Block => 4,
            QuantType::Fp8Channel => 5,
        } | match dtype {
            FloatType::F16 => 0,
            FloatType::BF16 => 1,
            FloatType::F32 => 2,
        } << 8
            | self.config.block_size.log2() << 16
            | nested_log2 << 24;
        let hash = shape.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &dim| {
            (dim as u64).to_le_bytes().iter().fold(hash, |hash, &byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
            })
        });
        [MAGIC, settings, hash as u32, (hash >> 32) as u32]
    }

    /// The header of a weight of a given form. Bit 4 of the settings says that the weight in use
    /// is the transpose of the one stored, whose shape is hashed.
    pub fn form_header(&self, form: &WeightForm) -> [u32; HEADER_WORDS] {
        let mut header = self.header(&form.stored_shape(), form.dtype);
        header[1] |= u32::from(form.transposed) << 4;
        header
    }

    /// The words after the codes and scales that do not depend on the weight's values: codebook
    /// and, when nested, the dynamic map.
    pub fn tables(&self) -> Vec<u32> {
        let codebook = self.config.quant_type.codebook().iter();
        let map = match self.config.nested_block_size {
            None => &[][..],
            Some(_) => &DYNAMIC_MAP[..],
        };
        codebook.chain(map).map(|value| value.to_bits()).collect()
    }

    /// Checks that a header found in a buffer is the one expected.
    ///
    /// # Errors
    /// [`Nf4Error::Header`] naming the field that differs.
    pub fn check_header(
        &self,
        found: &[u32],
        shape: &[usize],
        dtype: FloatType,
    ) -> Result<(), Nf4Error> {
        check_header_words(&self.header(shape, dtype), found)
    }
}

/// Checks that rows are made of whole blocks where the format wants it.
fn check_blocks(shape: &[usize], config: QuantConfig) -> Result<(), Nf4Error> {
    let fail = |expected: String| {
        Err(Nf4Error::Blocks {
            tensor: "weight".into(),
            format: config.quant_type.name(),
            shape: shape.to_vec(),
            expected,
        })
    };
    let [rest @ .., rows, columns] = shape else {
        return match config.format().block {
            BlockShape::Flat(_) => Ok(()),
            _ => fail("a matrix, or a stack of matrices".into()),
        };
    };
    match config.format().block {
        BlockShape::Row(size) if !columns.is_multiple_of(size) => {
            fail(format!("rows of a multiple of {size} elements"))
        }
        BlockShape::Tile(high, _)
            if rest.iter().any(|&count| count != 1) && !rows.is_multiple_of(high) =>
        {
            fail(format!("stacked matrices of a multiple of {high} rows"))
        }
        _ => Ok(()),
    }
}

/// Compares a header with the one expected, field by field.
pub(crate) fn check_header_words(
    expected: &[u32; HEADER_WORDS],
    found: &[u32],
) -> Result<(), Nf4Error> {
    let fields = ["magic number", "settings", "shape hash", "shape hash"];
    for (i, what) in fields.into_iter().enumerate() {
        let given = found.get(i).copied();
        if given != Some(expected[i]) {
            return Err(Nf4Error::Header {
                what,
                expected: format!("{:#010x}", expected[i]),
                given: given.map_or("missing".into(), |word| format!("{word:#010x}")),
            });
        }
    }
    Ok(())
}

/// "NF4" and the version of the layout.
const MAGIC: u32 = u32::from_le_bytes(*b"NF4\x01");
