//! What ran in which rig, and what came of it: programs down, rigs across.

use std::fmt;

use super::results::Count;
use crate::step::{self, Outcome};

/// The table; empty if nothing ran in a rig.
#[derive(Debug, Default)]
pub struct Table {
    programs: Vec<String>,
    rigs: Vec<String>,
    /// By program and rig; the last one counts.
    cells: Vec<(usize, usize, String)>,
    reasons: Vec<String>,
}

impl Table {
    /// A program ran.
    pub fn ran(&mut self, program: &str, rig: &str, count: Count, outcome: &Outcome) {
        let Count { passed, failed } = count;
        let mut words = vec![format!("{passed} passed")];
        words.extend((failed > 0).then(|| format!("{failed} FAILED")));
        // Some test that has no result ended it.
        words.extend((!outcome.success && failed == 0).then(|| "not to its END".to_owned()));
        words.push(step::time(outcome.elapsed));
        self.put(program, rig, words.join(", "));
    }

    /// A rig can't run a program.
    pub fn left_out(&mut self, program: &str, rig: &str, why: &str) {
        self.put(program, rig, "not run".to_owned());
        self.without(program, rig, why);
    }

    /// A rig can't run a test, or a program.
    pub fn without(&mut self, what: &str, rig: &str, why: &str) {
        self.reasons.push(format!("{what} is not run on {rig}: {why}"));
    }

    fn put(&mut self, program: &str, rig: &str, cell: String) {
        let place = |names: &mut Vec<String>, name: &str| {
            names.iter().position(|known| known == name).unwrap_or_else(|| {
                names.push(name.to_owned());
                names.len() - 1
            })
        };
        let (row, column) = (place(&mut self.programs, program), place(&mut self.rigs, rig));
        self.cells.push((row, column, cell));
    }

    fn cell(&self, row: usize, column: usize) -> &str {
        let cell = self.cells.iter().rfind(|(r, c, _)| (*r, *c) == (row, column));
        cell.map_or("", |(_, _, text)| text)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if self.cells.is_empty() {
            return Ok(());
        }
        let first = self.programs.iter().map(String::len).max().unwrap_or_default();
        let width = |(column, rig): (usize, &String)| {
            let cells = (0..self.programs.len()).map(|row| self.cell(row, column).len());
            cells.chain([rig.len()]).max().unwrap_or_default()
        };
        let widths: Vec<usize> = self.rigs.iter().enumerate().map(width).collect();
        let mut line = |name: &str, cells: Vec<&str>| {
            let cells = cells.iter().zip(&widths).map(|(cell, width)| format!("  {cell:<width$}"));
            let line = format!("  {name:<first$}{}", cells.collect::<String>());
            writeln!(f, "{}", line.trim_end())
        };
        line("", self.rigs.iter().map(String::as_str).collect())?;
        for (row, program) in self.programs.iter().enumerate() {
            line(program, (0..self.rigs.len()).map(|column| self.cell(row, column)).collect())?;
        }
        self.reasons.iter().try_for_each(|reason| writeln!(f, "  {reason}"))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn programs_are_rows_and_rigs_are_columns() {
        let outcome =
            |success| Outcome { lines: Vec::new(), success, elapsed: Duration::from_millis(1500) };
        let count = |passed, failed| Count { passed, failed };
        let mut table = Table::default();
        assert_eq!(table.to_string(), "");
        table.ran("a", "SVM", count(2, 0), &outcome(true));
        table.ran("long", "SVM", count(2, 1), &outcome(false));
        table.ran("a", "VMX", count(1, 0), &outcome(false));
        table.left_out("long", "VMX", "it is long");
        let expected = "
                SVM                        VMX
  a     2 passed, 1.5 s            1 passed, not to its END, 1.5 s
  long  2 passed, 1 FAILED, 1.5 s  not run
  long is not run on VMX: it is long
";
        let lines = |text: &str| text.lines().map(|l| l.trim().to_owned()).collect::<Vec<_>>();
        assert_eq!(lines(&table.to_string()), lines(expected.trim_start_matches('\n')));
    }
}
