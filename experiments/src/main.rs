//! experiments binary.
fn main() {}
