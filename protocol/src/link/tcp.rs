//! TCP sockets whose congestion control is chosen before there is a connection.
//!
//! BBR, a common default, paces loopback and data-centre links far below their rate and adds milliseconds to single
//! requests. Cubic is built into every kernel that has not removed it. A connection that was made under BBR goes on pacing
//! whatever is chosen for it later: the kernel takes back the algorithm, not the timer.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};

const CONGESTION_CONTROL: &[u8] = b"cubic";

/// Connects within `limit`.
///
/// # Errors
/// The errno of `connect(2)`.
pub fn connect(addr: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    // A kernel without it keeps its own choice.
    let _ = socket.set_tcp_congestion(CONGESTION_CONTROL);
    socket.connect_timeout(&addr.into(), limit)?;
    Ok(socket.into())
}

/// Listens; what connects inherits the choice.
///
/// # Errors
/// The errno of `bind(2)` or `listen(2)`.
pub fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(addr)?;
    let _ = SockRef::from(&listener).set_tcp_congestion(CONGESTION_CONTROL);
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_have_the_choice() {
        let listener = listen(([127, 0, 0, 1], 0).into()).unwrap();
        let dialled = connect(listener.local_addr().unwrap(), Duration::from_secs(5)).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        for end in [&dialled, &accepted] {
            let chosen = SockRef::from(end).tcp_congestion().unwrap();
            assert!(chosen.starts_with(CONGESTION_CONTROL), "{chosen:?}");
        }
    }
}
