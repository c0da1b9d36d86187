// A function's whole life through AWS's SDK for JavaScript: `life.js ENDPOINT NAME ZIP ZIP`.
//
// Prints `ok STEP` for each step; tests/e2e/test_clients.py knows which must come.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import * as sdk from "@aws-sdk/client-lambda";

const [endpoint, FunctionName, first, second] = process.argv.slice(2);
const ROLE = "arn:aws:iam::000000000000:role/test";
const LIMIT = { maxWaitTime: 180, minDelay: 1, maxDelay: 2 };

const region = process.env.AWS_DEFAULT_REGION;
const client = new sdk.LambdaClient({ endpoint, region, maxAttempts: 1 });
const send = (command, input) => client.send(new sdk[`${command}Command`]({ FunctionName, ...input }));
const text = (payload) => new TextDecoder().decode(payload);

async function refused(exception, command, input) {
  const error = await send(command, input).then(
    () => assert.fail(`${command} is not refused`),
    (error) => error,
  );
  assert.ok(error instanceof sdk[exception], `${command}: ${error.name}, not ${exception}`);
  return error;
}

const steps = {
  async create() {
    const created = await send("CreateFunction", {
      Runtime: "python3.11",
      Handler: "function.handler",
      Role: ROLE,
      Code: { ZipFile: readFileSync(first) },
      Environment: { Variables: { GREETING: "hello" } },
      Tags: { team: "node" },
    });
    assert.equal(created.Version, "$LATEST");
    await sdk.waitUntilFunctionActiveV2({ client, ...LIMIT }, { FunctionName });
    await refused("ResourceConflictException", "CreateFunction", {
      Runtime: "python3.11",
      Handler: "function.handler",
      Role: ROLE,
      Code: { ZipFile: readFileSync(first) },
    });
  },

  async configure() {
    const { Configuration, Tags } = await send("GetFunction");
    assert.equal(Tags.team, "node");
    await send("UpdateFunctionConfiguration", { Timeout: 7, RevisionId: Configuration.RevisionId });
    await sdk.waitUntilFunctionUpdatedV2({ client, ...LIMIT }, { FunctionName });
    const now = await send("GetFunctionConfiguration");
    assert.equal(now.Timeout, 7);
    assert.equal(now.Environment.Variables.GREETING, "hello");
    await refused("PreconditionFailedException", "UpdateFunctionConfiguration", {
      Timeout: 8,
      RevisionId: Configuration.RevisionId,
    });
  },

  async invoke() {
    const context = Buffer.from(JSON.stringify({ custom: { key: "value" } })).toString("base64");
    const answer = await send("Invoke", {
      Payload: JSON.stringify({ do: "context" }),
      LogType: "Tail",
      ClientContext: context,
    });
    assert.equal(answer.StatusCode, 200);
    assert.equal(answer.FunctionError, undefined);
    assert.deepEqual(JSON.parse(text(answer.Payload)), { custom: { key: "value" }, version: 1 });
    const log = Buffer.from(answer.LogResult, "base64").toString();
    assert.match(log, /^START RequestId: \S+ Version: \$LATEST\n/);
    assert.match(log, /REPORT RequestId: /);
    const dry = await send("Invoke", { InvocationType: "DryRun" });
    assert.equal(dry.StatusCode, 204);
    const event = await send("Invoke", { InvocationType: "Event", Payload: "{}" });
    assert.equal(event.StatusCode, 202);
    const failed = await send("Invoke", { Payload: JSON.stringify({ do: "raise" }) });
    assert.equal(failed.FunctionError, "Unhandled");
    assert.equal(JSON.parse(text(failed.Payload)).errorType, "ValueError");
    await refused("InvalidRequestContentException", "Invoke", { Payload: "{" });
  },

  async versions() {
    const one = await send("PublishVersion", { Description: "first" });
    assert.equal(one.Version, "1");
    const updated = await send("UpdateFunctionCode", { ZipFile: readFileSync(second), Publish: true });
    assert.equal(updated.Version, "2");
    assert.notEqual(updated.CodeSha256, one.CodeSha256);
    const versions = [];
    const pages = sdk.paginateListVersionsByFunction({ client, pageSize: 1 }, { FunctionName });
    for await (const page of pages) {
      assert.ok(page.Versions.length <= 1);
      versions.push(...page.Versions.map((version) => version.Version));
    }
    assert.deepEqual(versions, ["$LATEST", "1", "2"]);
  },

  async aliases() {
    await send("CreateAlias", { Name: "prod", FunctionVersion: "1" });
    const through = async (Qualifier) => {
      const answer = await send("Invoke", { Qualifier, Payload: JSON.stringify({ do: "context" }) });
      return [answer.ExecutedVersion, JSON.parse(text(answer.Payload)).version];
    };
    assert.deepEqual(await through("prod"), ["1", 1]);
    const RoutingConfig = { AdditionalVersionWeights: { 2: 1 } };
    await send("UpdateAlias", { Name: "prod", RoutingConfig });
    assert.deepEqual(await through("prod"), ["2", 2]);
    const { Aliases } = await send("ListAliases");
    assert.deepEqual(Aliases[0].RoutingConfig, RoutingConfig);
    await send("DeleteAlias", { Name: "prod" });
    await refused("ResourceNotFoundException", "GetAlias", { Name: "prod" });
  },

  async tags() {
    const { Configuration } = await send("GetFunction");
    const Resource = Configuration.FunctionArn;
    await send("TagResource", { Resource, Tags: { stage: "test" } });
    await send("UntagResource", { Resource, TagKeys: ["team"] });
    assert.deepEqual((await send("ListTags", { Resource })).Tags, { stage: "test" });
  },

  async concurrency() {
    const put = await send("PutFunctionConcurrency", { ReservedConcurrentExecutions: 0 });
    assert.equal(put.ReservedConcurrentExecutions, 0);
    const throttled = await refused("TooManyRequestsException", "Invoke", { Payload: "{}" });
    assert.equal(throttled.Reason, "ReservedFunctionConcurrentInvocationLimitExceeded");
    await send("DeleteFunctionConcurrency");
    assert.equal((await send("GetFunctionConcurrency")).ReservedConcurrentExecutions, undefined);
    const { AccountLimit } = await send("GetAccountSettings");
    assert.equal(AccountLimit.ConcurrentExecutions, AccountLimit.UnreservedConcurrentExecutions);
    const Qualifier = "1";
    await refused("ProvisionedConcurrencyConfigNotFoundException", "GetProvisionedConcurrencyConfig", {
      Qualifier,
    });
    await send("PutProvisionedConcurrencyConfig", { Qualifier, ProvisionedConcurrentExecutions: 1 });
    for (let i = 0; ; i++) {
      const { Status } = await send("GetProvisionedConcurrencyConfig", { Qualifier });
      if (Status === "READY") break;
      assert.ok(Status === "IN_PROGRESS" && i < 180, Status);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
    await send("DeleteProvisionedConcurrencyConfig", { Qualifier });
  },

  async events() {
    await send("PutFunctionEventInvokeConfig", { MaximumRetryAttempts: 1, MaximumEventAgeInSeconds: 60 });
    const config = await send("GetFunctionEventInvokeConfig");
    assert.equal(config.MaximumRetryAttempts, 1);
    assert.ok(config.LastModified instanceof Date);
    await send("DeleteFunctionEventInvokeConfig");
    await refused("ResourceNotFoundException", "GetFunctionEventInvokeConfig");
  },

  async delete() {
    await send("DeleteFunction");
    await refused("ResourceNotFoundException", "GetFunction");
  },
};

for (const [name, step] of Object.entries(steps)) {
  await step();
  console.log(`ok ${name}`);
}
