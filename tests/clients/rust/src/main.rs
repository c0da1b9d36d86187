//! A function's whole life through AWS's SDK for Rust: `firn-client ENDPOINT NAME ZIP ZIP`.
//!
//! Prints `ok STEP` for each step; tests/e2e/test_clients.py knows which must come.

use std::{env, fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use aws_sdk_lambda::{
    Client,
    client::Waiters,
    config::{BehaviorVersion, Credentials, Region, retry::RetryConfig},
    error::SdkError,
    primitives::Blob,
    types::{
        AliasRoutingConfiguration, Environment, FunctionCode, InvocationType, LogType,
        ProvisionedConcurrencyStatusEnum, Runtime, ThrottleReason,
    },
};
use aws_smithy_http_client::Builder;
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

const ROLE: &str = "arn:aws:iam::000000000000:role/test";
const PATIENCE: Duration = Duration::from_secs(180);

/// One function, and how to reach it.
struct Life {
    client: Client,
    name: String,
    codes: [Vec<u8>; 2],
}

/// What an operation was refused with; all else is a failure.
fn refused<T, E, R>(result: Result<T, SdkError<E, R>>, what: &str) -> Result<E> {
    match result {
        Ok(_) => bail!("{what} is not refused"),
        Err(SdkError::ServiceError(error)) => Ok(error.into_err()),
        Err(_) => bail!("{what} did not get through"),
    }
}

impl Life {
    async fn create(&self) -> Result<()> {
        let request = || {
            let code = FunctionCode::builder().zip_file(Blob::new(self.codes[0].clone())).build();
            let environment = Environment::builder().variables("GREETING", "hello").build();
            let request = self.client.create_function().function_name(&self.name);
            let request =
                request.runtime(Runtime::Python311).handler("function.handler").role(ROLE);
            request.code(code).environment(environment).tags("team", "rust")
        };
        let created = request().send().await?;
        ensure!(created.version() == Some("$LATEST"));
        let active = self.client.wait_until_function_active_v2().function_name(&self.name);
        active.wait(PATIENCE).await.context("the function is not active")?;
        ensure!(refused(request().send().await, "a second one")?.is_resource_conflict_exception());
        Ok(())
    }

    async fn configure(&self) -> Result<()> {
        let got = self.client.get_function().function_name(&self.name).send().await?;
        ensure!(got.tags().is_some_and(|tags| tags["team"] == "rust"));
        let revision = got.configuration().and_then(|c| c.revision_id()).context("no revision")?;
        let update = |seconds| {
            let request = self.client.update_function_configuration().function_name(&self.name);
            request.timeout(seconds).revision_id(revision).send()
        };
        update(7).await?;
        let updated = self.client.wait_until_function_updated_v2().function_name(&self.name);
        updated.wait(PATIENCE).await.context("the function is not updated")?;
        let now = self.client.get_function_configuration().function_name(&self.name).send().await?;
        ensure!(now.timeout() == Some(7));
        let variables = now.environment().and_then(|environment| environment.variables());
        ensure!(variables.is_some_and(|variables| variables["GREETING"] == "hello"));
        ensure!(refused(update(8).await, "a stale revision")?.is_precondition_failed_exception());
        Ok(())
    }

    async fn invoke(&self) -> Result<()> {
        let request = |event: &Value| {
            let request = self.client.invoke().function_name(&self.name);
            request.payload(Blob::new(event.to_string()))
        };
        let context = STANDARD.encode(json!({"custom": {"key": "value"}}).to_string());
        let request_ = request(&json!({"do": "context"})).log_type(LogType::Tail);
        let answer = request_.client_context(context).send().await?;
        ensure!(answer.status_code() == 200 && answer.function_error().is_none());
        ensure!(payload(answer.payload())? == json!({"custom": {"key": "value"}, "version": 1}));
        let log = STANDARD.decode(answer.log_result().context("no log")?)?;
        let log = String::from_utf8(log)?;
        ensure!(
            log.starts_with("START RequestId: ") && log.contains("REPORT RequestId: "),
            "{log}"
        );
        let empty = json!({});
        let dry = request(&empty).invocation_type(InvocationType::DryRun).send().await?;
        ensure!(dry.status_code() == 204);
        let event = request(&empty).invocation_type(InvocationType::Event).send().await?;
        ensure!(event.status_code() == 202);
        let failed = request(&json!({"do": "raise"})).send().await?;
        ensure!(failed.function_error() == Some("Unhandled"));
        ensure!(payload(failed.payload())?["errorType"] == "ValueError");
        let garbage = self.client.invoke().function_name(&self.name).payload(Blob::new("{"));
        let error = refused(garbage.send().await, "an event that is no JSON")?;
        ensure!(error.is_invalid_request_content_exception());
        Ok(())
    }

    async fn versions(&self) -> Result<()> {
        let publish = self.client.publish_version().function_name(&self.name);
        let one = publish.description("first").send().await?;
        ensure!(one.version() == Some("1"));
        let update = self.client.update_function_code().function_name(&self.name).publish(true);
        let two = update.zip_file(Blob::new(self.codes[1].clone())).send().await?;
        ensure!(two.version() == Some("2") && two.code_sha256() != one.code_sha256());
        let list = self.client.list_versions_by_function().function_name(&self.name);
        let mut pages = list.into_paginator().page_size(1).send();
        let mut versions = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page?;
            ensure!(page.versions().len() <= 1);
            versions.extend(page.versions().iter().filter_map(|v| v.version()).map(str::to_owned));
        }
        ensure!(versions == ["$LATEST", "1", "2"], "{versions:?}");
        Ok(())
    }

    async fn aliases(&self) -> Result<()> {
        let create = self.client.create_alias().function_name(&self.name);
        create.name("prod").function_version("1").send().await?;
        let through = async || {
            let invoke = self.client.invoke().function_name(&self.name).qualifier("prod");
            let event = json!({"do": "context"}).to_string();
            let answer = invoke.payload(Blob::new(event)).send().await?;
            let version = answer.executed_version().unwrap_or_default().to_owned();
            anyhow::Ok((version, payload(answer.payload())?["version"].clone()))
        };
        ensure!(through().await? == ("1".into(), json!(1)));
        let routing = AliasRoutingConfiguration::builder().additional_version_weights("2", 1.0);
        let routing = routing.build();
        let update = self.client.update_alias().function_name(&self.name).name("prod");
        update.routing_config(routing.clone()).send().await?;
        ensure!(through().await? == ("2".into(), json!(2)));
        let aliases = self.client.list_aliases().function_name(&self.name).send().await?;
        ensure!(aliases.aliases()[0].routing_config() == Some(&routing));
        self.client.delete_alias().function_name(&self.name).name("prod").send().await?;
        let get = self.client.get_alias().function_name(&self.name).name("prod").send().await;
        ensure!(refused(get, "a deleted alias")?.is_resource_not_found_exception());
        Ok(())
    }

    async fn tags(&self) -> Result<()> {
        let got = self.client.get_function_configuration().function_name(&self.name).send().await?;
        let arn = got.function_arn().context("no ARN")?;
        self.client.tag_resource().resource(arn).tags("stage", "test").send().await?;
        self.client.untag_resource().resource(arn).tag_keys("team").send().await?;
        let tags = self.client.list_tags().resource(arn).send().await?;
        let tags = tags.tags().context("no tags")?;
        ensure!(tags.len() == 1 && tags["stage"] == "test", "{tags:?}");
        Ok(())
    }

    async fn concurrency(&self) -> Result<()> {
        let reserve = self.client.put_function_concurrency().function_name(&self.name);
        let reserved = reserve.reserved_concurrent_executions(0).send().await?;
        ensure!(reserved.reserved_concurrent_executions() == Some(0));
        let invoke = self.client.invoke().function_name(&self.name).send().await;
        match refused(invoke, "an invocation without concurrency")? {
            aws_sdk_lambda::operation::invoke::InvokeError::TooManyRequestsException(error) => {
                let own = ThrottleReason::ReservedFunctionConcurrentInvocationLimitExceeded;
                ensure!(error.reason() == Some(&own));
            }
            other => bail!("{other}"),
        }
        self.client.delete_function_concurrency().function_name(&self.name).send().await?;
        let get = self.client.get_function_concurrency().function_name(&self.name).send().await?;
        ensure!(get.reserved_concurrent_executions().is_none());
        let settings = self.client.get_account_settings().send().await?;
        let limit = settings.account_limit().context("no limits")?;
        ensure!(limit.unreserved_concurrent_executions() == Some(limit.concurrent_executions()));
        let get = || {
            let get = self.client.get_provisioned_concurrency_config();
            get.function_name(&self.name).qualifier("1").send()
        };
        let error = refused(get().await, "what is not provisioned")?;
        ensure!(error.is_provisioned_concurrency_config_not_found_exception());
        let put = self.client.put_provisioned_concurrency_config().function_name(&self.name);
        put.qualifier("1").provisioned_concurrent_executions(1).send().await?;
        for second in 0.. {
            match get().await?.status() {
                Some(ProvisionedConcurrencyStatusEnum::Ready) => break,
                Some(ProvisionedConcurrencyStatusEnum::InProgress) if second < 180 => {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                other => bail!("provisioned concurrency is {other:?}"),
            }
        }
        let delete = self.client.delete_provisioned_concurrency_config();
        delete.function_name(&self.name).qualifier("1").send().await?;
        Ok(())
    }

    async fn events(&self) -> Result<()> {
        let put = self.client.put_function_event_invoke_config().function_name(&self.name);
        put.maximum_retry_attempts(1).maximum_event_age_in_seconds(60).send().await?;
        let get =
            || self.client.get_function_event_invoke_config().function_name(&self.name).send();
        let config = get().await?;
        ensure!(config.maximum_retry_attempts() == Some(1) && config.last_modified().is_some());
        let delete = self.client.delete_function_event_invoke_config();
        delete.function_name(&self.name).send().await?;
        let error = refused(get().await, "deleted settings")?;
        ensure!(error.is_resource_not_found_exception());
        Ok(())
    }

    async fn delete(&self) -> Result<()> {
        self.client.delete_function().function_name(&self.name).send().await?;
        let get = self.client.get_function().function_name(&self.name).send().await;
        ensure!(refused(get, "a deleted function")?.is_resource_not_found_exception());
        Ok(())
    }
}

fn payload(payload: Option<&Blob>) -> Result<Value> {
    Ok(serde_json::from_slice(payload.context("no payload")?.as_ref())?)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [endpoint, name, first, second] = arguments.as_slice() else {
        bail!("usage: firn-client ENDPOINT NAME ZIP ZIP");
    };
    let variable = |name| env::var(name).with_context(|| format!("{name} is not set"));
    let (key, secret) = (variable("AWS_ACCESS_KEY_ID")?, variable("AWS_SECRET_ACCESS_KEY")?);
    let config = aws_sdk_lambda::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .credentials_provider(Credentials::new(key, secret, None, None, "environment"))
        .region(Region::new(variable("AWS_DEFAULT_REGION")?))
        .endpoint_url(endpoint)
        .retry_config(RetryConfig::disabled())
        .http_client(Builder::new().build_http())
        .build();
    let client = Client::from_conf(config);
    let life = Life { client, name: name.clone(), codes: [fs::read(first)?, fs::read(second)?] };
    macro_rules! steps {
        ($($step:ident),*) => {$(
            life.$step().await.with_context(|| format!("step {}", stringify!($step)))?;
            println!("ok {}", stringify!($step));
        )*};
    }
    steps!(create, configure, invoke, versions, aliases, tags, concurrency, events, delete);
    Ok(())
}
