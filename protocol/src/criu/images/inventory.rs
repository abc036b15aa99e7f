//! `inventory.img`: the format of the other images, and what restore has to be told.

use super::error::DecodeError;
use super::framing::{ImageKind, Records};
use super::{messages, parse, required};
use crate::criu::limits::MAX_RUN_ID_BYTES;

const MESSAGE: &str = "inventory_entry";
/// Image format without common magic words; nothing that can be lazy was ever written in it.
const VERSION_1: u32 = 1;
/// The image format of every CRIU that has lazy pages (CRIU calls it V1.1).
pub(super) const VERSION_1_1: u32 = 2;

/// The security module whose labels are in the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lsm {
    /// None.
    None,
    /// SELinux.
    Selinux,
    /// AppArmor.
    Apparmor,
    /// A number this program does not know.
    Unknown(i32),
}

/// How the dump locked the network; restore unlocks it the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkLock {
    /// iptables rules. Also what CRIU assumes for images that do not say.
    Iptables,
    /// An nftables table named after [`Inventory::dump_criu_run_id`].
    Nftables,
    /// Not at all (`--network-lock skip`).
    Skip,
    /// A number this program does not know.
    Unknown(u32),
}

/// `inventory_entry`, as far as it matters to a move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inventory {
    /// Security module of the dumped tasks.
    pub lsm: Lsm,
    /// Uptime of the source at the dump, in µs; `None` from old CRIUs.
    pub dump_uptime_us: Option<u64>,
    /// The tasks were dumped with `--tcp-close`; restore must be called with it too.
    pub tcp_close: bool,
    /// How the network was locked.
    pub network_lock_method: NetworkLock,
    /// Id of the dump, a UUID in text form (letters, digits and dashes only); `None` from
    /// older CRIUs.
    pub dump_criu_run_id: Option<String>,
    /// The tasks were dumped with `--allow-uprobes`; restore must be called with it too.
    pub allow_uprobes: bool,
}

impl Default for Inventory {
    fn default() -> Self {
        Self {
            lsm: Lsm::None,
            dump_uptime_us: None,
            tcp_close: false,
            network_lock_method: NetworkLock::Iptables,
            dump_criu_run_id: None,
            allow_uprobes: false,
        }
    }
}

/// Decodes `inventory.img`.
///
/// # Errors
/// [`DecodeError`]; [`DecodeError::VersionOne`] and [`DecodeError::UnknownVersion`] for formats other than 2.
pub fn read_inventory(image: &[u8]) -> Result<Inventory, DecodeError> {
    let raw: messages::InventoryEntry = parse(MESSAGE, Records::only(ImageKind::Inventory, image)?)?;
    match required(raw.img_version, MESSAGE, "img_version")? {
        VERSION_1_1 => {}
        VERSION_1 => return Err(DecodeError::VersionOne { kind: ImageKind::Inventory }),
        version => return Err(DecodeError::UnknownVersion(version)),
    }
    Ok(Inventory {
        lsm: match raw.lsmtype.unwrap_or(0) {
            0 => Lsm::None,
            1 => Lsm::Selinux,
            2 => Lsm::Apparmor,
            other => Lsm::Unknown(other),
        },
        dump_uptime_us: raw.dump_uptime,
        tcp_close: raw.tcp_close.unwrap_or(false),
        network_lock_method: match raw.network_lock_method.unwrap_or(0) {
            0 => NetworkLock::Iptables,
            1 => NetworkLock::Nftables,
            2 => NetworkLock::Skip,
            other => NetworkLock::Unknown(other),
        },
        dump_criu_run_id: raw.dump_criu_run_id.map(run_id).transpose()?,
        allow_uprobes: raw.allow_uprobes.unwrap_or(false),
    })
}

fn run_id(bytes: Vec<u8>) -> Result<String, DecodeError> {
    let plain = bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-');
    if !plain || bytes.len() > MAX_RUN_ID_BYTES {
        return Err(DecodeError::RunId);
    }
    String::from_utf8(bytes).map_err(|_| DecodeError::RunId)
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::super::build::{frame, write_inventory};
    use super::*;

    fn read(raw: &messages::InventoryEntry) -> Result<Inventory, DecodeError> {
        read_inventory(&frame(ImageKind::Inventory, [raw.encode_to_vec()]))
    }

    fn version(img_version: Option<u32>) -> messages::InventoryEntry {
        messages::InventoryEntry { img_version, ..Default::default() }
    }

    #[test]
    fn what_is_written_is_read() {
        let inventory = Inventory {
            lsm: Lsm::Apparmor,
            dump_uptime_us: Some(123_456_789),
            tcp_close: true,
            network_lock_method: NetworkLock::Skip,
            dump_criu_run_id: Some("21327b36-5d81-4f09-b579-841436f6c963".to_owned()),
            allow_uprobes: true,
        };
        assert_eq!(read_inventory(&write_inventory(&inventory)).unwrap(), inventory);
        assert_eq!(read_inventory(&write_inventory(&Inventory::default())).unwrap(), Inventory::default());
    }

    /// As CRIU 4.1.1 writes it: with `root_ids` and `plugins_entry`, which are skipped.
    #[test]
    fn fields_of_criu_4_1_1_are_read() {
        let record = [
            &[0x08, 2, 0x10, 1][..],                        // img_version, fdinfo_per_id
            &[0x1a, 2, 0x08, 1],                            // root_ids
            &[0x20, 1, 0x28, 1, 0x30, 0],                   // ns_per_id, root_cg_set, lsmtype
            &[0x58, 1, 0x62, 0, 0x6a, 3, b'a', b'-', b'1'], // network_lock_method, plugins, run id
        ]
        .concat();
        let inventory = read_inventory(&frame(ImageKind::Inventory, [record])).unwrap();
        assert_eq!(inventory.network_lock_method, NetworkLock::Nftables);
        assert_eq!(inventory.dump_criu_run_id.as_deref(), Some("a-1"));
        assert!(!inventory.tcp_close);
    }

    #[test]
    fn version_one_is_refused() {
        assert!(matches!(read(&version(Some(1))), Err(DecodeError::VersionOne { .. })));
    }

    #[test]
    fn unknown_version_is_refused() {
        assert!(matches!(read(&version(Some(3))), Err(DecodeError::UnknownVersion(3))));
        assert!(matches!(read(&version(Some(0))), Err(DecodeError::UnknownVersion(0))));
    }

    #[test]
    fn missing_version_is_refused() {
        let error = read(&version(None)).unwrap_err();
        assert!(matches!(error, DecodeError::FieldMissing { field: "img_version", .. }));
    }

    #[test]
    fn run_id_that_is_no_uuid_is_refused() {
        for id in [&b"x; reboot"[..], &[0xff], &[b'a'; 37]] {
            let raw = messages::InventoryEntry { dump_criu_run_id: Some(id.to_vec()), ..version(Some(2)) };
            assert!(matches!(read(&raw), Err(DecodeError::RunId)), "{id:?}");
        }
    }

    #[test]
    fn field_of_another_type_is_refused() {
        let error = read_inventory(&frame(ImageKind::Inventory, [vec![0x0a, 1, 2]])).unwrap_err();
        assert!(matches!(error, DecodeError::Protobuf { message: MESSAGE, .. }));
    }
}
