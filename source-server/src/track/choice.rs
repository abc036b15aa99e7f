//! Which tracker this host can do.

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use kernel::arena::{Region, Target};
use kernel::pagemap::{Categories, PageMap, Protect, Query, Regions};
use kernel::write_protect::{Registration, WriteTracker};
use protocol::units::PAGE_BYTES;

use super::content::Content;
use super::soft_dirty::{self, SoftDirty};
use super::write_protect::WriteProtect;
use super::{Method, Tracker};

/// A method that cannot be used here, and why.
pub type Refusal = (Method, String);

/// The best tracker that this host can do, and why not the better ones.
#[must_use]
pub fn choose() -> (Box<dyn Tracker>, Vec<Refusal>) {
    let mut refused = Vec::new();
    let mut best = || {
        [Method::WriteProtect, Method::SoftDirty].into_iter().find_map(|method| match of(method) {
            Ok(tracker) => Some(tracker),
            Err(why) => {
                tracing::info!(%method, why, "tracker not usable");
                refused.push((method, why));
                None
            }
        })
    };
    let tracker = best().unwrap_or_else(|| Box::<Content>::default());
    tracing::info!(method = %tracker.method(), "tracker chosen");
    (tracker, refused)
}

/// A tracker of this kind.
///
/// # Errors
/// Why it cannot be used on this host.
pub fn of(method: Method) -> Result<Box<dyn Tracker>, String> {
    Ok(match method {
        Method::WriteProtect => {
            write_protect_works()?;
            Box::<WriteProtect>::default()
        }
        Method::SoftDirty => {
            soft_dirty::works()?;
            Box::<SoftDirty>::default()
        }
        Method::Content => Box::<Content>::default(),
    })
}

/// Tries everything that write protection needs on memory of this process.
fn write_protect_works() -> Result<(), String> {
    if !kernel::inject::IS_SUPPORTED {
        return Err("system calls are injected on x86-64 only".into());
    }
    let failed = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let tracker = WriteTracker::of_self().map_err(failed("asynchronous write protection (Linux 6.7)"))?;
    let mut region = Region::anonymous(1).map_err(failed("map memory"))?;
    let first = written(&tracker, &region)?;
    // Kernels before 6.13, and their long-term releases before the fix, leave the mark of protection on a page that
    // mremap moves: written or not, it would never be reported at its new place.
    region.relocate(Target::Anywhere).map_err(failed("move memory"))?;
    let moved = written(&tracker, &region)?;
    let again = written(&tracker, &region)?;
    match (first, moved, again) {
        (true, true, false) => Ok(()),
        (true, false, _) => Err("this kernel leaves marks on pages that mremap moves".into()),
        _ => Err("this kernel does not note what is written".into()),
    }
}

/// Writes to the page and leaves it as it is from then on: whether the scan reports it.
fn written(tracker: &WriteTracker, region: &Region) -> Result<bool, String> {
    let start = region.address() as u64;
    if region.page(0)[0].load(Relaxed) == 0 {
        region.page(0)[0].store(1, Relaxed);
    }
    match tracker.register(start, PAGE_BYTES) {
        Ok(Registration::Done) => {}
        other => return Err(format!("register memory: {other:?}")),
    }
    let map = PageMap::open(std::process::id()).map_err(|error| format!("open page map: {error}"))?;
    let query = Query {
        all: Categories::WRITTEN,
        any: Categories::PRESENT_OR_SWAPPED,
        report: Categories::NONE,
        protect: Protect::Matching,
    };
    let mut found = false;
    map.scan(start..start + PAGE_BYTES, &query, &mut Regions::default(), |_| found = true)
        .map_err(|error| error.to_string())?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_why_the_better_one_was_not_taken() {
        let (tracker, refused) = choose();
        let methods = refused.iter().map(|(method, _)| *method).chain([tracker.method()]);
        let order = [Method::WriteProtect, Method::SoftDirty, Method::Content];
        assert!(methods.eq(order.into_iter().take(refused.len() + 1)));
        assert!(refused.iter().all(|(_, why)| !why.is_empty()), "{refused:?}");
    }
}
