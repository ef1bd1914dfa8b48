//! Attention on tensor cores, for many queries.
//!
//! Rows are pairs of a query and a head of the group that shares keys and values, query by query, so that
//! what is loaded of those serves the whole group. Results of the tensor cores stay in registers, where
//! their layout is that of operands: of scores become probabilities, which are multiplied with values
//! right away. The next tile is on its way from global memory meanwhile.
//!
//! tiles of rows for `dq`, one over tiles of keys for `dk` and `dv`: two products more than in one, but
//! no sum is shared between cubes, so that nothing depends on their order.
//!
//! Sources: FlashAttention 2 (Dao, arXiv 2307.08691) for the order of loops and what is kept; `mma.sync`,
//! `ldmatrix` and `stmatrix` (PTX ISA) for the layouts.

mod backward;
mod few;
mod forward;
mod tiles;

pub use backward::{attention_dkv_kernel, attention_dq_kernel};
pub use few::{FewBlueprint, attention_few_kernel};
pub use forward::attention_forward_kernel;

use cubecl::prelude::*;

use super::{AttentionView, TokenStrides};

/// Eight elements of 16 bits, what is loaded and stored at once.
pub type Piece<F> = Vector<F, Const<8>>;

/// What forks a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlashBlueprint {
    /// Elements of a head, a multiple of 16.
    pub head_dim: usize,
    /// Planes of a cube.
    pub planes: usize,
    /// Tiles of 16 rows that a plane has.
    pub row_tiles: usize,
    /// Keys of a tile, a multiple of 16.
    pub keys: usize,
    /// Heads of queries that share one of keys and values.
    pub group: usize,
    /// Whether scores are capped.
    pub softcap: bool,
}

impl FlashBlueprint {
    /// Rows of a cube.
    pub fn rows(&self) -> usize {
        16 * self.row_tiles * self.planes
    }

    /// Units of a cube.
    pub fn units(&self) -> usize {
        32 * self.planes
    }

    /// Pieces of a head.
    pub fn pieces(&self) -> usize {
        self.head_dim / 8
    }

    /// Pieces from one row in shared memory to the next: an odd number, so that eight rows lie in
    /// different banks.
    pub fn pitch(&self) -> usize {
        self.pieces() + 1
    }

    /// Pieces of a tile of keys, or of values, in shared memory.
    pub fn tile_pieces(&self) -> usize {
        self.keys * self.pitch()
    }

    /// Pieces of the rows in shared memory.
    pub fn row_pieces(&self) -> usize {
        self.rows() * self.pitch()
    }

    /// Pieces that a unit loads of the rows.
    pub fn row_share(&self) -> usize {
        self.rows() * self.pieces() / self.units()
    }

    /// Whether the units of a cube have equal shares of a tile.
    pub fn is_even(&self) -> bool {
        (self.keys * self.pieces()).is_multiple_of(self.units())
    }

    /// Pieces that a unit loads of a tile.
    pub fn carried(&self) -> usize {
        self.keys * self.pieces() / self.units()
    }

    /// Bytes of shared memory of the forward pass.
    pub fn forward_bytes(&self) -> usize {
        16 * (self.row_pieces() + 4 * self.tile_pieces())
    }

    /// Bytes of shared memory of the kernels of the backward pass.
    pub fn backward_bytes(&self) -> usize {
        16 * (2 * self.row_pieces() + 4 * self.tile_pieces())
    }
}

/// How queries, keys and values lie, in pieces.
#[derive(CubeType, CubeLaunch)]
pub struct FlashStrides {
    pub q: TokenStrides,
    pub k: TokenStrides,
    pub v: TokenStrides,
}

/// What a hidden score is.
const HIDDEN: f32 = -1e38;

/// Below all scores. That of a row which has seen nothing yet.
pub const LOWEST: f32 = -1e30;

/// The range of keys that a query sees; of one past the last, the last one's.
#[cube]
pub fn range_of(ranges: &[i32], batch: usize, query: usize, view: &AttentionView) -> (u32, u32) {
    let query = usize::min(query, view.queries - 1);
    let first = view.first(ranges, batch, query);
    (first as u32, view.end(ranges, batch, query) as u32)
}

/// What scores are multiplied with before a cap is put on them, or as they are.
#[cube]
pub fn score_scale(view: &AttentionView, #[comptime] softcap: bool) -> f32 {
    let mut scale = view.scale;
    if comptime!(softcap) {
        scale /= view.softcap;
    }
    scale
}

/// `cap tanh(scale x)`.
#[cube]
pub fn capped(two: Vector<f32, Const<2>>, scale: f32, cap: f32) -> Vector<f32, Const<2>> {
    let mut result = two;
    #[unroll]
    for e in 0..2usize {
        // tanh(x) = 1 - 2 / (exp(2 x) + 1)
        let power = f32::exp(two.extract(e) * (2.0 * scale));
        result.insert(e, cap - 2.0 * cap / (power + 1.0));
    }
    result
}

/// Scores of two neighbouring keys, without those that are not seen.
#[cube]
pub fn hidden(
    two: Vector<f32, Const<2>>,
    column: u32,
    first: u32,
    end: u32,
) -> Vector<f32, Const<2>> {
    let mut result = two;
    #[unroll]
    for e in 0..2usize {
        let key = column + comptime!(e as u32);
        let seen = key >= first && key < end;
        result.insert(e, select(seen, two.extract(e), f32::new(HIDDEN)));
    }
    result
}
