//! Both sides of a move, started, waited for and judged.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use experiments::lab::{Host, Lab};
use experiments::report::MoveReport;

use crate::accounts::{self, Memory};
use crate::site::Site;
use crate::tool::Tool;
use crate::{MOVE, STEP, programs};

/// Where the daemon listens when the sides are hosts of a lab.
const LAB_PORT: u16 = 7300;

/// How a move is to be made; the default is what the programs do by themselves.
#[derive(Clone, Default)]
pub struct Plan<'a> {
    /// The hosts, if they are network namespaces.
    pub lab: Option<&'a Lab>,
    /// What the source is started by: a program that becomes it, and its arguments.
    pub source_in: Vec<OsString>,
    /// Options of `source-server move`.
    pub source: Vec<OsString>,
    /// Options of `uffd-daemon serve`.
    pub destination: Vec<OsString>,
    /// Options of `criu dump`.
    pub dump: Vec<OsString>,
    /// Options of `criu restore`.
    pub restore: Vec<OsString>,
    /// The work directories are where the programs themselves want them.
    pub default_work_dir: bool,
    /// The daemon goes on after the first move.
    pub keep_serving: bool,
}

impl<'a> Plan<'a> {
    /// As the programs do by themselves, on this host.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Between two hosts of a lab.
    #[must_use]
    pub fn between(lab: &'a Lab) -> Self {
        Self { lab: Some(lab), ..Self::default() }
    }

    /// With options for the source.
    #[must_use]
    pub fn source<S: Into<OsString>>(mut self, options: impl IntoIterator<Item = S>) -> Self {
        self.source.extend(options.into_iter().map(Into::into));
        self
    }

    /// With options for the destination.
    #[must_use]
    pub fn destination<S: Into<OsString>>(mut self, options: impl IntoIterator<Item = S>) -> Self {
        self.destination.extend(options.into_iter().map(Into::into));
        self
    }

    /// With so many fault lanes and push lanes.
    #[must_use]
    pub fn lanes(self, count: &str) -> Self {
        self.source(["--fault-lanes", count, "--push-lanes", count])
    }

    /// With a hook at the source.
    #[must_use]
    pub fn source_hook(self, phase: &str, command: &str) -> Self {
        self.source(["--hook".to_owned(), format!("{phase}={command}")])
    }

    /// With a hook at the destination.
    #[must_use]
    pub fn destination_hook(self, phase: &str, command: &str) -> Self {
        self.destination(["--hook".to_owned(), format!("{phase}={command}")])
    }

    /// With options for `criu dump`.
    #[must_use]
    pub fn dump<S: Into<OsString>>(mut self, options: impl IntoIterator<Item = S>) -> Self {
        self.dump.extend(options.into_iter().map(Into::into));
        self
    }

    /// With options for `criu restore`.
    #[must_use]
    pub fn restore<S: Into<OsString>>(mut self, options: impl IntoIterator<Item = S>) -> Self {
        self.restore.extend(options.into_iter().map(Into::into));
        self
    }

    fn command(&self, host: Host, program: &Path) -> Command {
        self.lab.map_or_else(|| Command::new(program), |lab| lab.run_in(host, program))
    }

    /// Starts the daemon, and waits until it listens.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    #[must_use]
    pub fn serve(&self, site: &Site) -> Daemon {
        let json = site.path("destination.json");
        let _ = std::fs::remove_file(&json);
        let mut command = self.command(Host::Destination, &programs::program("uffd-daemon"));
        let listen = match self.lab {
            Some(_) => format!("{}:{LAB_PORT}", Host::Destination.address()),
            None => "127.0.0.1:0".to_owned(),
        };
        command.args(["serve", "--listen", &listen, "--json"]).arg(&json);
        command.args(self.lab.map(|_| "--insecure")).args((!self.keep_serving).then_some("--once"));
        self.finish(&mut command, site, &self.destination, &self.restore);
        let tool = Tool::start("uffd-daemon", command);
        let address = tool.wait_for(STEP, |line| line.strip_prefix("listening on ").map(str::to_owned));
        Daemon { tool, address, json }
    }

    /// Starts the source.
    #[track_caller]
    #[must_use]
    pub fn source_to(&self, site: &Site, pid: u32, address: &str) -> Source {
        // Several may be at work at once.
        let json = site.path(&format!("source-{pid}.json"));
        let _ = std::fs::remove_file(&json);
        let program = programs::program("source-server");
        let mut command = match self.source_in.split_first() {
            Some((by, arguments)) => {
                let mut command = self.command(Host::Source, Path::new(by));
                command.args(arguments).arg(program);
                command
            }
            None => self.command(Host::Source, &program),
        };
        command.args(["move", "--pid", &pid.to_string(), "--to", address, "--json"]).arg(&json);
        command.args(self.lab.map(|_| "--insecure"));
        self.finish(&mut command, site, &self.source, &self.dump);
        Source { tool: Tool::start("source-server", command), json }
    }

    fn finish(&self, command: &mut Command, site: &Site, options: &[OsString], criu: &[OsString]) {
        if !self.default_work_dir {
            command.arg("--work-dir").arg(site.work_dir());
        }
        command.args(options).arg("--").args(criu);
    }

    /// Starts both sides.
    ///
    /// # Panics
    /// If the daemon does not listen.
    #[track_caller]
    #[must_use]
    pub fn start(&self, site: &Site, pid: u32) -> Move {
        let destination = self.serve(site);
        let source = self.source_to(site, pid, &destination.address);
        Move { source, destination }
    }

    /// Makes the move, from beginning to end.
    ///
    /// # Panics
    /// If it does not end.
    #[track_caller]
    #[must_use]
    pub fn run(&self, site: &Site, pid: u32) -> Ended {
        self.start(site, pid).wait()
    }
}

/// A listening daemon.
#[derive(Debug)]
pub struct Daemon {
    /// The program.
    pub tool: Tool,
    /// Where it listens.
    pub address: String,
    json: PathBuf,
}

/// A source at work.
#[derive(Debug)]
pub struct Source {
    /// The program.
    pub tool: Tool,
    json: PathBuf,
}

/// A move under way.
#[derive(Debug)]
pub struct Move {
    /// Its source.
    pub source: Source,
    /// Its destination.
    pub destination: Daemon,
}

/// How one side ended.
#[derive(Debug)]
pub struct Side {
    /// Exit status.
    pub status: i32,
    /// Its report, if it wrote one.
    pub report: Option<MoveReport>,
    /// What it said.
    pub lines: Vec<String>,
}

/// How a move ended.
#[derive(Debug)]
pub struct Ended {
    /// At the source.
    pub source: Side,
    /// At the destination.
    pub destination: Side,
}

impl Daemon {
    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end within `limit`.
    #[track_caller]
    #[must_use]
    pub fn wait(mut self, limit: Duration) -> Side {
        let status = self.tool.wait(limit);
        Side { status, report: MoveReport::read(&self.json).ok(), lines: self.tool.lines() }
    }
}

impl Source {
    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end within `limit`.
    #[track_caller]
    #[must_use]
    pub fn wait(mut self, limit: Duration) -> Side {
        let status = self.tool.wait(limit);
        Side { status, report: MoveReport::read(&self.json).ok(), lines: self.tool.lines() }
    }
}

impl Move {
    /// Waits until the tasks run at the destination and both sides know it.
    ///
    /// # Panics
    /// If it does not come to that.
    #[track_caller]
    pub fn wait_running(&self) {
        for tool in [&self.source.tool, &self.destination.tool] {
            tool.wait_line("phase=\"push\"", STEP);
        }
    }

    /// Waits for both ends.
    ///
    /// # Panics
    /// If they do not come.
    #[track_caller]
    #[must_use]
    pub fn wait(self) -> Ended {
        let source = self.source.wait(MOVE);
        if source.status == 2 {
            // Refused: the daemon waits for another move.
            self.destination.tool.signal(nix::sys::signal::Signal::SIGTERM);
        }
        Ended { source, destination: self.destination.wait(STEP) }
    }
}

impl Side {
    /// The report.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    #[must_use]
    pub fn report(&self) -> &MoveReport {
        self.report.as_ref().unwrap_or_else(|| panic!("no report: {self:#?}"))
    }

    /// Everything it said.
    #[must_use]
    pub fn said(&self) -> String {
        self.lines.join("\n")
    }

    /// It ended with this status and outcome, and said each of `words`.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn assert(&self, status: i32, outcome: &str, words: &[&str]) {
        assert_eq!(self.status, status, "{self:#?}");
        assert_eq!(self.report().outcome, outcome, "{self:#?}");
        for word in words {
            assert!(self.said().contains(word), "{word:?} is missing: {self:#?}");
        }
    }
}

impl Ended {
    /// Everything arrived, the source let go, and the reports add up.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn assert_arrived(&self, memory: Memory) {
        self.source.assert(0, "released", &[]);
        self.destination.assert(0, "released", &[]);
        accounts::check(self.source.report(), self.destination.report(), memory);
    }

    /// Everything arrived, and neither side had anything to complain about.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn assert_released(&self, memory: Memory) {
        self.assert_arrived(memory);
        for side in [&self.source, &self.destination] {
            let trouble: Vec<_> = side
                .lines
                .iter()
                .filter(|line| line.contains("ERROR") || line.contains("WARN"))
                // Chance puts the stack pointer of one thread in 256 there; on a busy host it is seen too late.
                .filter(|line| !line.contains("lies on the first byte of a page"))
                .collect();
            assert!(trouble.is_empty(), "{trouble:#?}");
        }
    }

    /// Both sides went back, and the source gives a reason with each of `words` in it.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn assert_rolled_back(&self, words: &[&str]) {
        self.source.assert(1, "rolled_back", words);
        self.destination.assert(1, "rolled_back", &[]);
        for side in [&self.source, &self.destination] {
            let report = side.report();
            assert!(report.error.is_some() && report.pages.adds_up(), "{report}");
        }
        let unconfirmed = self.source.said().contains("did not confirm");
        assert!(!unconfirmed, "the destination is clean and did not say so: {:#?}", self.source);
    }

    /// Both sides stopped behind the switchover.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn assert_paused(&self) {
        for side in [&self.source, &self.destination] {
            side.assert(3, "paused", &["switchover was passed"]);
            assert!(side.report().error.is_some(), "{side:#?}");
        }
    }
}
