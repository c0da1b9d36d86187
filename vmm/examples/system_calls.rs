//! Which entries of the filters' tables were used, from records that builds with debug assertions keep
//! (`firn_vmm::seccomp::trap`). `cargo xtask system-calls` makes the records and runs this with
//! `SUITE=FILE` for each; the exit code is 1 if an entry was not used and has no reason for that.

#[cfg(not(debug_assertions))]
fn main() {
    eprintln!("this build keeps no records: build it with debug assertions");
    std::process::exit(2);
}

#[cfg(debug_assertions)]
fn main() {
    use firn_vmm::seccomp::{Thread, table, trap};

    let records: Vec<(String, Vec<u8>)> = std::env::args()
        .skip(1)
        .map(|argument| {
            let (suite, file) = argument.split_once('=').expect("SUITE=FILE");
            let record = std::fs::read(file).unwrap_or_else(|error| panic!("{file}: {error}"));
            assert_eq!(record.len(), trap::RECORD_BYTES, "{file}");
            (suite.to_owned(), record)
        })
        .collect();
    let mut missing = 0;
    for (thread, name) in [(Thread::Device, "device thread"), (Thread::Vcpu(0), "vCPU thread")] {
        println!("{name}");
        for (index, entry) in table::entries(thread).enumerate() {
            let at = trap::place(thread, index);
            let count = |record: &[u8]| u32::from_ne_bytes(record.as_chunks().0[at]);
            let used = records.iter().map(|(suite, record)| (suite, count(record)));
            let used: Vec<String> = used
                .filter(|(_, count)| *count > 0)
                .map(|(suite, count)| format!("{suite} {count}"))
                .collect();
            let found = match (used.as_slice(), entry.unseen) {
                ([], None) => {
                    missing += 1;
                    "NOT USED, and no reason why".to_owned()
                }
                ([], Some(reason)) => format!("not used: {reason}"),
                (suites, _) => suites.join(", "),
            };
            println!("  {:<26} {found:<28} ({})", entry.name(), entry.why);
        }
    }
    std::process::exit(i32::from(missing > 0));
}
