//! What came of a run: results, times of the stages, the slowest tests.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::results::{self, Count, Test};
use super::rig::Verdict;
use super::table::Table;
use crate::step::{self, Outcome};

/// How many of the slowest tests are named.
const SLOWEST: usize = 10;

/// Lines of a program's output that are shown if it failed and does not say where.
const TAIL: usize = 400;

/// Collects what passed and what did not, and how long it took.
#[derive(Debug, Default)]
pub struct Summary {
    passed: usize,
    failed: Vec<String>,
    stages: Vec<(String, Duration)>,
    times: Vec<(Duration, String)>,
    rigs: Table,
}

impl Summary {
    /// Runs a part of the work, whose time appears under its name.
    pub fn stage<T>(&mut self, name: &str, work: impl FnOnce(&mut Self) -> T) -> T {
        let started = Instant::now();
        let result = work(self);
        self.time(name, started.elapsed());
        result
    }

    /// Notes the time of a part that ran beside others.
    pub fn time(&mut self, name: &str, time: Duration) {
        self.stages.push((name.to_owned(), time));
    }

    /// Counts a program as one test.
    pub fn check(&mut self, name: &str, outcome: &Outcome, hint: &str) {
        if outcome.success {
            self.passed += 1;
            return;
        }
        print_tail(name, &outcome.lines);
        self.failed.push(format!("{name} ({hint})"));
    }

    /// Counts a check that is no program; what could not even begin is a failure, too.
    pub fn must<T>(&mut self, name: &str, result: Result<T>) -> Option<T> {
        result
            .map_err(|error| {
                eprintln!("xtask: {name}: {error:#}");
                self.failed.push(name.to_owned());
            })
            .ok()
    }

    /// Counts one more success.
    pub fn pass(&mut self) {
        self.passed += 1;
    }

    /// A choice that fits no test is a failure.
    pub fn none(&mut self, choice: &str) {
        self.failed.push(format!("there is no test {choice}"));
    }

    /// Counts Rust tests and prints why some failed. They appear under what `name` makes of their names.
    pub fn rust(&mut self, what: &str, outcome: &Outcome, name: impl Fn(&str) -> String) -> Count {
        let tests: Vec<Test> =
            outcome.lines.iter().filter_map(|line| results::rust(line)).collect();
        let failed: Vec<&Test> = tests.iter().filter(|test| !test.passed).collect();
        for test in &failed {
            eprintln!("xtask: {} failed:", name(&test.name));
            print(results::why_in_rust(&outcome.lines, &test.name));
        }
        // A test that takes its process along has no result.
        let died: Vec<String> =
            outcome.lines.iter().filter(|l| l.contains("(signal: ")).cloned().collect();
        if !outcome.success && (failed.is_empty() || !died.is_empty()) {
            match died.as_slice() {
                [] => print_tail(what, &outcome.lines),
                died => print(died),
            }
            self.failed.push(format!("{what} (did not run to its end)"));
        }
        self.add(tests, name)
    }

    /// Counts the test programs that ran in a rig. Returns how many tests there were.
    pub fn programs(&mut self, rig: &str, verdicts: &[(&'static str, Verdict)]) -> usize {
        let mut tests = 0;
        for (program, verdict) in verdicts {
            let what = format!("{program}, {rig}");
            let (count, outcome) = match verdict {
                Verdict::Ran(outcome) => {
                    let name = |test: &str| format!("{program}::{test} ({rig})");
                    (self.rust(&what, outcome, name), outcome)
                }
                Verdict::Command(outcome) => {
                    self.check(&what, outcome, "its exit code is not 0");
                    let passed = usize::from(outcome.success);
                    (Count { passed, failed: 1 - passed }, outcome)
                }
                Verdict::LeftOut(why) => {
                    self.rigs.left_out(program, rig, why);
                    continue;
                }
                Verdict::Without(test, why) => {
                    self.rigs.without(&format!("{program}::{test}"), rig, why);
                    continue;
                }
            };
            tests += count.all();
            self.rigs.ran(program, rig, count, outcome);
        }
        tests
    }

    /// Counts tests of pytest and prints why some failed. Returns how many there were.
    pub fn pytest(&mut self, what: &str, prefix: &str, outcome: &Outcome) -> usize {
        let tests = results::all_of_pytest(&outcome.lines);
        if !outcome.success {
            eprintln!("xtask: {what} failed:");
            print(results::why_in_pytest(&outcome.lines));
            if tests.iter().all(|test| test.passed) {
                self.failed.push(format!("{what} (did not run to their end)"));
            }
        }
        self.add(tests, |name| format!("{prefix}{name}")).all()
    }

    fn add(&mut self, tests: Vec<Test>, name: impl Fn(&str) -> String) -> Count {
        let mut count = Count::default();
        for test in tests {
            match test.passed {
                true => count.passed += 1,
                false => count.failed += 1,
            }
            let name = name(&test.name);
            self.times.extend(test.time.map(|time| (time, name.clone())));
            match test.passed {
                true => self.passed += 1,
                false => self.failed.push(name),
            }
        }
        count
    }

    /// Prints it; the result is whether all passed.
    pub fn print(mut self, elapsed: Duration) -> bool {
        println!("time by stage; some run at the same time:");
        for (name, time) in &self.stages {
            println!("{:>14}  {name}", step::time(*time));
        }
        self.times.sort_by(|a, b| b.cmp(a));
        if !self.times.is_empty() {
            println!("the slowest tests:");
        }
        for (time, name) in self.times.iter().take(SLOWEST) {
            println!("{:>14}  {name}", step::time(*time));
        }
        print!("{}", self.rigs);
        for name in &self.failed {
            println!("FAILED  {name}");
        }
        let failed = self.failed.len();
        println!("{} passed, {failed} failed in {}", self.passed, step::time(elapsed));
        failed == 0
    }
}

fn print_tail(what: &str, lines: &[String]) {
    eprintln!("xtask: {what} failed:");
    print(&lines[lines.len().saturating_sub(TAIL)..]);
}

fn print(lines: &[String]) {
    for line in lines {
        eprintln!("  | {line}");
    }
}
