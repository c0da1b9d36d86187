//! CloudWatch Logs, as far as it reads and keeps functions' logs.
//!
//! Groups are `/aws/lambda/<function>` and no others; nobody but functions writes into them.

use std::{io::ErrorKind, sync::Arc};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::ServiceError;
use crate::{
    api::{App, names::Place},
    backend::Backend,
    function::now_ms,
    logs::{
        Change, Logs,
        archive::{Archive, Event, Group, Merge, Positions, StreamFacts},
        pattern::Pattern,
    },
};

/// What all groups begin with.
const PREFIX: &str = "/aws/lambda/";

/// Groups or streams in a page.
const PAGE: usize = 50;

/// Events in a page, and the bytes that they may have, with [`OVERHEAD`] for each.
const EVENTS: usize = 10_000;
const EVENT_BYTES: usize = 1 << 20;
const OVERHEAD: usize = 26;

/// Bytes that one call of FilterLogEvents looks through before it gives a token to go on with.
const SEARCH: usize = 16 << 20;

/// Longest token; none that was given is longer.
const TOKEN: usize = 64 * 1024;

/// Days that PutRetentionPolicy takes.
const RETENTION: [u32; 22] = [
    1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922,
    3288, 3653,
];

const DAY_MS: i64 = 86_400_000;

/// Does one operation.
pub async fn call<B: Backend>(
    app: &Arc<App<B>>,
    operation: &str,
    input: Value,
) -> Result<Value, ServiceError> {
    let (logs, place) = (&app.logs, app.place.clone());
    match operation {
        "DescribeLogGroups" => {
            let input: DescribeGroups = parse(input)?;
            read(logs, move |archive| describe_groups(&archive, &place, input)).await
        }
        "DescribeLogStreams" => {
            let input: DescribeStreams = parse(input)?;
            read(logs, move |archive| describe_streams(&archive, &place, input)).await
        }
        "GetLogEvents" => {
            let input: GetEvents = parse(input)?;
            read(logs, move |archive| get_events(&archive, &place, input)).await
        }
        "FilterLogEvents" => {
            let input: FilterEvents = parse(input)?;
            read(logs, move |archive| filter_events(&archive, &place, input)).await
        }
        "CreateLogGroup" => {
            let Named { log_group_name, tags, kms_key_id } = parse(input)?;
            if tags.is_some_and(|tags| !tags.is_empty()) || kms_key_id.is_some() {
                return Err(invalid("Firn has neither tags nor keys of log groups."));
            }
            change(logs, &own(&log_group_name)?, Change::CreateGroup).await
        }
        "DeleteLogGroup" => {
            let input: Named = parse(input)?;
            change(logs, &own(&input.log_group_name)?, Change::RemoveGroup).await
        }
        "DeleteLogStream" => {
            let input: NamedStream = parse(input)?;
            let stream = stream_name(input.log_stream_name)?;
            change(logs, &own(&input.log_group_name)?, Change::RemoveStream(stream)).await
        }
        "PutRetentionPolicy" => {
            let Retention { log_group_name, retention_in_days: days } = parse(input)?;
            if !RETENTION.contains(&days) {
                return Err(invalid(format!(
                    "{days} is not a valid value for retentionInDays: one of {RETENTION:?}"
                )));
            }
            change(logs, &own(&log_group_name)?, Change::Retention(Some(days))).await
        }
        "DeleteRetentionPolicy" => {
            let input: Named = parse(input)?;
            change(logs, &own(&input.log_group_name)?, Change::Retention(None)).await
        }
        "ListTagsForResource" => {
            let Resource { resource_arn } = parse(input)?;
            no_tags(logs, identified(&place, None, Some(resource_arn))?).await
        }
        "ListTagsLogGroup" => {
            let input: Named = parse(input)?;
            no_tags(logs, own(&input.log_group_name)?).await
        }
        _ => Err(ServiceError::unknown("Logs_20140328", operation)),
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct DescribeGroups {
    log_group_name_prefix: Option<String>,
    log_group_name_pattern: Option<String>,
    next_token: Option<String>,
    limit: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct DescribeStreams {
    log_group_name: Option<String>,
    log_group_identifier: Option<String>,
    log_stream_name_prefix: Option<String>,
    order_by: Option<String>,
    #[serde(default)]
    descending: bool,
    next_token: Option<String>,
    limit: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct GetEvents {
    log_group_name: Option<String>,
    log_group_identifier: Option<String>,
    log_stream_name: String,
    start_time: Option<i64>,
    end_time: Option<i64>,
    next_token: Option<String>,
    limit: Option<i64>,
    #[serde(default)]
    start_from_head: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct FilterEvents {
    log_group_name: Option<String>,
    log_group_identifier: Option<String>,
    log_stream_names: Option<Vec<String>>,
    log_stream_name_prefix: Option<String>,
    start_time: Option<i64>,
    end_time: Option<i64>,
    filter_pattern: Option<String>,
    next_token: Option<String>,
    limit: Option<i64>,
    start_from_head: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Named {
    log_group_name: String,
    tags: Option<serde_json::Map<String, Value>>,
    kms_key_id: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NamedStream {
    log_group_name: String,
    log_stream_name: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Retention {
    log_group_name: String,
    retention_in_days: u32,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Resource {
    resource_arn: String,
}

fn parse<T: DeserializeOwned>(input: Value) -> Result<T, ServiceError> {
    serde_json::from_value(input)
        .map_err(|e| ServiceError::new("SerializationException", e.to_string()))
}

fn invalid(message: impl Into<String>) -> ServiceError {
    ServiceError::new("InvalidParameterException", message)
}

fn no_group() -> ServiceError {
    ServiceError::new("ResourceNotFoundException", "The specified log group does not exist.")
}

fn no_stream() -> ServiceError {
    ServiceError::new("ResourceNotFoundException", "The specified log stream does not exist.")
}

async fn read(
    logs: &Logs,
    work: impl FnOnce(Archive) -> Result<Value, ServiceError> + Send + 'static,
) -> Result<Value, ServiceError> {
    logs.read(work).await.map_err(|e| ServiceError::internal(e.to_string()))?
}

async fn change(logs: &Logs, function: &str, change: Change) -> Result<Value, ServiceError> {
    let stream = matches!(change, Change::RemoveStream(_));
    match logs.change(function, change).await {
        Ok(()) => Ok(json!({})),
        Err(error) => Err(match error.kind() {
            ErrorKind::NotFound if stream => no_stream(),
            ErrorKind::NotFound => no_group(),
            ErrorKind::AlreadyExists => {
                let text = "The specified log group already exists";
                ServiceError::new("ResourceAlreadyExistsException", text)
            }
            ErrorKind::QuotaExceeded => {
                ServiceError::new("LimitExceededException", "Resource limit exceeded.")
            }
            _ => ServiceError::internal(error.to_string()),
        }),
    }
}

async fn no_tags(logs: &Logs, function: String) -> Result<Value, ServiceError> {
    let tags = move |archive: Archive| match archive.group(&function) {
        Some(_) => Ok(json!({"tags": {}})),
        None => Err(no_group()),
    };
    read(logs, tags).await
}

/// The function whose group has that name, as far as names go.
fn function(group: &str) -> Result<Option<&str>, ServiceError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".-_/#".contains(c);
    if group.is_empty() || group.len() > 512 || !group.chars().all(allowed) {
        return Err(invalid(
            "Value at 'logGroupName' failed to satisfy constraint: Member must have length from 1 to \
             512 and satisfy regular expression pattern: [\\.\\-_/#A-Za-z0-9]+",
        ));
    }
    let plain =
        |name: &&str| (1..=64).contains(&name.len()) && !name.contains(|c: char| ".#/".contains(c));
    Ok(group.strip_prefix(PREFIX).filter(plain))
}

/// The same, where a group is to be changed.
fn own(group: &str) -> Result<String, ServiceError> {
    function(group)?.map(str::to_owned).ok_or_else(|| {
        invalid(format!("Firn keeps logs of functions only, in groups {PREFIX}<function>."))
    })
}

/// The same, by name, or by name or ARN.
fn identified(
    place: &Place,
    name: Option<String>,
    identifier: Option<String>,
) -> Result<String, ServiceError> {
    let group = match (name, identifier) {
        (Some(name), None) => name,
        (None, Some(identifier)) => {
            let arn = format!("arn:aws:logs:{}:{}:log-group:", place.region, place.account);
            match identifier.strip_prefix(&arn) {
                Some(name) => name.strip_suffix(":*").unwrap_or(name).to_owned(),
                None if identifier.starts_with("arn:") => return Err(no_group()),
                None => identifier,
            }
        }
        _ => {
            let text = "Exactly one of logGroupName and logGroupIdentifier is required.";
            return Err(invalid(text));
        }
    };
    function(&group)?.map(str::to_owned).ok_or_else(no_group)
}

fn stream_name(name: String) -> Result<String, ServiceError> {
    match (1..=512).contains(&name.len()) && !name.contains([':', '*', '\0']) {
        true => Ok(name),
        false => Err(invalid(
            "Value at 'logStreamName' failed to satisfy constraint: Member must have length from 1 to \
             512 and satisfy regular expression pattern: [^:*]*",
        )),
    }
}

fn limit(given: Option<i64>, most: usize) -> Result<usize, ServiceError> {
    let Some(given) = given else { return Ok(most) };
    usize::try_from(given).ok().filter(|limit| (1..=most).contains(limit)).ok_or_else(|| {
        invalid(format!(
            "Value '{given}' at 'limit' failed to satisfy constraint: Member must have value from 1 to \
             {most}"
        ))
    })
}

fn bad_token() -> ServiceError {
    invalid("The specified nextToken is invalid.")
}

fn arn(place: &Place, function: &str) -> String {
    format!("arn:aws:logs:{}:{}:log-group:{PREFIX}{function}", place.region, place.account)
}

fn describe_groups(
    archive: &Archive,
    place: &Place,
    input: DescribeGroups,
) -> Result<Value, ServiceError> {
    let most = limit(input.limit, PAGE)?;
    if input.log_group_name_prefix.is_some() && input.log_group_name_pattern.is_some() {
        return Err(invalid("logGroupNamePrefix and logGroupNamePattern exclude each other."));
    }
    let after = input.next_token.unwrap_or_default();
    let groups = archive.groups().map_err(|e| ServiceError::internal(e.to_string()))?;
    let mut groups = groups.into_iter().filter(|name| {
        let full = format!("{PREFIX}{name}");
        *name > after
            && input.log_group_name_prefix.as_ref().is_none_or(|p| full.starts_with(p.as_str()))
            && input.log_group_name_pattern.as_ref().is_none_or(|p| full.contains(p.as_str()))
    });
    let page: Vec<Group> =
        groups.by_ref().filter_map(|name| archive.group(&name)).take(most).collect();
    let next = groups.next().and(page.last()).map(|last| last.function.clone());
    let shown = page.iter().map(|group| {
        let arn = arn(place, &group.function);
        let mut shown = json!({
            "logGroupName": format!("{PREFIX}{}", group.function),
            "creationTime": group.created_ms,
            "metricFilterCount": 0,
            "arn": format!("{arn}:*"),
            "logGroupArn": arn,
            "storedBytes": group.bytes,
            "logGroupClass": "STANDARD",
        });
        if let Some(days) = group.retention {
            shown["retentionInDays"] = days.into();
        }
        shown
    });
    let mut output = json!({"logGroups": shown.collect::<Vec<_>>()});
    if let Some(next) = next {
        output["nextToken"] = next.into();
    }
    Ok(output)
}

fn describe_streams(
    archive: &Archive,
    place: &Place,
    input: DescribeStreams,
) -> Result<Value, ServiceError> {
    let function = identified(place, input.log_group_name, input.log_group_identifier)?;
    let most = limit(input.limit, PAGE)?;
    let by_time = match input.order_by.as_deref() {
        None | Some("LogStreamName") => false,
        Some("LastEventTime") if input.log_stream_name_prefix.is_some() => {
            return Err(invalid("Cannot order by LastEventTime with a logStreamNamePrefix."));
        }
        Some("LastEventTime") => true,
        Some(_) => return Err(invalid("orderBy is one of LogStreamName, LastEventTime.")),
    };
    let prefix = input.log_stream_name_prefix.unwrap_or_default();
    let streams = archive.streams(&function).ok_or_else(no_group)?;
    let streams = streams.into_iter().filter(|(name, _)| name.starts_with(&prefix));
    let mut facts: Vec<StreamFacts> =
        streams.filter_map(|(name, _)| archive.facts(&function, &name)).collect();
    if by_time {
        facts.sort_by_key(|stream| (stream.times.map(|(_, last, _)| last), stream.name.clone()));
    }
    if input.descending {
        facts.reverse();
    }
    // Streams come and go between two pages; the name says where the last one ended.
    let begin = match &input.next_token {
        None => 0,
        Some(last) => {
            let found = facts.iter().position(|stream| stream.name == *last);
            found.map(|at| at + 1).ok_or_else(bad_token)?
        }
    };
    let rest = facts.get(begin..).unwrap_or_default();
    let page = &rest[..most.min(rest.len())];
    let group = arn(place, &function);
    let shown = page.iter().map(|StreamFacts { name, times, bytes }| {
        let mut shown = json!({
            "logStreamName": name,
            "arn": format!("{group}:log-stream:{name}"),
            "storedBytes": bytes,
        });
        if let Some((first, last, ingested)) = times {
            shown["creationTime"] = (*first).into();
            shown["firstEventTimestamp"] = (*first).into();
            shown["lastEventTimestamp"] = (*last).into();
            shown["lastIngestionTime"] = (*ingested).into();
        }
        shown
    });
    let mut output = json!({"logStreams": shown.collect::<Vec<_>>()});
    if let Some(last) = page.last().filter(|_| page.len() < rest.len()) {
        output["nextToken"] = last.name.clone().into();
    }
    Ok(output)
}

/// The earliest time that a caller gets to see: what is older than the group's retention is gone for
/// callers before it is gone from the disk.
fn earliest(archive: &Archive, function: &str, start: Option<i64>) -> i64 {
    let kept = archive.retention(function).map(|days| now_ms() - i64::from(days) * DAY_MS);
    start.unwrap_or(0).max(kept.unwrap_or(0))
}

/// A line with its end, as functions' lines are in CloudWatch.
fn message(event: &Event) -> String {
    String::from_utf8_lossy(&event.message).into_owned() + "\n"
}

/// A page of events: what there is room for.
#[derive(Debug)]
struct Page {
    events: Vec<Value>,
    most: usize,
    bytes: usize,
}

impl Page {
    fn new(most: usize) -> Self {
        Self { events: Vec::new(), most, bytes: 0 }
    }

    /// Whether one more event has room; the first one always has.
    fn has_room(&self, event: &Event) -> bool {
        let bytes = self.bytes + event.message.len() + OVERHEAD;
        self.events.is_empty() || (self.events.len() < self.most && bytes <= EVENT_BYTES)
    }

    fn add(&mut self, event: &Event, shown: Value) {
        self.bytes += event.message.len() + OVERHEAD;
        self.events.push(shown);
    }
}

fn get_events(archive: &Archive, place: &Place, input: GetEvents) -> Result<Value, ServiceError> {
    let function = identified(place, input.log_group_name, input.log_group_identifier)?;
    let stream = stream_name(input.log_stream_name)?;
    let mut page = Page::new(limit(input.limit, EVENTS)?);
    archive.group(&function).ok_or_else(no_group)?;
    let mut reader = archive.open(&function, &stream).ok_or_else(no_stream)?;
    let start = earliest(archive, &function, input.start_time);
    let end = input.end_time.unwrap_or(i64::MAX);
    let shown = |event: &Event| {
        json!({
            "timestamp": event.timestamp_ms,
            "message": message(event),
            "ingestionTime": event.ingestion_ms,
        })
    };
    let token = match input.next_token.as_deref() {
        None => None,
        Some(token) => {
            let (forward, position) = match token.split_at_checked(2) {
                Some(("f/", position)) => (true, position),
                Some(("b/", position)) => (false, position),
                _ => return Err(bad_token()),
            };
            Some((forward, position.parse::<u64>().map_err(|_| bad_token())?))
        }
    };
    let (forward, mut at) = match token {
        Some(token) => token,
        None if input.start_from_head => (true, reader.seek(start)),
        None if end == i64::MAX => (false, reader.end()),
        None => (false, reader.seek(end)),
    };
    let (mut first, mut last) = (at, at);
    if forward {
        while let Some(event) = reader.next(at) {
            if event.timestamp_ms >= end || !page.has_room(&event) {
                break;
            }
            at = event.next;
            last = at;
            if event.timestamp_ms >= start {
                page.add(&event, shown(&event));
            } else if page.events.is_empty() {
                first = at;
            }
        }
    } else {
        while let Some(event) = reader.previous(at) {
            if event.timestamp_ms < start || !page.has_room(&event) {
                break;
            }
            at = event.at;
            first = at;
            if event.timestamp_ms < end {
                page.add(&event, shown(&event));
            }
        }
        page.events.reverse();
    }
    Ok(json!({
        "events": page.events,
        "nextForwardToken": format!("f/{last:020}"),
        "nextBackwardToken": format!("b/{first:020}"),
    }))
}

fn filter_events(
    archive: &Archive,
    place: &Place,
    input: FilterEvents,
) -> Result<Value, ServiceError> {
    let function = identified(place, input.log_group_name, input.log_group_identifier)?;
    let mut page = Page::new(limit(input.limit, EVENTS)?);
    let pattern = input.filter_pattern.unwrap_or_default();
    if pattern.len() > 1024 {
        return Err(invalid("filterPattern has more than 1024 characters."));
    }
    let pattern = Pattern::parse(&pattern).map_err(|e| invalid(e.to_string()))?;
    if input.start_from_head == Some(false) {
        return Err(invalid("Firn gives the earliest events first: startFromHead can't be false."));
    }
    let start = earliest(archive, &function, input.start_time);
    let end = input.end_time.unwrap_or(i64::MAX);
    let positions = input.next_token.map_or(Ok(Positions::new()), |token| positions(&token))?;
    // What was last written before the first event that is asked for has nothing to say.
    let mut streams = archive.streams(&function).ok_or_else(no_group)?;
    streams.retain(|(_, modified)| *modified >= start);
    let mut streams: Vec<String> = streams.into_iter().map(|(name, _)| name).collect();
    match (input.log_stream_names, input.log_stream_name_prefix) {
        (Some(_), Some(_)) => {
            return Err(invalid("logStreamNames and logStreamNamePrefix exclude each other."));
        }
        (Some(names), None) => {
            if !(1..=100).contains(&names.len()) {
                return Err(invalid("logStreamNames has 1 to 100 names."));
            }
            if names.iter().any(|name| archive.open(&function, name).is_none()) {
                return Err(no_stream());
            }
            streams.retain(|name| names.contains(name));
        }
        (None, prefix) => streams.retain(|name| name.starts_with(prefix.as_deref().unwrap_or(""))),
    }
    let mut merge = Merge::new(archive, &function, &streams, start, positions);
    let mut searched = 0;
    let more = loop {
        let Some((_, event)) = merge.peek() else { break false };
        if event.timestamp_ms > end {
            break false;
        }
        if searched > SEARCH || !page.has_room(event) {
            break true;
        }
        let Some((stream, event)) = merge.take() else { break false };
        searched += event.message.len() + OVERHEAD;
        let text = message(&event);
        // A position may lie before what is asked for now.
        if event.timestamp_ms < start || !pattern.fits(text.trim_end_matches('\n')) {
            continue;
        }
        let shown = json!({
            "logStreamName": stream,
            "timestamp": event.timestamp_ms,
            "message": text,
            "ingestionTime": event.ingestion_ms,
            "eventId": event_id(&stream, &event),
        });
        page.add(&event, shown);
    };
    let mut output = json!({"events": page.events, "searchedLogStreams": []});
    if more {
        let positions = serde_json::to_vec(merge.positions()).unwrap_or_default();
        output["nextToken"] = URL_SAFE_NO_PAD.encode(positions).into();
    }
    Ok(output)
}

fn positions(token: &str) -> Result<Positions, ServiceError> {
    let bytes = Some(token).filter(|token| token.len() <= TOKEN);
    let bytes = bytes.and_then(|token| URL_SAFE_NO_PAD.decode(token).ok());
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).ok_or_else(bad_token)
}

/// 56 digits, as in CloudWatch: the event's time, its stream, its place in it. An event has the same for
/// as long as it is kept.
fn event_id(stream: &str, event: &Event) -> String {
    let hash = blake3::hash(stream.as_bytes());
    let [a, b, c, d, e, f, g, h, ..] = *hash.as_bytes();
    let stream = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    format!("{:016}{stream:020}{:020}", event.timestamp_ms.max(0), event.at)
}
