//! The corpus of hostile input: `fuzz TARGET FILE`, `fuzz seed`, and what `scripts/fuzz` does with it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tests::fuzz::{GROUPS, Group, corpus, examine, find, measure_with, seeds};

const USAGE: &str = "usage: fuzz TARGET FILE         try this input, or all in this folder; TARGET may be a group
       fuzz list                the groups, and the targets of each
       fuzz seed                write the inputs that our encoders make into the corpus
       fuzz unpack GROUP FOLDER  write the corpus of a group into FOLDER, for libFuzzer
       fuzz pack GROUP FOLDER    take what libFuzzer left in FOLDER into the corpus, in place of what it found before
scripts/fuzz looks for inputs that fail.";

/// How names of inputs begin that coverage found.
const FOUND: &str = "found-";

fn main() -> anyhow::Result<()> {
    measure_with(|run| allocation_counter::measure(run).bytes_max);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["list"] => list(),
        ["seed"] => write_seeds()?,
        ["unpack", group, folder] => unpack(group_of(group)?, folder.as_ref())?,
        ["pack", group, folder] => pack(group_of(group)?, folder.as_ref())?,
        [name, what] => replay(name, what.as_ref())?,
        _ => bail!("{USAGE}"),
    }
    Ok(())
}

fn group_of(name: &str) -> anyhow::Result<Group> {
    Group::find(name).with_context(|| format!("{name} is no group of targets: fuzz list"))
}

fn list() {
    for group in GROUPS {
        let names: Vec<_> = group.targets.iter().map(|target| target.name).collect();
        println!("{}: {}", group.name, names.join(" "));
    }
}

fn write_seeds() -> anyhow::Result<()> {
    for seed in seeds::all() {
        let folder = corpus::folder_of(seed.target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(seed.name), seed.data)?;
    }
    Ok(())
}

fn files_in(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    Ok(entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?)
}

fn unpack(group: Group, folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    for (place, target) in (0_u8..).zip(group.targets) {
        for (name, data) in corpus::of(target.name) {
            fs::write(folder.join(format!("{}-{name}", target.name)), [&[place], &data[..]].concat())?;
        }
    }
    Ok(())
}

fn pack(group: Group, folder: &Path) -> anyhow::Result<()> {
    for target in group.targets {
        for (name, _) in corpus::of(target.name).iter().filter(|(name, _)| name.starts_with(FOUND)) {
            fs::remove_file(corpus::folder_of(target.name).join(name))?;
        }
    }
    let mut taken = BTreeMap::<_, u32>::new();
    for file in files_in(folder)? {
        let input = fs::read(&file)?;
        let Some((target, data)) = group.split(&input) else { continue };
        let known = corpus::of(target.name).into_iter().any(|(_, kept)| kept == data);
        if !known {
            // libFuzzer names an input by its hash, or as `unpack` did.
            let name = file.file_name().context("a file has a name")?.to_string_lossy().into_owned();
            let name = name.rsplit('-').next().unwrap_or(&name).chars().take(12).collect::<String>();
            fs::write(corpus::folder_of(target.name).join(format!("{FOUND}{name}")), data)?;
            *taken.entry(target.name).or_default() += 1;
        }
    }
    for (name, count) in taken {
        println!("{name}: {count} inputs found");
    }
    Ok(())
}

fn replay(name: &str, what: &Path) -> anyhow::Result<()> {
    let group = Group::find(name);
    let target = find(name);
    if group.is_none() && target.is_none() {
        bail!("{name} is no target, and no group of them: fuzz list\n{USAGE}");
    }
    for file in if what.is_dir() { files_in(what)? } else { vec![what.to_owned()] } {
        let input = fs::read(&file).with_context(|| file.display().to_string())?;
        let of_group = group.and_then(|group| group.split(&input));
        let Some((target, data)) = target.map(|target| (target, &input[..])).or(of_group) else { continue };
        if let Err(panic) = examine(target, data) {
            bail!("{}: {}: {panic}", target.name, file.display());
        }
    }
    Ok(())
}
