//! A connection to a page server that stalls in the middle of the transfer, so that a test can act there.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use socket2::SockRef;

use crate::STEP;

/// How the client sees the connection end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// In order, as if the server had nothing more to say.
    Closed,
    /// With an error.
    Reset,
}

/// A connection through this process. Dropping it ends the connection with an error.
#[derive(Debug)]
pub struct Valve {
    address: SocketAddr,
    stalled: Receiver<()>,
    end: Sender<End>,
}

impl Valve {
    /// A way to the page server at `server`, on which `bytes` come back before it stalls.
    ///
    /// # Panics
    /// If there is no port for it.
    #[must_use]
    pub fn to(server: SocketAddr, bytes: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("a bound socket");
        let (tell, stalled) = channel();
        let (end, told) = channel();
        std::thread::spawn(move || {
            let Ok((client, _)) = listener.accept() else { return };
            let Ok(server) = TcpStream::connect(server) else { return };
            if pass(&client, &server, bytes).is_ok() {
                let _ = tell.send(());
            }
            if told.recv() == Ok(End::Closed) {
                let _ = client.shutdown(Shutdown::Write);
            } else {
                let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
                // The thread that passes requests on ends, and with it the last descriptor of the connection.
                let _ = client.shutdown(Shutdown::Read);
            }
        });
        Self { address, stalled, end }
    }

    /// Where the client finds it.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until so many bytes came that it stalls.
    ///
    /// # Panics
    /// If they do not come.
    #[track_caller]
    pub fn wait_stalled(&self) {
        self.stalled.recv_timeout(STEP).expect("the transfer never came so far");
    }

    /// Ends the client's connection.
    ///
    /// # Panics
    /// If it has ended before.
    #[track_caller]
    pub fn end(self, how: End) {
        self.end.send(how).expect("a connection that has not ended");
    }
}

/// Passes requests on until the client's side ends, and `bytes` of the answers.
fn pass(client: &TcpStream, server: &TcpStream, bytes: usize) -> std::io::Result<()> {
    let (mut requests, mut to_server) = (client.try_clone()?, server.try_clone()?);
    std::thread::spawn(move || std::io::copy(&mut requests, &mut to_server));
    let (mut answers, mut to_client) = (server, client);
    let mut left = bytes;
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        let most = left.min(buffer.len());
        let got = answers.read(&mut buffer[..most])?;
        if got == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        to_client.write_all(&buffer[..got])?;
        left -= got;
    }
    Ok(())
}
