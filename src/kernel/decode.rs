//! What all dequantization kernels share: reading a scale and decoding a word of eight codes.
//!
//! A packed weight is one buffer of u32 words; [`PackedLayout`](crate::format::PackedLayout) tells
//! its sections.

use cubecl::prelude::*;

/// What forks a compiled dequantization kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DequantizeBlueprint {
    /// Base-2 logarithm of the block size.
    pub block_log2: u32,
    /// Base-2 logarithm of the nested block size; 0 where scales are plain f32.
    pub nested_log2: u32,
    /// The codebook is copied to shared memory, behind a barrier. Without it every look-up reads
    /// the packed buffer: slower on a GPU, but free of barriers, which hang on CubeCL's CPU
    /// runtime.
    pub shared_codebook: bool,
    /// The first element is not the first of a word.
    pub skewed: bool,
    /// Words (tiled) or blocks (warp per block) that a unit decodes.
    pub per_unit: usize,
    /// Lanes that work on one block (warp per block).
    pub lanes_per_block: usize,
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
        let code = (codes >> ((block as u32 & 3) * 8)) & 255;
        let map = view.codebook + 16usize;
        let value = f32::reinterpret(packed[map + code as usize]);
        let offset = f32::reinterpret(packed[map + 256usize]);
        let nested_block = block >> comptime!(nested_log2 as usize);
        let absmax = f32::reinterpret(packed[map + 260usize + nested_block]);
        opaque(value * absmax, view.zero) + offset
    }
}

/// Copies the codebook to shared memory, for the whole cube, or hands out an unused slice where
/// the blueprint has none.
#[cube]
pub fn load_codebook(
    packed: &[u32],
    view: &PackedView,
    #[comptime] blueprint: DequantizeBlueprint,
) -> Shared<[f32]> {
    let mut table = Shared::<[f32]>::new_slice(16usize);
    if comptime!(blueprint.shared_codebook) {
        let mut i = UNIT_POS;
        while i < 16 {
            table[i as usize] = f32::reinterpret(packed[view.codebook + i as usize]);
            i += CUBE_DIM;
        }
        sync_cube();
    }
    table
}

/// The level of a code.
#[cube]
pub fn level(
    packed: &[u32],
    table: &Shared<[f32]>,
    view: &PackedView,
    code: u32,
    #[comptime] blueprint: DequantizeBlueprint,
) -> f32 {
    if comptime!(blueprint.shared_codebook) {
        table[code as usize]
    } else {
        f32::reinterpret(packed[view.codebook + code as usize])
    }
}

/// Decodes `N` codes of a word, starting at element `first` of its eight.
///
/// Element `2i` is the high nibble of byte `i`. Each value is one f32 product, then one cast.
#[cube]
pub fn decode_vector<F: Float, N: Size>(
    packed: &[u32],
    table: &Shared<[f32]>,
    view: &PackedView,
    word: u32,
    scale: f32,
    #[comptime] first: usize,
    #[comptime] blueprint: DequantizeBlueprint,
) -> Vector<F, N> {
    let mut values = Vector::<f32, N>::empty();
    #[unroll]
    for i in 0..values.vector_size() {
        let shift = comptime!(((first + i) / 2 * 8 + (1 - (first + i) % 2) * 4) as u32);
        let code = (word >> shift) & 15;
        values.insert(i, level(packed, table, view, code, blueprint) * scale);
    }
    Vector::cast_from(values)
}
