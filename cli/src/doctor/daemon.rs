//! What a daemon that runs has counted.

use std::time::Duration;

use super::{Finding, Severity};

/// Most bytes of an answer: a thousand functions have some hundred KiB of metrics.
const ANSWER: u64 = 4 << 20;

/// How long a daemon may take.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Looks at the daemon there, if there is one.
pub fn examine(endpoint: &str) -> Vec<Finding> {
    metrics(endpoint).and_then(|metrics| restores_refused(&metrics)).into_iter().collect()
}

/// Its metrics; `None` where nothing answers, or something else, or where they take a signature.
fn metrics(endpoint: &str) -> Option<String> {
    let request = ureq::get(format!("{}/metrics", endpoint.trim_end_matches('/')));
    let request = request.config().timeout_global(Some(TIMEOUT)).build();
    let mut answer = request.call().ok()?;
    answer.body_mut().with_config().limit(ANSWER).read_to_string().ok()
}

fn restores_refused(metrics: &str) -> Option<Finding> {
    let id = "daemon.restores-refused";
    let why = "KVM refused a part of their state. Others served the requests, later.";
    let mut values =
        metrics.lines().filter_map(|line| line.strip_prefix("firn_restores_refused_total "));
    let count: u64 = values.next()?.trim().parse().ok()?;
    if count == 0 {
        let what = "the daemon restored all snapshots and instances";
        return Some(Finding::new(id, Severity::Ok, what, why));
    }
    let what = format!(
        "{count} snapshots or instances could not be restored; the daemon's log names vCPU, ioctl and \
         MSR"
    );
    let fix = "Delete snapshots that another CPU or kernel made. For others: send the lines of the \
               daemon's log, with what `firn doctor --run --json` prints.";
    Some(Finding::new(id, Severity::Warning, what, why).fix(fix))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::TcpListener,
        thread,
        time::Instant,
    };

    use super::*;

    /// Answers one request with that.
    fn daemon(status: &'static str, body: String) -> (String, thread::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let serving = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                head.push(byte[0]);
            }
            assert!(head.starts_with(b"GET /metrics "), "{}", String::from_utf8_lossy(&head));
            let length = body.len();
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n");
            // One that has read enough closes.
            let _ = write!(stream, "{head}Connection: close\r\n\r\n{body}");
        });
        (url, serving)
    }

    #[test]
    fn restores_that_were_refused_are_a_warning() {
        let found =
            |count| restores_refused(&format!("# x\nfirn_restores_refused_total {count}\n"));
        assert_eq!(found("0").unwrap().severity, Severity::Ok);
        let refused = found("3").unwrap();
        assert_eq!(refused.severity, Severity::Warning);
        assert!(refused.what.starts_with("3 snapshots"), "{}", refused.what);
        assert_eq!(found("x"), None);
        assert_eq!(restores_refused("up 1\n"), None);
    }

    #[test]
    fn a_daemon_is_asked_and_its_absence_is_no_finding() {
        let (url, serving) = daemon("200 OK", "firn_restores_refused_total 2\n# EOF\n".into());
        assert_eq!(examine(&url)[0].severity, Severity::Warning);
        serving.join().unwrap();
        assert_eq!(examine(&url), []);
        assert_eq!(examine("nonsense"), []);
        let (url, serving) = daemon("403 Forbidden", "firn_restores_refused_total 2\n".into());
        assert_eq!(examine(&url), []);
        serving.join().unwrap();
    }

    #[test]
    fn an_answer_is_bounded_in_size_and_time() {
        let endless = "x\n".repeat(ANSWER as usize) + "firn_restores_refused_total 2\n";
        let (url, serving) = daemon("200 OK", endless);
        assert_eq!(examine(&url), []);
        serving.join().unwrap();
        // It accepts, and says nothing.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let begun = Instant::now();
        assert_eq!(examine(&format!("http://{}", silent.local_addr().unwrap())), []);
        assert!(begun.elapsed() < 10 * TIMEOUT, "{:?}", begun.elapsed());
    }
}
