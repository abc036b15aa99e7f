//! The process that is moved: sends its memory over one connection until it is told to stop.
//!
//! ```text
//! READY id=0 pid=..          listens, memory is filled
//! DONE 1 sent=..             answer to `quit 1`, after the last byte was handed to the kernel
//! ```

use std::io::{ErrorKind, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, ExitCode, id};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::content;
use crate::workload::{self, ControlFile, Files, Order, Poll, StatusLog};

/// Handed to the kernel at a time.
const CHUNK: usize = 64 << 10;
/// Between two looks at the control file.
const TICK: Duration = Duration::from_millis(20);
/// A client that reads nothing for so long is gone; longer than any blackout.
const WRITE_LIMIT: Duration = Duration::from_secs(60);

/// What the server is to do.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where to listen, for one client
    #[arg(long)]
    pub addr: SocketAddr,
    /// Memory to fill and send
    #[arg(long, default_value_t = 256)]
    pub mib: usize,
    /// How long to live
    #[arg(long, default_value_t = 600)]
    pub seconds: u64,
    /// Where it reports and is told what to do
    #[command(flatten)]
    pub files: Files,
}

impl Options {
    /// Adds the verb and these options to a command that runs `experiments`.
    pub(super) fn add_to(&self, command: &mut Command) {
        command.args(["workload", "stream-server", "--addr", &self.addr.to_string()]);
        command.args(["--mib", &self.mib.to_string(), "--seconds", &self.seconds.to_string()]);
        command.arg("--status").arg(&self.files.status).arg("--control").arg(&self.files.control);
    }
}

/// Runs the server in this process.
///
/// # Errors
/// If it cannot listen, or the connection breaks.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    ensure!(options.mib > 0, "--mib of 1 or more");
    workload::detach()?;
    let files = options.files.absolute()?;
    let log = StatusLog::new(files.status);
    workload::end_on_panic(log.clone());
    let mut memory = vec![0; options.mib << 20];
    let length = memory.len() as u64;
    for (place, chunk) in memory.chunks_mut(CHUNK).enumerate() {
        content::fill(chunk, (place * CHUNK) as u64, length);
    }
    let listener =
        TcpListener::bind(options.addr).with_context(|| format!("listening on {}", options.addr))?;
    log.line(&format!("READY id=0 pid={}", id()));
    let mut control = Control { file: ControlFile::new(files.control), looked: Instant::now() };
    let deadline = Instant::now() + Duration::from_secs(options.seconds);
    let mut stream = accept(&listener, &mut control, deadline)?;
    drop(listener);
    let (mut sent, mut chunks) = (0_u64, memory.chunks(CHUNK).cycle());
    let number = loop {
        if let Some(number) = control.quit() {
            break number;
        }
        ensure!(Instant::now() < deadline, "nobody told it to stop");
        let chunk = chunks.next().context("there is memory to send")?;
        stream.write_all(chunk).context("sending")?;
        sent += chunk.len() as u64;
    };
    stream.shutdown(Shutdown::Write)?;
    log.line(&format!("DONE {number} sent={sent}"));
    Ok(ExitCode::SUCCESS)
}

fn accept(listener: &TcpListener, control: &mut Control, deadline: Instant) -> anyhow::Result<TcpStream> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(WRITE_LIMIT))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("accepting the client"),
        }
        if control.quit().is_some() || Instant::now() > deadline {
            bail!("no client came");
        }
        std::thread::sleep(TICK);
    }
}

/// The control file, looked at now and then.
struct Control {
    file: ControlFile,
    looked: Instant,
}

impl Control {
    /// The number of an order to quit; 0 when nobody steers this process any more.
    fn quit(&mut self) -> Option<u64> {
        if self.looked.elapsed() < TICK {
            return None;
        }
        self.looked = Instant::now();
        match self.file.poll() {
            Poll::Command(command) if command.order == Order::Quit => Some(command.number),
            Poll::Abandoned => Some(0),
            Poll::Command(_) | Poll::Nothing => None,
        }
    }
}
