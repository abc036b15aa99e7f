//! An established TCP connection survives: a move, and a move that is called off. The client never connects again,
//! and no rule of CRIU's network lock stays.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use experiments::lab::{Host, Lab, SERVICE};
use nix::sys::signal::Signal;
use tests::accounts::Memory;
use tests::echo::{Client, Server};
use tests::gate::Gate;
use tests::moves::{Ended, Plan};
use tests::site::Site;
use tests::{STEP, programs};

/// Answers before and after that show that the connection works.
const ANSWERS: u64 = 100;

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

    /// A move with the service's address, by a CRIU that dumps connections on this kernel.
    fn plan(&self) -> Plan<'_> {
        let give = format!("{}; true", self.lab.add_address_command(SERVICE));
        let take = format!("{}; true", self.lab.remove_address_command(SERVICE));
        let mut plan = Plan::between(&self.lab).dump(["--tcp-established"]);
        plan = plan.source_hook("post-dump", &take).source_hook("rolled-back", &give);
        plan = plan.destination_hook("pre-restore", &give).destination_hook("rolled-back", &take);
        if let Some(criu) = programs::next_criu() {
            plan = plan.source(["--criu".as_ref(), criu.as_os_str()]);
            plan = plan.destination(["--criu".as_ref(), criu.as_os_str()]);
        }
        plan
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
