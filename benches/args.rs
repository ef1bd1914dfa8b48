//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Time NF4 dequantization and quantization against a device copy, an unfused baseline and, where
/// asked for, what users would pick instead. Every result is checked before it is timed.
#[derive(Parser)]
#[command(bin_name = "cargo bench --", version)]
pub struct Args {
    /// Run only the benches whose name contains one of these. Names look like
    /// `dequant/tiled_2d/bf16/14336x4096`, `quantize/bf16/4096x4096`,
    /// `matmul/host/bf16/4096x4096/m1`, `lora/joined/bf16/4096x4096/r16/m1`, `puzzle/default`,
    /// `host_cost/op`.
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,
    /// Filters are whole names.
    #[arg(long)]
    exact: bool,
    /// Leave out the benches whose name contains this; may be given several times.
    #[arg(long, value_name = "FILTER")]
    skip: Vec<String>,
    /// Print the names and run nothing.
    #[arg(long)]
    pub list: bool,
    /// Where to run, several separated by commas. Default: the first of cuda, rocm, metal, vulkan,
    /// wgpu, cpu that is compiled in, and host.
    #[arg(long, value_enum, value_delimiter = ',')]
    device: Vec<DeviceName>,
    /// Which shapes. Default: full on a graphics card, small elsewhere.
    #[arg(long, value_enum)]
    pub sizes: Option<Sizes>,
    /// Rounds of the puzzle, nine calls each. Default: 1000 with full sizes, 10 with small ones.
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Calls a sample of the host's cost. Default: 1000 on a graphics card, 100 elsewhere.
    #[cfg(feature = "cube")]
    #[arg(long, value_name = "N")]
    pub host_calls: Option<usize>,
    /// A Python with PyTorch: time bitsandbytes, Unsloth's launches and a Triton kernel on the
    /// same weights. CUDA only.
    #[arg(long, value_name = "PYTHON")]
    pub peer: Option<String>,
    /// Path of libbitsandbytes_cpu.so: time it on the same weights as the host path.
    #[arg(long, value_name = "LIB")]
    pub cpu_peer: Option<PathBuf>,
    /// The Python that calls the CPU library; needs no packages.
    #[arg(long, value_name = "PYTHON", default_value = "python3")]
    pub cpu_python: String,
    /// Also time a product on tensor cores with this tile: its kernel, row tiles, row planes, k
    /// planes, chunks, depth and k cubes; may be given several times.
    #[cfg(feature = "cube")]
    #[arg(long, value_name = "KERNEL,A,B,C,D,E,F", value_parser = parse_tile)]
    pub tile: Vec<Tile>,
    /// Where to write the results, one JSON object a line.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "target/bench/results.jsonl"
    )]
    pub json: PathBuf,
    /// Where to draw the bar chart.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "target/bench/dequantize.svg"
    )]
    pub svg: PathBuf,
    /// Where to draw the products' time against rows.
    #[cfg(feature = "cube")]
    #[arg(long, value_name = "PATH", default_value = "target/bench/matmul.svg")]
    pub matmul_svg: PathBuf,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
    /// Accepted from those who are used to the standard harness.
    #[arg(long, hide = true)]
    nocapture: bool,
    /// As above.
    #[arg(long, hide = true, value_name = "WHEN")]
    color: Option<String>,
}

/// A place to run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum DeviceName {
    Cuda,
    Rocm,
    Metal,
    Vulkan,
    Wgpu,
    /// CubeCL's own CPU runtime.
    Cpu,
    /// The CPU path behind Burn's Flex backend; always compiled in.
    Host,
}

impl DeviceName {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
            Self::Metal => "metal",
            Self::Vulkan => "vulkan",
            Self::Wgpu => "wgpu",
            Self::Cpu => "cpu",
            Self::Host => "host",
        }
    }

    pub const fn is_compiled_in(self) -> bool {
        match self {
            Self::Cuda => cfg!(feature = "cuda"),
            Self::Rocm => cfg!(feature = "rocm"),
            Self::Metal => cfg!(feature = "metal"),
            Self::Vulkan => cfg!(feature = "vulkan"),
            Self::Wgpu => cfg!(feature = "wgpu"),
            Self::Cpu => cfg!(feature = "cpu"),
            Self::Host => true,
        }
    }
}

/// A set of shapes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Sizes {
    /// Those of language models.
    Full,
    /// A sixteenth of the elements.
    Small,
}

impl Args {
    /// Where to run.
    ///
    /// # Errors
    /// If a device that was asked for is not compiled in.
    pub fn devices(&self) -> Result<Vec<DeviceName>, String> {
        if let Some(missing) = self.device.iter().find(|device| !device.is_compiled_in()) {
            let name = missing.name();
            return Err(format!(
                "built without the feature `{name}`: add it with `--features {name}`"
            ));
        }
        if !self.device.is_empty() {
            return Ok(self.device.clone());
        }
        let first = DeviceName::value_variants()
            .iter()
            .find(|device| device.is_compiled_in() && **device != DeviceName::Host);
        Ok(first
            .copied()
            .into_iter()
            .chain([DeviceName::Host])
            .collect())
    }

    /// Whether a bench is asked for.
    pub fn wanted(&self, name: &str) -> bool {
        let matches = |filter: &String| {
            if self.exact {
                filter == name
            } else {
                name.contains(filter.as_str())
            }
        };
        (self.filters.is_empty() || self.filters.iter().any(matches))
            && !self.skip.iter().any(|skip| name.contains(skip.as_str()))
    }

    /// Whether a bench is to run now; with `--list` its name is printed instead.
    pub fn starts(&self, name: &str) -> bool {
        let wanted = self.wanted(name);
        if wanted && self.list {
            println!("{name}: benchmark");
        }
        wanted && !self.list
    }
}

/// A kernel and a tile of it.
#[cfg(feature = "cube")]
pub type Tile = (
    burn_nf4::launch::MatmulVariant,
    burn_nf4::launch::TensorCoreTile,
);

#[cfg(feature = "cube")]
fn parse_tile(text: &str) -> Result<Tile, String> {
    use burn_nf4::launch::MatmulVariant;
    let (kernel, sizes) = text.split_once(',').unwrap_or((text, ""));
    let variant = MatmulVariant::ALL
        .into_iter()
        .find(|variant| variant.name() == kernel)
        .ok_or_else(|| format!("no kernel is called {kernel}"))?;
    let sizes: Result<Vec<usize>, _> = sizes.split(',').map(str::parse).collect();
    match sizes.map(<[usize; 6]>::try_from) {
        Ok(Ok(sizes)) => Ok((variant, sizes.into())),
        _ => Err("expected a kernel and six numbers with commas between them".into()),
    }
}
