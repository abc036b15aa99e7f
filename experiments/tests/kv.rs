//! The load client against a real redis in a lab. These need root and redis-server:
//! `cargo test -p experiments --test kv -- --ignored`.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use experiments::kv::{self, KvClient, Load};
use experiments::lab::{Host, Lab, SERVICE};
use experiments::redis::Redis;
use experiments::workload::Files;

const LONG: Duration = Duration::from_secs(30);
const LOAD: Load = Load { keys: 20_000, first_key: 0, value_bytes: 1000, rate: 0, set_percent: 20 };

fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").arg(name).arg(pid.to_string()).status().unwrap().success());
}

fn redis(lab: &Lab) -> Redis {
    lab.add_address(Host::Source, SERVICE).unwrap();
    Redis::start(SERVICE, |program| lab.run_in(Host::Source, program)).unwrap()
}

fn start(lab: &Lab, redis: &Redis, dir: &std::path::Path) -> kv::Handle {
    let options = kv::Options {
        addr: redis.address(),
        load: LOAD,
        seconds: 60,
        report: dir.join("client.json"),
        files: Files::in_dir(dir, "client"),
    };
    let program = lab.run_in(Host::Client, env!("CARGO_BIN_EXE_experiments"));
    kv::Handle::start(program, &options, LONG).unwrap()
}

#[test]
#[ignore = "needs root and redis-server"]
fn a_client_process_sees_a_stall_and_nothing_wrong() {
    let (lab, dir) = (Lab::new().unwrap(), tempfile::tempdir().unwrap());
    let redis = redis(&lab);
    let mut client = start(&lab, &redis, dir.path());
    client.wait_requests(2000, LONG).unwrap();
    signal(redis.pid(), "-STOP");
    std::thread::sleep(Duration::from_millis(250)); // the length of the stall, not a synchronisation
    signal(redis.pid(), "-CONT");
    client.wait_requests(2000, LONG).unwrap();
    let checked = client.check(LONG).unwrap();
    assert_eq!((checked.keys, checked.wrong), (20_000, 0));
    assert!(checked.longest_us >= 200_000);
    client.wait_requests(100, LONG).unwrap();
    let report = client.quit(LONG).unwrap();
    assert!(report.is_good() && report.ops > 4000 && report.gets > report.sets, "{report}");
    assert_eq!((report.verified, report.stalls.is_empty()), (40_000, false));
    let latency = report.latency_us;
    assert!(latency.count == report.ops && latency.p50 > 0.0 && latency.max >= 199_000.0, "{report}");
    assert!(report.longest_stall.us >= 200_000 && report.longest_stall.us < 2_000_000, "{report}");
}

#[test]
#[ignore = "needs root and redis-server"]
fn a_client_whose_server_dies_reports_it_and_does_not_connect_again() {
    let (lab, dir) = (Lab::new().unwrap(), tempfile::tempdir().unwrap());
    let mut redis = redis(&lab);
    let mut client = start(&lab, &redis, dir.path());
    client.wait_requests(100, LONG).unwrap();
    signal(redis.pid(), "-KILL");
    redis.wait_gone(LONG).unwrap();
    let report = client.quit(LONG).unwrap();
    assert!(!report.is_good() && report.error.is_some(), "{report}");
}

#[test]
#[ignore = "needs root and redis-server"]
fn a_client_on_a_thread_finds_a_value_that_somebody_changed() {
    let lab = Lab::new().unwrap();
    let redis = redis(&lab);
    let load = Load { rate: 500, ..LOAD };
    let mut client =
        lab.inside(Host::Client, || KvClient::connect(redis.address(), load, LONG).unwrap()).unwrap();
    client.load().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let progress = client.progress();
    let thread = client.run_until(Arc::clone(&stop));
    while progress.ops.load(Ordering::Relaxed) < 200 {
        std::thread::yield_now();
    }
    stop.store(true, Ordering::Relaxed);
    let mut client = thread.join().unwrap();
    client.verify_all().unwrap();
    assert!(client.report().is_good() && client.report().ops < 20_000);
    for arguments in [["SET", "key:00000007", "x"], ["RENAME", "key:00000009", "other"]] {
        let mut cli = lab.run_in(Host::Client, "redis-cli");
        cli.args(["-h", &SERVICE.to_string()]).args(arguments);
        assert!(cli.output().unwrap().status.success());
    }
    client.verify_all().unwrap();
    assert_eq!(client.report().wrong, 2);
}
