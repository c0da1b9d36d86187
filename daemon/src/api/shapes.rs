//! The JSON of Lambda's control plane: what requests may say and what responses say.
//!
//! Names and spelling follow the service model (`2015-03-31`). Members that Firn does not know are
//! ignored as Lambda ignores them; members that it knows and can't honour are kept as raw values
//! for [`super::validate`] to refuse.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::names::Place;
use crate::function::{Function, Version};

/// Everything that CreateFunction and UpdateFunctionConfiguration have in common.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Settings {
    pub(crate) runtime: Option<String>,
    pub(crate) role: Option<String>,
    pub(crate) handler: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) timeout: Option<i64>,
    pub(crate) memory_size: Option<i64>,
    pub(crate) environment: Option<Environment>,
    pub(crate) package_type: Option<String>,
    pub(crate) architectures: Option<Vec<String>>,
    pub(crate) ephemeral_storage: Option<EphemeralStorage>,
    pub(crate) snap_start: Option<SnapStart>,
    pub(crate) tracing_config: Option<TracingConfig>,
    pub(crate) logging_config: Option<LoggingConfig>,
    pub(crate) tags: Option<BTreeMap<String, String>>,
    pub(crate) vpc_config: Option<Value>,
    pub(crate) dead_letter_config: Option<DeadLetterConfig>,
    pub(crate) layers: Option<Vec<String>>,
    pub(crate) file_system_configs: Option<Value>,
    pub(crate) code_signing_config_arn: Option<Value>,
    pub(crate) image_config: Option<Value>,
    #[serde(rename = "KMSKeyArn")]
    pub(crate) kms_key_arn: Option<Value>,
    pub(crate) capacity_provider_config: Option<Value>,
    pub(crate) durable_config: Option<Value>,
    pub(crate) tenancy_config: Option<Value>,
}

/// `Environment`.
#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Environment {
    pub(crate) variables: Option<BTreeMap<String, String>>,
}

impl fmt::Debug for Environment {
    /// Without names and values.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Environment(<{}>)", self.variables.as_ref().map_or(0, BTreeMap::len))
    }
}

/// `EphemeralStorage`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct EphemeralStorage {
    pub(crate) size: i64,
}

/// `SnapStart`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SnapStart {
    pub(crate) apply_on: Option<String>,
}

/// `TracingConfig`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TracingConfig {
    pub(crate) mode: Option<String>,
}

/// `DeadLetterConfig`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DeadLetterConfig {
    pub(crate) target_arn: Option<String>,
}

/// `LoggingConfig`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct LoggingConfig {
    pub(crate) log_format: Option<String>,
    pub(crate) log_group: Option<String>,
}

/// CreateFunction.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct CreateFunction<'a> {
    pub(crate) function_name: Option<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) publish: bool,
    pub(crate) publish_to: Option<String>,
    #[serde(borrow, default)]
    pub(crate) code: Option<CodeUpload<'a>>,
    #[serde(flatten)]
    pub(crate) settings: Settings,
}

/// UpdateFunctionConfiguration.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct UpdateFunctionConfiguration {
    pub(crate) revision_id: Option<String>,
    #[serde(flatten)]
    pub(crate) settings: Settings,
}

/// UpdateFunctionCode.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct UpdateFunctionCode<'a> {
    pub(crate) revision_id: Option<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) dry_run: bool,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) publish: bool,
    pub(crate) publish_to: Option<String>,
    pub(crate) architectures: Option<Vec<String>>,
    #[serde(flatten, borrow)]
    pub(crate) code: CodeUpload<'a>,
}

/// PublishVersion.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PublishVersion {
    pub(crate) code_sha256: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) revision_id: Option<String>,
    pub(crate) publish_to: Option<String>,
}

/// CreateAlias.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct CreateAlias {
    pub(crate) name: Option<String>,
    pub(crate) function_version: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) routing_config: Option<RoutingConfig>,
}

/// UpdateAlias.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct UpdateAlias {
    pub(crate) function_version: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) routing_config: Option<RoutingConfig>,
    pub(crate) revision_id: Option<String>,
}

/// AddPermission.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct AddPermission {
    pub(crate) statement_id: Option<String>,
    pub(crate) action: Option<String>,
    pub(crate) principal: Option<String>,
    pub(crate) source_arn: Option<String>,
    pub(crate) source_account: Option<String>,
    pub(crate) event_source_token: Option<String>,
    pub(crate) revision_id: Option<String>,
    #[serde(rename = "PrincipalOrgID")]
    pub(crate) principal_org_id: Option<String>,
    pub(crate) function_url_auth_type: Option<String>,
    pub(crate) invoked_via_function_url: Option<bool>,
}

/// `AliasRoutingConfiguration`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RoutingConfig {
    pub(crate) additional_version_weights: Option<BTreeMap<String, f64>>,
}

/// TagResource.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TagResource {
    pub(crate) tags: Option<BTreeMap<String, String>>,
}

/// PublishLayerVersion.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PublishLayerVersion<'a> {
    #[serde(borrow, default)]
    pub(crate) content: Option<CodeUpload<'a>>,
    pub(crate) description: Option<String>,
    pub(crate) license_info: Option<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) compatible_runtimes: Vec<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) compatible_architectures: Vec<String>,
}

/// AddLayerVersionPermission.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct AddLayerVersionPermission {
    pub(crate) statement_id: Option<String>,
    pub(crate) action: Option<String>,
    pub(crate) principal: Option<String>,
    pub(crate) organization_id: Option<String>,
}

/// Where code comes from. The zip file is borrowed from the body: it may be 70 MB of base64.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct CodeUpload<'a> {
    #[serde(borrow)]
    pub(crate) zip_file: Option<Blob<'a>>,
    pub(crate) s3_bucket: Option<String>,
    pub(crate) s3_key: Option<String>,
    pub(crate) s3_object_version: Option<String>,
    pub(crate) image_uri: Option<String>,
    #[serde(rename = "SourceKMSKeyArn")]
    pub(crate) source_kms_key_arn: Option<String>,
}

/// Base64 text. A type of its own because serde borrows a `Cow` only where it stands alone.
#[derive(Deserialize)]
pub struct Blob<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);

impl fmt::Debug for Blob<'_> {
    /// Without the code.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blob(<{}>)", self.0.len())
    }
}

fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// `FunctionConfiguration`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct FunctionConfiguration<'a> {
    function_name: &'a str,
    function_arn: String,
    runtime: &'a str,
    role: &'a str,
    handler: &'a str,
    code_size: u64,
    description: &'a str,
    timeout: u32,
    memory_size: u32,
    last_modified: String,
    code_sha256: String,
    version: Version,
    #[serde(skip_serializing_if = "Option::is_none")]
    environment: Option<Value>,
    tracing_config: Value,
    revision_id: &'a str,
    state: &'static str,
    last_update_status: &'static str,
    package_type: &'static str,
    architectures: [&'static str; 1],
    ephemeral_storage: Value,
    snap_start: Value,
    logging_config: Value,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    layers: Vec<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dead_letter_config: Option<Value>,
}

impl<'a> FunctionConfiguration<'a> {
    /// How a function looks from outside. By the time that a function is in the store its code is
    /// unpacked and it can be invoked, so it is `Active` at once: there is nothing to wait for.
    /// Its ARN ends with the qualifier by which it was asked for, if there was one.
    pub fn of(function: &'a Function, place: &Place, qualifier: Option<&str>) -> Self {
        let arn = place.arn(&function.name);
        let config = &function.config;
        let environment = &config.environment;
        Self {
            function_name: &function.name,
            function_arn: qualifier.map_or(arn.clone(), |qualifier| format!("{arn}:{qualifier}")),
            runtime: &config.runtime,
            role: &config.role,
            handler: &config.handler,
            code_size: function.code.size,
            description: &config.description,
            timeout: config.timeout_s,
            memory_size: config.memory_mb,
            last_modified: function.last_modified(),
            code_sha256: function.code.sha256_base64(),
            version: function.version,
            environment: (!environment.is_empty())
                .then(|| serde_json::json!({ "Variables": environment })),
            tracing_config: serde_json::json!({ "Mode": config.tracing }),
            revision_id: &function.revision,
            state: "Active",
            last_update_status: "Successful",
            package_type: "Zip",
            architectures: ["x86_64"],
            ephemeral_storage: serde_json::json!({ "Size": 512 }),
            snap_start: serde_json::json!({ "ApplyOn": "None", "OptimizationStatus": "Off" }),
            logging_config: serde_json::json!({
                "LogFormat": "Text",
                "LogGroup": format!("/aws/lambda/{}", function.name),
            }),
            layers: config
                .layers
                .iter()
                .map(|layer| {
                    let arn = format!("{}:{}", place.layer_arn(&layer.name), layer.version);
                    serde_json::json!({ "Arn": arn, "CodeSize": layer.size })
                })
                .collect(),
            dead_letter_config: config
                .dead_letter
                .as_ref()
                .map(|target| serde_json::json!({ "TargetArn": target })),
        }
    }

    /// The same, with the version in its ARN.
    pub fn qualified(function: &'a Function, place: &Place) -> Self {
        Self::of(function, place, Some(&function.version.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environments_code_and_answers_do_not_print() {
        let body = br#"{"FunctionName": "f", "Code": {"ZipFile": "cGxhbnRlZA=="},
            "Environment": {"Variables": {"TOKEN": "planted"}}}"#;
        let create: CreateFunction = serde_json::from_slice(body).unwrap();
        let update: UpdateFunctionConfiguration = serde_json::from_slice(body).unwrap();
        let answer = crate::outcome::Answer::of(
            firn::guest::Outcome::Response {
                payload: b"planted".to_vec(),
                content_type: "t".into(),
            },
            "r",
        );
        let invocation = firn::Invocation {
            payload: bytes::Bytes::from_static(b"planted"),
            client_context: "planted".into(),
            ..Default::default()
        };
        let line = firn::LogLine {
            stream: firn::guest::Stream::Stdout,
            line: b"planted".to_vec(),
            partial: false,
        };
        for text in [
            format!("{create:?} {create:#?}"),
            format!("{update:?}"),
            format!("{answer:?}"),
            format!("{invocation:?}"),
            format!("{line:?}"),
        ] {
            let hidden = !text.contains("planted") && !text.contains("cGxhbnRlZA");
            // A list of numbers would begin with that of `p`.
            assert!(hidden && !text.contains("112"), "{text}");
        }
    }

    #[test]
    fn zip_files_are_borrowed_even_through_flatten() {
        let body = br#"{"ZipFile": "UEsFBg==", "DryRun": null, "Unknown": [1]}"#;
        let update: UpdateFunctionCode = serde_json::from_slice(body).unwrap();
        assert!(matches!(update.code.zip_file, Some(Blob(Cow::Borrowed("UEsFBg==")))));
        assert!(!update.dry_run);
    }

    #[test]
    fn configuration_has_the_models_names() {
        let function = crate::function::tests::example("hello");
        let place = Place { region: "us-east-1".into(), account: "000000000000".into() };
        let json = serde_json::to_value(FunctionConfiguration::qualified(&function, &place));
        let json = json.unwrap();
        assert_eq!(
            json["FunctionArn"],
            "arn:aws:lambda:us-east-1:000000000000:function:hello:$LATEST"
        );
        assert_eq!(json["CodeSha256"].as_str().unwrap().len(), 44);
        assert_eq!(json["Environment"]["Variables"]["STAGE"], "test");
        assert_eq!(json["LastModified"], "2026-01-01T00:00:00.000+0000");
    }
}
