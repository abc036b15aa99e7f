//! No page is wrong: a process that knows every page of its memory moves while it works, and checks itself before,
//! during and after. Everything that must hold of each such move holds here as well: both sides agree, and nothing
//! is left.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use experiments::stamp::Options;
use tests::accounts::Memory;
use tests::moves::Plan;
use tests::site::{Site, default_work_dirs};
use tests::stamps::{self, Stamp, move_once};
use tests::{long, programs};

const MIB: usize = 512;
const STORES: [&str; 2] = ["pipes", "frozen"];

/// Moves in a row: one, or as many as the long variant makes.
fn rounds() -> u32 {
    if long() { 20 } else { 1 }
}

fn move_each(store: &str, options: impl Fn(&Site) -> Options, memory: Memory) {
    for _ in 0..rounds() {
        let Some(site) = Site::new() else { return };
        move_once(&site, &Plan::new().source(["--store", store]), &options(&site), memory);
    }
}

fn steady(site: &Site) -> Options {
    Options { mib: MIB, ..stamps::options(site, "steady") }
}

fn changing(site: &Site) -> Options {
    Options { mib: MIB, churn: true, fork: true, ..stamps::options(site, "changing") }
}

fn tree(site: &Site) -> Options {
    Options { mib: MIB / 4, threads: 2, tree: 4, ..stamps::options(site, "tree") }
}

#[test]
fn a_process_out_of_pipes() {
    move_each(STORES[0], steady, Memory::Steady);
}

#[test]
fn a_process_out_of_the_frozen_original() {
    move_each(STORES[1], steady, Memory::Steady);
}

#[test]
fn a_process_that_changes_its_mappings_and_forks_out_of_pipes() {
    move_each(STORES[0], changing, Memory::Changing);
}

#[test]
fn a_process_that_changes_its_mappings_and_forks_out_of_the_frozen_original() {
    move_each(STORES[1], changing, Memory::Changing);
}

#[test]
fn a_tree_with_shared_memory_out_of_pipes() {
    move_each(STORES[0], tree, Memory::Steady);
}

#[test]
fn a_tree_with_shared_memory_out_of_the_frozen_originals() {
    move_each(STORES[1], tree, Memory::Steady);
}

#[test]
fn a_tree_that_changes_its_mappings_and_forks() {
    move_each(STORES[0], |site| Options { churn: true, fork: true, ..tree(site) }, Memory::Changing);
}

#[test]
fn a_slow_push_leaves_the_faults_to_the_demand_lane() {
    let Some(site) = Site::new() else { return };
    let options = Options { mib: 128, threads: 2, rate_us: 50, churn: true, fork: true, ..changing(&site) };
    move_once(&site, &Plan::new().source(["--push-rate", "16M"]), &options, Memory::Changing);
}

/// CRIU takes all memory of such a process for stacks. A thread that does not stay there is caught elsewhere by a
/// later freeze; for this one the move does what is left.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_thread_whose_stack_pointer_stays_page_aligned() {
    // CRIU cannot be sent away any more once it has touched the process, as it may have on a busy machine whenever
    // it is looked at; but not every time.
    const MOVES: usize = 8;
    let mut tried_again = 0;
    for _ in 0..MOVES {
        let Some(site) = Site::new() else { return };
        let options = Options { aligned_stack: true, ..stamps::small(&site, 32) };
        let mut stamp = Stamp::start(&options);
        let ended = Plan::new().run(&site, stamp.pid());
        ended.assert_arrived(Memory::Steady);
        let said = ended.source.said();
        tried_again = said.matches("trying again").count();
        assert!(tried_again < 8, "{said}");
        assert_eq!(said.matches("copies all memory before it resumes").count(), 1, "{said}");
        assert_eq!(ended.destination.report().pages.lazy, 0);
        stamp.mark_moved();
        stamp.assert_unharmed();
        stamp.quit();
        site.assert_clean(&[]);
        if tried_again > 0 {
            break;
        }
    }
    assert!(tried_again > 0, "CRIU was not sent away in {MOVES} moves");
}

#[test]
fn another_criu_with_wide_headers() {
    let Some(criu) = programs::next_criu() else {
        tests::skip("there is no second CRIU: scripts/setup --criu-next makes one");
        return;
    };
    for store in STORES {
        let Some(site) = Site::new() else { return };
        let plan = Plan::new().source(["--store", store]).source(["--criu".as_ref(), criu.as_os_str()]);
        let plan = plan.destination(["--criu".as_ref(), criu.as_os_str()]);
        let options = Options { mib: 128, ..changing(&site) };
        move_once(&site, &plan, &options, Memory::Changing);
    }
}

#[test]
fn nothing_stays_in_the_programs_own_work_directories() {
    let Some(site) = Site::new() else { return };
    let before = default_work_dirs();
    let plan = Plan { default_work_dir: true, ..Plan::new() };
    move_once(&site, &plan, &stamps::small(&site, 32), Memory::Steady);
    tests::eventually("the end of what this move made", tests::STEP, || {
        default_work_dirs().is_subset(&before).then_some(())
    });
}
