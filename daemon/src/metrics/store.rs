//! Metrics and metering on the disk: one SQLite file, written behind the requests.
//!
//! A row is one series in one minute, with all its metrics. Minutes are kept for [`MINUTES`], and fewer
//! if there are more than [`ROWS`] rows; days of metering for [`DAYS`]. Writes are whole or not at all, but
//! the disk is not waited for: a killed daemon loses what it had not handed over, a machine that loses
//! power perhaps some seconds.

use std::{collections::HashMap, fs::File, os::unix::fs::OpenOptionsExt, path::Path};

use anyhow::Context;
use rusqlite::{Connection, OptionalExtension, params};
use serde::Serialize;

use super::{Day, Metric, Row, Series, Usage};

/// Minutes for which minutes are kept: three days.
pub const MINUTES: i64 = 3 * 24 * 60;

/// Most rows of minutes; some 200 bytes each.
const ROWS: i64 = 2_000_000;

/// Days for which days are kept.
const DAYS: i64 = 400;

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS series (
        id       INTEGER NOT NULL PRIMARY KEY,
        function TEXT    NOT NULL,
        resource TEXT    NOT NULL,
        version  TEXT    NOT NULL,
        metrics  INTEGER NOT NULL,
        last     INTEGER NOT NULL,
        UNIQUE (function, resource, version)
    ) STRICT;
    CREATE TABLE IF NOT EXISTS minutes (
        series INTEGER NOT NULL,
        minute INTEGER NOT NULL,
        data   BLOB    NOT NULL,
        PRIMARY KEY (series, minute)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS by_minute ON minutes (minute);
    CREATE TABLE IF NOT EXISTS days (
        day       INTEGER NOT NULL,
        function  TEXT    NOT NULL,
        requests  INTEGER NOT NULL,
        billed_ms INTEGER NOT NULL,
        mb_ms     INTEGER NOT NULL,
        PRIMARY KEY (day, function)
    ) STRICT, WITHOUT ROWID;";

/// The version of this schema; a file of another one is refused.
const VERSION: i64 = 1;

/// The file.
#[derive(Debug)]
pub struct Store(Connection);

/// A series and what it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its place in the list.
    pub id: i64,
    /// Whose it is.
    pub series: Series,
    /// Which metrics it has ever had, a bit each.
    pub metrics: i64,
    /// Its last minute.
    pub last: i64,
}

/// One function on one day.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Metered {
    /// `2026-11-24`, in UTC.
    pub day: String,
    /// The function.
    pub function_name: String,
    /// Invocations.
    pub requests: u64,
    /// Milliseconds billed.
    pub billed_milliseconds: u64,
    /// Megabytes times milliseconds billed: exact.
    pub megabyte_milliseconds: u64,
    /// The same in Lambda's unit.
    pub gigabyte_seconds: f64,
}

impl Store {
    /// Opens the file, and makes it if there is none.
    ///
    /// # Errors
    /// Names the file.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let open = || -> anyhow::Result<Self> {
            File::options().write(true).create(true).truncate(false).mode(0o600).open(path)?;
            let connection = Connection::open(path)?;
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.pragma_update(None, "synchronous", "NORMAL")?;
            connection.busy_timeout(std::time::Duration::from_secs(5))?;
            let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
            anyhow::ensure!(
                found == 0 || found == VERSION,
                "it has version {found}, and this firnd knows {VERSION}"
            );
            connection.execute_batch(SCHEMA)?;
            connection.pragma_update(None, "user_version", VERSION)?;
            Ok(Self(connection))
        };
        open().with_context(|| format!("can't use the store of metrics {}", path.display()))
    }

    /// Adds to what is there.
    ///
    /// # Errors
    /// As SQLite says; then nothing was added.
    pub fn add(
        &mut self,
        rows: &HashMap<(Series, i64), Row>,
        days: &HashMap<Day, Usage>,
    ) -> rusqlite::Result<()> {
        let change = self.0.transaction()?;
        {
            let mut series_of = change.prepare_cached(
                "INSERT INTO series (function, resource, version, metrics, last)
                 VALUES (?1, ?2, ?3, ?4, ?5)
                 ON CONFLICT DO UPDATE SET metrics = metrics | ?4, last = max(last, ?5)
                 RETURNING id",
            )?;
            let mut before = change
                .prepare_cached("SELECT data FROM minutes WHERE series = ?1 AND minute = ?2")?;
            let mut put = change.prepare_cached(
                "INSERT OR REPLACE INTO minutes (series, minute, data) VALUES (?1, ?2, ?3)",
            )?;
            for ((Series { function, resource, version }, minute), row) in rows {
                let metrics = row.metrics();
                let values = params![function, resource, version, metrics, minute];
                let id: i64 = series_of.query_row(values, |row| row.get(0))?;
                let old: Option<Vec<u8>> =
                    before.query_row(params![id, minute], |row| row.get(0)).optional()?;
                let mut all = old.map(|data| Row::decode(&data)).unwrap_or_default();
                all.merge(row);
                put.execute(params![id, minute, all.encode()])?;
            }
            let mut meter = change.prepare_cached(
                "INSERT INTO days VALUES (?1, ?2, ?3, ?4, ?5)
                 ON CONFLICT DO UPDATE SET requests = requests + ?3, billed_ms = billed_ms + ?4,
                    mb_ms = mb_ms + ?5",
            )?;
            for (Day { day, function }, usage) in days {
                let Usage { requests, billed_ms, mb_ms } = *usage;
                let values =
                    [requests, billed_ms, mb_ms].map(|n| i64::try_from(n).unwrap_or(i64::MAX));
                meter.execute(params![day, function, values[0], values[1], values[2]])?;
            }
        }
        change.commit()
    }

    /// Removes what is too old, as of `minute`, or too much.
    ///
    /// # Errors
    /// As SQLite says.
    pub fn prune(&mut self, minute: i64) -> rusqlite::Result<()> {
        let change = self.0.transaction()?;
        let rows: i64 = change.query_row("SELECT count(*) FROM minutes", [], |row| row.get(0))?;
        let crowded: Option<i64> = change
            .query_row(
                "SELECT minute FROM minutes ORDER BY minute LIMIT 1 OFFSET ?1",
                [(rows - ROWS).max(0)],
                |row| row.get(0),
            )
            .optional()?
            .filter(|_| rows > ROWS);
        let oldest = (minute - MINUTES).max(crowded.unwrap_or(0));
        change.execute("DELETE FROM minutes WHERE minute < ?1", [oldest])?;
        change.execute("DELETE FROM series WHERE last < ?1", [oldest])?;
        change.execute("DELETE FROM days WHERE day < ?1", [minute / (24 * 60) - DAYS])?;
        change.commit()
    }

    /// One metric of a series, by minute, from `first` to before `end`.
    ///
    /// # Errors
    /// As SQLite says.
    pub fn minutes(
        &self,
        series: &Series,
        metric: Metric,
        first: i64,
        end: i64,
    ) -> rusqlite::Result<Vec<(i64, super::Distribution)>> {
        let Series { function, resource, version } = series;
        let mut found = self.0.prepare_cached(
            "SELECT minute, data FROM minutes WHERE minute >= ?4 AND minute < ?5 AND series =
                (SELECT id FROM series WHERE function = ?1 AND resource = ?2 AND version = ?3)
             ORDER BY minute",
        )?;
        let values = params![function, resource, version, first, end];
        let rows = found.query_map(values, |row| {
            let data: Vec<u8> = row.get(1)?;
            Ok((row.get(0)?, Row::decode(&data).take(metric)))
        })?;
        let has = |row: rusqlite::Result<(i64, Option<_>)>| match row {
            Ok((minute, values)) => values.map(|values| Ok((minute, values))),
            Err(error) => Some(Err(error)),
        };
        rows.filter_map(has).collect()
    }

    /// Series after the one with the id `after`, at most `limit`.
    ///
    /// # Errors
    /// As SQLite says.
    pub fn series(&self, after: i64, limit: usize) -> rusqlite::Result<Vec<Listed>> {
        let mut found = self.0.prepare_cached(
            "SELECT id, function, resource, version, metrics, last FROM series
             WHERE id > ?1 ORDER BY id LIMIT ?2",
        )?;
        let rows = found.query_map(params![after, limit as i64], |row| {
            let (function, resource, version) = (row.get(1)?, row.get(2)?, row.get(3)?);
            let series = Series { function, resource, version };
            Ok(Listed { id: row.get(0)?, series, metrics: row.get(4)?, last: row.get(5)? })
        })?;
        rows.collect()
    }

    /// What functions used, by day and function, after `after`, to the end of the day `last`.
    ///
    /// # Errors
    /// As SQLite says.
    pub fn days(
        &self,
        function: Option<&str>,
        after: &Day,
        last: i64,
        limit: usize,
    ) -> rusqlite::Result<Vec<Metered>> {
        let mut found = self.0.prepare_cached(
            "SELECT day, function, requests, billed_ms, mb_ms FROM days
             WHERE (day, function) > (?1, ?2) AND day <= ?3 AND (?4 IS NULL OR function = ?4)
             ORDER BY day, function LIMIT ?5",
        )?;
        let values = params![after.day, after.function, last, function, limit as i64];
        let rows = found.query_map(values, |row| {
            let day = Day { day: row.get(0)?, function: row.get(1)? };
            let number = |at| Ok::<_, rusqlite::Error>(row.get::<_, i64>(at)?.unsigned_abs());
            let mb_ms = number(4)?;
            let metered = Metered {
                day: day.date(),
                function_name: day.function.clone(),
                requests: number(2)?,
                billed_milliseconds: number(3)?,
                megabyte_milliseconds: mb_ms,
                gigabyte_seconds: mb_ms as f64 / 1024.0 / 1000.0,
            };
            Ok(metered)
        })?;
        rows.collect()
    }
}
