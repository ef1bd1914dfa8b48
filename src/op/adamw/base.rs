//! The optimizer's operations as Burn's dispatch sees them.
//!
//! Arguments are validated by [`FlatAdamW`](super::FlatAdamW) in front.

#![allow(
    clippy::large_enum_variant,
    reason = "those of a run are few, and those that the macro makes of them live for a call"
)]

use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, ExtensionType, backend_extension};
#[cfg(feature = "fusion")]
use burn::tensor::{DType, Shape};

use super::parts::FlatParts;
#[cfg(feature = "fusion")]
use super::parts::FlatPartsMetadata;
use crate::flat::{AdamWForm, AdamWScalars, FlatLayout};
use crate::format::FloatType;

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;

/// Which tensors are added to a flat buffer.
#[derive(Debug, Clone)]
pub struct AccumulateSpec {
    /// Of the buffer.
    pub layout: Arc<FlatLayout>,
    /// Their numbers.
    pub tensors: Vec<usize>,
    /// Their type.
    pub dtype: FloatType,
}

/// A step of AdamW.
#[derive(Debug, Clone)]
pub struct AdamWSpec {
    /// Of the buffers.
    pub layout: Arc<FlatLayout>,
    /// Tiles that it is a step of.
    pub count: usize,
    pub(crate) scalars: AdamWScalars,
    pub(crate) form: AdamWForm,
}

/// The moments of so many tiles, one after the other.
#[derive(ExtensionType)]
#[cfg_attr(feature = "fusion", extension_type(fusion))]
pub enum Moments<B: Backend> {
    /// f32.
    F32 {
        /// `[count * 256]`: the averages of the gradients.
        first: FloatTensor<B>,
        /// `[count * 256]`: the averages of their squares.
        second: FloatTensor<B>,
    },
    /// In 8 bit.
    Bits8 {
        /// `[count * 64]`, u32: the codes of first moments, four a word.
        first: IntTensor<B>,
        /// `[count * 64]`, u32: the codes of second moments.
        second: IntTensor<B>,
        /// `[count]`: what first moments of a tile are multiplied by.
        first_max: FloatTensor<B>,
        /// `[count]`: what second moments of a tile are multiplied by.
        second_max: FloatTensor<B>,
        /// `[512]`: the values of the codes, of first and of second moments.
        maps: FloatTensor<B>,
    },
}

/// The optimizer of a backend: kernels on CubeCL, `host` on Flex. Buffers without another owner are written to in
/// place. None of it has a gradient.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait AdamWBackend: Backend {
    /// The buffer with tensors added to their parts of it.
    ///
    /// # Shapes
    /// - `flat`: `[layout.elems()]`, f32, and so the result; `parts`: `[len]` each, of `spec.dtype`
    #[fusion(meta = |flat: &TensorSpec, _parts: &FlatPartsMetadata, _spec: &AccumulateSpec| flat.clone())]
    fn flat_accumulate(
        flat: FloatTensor<Self>,
        #[extension_type] parts: FlatParts<Self>,
        spec: AccumulateSpec,
    ) -> FloatTensor<Self>;

    /// The loss, and the norm of the buffer.
    ///
    /// # Shapes
    /// - `flat`: `[elems]`, a multiple of 256; `loss`: `[1]`; the result: `[2]`; all f32
    #[fusion(meta = |_flat: &TensorSpec, _loss: &TensorSpec| {
        TensorSpec::new(Shape::from([2]), DType::F32)
    })]
    fn step_report(flat: FloatTensor<Self>, loss: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Parameters and moments after a step, and gradients of zero, of the tiles that are given.
    ///
    /// # Shapes
    /// - `values`, `grads`: `[layout.elems()]`, f32, and so the results
    /// - `report`: `[2]`; `tiles`: `[3 * count]`, u32; `factors`: `[2 * layout.tensors()]`
    #[fusion(meta = |values: &TensorSpec, grads: &TensorSpec, _report: &TensorSpec, _tiles: &TensorSpec, _factors: &TensorSpec, moments: &MomentsMetadata, _spec: &AdamWSpec| {
        (values.clone(), grads.clone(), moments.clone())
    })]
    #[allow(clippy::too_many_arguments)]
    fn flat_adamw(
        values: FloatTensor<Self>,
        grads: FloatTensor<Self>,
        report: FloatTensor<Self>,
        tiles: IntTensor<Self>,
        factors: FloatTensor<Self>,
        #[extension_type] moments: Moments<Self>,
        spec: AdamWSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, Moments<Self>);
}
