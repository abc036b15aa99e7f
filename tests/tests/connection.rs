//! An established TCP connection survives: a move, and a move that is called off. The client never connects again,
//! and no rule of CRIU's network lock stays.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::net::Ipv4Addr;

use experiments::lab::{Host, Lab, SERVICE};
use nix::sys::signal::Signal;
use tests::accounts::Memory;
use tests::echo::{Client, Server};
use tests::gate::Gate;
use tests::moves::{Ended, Plan};
use tests::site::Site;
use tests::{MOVE, STEP, programs};

/// Answers before and after that show that the connection works.
const ANSWERS: u64 = 100;
/// Where another server is.
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 101);

struct Trial {
    client: Client,
    server: Server,
    lab: Lab,
    site: Site,
    rules: [Vec<String>; 2],
}

impl Trial {
    fn new() -> Option<Self> {
        let site = Site::new()?;
        let lab = match Lab::new() {
            Ok(lab) => lab,
            Err(error) => {
                tests::skip(format!("no network namespaces: {error:#}"));
                return None;
            }
        };
        lab.add_address(Host::Source, SERVICE).unwrap();
        let server = Server::start(&lab, &programs::program("echo-server"), SERVICE);
        let mut client = Client::connect(&lab, server.address());
        client.wait_answers(ANSWERS);
        let rules = [Host::Source, Host::Destination].map(|host| rules(&lab, host));
        let trial = Self { client, server, lab, site, rules };
        let tried = trial.plan().source_hook("pre-freeze", "exit 7").run(&trial.site, trial.server.pid());
        if tried.source.status == 2 {
            tests::skip(tried.source.said());
            return None;
        }
        Some(trial)
    }

    /// A move with the service's address.
    fn plan(&self) -> Plan<'_> {
        let give = format!("{}; true", self.lab.add_address_command(SERVICE));
        let take = format!("{}; true", self.lab.remove_address_command(SERVICE));
        let plan = self.leaving(SERVICE).destination_hook("pre-restore", &give);
        plan.destination_hook("rolled-back", &take)
    }

    /// A move whose source gives up an address, by a CRIU that dumps connections on this kernel.
    fn leaving(&self, address: Ipv4Addr) -> Plan<'_> {
        let give = format!("{}; true", self.lab.add_address_command(address));
        let take = format!("{}; true", self.lab.remove_address_command(address));
        let mut plan = Plan::between(&self.lab).dump(["--tcp-established"]);
        plan = plan.source_hook("post-dump", &take).source_hook("rolled-back", &give);
        if let Some(criu) = programs::next_criu() {
            plan = plan.source(["--criu".as_ref(), criu.as_os_str()]);
            plan = plan.destination(["--criu".as_ref(), criu.as_os_str()]);
        }
        plan
    }

    /// Has a daemon bring up an address with what it restores, once `condition` holds.
    fn bring<'a>(&self, plan: Plan<'a>, address: Ipv4Addr, condition: &str) -> Plan<'a> {
        let give = format!("! {condition} || {}; true", self.lab.add_address_command(address));
        let announce = format!("! {condition} || {{ {}; }}", self.lab.announce_command(address));
        plan.destination_hook("pre-restore", &give).destination_hook("post-restore", &announce)
    }

    fn assert_undone(&mut self, ended: &Ended, words: &[&str]) {
        ended.assert_rolled_back(words);
        self.client.wait_answers(ANSWERS);
        self.site.assert_clean(&[self.server.pid()]);
        self.assert_unlocked();
    }

    fn assert_unlocked(&self) {
        for (host, before) in [Host::Source, Host::Destination].into_iter().zip(&self.rules) {
            assert_eq!(&rules(&self.lab, host), before, "{host:?}");
        }
    }
}

/// Every packet filter rule of a host.
fn rules(lab: &Lab, host: Host) -> Vec<String> {
    let mut rules = Vec::new();
    for (program, arguments) in [("iptables-save", ""), ("ip6tables-save", ""), ("nft", "list ruleset")] {
        let output = lab.run_in(host, program).args(arguments.split_whitespace()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // Empty tables and chains of iptables stay once it was used; what they hold is what counts.
        let rule = |line: &&str| line.starts_with("-A ") || line.contains("drop") || line.contains("CRIU");
        rules.extend(text.lines().map(str::trim).filter(rule).map(str::to_owned));
    }
    rules
}

#[test]
fn the_client_goes_on_at_the_destination() {
    for store in ["pipes", "frozen"] {
        let Some(mut trial) = Trial::new() else { return };
        let ended = trial.plan().source(["--store", store]).run(&trial.site, trial.server.pid());
        ended.assert_released(Memory::Steady);
        trial.client.wait_answers(ANSWERS * 10);
        trial.assert_unlocked();
        let Trial { client, .. } = trial;
        println!("{}longest wait: {:?}", ended.destination.report(), client.finish());
    }
}

#[test]
fn the_client_goes_on_at_the_source_after_a_failure() {
    let Some(mut trial) = Trial::new() else { return };
    for (side, phase) in
        [("source", "post-dump"), ("destination", "pre-restore"), ("destination", "post-restore")]
    {
        let plan = match side {
            "source" => trial.plan().source_hook(phase, "exit 7"),
            _ => trial.plan().destination_hook(phase, "exit 7"),
        };
        let ended = plan.run(&trial.site, trial.server.pid());
        trial.assert_undone(&ended, &["exit status: 7"]);
    }
    let ended = trial.plan().restore(["--no-such-option"]).run(&trial.site, trial.server.pid());
    trial.assert_undone(&ended, &["no-such-option"]);
    let ended = trial.plan().run(&trial.site, trial.server.pid());
    ended.assert_released(Memory::Steady);
    trial.client.wait_answers(ANSWERS);
}

#[test]
fn the_client_goes_on_at_the_source_after_an_interrupt() {
    let Some(mut trial) = Trial::new() else { return };
    let mut gate = Gate::new(&trial.site, "post-dump");
    let plan = trial.plan().source_hook("post-dump", &gate.command());
    let under_way = plan.start(&trial.site, trial.server.pid());
    gate.wait_reached();
    under_way.source.tool.signal(Signal::SIGINT);
    gate.open(0);
    let ended = under_way.wait();
    trial.assert_undone(&ended, &["interrupted"]);
    for delay_ms in (0..120).step_by(20) {
        let under_way = trial.plan().start(&trial.site, trial.server.pid());
        under_way.source.tool.wait_line("phase=\"freeze\"", STEP);
        // Not a synchronisation: the moments are to be different ones.
        std::thread::sleep(std::time::Duration::from_millis(delay_ms));
        under_way.source.tool.signal(Signal::SIGINT);
        let ended = under_way.wait();
        if ended.source.status == 0 {
            trial.client.wait_answers(ANSWERS);
            return;
        }
        trial.assert_undone(&ended, &["interrupted"]);
    }
}

#[test]
fn moves_at_once_leave_each_other_their_lock() {
    for method in ["iptables", "nftables"] {
        let Some(mut trial) = Trial::new() else { return };
        trial.lab.add_address(Host::Source, OTHER).unwrap();
        let other = Server::start(&trial.lab, &programs::program("echo-server"), OTHER);
        let mut other_client = Client::connect(&trial.lab, other.address());
        other_client.wait_answers(ANSWERS);
        let mut gate = Gate::new(&trial.site, "post-dump");
        let locking = ["--network-lock", method];

        // One stands still behind its lock, while another is called off, and then moved.
        let second = trial.site.path("second");
        let plan = trial.bring(trial.leaving(SERVICE), OTHER, "true");
        let plan = trial.bring(plan, SERVICE, &format!("test -e {}", second.display()));
        let plan = plan.dump(locking).source_hook("post-dump", &gate.command());
        let first = Plan { keep_serving: true, ..plan }.start(&trial.site, trial.server.pid());
        gate.wait_reached();
        let locked = rules(&trial.lab, Host::Source);
        assert!(locked.len() > trial.rules[0].len(), "{method}: {locked:?}");
        let address = &first.destination.address;
        let move_other =
            |plan: Plan<'_>| plan.dump(locking).source_to(&trial.site, other.pid(), address).wait(MOVE);
        let called_off = move_other(trial.leaving(OTHER).source_hook("post-dump", "exit 7"));
        called_off.assert(1, "rolled_back", &["exit status: 7"]);
        other_client.wait_answers(ANSWERS);
        assert_eq!(rules(&trial.lab, Host::Source), locked, "{method}: behind a roll-back");
        move_other(trial.leaving(OTHER)).assert(0, "released", &[]);
        assert_eq!(rules(&trial.lab, Host::Source), locked, "{method}: behind a release");
        other_client.wait_answers(ANSWERS);

        std::fs::write(second, "").unwrap();
        gate.open(0);
        first.source.wait(MOVE).assert(0, "released", &[]);
        first.destination.tool.signal(Signal::SIGTERM);
        first.destination.wait(STEP).assert(0, "released", &[]);
        trial.client.wait_answers(ANSWERS);
        trial.assert_unlocked();
    }
}
