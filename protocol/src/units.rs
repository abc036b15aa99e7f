//! Page units: the only place where a page count meets a shift.
//!
//! Addresses of different spaces are different types and never mix: an [`ImageAddr`] is where a page was
//! when the task was dumped (and what the source is asked for), a [`TaskAddr`] is where the page is in the
//! restored task now. They start equal and drift apart when the task calls `mremap`.

use std::fmt;

/// Size of a page in bytes. Both hosts are checked for it in preflight.
pub const PAGE_SIZE: usize = 4096;
/// [`PAGE_SIZE`] as `u64`, for address arithmetic.
pub const PAGE_BYTES: u64 = 4096;
const PAGE_SHIFT: u32 = 12;

/// Bytes in `pages` pages; saturates instead of wrapping.
#[must_use]
pub const fn pages_to_bytes(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_BYTES)
}

/// Whole pages in `bytes`, rounded down.
#[must_use]
pub const fn bytes_to_pages(bytes: u64) -> u64 {
    bytes >> PAGE_SHIFT
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// The page that contains `address` (low bits cleared).
            #[must_use]
            pub const fn containing(address: u64) -> Self {
                Self(address & !(PAGE_BYTES - 1))
            }

            /// `address` if it is page-aligned.
            #[must_use]
            pub const fn aligned(address: u64) -> Option<Self> {
                if address & (PAGE_BYTES - 1) == 0 { Some(Self(address)) } else { None }
            }

            /// The address as a number.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The address `pages` pages on, or `None` past the end of the address space.
            #[must_use]
            pub const fn checked_add(self, pages: u64) -> Option<Self> {
                match pages.checked_mul(PAGE_BYTES) {
                    Some(bytes) => match self.0.checked_add(bytes) {
                        Some(sum) => Some(Self(sum)),
                        None => None,
                    },
                    None => None,
                }
            }

            /// The address `pages` pages on, in a run that was checked when it was built.
            #[must_use]
            pub const fn add(self, pages: u64) -> Self {
                Self(self.0.wrapping_add(pages.wrapping_mul(PAGE_BYTES)))
            }

            /// Whole pages from `start` up to `self`; 0 if `start` is not below.
            #[must_use]
            pub const fn pages_since(self, start: Self) -> u64 {
                bytes_to_pages(self.0.saturating_sub(start.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// Page-aligned address of a page in the images: where it was in the task when it was dumped.
    ImageAddr
}
address! {
    /// Page-aligned address of a page in the restored task, now.
    TaskAddr
}

impl ImageAddr {
    /// Where the page is right after restore, before any `mremap`.
    #[must_use]
    pub const fn as_restored(self) -> TaskAddr {
        TaskAddr(self.0)
    }
}

/// A task by the pid in its images (the pid in its own PID namespace), never by a host pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(pub u32);

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Contiguous pages of one task, by image address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRun {
    /// Address of the first page.
    pub start: ImageAddr,
    /// Number of pages, never 0 in a checked run.
    pub pages: u64,
}

impl PageRun {
    /// A run, if it has pages and ends inside the address space.
    #[must_use]
    pub const fn new(start: ImageAddr, pages: u64) -> Option<Self> {
        if pages == 0 || start.checked_add(pages).is_none() {
            return None;
        }
        Some(Self { start, pages })
    }

    /// First address behind the run.
    #[must_use]
    pub const fn end(&self) -> ImageAddr {
        self.start.add(self.pages)
    }

    /// Whether the run holds the page at `addr`.
    #[must_use]
    pub fn contains(&self, addr: ImageAddr) -> bool {
        self.start <= addr && addr < self.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_refuse_empty_and_wrapping() {
        assert!(PageRun::new(ImageAddr::containing(0x1000), 0).is_none());
        assert!(PageRun::new(ImageAddr::containing(u64::MAX), 2).is_none());
        let run = PageRun::new(ImageAddr::containing(0x1fff), 3).unwrap();
        assert_eq!(run.start.get(), 0x1000);
        assert_eq!(run.end().get(), 0x4000);
        assert!(run.contains(ImageAddr::containing(0x3fff)));
        assert!(!run.contains(ImageAddr::containing(0x4000)));
    }

    #[test]
    fn page_counts_round_down() {
        assert_eq!(ImageAddr::containing(0x5000).pages_since(ImageAddr::containing(0x2000)), 3);
        assert_eq!(ImageAddr::containing(0x2000).pages_since(ImageAddr::containing(0x5000)), 0);
        assert_eq!(bytes_to_pages(8191), 1);
    }
}
