//! Every operation: what policies call it, what the audit trail calls it, and on what it is.
//!
//! Actions and their resources follow the *Service authorization reference* of Lambda; names of events
//! follow CloudTrail, which has the version of the API in those of the older operations.

use std::collections::HashMap;

use axum::{
    extract::{FromRequestParts, Path},
    http::request::Parts,
};

use super::{Target, error::ApiError, layers, names::Place, names::Reference};

/// One operation of the API.
#[derive(Debug, PartialEq, Eq)]
pub struct Operation {
    /// What policies call it.
    pub action: &'static str,
    /// What CloudTrail calls it.
    pub event: &'static str,
    /// What it does.
    pub kind: Kind,
    /// On what.
    pub on: On,
}

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Changes nothing.
    Read,
    /// Changes something.
    Write,
    /// Invokes a function: what CloudTrail calls a data event.
    Data,
}

/// What an operation is on: how the gate knows before the handler runs what is to be allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// Nothing in particular: `*`.
    Account,
    /// The function that path and `Qualifier` name.
    Function,
    /// What the ARN in the path names.
    Arn,
    /// The layer, or its version, that the path names.
    Layer,
    /// Only the body says, or the query: the handler asks for leave itself.
    Body,
    /// Something of another service: the body says which operation it is.
    Service,
    /// The function's code; a link with a proof will do instead of a signature.
    Link,
    /// The same of a layer.
    LayerLink,
    /// The function whose URL the request's host is.
    Url,
    /// Whether the daemon is well, which everybody may ask.
    Health,
}

macro_rules! operations {
    ($($id:ident: $kind:ident on $on:ident, $action:literal, $event:literal;)*) => {
        $(pub static $id: Operation =
            Operation { action: $action, event: $event, kind: Kind::$kind, on: On::$on };)*
    };
}

operations! {
    CREATE_FUNCTION: Write on Body, "lambda:CreateFunction", "CreateFunction20150331";
    GET_FUNCTION: Read on Function, "lambda:GetFunction", "GetFunction20150331v2";
    GET_FUNCTION_CONFIGURATION: Read on Function, "lambda:GetFunctionConfiguration", "GetFunctionConfiguration20150331v2";
    LIST_FUNCTIONS: Read on Account, "lambda:ListFunctions", "ListFunctions20150331";
    UPDATE_FUNCTION_CODE: Write on Function, "lambda:UpdateFunctionCode", "UpdateFunctionCode20150331v2";
    UPDATE_FUNCTION_CONFIGURATION: Write on Function, "lambda:UpdateFunctionConfiguration", "UpdateFunctionConfiguration20150331v2";
    DELETE_FUNCTION: Write on Function, "lambda:DeleteFunction", "DeleteFunction20150331";
    PUBLISH_VERSION: Write on Function, "lambda:PublishVersion", "PublishVersion20150331";
    LIST_VERSIONS: Read on Function, "lambda:ListVersionsByFunction", "ListVersionsByFunction20150331";
    CREATE_ALIAS: Write on Function, "lambda:CreateAlias", "CreateAlias20150331";
    GET_ALIAS: Read on Function, "lambda:GetAlias", "GetAlias20150331";
    UPDATE_ALIAS: Write on Function, "lambda:UpdateAlias", "UpdateAlias20150331";
    DELETE_ALIAS: Write on Function, "lambda:DeleteAlias", "DeleteAlias20150331";
    LIST_ALIASES: Read on Function, "lambda:ListAliases", "ListAliases20150331";
    ADD_PERMISSION: Write on Function, "lambda:AddPermission", "AddPermission20150331v2";
    REMOVE_PERMISSION: Write on Function, "lambda:RemovePermission", "RemovePermission20150331v2";
    GET_POLICY: Read on Function, "lambda:GetPolicy", "GetPolicy20150331v2";
    TAG_RESOURCE: Write on Arn, "lambda:TagResource", "TagResource20170331v2";
    UNTAG_RESOURCE: Write on Arn, "lambda:UntagResource", "UntagResource20170331v2";
    LIST_TAGS: Read on Arn, "lambda:ListTags", "ListTags20170331";
    INVOKE: Data on Function, "lambda:InvokeFunction", "Invoke";
    // The same by an older way: who may not invoke may not do so by it either.
    INVOKE_ASYNC: Data on Function, "lambda:InvokeFunction", "InvokeAsync";
    INVOKE_STREAM: Data on Function, "lambda:InvokeFunction", "InvokeWithResponseStream";
    INVOKE_URL: Data on Url, "lambda:InvokeFunctionUrl", "InvokeFunctionUrl";
    CREATE_URL: Write on Function, "lambda:CreateFunctionUrlConfig", "CreateFunctionUrlConfig";
    GET_URL: Read on Function, "lambda:GetFunctionUrlConfig", "GetFunctionUrlConfig";
    UPDATE_URL: Write on Function, "lambda:UpdateFunctionUrlConfig", "UpdateFunctionUrlConfig";
    DELETE_URL: Write on Function, "lambda:DeleteFunctionUrlConfig", "DeleteFunctionUrlConfig";
    LIST_URLS: Read on Function, "lambda:ListFunctionUrlConfigs", "ListFunctionUrlConfigs";
    GET_ACCOUNT_SETTINGS: Read on Account, "lambda:GetAccountSettings", "GetAccountSettings20160819";
    PUT_FUNCTION_CONCURRENCY: Write on Function, "lambda:PutFunctionConcurrency", "PutFunctionConcurrency20171031";
    GET_FUNCTION_CONCURRENCY: Read on Function, "lambda:GetFunctionConcurrency", "GetFunctionConcurrency";
    DELETE_FUNCTION_CONCURRENCY: Write on Function, "lambda:DeleteFunctionConcurrency", "DeleteFunctionConcurrency20171031";
    PUT_PROVISIONED: Write on Function, "lambda:PutProvisionedConcurrencyConfig", "PutProvisionedConcurrencyConfig";
    GET_PROVISIONED: Read on Function, "lambda:GetProvisionedConcurrencyConfig", "GetProvisionedConcurrencyConfig";
    LIST_PROVISIONED: Read on Function, "lambda:ListProvisionedConcurrencyConfigs", "ListProvisionedConcurrencyConfigs";
    DELETE_PROVISIONED: Write on Function, "lambda:DeleteProvisionedConcurrencyConfig", "DeleteProvisionedConcurrencyConfig";
    PUT_EVENT_CONFIG: Write on Function, "lambda:PutFunctionEventInvokeConfig", "PutFunctionEventInvokeConfig";
    UPDATE_EVENT_CONFIG: Write on Function, "lambda:UpdateFunctionEventInvokeConfig", "UpdateFunctionEventInvokeConfig";
    GET_EVENT_CONFIG: Read on Function, "lambda:GetFunctionEventInvokeConfig", "GetFunctionEventInvokeConfig";
    DELETE_EVENT_CONFIG: Write on Function, "lambda:DeleteFunctionEventInvokeConfig", "DeleteFunctionEventInvokeConfig";
    LIST_EVENT_CONFIGS: Read on Function, "lambda:ListFunctionEventInvokeConfigs", "ListFunctionEventInvokeConfigs";
    PUBLISH_LAYER: Write on Layer, "lambda:PublishLayerVersion", "PublishLayerVersion20181031";
    GET_LAYER: Read on Layer, "lambda:GetLayerVersion", "GetLayerVersion20181031";
    GET_LAYER_BY_ARN: Read on Body, "lambda:GetLayerVersion", "GetLayerVersionByArn20181031";
    LIST_LAYERS: Read on Account, "lambda:ListLayers", "ListLayers20181031";
    LIST_LAYER_VERSIONS: Read on Layer, "lambda:ListLayerVersions", "ListLayerVersions20181031";
    DELETE_LAYER: Write on Layer, "lambda:DeleteLayerVersion", "DeleteLayerVersion20181031";
    ADD_LAYER_PERMISSION: Write on Layer, "lambda:AddLayerVersionPermission", "AddLayerVersionPermission20181031";
    REMOVE_LAYER_PERMISSION: Write on Layer, "lambda:RemoveLayerVersionPermission", "RemoveLayerVersionPermission20181031";
    GET_LAYER_POLICY: Read on Layer, "lambda:GetLayerVersionPolicy", "GetLayerVersionPolicy20181031";
    LAYER_CONTENT: Read on LayerLink, "firn:GetLayerContent", "GetLayerContent";
    // Of other services: which operation it is stands in the body.
    SERVICE: Write on Service, "", "";
    HEALTH: Read on Health, "firn:GetHealth", "GetHealth";
    INSTANCES: Read on Account, "firn:ListInstances", "ListInstances";
    EVENTS: Read on Account, "firn:GetEventQueue", "GetEventQueue";
    METRICS: Read on Account, "firn:GetMetrics", "GetMetrics";
    METERING: Read on Account, "firn:GetMetering", "GetMetering";
    SNAPSHOT: Read on Function, "firn:GetSnapshot", "GetSnapshot";
    CODE: Read on Link, "firn:GetCode", "GetCode";
}

impl Operation {
    /// The operation that a request means: two paths have two each, which a parameter tells apart.
    pub fn meant(&'static self, query: Option<&str>) -> &'static Self {
        let has = |wanted| query.is_some_and(|query| query.split('&').any(|pair| pair == wanted));
        match self {
            one if std::ptr::eq(one, &GET_PROVISIONED) && has("List=ALL") => &LIST_PROVISIONED,
            one if std::ptr::eq(one, &LIST_LAYERS) && has("find=LayerVersion") => &GET_LAYER_BY_ARN,
            one => one,
        }
    }

    /// What a request is on, as far as its head says.
    ///
    /// # Errors
    /// The path names nothing that there can be.
    pub async fn resource(
        &self,
        parts: &mut Parts,
        place: &Place,
    ) -> Result<Option<String>, ApiError> {
        match self.on {
            On::Account => Ok(Some("*".into())),
            On::Function | On::Link => {
                let Target(reference) = Target::from_request_parts(parts, &()).await?;
                Ok(Some(reference.arn(place)))
            }
            On::Arn => {
                let path = Path::<HashMap<String, String>>::from_request_parts(parts, &()).await;
                let arn = path.ok().and_then(|Path(path)| path.get("arn").cloned());
                let arn = arn.unwrap_or_default();
                // What the handler takes it for, whatever else it may look like.
                Reference::parse(&arn, None).map(|reference| Some(reference.arn(place)))
            }
            On::Layer | On::LayerLink => {
                let path = Path::<HashMap<String, String>>::from_request_parts(parts, &()).await;
                let path = path.map(|Path(path)| path).unwrap_or_default();
                let part = |name| path.get(name).map(String::as_str);
                layers::arn(place, part("layer").unwrap_or_default(), part("version")).map(Some)
            }
            On::Body | On::Service | On::Url | On::Health => Ok(None),
        }
    }
}
