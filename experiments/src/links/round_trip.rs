//! The round trip of a condition, measured with datagrams before anything else uses the link: what was asked for plus
//! what the wake-ups on this machine add.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::lab::{Host, Lab};

const EXCHANGES: u32 = 30;
/// Longer than any round trip here; what is later is lost.
const LIMIT: Duration = Duration::from_millis(500);

/// The median of some round trips between the source and `to`, where `address` is.
pub(super) fn measure(lab: &Lab, to: Host, address: SocketAddr) -> anyhow::Result<Duration> {
    let bind = |host, address: SocketAddr| {
        let socket = lab.inside(host, || UdpSocket::bind(address))??;
        socket.set_read_timeout(Some(LIMIT))?;
        anyhow::Ok(socket)
    };
    let echo = bind(to, address)?;
    let asking = bind(Host::Source, ([0, 0, 0, 0], 0).into())?;
    asking.connect(echo.local_addr()?)?;
    std::thread::scope(|scope| {
        let echoing = scope.spawn(|| answer(&echo));
        let trips = (0..EXCHANGES).filter_map(|number| exchange(&asking, number).transpose());
        let trips: anyhow::Result<Vec<Duration>> = trips.collect();
        // The end: an empty datagram, again and again, as it may be lost too.
        while !echoing.is_finished() {
            asking.send(&[])?;
            std::thread::yield_now();
        }
        let mut trips = trips?;
        trips.sort_unstable();
        trips.get(trips.len() / 2).copied().context("every datagram was lost")
    })
}

fn answer(echo: &UdpSocket) {
    let mut datagram = [0; 64];
    loop {
        match echo.recv_from(&mut datagram) {
            Ok((0, _)) => return,
            Ok((len, from)) => drop(echo.send_to(&datagram[..len], from)),
            Err(error) if is_timeout(&error) => {}
            Err(_) => return,
        }
    }
}

/// One exchange; nothing if it was lost.
fn exchange(asking: &UdpSocket, number: u32) -> anyhow::Result<Option<Duration>> {
    let (sent, mut received) = (number.to_le_bytes(), [0; 64]);
    let begun = Instant::now();
    asking.send(&sent)?;
    loop {
        match asking.recv(&mut received) {
            Ok(len) if received[..len] == sent => return Ok(Some(begun.elapsed())),
            Ok(_) => {} // the late answer to an earlier one
            Err(error) if is_timeout(&error) => return Ok(None),
            Err(error) => bail!(error),
        }
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
