//! Moves in a simulated world: a fixed set of seeds, and defects that must be noticed.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use tests::simulation::{DEFECTS, Outcome, simulate, simulate_all};

/// Seeds of each run; others by hand.
const SEEDS: u64 = 1000;

#[test]
fn a_thousand_moves_end_well() {
    let sum = match simulate_all(0..SEEDS) {
        Ok(sum) => sum,
        Err(failure) => panic!("{failure}"),
    };
    println!("{sum:?}");
    // A world in which nothing goes wrong, or everything does, would prove nothing.
    for (outcome, least) in [
        (Outcome::Released, SEEDS / 10),
        (Outcome::Completed, SEEDS / 50),
        (Outcome::RolledBack, SEEDS / 50),
        (Outcome::Stopped, 1),
    ] {
        let found = sum.outcomes.get(&outcome).copied().unwrap_or(0);
        assert!(found >= least, "{outcome:?}: {found} of {SEEDS}, {sum:?}");
    }
}

#[test]
fn the_same_seed_is_the_same_move() {
    for seed in 0..20 {
        let again = || simulate(seed, None).map(|report| (report.outcome, report.steps, report.us)).unwrap();
        assert_eq!(again(), again(), "seed {seed}");
    }
}

#[test]
fn every_defect_is_found() {
    for defect in DEFECTS {
        let found = (0..300).find_map(|seed| Some((seed, simulate(seed, Some(defect)).err()?)));
        let Some((seed, failure)) = found else { panic!("{defect:?} is not noticed") };
        println!("{defect:?}: {}", failure.lines().next().unwrap_or_default());
        assert!(simulate(seed, None).is_ok(), "seed {seed} is wrong without {defect:?}");
    }
}
