//! Image files as they arrive.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use protocol::wire::control::ImageChunk;
use protocol::wire::limits::IMAGE_COUNT_MAX;

/// Writes images into a directory; a chunk must continue its file.
#[derive(Debug)]
pub(super) struct ImageWriter {
    dir: PathBuf,
    open: Option<(String, File)>,
    written: HashMap<String, (u64, u64)>,
    /// Bytes that may still be announced: what the file system had free.
    room: u64,
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl ImageWriter {
    /// Makes the directory.
    pub(super) fn new(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let space = statvfs(dir)?;
        let room = space.blocks_available().saturating_mul(space.fragment_size());
        Ok(Self { dir: dir.to_owned(), open: None, written: HashMap::new(), room })
    }

    /// Writes a piece.
    pub(super) fn write(&mut self, chunk: &ImageChunk) -> io::Result<()> {
        let name = &chunk.name;
        let known = self.written.get(name).copied();
        if known.is_none() && self.written.len() >= IMAGE_COUNT_MAX as usize {
            return Err(invalid(format!("the source sends more than {IMAGE_COUNT_MAX} images")));
        }
        if known.is_none() {
            let (size, room) = (chunk.size, self.room);
            let left = room.checked_sub(size);
            self.room = left.ok_or_else(|| {
                invalid(format!("image {name} has {size} bytes, and {room} are free in the work directory"))
            })?;
        }
        let (at, size) = known.unwrap_or((0, chunk.size));
        if chunk.offset != at || chunk.size != size {
            let (offset, now) = (chunk.offset, chunk.size);
            return Err(invalid(format!(
                "image {name} continues at {offset} of {now} bytes, {at} of {size} were due"
            )));
        }
        let file = match &mut self.open {
            Some((open, file)) if open == name => file,
            slot => {
                let options = File::options().create(true).append(true).open(self.dir.join(name))?;
                &mut slot.insert((name.clone(), options)).1
            }
        };
        file.write_all(&chunk.data)?;
        self.written.insert(name.clone(), (at + chunk.data.len() as u64, size));
        Ok(())
    }

    /// Checks that `count` images came, each whole.
    pub(super) fn finish(self, count: u32) -> io::Result<()> {
        if self.written.len() != count as usize {
            return Err(invalid(format!("{} images came, {count} were sent", self.written.len())));
        }
        match self.written.iter().find(|(_, (at, size))| at != size) {
            Some((name, (at, size))) => Err(invalid(format!("image {name} has {at} of {size} bytes"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(name: &str, size: u64, offset: u64, data: &[u8]) -> ImageChunk {
        ImageChunk { name: name.into(), size, offset, data: data.to_vec() }
    }

    #[test]
    fn pieces_make_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ImageWriter::new(dir.path()).unwrap();
        writer.write(&chunk("a.img", 3, 0, b"ab")).unwrap();
        writer.write(&chunk("b.img", 0, 0, b"")).unwrap();
        writer.write(&chunk("a.img", 3, 2, b"c")).unwrap();
        writer.finish(2).unwrap();
        assert_eq!(fs::read(dir.path().join("a.img")).unwrap(), b"abc");
        assert!(fs::read(dir.path().join("b.img")).unwrap().is_empty());
    }

    #[test]
    fn no_more_is_taken_than_there_is_room_for() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ImageWriter::new(dir.path()).unwrap();
        writer.room = 5;
        writer.write(&chunk("a.img", 3, 0, b"ab")).unwrap();
        assert!(writer.write(&chunk("b.img", 3, 0, b"ab")).is_err());
        writer.write(&chunk("a.img", 3, 2, b"c")).unwrap();
        writer.write(&chunk("c.img", 2, 0, b"ab")).unwrap();
        writer.finish(2).unwrap();
    }

    #[test]
    fn gaps_repeats_and_missing_ends_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ImageWriter::new(dir.path()).unwrap();
        assert!(writer.write(&chunk("a.img", 3, 1, b"b")).is_err(), "gap");
        writer.write(&chunk("a.img", 3, 0, b"ab")).unwrap();
        assert!(writer.write(&chunk("a.img", 3, 0, b"ab")).is_err(), "repeat");
        assert!(writer.write(&chunk("a.img", 4, 2, b"c")).is_err(), "another size");
        assert!(writer.finish(1).is_err(), "not whole");
        assert!(ImageWriter::new(dir.path()).unwrap().finish(1).is_err(), "none came");
    }
}
