//! Where the bytes of a page are in a chain of image directories, and reading them.
//!
//! ```text
//!   top       ├─present─┤   ├─parent───────────────┤   ├─lazy─┤      the dump that is restored
//!   parent                  ├─present─┼─parent──┤                    the pre-dump before it
//!   grandparent                       ├─present─┤
//! ```
//!
//! An entry that says *parent* sends the reader one level down, entry by entry. The data of a level is its
//! present pages, one after the other, in the pages file of the task at that level: the offset of a page is the
//! number of present pages below it.

mod error;
mod index;
mod reader;

pub use error::PagesError;
pub use index::{Location, PageIndex};
pub use reader::PageReader;
