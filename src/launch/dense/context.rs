//! cuBLASLt on one device: its handle, and the algorithm of each product.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use cubecl::prelude::Client;
use cubecl_common::device::DeviceId;

use super::library;
use super::product::{DenseProduct, MatrixLayout};
use super::stream::{Door, is_cuda};
use super::sys::{self, Functions, Status};
use crate::error::Nf4Error;
use crate::format::FloatType;

/// The most that an algorithm may ask for: what the documentation of cuBLAS recommends for Hopper
/// (`cublasSetWorkspace`).
const MAX_WORKSPACE_BYTES: usize = 32 << 20;

/// What is promised of every matrix: that it begins at a multiple of so many bytes, which is what a launch
/// asks of every buffer.
const ALIGNMENT_BYTES: u32 = 16;

/// Products that are remembered, about 1 KB each. Prompts have any length, so the number of products
/// has no end.
const MAX_PREPARED: usize = 4096;

/// cuBLASLt on one device.
pub(super) struct Context {
    pub door: Door,
    functions: Functions,
    handle: sys::LtHandle,
    prepared: Mutex<HashMap<DenseProduct, Result<Arc<Prepared>, String>>>,
}

// SAFETY: cuBLASLt's functions may be called with one handle from several threads.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// Where the matrices of a product lie on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pointers {
    pub lhs: u64,
    pub rhs: u64,
    /// What is added, if anything is.
    pub addend: Option<u64>,
    pub bias: Option<u64>,
    pub out: u64,
    pub workspace: u64,
}

type Contexts = HashMap<DeviceId, Result<Arc<Context>, Nf4Error>>;

static CONTEXTS: LazyLock<Mutex<Contexts>> = LazyLock::new(Mutex::default);

impl Context {
    /// Whether [`of`](Self::of) gives a context.
    pub fn exists(client: &Client) -> bool {
        if !is_cuda(client) {
            return false;
        }
        let known = lock(&CONTEXTS)
            .get(&client.service_id().device)
            .map(Result::is_ok);
        known.unwrap_or_else(|| Self::of(client).is_ok())
    }

    /// The context of a client's device, made when it is first asked for. What failed is not tried
    /// again, but for want of memory and while a graph is captured.
    ///
    /// # Errors
    /// [`Nf4Error::Variant`] unless it is a CUDA device, [`Nf4Error::Library`] if cuBLASLt cannot be
    /// loaded or does not run on it.
    pub fn of(client: &Client) -> Result<Arc<Self>, Nf4Error> {
        if !is_cuda(client) {
            return Err(Nf4Error::Variant {
                variant: "cublaslt",
                reason: format!("the device is {}, expected cuda", client.name()),
            });
        }
        let device = client.service_id().device;
        if let Some(context) = lock(&CONTEXTS).get(&device) {
            return context.clone();
        }
        // Not under the lock: this waits for the device's thread, where others may wait for the lock.
        let (context, lasts) = match Self::new(device) {
            Ok(context) => (Ok(Arc::new(context)), true),
            Err((error, lasts)) => {
                log::warn!("cuBLASLt is not available: {error}");
                (Err(error), lasts)
            }
        };
        let mut contexts = lock(&CONTEXTS);
        match lasts {
            true => contexts.entry(device).or_insert(context).clone(),
            false => context,
        }
    }

    /// An error comes with whether it will be the same next time.
    fn new(device: DeviceId) -> Result<Self, (Nf4Error, bool)> {
        let functions = library::functions().map_err(|error| (error, true))?;
        let door = Door::new(device);
        let create = |capturing| {
            if capturing {
                return Err(("not while a graph is captured".into(), false));
            }
            let mut handle = ptr::null_mut();
            // SAFETY: the CUDA context of the device is current, and there is room for the result.
            let status = unsafe { (functions.create)(&mut handle) };
            let created = check("cublasLtCreate", status).map(|()| handle as usize);
            created.map_err(|reason| (reason, status != sys::ALLOC_FAILED))
        };
        let failed = |(reason, lasts)| {
            let error = Nf4Error::Library {
                library: library::NAME,
                tried: vec![reason],
            };
            (error, lasts)
        };
        let created = door.with_context(create);
        let handle = created
            .unwrap_or_else(|reason| Err((reason, false)))
            .map_err(failed)?;
        Ok(Self {
            door,
            functions,
            handle: handle as sys::LtHandle,
            prepared: Mutex::default(),
        })
    }

    /// The descriptors and the algorithm of a product. The first time they are worked out, by cuBLASLt's
    /// heuristic. It depends on nothing but the product, so that the same one is computed the same way
    /// each time.
    ///
    /// # Errors
    /// [`Nf4Error::Variant`] if cuBLASLt has no algorithm for it.
    pub fn prepare(&self, product: &DenseProduct) -> Result<Arc<Prepared>, Nf4Error> {
        let refused = |reason: String| Nf4Error::Variant {
            variant: "cublaslt",
            reason: format!("{product}: {reason}"),
        };
        if let Some(prepared) = lock(&self.prepared).get(product) {
            return prepared.clone().map_err(refused);
        }
        // Not under the lock: another thread that works out the same finds the same.
        let prepared = self.door.with_context(|_| Prepared::new(self, product));
        let prepared = prepared.map_err(refused)?.map(Arc::new);
        if let Err(reason) = &prepared {
            log::warn!("not by cuBLASLt: {product}: {reason}");
        }
        let mut all = lock(&self.prepared);
        if all.len() >= MAX_PREPARED {
            all.clear();
        }
        all.insert(*product, prepared.clone());
        prepared.map_err(refused)
    }

    /// Enqueues a product on a stream of CUDA. Does not wait.
    ///
    /// # Errors
    /// What cuBLASLt says of it.
    ///
    /// # Safety
    /// The context of the device is current and `stream` one of its streams; the pointers are those of
    /// buffers as large as the product asks for, which work enqueued on the stream may read and, `out`
    /// and `workspace`, write; nothing else writes `workspace` meanwhile.
    pub unsafe fn enqueue(
        &self,
        prepared: &Prepared,
        pointers: &Pointers,
        scale: f32,
        stream: *mut c_void,
    ) -> Result<(), String> {
        let addend = pointers.addend.unwrap_or(pointers.out);
        let bias = pointers.bias.unwrap_or(0);
        for pointer in [pointers.rhs, pointers.lhs, addend, bias, pointers.out] {
            if !pointer.is_multiple_of(ALIGNMENT_BYTES.into()) {
                return Err(format!(
                    "a matrix at {pointer:#x}, expected a multiple of {ALIGNMENT_BYTES}"
                ));
            }
        }
        if let Some(bias) = pointers.bias {
            let bias = bias as *const c_void;
            // Tasks of a device run one after the other, so nobody else sets it before the call.
            prepared.desc.set(sys::DESC_BIAS_POINTER, &bias)?;
        }
        let beta: f32 = if pointers.addend.is_some() { 1.0 } else { 0.0 };
        // SAFETY: as the caller vouches; the descriptors are those of the product. cuBLASLt reads the
        // factors before it returns.
        let status = unsafe {
            (self.functions.matmul)(
                self.handle,
                prepared.desc.raw,
                (&raw const scale).cast(),
                pointers.rhs as *const c_void,
                prepared.layouts[0].raw,
                pointers.lhs as *const c_void,
                prepared.layouts[1].raw,
                (&raw const beta).cast(),
                addend as *const c_void,
                prepared.layouts[2].raw,
                pointers.out as *mut c_void,
                prepared.layouts[2].raw,
                &prepared.algorithm,
                pointers.workspace as *mut c_void,
                prepared.workspace_bytes,
                stream,
            )
        };
        check("cublasLtMatmul", status)
    }
}

/// What a call of cuBLASLt needs beside its buffers.
pub(super) struct Prepared {
    desc: Descriptor,
    /// Of the right matrix, the left, and the result.
    layouts: [Descriptor; 3],
    algorithm: sys::Algorithm,
    /// What the algorithm asks for.
    pub workspace_bytes: usize,
}

impl Prepared {
    /// cuBLASLt's matrices are column by column, which is the transpose of ours: `Dᵀ = Bᵀ Aᵀ`.
    fn new(context: &Context, product: &DenseProduct) -> Result<Self, String> {
        let functions = &context.functions;
        let DenseProduct { m, n, k, .. } = *product;
        let desc = Descriptor::matmul(functions, product)?;
        let layout = |rows, columns, layout: MatrixLayout| {
            // Of a stored transpose the columns are ours, and so are the sizes.
            let [rows, columns] = layout.stored(rows, columns);
            Descriptor::layout(functions, product, rows, columns, layout)
        };
        let layouts = [
            layout(n, k, product.rhs)?,
            layout(k, m, product.lhs)?,
            layout(n, m, MatrixLayout::contiguous(m, n))?,
        ];
        let preference = Descriptor::preference(functions)?;
        preference.set(sys::PREF_MAX_WORKSPACE_BYTES, &MAX_WORKSPACE_BYTES)?;
        preference.set(
            sys::PREF_REDUCTION_SCHEME_MASK,
            &sys::REDUCTION_COMPUTE_TYPE,
        )?;
        for attribute in [
            sys::PREF_MIN_ALIGNMENT_A_BYTES,
            sys::PREF_MIN_ALIGNMENT_B_BYTES,
            sys::PREF_MIN_ALIGNMENT_C_BYTES,
            sys::PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(attribute, &ALIGNMENT_BYTES)?;
        }
        let mut result = sys::HeuristicResult::default();
        let mut found: c_int = 0;
        // SAFETY: the handle and the descriptors are valid, and there is room for one result.
        let status = unsafe {
            (functions.heuristic)(
                context.handle,
                desc.raw,
                layouts[0].raw,
                layouts[1].raw,
                layouts[2].raw,
                layouts[2].raw,
                preference.raw,
                1,
                &mut result,
                &mut found,
            )
        };
        check("cublasLtMatmulAlgoGetHeuristic", status)?;
        if found < 1 {
            return Err("cuBLASLt has no algorithm for it".into());
        }
        check("the algorithm", result.state)?;
        Ok(Self {
            desc,
            layouts,
            algorithm: result.algorithm,
            workspace_bytes: result.workspace_bytes,
        })
    }
}

/// An object of cuBLASLt's with attributes, destroyed when it is dropped.
struct Descriptor {
    raw: *mut c_void,
    set: unsafe extern "C" fn(*mut c_void, c_int, *const c_void, usize) -> Status,
    destroy: unsafe extern "C" fn(*mut c_void) -> Status,
}

// SAFETY: descriptors are memory of the host without ties to a thread.
unsafe impl Send for Descriptor {}
// SAFETY: through a reference they are changed by the tasks of one device only, which run one after the
// other.
unsafe impl Sync for Descriptor {}

impl Descriptor {
    fn matmul(functions: &Functions, product: &DenseProduct) -> Result<Self, String> {
        let compute = match (product.dtype, product.tf32) {
            (FloatType::F32, true) => sys::COMPUTE_32F_FAST_TF32,
            _ => sys::COMPUTE_32F,
        };
        let mut raw = ptr::null_mut();
        // SAFETY: there is room for the result.
        let status = unsafe { (functions.desc_create)(&mut raw, compute, sys::R_32F) };
        check("cublasLtMatmulDescCreate", status)?;
        let desc = Self {
            raw,
            set: functions.desc_set,
            destroy: functions.desc_destroy,
        };
        let operation = |layout: MatrixLayout| match layout.transposed {
            false => sys::OP_N,
            true => sys::OP_T,
        };
        desc.set(sys::DESC_TRANSA, &operation(product.rhs))?;
        desc.set(sys::DESC_TRANSB, &operation(product.lhs))?;
        if product.bias {
            desc.set(sys::DESC_EPILOGUE, &sys::EPILOGUE_BIAS)?;
            // The heuristic reads the alignment from it, and nothing else.
            let aligned = ptr::without_provenance::<c_void>(ALIGNMENT_BYTES as usize);
            desc.set(sys::DESC_BIAS_POINTER, &aligned)?;
        }
        Ok(desc)
    }

    fn layout(
        functions: &Functions,
        product: &DenseProduct,
        rows: usize,
        columns: usize,
        layout: MatrixLayout,
    ) -> Result<Self, String> {
        let dtype = match product.dtype {
            FloatType::F16 => sys::R_16F,
            FloatType::BF16 => sys::R_16BF,
            FloatType::F32 => sys::R_32F,
        };
        let (rows, columns, leading) = (rows as u64, columns as u64, layout.leading as i64);
        let mut raw = ptr::null_mut();
        // SAFETY: there is room for the result.
        let status = unsafe { (functions.layout_create)(&mut raw, dtype, rows, columns, leading) };
        check("cublasLtMatrixLayoutCreate", status)?;
        let desc = Self {
            raw,
            set: functions.layout_set,
            destroy: functions.layout_destroy,
        };
        if product.batch > 1 {
            desc.set(sys::LAYOUT_BATCH_COUNT, &(product.batch as i32))?;
            let stride = layout.batch_stride as i64;
            desc.set(sys::LAYOUT_STRIDED_BATCH_OFFSET, &stride)?;
        }
        Ok(desc)
    }

    fn preference(functions: &Functions) -> Result<Self, String> {
        let mut raw = ptr::null_mut();
        // SAFETY: there is room for the result.
        let status = unsafe { (functions.preference_create)(&mut raw) };
        check("cublasLtMatmulPreferenceCreate", status)?;
        Ok(Self {
            raw,
            set: functions.preference_set,
            destroy: functions.preference_destroy,
        })
    }

    /// Sets an attribute, whose type is the value's.
    fn set<T>(&self, attribute: c_int, value: &T) -> Result<(), String> {
        let value = (&raw const *value).cast();
        // SAFETY: the object is valid, and cuBLASLt copies as many bytes as it is told there are.
        let status = unsafe { (self.set)(self.raw, attribute, value, size_of::<T>()) };
        check("an attribute", status)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: it was created, and this is its only owner. Nothing to be done if it fails.
        unsafe { (self.destroy)(self.raw) };
    }
}

fn check(what: &str, status: Status) -> Result<(), String> {
    match status {
        sys::SUCCESS => Ok(()),
        status => Err(format!("{what}: {} ({status})", sys::status_name(status))),
    }
}

/// A lock is only held over what cannot panic halfway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
