//! Probes of bulk transfer.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::time::Instant;

use anyhow::ensure;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::{pipe2, write};

use super::latency::{connection, join};
use super::memory::{CHUNK, LazyMemory, PAGE};
use super::{Extent, Found};

/// Bytes of a pipe: as many as an unprivileged process may ask for by default.
const PIPE: usize = 1 << 20;
/// Pipes that are filled before the clock runs, each to be sent once: two descriptors each, of the usual 1024.
const PIPES_MAX: usize = 256;

#[expect(clippy::cast_precision_loss, reason = "sizes far below 2^53")]
pub(super) fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Runs `work` on so many threads, each with what `prepare` made for it; `bytes` are moved by each.
fn rate<T: Send>(
    threads: usize,
    bytes: usize,
    prepare: impl Fn() -> anyhow::Result<T>,
    work: impl Fn(T) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<Found> {
    let prepared = (0..threads).map(|_| prepare()).collect::<anyhow::Result<Vec<T>>>()?;
    let work = &work;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let running: Vec<_> = prepared.into_iter().map(|mine| scope.spawn(move || work(mine))).collect();
        running.into_iter().try_for_each(join)
    })?;
    let moved = gib((bytes * threads) as u64);
    Ok(Found { latencies: None, gib_per_s: Some(moved / begun.elapsed().as_secs_f64()) })
}

pub(super) fn install(threads: usize, extent: Extent) -> anyhow::Result<Found> {
    let bytes = extent.bytes / threads;
    rate(
        threads,
        bytes,
        || LazyMemory::warmed(bytes / PAGE),
        |memory| {
            let chunk = vec![1; CHUNK];
            memory.fill(|| Ok(&chunk))
        },
    )
}

pub(super) fn receive_and_install(threads: usize, extent: Extent) -> anyhow::Result<Found> {
    let bytes = extent.bytes / threads;
    rate(
        threads,
        bytes,
        || Ok((LazyMemory::warmed(bytes / PAGE)?, connection()?)),
        |(memory, (receiver, sender))| {
            std::thread::scope(|scope| {
                let sending = scope.spawn(move || {
                    let chunk = vec![1; CHUNK];
                    (0..bytes / CHUNK).try_for_each(|_| { &sender }.write_all(&chunk))?;
                    Ok(())
                });
                let mut chunk = vec![0; CHUNK];
                for page in (0..memory.pages()).step_by(CHUNK / PAGE) {
                    { &receiver }.read_exact(&mut chunk)?;
                    memory.install_at(memory.address(page), &chunk)?;
                }
                join(sending)
            })
        },
    )
}

/// Pipes full of whole pages, as a source keeps them.
fn full_pipes(bytes: usize) -> anyhow::Result<Vec<(OwnedFd, OwnedFd)>> {
    let memory = vec![1; PIPE];
    let fill = |_| {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&writer, FcntlArg::F_SETPIPE_SZ(i32::try_from(PIPE)?))?;
        let filled = write(&writer, &memory)?;
        ensure!(filled == PIPE, "a pipe took only {filled} bytes");
        Ok((reader, writer))
    };
    (0..bytes / PIPE).map(fill).collect()
}

pub(super) fn splice_to_tcp(threads: usize, extent: Extent) -> anyhow::Result<Found> {
    let bytes = (extent.bytes / threads).min(PIPES_MAX * PIPE);
    rate(
        threads,
        bytes,
        || Ok((full_pipes(bytes)?, connection()?)),
        |(pipes, (receiver, sender))| {
            std::thread::scope(|scope| {
                let sending =
                    scope.spawn(move || pipes.iter().try_for_each(|pipe| send_pipe(&pipe.0, &sender)));
                let mut buffer = vec![0; CHUNK];
                (0..bytes / CHUNK).try_for_each(|_| { &receiver }.read_exact(&mut buffer))?;
                join(sending)
            })
        },
    )
}

fn send_pipe(pipe: &OwnedFd, to: &TcpStream) -> anyhow::Result<()> {
    let mut left = PIPE;
    while left > 0 {
        let sent = splice(pipe, None, to, None, left, SpliceFFlags::SPLICE_F_MOVE)?;
        ensure!(sent > 0, "a pipe ended early");
        left -= sent;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEW: Extent = Extent { samples: 1, bytes: 4 << 20 };

    #[test]
    fn pages_are_sent_out_of_pipes() {
        for threads in [1, 2] {
            assert!(splice_to_tcp(threads, FEW).unwrap().gib_per_s.unwrap() > 0.0);
        }
    }

    #[test]
    #[ignore = "needs root: userfaultfd"]
    fn pages_are_received_and_installed() {
        for threads in [1, 2] {
            assert!(install(threads, FEW).unwrap().gib_per_s.unwrap() > 0.0);
            assert!(receive_and_install(threads, FEW).unwrap().gib_per_s.unwrap() > 0.0);
        }
    }
}
