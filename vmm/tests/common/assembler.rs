//! Machine code of tiny guests that print what they can observe of their machine, and change it.

#![allow(dead_code, reason = "each test binary uses its own part")]

/// Absolute addresses are 32 bits: tiny guests live in low memory.
#[derive(Debug, Clone, Default)]
pub struct Code(pub Vec<u8>);

/// General registers in the order of their numbers, without RSP.
pub const REGISTERS: [u8; 15] = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

impl Code {
    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn word(&mut self, word: u32) -> &mut Self {
        self.put(&word.to_le_bytes())
    }

    fn quad(&mut self, quad: u64) -> &mut Self {
        self.put(&quad.to_le_bytes())
    }

    /// `idle: cmpb $0,flag; je idle`
    pub fn wait_for(&mut self, flag: u32) -> &mut Self {
        self.put(&[0x80, 0x3c, 0x25]).word(flag).put(&[0, 0x74, 0xf6])
    }

    /// `mov $n,%ecx; l: loop l`
    pub fn delay(&mut self, n: u32) -> &mut Self {
        self.put(&[0xb9]).word(n).put(&[0xe2, 0xfe])
    }

    /// Writes to `n` pages from `address` on: `mov $n,%ecx; mov $address,%ebx;
    /// l: mov %rcx,(%rbx); add $0x1000,%ebx; loop l`
    pub fn dirty(&mut self, address: u32, n: u32) -> &mut Self {
        self.put(&[0xb9]).word(n).put(&[0xbb]).word(address);
        self.put(&[0x48, 0x89, 0x0b, 0x81, 0xc3, 0, 0x10, 0, 0, 0xe2, 0xf5])
    }

    /// Ends a loop over what was put since `start`: `dec %esi; jnz start`. ESI counts.
    pub fn repeat_from(&mut self, start: usize) -> &mut Self {
        let back = self.0.len() + 4 - start;
        assert!(back <= 128, "too far for a short jump");
        self.put(&[0xff, 0xce, 0x75, (back as u8).wrapping_neg()])
    }

    /// `l: jmp l`
    pub fn halt(&mut self) -> &mut Self {
        self.put(&[0xeb, 0xfe])
    }

    /// `mov %reg,address`
    pub fn store(&mut self, register: u8, address: u32) -> &mut Self {
        self.put(&[0x48 | register >> 3 << 2, 0x89, 4 | (register & 7) << 3, 0x25]).word(address)
    }

    /// `movabs $value,%reg`
    pub fn load_immediate(&mut self, register: u8, value: u64) -> &mut Self {
        self.put(&[0x48 | register >> 3, 0xb8 | register & 7]).quad(value)
    }

    /// `mov address,%rax`
    pub fn load(&mut self, address: u32) -> &mut Self {
        self.put(&[0x48, 0x8b, 0x04, 0x25]).word(address)
    }

    /// Lets SSE instructions run: `mov %cr4,%rax; or $OSFXSR|OSXMMEXCPT,%eax; mov %rax,%cr4`
    pub fn enable_sse(&mut self) -> &mut Self {
        self.put(&[0x0f, 0x20, 0xe0, 0x0d, 0, 6, 0, 0, 0x0f, 0x22, 0xe0])
    }

    /// `movups %xmmN,address`
    pub fn store_xmm(&mut self, register: u8, address: u32) -> &mut Self {
        self.put(&[0x0f, 0x11, 4 | register << 3, 0x25]).word(address)
    }

    /// `movups address,%xmmN`
    pub fn load_xmm(&mut self, register: u8, address: u32) -> &mut Self {
        self.put(&[0x0f, 0x10, 4 | register << 3, 0x25]).word(address)
    }

    /// `mov %drN,%rax`
    pub fn load_debug(&mut self, register: u8) -> &mut Self {
        self.put(&[0x0f, 0x21, 0xc0 | register << 3])
    }

    /// `movabs $value,%rax; mov %rax,%drN`
    pub fn set_debug(&mut self, register: u8, value: u64) -> &mut Self {
        self.load_immediate(0, value).put(&[0x0f, 0x23, 0xc0 | register << 3])
    }

    /// `mov %cr2,%rax`
    pub fn load_cr2(&mut self) -> &mut Self {
        self.put(&[0x0f, 0x20, 0xd0])
    }

    /// `movabs $value,%rax; mov %rax,%cr2`
    pub fn set_cr2(&mut self, value: u64) -> &mut Self {
        self.load_immediate(0, value).put(&[0x0f, 0x22, 0xd0])
    }

    /// Reads an MSR to RAX: `mov $index,%ecx; rdmsr; shl $32,%rdx; or %rdx,%rax`
    pub fn load_msr(&mut self, index: u32) -> &mut Self {
        self.put(&[0xb9]).word(index);
        self.put(&[0x0f, 0x32, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0])
    }

    /// `mov $low,%eax; mov $high,%edx; mov $index,%ecx; wrmsr`
    pub fn set_msr(&mut self, index: u32, value: u64) -> &mut Self {
        self.put(&[0xb8]).word(value as u32).put(&[0xba]).word((value >> 32) as u32);
        self.put(&[0xb9]).word(index).put(&[0x0f, 0x30])
    }

    /// Reads a device's register: `xor %eax,%eax; movabs address,%eax`
    pub fn load_device(&mut self, address: u64) -> &mut Self {
        self.put(&[0x31, 0xc0, 0xa1]).quad(address)
    }

    /// `mov $value,%eax; movabs %eax,address`
    pub fn set_device(&mut self, address: u64, value: u32) -> &mut Self {
        self.put(&[0xb8]).word(value).put(&[0xa3]).quad(address)
    }

    /// `xor %eax,%eax; mov $port,%edx; in (%dx),%al`
    pub fn load_port(&mut self, port: u16) -> &mut Self {
        self.put(&[0x31, 0xc0, 0xba]).word(port.into()).put(&[0xec])
    }

    /// `mov $value,%al; mov $port,%edx; out %al,(%dx)`
    pub fn set_port(&mut self, port: u16, value: u8) -> &mut Self {
        self.put(&[0xb0, value, 0xba]).word(port.into()).put(&[0xee])
    }

    /// What `then` puts, if the bit of EAX is set: `test $1<<bit,%eax; jz end`
    pub fn if_bit(&mut self, bit: usize, then: impl FnOnce(&mut Self)) -> &mut Self {
        self.put(&[0xa9]).word(1 << bit).forward(0x84, then)
    }

    /// What `then` puts, if the register is zero: `test %reg,%reg; jnz end`
    pub fn if_zero(&mut self, register: u8, then: impl FnOnce(&mut Self)) -> &mut Self {
        assert!(register < 8);
        self.put(&[0x85, 0xc0 | register << 3 | register]).forward(0x85, then)
    }

    /// Jumps over what `then` puts, if the condition holds.
    fn forward(&mut self, condition: u8, then: impl FnOnce(&mut Self)) -> &mut Self {
        self.put(&[0x0f, condition]).word(0);
        let from = self.0.len();
        then(self);
        let distance = (self.0.len() - from) as u32;
        self.0[from - 4..from].copy_from_slice(&distance.to_le_bytes());
        self
    }

    /// `test $1<<bit,%eax; jz start`
    pub fn unless_bit_go_to(&mut self, bit: usize, start: usize) -> &mut Self {
        self.put(&[0xa9]).word(1 << bit).put(&[0x0f, 0x84]);
        let back = (self.0.len() + 4 - start) as u32;
        self.word(back.wrapping_neg())
    }

    /// `movabs $value,%rax; mov %rax,address`
    pub fn set_quad(&mut self, address: u32, value: u64) -> &mut Self {
        self.load_immediate(0, value).store(0, address)
    }

    /// `mov $value,%ax`
    pub fn half(&mut self, value: u16) -> &mut Self {
        self.put(&[0x66, 0xb8]).put(&value.to_le_bytes())
    }

    /// `mov address,%ax`
    pub fn load_half(&mut self, address: u32) -> &mut Self {
        self.put(&[0x66, 0x8b, 0x04, 0x25]).word(address)
    }

    /// `add $n,%ax`
    pub fn add_half(&mut self, n: u16) -> &mut Self {
        self.put(&[0x66, 0x05]).put(&n.to_le_bytes())
    }

    /// `mov %ax,address`
    pub fn store_half(&mut self, address: u32) -> &mut Self {
        self.put(&[0x66, 0x89, 0x04, 0x25]).word(address)
    }

    /// Writes EAX to a device's register: `movabs %eax,address`
    pub fn store_device(&mut self, address: u64) -> &mut Self {
        self.put(&[0xa3]).quad(address)
    }

    /// Prints RAX, little end first: `mov $8,%ecx; mov $0x3f8,%edx; l: out %al,(%dx);
    /// shr $8,%rax; loop l`
    pub fn print(&mut self) -> &mut Self {
        self.put(&[0xb9]).word(8).put(&[0xba]).word(0x3f8);
        self.put(&[0xee, 0x48, 0xc1, 0xe8, 0x08, 0xe2, 0xf9])
    }
}
