//! The table of routes. Each leads through the gate of its operation: there is no way to make one without.

use std::sync::Arc;

use axum::{
    Router,
    extract::DefaultBodyLimit,
    handler::Handler,
    middleware,
    routing::{self, MethodFilter, MethodRouter},
};

use super::{
    App, aliases, common, concurrency, event_config, firn_api, functions, gate, gate::Gate, invoke,
    invoke_stream, layers, no_method, no_operation, operations as op, operations::Operation,
    permissions, services, tags, url_config, urls, versions,
};
use crate::backend::Backend;

/// A handler behind the gate of its operation: the only kind that there is a route to.
struct Route<B: Backend>(MethodRouter<Arc<App<B>>>);

/// Makes routes.
struct Routes<B: Backend>(Arc<App<B>>);

impl<B: Backend> Routes<B> {
    fn get<T: 'static>(
        &self,
        operation: &'static Operation,
        handler: impl Handler<T, Arc<App<B>>>,
    ) -> Route<B> {
        self.on(MethodFilter::GET, operation, handler)
    }

    fn post<T: 'static>(
        &self,
        operation: &'static Operation,
        handler: impl Handler<T, Arc<App<B>>>,
    ) -> Route<B> {
        self.on(MethodFilter::POST, operation, handler)
    }

    fn put<T: 'static>(
        &self,
        operation: &'static Operation,
        handler: impl Handler<T, Arc<App<B>>>,
    ) -> Route<B> {
        self.on(MethodFilter::PUT, operation, handler)
    }

    fn delete<T: 'static>(
        &self,
        operation: &'static Operation,
        handler: impl Handler<T, Arc<App<B>>>,
    ) -> Route<B> {
        self.on(MethodFilter::DELETE, operation, handler)
    }

    fn on<T: 'static>(
        &self,
        method: MethodFilter,
        operation: &'static Operation,
        handler: impl Handler<T, Arc<App<B>>>,
    ) -> Route<B> {
        let gate = middleware::from_fn_with_state(Gate::new(&self.0, operation), gate::pass::<B>);
        Route(routing::on(method, handler).route_layer(gate))
    }
}

/// All routes.
fn table<B: Backend>(app: &Arc<App<B>>) -> Vec<(&'static str, Vec<Route<B>>)> {
    let on = Routes(app.clone());
    vec![
        (
            "/2015-03-31/functions",
            vec![
                on.get(&op::LIST_FUNCTIONS, functions::list::<B>),
                on.post(&op::CREATE_FUNCTION, functions::create::<B>),
            ],
        ),
        (
            "/2015-03-31/functions/{name}",
            vec![
                on.get(&op::GET_FUNCTION, functions::get::<B>),
                on.delete(&op::DELETE_FUNCTION, functions::delete::<B>),
            ],
        ),
        (
            "/2015-03-31/functions/{name}/configuration",
            vec![
                on.get(&op::GET_FUNCTION_CONFIGURATION, functions::get_configuration::<B>),
                on.put(&op::UPDATE_FUNCTION_CONFIGURATION, functions::update_configuration::<B>),
            ],
        ),
        (
            "/2015-03-31/functions/{name}/code",
            vec![on.put(&op::UPDATE_FUNCTION_CODE, functions::update_code::<B>)],
        ),
        (
            "/2015-03-31/functions/{name}/versions",
            vec![
                on.get(&op::LIST_VERSIONS, versions::list::<B>),
                on.post(&op::PUBLISH_VERSION, versions::publish::<B>),
            ],
        ),
        (
            "/2015-03-31/functions/{name}/aliases",
            vec![
                on.get(&op::LIST_ALIASES, aliases::list::<B>),
                on.post(&op::CREATE_ALIAS, aliases::create::<B>),
            ],
        ),
        (
            "/2015-03-31/functions/{name}/aliases/{alias}",
            vec![
                on.get(&op::GET_ALIAS, aliases::get::<B>),
                on.put(&op::UPDATE_ALIAS, aliases::update::<B>),
                on.delete(&op::DELETE_ALIAS, aliases::delete::<B>),
            ],
        ),
        (
            "/2015-03-31/functions/{name}/policy",
            vec![
                on.get(&op::GET_POLICY, permissions::get::<B>),
                on.post(&op::ADD_PERMISSION, permissions::add::<B>),
            ],
        ),
        (
            "/2015-03-31/functions/{name}/policy/{sid}",
            vec![on.delete(&op::REMOVE_PERMISSION, permissions::remove::<B>)],
        ),
        (
            "/2017-03-31/tags/{arn}",
            vec![
                on.get(&op::LIST_TAGS, tags::list::<B>),
                on.post(&op::TAG_RESOURCE, tags::tag::<B>),
                on.delete(&op::UNTAG_RESOURCE, tags::untag::<B>),
            ],
        ),
        (
            "/2015-03-31/functions/{name}/invocations",
            vec![on.post(&op::INVOKE, invoke::invoke::<B>)],
        ),
        (
            "/2014-11-13/functions/{name}/invoke-async",
            vec![on.post(&op::INVOKE_ASYNC, invoke::invoke_async::<B>)],
        ),
        (
            "/2021-11-15/functions/{name}/response-streaming-invocations",
            vec![on.post(&op::INVOKE_STREAM, invoke_stream::invoke::<B>)],
        ),
        (
            "/2021-10-31/functions/{name}/url",
            vec![
                on.get(&op::GET_URL, url_config::get::<B>),
                on.post(&op::CREATE_URL, url_config::create::<B>),
                on.put(&op::UPDATE_URL, url_config::update::<B>),
                on.delete(&op::DELETE_URL, url_config::delete::<B>),
            ],
        ),
        ("/2021-10-31/functions/{name}/urls", vec![on.get(&op::LIST_URLS, url_config::list::<B>)]),
        (
            "/2016-08-19/account-settings",
            vec![on.get(&op::GET_ACCOUNT_SETTINGS, functions::account_settings::<B>)],
        ),
        (
            "/2017-10-31/functions/{name}/concurrency",
            vec![
                on.put(&op::PUT_FUNCTION_CONCURRENCY, concurrency::put_reserved::<B>),
                on.delete(&op::DELETE_FUNCTION_CONCURRENCY, concurrency::delete_reserved::<B>),
            ],
        ),
        (
            "/2019-09-30/functions/{name}/concurrency",
            vec![on.get(&op::GET_FUNCTION_CONCURRENCY, concurrency::get_reserved::<B>)],
        ),
        (
            "/2019-09-30/functions/{name}/provisioned-concurrency",
            vec![
                on.get(&op::GET_PROVISIONED, concurrency::get_provisioned::<B>),
                on.put(&op::PUT_PROVISIONED, concurrency::put_provisioned::<B>),
                on.delete(&op::DELETE_PROVISIONED, concurrency::delete_provisioned::<B>),
            ],
        ),
        (
            "/2019-09-25/functions/{name}/event-invoke-config",
            vec![
                on.get(&op::GET_EVENT_CONFIG, event_config::get::<B>),
                on.put(&op::PUT_EVENT_CONFIG, event_config::put::<B>),
                on.post(&op::UPDATE_EVENT_CONFIG, event_config::update::<B>),
                on.delete(&op::DELETE_EVENT_CONFIG, event_config::delete::<B>),
            ],
        ),
        (
            "/2019-09-25/functions/{name}/event-invoke-config/list",
            vec![on.get(&op::LIST_EVENT_CONFIGS, event_config::list::<B>)],
        ),
        ("/2018-10-31/layers", vec![on.get(&op::LIST_LAYERS, layers::list::<B>)]),
        (
            "/2018-10-31/layers/{layer}/versions",
            vec![
                on.get(&op::LIST_LAYER_VERSIONS, layers::versions::<B>),
                on.post(&op::PUBLISH_LAYER, layers::publish::<B>),
            ],
        ),
        (
            "/2018-10-31/layers/{layer}/versions/{version}",
            vec![
                on.get(&op::GET_LAYER, layers::get::<B>),
                on.delete(&op::DELETE_LAYER, layers::delete::<B>),
            ],
        ),
        (
            "/2018-10-31/layers/{layer}/versions/{version}/policy",
            vec![
                on.get(&op::GET_LAYER_POLICY, layers::policy::get::<B>),
                on.post(&op::ADD_LAYER_PERMISSION, layers::policy::add::<B>),
            ],
        ),
        (
            "/2018-10-31/layers/{layer}/versions/{version}/policy/{sid}",
            vec![on.delete(&op::REMOVE_LAYER_PERMISSION, layers::policy::remove::<B>)],
        ),
        (
            "/firn/v1/layers/{layer}/versions/{version}/content",
            vec![on.get(&op::LAYER_CONTENT, layers::content::<B>)],
        ),
        ("/firn/v1/health", vec![on.get(&op::HEALTH, firn_api::health::<B>)]),
        ("/firn/v1/instances", vec![on.get(&op::INSTANCES, firn_api::instances::<B>)]),
        ("/firn/v1/events", vec![on.get(&op::EVENTS, firn_api::events::<B>)]),
        ("/firn/v1/metering", vec![on.get(&op::METERING, firn_api::metering::<B>)]),
        ("/metrics", vec![on.get(&op::METRICS, firn_api::metrics::<B>)]),
        (
            "/firn/v1/functions/{name}/snapshot",
            vec![on.get(&op::SNAPSHOT, firn_api::snapshot::<B>)],
        ),
        ("/firn/v1/functions/{name}/code", vec![on.get(&op::CODE, firn_api::code::<B>)]),
        ("/", vec![on.post(&op::SERVICE, services::serve::<B>)]),
        (
            "/service/{service}/operation/{operation}",
            vec![on.post(&op::SERVICE, services::serve::<B>)],
        ),
    ]
}

/// The paths of all routes.
#[cfg(test)]
pub fn paths<B: Backend>(app: &Arc<App<B>>) -> Vec<&'static str> {
    table(app).into_iter().map(|(path, _)| path).collect()
}

/// What serves them.
pub fn router<B: Backend>(app: Arc<App<B>>) -> Router {
    let mut router = Router::new();
    for (path, handlers) in table(&app) {
        let handlers =
            handlers.into_iter().fold(MethodRouter::new(), |all, Route(one)| all.merge(one));
        if path == "/" {
            // It names nothing that other methods could be for.
            router = router.route(path, handlers.fallback(no_operation));
            continue;
        }
        let handlers = handlers.fallback(no_method);
        // SDKs of several ages differ in whether a slash ends the path.
        router = router.route(path, handlers.clone()).route(&format!("{path}/"), handlers);
    }
    router
        .fallback(no_operation)
        // Every handler sets its own limit as it reads.
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn(common))
        // Before all that is the API's.
        .layer(middleware::from_fn_with_state(app.clone(), urls::by_host::<B>))
        .with_state(app)
}
