//! Which vector instructions to use.

/// A set of vector instructions with an implementation of its own.
///
/// For tests and benchmarks; everybody else wants what [`detect`](Self::detect) finds, which is
/// what [`dequantize`](super::dequantize()), [`matmul`](super::matmul()) and
/// [`quantize`](super::quantize()) use.
#[doc(hidden)]
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Simd {
    /// Plain Rust, for every processor.
    Portable,
    /// AVX2 with F16C and FMA (x86-64-v3).
    Avx2,
    /// AVX-512 F, BW and VL (x86-64-v4).
    Avx512,
    /// As [`Avx512`](Self::Avx512), with the dot products of bf16; only matrix products differ.
    Avx512Bf16,
}

impl Simd {
    /// All of them, slowest first.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// The best that this processor has.
    pub fn detect() -> Self {
        let best = Self::ALL.into_iter().rev().find(|simd| simd.is_available());
        best.unwrap_or(Self::Portable)
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("f16c")
                    && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                Self::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 => false,
        }
    }

    /// # Panics
    /// If this processor does not have it.
    pub(super) fn assert_available(self) {
        assert!(self.is_available(), "this processor has no {self:?}");
    }
}
