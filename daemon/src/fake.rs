//! A backend without microVMs, for this crate's tests: functions are commands in their events.
//!
//! The event `{"do": "sleep", "ms": 50}` sleeps; `exit`, `raise`, `say`, `large`, `die`, `flood`, `timeout` do as
//! they say; `ask` asks the services (`what`: `credentials`, or a request); `trace` sends its `documents`; `stream` streams its `chunks`, `ms` after one another, and `then` does one of the others; `stumble` exits the first time; `remember` answers with what the last `remember` brought; anything else is echoed.

use std::{
    fs,
    io::Write,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use firn::{
    Disk, FunctionSpec, InstanceError, Invocation, InvokeReport, LoadReport, LogLine, Outlets,
    Phases, ResponsePart, ShellClass, SnapshotError, SnapshotMeta, StartError, VmmExit,
    code::{CodeDisk, CodeError},
    control::{ExitReason, FailureKind},
    guest::{self, Ask, FunctionError, HttpRequest, Outcome},
};

use crate::backend::{Backend, Machine};

/// What the tests want to know and set.
#[derive(Debug, Default)]
pub struct Counters {
    pub boots: AtomicUsize,
    pub thaws: AtomicUsize,
    pub alive: AtomicUsize,
    pub paused: AtomicUsize,
    pub reclaimed: AtomicUsize,
    pub resets: AtomicUsize,
    /// Responses that have been streamed to their end.
    pub streamed: AtomicUsize,
    /// No instance can be reset.
    pub stuck: AtomicBool,
    /// No snapshot can be written.
    pub disk_full: AtomicBool,
    /// No instance can be started.
    pub broken: AtomicBool,
    /// Nothing can be restored: no snapshot is thawed, no instance that was reset runs.
    pub refuses: AtomicBool,
    /// Preparation takes this long.
    pub slow_load: Mutex<Duration>,
    /// Where invocations are written down, a line each: request id, ARN, event (`null` if long).
    pub ledger: Mutex<Option<fs::File>>,
    /// Environments that were loaded.
    pub environments: Mutex<Vec<Vec<(String, String)>>>,
}

#[derive(Debug, Clone, Default)]
pub struct Fake(pub Arc<Counters>);

#[derive(Debug)]
pub struct FakeMachine {
    id: String,
    counters: Arc<Counters>,
    alive: bool,
    outlets: Outlets,
    phases: Phases,
    memory: serde_json::Value,
    fresh: bool,
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        self.counters.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Fake {
    fn machine(&self) -> FakeMachine {
        self.0.alive.fetch_add(1, Ordering::SeqCst);
        FakeMachine {
            id: uuid::Uuid::new_v4().to_string(),
            counters: self.0.clone(),
            alive: true,
            outlets: Outlets::default(),
            phases: Phases(vec![("ready", Duration::from_micros(10))]),
            memory: serde_json::Value::Null,
            fresh: false,
        }
    }

    fn spawn(&self) -> Result<FakeMachine, StartError> {
        if self.0.broken.load(Ordering::SeqCst) {
            let source = std::io::Error::other("no more processes");
            return Err(StartError::Io { operation: "spawn", source });
        }
        Ok(self.machine())
    }
}

impl Backend for Fake {
    type Machine = FakeMachine;
    type Resident = String;

    fn interrupts_raised_again(&self) -> u64 {
        0
    }

    fn runtimes(&self) -> Vec<String> {
        vec!["python3.11".into()]
    }

    fn image_hash(&self, runtime: &str) -> Option<String> {
        (runtime == "python3.11").then(|| "0123456789abcdef0123".into())
    }

    async fn boot(&self, _runtime: &str, _class: ShellClass) -> Result<FakeMachine, StartError> {
        self.0.boots.fetch_add(1, Ordering::SeqCst);
        self.spawn()
    }

    async fn thaw(
        &self,
        _snapshot: &String,
        first: Option<&Invocation>,
        outlets: Outlets,
    ) -> Result<(FakeMachine, Option<InvokeReport>), StartError> {
        self.0.thaws.fetch_add(1, Ordering::SeqCst);
        if self.0.refuses.load(Ordering::SeqCst) {
            let (kind, message) = (FailureKind::Kvm, "vCPU 0: KVM would not set MSR 0x1".into());
            return Err(StartError::Refused { kind, message });
        }
        let mut machine = self.spawn()?;
        machine.outlets = outlets;
        let Some(first) = first else { return Ok((machine, None)) };
        match machine.invoke(first).await {
            Ok(mut report) => {
                report.renewed = Some(guest::Renewed {
                    instance_id: machine.id.clone(),
                    renew_us: 100,
                    hooks_us: 50,
                    error: None,
                });
                Ok((machine, Some(report)))
            }
            Err(InstanceError::Died { exit }) => Err(StartError::Died { exit }),
            Err(other) => Err(StartError::Protocol(other.to_string())),
        }
    }

    async fn make_resident(
        &self,
        dir: &Path,
        key: &str,
        _base: Option<&String>,
        _code: Option<&Disk>,
    ) -> Result<String, SnapshotError> {
        let found = fs::read_to_string(dir.join("state"))
            .map_err(|source| SnapshotError::Io { what: "state".into(), source })?;
        match found == key {
            true => Ok(found),
            false => Err(SnapshotError::Purpose { expected: key.into(), found }),
        }
    }

    /// Archives that end with `huge` are too large together with anything else.
    fn build_disk(&self, code: &[u8], layers: &[Vec<u8>]) -> Result<CodeDisk, CodeError> {
        for zip in std::iter::once(code).chain(layers.iter().map(Vec::as_slice)) {
            if !zip.starts_with(b"PK") {
                return Err(CodeError::NotAZip { reason: "no signature".into() });
            }
        }
        if layers.iter().any(|zip| zip.ends_with(b"huge")) {
            let (size, limit) = (280_000_000, firn::code::MAX_UNZIPPED);
            return Err(CodeError::CombinedTooLarge { size, limit });
        }
        let disk = Disk::copy(&mut &[0; 512][..], 512, "of a fake").expect("a memory file");
        Ok(CodeDisk { disk, entries: 1, unzipped_bytes: 1 })
    }

    async fn shutdown(&self) {}
}

impl FakeMachine {
    /// What the services answer to `credentials`, or to the request that the event describes.
    async fn ask(&self, event: &serde_json::Value) -> serde_json::Value {
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        let ask = match event["what"].as_str() {
            Some("credentials") => Ask::Credentials,
            _ => Ask::Request(HttpRequest {
                method: text("method"),
                target: text("target"),
                fields: serde_json::from_value(event["fields"].clone()).unwrap(),
                body: text("payload").into_bytes(),
            }),
        };
        let reply = self.outlets.services.as_ref().unwrap().call(ask).await;
        let body = String::from_utf8(reply.body).unwrap();
        serde_json::json!({ "status": reply.status, "fields": reply.fields, "body": body })
    }

    async fn print(&self, line: &str) {
        if let Some(log) = &self.outlets.log {
            let stream = guest::Stream::Stdout;
            let _ = log.send(LogLine { stream, line: line.into(), partial: false }).await;
        }
    }
}

fn exit(detail: &str) -> VmmExit {
    VmmExit { reason: None, code: None, signal: Some(9), detail: detail.into() }
}

impl Machine for FakeMachine {
    fn id(&self) -> &str {
        &self.id
    }

    fn pid(&self) -> u32 {
        1
    }

    fn is_alive(&self) -> bool {
        self.alive
    }

    fn start_phases(&self) -> &Phases {
        &self.phases
    }

    async fn load(
        &mut self,
        spec: &FunctionSpec,
        _for_snapshot: bool,
    ) -> Result<LoadReport, InstanceError> {
        self.outlets = spec.outlets.clone();
        let delay = {
            self.counters.environments.lock().unwrap().push(spec.environment.clone());
            *self.counters.slow_load.lock().unwrap()
        };
        tokio::time::sleep(delay).await;
        self.print("loading").await;
        let broken = spec.environment.iter().any(|(key, _)| key == "BROKEN");
        let error = broken.then(|| FunctionError::Exited { status: "exit status 1".into() });
        let phases = Phases(vec![("loaded", Duration::from_micros(20))]);
        Ok(LoadReport { init_us: 5000, error, phases })
    }

    async fn invoke(&mut self, invocation: &Invocation) -> Result<InvokeReport, InstanceError> {
        if self.fresh && self.counters.refuses.load(Ordering::SeqCst) {
            let mut exit = exit("vCPU 0: KVM would not set MSR 0x1");
            exit.reason = Some(ExitReason::NotRestored);
            return Err(InstanceError::Died { exit });
        }
        let renewed = std::mem::take(&mut self.fresh).then(|| {
            self.id = uuid::Uuid::new_v4().to_string();
            guest::Renewed {
                instance_id: self.id.clone(),
                renew_us: 100,
                hooks_us: 50,
                error: None,
            }
        });
        let event: serde_json::Value =
            serde_json::from_slice(&invocation.payload).unwrap_or_default();
        // Through a URL the orders are in the body.
        let body = event["body"].as_str().and_then(|body| serde_json::from_str(body).ok());
        let event: serde_json::Value = body.unwrap_or(event);
        if let Some(ledger) = &mut *self.counters.ledger.lock().unwrap() {
            let Invocation { request_id, function_arn, .. } = invocation;
            // One short write, so that no line is ever half there.
            let event =
                if invocation.payload.len() < 4096 { &event } else { &serde_json::Value::Null };
            ledger.write_all(format!("{request_id} {function_arn} {event}\n").as_bytes()).unwrap();
        }
        let streams = event["do"] == "stream";
        if streams && let Some(sink) = &invocation.response {
            let content_type = event["type"].as_str().unwrap_or_default().to_owned();
            let _ = sink.send(ResponsePart::Begin { content_type }).await;
            for chunk in event["chunks"].as_array().into_iter().flatten() {
                let times = event["times"].as_u64().unwrap_or(1);
                for _ in 0..times {
                    let bytes = chunk.as_str().unwrap_or_default().to_owned().into_bytes();
                    let _ = sink.send(ResponsePart::Chunk(bytes.into())).await;
                }
                let ms = event["ms"].as_u64().unwrap_or_default();
                tokio::time::sleep(Duration::from_millis(ms)).await;
            }
            self.counters.streamed.fetch_add(1, Ordering::SeqCst);
        }
        let respond = |payload: Vec<u8>| Outcome::Response {
            payload,
            content_type: "application/json".into(),
        };
        let mut segments = Vec::new();
        let action = if streams { &event["then"] } else { &event["do"] };
        let outcome = match action.as_str().unwrap_or_default() {
            "" if streams && invocation.response.is_some() => Outcome::Streamed,
            "sleep" => {
                let ms = event["ms"].as_u64().unwrap_or_default();
                tokio::time::sleep(Duration::from_millis(ms)).await;
                respond(format!("\"{}\"", self.id).into())
            }
            "remember" => {
                let before = std::mem::replace(&mut self.memory, event["what"].clone());
                respond(before.to_string().into())
            }
            "stumble" if self.memory.is_null() => {
                self.memory = true.into();
                Outcome::Error(FunctionError::Exited { status: "exit status 1".into() })
            }
            "exit" => Outcome::Error(FunctionError::Exited { status: "exit status 1".into() }),
            "raise" => Outcome::Error(FunctionError::Reported {
                error_type: String::new(),
                payload: br#"{"errorMessage":"oops","errorType":"ValueError"}"#.to_vec(),
            }),
            "ask" => respond(self.ask(&event).await.to_string().into()),
            "trace" => {
                let documents = event["documents"].as_array().into_iter().flatten();
                let documents = documents.filter_map(|document| document.as_str());
                segments = documents.map(|text| text.to_owned().into_bytes().into()).collect();
                respond(serde_json::json!(invocation.trace_id).to_string().into())
            }
            "say" => respond(event["what"].to_string().into()),
            "large" => Outcome::Error(FunctionError::ResponseTooLarge { size: 7_000_000 }),
            "timeout" => {
                let limit_ms = invocation.timeout.as_millis() as u64;
                Outcome::Error(FunctionError::TimedOut { limit_ms })
            }
            "die" => {
                self.alive = false;
                return Err(InstanceError::Died { exit: exit("killed by the test") });
            }
            "flood" => {
                for i in 0..5000 {
                    self.print(&format!("{i} {}", "x".repeat(1000))).await;
                }
                respond(b"null".to_vec())
            }
            // What it is told of another invocation holds that one's event and answer: echoes would double with each
            // hop of a circle.
            _ if !event["requestPayload"].is_null() => respond(b"null".to_vec()),
            _ => {
                self.print("hello from the function").await;
                respond(invocation.payload.to_vec())
            }
        };
        Ok(InvokeReport {
            outcome,
            duration_us: 1500,
            init_us: 0,
            max_memory_bytes: 30 << 20,
            tsc: (0, 0),
            renewed,
            segments,
            phases: Phases(vec![
                ("renewed", Duration::from_micros(700)),
                ("done", Duration::from_micros(900)),
            ]),
        })
    }

    async fn pause(&mut self) -> Result<(), InstanceError> {
        self.counters.paused.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    async fn reclaim(&mut self) -> Result<u64, InstanceError> {
        self.counters.reclaimed.fetch_add(1, Ordering::SeqCst);
        Ok(4096)
    }

    async fn reset(&mut self) -> Result<(), InstanceError> {
        if self.counters.stuck.load(Ordering::SeqCst) {
            self.alive = false;
            return Err(InstanceError::Died { exit: exit("a reset that failed") });
        }
        self.counters.resets.fetch_add(1, Ordering::SeqCst);
        self.memory = serde_json::Value::Null;
        self.fresh = true;
        Ok(())
    }

    async fn snapshot(self, dir: &Path, meta: SnapshotMeta) -> Result<(), SnapshotError> {
        if self.counters.disk_full.load(Ordering::SeqCst) {
            let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(SnapshotError::Io { what: "memory".into(), source });
        }
        fs::create_dir(dir).unwrap();
        fs::write(dir.join("state"), meta.key).unwrap();
        Ok(())
    }

    async fn retire(self) {}
}
