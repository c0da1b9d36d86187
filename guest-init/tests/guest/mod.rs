//! A host for `firn-init`: runs it in a directory, with the image's own bootstrap and PyPI's
//! awslambdaric, and speaks the guest protocol with it.

#![allow(dead_code, reason = "each test file is a crate of its own and uses a part")]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::{
        fs::PermissionsExt as _,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::OnceLock,
    time::Duration,
};

use firn_proto::guest::{
    Answer, Call, Done, FromGuest, FunctionError, HttpReply, Invoke, Load, Loaded, Log, MAX_CHUNK,
    Outcome, Renew, Renewed, ToGuest, decode_from_guest, encode, frame_length,
};
use tempfile::TempDir;

const IMAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../rootfs/python3.11");

/// A Python with awslambdaric: `FIRN_TEST_PYTHON`, or a virtual environment made here once. `None`
/// (after saying so) only where none can be made.
pub fn python() -> Option<&'static Path> {
    static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
    PYTHON
        .get_or_init(|| match std::env::var_os("FIRN_TEST_PYTHON") {
            Some(python) => Some(python.into()),
            None => environment().map_err(|error| println!("skipped: {error}")).ok(),
        })
        .as_deref()
}

fn environment() -> Result<PathBuf, String> {
    let requirements = Path::new(IMAGE).join("requirements.txt");
    let wanted = fs::read_to_string(&requirements).map_err(|error| error.to_string())?;
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("awslambdaric");
    let python = directory.join("bin/python3");
    let installed = directory.join("installed.txt");
    if fs::read_to_string(&installed).is_ok_and(|found| found == wanted) {
        return Ok(python);
    }
    let run = |command: &mut Command| match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr))),
        Err(error) => Err(format!("{command:?}: {error}")),
    };
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&directory))?;
    run(Command::new(&python).args(["-m", "pip", "install", "--requirement"]).arg(&requirements))?;
    fs::write(installed, wanted).map_err(|error| error.to_string())?;
    Ok(python)
}

/// One guest.
pub struct Guest {
    init: Child,
    listener: UnixListener,
    stream: UnixStream,
    root: TempDir,
    /// Everything that was printed, in order.
    pub logs: Vec<Log>,
}

/// How to load a function.
pub struct Function<'a> {
    pub handler: &'a str,
    pub code: &'a str,
    pub init_timeout_ms: u64,
    pub snapshot: bool,
}

impl Guest {
    /// A guest whose image has this bootstrap.
    pub fn with_bootstrap(bootstrap: &str) -> Self {
        Self::with_options(bootstrap, &[])
    }

    /// As [`Self::with_bootstrap`], with options of `firn-init`.
    pub fn with_options(bootstrap: &str, options: &[&str]) -> Self {
        let root = tempfile::tempdir().unwrap();
        for directory in ["var/runtime", "var/task"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        let path = root.path().join("var/runtime/bootstrap");
        fs::write(&path, bootstrap).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let socket = root.path().join("host");
        let listener = UnixListener::bind(&socket).unwrap();
        let init = Command::new(env!("CARGO_BIN_EXE_firn-init"))
            .arg("--test-socket")
            .arg(&socket)
            .arg("--root")
            .arg(root.path())
            .args(options)
            .spawn()
            .unwrap();
        let stream = accept(&listener);
        let mut guest = Self { init, listener, stream, root, logs: Vec::new() };
        match guest.receive() {
            FromGuest::Ready(ready) => assert!(ready.ready_tsc >= ready.init_tsc),
            other => panic!("{other:?}"),
        }
        guest
    }

    /// A guest with the Python image's bootstrap, run by `python`.
    pub fn with_python(python: &Path) -> Self {
        let overlay = Path::new(IMAGE).join("overlay/var/runtime");
        let bootstrap = fs::read_to_string(overlay.join("bootstrap")).unwrap();
        let (_, rest) = bootstrap.split_once('\n').unwrap();
        let guest = Self::with_bootstrap(&format!("#!{} -sP\n{rest}", python.display()));
        let hook = "var/runtime/firn_restore.py";
        fs::copy(overlay.join("firn_restore.py"), guest.root.path().join(hook)).unwrap();
        guest
    }

    pub fn load(&mut self, function: &Function<'_>) -> Loaded {
        self.send_load(function);
        self.loaded()
    }

    /// Where the function's code is.
    pub fn task(&self) -> PathBuf {
        self.root.path().join("var/task")
    }

    /// Of the environment of a runtime with [`BOOTSTRAP`].
    pub fn variable(&self, name: &str) -> String {
        let environment = loop {
            match fs::read_to_string(self.task().join("env")) {
                Ok(environment) => break environment,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let mut variables = environment.lines().filter_map(|line| line.split_once('='));
        variables.find(|(found, _)| *found == name).unwrap().1.to_owned()
    }

    pub fn send_load(&mut self, function: &Function<'_>) {
        fs::write(self.task().join("lambda_function.py"), function.code).unwrap();
        let initialization = if function.snapshot { "snap-start" } else { "on-demand" };
        self.send(&ToGuest::Load(Load {
            environment: [
                ("_HANDLER", function.handler),
                ("AWS_LAMBDA_INITIALIZATION_TYPE", initialization),
                ("AWS_LAMBDA_FUNCTION_NAME", "hello"),
                ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "128"),
                ("GREETING", "grüezi"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
            memory_bytes: 128 << 20,
            init_timeout_ms: function.init_timeout_ms,
            snapshot: function.snapshot,
            code: true,
            endpoints: vec!["AWS_ENDPOINT_URL_KMS".to_owned()],
        }));
    }

    pub fn loaded(&mut self) -> Loaded {
        match self.answer() {
            FromGuest::Loaded(loaded) => loaded,
            other => panic!("{other:?}"),
        }
    }

    pub fn invoke(&mut self, id: &str, timeout_ms: u64, payload: &str) -> Done {
        self.send(&invocation(id, timeout_ms, payload));
        self.done(id)
    }

    pub fn done(&mut self, id: &str) -> Done {
        match self.answer() {
            FromGuest::Done(done) => {
                assert_eq!(done.request_id, id);
                assert!(done.tsc.0 < done.tsc.1);
                done
            }
            other => panic!("{other:?}"),
        }
    }

    /// A streamed response: its content type, its bytes, and how it ended.
    pub fn streamed(&mut self, id: &str) -> (String, Vec<u8>, Done) {
        let FromGuest::Begin(begin) = self.answer() else { panic!("no stream begins") };
        let mut bytes = Vec::new();
        loop {
            match self.answer() {
                FromGuest::Chunk(chunk) => {
                    assert!((1..=MAX_CHUNK).contains(&chunk.payload.len()));
                    bytes.extend_from_slice(&chunk.payload);
                }
                FromGuest::Done(done) => {
                    assert_eq!(done.request_id, id);
                    return (begin.content_type, bytes, done);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// The function's next call.
    pub fn call(&mut self) -> Call {
        match self.answer() {
            FromGuest::Call(call) => call,
            other => panic!("{other:?}"),
        }
    }

    /// Answers a call.
    pub fn reply(&mut self, id: u64, status: u16, body: &str) {
        let fields = vec![("X-Its".to_owned(), "own".to_owned())];
        let reply = HttpReply { status, fields, body: body.as_bytes().to_vec() };
        self.send(&ToGuest::Answer(Answer { id, reply: Some(reply) }));
    }

    pub fn renewed(&mut self) -> Renewed {
        match self.answer() {
            FromGuest::Renewed(renewed) => renewed,
            other => panic!("{other:?}"),
        }
    }

    pub fn send(&mut self, message: &ToGuest) {
        self.stream.write_all(&encode(message).unwrap()).unwrap();
    }

    /// The next message that is no log; logs are kept.
    pub fn answer(&mut self) -> FromGuest {
        loop {
            match self.receive() {
                FromGuest::Log(log) => self.logs.push(log),
                other => return other,
            }
        }
    }

    pub fn receive(&mut self) -> FromGuest {
        let mut prefix = [0; 4];
        self.stream.read_exact(&mut prefix).unwrap();
        let mut message = vec![0; frame_length(prefix).unwrap()];
        self.stream.read_exact(&mut message).unwrap();
        decode_from_guest(&message).unwrap()
    }

    /// Waits for a line.
    pub fn printing(&mut self) -> String {
        match self.receive() {
            FromGuest::Log(log) => String::from_utf8_lossy(&log.line).into_owned(),
            other => panic!("{other:?}"),
        }
    }

    /// What was printed since the last call.
    pub fn printed(&mut self) -> String {
        let mut text = String::new();
        for log in self.logs.drain(..) {
            text.push_str(&String::from_utf8_lossy(&log.line));
            if !log.partial {
                text.push('\n');
            }
        }
        text
    }

    /// Resident memory of `firn-init` in bytes: now, and at most so far.
    pub fn memory(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.init.id())).unwrap();
        let of = |name: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
        };
        (of("VmRSS:"), of("VmHWM:"))
    }

    /// Has `firn-init` find all at once that happens meanwhile.
    pub fn while_stopped<T>(&self, happens: impl FnOnce() -> T) -> T {
        let signal = |name: &str| {
            let id = self.init.id().to_string();
            assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
        };
        signal("-STOP");
        let result = happens();
        signal("-CONT");
        result
    }

    /// Ends the connection, as a monitor does under which none survives a snapshot.
    pub fn lose_connection(&mut self) {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }

    /// Takes the guest's next connection.
    pub fn accept_again(&mut self) {
        self.stream = accept(&self.listener);
    }

    /// Waits for the guest's own end: its exit code.
    pub fn ended(mut self) -> Option<i32> {
        self.init.wait().unwrap().code()
    }

    /// Tells the guest to end: its exit code.
    pub fn shut_down(mut self) -> Option<i32> {
        self.send(&ToGuest::Shutdown);
        self.init.wait().unwrap().code()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // At the end of its stream the guest kills the runtime and ends by itself.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        let _ = self.init.wait();
    }
}

fn accept(listener: &UnixListener) -> UnixStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

pub fn invocation(id: &str, timeout_ms: u64, payload: &str) -> ToGuest {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    ToGuest::Invoke(Invoke {
        request_id: id.to_owned(),
        function_arn: "arn:aws:lambda:us-east-1:000000000000:function:hello".to_owned(),
        trace_id: "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700;Sampled=1".to_owned(),
        client_context: "{\"client\": {\"app_title\":\n\"Bäckerei\"}, \"custom\": {}, \"env\": {}}"
            .to_owned(),
        cognito_identity:
            "{\"cognitoIdentityId\": \"us-east-1:1\", \"cognitoIdentityPoolId\": \"2\"}".to_owned(),
        deadline_ms: now.as_millis() as u64 + timeout_ms,
        timeout_ms,
        payload: payload.as_bytes().to_vec(),
    })
}

pub fn renew() -> ToGuest {
    ToGuest::Renew(Renew {
        wall_clock_ns: 1_800_000_000_000_000_000,
        tsc: None,
        entropy: vec![7; 64],
        instance_id: "instance-1".to_owned(),
        hook_timeout_ms: 10_000,
    })
}

/// The answer's text.
pub fn text(done: &Done) -> &str {
    match &done.outcome {
        Outcome::Response { payload, content_type } => {
            assert_eq!(content_type, "application/json");
            std::str::from_utf8(payload).unwrap()
        }
        other => panic!("{other:?}"),
    }
}

/// The error of a failed invocation.
pub fn error(done: &Done) -> &FunctionError {
    match &done.outcome {
        Outcome::Error(error) => error,
        other => panic!("{other:?}"),
    }
}

/// `errorType` and `errorMessage` of an error that the runtime posted.
pub fn reported(error: &FunctionError) -> (String, String) {
    match error {
        FunctionError::Reported { payload, .. } => {
            let document: serde_json::Value = serde_json::from_slice(payload).unwrap();
            let field = |name: &str| document[name].as_str().unwrap().to_owned();
            (field("errorType"), field("errorMessage"))
        }
        other => panic!("{other:?}"),
    }
}

/// Tells its environment and leaves the rest to the test.
pub const BOOTSTRAP: &str = "#!/bin/sh\nenv > env.new; mv env.new env; exec sleep 1000\n";

pub struct Client {
    pub stream: TcpStream,
    pub unread: Vec<u8>,
}

impl Client {
    pub fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Self { stream, unread: Vec::new() }
    }

    pub fn send(&mut self, method: &str, path: &str, fields: &str, body: &str) {
        // Of the Runtime API unless it begins with a slash.
        let runtime = if path.starts_with('/') { "" } else { "/2018-06-01/runtime/" };
        let length = body.len();
        let text = format!(
            "{method} {runtime}{path} HTTP/1.1\r\nHost: h\r\n{fields}\
             Content-Length: {length}\r\n\r\n{body}"
        );
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    /// The next answer: its head and body.
    pub fn answer(&mut self) -> (String, String) {
        let end = loop {
            if let Some(end) = self.unread.windows(4).position(|w| w == b"\r\n\r\n") {
                break end + 4;
            }
            self.read();
        };
        let head = String::from_utf8(self.unread.drain(..end).collect()).unwrap();
        let length = head.lines().find_map(|l| l.strip_prefix("Content-Length: ")).unwrap_or("0");
        let length: usize = length.parse().unwrap();
        while self.unread.len() < length {
            self.read();
        }
        (head, String::from_utf8(self.unread.drain(..length).collect()).unwrap())
    }

    pub fn read(&mut self) {
        let mut bytes = [0; 4096];
        let count = self.stream.read(&mut bytes).unwrap();
        assert!(count > 0, "closed after {:?}", String::from_utf8_lossy(&self.unread));
        self.unread.extend_from_slice(&bytes[..count]);
    }

    /// Sends and takes the answer: its status and body.
    pub fn call(&mut self, method: &str, path: &str, fields: &str, body: &str) -> (u16, String) {
        self.send(method, path, fields, body);
        let (head, body) = self.answer();
        (head[9..12].parse().unwrap(), body)
    }
}

/// A guest, and a client that waits for the first event.
pub fn started() -> (Guest, String, Client) {
    let mut guest = Guest::with_bootstrap(BOOTSTRAP);
    let function = Function { handler: "", code: "", init_timeout_ms: 30_000, snapshot: false };
    guest.send_load(&function);
    let address = guest.variable("AWS_LAMBDA_RUNTIME_API");
    let mut client = Client::connect(&address);
    client.send("GET", "invocation/next", "", "");
    assert_eq!(guest.loaded().error, None);
    (guest, address, client)
}
