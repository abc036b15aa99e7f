//! An archive in the "newc" cpio format, as the kernel unpacks it into its first root file system. Pure.
//!
//! ```text
//! per entry   "070701" and 13 fields of 8 hexadecimal digits: inode, mode, uid, gid, links, time, size,
//!             device (major, minor), node (major, minor), length of the name with its zero, checksum
//!             name, zero, padding to 4 bytes; content, padding to 4 bytes
//! the end     an entry called TRAILER!!!
//! ```

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive that grows.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub(super) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY, (0, 0), &[]);
    }

    /// A file that may be run.
    pub(super) fn program(&mut self, path: &str, content: &[u8]) {
        self.entry(path, PROGRAM, (0, 0), content);
    }

    /// A character device.
    pub(super) fn device(&mut self, path: &str, major_minor: (u32, u32)) {
        self.entry(path, CHARACTER_DEVICE, major_minor, &[]);
    }

    /// The whole archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_stand_as_the_kernel_reads_them() {
        let mut archive = Archive::default();
        archive.directory("dev");
        archive.device("dev/console", (5, 1));
        archive.program("init", b"#!/x");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let (mut at, mut seen) = (0, Vec::new());
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |number: usize| {
                let from = at + 6 + number * 8;
                u32::from_str_radix(std::str::from_utf8(&bytes[from..from + 8]).unwrap(), 16).unwrap()
            };
            let name = at + 110..at + 110 + field(11) as usize;
            let text = std::str::from_utf8(&bytes[name.start..name.end - 1]).unwrap();
            assert_eq!(bytes[name.end - 1], 0);
            let content = name.end.next_multiple_of(4);
            if text == "TRAILER!!!" {
                break;
            }
            let end = content + field(6) as usize;
            seen.push((text.to_owned(), field(1), (field(9), field(10)), bytes[content..end].to_vec()));
            at = end.next_multiple_of(4);
        }
        let expected = [
            ("dev".to_owned(), 0o040_755, (0, 0), Vec::new()),
            ("dev/console".to_owned(), 0o020_600, (5, 1), Vec::new()),
            ("init".to_owned(), 0o100_755, (0, 0), b"#!/x".to_vec()),
        ];
        assert_eq!(seen, expected);
    }
}
