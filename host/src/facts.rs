//! What preflight compares and checks on a host.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use protocol::wire::control::{FileCheck, Problem};

/// A problem and what to do about it.
#[must_use]
pub fn problem(what: impl Into<String>, remedy: impl Into<String>) -> Problem {
    Problem { what: what.into(), remedy: remedy.into() }
}

/// Machine architecture, as `uname -m`.
#[must_use]
pub fn machine() -> String {
    nix::sys::utsname::uname().map(|uts| uts.machine().to_string_lossy().into_owned()).unwrap_or_default()
}

/// CPU feature flags of the first processor, blank-separated.
#[must_use]
pub fn cpu_flags() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
    line.and_then(|line| line.split_once(':')).map_or_else(String::new, |(_, flags)| flags.trim().to_owned())
}

/// Flags of `theirs` that `ours` lacks.
#[must_use]
pub fn missing_flags(theirs: &str, ours: &str) -> Vec<String> {
    let ours: BTreeSet<&str> = ours.split_whitespace().collect();
    theirs.split_whitespace().filter(|flag| !ours.contains(flag)).map(str::to_owned).collect()
}

/// Bytes of memory that can be used without swapping.
#[must_use]
pub fn available_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}

/// Whether this process may do what CRIU needs.
#[must_use]
pub fn privileges() -> Option<Problem> {
    const NEEDED: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (19, "CAP_SYS_PTRACE"), (21, "CAP_SYS_ADMIN")];
    let lacking: Vec<&str> =
        NEEDED.iter().filter(|(number, _)| !has_capability(*number)).map(|(_, name)| *name).collect();
    (!lacking.is_empty()).then(|| {
        problem(format!("no privileges ({})", lacking.join(", ")), "run as root, for example with sudo")
    })
}

/// The number of `CAP_SYS_RESOURCE`.
pub const CAP_SYS_RESOURCE: u32 = 24;

/// Whether this process has the capability of this number, effectively.
#[must_use]
pub fn has_capability(number: u32) -> bool {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let all = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    all >> number & 1 == 1
}

/// A numeric sysctl.
#[must_use]
pub fn sysctl(path: &str) -> Option<u64> {
    fs::read_to_string(Path::new("/proc/sys").join(path)).ok()?.trim().parse().ok()
}

/// The soft limit of open files.
#[must_use]
pub fn open_files_limit() -> u64 {
    nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft)
}

/// Raises the soft limit of open files to the hard one; returns what it is then.
pub fn raise_open_files_limit() -> u64 {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        if soft < hard {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
        }
    }
    open_files_limit()
}

/// What identifies a file: its size, and its build-id if it is an ELF file with one.
///
/// # Errors
/// What the file system says.
pub fn file_check(path: &str) -> io::Result<FileCheck> {
    // A peer names the path: opening a device may do something, and opening a FIFO waits.
    let regular = |metadata: fs::Metadata| match metadata.is_file() {
        true => Ok(metadata.len()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")),
    };
    regular(fs::metadata(path)?)?;
    let flags = nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY;
    let mut file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let size = regular(file.metadata()?)?;
    Ok(FileCheck { path: path.to_owned(), size, build_id: build_id(&mut file).unwrap_or_default() })
}

/// What is wrong with a file that must be the same here, if anything.
#[must_use]
pub fn check_file(wanted: &FileCheck) -> Option<Problem> {
    let path = &wanted.path;
    let found = match file_check(path) {
        Ok(found) => found,
        Err(error) => {
            return Some(problem(format!("{path} cannot be read here ({error})"), "install the same file"));
        }
    };
    if !wanted.build_id.is_empty() && !found.build_id.is_empty() {
        return (wanted.build_id != found.build_id)
            .then(|| problem(format!("{path} is another build here"), "install the same package version"));
    }
    (wanted.size != found.size).then(|| {
        let what = format!("{path} has {} bytes here, {} on the source", found.size, wanted.size);
        problem(what, "bring the same file here")
    })
}

/// The GNU build-id note of a 64-bit ELF file, found through its program headers.
fn build_id(file: &mut fs::File) -> Option<Vec<u8>> {
    const PT_NOTE: u32 = 4;
    const NT_GNU_BUILD_ID: u32 = 3;
    const HEADERS_MAX: u16 = 128;
    const NOTE_MAX: u64 = 64 << 10;
    let mut header = [0; 64];
    file.seek(SeekFrom::Start(0)).ok()?;
    file.read_exact(&mut header).ok()?;
    if header[..6] != *b"\x7fELF\x02\x01" {
        return None;
    }
    let u16_at = |bytes: &[u8], at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |bytes: &[u8], at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |bytes: &[u8], at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let (table, entry, count) = (u64_at(&header, 32)?, u16_at(&header, 54)?, u16_at(&header, 56)?);
    for i in 0..count.min(HEADERS_MAX) {
        let mut program = [0; 56];
        let at = table.checked_add(u64::from(i) * u64::from(entry))?;
        file.seek(SeekFrom::Start(at)).ok()?;
        file.read_exact(&mut program).ok()?;
        if u32_at(&program, 0)? != PT_NOTE {
            continue;
        }
        let (offset, size) = (u64_at(&program, 8)?, u64_at(&program, 32)?.min(NOTE_MAX));
        let mut notes = vec![0; usize::try_from(size).ok()?];
        file.seek(SeekFrom::Start(offset)).ok()?;
        file.read_exact(&mut notes).ok()?;
        let mut rest = &notes[..];
        while rest.len() >= 12 {
            let (name, desc) = (u32_at(rest, 0)? as usize, u32_at(rest, 4)? as usize);
            let kind = u32_at(rest, 8)?;
            let desc_at = 12usize.checked_add(name.checked_next_multiple_of(4)?)?;
            let end = desc_at.checked_add(desc)?;
            if kind == NT_GNU_BUILD_ID && rest.get(12..12 + name)? == b"GNU\0" {
                return Some(rest.get(desc_at..end)?.to_vec());
            }
            rest = rest.get(end.checked_next_multiple_of(4)?..)?;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_agrees_with_itself_and_not_with_another_build() {
        let exe = std::env::current_exe().unwrap();
        let mut check = file_check(exe.to_str().unwrap()).unwrap();
        assert_eq!(check_file(&check), None);
        check.build_id = vec![1; 20];
        check.size += 1;
        assert!(check_file(&check).is_some());
        check.path = "/nonexistent".into();
        assert!(check_file(&check).unwrap().what.contains("/nonexistent"));
    }

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [fifo.to_str().unwrap(), "/dev/null", dir.path().to_str().unwrap()] {
            assert_eq!(file_check(path).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{path}");
        }
    }

    #[test]
    fn build_ids_are_found() {
        let mut file = fs::File::open("/bin/sh").unwrap();
        let id = build_id(&mut file).unwrap_or_default();
        assert!(id.len() >= 8 || !id.is_empty(), "distribution binaries carry a build-id");
    }

    #[test]
    fn flags_are_compared_as_words() {
        assert_eq!(missing_flags("sse sse2 avx", "avx sse2"), ["sse"]);
        assert!(missing_flags("", "a").is_empty());
    }

    #[test]
    fn facts_of_this_host() {
        assert!(!machine().is_empty());
        assert!(available_memory() > 0);
        assert!(sysctl("fs/pipe-max-size").is_some());
        assert!(open_files_limit() > 0);
    }
}
