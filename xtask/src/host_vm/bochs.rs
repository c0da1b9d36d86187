//! Bochs 2.7 of Debian 12: its emulated VMX, with EPT and unrestricted guests, makes `kvm_intel` work in a host VM.
//!
//! It is unpacked into the cache, with the firmware, the boot loader and the program that makes its disc: nothing is
//! installed. Neither Bochs nor its machine has a network, a monitor to ask or a way to load a kernel: the machine
//! boots from a disc that holds the kernel and one initramfs, and what it prints on its parallel port appears in a file.
//!
//! Figures of this machine compare with themselves only: each iteration of a `rep` instruction counts as an
//! instruction, and nothing models caches.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::thread;

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::{Options, debian, root::Initrd};
use crate::cache::{self, Key};
use crate::{packages, scratch, step};

/// The release whose Bochs was tried; the version is part of the name of what its libraries are unpacked to.
const SUITE: &str = "bookworm";

const PACKAGES: [&str; 8] = [
    "bochs",
    "bochs-term",
    "bochsbios",
    "isolinux",
    "ncurses-base",
    "syslinux-common",
    "vgabios",
    "xorriso",
];

/// Raise it when this file changes what is unpacked.
const RECIPE: &str = "bochs 1";

/// Where packages have libraries; the first has the loader.
const LIBRARIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
const LOADER: &str = "ld-linux-x86-64.so.2";

/// Programs, and what they load by themselves: files of the packages. Their libraries are kept, too.
const PROGRAMS: [&str; 3] = [
    "usr/bin/bochs-bin",
    "usr/bin/xorriso",
    "usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so",
];

/// What else is kept of the unpacked packages, and under which name.
const FILES: [(&str, &str); 6] = [
    ("usr/lib/x86_64-linux-gnu/bochs/plugins", "plugins"),
    ("usr/share/bochs/BIOS-bochs-latest", "bios"),
    ("usr/share/vgabios/vgabios-stdvga.bin", "vgabios"),
    ("usr/lib/ISOLINUX/isolinux.bin", "isolinux.bin"),
    ("usr/lib/syslinux/modules/bios/ldlinux.c32", "ldlinux.c32"),
    ("lib/terminfo", "terminfo"),
];

/// An emulated CPU with VMX, EPT, VPID and unrestricted guests, but without APICv: with that, which server models have,
/// this Bochs loses interrupts.
const CPU: &str = "corei7_haswell_4770";

/// Instructions a second of the machine's time. Bochs runs about a tenth of that many: timeouts inside come late.
const INSTRUCTIONS_PER_SECOND: u32 = 1_000_000_000;

/// The machine's clock at its start, 2026-01-01: runs repeat.
const STARTED_AT: u32 = 1_767_225_600;

/// Lines of the console and of Bochs' log that are shown.
const LAST_LINES: usize = 60;

/// A Bochs process; dropping it kills it.
pub struct Bochs {
    child: Child,
    directory: PathBuf,
}

impl Bochs {
    /// Starts the machine. It is killed when the calling *thread* ends: call this from one that lives as long as the
    /// process.
    pub fn start(initrd: &Initrd, options: &Options) -> Result<Self> {
        let mut key = Key::new(RECIPE);
        key.add(SUITE);
        let root = cache::entry("bochs", &key, unpack)?;
        let directory = scratch::beside(&scratch::directory()?, "bochs")?;
        make_disc(&root, initrd, &directory)?;
        let write = |name: &str, text: &str| fs::write(directory.join(name), text);
        write("bochsrc", &configuration(&root, options)?)?;
        // Debian's Bochs has its debugger in it, which waits for a word to continue.
        write("debugger", "c\n")?;
        let mut command = program(&root, PROGRAMS[0]);
        command.args(["-q", "-f", "bochsrc", "-rc", "debugger"]).current_dir(&directory);
        command.env("TERM", "linux").env("TERMINFO", root.join("terminfo"));
        // Ctrl-C is for this process, which then ends Bochs.
        command.process_group(0);
        let terminal = attach_terminal(&mut command)?;
        let child = step::die_with_us(&mut command).spawn().context("cannot run Bochs")?;
        // The command holds the terminal's other end; while it does, what comes from there never ends.
        drop(command);
        thread::spawn(move || drain_screens(terminal));
        Ok(Self { child, directory })
    }

    /// What the machine printed on its parallel port, to be read again and again while it runs. The file may not be
    /// there yet.
    pub fn printed(&self) -> PathBuf {
        self.directory.join("printed")
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// The end of the machine's console and of Bochs' own log.
    pub fn describe(&self) -> String {
        let end = |name: &str| {
            let bytes = fs::read(self.directory.join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
            last.iter().map(|line| format!("  | {line}\n")).collect::<String>()
        };
        format!("the end of its console:\n{}and of Bochs' log:\n{}", end("console"), end("log"))
    }
}

impl Drop for Bochs {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        scratch::remove_one(&self.directory);
    }
}

/// Bochs reads it in its own directory.
fn configuration(root: &Path, options: &Options) -> Result<String> {
    let root = root.to_str().context("the path of the cache is not UTF-8")?;
    let memory = options.memory_mib;
    let model = options.cpu_model.as_deref().unwrap_or(CPU);
    // What it can't do it would ask about. An error is an instruction or a device that it does not know, which the
    // kernel finds out and does without; a panic is a triple fault, by which the kernel restarts the machine (`reboot=t`).
    Ok(format!(
        "config_interface: textconfig
display_library: term
romimage: file={root}/bios
vgaromimage: file={root}/vgabios
cpu: model={model}, count=1, ips={INSTRUCTIONS_PER_SECOND}, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest={memory}, host={memory}
clock: sync=none, time0={STARTED_AT}
pci: enabled=1, chipset=i440fx
ata0-master: type=cdrom, path=disc, status=inserted
boot: cdrom
plugin_ctrl: unmapped=1, biosdev=1, extfpuirq=1, speaker=0, usb_uhci=0
com1: enabled=1, mode=file, dev=console
parport1: enabled=1, file=printed
log: log
debug: action=ignore
info: action=ignore
error: action=ignore
panic: action=fatal
"
    ))
}

/// An ISO 9660 image that boots the kernel with its initramfs, under the name `disc`.
fn make_disc(root: &Path, initrd: &Initrd, directory: &Path) -> Result<()> {
    // Reliable: nothing in the machine is a better clock. Early: it would calibrate against timers whose emulation is
    // slow. Few words, which KVM has for each MSR that it does not know: a
    // character on the serial port costs 87,000 instructions.
    let boot = "default linux\nprompt 0\nlabel linux\nkernel vmlinuz\ninitrd initrd\n\
                append console=ttyS0 panic=-1 reboot=t loglevel=3 no_timer_check tsc=reliable \
                tsc_early_khz=1000000\n";
    let configuration = directory.join("isolinux.cfg");
    fs::write(&configuration, boot)?;
    let mut command = program(root, PROGRAMS[1]);
    command.args(["-as", "mkisofs", "-quiet", "-o"]).arg(directory.join("disc"));
    command.args(["-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot"]);
    command.args(["-boot-load-size", "4", "-boot-info-table", "-graft-points"]);
    for (name, path) in [
        ("isolinux.bin", root.join("isolinux.bin")),
        ("ldlinux.c32", root.join("ldlinux.c32")),
        ("isolinux.cfg", configuration),
        ("vmlinuz", initrd.kernel.image.clone()),
        ("initrd", initrd.path.clone()),
    ] {
        let path = path.to_str().context("a path is not UTF-8")?;
        command.arg(format!("/{name}={path}"));
    }
    step::output(&mut command).map(drop)
}

/// A program under its own loader and libraries: this machine's may be other ones, or missing.
fn program(root: &Path, path: &str) -> Command {
    let libraries = root.join("lib");
    let mut command = Command::new(libraries.join(LOADER));
    command.arg("--library-path").arg(libraries);
    command.env("LTDL_LIBRARY_PATH", root.join("plugins"));
    command.arg(root.join("bin").join(Path::new(path).file_name().unwrap_or_default()));
    command
}

/// Bochs' only display that needs no other program wants a terminal. Returns the other side of one.
fn attach_terminal(command: &mut Command) -> Result<File> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let path = ptsname(&ours, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let theirs: File = open(path.as_c_str(), flags, Mode::empty())?.into();
    command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
    Ok(ours.into())
}

/// Reads what the debugger prints, and what the machine shows, until Bochs ends. It is of no use: text of the BIOS, of
/// the boot loader, and a cursor. But Bochs waits for who does not read it.
///
/// With the debugger in it Bochs makes a second terminal for the machine's screen, and says which.
fn drain_screens(terminal: File) {
    for line in BufReader::new(terminal).split(b'\n').map_while(Result::ok) {
        if let Some(path) = screen_path(&String::from_utf8_lossy(&line)) {
            let path = path.to_owned();
            thread::spawn(move || drain_screen(&path));
        }
    }
}

fn drain_screen(path: &str) -> io::Result<()> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mut screen: File = open(path, flags, Mode::empty())?.into();
    // Otherwise it would wait for the ends of lines, and echo what it gets.
    let mut raw = tcgetattr(&screen)?;
    raw.make_raw();
    tcsetattr(&screen, OptionalActions::Now, &raw)?;
    io::copy(&mut screen, &mut io::sink()).map(drop)
}

/// The terminal that the debugger names in a line.
fn screen_path(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once("connected to screen \"")?;
    rest.split('"').next().filter(|path| path.starts_with("/dev/pts/"))
}

fn unpack(to: &Path) -> Result<()> {
    let tree = scratch::beside(&cache::root()?, "bochs-unpacked")?;
    packages::extract(&debian::download("Bochs", SUITE, None, &PACKAGES)?, &tree)?;
    for directory in ["bin", "lib"] {
        fs::create_dir_all(to.join(directory))?;
    }
    // The packages' libraries are ten times those that are needed.
    for program in PROGRAMS {
        for library in libraries(&tree, &tree.join(program))? {
            let name = library.file_name().context("a library has no name")?;
            fs::copy(&library, to.join("lib").join(name))?;
        }
    }
    fs::copy(tree.join(LIBRARIES[0]).join(LOADER), to.join("lib").join(LOADER))?;
    for program in &PROGRAMS[..2] {
        let name = Path::new(program).file_name().context("a program has no name")?;
        fs::copy(tree.join(program), to.join("bin").join(name))?;
    }
    for (from, name) in FILES {
        let (from, to) = (tree.join(from), to.join(name));
        // Some files are links.
        let done =
            if from.is_dir() { fs::rename(&from, &to) } else { fs::copy(&from, &to).map(drop) };
        done.with_context(|| format!("the packages of Bochs have no {}", from.display()))?;
    }
    scratch::remove_one(&tree);
    let help = step::output(program(to, PROGRAMS[0]).arg("--help"));
    ensure!(help.is_ok(), "Bochs of {SUITE} does not run: {help:?}");
    Ok(())
}

/// The libraries of a program, as the loader finds them among the unpacked packages.
fn libraries(tree: &Path, program: &Path) -> Result<Vec<PathBuf>> {
    let path = LIBRARIES.map(|directory| tree.join(directory).display().to_string()).join(":");
    let mut list = Command::new(tree.join(LIBRARIES[0]).join(LOADER));
    list.args(["--library-path", &path, "--list"]).arg(program);
    let text = step::output(&mut list)?;
    let found = text.lines().filter_map(|line| line.split_once("=> ")?.1.split(' ').next());
    Ok(found.filter(|path| !path.ends_with(LOADER)).map(PathBuf::from).collect())
}

/// Follows a file that another process writes.
pub struct Follow {
    path: PathBuf,
    file: Option<File>,
}

impl Follow {
    /// The file may be made later.
    pub fn new(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    /// Appends what is new.
    pub fn read(&mut self, to: &mut Vec<u8>) -> io::Result<()> {
        if self.file.is_none() {
            match File::open(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                opened => self.file = Some(opened?),
            }
        }
        self.file.iter_mut().try_for_each(|file| file.read_to_end(to).map(drop))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_debugger_names_the_screen() {
        let line = "Bochs connected to screen \"/dev/pts/1\"\r";
        assert_eq!(screen_path(line), Some("/dev/pts/1"));
        assert_eq!(screen_path("Next at t=0"), None);
        assert_eq!(screen_path("connected to screen \"/etc/passwd\""), None);
    }

    #[test]
    fn a_file_is_followed_from_before_it_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let (mut follow, mut read) = (Follow::new(path.clone()), Vec::new());
        follow.read(&mut read).unwrap();
        for (written, expected) in [("one", "one"), ("", "one"), (" two", "one two")] {
            let mut file = File::options().append(true).create(true).open(&path).unwrap();
            io::Write::write_all(&mut file, written.as_bytes()).unwrap();
            follow.read(&mut read).unwrap();
            assert_eq!(read, expected.as_bytes());
        }
    }
}
