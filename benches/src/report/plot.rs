//! Plots as SVG text: distributions and stacked phases.

use std::fmt::Write as _;

use super::number;
use crate::{record::Sample, stats};

/// Colours of subjects: told apart also by people who see few colours (Okabe and Ito).
const SUBJECTS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

/// Text that is safe between tags and in attributes.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
        .replace('\'', "&#39;")
}

/// The colour of the subject that is `index`th on the page.
pub fn subject_colour(index: usize) -> &'static str {
    SUBJECTS[index % SUBJECTS.len()]
}

/// The colour of the `index`th phase of a bar: neighbours differ in hue and lightness.
pub fn phase_colour(index: usize) -> String {
    let hue = (index * 137) % 360;
    let lightness = if index.is_multiple_of(2) { 45 } else { 65 };
    format!("hsl({hue} 55% {lightness}%)")
}

const WIDTH: f64 = 640.0;
const LEFT: f64 = 44.0;
const RIGHT: f64 = 16.0;

/// Cumulative distributions, one line a subject; values in microseconds.
pub fn distribution(series: &[(usize, Vec<f64>)]) -> String {
    const HEIGHT: f64 = 240.0;
    const TOP: f64 = 10.0;
    const BOTTOM: f64 = 36.0;
    let all = || series.iter().flat_map(|(_, values)| values.iter().copied());
    let (low, high) = all().fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return String::new();
    }
    // Room at both ends, so that a line that only rises once is seen.
    let margin = ((high - low) * 0.05).max(high * 0.005).max(1e-9);
    let (low, high) = ((low - margin).max(0.0), high + margin);
    let x = |value: f64| LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT);
    let y = |share: f64| TOP + (1.0 - share) * (HEIGHT - TOP - BOTTOM);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"cumulative distribution\">\n"
    );
    for share in [0.0, 0.5, 0.9, 1.0] {
        let (at, right) = (y(share), WIDTH - RIGHT);
        let _ = writeln!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{right}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{share}</text>",
            LEFT - 6.0,
            at + 4.0
        );
    }
    for tick in ticks(low, high) {
        let at = x(tick);
        let _ = writeln!(
            svg,
            "<path class=\"grid\" d=\"M{at:.1} {TOP}V{:.1}\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            y(0.0),
            y(0.0) + 16.0,
            number(tick)
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">µs</text>",
        WIDTH - RIGHT,
        HEIGHT - 4.0
    );
    for (subject, values) in series {
        let values = stats::sorted(values);
        let mut path = format!("M{:.1} {:.1}", x(low), y(0.0));
        for (index, value) in values.iter().enumerate() {
            let share = (index + 1) as f64 / values.len() as f64;
            let _ = write!(path, "H{:.1}V{:.1}", x(*value), y(share));
        }
        let _ = write!(path, "H{:.1}", x(high));
        let colour = subject_colour(*subject);
        let _ = writeln!(
            svg,
            "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// Round values between the two, about five.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    if !rough.is_finite() || rough <= 0.0 {
        return Vec::new();
    }
    let size = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * size).find(|s| *s >= rough);
    let step = step.unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    (first..).map(|n| n as f64 * step).take_while(|tick| *tick <= high).take(12).collect()
}

/// The parts of a trip: name, start and end in microseconds. Each moment ends the part that bears
/// its name; what follows the last is the way back.
pub fn parts(sample: &Sample) -> Vec<(String, f64, f64)> {
    let total = sample.figures.get("total_us").copied().unwrap_or_default();
    let mut parts = Vec::new();
    let mut since = 0.0;
    for (name, at) in &sample.phases {
        let at = at.clamp(since, total.max(since));
        parts.push((name.clone(), since, at));
        since = at;
    }
    parts.push(("response out".to_owned(), since, total.max(since)));
    parts
}

/// One bar a subject, of the parts of its sample; all to one scale.
pub fn bars(samples: &[(&str, &Sample)], colour_of: impl Fn(&str) -> String) -> String {
    const BAR: f64 = 26.0;
    const STEP: f64 = 46.0;
    let longest = samples
        .iter()
        .filter_map(|(_, sample)| sample.figures.get("total_us").copied())
        .fold(0.0, f64::max);
    if longest <= 0.0 {
        return String::new();
    }
    let height = STEP * samples.len() as f64 + 4.0;
    let scale = (WIDTH - RIGHT) / longest;
    let mut svg =
        format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"phases\">\n");
    for (row, (subject, sample)) in samples.iter().enumerate() {
        let top = STEP * row as f64 + 16.0;
        let total = sample.figures.get("total_us").copied().unwrap_or_default();
        let _ = writeln!(
            svg,
            "<text x=\"0\" y=\"{:.1}\">{}: {} µs</text>",
            top - 4.0,
            escape(subject),
            number(total)
        );
        for (name, from, to) in parts(sample) {
            let _ = writeln!(
                svg,
                "<rect x=\"{:.2}\" y=\"{top:.1}\" width=\"{:.2}\" height=\"{BAR}\" fill=\"{}\">\
                 <title>{}: {} µs</title></rect>",
                from * scale,
                (to - from) * scale,
                colour_of(&name),
                escape(&name),
                number(to - from)
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(phases: &[(&str, f64)], total: f64) -> Sample {
        Sample {
            phases: phases.iter().map(|(n, at)| ((*n).to_owned(), *at)).collect(),
            figures: [("total_us".to_owned(), total)].into(),
            ..Sample::default()
        }
    }

    #[test]
    fn parts_follow_each_other_and_make_the_whole() {
        let parts = parts(&sample(&[("sent", 1.0), ("entered", 4.0)], 9.0));
        let expected = [("sent", 0.0, 1.0), ("entered", 1.0, 4.0), ("response out", 4.0, 9.0)];
        let expected: Vec<_> = expected.map(|(n, from, to)| (n.to_owned(), from, to)).into();
        assert_eq!(parts, expected);
    }

    #[test]
    fn ticks_are_round_and_within() {
        assert_eq!(ticks(0.0, 50.0), [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]);
        assert_eq!(ticks(33.1, 34.2), [33.5, 34.0]);
        assert!(ticks(1.0, 1.0).is_empty());
    }

    #[test]
    fn a_bar_is_as_long_as_its_trip() {
        let (fast, slow) = (sample(&[("sent", 1.0)], 10.0), sample(&[], 100.0));
        let svg = bars(&[("firn", &fast), ("<peer>", &slow)], |_| "red".into());
        assert!(svg.contains("&lt;peer&gt;: 100 µs"), "{svg}");
        // 624 points are 100 µs: 6.24 for the first µs, 56.16 for the other nine.
        assert!(svg.contains("width=\"6.24\"") && svg.contains("width=\"56.16\""), "{svg}");
        assert_eq!(svg.matches("<rect").count(), 3);
    }

    proptest! {
        #[test]
        fn lines_stay_within_the_plot(values in proptest::collection::vec(0.0f64..1e9, 1..50)) {
            let svg = distribution(&[(0, values)]);
            let path = svg.lines().find(|line| line.contains("stroke-width")).unwrap();
            let path = path.split('"').nth(1).unwrap();
            let spaced = path.replace(['M', 'H', 'V'], " ");
            for number in spaced.split_whitespace() {
                let number: f64 = number.parse().unwrap();
                prop_assert!((0.0..=WIDTH).contains(&number), "{}", number);
            }
        }
    }
}
