//! Numbers in terms of one set of vector instructions.

/// A vector of f32.
///
/// The methods are to be inlined into a function that has the set's target features.
///
/// # Safety
/// For each method: the processor must have the instructions, and pointers must be to
/// [`LANES`](Self::LANES) numbers.
pub(in crate::host) trait Vector: Copy {
    const LANES: usize;
    /// Most rows in a tile of a product, a power of two up to 8; registers hold two vectors of each.
    const ROWS: usize;
    /// As many i32.
    type Ints: Copy;

    unsafe fn splat(number: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// As many numbers in f16, by their bits.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// As many numbers in bf16, by their bits.
    unsafe fn load_bf16(from: *const u16) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn splat_int(number: i32) -> Self::Ints;
    unsafe fn load_ints(from: *const i32) -> Self::Ints;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `self * factor + other`.
    unsafe fn mul_add(self, factor: Self, other: Self) -> Self;
    /// The larger one; `other` if one is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// The smaller one; `other` if one is NaN.
    unsafe fn min(self, other: Self) -> Self;
    unsafe fn sum(self) -> f32;
    /// `-inf` where `at` is not in `first..end`.
    unsafe fn mask(self, first: Self::Ints, end: Self::Ints, at: Self::Ints) -> Self;
    /// `self * 2^n`, for whole numbers of at least -200 and at most 127. May be zero where that is below
    /// `2^-126`.
    unsafe fn scale(self, n: Self) -> Self;
    unsafe fn round(self) -> Self;

    /// `2^self`, to within 2 units in the last place, of at most `2^127`; of `-inf` it is zero.
    ///
    /// A polynomial of Cephes (`exp2f`).
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        const FACTORS: [f32; 7] = [
            1.535_336_2e-4,
            1.339_887_4e-3,
            9.618_437e-3,
            5.550_332_5e-2,
            2.402_264_8e-1,
            6.931_472e-1,
            1.0,
        ];
        // SAFETY: as the caller vouches.
        unsafe {
            // What is far below the smallest number gives zero. A NaN stays one.
            let x = Self::splat(-200.0).max(Self::splat(127.0).min(self));
            let n = x.round();
            polynomial(x.sub(n), &FACTORS).scale(n)
        }
    }

    /// The hyperbolic tangent, to within a few units in the last place.
    ///
    /// The rational function of Eigen (`ptanh_float`).
    #[inline(always)]
    unsafe fn tanh(self) -> Self {
        const ABOVE: [f32; 7] = [
            -2.760_768_5e-16,
            2.000_188e-13,
            -8.604_672e-11,
            5.122_297e-8,
            1.485_722_4e-5,
            6.372_619_3e-4,
            4.893_524_6e-3,
        ];
        const BELOW: [f32; 4] = [1.198_258_4e-6, 1.185_347_1e-4, 2.268_434_6e-3, 4.893_525e-3];
        // Where it is one in f32.
        const LARGEST: f32 = 7.905_311;
        // SAFETY: as the caller vouches.
        unsafe {
            let x = Self::splat(-LARGEST).max(Self::splat(LARGEST).min(self));
            let square = x.mul(x);
            let above = polynomial(square, &ABOVE).mul(x);
            above.div(polynomial(square, &BELOW))
        }
    }
}

/// A polynomial by its factors, that of the highest power first.
#[inline(always)]
unsafe fn polynomial<V: Vector>(x: V, factors: &[f32]) -> V {
    // SAFETY: as the caller vouches, of the methods of `V`.
    unsafe {
        let mut value = V::splat(factors[0]);
        for &factor in &factors[1..] {
            value = value.mul_add(x, V::splat(factor));
        }
        value
    }
}
