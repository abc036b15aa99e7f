//! Reading directories of /proc and naming files in them, without memory.

use libc::pid_t;

/// Room for directory entries, aligned as they are.
#[repr(align(8))]
pub(super) struct DirectoryRoom(pub(super) [u8; 16 << 10]);

/// The first entry of what getdents64 gave, as a number if it is one, and the rest.
pub(super) fn next_entry(entries: &[u8]) -> Option<(Option<pid_t>, &[u8])> {
    // struct linux_dirent64: inode, offset, u16 length of the entry, u8 type, name with a zero at its end.
    let length = usize::from(u16::from_ne_bytes([*entries.get(16)?, *entries.get(17)?]));
    let (entry, rest) = entries.split_at_checked(length)?;
    let name = entry.get(19..)?.split(|&byte| byte == 0).next()?;
    Some((number(name), rest))
}

/// Decimal digits and nothing else as a number.
pub(super) fn number(text: &[u8]) -> Option<pid_t> {
    let digit = |number: pid_t, &byte: &u8| match byte {
        b'0'..=b'9' => number.checked_mul(10)?.checked_add(pid_t::from(byte - b'0')),
        _ => None,
    };
    if text.is_empty() { None } else { text.iter().try_fold(0, digit) }
}

/// Writes `TID/syscall` and a zero behind it; false if there is no room.
pub(super) fn write_path(path: &mut [u8; 32], tid: pid_t) -> bool {
    let mut digits = [0; 12];
    let (mut first, mut rest) = (digits.len(), tid.unsigned_abs());
    while first > 0 && (rest > 0 || first == digits.len()) {
        first -= 1;
        digits[first] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
    }
    let parts = digits[first..].iter().chain(b"/syscall\0");
    let mut written = 0;
    for (place, &byte) in path.iter_mut().zip(parts) {
        *place = byte;
        written += 1;
    }
    written == digits.len() - first + b"/syscall\0".len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_entries_without_memory() {
        let mut path = [0; 32];
        assert!(write_path(&mut path, 4_194_304));
        assert!(path.starts_with(b"4194304/syscall\0"));
        let entry = |name: &[u8]| {
            let mut entry = vec![0; 24];
            entry[16] = 24;
            entry[19..19 + name.len()].copy_from_slice(name);
            entry
        };
        let both = [entry(b"42"), entry(b"..")].concat();
        let (first, rest) = next_entry(&both).unwrap();
        assert_eq!((first, next_entry(rest).unwrap().0), (Some(42), None));
        assert!(next_entry(&both[..20]).is_none() && next_entry(&[]).is_none());
    }
}
