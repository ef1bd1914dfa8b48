//! A quantized tensor as a device image, and back.

use super::check::check_len;
use super::description::{NibbleOrder, ScaleType, TensorScale};
use super::packed::PackedLayout;
use super::parts::{Floats, ScaleParts, WeightParts, swap_nibbles};
use super::spec::{FloatType, QuantConfig};
use super::tensor::{Absmax, BlockTensor, CodedScales, NestedAbsmax};
use crate::error::Nf4Error;

impl BlockTensor {
    /// The layout of this tensor's device image.
    pub fn packed_layout(&self) -> PackedLayout {
        PackedLayout::for_shape(self.shape(), self.config()).expect("a tensor is consistent")
    }

    /// The device image: `packed_layout().words()` words.
    pub fn to_packed(&self) -> Vec<u32> {
        self.parts().to_packed(&self.packed_layout())
    }

    /// Reads a device image back.
    ///
    /// # Errors
    /// [`Nf4Error::Length`] if `words` is not as long as the layout asks for,
    /// [`Nf4Error::Header`] if it is another weight's image, and what
    /// [`from_parts`](Self::from_parts) returns.
    pub fn from_packed(
        words: &[u32],
        shape: &[usize],
        config: QuantConfig,
        dtype: FloatType,
    ) -> Result<Self, Nf4Error> {
        let layout = PackedLayout::for_shape(shape, config)?;
        check_len("packed weight", layout.words(), words.len())?;
        layout.check_header(&words[layout.header_start()..], shape, dtype)?;
        Self::from_image(words, &layout, shape, dtype)
    }

    /// Reads a device image whose length and header were checked.
    pub(crate) fn from_image(
        words: &[u32],
        layout: &PackedLayout,
        shape: &[usize],
        dtype: FloatType,
    ) -> Result<Self, Nf4Error> {
        let (elems, config) = (layout.elems(), layout.config());
        let code_bytes = config.quant_type.code_bytes(elems);
        let codes = match config.quant_type.nibbles() {
            Some(NibbleOrder::LowFirst) => take_bytes(&stored_codes(words, layout), code_bytes),
            _ => take_bytes(words, code_bytes),
        };
        let scales = &words[layout.scales_start()..];
        let absmax = match config.scale_type() {
            ScaleType::F32 => Absmax::Flat(take_floats(scales, layout.blocks())),
            ScaleType::E4m3 | ScaleType::E8m0 => Absmax::Coded(CodedScales {
                codes: take_bytes(scales, layout.blocks()),
                tensor_scale: tensor_scale(words, layout),
            }),
            ScaleType::Nested(block_size) => {
                let mut map = Box::new([0.0; PackedLayout::NESTED_MAP_WORDS]);
                let stored = &words[layout.nested_map_start()..];
                map.copy_from_slice(&take_floats(stored, PackedLayout::NESTED_MAP_WORDS));
                let nested_blocks = block_size.blocks(layout.blocks());
                Absmax::Nested(NestedAbsmax {
                    codes: take_bytes(scales, layout.blocks()),
                    absmax: take_floats(&words[layout.nested_scales_start()..], nested_blocks),
                    map,
                    offset: f32::from_bits(words[layout.nested_offset_start()]),
                    block_size,
                })
            }
        };
        Self::from_parts(
            codes,
            absmax,
            shape.to_vec(),
            config.block_size,
            dtype,
            config.quant_type,
        )
    }
}

/// A device image in host memory, with what it is the image of.
///
/// Unlike [`BlockTensor`] it is what [`host`](crate::host) decodes and quantizes to, and its parts are
/// found in it where they lie.
#[derive(Debug)]
pub(crate) struct PackedImage {
    words: Vec<u32>,
    /// The words with their bytes and codes in the order of files, where that is another.
    swapped: Vec<u32>,
    layout: PackedLayout,
    shape: Vec<usize>,
    dtype: FloatType,
}

impl PackedImage {
    /// `words` are an image of this layout, which is the shape's.
    pub fn new(words: Vec<u32>, layout: PackedLayout, shape: &[usize], dtype: FloatType) -> Self {
        let low_first = layout.config().quant_type.nibbles() == Some(NibbleOrder::LowFirst);
        let mut swapped = Vec::new();
        if cfg!(target_endian = "big") || low_first {
            swapped = words[..layout.codebook_start()].to_vec();
        }
        if low_first {
            swap_nibbles(&mut swapped[..layout.scales_start()]);
        }
        if cfg!(target_endian = "big") {
            swapped
                .iter_mut()
                .for_each(|word| *word = word.swap_bytes());
        }
        Self {
            words,
            swapped,
            layout,
            shape: shape.to_vec(),
            dtype,
        }
    }

    /// The image of checked parts.
    pub fn of(parts: &WeightParts<'_>) -> Self {
        let layout = PackedLayout::for_shape(parts.shape, parts.config).expect("checked parts");
        Self::new(parts.to_packed(&layout), layout, parts.shape, parts.dtype)
    }

    /// The words.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Where the sections are.
    pub fn layout(&self) -> &PackedLayout {
        &self.layout
    }

    /// The shape of the weight, as it is stored.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The dtype that the weight had before it was quantized.
    pub fn dtype(&self) -> FloatType {
        self.dtype
    }

    /// The parts, where they lie.
    pub fn parts(&self) -> WeightParts<'_> {
        let (layout, config) = (&self.layout, self.layout.config());
        let stored = match self.swapped.is_empty() {
            false => &self.swapped,
            true => &self.words,
        };
        let bytes =
            |start: usize, len: usize| -> &[u8] { &bytemuck::cast_slice(&stored[start..])[..len] };
        let floats = |start: usize, len: usize| -> &[f32] {
            bytemuck::cast_slice(&self.words[start..start + len])
        };
        let scales = match config.scale_type() {
            ScaleType::F32 => ScaleParts::Flat(Floats::Values(floats(
                layout.scales_start(),
                layout.blocks(),
            ))),
            ScaleType::E4m3 | ScaleType::E8m0 => ScaleParts::Coded {
                codes: bytes(layout.scales_start(), layout.blocks()),
                tensor_scale: tensor_scale(&self.words, layout),
            },
            ScaleType::Nested(block_size) => ScaleParts::Nested {
                codes: bytes(layout.scales_start(), layout.blocks()),
                absmax: Floats::Values(floats(
                    layout.nested_scales_start(),
                    block_size.blocks(layout.blocks()),
                )),
                map: floats(layout.nested_map_start(), PackedLayout::NESTED_MAP_WORDS)
                    .first_chunk()
                    .expect("as many as there are"),
                offset: f32::from_bits(self.words[layout.nested_offset_start()]),
                block_size,
            },
        };
        WeightParts {
            codes: bytes(0, config.quant_type.code_bytes(layout.elems())),
            scales,
            shape: &self.shape,
            dtype: self.dtype,
            config,
        }
    }
}

/// The words of codes, those of a byte in the order of files that have the low nibble first.
fn stored_codes(words: &[u32], layout: &PackedLayout) -> Vec<u32> {
    let mut codes = words[..layout.scales_start()].to_vec();
    swap_nibbles(&mut codes);
    codes
}

/// The scale of the tensor in an image of a format that may have one.
fn tensor_scale(words: &[u32], layout: &PackedLayout) -> TensorScale {
    let at = layout.nested_offset_start();
    TensorScale::of_words([words[at], words[at + 1]])
}

fn take_bytes(words: &[u32], len: usize) -> Vec<u8> {
    let words = &words[..len.div_ceil(4)];
    if cfg!(target_endian = "little") {
        return bytemuck::cast_slice(words)[..len].to_vec();
    }
    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
    bytes.take(len).collect()
}

fn take_floats(words: &[u32], len: usize) -> Vec<f32> {
    words[..len]
        .iter()
        .map(|&word| f32::from_bits(word))
        .collect()
}
