//! What forks the kernel [`tensor_core`](super::tensor_core), apart from it so that what it is built
//! of can see it too.

use super::fragments::TABLE_BYTES;
use super::scales::{CHUNK, ScaleBlueprint};
use super::sums::SumsBlueprint;

/// What forks a compiled kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorCoreBlueprint {
    /// Which scales a plane needs. `depth` chunks are in registers, the one that is multiplied and
    /// those on their way: two, unless there is only one stage.
    pub scales: ScaleBlueprint,
    /// Bits of a code, 4 or 8.
    pub code_bits: usize,
    /// How planes and cubes share the work.
    pub sums: SumsBlueprint,
    /// Chunks along `k` that a plane decodes of each stage of `x`: one, unless there is only one
    /// stage, and then a multiple of `depth`.
    pub chunks: usize,
    /// Rows of `x` kept in shared memory: up to eight a power of two, else `8 * column_tiles`.
    pub x_rows: usize,
    /// All that a cube needs of `x` is one stage.
    pub once: bool,
    /// Values of the multiplied type, or of bf16, that a value of a low-rank branch is the sum of, see
    /// [`LoraBranch::add_tile`](super::lora::LoraBranch::add_tile).
    pub branch_parts: usize,
}

impl TensorCoreBlueprint {
    /// Elements along `k` of a plane's part of a stage.
    pub const fn plane_k(&self) -> usize {
        CHUNK * self.chunks
    }

    /// Elements along `k` of a stage.
    pub const fn stage_k(&self) -> usize {
        self.plane_k() * self.sums.k_planes
    }

    /// Vectors of eight elements of `x` in a stage.
    pub const fn stage_vectors(&self) -> usize {
        self.x_rows * self.stage_k() / 8
    }

    /// Vectors of the next stage that a unit loads while a part of a chunk is multiplied.
    pub const fn carried(&self) -> usize {
        if self.once {
            return 0;
        }
        self.stage_vectors().div_ceil(self.sums.units() * PARTS)
    }

    /// Vectors of the first stage that a unit has in registers at a time.
    pub const fn first_carried(&self) -> usize {
        let each = self.stage_vectors().div_ceil(self.sums.units());
        if each < 4 { each } else { 4 }
    }

    /// Vectors of four words of shared memory for `x`, and for sums after it.
    pub const fn shared_vectors(&self) -> usize {
        let halves = if self.once { 1 } else { 2 };
        let staged = halves * self.stage_vectors();
        let sums = self.sums.shared_vectors();
        if staged > sums { staged } else { sums }
    }

    /// Bytes of shared memory that a cube takes.
    pub const fn shared_bytes(&self) -> usize {
        TABLE_BYTES + 256 * 4 + self.shared_vectors() * 16 + 4
    }
}

/// Parts of a chunk; with each a part of the next stage of `x` is loaded.
pub const PARTS: usize = 2;
