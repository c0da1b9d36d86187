//! Checks what a caller wants a function to be, with Lambda's constraints and Lambda's words.
//!
//! Broken constraints of single members are collected into one message; what is well formed and
//! still not possible here (a runtime that is not installed, a feature that Firn does not have)
//! is refused by name. Nothing is silently ignored that would change how the function behaves.

use std::collections::BTreeMap;

use super::{
    error::{ApiError, violation},
    layers,
    names::{is_alias, is_region},
    shapes::{
        AddPermission, CreateAlias, DeadLetterConfig, PublishVersion, RoutingConfig, Settings,
        UpdateAlias,
    },
};
use crate::{aws::Recipient, function::Config};

/// Memory in MB.
const MEMORY: (i64, i64) = (128, 10_240);
/// Timeout in seconds.
const TIMEOUT: (i64, i64) = (1, 900);
/// Longest description in characters.
const DESCRIPTION: usize = 256;
/// Longest handler in characters.
const HANDLER: usize = 128;
/// Most bytes of environment variables.
const ENVIRONMENT: usize = 4096;

/// Most tags of a function.
const TAGS: usize = 50;

/// Longest id of a statement in a resource policy.
const STATEMENT_ID: usize = 100;
/// Longest principal; the model has no limit. No ARN of a user or role is longer.
const PRINCIPAL: usize = 2048;

/// What an alias's name must be.
pub const ALIAS: &str = "Member must satisfy regular expression pattern: (?!^[0-9]+$)([a-zA-Z0-9-_]+), with at most 128 \
     characters";

/// What a dead-letter target must be.
const TARGET: &str = "(arn:(aws[a-zA-Z-]*)?:[a-z0-9-.]+:.*)|()";

/// Names that only the service sets.
const RESERVED: [&str; 21] = [
    "_HANDLER",
    "_X_AMZN_TRACE_ID",
    "AWS_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECRET_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_EXECUTION_ENV",
    "AWS_LAMBDA_FUNCTION_NAME",
    "AWS_LAMBDA_FUNCTION_MEMORY_SIZE",
    "AWS_LAMBDA_FUNCTION_VERSION",
    "AWS_LAMBDA_INITIALIZATION_TYPE",
    "AWS_LAMBDA_LOG_GROUP_NAME",
    "AWS_LAMBDA_LOG_STREAM_NAME",
    "AWS_LAMBDA_RUNTIME_API",
    "AWS_LAMBDA_MAX_CONCURRENCY",
    "LAMBDA_TASK_ROOT",
    "LAMBDA_RUNTIME_DIR",
];

/// Collects violations of single members.
#[derive(Default)]
pub(super) struct Violations(Vec<String>);

impl Violations {
    pub(super) fn add(&mut self, member: &str, value: &str, constraint: &str) {
        self.0.push(violation(member, value, constraint));
    }

    pub(super) fn range(&mut self, member: &str, value: Option<i64>, (least, most): (i64, i64)) {
        let Some(value) = value else { return };
        let (bound, limit) = match value {
            v if v < least => ("greater", least),
            v if v > most => ("less", most),
            _ => return,
        };
        let constraint = format!("Member must have value {bound} than or equal to {limit}");
        self.add(member, &value.to_string(), &constraint);
    }

    pub(super) fn length(&mut self, member: &str, value: Option<&str>, most: usize) {
        if let Some(value) = value.filter(|v| v.chars().count() > most) {
            let limit = format!("Member must have length less than or equal to {most}");
            self.add(member, value, &limit);
        }
    }

    fn version(&mut self, member: &str, value: Option<&str>) {
        let fits = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            (digits || text == "$LATEST") && text.len() <= 1024
        };
        self.pattern(member, value, fits, "(\\$LATEST|[0-9]+)");
    }

    fn weights(&mut self, routing: Option<&RoutingConfig>) {
        let weights = routing.and_then(|r| r.additional_version_weights.as_ref());
        for (version, weight) in weights.into_iter().flatten() {
            let member = "routingConfig.additionalVersionWeights";
            if version.is_empty() || !version.bytes().all(|b| b.is_ascii_digit()) {
                let keys = "Map keys must satisfy constraint: [Member must satisfy regular \
                            expression pattern: [0-9]+]";
                self.add(member, version, keys);
            }
            if !(0.0..=1.0).contains(weight) {
                let values = "Map value must satisfy constraint: [Member must have value less than \
                              or equal to 1.0, Member must have value greater than or equal to 0.0]";
                self.add(member, &weight.to_string(), values);
            }
        }
    }

    fn tags(&mut self, tags: &BTreeMap<String, String>) {
        let allowed = |text: &str| {
            text.chars().all(|c| c.is_alphanumeric() || c.is_whitespace() || "_.:/=+-@".contains(c))
        };
        for (key, value) in tags {
            if key.is_empty() || key.chars().count() > 128 || value.chars().count() > 256 {
                let lengths = "Map keys must have length between 1 and 128, map values at most 256";
                self.add("tags", key, lengths);
            } else if !allowed(key) || !allowed(value) {
                let pattern = "Map keys and values must satisfy regular expression pattern: \
                               ([\\p{L}\\p{Z}\\p{N}_.:/=+\\-@]*)";
                self.add("tags", key, pattern);
            }
        }
    }

    pub(super) fn pattern(
        &mut self,
        member: &str,
        value: Option<&str>,
        fits: fn(&str) -> bool,
        shown: &str,
    ) {
        if let Some(value) = value.filter(|v| !fits(v)) {
            let constraint = format!("Member must satisfy regular expression pattern: {shown}");
            self.add(member, value, &constraint);
        }
    }

    pub(super) fn check(self) -> Result<(), ApiError> {
        match self.0.len() {
            0 => Ok(()),
            1 => Err(ApiError::Validation(format!("1 validation error detected: {}", self.0[0]))),
            n => Err(ApiError::Validation(format!(
                "{n} validation errors detected: {}",
                self.0.join("; ")
            ))),
        }
    }
}

/// The configuration of a new function.
///
/// # Errors
/// The Lambda error that says what is wrong.
pub fn create(settings: Settings, runtimes: &[String]) -> Result<Config, ApiError> {
    let mut violations = members(&settings);
    if settings.role.is_none() {
        violations.add("role", "null", "Member must not be null");
    }
    violations.check()?;
    tags(settings.tags.as_ref().unwrap_or(&BTreeMap::new()))?;
    unsupported(&settings)?;
    let (Some(runtime), Some(handler)) = (&settings.runtime, &settings.handler) else {
        return Err(ApiError::InvalidParameterValue(
            "Runtime and Handler are mandatory parameters for functions created with deployment \
             packages."
                .into(),
        ));
    };
    let blank = Config {
        runtime: runtime.clone(),
        role: String::new(),
        handler: handler.clone(),
        description: String::new(),
        timeout_s: 3,
        memory_mb: 128,
        environment: BTreeMap::new(),
        tracing: "PassThrough".into(),
        layers: Vec::new(),
        dead_letter: None,
    };
    apply(blank, settings, runtimes)
}

/// The configuration of `current` after an update.
///
/// # Errors
/// The Lambda error that says what is wrong.
pub fn update(
    current: &Config,
    settings: Settings,
    runtimes: &[String],
) -> Result<Config, ApiError> {
    members(&settings).check()?;
    unsupported(&settings)?;
    apply(current.clone(), settings, runtimes)
}

/// What a version may be published as.
///
/// # Errors
/// The Lambda error that says what is wrong.
pub fn publish(input: &PublishVersion) -> Result<(), ApiError> {
    let mut found = Violations::default();
    found.length("description", input.description.as_deref(), DESCRIPTION);
    found.check()?;
    publish_to(input.publish_to.as_deref())
}

/// What an alias may be created as.
///
/// # Errors
/// The Lambda error that says what is wrong.
pub fn create_alias(input: &CreateAlias) -> Result<(), ApiError> {
    let mut found = Violations::default();
    match input.name.as_deref() {
        None => found.add("name", "null", "Member must not be null"),
        Some(name) if !is_alias(name) => found.add("name", name, ALIAS),
        Some(_) => {}
    }
    match input.function_version.as_deref() {
        None => found.add("functionVersion", "null", "Member must not be null"),
        version => found.version("functionVersion", version),
    }
    found.length("description", input.description.as_deref(), DESCRIPTION);
    found.weights(input.routing_config.as_ref());
    found.check()
}

/// What an alias may become.
///
/// # Errors
/// The Lambda error that says what is wrong.
pub fn update_alias(input: &UpdateAlias) -> Result<(), ApiError> {
    let mut found = Violations::default();
    found.version("functionVersion", input.function_version.as_deref());
    found.length("description", input.description.as_deref(), DESCRIPTION);
    found.weights(input.routing_config.as_ref());
    found.check()
}

/// What a permission may be.
///
/// # Errors
/// The Lambda error that says what is wrong.
pub fn add_permission(input: &AddPermission) -> Result<(), ApiError> {
    let mut found = Violations::default();
    for (member, value) in [
        ("statementId", &input.statement_id),
        ("action", &input.action),
        ("principal", &input.principal),
    ] {
        if value.is_none() {
            found.add(member, "null", "Member must not be null");
        }
    }
    let value = input.statement_id.as_deref();
    found.length("statementId", value, STATEMENT_ID);
    found.pattern("statementId", value, is_word, "([a-zA-Z0-9-_]+)");
    let pattern = "(lambda:[*]|lambda:[a-zA-Z]+|[*])";
    found.pattern("action", input.action.as_deref(), is_action, pattern);
    let is_principal = |text: &str| !text.is_empty() && !text.contains(char::is_whitespace);
    found.pattern("principal", input.principal.as_deref(), is_principal, "[^\\s]+");
    found.length("principal", input.principal.as_deref(), PRINCIPAL);
    let pattern =
        "arn:(aws[a-zA-Z0-9-]*):([a-zA-Z0-9\\-])+:([a-z]{2}(-gov)?-[a-z]+-\\d{1})?:(\\d{12})?:(.*)";
    found.pattern("sourceArn", input.source_arn.as_deref(), is_arn, pattern);
    let is_account = |text: &str| text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit());
    found.pattern("sourceAccount", input.source_account.as_deref(), is_account, "\\d{12}");
    let value = input.event_source_token.as_deref();
    found.length("eventSourceToken", value, 256);
    let is_token = |text: &str| is_word(&text.replace('.', "-"));
    found.pattern("eventSourceToken", value, is_token, "[a-zA-Z0-9._\\-]+");
    let value = input.principal_org_id.as_deref();
    found.pattern("principalOrgID", value, is_organization, "^o-[a-z0-9]{10,32}$");
    let value = input.function_url_auth_type.as_deref();
    if let Some(value) = value.filter(|value| !matches!(*value, "NONE" | "AWS_IAM")) {
        let set = "Member must satisfy enum value set: [NONE, AWS_IAM]";
        found.add("functionUrlAuthType", value, set);
    }
    found.check()
}

/// What can be the id of a statement that is asked for.
///
/// # Errors
/// The Lambda error that says what is wrong.
pub fn statement_id(value: &str) -> Result<(), ApiError> {
    let mut found = Violations::default();
    found.length("statementId", Some(value), STATEMENT_ID);
    let fits = |text: &str| is_word(&text.replace('.', "-"));
    found.pattern("statementId", Some(value), fits, "([a-zA-Z0-9-_.]+)");
    found.check()
}

/// What can be a version.
///
/// # Errors
/// The Lambda error that says what is wrong.
pub fn version(member: &str, value: &str) -> Result<(), ApiError> {
    let mut found = Violations::default();
    found.version(member, Some(value));
    found.check()
}

/// What tags a function may have.
///
/// # Errors
/// The Lambda error that says what is wrong.
pub fn tags(tags: &BTreeMap<String, String>) -> Result<(), ApiError> {
    let mut found = Violations::default();
    found.tags(tags);
    found.check()?;
    if let Some(key) = tags.keys().find(|key| key.to_ascii_lowercase().starts_with("aws:")) {
        return Err(ApiError::InvalidParameterValue(format!(
            "The tag key {key:?} begins with aws:, which is reserved."
        )));
    }
    if tags.len() > TAGS {
        return Err(ApiError::InvalidParameterValue(format!(
            "Number of tags exceeds resource tag limit: {} of at most {TAGS}.",
            tags.len()
        )));
    }
    Ok(())
}

/// Refuses what only functions on capacity providers have.
///
/// # Errors
/// Says so.
pub fn publish_to(target: Option<&str>) -> Result<(), ApiError> {
    match target {
        None => Ok(()),
        Some(_) => Err(ApiError::InvalidParameterValue(
            "Firn does not support PublishTo yet. Leave it out.".into(),
        )),
    }
}

fn members(settings: &Settings) -> Violations {
    let mut found = Violations::default();
    found.range("memorySize", settings.memory_size, MEMORY);
    found.range("timeout", settings.timeout, TIMEOUT);
    found.length("description", settings.description.as_deref(), DESCRIPTION);
    found.length("handler", settings.handler.as_deref(), HANDLER);
    found.pattern("handler", settings.handler.as_deref(), is_handler, "[^\\s]+");
    found.pattern(
        "role",
        settings.role.as_deref(),
        is_role,
        "arn:(aws[a-zA-Z-]*)?:iam::\\d{12}:role/?[a-zA-Z_0-9+=,.@\\-_/]+",
    );
    let variables = settings.environment.as_ref().and_then(|e| e.variables.as_ref());
    for key in variables.into_iter().flat_map(BTreeMap::keys) {
        // The value stays out of the message: it may be a secret.
        if !is_variable(key) && !RESERVED.contains(&key.as_str()) {
            found.add(
                "environment.variables",
                key,
                "Map keys must satisfy constraint: [Member must satisfy regular expression \
                 pattern: [a-zA-Z]([a-zA-Z0-9_])+]",
            );
        }
    }
    for arn in settings.layers.iter().flatten() {
        found.pattern(
            "layers",
            Some(arn),
            |arn| layers::version_arn(arn).is_some(),
            layers::VERSION_ARN,
        );
    }
    let target = settings.dead_letter_config.as_ref().and_then(|d| d.target_arn.as_deref());
    found.pattern("deadLetterConfig.targetArn", target, is_target, TARGET);
    let tracing = settings.tracing_config.as_ref().and_then(|t| t.mode.as_deref());
    if let Some(mode) = tracing.filter(|mode| !matches!(*mode, "Active" | "PassThrough")) {
        let set = "Member must satisfy enum value set: [Active, PassThrough]";
        found.add("tracingConfig.mode", mode, set);
    }
    let package = settings.package_type.as_deref();
    let kinds = "Member must satisfy enum value set: [Zip, Image]";
    if let Some(package) = package.filter(|p| !matches!(*p, "Zip" | "Image")) {
        found.add("packageType", package, kinds);
    }
    found
}

/// Refuses what Firn does not have yet, each by its name.
fn unsupported(settings: &Settings) -> Result<(), ApiError> {
    let refuse = |what: &str| {
        Err(ApiError::InvalidParameterValue(format!(
            "Firn does not support {what} yet. Leave it out or empty."
        )))
    };
    if settings.package_type.as_deref() == Some("Image") {
        return Err(ApiError::InvalidParameterValue(
            "Firn does not support PackageType 'Image' yet. Use 'Zip' with ZipFile.".into(),
        ));
    }
    for architecture in settings.architectures.iter().flatten() {
        if architecture != "x86_64" {
            return Err(ApiError::InvalidParameterValue(format!(
                "Architecture '{architecture}' is not supported here; use x86_64."
            )));
        }
    }
    if let Some(size) = settings.ephemeral_storage.as_ref().map(|s| s.size)
        && size != 512
    {
        return refuse(&format!("an EphemeralStorage Size of {size} (only 512)"));
    }
    if settings
        .snap_start
        .as_ref()
        .is_some_and(|s| s.apply_on.as_deref().is_some_and(|a| a != "None"))
    {
        return refuse(
            "SnapStart on published versions (every function is started from a snapshot anyway)",
        );
    }
    if let Some(logging) = &settings.logging_config {
        if logging.log_format.as_deref().is_some_and(|format| format != "Text") {
            return refuse("LoggingConfig LogFormat other than 'Text'");
        }
        if logging.log_group.is_some() {
            return refuse("LoggingConfig LogGroup");
        }
    }
    for (name, value) in [
        ("VpcConfig", &settings.vpc_config),
        ("FileSystemConfigs", &settings.file_system_configs),
        ("CodeSigningConfigArn", &settings.code_signing_config_arn),
        ("ImageConfig", &settings.image_config),
        ("KMSKeyArn", &settings.kms_key_arn),
        ("CapacityProviderConfig", &settings.capacity_provider_config),
        ("DurableConfig", &settings.durable_config),
        ("TenancyConfig", &settings.tenancy_config),
    ] {
        if !value.as_ref().is_none_or(is_empty) {
            return refuse(name);
        }
    }
    Ok(())
}

fn apply(mut config: Config, settings: Settings, runtimes: &[String]) -> Result<Config, ApiError> {
    if let Some(runtime) = settings.runtime {
        config.runtime = runtime;
    }
    // Also when it is not being changed: an image may have gone since the function was made.
    if !runtimes.contains(&config.runtime) {
        return Err(ApiError::InvalidParameterValue(format!(
            "Value {} at 'runtime' failed to satisfy constraint: Member must satisfy enum value \
             set: [{}] or be a valid ARN",
            config.runtime.chars().take(64).collect::<String>(),
            runtimes.join(", ")
        )));
    }
    if let Some(variables) = settings.environment.map(|e| e.variables.unwrap_or_default()) {
        environment(&variables)?;
        config.environment = variables;
    }
    if let Some(DeadLetterConfig { target_arn }) = settings.dead_letter_config {
        // One that is empty takes back what was set.
        let target = target_arn.filter(|arn| !arn.is_empty());
        target.as_deref().map_or(Ok(()), dead_letter)?;
        config.dead_letter = target;
    }
    config.handler = settings.handler.unwrap_or(config.handler);
    config.role = settings.role.unwrap_or(config.role);
    config.description = settings.description.unwrap_or(config.description);
    let tracing = settings.tracing_config.and_then(|tracing| tracing.mode);
    config.tracing = tracing.unwrap_or(config.tracing);
    // In range: `members` has seen them.
    config.timeout_s = settings.timeout.map_or(config.timeout_s, |t| t as u32);
    config.memory_mb = settings.memory_size.map_or(config.memory_mb, |m| m as u32);
    Ok(config)
}

/// What can take events that failed.
fn dead_letter(arn: &str) -> Result<(), ApiError> {
    let refuse = |why: String| Err(ApiError::InvalidParameterValue(why));
    match Recipient::parse(arn) {
        Some(target) if target.is_fifo() => {
            refuse(format!("The DeadLetterConfig target {arn} is FIFO, which is not supported."))
        }
        Some(_) => Ok(()),
        None => refuse(format!(
            "The TargetArn {} is not that of an SQS queue or an SNS topic.",
            arn.chars().take(256).collect::<String>()
        )),
    }
}

fn environment(variables: &BTreeMap<String, String>) -> Result<(), ApiError> {
    const UNABLE: &str = "Lambda was unable to configure your environment variables because the \
                          environment variables you have provided";
    let reserved: Vec<&str> =
        variables.keys().map(String::as_str).filter(|k| RESERVED.contains(k)).collect();
    if !reserved.is_empty() {
        return Err(ApiError::InvalidParameterValue(format!(
            "{UNABLE} contains reserved keys that are currently not supported for modification. \
             Reserved keys used in this request: {}",
            reserved.join(", ")
        )));
    }
    if let Some((key, _)) = variables.iter().find(|(_, value)| value.contains('\0')) {
        return Err(ApiError::InvalidParameterValue(format!(
            "{UNABLE} hold a NUL character in '{key}'."
        )));
    }
    let size: usize = variables.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > ENVIRONMENT {
        return Err(ApiError::InvalidParameterValue(format!(
            "{UNABLE} exceeded the 4KB limit: {size} bytes of at most {ENVIRONMENT}."
        )));
    }
    Ok(())
}

/// Whether a JSON value says nothing: null, an empty string or list, an object of such.
fn is_empty(value: &serde_json::Value) -> bool {
    use serde_json::Value;
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(s) => s.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.values().all(is_empty),
        _ => false,
    }
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

fn is_action(text: &str) -> bool {
    let name = text.strip_prefix("lambda:");
    let letters = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphabetic());
    text == "*" || name.is_some_and(|name| name == "*" || letters(name))
}

pub(super) fn is_organization(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let id = text.strip_prefix("o-").filter(|id| (10..=32).contains(&id.len()));
    id.is_some_and(|id| id.bytes().all(allowed))
}

fn is_arn(text: &str) -> bool {
    let parts: Vec<&str> = text.splitn(6, ':').collect();
    let ["arn", partition, service, region, account, resource] = parts[..] else { return false };
    let word = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    partition.starts_with("aws")
        && word(partition)
        && !service.is_empty()
        && word(service)
        && (region.is_empty() || is_region(region))
        && (account.is_empty()
            || (account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit())))
        && !resource.contains('\n')
}

fn is_target(text: &str) -> bool {
    let parts: Vec<&str> = text.splitn(4, ':').collect();
    let ["arn", partition, service, _] = parts[..] else { return text.is_empty() };
    let fits = |text: &str, lower: fn(&u8) -> bool| text.bytes().all(|b| lower(&b) || b == b'-');
    (partition.is_empty()
        || partition.starts_with("aws") && fits(partition, u8::is_ascii_alphabetic))
        && !service.is_empty()
        && fits(service, |b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'.')
        && !text.contains('\n')
}

fn is_handler(text: &str) -> bool {
    !text.is_empty() && !text.chars().any(|c| c.is_whitespace() || c == '\0')
}

fn is_variable(text: &str) -> bool {
    text.len() >= 2
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn is_role(text: &str) -> bool {
    let mut parts = text.splitn(6, ':');
    let mut next = || parts.next().unwrap_or_default();
    let (arn, partition, service, region, account, role) =
        (next(), next(), next(), next(), next(), next());
    let Some(name) = role.strip_prefix("role") else { return false };
    let name = name.strip_prefix('/').unwrap_or(name);
    arn == "arn"
        && (partition.is_empty() || partition.starts_with("aws"))
        && (service, region) == ("iam", "")
        && account.len() == 12
        && account.bytes().all(|b| b.is_ascii_digit())
        && !name.is_empty()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"+=,.@-_/".contains(&b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn settings(changes: serde_json::Value) -> Settings {
        let mut all = json!({
            "Runtime": "python3.11", "Role": "arn:aws:iam::000000000000:role/service/r",
            "Handler": "lambda_function.lambda_handler",
        });
        for (key, value) in changes.as_object().unwrap() {
            all[key] = value.clone();
        }
        serde_json::from_value(all).unwrap()
    }

    fn outcome(changes: serde_json::Value) -> Result<Config, String> {
        create(settings(changes), &["python3.11".into()]).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults_are_lambdas() {
        let config = outcome(json!({})).unwrap();
        assert_eq!((config.memory_mb, config.timeout_s), (128, 3));
        assert!(config.environment.is_empty() && config.description.is_empty());
    }

    #[test]
    fn each_limit_is_named() {
        for (changes, words) in [
            (
                json!({"MemorySize": 127}),
                "Value '127' at 'memorySize' failed to satisfy \
                constraint: Member must have value greater than or equal to 128",
            ),
            (json!({"MemorySize": 10_241}), "less than or equal to 10240"),
            (
                json!({"Timeout": 0}),
                "at 'timeout' failed to satisfy constraint: Member must have \
                value greater than or equal to 1",
            ),
            (json!({"Timeout": 901}), "less than or equal to 900"),
            (json!({"Description": "x".repeat(257)}), "length less than or equal to 256"),
            (json!({"Handler": "a b"}), "at 'handler'"),
            (json!({"Handler": "x".repeat(129)}), "length less than or equal to 128"),
            (json!({"Role": "me"}), "at 'role'"),
            (json!({"Role": null}), "Value 'null' at 'role'"),
            (json!({"Runtime": "cobol"}), "[python3.11]"),
            (json!({"Runtime": null}), "Runtime and Handler are mandatory"),
            (json!({"PackageType": "Image"}), "'Image'"),
            (json!({"PackageType": "Tar"}), "[Zip, Image]"),
            (json!({"Architectures": ["arm64"]}), "arm64"),
            (json!({"EphemeralStorage": {"Size": 1024}}), "1024"),
            (json!({"Layers": ["arn:x"]}), "at 'layers'"),
            (json!({"DeadLetterConfig": {"TargetArn": "q"}}), "at 'deadLetterConfig.targetArn'"),
            (json!({"DeadLetterConfig": {"TargetArn": "arn:aws:s3:::b"}}), "SQS queue or an SNS"),
            (
                json!({"DeadLetterConfig": {
                    "TargetArn": "arn:aws:sqs:us-east-1:000000000000:q.fifo"}}),
                "FIFO",
            ),
            (json!({"VpcConfig": {"SubnetIds": ["s"], "SecurityGroupIds": []}}), "VpcConfig"),
            (
                json!({"Environment": {"Variables": {"AWS_REGION": "x", "_HANDLER": "y"}}}),
                "Reserved keys used in this request: AWS_REGION, _HANDLER",
            ),
            (json!({"Environment": {"Variables": {"1A": "x"}}}), "Map keys must satisfy"),
            (
                json!({"Environment": {"Variables": {"BIG": "x".repeat(4096)}}}),
                "exceeded the 4KB limit: 4099 bytes of at most 4096",
            ),
            (json!({"Environment": {"Variables": {"NUL": "a\u{0}b"}}}), "NUL"),
        ] {
            let error = outcome(changes.clone()).expect_err(&changes.to_string());
            assert!(error.contains(words), "{changes}: {error}");
        }
    }

    #[test]
    fn several_violations_come_together() {
        let error = outcome(json!({"MemorySize": 1, "Timeout": 5000})).unwrap_err();
        assert!(error.starts_with("2 validation errors detected: "), "{error}");
    }

    #[test]
    fn what_says_nothing_is_no_feature() {
        outcome(json!({
            "VpcConfig": {"SubnetIds": [], "SecurityGroupIds": []}, "Layers": [],
            "DeadLetterConfig": {"TargetArn": ""}, "KMSKeyArn": "", "PackageType": "Zip",
            "Architectures": ["x86_64"], "EphemeralStorage": {"Size": 512},
            "SnapStart": {"ApplyOn": "None"}, "TracingConfig": {"Mode": "PassThrough"},
            "LoggingConfig": {"LogFormat": "Text"}, "Environment": {"Variables": {}},
            "Tags": {"team": "x"},
        }))
        .unwrap();
    }

    #[test]
    fn an_update_changes_what_it_names_only() {
        let before = outcome(json!({"Environment": {"Variables": {"AB": "1"}}})).unwrap();
        let changes: Settings = serde_json::from_value(json!({"Timeout": 9})).unwrap();
        let after = update(&before, changes, &["python3.11".into()]).unwrap();
        assert_eq!(after, Config { timeout_s: 9, ..before.clone() });
        let clear = serde_json::from_value(json!({"Environment": {"Variables": {}}})).unwrap();
        assert!(update(&before, clear, &["python3.11".into()]).unwrap().environment.is_empty());
    }

    #[test]
    fn secrets_stay_out_of_messages() {
        let error = outcome(json!({"Environment": {"Variables": {"1A": "hunter2"}}})).unwrap_err();
        assert!(!error.contains("hunter2"), "{error}");
    }

    proptest! {
        #[test]
        fn memory_and_timeout_hold_their_ranges(memory in any::<i32>(), timeout in any::<i32>()) {
            let accepted = outcome(json!({"MemorySize": memory, "Timeout": timeout})).is_ok();
            let fits = (128..=10_240).contains(&memory) && (1..=900).contains(&timeout);
            prop_assert_eq!(accepted, fits);
        }

        #[test]
        fn any_role_and_handler_pass_or_fail(role in "\\PC{0,80}", handler in "\\PC{0,140}") {
            let _ = outcome(json!({"Role": role, "Handler": handler}));
        }
    }
}
