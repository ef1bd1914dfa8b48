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

/// A decoded weight with a low-rank branch added to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WeightLoraSpec {
    /// The weight, whole.
    pub weight: DequantizeSpec,
    /// The factor `s` of the branch.
    pub scale: f64,
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
    /// Decode the weight, then a dense product: cuBLASLt's where that is used (see
    /// [`DenseProvider`](super::DenseProvider)), else Burn's.
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
    /// Whether dense products are `dense_matmul`'s: cuBLASLt's, or those of `host` on Flex.
    pub cublaslt: bool,
}

/// Which rows of a packed weight to gather, and to what to decode them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmbeddingSpec {
    /// Layout of the packed weight.
    pub layout: PackedLayout,
    /// Rows of the weight.
    pub rows: usize,
    /// Columns of the weight and of the result.
    pub columns: usize,
    /// Whether the weight is stored `[columns, rows]`.
    pub transposed: bool,
    /// Number of ids, the rows of the result.
    pub ids: usize,
    /// Type to decode to.
    pub dtype: FloatType,
}

/// A product of dense matrices by cuBLASLt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DenseSpec {
    /// Matrices of the batch, where the tensors have three dimensions; `None` where they have two.
    pub batch: Option<usize>,
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Terms of each sum.
    pub k: usize,
    /// Whether the left matrix is `[k, m]`.
    pub transpose_lhs: bool,
    /// Whether the right matrix is `[n, k]`.
    pub transpose_rhs: bool,
    /// The factor of the product.
    pub scale: f32,
    /// Type of all matrices.
    pub dtype: FloatType,
    /// Whether f32 may be multiplied as TF32.
    pub tf32: bool,
}

impl DenseSpec {
    /// `x y` of two matrices, or with `transpose_rhs` `x yᵀ`.
    pub fn of_matrices([m, n, k]: [usize; 3], transpose_rhs: bool, dtype: FloatType) -> Self {
        Self {
            batch: None,
            m,
            n,
            k,
            transpose_lhs: false,
            transpose_rhs,
            scale: 1.0,
            dtype,
            tf32: false,
        }
    }

    /// Shape of the result.
    pub fn out_shape(&self) -> Shape {
        match self.batch {
            None => Shape::from([self.m, self.n]),
            Some(batch) => Shape::from([batch, self.m, self.n]),
        }
    }
}

/// A product with a packed weight in one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatmulSpec {
    /// The weight, whole, and the type of the product.
    pub weight: DequantizeSpec,
    /// How it is computed.
    pub strategy: MatmulStrategy,
    /// Whether dense products are `dense_matmul`'s: cuBLASLt's, or those of `host` on Flex.
    pub cublaslt: bool,
    /// Rows of `x`.
    pub m: usize,
}

impl MatmulSpec {
    /// Products with more rows go over the decoded weight unless another way is asked for.
    pub const MAX_ROWS: usize = 256;

    /// The product, if it is one operation: if it may be computed without the decoded weight, or by
    /// cuBLASLt, which adds a bias and a branch on the way.
    pub fn of(linear: LinearSpec, m: usize) -> Option<Self> {
        let LinearSpec {
            weight,
            strategy,
            cublaslt,
        } = linear;
        let elems = weight.rows.checked_mul(weight.columns);
        let whole = weight.start == 0 && elems == Some(weight.layout.elems());
        let one = match strategy {
            MatmulStrategy::Auto | MatmulStrategy::Rule => cublaslt || m <= Self::MAX_ROWS,
            MatmulStrategy::Decode => cublaslt,
            MatmulStrategy::Gemv | MatmulStrategy::TensorCore | MatmulStrategy::Levels => true,
        };
        (whole && one).then_some(Self {
            weight,
            strategy,
            cublaslt,
            m,
        })
    }

    /// Whether it goes over the decoded weight whatever is measured.
    pub(super) fn decodes(&self) -> bool {
        match self.strategy {
            MatmulStrategy::Auto | MatmulStrategy::Rule => self.m > Self::MAX_ROWS,
            MatmulStrategy::Decode => true,
            MatmulStrategy::Gemv | MatmulStrategy::TensorCore | MatmulStrategy::Levels => false,
        }
    }

    /// The product `x Wᵀ` of the decoded weight, or without `transpose` `x W`.
    pub(super) fn decoded(&self, transpose: bool) -> DenseSpec {
        let (n, k) = match transpose {
            true => (self.weight.rows, self.weight.columns),
            false => (self.weight.columns, self.weight.rows),
        };
        DenseSpec::of_matrices([self.m, n, k], transpose, self.weight.dtype)
    }

    /// The same without the number of rows.
    pub fn linear(&self) -> LinearSpec {
        LinearSpec {
            weight: self.weight,
            strategy: self.strategy,
            cublaslt: self.cublaslt,
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

impl LoraSpec {
    /// Whether the branch loses nothing that training needs when it is computed in the dtype of `x`: f16
    /// may overflow where f32 does not.
    pub(super) fn fits_x(&self) -> bool {
        let of_x = self.matmul.weight.dtype;
        self.dtype == of_x || (self.dtype, of_x) == (FloatType::F32, FloatType::BF16)
    }

    /// The product `s x A` in a type.
    pub(super) fn down(&self, dtype: FloatType) -> DenseSpec {
        let MatmulSpec { m, weight, .. } = self.matmul;
        DenseSpec {
            scale: self.scale as f32,
            ..DenseSpec::of_matrices([m, self.rank, weight.columns], false, dtype)
        }
    }

    /// The product of that and `B`.
    pub(super) fn up(&self, dtype: FloatType) -> DenseSpec {
        let MatmulSpec { m, weight, .. } = self.matmul;
        DenseSpec::of_matrices([m, weight.rows, self.rank], false, dtype)
    }
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
pub trait QuantBackend: Backend {
    /// Quantizes a weight. No gradient flows through.
    ///
    /// # Shapes
    /// - `weight`: `spec.shape`, of `spec.dtype`
    /// - returns `[spec.layout.words()]`, u32
    #[fusion(dtype = DType::U32, shape = Shape::from([spec.layout.words()]))]
    fn quant_quantize(weight: FloatTensor<Self>, spec: QuantizeSpec) -> IntTensor<Self>;

    /// Decodes a range of a packed weight.
    ///
    /// # Shapes
    /// - `packed`: `[spec.layout.words()]`, u32
    /// - returns `[spec.rows, spec.columns]`, of `spec.dtype`
    #[fusion(dtype = DType::from(spec.dtype), shape = Shape::from([spec.rows, spec.columns]))]
    fn quant_dequantize(packed: IntTensor<Self>, spec: DequantizeSpec) -> FloatTensor<Self>;

    /// Gathers rows of a packed weight and decodes nothing else. No gradient flows through.
    ///
    /// An id that no row has makes Flex panic, and is a row of NaN elsewhere.
    ///
    /// # Shapes
    /// - `ids`: `[spec.ids]`, at least one, of any integer type
    /// - `packed`: `[spec.layout.words()]`, u32, a weight `[spec.rows, spec.columns]`
    /// - returns `[spec.ids, spec.columns]`, of `spec.dtype`
    #[fusion(dtype = DType::from(spec.dtype), shape = Shape::from([spec.ids, spec.columns]))]
    fn quant_embedding(
        ids: IntTensor<Self>,
        packed: IntTensor<Self>,
        spec: EmbeddingSpec,
    ) -> FloatTensor<Self>;

    /// `y = x Wᵀ` with a packed weight `W`.
    ///
    /// # Shapes
    /// - `x`: `[m, k]`, of `spec.weight.dtype`
    /// - `packed`: `[layout.words()]`, u32, a weight `[n, k] = [rows, columns]` of `spec.weight`
    /// - returns `[m, n]`
    #[fusion(default)]
    fn quant_linear(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: LinearSpec,
    ) -> FloatTensor<Self> {
        if let Some(spec) = MatmulSpec::of(spec, x.shape()[0]) {
            return Self::quant_matmul(x, packed, spec);
        }
        decoded_matmul::<Self>(x, packed, None, spec)
    }

    /// `y = x Wᵀ` in one operation, so that a backend can multiply with the packed weight as it is.
    ///
    /// # Shapes
    /// - `x`: `[spec.m, k]`, of `spec.weight.dtype`
    /// - `packed`: as for `quant_linear`
    /// - returns `[spec.m, n]`
    #[fusion(dtype = DType::from(spec.weight.dtype), shape = Shape::from([spec.m, spec.weight.rows]))]
    fn quant_matmul(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self>;

    /// `y = x Wᵀ + b`, otherwise as [`quant_matmul`](Self::quant_matmul).
    ///
    /// # Shapes
    /// - `bias`: `[n]`, of `spec.weight.dtype`
    #[fusion(dtype = DType::from(spec.weight.dtype), shape = Shape::from([spec.m, spec.weight.rows]))]
    fn quant_matmul_bias(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        bias: FloatTensor<Self>,
        spec: MatmulSpec,
    ) -> FloatTensor<Self>;

    /// `y = x Wᵀ + s (x A) B`, otherwise as [`quant_matmul`](Self::quant_matmul).
    ///
    /// # Shapes
    /// - `a`: `[k, spec.rank]`, `b`: `[spec.rank, n]`, of `spec.dtype`
    #[fusion(
        dtype = DType::from(spec.matmul.weight.dtype),
        shape = Shape::from([spec.matmul.m, spec.matmul.weight.rows])
    )]
    fn quant_matmul_lora(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: LoraSpec,
    ) -> FloatTensor<Self> {
        let y = Self::quant_matmul(x.clone(), packed, spec.matmul);
        add_lora::<Self>(y, x, a, b, spec)
    }

    /// `y = x Wᵀ + b + s (x A) B`, otherwise as [`quant_matmul_bias`](Self::quant_matmul_bias) and
    /// [`quant_matmul_lora`](Self::quant_matmul_lora).
    #[fusion(
        dtype = DType::from(spec.matmul.weight.dtype),
        shape = Shape::from([spec.matmul.m, spec.matmul.weight.rows])
    )]
    fn quant_matmul_bias_lora(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        bias: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: LoraSpec,
    ) -> FloatTensor<Self> {
        let y = Self::quant_matmul_bias(x.clone(), packed, bias, spec.matmul);
        add_lora::<Self>(y, x, a, b, spec)
    }

    /// `dx = dy W`, the gradient of [`quant_linear`](Self::quant_linear) for `x`. The weight is
    /// decoded again.
    ///
    /// # Shapes
    /// - `grad`: `[m, n]`, of `spec.weight.dtype`
    /// - `packed`: as for `quant_linear`
    /// - returns `[m, k]`
    #[fusion(default)]
    fn quant_linear_backward(
        grad: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: LinearSpec,
    ) -> FloatTensor<Self> {
        let LinearSpec {
            weight, cublaslt, ..
        } = spec;
        let sizes = [grad.shape()[0], weight.columns, weight.rows];
        let decoded = Self::quant_dequantize(packed, weight);
        match cublaslt {
            true => {
                let spec = DenseSpec::of_matrices(sizes, false, weight.dtype);
                Self::dense_matmul(grad, decoded, spec)
            }
            false => Self::float_matmul(grad, decoded),
        }
    }

    /// `Wᵀ`, decoded, as a parameter of an unchanged module. Autodiff keeps how to compute it, not its
    /// values.
    ///
    /// # Shapes
    /// - `anchor`: `[1]`, any values; with a graph it connects the weight to it, see
    ///   `effective_weight`
    /// - `packed`: as for `quant_linear`
    /// - returns `[k, n]`, of `spec.dtype`
    #[fusion(default)]
    fn quant_weight(
        anchor: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: DequantizeSpec,
    ) -> FloatTensor<Self> {
        let _ = anchor;
        Self::float_swap_dims(Self::quant_dequantize(packed, spec), 0, 1)
    }

    /// `Wᵀ + s A B`, otherwise as [`quant_weight`](Self::quant_weight).
    ///
    /// # Shapes
    /// - `a`: `[k, rank]`, `b`: `[rank, n]`, of `spec.weight.dtype`
    #[fusion(default)]
    fn quant_weight_lora(
        anchor: FloatTensor<Self>,
        packed: IntTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: WeightLoraSpec,
    ) -> FloatTensor<Self> {
        let _ = anchor;
        // Added before it is transposed, and scaled while it is small: CPUs are slow at passing through
        // a transposed matrix.
        let [a, b] = [a, b].map(|factor| Self::float_swap_dims(factor, 0, 1));
        let b = Self::float_mul_scalar(b, spec.scale.into());
        let decoded = Self::quant_dequantize(packed, spec.weight);
        let sum = Self::float_add(decoded, Self::float_matmul(b, a));
        Self::float_swap_dims(sum, 0, 1)
    }

    /// `s A B` of dense matrices, by cuBLASLt where the backend has it.
    ///
    /// # Shapes
    /// - `lhs`: `[m, k]`, or `[batch, m, k]`, the last two exchanged with `spec.transpose_lhs`
    /// - `rhs`: `[k, n]`, or `[batch, k, n]`, exchanged with `spec.transpose_rhs`
    /// - returns [`DenseSpec::out_shape`]
    #[fusion(dtype = DType::from(spec.dtype), shape = spec.out_shape())]
    fn dense_matmul(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        spec: DenseSpec,
    ) -> FloatTensor<Self> {
        composed_matmul::<Self>(lhs, rhs, spec)
    }

    /// `s A B + b`, otherwise as [`dense_matmul`](Self::dense_matmul).
    ///
    /// # Shapes
    /// - `bias`: `[n]`
    #[fusion(dtype = DType::from(spec.dtype), shape = spec.out_shape())]
    fn dense_matmul_bias(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        spec: DenseSpec,
    ) -> FloatTensor<Self> {
        add_bias::<Self>(Self::dense_matmul(lhs, rhs, spec), bias)
    }

    /// A zero, `[1]`. Under autodiff its backward pass gives `y` the gradient `grad`, whatever comes back.
    ///
    /// # Shapes
    /// - `grad`: that of `y`
    #[fusion(default)]
    fn gradient_seed(y: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let _ = grad;
        let (device, dtype) = (y.device(), y.dtype());
        Self::float_zeros(Shape::from([1]), &device, dtype.into())
    }

    /// A zero, `[1]`. Under autodiff its backward pass gives the operands of
    /// [`quant_matmul_lora`](Self::quant_matmul_lora) their gradients for a gradient `grad` of its result, which is
    /// not computed; by cuBLASLt.
    ///
    /// # Shapes
    /// - `grad`: `[m, n]`
    #[fusion(default)]
    fn quant_lora_seed(
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        spec: LoraSpec,
    ) -> FloatTensor<Self> {
        let _ = (packed, a, b, spec);
        Self::gradient_seed(x, grad)
    }

    /// `C + s A B`, in the place of `C` if nobody else needs it, otherwise as
    /// [`dense_matmul`](Self::dense_matmul).
    ///
    /// # Shapes
    /// - `addend`: that of the result
    #[fusion(dtype = DType::from(spec.dtype), shape = spec.out_shape())]
    fn dense_matmul_add(
        addend: FloatTensor<Self>,
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        spec: DenseSpec,
    ) -> FloatTensor<Self> {
        Self::float_add(addend, Self::dense_matmul(lhs, rhs, spec))
    }

    /// `C + x Wᵀ` over the decoded weight, or without `transpose` `C + x W`, in the place of `C` as
    /// [`dense_matmul_add`](Self::dense_matmul_add).
    #[fusion(default)]
    fn quant_matmul_add(
        addend: FloatTensor<Self>,
        x: FloatTensor<Self>,
        packed: IntTensor<Self>,
        spec: MatmulSpec,
        transpose: bool,
    ) -> FloatTensor<Self> {
        let decoded = Self::quant_dequantize(packed, spec.weight);
        Self::dense_matmul_add(addend, x, decoded, spec.decoded(transpose))
    }
}

/// `s A B` by the backend's own product.
pub(super) fn composed_matmul<B: Backend>(
    lhs: FloatTensor<B>,
    rhs: FloatTensor<B>,
    spec: DenseSpec,
) -> FloatTensor<B> {
    let oriented = |matrix: FloatTensor<B>, transpose| match (transpose, spec.batch) {
        (false, _) => matrix,
        (true, None) => B::float_swap_dims(matrix, 0, 1),
        (true, Some(_)) => B::float_swap_dims(matrix, 1, 2),
    };
    let lhs = oriented(lhs, spec.transpose_lhs);
    let y = B::float_matmul(lhs, oriented(rhs, spec.transpose_rhs));
    match spec.scale {
        1.0 => y,
        scale => B::float_mul_scalar(y, scale.into()),
    }
}

/// `y = x Wᵀ + b` over the decoded weight.
pub(super) fn decoded_matmul<B: QuantBackend>(
    x: FloatTensor<B>,
    packed: IntTensor<B>,
    bias: Option<FloatTensor<B>>,
    spec: LinearSpec,
) -> FloatTensor<B> {
    let LinearSpec {
        weight, cublaslt, ..
    } = spec;
    let sizes = [x.shape()[0], weight.rows, weight.columns];
    let decoded = B::quant_dequantize(packed, weight);
    let product = DenseSpec::of_matrices(sizes, true, weight.dtype);
    match (cublaslt, bias) {
        (true, Some(bias)) => B::dense_matmul_bias(x, decoded, bias, product),
        (true, None) => B::dense_matmul(x, decoded, product),
        (false, bias) => {
            let y = B::float_matmul(x, B::float_swap_dims(decoded, 0, 1));
            match bias {
                Some(bias) => add_bias::<B>(y, bias),
                None => y,
            }
        }
    }
}

/// A product with a branch, `x Wᵀ + b + s (x A) B` by cuBLASLt in the dtype of `x`, and `s x A`.
///
/// The small product comes first, and the large one adds to it while it multiplies: the other way round the
/// result would be read and written once more. Few rows go over the packed weight.
pub(super) fn lora_product<B: QuantBackend>(
    x: FloatTensor<B>,
    packed: IntTensor<B>,
    [a, b]: [FloatTensor<B>; 2],
    bias: Option<FloatTensor<B>>,
    spec: LoraSpec,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = spec.matmul.weight.dtype;
    let down = B::dense_matmul(x.clone(), a, spec.down(dtype));
    if !spec.matmul.decodes() {
        let y = match bias {
            None => B::quant_matmul(x, packed, spec.matmul),
            Some(bias) => B::quant_matmul_bias(x, packed, bias, spec.matmul),
        };
        return (
            B::dense_matmul_add(y, down.clone(), b, spec.up(dtype)),
            down,
        );
    }
    let branch = match bias {
        None => B::dense_matmul(down.clone(), b, spec.up(dtype)),
        Some(bias) => B::dense_matmul_bias(down.clone(), b, bias, spec.up(dtype)),
    };
    (
        B::quant_matmul_add(branch, x, packed, spec.matmul, true),
        down,
    )
}

/// Adds a bias to the rows of `y`.
pub(super) fn add_bias<B: Backend>(y: FloatTensor<B>, bias: FloatTensor<B>) -> FloatTensor<B> {
    let shape = y.shape();
    let mut of_bias = shape.clone();
    let last = of_bias.rank() - 1;
    of_bias.as_mut_slice()[..last].fill(1);
    let bias = B::float_expand(B::float_reshape(bias, of_bias), shape);
    B::float_add(y, bias)
}

/// Adds `s (x A) B`: by cuBLASLt, to the result in its place where it can be in the dtype of `x`; else
/// computed in the dtype of `A`.
pub(super) fn add_lora<B: QuantBackend>(
    y: FloatTensor<B>,
    x: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    spec: LoraSpec,
) -> FloatTensor<B> {
    let MatmulSpec {
        weight, cublaslt, ..
    } = spec.matmul;
    let dtype = match cublaslt && spec.fits_x() {
        true => weight.dtype,
        false => spec.dtype,
    };
    let [x, a, b] = [x, a, b].map(|tensor| cast::<B>(tensor, dtype));
    if !cublaslt {
        let branch = B::float_matmul(B::float_matmul(x, a), b);
        let branch = B::float_mul_scalar(branch, spec.scale.into());
        return B::float_add(y, cast::<B>(branch, weight.dtype));
    }
    let down = B::dense_matmul(x, a, spec.down(dtype));
    if dtype == weight.dtype {
        return B::dense_matmul_add(y, down, b, spec.up(dtype));
    }
    let branch = B::dense_matmul(down, b, spec.up(dtype));
    B::float_add(y, cast::<B>(branch, weight.dtype))
}

/// A tensor in a type, itself if it is of that type.
pub(super) fn cast<B: Backend>(tensor: FloatTensor<B>, dtype: FloatType) -> FloatTensor<B> {
    let dtype = DType::from(dtype);
    match tensor.dtype() == dtype {
        true => tensor,
        false => B::float_cast(tensor, dtype.into()),
    }
}

/// Checks in debug builds what the functions in front have promised.
pub(super) fn debug_check(packed: &impl TensorMetadata, layout: &PackedLayout) {
    debug_assert_eq!(packed.shape().as_slice(), [layout.words()]);
    debug_assert_eq!(packed.dtype(), DType::U32);
}
