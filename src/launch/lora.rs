//! Launches of the first half of a low-rank branch.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::product::Product;
use super::{
    address_type, check_buffers, check_dtype, cube_count, elem_type, has_barriers, units_per_cube,
    vector_size,
};
use crate::error::Nf4Error;
use crate::format::FloatType;
use crate::kernel::lora::{
    DOWN_TILE, LoraBranch, LoraBranchLaunch, LoraDownBlueprint, LoraDownMatrixLaunch,
    lora_down_kernel,
};

/// A low-rank branch `s (x A) B` to add to a product.
#[derive(Debug, Clone)]
pub struct Lora {
    /// `A`, `[k, rank]`, row-major.
    pub a: Handle,
    /// `B`, `[rank, n]`, row-major.
    pub b: Handle,
    /// Columns of `A` and rows of `B`.
    pub rank: usize,
    /// The factor `s`.
    pub scale: f32,
    /// Type of `A` and `B`.
    pub dtype: FloatType,
}

/// Cubes that are worth their launch.
const CUBES: usize = 128;

/// Parts that the product has to add up again, at most.
const MAX_SPLITS: usize = 8;

/// Elements along `k` that a part is at least worth.
const MIN_SPLIT: usize = 256;

/// Loads of `A` that a unit has on their way at a time, at most.
const MAX_LOADS: usize = 8;

/// Bytes that a graphics card's memory hands out at a time.
const SECTOR_BYTES: usize = 32;

/// Sums of a unit: with 256 units they take 16 KiB of shared memory, which WebGPU guarantees.
const UNIT_SUMS: usize = 16;

impl Lora {
    /// Checks that a device can add a branch of this type to a product.
    ///
    /// # Errors
    /// [`Nf4Error::Variant`] if its cubes have no barriers, [`Nf4Error::DeviceDtype`] if it has no
    /// such type.
    pub fn check(client: &Client, dtype: FloatType) -> Result<(), Nf4Error> {
        if !has_barriers(client) {
            return Err(Nf4Error::Variant {
                variant: "lora",
                reason: "the device has no barriers".into(),
            });
        }
        check_dtype(client, dtype)
    }

    /// Checks the buffers against a product.
    pub(super) fn check_buffers(&self, product: &Product) -> Result<(), Nf4Error> {
        let rank = self.rank;
        if rank == 0 {
            return Err(Nf4Error::Length {
                tensor: "rank".into(),
                expected: 1,
                given: 0,
            });
        }
        let bytes = self.dtype.size_bytes();
        check_buffers([
            ("lora_a", &self.a, [product.k, rank], bytes),
            ("lora_b", &self.b, [rank, product.n], bytes),
        ])?;
        // `s x A`, in parts.
        let part_bytes = rank.checked_next_multiple_of(DOWN_TILE);
        let bytes = part_bytes.and_then(|bytes| bytes.checked_mul(4 * MAX_SPLITS));
        if bytes.is_none_or(|bytes| product.m.checked_mul(bytes).is_none()) {
            return Err(Nf4Error::ElementCount {
                tensor: "x A".into(),
                shape: vec![product.m, rank],
            });
        }
        Ok(())
    }

    /// Launches `s x A`; `x` holds what the product declares.
    pub(super) fn launch_down(
        &self,
        client: &Client,
        x: &Handle,
        product: &Product,
    ) -> LoraDown<'_> {
        let mut down = launch_down_all(client, &[self], x, product);
        down.remove(0)
    }
}

/// Launches `s x A` of branches of one rank and type; `x` holds what the product declares, which is that
/// of each but for the columns of `y`.
pub(super) fn launch_down_all<'a>(
    client: &Client,
    branches: &[&'a Lora],
    x: &Handle,
    product: &Product,
) -> Vec<LoraDown<'a>> {
    let Product { m, k, dtype, .. } = *product;
    let units = units_per_cube(client) as usize;
    let Lora {
        rank, dtype: of_a, ..
    } = *branches[0];
    let alike = |branch: &&Lora| branch.rank == rank && branch.dtype == of_a;
    assert!(branches.iter().all(alike), "branches of one kind");
    let width = rank.next_multiple_of(DOWN_TILE);
    let vector = vector_size(client, of_a, 8, &[rank]);
    let rows = (UNIT_SUMS / vector).min(4).min(m);
    // Units next to each other read the bytes that memory hands out at a time.
    let vectors = width / vector;
    let sector = (SECTOR_BYTES / (vector * of_a.size_bytes())).max(1);
    let rank_units = sector
        .min(1 << vectors.trailing_zeros())
        .min(prev_power_of_two(units / (rows * vector)));
    let others = branches.len() * m.div_ceil(rows) * (vectors / rank_units);
    let splits = (CUBES / others).min(k / MIN_SPLIT).clamp(1, MAX_SPLITS);
    let splits = prev_power_of_two(splits);
    let of_unit = k.div_ceil(splits * (units / rank_units));
    let blueprint = LoraDownBlueprint {
        units,
        rank_units,
        vector,
        rows,
        splits,
        loads: of_unit.next_power_of_two().min(MAX_LOADS),
    };
    let elems = m * splits * width;
    let all_elems = branches.len() * elems;
    let down = client.empty(all_elems * 4);
    // SAFETY: `x` and each `A` hold what is declared (checked by `check_buffers`), and the kernel guards
    // branches and rows by their number, columns by the rank and elements by `k`.
    unsafe {
        let matrix = |branch: &&Lora| {
            let a = BufferArg::from_raw_parts(branch.a.clone(), k * rank);
            LoraDownMatrixLaunch::new(a, branch.scale)
        };
        lora_down_kernel::launch_unchecked(
            client,
            cube_count(client, others * splits),
            CubeDim::new_1d(units as u32),
            address_type((m * k).max(k * rank).max(all_elems)),
            vector,
            BufferArg::from_raw_parts(x.clone(), m * k),
            branches.iter().map(matrix).collect(),
            BufferArg::from_raw_parts(down.clone(), all_elems),
            m,
            k,
            rank,
            blueprint,
            elem_type(dtype),
            elem_type(of_a),
        );
    }
    let of_branch = |(part, &lora): (usize, &&'a Lora)| LoraDown {
        lora,
        down: down.clone().offset_start((part * elems * 4) as u64),
        pitch: splits * width,
        splits,
    };
    branches.iter().enumerate().map(of_branch).collect()
}

fn prev_power_of_two(value: usize) -> usize {
    1 << value.max(1).ilog2()
}

/// A branch whose first half is on its way: `s x A` in parts.
pub(super) struct LoraDown<'a> {
    lora: &'a Lora,
    down: Handle,
    /// Elements of a row, all parts.
    pitch: usize,
    splits: usize,
}

/// The branch as a product takes it, for `m` rows of `x` from `first` on.
///
/// # Safety
/// The product that the branch was launched for has `n` columns and at least `first + m` rows.
pub(super) unsafe fn lora_arg<G: Float>(
    branch: Option<&LoraDown>,
    n: usize,
    first: usize,
    m: usize,
) -> ComptimeOptionArgs<LoraBranch<G>> {
    let Some(branch) = branch else {
        return ComptimeOptionArgs::None;
    };
    let down = branch.down.clone();
    let down = down.offset_start((first * branch.pitch * 4) as u64);
    let rank = branch.lora.rank;
    // SAFETY: the first half was launched for all rows, and the length of `B` has been checked.
    let (down, up) = unsafe {
        (
            BufferArg::from_raw_parts(down, m * branch.pitch),
            BufferArg::from_raw_parts(branch.lora.b.clone(), rank * n),
        )
    };
    ComptimeOptionArgs::Some(LoraBranchLaunch::new(down, up, rank, branch.splits))
}
