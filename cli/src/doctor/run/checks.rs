//! What the gate checks: each thing that Firn promises of microVMs, on real guests.

use std::{
    collections::BTreeSet,
    os::unix::fs::MetadataExt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use firn::ShellClass;
use serde_json::{Value, json};

use super::guests::{Failure, Frozen, Guests};

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

/// Within what a wall clock must have been seen to be judged, before patience.
const CLOSELY: Duration = Duration::from_millis(10);

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
    let time = json!({"what": "time"});
    let (mut guest, _) = guests.thaw(frozen, time.clone()).await?;
    let (mut off, mut within) = (Duration::ZERO, Duration::MAX);
    for round in 0..2 * ROUNDS {
        let before = wall_clock_ns();
        let said = guest.ask(time.clone()).await?.value.as_u64().ok_or("no time")?;
        let after = wall_clock_ns();
        let least = before.saturating_sub(said).max(said.saturating_sub(after));
        off = off.max(Duration::from_nanos(least));
        within = within.min(Duration::from_nanos(after.saturating_sub(before)));
        if round % 2 == 1 {
            guest.reset().await?;
        }
    }
    if off > MOST_OFF {
        return Err(format!("a guest's wall clock is off by {off:?} or more"));
    }
    if within > CLOSELY * guests.patience() {
        return Ok(NotRun(format!("answers take {within:?}: too long to judge a clock by")));
    }
    let seconds = 0.5;
    let answer = guest.ask(json!({"what": "pause", "seconds": seconds})).await?;
    let khz = f64::from(guest.tsc_khz().await?);
    let (begun, ended) = answer.report.tsc;
    // Between the guest's own readings lies all that the function did, and what it waited to be handed out.
    let by_tsc = ended.wrapping_sub(begun) as f64 / khz / 1e3;
    let by_clock = answer.value.as_f64().ok_or("no time")? / 1e9;
    let ahead = (by_clock - by_tsc) * 1e3;
    if ahead > ms(MOST_OFF) || by_tsc > by_clock + seconds {
        return Err(format!("{by_clock} s by a guest's clock are {by_tsc} s by its TSC"));
    }
    Ok(Passed(vec![
        ("wall_clock_off_by_at_least_ms", ms(off)),
        ("seen_within_ms", ms(within)),
        ("tsc_mhz", (khz / 1e3).round()),
    ]))
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
    if let Some((peak, limit)) = guest.charge() {
        if peak >= limit {
            return Err(format!("{} MiB are charged of {}", peak >> 20, limit >> 20));
        }
        figures.extend([("charged_mib", (peak >> 20) as f64), ("limit_mib", (limit >> 20) as f64)]);
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
    Ok(Passed(figures))
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
    fn more_memory_than_any_machine_has_is_not_tried() {
        assert!(too_large(1 << 60).unwrap().contains("are needed"));
        assert_eq!(
            median(vec![Duration::from_millis(3), Duration::ZERO, Duration::from_secs(1)]),
            3.0
        );
    }
}
