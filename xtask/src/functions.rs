//! The functions of the benches that need packages, as archives: the host VM has no network.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use zip::write::SimpleFileOptions;

use crate::cache::{self, Key};
use crate::{cargo, python, scratch};

/// Raise it when this file changes what is built.
const RECIPE: &str = "function 1";

/// The interpreter of the image that they run in.
const PYTHON: &str = "3.11";

/// Archives of all functions in `benches/functions` that need packages, by name.
pub fn archives() -> Result<Vec<(String, PathBuf)>> {
    let root = cargo::workspace().join("benches/functions");
    let mut archives = Vec::new();
    for entry in fs::read_dir(&root).with_context(|| format!("{}", root.display()))? {
        let folder = entry?.path();
        if !folder.join("requirements.txt").exists() {
            continue;
        }
        let name = folder.file_name().and_then(|name| name.to_str());
        let name = name.with_context(|| format!("{}", folder.display()))?.to_owned();
        let archive = build(&folder)?.join("function.zip");
        archives.push((name, archive));
    }
    archives.sort();
    Ok(archives)
}

fn build(folder: &Path) -> Result<PathBuf> {
    let mut key = Key::new(RECIPE);
    key.add(PYTHON).add_tree(folder)?;
    cache::entry("function", &key, |to| {
        let tree = scratch::beside(&cache::root()?, "function-build")?;
        python::install_into(&tree, &folder.join("requirements.txt"), PYTHON)?;
        fs::copy(folder.join("lambda_function.py"), tree.join("lambda_function.py"))?;
        let file = File::create(to.join("function.zip"))?;
        let mut archive = zip::ZipWriter::new(file);
        add(&mut archive, &tree, "")?;
        archive.finish()?;
        scratch::remove_one(&tree);
        Ok(())
    })
}

/// Adds a directory's files in order of name, without times: the same files make the same archive.
fn add(archive: &mut zip::ZipWriter<File>, from: &Path, prefix: &str) -> Result<()> {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(from)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    entries.sort();
    for path in entries {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = format!("{prefix}{}", name.with_context(|| format!("{}", path.display()))?);
        if path.is_dir() {
            add(archive, &path, &format!("{name}/"))?;
        } else {
            archive.start_file(&name, SimpleFileOptions::default())?;
            let mut file = File::open(&path).with_context(|| format!("{}", path.display()))?;
            std::io::copy(&mut file, archive)?;
        }
    }
    Ok(())
}
