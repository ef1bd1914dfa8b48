//! Products of dense matrices by cuBLASLt, the library that PyTorch uses too.
//!
//! Nothing that CubeCL compiles reaches the tensor cores of a Hopper card at full speed (no `wgmma`, and
//! on the default back end no asynchronous copies), so the products with many rows of training and of
//! prompts are NVIDIA's. The library is looked for when the first product is computed: nothing is linked,
//! and no CUDA toolkit is needed to build.

mod context;
mod library;
mod stream;
mod sys;

use std::fmt;
use std::sync::Arc;

use cubecl::prelude::Client;
use cubecl::server::Handle;

pub use library::{CUBLASLT_VARIABLE, set_cublaslt_path};

use super::{Buffer, check_dtype};
use crate::error::Nf4Error;
use crate::format::FloatType;
use context::{Context, Prepared};
use stream::Buffers;

/// How a matrix lies in its buffer, row after row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatrixLayout {
    /// Whether the buffer holds the transpose of the matrix.
    pub transposed: bool,
    /// Elements from one stored row to the next.
    pub leading: usize,
    /// Elements from one matrix of a batch to the next; zero uses one for all.
    pub batch_stride: usize,
}

impl MatrixLayout {
    /// Rows without gaps, matrices without gaps.
    pub const fn contiguous(rows: usize, columns: usize) -> Self {
        Self {
            transposed: false,
            leading: columns,
            batch_stride: rows.saturating_mul(columns),
        }
    }

    /// The transpose of the matrix without gaps; the sizes are those of the matrix.
    pub const fn contiguous_transposed(rows: usize, columns: usize) -> Self {
        Self {
            transposed: true,
            leading: rows,
            batch_stride: rows.saturating_mul(columns),
        }
    }

    /// The sizes as they are stored, of a matrix of these sizes.
    fn stored(&self, rows: usize, columns: usize) -> [usize; 2] {
        match self.transposed {
            false => [rows, columns],
            true => [columns, rows],
        }
    }

    /// Elements up to the end of the last matrix; `None` if they are more than can be counted.
    fn elems(&self, rows: usize, columns: usize, batch: usize) -> Option<usize> {
        let [rows, columns] = self.stored(rows, columns);
        let matrix = (rows - 1).checked_mul(self.leading)?.checked_add(columns)?;
        (batch - 1)
            .checked_mul(self.batch_stride)?
            .checked_add(matrix)
    }

    /// The same without what does not matter: the distance between rows or matrices where there is one.
    fn normalized(self, rows: usize, columns: usize, batch: usize) -> Self {
        let [stored_rows, width] = self.stored(rows, columns);
        Self {
            leading: if stored_rows == 1 {
                width
            } else {
                self.leading
            },
            batch_stride: if batch == 1 { 0 } else { self.batch_stride },
            ..self
        }
    }

    fn check(&self, name: &str, rows: usize, columns: usize, batch: usize) -> Result<(), Nf4Error> {
        let [stored_rows, width] = self.stored(rows, columns);
        if self.leading < width {
            return Err(Nf4Error::Shape {
                tensor: format!("rows of {name}"),
                expected: vec![stored_rows, width],
                given: vec![stored_rows, self.leading],
            });
        }
        match self.elems(rows, columns, batch) {
            Some(elems) if elems <= isize::MAX as usize / 4 => Ok(()),
            _ => Err(Nf4Error::ElementCount {
                tensor: name.into(),
                shape: vec![batch, rows, columns],
            }),
        }
    }
}

/// `D = s A B + C + b`, of matrices of one type, for each of a batch.
///
/// Sums are in f32. For some sizes cuBLASLt rounds `s A B` to the type before it adds `C` and `b`, as
/// operations one after the other do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DenseProduct {
    /// Matrices of the batch.
    pub batch: usize,
    /// Rows of `A` and `D`.
    pub m: usize,
    /// Columns of `B` and `D`.
    pub n: usize,
    /// Columns of `A`, rows of `B`.
    pub k: usize,
    /// How `A` lies in memory.
    pub lhs: MatrixLayout,
    /// How `B` lies in memory.
    pub rhs: MatrixLayout,
    /// Type of all matrices.
    pub dtype: FloatType,
    /// Whether f32 may be multiplied as TF32, with 11 bits of each factor.
    pub tf32: bool,
    /// Whether there is a `b`, added to each row.
    pub bias: bool,
}

impl DenseProduct {
    /// `D = A B` of one pair of matrices without gaps.
    pub const fn new(m: usize, n: usize, k: usize, dtype: FloatType) -> Self {
        Self {
            batch: 1,
            m,
            n,
            k,
            lhs: MatrixLayout::contiguous(m, k),
            rhs: MatrixLayout::contiguous(k, n),
            dtype,
            tf32: false,
            bias: false,
        }
    }

    /// The product that all products which are computed alike have in common.
    fn normalized(self) -> Self {
        let Self { batch, m, n, k, .. } = self;
        Self {
            lhs: self.lhs.normalized(m, k, batch),
            rhs: self.rhs.normalized(k, n, batch),
            tf32: self.tf32 && self.dtype == FloatType::F32,
            ..self
        }
    }

    /// # Errors
    /// [`Nf4Error::ElementCount`] for a size that is zero or larger than cuBLASLt or memory can address,
    /// [`Nf4Error::Shape`] for rows that overlap.
    fn check(&self) -> Result<(), Nf4Error> {
        let Self { batch, m, n, k, .. } = *self;
        let most = i32::MAX as usize;
        if [batch, m, n, k]
            .iter()
            .any(|&size| size == 0 || size > most)
        {
            return Err(Nf4Error::ElementCount {
                tensor: "a dense product".into(),
                shape: vec![batch, m, n, k],
            });
        }
        self.lhs.check("lhs", m, k, batch)?;
        self.rhs.check("rhs", k, n, batch)?;
        MatrixLayout::contiguous(m, n).check("product", m, n, batch)
    }
}

impl fmt::Display for DenseProduct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { batch, m, n, k, .. } = self;
        let dtype = self.dtype.name();
        write!(
            f,
            "product of {batch} x [{m}, {k}] and [{k}, {n}] in {dtype}"
        )
    }
}

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
        let buffers = Buffers {
            lhs: operands.lhs.binding(),
            rhs: operands.rhs.binding(),
            scale: operands.scale,
            addend: operands.addend.map(Handle::binding),
            bias: operands.bias.map(Handle::binding),
            out: out.binding(),
            workspace: workspace.map(Handle::binding),
        };
        let (context, prepared) = (self.context.clone(), self.prepared.clone());
        // SAFETY: the buffers belong to the device and are as large as the product asks for, and the
        // result overlaps none that it may not, all checked above.
        unsafe { stream::submit(context, self.product, prepared, buffers) };
        Ok(())
    }
}
