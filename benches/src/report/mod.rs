//! `firn bench report`: what a results file says, for programs (`summary.json`, CSV), for people
//! (`report.html`, one file, no network), and in short on standard output.

mod html;
mod plot;

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use crate::{
    error::{Result, io_at, io_with},
    summary::{Results, Row},
};

/// What to report, and where to.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Results files of `firn bench run`; several are taken together.
    #[arg(required = true)]
    results: Vec<PathBuf>,

    /// Directory for summary.json, summary.csv, samples.csv and report.html.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Reports.
///
/// # Errors
/// Whatever is wrong with the files.
pub fn run(options: &Options) -> Result<()> {
    let results = Results::read(&options.results)?;
    let rows = results.rows();
    std::fs::create_dir_all(&options.out).map_err(io_with(&options.out))?;
    let summary = serde_json::to_string_pretty(&rows).map_err(|e| io_at("summarise")(e.into()))?;
    write(&options.out.join("summary.json"), &summary)?;
    write(&options.out.join("summary.csv"), &summary_csv(&rows))?;
    write(&options.out.join("samples.csv"), &samples_csv(&results))?;
    write(&options.out.join("report.html"), &html::page(&results, &rows))?;
    print!("{}", table(&rows));
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(io_with(path))
}

/// A field of a CSV file (RFC 4180).
fn field(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        return format!("\"{}\"", text.replace('"', "\"\""));
    }
    text.to_owned()
}

/// One line a figure of a sample.
fn samples_csv(results: &Results) -> String {
    let mut csv = "subject,scenario,function,round,start_ns,figure,value\n".to_owned();
    for sample in &results.samples {
        let head = [&sample.subject, &sample.scenario, &sample.function].map(|text| field(text));
        let phases = sample.phases.iter().map(|(name, value)| (format!("@{name}"), *value));
        let figures = sample.figures.iter().map(|(name, value)| (name.clone(), *value));
        for (name, value) in figures.chain(phases) {
            let (head, name) = (head.join(","), field(&name));
            let _ = writeln!(csv, "{head},{},{},{name},{value}", sample.round, sample.start_ns);
        }
    }
    csv
}

fn summary_csv(rows: &[Row]) -> String {
    let mut csv = "subject,scenario,function,figure,samples,seeds,min,p50,p50_low,p50_high,\
                   interval_by,p90,p99,p99.9,max\n"
        .to_owned();
    let shown = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
    for row in rows {
        let key = &row.key;
        let fields = [
            field(&key.subject),
            field(&key.scenario),
            field(&key.function),
            field(&key.figure),
            row.samples.to_string(),
            row.seeds.map_or(String::new(), |seeds| seeds.to_string()),
            row.min.to_string(),
            row.p50.to_string(),
            shown(row.p50_interval.map(|[low, _]| low)),
            shown(row.p50_interval.map(|[_, high]| high)),
            row.interval_by.unwrap_or_default().to_owned(),
            shown(row.p90),
            shown(row.p99),
            shown(row.p999),
            row.max.to_string(),
        ];
        csv.push_str(&fields.join(","));
        csv.push('\n');
    }
    csv
}

/// Totals of every scenario, in columns.
fn table(rows: &[Row]) -> String {
    let mut lines = vec![
        [
            "subject",
            "scenario",
            "function",
            "samples",
            "p50 µs",
            "95 % interval",
            "p90 µs",
            "p99 µs",
        ]
        .map(str::to_owned),
    ];
    for row in rows.iter().filter(|row| row.key.figure == "total_us") {
        let interval = match row.p50_interval {
            Some([low, high]) => format!("{} – {}", number(low), number(high)),
            None => String::new(),
        };
        lines.push([
            row.key.subject.clone(),
            row.key.scenario.clone(),
            row.key.function.clone(),
            row.samples.to_string(),
            number(row.p50),
            interval,
            row.p90.map_or(String::new(), number),
            row.p99.map_or(String::new(), number),
        ]);
    }
    columns(&lines, 3)
}

/// Lays out cells in columns; those from `numbers` on are aligned to the right.
pub(crate) fn columns<const N: usize>(lines: &[[String; N]], numbers: usize) -> String {
    let width = |column: usize| {
        lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default()
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for line in lines {
        let mut laid = String::new();
        for (column, (cell, width)) in line.iter().zip(widths).enumerate() {
            let _ = match column < numbers {
                true => write!(laid, "{cell:<width$}  "),
                false => write!(laid, "{cell:>width$}  "),
            };
        }
        text.push_str(laid.trim_end());
        text.push('\n');
    }
    text
}

/// A number for people: four significant digits or so.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 || value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 100.0 => format!("{value:.1}"),
        size if size >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::summary::tests::results;

    #[test]
    fn fields_are_quoted_where_they_must_be() {
        assert_eq!(field("plain"), "plain");
        assert_eq!(field("a,\"b\""), "\"a,\"\"b\"\"\"");
    }

    #[test]
    fn csv_has_every_figure_of_every_sample() {
        let results = results(&[("firn", "thaw", None, 8.0), ("peer", "thaw", None, 80.0)]);
        let csv = samples_csv(&results);
        assert_eq!(csv.lines().count(), 1 + 2 * 3);
        assert!(csv.contains("firn,thaw,nothing,0,1,total_us,8\n"));
        assert!(csv.contains("peer,thaw,nothing,0,1,@entered,20\n"));
        let summary = summary_csv(&results.rows());
        let columns = summary.lines().next().unwrap().split(',').count();
        assert!(summary.lines().all(|line| line.split(',').count() == columns), "{summary}");
    }

    #[test]
    fn files_are_written_and_totals_shown() {
        let directory = tempfile::tempdir().unwrap();
        let results = results(&[("firn", "thaw", None, 1234.5)]);
        let text = table(&results.rows());
        assert!(text.lines().nth(1).unwrap().contains("1234"), "{text}");
        let file = directory.path().join("results.jsonl");
        let manifest = crate::record::Record::Manifest(results.manifests[0].clone().into());
        let sample = crate::record::Record::Sample(results.samples[0].clone());
        let lines = [manifest, sample].map(|r| serde_json::to_string(&r).unwrap()).join("\n");
        std::fs::write(&file, lines).unwrap();
        let out = directory.path().join("out");
        run(&Options { results: vec![file], out: out.clone() }).unwrap();
        for name in ["summary.json", "summary.csv", "samples.csv", "report.html"] {
            assert!(std::fs::metadata(out.join(name)).unwrap().len() > 0, "{name}");
        }
    }

    #[test]
    fn numbers_read_well() {
        let shown = [0.12346, 12.346, 123.46, 1234.4, 7.0].map(number);
        assert_eq!(shown, ["0.123", "12.35", "123.5", "1234", "7"]);
    }
}
