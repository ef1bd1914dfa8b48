//! Whether the process chooses its kernels without measuring them.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// The environment variable that makes a process reproducible from its start if it is set to `1`, see
/// [`set_reproducible`].
pub const REPRODUCIBLE_VARIABLE: &str = "BURN_NF4_REPRODUCIBLE";

static REPRODUCIBLE: LazyLock<AtomicBool> = LazyLock::new(|| {
    AtomicBool::new(std::env::var_os(REPRODUCIBLE_VARIABLE).is_some_and(|value| value == "1"))
});

/// Makes products from now on, in all threads, choose their kernels by sizes alone, so that another run
/// on the same kind of device gives the same bits.
///
/// [`MatmulStrategy::Auto`](super::MatmulStrategy::Auto) is then
/// [`MatmulStrategy::Rule`](super::MatmulStrategy::Rule). Otherwise it takes the kernel that was fastest
/// in a measurement; where two are nearly as fast, another run may take the other, whose sums are
/// rounded in another order. On the CPU nothing is measured.
///
/// Burn's own operations are tuned by CubeCL and are not changed by this: the product with a decoded
/// weight, the products of a low-rank branch with autodiff, and all others of a model. CubeCL keeps what
/// it has measured in a file (`environment` in the target folder), and takes the same kernels in the
/// next run as long as that file stays.
pub fn set_reproducible(reproducible: bool) {
    REPRODUCIBLE.store(reproducible, Ordering::Relaxed);
}

/// Whether [`set_reproducible`] or [`REPRODUCIBLE_VARIABLE`] has asked for it.
pub fn is_reproducible() -> bool {
    REPRODUCIBLE.load(Ordering::Relaxed)
}
