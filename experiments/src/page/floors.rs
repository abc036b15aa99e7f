//! Results as ratios to what this machine can do at best, where a `floors` folder lies beside the results.

use std::fmt::Write as _;

use super::cell;
use crate::floors::{END_TO_END, END_TO_END_WITH_PUSH, FREE, NAME, RECEIVE_AND_INSTALL, TOGETHER};
use crate::results::{Folder, Group, Table};

/// What a machine can do at best, as `experiments run floors` found it.
#[derive(Clone, Debug)]
pub struct Floors(Table);

impl Floors {
    /// Those in the folder `floors` beside a results folder, if it is there.
    #[must_use]
    pub fn beside(folder: &Folder) -> Option<Self> {
        let dir = std::path::absolute(&folder.dir).ok()?.parent()?.join(NAME);
        Folder::open(&dir).ok().map(|folder| Self(folder.table))
    }

    /// The median of a column of one floor.
    #[must_use]
    pub fn get(&self, what: &str, placement: &str, column: &str) -> Option<f64> {
        let groups = self.0.groups();
        let group = super::find(&groups, &[("what", what), ("placement", placement)])?;
        group.spread(column).map(|spread| spread.middle)
    }

    /// GiB/s that can be received and installed on the cores at hand.
    #[must_use]
    pub fn receive_and_install(&self) -> Option<f64> {
        let groups = self.0.groups();
        let rates = groups.iter().filter(|group| group.value("what") == RECEIVE_AND_INSTALL);
        rates.filter_map(|group| Some(group.spread("gib_per_s")?.middle)).max_by(f64::total_cmp)
    }
}

/// A table of the cases of a folder as multiples of the floors; a sentence if there are none.
///
/// # Errors
/// None: for `?` in a page.
pub fn against_floors(folder: &Folder) -> anyhow::Result<String> {
    let Some(floors) = Floors::beside(folder) else {
        return Ok(format!(
            "\nThere is no folder `{NAME}` beside this one: after `experiments run {NAME}`, `experiments report` \
             shows these results as ratios to what the machine can do at best.\n"
        ));
    };
    let mut text = String::from(
        "\n## Against this machine's floors\n\n\
         The floor of a fault is one that goes from a touch over TCP loopback to a page in the server's memory and \
         back, in one process, with nothing in between; with the whole path on one core, and where the scheduler \
         puts it. With a push, that of the same while another connection pushes at its full rate. The floor of the \
         throughput is receive and install on the cores at hand, source and destination sharing them.\n\n",
    );
    let mut head = folder.table.case_columns.clone();
    let ratios = ["p50 / one core", "p50 / scheduler", "p99 / one core", "p99 / scheduler", "GiB/s / floor"];
    head.extend(ratios.map(str::to_owned));
    let _ = writeln!(text, "| {} |\n|{}", head.join(" | "), "---|".repeat(head.len())); // into a String
    for group in folder.table.groups() {
        let cells: Vec<String> =
            group.case.iter().cloned().chain(ratios_of(&group, &floors).map(cell)).collect();
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    Ok(text)
}

fn ratios_of(group: &Group<'_>, floors: &Floors) -> [Option<f64>; 5] {
    let floor = if group.value("push") == "off" { END_TO_END } else { END_TO_END_WITH_PUSH };
    let latency = |column: &str, placement: &str| {
        Some(
            group.spread(column)?.middle
                / floors.get(floor, placement, column).filter(|floor| *floor > 0.0)?,
        )
    };
    // Without a push nothing runs at the rate of a push.
    let rate = (group.value("push") != "off").then(|| {
        Some(group.spread("gib_per_s")?.middle / floors.receive_and_install().filter(|rate| *rate > 0.0)?)
    });
    [
        latency("p50_us", TOGETHER),
        latency("p50_us", FREE),
        latency("p99_us", TOGETHER),
        latency("p99_us", FREE),
        rate.flatten(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Results, Row};

    fn add(results: &mut Results, case: [(&'static str, &str); 2], p50: Option<f64>, rate: f64) {
        let mut row = Row::new(case.map(|(column, value)| (column, value.to_owned())).to_vec(), 1);
        row.push("p50_us", p50);
        row.push("gib_per_s", rate);
        results.add(&row).unwrap();
    }

    #[test]
    fn results_are_multiples_of_the_floors_beside_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = Results::create(&dir.path().join("fault-latency"), "fault-latency", &[]).unwrap();
        add(&mut results, [("pattern", "random"), ("push", "off")], Some(60.0), 0.1);
        add(&mut results, [("pattern", "random"), ("push", "unlimited")], Some(90.0), 1.5);
        let folder = Folder::open(results.dir()).unwrap();
        assert!(against_floors(&folder).unwrap().contains("no folder `floors`"));
        let mut floors = Results::create(&dir.path().join(NAME), NAME, &[]).unwrap();
        let mut floor = |what, placement, p50, rate| {
            add(&mut floors, [("what", what), ("placement", placement)], p50, rate);
        };
        floor(END_TO_END, TOGETHER, Some(20.0), 0.0);
        floor(END_TO_END, FREE, Some(40.0), 0.0);
        floor(END_TO_END_WITH_PUSH, TOGETHER, Some(30.0), 0.0);
        floor(RECEIVE_AND_INSTALL, "1 thread", None, 2.0);
        floor(RECEIVE_AND_INSTALL, "2 threads", None, 3.0);
        let text = against_floors(&folder).unwrap();
        assert!(text.contains("| random | off | 3.00 | 1.50 |  |  |  |"), "{text}");
        assert!(text.contains("| random | unlimited | 3.00 |  |  |  | 0.500 |"), "{text}");
    }
}
