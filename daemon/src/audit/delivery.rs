//! Delivery of the audit trail: each finished file becomes an object in a bucket, under the name that CloudTrail
//! would give it.
//!
//! What is to be delivered has a second name, a hard link in a directory of its own, from before the file has
//! its first: so a daemon that is killed at any moment leaves none out, and delivers one twice at worst. The
//! link goes when the bucket has taken the object. The oldest file goes first; while one can't be delivered,
//! none behind it is tried.

use std::{
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use tokio::sync::Notify;

use crate::aws::{self, Aws, AwsError};

/// First and longest pause after a failure.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// Longest prefix of objects' names: CloudTrail's limit.
const PREFIX: usize = 200;

/// Where objects go: `BUCKET[/PREFIX]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    name: String,
    /// Empty, or ends with a slash.
    prefix: String,
}

impl FromStr for Bucket {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, prefix) = text.split_once('/').unwrap_or((text, ""));
        let prefix = prefix.trim_end_matches('/');
        let part = |part: &str| {
            let fits = |b: u8| b.is_ascii_alphanumeric() || b"-_.!*'()".contains(&b);
            !matches!(part, "" | "." | "..") && part.bytes().all(fits)
        };
        let fits = aws::is_bucket(name)
            && prefix.len() <= PREFIX
            && (prefix.is_empty() || prefix.split('/').all(part));
        let slash = if prefix.is_empty() { "" } else { "/" };
        let prefix = format!("{prefix}{slash}");
        fits.then(|| Self { name: name.to_owned(), prefix }).ok_or_else(|| {
            format!("{text:?} is no bucket, with or without a prefix, such as trails/firn")
        })
    }
}

/// What finished files are given to.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Holds a link to each file that has to be delivered.
    pending: PathBuf,
    new: Arc<Notify>,
}

impl Delivery {
    /// Delivers what is in `pending`, and what will come, to `bucket`. Call it within a runtime.
    ///
    /// # Errors
    /// The directory can't be made.
    pub fn start(pending: PathBuf, bucket: Bucket, aws: Arc<Aws>) -> io::Result<Self> {
        fs::create_dir_all(&pending)?;
        let delivery = Self { pending, new: Arc::default() };
        tokio::spawn(delivery.clone().run(bucket, aws));
        Ok(delivery)
    }

    /// Gives `file`, which will have this name, a place among those that have to be delivered.
    ///
    /// # Errors
    /// It has none.
    pub fn add(&self, file: &Path, name: &str) -> io::Result<()> {
        fs::hard_link(file, self.pending.join(name))?;
        fs::File::open(&self.pending)?.sync_all()
    }

    /// There is something new.
    pub fn wake(&self) {
        self.new.notify_one();
    }

    /// Gives up a file; whether it had to be delivered still.
    pub fn forget(&self, name: &str) -> bool {
        fs::remove_file(self.pending.join(name)).is_ok()
    }

    /// Waits until nothing is left, for at most `patience`.
    pub async fn settle(&self, patience: Duration) {
        let settled = async {
            while fs::read_dir(&self.pending).is_ok_and(|mut left| left.next().is_some()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(patience, settled).await.is_err() {
            tracing::warn!("audit files are left to be delivered after the next start");
        }
    }

    async fn run(self, bucket: Bucket, aws: Arc<Aws>) {
        let mut pause = Duration::ZERO;
        loop {
            match self.deliver(&bucket, &aws).await {
                Ok(()) => {
                    pause = Duration::ZERO;
                    self.new.notified().await;
                }
                Err(error) => {
                    let bucket = &bucket.name;
                    tracing::error!(bucket, %error, "audit files can't be delivered");
                    pause = (pause * 2).clamp(BACK_OFF.0, BACK_OFF.1);
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// Delivers all that there is.
    async fn deliver(&self, bucket: &Bucket, aws: &Aws) -> Result<(), DeliveryError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.pending)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        // They begin with their times.
        names.sort();
        for name in names {
            let path = self.pending.join(&name);
            let Some(key) = key(&name) else {
                tracing::warn!(file = %path.display(), "no audit file: left where it is");
                continue;
            };
            let content = match tokio::fs::read(&path).await {
                // There was no room for it any more.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                content => content?,
            };
            let key = format!("{}{key}", bucket.prefix);
            aws.put_object(&bucket.name, &key, content.into()).await?;
            self.forget(&name);
            tracing::debug!(bucket = bucket.name, key, "an audit file was delivered");
        }
        Ok(())
    }
}

/// Why a file was not delivered.
#[derive(Debug, thiserror::Error)]
enum DeliveryError {
    #[error("{0}")]
    File(#[from] io::Error),
    #[error("{0}")]
    Aws(#[from] AwsError),
}

/// The name of an object, from that of its file: `ACCOUNT_CloudTrail_REGION_YYYYMMDDTHHMMZ_UNIQUE.json.gz`.
fn key(name: &str) -> Option<String> {
    let parts: Vec<&str> = name.strip_suffix(".json.gz")?.split('_').collect();
    let [account, "CloudTrail", region, stamp, _] = parts[..] else { return None };
    let (year, month, day) = (stamp.get(..4)?, stamp.get(4..6)?, stamp.get(6..8)?);
    Some(format!("AWSLogs/{account}/CloudTrail/{region}/{year}/{month}/{day}/{name}"))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Audit, Bounds, tests},
        *,
    };
    use crate::aws::fake::Fake;

    async fn open(dir: &Path, fake: &Fake) -> Audit {
        let bucket = "trails/a/b".parse().unwrap();
        let delivery = Delivery::start(dir.join("pending"), bucket, fake.aws().into()).unwrap();
        Audit::open(dir.into(), tests::place(), Bounds::default(), Some(delivery)).unwrap()
    }

    fn pending(dir: &Path) -> usize {
        fs::read_dir(dir.join("pending")).unwrap().count()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn finished_files_become_objects_under_cloudtrails_names() {
        let dir = tempfile::tempdir().unwrap();
        let fake = Fake::start().await;
        fake.put("trails", "x", b"");
        let audit = open(dir.path(), &fake).await;
        for n in 0..3 {
            audit.add(tests::line(n), true).await.unwrap();
            audit.close().await;
            audit.delivered(Duration::from_secs(5)).await;
        }
        let (_, files) = tests::records(dir.path());
        let mut expected: Vec<(String, Vec<u8>)> = files
            .iter()
            .map(|file| {
                let name = file.strip_prefix(dir.path()).unwrap().to_str().unwrap();
                (format!("a/b/{name}"), fs::read(file).unwrap())
            })
            .collect();
        expected.sort();
        assert_eq!((expected.len(), fake.objects("trails/a")), (3, expected));
        assert_eq!((pending(dir.path()), fake.refused()), (0, 0));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_bucket_does_not_take_is_delivered_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let fake = Fake::start().await;
        fake.put("trails", "x", b"");
        fake.fail("trails", 503, "SlowDown");
        let audit = open(dir.path(), &fake).await;
        audit.add(tests::line(1), true).await.unwrap();
        audit.close().await;
        audit.delivered(Duration::from_millis(50)).await;
        assert_eq!((pending(dir.path()), fake.objects("trails/a").len()), (1, 0));
        drop(audit);
        // What the killed one has not finished, either.
        fs::write(dir.path().join("current.jsonl"), "{\"n\":2}\n").unwrap();
        fake.fail("trails", 200, "");
        let audit = open(dir.path(), &fake).await;
        audit.close().await;
        audit.delivered(Duration::from_secs(5)).await;
        assert_eq!((pending(dir.path()), fake.objects("trails/a").len()), (0, 2));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn files_that_nobody_takes_are_bounded_too() {
        let dir = tempfile::tempdir().unwrap();
        let fake = Fake::start().await;
        fake.put("trails", "x", b"");
        fake.fail("trails", 503, "SlowDown");
        let bucket = "trails".parse().unwrap();
        let waiting = dir.path().join("pending");
        let delivery = Delivery::start(waiting, bucket, fake.aws().into()).unwrap();
        let bounds = Bounds { space: 150, ..Bounds::default() };
        let audit = Audit::open(dir.path().into(), tests::place(), bounds, Some(delivery)).unwrap();
        for n in 0..10 {
            audit.add(tests::line(n), true).await.unwrap();
            audit.close().await;
            audit.delivered(Duration::ZERO).await;
        }
        let left = tests::records(dir.path()).1.len();
        assert!((1..5).contains(&left) && pending(dir.path()) == left, "{left}");
    }

    #[test]
    fn buckets_have_prefixes_or_none() {
        let parse = |text: &str| text.parse::<Bucket>();
        assert_eq!(parse("trails").unwrap().prefix, "");
        assert_eq!(parse("trails/").unwrap(), parse("trails").unwrap());
        assert_eq!(parse("my.trails/a/b/").unwrap().prefix, "a/b/");
        let long = format!("trails/{}", "x".repeat(201));
        for bad in ["", "x", "/a", "trails//a", "trails/../a", "trails/a b", "trails./a", &long] {
            assert!(parse(bad).unwrap_err().contains("is no bucket"), "{bad}");
        }
    }
}
