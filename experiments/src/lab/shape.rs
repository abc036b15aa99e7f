//! Links slower than a virtual cable.

use super::{Host, INTERFACE, Lab, run};

/// A link rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Megabits per second, each way.
    pub mbit: u32,
}

/// Longest a packet waits in a shaped link before it is dropped.
const QUEUE_MS: u32 = 50;
/// A token bucket hands out its tokens at timer ticks: it has to hold what passes in one (4 ms), and a packet of
/// 64 KiB that is only cut up on its way.
const TICKS_PER_SECOND: u32 = 250;
const BURST_BYTES_MIN: u32 = 128 << 10;

impl Rate {
    const fn burst_bytes(self) -> u32 {
        let per_tick = self.mbit.saturating_mul(125_000) / TICKS_PER_SECOND;
        if per_tick > BURST_BYTES_MIN { per_tick } else { BURST_BYTES_MIN }
    }
}

impl Lab {
    /// Limits a host's link in both directions with a token bucket; `None` takes the limit away.
    ///
    /// # Errors
    /// If the kernel has no `tbf`.
    pub fn shape(&self, host: Host, rate: Option<Rate>) -> anyhow::Result<()> {
        let port = host.port();
        for (namespace, interface) in [(self.namespace(host), INTERFACE), (self.switch(), &port)] {
            let mut command = std::process::Command::new("tc");
            command.args(["-n", &namespace, "qdisc"]);
            match rate {
                Some(rate) => {
                    command.args(["replace", "dev", interface, "root", "tbf"]);
                    command.arg("rate").arg(format!("{}mbit", rate.mbit));
                    command.arg("burst").arg(rate.burst_bytes().to_string());
                    command.arg("latency").arg(format!("{QUEUE_MS}ms"));
                }
                None => {
                    command.args(["delete", "dev", interface, "root"]);
                }
            }
            run(&mut command)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_what_passes_in_a_tick() {
        assert_eq!(Rate { mbit: 10 }.burst_bytes(), BURST_BYTES_MIN);
        assert_eq!(Rate { mbit: 1000 }.burst_bytes(), 500_000);
        assert_eq!(Rate { mbit: 10_000 }.burst_bytes(), 5_000_000);
    }
}
