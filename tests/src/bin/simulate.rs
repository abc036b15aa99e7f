//! Simulated moves, as many as one likes: `simulate SEEDS [FIRST]`, `simulate --seed SEED`.
#![forbid(unsafe_code)]

use std::time::Instant;

use anyhow::bail;
use tests::simulation::{simulate, simulate_all};

const USAGE: &str = "usage: simulate SEEDS [FIRST]   the moves of so many seeds, from FIRST (0) on
       simulate --seed SEED    one of them";

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (seeds, first) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--seed", seed] => {
            let report = simulate(seed.parse()?, None).map_err(anyhow::Error::msg)?;
            println!("{report:?}");
            return Ok(());
        }
        [seeds] => (seeds.parse()?, 0_u64),
        [seeds, first] => (seeds.parse::<u64>()?, first.parse()?),
        _ => bail!("{USAGE}"),
    };
    let began = Instant::now();
    let sum = simulate_all(first..first + seeds).map_err(anyhow::Error::msg)?;
    println!("{seeds} moves from seed {first} on, in {:.1?}: all well; {sum:?}", began.elapsed());
    Ok(())
}
