//! Finding cuBLASLt and loading it, at run time.

use std::env;
use std::ffi::c_int;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::sys::Functions;
use crate::error::Nf4Error;

/// The environment variable that says where cuBLASLt lies: the library, or a folder that holds it.
pub const CUBLASLT_VARIABLE: &str = "BURN_NF4_CUBLASLT";

/// The name in errors.
pub(super) const NAME: &str = "cuBLASLt";

/// The library's file by version, newest first. CUDA 12 and 13 have the same interface.
const FILES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

/// The first version with the interface that is used, as `cublasLtGetVersion` gives it.
const MIN_VERSION: usize = 120_000;

/// A path set by [`set_cublaslt_path`].
static PATH: Mutex<Option<PathBuf>> = Mutex::new(None);

static FUNCTIONS: OnceLock<Result<Functions, Nf4Error>> = OnceLock::new();

/// Says where cuBLASLt lies: the library, or a folder that holds it. No other place is searched, and
/// [`CUBLASLT_VARIABLE`] is not read.
///
/// The library becomes part of the process, and that it is what its name and version say is not
/// checked: name only a file that you trust as you trust what you link.
///
/// # Errors
/// [`Nf4Error::Config`] once the library was looked for, as the first product does.
pub fn set_cublaslt_path(path: impl Into<PathBuf>) -> Result<(), Nf4Error> {
    let path = path.into();
    let mut set = PATH.lock().unwrap_or_else(PoisonError::into_inner);
    if FUNCTIONS.get().is_some() {
        return Err(Nf4Error::Config {
            field: "path of cuBLASLt",
            expected: "set before the first product",
            given: path.display().to_string(),
        });
    }
    *set = Some(path);
    Ok(())
}

/// The functions of the library, which is looked for and loaded when this is first called, and stays
/// loaded as long as the process runs.
///
/// # Errors
/// [`Nf4Error::Library`] with all that was tried, and why it was rejected.
pub(super) fn functions() -> Result<Functions, Nf4Error> {
    let loaded = FUNCTIONS.get_or_init(|| {
        let set = PATH.lock().unwrap_or_else(PoisonError::into_inner);
        let path = set
            .clone()
            .or_else(|| env::var_os(CUBLASLT_VARIABLE).map(PathBuf::from));
        let loaded = first_of(&path.map_or_else(candidates, |path| given(&path)));
        // Up to here nobody could set another path.
        drop(set);
        loaded
    });
    loaded.clone()
}

/// Loads the first that can be.
fn first_of(candidates: &[PathBuf]) -> Result<Functions, Nf4Error> {
    let mut tried = Vec::new();
    for path in candidates {
        match load(path) {
            Ok(functions) => return Ok(functions),
            Err(reason) => tried.push(format!("{}: {reason}", path.display())),
        }
    }
    Err(Nf4Error::Library {
        library: NAME,
        tried,
    })
}

fn load(path: &Path) -> Result<Functions, String> {
    // SAFETY: loading runs the library's initializers; those of cuBLASLt ask for nothing. That the
    // file is what its name says is asked of who installed or named it.
    let library = unsafe { libloading::Library::new(path) }.map_err(|error| text(&error))?;
    // SAFETY: as above, and the library is never closed.
    let functions = unsafe { Functions::find(&library) }.map_err(|error| text(&error))?;
    // SAFETY: the function takes nothing and can be called at any time.
    let version = unsafe { (functions.version)() };
    if version < MIN_VERSION {
        return Err(format!(
            "version {version}, expected {MIN_VERSION} or later"
        ));
    }
    let cuda = version / 10_000;
    if let Some(driver) = driver_version().filter(|&driver| cuda > driver) {
        return Err(format!(
            "it is of CUDA {cuda}, and the driver of CUDA {driver}"
        ));
    }
    log::debug!("loaded {NAME} {version} from {}", path.display());
    // Handles of CUDA contexts outlive every owner that it could have.
    std::mem::forget(library);
    Ok(functions)
}

/// The newest major version of CUDA that the driver runs; `None` without a driver.
fn driver_version() -> Option<usize> {
    // SAFETY: the driver's library is loaded by every program that uses CUDA, and its initializers ask
    // for nothing.
    let driver = unsafe { libloading::Library::new("libcuda.so.1") }.ok()?;
    let mut version: c_int = 0;
    // SAFETY: the symbol has this type since CUDA 2.2, needs no initialization, and there is room for
    // its result.
    let status = unsafe {
        let get = driver.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cuDriverGetVersion\0");
        (get.ok()?)(&mut version)
    };
    (status == 0).then_some(version as usize / 1000)
}

/// An error of the loader with its cause, which names the file or symbol.
fn text(error: &libloading::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}

/// The library at a path: itself, or in that folder.
fn given(path: &Path) -> Vec<PathBuf> {
    match path.is_dir() {
        true => FILES.iter().map(|file| path.join(file)).collect(),
        false => vec![path.into()],
    }
}

/// Where the library can lie: where the loader looks by itself (Debian's packages, `LD_LIBRARY_PATH`),
/// in a CUDA installation, and in the Python packages `nvidia-cublas`, which PyTorch brings along.
fn candidates() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = FILES.iter().map(PathBuf::from).collect();
    for folder in cuda_folders()
        .into_iter()
        .chain(python_folders(&python_prefixes()))
    {
        let files = FILES.iter().map(|file| folder.join(file));
        for file in files.filter(|file| file.exists()) {
            if !found.contains(&file) {
                found.push(file);
            }
        }
    }
    found
}

/// The folders of libraries of CUDA installations.
fn cuda_folders() -> Vec<PathBuf> {
    let named = ["CUDA_PATH", "CUDA_HOME", "CUDA_ROOT"].map(env::var_os);
    let mut roots: Vec<PathBuf> = named.into_iter().flatten().map(PathBuf::from).collect();
    roots.push("/usr/local/cuda".into());
    roots.push("/opt/cuda".into());
    let folders = [
        "lib64",
        "lib",
        "targets/x86_64-linux/lib",
        "targets/sbsa-linux/lib",
    ];
    roots
        .iter()
        .flat_map(|root| folders.map(|folder| root.join(folder)))
        .collect()
}

/// The folders below which Python's packages lie: those of every Python on the `PATH`, of the active
/// environment and of the user.
fn python_prefixes() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut prefixes: Vec<PathBuf> = env::split_paths(&path)
        .filter_map(|bin| bin.parent().map(Path::to_path_buf))
        .collect();
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        prefixes.extend(env::var_os(variable).map(PathBuf::from));
    }
    prefixes.extend(env::var_os("HOME").map(|home| Path::new(&home).join(".local")));
    // What lies in the folder that the process happens to run in is nobody's installation.
    prefixes.retain(|prefix| prefix.is_absolute());
    prefixes
}

/// The folders of libraries of the Python packages of CUDA.
fn python_folders(prefixes: &[PathBuf]) -> Vec<PathBuf> {
    let packages = prefixes
        .iter()
        .flat_map(|prefix| entries(&prefix.join("lib")))
        .filter(|folder| {
            let name = folder.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("python3"))
        })
        .flat_map(|python| ["site-packages", "dist-packages"].map(|name| python.join(name)));
    packages
        .flat_map(|packages| entries(&packages.join("nvidia")))
        .map(|package| package.join("lib"))
        .collect()
}

/// The entries of a folder, sorted; none if it cannot be read.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said when there is none: each file that was tried, and why it did not do.
    #[test]
    fn a_library_that_is_not_there_is_an_error_that_says_what_was_tried() {
        let folder = tempfile::tempdir().expect("a folder");
        let text = folder.path().join(FILES[1]);
        fs::write(&text, "not a library").expect("a file");
        let error = first_of(&given(folder.path())).expect_err("there is none");
        let Nf4Error::Library { library, tried } = &error else {
            panic!("{error}");
        };
        assert_eq!((*library, tried.len()), (NAME, FILES.len()));
        assert!(error.to_string().contains("libcublasLt.so.13: "), "{error}");
        assert!(tried[1].contains("libcublasLt.so.12: "), "{error}");
    }

    /// A library without the functions.
    #[cfg(target_os = "linux")]
    #[test]
    fn another_library_is_refused() {
        let error = load(Path::new("libc.so.6")).expect_err("it is not cuBLASLt");
        assert!(error.contains("cublasLt"), "{error}");
    }

    #[test]
    fn python_packages_are_found_from_an_environment() {
        let folder = tempfile::tempdir().expect("a folder");
        let lib = folder
            .path()
            .join("lib/python3.12/site-packages/nvidia/cu13/lib");
        fs::create_dir_all(&lib).expect("folders");
        fs::create_dir_all(folder.path().join("bin")).expect("folders");
        let found = python_folders(&[folder.path().into()]);
        assert_eq!(found, [lib]);
    }
}
