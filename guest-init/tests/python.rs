//! `firn-init` with a real client: unmodified awslambdaric, started by the image's bootstrap.

mod guest;

use std::time::{Duration, Instant};

use firn_proto::guest::{FromGuest, FunctionError, MAX_PAYLOAD, Stream, ToGuest};
use guest::{Function, Guest, error, invocation, python, renew, reported, text};

const CODE: &str = r#"
import ctypes, json, os, signal, subprocess, sys, time

print("initialising")

def hello(event, context):
    print("greeting", event["name"])
    print("unended", end="")
    return {
        "event": event,
        "id": context.aws_request_id,
        "arn": context.invoked_function_arn,
        "app": context.client_context.client.app_title,
        "identity": context.identity.cognito_identity_id,
        "remaining": context.get_remaining_time_in_millis(),
        "trace": os.environ["_X_AMZN_TRACE_ID"],
        "greeting": os.environ["GREETING"],
        "cwd": os.getcwd(),
        "root": os.environ["LAMBDA_TASK_ROOT"],
        "blocked": [l for l in open("/proc/self/status") if l.startswith("SigBlk")][0].split()[1],
    }

def act(event, context):
    what = event["do"]
    if what == "raise":
        raise ValueError(event.get("message", "no"))
    if what == "exit":
        os._exit(event["status"])
    if what == "kill":
        os.kill(os.getpid(), event["signal"])
    if what == "hang":
        subprocess.Popen(["sleep", "1000"])
        print("hanging", flush=True)
        while True:
            time.sleep(1)
    if what == "print":
        line = "x" * event["length"]
        for _ in range(event["lines"]):
            print(line)
        sys.stderr.write("printed\n")
    if what == "forbidden":
        libc = ctypes.CDLL(None, use_errno=True)
        call = lambda *args: (libc.syscall(*args), ctypes.get_errno())
        mount = call(165, b"none", b"/mnt", b"tmpfs", 0, None)
        newuser = 0x10000000
        return {
            "ptrace": call(101, 0, 0, 0, 0),
            "process_vm_readv": call(310, os.getpid(), 0, 0, 0, 0, 0),
            "mount": mount,
            "unshare": call(272, newuser),
            "clone": call(56, newuser | 17, 0, 0, 0, 0),
            "vsock": call(41, 40, 1, 0),
            "clone3": call(435, 0, 0),
            "io_uring_setup": call(425, 1, 0),
        }
    if what == "set":
        return {1, 2}
    if what == "long":
        return "y" * event["length"]
    return os.getpid()
"#;

fn guest(handler: &str, code: &str) -> Option<Guest> {
    let mut guest = Guest::with_python(python()?);
    let function = Function { handler, code, init_timeout_ms: 30_000, snapshot: false };
    let loaded = guest.load(&function);
    assert_eq!(loaded.error, None, "{}", guest.printed());
    assert!(loaded.init_us > 0);
    Some(guest)
}

fn acting() -> Option<Guest> {
    let mut guest = guest("lambda_function.act", CODE)?;
    assert_eq!(guest.printed(), "initialising\n");
    Some(guest)
}

/// That the runtime is as good as new; its process, and how long its start took.
fn pid(guest: &mut Guest) -> (String, u64) {
    let done = guest.invoke("pid", 30_000, r#"{"do": "nothing"}"#);
    (text(&done).to_owned(), done.init_us)
}

/// Kills a process and waits until its parent has reaped it: a signal is sent before it is
/// delivered, and a runtime that still waits for an event would get the next one.
fn kill(process: &str) {
    let id = rustix::process::Pid::from_raw(process.parse().unwrap()).unwrap();
    rustix::process::kill_process(id, rustix::process::Signal::KILL).unwrap();
    while std::path::Path::new(&format!("/proc/{process}")).exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn events_reach_the_handler_with_everything_around_them() {
    let Some(mut guest) = guest("lambda_function.hello", CODE) else { return };
    assert_eq!(guest.printed(), "initialising\n");
    for id in ["first", "second"] {
        let done = guest.invoke(id, 5000, r#"{"name": "Ada"}"#);
        let answer: serde_json::Value = serde_json::from_str(text(&done)).unwrap();
        assert_eq!(answer["event"]["name"], "Ada");
        assert_eq!(answer["id"], id);
        assert_eq!(answer["arn"], "arn:aws:lambda:us-east-1:000000000000:function:hello");
        assert_eq!(answer["app"], "Bäckerei");
        assert_eq!(answer["identity"], "us-east-1:1");
        assert!((1..=5000).contains(&answer["remaining"].as_i64().unwrap()), "{answer}");
        assert_eq!(answer["trace"], "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700;Sampled=1");
        assert_eq!(answer["greeting"], "grüezi");
        assert_eq!(answer["cwd"], answer["root"]);
        assert_eq!(answer["blocked"], "0000000000000000");
        assert_eq!(done.init_us, 0);
        assert!(done.duration_us > 0);
        assert!(guest.logs.iter().all(|log| log.stream == Stream::Stdout && !log.partial));
        assert_eq!(guest.printed(), "greeting Ada\nunended\n");
    }
    assert_eq!(guest.shut_down(), Some(0));
}

#[test]
fn a_handler_that_raises() {
    let Some(mut guest) = acting() else { return };
    let first = pid(&mut guest).0;
    let done = guest.invoke("r", 5000, r#"{"do": "raise", "message": "out of bread"}"#);
    assert_eq!(reported(error(&done)), ("ValueError".into(), "out of bread".into()));
    assert!(guest.printed().contains("[ERROR] ValueError: out of bread"));
    // Its message is in a header too, of up to a mebibyte.
    let message = "m".repeat(900_000);
    let event = format!(r#"{{"do": "raise", "message": "{message}"}}"#);
    let done = guest.invoke("r", 5000, &event);
    assert_eq!(reported(error(&done)), ("ValueError".into(), message));
    assert_eq!(pid(&mut guest), (first, 0));
}

#[test]
fn a_handler_that_exits_or_dies() {
    let Some(mut guest) = acting() else { return };
    let mut last = pid(&mut guest).0;
    for (event, status) in [
        (r#"{"do": "exit", "status": 1}"#, "exit status 1"),
        (r#"{"do": "exit", "status": 0}"#, "exit status 0"),
        (r#"{"do": "kill", "signal": 9}"#, "signal: killed"),
        (r#"{"do": "kill", "signal": 11}"#, "signal: segmentation fault"),
    ] {
        let done = guest.invoke("r", 30_000, event);
        assert_eq!(*error(&done), FunctionError::Exited { status: status.to_owned() });
        let (next, init_us) = pid(&mut guest);
        assert_ne!(next, last);
        assert!(init_us > 0);
        last = next;
    }
}

#[test]
fn a_runtime_that_dies_between_two_events_is_replaced() {
    let Some(mut guest) = acting() else { return };
    let first = pid(&mut guest).0;
    kill(&first);
    let (next, init_us) = pid(&mut guest);
    assert_ne!(next, first);
    assert!(init_us > 0);
    assert_eq!(guest.printed(), "initialising\n");
}

#[test]
fn nothing_runs_on_without_a_host() {
    let Some(mut guest) = acting() else { return };
    let process = pid(&mut guest).0;
    guest.send(&invocation("r", 60_000, r#"{"do": "hang"}"#));
    while !guest.printing().contains("hanging") {}
    drop(guest);
    assert!(!std::path::Path::new(&format!("/proc/{process}")).exists());
}

#[test]
fn a_handler_that_hangs() {
    let Some(mut guest) = acting() else { return };
    let started = Instant::now();
    let done = guest.invoke("r", 700, r#"{"do": "hang"}"#);
    assert_eq!(*error(&done), FunctionError::TimedOut { limit_ms: 700 });
    assert!((600_000..).contains(&done.duration_us), "{}", done.duration_us);
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(guest.printed(), "hanging\n");
    assert!(pid(&mut guest).1 > 0);
}

#[test]
fn a_function_that_prints_without_end_waits_for_the_host() {
    let Some(mut guest) = acting() else { return };
    // Far more than any buffer, and nobody reads: the deadline still comes.
    let event = r#"{"do": "print", "length": 1000000, "lines": 1000}"#;
    guest.send(&invocation("r", 1000, event));
    std::thread::sleep(Duration::from_millis(1500));
    let (_, most) = guest.memory();
    assert!(most < 8 << 20, "{most} bytes");
    let done = guest.done("r");
    assert_eq!(*error(&done), FunctionError::TimedOut { limit_ms: 1000 });
    assert!(guest.printed().len() < 4 << 20);
    // And so with lines that are nothing but ends.
    guest.send(&invocation("r", 1500, r#"{"do": "print", "length": 0, "lines": 100000000}"#));
    std::thread::sleep(Duration::from_millis(2000));
    let (_, most) = guest.memory();
    assert!(most < 8 << 20, "{most} bytes");
    assert_eq!(*error(&guest.done("r")), FunctionError::TimedOut { limit_ms: 1500 });
    guest.logs.clear();
    // What is taken arrives whole.
    let event = r#"{"do": "print", "length": 100000, "lines": 200}"#;
    text(&guest.invoke("r", 30_000, event));
    let stdout: Vec<_> = guest.logs.iter().filter(|l| l.stream == Stream::Stdout).collect();
    let bytes: usize = stdout.iter().map(|log| log.line.len()).sum();
    // A fresh runtime printed its first line too.
    assert_eq!(bytes, 200 * 100_000 + "initialising".len());
    assert_eq!(stdout.iter().filter(|log| !log.partial).count(), 201);
    let last = guest.logs.iter().find(|l| l.stream == Stream::Stderr).unwrap();
    assert_eq!(last.line, b"printed");
}

#[test]
fn payloads_at_the_limit_and_over_it() {
    let Some(mut guest) = acting() else { return };
    let (before, _) = guest.memory();
    let longest = MAX_PAYLOAD - 2; // Two quotes.
    let done = guest.invoke("r", 30_000, &format!(r#"{{"do": "long", "length": {longest}}}"#));
    assert_eq!(text(&done).len(), MAX_PAYLOAD);
    let event = format!(r#"{{"do": "nothing", "x": "{}"}}"#, "z".repeat(6 << 20));
    text(&guest.invoke("r", 30_000, &event));
    let (after, _) = guest.memory();
    assert!(after < before + (1 << 20), "{before} bytes, then {after}");

    let done =
        guest.invoke("r", 30_000, &format!(r#"{{"do": "long", "length": {}}}"#, longest + 1));
    let size = MAX_PAYLOAD as u64 + 1;
    assert_eq!(*error(&done), FunctionError::ResponseTooLarge { size });
    let done = guest.invoke("r", 30_000, r#"{"do": "long", "length": 50000000}"#);
    assert_eq!(*error(&done), FunctionError::ResponseTooLarge { size: 50_000_002 });
    pid(&mut guest);
}

#[test]
fn what_a_function_may_not_do() {
    let Some(mut guest) = acting() else { return };
    let done = guest.invoke("r", 5000, r#"{"do": "forbidden"}"#);
    let found: serde_json::Value = serde_json::from_str(text(&done)).unwrap();
    for (call, result) in found.as_object().unwrap() {
        let errno = if ["clone3", "io_uring_setup"].contains(&call.as_str()) { 38 } else { 1 };
        assert_eq!(*result, serde_json::json!([-1, errno]), "{call}");
    }
    assert_eq!(found.as_object().unwrap().len(), 8);
}

#[test]
fn an_answer_that_is_no_json() {
    let Some(mut guest) = acting() else { return };
    let done = guest.invoke("r", 5000, r#"{"do": "set"}"#);
    let (kind, message) = reported(error(&done));
    assert_eq!(kind, "Runtime.MarshalError");
    assert!(message.contains("not JSON serializable"), "{message}");
}

#[test]
fn functions_that_do_not_initialise() {
    let Some(python) = python() else { return };
    for (handler, code, kind, message) in [
        ("missing.handler", "", "Runtime.ImportModuleError", "No module named 'missing'"),
        ("lambda_function.no", "", "Runtime.HandlerNotFound", "Handler 'no' missing on module"),
        ("lambda_function", "", "Runtime.MalformedHandlerName", "Bad handler 'lambda_function'"),
        ("lambda_function.f", "def f(:", "Runtime.UserCodeSyntaxError", "Syntax error in module"),
        ("lambda_function.f", "raise KeyError('k')", "KeyError", "'k'"),
    ] {
        let mut guest = Guest::with_python(python);
        let function = Function { handler, code, init_timeout_ms: 30_000, snapshot: false };
        let loaded = guest.load(&function);
        // Initialised once more for each event, and failing in the same way.
        let done = guest.invoke("r", 30_000, "{}");
        assert!(done.init_us > 0);
        assert_eq!(done.duration_us, 0);
        for error in [loaded.error.as_ref().unwrap(), error(&done)] {
            let (found, text) = reported(error);
            assert_eq!(found, kind);
            assert!(text.contains(message), "{text}");
        }
        assert!(guest.printed().contains(kind));
    }
}

#[test]
fn an_init_that_exits_hangs_or_recovers() {
    let Some(python) = python() else { return };
    let load = |code, init_timeout_ms| {
        let mut guest = Guest::with_python(python);
        let handler = "lambda_function.f";
        let loaded = guest.load(&Function { handler, code, init_timeout_ms, snapshot: false });
        (guest, loaded.error)
    };
    let (_, error) = load("import sys; sys.exit(3)", 30_000);
    assert_eq!(error, Some(FunctionError::Exited { status: "exit status 3".to_owned() }));

    // Hangs the first time only, as an init that waits for a slow server may.
    let code = "
import os, time
if not os.path.exists('tried'):
    open('tried', 'w').close()
    time.sleep(1000)
def f(event, context):
    return event
";
    let (mut guest, error) = load(code, 1000);
    assert_eq!(error, Some(FunctionError::TimedOut { limit_ms: 1000 }));
    let done = guest.invoke("r", 30_000, "[1]");
    assert_eq!(text(&done), "[1]");
    assert!(done.init_us > 0);
}

const HOOKED: &str = r#"
import os, random, ssl
from snapshot_restore_py import register_after_restore, register_before_snapshot

random.seed(1)
first = random.random()
random.seed(1)
tell = []

@register_before_snapshot
def before():
    print("before the snapshot")

@register_after_restore
def after():
    print("after the restore")
    if os.path.exists("fail"):
        raise OSError("no network")
    tell.append(random.random() != first)

def f(event, context):
    return tell
"#;

#[test]
fn restore_hooks_run_before_the_first_event() {
    let Some(python) = python() else { return };
    let mut guest = Guest::with_python(python);
    let handler = "lambda_function.f";
    let function = Function { handler, code: HOOKED, init_timeout_ms: 30_000, snapshot: true };
    assert_eq!(guest.load(&function).error, None);
    guest.send(&ToGuest::Freeze);
    assert_eq!(guest.answer(), FromGuest::Frozen);
    assert_eq!(guest.printed(), "before the snapshot\n");
    // As at a thaw: both frames are there at once.
    guest.send(&renew());
    guest.send(&invocation("r", 5000, "{}"));
    let renewed = guest.renewed();
    assert_eq!(renewed.instance_id, "instance-1");
    assert_eq!(renewed.error, None);
    assert_eq!(guest.printed(), "after the restore\n");
    let done = guest.done("r");
    assert_eq!(text(&done), "[true]", "random was not reseeded");
    assert_eq!(done.init_us, 0);

    // Later snapshots of the same guest have no hooks to run.
    guest.send(&ToGuest::Freeze);
    assert_eq!(guest.answer(), FromGuest::Frozen);
    guest.send(&renew());
    assert_eq!(guest.renewed().error, None);
    assert_eq!(text(&guest.invoke("r", 5000, "{}")), "[true]");
    assert_eq!(guest.printed(), "");
}

#[test]
fn a_function_for_a_snapshot_serves_without_one() {
    let Some(python) = python() else { return };
    let mut guest = Guest::with_python(python);
    let handler = "lambda_function.f";
    let function = Function { handler, code: HOOKED, init_timeout_ms: 30_000, snapshot: true };
    assert_eq!(guest.load(&function).error, None);
    assert_eq!(text(&guest.invoke("r", 5000, "{}")), "[true]");
}

#[test]
fn restore_hooks_that_fail() {
    let Some(python) = python() else { return };
    let mut guest = Guest::with_python(python);
    let code = &format!("open('fail', 'w').close()\n{HOOKED}");
    let handler = "lambda_function.f";
    let function = Function { handler, code, init_timeout_ms: 30_000, snapshot: true };
    assert_eq!(guest.load(&function).error, None);
    guest.send(&ToGuest::Freeze);
    assert_eq!(guest.answer(), FromGuest::Frozen);
    guest.send(&renew());
    let error = guest.renewed().error.unwrap();
    assert_eq!(reported(&error), ("OSError".into(), "no network".into()));
    assert!(
        matches!(error, FunctionError::Reported { error_type, .. } if error_type == "Runtime.AfterRestoreError")
    );
}

#[test]
fn a_thaw_without_hooks_finds_the_runtime_waiting() {
    let Some(mut guest) = acting() else { return };
    let before = pid(&mut guest);
    guest.send(&ToGuest::Freeze);
    assert_eq!(guest.answer(), FromGuest::Frozen);
    guest.send(&renew());
    assert_eq!(guest.renewed().error, None);
    assert_eq!(pid(&mut guest), before);
}

#[test]
fn a_guest_without_a_function_freezes_and_thaws() {
    let Some(python) = python() else { return };
    let mut guest = Guest::with_python(python);
    guest.send(&ToGuest::Freeze);
    assert_eq!(guest.answer(), FromGuest::Frozen);
    guest.send(&renew());
    assert_eq!(guest.renewed().error, None);
    let function = Function {
        handler: "lambda_function.act",
        code: CODE,
        init_timeout_ms: 30_000,
        snapshot: false,
    };
    assert_eq!(guest.load(&function).error, None);
    pid(&mut guest);
}
