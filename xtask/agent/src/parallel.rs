//! The first parallel port of a PC, for an emulator that puts what is printed there into a file.
//!
//! It costs three port writes a byte, where the serial port would make the machine wait for each, and
//! is for bytes of any value. The port has no driver in the host VM's kernels: IEEE 1284's
//! compatibility mode, driven by hand.

use std::io::{self, Write};

/// Data register.
const DATA: u16 = 0x378;

/// Control register.
const CONTROL: u16 = DATA + 2;

/// Control: the printer is selected, and not to initialise itself.
const IDLE: u8 = 0x0c;

/// Control: the same with a byte on the data lines.
const STROBE: u8 = IDLE | 1;

/// The port, for the thread that opened it.
pub struct Parallel {
    /// Permission to use ports is the thread's.
    not_send: std::marker::PhantomData<*const ()>,
}

impl Parallel {
    /// Takes the port; only root may.
    pub fn open() -> io::Result<Self> {
        // SAFETY: changes which ports this thread may use, and reads no memory.
        if unsafe { libc::ioperm(DATA.into(), 3, 1) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let port = Self { not_send: std::marker::PhantomData };
        port.out(CONTROL, IDLE);
        Ok(port)
    }

    /// Writes one of the port's registers.
    fn out(&self, register: u16, value: u8) {
        debug_assert!((DATA..=CONTROL).contains(&register));
        // SAFETY: `open` got this thread, which `self` can't leave, the permission for these three
        // registers. They control a printer: no device there reads or writes memory.
        unsafe {
            std::arch::asm!(
                "out dx, al",
                in("dx") register,
                in("al") value,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}

impl Write for Parallel {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.out(DATA, byte);
            self.out(CONTROL, STROBE);
            self.out(CONTROL, IDLE);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
