//! From a table to a program for the kernel.
//!
//! It looks for the system call, for its request and for descriptors by bisection. A filter's price
//! is paid when it is installed, too: the kernel runs it once for each system call that there is, to
//! learn which it always allows, and that is ten times as long with a comparison for each number in
//! turn.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, sock_filter};

use super::{
    Thread,
    table::{Ask, Entry},
};
use crate::descriptors::{Numbers, VCPUS};

/// What a program returns.
#[derive(Clone, Copy)]
pub struct Answers {
    /// For what no entry allows.
    pub refused: u32,
    /// For what an entry allows; its index is that in the table.
    pub allowed: fn(Thread, usize, &Entry) -> u32,
    /// Calls whose `syscall` instruction ends here are allowed, whatever they are, and the way back
    /// from a signal handler.
    pub exempt: Option<u64>,
}

impl Answers {
    /// Those of a filter that is in force.
    pub const KILL: Self = Self {
        refused: libc::SECCOMP_RET_KILL_PROCESS,
        allowed: |_, _, _| libc::SECCOMP_RET_ALLOW,
        exempt: None,
    };
}

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const INSTRUCTION: u32 = 8;

const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

/// A program that allows these `entries` to `thread` of process `pid`.
pub fn program<'a>(
    entries: impl Iterator<Item = &'a Entry>,
    thread: Thread,
    pid: u32,
    answers: Answers,
) -> BpfProgram {
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

    let mut writer = Writer { program: Vec::new(), thread, pid, answers };
    writer.push(load(ARCHITECTURE));
    writer.push(jump(libc::BPF_JEQ, AUDIT_ARCH_X86_64, 1, 0));
    writer.push(end(libc::SECCOMP_RET_KILL_PROCESS));
    if let Some(exempt) = answers.exempt {
        writer.push(load(INSTRUCTION));
        writer.push(jump(libc::BPF_JEQ, exempt as u32, 0, 3));
        writer.push(load(INSTRUCTION + 4));
        writer.push(jump(libc::BPF_JEQ, (exempt >> 32) as u32, 0, 1));
        writer.push(end(libc::SECCOMP_RET_ALLOW));
        writer.push(load(NUMBER));
        writer.push(jump(libc::BPF_JEQ, libc::SYS_rt_sigreturn as u32, 0, 1));
        writer.push(end(libc::SECCOMP_RET_ALLOW));
    }
    let mut calls: BTreeMap<u32, Vec<(usize, &Entry)>> = BTreeMap::new();
    for (index, entry) in entries.enumerate() {
        calls.entry(entry.number).or_default().push((index, entry));
    }
    // Numbers of the x32 ABI have a high bit set, which puts them above the last.
    let calls = calls.iter().map(|(&number, entries)| {
        let next = match entries.as_slice() {
            [(index, entry)] if entry.request.is_none() => Next::Ask(*index, entry, entry.asks),
            requests => Next::Request(requests),
        };
        (number, number + 1, next)
    });
    writer.search(NUMBER, calls.collect());
    writer.program
}

/// What is still to be asked.
#[derive(Clone, Copy)]
enum Next<'a> {
    /// Nothing could help.
    Refuse,
    /// These, for this entry.
    Ask(usize, &'a Entry, &'a [Ask]),
    /// Which of these it is, by the second argument.
    Request(&'a [(usize, &'a Entry)]),
}

/// From this value on, up to the next turn.
type Turn<'a> = (u32, Next<'a>);

struct Writer {
    program: BpfProgram,
    thread: Thread,
    pid: u32,
    answers: Answers,
}

impl Writer {
    fn push(&mut self, instruction: sock_filter) {
        self.program.push(instruction);
    }

    fn conclude(&mut self, next: Next<'_>) {
        let pid = self.pid;
        let vcpu = |id| VCPUS.start as u32 + u32::from(id);
        let (index, entry, asks) = match next {
            Next::Refuse => return self.push(end(self.answers.refused)),
            Next::Ask(index, entry, asks) => (index, entry, asks),
            Next::Request(entries) => {
                let ranges = entries.iter().filter_map(|(index, entry)| {
                    let request = entry.request?;
                    Some((request, request + 1, Next::Ask(*index, entry, entry.asks)))
                });
                return self.search(argument(1), ranges.collect());
            }
        };
        let Some((ask, rest)) = asks.split_first() else {
            return self.push(end((self.answers.allowed)(self.thread, index, entry)));
        };
        let rest = Next::Ask(index, entry, rest);
        let exactly = |value: u32| vec![(value, value + 1, rest)];
        match (ask, self.thread) {
            (Ask::Among(which, kinds), _) => {
                let range = |kind: &Numbers| (kind.start as u32, kind.end as u32, rest);
                self.search(argument(*which), kinds.iter().map(range).collect());
            }
            (Ask::Ourselves, _) => self.search(argument(0), exactly(pid)),
            (Ask::OwnVcpu, Thread::Vcpu(id)) => self.search(argument(0), exactly(vcpu(id))),
            (Ask::OwnVcpu, Thread::Device) => self.conclude(Next::Refuse),
            (Ask::Lacks(which, bits), _) => {
                self.push(load(argument(*which)));
                self.push(jump(libc::BPF_JSET, *bits, 0, 1));
                self.push(end(self.answers.refused));
                self.conclude(rest);
            }
        }
    }

    /// Appends the decision about a value by the `ranges` that it may lie in; a range that ends
    /// at 0 has no end.
    fn search(&mut self, offset: u32, mut ranges: Vec<(u32, u32, Next<'_>)>) {
        ranges.sort_unstable_by_key(|(start, ..)| *start);
        let mut turns: Vec<Turn<'_>> = Vec::with_capacity(2 * ranges.len());
        for (start, end, next) in ranges {
            if turns.last().is_some_and(|(before, _)| *before == start) {
                turns.pop();
            }
            if !turns.last().is_some_and(|(_, before)| self.same(*before, next)) {
                turns.push((start, next));
            }
            if end != 0 {
                turns.push((end, Next::Refuse));
            }
        }
        self.push(load(offset));
        self.bisect(&turns, Next::Refuse);
    }

    /// Whether two ranges may be one.
    fn same(&self, one: Next<'_>, other: Next<'_>) -> bool {
        match (one, other) {
            (Next::Ask(one, first, []), Next::Ask(other, second, [])) => {
                let allowed = self.answers.allowed;
                allowed(self.thread, one, first) == allowed(self.thread, other, second)
            }
            _ => false,
        }
    }

    /// `below` the first of `turns`, and from each on what it says.
    fn bisect(&mut self, turns: &[Turn<'_>], below: Next<'_>) {
        if turns.is_empty() {
            return self.conclude(below);
        }
        let middle = turns.len() / 2;
        let here = self.program.len();
        self.push(jump(libc::BPF_JGE, turns[middle].0, 0, 0));
        self.bisect(&turns[..middle], below);
        match u8::try_from(self.program.len() - here - 1) {
            Ok(distance) => self.program[here].jt = distance,
            Err(_) => {
                // Too far for a conditional jump: over an unconditional one, which goes further.
                self.program[here].jf = 1;
                let distance = self.program.len() - here - 1;
                let far = statement(libc::BPF_JMP | libc::BPF_JA, distance as u32);
                self.program.insert(here + 1, far);
            }
        }
        self.bisect(&turns[middle + 1..], turns[middle].1);
    }
}

fn load(offset: u32) -> sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn end(verdict: u32) -> sock_filter {
    statement(libc::BPF_RET, verdict)
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn jump(test: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: (libc::BPF_JMP | test | libc::BPF_K) as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        descriptors::{CONTROL, DISKS, EPOLL, RECEIVED, STREAM, VM},
        seccomp::table::entries,
    };

    const X86_64: u32 = 0xc000_003e;
    const PID: u32 = 7000;
    const VCPU: Thread = Thread::Vcpu(1);

    /// A system call as a filter sees it.
    #[derive(Clone, Copy, Default)]
    struct Data {
        number: u32,
        instruction: u64,
        arguments: [u32; 6],
    }

    /// Runs a program of this module's few instructions; with it, how many they were.
    fn run(program: &[sock_filter], architecture: u32, data: &Data) -> (u32, u32) {
        let (mut at, mut loaded, mut steps) = (0, 0, 0);
        loop {
            let now = &program[at];
            at += 1;
            steps += 1;
            let choose = |yes: bool| usize::from(if yes { now.jt } else { now.jf });
            match u32::from(now.code) {
                0x20 => {
                    loaded = match now.k {
                        NUMBER => data.number,
                        ARCHITECTURE => architecture,
                        INSTRUCTION => data.instruction as u32,
                        12 => (data.instruction >> 32) as u32,
                        offset => data.arguments[(offset as usize - 16) / 8],
                    }
                }
                0x05 => at += now.k as usize,
                0x15 => at += choose(loaded == now.k),
                0x35 => at += choose(loaded >= now.k),
                0x45 => at += choose(loaded & now.k != 0),
                0x06 => return (now.k, steps),
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    fn of(thread: Thread) -> BpfProgram {
        program(entries(thread), thread, PID, Answers::KILL)
    }

    fn allows(program: &[sock_filter], call: libc::c_long, arguments: &[u32]) -> bool {
        let mut data = Data { number: call as u32, ..Data::default() };
        data.arguments[..arguments.len()].copy_from_slice(arguments);
        run(program, X86_64, &data).0 == libc::SECCOMP_RET_ALLOW
    }

    /// What satisfies an entry.
    fn good(entry: &Entry, thread: Thread) -> Data {
        let mut data = Data { number: entry.number, ..Data::default() };
        data.arguments[1] = entry.request.unwrap_or_default();
        for ask in entry.asks {
            match (ask, thread) {
                (Ask::Among(which, kinds), _) => {
                    data.arguments[*which as usize] = kinds[kinds.len() - 1].start as u32;
                }
                (Ask::Ourselves, _) => data.arguments[0] = PID,
                (Ask::OwnVcpu, Thread::Vcpu(id)) => {
                    data.arguments[0] = VCPUS.start as u32 + u32::from(id);
                }
                _ => {}
            }
        }
        data
    }

    #[test]
    fn exactly_the_listed_calls_of_this_architecture_are_allowed() {
        for thread in [Thread::Device, VCPU] {
            let (table, program) = (entries(thread), of(thread));
            for entry in table.clone() {
                let good = good(entry, thread);
                assert_eq!(run(&program, X86_64, &good).0, libc::SECCOMP_RET_ALLOW, "{entry:?}");
                let other = run(&program, 0x4000_0003, &good).0;
                assert_eq!(other, libc::SECCOMP_RET_KILL_PROCESS);
                let x32 = Data { number: good.number | 0x4000_0000, ..good };
                assert_eq!(run(&program, X86_64, &x32).0, libc::SECCOMP_RET_KILL_PROCESS);
                for near in [-1, 1].map(|by| entry.request.map(|r| r.wrapping_add_signed(by))) {
                    let Some(near) = near else { continue };
                    let listed = |e: &Entry| e.number == entry.number && e.request == Some(near);
                    let mut data = good;
                    data.arguments[1] = near;
                    let allowed = run(&program, X86_64, &data).0 == libc::SECCOMP_RET_ALLOW;
                    assert_eq!(allowed, table.clone().any(listed), "{entry:?} {near:#x}");
                }
            }
            for number in (0..1024).chain([0x4000_0000, u32::MAX]) {
                if !table.clone().any(|entry| entry.number == number) {
                    let data = Data { number, ..Data::default() };
                    assert_eq!(run(&program, X86_64, &data).0, libc::SECCOMP_RET_KILL_PROCESS);
                }
            }
        }
    }

    #[test]
    fn descriptors_are_looked_at() {
        for thread in [Thread::Device, VCPU] {
            let program = of(thread);
            for entry in entries(thread) {
                let allowed = |number: u32| match entry.asks.first() {
                    Some(Ask::Among(0, kinds)) => {
                        Some(kinds.iter().any(|kind| kind.contains(&(number as i32))))
                    }
                    Some(Ask::OwnVcpu) => Some(number == VCPUS.start as u32 + 1),
                    _ => None,
                };
                for number in (0..=DISKS.end as u32 + 1).chain([1024, u32::MAX]) {
                    let Some(expected) = allowed(number) else { break };
                    let mut data = good(entry, thread);
                    data.arguments[0] = number;
                    let found = run(&program, X86_64, &data).0 == libc::SECCOMP_RET_ALLOW;
                    assert_eq!(found, expected, "{entry:?} on {number}");
                }
            }
        }
    }

    #[test]
    fn arguments_are_looked_at() {
        let (device, vcpu) = (of(Thread::Device), of(VCPU));
        let read = libc::PROT_READ as u32;
        let map = |prot: u32, file: i32| [0, 0, prot, 0, file as u32];
        let mmap = libc::SYS_mmap;
        assert!(allows(&device, mmap, &map(read | libc::PROT_WRITE as u32, -1)));
        assert!(allows(&device, mmap, &map(read, RECEIVED.start)));
        assert!(!allows(&device, mmap, &map(read, VM.start)));
        assert!(!allows(&device, mmap, &map(read | libc::PROT_EXEC as u32, -1)));
        assert!(!allows(&vcpu, mmap, &map(read, -1)));
        assert!(allows(&device, libc::SYS_tgkill, &[PID]));
        assert!(!allows(&device, libc::SYS_tgkill, &[1]));
        let add = |what: i32| [EPOLL.start as u32, libc::EPOLL_CTL_ADD as u32, what as u32];
        assert!(allows(&device, libc::SYS_epoll_ctl, &add(STREAM.start)));
        assert!(!allows(&device, libc::SYS_epoll_ctl, &add(CONTROL.start)));
    }

    #[test]
    fn bisection_is_short() {
        for thread in [Thread::Device, VCPU] {
            let program = of(thread);
            for entry in entries(thread) {
                let (_, steps) = run(&program, X86_64, &good(entry, thread));
                // Four instructions before it, up to seven levels; up to six for requests, up to four
                // for each descriptor; long jumps.
                assert!(steps <= 30, "{entry:?}: {steps} steps");
            }
            println!("{thread:?}: {} instructions", program.len());
        }
    }

    #[test]
    fn nothing_allowed_kills() {
        let program = program([].iter(), Thread::Device, PID, Answers::KILL);
        let refused = run(&program, X86_64, &Data::default()).0;
        assert_eq!(refused, libc::SECCOMP_RET_KILL_PROCESS);
    }

    #[test]
    fn answers_name_the_entry() {
        const HERE: u64 = 0x1234_5678_9abc;
        let table = entries(Thread::Device);
        let answers =
            Answers { refused: 5, allowed: |_, index, _| 1000 + index as u32, exempt: Some(HERE) };
        let program = program(table.clone(), Thread::Device, PID, answers);
        for (index, entry) in table.enumerate() {
            let good = good(entry, Thread::Device);
            assert_eq!(run(&program, X86_64, &good).0, 1000 + index as u32);
        }
        for (instruction, expected) in
            [(HERE, libc::SECCOMP_RET_ALLOW), (HERE + 1, 5), (HERE ^ 1 << 32, 5)]
        {
            let data = Data { number: 1000, instruction, ..Data::default() };
            assert_eq!(run(&program, X86_64, &data).0, expected);
        }
    }
}
