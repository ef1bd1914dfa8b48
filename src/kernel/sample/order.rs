//! The orders of tokens, and what they are worth.

use cubecl::prelude::*;

use super::{SampleBlueprint, SampleView};
use crate::sampling::{DISTANCE_UNITS, POWER};

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
    pub const fn digits(self) -> u32 {
        match self {
            Self::TopK | Self::TopP => 8,
            Self::Draw => 3,
        }
    }
}

/// An integer in the order of numbers: zeros are equal, NaN is above all.
#[cube]
pub fn key(value: f32) -> u32 {
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

/// The [`key`] of a logit after the penalty.
#[cube]
pub fn key_of(
    logit: f32,
    seen: u32,
    view: &SampleView,
    #[comptime] blueprint: SampleBlueprint,
) -> u32 {
    let mut value = logit;
    if comptime!(blueprint.history) {
        let factor = select(logit < 0.0f32, view.penalty, view.inverse_penalty);
        value = select(seen == 1, logit * factor, logit);
    }
    key(value)
}

/// The logit after the penalty, from its integer: a product that was rounded, which a compiler could not join
/// with the difference that it goes into.
#[cube]
pub fn value_of(key: u32) -> f32 {
    f32::reinterpret(select(
        key >= 0x8000_0000u32,
        key ^ 0x8000_0000u32,
        key ^ 0xffff_ffffu32,
    ))
}

/// See [`SampleConstants`](crate::sampling::SampleConstants).
#[cube]
pub fn distance(largest: f32, per_logit: f32, key: u32) -> u32 {
    let logarithm = (largest - value_of(key)) * per_logit;
    u32::cast_from(f32::min(logarithm, 31.0f32) * comptime!(DISTANCE_UNITS as f32))
}

/// 2^31 times 2 to the power of minus a distance.
#[cube]
pub fn weight(distance: u32) -> u32 {
    let whole = distance / DISTANCE_UNITS;
    let part = (distance & comptime!(DISTANCE_UNITS - 1)) << 6u32;
    let mut sum = comptime!(POWER[6]).runtime();
    #[unroll]
    for i in 0..6usize {
        let term = comptime!(POWER[5 - i]);
        sum = term - part.mul_hi(sum);
    }
    let lost = part.mul_hi(sum);
    (0x8000_0000u32 - ((lost + 1) >> 1u32)) >> whole
}

/// The first digits of a place in an order. An order by rank has a digit of the distance first, which spreads
/// tokens better than the keys do, then those of the key, then those of the id.
#[derive(CubeType, Clone, Copy)]
pub struct Prefix {
    pub near: u32,
    pub near_mask: u32,
    pub key: u32,
    pub key_mask: u32,
    pub id: u32,
    pub id_mask: u32,
}

#[cube]
pub fn everything() -> Prefix {
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
pub fn near_digit(distance: u32) -> u32 {
    distance >> 23u32
}

#[cube]
impl Prefix {
    /// Whether a token has these digits.
    pub fn begins(&self, distance: u32, key: u32, id: u32) -> bool {
        ((near_digit(distance) ^ self.near) & self.near_mask) == 0
            && ((key ^ self.key) & self.key_mask) == 0
            && ((id ^ self.id) & self.id_mask) == 0
    }

    /// Whether a token has these digits, or lies before those that have, in an order by rank.
    pub fn keeps(&self, distance: u32, key: u32, id: u32) -> bool {
        let near = near_digit(distance) & self.near_mask;
        let key = key & self.key_mask;
        let id = id & self.id_mask;
        near < self.near
            || (near == self.near && (key > self.key || (key == self.key && id <= self.id)))
    }

    /// Takes one more digit.
    pub fn extend(&mut self, digit: &Digit, value: u32, #[comptime] target: Target) {
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

    pub fn set(&mut self, other: &Prefix) {
        self.near = other.near;
        self.near_mask = other.near_mask;
        self.key = other.key;
        self.key_mask = other.key_mask;
        self.id = other.id;
        self.id_mask = other.id_mask;
    }
}

/// Where the next digit lies.
#[derive(CubeType, Clone, Copy)]
pub struct Digit {
    pub level: u32,
    pub key_shift: u32,
    pub id_shift: u32,
}

#[cube]
impl Digit {
    pub fn new(level: u32, #[comptime] target: Target) -> Digit {
        let mut key_shift = 0u32;
        let mut id_shift = 0u32;
        if comptime!(target == Target::Draw) {
            // The last digit first: units next to each other have bins next to each other.
            id_shift = level * 8;
        } else {
            if level <= 4 {
                // Of the first digit, that of the distance, neither is used.
                key_shift = 32u32 - level * 8;
            } else {
                id_shift = 56u32 - level * 8;
            }
        }
        Digit {
            level,
            key_shift,
            id_shift,
        }
    }

    pub fn of(&self, distance: u32, key: u32, id: u32, #[comptime] target: Target) -> u32 {
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
