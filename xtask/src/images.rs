//! Builds the runtime images from their recipes, and the disk behind every `/tmp`.
//!
//! A recipe is a folder `rootfs/<runtime>/`:
//!
//! | file | what |
//! |---|---|
//! | `packages.txt` | Debian packages, one a line; what they depend on comes too |
//! | `requirements.txt` | Python packages, pinned; they go to `/var/runtime` |
//! | `overlay/` | files that are copied over all that |
//! | `exclude.txt` | patterns of what is left out, relative to the root |
//! | `image.json` | what the daemon should know: `{"runtime": …, "description": …}` |
//!
//! Packages are unpacked, never configured: no maintainer script runs, no right of root is needed.
//! The little that such scripts would have done is done here ([`settle`]). An image has no time
//! stamps and no owners but root, so the same packages give the same bytes.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::cache::{self, Key};
use crate::{cargo, packages, python, scratch, step};

/// The release of Debian that images are made of.
const SUITE: &str = "bookworm";

/// Raise it when this file changes what is built.
const RECIPE: &str = "image 1";

/// Size of the disk behind `/tmp`: Lambda's 512 MB.
const TMP_BYTES: u64 = 512 << 20;

/// Identity of that disk; all copies are the same disk until they are written.
const TMP_UUID: &str = "6669726e-0000-4000-8000-000000000001";

/// Identity of every image: their content tells them apart.
const IMAGE_UUID: &str = "6669726e-0000-4000-8000-000000000002";

/// The time of everything that must have one: the start of 2026.
const EPOCH: u32 = 1_767_225_600;

/// Where ext4 keeps its superblock, and there the time of the last write.
const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_WTIME: u64 = 0x30;

/// Left out of every image: what tells about the machine that built it, what the guest's own
/// mounts cover, what only a package manager reads.
const ALWAYS_EXCLUDED: [&str; 9] = [
    "dev/*",
    "etc/apt",
    "etc/hostname",
    "etc/resolv.conf",
    "etc/fstab",
    "tmp/*",
    "var/cache/*",
    "var/lib/apt",
    "var/log/*",
];

/// Names of all recipes.
pub fn runtimes() -> Result<Vec<String>> {
    let root = cargo::workspace().join("rootfs");
    let mut names = Vec::new();
    for entry in fs::read_dir(&root).with_context(|| format!("{}", root.display()))? {
        let entry = entry?;
        if entry.path().join("packages.txt").exists() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// What an image came from; `build.json` beside it.
#[derive(Debug, Serialize)]
struct Build {
    suite: &'static str,
    packages: Vec<String>,
    bytes: u64,
}

/// Builds one image unless it is cached; the directory holds `rootfs.erofs`, `image.json` and
/// `build.json`.
pub fn build(runtime: &str) -> Result<PathBuf> {
    packages::ensure(&[packages::IMAGES])?;
    let recipe = cargo::workspace().join("rootfs").join(runtime);
    ensure!(recipe.join("packages.txt").exists(), "there is no recipe {}", recipe.display());
    let list = lines(&recipe.join("packages.txt"))?;
    let mut key = Key::new(RECIPE);
    key.add(SUITE).add(list.join(" "));
    key.add(lines(&recipe.join("exclude.txt"))?.join("\n"));
    key.add(lines(&recipe.join("requirements.txt"))?.join("\n"));
    key.add(fs::read(recipe.join("image.json")).context("the recipe has no image.json")?);
    key.add_tree(&recipe.join("overlay"))?;
    let mkfs = packages::version("erofs-utils")?;
    key.add(&mkfs);
    cache::entry("image", &key, |to| {
        let tree = scratch::beside(&cache::root()?, "image-build")?;
        let archive = unpacked_packages(&list)?;
        assemble(&tree, &archive, &recipe)?;
        let image = to.join("rootfs.erofs");
        step::run(&format!("writing the image {runtime}"), &mut mkfs_erofs(&image, &tree))?;
        fs::copy(recipe.join("image.json"), to.join("image.json"))?;
        let bytes = fs::metadata(&image)?.len();
        let versions = fs::read_to_string(archive.join("versions"))?;
        let packages = versions.lines().map(str::to_owned).collect();
        let build = Build { suite: SUITE, packages, bytes };
        fs::write(to.join("build.json"), serde_json::to_vec_pretty(&build)?)?;
        make_removable(&tree)?;
        scratch::remove_one(&tree);
        step::say(&format!("image {runtime}: {:.1} MB", bytes as f64 / 1e6));
        Ok(())
    })
}

/// Builds the immutable backing of every `/tmp` unless it is cached; the file is `tmp.ext4`.
///
/// No journal: the disk does not outlive its microVM. Nothing is left to do lazily, or the guest's
/// kernel would write in the background, and every page of that would be copied on write.
pub fn tmp_disk() -> Result<PathBuf> {
    packages::ensure(&[packages::IMAGES])?;
    let mut key = Key::new("tmp disk 3");
    key.add(packages::version("e2fsprogs")?).add(TMP_BYTES.to_le_bytes());
    let directory = cache::entry("tmp", &key, |to| {
        let path = scratch::directory()?.join("tmp.ext4");
        fs::File::create(&path)?.set_len(TMP_BYTES)?;
        let extended = format!("lazy_itable_init=0,root_owner=0:0,hash_seed={TMP_UUID},nodiscard");
        let mut mkfs = Command::new("/sbin/mkfs.ext4");
        mkfs.args(["-q", "-F", "-m", "0", "-b", "4096", "-U", TMP_UUID, "-E", &extended]);
        mkfs.args([
            "-O",
            "^has_journal,^metadata_csum,^uninit_bg,^resize_inode,^64bit,sparse_super2",
        ]);
        mkfs.env("E2FSPROGS_FAKE_TIME", EPOCH.to_string()).arg(&path);
        step::run("formatting the /tmp disk", &mut mkfs)?;
        // Lambda's /tmp is empty and anyone's. The time is set, or it would be that of the build.
        let edits = "rmdir lost+found\nset_inode_field <2> mode 041777\n\
                     set_inode_field <2> mtime 20260101\nset_inode_field <2> ctime 20260101\n";
        let script = scratch::directory()?.join("tmp.debugfs");
        fs::write(&script, edits)?;
        let mut debugfs = Command::new("/sbin/debugfs");
        debugfs
            .arg("-w")
            .arg("-f")
            .arg(&script)
            .arg(&path)
            .env("SOURCE_DATE_EPOCH", EPOCH.to_string());
        step::output(&mut debugfs)?;
        // The superblock's time of the last write, which debugfs sets to now. There are no
        // checksums to keep right.
        let file = fs::OpenOptions::new().write(true).open(&path)?;
        file.write_all_at(&EPOCH.to_le_bytes(), SUPERBLOCK + SUPERBLOCK_WTIME)?;
        // mkfs reserves room for its tables of zeros; a copy holds 80 KiB.
        let mut copy = Command::new("cp");
        copy.arg("--sparse=always").arg(&path).arg(to.join("tmp.ext4"));
        step::output(&mut copy)?;
        Ok(fs::remove_file(&path)?)
    })?;
    Ok(directory.join("tmp.ext4"))
}

/// The packages' files as `tree.tar`, and their `versions`.
fn unpacked_packages(list: &[String]) -> Result<PathBuf> {
    let mut key = Key::new("packages 2");
    key.add(SUITE).add(list.join(" "));
    cache::entry("packages", &key, |to| {
        let mut command = Command::new("mmdebstrap");
        command.args(["--variant=extract", "--mode=chrootless", "--architectures=amd64"]);
        command.arg(format!("--include={}", list.join(",")));
        let versions = to.join("versions");
        let versions = versions.to_str().context("the path of the cache is not UTF-8")?;
        command.arg(format!(
            "--extract-hook=for f in \"$1\"/var/cache/apt/archives/*.deb; do \
             basename \"$f\" .deb; done > '{versions}'"
        ));
        command.arg(SUITE).arg(to.join("tree.tar"));
        step::run("unpacking the image's Debian packages", &mut command)
    })
}

fn assemble(tree: &Path, archive: &Path, recipe: &Path) -> Result<()> {
    // Packages still ship files under /bin and /lib; on Debian these are links into /usr.
    for name in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(tree.join("usr").join(name))?;
        symlink(Path::new("usr").join(name), tree.join(name))?;
    }
    let mut untar = Command::new("tar");
    untar.args(["-x", "--no-same-owner", "--keep-directory-symlink", "--exclude=./dev/*", "-f"]);
    step::output(untar.arg(archive.join("tree.tar")).arg("-C").arg(tree))?;

    let requirements = recipe.join("requirements.txt");
    let interpreter = find_python(tree)?;
    if requirements.exists() {
        let version = interpreter.as_deref().and_then(|name| name.strip_prefix("python"));
        let version = version.context("requirements.txt, but no python3.x among the packages")?;
        python::install_into(&tree.join("var/runtime"), &requirements, version)?;
    }
    let overlay = recipe.join("overlay");
    if overlay.exists() {
        let mut copy = Command::new("cp");
        copy.args([
            "--recursive",
            "--no-dereference",
            "--preserve=mode,links",
            "--no-target-directory",
        ]);
        step::output(copy.arg(&overlay).arg(tree))?;
    }
    let mut patterns: Vec<String> = ALWAYS_EXCLUDED.map(String::from).to_vec();
    patterns.extend(lines(&recipe.join("exclude.txt"))?);
    exclude(tree, &patterns)?;
    settle(tree, interpreter.as_deref())
}

/// What maintainer scripts would have done.
fn settle(tree: &Path, interpreter: Option<&str>) -> Result<()> {
    // Mount points and /tmp: nothing can be created in a read-only root.
    for name in ["dev", "proc", "sys", "tmp", "run", "opt", "var/task", "var/runtime"] {
        fs::create_dir_all(tree.join(name))?;
    }
    bundle_certificates(tree)?;
    if let Some(interpreter) = interpreter {
        compile_python(tree, interpreter)?;
    }
    Ok(())
}

/// All certificates in the one file that OpenSSL looks into.
fn bundle_certificates(tree: &Path) -> Result<()> {
    let from = tree.join("usr/share/ca-certificates");
    let bundle = tree.join("etc/ssl/certs/ca-certificates.crt");
    if !from.exists() || bundle.exists() {
        return Ok(());
    }
    let mut paths = matching(tree, "usr/share/ca-certificates/**/*.crt")?;
    paths.sort();
    let mut text = String::new();
    for path in paths {
        text.push_str(fs::read_to_string(&path)?.trim_end());
        text.push('\n');
    }
    fs::create_dir_all(tree.join("etc/ssl/certs"))?;
    fs::write(bundle, text).map_err(Into::into)
}

/// Compiles all Python files with the image's own interpreter. The root is read-only: without this
/// every start would compile what it imports. Hash-based and unchecked, as the image has no times.
fn compile_python(tree: &Path, interpreter: &str) -> Result<()> {
    let library = format!("usr/lib/{interpreter}");
    let mut command = Command::new(tree.join("usr/lib64/ld-linux-x86-64.so.2"));
    if !tree.join("usr/lib64/ld-linux-x86-64.so.2").exists() {
        // A link to an absolute path: resolve it inside the tree.
        command = Command::new(tree.join("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"));
    }
    command.arg("--library-path").arg(tree.join("usr/lib/x86_64-linux-gnu"));
    command.arg(tree.join("usr/bin").join(interpreter));
    command.args(["-I", "-m", "compileall", "-q", "-f", "-j", "0"]);
    command.args(["--invalidation-mode", "unchecked-hash", "-s"]).arg(tree).args(["-p", "/"]);
    for directory in [library.as_str(), "usr/lib/python3/dist-packages", "var/runtime"] {
        let directory = tree.join(directory);
        if directory.exists() {
            command.arg(directory);
        }
    }
    command.env("PYTHONHOME", tree.join("usr")).env("PYTHONHASHSEED", "0");
    step::run("compiling the image's Python files", &mut command)
}

/// Name of the image's interpreter, such as `python3.11`.
fn find_python(tree: &Path) -> Result<Option<String>> {
    let found = matching(tree, "usr/bin/python3.[0-9]*")?;
    let names = found.iter().filter_map(|path| path.file_name()?.to_str());
    Ok(names.filter(|name| !name.contains('-')).map(str::to_owned).next())
}

fn exclude(tree: &Path, patterns: &[String]) -> Result<()> {
    for pattern in patterns {
        for path in matching(tree, pattern)? {
            // A pattern may match what an earlier one has removed already.
            match fs::symlink_metadata(&path) {
                Ok(found) if found.is_dir() => fs::remove_dir_all(&path),
                Ok(_) => fs::remove_file(&path),
                Err(_) => Ok(()),
            }
            .with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Paths inside the tree that match; links are not followed out of it.
fn matching(tree: &Path, pattern: &str) -> Result<Vec<PathBuf>> {
    let relative = pattern.trim_start_matches('/');
    if relative.is_empty() || relative.split('/').any(|part| part == "..") {
        bail!("`{pattern}` is no pattern of paths below the image's root");
    }
    let escaped = glob::Pattern::escape(tree.to_str().context("a path is not UTF-8")?);
    let root = fs::canonicalize(tree)?;
    let mut found = Vec::new();
    for path in glob::glob(&format!("{escaped}/{relative}"))
        .with_context(|| format!("`{pattern}` is no pattern"))?
    {
        let path = path?;
        let parent = path.parent().map(fs::canonicalize).transpose()?;
        if parent.is_some_and(|parent| parent.starts_with(&root)) {
            found.push(path);
        }
    }
    Ok(found)
}

fn mkfs_erofs(image: &Path, tree: &Path) -> Command {
    let mut command = Command::new("mkfs.erofs");
    // Uncompressed: pages are read, not inflated, in the start that we want to be short.
    command.args(["--quiet", "--all-root", "-T", "0", "-x", "-1", "-U", IMAGE_UUID]);
    command.arg(image).arg(tree);
    command
}

/// Packages may ship directories without a right to write.
fn make_removable(tree: &Path) -> Result<()> {
    step::output(Command::new("chmod").args(["-R", "u+rwX"]).arg(tree)).map(drop)
}

/// Lines of a list without comments; none if the file is missing.
fn lines(path: &Path) -> Result<Vec<String>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("{}", path.display())),
    };
    let lines = text.lines().map(|line| line.split(" #").next().unwrap_or(line).trim());
    Ok(lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect())
}
