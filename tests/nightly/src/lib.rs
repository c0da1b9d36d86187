//! How much a test does: a little in the ordinary run, all of it in `cargo xtask test --nightly` and
//! `cargo xtask spec`.
//!
//! For what is slow only because it does the same again and again. `rounds` in `tests/e2e/conftest.py` is the same
//! for the end-to-end tests.

/// The variable that says that the run is a nightly one, whatever its value.
pub const VARIABLE: &str = "FIRN_NIGHTLY";

/// Rounds of a test: `few` ordinarily, `many` nightly.
pub fn rounds<T>(few: T, many: T) -> T {
    if std::env::var_os(VARIABLE).is_some() { many } else { few }
}
