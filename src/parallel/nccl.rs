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
    Err(missing())
}

fn missing() -> Nf4Error {
    let mut tried = cudarc::get_lib_name_candidates("nccl");
    tried.push(
        "PyPI's nvidia-nccl-cu12 and nvidia-nccl-cu13 have it as `libnccl.so.2` only: make a link `libnccl.so` to it \
         in a folder of `LD_LIBRARY_PATH`, as `scripts/nccl-link.sh` does"
            .into(),
    );
    Nf4Error::Library {
        library: NCCL,
        tried,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_that_were_looked_for_are_told() {
        let text = missing().to_string();
        let named = [
            "NCCL",
            "libnccl.so;",
            "libnccl.so.2",
            "scripts/nccl-link.sh",
        ];
        assert!(named.iter().all(|name| text.contains(name)), "{text}");
        // Where it is there nobody is told that.
        let present = unsafe { cudarc::nccl::sys::is_culib_present() };
        assert_eq!(check().is_ok(), present);
    }
}
