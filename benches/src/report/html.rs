//! The report for people: one page without anything from elsewhere.

use std::fmt::Write as _;

use super::{
    number,
    plot::{self, escape},
};
use crate::{
    record::Sample,
    summary::{Results, Row},
};

const STYLE: &str = "\
:root{color-scheme:light dark;--soft:#8886}\
body{font:15px/1.45 system-ui,sans-serif;max-width:46em;margin:2em auto;padding:0 1em}\
h1{font-size:1.6em}h2{margin-top:2.4em;border-top:1px solid var(--soft);padding-top:.8em}\
table{border-collapse:collapse;font-size:.87em;margin:.8em 0}\
td,th{padding:.15em .7em .15em 0;text-align:right;font-variant-numeric:tabular-nums}\
td:first-child,th:first-child,td.t,th.t{text-align:left}\
tr+tr td{border-top:1px solid var(--soft)}\
svg{width:100%;height:auto;display:block;margin:.6em 0}\
svg text{font:12px system-ui,sans-serif;fill:currentColor}\
svg .grid{stroke:var(--soft);fill:none}\
i.c{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.35em}\
pre{overflow-x:auto;font-size:.8em}";

/// The whole page.
pub fn page(results: &Results, rows: &[Row]) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>firn bench</title><style>{STYLE}</style>\n<h1>firn bench</h1>\n"
    );
    head(&mut page, results);
    let subjects = subjects(results);
    for (scenario, function) in results.scenarios() {
        section(&mut page, results, rows, &subjects, (scenario, function));
    }
    page.push_str("<h2>Manifests</h2>\n");
    for manifest in &results.manifests {
        let text = serde_json::to_string_pretty(manifest).unwrap_or_default();
        let _ = writeln!(
            page,
            "<details><summary>{}</summary><pre>{}</pre></details>",
            escape(&manifest.rig),
            escape(&text)
        );
    }
    page.push_str("</html>\n");
    page
}

fn head(page: &mut String, results: &Results) {
    let Some(first) = results.manifests.first() else { return };
    let kernel = first.host["kernel"].as_str().unwrap_or_default();
    let kernel: Vec<&str> = kernel.split(' ').take(3).collect();
    let _ = writeln!(
        page,
        "<p>{} {} on: {}. {}. Page cache: {}.{}</p>",
        results.manifests.len(),
        if results.manifests.len() == 1 { "run" } else { "runs" },
        escape(&first.rig),
        escape(&kernel.join(" ")),
        escape(&first.page_cache),
        if first.traced { " Traced: times are too long." } else { "" },
    );
    if first.virtual_time {
        page.push_str(
            "<p>Time is <strong>virtual</strong>: one instruction is one nanosecond. It repeats, \
             knows neither caches nor the cost of an exit, and is to be compared with itself only. \
             Intervals are over seeds.</p>\n",
        );
    }
}

fn subjects(results: &Results) -> Vec<String> {
    let mut subjects: Vec<String> = Vec::new();
    for sample in &results.samples {
        if !subjects.contains(&sample.subject) {
            subjects.push(sample.subject.clone());
        }
    }
    subjects
}

fn section(
    page: &mut String,
    results: &Results,
    rows: &[Row],
    subjects: &[String],
    (scenario, function): (&str, &str),
) {
    let _ = write!(page, "<h2>{}", escape(scenario));
    if !function.is_empty() {
        let _ = write!(page, " <small>{}</small>", escape(function));
    }
    page.push_str("</h2>\n");
    let by_subject = results.by_subject(scenario, function);
    let place = |subject: &str| subjects.iter().position(|s| s == subject).unwrap_or_default();
    if by_subject.len() > 1 {
        page.push_str("<p>");
        for (subject, _) in &by_subject {
            let colour = plot::subject_colour(place(subject));
            let _ = write!(page, "{} &ensp;", legend(colour, subject));
        }
        page.push_str("</p>\n");
    }
    let totals: Vec<(usize, Vec<f64>)> = by_subject
        .iter()
        .map(|(subject, samples)| (place(subject), totals(samples)))
        .filter(|(_, totals)| totals.len() > 1)
        .collect();
    page.push_str(&plot::distribution(&totals));
    phases(page, &by_subject);
    figures(page, rows, (scenario, function));
}

fn legend(colour: &str, text: &str) -> String {
    format!("<i class=\"c\" style=\"background:{colour}\"></i>{}", escape(text))
}

/// What is drawn of a sample: its whole time, or without the time that it was asked to take.
fn totals(samples: &[&Sample]) -> Vec<f64> {
    let drawn = |sample: &&Sample| {
        let figures = &sample.figures;
        figures.get("overhead_us").or_else(|| figures.get("total_us")).copied()
    };
    samples.iter().filter_map(drawn).collect()
}

/// The sample in the middle by its total: unlike medians of phases, its parts make its whole.
fn middle<'a>(samples: &[&'a Sample]) -> Option<&'a Sample> {
    let total = |sample: &Sample| sample.figures.get("total_us").copied().unwrap_or_default();
    let mut sorted = samples.to_vec();
    sorted.sort_by(|a, b| total(a).total_cmp(&total(b)));
    sorted.get((sorted.len().max(1) - 1) / 2).copied()
}

fn phases(page: &mut String, by_subject: &[(&str, Vec<&Sample>)]) {
    let middles: Vec<(&str, &Sample)> = by_subject
        .iter()
        .filter_map(|(subject, samples)| Some((*subject, middle(samples)?)))
        .filter(|(_, sample)| !sample.phases.is_empty())
        .collect();
    if middles.is_empty() {
        return;
    }
    let mut names: Vec<String> = Vec::new();
    for (_, sample) in &middles {
        for (name, ..) in plot::parts(sample) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    let colour =
        |name: &str| plot::phase_colour(names.iter().position(|n| n == name).unwrap_or_default());
    page.push_str(&plot::bars(&middles, colour));
    page.push_str("<table><tr><th>phase of the median sample, µs</th>");
    for (subject, _) in &middles {
        let _ = write!(page, "<th>{}</th>", escape(subject));
    }
    page.push_str("</tr>\n");
    for name in &names {
        let _ = write!(page, "<tr><td>{}</td>", legend(&colour(name), name));
        for (_, sample) in &middles {
            let part = plot::parts(sample).into_iter().find(|(part, ..)| part == name);
            let shown = part.map_or(String::new(), |(_, from, to)| number(to - from));
            let _ = write!(page, "<td>{shown}</td>");
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table>\n");
}

fn figures(page: &mut String, rows: &[Row], (scenario, function): (&str, &str)) {
    page.push_str(
        "<details><summary>All figures</summary><table><tr><th>figure</th><th class=\"t\">subject\
         </th><th>n</th><th>p50</th><th>95 % interval</th><th>p90</th><th>p99</th><th>p99.9</th>\
         </tr>\n",
    );
    let mut shown: Vec<&Row> = rows
        .iter()
        .filter(|row| row.key.scenario == scenario && row.key.function == function)
        .collect();
    shown.sort_by_key(|row| (&row.key.figure, &row.key.subject));
    for row in shown {
        let interval = match row.p50_interval {
            Some([low, high]) => format!("{} – {}", number(low), number(high)),
            None => String::new(),
        };
        let optional = |value: Option<f64>| value.map_or(String::new(), number);
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td class=\"t\">{}</td><td>{}</td><td>{}</td><td>{interval}</td>\
             <td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&row.key.figure),
            escape(&row.key.subject),
            row.samples,
            number(row.p50),
            optional(row.p90),
            optional(row.p99),
            optional(row.p999),
        );
    }
    page.push_str("</table></details>\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::summary::tests::results;

    #[test]
    fn the_page_is_whole_and_needs_nothing_from_elsewhere() {
        let results = results(&[
            ("firn", "thaw", Some(1), 8.0),
            ("firn", "thaw", Some(2), 9.0),
            ("a<b", "thaw", Some(1), 80.0),
            ("a<b", "thaw", Some(2), 90.0),
        ]);
        let page = page(&results, &results.rows());
        for outside in ["http:", "https:", "src=", "<link", "<script", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(page.contains("test &lt;rig&gt;") && page.contains("a&lt;b"));
        assert!(!page.contains("a<b"));
        assert!(page.contains("<strong>virtual</strong>"));
        assert_eq!(page.matches("<svg").count(), 2, "one distribution, one set of bars");
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert_eq!(page.matches("<table").count(), page.matches("</table>").count());
        // Two subjects with three parts each.
        assert_eq!(page.matches("<rect").count(), 6);
    }

    #[test]
    fn the_middle_sample_is_the_median() {
        let results = results(&[
            ("firn", "thaw", None, 9.0),
            ("firn", "thaw", None, 1.0),
            ("firn", "thaw", None, 5.0),
        ]);
        let (_, samples) = &results.by_subject("thaw", "nothing")[0];
        assert_eq!(middle(samples).unwrap().figures["total_us"], 5.0);
        assert!(middle(&[]).is_none());
    }
}
