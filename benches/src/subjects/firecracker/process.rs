//! One Firecracker process: its directory, its API, its guest's sockets.
//!
//! ```text
//!  config.json      what it boots
//!  api.sock         HTTP/1.1 over a Unix socket; `Api` is the client
//!  v.sock_1024      a connection that the guest opens to port 1024 of the host arrives here
//!  tmp.ext4         this microVM's own /tmp; all its other disks are read-only and shared
//! ```
//! The directory is the process's working directory. What a snapshot names relative to it (the
//! vsock socket, /tmp) is so each clone's own, without namespaces or overrides.

use std::{
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use firn::control::INVOKE_PORT;
use rustix::{
    fs::{SeekFrom, inotify, seek},
    io::Errno,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, unix::AsyncFd},
    net::{UnixListener, UnixStream},
};

use super::NAME;
use crate::error::{Error, Result, io_at, of};

/// Longest answer of the API in bytes.
const MAX_ANSWER: usize = 64 * 1024;

/// What a microVM is booted from.
#[derive(Debug, Clone)]
pub struct Machine {
    /// ELF kernel.
    pub kernel: PathBuf,
    /// Initial file system.
    pub initramfs: PathBuf,
    /// Kernel command line, without devices.
    pub cmdline: String,
    /// vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Read-only disks in their order.
    pub disks: Vec<PathBuf>,
    /// What the last disk, each microVM's own, starts as.
    pub tmp: PathBuf,
}

impl Machine {
    /// The configuration by API path; with the paths' first parts it is also the whole file.
    pub fn parts(&self) -> Vec<(String, Value)> {
        let mut parts = vec![
            (
                "/boot-source".to_owned(),
                json!({
                    "kernel_image_path": self.kernel,
                    "initrd_path": self.initramfs,
                    "boot_args": self.cmdline,
                }),
            ),
            (
                "/machine-config".to_owned(),
                json!({ "vcpu_count": self.vcpus, "mem_size_mib": self.memory_mib }),
            ),
            ("/vsock".to_owned(), json!({ "guest_cid": 3, "uds_path": "v.sock" })),
        ];
        let shared = self.disks.iter().map(|path| (path.as_path(), true));
        for (index, (path, read_only)) in shared.chain([(Path::new("tmp.ext4"), false)]).enumerate()
        {
            let drive = json!({
                "drive_id": format!("disk{index}"),
                "path_on_host": path,
                // The initramfs mounts its root itself.
                "is_root_device": false,
                "is_read_only": read_only,
            });
            parts.push((format!("/drives/disk{index}"), drive));
        }
        parts
    }

    fn file(&self) -> Value {
        let mut file = json!({ "drives": [] });
        for (path, part) in self.parts() {
            match path.trim_start_matches('/').split_once('/') {
                Some((list, _)) => file[list].as_array_mut().into_iter().for_each(|list| {
                    list.push(part.clone());
                }),
                None => file[&path[1..]] = part,
            }
        }
        file
    }
}

/// A directory for one microVM. Dropping it removes it.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    listener: UnixListener,
}

impl Place {
    /// Makes it. `tmp` is what its /tmp starts as.
    pub fn make(path: PathBuf, machine: &Machine, tmp: &Path) -> Result<Self> {
        let listener = fill(&path, machine, tmp).map_err(io_at("make a microVM's directory"));
        // Once there is a place, dropping it cleans up; until then nobody does.
        let listener = listener.inspect_err(|_| drop(fs::remove_dir_all(&path)))?;
        Ok(Self { path, listener })
    }

    /// Its writable disk.
    pub fn tmp(&self) -> PathBuf {
        self.path.join("tmp.ext4")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn fill(path: &Path, machine: &Machine, tmp: &Path) -> io::Result<UnixListener> {
    fs::create_dir_all(path)?;
    copy_sparse(tmp, &path.join("tmp.ext4"))?;
    fs::write(path.join("config.json"), serde_json::to_vec(&machine.file())?)?;
    UnixListener::bind(path.join(format!("v.sock_{INVOKE_PORT}")))
}

/// Copies a file's extents and keeps its holes.
pub fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let (from, to) = (File::open(from)?, File::create(to)?);
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut buffer = vec![0; 64 * 1024];
    let mut at = 0;
    while at < length {
        at = match seek(&from, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            start => start?,
        };
        let end = seek(&from, SeekFrom::Hole(at))?;
        while at < end {
            let most = buffer.len().min((end - at) as usize);
            let count = from.read_at(&mut buffer[..most], at)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            to.write_all_at(&buffer[..count], at)?;
            at += count as u64;
        }
    }
    Ok(())
}

/// A running Firecracker. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    watch: AsyncFd<OwnedFd>,
    place: Place,
}

impl Process {
    /// Executes it; with `boot`, it boots from its configuration file at once.
    pub fn spawn(binary: &Path, place: Place, boot: bool) -> Result<Self> {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .and_then(|watch| {
                inotify::add_watch(&watch, &place.path, inotify::WatchFlags::CREATE)?;
                Ok(watch)
            })
            .map_err(|e| io_at("watch a directory")(e.into()))?;
        // SAFETY: an `OwnedFd` names the same open descriptor for as long as it lives, and nothing
        // else closes it.
        let watch = unsafe { AsyncFd::register(watch) };
        let watch = watch.map_err(|e| io_at("watch a directory")(e.into_parts().1))?;
        let mut command = Command::new(binary);
        command.args(["--api-sock", "api.sock", "--level", "Error"]);
        if boot {
            command.args(["--config-file", "config.json"]);
        }
        command.current_dir(&place.path);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(io_at(binary.display().to_string()))?;
        Ok(Self { child, watch, place })
    }

    /// Waits until the API takes connections. Nothing runs here until its socket exists.
    pub async fn api(&self) -> Result<Api> {
        let path = self.place.path.join("api.sock");
        loop {
            match UnixStream::connect(&path).await {
                Ok(stream) => return Ok(Api { stream, unread: Vec::new() }),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    let mut ready =
                        self.watch.readable().await.map_err(io_at("watch a directory"))?;
                    let mut events = [0; 1024];
                    // What was made does not matter: the next turn looks.
                    let _ = rustix::io::read(&self.watch, &mut events);
                    ready.clear_ready();
                }
                // Bound, but not listening yet.
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::thread::yield_now(),
                Err(e) => return Err(io_at("connect to Firecracker's API")(e)),
            }
        }
    }

    /// Takes the guest's next connection.
    pub async fn accept(&self) -> Result<UnixStream> {
        let accepted = self.place.listener.accept().await;
        Ok(accepted.map_err(io_at("accept the guest's connection"))?.0)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Kills it: when it was reaped.
    pub fn kill(&mut self) -> Result<u64> {
        self.child.kill().map_err(io_at("kill Firecracker"))?;
        self.child.wait().map_err(io_at("wait for Firecracker"))?;
        Ok(crate::clock::now_ns())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both do nothing where it has been reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection to the API.
#[derive(Debug)]
pub struct Api {
    stream: UnixStream,
    unread: Vec<u8>,
}

impl Api {
    /// One request, which must succeed.
    pub async fn call(&mut self, method: &str, path: &str, body: &Value) -> Result<()> {
        let body = body.to_string();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let exchange = async {
            self.stream.write_all(request.as_bytes()).await?;
            self.answer().await
        };
        let (status, body) = exchange.await.map_err(io_at("talk to Firecracker's API"))?;
        if (200..300).contains(&status) {
            return Ok(());
        }
        let why = format!("{method} {path}: status {status}, {body}");
        Err(of(NAME, "request")(io::Error::other(why)))
    }

    /// Status and body of the next answer.
    async fn answer(&mut self) -> io::Result<(u16, String)> {
        loop {
            if let Some((status, body, length)) = parse(&self.unread)? {
                self.unread.drain(..length);
                return Ok((status, body));
            }
            if self.unread.len() > MAX_ANSWER {
                return Err(io::Error::other(format!("an answer of over {MAX_ANSWER} bytes")));
            }
            if self.stream.read_buf(&mut self.unread).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// Status, body and length of a whole answer; `None` if there is more to come.
fn parse(bytes: &[u8]) -> io::Result<Option<(u16, String, usize)>> {
    let mut fields = [httparse::EMPTY_HEADER; 16];
    let mut response = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(head) = response.parse(bytes).map_err(io::Error::other)? else {
        return Ok(None);
    };
    let named = |field: &&httparse::Header<'_>| field.name.eq_ignore_ascii_case("content-length");
    let length = match response.headers.iter().find(named) {
        None => 0,
        Some(field) => std::str::from_utf8(field.value)
            .ok()
            .and_then(|value| value.trim().parse::<usize>().ok())
            .filter(|length| *length <= MAX_ANSWER)
            .ok_or_else(|| io::Error::other("an answer of no length"))?,
    };
    let end = head + length;
    let body = bytes.get(head..end).map(|body| String::from_utf8_lossy(body).into_owned());
    Ok(body.map(|body| (response.code.unwrap_or_default(), body, end)))
}

/// The error of a peer that did not do what it should in time.
pub fn too_slow(what: &'static str) -> Error {
    of(NAME, what)(io::Error::from(io::ErrorKind::TimedOut))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            kernel: "/k".into(),
            initramfs: "/i".into(),
            cmdline: "quiet".into(),
            vcpus: 1,
            memory_mib: 128,
            disks: vec!["/root.erofs".into(), "/code.erofs".into()],
            tmp: "/tmp.ext4".into(),
        }
    }

    #[test]
    fn the_configuration_file_has_all_parts_and_disks_in_order() {
        let file = machine().file();
        assert_eq!(file["boot-source"]["kernel_image_path"], "/k");
        assert_eq!(file["machine-config"]["mem_size_mib"], 128);
        assert_eq!(file["vsock"]["uds_path"], "v.sock");
        let drives: Vec<_> = file["drives"].as_array().unwrap().iter().collect();
        let paths: Vec<_> = drives.iter().map(|d| d["path_on_host"].as_str().unwrap()).collect();
        assert_eq!(paths, ["/root.erofs", "/code.erofs", "tmp.ext4"]);
        assert_eq!(drives[1]["is_read_only"], true);
        assert_eq!(drives[2]["is_read_only"], false);
    }

    #[test]
    fn answers_come_in_pieces_and_in_a_row() {
        let text = b"HTTP/1.1 400 \r\nContent-Type: application/json\r\nContent-Length: 4\r\n\r\n\
                     {12}HTTP/1.1 204 \r\nConnection: keep-alive\r\n\r\n";
        let (status, body, length) = parse(text).unwrap().unwrap();
        assert_eq!((status, body.as_str()), (400, "{12}"));
        for end in 0..length {
            assert!(parse(&text[..end]).unwrap().is_none(), "{end}");
        }
        let rest = parse(&text[length..]).unwrap().unwrap();
        assert_eq!((rest.0, rest.1.as_str(), rest.2), (204, "", text.len() - length));
        assert!(parse(b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n").is_err());
        assert!(parse(b"FTP").is_err());
    }

    #[test]
    fn a_sparse_copy_has_the_same_bytes_and_stays_sparse() {
        use std::os::unix::fs::MetadataExt;
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(b"head", 0).unwrap();
        file.write_all_at(&[7; 100_000], 3 << 20).unwrap();
        copy_sparse(&from, &to).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
    }
}
