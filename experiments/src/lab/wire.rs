//! What a move crosses: the switch as it is, the switch with a limited rate, or a link of its own that is emulated.

use std::ffi::CStr;
use std::net::Ipv4Addr;

use anyhow::Context;
use kernel::tun::Tun;

use super::{Host, Lab, PREFIX_BITS, Rate, ip};
use crate::emulator::{Emulator, Model, Traffic};

/// The device of the emulated link, on both ends.
const DEVICE: &CStr = c"wan0";
/// Packets that wait until the emulator takes them, a mebibyte of the usual size: a queue that grew longer would be
/// a delay that nobody asked for.
const DEVICE_QUEUE_PACKETS: usize = 700;

/// What joins the source and the destination.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wire {
    /// The switch, as fast as it goes.
    Switch,
    /// The switch; the links of source and destination have this rate.
    Shaped(Rate),
    /// A link of their own, from device to device, beside the switch.
    Emulated(Model),
}

impl Lab {
    /// Hosts whose source and destination are joined by `wire`.
    ///
    /// # Errors
    /// As [`Lab::new`]; if the kernel has no `tbf` or no TUN devices.
    pub fn joined_by(wire: Wire) -> anyhow::Result<Self> {
        let mut lab = Self::new()?;
        match wire {
            Wire::Switch => {}
            Wire::Shaped(rate) => {
                lab.shape(Host::Source, Some(rate))?;
                lab.shape(Host::Destination, Some(rate))?;
            }
            Wire::Emulated(model) => lab.emulate(model)?,
        }
        Ok(lab)
    }

    fn emulate(&mut self, model: Model) -> anyhow::Result<()> {
        let end = |host: Host, address: Ipv4Addr| -> anyhow::Result<Tun> {
            let tun = self.inside(host, || Tun::new(DEVICE))?.context("making a TUN device")?;
            let (namespace, device) = (self.namespace(host), DEVICE.to_str()?);
            ip(["-n", &namespace, "addr", "add", &format!("{address}/{PREFIX_BITS}"), "dev", device])?;
            let (mtu, queue) = (model.mtu.to_string(), DEVICE_QUEUE_PACKETS.to_string());
            // No address of its own making: nothing crosses the link but what is sent on purpose.
            ip(["-n", &namespace, "link", "set", device, "addrgenmode", "none"])?;
            ip(["-n", &namespace, "link", "set", device, "mtu", &mtu, "txqueuelen", &queue, "up"])?;
            Ok(tun)
        };
        let [source, destination] = WAN;
        let ends = [end(Host::Source, source)?, end(Host::Destination, destination)?];
        self.emulator = Some(Emulator::start(ends, model).context("starting the link emulator")?);
        Ok(())
    }

    /// The address at which the destination is reached over what joins it to the source.
    #[must_use]
    pub const fn destination_address(&self) -> Ipv4Addr {
        if self.emulator.is_some() { WAN[1] } else { Host::Destination.address() }
    }

    /// What passed over the emulated link: from the source, and to the source.
    #[must_use]
    pub fn traffic(&self) -> Option<[Traffic; 2]> {
        self.emulator.as_ref().map(Emulator::traffic)
    }
}

/// The addresses on the emulated link: of the source, of the destination.
const WAN: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 78, 0, 1), Ipv4Addr::new(10, 78, 0, 2)];
