//! Products of tiles in shared memory and in registers.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use super::{FlashBlueprint, Piece};
use crate::kernel::attention::TokenStrides;

/// Sums of a tile of 16 rows and 8 columns. A lane has two neighbours of row `lane / 4`, and of the row
/// eight further down.
pub type Sums = Array<Vector<f32, Const<2>>>;

/// What a lane has of an operand, pairs of neighbours.
pub type Fragment<F> = Array<Vector<F, Const<2>>>;

/// Tiles of sums that are zero.
#[cube]
pub fn zeros(#[comptime] tiles: usize) -> Sequence<Sums> {
    let mut sums = Sequence::<Sums>::new();
    #[unroll]
    for _ in 0..tiles {
        let mut sum = Sums::new(2usize);
        sum[0] = Vector::new(0.0f32);
        sum[1] = Vector::new(0.0f32);
        sums.push(sum);
    }
    sums
}

/// Where a lane reads, in pieces, of an operand whose rows are those of the result, or as it writes one.
#[cube]
pub fn lhs_place(#[comptime] pitch: usize) -> usize {
    let (matrix, line) = place();
    ((matrix & 1) * 8 + line) * pitch + (matrix >> 1)
}

/// Where a lane reads, in pieces, of an operand whose rows are the columns of the result.
#[cube]
pub fn rhs_place(#[comptime] pitch: usize) -> usize {
    let (matrix, line) = place();
    ((matrix >> 1) * 8 + line) * pitch + (matrix & 1)
}

/// The matrix of eight rows whose row a lane points at, and which row.
#[cube]
fn place() -> (usize, usize) {
    let lane = UNIT_POS_X as usize;
    (lane >> 3, lane & 7)
}

/// Adds `A Bᵀ`, both in shared memory, `16 steps` elements long.
///
/// - `lhs`, `rhs`: the first rows, with a lane's [`lhs_place`] and [`rhs_place`]
/// - `sums`: of each tile of rows the tiles of columns
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn add_product<F: Float>(
    staged: &Shared<[Piece<F>]>,
    lhs: usize,
    rhs: usize,
    sums: &mut Sequence<Sums>,
    #[comptime] row_tiles: usize,
    #[comptime] column_tiles: usize,
    #[comptime] steps: usize,
    #[comptime] pitch: usize,
) {
    let def = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    #[unroll]
    for step in 0..steps {
        let mut rows = Sequence::<Fragment<F>>::new();
        #[unroll]
        for row_tile in 0..row_tiles {
            let from = lhs + comptime!(row_tile * 16 * pitch + 2 * step);
            rows.push(def.load_matrix::<Piece<F>, Const<2>>(
                &staged[from..from + 1],
                MatrixIdent::A,
                4usize,
                false,
            ));
        }
        #[unroll]
        for pair in 0..comptime!(column_tiles / 2) {
            let from = rhs + comptime!(pair * 16 * pitch + 2 * step);
            let four = def.load_matrix::<Piece<F>, Const<2>>(
                &staged[from..from + 1],
                MatrixIdent::B,
                4usize,
                false,
            );
            let (first, second) = halves::<F>(&four);
            #[unroll]
            for row_tile in 0..row_tiles {
                let to = comptime!(row_tile * column_tiles + 2 * pair);
                def.execute_inplace(rows.index(row_tile), &first, sums.index_mut(to));
                let to = comptime!(to + 1);
                def.execute_inplace(rows.index(row_tile), &second, sums.index_mut(to));
            }
        }
    }
}

/// Adds `A B`, `A` in registers, as sums of `depth_tiles` tiles along `k`, `B` in shared memory.
///
/// - `rhs`: the first row of `B`, with a lane's [`lhs_place`]
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn add_product_of_sums<F: Float>(
    lhs: &Sequence<Sums>,
    staged: &Shared<[Piece<F>]>,
    rhs: usize,
    sums: &mut Sequence<Sums>,
    #[comptime] row_tiles: usize,
    #[comptime] depth_tiles: usize,
    #[comptime] column_tiles: usize,
    #[comptime] pitch: usize,
) {
    let def = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    #[unroll]
    for step in 0..comptime!(depth_tiles / 2) {
        let mut rows = Sequence::<Fragment<F>>::new();
        #[unroll]
        for row_tile in 0..row_tiles {
            rows.push(fragment::<F>(
                lhs,
                comptime!(row_tile * depth_tiles + 2 * step),
            ));
        }
        #[unroll]
        for pair in 0..comptime!(column_tiles / 2) {
            let from = rhs + comptime!(step * 16 * pitch + 2 * pair);
            let four = def.load_matrix::<Piece<F>, Const<2>>(
                &staged[from..from + 1],
                MatrixIdent::B,
                4usize,
                true,
            );
            let (first, second) = halves::<F>(&four);
            #[unroll]
            for row_tile in 0..row_tiles {
                let to = comptime!(row_tile * column_tiles + 2 * pair);
                def.execute_inplace(rows.index(row_tile), &first, sums.index_mut(to));
                let to = comptime!(to + 1);
                def.execute_inplace(rows.index(row_tile), &second, sums.index_mut(to));
            }
        }
    }
}

/// Two neighbouring tiles of sums as an operand.
#[cube]
fn fragment<F: Float>(sums: &Sequence<Sums>, #[comptime] first: usize) -> Fragment<F> {
    let mut four = Fragment::<F>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        four[i] = Vector::cast_from(sums.index(comptime!(first + i / 2))[comptime!(i % 2)]);
    }
    four
}

/// Puts tiles of sums into shared memory.
///
/// - `to`: the first row, with a lane's [`lhs_place`]
#[cube]
pub fn store_sums<F: Float>(
    sums: &Sequence<Sums>,
    staged: &mut Shared<[Piece<F>]>,
    to: usize,
    #[comptime] row_tiles: usize,
    #[comptime] column_tiles: usize,
    #[comptime] pitch: usize,
) {
    let def = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    #[unroll]
    for row_tile in 0..row_tiles {
        #[unroll]
        for pair in 0..comptime!(column_tiles / 2) {
            let four = fragment::<F>(sums, comptime!(row_tile * column_tiles + 2 * pair));
            let to = to + comptime!(row_tile * 16 * pitch + 2 * pair);
            def.store_matrix::<Piece<F>, Const<2>>(
                &mut staged[to..to + 1],
                &four,
                MatrixIdent::Accumulator,
                4usize,
                false,
            );
        }
    }
}

/// The operands of two products in what was loaded at once.
#[cube]
fn halves<F: Float>(four: &Fragment<F>) -> (Fragment<F>, Fragment<F>) {
    let mut first = Fragment::<F>::new(2usize);
    let mut second = Fragment::<F>::new(2usize);
    #[unroll]
    for i in 0..2usize {
        first[i] = four[i];
        second[i] = four[i + 2];
    }
    (first, second)
}

/// Loads a unit's share of a tile of keys or values into registers; zeros past the end.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn load_tile<F: Float>(
    from: &[Piece<F>],
    carried: &mut Array<Piece<F>>,
    base: usize,
    token: usize,
    first: u32,
    end: u32,
    #[comptime] blueprint: FlashBlueprint,
) {
    let pieces = comptime!(blueprint.pieces());
    #[unroll]
    for c in 0..comptime!(blueprint.carried()) {
        let i = UNIT_POS as usize + comptime!(c * blueprint.units());
        let key = first as usize + i / pieces;
        let mut piece = Piece::<F>::new(F::from_int(0));
        if key < end as usize {
            piece = from[base + key * token + i % pieces];
        }
        carried[c] = piece;
    }
}

/// Puts it into shared memory.
#[cube]
pub fn store_tile<F: Float>(
    staged: &mut Shared<[Piece<F>]>,
    carried: &Array<Piece<F>>,
    to: usize,
    #[comptime] blueprint: FlashBlueprint,
) {
    let pieces = comptime!(blueprint.pieces());
    #[unroll]
    for c in 0..comptime!(blueprint.carried()) {
        let i = UNIT_POS as usize + comptime!(c * blueprint.units());
        staged[to + i / pieces * comptime!(blueprint.pitch()) + i % pieces] = carried[c];
    }
}

/// Puts the rows of a cube into shared memory: of queries, head by head of the group. Rows past the last
/// repeat it.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn stage_rows<F: Float>(
    from: &[Piece<F>],
    staged: &mut Shared<[Piece<F>]>,
    to: usize,
    base: usize,
    strides: &TokenStrides,
    first: usize,
    rows: usize,
    #[comptime] blueprint: FlashBlueprint,
) {
    let pieces = comptime!(blueprint.pieces());
    let group = comptime!(blueprint.group);
    #[unroll]
    for c in 0..comptime!(blueprint.row_share()) {
        let i = UNIT_POS as usize + comptime!(c * blueprint.units());
        let (row, piece) = (i / pieces, i % pieces);
        let row_of = usize::min(first + row, rows - 1);
        let at = base + row_of / group * strides.token + row_of % group * strides.head + piece;
        staged[to + row * comptime!(blueprint.pitch()) + piece] = from[at];
    }
}

/// Writes the rows of a plane from shared memory, to where the heads of a token are neighbours.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn write_rows<F: Float>(
    staged: &Shared<[Piece<F>]>,
    out: &mut [Piece<F>],
    plane_row: usize,
    to: usize,
    heads: usize,
    cube_row: usize,
    rows: usize,
    #[comptime] blueprint: FlashBlueprint,
) {
    let pieces = comptime!(blueprint.pieces());
    let group = comptime!(blueprint.group);
    #[unroll]
    for c in 0..comptime!(16 * blueprint.row_tiles * blueprint.pieces() / 32) {
        let i = UNIT_POS_X as usize + comptime!(c * 32);
        let (row, piece) = (plane_row + i / pieces, i % pieces);
        let row_of = cube_row + row;
        if row_of < rows {
            let to = to + (row_of / group * heads + row_of % group) * pieces + piece;
            out[to] = staged[row * comptime!(blueprint.pitch()) + piece];
        }
    }
}

/// Loads a unit's share of a tile of rows of queries into registers; zeros past the end.
#[cube]
pub fn load_rows<F: Float>(
    from: &[Piece<F>],
    carried: &mut Array<Piece<F>>,
    base: usize,
    strides: &TokenStrides,
    first: usize,
    end: usize,
    #[comptime] blueprint: FlashBlueprint,
) {
    let pieces = comptime!(blueprint.pieces());
    let group = comptime!(blueprint.group);
    #[unroll]
    for c in 0..comptime!(blueprint.carried()) {
        let i = UNIT_POS as usize + comptime!(c * blueprint.units());
        let row = first + i / pieces;
        let mut piece = Piece::<F>::new(F::from_int(0));
        if row < end {
            piece =
                from[base + row / group * strides.token + row % group * strides.head + i % pieces];
        }
        carried[c] = piece;
    }
}
