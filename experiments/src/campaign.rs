//! Many runs of several cases, interleaved, tried again, cut short.
//!
//! Run 1 of every case comes before run 2 of any: the speed of a machine drifts, and what is cut short has every
//! case that was reached equally often. Cases of one group take turns in who goes first. After each run the results
//! folder is complete; an interrupt lets the run in hand end and then stops.

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;

use host::interrupt::Interrupt;

use crate::cli::Common;
use crate::page;
use crate::results::Results;
use crate::scenario::RunOptions;

/// Tries of a run: stock CRIU hangs now and then, and one process in some hundred is copied as a whole.
const TRIES: u32 = 3;
/// Cases in a row that failed every try: then it is not the case.
const FAILED_CASES_MAX: u32 = 3;

/// The runs of one experiment.
#[derive(Debug)]
pub struct Campaign {
    results: Results,
    interrupt: Interrupt,
    quiet: bool,
    only: Vec<String>,
    failed: u32,
    interrupted: bool,
}

impl Campaign {
    /// Makes the results folder of a scenario. `versions` are those of the programs measured.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn begin(
        scenario: &str,
        options: &RunOptions,
        common: &Common,
        versions: &[(&str, String)],
    ) -> anyhow::Result<Self> {
        Ok(Self {
            results: Results::create(&options.results_dir(scenario), scenario, versions)?,
            interrupt: Interrupt::install()?,
            quiet: common.quiet,
            only: options.only.clone(),
            failed: 0,
            interrupted: false,
        })
    }

    /// Measures every case `runs` times. `measure` gets the case and the number of the run, from 1; when it has
    /// everything it adds it to the results and says in a line what it was.
    ///
    /// A run that fails is tried again and noted; one that fails every time is left out.
    ///
    /// # Errors
    /// If nothing works any more, or the results cannot be written.
    pub fn measure<C: Display>(
        &mut self,
        groups: &[Vec<C>],
        runs: usize,
        mut measure: impl FnMut(&C, usize, &mut Results) -> anyhow::Result<String>,
    ) -> anyhow::Result<()> {
        let groups: Vec<Vec<&C>> = groups.iter().map(|group| self.wanted(group)).collect();
        let total = groups.iter().map(Vec::len).sum::<usize>() * runs;
        let (mut done, mut failed_in_a_row) = (0, 0);
        for run in 1..=runs {
            for group in &groups {
                let mut group = group.clone();
                if run % 2 == 0 {
                    group.reverse();
                }
                for case in group {
                    if self.stop_asked() {
                        return Ok(());
                    }
                    done += 1;
                    let tried = self.try_case(case, run, &mut measure)?;
                    failed_in_a_row = match tried {
                        Ok(words) => {
                            self.say(&format!("[{done}/{total}] {words}"));
                            0
                        }
                        Err(_) if self.stop_asked() => return Ok(()),
                        Err(error) if failed_in_a_row + 1 == FAILED_CASES_MAX => {
                            return Err(error.context(format!("{case} run {run}, after others failed too")));
                        }
                        Err(_) => failed_in_a_row + 1,
                    };
                    page::write(self.results.dir())?;
                }
            }
        }
        Ok(())
    }

    /// Those of the cases that were asked for.
    fn wanted<'a, C: Display>(&self, cases: &'a [C]) -> Vec<&'a C> {
        let wanted = |case: &&C| self.only.is_empty() || is_wanted(&case.to_string(), &self.only);
        cases.iter().filter(wanted).collect()
    }

    /// The inner result is that of the last try; the outer error is one of writing.
    fn try_case<C: Display>(
        &mut self,
        case: &C,
        run: usize,
        measure: &mut impl FnMut(&C, usize, &mut Results) -> anyhow::Result<String>,
    ) -> anyhow::Result<anyhow::Result<String>> {
        let mut tries = 0;
        loop {
            tries += 1;
            let error = match measure(case, run, &mut self.results) {
                Ok(words) => return Ok(Ok(words)),
                Err(error) => error,
            };
            if self.stop_asked() {
                return Ok(Err(error));
            }
            let line = format!("{case} run {run}, try {tries}: {error:#}").replace('\n', " | ");
            self.say(&line);
            self.results.failure(&line)?;
            if tries == TRIES {
                self.failed += 1;
                return Ok(Err(error));
            }
        }
    }

    fn stop_asked(&mut self) -> bool {
        self.interrupted |= self.interrupt.is_pending();
        self.interrupted
    }

    fn say(&self, text: &str) {
        if !self.quiet {
            println!("{text}");
        }
    }

    /// Writes what is left to write, prints the summary, and says how it went.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn end(mut self) -> anyhow::Result<ExitCode> {
        self.results.finish()?;
        println!("{}", page::write(self.results.dir())?);
        let folder: PathBuf = self.results.dir().to_owned();
        self.say(&format!("results are in {}", folder.display()));
        if self.interrupted {
            self.say("it was cut short: the results are those of the runs that were complete");
        }
        if self.failed > 0 {
            self.say(&format!("{} runs are missing because they failed every time", self.failed));
        }
        Ok(if self.failed > 0 || self.interrupted { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

/// Whether a case has every word of one of the filters in its name.
fn is_wanted(case: &str, only: &[String]) -> bool {
    only.iter().any(|filter| filter.split_whitespace().all(|word| case.contains(word)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Row;
    use anyhow::bail;

    fn campaign(dir: &tempfile::TempDir, only: &[&str]) -> Campaign {
        let options = RunOptions {
            results: Some(dir.path().join("results")),
            only: only.iter().map(|&filter| filter.to_owned()).collect(),
            ..RunOptions::default()
        };
        let common = Common { quiet: true, ..Common::default() };
        Campaign::begin("test", &options, &common, &[]).unwrap()
    }

    #[test]
    fn runs_are_interleaved_and_who_goes_first_alternates() {
        let dir = tempfile::tempdir().unwrap();
        let mut order = Vec::new();
        let mut campaign = campaign(&dir, &[]);
        campaign
            .measure(&[vec!["a", "b"], vec!["c"]], 2, |case, run, results| {
                order.push(format!("{case}{run}"));
                let mut row = Row::new(vec![("case", (*case).to_owned())], run);
                row.push("number", 1.0);
                results.add(&row)?;
                Ok(String::new())
            })
            .unwrap();
        assert_eq!(order, ["a1", "b1", "c1", "b2", "a2", "c2"]);
        assert_eq!(campaign.results.table().groups().len(), 3);
        assert_eq!(campaign.end().unwrap(), ExitCode::SUCCESS);
    }

    #[test]
    fn a_failing_run_is_tried_again_and_left_out_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut campaign = campaign(&dir, &[]);
        let mut calls = 0;
        let cases = [vec!["good", "flaky", "bad", "last"]];
        campaign
            .measure(&cases, 1, |case, _, _| {
                calls += 1;
                match *case {
                    "bad" => bail!("always"),
                    "flaky" if calls == 2 => bail!("once"),
                    _ => Ok(String::new()),
                }
            })
            .unwrap();
        assert_eq!(calls, 1 + 2 + 3 + 1);
        let failures = std::fs::read_to_string(dir.path().join("results/failures.txt")).unwrap();
        assert_eq!(failures.lines().count(), 4, "{failures}");
        assert_eq!(campaign.end().unwrap(), ExitCode::FAILURE);
    }

    #[test]
    fn when_nothing_works_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let mut calls = 0;
        let cases = [vec![1, 2, 3, 4, 5]];
        let result = campaign(&dir, &[]).measure(&cases, 1, |_, _, _| {
            calls += 1;
            bail!("broken")
        });
        assert!(result.is_err());
        assert_eq!(calls, 9);
    }

    #[test]
    fn cases_are_chosen_by_words_of_their_name() {
        let only = ["random read".to_owned(), "zipf".to_owned()];
        assert!(is_wanted("random, read, 1 thread", &only) && is_wanted("zipf, write", &only));
        assert!(!is_wanted("random, write", &only));
    }
}
