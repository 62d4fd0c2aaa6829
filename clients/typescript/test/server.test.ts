/**
 * The client and the real server. `BEAR_BIN` names another `bear`; BEAR_SKIP_SERVER_TESTS=1 leaves
 * these tests out where there is no server.
 */

import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { fileURLToPath } from "node:url";

import {
  BearClient,
  FinishReason,
  type GenerateEvent,
  ModelCapability,
  ModelState,
  Reason,
} from "@bear-grpc/client";

import { bearError, collect } from "./helpers.js";

const BEAR = process.env["BEAR_BIN"] ?? fileURLToPath(new URL("../../../../.venv/bin/bear", import.meta.url));
const SKIP = process.env["BEAR_SKIP_SERVER_TESTS"] === "1" && "BEAR_SKIP_SERVER_TESTS=1";
const MODEL = "bear-demo";
const HEALTH = `models/${MODEL}`;
const QUESTION = { model: MODEL, messages: [{ role: "user", content: "What is GGUF?" }] };
/** A generation that goes on for long: the end that the model wants is not taken. */
const LONG = { ...QUESTION, stop: { ignoreEos: true } };
/** Longer than any step takes on a busy machine. */
const PATIENCE = { timeoutMs: 60_000 };

describe("the real server", { skip: SKIP }, () => {
  let folder: string;
  let server: ChildProcess;
  let client: BearClient;
  let output = "";

  before(async () => {
    if (!existsSync(BEAR)) {
      throw new Error(
        `${BEAR} is missing: run \`make install\`, set BEAR_BIN, or set BEAR_SKIP_SERVER_TESTS=1`,
      );
    }
    folder = mkdtempSync(join(tmpdir(), "bear-"));
    const address = `unix:${join(folder, "bear.sock")}`;
    // Settings of whoever runs the tests must not reach the server.
    const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith("BEAR_")));
    const models = ["--models-dir", join(folder, "models")];
    server = spawn(BEAR, ["serve", "--listen", address, ...models], {
      env: { ...env, BEAR_STATE_DIR: join(folder, "state") },
      stdio: ["ignore", "pipe", "pipe"],
    });
    server.stdout?.on("data", (chunk) => (output += chunk));
    server.stderr?.on("data", (chunk) => (output += chunk));
    // grpc-js waits a second before it tries again; the server is there sooner.
    const options = { "grpc.initial_reconnect_backoff_ms": 100, "grpc.max_reconnect_backoff_ms": 200 };
    client = new BearClient(address, { options });
    await Promise.race([ready(), ended()]);
  });

  async function ready(): Promise<void> {
    await client.waitForReady(PATIENCE.timeoutMs);
    await until(client.watchHealth("", PATIENCE), (status) => status === "SERVING");
  }

  async function ended(): Promise<never> {
    const [code, signal] = await once(server, "exit");
    throw new Error(`bear serve ended with ${code ?? signal}:\n${output}`);
  }

  after(() => {
    client?.close();
    server?.kill("SIGKILL");
    if (folder) rmSync(folder, { recursive: true, force: true });
  });

  test("health and information before anything is loaded", async () => {
    assert.equal(await client.health("", PATIENCE), "SERVING");
    assert.equal(await client.health("bear_grpc.v1.InferenceService", PATIENCE), "SERVING");
    assert.equal(await client.health(HEALTH, PATIENCE), "NOT_SERVING");
    assert.equal(await client.health("models/nothing", PATIENCE), "SERVICE_UNKNOWN");
    const info = await client.serverInfo(PATIENCE);
    assert.match(info.version, /^\d+\.\d+/);
    assert.ok(info.coreCount > 0);
    assert.ok(info.devices.length > 0);
    assert.ok((info.limits?.maxMessageBytes ?? 0) > 0);
  });

  test("the embedded model is listed", async () => {
    const models = await collect(client.listModels({}, PATIENCE));
    const demo = models.find(({ name }) => name === MODEL);
    assert.ok(demo);
    assert.equal(demo.source?.kind?.$case, "embedded");
    assert.ok(demo.capabilities.includes(ModelCapability.MODEL_CAPABILITY_CHAT));
    assert.ok(demo.sizeBytes > 0);
    const paged = await collect(client.listModels({ pageSize: 1 }, PATIENCE));
    assert.deepEqual(
      paged.map(({ name }) => name),
      models.map(({ name }) => name),
    );
    const { model, metadata } = await client.getModel(MODEL, { includeMetadata: true, ...PATIENCE });
    assert.equal(model.name, MODEL);
    assert.ok(metadata.some(({ key }) => key === "general.architecture"));
  });

  test("a load is seen by its watchers", async () => {
    const watch = client.watchModels([MODEL], PATIENCE);
    const snapshot = await watch.next();
    assert.equal(snapshot.value?.state, ModelState.MODEL_STATE_AVAILABLE);
    const health = client.watchHealth(HEALTH, PATIENCE);
    assert.equal((await health.next()).value, "NOT_SERVING");

    const [loaded, statuses] = await Promise.all([
      client.loadModel(MODEL, undefined, PATIENCE),
      until(watch, ({ state }) => state === ModelState.MODEL_STATE_READY),
      until(health, (status) => status === "SERVING"),
    ]);
    assert.equal(loaded.status.state, ModelState.MODEL_STATE_READY);
    assert.ok(loaded.loadSeconds > 0);
    assert.ok((loaded.status.effectiveOptions?.contextLength ?? 0) > 0);
    assert.ok((loaded.status.memory?.weightsBytes ?? 0) > 0);
    const changes = statuses.map(({ state }) => state).filter((state, i, all) => state !== all[i - 1]);
    assert.deepEqual(changes, [ModelState.MODEL_STATE_LOADING, ModelState.MODEL_STATE_READY]);
    const fractions = statuses.flatMap(({ loadProgress }) => loadProgress?.fraction ?? []);
    assert.ok(fractions.length > 0);
    assert.ok(fractions.every((fraction) => fraction >= 0 && fraction <= 1));

    assert.equal((await client.loadModel(MODEL, undefined, PATIENCE)).loadSeconds, 0);
    assert.equal((await client.getModelStatus(MODEL, PATIENCE)).state, ModelState.MODEL_STATE_READY);
    assert.equal(await client.health(HEALTH, PATIENCE), "SERVING");
  });

  test("a question is answered in a stream", async () => {
    const events = await collect(client.generate(QUESTION, PATIENCE));
    assert.equal(events[0]?.event.$case, "started");
    assert.equal(events.filter(({ event }) => event.$case === "completed").length, 1);
    const last = events.at(-1)?.event;
    assert.ok(last?.$case === "completed");
    const { finishReason, usage, timings } = last.completed;
    assert.ok([FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH].includes(finishReason));
    assert.ok((usage?.promptTokenCount ?? 0) > 0);
    assert.ok((usage?.completionTokenCount ?? 0) > 0);
    assert.ok((timings?.totalSeconds ?? 0) > 0);
    const answer = textOf(events);
    assert.notEqual(answer.trim(), "");

    // The demo model is greedy unless asked otherwise, so every way gives the same answer.
    assert.equal((await collect(client.streamText(QUESTION, PATIENCE))).join(""), answer);
    const once = await client.generateOnce(QUESTION, PATIENCE);
    assert.equal(once.choices[0]?.text, answer);
    assert.equal(once.usage?.completionTokenCount, usage?.completionTokenCount);
  });

  test("a set 0 is a 0", async () => {
    const events = await collect(client.generate({ ...QUESTION, stop: { maxTokens: 0 } }, PATIENCE));
    const last = events.at(-1)?.event;
    assert.ok(last?.$case === "completed");
    assert.equal(last.completed.finishReason, FinishReason.FINISH_REASON_LENGTH);
    assert.equal(textOf(events), "");
  });

  test("text becomes tokens and text again", async () => {
    const text = "What is GGUF? Grüße 🐻";
    const { tokenIds, pieces } = await client.tokenize(
      MODEL,
      text,
      { addSpecial: false, includePieces: true },
      PATIENCE,
    );
    assert.ok(tokenIds.length > 0);
    assert.equal(Buffer.concat(pieces).toString("utf8").trimStart(), text);
    assert.equal((await client.detokenize(MODEL, tokenIds, PATIENCE)).text.trimStart(), text);
    const counted = await client.countTokens(MODEL, { messages: QUESTION.messages }, PATIENCE);
    const rendered = await client.tokenize(MODEL, { messages: QUESTION.messages }, {}, PATIENCE);
    assert.equal(counted.tokenCount, rendered.tokenIds.length);
    assert.ok(counted.contextLength > 0);
  });

  test("an aborted generation stops on the server", async () => {
    const { counters } = await client.getModelStatus(MODEL, PATIENCE);
    const abort = new AbortController();
    const reading = async () => {
      for await (const { event } of client.generate(LONG, { signal: abort.signal, ...PATIENCE })) {
        assert.notEqual(event.$case, "completed");
        if (event.$case === "delta") abort.abort();
      }
    };
    await bearError(reading(), "CANCELLED");
    await cancelledAfter(counters?.cancelledSequenceCount ?? 0);
  });

  test("a generation that is left stops on the server", async () => {
    const { counters } = await client.getModelStatus(MODEL, PATIENCE);
    for await (const text of client.streamText(LONG, PATIENCE)) {
      assert.notEqual(text, "");
      break;
    }
    await cancelledAfter(counters?.cancelledSequenceCount ?? 0);
  });

  /** Waits until the worker has cancelled more sequences than `count` and runs none. */
  async function cancelledAfter(count: number): Promise<void> {
    const end = Date.now() + 10_000;
    for (;;) {
      const { runningCount, counters } = await client.getModelStatus(MODEL, PATIENCE);
      const cancelled = counters?.cancelledSequenceCount ?? 0;
      if (runningCount === 0 && cancelled > count) return;
      assert.ok(Date.now() < end, `${runningCount} running, ${cancelled} cancelled, ${count} before`);
    }
  }

  test("a deadline ends a generation", async () => {
    // The server sends what there is just before the deadline if it can; otherwise the deadline itself ends the call.
    const outcome = await collect(client.generate(LONG, { timeoutMs: 100 })).catch((error: unknown) => error);
    if (Array.isArray(outcome)) {
      const last = (outcome as GenerateEvent[]).at(-1)?.event;
      assert.ok(last?.$case === "completed");
      assert.equal(last.completed.finishReason, FinishReason.FINISH_REASON_DEADLINE);
    } else {
      await bearError(Promise.reject(outcome), "DEADLINE_EXCEEDED");
    }
  });

  test("an unknown model is told with names near to it", async () => {
    const error = await bearError(
      client.getModelStatus("bear-dem", PATIENCE),
      "NOT_FOUND",
      Reason.MODEL_NOT_FOUND,
    );
    assert.ok(error.metadata["nearest"]?.split(/,\s*/).includes(MODEL), JSON.stringify(error.metadata));
    await bearError(
      collect(client.generate({ ...QUESTION, model: "bear-dem" }, PATIENCE)),
      "NOT_FOUND",
      Reason.MODEL_NOT_FOUND,
    );
  });

  test("a wrong field is told by its name", async () => {
    const wrong = { ...QUESTION, sampling: { topP: 0 } };
    const error = await bearError(
      collect(client.generate(wrong, PATIENCE)),
      "INVALID_ARGUMENT",
      Reason.INVALID_FIELD,
    );
    assert.deepEqual(
      error.violations.map(({ field }) => field),
      ["sampling.top_p"],
    );
    assert.notEqual(error.violations[0]?.description, "");
  });

  test("an unloaded model gives its memory back", async () => {
    const { releasedBytes, status } = await client.unloadModel(MODEL, { drainSeconds: 5, ...PATIENCE });
    assert.ok(releasedBytes > 0);
    assert.equal(status?.state, ModelState.MODEL_STATE_AVAILABLE);
    assert.equal(await client.health(HEALTH, PATIENCE), "NOT_SERVING");
    const request = { ...QUESTION, loadIfNeeded: false };
    await bearError(client.generateOnce(request, PATIENCE), "FAILED_PRECONDITION", Reason.MODEL_NOT_LOADED);
  });

  test("SIGTERM ends the server with 0", async () => {
    const exit = once(server, "exit");
    server.kill("SIGTERM");
    assert.deepEqual(await exit, [0, null], output);
  });
});

/** What comes up to the first item that is `last`, that one included; then the stream is left. */
async function until<Item>(items: AsyncIterable<Item>, last: (item: Item) => boolean): Promise<Item[]> {
  const result: Item[] = [];
  for await (const item of items) {
    result.push(item);
    if (last(item)) return result;
  }
  return assert.fail("the stream ended too early");
}

function textOf(events: GenerateEvent[]): string {
  return events.map(({ event }) => (event.$case === "delta" ? event.delta.text : "")).join("");
}
