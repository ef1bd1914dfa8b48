//! What all dequantization kernels share: reading a scale and decoding codes.
//!
//! A packed weight is one buffer of u32 words; [`PackedLayout`] tells
//! its sections.

use cubecl::prelude::*;

use crate::format::{BlockShape, PackedLayout, ScaleType};

/// What forks a compiled dequantization kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DequantizeBlueprint {
    /// Base-2 logarithm of [how many neighbours share a scale](PackedLayout::run_log2), called a block
    /// in the kernels.
    pub block_log2: u32,
    /// What the scales are.
    pub scales: ScaleKind,
    /// Bits of a code, 4 or 8.
    pub code_bits: usize,
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

impl DequantizeBlueprint {
    /// Codes in a word.
    pub const fn codes_a_word(&self) -> usize {
        32 / self.code_bits
    }

    /// Values of the codebook.
    pub const fn levels(&self) -> usize {
        1 << self.code_bits
    }
}

/// How the scale of a block is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleKind {
    /// An f32 each.
    Flat,
    /// Codes of 8 bit, with nested scales whose blocks are so large.
    Nested {
        /// Base-2 logarithm of the nested block size.
        log2: u32,
    },
    /// Codes of 8 bit, whose values the map has.
    Coded,
    /// An f32 for each tile of a matrix.
    Tile {
        /// Base-2 logarithm of the rows of a tile.
        rows_log2: u32,
        /// Base-2 logarithm of the blocks that a row of a tile is made of.
        blocks_log2: u32,
    },
    /// An f32 for each row of a matrix.
    Row,
}

impl ScaleKind {
    /// How the scales of a packed weight are found.
    pub fn of(layout: &PackedLayout) -> Self {
        let config = layout.config();
        match (config.format().block, config.scale_type()) {
            (BlockShape::Tile(high, wide), _) => Self::Tile {
                rows_log2: high.ilog2(),
                blocks_log2: wide.ilog2() - layout.run_log2(),
            },
            (BlockShape::WholeRow, _) => Self::Row,
            (_, ScaleType::F32) => Self::Flat,
            (_, ScaleType::Nested(size)) => Self::Nested { log2: size.log2() },
            (_, ScaleType::E4m3 | ScaleType::E8m0) => Self::Coded,
        }
    }

    /// Whether scales are codes of 8 bit.
    pub const fn has_codes(&self) -> bool {
        matches!(self, Self::Nested { .. } | Self::Coded)
    }

    /// Whether a scale is that of a tile or a row of a matrix, rather than of neighbours in the flat weight.
    pub const fn goes_by_rows(&self) -> bool {
        matches!(self, Self::Tile { .. } | Self::Row)
    }

    /// Base-2 logarithm of the nested block size, if scales are nested.
    pub const fn nested_log2(&self) -> Option<u32> {
        match self {
            Self::Nested { log2 } => Some(*log2),
            _ => None,
        }
    }
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
    /// Blocks that a row of the matrix is made of, where that matters for its scales.
    pub row_blocks: usize,
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
    #[comptime] kind: ScaleKind,
) -> f32 {
    if comptime!(!kind.has_codes()) {
        f32::reinterpret(packed[view.scales + scale_index(view, block, kind)])
    } else {
        let codes = packed[view.scales + (block >> 2usize)];
        let code = (codes >> ((block as u32 & 3) * 8)) & 255;
        let map = view.codebook + comptime!(PackedLayout::NESTED_MAP);
        let value = f32::reinterpret(packed[map + code as usize]);
        nested_scale(packed, view, block, value, kind)
    }
}

/// The scale of a block, of the value that its code stands for.
#[cube]
fn nested_scale(
    packed: &[u32],
    view: &PackedView,
    block: usize,
    value: f32,
    #[comptime] kind: ScaleKind,
) -> f32 {
    if comptime!(kind.nested_log2().is_none()) {
        value
    } else {
        let nested_block = block >> comptime!(kind.nested_log2().unwrap_or(0) as usize);
        let scales = view.codebook + comptime!(PackedLayout::NESTED_SCALES);
        let absmax = f32::reinterpret(packed[scales + nested_block]);
        let at_offset = view.codebook + comptime!(PackedLayout::NESTED_OFFSET);
        let offset = f32::reinterpret(packed[at_offset]);
        opaque(value * absmax, view.zero) + offset
    }
}

/// Which f32 scale is a block's.
#[cube]
fn scale_index(view: &PackedView, block: usize, #[comptime] kind: ScaleKind) -> usize {
    #[comptime]
    match kind {
        ScaleKind::Tile {
            rows_log2,
            blocks_log2,
        } => {
            let row = block / view.row_blocks;
            let in_row = block - row * view.row_blocks;
            let wide = comptime!(blocks_log2 as usize);
            let tiles = (view.row_blocks + comptime!((1usize << blocks_log2) - 1)) >> wide;
            (row >> comptime!(rows_log2 as usize)) * tiles + (in_row >> wide)
        }
        ScaleKind::Row => block / view.row_blocks,
        _ => block,
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
    let mut table = Shared::<[f32]>::new_slice(comptime!(blueprint.levels()));
    if comptime!(blueprint.shared) {
        let mut i = UNIT_POS;
        while i < comptime!(blueprint.levels() as u32) {
            table[i as usize] = f32::reinterpret(packed[view.codebook + i as usize]);
            i += CUBE_DIM;
        }
    }
    table
}

/// Decodes `N` codes of the word that holds them, starting at element `first` of its four or eight; `N`
/// divides `first`. Eight codes of 8 bit are in two words, `next` the second.
///
/// Of 4-bit codes element `2i` is the high nibble of byte `i`. Each value is one f32 product, then one
/// cast.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn decode_vector<F: Float, N: Size>(
    packed: &[u32],
    table: &Shared<[f32]>,
    view: &PackedView,
    word: u32,
    next: u32,
    first: u32,
    scale: f32,
    #[comptime] blueprint: DequantizeBlueprint,
) -> Vector<F, N> {
    let vector = N::value().comptime();
    let mut values = Vector::<f32, N>::empty();
    let bytes = comptime!(blueprint.code_bits == 8);
    // With two elements or more the vector starts at a byte; a single one can be either nibble.
    let codes = if comptime!(vector >= blueprint.codes_a_word()) {
        word
    } else if comptime!(bytes) {
        word >> (first * 8)
    } else if comptime!(vector == 1) {
        word >> ((first * 4) ^ 4)
    } else {
        word >> (first * 4)
    };
    #[unroll]
    for i in 0..vector {
        let shift = comptime!(match (blueprint.code_bits, vector) {
            (8, _) => i as u32 % 4 * 8,
            (_, 1) => 0,
            _ => (i as u32 * 4) ^ 4,
        });
        let held = if comptime!(bytes && i >= 4) {
            next
        } else {
            codes
        };
        let code = (held >> shift) & comptime!(blueprint.levels() as u32 - 1);
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
