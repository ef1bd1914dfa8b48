//! The operations as Burn's dispatch sees them.
//!
//! Arguments are validated by the functions over [`Tensor`](burn::tensor::Tensor) in front; in
//! here an impossible call is a bug and panics.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, backend_extension};
use burn::tensor::{DType, Shape};

use crate::format::{FloatType, PackedLayout};

/// What to decode of a packed weight, and to what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DequantizeSpec {
    /// Layout of the packed weight.
    pub layout: PackedLayout,
    /// Rows of the result.
    pub rows: usize,
    /// Columns of the result: `rows * columns` elements are decoded.
    pub columns: usize,
    /// First element to decode.
    pub start: usize,
    /// Type to decode to.
    pub dtype: FloatType,
}

impl DequantizeSpec {
    /// Elements to decode.
    ///
    /// # Panics
    /// If they are more than can be counted: the shape of the result would not be that of its values.
    pub(super) fn elems(&self) -> usize {
        let elems = self.rows.checked_mul(self.columns);
        elems.expect("as many elements as a weight can have")
    }
}

/// How a linear map with a packed weight is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum MatmulStrategy {
    /// The fastest way: where more than one may be, they are measured when a product of the kind is
    /// first computed on the device, and the result is kept. Another run may measure otherwise, and
    /// round otherwise; [`set_reproducible`](super::set_reproducible) turns it to [`Rule`](Self::Rule).
    #[default]
    Auto,
    /// By the sizes alone, without a measurement.
    Rule,
    /// Decode the weight, then Burn's own product.
    Decode,
    /// Multiply with the packed weight: a plane of a graphics card, or a thread of the CPU, a row of
    /// it.
    Gemv,
    /// Multiply with the packed weight on tensor cores.
    TensorCore,
    /// Multiply with the levels of the packed weight on tensor cores, a single row of `x`.
    Levels,
}

impl MatmulStrategy {
    /// The name used in errors.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Rule => "rule",
            Self::Decode => "decode",
            Self::Gemv => "gemv",
            Self::TensorCore => "tensor_core",
            Self::Levels => "levels",
        }
    }

    /// Whether it says which kernel multiplies with the packed weight.
    pub const fn is_kernel(self) -> bool {
        matches!(self, Self::Gemv | Self::TensorCore | Self::Levels)
    }
}

/// A linear map with a packed weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearSpec {
    /// The weight, and the type of the product.
    pub weight: DequantizeSpec,
    /// How it is computed.
    pub strategy: MatmulStrategy,
}

/// A product with a packed weight in one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatmulSpec {
    /// The weight, whole, and the type of the product.
    pub weight: DequantizeSpec,
    /// How it is computed.
    pub strategy: MatmulStrategy,
    /// Rows of `x`.
    pub m: usize,
}

impl MatmulSpec {
    /// Products with more rows go over the decoded weight unless another way is asked for.
    pub const MAX_ROWS: usize = 256;

    /// The product, if it may be computed without the decoded weight.
    pub fn of(linear: LinearSpec, m: usize) -> Option<Self> {
        let LinearSpec { weight, strategy } = linear;
        let elems = weight.rows.checked_mul(weight.columns);
        let whole = weight.start == 0 && elems == Some(weight.layout.elems());
        let packed = match strategy {
            MatmulStrategy::Auto | MatmulStrategy::Rule => m <= Self::MAX_ROWS,
            MatmulStrategy::Decode => false,
            MatmulStrategy::Gemv | MatmulStrategy::TensorCore | MatmulStrategy::Levels => true,
        };
        (whole && packed).then_some(Self {
            weight,
            strategy,
            m,
        })
    }

    /// The same without the number of rows.
    pub fn linear(&self) -> LinearSpec {
        LinearSpec {
            weight: self.weight,
            strategy: self.strategy,
        }
    }

    /// Its sizes.
    #[cfg(feature = "cube")]
    pub(super) fn product(&self) -> crate::launch::Product {
        crate::launch::Product {
            m: self.m,
            n: self.weight.rows,
            k: self.weight.columns,
            dtype: self.weight.dtype,
        }
    }
}

/// A product with a packed weight and a low-rank branch in one operation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraSpec {
    /// The product.
    pub matmul: MatmulSpec,
    /// Columns of `A`, rows of `B`.
    pub rank: usize,
    /// The factor `s`.
    pub scale: f64,
    /// Type of `A` and `B`.
    pub dtype: FloatType,
}

/// How to quantize a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizeSpec {
    /// Layout of the packed weight.
    pub layout: PackedLayout,
    /// Shape of the weight.
    pub shape: Vec<usize>,
    /// Type of the weight.
    pub dtype: FloatType,
}

/// NF4 operations of a backend.
///
/// Implemented for the CubeCL runtimes, for Flex, and over them for Fusion and Autodiff.
#[backend_extension(
    Autodiff,
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait Nf4Backend: Backend {
    /// Quantizes a weight. No gradient flows through.
    ///
    /// # Shapes
    /// - `weight`: `spec.shape`, of `spec.dtype`
    /// - returns `[spec.layout.words()]`, u32
    #[fusion(dtype = DType::U32, shape = Shape::from([spec.layout.words()]))]
    fn nf4_quantize(weight: FloatTensor<Self>, spec: QuantizeSpec) -> IntTensor<Self>;

    /// Decodes a range of a packed weight.
    ///
    /// # Shapes
    /// - `packed`: `[spec.layout.words()]`, u32
    /// - returns `[spec.rows, spec.columns]`, of `spec.dtype`
    #[fusion(dtype = DType::from(spec.dtype), shape = Shape::from([spec.rows, spec.columns]))]
    fn nf4_dequantize(packed: IntTensor<Self>, spec: DequantizeSpec) -> FloatTensor<Self>;

    /// `y = x Wᵀ` with a packed weight `W`.
    ///
    /// # Shapes
    /// - `x`: `[m, k]`, of `spec.weight.dtype`
    /// - `packed`: `[layout.words()]`, u32, a weight `[n, k] = [rows, columns]` of `spec.weight`
    /// - returns `[m, n]`
    #[fusion(default)]
    fn nf4_linear(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: LinearSpec,
    ) -> FloatTensor<Self> {
        if let Some(spec) = MatmulSpec::of(spec, x.shape()[0]) {
            return Self::nf4_matmul(x, packed, spec);
        }
        decoded_matmul::<Self>(x, packed, spec.weight)
    }

    /// `y = x Wᵀ` in one operation, so that a backend can multiply with the packed weight as it is.
    ///
    /// # Shapes
    /// - `x`: `[spec.m, k]`, of `spec.weight.dtype`
    /// - `packed`: as for `nf4_linear`
    /// - returns `[spec.m, n]`
    #[fusion(dtype = DType::from(spec.weight.dtype), shape = Shape::from([spec.m, spec.weight.rows]))]
    fn nf4_matmul(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self>;

    /// `y = x Wᵀ + b`, otherwise as [`nf4_matmul`](Self::nf4_matmul).
    ///
    /// # Shapes
    /// - `bias`: `[n]`, of `spec.weight.dtype`
    #[fusion(dtype = DType::from(spec.weight.dtype), shape = Shape::from([spec.m, spec.weight.rows]))]
    fn nf4_matmul_bias(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        bias: FloatTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self>;

    /// `y = x Wᵀ + s (x A) B`, otherwise as [`nf4_matmul`](Self::nf4_matmul).
    ///
    /// # Shapes
    /// - `a`: `[k, spec.rank]`, `b`: `[spec.rank, n]`, of `spec.dtype`
    #[fusion(
        dtype = DType::from(spec.matmul.weight.dtype),
        shape = Shape::from([spec.matmul.m, spec.matmul.weight.rows])
    )]
    fn nf4_matmul_lora(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: LoraSpec,
    ) -> FloatTensor<Self> {
        let y = Self::nf4_matmul(x.clone(), packed, spec.matmul);
        add_lora::<Self>(y, x, a, b, spec)
    }

    /// `y = x Wᵀ + b + s (x A) B`, otherwise as [`nf4_matmul_bias`](Self::nf4_matmul_bias) and
    /// [`nf4_matmul_lora`](Self::nf4_matmul_lora).
    #[fusion(
        dtype = DType::from(spec.matmul.weight.dtype),
        shape = Shape::from([spec.matmul.m, spec.matmul.weight.rows])
    )]
    fn nf4_matmul_bias_lora(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        bias: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: LoraSpec,
    ) -> FloatTensor<Self> {
        let y = Self::nf4_matmul_bias(x.clone(), packed, bias, spec.matmul);
        add_lora::<Self>(y, x, a, b, spec)
    }

    /// `dx = dy W`, the gradient of [`nf4_linear`](Self::nf4_linear) for `x`. The weight is
    /// decoded again.
    ///
    /// # Shapes
    /// - `grad`: `[m, n]`, of `spec.dtype`
    /// - `packed`: as for `nf4_linear`
    /// - returns `[m, k]`
    #[fusion(default)]
    fn nf4_linear_backward(
        grad: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: DequantizeSpec,
    ) -> FloatTensor<Self> {
        let weight = Self::nf4_dequantize(packed, spec);
        Self::float_matmul(grad, weight)
    }
}

/// `y = x Wᵀ` over the decoded weight.
pub(super) fn decoded_matmul<B: Nf4Backend>(
    x: FloatTensor<B>,
    packed: IntTensor<B>,
    spec: DequantizeSpec,
) -> FloatTensor<B> {
    let weight = B::nf4_dequantize(packed, spec);
    B::float_matmul(x, B::float_swap_dims(weight, 0, 1))
}

/// Adds a bias to the rows of `y`.
pub(super) fn add_bias<B: Backend>(
    y: FloatTensor<B>,
    bias: FloatTensor<B>,
    spec: MatmulSpec,
) -> FloatTensor<B> {
    let n = spec.weight.rows;
    let bias = B::float_reshape(bias, Shape::from([1, n]));
    B::float_add(y, B::float_expand(bias, Shape::from([spec.m, n])))
}

/// Adds `s (x A) B`, computed in the dtype of `A` and `B`.
pub(super) fn add_lora<B: Backend>(
    y: FloatTensor<B>,
    x: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    spec: LoraSpec,
) -> FloatTensor<B> {
    let x = B::float_cast(x, DType::from(spec.dtype).into());
    let branch = B::float_matmul(B::float_matmul(x, a), b);
    let branch = B::float_mul_scalar(branch, spec.scale.into());
    let dtype = DType::from(spec.matmul.weight.dtype);
    B::float_add(y, B::float_cast(branch, dtype.into()))
}

/// Checks in debug builds what the functions in front have promised.
pub(super) fn debug_check(packed: &impl TensorMetadata, layout: &PackedLayout) {
    debug_assert_eq!(packed.shape().as_slice(), [layout.words()]);
    debug_assert_eq!(packed.dtype(), DType::U32);
}
