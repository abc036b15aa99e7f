//! Probes of single faults and requests.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Instant;

use anyhow::{Context, anyhow, ensure};
use hdrhistogram::Histogram;
use kernel::uffd::{Event, EventBuffer};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use protocol::link::tcp;

use super::memory::{CHUNK, LazyMemory, PAGE};
use super::{Cores, Extent, Found, PATIENCE, keep_on};
use crate::clock::monotonic_ns;
use crate::random::Permutation;

/// Bytes of a request: as many as a demand of the session protocol has.
const REQUEST: usize = 24;
/// What the push fills before it starts over.
const PUSHED_BYTES: usize = 256 << 20;
/// Touches and requests before the first that counts: threads find their cores, caches and buffers warm up.
const WARM_UP: usize = 64;

/// A connection over loopback: client, server. The congestion control is the tools' own.
pub(super) fn connection() -> anyhow::Result<(TcpStream, TcpStream)> {
    let listener = tcp::listen(([127, 0, 0, 1], 0).into())?;
    let client = tcp::connect(listener.local_addr()?, PATIENCE)?;
    let (server, _) = listener.accept()?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
    }
    Ok((client, server))
}

/// Ends what serves a probe when the probe ends, however it does.
struct Stop<'a>(&'a TcpStream);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

pub(super) fn join<T>(thread: ScopedJoinHandle<'_, anyhow::Result<T>>) -> anyhow::Result<T> {
    thread.join().map_err(|_| anyhow!("a thread of the probe panicked"))?
}

/// Answers each request with a page, until the connection ends.
fn serve(mut stream: &TcpStream) -> anyhow::Result<()> {
    let (mut request, page) = ([0; REQUEST], [1; PAGE]);
    while stream.read_exact(&mut request).is_ok() {
        stream.write_all(&page)?;
    }
    Ok(())
}

/// Asks for a page.
fn ask(mut stream: &TcpStream, page: &mut [u8; PAGE]) -> anyhow::Result<()> {
    stream.write_all(&[2; REQUEST])?;
    Ok(stream.read_exact(page)?)
}

/// Touches missing pages in an order that looks random, and measures how long each takes.
fn touch_all(memory: &LazyMemory, count: usize) -> anyhow::Result<Histogram<u64>> {
    let order = Permutation::new(count as u64, 7);
    let mut histogram = Histogram::new(3)?;
    for i in 0..count {
        let page = usize::try_from(order.at(i as u64))?;
        let begun = monotonic_ns();
        std::hint::black_box(memory.touch(page));
        let took = monotonic_ns() - begun;
        if i >= WARM_UP {
            histogram.record(took)?;
        }
    }
    Ok(histogram)
}

/// Resolves faults with what `fetch` puts into the page, until `stop` is readable.
fn handle(
    memory: &LazyMemory,
    stop: &UnixStream,
    mut fetch: impl FnMut(&mut [u8; PAGE]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut events = EventBuffer::default();
    let mut page = [1; PAGE];
    let mut addresses = Vec::with_capacity(kernel::uffd::EVENTS_PER_READ);
    loop {
        let mut fds = [
            PollFd::new(memory.uffd.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::try_from(PATIENCE)?) {
            Err(nix::errno::Errno::EINTR) => continue,
            ready => ensure!(ready? > 0, "nothing was touched for {PATIENCE:?}"),
        }
        if fds[1].any().unwrap_or(true) {
            return Ok(());
        }
        memory.uffd.read(&mut events, |event| {
            if let Event::Fault { address } = event {
                addresses.push(address);
            }
        })?;
        for address in addresses.drain(..) {
            fetch(&mut page)?;
            memory.install_at(address, &page)?;
        }
    }
}

/// Runs a handler and a faulter beside each other; the result is the faulter's.
///
/// A handler that fails would leave the faulter waiting for ever: it then installs everything that is missing.
fn fault<'scope, 'env: 'scope>(
    scope: &'scope Scope<'scope, 'env>,
    memory: &'env LazyMemory,
    cores: Cores,
    extent: Extent,
    fetch: impl FnMut(&mut [u8; PAGE]) -> anyhow::Result<()> + Send + 'scope,
) -> anyhow::Result<Histogram<u64>> {
    let (stop, stopped) = UnixStream::pair()?;
    let handler = scope.spawn(move || {
        let done = keep_on(cores.handler).and_then(|()| handle(memory, &stopped, fetch));
        if done.is_err() {
            (0..memory.pages()).for_each(|page| drop(memory.uffd.zero(memory.address(page), PAGE as u64)));
        }
        done
    });
    let faulter = scope.spawn(move || {
        // Its end is the handler's.
        let _stop = stop;
        keep_on(cores.faulter)?;
        touch_all(memory, WARM_UP + extent.samples)
    });
    let latencies = join(faulter)?;
    join(handler)?;
    Ok(latencies)
}

pub(super) fn wake(cores: Cores, extent: Extent) -> anyhow::Result<Found> {
    let memory = LazyMemory::new(WARM_UP + extent.samples)?;
    let latencies = std::thread::scope(|scope| fault(scope, &memory, cores, extent, |_| Ok(())))?;
    Ok(Found { latencies: Some(latencies), gib_per_s: None })
}

pub(super) fn round_trip(cores: Cores, extent: Extent) -> anyhow::Result<Found> {
    let (client, server) = connection()?;
    let latencies = std::thread::scope(|scope| {
        let (client, server) = (&client, &server);
        let serving = scope.spawn(move || keep_on(cores.server).and_then(|()| serve(server)));
        let asking = scope.spawn(move || {
            let _stop = Stop(client);
            keep_on(cores.handler)?;
            let mut page = [0; PAGE];
            let mut histogram = Histogram::new(3)?;
            for i in 0..WARM_UP + extent.samples {
                let begun = monotonic_ns();
                ask(client, &mut page)?;
                if i >= WARM_UP {
                    histogram.record(monotonic_ns() - begun)?;
                }
            }
            Ok(histogram)
        });
        let latencies = join(asking);
        join(serving)?;
        latencies
    })?;
    Ok(Found { latencies: Some(latencies), gib_per_s: None })
}

pub(super) fn end_to_end(cores: Cores, extent: Extent) -> anyhow::Result<Found> {
    let memory = LazyMemory::new(WARM_UP + extent.samples)?;
    let (client, server) = connection()?;
    let latencies =
        std::thread::scope(|scope| served_fault(scope, &memory, (&client, &server), cores, extent))?;
    Ok(Found { latencies: Some(latencies), gib_per_s: None })
}

/// Faults that are resolved over a connection.
fn served_fault<'scope, 'env: 'scope>(
    scope: &'scope Scope<'scope, 'env>,
    memory: &'env LazyMemory,
    (client, server): (&'env TcpStream, &'env TcpStream),
    cores: Cores,
    extent: Extent,
) -> anyhow::Result<Histogram<u64>> {
    let serving = scope.spawn(move || keep_on(cores.server).and_then(|()| serve(server)));
    let latencies = {
        let _stop = Stop(client);
        fault(scope, memory, cores, extent, |page| ask(client, page))
    };
    join(serving)?;
    latencies
}

pub(super) fn end_to_end_with_push(cores: Cores, extent: Extent) -> anyhow::Result<Found> {
    let faulted = WARM_UP + extent.samples;
    // One address space and one userfaultfd, as in a move: the push fills what lies behind the pages that are
    // touched, again and again.
    let pushed = extent.bytes.min(PUSHED_BYTES) / PAGE;
    let memory = LazyMemory::warmed(faulted + pushed)?;
    let (client, server) = connection()?;
    let (receiver, sender) = connection()?;
    let (begun, over, installed) = (Barrier::new(2), AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (memory, begun, over, installed) = (&memory, &begun, &over, &installed);
        let (sender, receiver) = (&sender, &receiver);
        let sending = scope.spawn(move || {
            keep_on(cores.push)?;
            let chunk = vec![3; CHUNK];
            // Ends when the connection is shut.
            while { sender }.write_all(&chunk).is_ok() {}
            Ok(())
        });
        let receiving = scope.spawn(move || {
            // Hanging up at this end would leave the other one with a full queue.
            let _stop = Stop(sender);
            begun.wait();
            keep_on(cores.push)?;
            let mut chunk = vec![0; CHUNK];
            let (mut page, mut full) = (faulted, false);
            while !over.load(Relaxed) {
                { receiver }.read_exact(&mut chunk).context("the push")?;
                if page + CHUNK / PAGE > faulted + pushed {
                    (page, full) = (faulted, true);
                }
                if full {
                    // A chunk at a time: dropping all of it at once would be a stall that no move has.
                    memory.discard(page..page + CHUNK / PAGE)?;
                }
                memory.install_at(memory.address(page), &chunk)?;
                page += CHUNK / PAGE;
                installed.fetch_add(CHUNK as u64, Relaxed);
            }
            Ok(())
        });
        begun.wait();
        let start = (Instant::now(), installed.load(Relaxed));
        let latencies = served_fault(scope, memory, (&client, &server), cores, extent);
        let bytes = installed.load(Relaxed) - start.1;
        let took = start.0.elapsed();
        over.store(true, Relaxed);
        join(receiving)?;
        join(sending)?;
        Ok(Found {
            latencies: Some(latencies?),
            gib_per_s: Some(super::rates::gib(bytes) / took.as_secs_f64()),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Cores = Cores { faulter: None, handler: None, server: None, push: None };
    const FEW: Extent = Extent { samples: 100, bytes: 1 << 20 };

    #[test]
    fn a_round_trip_is_measured_as_often_as_asked() {
        let found = round_trip(FREE, FEW).unwrap();
        assert_eq!(found.latencies.unwrap().len(), 100);
    }

    #[test]
    #[ignore = "needs root: userfaultfd"]
    fn faults_are_measured_as_often_as_asked() {
        for probe in [wake, end_to_end, end_to_end_with_push] {
            assert_eq!(probe(FREE, FEW).unwrap().latencies.unwrap().len(), 100);
        }
    }

    #[test]
    #[ignore = "needs root: userfaultfd"]
    fn a_handler_that_fails_leaves_nobody_waiting() {
        let memory = LazyMemory::new(WARM_UP + FEW.samples).unwrap();
        let failing = |_: &mut [u8; PAGE]| Err(anyhow!("no page"));
        let result = std::thread::scope(|scope| fault(scope, &memory, FREE, FEW, failing));
        assert!(result.unwrap_err().to_string().contains("no page"));
    }
}
