//! What is freed, and when. What the reports of every move must say is judged with every move, in all tests.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use experiments::stamp::Options;
use tests::accounts::Memory;
use tests::moves::{Move, Plan};
use tests::site::Site;
use tests::stamps::{self, Stamp};
use tests::{STEP, processes};

const MIB: usize = 512;
/// Samples while the memory leaves: the source says every two seconds what it still holds.
const SAMPLES: usize = 3;
/// What does not count: pages on their way, the libraries' and the stacks' pages, chunks that are not complete.
const SLACK: u64 = 64 << 20;
/// Bytes of a pipe in the source's store, for a tree of this size.
const PIPE_BYTES: u64 = 256 << 10;

fn plan(store: &str) -> Plan<'static> {
    Plan::new().source(["--store", store, "--push-rate", "48M"])
}

fn workload(site: &Site) -> Options {
    Options { mib: MIB, threads: 2, rate_us: 1000, ..stamps::options(site, "slow") }
}

/// What the source says that it still holds, in bytes.
fn held(line: &str) -> u64 {
    let words = line.split_whitespace();
    let before_held = words.clone().zip(words.skip(2)).find(|(_, behind)| *behind == "held").unwrap().0;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a size in MiB")]
    let bytes = (before_held.parse::<f64>().unwrap() * f64::from(1 << 20)) as u64;
    bytes
}

/// Calls `sample` with what the source says that it holds, each time it says so.
fn sample(under_way: &Move, mut sample: impl FnMut(u64)) {
    under_way.wait_running();
    for count in 1..=SAMPLES {
        sample(held(&under_way.source.tool.wait_lines(" held", count, STEP)));
    }
}

fn release(site: &Site, under_way: Move, mut stamp: Stamp) {
    under_way.wait().assert_released(Memory::Steady);
    stamp.mark_moved();
    stamp.assert_unharmed();
    stamp.quit();
    site.assert_clean(&[]);
}

#[test]
fn the_source_shrinks_while_its_memory_leaves() {
    let Some(site) = Site::new() else { return };
    let stamp = Stamp::start(&workload(&site));
    let whole = processes::resident(stamp.pid());
    assert!(whole > (MIB as u64) << 20);
    let under_way = plan("pipes").start(&site, stamp.pid());
    let (mut last_held, mut last_pipes) = (whole + SLACK, usize::MAX);
    sample(&under_way, |held| {
        let root = site.moved(stamp.pid()).expect("the moved root");
        let (here, pipes) = (processes::resident(root), processes::pipe_ends(under_way.source.tool.pid()));
        println!("held {} MiB in {pipes} pipes, {} MiB at the destination", held >> 20, here >> 20);
        assert!(processes::has_ended(stamp.pid()), "the task itself is gone at once");
        assert!(held < last_held && pipes < last_pipes, "{held} held, {last_held} before");
        assert!((pipes as u64 * PIPE_BYTES).abs_diff(held) < SLACK, "{pipes} pipes are not {held} bytes");
        // No page is at both sides for long, and none is nowhere.
        assert!((held + here).abs_diff(whole) < SLACK, "{held} held and {here} here, of {whole}");
        (last_held, last_pipes) = (held, pipes);
    });
    release(&site, under_way, stamp);
}

#[test]
fn the_frozen_original_keeps_everything_until_the_end() {
    let Some(site) = Site::new() else { return };
    let stamp = Stamp::start(&workload(&site));
    let whole = processes::resident(stamp.pid());
    let under_way = plan("frozen").start(&site, stamp.pid());
    sample(&under_way, |_| {
        processes::assert_stops(stamp.pid());
        assert!(processes::resident(stamp.pid()) >= whole, "it lost memory: the pages are in nothing else");
    });
    release(&site, under_way, stamp);
}
