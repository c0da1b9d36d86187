//! Invocation traces in the row format that Microsoft published for Azure Functions in 2021:
//! `app,func,end_timestamp,duration`, seconds as decimal fractions.

use std::{collections::HashMap, fmt::Write as _};

use crate::error::{Error, Result};

/// First line of a trace.
const HEADER: &str = "app,func,end_timestamp,duration";

/// Longest invocation in seconds, as in Lambda.
pub const MAX_DURATION: f64 = 900.0;

/// Latest time in seconds: a thousand days.
const MAX_TIME: f64 = 86_400_000.0;

/// One invocation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    /// Number of its function: index into [`Trace::functions`].
    pub function: usize,
    /// When it was asked for, in seconds.
    pub start: f64,
    /// How long it took, in seconds.
    pub duration: f64,
}

/// A trace.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trace {
    /// Application and name of each function.
    pub functions: Vec<(String, String)>,
    /// Invocations in order of start.
    pub rows: Vec<Row>,
}

/// Reads a trace.
///
/// # Errors
/// [`Error::Results`] with the line that is wrong.
pub fn parse(file: &str, text: &str) -> Result<Trace> {
    let mut trace = Trace::default();
    let mut numbers: HashMap<(&str, &str), usize> = HashMap::new();
    for (index, line) in text.lines().enumerate() {
        let wrong =
            |reason: String| Error::Results { file: file.to_owned(), line: index + 1, reason };
        let line = line.trim();
        if index == 0 {
            if line != HEADER {
                return Err(wrong(format!("a trace begins with the line `{HEADER}`")));
            }
            continue;
        }
        if line.is_empty() {
            continue;
        }
        let fields: Vec<&str> = line.split(',').collect();
        let [app, func, end, duration] = fields[..] else {
            return Err(wrong(format!("{} fields instead of 4", fields.len())));
        };
        let number = |name: &str, text: &str, most: f64| match text.parse::<f64>() {
            Ok(value) if (0.0..=most).contains(&value) => Ok(value),
            Ok(value) => Err(wrong(format!("{name} {value} is not within 0 to {most} seconds"))),
            Err(_) => Err(wrong(format!("{name} {text:?} is no number"))),
        };
        let duration = number("duration", duration, MAX_DURATION)?;
        let start = (number("end_timestamp", end, MAX_TIME)? - duration).max(0.0);
        let function = *numbers.entry((app, func)).or_insert_with(|| {
            trace.functions.push((app.to_owned(), func.to_owned()));
            trace.functions.len() - 1
        });
        trace.rows.push(Row { function, start, duration });
    }
    trace.rows.sort_by(|a, b| a.start.total_cmp(&b.start));
    Ok(trace)
}

/// Writes a trace.
pub fn write(trace: &Trace) -> String {
    let mut rows = trace.rows.clone();
    // The published file is in order of end.
    rows.sort_by(|a, b| (a.start + a.duration).total_cmp(&(b.start + b.duration)));
    let mut text = format!("{HEADER}\n");
    for row in rows {
        let (app, func) = &trace.functions[row.function];
        let end = row.start + row.duration;
        let _ = writeln!(text, "{app},{func},{end:.6},{:.6}", row.duration);
    }
    text
}

impl Trace {
    /// What starts from `skip` on within `window` seconds, with time counted from there.
    pub fn window(mut self, skip: f64, window: Option<f64>) -> Self {
        let end = window.map_or(f64::INFINITY, |window| skip + window);
        self.rows.retain(|row| (skip..end).contains(&row.start));
        self.rows.iter_mut().for_each(|row| row.start -= skip);
        self
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn published_rows_are_read() {
        let text = "app,func,end_timestamp,duration\n\
                    a1,f1,12.5,2.5\n\
                    a1,f2,5.25,0.25\n\
                    a1,f1,30.0,0\n";
        let trace = parse("t", text).unwrap();
        assert_eq!(trace.functions.len(), 2);
        let starts: Vec<_> = trace.rows.iter().map(|row| (row.function, row.start)).collect();
        assert_eq!(starts, [(1, 5.0), (0, 10.0), (0, 30.0)]);
        let later = trace.window(8.0, Some(10.0));
        assert_eq!(later.rows, [Row { function: 0, start: 2.0, duration: 2.5 }]);
    }

    #[test]
    fn wrong_rows_are_refused_by_line() {
        let message =
            |rows: &str| parse("t", &format!("{HEADER}\n{rows}")).unwrap_err().to_string();
        assert!(message("a,b,1").starts_with("t, line 2: 3 fields"));
        assert!(message("a,b,x,1").contains("end_timestamp \"x\" is no number"));
        assert!(message("a,b,1,-1").contains("duration -1 is not within"));
        assert!(message("a,b,1,NaN").contains("duration NaN is not within"));
        assert!(message("a,b,inf,1").contains("end_timestamp inf"));
        assert!(parse("t", "1,2,3,4").is_err(), "no header");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            rows in proptest::collection::vec((0usize..4, 0u32..1_000_000, 0u32..900_000), 0..40),
        ) {
            let functions = (0..4).map(|n| (format!("a{}", n / 2), format!("f{n}"))).collect();
            let second = |ms: u32| f64::from(ms) / 1000.0;
            let rows = rows
                .into_iter()
                .map(|(function, start, duration)| Row {
                    function,
                    start: second(start),
                    duration: second(duration),
                })
                .collect();
            let trace = Trace { functions, rows };
            let again = parse("t", &write(&trace)).unwrap();
            prop_assert_eq!(again.rows.len(), trace.rows.len());
            let mut starts: Vec<f64> = trace.rows.iter().map(|row| row.start).collect();
            starts.sort_by(f64::total_cmp);
            for (found, expected) in again.rows.iter().zip(starts) {
                prop_assert!((found.start - expected).abs() < 1e-5);
            }
        }

        #[test]
        fn any_text_parses_or_fails(text in "\\PC{0,200}") {
            let _ = parse("t", &text);
            let _ = parse("t", &format!("{HEADER}\n{text}"));
        }
    }
}
