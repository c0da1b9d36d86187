//! Takes paths out of texts, for a report that is sent.

use std::path::PathBuf;

/// What stands for a path.
const STAND_IN: &str = "<path>";

/// Below these, paths name nothing but parts of the kernel …
const KERNEL: [&str; 3] = ["/proc/", "/sys/", "/dev/"];

/// … but for these: what lies there is named by users.
const NAMED: [&str; 3] = ["/sys/fs/cgroup/", "/dev/mapper/", "/dev/shm/"];

/// Takes paths out of texts.
pub struct Scrub {
    /// Directories that may have any characters in their names, the longest first.
    known: Vec<String>,
}

impl Scrub {
    /// These directories are known, by all their names.
    pub fn new(known: impl IntoIterator<Item = PathBuf>) -> Self {
        let names = |path: PathBuf| {
            let absolute = std::path::absolute(&path).ok();
            [path.canonicalize().ok(), absolute].into_iter().flatten()
        };
        let known = known.into_iter().flat_map(names);
        let mut known: Vec<_> = known.map(|path| path.to_string_lossy().into_owned()).collect();
        known.retain(|path| path.len() > 1);
        known.sort_by_key(|path| std::cmp::Reverse(path.len()));
        Self { known }
    }

    /// The text with a stand-in for each path.
    pub fn text(&self, text: &str) -> String {
        // The rest of such a path is found as a path below one with a plain name.
        let known = |text: String, path: &String| text.replace(path, "/known");
        let text = self.known.iter().fold(text.to_owned(), known);
        let (mut scrubbed, mut rest, mut before) = (String::new(), text.as_str(), ' ');
        while let Some(next) = rest.chars().next() {
            let length = match begins_path(before) && next == '/' {
                true => path_length(rest, before),
                false => 0,
            };
            let (path, behind) = rest.split_at(length.max(next.len_utf8()));
            let kept = length < 2 || is_kernels(path);
            scrubbed.push_str(if kept { path } else { STAND_IN });
            before = path.chars().next_back().unwrap_or(next);
            rest = behind;
        }
        scrubbed
    }
}

/// Whether a path may follow this character.
fn begins_path(before: char) -> bool {
    before.is_whitespace() || "\"'`(<[{=:,".contains(before)
}

/// Length of the path that a text begins with: up to the quote that it stands in, else up to what ends a word.
fn path_length(text: &str, before: char) -> usize {
    let quote = text.find(before).filter(|_| "\"'`".contains(before));
    let ends = |c: char| c.is_whitespace() || "\"'`:,;)]}>".contains(c);
    let end = quote.or_else(|| text.find(ends)).unwrap_or(text.len());
    // The quote may be escaped.
    text[..end].trim_end_matches('\\').len()
}

fn is_kernels(path: &str) -> bool {
    let below = |directories: [&str; 3]| directories.iter().any(|d| path.starts_with(d));
    below(KERNEL) && !below(NAMED)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrubbed(text: &str) -> String {
        Scrub::new([]).text(text)
    }

    #[test]
    fn paths_are_taken_out_wherever_they_stand() {
        for (text, expected) in [
            ("/home/ann/firn: no such file", "<path>: no such file"),
            ("cannot open /home/ann/x", "cannot open <path>"),
            ("\"/home/ann/my files/x\" and '/srv/y'", "\"<path>\" and '<path>'"),
            ("one \"/home/ann, of two", "one \"<path>, of two"),
            ("(/a/b), /c/d: [/e] {at: `/f`}", "(<path>), <path>: [<path>] {at: `<path>`}"),
            ("file=/a/b:/c/d", "file=<path>:<path>"),
            ("Error(\"open \\\"/home/ann/x\\\"\")", "Error(\"open \\\"<path>\\\"\")"),
        ] {
            assert_eq!(scrubbed(text), expected, "{text}");
        }
    }

    #[test]
    fn what_names_nobody_stays() {
        for text in [
            "",
            "/",
            "3 MiB/s, and/or a / b",
            "Mitigation: Enhanced / Automatic IBRS",
            "/proc/sys/kernel/osrelease, \"/sys/module/kvm\" and /dev/kvm: no such file",
            "at /sys/fs/cgroup",
            "naïve – text",
        ] {
            assert_eq!(scrubbed(text), text);
        }
        assert_eq!(scrubbed("/sys/fs/cgroup/ann.slice/x"), "<path>");
        assert_eq!(scrubbed("/procedures/ann"), "<path>");
    }

    #[test]
    fn a_known_directory_may_have_any_name() {
        let directory = tempfile::Builder::new().prefix("ann: her, own ").tempdir().unwrap();
        let below = directory.path().join("firn-doctor-x/state");
        let text = format!("open {}: denied", below.display());
        let scrub = Scrub::new([directory.path().to_owned()]);
        assert_eq!(scrub.text(&text), "open <path>: denied");
    }
}
