//! The undisturbed move, and what a cut or a kill at each of its points leads to.

use std::fmt::Write;

use crate::explore::explore;
use crate::world::{Kind, RULES, Store, World};

/// Steps of the undisturbed move, in an order it can have, and the point behind each.
const MOVE: [(&str, &str); 15] = [
    ("source: frozen, dumped, fenced", "the source is frozen"),
    ("source: drained", ""),
    ("source: sends Dumped", "`Dumped` is on its way"),
    ("destination: receives Dumped", "`Dumped` has arrived"),
    ("destination: restored", "restored, held"),
    ("destination: hook done, sends Prepared", "`Prepared` is on its way"),
    ("source: receives Prepared", "fence checked, `Commit` is on its way"),
    ("destination: receives Commit", "`Commit` has arrived"),
    ("destination: the tasks run", "`Running` is on its way"),
    ("source: receives Running", "`Running` has arrived"),
    ("source: lets go of the tasks", "the source's tasks are killed, pages are in pipes"),
    ("pages arrive and are acknowledged", "the last page is here, its `Ack` is on its way"),
    ("source: every page acknowledged", "the last `Ack` has arrived"),
    ("destination: sends Complete", "`Complete` is on its way"),
    ("source: receives Complete", "`Complete` has arrived, `Released` is on its way"),
];

/// Who runs after a cut, and after each program is killed, at every point.
pub(crate) fn table() -> String {
    let mut table = String::from(
        "| when | everything is cut, and can be dialled again | everything is cut for good | `source-server` is killed | \
         `uffd-daemon` is killed |\n|---|---|---|---|---|\n",
    );
    let mut world = World::new(Store::Pipes);
    row(&mut table, "lanes are open, nothing is frozen", &world);
    for (what, point) in MOVE {
        let step =
            world.steps(RULES).into_iter().find(|step| step.what == what && step.kind == Kind::Progress);
        world = step.unwrap_or_else(|| panic!("{what:?} cannot happen in {world:#?}")).next;
        if !point.is_empty() {
            row(&mut table, point, &world);
        }
    }
    table
}

fn row(table: &mut String, point: &str, world: &World) {
    let cells = [World::cut_everything, World::cut_for_good, World::kill_source, World::kill_destination]
        .map(|fault| {
            let mut world = world.clone();
            fault(&mut world);
            let explored = explore(world, RULES, false);
            assert!(explored.violation.is_none(), "{:#?}", explored.violation);
            explored.outcomes.into_keys().collect::<Vec<_>>().join("; or ")
        });
    let _ = writeln!(table, "| {point} | {} |", cells.join(" | "));
}
