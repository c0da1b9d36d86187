//! Long steps: run a program quietly, show that it advances, and say what it printed if it fails.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a line of progress is printed where the output is no terminal.
const INTERVAL: Duration = Duration::from_secs(15);

/// Lines of output that an error shows.
const TAIL: usize = 25;

/// Steps that run, each with its line of progress: on a terminal they share one.
static RUNNING: Mutex<BTreeMap<u32, String>> = Mutex::new(BTreeMap::new());

/// Moves a terminal's cursor to the start of its line and removes what is there.
const CLEAR: &str = "\r\x1b[K";

/// Prints what happens next.
pub fn say(text: &str) {
    let clear = if std::io::stderr().is_terminal() { CLEAR } else { "" };
    eprintln!("{clear}xtask: {text}");
}

/// Makes the kernel kill the program when the calling thread ends, however it ends.
pub fn die_with_us(command: &mut Command) -> &mut Command {
    signal_at_our_end(command, rustix::process::Signal::KILL)
}

/// The same for a program that has to clean up: it is asked to end. It gets no Ctrl-C of ours.
pub fn end_with_us(command: &mut Command) -> &mut Command {
    signal_at_our_end(command.process_group(0), rustix::process::Signal::TERM)
}

fn signal_at_our_end(command: &mut Command, signal: rustix::process::Signal) -> &mut Command {
    // SAFETY: between fork and exec the closure makes one system call; it neither allocates nor
    // takes a lock.
    unsafe {
        command
            .pre_exec(move || Ok(rustix::process::set_parent_process_death_signal(Some(signal))?))
    }
}

/// Runs a program and returns what it printed on standard output. Its standard error appears in
/// the message if it fails.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = shown(command);
    let output = die_with_us(command.stdin(Stdio::null()))
        .output()
        .with_context(|| format!("cannot run {shown}"))?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("`{shown}` failed ({}):\n{}", output.status, indent(error.lines()));
    }
    String::from_utf8(output.stdout).with_context(|| format!("{shown} printed no UTF-8"))
}

/// What a program printed, and whether it succeeded.
#[derive(Debug)]
pub struct Outcome {
    /// Both streams, in the order in which the lines came.
    pub lines: Vec<String>,
    /// Whether its exit code was 0.
    pub success: bool,
    /// How long it took.
    pub elapsed: Duration,
}

/// Runs a program, showing only `what` and the time.
pub fn run(what: &str, command: &mut Command) -> Result<()> {
    run_counting(what, command, |_| false, 0).map(drop)
}

/// Runs a program and shows how many of about `total` lines satisfy `counts` (0: nobody knows).
/// Returns the time it took.
pub fn run_counting(
    what: &str,
    command: &mut Command,
    counts: impl Fn(&str) -> bool + Send + 'static,
    total: usize,
) -> Result<Duration> {
    let shown = shown(command);
    let outcome = watch(what, command, counts, total)?;
    if !outcome.success {
        let tail = &outcome.lines[outcome.lines.len().saturating_sub(TAIL)..];
        bail!(
            "{what} failed: `{shown}` ended with an error; its last lines:\n{}",
            indent(tail.iter().map(String::as_str))
        );
    }
    if outcome.elapsed > Duration::from_secs(2) {
        say(&format!("{what}: done in {}", time(outcome.elapsed)));
    }
    Ok(outcome.elapsed)
}

/// Runs a program that may fail, with the same progress, and returns what it printed.
pub fn watch(
    what: &str,
    command: &mut Command,
    counts: impl Fn(&str) -> bool + Send + 'static,
    total: usize,
) -> Result<Outcome> {
    watch_for(what, command, counts, total, Duration::MAX)
}

/// The same with a limit: a program that runs longer is killed, and its last line says so.
pub fn watch_for(
    what: &str,
    command: &mut Command,
    counts: impl Fn(&str) -> bool + Send + 'static,
    total: usize,
    limit: Duration,
) -> Result<Outcome> {
    let started = Instant::now();
    let shown = shown(command);
    say(&format!("{what} …"));
    let (reader, writer) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = die_with_us(command).spawn().with_context(|| format!("cannot run {shown}"))?;
    // The command holds the pipe's writing end; while it does, the pipe never ends.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let progress = Arc::new(Mutex::new(Progress::default()));
    let collector = {
        let progress = progress.clone();
        thread::spawn(move || collect(reader, &progress, counts))
    };
    let terminal = std::io::stderr().is_terminal();
    let id = child.id();
    let mut last = Instant::now();
    let mut late = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > limit && !late {
            late = true;
            child.kill()?;
        }
        thread::sleep(Duration::from_millis(20));
        if last.elapsed() > if terminal { Duration::from_secs(1) } else { INTERVAL } {
            last = Instant::now();
            let count = progress.lock().map(|progress| progress.count).unwrap_or_default();
            show(id, what, started.elapsed(), count, total, terminal);
        }
    };
    let _ = collector.join();
    running().remove(&id);
    if terminal {
        eprint!("{CLEAR}");
    }
    let mut progress = progress.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut lines = std::mem::take(&mut progress.lines);
    if late {
        lines.push(format!("it still ran after {}, and was killed", time(limit)));
    }
    Ok(Outcome { lines, success: status.success(), elapsed: started.elapsed() })
}

/// A duration for people: `3.2 s`, `4 min 05 s`.
pub fn time(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 {
        return format!("{:.1} s", duration.as_secs_f64());
    }
    format!("{} min {:02} s", seconds / 60, seconds % 60)
}

#[derive(Default)]
struct Progress {
    count: usize,
    lines: Vec<String>,
}

fn collect(from: impl Read, progress: &Mutex<Progress>, counts: impl Fn(&str) -> bool) {
    for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        let mut progress = progress.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        progress.count += usize::from(counts(&line));
        progress.lines.push(line);
    }
}

fn running() -> MutexGuard<'static, BTreeMap<u32, String>> {
    RUNNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn show(id: u32, what: &str, elapsed: Duration, count: usize, total: usize, terminal: bool) {
    let part = match (count, total) {
        (0, 0) => String::new(),
        (count, 0) => format!(", {count} so far"),
        (count, total) => format!(", {count} of about {total}"),
    };
    let own = format!("{what}: {}{part}", time(elapsed));
    let mut running = running();
    running.insert(id, own.clone());
    let all = running.values().cloned().collect::<Vec<_>>().join("; ");
    let mut stderr = std::io::stderr().lock();
    let _ = match terminal {
        true => write!(stderr, "{CLEAR}xtask: {all}"),
        false => writeln!(stderr, "xtask: {own}"),
    };
    let _ = stderr.flush();
}

fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    let text = words.join(" ");
    if text.chars().count() > 200 {
        return text.chars().take(200).chain(['…']).collect();
    }
    text
}

fn indent<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    lines.map(|line| format!("  | {line}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_show_what_was_printed() {
        let error = run("trying", Command::new("sh").args(["-c", "echo why >&2; exit 3"]));
        let text = error.unwrap_err().to_string();
        assert!(text.contains("  | why") && text.contains("trying failed"), "{text}");
        assert!(output(&mut Command::new("/does/not/exist")).is_err());
    }

    #[test]
    fn what_runs_longer_than_its_limit_is_killed() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo begun; exec sleep 600"]);
        let limit = Duration::from_millis(300);
        let outcome = watch_for("waiting", &mut command, |_| false, 0, limit).unwrap();
        assert!(!outcome.success && outcome.elapsed < Duration::from_secs(60));
        assert_eq!(outcome.lines, ["begun", "it still ran after 0.3 s, and was killed"]);
    }

    #[test]
    fn output_is_returned() {
        assert_eq!(output(Command::new("echo").arg("x")).unwrap(), "x\n");
    }

    #[test]
    fn durations_read_well() {
        assert_eq!(time(Duration::from_millis(3210)), "3.2 s");
        assert_eq!(time(Duration::from_secs(245)), "4 min 05 s");
    }
}
