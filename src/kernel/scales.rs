//! The scales of a plane's rows, for the kernels that multiply on tensor cores.

use cubecl::prelude::*;

use super::decode::{PackedView, ScaleKind, opaque};
use crate::format::PackedLayout;

/// Elements along `k` of a chunk, the piece of its rows that a plane works on at a time.
pub const CHUNK: usize = 128;

/// Which scales a plane needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ScaleBlueprint {
    /// Base-2 logarithm of the block size.
    pub block_log2: u32,
    /// What the scales are.
    pub kind: ScaleKind,
    /// Base-2 logarithm of how many neighbouring elements of a row share a scale at least: 4, 5 or 6.
    pub run_log2: u32,
    /// Tiles of 16 rows that the plane works on.
    pub row_tiles: usize,
    /// Chunks whose scales are on their way at a time.
    pub depth: usize,
    /// Which of them a lane has: [`ScalePlace::of_sums`] or [`ScalePlace::in_order`].
    pub of_sums: bool,
}

impl ScaleBlueprint {
    /// Scales that a lane decodes for each chunk.
    pub const fn lane_scales(&self) -> usize {
        self.row_tiles << (6 - self.run_log2)
    }

    /// Base-2 logarithm of how many of them are of one row, one after the other.
    pub const fn row_scales_log2(&self) -> usize {
        match (self.of_sums, self.run_log2) {
            (true, run_log2) => 6 - run_log2 as usize,
            (false, 4) => 1,
            (false, _) => 0,
        }
    }

    /// Base-2 logarithm of how many rows of the tile lie from one of a lane's rows to the next.
    const fn rows_log2(&self) -> usize {
        match (self.of_sums, self.run_log2) {
            (true, _) | (false, 6) => 4,
            (false, _) => 3,
        }
    }

    /// Whether a scale is loaded with the first of its row: then one word has the codes of all.
    const fn is_shared(&self, e: usize) -> bool {
        self.kind.has_codes() && self.first_of_row(e) != e
    }

    const fn first_of_row(&self, e: usize) -> usize {
        e >> self.row_scales_log2() << self.row_scales_log2()
    }

    /// Where what is loaded for a scale is kept.
    const fn slot(&self, e: usize, d: usize) -> usize {
        let e = if self.is_shared(e) {
            self.first_of_row(e)
        } else {
            e
        };
        d * self.lane_scales() + e
    }
}

/// Which scale of a tile of 16 rows a lane decodes, of those in a chunk.
#[derive(CubeType)]
pub struct ScalePlace {
    /// The row in the tile.
    row: usize,
    /// Elements that the run is ahead of the chunk.
    run: usize,
}

#[cube]
impl ScalePlace {
    /// One row after the other. Where runs are 64 long, there are 32 scales: lane `2 row + run` has
    /// that of a row's run. Where they are 32 long, there are 64: lane `4 row + run` has that of the
    /// row and of the row eight below. Where they are 16 long, the lane has those of two runs.
    pub fn in_order(#[comptime] blueprint: ScaleBlueprint) -> Self {
        let lane = UNIT_POS_X as usize;
        let run_log2 = comptime!(u32::max(blueprint.run_log2, 5) as usize);
        ScalePlace {
            row: lane >> comptime!(7 - run_log2),
            run: (lane << run_log2) & comptime!(CHUNK - 1),
        }
    }

    /// As the sums of a product lie: lane `4 group + 2 half + run` has the scale of row
    /// `group + 8 half`, or where runs are shorter the scales of 64 elements of it.
    pub fn of_sums() -> Self {
        let lane = UNIT_POS_X as usize;
        ScalePlace {
            row: (lane >> 2usize) + ((lane & 2) << 2usize),
            run: (lane & 1) << 6usize,
        }
    }
}

/// A lane's share of a plane's scales, as they were loaded.
#[derive(CubeType)]
pub struct Scales {
    /// Elements of `W` whose scales these are, for a chunk at zero; or the scales of the rows, where tiles or
    /// rows have theirs.
    at: Array<usize>,
    /// Where the plane ends along `k`, less what the lane is ahead of its chunk.
    end: usize,
    /// Words with the code of each scale.
    codes: Array<u32>,
    /// Nested scales, or the scales themselves.
    absmax: Array<f32>,
}

#[cube]
impl Scales {
    /// Zeros; the plane's first row is `plane_row`, and it ends at `bound` along `k`.
    pub fn new(
        place: ScalePlace,
        plane_row: usize,
        bound: usize,
        n: usize,
        k: usize,
        #[comptime] blueprint: ScaleBlueprint,
    ) -> Self {
        let rows_log2 = comptime!(blueprint.rows_log2());
        let each_log2 = comptime!(blueprint.row_scales_log2());
        let mut at = Array::<usize>::new(comptime!(blueprint.lane_scales()));
        #[unroll]
        for e in 0..comptime!(blueprint.lane_scales()) {
            let row = place.row + comptime!((e >> each_log2) << rows_log2);
            let run = comptime!((e & ((1 << each_log2) - 1)) << blueprint.run_log2);
            let row = usize::min(plane_row + row, n - 1);
            if comptime!(blueprint.kind.goes_by_rows()) {
                at[e] = first_of_row(row, k, blueprint);
            } else {
                at[e] = row * k + place.run + run;
            }
        }
        let slots = comptime!(blueprint.lane_scales() * blueprint.depth);
        let mut codes = Array::<u32>::new(slots);
        let mut absmax = Array::<f32>::new(slots);
        #[unroll]
        for slot in 0..slots {
            codes[slot] = 0u32;
            absmax[slot] = 0.0f32;
        }
        Scales {
            at,
            end: usize::saturating_sub(bound, place.run),
            codes,
            absmax,
        }
    }

    /// Loads those of the chunk at `at` into slot `d`; past the end of the plane, where `x` is zero,
    /// the slot stays as it is or is cleared.
    pub fn load(
        &mut self,
        words: &[u32],
        view: &PackedView,
        at: usize,
        #[comptime] d: usize,
        #[comptime] clear: bool,
        #[comptime] blueprint: ScaleBlueprint,
    ) {
        let inside = at < self.end;
        #[unroll]
        for e in 0..comptime!(blueprint.lane_scales()) {
            let slot = comptime!(blueprint.slot(e, d));
            let loads = comptime!(!blueprint.is_shared(e));
            if comptime!(clear && loads) {
                self.codes[slot] = 0u32;
                self.absmax[slot] = 0.0f32;
            }
            if comptime!(loads) && inside {
                let mut block = (self.at[e] + at) >> comptime!(blueprint.block_log2 as usize);
                if comptime!(blueprint.kind.goes_by_rows()) {
                    block = self.at[e] + tile_of(at, blueprint);
                }
                if comptime!(!blueprint.kind.has_codes()) {
                    self.absmax[slot] = f32::reinterpret(words[view.scales + block]);
                } else {
                    self.codes[slot] = words[view.scales + (block >> 2usize)];
                }
                if comptime!(blueprint.kind.nested_log2().is_some()) {
                    let nested_log2 = comptime!(blueprint.kind.nested_log2().unwrap_or(0) as usize);
                    let nested_block = block >> nested_log2;
                    self.absmax[slot] = f32::reinterpret(
                        words
                            [view.codebook + comptime!(PackedLayout::NESTED_SCALES) + nested_block],
                    );
                }
            }
        }
    }

    /// The lane's `e`-th scale of the chunk at `at` in slot `d`.
    pub fn decode(
        &self,
        at: usize,
        map: &ScaleMap,
        #[comptime] e: usize,
        #[comptime] d: usize,
        #[comptime] blueprint: ScaleBlueprint,
    ) -> f32 {
        let slot = comptime!(blueprint.slot(e, d));
        let mut scale = self.absmax[slot];
        if comptime!(blueprint.kind.has_codes()) {
            let block = (self.at[e] + at) >> comptime!(blueprint.block_log2 as usize);
            let code = (self.codes[slot] >> ((block as u32 & 3) * 8)) & 255;
            let value = map.values[map.first + code as usize];
            if comptime!(blueprint.kind.nested_log2().is_some()) {
                scale = opaque(value * scale, map.zero) + map.offset;
            } else {
                scale = value;
            }
        }
        scale
    }
}

/// The first scale of a row, where tiles or rows have theirs.
#[cube]
fn first_of_row(row: usize, k: usize, #[comptime] blueprint: ScaleBlueprint) -> usize {
    let wide = comptime!(1usize << blueprint.block_log2);
    #[comptime]
    match blueprint.kind {
        ScaleKind::Tile { rows_log2, .. } => {
            (row >> comptime!(rows_log2 as usize)) * k.div_ceil(wide)
        }
        _ => row,
    }
}

/// The tile of a row that the chunk at `at` is in.
#[cube]
fn tile_of(at: usize, #[comptime] blueprint: ScaleBlueprint) -> usize {
    #[comptime]
    match blueprint.kind {
        ScaleKind::Tile { .. } => at >> comptime!(blueprint.block_log2 as usize),
        _ => 0usize.runtime(),
    }
}

/// The offset of a weight's nested scales, zero where scales are flat.
#[cube]
pub fn load_offset(words: &[u32], view: &PackedView, #[comptime] blueprint: ScaleBlueprint) -> f32 {
    let mut offset = 0.0f32;
    if comptime!(blueprint.kind.nested_log2().is_some()) {
        let at = view.codebook + comptime!(PackedLayout::NESTED_OFFSET);
        offset = f32::reinterpret(words[at]);
    }
    offset
}

/// What turns codes of scales into scales, with the values in shared memory: the map of one weight, or those
/// of several, of which each plane uses one.
#[derive(CubeType)]
pub struct ScaleMap {
    values: Shared<[f32]>,
    /// A unit's share of the maps, on its way there.
    share: Array<u32>,
    /// Where the plane's map starts.
    first: usize,
    offset: f32,
    zero: u32,
}

/// Values of a map.
const MAP: usize = PackedLayout::NESTED_MAP_WORDS;

#[cube]
impl ScaleMap {
    /// Room for so many maps.
    pub fn new(zero: u32, #[comptime] maps: usize, #[comptime] units: usize) -> Self {
        ScaleMap {
            values: Shared::new_slice(comptime!(maps * MAP)),
            share: Array::new(comptime!(maps * MAP.div_ceil(units))),
            first: 0usize.runtime(),
            offset: 0.0f32,
            zero,
        }
    }

    /// Loads a unit's share of the map of a packed weight into a slot; [`store`](Self::store) puts it into
    /// shared memory.
    pub fn load(
        &mut self,
        words: &[u32],
        view: &PackedView,
        #[comptime] slot: usize,
        #[comptime] units: usize,
        #[comptime] blueprint: ScaleBlueprint,
    ) {
        let shares = comptime!(MAP.div_ceil(units));
        if comptime!(blueprint.kind.has_codes()) {
            #[unroll]
            for s in 0..shares {
                let i = (UNIT_POS as usize + comptime!(s * units)) & comptime!(MAP - 1);
                self.share[comptime!(slot * shares + s)] =
                    words[view.codebook + comptime!(PackedLayout::NESTED_MAP) + i];
            }
        }
    }

    /// Has the plane use the map in a slot, with the offset of its weight.
    pub fn select(&mut self, slot: usize, offset: f32) {
        self.first = slot * MAP;
        self.offset = offset;
    }

    /// The caller puts a barrier behind it.
    pub fn store(
        &mut self,
        #[comptime] maps: usize,
        #[comptime] units: usize,
        #[comptime] blueprint: ScaleBlueprint,
    ) {
        let shares = comptime!(MAP.div_ceil(units));
        if comptime!(blueprint.kind.has_codes()) {
            #[unroll]
            for slot in 0..maps {
                #[unroll]
                for s in 0..shares {
                    let i = UNIT_POS as usize + comptime!(s * units);
                    if i < MAP {
                        self.values[i + comptime!(slot * MAP)] =
                            f32::reinterpret(self.share[comptime!(slot * shares + s)]);
                    }
                }
            }
        }
    }
}
