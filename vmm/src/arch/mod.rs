//! Everything that depends on the processor architecture, behind one set of names, so that aarch64
//! can stand beside x86_64 one day.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
