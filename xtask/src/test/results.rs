//! What the runners of tests print: results, how long each took, and why tests failed.

use std::collections::BTreeMap;
use std::time::Duration;

/// The result of one test.
#[derive(Debug, Clone, PartialEq)]
pub struct Test {
    /// As `--only` takes it.
    pub name: String,
    /// Whether it passed.
    pub passed: bool,
    /// What it took, with the fixtures that were made for it.
    pub time: Option<Duration>,
}

/// How many tests of a program passed, and how many failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    pub passed: usize,
    pub failed: usize,
}

impl Count {
    /// How many there were.
    pub fn all(self) -> usize {
        self.passed + self.failed
    }
}

/// Reads `test name ... ok <1.234s>` as libtest prints it, or `(1.23 s)` as this project's own harness does. A
/// doc test has no time. An ignored test is no result.
pub fn rust(line: &str) -> Option<Test> {
    let (name, result) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    let (verdict, time) = result.split_once(' ').unwrap_or((result, ""));
    let passed = match verdict {
        "ok" => true,
        "FAILED" => false,
        _ => return None,
    };
    let time = time.trim_matches(['<', '>', '(', ')']).trim_end_matches('s').trim().parse();
    let time = time.ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    Some(Test { name: name.to_owned(), passed, time })
}

/// Whether a line is the result of a Rust test.
pub fn is_rust(line: &str) -> bool {
    rust(line).is_some()
}

/// Reads `[gw1] [ 10%] PASSED file.py::test`: a line of one of pytest's workers. A skipped test or a known failure
/// is no result.
pub fn pytest(line: &str) -> Option<Test> {
    let (_, rest) = line.strip_prefix("[gw")?.split_once("%] ")?;
    let (verdict, name) = rest.split_once(' ')?;
    let passed = match verdict {
        "PASSED" => true,
        "FAILED" | "ERROR" | "XPASS" => false,
        _ => return None,
    };
    Some(Test { name: name.trim_end().to_owned(), passed, time: None })
}

/// All results of a run of pytest with `--durations=0`, which lists the times at its end.
pub fn all_of_pytest(lines: &[String]) -> Vec<Test> {
    let mut times: BTreeMap<&str, Duration> = BTreeMap::new();
    for (name, time) in lines.iter().filter_map(|line| pytest_time(line)) {
        *times.entry(name).or_default() += time;
    }
    let timed = |test: Test| Test { time: times.get(test.name.as_str()).copied(), ..test };
    lines.iter().filter_map(|line| pytest(line)).map(timed).collect()
}

/// Reads `1.23s call     file.py::test`; a test's set-up and teardown have such lines, too.
fn pytest_time(line: &str) -> Option<(&str, Duration)> {
    let (seconds, rest) = line.trim_start().split_once("s ")?;
    let (phase, name) = rest.split_once(' ')?;
    let known = ["setup", "call", "teardown"].contains(&phase);
    let time = Duration::try_from_secs_f64(seconds.parse().ok()?).ok()?;
    known.then_some((name.trim(), time))
}

/// The part of pytest's output that says why tests failed.
pub fn why_in_pytest(lines: &[String]) -> &[String] {
    let at =
        |title: &str| lines.iter().position(|line| line.starts_with('=') && line.contains(title));
    let from = at(" ERRORS ").into_iter().chain(at(" FAILURES ")).min().unwrap_or(0);
    let to = at(" slowest durations ").filter(|to| *to > from).unwrap_or(lines.len());
    &lines[from..to]
}

/// The lines that say why a Rust test failed: libtest's own section for it, else what was printed while it ran.
pub fn why_in_rust<'a>(lines: &'a [String], name: &str) -> &'a [String] {
    let section = format!("---- {name} stdout ----");
    if let Some(from) = lines.iter().position(|line| *line == section) {
        let ends = |line: &String| line.starts_with("---- ") || line == "failures:";
        let length = lines[from + 1..].iter().position(ends).unwrap_or(lines.len() - from - 1);
        return &lines[from..=from + length];
    }
    let is_its = |line: &String| rust(line).is_some_and(|test| test.name == name && !test.passed);
    let to = lines.iter().position(is_its).map_or(0, |at| at + 1);
    let before = lines[..to.saturating_sub(1)].iter().rposition(|line| rust(line).is_some());
    &lines[before.map_or(0, |at| at + 1)..to]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(name: &str, passed: bool, milliseconds: Option<u64>) -> Option<Test> {
        Some(Test { name: name.into(), passed, time: milliseconds.map(Duration::from_millis) })
    }

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn results_of_rust_are_read_as_the_harnesses_print_them() {
        assert_eq!(rust("test a::b ... ok"), test("a::b", true, None));
        assert_eq!(rust("test a::b ... ok <0.700s>"), test("a::b", true, Some(700)));
        assert_eq!(rust("test a::b ... FAILED <61.250s>"), test("a::b", false, Some(61_250)));
        assert_eq!(rust("test a::b ... FAILED (0.25 s)"), test("a::b", false, Some(250)));
        let doc = "src/lib.rs - f (line 3)";
        assert_eq!(rust(&format!("test {doc} ... ok")), test(doc, true, None));
        assert_eq!(rust("test a ... ignored, why"), None);
        assert_eq!(rust("test result: ok. 3 passed"), None);
    }

    #[test]
    fn results_of_pytest_are_read_with_their_times() {
        let output = lines(
            "[gw0] [  3%] PASSED t.py::test_a \n\
             [gw1] [  7%] FAILED t.py::test_b[x y] \n\
             [gw1] [ 10%] SKIPPED t.py::test_c \n\
             [gw0] [ 12%] ERROR t.py::test_d \n\
             FAILED t.py::test_b[x y] - assert 1 == 2\n\
             2.50s setup    t.py::test_a\n\
             10.25s call     t.py::test_a\n\
             1.00s call     t.py::test_b[x y]",
        );
        let expected = [
            test("t.py::test_a", true, Some(12_750)),
            test("t.py::test_b[x y]", false, Some(1000)),
            test("t.py::test_d", false, None),
        ];
        assert_eq!(all_of_pytest(&output), expected.map(Option::unwrap));
    }

    #[test]
    fn a_failure_of_libtest_has_a_section() {
        let output = lines(
            "test a ... FAILED <0.1s>\ntest b ... FAILED <0.1s>\n\nfailures:\n\n---- a stdout ----\nbecause\n\n\
             ---- b stdout ----\nother\n\nfailures:\n    a\n    b",
        );
        assert_eq!(why_in_rust(&output, "a"), ["---- a stdout ----", "because", ""]);
        assert_eq!(why_in_rust(&output, "b"), ["---- b stdout ----", "other", ""]);
    }

    #[test]
    fn a_failure_of_another_harness_is_what_was_printed_before_it() {
        let output =
            lines("test a ... ok (0.1 s)\nbecause\ntest b ... FAILED (0.1 s)\nfailed: [b]");
        assert_eq!(why_in_rust(&output, "b"), ["because", "test b ... FAILED (0.1 s)"]);
    }

    #[test]
    fn failures_of_pytest_are_without_the_times() {
        let output =
            lines("first\n==== FAILURES ====\nbecause\n==== slowest durations ====\n1s call x");
        assert_eq!(why_in_pytest(&output), ["==== FAILURES ====", "because"]);
    }
}
