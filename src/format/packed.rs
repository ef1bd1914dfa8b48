//! The device image of a quantized weight: one buffer of u32 words.
//!
//! One buffer rather than six makes a launch cheap (each binding costs host time), lets a weight
//! travel, be recorded and be moved as one integer tensor whose bits no float cast can touch, and
//! needs no u8 support on the device.
//!
//! | section | words | content |
//! |---|---|---|
//! | codes | `ceil(n / 8)` | the checkpoint's bytes, little-endian: element `8w` in bits 4..8 of word `w`, `8w + 1` in bits 0..4, `8w + 2` in bits 12..16, … |
//! | scales | `blocks`, or `ceil(blocks / 4)` | f32 bits, or 8-bit codes four a word when nested |
//! | codebook | 16 | f32 bits of the sixteen levels |
//! | nested map | 256 | f32 bits (nested only) |
//! | nested offset | 4 | f32 bits, then zeros (nested only) |
//! | nested scales | `ceil(blocks / nested block size)` | f32 bits (nested only) |
//! | header | 4 | what the buffer is, see [`PackedLayout::header`] |
//!
//! Each section starts at a multiple of four words, so that 16-byte loads are aligned; the padding
//! is zero.

use super::check::checked_elems;
use super::codebook::DYNAMIC_MAP;
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
    /// Words of the codebook.
    pub const CODEBOOK_WORDS: usize = 16;

    /// Words of the nested map.
    pub const NESTED_MAP_WORDS: usize = 256;

    /// Words of the nested offset, of which the first holds it.
    pub const NESTED_OFFSET_WORDS: usize = 4;

    /// Words from the start of the codebook to the nested map.
    pub const NESTED_MAP: usize = Self::CODEBOOK_WORDS;

    /// Words from the start of the codebook to the nested offset.
    pub const NESTED_OFFSET: usize = Self::NESTED_MAP + Self::NESTED_MAP_WORDS;

    /// Words from the start of the codebook to the nested scales.
    pub const NESTED_SCALES: usize = Self::NESTED_OFFSET + Self::NESTED_OFFSET_WORDS;

    /// The layout of a weight of `elems` elements.
    pub const fn new(elems: usize, config: QuantConfig) -> Self {
        let blocks = config.block_size.blocks(elems);
        let scales = align4(elems.div_ceil(8));
        let scale_words = match config.nested_block_size {
            None => blocks,
            Some(_) => blocks.div_ceil(4),
        };
        let codebook = scales + align4(scale_words);
        let codebook_end = codebook + Self::CODEBOOK_WORDS;
        let (nested_offset, nested_scales, header) = match config.nested_block_size {
            None => (codebook_end, codebook_end, codebook_end),
            Some(size) => {
                let nested_scales = codebook + Self::NESTED_SCALES;
                let header = nested_scales + align4(size.blocks(blocks));
                (codebook + Self::NESTED_OFFSET, nested_scales, header)
            }
        };
        Self {
            elems,
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
    /// [`Nf4Error::ElementCount`] if the shape has no elements or too many.
    pub fn for_shape(shape: &[usize], config: QuantConfig) -> Result<Self, Nf4Error> {
        Ok(Self::new(checked_elems("weight", shape)?, config))
    }

    /// Number of weights.
    pub const fn elems(&self) -> usize {
        self.elems
    }

    /// Number of blocks of weights.
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

    /// Start of the nested map; the end of the codebook when flat.
    pub const fn nested_map_start(&self) -> usize {
        self.nested_map
    }

    /// Start of the nested offset; the end of the codebook when flat.
    pub const fn nested_offset_start(&self) -> usize {
        self.nested_offset
    }

    /// Start of the nested scales; the end of the codebook when flat.
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
