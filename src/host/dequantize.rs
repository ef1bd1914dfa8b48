//! Decoding a packed weight.
//!
//! A weight has one of sixteen values times its block's scale, so each block starts with a table
//! of its sixteen decoded values, rounded to the output's type; the weights are then mere
//! look-ups, which vector registers do 8 to 64 at a time. That is exact by construction: the
//! table is computed with the reference's own two roundings.

use super::{Simd, TASK_ALIGN_ELEMS};
use crate::format::{E2M1_CODEBOOK, FloatElement, PackedLayout, ScaleType};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bytes;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(super) use avx512::round as round_512;
pub(super) use portable::round;

/// Decoding this many elements takes two or three times as long as handing work to another thread
/// (10 to 20 us); fewer are not divided.
pub(super) const fn task_elems(simd: Simd) -> usize {
    match simd {
        Simd::Portable => 1 << 16,
        Simd::Avx2 | Simd::Avx512 | Simd::Avx512Bf16 => 1 << 19,
    }
}

/// From this size on the output is written past the caches.
///
/// An ordinary store first reads the line that it overwrites; a smaller output may never leave the
/// cache. Measured with an L3 cache of 32 MiB: streaming loses at 16 MiB, wins or draws at 32 and
/// wins above.
const STREAM_BYTES: usize = 32 << 20;

/// Decodes the `out.len()` weights from flat index `start` on, row-major.
///
/// `words` is the device image of a weight, as
/// [`BlockTensor::to_packed`](crate::format::BlockTensor::to_packed) and [`quantize`](super::quantize())
/// make it. The result is that of
/// [`BlockTensor::dequantize_range`](crate::format::BlockTensor::dequantize_range) to the bit.
///
/// # Shapes
/// - `words`: `layout.words()`; the header is not looked at
///
/// # Panics
/// If `words` is shorter than `layout` asks for or if the range leaves the weight.
pub fn dequantize<T: FloatElement>(
    words: &[u32],
    layout: &PackedLayout,
    start: usize,
    out: &mut [T],
) {
    let stream = size_of_val(out) >= STREAM_BYTES;
    dequantize_with(Simd::detect(), stream, words, layout, start, out);
}

/// [`dequantize`] with given vector instructions, and written past the caches if `stream` and if
/// they can; the portable code cannot.
///
/// # Panics
/// As [`dequantize`], and if the processor does not have `simd`.
#[doc(hidden)]
pub fn dequantize_with<T: FloatElement>(
    simd: Simd,
    stream: bool,
    words: &[u32],
    layout: &PackedLayout,
    start: usize,
    out: &mut [T],
) {
    simd.assert_available();
    assert_words(words, layout);
    let left = layout.elems().checked_sub(start);
    assert!(
        left.is_some_and(|left| out.len() <= left),
        "range of {} from {start} on, of {} weights",
        out.len(),
        layout.elems()
    );
    let task = Task {
        source: Source::new(words, layout),
        simd,
        stream,
    };
    task.divide(start, out);
}

/// # Panics
/// If `words` is shorter than `layout` asks for.
pub(super) fn assert_words(words: &[u32], layout: &PackedLayout) {
    assert!(
        words.len() >= layout.words(),
        "packed weight of {} words, expected {}",
        words.len(),
        layout.words()
    );
}

/// How to decode any range of one weight.
pub(super) struct Task<'a> {
    pub(super) source: Source<'a>,
    /// Checked to be available.
    pub(super) simd: Simd,
    /// Whether to write past the caches.
    pub(super) stream: bool,
}

impl Task<'_> {
    /// Halves the range until it is small, between rayon's threads.
    fn divide<T: FloatElement>(&self, start: usize, out: &mut [T]) {
        if out.len() <= task_elems(self.simd) {
            return self.decode::<T, T>(start, out);
        }
        let middle = (start + out.len() / 2).next_multiple_of(TASK_ALIGN_ELEMS);
        let (left, right) = out.split_at_mut(middle - start);
        rayon::join(|| self.divide(start, left), || self.divide(middle, right));
    }

    /// Decodes a range on this thread: values rounded to `R`, as `T`.
    ///
    /// `T` is `R` or f32.
    pub(super) fn decode<T: FloatElement, R: FloatElement>(&self, start: usize, out: &mut [T]) {
        let source = &self.source;
        if source.has_bytes {
            return bytes::decode::<T, R>(source, start, out);
        }
        // The first word can be wanted in part; everything else works on whole words.
        let head = out.len().min(start.next_multiple_of(8) - start);
        let (first, rest) = out.split_at_mut(head);
        if !first.is_empty() {
            let scale = source.scale(start >> source.run_log2);
            let table = portable::table::<T, R>(source.codebook, scale);
            portable::look_up(&table, source.codes[start / 8], start % 8, first);
        }
        let start = start + head;
        // Streaming stores write 16 bytes at a multiple of 16, and what they write is not written again.
        let stream =
            self.stream && !source.has_half_groups() && rest.as_ptr().addr().is_multiple_of(16);
        // SAFETY: portable code needs no features; for the others `dequantize_with` checked that
        // the processor has them, and the alignment is checked above.
        unsafe {
            match (self.simd, stream) {
                (Simd::Portable, _) => decode::<T, R, portable::Portable>(source, start, rest),
                #[cfg(target_arch = "x86_64")]
                (Simd::Avx2, true) => avx2::decode::<T, R, true>(source, start, rest),
                #[cfg(target_arch = "x86_64")]
                (Simd::Avx2, false) => avx2::decode::<T, R, false>(source, start, rest),
                #[cfg(target_arch = "x86_64")]
                (Simd::Avx512 | Simd::Avx512Bf16, true) => {
                    avx512::decode::<T, R, true>(source, start, rest)
                }
                #[cfg(target_arch = "x86_64")]
                (Simd::Avx512 | Simd::Avx512Bf16, false) => {
                    avx512::decode::<T, R, false>(source, start, rest)
                }
                #[cfg(not(target_arch = "x86_64"))]
                (Simd::Avx2 | Simd::Avx512 | Simd::Avx512Bf16, _) => {
                    unreachable!("checked by dequantize_with")
                }
            }
        }
    }
}

/// The sections of a packed weight.
pub(super) struct Source<'a> {
    pub(super) codes: &'a [u32],
    pub(super) scales: Scales<'a>,
    /// The levels of 4-bit codes.
    pub(super) codebook: &'static [f32; 16],
    /// A code is a byte, of E4M3.
    pub(super) has_bytes: bool,
    /// Base-2 logarithm of [how many neighbours share a scale](PackedLayout::run_log2).
    pub(super) run_log2: u32,
    layout: PackedLayout,
}

pub(super) enum Scales<'a> {
    Flat(&'a [u32]),
    Nested {
        codes: &'a [u32],
        map: &'a [u32; 256],
        absmax: &'a [u32],
        offset: f32,
        block_size_log2: u32,
    },
    Coded {
        codes: &'a [u32],
        map: &'a [u32; 256],
    },
    /// One f32 for a tile or a row, not for each run.
    Shared(&'a [u32]),
}

impl<'a> Source<'a> {
    pub(super) fn new(words: &'a [u32], layout: &PackedLayout) -> Self {
        let config = layout.config();
        let has_bytes = config.quant_type.bits() == 8;
        let codes = &words[layout.scales_start()..layout.codebook_start()];
        let map = || {
            let map = words[layout.nested_map_start()..].first_chunk();
            map.expect("a layout has 256 words there")
        };
        let scales = match config.scale_type() {
            ScaleType::F32 if has_bytes => Scales::Shared(codes),
            ScaleType::F32 => Scales::Flat(codes),
            ScaleType::E4m3 | ScaleType::E8m0 => Scales::Coded { codes, map: map() },
            ScaleType::Nested(block_size) => Scales::Nested {
                codes,
                map: map(),
                absmax: &words[layout.nested_scales_start()..layout.header_start()],
                offset: f32::from_bits(words[layout.nested_offset_start()]),
                block_size_log2: block_size.log2(),
            },
        };
        let codebook = config.quant_type.codebook().try_into();
        Self {
            codes: &words[..layout.scales_start()],
            scales,
            codebook: codebook.unwrap_or(&E2M1_CODEBOOK),
            has_bytes,
            run_log2: layout.run_log2(),
            layout: *layout,
        }
    }

    /// Whether blocks are half as long as what is looked up at a time.
    fn has_half_groups(&self) -> bool {
        1 << self.run_log2 < GROUP
    }

    /// The scale of run `block`.
    #[inline(always)]
    fn scale(&self, block: usize) -> f32 {
        match self.scales {
            Scales::Flat(scales) => f32::from_bits(scales[block]),
            Scales::Shared(scales) => f32::from_bits(scales[self.layout.scale_of_run(block)]),
            Scales::Coded { codes, map } => {
                let code = (codes[block / 4] >> (block % 4 * 8)) as u8;
                f32::from_bits(map[code as usize])
            }
            Scales::Nested {
                codes,
                map,
                absmax,
                offset,
                block_size_log2,
            } => {
                let code = (codes[block / 4] >> (block % 4 * 8)) as u8;
                let absmax = f32::from_bits(absmax[block >> block_size_log2]);
                f32::from_bits(map[code as usize]) * absmax + offset
            }
        }
    }

    /// The scales of up to [`BATCH`] blocks from `first` on, and whether all are finite.
    #[inline(always)]
    pub(super) fn scales(&self, first: usize, blocks: usize) -> ([f32; BATCH], bool) {
        let mut scales = [0.0; BATCH];
        match self.scales {
            Scales::Flat(words) => {
                for (scale, &word) in scales.iter_mut().zip(&words[first..first + blocks]) {
                    *scale = f32::from_bits(word);
                }
            }
            Scales::Nested {
                codes,
                map,
                absmax,
                offset,
                block_size_log2,
            } if first.is_multiple_of(4) => {
                // A word has the codes of four blocks, all of one nested block; the padding of the
                // last one is decoded too.
                let words = &codes[first / 4..(first + blocks).div_ceil(4)];
                for ((i, word), four) in words.iter().enumerate().zip(scales.as_chunks_mut().0) {
                    let absmax = f32::from_bits(absmax[(first / 4 + i) >> (block_size_log2 - 2)]);
                    *four = word
                        .to_le_bytes()
                        .map(|code| f32::from_bits(map[code as usize]))
                        .map(|value| value * absmax + offset);
                }
            }
            Scales::Coded { codes, map } if first.is_multiple_of(4) => {
                let words = &codes[first / 4..(first + blocks).div_ceil(4)];
                for (word, four) in words.iter().zip(scales.as_chunks_mut().0) {
                    let codes = word.to_le_bytes();
                    *four = codes.map(|code| f32::from_bits(map[code as usize]));
                }
            }
            Scales::Nested { .. } | Scales::Coded { .. } | Scales::Shared(_) => {
                for (i, scale) in scales[..blocks].iter_mut().enumerate() {
                    *scale = self.scale(first + i);
                }
            }
        }
        let finite = |all, scale: &f32| all & scale.is_finite();
        (scales, scales.iter().fold(true, finite))
    }
}

/// Elements looked up at a time: the codes are four words.
const GROUP: usize = 32;

/// Blocks whose scales are decoded together.
pub(super) const BATCH: usize = 64;

/// The inner part of decoding, in terms of one set of vector instructions.
///
/// The methods are to be inlined into a function that has the set's target features.
trait Vector {
    /// The decoded value of each code in a block.
    type Table<T: FloatElement>: Copy;

    /// The table of a block with a finite scale, of values rounded to `R`.
    ///
    /// `T` is `R` or f32.
    ///
    /// # Safety
    /// The processor must have the instructions.
    unsafe fn table<T: FloatElement, R: FloatElement>(
        codebook: &[f32; 16],
        scale: f32,
    ) -> Self::Table<T>;

    /// Decodes one group.
    ///
    /// # Safety
    /// The processor must have the instructions; if the implementation streams, `out` must be
    /// aligned as it asks for.
    unsafe fn look_up<T: FloatElement>(
        table: Self::Table<T>,
        codes: &[u32; 4],
        out: &mut [T; GROUP],
    );
}

/// Decodes a range whose start is a multiple of 8.
///
/// # Safety
/// What `V`'s methods ask for. All groups start at a multiple of 8 elements from `out` on.
#[inline(always)]
unsafe fn decode<T: FloatElement, R: FloatElement, V: Vector>(
    source: &Source,
    mut start: usize,
    out: &mut [T],
) {
    debug_assert!(out.is_empty() || start.is_multiple_of(8));
    let block_elems = 1usize << source.run_log2;
    let head = out.len().min(start.next_multiple_of(block_elems) - start);
    let (first, mut rest) = out.split_at_mut(head);
    if !first.is_empty() {
        // SAFETY: as the caller vouches.
        unsafe { decode_part::<T, R, V>(source, start, first) };
        start += head;
    }
    while rest.len() >= block_elems {
        let first_block = start >> source.run_log2;
        let blocks = (BATCH - first_block % BATCH).min(rest.len() >> source.run_log2);
        let (part, later) = rest.split_at_mut(blocks << source.run_log2);
        let codes = &source.codes[start / 8..][..part.len() / 8];
        let (scales, finite) = source.scales(first_block, blocks);
        let scales = &scales[..blocks];
        // SAFETY: as the caller vouches.
        unsafe {
            match (finite, block_elems) {
                (true, 16) => decode_half_groups::<T, R, V>(source, scales, codes, part),
                (false, 16) => {
                    decode_half_groups::<T, R, portable::Portable>(source, scales, codes, part)
                }
                // Products may be NaN, which a table in registers is not made for.
                (false, _) => {
                    decode_blocks::<T, R, portable::Portable, 1>(source, scales, codes, part)
                }
                (true, 32) => decode_blocks::<T, R, V, 1>(source, scales, codes, part),
                (true, _) => decode_blocks::<T, R, V, 2>(source, scales, codes, part),
            }
        }
        start += part.len();
        rest = later;
    }
    if !rest.is_empty() {
        // SAFETY: as the caller vouches.
        unsafe { decode_part::<T, R, V>(source, start, rest) };
    }
}

/// Decodes whole blocks of at least `GROUPS` groups.
///
/// # Safety
/// As [`decode`], and the scales must be such as `V::table` can take.
#[inline(always)]
unsafe fn decode_blocks<T: FloatElement, R: FloatElement, V: Vector, const GROUPS: usize>(
    source: &Source,
    scales: &[f32],
    codes: &[u32],
    out: &mut [T],
) {
    let groups_per_block = (1usize << source.run_log2) / GROUP / GROUPS;
    let codes = codes.as_chunks().0.as_chunks::<GROUPS>().0;
    let out = out.as_chunks_mut().0.as_chunks_mut::<GROUPS>().0;
    for ((&scale, codes), out) in scales
        .iter()
        .zip(codes.chunks_exact(groups_per_block))
        .zip(out.chunks_exact_mut(groups_per_block))
    {
        // SAFETY: as the caller vouches.
        let table = unsafe { V::table::<T, R>(source.codebook, scale) };
        for (codes, out) in codes.iter().zip(out) {
            for (codes, out) in codes.iter().zip(out) {
                // SAFETY: as the caller vouches.
                unsafe { V::look_up(table, codes, out) };
            }
        }
    }
}

/// Decodes whole blocks of half a group: each group by the tables of both its blocks. The last block
/// may be alone.
///
/// # Safety
/// As [`decode_blocks`].
#[inline(always)]
unsafe fn decode_half_groups<T: FloatElement, R: FloatElement, V: Vector>(
    source: &Source,
    scales: &[f32],
    codes: &[u32],
    out: &mut [T],
) {
    const HALF: usize = GROUP / 2;
    let (groups, last) = out.as_chunks_mut::<GROUP>();
    let (group_codes, last_codes) = codes.as_chunks();
    let (pairs, last_scale) = scales.as_chunks::<2>();
    let mut second = [T::from_f32(0.0); GROUP];
    for ((scales, codes), out) in pairs.iter().zip(group_codes).zip(groups) {
        // SAFETY: as the caller vouches.
        unsafe {
            V::look_up(
                V::table::<T, R>(source.codebook, scales[1]),
                codes,
                &mut second,
            );
            V::look_up(V::table::<T, R>(source.codebook, scales[0]), codes, out);
        }
        out[HALF..].copy_from_slice(&second[HALF..]);
    }
    if let [scale] = last_scale {
        let table = portable::table::<T, R>(source.codebook, *scale);
        for (&word, out) in last_codes.iter().zip(last.chunks_mut(8)) {
            portable::look_up(&table, word, 0, out);
        }
    }
}

/// Decodes a part of one block, from a multiple of 8 on.
///
/// # Safety
/// As [`decode`].
#[inline(always)]
unsafe fn decode_part<T: FloatElement, R: FloatElement, V: Vector>(
    source: &Source,
    start: usize,
    out: &mut [T],
) {
    let scale = source.scale(start >> source.run_log2);
    let mut codes = &source.codes[start / 8..];
    let mut rest = out;
    if scale.is_finite() {
        // SAFETY: as the caller vouches.
        let table = unsafe { V::table::<T, R>(source.codebook, scale) };
        let (groups, after) = rest.as_chunks_mut();
        let (group_codes, _) = codes.as_chunks();
        codes = &codes[4 * groups.len()..];
        for (codes, out) in group_codes.iter().zip(groups) {
            // SAFETY: as the caller vouches.
            unsafe { V::look_up(table, codes, out) };
        }
        rest = after;
    }
    if !rest.is_empty() {
        let table = portable::table::<T, R>(source.codebook, scale);
        for (&word, out) in codes.iter().zip(rest.chunks_mut(8)) {
            portable::look_up(&table, word, 0, out);
        }
    }
}
