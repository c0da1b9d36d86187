//! `firn bench run`: measures, and prints results on standard output as they come.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use clap::ValueEnum;

use crate::{
    error::{Error, Result, io_at, io_with},
    functions::{self, Function},
    host,
    record::{Manifest, Record, Sample, VERSION},
    scenario::{Context, Scenario},
    subject::{Deployed, Subject},
    subjects::{
        firecracker::{self, Firecracker},
        firn::{self, Firn, Settings},
        firnd::{self, Firnd},
    },
    trace::Tracer,
};

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Where, and on what.
    #[command(flatten)]
    pub place: Place,

    /// Measure this Firecracker too, side by side
    #[arg(long, value_name = "PROGRAM")]
    pub firecracker: Option<PathBuf>,

    /// Measure the installation's firnd too, over HTTP, without identities and with signed requests: scenario paused
    #[arg(long)]
    pub firnd: bool,

    /// Measure only these (`firn`, `firnd`, `firnd-signed`, `firecracker`); all unless given
    #[arg(long, value_delimiter = ',')]
    pub subject: Vec<String>,

    /// Init of the smallest guest, for function `echo`
    #[arg(long, value_name = "PROGRAM")]
    pub echo_init: Option<PathBuf>,

    /// Scenarios, in the order in which they take turns; all unless given.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub scenario: Vec<Scenario>,

    /// Functions to measure them with.
    #[arg(long, value_delimiter = ',', default_value = "nothing")]
    pub function: Vec<String>,

    /// Directory with archives `<name>.zip` of functions that need packages.
    #[arg(long, value_name = "DIR")]
    pub functions: Option<PathBuf>,

    /// Rounds; each goes over all subjects and scenarios in turn.
    #[arg(long, default_value_t = 5)]
    pub iterations: u32,

    /// Calls a round of `warm` and `paused`.
    #[arg(long, default_value_t = 3)]
    pub warm: usize,

    /// How many at once in `clones`.
    #[arg(long, value_delimiter = ',', default_value = "1,10")]
    pub clones: Vec<usize>,

    /// How many clones in `density`.
    #[arg(long, default_value_t = 8)]
    pub density: usize,

    /// How many instances at once in `throughput`.
    #[arg(long, default_value_t = 4)]
    pub concurrency: usize,

    /// How many calls each of them answers.
    #[arg(long, default_value_t = 10)]
    pub calls: usize,

    /// How many cold starts in a row in `churn`.
    #[arg(long, default_value_t = 5)]
    pub churn: usize,

    /// State of the page cache before each sample; `cold` drops it, and needs root.
    #[arg(long, value_enum, default_value_t = PageCache::Warm)]
    pub page_cache: PageCache,

    /// Count in-kernel exits by reason too. Costs time within the samples.
    #[arg(long)]
    pub trace: bool,
}

/// Where, and on what.
#[derive(Debug, Clone, clap::Args)]
pub struct Place {
    /// Installation directory.
    #[arg(long)]
    pub artifacts: PathBuf,

    /// Directory for what the run keeps meanwhile; made, and removed afterwards.
    #[arg(long, default_value = "/tmp/firn-bench")]
    pub state: PathBuf,

    /// Runtime whose image is measured.
    #[arg(long, default_value = "python3.11")]
    pub runtime: String,

    /// Multiplies all time limits: 1 on real hardware, 20 or more under an emulator.
    #[arg(long, default_value_t = 1)]
    pub patience: u32,

    /// Thaw as for instances that are reset after each event: no regions are copied whole.
    #[arg(long)]
    pub for_resets: bool,

    /// Copy a region of 2 MiB whole at a thaw if that saves so many page faults for each 512 pages
    /// copied; over 512: never.
    #[arg(long)]
    pub dense_pages: Option<u32>,

    /// Name of the rig, for the manifest.
    #[arg(long, default_value = "this machine")]
    pub rig: String,

    /// Seed of the rig, for the manifest.
    #[arg(long)]
    pub seed: Option<u64>,

    /// The rig's time is virtual (instructions are counted), for the manifest: repeats are then no
    /// independent samples.
    #[arg(long)]
    pub virtual_time: bool,
}

impl Place {
    /// Firn's settings, with a pool that keeps `shells` by itself.
    pub fn settings(&self, shells: usize) -> Settings {
        Settings {
            artifacts: self.artifacts.clone(),
            state: self.state.clone(),
            runtime: self.runtime.clone(),
            patience: self.patience,
            shells,
            echo_init: None,
            for_resets: self.for_resets,
            dense_pages: self.dense_pages,
        }
    }

    /// The manifest of a run that is warm and not traced.
    ///
    /// # Errors
    /// [`Error::Io`] if something of it can't be read.
    pub fn manifest(&self, subjects: &[&dyn Subject], functions: &[Function]) -> Result<Manifest> {
        let mut described = BTreeMap::new();
        for subject in subjects {
            described.insert(subject.name().to_owned(), subject.describe()?);
        }
        let arguments = std::env::args_os().skip(1);
        Ok(Manifest {
            version: VERSION,
            rig: self.rig.clone(),
            virtual_time: self.virtual_time,
            seed: self.seed,
            page_cache: "warm".into(),
            traced: false,
            arguments: arguments.map(|word| word.to_string_lossy().into_owned()).collect(),
            host: host::describe(),
            subjects: described,
            functions: functions.iter().map(|f| (f.name.to_owned(), f.hash.clone())).collect(),
        })
    }
}

/// State of the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PageCache {
    /// As earlier samples left it.
    Warm,
    /// Dropped before each sample.
    Cold,
}

/// Where results go: one line each, at once.
#[derive(Debug, Clone, Default)]
pub struct Output(());

impl Output {
    /// Prints a sample.
    ///
    /// # Errors
    /// [`Error::Io`] if nobody reads.
    pub fn sample(&self, sample: &Sample) -> Result<()> {
        self.record(&Record::Sample(sample.clone()))
    }

    /// Prints a record.
    ///
    /// # Errors
    /// [`Error::Io`] if nobody reads.
    pub fn record(&self, record: &Record) -> Result<()> {
        let write = || {
            let mut line = serde_json::to_vec(record)?;
            line.push(b'\n');
            std::io::stdout().lock().write_all(&line)
        };
        write().map_err(io_at("print results"))
    }
}

/// Measures.
///
/// # Errors
/// Anything that keeps a sample from being taken.
pub async fn run(options: Options) -> Result<()> {
    if options.page_cache == PageCache::Cold {
        check_cold(&options)?;
    }
    std::fs::create_dir_all(&options.place.state).map_err(io_with(&options.place.state))?;
    let result = measure_all(&options).await;
    let removed = std::fs::remove_dir_all(&options.place.state);
    result?;
    removed.map_err(io_with(&options.place.state))
}

async fn measure_all(options: &Options) -> Result<()> {
    let mut functions = Vec::new();
    for name in &options.function {
        let source = functions::find(name)?;
        functions.push(source.build(options.functions.as_deref(), &options.place.state)?);
    }
    let tracer = options.trace.then(Tracer::open).transpose()?;
    let subjects = subjects(options).await?;
    let result = measure(options, &subjects, &functions, tracer.as_ref()).await;
    for subject in &subjects {
        subject.shutdown().await;
    }
    result
}

/// Everything that is measured, in the order of its turns.
async fn subjects(options: &Options) -> Result<Vec<Box<dyn Subject>>> {
    let place = &options.place;
    let wanted = |name: &str| {
        options.subject.is_empty() || options.subject.iter().any(|subject| subject == name)
    };
    let mut subjects: Vec<Box<dyn Subject>> = Vec::new();
    if wanted(firn::NAME) {
        let mut settings = place.settings(0);
        settings.echo_init.clone_from(&options.echo_init);
        subjects.push(Box::new(Firn::open(settings).await?));
    }
    for (name, signed) in [(firnd::NAME, false), (firnd::SIGNED, true)] {
        if options.firnd && wanted(name) {
            subjects.push(Box::new(
                Firnd::open(firnd::Settings {
                    artifacts: place.artifacts.clone(),
                    state: place.state.clone(),
                    runtime: place.runtime.clone(),
                    patience: place.patience,
                    signed,
                })
                .await?,
            ));
        }
    }
    if let Some(binary) = options.firecracker.as_deref().filter(|_| wanted(firecracker::NAME)) {
        let absolute = |path: &Path| std::path::absolute(path).map_err(io_with(path));
        subjects.push(Box::new(Firecracker::open(firecracker::Settings {
            binary: absolute(binary)?,
            artifacts: absolute(&place.artifacts)?,
            state: absolute(&place.state)?,
            echo_init: options.echo_init.clone(),
            runtime: place.runtime.clone(),
            patience: place.patience,
        })?));
    }
    if subjects.is_empty() {
        let names = options.subject.join(", ");
        return Err(Error::Usage(format!(
            "--subject {names}: there is firn, firnd and firnd-signed with --firnd, and \
             firecracker with --firecracker"
        )));
    }
    Ok(subjects)
}

async fn measure(
    options: &Options,
    subjects: &[Box<dyn Subject>],
    functions: &[Function],
    tracer: Option<&Tracer>,
) -> Result<()> {
    let output = Output::default();
    let named: Vec<&dyn Subject> = subjects.iter().map(AsRef::as_ref).collect();
    let mut manifest = options.place.manifest(&named, functions)?;
    if options.page_cache == PageCache::Cold {
        manifest.page_cache = "cold".into();
    }
    manifest.traced = options.trace;
    output.record(&Record::Manifest(manifest.into()))?;
    let scenarios = match &options.scenario[..] {
        [] => Scenario::value_variants(),
        some => some,
    };
    let mut deployed: Vec<Vec<Box<dyn Deployed>>> = Vec::new();
    for function in functions {
        let mut each = Vec::new();
        for subject in subjects {
            each.push(subject.deploy(function).await?.0);
        }
        deployed.push(each);
    }
    for round in 0..options.iterations {
        for (index, (function, deployed)) in functions.iter().zip(&deployed).enumerate() {
            for scenario in scenarios {
                if index > 0 && !scenario.has_function() {
                    continue;
                }
                for (subject, deployed) in subjects.iter().zip(deployed) {
                    let (subject, deployed) = (subject.as_ref(), deployed.as_ref());
                    if !scenario.is_for(subject) {
                        continue;
                    }
                    if options.page_cache == PageCache::Cold {
                        drop_caches()?;
                    }
                    let output = &output;
                    let context =
                        Context { subject, deployed, function, round, options, output, tracer };
                    scenario.run(&context).await?;
                }
            }
        }
    }
    Ok(())
}

/// Files of a RAM file system are page cache that can't be dropped.
fn check_cold(options: &Options) -> Result<()> {
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    let path = &options.place.artifacts;
    let kind = rustix::fs::statfs(path).map_err(|e| io_with(path)(e.into()))?.f_type;
    if matches!(kind, libc::TMPFS_MAGIC | RAMFS_MAGIC) {
        return Err(Error::Usage(format!(
            "--page-cache cold: {} is on a RAM file system, whose files are always cached",
            path.display()
        )));
    }
    drop_caches()
}

fn drop_caches() -> Result<()> {
    const DROP: &str = "/proc/sys/vm/drop_caches";
    rustix::fs::sync();
    let file = File::options().write(true).open(DROP);
    file.and_then(|mut file| file.write_all(b"3")).map_err(|e| {
        Error::Usage(format!(
            "--page-cache cold: the page cache can't be dropped here: {DROP}: {e}"
        ))
    })
}

/// blake3 of a file, in hexadecimal.
///
/// # Errors
/// [`Error::Io`].
pub fn hash(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path).map_err(io_with(path))?;
    std::io::copy(&mut file, &mut hasher).map_err(io_with(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}
