// Loads a model and asks it a question; Ctrl-C stops the answer.
//   bear serve                                   (in another terminal)
//   node dist/examples/chat.js "What is GGUF?"   (after `npm run build`)

import { BearClient, BearError, FinishReason, ModelState, Reason } from "@bear-grpc/client";

const question = process.argv[2] ?? "What is GGUF?";
const model = process.env["BEAR_MODEL"] ?? "bear-demo";
const bear = new BearClient(process.env["BEAR_SERVER"] ?? "127.0.0.1:50051");

const stop = new AbortController();
process.once("SIGINT", () => stop.abort());

async function load(): Promise<void> {
  const loading = bear.loadModel(model, undefined, { signal: stop.signal });
  const watching = new AbortController();
  const progress = async () => {
    for await (const { state, loadProgress } of bear.watchModels([model], { signal: watching.signal })) {
      if (loadProgress) console.error(`loading ${Math.round(100 * loadProgress.fraction)} %`);
      if (state === ModelState.MODEL_STATE_READY) break;
    }
  };
  // A load that fails never gets READY: its end, whatever it is, ends the watch.
  await Promise.all([loading.finally(() => watching.abort()), progress().catch(() => {})]);
}

try {
  await bear.waitForReady(5000);
  console.error(`server: ${await bear.health()}, version ${(await bear.serverInfo()).version}`);
  await load();
  const messages = [{ role: "user", content: question }];
  for await (const { event } of bear.generate({ model, messages }, { signal: stop.signal })) {
    if (event.$case === "delta") process.stdout.write(event.delta.text);
    if (event.$case === "completed") {
      const { finishReason, usage, timings } = event.completed;
      const speed = timings?.decodeTokensPerSecond.toFixed(1);
      console.error(
        `\n${FinishReason[finishReason]}: ${usage?.completionTokenCount} tokens, ${speed} tokens/s`,
      );
    }
  }
} catch (error) {
  if (!(error instanceof BearError)) throw error;
  process.exitCode = 1;
  if (error.code === "CANCELLED") console.error("\nstopped");
  else if (error.reason === Reason.MODEL_NOT_FOUND)
    console.error(`no model ${model}; near: ${error.metadata["nearest"]}`);
  else if (error.reason === Reason.INVALID_FIELD) console.error("wrong:", error.violations);
  else if (error.retryAfterSeconds)
    console.error(`${error.message}; try again in ${error.retryAfterSeconds} s`);
  else console.error(`${error.code} ${error.reason ?? ""}: ${error.message}`);
} finally {
  bear.close();
}
