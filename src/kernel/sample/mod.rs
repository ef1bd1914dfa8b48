//! `sample`: the choice of a token from the logits of a row.
//!
//! Nothing is sorted. Top-k, top-p and the draw all look for the first token in an order with which a sum of
//! counts or of weights reaches a target. That is a radix select: a histogram over the first digit of the
//! order tells in which bin the token lies, one over the next digit of the tokens of that bin tells more, and
//! so on. Weights are integers (see [`crate::sampling`]), so that histograms by atomics are exact, and the same
//! each time.

pub(super) mod order;
mod search;
mod wide;

use cubecl::prelude::*;

use super::attention::wait;
use crate::sampling::{STATE_HEADER, TOO_FAR};
use order::{Digit, Prefix, Target, distance, everything, key_of, value_of, weight};
use search::{BINS, GROUPS, Run, Scratch, Search, add_group};
use wide::{Wide, philox};

/// What forks the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SampleBlueprint {
    /// Units of a cube, a power of two, at most [`LISTED`].
    pub units: usize,
    /// Whether the likeliest token is taken.
    pub greedy: bool,
    /// Whether there is a history.
    pub history: bool,
    /// Whether there are a most of tokens, and a probability to be reached.
    pub top_k: bool,
    pub top_p: bool,
    /// Whether units wait for each other; without it there is one.
    pub barriers: bool,
}

/// Sizes and constants, see [`SampleConstants`](crate::sampling::SampleConstants).
#[derive(CubeType, CubeLaunch, Debug, Clone, Copy)]
pub struct SampleView {
    /// Rows.
    pub rows: usize,
    /// Vectors of the logits of a row.
    pub vectors: usize,
    /// Words of the state of a row.
    pub state_words: usize,
    pub penalty: f32,
    pub inverse_penalty: f32,
    pub per_logit: f32,
    pub top_k: u32,
    pub top_p: u32,
    pub farthest: u32,
}

/// Tokens that are copied to shared memory where no more are left.
pub const LISTED: usize = 1024;
/// The smallest key that is no finite number, and the largest.
pub(super) const INFINITE: u32 = 0xff80_0000;
pub(super) const MINUS_INFINITE: u32 = 0x007f_ffff;

/// A row, and how far its choice has come.
#[derive(CubeType, Clone, Copy)]
struct Row {
    /// Where its logits start, in vectors, and its state.
    logits: usize,
    state: usize,
    /// The largest logit.
    largest: f32,
    random: Wide,
    /// Tokens up to this are kept.
    kept: Prefix,
    /// Whether a list has all tokens that can be kept, and how many it has.
    is_list: bool,
    listed: usize,
}

/// Chooses a token of each row; the host's [`sample`](crate::host::sample) says the same.
///
/// - `logits`: `[rows, vectors]`; `state`: `[rows, state_words]`, carried on; `ids`, `numbers`: `[rows]`, the
///   tokens, and how many were chosen before, or -1 with the token 0 where logits are not finite.
/// - A cube has a row. Its units walk over all logits for the largest and for the first histogram, and then,
///   where no more than [`LISTED`] tokens are left, over a list of these in shared memory.
#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
pub fn sample_kernel<F: Float, I: Int, N: Size>(
    logits: &[Vector<F, N>],
    state: &mut [u32],
    ids: &mut [I],
    numbers: &mut [I],
    view: SampleView,
    #[comptime] blueprint: SampleBlueprint,
    #[define(F)] _dtype: ElemType,
    #[define(I)] _int: ElemType,
) {
    let place = CUBE_POS;
    if place >= view.rows {
        terminate!();
    }
    let mut scratch = Scratch {
        keys: Shared::<[u32]>::new_slice(LISTED),
        ids: Shared::<[u32]>::new_slice(LISTED),
        bins: Shared::<[Atomic<u32>]>::new_slice(comptime!(3 * BINS + 1)),
        groups: Shared::<[u32]>::new_slice(comptime!(3 * GROUPS)),
        found: Shared::<[u32]>::new_slice(3usize),
    };
    let at_state = place * view.state_words;
    let mut row = Row {
        logits: place * view.vectors,
        state: at_state,
        largest: 0.0f32,
        random: philox(state, at_state),
        kept: everything(),
        is_list: false,
        listed: 0usize,
    };
    likeliest::<F, N>(logits, state, &mut row, &view, &mut scratch, blueprint);
    let key = scratch.keys[0usize];
    let mut id = scratch.ids[0usize];
    let finite = key > MINUS_INFINITE && key < INFINITE;
    if comptime!(!blueprint.greedy) {
        row.largest = value_of(key);
        // The list takes the place of what was just read.
        wait(blueprint.barriers);
        if comptime!(blueprint.top_k) {
            let target = comptime!(Target::TopK);
            let kept = reached::<F, N>(
                logits,
                state,
                &mut row,
                &view,
                &mut scratch,
                target,
                true,
                blueprint,
            );
            row.kept.set(&kept);
        }
        if comptime!(blueprint.top_p) {
            let target = comptime!(Target::TopP);
            let lists = comptime!(!blueprint.top_k);
            let kept = reached::<F, N>(
                logits,
                state,
                &mut row,
                &view,
                &mut scratch,
                target,
                lists,
                blueprint,
            );
            row.kept.set(&kept);
        }
        let target = comptime!(Target::Draw);
        let drawn = reached::<F, N>(
            logits,
            state,
            &mut row,
            &view,
            &mut scratch,
            target,
            false,
            blueprint,
        );
        id = drawn.id;
    }
    // Others may still read the state.
    wait(blueprint.barriers);
    if UNIT_POS == 0 {
        let number = state[row.state + 2];
        if finite {
            ids[place] = I::cast_from(id);
            numbers[place] = I::cast_from(number & 0x7fff_ffffu32);
            state[row.state + 2] = number + 1;
            if comptime!(blueprint.history) {
                let word = row.state + STATE_HEADER + (id / 32) as usize;
                state[word] |= 1u32 << (id & 31);
            }
        } else {
            ids[place] = I::cast_from(0i32);
            numbers[place] = I::cast_from(-1i32);
        }
    }
}

/// Puts the key and the id of the first of the likeliest tokens to the head of the list.
#[cube]
fn likeliest<F: Float, N: Size>(
    logits: &[Vector<F, N>],
    state: &mut [u32],
    row: &mut Row,
    view: &SampleView,
    scratch: &mut Scratch,
    #[comptime] blueprint: SampleBlueprint,
) {
    let vector = N::value().comptime();
    let units = comptime!(blueprint.units);
    let unit = UNIT_POS as usize;
    let mut key = 0u32;
    let mut id = 0u32;
    let mut i = unit;
    while i < view.vectors {
        let values = Vector::<f32, N>::cast_from(logits[row.logits + i]);
        let seen = history::<N>(state, row, i, blueprint);
        #[unroll]
        for e in 0..vector {
            let other = key_of(values.extract(e), (seen >> (e as u32)) & 1, view, blueprint);
            // Of equal ones this is the first that the unit meets.
            if other > key {
                key = other;
                id = (i * vector + e) as u32;
            }
        }
        i += units;
    }
    scratch.keys[unit] = key;
    scratch.ids[unit] = id;
    let steps = comptime!(units.ilog2() as usize);
    #[unroll]
    for step in 0..steps {
        let half = comptime!(units >> (step + 1));
        wait(blueprint.barriers);
        if unit < half {
            let other = scratch.keys[unit + half];
            let other_id = scratch.ids[unit + half];
            let mine = scratch.keys[unit];
            if other > mine || (other == mine && other_id < scratch.ids[unit]) {
                scratch.keys[unit] = other;
                scratch.ids[unit] = other_id;
            }
        }
    }
    wait(blueprint.barriers);
}

/// Which tokens of a vector the text has, as bits.
#[cube]
fn history<N: Size>(
    state: &mut [u32],
    row: &mut Row,
    i: usize,
    #[comptime] blueprint: SampleBlueprint,
) -> u32 {
    let vector = N::value().comptime();
    let mut seen = 0u32;
    if comptime!(blueprint.history) {
        let first = i * vector;
        seen = state[row.state + STATE_HEADER + first / 32] >> ((first as u32) & 31);
    }
    seen
}

/// The place in an order of the token that a sum over the tokens kept so far reaches its target with.
///
/// With `lists` the tokens that can be kept are listed as soon as they are few.
#[cube]
#[allow(clippy::too_many_arguments)]
fn reached<F: Float, N: Size>(
    logits: &[Vector<F, N>],
    state: &mut [u32],
    row: &mut Row,
    view: &SampleView,
    scratch: &mut Scratch,
    #[comptime] target: Target,
    #[comptime] lists: bool,
    #[comptime] blueprint: SampleBlueprint,
) -> Prefix {
    let unit = UNIT_POS as usize;
    let units = comptime!(blueprint.units);
    let mut chosen = everything();
    let mut search = Search::new();
    let mut done = 0u32;
    let mut level = 0u32;
    while level < comptime!(target.digits()) {
        let digit = Digit::new(level, target);
        let mut i = unit;
        while i < comptime!(3 * BINS + 1) {
            scratch.bins[i].store(0u32);
            i += units;
        }
        wait(blueprint.barriers);
        if done == 0 {
            count::<F, N>(
                logits,
                state,
                row,
                view,
                &mut chosen,
                &digit,
                scratch,
                target,
                blueprint,
            );
        }
        wait(blueprint.barriers);
        let mut group = unit;
        while group < GROUPS {
            add_group(group, scratch);
            group += units;
        }
        wait(blueprint.barriers);
        if unit == 0 && done == 0 {
            if level == 0 {
                search.set_target(view, &row.random, scratch, target);
            }
            search.find(scratch, target);
        }
        wait(blueprint.barriers);
        if done == 0 {
            chosen.extend(&digit, scratch.found[0usize], target);
            done = scratch.found[1usize];
        }
        if comptime!(lists) {
            let few = scratch.found[2usize] <= LISTED as u32;
            if level == 0 && few {
                list::<F, N>(logits, state, row, view, &mut chosen, scratch, blueprint);
                row.is_list = true.runtime();
                row.listed = scratch.found[2usize] as usize;
            }
            // The counter of the list is one of the bins.
            wait(blueprint.barriers);
        }
        level += 1;
    }
    chosen
}

/// Adds the tokens that are kept, and begin with the digits known, to the bins of the next digit.
#[cube]
#[allow(clippy::too_many_arguments, clippy::collapsible_if)]
fn count<F: Float, N: Size>(
    logits: &[Vector<F, N>],
    state: &mut [u32],
    row: &mut Row,
    view: &SampleView,
    chosen: &mut Prefix,
    digit: &Digit,
    scratch: &mut Scratch,
    #[comptime] target: Target,
    #[comptime] blueprint: SampleBlueprint,
) {
    let vector = N::value().comptime();
    let units = comptime!(blueprint.units);
    let unit = UNIT_POS as usize;
    let mut run = Run {
        bin: 0u32,
        count: 0u32,
        low: 0u32,
        high: 0u32,
    };
    if row.is_list {
        let mut i = unit;
        while i < row.listed {
            let (key, id) = (scratch.keys[i], scratch.ids[i]);
            visit(key, id, row, view, chosen, digit, &mut run, scratch, target);
            i += units;
        }
    } else {
        let mut i = unit;
        let mut step = units.runtime();
        if comptime!(target == Target::Draw) {
            if digit.level > 0 {
                // Only every 256th token has the first digit of the draw.
                let apart = comptime!(BINS / vector);
                i = (chosen.id & 255) as usize / vector + unit * apart;
                step = (units * apart).runtime();
            }
        }
        while i < view.vectors {
            let values = Vector::<f32, N>::cast_from(logits[row.logits + i]);
            let seen = history::<N>(state, row, i, blueprint);
            #[unroll]
            for e in 0..vector {
                let key = key_of(values.extract(e), (seen >> (e as u32)) & 1, view, blueprint);
                let id = (i * vector + e) as u32;
                visit(key, id, row, view, chosen, digit, &mut run, scratch, target);
            }
            i += step;
        }
    }
    run.flush(scratch);
}

#[cube]
#[allow(clippy::too_many_arguments)]
fn visit(
    key: u32,
    id: u32,
    row: &mut Row,
    view: &SampleView,
    chosen: &mut Prefix,
    digit: &Digit,
    run: &mut Run,
    scratch: &mut Scratch,
    #[comptime] target: Target,
) {
    let distance = distance(row.largest, view.per_logit, key);
    let mut farthest = comptime!(TOO_FAR - 1).runtime();
    if comptime!(target == Target::Draw) {
        farthest = view.farthest;
    }
    if distance <= farthest && chosen.begins(distance, key, id) && row.kept.keeps(distance, key, id)
    {
        run.add(
            digit.of(distance, key, id, target),
            weight(distance),
            scratch,
        );
    }
}

/// Lists the tokens up to a prefix.
#[cube]
fn list<F: Float, N: Size>(
    logits: &[Vector<F, N>],
    state: &mut [u32],
    row: &mut Row,
    view: &SampleView,
    kept: &mut Prefix,
    scratch: &mut Scratch,
    #[comptime] blueprint: SampleBlueprint,
) {
    let vector = N::value().comptime();
    let units = comptime!(blueprint.units);
    let mut i = UNIT_POS as usize;
    while i < view.vectors {
        let values = Vector::<f32, N>::cast_from(logits[row.logits + i]);
        let seen = history::<N>(state, row, i, blueprint);
        #[unroll]
        for e in 0..vector {
            let key = key_of(values.extract(e), (seen >> (e as u32)) & 1, view, blueprint);
            let distance = distance(row.largest, view.per_logit, key);
            let id = (i * vector + e) as u32;
            if distance < TOO_FAR && kept.keeps(distance, key, id) {
                let place = scratch.bins[comptime!(3 * BINS)].fetch_add(1u32) as usize;
                if place < LISTED {
                    scratch.keys[place] = key;
                    scratch.ids[place] = id;
                }
            }
        }
        i += units;
    }
}
