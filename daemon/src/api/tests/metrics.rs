//! Metrics through the API of CloudWatch, metering, and what Prometheus reads.

use super::*;
use crate::{function::now_ms, scheduler::StartKind};

impl Daemon {
    async fn monitoring(&self, operation: &str, input: Value) -> Value {
        let answer =
            self.service(&format!("GraniteServiceVersion20100801.{operation}"), &input).await;
        assert_eq!(answer.status, 200, "{operation}: {}", answer.json());
        answer.json()
    }

    async fn monitoring_refuses(&self, operation: &str, input: Value) -> String {
        let answer =
            self.service(&format!("GraniteServiceVersion20100801.{operation}"), &input).await;
        assert_eq!(answer.status, 400, "{operation}: {}", answer.json());
        answer.json()["__type"].as_str().unwrap().to_owned()
    }

    /// All values of a metric within this hour and the last.
    pub(super) async fn metric(&self, name: &str, statistic: &str, dimensions: Value) -> f64 {
        let input = statistics(name, statistic, dimensions);
        let output = self.monitoring("GetMetricStatistics", input).await;
        let points = output["Datapoints"].as_array().unwrap();
        assert!(points.len() <= 1, "{points:?}");
        points.first().map_or(f64::NAN, |point| {
            let value = point.get(statistic).unwrap_or(&point["ExtendedStatistics"][statistic]);
            value.as_f64().unwrap()
        })
    }
}

fn statistics(name: &str, statistic: &str, dimensions: Value) -> Value {
    let now = now_ms() / 1000;
    let member = if statistic.starts_with('p') { "ExtendedStatistics" } else { "Statistics" };
    let mut input = json!({
        "Namespace": "AWS/Lambda", "MetricName": name, "Dimensions": dimensions,
        "StartTime": now - 3600, "EndTime": now + 60, "Period": 7200,
    });
    input[member] = json!([statistic]);
    input
}

fn of(function: &str) -> Value {
    json!([{"Name": "FunctionName", "Value": function}])
}

#[tokio::test]
async fn invocations_are_counted_by_account_function_and_alias() {
    let (_dir, daemon) = daemon().await;
    daemon.create("f", json!({"Publish": true})).await;
    daemon.create("g", json!({})).await;
    let alias = json!({"Name": "live", "FunctionVersion": "1"});
    daemon.send("POST", &format!("{FUNCTIONS}/f/aliases"), &alias).await;
    for event in [json!({}), json!({"do": "raise"})] {
        daemon.invoke("f", &[], &event).await;
        daemon.invoke("f:live", &[], &event).await;
    }
    daemon.invoke("g", &[], &json!({})).await;
    let aliased = json!([
        {"Name": "FunctionName", "Value": "f"}, {"Name": "Resource", "Value": "f:live"},
    ]);
    let mut executed = aliased.clone();
    executed.as_array_mut().unwrap().push(json!({"Name": "ExecutedVersion", "Value": "1"}));
    for (name, statistic, dimensions, expected) in [
        ("Invocations", "Sum", json!([]), 5.0),
        ("Invocations", "Sum", of("f"), 4.0),
        ("Invocations", "Sum", of("g"), 1.0),
        ("Invocations", "Sum", aliased.clone(), 2.0),
        ("Invocations", "Sum", executed, 2.0),
        ("Errors", "Sum", of("f"), 2.0),
        ("Errors", "SampleCount", of("f"), 4.0),
        ("Errors", "Average", of("f"), 0.5),
        ("Errors", "Sum", of("g"), 0.0),
        ("Duration", "Maximum", of("f"), 1.5),
        ("Duration", "Minimum", of("f"), 1.5),
        ("Duration", "p99", of("f"), 1.5),
        ("ConcurrentExecutions", "Maximum", of("f"), 1.0),
        ("ConcurrentExecutions", "Maximum", json!([]), 1.0),
        ("UnreservedConcurrentExecutions", "Maximum", json!([]), 1.0),
    ] {
        let found = daemon.metric(name, statistic, dimensions.clone()).await;
        assert_eq!(found, expected, "{name} {statistic} {dimensions}");
    }
    // Not one that has no value is shown with 0.
    assert!(daemon.metric("Throttles", "Sum", of("f")).await.is_nan());
    assert!(daemon.metric("IteratorAge", "Sum", of("f")).await.is_nan());

    let listed =
        daemon.monitoring("ListMetrics", json!({"Dimensions": [{"Name": "Resource"}]})).await;
    let listed = listed["Metrics"].as_array().unwrap().clone();
    assert!(listed.iter().all(|m| m["Namespace"] == "AWS/Lambda"));
    assert!(listed.iter().any(|m| m["MetricName"] == "Duration" && m["Dimensions"] == aliased));
    let none = json!({"Namespace": "AWS/EC2"});
    assert_eq!(daemon.monitoring("ListMetrics", none).await["Metrics"], json!([]));

    let now = now_ms() / 1000;
    let query = |id: &str, name: &str| {
        json!({"Id": id, "MetricStat": {"Stat": "Sum", "Period": 3600, "Metric": {
            "Namespace": "AWS/Lambda", "MetricName": name, "Dimensions": of("f"),
        }}})
    };
    let mut input = json!({
        "MetricDataQueries": [query("a", "Invocations"), query("b", "Errors")],
        "StartTime": now - 7200, "EndTime": now + 60, "MaxDatapoints": 1,
    });
    let mut sums = Vec::new();
    loop {
        let page = daemon.monitoring("GetMetricData", input.clone()).await;
        for result in page["MetricDataResults"].as_array().unwrap() {
            let values = result["Values"].as_array().unwrap();
            assert_eq!(values.len(), result["Timestamps"].as_array().unwrap().len());
            sums.push(values.iter().map(|v| v.as_f64().unwrap()).sum::<f64>());
        }
        let Some(token) = page.get("NextToken") else { break };
        input["NextToken"] = token.clone();
    }
    assert_eq!(sums, [4.0, 2.0]);
}

#[tokio::test]
async fn throttles_and_events_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), Limits { concurrency: 1, ..limits() }, 0).await;
    daemon.create("f", json!({})).await;
    let slow = json!({"do": "sleep", "ms": 300});
    let answers = join_all((0..3).map(|_| daemon.invoke("f", &[], &slow)).collect()).await;
    let throttled = answers.iter().filter(|a| a.status == 429).count() as f64;
    assert!(throttled >= 1.0);
    assert_eq!(daemon.metric("Throttles", "Sum", of("f")).await, throttled);
    assert_eq!(daemon.metric("Throttles", "Sum", json!([])).await, throttled);
    assert_eq!(daemon.metric("Invocations", "Sum", of("f")).await, 3.0 - throttled);
    let event = [("X-Amz-Invocation-Type", "Event")];
    assert_eq!(daemon.invoke("f", &event, &json!({})).await.status, 202);
    for _ in 0..200 {
        if daemon.metric("Invocations", "Sum", of("f")).await == 4.0 - throttled {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(daemon.metric("AsyncEventsReceived", "Sum", of("f")).await, 1.0);
    assert_eq!(daemon.metric("AsyncEventAge", "SampleCount", of("f")).await, 1.0);
    assert!(daemon.metric("AsyncEventsDropped", "Sum", of("f")).await.is_nan());
}

#[tokio::test]
async fn provisioned_concurrency_is_counted() {
    let (_dir, daemon) = daemon().await;
    daemon.create("f", json!({"Publish": true})).await;
    let path = "/2019-09-30/functions/f/provisioned-concurrency?Qualifier=1";
    let answer = daemon.send("PUT", path, &json!({"ProvisionedConcurrentExecutions": 1})).await;
    assert_eq!(answer.status, 202, "{}", answer.json());
    let slow = json!({"do": "sleep", "ms": 200});
    let answers = join_all((0..2).map(|_| daemon.invoke("f:1", &[], &slow)).collect()).await;
    assert!(answers.iter().all(|a| a.status == 200));
    for (name, statistic, expected) in [
        ("ProvisionedConcurrencyInvocations", "Sum", 1.0),
        ("ProvisionedConcurrencySpilloverInvocations", "Sum", 1.0),
        ("ProvisionedConcurrentExecutions", "Maximum", 1.0),
        ("ProvisionedConcurrencyUtilization", "Maximum", 1.0),
        ("ConcurrentExecutions", "Maximum", 2.0),
    ] {
        assert_eq!(daemon.metric(name, statistic, of("f")).await, expected, "{name}");
    }
}

/// Milliseconds billed as the REPORT lines of a function say.
async fn reported(daemon: &Daemon, function: &str) -> Vec<u64> {
    let input =
        json!({"logGroupName": format!("/aws/lambda/{function}"), "filterPattern": "REPORT"});
    let found = daemon.service("Logs_20140328.FilterLogEvents", &input).await.json();
    let billed = |event: &Value| {
        let (_, rest) = event["message"].as_str()?.split_once("Billed Duration: ")?;
        rest.split(' ').next()?.parse().ok()
    };
    found["events"].as_array().unwrap().iter().map(|event| billed(event).unwrap()).collect()
}

#[tokio::test]
async fn metering_is_the_sum_of_the_report_lines_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut expected = (0, 0);
    for round in 1..=2 {
        let daemon = start(dir.path(), limits(), 0).await;
        if round == 1 {
            daemon.create("f", json!({"MemorySize": 1769})).await;
            daemon.create("other", json!({})).await;
        }
        daemon.snapshot_is("f", "ready").await;
        daemon.invoke("other", &[], &json!({})).await;
        for kind in ["boot", "thaw", "warm"] {
            daemon.invoke("f", &[("X-Firn-Start", kind)], &json!({})).await;
        }
        for event in ["raise", "exit", "timeout", "die"] {
            daemon.invoke("f", &[], &json!({"do": event})).await;
        }
        let lines = reported(&daemon, "f").await;
        assert_eq!(lines.len(), 7 * round);
        expected = (lines.len() as u64, lines.iter().sum::<u64>());
        let metered = daemon.get("/firn/v1/metering?FunctionName=f").await.json();
        let days = metered["Days"].as_array().unwrap();
        let sum = |member: &str| days.iter().map(|d| d[member].as_u64().unwrap()).sum::<u64>();
        assert_eq!((sum("Requests"), sum("BilledMilliseconds")), expected);
        assert_eq!(sum("MegabyteMilliseconds"), expected.1 * 1769);
        let gb_s: f64 = days.iter().map(|d| d["GigabyteSeconds"].as_f64().unwrap()).sum();
        assert!((gb_s - expected.1 as f64 / 1000.0 * 1769.0 / 1024.0).abs() < 1e-9);
    }
    assert!(expected.0 == 14 && expected.1 > 14);
    let daemon = start(dir.path(), limits(), 0).await;
    let all = daemon.get("/firn/v1/metering").await.json();
    assert!(all["Days"].as_array().unwrap().iter().any(|day| day["FunctionName"] == "other"));
    let past = daemon.get("/firn/v1/metering?To=2020-01-01").await.json();
    assert_eq!(past["Days"], json!([]));
    for query in ["From=x", "To=2026-13-01", "Marker=x"] {
        let answer = daemon.get(&format!("/firn/v1/metering?{query}")).await;
        answer.expect(400, "InvalidParameterValueException");
    }
    // What was counted before is still to be had from CloudWatch, too.
    assert_eq!(daemon.metric("Invocations", "Sum", of("f")).await, 14.0);
}

#[tokio::test]
async fn prometheus_reads_what_there_is() {
    let (_dir, daemon) = daemon().await;
    daemon.create("f", json!({})).await;
    daemon.snapshot_is("f", "ready").await;
    for event in [json!({}), json!({}), json!({"do": "raise"})] {
        daemon.invoke("f", &[], &event).await;
    }
    let answer = daemon.get("/metrics").await;
    assert!(answer.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    let text = String::from_utf8(answer.body).unwrap();
    for line in [
        "firn_invocations_total{function=\"f\"} 3",
        "firn_errors_total{function=\"f\"} 1",
        "firn_throttles_total{function=\"f\"} 0",
        "firn_failures_total 0",
        "firn_restores_refused_total 0",
        "firn_invocation_duration_seconds_count 3",
        "firn_thaw_seconds_count 1",
        "firn_start_seconds_count{start=\"thaw\"} 1",
        "firn_start_seconds_count{start=\"warm\"} 2",
        "firn_queued_events 0",
        "# EOF",
    ] {
        assert!(text.lines().any(|l| l.starts_with(line)), "{line} is not in\n{text}");
    }
    assert!(text.contains("firn_instances{state="), "{text}");
    daemon.call("DELETE", &format!("{FUNCTIONS}/f"), &[], b"").await;
    let text = String::from_utf8(daemon.get("/metrics").await.body).unwrap();
    assert!(!text.contains("function=\"f\""), "{text}");
}

#[tokio::test]
async fn what_cannot_be_answered_is_refused_by_name() {
    let (_dir, daemon) = daemon().await;
    let with = |changes: Value| {
        let mut input = statistics("Invocations", "Sum", json!([]));
        input.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        input
    };
    for (changes, exception) in [
        (json!({"Period": 61}), "InvalidParameterValueException"),
        (json!({"Period": 10}), "InvalidParameterValueException"),
        (json!({"Period": null}), "MissingRequiredParameterException"),
        (json!({"Period": 60, "StartTime": 0}), "InvalidParameterCombinationException"),
        (json!({"StartTime": 9e15}), "InvalidParameterValueException"),
        (json!({"EndTime": 1}), "InvalidParameterValueException"),
        (json!({"Statistics": []}), "InvalidParameterCombinationException"),
        (json!({"Statistics": ["p99"]}), "InvalidParameterValueException"),
        (json!({"ExtendedStatistics": ["p101"]}), "InvalidParameterValueException"),
        (json!({"ExtendedStatistics": ["tm99"]}), "InvalidParameterValueException"),
        (json!({"MetricName": null}), "MissingRequiredParameterException"),
        (json!({"Dimensions": "x"}), "InvalidParameterValueException"),
    ] {
        let refusal = daemon.monitoring_refuses("GetMetricStatistics", with(changes.clone())).await;
        assert_eq!(refusal, exception, "{changes}");
    }
    let math = json!({
        "MetricDataQueries": [{"Id": "a", "Expression": "1 + 1"}], "StartTime": 1, "EndTime": 2,
    });
    let refusal = daemon.monitoring_refuses("GetMetricData", math).await;
    assert_eq!(refusal, "InvalidParameterValueException");
    for operation in ["PutMetricData", "PutMetricAlarm"] {
        let refusal = daemon.monitoring_refuses(operation, json!({})).await;
        assert_eq!(refusal, "UnknownOperationException");
    }
}

/// What counting costs a warm request: `cargo test --release -p firnd -- --ignored --nocapture what_counting`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn what_counting_costs() {
    use crate::{
        function::tests::example,
        metrics::{Metrics, Target, Took},
        scheduler::InFlight,
    };

    let (dir, daemon) = daemon().await;
    daemon.create("f", json!({})).await;
    daemon.invoke("f", &[], &json!({})).await;
    let begun = std::time::Instant::now();
    for _ in 0..2000 {
        daemon.invoke("f", &[], &json!({})).await;
    }
    let request = begun.elapsed() / 2000;
    let metrics = Metrics::open(&dir.path().join("own.sqlite")).unwrap();
    let function = Arc::new(example("f"));
    let arn = "arn:aws:lambda:us-east-1:000000000000:function:f";
    let begun = std::time::Instant::now();
    for _ in 0..200_000 {
        let target = Target::new(&function, arn);
        metrics.began(&target, &InFlight::default());
        metrics.ended(&target, StartKind::Warm, &Took::default(), false);
    }
    let counting = begun.elapsed() / 200_000;
    let share = counting.as_secs_f64() / request.as_secs_f64();
    println!("request {request:?}, of it counting {counting:?}: {:.2} %", share * 100.0);
}
