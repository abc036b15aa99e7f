//! `runs.csv`: the columns before `run` say the case, those behind it are numbers.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, ensure};

use super::Row;

/// The column between the case and the numbers.
const RUN: &str = "run";

/// A table of runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Columns that say the case.
    pub case_columns: Vec<String>,
    /// Columns of numbers.
    pub number_columns: Vec<String>,
    /// The runs, in the order in which they were made.
    pub rows: Vec<Record>,
}

/// One run of a table.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// A value per case column.
    pub case: Vec<String>,
    /// Which run of the case, from 1.
    pub run: usize,
    /// A value per number column, where there is one.
    pub numbers: Vec<Option<f64>>,
}

/// The runs of one case.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    table: &'a Table,
    /// The case: a value per case column.
    pub case: &'a [String],
    /// Its runs.
    pub rows: Vec<&'a Record>,
}

/// The middle of some numbers and the ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one, the lower one of two.
    pub middle: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Table {
    /// An empty table with the columns of `row`.
    #[must_use]
    pub fn with_columns_of(row: &Row) -> Self {
        let names = |names: &mut dyn Iterator<Item = &'static str>| names.map(str::to_owned).collect();
        Self {
            case_columns: names(&mut row.case.iter().map(|(name, _)| *name)),
            number_columns: names(&mut row.numbers.iter().map(|(name, _)| *name)),
            rows: Vec::new(),
        }
    }

    /// Adds a run. Numbers keep as many digits as the file does.
    ///
    /// # Errors
    /// If its columns are not those of the table.
    pub fn push(&mut self, row: &Row) -> anyhow::Result<()> {
        let expected = Self::with_columns_of(row);
        ensure!(
            expected.case_columns == self.case_columns && expected.number_columns == self.number_columns,
            "{:?} is not a row of the table of {:?}, {:?}",
            row,
            self.case_columns,
            self.number_columns
        );
        self.rows.push(Record {
            case: row.case.iter().map(|(_, value)| value.replace([',', '\n', '"'], " ")).collect(),
            run: row.run,
            numbers: row.numbers.iter().map(|(_, value)| value.and_then(rounded)).collect(),
        });
        Ok(())
    }

    /// The first line of the file.
    #[must_use]
    pub fn header(&self) -> String {
        let run = RUN.to_owned();
        let columns: Vec<&str> =
            self.case_columns.iter().chain([&run]).chain(&self.number_columns).map(String::as_str).collect();
        columns.join(",")
    }

    /// Reads a file. A last line without its end, of a run that was cut short, is left out.
    ///
    /// # Errors
    /// If it is no table of runs.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {path:?}"))?;
        Self::parse(&text).with_context(|| format!("understanding {path:?}"))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let mut lines = whole.lines();
        let columns: Vec<String> = lines.next().unwrap_or_default().split(',').map(str::to_owned).collect();
        let run = columns.iter().position(|column| column == RUN).context("there is no column `run`")?;
        let mut table = Self {
            case_columns: columns[..run].to_vec(),
            number_columns: columns[run + 1..].to_vec(),
            rows: Vec::new(),
        };
        for line in lines {
            let values: Vec<&str> = line.split(',').collect();
            ensure!(values.len() == columns.len(), "{line:?} has not the columns of the first line");
            let number = |text: &&str| {
                let text = text.trim();
                if text.is_empty() { Ok(None) } else { text.parse().map(Some) }
            };
            table.rows.push(Record {
                case: values[..run].iter().map(|&value| value.to_owned()).collect(),
                run: values[run].parse().with_context(|| format!("the run of {line:?}"))?,
                numbers: values[run + 1..]
                    .iter()
                    .map(number)
                    .collect::<Result<_, _>>()
                    .with_context(|| format!("the numbers of {line:?}"))?,
            });
        }
        Ok(table)
    }

    /// The runs by case, in the order in which the cases were first seen.
    #[must_use]
    pub fn groups(&self) -> Vec<Group<'_>> {
        let mut groups: Vec<Group<'_>> = Vec::new();
        for row in &self.rows {
            match groups.iter_mut().find(|group| group.case == row.case) {
                Some(group) => group.rows.push(row),
                None => groups.push(Group { table: self, case: &row.case, rows: vec![row] }),
            }
        }
        groups
    }

    /// The place of a case column.
    #[must_use]
    pub fn case_column(&self, name: &str) -> Option<usize> {
        self.case_columns.iter().position(|column| column == name)
    }
}

impl Record {
    /// Its line in the file.
    #[must_use]
    pub fn csv(&self) -> String {
        let mut line = self.case.join(",");
        let _ = write!(line, ",{}", self.run); // into a String
        for number in &self.numbers {
            let _ = write!(line, ",{}", number.map(|number| number.to_string()).unwrap_or_default());
        }
        line
    }
}

impl Group<'_> {
    /// The value of the case in a column; empty if there is no such column.
    #[must_use]
    pub fn value(&self, column: &str) -> &str {
        self.table.case_column(column).map_or("", |at| &self.case[at])
    }

    /// The values of a column of numbers, in the order of the runs.
    #[must_use]
    pub fn numbers(&self, column: &str) -> Vec<f64> {
        let at = self.table.number_columns.iter().position(|name| name == column);
        at.map_or_else(Vec::new, |at| self.rows.iter().filter_map(|row| row.numbers[at]).collect())
    }

    /// The middle and the ends of a column.
    #[must_use]
    pub fn spread(&self, column: &str) -> Option<Spread> {
        Spread::of(self.numbers(column))
    }
}

impl Spread {
    /// That of `values`, if there are any.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let middle = values.len().checked_sub(1)? / 2;
        Some(Self { middle: values[middle], least: values[0], most: values[values.len() - 1] })
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { middle, least, most } = *self;
        if least.total_cmp(&most).is_eq() {
            return f.write_str(&number(middle));
        }
        write!(f, "{} ({} - {})", number(middle), number(least), number(most))
    }
}

/// A number for a table that people read: three digits or so.
#[must_use]
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size < 1.0 => format!("{value:.3}"),
        size if size < 10.0 => format!("{value:.2}"),
        size if size < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// To the thousandth, which is less than the noise of anything measured here; nothing for what is no number.
fn rounded(value: f64) -> Option<f64> {
    value.is_finite().then(|| (value * 1000.0).round() / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "mover,load,run,p50_us,rate\na,x,1,3,1.5\nb,x,1,30,\na,x,2,1,2\na,x,3,2,4\na,x,4,9";

    #[test]
    fn runs_of_a_case_are_found_and_a_line_cut_short_is_not_one() {
        let table = Table::parse(TEXT).unwrap();
        let groups = table.groups();
        assert_eq!(groups.len(), 2);
        assert_eq!((groups[0].value("mover"), groups[0].rows.len()), ("a", 3));
        assert_eq!(groups[0].spread("p50_us"), Some(Spread { middle: 2.0, least: 1.0, most: 3.0 }));
        assert_eq!(groups[1].spread("rate"), None);
        assert_eq!(groups[1].spread("none"), None);
    }

    #[test]
    fn what_is_no_table_of_runs_is_refused() {
        for bad in ["", "a,b\n1,2\n", "a,run,b\nx,1\n", "a,run,b\nx,one,2\n", "a,run,b\nx,1,two\n"] {
            assert!(Table::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_middle_and_the_ends() {
        let spread = |middle, least, most| Some(Spread { middle, least, most });
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), spread(2.0, 1.0, 3.0));
        assert_eq!(Spread::of(vec![4.0, 1.0]), spread(1.0, 1.0, 4.0));
        assert_eq!(Spread::of(vec![]), None);
        assert_eq!(spread(12.34, 1.234, 123.4).unwrap().to_string(), "12.3 (1.23 - 123)");
    }
}
