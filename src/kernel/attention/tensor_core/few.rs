//! Attention of a few queries, as when a model generates: bound by the bandwidth of keys and values.
//!
//! Each plane has 16 rows and goes over keys of its own; nothing is shared before the end. Keys and values
//! come from global memory straight into registers, 16 bytes a lane: the order of a sum's terms is free
//! as long as both operands agree, and so is the order of columns, so that lanes take neighbours and
//! pass them on as the instruction wants them. What planes and cubes found is put together at the end,
//! by the last cube to arrive.
//!
//! Source: splitting keys between cubes is Flash-Decoding (Dao et al., 2023).

use cubecl::cmma::MmaDefinition;
use cubecl::prelude::*;

use super::tiles::zeros;
use super::{FlashStrides, LOWEST, capped, hidden, range_of, score_scale};
use crate::kernel::attention::AttentionView;

/// Rows of a cube.
const ROWS: usize = 16;

/// Keys that a plane takes at a time.
const KEYS: usize = 32;

/// What forks the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FewBlueprint {
    /// Elements of a head, a multiple of 32.
    pub head_dim: usize,
    /// Planes of a cube.
    pub planes: usize,
    /// Heads of queries that share one of keys and values.
    pub group: usize,
    /// Whether scores are capped.
    pub softcap: bool,
    /// Whether cubes share the keys of a row.
    pub shared: bool,
}

impl FewBlueprint {
    /// Rows of a cube.
    pub const ROWS: usize = ROWS;

    /// Cubes that share the keys of a row at most: two for each lane.
    pub const MAX_SPLITS: usize = 64;

    /// Keys that a cube takes at a time.
    pub fn keys(&self) -> usize {
        KEYS * self.planes
    }

    /// Pieces of a head.
    fn pieces(&self) -> usize {
        self.head_dim / 8
    }

    /// Pieces of 64 elements, the last of which may be half of one.
    fn wide(&self) -> usize {
        self.head_dim.div_ceil(64)
    }

    /// Fours of neighbouring elements of a head.
    fn quads(&self) -> usize {
        self.head_dim / 4
    }

    /// Sums of a cube's rows, in fours.
    pub fn part(&self) -> usize {
        ROWS * self.quads()
    }

    /// Numbers in shared memory: sums, highest scores and totals of each plane, and later the factors of
    /// the parts.
    fn shared_numbers(&self) -> usize {
        let planes = self.planes * ROWS * (self.head_dim + 2);
        planes.max(ROWS * Self::MAX_SPLITS)
    }

    /// Bytes of shared memory.
    pub fn shared_bytes(&self) -> usize {
        4 * self.shared_numbers() + 4
    }
}

/// The output and the log-sum-exp.
///
/// - Cubes along x share the keys of a row, those along y have a head of keys of a row of the batch and
///   16 rows.
/// - `parts`: `[cubes along y, splits, part]`; `part_stats`: `[cubes along y, splits, 16]` of the highest
///   score and the total; `counters`: one for each cube along y, zero before and after; all unused unless
///   `blueprint.shared`
#[cube(launch_unchecked, address_type = "dynamic")]
// One `if` is the compiler's, the other the kernel's.
#[allow(clippy::too_many_arguments, clippy::collapsible_if)]
pub fn attention_few_kernel<F: Float>(
    q: &[Vector<u32, Const<4>>],
    k: &[Vector<u32, Const<4>>],
    v: &[Vector<u32, Const<4>>],
    ranges: &[i32],
    out: &mut [Vector<F, Const<4>>],
    lse: &mut [f32],
    parts: &mut [Vector<f32, Const<4>>],
    part_stats: &mut [Vector<f32, Const<2>>],
    counters: &[Atomic<u32>],
    strides: FlashStrides,
    view: AttentionView,
    splits: usize,
    #[comptime] blueprint: FewBlueprint,
    #[define(F)] _dtype: ElemType,
) {
    let group = comptime!(blueprint.group);
    let pieces = comptime!(blueprint.pieces());
    let wide = comptime!(blueprint.wide());
    let head_dim = comptime!(blueprint.head_dim);
    let planes = comptime!(blueprint.planes);
    let lane = UNIT_POS_X as usize;
    let plane = UNIT_POS_Y as usize;
    let (line, member) = (lane >> 2, lane & 3);

    let rows = view.queries * group;
    let row_tiles = rows.div_ceil(ROWS.runtime());
    let target = CUBE_POS_Y as usize;
    let first_row = target % row_tiles * ROWS;
    let kv_head = target / row_tiles % view.kv_heads;
    let batch = target / row_tiles / view.kv_heads;
    let last_row = usize::min(first_row + ROWS, rows) - 1;

    // The part of the keys that is this cube's.
    let (first_key, _) = range_of(ranges, batch, first_row / group, &view);
    let (_, end_key) = range_of(ranges, batch, last_row / group, &view);
    let split = CUBE_POS_X as usize;
    let mut length = 0usize.runtime();
    if end_key > first_key {
        length = (end_key - first_key) as usize;
    }
    let cube_keys = comptime!(blueprint.keys());
    let each =
        usize::max(length.div_ceil(splits), 1usize).div_ceil(cube_keys.runtime()) * cube_keys;
    let busy = usize::max(length.div_ceil(each), 1usize);
    if split >= busy {
        terminate!();
    }
    let start = first_key as usize + split * each;
    let end = usize::min(start + each, first_key as usize + length);

    let mut shared = Shared::<[f32]>::new_slice(comptime!(blueprint.shared_numbers()));
    let mut arrived = Shared::<u32>::new();

    // A lane has pieces `member`, `member + 4`, … of rows `line` and `line + 8`.
    let mut queries = Array::<Vector<u32, Const<4>>>::new(comptime!(2 * pieces / 4));
    let mut firsts = Array::<u32>::new(2usize);
    let mut ends = Array::<u32>::new(2usize);
    #[unroll]
    for i in 0..2usize {
        let row = usize::min(first_row + line + comptime!(8 * i), rows - 1);
        let (query, head) = (row / group, kv_head * group + row % group);
        let (first, end) = range_of(ranges, batch, query, &view);
        firsts[i] = first;
        ends[i] = end;
        let from = strides.q.start(batch, query, head) + member;
        #[unroll]
        for j in 0..comptime!(pieces / 4) {
            queries[comptime!(2 * j + i)] = q[from + comptime!(4 * j)];
        }
    }

    let def = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    let scale = score_scale(&view, comptime!(blueprint.softcap));
    let mut sums = zeros(comptime!(8 * wide));
    let mut highest = Array::<f32>::new(2usize);
    let mut totals = Array::<f32>::new(2usize);
    #[unroll]
    for i in 0..2usize {
        highest[i] = f32::new(LOWEST);
        totals[i] = 0.0f32;
    }
    let of_k = strides.k.start(batch, 0usize, kv_head) + member;
    let of_v = strides.v.start(batch, 0usize, kv_head);

    let mut at = start + plane * KEYS;
    while at < end {
        let mut keys = Array::<Vector<u32, Const<4>>>::new(comptime!(KEYS / 8 * pieces / 4));
        #[unroll]
        for tile in 0..comptime!(KEYS / 8) {
            let key = usize::min(at + line + comptime!(8 * tile), end - 1);
            let from = of_k + key * strides.k.token;
            #[unroll]
            for j in 0..comptime!(pieces / 4) {
                keys[comptime!(tile * pieces / 4 + j)] = k[from + comptime!(4 * j)];
            }
        }
        // Of each sixteen keys those whose probabilities a lane has.
        let mut values = Array::<Vector<u32, Const<4>>>::new(comptime!(KEYS / 4 * wide));
        #[unroll]
        for pair in 0..comptime!(KEYS / 8) {
            #[unroll]
            for i in 0..2usize {
                let key = usize::min(at + 2 * member + comptime!(8 * pair + i), end - 1);
                let from = of_v + key * strides.v.token;
                #[unroll]
                for j in 0..wide {
                    let mut piece = line + comptime!(8 * j);
                    if comptime!(8 * (j + 1) > pieces) {
                        piece = usize::min(piece, comptime!(pieces - 1).runtime());
                    }
                    values[comptime!((2 * pair + i) * wide + j)] = v[from + piece];
                }
            }
        }

        let mut scores = zeros(comptime!(KEYS / 8));
        #[unroll]
        for j in 0..comptime!(pieces / 4) {
            #[unroll]
            for half in 0..2usize {
                let mut lhs = Array::<Vector<F, Const<2>>>::new(4usize);
                #[unroll]
                for i in 0..4usize {
                    let piece = queries[comptime!(2 * j + i % 2)];
                    lhs[i] = Vector::reinterpret(piece.extract(comptime!(2 * half + i / 2)));
                }
                #[unroll]
                for tile in 0..comptime!(KEYS / 8) {
                    let piece = keys[comptime!(tile * pieces / 4 + j)];
                    let mut rhs = Array::<Vector<F, Const<2>>>::new(2usize);
                    #[unroll]
                    for i in 0..2usize {
                        rhs[i] = Vector::reinterpret(piece.extract(comptime!(2 * half + i)));
                    }
                    def.execute_inplace(&lhs, &rhs, scores.index_mut(tile));
                }
            }
        }

        let column = at as u32 + 2 * (UNIT_POS_X & 3);
        #[unroll]
        for tile in 0..comptime!(KEYS / 8) {
            let column = column + comptime!((8 * tile) as u32);
            let scores = scores.index_mut(tile);
            #[unroll]
            for i in 0..2usize {
                let mut two = scores[i];
                if comptime!(blueprint.softcap) {
                    two = capped(two, scale, view.softcap);
                } else {
                    two *= Vector::new(scale);
                }
                // A key past the end is the last one once more, which the next cube may have.
                let end = u32::min(ends[i], end as u32);
                scores[i] = hidden(two, column, firsts[i], end);
            }
        }
        #[unroll]
        for i in 0..2usize {
            let mut high = highest[i];
            #[unroll]
            for tile in 0..comptime!(KEYS / 8) {
                let two = scores.index(tile)[i];
                high = f32::max(high, f32::max(two.extract(0usize), two.extract(1usize)));
            }
            high = f32::max(high, plane_shuffle_xor(high, 1u32));
            high = f32::max(high, plane_shuffle_xor(high, 2u32));
            let factor = f32::exp(highest[i] - high);
            highest[i] = high;
            let mut total = totals[i] * factor;
            #[unroll]
            for tile in 0..comptime!(KEYS / 8) {
                let scores = scores.index_mut(tile);
                let two = scores[i];
                let mut powers = Vector::<f32, Const<2>>::new(0.0f32);
                #[unroll]
                for e in 0..2usize {
                    let power = f32::exp(two.extract(e) - high);
                    powers.insert(e, power);
                    total += power;
                }
                scores[i] = powers;
            }
            totals[i] = total;
            #[unroll]
            for tile in 0..comptime!(8 * wide) {
                let sum = sums.index_mut(tile);
                sum[i] *= Vector::new(factor);
            }
        }

        #[unroll]
        for step in 0..comptime!(KEYS / 16) {
            let mut lhs = Array::<Vector<F, Const<2>>>::new(4usize);
            #[unroll]
            for i in 0..4usize {
                lhs[i] =
                    Vector::cast_from(scores.index(comptime!(2 * step + i / 2))[comptime!(i % 2)]);
            }
            #[unroll]
            for j in 0..wide {
                #[unroll]
                for e in 0..8usize {
                    let mut rhs = Array::<Vector<F, Const<2>>>::new(2usize);
                    #[unroll]
                    for i in 0..2usize {
                        let from = comptime!((4 * step + 2 * i) * wide + j);
                        let first = values[from].extract(comptime!(e / 2));
                        let second = values[comptime!(from + wide)].extract(comptime!(e / 2));
                        let mut both = (first & 0xFFFF) | (second << 16);
                        if comptime!(e % 2 == 1) {
                            both = (first >> 16) | (second & 0xFFFF_0000);
                        }
                        rhs[i] = Vector::reinterpret(both);
                    }
                    def.execute_inplace(&lhs, &rhs, sums.index_mut(comptime!(8 * j + e)));
                }
            }
        }
        at += comptime!(KEYS * blueprint.planes);
    }

    // `[planes, 16, head_dim]` sums, then `[planes, 16]` highest scores and as many totals.
    let highs_at = comptime!(planes * ROWS * head_dim);
    let totals_at = comptime!(planes * ROWS * (head_dim + 1));
    #[unroll]
    for i in 0..2usize {
        let mut total = totals[i];
        total += plane_shuffle_xor(total, 1u32);
        total += plane_shuffle_xor(total, 2u32);
        let row = plane * ROWS + line + comptime!(8 * i);
        if member == 0 {
            shared[highs_at + row] = highest[i];
            shared[totals_at + row] = total;
        }
        #[unroll]
        for j in 0..wide {
            #[unroll]
            for e in 0..8usize {
                let two = sums.index(comptime!(8 * j + e))[i];
                #[unroll]
                for c in 0..2usize {
                    let column = (2 * member + c) * 8 + comptime!(64 * j + e);
                    if comptime!(64 * (j + 1) <= head_dim) || column < head_dim {
                        shared[row * head_dim + column] = two.extract(c);
                    }
                }
            }
        }
    }
    sync_cube();
    let quads = comptime!(blueprint.quads());
    let units = comptime!(32 * planes);
    let here = last_row + 1 - first_row;
    let mut alone = true.runtime();
    if comptime!(blueprint.shared) {
        alone = busy == 1;
    }
    let place = Place {
        batch,
        kv_head,
        first_row,
    };
    let part = target * splits + split;
    let mut i = UNIT_POS as usize;
    while i < here * quads {
        let (row, quad) = (i / quads, i % quads);
        let mut high = f32::new(LOWEST);
        #[unroll]
        for p in 0..planes {
            high = f32::max(high, shared[highs_at + row + comptime!(p * ROWS)]);
        }
        let mut total = 0.0f32.runtime();
        let mut sum = Vector::<f32, Const<4>>::new(0.0f32);
        #[unroll]
        for p in 0..planes {
            let other = row + comptime!(p * ROWS);
            let factor = f32::exp(shared[highs_at + other] - high);
            total += shared[totals_at + other] * factor;
            let mut four = Vector::<f32, Const<4>>::new(0.0f32);
            #[unroll]
            for e in 0..4usize {
                four.insert(e, shared[other * head_dim + 4 * quad + e]);
            }
            sum += four * Vector::new(factor);
        }
        if alone {
            let (log, inverse) = closed(high, total, &view);
            let to = place.row(row, &view, group) * quads + quad;
            out[to] = Vector::cast_from(sum * Vector::new(inverse));
            if quad == 0 {
                lse[place.number(row, &view, group)] = log;
            }
        } else {
            parts[part * comptime!(blueprint.part()) + i] = sum;
            if quad == 0 {
                let mut stats = Vector::<f32, Const<2>>::new(high);
                stats.insert(1usize, total);
                part_stats[part * ROWS + row] = stats;
            }
        }
        i += units;
    }
    if comptime!(blueprint.shared) {
        if !alone {
            sync_storage();
            if UNIT_POS == 0 {
                *arrived = counters[target].fetch_add(1u32);
            }
            sync_cube();
            if *arrived == busy as u32 - 1 {
                sync_storage();
                let first_part = target * splits;
                // A plane has a row, a lane two of its parts: the factor of each.
                let mut row = plane;
                while row < here {
                    let mut high = f32::new(LOWEST);
                    let mut highs = Array::<f32>::new(2usize);
                    let mut totals = Array::<f32>::new(2usize);
                    #[unroll]
                    for j in 0..2usize {
                        highs[j] = f32::new(LOWEST);
                        totals[j] = 0.0f32;
                        let s = lane + comptime!(32 * j);
                        if s < busy {
                            let stats = part_stats[(first_part + s) * ROWS + row];
                            highs[j] = stats.extract(0usize);
                            totals[j] = stats.extract(1usize);
                        }
                        high = f32::max(high, highs[j]);
                    }
                    high = plane_max(high);
                    let mut total = 0.0f32.runtime();
                    #[unroll]
                    for j in 0..2usize {
                        highs[j] = f32::exp(highs[j] - high);
                        total += highs[j] * totals[j];
                    }
                    total = plane_sum(total);
                    let (log, inverse) = closed(high, total, &view);
                    #[unroll]
                    for j in 0..2usize {
                        let to = row * comptime!(FewBlueprint::MAX_SPLITS) + lane;
                        shared[to + comptime!(32 * j)] = highs[j] * inverse;
                    }
                    if lane == 0 {
                        lse[place.number(row, &view, group)] = log;
                    }
                    row += planes;
                }
                sync_cube();
                let mut i = UNIT_POS as usize;
                while i < here * quads {
                    let (row, quad) = (i / quads, i % quads);
                    let mut sum = Vector::<f32, Const<4>>::new(0.0f32);
                    let mut at = 0usize.runtime();
                    while at < busy {
                        // Their loads are on their way together.
                        let mut loaded = Array::<Vector<f32, Const<4>>>::new(TOGETHER);
                        #[unroll]
                        for j in 0..TOGETHER {
                            let s = first_part + usize::min(at + j, busy - 1);
                            loaded[j] = parts[s * comptime!(blueprint.part()) + i];
                        }
                        #[unroll]
                        for j in 0..TOGETHER {
                            let mut factor = 0.0f32.runtime();
                            if at + j < busy {
                                factor = shared[row * comptime!(FewBlueprint::MAX_SPLITS) + at + j];
                            }
                            sum += loaded[j] * Vector::new(factor);
                        }
                        at += TOGETHER;
                    }
                    let to = place.row(row, &view, group) * quads + quad;
                    out[to] = Vector::cast_from(sum);
                    i += units;
                }
                if UNIT_POS == 0 {
                    counters[target].store(0u32);
                }
            }
        }
    }
}

/// Parts that a unit loads at once.
const TOGETHER: usize = 16;

/// The log-sum-exp of a row, and what its sums are multiplied with.
#[cube]
fn closed(high: f32, total: f32, view: &AttentionView) -> (f32, f32) {
    let mut log = view.nothing;
    let mut inverse = 0.0f32.runtime();
    if total > 0.0 {
        log = high + total.ln();
        inverse = 1.0 / total;
    }
    (log, inverse)
}

/// The rows of a cube.
#[derive(CubeType)]
struct Place {
    batch: usize,
    kv_head: usize,
    first_row: usize,
}

#[cube]
impl Place {
    /// Which of `[batch, queries, heads]` a row is.
    fn row(&self, row: usize, view: &AttentionView, #[comptime] group: usize) -> usize {
        let row = self.first_row + row;
        let token = self.batch * view.queries + row / group;
        (token * view.kv_heads + self.kv_head) * group + row % group
    }

    /// Which of `[batch, heads, queries]`.
    fn number(&self, row: usize, view: &AttentionView, #[comptime] group: usize) -> usize {
        let row = self.first_row + row;
        let head = (self.batch * view.kv_heads + self.kv_head) * group + row % group;
        head * view.queries + row / group
    }
}
