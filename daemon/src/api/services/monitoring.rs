//! CloudWatch, as far as it reads functions' metrics. They are in the namespace `AWS/Lambda`; nobody
//! else's are here.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::ServiceError;
use crate::{
    api::App,
    backend::Backend,
    function::now_ms,
    metrics::{Distribution, Metric, Metrics, Series},
};

/// The namespace.
const NAMESPACE: &str = "AWS/Lambda";

/// Most points of GetMetricStatistics.
const POINTS: i64 = 1440;

/// Most points of a page of GetMetricData, and its most queries.
const DATA: usize = 100_800;
const QUERIES: usize = 500;

/// Metrics in a page of ListMetrics.
const PAGE: usize = 500;

/// Does one operation.
pub async fn call<B: Backend>(
    app: &Arc<App<B>>,
    service: &str,
    operation: &str,
    input: Value,
) -> Result<Value, ServiceError> {
    let Value::Object(input) = input else { return Err(invalid("The request is no structure.")) };
    let input = Input(input);
    match operation {
        "ListMetrics" => list_metrics(&app.metrics, &input).await,
        "GetMetricStatistics" => get_statistics(&app.metrics, &input).await,
        "GetMetricData" => get_data(&app.metrics, &input).await,
        _ => Err(ServiceError::unknown(service, operation)),
    }
}

fn invalid(message: impl Into<String>) -> ServiceError {
    ServiceError::new("InvalidParameterValueException", message)
}

fn combination(message: impl Into<String>) -> ServiceError {
    ServiceError::new("InvalidParameterCombinationException", message)
}

/// A structure in any of the protocols: in the query protocol every leaf is text.
#[derive(Debug, Clone, Default)]
struct Input(Map<String, Value>);

impl Input {
    fn text(&self, member: &str) -> Result<Option<&str>, ServiceError> {
        match self.0.get(member) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.len() <= 2048 => Ok(Some(text)),
            Some(_) => Err(invalid(format!("The parameter {member} is no text, or too long."))),
        }
    }

    fn needed(&self, member: &str) -> Result<&str, ServiceError> {
        self.text(member)?.ok_or_else(|| missing(member))
    }

    fn integer(&self, member: &str) -> Result<Option<i64>, ServiceError> {
        let wrong = || invalid(format!("The parameter {member} is no integer."));
        match self.0.get(member) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Number(number)) => number.as_i64().map(Some).ok_or_else(wrong),
            Some(Value::String(text)) => text.parse().map(Some).map_err(|_| wrong()),
            Some(_) => Err(wrong()),
        }
    }

    fn flag(&self, member: &str) -> Option<bool> {
        match self.0.get(member)? {
            Value::Bool(flag) => Some(*flag),
            Value::String(text) => Some(text == "true"),
            _ => None,
        }
    }

    /// Seconds since the epoch.
    fn time(&self, member: &str) -> Result<i64, ServiceError> {
        let seconds = match self.0.get(member) {
            Some(Value::Number(number)) => number.as_f64().map(|seconds| seconds as i64),
            Some(Value::String(text)) => {
                let at = OffsetDateTime::parse(text, &Rfc3339).ok();
                at.map(OffsetDateTime::unix_timestamp)
            }
            _ => return Err(missing(member)),
        };
        // From 1970 to 9999.
        let possible = seconds.filter(|seconds| (0..253_402_300_800).contains(seconds));
        possible.ok_or_else(|| invalid(format!("The parameter {member} is no time.")))
    }

    fn list(&self, member: &str, most: usize) -> Result<&[Value], ServiceError> {
        match self.0.get(member) {
            None | Some(Value::Null) => Ok(&[]),
            Some(Value::Array(items)) if items.len() <= most => Ok(items),
            Some(_) => Err(invalid(format!(
                "The parameter {member} is no list, or has more than {most} members."
            ))),
        }
    }

    fn structures(&self, member: &str, most: usize) -> Result<Vec<Self>, ServiceError> {
        let structure = |item: &Value| match item {
            Value::Object(members) => Ok(Self(members.clone())),
            _ => Err(invalid(format!("The parameter {member} has a member that is no structure."))),
        };
        self.list(member, most)?.iter().map(structure).collect()
    }

    fn structure(&self, member: &str) -> Option<Self> {
        self.0.get(member)?.as_object().map(|members| Self(members.clone()))
    }
}

fn missing(member: &str) -> ServiceError {
    let message = format!("The parameter {member} is required.");
    ServiceError::new("MissingRequiredParameterException", message)
}

/// What one metric is called by.
#[derive(Debug, Clone)]
struct Named {
    name: String,
    /// `None`: there can be nothing by that name.
    known: Option<(Series, Metric)>,
}

impl Named {
    fn read(input: &Input) -> Result<Self, ServiceError> {
        let (namespace, name) = (input.needed("Namespace")?, input.needed("MetricName")?);
        let mut series = Some(Series::default());
        for dimension in input.structures("Dimensions", 30)? {
            let value = dimension.needed("Value")?;
            let place = series.as_mut().and_then(|series| match dimension.text("Name") {
                Ok(Some("FunctionName")) => Some(&mut series.function),
                Ok(Some("Resource")) => Some(&mut series.resource),
                Ok(Some("ExecutedVersion")) => Some(&mut series.version),
                _ => None,
            });
            match place {
                Some(place) => value.clone_into(place),
                None => series = None,
            }
        }
        let metric = Metric::ALL.into_iter().find(|metric| metric.name() == name);
        let metric = metric.filter(|_| namespace == NAMESPACE);
        Ok(Self { name: name.to_owned(), known: series.zip(metric) })
    }
}

/// Time in which points are wanted, in minutes, and how many minutes a point has.
#[derive(Debug, Clone, Copy)]
struct Span {
    first: i64,
    end: i64,
    step: i64,
}

impl Span {
    fn read(input: &Input, period: Option<i64>, aligned: bool) -> Result<Self, ServiceError> {
        let (start, end) = (input.time("StartTime")?, input.time("EndTime")?);
        if start >= end {
            return Err(invalid(
                "The parameter StartTime must be less than the parameter EndTime.",
            ));
        }
        let period = period.ok_or_else(|| missing("Period"))?;
        if period < 60 || period % 60 != 0 || period > 86_400 * 30 {
            return Err(invalid(format!(
                "The parameter Period is {period}: it must be a multiple of 60, up to 2592000. Firn has \
                 no metrics of less than a minute."
            )));
        }
        let step = period / 60;
        let first = start / 60;
        let first = if aligned { first - first % step } else { first };
        // The minute in which the end lies counts in part, and so as a whole.
        Ok(Self { first, end: (end + 59) / 60, step })
    }

    /// Points there can be.
    fn points(self) -> i64 {
        (self.end - self.first + self.step - 1) / self.step
    }

    /// Points that have values, by time in seconds.
    async fn of(
        self,
        metrics: &Metrics,
        (series, metric): (Series, Metric),
    ) -> Result<Vec<(i64, Distribution)>, ServiceError> {
        let Self { first, end, step } = self;
        let minutes = metrics.read(move |store| store.minutes(&series, metric, first, end)).await;
        let mut points: Vec<(i64, Distribution)> = Vec::new();
        for (minute, values) in minutes.map_err(ServiceError::internal)? {
            let at = (first + (minute - first) / step * step) * 60;
            match points.last_mut() {
                Some((last, point)) if *last == at => point.merge(&values),
                _ => points.push((at, values)),
            }
        }
        Ok(points)
    }
}

/// A statistic of many values.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Statistic {
    SampleCount,
    Average,
    Sum,
    Minimum,
    Maximum,
    Percentile(f64),
}

impl Statistic {
    fn read(text: &str) -> Result<Self, ServiceError> {
        Ok(match text {
            "SampleCount" => Self::SampleCount,
            "Average" => Self::Average,
            "Sum" => Self::Sum,
            "Minimum" => Self::Minimum,
            "Maximum" => Self::Maximum,
            _ => {
                let percent = text.strip_prefix('p').and_then(|percent| percent.parse().ok());
                let percent = percent.filter(|percent| (0.0..=100.0).contains(percent));
                Self::Percentile(percent.ok_or_else(|| {
                    let text: String = text.chars().take(100).collect();
                    invalid(format!(
                        "The statistic {text} is not supported: one of SampleCount, Average, Sum, \
                         Minimum, Maximum, p0 to p100"
                    ))
                })?)
            }
        })
    }

    fn of(self, values: &Distribution) -> f64 {
        match self {
            Self::SampleCount => values.count as f64,
            Self::Average => values.average(),
            Self::Sum => values.sum,
            Self::Minimum => values.min,
            Self::Maximum => values.max,
            Self::Percentile(percent) => values.percentile(percent),
        }
    }
}

async fn get_statistics(metrics: &Metrics, input: &Input) -> Result<Value, ServiceError> {
    let named = Named::read(input)?;
    let span = Span::read(input, input.integer("Period")?, false)?;
    if span.points() > POINTS {
        return Err(combination(format!(
            "You have requested up to {} datapoints, which exceeds the limit of {POINTS}. You may reduce \
             the datapoints requested by increasing Period, or decreasing the time range.",
            span.points()
        )));
    }
    let mut wanted = Vec::new();
    for (member, most) in [("Statistics", 5), ("ExtendedStatistics", 10)] {
        for name in input.list(member, most)? {
            let name = name.as_str().unwrap_or_default();
            let statistic = Statistic::read(name)?;
            if matches!(statistic, Statistic::Percentile(_)) != (member == "ExtendedStatistics") {
                return Err(invalid(format!("{name} does not go into {member}.")));
            }
            wanted.push((name.to_owned(), statistic));
        }
    }
    if wanted.is_empty() {
        return Err(combination(
            "At least one of the parameters Statistics and ExtendedStatistics must be specified.",
        ));
    }
    let unit = input.text("Unit")?;
    let mut datapoints = Vec::new();
    if let Some((series, metric)) = named.known
        && unit.is_none_or(|unit| unit == metric.unit())
    {
        for (at, values) in span.of(metrics, (series, metric)).await? {
            let mut point = json!({"Timestamp": at, "Unit": metric.unit()});
            for (name, statistic) in &wanted {
                let value = statistic.of(&values).into();
                match statistic {
                    Statistic::Percentile(_) => point["ExtendedStatistics"][name] = value,
                    _ => point[name] = value,
                }
            }
            datapoints.push(point);
        }
    }
    Ok(json!({"Label": named.name, "Datapoints": datapoints}))
}

async fn get_data(metrics: &Metrics, input: &Input) -> Result<Value, ServiceError> {
    let queries = input.structures("MetricDataQueries", QUERIES)?;
    let most = match input.integer("MaxDatapoints")? {
        None => DATA,
        Some(most) => usize::try_from(most).unwrap_or(0).clamp(1, DATA),
    };
    let descending = match input.text("ScanBy")? {
        None | Some("TimestampDescending") => true,
        Some("TimestampAscending") => false,
        Some(_) => return Err(invalid("ScanBy is TimestampDescending or TimestampAscending.")),
    };
    let bad_token = || ServiceError::new("InvalidNextToken", "The NextToken is invalid.");
    let begin = match input.text("NextToken")? {
        None => 0,
        Some(token) => token.parse().ok().filter(|at| *at < queries.len()).ok_or_else(bad_token)?,
    };
    // All are checked before the first is answered.
    let mut parsed = Vec::new();
    for query in &queries {
        let id = query.needed("Id")?;
        if query.text("Expression")?.is_some() {
            return Err(invalid(format!(
                "The query {id} has an Expression: Firn has no metric math. Ask for the metrics by \
                 MetricStat."
            )));
        }
        let stat = query.structure("MetricStat").ok_or_else(|| missing("MetricStat"))?;
        let named = Named::read(&stat.structure("Metric").ok_or_else(|| missing("Metric"))?)?;
        let span = Span::read(input, stat.integer("Period")?, true)?;
        let statistic = Statistic::read(stat.needed("Stat")?)?;
        let unit = stat.text("Unit")?.map(str::to_owned);
        parsed.push((id, named, span, statistic, unit));
    }
    let (mut results, mut points, mut next) = (Vec::new(), 0, None);
    for (at, (query, parsed)) in queries.iter().zip(parsed).enumerate().skip(begin) {
        let (id, named, span, statistic, unit) = parsed;
        // A page has whole queries, and one at least.
        if points >= most {
            next = Some(at);
            break;
        }
        if query.flag("ReturnData") == Some(false) {
            continue;
        }
        let known = named.known.filter(|(_, metric)| unit.is_none_or(|unit| unit == metric.unit()));
        let mut found = match known {
            Some(known) => span.of(metrics, known).await?,
            None => Vec::new(),
        };
        if descending {
            found.reverse();
        }
        points += found.len();
        let values: Vec<f64> = found.iter().map(|(_, values)| statistic.of(values)).collect();
        let times: Vec<i64> = found.iter().map(|(at, _)| *at).collect();
        results.push(json!({
            "Id": id,
            "Label": query.text("Label")?.unwrap_or(&named.name),
            "Timestamps": times,
            "Values": values,
            "StatusCode": "Complete",
        }));
    }
    let mut output = json!({"MetricDataResults": results, "Messages": []});
    if let Some(next) = next {
        output["NextToken"] = next.to_string().into();
    }
    Ok(output)
}

async fn list_metrics(metrics: &Metrics, input: &Input) -> Result<Value, ServiceError> {
    let namespace = input.text("Namespace")?;
    let name = input.text("MetricName")?;
    let recent = match input.text("RecentlyActive")? {
        None => 0,
        Some("PT3H") => now_ms() / 60_000 - 180,
        Some(_) => return Err(invalid("RecentlyActive is PT3H.")),
    };
    let mut filters = Vec::new();
    for dimension in input.structures("Dimensions", 10)? {
        let value = dimension.text("Value")?.map(str::to_owned);
        filters.push((dimension.needed("Name")?.to_owned(), value));
    }
    let bad_token = || ServiceError::new("InvalidNextToken", "The NextToken is invalid.");
    let mut after = match input.text("NextToken")? {
        None => 0,
        Some(token) => token.parse::<i64>().map_err(|_| bad_token())?,
    };
    let mut found = Vec::new();
    let mut more = namespace.is_none_or(|namespace| namespace == NAMESPACE);
    while more && found.len() < PAGE {
        let listed = metrics.read(move |store| store.series(after, PAGE)).await;
        let listed = listed.map_err(ServiceError::internal)?;
        more = listed.len() == PAGE;
        for listed in listed {
            after = listed.id;
            let Series { function, resource, version } = &listed.series;
            let dimensions =
                [("FunctionName", function), ("Resource", resource), ("ExecutedVersion", version)];
            let mut dimensions = dimensions.to_vec();
            dimensions.retain(|(_, value)| !value.is_empty());
            let fits = filters.iter().all(|(name, value)| {
                dimensions
                    .iter()
                    .any(|(own, v)| own == name && value.as_ref().is_none_or(|value| value == *v))
            });
            if listed.last < recent || !fits {
                continue;
            }
            let dimensions: Vec<Value> = dimensions
                .iter()
                .map(|(name, value)| json!({"Name": name, "Value": value}))
                .collect();
            for metric in Metric::ALL {
                let has = listed.metrics & (1 << metric as u8) != 0;
                if has && name.is_none_or(|name| name == metric.name()) {
                    found.push(json!({
                        "Namespace": NAMESPACE,
                        "MetricName": metric.name(),
                        "Dimensions": dimensions,
                    }));
                }
            }
            // A series has its metrics on one page.
            if found.len() + Metric::ALL.len() > PAGE {
                more = true;
                break;
            }
        }
        if found.len() + Metric::ALL.len() > PAGE {
            break;
        }
    }
    let mut output = json!({"Metrics": found});
    if more {
        output["NextToken"] = after.to_string().into();
    }
    Ok(output)
}
