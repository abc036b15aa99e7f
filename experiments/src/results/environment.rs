//! What an experiment ran on: figures without it compare with nothing.

use std::fs;
use std::path::Path;

use anyhow::Context;

/// The machine, the programs and the load.
#[derive(Clone, Debug)]
pub struct Environment {
    lines: Vec<(String, String)>,
}

impl Environment {
    /// As it is at the start of `scenario`.
    pub(super) fn begin(scenario: &str, versions: &[(&str, String)]) -> Self {
        let mut environment = Self { lines: Vec::new() };
        environment.add("scenario", scenario);
        environment.add("release", env!("CARGO_PKG_VERSION"));
        for (program, version) in versions {
            environment.add(program, version);
        }
        for key in ["ostype", "osrelease", "version"] {
            environment.add(key, &read(&format!("/proc/sys/kernel/{key}")));
        }
        let cpus = read("/proc/cpuinfo");
        let models: Vec<&str> = cpus.lines().filter_map(|line| line.strip_prefix("model name")).collect();
        environment.add("processors", &models.len().to_string());
        environment
            .add("model", models.first().copied().unwrap_or_default().trim_start_matches(['\t', ' ', ':']));
        let memory = read("/proc/meminfo");
        for key in ["MemTotal:", "MemAvailable:"] {
            let line = memory.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
            environment.add(key.trim_end_matches(':'), line);
        }
        environment.add("tcp congestion control", &read("/proc/sys/net/ipv4/tcp_congestion_control"));
        environment.add("load before", &read("/proc/loadavg"));
        environment
    }

    /// Adds the load at the end.
    pub(super) fn end(&mut self) {
        self.lines.retain(|(key, _)| key != "load after");
        self.add("load after", &read("/proc/loadavg"));
    }

    fn add(&mut self, key: &str, value: &str) {
        self.lines.push((key.to_owned(), value.trim().to_owned()));
    }

    pub(super) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text: String = self.lines.iter().map(|(key, value)| format!("{key}: {value}\n")).collect();
        fs::write(path, text).with_context(|| format!("writing {path:?}"))
    }

    /// Reads one that was written.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {path:?}"))?;
        let line = |line: &str| line.split_once(": ").map(|(key, value)| (key.to_owned(), value.to_owned()));
        Ok(Self { lines: text.lines().filter_map(line).collect() })
    }

    /// The value of a line; empty if there is none.
    #[must_use]
    pub fn get(&self, key: &str) -> &str {
        self.lines.iter().find(|line| line.0 == key).map_or("", |line| &line.1)
    }

    /// All lines.
    pub fn lines(&self) -> impl Iterator<Item = (&str, &str)> {
        self.lines.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }
}

/// A file that is not there on this kernel says nothing, which is no reason not to measure.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
