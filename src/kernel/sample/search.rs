//! Histograms over a digit of an order, and the search in them.

use cubecl::prelude::*;

use super::SampleView;
use super::order::Target;
use super::wide::Wide;

/// Bins of a histogram.
pub const BINS: usize = 256;
/// Bins that are added up before it is searched.
const GROUP: usize = 16;
pub const GROUPS: usize = BINS / GROUP;

/// The shared memory of a cube.
#[derive(CubeType)]
pub struct Scratch {
    /// `[LISTED]`: keys and ids of tokens.
    pub keys: Shared<[u32]>,
    pub ids: Shared<[u32]>,
    /// `[3, BINS]`: counts, and the low and high words of sums of weights; and how many tokens are listed.
    pub bins: Shared<[Atomic<u32>]>,
    /// `[3, GROUPS]`: the same of groups.
    pub groups: Shared<[u32]>,
    /// What a search has found: the digit, whether that is all, and how many tokens there are up to its bin.
    pub found: Shared<[u32]>,
}

/// Tokens of one bin that a unit has met one after the other: they are added at once.
#[derive(CubeType, Clone, Copy)]
pub struct Run {
    pub bin: u32,
    pub count: u32,
    pub low: u32,
    pub high: u32,
}

#[cube]
impl Run {
    /// Adds a token.
    pub fn add(&mut self, bin: u32, weight: u32, scratch: &mut Scratch) {
        if bin != self.bin {
            self.flush(scratch);
            self.bin = bin;
        }
        self.count += 1;
        self.low += weight;
        self.high += select(self.low < weight, 1u32, 0u32);
    }

    /// Adds what was met to its bin.
    pub fn flush(&mut self, scratch: &mut Scratch) {
        if self.count > 0 {
            let bin = self.bin as usize;
            scratch.bins[bin].fetch_add(self.count);
            let before = scratch.bins[bin + BINS].fetch_add(self.low);
            let after = before + self.low;
            let high = self.high + select(after < before, 1u32, 0u32);
            if high > 0 {
                scratch.bins[bin + comptime!(2 * BINS)].fetch_add(high);
            }
            self.count = 0u32.runtime();
            self.low = 0u32.runtime();
            self.high = 0u32.runtime();
        }
    }
}

/// Adds up the bins of a group.
#[cube]
pub fn add_group(group: usize, scratch: &mut Scratch) {
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

/// How far the search for a token has come: only the first unit searches.
#[derive(CubeType, Clone, Copy)]
pub struct Search {
    /// Tokens before the prefix, and the sum of their weights.
    pub count: u32,
    pub sum: Wide,
    /// What the count or the sum is to reach.
    pub target: Wide,
}

#[cube]
impl Search {
    pub fn new() -> Search {
        Search {
            count: 0u32,
            sum: Wide::zero(),
            target: Wide::zero(),
        }
    }

    /// Works out the target from the totals of the first histogram.
    pub fn set_target(
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
    pub fn reached(&self, count: u32, low: u32, high: u32, #[comptime] target: Target) -> bool {
        let mut reached = self.count + count >= self.target.low;
        if comptime!(target != Target::TopK) {
            reached = self.sum.reaches(low, high, &self.target);
        }
        reached
    }

    /// Finds the bin with which the target is reached, and goes on to the tokens before it.
    pub fn find(&mut self, scratch: &mut Scratch, #[comptime] target: Target) {
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
