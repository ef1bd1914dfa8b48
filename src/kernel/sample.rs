//! `sample`: the choice of a token from the logits of a row.
//!
//! Nothing is sorted. Top-k, top-p and the draw all look for the first token in an order with which a sum of
//! counts or of weights reaches a target. That is a radix select: a histogram over the first digit of the
//! order tells in which bin the token lies, one over the next digit of the tokens of that bin tells more, and
//! so on. Weights are integers (see [`crate::sampling`]), so that histograms by atomics are exact, and the same
//! each time.

use cubecl::prelude::*;

use super::attention::wait;
use crate::sampling::{DISTANCE_UNITS, POWER, STATE_HEADER, TOO_FAR};

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

/// What a select looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Target {
    /// The last of a number of the likeliest tokens.
    TopK,
    /// The last of the likeliest tokens that reach a probability.
    TopP,
    /// The token that is drawn.
    Draw,
}

impl Target {
    /// Digits of the order: of the distance, the key and the id; or of the id alone.
    const fn digits(self) -> u32 {
        match self {
            Self::TopK | Self::TopP => 8,
            Self::Draw => 3,
        }
    }
}

/// Tokens that are copied to shared memory where no more are left.
pub const LISTED: usize = 1024;
/// Bins of a histogram.
const BINS: usize = 256;
/// Bins that are added up before it is searched.
const GROUP: usize = 16;
const GROUPS: usize = BINS / GROUP;
/// The smallest key that is no finite number, and the largest.
const INFINITE: u32 = 0xff80_0000;
const MINUS_INFINITE: u32 = 0x007f_ffff;

/// The shared memory of a cube.
#[derive(CubeType)]
struct Scratch {
    /// `[LISTED]`: keys and ids of tokens.
    keys: Shared<[u32]>,
    ids: Shared<[u32]>,
    /// `[3, BINS]`: counts, and the low and high words of sums of weights; and how many tokens are listed.
    bins: Shared<[Atomic<u32>]>,
    /// `[3, GROUPS]`: the same of groups.
    groups: Shared<[u32]>,
    /// What a search has found: the digit, whether that is all, and how many tokens there are up to its bin.
    found: Shared<[u32]>,
}

/// A row.
#[derive(CubeType, Clone, Copy)]
struct Row {
    /// Where its logits start, in vectors, and its state.
    logits: usize,
    state: usize,
    /// The largest logit.
    largest: f32,
}

/// The tokens that are walked over: those listed, or all.
#[derive(CubeType, Clone, Copy)]
struct Walk {
    is_list: bool,
    listed: usize,
}

/// The first digits of a place in an order. An order by rank has a digit of the distance first, which spreads
/// tokens better than the keys do, then those of the key, then those of the id.
#[derive(CubeType, Clone, Copy)]
struct Prefix {
    near: u32,
    near_mask: u32,
    key: u32,
    key_mask: u32,
    id: u32,
    id_mask: u32,
}

/// Where the next digit lies.
#[derive(CubeType, Clone, Copy)]
struct Digit {
    level: u32,
    key_shift: u32,
    id_shift: u32,
}

/// A number of 64 bits.
#[derive(CubeType, Clone, Copy)]
struct Wide {
    low: u32,
    high: u32,
}

/// Tokens of one bin that a unit has met one after the other: they are added at once.
#[derive(CubeType, Clone, Copy)]
struct Run {
    bin: u32,
    count: u32,
    low: u32,
    high: u32,
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
    let mut row = Row {
        logits: place * view.vectors,
        state: place * view.state_words,
        largest: 0.0f32,
    };
    likeliest::<F, N>(logits, state, &mut row, &view, &mut scratch, blueprint);
    let key = scratch.keys[0usize];
    let mut id = scratch.ids[0usize];
    let finite = key > MINUS_INFINITE && key < INFINITE;
    if comptime!(!blueprint.greedy) {
        row.largest = value_of(key);
        let random = philox(state, row.state);
        let mut kept = everything();
        let mut walk = Walk {
            is_list: false,
            listed: 0usize,
        };
        // The list takes the place of what was just read.
        wait(blueprint.barriers);
        if comptime!(blueprint.top_k) {
            let next = select_prefix::<F, N>(
                logits,
                state,
                &mut row,
                &view,
                &mut kept,
                &mut walk,
                &random,
                &mut scratch,
                Target::TopK,
                true,
                blueprint,
            );
            kept.set(&next);
        }
        if comptime!(blueprint.top_p) {
            let next = select_prefix::<F, N>(
                logits,
                state,
                &mut row,
                &view,
                &mut kept,
                &mut walk,
                &random,
                &mut scratch,
                Target::TopP,
                comptime!(!blueprint.top_k),
                blueprint,
            );
            kept.set(&next);
        }
        let drawn = select_prefix::<F, N>(
            logits,
            state,
            &mut row,
            &view,
            &mut kept,
            &mut walk,
            &random,
            &mut scratch,
            Target::Draw,
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

/// An integer in the order of the logits after the penalty: zeros are equal, NaN is above all.
#[cube]
fn key_of(logit: f32, seen: u32, view: &SampleView, #[comptime] blueprint: SampleBlueprint) -> u32 {
    let mut value = logit;
    if comptime!(blueprint.history) {
        if seen == 1 {
            value = logit * select(logit < 0.0f32, view.penalty, view.inverse_penalty);
        }
    }
    let bits = u32::reinterpret(value);
    let magnitude = bits & 0x7fff_ffffu32;
    let signed = select(
        bits == magnitude,
        bits ^ 0x8000_0000u32,
        bits ^ 0xffff_ffffu32,
    );
    let key = select(magnitude == 0, 0x8000_0000u32, signed);
    select(magnitude > 0x7f80_0000u32, 0xffff_ffffu32, key)
}

/// The logit after the penalty, from its integer: a product that was rounded, which a compiler could not join
/// with the difference that it goes into.
#[cube]
fn value_of(key: u32) -> f32 {
    f32::reinterpret(select(
        key >= 0x8000_0000u32,
        key ^ 0x8000_0000u32,
        key ^ 0xffff_ffffu32,
    ))
}

#[cube]
fn distance(row: &mut Row, view: &SampleView, key: u32) -> u32 {
    let logarithm = (row.largest - value_of(key)) * view.per_logit;
    u32::cast_from(f32::min(logarithm, 31.0f32) * comptime!(DISTANCE_UNITS as f32))
}

/// 2^31 times 2 to the power of minus a distance.
#[cube]
fn weight(distance: u32) -> u32 {
    let whole = distance / DISTANCE_UNITS;
    let part = (distance & comptime!(DISTANCE_UNITS - 1)) << 6u32;
    let mut sum = comptime!(POWER[6]).runtime();
    #[unroll]
    for i in 0..6usize {
        let term = comptime!(POWER[5 - i]);
        sum = term - part.mul_hi(sum);
    }
    let lost = part.mul_hi(sum);
    (0x8000_0000u32 - (lost + 1) / 2) >> whole
}

#[cube]
fn everything() -> Prefix {
    Prefix {
        near: 0u32,
        near_mask: 0u32,
        key: 0u32,
        key_mask: 0u32,
        id: 0u32,
        id_mask: 0u32,
    }
}

/// The first digit of an order by rank.
#[cube]
fn near_digit(distance: u32) -> u32 {
    distance >> 23u32
}

#[cube]
impl Prefix {
    /// Whether a token has these digits.
    fn begins(&self, distance: u32, key: u32, id: u32) -> bool {
        ((near_digit(distance) ^ self.near) & self.near_mask) == 0
            && ((key ^ self.key) & self.key_mask) == 0
            && ((id ^ self.id) & self.id_mask) == 0
    }

    /// Whether a token has these digits, or lies before those that have, in an order by rank.
    fn keeps(&self, distance: u32, key: u32, id: u32) -> bool {
        let near = near_digit(distance) & self.near_mask;
        let key = key & self.key_mask;
        let id = id & self.id_mask;
        near < self.near
            || (near == self.near && (key > self.key || (key == self.key && id <= self.id)))
    }

    /// Takes one more digit.
    fn extend(&mut self, digit: &Digit, value: u32, #[comptime] target: Target) {
        if comptime!(target == Target::Draw) {
            self.id |= value << digit.id_shift;
            self.id_mask |= 255u32 << digit.id_shift;
        } else {
            if digit.level == 0 {
                self.near = value;
                self.near_mask = 255u32.runtime();
            } else if digit.level <= 4 {
                self.key |= (255u32 - value) << digit.key_shift;
                self.key_mask |= 255u32 << digit.key_shift;
            } else {
                self.id |= value << digit.id_shift;
                self.id_mask |= 255u32 << digit.id_shift;
            }
        }
    }

    fn set(&mut self, other: &Prefix) {
        self.near = other.near;
        self.near_mask = other.near_mask;
        self.key = other.key;
        self.key_mask = other.key_mask;
        self.id = other.id;
        self.id_mask = other.id_mask;
    }
}

#[cube]
impl Digit {
    fn new(level: u32, #[comptime] target: Target) -> Digit {
        let mut key_shift = 0u32;
        let mut id_shift = 0u32;
        if comptime!(target == Target::Draw) {
            // The last digit first: units next to each other have bins next to each other.
            id_shift = level * 8;
        } else {
            if level >= 1 && level <= 4 {
                key_shift = 32u32 - level * 8;
            }
            if level >= 5 {
                id_shift = 56u32 - level * 8;
            }
        }
        Digit {
            level,
            key_shift,
            id_shift,
        }
    }

    fn of(&self, distance: u32, key: u32, id: u32, #[comptime] target: Target) -> u32 {
        let mut digit = (id >> self.id_shift) & 255u32;
        if comptime!(target != Target::Draw) {
            if self.level == 0 {
                digit = near_digit(distance);
            } else if self.level <= 4 {
                digit = 255u32 - ((key >> self.key_shift) & 255u32);
            }
        }
        digit
    }
}

#[cube]
impl Run {
    /// Adds a token.
    fn add(&mut self, bin: u32, weight: u32, scratch: &mut Scratch) {
        if bin != self.bin {
            self.flush(scratch);
            self.bin = bin;
        }
        self.count += 1;
        self.low += weight;
        self.high += select(self.low < weight, 1u32, 0u32);
    }

    /// Adds what was met to its bin.
    fn flush(&mut self, scratch: &mut Scratch) {
        if self.count > 0 {
            let bin = self.bin as usize;
            scratch.bins[bin].fetch_add(self.count);
            let before = scratch.bins[bin + BINS].fetch_add(self.low);
            let high = self.high + select(before + self.low < before, 1u32, 0u32);
            if high > 0 {
                scratch.bins[bin + comptime!(2 * BINS)].fetch_add(high);
            }
            self.count = 0u32.runtime();
            self.low = 0u32.runtime();
            self.high = 0u32.runtime();
        }
    }
}

/// The place in an order of the token that a sum over the tokens kept so far reaches its target with.
///
/// With `lists` the tokens that can be kept are listed as soon as they are few.
#[cube]
#[allow(clippy::too_many_arguments)]
fn select_prefix<F: Float, N: Size>(
    logits: &[Vector<F, N>],
    state: &mut [u32],
    row: &mut Row,
    view: &SampleView,
    kept: &mut Prefix,
    walk: &mut Walk,
    random: &Wide,
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
                kept,
                &mut chosen,
                walk,
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
                search.set_target(view, random, scratch, target);
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
                walk.is_list = true.runtime();
                walk.listed = scratch.found[2usize] as usize;
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
#[allow(clippy::too_many_arguments)]
fn count<F: Float, N: Size>(
    logits: &[Vector<F, N>],
    state: &mut [u32],
    row: &mut Row,
    view: &SampleView,
    kept: &mut Prefix,
    chosen: &mut Prefix,
    walk: &mut Walk,
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
    if walk.is_list {
        let mut i = unit;
        while i < walk.listed {
            let (key, id) = (scratch.keys[i], scratch.ids[i]);
            visit(
                key, id, row, view, kept, chosen, digit, &mut run, scratch, target,
            );
            i += units;
        }
    } else {
        let mut i = unit;
        while i < view.vectors {
            let values = Vector::<f32, N>::cast_from(logits[row.logits + i]);
            let seen = history::<N>(state, row, i, blueprint);
            #[unroll]
            for e in 0..vector {
                let key = key_of(values.extract(e), (seen >> (e as u32)) & 1, view, blueprint);
                let id = (i * vector + e) as u32;
                visit(
                    key, id, row, view, kept, chosen, digit, &mut run, scratch, target,
                );
            }
            i += units;
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
    kept: &mut Prefix,
    chosen: &mut Prefix,
    digit: &Digit,
    run: &mut Run,
    scratch: &mut Scratch,
    #[comptime] target: Target,
) {
    let distance = distance(row, view, key);
    let mut farthest = comptime!(TOO_FAR - 1).runtime();
    if comptime!(target == Target::Draw) {
        farthest = view.farthest;
    }
    if distance <= farthest && chosen.begins(distance, key, id) && kept.keeps(distance, key, id) {
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
            let distance = distance(row, view, key);
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

/// Adds up the bins of a group.
#[cube]
fn add_group(group: usize, scratch: &mut Scratch) {
    let mut count = 0u32;
    let mut sum = Wide::zero();
    for i in 0..GROUP {
        let bin = group * GROUP + i;
        count += scratch.bins[bin].load();
        sum.add(
            scratch.bins[bin + BINS].load(),
            scratch.bins[bin + comptime!(2 * BINS)].load(),
        );
    }
    scratch.groups[group] = count;
    scratch.groups[group + GROUPS] = sum.low;
    scratch.groups[group + comptime!(2 * GROUPS)] = sum.high;
}

#[cube]
impl Wide {
    fn zero() -> Wide {
        Wide {
            low: 0u32,
            high: 0u32,
        }
    }

    fn add(&mut self, low: u32, high: u32) {
        self.low += low;
        self.high += high + select(self.low < low, 1u32, 0u32);
    }

    /// Whether this and so much more is as much as another.
    fn reaches(&self, low: u32, high: u32, other: &Wide) -> bool {
        let sum_low = self.low + low;
        let sum_high = self.high + high + select(sum_low < low, 1u32, 0u32);
        sum_high > other.high || (sum_high == other.high && sum_low >= other.low)
    }
}

/// How far the search for a token has come: only the first unit searches.
#[derive(CubeType, Clone, Copy)]
struct Search {
    /// Tokens before the prefix, and the sum of their weights.
    count: u32,
    sum: Wide,
    /// What the count or the sum is to reach.
    target: Wide,
}

#[cube]
impl Search {
    fn new() -> Search {
        Search {
            count: 0u32,
            sum: Wide::zero(),
            target: Wide::zero(),
        }
    }

    /// Works out the target from the totals of the first histogram.
    fn set_target(
        &mut self,
        view: &SampleView,
        random: &Wide,
        scratch: &mut Scratch,
        #[comptime] target: Target,
    ) {
        let mut count = 0u32;
        let mut sum = Wide::zero();
        for group in 0..GROUPS {
            count += scratch.groups[group];
            sum.add(
                scratch.groups[group + GROUPS],
                scratch.groups[group + comptime!(2 * GROUPS)],
            );
        }
        if comptime!(target == Target::TopK) {
            self.target.low = u32::min(view.top_k, count);
        } else if comptime!(target == Target::TopP) {
            // `sum * top_p / 2^32`, rounded up.
            let rest = sum.low * view.top_p;
            let up = select(rest > 0, 1u32, 0u32);
            self.target.add(sum.low.mul_hi(view.top_p), 0u32);
            self.target
                .add(sum.high * view.top_p, sum.high.mul_hi(view.top_p));
            self.target.add(up, 0u32);
        } else {
            // `sum * random / 2^64`, rounded down, and one.
            let mut middle = Wide::zero();
            middle.add(sum.low.mul_hi(random.low), 0u32);
            middle.add(sum.low * random.high, sum.low.mul_hi(random.high));
            let carried = middle.high;
            middle.high = 0u32.runtime();
            middle.add(sum.high * random.low, sum.high.mul_hi(random.low));
            self.target.add(carried, 0u32);
            self.target.add(middle.high, 0u32);
            self.target
                .add(sum.high * random.high, sum.high.mul_hi(random.high));
            self.target.add(1u32, 0u32);
        }
    }

    /// Whether the target is reached with so many tokens more, of so much weight.
    fn reached(&self, count: u32, low: u32, high: u32, #[comptime] target: Target) -> bool {
        let mut reached = self.count + count >= self.target.low;
        if comptime!(target != Target::TopK) {
            reached = self.sum.reaches(low, high, &self.target);
        }
        reached
    }

    /// Finds the bin with which the target is reached, and goes on to the tokens before it.
    fn find(&mut self, scratch: &mut Scratch, #[comptime] target: Target) {
        let mut group = 0usize;
        let mut searches = true;
        while searches && group < comptime!(GROUPS - 1) {
            let count = scratch.groups[group];
            let low = scratch.groups[group + GROUPS];
            let high = scratch.groups[group + comptime!(2 * GROUPS)];
            searches = !self.reached(count, low, high, target);
            if searches {
                self.count += count;
                self.sum.add(low, high);
                group += 1;
            }
        }
        let mut bin = group * GROUP;
        let last = bin + comptime!(GROUP - 1);
        searches = true.runtime();
        while searches && bin < last {
            let count = scratch.bins[bin].load();
            let low = scratch.bins[bin + BINS].load();
            let high = scratch.bins[bin + comptime!(2 * BINS)].load();
            searches = !self.reached(count, low, high, target);
            if searches {
                self.count += count;
                self.sum.add(low, high);
                bin += 1;
            }
        }
        let count = scratch.bins[bin].load();
        // A single token, or no more than wanted: further digits change nothing.
        let mut all = count <= 1;
        if comptime!(target == Target::TopK) {
            all = all || self.count + count == self.target.low;
        }
        if comptime!(target == Target::Draw) {
            // Which is wanted whole.
            all = false.runtime();
        }
        scratch.found[0usize] = bin as u32;
        scratch.found[1usize] = select(all, 1u32, 0u32);
        scratch.found[2usize] = self.count + count;
    }
}

/// The random number of a draw: the first two words that Philox4x32-10 (Salmon et al., "Parallel random
/// numbers: as easy as 1, 2, 3", SC 2011) gives for the number of the draw under the seed.
#[cube]
fn philox(state: &mut [u32], start: usize) -> Wide {
    let mut left = state[start];
    let mut right = state[start + 1];
    let mut a = state[start + 2];
    let mut b = 0u32;
    let mut c = 0u32;
    let mut d = 0u32;
    for _ in 0..10u32 {
        let first_high = a.mul_hi(0xd251_1f53u32);
        let first_low = a * 0xd251_1f53u32;
        let second_high = c.mul_hi(0xcd9e_8d57u32);
        let second_low = c * 0xcd9e_8d57u32;
        a = second_high ^ b ^ left;
        b = second_low;
        c = first_high ^ d ^ right;
        d = first_low;
        left += 0x9e37_79b9u32;
        right += 0xbb67_ae85u32;
    }
    Wide { low: a, high: b }
}
