//! Whether somebody listens in a host.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::bail;

use super::{Host, Lab};
use crate::tool::Tool;

/// Waits until somebody listens on `port` in a host, or is bound to it over UDP. Read from the kernel's tables: a
/// connection made to find out would be taken for the one move that `--once` is about.
pub fn wait_listening(lab: &Lab, host: Host, port: u16, by: &Tool, limit: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    while !lab.inside(host, || is_listening(Path::new("/proc/thread-self/net"), port))? {
        if by.has_ended()? || Instant::now() > deadline {
            bail!("nobody listens on port {port}\n{}", by.last_lines());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn is_listening(net: &Path, port: u16) -> bool {
    let has = |table: &str, state: &str| {
        let text = fs::read_to_string(net.join(table)).unwrap_or_default();
        text.lines().skip(1).any(|line| {
            // "  0: 0200004D:1E61 00000000:0000 0A ...": number, local address, remote address, state
            let mut words = line.split_whitespace().skip(1);
            let local = words.next().unwrap_or_default().ends_with(&format!(":{port:04X}"));
            local && words.nth(1) == Some(state)
        })
    };
    has("tcp", "0A") || has("tcp6", "0A") || has("udp", "07") || has("udp6", "07")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_found_in_the_kernel_s_table_and_a_connection_is_not() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let net = Path::new("/proc/thread-self/net");
        assert!(is_listening(net, port));
        let client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        assert!(!is_listening(net, client.local_addr().unwrap().port()));
        drop(listener);
        assert!(!is_listening(net, port));
    }
}
