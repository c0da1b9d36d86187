//! Firecracker, as far as a tiny guest needs it: its API over a Unix socket, and the guest's serial
//! port, which is its standard output.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

/// `mov $0x3f8,%dx; mov $'.',%al; l: out %al,%dx; jmp l`: its first instruction after a thaw is seen
/// on standard output.
const PRINT_FOR_EVER: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0xfd];

const LIMIT: Duration = Duration::from_secs(10);

/// A program, and a snapshot that it took of a tiny guest.
pub struct Firecracker {
    program: PathBuf,
    dir: tempfile::TempDir,
}

struct Process {
    child: Child,
    serial: ChildStdout,
    api: UnixStream,
}

impl Firecracker {
    /// Boots a guest with `memory_mib` of memory and takes the snapshot.
    pub fn new(program: &Path, memory_mib: u32) -> Self {
        let peer = Self { program: program.into(), dir: tempfile::tempdir().unwrap() };
        let kernel = std::fs::read(memfd_path(&super::common::elf(PRINT_FOR_EVER))).unwrap();
        std::fs::write(peer.dir.path().join("kernel"), kernel).unwrap();
        let mut process = peer.start();
        let machine = format!(r#"{{"vcpu_count":1,"mem_size_mib":{memory_mib}}}"#);
        process.call("PUT", "/machine-config", &machine);
        process.call(
            "PUT",
            "/boot-source",
            r#"{"kernel_image_path":"kernel","boot_args":"quiet"}"#,
        );
        process.call("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#);
        process.first_byte();
        // The guest must not wait for room in the pipe, or it could not be paused.
        let mut serial = process.serial;
        let drain = std::thread::spawn(move || std::io::copy(&mut serial, &mut std::io::sink()));
        call(&mut process.api, "PATCH", "/vm", r#"{"state":"Paused"}"#);
        let files = r#"{"snapshot_path":"state","mem_file_path":"memory"}"#;
        call(&mut process.api, "PUT", "/snapshot/create", files);
        process.child.kill().unwrap();
        process.child.wait().unwrap();
        drain.join().unwrap().unwrap();
        peer
    }

    fn start(&self) -> Process {
        let socket = self.dir.path().join("api.sock");
        let _ = std::fs::remove_file(&socket);
        let mut child = Command::new(&self.program)
            .args(["--api-sock", "api.sock", "--level", "Error"])
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        let api = loop {
            match UnixStream::connect(&socket) {
                Ok(api) => break api,
                Err(error) => assert!(begun.elapsed() < LIMIT, "no API: {error}"),
            }
            std::thread::sleep(Duration::from_micros(100));
        };
        let serial = child.stdout.take().unwrap();
        Process { child, serial, api }
    }

    /// Microseconds to the guest's first instruction from a request for a new process, and from the
    /// request to load in that.
    pub fn thaw(&self) -> (f64, f64) {
        let begun = Instant::now();
        let mut process = self.start();
        let ready = Instant::now();
        let load = r#"{"snapshot_path":"state","mem_backend":{"backend_path":"memory","backend_type":"File"},"resume_vm":true}"#;
        process.call("PUT", "/snapshot/load", load);
        process.first_byte();
        let (fresh, loaded) = (begun.elapsed(), ready.elapsed());
        process.child.kill().unwrap();
        process.child.wait().unwrap();
        (fresh.as_secs_f64() * 1e6, loaded.as_secs_f64() * 1e6)
    }
}

impl Process {
    fn call(&mut self, method: &str, path: &str, body: &str) {
        call(&mut self.api, method, path, body);
    }

    fn first_byte(&mut self) {
        self.serial.read_exact(&mut [0]).unwrap();
    }
}

fn call(api: &mut UnixStream, method: &str, path: &str, body: &str) {
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
    api.write_all((head + body).as_bytes()).unwrap();
    let mut answer = [0; 4096];
    let length = api.read(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]);
    assert!(answer.starts_with("HTTP/1.1 204"), "{path}: {answer}");
}

fn memfd_path(file: &std::fs::File) -> String {
    format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file))
}
