//! Attention over neighbouring keys, without a tensor of scores.
//!
//! The plain kernels, `rows`, `rows_backward` and `delta`, run on every device: they need neither tensor
//! cores nor planes, and with one unit a cube no barriers. Their sums are in f32.
//!
//! The forward pass takes keys tile by tile and keeps a running maximum and sum of each softmax (Milakov and
//! Gimelshein, arXiv 1805.02867); the backward pass computes probabilities again from the log-sum-exp (Dao
//! et al., FlashAttention, arXiv 2205.14135).
//!
//! A *row* is a pair of a query and one of the heads that share keys: number `query * group + head`. A cube
//! has some rows of one head of keys, so that one read of a key serves them all.

pub mod delta;
pub mod rows;
pub mod rows_backward;
pub mod tensor_core;

use cubecl::prelude::*;

/// What forks a plain kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RowsBlueprint {
    /// Elements of a head.
    pub head_dim: usize,
    /// Rows that a cube has; or keys, in the kernel for the gradients of keys and values. A power of two.
    pub held: usize,
    /// What it walks over at a time: keys, or rows in that kernel.
    pub tile: usize,
    /// Units of a cube, a power of two.
    pub units: usize,
    /// Whether scores are capped.
    pub softcap: bool,
    /// Whether units wait for each other; without it there is one.
    pub barriers: bool,
}

impl RowsBlueprint {
    /// Vectors of a head.
    pub const fn vectors(&self, vector: usize) -> usize {
        self.head_dim / vector
    }

    /// Units next to each other that have the vectors of a sum over a tile.
    pub const fn column_units(&self, vector: usize) -> usize {
        let vectors = self.vectors(vector);
        if vectors < self.units {
            vectors
        } else {
            self.units
        }
    }

    /// Vectors of a sum that a unit has.
    pub const fn columns(&self, vector: usize) -> usize {
        self.vectors(vector).div_ceil(self.column_units(vector))
    }

    /// Parts of a tile that are summed side by side; units that are left over rest.
    pub const fn parts(&self, vector: usize) -> usize {
        self.units / self.column_units(vector)
    }

    /// Units that have a row together where a tile of scores is reduced.
    pub const fn lanes(&self) -> usize {
        if self.units < self.held {
            1
        } else {
            self.units / self.held
        }
    }

    /// Rows that a unit has a part of there.
    pub const fn lane_rows(&self) -> usize {
        self.held.div_ceil(self.units)
    }

    /// Whether the sums of a unit fit registers: loops over them are unrolled then.
    pub const fn unrolled(&self, vector: usize) -> bool {
        self.columns(vector) <= 2
    }
}

/// The sizes and constants of an attention.
#[derive(CubeType, CubeLaunch)]
pub struct AttentionView {
    /// Rows of the batch.
    pub batch: usize,
    /// Queries of a row of the batch and a head.
    pub queries: usize,
    /// Keys of a row of the batch and a head.
    pub keys: usize,
    /// Heads of keys.
    pub kv_heads: usize,
    /// Heads of queries that share those of keys.
    pub group: usize,
    /// Rows of the ranges: one, or as many as the batch has.
    pub range_rows: usize,
    /// The factor of scores.
    pub scale: f32,
    /// What scores are capped at, if they are.
    pub softcap: f32,
    /// Minus infinity, which WGSL has no literal for.
    pub nothing: f32,
}

#[cube]
impl AttentionView {
    /// Rows of a head of keys.
    pub fn rows(&self) -> usize {
        self.queries * self.group
    }

    fn range_at(&self, batch: usize, query: usize) -> usize {
        (usize::min(batch, self.range_rows - 1) * self.queries + query) * 2
    }

    /// The first key that a query sees, at most the number of keys whatever the ranges say.
    pub fn first(&self, ranges: &[i32], batch: usize, query: usize) -> usize {
        let first = i32::max(ranges[self.range_at(batch, query)], 0i32);
        usize::min(usize::cast_from(first), self.keys)
    }

    /// One past the last key that a query sees, at most the number of keys whatever the ranges say.
    pub fn end(&self, ranges: &[i32], batch: usize, query: usize) -> usize {
        let end = i32::max(ranges[self.range_at(batch, query) + 1], 0i32);
        usize::min(usize::cast_from(end), self.keys)
    }

    /// The head of queries of a row.
    pub fn head(&self, kv_head: usize, row: usize) -> usize {
        kv_head * self.group + row % self.group
    }

    /// Where the number of a row lies in `[batch, heads, queries]`.
    pub fn number_at(&self, batch: usize, kv_head: usize, row: usize) -> usize {
        let head = batch * self.kv_heads * self.group + self.head(kv_head, row);
        head * self.queries + row / self.group
    }

    /// Which of `[batch, queries, heads]` a row is.
    pub fn row_at(&self, batch: usize, kv_head: usize, row: usize) -> usize {
        let token = batch * self.queries + row / self.group;
        token * self.kv_heads * self.group + self.head(kv_head, row)
    }

    /// `tanh(score / c)` of a score that is capped.
    pub fn tanh(&self, dot: f32) -> f32 {
        tanh(dot * self.scale / self.softcap)
    }
}

/// The hyperbolic tangent to within a few units in the last place, for small numbers with the polynomial of
/// Cephes' `tanhf`: a shader's own is a quotient of exponentials, and near zero off by as much as near one,
/// which a cap of 30 makes 30 times as much.
#[cube]
pub fn tanh(x: f32) -> f32 {
    let square = x * x;
    let mut sum = -5.704_988_7e-3f32 * square + 2.063_909e-2f32;
    sum = sum * square - 5.373_971_6e-2f32;
    sum = sum * square + 1.333_144_2e-1f32;
    sum = sum * square - 3.333_328e-1f32;
    let near = sum * square * x + x;
    // Of the negative magnitude: it cannot overflow.
    let magnitude = x.abs();
    let power = (magnitude * -2.0f32).exp();
    let quotient = (1.0f32 - power) / (1.0f32 + power);
    let far = select(x < 0.0f32, -quotient, quotient);
    select(magnitude < 0.625f32, near, far)
}

/// Where the tokens of a tensor `[batch, tokens, heads, head_dim]` lie, in vectors. The elements of a head
/// are neighbours.
#[derive(CubeType, CubeLaunch)]
pub struct TokenStrides {
    pub batch: usize,
    pub token: usize,
    pub head: usize,
}

#[cube]
impl TokenStrides {
    /// Where a head of a token starts.
    pub fn start(&self, batch: usize, token: usize, head: usize) -> usize {
        batch * self.batch + token * self.token + head * self.head
    }

    /// Where a row starts.
    pub fn row(&self, view: &AttentionView, batch: usize, kv_head: usize, row: usize) -> usize {
        self.start(batch, row / view.group, view.head(kv_head, row))
    }
}

/// Makes what the units of a cube have written to shared memory known to all of them.
#[cube]
pub fn wait(#[comptime] barriers: bool) {
    if comptime!(barriers) {
        sync_cube();
    }
}

/// The dot products of a vector of a head's length, from `start` on in a buffer, with those that a cube
/// holds in shared memory.
#[cube]
pub fn dots<F: Float, N: Size>(
    buffer: &[Vector<F, N>],
    start: usize,
    held: &Shared<[Vector<f32, N>]>,
    #[comptime] blueprint: RowsBlueprint,
) -> Array<f32> {
    let vector = N::value().comptime();
    let count = comptime!(blueprint.held);
    let vectors = comptime!(blueprint.vectors(vector));
    let mut sums = Array::<Vector<f32, N>>::new(count);
    #[unroll]
    for h in 0..count {
        sums[h] = Vector::<f32, N>::new(0.0f32);
    }
    for i in 0..vectors {
        let values = Vector::<f32, N>::cast_from(buffer[start + i]);
        #[unroll]
        for h in 0..count {
            sums[h] += values * held[comptime!(h * vectors) + i];
        }
    }
    let mut dots = Array::<f32>::new(count);
    #[unroll]
    for h in 0..count {
        let mut dot = 0.0f32;
        #[unroll]
        for e in 0..vector {
            dot += sums[h].extract(e);
        }
        dots[h] = dot;
    }
    dots
}

/// Sums over a tile that a unit has a part of: for each of what a cube holds the vectors
/// `column + c * column_units`, over every `parts`-th of the tile.
#[derive(CubeType)]
pub struct Sums<N: Size> {
    values: Array<Vector<f32, N>>,
    /// The part of the tile; one past the last for a unit that rests.
    pub part: usize,
    /// The first vector.
    column: usize,
    #[cube(comptime)]
    blueprint: RowsBlueprint,
}

#[cube]
impl<N: Size> Sums<N> {
    /// Zeros.
    pub fn new(#[comptime] blueprint: RowsBlueprint) -> Sums<N> {
        let vector = N::value().comptime();
        let length = comptime!(blueprint.held * blueprint.columns(vector));
        let column_units = comptime!(blueprint.column_units(vector));
        let unit = UNIT_POS as usize;
        let mut values = Array::<Vector<f32, N>>::new(length);
        let unrolled = comptime!(blueprint.unrolled(vector));
        #[unroll(unrolled)]
        for i in 0..length {
            values[i] = Vector::<f32, N>::new(0.0f32);
        }
        Sums::<N> {
            values,
            part: unit / column_units,
            column: unit % column_units,
            blueprint,
        }
    }

    /// Multiplies the sums with a factor for each of what the cube holds.
    pub fn scale(&mut self, factors: &Shared<[f32]>) {
        let vector = N::value().comptime();
        let columns = comptime!(self.blueprint.columns(vector));
        let unrolled = comptime!(self.blueprint.unrolled(vector));
        #[unroll]
        for h in 0..comptime!(self.blueprint.held) {
            let factor = Vector::<f32, N>::new(factors[h]);
            #[unroll(unrolled)]
            for c in 0..columns {
                self.values[comptime!(h * columns) + c] *= factor;
            }
        }
    }

    /// Adds place `place` of a tile, a vector of a head's length from `start` on in a buffer, times a weight
    /// for each of what the cube holds.
    ///
    /// - `weights`: `[held, tile]`
    pub fn add<F: Float>(
        &mut self,
        buffer: &[Vector<F, N>],
        start: usize,
        weights: &Shared<[f32]>,
        place: usize,
    ) {
        let vector = N::value().comptime();
        let vectors = comptime!(self.blueprint.vectors(vector));
        let columns = comptime!(self.blueprint.columns(vector));
        let column_units = comptime!(self.blueprint.column_units(vector));
        let unrolled = comptime!(self.blueprint.unrolled(vector));
        let tile = comptime!(self.blueprint.tile);
        #[unroll(unrolled)]
        for c in 0..columns {
            let column = self.column + c * column_units;
            if comptime!(columns == 1) || column < vectors {
                let values = Vector::<f32, N>::cast_from(buffer[start + column]);
                #[unroll]
                for h in 0..comptime!(self.blueprint.held) {
                    let weight = weights[comptime!(h * tile) + place];
                    self.values[comptime!(h * columns) + c] +=
                        values * Vector::<f32, N>::new(weight);
                }
            }
        }
    }

    /// Adds the parts up in their order.
    ///
    /// - `totals`: `[held, vectors]`, which no unit reads any more behind a barrier; there are the sums
    ///   afterwards, known to all units
    pub fn add_up(&self, totals: &mut Shared<[Vector<f32, N>]>) {
        let vector = N::value().comptime();
        let vectors = comptime!(self.blueprint.vectors(vector));
        let columns = comptime!(self.blueprint.columns(vector));
        let column_units = comptime!(self.blueprint.column_units(vector));
        let unrolled = comptime!(self.blueprint.unrolled(vector));
        let parts = comptime!(self.blueprint.parts(vector));
        for turn in 0..parts {
            if self.part == turn {
                #[unroll(unrolled)]
                for c in 0..columns {
                    let column = self.column + c * column_units;
                    if comptime!(columns == 1) || column < vectors {
                        #[unroll]
                        for h in 0..comptime!(self.blueprint.held) {
                            let at = comptime!(h * vectors) + column;
                            let mut sum = self.values[comptime!(h * columns) + c];
                            if turn > 0 {
                                sum += totals[at];
                            }
                            totals[at] = sum;
                        }
                    }
                }
            }
            wait(comptime!(self.blueprint.barriers));
        }
    }
}
