"""JSON in, an HTML page of a table out."""

import json

import jinja2

PAGE = jinja2.Environment(autoescape=True).from_string(
    """<!doctype html><title>{{ title }}</title><table>
{%- for row in rows %}<tr>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}</table>"""
)


def lambda_handler(event, context):
    rows = json.loads(
        json.dumps([{"cells": [f"{row} & {column}" for column in range(6)]} for row in range(60)])
    )
    return {"statusCode": 200, "body": PAGE.render(title=event["key"], rows=rows)}
