//! Functions' logs through the API of CloudWatch Logs.

use super::*;

impl Daemon {
    async fn logs(&self, operation: &str, input: Value) -> Value {
        let answer = self.service(&format!("Logs_20140328.{operation}"), &input).await;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status, 200, "{operation}: {text}");
        answer.json()
    }

    async fn logs_refuse(&self, operation: &str, input: Value) -> String {
        let answer = self.service(&format!("Logs_20140328.{operation}"), &input).await;
        assert_eq!(answer.status, 400, "{:?}", answer.json());
        answer.json()["__type"].as_str().unwrap().to_owned()
    }

    /// All pages of an operation, a few items each.
    async fn pages(&self, operation: &str, mut input: Value, member: &str) -> Vec<Value> {
        let mut all = Vec::new();
        for _ in 0..1000 {
            let mut page = self.logs(operation, input.clone()).await;
            all.append(page[member].as_array_mut().unwrap());
            let Some(token) = page.get("nextToken") else { return all };
            input["nextToken"] = token.clone();
        }
        panic!("{operation} does not end");
    }
}

fn texts(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["message"].as_str().unwrap()).collect()
}

const GROUP: &str = "/aws/lambda/f";

/// A function that was invoked, each time in an instance of its own.
async fn invoked(daemon: &Daemon, times: usize) -> Vec<String> {
    daemon.create("f", json!({})).await;
    // The instance that the snapshot is made from has a stream, too.
    daemon.snapshot_is("f", "ready").await;
    daemon.logs("DeleteLogGroup", json!({"logGroupName": GROUP})).await;
    let mut ids = Vec::new();
    for _ in 0..times {
        let answer = daemon.invoke("f", &[("X-Firn-Start", "boot")], &json!({})).await;
        ids.push(answer.header("x-amzn-requestid").unwrap().to_owned());
    }
    ids
}

#[tokio::test]
async fn groups_and_streams_are_listed_in_pages() {
    let (_dir, daemon) = daemon().await;
    invoked(&daemon, 3).await;
    daemon.logs("CreateLogGroup", json!({"logGroupName": "/aws/lambda/g"})).await;
    let groups = daemon.pages("DescribeLogGroups", json!({"limit": 1}), "logGroups").await;
    let names: Vec<&Value> = groups.iter().map(|g| &g["logGroupName"]).collect();
    assert_eq!(names, ["/aws/lambda/f", "/aws/lambda/g"]);
    assert_eq!(groups[0]["arn"], "arn:aws:logs:us-east-1:000000000000:log-group:/aws/lambda/f:*");
    assert!(groups[0]["storedBytes"].as_u64().unwrap() > 100);
    let now = crate::function::now_ms();
    assert!((now - 60_000..=now).contains(&groups[1]["creationTime"].as_i64().unwrap()));
    let prefixed = json!({"logGroupNamePrefix": "/aws/lambda/g"});
    assert_eq!(daemon.logs("DescribeLogGroups", prefixed).await["logGroups"][0], groups[1]);

    for (order, descending) in [("LogStreamName", false), ("LastEventTime", true)] {
        let input = json!({
            "logGroupName": GROUP, "orderBy": order, "descending": descending, "limit": 1,
        });
        let streams = daemon.pages("DescribeLogStreams", input, "logStreams").await;
        assert_eq!(streams.len(), 3);
        let key = if descending { "lastEventTimestamp" } else { "logStreamName" };
        let keys: Vec<String> = streams.iter().map(|s| s[key].to_string()).collect();
        let mut sorted = keys.clone();
        sorted.sort();
        if descending {
            sorted.reverse();
        }
        assert_eq!(keys, sorted);
        for stream in &streams {
            let first = stream["firstEventTimestamp"].as_i64().unwrap();
            let last = stream["lastEventTimestamp"].as_i64().unwrap();
            let ingested = stream["lastIngestionTime"].as_i64().unwrap();
            assert!(first <= last && last <= ingested && ingested <= now);
        }
    }
    let year = json!({"logGroupIdentifier": groups[0]["logGroupArn"], "logStreamNamePrefix": "20"});
    assert_eq!(
        daemon.logs("DescribeLogStreams", year).await["logStreams"].as_array().unwrap().len(),
        3
    );
}

#[tokio::test]
async fn a_stream_is_read_from_both_ends() {
    let (_dir, daemon) = daemon().await;
    let id = &invoked(&daemon, 1).await[0];
    let streams = daemon.logs("DescribeLogStreams", json!({"logGroupName": GROUP})).await;
    let stream = &streams["logStreams"][0]["logStreamName"];
    let base = json!({"logGroupName": GROUP, "logStreamName": stream});
    let all = daemon.logs("GetLogEvents", base.clone()).await;
    let events = all["events"].as_array().unwrap().clone();
    let lines = texts(&events);
    assert_eq!(lines[0], "loading\n");
    assert_eq!(lines[1], format!("START RequestId: {id} Version: $LATEST\n"));
    assert_eq!(lines[2], "hello from the function\n");
    assert_eq!(lines[3], format!("END RequestId: {id}\n"));
    assert!(lines[4].starts_with(&format!("REPORT RequestId: {id}\tDuration: 1.50 ms")));
    assert_eq!(lines.len(), 5);

    let with = |more: Value| {
        let mut input = base.clone();
        input.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        input
    };
    let last = daemon.logs("GetLogEvents", with(json!({"limit": 2}))).await;
    assert_eq!(last["events"].as_array().unwrap()[..], events[3..]);
    let token = json!({"limit": 2, "nextToken": last["nextBackwardToken"]});
    let before = daemon.logs("GetLogEvents", with(token)).await;
    assert_eq!(before["events"].as_array().unwrap()[..], events[1..3]);
    let head = json!({"limit": 2, "startFromHead": true});
    let first = daemon.logs("GetLogEvents", with(head)).await;
    assert_eq!(first["events"].as_array().unwrap()[..], events[..2]);
    let mut token = first["nextForwardToken"].clone();
    let mut rest = Vec::new();
    for _ in 0..3 {
        let input = with(json!({"limit": 2, "startFromHead": true, "nextToken": token}));
        let mut page = daemon.logs("GetLogEvents", input).await;
        rest.append(page["events"].as_array_mut().unwrap());
        token = page["nextForwardToken"].clone();
    }
    assert_eq!(rest[..], events[2..]);
    let input = with(json!({"startFromHead": true, "nextToken": token}));
    let end = daemon.logs("GetLogEvents", input).await;
    assert_eq!((&end["nextForwardToken"], &end["events"]), (&token, &json!([])));

    let time = events[4]["timestamp"].as_i64().unwrap();
    let late = daemon.logs("GetLogEvents", with(json!({"startTime": time + 1}))).await;
    assert_eq!(late["events"], json!([]));
    let early = daemon.logs("GetLogEvents", with(json!({"endTime": 1}))).await;
    assert_eq!(early["events"], json!([]));
    for token in ["x", "f/", "f/x", "b/-1", "ä"] {
        let refusal = daemon.logs_refuse("GetLogEvents", with(json!({"nextToken": token}))).await;
        assert_eq!(refusal, "InvalidParameterException");
    }
    let nowhere = with(json!({"nextToken": "f/00000000000000000007"}));
    assert_eq!(daemon.logs("GetLogEvents", nowhere).await["events"], json!([]));
}

#[tokio::test]
async fn events_of_all_streams_are_found_in_their_order() {
    let (_dir, daemon) = daemon().await;
    let ids = invoked(&daemon, 4).await;
    let all = json!({"logGroupName": GROUP, "limit": 3, "interleaved": true});
    let events = daemon.pages("FilterLogEvents", all.clone(), "events").await;
    assert_eq!(events.len(), 20);
    let times: Vec<i64> = events.iter().map(|e| e["timestamp"].as_i64().unwrap()).collect();
    assert!(times.is_sorted());
    let unique: std::collections::BTreeSet<&str> =
        events.iter().map(|e| e["eventId"].as_str().unwrap()).collect();
    assert_eq!(unique.len(), 20);
    assert!(unique.iter().all(|id| id.len() == 56));
    assert_eq!(daemon.pages("FilterLogEvents", all.clone(), "events").await, events);

    let mut filtered = all.clone();
    filtered["filterPattern"] = format!("START \"{}\"", ids[2]).into();
    let found = daemon.pages("FilterLogEvents", filtered.clone(), "events").await;
    assert_eq!(texts(&found), [format!("START RequestId: {} Version: $LATEST\n", ids[2])]);
    filtered["filterPattern"] = "hello".into();
    filtered["logStreamNames"] = json!([found[0]["logStreamName"]]);
    assert_eq!(daemon.pages("FilterLogEvents", filtered, "events").await.len(), 1);

    // As `aws logs tail --follow` asks for what is new.
    let mut since = all.clone();
    since["startTime"] = times[19].into();
    let new = daemon.pages("FilterLogEvents", since.clone(), "events").await;
    assert!(!new.is_empty() && new.iter().all(|e| e["timestamp"].as_i64().unwrap() == times[19]));
    since["startTime"] = (times[19] + 1).into();
    assert!(daemon.pages("FilterLogEvents", since.clone(), "events").await.is_empty());
    daemon.invoke("f", &[], &json!({})).await;
    assert_eq!(daemon.pages("FilterLogEvents", since, "events").await.len(), 4);
    let mut until = all;
    until["endTime"] = (times[0] - 1).into();
    assert!(daemon.pages("FilterLogEvents", until, "events").await.is_empty());
}

#[tokio::test]
async fn groups_are_made_kept_for_a_time_and_deleted() {
    let (_dir, daemon) = daemon().await;
    invoked(&daemon, 1).await;
    let group = json!({"logGroupName": GROUP});
    let refusal = daemon.logs_refuse("CreateLogGroup", group.clone()).await;
    assert_eq!(refusal, "ResourceAlreadyExistsException");
    let days = |days: i64| json!({"logGroupName": GROUP, "retentionInDays": days});
    daemon.logs("PutRetentionPolicy", days(7)).await;
    let shown = daemon.logs("DescribeLogGroups", json!({})).await;
    assert_eq!(shown["logGroups"][0]["retentionInDays"], 7);
    assert_eq!(
        daemon.logs_refuse("PutRetentionPolicy", days(2)).await,
        "InvalidParameterException"
    );
    daemon.logs("DeleteRetentionPolicy", group.clone()).await;
    let shown = daemon.logs("DescribeLogGroups", json!({})).await;
    assert_eq!(shown["logGroups"][0].get("retentionInDays"), None);
    let arn = &shown["logGroups"][0]["logGroupArn"];
    let tags = daemon.logs("ListTagsForResource", json!({"resourceArn": arn})).await;
    assert_eq!(tags, json!({"tags": {}}));

    let streams = daemon.logs("DescribeLogStreams", group.clone()).await;
    let stream = json!({
        "logGroupName": GROUP, "logStreamName": streams["logStreams"][0]["logStreamName"],
    });
    daemon.logs("DeleteLogStream", stream.clone()).await;
    for operation in ["DeleteLogStream", "GetLogEvents"] {
        let refusal = daemon.logs_refuse(operation, stream.clone()).await;
        assert_eq!(refusal, "ResourceNotFoundException");
    }
    assert_eq!(daemon.logs("DescribeLogStreams", group.clone()).await["logStreams"], json!([]));
    daemon.logs("DeleteLogGroup", group.clone()).await;
    for operation in ["DeleteLogGroup", "DescribeLogStreams", "FilterLogEvents"] {
        let refusal = daemon.logs_refuse(operation, group.clone()).await;
        assert_eq!(refusal, "ResourceNotFoundException", "{operation}");
    }
    // An instance that lives on begins anew.
    daemon.invoke("f", &[], &json!({})).await;
    assert_eq!(daemon.pages("FilterLogEvents", group.clone(), "events").await.len(), 4);
    // Logs go with their function.
    daemon.call("DELETE", &format!("{FUNCTIONS}/f"), &[], b"").await;
    assert_eq!(daemon.logs_refuse("DescribeLogStreams", group).await, "ResourceNotFoundException");
}

#[tokio::test]
async fn names_never_lead_out_of_a_group() {
    let (dir, daemon) = daemon().await;
    invoked(&daemon, 1).await;
    std::fs::create_dir(dir.path().join("keep")).unwrap();
    for name in
        ["/aws/lambda/..", "/aws/lambda/../keep", "/aws/lambda/", "/other", "/aws/lambda/a.b"]
    {
        for operation in ["CreateLogGroup", "DeleteLogGroup"] {
            let refusal = daemon.logs_refuse(operation, json!({"logGroupName": name})).await;
            assert_eq!(refusal, "InvalidParameterException", "{operation} {name}");
        }
        let refusal = daemon.logs_refuse("FilterLogEvents", json!({"logGroupName": name})).await;
        assert_eq!(refusal, "ResourceNotFoundException", "{name}");
    }
    for name in ["", "a b", "ä", &"x".repeat(513)] {
        let refusal = daemon.logs_refuse("DeleteLogGroup", json!({"logGroupName": name})).await;
        assert_eq!(refusal, "InvalidParameterException");
    }
    for stream in ["../../store.sqlite", "..", "retention", "/", "a\0b", ""] {
        let input = json!({"logGroupName": GROUP, "logStreamName": stream});
        daemon.logs_refuse("GetLogEvents", input.clone()).await;
        daemon.logs_refuse("DeleteLogStream", input).await;
    }
    assert!(dir.path().join("keep").exists() && dir.path().join("store.sqlite").exists());
    for (operation, input) in [
        ("DescribeLogGroups", json!({"limit": 51})),
        ("DescribeLogStreams", json!({})),
        ("DescribeLogStreams", json!({"logGroupName": GROUP, "orderBy": "x"})),
        ("DescribeLogStreams", json!({"logGroupName": GROUP, "nextToken": "x"})),
        ("FilterLogEvents", json!({"logGroupName": GROUP, "filterPattern": "%x%"})),
        ("FilterLogEvents", json!({"logGroupName": GROUP, "nextToken": "!"})),
        ("FilterLogEvents", json!({"logGroupName": GROUP, "startFromHead": false})),
        ("FilterLogEvents", json!({"logGroupName": GROUP, "limit": 0})),
        ("CreateLogGroup", json!({"logGroupName": "/aws/lambda/x", "tags": {"a": "b"}})),
    ] {
        let refusal = daemon.logs_refuse(operation, input.clone()).await;
        assert_eq!(refusal, "InvalidParameterException", "{operation} {input}");
    }
    let wrong = json!({"logGroupName": 7});
    assert_eq!(daemon.logs_refuse("FilterLogEvents", wrong).await, "SerializationException");
    let refusal = daemon.logs_refuse("PutLogEvents", json!({})).await;
    assert_eq!(refusal, "UnknownOperationException");
}
