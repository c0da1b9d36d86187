//! A function's zip archive, checked and extracted: nothing may appear outside the tree, and
//! nothing in it but plain files and directories.

#![no_main]

use std::{
    fs::{self, Metadata},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::LazyLock,
};

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

/// Where trees are made: in memory, if there is such a place.
static OUTER: LazyLock<TempDir> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    tempfile::tempdir_in(parent).expect("a temporary directory")
});

fuzz_target!(|zip: &[u8]| {
    let tree = OUTER.path().join("tree");
    fs::create_dir(&tree).expect("the last tree is gone");
    let result = firn::fuzzing::extract(zip, &tree);
    assert_eq!(names(OUTER.path()), ["tree"], "something escaped");
    let mut bytes = 0;
    walk(&tree, &mut |metadata| {
        assert!(metadata.is_dir() || metadata.is_file());
        assert_eq!(metadata.permissions().mode() & 0o7022, 0);
        if metadata.is_file() {
            bytes += metadata.len();
        }
    });
    if let Ok((_, unzipped)) = result {
        assert_eq!(bytes, unzipped);
    }
    fs::remove_dir_all(&tree).expect("the tree can be removed");
});

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("the directory can be read");
    entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

fn walk(dir: &Path, look: &mut impl FnMut(&Metadata)) {
    for entry in fs::read_dir(dir).expect("the directory can be read").flatten() {
        let metadata = entry.path().symlink_metadata().expect("the entry is there");
        look(&metadata);
        if metadata.is_dir() {
            walk(&entry.path(), look);
        }
    }
}
