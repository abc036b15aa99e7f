//! Hostile input for as long as one likes: `fuzz TARGET SECONDS`, `fuzz TARGET FILE`, `fuzz seed`, `fuzz list`.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use tests::fuzz::{TARGETS, Target, corpus, examine, find, measure_with, seeds, try_mutations};

const USAGE: &str = "usage: fuzz TARGET [SECONDS]   mutate the corpus of TARGET (or `all`), for a minute if not said otherwise
       fuzz TARGET FILE        try this input, or all in this folder
       fuzz list               the targets
       fuzz seed               write the inputs that our encoders make into the corpus";
/// Mutations between two looks at the clock.
const BATCH: u64 = 1000;

fn main() -> anyhow::Result<()> {
    measure_with(|run| allocation_counter::measure(run).bytes_max);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["list"] => TARGETS.iter().for_each(|target| println!("{}", target.name)),
        ["seed"] => write_seeds()?,
        ["all"] => TARGETS.iter().try_for_each(|target| mutate(*target, 60))?,
        ["all", seconds] => TARGETS.iter().try_for_each(|target| mutate(*target, seconds.parse()?))?,
        [name] => mutate(find(name).context(USAGE)?, 60)?,
        [name, what] => match what.parse() {
            Ok(seconds) => mutate(find(name).context(USAGE)?, seconds)?,
            Err(_) => replay(find(name).context(USAGE)?, what.as_ref())?,
        },
        _ => bail!("{USAGE}"),
    }
    Ok(())
}

fn write_seeds() -> anyhow::Result<()> {
    for seed in seeds::all() {
        let folder = corpus::folder_of(seed.target);
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(seed.name), seed.data)?;
    }
    Ok(())
}

fn replay(target: Target, what: &std::path::Path) -> anyhow::Result<()> {
    let files = if what.is_dir() {
        std::fs::read_dir(what)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?
    } else {
        vec![what.to_owned()]
    };
    for file in files {
        let data = std::fs::read(&file).with_context(|| file.display().to_string())?;
        if let Err(panic) = examine(target, &data) {
            bail!("{}: {}: {panic}", target.name, file.display());
        }
    }
    Ok(())
}

/// Mutates until the time is up; other seeds each time, in order from the one that is printed.
fn mutate(target: Target, seconds: u64) -> anyhow::Result<()> {
    let began = Instant::now();
    let first = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() << 32;
    let mut seed = first;
    while began.elapsed() < Duration::from_secs(seconds) {
        if let Err(failure) = try_mutations(target, seed..seed + BATCH) {
            bail!("{failure}");
        }
        seed += BATCH;
    }
    println!("{}: {} inputs from seed {first} on, in {seconds} s: all well", target.name, seed - first);
    Ok(())
}
