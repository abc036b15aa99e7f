//! A server for the tests to move: `echo-server ADDRESS:PORT`.
#![forbid(unsafe_code)]

fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).unwrap_or_default();
    tests::echo::serve(address.parse()?)
}
