//! What all dequantization kernels share: reading a scale and decoding codes.
//!
//! A packed weight is one buffer of u32 words; [`PackedLayout`] tells
//! its sections.

use cubecl::prelude::*;

use crate::format::PackedLayout;

/// What forks a compiled dequantization kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DequantizeBlueprint {
    /// Base-2 logarithm of the block size.
    pub block_log2: u32,
    /// Base-2 logarithm of the nested block size; 0 where scales are plain f32.
    pub nested_log2: u32,
    /// Tables are kept in shared memory, behind a barrier. Without it every look-up reads the
    /// packed buffer: slower on a GPU, but free of barriers, which hang on CubeCL's CPU runtime.
    pub shared: bool,
    /// The first element to decode is not the first of a block.
    pub skewed: bool,
    /// The number of elements is not a multiple of the vector: the last one is stored piece by
    /// piece.
    pub ragged: bool,
    /// Vectors (tiled) or blocks (warp per block) that a unit decodes.
    pub per_unit: usize,
    /// Blocks of a tile (tiled), or lanes that work on one block (warp per block).
    pub group: usize,
}

/// Which elements to decode, and run-time positions in a packed weight, in words.
///
/// Lengths are passed rather than taken from the buffers: a slice's `len()` is that of the
/// allocation behind it, which can be larger than what the caller declared.
#[derive(CubeType, CubeLaunch)]
pub struct PackedView {
    /// First element to decode.
    pub start: usize,
    /// Number of elements to decode.
    pub len: usize,
    /// Where the scales start.
    pub scales: usize,
    /// Where the codebook starts; the nested sections follow it.
    pub codebook: usize,
    /// Always zero, but the compiler does not know: see [`opaque`].
    pub zero: u32,
}

/// Returns `value` as it is, in a way that no compiler can see through.
///
/// The format rounds `map[code] * absmax` to f32 before it adds the offset. CUDA's compiler, and
/// others, would contract the two to one FMA, which changes about 25 decoded weights in a million.
/// There is no way to switch contraction off in CubeCL, so the product passes through an integer
/// XOR with a kernel argument that the host sets to zero: what is added is then no longer known to
/// be a product. That is one integer instruction a scale, on every runtime, and visible in the
/// PTX as `mul`, `xor`, `add`.
#[cube]
pub fn opaque(value: f32, zero: u32) -> f32 {
    f32::reinterpret(u32::reinterpret(value) ^ zero)
}

/// The scale of block `block`.
#[cube]
pub fn block_scale(
    packed: &[u32],
    view: &PackedView,
    block: usize,
    #[comptime] nested_log2: u32,
) -> f32 {
    if comptime!(nested_log2 == 0) {
        f32::reinterpret(packed[view.scales + block])
    } else {
        let codes = packed[view.scales + (block >> 2usize)];
        let nested_block = block >> comptime!(nested_log2 as usize);
        let map = view.codebook + comptime!(PackedLayout::NESTED_MAP);
        let scales = view.codebook + comptime!(PackedLayout::NESTED_SCALES);
        let absmax = f32::reinterpret(packed[scales + nested_block]);
        let at_offset = view.codebook + comptime!(PackedLayout::NESTED_OFFSET);
        let offset = f32::reinterpret(packed[at_offset]);
        let code = (codes >> ((block as u32 & 3) * 8)) & 255;
        let value = f32::reinterpret(packed[map + code as usize]);
        opaque(value * absmax, view.zero) + offset
    }
}

/// Room for the codebook in shared memory, filled by the whole cube if the blueprint has it there.
/// The caller puts a barrier before the first use.
#[cube]
pub fn load_codebook(
    packed: &[u32],
    view: &PackedView,
    #[comptime] blueprint: DequantizeBlueprint,
) -> Shared<[f32]> {
    let mut table = Shared::<[f32]>::new_slice(PackedLayout::CODEBOOK_WORDS);
    if comptime!(blueprint.shared) {
        let mut i = UNIT_POS;
        while i < 16 {
            table[i as usize] = f32::reinterpret(packed[view.codebook + i as usize]);
            i += CUBE_DIM;
        }
    }
    table
}

/// Decodes `N` codes of the word that holds them, starting at element `first` of its eight; `N`
/// divides `first`.
///
/// Element `2i` is the high nibble of byte `i`. Each value is one f32 product, then one cast.
#[cube]
pub fn decode_vector<F: Float, N: Size>(
    packed: &[u32],
    table: &Shared<[f32]>,
    view: &PackedView,
    word: u32,
    first: u32,
    scale: f32,
    #[comptime] blueprint: DequantizeBlueprint,
) -> Vector<F, N> {
    let vector = N::value().comptime();
    let mut values = Vector::<f32, N>::empty();
    // With two elements or more the vector starts at a byte; a single one can be either nibble.
    let codes = if comptime!(vector == 8) {
        word
    } else if comptime!(vector == 1) {
        word >> ((first * 4) ^ 4)
    } else {
        word >> (first * 4)
    };
    #[unroll]
    for i in 0..vector {
        let shift = comptime!(if vector == 1 { 0 } else { (i as u32 * 4) ^ 4 });
        let code = (codes >> shift) & 15;
        let level = if comptime!(blueprint.shared) {
            table[code as usize]
        } else {
            f32::reinterpret(packed[view.codebook + code as usize])
        };
        values.insert(i, level * scale);
    }
    Vector::cast_from(values)
}

/// Stores a decoded vector at `element`, counted from the first one to decode.
#[cube]
pub fn store_vector<F: Float, N: Size>(
    out: &mut [Vector<F, N>],
    element: usize,
    decoded: Vector<F, N>,
    len: usize,
    #[comptime] blueprint: DequantizeBlueprint,
) {
    let vector = N::value().comptime();
    if comptime!(!blueprint.ragged) || element + vector <= len {
        out[element / vector] = decoded;
    } else {
        let scalars = out.with_vector_size_mut::<Const<1>>();
        #[unroll]
        for i in 0..vector {
            if element + i < len {
                scalars[element + i] = Vector::<F, Const<1>>::new(decoded.extract(i));
            }
        }
    }
}
