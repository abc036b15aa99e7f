//! Several lanes of each kind: all of them carry pages, no page is wrong, and both sides count the same.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use experiments::stamp::Options;
use tests::accounts::Memory;
use tests::keys::Keys;
use tests::moves::{Ended, Plan};
use tests::site::Site;
use tests::stamps::{self, move_once};

/// Many threads that touch memory all the time, change their mappings and fork.
fn crowd(site: &Site) -> Options {
    Options { mib: 128, threads: 16, churn: true, fork: true, ..stamps::options(site, "crowd") }
}

/// What each of the daemon's threads of a kind says at its end of how much it did.
fn shares(ended: &Ended, said: &str, of: &str) -> Vec<u64> {
    let of = format!("{of}=");
    let lines = ended.destination.lines.iter().filter(|line| line.contains(said));
    let shares = lines.filter_map(|line| line.split_once(&of)?.1.split_whitespace().next()?.parse().ok());
    shares.collect()
}

fn move_crowd(plan: Plan<'_>, site: &Site, lanes: usize) {
    let plan = plan.lanes(&lanes.to_string()).destination(["-v"]);
    let ended = move_once(site, &plan, &crowd(site), Memory::Changing);
    let pushed = shares(&ended, "a push lane has ended", "pages");
    let faults = shares(&ended, "a fault loop has ended", "faults");
    println!("pushed {pushed:?}, faults {faults:?}");
    for shares in [pushed, faults] {
        assert!(shares.len() == lanes && shares.iter().all(|share| *share > 0), "{shares:?}");
    }
}

#[test]
fn each_lane_has_its_share() {
    for (link, lanes) in [("tcp", 2), ("tcp", 8), ("tls", 3), ("quic", 3)] {
        let Some(site) = Site::new() else { return };
        println!("{link}, {lanes}");
        let plan = if link == "tcp" { Plan::new() } else { Keys::new(&site).plan(link) };
        // So that there are faults, however fast the push is here.
        move_crowd(plan.source(["--push-rate", "64M"]), &site, lanes);
    }
}

#[test]
fn behind_a_pre_copy() {
    let Some(site) = Site::new() else { return };
    let plan = Plan::new().source(["--precopy-rounds", "2", "--push-rate", "64M"]).lanes("3");
    move_once(&site, &plan, &crowd(&site), Memory::Changing);
}
