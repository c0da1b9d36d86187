//! What `--only` names: a stage, a file of tests, or a test.

use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

use crate::cargo;

/// Where the end-to-end tests are.
pub const END_TO_END: &str = "tests/e2e/";

/// Where the VMM's tests with Linux are.
const LINUX: &str = "vmm/tests/linux.rs";

/// Before the name of one of them.
const LINUX_PREFIX: &str = "linux::";

/// A part of the tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Stage {
    Style,
    Unit,
    Linux,
    E2e,
    Intel,
}

/// One value of `--only`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Only {
    /// All of a stage.
    Stage(Stage),
    /// Rust tests, as arguments of `cargo test` and behind its `--`.
    Unit(Rust),
    /// A test of the VMM with Linux, or a part of its name: all tests have the empty one.
    Linux(String),
    /// A file or test of `tests/e2e`, as pytest names it.
    EndToEnd(String),
}

/// Which Rust tests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rust {
    /// Directory of the package; all packages otherwise.
    pub package: Option<PathBuf>,
    /// The test program in `tests`; the package's own tests otherwise.
    pub program: Option<String>,
    /// A part of the names.
    pub name: Option<String>,
}

impl Only {
    /// The stage that runs it.
    pub fn stage(&self) -> Stage {
        match self {
            Self::Stage(stage) => *stage,
            Self::Unit(_) => Stage::Unit,
            Self::Linux(_) => Stage::Linux,
            Self::EndToEnd(_) => Stage::E2e,
        }
    }
}

impl FromStr for Only {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.strip_prefix("./").unwrap_or(text);
        if let Ok(stage) = <Stage as clap::ValueEnum>::from_str(text, false) {
            return Ok(Self::Stage(stage));
        }
        if let Some(name) = text.strip_prefix(LINUX_PREFIX) {
            return Ok(Self::Linux(name.to_owned()));
        }
        if text == LINUX {
            return Ok(Self::Linux(String::new()));
        }
        let file = text.split("::").next().unwrap_or(text);
        if file.ends_with(".py") {
            let name = text.strip_prefix(END_TO_END).unwrap_or(text);
            let file = file.strip_prefix(END_TO_END).unwrap_or(file);
            ensure!(
                cargo::workspace().join(END_TO_END).join(file).is_file(),
                "{END_TO_END} has no {file}"
            );
            return Ok(Self::EndToEnd(name.to_owned()));
        }
        if file.ends_with(".rs") {
            ensure!(file == text, "a Rust test is named without its file: module::test");
            return Ok(Self::Unit(Rust::of_file(Path::new(text))?));
        }
        ensure!(!text.is_empty() && !text.contains('/'), "there are no tests in {text}");
        Ok(Self::Unit(Rust { name: Some(text.to_owned()), ..Rust::default() }))
    }
}

impl Rust {
    /// The tests of a file: of its module, and of those below.
    fn of_file(path: &Path) -> Result<Self> {
        ensure!(cargo::workspace().join(path).is_file(), "there is no {}", path.display());
        let is_package = |dir: &&Path| cargo::workspace().join(dir).join("Cargo.toml").is_file();
        let package = path.ancestors().skip(1).find(is_package).filter(|dir| *dir != Path::new(""));
        let package = package.with_context(|| format!("{} is in no package", path.display()))?;
        let inside = path.strip_prefix(package)?.with_extension("");
        let mut parts: Vec<&str> = inside
            .components()
            .map(|part| match part {
                Component::Normal(name) => name.to_str().context("a name is not UTF-8"),
                _ => bail!("{} is no plain path", path.display()),
            })
            .collect::<Result<_>>()?;
        let root = parts.remove(0);
        ensure!(["src", "tests"].contains(&root), "there are no tests in {}", path.display());
        let program = (root == "tests").then(|| parts.remove(0).to_owned());
        if parts.last().is_some_and(|name| ["mod", "lib", "main"].contains(name)) {
            parts.pop();
        }
        let name = parts.iter().map(|name| format!("{name}::")).collect::<String>();
        let name = Some(name).filter(|name| !name.is_empty());
        Ok(Self { package: Some(package.to_owned()), program, name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(text: &str) -> Only {
        text.parse().unwrap()
    }

    #[test]
    fn stages_files_and_tests_are_told_apart() {
        assert_eq!(only("e2e"), Only::Stage(Stage::E2e));
        assert_eq!(only("intel"), Only::Stage(Stage::Intel));
        assert_eq!(only("vmm/tests/linux.rs"), Only::Linux(String::new()));
        assert_eq!(only("linux::snapshot_thaw"), Only::Linux("snapshot_thaw".into()));
        let whole = Only::EndToEnd("test_thaw.py".into());
        assert_eq!((only("tests/e2e/test_thaw.py"), only("test_thaw.py")), (whole.clone(), whole));
        let one = Only::EndToEnd("test_thaw.py::test_x[a b]".into());
        assert_eq!(only("tests/e2e/test_thaw.py::test_x[a b]"), one);
        let name = Some("resets::a_vmm".to_owned());
        assert_eq!(only("resets::a_vmm"), Only::Unit(Rust { name, ..Rust::default() }));
    }

    #[test]
    fn a_file_of_rust_is_a_package_a_program_and_modules() {
        let rust = |text: &str| match only(text) {
            Only::Unit(Rust { package, program, name }) => (package.unwrap(), program, name),
            other => panic!("{other:?}"),
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(rust("vmm/tests/reset.rs"), ("vmm".into(), some("reset"), None));
        assert_eq!(rust("firn/tests/host/main.rs"), ("firn".into(), some("host"), None));
        let resets = ("firn".into(), some("host"), some("resets::"));
        assert_eq!(rust("firn/tests/host/resets.rs"), resets);
        let crash = ("daemon".into(), None, some("api::tests::crash::"));
        assert_eq!(rust("daemon/src/api/tests/crash.rs"), crash);
        assert_eq!(rust("vmm/src/lib.rs"), ("vmm".into(), None, None));
    }

    #[test]
    fn what_is_not_there_is_said() {
        let error = |text: &str| text.parse::<Only>().unwrap_err().to_string();
        assert_eq!(error("test_nothing.py::test_x"), "tests/e2e/ has no test_nothing.py");
        assert_eq!(error("vmm/src/nothing.rs"), "there is no vmm/src/nothing.rs");
        assert!(error("vmm/src/lib.rs::x").contains("module::test"));
        assert_eq!(error("docs/"), "there are no tests in docs/");
    }
}
