//! Workloads and experiments.
#![forbid(unsafe_code)]
