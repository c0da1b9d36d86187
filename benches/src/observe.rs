//! What the host's kernel knows of a VMM process: faults, pages, CPU time. Read from outside, so it
//! holds for every subject alike.
//!
//! Guest memory is found in `/proc/PID/maps` as adjacent mappings that together are exactly as long
//! as the guest's memory. The kernel may merge anonymous memory with what lies beside it (a heap of the C
//! library has the same flags): where no mappings are so long, guest memory is the one place within longer ones
//! that is aligned to 2 MiB, as monitors place it. Its pages are in `/proc/PID/pagemap`:
//!
//! - **present** pages are mapped into the VMM's address space, or were and are in swap. A read fault on a
//!   file maps up to 16 pages around it as well ("fault-around"), so this is an upper bound of what the guest touched.
//! - **private** pages are those that are no page of a file any more: written by guest or VMM, and
//!   so copied; for a booted guest, every page that was touched.

use std::{collections::BTreeMap, fs, io, ops::Range};

use firn_pages::{
    PAGE, REGION,
    pagemap::{Pagemap, Pages},
};

use crate::error::{Error, Result, io_at};

/// Where guest memory may start: at the bounds of large pages.
const ALIGNMENT: u64 = REGION;

/// A line of `maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mapping {
    range: Range<u64>,
    writable: bool,
}

/// Adds what is known of process `pid`, whose guest has `memory_bytes`, to `figures`.
///
/// # Errors
/// [`Error::Io`] if the process has ended or may not be looked at.
pub fn process(pid: u32, memory_bytes: u64, figures: &mut BTreeMap<String, f64>) -> Result<()> {
    let read = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        fs::read_to_string(&path).map_err(io_at(path))
    };
    let mut put = |name: &str, value: f64| {
        figures.insert(name.to_owned(), value);
    };
    if let Some((minor, major)) = faults(&read("stat")?) {
        put("minor_faults", minor as f64);
        put("major_faults", major as f64);
    }
    let rollup = smaps(&read("smaps_rollup")?, |_| true);
    let rolled = |key: &str| rollup.get(key).copied().unwrap_or_default() as f64;
    put("pss_kib", rolled("Pss"));
    put("private_kib", rolled("Private_Clean") + rolled("Private_Dirty"));
    let Some(guest) = guest_range(&mappings(&read("maps")?), memory_bytes) else {
        return Err(Error::Usage(format!(
            "process {pid} has no mappings that make {memory_bytes} bytes of guest memory"
        )));
    };
    let outside = smaps(&read("smaps")?, |start| !guest.contains(&start));
    put("vmm_anonymous_kib", outside.get("Anonymous").copied().unwrap_or_default() as f64);
    let (present, private) = pages(pid, &guest)?;
    put("guest_present_pages", present as f64);
    put("guest_private_pages", private as f64);
    if let Some(bytes) = group_bytes(&read("cgroup")?) {
        put("cgroup_kib", bytes as f64 / 1024.0);
    }
    Ok(())
}

/// Minor and major faults of a process so far.
///
/// # Errors
/// [`Error::Io`] if the process has ended.
pub fn faults_of(pid: u32) -> Result<(u64, u64)> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).map_err(io_at(path))?;
    Ok(faults(&stat).unwrap_or_default())
}

/// Minor and major faults so far, from `/proc/PID/stat`.
fn faults(stat: &str) -> Option<(u64, u64)> {
    // The command's name may hold blanks and parentheses; fields count from its end.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let minor = fields.nth(7)?.parse().ok()?;
    let major = fields.nth(1)?.parse().ok()?;
    Some((minor, major))
}

fn mappings(maps: &str) -> Vec<Mapping> {
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let range = hex_range(words.next()?)?;
        Some(Mapping { range, writable: words.next()?.starts_with("rw") })
    };
    maps.lines().filter_map(parse).collect()
}

fn hex_range(word: &str) -> Option<Range<u64>> {
    let (start, end) = word.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some(hex(start)?..hex(end)?)
}

/// Where `bytes` of guest memory lie in writable mappings.
fn guest_range(mappings: &[Mapping], bytes: u64) -> Option<Range<u64>> {
    exact_range(mappings, bytes).or_else(|| aligned_range(mappings, bytes))
}

/// The adjacent, writable mappings that are `bytes` long together.
fn exact_range(mappings: &[Mapping], bytes: u64) -> Option<Range<u64>> {
    for (first, mapping) in mappings.iter().enumerate() {
        let start = mapping.range.start;
        let mut end = start;
        for next in &mappings[first..] {
            if next.range.start != end || !next.writable || end - start >= bytes {
                break;
            }
            end = next.range.end;
        }
        if end - start == bytes {
            return Some(start..end);
        }
    }
    None
}

/// The aligned place of `bytes` within longer runs of adjacent, writable mappings, if there is just one.
fn aligned_range(mappings: &[Mapping], bytes: u64) -> Option<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for mapping in mappings.iter().filter(|mapping| mapping.writable) {
        match runs.last_mut() {
            Some(run) if run.end == mapping.range.start => run.end = mapping.range.end,
            _ => runs.push(mapping.range.clone()),
        }
    }
    let mut places = runs.iter().flat_map(|run| {
        let first = run.start.checked_next_multiple_of(ALIGNMENT);
        let second = first.and_then(|first| first.checked_add(ALIGNMENT));
        let fits = |start: &u64| start.checked_add(bytes).is_some_and(|end| end <= run.end);
        [first, second].into_iter().flatten().filter(fits).collect::<Vec<_>>()
    });
    let start = places.next()?;
    places.next().is_none().then(|| start..start + bytes)
}

/// Sums the values of `smaps` (KiB) over the mappings whose start satisfies `wanted`.
fn smaps(text: &str, wanted: impl Fn(u64) -> bool) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    let mut counts = false;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some(key) = first.strip_suffix(':') {
            if let (true, Some(Ok(value))) = (counts, words.next().map(str::parse::<u64>)) {
                *sums.entry(key.to_owned()).or_default() += value;
            }
        } else if let Some(range) = hex_range(first) {
            counts = wanted(range.start);
        }
    }
    sums
}

/// Present and private pages of the range.
fn pages(pid: u32, range: &Range<u64>) -> Result<(u64, u64)> {
    let counts = || {
        let pagemap = Pagemap::open(pid)?;
        let count = |which| {
            let mut count = 0;
            let pages = (range.end - range.start) / PAGE;
            pagemap.runs(range.start, pages, which, |run| count += run.end - run.start)?;
            io::Result::Ok(count)
        };
        Ok((count(Pages::Mapped)?, count(Pages::Private)?))
    };
    counts().map_err(io_at(format!("/proc/{pid}/pagemap")))
}

/// Memory charged to a process's control group (v2): guest memory, page tables, kernel memory.
fn group_bytes(cgroup: &str) -> Option<u64> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
    if path.is_empty() {
        return None;
    }
    let file = format!("/sys/fs/cgroup/{path}/memory.current");
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// CPU time in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// Of this process: the host's side.
    pub own: u64,
    /// Of its children that have been reaped: VMMs from their first instruction to their last.
    pub children: u64,
    /// Of everything on the machine, kernel threads included, from `/proc/schedstat`; `None` where
    /// the kernel does not count it.
    pub machine: Option<u64>,
}

impl CpuTime {
    /// Reads it now.
    pub fn now() -> Self {
        Self {
            own: usage(libc::RUSAGE_SELF),
            children: usage(libc::RUSAGE_CHILDREN),
            machine: fs::read_to_string("/proc/schedstat").ok().and_then(|t| schedstat(&t)),
        }
    }

    /// What has passed since `earlier`, as figures in microseconds divided by `by`.
    pub fn since(self, earlier: Self, by: f64, figures: &mut BTreeMap<String, f64>) {
        let us = |now: u64, then: u64| now.saturating_sub(then) as f64 / 1000.0 / by;
        figures.insert("cpu_host_us".into(), us(self.own, earlier.own));
        figures.insert("cpu_vmm_us".into(), us(self.children, earlier.children));
        if let (Some(now), Some(then)) = (self.machine, earlier.machine) {
            figures.insert("cpu_machine_us".into(), us(now, then));
        }
    }
}

/// User and system time in nanoseconds.
fn usage(who: libc::c_int) -> u64 {
    // SAFETY: an all-zero rusage is a valid value of this plain C structure.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live, writable rusage; the call writes nothing else.
    if unsafe { libc::getrusage(who, &raw mut usage) } != 0 {
        return 0;
    }
    let ns = |t: libc::timeval| t.tv_sec as u64 * 1_000_000_000 + t.tv_usec as u64 * 1000;
    ns(usage.ru_utime) + ns(usage.ru_stime)
}

/// Time that tasks have run on all CPUs: the seventh number of each `cpu` line.
fn schedstat(text: &str) -> Option<u64> {
    let mut total = None;
    for line in text.lines().filter(|line| line.starts_with("cpu")) {
        let ran: u64 = line.split_whitespace().nth(7)?.parse().ok()?;
        total = Some(total.unwrap_or(0) + ran);
    }
    total
}

/// `MemAvailable` in KiB.
pub fn available_kib() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn faults_are_found_behind_any_name() {
        let stat = "17 (a) b) S 1 2 3 4 5 6 700 8 9 10 11 12";
        assert_eq!(faults(stat), Some((700, 9)));
        assert_eq!(faults("17 (x) S 1"), None);
    }

    #[test]
    fn guest_memory_is_found_whole_or_in_pieces() {
        let maps = "1000-3000 r--p 0 00:00 0 /bin/vmm\n\
                    3000-4000 rw-p 0 00:00 0\n\
                    10000-14000 rw-p 0 00:01 7 /memfd:memory\n\
                    14000-18000 rw-p 4000 00:01 7 /memfd:memory\n\
                    18000-19000 ---p 0 00:00 0\n";
        let view = "8000-10000 r--s 0 00:01 7 /memfd:memory\n";
        assert_eq!(guest_range(&mappings(view), 0x8000), None, "a guest writes its memory");
        let maps = mappings(maps);
        assert_eq!(guest_range(&maps, 0x8000), Some(0x10000..0x18000));
        assert_eq!(guest_range(&maps, 0x4000), Some(0x10000..0x14000));
        assert_eq!(guest_range(&maps, 0x9000), None, "the guard page is no memory");
        assert_eq!(guest_range(&maps, 0x1000), Some(0x3000..0x4000));
    }

    #[test]
    fn guest_memory_is_found_where_the_kernel_has_merged_it() {
        const MIB: u64 = 1 << 20;
        // 128 MiB of a guest, and the first 132 KiB of a heap of the C library, whose rest is reserved.
        let heap = "7f3100000000-7f3108021000 rw-p 00000000 00:00 0\n\
                    7f3108021000-7f310c000000 ---p 00000000 00:00 0\n";
        let guest = 0x7f31_0000_0000..0x7f31_0800_0000;
        assert_eq!(guest_range(&mappings(heap), 128 * MIB), Some(guest.clone()));
        // Merged with what lies below, and beside a mapping with other flags.
        let below = "7f30fffdf000-7f3104000000 rw-p 00000000 00:00 0\n\
                     7f3104000000-7f3108000000 rw-p 00000000 00:00 0\n\
                     7f3108000000-7f3108001000 r--p 00000000 00:00 0\n";
        assert_eq!(guest_range(&mappings(below), 128 * MIB), Some(guest));
        // Two places are none.
        let wide = "7f3100000000-7f3108200000 rw-p 00000000 00:00 0\n";
        assert_eq!(guest_range(&mappings(wide), 128 * MIB), None);
        assert_eq!(guest_range(&mappings(heap), 129 * MIB), None);
    }

    #[test]
    fn smaps_sums_what_is_wanted() {
        let text = "1000-2000 rw-p 0 00:00 0 [heap]\nSize: 4 kB\nAnonymous: 3 kB\n\
                    8000-9000 rw-p 0 00:00 0\nSize: 4 kB\nAnonymous: 4 kB\nVmFlags: rd wr\n";
        assert_eq!(smaps(text, |_| true)["Anonymous"], 7);
        assert_eq!(smaps(text, |start| start != 0x8000)["Anonymous"], 3);
    }

    #[test]
    fn schedstat_adds_the_cpus() {
        let text = "version 15\ntimestamp 1\ncpu0 0 0 0 0 0 0 10 2 3\ndomain0 1 2\n\
                    cpu1 0 0 0 0 0 0 32 2 3\n";
        assert_eq!(schedstat(text), Some(42));
        assert_eq!(schedstat("version 15\n"), None);
    }

    #[test]
    fn this_process_has_written_what_it_wrote() {
        let bytes = 64 * PAGE as usize;
        // An odd length, so that no other run of mappings has it by chance.
        let memory = vec![1u8; bytes];
        let start = (memory.as_ptr() as u64).div_ceil(PAGE) * PAGE;
        let (present, private) = pages(std::process::id(), &(start..start + 63 * PAGE)).unwrap();
        assert_eq!((present, private), (63, 63));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[ -~\n]{0,300}", bytes: u64) {
            let _ = faults(&text);
            let _ = guest_range(&mappings(&text), bytes);
            let _ = smaps(&text, |_| true);
            let _ = schedstat(&text);
            let _ = group_bytes(&text);
        }
    }
}
