//! `grouped_gemv`: products of a few rows of `x` with the packed weights of the experts that each is sent to,
//! in one launch.
//!
//! Entries, pairs of a row of `x` and an expert, are grouped in the kernel: the first entry of an expert works
//! for the next ones of that expert too, so that a weight is decoded once for all of them, and the cubes of those
//! leave at once. Which they are a plane sees in a few loads of neighbouring ids; no second launch has to sort
//! them. The arithmetic is that of `gemv`, to the order of the sums.

use cubecl::prelude::*;

use super::decode::{DequantizeBlueprint, PackedView, block_scale, decode_vector, load_codebook};
use super::sums::{activated, opened};
use crate::activation::Activation;

/// What forks a compiled kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GroupedBlueprint {
    /// How a word is decoded.
    pub decode: DequantizeBlueprint,
    /// Entries of an expert that are multiplied with a row of its weight at once.
    pub columns: usize,
    /// Rows start at a word: `k` is a multiple of the codes in one.
    pub aligned: bool,
    /// The lanes of a plane add their sums up; without it a unit works alone.
    pub planes: bool,
    /// What joins the products with two weights.
    pub gate: Option<Activation>,
}

/// The weights of experts, `[n, k]` each.
#[derive(CubeType, CubeLaunch)]
pub struct GroupedWeight<F: Float> {
    /// All of them.
    pub packed: Box<[u32]>,
    /// `[experts, rows]`.
    pub bias: ComptimeOption<Box<[F]>>,
    /// Where the sections of an image are.
    pub view: PackedView,
    /// Words from the image of an expert to that of the next.
    pub image_stride: usize,
    /// Elements from an expert to the next within an image.
    pub elem_stride: usize,
    /// Rows of an expert's weight.
    pub rows: usize,
    /// The row of the weight for the first column of the result.
    pub first_row: usize,
    /// Rows from there to that for the next column.
    pub row_step: usize,
}

/// Sizes of the product.
#[derive(CubeType, CubeLaunch)]
pub struct GroupedSizes {
    /// Ids, the rows of the result.
    pub entries: usize,
    /// Entries that have a row of `x` in common.
    pub per_row: usize,
    /// The largest id that is an expert's and that the type of the ids can hold.
    pub last: usize,
    /// Columns of the result.
    pub n: usize,
    /// Columns of `x` and of the weights.
    pub k: usize,
    /// Columns of the result that a plane computes one after the other.
    pub steps: usize,
}

/// The entries of an expert that a cube works for.
#[derive(CubeType)]
struct Group {
    /// The entries.
    members: Array<usize>,
    /// Where the row of `x` of each begins.
    x_starts: Array<usize>,
    /// How many there are: none if another cube works for this one's entry.
    count: usize,
}

#[cube]
impl<F: Float> GroupedWeight<F> {
    /// Where the sections of the image of an expert are.
    fn view_of(&self, expert: usize) -> PackedView {
        let image = expert * self.image_stride;
        PackedView {
            start: self.view.start,
            len: self.view.len,
            scales: self.view.scales + image,
            codebook: self.view.codebook + image,
            row_blocks: self.view.row_blocks,
            zero: self.view.zero,
        }
    }
}

/// `y = x Wₑᵀ + bₑ` of each entry with its expert `e`, or with a gate `activation(x Wₑᵀ + bₑ)` times what opens
/// of `x Uₑᵀ + cₑ`.
///
/// - `x`: `[entries / per_row, k]` in vectors of `V`, which divides the codes of a word, and is one unless `k` is a
///   multiple of them; `ids`: `[entries]`; `weights`: one, or two with a gate; `out`: `[entries, n]`.
/// - The cube is `(lanes, rows)`. Lanes take the words of a row in turn. The cube's place along the grid gives a
///   range of `rows * steps` columns first, then the entry.
/// - Tails: words that a row shares with its neighbours are masked. An id is compared before it is converted: one
///   that is no expert's gives a row of NaN, and nothing outside of the weights is read.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn grouped_gemv_kernel<F: Float, V: Size, I: Int>(
    x: &[Vector<F, V>],
    ids: &[I],
    weights: Sequence<GroupedWeight<F>>,
    out: &mut [F],
    sizes: GroupedSizes,
    #[comptime] blueprint: GroupedBlueprint,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _ids_dtype: ElemType,
) {
    let columns = comptime!(blueprint.columns);
    let count = weights.len().comptime();
    let cubes = sizes.n.div_ceil(CUBE_DIM_Y as usize * sizes.steps);
    let entry = CUBE_POS / cubes;
    let mut row = CUBE_POS % cubes * sizes.steps * CUBE_DIM_Y as usize + UNIT_POS_Y as usize;

    let id = ids[usize::min(entry, sizes.entries - 1)];
    let inside = id >= I::from_int(0) && id <= I::cast_from(sizes.last);
    let mut expert = 0usize.runtime();
    if inside {
        expert = usize::cast_from(id);
    }
    let mut views = Sequence::<PackedView>::new();
    let mut tables = Sequence::<Shared<[f32]>>::new();
    #[unroll]
    for w in 0..count {
        let weight = weights.index(w);
        let view = weight.view_of(expert);
        tables.push(load_codebook(&weight.packed, &view, blueprint.decode));
        views.push(view);
    }
    if comptime!(blueprint.decode.shared) {
        sync_cube();
    }

    let group = group_of::<I>(ids, entry, &sizes, blueprint);
    // All planes of a cube have the same entry.
    if entry < sizes.entries && group.count > 0 {
        for _ in 0..sizes.steps {
            let mut sums = Array::<f32>::new(comptime!(columns * count));
            #[unroll]
            for c in 0..comptime!(columns * count) {
                sums[c] = 0.0f32;
            }
            if row < sizes.n && inside {
                #[unroll]
                for w in 0..count {
                    let weight = weights.index(w);
                    let (view, table) = (views.index(w), tables.index(w));
                    let at = weight.first_row + row * weight.row_step;
                    let start = expert * weight.elem_stride + at * sizes.k;
                    let image = expert * weight.image_stride;
                    let first = comptime!(w * columns);
                    add_products::<F, V>(
                        x,
                        &weight.packed,
                        view,
                        table,
                        &group,
                        &sizes,
                        image,
                        start,
                        &mut sums,
                        first,
                        blueprint,
                    );
                }
            }
            store::<F>(
                &weights, &mut sums, &group, out, &sizes, expert, row, inside, blueprint,
            );
            row += CUBE_DIM_Y as usize;
        }
    }
}

/// The entries that the cube of an entry works for: if it is the first of its expert, or has as many before it as
/// are taken at once, it and the next ones.
#[cube]
fn group_of<I: Int>(
    ids: &[I],
    entry: usize,
    sizes: &GroupedSizes,
    #[comptime] blueprint: GroupedBlueprint,
) -> Group {
    let columns = comptime!(blueprint.columns);
    let entries = sizes.entries;
    let mut members = Array::<usize>::new(columns);
    let mut count = 1usize.runtime();
    #[unroll]
    for c in 0..columns {
        members[c] = 0usize.runtime();
    }
    if comptime!(columns == 1) {
        members[0] = entry;
    } else {
        let id = ids[usize::min(entry, entries - 1)];
        let mut before = 0u32.runtime();
        let mut found = 0u32.runtime();
        let mut first = 0usize.runtime();
        while first < entries {
            let at = first + UNIT_POS_X as usize;
            let same = at < entries && ids[usize::min(at, entries - 1)] == id;
            let mut any = same;
            if comptime!(blueprint.planes) {
                any = plane_any(same);
            }
            if any {
                before += of_plane(select(same && at < entry, 1u32, 0u32), blueprint.planes);
                let later = select(same && at >= entry, 1u32, 0u32);
                let mut place = found;
                if comptime!(blueprint.planes) {
                    place += plane_exclusive_sum(later);
                }
                #[unroll]
                for c in 0..columns {
                    let is_it = later == 1 && place == comptime!(c as u32);
                    let member = of_plane(select(is_it, at as u32, 0u32), blueprint.planes);
                    members[c] += member as usize;
                }
                found += of_plane(later, blueprint.planes);
            }
            first += CUBE_DIM_X as usize;
        }
        let beside = before % comptime!(columns as u32);
        count = usize::min(found as usize, columns);
        if beside != 0 {
            count = 0usize.runtime();
        }
    }
    let mut x_starts = Array::<usize>::new(columns);
    #[unroll]
    for c in 0..columns {
        x_starts[c] = members[c] / sizes.per_row * sizes.k;
    }
    Group {
        members,
        x_starts,
        count,
    }
}

/// The sum of the values of a plane.
#[cube]
fn of_plane(value: u32, #[comptime] planes: bool) -> u32 {
    if comptime!(planes) {
        plane_sum(value)
    } else {
        value
    }
}

/// Adds a lane's products of the members' rows of `x` with a row of a weight, which begins at element `start` of
/// the image at word `image`, to the sums from `first` on.
#[cube]
#[allow(clippy::too_many_arguments)]
fn add_products<F: Float, V: Size>(
    x: &[Vector<F, V>],
    packed: &[u32],
    view: &PackedView,
    table: &Shared<[f32]>,
    group: &Group,
    sizes: &GroupedSizes,
    image: usize,
    start: usize,
    sums: &mut Array<f32>,
    #[comptime] first: usize,
    #[comptime] blueprint: GroupedBlueprint,
) {
    let vector = V::value().comptime();
    let columns = comptime!(blueprint.columns);
    let block_log2 = comptime!(blueprint.decode.block_log2 as usize);
    let word_elems = comptime!(blueprint.decode.codes_a_word());
    // A word can have codes of more than one block.
    let many_blocks = comptime!((1usize << blueprint.decode.block_log2) < word_elems);
    let kind = comptime!(blueprint.decode.scales);
    let end = start + sizes.k;
    let mut word_at = start / word_elems + UNIT_POS_X as usize;
    while word_at * word_elems < end {
        let word = packed[image + word_at];
        let element = word_at * word_elems;
        let mut scale = 0.0f32;
        if comptime!(!many_blocks) {
            scale = block_scale(packed, view, element >> block_log2, kind);
        }
        #[unroll]
        for v in 0..comptime!(word_elems / vector) {
            let at = element + comptime!(v * vector);
            if comptime!(blueprint.aligned) || (at >= start && at < end) {
                if comptime!(many_blocks) {
                    scale = block_scale(packed, view, at >> block_log2, kind);
                }
                let decoded = decode_vector::<F, V>(
                    packed,
                    table,
                    view,
                    word,
                    word,
                    comptime!((v * vector) as u32).runtime(),
                    scale,
                    blueprint.decode,
                );
                let decoded = Vector::<f32, V>::cast_from(decoded);
                #[unroll]
                for c in 0..columns {
                    if comptime!(c == 0) || c < group.count {
                        let values = x[(group.x_starts[c] + at - start) / vector];
                        let products = decoded * Vector::<f32, V>::cast_from(values);
                        let mut sum = sums[comptime!(first + c)];
                        #[unroll]
                        for i in 0..vector {
                            sum += products.extract(i);
                        }
                        sums[comptime!(first + c)] = sum;
                    }
                }
            }
        }
        word_at += CUBE_DIM_X as usize;
    }
}

/// Adds the sums of a plane up and stores what becomes of them.
#[cube]
#[allow(clippy::too_many_arguments)]
fn store<F: Float>(
    weights: &Sequence<GroupedWeight<F>>,
    sums: &mut Array<f32>,
    group: &Group,
    out: &mut [F],
    sizes: &GroupedSizes,
    expert: usize,
    row: usize,
    inside: bool,
    #[comptime] blueprint: GroupedBlueprint,
) {
    let columns = comptime!(blueprint.columns);
    let count = weights.len().comptime();
    let zero = weights.index(0usize).view.zero;
    #[unroll]
    for c in 0..columns {
        let mut results = Array::<f32>::new(count);
        #[unroll]
        for w in 0..count {
            let mut sum = sums[comptime!(w * columns + c)];
            if comptime!(blueprint.planes) {
                sum = plane_sum(sum);
            }
            results[w] = sum;
        }
        if row < sizes.n && c < group.count && UNIT_POS_X == 0 {
            #[unroll]
            for w in 0..count {
                let weight = weights.index(w);
                let at = expert * weight.rows + weight.first_row + row * weight.row_step;
                #[comptime]
                match &weight.bias {
                    ComptimeOption::Some(bias) => results[w] += f32::cast_from(bias[at]),
                    ComptimeOption::None => {}
                }
            }
            let mut result = results[0];
            if comptime!(blueprint.gate.is_some()) {
                let activation = comptime!(blueprint.gate.unwrap());
                result = activated(results[0], activation)
                    * opened(results[comptime!(count - 1)], activation);
            }
            if !inside {
                // Not a constant: WGSL has no literal for it.
                result = f32::reinterpret(comptime!(f32::NAN.to_bits()) ^ zero);
            }
            out[group.members[c] * sizes.n + row] = F::cast_from(result);
        }
    }
}
