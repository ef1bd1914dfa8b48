//! The values of parameters, and how far those of two are apart.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::convert::check_decodes;
use super::elements::{elements, float_type, widen, with_float_type};
use super::folder::Checkpoint;
use super::orientation::{Orientation, swap_sides, transpose_stack};
use crate::error::Nf4Error;
use crate::format::{FloatElement, FloatType, PackedImage};
use crate::host;

/// Values read at a time; two buffers of this many f32 are 2 MiB.
const CHUNK_ELEMS: usize = 1 << 18;

/// Values compared by a thread at a time.
const TASK_ELEMS: usize = 1 << 14;

/// The values of a parameter, row-major.
pub(super) struct Values<'a> {
    pub shape: Vec<usize>,
    stored: Stored<'a>,
}

enum Stored<'a> {
    Dense(FloatType, &'a [u8]),
    Quantized(PackedImage),
    Transposed(Transposed),
}

/// A weight whose matrices are decoded one at a time, as the order of their values differs from that of the
/// codes.
struct Transposed {
    weight: PackedImage,
    /// Matrices, and rows and columns as they are stored.
    dims: [usize; 3],
    /// The number of a matrix, and its values.
    decoded: RefCell<Option<(usize, Vec<f32>)>>,
}

impl<'a> Values<'a> {
    /// The parameter, or the name of the dtype that is not a weight's.
    pub fn open(source: &'a Checkpoint, name: &str) -> Result<Result<Self, String>, Nf4Error> {
        if !source.is_quantized(name) {
            let info = source.tensor_info(name)?;
            let Some(float_type) = float_type(info.dtype) else {
                return Ok(Err(info.dtype.to_string()));
            };
            return Ok(Ok(Self {
                shape: info.shape.to_vec(),
                stored: Stored::Dense(float_type, source.tensor_bytes(name)?),
            }));
        }
        let (weight, orientation) = source.load_image(name)?;
        check_decodes(&weight, name)?;
        Self::of_image(weight, orientation, name).map(Ok)
    }

    /// Those of a parameter whose weight decodes to finite ones.
    ///
    /// # Errors
    /// Those of [`Orientation::dims`].
    pub fn of_image(
        weight: PackedImage,
        orientation: Orientation,
        name: &str,
    ) -> Result<Self, Nf4Error> {
        let mut shape = weight.shape().to_vec();
        let stored = match orientation.dims(name, &shape)? {
            None => Stored::Quantized(weight),
            Some(dims) => {
                swap_sides(&mut shape);
                Stored::Transposed(Transposed {
                    weight,
                    dims,
                    decoded: RefCell::default(),
                })
            }
        };
        Ok(Self { shape, stored })
    }

    /// How far others of the same shape are from these.
    pub fn compare(&self, other: &Self) -> WeightLoss {
        self.fold(WeightLoss::default(), |loss, range, values| {
            loss.plus(WeightLoss::of(values, &other.read(range)))
        })
    }

    /// The largest magnitude.
    pub fn max_abs(&self) -> f32 {
        self.fold(0.0, |max: f32, _, values| {
            let magnitudes = values.par_iter().with_min_len(TASK_ELEMS);
            let largest = magnitudes.map(|value| value.abs()).reduce(|| 0.0, f32::max);
            max.max(largest)
        })
    }

    fn fold<S>(&self, start: S, add: impl Fn(S, Range<usize>, &[f32]) -> S) -> S {
        let elems: usize = self.shape.iter().product();
        let mut state = start;
        for start in (0..elems).step_by(CHUNK_ELEMS) {
            let range = start..elems.min(start + CHUNK_ELEMS);
            state = add(state, range.clone(), &self.read(range));
        }
        state
    }

    fn read(&self, range: Range<usize>) -> Vec<f32> {
        match &self.stored {
            Stored::Dense(float_type, bytes) => with_float_type!(*float_type, T => {
                let size = size_of::<T>();
                widen(&elements::<T>(&bytes[range.start * size..range.end * size]))
            }),
            Stored::Quantized(weight) => decode(weight, range),
            Stored::Transposed(weight) => weight.read(range),
        }
    }
}

/// Values of a weight, in the order in which they are stored.
fn decode(weight: &PackedImage, range: Range<usize>) -> Vec<f32> {
    with_float_type!(weight.dtype(), T => {
        let mut values = vec![T::from_f32(0.0); range.len()];
        host::dequantize(weight.words(), weight.layout(), range.start, &mut values);
        widen(&values)
    })
}

impl Transposed {
    fn read(&self, range: Range<usize>) -> Vec<f32> {
        let [_, rows, columns] = self.dims;
        let size = rows * columns;
        let mut values = Vec::with_capacity(range.len());
        let mut start = range.start;
        while start < range.end {
            let (number, offset) = (start / size, start % size);
            let end = size.min(offset + range.end - start);
            let mut decoded = self.decoded.borrow_mut();
            let (_, matrix) = match decoded.take() {
                Some(known) if known.0 == number => decoded.insert(known),
                _ => {
                    let stored = decode(&self.weight, number * size..(number + 1) * size);
                    decoded.insert((number, transpose_stack([1, rows, columns], &stored)))
                }
            };
            values.extend_from_slice(&matrix[offset..end]);
            start += end - offset;
        }
        values
    }
}

/// How far weights as they are stored are from what they were.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct WeightLoss {
    max_abs: f64,
    relative_max: f64,
    largest: f64,
    squared_error: f64,
    squared: f64,
}

impl WeightLoss {
    /// Root mean square of the errors over that of the weights as they were.
    pub fn relative_rms(&self) -> f64 {
        if self.squared_error == 0.0 {
            return 0.0;
        }
        // Infinity over NaN is as bad as infinity.
        let ratio = (self.squared_error / self.squared).sqrt();
        if ratio.is_nan() { f64::INFINITY } else { ratio }
    }

    /// The largest error.
    pub fn max_abs(&self) -> f64 {
        self.max_abs
    }

    /// The largest error over the largest magnitude in the same parameter; of several parameters the
    /// largest that one of them has.
    pub fn relative_max(&self) -> f64 {
        let own = match self.max_abs {
            0.0 => 0.0,
            error => error / self.largest,
        };
        self.relative_max.max(own)
    }

    /// That of both parameters together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            relative_max: self.relative_max().max(other.relative_max()),
            // What belongs together is in the maximum.
            largest: f64::INFINITY,
            ..self.plus(other)
        }
    }

    fn of(a: &[f32], b: &[f32]) -> Self {
        let tasks = a.par_chunks(TASK_ELEMS).zip(b.par_chunks(TASK_ELEMS));
        // Collected in order, so that the sums do not depend on the threads.
        let losses: Vec<Self> = tasks.map(|(a, b)| Self::of_task(a, b)).collect();
        losses.into_iter().fold(Self::default(), Self::plus)
    }

    fn of_task(a: &[f32], b: &[f32]) -> Self {
        let mut loss = Self::default();
        for (&a, &b) in a.iter().zip(b) {
            let (a, b) = (f64::from(a), f64::from(b));
            let error = match (a - b).abs() {
                _ if a == b || (a.is_nan() && b.is_nan()) => 0.0,
                error if error.is_nan() => f64::INFINITY,
                error => error,
            };
            loss.max_abs = loss.max_abs.max(error);
            loss.largest = loss.largest.max(a.abs());
            loss.squared_error += error * error;
            loss.squared += a * a;
        }
        loss
    }

    /// That of two parts of a parameter.
    fn plus(self, other: Self) -> Self {
        Self {
            max_abs: self.max_abs.max(other.max_abs),
            relative_max: self.relative_max.max(other.relative_max),
            largest: self.largest.max(other.largest),
            squared_error: self.squared_error + other.squared_error,
            squared: self.squared + other.squared,
        }
    }
}
