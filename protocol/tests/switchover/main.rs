//! A model check of the switchover: every order of messages, cuts, kills, failures and interrupts there can be, over
//! the decisions that both programs really make.

mod explore;
mod table;
mod world;

use explore::{Explored, explore};
use protocol::wire::switchover::{destination, source};
use world::{RULES, Rules, Store, World};

const STORES: [Store; 2] = [Store::Pipes, Store::Frozen];

fn assert_sound(explored: &Explored) {
    if let Some((wrong, trace)) = &explored.violation {
        panic!("{wrong}, after\n{}", trace.join("\n"));
    }
}

#[test]
fn whatever_happens_one_copy_at_most_runs_and_nothing_is_lost() {
    for store in STORES {
        let explored = explore(World::new(store), RULES, true);
        println!("{store:?}: {} worlds; how they end: {:#?}", explored.worlds, explored.outcomes);
        assert_sound(&explored);
        // An exploration that gets nowhere finds nothing.
        for ending in [
            "released, released: runs at the destination",
            "rolled back, rolled back: runs at the source",
            "paused, paused: waits at the destination",
            "paused, rolled back: stopped at the source",
            "paused, released: runs at the destination",
        ] {
            assert!(explored.outcomes.contains_key(ending), "never {ending:?}");
        }
    }
}

#[test]
fn a_move_that_nobody_disturbs_is_released() {
    for store in STORES {
        let explored = explore(World::new(store), RULES, false);
        assert_sound(&explored);
        assert_eq!(
            explored.outcomes.keys().collect::<Vec<_>>(),
            ["released, released: runs at the destination"]
        );
    }
}

fn mutant_of_source(decide: fn(source::State, source::Event) -> (source::State, source::Action)) -> Rules {
    Rules { source: decide, ..RULES }
}

fn mutant_of_destination(
    decide: fn(destination::State, destination::Event) -> (destination::State, destination::Action),
) -> Rules {
    Rules { destination: decide, ..RULES }
}

/// One decision is another: the check must find what follows.
#[test]
fn each_decision_matters() {
    use destination::{Action as Do, Ending as DestinationEnding, Event as Heard, State as There};
    use source::{Action, Ending, Event, State};
    const LET_RUN: (State, Action) = (State::Ended(Ending::LetRun), Action::End(Ending::LetRun));
    const RELEASE: (State, Action) = (State::Ended(Ending::Release), Action::End(Ending::Release));
    let mutants = [
        (
            "the source resumes when the connection is lost behind Commit",
            mutant_of_source(|state, event| match (state, event) {
                (State::Committed { .. }, Event::Lost | Event::Broken) => LET_RUN,
                _ => source::decide(state, event),
            }),
            "runs behind Commit",
        ),
        (
            "the source resumes on an Abort behind Commit without the word that all is clean",
            mutant_of_source(|state, event| match (state, event) {
                (State::Refused, Event::Broken) => LET_RUN,
                _ => source::decide(state, event),
            }),
            "runs behind Commit",
        ),
        (
            "the source resumes when it is interrupted while it pushes",
            mutant_of_source(|state, event| match (state, event) {
                (State::Pushing(_), Event::Interrupted) => LET_RUN,
                _ => source::decide(state, event),
            }),
            "two copies",
        ),
        (
            "the source commits although a task of it runs",
            mutant_of_source(|state, event| match (state, event) {
                (State::Checking, Event::Fence { .. }) => {
                    source::decide(state, Event::Fence { stands: true })
                }
                _ => source::decide(state, event),
            }),
            "runs behind Commit",
        ),
        (
            "the source believes Complete without acknowledgements",
            mutant_of_source(|state, event| match (state, event) {
                (State::Pushing(progress), Event::Complete) if progress.let_go => RELEASE,
                _ => source::decide(state, event),
            }),
            "not acknowledged",
        ),
        (
            "the source kills its tasks before it knows that the destination runs",
            mutant_of_source(|state, event| match (state, event) {
                (State::Committed { .. }, Event::Failing) => (state, Action::LetGo),
                _ => source::decide(state, event),
            }),
            "no copy",
        ),
        (
            "the destination runs what it holds when the connection is lost",
            mutant_of_destination(|state, event| match (state, event) {
                (There::Prepared, Heard::Lost | Heard::Broken) => (There::Committed, Do::LetRun),
                _ => destination::decide(state, event),
            }),
            "two copies",
        ),
        (
            "the source resumes when nobody answers its dialling",
            mutant_of_source(|state, event| match (state, event) {
                (State::Paused(_), Event::Broken) => LET_RUN,
                _ => source::decide(state, event),
            }),
            "runs behind Commit",
        ),
        (
            "the source resumes when nobody there knows the session",
            mutant_of_source(|state, event| match (state, event) {
                (State::Paused(None), Event::Broken) => LET_RUN,
                _ => source::decide(state, event),
            }),
            "runs behind Commit",
        ),
        (
            "the source takes new connections for acknowledgements",
            mutant_of_source(|state, event| match (state, event) {
                (State::Paused(Some(_)), Event::Resumed) => RELEASE,
                _ => source::decide(state, event),
            }),
            "not acknowledged",
        ),
        (
            "the destination lets go when nobody dials",
            mutant_of_destination(|state, event| match (state, event) {
                (There::Paused { .. }, Heard::Broken) => {
                    (There::Ended(DestinationEnding::Release), Do::End(DestinationEnding::Release))
                }
                _ => destination::decide(state, event),
            }),
            "misses pages",
        ),
        (
            "the destination tears down behind Commit",
            mutant_of_destination(|state, event| match (state, event) {
                (There::Running, Heard::Broken) => {
                    (There::Ended(DestinationEnding::TearDown), Do::End(DestinationEnding::TearDown))
                }
                _ => destination::decide(state, event),
            }),
            "no copy",
        ),
        (
            "the destination keeps what it holds when the connection is lost",
            mutant_of_destination(|state, event| match (state, event) {
                (There::Prepared, Heard::Lost | Heard::Broken) => {
                    (There::Ended(DestinationEnding::Pause), Do::End(DestinationEnding::Pause))
                }
                _ => destination::decide(state, event),
            }),
            "in no allowed state",
        ),
        (
            "the destination lets go when it loses the source",
            mutant_of_destination(|state, event| match (state, event) {
                (There::Running, Heard::Lost) => {
                    (There::Ended(DestinationEnding::Release), Do::End(DestinationEnding::Release))
                }
                _ => destination::decide(state, event),
            }),
            "misses pages",
        ),
    ];
    for (mutation, rules, expected) in mutants {
        let found = STORES.map(|store| explore(World::new(store), rules, true).violation);
        let found = found.iter().flatten().next().unwrap_or_else(|| panic!("not found: {mutation}"));
        println!("{mutation}: {} after {} steps", found.0, found.1.len() - 1);
        assert!(found.0.contains(expected), "{mutation}: {found:#?}");
    }
}

/// The table of docs/protocol.md is what the model does.
#[test]
fn the_document_says_what_happens() {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/protocol.md");
    let document = std::fs::read_to_string(document).unwrap();
    let table = table::table();
    assert!(document.contains(&table), "docs/protocol.md should have\n\n{table}");
}
