//! Every world that can be reached, breadth first: the first violation found is one of the shortest.

use std::collections::{BTreeMap, HashSet};

use crate::world::{Acks, Kind, Rules, Step, Tasks, World};
use protocol::wire::switchover::{destination, source};

/// Bound of an exploration: a mistake in the model shall not fill the memory.
const WORLDS_MAX: usize = 2_000_000;

const NOT_ALLOWED: &str = "in no allowed state";

/// What is wrong with a world that may never be.
pub(crate) fn violation(world: &World) -> Option<&'static str> {
    let runs = |tasks| tasks == Tasks::Running;
    if runs(world.source_tasks) && runs(world.destination_tasks) {
        return Some("two copies run");
    }
    if world.promised && runs(world.source_tasks) && !world.clean && !world.denies {
        return Some("the source runs behind Commit although the destination has not said that it is clean");
    }
    if world.denies && runs(world.destination_tasks) {
        return Some("a daemon says that nothing has run, and it runs");
    }
    if world.clean && world.destination_tasks != Tasks::Gone {
        return Some("the destination says that it is clean and is not");
    }
    if world.freed && world.acks != Acks::Arrived {
        return Some("the source frees what was not acknowledged");
    }
    let let_go = world.destination == Some(destination::State::Ended(destination::Ending::Release));
    if let_go && !world.here {
        return Some("the destination lets go of a tree that misses pages: they would read as zero");
    }
    if world.source_tasks == Tasks::Gone && !runs(world.destination_tasks) {
        return Some("no copy of the process is left");
    }
    let kept = world.here || world.source_tasks != Tasks::Gone || world.in_pipes;
    if !kept {
        return Some("pages that have not arrived are lost");
    }
    None
}

/// How a world without open decisions has ended, in words.
pub(crate) fn outcome(world: &World) -> Option<String> {
    let source = match world.source {
        None => "killed",
        Some(source::State::Ended(source::Ending::LetRun)) => "rolled back",
        Some(source::State::Ended(source::Ending::Hold)) => "paused",
        Some(source::State::Ended(source::Ending::Release)) => "released",
        Some(_) => return None,
    };
    let destination = match world.destination {
        None if matches!(world.destination_tasks, Tasks::Held | Tasks::Absent) => return None,
        None => "killed",
        Some(destination::State::Ended(destination::Ending::TearDown)) => "rolled back",
        Some(destination::State::Ended(destination::Ending::Release)) => "released",
        Some(destination::State::Ended(_)) => "paused",
        Some(_) => return None,
    };
    let who = match (world.source_tasks, world.destination_tasks) {
        (Tasks::Running, Tasks::Gone) => "runs at the source",
        (Tasks::Stopped, Tasks::Gone) => "stopped at the source",
        (Tasks::Stopped | Tasks::Gone, Tasks::Running) if world.here => "runs at the destination",
        (Tasks::Stopped, Tasks::Running) => "waits at the destination",
        (Tasks::Gone, Tasks::Running) if world.in_pipes => "waits at the destination",
        _ => NOT_ALLOWED,
    };
    Some(format!("{source}, {destination}: {who}"))
}

/// What an exploration has seen.
pub(crate) struct Explored {
    pub(crate) worlds: usize,
    /// How often each outcome ends an exploration.
    pub(crate) outcomes: BTreeMap<String, usize>,
    /// What is wrong, and the shortest way there.
    pub(crate) violation: Option<(String, Vec<String>)>,
}

/// Explores from `start`; without `faults` only what happens by itself, and time limits where nothing does.
pub(crate) fn explore(start: World, rules: Rules, faults: bool) -> Explored {
    let mut seen = HashSet::from([start.clone()]);
    let mut worlds = vec![start];
    let mut came_by: Vec<(usize, String)> = vec![(0, String::new())];
    let mut outcomes = BTreeMap::new();
    let mut at = 0;
    while at < worlds.len() {
        let world = worlds[at].clone();
        let mut steps = world.steps(rules);
        let goes_on = |kind| steps.iter().any(|step: &Step| step.kind == kind && step.next != world);
        let (progress, limit) = (goes_on(Kind::Progress), goes_on(Kind::Limit));
        let ended = outcome(&world);
        let mut wrong = violation(&world).map(str::to_owned);
        match &ended {
            Some(ended) if ended.contains(NOT_ALLOWED) => wrong = wrong.or_else(|| Some(ended.clone())),
            Some(ended) => *outcomes.entry(ended.clone()).or_default() += 1,
            None if !progress && !limit => {
                wrong = wrong.or_else(|| Some("nothing is decided and nothing happens".into()))
            }
            None => {}
        }
        if let Some(wrong) = wrong {
            return Explored {
                worlds: worlds.len(),
                outcomes,
                violation: Some((wrong, trace(&came_by, at, &world))),
            };
        }
        if !faults {
            let taken = if progress { Kind::Progress } else { Kind::Limit };
            steps.retain(|step| step.kind == taken);
        }
        for step in steps {
            if seen.insert(step.next.clone()) {
                came_by.push((at, step.what));
                worlds.push(step.next);
            }
        }
        assert!(worlds.len() <= WORLDS_MAX, "the model is too large");
        at += 1;
    }
    Explored { worlds: worlds.len(), outcomes, violation: None }
}

/// The steps from the beginning to a world, and the world.
fn trace(came_by: &[(usize, String)], mut at: usize, world: &World) -> Vec<String> {
    let mut trace = vec![format!("{world:#?}")];
    while at != 0 {
        let (before, what) = &came_by[at];
        trace.push(what.clone());
        at = *before;
    }
    trace.reverse();
    trace
}
