import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";

import { type Metadata, status } from "@grpc/grpc-js";
import {
  FinishReason,
  GenerateResponse,
  GetServerInfoResponse,
  InferenceServiceService,
  ListModelsResponse,
  type ListModelsRequest,
  ModelServiceService,
  ModelState,
  PullStage,
  ServerServiceService,
} from "@bear-grpc/client";

import { HealthService } from "../src/gen/grpc/health/v1/health.js";
import { bearError, collect, connect, failure, type TestCall } from "./helpers.js";

const REQUEST = { model: "m", prompt: "p" };

function delta(text: string): GenerateResponse {
  return GenerateResponse.fromPartial({ requestId: "r", event: { $case: "delta", delta: { text } } });
}

function completed(): GenerateResponse {
  const finishReason = FinishReason.FINISH_REASON_STOP;
  return GenerateResponse.fromPartial({
    requestId: "r",
    event: { $case: "completed", completed: { finishReason } },
  });
}

/** A server whose Generate is `handler`; `calls` has what it was called with. */
async function generating(t: TestContext, handler: (call: TestCall) => void) {
  const calls: TestCall[] = [];
  const generate = (call: TestCall) => {
    calls.push(call);
    handler(call);
  };
  return { calls, ...(await connect(t, [[InferenceServiceService, { generate }]])) };
}

/** A Generate that never ends by itself: says one word, then waits; `left` resolves when its caller left. */
async function endless(t: TestContext) {
  let leave = () => {};
  const left = new Promise<void>((resolve) => (leave = resolve));
  const server = await generating(t, (call) => {
    call.once("cancelled", leave);
    call.write(delta("word"));
  });
  return { ...server, left };
}

test("a generation comes event by event, unknown events are left out", async (t) => {
  const { client } = await generating(t, (call) => {
    for (const message of [
      delta("a"),
      GenerateResponse.fromPartial({ requestId: "r" }),
      delta(""),
      delta("b"),
      completed(),
    ])
      call.write(message);
    call.end();
  });
  const events = await collect(client.generate(REQUEST));
  assert.deepEqual(
    events.map(({ event }) => event.$case),
    ["delta", "delta", "delta", "completed"],
  );
  assert.deepEqual(await collect(client.streamText(REQUEST)), ["a", "b"]);
});

test("streamText refuses several answers", async (t) => {
  const { client, calls } = await endless(t);
  assert.throws(() => client.streamText({ ...REQUEST, n: 2 as 1 }), TypeError);
  assert.equal(calls.length, 0);
});

test("breaking out of the loop cancels the call", { timeout: 5000 }, async (t) => {
  const { client, left } = await endless(t);
  for await (const text of client.streamText(REQUEST)) {
    assert.equal(text, "word");
    break;
  }
  await left;
});

test("an exception in the loop cancels the call", { timeout: 5000 }, async (t) => {
  const { client, left } = await endless(t);
  await assert.rejects(async () => {
    for await (const _ of client.generate(REQUEST)) throw new RangeError("the reader's own");
  }, RangeError);
  await left;
});

test("leaving while waiting for an event ends the wait and the call", { timeout: 5000 }, async (t) => {
  const { client, left } = await endless(t);
  const events = client.generate(REQUEST);
  await events.next();
  const waiting = events.next();
  await events.return?.();
  assert.deepEqual(await waiting, { done: true, value: undefined });
  await left;
});

test("aborting ends a stream with CANCELLED", { timeout: 5000 }, async (t) => {
  const { client, left } = await endless(t);
  const abort = new AbortController();
  const reason = new Error("the user pressed stop");
  const reading = async () => {
    for await (const _ of client.generate(REQUEST, { signal: abort.signal }))
      setImmediate(() => abort.abort(reason));
  };
  const error = await bearError(reading(), "CANCELLED");
  assert.equal(error.cause, reason);
  await left;
});

test("nothing is delivered after an abort", { timeout: 5000 }, async (t) => {
  const { client } = await generating(t, (call) => {
    for (const text of ["a", "b", "c"]) call.write(delta(text));
  });
  const abort = new AbortController();
  const texts: string[] = [];
  const reading = async () => {
    for await (const text of client.streamText(REQUEST, { signal: abort.signal })) {
      texts.push(text);
      abort.abort();
    }
  };
  await bearError(reading(), "CANCELLED");
  assert.deepEqual(texts, ["a"]);
});

test("a signal that is aborted already makes no call", async (t) => {
  const { client, calls } = await endless(t);
  const signal = AbortSignal.abort();
  await bearError(collect(client.generate(REQUEST, { signal })), "CANCELLED");
  await bearError(client.generateOnce(REQUEST, { signal }), "CANCELLED");
  assert.equal(calls.length, 0);
});

test("a signal of many calls keeps no listener of a call that ended", async (t) => {
  const { client } = await generating(t, (call) => {
    call.write(completed());
    call.end();
  });
  const { signal } = new AbortController();
  let listeners = 0;
  const { addEventListener, removeEventListener } = signal;
  signal.addEventListener = (...args: Parameters<typeof addEventListener>) => (
    listeners++,
    addEventListener.apply(signal, args)
  );
  signal.removeEventListener = (...args: Parameters<typeof removeEventListener>) => (
    listeners--,
    removeEventListener.apply(signal, args)
  );
  await collect(client.generate(REQUEST, { signal }));
  await bearError(client.generateOnce(REQUEST, { signal }), "UNIMPLEMENTED");
  assert.equal(listeners, 0);
});

test("a deadline ends a stream with DEADLINE_EXCEEDED", { timeout: 5000 }, async (t) => {
  const { client } = await endless(t);
  await bearError(collect(client.generate(REQUEST, { timeoutMs: 50 })), "DEADLINE_EXCEEDED");
});

test("aborting ends a unary call, and the server sees it", { timeout: 5000 }, async (t) => {
  const abort = new AbortController();
  let leave = () => {};
  const left = new Promise<void>((resolve) => (leave = resolve));
  const getServerInfo = (call: TestCall) => {
    call.once("cancelled", leave);
    abort.abort();
  };
  const { client } = await connect(t, [[ServerServiceService, { getServerInfo }]]);
  await bearError(client.serverInfo({ signal: abort.signal }), "CANCELLED");
  await left;
  await bearError(client.serverInfo({ timeoutMs: 50 }), "DEADLINE_EXCEEDED");
});

test("what came before an error is delivered before it", async (t) => {
  const { client } = await generating(t, (call) => {
    call.write(delta("a"));
    call.write(delta("b"));
    call.emit("error", failure(status.UNAVAILABLE, "unloaded", []));
  });
  const texts: string[] = [];
  const reading = async () => {
    for await (const text of client.streamText(REQUEST)) texts.push(text);
  };
  await bearError(reading(), "UNAVAILABLE");
  assert.deepEqual(texts, ["a", "b"]);
});

test("closing the client cancels what runs and refuses more", { timeout: 5000 }, async (t) => {
  const { client, left } = await endless(t);
  const reading = async () => {
    for await (const _ of client.generate(REQUEST)) client.close();
  };
  await bearError(reading(), "CANCELLED");
  await left;
  await bearError(client.generateOnce(REQUEST), "CANCELLED");
});

test("models are listed page by page, as far as they are read", async (t) => {
  const tokens: string[] = [];
  const listModels = (
    { request }: { request: ListModelsRequest },
    reply: (error: null, response: object) => void,
  ) => {
    tokens.push(request.pageToken);
    assert.equal(request.pageSize, 2);
    assert.deepEqual(request.states, [ModelState.MODEL_STATE_READY]);
    const page = Number(request.pageToken);
    const models = [{ name: `m${2 * page}` }, { name: `m${2 * page + 1}` }];
    reply(null, ListModelsResponse.fromPartial({ models, nextPageToken: page < 2 ? String(page + 1) : "" }));
  };
  const { client } = await connect(t, [[ModelServiceService, { listModels }]]);
  const filter = { pageSize: 2, states: [ModelState.MODEL_STATE_READY] };
  const names = (await collect(client.listModels(filter))).map(({ name }) => name);
  assert.deepEqual(names, ["m0", "m1", "m2", "m3", "m4", "m5"]);
  assert.deepEqual(tokens.splice(0), ["", "1", "2"]);
  for await (const { name } of client.listModels(filter)) if (name === "m1") break;
  assert.deepEqual(tokens, [""]);
});

test("a number that JavaScript would round fails the call", async (t) => {
  // int_value = 2^53 + 1, written by hand: the generated encoder takes only what a number can hold.
  const wire = Buffer.from([0x12, 0x09, 0x18, 0x81, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10]);
  const getModel = { ...ModelServiceService.getModel, responseSerialize: () => wire };
  const { client } = await connect(t, [[{ getModel }, { getModel: (_call, reply) => reply(null, {}) }]]);
  const error = await bearError(client.getModel("m", { includeMetadata: true }), "INTERNAL");
  assert.match(error.message, /MAX_SAFE_INTEGER/);
});

test("health tells an unknown service in one way", async (t) => {
  const check = (
    { request }: { request: { service: string } },
    reply: (error: object | null, response?: object) => void,
  ) => (request.service === "" ? reply(null, { status: 1 }) : reply(failure(status.NOT_FOUND, "", [])));
  const watch = (call: TestCall) => {
    for (const each of [3, 2, 1]) call.write({ status: each });
    call.end();
  };
  const { client } = await connect(t, [[HealthService, { check, watch }]]);
  assert.equal(await client.health(), "SERVING");
  assert.equal(await client.health("models/m"), "SERVICE_UNKNOWN");
  assert.deepEqual(await collect(client.watchHealth("models/m")), [
    "SERVICE_UNKNOWN",
    "NOT_SERVING",
    "SERVING",
  ]);
});

test("headers of the client and of the call are sent", async (t) => {
  let seen: Metadata | undefined;
  const getServerInfo = (call: TestCall, reply: (error: null, response: object) => void) => {
    seen = call.metadata;
    reply(null, GetServerInfoResponse.fromPartial({}));
  };
  const { client } = await connect(t, [[ServerServiceService, { getServerInfo }]], {
    metadata: { authorization: "Bearer k", "x-a": "client" },
  });
  await client.serverInfo({ metadata: { "x-a": "call" } });
  assert.deepEqual([seen?.get("authorization"), seen?.get("x-a")], [["Bearer k"], ["call"]]);
});

test("an API key goes with every call", async (t) => {
  let seen: Metadata | undefined;
  const getServerInfo = (call: TestCall, reply: (error: null, response: object) => void) => {
    seen = call.metadata;
    reply(null, GetServerInfoResponse.fromPartial({}));
  };
  const options = { apiKey: "bear_id_secret", metadata: { "x-a": "client" } };
  const { client } = await connect(t, [[ServerServiceService, { getServerInfo }]], options);
  await client.serverInfo({ metadata: { "x-a": "call" } });
  assert.deepEqual([seen?.get("authorization"), seen?.get("x-a")], [["Bearer bear_id_secret"], ["call"]]);
});

test("any method of the contract can be called", async (t) => {
  const pullModel = (call: TestCall) => {
    call.write({
      event: {
        $case: "progress",
        progress: {
          completedBytes: 1,
          totalBytes: 2,
          bytesPerSecond: 0,
          remainingSeconds: 0,
          stage: PullStage.PULL_STAGE_DOWNLOADING,
        },
      },
    });
    call.write({ event: undefined });
    call.end();
  };
  const pruneModels = (_call: unknown, reply: (error: null, response: object) => void) =>
    reply(null, { files: [{ path: "x.part", sizeBytes: 5 }] });
  const { client } = await connect(t, [[ModelServiceService, { pullModel, pruneModels }]]);
  const request = { target: { $case: "name", name: "m" } } as const;
  const steps = await collect(client.stream(ModelServiceService.pullModel, request, ({ event }) => event));
  assert.deepEqual(
    steps.map(({ $case }) => $case),
    ["progress"],
  );
  assert.deepEqual(await client.unary(ModelServiceService.pruneModels, { dryRun: true }), {
    files: [{ path: "x.part", sizeBytes: 5 }],
  });
});
