//! What web pages from elsewhere may do with a URL, where its configuration says so: Firn answers their
//! preflight requests itself, and puts the header fields into every response in the function's stead.
//!
//! Without a configuration all of it is the function's own affair.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, Method, Response, header, request::Parts},
};

use crate::attachments::Cors;

/// The answer to a preflight request; `None` for any other.
pub fn preflight(cors: &Cors, parts: &Parts) -> Option<Response<Body>> {
    let asks = parts.method == Method::OPTIONS
        && parts.headers.contains_key(header::ORIGIN)
        && parts.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if !asks {
        return None;
    }
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    if origin(cors, &parts.headers, headers) {
        put(headers, header::ACCESS_CONTROL_ALLOW_METHODS, cors.allow_methods.as_deref());
        put(headers, header::ACCESS_CONTROL_ALLOW_HEADERS, cors.allow_headers.as_deref());
        if let Some(seconds) = cors.max_age {
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, seconds.into());
        }
    }
    Some(response)
}

/// A response with what pages may do with it; what the function says of that itself does not count.
pub fn allow(cors: &Cors, parts: &Parts, mut response: Response<Body>) -> Response<Body> {
    let headers = response.headers_mut();
    for name in [
        header::ACCESS_CONTROL_ALLOW_ORIGIN,
        header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
    ] {
        headers.remove(name);
    }
    if origin(cors, &parts.headers, headers) {
        put(headers, header::ACCESS_CONTROL_EXPOSE_HEADERS, cors.expose_headers.as_deref());
    }
    response
}

/// Says whether the page's origin is allowed, and whether with its cookies.
fn origin(cors: &Cors, request: &HeaderMap, response: &mut HeaderMap) -> bool {
    let Some(given) = request.get(header::ORIGIN) else { return false };
    let allowed = cors.allow_origins.as_deref().unwrap_or_default();
    let any = allowed.iter().any(|origin| origin == "*");
    if !any && !allowed.iter().any(|origin| origin.as_bytes() == given.as_bytes()) {
        return false;
    }
    let credentials = cors.allow_credentials == Some(true);
    // With credentials browsers take no asterisk.
    let told = if any && !credentials { HeaderValue::from_static("*") } else { given.clone() };
    response.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, told);
    if credentials {
        let yes = HeaderValue::from_static("true");
        response.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, yes);
    }
    if !any || credentials {
        response.append(header::VARY, HeaderValue::from_static("Origin"));
    }
    true
}

fn put(headers: &mut HeaderMap, name: HeaderName, list: Option<&[String]>) {
    let list = list.unwrap_or_default();
    // What can't be told was refused when it was set.
    if let Ok(value) = HeaderValue::try_from(list.join(","))
        && !list.is_empty()
    {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    fn cors(origins: &[&str], credentials: bool) -> Cors {
        let list = |items: &[&str]| Some(items.iter().map(|i| (*i).to_owned()).collect());
        Cors {
            allow_credentials: Some(credentials),
            allow_headers: list(&["x-a", "x-b"]),
            allow_methods: list(&["GET", "POST"]),
            allow_origins: list(origins),
            expose_headers: list(&["x-c"]),
            max_age: Some(60),
        }
    }

    fn parts(method: &str, origin: &str) -> Parts {
        let request = Request::builder()
            .method(method)
            .header("Origin", origin)
            .header("Access-Control-Request-Method", "GET");
        request.body(()).unwrap().into_parts().0
    }

    fn told(response: &Response<Body>) -> String {
        let mut fields: Vec<String> = response
            .headers()
            .iter()
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect();
        fields.sort();
        fields.join("; ")
    }

    #[test]
    fn preflights_are_answered_for_those_who_may() {
        let asked = parts("OPTIONS", "https://a.example");
        let any = preflight(&cors(&["*"], false), &asked).unwrap();
        assert_eq!(
            told(&any),
            "access-control-allow-headers: x-a,x-b; access-control-allow-methods: GET,POST; \
             access-control-allow-origin: *; access-control-max-age: 60"
        );
        let one = preflight(&cors(&["https://b.example", "https://a.example"], true), &asked);
        let one = told(&one.unwrap());
        assert!(one.contains("allow-origin: https://a.example; "), "{one}");
        assert!(one.contains("allow-credentials: true") && one.contains("vary: Origin"), "{one}");
        let foreign = preflight(&cors(&["https://b.example"], false), &asked).unwrap();
        assert_eq!((foreign.status().as_u16(), told(&foreign)), (200, String::new()));
        assert!(preflight(&cors(&["*"], false), &parts("GET", "https://a.example")).is_none());
        let (plain, ()) = Request::options("/").body(()).unwrap().into_parts();
        assert!(preflight(&cors(&["*"], false), &plain).is_none(), "the function's to answer");
    }

    #[test]
    fn responses_say_what_the_configuration_says_and_not_the_function() {
        let response = || {
            Response::builder()
                .header("Access-Control-Allow-Origin", "https://evil.example")
                .header("X-C", "1")
                .body(Body::empty())
                .unwrap()
        };
        let asked = parts("GET", "https://a.example");
        let allowed = told(&allow(&cors(&["*"], false), &asked, response()));
        assert_eq!(
            allowed,
            "access-control-allow-origin: *; access-control-expose-headers: x-c; x-c: 1"
        );
        let foreign = allow(&cors(&["https://b.example"], false), &asked, response());
        assert_eq!(told(&foreign), "x-c: 1");
    }
}
