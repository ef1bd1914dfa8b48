//! The blueprints of the two kernels on tensor cores, and what their cubes share.

use std::any::TypeId;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use cubecl::device::DeviceId;
use cubecl::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::elem_type;
use super::product::Product;
use super::strategy::MatmulVariant;
use super::tile::{TENSOR_CORE_ROWS, TensorCoreTile, TileRule};
use crate::error::Nf4Error;
use crate::format::{FloatType, PackedLayout};
use crate::kernel::decode::ScaleKind;
use crate::kernel::levels::{Joined, LevelsBlueprint};
use crate::kernel::scales::{CHUNK, ScaleBlueprint};
use crate::kernel::sums::SumsBlueprint;
use crate::kernel::tensor_core_blueprint::TensorCoreBlueprint;

/// Elements of a row up to which [`LevelsBlueprint::paired`] pays: measured at 4096, where it gains,
/// and at 14336, where it loses.
const MAX_PAIRED_K: usize = 8192;

impl TensorCoreTile {
    /// The tile of [`MatmulVariant::TensorCore`] that suits a product on a device, by what was
    /// fastest on an H100 (`benches/NOTES.md`).
    pub fn for_product(client: &Client, layout: &PackedLayout, product: Product) -> Self {
        let order = match product.m {
            0..=16 => [Self::whole, Self::wide, Self::narrow],
            17..=32 => [Self::wide, Self::narrow, Self::whole],
            _ => [Self::narrow, Self::wide, Self::whole],
        } as [TileRule; 3];
        let tiles = order.map(|rule| rule(client, &product));
        let fits = |tile: &&Self| blueprint(client, layout, product, false, **tile).is_ok();
        *tiles.iter().find(fits).unwrap_or(&tiles[0])
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
    let config = layout.config();
    // Lanes load 32 codes at a time, and for `levels` have the scales of 64.
    let at_once = if levels { 6 } else { 5 };
    let block_log2 = config.block_size.log2();
    let whole = |log2: u32| k.is_multiple_of(1 << log2.max(at_once));
    let mut runs = [6, 5, 4].into_iter();
    let Some(run_log2) = runs.find(|&log2| log2 <= block_log2 && whole(log2)) else {
        let block = config.block_size.elems();
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
    joined: Joined,
    tile: TensorCoreTile,
) -> Result<LevelsBlueprint, Nf4Error> {
    let variant = MatmulVariant::Levels;
    let run_log2 = check(client, layout, product, variant, tile)?;
    let blueprint = LevelsBlueprint {
        scales: ScaleBlueprint {
            of_sums: true,
            ..scale_blueprint(layout, run_log2, tile)
        },
        code_bits: layout.config().quant_type.bits(),
        sums: sums_blueprint(1, false, tile),
        joined,
        paired: tile.depth == 2
            && run_log2 == 6
            && layout.config().nested_block_size.is_some()
            && product.k.is_multiple_of(2 * CHUNK)
            && product.k <= MAX_PAIRED_K,
        chunks: tile.chunks,
        wide: product.dtype == FloatType::BF16,
    };
    let gated = matches!(joined, Joined::Gated(_));
    if !tile.chunks.is_multiple_of(tile.depth) || gated && !tile.row_planes.is_multiple_of(2) {
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
        kind: ScaleKind::of(layout),
        run_log2,
        row_tiles: tile.row_tiles,
        depth: tile.depth,
        of_sums: false,
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
        code_bits: layout.config().quant_type.bits(),
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
pub(super) fn has_fragments(client: &Client, elem: ElemType) -> bool {
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
pub(super) fn has_device_scope(client: &Client) -> bool {
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
pub(super) fn counters(client: &Client, parts: &Handle) -> Handle {
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
