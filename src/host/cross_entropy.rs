//! The cross-entropy of rows of logits, and its gradient.

use rayon::prelude::*;

use super::Simd;
#[cfg(target_arch = "x86_64")]
use super::attention::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::attention::avx512::Avx512;
use super::attention::portable::Portable;
use super::attention::vector::Vector;
use super::float_matmul::load;
use crate::cross_entropy::CrossEntropyOptions;
use crate::format::FloatElement;

/// Logits that are widened at a time, a multiple of all lanes.
const BLOCK: usize = 1024;

/// The loss of each row, in f32 inside.
///
/// # Shapes
/// - `logits`: `[rows, vocabulary]`; `targets`: `[rows]`, and so the result
pub(crate) fn cross_entropy<T: FloatElement>(
    simd: Simd,
    logits: &[T],
    targets: &[i64],
    options: &CrossEntropyOptions,
) -> Vec<f32> {
    let kernels = kernels(simd);
    let rows = logits.par_chunks(logits.len() / targets.len());
    let losses = rows.zip(targets).map(|(row, &target)| {
        let target = Target::new(target, row.len(), options);
        // SAFETY: the processor has the instructions of the kernels, as was checked.
        unsafe { (kernels.loss)(row, target, options) }.value
    });
    losses.collect()
}

/// As [`cross_entropy`], and the gradient of each loss with respect to its logits in their place.
pub(crate) fn cross_entropy_gradient<T: FloatElement>(
    simd: Simd,
    logits: &mut [T],
    targets: &[i64],
    options: &CrossEntropyOptions,
) -> Vec<f32> {
    let kernels = kernels(simd);
    let rows = logits.par_chunks_mut(logits.len() / targets.len());
    let losses = rows.zip(targets).map(|(row, &target)| {
        let target = Target::new(target, row.len(), options);
        // SAFETY: the processor has the instructions of the kernels, as was checked.
        unsafe {
            let loss = (kernels.loss)(row, target, options);
            (kernels.gradient)(row, target, loss.lse, options);
            loss.value
        }
    });
    losses.collect()
}

/// What a row is to predict.
#[derive(Debug, Clone, Copy)]
enum Target {
    At(usize),
    Ignored,
    /// A number that is none of the row's.
    Unknown,
}

impl Target {
    fn new(target: i64, vocabulary: usize, options: &CrossEntropyOptions) -> Self {
        match usize::try_from(target) {
            _ if target == i64::from(options.ignore_index) => Self::Ignored,
            Ok(target) if target < vocabulary => Self::At(target),
            _ => Self::Unknown,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Loss {
    value: f32,
    /// The log of the sum of the exponentials.
    lse: f32,
}

/// # Safety
/// Of both: the processor must have the instructions that they were chosen by.
struct Kernels<T> {
    loss: unsafe fn(&[T], Target, &CrossEntropyOptions) -> Loss,
    gradient: unsafe fn(&mut [T], Target, f32, &CrossEntropyOptions),
}

/// # Panics
/// If this processor does not have `simd`.
fn kernels<T: FloatElement>(simd: Simd) -> Kernels<T> {
    simd.assert_available();
    match simd {
        Simd::Portable => Kernels {
            loss: loss::<T, Portable>,
            gradient: gradient::<T, Portable>,
        },
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => Kernels {
            loss: avx2_loss::<T>,
            gradient: avx2_gradient::<T>,
        },
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 | Simd::Avx512Bf16 => Kernels {
            loss: avx512_loss::<T>,
            gradient: avx512_gradient::<T>,
        },
        #[cfg(not(target_arch = "x86_64"))]
        Simd::Avx2 | Simd::Avx512 | Simd::Avx512Bf16 => unreachable!("not available"),
    }
}

macro_rules! with_features {
    ($features:literal, $vector:ty, $loss:ident, $gradient:ident) => {
        /// # Safety
        /// The processor must have these features.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        unsafe fn $loss<T: FloatElement>(
            row: &[T],
            target: Target,
            options: &CrossEntropyOptions,
        ) -> Loss {
            // SAFETY: this function has the features.
            unsafe { loss::<T, $vector>(row, target, options) }
        }

        /// # Safety
        /// The processor must have these features.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        unsafe fn $gradient<T: FloatElement>(
            row: &mut [T],
            target: Target,
            lse: f32,
            options: &CrossEntropyOptions,
        ) {
            // SAFETY: this function has the features.
            unsafe { gradient::<T, $vector>(row, target, lse, options) }
        }
    };
}

with_features!("avx2,f16c,fma", Avx2, avx2_loss, avx2_gradient);
with_features!(
    "avx512f,avx512bw,avx512vl",
    Avx512,
    avx512_loss,
    avx512_gradient
);

/// The loss of a row. The largest logit so far and the sum of the exponentials with it go along.
///
/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn loss<T: FloatElement, V: Vector>(
    row: &[T],
    target: Target,
    options: &CrossEntropyOptions,
) -> Loss {
    if matches!(target, Target::Ignored) {
        let (value, lse) = (0.0, 0.0);
        return Loss { value, lse };
    }
    let (mut most, mut sum, mut total) = (f32::MIN, 0.0f32, 0.0f64);
    let mut of_target = f32::NAN;
    let mut block = [0.0f32; BLOCK];
    for (index, part) in row.chunks(BLOCK).enumerate() {
        // SAFETY: as the caller vouches; the block has a whole number of vectors.
        unsafe {
            let vectors = widen::<T, V>(part, options, &mut block);
            let mut larger = V::splat(most);
            for at in 0..vectors {
                larger = V::load(block.as_ptr().add(at * V::LANES)).max(larger);
            }
            let mut lanes = [most; 16];
            larger.store(lanes.as_mut_ptr());
            let larger = lanes.into_iter().fold(most, f32::max);
            sum *= (most - larger).exp();
            most = larger;
            let mut powers = V::splat(0.0);
            for at in 0..vectors {
                let value = V::load(block.as_ptr().add(at * V::LANES));
                powers = powers.add(exp(value.sub(V::splat(most))));
            }
            sum += powers.sum();
        }
        if options.label_smoothing > 0.0 {
            total += block[..part.len()]
                .iter()
                .map(|&x| f64::from(x))
                .sum::<f64>();
        }
        if let Some(at) = place(target, index) {
            of_target = block[at];
        }
    }
    let lse = most + sum.ln();
    let smoothing = options.label_smoothing as f32;
    let mut value = (1.0 - smoothing) * (lse - of_target) + options.z_loss as f32 * lse * lse;
    if smoothing > 0.0 {
        value += smoothing * (lse - (total / row.len() as f64) as f32);
    }
    Loss { value, lse }
}

/// The gradient of a row in its place.
///
/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn gradient<T: FloatElement, V: Vector>(
    row: &mut [T],
    target: Target,
    lse: f32,
    options: &CrossEntropyOptions,
) {
    if matches!(target, Target::Ignored) {
        return row.fill(T::zeroed());
    }
    let factor = match target {
        Target::Unknown => f32::NAN,
        _ => 1.0 + 2.0 * options.z_loss as f32 * lse,
    };
    let scale = options.logit_scale as f32;
    let smoothing = options.label_smoothing as f32;
    let spread = smoothing / row.len() as f32;
    let inverse_cap = options.soft_cap.map(|cap| (1.0 / cap) as f32);
    let mut block = [0.0f32; BLOCK];
    for (index, part) in row.chunks_mut(BLOCK).enumerate() {
        // SAFETY: as the caller vouches; the block has a whole number of vectors.
        unsafe {
            let vectors = widen::<T, V>(part, options, &mut block);
            let of_target = place(target, index).map(|at| (at, block[at]));
            for at in 0..vectors {
                let at = block.as_mut_ptr().add(at * V::LANES);
                let value = V::load(at);
                let power = exp(value.sub(V::splat(lse)));
                let along = power.mul_add(V::splat(factor), V::splat(-spread));
                let mut gradient = along.mul(V::splat(scale));
                // Not with a cap of infinity, for logits of -inf.
                if let Some(inverse_cap) = inverse_cap {
                    let ratio = value.mul(V::splat(inverse_cap));
                    gradient = gradient.mul(V::splat(1.0).sub(ratio.mul(ratio)));
                }
                gradient.store(at);
            }
            if let Some((at, value)) = of_target {
                let ratio = inverse_cap.map_or(0.0, |inverse_cap| value * inverse_cap);
                block[at] -= (1.0 - smoothing) * (1.0 - ratio * ratio) * scale;
            }
        }
        for (to, &from) in part.iter_mut().zip(&block) {
            *to = T::from_f32(from);
        }
    }
}

/// The place of the target in a block.
fn place(target: Target, block: usize) -> Option<usize> {
    match target {
        Target::At(target) if target / BLOCK == block => Some(target % BLOCK),
        _ => None,
    }
}

/// Puts logits into a block, scaled and capped, and `-inf` behind them. Returns how many vectors they are.
///
/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn widen<T: FloatElement, V: Vector>(
    logits: &[T],
    options: &CrossEntropyOptions,
    block: &mut [f32; BLOCK],
) -> usize {
    let scale = options.logit_scale as f32;
    let vectors = logits.len().div_ceil(V::LANES);
    let whole = logits.len() / V::LANES;
    // SAFETY: as the caller vouches; there are `whole` vectors of logits, and `vectors` fit the block.
    unsafe {
        for at in (0..whole).map(|at| at * V::LANES) {
            let value = load::<T, V>(logits.as_ptr().add(at));
            value.mul(V::splat(scale)).store(block.as_mut_ptr().add(at));
        }
        for at in whole * V::LANES..logits.len() {
            block[at] = logits[at].to_f32() * scale;
        }
        if let Some(cap) = options.soft_cap {
            for at in 0..vectors {
                let at = block.as_mut_ptr().add(at * V::LANES);
                let ratio = V::load(at).mul(V::splat((1.0 / cap) as f32));
                ratio.tanh().mul(V::splat(cap as f32)).store(at);
            }
        }
    }
    block[logits.len()..vectors * V::LANES].fill(f32::NEG_INFINITY);
    vectors
}

/// # Safety
/// The processor must have the instructions of `V`.
#[inline(always)]
unsafe fn exp<V: Vector>(x: V) -> V {
    // SAFETY: as the caller vouches.
    unsafe { x.mul(V::splat(std::f32::consts::LOG2_E)).exp2() }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const OPTIONS: CrossEntropyOptions = CrossEntropyOptions {
        ignore_index: -100,
        label_smoothing: 0.1,
        z_loss: 1e-3,
        soft_cap: Some(5.0),
        logit_scale: 0.7,
    };

    /// The formula in f64.
    fn expected(row: &[f32], target: usize, options: &CrossEntropyOptions) -> f64 {
        let capped = |x: &f32| {
            let x = f64::from(*x) * options.logit_scale;
            options.soft_cap.map_or(x, |cap| cap * (x / cap).tanh())
        };
        let row: Vec<f64> = row.iter().map(capped).collect();
        let lse = row.iter().map(|x| x.exp()).sum::<f64>().ln();
        let mean = row.iter().sum::<f64>() / row.len() as f64;
        (1.0 - options.label_smoothing) * (lse - row[target])
            + options.label_smoothing * (lse - mean)
            + options.z_loss * lse * lse
    }

    /// Whatever instructions there are, in rows that end in the midst of a vector and of a block.
    #[rstest]
    fn all_instructions_compute_the_formula(
        #[values(Simd::Portable, Simd::Avx2, Simd::Avx512)] simd: Simd,
        #[values(1, 7, 1024, 2067)] vocabulary: usize,
        #[values(CrossEntropyOptions::default(), OPTIONS)] options: CrossEntropyOptions,
    ) {
        if !simd.is_available() {
            return;
        }
        let value = |i: usize| ((i * 7919 + 13) % 1000) as f32 / 60.0 - 8.0;
        let logits: Vec<f32> = (0..3 * vocabulary).map(value).collect();
        let last = vocabulary - 1;
        let targets = [last as i64, -100, 0];
        let losses = cross_entropy(simd, &logits, &targets, &options);
        let mut gradient = logits.clone();
        let again = cross_entropy_gradient(simd, &mut gradient, &targets, &options);
        assert_eq!(losses, again);
        assert_eq!(losses[1], 0.0);
        assert!(
            gradient[vocabulary..][..vocabulary]
                .iter()
                .all(|&g| g == 0.0)
        );
        for (row, target) in [(0, last), (2, 0)] {
            let logits = &logits[row * vocabulary..][..vocabulary];
            let loss = |logits: &[f32]| expected(logits, target, &options);
            let difference = (f64::from(losses[row]) - loss(logits)).abs();
            assert!(difference < 1e-5, "{row}: {difference:e}");
            for at in [0, vocabulary / 2, last] {
                let moved = |by: f32| {
                    let mut logits = logits.to_vec();
                    logits[at] += by;
                    (f64::from(logits[at]), loss(&logits))
                };
                let (above, below) = (moved(1e-2), moved(-1e-2));
                let slope = (above.1 - below.1) / (above.0 - below.0);
                let given = f64::from(gradient[row * vocabulary + at]);
                assert!((given - slope).abs() < 1e-5, "{row} {at}: {given} {slope}");
            }
        }
    }
}
