//! Who computes products of dense matrices. In a program of its own: the choice is the whole process's.

use burn::tensor::{Device, Tensor};
use burn_nf4::Nf4Error;
use burn_nf4::op::{DenseProvider, MatmulOptions, dense_provider, matmul, set_dense_provider};

fn product(device: &Device) -> Result<Tensor<2>, Nf4Error> {
    let x = Tensor::<2>::ones([3, 16], device);
    matmul(x.clone(), x.transpose(), None, MatmulOptions::default())
}

/// Each step by itself, as tests of one program run at once.
#[test]
fn a_provider_that_was_asked_for_is_used_or_an_error() {
    assert_eq!(dense_provider(), DenseProvider::Auto);
    #[cfg(feature = "flex")]
    {
        let host = Device::flex();
        product(&host).expect("Burn has a product");
        set_dense_provider(DenseProvider::CublasLt);
        let error = product(&host).expect_err("the host is no CUDA device");
        assert!(
            matches!(&error, Nf4Error::Variant { variant, .. } if *variant == "cublaslt"),
            "{error}"
        );
        set_dense_provider(DenseProvider::Burn);
        product(&host).expect("Burn has a product");
        set_dense_provider(DenseProvider::Auto);
    }
    #[cfg(feature = "cublaslt")]
    without_the_library();
}

/// On a CUDA device, where no library is to be found.
#[cfg(feature = "cublaslt")]
fn without_the_library() {
    use std::sync::Mutex;

    use burn::tensor::DType;
    use burn_nf4::launch::set_cublaslt_path;
    use log::{Level, LevelFilter, Log, Metadata, Record};

    struct Warnings(Mutex<Vec<String>>);

    impl Log for Warnings {
        fn enabled(&self, metadata: &Metadata) -> bool {
            metadata.level() <= Level::Warn && metadata.target().starts_with("burn_nf4")
        }

        fn log(&self, record: &Record) {
            if self.enabled(record.metadata()) {
                let mut warnings = self.0.lock().expect("no one panicked");
                warnings.push(record.args().to_string());
            }
        }

        fn flush(&self) {}
    }

    static WARNINGS: Warnings = Warnings(Mutex::new(Vec::new()));
    log::set_logger(&WARNINGS).expect("there is no other");
    log::set_max_level(LevelFilter::Warn);

    let folder = tempfile::tempdir().expect("a folder");
    set_cublaslt_path(folder.path()).expect("nothing was computed yet");
    let device = Device::cuda(0);
    for _ in 0..2 {
        let y = product(&device).expect("Burn has a product");
        let y: Vec<f32> = y.cast(DType::F32).into_data().iter().collect();
        assert_eq!(y, [16.0; 9]);
    }
    let warnings = WARNINGS.0.lock().expect("no one panicked").clone();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let path = folder.path().display().to_string();
    assert!(warnings[0].contains(&path), "{warnings:?}");

    set_dense_provider(DenseProvider::CublasLt);
    let error = product(&device).expect_err("there is no library");
    assert!(
        matches!(&error, Nf4Error::Library { tried, .. } if tried.iter().any(|t| t.contains(&path))),
        "{error}"
    );
    let late = set_cublaslt_path("/usr/lib").expect_err("it was looked for already");
    assert!(matches!(late, Nf4Error::Config { .. }), "{late}");
}
