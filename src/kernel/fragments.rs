//! What the units of [`tensor_core`](super::tensor_core), and in part of
//! [`levels`](super::levels), load of the weight, and the fragments that they make of it.

use cubecl::prelude::*;
use half::f16;

use super::decode::PackedView;

/// Bytes of a table of pairs of levels: 256 pairs, in f32 sixteen copies, in f16 32 of them.
pub const TABLE_BYTES: usize = 256 * 16 * 8;

/// A table from a byte to the levels of its two codes, as [`fill_table`] or [`fill_levels`] fills it.
pub type CodeTable = Shared<[Vector<u8, Const<1>>]>;

/// The level of the code that a lane stands for.
#[cube]
pub fn load_level(words: &[u32], view: &PackedView) -> f32 {
    f32::reinterpret(words[view.codebook + (UNIT_POS_X & 15) as usize])
}

/// The levels of the two codes in a byte, high nibble first, from those of a plane's lanes.
#[cube]
fn levels_of(level: f32, byte: u32) -> Vector<f32, Const<2>> {
    let mut pair = Vector::<f32, Const<2>>::empty();
    pair.insert(0usize, plane_shuffle(level, byte >> 4));
    pair.insert(1usize, plane_shuffle(level, byte & 15));
    pair
}

/// Fills the table from the levels of a plane's lanes, in f32: entry `16 * byte + copy`, in a pair of
/// memory banks that no other copy is in, so that sixteen lanes, each with a copy of its own, never
/// wait for each other. The caller puts a barrier behind it.
#[cube]
#[allow(clippy::needless_borrow)] // Without it CubeCL takes no slice.
pub fn fill_table(level: f32, table: &mut CodeTable, #[comptime] units: usize) {
    // Whole planes go round together, as the shuffles want it.
    let mut i = UNIT_POS;
    while i < comptime!(TABLE_BYTES as u32 / 8) {
        let pair = levels_of(level, i >> 4);
        let at = i as usize * 8;
        let entry = (&mut table[at..at + 8]).with_vector_size_mut::<Const<8>>();
        entry[0] = Vector::<u8, Const<8>>::reinterpret(pair);
        i += comptime!(units as u32);
    }
}

/// Where a lane's rows of `W` are: of each tile row `lane / 4` and the one eight below.
#[derive(CubeType)]
pub struct Rows {
    /// Starts of the rows, at the lane's first code of a chunk, in vectors.
    at: Array<usize>,
    /// Where the plane ends along `k`, less what the lane is ahead of its chunk.
    end: usize,
}

#[cube]
impl Rows {
    /// Those of a plane whose first row is `plane_row` and which ends at `bound` along `k`.
    pub fn new(
        plane_row: usize,
        bound: usize,
        n: usize,
        k: usize,
        #[comptime] row_tiles: usize,
        #[comptime] code_bits: usize,
    ) -> Self {
        let lane = UNIT_POS_X as usize;
        let mut at = Array::<usize>::new(comptime!(2 * row_tiles));
        #[unroll]
        for r in 0..comptime!(2 * row_tiles) {
            let row = usize::min(plane_row + (lane >> 2usize) + comptime!(r * 8), n - 1);
            at[r] = row * (k / comptime!(128 / code_bits))
                + (lane & 3) * comptime!(lane_vectors(code_bits));
        }
        Rows {
            at,
            end: usize::saturating_sub(bound, (lane & 3) * 32),
        }
    }

    /// Loads the lane's codes of the chunk at `at` into slot `d`, 32 of each row; past the end of
    /// the plane, where `x` is zero, the slot stays as it is or is cleared.
    #[allow(clippy::too_many_arguments)]
    pub fn load(
        &self,
        packed: &[Vector<u32, Const<4>>],
        codes: &mut Array<Vector<u32, Const<4>>>,
        at: usize,
        #[comptime] d: usize,
        #[comptime] clear: bool,
        #[comptime] row_tiles: usize,
        #[comptime] code_bits: usize,
    ) {
        let inside = at < self.end;
        let vectors = comptime!(lane_vectors(code_bits));
        #[unroll]
        for r in 0..comptime!(2 * row_tiles) {
            #[unroll]
            for v in 0..vectors {
                let slot = comptime!((d * 2 * row_tiles + r) * vectors + v);
                if comptime!(clear) {
                    codes[slot] = Vector::new(0u32);
                }
                if inside {
                    codes[slot] = packed[self.at[r] + at / comptime!(128 / code_bits) + v];
                }
            }
        }
    }
}

/// Vectors that a lane's 32 codes of a row take.
pub const fn lane_vectors(code_bits: usize) -> usize {
    code_bits / 4
}

/// What [`fp8_pair`] gives is the value of the code divided by this.
pub const FP8_FACTOR: f32 = 256.0;

/// The values of two E4M3 codes of a word, the first and the third or the second and the last, over
/// [`FP8_FACTOR`], which is exact: the bits of the code are those of an f16 whose exponent has another bias. NaN
/// becomes a number, see [`find_nan`].
#[cube]
pub fn fp8_pair(word: u32, #[comptime] second: bool) -> Vector<f16, Const<2>> {
    let mut codes = word & 0xff00_ff00u32;
    if comptime!(!second) {
        codes = (word << 8) & 0xff00_ff00u32;
    }
    Vector::<f16, Const<2>>::reinterpret((codes & 0x8000_8000u32) | ((codes >> 1) & 0x3f80_3f80u32))
}

/// Has the highest bit of a byte of the result where that byte of a word is NaN as E4M3.
#[cube]
pub fn find_nan(word: u32) -> u32 {
    (word & 0x7f7f_7f7fu32) + 0x0101_0101u32
}

/// NaN if any of the words that [`find_nan`] was asked for, or'd together, had one; else zero.
#[cube]
pub fn nan_or_zero(found: u32) -> f32 {
    select(
        found & 0x8080_8080u32 != 0,
        f32::reinterpret(0x7fc0_0000u32),
        0.0f32,
    )
}

/// What a lane contributes of `W`, in E4M3, to one product of 16 by 8 by 16: a word of its upper row and one of
/// the row eight below, in the order of [`fp8_pair`]. Scales are multiplied by [`FP8_FACTOR`].
#[cube]
pub fn fp8_fragment<F: Float>(
    upper: u32,
    lower: u32,
    upper_scale: f32,
    lower_scale: f32,
) -> Array<Vector<F, Const<2>>> {
    let mut registers = Array::<Vector<F, Const<2>>>::new(4usize);
    #[unroll]
    for second in 0..2usize {
        let pair = Vector::<f32, Const<2>>::cast_from(fp8_pair(upper, comptime!(second == 1)));
        registers[comptime!(2 * second)] = Vector::cast_from(pair * Vector::new(upper_scale));
        let pair = Vector::<f32, Const<2>>::cast_from(fp8_pair(lower, comptime!(second == 1)));
        registers[comptime!(2 * second + 1)] = Vector::cast_from(pair * Vector::new(lower_scale));
    }
    registers
}

/// Puts elements of `x`, two of 16 bits a word, in the order of [`fp8_pair`]: of four the first and the third,
/// then the others.
#[cube]
pub fn in_fp8_order(eight: Vector<u32, Const<4>>) -> Vector<u32, Const<4>> {
    let mut ordered = eight;
    #[unroll]
    for four in 0..2usize {
        let first = eight.extract(comptime!(2 * four));
        let second = eight.extract(comptime!(2 * four + 1));
        ordered.insert(comptime!(2 * four), (first & 0xffffu32) | (second << 16));
        ordered.insert(
            comptime!(2 * four + 1),
            (first >> 16) | (second & 0xffff_0000u32),
        );
    }
    ordered
}

/// [`fill_table`] in f16: entry `32 * byte + copy`, a copy a lane and each in a bank of its own.
#[cube]
#[allow(clippy::needless_borrow)] // Without it CubeCL takes no slice.
pub fn fill_levels(level: f32, table: &mut CodeTable, #[comptime] units: usize) {
    // Four copies at a time; whole planes go round together, as the shuffles want it.
    let mut i = UNIT_POS;
    while i < comptime!(TABLE_BYTES as u32 / 16) {
        let pair = levels_of(level, i >> 3);
        let pair = u32::reinterpret(Vector::<f16, Const<2>>::cast_from(pair));
        let at = i as usize * 16;
        let entry = (&mut table[at..at + 16]).with_vector_size_mut::<Const<16>>();
        entry[0] = Vector::<u8, Const<16>>::reinterpret(Vector::<u32, Const<4>>::new(pair));
        i += comptime!(units as u32);
    }
}

/// Where a table has the entries of a byte of a word.
#[cube]
fn place(word: u32, #[comptime] byte: u32) -> u32 {
    if comptime!(byte == 0) {
        (word << 7) & 0x7f80
    } else {
        (word >> comptime!(byte * 8 - 7)) & 0x7f80
    }
}

/// The levels of the two codes in a byte of a word, high nibble first, from a table in f16.
#[cube]
#[allow(clippy::needless_borrow)] // Without it CubeCL takes no slice.
pub fn level_pair(
    table: &CodeTable,
    copy: u32,
    word: u32,
    #[comptime] byte: u32,
) -> Vector<f16, Const<2>> {
    let at = (place(word, byte) | copy) as usize;
    let entry = (&table[at..at + 4]).with_vector_size::<Const<4>>();
    Vector::<f16, Const<2>>::reinterpret(entry[0])
}

/// What a lane contributes of `W` to one product of 16 by 8 by 16: two bytes, from `byte`, of the
/// word of its upper row and of the word eight rows below.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn fragment<F: Float>(
    table: &CodeTable,
    copy: u32,
    upper: u32,
    lower: u32,
    upper_scale: f32,
    lower_scale: f32,
    #[comptime] byte: u32,
) -> Array<Vector<F, Const<2>>> {
    let mut registers = Array::<Vector<F, Const<2>>>::new(4usize);
    registers[0] = decode_pair::<F>(table, copy, upper, upper_scale, byte);
    registers[1] = decode_pair::<F>(table, copy, lower, lower_scale, byte);
    registers[2] = decode_pair::<F>(table, copy, upper, upper_scale, comptime!(byte + 1));
    registers[3] = decode_pair::<F>(table, copy, lower, lower_scale, comptime!(byte + 1));
    registers
}

/// The two elements in a byte of a word, high nibble first.
#[cube]
#[allow(clippy::needless_borrow)] // Without it CubeCL takes no slice.
fn decode_pair<F: Float>(
    table: &CodeTable,
    copy: u32,
    word: u32,
    scale: f32,
    #[comptime] byte: u32,
) -> Vector<F, Const<2>> {
    let at = (place(word, byte) | copy) as usize;
    let entry = (&table[at..at + 8]).with_vector_size::<Const<8>>();
    let levels = Vector::<f32, Const<2>>::reinterpret(entry[0]);
    Vector::cast_from(levels * Vector::new(scale))
}
