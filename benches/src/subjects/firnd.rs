//! Firn through its daemon: what a caller of `firnd` sees, HTTP, scheduling and logs included.
//!
//! Only [`Scenario::Paused`] compares: `firnd` itself decides how an instance starts, pauses each one that
//! has answered, and keeps it.

use std::{
    cell::RefCell,
    fs,
    io::Write,
    iter,
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    rc::Rc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use aws_credential_types::Credentials;
use aws_sigv4::{
    http_request::{SignableBody, SignableRequest, SigningSettings, sign},
    sign::v4::SigningParams,
};
use aws_smithy_runtime_api::client::identity::Identity;
use base64::{Engine, engine::general_purpose::STANDARD};
use firn::ShellClass;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    process::{Child, Command},
    sync::Mutex,
};

use crate::{
    clock::now_ns,
    error::{Error, Result, io_at, io_with},
    functions::{Function, Guest},
    hash,
    scenario::Scenario,
    subject::{Counters, Deployed, Running, Start, Subject, Trip},
};

/// Name in records.
pub const NAME: &str = "firnd";

/// The same of one with `--identity`, whose every request is signed.
pub const SIGNED: &str = "firnd-signed";

/// The one user's access key there: for a daemon on loopback that lives as long as the run.
const KEY: (&str, &str) = ("AKIDBENCH00000000000", "a-secret-of-the-bench");

/// Longest answer in bytes, and longest head of one.
const MOST: usize = 1 << 20;

/// Where and how the daemon runs here.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Installation directory.
    pub artifacts: PathBuf,
    /// Directory for what the run keeps meanwhile.
    pub state: PathBuf,
    /// Runtime whose image is measured.
    pub runtime: String,
    /// Multiplies all time limits.
    pub patience: u32,
    /// Whether it has `--identity`.
    pub signed: bool,
}

impl Settings {
    fn name(&self) -> &'static str {
        if self.signed { SIGNED } else { NAME }
    }
}

/// A daemon of its own.
#[derive(Debug)]
pub struct Firnd {
    settings: Settings,
    daemon: RefCell<Option<Child>>,
    connection: Rc<Mutex<Connection>>,
}

impl Firnd {
    /// Starts it and connects.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Subject`] with what it answered.
    pub async fn open(settings: Settings) -> Result<Self> {
        let program = settings.artifacts.join("bin/firnd");
        let mut command = Command::new(&program);
        command.arg("--artifacts").arg(&settings.artifacts);
        let state = settings.state.join(settings.name());
        if settings.signed {
            command.arg("--identity").arg(identity_file(&state)?);
        }
        command.arg("--state").arg(&state);
        command.args(["--listen", "127.0.0.1:0", "--no-cpu-limits", "--log", "error"]);
        command.args(["--patience", &settings.patience.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut daemon = command.spawn().map_err(io_with(&program))?;
        let mut ready = String::new();
        if let Some(stdout) = daemon.stdout.take() {
            let mut lines = BufReader::new(stdout);
            lines.read_line(&mut ready).await.map_err(io_with(&program))?;
        }
        let address = ready.trim().rsplit_once("http://").and_then(|(_, at)| at.parse().ok());
        let address = address.ok_or_else(|| trouble("start", &ready))?;
        let connection = Rc::new(Mutex::new(Connection::open(address, settings.signed).await?));
        Ok(Self { settings, daemon: RefCell::new(Some(daemon)), connection })
    }
}

#[async_trait(?Send)]
impl Subject for Firnd {
    fn name(&self) -> &'static str {
        self.settings.name()
    }

    fn describe(&self) -> Result<Value> {
        let hash = hash(&self.settings.artifacts.join("bin/firnd"))?;
        Ok(json!({ "version": env!("CARGO_PKG_VERSION"), "blake3": { "bin/firnd": hash } }))
    }

    fn supports(&self, _: Start) -> bool {
        true
    }

    fn measures(&self, scenario: Scenario) -> bool {
        scenario == Scenario::Paused
    }

    async fn spawn(&self, _: u32) -> Result<Trip> {
        Err(Error::Usage("firnd makes its processes by itself".into()))
    }

    async fn deploy(
        &self,
        function: &Function,
    ) -> Result<(Box<dyn Deployed>, Vec<(&'static str, Trip)>)> {
        if function.guest != Guest::Runtime {
            return Err(Error::Usage(format!("firnd can't run function {}", function.name)));
        }
        let code = STANDARD.encode(&function.archive);
        let input = json!({
            "FunctionName": function.name,
            "Runtime": self.settings.runtime,
            "Handler": "lambda_function.lambda_handler",
            "Role": "arn:aws:iam::000000000000:role/bench",
            "MemorySize": function.memory_mb,
            "Code": { "ZipFile": code },
        });
        let connection = &mut *self.connection.lock().await;
        connection.call("POST", "/2015-03-31/functions", input.to_string().as_bytes()).await?;
        let path = format!("/firn/v1/functions/{}/snapshot", function.name);
        loop {
            let status = connection.json(&path).await?;
            match status["state"].as_str() {
                Some("ready") => break,
                Some("preparing") => tokio::time::sleep(Duration::from_millis(50)).await,
                _ => return Err(trouble("make a snapshot", &status.to_string())),
            }
        }
        let deployed = FirndFunction {
            connection: self.connection.clone(),
            name: function.name,
            memory_mb: function.memory_mb,
        };
        Ok((Box::new(deployed), Vec::new()))
    }

    async fn shutdown(&self) {
        let Some(mut daemon) = self.daemon.take() else { return };
        let pid = daemon.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32));
        if let Some(pid) = pid {
            // What can't be asked to end is killed when it is dropped.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let _ = tokio::time::timeout(Duration::from_secs(60), daemon.wait()).await;
        }
    }
}

struct FirndFunction {
    connection: Rc<Mutex<Connection>>,
    name: &'static str,
    memory_mb: u32,
}

#[async_trait(?Send)]
impl Deployed for FirndFunction {
    async fn stock(&self, _: usize) -> Result<()> {
        Ok(())
    }

    async fn start(&self, _: Start, event: &[u8]) -> Result<(Trip, Box<dyn Running>)> {
        let mut instance = FirndInstance {
            connection: self.connection.clone(),
            name: self.name,
            pid: 0,
            memory_bytes: ShellClass::for_memory(self.memory_mb).memory_bytes(),
        };
        let trip = instance.invoke(event).await?;
        instance.pause().await?;
        Ok((trip, Box::new(instance)))
    }
}

/// The instance that serves the one caller there is.
struct FirndInstance {
    connection: Rc<Mutex<Connection>>,
    name: &'static str,
    pid: u32,
    memory_bytes: u64,
}

#[async_trait(?Send)]
impl Running for FirndInstance {
    async fn invoke(&mut self, event: &[u8]) -> Result<Trip> {
        let path = format!("/2015-03-31/functions/{}/invocations", self.name);
        let connection = &mut *self.connection.lock().await;
        // A client's own work is no part of what it waits for.
        let request = connection.request("POST", &path, event)?;
        let start_ns = now_ns();
        let answer = connection.send(&request).await?;
        let mut trip = Trip { start_ns, end_ns: answer.end_ns, ..Trip::default() };
        let phases: Value = serde_json::from_str(&answer.phases).unwrap_or_default();
        let at = |name: &str| phases[name].as_f64();
        if let (Some(scheduled), Some(done)) = (at("scheduled"), at("invoke.done")) {
            trip.figures.insert("library_us", done - scheduled);
        }
        if let Some(responding) = at("responding") {
            trip.figures.insert("daemon_us", responding);
        }
        Ok(trip)
    }

    /// Waits until the daemon has done so.
    async fn pause(&mut self) -> Result<()> {
        loop {
            let connection = &mut *self.connection.lock().await;
            let listed = connection.json("/firn/v1/instances").await?;
            let instances = listed["Instances"].as_object().into_iter().flatten();
            let mut own = instances.filter(|(_, i)| i["FunctionName"] == self.name);
            match own.next().map(|(_, i)| (i["State"].as_str(), i["Pid"].as_u64())) {
                Some((Some("idle"), Some(pid))) => {
                    self.pid = pid as u32;
                    return Ok(());
                }
                Some(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                None => return Err(trouble("keep an instance", &listed.to_string())),
            }
        }
    }

    async fn counters(&mut self) -> Result<Counters> {
        Ok(Counters::default())
    }

    fn pid(&self) -> u32 {
        self.pid
    }

    fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// The daemon keeps it.
    async fn end(self: Box<Self>) -> Result<Trip> {
        let now = now_ns();
        Ok(Trip { start_ns: now, end_ns: now, ..Trip::default() })
    }
}

/// A connection that stays open, as SDKs keep theirs.
#[derive(Debug)]
struct Connection {
    address: SocketAddr,
    /// What requests are signed with.
    key: Option<Identity>,
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(address: SocketAddr, signed: bool) -> Result<Self> {
        let stream = TcpStream::connect(address).await.map_err(io_at("connect to firnd"))?;
        stream.set_nodelay(true).map_err(io_at("connect to firnd"))?;
        let key = signed.then(|| Credentials::new(KEY.0, KEY.1, None, None, NAME).into());
        Ok(Self { address, key, stream, buffer: Vec::new() })
    }

    async fn json(&mut self, path: &str) -> Result<Value> {
        let answer = self.call("GET", path, b"").await?;
        serde_json::from_slice(&answer.body).map_err(|e| trouble("answer", &e.to_string()))
    }

    /// A successful answer.
    async fn call(&mut self, method: &str, path: &str, body: &[u8]) -> Result<Answer> {
        let request = self.request(method, path, body)?;
        self.send(&request).await
    }

    /// A whole request, signed where that is wanted.
    fn request(&self, method: &str, path: &str, body: &[u8]) -> Result<Vec<u8>> {
        let (address, length) = (self.address, body.len());
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {length}\r\n");
        if let Some(identity) = &self.key {
            let url = format!("http://{address}{path}");
            let wrong =
                |error: &dyn std::error::Error| trouble("be signed for", &error.to_string());
            let parameters = SigningParams::builder()
                .identity(identity)
                .region("us-east-1")
                .name("lambda")
                .time(SystemTime::now())
                .settings(SigningSettings::default())
                .build()
                .map_err(|error| wrong(&error))?
                .into();
            let body = SignableBody::Bytes(body);
            let signable = SignableRequest::new(method, &url, iter::empty(), body);
            let signable = signable.map_err(|error| wrong(&error))?;
            let signed = sign(signable, &parameters).map_err(|error| wrong(&error))?;
            for (name, value) in signed.output().headers() {
                request += &format!("{name}: {value}\r\n");
            }
        }
        Ok([request.as_bytes(), b"\r\n", body].concat())
    }

    /// What answers it, if that is a success.
    async fn send(&mut self, request: &[u8]) -> Result<Answer> {
        self.stream.write_all(request).await.map_err(io_at("write to firnd"))?;
        self.buffer.clear();
        loop {
            if let Some(answer) = Answer::parse(&self.buffer)? {
                let text = || String::from_utf8_lossy(&answer.body).into_owned();
                return match (answer.status / 100, answer.failed) {
                    (2, false) => Ok(answer),
                    (2, true) => Err(Error::Function { subject: NAME, answer: text() }),
                    _ => Err(trouble("answer", &format!("{} {}", answer.status, text()))),
                };
            }
            let read = self.stream.read_buf(&mut self.buffer).await;
            if read.map_err(io_at("read from firnd"))? == 0 || self.buffer.len() > MOST {
                return Err(trouble("answer", "the connection has ended"));
            }
        }
    }
}

/// Makes the file with the one user, who may do everything.
fn identity_file(state: &Path) -> Result<PathBuf> {
    let statement = json!({ "Effect": "Allow", "Action": "*", "Resource": "*" });
    let trust = json!({
        "Effect": "Allow",
        "Principal": { "Service": "lambda.amazonaws.com" },
        "Action": "sts:AssumeRole",
    });
    let policy = |statement| json!({ "Version": "2012-10-17", "Statement": statement });
    let identity = json!({
        "users": { "bench": {
            "keys": [{ "id": KEY.0, "secret": KEY.1 }],
            "policies": [policy(statement)],
        } },
        "roles": { "bench": { "trust": policy(trust) } },
    });
    let path = state.with_extension("json");
    let mut file = fs::OpenOptions::new();
    let file = file.write(true).create(true).truncate(true).mode(0o600).open(&path);
    let mut file = file.map_err(io_with(&path))?;
    file.write_all(identity.to_string().as_bytes()).map_err(io_with(&path))?;
    Ok(path)
}

struct Answer {
    status: u16,
    /// Whether the function did.
    failed: bool,
    /// When what happened, in microseconds since the daemon had the request's head: JSON.
    phases: String,
    body: Vec<u8>,
    /// When it was there.
    end_ns: u64,
}

impl Answer {
    /// Once all of it is there.
    fn parse(bytes: &[u8]) -> Result<Option<Self>> {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response.parse(bytes).map_err(|e| trouble("answer", &e.to_string()))?;
        let httparse::Status::Complete(head) = parsed else { return Ok(None) };
        let header = |name: &str| {
            let found = response.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name));
            found.and_then(|header| std::str::from_utf8(header.value).ok())
        };
        let length: usize = match header("content-length").map(str::parse) {
            Some(Ok(length)) => length,
            _ => return Err(trouble("answer", "no length")),
        };
        let Some(body) = bytes.get(head..head.saturating_add(length)) else { return Ok(None) };
        Ok(Some(Self {
            status: response.code.unwrap_or_default(),
            failed: header("x-amz-function-error").is_some(),
            phases: header("x-firn-phases").unwrap_or_default().to_owned(),
            body: body.to_vec(),
            end_ns: now_ns(),
        }))
    }
}

fn trouble(what: &'static str, said: &str) -> Error {
    let source = said.chars().take(500).collect::<String>().into();
    Error::Subject { subject: NAME, what, source }
}
