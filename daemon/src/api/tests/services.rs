//! Other services of AWS on the same port.

use super::*;

const JSON: (&str, &str) = ("content-type", "application/x-amz-json-1.1");

#[tokio::test]
async fn unknown_services_and_operations_say_so() {
    let (_dir, daemon) = daemon().await;
    let form = ("content-type", "application/x-www-form-urlencoded");
    let query = b"Action=Nothing&Version=2010-08-01";
    for (path, headers, body) in [
        ("/", vec![JSON, ("x-amz-target", "Nothing_1.Do")], &b"{}"[..]),
        ("/", vec![JSON, ("x-amz-target", "nothing")], b"{}"),
        ("/", vec![], b""),
        ("/", vec![form], query),
        ("/service/Nothing/operation/Do", vec![], b""),
    ] {
        let answer = daemon.call("POST", path, &headers, body).await;
        assert_eq!(answer.status, 400, "{path} {headers:?}");
        assert_eq!(answer.header("x-amzn-errortype"), Some("UnknownOperationException"));
        assert!(answer.header("x-amzn-requestid").is_some());
    }
    daemon.get("/").await.expect(404, "UnknownOperationException");
}

#[tokio::test]
async fn requests_of_services_are_bounded() {
    let (_dir, daemon) = daemon().await;
    let target = [JSON, ("x-amz-target", "Nothing_1.Do")];
    let answer = daemon.call("POST", "/", &target, &vec![b' '; (1 << 20) + 1]).await;
    assert_eq!(answer.status, 413);
    let answer = daemon.call("POST", "/", &target, b"{").await;
    assert_eq!(answer.json()["__type"], "SerializationException");
}
