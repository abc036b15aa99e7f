//! uffd-daemon binary.
fn main() {}
