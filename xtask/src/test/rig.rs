//! The VMM's test programs, and some of Firn's commands, in a rig: a host whose KVM they meet. Which run where, and
//! within what time, is one table, [`PROGRAMS`].
//!
//! Rigs are the lane's site (this machine, or a host VM with KVM on SVM) and the host VM with KVM on VMX, which Bochs
//! emulates. What a rig can't run is left out with the reason.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use firn_host_vm_agent::Exec;
use serde::Deserialize;

use super::results;
use crate::cpio::Archive;
use crate::host_vm::sequence::{self, Ended, Limited};
use crate::host_vm::{Options, Series};
use crate::lane::Site;
use crate::step::Outcome;
use crate::{cargo, scratch, step};

/// Makes libtest say how long each test took. The flag is unstable, so it needs [`UNSTABLE`] in its environment.
pub const TIMES: [&str; 2] = ["-Zunstable-options", "--report-time"];

/// Lets the standard library's test harness take unstable flags. Programs of tests alone have it: for cargo it would
/// make everything that is built with it different.
pub const UNSTABLE: (&str, &str) = ("RUSTC_BOOTSTRAP", "1");

/// The package whose test programs run in rigs.
const PACKAGE: &str = "firn-vmm";

/// The test program that needs Linux as the guest, and its artifacts.
pub const LINUX: &str = "linux";

/// The hardware gate.
pub const GATE: &str = "gate";

/// The test program of snapshots that go from host to host.
const FLEET: &str = "fleet";

/// Bochs' CPU model for it. Others' APICv loses interrupts, and this one's would, too: no Linux runs as a guest.
const SCALING_CPU: &str = "corei7_icelake_u";

/// Memory of the host VM with VMX, in MiB.
const VMX_MEMORY_MIB: u32 = 2048;

/// What runs in rigs.
pub struct Program {
    /// How it is called.
    pub name: &'static str,
    kind: Kind,
    /// The longest that it may take in the slowest rig: some three times what it took there.
    limit: Duration,
    /// Why a host VM with KVM on SVM does not run it.
    not_on_svm: Option<&'static str>,
    /// Why the one with KVM on VMX does not.
    not_on_vmx: Option<&'static str>,
    /// Tests whose guests spin with IF=0. They are not run there: [`SPINS`].
    spinning: &'static [&'static str],
}

/// Why guests that spin can't run with KVM on VMX.
const SPINS: &str = "Bochs 2.7 does not look again at which interrupts are masked when VM entry and exit change IF: a \
                     guest that enters with IF=0 and spins is never interrupted";

#[derive(Clone, Copy)]
enum Kind {
    /// A test program in `vmm/tests`.
    Tests,
    /// A command, which counts as one test: it passes if its exit code is 0.
    Command(&'static [&'static str]),
    /// As that, `firn doctor --run` of the artifacts.
    Gate,
}

impl Program {
    /// A test program that runs in every rig.
    const fn tests(name: &'static str, limit: Duration) -> Self {
        Self { name, kind: Kind::Tests, limit, not_on_svm: None, not_on_vmx: None, spinning: &[] }
    }
}

/// They run in this order: the quick ones first.
const PROGRAMS: [Program; 10] = [
    Program { kind: Kind::Command(&["firn", "doctor"]), ..Program::tests("doctor", minutes(5)) },
    Program::tests("tiny_guest", minutes(5)),
    Program::tests(FLEET, minutes(5)),
    Program::tests("msrs", minutes(5)),
    Program::tests("seccomp", minutes(5)),
    Program { not_on_vmx: Some(SPINS), ..Program::tests("reset", minutes(5)) },
    Program {
        spinning: &["a_host_hears_all_and_the_end_however_late_it_reads"],
        ..Program::tests("attackers", minutes(10))
    },
    Program {
        kind: Kind::Gate,
        not_on_vmx: Some("it does each thing several times; `bench` does one of each there"),
        // With all its checks it took nine.
        ..Program::tests(GATE, minutes(40))
    },
    Program {
        kind: Kind::Command(&BENCH),
        not_on_svm: Some("`cargo xtask bench` measures there"),
        ..Program::tests(BENCH_NAME, minutes(10))
    },
    Program::tests(LINUX, minutes(90)),
];

/// The gate's checks that are quick under emulation; nightly tests run all.
const GATE_CHECKS: &str = "boot,thaw,reset,clocks,uniqueness,vcpus-2,memory-128";

/// One round of the harness: boot, thaw, warm, reset.
pub const BENCH_NAME: &str = "bench";
const BENCH: [&str; 19] = [
    "firn",
    "bench",
    "run",
    "--artifacts",
    "/firn",
    "--rig",
    "dev host VM, VMX, Bochs",
    "--subject",
    "firn",
    "--scenario",
    "boot,thaw,warm,reset",
    "--function",
    "nothing",
    "--iterations",
    "1",
    "--warm",
    "1",
    "--patience",
    "60",
];

const fn minutes(minutes: u64) -> Duration {
    Duration::from_secs(minutes * 60)
}

/// A host that tests run on.
#[derive(Clone, Copy)]
pub enum Rig<'a> {
    /// The lane's, with that Linux if it is a host VM.
    Site(&'a Site, Series),
    /// A host VM with KVM on VMX, and that Linux; it boots for the run.
    Vmx(Series),
    /// The same, on a CPU model that can scale TSCs: for the one program that looks at that.
    VmxScaling(Series),
}

impl fmt::Display for Rig<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Site(Site::Native, _) => write!(f, "this machine"),
            Self::Site(Site::HostVm(_), kernel) => write!(f, "SVM, Linux {kernel}"),
            Self::Vmx(kernel) => write!(f, "VMX, Linux {kernel}"),
            Self::VmxScaling(kernel) => write!(f, "VMX with TSC scaling, Linux {kernel}"),
        }
    }
}

impl Rig<'_> {
    /// Why it can't run a program.
    fn leaves_out(&self, program: &Program) -> Option<&'static str> {
        match self {
            Self::Site(Site::Native, _) => (![LINUX, GATE].contains(&program.name))
                .then_some("unit tests, `firn doctor` and `cargo xtask bench` run here anyway"),
            Self::Site(Site::HostVm(_), _) => program.not_on_svm,
            Self::Vmx(_) => program.not_on_vmx,
            Self::VmxScaling(_) => {
                (program.name != FLEET).then_some("VMX without TSC scaling runs it")
            }
        }
    }
}

/// What came of a program.
#[derive(Debug)]
pub enum Verdict {
    /// Tests ran.
    Ran(Outcome),
    /// A command ran, which counts as one test.
    Command(Outcome),
    /// The rig can't run it: why.
    LeftOut(&'static str),
    /// The rig can't run one of its tests: its name, and why.
    Without(&'static str, &'static str),
}

/// Which programs run, and of their tests those with one of `names` in their names, or all.
pub struct Choice<'a> {
    /// All programs otherwise.
    pub program: Option<&'a str>,
    /// Parts of tests' names.
    pub names: &'a [&'a str],
}

/// Everything that tests in a rig are made of, built.
pub struct Built {
    /// The test programs by name, in release mode.
    programs: BTreeMap<String, PathBuf>,
    /// A `firn-vmm` with debug assertions, whose threads can be held back.
    held_vmm: PathBuf,
}

impl Built {
    /// Builds it. `held_vmm` is a `firn-vmm` with debug assertions.
    pub fn build(held_vmm: PathBuf) -> Result<Self> {
        #[derive(Deserialize)]
        struct Message {
            target: Option<Target>,
            executable: Option<PathBuf>,
        }
        #[derive(Deserialize)]
        struct Target {
            name: String,
            kind: Vec<String>,
        }
        let mut command = cargo::cargo();
        command.args(["test", "--release", "--quiet", "--no-run", "--package", PACKAGE]);
        let names = PROGRAMS.iter().filter(|program| matches!(program.kind, Kind::Tests));
        let names: Vec<&str> = names.map(|program| program.name).collect();
        command.args(names.iter().flat_map(|name| ["--test", name]));
        command.args(["--message-format", "json-render-diagnostics"]);
        let text = step::output(&mut command)?;
        let mut programs = BTreeMap::new();
        for message in text.lines().filter_map(|line| serde_json::from_str(line).ok()) {
            let Message { target: Some(target), executable: Some(path) } = message else {
                continue;
            };
            // The package's own programs are built too.
            if target.kind.iter().any(|kind| kind == "test") {
                programs.insert(target.name, path);
            }
        }
        for name in names {
            ensure!(programs.contains_key(name), "cargo built no test {name} of {PACKAGE}");
        }
        Ok(Self { programs, held_vmm })
    }

    /// Runs programs in a rig, one after the other. What is in `environment` wins over what would be there.
    pub fn run(
        &self,
        rig: Rig,
        artifacts: &Path,
        choice: &Choice,
        environment: &[(&str, &str)],
    ) -> Result<Vec<(&'static str, Verdict)>> {
        let chosen = |program: &&Program| choice.program.is_none_or(|name| name == program.name);
        let (left_out, run): (Vec<&Program>, Vec<&Program>) =
            PROGRAMS.iter().filter(chosen).partition(|program| rig.leaves_out(program).is_some());
        let outcomes = match rig {
            Rig::Site(site, _) => self.run_at(site, artifacts, &run, choice.names, environment)?,
            Rig::Vmx(kernel) => {
                self.run_on_vmx(vmx(kernel, artifacts), artifacts, &run, choice.names, environment)?
            }
            Rig::VmxScaling(kernel) => {
                let cpu_model = Some(SCALING_CPU.to_owned());
                let options = Options { cpu_model, ..vmx(kernel, artifacts) };
                let mut expected = vec![("FIRN_EXPECT_TSC_SCALING", "1")];
                expected.extend(environment);
                self.run_on_vmx(options, artifacts, &run, choice.names, &expected)?
            }
        };
        let verdict = |(program, outcome): (&Program, Outcome)| match program.kind {
            Kind::Tests => (program.name, Verdict::Ran(outcome)),
            Kind::Command(_) | Kind::Gate => (program.name, Verdict::Command(outcome)),
        };
        let mut verdicts: Vec<_> = run.into_iter().zip(outcomes).map(verdict).collect();
        for program in left_out {
            let why = rig.leaves_out(program).map(Verdict::LeftOut);
            verdicts.extend(why.map(|why| (program.name, why)));
        }
        if matches!(rig, Rig::Vmx(_)) {
            let without = |program: &Program| {
                let name = program.name;
                program.spinning.iter().map(move |test| (name, Verdict::Without(test, SPINS)))
            };
            verdicts.extend(PROGRAMS.iter().filter(chosen).flat_map(without));
        }
        Ok(verdicts)
    }

    fn run_at(
        &self,
        site: &Site,
        artifacts: &Path,
        programs: &[&Program],
        names: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Vec<Outcome>> {
        let files = self.files(artifacts)?;
        let (root, there) = match site {
            Site::Native => {
                let here = |file: &File| (file.name, file.path.display().to_string());
                (artifacts.display().to_string(), files.iter().map(here).collect())
            }
            Site::HostVm(vm) => {
                let mut there = BTreeMap::new();
                for File { name, path } in &files {
                    let to = format!("/root/{name}");
                    vm.client().put(path, &to)?;
                    there.insert(*name, to);
                }
                ("/firn".into(), there)
            }
        };
        let variables = variables(&root, &there, environment);
        let arguments = arguments(names, &[]);
        let run = |program: &&Program| match program.kind {
            Kind::Tests => {
                let path = self.program(program)?;
                let what = format!("the VMM's tests {}", program.name);
                site.watch(&what, path, &arguments, &variables, results::is_rust, program.limit)
            }
            Kind::Command(argv) => command_at(site, program, argv),
            Kind::Gate => {
                let emulated = matches!(site, Site::HostVm(_));
                let all = environment.contains(&super::NIGHTLY[0]);
                command_at(site, program, &gate(&root, emulated, all))
            }
        };
        programs.iter().map(run).collect()
    }

    fn run_on_vmx(
        &self,
        mut options: Options,
        artifacts: &Path,
        programs: &[&Program],
        names: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Vec<Outcome>> {
        let mut there = BTreeMap::new();
        for File { name, path } in self.files(artifacts)? {
            let to = format!("/root/{name}");
            options.files.push((path, to.clone()));
            there.insert(name, to);
        }
        let env = variables("/firn", &there, environment);
        let env: Vec<_> = env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let mut commands = Vec::new();
        for program in programs {
            let argv = match program.kind {
                Kind::Tests => {
                    let path = format!("/root/tests/{}", program.name);
                    options.files.push((self.program(program)?.to_owned(), path.clone()));
                    let arguments = arguments(names, program.spinning);
                    [path.as_str()].into_iter().chain(arguments).map(str::to_owned).collect()
                }
                Kind::Command(argv) => argv.iter().map(|word| (*word).to_owned()).collect(),
                Kind::Gate => bail!("{} is not for VMX", program.name),
            };
            let exec = Exec { argv, env: env.clone(), cwd: "/root".into(), terminal: None };
            commands.push(Limited { exec, limit: program.limit });
        }
        let names: Vec<_> = programs.iter().map(|program| program.name).collect();
        run_sequence(&options, &commands, &names)
    }

    fn program(&self, program: &Program) -> Result<&Path> {
        let path = self.programs.get(program.name);
        path.map(PathBuf::as_path).with_context(|| format!("no test {} is built", program.name))
    }

    /// What tests need beside the artifacts.
    fn files(&self, artifacts: &Path) -> Result<Vec<File>> {
        let mut archive = Archive::new(Vec::new());
        archive.copy("init", 0o755, &artifacts.join("bin/firn-init"))?;
        let initramfs = scratch::directory()?.join(INITRAMFS);
        std::fs::write(&initramfs, archive.finish()?)?;
        let code = scratch::directory()?.join(CODE);
        // Files that are there already would be written over, not replaced.
        let _ = std::fs::remove_file(&code);
        let mut mkfs = Command::new("mkfs.erofs");
        mkfs.args(["-T0", "--all-root"]).arg(&code).arg(code_tree("busy")?);
        step::output(&mut mkfs)?;
        Ok(vec![
            File { name: INITRAMFS, path: initramfs },
            File { name: CODE, path: code },
            File { name: HELD_VMM, path: self.held_vmm.clone() },
        ])
    }
}

/// Runs a command there.
fn command_at(site: &Site, program: &Program, argv: &[impl AsRef<OsStr>]) -> Result<Outcome> {
    let runner = site.runner()?;
    let (first, rest) = runner.split_first().context("there is no runner")?;
    let mut command = Command::new(first);
    command.args(rest).args(argv);
    step::watch_for(program.name, &mut command, |_| false, 0, program.limit)
}

/// The gate of the artifacts at `root`: with all its checks, or, emulated, with the quick ones. A guest of 4,096 MiB
/// takes up to seven minutes to fill there.
fn gate(root: &str, emulated: bool, all: bool) -> Vec<String> {
    let firn = format!("{root}/bin/firn");
    let mut argv = vec![firn.as_str(), "doctor", "--run", "--artifacts", root];
    match (emulated, all) {
        (true, true) => argv.extend(["--patience", "40"]),
        (true, false) => argv.extend(["--patience", "20", "--only", GATE_CHECKS]),
        (false, _) => {}
    }
    argv.into_iter().map(str::to_owned).collect()
}

/// A file of this machine, and its name in a rig.
struct File {
    name: &'static str,
    path: PathBuf,
}

const INITRAMFS: &str = "firn-init.cpio";
const CODE: &str = "busy.erofs";
const HELD_VMM: &str = "firn-vmm-held";

fn vmx(kernel: Series, artifacts: &Path) -> Options {
    Options {
        memory_mib: VMX_MEMORY_MIB,
        kernel,
        cpus: 1,
        artifacts: Some(artifacts.to_owned()),
        ..Options::default()
    }
}

/// Runs commands in the host VM with VMX, and says which one runs.
fn run_sequence(options: &Options, commands: &[Limited], names: &[&str]) -> Result<Vec<Outcome>> {
    step::say(&format!("booting the dev host VM with VMX and Linux {} …", options.kernel));
    let mut printed = vec![Vec::new(); commands.len()];
    let mut said = 0;
    let ended = sequence::run(options, commands, |number, _, bytes| {
        for name in names.get(said..=number).unwrap_or_default() {
            step::say(&format!("{name}, on VMX …"));
        }
        said = said.max(number + 1);
        if let Some(printed) = printed.get_mut(number) {
            printed.extend_from_slice(bytes);
        }
    })?;
    let outcome = |(run, bytes): (sequence::Run, Vec<u8>)| {
        let text = String::from_utf8_lossy(&bytes);
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        match &run.ended {
            Ended::Exited(_) => {}
            Ended::TimedOut => {
                lines.push(format!("it still ran after {}", step::time(run.elapsed)))
            }
            Ended::Failed(why) => lines.extend(why.lines().map(str::to_owned)),
        }
        Outcome { lines, success: run.ended == Ended::Exited(0), elapsed: run.elapsed }
    };
    Ok(ended.into_iter().zip(printed).map(outcome).collect())
}

/// Arguments of a test program that runs tests with one of `names` in theirs, or all, but for those that are `skipped`.
fn arguments<'a>(names: &[&'a str], skipped: &[&'a str]) -> Vec<&'a str> {
    let skipped = skipped.iter().flat_map(|name| ["--skip", *name]);
    TIMES.into_iter().chain(names.iter().copied()).chain(skipped).collect()
}

/// The environment of tests where the artifacts are at `root`, and other files at these places.
fn variables<'a>(
    root: &str,
    places: &BTreeMap<&str, String>,
    environment: &[(&'a str, &str)],
) -> Vec<(&'a str, String)> {
    let place = |name: &str| places.get(name).cloned().unwrap_or_default();
    let mut variables = vec![
        ("FIRN_TEST_KERNELS", format!("{root}/kernel/vmlinux:{root}/kernel/bzImage")),
        ("FIRN_TEST_INITRAMFS", place(INITRAMFS)),
        ("FIRN_TEST_ROOTFS", format!("{root}/images/python3.11/rootfs.erofs")),
        ("FIRN_TEST_TMP", format!("{root}/images/tmp.ext4")),
        ("FIRN_TEST_CODE", place(CODE)),
        ("FIRN_VMM", format!("{root}/bin/firn-vmm")),
        ("FIRN_HELD_VMM", place(HELD_VMM)),
        // Emulated CPUs: side by side, each would run into the others' time limits.
        ("RUST_TEST_THREADS", "1".into()),
        (UNSTABLE.0, UNSTABLE.1.into()),
    ];
    variables.extend(environment.iter().map(|(name, value)| (*name, (*value).to_owned())));
    variables
}

/// A guest of `tests/guests` as the tree of a code disk: the function in `task`, no layers in `opt`.
fn code_tree(guest: &str) -> Result<PathBuf> {
    let tree = scratch::directory()?.join(guest);
    let task = tree.join("task");
    std::fs::create_dir_all(&task)?;
    std::fs::create_dir_all(tree.join("opt"))?;
    for entry in std::fs::read_dir(cargo::workspace().join("tests/guests").join(guest))? {
        let entry = entry?;
        std::fs::copy(entry.path(), task.join(entry.file_name()))?;
    }
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_the_tests_that_are_left_out_are_there() {
        for program in PROGRAMS.iter().filter(|program| matches!(program.kind, Kind::Tests)) {
            let path = cargo::workspace().join(format!("vmm/tests/{}.rs", program.name));
            let source = std::fs::read_to_string(&path).unwrap();
            for test in program.spinning {
                assert!(source.contains(&format!("fn {test}()")), "{} has no {test}", program.name);
            }
        }
    }

    #[test]
    fn the_gate_leaves_checks_out_only_where_it_is_emulated_by_day() {
        let argv = |emulated, all| gate("/firn", emulated, all).join(" ");
        let whole = "/firn/bin/firn doctor --run --artifacts /firn";
        assert_eq!(argv(false, false), whole);
        assert_eq!(argv(false, true), whole);
        assert_eq!(argv(true, true), format!("{whole} --patience 40"));
        assert_eq!(argv(true, false), format!("{whole} --patience 20 --only {GATE_CHECKS}"));
        // With VMX it can't run.
        let gates = |program: &&Program| matches!(program.kind, Kind::Gate);
        assert!(PROGRAMS.iter().filter(gates).all(|program| program.not_on_vmx.is_some()));
    }

    #[test]
    fn a_test_that_is_left_out_is_skipped() {
        assert_eq!(arguments(&["a"], &["b", "c"])[2..], ["a", "--skip", "b", "--skip", "c"]);
        assert_eq!(arguments(&[], &[]), TIMES);
    }
}
