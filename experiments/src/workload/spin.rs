//! A task that keeps one processor busy, for experiments on a loaded machine.

use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use host::placement::Processors;
use nix::unistd::getppid;

use crate::random::mix;

/// How the processor is kept busy.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct SpinOptions {
    /// Which processor
    #[arg(long)]
    pub cpu: usize,
    /// For how long at most; it also ends when whoever started it does
    #[arg(long, default_value_t = 600)]
    pub seconds: u64,
}

/// Keeps the processor busy in this process.
///
/// # Errors
/// If it may not run there.
pub fn spin(options: &SpinOptions) -> anyhow::Result<ExitCode> {
    Processors::allowed()?.just(Some(options.cpu)).keep(0)?;
    let (parent, end) = (getppid(), Instant::now() + Duration::from_secs(options.seconds));
    let mut number = 1;
    while Instant::now() < end && getppid() == parent {
        number = (0..1_000_000).fold(number, |number, _| mix(number));
    }
    std::hint::black_box(number);
    Ok(ExitCode::SUCCESS)
}

/// A busy task on every processor, until it is dropped.
#[derive(Debug)]
pub struct BusyCores(Vec<Child>);

impl BusyCores {
    /// Starts them. `program` is the `experiments` binary.
    ///
    /// # Errors
    /// If one cannot be started.
    pub fn start(program: &std::path::Path) -> anyhow::Result<Self> {
        let mut busy = Self(Vec::new());
        for cpu in Processors::allowed()?.list() {
            let mut command = Command::new(program);
            command.args(["workload", "spin", "--cpu", &cpu.to_string()]);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            busy.0.push(command.spawn().context("starting a busy task")?);
        }
        Ok(busy)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl Drop for BusyCores {
    fn drop(&mut self) {
        for task in &mut self.0 {
            let _ = task.kill();
            let _ = task.wait();
        }
    }
}
