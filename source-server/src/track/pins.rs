//! Writes that write protection does not see: through a pin that was there before the protection.
//!
//! A device that fills memory of a task (`O_DIRECT` reads, buffers registered with `io_uring`) got hold of the pages when the
//! request was made, and does not ask again. So a task that has a descriptor for such requests cannot be followed by
//! protection. Look for it after the scan: whoever opens one later pins what is protected already, and that is noted.

use std::fs;
use std::io;

/// `O_DIRECT` on x86-64, the architecture that is tracked.
const O_DIRECT: u32 = 0o40000;

/// What in this process may write to its memory unseen, if anything can.
///
/// # Errors
/// `NotFound` if it is gone.
pub fn of(pid: u32) -> io::Result<Option<&'static str>> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        // Closed meanwhile.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        if target.as_os_str() == "anon_inode:[io_uring]" {
            return Ok(Some("it has an io_uring"));
        }
        // It may protect pages itself, where ours were.
        if target.as_os_str() == "anon_inode:[userfaultfd]" {
            return Ok(Some("it has a userfaultfd"));
        }
        let info = format!("/proc/{pid}/fdinfo/{}", entry.file_name().to_string_lossy());
        if fs::read_to_string(info).is_ok_and(|info| is_direct(&info)) {
            return Ok(Some("it has a file open with O_DIRECT"));
        }
    }
    Ok(None)
}

fn is_direct(info: &str) -> bool {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    flags
        .and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok())
        .is_some_and(|flags| flags & O_DIRECT != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    #[test]
    fn reads_flags() {
        assert!(is_direct("pos:\t0\nflags:\t0140002\nmnt_id:\t27\n"));
        assert!(!is_direct("pos:\t0\nflags:\t0100002\nmnt_id:\t27\n"));
        assert!(!is_direct("nonsense"));
    }

    #[test]
    fn finds_a_direct_descriptor() {
        let me = std::process::id();
        assert_eq!(of(me).unwrap(), None);
        let direct = i32::try_from(O_DIRECT).unwrap();
        let exe = std::env::current_exe().unwrap();
        let Ok(file) = fs::File::options().read(true).custom_flags(direct).open(exe) else {
            eprintln!("skipped: no O_DIRECT on this file system");
            return;
        };
        assert!(of(me).unwrap().is_some());
        drop(file);
        assert_eq!(of(me).unwrap(), None);
    }
}
