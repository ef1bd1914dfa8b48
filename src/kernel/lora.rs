//! The low-rank branch `s (x A) B` of a linear map, as the products with a packed weight take it in:
//! one small launch computes `s x A`, and the product adds its own with `B` to its sums.

use cubecl::cmma::MmaDefinition;
use cubecl::prelude::*;

/// Values of `s x A` of a row come in multiples of this many, zero from the rank on: what the tensor
/// cores take at once.
pub const DOWN_TILE: usize = 16;

/// A branch whose first half is computed.
#[derive(CubeType, CubeLaunch)]
pub struct LoraBranch<G: Float> {
    /// `[m, splits, width]`: parts of `s x A`, `width` the rank rounded up to [`DOWN_TILE`].
    pub down: Box<[Vector<f32, Const<4>>]>,
    /// `B`, `[rank, n]`.
    pub up: Box<[G]>,
    /// Columns of `A` and rows of `B`.
    pub rank: usize,
    /// Parts that add up to a value of `s x A`.
    #[cube(comptime)]
    pub splits: usize,
}

/// Elements of `B` that a lane has in registers for each of its rows of `W`.
pub const UP_LOADS: usize = 4;

#[cube]
impl<G: Float> LoraBranch<G> {
    /// Tiles along the rank, which planes that share the work along `k` take in turns.
    pub fn tiles(&self) -> usize {
        self.rank.div_ceil(DOWN_TILE.runtime())
    }

    /// Four neighbouring values of `s x A`, the `four`-th of a row.
    fn down_four(&self, row: usize, four: usize) -> Vector<f32, Const<4>> {
        let pitch = self.tiles() * comptime!(DOWN_TILE / 4);
        let splits = comptime!(self.splits);
        let at = row * splits * pitch + four;
        let mut sum = self.down[at];
        #[unroll]
        for split in 1..splits {
            sum += self.down[at + split * pitch];
        }
        sum
    }

    /// An element of `B`, zero from the rank on.
    fn up_at(&self, r: usize, row: usize, n: usize) -> G {
        let value = self.up[usize::min(r, self.rank - 1) * n + row];
        select(r < self.rank, value, G::from_int(0))
    }

    /// What four values along the rank add to `y[column, row]`.
    pub fn four_products(&self, column: usize, row: usize, n: usize, four: usize) -> f32 {
        let down = self.down_four(column, four);
        let mut sum = 0.0f32;
        #[unroll]
        for i in 0..4usize {
            let up = self.up_at(four * 4 + comptime!(i), row, n);
            sum += down.extract(i) * f32::cast_from(up);
        }
        sum
    }

    /// Loads a lane's elements of `B` of a tile along the rank, if there is one: four neighbouring ones
    /// of each row of `W` that the lane has in a plane's tiles of 16, the upper before the lower.
    pub fn load_up(
        &self,
        up: &mut Array<G>,
        tile: usize,
        plane_row: usize,
        n: usize,
        #[comptime] row_tiles: usize,
    ) {
        let group = (UNIT_POS_X >> 2) as usize;
        let r = tile * DOWN_TILE + (UNIT_POS_X & 3) as usize * 4;
        if tile < self.tiles() {
            #[unroll]
            for half in 0..comptime!(2 * row_tiles) {
                let row = usize::min(plane_row + group + comptime!(8 * half), n - 1);
                #[unroll]
                for i in 0..UP_LOADS {
                    up[comptime!(half * UP_LOADS + i)] = self.up_at(r + i, row, n);
                }
            }
        }
    }

    /// Adds a lane's share of a tile along the rank to the sums of its rows, for a single row of `x`;
    /// those of the four lanes that have the same rows add up to the branch.
    pub fn add_row(
        &self,
        sums: &mut Array<f32>,
        up: &Array<G>,
        tile: usize,
        #[comptime] rows: usize,
    ) {
        let four = tile * comptime!(DOWN_TILE / 4) + (UNIT_POS_X & 3) as usize;
        let down = self.down_four(0usize.runtime(), four);
        #[unroll]
        for row in 0..rows {
            #[unroll]
            for i in 0..UP_LOADS {
                let up = f32::cast_from(up[comptime!(row * UP_LOADS + i)]);
                sums[row] += down.extract(i) * up;
            }
        }
    }

    /// Adds a tile along the rank to the sums of a plane on tensor cores.
    ///
    /// `s x A` and `B` are rounded to `F`; or, in two parts, each is taken for the sum of two values
    /// of `F`: two of bf16 have the precision of f16 and more, and the range of f32.
    ///
    /// A lane has four neighbouring places along the rank, where the instruction wants two pairs
    /// eight apart: any order does that both sides agree on.
    #[allow(clippy::too_many_arguments)]
    pub fn add_tile<F: Float>(
        &self,
        sums: &mut Sequence<Array<Vector<f32, Const<2>>>>,
        up: &Array<G>,
        tile: usize,
        m: usize,
        #[comptime] row_tiles: usize,
        #[comptime] column_tiles: usize,
        #[comptime] parts: usize,
    ) {
        let def = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
        let group = (UNIT_POS_X >> 2) as usize;
        let four = tile * comptime!(DOWN_TILE / 4) + (UNIT_POS_X & 3) as usize;
        let mut fragments = Sequence::<Array<Vector<F, Const<2>>>>::new();
        #[unroll]
        for row_tile in 0..row_tiles {
            #[unroll]
            for part in 0..parts {
                let mut registers = Array::<Vector<F, Const<2>>>::new(4usize);
                #[unroll]
                for half in 0..2usize {
                    #[unroll]
                    for pair in 0..2usize {
                        let first = comptime!((2 * row_tile + half) * UP_LOADS + 2 * pair);
                        let mut two = Vector::<F, Const<2>>::empty();
                        two.insert(0usize, part_of::<G, F>(up[first], part));
                        two.insert(1usize, part_of::<G, F>(up[comptime!(first + 1)], part));
                        registers[comptime!(2 * pair + half)] = two;
                    }
                }
                fragments.push(registers);
            }
        }
        #[unroll]
        for column_tile in 0..column_tiles {
            let column = usize::min(comptime!(8 * column_tile) + group, m - 1);
            let values = self.down_four(column, four);
            #[unroll]
            for part in 0..parts {
                let mut down = Array::<Vector<F, Const<2>>>::new(2usize);
                #[unroll]
                for pair in 0..2usize {
                    let first = values.extract(comptime!(2 * pair));
                    let second = values.extract(comptime!(2 * pair + 1));
                    let mut two = Vector::<F, Const<2>>::empty();
                    two.insert(0usize, part_of::<f32, F>(first, part));
                    two.insert(1usize, part_of::<f32, F>(second, part));
                    down[pair] = two;
                }
                // The product of the second parts is below the precision of the sum.
                #[unroll]
                for up_part in 0..comptime!(parts - part) {
                    #[unroll]
                    for row_tile in 0..row_tiles {
                        let sum = sums.index_mut(comptime!(row_tile * column_tiles + column_tile));
                        let fragment = fragments.index(comptime!(row_tile * parts + up_part));
                        def.execute_inplace(fragment, &down, sum);
                    }
                }
            }
        }
    }
}

/// A value rounded to `F`, part 0, or what that rounding took off it, part 1.
#[cube]
fn part_of<G: Float, F: Float>(value: G, #[comptime] part: usize) -> F {
    let first = F::cast_from(value);
    if comptime!(part == 0) {
        first
    } else {
        F::cast_from(f32::cast_from(value) - f32::cast_from(first))
    }
}

/// What forks a compiled [`lora_down_kernel`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LoraDownBlueprint {
    /// Units of a cube.
    pub units: usize,
    /// Units next to each other along the rank, each with a vector of `A`.
    pub rank_units: usize,
    /// Elements of those vectors, which divides the rank.
    pub vector: usize,
    /// Rows of `x` of a cube.
    pub rows: usize,
    /// Cubes that share the work along `k`.
    pub splits: usize,
    /// Loads of `A` that a unit has on their way at a time.
    pub loads: usize,
}

impl LoraDownBlueprint {
    /// Sums of a cube.
    const fn outputs(&self) -> usize {
        self.rows * self.rank_units * self.vector
    }

    /// Units along `k`.
    const fn k_units(&self) -> usize {
        self.units / self.rank_units
    }
}

/// A matrix `A` and the factor of its branch.
#[derive(CubeType, CubeLaunch)]
pub struct LoraDownMatrix<G: Float, V: Size> {
    /// `[k, rank]`.
    pub a: Box<[Vector<G, V>]>,
    /// The factor `s`.
    pub scale: f32,
}

/// `s x A` in f32, in parts, for one branch or several of the same rank.
///
/// - `x`: `[m, k]`; `matrices`: `count` of them, in vectors of `V`; `down`: `[count, m, splits, width]`,
///   `width` the rank rounded up to [`DOWN_TILE`]
/// - A cube computes a part of `rows` by `rank_units * V` sums: its place along the grid gives the
///   part first, then the columns, then the rows. Units go along `A` as it lies in memory.
/// - Tails: rows of `x` past `m` repeat the last one and are not stored; columns past the rank are
///   zero.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn lora_down_kernel<F: Float, G: Float, V: Size>(
    x: &[F],
    matrices: Sequence<LoraDownMatrix<G, V>>,
    down: &mut [f32],
    m: usize,
    k: usize,
    rank: usize,
    #[comptime] blueprint: LoraDownBlueprint,
    #[define(F)] _x_dtype: ElemType,
    #[define(G)] _dtype: ElemType,
) {
    let vector = V::value().comptime();
    let rows = comptime!(blueprint.rows);
    let loads = comptime!(blueprint.loads);
    let splits = comptime!(blueprint.splits);
    let outputs = comptime!(blueprint.outputs());
    let columns = comptime!(blueprint.rank_units * vector);
    let width = rank.div_ceil(DOWN_TILE.runtime()) * DOWN_TILE;

    let count = matrices.len().comptime();
    let split = CUBE_POS % splits;
    let column_cubes = width / columns;
    let first_column = CUBE_POS / splits % column_cubes * columns;
    let row_cube = CUBE_POS / splits / column_cubes;
    let mut first_row = row_cube * rows;
    let mut scale = matrices.index(0usize).scale;
    let mut matrix = 0usize.runtime();
    if comptime!(count > 1) {
        let row_cubes = m.div_ceil(rows.runtime());
        matrix = row_cube / row_cubes;
        first_row = row_cube % row_cubes * rows;
        // Cubes past the last one, of which there may be some, have no rows.
        if matrix >= count {
            first_row = m;
        }
        #[unroll]
        for w in 1..count {
            if matrix == w {
                scale = matrices.index(w).scale;
            }
        }
    }
    let unit = UNIT_POS as usize;
    let rank_unit = unit % comptime!(blueprint.rank_units);
    let k_unit = unit / comptime!(blueprint.rank_units);
    let column = first_column + rank_unit * vector;

    let each = k.div_ceil(splits.runtime());
    let end = usize::min(split * each + each, k);
    let mut at = split * each + k_unit;
    let mut sums = Array::<Vector<f32, V>>::new(rows);
    #[unroll]
    for row in 0..rows {
        sums[row] = Vector::new(0.0f32);
    }
    if column < rank && first_row < m {
        while at < end {
            let mut loaded = Array::<Vector<f32, V>>::new(loads);
            let mut values = Array::<f32>::new(comptime!(loads * rows));
            #[unroll]
            for l in 0..loads {
                let i = at + comptime!(l * blueprint.k_units());
                loaded[l] = Vector::new(0.0f32);
                #[unroll]
                for row in 0..rows {
                    values[comptime!(l * rows + row)] = 0.0f32;
                }
                if i < end {
                    #[unroll]
                    for w in 0..count {
                        if comptime!(count == 1) || matrix == w {
                            let a = &matrices.index(w).a;
                            loaded[l] = Vector::cast_from(a[(i * rank + column) / vector]);
                        }
                    }
                    #[unroll]
                    for row in 0..rows {
                        let x_row = usize::min(first_row + row, m - 1);
                        values[comptime!(l * rows + row)] = f32::cast_from(x[x_row * k + i]);
                    }
                }
            }
            #[unroll]
            for l in 0..loads {
                #[unroll]
                for row in 0..rows {
                    sums[row] += loaded[l] * Vector::new(values[comptime!(l * rows + row)]);
                }
            }
            at += comptime!(loads * blueprint.k_units());
        }
    }

    // Units along k add up: each of some parts of a sum first, then one the parts.
    let k_units = comptime!(blueprint.k_units());
    let mut shared = Shared::<[f32]>::new_slice(comptime!(outputs * k_units));
    #[unroll]
    for row in 0..rows {
        #[unroll]
        for i in 0..vector {
            let output = comptime!(row * columns + i) + rank_unit * vector;
            shared[output * k_units + k_unit] = sums[row].extract(i);
        }
    }
    sync_cube();
    let parts = comptime!(blueprint.units / outputs);
    let output = unit / parts;
    let part = unit % parts;
    let mut total = 0.0f32;
    if output < outputs {
        #[unroll]
        for i in 0..comptime!(k_units.div_ceil(parts)) {
            let at = part + comptime!(i * parts);
            if comptime!((i + 1) * parts <= k_units) || at < k_units {
                total += shared[output * k_units + at];
            }
        }
    }
    sync_cube();
    if output < outputs {
        shared[part * outputs + output] = total;
    }
    sync_cube();
    if unit < outputs {
        let mut sum = 0.0f32;
        #[unroll]
        for part in 0..parts {
            sum += shared[unit + comptime!(part * outputs)];
        }
        let row = first_row + unit / columns;
        if row < m {
            let at = ((matrix * m + row) * splits + split) * width;
            down[at + first_column + unit % columns] = sum * scale;
        }
    }
}
