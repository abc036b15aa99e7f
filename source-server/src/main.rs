//! source-server binary.
fn main() {}
