//! A quantized tensor as a device image, and back.

use super::check::check_len;
use super::packed::PackedLayout;
use super::spec::{FloatType, QuantConfig};
use super::tensor::{Absmax, NestedAbsmax, Nf4Tensor};
use crate::error::Nf4Error;

impl Nf4Tensor {
    /// The layout of this tensor's device image.
    pub fn packed_layout(&self) -> PackedLayout {
        PackedLayout::new(self.elems(), self.config())
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
        let codes = take_bytes(words, elems.div_ceil(2));
        let scales = &words[layout.scales_start()..];
        let absmax = match config.nested_block_size {
            None => Absmax::Flat(take_floats(scales, layout.blocks())),
            Some(block_size) => {
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
