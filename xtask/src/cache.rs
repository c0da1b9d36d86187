//! What is built once and kept: `<user's cache>/firn/<kind>-<hash>/`.
//!
//! The hash covers everything that goes into an entry, so an entry is never stale and never
//! changed. It is built under a temporary name and renamed when complete; a lock file makes a
//! second run wait for the first instead of building the same thing again.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::scratch;

/// Collects what goes into an entry.
pub struct Key(blake3::Hasher);

impl Key {
    /// Starts with the version of the recipe: raise it when the code that builds changes its
    /// output.
    pub fn new(recipe: &str) -> Self {
        let mut key = Self(blake3::Hasher::new());
        key.add(recipe);
        key
    }

    /// Adds bytes; two calls never mean the same as one with both.
    pub fn add(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        let bytes = bytes.as_ref();
        self.0.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        self
    }

    /// Adds the content of a file.
    pub fn add_file(&mut self, path: &Path) -> Result<&mut Self> {
        let mut hasher = blake3::Hasher::new();
        let mut file =
            File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let size = file.read(&mut buffer)?;
            if size == 0 {
                break;
            }
            hasher.update(&buffer[..size]);
        }
        Ok(self.add(hasher.finalize().as_bytes()))
    }

    /// Adds names, modes and contents of a directory's files, in order of name.
    pub fn add_tree(&mut self, root: &Path) -> Result<&mut Self> {
        let mut names: Vec<_> = match fs::read_dir(root) {
            Ok(entries) => entries.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error).with_context(|| format!("{}", root.display())),
        };
        names.sort();
        for path in names {
            let metadata = fs::symlink_metadata(&path)?;
            let name = path.file_name().unwrap_or_default();
            self.add(name.as_encoded_bytes()).add(metadata.permissions().mode().to_le_bytes());
            if metadata.is_dir() {
                self.add_tree(&path)?.add("end of directory");
            } else if metadata.is_symlink() {
                self.add(fs::read_link(&path)?.as_os_str().as_encoded_bytes());
            } else {
                self.add_file(&path)?;
            }
        }
        Ok(self)
    }

    /// The first 128 bits in hexadecimal.
    pub fn hex(&self) -> String {
        self.0.finalize().to_hex()[..32].to_owned()
    }
}

/// The directory of all entries.
pub fn root() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()) {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(std::env::var_os("HOME").context(
            "neither XDG_CACHE_HOME nor HOME is set: there is no place to keep what is built",
        )?)
        .join(".cache"),
    };
    let root = base.join("firn");
    fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
    Ok(root)
}

/// Returns the entry, after `build` has filled it if it was missing.
pub fn entry(kind: &str, key: &Key, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    entry_knowing(kind, key, |temporary, _| build(temporary))
}

/// Like [`entry`]; `build` also learns where the entry will lie.
pub fn entry_knowing(
    kind: &str,
    key: &Key,
    build: impl FnOnce(&Path, &Path) -> Result<()>,
) -> Result<PathBuf> {
    let root = root()?;
    let name = format!("{kind}-{}", key.hex());
    let path = root.join(&name);
    if path.exists() {
        return Ok(path);
    }
    let _lock = lock(&root, &name)?;
    if path.exists() {
        return Ok(path);
    }
    let temporary = scratch::beside(&root, kind)?;
    build(&temporary, &path)?;
    // A temporary directory is private to its owner; an entry need not be.
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o755))?;
    fs::rename(&temporary, &path)
        .with_context(|| format!("cannot rename to {}", path.display()))?;
    scratch::remove_one(&temporary);
    Ok(path)
}

/// Held while an entry is built; the kernel releases it even if the process is killed.
fn lock(root: &Path, name: &str) -> Result<File> {
    let path = root.join(format!(".{name}.lock"));
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("xtask: another run is building {name}; waiting for it");
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_every_part_and_its_borders() {
        let key = |parts: &[&str]| {
            let mut key = Key::new("v1");
            for part in parts {
                key.add(part);
            }
            key.hex()
        };
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["a", "b"]), key(&["ab"]));
        assert_ne!(key(&["a", "b"]), key(&["b", "a"]));
        assert_ne!(Key::new("v1").hex(), Key::new("v2").hex());
    }

    #[test]
    fn trees_differ_by_name_content_and_nesting() {
        let hash = |files: &[(&str, &str)]| {
            let root = tempfile::tempdir().unwrap();
            for (name, content) in files {
                let path = root.path().join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, content).unwrap();
            }
            let mut key = Key::new("v1");
            key.add_tree(root.path()).unwrap();
            key.hex()
        };
        assert_eq!(hash(&[("a", "1"), ("b/c", "2")]), hash(&[("b/c", "2"), ("a", "1")]));
        assert_ne!(hash(&[("a", "1")]), hash(&[("a", "2")]));
        assert_ne!(hash(&[("a", "1")]), hash(&[("b", "1")]));
        assert_ne!(hash(&[("a/x", "1"), ("b", "2")]), hash(&[("a/x", "1"), ("a/b", "2")]));
    }
}
