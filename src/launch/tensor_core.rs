//! How the two products on tensor cores cut a weight up, and what their cubes share.

use std::any::TypeId;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use cubecl::device::DeviceId;
use cubecl::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::elem_type;
use super::matmul::{MatmulVariant, Product};
use crate::error::Nf4Error;
use crate::format::{BlockSize, FloatType, PackedLayout};
use crate::kernel::levels::LevelsBlueprint;
use crate::kernel::scales::{CHUNK, ScaleBlueprint};
use crate::kernel::sums::SumsBlueprint;
use crate::kernel::tensor_core_blueprint::TensorCoreBlueprint;

/// Rows of `x` that a launch of the tensor core kernel takes at most; more are cut into groups.
pub const TENSOR_CORE_ROWS: usize = 64;

/// How [`MatmulVariant::TensorCore`] and [`MatmulVariant::Levels`] cut the weight up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorCoreTile {
    /// Tiles of 16 rows of `W` a plane.
    pub row_tiles: usize,
    /// Planes of a cube along the rows of `W`.
    pub row_planes: usize,
    /// Planes of a cube along `k`.
    pub k_planes: usize,
    /// Runs of 128 elements that a plane decodes of each stage of `x`: one, or as many as it takes
    /// to have all of `x` in one stage. With [`Levels`](MatmulVariant::Levels) it is the latter.
    pub chunks: usize,
    /// Runs whose codes are in registers at a time: two, or with a single stage of `x` any divisor
    /// of `chunks`.
    pub depth: usize,
    /// Cubes that share the work along `k`; one with [`Levels`](MatmulVariant::Levels).
    pub k_cubes: usize,
}

/// A way to cut weights up, whatever their size: which one is fastest depends on the product and the
/// device, and is worth a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cut {
    /// All of `x` in shared memory, cubes that all run at once: for a few rows.
    Whole,
    /// `x` in stages of 512 elements, 16 planes a cube.
    Wide,
    /// `x` in stages of 256 elements, 8 planes a cube, each with more registers: for many rows.
    Narrow,
}

impl Cut {
    /// All ways.
    pub const ALL: [Self; 3] = [Self::Whole, Self::Wide, Self::Narrow];

    /// The name used in the log of the autotuner.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Wide => "wide",
            Self::Narrow => "narrow",
        }
    }

    /// The tile for a product on a device.
    pub fn tile(self, client: &Client, product: &Product) -> TensorCoreTile {
        let multiprocessors = multiprocessors(client);
        let stages = |k_planes| {
            let tile = TensorCoreTile {
                row_tiles: 2,
                row_planes: 4,
                k_planes,
                chunks: 1,
                depth: 2,
                k_cubes: 1,
            };
            // Where the weight has too few rows to give every multiprocessor a cube, cubes share
            // the work along k.
            let row_cubes = product.n.div_ceil(16 * tile.row_tiles * tile.row_planes);
            let row_cubes = row_cubes.max(1);
            TensorCoreTile {
                k_cubes: (multiprocessors / row_cubes).clamp(1, MAX_K_CUBES),
                ..tile
            }
        };
        match self {
            Self::Whole => TensorCoreTile::whole(client, product),
            Self::Wide => stages(4),
            Self::Narrow => stages(2),
        }
    }
}

/// Elements of a row up to which [`LevelsBlueprint::paired`] pays: measured at 4096, where it gains,
/// and at 14336, where it loses.
const MAX_PAIRED_K: usize = 8192;

/// More parts than this cost more to add up than they save.
const MAX_K_CUBES: usize = 8;

impl From<[usize; 6]> for TensorCoreTile {
    /// From the [`sizes`](TensorCoreTile::sizes).
    fn from(sizes: [usize; 6]) -> Self {
        let [row_tiles, row_planes, k_planes, chunks, depth, k_cubes] = sizes;
        Self {
            row_tiles,
            row_planes,
            k_planes,
            chunks,
            depth,
            k_cubes,
        }
    }
}

impl TensorCoreTile {
    /// All sizes, in the order of the fields.
    pub const fn sizes(&self) -> [usize; 6] {
        let Self {
            row_tiles,
            row_planes,
            k_planes,
            chunks,
            depth,
            k_cubes,
        } = *self;
        [row_tiles, row_planes, k_planes, chunks, depth, k_cubes]
    }

    /// The tile of [`MatmulVariant::TensorCore`] that suits a product on a device, by what was
    /// fastest on an H100 (`benches/NOTES.md`).
    pub fn for_product(client: &Client, layout: &PackedLayout, product: Product) -> Self {
        let order = match product.m {
            0..=16 => [Cut::Whole, Cut::Wide, Cut::Narrow],
            17..=32 => [Cut::Wide, Cut::Narrow, Cut::Whole],
            _ => [Cut::Narrow, Cut::Wide, Cut::Whole],
        };
        let tiles = order.map(|cut| cut.tile(client, &product));
        let fits = |tile: &&Self| blueprint(client, layout, product, false, **tile).is_ok();
        *tiles.iter().find(fits).unwrap_or(&tiles[0])
    }

    /// The tile of [`MatmulVariant::Levels`]: cubes that all run at once, each with as many planes as
    /// have four chunks or more to go through.
    pub fn whole(client: &Client, product: &Product) -> Self {
        let row_planes = product.n.div_ceil(16 * multiprocessors(client)).clamp(1, 8);
        let all = product.k.div_ceil(CHUNK).max(1);
        let k_planes = (32 / row_planes).min(all.div_ceil(4));
        let chunks = all.div_ceil(k_planes).next_multiple_of(2);
        Self {
            row_tiles: 1,
            row_planes,
            k_planes: all.div_ceil(chunks),
            chunks,
            depth: 2,
            k_cubes: 1,
        }
    }
}

/// A reason why the device cannot run a kernel.
fn impossible(variant: MatmulVariant, reason: String) -> Nf4Error {
    Nf4Error::Variant {
        variant: variant.name(),
        reason,
    }
}

/// Checks what both kernels need, and returns the base-2 logarithm of the runs of a row that share
/// a scale.
fn check(
    client: &Client,
    layout: &PackedLayout,
    product: Product,
    variant: MatmulVariant,
    tile: TensorCoreTile,
) -> Result<u32, Nf4Error> {
    let Product { m, n, k, dtype } = product;
    let fail = |reason| Err(impossible(variant, reason));
    if [m, n, k].contains(&0) {
        return fail(format!("a product of {m}x{k} with {n}x{k} has no elements"));
    }
    if !has_fragments(client, elem_type(dtype)) {
        let dtype = dtype.name();
        return fail(format!(
            "the device has no m16n8k16 tensor core instruction for {dtype}"
        ));
    }
    let levels = variant == MatmulVariant::Levels;
    if levels && m > 1 {
        return fail(format!("{m} rows are more than one"));
    }
    let runs = if levels { &[6][..] } else { &[6, 5] };
    let block_log2 = layout.config().block_size.log2();
    let mut runs = runs.iter().copied();
    let Some(run_log2) = runs.find(|&log2| log2 <= block_log2 && k.is_multiple_of(1 << log2))
    else {
        let block = layout.config().block_size.elems();
        return fail(format!(
            "rows of {k} elements in blocks of {block} do not come in runs that the kernel takes"
        ));
    };
    if tile.sizes().contains(&0) {
        return fail(format!("{tile:?} has sizes that do not go together"));
    }
    Ok(run_log2)
}

/// Checks that a cube may have so many units and so much shared memory.
fn check_cube(
    client: &Client,
    variant: MatmulVariant,
    tile: TensorCoreTile,
    units: usize,
    shared_bytes: usize,
) -> Result<(), Nf4Error> {
    let hardware = &client.properties().hardware;
    if units > hardware.max_units_per_cube as usize
        || shared_bytes > hardware.max_shared_memory_size
    {
        return Err(impossible(
            variant,
            format!("{tile:?} is more than a cube may have"),
        ));
    }
    Ok(())
}

/// What forks [`MatmulVariant::Levels`] for a product and a tile.
///
/// # Errors
/// [`Nf4Error::Variant`] if the device cannot run it.
pub(super) fn levels_blueprint(
    client: &Client,
    layout: &PackedLayout,
    product: Product,
    bias: bool,
    tile: TensorCoreTile,
) -> Result<LevelsBlueprint, Nf4Error> {
    let variant = MatmulVariant::Levels;
    let run_log2 = check(client, layout, product, variant, tile)?;
    let blueprint = LevelsBlueprint {
        scales: scale_blueprint(layout, run_log2, tile),
        sums: sums_blueprint(1, bias, tile),
        paired: tile.depth == 2
            && layout.config().nested_block_size.is_some()
            && product.k.is_multiple_of(2 * CHUNK)
            && product.k <= MAX_PAIRED_K,
        chunks: tile.chunks,
        wide: product.dtype == FloatType::BF16,
    };
    if !tile.chunks.is_multiple_of(tile.depth) {
        return Err(impossible(
            variant,
            format!("{tile:?} has sizes that do not go together"),
        ));
    }
    if tile.k_cubes != 1 || CHUNK * tile.chunks * tile.k_planes < product.k {
        return Err(impossible(
            variant,
            format!("{tile:?} does not cover rows of {} elements", product.k),
        ));
    }
    let units = blueprint.sums.units();
    check_cube(client, variant, tile, units, blueprint.shared_bytes())?;
    Ok(blueprint)
}

fn scale_blueprint(layout: &PackedLayout, run_log2: u32, tile: TensorCoreTile) -> ScaleBlueprint {
    ScaleBlueprint {
        block_log2: layout.config().block_size.log2(),
        nested_log2: layout.config().nested_block_size.map_or(0, BlockSize::log2),
        run_log2,
        row_tiles: tile.row_tiles,
        depth: tile.depth,
    }
}

fn sums_blueprint(column_tiles: usize, bias: bool, tile: TensorCoreTile) -> SumsBlueprint {
    SumsBlueprint {
        row_tiles: tile.row_tiles,
        column_tiles,
        row_planes: tile.row_planes,
        k_planes: tile.k_planes,
        k_cubes: 1,
        bias,
    }
}

/// What forks [`MatmulVariant::TensorCore`] for a product and a tile.
///
/// # Errors
/// [`Nf4Error::Variant`] if the device cannot run it.
pub(super) fn blueprint(
    client: &Client,
    layout: &PackedLayout,
    product: Product,
    bias: bool,
    tile: TensorCoreTile,
) -> Result<TensorCoreBlueprint, Nf4Error> {
    let variant = MatmulVariant::TensorCore;
    let Product { n, k, .. } = product;
    let run_log2 = check(client, layout, product, variant, tile)?;
    let m = group_rows(product.m);
    let column_tiles = m.div_ceil(8);
    let mut blueprint = TensorCoreBlueprint {
        scales: scale_blueprint(layout, run_log2, tile),
        sums: sums_blueprint(column_tiles, bias, tile),
        chunks: tile.chunks,
        // Each value compiles a kernel, so only few.
        x_rows: if m <= 8 {
            m.next_power_of_two()
        } else {
            8 * column_tiles
        },
        once: false,
        branch_parts: match product.dtype {
            FloatType::F16 => 2,
            FloatType::BF16 | FloatType::F32 => 1,
        },
    };
    // No cube without a stage.
    let stages = k.div_ceil(blueprint.stage_k());
    let stages_each = stages.div_ceil(tile.k_cubes);
    let k_cubes = stages.div_ceil(stages_each);
    let staged = (tile.chunks, tile.depth) == (1, 2);
    blueprint.once = stages_each == 1 && !staged;
    blueprint.sums.k_cubes = k_cubes;
    let units = blueprint.sums.units();
    check_cube(client, variant, tile, units, blueprint.shared_bytes())?;
    let fail = |reason| Err(impossible(variant, reason));
    let whole = blueprint.once && tile.chunks.is_multiple_of(tile.depth);
    if !(staged || whole) {
        return fail(format!("{tile:?} has sizes that do not go together"));
    }
    let row_cubes = n.div_ceil(blueprint.sums.cube_rows());
    if k_cubes > 1 && (row_cubes > MAX_COUNTERS || !has_device_scope(client)) {
        return fail(format!("{tile:?} shares what cubes cannot share"));
    }
    Ok(blueprint)
}

/// Rows of `x` of each launch but the last: groups as even as they can be.
pub(super) fn group_rows(m: usize) -> usize {
    m.div_ceil(m.div_ceil(TENSOR_CORE_ROWS).max(1))
}

/// Whether the device has the instruction, and the kernel knows its layout of fragments: NVIDIA's.
/// Low-rank branches always need bf16.
fn has_fragments(client: &Client, elem: ElemType) -> bool {
    let mma = &client.properties().features.matmul.mma;
    let has = |elem| {
        mma.contains(&MmaConfig {
            a_type: elem,
            b_type: elem,
            cd_type: ElemType::Float(FloatKind::F32),
            m: 16,
            n: 8,
            k: 16,
        })
    };
    client.name() == "cuda"
        && has(elem)
        && has(ElemType::Float(FloatKind::BF16))
        && client.properties().hardware.plane_size_max == 32
}

/// Whether the device has tensor cores that take rows of `k` elements of a weight, in `dtype`.
pub(crate) fn has_tensor_cores(client: &Client, dtype: FloatType, k: usize) -> bool {
    has_fragments(client, elem_type(dtype)) && k.is_multiple_of(32)
}

/// Whether what one cube writes can be made visible to another in the same launch.
fn has_device_scope(client: &Client) -> bool {
    client.properties().features.device_memory_scope
}

/// Cubes along the rows of a weight that may share their sums.
pub(super) const MAX_COUNTERS: usize = 4096;

/// What cubes that share the work along `k` have in common.
pub(super) struct SharedSums {
    /// Parts of sums, written and read in one launch.
    pub parts: Handle,
    /// Their length.
    pub words: usize,
    /// Cubes that have arrived, zero between launches.
    pub counters: Handle,
}

impl SharedSums {
    /// The buffers for a launch, if cubes share the work in it.
    pub fn new(client: &Client, n: usize, sums: &SumsBlueprint) -> Option<Self> {
        if sums.k_cubes == 1 {
            return None;
        }
        let words = 4 * n.div_ceil(sums.cube_rows()) * sums.k_cubes * sums.cube_vectors();
        let parts = client.empty(words * 4);
        Some(Self {
            counters: counters(client, &parts),
            parts,
            words,
        })
    }
}

/// Streams for which counters are kept. Streams belong to threads, and a program may start any number
/// of those.
const MAX_STREAMS: usize = 64;

/// Counters that are zero, one buffer for each stream of a device, here that of `parts`: launches in
/// a stream follow each other, and each leaves zeros behind.
fn counters(client: &Client, parts: &Handle) -> Handle {
    type Key = (DeviceId, TypeId, u64);
    static BUFFERS: Mutex<VecDeque<(Key, Handle)>> = Mutex::new(VecDeque::new());
    let service = parts.service;
    let key = (service.device, service.service, parts.stream.value);
    let mut buffers = BUFFERS.lock().unwrap_or_else(PoisonError::into_inner);
    let found = buffers.iter().position(|(found, _)| *found == key);
    let buffer = match found.and_then(|index| buffers.remove(index)) {
        Some((_, buffer)) => buffer,
        None => client.create_from_slice(&[0; MAX_COUNTERS * 4]),
    };
    // Those used last are at the end. A launch that is still to run keeps its own hold on a buffer.
    buffers.push_back((key, buffer.clone()));
    if buffers.len() > MAX_STREAMS {
        buffers.pop_front();
    }
    buffer
}

fn multiprocessors(client: &Client) -> usize {
    let hardware = &client.properties().hardware;
    hardware.num_streaming_multiprocessors.unwrap_or(1) as usize
}
