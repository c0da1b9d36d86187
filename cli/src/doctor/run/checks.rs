//! What the gate checks: each thing that Firn promises of microVMs, on real guests.

use std::{
    collections::BTreeSet,
    os::unix::fs::MetadataExt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use firn::ShellClass;
use serde_json::{Value, json};

use super::guests::{Charge, Failure, Frozen, Guest, Guests, at};

/// What a check found; a promise that is not kept is a [`Failure`].
pub enum Verdict {
    /// The promise holds: in what figures.
    Passed(Vec<(&'static str, f64)>),
    /// It could not be tried: why.
    NotRun(String),
}

use Verdict::{NotRun, Passed};

/// Rounds of what is done several times.
const ROUNDS: usize = 5;

/// By how much a guest's clocks may be off.
const MOST_OFF: Duration = Duration::from_millis(1);

/// The most that a clock which passes may be off by, for all that is seen of it, before patience.
const CLOSELY: Duration = Duration::from_millis(2);

/// How often a guest is asked for the time after each thaw or reset.
const EXCHANGES: usize = 4;

/// Bytes of memory that the machine needs beyond the guests'.
const RESERVE: u64 = 512 << 20;

/// By how much a resident snapshot may grow: small holes between pages that it has.
const MOST_GROWN: u64 = 16 << 20;

const SMALL: ShellClass = ShellClass { vcpus: 1, memory_mib: 128 };

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times.get(times.len() / 2).map_or(0.0, |time| ms(*time))
}

fn wall_clock_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

/// Why guests of so many bytes together can't run; `None` if they can.
fn too_large(bytes: u64) -> Option<String> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = meminfo.lines().find_map(|line| {
        line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    })? << 10;
    let needed = bytes + RESERVE;
    (free < needed)
        .then(|| format!("{} MiB of memory are free, {} are needed", free >> 20, needed >> 20))
}

/// Boots, and answers again.
pub async fn boot(guests: &Guests) -> Result<Verdict, Failure> {
    let begun = std::time::Instant::now();
    let mut guest = guests.boot(SMALL).await?;
    let answer = guest.ask(json!({"what": "keep", "value": 1})).await?;
    let booted = begun.elapsed();
    let mut warm = Vec::new();
    for value in 2..2 + ROUNDS {
        let answer = guest.ask(json!({"what": "keep", "value": value})).await?;
        expect(&answer.value, &json!(value - 1), "what the last event left")?;
        warm.push(answer.took);
    }
    expect(&answer.value, &Value::Null, "what the first event finds")?;
    Ok(Passed(vec![("boot_ms", ms(booted)), ("warm_ms", median(warm))]))
}

/// Thaws clones; what one keeps is not the next one's.
pub async fn thaw(guests: &Guests, frozen: &Frozen) -> Result<Verdict, Failure> {
    let mut times = Vec::new();
    for value in 0..ROUNDS {
        let event = json!({"what": "keep", "value": value});
        let (_guest, answer) = guests.thaw(frozen, event).await?;
        expect(&answer.value, &Value::Null, "what a clone finds")?;
        times.push(answer.took);
    }
    Ok(Passed(vec![("thaw_ms", median(times))]))
}

/// Resets a clone: nothing of an event is left for the next.
pub async fn reset(guests: &Guests, frozen: &Frozen) -> Result<Verdict, Failure> {
    let keep = json!({"what": "keep", "value": "a secret"});
    let (mut guest, _) = guests.thaw(frozen, keep.clone()).await?;
    let (mut resets, mut answers) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        resets.push(guest.reset().await?);
        let answer = guest.ask(keep.clone()).await?;
        expect(&answer.value, &Value::Null, "what an event finds after a reset")?;
        answers.push(answer.took);
    }
    Ok(Passed(vec![("reset_ms", median(resets)), ("response_ms", median(answers))]))
}

/// The wall clock of a guest that was thawed or reset is the host's; its monotonic clock goes as its TSC
/// does.
pub async fn clocks(guests: &Guests, frozen: &Frozen) -> Result<Verdict, Failure> {
    let mut wall = Off::default();
    for _ in 0..ROUNDS {
        let (mut guest, _) = guests.thaw(frozen, json!({"what": "time"})).await?;
        wall = wall.worse(wall_clock(&mut guest).await?);
        guest.reset().await?;
        wall = wall.worse(wall_clock(&mut guest).await?);
    }
    let (mut guest, _) = guests.thaw(frozen, json!({"what": "time"})).await?;
    let khz = guest.tsc_khz().await?;
    let answer = guest.ask(json!({"what": "tsc", "seconds": 0.5})).await?;
    let readings = serde_json::from_value(answer.value).map_err(at("readings of the TSC"))?;
    let monotonic = against_tsc(readings, khz);
    let clocks = [(wall, "a guest's wall clock"), (monotonic, "a guest's monotonic clock")];
    // What is wrong for certain counts before what can't be judged.
    for (off, what) in clocks {
        off.not_wrong(what)?;
    }
    if let Some(why) = clocks.iter().find_map(|(off, what)| off.unclear(what, guests.patience())) {
        return Ok(NotRun(why));
    }
    Ok(Passed(vec![
        ("wall_clock_off_by_at_least_ms", ms(wall.at_least)),
        ("wall_clock_off_by_at_most_ms", ms(wall.at_most)),
        ("monotonic_clock_off_by_at_least_ms", ms(monotonic.at_least)),
        ("monotonic_clock_off_by_at_most_ms", ms(monotonic.at_most)),
        ("tsc_mhz", (f64::from(khz) / 1e3).round()),
    ]))
}

/// Asks a guest for the time, and judges its wall clock by the answer that took the least time.
async fn wall_clock(guest: &mut Guest) -> Result<Off, Failure> {
    let mut seen = Vec::new();
    for _ in 0..EXCHANGES {
        let before = wall_clock_ns();
        let said = guest.ask(json!({"what": "time"})).await?.value.as_u64().ok_or("no time")?;
        seen.push(Off::seen(before, said, wall_clock_ns()));
    }
    let closest = seen.into_iter().min_by_key(|off| off.at_most - off.at_least);
    closest.ok_or_else(|| "no time".into())
}

/// Judges a monotonic clock by two readings of it, each between two of the TSC.
fn against_tsc([begun, ended]: [(u64, u64, u64); 2], khz: u32) -> Off {
    let ns = |ticks: u64| (u128::from(ticks) * 1_000_000 / u128::from(khz.max(1))) as u64;
    let shortest = ns(ended.0.saturating_sub(begun.2));
    let longest = ns(ended.2.saturating_sub(begun.0));
    Off::seen(shortest, ended.1.saturating_sub(begun.1), longest)
}

/// By how much a clock is off, as far as can be seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Off {
    at_least: Duration,
    at_most: Duration,
}

impl Off {
    /// Of a clock that said so when the right time lay between these two, in nanoseconds.
    fn seen(earliest: u64, said: u64, latest: u64) -> Self {
        let outside = earliest.saturating_sub(said).max(said.saturating_sub(latest));
        let window = latest.saturating_sub(earliest);
        let [at_least, at_most] =
            [outside, outside.saturating_add(window)].map(Duration::from_nanos);
        Self { at_least, at_most }
    }

    fn worse(self, other: Self) -> Self {
        Self {
            at_least: self.at_least.max(other.at_least),
            at_most: self.at_most.max(other.at_most),
        }
    }

    fn not_wrong(self, what: &str) -> Result<(), Failure> {
        match self.at_least > MOST_OFF {
            true => Err(format!("{what} is off by {:?} or more", self.at_least)),
            false => Ok(()),
        }
    }

    /// Why the clock can't be judged; `None` if it can.
    fn unclear(self, what: &str, patience: u32) -> Option<String> {
        let Self { at_most, .. } = self;
        (at_most > CLOSELY * patience)
            .then(|| format!("{what} is off by {at_most:?} at most: that is too wide to judge it"))
    }
}

/// Clones of one snapshot, and resets of one clone, share no random numbers.
pub async fn uniqueness(guests: &Guests, frozen: &Frozen) -> Result<Verdict, Failure> {
    let random = json!({"what": "random"});
    let (mut seen, mut count) = (BTreeSet::new(), 0);
    let mut see = |value: &Value| {
        for number in value.as_array().into_iter().flatten() {
            count += 1;
            seen.insert(number.to_string());
        }
    };
    for _ in 0..ROUNDS {
        let (mut guest, answer) = guests.thaw(frozen, random.clone()).await?;
        see(&answer.value);
        guest.reset().await?;
        see(&guest.ask(random.clone()).await?.value);
    }
    match seen.len() == count && count == 6 * ROUNDS {
        true => Ok(Passed(vec![("numbers", count as f64)])),
        false => Err(format!("of {count} random numbers {} differ", seen.len())),
    }
}

/// Guests have the vCPUs that they should, booted and thawed.
pub async fn vcpus(guests: &Guests, vcpus: u8) -> Result<Verdict, Failure> {
    let class = ShellClass { vcpus, memory_mib: 256 };
    if let Some(reason) = too_large(2 * class.memory_bytes()) {
        return Ok(NotRun(reason));
    }
    let cpus = json!({"what": "cpus"});
    let booted = guests.boot(class).await?.ask(cpus.clone()).await?;
    expect(&booted.value, &json!(vcpus), "vCPUs of a guest that booted")?;
    let frozen = guests.freeze(&format!("vcpus-{vcpus}"), class).await?;
    let (_guest, thawed) = guests.thaw(&frozen, cpus).await?;
    expect(&thawed.value, &json!(vcpus), "vCPUs of a guest that was thawed")?;
    Ok(Passed(vec![("thaw_ms", ms(thawed.took))]))
}

/// A clone that fills its memory answers and is charged with no more than its share; the snapshot does not
/// grow; one that overruns its memory is ended, and its guest serves the next event.
pub async fn memory(guests: &Guests, memory_mib: u32) -> Result<Verdict, Failure> {
    let class = ShellClass { vcpus: ShellClass::for_memory(memory_mib).vcpus, memory_mib };
    if let Some(reason) = too_large(class.memory_bytes()) {
        return Ok(NotRun(reason));
    }
    let frozen = guests.freeze(&format!("memory-{memory_mib}"), class).await?;
    let before = resident();
    // Nine tenths, but for what the runtime itself takes of a small one.
    let much = (memory_mib * 9 / 10).min(memory_mib - 48);
    let (mut guest, answer) = guests.thaw(&frozen, json!({"what": "fill", "mib": much})).await?;
    expect(&answer.value, &json!(much), "MiB that were filled")?;
    let mut figures = vec![("filled_mib", f64::from(much)), ("answer_ms", ms(answer.took))];
    let charge = guest.charge();
    if let Ok(Charge { bytes, limit }) = charge {
        if bytes >= limit {
            return Err(format!("{} MiB are charged of {}", bytes >> 20, limit >> 20));
        }
        figures
            .extend([("charged_mib", (bytes >> 20) as f64), ("limit_mib", (limit >> 20) as f64)]);
    }
    let grown = resident().saturating_sub(before);
    figures.push(("snapshot_grew_kib", (grown >> 10) as f64));
    if grown > MOST_GROWN {
        return Err(format!("resident snapshots grew by {} MiB", grown >> 20));
    }
    if memory_mib == SMALL.memory_mib {
        let too_much = json!({"what": "fill", "mib": 2 * memory_mib});
        if guest.overrun(too_much).await? {
            return Err("a function took twice the memory that it has".into());
        }
        guest.ask(json!({"what": "cpus"})).await?;
    }
    // The next check may need its memory.
    guests.end(guest).await;
    Ok(match charge {
        Ok(_) => Passed(figures),
        Err(why) => NotRun(format!("all but the charge holds, which can't be read: {why}")),
    })
}

/// Bytes that this process's resident snapshots take.
fn resident() -> u64 {
    let open = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let memories = open.filter(|entry| {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        target.to_string_lossy().contains("firn-memory")
    });
    let files = memories.filter_map(|entry| std::fs::metadata(entry.path()).ok());
    // One file may be open twice.
    let sizes: std::collections::BTreeMap<u64, u64> =
        files.map(|file| (file.ino(), file.blocks() * 512)).collect();
    sizes.values().sum()
}

fn expect(found: &Value, expected: &Value, what: &str) -> Result<(), Failure> {
    match found == expected {
        true => Ok(()),
        false => Err(format!("{what}: {found}, not {expected}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named() {
        assert_eq!(expect(&json!(1), &json!(1), "it"), Ok(()));
        assert_eq!(expect(&json!(1), &json!(2), "it").unwrap_err(), "it: 1, not 2");
    }

    #[test]
    fn a_clock_is_off_by_a_range() {
        let off = |at_least, at_most| Off {
            at_least: Duration::from_nanos(at_least),
            at_most: Duration::from_nanos(at_most),
        };
        assert_eq!(Off::seen(10, 12, 15), off(0, 5));
        assert_eq!(Off::seen(10, 7, 15), off(3, 8));
        assert_eq!(Off::seen(10, 16, 15), off(1, 6));
        // The clock of the host was set back meanwhile.
        assert_eq!(Off::seen(15, 12, 10), off(3, 3));
        assert_eq!(off(0, 5).worse(off(1, 2)), off(1, 5));
    }

    #[test]
    fn a_clock_passes_only_if_it_is_seen_closely() {
        let off = |at_least, at_most| {
            let [at_least, at_most] = [at_least, at_most].map(Duration::from_micros);
            Off { at_least, at_most }
        };
        assert_eq!(off(1000, 9000).not_wrong("it"), Ok(()));
        assert_eq!(off(1001, 9000).not_wrong("it").unwrap_err(), "it is off by 1.001ms or more");
        assert_eq!(off(0, 2000).unclear("it", 1), None);
        assert!(off(0, 2001).unclear("it", 1).unwrap().starts_with("it is off by 2.001ms at most"));
        assert_eq!(off(0, 2001).unclear("it", 2), None);
    }

    #[test]
    fn a_monotonic_clock_is_held_against_the_tsc_both_ways() {
        // Half a second at 2 GHz, read within 100 ticks each time.
        let off = |ns: u64| {
            against_tsc([(1000, 7, 1100), (1_000_001_000, 7 + ns, 1_000_001_100)], 2_000_000)
        };
        let us = Duration::from_micros;
        assert_eq!(off(500_000_000).at_least, Duration::ZERO);
        assert!(off(500_000_000).at_most < us(1));
        assert!(off(502_000_000).at_least > us(1990), "{:?}", off(502_000_000));
        assert!(off(498_000_000).at_least > us(1990), "{:?}", off(498_000_000));
    }

    #[test]
    fn more_memory_than_any_machine_has_is_not_tried() {
        assert!(too_large(1 << 60).unwrap().contains("are needed"));
        assert_eq!(
            median(vec![Duration::from_millis(3), Duration::ZERO, Duration::from_secs(1)]),
            3.0
        );
    }
}
