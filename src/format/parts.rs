//! The parts of a quantized weight, borrowed from wherever they lie.

use super::check::{check_finite, check_len, checked_elems};
use super::description::{NibbleOrder, TensorScale};
use super::packed::PackedLayout;
use super::spec::{BlockSize, FloatType, QuantConfig};
use crate::error::Nf4Error;

/// The parts of a weight, in an [`BlockTensor`](super::BlockTensor) or in a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WeightParts<'a> {
    /// One code a byte, or two in the order of the format's files.
    pub codes: &'a [u8],
    pub scales: ScaleParts<'a>,
    pub shape: &'a [usize],
    pub dtype: FloatType,
    /// Agrees with `scales` in what they are.
    pub config: QuantConfig,
}

/// The scale of each block.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ScaleParts<'a> {
    Flat(Floats<'a>),
    Nested {
        codes: &'a [u8],
        absmax: Floats<'a>,
        map: &'a [f32; 256],
        offset: f32,
        block_size: BlockSize,
    },
    /// 8-bit floats.
    Coded {
        codes: &'a [u8],
        tensor_scale: TensorScale,
    },
}

/// f32 values.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Floats<'a> {
    Values(&'a [f32]),
    /// Little-endian, at any alignment, as in a file.
    Stored(&'a [u8]),
}

impl<'a> Floats<'a> {
    pub fn len(&self) -> usize {
        match self {
            Self::Values(values) => values.len(),
            Self::Stored(bytes) => bytes.len() / 4,
        }
    }

    /// The values on the heap.
    pub fn to_vec(self) -> Vec<f32> {
        self.iter().collect()
    }

    /// The values.
    pub fn iter(self) -> impl Iterator<Item = f32> + 'a {
        let (values, stored) = match self {
            Self::Values(values) => (values, &[][..]),
            Self::Stored(bytes) => (&[][..], bytes),
        };
        values.iter().copied().chain(stored_floats(stored))
    }
}

/// The values of little-endian bytes.
pub(crate) fn stored_floats(bytes: &[u8]) -> impl ExactSizeIterator<Item = f32> {
    let (quads, _) = bytes.as_chunks::<4>();
    quads.iter().map(|&quad| f32::from_le_bytes(quad))
}

impl WeightParts<'_> {
    /// Checks the lengths against each other, and what a decode multiplies everything with.
    ///
    /// # Errors
    /// Those of [`BlockTensor::from_parts`](super::BlockTensor::from_parts).
    pub fn check(&self) -> Result<(), Nf4Error> {
        let elems = checked_elems("weight", self.shape)?;
        let code_bytes = self.config.quant_type.code_bytes(elems);
        check_len("weight", code_bytes, self.codes.len())?;
        let blocks = PackedLayout::for_shape(self.shape, self.config)?.blocks();
        match &self.scales {
            ScaleParts::Flat(scales) => check_len("absmax", blocks, scales.len()),
            ScaleParts::Nested {
                codes,
                absmax,
                map,
                offset,
                block_size,
            } => {
                check_len("absmax", blocks, codes.len())?;
                check_len("nested_absmax", block_size.blocks(blocks), absmax.len())?;
                check_finite("nested_offset", [*offset])?;
                check_finite("nested_quant_map", map.iter().copied())
            }
            ScaleParts::Coded {
                codes,
                tensor_scale,
            } => {
                check_len("scales", blocks, codes.len())?;
                tensor_scale.check(self.config)
            }
        }
    }

    /// The device image of checked parts, in the one allocation that it needs. `layout` is theirs.
    pub fn to_packed(self, layout: &PackedLayout) -> Vec<u32> {
        let mut words = vec![0u32; layout.words()];
        put_bytes(&mut words, self.codes);
        if self.config.quant_type.nibbles() == Some(NibbleOrder::LowFirst) {
            swap_nibbles(&mut words[..layout.scales_start()]);
        }
        match &self.scales {
            ScaleParts::Flat(scales) => put_floats(&mut words[layout.scales_start()..], *scales),
            ScaleParts::Nested {
                codes,
                absmax,
                map,
                offset,
                ..
            } => {
                put_bytes(&mut words[layout.scales_start()..], codes);
                put_floats(
                    &mut words[layout.nested_map_start()..],
                    Floats::Values(map.as_slice()),
                );
                put_floats(
                    &mut words[layout.nested_offset_start()..],
                    Floats::Values(&[*offset]),
                );
                put_floats(&mut words[layout.nested_scales_start()..], *absmax);
            }
            ScaleParts::Coded {
                codes,
                tensor_scale,
            } => {
                put_bytes(&mut words[layout.scales_start()..], codes);
                let table = self.config.scale_type().table(*tensor_scale);
                let table = table.expect("scales are 8-bit floats");
                put_floats(
                    &mut words[layout.nested_map_start()..],
                    Floats::Values(table.as_slice()),
                );
                words[layout.nested_offset_start()..][..2].copy_from_slice(&tensor_scale.words());
            }
        }
        let codebook = self.config.quant_type.codebook();
        put_floats(
            &mut words[layout.codebook_start()..],
            Floats::Values(codebook),
        );
        words[layout.header_start()..].copy_from_slice(&layout.header(self.shape, self.dtype));
        words
    }
}

/// Exchanges the two codes of each byte.
pub(super) fn swap_nibbles(words: &mut [u32]) {
    for word in words {
        *word = (*word >> 4) & 0x0f0f_0f0f | (*word & 0x0f0f_0f0f) << 4;
    }
}

/// Writes bytes into words, little-endian. There is room for them.
fn put_bytes(words: &mut [u32], bytes: &[u8]) {
    let used = bytes.len().div_ceil(4);
    bytemuck::cast_slice_mut::<u32, u8>(words)[..bytes.len()].copy_from_slice(bytes);
    if cfg!(target_endian = "big") {
        words[..used].iter_mut().for_each(|w| *w = w.swap_bytes());
    }
}

fn put_floats(words: &mut [u32], values: Floats<'_>) {
    match values {
        Floats::Values(values) => {
            for (word, value) in words.iter_mut().zip(values) {
                *word = value.to_bits();
            }
        }
        Floats::Stored(bytes) => put_bytes(words, bytes),
    }
}
