//! Products of dense matrices by cuBLASLt, the library that PyTorch uses too.
//!
//! Nothing that CubeCL compiles reaches the tensor cores of a Hopper card at full speed (no `wgmma`, and
//! on the default back end no asynchronous copies), so the products with many rows of training and of
//! prompts are NVIDIA's. The library is looked for when the first product is computed: nothing is linked,
//! and no CUDA toolkit is needed to build.

mod context;
mod library;
mod product;
mod stream;
mod sys;

use std::fmt;
use std::sync::Arc;

use cubecl::prelude::Client;
use cubecl::server::Handle;

pub use library::{CUBLASLT_VARIABLE, set_cublaslt_path};
pub use product::{DenseProduct, MatrixLayout};

use super::{Buffer, check_dtype};
use crate::error::Nf4Error;
use context::{Context, Pointers, Prepared};
use stream::Buffers;

/// What goes into a dense product.
#[derive(Debug, Clone)]
pub struct DenseOperands {
    /// `A`: `[batch, m, k]`, as [`DenseProduct::lhs`] lays it out.
    pub lhs: Handle,
    /// `B`: `[batch, k, n]`, as [`DenseProduct::rhs`] lays it out.
    pub rhs: Handle,
    /// `s`.
    pub scale: f32,
    /// `C`: `[batch, m, n]` without gaps; may be the buffer of `D`.
    pub addend: Option<Handle>,
    /// `b`: `[n]`, there if [`DenseProduct::bias`] says so.
    pub bias: Option<Handle>,
}

/// A product by cuBLASLt, worked out but not yet made.
#[derive(Clone)]
pub struct DensePlan {
    client: Client,
    context: Arc<Context>,
    product: DenseProduct,
    prepared: Arc<Prepared>,
}

impl fmt::Debug for DensePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut plan = f.debug_struct("DensePlan");
        plan.field("product", &self.product).finish_non_exhaustive()
    }
}

impl DensePlan {
    /// Checks that cuBLASLt can be used on a device. The first time this makes its context there, which
    /// cannot be done while a graph is captured.
    ///
    /// # Errors
    /// [`Nf4Error::Variant`] unless it is a CUDA device, [`Nf4Error::Library`] if the library cannot be
    /// loaded or started, with all that was tried.
    pub fn check_device(client: &Client) -> Result<(), Nf4Error> {
        Context::of(client).map(drop)
    }

    /// The same without the reason, for those who ask often.
    pub fn has_device(client: &Client) -> bool {
        Context::exists(client)
    }

    /// Works out a product, the first time by cuBLASLt's heuristic, for which it waits for what was
    /// launched before to be enqueued. Nothing is launched.
    ///
    /// # Errors
    /// Those of [`check_device`](Self::check_device), [`Nf4Error::Variant`] too if cuBLASLt has no
    /// algorithm for it, [`Nf4Error::DeviceDtype`] if the device has no such type,
    /// [`Nf4Error::ElementCount`] for a size that is zero or larger than can be addressed,
    /// [`Nf4Error::Shape`] for rows that overlap.
    pub fn new(client: &Client, product: DenseProduct) -> Result<Self, Nf4Error> {
        product.check()?;
        let product = product.normalized();
        check_dtype(client, product.dtype)?;
        let context = Context::of(client)?;
        let prepared = context.prepare(&product)?;
        Ok(Self {
            client: client.clone(),
            context,
            product,
            prepared,
        })
    }

    /// Bytes of `D`.
    pub fn out_bytes(&self) -> usize {
        let DenseProduct {
            batch, m, n, dtype, ..
        } = self.product;
        batch * m * n * dtype.size_bytes()
    }

    /// Enqueues the product on the stream of the calling thread, behind what that has launched before.
    /// Does not wait. `out` is `D`: `[batch, m, n]` without gaps.
    ///
    /// An error of cuBLASLt itself is that of the buffer `out`, for whoever reads it. A stream given to a
    /// client by `Client::set_stream` is not followed.
    ///
    /// # Errors
    /// [`Nf4Error::Length`], in bytes, for a buffer that is too small, missing, or not of the product,
    /// [`Nf4Error::Alignment`] for one that does not begin at a multiple of 16 bytes,
    /// [`Nf4Error::Device`] for one of another device, [`Nf4Error::Config`] if `out` shares memory with
    /// an operand and is not all of the addend.
    pub fn launch(&self, operands: DenseOperands, out: Handle) -> Result<(), Nf4Error> {
        let DenseProduct {
            batch,
            m,
            n,
            k,
            lhs,
            rhs,
            dtype,
            bias,
            ..
        } = self.product;
        if operands.bias.is_some() != bias {
            let bytes = |there| if there { n * dtype.size_bytes() } else { 0 };
            return Err(Nf4Error::Length {
                tensor: "bias".into(),
                expected: bytes(bias),
                given: bytes(!bias),
            });
        }
        let sizes = [
            ("lhs", Some(&operands.lhs), lhs.elems(m, k, batch)),
            ("rhs", Some(&operands.rhs), rhs.elems(k, n, batch)),
            ("addend", operands.addend.as_ref(), Some(batch * m * n)),
            ("bias", operands.bias.as_ref(), Some(n)),
            ("product", Some(&out), Some(batch * m * n)),
        ];
        for (name, handle, elems) in sizes {
            let Some(handle) = handle else { continue };
            if handle.service != self.client.service_id() {
                return Err(Nf4Error::Device {
                    tensor: name.into(),
                    expected: self.client.service_id().to_string(),
                    given: handle.service.to_string(),
                });
            }
            Buffer {
                name,
                handle,
                dims: [elems.unwrap_or(usize::MAX), 1],
                elem_bytes: dtype.size_bytes(),
            }
            .check()?;
            let same_memory =
                name != "product" && handle.memory.descriptor() == out.memory.descriptor();
            let in_place = name == "addend" && handle.offset_start == out.offset_start;
            if same_memory && !in_place {
                return Err(Nf4Error::Config {
                    field: "memory of a product",
                    expected: "its own, or that of the addend from the same place on",
                    given: format!("that of {name}"),
                });
            }
        }
        let workspace_bytes = self.prepared.workspace_bytes;
        let workspace = (workspace_bytes > 0).then(|| self.client.empty(workspace_bytes));
        let DenseOperands {
            lhs,
            rhs,
            scale,
            addend,
            bias,
        } = operands;
        let [has_addend, has_bias] = [addend.is_some(), bias.is_some()];
        let read = [Some(lhs), Some(rhs), addend, bias].into_iter().flatten();
        let written = [Some(out), workspace].into_iter().flatten();
        let buffers = Buffers {
            read: read.map(Handle::binding).collect(),
            written: written.map(Handle::binding).collect(),
        };
        let (context, prepared) = (self.context.clone(), self.prepared.clone());
        let product = self.product;
        let enqueue = move |resolved: stream::Resolved| {
            let mut added = resolved.read[2..].iter().copied();
            let pointers = Pointers {
                lhs: resolved.read[0],
                rhs: resolved.read[1],
                addend: has_addend.then(|| added.next()).flatten(),
                bias: has_bias.then(|| added.next()).flatten(),
                out: resolved.written[0],
                workspace: resolved.written.get(1).copied().unwrap_or(0),
            };
            // SAFETY: the context is current and the stream the device's. The buffers are as large as
            // the product asks for, and the result overlaps none that it may not, all checked above. The
            // workspace was taken for this call alone, from the memory of this stream.
            let enqueued = unsafe { context.enqueue(&prepared, &pointers, scale, resolved.stream) };
            enqueued.map_err(|reason| format!("{product}: {reason}"))
        };
        // SAFETY: the buffers belong to the device, as was checked, and are all that the product uses.
        unsafe { self.context.door.submit(buffers, enqueue) };
        Ok(())
    }
}
