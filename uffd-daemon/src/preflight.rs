//! Whether this host can take what a source offers: all of what stands against it, each with its remedy.

use std::path::Path;

use host::criu::Criu;
use host::facts::{self, problem};
use kernel::uffd::{FEATURES_OF_CRIU, Uffd};
use protocol::units::pages_to_bytes;
use protocol::wire::control::{Offer, Problem};

use crate::restore::PidPlace;

/// Memory that must stay free beside the tree.
const RESERVE_BYTES: u64 = 64 << 20;

/// What stands against restoring anything here.
#[must_use]
pub fn host_problems() -> Vec<Problem> {
    let mut found: Vec<Problem> = facts::privileges().into_iter().collect();
    if let Err(error) = Uffd::create(FEATURES_OF_CRIU, false) {
        let remedy =
            "boot a kernel with CONFIG_USERFAULTFD, and run as root or set vm.unprivileged_userfaultfd=1";
        found.push(problem(
            format!("no userfaultfd with fork, remap, remove and unmap events ({error})"),
            remedy,
        ));
    }
    facts::raise_open_files_limit();
    found
}

/// What stands against this offer; `criu` as found here.
#[must_use]
pub fn offer_problems(offer: &Offer, criu: &Criu, place: PidPlace) -> Vec<Problem> {
    let mut found = host_problems();
    if offer.machine != facts::machine() {
        let what = format!("the source is {}, this host is {}", offer.machine, facts::machine());
        found.push(problem(what, "move to a host of the same architecture"));
    }
    let lacking = facts::missing_flags(&offer.cpu_flags, &facts::cpu_flags());
    if !lacking.is_empty() {
        let what = format!("this CPU lacks {}", lacking.join(" "));
        found.push(problem(what, "move to a CPU with the same features"));
    }
    found.extend(version_problem(&offer.criu_version, criu));
    found.extend(memory_problem(offer, facts::available_memory()));
    if place == PidPlace::Host {
        if let Some(pid) = first_used(&offer.pids) {
            found.push(problem(format!("pid {pid} is in use"), "use --pidns auto or new"));
        }
    }
    found.extend(offer.files.iter().filter_map(facts::check_file));
    found
}

/// What pre-copy brought gives its memory back page by page while it is installed: the larger of the two is needed, not both.
fn memory_problem(offer: &Offer, free: u64) -> Option<Problem> {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let (restored, cache) = (offer.memory_bytes, pages_to_bytes(offer.precopy_pages));
    if restored.saturating_add(RESERVE_BYTES) > free {
        let what = format!("{} MiB are needed, {} MiB are available", mib(restored), free >> 20);
        return Some(problem(what, "free memory or move elsewhere"));
    }
    (cache.saturating_add(RESERVE_BYTES) > free).then(|| {
        let what = format!("pre-copy may bring {} MiB, {} MiB are available", mib(cache), free >> 20);
        problem(what, "free memory, or move without pre-copy (--precopy-rounds 0 at the source)")
    })
}

/// Images of a newer CRIU may hold what an older one does not know.
fn version_problem(theirs: &str, ours: &Criu) -> Option<Problem> {
    let numbers = |version: &str| {
        let mut parts = version.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
        Some((parts.next()?.ok()?, parts.next()?.ok()?))
    };
    (numbers(theirs)? > numbers(&ours.version)?).then(|| {
        let what = format!("the source dumps with criu {theirs}, here is {}", ours.version);
        problem(what, "install the same criu on both hosts")
    })
}

/// The first of `pids` that some process or thread here has.
#[must_use]
pub fn first_used(pids: &[u32]) -> Option<u32> {
    pids.iter().copied().find(|pid| Path::new(&format!("/proc/{pid}")).exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::criu::page_server::HeaderLayout;
    use protocol::units::TaskId;

    fn criu() -> Criu {
        Criu { path: "criu".into(), version: "4.1.1".into(), layout: HeaderLayout::Compact }
    }

    fn offer() -> Offer {
        Offer {
            release: String::new(),
            criu_version: "4.1.1".into(),
            machine: facts::machine(),
            cpu_flags: facts::cpu_flags(),
            root: TaskId(1),
            name: "x".into(),
            pids: vec![std::process::id()],
            memory_bytes: 0,
            precopy_pages: 0,
            files: vec![],
            criu_options: vec![],
        }
    }

    fn whats(offer: &Offer, place: PidPlace) -> Vec<String> {
        let here = host_problems();
        let all = offer_problems(offer, &criu(), place);
        all.into_iter().filter(|problem| !here.contains(problem)).map(|problem| problem.what).collect()
    }

    #[test]
    fn what_fits_is_accepted() {
        assert!(whats(&offer(), PidPlace::Auto).is_empty());
    }

    #[test]
    fn the_larger_of_what_is_restored_and_what_is_kept_before_must_fit() {
        let found = |memory_bytes, precopy_pages, free| {
            let offer = Offer { memory_bytes, precopy_pages, ..offer() };
            memory_problem(&offer, free).map(|problem| problem.what)
        };
        let (gib, fits) = (1 << 30, (1 << 30) + RESERVE_BYTES);
        assert_eq!(found(gib, 1 << 18, fits), None);
        assert_eq!(found(gib + 1, 0, fits).unwrap(), "1025 MiB are needed, 1088 MiB are available");
        let precopy = found(gib, (1 << 18) + 1, fits).unwrap();
        assert_eq!(precopy, "pre-copy may bring 1025 MiB, 1088 MiB are available");
        assert!(found(0, u64::MAX, u64::MAX - 1).is_some());
    }

    #[test]
    fn everything_that_is_wrong_is_named_at_once() {
        let bad = Offer {
            criu_version: "4.2".into(),
            machine: "pdp11".into(),
            cpu_flags: "warp".into(),
            memory_bytes: u64::MAX,
            files: vec![protocol::wire::control::FileCheck {
                path: "/nonexistent".into(),
                size: 1,
                build_id: vec![],
            }],
            ..offer()
        };
        let found = whats(&bad, PidPlace::Host).join("\n");
        for word in ["pdp11", "warp", "4.2", "MiB are needed", "/nonexistent", "is in use"] {
            assert!(found.contains(word), "{word}: {found}");
        }
    }
}
