import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";

import {
  duration,
  FinishReason,
  GenerateOnceResponse,
  type GenerateParams,
  InferenceServiceService,
  KvCacheType,
  LoadModelResponse,
  ModelServiceService,
} from "@bear-grpc/client";

import type { GenerateOnceRequest, GenerateRequest } from "../src/gen/bear_grpc/v1/inference_service.js";
import type { LoadModelRequest } from "../src/gen/bear_grpc/v1/model_service.js";
import { connect } from "./helpers.js";

/** What a server gets for these parameters. */
async function received(t: TestContext, params: GenerateParams): Promise<GenerateRequest> {
  let request: GenerateOnceRequest | undefined;
  const { client } = await connect(t, [
    [
      InferenceServiceService,
      {
        generateOnce: (call, reply) => {
          request = call.request;
          reply(null, GenerateOnceResponse.fromPartial({}));
        },
      },
    ],
  ]);
  await client.generateOnce(params);
  assert.ok(request?.request);
  return request.request;
}

test("messages become a chat of text parts", async (t) => {
  const request = await received(t, {
    model: "m",
    messages: [
      { role: "system", content: "Be brief." },
      { role: "user", content: "Grüße 🐻" },
    ],
    templateKwargs: { enable_thinking: false, depth: 2 },
  });
  assert.equal(request.input?.$case, "chat");
  assert.deepEqual(request.input.chat, {
    messages: [
      { role: "system", content: [{ part: { $case: "text", text: "Be brief." } }] },
      { role: "user", content: [{ part: { $case: "text", text: "Grüße 🐻" } }] },
    ],
    addGenerationPrompt: undefined,
    templateKwargs: { enable_thinking: false, depth: 2 },
  });
});

test("a prompt and token ids are sent as they are", async (t) => {
  assert.deepEqual((await received(t, { model: "m", prompt: "" })).input, { $case: "prompt", prompt: "" });
  const tokens = await received(t, { model: "m", tokenIds: [0, 7] });
  assert.deepEqual(tokens.input, { $case: "tokenIds", tokenIds: { ids: [0, 7] } });
});

test("no input is left to the server to refuse, two are refused here", async (t) => {
  assert.equal((await received(t, { model: "m" } as GenerateParams)).input, undefined);
  const two = { model: "m", prompt: "a", messages: [] } as unknown as GenerateParams;
  await assert.rejects(received(t, two), {
    name: "TypeError",
    message: "only one input can be given, not prompt and messages",
  });
});

test("a set 0 or false arrives, an unset field arrives unset", async (t) => {
  const set = await received(t, {
    ...{ model: "m", prompt: "p", n: 0, loadIfNeeded: false, keepAlive: duration(0) },
    sampling: { temperature: 0, topK: 0, seed: 0 },
    stop: { maxTokens: 0 },
  });
  assert.deepEqual([set.sampling?.temperature, set.sampling?.topK, set.sampling?.seed], [0, 0, 0]);
  assert.deepEqual([set.sampling?.topP, set.sampling?.repetitionPenalty], [undefined, undefined]);
  assert.deepEqual([set.stop?.maxTokens, set.stop?.minTokens], [0, undefined]);
  assert.deepEqual([set.n, set.loadIfNeeded, set.keepAlive], [0, false, { seconds: 0, nanos: 0 }]);

  const unset = await received(t, { model: "m", prompt: "p" });
  assert.deepEqual([unset.n, unset.loadIfNeeded, unset.keepAlive], [undefined, undefined, undefined]);
  assert.deepEqual(
    [unset.sampling, unset.stop, unset.constraint, unset.output],
    [undefined, undefined, undefined, undefined],
  );
});

test("the largest seed arrives", async (t) => {
  const request = await received(t, { model: "m", prompt: "p", sampling: { seed: 4294967295 } });
  assert.equal(request.sampling?.seed, 4294967295);
});

test("answers tell unset from 0 too", async (t) => {
  const choice = (logprob: number | undefined) => ({
    index: 0,
    text: "a",
    tokens: [{ id: 1, logprob }],
    finishReason: FinishReason.FINISH_REASON_LENGTH,
  });
  const answer = GenerateOnceResponse.fromPartial({ choices: [choice(0), choice(undefined)] });
  const { client } = await connect(t, [
    [InferenceServiceService, { generateOnce: (_call, reply) => reply(null, answer) }],
  ]);
  const { choices } = await client.generateOnce({ model: "m", prompt: "p" });
  assert.deepEqual(
    choices.map(({ tokens }) => tokens[0]?.logprob),
    [0, undefined],
  );
});

test("load options leave unset what is not given", async (t) => {
  const requests: LoadModelRequest[] = [];
  const loadModel = (call: { request: LoadModelRequest }, reply: (error: null, response: object) => void) => {
    requests.push(call.request);
    reply(null, LoadModelResponse.fromPartial({ status: { name: call.request.name }, loadSeconds: 0.5 }));
  };
  const { client } = await connect(t, [[ModelServiceService, { loadModel }]]);
  await client.loadModel("m");
  const { loadSeconds } = await client.loadModel("m", {
    gpuLayers: 0,
    mmap: false,
    kvCacheType: KvCacheType.KV_CACHE_TYPE_Q8_0,
  });
  assert.equal(loadSeconds, 0.5);
  assert.equal(requests[0]?.options, undefined);
  const { gpuLayers, mmap, kvCacheType, contextLength, mlock } = requests[1]?.options ?? {};
  assert.deepEqual([gpuLayers, mmap, kvCacheType], [0, false, KvCacheType.KV_CACHE_TYPE_Q8_0]);
  assert.deepEqual([contextLength, mlock], [undefined, undefined]);
});

test("durations keep their sign and fraction", () => {
  assert.deepEqual(duration(1.25), { seconds: 1, nanos: 250_000_000 });
  assert.deepEqual(duration(-1.5), { seconds: -1, nanos: -500_000_000 });
  assert.deepEqual(duration(300), { seconds: 300, nanos: 0 });
});
