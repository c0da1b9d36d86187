//! The functions that are measured.
//!
//! Their sources are in `benches/functions/`. Those that need nothing but Python are in this
//! program; the others come as archives `<name>.zip` that `cargo xtask bench` makes, because the
//! host VM has no network.

use std::{
    io::{Read, Write},
    path::{Path, PathBuf},
};

use crate::error::{Error, Result, io_with, of};

/// What answers in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// `firn-init` and the function's runtime.
    Runtime,
    /// `echo-init`, by itself: no runtime, no disk mounted.
    Echo,
}

impl Guest {
    /// The error where `echo-init` is needed and was not named.
    pub fn no_echo_init() -> Error {
        Error::Usage("function echo needs --echo-init; `cargo xtask bench` builds one".into())
    }
}

/// A function in the list.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// Its name.
    pub name: &'static str,
    /// What it does, in a few words.
    pub about: &'static str,
    /// Memory in MB.
    pub memory_mb: u32,
    /// The event of every call: JSON.
    pub event: &'static str,
    /// What answers.
    pub guest: Guest,
    /// `lambda_function.py`, where that is all of it.
    code: Option<&'static str>,
}

const EVENT: &str = r#"{"key":"value"}"#;

macro_rules! code {
    ($name:literal) => {
        Some(include_str!(concat!("../functions/", $name, "/lambda_function.py")))
    };
}

/// All functions.
pub const ALL: [Source; 8] = [
    Source {
        name: "echo",
        about: "the smallest guest: its init answers by itself",
        memory_mb: 128,
        event: EVENT,
        guest: Guest::Echo,
        code: code!("nothing"),
    },
    Source {
        name: "nothing",
        about: "does nothing",
        memory_mb: 128,
        event: EVENT,
        guest: Guest::Runtime,
        code: code!("nothing"),
    },
    Source {
        name: "cpu",
        about: "pure Python CPU work",
        memory_mb: 128,
        event: EVENT,
        guest: Guest::Runtime,
        code: code!("cpu"),
    },
    Source {
        name: "imports",
        about: "imports boto3 and signs a URL",
        memory_mb: 256,
        event: EVENT,
        guest: Guest::Runtime,
        code: None,
    },
    Source {
        name: "templating",
        about: "JSON in, HTML out by Jinja",
        memory_mb: 128,
        event: EVENT,
        guest: Guest::Runtime,
        code: None,
    },
    Source {
        name: "compression",
        about: "zlib, a quarter of a megabyte there and back",
        memory_mb: 128,
        event: EVENT,
        guest: Guest::Runtime,
        code: code!("compression"),
    },
    Source {
        name: "resident",
        about: "200 MB resident, some of them touched",
        memory_mb: 512,
        event: EVENT,
        guest: Guest::Runtime,
        code: code!("resident"),
    },
    Source {
        name: "sleep",
        about: "takes as long as the event says",
        memory_mb: 128,
        event: r#"{"sleep_s":0}"#,
        guest: Guest::Runtime,
        code: code!("sleep"),
    },
];

/// A function with its code as a disk.
#[derive(Debug, Clone)]
pub struct Function {
    /// Its name.
    pub name: &'static str,
    /// Memory in MB.
    pub memory_mb: u32,
    /// The event of every call: JSON.
    pub event: &'static str,
    /// What answers.
    pub guest: Guest,
    /// Its code: a read-only EROFS disk.
    pub disk: PathBuf,
    /// Its code as it was uploaded: a zip archive.
    pub archive: Vec<u8>,
    /// blake3 of the disk.
    pub hash: String,
    /// Environment of its runtime, without what depends on how it starts.
    pub environment: Vec<(String, String)>,
}

/// The function of that name in the list.
///
/// # Errors
/// [`Error::Usage`] with all names.
pub fn find(name: &str) -> Result<Source> {
    ALL.into_iter().find(|function| function.name == name).ok_or_else(|| {
        let names = ALL.map(|function| function.name).join(", ");
        Error::Usage(format!("there is no function {name:?}; there are {names}"))
    })
}

impl Source {
    /// Makes its disk in `directory`. `archives` may hold `<name>.zip`, which goes before the
    /// source in this program.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is neither; anything about files.
    pub fn build(self, archives: Option<&Path>, directory: &Path) -> Result<Function> {
        let archive = archives.map(|archives| archives.join(format!("{}.zip", self.name)));
        let zip = match (archive.filter(|archive| archive.exists()), self.code) {
            (Some(archive), _) => std::fs::read(&archive).map_err(io_with(&archive))?,
            (None, Some(code)) => zip(code)?,
            (None, None) => {
                return Err(Error::Usage(format!(
                    "function {name} needs {name}.zip, and --functions names no directory that \
                     has it; `cargo xtask bench` makes one",
                    name = self.name
                )));
            }
        };
        let disk = directory.join(format!("{}.erofs", self.name));
        let built = firn::code::build_disk(&zip, &[]).map_err(of("firn", "build a code disk"))?;
        let mut bytes = Vec::new();
        let mut content = built.disk.reader().map_err(io_with(&disk))?;
        content.read_to_end(&mut bytes).map_err(io_with(&disk))?;
        // Peers open it by its name.
        std::fs::write(&disk, &bytes).map_err(io_with(&disk))?;
        Ok(Function {
            name: self.name,
            memory_mb: self.memory_mb,
            event: self.event,
            guest: self.guest,
            disk,
            archive: zip,
            hash: blake3::hash(&bytes).to_hex().to_string(),
            environment: environment(self.memory_mb),
        })
    }
}

fn environment(memory_mb: u32) -> Vec<(String, String)> {
    let memory = memory_mb.to_string();
    [
        ("_HANDLER", "lambda_function.lambda_handler"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_LAMBDA_FUNCTION_NAME", "bench"),
        ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST"),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", &memory),
        ("AWS_LAMBDA_LOG_GROUP_NAME", "/aws/lambda/bench"),
        ("AWS_LAMBDA_LOG_STREAM_NAME", "bench"),
    ]
    .map(|(key, value)| (key.to_string(), value.to_string()))
    .to_vec()
}

/// An archive with `code` as its `lambda_function.py`.
///
/// # Errors
/// [`Error::Io`].
pub fn zip(code: &str) -> Result<Vec<u8>> {
    let failed = |e: zip::result::ZipError| Error::Io {
        what: "make an archive".into(),
        source: std::io::Error::other(e),
    };
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    archive.start_file("lambda_function.py", options).map_err(failed)?;
    archive.write_all(code.as_bytes()).map_err(|e| failed(e.into()))?;
    Ok(archive.finish().map_err(failed)?.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_has_its_source_and_a_json_event() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("functions");
        let functions = || ALL.into_iter().filter(|function| function.guest == Guest::Runtime);
        for function in functions() {
            let source = root.join(function.name).join("lambda_function.py");
            assert!(source.exists(), "{}", source.display());
            let packages = root.join(function.name).join("requirements.txt").exists();
            assert_eq!(function.code.is_none(), packages, "{}", function.name);
            serde_json::from_str::<serde_json::Value>(function.event).unwrap();
        }
        let listed = std::fs::read_dir(&root).unwrap().count();
        assert_eq!(listed, functions().count(), "a directory without an entry");
        assert!(find("nothing").is_ok());
        assert!(find("noting").unwrap_err().to_string().contains("nothing"));
    }

    #[test]
    fn a_function_without_its_archive_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let error = find("imports").unwrap().build(None, directory.path()).unwrap_err();
        assert!(error.to_string().contains("imports.zip"), "{error}");
    }
}
