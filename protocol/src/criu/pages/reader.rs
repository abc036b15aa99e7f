//! Reading pages: the index with the pages files of its levels.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::error::PagesError;
use super::index::{Location, PageIndex};
use crate::criu::checkpoint::{ImageDir, ImageError, ImageName};
use crate::criu::images::{self, Pagemap};
use crate::units::{ImageAddr, PAGE_SIZE, TaskId};

/// Reads the pages of one task from an image directory and its parents. Reads do not move a file position, so
/// threads may share a reader.
///
/// Holes that `--auto-dedup` punched into a pages file read as zero and cannot be told from pages of zeros: keep
/// such directories for the restore they were made for.
#[derive(Debug)]
pub struct PageReader {
    index: PageIndex,
    /// One for each level; `None` if the level has no data.
    files: Vec<Option<PagesFile>>,
}

#[derive(Debug)]
struct PagesFile {
    file: File,
    path: PathBuf,
}

impl PageReader {
    /// Opens the pages of `task` in `dir`. All pages files are checked to be as long as their pagemaps say.
    ///
    /// # Errors
    /// [`PagesError::Image`] if a pagemap cannot be read or the task has none, [`PagesError::Truncated`] if a pages
    /// file is too short or missing.
    pub fn open(dir: &Path, task: TaskId) -> Result<Self, PagesError> {
        let name = ImageName::Pagemap(task);
        let mut levels: Vec<(ImageDir, Pagemap)> = Vec::new();
        for dir in ImageDir::open(dir)?.chain()? {
            match dir.decode_optional(name, images::read_pagemap)? {
                Some(pagemap) => levels.push((dir, pagemap)),
                None if levels.is_empty() => return Err(ImageError::Missing { path: dir.path(name) }.into()),
                // The task is younger than this parent.
                None => break,
            }
        }
        let ids: Vec<u32> = levels.iter().map(|(_, pagemap)| pagemap.head.pages_id).collect();
        let (dirs, pagemaps): (Vec<ImageDir>, Vec<_>) =
            levels.into_iter().map(|(dir, pagemap)| (dir, pagemap.entries)).unzip();
        let index = PageIndex::new(pagemaps)?;
        let files = dirs
            .iter()
            .zip(ids)
            .enumerate()
            .map(|(level, (dir, id))| PagesFile::open(dir, id, index.data_bytes(level)))
            .collect::<Result<_, _>>()?;
        Ok(Self { index, files })
    }

    /// Where the pages are.
    #[must_use]
    pub const fn index(&self) -> &PageIndex {
        &self.index
    }

    /// Reads pages from `addr` on into the front of `buf`: as many whole ones as fit, up to the first that is not in
    /// the images. Gives how many; 0 only if `buf` is shorter than a page.
    ///
    /// # Errors
    /// [`PagesError::NotInImages`] if already the first page is elsewhere, [`PagesError::Read`] if the system fails.
    pub fn read(&self, addr: ImageAddr, buf: &mut [u8]) -> Result<usize, PagesError> {
        let wanted = buf.len() / PAGE_SIZE;
        let mut done = 0;
        let mut rest = buf;
        let mut next = Some(addr);
        while let Some(addr) = next.filter(|_| done < wanted) {
            let (level, offset, contiguous) = match self.index.locate(addr) {
                Location::Data { level, offset, contiguous_pages } => (level, offset, contiguous_pages),
                location if done == 0 => return Err(PagesError::NotInImages { addr, location }),
                _ => break,
            };
            let pages = usize::try_from(contiguous).unwrap_or(usize::MAX).min(wanted - done);
            let Some((part, tail)) = rest.split_at_mut_checked(pages.saturating_mul(PAGE_SIZE)) else {
                break;
            };
            // A level with data always has a file, see `PagesFile::open`.
            let Some(file) = self.files.get(level).and_then(Option::as_ref) else {
                return Err(PagesError::NotInImages { addr, location: Location::Missing { level } });
            };
            file.read(addr, offset, part)?;
            rest = tail;
            done += pages;
            next = u64::try_from(pages).ok().and_then(|pages| addr.checked_add(pages));
        }
        Ok(done)
    }
}

impl PagesFile {
    /// Opens `pages-<id>.img`, if the level has any data: CRIU does not create empty images.
    fn open(dir: &ImageDir, id: u32, needed: u64) -> Result<Option<Self>, PagesError> {
        if needed == 0 {
            return Ok(None);
        }
        let name = ImageName::Pages(id);
        let path = dir.path(name);
        match dir.open_image(name)? {
            Some((file, found)) if found >= needed => Ok(Some(Self { file, path })),
            Some((_, found)) => Err(PagesError::Truncated { path, needed, found }),
            None => Err(PagesError::Truncated { path, needed, found: 0 }),
        }
    }

    fn read(&self, addr: ImageAddr, offset: u64, buf: &mut [u8]) -> Result<(), PagesError> {
        self.file.read_exact_at(buf, offset).map_err(|source| PagesError::Read {
            addr,
            path: self.path.clone(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;
    use crate::criu::images::{PageFlags, PagemapEntry, PagemapHead};
    use crate::units::PageRun;

    const TASK: TaskId = TaskId(5);

    fn page(number: u64) -> ImageAddr {
        ImageAddr::aligned(number * 4096).unwrap()
    }

    /// A directory with one pagemap, and a pages file of pages filled with each of `data`.
    fn write(dir: &Path, pages_id: u32, entries: &[(u64, u64, PageFlags)], data: &[u8]) {
        let entry = |&(start, pages, flags): &(u64, u64, PageFlags)| PagemapEntry {
            run: PageRun::new(page(start), pages).unwrap(),
            flags,
            wide: false,
        };
        let entries = entries.iter().map(entry).collect();
        let pagemap = Pagemap { head: PagemapHead { pages_id }, entries };
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("pagemap-5.img"), images::write_pagemap(&pagemap)).unwrap();
        let data: Vec<u8> = data.iter().flat_map(|byte| [*byte; PAGE_SIZE]).collect();
        std::fs::write(dir.join(format!("pages-{pages_id}.img")), data).unwrap();
    }

    /// Pages 1 to 6: two here, two in the parent, one left on the source, one here.
    fn two_levels() -> TempDir {
        let dir = TempDir::new().unwrap();
        let top = [
            (1, 2, PageFlags::PRESENT),
            (3, 2, PageFlags::PARENT),
            (5, 1, PageFlags::LAZY),
            (6, 1, PageFlags::PRESENT),
        ];
        write(&dir.path().join("top"), 3, &top, &[1, 2, 6]);
        write(&dir.path().join("old"), 1, &[(2, 3, PageFlags::PRESENT)], &[0xee, 3, 4]);
        symlink("../old", dir.path().join("top/parent")).unwrap();
        dir
    }

    fn read(reader: &PageReader, number: u64, pages: usize) -> Result<Vec<u8>, PagesError> {
        let mut buf = vec![0xff; pages * PAGE_SIZE];
        let read = reader.read(page(number), &mut buf)?;
        assert!(buf[read * PAGE_SIZE..].iter().all(|byte| *byte == 0xff));
        let pages = buf.chunks(PAGE_SIZE).take(read);
        Ok(pages.map(|page| if page.iter().all(|byte| *byte == page[0]) { page[0] } else { 0xdd }).collect())
    }

    #[test]
    fn pages_are_read_across_entries_and_levels() {
        let dir = two_levels();
        let reader = PageReader::open(&dir.path().join("top"), TASK).unwrap();
        assert_eq!(reader.index().levels(), 2);
        assert_eq!(read(&reader, 1, 10).unwrap(), [1, 2, 3, 4]);
        assert_eq!(read(&reader, 2, 2).unwrap(), [2, 3]);
        assert_eq!(read(&reader, 4, 1).unwrap(), [4]);
        assert_eq!(read(&reader, 6, 3).unwrap(), [6]);
        assert_eq!(read(&reader, 6, 0).unwrap(), []);
    }

    #[test]
    fn a_part_of_a_page_is_not_read() {
        let dir = two_levels();
        let reader = PageReader::open(&dir.path().join("top"), TASK).unwrap();
        let mut buf = [0xff; PAGE_SIZE + 100];
        assert_eq!(reader.read(page(1), &mut buf).unwrap(), 1);
        assert_eq!(buf[PAGE_SIZE..], [0xff; 100]);
    }

    #[test]
    fn pages_that_are_elsewhere_are_refused() {
        let dir = two_levels();
        let reader = PageReader::open(&dir.path().join("top"), TASK).unwrap();
        let location = |number| match read(&reader, number, 1) {
            Err(PagesError::NotInImages { location, .. }) => location,
            other => panic!("{other:?}"),
        };
        assert_eq!(location(5), Location::LazyElsewhere { contiguous_pages: 1 });
        assert_eq!(location(7), Location::Absent);
    }

    #[test]
    fn a_missing_parent_is_told_when_it_is_needed() {
        let dir = two_levels();
        std::fs::remove_dir_all(dir.path().join("old")).unwrap();
        let reader = PageReader::open(&dir.path().join("top"), TASK).unwrap();
        assert_eq!(read(&reader, 1, 10).unwrap(), [1, 2]);
        let error = read(&reader, 3, 1).unwrap_err();
        let missing = Location::Missing { level: 1 };
        assert!(matches!(error, PagesError::NotInImages { location, .. } if location == missing));
    }

    #[test]
    fn a_task_younger_than_its_parent_images_is_read() {
        let dir = two_levels();
        std::fs::remove_file(dir.path().join("old/pagemap-5.img")).unwrap();
        let reader = PageReader::open(&dir.path().join("top"), TASK).unwrap();
        assert_eq!(reader.index().levels(), 1);
    }

    #[test]
    fn a_task_without_pagemap_is_refused() {
        let dir = two_levels();
        let error = PageReader::open(&dir.path().join("top"), TaskId(6)).unwrap_err();
        let PagesError::Image(ImageError::Missing { path }) = error else { panic!("{error}") };
        assert!(path.ends_with("pagemap-6.img"));
    }

    #[test]
    fn truncated_pages_file_is_refused_at_any_level() {
        for (name, needed) in [("top/pages-3.img", 3 * 4096), ("old/pages-1.img", 3 * 4096)] {
            let dir = two_levels();
            let file = File::options().write(true).open(dir.path().join(name)).unwrap();
            file.set_len(needed - 1).unwrap();
            let error = PageReader::open(&dir.path().join("top"), TASK).unwrap_err();
            let PagesError::Truncated { path, needed: told, found } = error else { panic!("{error}") };
            assert_eq!((told, found), (needed, needed - 1));
            assert_eq!(path.file_name(), Path::new(name).file_name());
        }
    }

    #[test]
    fn missing_pages_file_is_refused_only_if_it_is_needed() {
        let dir = TempDir::new().unwrap();
        write(dir.path(), 1, &[(1, 1, PageFlags::LAZY)], &[]);
        std::fs::remove_file(dir.path().join("pages-1.img")).unwrap();
        assert!(PageReader::open(dir.path(), TASK).is_ok());
        write(dir.path(), 1, &[(1, 1, PageFlags::PRESENT)], &[]);
        std::fs::remove_file(dir.path().join("pages-1.img")).unwrap();
        let error = PageReader::open(dir.path(), TASK).unwrap_err();
        assert!(matches!(error, PagesError::Truncated { found: 0, needed: 4096, .. }));
    }

    #[test]
    fn a_pages_file_that_shrinks_is_an_error() {
        let dir = two_levels();
        let reader = PageReader::open(&dir.path().join("top"), TASK).unwrap();
        File::options().write(true).open(dir.path().join("top/pages-3.img")).unwrap().set_len(4096).unwrap();
        let error = read(&reader, 2, 1).unwrap_err();
        let PagesError::Read { source, .. } = error else { panic!("{error}") };
        assert_eq!(source.kind(), ErrorKind::UnexpectedEof);
    }
}
