import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test, type TestContext } from "node:test";

import { status } from "@grpc/grpc-js";
import { BearClient, ModelServiceService, Reason } from "@bear-grpc/client";

import { BadRequest, ErrorInfo, RetryInfo } from "../src/gen/google/rpc/error_details.js";
import { bearError, connect, failure, failureBytes } from "./helpers.js";

const CONTRACT = new URL("../../../../protos/bear_grpc/v1/errors.proto", import.meta.url);

/** The error of a call that a server answers with `answer`. */
async function errorOf(t: TestContext, answer: object, code: Parameters<typeof bearError>[1]) {
  const { client } = await connect(t, [
    [ModelServiceService, { getModelStatus: (_call, reply) => reply(answer) }],
  ]);
  try {
    return await bearError(client.getModelStatus("m"), code);
  } finally {
  }
}

function info(
  reason: string,
  metadata: Record<string, string> = {},
  domain = "bear_grpc",
): [string, Uint8Array] {
  return ["google.rpc.ErrorInfo", ErrorInfo.encode({ reason, domain, metadata }).finish()];
}

test("an error holds code, message, reason and metadata", async (t) => {
  const answer = failure(status.NOT_FOUND, "no model is called m", [
    info("MODEL_NOT_FOUND", { nearest: "mm, n" }),
  ]);
  const error = await errorOf(t, answer, "NOT_FOUND");
  assert.equal(error.message, "no model is called m");
  assert.equal(error.reason, Reason.MODEL_NOT_FOUND);
  assert.deepEqual({ ...error.metadata }, { nearest: "mm, n" });
  assert.deepEqual(error.violations, []);
  assert.equal(error.retryAfterSeconds, undefined);
});

test("all violations of a bad request are told", async (t) => {
  const fieldViolations = [
    { field: "sampling.top_p", description: "above 0", reason: "", localizedMessage: undefined },
    { field: "stop.max_tokens", description: "0 or more", reason: "", localizedMessage: undefined },
  ];
  const detail: [string, Uint8Array] = [
    "google.rpc.BadRequest",
    BadRequest.encode({ fieldViolations }).finish(),
  ];
  const error = await errorOf(
    t,
    failure(status.INVALID_ARGUMENT, "2 fields", [info("INVALID_FIELD"), detail]),
    "INVALID_ARGUMENT",
  );
  assert.deepEqual(error.violations, [
    { field: "sampling.top_p", description: "above 0" },
    { field: "stop.max_tokens", description: "0 or more" },
  ]);
  assert.equal(error.details.length, 2);
});

test("a retry delay is told in seconds", async (t) => {
  const retryDelay = { seconds: 1, nanos: 500_000_000 };
  const detail: [string, Uint8Array] = ["google.rpc.RetryInfo", RetryInfo.encode({ retryDelay }).finish()];
  const error = await errorOf(
    t,
    failure(status.RESOURCE_EXHAUSTED, "full", [info("QUEUE_FULL"), detail]),
    "RESOURCE_EXHAUSTED",
  );
  assert.equal(error.retryAfterSeconds, 1.5);
});

test("a reason that is not known yet is kept", async (t) => {
  const error = await errorOf(t, failure(status.ABORTED, "x", [info("OF_TOMORROW")]), "ABORTED");
  assert.equal(error.reason, "OF_TOMORROW");
});

test("an ErrorInfo of another domain is not taken for ours", async (t) => {
  const error = await errorOf(
    t,
    failure(status.UNAVAILABLE, "x", [info("MODEL_LOADING", { a: "b" }, "proxy")]),
    "UNAVAILABLE",
  );
  assert.equal(error.reason, undefined);
  assert.deepEqual({ ...error.metadata }, {});
});

test("details that do not decode leave code and message", async (t) => {
  const error = await errorOf(
    t,
    failureBytes(status.NOT_FOUND, "gone", Buffer.from([0xff, 0xff, 0xff])),
    "NOT_FOUND",
  );
  assert.equal(error.message, "gone");
  assert.equal(error.reason, undefined);
});

test("a status without details has no reason", async (t) => {
  const { client } = await connect(t, [[ModelServiceService, {}]]);
  const error = await bearError(client.getModelStatus("m"), "UNIMPLEMENTED");
  assert.equal(error.reason, undefined);
});

test("no server is UNAVAILABLE", async (t) => {
  const lost = new BearClient("unix:/nowhere/bear.sock");
  t.after(() => lost.close());
  await bearError(lost.serverInfo(), "UNAVAILABLE");
  await bearError(lost.waitForReady(50), "UNAVAILABLE");
  const waiting = bearError(lost.waitForReady(60_000), "CANCELLED");
  lost.close();
  await waiting;
});

test("Reason has all reasons of the contract", () => {
  const names = [...readFileSync(CONTRACT, "utf8").matchAll(/ERROR_REASON_(\w+) = [1-9]/g)].map(
    ([, name]) => name,
  );
  assert.ok(names.length > 30);
  assert.deepEqual(Object.keys(Reason), names);
  assert.deepEqual(Object.values(Reason), names);
});
