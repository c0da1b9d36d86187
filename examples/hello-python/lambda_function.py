"""The function of the first demo: greets, and tells what it knows of its invocation."""

import json
import platform


def lambda_handler(event, context):
    name = event.get("name", "world") if isinstance(event, dict) else "world"
    remaining = context.get_remaining_time_in_millis()
    print(f"greeting {name} for request {context.aws_request_id}, {remaining} ms left")
    return {
        "statusCode": 200,
        "body": json.dumps({"message": f"Hello, {name}!"}),
        "request_id": context.aws_request_id,
        "remaining_ms": remaining,
        "function": context.function_name,
        "memory_mb": context.memory_limit_in_mb,
        "python": platform.python_version(),
    }
