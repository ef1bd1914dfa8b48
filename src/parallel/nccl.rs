//! NVIDIA's library of collectives, which is loaded at run time.

use std::sync::OnceLock;

use crate::error::Nf4Error;

const NCCL: &str = "NCCL (libnccl)";

/// Checks that NCCL can be loaded under one of the names that are looked for. Without it CubeCL's initialisation
/// panics on a thread of its own, which nobody is told of.
///
/// # Errors
/// [`Nf4Error::Library`] with the names.
pub(super) fn check() -> Result<(), Nf4Error> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    // SAFETY: loading NCCL runs its initialisers, which have no other effect; CubeCL does the same later.
    if *FOUND.get_or_init(|| unsafe { cudarc::nccl::sys::is_culib_present() }) {
        return Ok(());
    }
    let mut tried = cudarc::get_lib_name_candidates("nccl");
    tried.push(
        "PyPI's nvidia-nccl-cu12 and nvidia-nccl-cu13 have it as `libnccl.so.2` only: make a link `libnccl.so` to it \
         in a folder of `LD_LIBRARY_PATH`, as `scripts/nccl-link.sh` does"
            .into(),
    );
    Err(Nf4Error::Library {
        library: NCCL,
        tried,
    })
}
