//! `firn logs`: what a function says, through the daemon's API of CloudWatch Logs.

use std::{
    collections::HashMap,
    io::{self, Write},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;
use serde_json::json;
use time::{OffsetDateTime, macros::format_description};

use crate::endpoint::Endpoint;

/// Time between two looks for what is new.
const STEP: Duration = Duration::from_secs(1);

/// Lines of one instance may be seen this much later than those of another one, in milliseconds.
const LATE_MS: i64 = 5000;

/// Most bytes of an answer; the daemon's pages are some MiB.
const ANSWER: u64 = 64 << 20;

/// Show what a function says
///
/// Requests are not signed: with a daemon that checks signatures (--identity), use `aws logs tail`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The function
    name: String,
    /// Go on with what is new, until interrupted
    #[arg(short, long)]
    follow: bool,
    /// How far to look back, such as 30s, 10m, 2h or 1d
    #[arg(long, default_value = "10m", value_parser = span, value_name = "TIME")]
    since: Duration,
    /// Events to show: `"a text" -without ?either ?or`, or `{ $.member = "text*" }` of JSON events
    #[arg(long, default_value = "", value_name = "PATTERN")]
    filter: String,
    #[command(flatten)]
    endpoint: Endpoint,
}

/// Why there are no logs.
#[derive(Debug, thiserror::Error)]
pub enum LogsError {
    /// The daemon can't be reached, or broke off.
    #[error(
        "no answer from {endpoint}: {source}; is firnd running there? --endpoint names another one"
    )]
    Daemon {
        /// Where it should be.
        endpoint: String,
        /// Why.
        source: Box<ureq::Error>,
    },
    /// It says no.
    #[error("{0}")]
    Refused(String),
    /// What was found can't be shown.
    #[error("can't write: {0}")]
    Write(#[from] io::Error),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Page {
    #[serde(default)]
    events: Vec<Event>,
    next_token: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    event_id: String,
    timestamp: i64,
    message: String,
}

#[derive(Debug, Default, Deserialize)]
struct Refusal {
    message: Option<String>,
}

/// A number and its unit.
fn span(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(text.len() - text.chars().last().map_or(0, char::len_utf8));
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err("a time is a number and one of s, m, h, d, such as 10m".into()),
    };
    let number: u32 = number.parse().map_err(|_| format!("{number:?} is no number"))?;
    Ok(Duration::from_secs(u64::from(number) * seconds))
}

/// Shows a function's log.
///
/// # Errors
/// Any [`LogsError`]; a closed pipe is none.
pub fn run(arguments: &Arguments) -> Result<(), LogsError> {
    match show(arguments, &mut io::stdout().lock()) {
        Err(LogsError::Write(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

fn show(arguments: &Arguments, out: &mut impl Write) -> Result<(), LogsError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut start = now.saturating_sub(arguments.since).as_millis() as i64;
    // Events that were shown and may be found again, by id, and their times.
    let mut shown: HashMap<String, i64> = HashMap::new();
    loop {
        let mut token = None;
        let mut last = start;
        loop {
            let page = filter(arguments, start, token.as_deref())?;
            for event in page.events {
                last = last.max(event.timestamp);
                if shown.insert(event.event_id, event.timestamp).is_none() {
                    print(out, event.timestamp, &event.message)?;
                }
            }
            token = page.next_token;
            if token.is_none() {
                break;
            }
        }
        out.flush()?;
        if !arguments.follow {
            return Ok(());
        }
        start = start.max(last - LATE_MS);
        shown.retain(|_, at| *at >= start);
        thread::sleep(STEP);
    }
}

fn print(out: &mut impl Write, timestamp_ms: i64, message: &str) -> io::Result<()> {
    let format =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(timestamp_ms) * 1_000_000);
    let at = at.ok().and_then(|at| at.format(format).ok()).unwrap_or_default();
    // What a function prints must not steer the terminal.
    let plain = |c: char| if c.is_control() && !"\n\t".contains(c) { '\u{fffd}' } else { c };
    let message: String = message.trim_end().chars().map(plain).collect();
    writeln!(out, "{at} {message}")
}

fn filter(arguments: &Arguments, start: i64, token: Option<&str>) -> Result<Page, LogsError> {
    let Arguments { name, filter, endpoint: Endpoint { url: endpoint }, .. } = arguments;
    let mut input = json!({
        "logGroupName": format!("/aws/lambda/{name}"), "startTime": start, "filterPattern": filter,
    });
    if let Some(token) = token {
        input["nextToken"] = token.into();
    }
    let failed =
        |source| LogsError::Daemon { endpoint: endpoint.clone(), source: Box::new(source) };
    let mut answer = ureq::post(endpoint)
        .config()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(60)))
        .build()
        .header("content-type", "application/x-amz-json-1.1")
        .header("x-amz-target", "Logs_20140328.FilterLogEvents")
        .send(input.to_string())
        .map_err(failed)?;
    let status = answer.status();
    let body = answer.body_mut().with_config().limit(ANSWER).read_to_vec().map_err(failed)?;
    if !status.is_success() {
        let refusal: Refusal = serde_json::from_slice(&body).unwrap_or_default();
        let message = refusal.message.unwrap_or_else(|| format!("the daemon answers {status}"));
        return Err(LogsError::Refused(match message.as_str() {
            "The specified log group does not exist." => {
                format!("there is no log of a function {name:?}: was it ever invoked?")
            }
            _ => message,
        }));
    }
    serde_json::from_slice(&body)
        .map_err(|error| LogsError::Refused(format!("the daemon's answer does not read: {error}")))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Read},
        net::TcpListener,
    };

    use super::*;

    fn arguments(endpoint: String) -> Arguments {
        let since = Duration::from_secs(60);
        Arguments {
            name: "f".into(),
            follow: false,
            since,
            filter: "x".into(),
            endpoint: Endpoint { url: endpoint },
        }
    }

    /// Answers one request after the other with these, and gives the bodies that came.
    fn daemon(
        answers: Vec<(&'static str, String)>,
    ) -> (String, thread::JoinHandle<Vec<serde_json::Value>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = thread::spawn(move || {
            let serve = |(status, answer): (&str, String)| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut length = 0;
                loop {
                    let mut line = String::new();
                    reader.read_line(&mut line).unwrap();
                    let line = line.trim().to_lowercase();
                    if let Some(value) = line.strip_prefix("content-length: ") {
                        length = value.parse().unwrap();
                    }
                    if line.is_empty() {
                        break;
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let size = answer.len();
                let head = format!("HTTP/1.1 {status}\r\nContent-Length: {size}\r\n");
                write!(stream, "{head}Connection: close\r\n\r\n{answer}").unwrap();
                serde_json::from_slice(&body).unwrap()
            };
            answers.into_iter().map(serve).collect()
        });
        (url, serving)
    }

    #[test]
    fn all_pages_are_shown_once_and_harmless() {
        let event = |id: &str, text: &str| json!({"eventId": id, "timestamp": 1_767_225_600_123_i64, "message": text});
        let first =
            json!({"events": [event("1", "a\n"), event("2", "\u{1b}[2Jb\n")], "nextToken": "t"});
        let second = json!({"events": [event("2", "again"), event("3", "c")]});
        let (url, serving) =
            daemon(vec![("200 OK", first.to_string()), ("200 OK", second.to_string())]);
        let mut out = Vec::new();
        show(&arguments(url), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let at = "2026-01-01T00:00:00.123Z";
        assert_eq!(text, format!("{at} a\n{at} \u{fffd}[2Jb\n{at} c\n"));
        let asked = serving.join().unwrap();
        assert_eq!(asked[0]["logGroupName"], "/aws/lambda/f");
        assert_eq!((&asked[0]["filterPattern"], asked[0].get("nextToken")), (&json!("x"), None));
        assert_eq!(asked[1]["nextToken"], "t");
    }

    #[test]
    fn refusals_and_silence_are_explained() {
        let gone = json!({"__type": "X", "message": "The specified log group does not exist."});
        let (url, serving) = daemon(vec![("400 Bad Request", gone.to_string())]);
        let error = show(&arguments(url.clone()), &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("no log of a function \"f\""), "{error}");
        serving.join().unwrap();
        let error = show(&arguments(url), &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("is firnd running"), "{error}");
    }

    #[test]
    fn spans_are_numbers_with_a_unit() {
        assert_eq!(span("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(span("2h"), Ok(Duration::from_secs(7200)));
        for wrong in ["", "10", "m", "-1m", "1w", "1ä", "99999999999s"] {
            assert!(span(wrong).is_err(), "{wrong}");
        }
    }
}
