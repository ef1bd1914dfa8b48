//! The functions and constants of cuBLASLt that a product needs.
//!
//! Source: `cublasLt.h`, `cublas_api.h` and `library_types.h` of CUDA 12 and 13, in which they are the
//! same.

use std::ffi::{c_int, c_void};

pub type LtHandle = *mut c_void;
pub type MatmulDesc = *mut c_void;
pub type MatrixLayout = *mut c_void;
pub type Preference = *mut c_void;
pub type Status = c_int;

/// `cublasLtMatmulAlgo_t`: opaque, to be copied as it is.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Algorithm {
    data: [u64; 8],
}

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct HeuristicResult {
    pub algorithm: Algorithm,
    pub workspace_bytes: usize,
    pub state: Status,
    pub waves: f32,
    reserved: [c_int; 4],
}

pub const SUCCESS: Status = 0;
pub const ALLOC_FAILED: Status = 3;

/// The name of a `cublasStatus_t`.
pub fn status_name(status: Status) -> &'static str {
    match status {
        SUCCESS => "CUBLAS_STATUS_SUCCESS",
        1 => "CUBLAS_STATUS_NOT_INITIALIZED",
        ALLOC_FAILED => "CUBLAS_STATUS_ALLOC_FAILED",
        7 => "CUBLAS_STATUS_INVALID_VALUE",
        8 => "CUBLAS_STATUS_ARCH_MISMATCH",
        11 => "CUBLAS_STATUS_MAPPING_ERROR",
        13 => "CUBLAS_STATUS_EXECUTION_FAILED",
        14 => "CUBLAS_STATUS_INTERNAL_ERROR",
        15 => "CUBLAS_STATUS_NOT_SUPPORTED",
        16 => "CUBLAS_STATUS_LICENSE_ERROR",
        _ => "an unknown status",
    }
}

// cudaDataType_t
pub const R_32F: c_int = 0;
pub const R_16F: c_int = 2;
pub const R_16BF: c_int = 14;

// cublasComputeType_t
pub const COMPUTE_32F: c_int = 68;
pub const COMPUTE_32F_FAST_TF32: c_int = 77;

// cublasOperation_t
pub const OP_N: c_int = 0;
pub const OP_T: c_int = 1;

// cublasLtEpilogue_t
pub const EPILOGUE_BIAS: c_int = 4;

// cublasLtReductionScheme_t: sums of parts along k in the type that is computed in.
pub const REDUCTION_COMPUTE_TYPE: u32 = 2;

// cublasLtMatmulDescAttributes_t
pub const DESC_TRANSA: c_int = 3;
pub const DESC_TRANSB: c_int = 4;
pub const DESC_EPILOGUE: c_int = 7;
pub const DESC_BIAS_POINTER: c_int = 8;

// cublasLtMatrixLayoutAttribute_t
pub const LAYOUT_BATCH_COUNT: c_int = 5;
pub const LAYOUT_STRIDED_BATCH_OFFSET: c_int = 6;

// cublasLtMatmulPreferenceAttributes_t
pub const PREF_MAX_WORKSPACE_BYTES: c_int = 1;
pub const PREF_REDUCTION_SCHEME_MASK: c_int = 3;
pub const PREF_MIN_ALIGNMENT_A_BYTES: c_int = 5;
pub const PREF_MIN_ALIGNMENT_B_BYTES: c_int = 6;
pub const PREF_MIN_ALIGNMENT_C_BYTES: c_int = 7;
pub const PREF_MIN_ALIGNMENT_D_BYTES: c_int = 8;

/// Declares a table of function pointers, and how to fill it from a library.
macro_rules! functions {
    ($($name:ident: $symbol:literal ($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions of a library that was loaded.
        #[derive(Debug, Clone, Copy)]
        pub struct Functions {
            $(pub $name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            /// Finds all of them.
            ///
            /// # Safety
            /// The library is cuBLASLt of CUDA 12 or later, and stays loaded as long as the functions
            /// are used.
            pub unsafe fn find(library: &libloading::Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    // SAFETY: the symbols have these types in cuBLASLt, as the caller vouches.
                    $($name: *unsafe { library.get(concat!($symbol, "\0").as_bytes()) }?,)*
                })
            }
        }
    };
}

functions! {
    create: "cublasLtCreate" (*mut LtHandle) -> Status;
    version: "cublasLtGetVersion" () -> usize;
    desc_create: "cublasLtMatmulDescCreate" (*mut MatmulDesc, c_int, c_int) -> Status;
    desc_destroy: "cublasLtMatmulDescDestroy" (MatmulDesc) -> Status;
    desc_set: "cublasLtMatmulDescSetAttribute"
        (MatmulDesc, c_int, *const c_void, usize) -> Status;
    layout_create: "cublasLtMatrixLayoutCreate"
        (*mut MatrixLayout, c_int, u64, u64, i64) -> Status;
    layout_destroy: "cublasLtMatrixLayoutDestroy" (MatrixLayout) -> Status;
    layout_set: "cublasLtMatrixLayoutSetAttribute"
        (MatrixLayout, c_int, *const c_void, usize) -> Status;
    preference_create: "cublasLtMatmulPreferenceCreate" (*mut Preference) -> Status;
    preference_destroy: "cublasLtMatmulPreferenceDestroy" (Preference) -> Status;
    preference_set: "cublasLtMatmulPreferenceSetAttribute"
        (Preference, c_int, *const c_void, usize) -> Status;
    heuristic: "cublasLtMatmulAlgoGetHeuristic" (
        LtHandle, MatmulDesc, MatrixLayout, MatrixLayout, MatrixLayout, MatrixLayout, Preference,
        c_int, *mut HeuristicResult, *mut c_int
    ) -> Status;
    matmul: "cublasLtMatmul" (
        LtHandle, MatmulDesc, *const c_void, *const c_void, MatrixLayout, *const c_void, MatrixLayout,
        *const c_void, *const c_void, MatrixLayout, *mut c_void, MatrixLayout, *const Algorithm,
        *mut c_void, usize, *mut c_void
    ) -> Status;
}
