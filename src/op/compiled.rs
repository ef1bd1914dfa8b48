//! Compiled kernels that outlive a process.

/// Has CubeCL keep the kernels that it compiles on disk, beside what its tuner has measured, so that the next
/// process finds them: its configuration (`cubecl.toml`, environment variables) with `compilation.cache` on,
/// which is off by default. Entries belong to one build of a program and are useless to another.
///
/// For the start of a program: returns `false`, and changes nothing, where CubeCL's configuration was read
/// already or no feature of the crate uses CubeCL.
pub fn keep_compiled_kernels() -> bool {
    #[cfg(feature = "cube")]
    {
        use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};

        let mut config = CubeClRuntimeConfig::from_current_dir().override_from_env();
        config.compilation.cache = true;
        CubeClRuntimeConfig::try_set(config)
    }
    #[cfg(not(feature = "cube"))]
    false
}
