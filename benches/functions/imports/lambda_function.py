"""Imports what half of all functions import, and makes a client, as they do, at initialisation."""

import boto3

client = boto3.client(
    "s3",
    region_name="us-east-1",
    aws_access_key_id="none",
    aws_secret_access_key="none",
)


def lambda_handler(event, context):
    # Signing needs no network and walks through much of what was imported.
    url = client.generate_presigned_url(
        "get_object", Params={"Bucket": "bucket", "Key": event["key"]}, ExpiresIn=60
    )
    return {"length": len(url)}
