//! One side of the session protocol, played by the test.
